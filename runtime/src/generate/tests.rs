//! `generate` over a model of which the next token is known.

mod batch;
mod options;
mod prompts;

use clap::Parser;
use serde_json::{Value as Json, json};

use super::*;
use crate::sample::{Choosing, Edits, Sampling, plain};
use crate::tokenizer::{Special, Tokenizer};

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: GenerateArgs,
}

fn args(line: &str) -> GenerateArgs {
    Cli::try_parse_from(std::iter::once("generate").chain(line.split_whitespace())).unwrap().args
}

/// After token `x` comes `x + 1`, or with `noise` whatever the whole history says, so that a lost token shows.
struct Counter {
    vocab_size: usize,
    max_context: usize,
    histories: Vec<Option<Vec<u32>>>,
    /// Most sequences at once.
    slots: usize,
    /// Lengths of the runs of each step.
    steps: Vec<Vec<usize>>,
    logits: Vec<f32>,
    noise: bool,
    /// Can draft; every third draft is wrong.
    drafts: bool,
    pending: Vec<(Sequence, Vec<u32>)>,
    keeps_logits: bool,
}

impl Counter {
    fn new(vocab_size: usize, max_context: usize) -> Self {
        Self {
            vocab_size,
            max_context,
            histories: Vec::new(),
            slots: usize::MAX,
            steps: Vec::new(),
            logits: Vec::new(),
            noise: false,
            drafts: false,
            pending: Vec::new(),
            keeps_logits: false,
        }
    }

    fn noisy(vocab_size: usize) -> Self {
        Self { noise: true, ..Self::new(vocab_size, 100) }
    }

    fn row(&self, history: &[u32]) -> Vec<f32> {
        let last = *history.last().unwrap() as usize;
        let mut row = vec![0.0; self.vocab_size];
        row[(last + 1) % self.vocab_size] = history.len() as f32;
        if self.noise {
            let seed = history.iter().fold(7u64, |h, &t| (h ^ u64::from(t)).wrapping_mul(0x0100_0000_01b3));
            let mut random = crate::random::Random(seed);
            row.iter_mut().for_each(|x| *x = random.between(-3.0, 3.0));
        }
        row
    }

    fn history(&self, sequence: Sequence) -> Result<&Vec<u32>, ModelError> {
        self.histories[sequence.0 as usize].as_ref().ok_or_else(|| "the sequence has ended".into())
    }

    /// The rows after each token of a run.
    fn rows(&self, sequence: Sequence, tokens: &[u32]) -> Result<Vec<Vec<f32>>, ModelError> {
        let mut history = self.history(sequence)?.clone();
        let row = |&token: &u32| {
            history.push(token);
            assert!(history.len() <= self.max_context);
            self.row(&history)
        };
        assert!(!tokens.is_empty());
        Ok(tokens.iter().map(row).collect())
    }

    /// The token that `choosing` says after each of some rows; tokens before the row count as output.
    fn choose(rows: &[Vec<f32>], fed: &[u32], choosing: &Choosing<'_>) -> Result<Vec<u32>, ModelError> {
        let mut edits = choosing.edits.clone();
        let each = rows.iter().zip(fed).enumerate().map(|(i, (row, &token))| {
            if i > 0 {
                edits.push(token);
            }
            let position = choosing.position + i as u32;
            Ok(plain::choose(row, &Choosing { edits: &edits, position, ..*choosing })?)
        });
        each.collect()
    }
}

impl Counter {
    /// Two of three are what it would choose itself.
    fn draft(&self, run: &Run<'_>, count: usize) -> Result<Vec<u32>, ModelError> {
        let mut history = self.history(run.sequence)?.clone();
        let &[mut newest] = run.tokens else { panic!("drafts follow one token") };
        let next = |_| {
            history.push(newest);
            let (sampling, edits) = (Sampling::default(), Edits::default());
            let greedy = Choosing { sampling: &sampling, edits: &edits, sequence: 0, position: 0 };
            newest = plain::choose(&self.row(&history), &greedy).unwrap();
            if history.len() % 3 == 0 { newest / 2 } else { newest }
        };
        Ok((0..count).map(next).collect())
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
        assert!(self.histories.iter().flatten().count() <= self.slots, "too many sequences at once");
        Ok(Sequence(self.histories.len() as u32 - 1))
    }
    fn end(&mut self, sequence: Sequence) {
        assert!(self.histories[sequence.0 as usize].take().is_some(), "a sequence ends once");
    }
    fn forward(&mut self, runs: &[Run<'_>]) -> Result<Vec<u32>, ModelError> {
        self.steps.push(runs.iter().map(|run| run.tokens.len()).collect());
        self.logits.clear();
        let mut chosen = Vec::new();
        for run in runs {
            let row = self.rows(run.sequence, run.tokens)?.pop().unwrap();
            if let Some(choosing) = &run.choosing {
                chosen.push(plain::choose(&row, choosing)?);
            }
            self.logits.extend(row);
            self.histories[run.sequence.0 as usize].as_mut().unwrap().extend(run.tokens);
        }
        Ok(chosen)
    }
    fn forward_all(&mut self, run: Run<'_>) -> Result<Option<u32>, ModelError> {
        self.steps.push(vec![run.tokens.len()]);
        let rows = self.rows(run.sequence, run.tokens)?;
        let chosen = run.choosing.map(|c| plain::choose(&rows[rows.len() - 1], &c)).transpose()?;
        self.logits = rows.concat();
        self.histories[run.sequence.0 as usize].as_mut().unwrap().extend(run.tokens);
        Ok(chosen)
    }
    fn keep_logits(&mut self) {
        self.keeps_logits = true;
    }
    fn logits(&self, row: usize) -> &[f32] {
        &self.logits[row * self.vocab_size..(row + 1) * self.vocab_size]
    }
    fn drafter(&mut self) -> Option<&mut dyn Drafter> {
        if self.drafts { Some(self) } else { None }
    }
}

impl Drafter for Counter {
    fn tentative_tokens(&self) -> usize {
        4
    }
    fn prepare(&mut self) {}
    fn speculate(&mut self, runs: &[Run<'_>], drafts: usize) -> Result<Vec<Checked>, ModelError> {
        self.logits.clear();
        let mut checked = Vec::new();
        for run in runs {
            let fed = [run.tokens, &self.draft(run, drafts)?].concat();
            let rows = self.rows(run.sequence, &fed)?;
            let mut tokens = Self::choose(&rows, &fed, run.choosing.as_ref().expect("every run chooses"))?;
            let accepted = tokens.iter().zip(&fed[1..]).take_while(|(chosen, draft)| chosen == draft).count();
            tokens.truncate(accepted + 1);
            checked.push(Checked { tokens, accepted });
            self.logits.extend(rows.concat());
            self.pending.push((run.sequence, fed));
        }
        Ok(checked)
    }
    fn accept(&mut self, sequence: Sequence, tokens: usize) -> Result<(), ModelError> {
        let i = self.pending.iter().position(|(s, _)| *s == sequence).unwrap();
        let (_, fed) = self.pending.remove(i);
        self.histories[sequence.0 as usize].as_mut().unwrap().extend(&fed[..tokens]);
        Ok(())
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
    assert_eq!(model.steps, [vec![3, 1], vec![1, 2, 1], vec![1, 1, 1], vec![1, 1]]);
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
    check("", "[1, 1, 1, 1, 1, 1]", "sequence 0 has 6 tokens, 2 more than the context holds (4)");
    check("", "[[1], []]", "sequence 1 has no tokens");
    check("", "[]", "sequence 0 has no tokens");
    check("", "{}", "expected an array of token ids");
    check("", "[1, -1]", "[1] is -1, expected a token id");
    check("", "[[1, 2.5]]", "[0][1] is 2.5");
    check("", "[[1], 2]", "[1] is 2, expected an array");
    check("", "[1", "ids.json: EOF");
    check("--stop x", "[1]", "no tokenizer");
    check("--stop-token 20", "[1]", "`--stop-token` names token 20, the model's vocabulary has 20");
    check("--logit-bias 21=1", "[1]", "`--logit-bias` names token 21");
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
