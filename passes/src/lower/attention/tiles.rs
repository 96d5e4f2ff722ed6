//! `gated_attention` of long runs in tiles, by a CPU's matrix unit or its vectors: see [`unit`].
//!
//! task    a block of tokens of one run and a kv head, with the query heads that share it: up to 256 queries
//! block   128 positions: keys as columns, values as rows of a B, rounded to bf16 once a task
//!   scores  32 queries at once by 128 positions, `m ← max`, `p = exp(s − m)` rounded to bf16, `l ← l·c + Σp` before that
//!   sums    `o ← o·c + p·V`, in f32
//! epilogue  out = o / l · sigmoid(output_gate)
//! traffic  KV once a task, so once for all tokens of a block; bound by products and by exponentials
//!
//! Blocks are absolute positions, taken in order, and what a token may not see is a zero among its `p`: its bits depend on neither the
//! block of tokens that it stands in nor its neighbours.

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::shape::LANES;
use nextc_ir::target::Unit;

use super::super::bulk::tiles::{RowTiles, SUMS, TOGETHER, lane_numbers};
use super::super::bulk::{round_up, unit};
use super::super::matmul::row_ptr;
use super::super::strips::TILE_BYTES;
use super::Attention;

/// Positions whose keys and values are made into tiles together.
const POSITIONS: u64 = 128;
/// Queries of a task, unless a token alone has more.
const QUERIES: u64 = 256;

/// Scratch of a task.
pub(super) struct Tiles {
    bound: Attention,
    unit: Unit,
    q: RowTiles,
    /// 16 keys as rows, before they are turned.
    rows: RowTiles,
    /// Keys, as a B.
    keys: RowTiles,
    /// Values turned, as a B: a row is a column of theirs.
    values: RowTiles,
    /// Probabilities of [`TOGETHER`] queries.
    p: RowTiles,
    /// Scores of them, or sums: matrices of 32 by 32.
    c: Val,
    /// What each of them keeps of what was summed before.
    keep: Val,
    /// `[queries][elems]`: weighted sums of values.
    o: Val,
    /// `[queries]`: running maximum.
    max: Val,
    /// `[queries]`: running sum.
    sum: Val,
    /// The numbers 0 to 15.
    lanes: Val,
}

/// The tokens of a task.
#[derive(Clone, Copy)]
pub(super) struct Run {
    /// The sequence.
    pub b: Val,
    pub kv_head: Val,
    /// First token, and the one after the last.
    pub first: Val,
    pub end: Val,
}

impl Tiles {
    /// Tokens of a task.
    pub fn tokens(bound: &Attention) -> u64 {
        (QUERIES / bound.shared).max(1)
    }

    /// Call it at the top level of the body.
    pub fn alloc(k: &mut KernelBuilder, bound: Attention, unit: Unit) -> Self {
        let elems = bound.elems();
        let queries = (Self::tokens(&bound) * bound.shared).next_multiple_of(TOGETHER);
        let lanes = lane_numbers(k);
        Self {
            bound,
            unit,
            q: RowTiles::alloc(k, queries, elems),
            rows: RowTiles::alloc(k, LANES, elems),
            keys: RowTiles::alloc(k, POSITIONS, elems),
            values: RowTiles::alloc(k, elems, POSITIONS),
            p: RowTiles::alloc(k, TOGETHER, POSITIONS),
            c: k.alloc(DType::F32, POSITIONS / TOGETHER * SUMS),
            keep: k.alloc(DType::F32, TOGETHER),
            o: k.alloc(DType::F32, queries * elems),
            max: k.alloc(DType::F32, queries),
            sum: k.alloc(DType::F32, queries),
            lanes,
        }
    }

    /// Attention of the tokens of `run`, whose sequence has a slot.
    pub fn run(&self, k: &mut KernelBuilder, run: Run) {
        let tokens = k.sub(run.end, run.first);
        let queries = k.mul_const(tokens, self.bound.shared);
        let padded = round_up(k, queries, TOGETHER);
        let begin = self.bound.pages.position(k, run.first);
        let length = k.add(begin, tokens);
        let zero = k.const_i64(0);
        k.for_each((zero, queries, 1), |k, query| {
            let row = self.head(k, run, self.bound.q, query);
            self.q.pack(k, query, |k, c| k.load_f32x16(row, c));
        });
        // rows that are no query are multiplied with the others, and left out at the end
        let (lowest, none) = (k.const_f32(f32::NEG_INFINITY), k.const_f32(0.0));
        k.for_each((zero, padded, 1), |k, query| {
            k.store(self.max, query, lowest);
            k.store(self.sum, query, none);
            let o = row_ptr(k, self.o, query, self.bound.elems());
            let nothing = k.splat_f32(16, 0.0);
            k.for_range(self.bound.elems(), LANES, |k, c| k.store(o, c, nothing));
        });
        self.q.fill(k, (queries, padded));
        k.for_each((zero, length, POSITIONS), |k, first| {
            self.pack_keys(k, run, (first, length));
            self.pack_values(k, run, (first, length));
            k.for_each((zero, padded, TOGETHER), |k, query| {
                self.score(k, query);
                let seen = k.sub(begin, first);
                self.soften(k, query, seen);
                self.weigh(k, query);
            });
        });
        k.for_each((zero, queries, 1), |k, query| self.finish(k, run, query));
    }

    /// Pointer to the head of `query` in a tensor of query heads.
    fn head(&self, k: &mut KernelBuilder, run: Run, port: super::Port, query: Val) -> Val {
        let (heads, elems, shared) = (self.bound.heads, self.bound.elems(), self.bound.shared);
        let (token, head) = (k.div_const(query, shared), k.rem_const(query, shared));
        let t = k.add(run.first, token);
        let base = k.param(port);
        let row = row_ptr(k, base, t, heads * elems);
        let row = row_ptr(k, row, run.kv_head, shared * elems);
        row_ptr(k, row, head, elems)
    }

    /// The keys and the values of the page that holds a position, and its place in it; of positions from `length` on those of the last one.
    fn rows_at(&self, k: &mut KernelBuilder, run: Run, (position, length): (Val, Val)) -> ((Val, Val), Val) {
        let pages = self.bound.pages;
        let one = k.const_i64(1);
        let last = k.sub(length, one);
        let position = k.min_i64(position, last);
        let (page, within) = (k.div_const(position, pages.page_tokens), k.rem_const(position, pages.page_tokens));
        (pages.block(k, run.b, page, run.kv_head), within)
    }

    /// The keys of the block of positions from `first` on, a strip of 16 at once.
    fn pack_keys(&self, k: &mut KernelBuilder, run: Run, (first, length): (Val, Val)) {
        k.for_range(POSITIONS, LANES, |k, strip| {
            k.for_range(LANES, 1, |k, i| {
                let position = k.add(first, strip);
                let position = k.add(position, i);
                let ((keys, _), number) = self.rows_at(k, run, (position, length));
                let row = self.bound.pages.load_row(k, keys, number);
                self.rows.put(k, i, &row);
            });
            let to = self.keys.line(k, strip);
            k.for_range(self.keys.depth() * TILE_BYTES, TILE_BYTES, |k, tile| {
                let (to, from) = (k.offset(to, tile), k.offset(self.rows.at, tile));
                k.tile_turn(to, from);
            });
        });
    }

    /// The values of the block of positions from `first` on, two of them in a line; zeros from `length` on, as what stands there may be
    /// no number.
    fn pack_values(&self, k: &mut KernelBuilder, run: Run, (first, length): (Val, Val)) {
        k.for_range(POSITIONS, 2, |k, i| {
            let pair = [0, 1].map(|n| {
                let position = k.add_const(i, n);
                let position = k.add(first, position);
                let ((_, values), number) = self.rows_at(k, run, (position, length));
                let exists = k.cmp(Pred::Lt, position, length);
                let nothing = k.splat_f32(16, 0.0);
                let row = self.bound.pages.load_row(k, values, number);
                row.iter().map(|&x| k.select(exists, x, nothing)).collect::<Vec<_>>()
            });
            let zero = k.const_i64(0);
            self.values.put_pair(k, (i, zero), [&pair[0], &pair[1]]);
        });
    }

    /// Products of queries and keys: matrices of 32 queries by 32 positions, one after the other.
    fn score(&self, k: &mut KernelBuilder, query: Val) {
        let queries = self.q.two_strips(k, query);
        k.for_range(POSITIONS, TOGETHER, |k, position| {
            let c = row_ptr(k, self.c, position, SUMS / TOGETHER);
            let keys = self.keys.two_strips(k, position);
            unit::dots(k, self.unit, c, &[(queries, keys.to_vec(), self.keys.depth())]);
        });
    }

    /// Scores to probabilities relative to the new maximum. The first token sees `seen` positions of the block beside its own, each
    /// further one more.
    fn soften(&self, k: &mut KernelBuilder, query: Val, seen: Val) {
        let (scale, lowest) = (k.splat_f32(16, self.bound.scale), k.splat_f32(16, f32::NEG_INFINITY));
        let zero = k.const_i64(0);
        let numbers = k.load(DType::I32, LANES as u32, self.lanes, zero);
        k.for_range(TOGETHER, 1, |k, i| {
            let query = k.add(query, i);
            let token = k.div_const(query, self.bound.shared);
            let last = k.add(seen, token);
            let last = k.narrow(last);
            let last = k.splat(last, LANES as u32);
            let scores: Vec<Val> = (0..POSITIONS / LANES)
                .map(|v| {
                    let row = row_ptr(k, self.c, i, TOGETHER);
                    let at = k.index(v / 2 * SUMS + v % 2 * LANES);
                    let score = k.load_f32x16(row, at);
                    let score = k.fmul(score, scale);
                    let by = k.i32_like(numbers, (v * LANES) as i32);
                    let position = k.add(numbers, by);
                    let is_seen = k.cmp(Pred::Le, position, last);
                    k.select(is_seen, score, lowest)
                })
                .collect();
            let old = k.load_f32(self.max, query);
            let start = k.splat(old, 16);
            let largest = scores.iter().fold(start, |largest, &s| k.fmax(largest, s));
            let new = k.reduce_max(largest);
            k.store(self.max, query, new);
            let shift = k.splat(new, 16);
            let p: Vec<Val> = scores
                .iter()
                .map(|&s| {
                    let s = k.fsub(s, shift);
                    k.exp(s)
                })
                .collect();
            let nothing = k.splat_f32(16, 0.0);
            let added = p.iter().fold(nothing, |sum, &p| k.fadd(sum, p));
            let added = k.reduce_add(added);
            let change = k.fsub(old, new);
            let keep = k.exp(change);
            k.store(self.keep, i, keep);
            let sum = k.load_f32(self.sum, query);
            let sum = k.fma(sum, keep, added);
            k.store(self.sum, query, sum);
            self.p.put(k, i, &p);
        });
    }

    /// `o ← o·keep + p·V`, 32 columns at once.
    fn weigh(&self, k: &mut KernelBuilder, query: Val) {
        let p = [self.p.at, self.p.next(k, self.p.at)];
        let columns = |k: &mut KernelBuilder, column: Val, count: u64| {
            let strips = self.values.two_strips(k, column)[..count as usize].to_vec();
            unit::dots(k, self.unit, self.c, &[(p, strips, self.p.depth())]);
            k.for_range(TOGETHER, 1, |k, i| {
                let row = k.add(query, i);
                let (o, c) = (row_ptr(k, self.o, row, self.bound.elems()), row_ptr(k, self.c, i, count * LANES));
                let keep = k.load_f32(self.keep, i);
                let keep = k.splat(keep, 16);
                for part in 0..count {
                    let (from, to) = (k.index(part * LANES), k.add_const(column, part * LANES));
                    let (added, before) = (k.load_f32x16(c, from), k.load_f32x16(o, to));
                    let sum = k.fma(before, keep, added);
                    k.store(o, to, sum);
                }
            });
        };
        let elems = self.bound.elems();
        let paired = elems / (2 * LANES) * 2 * LANES;
        k.for_range(paired, 2 * LANES, |k, column| columns(k, column, 2));
        if paired < elems {
            let last = k.index(paired);
            columns(k, last, 1);
        }
    }

    /// `out = o / sum · sigmoid(gate)`.
    fn finish(&self, k: &mut KernelBuilder, run: Run, query: Val) {
        let [gate, out] = [self.bound.gate, self.bound.out].map(|port| self.head(k, run, port, query));
        let o = row_ptr(k, self.o, query, self.bound.elems());
        let sum = k.load_f32(self.sum, query);
        self.bound.emit(k, (o, sum, gate, out));
    }
}
