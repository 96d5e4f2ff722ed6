//! Text to graph IR: what [`crate::print`] prints, and what people write in tests. `;` begins a comment. Types of results
//! come from the ops' shape rules; a function's result types may be left out, and must be right where they stand.

mod function;
mod lexer;
mod module;
mod types;

use lexer::{Place, Token};

use crate::graph::{Function, Module};
use crate::op::{Op, ShapeError};

/// Why a text is no module or function, and where.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("line {line}, column {column}: {problem}")]
pub struct ParseError {
    /// The line, from 1.
    pub line: usize,
    /// The column, from 1.
    pub column: usize,
    /// What is wrong there.
    pub problem: Problem,
}

/// What is wrong with a text.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Problem {
    /// Something else was expected.
    #[error("found {found}, expected {expected}")]
    Unexpected {
        /// What stands there.
        found: String,
        /// What should.
        expected: String,
    },
    /// A name that stands for nothing.
    #[error("unknown {what} `{name}`")]
    Unknown {
        /// What it should name.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A name that stands for something already.
    #[error("{what} `{name}` is there already")]
    Duplicate {
        /// What it names.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A number that does not fit.
    #[error("`{0}` is out of range here")]
    Number(String),
    /// A quoted text without end.
    #[error("a quoted text does not end on its line")]
    OpenText,
    /// An escape that no text has.
    #[error("unknown escape `\\{0}`")]
    Escape(char),
    /// Types within types within types.
    #[error("bundles are nested too deeply")]
    TooDeep,
    /// An op does not take these operands.
    #[error("{op}: {error}")]
    Shape {
        /// The op.
        op: Op,
        /// What does not fit.
        error: ShapeError,
    },
    /// The number of names before `=` is not the number of results.
    #[error("{op} has {found} results, {named} are named")]
    Results {
        /// The op.
        op: Op,
        /// Results it has.
        found: usize,
        /// Names before the `=`.
        named: usize,
    },
    /// The types that the function declares are not those it returns.
    #[error("returns ({found}), declared ({declared})")]
    Returns {
        /// Types of the values returned.
        found: String,
        /// Types declared.
        declared: String,
    },
}

/// A whole module.
/// # Errors
/// [`ParseError`]: the first thing that is wrong.
pub fn module(text: &str) -> Result<Module, ParseError> {
    let mut parser = Parser::new(text)?;
    let module = parser.module()?;
    parser.expect_end()?;
    Ok(module)
}

/// One function that calls no other.
/// # Errors
/// [`ParseError`]: the first thing that is wrong.
pub fn function(text: &str) -> Result<Function, ParseError> {
    let mut parser = Parser::new(text)?;
    let function = parser.function(&[])?;
    parser.expect_end()?;
    Ok(function)
}

/// Tokens, and where among them we are.
struct Parser {
    tokens: Vec<(Token, Place)>,
    at: usize,
}

impl Parser {
    fn new(text: &str) -> Result<Self, ParseError> {
        Ok(Self { tokens: lexer::tokens(text)?, at: 0 })
    }

    fn peek(&self) -> &Token {
        &self.tokens[self.at].0
    }

    /// The token here; the end stays where it is.
    fn next(&mut self) -> Token {
        let token = self.peek().clone();
        self.at = (self.at + 1).min(self.tokens.len() - 1);
        token
    }

    /// `problem` at the token `at`.
    fn error_at(&self, at: usize, problem: Problem) -> ParseError {
        let Place { line, column } = self.tokens[at].1;
        ParseError { line, column, problem }
    }

    /// `problem` at the token before the current one.
    fn error(&self, problem: Problem) -> ParseError {
        self.error_at(self.at.saturating_sub(1), problem)
    }

    /// The error that `expected` should stand here.
    fn unexpected<T>(&self, expected: impl std::fmt::Display) -> Result<T, ParseError> {
        let problem = Problem::Unexpected { found: self.peek().to_string(), expected: expected.to_string() };
        Err(self.error_at(self.at, problem))
    }

    /// Takes `token` if it stands here.
    fn accept(&mut self, token: &Token) -> bool {
        let here = self.peek() == token;
        if here {
            self.next();
        }
        here
    }

    fn accept_sign(&mut self, sign: char) -> bool {
        self.accept(&Token::Sign(sign))
    }

    fn accept_word(&mut self, word: &str) -> bool {
        let here = matches!(self.peek(), Token::Word(w) if w == word);
        if here {
            self.next();
        }
        here
    }

    fn expect(&mut self, token: &Token) -> Result<(), ParseError> {
        if self.accept(token) { Ok(()) } else { self.unexpected(token) }
    }

    fn sign(&mut self, sign: char) -> Result<(), ParseError> {
        self.expect(&Token::Sign(sign))
    }

    fn keyword(&mut self, word: &str) -> Result<(), ParseError> {
        if self.accept_word(word) { Ok(()) } else { self.unexpected(format!("`{word}`")) }
    }

    fn expect_end(&mut self) -> Result<(), ParseError> {
        self.expect(&Token::End)
    }

    fn word(&mut self, what: &str) -> Result<String, ParseError> {
        match self.peek().clone() {
            Token::Word(w) => {
                self.next();
                Ok(w)
            }
            _ => self.unexpected(what),
        }
    }

    fn text(&mut self, what: &str) -> Result<String, ParseError> {
        match self.peek().clone() {
            Token::Text(t) => {
                self.next();
                Ok(t)
            }
            _ => self.unexpected(what),
        }
    }

    /// A number that `T` holds.
    fn number<T: std::str::FromStr>(&mut self) -> Result<T, ParseError> {
        match self.peek().clone() {
            Token::Number(n) => {
                self.next();
                n.parse().map_err(|_| self.error(Problem::Number(n)))
            }
            _ => self.unexpected("a number"),
        }
    }

    /// Items up to `close`, between commas; `open` has been taken.
    fn list<T>(
        &mut self,
        close: char,
        mut item: impl FnMut(&mut Self) -> Result<T, ParseError>,
    ) -> Result<Vec<T>, ParseError> {
        let mut items = Vec::new();
        while !self.accept_sign(close) {
            if !items.is_empty() {
                self.sign(',')?;
            }
            items.push(item(self)?);
        }
        Ok(items)
    }
}
