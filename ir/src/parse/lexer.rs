//! Text to tokens.

use super::{ParseError, Problem};
use crate::print::is_name_char;

/// A piece of text.
#[derive(Clone, Debug, PartialEq)]
pub enum Token {
    /// A keyword, an op, an attribute's name.
    Word(String),
    /// A number as written.
    Number(String),
    /// A quoted text, without the quotes.
    Text(String),
    /// `%name`.
    Value(String),
    /// `@name`.
    Function(String),
    /// `->`
    Arrow,
    /// `..`
    Range,
    /// Any other sign.
    Sign(char),
    /// The end of the text.
    End,
}

impl std::fmt::Display for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Word(w) | Self::Number(w) => write!(f, "`{w}`"),
            Self::Text(t) => write!(f, "{t:?}"),
            Self::Value(v) => write!(f, "`%{v}`"),
            Self::Function(v) => write!(f, "`@{v}`"),
            Self::Arrow => f.write_str("`->`"),
            Self::Range => f.write_str("`..`"),
            Self::Sign(c) => write!(f, "`{c}`"),
            Self::End => f.write_str("the end of the text"),
        }
    }
}

/// Where a token stands; lines and columns count from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The line.
    pub line: usize,
    /// The column.
    pub column: usize,
}

/// All tokens of a text, ending in [`Token::End`].
pub fn tokens(text: &str) -> Result<Vec<(Token, Place)>, ParseError> {
    let mut lexer = Lexer { chars: text.chars().collect(), at: 0, place: Place { line: 1, column: 1 } };
    let mut tokens = Vec::new();
    loop {
        lexer.skip_blank();
        let place = lexer.place;
        let token = lexer.token().map_err(|problem| ParseError { line: place.line, column: place.column, problem })?;
        let done = token == Token::End;
        tokens.push((token, place));
        if done {
            return Ok(tokens);
        }
    }
}

struct Lexer {
    chars: Vec<char>,
    at: usize,
    place: Place,
}

impl Lexer {
    fn peek(&self, ahead: usize) -> char {
        self.chars.get(self.at + ahead).copied().unwrap_or('\0')
    }

    fn next(&mut self) -> Option<char> {
        let c = *self.chars.get(self.at)?;
        self.at += 1;
        self.place = match c {
            '\n' => Place { line: self.place.line + 1, column: 1 },
            _ => Place { column: self.place.column + 1, ..self.place },
        };
        Some(c)
    }

    fn take_while(&mut self, accept: impl Fn(char) -> bool) -> String {
        let mut taken = String::new();
        while self.at < self.chars.len() && accept(self.peek(0)) {
            taken.extend(self.next());
        }
        taken
    }

    /// Skips blanks, and comments from `;` to the end of the line.
    fn skip_blank(&mut self) {
        loop {
            self.take_while(char::is_whitespace);
            if self.peek(0) != ';' {
                return;
            }
            self.take_while(|c| c != '\n');
        }
    }

    fn token(&mut self) -> Result<Token, Problem> {
        let (c, after) = (self.peek(0), self.peek(1));
        match c {
            _ if self.at >= self.chars.len() => Ok(Token::End),
            '"' => Ok(Token::Text(self.text()?)),
            '%' if is_name_char(after) => Ok(Token::Value(self.name())),
            '@' if is_name_char(after) => Ok(Token::Function(self.name())),
            '@' if after == '"' => {
                self.next();
                Ok(Token::Function(self.text()?))
            }
            '-' if after == '>' => Ok(self.two(Token::Arrow)),
            '.' if after == '.' => Ok(self.two(Token::Range)),
            '-' if after.is_ascii_digit() || after == 'i' => Ok(Token::Number(self.number())),
            '0'..='9' => Ok(Token::Number(self.number())),
            c if c.is_ascii_alphabetic() || c == '_' => Ok(Token::Word(self.take_while(is_name_char))),
            c => {
                self.next();
                Ok(Token::Sign(c))
            }
        }
    }

    fn two(&mut self, token: Token) -> Token {
        self.next();
        self.next();
        token
    }

    /// The name after a sigil.
    fn name(&mut self) -> String {
        self.next();
        self.take_while(is_name_char)
    }

    /// Digits, a fraction, an exponent; or `-inf`. A `.` counts only before a digit, so that `0..8` is a range.
    fn number(&mut self) -> String {
        let mut text = String::new();
        if self.peek(0) == '-' {
            text.extend(self.next());
        }
        if self.peek(0) == 'i' {
            return text + &self.take_while(|c| c.is_ascii_alphabetic());
        }
        text += &self.take_while(|c| c.is_ascii_digit());
        if self.peek(0) == '.' && self.peek(1).is_ascii_digit() {
            text.extend(self.next());
            text += &self.take_while(|c| c.is_ascii_digit());
        }
        let signed = usize::from(matches!(self.peek(1), '+' | '-'));
        if self.peek(0) == 'e' && self.peek(1 + signed).is_ascii_digit() {
            (0..=signed).for_each(|_| text.extend(self.next()));
            text += &self.take_while(|c| c.is_ascii_digit());
        }
        text
    }

    /// A quoted text with the escapes that Rust prints.
    fn text(&mut self) -> Result<String, Problem> {
        self.next();
        let mut text = String::new();
        loop {
            match self.next() {
                Some('"') => return Ok(text),
                Some('\\') => text.push(self.escape()?),
                Some(c) if c != '\n' => text.push(c),
                _ => return Err(Problem::OpenText),
            }
        }
    }

    fn escape(&mut self) -> Result<char, Problem> {
        match self.next() {
            Some('n') => Ok('\n'),
            Some('r') => Ok('\r'),
            Some('t') => Ok('\t'),
            Some('0') => Ok('\0'),
            Some(c @ ('\\' | '"' | '\'')) => Ok(c),
            Some('u') => {
                self.next();
                let digits = self.take_while(|c| c.is_ascii_hexdigit());
                self.next();
                u32::from_str_radix(&digits, 16).ok().and_then(char::from_u32).ok_or(Problem::Escape('u'))
            }
            c => Err(Problem::Escape(c.unwrap_or('\0'))),
        }
    }
}
