//! Executables for an NVIDIA GPU against the published implementation's outputs, against a processor, and against themselves: in pieces, in
//! batches, with drafts.
//!
//! Where there is no GPU each test says so and passes. `scripts/pack-gpu-tests.sh` packs this program with executables and golden files for a machine
//! that has a GPU and no compiler: there `NEXTC_GPU_TESTS` names the folder.

#![cfg(feature = "llvm")]

mod support;

use std::path::{Path, PathBuf};

use support::exe::Exe;
use support::golden::{Golden, fixture, root};
use support::{Feed, Subject, argmax};

const FIXTURES: [&str; 8] = ["tiny", "odd", "dense-mix", "yarn", "long", "fp8", "int4", "gptq-int4"];

/// Relative L2 error of a tensor of logits against float32: rows of products are 16-bit floats, and so is KV.
const REL_L2: f64 = 0.02;
/// The share of tokens of the demo model that it must choose as in float32.
const TOP_1: f64 = 0.98;
/// Tokens of the demo model's text that are compared with float32, and every how many of them.
const TEXT_TOKENS: usize = 2000;
const TEXT_STRIDE: usize = 20;
/// How much further from float32 the median row of their last quarter may be than that of the first.
const DRIFT: f64 = 1.5;

/// The folder that `scripts/pack-gpu-tests.sh` has packed, if this runs from there.
fn packed() -> Option<PathBuf> {
    std::env::var_os("NEXTC_GPU_TESTS").map(PathBuf::from)
}

/// True, with a word, if there is no GPU.
fn skipped() -> bool {
    let missing = !Path::new("/dev/nvidiactl").exists();
    if missing {
        println!("skipped: no CUDA device");
    }
    missing
}

fn model(name: &str) -> PathBuf {
    if name == "demo-model" { root().join("examples/demo-model") } else { fixture(name) }
}

/// The executable of a model: packed, or built now.
fn exe(name: &str) -> Option<Exe> {
    match packed() {
        Some(dir) => Exe::packed(&dir.join(name).join("exe")),
        None => Some(Exe::build(&model(name), "llvm", &["--target", "cuda", "--activations", "auto"])),
    }
}

/// The tokens of the demo model's text.
fn text() -> Vec<i32> {
    serde_json::from_value(demo_json("golden_nll.json")["tokens"].clone()).expect("token ids")
}

/// A golden file of the demo model.
fn demo_json(file: &str) -> serde_json::Value {
    let text = std::fs::read_to_string(beside("demo-model", file)).expect("the demo model has its golden files");
    serde_json::from_str(&text).expect("JSON")
}

/// The logits of the first tokens of the demo model's text on a processor in float32, of each [`TEXT_STRIDE`] the last: packed, or computed
/// now.
fn in_float32(tokens: &[i32]) -> Vec<f32> {
    match packed() {
        Some(dir) => Golden::read(&dir.join("demo-model/float32.safetensors")).floats("logits").0.to_vec(),
        None => {
            let exe = Exe::build(&model("demo-model"), "llvm", &[]);
            compared_rows(&exe.logits(&[tokens.to_vec()], Feed::Prefill, 0)[0].logits)
        }
    }
}

/// The rows of logits that are compared.
fn compared_rows(logits: &[f32]) -> Vec<f32> {
    let width = logits.len() / TEXT_TOKENS;
    logits.chunks(width).skip(TEXT_STRIDE - 1).step_by(TEXT_STRIDE).flatten().copied().collect()
}

/// A file beside a model.
fn beside(name: &str, file: &str) -> PathBuf {
    packed().map_or_else(|| model(name).join(file), |dir| dir.join(name).join(file))
}

fn golden(name: &str) -> Golden {
    Golden::read(&beside(name, "golden.safetensors"))
}

/// Runs `check` on each fixture that there is an executable of.
fn each_fixture(check: impl Fn(&str, &Exe, &Golden)) {
    if skipped() {
        return;
    }
    let mut some = false;
    for name in FIXTURES {
        if let Some(exe) = exe(name) {
            check(name, &exe, &golden(name));
            some = true;
        }
    }
    assert!(some, "no fixture is packed");
}

fn rel_l2(found: &[f32], wanted: &[f32]) -> f64 {
    assert_eq!(found.len(), wanted.len());
    let square = |x: f64| x * x;
    let error: f64 = found.iter().zip(wanted).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let norm: f64 = wanted.iter().map(|&b| square(f64::from(b))).sum();
    (error / norm).sqrt()
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(x, y)| x.to_bits() == y.to_bits())
}

#[test]
fn logits_are_near_those_in_float32() {
    each_fixture(|name, exe, g| {
        let (want, vocab) = g.floats("prefill_logits");
        let prompt = g.ints("input_ids").to_vec();
        for feed in [Feed::Prefill, Feed::Decode, Feed::Pieces(23)] {
            let logits = &exe.logits(std::slice::from_ref(&prompt), feed, 0)[0].logits;
            let error = rel_l2(logits, want);
            let agree = logits.chunks(vocab).zip(want.chunks(vocab)).filter(|(a, b)| argmax(a) == argmax(b)).count();
            println!("{name}, {feed:?}: relative L2 {error:.2e}, top-1 {agree} of {}", want.len() / vocab);
            assert!(error <= REL_L2, "{name}, {feed:?}: relative L2 {error:e}");
        }
    });
}

/// A token's logits have the same bits alone and in a batch, whole and in pieces: long runs in pieces that are cut between two chunks, and decoded tokens in any of
/// at most eight.
#[test]
fn bits_do_not_depend_on_the_step() {
    each_fixture(|name, exe, g| {
        let one = g.ints("input_ids").to_vec();
        let other: Vec<i32> = one.iter().rev().copied().collect();
        let alone = &exe.logits(std::slice::from_ref(&one), Feed::Prefill, 0)[0].logits;
        let logits = |tokens: &Vec<i32>, feed| exe.logits(std::slice::from_ref(tokens), feed, 0).swap_remove(0).logits;
        assert!(same_bits(&logits(&one, Feed::Decode), &logits(&one, Feed::Pieces(7))), "{name}: token by token");
        // 712 = 11 * 64 + 8: the last 72 tokens stay together, as 8 would be decoded. So many rows are multiplied by other kernels than those of a piece
        let tokens = if name == "yarn" { 200 } else { 712 }; // it has room for 256
        let longer: Vec<i32> = one.iter().copied().cycle().take(tokens).collect();
        let whole = logits(&longer, Feed::Prefill);
        for pieces in [80, 97, 130, 192] {
            assert!(same_bits(&whole, &logits(&longer, Feed::Pieces(pieces))), "{name}: in pieces of {pieces}");
        }
        let batch = exe.logits(&[other, one, longer], Feed::Prefill, 0);
        assert!(same_bits(alone, &batch[1].logits), "{name}: in a batch");
        assert!(same_bits(&whole, &batch[2].logits), "{name}: a longer one in a batch");
    });
}

/// Greedy and sampled tokens with drafts are those without.
#[test]
fn drafts_never_change_a_token() {
    each_fixture(|name, exe, g| {
        let prompt = g.ints("input_ids").to_vec();
        let short = prompt[..prompt.len() / 2].to_vec();
        for temperature in ["0", "0.9"] {
            let run = |drafts: &str| {
                let args = ["--max-new-tokens", "40", "--temperature", temperature, "--seed", "5"];
                exe.generate(&[prompt.clone(), short.clone()], &[&args[..], &["--draft-tokens", drafts]].concat()).0
            };
            let plain = run("0");
            for drafts in ["1", "3"] {
                assert_eq!(run(drafts), plain, "{name}: {drafts} drafts, temperature {temperature}");
            }
        }
    });
}

/// The demo model chooses the tokens that it chooses in float32 on a processor, its logits are near those, and token by token they stay so.
#[test]
fn demo_model_chooses_as_in_float32() {
    if skipped() {
        return;
    }
    let Some(exe) = exe("demo-model") else { return println!("skipped: the demo model is not packed") };
    let tokens = text()[..TEXT_TOKENS].to_vec();
    let want = in_float32(&tokens);
    let count = TEXT_TOKENS / TEXT_STRIDE;
    let vocab = want.len() / count;
    for feed in [Feed::Prefill, Feed::Decode] {
        let logits = compared_rows(&exe.logits(std::slice::from_ref(&tokens), feed, 0)[0].logits);
        let error = rel_l2(&logits, &want);
        let errors: Vec<f64> = logits.chunks(vocab).zip(want.chunks(vocab)).map(|(a, b)| rel_l2(a, b)).collect();
        let quarters: Vec<f64> = errors.chunks(count / 4).map(median).collect();
        let agree = logits.chunks(vocab).zip(want.chunks(vocab)).filter(|(a, b)| argmax(a) == argmax(b)).count();
        println!(
            "demo-model, {feed:?}: relative L2 {error:.2e}, of a row by quarters {quarters:.5?}, top-1 {agree} of {count}"
        );
        assert!(error <= REL_L2, "{feed:?}: relative L2 {error:e}");
        assert!(quarters[3] <= DRIFT * quarters[0], "{feed:?}: relative L2 of a row grows: {quarters:.5?}");
        assert!(agree as f64 >= TOP_1 * count as f64, "{feed:?}: top-1 {agree} of {count}");
    }
}

/// Sequences that are decoded together have the tokens, and their log probabilities to the last bit, that they have alone; with drafts too.
#[test]
fn sequences_together_are_what_they_are_alone() {
    if skipped() {
        return;
    }
    let Some(exe) = exe("demo-model") else { return println!("skipped: the demo model is not packed") };
    let text = text();
    let prompts: Vec<Vec<i32>> = (0..64).map(|i| text[100 * i..103 * i + 4].to_vec()).collect();
    let ids = exe.ids(&prompts);
    let decode = |batch: &str, drafts: &str| -> Vec<(serde_json::Value, serde_json::Value)> {
        let fixed = ["--tokens", ids.to_str().expect("UTF-8"), "--ignore-eos", "--json", "--temperature", "0"];
        let more = ["--max-new-tokens", "24", "--logprobs", "1", "--batch", batch, "--draft-tokens", drafts];
        let out = exe.json("generate", &[&fixed[..], &more].concat());
        let sequences = out["sequences"].as_array().expect("sequences");
        sequences.iter().map(|s| (s["tokens"].clone(), s["logprobs"].clone())).collect()
    };
    let alone = decode("1", "0");
    assert!(alone.iter().all(|(_, logprobs)| logprobs.as_array().is_some_and(|l| l.len() == 24)), "log probabilities");
    for (batch, drafts) in [("64", "0"), ("33", "0"), ("64", "3"), ("1", "3")] {
        assert!(decode(batch, drafts) == alone, "in a batch of {batch}, with {drafts} drafts");
    }
}

/// The demo model predicts its text as well as in float32.
#[test]
fn demo_model_predicts_as_well() {
    if skipped() {
        return;
    }
    let Some(exe) = exe("demo-model") else { return println!("skipped: the demo model is not packed") };
    let golden = demo_json("golden_nll.json");
    let ids = exe.ids(&[text()]);
    let out = exe.json("eval", &["--tokens", ids.to_str().expect("UTF-8"), "--window", &golden["window"].to_string()]);
    let (got, want) = (out["nats_per_token"].as_f64(), golden["nats_per_token"].as_f64());
    let (got, want) = (got.expect("a number"), want.expect("a number"));
    println!("{got} nats per token, golden {want}");
    assert!((got - want).abs() <= 1e-3, "{got} nats per token, expected {want}");
}
