//! What the whole-program tests share: golden files, the gate that outputs must pass, and the subjects that produce outputs.

#![allow(dead_code, reason = "each test binary uses its part")]

pub mod exe;
pub mod golden;
pub mod interpreter;
pub mod terminal;

/// How a subject is fed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feed {
    /// Whole sequences, in one ragged step.
    Prefill,
    /// In ragged steps of at most this many tokens a sequence.
    Pieces(usize),
    /// Token by token.
    Decode,
}

/// Logits of one sequence.
pub struct Rows {
    /// `[T, vocab_size]`.
    pub logits: Vec<f32>,
    /// `[T, K, vocab_size]`, empty without drafts.
    pub mtp: Vec<f32>,
}

/// Something that computes logits: an interpreter, or an executable.
pub trait Subject {
    /// Logits of every token of every sequence, and of `drafts` drafts after each.
    fn logits(&self, sequences: &[Vec<i32>], feed: Feed, drafts: usize) -> Vec<Rows>;
}

/// The index of the largest element, the lowest among equals.
pub fn argmax(row: &[f32]) -> usize {
    let mut best = 0;
    for (i, &x) in row.iter().enumerate() {
        if x > row[best] {
            best = i;
        }
    }
    best
}
