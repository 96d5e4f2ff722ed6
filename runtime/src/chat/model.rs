//! What a chat needs of a model beyond feeding it: one sequence that goes back, and is written to files.

use std::io::{self, Read, Write};

use crate::error::Error;
use crate::generate::{Forward, ModelError, Run, Sequence};
use crate::snapshot::Snapshot;
use crate::state::SequenceId;
use crate::text::{Lag, Model};

/// A model with one sequence.
pub trait ChatModel: Forward {
    /// A sequence as it was at some length.
    type Kept;
    /// The sequence.
    fn sequence(&self) -> Sequence;
    /// What the model is called.
    fn name(&self) -> &str;
    /// Identifies code and weights.
    fn fingerprint(&self) -> &str;
    /// Remembers the sequence as it is; says how many bytes that takes.
    /// # Errors
    /// If it cannot be read.
    fn keep(&self) -> Result<(Self::Kept, u64), ModelError>;
    /// Goes back; the tokens until then must be the same.
    /// # Errors
    /// If it does not fit.
    fn go_back(&mut self, kept: &Self::Kept) -> Result<(), ModelError>;
    /// Goes back to the beginning.
    /// # Errors
    /// If the sequence is lost.
    fn rewind(&mut self) -> Result<(), ModelError>;
    /// Bytes of the sequence's state.
    fn state_bytes(&self) -> u64;
    /// Writes the state.
    /// # Errors
    /// The writer's.
    fn write_state(&self, out: &mut dyn Write) -> io::Result<()>;
    /// Reads a state of `tokens` tokens.
    /// # Errors
    /// The reader's.
    fn read_state(&mut self, tokens: usize, input: &mut dyn Read) -> io::Result<()>;
}

/// A model that has begun its sequence.
pub(crate) struct OneSequence {
    model: Model,
    sequence: Sequence,
}

impl OneSequence {
    /// Begins the sequence.
    /// # Errors
    /// [`Error`] if there is no room for one.
    pub fn begin(mut model: Model) -> Result<Self, Error> {
        let sequence = Sequence(model.engine.new_sequence()?.0);
        Ok(Self { model, sequence })
    }

    fn id(&self) -> SequenceId {
        SequenceId(self.sequence.0)
    }

    fn lag(&self) -> Option<&Lag> {
        self.model.lags.get(&self.sequence)
    }

    fn set_lag(&mut self, lag: Option<Lag>) {
        match lag {
            Some(lag) => self.model.lags.insert(self.sequence, lag),
            None => self.model.lags.remove(&self.sequence),
        };
    }
}

impl Forward for OneSequence {
    fn vocab_size(&self) -> usize {
        self.model.vocab_size()
    }

    fn max_context(&self) -> usize {
        self.model.max_context()
    }

    fn eos_token_ids(&self) -> Vec<u32> {
        self.model.eos_token_ids()
    }

    fn begin(&mut self) -> Result<Sequence, ModelError> {
        self.model.begin()
    }

    fn end(&mut self, sequence: Sequence) {
        self.model.end(sequence);
    }

    fn forward(&mut self, runs: &[Run<'_>]) -> Result<Vec<u32>, ModelError> {
        self.model.forward(runs)
    }

    fn forward_all(&mut self, run: Run<'_>) -> Result<Option<u32>, ModelError> {
        self.model.forward_all(run)
    }

    fn keep_logits(&mut self) {
        self.model.keep_logits();
    }

    fn logits(&self, row: usize) -> &[f32] {
        self.model.logits(row)
    }

    fn drafter(&mut self) -> Option<&mut dyn crate::generate::Drafter> {
        self.model.drafter()
    }
}

impl ChatModel for OneSequence {
    /// States, and what the draft lags behind.
    type Kept = (Snapshot, Option<Lag>);

    fn sequence(&self) -> Sequence {
        self.sequence
    }

    fn name(&self) -> &str {
        &self.model.engine.metadata().model.name
    }

    fn fingerprint(&self) -> &str {
        &self.model.engine.metadata().fingerprint
    }

    fn keep(&self) -> Result<(Self::Kept, u64), ModelError> {
        let snapshot = self.model.engine.snapshot(self.id())?;
        let bytes = snapshot.bytes.len() as u64 + lag_bytes(self.lag());
        Ok(((snapshot, self.lag().cloned()), bytes))
    }

    fn go_back(&mut self, (snapshot, lag): &Self::Kept) -> Result<(), ModelError> {
        self.set_lag(lag.clone());
        Ok(self.model.engine.restore(self.id(), snapshot)?)
    }

    fn rewind(&mut self) -> Result<(), ModelError> {
        self.set_lag(None);
        Ok(self.model.engine.rewind(self.id())?)
    }

    fn state_bytes(&self) -> u64 {
        let tokens = self.model.engine.tokens(self.id()).unwrap_or(0);
        self.model.engine.state_bytes(tokens) + lag_bytes(self.lag())
    }

    fn write_state(&self, out: &mut dyn Write) -> io::Result<()> {
        write_lag(self.lag(), out)?;
        self.model.engine.write_state(self.id(), out)
    }

    fn read_state(&mut self, tokens: usize, input: &mut dyn Read) -> io::Result<()> {
        let lag = read_lag(input, self.model.engine.metadata().model.hidden_size)?;
        self.set_lag(lag);
        self.model.engine.read_state(self.id(), tokens as u64, input)
    }
}

/// Position, number of following tokens, number of floats.
const LAG_HEAD_BYTES: usize = 24;

fn lag_bytes(lag: Option<&Lag>) -> u64 {
    let data = lag.map_or(0, |lag| 4 * (lag.next.len() + lag.hidden.len()));
    (LAG_HEAD_BYTES + data) as u64
}

fn write_lag(lag: Option<&Lag>, out: &mut dyn Write) -> io::Result<()> {
    let none = Lag::default();
    let lag = lag.unwrap_or(&none);
    for number in [lag.position, lag.next.len() as u64, lag.hidden.len() as u64] {
        out.write_all(&number.to_le_bytes())?;
    }
    out.write_all(bytemuck::cast_slice(&lag.next))?;
    out.write_all(bytemuck::cast_slice(&lag.hidden))
}

fn read_lag(input: &mut dyn Read, width: u64) -> io::Result<Option<Lag>> {
    let mut head = [0; LAG_HEAD_BYTES];
    input.read_exact(&mut head)?;
    let number = |i: usize| u64::from_le_bytes(std::array::from_fn(|b| head[i * 8 + b]));
    let (position, next, hidden) = (number(0), number(1), number(2));
    let rows = hidden / width.max(1);
    if rows * width != hidden || next != rows.saturating_sub(1) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "what the draft lags behind is no whole rows"));
    }
    let mut bytes = Vec::new();
    input.take(next.saturating_add(hidden).saturating_mul(4)).read_to_end(&mut bytes)?;
    let words: Vec<u32> = bytes.chunks_exact(4).map(|b| u32::from_le_bytes(std::array::from_fn(|i| b[i]))).collect();
    if words.len() as u64 != next + hidden {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let (next, hidden) = words.split_at(next as usize);
    let hidden: Vec<f32> = hidden.iter().map(|&x| f32::from_bits(x)).collect();
    Ok((!hidden.is_empty()).then(|| Lag { position, hidden, next: next.to_vec() }))
}
