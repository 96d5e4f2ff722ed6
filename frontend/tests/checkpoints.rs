//! Checkpoints as they are found: in shards, stacked, of several types, damaged, hostile.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use nextc_frontend::{Error, Model, Options, load};
use nextc_ir::graph::Origin;
use nextc_ir::{Format, WeightSource};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The tensors of a checkpoint: name to dtype, shape and bytes.
type Tensors = BTreeMap<String, (&'static str, Vec<u64>, Vec<u8>)>;

fn fixture(file: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/oracle/tiny")).join(file)
}

fn tiny() -> Tensors {
    let bytes = fs::read(fixture("model.safetensors")).expect("the fixture is there");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("the fixture is valid");
    let entry = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        let shape = view.shape().iter().map(|n| *n as u64).collect();
        (name, ("BF16", shape, view.data().to_vec()))
    };
    file.tensors().into_iter().map(entry).collect()
}

fn file_of(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn encode(tensors: &Tensors) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, (dtype, shape, bytes)) in tensors {
        let begin = data.len();
        data.extend_from_slice(bytes);
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()]}));
    }
    file_of(&Value::Object(header).to_string(), &data)
}

/// A directory with the configuration of `tiny` and the given files.
fn directory(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    fs::copy(fixture("config.json"), dir.path().join("config.json")).expect("copied");
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).expect("written");
    }
    dir
}

fn load_tensors(tensors: &Tensors) -> (TempDir, Result<Model, Error>) {
    let dir = directory(&[("model.safetensors", &encode(tensors))]);
    let model = load(dir.path(), &Options::default());
    (dir, model)
}

fn refuse_tensors(tensors: &Tensors, expected: &str) {
    let (_dir, model) = load_tensors(tensors);
    assert_eq!(model.expect_err(expected).to_string(), expected);
}

fn refuse_files(files: &[(&str, &[u8])], expected: &str) {
    let dir = directory(files);
    let error = load(dir.path(), &Options::default()).expect_err(expected).to_string();
    assert!(error.starts_with(expected), "{error}\nexpected {expected}");
}

/// All values of a weight, in the order of its rows.
fn values(model: &Model, name: &str) -> Vec<f32> {
    let decl = &model.module.weights[name];
    let Origin::Rows(runs) = &decl.origin else { panic!("`{name}` has no rows") };
    let source = model.source.as_ref().expect("there are weights");
    let mut all = Vec::new();
    for run in runs {
        let width = source.tensor(&run.tensor).expect("it is there").shape.get(1).copied().unwrap_or(1);
        let mut rows = vec![0.0; (run.rows * width) as usize];
        source.read_rows(&run.tensor, run.first, &mut rows).expect("readable");
        all.extend(rows);
    }
    assert_eq!(all.len() as u64, decl.shape.iter().product::<u64>(), "{name}");
    all
}

#[test]
fn missing_and_wrong_tensors_are_named() {
    let mut tensors = tiny();
    tensors.remove("model.layers.1.linear_attn.A_log");
    tensors.get_mut("model.norm.weight").expect("there").1 = vec![1, 64];
    let conv = tensors.get_mut("model.layers.0.linear_attn.conv1d.weight").expect("there");
    conv.1 = vec![4, 128];
    let expected = "checkpoint: tensor `model.norm.weight` has shape [1, 64], expected [64]\n\
        checkpoint: tensor `model.layers.0.linear_attn.conv1d.weight` has shape [4, 128], expected [128, 1, 4] or [128, 4]\n\
        checkpoint: tensor `model.layers.1.linear_attn.A_log` is missing, expected shape [4]";
    refuse_tensors(&tensors, expected);

    let mut tensors = tiny();
    let norm = tensors.get_mut("model.norm.weight").expect("there");
    norm.0 = "I16";
    refuse_tensors(&tensors, "checkpoint: tensor `model.norm.weight` has dtype I16, expected BF16, F16 or F32");
}

#[test]
fn mtp_is_all_or_nothing() {
    let mut tensors = tiny();
    tensors.remove("mtp.layers.0.mlp.shared_expert_gate.weight");
    let missing = "checkpoint: tensor `mtp.layers.0.mlp.shared_expert_gate.weight` is missing, expected shape [1, 64]";
    refuse_tensors(&tensors, missing);
    let mut tensors = tiny();
    tensors.insert("mtp.extra.weight".into(), ("F32", vec![], vec![0; 4]));
    refuse_tensors(&tensors, "checkpoint: tensor `mtp.extra.weight` is not part of an MTP module as this model has it");
    let mut tensors = tiny();
    tensors.retain(|name, _| !name.starts_with("mtp."));
    let (_dir, model) = load_tensors(&tensors);
    let module = model.expect("MTP is optional").module;
    assert!(!module.info.mtp && module.function("draft").is_none());
    assert!(module.weights.keys().all(|n| !n.starts_with("mtp.")));
}

#[test]
fn leftovers_are_warned_of() {
    let mut tensors = tiny();
    tensors.insert("model.layers.9.wing.weight".into(), ("F32", vec![1], vec![0; 4]));
    tensors.insert("model.layers.3.self_attn.rotary_emb.inv_freq".into(), ("F32", vec![1], vec![0; 4]));
    let (_dir, model) = load_tensors(&tensors);
    let warnings = model.expect("loads").warnings;
    assert_eq!(warnings[1..], ["tensors that nothing reads: `model.layers.9.wing.weight`"]);
}

#[test]
fn quantised_tensors_are_recognised_without_a_word_in_the_config() {
    let mut tensors = tiny();
    tensors.insert("model.layers.0.mlp.experts.0.up_proj.weight_scale_inv".into(), ("F32", vec![1, 1], vec![0; 4]));
    let expected = "checkpoint: tensor `model.layers.0.mlp.experts.0.up_proj.weight_scale_inv` belongs to quantised weights: \
        the codes that it describes are not there, or are of a kind that is not read";
    refuse_tensors(&tensors, expected);
}

#[test]
fn a_head_that_is_missing_is_the_embedding() {
    let mut tensors = tiny();
    tensors.remove("lm_head.weight");
    let (_dir, model) = load_tensors(&tensors);
    let model = model.expect("loads");
    assert!(!model.module.weights.contains_key("head"));
    assert!(model.warnings.iter().any(|w| w.contains("lm_head.weight")));
}

/// Experts stacked by transformers 5, and a convolution without its middle dimension, give the same weights.
#[test]
fn stacked_experts_are_the_same_weights() {
    let plain = tiny();
    let mut stacked = plain.clone();
    for layer in ["model.layers.0.", "model.layers.3.", "mtp.layers.0."] {
        let mut take =
            |e: u64, p: &str| stacked.remove(&format!("{layer}mlp.experts.{e}.{p}_proj.weight")).expect("there").2;
        let (mut gate_up, mut down) = (Vec::new(), Vec::new());
        for e in 0..8 {
            gate_up.extend(take(e, "gate"));
            gate_up.extend(take(e, "up"));
            down.extend(take(e, "down"));
        }
        stacked.insert(format!("{layer}mlp.experts.gate_up_proj"), ("BF16", vec![8, 64, 64], gate_up));
        stacked.insert(format!("{layer}mlp.experts.down_proj"), ("BF16", vec![8, 64, 32], down));
    }
    stacked.get_mut("model.layers.0.linear_attn.conv1d.weight").expect("there").1 = vec![128, 4];
    let ((_a, a), (_b, b)) = (load_tensors(&plain), load_tensors(&stacked));
    let (a, b) = (a.expect("loads"), b.expect("loads"));
    assert_eq!(a.warnings, b.warnings);
    assert_eq!(a.module.weights.keys().collect::<Vec<_>>(), b.module.weights.keys().collect::<Vec<_>>());
    for name in a.module.weights.keys().filter(|n| !["inv_freq", "mtp.w_e", "mtp.w_h"].contains(&n.as_str())) {
        assert_eq!(values(&a, name), values(&b, name), "{name}");
    }
}

/// A matrix keeps its format; experts of several formats are widened together.
#[test]
fn formats_are_those_of_the_file() {
    let mut tensors = tiny();
    let widen = |bytes: &[u8]| -> Vec<u8> { bytes.chunks(2).flat_map(|b| [0, 0, b[0], b[1]]).collect() };
    for name in ["model.layers.0.mlp.experts.5.up_proj.weight", "model.layers.0.linear_attn.A_log", "lm_head.weight"] {
        let tensor = tensors.get_mut(name).expect("there");
        *tensor = ("F32", tensor.1.clone(), widen(&tensor.2));
    }
    let half = tensors.get_mut("model.layers.3.self_attn.o_proj.weight").expect("there");
    half.0 = "F16";
    let ((_a, plain), (_b, mixed)) = (load_tensors(&tiny()), load_tensors(&tensors));
    let (plain, mixed) = (plain.expect("loads"), mixed.expect("loads"));
    let format = |name: &str| mixed.module.weights[name].format;
    assert_eq!(format("layers.0.mlp.experts_up"), Format::F32);
    assert_eq!(format("layers.0.mlp.experts_gate"), Format::Bf16);
    assert_eq!(format("head"), Format::F32);
    assert_eq!(format("embed"), Format::Bf16);
    assert_eq!(format("layers.3.w_o"), Format::F16);
    assert_eq!(format("layers.0.a_log"), Format::F32);
    for name in ["layers.0.mlp.experts_up", "layers.0.a_log", "head"] {
        assert_eq!(values(&plain, name), values(&mixed, name), "{name}");
    }
}

#[test]
fn shards_are_exactly_those_of_the_index() {
    let all = tiny();
    let mut parts: [Tensors; 2] = Default::default();
    for (i, (name, tensor)) in all.iter().enumerate() {
        parts[i % 2].insert(name.clone(), tensor.clone());
    }
    let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let mut map: BTreeMap<String, String> = BTreeMap::new();
    for (part, file) in parts.iter().zip(names) {
        map.extend(part.keys().map(|n| (n.clone(), file.to_owned())));
    }
    let [first, second] = [encode(&parts[0]), encode(&parts[1])];
    let with_index = |map: &BTreeMap<String, String>, second: &[u8]| {
        let index = json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string();
        let files: [(&str, &[u8]); 4] = [
            (names[0], &first),
            (names[1], second),
            ("model.safetensors.index.json", index.as_bytes()),
            ("other.safetensors", b"x"),
        ];
        let dir = directory(&files);
        let model = load(dir.path(), &Options::default());
        (dir, model)
    };
    assert!(with_index(&map, &second).1.is_ok());

    let refuse = |map: &BTreeMap<String, String>, second: &[u8], expected: &str| {
        assert_eq!(with_index(map, second).1.expect_err(expected).to_string(), expected);
    };
    let index = "model.safetensors.index.json";
    let moved = parts[0].keys().next().expect("not empty").clone();
    let mut wrong = map.clone();
    wrong.insert(moved.clone(), names[1].into());
    refuse(&wrong, &second, &format!("{index}: `{moved}` should lie in {}, but lies in {}", names[1], names[0]));
    let mut wrong = map.clone();
    wrong.insert("none".into(), names[1].into());
    refuse(&wrong, &second, &format!("{index}: `none` should lie in {}, which does not have it", names[1]));
    let mut twice = parts[1].clone();
    twice.insert(moved.clone(), all[&moved].clone());
    refuse(&map, &encode(&twice), &format!("{}: tensor `{moved}` is in this file and in {}", names[1], names[0]));
    for bad in ["../x.safetensors", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "./a"] {
        let mut wrong = map.clone();
        wrong.insert(moved.clone(), bad.into());
        let expected = format!("{index}: `{moved}` lies in {bad:?}, expected the name of a file in the same directory");
        refuse(&wrong, &second, &expected);
    }
    let mut unlisted = map.clone();
    unlisted.remove("lm_head.weight");
    let warnings = with_index(&unlisted, &second).1.expect("loads").warnings;
    assert!(warnings[0].contains("1 tensors that it does not list"), "{warnings:?}");
    let mut gone = map;
    gone.insert(moved, "gone.safetensors".into());
    let error = with_index(&gone, &second).1.expect_err("there is no such shard").to_string();
    assert!(error.starts_with("gone.safetensors: "), "{error}");
}

#[test]
fn hostile_headers_are_refused() {
    let file = "model.safetensors";
    let entry = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"a": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}}}"#)
    };
    let refuse = |bytes: &[u8], expected: &str| refuse_files(&[(file, bytes)], &format!("{file}: {expected}"));
    refuse(b"1234567", "7 B, too short for a safetensors header");
    refuse(&[0xff; 64], "header of 18446744073709551615 B, expected at most 56 B");
    refuse(&file_of("{", &[]), "header: EOF");
    refuse(&file_of("[]", &[]), "header: invalid type");
    refuse(
        &file_of(&entry("F7", "[1]", "[0, 4]"), &[0; 4]),
        "tensor `a` has dtype F7, which safetensors does not have",
    );
    refuse(&file_of(&entry("F32", "[2]", "[0, 4]"), &[0; 4]), "tensor `a` of F32 [2] lies in 4 B, expected 8 B");
    refuse(&file_of(&entry("F4", "[3]", "[0, 2]"), &[0; 2]), "tensor `a` of F4 [3] lies in 2 B, expected a shape");
    let overflow = "[4294967296, 4294967296, 4294967296]";
    refuse(
        &file_of(&entry("F32", overflow, "[0, 4]"), &[0; 4]),
        "tensor `a` of F32 [4294967296, 4294967296, 4294967296]",
    );
    refuse(&file_of(&entry("F32", "[1]", "[4, 0]"), &[0; 4]), "tensor `a` lies at 4..0");
    refuse(&file_of(&entry("F32", "[1]", "[4, 8]"), &[0; 8]), "tensor `a` lies at 4..8");
    refuse(&file_of(&entry("F32", "[1]", "[-1, 3]"), &[0; 8]), "header: invalid value");
    refuse(&file_of(&entry("F32", "[1.5]", "[0, 4]"), &[0; 4]), "header: invalid type");
    refuse(
        &file_of(&entry("F32", "[1]", "[0, 4]"), &[0; 3]),
        "3 B of tensor data, expected 4 B: the file is truncated",
    );
    refuse(
        &file_of(&entry("F32", "[1]", "[0, 4]"), &[0; 5]),
        "5 B of tensor data, expected 4 B: the file is truncated",
    );
    let end = u64::MAX;
    refuse(&file_of(&entry("U8", &format!("[{end}]"), &format!("[0, {end}]")), &[0; 4]), "tensor `a` of U8");
    let one = r#""dtype": "U8", "shape": [1], "data_offsets": [0, 1]"#;
    refuse(&file_of(&format!(r#"{{"a": {{{one}, "wing": 1}}}}"#), &[0]), "header: unknown field `wing`");
    refuse(&file_of(&format!(r#"{{"a": {{{one}, "dtype": "U8"}}}}"#), &[0]), "header: duplicate field `dtype`");
    let two = one.replace("[0, 1]", "[1, 2]");
    refuse(
        &file_of(&format!(r#"{{"a": {{{one}}}, "b": {{{one}}}}}"#), &[0]),
        "tensor `b` lies at 0..1, expected it to begin at 1",
    );
    refuse(&file_of(&format!(r#"{{"a": {{{one}}}, "a": {{{two}}}}}"#), &[0; 2]), "header: tensor `a` appears twice");
}

#[test]
fn things_that_are_not_files_are_refused() {
    let dir = directory(&[]);
    fs::create_dir(dir.path().join("model.safetensors")).expect("created");
    let error = load(dir.path(), &Options::default()).expect_err("a directory is no file").to_string();
    assert_eq!(error, "model.safetensors: not a regular file");
    let dir = directory(&[]);
    std::os::unix::fs::symlink("nowhere", dir.path().join("model.safetensors")).expect("linked");
    let error = load(dir.path(), &Options::default()).expect_err("the link is broken").to_string();
    assert!(error.starts_with("model.safetensors: No such file"), "{error}");
    assert!(matches!(load(Path::new("/nowhere"), &Options::default()), Err(Error::Io { .. })));
    let dir = directory(&[]);
    let model = load(dir.path(), &Options::default()).expect("the config is enough");
    assert!(model.source.is_none() && model.warnings[0].contains("from its config.json alone"));
}

#[test]
fn tokenizer_files_are_carried_along() {
    let generation = br#"{"eos_token_id": [7, 9]}"#;
    let dir =
        directory(&[("tokenizer.json", b"{}"), ("generation_config.json", generation), ("chat_template.jinja", b"hi")]);
    let model = load(dir.path(), &Options::default()).expect("loads");
    let names: Vec<&str> = model.assets.iter().map(|a| a.name.as_str()).collect();
    assert_eq!(names, ["tokenizer.json", "generation_config.json", "chat_template.jinja"]);
    assert_eq!(model.module.info.eos_token_ids, [7, 9]);
    refuse_files(&[("tokenizer.json", b"{")], "tokenizer.json: EOF");
    refuse_files(&[("chat_template.jinja", b"\xff")], "chat_template.jinja: invalid utf-8");
    let bad = br#"{"eos_token_id": "x"}"#;
    refuse_files(
        &[("generation_config.json", bad)],
        "generation_config.json: `eos_token_id` is \"x\", expected a token id",
    );
}
