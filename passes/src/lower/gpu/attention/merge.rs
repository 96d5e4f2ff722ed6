//! What the splits of decoded runs found, put together: the tail of [`decode`](super::decode).
//!
//! block    64 elements of one row; `factor = exp(m − max)` of each split, `out = Σ factor · o / Σ factor · l · sigmoid(output_gate)`
//! threads  16 have four elements each of every eighth split; the eighths are added up in order

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;

use super::super::super::matmul::row_ptr;
use super::super::{Place, begin, extent, warp_max, warp_sum};
use super::decode::{Decode, ROWS, SPLIT, THREADS};
use super::words::four;
use super::{LOWEST, RowOf};

/// Elements of a block.
const ELEMS: u64 = 64;
/// Threads that share a split.
const QUADS: u64 = ELEMS / 4;
/// Splits that are read at once.
const LANES: u64 = THREADS / QUADS;
/// Splits that a thread asks for together.
const AHEAD: u64 = 4;
/// Warps of a block.
const WARPS: u64 = THREADS / 32;

/// What blocks hand to the tail: for each eight rows of `elems` elements, eight maxima and eight sums.
#[derive(Clone, Copy)]
pub struct Partials {
    base: Val,
    elems: u64,
}

impl Partials {
    /// The memory for them.
    pub fn here(k: &mut KernelBuilder, elems: u64) -> Self {
        Self { base: k.partials(DType::F32, Self::count(elems)), elems }
    }

    const fn count(elems: u64) -> u64 {
        ROWS * elems + 2 * ROWS
    }

    /// Those of a task.
    pub fn of(&self, k: &mut KernelBuilder, task: Val) -> Val {
        row_ptr(k, self.base, task, Self::count(self.elems))
    }

    /// Where the elements of a row begin.
    pub fn row(&self, k: &mut KernelBuilder, partial: Val, row: Val) -> Val {
        row_ptr(k, partial, row, self.elems)
    }

    /// Where the maximum and the sum of a row are.
    pub fn found(&self, k: &mut KernelBuilder, row: Val) -> [Val; 2] {
        let at = k.add_const(row, ROWS * self.elems);
        [at, k.add_const(at, ROWS)]
    }
}

/// `exp(x − max)`.
pub fn factor(k: &mut KernelBuilder, x: Val, max: Val) -> Val {
    let change = k.fsub(x, max);
    k.exp(change)
}

/// `Σ factor · x`, in order.
pub fn weighted(k: &mut KernelBuilder, factors: &[Val], x: &[Val]) -> Val {
    let first = k.fmul(factors[0], x[0]);
    factors.iter().zip(x).skip(1).fold(first, |sum, (&f, &x)| k.fma(f, x, sum))
}

/// Tasks of the tail.
pub fn grid(decode: &Decode, pairs: &Extent) -> Extent {
    pairs.clone() * (ROWS * parts(decode)).into()
}

/// Blocks of a row.
fn parts(decode: &Decode) -> u64 {
    decode.attention.elems().div_ceil(ELEMS)
}

/// Puts the splits of some elements of a row together.
pub fn tail(k: &mut KernelBuilder, decode: &Decode, pairs: &Extent) {
    let place = Place::here(k);
    let smem = Smem {
        factors: k.shared(DType::F32, THREADS),
        warps: k.shared(DType::F32, 2 * WARPS),
        o: k.shared(DType::F32, LANES * ELEMS),
    };
    let partials = Partials::here(k, decode.attention.elems());
    let (task, pairs) = (k.task(), extent(k, pairs));
    begin(k);
    let (task, part) = (k.div_const(task, parts(decode)), k.rem_const(task, parts(decode)));
    let (number, row) = (k.div_const(task, ROWS), k.rem_const(task, ROWS));
    let (exists, pair) = decode.pair(k, place.lane, number);
    let row_of = k.add(pair.first_row, row);
    let of = RowOf::new(k, &decode.attention, &pair.tokens, pair.kv_head, row_of);
    let exists = k.and(exists, of.exists);
    k.if_then(exists, |k| {
        let t = k.add(pair.tokens.first, of.token);
        k.if_else(
            pair.tokens.live,
            |k| {
                let position = k.add(pair.tokens.position, of.token);
                let count = k.div_const(position, SPLIT);
                let count = k.add_const(count, 1);
                let merge = Merge { decode, place, smem, partials, first: (number, pairs), row, count };
                merge.run(k, part, (t, of.head));
                Vec::new()
            },
            |k| {
                decode.attention.zero_out(k, &place, THREADS, (t, of.head));
                Vec::new()
            },
        );
    });
}

/// Memory that the threads of a block share.
#[derive(Clone, Copy)]
struct Smem {
    /// Factors of some splits.
    factors: Val,
    /// A maximum and a sum of each warp.
    warps: Val,
    /// `[eighth][elements]`.
    o: Val,
}

/// The tail at work on a row.
struct Merge<'a> {
    decode: &'a Decode,
    place: Place,
    smem: Smem,
    partials: Partials,
    /// The task of the first split, and how far it is to the next.
    first: (Val, Val),
    row: Val,
    /// How many splits.
    count: Val,
}

impl Merge<'_> {
    fn run(&self, k: &mut KernelBuilder, part: Val, (t, head): (Val, Val)) {
        let (lane, quad) = (k.div_const(self.place.thread, QUADS), k.rem_const(self.place.thread, QUADS));
        let (first, own) = (k.mul_const(part, ELEMS), k.mul_const(quad, 4));
        let at = k.add(first, own);
        let elems = self.decode.attention.elems();
        let last = k.index(elems - 4);
        // a thread without elements does what the last does, and stores nothing
        let column = k.min_i64(at, last);
        let max = self.max(k);
        let (zero, nothing) = (k.const_i64(0), k.const_f32(0.0));
        let sums = k.for_carry((zero, self.count, THREADS), &[nothing; 5], |k, from, sums| {
            let sum = self.factors(k, from, max, sums[4]);
            k.barrier();
            let o = self.add_splits(k, from, (lane, column), &sums[..4]);
            k.barrier();
            [o, vec![sum]].concat()
        });
        let sum = self.over_warps(k, sums[4], WARPS, warp_sum, |k, a, b| k.fadd(a, b));
        let o = k.quad([0, 1, 2, 3].map(|i: usize| sums[i]));
        let mine = k.mul_const(self.place.thread, 4);
        k.store(self.smem.o, mine, o);
        k.barrier();
        let quads = k.index(QUADS);
        let (is_first, end) = (k.cmp(Pred::Lt, self.place.thread, quads), k.index(elems));
        let exists = k.cmp(Pred::Lt, at, end);
        let stores = k.and(is_first, exists);
        k.if_then(stores, |k| {
            let eighths = (0..LANES).map(|lane| {
                let at = k.add_const(own, lane * ELEMS);
                let o = k.load(DType::F32, 4, self.smem.o, at);
                four(k, o)
            });
            let eighths: Vec<[Val; 4]> = eighths.collect();
            let add = |a: [Val; 4], b: &[Val; 4]| [0, 1, 2, 3].map(|i: usize| k.fadd(a[i], b[i]));
            let o = eighths[1..].iter().fold(eighths[0], add);
            self.decode.attention.finish(k, o, sum, (t, head, at));
        });
    }

    /// The partials of split `number`, or of the last.
    fn split(&self, k: &mut KernelBuilder, number: Val) -> Val {
        let one = k.const_i64(1);
        let last = k.sub(self.count, one);
        let number = k.min_i64(number, last);
        let (first, stride) = self.first;
        let task = k.mul(number, stride);
        let task = k.add(first, task);
        self.partials.of(k, task)
    }

    /// The largest maximum of all splits.
    fn max(&self, k: &mut KernelBuilder) -> Val {
        let lowest = k.const_f32(LOWEST);
        let own = k.for_carry((self.place.thread, self.count, THREADS), &[lowest], |k, number, max| {
            let split = self.split(k, number);
            let [at, _] = self.partials.found(k, self.row);
            let m = k.load_f32(split, at);
            vec![k.fmax(max[0], m)]
        })[0];
        self.over_warps(k, own, 0, warp_max, |k, a, b| k.fmax(a, b))
    }

    /// Joins a number of all threads, by warps, then in the order of the warps; `at` says where in shared memory.
    fn over_warps(
        &self,
        k: &mut KernelBuilder,
        x: Val,
        at: u64,
        of_warp: impl Fn(&mut KernelBuilder, Val) -> Val,
        join: impl Fn(&mut KernelBuilder, Val, Val) -> Val,
    ) -> Val {
        let x = of_warp(k, x);
        let zero = k.const_i64(0);
        let is_first = k.cmp(Pred::Eq, self.place.lane, zero);
        let own = k.add_const(self.place.warp, at);
        k.if_then(is_first, |k| k.store(self.smem.warps, own, x));
        k.barrier();
        let all = (0..WARPS).map(|warp| {
            let at = k.index(at + warp);
            k.load_f32(self.smem.warps, at)
        });
        let all: Vec<Val> = all.collect();
        all[1..].iter().fold(all[0], |a, &b| join(k, a, b))
    }

    /// The factors of the splits from `from` on, a thread one; gives the sum with theirs.
    fn factors(&self, k: &mut KernelBuilder, from: Val, max: Val, sum: Val) -> Val {
        let number = k.add(from, self.place.thread);
        let exists = k.cmp(Pred::Lt, number, self.count);
        let split = self.split(k, number);
        let [m, l] = self.partials.found(k, self.row).map(|at| k.load_f32(split, at));
        let nothing = k.const_f32(0.0);
        let factor = factor(k, m, max);
        let factor = k.select(exists, factor, nothing);
        k.store(self.smem.factors, self.place.thread, factor);
        k.fma(factor, l, sum)
    }

    /// Adds this thread's elements of its eighth of the splits from `from` on.
    fn add_splits(&self, k: &mut KernelBuilder, from: Val, (lane, column): (Val, Val), o: &[Val]) -> Vec<Val> {
        let left = k.sub(self.count, from);
        let batch = k.index(THREADS);
        let end = k.min_i64(left, batch);
        k.for_carry((lane, end, LANES * AHEAD), o, |k, first, o| {
            let numbers: Vec<Val> = (0..AHEAD).map(|i| k.add_const(first, i * LANES)).collect();
            let parts: Vec<Val> = numbers
                .iter()
                .map(|&number| {
                    let number = k.add(from, number);
                    let split = self.split(k, number);
                    let row = self.partials.row(k, split, self.row);
                    k.load(DType::F32, 4, row, column)
                })
                .collect();
            let mut o = o.to_vec();
            for (number, part) in numbers.into_iter().zip(parts) {
                let factor = k.load_f32(self.smem.factors, number);
                let part = four(k, part);
                o = o.iter().zip(part).map(|(&o, x)| k.fma(factor, x, o)).collect();
            }
            o
        })
    }
}
