//! JSON as Python's `json.dumps` writes it: what a chat template's `tojson` must give, byte for byte, because the model was
//! trained on it.

use serde_json::Value;

/// The options of `json.dumps` that a template can give.
#[derive(Clone, Debug)]
pub struct Style {
    /// Write characters above ASCII as `\uXXXX`.
    pub ensure_ascii: bool,
    /// One item a line, each level indented by this.
    pub indent: Option<String>,
    /// Between items; `", "` without an indent, `","` with one.
    pub item_separator: String,
    /// Between key and value.
    pub key_separator: String,
    /// Keys in ascending order.
    pub sort_keys: bool,
}

impl Default for Style {
    fn default() -> Self {
        Self {
            ensure_ascii: false,
            indent: None,
            item_separator: ", ".to_owned(),
            key_separator: ": ".to_owned(),
            sort_keys: false,
        }
    }
}

/// `value` as JSON.
pub fn dumps(value: &Value, style: &Style) -> String {
    let mut writer = Writer { style, out: String::new() };
    writer.value(value, 0);
    writer.out
}

struct Writer<'a> {
    style: &'a Style,
    out: String,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value, depth: usize) {
        match value {
            Value::Null => self.out.push_str("null"),
            Value::Bool(b) => self.out.push_str(if *b { "true" } else { "false" }),
            Value::Number(n) if n.is_f64() => self.out.push_str(&float(n.as_f64().unwrap_or(f64::NAN))),
            Value::Number(n) => self.out.push_str(&n.to_string()),
            Value::String(s) => self.string(s),
            Value::Array(items) => {
                self.items(items.iter(), ('[', ']'), depth, |w, item| w.value(item, depth + 1));
            }
            Value::Object(map) => {
                let mut entries: Vec<_> = map.iter().collect();
                if self.style.sort_keys {
                    entries.sort_by(|a, b| a.0.cmp(b.0));
                }
                self.items(entries.into_iter(), ('{', '}'), depth, |w, (key, item)| {
                    w.string(key);
                    w.out.push_str(&w.style.key_separator);
                    w.value(item, depth + 1);
                });
            }
        }
    }

    fn items<T>(
        &mut self,
        items: impl ExactSizeIterator<Item = T>,
        (open, close): (char, char),
        depth: usize,
        mut write: impl FnMut(&mut Self, T),
    ) {
        self.out.push(open);
        let empty = items.len() == 0;
        for (i, item) in items.enumerate() {
            if i > 0 {
                self.out.push_str(&self.style.item_separator);
            }
            self.new_line(depth + 1);
            write(self, item);
        }
        if !empty {
            self.new_line(depth);
        }
        self.out.push(close);
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = &self.style.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn string(&mut self, s: &str) {
        self.out.push('"');
        for c in s.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.style.ensure_ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// A float as Python's `repr` writes it: shortest digits, an exponent of two digits at least from 1e16 on and below 1e-4.
pub fn float(x: f64) -> String {
    if x.is_nan() {
        return "NaN".to_owned();
    }
    if x.is_infinite() {
        return if x > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let magnitude = x.abs();
    if magnitude == 0.0 || (1e-4..1e16).contains(&magnitude) {
        return format!("{x:?}");
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |e| ('-', e));
    format!("{digits}e{sign}{exponent:0>2}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(value: Value, style: &Style, expected: &str) {
        assert_eq!(dumps(&value, style), expected);
    }

    #[test]
    fn plain_style_is_json_dumps_without_ascii() {
        let plain = Style::default();
        check(json!({"b": 1, "a": [true, null, -2, 1.0]}), &plain, r#"{"b": 1, "a": [true, null, -2, 1.0]}"#);
        check(json!("<b>'é&\u{1}\u{7f}\u{8}\u{c}\n\r\t\"\\"), &plain, "\"<b>'é&\\u0001\u{7f}\\b\\f\\n\\r\\t\\\"\\\\\"");
        check(json!([[], {}]), &plain, "[[], {}]");
        check(json!(18_446_744_073_709_551_615_u64), &plain, "18446744073709551615");
    }

    #[test]
    fn indent_ascii_and_sorting() {
        let indented = Style { indent: Some("  ".to_owned()), item_separator: ",".to_owned(), ..Style::default() };
        check(json!({"a": [1, 2], "b": {}}), &indented, "{\n  \"a\": [\n    1,\n    2\n  ],\n  \"b\": {}\n}");
        let ascii = Style { ensure_ascii: true, sort_keys: true, ..Style::default() };
        check(json!({"z": "é🙏\u{7f}", "a": 0}), &ascii, "{\"a\": 0, \"z\": \"\\u00e9\\ud83d\\ude4f\\u007f\"}");
    }

    #[test]
    fn floats_are_written_as_python_does() {
        for (x, expected) in [
            (0.1, "0.1"),
            (-0.0, "-0.0"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.25e-7, "1.25e-07"),
            (5e-324, "5e-324"),
            (f64::INFINITY, "Infinity"),
        ] {
            assert_eq!(float(x), expected);
        }
    }
}
