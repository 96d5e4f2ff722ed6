//! Quantised weights beyond the fixtures: other tools' spellings of the same numbers, zero points, columns in an order of
//! their own, and weights that nextc rounds itself.

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use nextc_frontend::Quant;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use support::exe::{Exe, backends};
use support::golden::{Golden, check, fixture};
use support::interpreter::Interpreter;
use support::{Feed, Subject};

/// The tensors of a checkpoint.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn tensors(name: &str) -> Tensors {
    let bytes = std::fs::read(fixture(name).join("model.safetensors")).expect("the fixture is there");
    let file = SafeTensors::deserialize(&bytes).expect("the fixture is valid");
    file.tensors().into_iter().map(|(n, t)| (n, (t.dtype(), t.shape().to_vec(), t.data().to_vec()))).collect()
}

/// A directory with the configuration of a fixture, another `quantization_config` and other tensors.
fn checkpoint(name: &str, quantization: &Value, tensors: &Tensors) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let text = std::fs::read_to_string(fixture(name).join("config.json")).expect("the fixture is there");
    let mut config: Value = serde_json::from_str(&text).expect("JSON");
    config["quantization_config"] = quantization.clone();
    std::fs::write(dir.path().join("config.json"), config.to_string()).expect("written");
    let views = tensors
        .iter()
        .map(|(n, (dtype, shape, data))| (n.as_str(), TensorView::new(*dtype, shape.clone(), data).expect("a tensor")));
    safetensors::serialize_to_file(views, None, &dir.path().join("model.safetensors")).expect("written");
    let path = dir.path().to_owned();
    (dir, path)
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
}

fn bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// The prefixes of the tensors that end in `suffix`.
fn prefixes(tensors: &Tensors, suffix: &str) -> Vec<String> {
    tensors.keys().filter_map(|n| n.strip_suffix(suffix)).map(str::to_owned).collect()
}

/// The interpreter and every backend give the golden logits of a fixture for a checkpoint with the same numbers.
fn check_golden(dir: &Path, name: &str, what: &str) {
    let golden = Golden::read(&fixture(name).join("golden.safetensors"));
    let (want, width) = golden.floats("prefill_logits");
    let tokens = vec![golden.ints("input_ids").to_vec()];
    let interpreter = &Interpreter::plain(dir).logits(&tokens, Feed::Prefill, 0)[0];
    check(&format!("{what}: graph"), &interpreter.logits, want, width);
    for backend in backends() {
        let exe = &Exe::build(dir, backend, &[]).logits(&tokens, Feed::Prefill, 0)[0];
        check(&format!("{what}: {backend}"), &exe.logits, want, width);
    }
}

/// Every backend gives what the interpreter gives.
fn check_against_interpreter(dir: &Path, quant: Option<(&str, Quant)>, what: &str) {
    let tokens: Vec<i32> = (0..40).map(|i| (i * i * 7 + 13 * i) % 500).collect();
    let interpreter = Interpreter::quantised(dir, quant.map(|q| q.1));
    let want = &interpreter.logits(std::slice::from_ref(&tokens), Feed::Prefill, 1)[0];
    let vocab = want.logits.len() / tokens.len();
    for backend in backends() {
        let args = quant.map_or(vec![], |q| vec!["--quant", q.0]);
        let exe = Exe::build(dir, backend, &args);
        for feed in [Feed::Prefill, Feed::Decode] {
            let got = &exe.logits(std::slice::from_ref(&tokens), feed, 1)[0];
            check(&format!("{what}: {backend}, {feed:?}"), &got.logits, &want.logits, vocab);
            check(&format!("{what}: {backend}, {feed:?}, drafts"), &got.mtp, &want.mtp, vocab);
        }
    }
}

/// Groups under other numbers, with `g_idx` to say so: the same weights.
#[test]
fn gptq_with_groups_in_another_order() {
    let mut t = tensors("gptq-int4");
    for prefix in prefixes(&t, ".g_idx") {
        let groups = t[&format!("{prefix}.scales")].1[0];
        for part in ["scales", "qzeros"] {
            let (_, shape, data) = t.get_mut(&format!("{prefix}.{part}")).expect("there");
            let row = data.len() / shape[0];
            *data = data.chunks(row).rev().flatten().copied().collect();
        }
        let (_, _, data) = t.get_mut(&format!("{prefix}.g_idx")).expect("there");
        *data = bytes(&words(data).iter().map(|g| groups as u32 - 1 - g).collect::<Vec<_>>());
    }
    let config = json!({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": true, "sym": true});
    let (_keep, dir) = checkpoint("gptq-int4", &config, &t);
    check_golden(&dir, "gptq-int4", "reversed groups");
}

/// The same codes in AWQ's layout.
#[test]
fn awq_with_the_numbers_of_gptq() {
    const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
    let mut t = tensors("gptq-int4");
    let repack = |codes: &dyn Fn(usize, usize) -> u32, k: usize, n: usize| -> Vec<u32> {
        let word = |row: usize, w: usize| (0..8).map(|s| codes(row, 8 * w + ORDER[s]) << (4 * s)).sum();
        (0..k).flat_map(|row| (0..n / 8).map(move |w| (row, w))).map(|(row, w)| word(row, w)).collect()
    };
    for prefix in prefixes(&t, ".qweight") {
        t.remove(&format!("{prefix}.g_idx"));
        let (_, shape, data) = t.get_mut(&format!("{prefix}.qweight")).expect("there");
        let (k, n, packed) = (shape[0] * 8, shape[1], words(data));
        *data = bytes(&repack(&|row, c| packed[row / 8 * n + c] >> (row % 8 * 4) & 15, k, n));
        *shape = vec![k, n / 8];
        let (_, shape, data) = t.get_mut(&format!("{prefix}.qzeros")).expect("there");
        *data = bytes(&repack(&|_, _| 8, shape[0], n));
    }
    let config = json!({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": true, "version": "gemm"});
    let (_keep, dir) = checkpoint("gptq-int4", &config, &t);
    check_golden(&dir, "gptq-int4", "awq");
}

/// The same integers in eight bits.
#[test]
fn packed_with_eight_bits() {
    let mut t = tensors("int4");
    for prefix in prefixes(&t, ".weight_packed") {
        let (_, shape, data) = t.get_mut(&format!("{prefix}.weight_packed")).expect("there");
        let wide = |w: u32| {
            // 8 was added to the four-bit codes, 128 to the eight-bit ones
            let code = |i: u32| ((w >> (4 * i) & 15) + 120) << (8 * (i % 4));
            [(0..4).map(code).sum::<u32>(), (4..8).map(code).sum()]
        };
        *data = bytes(&words(data).iter().flat_map(|&w| wide(w)).collect::<Vec<_>>());
        shape[1] *= 2;
    }
    let config = json!({"quant_method": "compressed-tensors", "config_groups": {}, "format": "pack-quantized"});
    let (_keep, dir) = checkpoint("int4", &config, &t);
    check_golden(&dir, "int4", "eight bits");
}

/// Zero points that differ from group to group, and columns dealt out to the groups in turn.
#[test]
fn gptq_with_zero_points_and_an_order() {
    let mut t = tensors("gptq-int4");
    for prefix in prefixes(&t, ".g_idx") {
        let groups = t[&format!("{prefix}.scales")].1[0] as u32;
        let (_, _, data) = t.get_mut(&format!("{prefix}.g_idx")).expect("there");
        *data = bytes(&(0..data.len() as u32 / 4).map(|c| c % groups).collect::<Vec<_>>());
        let (_, _, data) = t.get_mut(&format!("{prefix}.qzeros")).expect("there");
        *data = bytes(&(0..data.len() as u32 / 4).map(|i| 0x9876_5a87u32.rotate_left(4 * i)).collect::<Vec<_>>());
    }
    for version in ["gptq", "gptq_v2"] {
        let config = json!({
            "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": true, "sym": false, "checkpoint_format": version
        });
        let (_keep, dir) = checkpoint("gptq-int4", &config, &t);
        check_against_interpreter(&dir, None, version);
    }
}

#[test]
fn packed_with_zero_points() {
    let mut t = tensors("int4");
    for prefix in prefixes(&t, ".weight_packed") {
        let (rows, groups) = (t[&format!("{prefix}.weight_scale")].1[0], t[&format!("{prefix}.weight_scale")].1[1]);
        let zeros: Vec<u32> = (0..(rows / 8 * groups) as u32).map(|i| 0x7968_8a79u32.rotate_left(4 * i)).collect();
        t.insert(format!("{prefix}.weight_zero_point"), (Dtype::I32, vec![rows / 8, groups], bytes(&zeros)));
    }
    let config = json!({"quant_method": "compressed-tensors", "config_groups": {}, "format": "pack-quantized"});
    let (_keep, dir) = checkpoint("int4", &config, &t);
    check_against_interpreter(&dir, None, "zero points");
}

/// What `--quant` makes of checkpoints whose sizes divide nothing, and of one that is quantised already.
#[test]
fn rounded_weights_are_those_of_the_interpreter() {
    for (name, quant) in [("bf16", Quant::Bf16), ("fp8", Quant::Fp8), ("q8", Quant::Q8), ("q4", Quant::Q4)] {
        check_against_interpreter(&fixture("odd"), Some((name, quant)), &format!("odd as {name}"));
    }
    check_against_interpreter(&fixture("dense-mix"), Some(("q4", Quant::Q4)), "dense-mix as q4");
    check_against_interpreter(&fixture("int4"), Some(("fp8", Quant::Fp8)), "int4 as fp8");
}
