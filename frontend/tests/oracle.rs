//! The graph that is built, run in the interpreter, gives the outputs of the published model's reference.
//!
//! Tolerances are those that the oracle's README asks of a candidate computing in float32.

use std::path::{Path, PathBuf};

use nextc_frontend::{Model, Options, load};
use nextc_ir::eval::{Session, StepInputs};
use safetensors::{Dtype, SafeTensors};

const MAX_ABS: f32 = 1e-3;
const MAX_REL_L2: f64 = 1e-5;
/// Tokens of a KV page: small, so that sequences span several.
const PAGE_TOKENS: usize = 16;
const PAGES: usize = 64;

fn oracle(path: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/oracle")).join(path)
}

/// The golden tensors of a fixture.
struct Golden(Vec<u8>);

impl Golden {
    fn open(fixture: &str) -> Self {
        Self(std::fs::read(oracle(fixture).join("golden.safetensors")).expect("the fixture is there"))
    }

    fn words(&self, name: &str, dtype: Dtype) -> Vec<[u8; 4]> {
        let file = SafeTensors::deserialize(&self.0).expect("valid");
        let view = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(view.dtype(), dtype, "{name}");
        view.data().as_chunks::<4>().0.to_vec()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        self.words(name, Dtype::F32).into_iter().map(f32::from_le_bytes).collect()
    }

    fn ints(&self, name: &str) -> Vec<i32> {
        self.words(name, Dtype::I32).into_iter().map(i32::from_le_bytes).collect()
    }

    /// The rows of `name` that are stored: `name.rows`, or all of `count`.
    fn rows(&self, name: &str, count: usize) -> Vec<usize> {
        let file = SafeTensors::deserialize(&self.0).expect("valid");
        let named = format!("{name}.rows");
        match file.names().contains(&&*named) {
            true => self.ints(&named).into_iter().map(|r| r as usize).collect(),
            false => (0..count).collect(),
        }
    }

    /// Compares the stored rows of `name` with those of `found`, which has all rows.
    fn check(&self, name: &str, found: &[f32], count: usize) {
        let want = self.floats(name);
        let width = found.len() / count;
        let rows = self.rows(name, count);
        assert_eq!(want.len(), rows.len() * width, "{name}");
        let (mut worst, mut error, mut norm) = (0.0f32, 0.0f64, 0.0f64);
        for (row, want) in rows.iter().zip(want.chunks(width)) {
            for (a, b) in found[row * width..][..width].iter().zip(want) {
                assert!(a.is_finite(), "{name}: row {row} is not finite");
                worst = worst.max((a - b).abs());
                error += f64::from(a - b).powi(2);
                norm += f64::from(*b).powi(2);
            }
        }
        let relative = (error / norm).sqrt();
        assert!(worst <= MAX_ABS && relative <= MAX_REL_L2, "{name}: max abs {worst:e}, relative L2 {relative:e}");
    }
}

fn model(fixture: &str) -> Model {
    load(&oracle(fixture), &Options::default()).unwrap_or_else(|e| panic!("{fixture}: {e}"))
}

fn session(model: &Model) -> Session<'_, f32> {
    let source = model.source.as_ref().expect("the fixture has weights");
    Session::new(&model.module, source, PAGE_TOKENS).expect("weights can be read")
}

/// Prefill in one step, then the forced continuation token by token.
fn check_main_model(fixture: &str) {
    let (model, golden) = (model(fixture), Golden::open(fixture));
    let mut session = session(&model);
    let prompt = golden.ints("input_ids");
    let prefill = session.step("step", &StepInputs::sequence(&prompt, 0, PAGES)).expect("a step");
    golden.check("prefill_logits", &prefill.logits, prompt.len());
    let forced = golden.ints("continuation_ids");
    let mut logits = Vec::new();
    for (token, position) in forced.iter().zip(prompt.len() as i32..) {
        logits.extend(session.step("step", &StepInputs::sequence(&[*token], position, PAGES)).expect("a step").logits);
    }
    golden.check("decode_logits", &logits, forced.len());
}

/// The first pass of MTP over the short prompt: row t is fed the token after it and the main model's hidden row.
fn check_mtp(fixture: &str) {
    let (model, golden) = (model(fixture), Golden::open(fixture));
    let mut session = session(&model);
    let prompt = golden.ints("short_input_ids");
    let main = session.step("step", &StepInputs::sequence(&prompt, 0, PAGES)).expect("a step");
    golden.check("short_logits", &main.logits, prompt.len());
    golden.check("short_final_norm", &main.hidden, prompt.len());
    let last = &main.logits[main.logits.len() - model.config.vocab_size as usize..];
    let greedy = (0..last.len()).max_by(|a, b| last[*a].total_cmp(&last[*b])).expect("not empty");
    let next: Vec<i32> = prompt[1..].iter().copied().chain([greedy as i32]).collect();
    let inputs = StepInputs { hidden: Some(main.hidden), ..StepInputs::sequence(&next, 0, PAGES) };
    let draft = session.step("draft", &inputs).expect("a step");
    golden.check("mtp_short_logits", &draft.logits, prompt.len());
}

/// Three drafts after the prompt and its greedy token: each is fed the one before it, and MTP's own hidden row. Before them MTP has
/// only followed the prompt.
fn check_drafts(fixture: &str) {
    let (model, golden) = (model(fixture), Golden::open(fixture));
    let mut session = session(&model);
    let prompt = golden.ints("input_ids");
    let main = session.step("step", &StepInputs::sequence(&prompt, 0, PAGES)).expect("a step");
    let mut hidden = main.hidden;
    let last = hidden.split_off(hidden.len() - model.config.hidden_size as usize);
    let inputs = StepInputs { hidden: Some(hidden), ..StepInputs::sequence(&prompt[1..], 0, PAGES) };
    session.step("follow", &inputs).expect("a step");
    let first = StepInputs::sequence(&[golden.ints("greedy_ids")[0]], prompt.len() as i32 - 1, PAGES);
    let mut inputs = StepInputs { hidden: Some(last), ..first };
    let mut logits = Vec::new();
    let drafts = golden.ints("mtp_draft_ids");
    for (token, position) in drafts.iter().zip(prompt.len() as i32..) {
        let draft = session.step("draft", &inputs).expect("a step");
        logits.extend_from_slice(&draft.logits[draft.logits.len() - model.config.vocab_size as usize..]);
        let hidden = draft.hidden[draft.hidden.len() - model.config.hidden_size as usize..].to_vec();
        inputs = StepInputs { hidden: Some(hidden), ..StepInputs::sequence(&[*token], position, PAGES) };
    }
    golden.check("mtp_draft_logits", &logits, drafts.len());
}

macro_rules! fixtures {
    ($($test:ident: $fixture:literal,)*) => {$(
        #[test]
        fn $test() {
            check_main_model($fixture);
            check_mtp($fixture);
            check_drafts($fixture);
        }
    )*};
}

fixtures! {
    tiny: "tiny",
    odd: "odd",
    dense_mix: "dense-mix",
    yarn: "yarn",
    long: "long",
}
