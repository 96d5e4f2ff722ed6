//! The files beside the weights that the executable carries: tokenizer, chat template, generation defaults.

use std::path::Path;

use serde_json::Value;

use crate::config::token_ids;
use crate::error::Error;
use crate::files::read_limited;
use crate::json::{check, parse_object};

/// A file that goes into the executable as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asset {
    /// Its name.
    pub name: String,
    /// Its content, checked to be JSON where its name says so, else UTF-8.
    pub bytes: Vec<u8>,
}

/// What each file is, and the largest size that is taken for sane.
const FILES: &[(&str, u64)] = &[
    ("tokenizer.json", 256 << 20),
    ("tokenizer_config.json", 16 << 20),
    (GENERATION_CONFIG, 1 << 20),
    ("chat_template.jinja", 4 << 20),
    ("chat_template.json", 4 << 20),
];

const GENERATION_CONFIG: &str = "generation_config.json";

/// Reads the files of `directory`; a missing tokenizer is a note in `warnings`.
/// # Errors
/// If one cannot be read, is too large, or is not the text that its name promises.
pub fn read_assets(directory: &Path, warnings: &mut Vec<String>) -> Result<Vec<Asset>, Error> {
    let mut assets = Vec::new();
    for &(name, limit_bytes) in FILES {
        let Some(bytes) = read_limited(&directory.join(name), limit_bytes)? else { continue };
        if name.ends_with(".json") {
            check(name, &bytes)?;
        } else if let Err(e) = std::str::from_utf8(&bytes) {
            return Err(Error::Text { file: name.into(), reason: e.to_string() });
        }
        assets.push(Asset { name: name.to_owned(), bytes });
    }
    if !assets.iter().any(|a| a.name == FILES[0].0) {
        warnings.push("there is no tokenizer.json: the executable will take token ids only".into());
    }
    Ok(assets)
}

/// The stop tokens that `generation_config.json` names, if it is there and names any.
/// # Errors
/// [`Error::Text`] if it is not an object or its `eos_token_id` is not a token id or a list of them.
pub fn stop_tokens(assets: &[Asset], vocab_size: u64, warnings: &mut Vec<String>) -> Result<Option<Vec<u32>>, Error> {
    let Some(asset) = assets.iter().find(|a| a.name == GENERATION_CONFIG) else { return Ok(None) };
    let object = parse_object(GENERATION_CONFIG, &asset.bytes)?;
    let Some(value) = object.get("eos_token_id").filter(|v| **v != Value::Null) else { return Ok(None) };
    let Some((ids, warning)) = token_ids(value, vocab_size) else {
        let reason = format!("`eos_token_id` is {}, expected a token id or a list of them", crate::json::shown(value));
        return Err(Error::Text { file: GENERATION_CONFIG.into(), reason });
    };
    warnings.extend(warning.map(|w| format!("{GENERATION_CONFIG}: {w}")));
    Ok(Some(ids))
}
