//! The engine: an opened executable with its device, and sequences that are fed tokens.

pub mod draft;

use std::sync::Arc;

use nextc_abi::{Metadata, Output, Span, StateKind, Sym};

use crate::artifact::Artifact;
use crate::device::{self, Device};
use crate::error::Error;
use crate::limits::Limits;
use crate::memory;
use crate::piece::{Steps, Unread};
use crate::random::Random;
use crate::sample::SampleError;
use crate::sample::rows::{Row, tables};
use crate::state::{SequenceId, States};
use crate::step::{self, KernelTime, MAX_DIM, Rows, StepInputs};

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

/// An executable that can run.
pub struct Engine {
    artifact: Arc<Artifact>,
    pub(crate) states: States,
    pub(crate) device: Box<dyn Device>,
    step: usize,
    draft: Option<usize>,
    sample: usize,
    verify: Option<usize>,
    guess: Option<usize>,
    follow: Option<usize>,
    step_tokens: usize,
    /// Pages and slots that the device's states have room for.
    reach: (u32, u32),
    /// The inputs of the last step, which what chooses tokens after it takes too.
    last: StepInputs,
    ran: Ran,
}

/// The entry point that ran last, `@step` or `@draft`.
#[derive(Clone, Copy, Debug, Default)]
struct Ran {
    program: usize,
    /// The dimensions that it ran with.
    dims: [u64; 4],
    /// The same without padding.
    wanted: [u64; 4],
}

impl Ran {
    fn new(program: usize, inputs: &StepInputs) -> Self {
        Self { program, dims: inputs.dims(), wanted: inputs.wanted_dims() }
    }
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
    /// [`Error`] if the device, the weights or the memory will not do.
    pub fn new(artifact: Artifact, options: &EngineOptions) -> Result<Self, Error> {
        let artifact = Arc::new(artifact);
        let metadata = artifact.metadata();
        let entry = |name: &str| metadata.programs.iter().position(|p| p.name == name);
        let step = entry("step").ok_or(Error::Step("the executable has no entry point `step`"))?;
        let [draft, guess, follow, verify] = ["draft", "guess", "follow", "verify"].map(entry);
        let sample = entry("sample").ok_or(Error::Step("the executable has no entry point `sample`"))?;
        check_outputs(metadata)?;
        let states = States::new(metadata, options.sequences)?;
        let device = device::open(&artifact, options, &states)?;
        let (step_tokens, last, reach) = (options.step_tokens.max(1), StepInputs::default(), (0, 0));
        let ran = Ran { program: step, ..Ran::default() };
        Ok(Self { states, device, step, draft, guess, follow, sample, verify, step_tokens, reach, last, ran, artifact })
    }

    /// The executable.
    pub fn artifact(&self) -> &Artifact {
        &self.artifact
    }

    /// What the executable holds.
    pub fn metadata(&self) -> &Metadata {
        self.artifact.metadata()
    }

    /// The name of the device, and how much of it is used.
    pub fn device(&self) -> String {
        self.device.describe()
    }

    /// What the device can do at best, measured.
    /// # Errors
    /// [`Error`] if it cannot be measured.
    pub fn limits(&mut self) -> Result<Limits, Error> {
        self.device.limits()
    }

    /// Begins to measure each kernel, or stops; gives what was measured before, by kernel.
    pub fn profile(&mut self, go_on: bool) -> Vec<KernelTime> {
        self.device.profile(go_on)
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
    pub fn forward(&mut self, batch: &[(SequenceId, &[u32])], rows: LogitRows) -> Result<(), Error> {
        let mut parts = self.check_batch(batch)?;
        if rows == LogitRows::Last {
            self.feed_ahead(&mut parts)?;
        }
        let mut inputs = self.inputs(&parts)?;
        inputs.logit_rows = rows.of(&inputs.cu_seqlens);
        self.run_parts(&parts, &inputs)?;
        self.last = inputs;
        Ok(())
    }

    /// Chooses a token for each row of logits of the last step, which must have been the last thing that ran. -1 where there is none to
    /// choose.
    /// # Errors
    /// [`Error`] if memory is lacking, or there are more or fewer rows than the step had.
    pub(crate) fn sample(&mut self, rows: &[Row<'_>]) -> Result<&[i32], Error> {
        self.run_after(self.sample, rows)?;
        self.numbers(self.sample, &["tokens"]).map(|numbers| numbers[0])
    }

    /// As [`Engine::sample`] after a tentative step; also how many of the tokens that were fed to each sequence after its first are the
    /// ones chosen, from the first on.
    /// # Errors
    /// As [`Engine::sample`], and [`Error::NoMtp`].
    pub(crate) fn verify(&mut self, rows: &[Row<'_>]) -> Result<(&[i32], &[i32]), Error> {
        let verify =
            self.verify.ok_or_else(|| Error::NoMtp { model: self.metadata().model.name.clone(), option: "mtp" })?;
        self.run_after(verify, rows)?;
        let numbers = self.numbers(verify, &["tokens", "accepted"])?;
        Ok((numbers[0], numbers[1]))
    }

    /// Runs an entry point that goes on from the last step.
    fn run_after(&mut self, program: usize, rows: &[Row<'_>]) -> Result<(), Error> {
        if rows.len() as u64 != self.last.wanted_dims()[Sym::R as usize] {
            return Err(Error::Step("tokens are chosen for other rows than the step had"));
        }
        let mut rows = rows.to_vec();
        rows.resize(self.last.logit_rows.len(), Row { choosing: None, drafts: (0, 0) });
        // where inputs lie must follow from the dimensions, which do not count pages here
        self.last.page_table.clear();
        self.last.sampling = Some(tables(&rows));
        self.device.run(program, &self.last)
    }

    /// Tokens and counts that an entry point gave.
    fn numbers(&mut self, program: usize, names: &[&str]) -> Result<Vec<&[i32]>, Error> {
        let ran = Ran::new(program, &self.last);
        let spans = names.iter().map(|name| self.span(&ran, name)).collect::<Result<Vec<_>, _>>()?;
        Ok(self.device.fetch(&spans)?.into_iter().map(bytemuck::cast_slice).collect())
    }

    /// Runs a step or a draft.
    fn run(&mut self, program: usize, inputs: &StepInputs) -> Result<(), Error> {
        self.ran = Ran::new(program, inputs);
        self.device.run(program, inputs)
    }

    /// Gives a sequence a made-up past of `tokens` tokens: for measurements at depth.
    /// # Errors
    /// [`Error::Context`] if that is more than the context.
    pub fn pretend_past(&mut self, sequence: SequenceId, tokens: u64) -> Result<(), Error> {
        self.grow(sequence, 0, tokens)?;
        let pages = &self.states.get(sequence)?.pages;
        let kv = self.states.kinds.iter().enumerate().filter(|(_, (kind, _))| *kind == StateKind::Kv);
        for (state, &(_, token_bytes)) in kv {
            let page_bytes = token_bytes * self.states.page_tokens;
            let past = made_up_past(page_bytes as usize, Random(state as u64));
            for &page in pages {
                self.device.write_state(state, u64::from(page) * page_bytes, &past)?;
            }
        }
        // the delta and convolution states stay as they are
        self.states.set_tokens(sequence, tokens, 0)
    }

    /// Makes room for a sequence (number `number` of its batch) of `tokens` tokens.
    pub(crate) fn grow(&mut self, sequence: SequenceId, number: usize, tokens: u64) -> Result<(), Error> {
        self.states.grow(sequence, number, tokens)?;
        let reach = self.states.reach();
        if reach != self.reach {
            for (state, bytes) in self.states.used_bytes().enumerate() {
                self.device.grow_state(state, bytes)?;
            }
            self.reach = reach;
        }
        Ok(())
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
            self.grow(sequence, number, position + tokens.len() as u64)?;
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

    /// Runs steps without logits until what is left fits one step, but for the tokens that each sequence keeps.
    fn feed_ahead(&mut self, parts: &mut [Part<'_>]) -> Result<(), Error> {
        let steps = Steps::of(self.step_tokens);
        let keep = steps.kept();
        while parts.iter().map(|p| p.tokens.len()).sum::<usize>() > self.step_tokens.max(keep * parts.len()) {
            let mut room = self.step_tokens;
            let mut pieces = Vec::new();
            for part in parts.iter_mut() {
                let unread = Unread { position: part.position as usize, tokens: part.tokens.len() };
                let count = steps.cut(unread, room.min(unread.tokens - 1), keep == 1);
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
        self.run(self.step, inputs)?;
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
        let width = self.device.page_width(sequences.iter().map(|s| s.pages.len()).max().unwrap_or(0).max(1));
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
        inputs.pad(self.device.batch_width(parts.len()));
        Ok(inputs)
    }

    /// Logits of the rows that the last step or draft was asked for, `vocab_size` wide.
    /// # Errors
    /// [`Error`] if the device fails.
    pub fn logits(&mut self) -> Result<Rows<'_>, Error> {
        self.rows("logits")
    }

    /// Hidden rows of all tokens of the last step or draft after the final norm, `hidden_size` wide.
    /// # Errors
    /// [`Error`] if the device fails.
    pub fn hidden(&mut self) -> Result<Rows<'_>, Error> {
        self.rows("hidden")
    }

    /// The token with the largest logit of each row of logits of the last step or draft; -1 if one is NaN or +infinity.
    /// # Errors
    /// [`Error`] if the device fails.
    pub fn best(&mut self) -> Result<&[i32], Error> {
        let span = self.span(&self.ran, "best")?;
        Ok(bytemuck::cast_slice(self.device.fetch(&[span])?.remove(0)))
    }

    fn rows(&mut self, name: &str) -> Result<Rows<'_>, Error> {
        let span = self.span(&self.ran, name)?;
        let output = output_of(self.artifact.metadata(), self.ran.program, name)?;
        let bytes = self.device.fetch(&[span])?.remove(0);
        Ok(Rows::new(output, &self.ran.wanted, bytes))
    }

    fn span(&self, ran: &Ran, name: &str) -> Result<Span, Error> {
        let metadata = self.artifact.metadata();
        Ok(step::span_of(metadata, output_of(metadata, ran.program, name)?, &ran.dims, &ran.wanted))
    }

    /// The token that was chosen for row `row` of the last step or draft.
    /// # Errors
    /// [`Error::Sample`] says why there is none.
    pub(crate) fn token(&mut self, row: usize, chosen: i32) -> Result<u32, Error> {
        match u32::try_from(chosen) {
            Ok(token) => Ok(token),
            Err(_) => Err(SampleError::of_row(self.logits()?.row(row)).into()),
        }
    }
}

fn output_of<'m>(metadata: &'m Metadata, program: usize, name: &str) -> Result<&'m Output, Error> {
    let output = metadata.programs[program].outputs.iter().find(|o| o.name == name);
    output.ok_or(Error::Step("an entry point lacks one of its outputs"))
}

/// Bytes of KV that are sound numbers: between -1 and 1 as f32 and as pairs of bf16, and none that is not a number as codes of 8 bits.
fn made_up_past(bytes: usize, mut random: Random) -> Vec<u8> {
    let number = |_| {
        // 0x7f is no number in e4m3
        let half = random.between(-1.0, 1.0).to_bits() >> 16 & !1;
        (half << 16 | half).to_le_bytes()
    };
    (0..bytes / 4).flat_map(number).collect()
}

/// Refuses a schedule whose outputs do not lie in the arena.
fn check_outputs(metadata: &Metadata) -> Result<(), Error> {
    let fits = metadata.programs.iter().flat_map(|p| &p.outputs).all(|o| {
        let unit = o.at.unit.map_or(0, |u| metadata.arena.unit_bytes[u as usize]);
        let rows = match o.name.as_str() {
            "hidden" => Sym::T,
            "accepted" => Sym::B,
            _ => Sym::R,
        };
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
