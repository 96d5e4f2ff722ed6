//! What each `--quant` and `--kv`, and activations in int8, cost the demo model: nats per token, divergence from float32, and how often its drafts are right.
//! `cargo test --release --features llvm --test quality -- --nocapture` prints the table of `docs/quantisation.md`.

mod support;

use std::path::Path;

use nextc_ir::Target;
use rayon::prelude::*;
use support::exe::{Exe, backends};
use support::golden::{divergence, root};
use support::{Feed, Rows, Subject, argmax};

/// What a build may be worse than float32, and what it is on the command line.
struct Limit {
    options: &'static [&'static str],
    /// Nats per token more.
    nats: f64,
    /// Mean divergence, nats.
    kl: f64,
}

/// The lines of quality: those of q8 and q4 are promised; the others are what was measured, with room.
const LIMITS: [Limit; 9] = [
    Limit { options: &["--quant", "bf16"], nats: 0.0, kl: 0.0 },
    Limit { options: &["--quant", "fp8"], nats: 0.01, kl: 0.01 },
    Limit { options: &["--quant", "q8"], nats: 0.002, kl: 0.002 },
    Limit { options: &["--quant", "q4"], nats: 0.06, kl: 0.065 },
    Limit { options: &["--kv", "bf16"], nats: 0.001, kl: 0.001 },
    Limit { options: &["--kv", "int8"], nats: 0.001, kl: 0.001 },
    Limit { options: &["--kv", "fp8"], nats: 0.005, kl: 0.005 },
    Limit { options: &["--quant", "q8", "--activations", "int8", "--kv", "f32"], nats: 0.002, kl: 0.003 },
    Limit { options: &["--quant", "q4", "--activations", "int8", "--kv", "f32"], nats: 0.06, kl: 0.066 },
];

impl Limit {
    /// Whether this machine runs such a build.
    fn can_run(&self, backend: &str) -> bool {
        let has_bytes = || backend == "llvm" && Target::native().is_ok_and(|t| t.has_byte_dots());
        !self.options.contains(&"int8") || !self.options.contains(&"--activations") || has_bytes()
    }

    /// Its options without the dashes.
    fn name(&self) -> String {
        self.options.join(" ").replace("--", "")
    }
}
/// Windows that are evaluated together; a file of their logits has 134 MB.
const WINDOWS: usize = 4;

/// Sums over positions.
#[derive(Default)]
struct Sums {
    positions: f64,
    nats: f64,
    kl: f64,
    same_top: f64,
    drafts: f64,
    right: f64,
}

impl Sums {
    /// Adds a window: its inputs are all tokens but the last, its targets all but the first.
    fn add(&mut self, tokens: &[i32], own: &Rows, float32: &Rows, vocab: usize) {
        let rows = own.logits.chunks(vocab).zip(float32.logits.chunks(vocab)).zip(&tokens[1..]);
        for ((own, float32), &target) in rows {
            self.positions += 1.0;
            self.nats += loss(own, target as usize);
            self.kl += divergence(float32, own);
            self.same_top += f64::from(u8::from(argmax(own) == argmax(float32)));
        }
        let next = own.logits.chunks(vocab).skip(1);
        for (draft, next) in own.mtp.chunks(vocab).zip(next) {
            self.drafts += 1.0;
            self.right += f64::from(u8::from(argmax(draft) == argmax(next)));
        }
    }
}

fn loss(logits: &[f32], target: usize) -> f64 {
    let top = logits.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(f64::from(x)));
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - top).exp()).sum();
    top + sum.ln() - f64::from(logits[target])
}

/// The validation text of the demo model, and the length of the windows that it is evaluated in.
fn golden_text(dir: &Path) -> (Vec<i32>, usize) {
    let text = std::fs::read_to_string(dir.join("golden_nll.json")).expect("the demo model has its golden file");
    let golden: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let tokens = serde_json::from_value(golden["tokens"].clone()).expect("token ids");
    (tokens, golden["window"].as_u64().expect("a number") as usize)
}

#[test]
fn quantised_demo_models_keep_to_their_lines() {
    let dir = root().join("examples/demo-model");
    let (tokens, window) = golden_text(&dir);
    let vocab = 8192;
    // the widest backend; what is measured is the rounding of weights
    let backend = *backends().last().expect("there is a backend");
    let float32 = Exe::build(&dir, backend, &[]);
    let limits: Vec<Limit> = LIMITS.into_iter().filter(|limit| limit.can_run(backend)).collect();
    let exes: Vec<Exe> = limits.par_iter().map(|limit| Exe::build(&dir, backend, limit.options)).collect();
    let mut all: Vec<Sums> = (0..=limits.len()).map(|_| Sums::default()).collect();
    let windows: Vec<&[i32]> =
        (0..(tokens.len() - 1) / window).map(|w| &tokens[w * window..=(w + 1) * window]).collect();
    for windows in windows.chunks(WINDOWS) {
        let inputs: Vec<Vec<i32>> = windows.iter().map(|w| w[..window].to_vec()).collect();
        let reference = float32.logits(&inputs, Feed::Prefill, 1);
        all.par_iter_mut().enumerate().for_each(|(i, sums)| {
            let own = i.checked_sub(1).map(|i| exes[i].logits(&inputs, Feed::Prefill, 1));
            let own = own.as_ref().unwrap_or(&reference);
            for ((tokens, own), float32) in windows.iter().zip(own).zip(&reference) {
                sums.add(tokens, own, float32, vocab);
            }
        });
    }
    println!(
        "build                                MB      nats/token  more than f32  KL         same top-1  drafts right"
    );
    let base = all[0].nats / all[0].positions;
    for (i, sums) in all.iter().enumerate() {
        let (name, exe) = i.checked_sub(1).map_or(("float32".to_owned(), &float32), |i| (limits[i].name(), &exes[i]));
        let mean = |x: f64| x / sums.positions;
        let mb = exe.json("info", &["--json"])["weights_bytes"].as_f64().unwrap_or(0.0) / 1e6;
        println!(
            "{name:<36} {mb:<7.1} {:<11.5} {:<+14.5} {:<10.2e} {:<11.4} {:.4}",
            mean(sums.nats),
            mean(sums.nats) - base,
            mean(sums.kl),
            mean(sums.same_top),
            sums.right / sums.drafts
        );
    }
    for (limit, sums) in limits.iter().zip(&all[1..]) {
        let (nats, kl) = (sums.nats / sums.positions - base, sums.kl / sums.positions);
        let name = limit.name();
        assert!(nats <= limit.nats, "{name}: {nats:+} nats a token, at most {:+}", limit.nats);
        assert!(kl <= limit.kl, "{name}: KL {kl:e}, at most {:e}", limit.kl);
    }
}

/// Drafts a step, and the share of them that the README of the demo model says to be right.
const ACCEPTANCE: [(usize, f64); 3] = [(1, 0.87), (2, 0.79), (3, 0.74)];
/// How far from that a share may be.
const ACCEPTANCE_ROOM: f64 = 0.03;

#[test]
fn as_many_drafts_are_right_as_the_demo_model_promises() {
    let dir = root().join("examples/demo-model");
    let (tokens, window) = golden_text(&dir);
    // 192 greedy tokens after the first 128 of each window of the validation text
    let prompts: Vec<Vec<i32>> =
        tokens.chunks(window).filter(|w| w.len() == window).map(|w| w[..128].to_vec()).collect();
    let exe = Exe::build(&dir, backends().last().expect("there is a backend"), &[]);
    let ids = exe.ids(&prompts);
    let mut same = Vec::new();
    for (drafts, promised) in ACCEPTANCE {
        let drafts = drafts.to_string();
        let args = ["--tokens", ids.to_str().expect("UTF-8"), "--max-new-tokens", "192", "--temperature", "0"];
        let answer =
            exe.json("generate", &[&args, &["--ignore-eos", "--json", "--draft-tokens", &drafts][..]].concat());
        let sequences = answer["sequences"].as_array().expect("one for each prompt");
        let sum = |key: &str| sequences.iter().map(|s| s["mtp"][key].as_f64().expect("a number")).sum::<f64>();
        let share = sum("accepted") / sum("drafted");
        println!("{drafts} drafts: {share:.3} of {} right, {promised} promised", sum("drafted"));
        assert!((share - promised).abs() <= ACCEPTANCE_ROOM, "{drafts} drafts: {share}, promised {promised}");
        same.push(sequences.iter().map(|s| s["tokens"].clone()).collect::<Vec<_>>());
    }
    assert!(same.windows(2).all(|pair| pair[0] == pair[1]), "drafts changed tokens");
}
