//! What the splits of decoded runs found, put together: the tail of [`decode`](super::decode).
//!
//! block    32 elements of one row; `factor = exp(m − max)` of each split, `out = Σ factor · o / Σ factor · l · sigmoid(output_gate)`
//! threads  eight have four elements each of every 16th split; these sums are added up in order

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;

use super::super::super::matmul::row_ptr;
use super::super::{Place, begin, warp_max, warp_sum};
use super::RowOf;
use super::decode::{Decode, ROWS, THREADS};
use super::splits::splits_of;
use super::words::four;

/// Elements of a block.
const ELEMS: u64 = 32;
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

    /// Bytes of a task.
    pub const fn bytes(&self) -> u64 {
        Self::count(self.elems) * 4
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
    let (task, pairs) = (k.task(), k.extent(pairs));
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
                let count = splits_of(k, position);
                let (first, stride) = (partials.of(k, number), k.mul_const(pairs, partials.bytes()));
                let one = k.const_i64(1);
                let last = k.sub(count, one);
                let merge = Merge { decode, place, smem, partials, first, stride, row, count, last };
                merge.run(k, part, (t, of.head));
                Vec::new()
            },
            |k| {
                let (first, all) = (k.mul_const(part, ELEMS), k.index(decode.attention.elems()));
                let end = k.add_const(first, ELEMS);
                let (from, end) = (k.add(first, place.thread), k.min_i64(end, all));
                decode.attention.zero_out(k, (from, end, THREADS), (t, of.head));
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
    /// `[lane][elements]`.
    o: Val,
}

/// The tail at work on a row.
struct Merge<'a> {
    decode: &'a Decode,
    place: Place,
    smem: Smem,
    partials: Partials,
    /// The first split, and bytes from one to the next.
    first: Val,
    stride: Val,
    row: Val,
    /// How many splits, and the number of the last.
    count: Val,
    last: Val,
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
        let (zero, nothing) = (k.const_i64(0), k.const_f32(0.0));
        // all that the first splits have is asked for at once
        let found = self.found(k, self.place.thread);
        let ahead = self.load(k, zero, lane, column);
        let max = self.max(k, found[0]);
        let sum = self.factors(k, self.place.thread, found, max, nothing);
        k.barrier();
        let o = self.add(k, lane, &ahead, &[nothing; 4]);
        let further = k.add_const(lane, LANES * AHEAD);
        let o = self.add_splits(k, zero, (further, column), &o);
        let batch = k.index(THREADS);
        let begin = [o, vec![sum]].concat();
        let sums = k.for_carry((batch, self.count, THREADS), &begin, |k, from, sums| {
            k.barrier();
            let number = k.add(from, self.place.thread);
            let found = self.found(k, number);
            let sum = self.factors(k, number, found, max, sums[4]);
            k.barrier();
            let o = self.add_splits(k, from, (lane, column), &sums[..4]);
            [o, vec![sum]].concat()
        });
        let o = k.quad([0, 1, 2, 3].map(|i: usize| sums[i]));
        let mine = k.mul_const(self.place.thread, 4);
        k.store(self.smem.o, mine, o);
        let sum = self.over_warps(k, sums[4], WARPS, warp_sum, |k, a, b| k.fadd(a, b));
        let (elems_here, end) = (k.index(ELEMS), k.index(elems));
        let at = k.add(first, self.place.thread);
        let (is_first, exists) = (k.cmp(Pred::Lt, self.place.thread, elems_here), k.cmp(Pred::Lt, at, end));
        let stores = k.and(is_first, exists);
        k.if_then(stores, |k| {
            let lanes = (0..LANES).map(|lane| {
                let at = k.add_const(self.place.thread, lane * ELEMS);
                k.load_f32(self.smem.o, at)
            });
            let lanes: Vec<Val> = lanes.collect();
            let o = lanes[1..].iter().fold(lanes[0], |sum, &o| k.fadd(sum, o));
            self.decode.attention.finish(k, (o, sum), (t, head, at));
        });
    }

    /// The partials of split `number`, or of the last.
    fn split(&self, k: &mut KernelBuilder, number: Val) -> Val {
        let number = k.min_i64(number, self.last);
        let bytes = k.mul(number, self.stride);
        k.offset(self.first, bytes)
    }

    /// Maximum and sum of split `number`, or of the last.
    fn found(&self, k: &mut KernelBuilder, number: Val) -> [Val; 2] {
        let split = self.split(k, number);
        self.partials.found(k, self.row).map(|at| k.load_f32(split, at))
    }

    /// The largest maximum of all splits; `own` is that of this thread's first.
    fn max(&self, k: &mut KernelBuilder, own: Val) -> Val {
        let next = k.add_const(self.place.thread, THREADS);
        let own = k.for_carry((next, self.count, THREADS), &[own], |k, number, max| {
            let [m, _] = self.found(k, number);
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

    /// The factor of this thread's split of a batch; gives the sum with its.
    fn factors(&self, k: &mut KernelBuilder, number: Val, [m, l]: [Val; 2], max: Val, sum: Val) -> Val {
        let exists = k.cmp(Pred::Lt, number, self.count);
        let nothing = k.const_f32(0.0);
        let factor = factor(k, m, max);
        let factor = k.select(exists, factor, nothing);
        k.store(self.smem.factors, self.place.thread, factor);
        k.fma(factor, l, sum)
    }

    /// This thread's elements of split `first` and of some of its after it, of the batch that begins at `from`.
    fn load(&self, k: &mut KernelBuilder, from: Val, first: Val, column: Val) -> Vec<Val> {
        let of = |i| {
            let number = k.add_const(first, i * LANES);
            let number = k.add(from, number);
            let split = self.split(k, number);
            let row = self.partials.row(k, split, self.row);
            k.load(DType::F32, 4, row, column)
        };
        (0..AHEAD).map(of).collect()
    }

    /// Adds what [`Self::load`] gave, times the factors.
    fn add(&self, k: &mut KernelBuilder, first: Val, parts: &[Val], o: &[Val]) -> Vec<Val> {
        (0..).zip(parts).fold(o.to_vec(), |o, (i, &part)| {
            let number = k.add_const(first, i * LANES);
            let factor = k.load_f32(self.smem.factors, number);
            let part = four(k, part);
            o.iter().zip(part).map(|(&o, x)| k.fma(factor, x, o)).collect()
        })
    }

    /// Adds this thread's elements of its splits of a batch from `first` on.
    fn add_splits(&self, k: &mut KernelBuilder, from: Val, (first, column): (Val, Val), o: &[Val]) -> Vec<Val> {
        let left = k.sub(self.count, from);
        let batch = k.index(THREADS);
        let end = k.min_i64(left, batch);
        k.for_carry((first, end, LANES * AHEAD), o, |k, first, o| {
            let parts = self.load(k, from, first, column);
            self.add(k, first, &parts, o)
        })
    }
}
