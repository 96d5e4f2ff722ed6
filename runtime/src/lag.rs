//! What the draft of a sequence has not been fed yet: it is fed the hidden row of a position with the token after it, so it lags behind
//! the model by one token at least. The rows themselves stay on the device ([`crate::kept`]).

use std::io::{self, Read, Write};

use crate::engine::Engine;
use crate::engine::draft::{DraftInput, HiddenRows};
use crate::error::Error;
use crate::generate::Sequence;
use crate::kept::KEPT_ROWS;
use crate::state::SequenceId;

/// Hidden rows that a sequence's draft lags behind.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Lag {
    /// Position of the first.
    pub position: u64,
    /// How many the device keeps.
    pub rows: usize,
    /// The token after each of them; after the last it may not be known yet.
    pub next: Vec<u32>,
}

impl Lag {
    /// The model was fed `tokens` from `position` on, and their rows are kept.
    pub fn extend(&mut self, position: u64, tokens: &[u32]) {
        if self.rows == 0 {
            self.position = position;
        }
        self.next.extend_from_slice(&tokens[usize::from(self.rows == 0)..]);
        self.rows += tokens.len();
    }

    /// The first `count` rows as the draft is fed them.
    pub fn input(&self, sequence: Sequence, count: usize) -> DraftInput<'_> {
        DraftInput {
            sequence: SequenceId(sequence.0),
            position: self.position,
            tokens: &self.next[..count],
            hidden: HiddenRows::Kept,
        }
    }

    /// The draft has been fed the first `count` rows.
    pub fn forget(&mut self, count: usize) {
        self.position += count as u64;
        self.rows -= count;
        self.next.drain(..count);
    }

    /// Only the first `rows` rows are the sequence's own.
    pub fn truncate(&mut self, rows: usize) {
        self.rows = rows;
        self.next.truncate(rows.saturating_sub(1));
    }
}

/// A lag with its rows, away from the device.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct SavedLag {
    lag: Lag,
    hidden: Vec<u8>,
}

/// Position, number of rows, number of following tokens.
const HEAD_BYTES: usize = 24;

impl SavedLag {
    /// Bytes that [`SavedLag::write`] writes of a lag.
    pub fn bytes(lag: &Lag, engine: &Engine) -> u64 {
        HEAD_BYTES as u64 + 4 * lag.next.len() as u64 + lag.rows as u64 * engine.states.kept.row_bytes
    }

    /// Copies the rows of a sequence.
    /// # Errors
    /// [`Error::Step`] if it has ended, or the device's.
    pub fn of(lag: &Lag, engine: &Engine, sequence: SequenceId) -> Result<Self, Error> {
        let hidden = engine.read_hidden(sequence, lag.position, lag.rows as u64)?;
        Ok(Self { lag: lag.clone(), hidden })
    }

    /// Puts the rows of a sequence back.
    /// # Errors
    /// As [`SavedLag::of`].
    pub fn restore(&self, engine: &mut Engine, sequence: SequenceId) -> Result<Lag, Error> {
        engine.write_hidden(sequence, self.lag.position, self.lag.rows as u64, &self.hidden)?;
        Ok(self.lag.clone())
    }

    /// Writes it.
    /// # Errors
    /// The writer's.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        for number in [self.lag.position, self.lag.rows as u64, self.lag.next.len() as u64] {
            out.write_all(&number.to_le_bytes())?;
        }
        out.write_all(bytemuck::cast_slice(&self.lag.next))?;
        out.write_all(&self.hidden)
    }

    /// Reads what [`SavedLag::write`] wrote, of rows of `row_bytes`.
    /// # Errors
    /// The reader's, and invalid data for what no draft lags behind.
    pub fn read(input: &mut dyn Read, row_bytes: u64) -> io::Result<Self> {
        let mut head = [0; HEAD_BYTES];
        input.read_exact(&mut head)?;
        let number = |i: usize| u64::from_le_bytes(std::array::from_fn(|b| head[i * 8 + b]));
        let (position, rows, next) = (number(0), number(1), number(2));
        if rows > KEPT_ROWS || next != rows.saturating_sub(1) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "more than a draft lags behind"));
        }
        let (mut next, mut hidden) = (vec![0; next as usize], vec![0; (rows * row_bytes) as usize]);
        input.read_exact(bytemuck::cast_slice_mut(&mut next))?;
        input.read_exact(&mut hidden)?;
        Ok(Self { lag: Lag { position, rows: rows as usize, next }, hidden })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_wait_for_the_token_after_them() {
        let mut lag = Lag::default();
        lag.extend(7, &[1, 2, 3]);
        assert_eq!(lag, Lag { position: 7, rows: 3, next: vec![2, 3] });
        lag.extend(10, &[4]);
        assert_eq!(lag, Lag { position: 7, rows: 4, next: vec![2, 3, 4] });
        lag.forget(2);
        assert_eq!(lag, Lag { position: 9, rows: 2, next: vec![4] });
        lag.truncate(1);
        assert_eq!(lag, Lag { position: 9, rows: 1, next: vec![] });
    }

    #[test]
    fn a_saved_lag_comes_back_and_a_wrong_one_is_refused() {
        let lag = Lag { position: 3, rows: 2, next: vec![9] };
        let saved = SavedLag { lag, hidden: (0..32).collect() };
        let mut bytes = Vec::new();
        saved.write(&mut bytes).unwrap();
        assert_eq!(SavedLag::read(&mut bytes.as_slice(), 16).unwrap(), saved);
        assert!(SavedLag::read(&mut &bytes[..40], 16).is_err());
        bytes[8] = 200;
        let error = SavedLag::read(&mut bytes.as_slice(), 16).unwrap_err();
        assert_eq!(error.to_string(), "more than a draft lags behind");
    }
}
