//! What is to be continued, from the command line, a file of token ids, or a file of prompts.

use std::cell::OnceCell;
use std::path::Path;

use serde_json::{Map, Value as Json, json};

use super::settings::set;
use super::{GenerateArgs, GenerateError, TextFiles};
use crate::sample::Sampling;
use crate::sample::settings::{LOGIT_BIAS, Setting};
use crate::template::{Chat, ChatTemplate};
use crate::tokenizer::{Special, TokenizerError};

/// One sequence to be continued, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Where it stands, for messages: `sequence 3`, `prompts.txt:4`.
    pub at: String,
    /// The prompt.
    pub tokens: Vec<u32>,
    /// Most new tokens.
    pub max_new_tokens: usize,
    /// How to choose.
    pub sampling: Sampling,
    /// Its number in random numbers. Sequences with one seed differ by it; one with a seed of its own has 0, as if alone.
    pub number: u32,
    /// Texts that end it.
    pub stops: Vec<String>,
    /// Special tokens in the new text: they show where they stood in what was given.
    pub special: Special,
}

impl Request {
    /// Refuses what the model cannot continue.
    /// # Errors
    /// [`GenerateError`] saying where it stands.
    pub fn check(&self, vocab_size: usize, max_context: usize) -> Result<(), GenerateError> {
        let (at, tokens) = (self.at.clone(), self.tokens.len());
        if tokens == 0 {
            return Err(GenerateError::Empty { at });
        }
        if let Some((index, &id)) = self.tokens.iter().enumerate().find(|&(_, &id)| id as usize >= vocab_size) {
            return Err(GenerateError::Token { at, index, id, vocab_size });
        }
        if tokens > max_context {
            return Err(GenerateError::TooLong { at, tokens, max_context });
        }
        Ok(())
    }
}

/// In what form answers are given: as the requests were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// One prompt, one answer.
    One,
    /// An array of arrays: one object with all answers.
    Array,
    /// A file with a prompt a line: an answer a line, or a block of text each.
    Lines,
}

/// All that is asked for at once.
#[derive(Clone, Debug, PartialEq)]
pub struct Requests {
    /// In the order in which answers are printed.
    pub list: Vec<Request>,
    /// The form of the answers.
    pub form: Form,
}

impl Requests {
    /// Reads what the arguments name.
    /// # Errors
    /// [`GenerateError`] naming the file, the line, and what is wrong with it.
    pub fn read(args: &GenerateArgs, files: &TextFiles<'_>, sampling: &Sampling) -> Result<Self, GenerateError> {
        let reader = Reader { args, files, sampling, template: OnceCell::new() };
        if let Some(path) = &args.prompts {
            return Ok(Self { list: reader.lines(path)?, form: Form::Lines });
        }
        let request = |(i, tokens)| Request { at: format!("sequence {i}"), ..reader.request(i, tokens, Special::Keep) };
        if let Some(path) = &args.tokens {
            let (sequences, batch) = read_ids(path)?;
            let list = sequences.into_iter().enumerate().map(request).collect();
            return Ok(Self { list, form: if batch { Form::Array } else { Form::One } });
        }
        let (tokens, special) = reader.prompt(args.prompt.as_deref().unwrap_or_default(), args.system.as_deref())?;
        let request = Request { at: "the prompt".to_owned(), special, ..request((0, tokens)) };
        Ok(Self { list: vec![request], form: Form::One })
    }
}

struct Reader<'a> {
    args: &'a GenerateArgs,
    files: &'a TextFiles<'a>,
    sampling: &'a Sampling,
    template: OnceCell<ChatTemplate>,
}

impl Reader<'_> {
    fn request(&self, index: usize, tokens: Vec<u32>, special: Special) -> Request {
        Request {
            at: String::new(),
            tokens,
            max_new_tokens: self.args.max_new_tokens,
            sampling: self.sampling.clone(),
            number: u32::try_from(index).unwrap_or(u32::MAX),
            stops: self.args.stop.clone(),
            special,
        }
    }

    /// The tokens of a text: as it stands, or as what a user says.
    fn prompt(&self, text: &str, system: Option<&str>) -> Result<(Vec<u32>, Special), GenerateError> {
        if self.args.raw {
            return Ok((self.files.tokenizer.get()?.encode(text)?, Special::Keep));
        }
        let mut chat = Chat::of_user(text);
        if let Some(system) = system {
            chat.messages.insert(0, json!({"role": "system", "content": system}));
        }
        self.chat(chat)
    }

    fn chat(&self, mut chat: Chat) -> Result<(Vec<u32>, Special), GenerateError> {
        self.files.tokenizer.is_present().then_some(()).ok_or(TokenizerError::Absent)?;
        let template = self.template()?;
        chat.variables.extend(template.thinking(self.args.no_thinking)?);
        let text = template.render(&chat)?;
        Ok((self.files.tokenizer.get()?.encode(&text)?, Special::Skip))
    }

    /// The chat template, parsed once.
    fn template(&self) -> Result<&ChatTemplate, GenerateError> {
        if let Some(template) = self.template.get() {
            return Ok(template);
        }
        let template = self.files.template()?;
        Ok(self.template.get_or_init(|| template))
    }

    /// Reads a file of prompts: JSON objects if its first line that is not blank begins with `{`, else texts.
    fn lines(&self, path: &Path) -> Result<Vec<Request>, GenerateError> {
        let lines = read_lines(path)?;
        let objects = lines.first().is_some_and(|(_, line)| line.trim_start().starts_with('{'));
        let request = |(index, (line, text)): (usize, &(usize, String))| {
            let request = if objects {
                self.object(index, text)
            } else {
                self.prompt(text, self.args.system.as_deref())
                    .map(|(tokens, special)| self.request(index, tokens, special))
                    .map_err(|e| e.to_string())
            };
            let at = format!("{}:{line}", path.display());
            match request {
                Ok(request) => Ok(Request { at, ..request }),
                Err(reason) => Err(GenerateError::Line { at, reason }),
            }
        };
        lines.iter().enumerate().map(request).collect()
    }

    /// A line of JSON: what to continue, and settings of its own.
    fn object(&self, index: usize, line: &str) -> Result<Request, String> {
        let value: Json = serde_json::from_str(line).map_err(|e| e.to_string())?;
        let Json::Object(mut object) = value else {
            return Err(format!("{value} stands where an object is expected, as on the lines before"));
        };
        let (tokens, special) = self.start(&mut object)?;
        let mut request = self.request(index, tokens, special);
        for (key, value) in object {
            override_with(&mut request, &key, &value)?;
        }
        Ok(request)
    }

    /// Takes what is to be continued from an object.
    fn start(&self, object: &mut Map<String, Json>) -> Result<(Vec<u32>, Special), String> {
        let given: Vec<_> =
            ["prompt", "tokens", "messages"].into_iter().filter(|key| object.contains_key(*key)).collect();
        let [key] = given[..] else {
            return Err(format!("expected one of `prompt`, `tokens`, `messages`, found {}", given.len()));
        };
        let value = object.remove(key).unwrap_or_default();
        let system = match object.get("system").filter(|_| key == "prompt") {
            Some(value) => Some(string("system", value)?.to_owned()),
            None => self.args.system.clone(),
        };
        if key == "prompt" {
            object.remove("system");
        }
        match (key, &value) {
            ("tokens", Json::Array(ids)) => Ok((ids_of(ids).map_err(|e| format!("`tokens`{e}"))?, Special::Keep)),
            ("tokens", other) => Err(format!("`tokens` is {other}, expected an array of token ids")),
            ("messages", Json::Array(messages)) => {
                let chat = Chat { messages: messages.clone(), add_generation_prompt: true, ..Chat::default() };
                self.chat(chat).map_err(|e| e.to_string())
            }
            ("messages", other) => Err(format!("`messages` is {other}, expected an array of objects")),
            _ => self.prompt(string("prompt", &value)?, system.as_deref()).map_err(|e| e.to_string()),
        }
    }
}

fn string<'a>(key: &str, value: &'a Json) -> Result<&'a str, String> {
    value.as_str().ok_or_else(|| format!("`{key}` is {value}, expected a string"))
}

/// Changes one setting of a request.
fn override_with(request: &mut Request, key: &str, value: &Json) -> Result<(), String> {
    let whole = || value.as_u64().ok_or_else(|| format!("`{key}` is {value}, expected a whole number, 0 or more"));
    match key {
        "max_new_tokens" => request.max_new_tokens = usize::try_from(whole()?).unwrap_or(usize::MAX),
        "seed" => (request.sampling.seed, request.number) = (whole()?, 0),
        "stop" => request.stops = texts(key, value)?,
        "logit_bias" => request.sampling.logit_bias = biases(value)?,
        _ => {
            let unknown = || format!("`{key}` is not known here; known are {KEYS} and the settings of sampling");
            set(&mut request.sampling, Setting::find(key).ok_or_else(unknown)?, value)?;
        }
    }
    Ok(())
}

const KEYS: &str = "`prompt`, `system`, `tokens`, `messages`, `max_new_tokens`, `seed`, `stop`, `logit_bias`";

/// A text, or a list of texts.
fn texts(key: &str, value: &Json) -> Result<Vec<String>, String> {
    let one = |value: &Json| string(key, value).map(str::to_owned);
    match value {
        Json::Array(items) => items.iter().map(one).collect(),
        value => Ok(vec![one(value)?]),
    }
}

/// `{"ID": VALUE}`.
fn biases(value: &Json) -> Result<Vec<(u32, f64)>, String> {
    let object =
        value.as_object().ok_or_else(|| format!("`logit_bias` is {value}, expected an object of token ids"))?;
    let bias = |(id, value): (&String, &Json)| {
        let token = id.parse().map_err(|_| format!("`logit_bias` has `{id}`, expected a token id"))?;
        let number = value.as_f64().ok_or_else(|| format!("`logit_bias` of {id} is {value}, expected a number"))?;
        LOGIT_BIAS.check(number).map_err(|e| e.to_string())?;
        Ok((token, number))
    };
    object.iter().map(bias).collect()
}

/// The lines of a file that are not blank, with their numbers from 1.
pub(super) fn read_lines(path: &Path) -> Result<Vec<(usize, String)>, GenerateError> {
    let bad = |reason: &str| GenerateError::Ids { path: path.to_owned(), reason: reason.to_owned() };
    let bytes = std::fs::read(path).map_err(|e| bad(&e.to_string()))?;
    let line = |(i, bytes): (usize, &[u8])| match std::str::from_utf8(bytes) {
        Ok(text) => Ok((i + 1, text.strip_suffix('\r').unwrap_or(text).to_owned())),
        Err(e) => {
            Err(GenerateError::Line { at: format!("{}:{}", path.display(), i + 1), reason: format!("not UTF-8: {e}") })
        }
    };
    let lines: Vec<_> = bytes.split(|&b| b == b'\n').enumerate().map(line).collect::<Result<_, _>>()?;
    let lines: Vec<_> = lines.into_iter().filter(|(_, text)| !text.trim().is_empty()).collect();
    if lines.is_empty() { Err(bad("expected a prompt a line, found none")) } else { Ok(lines) }
}

/// Reads a JSON array of token ids, or an array of such arrays; says whether it was the latter.
/// # Errors
/// [`GenerateError::Ids`] naming the file and what stands where an id should.
pub fn read_ids(path: &Path) -> Result<(Vec<Vec<u32>>, bool), GenerateError> {
    let bad = |reason: String| GenerateError::Ids { path: path.to_owned(), reason };
    let bytes = std::fs::read(path).map_err(|e| bad(e.to_string()))?;
    let value: Json = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
    let items = value.as_array().ok_or_else(|| bad("expected an array of token ids".to_owned()))?;
    if items.first().is_some_and(Json::is_array) {
        let inner = |(i, item): (usize, &Json)| match item {
            Json::Array(ids) => ids_of(ids).map_err(|e| bad(format!("[{i}]{e}"))),
            other => Err(bad(format!("[{i}] is {other}, expected an array of token ids like [0]"))),
        };
        return Ok((items.iter().enumerate().map(inner).collect::<Result<_, _>>()?, true));
    }
    Ok((vec![ids_of(items).map_err(bad)?], false))
}

fn ids_of(items: &[Json]) -> Result<Vec<u32>, String> {
    let id = |(i, item): (usize, &Json)| {
        let id = item.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| format!("[{i}] is {item}, expected a token id"))
    };
    items.iter().enumerate().map(id).collect()
}
