//! How tokens are chosen: settings and their ranges ([`settings`]), and how they are handed to the compiled function that chooses
//! ([`rows`]). The host sees tokens; logits only where their probabilities are asked for ([`logprobs`]).
//!
//! A choice is a pure function of the logits, the tokens before, the settings, and the numbers of sequence and position. So a
//! seed gives the same tokens whatever else runs in the same step, and however many tokens of a sequence a step yields.

pub mod logprobs;
pub mod rows;
pub mod settings;

#[cfg(test)]
pub(crate) mod plain;

use std::collections::BTreeMap;

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
    /// Biases and penalties leave no finite logit.
    #[error("biases and penalties leave no finite logit, expected smaller ones")]
    NothingLeft,
}

impl SampleError {
    /// Why no token was chosen from a row of logits: the first that is NaN or +infinity, or else the first of all that are -infinity.
    pub fn of_row(logits: &[f32]) -> Self {
        let broken = logits.iter().position(|x| x.is_nan() || *x == f32::INFINITY);
        let all_out = || logits.iter().all(|x| *x == f32::NEG_INFINITY).then_some(0);
        match broken.or_else(all_out) {
            Some(index) => Self::NotFinite { index, value: logits.get(index).copied().unwrap_or(f32::NEG_INFINITY) },
            None => Self::NothingLeft,
        }
    }
}

/// How to choose. The default is greedy and changes no logit. Logits are processed in the order of the fields.
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

impl Sampling {
    /// Checks the ranges.
    /// # Errors
    /// [`SampleError::Setting`] for the first that is out of range.
    pub fn check(&self) -> Result<(), SampleError> {
        SETTINGS.iter().try_for_each(|s| s.check((s.get)(self)).map(drop))?;
        self.logit_bias.iter().try_for_each(|&(_, bias)| settings::LOGIT_BIAS.check(bias))
    }

    /// True if logits depend on the tokens before.
    fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// What changes single logits of a sequence: biases, and penalties of the tokens that it has. Lists, ascending by token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Edits {
    /// The tokens.
    pub tokens: Vec<i32>,
    /// How often the output has each; -1 if the prompt has it not either.
    pub counts: Vec<i32>,
    /// What is added to each one's logit.
    pub biases: Vec<f32>,
    counts_tokens: bool,
}

impl Edits {
    /// Those of a sequence that has its prompt only.
    pub fn new(sampling: &Sampling, prompt: &[u32]) -> Self {
        let mut edits: BTreeMap<u32, (i32, f64)> = BTreeMap::new();
        for &(token, bias) in &sampling.logit_bias {
            edits.entry(token).or_insert((-1, 0.0)).1 += bias;
        }
        for &token in prompt.iter().filter(|_| sampling.penalises()) {
            edits.entry(token).or_insert((0, 0.0)).0 = 0;
        }
        Self {
            tokens: edits.keys().map(|&token| token as i32).collect(),
            counts: edits.values().map(|edit| edit.0).collect(),
            biases: edits.values().map(|edit| edit.1 as f32).collect(),
            counts_tokens: sampling.penalises(),
        }
    }

    /// The output has `token`, once more or for the first time.
    pub fn push(&mut self, token: u32) {
        if !self.counts_tokens {
            return;
        }
        match self.tokens.binary_search(&(token as i32)) {
            Ok(i) => self.counts[i] = self.counts[i].max(0) + 1,
            Err(i) => {
                self.tokens.insert(i, token as i32);
                self.counts.insert(i, 1);
                self.biases.insert(i, 0.0);
            }
        }
    }
}

/// How the token after a row is chosen.
#[derive(Clone, Copy, Debug)]
pub struct Choosing<'a> {
    /// The settings.
    pub sampling: &'a Sampling,
    /// What changes single logits, by the tokens that the sequence is known to have.
    pub edits: &'a Edits,
    /// The number of the sequence, for random numbers.
    pub sequence: u32,
    /// The position of the token.
    pub position: u32,
}

#[cfg(test)]
mod tests;
