//! What steps cost, in seconds and as multiples of one without drafts.

use std::collections::VecDeque;

use crate::stats::median;

/// Steps of a stretch before its cost is compared with that of the one before it; no number of drafts is left sooner.
pub(super) const STRETCH: usize = 3;
/// Newest costs of a stretch, of which the least counts: what a machine does beside only adds.
const NEWEST: usize = 5;
/// Newest comparisons of two costs, of which the median counts.
const COMPARISONS: usize = 9;

/// What steps with some number of drafts cost, as a multiple of those without.
#[derive(Clone, Debug, Default)]
pub(super) struct Cost {
    /// What was thought before the first comparison.
    expected: f64,
    /// The newest comparisons.
    seen: VecDeque<f64>,
}

impl Cost {
    /// Of steps without drafts.
    pub fn of_none() -> Self {
        Self { expected: 1.0, seen: [1.0].into() }
    }

    /// Learns from a comparison; `expected`, what was thought before the first one, counts as much as that one.
    pub fn learn(&mut self, multiple: f64, expected: f64) {
        if self.seen.is_empty() {
            self.expected = expected;
        }
        push_newest(&mut self.seen, multiple, COMPARISONS);
    }

    /// The median of the comparisons, if there were any. What becomes faster by itself, as the first steps do, makes every other one too
    /// large and those between too small.
    pub fn multiple(&self) -> Option<f64> {
        let mut sorted: Vec<f64> = self.seen.iter().copied().collect();
        sorted.extend((sorted.len() == 1).then_some(self.expected));
        sorted.sort_by(f64::total_cmp);
        (!sorted.is_empty()).then(|| median(&sorted))
    }

    pub fn comparisons(&self) -> usize {
        self.seen.len()
    }
}

/// Appends to the newest `most` values.
fn push_newest(values: &mut VecDeque<f64>, value: f64, most: usize) {
    if values.len() == most {
        values.pop_front();
    }
    values.push_back(value);
}

/// Steps in a row with as many drafts for as many sequences.
#[derive(Clone, Debug, Default)]
pub(super) struct Stretch {
    pub drafts: usize,
    pub sequences: usize,
    /// The newest costs, in seconds.
    seconds: VecDeque<f64>,
}

impl Stretch {
    pub fn new(drafts: usize, sequences: usize) -> Self {
        Self { drafts, sequences, seconds: VecDeque::new() }
    }

    pub fn is_empty(&self) -> bool {
        self.seconds.is_empty()
    }

    pub fn push(&mut self, seconds: f64) {
        push_newest(&mut self.seconds, seconds, NEWEST);
    }

    /// The least cost; none while there are too few.
    pub fn least(&self) -> Option<f64> {
        self.seconds.iter().copied().reduce(f64::min).filter(|_| self.seconds.len() >= STRETCH)
    }
}
