//! The loop: sequences enter, read their prompts in steps, gain a token a step or several, and leave; another takes their place.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::draft::Planner;
use super::requests::Request;
use super::{Forward, GenerateError, Sequence};
use crate::sample::History;
use crate::sample::logprobs::Logprobs;

/// What all sequences share.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Most sequences at once.
    pub batch: usize,
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
    /// Tokens of its prompt.
    pub prompt_tokens: usize,
    /// The new tokens, with the one that ended it.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// True if the last token is one that ends sequences.
    pub ended_by_token: bool,
    /// True if whoever watched the tokens ended it.
    pub stopped_by_text: bool,
    /// Seconds from its first step to the end of its prompt.
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

    /// Counts a step. If it read prompts and decoded, its time is shared by tokens.
    fn add(&mut self, prompt: usize, new: usize, time: Duration) {
        let share = prompt as f64 / (prompt + new).max(1) as f64;
        self.prefill_tokens += prompt;
        self.decode_tokens += new;
        self.prefill_s += share * time.as_secs_f64();
        self.decode_s += (1.0 - share) * time.as_secs_f64();
    }
}

fn rate(tokens: usize, seconds: f64) -> f64 {
    if tokens == 0 || seconds <= 0.0 { 0.0 } else { tokens as f64 / seconds }
}

/// Is told what becomes of requests, by their numbers.
pub trait Watch {
    /// A new token that is text; `Break` ends the sequence.
    /// # Errors
    /// [`GenerateError`] ends all.
    fn token(&mut self, request: usize, token: u32) -> Result<ControlFlow<()>, GenerateError>;
    /// It has ended.
    /// # Errors
    /// [`GenerateError`] ends all.
    fn done(&mut self, request: usize, completion: Completion) -> Result<(), GenerateError>;
}

/// Continues every request, so many at once as `limits` allow. What a sequence becomes does not depend on the others.
/// # Errors
/// [`GenerateError`] if a prompt does not fit the model, or the model fails.
pub fn run(
    model: &mut dyn Forward,
    requests: &[Request],
    limits: &Limits,
    watch: &mut dyn Watch,
) -> Result<Timings, GenerateError> {
    requests.iter().try_for_each(|r| r.check(model.vocab_size(), model.max_context()))?;
    if let Some(drafter) = model.drafter().filter(|_| limits.drafts.may_draft()) {
        drafter.prepare();
    }
    let planner = limits.drafts.clone();
    let mut running =
        Running { limits, watch, waiting: requests, jobs: Vec::new(), timings: Timings::default(), planner };
    let done = running.run(model);
    for job in &running.jobs {
        model.end(job.sequence);
    }
    done.map(|()| running.timings)
}

/// A sequence at work.
struct Job<'a> {
    /// The number of its request.
    number: usize,
    request: &'a Request,
    sequence: Sequence,
    /// Tokens of the prompt that the model has seen.
    seen: usize,
    /// Most new tokens, by request and context.
    limit: usize,
    tokens: Vec<u32>,
    finish: Option<Finish>,
    ended_by_token: bool,
    stopped_by_text: bool,
    begun: Option<Instant>,
    prompt_read: Option<Instant>,
    newest_at: Option<Instant>,
    drafted: usize,
    accepted: usize,
    logprobs: Vec<Logprobs>,
    prompt_logprobs: Vec<Option<Logprobs>>,
}

impl<'a> Job<'a> {
    fn new(number: usize, request: &'a Request, model: &mut dyn Forward) -> Result<Self, GenerateError> {
        Ok(Self {
            number,
            request,
            sequence: model.begin().map_err(GenerateError::Model)?,
            seen: 0,
            limit: request.max_new_tokens.min(model.max_context() - request.tokens.len()),
            tokens: Vec::new(),
            finish: None,
            ended_by_token: false,
            stopped_by_text: false,
            begun: None,
            prompt_read: None,
            newest_at: None,
            drafted: 0,
            accepted: 0,
            logprobs: Vec::new(),
            prompt_logprobs: vec![None],
        })
    }

    /// The part of the prompt that the model has not seen.
    fn unread(&self) -> &'a [u32] {
        &self.request.tokens[self.seen..]
    }

    /// The token that was chosen last, which the model has not been fed.
    fn newest(&self) -> u32 {
        self.tokens[self.tokens.len() - 1]
    }

    /// Tokens that the model has been fed.
    fn fed(&self) -> usize {
        self.seen + self.tokens.len().saturating_sub(1)
    }

    fn complete(self, limits: &Limits) -> Completion {
        let span = |from: Option<Instant>, to: Option<Instant>| {
            from.zip(to).map_or(0.0, |(from, to)| to.duration_since(from).as_secs_f64())
        };
        Completion {
            prompt_tokens: self.request.tokens.len(),
            tokens: self.tokens,
            finish: self.finish.unwrap_or(Finish::Length),
            ended_by_token: self.ended_by_token,
            stopped_by_text: self.stopped_by_text,
            prefill_s: span(self.begun, self.prompt_read),
            decode_s: span(self.prompt_read, self.newest_at),
            drafted: self.drafted,
            accepted: self.accepted,
            logprobs: limits.logprobs.map(|_| self.logprobs),
            prompt_logprobs: limits.prompt_logprobs.map(|_| self.prompt_logprobs),
        }
    }
}

struct Running<'a, 'w> {
    limits: &'a Limits,
    watch: &'w mut dyn Watch,
    /// Requests that have not begun.
    waiting: &'a [Request],
    /// Sequences that have not ended, in the order of their requests.
    jobs: Vec<Job<'a>>,
    timings: Timings,
    planner: Planner,
}

/// Most tokens of a prompt in a step that gives the logits of all of them.
const ALL_LOGITS_TOKENS: usize = 64;

impl Running<'_, '_> {
    fn run(&mut self, model: &mut dyn Forward) -> Result<(), GenerateError> {
        let requests = self.waiting.len();
        loop {
            while self.jobs.len() < self.limits.batch.max(1)
                && let Some((first, rest)) = self.waiting.split_first()
            {
                self.jobs.push(Job::new(requests - self.waiting.len(), first, model)?);
                self.waiting = rest;
            }
            if self.jobs.is_empty() {
                return Ok(());
            }
            self.step(model)?;
            self.retire(model)?;
        }
    }

    /// Ends what has ended.
    fn retire(&mut self, model: &mut dyn Forward) -> Result<(), GenerateError> {
        while let Some(i) = self.jobs.iter().position(|job| job.finish.is_some()) {
            let job = self.jobs.remove(i);
            model.end(job.sequence);
            self.watch.done(job.number, job.complete(self.limits))?;
        }
        Ok(())
    }

    /// One step, and the drafts that it checks.
    fn step(&mut self, model: &mut dyn Forward) -> Result<(), GenerateError> {
        let begun = Instant::now();
        let reader = self.jobs.iter().position(|job| !job.unread().is_empty());
        let (prompt, new) = match (reader, self.limits.prompt_logprobs) {
            (Some(i), Some(top)) => (self.noting_step(model, i, top)?, 0),
            (Some(_), None) => self.mixed_step(model)?,
            (None, _) => (0, self.decode_step(model)?),
        };
        self.timings.add(prompt, new, begun.elapsed());
        Ok(())
    }

    /// Feeds a piece of the prompt of job `i`, and notes the probabilities of its tokens.
    fn noting_step(&mut self, model: &mut dyn Forward, i: usize, top: usize) -> Result<usize, GenerateError> {
        let job = &mut self.jobs[i];
        job.begun.get_or_insert_with(Instant::now);
        let piece = self.limits.step_tokens.clamp(1, ALL_LOGITS_TOKENS).min(job.unread().len());
        let (now, later) = job.unread().split_at(piece);
        let vocab_size = model.vocab_size();
        let logits = model.forward_all(job.sequence, now).map_err(GenerateError::Model)?;
        let next = now[1..].iter().chain(later.first());
        for (row, &token) in logits.chunks_exact(vocab_size).zip(next) {
            job.prompt_logprobs.push(Logprobs::of(row, token, top));
        }
        let last = &logits[(piece - 1) * vocab_size..];
        self.read(i, piece, last)?;
        Ok(piece)
    }

    /// Feeds pieces of prompts, in all at most `step_tokens`, and the newest token of each sequence that is past its prompt. Gives how
    /// many there were of both.
    fn mixed_step(&mut self, model: &mut dyn Forward) -> Result<(usize, usize), GenerateError> {
        let decoding = self.jobs.iter().filter(|job| job.unread().is_empty()).count();
        let mut room = self.limits.step_tokens.saturating_sub(decoding).max(1);
        let newest: Vec<[u32; 1]> = self.jobs.iter().map(|job| [job.tokens.last().copied().unwrap_or(0)]).collect();
        let mut parts: Vec<(usize, &[u32])> = Vec::new();
        for (i, job) in self.jobs.iter_mut().enumerate() {
            if job.unread().is_empty() {
                parts.push((i, &newest[i]));
            } else if room > 0 {
                job.begun.get_or_insert_with(Instant::now);
                let piece = &job.unread()[..room.min(job.unread().len())];
                room -= piece.len();
                parts.push((i, piece));
            }
        }
        let runs: Vec<_> = parts.iter().map(|&(i, tokens)| (self.jobs[i].sequence, tokens)).collect();
        let vocab_size = model.vocab_size();
        let logits = model.forward(&runs).map_err(GenerateError::Model)?;
        let mut prompt = 0;
        for (&(i, tokens), row) in parts.iter().zip(logits.chunks_exact(vocab_size)) {
            if self.jobs[i].unread().is_empty() {
                self.take(i, row)?;
            } else {
                prompt += tokens.len();
                self.read(i, tokens.len(), row)?;
            }
        }
        Ok((prompt, decoding))
    }

    /// Job `i` has been fed `piece` tokens of its prompt; after the last of them comes its first new token.
    fn read(&mut self, i: usize, piece: usize, logits: &[f32]) -> Result<(), GenerateError> {
        let job = &mut self.jobs[i];
        job.seen += piece;
        if job.unread().is_empty() {
            job.prompt_read = Some(Instant::now());
            self.take(i, logits)?;
        }
        Ok(())
    }

    /// A step of sequences past their prompts: each gains one token, or drafts are checked and it gains several. Gives how many in all.
    fn decode_step(&mut self, model: &mut dyn Forward) -> Result<usize, GenerateError> {
        let drafts = self.planner.next(self.jobs.len()).min(self.useful_drafts(model));
        let (begun, sequences) = (Instant::now(), self.jobs.len());
        let gained = match drafts {
            0 => self.plain_step(model)?,
            _ => self.checked_step(model, drafts)?,
        };
        self.planner.observe(drafts, sequences, gained, begun.elapsed());
        Ok(gained)
    }

    /// Drafts that fit the context of every sequence, and that at least one still wants.
    fn useful_drafts(&self, model: &dyn Forward) -> usize {
        let room = self.jobs.iter().map(|job| model.max_context() - job.fed()).min().unwrap_or(0);
        let wanted = self.jobs.iter().map(|job| job.limit - job.tokens.len()).max().unwrap_or(0);
        room.min(wanted).saturating_sub(1)
    }

    /// One token of each sequence.
    fn plain_step(&mut self, model: &mut dyn Forward) -> Result<usize, GenerateError> {
        let vocab_size = model.vocab_size();
        let newest: Vec<u32> = self.jobs.iter().map(Job::newest).collect();
        let runs: Vec<_> = self.jobs.iter().map(|job| job.sequence).zip(newest.chunks(1)).collect();
        let logits = model.forward(&runs).map_err(GenerateError::Model)?;
        for (i, row) in logits.chunks_exact(vocab_size).enumerate() {
            self.take(i, row)?;
        }
        Ok(newest.len())
    }

    /// Drafts tokens of each sequence and checks them in one step. A token is chosen from the model's own logits as ever; a draft
    /// only decides whether the logits after it are of use. So tokens, and their distribution, are those without drafts.
    fn checked_step(&mut self, model: &mut dyn Forward, drafts: usize) -> Result<usize, GenerateError> {
        let vocab_size = model.vocab_size();
        let known: Vec<_> = self.jobs.iter().map(|job| (job.sequence, job.newest())).collect();
        let Some(drafter) = model.drafter() else { return Err(GenerateError::NoDrafts(drafts)) };
        let drafted = drafter.draft(&known, drafts).map_err(GenerateError::Model)?;
        let fed: Vec<Vec<u32>> =
            known.iter().zip(&drafted).map(|(&(_, newest), d)| [&[newest], d.as_slice()].concat()).collect();
        let runs: Vec<_> =
            known.iter().zip(&fed).map(|(&(sequence, _), tokens)| (sequence, tokens.as_slice())).collect();
        let logits = drafter.forward_tentative(&runs).map_err(GenerateError::Model)?;
        let mut accepted = Vec::with_capacity(known.len());
        for (i, (drafts, rows)) in drafted.iter().zip(logits.chunks_exact(vocab_size * (drafts + 1))).enumerate() {
            accepted.push(self.take_checked(i, drafts, rows.chunks_exact(vocab_size))?);
        }
        let gained = accepted.iter().sum();
        for (&(sequence, _), tokens) in known.iter().zip(accepted) {
            drafter.accept(sequence, tokens).map_err(GenerateError::Model)?;
        }
        Ok(gained)
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
        let request = job.request;
        let history = History { prompt: &request.tokens, output: &job.tokens };
        let position = u32::try_from(request.tokens.len() + job.tokens.len()).unwrap_or(u32::MAX);
        let token = request.sampling.choose(logits, &history, request.number, position)?;
        job.newest_at = Some(Instant::now());
        job.tokens.push(token);
        job.logprobs.extend(self.limits.logprobs.and_then(|top| Logprobs::of(logits, token, top)));
        if self.limits.ends.contains(&token) {
            job.ended_by_token = true;
            job.finish = Some(Finish::Stop);
        } else if self.watch.token(job.number, token)?.is_break() {
            job.stopped_by_text = true;
            job.finish = Some(Finish::Stop);
        } else if job.tokens.len() == job.limit {
            job.finish = Some(Finish::Length);
        }
        Ok(())
    }
}
