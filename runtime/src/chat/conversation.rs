//! Messages as text and token ids, such that tokens which the model wrote stay the tokens it wrote.
//!
//! The whole conversation is rendered by the model's template for every turn. Text that was fed before keeps its ids: encoding
//! an answer's text again may give other tokens than the model chose.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json, json};

use super::error::ChatError;
use super::session::Prompt;
use crate::template::{Chat, ChatTemplate};
use crate::tokenizer::{Special, Tokenizer};

/// Text and the ids it was fed as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// The text.
    pub text: String,
    /// Its ids.
    pub ids: Vec<u32>,
}

/// What has been said.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Conversation {
    /// The system message.
    pub system: Option<String>,
    /// Messages of user and assistant in turn.
    pub messages: Vec<Json>,
    /// The text of the last rendering and answer, in pieces.
    pieces: Vec<Piece>,
    /// Further variables of the template.
    variables: Map<String, Json>,
}

/// The beginning and the end of thoughts.
pub const THINK: [&str; 2] = ["<think>", "</think>"];

impl Conversation {
    /// An empty conversation.
    pub fn new(system: Option<String>, variables: Map<String, Json>) -> Self {
        Self { system, variables, ..Self::default() }
    }

    /// Adds a message of the user.
    pub fn ask(&mut self, text: &str) {
        self.messages.push(json!({"role": "user", "content": text}));
    }

    /// Takes back the last message of the user, and what answered it; false if there is none.
    pub fn undo(&mut self) -> bool {
        let last = self.messages.iter().rposition(|m| m["role"] == "user");
        last.inspect(|&at| self.messages.truncate(at)).is_some()
    }

    /// Forgets all messages.
    pub fn reset(&mut self) {
        self.messages.clear();
        self.pieces.clear();
    }

    /// The whole conversation up to where the next answer begins, and whether that begins with thoughts.
    /// # Errors
    /// [`ChatError`] if template or tokenizer refuse.
    pub fn prompt(&mut self, template: &ChatTemplate, tokenizer: &Tokenizer) -> Result<(Prompt, bool), ChatError> {
        let text = self.render(template, true)?;
        let thinking = text.trim_end().ends_with(THINK[0]);
        // a template may refuse to end without an answer: then there is no such place
        let before = self.render(template, false).ok().filter(|before| text.starts_with(before.as_str()));
        let mut pieces = self.pieces_of(&text, tokenizer)?;
        let mut stable = 0;
        if let Some(before) = before {
            let split = self.pieces_of(&before, tokenizer)?;
            let (all, first) = (ids_of(&pieces), ids_of(&split));
            if all.starts_with(&first) {
                stable = first.len();
                pieces = split;
                push_piece(&mut pieces, &text[before.len()..], all[stable..].to_vec());
            }
        }
        let tokens = ids_of(&pieces);
        self.pieces = pieces;
        Ok((Prompt { tokens, stable }, thinking))
    }

    /// Adds an answer to the last prompt. `thinking`: it ended within thoughts.
    /// # Errors
    /// [`ChatError::Tokenizer`] if its ids have no text.
    pub fn answer(&mut self, ids: &[u32], thinking: bool, tokenizer: &Tokenizer) -> Result<(), ChatError> {
        let text = tokenizer.decode(ids, Special::Keep)?;
        push_piece(&mut self.pieces, &text, ids.to_vec());
        let content = if thinking { format!("{text}\n{}\n\n", THINK[1]) } else { text };
        self.messages.push(json!({"role": "assistant", "content": content}));
        Ok(())
    }

    /// True if the next turn goes on from all text so far; false if the template writes earlier turns anew.
    pub fn goes_on(&self, template: &ChatTemplate) -> bool {
        let mut next = self.clone();
        next.ask("x");
        let said: String = self.pieces.iter().map(|p| p.text.as_str()).collect();
        next.render(template, true).is_ok_and(|text| text.starts_with(&said))
    }

    /// Ids of the conversation, as far as they were fed or answered before.
    pub fn known(&self, template: &ChatTemplate) -> Vec<u32> {
        let text = self.render(template, false).unwrap_or_default();
        ids_of(&self.pieces[..self.fitting(&text).0])
    }

    fn render(&self, template: &ChatTemplate, add_generation_prompt: bool) -> Result<String, ChatError> {
        let system = self.system.iter().map(|text| json!({"role": "system", "content": text}));
        let messages = system.chain(self.messages.iter().cloned()).collect();
        let chat = Chat { messages, add_generation_prompt, variables: self.variables.clone(), ..Chat::default() };
        Ok(template.render(&chat)?)
    }

    /// `text` in pieces: those of before as far as they fit, then the rest.
    fn pieces_of(&self, text: &str, tokenizer: &Tokenizer) -> Result<Vec<Piece>, ChatError> {
        let (fitting, rest) = self.fitting(text);
        let mut pieces = self.pieces[..fitting].to_vec();
        let ids = tokenizer.encode(rest)?;
        push_piece(&mut pieces, rest, ids);
        Ok(pieces)
    }

    /// How many pieces `text` begins with, and what comes after them.
    fn fitting<'t>(&self, text: &'t str) -> (usize, &'t str) {
        let mut rest = text;
        for (i, piece) in self.pieces.iter().enumerate() {
            let Some(after) = rest.strip_prefix(piece.text.as_str()) else { return (i, rest) };
            rest = after;
        }
        (self.pieces.len(), rest)
    }
}

fn push_piece(pieces: &mut Vec<Piece>, text: &str, ids: Vec<u32>) {
    if !ids.is_empty() {
        pieces.push(Piece { text: text.to_owned(), ids });
    }
}

fn ids_of(pieces: &[Piece]) -> Vec<u32> {
    pieces.iter().flat_map(|p| p.ids.iter().copied()).collect()
}
