//! `generate` over a model of which the next token is known.

use super::*;
use clap::Parser;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: GenerateArgs,
}

fn args(line: &str) -> GenerateArgs {
    Cli::try_parse_from(std::iter::once("generate").chain(line.split_whitespace())).unwrap().args
}

/// After token `x` comes `x + 1`; its logits also depend on the whole history, so that a lost token shows.
struct Counter {
    vocab_size: usize,
    max_context: usize,
    histories: Vec<Option<Vec<u32>>>,
    steps: Vec<Vec<usize>>,
    logits: Vec<f32>,
}

impl Counter {
    fn new(vocab_size: usize, max_context: usize) -> Self {
        Self { vocab_size, max_context, histories: Vec::new(), steps: Vec::new(), logits: Vec::new() }
    }
}

impl Forward for Counter {
    fn vocab_size(&self) -> usize {
        self.vocab_size
    }
    fn max_context(&self) -> usize {
        self.max_context
    }
    fn eos_token_ids(&self) -> Vec<u32> {
        vec![9]
    }
    fn begin(&mut self) -> Result<Sequence, ModelError> {
        self.histories.push(Some(Vec::new()));
        Ok(Sequence(self.histories.len() as u32 - 1))
    }
    fn end(&mut self, sequence: Sequence) {
        self.histories[sequence.0 as usize] = None;
    }
    fn forward(&mut self, runs: &[(Sequence, &[u32])]) -> Result<&[f32], ModelError> {
        self.steps.push(runs.iter().map(|(_, tokens)| tokens.len()).collect());
        self.logits.clear();
        for (sequence, tokens) in runs {
            let history = self.histories[sequence.0 as usize].as_mut().ok_or("the sequence has ended")?;
            history.extend(*tokens);
            assert!(!tokens.is_empty() && history.len() <= self.max_context);
            let next = (*history.last().unwrap() as usize + 1) % self.vocab_size;
            let mut row = vec![0.0; self.vocab_size];
            row[next] = history.len() as f32;
            self.logits.extend(row);
        }
        Ok(&self.logits)
    }
}

fn no_files() -> TextFiles<'static> {
    TextFiles::find(|_| None)
}

fn generate(line: &str, ids: &str, model: &mut Counter, files: &TextFiles<'_>) -> Result<String, GenerateError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ids.json");
    std::fs::write(&path, ids).unwrap();
    let args = args(&format!("{line} --tokens {}", path.display()));
    let mut out = Vec::new();
    run(&args, model, files, 0.25, &mut out)?;
    Ok(String::from_utf8(out).unwrap())
}

fn generate_json(line: &str, ids: &str, model: &mut Counter) -> Json {
    let out = generate(&format!("--json --temperature 0 {line}"), ids, model, &no_files()).unwrap();
    assert_eq!(out.matches('\n').count(), 1, "JSON is one line");
    serde_json::from_str(&out).unwrap()
}

#[test]
fn json_has_every_field_of_the_interface() {
    let mut model = Counter::new(20, 100);
    let json = generate_json("--max-new-tokens 3", "[1, 2, 3]", &mut model);
    assert_eq!(json["tokens"], json!([4, 5, 6]));
    assert_eq!(json["text"], Json::Null);
    assert_eq!(json["finish_reason"], "length");
    assert_eq!(json["prompt_tokens"], 3);
    assert_eq!(json["completion_tokens"], 3);
    assert_eq!(json["mtp"], json!({"drafted": 0, "accepted": 0}));
    assert_eq!(json["timings"]["load_s"], 0.25);
    assert!(json["timings"]["prefill_tokens_per_s"].as_f64().unwrap() > 0.0);
    assert!(json["timings"]["decode_tokens_per_s"].as_f64().unwrap() > 0.0);
    assert_eq!(model.steps, [vec![3], vec![1], vec![1]]);
    assert_eq!(model.histories, [None], "the sequence is given back");
}

#[test]
fn eos_ends_unless_ignored_and_the_context_is_a_limit() {
    let check = |line: &str, max_context, tokens: Json, reason: &str| {
        let json = generate_json(line, "[6]", &mut Counter::new(20, max_context));
        assert_eq!((&json["tokens"], json["finish_reason"].as_str().unwrap()), (&tokens, reason));
    };
    check("-n 10", 100, json!([7, 8, 9]), "stop");
    check("-n 3", 100, json!([7, 8, 9]), "stop");
    check("-n 5 --ignore-eos", 100, json!([7, 8, 9, 10, 11]), "length");
    check("-n 5 --ignore-eos", 4, json!([7, 8, 9]), "length");
    check("-n 5", 1, json!([]), "length");
    check("-n 0", 100, json!([]), "length");
}

#[test]
fn a_batch_runs_as_ragged_steps() {
    let mut model = Counter::new(50, 100);
    let json = generate_json("-n 3 --ignore-eos --step-tokens 4", "[[1, 2, 3], [20, 21, 22], [30]]", &mut model);
    let tokens: Vec<_> = json["sequences"].as_array().unwrap().iter().map(|s| s["tokens"].clone()).collect();
    assert_eq!(tokens, [json!([4, 5, 6]), json!([23, 24, 25]), json!([31, 32, 33])]);
    assert_eq!(model.steps, [vec![3, 1], vec![2, 1], vec![1, 1, 1], vec![1, 1, 1]]);
    let mut one = Counter::new(50, 100);
    assert!(generate_json("-n 1", "[[1]]", &mut one)["sequences"].is_array());
}

#[test]
fn seeds_repeat_and_sequences_differ() {
    let run = |seed: u32| {
        let line = format!("--json --temperature 5 -n 20 --ignore-eos --seed {seed}");
        let out = generate(&line, "[[1], [1]]", &mut Counter::new(500, 100), &no_files()).unwrap();
        let json: Json = serde_json::from_str(&out).unwrap();
        [json["sequences"][0]["tokens"].clone(), json["sequences"][1]["tokens"].clone()]
    };
    assert_eq!(run(5), run(5));
    assert_ne!(run(5), run(6));
    let [a, b] = run(5);
    assert_ne!(a, b);
}

#[test]
fn bad_requests_are_named() {
    let check = |line: &str, ids: &str, expected: &str| {
        let error = generate(line, ids, &mut Counter::new(20, 4), &no_files()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check("--draft-tokens 2", "[1]", "`--draft-tokens` is 2");
    check("", "[1, 20]", "token 1 is 20, the model's vocabulary has 20");
    check("", "[1, 1, 1, 1, 1]", "has 5 tokens, the context holds 4");
    check("", "[[1], []]", "sequence 1 has no tokens");
    check("", "[]", "sequence 0 has no tokens");
    check("", "{}", "expected an array of token ids");
    check("", "[1, -1]", "[1] is -1, expected a token id");
    check("", "[[1, 2.5]]", "[0][1] is 2.5");
    check("", "[[1], 2]", "[1] is 2, expected an array");
    check("", "[1", "ids.json: EOF");
    check("--stop x", "[1]", "no tokenizer");
    check("--top-p 2", "[1]", "`top_p` is 2");
    check("--temperature nan", "[1]", "`temperature` is NaN");
}

#[test]
fn wrong_usage_is_the_parsers() {
    let parse = |line: &str| Cli::try_parse_from(std::iter::once("generate").chain(line.split_whitespace()));
    assert!(parse("").is_err());
    assert!(parse("-p a --tokens b").is_err());
    assert!(parse("--tokens b --raw").is_err());
    assert!(parse("-p a --step-tokens 0").is_err());
    assert!(parse("-p a --raw --stop x --stop y").is_ok());
}

/// The demo model's text files, with its vocabulary behind a model that counts.
struct Demo {
    files: Vec<(&'static str, Vec<u8>)>,
}

impl Demo {
    fn new() -> Self {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/demo-model/");
        let read = |name| (name, std::fs::read(format!("{dir}{name}")).unwrap());
        Self { files: ["tokenizer.json", "tokenizer_config.json", "generation_config.json"].map(read).into() }
    }

    fn files(&self) -> TextFiles<'_> {
        TextFiles::find(|name| self.files.iter().find(|(n, _)| *n == name).map(|(_, bytes)| bytes.as_slice()))
    }
}

#[test]
fn text_streams_and_equals_the_text_of_json() {
    let demo = Demo::new();
    let tokenizer = Tokenizer::from_json(&demo.files[0].1).unwrap();
    let expected = tokenizer.decode(&(301..341).collect::<Vec<_>>(), Special::Keep).unwrap();
    let run = |line: &str| generate(line, "[300]", &mut Counter::new(8192, 100), &demo.files()).unwrap();
    assert_eq!(run("--temperature 0 -n 40"), format!("{expected}\n"));
    let json: Json = serde_json::from_str(&run("--temperature 0 -n 40 --json")).unwrap();
    assert_eq!(json["text"], expected);
    let stop: String = expected.chars().skip(30).take(3).filter(|c| !c.is_whitespace()).collect();
    let cut = &expected[..expected.find(&stop).unwrap()];
    assert_eq!(run(&format!("--temperature 0 -n 40 --stop {stop}")), format!("{cut}\n"));
    let json: Json = serde_json::from_str(&run(&format!("--temperature 0 -n 40 --json --stop {stop}"))).unwrap();
    assert_eq!((&json["text"], &json["finish_reason"]), (&json!(cut), &json!("stop")));
}

#[test]
fn the_end_of_an_answer_is_in_the_tokens_but_not_in_the_text() {
    let demo = Demo::new();
    let run = |line: &str| {
        generate(&format!("--json --temperature 0 {line}"), "[8187]", &mut Counter::new(8192, 100), &demo.files())
    };
    let json: Json = serde_json::from_str(&run("").unwrap()).unwrap();
    assert_eq!(json["tokens"], json!([8188, 8189]), "8189 ends an answer by generation_config.json");
    assert!(!json["text"].as_str().unwrap().contains("<|"));
    let json: Json = serde_json::from_str(&run("--ignore-eos -n 3").unwrap()).unwrap();
    assert!(json["text"].as_str().unwrap().ends_with("<|endoftext|><|im_start|>"));
}

#[test]
fn a_prompt_goes_through_the_chat_template_unless_raw() {
    let demo = Demo::new();
    let count = |line: &str| {
        let mut args = args(&format!("-p hello --json --temperature 0 -n 1 {line}"));
        args.system = args.system.map(|s| s.replace('_', " "));
        let mut out = Vec::new();
        run(&args, &mut Counter::new(8192, 100), &demo.files(), 0.0, &mut out).unwrap();
        serde_json::from_slice::<Json>(&out).unwrap()["prompt_tokens"].as_u64().unwrap()
    };
    let tokenizer = Tokenizer::from_json(&demo.files[0].1).unwrap();
    let tokens = |text: &str| tokenizer.encode(text).unwrap().len() as u64;
    assert_eq!(count("--raw"), tokens("hello"));
    assert_eq!(count(""), tokens("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"));
    assert!(count("--system Be_brief.") > count(""));
    let error = run(&args("-p x"), &mut Counter::new(10, 10), &no_files(), 0.0, &mut Vec::new()).unwrap_err();
    assert!(error.to_string().contains("no tokenizer"), "{error}");
}

#[test]
fn defaults_are_the_checkpoints() {
    let new = |line: &str, config: &str| Settings::new(&args(line), Some(config.as_bytes()), &[3]);
    let demo = Demo::new();
    let settings = Settings::new(&args("--tokens x --seed 1"), Some(&demo.files[2].1), &[3]).unwrap();
    assert_eq!((settings.sampling.temperature, settings.sampling.top_k, settings.sampling.top_p), (0.7, 20, 0.9));
    assert_eq!(settings.eos, [8191, 8189]);
    let greedy = new("--tokens x", r#"{"temperature": 0.7, "eos_token_id": 7}"#).unwrap();
    assert_eq!((greedy.sampling.temperature, greedy.eos), (0.0, vec![7]));
    let own = new("--tokens x --temperature 0.5 --top-k 3 --top-p 0.4", r#"{"do_sample": true, "top_k": 9}"#).unwrap();
    assert_eq!((own.sampling.temperature, own.sampling.top_k, own.sampling.top_p, own.eos), (0.5, 3, 0.4, vec![3]));
    let check = |config: &str, expected: &str| {
        let error = new("--tokens x", config).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check("{", "generation_config.json: ");
    check(r#"{"top_k": "x"}"#, "`top_k` is \"x\", expected a number");
    check(r#"{"eos_token_id": [1, "x"]}"#, "`eos_token_id` has \"x\"");
}
