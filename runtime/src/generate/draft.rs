//! How many tokens to draft: a fixed number, or as many as pay.
//!
//! A step with `k` drafts costs `c_k` seconds and gives `1 + a_1 + a_1 a_2 + ...` tokens, where `a_i` is the share of drafts number
//! `i` that are right after all before it were. [`Planner`] measures both and takes the `k` of the most tokens a second. What is
//! not known yet is tried, seldom enough that trying costs little.

use std::str::FromStr;
use std::time::Duration;

use super::{Forward, GenerateError};

/// What `--draft-tokens` may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DraftTokens {
    /// As many as pay.
    Auto,
    /// So many.
    Fixed(usize),
}

impl FromStr for DraftTokens {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            _ => text.parse().map(Self::Fixed).map_err(|_| format!("`{text}` is neither a number nor `auto`")),
        }
    }
}

impl DraftTokens {
    /// The planner for a model.
    /// # Errors
    /// [`GenerateError::NoDrafts`] or [`GenerateError::TooManyDrafts`] if the model cannot draft that many.
    pub fn planner(self, model: &mut dyn Forward) -> Result<Planner, GenerateError> {
        let most = model.drafter().map(|d| d.tentative_tokens().saturating_sub(1));
        match (self, most) {
            (Self::Auto, Some(most)) => Ok(Planner::auto(most.min(AUTO_MOST))),
            (Self::Auto | Self::Fixed(0), _) => Ok(Planner::fixed(0)),
            (Self::Fixed(found), None) => Err(GenerateError::NoDrafts(found)),
            (Self::Fixed(found), Some(most)) if found > most => Err(GenerateError::TooManyDrafts { found, most }),
            (Self::Fixed(found), Some(_)) => Ok(Planner::fixed(found)),
        }
    }
}

/// Most drafts that `auto` makes.
const AUTO_MOST: usize = 4;
/// Steps between two trials of another number of drafts.
const TRIAL_STEPS: usize = 48;
/// Weight of the newest measurement.
const NEWEST: f64 = 0.2;
/// How much better another number must be.
const MARGIN: f64 = 1.02;

/// Decides how many tokens to draft in each step.
#[derive(Clone, Debug)]
pub struct Planner {
    /// Speeds measured with 0, 1, ... drafts: tokens of one sequence a second; none where not tried yet.
    speeds: Vec<Option<f64>>,
    /// The number in use, unless it is fixed.
    best: usize,
    /// A fixed number.
    fixed: Option<usize>,
    steps: usize,
    /// Sequences of the steps that were measured.
    sequences: usize,
}

impl Planner {
    /// Always `drafts`.
    pub fn fixed(drafts: usize) -> Self {
        Self { speeds: Vec::new(), best: drafts, fixed: Some(drafts), steps: 0, sequences: 0 }
    }

    /// As many as pay, at most `most`.
    pub fn auto(most: usize) -> Self {
        Self { speeds: vec![None; most + 1], best: 0, fixed: None, steps: 0, sequences: 0 }
    }

    /// False if it never drafts.
    pub fn may_draft(&self) -> bool {
        self.fixed != Some(0)
    }

    /// Drafts for the next step of `sequences` sequences.
    pub fn next(&mut self, sequences: usize) -> usize {
        if let Some(fixed) = self.fixed {
            return fixed;
        }
        if self.sequences != sequences {
            self.speeds.fill(None);
            self.sequences = sequences;
        }
        if let Some(untried) = self.speeds.iter().position(Option::is_none) {
            return untried;
        }
        self.steps += 1;
        let neighbour =
            if (self.steps / TRIAL_STEPS).is_multiple_of(2) { self.best + 1 } else { self.best.saturating_sub(1) };
        if self.steps.is_multiple_of(TRIAL_STEPS) { neighbour.min(self.speeds.len() - 1) } else { self.best }
    }

    /// Learns that a step with `drafts` drafts gave `tokens` tokens over `sequences` sequences in `time`.
    pub fn observe(&mut self, drafts: usize, sequences: usize, tokens: usize, time: Duration) {
        if self.fixed.is_some() || sequences != self.sequences || drafts >= self.speeds.len() {
            return;
        }
        let speed = tokens as f64 / sequences as f64 / time.as_secs_f64().max(1e-9);
        let measured = self.speeds[drafts].map_or(speed, |old| old + NEWEST * (speed - old));
        self.speeds[drafts] = Some(measured);
        let speed_of = |k: usize| self.speeds[k].unwrap_or(0.0);
        let fastest = (0..self.speeds.len()).fold(0, |best, k| if speed_of(k) > speed_of(best) { k } else { best });
        if speed_of(fastest) > MARGIN * speed_of(self.best) {
            self.best = fastest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens a second of a planner's steps, where `k` drafts cost `cost(k)` and are right `right` of the time.
    fn speed(mut planner: Planner, cost: impl Fn(usize) -> f64, right: f64) -> f64 {
        let (mut tokens, mut seconds, mut chance) = (0u32, 0.0, 0.5f64);
        for _ in 0..4000 {
            let k = planner.next(1);
            let mut gained = 1;
            for _ in 0..k {
                chance = (chance * 997.0 + 0.123).fract();
                if chance >= right {
                    break;
                }
                gained += 1;
            }
            planner.observe(k, 1, gained, Duration::from_secs_f64(cost(k)));
            tokens += gained as u32;
            seconds += cost(k);
        }
        f64::from(tokens) / seconds
    }

    #[test]
    fn auto_loses_little_where_drafts_do_not_pay_and_gains_where_they_do() {
        let dear = |k: usize| 0.010 * (1.0 + k as f64);
        let plain = speed(Planner::fixed(0), dear, 0.3);
        assert!(speed(Planner::auto(4), dear, 0.3) > 0.97 * plain);
        let cheap = |k: usize| 0.010 * (1.0 + 0.15 * k as f64);
        let best = (0..=4).map(|k| speed(Planner::fixed(k), cheap, 0.85)).fold(0.0, f64::max);
        assert!(speed(Planner::auto(4), cheap, 0.85) > 0.9 * best);
    }

    #[test]
    fn numbers_and_auto_parse() {
        assert_eq!("auto".parse(), Ok(DraftTokens::Auto));
        assert_eq!("3".parse(), Ok(DraftTokens::Fixed(3)));
        assert!("-1".parse::<DraftTokens>().is_err());
    }
}
