//! Rounded activations: to bfloat16 in a matrix unit (`--activations bf16`), to bytes (`int8`), to 16 bits (`int16`). What that costs, and that it stays where it belongs.
//!
//! Such kernels run in the kernel interpreter everywhere, and as machine code where the CPU has a matrix unit, or vectors that multiply bytes; those of 16 bits
//! wherever tests run.

mod support;

use nextc_frontend::Quant;
use nextc_ir::Target;
use nextc_ir::target::Activations;
use support::exe::{Exe, backends};
use support::golden::{Golden, distance, divergence, fixture, root};
use support::interpreter::Interpreter;
use support::{Feed, Rows, Subject};

/// What activations are rounded to.
#[derive(Clone, Copy)]
struct Rounding {
    /// On the command line.
    name: &'static str,
    to: Activations,
    /// A machine that runs it, for the interpreter.
    cpu: &'static str,
    /// The machine that code is made for, and whether this one runs it.
    native: (&'static str, fn(&Target) -> bool),
    /// Nats per token of the demo model, more or less than with the same weights in float32.
    nats: f64,
    /// Mean divergence of the demo model's next tokens from those with the same weights, nats.
    kl: f64,
}

const BF16: Rounding = Rounding {
    name: "bf16",
    to: Activations::Bf16,
    cpu: "sapphirerapids",
    native: ("native", Target::has_tiles),
    nats: 0.002,
    kl: 0.001,
};
/// The same where vectors multiply pairs.
const PAIRS: Rounding =
    Rounding { cpu: "cooperlake", native: ("cooperlake", Target::has_pair_dots), nats: 0.002, kl: 0.001, ..BF16 };
/// Rows as bytes where weights are integers; attention and the delta rule multiply pairs of bf16.
const INT8: Rounding = Rounding {
    name: "int8",
    to: Activations::Int8,
    cpu: "cooperlake",
    native: ("cooperlake", |target| target.has_byte_dots() && target.has_pair_dots()),
    kl: 0.002,
    ..BF16
};
/// The same where vectors multiply bytes only.
const BYTES: Rounding = Rounding { cpu: "icelake-server", native: ("icelake-server", Target::has_byte_dots), ..INT8 };
const INT16: Rounding = Rounding {
    name: "int16",
    to: Activations::Int16,
    cpu: "x86-64-v3",
    native: ("x86-64-v3", |_| true),
    nats: 0.0001,
    kl: 0.00001,
};

/// Relative L2 error of a fixture's logits where rows are rounded to 16 bits, beside the same weights in float32.
const INT16_REL_L2: f64 = 2e-3;
/// Relative L2 error of a fixture's logits on a GPU, as in `tests/gpu.rs`.
const GPU_REL_L2: f64 = 0.02;

/// Fixtures of all formats that are multiplied in tiles, and of sizes that divide none; `gptq-int4` has columns in an order of their own, which are not. Beside
/// each the mean divergence over a prompt's rows, nats, of the published implementation run in bfloat16 (`tests/oracle/README.md`).
const FIXTURES: [(&str, f64); 6] = [
    ("tiny", 0.0117),
    ("odd", 0.0136),
    ("dense-mix", 0.0063),
    ("fp8", 0.0237),
    ("int4", 0.0116),
    ("gptq-int4", 0.0035),
];

/// Fixtures with weights that are multiplied as bytes, and the most that their rounded activations may diverge over a prompt's rows, nats: the mean, and the
/// median, as a single row whose expert flips decides the mean.
const FIXTURES_OF_BYTES: [(&str, Option<Quant>, f64, f64); 5] = [
    ("tiny", Some(Quant::Q8), 0.06, 0.01),
    ("odd", Some(Quant::Q8), 0.04, 0.01),
    ("odd", Some(Quant::Q4), 0.06, 0.03),
    ("dense-mix", Some(Quant::Q4), 0.3, 0.12),
    ("int4", None, 0.09, 0.015),
];

impl Rounding {
    /// The machine for the interpreter, with other activations.
    fn with(self, activations: Activations) -> Target {
        Target { activations, ..Target::named(self.cpu).expect("a known CPU") }
    }

    fn target(self) -> Target {
        self.with(self.to)
    }
}

/// An executable that rounds, if this machine can run it.
fn rounding(to: Rounding, model: &std::path::Path, quant: Option<Quant>) -> Option<Exe> {
    let there = backends().contains(&"llvm") && Target::native().is_ok_and(|t| (to.native.1)(&t));
    if !there {
        println!("skipped: no LLVM, or a machine without fast products of {}", to.name);
    }
    let option = ["--quant", quant.map_or("keep", name_of), "--cpu", to.native.0];
    there.then(|| Exe::build(model, "llvm", &[&["--activations", to.name, "--kv", "f32"], &option[..]].concat()))
}

fn name_of(quant: Quant) -> &'static str {
    Quant::ALL.into_iter().find(|q| q.1 == quant).expect("every one has a name").0
}

fn prompt(name: &str) -> Vec<i32> {
    let g = Golden::read(&fixture(name).join("golden.safetensors"));
    [g.ints("input_ids"), g.ints("continuation_ids")].concat()
}

fn one(subject: &dyn Subject, tokens: &[i32], feed: Feed) -> Rows {
    subject.logits(&[tokens.to_vec()], feed, 0).remove(0)
}

#[track_caller]
fn same_bits(a: &[f32], b: &[f32], what: &str) {
    let differing = a.iter().zip(b).filter(|(x, y)| x.to_bits() != y.to_bits()).count();
    assert!(a.len() == b.len() && differing == 0, "{what}: {differing} of {} numbers differ", a.len());
}

/// Long runs are near the published logits, and the machine's bits are the interpreter's; tokens that are decoded have the bits of float32.
#[test]
fn products_in_tiles_keep_to_the_published_logits() {
    check_published(BF16, &FIXTURES);
}

/// The same where vectors multiply pairs: of the fixtures those with weights in bf16, in columns by whole lines.
#[test]
fn products_of_pairs_keep_to_the_published_logits() {
    check_published(
        PAIRS,
        &FIXTURES.into_iter().filter(|(name, _)| ["tiny", "dense-mix"].contains(name)).collect::<Vec<_>>(),
    );
}

fn check_published(to: Rounding, fixtures: &[(&str, f64)]) {
    let (mut own, mut published) = (0.0, 0.0);
    for &(name, bfloat16) in fixtures {
        let g = Golden::read(&fixture(name).join("golden.safetensors"));
        let (want, vocab) = g.floats("prefill_logits");
        let tokens = prompt(name);
        let kernels = Interpreter::kernels(&fixture(name), &to.target());
        let got = one(&kernels, &tokens, Feed::Prefill).logits;
        let rel = distance(&got[..want.len()], want);
        let rows = want.chunks(vocab).zip(got.chunks(vocab));
        let mut divergences: Vec<f64> = rows.map(|(want, got)| divergence(want, got)).collect();
        let mean = divergences.iter().sum::<f64>() / divergences.len() as f64;
        divergences.sort_by(f64::total_cmp);
        let median = divergences[divergences.len() / 2];
        println!(
            "{name}: relative L2 {rel:.2e}, KL mean {mean:.2e}, median {median:.2e}; published bf16 {bfloat16:.2e}"
        );
        // a single row whose expert flips decides the mean of a prompt, so that is compared over all fixtures
        assert!(median <= bfloat16, "{name}: median KL {median:e}, at most {bfloat16}");
        (own, published) = (own + mean, published + bfloat16);
        assert!(rel > 0.0, "{name}: nothing was rounded");
        let few = &tokens[..11];
        let exact = Interpreter::kernels(&fixture(name), &to.with(Activations::F32));
        same_bits(&one(&kernels, few, Feed::Decode).logits, &one(&exact, few, Feed::Decode).logits, name);
        if let Some(exe) = rounding(to, &fixture(name), None) {
            same_bits(&one(&exe, &tokens, Feed::Prefill).logits, &got, &format!("{name}, compiled and interpreted"));
        }
    }
    assert!(own <= published, "sum of mean KL {own:e}, of the published implementation in bfloat16 {published:e}");
}

/// Long runs are near the logits of the same weights in float32, and the machine's bits are the interpreter's; tokens that are decoded have the bits of float32.
#[test]
fn products_of_bytes_keep_to_float32() {
    for (name, quant, most, most_median) in FIXTURES_OF_BYTES {
        let (_, vocab) = Golden::read(&fixture(name).join("golden.safetensors")).floats("prefill_logits");
        let tokens = prompt(name);
        let kernels = |to| Interpreter::quantised_kernels(&fixture(name), quant, &BYTES.with(to));
        let (exact, rounded) = (kernels(Activations::F32), kernels(Activations::Int8));
        let name = format!("{name} {}", quant.map_or("keep", name_of));
        let [want, got] = [&exact, &rounded].map(|subject| one(subject, &tokens, Feed::Prefill).logits);
        let rel = distance(&got, &want);
        let rows = want.chunks(vocab).zip(got.chunks(vocab));
        let mut divergences: Vec<f64> = rows.map(|(want, got)| divergence(want, got)).collect();
        let mean = divergences.iter().sum::<f64>() / divergences.len() as f64;
        divergences.sort_by(f64::total_cmp);
        let median = divergences[divergences.len() / 2];
        println!("{name}: relative L2 {rel:.2e}, KL mean {mean:.2e}, median {median:.2e}");
        assert!(rel > 0.0, "{name}: nothing was rounded");
        assert!(mean <= most && median <= most_median, "{name}: mean KL {mean:e}, median {median:e}");
        let few = &tokens[..11];
        let [want, same] = [&exact, &rounded].map(|subject| one(subject, few, Feed::Decode).logits);
        same_bits(&same, &want, &name);
    }
    for (name, quant, ..) in FIXTURES_OF_BYTES {
        let Some(exe) = rounding(BYTES, &fixture(name), quant) else { return };
        let tokens = prompt(name);
        let kernels = Interpreter::quantised_kernels(&fixture(name), quant, &BYTES.target());
        let [got, want] = [&exe as &dyn Subject, &kernels].map(|s| one(s, &tokens, Feed::Prefill).logits);
        same_bits(&got, &want, &format!("{name}, compiled and interpreted"));
    }
}

/// Products of 16 bits are near those in float32, those of few tokens as of many; the machine's bits are the interpreter's, with vectors of 256 bits and of 128.
#[test]
fn products_of_shorts_keep_to_float32() {
    for (name, quant, ..) in FIXTURES_OF_BYTES {
        let tokens = prompt(name);
        let kernels = |target: &Target| Interpreter::quantised_kernels(&fixture(name), quant, target);
        let (exact, wide) = (kernels(&INT16.with(Activations::F32)), kernels(&INT16.target()));
        let text = format!("{name} {}", quant.map_or("keep", name_of));
        let [want, got] = [&exact, &wide].map(|subject| one(subject, &tokens, Feed::Prefill).logits);
        let rel = distance(&got, &want);
        println!("{text}: relative L2 {rel:.2e}");
        assert!(rel > 0.0, "{text}: nothing was rounded");
        assert!(rel <= INT16_REL_L2, "{text}: relative L2 {rel:e}");
        same_bits(&one(&wide, &tokens, Feed::Decode).logits, &got, &format!("{text}, token by token"));
        if let Some(exe) = rounding(INT16, &fixture(name), quant) {
            same_bits(&one(&exe, &tokens, Feed::Prefill).logits, &got, &format!("{text}, compiled and interpreted"));
        }
        let narrow = kernels(&INT16.target().for_cranelift());
        let args = ["--activations", INT16.name, "--kv", "f32", "--quant", quant.map_or("keep", name_of)];
        let exe = Exe::build(&fixture(name), "cranelift", &args);
        let [got, want] = [&exe as &dyn Subject, &narrow].map(|s| one(s, &tokens, Feed::Prefill).logits);
        same_bits(&got, &want, &format!("{text}, compiled by Cranelift and interpreted"));
    }
}

/// The tokens of a fixture again and again, so many in all.
fn repeated(name: &str, tokens: usize) -> Vec<i32> {
    prompt(name).into_iter().cycle().take(tokens).collect()
}

/// A token's bits follow from its class: they are the same whole and in long pieces, alone and beside others of either class.
#[test]
fn bits_depend_on_the_class_alone() {
    let (q8, q4) = (Some(Quant::Q8), Some(Quant::Q4));
    let rounded = [(INT8, "odd", q8), (INT8, "int4", None), (INT16, "odd", q4)];
    let cases = [(BF16, "odd", None), (BF16, "int4", None), (PAIRS, "odd", None)].into_iter().chain(rounded);
    for (to, name, quant) in cases {
        let long = repeated(name, 75);
        let reversed: Vec<i32> = long.iter().rev().copied().collect();
        let short = long[3..8].to_vec();
        let kernels = Interpreter::quantised_kernels(&fixture(name), quant, &to.target());
        let exe = rounding(to, &fixture(name), quant);
        let subjects = std::iter::once(&kernels as &dyn Subject).chain(exe.as_ref().map(|e| e as &dyn Subject));
        for subject in subjects {
            let alone = [&long, &reversed, &short].map(|tokens| one(subject, tokens, Feed::Prefill).logits);
            let batch = [short.clone(), long.clone(), short.clone(), short.clone(), reversed.clone(), long.clone()];
            let together = subject.logits(&batch, Feed::Prefill, 0);
            for (got, want) in together.iter().zip([2, 0, 2, 2, 1, 0]) {
                same_bits(&got.logits, &alone[want], &format!("{name}: in a batch"));
            }
        }
        let Some(exe) = exe else { continue };
        // 200 = 3 * 64 + 8: the last 72 tokens stay together, as 8 would be decoded
        let longer = repeated(name, 200);
        let whole = one(&exe, &longer, Feed::Prefill).logits;
        for pieces in [80, 97, 130, 192] {
            let got = one(&exe, &longer, Feed::Pieces(pieces)).logits;
            same_bits(&got, &whole, &format!("{name}: in pieces of {pieces}"));
        }
    }
}

/// The kernels of a GPU: the same of their long runs, in pieces that are cut between two chunks and in a batch.
#[test]
fn long_runs_of_a_gpu_keep_their_bits_between_chunks() {
    let kernels = Interpreter::kernels(&fixture("odd"), &Target::gpu("sm_90a").expect("a GPU that is known"));
    let (long, short) = (repeated("odd", 90), prompt("odd"));
    let batch = kernels.logits(&[short.clone(), long.clone()], Feed::Prefill, 0);
    let g = Golden::read(&fixture("odd").join("golden.safetensors"));
    let (want, _) = g.floats("prefill_logits");
    let rel = distance(&batch[0].logits[..want.len()], want);
    println!("odd, on a GPU: relative L2 {rel:.2e}");
    assert!(rel <= GPU_REL_L2, "relative L2 {rel:e}");
    same_bits(&one(&kernels, &short, Feed::Prefill).logits, &batch[0].logits, "in a batch");
    same_bits(&one(&kernels, &long, Feed::Pieces(64)).logits, &batch[1].logits, "in pieces of 64");
}

/// What a prompt's batch and its steps are does not show in what is generated.
#[test]
fn generated_tokens_depend_on_neither_batch_nor_steps() {
    let prompts: Vec<Vec<i32>> = [200, 90, 150, 131].map(|tokens| repeated("tiny", tokens)).into();
    for (to, quant) in [(BF16, None), (PAIRS, None), (INT8, Some(Quant::Q8)), (INT16, Some(Quant::Q8))] {
        if let Some(exe) = rounding(to, &fixture("tiny"), quant) {
            check_generated_tokens(&exe, &prompts);
        }
    }
}

fn check_generated_tokens(exe: &Exe, prompts: &[Vec<i32>]) {
    let tokens = |prompts: &[Vec<i32>], args: &[&str]| {
        let fixed = ["--max-new-tokens", "24", "--temperature", "1", "--seed", "7"];
        exe.generate(prompts, &[&fixed, args].concat()).0
    };
    let whole = tokens(prompts, &["--step-tokens", "1000"]);
    for args in [["--step-tokens", "80", "--batch", "4"], ["--step-tokens", "150", "--batch", "2"]] {
        assert_eq!(tokens(prompts, &args), whole, "{args:?}");
        assert_eq!(tokens(prompts, &[&args[..], &["--draft-tokens", "2"]].concat()), whole, "{args:?}, with drafts");
    }
}

/// What rounding costs a trained model, beside float32, with plain and with quantised weights.
#[test]
fn the_demo_model_keeps_to_its_lines() {
    let dir = root().join("examples/demo-model");
    let text = std::fs::read_to_string(dir.join("golden_nll.json")).expect("the demo model has its golden file");
    let golden: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let tokens: Vec<i32> = serde_json::from_value(golden["tokens"].clone()).expect("token ids");
    let window = golden["window"].as_u64().expect("a number") as usize;
    let bf16 = [None, Some(Quant::Q8), Some(Quant::Q4)].map(|quant| (BF16, quant));
    let integers = [(INT8, Quant::Q8), (INT8, Quant::Q4), (BYTES, Quant::Q4), (INT16, Quant::Q4)]
        .map(|(to, quant)| (to, Some(quant)));
    for (to, quant) in bf16.into_iter().chain([(PAIRS, None)]).chain(integers) {
        let Some(rounded) = rounding(to, &dir, quant) else { continue };
        let quant = quant.map_or("keep", name_of);
        let exact = Exe::build(&dir, "llvm", &["--quant", quant, "--cpu", to.native.0]);
        let nats = |exe: &Exe| {
            let ids = exe.ids(std::slice::from_ref(&tokens));
            let out = exe.json("eval", &["--tokens", ids.to_str().expect("UTF-8"), "--window", &window.to_string()]);
            out["nats_per_token"].as_f64().expect("a number")
        };
        let (own, float32) = (nats(&rounded), nats(&exact));
        let windows: Vec<Vec<i32>> = tokens.chunks(window).take(2).map(<[i32]>::to_vec).collect();
        let [a, b] = [&exact, &rounded].map(|exe| exe.logits(&windows, Feed::Prefill, 0));
        let rows = |all: &[Rows]| all.iter().flat_map(|r| r.logits.clone()).collect::<Vec<f32>>();
        let (a, b) = (rows(&a), rows(&b));
        let divergences: Vec<f64> = a.chunks(8192).zip(b.chunks(8192)).map(|(a, b)| divergence(a, b)).collect();
        let kl = divergences.iter().sum::<f64>() / divergences.len() as f64;
        let name = to.name;
        println!("{quant}: {own:.5} nats per token rounded to {name}, {float32:.5} in float32, KL {kl:.2e}");
        assert!((own - float32).abs() <= to.nats, "{quant}, {name}: {own} nats per token, {float32} in float32");
        assert!(kl <= to.kl, "{quant}, {name}: KL {kl:e}");
    }
}
