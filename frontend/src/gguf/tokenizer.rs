//! The tokenizer and the chat template in a file's metadata, as the `tokenizer.json` and `tokenizer_config.json` that a model's folder
//! would have.

use std::collections::HashSet;

use serde_json::{Map, Value as Json, json};

use super::header::Value;
use super::source::Gguf;
use crate::error::{Error, GgufProblem as Problem};
use crate::tokenizer_files::Asset;

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const TEMPLATE: &str = "tokenizer.chat_template";
const TEMPLATES: &str = "tokenizer.chat_templates";

/// Byte-level pair encoding, by the name of its first user.
const BYTE_PAIRS: &str = "gpt2";
/// How text is cut into words before its pairs are joined, by the name that files have for it.
const PATTERNS: &[(&str, &str)] = &[(
    "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)];
/// Special tokens that templates speak of: the part of the key that has their id, and their name there.
const SPECIAL: &[(&str, &str)] =
    &[("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token"), ("unknown", "unk_token")];

/// What a token is, by its number in files.
mod token_type {
    pub const CONTROL: i128 = 3;
    pub const USER_DEFINED: i128 = 4;
    pub const UNUSED: i128 = 5;
}

/// The files of the tokenizer; what is missing or not known is a note in `warnings`.
/// # Errors
/// [`Error::Gguf`] if a key is not what it should be.
pub fn assets(file: &str, model: &Gguf, warnings: &mut Vec<String>) -> Result<Vec<Asset>, Error> {
    let problem = |problem| Error::Gguf { file: file.to_owned(), problem };
    let keys = Keys { model };
    let mut assets = Vec::new();
    match keys.tokenizer().map_err(problem)? {
        Ok(json) => assets.push(Asset { name: "tokenizer.json".into(), bytes: json.to_string().into_bytes() }),
        Err(reason) => warnings.push(format!("{file}: {reason}: the executable will take token ids only")),
    }
    let config = keys.config().map_err(problem)?;
    assets.push(Asset { name: "tokenizer_config.json".into(), bytes: config.to_string().into_bytes() });
    if keys.get(ADD_BOS) == Some(&Value::Bool(true)) {
        warnings.push(format!(
            "{file}: `{ADD_BOS}` is true, but no token is put before a prompt; its chat template may do so"
        ));
    }
    if keys.get(TEMPLATE).is_none() && assets.len() > 1 {
        warnings
            .push(format!("{file}: there is no `{TEMPLATE}`: the executable will take prompts as they are (`--raw`)"));
    }
    Ok(assets)
}

struct Keys<'a> {
    model: &'a Gguf,
}

fn wrong(key: &str, found: &Value, expected: &str) -> Problem {
    Problem::Key { key: key.to_owned(), found: found.to_string(), expected: expected.to_owned() }
}

impl<'a> Keys<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.model.metadata.get(key)
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, Problem> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(key, other, "a text")),
        }
    }

    fn texts(&self, key: &str) -> Result<Option<&'a [String]>, Problem> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Texts(texts)) => Ok(Some(texts)),
            Some(other) => Err(wrong(key, other, "a list of texts")),
        }
    }

    /// `tokenizer.json`, or why there is none.
    fn tokenizer(&self) -> Result<Result<Json, String>, Problem> {
        let Some(model) = self.text(MODEL)? else { return Ok(Err("there is no tokenizer".into())) };
        if model != BYTE_PAIRS {
            return Ok(Err(format!("`{MODEL}` is {model:?}, expected {BYTE_PAIRS:?}")));
        }
        let pre = self.text(PRE)?.unwrap_or("missing");
        let Some((_, pattern)) = PATTERNS.iter().find(|(name, _)| *name == pre) else {
            let known: Vec<String> = PATTERNS.iter().map(|(name, _)| format!("{name:?}")).collect();
            return Ok(Err(format!("`{PRE}` is {pre:?}, expected {}", known.join(" or "))));
        };
        let (Some(tokens), Some(merges)) = (self.texts(TOKENS)?, self.texts(MERGES)?) else {
            return Ok(Err(format!("there are no `{TOKENS}` or no `{MERGES}`")));
        };
        let (vocabulary, added) = self.vocabulary(tokens)?;
        let merges = merges.iter().map(|merge| pair(merge, &vocabulary)).collect::<Result<Vec<Json>, _>>()?;
        Ok(Ok(json!({
            "version": "1.0",
            "added_tokens": added,
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
            ]},
            "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "fuse_unk": false,
                "byte_fallback": false,
                "ignore_merges": false,
                "vocab": vocabulary,
                "merges": merges,
            },
        })))
    }

    /// Tokens that pairs are joined to, with their ids, and those that stand for themselves.
    fn vocabulary(&self, tokens: &[String]) -> Result<(Map<String, Json>, Vec<Json>), Problem> {
        let mut types = match self.get(TYPES) {
            None => None,
            Some(Value::Numbers(numbers)) if numbers.iter().count() == tokens.len() => Some(numbers.iter()),
            Some(other) => return Err(wrong(TYPES, other, &format!("a number for each of {} tokens", tokens.len()))),
        };
        let (mut vocabulary, mut added, mut seen) = (Map::new(), Vec::new(), HashSet::new());
        for (id, token) in tokens.iter().enumerate() {
            let of_type = types.as_mut().and_then(Iterator::next);
            let is = |n: i128| of_type == Some(Value::Int(n));
            if is(token_type::UNUSED) {
                continue;
            }
            if !seen.insert(token.as_str()) {
                let found = format!("token {token:?} is there twice, the second time as {id}");
                return Err(Problem::Key { key: TOKENS.into(), found, expected: "each once".into() });
            }
            if is(token_type::CONTROL) || is(token_type::USER_DEFINED) {
                added.push(json!({
                    "id": id,
                    "content": token,
                    "single_word": false,
                    "lstrip": false,
                    "rstrip": false,
                    "normalized": false,
                    "special": is(token_type::CONTROL),
                }));
            } else {
                vocabulary.insert(token.clone(), id.into());
            }
        }
        Ok((vocabulary, added))
    }

    /// `tokenizer_config.json`: templates, and the tokens that they speak of.
    fn config(&self) -> Result<Json, Problem> {
        let mut config = Map::new();
        let tokens = self.texts(TOKENS)?.unwrap_or(&[]);
        for (part, name) in SPECIAL {
            let key = format!("tokenizer.ggml.{part}_token_id");
            let token = match self.get(&key) {
                None => None,
                Some(Value::Int(id)) => usize::try_from(*id).ok().and_then(|id| tokens.get(id)),
                Some(other) => return Err(wrong(&key, other, "a token id")),
            };
            config.extend(token.map(|token| ((*name).to_owned(), token.as_str().into())));
        }
        let Some(template) = self.text(TEMPLATE)? else { return Ok(config.into()) };
        let mut named = vec![json!({"name": "default", "template": template})];
        for name in self.texts(TEMPLATES)?.unwrap_or(&[]) {
            if let Some(template) = self.text(&format!("{TEMPLATE}.{name}"))? {
                named.push(json!({"name": name, "template": template}));
            }
        }
        let templates = if named.len() == 1 { template.into() } else { named.into() };
        config.insert("chat_template".into(), templates);
        Ok(config.into())
    }
}

/// The two tokens of a merge, which are in the vocabulary, as is what they are joined to.
fn pair(merge: &str, vocabulary: &Map<String, Json>) -> Result<Json, Problem> {
    let parts = merge.split_once(' ').filter(|(first, second)| {
        let known = |token: &str| vocabulary.contains_key(token);
        known(first) && known(second) && known(&format!("{first}{second}"))
    });
    match parts {
        Some((first, second)) => Ok(json!([first, second])),
        None => Err(Problem::Key {
            key: MERGES.into(),
            found: format!("{merge:?} among others"),
            expected: "two tokens of the vocabulary, and a space between them, that make a third".into(),
        }),
    }
}
