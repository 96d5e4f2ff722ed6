//! What one sequence carries, as bytes: snapshots of its slot to go back to, and all of it to be written to a file.
//!
//! A snapshot holds what cannot be taken back otherwise: convolution windows and delta matrices, with what
//! tentative tokens left there. KV is kept by length, so a
//! sequence goes back to a snapshot only while it holds the tokens that were fed until then.

use std::io::{self, Read, Write};

use nextc_abi::StateKind;

use crate::engine::Engine;
use crate::error::Error;
use crate::state::{Sequence, SequenceId, States};

/// The recurrent states of a sequence at some length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Tokens that the sequence had been fed.
    pub tokens: u64,
    /// How many of them the next step must do first, as they were tentative.
    pub replay: u32,
    /// The bytes of its slot, state after state.
    pub bytes: Vec<u8>,
}

/// A run of bytes of a state.
struct Span {
    state: usize,
    at: u64,
    bytes: u64,
}

impl States {
    /// The slot of a sequence: one span for each state that is not KV.
    fn slot_spans(&self, id: SequenceId) -> Result<Vec<Span>, Error> {
        let slot = u64::from(self.get(id)?.slot);
        let states = self.kinds.iter().enumerate().filter(|(_, (kind, _))| *kind != StateKind::Kv);
        Ok(states.map(|(state, &(_, bytes))| Span { state, at: slot * bytes, bytes }).collect())
    }

    /// Everything of a sequence of `tokens` tokens: for each state its slot, or its pages in order.
    fn all_spans(&self, id: SequenceId, tokens: u64) -> Result<Vec<Span>, Error> {
        let sequence = self.get(id)?;
        let used = usize::try_from(tokens.div_ceil(self.page_tokens)).unwrap_or(usize::MAX);
        let mut spans = Vec::new();
        for (state, &(kind, bytes)) in self.kinds.iter().enumerate() {
            match kind {
                StateKind::Kv => {
                    let bytes = bytes * self.page_tokens;
                    let pages = sequence.pages.iter().take(used);
                    spans.extend(pages.map(|&page| Span { state, at: u64::from(page) * bytes, bytes }));
                }
                StateKind::Conv | StateKind::Delta => {
                    spans.push(Span { state, at: u64::from(sequence.slot) * bytes, bytes });
                }
            }
        }
        Ok(spans)
    }
}

impl Engine {
    /// Takes a snapshot of a sequence.
    /// # Errors
    /// [`Error::Step`] if it has ended, or the device's.
    pub fn snapshot(&self, sequence: SequenceId) -> Result<Snapshot, Error> {
        let spans = self.states.slot_spans(sequence)?;
        let mut bytes = vec![0; spans.iter().map(|s| s.bytes as usize).sum()];
        let mut rest = bytes.as_mut_slice();
        for span in &spans {
            let (part, after) = rest.split_at_mut(span.bytes as usize);
            self.device.read_state(span.state, span.at, part)?;
            rest = after;
        }
        let &Sequence { tokens, replay, .. } = self.states.get(sequence)?;
        Ok(Snapshot { tokens, replay, bytes })
    }

    /// Takes a sequence back to a snapshot of it. Its first `snapshot.tokens` tokens must be the same as then.
    /// # Errors
    /// [`Error::Step`] if the sequence has ended, is shorter, or the snapshot is of another model.
    pub fn restore(&mut self, sequence: SequenceId, snapshot: &Snapshot) -> Result<(), Error> {
        let spans = self.states.slot_spans(sequence)?;
        if self.states.tokens(sequence)? < snapshot.tokens {
            return Err(Error::Step("the snapshot is ahead of its sequence"));
        }
        if spans.iter().map(|s| s.bytes).sum::<u64>() != snapshot.bytes.len() as u64 {
            return Err(Error::Step("the snapshot is of another model"));
        }
        let mut rest = snapshot.bytes.as_slice();
        for span in &spans {
            let (bytes, after) = rest.split_at(span.bytes as usize);
            self.device.write_state(span.state, span.at, bytes)?;
            rest = after;
        }
        self.states.set_tokens(sequence, snapshot.tokens, snapshot.replay)
    }

    /// The hidden rows that the device keeps of `rows` positions of a sequence, from `position` on.
    /// # Errors
    /// [`Error::Step`] if it has ended, or the device's.
    pub(crate) fn read_hidden(&self, sequence: SequenceId, position: u64, rows: u64) -> Result<Vec<u8>, Error> {
        let (kept, slot) = (self.states.kept, self.states.get(sequence)?.slot);
        let mut bytes = vec![0; (rows * kept.row_bytes) as usize];
        let mut rest = bytes.as_mut_slice();
        for (at, rows) in kept.rows(slot, position, rows) {
            let (part, after) = rest.split_at_mut((rows * kept.row_bytes) as usize);
            self.device.read_state(self.states.kept_state(), at, part)?;
            rest = after;
        }
        Ok(bytes)
    }

    /// Puts back what [`Engine::read_hidden`] read.
    /// # Errors
    /// As [`Engine::read_hidden`].
    pub(crate) fn write_hidden(
        &mut self,
        sequence: SequenceId,
        position: u64,
        rows: u64,
        mut bytes: &[u8],
    ) -> Result<(), Error> {
        let (kept, slot) = (self.states.kept, self.states.get(sequence)?.slot);
        for (at, rows) in kept.rows(slot, position, rows) {
            let (part, after) = bytes.split_at((rows * kept.row_bytes) as usize);
            self.device.write_state(self.states.kept_state(), at, part)?;
            bytes = after;
        }
        Ok(())
    }

    /// Takes a sequence back to its beginning.
    /// # Errors
    /// [`Error::Step`] if it has ended.
    pub fn rewind(&mut self, sequence: SequenceId) -> Result<(), Error> {
        // kernels take position 0 as a fresh sequence
        self.states.set_tokens(sequence, 0, 0)
    }

    /// Bytes that [`Engine::write_state`] writes for a sequence of `tokens` tokens.
    pub fn state_bytes(&self, tokens: u64) -> u64 {
        let metadata = self.metadata();
        let page_tokens = metadata.page_tokens.max(1);
        let kv_tokens = tokens.div_ceil(page_tokens) * page_tokens;
        REPLAY_BYTES + metadata.state_bytes_per_sequence() + metadata.kv_bytes_per_token() * kv_tokens
    }

    /// Writes all that a sequence carries.
    /// # Errors
    /// The writer's; a sequence that has ended is invalid input.
    pub fn write_state(&self, sequence: SequenceId, out: &mut dyn Write) -> io::Result<()> {
        let &Sequence { tokens, replay, .. } = self.states.get(sequence).map_err(invalid)?;
        let spans = self.states.all_spans(sequence, tokens).map_err(invalid)?;
        out.write_all(&replay.to_le_bytes())?;
        let mut bytes = Vec::new();
        for span in &spans {
            bytes.resize(span.bytes as usize, 0);
            self.device.read_state(span.state, span.at, &mut bytes).map_err(invalid)?;
            out.write_all(&bytes)?;
        }
        Ok(())
    }

    /// Reads what [`Engine::write_state`] wrote of a sequence of `tokens` tokens.
    /// # Errors
    /// The reader's; after one the sequence's state is undefined, and it must be rewound.
    pub fn read_state(&mut self, sequence: SequenceId, tokens: u64, input: &mut dyn Read) -> io::Result<()> {
        self.grow(sequence, 0, tokens).map_err(invalid)?;
        let spans = self.states.all_spans(sequence, tokens).map_err(invalid)?;
        let mut replay = [0; REPLAY_BYTES as usize];
        input.read_exact(&mut replay)?;
        let replay = u32::from_le_bytes(replay);
        if u64::from(replay) > self.metadata().tentative_tokens.min(tokens) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "more tentative tokens than a state keeps"));
        }
        let mut bytes = Vec::new();
        for span in &spans {
            bytes.resize(span.bytes as usize, 0);
            input.read_exact(&mut bytes)?;
            self.device.write_state(span.state, span.at, &bytes).map_err(invalid)?;
        }
        self.states.set_tokens(sequence, tokens, replay).map_err(invalid)
    }
}

/// Bytes of the number of tokens to replay.
const REPLAY_BYTES: u64 = 4;

fn invalid(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}
