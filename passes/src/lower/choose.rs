//! `choose`: a token for each row of processed logits.
//!
//! task     one row
//! greedy   the first of the largest
//! search   `top_k` and `top_p` by thresholds, without sorting: the largest threshold above which there are enough tokens, or
//!          enough weight. First along a ladder of distances from the largest logit, over whole rows (blocks whose peak is below
//!          are skipped), then by the bits of the logits between two rungs
//! draw     in the order of the tokens, by blocks, then one by one
//! traffic  logits and weights once a rung, mostly of few blocks
//!
//! Weights are counted in units of 2^-42, in two halves of 21 bits, which lanes of i32 sum exactly over 1024 vectors. So no
//! sum depends on its order, and the interpreter's sort finds the same tokens.

use nextc_ir::DType;
use nextc_ir::kernel::random::{below, token_bits};
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::ops::sample::{Choice, Factor, TOP_P_BITS, WEIGHT_BITS};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::LANES;

use super::LowerError;
use super::matmul::row_ptr;
use super::ports::{Lowered, Ports, Site};
use super::sample::{Blocks, CHUNK_BLOCKS, Settings, is_finite, weight};

/// Bits of each half of a weight.
const HALF_BITS: u32 = WEIGHT_BITS / 2;
/// Rungs of the ladder, and how many a factor of two has; the first is 2^-8 below the largest logit.
const RUNGS: i64 = 64;
const RUNGS_PER_DOUBLING: f32 = 4.0;
const FIRST_RUNG_LOG2: f32 = -8.0;
/// Elements whose weights lanes of i32 can sum.
const SUMMED: u64 = 1024 * LANES;

/// `choose`.
pub fn lower_choose(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let blocks = Blocks::of(site, site.named("x"));
    let names = ["x", "peaks", "weights", "best", "factors", "choices"];
    let reads = names.map(|name| ports.read(name, site.named(name)));
    let out = ports.write("tokens", site.result(0));
    let mut k = ports.builder(site, Extent::from(site.rows(site.result(0))?));
    let work = [(); 2].map(|()| k.alloc(DType::F32, blocks.stride() + LANES));
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
    let token = k.if_else(
        known,
        |_| vec![best],
        |k| {
            let largest = blocks.largest(k, peaks);
            let finite = is_finite(k, largest);
            let temperature = settings.factor(k, Factor::Temperature);
            let r = Row { blocks, x, weights, peaks, largest, temperature, work };
            k.if_else(finite, |k| vec![r.token(k, settings)], |k| vec![k.const_i32(-1)])
        },
    );
    k.store(out, row, token[0]);
    Ok(ports.finish(k.finish()))
}

/// Number of tokens, and units of weight: i64.
#[derive(Clone, Copy)]
struct Sum {
    count: Val,
    weight: Val,
}

impl Sum {
    fn zero(k: &mut KernelBuilder) -> Self {
        let zero = k.const_i64(0);
        Self { count: zero, weight: zero }
    }

    fn of(carried: &[Val]) -> Self {
        Self { count: carried[0], weight: carried[1] }
    }

    fn vals(self) -> [Val; 2] {
        [self.count, self.weight]
    }

    fn add(self, k: &mut KernelBuilder, other: Self) -> Self {
        Self { count: k.add(self.count, other.count), weight: k.add(self.weight, other.weight) }
    }
}

/// Lane by lane: count, and the two halves of weights.
type Lanes = [Val; 3];

fn no_lanes(k: &mut KernelBuilder) -> Lanes {
    let zero = k.splat_i32(16, 0);
    [zero; 3]
}

/// The halves of weights in units of 2^-42: i32.
fn units(k: &mut KernelBuilder, weight: Val) -> [Val; 2] {
    let scale = k.f32_like(weight, (1u32 << HALF_BITS) as f32);
    let scaled = k.fmul(weight, scale);
    let high = k.to_int(scaled);
    let whole = k.to_float(high);
    let rest = k.fsub(scaled, whole);
    let rest = k.fmul(rest, scale);
    [high, k.to_int(rest)]
}

/// Halves as one i64.
fn joined(k: &mut KernelBuilder, [high, low]: [Val; 2]) -> Val {
    let bits = k.const_i64(HALF_BITS.into());
    let high = k.shl(high, bits);
    k.add(high, low)
}

/// A scalar weight in units.
fn scalar_units(k: &mut KernelBuilder, weight: Val) -> Val {
    let halves = units(k, weight).map(|half| k.widen(half));
    joined(k, halves)
}

/// Sum of all lanes of an i32 vector, none negative.
fn sum_lanes(k: &mut KernelBuilder, lanes: Val) -> Val {
    let zero = k.const_i64(0);
    (0..LANES as u32).fold(zero, |sum, lane| {
        let x = k.extract(lanes, lane);
        let x = k.widen(x);
        k.add(sum, x)
    })
}

fn total(k: &mut KernelBuilder, [count, high, low]: Lanes) -> Sum {
    let [count, high, low] = [count, high, low].map(|lanes| sum_lanes(k, lanes));
    Sum { count, weight: joined(k, [high, low]) }
}

/// Adds the elements `lo .. hi` where `wanted` is true of the logit.
fn add_where(
    k: &mut KernelBuilder,
    (x, weights): (Val, Val),
    (lo, hi): (Val, Val),
    lanes: Lanes,
    wanted: impl FnOnce(&mut KernelBuilder, Val) -> Val,
) -> Lanes {
    let sums = k.for_carry((lo, hi, LANES), &lanes, |k, i, sums| {
        let (v, w) = (k.load_f32x16(x, i), k.load_f32x16(weights, i));
        let wanted = wanted(k, v);
        let (zero, one) = (k.splat_i32(16, 0), k.splat_i32(16, 1));
        let [high, low] = units(k, w);
        [one, high, low]
            .iter()
            .zip(sums)
            .map(|(&v, &sum)| {
                let v = k.select(wanted, v, zero);
                k.add(sum, v)
            })
            .collect()
    });
    [sums[0], sums[1], sums[2]]
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
enum Goal {
    Count(Val),
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
struct Kept {
    logit: Val,
    ties: Val,
    /// Units of all of them.
    weight: Val,
}

impl Kept {
    fn of(vals: &[Val]) -> Self {
        Self { logit: vals[0], ties: vals[1], weight: vals[2] }
    }

    fn vals(self) -> Vec<Val> {
        vec![self.logit, self.ties, self.weight]
    }
}

/// One row of logits that is sampled.
#[derive(Clone, Copy)]
struct Row {
    blocks: Blocks,
    x: Val,
    weights: Val,
    peaks: Val,
    largest: Val,
    temperature: Val,
    /// Logits and weights between two rungs.
    work: [Val; 2],
}

impl Row {
    fn token(self, k: &mut KernelBuilder, settings: Settings) -> Val {
        let zero = k.const_f32(0.0);
        let greedy = k.cmp(Pred::Eq, self.temperature, zero);
        k.if_else(
            greedy,
            |k| vec![self.blocks.first_of(k, self.x, self.peaks, self.largest)],
            |k| {
                let kept = self.kept(k, settings);
                vec![self.draw(k, settings, kept)]
            },
        )[0]
    }

    /// What `top_k`, then `top_p`, then `min_p` keep.
    fn kept(self, k: &mut KernelBuilder, settings: Settings) -> Kept {
        let (zero, lowest) = (k.const_i64(0), k.const_f32(f32::NEG_INFINITY));
        let (top_k, vocab) = (settings.choice(k, Choice::TopK), k.index(self.blocks.vocab));
        let (some, few) = (k.cmp(Pred::Gt, top_k, zero), k.cmp(Pred::Lt, top_k, vocab));
        let narrows = k.and(some, few);
        let kept = k.if_else(
            narrows,
            |k| self.top_k(k, top_k).vals(),
            |k| {
                let all = self.at_least(k, lowest);
                vec![lowest, zero, all.weight]
            },
        );
        let (top_p, one) = (settings.factor(k, Factor::TopP), k.const_f32(1.0));
        let narrows = k.cmp(Pred::Lt, top_p, one);
        let kept = k.if_else(narrows, |k| self.top_p(k, Kept::of(&kept), top_p).vals(), |_| kept.clone());
        let (min_p, none) = (settings.factor(k, Factor::MinP), k.const_f32(0.0));
        let narrows = k.cmp(Pred::Gt, min_p, none);
        let kept = k.if_else(narrows, |k| self.min_p(k, Kept::of(&kept), min_p), |_| kept.clone());
        Kept::of(&kept)
    }

    fn top_k(self, k: &mut KernelBuilder, top_k: Val) -> Kept {
        let (logit, above) = self.search(k, Goal::Count(top_k));
        let ties = k.sub(top_k, above.count);
        let each = self.units_of(k, logit);
        let at = k.mul(ties, each);
        Kept { logit, ties, weight: k.add(above.weight, at) }
    }

    fn top_p(self, k: &mut KernelBuilder, kept: Kept, top_p: Val) -> Kept {
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
        let (logit, above) = self.search(k, Goal::Weight(goal));
        // as many ties as reach the goal: of those there are, some have weight
        let each = self.units_of(k, logit);
        let missing = k.sub(goal, above.weight);
        let rounded = k.add(missing, each);
        let rounded = k.sub(rounded, one);
        let ties = k.div(rounded, each);
        let at = k.mul(ties, each);
        Kept { logit, ties, weight: k.add(above.weight, at) }
    }

    fn min_p(self, k: &mut KernelBuilder, kept: Kept, min_p: Val) -> Vec<Val> {
        let log = k.log(min_p);
        let least = k.fma(self.temperature, log, self.largest);
        let narrows = k.cmp(Pred::Gt, least, kept.logit);
        k.if_else(
            narrows,
            |k| {
                let sum = self.at_least(k, least);
                let (key, one, none) = (key(k, least), k.const_i64(1), k.const_i64(0));
                let before = k.sub(key, one);
                vec![of_key(k, before), none, sum.weight]
            },
            |_| kept.vals(),
        )
    }

    /// The weight of a logit in units.
    fn units_of(self, k: &mut KernelBuilder, logit: Val) -> Val {
        let w = weight(k, logit, self.largest, self.temperature);
        scalar_units(k, w)
    }

    /// All tokens whose logit is at least `threshold`.
    fn at_least(self, k: &mut KernelBuilder, threshold: Val) -> Sum {
        let zero = Sum::zero(k);
        let (lo, hi) = (k.const_i64(0), k.index(self.blocks.count()));
        let sums = k.for_carry((lo, hi, CHUNK_BLOCKS), &zero.vals(), |k, first, sums| {
            let behind = k.add_const(first, CHUNK_BLOCKS);
            let behind = k.min_i64(behind, hi);
            let lanes = no_lanes(k);
            let lanes = k.for_carry((first, behind, 1), &lanes, |k, block, lanes| {
                let reached = self.reaches(k, block, threshold);
                let lanes = [lanes[0], lanes[1], lanes[2]];
                k.if_else(
                    reached,
                    |k| {
                        let range = self.blocks.range(k, block, self.blocks.stride());
                        let limit = k.splat(threshold, 16);
                        let wanted = |k: &mut KernelBuilder, v| k.cmp(Pred::Ge, v, limit);
                        add_where(k, (self.x, self.weights), range, lanes, wanted).to_vec()
                    },
                    |_| lanes.to_vec(),
                )
            });
            let sum = total(k, [lanes[0], lanes[1], lanes[2]]);
            Sum::of(sums).add(k, sum).vals().to_vec()
        });
        Sum::of(&sums)
    }

    fn reaches(self, k: &mut KernelBuilder, block: Val, threshold: Val) -> Val {
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
    fn search(self, k: &mut KernelBuilder, goal: Goal) -> (Val, Sum) {
        let (low, high, above) = self.search_rungs(k, goal);
        let n = self.collect(k, low, high);
        self.search_bits(k, goal, (low, high, above), n)
    }

    /// Two logits, of which the first reaches the goal and the second does not, and the sum at the second: +infinity if no rung fails.
    fn search_rungs(self, k: &mut KernelBuilder, goal: Goal) -> (Val, Val, Sum) {
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
                    let sum = self.at_least(k, logit);
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

    /// Copies logits and weights of the tokens from `low` to below `high`; gives how many.
    fn collect(self, k: &mut KernelBuilder, low: Val, high: Val) -> Val {
        let (lo, hi) = (k.const_i64(0), k.index(self.blocks.count()));
        let n = k.for_carry((lo, hi, 1), &[lo], |k, block, n| {
            let reached = self.reaches(k, block, low);
            let n = n[0];
            k.if_else(
                reached,
                |k| {
                    let (first, behind) = self.blocks.range(k, block, self.blocks.stride());
                    k.for_carry((first, behind, LANES), &[n], |k, i, n| self.collect_vector(k, (low, high), i, n[0]))
                },
                |_| vec![n],
            )
        })[0];
        let (lowest, zero) = (k.splat_f32(16, f32::NEG_INFINITY), k.splat_f32(16, 0.0));
        k.store(self.work[0], n, lowest);
        k.store(self.work[1], n, zero);
        n
    }

    fn collect_vector(self, k: &mut KernelBuilder, (low, high): (Val, Val), first: Val, n: Val) -> Vec<Val> {
        let v = k.load_f32x16(self.x, first);
        let peak = k.reduce_max(v);
        let any = k.cmp(Pred::Ge, peak, low);
        k.if_else(
            any,
            |k| {
                let behind = k.add_const(first, LANES);
                k.for_carry((first, behind, 1), &[n], |k, i, n| {
                    let (x, w, n) = (k.load_f32(self.x, i), k.load_f32(self.weights, i), n[0]);
                    let (enough, below) = (k.cmp(Pred::Ge, x, low), k.cmp(Pred::Lt, x, high));
                    let between = k.and(enough, below);
                    // what is not between is written over by the next one
                    k.store(self.work[0], n, x);
                    k.store(self.work[1], n, w);
                    let next = k.add_const(n, 1);
                    vec![k.select(between, next, n)]
                })
            },
            |_| vec![n],
        )
    }

    /// Goes on with the search among the `n` collected tokens, by the bits of their logits.
    fn search_bits(self, k: &mut KernelBuilder, goal: Goal, (low, high, above): (Val, Val, Sum), n: Val) -> (Val, Sum) {
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
                    let sum = self.collected_at_least(k, n, logit).add(k, above);
                    let reached = goal.reached(k, sum);
                    narrowed(k, reached, [key, at[1], at[2], at[3]], [at[0], key, sum.count, sum.weight])
                },
                |_| at.clone(),
            )
        });
        (of_key(k, ends[0]), Sum::of(&ends[2..]))
    }

    fn collected_at_least(self, k: &mut KernelBuilder, n: Val, threshold: Val) -> Sum {
        let (zero, limit, none) = (Sum::zero(k), k.splat(threshold, 16), k.const_i64(0));
        let sums = k.for_carry((none, n, SUMMED), &zero.vals(), |k, first, sums| {
            let behind = k.add_const(first, SUMMED);
            let behind = k.min_i64(behind, n);
            let lanes = no_lanes(k);
            let at = (self.work[0], self.work[1]);
            let lanes = add_where(k, at, (first, behind), lanes, |k, v| k.cmp(Pred::Ge, v, limit));
            let sum = total(k, lanes);
            Sum::of(sums).add(k, sum).vals().to_vec()
        });
        Sum::of(&sums)
    }

    /// The token in whose share of the kept weight the row's random number falls.
    fn draw(self, k: &mut KernelBuilder, settings: Settings, kept: Kept) -> Val {
        let seed = [Choice::SeedLow, Choice::SeedHigh].map(|c| settings.word(k, c));
        let (sequence, position) = (settings.word(k, Choice::Sequence), settings.word(k, Choice::Position));
        let bits = token_bits(k, seed, sequence, position);
        let target = below(k, bits, kept.weight);
        let each = self.units_of(k, kept.logit);
        let [block, sum, ties] = self.find_block(k, kept, each, target);
        let (first, behind) = self.blocks.range(k, block, self.blocks.vocab);
        let none = k.const_i32(-1);
        let found = k.for_carry((first, behind, 1), &[none, sum, ties], |k, i, at| {
            let (x, w) = (k.load_f32(self.x, i), k.load_f32(self.weights, i));
            let (zero, one) = (k.const_i64(0), k.const_i64(1));
            let (more, equal) = (k.cmp(Pred::Gt, x, kept.logit), k.cmp(Pred::Eq, x, kept.logit));
            let left = k.cmp(Pred::Gt, at[2], zero);
            let tie = k.and(equal, left);
            let has = k.or(more, tie);
            let units = scalar_units(k, w);
            let units = k.select(has, units, zero);
            let (sum, fewer) = (k.add(at[1], units), k.sub(at[2], one));
            let ties = k.select(tie, fewer, at[2]);
            let no_token = k.const_i32(0);
            let missing = k.cmp(Pred::Lt, at[0], no_token);
            let beyond = k.cmp(Pred::Gt, sum, target);
            let here = k.and(missing, beyond);
            let token = k.narrow(i);
            vec![k.select(here, token, at[0]), sum, ties]
        });
        found[0]
    }

    /// The block in which the kept weight passes `target`, the weight before it, and the ties that are left there.
    fn find_block(self, k: &mut KernelBuilder, kept: Kept, each: Val, target: Val) -> [Val; 3] {
        let (zero, blocks) = (k.const_i64(0), k.index(self.blocks.count()));
        let missing = k.const_i64(-1);
        let ends = k.for_carry((zero, blocks, 1), &[missing, zero, kept.ties], |k, block, at| {
            let (reached, looking) = (self.reaches(k, block, kept.logit), k.cmp(Pred::Lt, at[0], zero));
            let wanted = k.and(reached, looking);
            let at = at.to_vec();
            k.if_else(
                wanted,
                |k| {
                    let (above, equal) = self.block_sums(k, block, kept.logit);
                    let ties = k.min_i64(equal, at[2]);
                    let at_logit = k.mul(ties, each);
                    let own = k.add(above, at_logit);
                    let (sum, left) = (k.add(at[1], own), k.sub(at[2], ties));
                    let here = k.cmp(Pred::Gt, sum, target);
                    narrowed(k, here, [block, at[1], at[2]], [at[0], sum, left])
                },
                |_| at.clone(),
            )
        });
        let first = k.cmp(Pred::Lt, ends[0], zero);
        [k.select(first, zero, ends[0]), ends[1], ends[2]]
    }

    /// Of a block: units above `logit`, and how many tokens have it.
    fn block_sums(self, k: &mut KernelBuilder, block: Val, logit: Val) -> (Val, Val) {
        let range = self.blocks.range(k, block, self.blocks.stride());
        let (limit, lanes, at) = (k.splat(logit, 16), no_lanes(k), (self.x, self.weights));
        let above = add_where(k, at, range, lanes, |k, v| k.cmp(Pred::Gt, v, limit));
        let equal = add_where(k, at, range, lanes, |k, v| k.cmp(Pred::Eq, v, limit));
        (total(k, above).weight, total(k, equal).count)
    }
}

/// `yes` or `no`, value by value.
fn narrowed<const N: usize>(k: &mut KernelBuilder, condition: Val, yes: [Val; N], no: [Val; N]) -> Vec<Val> {
    yes.into_iter().zip(no).map(|(yes, no)| k.select(condition, yes, no)).collect()
}
