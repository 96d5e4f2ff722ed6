//! What a chat needs of a model beyond feeding it: one sequence that goes back, and is written to files.

use std::io::{self, Read, Write};

use crate::error::Error;
use crate::generate::{Forward, ModelError, Run, Sequence};
use crate::lag::{Lag, SavedLag};
use crate::snapshot::Snapshot;
use crate::state::SequenceId;
use crate::text::Model;

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

    /// What the draft lags behind: nothing, where drafts are not wanted.
    fn lag(&self) -> Lag {
        self.model.lags.get(&self.sequence).cloned().unwrap_or_default()
    }

    fn save_lag(&self) -> Result<SavedLag, Error> {
        SavedLag::of(&self.lag(), &self.model.engine, self.id())
    }

    fn restore_lag(&mut self, saved: &SavedLag) -> Result<(), Error> {
        let lag = saved.restore(&mut self.model.engine, SequenceId(self.sequence.0))?;
        self.model.lags.insert(self.sequence, lag);
        Ok(())
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
    type Kept = (Snapshot, SavedLag);

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
        let bytes = snapshot.bytes.len() as u64 + SavedLag::bytes(&self.lag(), &self.model.engine);
        Ok(((snapshot, self.save_lag()?), bytes))
    }

    fn go_back(&mut self, (snapshot, lag): &Self::Kept) -> Result<(), ModelError> {
        self.restore_lag(lag)?;
        Ok(self.model.engine.restore(self.id(), snapshot)?)
    }

    fn rewind(&mut self) -> Result<(), ModelError> {
        self.model.lags.remove(&self.sequence);
        Ok(self.model.engine.rewind(self.id())?)
    }

    fn state_bytes(&self) -> u64 {
        let tokens = self.model.engine.tokens(self.id()).unwrap_or(0);
        self.model.engine.state_bytes(tokens) + SavedLag::bytes(&self.lag(), &self.model.engine)
    }

    fn write_state(&self, out: &mut dyn Write) -> io::Result<()> {
        self.save_lag().map_err(io::Error::other)?.write(out)?;
        self.model.engine.write_state(self.id(), out)
    }

    fn read_state(&mut self, tokens: usize, input: &mut dyn Read) -> io::Result<()> {
        let lag = SavedLag::read(input, self.model.engine.states.kept.row_bytes)?;
        self.model.engine.read_state(self.id(), tokens as u64, input)?;
        self.restore_lag(&lag).map_err(io::Error::other)
    }
}
