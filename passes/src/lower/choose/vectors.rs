//! `choose` by a single thread, in vectors of 16.
//!
//! task  one row
//!
//! Lanes of i32 sum halves of weights exactly over 1024 vectors. What lies between two rungs of the search's ladder is copied before it is
//! searched by bits.

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::shape::LANES;

use super::super::LowerError;
use super::super::ports::{Lowered, Site};
use super::super::sample::CHUNK_BLOCKS;
use super::{Goal, Kept, Row, Scan, Sum, joined, narrowed, scalar_units, units};

/// Elements whose weights lanes of i32 can sum.
const SUMMED: u64 = 1024 * LANES;

/// `choose`.
pub fn lower_choose(site: &Site<'_>) -> Result<Lowered, LowerError> {
    super::lower(
        site,
        |k, blocks| Vectors { work: [(); 2].map(|()| k.alloc(DType::F32, blocks.stride() + LANES)) },
        |k, vectors, given| {
            let largest = given.blocks.largest(k, given.peaks);
            given.choose(k, (given.peaks, largest), vectors)
        },
        |k, _, (out, row, token)| k.store(out, row, token),
    )
}

/// Lane by lane: count, and the two halves of weights.
type Lanes = [Val; 3];

fn no_lanes(k: &mut KernelBuilder) -> Lanes {
    let zero = k.splat_i32(16, 0);
    [zero; 3]
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

/// One thread.
#[derive(Clone, Copy)]
struct Vectors {
    /// Logits and weights between two rungs.
    work: [Val; 2],
}

impl Scan for Vectors {
    fn first_of_largest(self, k: &mut KernelBuilder, row: Row) -> Val {
        row.blocks.first_of(k, row.x, row.peaks, row.largest)
    }

    fn at_least(self, k: &mut KernelBuilder, row: Row, threshold: Val) -> Sum {
        let zero = Sum::zero(k);
        let (lo, hi) = (k.const_i64(0), k.index(row.blocks.count()));
        let sums = k.for_carry((lo, hi, CHUNK_BLOCKS), &zero.vals(), |k, first, sums| {
            let behind = k.add_const(first, CHUNK_BLOCKS);
            let behind = k.min_i64(behind, hi);
            let lanes = no_lanes(k);
            let lanes = k.for_carry((first, behind, 1), &lanes, |k, block, lanes| {
                let reached = row.reaches(k, block, threshold);
                let lanes = [lanes[0], lanes[1], lanes[2]];
                k.if_else(
                    reached,
                    |k| {
                        let range = row.blocks.range(k, block, row.blocks.stride());
                        let limit = k.splat(threshold, 16);
                        let wanted = |k: &mut KernelBuilder, v| k.cmp(Pred::Ge, v, limit);
                        add_where(k, (row.x, row.weights), range, lanes, wanted).to_vec()
                    },
                    |_| lanes.to_vec(),
                )
            });
            let sum = total(k, [lanes[0], lanes[1], lanes[2]]);
            Sum::of(sums).add(k, sum).vals().to_vec()
        });
        Sum::of(&sums)
    }

    fn search_between(
        self,
        k: &mut KernelBuilder,
        row: Row,
        goal: Goal,
        (low, high, above): (Val, Val, Sum),
    ) -> (Val, Sum) {
        let n = self.collect(k, row, (low, high));
        row.search_bits(k, goal, (low, high, above), |k, logit| self.collected_at_least(k, n, logit).add(k, above))
    }

    fn find(self, k: &mut KernelBuilder, row: Row, kept: Kept, target: Val) -> Val {
        let each = row.units_of(k, kept.logit);
        let [block, sum, ties] = self.find_block(k, row, (kept, each), target);
        let (first, behind) = row.blocks.range(k, block, row.blocks.vocab);
        let none = k.const_i32(-1);
        let found = k.for_carry((first, behind, 1), &[none, sum, ties], |k, i, at| {
            let (x, w) = (k.load_f32(row.x, i), k.load_f32(row.weights, i));
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
}

impl Vectors {
    /// Copies logits and weights of the tokens from `low` to below `high`; gives how many.
    fn collect(self, k: &mut KernelBuilder, row: Row, (low, high): (Val, Val)) -> Val {
        let (lo, hi) = (k.const_i64(0), k.index(row.blocks.count()));
        let n = k.for_carry((lo, hi, 1), &[lo], |k, block, n| {
            let reached = row.reaches(k, block, low);
            let n = n[0];
            k.if_else(
                reached,
                |k| {
                    let (first, behind) = row.blocks.range(k, block, row.blocks.stride());
                    k.for_carry((first, behind, LANES), &[n], |k, i, n| {
                        self.collect_vector(k, row, (low, high), (i, n[0]))
                    })
                },
                |_| vec![n],
            )
        })[0];
        let (lowest, zero) = (k.splat_f32(16, f32::NEG_INFINITY), k.splat_f32(16, 0.0));
        k.store(self.work[0], n, lowest);
        k.store(self.work[1], n, zero);
        n
    }

    fn collect_vector(
        self,
        k: &mut KernelBuilder,
        row: Row,
        (low, high): (Val, Val),
        (first, n): (Val, Val),
    ) -> Vec<Val> {
        let v = k.load_f32x16(row.x, first);
        let peak = k.reduce_max(v);
        let any = k.cmp(Pred::Ge, peak, low);
        k.if_else(
            any,
            |k| {
                let behind = k.add_const(first, LANES);
                k.for_carry((first, behind, 1), &[n], |k, i, n| {
                    let (x, w, n) = (k.load_f32(row.x, i), k.load_f32(row.weights, i), n[0]);
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

    /// The block in which the kept weight passes `target`, the weight before it, and the ties that are left there.
    fn find_block(self, k: &mut KernelBuilder, row: Row, (kept, each): (Kept, Val), target: Val) -> [Val; 3] {
        let (zero, blocks) = (k.const_i64(0), k.index(row.blocks.count()));
        let missing = k.const_i64(-1);
        let ends = k.for_carry((zero, blocks, 1), &[missing, zero, kept.ties], |k, block, at| {
            let (reached, looking) = (row.reaches(k, block, kept.logit), k.cmp(Pred::Lt, at[0], zero));
            let wanted = k.and(reached, looking);
            let at = at.to_vec();
            k.if_else(
                wanted,
                |k| {
                    let (above, equal) = block_sums(k, row, block, kept.logit);
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
}

/// Of a block: units above `logit`, and how many tokens have it.
fn block_sums(k: &mut KernelBuilder, row: Row, block: Val, logit: Val) -> (Val, Val) {
    let range = row.blocks.range(k, block, row.blocks.stride());
    let (limit, lanes, at) = (k.splat(logit, 16), no_lanes(k), (row.x, row.weights));
    let above = add_where(k, at, range, lanes, |k, v| k.cmp(Pred::Gt, v, limit));
    let equal = add_where(k, at, range, lanes, |k, v| k.cmp(Pred::Eq, v, limit));
    (total(k, above).weight, total(k, equal).count)
}
