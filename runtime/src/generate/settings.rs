//! How to choose tokens: the command line, and where it does not say, the checkpoint's `generation_config.json`.

use serde_json::Value as Json;

use super::decode::Decoder;
use super::draft::Planner;
use super::{GenerateArgs, GenerateError};
use crate::sample::Sampling;
use crate::sample::settings::{LOGIT_BIAS, SETTINGS, Setting};

/// What the command line and the checkpoint say together.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// How to choose.
    pub sampling: Sampling,
    /// Tokens that end an answer by the checkpoint's word.
    pub eos: Vec<u32>,
}

impl Settings {
    /// The command line first, then the checkpoint; without either, greedy. `eos` are the model's own, used if the
    /// checkpoint's defaults have none.
    /// # Errors
    /// [`GenerateError`] if the file does not parse, or a setting is out of range.
    pub fn new(args: &GenerateArgs, config: Option<&[u8]>, eos: &[u32]) -> Result<Self, GenerateError> {
        let bad = |reason| GenerateError::Defaults { reason };
        let config = match config {
            Some(bytes) => serde_json::from_slice(bytes).map_err(|e| bad(e.to_string()))?,
            None => Json::Null,
        };
        let mut sampling = defaults(&config).map_err(bad)?;
        for (name, value) in args.numbers() {
            if let (Some(setting), Some(value)) = (Setting::find(name), value) {
                (setting.set)(&mut sampling, value);
            }
        }
        sampling.seed = args.seed.unwrap_or_else(random_seed);
        sampling.logit_bias.clone_from(&args.logit_bias);
        sampling.check()?;
        let own = eos_in(&config)?;
        Ok(Self { sampling, eos: if own.is_empty() { eos.to_vec() } else { own } })
    }

    /// Refuses tokens that the model does not have.
    /// # Errors
    /// [`GenerateError::Option`] naming the option.
    pub fn check(&self, args: &GenerateArgs, vocab_size: usize) -> Result<(), GenerateError> {
        let biased = self.sampling.logit_bias.iter().map(|&(id, _)| ("--logit-bias", id));
        let mut named = biased.chain(args.stop_token.iter().map(|&id| ("--stop-token", id)));
        match named.find(|&(_, id)| id as usize >= vocab_size) {
            Some((option, id)) => Err(GenerateError::Option { option, id, vocab_size }),
            None => Ok(()),
        }
    }

    /// What makes the steps that the arguments ask for.
    pub fn decoder(&self, args: &GenerateArgs, drafts: Planner) -> Decoder {
        let eos: &[u32] = if args.ignore_eos { &[] } else { &self.eos };
        Decoder {
            step_tokens: args.step_tokens(),
            ends: [eos, &args.stop_token].concat(),
            drafts,
            logprobs: args.logprobs.map(|n| n as usize),
            prompt_logprobs: args.prompt_logprobs.map(|n| n as usize),
        }
    }
}

/// The checkpoint's way to choose; its temperature counts only if it says to sample.
fn defaults(config: &Json) -> Result<Sampling, String> {
    let sampled = config.get("do_sample").and_then(Json::as_bool).unwrap_or(false);
    let mut sampling = Sampling { temperature: if sampled { 1.0 } else { 0.0 }, ..Sampling::default() };
    for setting in SETTINGS.iter().filter(|s| sampled || s.range.name != "temperature") {
        if let Some(value) = config.get(setting.range.name).filter(|value| !value.is_null()) {
            set(&mut sampling, setting, value)?;
        }
    }
    Ok(sampling)
}

/// Writes a number that stands in JSON.
/// # Errors
/// What is wrong with it.
pub(super) fn set(sampling: &mut Sampling, setting: &Setting, value: &Json) -> Result<(), String> {
    let name = setting.range.name;
    let number = value.as_f64().ok_or_else(|| format!("`{name}` is {value}, expected a number"))?;
    setting.check(number).map_err(|e| e.to_string())?;
    (setting.set)(sampling, number);
    Ok(())
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

/// Parses `ID=VALUE`.
pub(super) fn parse_bias(text: &str) -> Result<(u32, f64), String> {
    let (id, value) = text.split_once('=').ok_or("expected ID=VALUE, a token id and what is added to its logit")?;
    let id = id.trim().parse().map_err(|_| format!("`{id}` is no token id"))?;
    let value: Option<f64> = value.trim().parse().ok().filter(|&x| LOGIT_BIAS.check(x).is_ok());
    Ok((id, value.ok_or_else(|| format!("expected {} after `=`", LOGIT_BIAS.expected))?))
}
