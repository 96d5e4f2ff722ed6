//! Models in GGUF files: the numbers that they stand for, and what is said of damaged and hostile ones.

#[path = "../../tests/support/gguf.rs"]
mod gguf;

use std::path::{Path, PathBuf};

use gguf::{BF16, F32, File, QUANTISED, Random, Tensor, as_bf16, as_f32, list, value};
use nextc_frontend::{Model, Options, Quant, load};
use nextc_ir::WeightSource;
use nextc_ir::rows::{Buffers, Rows};
use proptest::prelude::*;
use serde_json::Value as Json;
use tempfile::TempDir;

fn fixture(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/oracle")).join(name)
}

fn config(dir: &Path) -> Json {
    serde_json::from_slice(&std::fs::read(dir.join("config.json")).expect("the fixture is there")).expect("JSON")
}

fn converted(name: &str, matrix: &gguf::Matrix, fused: bool) -> File {
    let dir = fixture(name);
    gguf::convert(&config(&dir), &gguf::published(&dir), matrix, fused)
}

fn written(bytes: &[u8]) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).expect("written");
    (dir, path)
}

fn load_file(file: &File, options: &Options) -> Result<Model, nextc_frontend::Error> {
    let (_dir, path) = written(&file.bytes());
    load(&path, options)
}

/// The numbers of a weight.
fn numbers(model: &Model, name: &str) -> Vec<f32> {
    let source = model.source.as_ref().expect("there are weights");
    let rows = Rows::open(name, &model.module.weights[name], source).expect("its origin fits");
    let mut out = vec![0.0; (rows.rows * rows.columns) as usize];
    rows.read(0, &mut out, &mut Buffers::default()).expect("readable");
    out
}

/// Each weight has the shape and numbers that it has in the folder, and with bfloat16 the format.
fn check_same(file: &Model, folder: &Model, what: &str) {
    let plain = |m: &Model| nextc_frontend::ModelConfig { mtp_layers: None, ..m.config.clone() };
    assert_eq!(plain(file), plain(folder), "{what}");
    assert_eq!(file.module.weights.len(), folder.module.weights.len(), "{what}");
    for (name, decl) in &folder.module.weights {
        assert_eq!(file.module.weights[name].shape, decl.shape, "{what}: {name}");
        let (got, want) = (numbers(file, name), numbers(folder, name));
        // gains are stored with their 1: smaller bits of tiny ones are gone, and make no difference
        let gain = if name.ends_with("norm") || name.contains("norm_") { 1.0 } else { 0.0 };
        let differs = got.iter().zip(&want).position(|(a, b)| (gain + a).to_bits() != (gain + b).to_bits());
        assert_eq!(differs, None, "{what}: {name}");
    }
}

#[test]
fn a_converted_model_has_the_published_numbers() {
    for name in ["tiny", "odd", "dense-mix", "yarn"] {
        let folder = load(&fixture(name), &Options::default()).expect("the fixture loads");
        for (what, matrix) in [("bf16", &as_bf16 as &gguf::Matrix), ("f32", &as_f32)] {
            for fused in [false, true] {
                let file = load_file(&converted(name, matrix, fused), &Options::default()).expect("it loads");
                check_same(&file, &folder, &format!("{name} as {what}, fused {fused}"));
                let format = file.module.weights["layers.0.w_z"].format.to_string();
                assert_eq!(format, what);
                assert_eq!(file.module.info.eos_token_ids, folder.module.info.eos_token_ids);
                let about_tensors: Vec<_> = file.warnings.iter().filter(|w| w.contains("tensor")).collect();
                assert!(about_tensors.is_empty(), "{about_tensors:?}");
            }
        }
    }
}

#[test]
fn parts_of_a_file_are_found_beside_the_first() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let first = converted("tiny", &as_bf16, false).write_parts(dir.path(), 3);
    let folder = load(&fixture("tiny"), &Options::default()).expect("the fixture loads");
    check_same(&load(&first, &Options::default()).expect("it loads"), &folder, "three parts");
    let error = |path: &Path| load(path, &Options::default()).expect_err("it is refused").to_string();
    let second = first.with_file_name("model-00002-of-00003.gguf");
    assert_eq!(
        error(&second),
        "model-00002-of-00003.gguf: `split.no` is 1, expected 0: name the first part of the model, the others are found beside it"
    );
    std::fs::copy(&first, &second).expect("copied");
    assert_eq!(error(&first), "model-00002-of-00003.gguf: `split.no` is 0, expected 1");
    std::fs::remove_file(&second).expect("removed");
    assert!(error(&first).starts_with("model-00002-of-00003.gguf: No such file"));
}

/// The wide model whose matrices are blocks of a type, or what these stand for.
fn blocks(name: &'static str, dequantised: bool) -> File {
    let (config, tensors) = gguf::wide_model();
    let matrix = move |tensor: &str, x: &[f32]| {
        if tensor.contains("ffn_gate_inp") {
            return as_f32(tensor, x);
        }
        let seed = tensor.bytes().fold(7u64, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
        let (id, bytes) = gguf::random_blocks(name, x.len(), &mut Random(seed));
        if dequantised { as_f32(tensor, &gguf::dequantise(name, &bytes)) } else { (id, bytes) }
    };
    gguf::convert(&config, &tensors, &matrix, false)
}

#[test]
fn blocks_are_kept_and_stand_for_what_they_are_dequantised_to() {
    for ((name, ..), format) in QUANTISED.into_iter().zip(["q8<g32>", "q4<g32>", "u4<g32,k256>", "q6<g16,k256>"]) {
        let model = load_file(&blocks(name, false), &Options::default()).expect("it loads");
        let plain = load_file(&blocks(name, true), &Options::default()).expect("it loads");
        let (_dir, path) = written(&blocks(name, false).bytes());
        let model = Model { source: load(&path, &Options::default()).expect("it loads").source, ..model };
        let (_dir, path) = written(&blocks(name, true).bytes());
        let plain = Model { source: load(&path, &Options::default()).expect("it loads").source, ..plain };
        for (weight, decl) in &model.module.weights {
            let (got, want) = (numbers(&model, weight), numbers(&plain, weight));
            assert!(got == want, "{name}: {weight}");
            let kept = decl.in_rank > 0 && !weight.ends_with("router") && !weight.ends_with("shared_gate");
            assert_eq!(decl.format.to_string(), if kept { format } else { "f32" }, "{weight}");
        }
        assert!(model.warnings.iter().all(|w| !w.contains("widened")), "{:?}", model.warnings);
        let options = Options { quant: Some(Quant::Q8).into(), ..Options::default() };
        let rounded = load_file(&blocks(name, false), &options).expect("it loads");
        assert_eq!(rounded.module.weights["layers.0.w_q"].format.to_string(), "q8<g32>");
    }
}

/// A valid file to damage: small, and with a tokenizer.
fn small() -> File {
    let mut file = converted("tiny", &as_bf16, false);
    let tokens = ["!", "a", "b", "ab", "<|end|>", "[PAD5]"].map(str::to_owned);
    file.text("tokenizer.ggml.model", "gpt2");
    file.text("tokenizer.ggml.pre", "qwen2");
    file.texts("tokenizer.ggml.tokens", &tokens);
    file.i32s("tokenizer.ggml.token_type", &[1, 1, 1, 1, 3, 5]);
    file.texts("tokenizer.ggml.merges", &["a b".into()]);
    file.text("tokenizer.chat_template", "{{ messages }}");
    file
}

#[test]
fn tokenizer_and_template_become_files() {
    let model = load_file(&small(), &Options::default()).expect("it loads");
    let asset = |name: &str| -> Json {
        let asset = model.assets.iter().find(|a| a.name == name).unwrap_or_else(|| panic!("no {name}"));
        serde_json::from_slice(&asset.bytes).expect("JSON")
    };
    let tokenizer = asset("tokenizer.json");
    assert_eq!(tokenizer["model"]["vocab"].to_string(), r#"{"!":0,"a":1,"b":2,"ab":3}"#);
    assert_eq!(tokenizer["model"]["merges"].to_string(), r#"[["a","b"]]"#);
    assert_eq!(
        (&tokenizer["added_tokens"][0]["id"], &tokenizer["added_tokens"][0]["special"]),
        (&4.into(), &true.into())
    );
    assert_eq!(tokenizer["added_tokens"].as_array().map(Vec::len), Some(1));
    let config = asset("tokenizer_config.json");
    assert_eq!((&config["chat_template"], &config["eos_token"]), (&"{{ messages }}".into(), &"a".into()));

    let warned = |change: &dyn Fn(&mut File), expected: &str| {
        let mut file = small();
        change(&mut file);
        let model = load_file(&file, &Options::default()).expect("it loads");
        assert!(model.warnings.iter().any(|w| w.contains(expected)), "{:?}", model.warnings);
    };
    warned(&|f| f.text("tokenizer.ggml.pre", "llama-bpe"), "`tokenizer.ggml.pre` is \"llama-bpe\", expected \"qwen2\"");
    warned(&|f| f.text("tokenizer.ggml.model", "llama"), "the executable will take token ids only");
    warned(&|f| f.bool("tokenizer.ggml.add_bos_token", true), "no token is put before a prompt");
    warned(&|f| f.u32("qwen3next.new_idea", 1), "`qwen3next.new_idea` is not a known key and has no effect");
}

/// Loading says exactly this.
fn refuse(change: impl Fn(&mut File), expected: &str) {
    let mut file = small();
    change(&mut file);
    let error = load_file(&file, &Options::default()).expect_err(expected).to_string();
    assert_eq!(error.replace("model.gguf: ", ""), expected);
}

#[test]
fn wrong_keys_are_named() {
    refuse(
        |f| f.text("general.architecture", "llama"),
        "`general.architecture` is \"llama\", expected \"qwen3next\" (the architecture that is supported)",
    );
    refuse(
        |f| f.keys.retain(|k| k.0 != "qwen3next.ssm.state_size"),
        "`qwen3next.ssm.state_size` is missing, expected a number",
    );
    refuse(
        |f| f.u32("qwen3next.attention.head_count_kv", 3),
        "`qwen3next.attention.head_count_kv` is 3, expected a divisor of `num_attention_heads` (4)",
    );
    refuse(
        |f| f.text("qwen3next.embedding_length", "wide"),
        "`qwen3next.embedding_length` is \"wide\", expected an integer from 1 to 1048576",
    );
    refuse(
        |f| f.u32("qwen3next.ssm.inner_size", 63),
        "`qwen3next.ssm.inner_size` is 63, expected a multiple of `qwen3next.ssm.time_step_rank` (4)",
    );
    refuse(
        |f| f.u32("qwen3next.attention.value_length", 64),
        "`qwen3next.attention.value_length` is 64, expected `qwen3next.attention.key_length` (32)",
    );
    refuse(
        |f| f.u32("qwen3next.block_count", 1),
        "`qwen3next.block_count` is 1, expected a number from 1 to 65536 above that of MTP modules (`qwen3next.nextn_predict_layers`)",
    );
    refuse(
        |f| f.u32("qwen3next.expert_gating_func", 2),
        "`qwen3next.expert_gating_func` is \"sigmoid\", expected \"softmax\" (other router scores are not supported)",
    );
    refuse(
        |f| f.text("qwen3next.rope.scaling.type", "linear"),
        "`qwen3next.rope.scaling.type` is \"linear\", expected \"default\" or \"yarn\" (other rotary scalings are not supported)",
    );
    refuse(
        |f| f.texts("tokenizer.ggml.merges", &["a c".into()]),
        "`tokenizer.ggml.merges` is \"a c\" among others, expected two tokens of the vocabulary, and a space between them, that make a third",
    );
    refuse(
        |f| f.i32s("tokenizer.ggml.token_type", &[1]),
        "`tokenizer.ggml.token_type` is a list of 1 numbers, expected a number for each of 6 tokens",
    );
    refuse(
        |f| f.set("general.alignment", value(4, &24u32.to_le_bytes())),
        "`general.alignment` is 24, expected a power of two up to 65536",
    );
    refuse(|f| f.keys.push(f.keys[0].clone()), "`general.architecture` is there twice, expected once");
}

#[test]
fn wrong_tensors_are_named() {
    let norm = "blk.0.attn_norm.weight";
    let tensor = |name: &'static str, change: &'static dyn Fn(&mut Tensor)| move |f: &mut File| change(f.tensor(name));
    refuse(
        |f| f.tensors.retain(|t| t.0 != norm),
        "checkpoint: tensor `blk.0.attn_norm.weight` is missing, expected shape [64]",
    );
    refuse(
        tensor(norm, &|t| (t.1, t.2) = (vec![32], vec![0; 128])),
        "checkpoint: tensor `blk.0.attn_norm.weight` has shape [32], expected [64]",
    );
    refuse(
        tensor("output.weight", &|t| (t.0, t.2) = (20, vec![0; 512 * 36])),
        "checkpoint: tensor `output.weight` has dtype IQ4_NL, expected F32, F16, BF16, Q8_0, Q4_0, Q4_K or Q6_K",
    );
    refuse(
        tensor(norm, &|t| (t.0, t.2) = (8, vec![0; 68])),
        "checkpoint: tensor `blk.0.attn_norm.weight` has dtype Q8_0, expected F32, F16 or BF16",
    );
    refuse(tensor(norm, &|t| t.0 = 5), "tensor `blk.0.attn_norm.weight`: type 5, which GGUF does not have");
    refuse(
        tensor(norm, &|t| t.0 = 12),
        "tensor `blk.0.attn_norm.weight`: rows of 64 numbers, expected a multiple of 256 (Q4_K)",
    );
    refuse(
        tensor(norm, &|t| t.1 = vec![1; 5]),
        "tensor `blk.0.attn_norm.weight`: 5 dimensions (byte 1661), expected 1 to 4",
    );
    refuse(
        tensor(norm, &|t| t.1 = vec![1 << 32, 1 << 32]),
        "tensor `blk.0.attn_norm.weight`: shape [4294967296, 4294967296], which no file can hold",
    );
    refuse(tensor(norm, &|t| t.1 = vec![0]), "tensor `blk.0.attn_norm.weight`: shape [0], which no file can hold");
    refuse(|f| f.tensors.push(f.tensors[0].clone()), "tensor `blk.0.attn_gate.weight`: it is there twice");
    refuse(
        |f| f.tensors.push(("blk.4.nextn.embed_tokens.weight".into(), (F32, vec![8], vec![0; 32]))),
        "checkpoint: tensor `blk.4.nextn.embed_tokens.weight` is not part of an MTP module as this model has it",
    );
    // the last tensor goes beyond the end
    let mut bytes = small().bytes();
    bytes.truncate(bytes.len() - 1);
    let (_dir, path) = written(&bytes);
    let error = load(&path, &Options::default()).expect_err("truncated").to_string();
    assert!(error.contains("expected them before the file's end"), "{error}");
}

#[test]
fn a_file_without_mtp_says_so() {
    let mut file = small();
    file.tensors.retain(|t| !t.0.starts_with("blk.4."));
    file.u32("qwen3next.block_count", 4);
    file.keys.retain(|k| k.0 != "qwen3next.nextn_predict_layers");
    let model = load_file(&file, &Options::default()).expect("it loads");
    assert!(!model.module.info.mtp && model.warnings.iter().any(|w| w.contains("there is no MTP module")));
}

#[test]
fn contents_that_are_no_numbers_are_refused() {
    let read = |file: &File, name: &str, columns: usize| {
        let (_dir, path) = written(&file.bytes());
        let model = load(&path, &Options::default()).expect("it loads");
        let source = model.source.as_ref().expect("there are weights");
        source.read_rows(name, 0, &mut vec![0.0; columns]).expect_err("it is refused").to_string()
    };
    let mut file = blocks("Q8_0", false);
    file.tensor("output.weight").2[..2].copy_from_slice(&0x7c00u16.to_le_bytes());
    let error = read(&file, "lm_head.weight", 256);
    assert_eq!(error, "tensor `output.weight`: a scale of row 0 is inf, expected a finite number");
    let mut file = small();
    file.tensor("blk.0.ssm_a").2[..4].copy_from_slice(&0.5f32.to_le_bytes());
    let error = read(&file, "model.layers.0.linear_attn.A_log", 4);
    assert_eq!(error, "tensor `blk.0.ssm_a`: it holds 0.5, expected negative numbers (`-exp(A_log)`)");
}

/// Absurd counts and lengths: each is said to be, with its place, and nothing is allocated for it.
#[test]
fn absurd_counts_are_refused() {
    let good = small().bytes();
    let check = |at: usize, bytes: &[u8], expected: &str| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        let (_dir, path) = written(&file);
        let error = load(&path, &Options::default()).expect_err(expected).to_string();
        assert!(error.starts_with(&format!("model.gguf: {expected}")), "{error}");
    };
    let most = u64::MAX.to_le_bytes();
    check(0, b"GGML", "it begins with \"GGML\", expected \"GGUF\"");
    check(4, &1u32.to_le_bytes(), "version 1, expected 2 or 3");
    check(8, &most, "byte 8: the number of tensors is 18446744073709551615, expected at most ");
    check(16, &most, "byte 16: the number of keys is 18446744073709551615, expected at most ");
    check(24, &most, "byte 24: the length of key 0 is 18446744073709551615, expected at most ");
    check(24, &100_000u64.to_le_bytes(), "byte 24: the length of key 0 is 100000, expected at most 65536");
    check(32, &[0xff], "byte 32: key 0 is no text: ");
    check(
        52,
        &13u32.to_le_bytes(),
        "byte 52: the value of `general.architecture` has type 13, expected one of 0 to 12",
    );
    for (id, name) in [(8u32, "texts"), (4, "numbers"), (9, "lists")] {
        let mut file = small();
        file.keys.insert(0, ("k".into(), list(id, usize::MAX, &[])));
        let (_dir, path) = written(&file.bytes());
        let error = load(&path, &Options::default()).expect_err(name).to_string();
        let expected = match id {
            9 => "byte 37: an element of the value of `k` has type 9",
            _ => "byte 41: the length of the value of `k` is 18446744073709551615, expected at most ",
        };
        assert!(error.starts_with(&format!("model.gguf: {expected}")), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever a few bytes of the header are: it is loaded, and then its weights can be read or not, or it is refused.
    #[test]
    fn a_file_with_other_bytes_is_read_or_refused(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let file = small();
        let mut bytes = file.bytes();
        let data: usize = file.tensors.iter().map(|t| t.1.2.len().next_multiple_of(32)).sum();
        let header = bytes.len() - data;
        for (at, byte) in &changes {
            bytes[at.index(header)] = *byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let (_dir, path) = written(&bytes);
        if let Ok(model) = load(&path, &Options::default()) {
            prop_assert_eq!(nextc_ir::verify::verify(&model.module), Ok(()));
            let source = model.source.as_ref().expect("there are weights");
            for (name, decl) in &model.module.weights {
                if let Ok(rows) = Rows::open(name, decl, source) {
                    let mut out = vec![0.0; rows.columns as usize];
                    let _ = rows.read(0, &mut out, &mut Buffers::default());
                }
            }
        }
    }

    /// Numbers of a header that are of their size, but absurd.
    #[test]
    fn a_file_with_other_words_is_read_or_refused(
        at in any::<prop::sample::Index>(),
        word in prop_oneof![Just(u64::MAX), Just(1 << 63), Just(1 << 40), Just(0), (0u32..64).prop_map(|n| 1 << n)],
        wide in any::<bool>(),
    ) {
        let mut bytes = small().bytes();
        let width = if wide { 8 } else { 4 };
        let at = at.index(8000);
        bytes[at..at + width].copy_from_slice(&word.to_le_bytes()[..width]);
        let (_dir, path) = written(&bytes);
        let _ = load(&path, &Options::default());
    }
}

#[test]
fn types_are_named_in_tests_as_in_files() {
    let known = nextc_frontend::gguf::blocks::TYPES;
    let id = |name: &str| known.iter().find(|t| t.name == name).map(|t| (t.id, t.block_elems, t.block_bytes));
    for (name, number, columns, bytes) in QUANTISED {
        assert_eq!(id(name), Some((number, columns as u64, bytes as u64)));
    }
    assert_eq!([id("F32"), id("BF16")], [Some((F32, 1, 4)), Some((BF16, 1, 2))]);
    for (i, t) in known.iter().enumerate() {
        assert!(known[..i].iter().all(|o| o.id != t.id && o.name != t.name), "{}", t.name);
    }
}
