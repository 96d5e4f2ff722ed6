//! Tokens of kernel text.

use super::ParseError;

/// What a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// `%name`, without the `%`.
    Value,
    /// `@name`, without the `@`.
    Global,
    /// A keyword, an op, a type or a number.
    Word,
    /// One of `(){}[],=:<>*/+`.
    Punct,
    /// The text of a line `/// ...`.
    Doc,
    /// The end.
    End,
}

/// A piece of text and its line.
#[derive(Clone, Copy, Debug)]
pub(super) struct Token<'t> {
    pub kind: Kind,
    pub text: &'t str,
    pub line: usize,
}

impl std::fmt::Display for Token<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.kind {
            Kind::Value => write!(f, "%{}", self.text),
            Kind::Global => write!(f, "@{}", self.text),
            Kind::Doc => write!(f, "/// {}", self.text),
            Kind::End => f.write_str("the end"),
            Kind::Word | Kind::Punct => f.write_str(self.text),
        }
    }
}

/// Splits a text; the last token is [`Kind::End`].
pub(super) fn tokens(text: &str) -> Result<Vec<Token<'_>>, ParseError> {
    let mut tokens = Vec::new();
    let mut last = 1;
    for (i, whole) in text.lines().enumerate() {
        last = i + 1;
        let mut rest = whole.trim_start();
        while !rest.is_empty() && !rest.starts_with(';') {
            let (token, after) = token(rest, last)?;
            tokens.push(token);
            rest = after.trim_start();
        }
    }
    tokens.push(Token { kind: Kind::End, text: "", line: last });
    Ok(tokens)
}

fn token(rest: &str, line: usize) -> Result<(Token<'_>, &str), ParseError> {
    if let Some(doc) = rest.strip_prefix("///") {
        let text = doc.strip_prefix(' ').unwrap_or(doc);
        return Ok((Token { kind: Kind::Doc, text, line }, ""));
    }
    let first = rest.chars().next().unwrap_or(' ');
    let (kind, skip, len) = match first {
        '%' => (Kind::Value, 1, name_len(&rest[1..])),
        '@' => (Kind::Global, 1, name_len(&rest[1..])),
        '(' | ')' | '{' | '}' | '[' | ']' | ',' | '=' | ':' | '<' | '>' | '*' | '/' | '+' => (Kind::Punct, 0, 1),
        '-' => (Kind::Word, 0, 1 + number_len(&rest[1..])),
        '0'..='9' => (Kind::Word, 0, number_len(rest)),
        _ => (Kind::Word, 0, name_len(rest)),
    };
    if len == 0 {
        let expected = "a name, a number or one of `(){}[],=:<>*/+`";
        return Err(ParseError::Syntax { line, found: first.to_string(), expected });
    }
    let (text, after) = rest[skip..].split_at(len);
    Ok((Token { kind, text, line }, after))
}

/// Bytes of a name: all of its characters are ASCII.
fn name_len(text: &str) -> usize {
    text.bytes().take_while(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.')).count()
}

/// Bytes of a number: as a name, and a sign behind the `e` of a decimal exponent.
fn number_len(text: &str) -> usize {
    let len = name_len(text);
    let signed = text[..len].ends_with('e') && !text.starts_with("0x") && text[len..].starts_with(['-', '+']);
    if signed { len + 1 + name_len(&text[len + 1..]) } else { len }
}
