//! What a chat needs of a model: one sequence that is fed, goes back, and is written to files.

use std::io::{self, Read, Write};

use crate::artifact::Artifact;
use crate::engine::{Engine, EngineOptions, LogitRows};
use crate::error::Error;
use crate::generate::ModelError;
use crate::snapshot::Snapshot;
use crate::state::SequenceId;

/// A model with one sequence.
pub trait ChatModel {
    /// The most tokens the sequence may hold.
    fn max_context(&self) -> usize;
    /// Token ids are below this.
    fn vocab_size(&self) -> usize;
    /// What the model is called.
    fn name(&self) -> &str;
    /// Identifies code and weights.
    fn fingerprint(&self) -> &str;
    /// Appends at least one token and gives the logits after the last.
    /// # Errors
    /// If memory is lacking.
    fn feed(&mut self, tokens: &[u32]) -> Result<&[f32], ModelError>;
    /// Remembers the sequence as it is.
    /// # Errors
    /// If it cannot be read.
    fn snapshot(&self) -> Result<Snapshot, ModelError>;
    /// Goes back to a snapshot; the tokens until then must be the same.
    /// # Errors
    /// If the snapshot does not fit.
    fn restore(&mut self, snapshot: &Snapshot) -> Result<(), ModelError>;
    /// Goes back to the beginning.
    /// # Errors
    /// If the sequence is lost.
    fn rewind(&mut self) -> Result<(), ModelError>;
    /// Bytes of the state of `tokens` tokens.
    fn state_bytes(&self, tokens: usize) -> u64;
    /// Writes the state.
    /// # Errors
    /// The writer's.
    fn write_state(&self, out: &mut dyn Write) -> io::Result<()>;
    /// Reads a state of `tokens` tokens.
    /// # Errors
    /// The reader's.
    fn read_state(&mut self, tokens: usize, input: &mut dyn Read) -> io::Result<()>;
}

/// An engine with its one sequence.
pub(crate) struct EngineModel {
    engine: Engine,
    sequence: SequenceId,
    logits: Vec<f32>,
}

impl EngineModel {
    /// Opens an executable.
    /// # Errors
    /// [`Error`] says what is wrong.
    pub fn open(artifact: Artifact, threads: usize, step_tokens: usize) -> Result<Self, Error> {
        let options = EngineOptions { threads, sequences: 1, step_tokens, random_weights: false };
        let mut engine = Engine::new(artifact, &options)?;
        let sequence = engine.new_sequence()?;
        Ok(Self { engine, sequence, logits: Vec::new() })
    }
}

impl ChatModel for EngineModel {
    fn max_context(&self) -> usize {
        self.engine.metadata().model.max_context as usize
    }

    fn vocab_size(&self) -> usize {
        self.engine.metadata().model.vocab_size as usize
    }

    fn name(&self) -> &str {
        &self.engine.metadata().model.name
    }

    fn fingerprint(&self) -> &str {
        &self.engine.metadata().fingerprint
    }

    fn feed(&mut self, tokens: &[u32]) -> Result<&[f32], ModelError> {
        let output = self.engine.forward(&[(self.sequence, tokens)], LogitRows::Last)?;
        self.logits.clear();
        output.logits.iter().for_each(|row| self.logits.extend_from_slice(row));
        Ok(&self.logits)
    }

    fn snapshot(&self) -> Result<Snapshot, ModelError> {
        Ok(self.engine.snapshot(self.sequence)?)
    }

    fn restore(&mut self, snapshot: &Snapshot) -> Result<(), ModelError> {
        Ok(self.engine.restore(self.sequence, snapshot)?)
    }

    fn rewind(&mut self) -> Result<(), ModelError> {
        Ok(self.engine.rewind(self.sequence)?)
    }

    fn state_bytes(&self, tokens: usize) -> u64 {
        self.engine.state_bytes(tokens as u64)
    }

    fn write_state(&self, out: &mut dyn Write) -> io::Result<()> {
        self.engine.write_state(self.sequence, out)
    }

    fn read_state(&mut self, tokens: usize, input: &mut dyn Read) -> io::Result<()> {
        self.engine.read_state(self.sequence, tokens as u64, input)
    }
}
