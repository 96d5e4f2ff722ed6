//! Requests as one continuous batch: sequences enter, are continued step by step, and leave; others take their places.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::decode::{Completion, Decoder, Gained, Job, rate};
use super::requests::Request;
use super::{Forward, GenerateError};

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
    fn add(&mut self, Gained { prompt, new }: Gained, time: Duration) {
        let share = prompt as f64 / (prompt + new).max(1) as f64;
        self.prefill_tokens += prompt;
        self.decode_tokens += new;
        self.prefill_s += share * time.as_secs_f64();
        self.decode_s += (1.0 - share) * time.as_secs_f64();
    }
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

/// Continues every request, at most `batch` at once. What a sequence becomes does not depend on the others.
/// # Errors
/// [`GenerateError`] if a prompt does not fit the model, or the model fails.
pub fn run(
    model: &mut dyn Forward,
    requests: &[Request],
    batch: usize,
    decoder: &mut Decoder,
    watch: &mut dyn Watch,
) -> Result<Timings, GenerateError> {
    requests.iter().try_for_each(|r| r.check(model.vocab_size(), model.max_context()))?;
    decoder.prepare(model);
    let mut running =
        Running { batch, decoder, watch, waiting: requests, jobs: Vec::new(), timings: Timings::default() };
    let done = running.run(model);
    for job in &running.jobs {
        model.end(job.sequence);
    }
    done.map(|()| running.timings)
}

struct Running<'a, 'w> {
    /// Most sequences at once.
    batch: usize,
    decoder: &'w mut Decoder,
    watch: &'w mut dyn Watch,
    /// Requests that have not begun.
    waiting: &'a [Request],
    /// Sequences that have not ended, in the order of their requests.
    jobs: Vec<Job<'a>>,
    timings: Timings,
}

impl Running<'_, '_> {
    fn run(&mut self, model: &mut dyn Forward) -> Result<(), GenerateError> {
        let requests = self.waiting.len();
        loop {
            while self.jobs.len() < self.batch.max(1)
                && let Some((first, rest)) = self.waiting.split_first()
            {
                let sequence = model.begin().map_err(GenerateError::Model)?;
                self.jobs.push(Job::new(requests - self.waiting.len(), first, sequence, model.max_context()));
                self.waiting = rest;
            }
            if self.jobs.is_empty() {
                return Ok(());
            }
            self.step(model)?;
            self.retire(model)?;
        }
    }

    fn step(&mut self, model: &mut dyn Forward) -> Result<(), GenerateError> {
        let begun = Instant::now();
        let gained =
            self.decoder.step(model, &mut self.jobs, &mut |request, token| self.watch.token(request, token))?;
        self.timings.add(gained, begun.elapsed());
        Ok(())
    }

    /// Ends what has ended.
    fn retire(&mut self, model: &mut dyn Forward) -> Result<(), GenerateError> {
        while let Some(i) = self.jobs.iter().position(|job| job.finish().is_some()) {
            let job = self.jobs.remove(i);
            model.end(job.sequence);
            self.watch.done(job.number, job.complete(self.decoder))?;
        }
        Ok(())
    }
}
