//! `config.json` to [`ModelConfig`]: each key read, checked, or named in a warning or an error.
//!
//! Both spellings are read, that of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`, `full_attention_interval`)
//! and that of transformers 5 (`rope_parameters`, `dtype`, `layer_types`). What the model is made of is decided here once:
//! the kind of each layer's mixer and FFN, the rotary frequencies, the format of weights that are not there yet.

pub mod keys;
mod quantization;
mod reader;
mod rope;

use nextc_ir::Format;
use serde_json::{Map, Value};

pub use self::quantization::{Grouped, Quantization};
pub use self::rope::{Rope, RopeScaling, Yarn};

use self::keys::CONFIG_KEYS;
use self::reader::Reader;
use crate::error::Error;
use crate::json::{parse_object, shown};

/// The architecture that is supported.
pub const ARCHITECTURE: &str = "Qwen3NextForCausalLM";
/// The largest context, in tokens: positions are 32-bit integers.
pub const MAX_CONTEXT: u64 = 1 << 30;

/// Limits of good sense: a file beyond them is damaged or hostile, not a model.
mod limit {
    /// Those that tokens can be sampled from.
    pub const VOCAB: u64 = nextc_ir::ops::sample::MAX_VOCAB;
    pub const LAYERS: u64 = 512;
    pub const WIDTH: u64 = 1 << 20;
    pub const HEADS: u64 = 1024;
    pub const HEAD_DIM: u64 = 4096;
    pub const EXPERTS: u64 = 8192;
    pub const TAPS: u64 = 16;
    /// Experts of all layers together, and value heads of all layers together.
    pub const PARTS: u64 = 1 << 18;
    /// Parameters of the whole model.
    pub const PARAMETERS: u128 = 1 << 44;
}

/// The token mixer of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mixer {
    /// Gated DeltaNet.
    LinearAttention,
    /// Gated softmax attention.
    FullAttention,
}

/// The FFN of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ffn {
    /// Routed experts and a shared one.
    Moe,
    /// A dense SwiGLU of width `intermediate_size`.
    Dense,
}

/// A layer of the trunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerKind {
    /// Its token mixer.
    pub mixer: Mixer,
    /// Its FFN.
    pub ffn: Ffn,
}

/// What `config.json` says, checked: sizes are positive and within limits, divide what they must divide, and agree.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the fields are named as the keys of config.json, or as the house names them")]
pub struct ModelConfig {
    pub vocab_size: u64,
    pub hidden_size: u64,
    /// One entry a layer.
    pub layers: Vec<LayerKind>,
    pub num_heads: u64,
    pub num_kv_heads: u64,
    pub head_dim: u64,
    pub num_k_heads: u64,
    pub num_v_heads: u64,
    pub head_k_dim: u64,
    pub head_v_dim: u64,
    pub conv_taps: u64,
    pub num_experts: u64,
    pub num_experts_per_tok: u64,
    pub moe_intermediate_size: u64,
    pub shared_expert_intermediate_size: u64,
    pub norm_topk_prob: bool,
    pub intermediate_size: u64,
    pub rms_norm_eps: f64,
    pub tie_word_embeddings: bool,
    pub rope: Rope,
    pub max_position_embeddings: u64,
    pub eos_token_ids: Vec<u32>,
    /// MTP blocks that the file promises; the tensors decide where there are any.
    pub mtp_layers: Option<u64>,
    /// What the MTP block's FFN is unless the tensors say otherwise: the rule of the layers, at index 0.
    pub mtp_ffn: Ffn,
    /// `dtype` or `torch_dtype`: the format of weights where there is no checkpoint.
    pub format: Format,
    /// `quantization_config`: how the quantised tensors are to be read.
    pub quantization: Option<Quantization>,
}

impl ModelConfig {
    /// The same model with another rotary scaling.
    #[must_use]
    pub fn with_rope_scaling(mut self, scaling: &RopeScaling) -> Self {
        scaling.apply(&mut self.rope, self.max_position_embeddings);
        self
    }

    /// The longest context: `max_position_embeddings`, or what YaRN extends the original context to.
    pub fn max_context(&self) -> u64 {
        let extended = |y: &Yarn| (y.original_max_position_embeddings as f64 * y.factor) as u64;
        let extended = self.rope.yarn.as_ref().map_or(0, extended);
        self.max_position_embeddings.max(extended).min(MAX_CONTEXT)
    }
}

/// Reads a `config.json`; `file` names it in errors. Gives the configuration and what the user should know of it.
/// # Errors
/// [`Error::Text`] if it is not a JSON object, [`Error::Config`] with all that is wrong with it.
pub fn parse(file: &str, bytes: &[u8]) -> Result<(ModelConfig, Vec<String>), Error> {
    read(file, &parse_object(file, bytes)?)
}

/// Reads the object of a `config.json`.
/// # Errors
/// [`Error::Config`] with all that is wrong with it.
pub fn read(file: &str, object: &Map<String, Value>) -> Result<(ModelConfig, Vec<String>), Error> {
    let mut keys = Reader::new(object, CONFIG_KEYS, "");
    check_architecture(&mut keys);
    // the keys of another architecture would only add noise
    if !keys.problems.is_empty() {
        return Err(Error::Config { file: file.into(), problems: keys.problems });
    }
    let config = read_all(&mut keys);
    if keys.problems.is_empty() {
        check_sizes(&mut keys, &config);
    }
    keys.check_fixed();
    let mut config = config;
    match keys.nullable("quantization_config").map(quantization::read).transpose() {
        Ok(quantization) => config.quantization = quantization,
        Err(problems) => keys.problems.extend(problems),
    }
    if !keys.problems.is_empty() {
        return Err(Error::Config { file: file.into(), problems: keys.problems });
    }
    let mut warnings: Vec<String> = keys.warnings.iter().map(|w| format!("{file}: {w}")).collect();
    warnings.extend(keys.unknown().map(|(key, _)| format!("{file}: `{key}` is not a known key and has no effect")));
    Ok((config, warnings))
}

fn check_architecture(keys: &mut Reader<'_>) {
    const TYPE: &str = "qwen3_next";
    let expected = format!("{TYPE:?} (the model type that is supported)");
    match keys.raw("model_type") {
        None => keys.reject_as("model_type", "missing", expected),
        Some(value) if value.as_str() == Some(TYPE) => {}
        Some(value) => keys.reject("model_type", value, expected),
    }
    if let Some(value) = keys.nullable("architectures") {
        let names: Vec<&str> = value.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        if names != [ARCHITECTURE] {
            keys.reject("architectures", value, format!("[{ARCHITECTURE:?}] (the architecture that is supported)"));
        }
    }
}

fn read_all(keys: &mut Reader<'_>) -> ModelConfig {
    let head_dim = keys.int("head_dim", 256, 2..=limit::HEAD_DIM);
    let max_position_embeddings = keys.int("max_position_embeddings", 32768, 1..=MAX_CONTEXT);
    let vocab_size = keys.int("vocab_size", 151_936, 1..=limit::VOCAB);
    let num_experts = keys.int("num_experts", 512, 0..=limit::EXPERTS);
    let (layers, mtp_ffn) = read_layers(keys, num_experts);
    ModelConfig {
        vocab_size,
        hidden_size: keys.int("hidden_size", 2048, 1..=limit::WIDTH),
        layers,
        num_heads: keys.int("num_attention_heads", 16, 1..=limit::HEADS),
        num_kv_heads: keys.int("num_key_value_heads", 2, 1..=limit::HEADS),
        head_dim,
        num_k_heads: keys.int("linear_num_key_heads", 16, 1..=limit::HEADS),
        num_v_heads: keys.int("linear_num_value_heads", 32, 1..=limit::HEADS),
        head_k_dim: keys.int("linear_key_head_dim", 128, 1..=limit::HEAD_DIM),
        head_v_dim: keys.int("linear_value_head_dim", 128, 1..=limit::HEAD_DIM),
        conv_taps: keys.int("linear_conv_kernel_dim", 4, 2..=limit::TAPS),
        num_experts,
        num_experts_per_tok: keys.int("num_experts_per_tok", 10, 1..=limit::EXPERTS),
        moe_intermediate_size: keys.int("moe_intermediate_size", 512, 1..=limit::WIDTH),
        shared_expert_intermediate_size: keys.int("shared_expert_intermediate_size", 512, 1..=limit::WIDTH),
        norm_topk_prob: keys.bool("norm_topk_prob", true),
        intermediate_size: keys.int("intermediate_size", 5632, 1..=limit::WIDTH),
        rms_norm_eps: if keys.raw("rms_norm_eps").is_some_and(Value::is_null) {
            keys.reject_as("rms_norm_eps", "null", "a number above 0 and at most 1");
            1e-6
        } else {
            keys.number("rms_norm_eps", 0.0, 1.0).unwrap_or(1e-6)
        },
        tie_word_embeddings: keys.bool("tie_word_embeddings", false),
        rope: rope::read_rope(keys, head_dim, max_position_embeddings),
        max_position_embeddings,
        eos_token_ids: read_eos(keys, vocab_size),
        mtp_layers: read_mtp_layers(keys),
        mtp_ffn,
        format: read_format(keys),
        quantization: None,
    }
}

/// The layers' kinds, and the FFN that the same rule gives index 0.
fn read_layers(keys: &mut Reader<'_>, num_experts: u64) -> (Vec<LayerKind>, Ffn) {
    let num_layers = keys.int("num_hidden_layers", 48, 1..=limit::LAYERS);
    let mixers = read_mixers(keys, num_layers);
    let step = keys.int("decoder_sparse_step", 1, 1..=u64::from(u32::MAX));
    let dense_layers = read_mlp_only_layers(keys, num_layers);
    let ffn = |i: u64| {
        let moe = num_experts > 0 && !dense_layers.contains(&i) && (i + 1).is_multiple_of(step);
        if moe { Ffn::Moe } else { Ffn::Dense }
    };
    let layers = mixers.into_iter().zip(0..).map(|(mixer, i)| LayerKind { mixer, ffn: ffn(i) }).collect();
    (layers, ffn(0))
}

fn read_mixers(keys: &mut Reader<'_>, num_layers: u64) -> Vec<Mixer> {
    let interval = keys.nullable("full_attention_interval").is_some();
    let interval = interval.then(|| keys.int("full_attention_interval", 4, 1..=u64::from(u32::MAX)));
    let by_interval = |n: u64| -> Vec<Mixer> {
        let mixer = |i: u64| if (i + 1).is_multiple_of(n) { Mixer::FullAttention } else { Mixer::LinearAttention };
        (0..num_layers).map(mixer).collect()
    };
    let Some(value) = keys.nullable("layer_types") else { return by_interval(interval.unwrap_or(4)) };
    let mixer = |v: &Value| match v.as_str() {
        Some("linear_attention") => Some(Mixer::LinearAttention),
        Some("full_attention") => Some(Mixer::FullAttention),
        _ => None,
    };
    let Some(names) = value.as_array() else {
        keys.reject("layer_types", value, "a list of layer types");
        return by_interval(4);
    };
    if let Some((i, unknown)) = names.iter().enumerate().find(|(_, v)| mixer(v).is_none()) {
        keys.reject(&format!("layer_types[{i}]"), unknown, "\"linear_attention\" or \"full_attention\"");
    }
    if names.len() as u64 != num_layers {
        let found = format!("a list of {}", names.len());
        keys.reject_as("layer_types", found, format!("`num_hidden_layers` ({num_layers}) entries"));
    }
    let mixers: Vec<Mixer> = names.iter().filter_map(mixer).collect();
    if let Some(n) = interval
        && mixers.len() as u64 == num_layers
        && let Some(i) = by_interval(n).iter().zip(&mixers).position(|(a, b)| a != b)
    {
        let expected = format!("what `full_attention_interval` ({n}) gives; remove one of the two keys");
        keys.reject(&format!("layer_types[{i}]"), &names[i], expected);
    }
    mixers
}

fn read_mlp_only_layers(keys: &mut Reader<'_>, num_layers: u64) -> Vec<u64> {
    let Some(value) = keys.nullable("mlp_only_layers") else { return Vec::new() };
    let items = value.as_array().map(|a| a.iter().map(|v| v.as_u64().filter(|i| *i < num_layers)).collect());
    let indices: Option<Vec<u64>> = items.flatten();
    indices.unwrap_or_else(|| {
        keys.reject(
            "mlp_only_layers",
            value,
            format!("a list of layer indices below `num_hidden_layers` ({num_layers})"),
        );
        Vec::new()
    })
}

fn read_eos(keys: &mut Reader<'_>, vocab_size: u64) -> Vec<u32> {
    if let Some(value) = keys.nullable("bos_token_id")
        && value.as_u64().is_none()
    {
        keys.reject("bos_token_id", value, "a token id or null");
    }
    let Some(value) = keys.nullable("eos_token_id") else { return Vec::new() };
    match token_ids(value, vocab_size) {
        Some((ids, warning)) => {
            keys.warnings.extend(warning);
            ids
        }
        None => {
            keys.reject("eos_token_id", value, "a token id or a list of them");
            Vec::new()
        }
    }
}

/// The stop tokens of an `eos_token_id`: one id or a list. Ids beyond the vocabulary cannot occur; they are left out with a warning.
pub(crate) fn token_ids(value: &Value, vocab_size: u64) -> Option<(Vec<u32>, Option<String>)> {
    let ids: Vec<u64> = match value {
        Value::Array(items) => items.iter().map(Value::as_u64).collect::<Option<_>>()?,
        other => vec![other.as_u64()?],
    };
    let fits = |id: &u64| *id < vocab_size;
    let warning = (!ids.iter().all(fits))
        .then(|| format!("`eos_token_id` is {}, which goes beyond `vocab_size` ({vocab_size})", shown(value)));
    let mut kept: Vec<u32> = ids.into_iter().filter(fits).filter_map(|id| u32::try_from(id).ok()).collect();
    let mut seen = std::collections::HashSet::new();
    kept.retain(|id| seen.insert(*id));
    Some((kept, warning))
}

fn read_mtp_layers(keys: &mut Reader<'_>) -> Option<u64> {
    let counts = ["num_nextn_predict_layers", "mtp_num_hidden_layers"].map(|key| {
        let given = keys.nullable(key).is_some();
        // one block, used again for each draft, is what the model type has
        given.then(|| keys.int(key, 0, 0..=1))
    });
    if let [Some(a), Some(b)] = counts
        && a != b
    {
        keys.reject_as("mtp_num_hidden_layers", b.to_string(), format!("{a} as `num_nextn_predict_layers`"));
    }
    counts[0].or(counts[1])
}

fn read_format(keys: &mut Reader<'_>) -> Format {
    let mut format = |key: &str| {
        let name = keys.str(key)?;
        let found = match name.strip_prefix("torch.").unwrap_or(name) {
            "bfloat16" => Some(Format::Bf16),
            "float16" => Some(Format::F16),
            "float32" => Some(Format::F32),
            _ => None,
        };
        if found.is_none() {
            keys.reject_as(key, format!("{name:?}"), "\"bfloat16\", \"float16\" or \"float32\"");
        }
        found
    };
    let (new, old) = (format("dtype"), format("torch_dtype"));
    if let (Some(a), Some(b)) = (new, old)
        && a != b
    {
        keys.reject_as("torch_dtype", b.to_string(), format!("{a} as in `dtype`"));
    }
    new.or(old).unwrap_or(Format::Bf16)
}

/// Checks what several keys say together; each of them has passed its own check.
fn check_sizes(keys: &mut Reader<'_>, c: &ModelConfig) {
    let mut divides = |key: &str, n: u64, of: &str, whole: u64| {
        if !whole.is_multiple_of(n) {
            keys.reject_as(key, n.to_string(), format!("a divisor of `{of}` ({whole})"));
        }
    };
    divides("num_key_value_heads", c.num_kv_heads, "num_attention_heads", c.num_heads);
    divides("linear_num_key_heads", c.num_k_heads, "linear_num_value_heads", c.num_v_heads);
    if c.num_experts > 0 && c.num_experts_per_tok > c.num_experts {
        let found = c.num_experts_per_tok.to_string();
        keys.reject_as("num_experts_per_tok", found, format!("at most `num_experts` ({})", c.num_experts));
    }
    let layers = c.layers.len() as u64;
    for (key, n) in [("num_experts", c.num_experts), ("linear_num_value_heads", c.num_v_heads)] {
        if n * layers > limit::PARTS {
            let most = limit::PARTS;
            keys.reject_as(key, n.to_string(), format!("at most {most} over all {layers} layers together"));
        }
    }
    let parameters = count_parameters(c);
    if parameters > limit::PARAMETERS {
        let expected = format!("sizes that give at most {} parameters, these give {parameters}", limit::PARAMETERS);
        keys.reject_as("hidden_size", c.hidden_size.to_string(), expected);
    }
}

/// Parameters of the trunk, up to the small ones of norms and gates.
fn count_parameters(c: &ModelConfig) -> u128 {
    let wide = u128::from;
    let hidden = wide(c.hidden_size);
    let attention = hidden * wide(c.head_dim) * (3 * wide(c.num_heads) + 2 * wide(c.num_kv_heads));
    let (k, v) = (wide(c.num_k_heads * c.head_k_dim), wide(c.num_v_heads * c.head_v_dim));
    let delta = hidden * (2 * k + 3 * v + 2 * wide(c.num_v_heads)) + (2 * k + v) * wide(c.conv_taps);
    let experts = wide(c.num_experts) * wide(c.moe_intermediate_size) + wide(c.shared_expert_intermediate_size);
    let moe = hidden * (3 * experts + wide(c.num_experts) + 1);
    let dense = 3 * hidden * wide(c.intermediate_size);
    let layer = |l: &LayerKind| {
        let mixer = if l.mixer == Mixer::FullAttention { attention } else { delta };
        mixer + if l.ffn == Ffn::Moe { moe } else { dense }
    };
    2 * wide(c.vocab_size) * hidden + c.layers.iter().map(layer).sum::<u128>()
}
