//! Drafts: tokens that the MTP layer guesses after the newest ones, and the tentative step that checks them.
//!
//! Nothing of a round needs the host. What the next program is fed lies on the device: a draft's token and hidden row where the program
//! before it has left them, older hidden rows and the drafts of the round in what the device keeps (`kept.rs`).

use nextc_abi::{Input, Span};

use super::{Engine, LogitRows, Part};
use crate::device::{CopyRows, Memory, Strided};
use crate::error::Error;
use crate::kept::KEPT_ROWS;
use crate::state::SequenceId;
use crate::step::{StepInputs, Taken};

/// Tokens that the draft is fed for one sequence.
#[derive(Clone, Copy, Debug)]
pub struct DraftInput<'a> {
    /// The sequence.
    pub sequence: SequenceId,
    /// Position of the first hidden row; its token is the one after that position.
    pub position: u64,
    /// The tokens after each hidden row.
    pub tokens: &'a [u32],
    /// As many hidden rows.
    pub hidden: HiddenRows<'a>,
}

/// Where hidden rows are. All sequences of a batch have theirs on the host, or all on the device.
#[derive(Clone, Copy, Debug)]
pub enum HiddenRows<'a> {
    /// On the host, `hidden_size` wide, one after the other.
    Host(&'a [f32]),
    /// On the device, where [`Engine::keep_hidden`] has kept them.
    Kept,
    /// On the device, where the last program has left them: from this row of it on.
    Left(usize),
}

/// Rows that a step has left of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct HiddenRun {
    /// The sequence.
    pub sequence: SequenceId,
    /// Position of the first.
    pub position: u64,
    /// The row of the step that it is.
    pub first: usize,
    /// How many.
    pub rows: usize,
}

impl Engine {
    /// Feeds each sequence tokens that may be taken back, and gives logits of all of them. Each has its tokens, then `drafts` of those that
    /// [`Engine::draft_ahead`] has kept, in the same order of sequences. The sequences stay as they are until [`Engine::accept`] says how
    /// many of the tokens are theirs.
    /// # Errors
    /// As [`Engine::forward`], and [`Error::Step`] for more tokens than a state can keep, or drafts after more than one token.
    pub fn forward_tentative(&mut self, batch: &[(SequenceId, &[u32])], drafts: usize) -> Result<(), Error> {
        let most = self.metadata().tentative_tokens as usize;
        if batch.iter().any(|(_, tokens)| tokens.len() + drafts > most) {
            return Err(Error::Step("more tentative tokens than a state keeps"));
        }
        if drafts > 0 && batch.iter().any(|(_, tokens)| tokens.len() != 1) {
            return Err(Error::Step("drafts follow one token that is known"));
        }
        let fed: Vec<Vec<u32>> = batch.iter().map(|(_, tokens)| [tokens, &vec![0; drafts][..]].concat()).collect();
        let fed: Vec<_> =
            batch.iter().zip(&fed).map(|(&(sequence, _), tokens)| (sequence, tokens.as_slice())).collect();
        let parts = self.check_batch(&fed)?;
        let mut inputs = self.inputs(&parts)?;
        inputs.tentative.fill(1);
        inputs.logit_rows = LogitRows::All.of(&inputs.cu_seqlens);
        if drafts > 0 {
            inputs.taken.push(self.taken_drafts(batch.len() as u64, drafts as u64));
        }
        self.run(self.step, &inputs)?;
        for part in &parts {
            // what was replayed is done now
            self.states.set_tokens(part.sequence, part.position, 0)?;
        }
        self.last = inputs;
        Ok(())
    }

    /// The drafts of each sequence, which go behind its known token.
    fn taken_drafts(&self, sequences: u64, drafts: u64) -> Taken {
        let to = Strided { at: TOKEN_BYTES, stride: (drafts + 1) * TOKEN_BYTES };
        let rows = CopyRows { rows: sequences, bytes: drafts * TOKEN_BYTES, from: self.states.kept.draft(0), to };
        Taken { memory: Memory::State(self.states.kept_state()), input: Input::Tokens, rows }
    }

    /// Makes the first `tokens` tokens of the sequence's last step, which was tentative, its own.
    /// # Errors
    /// [`Error::Step`] if the sequence has ended.
    pub fn accept(&mut self, sequence: SequenceId, tokens: u32) -> Result<(), Error> {
        let have = self.tokens(sequence)?;
        self.states.set_tokens(sequence, have + u64::from(tokens), tokens)
    }

    /// Keeps hidden rows of the last step on the device.
    /// # Errors
    /// The device's, and [`Error::Step`] if a sequence has ended, nothing gave hidden rows, or they are more than are kept.
    pub fn keep_hidden(&mut self, runs: &[HiddenRun]) -> Result<(), Error> {
        let (kept, hidden) = (self.states.kept, self.hidden_span()?.at);
        let mut copies = Vec::with_capacity(runs.len());
        for run in runs {
            if run.rows as u64 > KEPT_ROWS {
                return Err(Error::Step("more hidden rows than are kept"));
            }
            let slot = self.states.get(run.sequence)?.slot;
            let mut from = hidden + run.first as u64 * kept.row_bytes;
            for (to, rows) in kept.rows(slot, run.position, run.rows as u64) {
                let bytes = rows * kept.row_bytes;
                copies.push(CopyRows::whole(from, to, bytes));
                from += bytes;
            }
        }
        self.device.keep(self.states.kept_state(), &copies)
    }

    /// Where the hidden rows of the last step or draft are.
    fn hidden_span(&self) -> Result<Span, Error> {
        self.span(&self.ran, "hidden")
    }

    /// Feeds the draft; the sequence's own length stays as it is. Entries of the draft's KV from `position` on are written.
    /// # Errors
    /// As [`Engine::forward`], and [`Error::NoMtp`].
    pub fn draft(&mut self, batch: &[DraftInput<'_>], rows: LogitRows) -> Result<(), Error> {
        let program = self.draft.ok_or_else(|| self.no_mtp())?;
        let inputs = self.draft_inputs(batch, rows)?;
        self.run(program, &inputs)
    }

    /// As [`Engine::draft`], of tokens after which nothing is drafted: it gives nothing.
    /// # Errors
    /// As [`Engine::draft`].
    pub fn follow(&mut self, batch: &[DraftInput<'_>]) -> Result<(), Error> {
        let program = self.follow.ok_or_else(|| self.no_mtp())?;
        let inputs = self.draft_inputs(batch, LogitRows::None)?;
        self.run(program, &inputs)
    }

    fn no_mtp(&self) -> Error {
        Error::NoMtp { model: self.metadata().model.name.clone(), option: "--mtp" }
    }

    /// Drafts `count` tokens of each sequence, the first after what it is fed here, each other after the one before it, and keeps them on
    /// the device for [`Engine::forward_tentative`]. Where the executable can, only tokens that are `wanted` are drafted: a flag for each
    /// 16. Nobody waits.
    /// # Errors
    /// As [`Engine::draft`], and [`Error::Step`] for more drafts than a state can keep, or flags of another number or without any that is
    /// set.
    pub fn draft_ahead(&mut self, batch: &[DraftInput<'_>], count: usize, wanted: &[i32]) -> Result<(), Error> {
        let program = self.guess.or(self.draft).ok_or_else(|| self.no_mtp())?;
        let flags = self.metadata().model.vocab_size.div_ceil(16);
        if wanted.len() as u64 != flags || wanted.iter().all(|&flag| flag == 0) {
            return Err(Error::Step("drafts need a flag for each 16 tokens, and some of them wanted"));
        }
        if count as u64 >= self.metadata().tentative_tokens {
            return Err(Error::Step("more drafts than a state keeps"));
        }
        let mut inputs = self.draft_inputs(batch, LogitRows::Last)?;
        for number in 0..count {
            if number > 0 {
                inputs = self.next_draft_inputs(batch, number, &inputs.logit_rows)?;
            }
            inputs.wanted = if self.guess.is_some() { wanted.to_vec() } else { Vec::new() };
            self.run(program, &inputs)?;
            let rows = CopyRows {
                rows: batch.len() as u64,
                bytes: TOKEN_BYTES,
                from: self.best_tokens()?,
                to: self.states.kept.draft(number as u64),
            };
            self.device.keep(self.states.kept_state(), &[rows])?;
        }
        Ok(())
    }

    /// The inputs of draft `number` of each sequence: the token and the hidden row of the draft before it, whose rows are `rows`.
    fn next_draft_inputs(
        &mut self,
        batch: &[DraftInput<'_>],
        number: usize,
        rows: &[i32],
    ) -> Result<StepInputs, Error> {
        let next = batch.iter().zip(rows).map(|(input, &row)| DraftInput {
            position: input.position + (input.tokens.len() + number - 1) as u64,
            tokens: &[0],
            hidden: HiddenRows::Left(row as usize),
            ..*input
        });
        let mut inputs = self.draft_inputs(&next.collect::<Vec<_>>(), LogitRows::Last)?;
        let (from, to) = (self.best_tokens()?, Strided { at: 0, stride: TOKEN_BYTES });
        let rows = CopyRows { rows: batch.len() as u64, bytes: TOKEN_BYTES, from, to };
        inputs.taken.push(Taken { memory: Memory::Arena, input: Input::Tokens, rows });
        Ok(inputs)
    }

    /// Where the likeliest tokens of the last step or draft are.
    fn best_tokens(&self) -> Result<Strided, Error> {
        Ok(Strided { at: self.span(&self.ran, "best")?.at, stride: TOKEN_BYTES })
    }

    /// What the draft is fed, once it is checked.
    fn draft_inputs(&mut self, batch: &[DraftInput<'_>], rows: LogitRows) -> Result<StepInputs, Error> {
        let mut parts = Vec::with_capacity(batch.len());
        for (number, d) in batch.iter().enumerate() {
            self.check_tokens(number, d.tokens)?;
            self.grow(d.sequence, number, d.position + d.tokens.len() as u64)?;
            parts.push(Part { sequence: d.sequence, position: d.position, tokens: d.tokens });
        }
        let mut inputs = self.inputs(&parts)?;
        inputs.logit_rows = rows.of(&inputs.cu_seqlens);
        inputs.hidden_bytes = inputs.tokens.len() as u64 * self.states.kept.row_bytes;
        for (d, &row) in batch.iter().zip(&inputs.cu_seqlens) {
            match d.hidden {
                HiddenRows::Host(rows) => self.give_hidden(rows, d.tokens.len(), &mut inputs.hidden)?,
                HiddenRows::Kept | HiddenRows::Left(_) => self.take_hidden(d, row as u64, &mut inputs.taken)?,
            }
        }
        match (inputs.hidden.is_empty(), inputs.taken.first()) {
            (true, Some(&first)) => inputs.taken.extend(self.taken_as_padding(first, &inputs)),
            (_, None) => inputs.hidden.resize(inputs.hidden_bytes as usize / size_of::<f32>(), 0.0),
            (false, Some(_)) => return Err(Error::Step("hidden rows of one batch lie in one place")),
        }
        Ok(inputs)
    }

    /// The first hidden row for each token that is padding, so that these compute with sound numbers.
    fn taken_as_padding(&self, first: Taken, inputs: &StepInputs) -> Option<Taken> {
        let (bytes, padding) = (self.states.kept.row_bytes, inputs.padding.tokens);
        let to = Strided { at: (inputs.tokens.len() - padding) as u64 * bytes, stride: bytes };
        let from = Strided { at: first.rows.from.at, stride: 0 };
        let rows = CopyRows { rows: padding as u64, bytes, from, to };
        (padding > 0).then_some(Taken { rows, ..first })
    }

    /// Adds hidden rows of the host, padded.
    fn give_hidden(&self, rows: &[f32], count: usize, hidden: &mut Vec<f32>) -> Result<(), Error> {
        let width = self.metadata().model.hidden_size as usize;
        if rows.len() != count * width {
            return Err(Error::Step("the draft needs one hidden row a token"));
        }
        for row in rows.chunks_exact(width) {
            hidden.extend_from_slice(row);
            hidden.resize(hidden.len().next_multiple_of(16), 0.0);
        }
        Ok(())
    }

    /// Adds hidden rows of the device, which go to the input's rows from `row` on.
    fn take_hidden(&self, input: &DraftInput<'_>, row: u64, taken: &mut Vec<Taken>) -> Result<(), Error> {
        let (kept, slot, count) = (self.states.kept, self.states.get(input.sequence)?.slot, input.tokens.len() as u64);
        let (memory, runs) = match input.hidden {
            HiddenRows::Left(first) => {
                (Memory::Arena, vec![(self.hidden_span()?.at + first as u64 * kept.row_bytes, count)])
            }
            _ => (Memory::State(self.states.kept_state()), kept.rows(slot, input.position, count).collect()),
        };
        let mut to = row * kept.row_bytes;
        for (from, rows) in runs {
            let rows = CopyRows::whole(from, to, rows * kept.row_bytes);
            to += rows.bytes;
            match taken.last_mut() {
                Some(last) if last.memory == memory && last.rows.is_before(&rows) => last.rows.bytes += rows.bytes,
                _ => taken.push(Taken { memory, input: Input::Hidden, rows }),
            }
        }
        Ok(())
    }
}

/// Bytes of a token.
const TOKEN_BYTES: u64 = size_of::<i32>() as u64;
