//! The engine: an opened executable with weights, states and threads, and sequences that are fed tokens.

use nextc_abi::{Metadata, Program, Sym};

use crate::artifact::Artifact;
use crate::error::Error;
use crate::memory;
use crate::state::{SequenceId, States};
use crate::step::{Executor, KernelTime, MAX_DIM, Rows, StepInputs};
use crate::weights::Weights;

/// How an engine is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Threads of the team, the caller included.
    pub threads: usize,
    /// Sequences that may be held at once.
    pub sequences: usize,
    /// Prompts are cut into steps of at most this many tokens where only the last row's logits are asked for.
    pub step_tokens: usize,
    /// Make weights up instead of mapping them.
    pub random_weights: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { threads: crate::pool::available_threads(), sequences: 1, step_tokens: 2048, random_weights: false }
    }
}

/// For which of the new tokens logits are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// For every token, in the order of the batch; all in one step.
    All,
    /// For the last token of each sequence; long prompts are cut into steps.
    Last,
    /// For none.
    None,
}

impl LogitRows {
    /// The rows of a step whose sequences end at `cu_seqlens`.
    fn of(self, cu_seqlens: &[i32]) -> Vec<i32> {
        let ends = &cu_seqlens[1..];
        match self {
            Self::All => (0..ends.last().copied().unwrap_or(0)).collect(),
            Self::Last => ends.iter().map(|end| end - 1).collect(),
            Self::None => Vec::new(),
        }
    }
}

/// What a step gave.
#[derive(Clone, Copy, Debug)]
pub struct Output<'a> {
    /// Logits of the tokens that were asked for, `vocab_size` wide.
    pub logits: Rows<'a>,
    /// Hidden rows of all tokens after the final norm, `hidden_size` wide.
    pub hidden: Rows<'a>,
}

/// Tokens that the draft is fed for one sequence.
#[derive(Clone, Copy, Debug)]
pub struct DraftInput<'a> {
    /// The sequence.
    pub sequence: SequenceId,
    /// Position of the first hidden row; its token is the one after that position.
    pub position: u64,
    /// The tokens after each hidden row.
    pub tokens: &'a [u32],
    /// As many hidden rows, `hidden_size` wide, one after the other.
    pub hidden: &'a [f32],
}

/// An executable that can run.
pub struct Engine {
    artifact: Artifact,
    weights: Weights,
    pub(crate) states: States,
    executor: Executor,
    step: usize,
    draft: Option<usize>,
    guess: Option<usize>,
    step_tokens: usize,
}

/// One sequence's part of a step.
struct Part<'a> {
    sequence: SequenceId,
    position: u64,
    tokens: &'a [u32],
}

impl Engine {
    /// Sets up an engine.
    /// # Errors
    /// [`Error`] if the processor, the weights or the memory will not do.
    pub fn new(artifact: Artifact, options: &EngineOptions) -> Result<Self, Error> {
        artifact.check_cpu()?;
        let weights = match options.random_weights {
            true => Weights::random(&artifact)?,
            false => Weights::map(&artifact)?,
        };
        let metadata = artifact.metadata();
        let states = States::reserve(metadata, options.sequences)?;
        let executor = Executor::new(metadata, options.threads.max(1))?;
        let entry = |name: &str| metadata.programs.iter().position(|p| p.name == name);
        let step = entry("step").ok_or(Error::Step("the executable has no entry point `step`"))?;
        let (draft, guess) = (entry("draft"), entry("guess"));
        check_outputs(metadata)?;
        Ok(Self { states, executor, step, draft, guess, step_tokens: options.step_tokens.max(1), weights, artifact })
    }

    /// The executable.
    pub fn artifact(&self) -> &Artifact {
        &self.artifact
    }

    /// What the executable holds.
    pub fn metadata(&self) -> &Metadata {
        self.artifact.metadata()
    }

    /// The weights.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Threads of the team.
    pub fn threads(&self) -> usize {
        self.executor.threads()
    }

    /// Begins to measure each kernel, or stops; gives what was measured before, by kernel.
    pub fn profile(&mut self, go_on: bool) -> Vec<KernelTime> {
        self.executor.profile(go_on, self.artifact.metadata().kernels.len())
    }

    /// True if [`Engine::draft`] works.
    pub fn has_draft(&self) -> bool {
        self.draft.is_some()
    }

    /// Begins a sequence.
    /// # Errors
    /// [`Error::Slots`] if all are taken.
    pub fn new_sequence(&mut self) -> Result<SequenceId, Error> {
        self.states.begin()
    }

    /// Ends a sequence and frees what it held.
    pub fn end_sequence(&mut self, sequence: SequenceId) {
        self.states.end(sequence);
    }

    /// Tokens that a sequence has been fed.
    /// # Errors
    /// [`Error::Step`] if it has ended.
    pub fn tokens(&self, sequence: SequenceId) -> Result<u64, Error> {
        self.states.tokens(sequence)
    }

    /// Feeds each sequence of the batch its new tokens, at least one, and gives logits and hidden rows. Everything is checked before a
    /// kernel runs.
    /// # Errors
    /// [`Error::Token`], [`Error::Context`] or [`Error::Step`] say which sequence cannot be fed.
    pub fn forward(&mut self, batch: &[(SequenceId, &[u32])], rows: LogitRows) -> Result<Output<'_>, Error> {
        let mut parts = self.check_batch(batch)?;
        if rows == LogitRows::Last {
            self.feed_ahead(&mut parts)?;
        }
        let mut inputs = self.inputs(&parts)?;
        inputs.logit_rows = rows.of(&inputs.cu_seqlens);
        self.run_parts(&parts, &inputs)?;
        self.output(self.step, &inputs.dims())
    }

    /// Feeds each sequence tokens that may be taken back, and gives logits of all of them. The sequences stay as they are until
    /// [`Engine::accept`] says how many of the tokens are theirs.
    /// # Errors
    /// As [`Engine::forward`], and [`Error::Step`] for more tokens than a state can keep.
    pub fn forward_tentative(&mut self, batch: &[(SequenceId, &[u32])]) -> Result<Output<'_>, Error> {
        let most = self.metadata().tentative_tokens as usize;
        if batch.iter().any(|(_, tokens)| tokens.len() > most) {
            return Err(Error::Step("more tentative tokens than a state keeps"));
        }
        let parts = self.check_batch(batch)?;
        let mut inputs = self.inputs(&parts)?;
        inputs.tentative.fill(1);
        inputs.logit_rows = LogitRows::All.of(&inputs.cu_seqlens);
        self.executor.run(&self.artifact, &self.weights, &self.states, self.step, &inputs)?;
        for part in &parts {
            // what was replayed is done now
            self.states.set_tokens(part.sequence, part.position, 0)?;
        }
        self.output(self.step, &inputs.dims())
    }

    /// Makes the first `tokens` tokens of the sequence's last step, which was tentative, its own.
    /// # Errors
    /// [`Error::Step`] if the sequence has ended.
    pub fn accept(&mut self, sequence: SequenceId, tokens: u32) -> Result<(), Error> {
        let have = self.tokens(sequence)?;
        self.states.set_tokens(sequence, have + u64::from(tokens), tokens)
    }

    /// Feeds the draft; the sequence's own length stays as it is. Entries of the draft's KV from `position` on are written.
    /// # Errors
    /// As [`Engine::forward`], and [`Error::NoMtp`].
    pub fn draft(&mut self, batch: &[DraftInput<'_>], rows: LogitRows) -> Result<Output<'_>, Error> {
        let program =
            self.draft.ok_or_else(|| Error::NoMtp { model: self.metadata().model.name.clone(), option: "--mtp" })?;
        self.run_draft(program, batch, rows, &[])
    }

    /// As [`Engine::draft`], for drafts that are only to be checked: with the logits after the last token of each sequence, and where the
    /// executable can, only of the tokens that are `wanted`: a flag for each 16; those of others are minus infinity.
    /// # Errors
    /// As [`Engine::draft`], and [`Error::Step`] for flags of another number or without any that is set.
    pub fn guess(&mut self, batch: &[DraftInput<'_>], wanted: &[i32]) -> Result<Output<'_>, Error> {
        let Some(program) = self.guess else { return self.draft(batch, LogitRows::Last) };
        if wanted.len() as u64 != self.metadata().model.vocab_size.div_ceil(16) || wanted.iter().all(|&flag| flag == 0)
        {
            return Err(Error::Step("a guess needs a flag for each 16 tokens, and some of them wanted"));
        }
        self.run_draft(program, batch, LogitRows::Last, wanted)
    }

    fn run_draft(
        &mut self,
        program: usize,
        batch: &[DraftInput<'_>],
        rows: LogitRows,
        wanted: &[i32],
    ) -> Result<Output<'_>, Error> {
        let width = self.metadata().model.hidden_size as usize;
        let mut parts = Vec::with_capacity(batch.len());
        for (number, d) in batch.iter().enumerate() {
            self.check_tokens(number, d.tokens)?;
            if d.hidden.len() != d.tokens.len() * width {
                return Err(Error::Step("the draft needs one hidden row a token"));
            }
            self.states.grow(d.sequence, number, d.position + d.tokens.len() as u64)?;
            parts.push(Part { sequence: d.sequence, position: d.position, tokens: d.tokens });
        }
        let mut inputs = self.inputs(&parts)?;
        inputs.logit_rows = rows.of(&inputs.cu_seqlens);
        inputs.wanted.extend_from_slice(wanted);
        let padded = width.next_multiple_of(16);
        for row in batch.iter().flat_map(|d| d.hidden.chunks_exact(width)) {
            inputs.hidden.extend_from_slice(row);
            inputs.hidden.resize(inputs.hidden.len() + padded - width, 0.0);
        }
        self.executor.run(&self.artifact, &self.weights, &self.states, program, &inputs)?;
        self.output(program, &inputs.dims())
    }

    /// Gives a sequence a made-up past of `tokens` tokens: for measurements at depth.
    /// # Errors
    /// [`Error::Context`] if that is more than the context.
    pub fn pretend_past(&mut self, sequence: SequenceId, tokens: u64) -> Result<(), Error> {
        self.states.pretend_past(sequence, tokens)
    }

    /// Checks tokens and lengths of a batch and makes room for them.
    fn check_batch<'a>(&mut self, batch: &[(SequenceId, &'a [u32])]) -> Result<Vec<Part<'a>>, Error> {
        for (number, (sequence, tokens)) in batch.iter().enumerate() {
            self.check_tokens(number, tokens)?;
            let (have, adding, max_context) = (self.tokens(*sequence)?, tokens.len() as u64, self.states.max_context());
            if have + adding > max_context {
                return Err(Error::Context { sequence: number, have, adding, max_context });
            }
            if batch[..number].iter().any(|(other, _)| other == sequence) {
                return Err(Error::Step("a sequence stands twice in one batch"));
            }
        }
        let mut parts = Vec::with_capacity(batch.len());
        for (number, &(sequence, tokens)) in batch.iter().enumerate() {
            let position = self.tokens(sequence)?;
            self.states.grow(sequence, number, position + tokens.len() as u64)?;
            parts.push(Part { sequence, position, tokens });
        }
        Ok(parts)
    }

    fn check_tokens(&self, sequence: usize, tokens: &[u32]) -> Result<(), Error> {
        let vocab_size = self.metadata().model.vocab_size;
        if tokens.is_empty() {
            return Err(Error::Step("a sequence of the batch has no new token"));
        }
        match tokens.iter().position(|&t| u64::from(t) >= vocab_size) {
            Some(index) => Err(Error::Token { token: tokens[index], index, sequence, vocab_size }),
            None => Ok(()),
        }
    }

    /// Runs steps without logits until what is left fits one step; each sequence keeps at least one token.
    fn feed_ahead(&mut self, parts: &mut [Part<'_>]) -> Result<(), Error> {
        while parts.iter().map(|p| p.tokens.len()).sum::<usize>() > self.step_tokens.max(parts.len()) {
            let mut room = self.step_tokens;
            let mut pieces = Vec::new();
            for part in parts.iter_mut() {
                let count = room.min(part.tokens.len() - 1);
                if count > 0 {
                    let (now, later) = part.tokens.split_at(count);
                    pieces.push(Part { sequence: part.sequence, position: part.position, tokens: now });
                    (part.tokens, part.position) = (later, part.position + count as u64);
                    room -= count;
                }
            }
            let inputs = self.inputs(&pieces)?;
            self.run_parts(&pieces, &inputs)?;
        }
        Ok(())
    }

    fn run_parts(&mut self, parts: &[Part<'_>], inputs: &StepInputs) -> Result<(), Error> {
        self.executor.run(&self.artifact, &self.weights, &self.states, self.step, inputs)?;
        for part in parts {
            self.states.set_tokens(part.sequence, part.position + part.tokens.len() as u64, 0)?;
        }
        Ok(())
    }

    /// The inputs of a step over `parts`, without logit rows.
    fn inputs(&self, parts: &[Part<'_>]) -> Result<StepInputs, Error> {
        let total: u64 = parts.iter().map(|p| p.tokens.len() as u64).sum();
        if total > MAX_DIM {
            return Err(Error::Step("more tokens than a step can hold"));
        }
        let mut inputs = StepInputs { cu_seqlens: vec![0], ..StepInputs::default() };
        let sequences = parts.iter().map(|p| self.states.get(p.sequence)).collect::<Result<Vec<_>, _>>()?;
        let width = sequences.iter().map(|s| s.pages.len()).max().unwrap_or(0).max(1);
        for (part, sequence) in parts.iter().zip(sequences) {
            let positions = part.position as i32..part.position as i32 + part.tokens.len() as i32;
            inputs.tokens.extend(part.tokens.iter().map(|&t| t as i32));
            inputs.positions.extend(positions);
            inputs.cu_seqlens.push(inputs.tokens.len() as i32);
            inputs.slot.push(sequence.slot as i32);
            inputs.replay.push(sequence.replay as i32);
            inputs.tentative.push(0);
            let filled = inputs.page_table.len() + width;
            inputs.page_table.extend(sequence.pages.iter().map(|&p| p as i32));
            inputs.page_table.resize(filled, 0);
        }
        Ok(inputs)
    }

    fn output(&self, program: usize, dims: &[u64; 4]) -> Result<Output<'_>, Error> {
        let metadata = self.artifact.metadata();
        let program: &Program = &metadata.programs[program];
        let rows = |name| {
            let rows = self.executor.output(metadata, program, name, dims);
            rows.ok_or(Error::Step("an entry point lacks the output `logits` or `hidden`"))
        };
        Ok(Output { logits: rows("logits")?, hidden: rows("hidden")? })
    }
}

/// Refuses a schedule whose outputs do not lie in the arena.
fn check_outputs(metadata: &Metadata) -> Result<(), Error> {
    let fits = metadata.programs.iter().flat_map(|p| &p.outputs).all(|o| {
        let unit = o.at.unit.map_or(0, |u| metadata.arena.unit_bytes[u as usize]);
        let rows = if o.name == "hidden" { Sym::T } else { Sym::R };
        o.rows == rows && o.at.unit == Some(o.rows) && o.width <= o.stride && o.at.at_bytes + o.stride * 4 <= unit
    });
    if fits { Ok(()) } else { Err(Error::Step("an output lies outside the arena")) }
}

/// Refuses what takes more memory than there is.
/// # Errors
/// [`Error::TooLarge`] with both numbers.
pub(crate) fn check_available(what: &'static str, needed: u64) -> Result<(), Error> {
    match memory::available_bytes() {
        Some(available) if needed > available => Err(Error::TooLarge { what, needed, available }),
        _ => Ok(()),
    }
}
