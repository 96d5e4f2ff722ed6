//! What happens to the logits before a token is drawn, as a table: the order of its rows is the order of application.
//!
//! Biases and penalties also bind greedy choice. Repetition counts prompt and output, as Hugging Face does; presence and
//! frequency count the output alone, as OpenAI does.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use super::{History, Sampling};
use Apply::{Change, Narrow};

/// A token that is still considered.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// The token.
    pub token: u32,
    /// Its logit, as far as it is processed.
    pub logit: f64,
}

impl Scored {
    /// Descending by logit, the lower token first among equals.
    fn by_rank(a: &Self, b: &Self) -> Ordering {
        b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
    }
}

/// One step on the way to the probabilities.
#[derive(Clone, Copy, Debug)]
pub struct Processor {
    /// The setting that it obeys.
    pub name: &'static str,
    /// False where the setting changes nothing.
    pub is_on: fn(&Sampling) -> bool,
    /// What it does.
    pub apply: Apply,
}

/// What a processor does.
#[derive(Clone, Copy, Debug)]
pub enum Apply {
    /// Changes logits; the scores are those of all tokens, in order.
    Change(fn(&Sampling, &History<'_>, &mut [Scored])),
    /// Chooses among tokens, and never leaves out the most probable one.
    Narrow(fn(&Sampling, &mut Vec<Scored>)),
}

impl Apply {
    /// Does it.
    pub fn run(self, sampling: &Sampling, history: &History<'_>, scores: &mut Vec<Scored>) {
        match self {
            Self::Change(change) => change(sampling, history, scores),
            Self::Narrow(narrow) => narrow(sampling, scores),
        }
    }
}

/// All of them, in order.
#[rustfmt::skip]
pub const PROCESSORS: &[Processor] = &[
    Processor { name: "logit_bias",         is_on: |s| !s.logit_bias.is_empty(),     apply: Change(logit_bias) },
    Processor { name: "repetition_penalty", is_on: |s| s.repetition_penalty != 1.0,  apply: Change(repetition_penalty) },
    Processor { name: "presence_penalty",   is_on: |s| s.presence_penalty != 0.0,    apply: Change(presence_penalty) },
    Processor { name: "frequency_penalty",  is_on: |s| s.frequency_penalty != 0.0,   apply: Change(frequency_penalty) },
    Processor { name: "temperature",        is_on: |s| s.temperature != 1.0,         apply: Narrow(temperature) },
    Processor { name: "top_k",              is_on: |s| s.top_k > 0,                  apply: Narrow(top_k) },
    Processor { name: "top_p",              is_on: |s| s.top_p < 1.0,                apply: Narrow(top_p) },
    Processor { name: "min_p",              is_on: |s| s.min_p > 0.0,                apply: Narrow(min_p) },
];

fn change(scores: &mut [Scored], token: u32, new: impl FnOnce(f64) -> f64) {
    if let Some(score) = scores.get_mut(token as usize) {
        score.logit = new(score.logit);
    }
}

fn logit_bias(sampling: &Sampling, _: &History<'_>, scores: &mut [Scored]) {
    for &(token, bias) in &sampling.logit_bias {
        change(scores, token, |x| x + bias);
    }
}

fn repetition_penalty(sampling: &Sampling, history: &History<'_>, scores: &mut [Scored]) {
    let penalty = sampling.repetition_penalty;
    let tokens: BTreeSet<u32> = history.prompt.iter().chain(history.output).copied().collect();
    for token in tokens {
        change(scores, token, |x| if x < 0.0 { x * penalty } else { x / penalty });
    }
}

fn presence_penalty(sampling: &Sampling, history: &History<'_>, scores: &mut [Scored]) {
    let tokens: BTreeSet<u32> = history.output.iter().copied().collect();
    for token in tokens {
        change(scores, token, |x| x - sampling.presence_penalty);
    }
}

fn frequency_penalty(sampling: &Sampling, history: &History<'_>, scores: &mut [Scored]) {
    let mut counts: BTreeMap<u32, u32> = BTreeMap::new();
    history.output.iter().for_each(|&token| *counts.entry(token).or_default() += 1);
    for (token, count) in counts {
        change(scores, token, |x| x - sampling.frequency_penalty * f64::from(count));
    }
}

/// Divides; at 0 only the most probable token stays.
fn temperature(sampling: &Sampling, scores: &mut Vec<Scored>) {
    if sampling.temperature == 0.0 {
        let best = scores.iter().copied().min_by(Scored::by_rank);
        *scores = best.into_iter().collect();
    }
    scores.iter_mut().filter(|_| sampling.temperature > 0.0).for_each(|s| s.logit /= sampling.temperature);
}

fn top_k(sampling: &Sampling, scores: &mut Vec<Scored>) {
    if sampling.top_k < scores.len() {
        scores.select_nth_unstable_by(sampling.top_k, Scored::by_rank);
        scores.truncate(sampling.top_k);
        scores.sort_unstable_by(Scored::by_rank);
    }
}

fn top_p(sampling: &Sampling, scores: &mut Vec<Scored>) {
    let largest = largest(scores);
    let weight = |s: &Scored| (s.logit - largest).exp();
    let total: f64 = scores.iter().map(weight).sum();
    let kept = fewest_with(scores, sampling.top_p * total, weight);
    scores.truncate(kept);
}

fn min_p(sampling: &Sampling, scores: &mut Vec<Scored>) {
    let least = largest(scores) + sampling.min_p.ln();
    scores.retain(|s| s.logit >= least);
}

/// The largest logit.
pub(super) fn largest(scores: &[Scored]) -> f64 {
    scores.iter().map(|s| s.logit).fold(f64::NEG_INFINITY, f64::max)
}

/// Sorts as many of the largest to the front as are needed for weights that sum to `goal`, and says how many they are.
fn fewest_with(scores: &mut [Scored], goal: f64, weight: impl Fn(&Scored) -> f64) -> usize {
    let mut sorted = 64;
    loop {
        if sorted < scores.len() {
            scores.select_nth_unstable_by(sorted, Scored::by_rank);
        }
        let front = sorted.min(scores.len());
        scores[..front].sort_unstable_by(Scored::by_rank);
        let mut sum = 0.0;
        for (i, s) in scores[..front].iter().enumerate() {
            sum += weight(s);
            if sum >= goal {
                return i + 1;
            }
        }
        if front == scores.len() {
            return front;
        }
        sorted *= 8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn top_p_of_a_flat_large_vocabulary_counts_right() {
        let mut scores: Vec<_> = (0..5000).map(|token| Scored { token, logit: 0.0 }).collect();
        assert_eq!(fewest_with(&mut scores, 2000.0, |_| 1.0), 2000);
        assert!(scores[..2000].iter().map(|s| s.token).eq(0..2000));
        assert_eq!(fewest_with(&mut scores, 1e9, |_| 1.0), 5000);
    }

    #[test]
    fn the_order_is_the_one_that_is_stated() {
        let names: Vec<_> = PROCESSORS.iter().map(|p| p.name).collect();
        let stated = ["logit_bias", "repetition_penalty", "presence_penalty", "frequency_penalty"];
        assert_eq!(names[..4], stated);
        assert_eq!(names[4..], ["temperature", "top_k", "top_p", "min_p"]);
    }
}
