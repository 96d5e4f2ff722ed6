//! GGUF files for tests, written as converters write them: names, re-layouts and numbers, and what each quantised type means.
//!
//! Nothing here comes from the crates under test; the sources are llama.cpp's `conversion/qwen.py`, `gguf-py` and
//! `ggml-quants.c`.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value as Json;

/// A tensor: its type's number, its shape, outermost dimension first, and its bytes.
pub type Tensor = (u32, Vec<u64>, Vec<u8>);

/// Published tensors, widened: shape and numbers.
pub type Published = BTreeMap<String, (Vec<u64>, Vec<f32>)>;

/// A file to be.
#[derive(Clone, Default)]
pub struct File {
    /// Keys with their values as they are written: type and bytes.
    pub keys: Vec<(String, Vec<u8>)>,
    /// Tensors by name.
    pub tensors: Vec<(String, Tensor)>,
}

/// Type numbers of tensors.
pub const F32: u32 = 0;
pub const F16: u32 = 1;
pub const BF16: u32 = 30;
/// Quantised types: number, columns and bytes of a block.
pub const QUANTISED: [(&str, u32, usize, usize); 4] =
    [("Q8_0", 8, 32, 34), ("Q4_0", 2, 32, 18), ("Q4_K", 12, 256, 144), ("Q6_K", 14, 256, 210)];

pub fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// A value with its type before it.
pub fn value(id: u32, bytes: &[u8]) -> Vec<u8> {
    [&id.to_le_bytes(), bytes].concat()
}

pub fn list(id: u32, count: usize, bytes: &[u8]) -> Vec<u8> {
    value(9, &[&id.to_le_bytes()[..], &(count as u64).to_le_bytes(), bytes].concat())
}

impl File {
    pub fn u32(&mut self, key: &str, n: u64) {
        self.set(key, value(4, &(n as u32).to_le_bytes()));
    }

    pub fn f32(&mut self, key: &str, x: f64) {
        self.set(key, value(6, &(x as f32).to_le_bytes()));
    }

    pub fn bool(&mut self, key: &str, x: bool) {
        self.set(key, value(7, &[x.into()]));
    }

    pub fn text(&mut self, key: &str, x: &str) {
        self.set(key, value(8, &text(x)));
    }

    pub fn texts(&mut self, key: &str, texts: &[String]) {
        let bytes: Vec<u8> = texts.iter().flat_map(|t| text(t)).collect();
        self.set(key, list(8, texts.len(), &bytes));
    }

    pub fn i32s(&mut self, key: &str, numbers: &[i32]) {
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        self.set(key, list(5, numbers.len(), &bytes));
    }

    /// Sets a key, in its place where it is there.
    pub fn set(&mut self, key: &str, value: Vec<u8>) {
        match self.keys.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = value,
            None => self.keys.push((key.to_owned(), value)),
        }
    }

    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        &mut self.tensors.iter_mut().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no tensor {name}")).1
    }

    /// The file's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            out.extend(text(key));
            out.extend(value);
        }
        let mut offset = 0;
        for (name, (id, shape, bytes)) in &self.tensors {
            out.extend(text(name));
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(id.to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offset = (offset + bytes.len()).next_multiple_of(32);
        }
        for (_, (_, _, bytes)) in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(bytes);
        }
        out
    }

    /// Writes the file in `parts` parts to `dir`, and gives the path of the first.
    pub fn write_parts(&self, dir: &Path, parts: usize) -> std::path::PathBuf {
        let path = |i: usize| dir.join(format!("model-{:05}-of-{parts:05}.gguf", i + 1));
        let each = self.tensors.len().div_ceil(parts);
        for (i, tensors) in self.tensors.chunks(each).enumerate() {
            let mut part = Self { keys: Vec::new(), tensors: tensors.to_vec() };
            if i == 0 {
                part.keys.clone_from(&self.keys);
            }
            part.set("split.no", value(2, &(i as u16).to_le_bytes()));
            part.set("split.count", value(2, &(parts as u16).to_le_bytes()));
            std::fs::write(path(i), part.bytes()).expect("written");
        }
        path(0)
    }
}

/// The tensors of a folder's safetensors files.
pub fn published(dir: &Path) -> Published {
    let mut tensors = BTreeMap::new();
    let mut files: Vec<_> = std::fs::read_dir(dir).expect("a folder").map(|e| e.expect("an entry").path()).collect();
    files.sort();
    let name = |p: &Path| p.file_name().expect("a name").to_string_lossy().into_owned();
    for file in files.iter().filter(|p| name(p).starts_with("model") && name(p).ends_with(".safetensors")) {
        let bytes = std::fs::read(file).expect("readable");
        let header_bytes = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
        let header: BTreeMap<String, Json> = serde_json::from_slice(&bytes[8..8 + header_bytes]).expect("JSON");
        for (name, entry) in header.into_iter().filter(|(n, _)| n != "__metadata__") {
            let numbers =
                |key: &str| -> Vec<u64> { serde_json::from_value(entry[key].clone()).expect("a list of numbers") };
            let at = numbers("data_offsets");
            let data = &bytes[8 + header_bytes..][at[0] as usize..at[1] as usize];
            assert_eq!(entry["dtype"], "BF16", "{name}");
            let wide = data.chunks_exact(2).map(|b| f32::from_bits(u32::from(b[0]) << 16 | u32::from(b[1]) << 24));
            tensors.insert(name, (numbers("shape"), wide.collect()));
        }
    }
    tensors
}

/// How matrices are stored.
pub type Matrix = dyn Fn(&str, &[f32]) -> (u32, Vec<u8>);

/// As float32.
pub fn as_f32(_: &str, x: &[f32]) -> (u32, Vec<u8>) {
    (F32, x.iter().flat_map(|x| x.to_le_bytes()).collect())
}

/// As bfloat16, of numbers that are that.
pub fn as_bf16(_: &str, x: &[f32]) -> (u32, Vec<u8>) {
    (BF16, x.iter().flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect())
}

/// A published model, its configuration and its tensors, as a GGUF file whose matrices `matrix` stores; `fused` as older
/// converters left them.
pub fn convert(config: &Json, published: &Published, matrix: &Matrix, fused: bool) -> File {
    let int = |key: &str| config[key].as_u64().unwrap_or_else(|| panic!("{key}"));
    let mtp = published.keys().any(|n| n.starts_with("mtp."));
    let layers = int("num_hidden_layers");
    let mut file = File::default();
    file.text("general.architecture", "qwen3next");
    file.text("general.name", "test");
    let arch = |key: &str| format!("qwen3next.{key}");
    file.u32(&arch("block_count"), layers + u64::from(mtp));
    if mtp {
        file.u32(&arch("nextn_predict_layers"), 1);
    }
    for (own, key) in [
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
        ("attention.value_length", "head_dim"),
        ("expert_count", "num_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
        ("ssm.conv_kernel", "linear_conv_kernel_dim"),
        ("ssm.state_size", "linear_key_head_dim"),
        ("ssm.group_count", "linear_num_key_heads"),
        ("ssm.time_step_rank", "linear_num_value_heads"),
    ] {
        file.u32(&arch(own), int(key));
    }
    file.u32(&arch("ssm.inner_size"), int("linear_num_value_heads") * int("linear_value_head_dim"));
    let rope = config.get("rope_parameters").filter(|r| r.is_object()).unwrap_or(config);
    let theta = rope["rope_theta"].as_f64().expect("a number");
    let partial = rope["partial_rotary_factor"].as_f64().expect("a number");
    file.f32(&arch("rope.freq_base"), theta);
    file.u32(&arch("rope.dimension_count"), (int("head_dim") as f64 * partial) as u64);
    if let Some(yarn) = config.get("rope_scaling").filter(|r| r["rope_type"] == "yarn") {
        file.text(&arch("rope.scaling.type"), "yarn");
        file.f32(&arch("rope.scaling.factor"), yarn["factor"].as_f64().expect("a number"));
        let original = yarn["original_max_position_embeddings"].as_u64().expect("a number");
        file.u32(&arch("rope.scaling.original_context_length"), original);
    }
    file.f32(&arch("attention.layer_norm_rms_epsilon"), config["rms_norm_eps"].as_f64().expect("a number"));
    file.u32(&arch("full_attention_interval"), 4);
    file.u32("tokenizer.ggml.bos_token_id", int("bos_token_id"));
    file.u32("tokenizer.ggml.eos_token_id", int("eos_token_id"));
    let sizes = Sizes {
        k_heads: int("linear_num_key_heads") as usize,
        k_dim: int("linear_key_head_dim") as usize,
        values: (int("linear_num_value_heads") / int("linear_num_key_heads") * int("linear_value_head_dim")) as usize,
    };
    let mut converter = Converter { matrix, fused, layers, sizes, out: BTreeMap::new(), experts: BTreeMap::new() };
    for (name, (shape, x)) in published {
        converter.add(name, shape, x);
    }
    file.tensors = converter.finish();
    file
}

struct Sizes {
    k_heads: usize,
    k_dim: usize,
    /// Rows of the value heads of a key head.
    values: usize,
}

type Experts = BTreeMap<u64, (Vec<u64>, Vec<f32>)>;

struct Converter<'a> {
    matrix: &'a Matrix,
    fused: bool,
    layers: u64,
    sizes: Sizes,
    out: BTreeMap<String, Tensor>,
    /// Experts of a stacked tensor, by number.
    experts: BTreeMap<String, Experts>,
}

impl Converter<'_> {
    fn add(&mut self, name: &str, shape: &[u64], x: &[f32]) {
        let (prefix, last) = match name.strip_prefix("model.layers.").and_then(|r| r.split_once('.')) {
            Some((i, last)) => (format!("blk.{i}."), last),
            None => match name.strip_prefix("mtp.") {
                Some(rest) => (format!("blk.{}.", self.layers), rest.strip_prefix("layers.0.").unwrap_or(rest)),
                None => (String::new(), name),
            },
        };
        let mtp = name.starts_with("mtp.") && !name.starts_with("mtp.layers.");
        if let Some(rest) = last.strip_prefix("mlp.experts.") {
            let (expert, projection) = rest.split_once('.').expect("a number");
            let projection = projection.strip_suffix("_proj.weight").expect("a projection");
            let stacked = format!("{prefix}ffn_{projection}_exps.weight");
            let expert = expert.parse().expect("a number");
            self.experts.entry(stacked).or_default().insert(expert, (shape.to_vec(), x.to_vec()));
            return;
        }
        let own = match last {
            "model.embed_tokens.weight" => "token_embd.weight",
            "lm_head.weight" => "output.weight",
            "model.norm.weight" => "output_norm.weight",
            "input_layernorm.weight" => "attn_norm.weight",
            "post_attention_layernorm.weight" => "post_attention_norm.weight",
            "self_attn.q_proj.weight" => "attn_q.weight",
            "self_attn.k_proj.weight" => "attn_k.weight",
            "self_attn.v_proj.weight" => "attn_v.weight",
            "self_attn.o_proj.weight" => "attn_output.weight",
            "self_attn.q_norm.weight" => "attn_q_norm.weight",
            "self_attn.k_norm.weight" => "attn_k_norm.weight",
            "linear_attn.in_proj_qkvz.weight" => "ssm_in.weight",
            "linear_attn.in_proj_ba.weight" => "ssm_ba.weight",
            "linear_attn.conv1d.weight" => "ssm_conv1d.weight",
            "linear_attn.A_log" => "ssm_a",
            "linear_attn.dt_bias" => "ssm_dt.bias",
            "linear_attn.norm.weight" => "ssm_norm.weight",
            "linear_attn.out_proj.weight" => "ssm_out.weight",
            "mlp.gate.weight" => "ffn_gate_inp.weight",
            "mlp.shared_expert_gate.weight" => "ffn_gate_inp_shexp.weight",
            "mlp.shared_expert.gate_proj.weight" => "ffn_gate_shexp.weight",
            "mlp.shared_expert.up_proj.weight" => "ffn_up_shexp.weight",
            "mlp.shared_expert.down_proj.weight" => "ffn_down_shexp.weight",
            "mlp.gate_proj.weight" => "ffn_gate.weight",
            "mlp.up_proj.weight" => "ffn_up.weight",
            "mlp.down_proj.weight" => "ffn_down.weight",
            "fc.weight" if mtp => "nextn.eh_proj.weight",
            "pre_fc_norm_embedding.weight" if mtp => "nextn.enorm.weight",
            "pre_fc_norm_hidden.weight" if mtp => "nextn.hnorm.weight",
            "norm.weight" if mtp => "nextn.shared_head_norm.weight",
            _ => panic!("{name}"),
        };
        let own = format!("{prefix}{own}");
        let float32 = |x: &[f32], of: &dyn Fn(f32) -> f32| x.iter().flat_map(|&x| of(x).to_le_bytes()).collect();
        match last {
            "linear_attn.in_proj_qkvz.weight" if !self.fused => {
                let [qkv, z] = self.split(x, shape[1] as usize);
                for (part, x) in [("attn_qkv.weight", qkv), ("attn_gate.weight", z)] {
                    let shape = vec![x.len() as u64 / shape[1], shape[1]];
                    self.put(format!("{prefix}{part}"), shape, &x);
                }
            }
            "linear_attn.A_log" => drop(self.out.insert(own, (F32, shape.to_vec(), float32(x, &|x| -x.exp())))),
            "linear_attn.dt_bias" | "linear_attn.norm.weight" => {
                self.out.insert(own, (F32, shape.to_vec(), float32(x, &|x| x)));
            }
            _ if last.ends_with("norm.weight") || last.contains("_norm_") => {
                self.out.insert(own, (F32, shape.to_vec(), float32(x, &|x| 1.0 + x)));
            }
            // dimensions of 1 are dropped
            "linear_attn.conv1d.weight" => {
                self.out.insert(own, (F32, vec![shape[0], shape[2]], float32(x, &|x| x)));
            }
            "mlp.shared_expert_gate.weight" => {
                self.out.insert(own, (F32, vec![shape[1]], float32(x, &|x| x)));
            }
            _ => self.put(own, shape.to_vec(), x),
        }
    }

    fn put(&mut self, name: String, shape: Vec<u64>, x: &[f32]) {
        let (id, bytes) = (self.matrix)(&name, x);
        self.out.insert(name, (id, shape, bytes));
    }

    /// All q, all k, all v; and z: out of groups of a key head.
    fn split(&self, x: &[f32], columns: usize) -> [Vec<f32>; 2] {
        let Sizes { k_heads, k_dim, values } = self.sizes;
        let group = 2 * k_dim + 2 * values;
        let part = |offset: usize, rows: usize| {
            (0..k_heads).flat_map(move |h| {
                let first = (h * group + offset) * columns;
                x[first..first + rows * columns].iter().copied()
            })
        };
        let qkv = part(0, k_dim).chain(part(k_dim, k_dim)).chain(part(2 * k_dim, values)).collect();
        [qkv, part(2 * k_dim + values, values).collect()]
    }

    fn finish(mut self) -> Vec<(String, Tensor)> {
        for (name, experts) in std::mem::take(&mut self.experts) {
            let shape = &experts[&0].0;
            let shape = vec![experts.len() as u64, shape[0], shape[1]];
            let x: Vec<f32> = experts.into_values().flat_map(|(_, x)| x).collect();
            self.put(name, shape, &x);
        }
        self.out.into_iter().collect()
    }
}

/// A small model whose rows are whole blocks of every type: its configuration, and tensors of numbers that look random.
pub fn wide_model() -> (Json, Published) {
    let config = serde_json::json!({
        "num_hidden_layers": 4, "max_position_embeddings": 512, "hidden_size": 256, "intermediate_size": 256,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_value_head_dim": 64,
        "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-6, "bos_token_id": 0, "eos_token_id": 1
    });
    let mut random = Random(1);
    let mut tensors = BTreeMap::new();
    let mut add = |name: String, shape: &[u64]| {
        let count = shape.iter().product::<u64>() as usize;
        // bfloat16, and for vectors small
        let size = if shape.len() < 2 { 0.2 } else { 0.1 };
        let number = || f32::from_bits((random.between(-size, size)).to_bits() & 0xffff_0000);
        tensors.insert(name, (shape.to_vec(), std::iter::repeat_with(number).take(count).collect::<Vec<f32>>()));
    };
    let ffn = |at: &str, add: &mut dyn FnMut(String, &[u64])| {
        add(format!("{at}input_layernorm.weight"), &[256]);
        add(format!("{at}post_attention_layernorm.weight"), &[256]);
        add(format!("{at}mlp.gate.weight"), &[4, 256]);
        add(format!("{at}mlp.shared_expert_gate.weight"), &[1, 256]);
        for part in ["gate", "up", "down"] {
            add(format!("{at}mlp.shared_expert.{part}_proj.weight"), &[256, 256]);
            (0..4).for_each(|e| add(format!("{at}mlp.experts.{e}.{part}_proj.weight"), &[256, 256]));
        }
    };
    let attention = |at: &str, add: &mut dyn FnMut(String, &[u64])| {
        for (part, rows) in [("q_proj", 512), ("k_proj", 128), ("v_proj", 128), ("o_proj", 256)] {
            add(format!("{at}self_attn.{part}.weight"), &[rows, 256]);
        }
        ["q", "k"].iter().for_each(|part| add(format!("{at}self_attn.{part}_norm.weight"), &[64]));
    };
    for i in 0..4 {
        let at = format!("model.layers.{i}.");
        ffn(&at, &mut add);
        if i == 3 {
            attention(&at, &mut add);
            continue;
        }
        add(format!("{at}linear_attn.in_proj_qkvz.weight"), &[640, 256]);
        add(format!("{at}linear_attn.in_proj_ba.weight"), &[8, 256]);
        add(format!("{at}linear_attn.conv1d.weight"), &[384, 1, 4]);
        add(format!("{at}linear_attn.A_log"), &[4]);
        add(format!("{at}linear_attn.dt_bias"), &[4]);
        add(format!("{at}linear_attn.norm.weight"), &[64]);
        add(format!("{at}linear_attn.out_proj.weight"), &[256, 256]);
    }
    ffn("mtp.layers.0.", &mut add);
    attention("mtp.layers.0.", &mut add);
    add("mtp.fc.weight".into(), &[256, 512]);
    for norm in ["pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"] {
        add(format!("mtp.{norm}.weight"), &[256]);
    }
    for (name, shape) in [("model.embed_tokens", &[512, 256][..]), ("lm_head", &[512, 256]), ("model.norm", &[256])] {
        add(format!("{name}.weight"), shape);
    }
    (config, tensors)
}

/// Numbers that look random, the same every time.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb) >> 16
    }

    pub fn between(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * (self.bits() & 0xff_ffff) as f32 / 16_777_216.0
    }
}

/// A half, of a number that a half has.
fn half(x: f32) -> [u8; 2] {
    let bits = x.to_bits();
    let exponent = (bits >> 23 & 0xff) as i32 - 112;
    assert!(x == 0.0 || (1..31).contains(&exponent), "{x} is no normal half");
    let sign = (bits >> 16 & 0x8000) as u16;
    let rest = if x == 0.0 { 0 } else { (exponent as u16) << 10 | (bits >> 13 & 0x3ff) as u16 };
    (sign | rest).to_le_bytes()
}

fn of_half(bytes: &[u8]) -> f32 {
    let h = u16::from_le_bytes([bytes[0], bytes[1]]);
    let magnitude = match h >> 10 & 31 {
        0 => f32::from(h & 0x3ff) / 16_777_216.0,
        e => f32::from_bits((u32::from(e) + 112) << 23 | u32::from(h & 0x3ff) << 13),
    };
    if h & 0x8000 == 0 { magnitude } else { -magnitude }
}

/// Random blocks of a quantised type for `count` numbers, of about the size of a weight.
pub fn random_blocks(name: &str, count: usize, random: &mut Random) -> (u32, Vec<u8>) {
    let (_, id, columns, block_bytes) = *QUANTISED.iter().find(|q| q.0 == name).expect("a type");
    let mut bytes = Vec::with_capacity(count / columns * block_bytes);
    for _ in 0..count / columns {
        let begin = bytes.len();
        bytes.extend((0..block_bytes).map(|_| random.bits() as u8));
        let block = &mut bytes[begin..];
        let mut put = |at: usize, x: f32| block[at..at + 2].copy_from_slice(&half(x));
        match name {
            "Q8_0" => put(0, random.between(0.0004, 0.001)),
            "Q4_0" => put(0, random.between(-0.015, -0.008)),
            "Q4_K" => {
                put(0, random.between(0.0003, 0.0005));
                put(2, random.between(0.002, 0.004));
            }
            _ => put(208, random.between(0.0001, 0.0002)),
        }
    }
    (id, bytes)
}

/// What blocks stand for, as `dequantize_row_*` computes it in float32.
pub fn dequantise(name: &str, bytes: &[u8]) -> Vec<f32> {
    let block_bytes = QUANTISED.iter().find(|q| q.0 == name).expect("a type").3;
    let mut out = Vec::new();
    for b in bytes.chunks_exact(block_bytes) {
        match name {
            "Q8_0" => out.extend(b[2..].iter().map(|&q| f32::from(q as i8) * of_half(b))),
            "Q4_0" => {
                let d = of_half(b);
                out.extend(b[2..].iter().map(|q| (i32::from(q & 15) - 8) as f32 * d));
                out.extend(b[2..].iter().map(|q| (i32::from(q >> 4) - 8) as f32 * d));
            }
            "Q4_K" => {
                let (d, min, s) = (of_half(b), of_half(&b[2..]), &b[4..16]);
                for j in 0..8 {
                    let (sc, m) = match j {
                        0..4 => (s[j] & 63, s[j + 4] & 63),
                        _ => (s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4),
                    };
                    let (d1, m1) = (d * f32::from(sc), min * f32::from(m));
                    let q = &b[16 + 32 * (j / 2)..][..32];
                    out.extend(q.iter().map(|q| d1 * f32::from(if j % 2 == 0 { q & 15 } else { q >> 4 }) - m1));
                }
            }
            _ => {
                let (d, begin) = (of_half(&b[208..]), out.len());
                out.resize(begin + 256, 0.0);
                let y = &mut out[begin..];
                for n in 0..2 {
                    let (ql, qh, sc) = (&b[64 * n..], &b[128 + 32 * n..], &b[192 + 8 * n..]);
                    for l in 0..32 {
                        let is = l / 16;
                        let q = [
                            ql[l] & 15 | (qh[l] & 3) << 4,
                            ql[l + 32] & 15 | (qh[l] >> 2 & 3) << 4,
                            ql[l] >> 4 | (qh[l] >> 4 & 3) << 4,
                            ql[l + 32] >> 4 | (qh[l] >> 6 & 3) << 4,
                        ];
                        for (i, q) in q.into_iter().enumerate() {
                            let scale = d * f32::from(sc[is + 2 * i] as i8);
                            y[128 * n + 32 * i + l] = scale * (i32::from(q) - 32) as f32;
                        }
                    }
                }
            }
        }
    }
    out
}
