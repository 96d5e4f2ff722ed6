//! Metadata to the keys of `config.json`, where they are checked and read: the table `KEYS` says which is which.
//!
//! Keys of the architecture that the table does not have go there as they are, and are named in a warning as unknown keys of a
//! `config.json` are.

use serde_json::{Map, Value as Json, json};

use super::header::Value;
use super::source::{BLOCKS, Gguf, MTP_BLOCKS};
use crate::error::{ConfigProblem, GgufProblem as Problem};

/// The architecture that is supported.
const ARCHITECTURE: &str = "qwen3next";
const ARCHITECTURE_KEY: &str = "general.architecture";
/// The experts' score functions, by their number.
const SCORES: &[(i128, &str)] = &[(1, "softmax"), (2, "sigmoid"), (3, "softmax over the chosen")];

/// Whether a key must be there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Need {
    Must,
    May,
}
use Need::{May, Must};

/// Keys here (without the architecture), the keys of `config.json` that they are, and whether they must be there.
const KEYS: &[(&str, &str, Need)] = &[
    ("context_length", "max_position_embeddings", Must),
    ("embedding_length", "hidden_size", Must),
    ("attention.head_count", "num_attention_heads", Must),
    ("attention.head_count_kv", "num_key_value_heads", Must),
    ("attention.key_length", "head_dim", Must),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps", Must),
    ("rope.freq_base", "rope_theta", Must),
    ("expert_count", "num_experts", Must),
    ("expert_used_count", "num_experts_per_tok", Must),
    ("expert_feed_forward_length", "moe_intermediate_size", Must),
    ("expert_shared_feed_forward_length", "shared_expert_intermediate_size", Must),
    ("ssm.conv_kernel", "linear_conv_kernel_dim", Must),
    ("ssm.state_size", "linear_key_head_dim", Must),
    ("ssm.group_count", "linear_num_key_heads", Must),
    ("ssm.time_step_rank", "linear_num_value_heads", Must),
    ("feed_forward_length", "intermediate_size", May),
    ("full_attention_interval", "full_attention_interval", May),
    ("nextn_predict_layers", "num_nextn_predict_layers", May),
    ("expert_weights_norm", "norm_topk_prob", May),
    ("expert_weights_scale", "routed_scaling_factor", May),
    ("expert_group_count", "n_group", May),
    ("expert_group_used_count", "topk_group", May),
    ("attention.scale", "attention_multiplier", May),
    ("attn_logit_softcapping", "attn_logit_softcapping", May),
    ("final_logit_softcapping", "final_logit_softcapping", May),
    ("logit_scale", "logit_scale", May),
    ("embedding_scale", "embedding_multiplier", May),
    ("residual_scale", "residual_multiplier", May),
];

/// Keys that are read below, or that have no effect on inference.
const OTHERS: &[&str] = &[
    "block_count",
    "vocab_size",
    "attention.value_length",
    "attention.recurrent_layers",
    "expert_gating_func",
    "expert_shared_count",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "ssm.inner_size",
];

/// The keys of `config.json` that the model's metadata stands for.
/// # Errors
/// The first key that is missing or cannot be such a key; whether values fit is checked where `config.json` is read.
pub fn object(model: &Gguf) -> Result<Map<String, Json>, Problem> {
    match model.metadata.get(ARCHITECTURE_KEY) {
        Some(Value::Text(name)) if name == ARCHITECTURE => {}
        found => {
            let found = found.map_or("missing".into(), ToString::to_string);
            return Err(wrong(
                ARCHITECTURE_KEY,
                found,
                format!("{ARCHITECTURE:?} (the architecture that is supported)"),
            ));
        }
    }
    let keys = Keys { model };
    let mut object = Map::new();
    object.insert("model_type".into(), "qwen3_next".into());
    for &(own, published, need) in KEYS {
        match keys.get(own) {
            Some(value) => drop(object.insert(published.into(), json_of(&full(own), value)?)),
            None if need == Must => return Err(wrong(&full(own), "missing".into(), "a number".into())),
            None => {}
        }
    }
    keys.sizes(&mut object)?;
    keys.layers(&mut object)?;
    keys.rope(&mut object)?;
    keys.tokens(&mut object)?;
    for (key, value) in &model.metadata {
        let own = key.strip_prefix(ARCHITECTURE).and_then(|rest| rest.strip_prefix('.'));
        let known = |own: &str| OTHERS.contains(&own) || KEYS.iter().any(|k| k.0 == own);
        if own.is_some_and(|own| !known(own)) {
            object.insert(key.clone(), value.to_string().into());
        }
    }
    Ok(object)
}

/// A problem of `config.json` with the key that the file has.
pub fn own_problem(problem: ConfigProblem) -> ConfigProblem {
    match problem {
        ConfigProblem::Value { key, found, expected } => ConfigProblem::Value { key: own_key(&key), found, expected },
        other => other,
    }
}

/// The key here that a key of `config.json` stands for.
fn own_key(key: &str) -> String {
    let special = [
        ("num_hidden_layers", "block_count"),
        ("linear_value_head_dim", "ssm.inner_size"),
        ("partial_rotary_factor", "rope.dimension_count"),
        ("rope_parameters.rope_theta", "rope.freq_base"),
        ("rope_parameters.rope_type", "rope.scaling.type"),
        ("rope_parameters.factor", "rope.scaling.factor"),
        ("rope_parameters.original_max_position_embeddings", "rope.scaling.original_context_length"),
        ("rope_parameters.beta_fast", "rope.scaling.yarn_beta_fast"),
        ("rope_parameters.beta_slow", "rope.scaling.yarn_beta_slow"),
        ("scoring_func", "expert_gating_func"),
    ];
    let listed = KEYS.iter().map(|k| (k.1, k.0)).chain(special).find(|k| k.0 == key);
    listed.map_or_else(|| key.to_owned(), |(_, own)| full(own))
}

fn full(own: &str) -> String {
    format!("{ARCHITECTURE}.{own}")
}

fn wrong(key: &str, found: String, expected: String) -> Problem {
    Problem::Key { key: key.to_owned(), found, expected }
}

/// A value as JSON; of a list that has a number for each layer, the number that they all have.
fn json_of(key: &str, value: &Value) -> Result<Json, Problem> {
    match value {
        Value::Int(n) => match (u64::try_from(*n), i64::try_from(*n)) {
            (Ok(n), _) => Ok(n.into()),
            (_, Ok(n)) => Ok(n.into()),
            _ => Err(wrong(key, n.to_string(), "a number of 64 bits".into())),
        },
        Value::Float(x) if x.is_finite() => Ok(json!(x)),
        Value::Bool(b) => Ok((*b).into()),
        Value::Text(text) => Ok(text.as_str().into()),
        Value::Numbers(numbers) => {
            // layers that have no such thing have 0
            let mut of_layers = numbers.iter().filter(|n| *n != Value::Int(0));
            match of_layers.next() {
                Some(first) if of_layers.all(|n| n == first) => json_of(key, &first),
                _ => Err(wrong(key, value.to_string(), "one number for all layers".into())),
            }
        }
        other => Err(wrong(key, other.to_string(), "a finite number".into())),
    }
}

struct Keys<'a> {
    model: &'a Gguf,
}

impl Keys<'_> {
    fn get(&self, own: &str) -> Option<&Value> {
        self.model.metadata.get(&full(own))
    }

    /// A positive integer, if it is there.
    fn int(&self, own: &str) -> Result<Option<u64>, Problem> {
        match self.get(own) {
            None => Ok(None),
            Some(Value::Int(n)) if (1..=1 << 40).contains(n) => Ok(u64::try_from(*n).ok()),
            Some(other) => Err(wrong(&full(own), other.to_string(), "a positive integer".into())),
        }
    }

    fn must(&self, own: &str) -> Result<u64, Problem> {
        self.int(own)?.ok_or_else(|| wrong(&full(own), "missing".into(), "a positive integer".into()))
    }

    /// The vocabulary, and the width of value heads.
    fn sizes(&self, object: &mut Map<String, Json>) -> Result<(), Problem> {
        let embedding = self.model.stored("model.embed_tokens.weight");
        let embedding = embedding.and_then(|t| t.shape.first()).ok_or_else(|| Problem::Tensor {
            tensor: self.model.own_name("model.embed_tokens.weight"),
            reason: "it is missing".into(),
        })?;
        object.insert("vocab_size".into(), (*embedding).into());
        object.insert("tie_word_embeddings".into(), self.model.stored("lm_head.weight").is_none().into());
        let (inner, heads) = (self.must("ssm.inner_size")?, self.must("ssm.time_step_rank")?);
        if !inner.is_multiple_of(heads) {
            let expected = format!("a multiple of `{}` ({heads})", full("ssm.time_step_rank"));
            return Err(wrong(&full("ssm.inner_size"), inner.to_string(), expected));
        }
        object.insert("linear_value_head_dim".into(), (inner / heads).into());
        let (keys, values) = (self.must("attention.key_length")?, self.int("attention.value_length")?);
        match values {
            Some(n) if n != keys => {
                let expected = format!("`{}` ({keys})", full("attention.key_length"));
                Err(wrong(&full("attention.value_length"), n.to_string(), expected))
            }
            _ => Ok(()),
        }
    }

    /// How many layers there are, and of which kinds.
    fn layers(&self, object: &mut Map<String, Json>) -> Result<(), Problem> {
        const MOST: u64 = 1 << 16;
        let layers = self.model.layers();
        if layers == 0 || layers > MOST {
            let found = self.must("block_count")?.to_string();
            let expected = format!("a number from 1 to {MOST} above that of MTP modules (`{MTP_BLOCKS}`)");
            return Err(wrong(BLOCKS, found, expected));
        }
        object.insert("num_hidden_layers".into(), layers.into());
        // the kinds of FFN stand in no key
        let dense = |i: &u64| {
            let has = |name: &str| self.model.stored(&format!("model.layers.{i}.mlp.{name}")).is_some();
            has("gate_proj.weight") && !has("gate.weight")
        };
        object.insert("mlp_only_layers".into(), (0..layers).filter(dense).collect());
        let key = "attention.recurrent_layers";
        match self.get(key) {
            None => {}
            Some(Value::Numbers(numbers)) => {
                let kind = |n: Value| match n {
                    Value::Bool(false) | Value::Int(0) => "full_attention",
                    _ => "linear_attention",
                };
                let kinds: Vec<&str> = numbers.iter().take(layers as usize).map(kind).collect();
                object.insert("layer_types".into(), kinds.into());
            }
            Some(other) => return Err(wrong(&full(key), other.to_string(), "a list of booleans".into())),
        }
        let scores = "expert_gating_func";
        if let Some(value) = self.get(scores) {
            let name = SCORES.iter().find(|s| Value::Int(s.0) == *value).map_or("another function", |s| s.1);
            object.insert("scoring_func".into(), name.into());
        }
        Ok(())
    }

    fn rope(&self, object: &mut Map<String, Json>) -> Result<(), Problem> {
        let head_dim = self.must("attention.key_length")?;
        let rotary = self.int("rope.dimension_count")?.unwrap_or(head_dim);
        if rotary > head_dim {
            let expected = format!("at most `{}` ({head_dim})", full("attention.key_length"));
            return Err(wrong(&full("rope.dimension_count"), rotary.to_string(), expected));
        }
        // the share from which the dimensions come again when they are rounded down
        let share = rotary as f64 / head_dim as f64;
        let share = if (head_dim as f64 * share) as u64 == rotary { share } else { share.next_up() };
        object.insert("partial_rotary_factor".into(), share.into());
        let scaling = match self.get("rope.scaling.type") {
            None => return Ok(()),
            Some(Value::Text(name)) if name == "none" => return Ok(()),
            Some(value) => json_of(&full("rope.scaling.type"), value)?,
        };
        let mut keys = Map::new();
        keys.insert("rope_type".into(), scaling);
        let published = [
            ("rope.scaling.factor", "factor"),
            ("rope.scaling.original_context_length", "original_max_position_embeddings"),
            ("rope.scaling.yarn_beta_fast", "beta_fast"),
            ("rope.scaling.yarn_beta_slow", "beta_slow"),
        ];
        for (own, published) in published {
            if let Some(value) = self.get(own) {
                keys.insert(published.into(), json_of(&full(own), value)?);
            }
        }
        object.insert("rope_parameters".into(), keys.into());
        Ok(())
    }

    /// The tokens at which answers end.
    fn tokens(&self, object: &mut Map<String, Json>) -> Result<(), Problem> {
        let id = |name: &str| {
            let key = format!("tokenizer.ggml.{name}_token_id");
            self.model.metadata.get(&key).map(|value| json_of(&key, value)).transpose()
        };
        if let Some(bos) = id("bos")? {
            object.insert("bos_token_id".into(), bos);
        }
        let mut ends: Vec<Json> = Vec::new();
        for end in [id("eos")?, id("eot")?, id("eom")?].into_iter().flatten() {
            if !ends.contains(&end) {
                ends.push(end);
            }
        }
        if !ends.is_empty() {
            object.insert("eos_token_id".into(), ends.into());
        }
        Ok(())
    }
}
