//! `choose`: a token for each row of processed logits.
//!
//! greedy   the first of the largest
//! search   `top_k` and `top_p` by thresholds, without sorting: the largest threshold above which there are enough tokens, or
//!          enough weight. First along a ladder of distances from the largest logit, over whole rows (blocks whose peak is below
//!          are skipped), then by the bits of the logits between two rungs
//! draw     in the order of the tokens, by blocks, then one by one
//! traffic  logits and weights once a rung, mostly of few blocks
//!
//! The search is the same everywhere; how a row is gone through ([`Scan`]) is not: in [`vectors`] by one thread, on a GPU by a block of them.
//!
//! Weights are counted in units of 2^-42, in two halves of 21 bits. So no sum depends on its order, and the interpreter's sort finds the
//! same tokens.

pub mod vectors;

use nextc_ir::DType;
use nextc_ir::kernel::random::{below, token_bits};
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::ops::sample::{Choice, Factor, TOP_P_BITS, WEIGHT_BITS};
use nextc_ir::schedule::Extent;

use super::LowerError;
use super::matmul::row_ptr;
use super::ports::{Lowered, Ports, Site};
use super::sample::{Blocks, Settings, is_finite, weight};

/// Bits of each half of a weight.
const HALF_BITS: u32 = WEIGHT_BITS / 2;
/// Rungs of the ladder, and how many a factor of two has; the first is 2^-8 below the largest logit.
const RUNGS: i64 = 64;
const RUNGS_PER_DOUBLING: f32 = 4.0;
const FIRST_RUNG_LOG2: f32 = -8.0;

/// Number of tokens, and units of weight: i64.
#[derive(Clone, Copy)]
pub struct Sum {
    /// Tokens.
    pub count: Val,
    /// Their weight.
    pub weight: Val,
}

impl Sum {
    /// Nothing.
    pub fn zero(k: &mut KernelBuilder) -> Self {
        let zero = k.const_i64(0);
        Self { count: zero, weight: zero }
    }

    /// From its values.
    pub fn of(carried: &[Val]) -> Self {
        Self { count: carried[0], weight: carried[1] }
    }

    /// Its values.
    pub fn vals(self) -> [Val; 2] {
        [self.count, self.weight]
    }

    /// Both.
    pub fn add(self, k: &mut KernelBuilder, other: Self) -> Self {
        Self { count: k.add(self.count, other.count), weight: k.add(self.weight, other.weight) }
    }
}

/// The halves of weights in units of 2^-42: i32.
pub fn units(k: &mut KernelBuilder, weight: Val) -> [Val; 2] {
    let scale = k.f32_like(weight, (1u32 << HALF_BITS) as f32);
    let scaled = k.fmul(weight, scale);
    let high = k.to_int(scaled);
    let whole = k.to_float(high);
    let rest = k.fsub(scaled, whole);
    let rest = k.fmul(rest, scale);
    [high, k.to_int(rest)]
}

/// Halves as one i64.
pub fn joined(k: &mut KernelBuilder, [high, low]: [Val; 2]) -> Val {
    let bits = k.const_i64(HALF_BITS.into());
    let high = k.shl(high, bits);
    k.add(high, low)
}

/// A scalar weight in units.
pub fn scalar_units(k: &mut KernelBuilder, weight: Val) -> Val {
    let halves = units(k, weight).map(|half| k.widen(half));
    joined(k, halves)
}

/// Order-preserving bits of an f32 as an i64; its own inverse on 32 bits.
fn flip(k: &mut KernelBuilder, bits: Val) -> Val {
    let (by, magnitude) = (k.const_i32(31), k.const_i32(i32::MAX));
    let sign = k.sshr(bits, by);
    let mask = k.and(sign, magnitude);
    k.xor(bits, mask)
}

fn key(k: &mut KernelBuilder, x: Val) -> Val {
    let bits = k.bitcast(x, DType::I32);
    let key = flip(k, bits);
    k.widen(key)
}

fn of_key(k: &mut KernelBuilder, key: Val) -> Val {
    let key = k.narrow(key);
    let bits = flip(k, key);
    k.bitcast(bits, DType::F32)
}

/// `(a + b) / 2`, rounded down.
fn middle(k: &mut KernelBuilder, a: Val, b: Val) -> Val {
    let (sum, one) = (k.add(a, b), k.const_i64(1));
    k.sshr(sum, one)
}

/// True if a search between `low` and `high` goes on.
fn apart(k: &mut KernelBuilder, low: Val, high: Val) -> Val {
    let (distance, one) = (k.sub(high, low), k.const_i64(1));
    k.cmp(Pred::Gt, distance, one)
}

/// What a search wants enough of.
#[derive(Clone, Copy)]
pub enum Goal {
    /// Tokens.
    Count(Val),
    /// Weight.
    Weight(Val),
}

impl Goal {
    fn reached(self, k: &mut KernelBuilder, sum: Sum) -> Val {
        match self {
            Self::Count(goal) => k.cmp(Pred::Ge, sum.count, goal),
            Self::Weight(goal) => k.cmp(Pred::Ge, sum.weight, goal),
        }
    }
}

/// The tokens that are kept: those above `logit`, and the first `ties` of those that have it.
#[derive(Clone, Copy)]
pub struct Kept {
    /// The least logit.
    pub logit: Val,
    /// How many of those that have it.
    pub ties: Val,
    /// Units of all of them.
    pub weight: Val,
}

impl Kept {
    fn of(vals: &[Val]) -> Self {
        Self { logit: vals[0], ties: vals[1], weight: vals[2] }
    }

    fn vals(self) -> Vec<Val> {
        vec![self.logit, self.ties, self.weight]
    }
}

/// A row of logits as bound; its largest logit is to be found.
#[derive(Clone, Copy)]
pub struct Given {
    /// Its blocks.
    pub blocks: Blocks,
    /// The peak of each block.
    pub peaks: Val,
    x: Val,
    weights: Val,
    settings: Settings,
}

impl Given {
    /// The token that is chosen; the peaks may lie elsewhere by now.
    pub fn choose(self, k: &mut KernelBuilder, (peaks, largest): (Val, Val), scan: impl Scan) -> Val {
        let Self { blocks, x, weights, settings, .. } = self;
        let temperature = settings.factor(k, Factor::Temperature);
        Row { blocks, x, weights, peaks, largest, temperature }.choose(k, settings, scan)
    }
}

/// `choose` where a task begins with `begin`, `choose` gives the token of a row that is sampled, and `store` puts `(out, row, token)` there.
pub fn lower<T: Copy>(
    site: &Site<'_>,
    begin: impl FnOnce(&mut KernelBuilder, Blocks) -> T,
    choose: impl FnOnce(&mut KernelBuilder, T, Given) -> Val,
    store: impl FnOnce(&mut KernelBuilder, T, (Val, Val, Val)),
) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let blocks = Blocks::of(site, site.named("x"));
    let names = ["x", "peaks", "weights", "best", "factors", "choices"];
    let reads = names.map(|name| ports.read(name, site.named(name)));
    let out = ports.write("tokens", site.result(0));
    let mut k = ports.builder(site, Extent::from(site.rows(site.result(0))?));
    let begun = begin(&mut k, blocks);
    let row = k.task();
    let [x, peaks, weights, best, factors, choices] = reads.map(|port| k.param(port));
    let (x, weights) = (row_ptr(&mut k, x, row, blocks.stride()), row_ptr(&mut k, weights, row, blocks.stride()));
    let peaks = row_ptr(&mut k, peaks, row, blocks.peaks_stride());
    let settings = Settings::of(&mut k, factors, choices, row);
    let best = k.load(DType::I32, 1, best, row);
    let (out, none) = (k.param(out), k.const_i32(0));
    let bad = k.cmp(Pred::Lt, best, none);
    let plain = settings.is_plain(&mut k);
    let known = k.or(bad, plain);
    let given = Given { blocks, peaks, x, weights, settings };
    let token = k.if_else(known, |_| vec![best], |k| vec![choose(k, begun, given)])[0];
    store(&mut k, begun, (out, row, token));
    Ok(ports.finish(k.finish()))
}

/// How the logits of a row are gone through.
pub trait Scan: Copy {
    /// Index of the first token whose logit is the largest; an i32.
    fn first_of_largest(self, k: &mut KernelBuilder, row: Row) -> Val;
    /// All tokens whose logit is at least `threshold`.
    fn at_least(self, k: &mut KernelBuilder, row: Row, threshold: Val) -> Sum;
    /// Goes on with a search between two logits, of which the first reaches the goal and the second does not, with the sum at the second:
    /// the largest logit that reaches it, and the sum of the tokens above.
    fn search_between(self, k: &mut KernelBuilder, row: Row, goal: Goal, ends: (Val, Val, Sum)) -> (Val, Sum);
    /// The token in whose share of the kept weight `target` falls, in the order of tokens; an i32.
    fn find(self, k: &mut KernelBuilder, row: Row, kept: Kept, target: Val) -> Val;
}

/// One row of logits that is sampled.
#[derive(Clone, Copy)]
pub struct Row {
    /// Its blocks.
    pub blocks: Blocks,
    /// Its logits, with -infinity behind the vocabulary.
    pub x: Val,
    /// Their weights.
    pub weights: Val,
    /// The peak of each block.
    pub peaks: Val,
    /// The largest logit.
    pub largest: Val,
    /// What logits are divided by.
    pub temperature: Val,
}

impl Row {
    /// The token that is chosen, -1 if the largest logit is infinite; an i32.
    fn choose(self, k: &mut KernelBuilder, settings: Settings, scan: impl Scan) -> Val {
        let finite = is_finite(k, self.largest);
        k.if_else(finite, |k| vec![self.token(k, settings, scan)], |k| vec![k.const_i32(-1)])[0]
    }

    fn token(self, k: &mut KernelBuilder, settings: Settings, scan: impl Scan) -> Val {
        let zero = k.const_f32(0.0);
        let greedy = k.cmp(Pred::Eq, self.temperature, zero);
        k.if_else(
            greedy,
            |k| vec![scan.first_of_largest(k, self)],
            |k| {
                let kept = self.kept(k, settings, scan);
                vec![self.draw(k, settings, kept, scan)]
            },
        )[0]
    }

    /// What `top_k`, then `top_p`, then `min_p` keep.
    fn kept(self, k: &mut KernelBuilder, settings: Settings, scan: impl Scan) -> Kept {
        let (zero, lowest) = (k.const_i64(0), k.const_f32(f32::NEG_INFINITY));
        let (top_k, vocab) = (settings.choice(k, Choice::TopK), k.index(self.blocks.vocab));
        let (some, few) = (k.cmp(Pred::Gt, top_k, zero), k.cmp(Pred::Lt, top_k, vocab));
        let narrows = k.and(some, few);
        let kept = k.if_else(
            narrows,
            |k| self.top_k(k, top_k, scan).vals(),
            |k| {
                let all = scan.at_least(k, self, lowest);
                vec![lowest, zero, all.weight]
            },
        );
        let (top_p, one) = (settings.factor(k, Factor::TopP), k.const_f32(1.0));
        let narrows = k.cmp(Pred::Lt, top_p, one);
        let kept = k.if_else(narrows, |k| self.top_p(k, Kept::of(&kept), top_p, scan).vals(), |_| kept.clone());
        let (min_p, none) = (settings.factor(k, Factor::MinP), k.const_f32(0.0));
        let narrows = k.cmp(Pred::Gt, min_p, none);
        let kept = k.if_else(narrows, |k| self.min_p(k, Kept::of(&kept), min_p, scan), |_| kept.clone());
        Kept::of(&kept)
    }

    fn top_k(self, k: &mut KernelBuilder, top_k: Val, scan: impl Scan) -> Kept {
        let (logit, above) = self.search(k, Goal::Count(top_k), scan);
        let ties = k.sub(top_k, above.count);
        let each = self.units_of(k, logit);
        let at = k.mul(ties, each);
        Kept { logit, ties, weight: k.add(above.weight, at) }
    }

    fn top_p(self, k: &mut KernelBuilder, kept: Kept, top_p: Val, scan: impl Scan) -> Kept {
        // top_p · weight in units of 2^-30 of it, without leaving 64 bits
        let (scale, bits) = (k.const_f32((1u32 << TOP_P_BITS) as f32), k.const_i64(TOP_P_BITS.into()));
        let share = k.fmul(top_p, scale);
        let share = k.to_int(share);
        let share = k.widen(share);
        let mask = k.const_i64((1 << TOP_P_BITS) - 1);
        let (high, low) = (k.ushr(kept.weight, bits), k.and(kept.weight, mask));
        let (high, low) = (k.mul(high, share), k.mul(low, share));
        let low = k.ushr(low, bits);
        let (goal, one) = (k.add(high, low), k.const_i64(1));
        let least = k.cmp(Pred::Lt, goal, one);
        let goal = k.select(least, one, goal);
        let (logit, above) = self.search(k, Goal::Weight(goal), scan);
        // as many ties as reach the goal: of those there are, some have weight
        let each = self.units_of(k, logit);
        let missing = k.sub(goal, above.weight);
        let rounded = k.add(missing, each);
        let rounded = k.sub(rounded, one);
        let ties = k.div(rounded, each);
        let at = k.mul(ties, each);
        Kept { logit, ties, weight: k.add(above.weight, at) }
    }

    fn min_p(self, k: &mut KernelBuilder, kept: Kept, min_p: Val, scan: impl Scan) -> Vec<Val> {
        let log = k.log(min_p);
        let least = k.fma(self.temperature, log, self.largest);
        let narrows = k.cmp(Pred::Gt, least, kept.logit);
        k.if_else(
            narrows,
            |k| {
                let sum = scan.at_least(k, self, least);
                let (key, one, none) = (key(k, least), k.const_i64(1), k.const_i64(0));
                let before = k.sub(key, one);
                vec![of_key(k, before), none, sum.weight]
            },
            |_| kept.vals(),
        )
    }

    /// The weight of a logit in units.
    pub fn units_of(self, k: &mut KernelBuilder, logit: Val) -> Val {
        let w = weight(k, logit, self.largest, self.temperature);
        scalar_units(k, w)
    }

    /// True if a block has tokens whose logit is at least `threshold`.
    pub fn reaches(self, k: &mut KernelBuilder, block: Val, threshold: Val) -> Val {
        let peak = k.load_f32(self.peaks, block);
        k.cmp(Pred::Ge, peak, threshold)
    }

    /// The logit of rung `rung`, -infinity behind the last.
    fn rung(self, k: &mut KernelBuilder, rung: Val) -> Val {
        let (last, lowest) = (k.const_i64(RUNGS), k.const_f32(f32::NEG_INFINITY));
        let behind = k.cmp(Pred::Ge, rung, last);
        let rung = k.narrow(rung);
        let rung = k.to_float(rung);
        let (scale, first) = (
            k.const_f32(std::f32::consts::LN_2 / RUNGS_PER_DOUBLING),
            k.const_f32(FIRST_RUNG_LOG2 * std::f32::consts::LN_2),
        );
        let log = k.fma(rung, scale, first);
        let distance = k.exp(log);
        let logit = k.fsub(self.largest, distance);
        k.select(behind, lowest, logit)
    }

    /// The largest logit such that the tokens that have at least it reach `goal`, which all do; and the sum of those above it.
    fn search(self, k: &mut KernelBuilder, goal: Goal, scan: impl Scan) -> (Val, Sum) {
        let ends = self.search_rungs(k, goal, scan);
        scan.search_between(k, self, goal, ends)
    }

    /// Two logits, of which the first reaches the goal and the second does not, and the sum at the second: +infinity if no rung fails.
    fn search_rungs(self, k: &mut KernelBuilder, goal: Goal, scan: impl Scan) -> (Val, Val, Sum) {
        let (failed, reached, zero) = (k.const_i64(-1), k.const_i64(RUNGS), Sum::zero(k));
        let (lo, hi) = (k.const_i64(0), k.const_i64(i64::from((RUNGS + 1).ilog2() + 1)));
        let ends = k.for_carry((lo, hi, 1), &[failed, reached, zero.count, zero.weight], |k, _, at| {
            let goes_on = apart(k, at[0], at[1]);
            let at = at.to_vec();
            k.if_else(
                goes_on,
                |k| {
                    let rung = middle(k, at[0], at[1]);
                    let logit = self.rung(k, rung);
                    let sum = scan.at_least(k, self, logit);
                    let reached = goal.reached(k, sum);
                    narrowed(k, reached, [at[0], rung, at[2], at[3]], [rung, at[1], sum.count, sum.weight])
                },
                |_| at.clone(),
            )
        });
        let low = self.rung(k, ends[1]);
        let (none, infinity) = (k.const_i64(0), k.const_f32(f32::INFINITY));
        let no_failure = k.cmp(Pred::Lt, ends[0], none);
        let high = self.rung(k, ends[0]);
        (low, k.select(no_failure, infinity, high), Sum::of(&ends[2..]))
    }

    /// A search between two logits by the bits of those between them; `at_least` gives the sum of the tokens that have at least a logit.
    pub fn search_bits(
        self,
        k: &mut KernelBuilder,
        goal: Goal,
        (low, high, above): (Val, Val, Sum),
        at_least: impl FnOnce(&mut KernelBuilder, Val) -> Sum,
    ) -> (Val, Sum) {
        let (infinity, one) = (k.const_f32(f32::INFINITY), k.const_i64(1));
        let no_failure = k.cmp(Pred::Eq, high, infinity);
        let (largest, high, low) = (key(k, self.largest), key(k, high), key(k, low));
        let behind = k.add(largest, one);
        let high = k.select(no_failure, behind, high);
        let (lo, hi) = (k.const_i64(0), k.const_i64(33));
        let ends = k.for_carry((lo, hi, 1), &[low, high, above.count, above.weight], |k, _, at| {
            let goes_on = apart(k, at[0], at[1]);
            let at = at.to_vec();
            k.if_else(
                goes_on,
                |k| {
                    let key = middle(k, at[0], at[1]);
                    let logit = of_key(k, key);
                    let sum = at_least(k, logit);
                    let reached = goal.reached(k, sum);
                    narrowed(k, reached, [key, at[1], at[2], at[3]], [at[0], key, sum.count, sum.weight])
                },
                |_| at.clone(),
            )
        });
        (of_key(k, ends[0]), Sum::of(&ends[2..]))
    }

    /// The token in whose share of the kept weight the row's random number falls.
    fn draw(self, k: &mut KernelBuilder, settings: Settings, kept: Kept, scan: impl Scan) -> Val {
        let seed = [Choice::SeedLow, Choice::SeedHigh].map(|c| settings.word(k, c));
        let (sequence, position) = (settings.word(k, Choice::Sequence), settings.word(k, Choice::Position));
        let bits = token_bits(k, seed, sequence, position);
        let target = below(k, bits, kept.weight);
        scan.find(k, self, kept, target)
    }
}

/// `yes` or `no`, value by value.
pub fn narrowed<const N: usize>(k: &mut KernelBuilder, condition: Val, yes: [Val; N], no: [Val; N]) -> Vec<Val> {
    yes.into_iter().zip(no).map(|(yes, no)| k.select(condition, yes, no)).collect()
}
