//! Options of the command line and what they do to tokens.

use super::*;

fn usage_error(line: &str) -> String {
    let words = std::iter::once("generate").chain(line.split_whitespace());
    Cli::try_parse_from(words).err().map(|e| e.to_string()).unwrap_or_default()
}

#[test]
fn wrong_usage_is_the_parsers() {
    let check = |line: &str, expected: &str| {
        let message = usage_error(line);
        assert!(message.contains(expected), "{line}: {message}");
    };
    check("", "--prompt");
    check("-p a --tokens b", "cannot be used with");
    check("-p a --prompts b", "cannot be used with");
    check("--tokens a --prompts b", "cannot be used with");
    check("--tokens b --raw", "cannot be used with");
    check("-p a --step-tokens 0", "--step-tokens");
    check("-p a --batch 0", "--batch");
    check("-p a --logprobs 1", "--json");
    check("-p a --draft-tokens -1", "--draft-tokens");
    assert_eq!(usage_error("-p a --raw --stop x --stop y --stop-token 3 --logit-bias 4=-1.5 --json --logprobs 0"), "");
    assert_eq!(usage_error("--prompts a --raw --presence-penalty -1 --min-p 0.1 --frequency-penalty 2"), "");
}

#[test]
fn hostile_numbers_are_usage_errors_that_name_the_option() {
    let options =
        ["temperature", "top-k", "top-p", "min-p", "repetition-penalty", "presence-penalty", "frequency-penalty"];
    for option in options {
        for value in ["nan", "-nan", "inf", "-inf", "-1e30", "1e30", "x", "1,5"] {
            let message = usage_error(&format!("-p a --{option} {value}"));
            assert!(message.contains(&format!("--{option}")) && message.contains("expected"), "{value}: {message}");
        }
    }
    for bias in ["5", "x=1", "-1=1", "5=nan", "5=1e30", "5=", "=1", "5000000000=1"] {
        assert!(usage_error(&format!("-p a --logit-bias {bias}")).contains("--logit-bias"), "{bias}");
    }
}

#[test]
fn biases_and_penalties_change_greedy_choice() {
    let check = |line: &str, expected: Json| {
        let json = generate_json(&format!("-n 4 --ignore-eos {line}"), "[5, 6]", &mut Counter::new(20, 100));
        assert_eq!(json["tokens"], expected, "{line}");
    };
    // the model gives the successor a logit as large as the history is long, 2 at first, and all others 0
    check("", json!([7, 8, 9, 10]));
    check("--logit-bias 3=2.5", json!([3, 4, 5, 6]));
    check("--logit-bias 7=-10 --logit-bias 8=-10", json!([0, 1, 2, 3]));
    // every time that 3 was chosen takes its share: 3.5 - 1.2 against 3; 8 - 1.5 against 3, 8 - 3 against 4, 8 - 4.5 against 5
    check("--logit-bias 3=3.5 --frequency-penalty 1.2", json!([3, 4, 5, 6]));
    check("--logit-bias 3=8 --frequency-penalty 1.5", json!([3, 3, 3, 4]));
    check("--logit-bias 3=8 --presence-penalty 4.5", json!([3, 3, 4, 5]));
    // 8 / 4 against 3; then 5 is penalised because the prompt has it, then 4 because the answer has it
    check("--logit-bias 3=8 --repetition-penalty 4", json!([3, 4, 3, 3]));
}

#[test]
fn stop_tokens_end_an_answer_even_when_eos_is_ignored() {
    let check = |line: &str, expected: Json, reason: &str| {
        let json = generate_json(line, "[6]", &mut Counter::new(20, 100));
        assert_eq!((&json["tokens"], &json["finish_reason"]), (&expected, &json!(reason)), "{line}");
    };
    check("-n 9 --stop-token 8", json!([7, 8]), "stop");
    check("-n 9 --stop-token 12", json!([7, 8, 9]), "stop");
    check("-n 9 --stop-token 12 --stop-token 11 --ignore-eos", json!([7, 8, 9, 10, 11]), "stop");
    check("-n 2 --stop-token 12", json!([7, 8]), "length");
}

#[test]
fn logprobs_are_the_models_own() {
    let line = "-n 2 --logprobs 2 --prompt-logprobs 1 --logit-bias 3=50 --step-tokens 2";
    let mut model = Counter::new(10, 100);
    let json = generate_json(line, "[5, 6, 2]", &mut model);
    let near = |value: &Json, x: f64| assert!((value.as_f64().unwrap() - x).abs() < 1e-9, "{value}, expected {x}");
    // of 10 logits one is `n` after `n` tokens, the others 0
    let total = |n: f64| (n.exp() + 9.0).ln();
    assert_eq!(json["tokens"], json!([3, 3]));
    let own = json["logprobs"].as_array().unwrap();
    assert_eq!((own.len(), own[0]["top"].as_array().unwrap().len()), (2, 2));
    near(&own[0]["logprob"], 3.0 - total(3.0));
    assert_eq!((&own[1]["token"], &own[1]["top"][0]["token"], &own[1]["text"]), (&json!(3), &json!(4), &Json::Null));
    near(&own[1]["logprob"], -total(4.0));
    near(&own[1]["top"][0]["logprob"], 4.0 - total(4.0));
    let prompt = json["prompt_logprobs"].as_array().unwrap();
    assert_eq!((prompt.len(), &prompt[0]), (3, &Json::Null));
    near(&prompt[1]["logprob"], 1.0 - total(1.0));
    near(&prompt[2]["logprob"], -total(2.0));
    assert_eq!((&prompt[2]["token"], &prompt[2]["top"][0]["token"]), (&json!(2), &json!(7)));
    assert_eq!(model.steps, [[2], [1], [1]]);
    let mut model = Counter::new(10, 100);
    let plain = generate_json("-n 2", "[5, 6, 2]", &mut model);
    assert!(!model.keeps_logits, "nobody asks for logits");
    assert!(plain.get("logprobs").is_none() && plain.get("prompt_logprobs").is_none());
}

#[test]
fn text_of_logprobs_is_that_of_the_token() {
    let demo = Demo::new();
    let line = "--json --temperature 0 -n 1 --logprobs 1";
    let out = generate(line, "[300]", &mut Counter::new(8192, 100), &demo.files()).unwrap();
    let json: Json = serde_json::from_str(&out).unwrap();
    assert_eq!((&json["logprobs"][0]["token"], &json["logprobs"][0]["text"]), (&json!(301), &json["text"]));
}

#[test]
fn characters_and_stop_texts_that_are_split_over_tokens_come_whole() {
    let demo = Demo::new();
    let tokenizer = Tokenizer::from_json(&demo.files[0].1).unwrap();
    let text = "naïve 漢字 🙏 end";
    let ids = tokenizer.encode(text).unwrap();
    let characters = text.chars().count();
    assert!(
        ids.len() > characters / 2
            && ids.iter().any(|&id| tokenizer.decode(&[id], Special::Keep).unwrap().contains('\u{fffd}'))
    );
    /// Says `ids` after any prompt of one token.
    struct Parrot(Counter, Vec<u32>);
    impl Forward for Parrot {
        fn vocab_size(&self) -> usize {
            self.0.vocab_size
        }
        fn max_context(&self) -> usize {
            self.0.max_context
        }
        fn eos_token_ids(&self) -> Vec<u32> {
            Vec::new()
        }
        fn begin(&mut self) -> Result<Sequence, ModelError> {
            self.0.begin()
        }
        fn end(&mut self, sequence: Sequence) {
            self.0.end(sequence);
        }
        fn forward(&mut self, runs: &[Run<'_>]) -> Result<Vec<u32>, ModelError> {
            self.0.forward(runs)?;
            let said = self.0.history(runs[0].sequence)?.len() - 1;
            Ok(vec![self.1[said]])
        }
        fn forward_all(&mut self, run: Run<'_>) -> Result<Option<u32>, ModelError> {
            self.0.forward_all(run)
        }
        fn keep_logits(&mut self) {}
        fn logits(&self, row: usize) -> &[f32] {
            self.0.logits(row)
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ids.json");
    std::fs::write(&path, "[1]").unwrap();
    let say = |line: &str| {
        let line = format!("--tokens {} --temperature 0 -n {} {line}", path.display(), ids.len());
        let mut out = Vec::new();
        let mut model = Parrot(Counter::new(8192, 100), ids.clone());
        super::run(&args(&line), &mut model, &demo.files(), 0.0, &mut out).unwrap();
        String::from_utf8(out).expect("only whole characters are written")
    };
    assert_eq!(say(""), format!("{text}\n"));
    assert_eq!(say("--stop 字"), "naïve 漢\n");
    assert_eq!(say("--stop 🙏"), "naïve 漢字 \n");
    assert_eq!(say("--stop dx"), format!("{text}\n"));
    let json: Json = serde_json::from_str(&say("--json --stop 🙏")).unwrap();
    assert_eq!((&json["text"], &json["finish_reason"]), (&json!("naïve 漢字 "), &json!("stop")));
}
