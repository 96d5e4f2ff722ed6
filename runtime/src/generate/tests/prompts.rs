//! Files of prompts.

use super::*;

/// What is printed for a file of prompts, or the error with the file's name cut short.
fn answer(line: &str, file: &str, model: &mut Counter) -> Result<String, String> {
    let demo = Demo::new();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("prompts");
    std::fs::write(&path, file).unwrap();
    let args = args(&format!("--temperature 0 {line} --prompts {}", path.display()));
    let mut out = Vec::new();
    let short = |text: &str| text.replace(path.to_str().unwrap(), "prompts");
    run(&args, model, &demo.files(), 0.0, &mut out).map_err(|e| short(&e.to_string()))?;
    Ok(short(&String::from_utf8(out).unwrap()))
}

fn objects(line: &str, file: &str, model: &mut Counter) -> Vec<Json> {
    let out = answer(&format!("--json {line}"), file, model).unwrap();
    out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn tokens(text: &str) -> usize {
    let tokenizer = Tokenizer::from_json(&Demo::new().files[0].1).unwrap();
    tokenizer.encode(text).unwrap().len()
}

#[test]
fn texts_are_answered_in_order_as_lines_of_json_or_blocks() {
    let file = "one\n\ntwo words\r\n[three]\n";
    let got = objects("-n 2 --raw --batch 2", file, &mut Counter { slots: 2, ..Counter::new(8192, 100) });
    let lengths: Vec<_> = got.iter().map(|o| o["prompt_tokens"].as_u64().unwrap() as usize).collect();
    assert_eq!(lengths, [tokens("one"), tokens("two words"), tokens("[three]")]);
    assert!(got.iter().all(|o| o["completion_tokens"] == 2 && o["finish_reason"] == "length" && o["text"].is_string()));
    let text = answer("-n 2 --raw", file, &mut Counter::new(8192, 100)).unwrap();
    let blocks: Vec<_> = text.split("\n\n").collect();
    for ((block, at), object) in blocks.iter().zip(["prompts:1", "prompts:3", "prompts:4"]).zip(&got) {
        assert_eq!(block.trim_end(), format!("== {at} ==\n{}", object["text"].as_str().unwrap()).trim_end());
    }
    let chat = objects("-n 1", "hello\n", &mut Counter::new(8192, 100));
    assert_eq!(chat[0]["prompt_tokens"], tokens("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"));
}

#[test]
fn a_short_answer_waits_for_those_before_it() {
    let file = "{\"tokens\": [1], \"max_new_tokens\": 9}\n{\"tokens\": [20], \"max_new_tokens\": 1}\n";
    let got = objects("", file, &mut Counter::new(8192, 100));
    assert_eq!(got[0]["tokens"], json!([2, 3, 4, 5, 6, 7, 8, 9, 10]));
    assert_eq!(got[1]["tokens"], json!([21]));
}

#[test]
fn lines_of_json_have_options_of_their_own() {
    let file = r#"
        {"prompt": "hello", "max_new_tokens": 1}
        {"prompt": "hello", "system": "Be brief.", "max_new_tokens": 1}
        {"messages": [{"role": "user", "content": "hello"}], "max_new_tokens": 1}
        {"tokens": [5, 6], "stop": [], "logit_bias": {"3": 50}, "max_new_tokens": 2}
        {"tokens": [5, 6], "repetition_penalty": 1.5, "presence_penalty": 0.1, "frequency_penalty": 0.1, "min_p": 0.5}
    "#;
    let got = objects("-n 3", file, &mut Counter::new(8192, 100));
    let hello = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(got[0]["prompt_tokens"], tokens(hello));
    assert!(got[1]["prompt_tokens"].as_u64() > got[0]["prompt_tokens"].as_u64());
    assert_eq!(got[2]["prompt_tokens"], got[0]["prompt_tokens"]);
    assert_eq!((&got[3]["tokens"], &got[4]["tokens"]), (&json!([3, 3]), &json!([7, 8, 9])));
}

#[test]
fn a_line_with_a_seed_is_as_alone() {
    let file = r#"
        {"tokens": [1], "temperature": 2, "seed": 1}
        {"tokens": [5, 6, 7], "temperature": 2, "seed": 77}
    "#;
    let got = objects("-n 12", file, &mut Counter::noisy(100));
    let line = "--json -n 12 --temperature 2 --seed 77";
    let alone = generate(line, "[5, 6, 7]", &mut Counter::noisy(100), &Demo::new().files()).unwrap();
    let alone: Json = serde_json::from_str(&alone).unwrap();
    assert_eq!((&got[1]["tokens"], &got[1]["seed"]), (&alone["tokens"], &json!(77)));
}

#[test]
fn bad_lines_are_named() {
    let check = |file: &str, expected: &str| {
        let error = answer("-n 1", file, &mut Counter::new(8192, 12)).unwrap_err();
        assert!(error.starts_with(expected), "{error}");
    };
    check("", "prompts: expected a prompt a line, found none");
    check("\n \n", "prompts: expected a prompt a line, found none");
    check("{\n", "prompts:1: EOF");
    check("\n{\"tokens\": [1]}\nx\n", "prompts:3: expected value");
    check("{\"tokens\": [1]}\n[1]\n", "prompts:2: [1] stands where an object is expected");
    check("{}", "prompts:1: expected one of `prompt`, `tokens`, `messages`, found 0");
    check("{\"tokens\": [1], \"prompt\": \"x\"}", "prompts:1: expected one of `prompt`, `tokens`, `messages`, found 2");
    check("{\"tokens\": [1, -1]}", "prompts:1: `tokens`[1] is -1");
    check("{\"tokens\": 4}", "prompts:1: `tokens` is 4, expected an array");
    check("{\"tokens\": []}", "prompts:1 has no tokens");
    check("{\"tokens\": [9999]}", "prompts:1: token 0 is 9999");
    check("{\"prompt\": 4}", "prompts:1: `prompt` is 4, expected a string");
    check("{\"messages\": \"x\"}", "prompts:1: `messages` is \"x\", expected an array");
    check("{\"tokens\": [1], \"max_tokens\": 4}", "prompts:1: `max_tokens` is not known here");
    check("{\"tokens\": [1], \"max_new_tokens\": -4}", "prompts:1: `max_new_tokens` is -4, expected a whole number");
    check("{\"tokens\": [1], \"temperature\": -4}", "prompts:1: `temperature` is -4, expected");
    check("{\"tokens\": [1], \"top_k\": 1.5}", "prompts:1: `top_k` is 1.5, expected a whole number");
    check("{\"tokens\": [1], \"stop\": 5}", "prompts:1: `stop` is 5, expected a string");
    check("{\"tokens\": [1], \"logit_bias\": {\"x\": 1}}", "prompts:1: `logit_bias` has `x`");
    check(
        "{\"tokens\": [1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]}",
        "prompts:1 has 15 tokens, 3 more than the context holds (12)",
    );
    let path = tempfile::tempdir().unwrap().path().join("none");
    let args = args(&format!("--prompts {}", path.display()));
    let error = run(&args, &mut Counter::new(9, 9), &no_files(), 0.0, &mut Vec::new()).unwrap_err().to_string();
    assert!(error.starts_with(path.to_str().unwrap()), "{error}");
}

#[test]
fn bytes_that_are_no_text_are_named_by_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("prompts");
    std::fs::write(&path, b"fine\n\xff\n").unwrap();
    let args = args(&format!("--prompts {}", path.display()));
    let error = run(&args, &mut Counter::new(9, 9), &no_files(), 0.0, &mut Vec::new()).unwrap_err().to_string();
    assert!(error.contains("prompts:2: not UTF-8"), "{error}");
}
