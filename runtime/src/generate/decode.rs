//! The loop: prompts in steps, then one token of each sequence a step, until each has ended.

use std::ops::ControlFlow;
use std::time::Instant;

use super::draft::Planner;
use super::{Forward, GenerateError, Sequence};
use crate::sample::Sampling;

/// When to stop, and how to choose.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Most new tokens of a sequence.
    pub max_new_tokens: usize,
    /// Most tokens of prompts in one step.
    pub step_tokens: usize,
    /// Tokens that end a sequence; none to go on regardless.
    pub eos: Vec<u32>,
    /// How to choose.
    pub sampling: Sampling,
    /// How many tokens to draft.
    pub drafts: Planner,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it, or a stop text appeared.
    Stop,
    /// It is as long as was asked for, or as the context allows.
    Length,
}

impl Finish {
    /// The name in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// What one sequence became.
#[derive(Clone, Debug)]
pub struct Completion {
    /// The new tokens, with the one that ended it.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// True if the last token is one that ends sequences.
    pub ended_by_eos: bool,
    /// True if whoever watched the tokens ended it.
    pub stopped_by_text: bool,
    /// Seconds from its first new token to its last.
    pub decode_s: f64,
    /// Tokens that were drafted for it.
    pub drafted: usize,
    /// Drafts that were right.
    pub accepted: usize,
}

impl Completion {
    /// The new tokens without the one that ended it.
    pub fn without_eos(&self) -> &[u32] {
        &self.tokens[..self.tokens.len() - usize::from(self.ended_by_eos)]
    }

    /// Speed of its decoding; the first token belongs to the prompt. 0 if there was none.
    pub fn decode_tokens_per_s(&self) -> f64 {
        rate(self.tokens.len().saturating_sub(1), self.decode_s)
    }
}

/// How long it took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timings {
    /// Tokens of all prompts.
    pub prefill_tokens: usize,
    /// Seconds for them.
    pub prefill_s: f64,
    /// New tokens after the first of each sequence.
    pub decode_tokens: usize,
    /// Seconds for them.
    pub decode_s: f64,
}

impl Timings {
    /// Speed of reading prompts.
    pub fn prefill_tokens_per_s(&self) -> f64 {
        rate(self.prefill_tokens, self.prefill_s)
    }

    /// Speed of decoding, all sequences together.
    pub fn decode_tokens_per_s(&self) -> f64 {
        rate(self.decode_tokens, self.decode_s)
    }
}

fn rate(tokens: usize, seconds: f64) -> f64 {
    if tokens == 0 || seconds <= 0.0 { 0.0 } else { tokens as f64 / seconds }
}

/// Is told each new token that is text; may end the sequence.
pub type Watch<'a> = dyn FnMut(usize, u32) -> Result<ControlFlow<()>, GenerateError> + 'a;

/// Continues every prompt.
/// # Errors
/// [`GenerateError`] if a prompt does not fit the model, or the model fails.
pub fn run(
    model: &mut dyn Forward,
    prompts: &[Vec<u32>],
    limits: &Limits,
    watch: &mut Watch<'_>,
) -> Result<(Vec<Completion>, Timings), GenerateError> {
    check(prompts, model.vocab_size(), model.max_context())?;
    if let Some(drafter) = model.drafter().filter(|_| limits.drafts.may_draft()) {
        drafter.prepare();
    }
    let planner = limits.drafts.clone();
    let mut running = Running { limits, watch, jobs: Vec::new(), timings: Timings::default(), planner };
    let done = running.begin(model, prompts).and_then(|()| running.prefill(model)).and_then(|()| running.decode(model));
    for job in &running.jobs {
        model.end(job.sequence);
    }
    done?;
    let timings = running.timings;
    Ok((running.jobs.into_iter().map(Job::complete).collect(), timings))
}

fn check(prompts: &[Vec<u32>], vocab_size: usize, max_context: usize) -> Result<(), GenerateError> {
    for (sequence, prompt) in prompts.iter().enumerate() {
        if prompt.is_empty() {
            return Err(GenerateError::Empty(sequence));
        }
        if let Some((index, &id)) = prompt.iter().enumerate().find(|&(_, &id)| id as usize >= vocab_size) {
            return Err(GenerateError::Token { sequence, index, id, vocab_size });
        }
        if prompt.len() > max_context {
            return Err(GenerateError::TooLong { sequence, tokens: prompt.len(), max_context });
        }
    }
    Ok(())
}

/// A sequence at work.
struct Job<'a> {
    sequence: Sequence,
    prompt: &'a [u32],
    /// Tokens of the prompt that the model has seen.
    seen: usize,
    /// Most new tokens, by request and context.
    limit: usize,
    tokens: Vec<u32>,
    finish: Option<Finish>,
    ended_by_eos: bool,
    stopped_by_text: bool,
    first: Option<Instant>,
    last: Option<Instant>,
    drafted: usize,
    accepted: usize,
}

impl Job<'_> {
    /// The token that was chosen last, which the model has not been fed.
    fn newest(&self) -> u32 {
        self.tokens[self.tokens.len() - 1]
    }

    /// Tokens that the model has been fed.
    fn fed(&self) -> usize {
        self.prompt.len() + self.tokens.len() - 1
    }

    fn complete(self) -> Completion {
        let span = self.first.zip(self.last).map_or(0.0, |(first, last)| (last - first).as_secs_f64());
        Completion {
            tokens: self.tokens,
            finish: self.finish.unwrap_or(Finish::Length),
            ended_by_eos: self.ended_by_eos,
            stopped_by_text: self.stopped_by_text,
            decode_s: span,
            drafted: self.drafted,
            accepted: self.accepted,
        }
    }
}

struct Running<'a, 'w, 'f> {
    limits: &'a Limits,
    watch: &'w mut Watch<'f>,
    jobs: Vec<Job<'a>>,
    timings: Timings,
    planner: Planner,
}

impl<'a> Running<'a, '_, '_> {
    fn begin(&mut self, model: &mut dyn Forward, prompts: &'a [Vec<u32>]) -> Result<(), GenerateError> {
        for prompt in prompts {
            let limit = self.limits.max_new_tokens.min(model.max_context() - prompt.len());
            self.jobs.push(Job {
                sequence: model.begin().map_err(GenerateError::Model)?,
                prompt,
                seen: 0,
                limit,
                tokens: Vec::new(),
                finish: None,
                ended_by_eos: false,
                stopped_by_text: false,
                first: None,
                last: None,
                drafted: 0,
                accepted: 0,
            });
        }
        Ok(())
    }

    /// Feeds the prompts in steps of at most `step_tokens`, several sequences in a step where they fit.
    fn prefill(&mut self, model: &mut dyn Forward) -> Result<(), GenerateError> {
        let begun = Instant::now();
        loop {
            let mut room = self.limits.step_tokens.max(1);
            let mut pieces = Vec::new();
            for (i, job) in self.jobs.iter().enumerate() {
                let piece = room.min(job.prompt.len() - job.seen);
                if piece > 0 {
                    pieces.push((i, piece));
                    room -= piece;
                }
            }
            if pieces.is_empty() {
                break;
            }
            self.prefill_step(model, &pieces)?;
        }
        self.timings.prefill_s = begun.elapsed().as_secs_f64();
        Ok(())
    }

    /// Feeds `(job, tokens)` pieces; a sequence whose prompt ends in this step gets its first token.
    fn prefill_step(&mut self, model: &mut dyn Forward, pieces: &[(usize, usize)]) -> Result<(), GenerateError> {
        let runs: Vec<_> = pieces
            .iter()
            .map(|&(i, piece)| (self.jobs[i].sequence, &self.jobs[i].prompt[self.jobs[i].seen..][..piece]))
            .collect();
        let vocab_size = model.vocab_size();
        let logits = model.forward(&runs).map_err(GenerateError::Model)?;
        for (&(i, piece), row) in pieces.iter().zip(logits.chunks_exact(vocab_size)) {
            self.timings.prefill_tokens += piece;
            self.jobs[i].seen += piece;
            if self.jobs[i].seen == self.jobs[i].prompt.len() {
                self.take(i, row)?;
            }
        }
        Ok(())
    }

    /// Steps of all sequences that go on, until all have ended: each gives one token, or drafts are checked and it gives several.
    fn decode(&mut self, model: &mut dyn Forward) -> Result<(), GenerateError> {
        let begun = Instant::now();
        loop {
            let active: Vec<usize> = (0..self.jobs.len()).filter(|&i| self.jobs[i].finish.is_none()).collect();
            if active.is_empty() {
                break;
            }
            let drafts = self.planner.next(active.len()).min(self.useful_drafts(model, &active));
            let step = Instant::now();
            let before = self.timings.decode_tokens;
            match drafts {
                0 => self.plain_step(model, &active)?,
                _ => self.checked_step(model, &active, drafts)?,
            }
            let gained = self.timings.decode_tokens - before;
            self.planner.observe(drafts, active.len(), gained, step.elapsed());
        }
        self.timings.decode_s = begun.elapsed().as_secs_f64();
        Ok(())
    }

    /// Drafts that fit the context of every sequence, and that at least one still wants.
    fn useful_drafts(&self, model: &dyn Forward, active: &[usize]) -> usize {
        let jobs = || active.iter().map(|&i| &self.jobs[i]);
        let room = jobs().map(|job| model.max_context() - job.fed()).min().unwrap_or(0);
        let wanted = jobs().map(|job| job.limit - job.tokens.len()).max().unwrap_or(0);
        room.min(wanted).saturating_sub(1)
    }

    /// One token of each sequence.
    fn plain_step(&mut self, model: &mut dyn Forward, active: &[usize]) -> Result<(), GenerateError> {
        let vocab_size = model.vocab_size();
        let newest: Vec<u32> = active.iter().map(|&i| self.jobs[i].newest()).collect();
        let sequences = active.iter().map(|&i| self.jobs[i].sequence);
        let runs: Vec<_> = sequences.zip(newest.chunks(1)).collect();
        let logits = model.forward(&runs).map_err(GenerateError::Model)?;
        for (&i, row) in active.iter().zip(logits.chunks_exact(vocab_size)) {
            self.take(i, row)?;
            self.timings.decode_tokens += 1;
        }
        Ok(())
    }

    /// Drafts tokens of each sequence and checks them in one step. A token is chosen from the model's own logits as ever; a draft
    /// only decides whether the logits after it are of use. So tokens, and their distribution, are those without drafts.
    fn checked_step(&mut self, model: &mut dyn Forward, active: &[usize], drafts: usize) -> Result<(), GenerateError> {
        let vocab_size = model.vocab_size();
        let known: Vec<_> = active.iter().map(|&i| (self.jobs[i].sequence, self.jobs[i].newest())).collect();
        let Some(drafter) = model.drafter() else { return Err(GenerateError::NoDrafts(drafts)) };
        let drafted = drafter.draft(&known, drafts).map_err(GenerateError::Model)?;
        let fed: Vec<Vec<u32>> =
            known.iter().zip(&drafted).map(|(&(_, newest), d)| [&[newest], d.as_slice()].concat()).collect();
        let runs: Vec<_> =
            known.iter().zip(&fed).map(|(&(sequence, _), tokens)| (sequence, tokens.as_slice())).collect();
        let logits = drafter.forward_tentative(&runs).map_err(GenerateError::Model)?;
        let mut accepted = Vec::with_capacity(active.len());
        for ((&i, drafts), rows) in active.iter().zip(&drafted).zip(logits.chunks_exact(vocab_size * (drafts + 1))) {
            accepted.push(self.take_checked(i, drafts, rows.chunks_exact(vocab_size))?);
        }
        for (&(sequence, _), tokens) in known.iter().zip(accepted) {
            drafter.accept(sequence, tokens).map_err(GenerateError::Model)?;
        }
        Ok(())
    }

    /// Takes tokens of job `i` from the rows after its newest token and each draft, until a draft is wrong or the sequence ends. Gives
    /// how many of the tokens that were fed are the sequence's own.
    fn take_checked<'r>(
        &mut self,
        i: usize,
        drafts: &[u32],
        rows: impl Iterator<Item = &'r [f32]>,
    ) -> Result<usize, GenerateError> {
        self.jobs[i].drafted += drafts.len();
        let mut own = 0;
        for (row, draft) in rows.zip(drafts.iter().map(Some).chain([None])) {
            self.take(i, row)?;
            self.timings.decode_tokens += 1;
            own += 1;
            let job = &mut self.jobs[i];
            let right = draft == Some(&job.newest());
            job.accepted += usize::from(right);
            if !right || job.finish.is_some() {
                break;
            }
        }
        Ok(own)
    }

    /// Chooses the next token of job `i` and sees whether it ends.
    fn take(&mut self, i: usize, logits: &[f32]) -> Result<(), GenerateError> {
        let job = &mut self.jobs[i];
        if job.limit == 0 {
            job.finish = Some(Finish::Length);
            return Ok(());
        }
        let position = u32::try_from(job.prompt.len() + job.tokens.len()).unwrap_or(u32::MAX);
        let token = self.limits.sampling.choose(logits, u32::try_from(i).unwrap_or(u32::MAX), position)?;
        let now = Instant::now();
        job.first.get_or_insert(now);
        job.last = Some(now);
        job.tokens.push(token);
        if self.limits.eos.contains(&token) {
            job.ended_by_eos = true;
            job.finish = Some(Finish::Stop);
        } else if (self.watch)(i, token)?.is_break() {
            job.stopped_by_text = true;
            job.finish = Some(Finish::Stop);
        } else if job.tokens.len() == job.limit {
            job.finish = Some(Finish::Length);
        }
        Ok(())
    }
}
