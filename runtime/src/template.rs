//! Chat templates: messages to the text that the model was trained on, as Hugging Face's `apply_chat_template` gives it.
//!
//! Templates are Jinja. minijinja runs them with Python's manners: `tojson` is `json.dumps(ensure_ascii=False)`, `None` and
//! `True` print as Python prints them, strings have Python's methods, and nothing is escaped for HTML.

pub mod json;

use std::sync::{Arc, Mutex};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, ValueKind};
use minijinja::{Environment, Error as JinjaError, ErrorKind, Output, State, Value};
use serde_json::{Map, Value as Json, json};

/// Why a chat template cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// There is none.
    #[error(
        "this executable has no chat template: the model's folder had neither `chat_template.jinja` nor `chat_template` in tokenizer_config.json; use `--raw`"
    )]
    Absent,
    /// `tokenizer_config.json` is not what it should be.
    #[error("tokenizer_config.json: {reason}")]
    Config {
        /// What is wrong.
        reason: String,
    },
    /// The template does not parse.
    #[error("chat template, line {line}: {reason}")]
    Parse {
        /// The line of the template, from 1.
        line: usize,
        /// What the parser says.
        reason: String,
    },
    /// Rendering failed.
    #[error("chat template, line {line}: {reason}")]
    Render {
        /// The line of the template, from 1.
        line: usize,
        /// What went wrong.
        reason: String,
    },
    /// The template has no switch for thoughts.
    #[error("`--no-thinking`: this model's chat template does not know `enable_thinking`")]
    NoThinkingSwitch,
    /// The template refused the messages with `raise_exception`.
    #[error("the chat template refuses these messages: {0}")]
    Refused(String),
}

/// What a template is given.
#[derive(Clone, Debug, Default)]
pub struct Chat {
    /// Messages: objects with `role` and `content`.
    pub messages: Vec<Json>,
    /// Tools the model may call, as JSON schemas.
    pub tools: Option<Vec<Json>>,
    /// Whether the text ends where the assistant's answer begins.
    pub add_generation_prompt: bool,
    /// Further variables (`enable_thinking`).
    pub variables: Map<String, Json>,
}

impl Chat {
    /// One message of the user, to be answered.
    pub fn of_user(prompt: &str) -> Self {
        Self {
            messages: vec![json!({"role": "user", "content": prompt})],
            add_generation_prompt: true,
            ..Self::default()
        }
    }
}

/// A chat template with the special tokens it speaks of.
pub struct ChatTemplate {
    env: Environment<'static>,
    special_tokens: Map<String, Json>,
    refused: Arc<Mutex<Option<String>>>,
}

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

impl ChatTemplate {
    /// From the files of a model's folder; `chat_template.jinja` wins over the entry in `tokenizer_config.json`.
    /// # Errors
    /// [`TemplateError`] if there is no template, or it does not parse.
    pub fn from_files(tokenizer_config: Option<&[u8]>, jinja: Option<&[u8]>) -> Result<Self, TemplateError> {
        let config = match tokenizer_config {
            Some(bytes) => {
                serde_json::from_slice(bytes).map_err(|e| TemplateError::Config { reason: e.to_string() })?
            }
            None => Json::Null,
        };
        let sources = match jinja {
            Some(bytes) => {
                let source = std::str::from_utf8(bytes)
                    .map_err(|e| TemplateError::Parse { line: 1, reason: format!("not UTF-8: {e}") })?;
                vec![(DEFAULT.to_owned(), source.to_owned())]
            }
            None => sources_in(&config)?,
        };
        let refused = Arc::new(Mutex::new(None));
        let mut env = environment(&refused)?;
        for (name, source) in sources {
            env.add_template_owned(name, source)
                .map_err(|e| TemplateError::Parse { line: e.line().unwrap_or(1), reason: reason_of(&e) })?;
        }
        Ok(Self { env, special_tokens: special_tokens_in(&config), refused })
    }

    /// The text of a chat.
    /// # Errors
    /// [`TemplateError`] if the template fails or refuses.
    pub fn render(&self, chat: &Chat) -> Result<String, TemplateError> {
        let name = match &chat.tools {
            Some(_) if self.env.get_template(TOOL_USE).is_ok() => TOOL_USE,
            _ => DEFAULT,
        };
        let template = self.env.get_template(name).map_err(|_| TemplateError::Absent)?;
        template.render(Serde(self.variables(chat))).map_err(|error| self.explain(&error))
    }

    /// The variables that turn thoughts off, or none to leave them as they are.
    /// # Errors
    /// [`TemplateError::NoThinkingSwitch`] if the template does not know them.
    pub fn thinking(&self, off: bool) -> Result<Map<String, Json>, TemplateError> {
        let name = "enable_thinking";
        let known = || self.env.templates().any(|(_, template)| template.undeclared_variables(false).contains(name));
        match off {
            true if known() => Ok(Map::from_iter([(name.to_owned(), Json::Bool(false))])),
            true => Err(TemplateError::NoThinkingSwitch),
            false => Ok(Map::new()),
        }
    }

    fn variables(&self, chat: &Chat) -> Map<String, Json> {
        let mut variables = self.special_tokens.clone();
        variables.insert("messages".to_owned(), Json::Array(chat.messages.clone()));
        variables.insert("tools".to_owned(), chat.tools.clone().map_or(Json::Null, Json::Array));
        variables.insert("documents".to_owned(), Json::Null);
        variables.insert("add_generation_prompt".to_owned(), Json::Bool(chat.add_generation_prompt));
        variables.extend(chat.variables.clone());
        variables
    }

    fn explain(&self, error: &JinjaError) -> TemplateError {
        let refused = self.refused.lock().ok().and_then(|mut refused| refused.take());
        refused.map_or_else(
            || TemplateError::Render { line: error.line().unwrap_or(1), reason: reason_of(error) },
            TemplateError::Refused,
        )
    }
}

fn reason_of(error: &JinjaError) -> String {
    error.detail().map_or_else(|| error.kind().to_string(), |detail| format!("{}: {detail}", error.kind()))
}

/// The templates of `tokenizer_config.json`: one, or a list of named ones.
fn sources_in(config: &Json) -> Result<Vec<(String, String)>, TemplateError> {
    let bad = || TemplateError::Config {
        reason: "`chat_template` is neither a string nor a list of objects with `name` and `template`".to_owned(),
    };
    match config.get("chat_template") {
        None | Some(Json::Null) => Err(TemplateError::Absent),
        Some(Json::String(source)) => Ok(vec![(DEFAULT.to_owned(), source.clone())]),
        Some(Json::Array(named)) => named
            .iter()
            .map(|entry| {
                let text = |key| entry.get(key).and_then(Json::as_str).map(str::to_owned).ok_or_else(bad);
                Ok((text("name")?, text("template")?))
            })
            .collect(),
        Some(_) => Err(bad()),
    }
}

/// `bos_token` and its like: strings, or objects with `content`.
fn special_tokens_in(config: &Json) -> Map<String, Json> {
    let entries = config.as_object().into_iter().flatten().filter(|(key, _)| key.ends_with("_token"));
    entries
        .filter_map(|(key, value)| {
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some((key.clone(), Json::String(text.to_owned())))
        })
        .collect()
}

fn environment(refused: &Arc<Mutex<Option<String>>>) -> Result<Environment<'static>, TemplateError> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.map_err(|e| TemplateError::Parse { line: 1, reason: reason_of(&e) })?);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.set_formatter(print_as_python);
    env.add_filter("tojson", tojson);
    env.add_function("strftime_now", |format: String| strftime(&format, now()));
    let refused = Arc::clone(refused);
    env.add_function("raise_exception", move |message: String| -> Result<Value, JinjaError> {
        if let Ok(mut slot) = refused.lock() {
            *slot = Some(message.clone());
        }
        Err(JinjaError::new(ErrorKind::InvalidOperation, message))
    });
    Ok(env)
}

/// `None`, `True` and `False` are spelt as in Python; everything else prints as it is.
fn print_as_python(out: &mut Output, state: &mut State, value: &Value) -> Result<(), JinjaError> {
    let spelt = match value.kind() {
        ValueKind::None => "None",
        ValueKind::Bool if value.is_true() => "True",
        ValueKind::Bool => "False",
        _ => return minijinja::escape_formatter(out, state, value),
    };
    out.write_str(spelt).map_err(|_| JinjaError::from(ErrorKind::WriteFailure))
}

/// Hugging Face's `tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn tojson(value: &Value, kwargs: Kwargs) -> Result<String, JinjaError> {
    let mut style = json::Style {
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        ..json::Style::default()
    };
    if let Some(indent) = kwargs.get::<Option<Value>>("indent")?.filter(|v| !v.is_none()) {
        let spaces = || usize::try_from(indent.clone()).map(|n| " ".repeat(n.min(64)));
        style.indent = Some(indent.as_str().map_or_else(spaces, |s| Ok(s.to_owned()))?);
        style.item_separator = ",".to_owned();
    }
    if let Some(separators) = kwargs.get::<Option<Vec<String>>>("separators")? {
        let [item, key] = <[String; 2]>::try_from(separators)
            .map_err(|_| JinjaError::new(ErrorKind::InvalidOperation, "tojson: `separators` wants two strings"))?;
        (style.item_separator, style.key_separator) = (item, key);
    }
    kwargs.assert_all_used()?;
    let value = serde_json::to_value(value)
        .map_err(|e| JinjaError::new(ErrorKind::BadSerialization, format!("tojson: {e}")))?;
    Ok(json::dumps(&value, &style))
}

fn now() -> libc::time_t {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| libc::time_t::try_from(d.as_secs()).unwrap_or(libc::time_t::MAX))
}

/// Local time as `strftime` of C (and so of Python) writes it.
fn strftime(format: &str, time: libc::time_t) -> Result<String, JinjaError> {
    let bad = || JinjaError::new(ErrorKind::InvalidOperation, format!("strftime_now: bad format `{format}`"));
    // an empty result and a buffer that is too small look the same, so one more character is written and taken off
    let c_format = std::ffi::CString::new(format!("{format} ")).map_err(|_| bad())?;
    let mut buffer = [0u8; 1024];
    // SAFETY: `tm` is plain data; `localtime_r` fills it, or returns null and it stays zeroed, which is a valid time
    let mut tm: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live values of the right type
    let known = unsafe { libc::localtime_r(&raw const time, &raw mut tm) };
    if known.is_null() {
        return Err(bad());
    }
    // SAFETY: `strftime` writes at most `buffer.len()` bytes and reads a NUL-terminated format and a valid `tm`
    let written = unsafe { libc::strftime(buffer.as_mut_ptr().cast(), buffer.len(), c_format.as_ptr(), &raw const tm) };
    match written {
        0 => Err(bad()),
        n => Ok(String::from_utf8_lossy(&buffer[..n - 1]).into_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::from_files(None, Some(source.as_bytes())).unwrap()
    }

    fn check(source: &str, variables: Json, expected: &str) {
        let Json::Object(variables) = variables else { panic!("variables are an object") };
        let chat = Chat { variables, ..Chat::default() };
        assert_eq!(template(source).render(&chat).unwrap(), expected, "{source}");
    }

    #[test]
    fn published_chats_render_as_recorded() {
        let Some((dir, cases)) = crate::tokenizer::tests::published() else { return };
        let read = |name: &str| std::fs::read(dir.join(name)).unwrap();
        let template = ChatTemplate::from_files(Some(&read("tokenizer_config.json")), None).unwrap();
        let tokenizer = crate::tokenizer::Tokenizer::from_json(&read("tokenizer.json")).unwrap();
        let chats = cases["chat"].as_array().unwrap();
        assert!(chats.len() >= 14);
        for case in chats {
            let mut variables = case["kwargs"].as_object().unwrap().clone();
            let prompt = variables.remove("add_generation_prompt").is_some_and(|v| v == true);
            let chat = Chat {
                messages: case["messages"].as_array().unwrap().clone(),
                tools: case["tools"].as_array().cloned(),
                add_generation_prompt: prompt,
                variables,
            };
            let text = template.render(&chat).unwrap();
            assert_eq!(text, case["text"].as_str().unwrap());
            let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
            assert_eq!(tokenizer.encode(&text).unwrap(), ids);
        }
    }

    #[test]
    fn demo_chat_renders() {
        let config =
            std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/demo-model/tokenizer_config.json"));
        let template = ChatTemplate::from_files(Some(&config.unwrap()), None).unwrap();
        let text = template.render(&Chat::of_user("Hi <b>")).unwrap();
        assert_eq!(text, "<|im_start|>user\nHi <b><|im_end|>\n<|im_start|>assistant\n");
    }

    #[test]
    fn tojson_is_pythons() {
        let value = json!({"x": {"b": "<é>", "a": [1, 2.5, null]}});
        check("{{ x | tojson }}", value.clone(), r#"{"b": "<é>", "a": [1, 2.5, null]}"#);
        check("{{ x | tojson(ensure_ascii=true) }}", value.clone(), "{\"b\": \"<\\u00e9>\", \"a\": [1, 2.5, null]}");
        check("{{ x.a | tojson(indent=4) }}", value.clone(), "[\n    1,\n    2.5,\n    null\n]");
        check("{{ x.a | tojson(separators=[',', ':']) }}", value, "[1,2.5,null]");
    }

    #[test]
    fn printing_blocks_loops_and_methods_are_pythons() {
        check("{{ none }} {{ true }} {{ x }}", json!({"x": false}), "None True False");
        check("  {% if true %}\na\n  {% endif %}\nb", json!({}), "a\nb");
        check(
            "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            json!({}),
            "013",
        );
        check("{{ x.strip().split(',')[-1].upper() }}", json!({"x": " a,b "}), "B");
        check("{% for k, v in x.items() %}{{ k }}={{ v }};{% endfor %}", json!({"x": {"b": 1, "a": 2}}), "b=1;a=2;");
        check("{{ messages | length }}{{ tools is none }}", json!({}), "0True");
    }

    #[test]
    fn time_is_that_of_strftime() {
        assert_eq!(strftime("%Y", 43_200 * 365).unwrap(), "1970");
        assert_eq!(strftime("", 0).unwrap(), "");
        assert!(strftime("a\0b", 0).is_err());
        let now = template("{{ strftime_now('%Y-%m-%d') }}").render(&Chat::default()).unwrap();
        assert_eq!(now.len(), 10, "{now}");
    }

    #[test]
    fn named_templates_and_special_tokens() {
        let config = json!({
            "eos_token": {"content": "<e>", "special": true}, "bos_token": "<b>", "pad_token": null,
            "chat_template": [
                {"name": "default", "template": "{{ bos_token }}{{ pad_token is defined }}"},
                {"name": "tool_use", "template": "{{ eos_token }}{{ tools | length }}"},
            ],
        });
        let template = ChatTemplate::from_files(Some(config.to_string().as_bytes()), None).unwrap();
        assert_eq!(template.render(&Chat::default()).unwrap(), "<b>False");
        let chat = Chat { tools: Some(vec![json!({})]), ..Chat::default() };
        assert_eq!(template.render(&chat).unwrap(), "<e>1");
    }

    #[test]
    fn errors_say_where() {
        let load = |config: Option<&str>, jinja: Option<&str>| {
            ChatTemplate::from_files(config.map(str::as_bytes), jinja.map(str::as_bytes)).err().map(|e| e.to_string())
        };
        let check = |error: Option<String>, expected: &str| {
            assert!(error.as_deref().unwrap_or_default().contains(expected), "{error:?}");
        };
        check(load(None, None), "no chat template");
        check(load(Some("{}"), None), "no chat template");
        check(load(Some("{"), None), "tokenizer_config.json: ");
        check(load(Some(r#"{"chat_template": 3}"#), None), "neither a string nor a list");
        check(load(None, Some("a\n{% if %}")), "chat template, line 2: ");
        let render = |source: &str| template(source).render(&Chat::default()).err().map(|e| e.to_string());
        check(render("\n\n{{ a.b.c }}"), "chat template, line 3: undefined");
        check(render("{{ raise_exception('no system') }}"), "the chat template refuses these messages: no system");
    }
}
