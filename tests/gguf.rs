//! Executables of GGUF files: the same bits as those of the published files where the numbers are the same, kernels that
//! compute with every quantised type, and the demo model with tokenizer and template from metadata.

#[path = "support/gguf.rs"]
mod gguf;
mod support;

use std::path::{Path, PathBuf};

use gguf::{File, QUANTISED, Random, as_bf16, as_f32};
use serde_json::Value as Json;
use support::exe::{Exe, backends};
use support::golden::{check, fixture, root};
use support::interpreter::Interpreter;
use support::{Feed, Subject};

fn json(path: &Path) -> Json {
    serde_json::from_slice(&std::fs::read(path).expect("the file is there")).expect("JSON")
}

fn converted(dir: &Path, matrix: &gguf::Matrix) -> File {
    gguf::convert(&json(&dir.join("config.json")), &gguf::published(dir), matrix, false)
}

fn written(file: &File) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, file.bytes()).expect("written");
    (dir, path)
}

fn tokens() -> Vec<i32> {
    (0..40).map(|i| (i * i * 7 + 13 * i) % 500).collect()
}

#[test]
fn a_converted_model_gives_the_same_bits() {
    for name in ["tiny", "odd", "dense-mix"] {
        let dir = fixture(name);
        let (_keep, file) = written(&converted(&dir, &as_bf16));
        for backend in backends() {
            let [want, got] = [&dir, &file].map(|model| Exe::build(model, backend, &[]));
            for feed in [Feed::Prefill, Feed::Decode] {
                let [want, got] = [&want, &got].map(|exe| exe.logits(&[tokens()], feed, 1).remove(0));
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert!(bits(&want.logits) == bits(&got.logits), "{name}, {backend}, {feed:?}");
                assert!(bits(&want.mtp) == bits(&got.mtp), "{name}, {backend}, {feed:?}, drafts");
            }
        }
    }
}

/// A model with blocks of one type, or of different ones from tensor to tensor.
fn blocks(name: Option<&'static str>, dequantised: bool) -> File {
    let (config, tensors) = gguf::wide_model();
    let matrix = move |tensor: &str, x: &[f32]| {
        let seed = tensor.bytes().fold(7u64, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
        let name = name.unwrap_or(QUANTISED[(seed % 4) as usize].0);
        if tensor.contains("ffn_gate_inp") {
            return as_f32(tensor, x);
        }
        let (id, bytes) = gguf::random_blocks(name, x.len(), &mut Random(seed));
        if dequantised { as_f32(tensor, &gguf::dequantise(name, &bytes)) } else { (id, bytes) }
    };
    gguf::convert(&config, &tensors, &matrix, false)
}

#[test]
fn kernels_compute_with_every_type() {
    for name in QUANTISED.iter().map(|q| Some(q.0)).chain([None]) {
        let what = name.unwrap_or("all types");
        let (_keep, plain) = written(&blocks(name, true));
        let want = &Interpreter::plain(&plain).logits(&[tokens()], Feed::Prefill, 1)[0];
        let (_keep, file) = written(&blocks(name, false));
        let kept = &Interpreter::plain(&file).logits(&[tokens()], Feed::Prefill, 1)[0];
        assert!(kept.logits == want.logits && kept.mtp == want.mtp, "{what}: the interpreter");
        for backend in backends() {
            let exe = Exe::build(&file, backend, &[]);
            for feed in [Feed::Prefill, Feed::Decode] {
                let got = &exe.logits(&[tokens()], feed, 1)[0];
                check(&format!("{what}: {backend}, {feed:?}"), &got.logits, &want.logits, 512);
                check(&format!("{what}: {backend}, {feed:?}, drafts"), &got.mtp, &want.mtp, 512);
            }
        }
    }
}

/// The demo model as a file, with what its tokenizer's files say in metadata.
fn demo() -> File {
    let dir = root().join("examples/demo-model");
    let mut file = converted(&dir, &as_bf16);
    let (tokenizer, config) = (json(&dir.join("tokenizer.json")), json(&dir.join("tokenizer_config.json")));
    let mut tokens = vec![(String::new(), 1); 8192];
    for (token, id) in tokenizer["model"]["vocab"].as_object().expect("an object") {
        tokens[id.as_u64().expect("an id") as usize] = (token.clone(), 1);
    }
    for added in tokenizer["added_tokens"].as_array().expect("a list") {
        let token = added["content"].as_str().expect("a text").to_owned();
        tokens[added["id"].as_u64().expect("an id") as usize] = (token, 3);
    }
    let (texts, types): (Vec<String>, Vec<i32>) = tokens.into_iter().unzip();
    let merges = tokenizer["model"]["merges"].as_array().expect("a list").iter();
    let merges: Vec<String> =
        merges.map(|m| format!("{} {}", m[0].as_str().unwrap(), m[1].as_str().unwrap())).collect();
    file.text("tokenizer.ggml.model", "gpt2");
    file.text("tokenizer.ggml.pre", "qwen2");
    file.texts("tokenizer.ggml.tokens", &texts);
    file.i32s("tokenizer.ggml.token_type", &types);
    file.texts("tokenizer.ggml.merges", &merges);
    file.text("tokenizer.chat_template", config["chat_template"].as_str().expect("a text"));
    file.bool("tokenizer.ggml.add_bos_token", false);
    file
}

#[test]
fn the_demo_model_answers_from_one_file() {
    let (_keep, file) = written(&demo());
    let dir = root().join("examples/demo-model");
    let golden = json(&dir.join("golden_greedy.json"));
    for backend in backends() {
        let (folder, exe) = (Exe::build(&dir, backend, &[]), Exe::build(&file, backend, &[]));
        for case in golden.as_array().expect("a list") {
            let prompt = case["prompt"].as_str().expect("a text");
            let greedy =
                ["--raw", "-p", prompt, "--temperature", "0", "--max-new-tokens", "24", "--ignore-eos", "--json"];
            let answer = exe.json("generate", &greedy);
            let ids = answer["tokens"].as_array().expect("a list");
            assert_eq!(ids[..], case["greedy_ids"].as_array().expect("a list")[..ids.len()], "{prompt}");
            let asked = ["-p", prompt, "--temperature", "0", "--max-new-tokens", "24", "--json"];
            let [want, got] = [&folder, &exe].map(|exe| exe.json("generate", &asked)["text"].clone());
            assert_eq!(got, want, "{prompt}, through the chat template");
        }
    }
}
