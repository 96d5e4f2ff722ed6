//! Choosing the next token from logits: greedy, or drawn, after the processors of [`processors`] in their order.
//!
//! A choice is a pure function of the logits, the tokens before, the settings, and the numbers of sequence and position.
//! Random numbers are counter-based ([`random`]), so a seed gives the same tokens whatever else runs in the same step, and
//! however many tokens of a sequence a step yields.

pub mod logprobs;
pub mod processors;
pub mod random;
pub mod settings;

use processors::{PROCESSORS, Scored};
use settings::SETTINGS;

/// Why no token can be chosen.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// A setting is out of its range.
    #[error("`{name}` is {value}, expected {expected}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// What was given.
        value: f64,
        /// What it may be.
        expected: &'static str,
    },
    /// The model gave something that is no probability.
    #[error(
        "logit {index} is {value}, expected a finite number: the weights are damaged, or too large for this arithmetic"
    )]
    NotFinite {
        /// Which token.
        index: usize,
        /// Its logit.
        value: f32,
    },
    /// There is nothing to choose from.
    #[error("no logits to choose a token from")]
    Empty,
}

/// How to choose. The default is greedy and changes no logit.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f64)>,
    /// Divides the positive logits of tokens of prompt and output, multiplies the negative ones; 1 changes nothing.
    pub repetition_penalty: f64,
    /// Subtracted from the logit of a token that the output has.
    pub presence_penalty: f64,
    /// Subtracted from the logit of a token as often as the output has it.
    pub frequency_penalty: f64,
    /// Divides the logits; 0 chooses the largest.
    pub temperature: f64,
    /// Only the `top_k` most probable tokens are considered; 0 considers all.
    pub top_k: usize,
    /// Of those, the fewest whose probabilities sum to `top_p`; 1 considers all.
    pub top_p: f64,
    /// Of those, the ones at least `min_p` times as probable as the first; 0 considers all.
    pub min_p: f64,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            logit_bias: Vec::new(),
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
        }
    }
}

/// The tokens of a sequence before the one that is chosen: what penalties count.
#[derive(Clone, Copy, Debug, Default)]
pub struct History<'a> {
    /// What was given.
    pub prompt: &'a [u32],
    /// What was chosen since.
    pub output: &'a [u32],
}

/// A token that may be chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The token.
    pub token: u32,
    /// How likely it is; those of all candidates sum to 1.
    pub probability: f64,
}

impl Sampling {
    /// Checks the ranges.
    /// # Errors
    /// [`SampleError::Setting`] for the first that is out of range.
    pub fn check(&self) -> Result<(), SampleError> {
        SETTINGS.iter().try_for_each(|s| s.check((s.get)(self)).map(drop))?;
        self.logit_bias.iter().try_for_each(|&(_, bias)| settings::LOGIT_BIAS.check(bias))
    }

    /// Chooses the token at `position` of sequence `sequence`.
    /// # Errors
    /// [`SampleError`] if there are no logits, or one is NaN or +infinity.
    pub fn choose(
        &self,
        logits: &[f32],
        history: &History<'_>,
        sequence: u32,
        position: u32,
    ) -> Result<u32, SampleError> {
        let candidates = self.candidates(logits, history)?;
        Ok(draw(&candidates, random::uniform(self.seed, sequence, position)))
    }

    /// The tokens that may be chosen, with their probabilities; at least one.
    /// # Errors
    /// [`SampleError`] if there are no logits, or one is NaN or +infinity.
    pub fn candidates(&self, logits: &[f32], history: &History<'_>) -> Result<Vec<Candidate>, SampleError> {
        let best = greedy(logits)?;
        let active: Vec<_> = PROCESSORS.iter().filter(|p| (p.is_on)(self)).collect();
        if active.first().is_some_and(|p| p.name == "temperature") && self.temperature == 0.0 {
            return Ok(vec![Candidate { token: best, probability: 1.0 }]);
        }
        let mut scores: Vec<Scored> =
            (0u32..).zip(logits).map(|(token, &logit)| Scored { token, logit: f64::from(logit) }).collect();
        active.iter().for_each(|p| p.apply.run(self, history, &mut scores));
        Ok(softmax(&scores))
    }
}

fn softmax(scores: &[Scored]) -> Vec<Candidate> {
    let largest = processors::largest(scores);
    let total: f64 = scores.iter().map(|s| (s.logit - largest).exp()).sum();
    let probability = |s: &Scored| (s.logit - largest).exp() / total;
    scores.iter().map(|s| Candidate { token: s.token, probability: probability(s) }).collect()
}

/// The candidate in whose share of [0, 1) `random` falls.
fn draw(candidates: &[Candidate], random: f64) -> u32 {
    let mut sum = 0.0;
    let drawn = candidates.iter().find(|c| {
        sum += c.probability;
        sum > random
    });
    // the sum of all may be rounded to less than `random`: then it is the last one that has a share
    let last = || candidates.iter().rfind(|c| c.probability > 0.0);
    drawn.or_else(last).map(|c| c.token).expect("there is at least one candidate")
}

/// The token with the largest logit, the lowest among equals.
/// # Errors
/// [`SampleError`] if there are none, or one is NaN or +infinity.
pub fn greedy(logits: &[f32]) -> Result<u32, SampleError> {
    let mut best = 0;
    for (index, &value) in logits.iter().enumerate() {
        if value.is_nan() || value == f32::INFINITY {
            return Err(SampleError::NotFinite { index, value });
        }
        if value > logits[best] {
            best = index;
        }
    }
    match logits.get(best) {
        None => Err(SampleError::Empty),
        Some(&value) if value == f32::NEG_INFINITY => Err(SampleError::NotFinite { index: best, value }),
        Some(_) => Ok(u32::try_from(best).expect("a vocabulary has fewer than 2^32 tokens")),
    }
}

#[cfg(test)]
mod tests;
