//! The `nextc` command and what it makes, from the outside: exit codes, messages, output files, and the demo model's answers.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value as Json;

const NEXTC: &str = env!("CARGO_BIN_EXE_nextc");
const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/demo-model");

fn run(program: impl AsRef<Path>, args: &[&str]) -> Output {
    Command::new(program.as_ref()).args(args).output().expect("it can be started")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Standard output of a run that must succeed.
fn stdout(program: impl AsRef<Path>, args: &[&str]) -> String {
    let output = run(program, args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// Runs what must fail with `code`; its message must hold `expected`.
fn fails(program: impl AsRef<Path>, args: &[&str], code: i32, expected: &str) {
    let output = run(program, args);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {message}");
    assert!(message.contains(expected), "{args:?}: {message}");
    assert!(!message.contains("panicked"), "{args:?}: {message}");
}

fn backends() -> Vec<&'static str> {
    if cfg!(feature = "llvm") { vec!["cranelift", "llvm"] } else { vec!["cranelift"] }
}

/// The demo model, compiled.
fn demo(dir: &Path, backend: &str) -> PathBuf {
    let exe = dir.join(format!("demo-{backend}"));
    stdout(NEXTC, &["build", DEMO, "--backend", backend, "--activations", "f32", "-o", path(&exe)]);
    exe
}

fn path(path: &Path) -> &str {
    path.to_str().expect("temporary folders have plain names")
}

fn golden() -> Vec<Json> {
    let file = std::fs::read(format!("{DEMO}/golden_greedy.json")).expect("the demo model has golden tokens");
    serde_json::from_slice(&file).expect("they are JSON")
}

#[test]
fn demo_model_gives_its_golden_tokens_and_text() {
    let dir = tempfile::tempdir().expect("a folder");
    let ids = dir.path().join("ids.json");
    for backend in backends() {
        let exe = demo(dir.path(), backend);
        let generate = |prompts: &Json| -> Json {
            std::fs::write(&ids, prompts.to_string()).expect("it can be written");
            let args = [
                "generate",
                "--tokens",
                path(&ids),
                "--max-new-tokens",
                "96",
                "--temperature",
                "0",
                "--ignore-eos",
                "--json",
            ];
            serde_json::from_str(&stdout(&exe, &args)).expect("one line of JSON")
        };
        for case in golden() {
            let made = generate(&case["prompt_ids"]);
            assert_eq!(made["tokens"], case["greedy_ids"], "{backend}: {}", case["prompt"]);
            assert_eq!(made["text"], case["text"], "{backend}");
            assert_eq!((&made["finish_reason"], &made["completion_tokens"]), (&Json::from("length"), &Json::from(96)));
        }
        let batch = generate(&golden().iter().map(|case| case["prompt_ids"].clone()).collect());
        for (made, case) in batch["sequences"].as_array().expect("a batch").iter().zip(golden()) {
            assert_eq!(made["tokens"], case["greedy_ids"], "{backend}: {} in a batch", case["prompt"]);
        }
    }
}

#[test]
fn a_prompt_is_answered_and_a_seed_repeats() {
    let dir = tempfile::tempdir().expect("a folder");
    let exe = demo(dir.path(), "cranelift");
    let ask = |more: &[&str]| stdout(&exe, &[&["generate", "-p", "What is a compiler?", "-n", "24"], more].concat());
    assert_eq!(ask(&["--seed", "5"]), ask(&["--seed", "5", "--threads", "1"]));
    let greedy = ask(&["--temperature", "0"]);
    assert!(greedy.trim().len() > 10 && !greedy.contains("<|"), "{greedy}");
    let json: Json = serde_json::from_str(&ask(&["--temperature", "0", "--json"])).expect("one line of JSON");
    assert_eq!(format!("{}\n", json["text"].as_str().expect("there is a tokenizer")), greedy);
    let word = greedy.split_whitespace().nth(2).expect("three words");
    let stopped = ask(&["--temperature", "0", "--stop", word]);
    assert_eq!(stopped.trim_end_matches('\n'), &greedy[..greedy.find(word).expect("it is there")]);
    fails(&exe, &["generate", "-p", "x", "--draft-tokens", "8"], 1, "at most 7");
    fails(&exe, &["generate"], 2, "--prompt");
    fails(&exe, &["generate", "--tokens", "/nonexistent.json"], 1, "/nonexistent.json");
}

/// The lines of JSON of a run.
fn json_lines(program: &Path, args: &[&str]) -> Vec<Json> {
    stdout(program, args).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

#[test]
fn a_file_of_prompts_is_one_continuous_batch() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("prompts.jsonl");
    let lines = golden().into_iter().map(|case| serde_json::json!({"tokens": case["prompt_ids"]}).to_string());
    std::fs::write(&file, lines.collect::<Vec<_>>().join("\n")).expect("it can be written");
    let texts = dir.path().join("prompts.txt");
    std::fs::write(&texts, "What is a compiler?\n\nWhat is a linker?\n").expect("it can be written");
    for backend in backends() {
        let exe = demo(dir.path(), backend);
        let ask = |file: &Path, more: &[&str]| -> Vec<Json> {
            json_lines(&exe, &[&["generate", "--prompts", path(file), "--json"], more].concat())
        };
        let greedy = ["-n", "40", "--temperature", "0", "--ignore-eos"];
        for more in [["--batch", "2"], ["--batch", "9"], ["--draft-tokens", "2"], ["--step-tokens", "8"]] {
            for (made, case) in ask(&file, &[&greedy[..], &more].concat()).iter().zip(golden()) {
                let expected = &case["greedy_ids"].as_array().expect("token ids")[..40];
                assert_eq!(made["tokens"].as_array().expect("token ids"), expected, "{backend} {more:?}");
            }
        }
        let sampled = |more: &[&str]| -> Vec<Json> {
            let settings =
                ["-n", "24", "--temperature", "1", "--seed", "3", "--frequency-penalty", "0.5", "--min-p", "0.02"];
            ask(&file, &[&settings, more].concat()).iter().map(|made| made["tokens"].clone()).collect()
        };
        let alone = sampled(&["--batch", "1", "--draft-tokens", "0"]);
        assert_eq!(alone.len(), golden().len());
        assert_eq!(sampled(&["--batch", "3", "--draft-tokens", "3"]), alone, "{backend}");
        assert_eq!(sampled(&["--threads", "1"]), alone, "{backend}");
        let chats = ask(&texts, &["-n", "8", "--temperature", "0"]);
        let one = json_lines(&exe, &["generate", "-p", "What is a linker?", "-n", "8", "--temperature", "0", "--json"]);
        assert_eq!((chats.len(), &chats[1]["text"]), (2, &one[0]["text"]), "{backend}");
        let blocks = stdout(&exe, &["generate", "--prompts", path(&texts), "-n", "8", "--temperature", "0"]);
        assert!(blocks.contains("prompts.txt:1 ==\n") && blocks.contains("prompts.txt:3 ==\n"), "{blocks}");
        std::fs::write(dir.path().join("bad.jsonl"), "{\"prompt\": \"x\"}\n{\"prompt\": 5}\n").expect("written");
        fails(&exe, &["generate", "--prompts", path(&dir.path().join("bad.jsonl"))], 1, "bad.jsonl:2: `prompt` is 5");
        fails(&exe, &["generate", "-p", "x", "--min-p", "nan"], 2, "--min-p");
    }
}

#[test]
fn log_probabilities_are_those_of_eval() {
    let dir = tempfile::tempdir().expect("a folder");
    let exe = demo(dir.path(), "cranelift");
    let ids = dir.path().join("ids.json");
    let case = &golden()[0];
    std::fs::write(&ids, case["prompt_ids"].to_string()).expect("it can be written");
    let common = ["generate", "--tokens", path(&ids), "--json", "-n", "6", "--temperature", "0", "--ignore-eos"];
    let logprobs = |more: &[&str]| {
        let made = json_lines(&exe, &[&common, more].concat()).remove(0);
        (made["tokens"].clone(), made["logprobs"].clone(), made["prompt_logprobs"].clone())
    };
    let (tokens, new, prompt) = logprobs(&["--logprobs", "3", "--prompt-logprobs", "0"]);
    assert_eq!(logprobs(&["--logprobs", "3", "--prompt-logprobs", "0", "--draft-tokens", "0"]).1, new);
    assert_eq!(tokens.as_array().expect("tokens")[..], case["greedy_ids"].as_array().expect("tokens")[..6]);
    for (token, entry) in tokens.as_array().expect("tokens").iter().zip(new.as_array().expect("as many")) {
        assert_eq!((token, &entry["token"], entry["top"].as_array().map(Vec::len)), (token, token, Some(3)));
        assert_eq!(entry["top"][0]["logprob"], entry["logprob"], "greedy takes the most probable");
        assert!(entry["text"].is_string());
    }
    let prompt = prompt.as_array().expect("one a token");
    assert_eq!((prompt.len(), &prompt[0]), (case["prompt_ids"].as_array().expect("ids").len(), &Json::Null));
    let nats: f64 = prompt[1..].iter().map(|entry| -entry["logprob"].as_f64().expect("a number")).sum();
    let eval = json_lines(&exe, &["eval", "--tokens", path(&ids)]).remove(0);
    let mean = eval["nats_per_token"].as_f64().expect("a number");
    assert!((nats / (prompt.len() - 1) as f64 - mean).abs() < 1e-5, "{nats} over {} against {mean}", prompt.len());
}

#[test]
fn building_twice_gives_the_same_bytes() {
    let dir = tempfile::tempdir().expect("a folder");
    let build = |name: &str| {
        let exe = dir.path().join(name);
        stdout(NEXTC, &["build", DEMO, "--cpu", "x86-64-v3", "--embed-weights", "-o", path(&exe)]);
        std::fs::read(exe).expect("it was built")
    };
    assert!(build("a") == build("b"));
    assert_eq!(std::fs::read_dir(dir.path()).expect("it is there").count(), 2, "nothing else was written");
}

#[test]
fn a_build_says_what_it_costs() {
    let dir = tempfile::tempdir().expect("a folder");
    let (ids, exe) = (dir.path().join("ids.json"), dir.path().join("demo"));
    let golden: Json = serde_json::from_slice(&std::fs::read(format!("{DEMO}/golden_nll.json")).expect("it is there"))
        .expect("it is JSON");
    let tokens = &golden["tokens"].as_array().expect("token ids")[..300];
    std::fs::write(&ids, Json::from(vec![Json::from(&tokens[..200]), Json::from(&tokens[200..])]).to_string())
        .expect("it can be written");
    let build = |options: &[&str]| {
        let args = ["build", DEMO, "--quality", path(&ids), "-o", path(&exe)];
        let text = stdout(NEXTC, &[&args, options].concat());
        text.lines().find(|line| line.starts_with("quality of ")).expect("a line about quality").to_owned()
    };
    let same = build(&["--activations", "f32"]);
    assert!(same.starts_with("quality of 298 tokens in windows of 1024: "), "{same}");
    assert!(same.contains(" +0.00000 more") && same.contains("KL 0.00e0, 1.000 with"), "{same}");
    assert!(same.contains(" of first drafts are its next"), "{same}");
    let number = |line: &str, before: &str| -> f64 {
        let rest = line.split(before).nth(1).expect("it is in the line");
        rest.split([' ', ',']).next().and_then(|x| x.parse().ok()).expect("a number")
    };
    let four = build(&["--quant", "q4"]);
    let kl = number(&four, "KL ");
    assert!((0.01..0.2).contains(&kl), "{four}");
    // the same tokens by the executable itself
    let eval: Json = serde_json::from_str(&stdout(&exe, &["eval", "--tokens", path(&ids)])).expect("a line of JSON");
    let nats = eval["nats_per_token"].as_f64().expect("a number");
    assert!((number(&four, "1024: ") - nats).abs() < 1e-4, "{four}; eval: {nats}");
    std::fs::write(&ids, "[[1, 2], 3]").expect("it can be written");
    fails(NEXTC, &["build", DEMO, "--quality", path(&ids), "-o", path(&exe)], 1, "expected a JSON array of token ids");
    std::fs::write(&ids, "[1, 2]").expect("it can be written");
    let config = format!("{DEMO}/config.json");
    fails(NEXTC, &["build", &config, "--quality", path(&ids), "-o", path(&exe)], 1, "needs weights");
}

#[test]
fn run_builds_once_and_hands_arguments_on() {
    let cache = tempfile::tempdir().expect("a folder");
    let run = |more: &[&str]| {
        let args = [&["run", DEMO, "--backend", "cranelift"], more].concat();
        let output = Command::new(NEXTC).args(args).env("XDG_CACHE_HOME", cache.path()).output().expect("it starts");
        assert!(output.status.success(), "{}", text(&output.stderr));
        (text(&output.stdout), text(&output.stderr))
    };
    let (first, note) = run(&["-p", "What is a linker?", "--", "-n", "8", "--temperature", "0"]);
    assert!(note.contains("cache: ") && note.contains("MB"), "the cache's size is stated: {note}");
    let entries = || std::fs::read_dir(cache.path().join("nextc")).expect("it was made").count();
    assert_eq!(entries(), 1);
    assert_eq!(
        run(&["-p", "What is a linker?", "--", "-n", "8", "--temperature", "0"]).0.lines().last(),
        first.lines().last()
    );
    assert_eq!(entries(), 1);
    run(&["--no-cache", "--", "info", "--json"]);
    assert_eq!(entries(), 1);
}

#[test]
fn every_stage_can_be_dumped() {
    let dump = |args: &[&str]| stdout(NEXTC, &[&["dump", DEMO], args].concat());
    assert!(dump(&[]).contains("func @delta.0("));
    assert!(dump(&["--after", "specialise"]).contains("func @delta("));
    assert!(dump(&["--stage", "fused", "--function", "moe"]).contains("experts_down"));
    assert!(dump(&["--stage", "fused", "--function", "@moe", "--format", "dot"]).starts_with("digraph"));
    assert!(dump(&["--stage", "kernels"]).contains("program @step {"));
    assert!(dump(&["--stage", "clif"]).contains("function"));
    assert!(dump(&["--stage", "asm"]).contains("ret"));
    let diff = dump(&["--after", "rewrite", "--diff", "--function", "attention"]);
    assert!(diff.contains("x norm-linears") && diff.contains("\n- ") && diff.contains("\n+ "), "{diff}");
    for pass in stdout(NEXTC, &["passes"]).lines().filter_map(|line| line.split_whitespace().next()) {
        assert!(!dump(&["--after", pass, "--diff"]).is_empty(), "{pass}");
    }
    if cfg!(feature = "llvm") {
        assert!(dump(&["--stage", "llvm"]).contains("define "));
    } else {
        fails(NEXTC, &["dump", DEMO, "--stage", "llvm"], 1, "built without LLVM");
    }
    fails(NEXTC, &["dump", DEMO, "--stage", "ptx"], 1, "GPU");
    fails(NEXTC, &["dump", DEMO, "--after", "sorting"], 1, "`specialise`");
    fails(NEXTC, &["dump", DEMO, "--function", "nobody"], 1, "`step`");
    fails(NEXTC, &["dump", DEMO, "--stage", "kernels", "--function", "nobody"], 1, "norm_linears");
    fails(NEXTC, &["dump", DEMO, "--stage", "kernels", "--format", "dot"], 1, "`--format dot`");
}

#[test]
fn explain_accounts_for_kernels_and_memory() {
    let text = stdout(NEXTC, &["explain", DEMO, "--context", "4096"]);
    for expected in [
        "@delta x 6: 3 kernels",
        "@attention x 2: 4 kernels",
        "@moe x 8: 3 kernels",
        "tokens/s",
        "KV, a token",
        "it fits",
    ] {
        assert!(text.contains(expected), "`{expected}` is missing:\n{text}");
    }
    let launches: usize =
        text.lines().filter_map(|l| l.strip_prefix("a step: ")?.split_whitespace().next()?.parse::<usize>().ok()).sum();
    let kernels = stdout(NEXTC, &["dump", DEMO, "--stage", "kernels"]);
    let program = kernels.split("program @step {").nth(1).and_then(|p| p.split("\n}").next()).expect("there is a step");
    // of what one kernel does in a step of one token, others do parts in longer runs: `function.number.op.part`
    let names = program.lines().filter_map(|line| line.trim_start().strip_prefix("launch @")?.split('(').next());
    assert_eq!(launches, names.filter(|name| name.split('.').count() == 3).count(), "{program}");
}

#[test]
fn explain_measures_what_each_kernel_takes() {
    let config = &format!("{DEMO}/config.json");
    for step in [&["--tokens", "1"], &["--tokens", "4"], &["--tokens", "32"]] {
        let text = stdout(NEXTC, &[&["explain", config, "--measure", "--context", "64"], &step[..]].concat());
        let rows =
            text.lines().filter(|line| line.contains("delta.1.gated_delta_net") || line.contains("fuse.3.linear"));
        let measured: Vec<f64> = rows.filter_map(share).collect();
        assert!(measured.len() == 2 && measured.iter().all(|&share| share > 0.0), "{measured:?} in\n{text}");
        assert_eq!(text.matches("measured: kernels one by one").count(), 2, "{text}");
    }
}

/// The percentage in a line.
fn share(line: &str) -> Option<f64> {
    line.split(" %").next()?.split_whitespace().next_back()?.parse().ok()
}

#[test]
fn explain_names_the_kernels_that_a_layer_has_on_a_gpu() {
    if !cfg!(feature = "llvm") {
        return;
    }
    let text = stdout(NEXTC, &["explain", DEMO, "--target", "cuda"]);
    let mut layer = "";
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('@') {
            layer = name.split(" x ").next().expect("a line has a first part");
        } else if line.starts_with("  ") && !line.starts_with("   ") && !layer.is_empty() && line.contains(" FLOP ") {
            assert!(line[2..].starts_with(&format!("{layer}.")), "{line} in @{layer}");
        }
        layer = if line == "memory" { "" } else { layer };
    }
}

#[test]
fn tables_are_printed_as_text_and_json() {
    for (command, entry) in
        [("ops", "gated_delta_net"), ("rules", "norm-linears"), ("passes", "rewrite"), ("formats", "bf16")]
    {
        assert!(stdout(NEXTC, &[command]).contains(entry));
        let json: Json = serde_json::from_str(&stdout(NEXTC, &[command, "--json"])).expect("JSON");
        assert!(json.as_array().expect("a list").iter().any(|row| row["name"] == entry), "{command}");
    }
    assert!(stdout(NEXTC, &["ops", "--kernel"]).contains("reduce_add"));
}

/// A model's folder with one thing wrong, and what the message must say.
fn check_bad_model(expected: &str, spoil: impl Fn(&Path)) {
    let dir = tempfile::tempdir().expect("a folder");
    let model = dir.path().join("model");
    std::fs::create_dir(&model).expect("it can be made");
    for entry in std::fs::read_dir(DEMO).expect("the demo model is there") {
        let entry = entry.expect("it can be read");
        std::fs::copy(entry.path(), model.join(entry.file_name())).expect("it can be copied");
    }
    spoil(&model);
    let exe = dir.path().join("out");
    fails(NEXTC, &["build", path(&model), "-o", path(&exe)], 1, expected);
    assert_eq!(
        std::fs::read_dir(dir.path()).expect("it is there").count(),
        1,
        "{expected}: a failed build leaves nothing"
    );
}

#[test]
fn bad_models_are_refused_by_name_and_leave_no_file() {
    let write = |name: &'static str, text: &'static str| {
        move |model: &Path| std::fs::write(model.join(name), text).expect("written")
    };
    check_bad_model("config.json", write("config.json", "{"));
    check_bad_model("tokenizer.json", write("tokenizer.json", "{"));
    check_bad_model("model.safetensors.index.json", write("model.safetensors.index.json", "[]"));
    check_bad_model("model-00002-of-00004.safetensors", |model| {
        std::fs::remove_file(model.join("model-00002-of-00004.safetensors")).expect("it was there");
    });
    check_bad_model("model-00003-of-00004.safetensors", |model| {
        let shard = std::fs::File::options()
            .write(true)
            .open(model.join("model-00003-of-00004.safetensors"))
            .expect("it is there");
        shard.set_len(100_000).expect("it can be cut");
    });
}

#[test]
fn a_failed_build_keeps_an_older_executable() {
    let dir = tempfile::tempdir().expect("a folder");
    let exe = dir.path().join("out");
    std::fs::write(&exe, "older").expect("it can be written");
    fails(NEXTC, &["build", "/nonexistent", "-o", path(&exe)], 1, "/nonexistent");
    fails(NEXTC, &["build", DEMO, "--target", "cpu+cuda", "-o", path(&exe)], 1, "`--target cpu+cuda`");
    fails(NEXTC, &["build", DEMO, "--max-context", "999999999", "-o", path(&exe)], 1, "`--max-context`");
    assert_eq!(std::fs::read(&exe).expect("it is still there"), b"older");
    fails(NEXTC, &["build", DEMO, "-o", path(dir.path())], 1, "is a directory");
    fails(NEXTC, &["build"], 2, "Usage");
    fails(NEXTC, &["frobnicate"], 2, "Usage");
}

#[test]
fn a_closed_pipe_is_no_error() {
    let mut child = Command::new(NEXTC).arg("ops").stdout(std::process::Stdio::piped()).spawn().expect("it starts");
    drop(child.stdout.take());
    assert!(child.wait().expect("it ends").success());
}
