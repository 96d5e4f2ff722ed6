//! `choose` on a GPU: how a block of threads goes through a row of logits ([`Scan`]).
//!
//! task     one row
//! sums     a warp a block of 256 logits whose peak is high enough, which a thread sees of one block in each 256; then over warps
//! search   by bits as by rungs, over the row: nothing is copied
//! draw     the sums of all blocks in shared memory, of each 32 of them, and the first that passes the target; the same with the logits of
//!          that block
//! traffic  peaks once a sum, logits and weights of few blocks: bound by latency

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::ops::sample::BLOCK;

use super::super::LowerError;
use super::super::choose::{self, Goal, Kept, Row, Scan, Sum, narrowed, scalar_units};
use super::super::ports::{Lowered, Site};
use super::super::sample::Blocks;
use super::rows::{THREADS, begin_row, first_of_largest, largest_of};
use super::{Place, WARP};

/// Warps of a row.
const WARPS: u64 = THREADS / 32;
/// Entries of which a thread finds the sum before one is picked.
const GROUP: u64 = 32;
/// Most blocks whose peaks and sums fit shared memory, 16 bytes each.
const MOST_BLOCKS: u64 = 2560;

/// `choose`, if the sums of all blocks fit.
pub fn lower_choose(site: &Site<'_>) -> Option<Result<Lowered, LowerError>> {
    (Blocks::of(site, site.named("x")).count() <= MOST_BLOCKS).then(|| lower(site))
}

fn lower(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let begin = |k: &mut KernelBuilder, blocks: Blocks| {
        let entries = blocks.count().max(BLOCK);
        let parts = k.shared(DType::F32, WARPS);
        let near = k.shared(DType::F32, blocks.count());
        let threads = Threads {
            held: &[],
            firsts: k.shared(DType::I32, WARPS),
            sums: [(); 2].map(|()| k.shared(DType::I64, WARPS)),
            entries: Entries::shared(k, entries),
            groups: Entries::shared(k, entries.div_ceil(GROUP)),
            place: Place::here(k),
        };
        begin_row(k);
        // rows are fewer than multiprocessors, so nothing is won by keeping a thread's registers few
        k.together(2);
        (threads, parts, near)
    };
    choose::lower(
        site,
        begin,
        |k, (threads, parts, near), given| {
            let held = hold_peaks(k, threads.place, given.blocks, (given.peaks, near));
            let largest = largest_of(k, threads.place, parts, (given.blocks, near));
            given.choose(k, (near, largest), Threads { held: &held, ..threads })
        },
        |k, (threads, ..), (out, row, token)| threads.place.once(k, |k| k.store(out, row, token)),
    )
}

/// Copies the peaks of a row to shared memory. Gives those of this thread, of one block in each [`THREADS`]: NaN where there is none.
fn hold_peaks(k: &mut KernelBuilder, place: Place, blocks: Blocks, (peaks, near): (Val, Val)) -> Vec<Val> {
    let (none, count) = (k.const_f32(f32::NAN), k.index(blocks.count()));
    let held = (0..blocks.count()).step_by(THREADS as usize).map(|first| {
        let block = k.add_const(place.thread, first);
        let exists = k.cmp(Pred::Lt, block, count);
        let copied = |k: &mut KernelBuilder| {
            let peak = k.load_f32(peaks, block);
            k.store(near, block, peak);
            vec![peak]
        };
        k.if_else(exists, copied, |_| vec![none])[0]
    });
    let held = held.collect();
    k.barrier();
    held
}

/// The weight above a logit (i64) and the number of tokens that have it (i32), of each of several parts of a row, in shared memory.
#[derive(Clone, Copy)]
struct Entries {
    above: Val,
    equal: Val,
}

impl Entries {
    fn shared(k: &mut KernelBuilder, n: u64) -> Self {
        Self { above: k.shared(DType::I64, n), equal: k.shared(DType::I32, n) }
    }

    fn load(self, k: &mut KernelBuilder, i: Val) -> (Val, Val) {
        let (above, equal) = (k.load(DType::I64, 1, self.above, i), k.load(DType::I32, 1, self.equal, i));
        (above, k.widen(equal))
    }

    fn store(self, k: &mut KernelBuilder, i: Val, (above, equal): (Val, Val)) {
        let equal = k.narrow(equal);
        k.store(self.above, i, above);
        k.store(self.equal, i, equal);
    }

    /// The first of the entries `range` in which the weight passes a target, or -1; the weight before it; the ties that are left there.
    fn pick(self, k: &mut KernelBuilder, (lo, hi): (Val, Val), search: Search, start: [Val; 2]) -> [Val; 3] {
        let (missing, zero) = (k.const_i64(-1), k.const_i64(0));
        let found = k.for_carry((lo, hi, 1), &[missing, start[0], start[1]], |k, i, at| {
            let (above, equal) = self.load(k, i);
            let ties = k.min_i64(equal, at[2]);
            let tied = k.mul(ties, search.each);
            let own = k.add(above, tied);
            let (sum, left) = (k.add(at[1], own), k.sub(at[2], ties));
            let (looking, beyond) = (k.cmp(Pred::Lt, at[0], zero), k.cmp(Pred::Gt, sum, search.target));
            let here = k.and(looking, beyond);
            let passed = narrowed(k, here, [i, at[1], at[2]], [at[0], sum, left]);
            narrowed(k, looking, [passed[0], passed[1], passed[2]], [at[0], at[1], at[2]])
        });
        [found[0], found[1], found[2]]
    }
}

/// What is looked for: where the weight passes `target`, ties weighing `each`.
#[derive(Clone, Copy)]
struct Search {
    each: Val,
    target: Val,
}

/// A block of threads. Every value that it gives is the same in all of them.
#[derive(Clone, Copy)]
struct Threads<'a> {
    place: Place,
    /// The peaks of this thread's blocks: number `thread`, and every [`THREADS`]th after that.
    held: &'a [Val],
    /// An i32 a warp.
    firsts: Val,
    /// An i64 a warp, twice.
    sums: [Val; 2],
    entries: Entries,
    /// Sums of each [`GROUP`] entries.
    groups: Entries,
}

impl Threads<'_> {
    /// Sums of two i64 over all threads.
    fn total(self, k: &mut KernelBuilder, own: [Val; 2]) -> [Val; 2] {
        let own = own.map(|x| warp_total(k, x));
        self.place.once_a_warp(k, |k| self.sums.iter().zip(own).for_each(|(&to, x)| k.store(to, self.place.warp, x)));
        k.barrier();
        let zero = k.const_i64(0);
        let sums = self.sums.map(|from| {
            (0..WARPS).fold(zero, |sum, warp| {
                let warp = k.index(warp);
                let part = k.load(DType::I64, 1, from, warp);
                k.add(sum, part)
            })
        });
        k.barrier();
        sums
    }

    /// The entry in which the weight passes a target: `(index, weight before it, ties that are left)`. -1 if none does.
    fn pick(self, k: &mut KernelBuilder, n: u64, search: Search, start: [Val; 2]) -> [Val; 3] {
        k.barrier();
        let (zero, count) = (k.const_i64(0), k.index(n));
        let groups = k.index(n.div_ceil(GROUP));
        k.for_each((self.place.thread, groups, THREADS), |k, group| {
            let (lo, hi) = group_range(k, group, count);
            let sums = k.for_carry((lo, hi, 1), &[zero, zero], |k, i, sums| {
                let (above, equal) = self.entries.load(k, i);
                vec![k.add(sums[0], above), k.add(sums[1], equal)]
            });
            self.groups.store(k, group, (sums[0], sums[1]));
        });
        k.barrier();
        let [group, sum, ties] = self.groups.pick(k, (zero, groups), search, start);
        let missing = k.cmp(Pred::Lt, group, zero);
        let known = k.select(missing, zero, group);
        let (lo, hi) = group_range(k, known, count);
        let hi = k.select(missing, lo, hi);
        let found = self.entries.pick(k, (lo, hi), search, [sum, ties]);
        k.barrier();
        found
    }

    /// Among the blocks that the threads of this warp hold as number `i`: the first whose peak is at least `threshold`, and the one behind
    /// the last.
    fn reached(self, k: &mut KernelBuilder, (i, peak): (usize, Val), threshold: Val) -> (Val, Val) {
        let reached = k.cmp(Pred::Ge, peak, threshold);
        let (lane, none, all) = (k.narrow(self.place.lane), k.const_i32(-1), k.const_i32(32));
        let (first, last) = (k.select(reached, lane, all), k.select(reached, lane, none));
        let ends = [k.warp_min(first), k.warp_max(last)].map(|lane| k.widen(lane));
        let of_warp = k.mul_const(self.place.warp, 32);
        let base = k.add_const(of_warp, i as u64 * THREADS);
        let behind = k.add_const(ends[1], 1);
        (k.add(base, ends[0]), k.add(base, behind))
    }

    /// Runs `body` for the logits of a block that this thread of a warp has: index, logit, weight. They are four neighbours at a time.
    fn each_of_block(
        self,
        k: &mut KernelBuilder,
        row: Row,
        block: Val,
        start: [Val; 2],
        body: impl Fn(&mut KernelBuilder, (Val, Val), [Val; 2]) -> [Val; 2],
    ) -> Vec<Val> {
        let (lo, hi) = row.blocks.range(k, block, row.blocks.stride());
        let own = k.mul_const(self.place.lane, 4);
        let own = k.add(lo, own);
        k.for_carry((own, hi, 128), &start, |k, at, sums| {
            let (x, w) = (k.load(DType::F32, 4, row.x, at), k.load(DType::F32, 4, row.weights, at));
            (0..4)
                .fold([sums[0], sums[1]], |sums, lane| {
                    let (x, w) = (k.extract(x, lane), k.extract(w, lane));
                    body(k, (x, w), sums)
                })
                .to_vec()
        })
    }
}

/// First entry of a group, and the one behind its last.
fn group_range(k: &mut KernelBuilder, group: Val, count: Val) -> (Val, Val) {
    let lo = k.mul_const(group, GROUP);
    let behind = k.add_const(lo, GROUP);
    (lo, k.min_i64(behind, count))
}

/// Sum of an i64 over the threads of a warp, in all of them.
fn warp_total(k: &mut KernelBuilder, x: Val) -> Val {
    let (half, mask) = (k.const_i64(32), k.const_i64(0xffff_ffff));
    WARP.iter().fold(x, |x, &lane| {
        let high = k.ushr(x, half);
        let [low, high] = [x, high].map(|part| {
            let part = k.narrow(part);
            let part = k.shuffle_xor(part, lane);
            k.widen(part)
        });
        let (low, high) = (k.and(low, mask), k.shl(high, half));
        let other = k.or(low, high);
        k.add(x, other)
    })
}

/// `sum` and what `wanted` is true of.
fn plus_if(k: &mut KernelBuilder, wanted: Val, sum: Val, x: Val) -> Val {
    let more = k.add(sum, x);
    k.select(wanted, more, sum)
}

impl Scan for Threads<'_> {
    fn first_of_largest(self, k: &mut KernelBuilder, row: Row) -> Val {
        first_of_largest(k, self.place, self.firsts, (row.blocks, row.x, row.peaks), row.largest)
    }

    fn at_least(self, k: &mut KernelBuilder, row: Row, threshold: Val) -> Sum {
        let (none, one) = (k.const_i64(0), k.const_i64(1));
        let mut own = vec![none, none];
        for (i, &peak) in self.held.iter().enumerate() {
            let range = self.reached(k, (i, peak), threshold);
            own = k.for_carry((range.0, range.1, 1), &own, |k, block, sums| {
                let reached = row.reaches(k, block, threshold);
                let sums = [sums[0], sums[1]];
                k.if_else(
                    reached,
                    |k| {
                        self.each_of_block(k, row, block, sums, |k, (x, w), sums| {
                            let (wanted, units) = (k.cmp(Pred::Ge, x, threshold), scalar_units(k, w));
                            [plus_if(k, wanted, sums[0], one), plus_if(k, wanted, sums[1], units)]
                        })
                    },
                    |_| sums.to_vec(),
                )
            });
        }
        let sums = self.total(k, [own[0], own[1]]);
        Sum { count: sums[0], weight: sums[1] }
    }

    fn search_between(self, k: &mut KernelBuilder, row: Row, goal: Goal, ends: (Val, Val, Sum)) -> (Val, Sum) {
        row.search_bits(k, goal, ends, |k, logit| self.at_least(k, row, logit))
    }

    fn find(self, k: &mut KernelBuilder, row: Row, kept: Kept, target: Val) -> Val {
        let (zero, one) = (k.const_i64(0), k.const_i64(1));
        let search = Search { each: row.units_of(k, kept.logit), target };
        let of_logit = |k: &mut KernelBuilder, (x, w): (Val, Val), sums: [Val; 2]| {
            let (more, equal) = (k.cmp(Pred::Gt, x, kept.logit), k.cmp(Pred::Eq, x, kept.logit));
            let units = scalar_units(k, w);
            [plus_if(k, more, sums[0], units), plus_if(k, equal, sums[1], one)]
        };
        let count = k.index(row.blocks.count());
        k.for_each((self.place.warp, count, WARPS), |k, block| {
            let reached = row.reaches(k, block, kept.logit);
            let own =
                k.if_else(reached, |k| self.each_of_block(k, row, block, [zero, zero], of_logit), |_| vec![zero, zero]);
            let (above, equal) = (warp_total(k, own[0]), warp_total(k, own[1]));
            self.place.once_a_warp(k, |k| self.entries.store(k, block, (above, equal)));
        });
        let [block, sum, ties] = self.pick(k, row.blocks.count(), search, [zero, kept.ties]);
        let missing = k.cmp(Pred::Lt, block, zero);
        let block = k.select(missing, zero, block);
        let (lo, hi) = row.blocks.range(k, block, row.blocks.vocab);
        let at = k.add(lo, self.place.thread);
        let exists = k.cmp(Pred::Lt, at, hi);
        let own = k.if_else(
            exists,
            |k| {
                let (x, w) = (k.load_f32(row.x, at), k.load_f32(row.weights, at));
                of_logit(k, (x, w), [zero, zero]).to_vec()
            },
            |_| vec![zero, zero],
        );
        self.entries.store(k, self.place.thread, (own[0], own[1]));
        let [found, ..] = self.pick(k, BLOCK, search, [sum, ties]);
        let (missing, token) = (k.cmp(Pred::Lt, found, zero), k.add(lo, found));
        let (none, token) = (k.const_i32(-1), k.narrow(token));
        k.select(missing, none, token)
    }
}
