//! How many tokens to draft: a fixed number, or as many as pay.
//!
//! A step with `k` drafts costs `c_k` seconds and gives `1 + a_1 + a_1 a_2 + ...` tokens, where `a_i` is the share of drafts number
//! `i` that are right after all before it were. [`Planner`] measures both and takes the `k` of the most tokens a second. What a
//! number that was not tried costs is taken from its neighbours; now and then one is tried, so seldom that trying costs little.

use std::collections::VecDeque;
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
/// Steps without drafts before the first with some: what they cost is what all else is compared with.
const FIRST_STEPS: usize = 3;
/// Least steps between two trials of another number of drafts.
const TRIAL_STEPS: usize = 32;
/// Most times that trials that change nothing double the steps between them.
const MOST_DOUBLINGS: u32 = 4;
/// Share of the time that trials may cost.
const TRIAL_SHARE: f64 = 0.01;
/// Steps of a trial whose cost counts.
const TRIAL_LENGTH: usize = 2;
/// Newest costs of a number of drafts, of which the lower median counts: a step in which the machine did something else says little.
const NEWEST: usize = 9;
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
    /// What steps with 0, 1, ... drafts cost.
    costs: Vec<Costs>,
    /// Of the first, second, ... draft, where those before it were right: how many were right, and how many there were; older ones
    /// count less.
    drafts: Vec<(f64, f64)>,
    /// Steps since the last trial.
    since_trial: usize,
    /// The trial going on.
    trial: Option<Trial>,
    /// Trials in a row that changed nothing.
    idle_trials: u32,
    /// The next trial is of more drafts, not of fewer.
    upwards: bool,
    /// Sequences of the newest step.
    sequences: usize,
    /// Drafts of the newest step.
    newest: usize,
}

/// Steps with another number of drafts than the best known.
#[derive(Clone, Copy, Debug)]
struct Trial {
    drafts: usize,
    /// The number that was the best before.
    instead_of: usize,
    steps_left: usize,
}

/// The newest costs of steps with one number of drafts, in seconds, the oldest first.
#[derive(Clone, Debug, Default)]
struct Costs(VecDeque<f64>);

impl Costs {
    fn push(&mut self, seconds: f64) {
        if self.0.len() == NEWEST {
            self.0.pop_front();
        }
        self.0.push_back(seconds);
    }

    /// The lower median; none before there are two: the first is that of code and memory never used.
    fn median(&self) -> Option<f64> {
        let mut sorted: Vec<f64> = self.0.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len().saturating_sub(1) / 2).copied().filter(|_| sorted.len() > 1)
    }
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
            costs: vec![Costs::default(); most + 1],
            drafts: vec![PRIOR; most],
            since_trial: 0,
            trial: None,
            idle_trials: 0,
            upwards: true,
            sequences: 0,
            newest: 0,
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
        if self.costs[0].0.len() < FIRST_STEPS {
            return 0;
        }
        if let Some(trial) = self.trial {
            return trial.drafts;
        }
        let best = self.best();
        let up = best == 0 || self.upwards;
        let drafts = if up { (best + 1).min(self.costs.len() - 1) } else { best - 1 };
        let length = TRIAL_LENGTH + usize::from(best == 0);
        let extra = length as f64 * (self.cost(drafts) / self.cost(best) - 1.0);
        self.since_trial += 1;
        if self.since_trial < (TRIAL_STEPS << self.idle_trials).max((extra / TRIAL_SHARE) as usize) {
            return best;
        }
        self.since_trial = 0;
        self.upwards = !up;
        self.trial = Some(Trial { drafts, instead_of: best, steps_left: length });
        drafts
    }

    /// Learns that a step with `drafts` drafts took `time`, and how many tokens each sequence gained.
    pub fn observe(&mut self, drafts: usize, gained: &[usize], time: Duration) {
        if self.fixed.is_some() || drafts >= self.costs.len() {
            return;
        }
        // the first step with drafts after some without feeds the draft all that it missed, which the next ones will not: better than
        // nothing, and as an upper bound no harm to the median
        if drafts == 0 || self.newest > 0 || self.costs[drafts].0.is_empty() {
            self.observe_cost(drafts, gained.len(), time.as_secs_f64());
        }
        self.newest = drafts;
        for &tokens in gained {
            for (i, (right, seen)) in self.drafts[..drafts].iter_mut().enumerate().take(tokens) {
                *right = OLDER * *right + f64::from(i + 1 < tokens);
                *seen = OLDER * *seen + 1.0;
            }
        }
        if let Some(trial) = self.trial.take() {
            let steps_left = trial.steps_left - 1;
            if steps_left > 0 {
                self.trial = Some(Trial { steps_left, ..trial });
            } else {
                let changed = self.best() != trial.instead_of;
                self.idle_trials = if changed { 0 } else { MOST_DOUBLINGS.min(self.idle_trials + 1) };
            }
        }
    }

    fn observe_cost(&mut self, drafts: usize, sequences: usize, seconds: f64) {
        if self.sequences != sequences
            && let Some(old) = self.costs[drafts].median()
        {
            // another batch: all costs change about as this one does
            let factor = seconds / old.max(1e-9);
            self.costs.iter_mut().flat_map(|costs| &mut costs.0).for_each(|cost| *cost *= factor);
        }
        self.sequences = sequences;
        self.costs[drafts].push(seconds);
    }

    /// The number with the most tokens a second, no more than one above those that were measured; none unless it is better by a margin.
    fn best(&self) -> usize {
        let mut best = (0, MARGIN / self.cost(0));
        let (mut chance, mut tokens) = (1.0, 1.0);
        let measured = self.costs.iter().rposition(|costs| costs.median().is_some()).unwrap_or(0);
        for (i, (right, seen)) in self.drafts.iter().enumerate().take(measured + 1) {
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
        let known = |k: usize| self.costs[k].median().map(|cost| (k as f64, cost));
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

    /// Tokens a second of `steps` steps of a planner, where `k` drafts cost `cost(k)`, every tenth step `noise` times as much, the first
    /// of each number half as much again, one with drafts half a percent more for each without before it, and drafts are right `right` of the time.
    fn speed(mut planner: Planner, steps: usize, cost: impl Fn(usize) -> f64, noise: f64, right: f64) -> f64 {
        let (mut tokens, mut seconds, mut chance, mut missed) = (0u32, 0.0, 0.5f64, 0.0);
        let mut cold = [1.5; AUTO_MOST + 1];
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
            missed = if k == 0 { (missed + 1.0) % MISSED } else { missed };
            let caught_up = if k == 0 { 0.0 } else { 0.005 * cost(0) * std::mem::take(&mut missed) };
            let slow = if step % 10 == 7 { noise } else { 1.0 };
            let time = caught_up + cost(k) * slow * std::mem::replace(&mut cold[k], 1.0);
            planner.observe(k, &[gained], Duration::from_secs_f64(time));
            tokens += gained as u32;
            seconds += time;
        }
        f64::from(tokens) / seconds
    }

    /// Tokens that a draft misses at most: then it is fed them in any case.
    const MISSED: f64 = 256.0;

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
            planner.best()
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
