//! JSON read strictly: an object that names a key twice is an error, as are nesting beyond the parser's limit and numbers
//! beyond the range of a double.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::error::Error;

/// The object that `bytes` hold; `file` names them in errors.
/// # Errors
/// [`Error::Text`] if they are not one JSON object without duplicate keys.
pub fn parse_object(file: &str, bytes: &[u8]) -> Result<Map<String, Value>, Error> {
    let text_error = |reason: String| Error::Text { file: file.to_owned(), reason };
    let mut parser = serde_json::Deserializer::from_slice(bytes);
    let value = Strict.deserialize(&mut parser).map_err(|e| text_error(e.to_string()))?;
    parser.end().map_err(|e| text_error(e.to_string()))?;
    match value {
        Value::Object(object) => Ok(object),
        other => Err(text_error(format!("the file holds {}, expected an object", kind(&other)))),
    }
}

/// The bytes of a file of at most `limit_bytes`; `None` if there is no such file.
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::TooLarge`] if it is too large.
pub fn read_limited(path: &Path, limit_bytes: u64) -> Result<Option<Vec<u8>>, Error> {
    if !present(path) {
        return Ok(None);
    }
    let file = file_name(path);
    let (opened, found_bytes) = open_file(path)?;
    if found_bytes > limit_bytes {
        return Err(Error::TooLarge { file, found_bytes, limit_bytes });
    }
    let mut bytes = Vec::with_capacity(found_bytes as usize);
    opened.take(found_bytes).read_to_end(&mut bytes).map_err(|reason| Error::Io { file, reason })?;
    Ok(Some(bytes))
}

/// True if there is something at `path`, even if it is a link that leads nowhere: opening it says what is wrong.
pub fn present(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Opens a regular file; also gives its size. Pipes and devices are refused before they can block.
/// # Errors
/// [`Error::Io`] if it cannot be opened or is something else.
pub fn open_file(path: &Path) -> Result<(File, u64), Error> {
    let open = || {
        let metadata = path.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        Ok((File::open(path)?, metadata.len()))
    };
    open().map_err(|reason| Error::Io { file: file_name(path), reason })
}

/// The last part of a path, for messages.
pub fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}

/// A value as it appears in a message: JSON, cut to a readable length.
pub fn shown(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((cut, _)) => format!("{}...", &text[..cut]),
        None => text,
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// Makes a [`Value`] and refuses duplicate keys on the way.
struct Strict;

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(Strict)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value_seed(Strict)?;
            if object.contains_key(&key) {
                return Err(A::Error::custom(format!("the key `{key}` appears twice")));
            }
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

/// Checks that `bytes` are JSON without keeping any of it.
/// # Errors
/// [`Error::Text`] if they are not.
pub fn check(file: &str, bytes: &[u8]) -> Result<(), Error> {
    let mut parser = serde_json::Deserializer::from_slice(bytes);
    serde::de::IgnoredAny::deserialize(&mut parser)
        .and_then(|_| parser.end())
        .map_err(|e| Error::Text { file: file.to_owned(), reason: e.to_string() })
}
