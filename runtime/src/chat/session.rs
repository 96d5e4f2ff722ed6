//! A sequence that is kept between turns: what it has been fed, and the snapshots it can go back to.

use std::ops::ControlFlow;
use std::time::Instant;

use super::error::ChatError;
use super::model::ChatModel;
use crate::generate::draft::Planner;
use crate::sample::{History, Sampling};

/// Snapshots that are kept; the oldest goes first.
pub const MAX_SNAPSHOTS: usize = 8;

/// How to answer, and when to stop.
#[derive(Clone, Debug)]
pub struct Answering {
    /// Most new tokens.
    pub max_new_tokens: usize,
    /// Most tokens of a prompt in one step.
    pub step_tokens: usize,
    /// Tokens that end an answer.
    pub ends: Vec<u32>,
    /// How to choose tokens.
    pub sampling: Sampling,
    /// How many tokens to draft.
    pub drafts: Planner,
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
pub type Watch<'a> = dyn FnMut(Option<u32>) -> Result<ControlFlow<()>, ChatError> + 'a;

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
    /// [`ChatError`] if the prompt does not fit, or the model fails.
    pub fn answer(&mut self, prompt: &Prompt, how: &mut Answering, watch: &mut Watch<'_>) -> Result<Answer, ChatError> {
        let max_context = self.model.max_context();
        if prompt.tokens.len() > max_context {
            return Err(ChatError::Full { tokens: prompt.tokens.len(), max_context });
        }
        let begun = Instant::now();
        // the last token is fed in any case: its logits are needed
        let prompt_end = prompt.tokens.len().saturating_sub(1);
        self.go_back_to(&prompt.tokens[..prompt_end])?;
        let mut stats = TurnStats { reused: self.fed.len(), ..TurnStats::default() };
        let logits = self.prefill(prompt, how.step_tokens, watch);
        stats.fed = self.fed.len() - stats.reused;
        stats.prefill_s = begun.elapsed().as_secs_f64();
        let mut answer = Answer { tokens: Vec::new(), end: End::Interrupted, stats };
        if let Some(logits) = logits? {
            self.decode(&logits, &prompt.tokens, how, &mut answer, watch)?;
        }
        self.keep_snapshot()?;
        Ok(answer)
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
            match self.snapshots.last() {
                Some(snapshot) => self.model.go_back(&snapshot.kept),
                None => self.model.rewind(),
            }
            .map_err(ChatError::Model)?;
            self.fed.truncate(self.snapshots.last().map_or(0, |s| s.tokens));
        }
        Ok(())
    }

    /// Feeds the rest of the prompt; gives the logits after it, or none if it was interrupted.
    fn prefill(
        &mut self,
        prompt: &Prompt,
        step_tokens: usize,
        watch: &mut Watch<'_>,
    ) -> Result<Option<Vec<f32>>, ChatError> {
        let mut logits = Vec::new();
        for end in [prompt.stable, prompt.tokens.len()] {
            while self.fed.len() < end {
                if watch(None)?.is_break() {
                    return Ok(None);
                }
                let until = end.min(self.fed.len() + step_tokens.max(1));
                logits = self.feed(&prompt.tokens[self.fed.len()..until])?;
                if until == end && end == prompt.stable {
                    self.keep_snapshot()?;
                }
            }
        }
        Ok(Some(logits))
    }

    fn feed(&mut self, tokens: &[u32]) -> Result<Vec<f32>, ChatError> {
        let sequence = self.model.sequence();
        let logits = self.model.forward(&[(sequence, tokens)]).map_err(ChatError::Model)?.to_vec();
        self.fed.extend_from_slice(tokens);
        Ok(logits)
    }

    /// Steps until the answer ends. The newest token of an answer is not fed before the step that needs it.
    fn decode(
        &mut self,
        logits: &[f32],
        prompt: &[u32],
        how: &mut Answering,
        answer: &mut Answer,
        watch: &mut Watch<'_>,
    ) -> Result<(), ChatError> {
        let begun = Instant::now();
        let most = how.max_new_tokens.min(self.model.max_context() - prompt.len());
        let mut choosing = Choosing { how, prompt, most, answer, watch };
        let mut end = choosing.take(logits)?;
        while end.is_none() {
            let known = choosing.answer.tokens[choosing.answer.tokens.len() - 1];
            let room = most - choosing.answer.tokens.len();
            let drafts = choosing.how.drafts.next(1).min(room.saturating_sub(1));
            let (step, before) = (Instant::now(), choosing.answer.stats.answer);
            end = match drafts {
                0 => choosing.take(&self.feed(&[known])?)?,
                _ => self.checked_step(known, drafts, &mut choosing)?,
            };
            let gained = choosing.answer.stats.answer - before;
            choosing.how.drafts.observe(drafts, 1, gained, step.elapsed());
        }
        answer.end = end.unwrap_or(End::Length);
        answer.stats.decode_s = begun.elapsed().as_secs_f64();
        Ok(())
    }

    /// Drafts tokens after `known` and checks them in one step; see [`crate::generate::decode`].
    fn checked_step(
        &mut self,
        known: u32,
        drafts: usize,
        choosing: &mut Choosing<'_, '_>,
    ) -> Result<Option<End>, ChatError> {
        let (sequence, vocab_size) = (self.model.sequence(), self.model.vocab_size());
        let Some(drafter) = self.model.drafter() else {
            return Err(ChatError::Model("the model cannot draft".into()));
        };
        let drafted = drafter.draft(&[(sequence, known)], drafts).map_err(ChatError::Model)?.concat();
        let fed = [&[known], drafted.as_slice()].concat();
        let rows = drafter.forward_tentative(&[(sequence, &fed)]).map_err(ChatError::Model)?;
        let (mut own, mut end) = (0, None);
        for (row, draft) in rows.chunks_exact(vocab_size).zip(drafted.iter().map(Some).chain([None])) {
            own += 1;
            end = choosing.take(row)?;
            let right = end.is_none() && draft == choosing.answer.tokens.last();
            choosing.answer.stats.accepted += usize::from(right);
            if !right {
                break;
            }
        }
        choosing.answer.stats.drafted += drafted.len();
        drafter.accept(sequence, own).map_err(ChatError::Model)?;
        self.fed.extend_from_slice(&fed[..own]);
        Ok(end)
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

/// An answer while it is chosen.
struct Choosing<'a, 'w> {
    how: &'a mut Answering,
    /// The conversation before it.
    prompt: &'a [u32],
    /// Most tokens it may have.
    most: usize,
    answer: &'a mut Answer,
    watch: &'a mut Watch<'w>,
}

impl Choosing<'_, '_> {
    /// Chooses the next token; says if the answer ends with it.
    fn take(&mut self, logits: &[f32]) -> Result<Option<End>, ChatError> {
        if self.answer.tokens.len() >= self.most {
            return Ok(Some(End::Length));
        }
        let position = u32::try_from(self.prompt.len() + self.answer.tokens.len()).unwrap_or(u32::MAX);
        let history = History { prompt: self.prompt, output: &self.answer.tokens };
        let token = self.how.sampling.choose(logits, &history, 0, position)?;
        self.answer.stats.answer += 1;
        if self.how.ends.contains(&token) {
            return Ok(Some(End::Stop));
        }
        self.answer.tokens.push(token);
        if (self.watch)(Some(token))?.is_break() {
            return Ok(Some(End::Interrupted));
        }
        Ok((self.answer.tokens.len() >= self.most).then_some(End::Length))
    }
}
