//! Typed access to the keys of a JSON object, by its key table; collects every problem instead of stopping at the first.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::keys::{Key, Lit, Role};
use crate::error::ConfigProblem;
use crate::json::shown;

/// Reads one object. A value that does not pass its check is reported, and its default is given so that reading goes on.
pub(crate) struct Reader<'a> {
    object: &'a Map<String, Value>,
    table: &'static [Key],
    /// What leads to the object: empty, or `rope_parameters.`.
    prefix: &'a str,
    /// What has been found wrong.
    pub problems: Vec<ConfigProblem>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

impl<'a> Reader<'a> {
    pub fn new(object: &'a Map<String, Value>, table: &'static [Key], prefix: &'a str) -> Self {
        Self { object, table, prefix, problems: Vec::new(), warnings: Vec::new() }
    }

    /// The value of a key, if it is there.
    pub fn raw(&self, key: &str) -> Option<&'a Value> {
        debug_assert!(self.table.iter().any(|k| k.name == key && matches!(k.role, Role::Read)), "`{key}`");
        self.object.get(key)
    }

    /// The value of a key for which `null` means the same as absence.
    pub fn nullable(&self, key: &str) -> Option<&'a Value> {
        self.raw(key).filter(|v| !v.is_null())
    }

    /// Reports that a key's value is not what was expected.
    pub fn reject(&mut self, key: &str, found: &Value, expected: impl Into<String>) {
        self.reject_as(key, shown(found), expected);
    }

    /// The same with the value given as text.
    pub fn reject_as(&mut self, key: &str, found: impl Into<String>, expected: impl Into<String>) {
        let key = format!("{}{key}", self.prefix);
        self.problems.push(ConfigProblem::Value { key, found: found.into(), expected: expected.into() });
    }

    /// An integer in `range`; absent, `default`.
    pub fn int(&mut self, key: &str, default: u64, range: RangeInclusive<u64>) -> u64 {
        let Some(value) = self.raw(key) else { return default };
        match value.as_u64().filter(|n| range.contains(n)) {
            Some(n) => n,
            None => {
                self.reject(key, value, format!("an integer from {} to {}", range.start(), range.end()));
                default
            }
        }
    }

    /// A number in `above < n <= most`; absent or null, nothing.
    pub fn number(&mut self, key: &str, above: f64, most: f64) -> Option<f64> {
        let value = self.nullable(key)?;
        let number = value.as_f64().filter(|n| *n > above && *n <= most);
        if number.is_none() {
            self.reject(key, value, format!("a number above {above} and at most {most}"));
        }
        number
    }

    /// A boolean; absent, `default`.
    pub fn bool(&mut self, key: &str, default: bool) -> bool {
        let Some(value) = self.raw(key) else { return default };
        value.as_bool().unwrap_or_else(|| {
            self.reject(key, value, "true or false");
            default
        })
    }

    /// A string; absent or null, nothing.
    pub fn str(&mut self, key: &str) -> Option<&'a str> {
        let value = self.nullable(key)?;
        if !value.is_string() {
            self.reject(key, value, "a string");
        }
        value.as_str()
    }

    /// Checks the keys that must have certain values.
    pub fn check_fixed(&mut self) {
        for Key { name, role } in self.table {
            let (Role::Fixed(values, why), Some(value)) = (role, self.object.get(*name)) else { continue };
            if !values.iter().any(|l| is(value, *l)) {
                self.reject(name, value, format!("{} ({why})", spell(values)));
            }
        }
    }

    /// The keys that the table does not have.
    pub fn unknown(&self) -> impl Iterator<Item = (&'a String, &'a Value)> + use<'a> {
        let table = self.table;
        self.object.iter().filter(move |(name, _)| table.iter().all(|k| k.name != name.as_str()))
    }
}

fn is(value: &Value, lit: Lit) -> bool {
    match lit {
        Lit::Null => value.is_null(),
        Lit::Bool(b) => value.as_bool() == Some(b),
        Lit::Num(n) => value.as_f64() == Some(n),
        Lit::Str(s) => value.as_str() == Some(s),
        Lit::Empty => value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(Map::is_empty),
    }
}

fn spell(values: &[Lit]) -> String {
    let mut words: Vec<String> = Vec::new();
    for lit in values {
        match lit {
            Lit::Null if values.len() > 1 => {}
            Lit::Null => words.push("null".into()),
            Lit::Bool(b) => words.push(b.to_string()),
            Lit::Num(n) => words.push(n.to_string()),
            Lit::Str(s) => words.push(format!("{s:?}")),
            Lit::Empty => words.push("nothing".into()),
        }
    }
    words.join(" or ")
}
