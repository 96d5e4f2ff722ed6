//! How to choose tokens when the command line does not say: the checkpoint's `generation_config.json`.

use serde_json::Value as Json;

use super::{GenerateArgs, GenerateError};
use crate::sample::Sampling;

/// What the command line and the checkpoint say together.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// How to choose.
    pub sampling: Sampling,
    /// Tokens that end an answer.
    pub eos: Vec<u32>,
}

impl Settings {
    /// The command line first, then the checkpoint; without either, greedy. `eos` are the model's own, used if the
    /// checkpoint's defaults have none.
    /// # Errors
    /// [`GenerateError`] if the file does not parse, or a setting is out of range.
    pub fn new(args: &GenerateArgs, config: Option<&[u8]>, eos: &[u32]) -> Result<Self, GenerateError> {
        let config = match config {
            Some(bytes) => {
                serde_json::from_slice(bytes).map_err(|e| GenerateError::Defaults { reason: e.to_string() })?
            }
            None => Json::Null,
        };
        let sampled = config.get("do_sample").and_then(Json::as_bool).unwrap_or(false);
        let number = |key: &str| number(&config, key);
        let temperature = if sampled { number("temperature")?.unwrap_or(1.0) } else { 0.0 };
        let sampling = Sampling {
            temperature: args.temperature.unwrap_or(temperature as f32),
            top_k: args.top_k.unwrap_or(number("top_k")?.unwrap_or(0.0) as usize),
            top_p: args.top_p.unwrap_or(number("top_p")?.unwrap_or(1.0) as f32),
            seed: args.seed.unwrap_or_else(random_seed),
        };
        sampling.check()?;
        let own = eos_in(&config)?;
        Ok(Self { sampling, eos: if own.is_empty() { eos.to_vec() } else { own } })
    }
}

fn number(config: &Json, key: &str) -> Result<Option<f64>, GenerateError> {
    match config.get(key) {
        None | Some(Json::Null) => Ok(None),
        Some(value) => value
            .as_f64()
            .map(Some)
            .ok_or_else(|| GenerateError::Defaults { reason: format!("`{key}` is {value}, expected a number") }),
    }
}

/// `eos_token_id`: an id, or a list of them.
fn eos_in(config: &Json) -> Result<Vec<u32>, GenerateError> {
    let id = |value: &Json| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| GenerateError::Defaults { reason: format!("`eos_token_id` has {value}, expected token ids") })
    };
    match config.get("eos_token_id") {
        None | Some(Json::Null) => Ok(Vec::new()),
        Some(Json::Array(ids)) => ids.iter().map(id).collect(),
        Some(value) => Ok(vec![id(value)?]),
    }
}

/// Another one for each run of the program; small, so that it can be typed in again.
fn random_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish() >> 32
}
