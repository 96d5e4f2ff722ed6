//! Rotary position embedding: both spellings of its parameters, and the frequencies that they stand for.
//!
//! Source of the formulas: Peng, Quesnelle, Fan, Shippole, "YaRN", arXiv:2309.00071, in the form in which the published
//! models were run (`modeling_rope_utils`, transformers). Frequencies are rounded to f32 where the reference rounds.

use std::f64::consts::PI;
use std::str::FromStr;

use serde_json::{Map, Value};

use super::keys::{ROPE_KEYS, YARN_KEYS};
use super::reader::Reader;

/// Rotary embedding of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub rope_theta: f64,
    /// Dimensions of a head that rotate: `head_dim · partial_rotary_factor`, even.
    pub rotary_dim: u64,
    /// Extension beyond the trained context.
    pub yarn: Option<Yarn>,
}

/// The parameters of YaRN.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// How many times the original context.
    pub factor: f64,
    /// The context that the model was trained with, in tokens.
    pub original_max_position_embeddings: u64,
    /// What cos and sin are multiplied by.
    pub attention_factor: f64,
    /// Rotations over the original context from which on a frequency is kept.
    pub beta_fast: f64,
    /// Rotations up to which a frequency is divided by `factor`.
    pub beta_slow: f64,
    /// Whether the ramp's ends are rounded to whole dimensions.
    pub truncate: bool,
}

impl Rope {
    /// The frequencies: angle of dimension `j` at position `p` is `p · inv_freq[j]`; `rotary_dim / 2` of them.
    pub fn inv_freq(&self) -> Vec<f32> {
        let kept = (0..self.rotary_dim / 2).map(|j| {
            let exponent = (2 * j) as f32 / self.rotary_dim as f32;
            1.0 / (f64::from(self.rope_theta as f32).powf(f64::from(exponent)) as f32)
        });
        match &self.yarn {
            None => kept.collect(),
            Some(yarn) => yarn.scale(kept, self.rope_theta, self.rotary_dim),
        }
    }

    /// What cos and sin are multiplied by: 1 without YaRN.
    pub fn factor(&self) -> f64 {
        self.yarn.as_ref().map_or(1.0, |y| y.attention_factor)
    }
}

impl Yarn {
    /// Blends each frequency with itself divided by `factor`, along a ramp between the two betas.
    fn scale(&self, kept: impl Iterator<Item = f32>, rope_theta: f64, rotary_dim: u64) -> Vec<f32> {
        let rotary = rotary_dim as f64;
        let original = self.original_max_position_embeddings as f64;
        let dimension_of = |rotations: f64| rotary * (original / (rotations * 2.0 * PI)).ln() / (2.0 * rope_theta.ln());
        let (mut low, mut high) = (dimension_of(self.beta_fast), dimension_of(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(rotary - 1.0));
        if low == high {
            high += 0.001;
        }
        let (first, width, factor) = (low as f32, (high - low) as f32, self.factor as f32);
        kept.enumerate()
            .map(|(j, f)| {
                let keep = 1.0 - ((j as f32 - first) / width).clamp(0.0, 1.0);
                f / factor * (1.0 - keep) + f * keep
            })
            .collect()
    }
}

/// A scaling that is asked for in place of the configuration's: `yarn,KEY=VALUE,...` with the keys and values that `rope_scaling` has in
/// `config.json`, or `default` for none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RopeScaling {
    /// The keys of YaRN, checked; none for no scaling.
    yarn: Option<Map<String, Value>>,
}

impl RopeScaling {
    /// Replaces the scaling of `rope`. Without an original context of its own it takes that of the scaling which it replaces, or
    /// `max_position_embeddings`.
    pub(crate) fn apply(&self, rope: &mut Rope, max_position_embeddings: u64) {
        let original = rope.yarn.as_ref().map_or(max_position_embeddings, |y| y.original_max_position_embeddings);
        rope.yarn = self.yarn.as_ref().map(|keys| read_yarn(&mut Reader::new(keys, YARN_KEYS, ""), original));
    }
}

impl FromStr for RopeScaling {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const EXPECTED: &str =
            "expected `yarn,factor=X`, with further keys as in `rope_scaling` of config.json, or `default`";
        let mut parts = text.split(',');
        match parts.next().unwrap_or_default() {
            "default" if parts.next().is_none() => return Ok(Self { yarn: None }),
            "default" => return Err(format!("`default` takes no keys; {EXPECTED}")),
            "yarn" => {}
            other => return Err(format!("no rotary scaling is called `{other}`; {EXPECTED}")),
        }
        let mut keys = Map::new();
        for part in parts {
            let (key, value) = part.split_once('=').ok_or_else(|| format!("`{part}` is no KEY=VALUE; {EXPECTED}"))?;
            let value = serde_json::from_str(value).map_err(|_| format!("`{key}` is `{value}`, expected a number"))?;
            if keys.insert(key.to_owned(), value).is_some() {
                return Err(format!("`{key}` stands twice"));
            }
        }
        let mut reader = Reader::new(&keys, YARN_KEYS, "");
        if let Some((key, _)) = reader.unknown().next() {
            let known: Vec<&str> = YARN_KEYS.iter().map(|k| k.name).collect();
            return Err(format!("`{key}` is no key of YaRN, expected one of {}", known.join(", ")));
        }
        read_yarn(&mut reader, super::MAX_CONTEXT);
        let problems: Vec<String> = reader.problems.iter().map(ToString::to_string).collect();
        if problems.is_empty() { Ok(Self { yarn: Some(keys) }) } else { Err(problems.join("; ")) }
    }
}

/// Reads the rotary parameters of `config.json`; problems and warnings go to `top`.
pub(crate) fn read_rope(top: &mut Reader<'_>, head_dim: u64, max_position_embeddings: u64) -> Rope {
    let object = merged(top);
    let [mut keys, mut yarn_keys] = [ROPE_KEYS, YARN_KEYS].map(|table| Reader::new(&object, table, "rope_parameters."));
    for (key, value) in keys.unknown().filter(|(name, _)| yarn_keys.unknown().any(|(other, _)| other == *name)) {
        keys.reject(key, value, "no such key: its effect on the frequencies is not known");
    }
    let rope_theta = either(top, &mut keys, "rope_theta", 1.0, 1e12).unwrap_or(10_000.0);
    let partial = either(top, &mut keys, "partial_rotary_factor", 0.0, 1.0).unwrap_or(0.25);
    let rotary_dim = (head_dim as f64 * partial) as u64;
    if rotary_dim == 0 || rotary_dim % 2 == 1 {
        let expected = format!("a share of `head_dim` ({head_dim}) that is even and not 0");
        top.reject_as("partial_rotary_factor", format!("{partial}"), expected);
    }
    let yarn = match rope_type(&mut keys) {
        "yarn" => Some(read_yarn(&mut yarn_keys, max_position_embeddings)),
        _ => None,
    };
    for mut keys in [keys, yarn_keys] {
        top.problems.append(&mut keys.problems);
        top.warnings.append(&mut keys.warnings);
    }
    Rope { rope_theta, rotary_dim: rotary_dim.max(2), yarn }
}

/// `rope_scaling` and `rope_parameters` as one object; a key that both have must have one value.
fn merged(top: &mut Reader<'_>) -> Map<String, Value> {
    let mut object = Map::new();
    for spelling in ["rope_scaling", "rope_parameters"] {
        let Some(value) = top.nullable(spelling) else { continue };
        let Some(part) = value.as_object() else {
            top.reject(spelling, value, "an object or null");
            continue;
        };
        for (key, value) in part {
            match object.insert(key.clone(), value.clone()) {
                Some(other) if other != *value => {
                    top.reject(&format!("rope_parameters.{key}"), value, format!("{other} as in `rope_scaling`"));
                }
                _ => {}
            }
        }
    }
    object
}

/// A number that stands at the top (transformers 4) or among the rotary parameters (5), or in both places alike.
fn either(top: &mut Reader<'_>, keys: &mut Reader<'_>, key: &str, above: f64, most: f64) -> Option<f64> {
    let outer = top.number(key, above, most);
    let inner = keys.number(key, above, most);
    match (outer, inner) {
        (Some(a), Some(b)) if a != b => {
            keys.reject_as(key, b.to_string(), format!("{a} as at the top level"));
            Some(b)
        }
        _ => inner.or(outer),
    }
}

fn rope_type<'a>(keys: &mut Reader<'a>) -> &'a str {
    let (new, old) = (keys.str("rope_type"), keys.str("type"));
    if let (Some(a), Some(b)) = (new, old)
        && a != b
    {
        keys.reject_as("type", format!("{b:?}"), format!("{a:?} as in `rope_type`"));
    }
    let name = new.or(old).unwrap_or("default");
    if !["default", "yarn"].contains(&name) {
        let key = if new.is_some() { "rope_type" } else { "type" };
        keys.reject_as(key, format!("{name:?}"), "\"default\" or \"yarn\" (other rotary scalings are not supported)");
    }
    name
}

fn read_yarn(keys: &mut Reader<'_>, max_position_embeddings: u64) -> Yarn {
    // the reference takes 0 as "not given" for both betas
    let beta = |keys: &mut Reader<'_>, key: &str, default: f64| match keys.nullable(key).and_then(Value::as_f64) {
        Some(0.0) => default,
        _ => keys.number(key, 0.0, 1e6).unwrap_or(default),
    };
    let factor = match keys.nullable("factor") {
        None => {
            keys.reject_as("factor", "missing", "a number of at least 1 (YaRN needs it)");
            1.0
        }
        Some(value) => value.as_f64().filter(|f| (1.0..=1e6).contains(f)).unwrap_or_else(|| {
            keys.reject("factor", value, "a number from 1 to 1000000");
            1.0
        }),
    };
    let original = match keys.nullable("original_max_position_embeddings") {
        None => max_position_embeddings,
        Some(_) => keys.int("original_max_position_embeddings", max_position_embeddings, 1..=super::MAX_CONTEXT),
    };
    let (beta_fast, beta_slow) = (beta(keys, "beta_fast", 32.0), beta(keys, "beta_slow", 1.0));
    if beta_fast < beta_slow {
        keys.reject_as("beta_fast", beta_fast.to_string(), format!("at least `beta_slow` ({beta_slow})"));
    }
    let truncate = if keys.nullable("truncate").is_some() { keys.bool("truncate", true) } else { true };
    let attention_factor = attention_factor(keys, factor);
    Yarn { factor, original_max_position_embeddings: original, attention_factor, beta_fast, beta_slow, truncate }
}

/// What cos and sin are multiplied by: given, or from `mscale` and `mscale_all_dim`, or from `factor` alone.
fn attention_factor(keys: &mut Reader<'_>, factor: f64) -> f64 {
    let scale = |mscale: f64| if factor > 1.0 { 0.1 * mscale * factor.ln() + 1.0 } else { 1.0 };
    let (mscale, all_dim) = (keys.number("mscale", -1.0, 1e3), keys.number("mscale_all_dim", -1.0, 1e3));
    keys.number("attention_factor", 0.0, 1e3).unwrap_or(match (mscale, all_dim) {
        // the reference takes 0 as "not given"
        (Some(m), Some(all)) if m != 0.0 && all != 0.0 => scale(m) / scale(all),
        _ => scale(1.0),
    })
}
