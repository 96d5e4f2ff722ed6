//! How many tokens to draft: a fixed number, or as many as pay.
//!
//! A step with `k` drafts costs `c_k` times what one without costs, and gives `1 + a_1 + a_1 a_2 + ...` tokens, where `a_i` is the share
//! of drafts number `i` that are right after all before it were. [`Planner`] measures both and takes the `k` of the most tokens a second.
//! Costs are only compared where one number follows another, so a machine that becomes slower or faster does not matter. What a number
//! that was not tried costs is taken from its neighbours; now and then one is tried, so seldom that trying costs little.
//!
//! What drafts cost more than they gave is paid from an allowance, a small share of all tokens. Where it is used up, nothing is
//! drafted until it has grown enough for another trial: so drafting never costs more than it, whatever was measured.

mod allowance;
mod cost;

use std::str::FromStr;
use std::time::Duration;

use self::allowance::Allowance;
use self::cost::{Cost, STRETCH, Stretch};
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
/// First steps of all, which are compared with nothing: what they use is touched for the first time.
const FIRST_STEPS: usize = 5;
/// Least steps between two trials of another number of drafts.
const TRIAL_STEPS: usize = 48;
/// Most times that trials that change nothing double the steps between them.
const MOST_DOUBLINGS: u32 = 4;
/// Share of the time that trials may cost.
const TRIAL_SHARE: f64 = 0.01;
/// Comparisons of one draft with none to begin with, as long as drafts are right, and one more if they seem to pay: on a machine that
/// does other things too, or touches weights for the first time, a single one says little.
const FIRST_COMPARISONS: usize = 2;
/// What the older observations of drafts weigh after another one.
const OLDER: f64 = 0.98;
/// How much better than seen a draft may be: by so much over the root of how many were seen. Few say little.
const DOUBT: f64 = 0.15;
/// What is expected of a draft before any was seen: so many of two are right.
const PRIOR: (f64, f64) = (1.0, 2.0);
/// What a draft is expected to add to a step's cost before that was measured.
const PRIOR_COST: f64 = 0.25;
/// How much better than no draft another number must be.
const MARGIN: f64 = 1.03;
/// A step with drafts is counted as at most so many steps without: what takes longer does so for another reason.
const MOST_STEPS: f64 = 3.0;

/// Decides how many tokens to draft in each step.
#[derive(Clone, Debug)]
pub struct Planner {
    /// A fixed number.
    fixed: Option<usize>,
    /// What steps with 0, 1, ... drafts cost, as multiples of one without.
    costs: Vec<Cost>,
    /// Of the first, second, ... draft, where those before it were right: how many were right, and how many there were; older ones
    /// count less.
    drafts: Vec<(f64, f64)>,
    /// Steps that are compared with nothing yet.
    first_steps: usize,
    /// The steps since the number of drafts or of sequences changed.
    stretch: Stretch,
    /// Drafts and cost of a step of the stretch before, until this one is compared with it.
    before: Option<(usize, f64)>,
    /// The draft was fed what it missed since the last stretch with drafts.
    caught_up: bool,
    /// Steps since the last trial.
    since_trial: usize,
    /// While a trial goes on, the number that was the best before it.
    tried_from: Option<usize>,
    /// Trials in a row that changed nothing.
    idle_trials: u32,
    /// The next trial is of more drafts, not of fewer.
    upwards: bool,
    allowance: Allowance,
}

impl Planner {
    /// Always `drafts`.
    pub fn fixed(drafts: usize) -> Self {
        Self { fixed: Some(drafts), ..Self::auto(0) }
    }

    /// As many as pay, at most `most`.
    pub fn auto(most: usize) -> Self {
        let mut costs = vec![Cost::default(); most + 1];
        costs[0] = Cost::of_none();
        Self {
            fixed: None,
            costs,
            drafts: vec![PRIOR; most],
            first_steps: FIRST_STEPS,
            stretch: Stretch::default(),
            before: None,
            caught_up: false,
            since_trial: 0,
            tried_from: None,
            idle_trials: 0,
            upwards: true,
            allowance: Allowance::FULL,
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
        let now = self.stretch.drafts;
        let least = self.stretch.least();
        let next = match least {
            _ if !self.allowance.is_open() => 0,
            None => now,
            Some(_) if self.begins() => usize::from(now == 0),
            Some(_) => self.best_or_trial(),
        };
        if next != now {
            if now == 0 {
                self.allowance.begin();
            }
            self.before = least.map(|cost| (now, cost)).or(self.before).filter(|&(before, _)| before != next);
            self.caught_up = false;
            self.stretch = Stretch::new(next, self.stretch.sequences);
        }
        next
    }

    /// What one draft costs was not compared often, and as many are right as would pay at what is expected.
    fn begins(&self) -> bool {
        let wanted = FIRST_COMPARISONS + usize::from(self.best() > 0);
        let seldom = self.costs.get(1).is_some_and(|cost| cost.comparisons() < wanted);
        seldom && 1.0 + self.chance(0) > MARGIN * (1.0 + PRIOR_COST)
    }

    /// How likely draft `i` is right where those before it are: as seen, and a little more while few were seen.
    fn chance(&self, i: usize) -> f64 {
        let (right, seen) = self.drafts[i];
        (right / seen + DOUBT / seen.sqrt()).min(1.0)
    }

    /// The best number as far as is known; now and then a neighbour of it.
    fn best_or_trial(&mut self) -> usize {
        let best = self.best();
        if let Some(from) = self.tried_from.take() {
            self.idle_trials = if best == from { MOST_DOUBLINGS.min(self.idle_trials + 1) } else { 0 };
        }
        self.since_trial += 1;
        let up = best == 0 || (self.upwards && best + 1 < self.costs.len());
        let other = if up { best + 1 } else { best - 1 };
        let extra = (STRETCH + 1) as f64 * (self.speed(best) / self.speed(other) - 1.0);
        let rest = (TRIAL_STEPS << self.idle_trials).max((extra / TRIAL_SHARE) as usize);
        let affordable = best > 0 || self.allowance.is_enough();
        if best != self.stretch.drafts || self.since_trial < rest || !affordable {
            return best;
        }
        self.since_trial = 0;
        self.upwards = !up;
        self.tried_from = Some(best);
        other
    }

    /// Learns that a step with `drafts` drafts took `time`, and how many tokens each sequence gained.
    pub fn observe(&mut self, drafts: usize, gained: &[usize], time: Duration) {
        if self.fixed.is_some() || drafts >= self.costs.len() {
            return;
        }
        let steps = self.observe_cost(drafts, gained.len(), time.as_secs_f64());
        self.allowance.note(gained.iter().sum::<usize>() as f64 / gained.len().max(1) as f64, steps);
        for &tokens in gained {
            for (i, (right, seen)) in self.drafts[..drafts].iter_mut().enumerate().take(tokens) {
                *right = OLDER * *right + f64::from(i + 1 < tokens);
                *seen = OLDER * *seen + 1.0;
            }
        }
    }

    /// Learns from what a step took. Gives it as a multiple of a step without drafts.
    fn observe_cost(&mut self, drafts: usize, sequences: usize, seconds: f64) -> f64 {
        if (drafts, sequences) != (self.stretch.drafts, self.stretch.sequences) {
            // another batch, or sequences that want fewer: nothing to compare with
            self.before = self.before.filter(|_| self.stretch.sequences == sequences && self.stretch.is_empty());
            self.stretch = Stretch::new(drafts, sequences);
        }
        let plain = self.before.filter(|&(before, _)| before == 0 && drafts > 0).map(|(_, plain)| plain);
        let steps = plain.map_or_else(|| self.cost(drafts), |plain| (seconds / plain.max(1e-9)).clamp(1.0, MOST_STEPS));
        if plain.is_some() && !self.caught_up {
            // the draft was fed all that it missed, which it will not be in the next step
            self.caught_up = true;
            return steps;
        }
        if self.first_steps > 0 {
            self.first_steps -= 1;
            return steps;
        }
        self.stretch.push(seconds);
        if let Some((before, new)) = self.before.zip(self.stretch.least()) {
            self.before = None;
            self.compare(before, (drafts, new));
        }
        steps
    }

    /// Learns from two stretches what steps of the number of drafts that is known less cost.
    fn compare(&mut self, a: (usize, f64), b: (usize, f64)) {
        let known = |&(drafts, _): &(usize, f64)| (drafts == 0, self.costs[drafts].comparisons());
        let (known, other) = if known(&a) >= known(&b) { (a, b) } else { (b, a) };
        let multiple = self.cost(known.0) * other.1 / known.1.max(1e-9);
        let expected = self.cost(other.0);
        // no work is cheaper than none
        self.costs[other.0].learn(multiple.max(1.0), expected);
    }

    /// The number with the most tokens a second, no more than one above those that were measured; none unless it is better by a margin.
    fn best(&self) -> usize {
        if !self.allowance.is_open() {
            return 0;
        }
        let measured = self.costs.iter().rposition(|cost| cost.multiple().is_some()).unwrap_or(0);
        let mut best = (0, MARGIN * self.speed(0));
        for drafts in 1..self.costs.len().min(measured + 2) {
            let speed = self.speed(drafts);
            if speed > best.1 {
                best = (drafts, speed);
            }
        }
        best.0
    }

    /// Tokens that a step with `drafts` drafts is expected to give, in the time of one without drafts.
    fn speed(&self, drafts: usize) -> f64 {
        let (mut tokens, mut right) = (1.0, 1.0);
        for i in 0..drafts {
            right *= self.chance(i);
            tokens += right;
        }
        tokens / self.cost(drafts)
    }

    /// What a step with `drafts` drafts costs: measured, or on a line through what was measured with fewer and with more.
    fn cost(&self, drafts: usize) -> f64 {
        let known = |k: usize| Some((k as f64, self.costs[k].multiple()?));
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

    /// What a simulated machine does.
    #[derive(Clone, Copy, Debug)]
    struct Machine {
        /// A draft adds so much to a step's cost.
        draft: f64,
        /// So many of all drafts are right.
        right: f64,
        /// For two fifths of the time, some steps at a time, something else takes so many times as long for all that is done.
        busy: f64,
    }

    /// Tokens that a draft misses at most, after which it is fed them in any case, and what each costs.
    const MISSED: (f64, f64) = (256.0, 0.005);
    /// The first step with each number of drafts takes so many times as long.
    const COLD: f64 = 1.5;
    /// So many times as long takes the first step of all, less the later ones: what they use is touched for the first time.
    const FIRST: f64 = 4.0;

    /// Numbers from 0 to 1 (xorshift).
    struct Chance(u64);

    impl Chance {
        fn next(&mut self) -> f64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 11) as f64 / (1u64 << 53) as f64
        }
    }

    impl Machine {
        /// Tokens in the time of a step without drafts that nothing slows down, over `tokens` tokens, the mean of several runs.
        fn speed(&self, planner: &Planner, tokens: usize) -> f64 {
            let runs = (4096 / tokens).max(16) as u64;
            (1..=runs).map(|run| self.run(planner.clone(), tokens, run)).sum::<f64>() / runs as f64
        }

        fn run(&self, mut planner: Planner, goal: usize, seed: u64) -> f64 {
            let [mut guesses, mut others] = [1, 2].map(|of| Chance(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + of));
            let (mut tokens, mut work, mut clock, mut missed) = (0, 0.0, 0.0, 0.0);
            let (mut slow, mut until) = (1.0, 0.0);
            let mut cold = [COLD; AUTO_MOST + 1];
            for step in 0.. {
                if tokens >= goal {
                    break;
                }
                let first = 1.0 + (FIRST - 1.0) * (-0.3 * f64::from(step)).exp();
                let k = planner.next_drafts();
                let gained = 1 + (0..k).take_while(|_| guesses.next() < self.right).count();
                missed = if k == 0 { (missed + 1.0) % MISSED.0 } else { missed };
                let caught_up = if k == 0 { 0.0 } else { MISSED.1 * std::mem::take(&mut missed) };
                while clock >= until {
                    slow = if others.next() < 0.4 { self.busy } else { 1.0 };
                    until += 3.0 + 14.0 * others.next();
                }
                let cost = (1.0 + self.draft * k as f64) * std::mem::replace(&mut cold[k], 1.0) + caught_up;
                planner.observe(k, &[gained], Duration::from_secs_f64(0.01 * cost * slow * first));
                tokens += gained;
                work += cost;
                clock += cost * slow;
            }
            tokens as f64 / work
        }
    }

    #[test]
    fn auto_loses_little_where_drafts_do_not_pay_and_finds_what_pays() {
        // (tokens, how busy, least share of the speed without drafts, least share of the best number's)
        let cases = [
            (192, 1.0, 0.97, 0.8),
            (256, 1.0, 0.975, 0.85),
            (2048, 1.0, 0.99, 0.94),
            (256, 1.8, 0.95, 0.8),
            (2048, 1.8, 0.95, 0.92),
        ];
        for (tokens, busy, of_none, of_best) in cases {
            for draft in [0.15, 0.3, 0.6, 1.35] {
                for right in [0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95] {
                    let machine = Machine { draft, right, busy };
                    let auto = machine.speed(&Planner::auto(4), tokens);
                    let fixed = [0, 1, 2, 3, 4].map(|k| machine.speed(&Planner::fixed(k), tokens));
                    let best = fixed.into_iter().fold(0.0, f64::max);
                    assert!(auto > of_none * fixed[0], "{machine:?}, {tokens} tokens: {auto} against {}", fixed[0]);
                    assert!(auto > of_best * best, "{machine:?}, {tokens} tokens: {auto} against {fixed:?}");
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
