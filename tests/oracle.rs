//! Every rung of the ladder against the published implementation's outputs: the graph interpreter before and after
//! rewriting, and executables of each backend.

mod support;

use nextc_ir::Target;
use support::exe::{Exe, backends};
use support::golden::{Golden, check, fixture};
use support::interpreter::Interpreter;
use support::{Feed, Subject, argmax};

/// Fixtures that are stored in bf16, and those that are quantised.
const FIXTURES: [&str; 8] = ["tiny", "odd", "dense-mix", "yarn", "long", "fp8", "int4", "gptq-int4"];

fn golden(name: &str) -> Golden {
    Golden::read(&fixture(name).join("golden.safetensors"))
}

fn chain(a: &[i32], b: &[i32]) -> Vec<i32> {
    a.iter().chain(b).copied().collect()
}

/// Everything that a fixture says about the main model and its drafts.
fn check_all(subject: &dyn Subject, name: &str, rung: &str) {
    let g = golden(name);
    let what = |part: &str| format!("{name} on {rung}: {part}");
    let prompt = g.ints("input_ids");
    let forced = chain(prompt, g.ints("continuation_ids"));
    check_rows(&g, subject, &forced, Feed::Prefill, ("prefill_logits", 0), &what("prefill"));
    check_rows(&g, subject, &forced, Feed::Decode, ("decode_logits", prompt.len()), &what("decode"));
    check_rows(&g, subject, &forced, Feed::Pieces(23), ("decode_logits", prompt.len()), &what("pieces"));
    let greedy = g.ints("greedy_ids");
    let whole = chain(prompt, &greedy[..greedy.len() - 1]);
    check_rows(&g, subject, &whole, Feed::Prefill, ("greedy_logits", prompt.len() - 1), &what("greedy"));
    check_multi(&g, subject, &what("batch"));
    check_drafts(&g, subject, &what("drafts"));
}

/// Rows of the golden tensor `name`, which begin at token `first` of `tokens`.
fn check_rows(g: &Golden, subject: &dyn Subject, tokens: &[i32], feed: Feed, (name, first): (&str, usize), what: &str) {
    let (want, width) = g.floats(name);
    let logits = &subject.logits(&[tokens.to_vec()], feed, 0)[0].logits;
    let rows: Vec<usize> = match g.rows(name) {
        Some(rows) => rows.iter().map(|&r| r as usize).collect(),
        None => (0..want.len() / width).collect(),
    };
    let got: Vec<f32> =
        rows.iter().flat_map(|r| &logits[(first + r) * width..(first + r + 1) * width]).copied().collect();
    check(what, &got, want, width);
}

/// Prompts of different lengths with their greedy continuations, as one ragged batch.
fn check_multi(g: &Golden, subject: &dyn Subject, what: &str) {
    let lengths = g.ints("multi_lengths");
    let (ids, greedy) = (g.ints("multi_input_ids"), g.ints("multi_greedy_ids"));
    let (row, steps) = (ids.len() / lengths.len(), greedy.len() / lengths.len());
    let sequences: Vec<Vec<i32>> = (0..lengths.len())
        .map(|i| {
            let prompt = &ids[i * row..i * row + lengths[i] as usize];
            chain(prompt, &greedy[i * steps..(i + 1) * steps - 1])
        })
        .collect();
    let vocab = g.floats("prefill_logits").1;
    for feed in [Feed::Prefill, Feed::Decode] {
        for (i, rows) in subject.logits(&sequences, feed, 0).iter().enumerate() {
            let first = lengths[i] as usize - 1;
            let got: Vec<i32> = rows.logits.chunks(vocab).skip(first).map(|r| argmax(r) as i32).collect();
            assert_eq!(got, &greedy[i * steps..(i + 1) * steps], "{what}: sequence {i}, {feed:?}");
        }
    }
}

/// Logits of the drafts after each position of the short prompt, and of three drafts after the whole one.
fn check_drafts(g: &Golden, subject: &dyn Subject, what: &str) {
    let (want, vocab) = g.floats("mtp_short_logits");
    let short = g.ints("short_input_ids").to_vec();
    for feed in [Feed::Prefill, Feed::Pieces(4), Feed::Decode] {
        let rows = &subject.logits(std::slice::from_ref(&short), feed, 3)[0];
        let first: Vec<f32> = rows.mtp.chunks(3 * vocab).flat_map(|r| &r[..vocab]).copied().collect();
        check(&format!("{what} ({feed:?})"), &first, want, vocab);
    }
    let (want, _) = g.floats("mtp_draft_logits");
    let prompt = g.ints("input_ids").to_vec();
    let rows = &subject.logits(std::slice::from_ref(&prompt), Feed::Pieces(16), 3)[0];
    let last = &rows.mtp[(prompt.len() - 1) * 3 * vocab..];
    check(&format!("{what} after the prompt"), last, want, vocab);
    let ids: Vec<i32> = last.chunks(vocab).map(|r| argmax(r) as i32).collect();
    assert_eq!(ids, g.ints("mtp_draft_ids"), "{what}");
}

/// The drafts of every round of the recorded speculative decodings: those after the token before the round's known one.
fn check_rounds(g: &Golden, subject: &dyn Subject, what: &str) {
    let whole = chain(g.ints("input_ids"), g.ints("greedy_ids"));
    let vocab = g.floats("prefill_logits").1;
    for k in (1..=3).filter(|k| g.has(&format!("spec_k{k}_start"))) {
        let rows = &subject.logits(std::slice::from_ref(&whole), Feed::Prefill, k)[0];
        let drafts: Vec<i32> = rows.mtp.chunks(vocab).map(|r| argmax(r) as i32).collect();
        let (starts, want) = (g.ints(&format!("spec_k{k}_start")), g.ints(&format!("spec_k{k}_draft_ids")));
        for (round, &start) in starts.iter().enumerate() {
            let got = &drafts[(start as usize - 1) * k..start as usize * k];
            assert_eq!(got, &want[round * k..(round + 1) * k], "{what}: K = {k}, round {round}");
        }
    }
}

/// Greedy speculative decoding: the published tokens, with as many right drafts as recorded.
fn check_speculation(g: &Golden, exe: &Exe, what: &str) {
    let prompt = g.ints("input_ids").to_vec();
    let length = g.ints("greedy_ids").len().to_string();
    for k in (1..=3).filter(|k| g.has(&format!("spec_k{k}_start"))) {
        let args = ["--temperature", "0", "--max-new-tokens", &length, "--draft-tokens", &k.to_string()];
        let (tokens, right) = exe.generate(std::slice::from_ref(&prompt), &args);
        assert_eq!(tokens[0], g.ints("greedy_ids"), "{what}: K = {k}");
        // the record also counts a draft of the very last token, which nobody needs to make
        let last = (prompt.len() + g.ints("greedy_ids").len()) as i32 - 2;
        let rounds = g.ints(&format!("spec_k{k}_start")).iter().zip(g.ints(&format!("spec_k{k}_accepted")));
        let want: i32 = rounds.map(|(start, accepted)| *accepted.min(&(last - start))).sum();
        assert_eq!(right, want as u64, "{what}: right drafts, K = {k}");
    }
}

#[test]
fn speculative_decoding_gives_the_published_tokens() {
    for backend in backends() {
        for name in FIXTURES {
            let (exe, g) = (Exe::build(&fixture(name), backend, &[]), golden(name));
            check_rounds(&g, &exe, &format!("{name} on {backend}"));
            check_speculation(&g, &exe, &format!("{name} on {backend}"));
        }
    }
}

/// Pseudo-random numbers below `n`: xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// Another model of a fixture's sizes: signs of weights are flipped at random, and tokens go to another number of experts.
fn random_model(name: &str, random: &mut Random) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let read = |file: &str| std::fs::read(fixture(name).join(file)).expect("the fixture is there");
    let mut config: serde_json::Value = serde_json::from_slice(&read("config.json")).expect("a configuration is JSON");
    if let Some(experts) = config["num_experts"].as_u64().filter(|&n| n > 0) {
        config["num_experts_per_tok"] = (1 + random.below(experts)).into();
        config["norm_topk_prob"] = (random.below(2) == 0).into();
    }
    let write = |file: &str, bytes: &[u8]| std::fs::write(dir.path().join(file), bytes).expect("the file is written");
    write("config.json", config.to_string().as_bytes());
    let entries = std::fs::read_dir(fixture(name)).expect("the fixture is there");
    let mut files: Vec<String> =
        entries.map(|e| e.expect("an entry").file_name().into_string().expect("UTF-8")).collect();
    files.sort();
    for file in files.iter().filter(|file| file.starts_with("model")) {
        let mut bytes = read(file);
        if file.ends_with(".safetensors") {
            let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
            // the second byte of a number in bf16 begins with its sign
            bytes[8 + header..].iter_mut().skip(1).step_by(2).for_each(|byte| *byte ^= (random.below(2) as u8) << 7);
        }
        write(file, &bytes);
    }
    dir
}

/// Random prompts, alone and in batches, numbers of drafts and ways of choosing.
fn check_drafts_change_nothing(exe: &Exe, vocab: u64, random: &mut Random, what: &str) {
    for _ in 0..6 {
        let prompts: Vec<Vec<i32>> = (0..1 + random.below(4))
            .map(|_| (0..1 + random.below(70)).map(|_| random.below(vocab) as i32).collect())
            .collect();
        let (k, seed) = ((1 + random.below(7)).to_string(), random.below(1000).to_string());
        let temperature = ["0", "0.8", "1.3"][random.below(3) as usize];
        let args = ["--max-new-tokens", "40", "--temperature", temperature, "--seed", &seed];
        let (plain, _) = exe.generate(&prompts, &[&args[..], &["--draft-tokens", "0"]].concat());
        for drafts in [k.as_str(), "auto"] {
            let (checked, _) = exe.generate(&prompts, &[&args[..], &["--draft-tokens", drafts]].concat());
            assert_eq!(checked, plain, "{what}: {drafts} drafts, {args:?}");
        }
    }
}

/// Whatever the model, the prompts, the number of drafts, the batch and the way of choosing: with drafts the tokens are those without.
#[test]
fn drafts_never_change_a_token() {
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    for backend in backends() {
        for (name, vocab) in [("tiny", 512), ("odd", 515), ("dense-mix", 768), ("long", 320)] {
            let model = random_model(name, &mut random);
            for (model, what) in [(fixture(name), name.to_owned()), (model.path().to_owned(), format!("like {name}"))] {
                let exe = Exe::build(&model, backend, &[]);
                check_drafts_change_nothing(&exe, vocab, &mut random, &format!("{what} on {backend}"));
            }
        }
        // its vocabulary is large enough for drafts from a shortlist
        let demo = Exe::build(&support::golden::root().join("examples/demo-model"), backend, &[]);
        check_drafts_change_nothing(&demo, 8192, &mut random, &format!("demo model on {backend}"));
    }
}

#[test]
fn graph_interpreter() {
    for name in FIXTURES {
        check_all(&Interpreter::plain(&fixture(name)), name, "graph");
    }
}

#[test]
fn fused_graph_interpreter() {
    let target = Target::named("x86-64-v3").expect("a known CPU");
    for name in FIXTURES {
        check_all(&Interpreter::fused(&fixture(name), &target), name, "fused graph");
    }
}

/// The kernels of both widths on the smallest fixture, and of one on those that stress shapes and formats.
#[test]
fn kernel_interpreter() {
    let (wide, narrow) = ("x86-64-v4", "x86-64-v3");
    let of_shapes = [("tiny", wide), ("tiny", narrow), ("odd", wide), ("dense-mix", narrow)];
    let of_formats = [("fp8", wide), ("int4", narrow), ("gptq-int4", wide)];
    for (name, cpu) in of_shapes.into_iter().chain(of_formats) {
        let target = Target::named(cpu).expect("a known CPU");
        let target = if cpu == narrow { target.for_cranelift() } else { target };
        check_all(&Interpreter::kernels(&fixture(name), &target), name, &format!("kernels for {cpu}"));
    }
}

#[test]
fn executables() {
    for backend in backends() {
        for name in FIXTURES {
            check_all(&Exe::build(&fixture(name), backend, &[]), name, backend);
        }
    }
}

/// The fixture's numbers, with its scaling taken from the configuration and asked for instead.
#[test]
fn a_rope_scaling_that_is_asked_for_gives_the_published_logits() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture("yarn").join(file), dir.path().join(file)).expect("the fixture is there");
    }
    let path = dir.path().join("config.json");
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).expect("readable")).expect("a configuration is JSON");
    let scaling = config.as_object_mut().and_then(|c| c.remove("rope_scaling")).expect("the fixture scales");
    let original = &scaling["original_max_position_embeddings"];
    config["max_position_embeddings"] = original.clone();
    std::fs::write(&path, config.to_string()).expect("the file is written");
    let scaling = format!("yarn,factor={}", scaling["factor"]);
    for backend in backends() {
        check_all(&Exe::build(dir.path(), backend, &["--rope-scaling", &scaling]), "yarn", backend);
    }
}

/// A token's logits have the same bits alone and in a batch, whole and in pieces, with one thread and with several.
#[test]
fn bits_do_not_depend_on_the_step() {
    for backend in backends() {
        let exe = Exe::build(&fixture("odd"), backend, &[]);
        let g = golden("odd");
        let one = chain(g.ints("input_ids"), g.ints("greedy_ids"));
        let other = one.iter().rev().copied().collect::<Vec<i32>>();
        let alone = &exe.logits(std::slice::from_ref(&one), Feed::Prefill, 0)[0].logits;
        for feed in [Feed::Decode, Feed::Pieces(7)] {
            let again = &exe.logits(std::slice::from_ref(&one), feed, 0)[0].logits;
            assert!(same_bits(alone, again), "{backend}: {feed:?}");
        }
        let batch = exe.logits(&[other, one], Feed::Prefill, 0);
        assert!(same_bits(alone, &batch[1].logits), "{backend}: in a batch");
    }
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(x, y)| x.to_bits() == y.to_bits())
}

/// Nats per token of the demo model, in windows, within 1e-4 of the published implementation's.
#[test]
fn demo_model_predicts_as_well() {
    let dir = support::golden::root().join("examples/demo-model");
    let text = std::fs::read_to_string(dir.join("golden_nll.json")).expect("the demo model has its golden file");
    let golden: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let tokens: Vec<i32> = serde_json::from_value(golden["tokens"].clone()).expect("token ids");
    let window = golden["window"].to_string();
    for backend in backends() {
        let exe = Exe::build(&dir, backend, &[]);
        let ids = exe.ids(std::slice::from_ref(&tokens));
        let out = exe.json("eval", &["--tokens", ids.to_str().expect("UTF-8"), "--window", &window]);
        let (got, want) = (out["nats_per_token"].as_f64(), golden["nats_per_token"].as_f64());
        let (got, want) = (got.expect("a number"), want.expect("a number"));
        println!("{backend}: {got} nats per token, golden {want}");
        assert!((got - want).abs() <= 1e-4, "{backend}: {got} nats per token, expected {want}");
    }
}
