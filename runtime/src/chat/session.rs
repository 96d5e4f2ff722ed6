//! A sequence that is kept between turns: what it has been fed, and the snapshots it can go back to.

use std::ops::ControlFlow;

use super::error::ChatError;
use super::model::ChatModel;
use crate::generate::GenerateError;
use crate::generate::decode::{Decoder, Finish, Job};
use crate::generate::requests::Request;
use crate::sample::Sampling;
use crate::tokenizer::Special;

/// Snapshots that are kept; the oldest goes first.
pub const MAX_SNAPSHOTS: usize = 8;

/// How to answer, and when to stop.
#[derive(Clone, Debug)]
pub struct Answering {
    /// Most new tokens.
    pub max_new_tokens: usize,
    /// How to choose tokens.
    pub sampling: Sampling,
    /// Makes the steps, and remembers what it has learnt of drafts.
    pub decoder: Decoder,
}

impl Answering {
    fn request(&self, prompt: &Prompt) -> Request {
        Request {
            at: "the conversation".to_owned(),
            tokens: prompt.tokens.clone(),
            max_new_tokens: self.max_new_tokens,
            sampling: self.sampling.clone(),
            number: 0,
            stops: Vec::new(),
            special: Special::Skip,
        }
    }
}

/// A conversation as token ids, to be answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    /// All of it.
    pub tokens: Vec<u32>,
    /// How many of them stand before the beginning of the answer: later turns begin with these even where the template
    /// writes the answer anew. 0 if that is not known.
    pub stable: usize,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The model ended it.
    Stop,
    /// It is as long as allowed.
    Length,
    /// Whoever watched it ended it.
    Interrupted,
}

/// What a turn cost.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TurnStats {
    /// Tokens of the prompt that were fed.
    pub fed: usize,
    /// Tokens of the prompt that the sequence had already.
    pub reused: usize,
    /// Seconds until the first token of the answer.
    pub prefill_s: f64,
    /// Tokens of the answer.
    pub answer: usize,
    /// Seconds for them after the first.
    pub decode_s: f64,
    /// Tokens that were drafted.
    pub drafted: usize,
    /// Those that were right.
    pub accepted: usize,
}

/// An answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Its tokens, without the one that ended it.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub end: End,
    /// What it cost.
    pub stats: TurnStats,
}

/// What watches an answer: called with each token, and with none between the steps of a prompt.
pub type Watch<'a> = dyn FnMut(Option<u32>) -> Result<ControlFlow<()>, GenerateError> + 'a;

/// A model's sequence, its tokens and snapshots.
pub struct Session<M: ChatModel> {
    model: M,
    fed: Vec<u32>,
    /// By length, at most [`MAX_SNAPSHOTS`].
    snapshots: Vec<Snapshot<M::Kept>>,
}

struct Snapshot<K> {
    /// Tokens that the sequence had been fed.
    tokens: usize,
    bytes: u64,
    kept: K,
}

impl<M: ChatModel> Session<M> {
    /// A session that has been fed nothing.
    pub fn new(model: M) -> Self {
        Self { model, fed: Vec::new(), snapshots: Vec::new() }
    }

    /// The model.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// What the sequence has been fed.
    pub fn fed(&self) -> &[u32] {
        &self.fed
    }

    /// Snapshots and the bytes they take.
    pub fn snapshots(&self) -> (usize, u64) {
        (self.snapshots.len(), self.snapshots.iter().map(|s| s.bytes).sum())
    }

    /// Answers a conversation; feeds what the sequence has not been fed.
    /// # Errors
    /// [`ChatError`] if the prompt does not fit, or the model fails; then the sequence is as it was at its last snapshot.
    pub fn answer(&mut self, prompt: &Prompt, how: &mut Answering, watch: &mut Watch<'_>) -> Result<Answer, ChatError> {
        let max_context = self.model.max_context();
        if prompt.tokens.len() > max_context {
            return Err(ChatError::Full { tokens: prompt.tokens.len(), max_context });
        }
        // the last token is fed in any case: its logits are needed
        let prompt_end = prompt.tokens.len().saturating_sub(1);
        self.go_back_to(&prompt.tokens[..prompt_end])?;
        let reused = self.fed.len();
        let request = how.request(prompt);
        let mut job = Job::new(0, &request, self.model.sequence(), max_context).resume(reused, prompt.stable);
        if let Err(error) = self.run(&mut job, prompt.stable, &mut how.decoder, watch) {
            self.go_back_to_snapshot()?;
            return Err(error);
        }
        self.keep_snapshot()?;
        let fed = self.fed.len().min(prompt.tokens.len()) - reused;
        Ok(answer_of(job, &how.decoder, TurnStats { fed, reused, ..TurnStats::default() }))
    }

    /// Steps until the job ends, or is interrupted.
    fn run(
        &mut self,
        job: &mut Job<'_>,
        stable: usize,
        decoder: &mut Decoder,
        watch: &mut Watch<'_>,
    ) -> Result<(), ChatError> {
        while job.finish().is_none() {
            let reading = job.is_reading();
            if reading && watch(None)?.is_break() {
                break;
            }
            decoder.step(&mut self.model, std::slice::from_mut(job), &mut |_, token| watch(Some(token)))?;
            self.fed.extend(job.fed_since(self.fed.len()));
            if reading && self.fed.len() == stable {
                self.keep_snapshot()?;
            }
        }
        Ok(())
    }

    /// Forgets the snapshot at `tokens` tokens, since later turns go on from a later one.
    pub fn forget_snapshot(&mut self, tokens: usize) {
        self.snapshots.retain(|s| s.tokens != tokens);
    }

    /// Forgets everything.
    /// # Errors
    /// [`ChatError::Model`] if the sequence is lost.
    pub fn reset(&mut self) -> Result<(), ChatError> {
        self.fed.clear();
        self.snapshots.clear();
        self.model.rewind().map_err(ChatError::Model)
    }

    /// Takes over a state that `read` gives the model; `tokens` are what it was fed.
    pub(super) fn replace(
        &mut self,
        tokens: Vec<u32>,
        read: impl FnOnce(&mut M) -> std::io::Result<()>,
    ) -> Result<std::io::Result<()>, ChatError> {
        self.reset()?;
        let result = read(&mut self.model);
        match result {
            Ok(()) => self.fed = tokens,
            Err(_) => self.reset()?,
        }
        if result.is_ok() && !self.fed.is_empty() {
            self.keep_snapshot()?;
        }
        Ok(result)
    }

    /// Goes back to where the sequence is a prefix of `tokens`.
    /// # Errors
    /// [`ChatError::Model`] if the sequence is lost.
    pub fn go_back_to(&mut self, tokens: &[u32]) -> Result<(), ChatError> {
        let most = self.fed.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        if self.fed.len() > most {
            self.snapshots.retain(|s| s.tokens <= most);
            self.go_back_to_snapshot()?;
        }
        Ok(())
    }

    /// Goes back to the last snapshot, or the beginning, whatever the sequence was fed since.
    fn go_back_to_snapshot(&mut self) -> Result<(), ChatError> {
        self.fed.truncate(self.snapshots.last().map_or(0, |s| s.tokens));
        let done = match self.snapshots.last() {
            Some(snapshot) => self.model.go_back(&snapshot.kept),
            None => self.model.rewind(),
        };
        done.map_err(ChatError::Model)
    }

    /// Remembers the sequence as it is now.
    fn keep_snapshot(&mut self) -> Result<(), ChatError> {
        let tokens = self.fed.len();
        if tokens > 0 && self.snapshots.last().is_none_or(|s| s.tokens < tokens) {
            if self.snapshots.len() == MAX_SNAPSHOTS {
                self.snapshots.remove(0);
            }
            let (kept, bytes) = self.model.keep().map_err(ChatError::Model)?;
            self.snapshots.push(Snapshot { tokens, bytes, kept });
        }
        Ok(())
    }
}

/// What a job has become, with what is known of its cost.
fn answer_of(job: Job<'_>, decoder: &Decoder, stats: TurnStats) -> Answer {
    let finish = job.finish();
    let completion = job.complete(decoder);
    let end = match finish {
        Some(Finish::Stop) if !completion.ended_by_watch => End::Stop,
        Some(Finish::Length) => End::Length,
        Some(Finish::Stop) | None => End::Interrupted,
    };
    let stats = TurnStats {
        prefill_s: completion.prefill_s,
        answer: completion.tokens.len(),
        decode_s: completion.decode_s,
        drafted: completion.drafted,
        accepted: completion.accepted,
        ..stats
    };
    Answer { tokens: completion.without_end().to_vec(), end, stats }
}
