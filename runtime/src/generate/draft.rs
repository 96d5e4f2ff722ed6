//! How many tokens to draft: a fixed number, or as many as pay.
//!
//! A step with `k` drafts costs `c_k` seconds and gives `1 + a_1 + a_1 a_2 + ...` tokens, where `a_i` is the share of drafts number
//! `i` that are right after all before it were. [`Planner`] measures both and takes the `k` of the most tokens a second. What a
//! number that was not tried costs is taken from its neighbours; now and then one is tried, so seldom that trying costs little.

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
/// Least steps between two trials of another number of drafts.
const TRIAL_STEPS: usize = 48;
/// Share of the time that trials may cost.
const TRIAL_SHARE: f64 = 0.01;
/// Least weight of the newest cost.
const NEWEST: f64 = 0.2;
/// A cost counts as no more than so many times what it was before: a step in which the machine did something else says little.
const OUTLIER: f64 = 2.0;
/// What the older observations of drafts weigh after another one.
const OLDER: f64 = 0.98;
/// What is expected of a draft before any was seen: so many of two are right.
const PRIOR: (f64, f64) = (1.2, 2.0);
/// What a draft is expected to add to a step's cost before that was measured.
const PRIOR_COST: f64 = 0.25;
/// How much better than no draft another number must be.
const MARGIN: f64 = 1.03;

/// Decides how many tokens to draft in each step.
#[derive(Clone, Debug)]
pub struct Planner {
    /// A fixed number.
    fixed: Option<usize>,
    /// Seconds of a step with 0, 1, ... drafts, and how often that was measured.
    costs: Vec<(f64, usize)>,
    /// Of the first, second, ... draft, where those before it were right: how many were right, and how many there were; older ones
    /// count less.
    drafts: Vec<(f64, f64)>,
    /// Steps until the next trial.
    until_trial: usize,
    /// The next trial is of more drafts, not of fewer.
    upwards: bool,
    /// Sequences of the newest step.
    sequences: usize,
}

impl Planner {
    /// Always `drafts`.
    pub fn fixed(drafts: usize) -> Self {
        Self { fixed: Some(drafts), ..Self::auto(0) }
    }

    /// As many as pay, at most `most`.
    pub fn auto(most: usize) -> Self {
        Self {
            fixed: None,
            costs: vec![(0.0, 0); most + 1],
            drafts: vec![PRIOR; most],
            until_trial: TRIAL_STEPS,
            upwards: true,
            sequences: 0,
        }
    }

    /// False if it never drafts.
    pub fn may_draft(&self) -> bool {
        self.fixed != Some(0)
    }

    /// Drafts for the next step.
    pub fn next_drafts(&mut self) -> usize {
        if let Some(fixed) = self.fixed {
            return fixed;
        }
        if self.costs[0].1 == 0 {
            return 0;
        }
        let best = self.best();
        self.until_trial -= 1;
        if self.until_trial > 0 {
            return best;
        }
        let up = best == 0 || self.upwards;
        let trial = if up { (best + 1).min(self.costs.len() - 1) } else { best - 1 };
        let extra = self.cost(trial) / self.cost(best) - 1.0;
        self.until_trial = TRIAL_STEPS.max((extra / TRIAL_SHARE) as usize);
        self.upwards = !up;
        trial
    }

    /// Learns that a step with `drafts` drafts took `time`, and how many tokens each sequence gained.
    pub fn observe(&mut self, drafts: usize, gained: &[usize], time: Duration) {
        if self.fixed.is_some() || drafts >= self.costs.len() {
            return;
        }
        self.observe_cost(drafts, gained.len(), time.as_secs_f64());
        for &tokens in gained {
            for (i, (right, seen)) in self.drafts[..drafts].iter_mut().enumerate().take(tokens) {
                *right = OLDER * *right + f64::from(i + 1 < tokens);
                *seen = OLDER * *seen + 1.0;
            }
        }
    }

    fn observe_cost(&mut self, drafts: usize, sequences: usize, seconds: f64) {
        let (old, times) = self.costs[drafts];
        if times > 0 && self.sequences != sequences {
            // another batch: all costs change about as this one does
            self.costs.iter_mut().for_each(|(cost, _)| *cost *= seconds / old.max(1e-9));
        }
        self.sequences = sequences;
        let (cost, times) = &mut self.costs[drafts];
        *times += 1;
        let weight = NEWEST.max(1.0 / *times as f64);
        let seconds = if *times > 1 { seconds.min(OUTLIER * *cost) } else { seconds };
        *cost += weight * (seconds - *cost);
    }

    /// The number with the most tokens a second; none unless it is better by a margin.
    fn best(&self) -> usize {
        let mut best = (0, MARGIN / self.cost(0));
        let (mut chance, mut tokens) = (1.0, 1.0);
        for (i, (right, seen)) in self.drafts.iter().enumerate() {
            chance *= right / seen;
            tokens += chance;
            let speed = tokens / self.cost(i + 1);
            if speed > best.1 {
                best = (i + 1, speed);
            }
        }
        best.0
    }

    /// Seconds of a step with `drafts` drafts: measured, or on a line through what was measured with fewer and with more.
    fn cost(&self, drafts: usize) -> f64 {
        let known = |k: usize| (self.costs[k].1 > 0).then_some((k as f64, self.costs[k].0));
        let below = (0..=drafts).rev().find_map(known).unwrap_or((0.0, 1.0));
        let above = (drafts..self.costs.len()).find_map(known);
        let further = (0..below.0 as usize).rev().find_map(known);
        let slope = match (above, further) {
            (Some(a), _) if a.0 > below.0 => (a.1 - below.1) / (a.0 - below.0),
            (None, Some(f)) => (below.1 - f.1) / (below.0 - f.0),
            _ => PRIOR_COST * below.1,
        };
        below.1 + slope.max(0.0) * (drafts as f64 - below.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens a second of `steps` steps of a planner, where `k` drafts cost `cost(k)`, every tenth step `noise` times as much, and drafts
    /// are right `right` of the time.
    fn speed(mut planner: Planner, steps: usize, cost: impl Fn(usize) -> f64, noise: f64, right: f64) -> f64 {
        let (mut tokens, mut seconds, mut chance) = (0u32, 0.0, 0.5f64);
        for step in 0..steps {
            let k = planner.next_drafts();
            let mut gained = 1;
            for _ in 0..k {
                chance = (chance * 997.0 + 0.123).fract();
                if chance >= right {
                    break;
                }
                gained += 1;
            }
            let time = cost(k) * if step % 10 == 7 { noise } else { 1.0 };
            planner.observe(k, &[gained], Duration::from_secs_f64(time));
            tokens += gained as u32;
            seconds += time;
        }
        f64::from(tokens) / seconds
    }

    #[test]
    fn auto_loses_at_most_three_percent_and_finds_what_pays() {
        for (step, draft) in [(0.05, 0.1), (0.15, 0.15), (0.4, 0.2), (1.0, 0.35)] {
            let cost = |k: usize| 0.010 * (1.0 + (step + draft) * k as f64);
            for right in [0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95] {
                for (steps, noise) in [(256, 1.0), (4000, 1.0), (4000, 8.0)] {
                    let fixed = |k| speed(Planner::fixed(k), steps, cost, noise, right);
                    let auto = speed(Planner::auto(4), steps, cost, noise, right);
                    let best = (0..=4).map(fixed).fold(0.0, f64::max);
                    let what = format!("{step} + {draft} a draft, {right} right, {steps} steps, noise {noise}");
                    assert!(auto > 0.97 * fixed(0), "{what}: {auto} against {} without drafts", fixed(0));
                    assert!(auto > 0.9 * best, "{what}: {auto} against {best}");
                }
            }
        }
    }

    #[test]
    fn a_batch_that_changes_starts_nothing_anew() {
        let mut planner = Planner::auto(4);
        let observe = |planner: &mut Planner, sequences: usize, right: usize| {
            let k = planner.next_drafts();
            let time = Duration::from_secs_f64(0.01 * (1.0 + 0.1 * k as f64) * sequences as f64);
            planner.observe(k, &vec![1 + right.min(k); sequences], time);
            k
        };
        for _ in 0..100 {
            observe(&mut planner, 3, 4);
        }
        assert_eq!(observe(&mut planner, 3, 4), 4);
        assert_eq!([2, 1, 5].map(|sequences| observe(&mut planner, sequences, 4)), [4, 4, 4]);
        for _ in 0..100 {
            observe(&mut planner, 5, 0);
        }
        assert_eq!(observe(&mut planner, 5, 0), 0);
    }

    #[test]
    fn numbers_and_auto_parse() {
        assert_eq!("auto".parse(), Ok(DraftTokens::Auto));
        assert_eq!("3".parse(), Ok(DraftTokens::Fixed(3)));
        assert!("-1".parse::<DraftTokens>().is_err());
    }
}
