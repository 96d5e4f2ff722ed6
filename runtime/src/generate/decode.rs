//! Sequences continued: a step reads pieces of their prompts, or gives each a token, or several where drafts are right.
//!
//! [`Decoder::step`] is the one place where tokens come to be. Whose the sequences are, when they begin and what happens between
//! steps is for its callers: [`super::batch`], and the chat.

use std::ops::ControlFlow;
use std::time::Instant;

use super::draft::Planner;
use super::requests::Request;
use super::{Checked, Forward, GenerateError, Run, Sequence};
use crate::piece::{CHUNKED_TOKENS, Steps, Unread};
use crate::sample::logprobs::Logprobs;
use crate::sample::{Choosing, Edits};

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it, or whoever watched it did.
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
    /// Tokens of its prompt.
    pub prompt_tokens: usize,
    /// The new tokens, with the one that ended it.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// True if the last token is one that ends sequences.
    pub ended_by_token: bool,
    /// True if whoever watched the tokens ended it.
    pub ended_by_watch: bool,
    /// Seconds from its first step to the end of its prompt, or until now where that has not been reached.
    pub prefill_s: f64,
    /// Seconds from its first new token to its last.
    pub decode_s: f64,
    /// Tokens that were drafted for it.
    pub drafted: usize,
    /// Drafts that were right.
    pub accepted: usize,
    /// Of each new token, if asked for.
    pub logprobs: Option<Vec<Logprobs>>,
    /// Of each token of the prompt, none for the first, if asked for.
    pub prompt_logprobs: Option<Vec<Option<Logprobs>>>,
}

impl Completion {
    /// The new tokens without the one that ended it.
    pub fn without_end(&self) -> &[u32] {
        &self.tokens[..self.tokens.len() - usize::from(self.ended_by_token)]
    }

    /// Speed of reading its prompt.
    pub fn prefill_tokens_per_s(&self) -> f64 {
        rate(self.prompt_tokens, self.prefill_s)
    }

    /// Speed of its decoding; the first token belongs to the prompt. 0 if there was none.
    pub fn decode_tokens_per_s(&self) -> f64 {
        rate(self.tokens.len().saturating_sub(1), self.decode_s)
    }
}

/// Tokens a second; 0 if there are none.
pub(super) fn rate(tokens: usize, seconds: f64) -> f64 {
    if tokens == 0 || seconds <= 0.0 { 0.0 } else { tokens as f64 / seconds }
}

/// A sequence at work.
pub struct Job<'a> {
    /// The number of its request.
    pub number: usize,
    /// What it continues.
    pub request: &'a Request,
    /// Its state in the model.
    pub sequence: Sequence,
    /// Tokens of the prompt that the model has been fed.
    read: usize,
    /// A length of the prompt that no step reads across, so that the state there can be kept.
    halt: usize,
    /// Most new tokens, by request and context.
    limit: usize,
    tokens: Vec<u32>,
    /// What biases and penalties change, by prompt and tokens.
    edits: Edits,
    finish: Option<Finish>,
    ended_by_token: bool,
    ended_by_watch: bool,
    begun: Option<Instant>,
    prompt_read: Option<Instant>,
    newest_at: Option<Instant>,
    drafted: usize,
    accepted: usize,
    logprobs: Vec<Logprobs>,
    prompt_logprobs: Vec<Option<Logprobs>>,
}

impl<'a> Job<'a> {
    /// `request`, which [`Request::check`] has let pass, in an empty sequence of a model with this context.
    pub fn new(number: usize, request: &'a Request, sequence: Sequence, max_context: usize) -> Self {
        Self {
            number,
            request,
            sequence,
            read: 0,
            halt: 0,
            limit: request.max_new_tokens.min(max_context - request.tokens.len()),
            tokens: Vec::new(),
            edits: Edits::new(&request.sampling, &request.tokens),
            finish: None,
            ended_by_token: false,
            ended_by_watch: false,
            begun: None,
            prompt_read: None,
            newest_at: None,
            drafted: 0,
            accepted: 0,
            logprobs: Vec::new(),
            prompt_logprobs: vec![None],
        }
    }

    /// The same in a sequence that has been fed the first `read` tokens of the prompt, not all; no step reads across `halt` tokens of it.
    pub fn resume(self, read: usize, halt: usize) -> Self {
        Self { read, halt, ..self }
    }

    /// Why it has ended; none while it goes on.
    pub fn finish(&self) -> Option<Finish> {
        self.finish
    }

    /// Its prompt has not been fed to the end.
    pub fn is_reading(&self) -> bool {
        self.read < self.request.tokens.len()
    }

    /// How many tokens the model has been fed: all but the newest, which is fed in the step that needs it.
    pub fn fed(&self) -> usize {
        self.read + self.tokens.len().saturating_sub(1)
    }

    /// The tokens that the model has been fed after the first `known`.
    pub fn fed_since(&self, known: usize) -> impl Iterator<Item = u32> {
        let new = &self.tokens[..self.tokens.len().saturating_sub(1)];
        self.request.tokens[..self.read].iter().chain(new).skip(known).copied()
    }

    /// What it has become.
    pub fn complete(self, decoder: &Decoder) -> Completion {
        let span = |from: Option<Instant>, to: Option<Instant>| {
            from.zip(to).map_or(0.0, |(from, to)| to.duration_since(from).as_secs_f64())
        };
        Completion {
            prompt_tokens: self.request.tokens.len(),
            tokens: self.tokens,
            finish: self.finish.unwrap_or(Finish::Length),
            ended_by_token: self.ended_by_token,
            ended_by_watch: self.ended_by_watch,
            prefill_s: span(self.begun, self.prompt_read.or_else(|| Some(Instant::now()))),
            decode_s: span(self.prompt_read, self.newest_at),
            drafted: self.drafted,
            accepted: self.accepted,
            logprobs: decoder.logprobs.map(|_| self.logprobs),
            prompt_logprobs: decoder.prompt_logprobs.map(|_| self.prompt_logprobs),
        }
    }

    /// What a step that has room for `most` tokens reads of the prompt, and the token after it; nothing if that is too little room, though not if it is
    /// `all` that small steps have.
    fn next_piece(&self, steps: Steps, most: usize, all: bool) -> (&'a [u32], Option<&'a u32>) {
        let unread = &self.request.tokens[self.read..];
        let until_halt = self.halt.checked_sub(self.read).filter(|&n| n > 0).unwrap_or(unread.len());
        let next = Unread { position: self.read, tokens: until_halt.min(unread.len()) };
        let (piece, later) = unread.split_at(steps.cut(next, most, all));
        (piece, later.first())
    }

    /// How its next token is chosen.
    fn choosing(&self) -> Choosing<'_> {
        let (request, edits) = (self.request, &self.edits);
        let position = u32::try_from(request.tokens.len() + self.tokens.len()).unwrap_or(u32::MAX);
        Choosing { sampling: &request.sampling, edits, sequence: request.number, position }
    }

    /// Its part of a step that feeds it `tokens`, of its prompt or behind it; chooses a token if they end at the newest one.
    fn run<'r>(&'r self, tokens: &'r [u32]) -> Run<'r> {
        let ends = !self.is_reading() || self.read + tokens.len() == self.request.tokens.len();
        let choosing = (ends && self.limit > 0).then(|| self.choosing());
        Run { sequence: self.sequence, tokens, choosing }
    }

    /// The token that was chosen last, which the model has not been fed.
    fn newest(&self) -> u32 {
        self.tokens[self.tokens.len() - 1]
    }
}

/// Is told each new token that is text, with the number of its request; `Break` ends the sequence, an error all of them.
pub type Told<'a> = dyn FnMut(usize, u32) -> Result<ControlFlow<()>, GenerateError> + 'a;

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gained {
    /// Tokens of prompts that were read.
    pub prompt: usize,
    /// New tokens of sequences past their prompts.
    pub new: usize,
}

/// Makes steps of sequences.
#[derive(Clone, Debug)]
pub struct Decoder {
    /// Most tokens in a step that has any of prompts.
    pub step_tokens: usize,
    /// Tokens that end a sequence.
    pub ends: Vec<u32>,
    /// How many tokens to draft.
    pub drafts: Planner,
    /// Note the probability of each new token, and of so many of the most probable.
    pub logprobs: Option<usize>,
    /// The same for the tokens of prompts.
    pub prompt_logprobs: Option<usize>,
}

/// Most tokens of a prompt in a step that gives the logits of all of them.
const ALL_LOGITS_TOKENS: usize = CHUNKED_TOKENS;

impl Decoder {
    /// Has the model keep what drafts need, if there may be any, and logits, if probabilities are noted. To be said before sequences are
    /// fed.
    pub fn prepare(&self, model: &mut dyn Forward) {
        if self.logprobs.is_some() {
            model.keep_logits();
        }
        if let Some(drafter) = model.drafter().filter(|_| self.drafts.may_draft()) {
            drafter.prepare();
        }
    }

    /// One step of `jobs`, none of which has ended. What a sequence becomes does not depend on the others.
    /// # Errors
    /// [`GenerateError`] if the model or `told` fails; how much the sequences have been fed is not known then.
    pub fn step(
        &mut self,
        model: &mut dyn Forward,
        jobs: &mut [Job<'_>],
        told: &mut Told<'_>,
    ) -> Result<Gained, GenerateError> {
        let reader = jobs.iter_mut().find(|job| job.is_reading());
        match (reader, self.prompt_logprobs) {
            (Some(job), Some(top)) => self.noting_step(model, job, top, told),
            (Some(_), None) => self.mixed_step(model, jobs, told),
            (None, _) => self.decode_step(model, jobs, told).map(|new| Gained { prompt: 0, new }),
        }
    }

    /// Feeds a piece of the prompt of a job, and notes the probabilities of its tokens.
    fn noting_step(
        &self,
        model: &mut dyn Forward,
        job: &mut Job<'_>,
        top: usize,
        told: &mut Told<'_>,
    ) -> Result<Gained, GenerateError> {
        job.begun.get_or_insert_with(Instant::now);
        let most = self.step_tokens.clamp(1, ALL_LOGITS_TOKENS);
        let (piece, later) = job.next_piece(Steps::of(most), most, true);
        let token = model.forward_all(job.run(piece)).map_err(GenerateError::Model)?;
        for (row, &token) in piece[1..].iter().chain(later).enumerate() {
            job.prompt_logprobs.push(Logprobs::of(model.logits(row), token, top));
        }
        self.read(job, piece.len(), token, self.note(model, piece.len() - 1, token), told)?;
        Ok(Gained { prompt: piece.len(), new: 0 })
    }

    /// How many tokens of prompts a step has room for beside so many sequences that decode: as many as the first prompt needs to go on.
    fn room(&self, decoding: usize) -> usize {
        let least = if self.step_tokens >= CHUNKED_TOKENS { CHUNKED_TOKENS } else { 1 };
        self.step_tokens.saturating_sub(decoding).max(least)
    }

    /// Feeds pieces of prompts, in all at most `step_tokens`, and the newest token of each sequence that is past its prompt.
    fn mixed_step(
        &self,
        model: &mut dyn Forward,
        jobs: &mut [Job<'_>],
        told: &mut Told<'_>,
    ) -> Result<Gained, GenerateError> {
        let decoding = jobs.iter().filter(|job| !job.is_reading()).count();
        let mut room = self.room(decoding);
        let newest: Vec<[u32; 1]> = jobs.iter().map(|job| [job.tokens.last().copied().unwrap_or(0)]).collect();
        let mut parts: Vec<(usize, &[u32])> = Vec::new();
        for (i, job) in jobs.iter_mut().enumerate() {
            if !job.is_reading() {
                parts.push((i, &newest[i]));
            } else if room > 0 {
                job.begun.get_or_insert_with(Instant::now);
                let (piece, _) = job.next_piece(Steps::of(self.step_tokens), room, decoding == 0 && parts.is_empty());
                if !piece.is_empty() {
                    room -= piece.len();
                    parts.push((i, piece));
                }
            }
        }
        let runs: Vec<Run<'_>> = parts.iter().map(|&(i, tokens)| jobs[i].run(tokens)).collect();
        let chooses: Vec<bool> = runs.iter().map(|run| run.choosing.is_some()).collect();
        let mut chosen = model.forward(&runs).map_err(GenerateError::Model)?.into_iter();
        let mut prompt = 0;
        for (row, (&(i, tokens), chooses)) in parts.iter().zip(chooses).enumerate() {
            let token = if chooses { chosen.next() } else { None };
            let logprobs = self.note(model, row, token);
            if jobs[i].is_reading() {
                prompt += tokens.len();
                self.read(&mut jobs[i], tokens.len(), token, logprobs, told)?;
            } else {
                self.take(&mut jobs[i], token, logprobs, told)?;
            }
        }
        Ok(Gained { prompt, new: decoding })
    }

    /// A job has been fed `piece` tokens of its prompt; after the last of them comes its first new token.
    fn read(
        &self,
        job: &mut Job<'_>,
        piece: usize,
        token: Option<u32>,
        logprobs: Option<Logprobs>,
        told: &mut Told<'_>,
    ) -> Result<(), GenerateError> {
        job.read += piece;
        if !job.is_reading() {
            job.prompt_read = Some(Instant::now());
            self.take(job, token, logprobs, told)?;
        }
        Ok(())
    }

    /// The probabilities at a row of the last step, if they are wanted.
    fn note(&self, model: &dyn Forward, row: usize, token: Option<u32>) -> Option<Logprobs> {
        let (top, token) = self.logprobs.zip(token)?;
        Logprobs::of(model.logits(row), token, top)
    }

    /// A step of sequences past their prompts: each gains one token, or drafts are checked and it gains several. Gives how many in all.
    fn decode_step(
        &mut self,
        model: &mut dyn Forward,
        jobs: &mut [Job<'_>],
        told: &mut Told<'_>,
    ) -> Result<usize, GenerateError> {
        let drafts = self.drafts.next_drafts().min(useful_drafts(jobs, model.max_context()));
        let begun = Instant::now();
        let gained = match drafts {
            0 => self.plain_step(model, jobs, told)?,
            _ => self.checked_step(model, jobs, drafts, told)?,
        };
        self.drafts.observe(drafts, &gained, begun.elapsed());
        Ok(gained.iter().sum())
    }

    /// One token of each sequence: gives how many each gained.
    fn plain_step(
        &self,
        model: &mut dyn Forward,
        jobs: &mut [Job<'_>],
        told: &mut Told<'_>,
    ) -> Result<Vec<usize>, GenerateError> {
        let newest: Vec<u32> = jobs.iter().map(Job::newest).collect();
        let runs: Vec<Run<'_>> = jobs.iter().zip(newest.chunks(1)).map(|(job, tokens)| job.run(tokens)).collect();
        let tokens = model.forward(&runs).map_err(GenerateError::Model)?;
        for (row, (job, token)) in jobs.iter_mut().zip(tokens).enumerate() {
            self.take(job, Some(token), self.note(model, row, Some(token)), told)?;
        }
        Ok(vec![1; jobs.len()])
    }

    /// Drafts tokens of each sequence and checks them in one step. A token is chosen from the model's own logits as ever; a draft
    /// only decides whether the token after it is of use. So tokens, and their distribution, are those without drafts. Gives how many
    /// each sequence gained.
    fn checked_step(
        &self,
        model: &mut dyn Forward,
        jobs: &mut [Job<'_>],
        drafts: usize,
        told: &mut Told<'_>,
    ) -> Result<Vec<usize>, GenerateError> {
        let newest: Vec<u32> = jobs.iter().map(Job::newest).collect();
        let runs: Vec<Run<'_>> = jobs.iter().zip(newest.chunks(1)).map(|(job, tokens)| job.run(tokens)).collect();
        let Some(drafter) = model.drafter() else { return Err(GenerateError::NoDrafts(drafts)) };
        let checked = drafter.speculate(&runs, drafts).map_err(GenerateError::Model)?;
        let (mut own, first_rows) = (Vec::with_capacity(jobs.len()), (0..).step_by(drafts + 1));
        for ((job, checked), first_row) in jobs.iter_mut().zip(checked).zip(first_rows) {
            job.drafted += drafts;
            own.push(self.take_checked(model, job, &checked, first_row, told)?);
        }
        let Some(drafter) = model.drafter() else { return Err(GenerateError::NoDrafts(drafts)) };
        for (job, &tokens) in jobs.iter().zip(&own) {
            drafter.accept(job.sequence, tokens).map_err(GenerateError::Model)?;
        }
        Ok(own)
    }

    /// Takes the tokens after a job's newest token and each draft, until a draft is wrong or the sequence ends; `first_row` is that of
    /// the first. Gives how many of the tokens that were fed are the sequence's own.
    fn take_checked(
        &self,
        model: &dyn Forward,
        job: &mut Job<'_>,
        checked: &Checked,
        first_row: usize,
        told: &mut Told<'_>,
    ) -> Result<usize, GenerateError> {
        let mut own = 0;
        for &token in &checked.tokens[..=checked.accepted] {
            self.take(job, Some(token), self.note(model, first_row + own, Some(token)), told)?;
            job.accepted += usize::from(own < checked.accepted);
            own += 1;
            if job.finish.is_some() {
                break;
            }
        }
        Ok(own)
    }

    /// Takes the next token of a job and sees whether it ends.
    fn take(
        &self,
        job: &mut Job<'_>,
        token: Option<u32>,
        logprobs: Option<Logprobs>,
        told: &mut Told<'_>,
    ) -> Result<(), GenerateError> {
        let Some(token) = token.filter(|_| job.limit > 0) else {
            job.finish = Some(Finish::Length);
            return Ok(());
        };
        job.newest_at = Some(Instant::now());
        job.tokens.push(token);
        job.edits.push(token);
        job.logprobs.extend(logprobs);
        if self.ends.contains(&token) {
            job.ended_by_token = true;
            job.finish = Some(Finish::Stop);
        } else if told(job.number, token)?.is_break() {
            job.ended_by_watch = true;
            job.finish = Some(Finish::Stop);
        } else if job.tokens.len() == job.limit {
            job.finish = Some(Finish::Length);
        }
        Ok(())
    }
}

/// Drafts that fit the context of every sequence, and that at least one still wants.
fn useful_drafts(jobs: &[Job<'_>], max_context: usize) -> usize {
    let room = jobs.iter().map(|job| max_context - job.fed()).min().unwrap_or(0);
    let wanted = jobs.iter().map(|job| job.limit - job.tokens.len()).max().unwrap_or(0);
    room.min(wanted).saturating_sub(1)
}
