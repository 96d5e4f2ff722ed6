//! The query heads that share a kv head, one token's, at work: online softmax over pages.

use std::ops::Range;

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::layout::LINE_BYTES;
use nextc_ir::shape::{LANES, pad};

use super::super::matmul::row_ptr;
use super::Attention;

/// Query heads that are worked on together at most.
const MOST_HEADS: u64 = 8;

/// Query heads of which each has so many sums in registers at most, in batches.
fn batches(heads: u64, most_sums: u64) -> impl Iterator<Item = Range<u64>> {
    let at_once = most_sums.clamp(1, MOST_HEADS);
    (0..heads).step_by(at_once as usize).map(move |first| first..heads.min(first + at_once))
}

/// Asks for some lines of the rows of a page.
fn ask(k: &mut KernelBuilder, rows: Val, first: Val, count: u64) {
    let (at, bytes) = (k.mul_const(first, LINE_BYTES), k.index(count * LINE_BYTES));
    k.prefetch(rows, at, bytes);
}

/// What the positions so far gave to query heads that share a kv head.
#[derive(Clone, Copy)]
pub struct Sums {
    /// `[heads][elems]`: weighted sums of values.
    pub o: Val,
    /// `[heads]`: running maximum.
    pub max: Val,
    /// `[heads]`: running sum.
    pub sum: Val,
}

impl Sums {
    /// Elements of them in memory.
    pub const fn elems(bound: &Attention) -> u64 {
        pad(bound.shared * (bound.elems() + 2))
    }

    /// Those that begin at `base`.
    pub fn at(k: &mut KernelBuilder, bound: &Attention, base: Val) -> Self {
        let max = bound.shared * bound.elems();
        let [max, sum] = [max, max + bound.shared].map(|elems| {
            let bytes = k.index(elems * DType::F32.bytes());
            k.offset(base, bytes)
        });
        Self { o: base, max, sum }
    }
}

/// The query heads of one token that share a kv head, and their running softmax.
pub struct Group<'a> {
    pub bound: &'a Attention,
    /// `[heads][elems]`: the queries.
    pub q: Val,
    /// `[heads][page_tokens]`: scores, then probabilities of one page; see [`Self::scores`].
    pub scores: Val,
    pub sums: Sums,
    /// Vectors of 16 sums that are kept in registers.
    pub most_sums: u64,
}

/// What is done with a line: its number, the vectors of it that hold elements, and the sums before give the sums after.
type LineBody<'a> = dyn FnMut(&mut KernelBuilder, Val, u64, &[Val]) -> Vec<Val> + 'a;

impl Group<'_> {
    /// Scratch for scores. Call it at the top level of the body.
    pub fn scores(k: &mut KernelBuilder, bound: &Attention) -> Val {
        k.alloc(DType::F32, bound.shared * bound.pages.page_tokens)
    }

    /// Goes over the positions of sequence `b` from `first`, where a page begins, to `end`; there are some until `length`.
    pub fn attend(&self, k: &mut KernelBuilder, (b, kv_head): (Val, Val), (first, end): (Val, Val), length: Val) {
        let pages = self.bound.pages;
        self.begin(k);
        let (up, one) = (k.add_const(end, pages.page_tokens - 1), k.const_i64(1));
        let (first, count) = (k.div_const(first, pages.page_tokens), k.div_const(up, pages.page_tokens));
        // the next split is asked for too, as it is often this thread's
        let last = k.sub(length, one);
        let last = k.div_const(last, pages.page_tokens);
        k.for_each((first, count, 1), |k, page| {
            let block = pages.block(k, b, page, kv_head);
            let next = k.add_const(page, 1);
            let next = k.min_i64(next, last);
            let next = pages.block(k, b, next, kv_head);
            let begin = k.mul_const(page, pages.page_tokens);
            let (left, full) = (k.sub(end, begin), k.index(pages.page_tokens));
            let tokens = k.min_i64(left, full);
            self.page(k, block, next, tokens);
        });
    }

    fn begin(&self, k: &mut KernelBuilder) {
        let (zeros, zero, lowest) = (k.splat_f32(16, 0.0), k.const_f32(0.0), k.const_f32(f32::NEG_INFINITY));
        k.for_range(self.bound.shared * self.bound.elems(), LANES, |k, c| k.store(self.sums.o, c, zeros));
        k.for_range(self.bound.shared, 1, |k, h| {
            k.store(self.sums.max, h, lowest);
            k.store(self.sums.sum, h, zero);
        });
    }

    /// Adds the first `tokens` positions of one page. The next one is asked for meanwhile, evenly: a core has few requests on their way.
    fn page(&self, k: &mut KernelBuilder, (keys, values): (Val, Val), next: (Val, Val), tokens: Val) {
        let lowest = k.splat_f32(16, f32::NEG_INFINITY);
        let heads = self.bound.shared;
        k.for_range(heads * self.bound.pages.page_tokens, LANES, |k, i| k.store(self.scores, i, lowest));
        for batch in batches(heads, self.most_sums) {
            let next = (batch.start == 0).then_some(next.1);
            self.score(k, (keys, next), tokens, batch);
        }
        k.for_range(heads, 1, |k, h| self.soften(k, h));
        // as many sums in registers as if a line had one part
        for batch in batches(heads, self.most_sums / self.bound.pages.row.parts()) {
            let next = (batch.start == 0).then_some(next.0);
            self.for_lines(k, &mut [], &mut |k, line, parts, _| {
                self.weigh_line(k, (values, next), tokens, (line, parts), batch.clone());
                Vec::new()
            });
        }
    }

    /// `scores[h][j] = scale · q[h] · keys[j]`, of some keys at once. Meanwhile rows of `next` are asked for.
    fn score(&self, k: &mut KernelBuilder, (keys, next): (Val, Option<Val>), tokens: Val, heads: Range<u64>) {
        let pages = &self.bound.pages;
        let (zero, one) = (k.const_i64(0), k.const_i64(1));
        let (zeros, lowest) = (k.splat_f32(16, 0.0), k.const_f32(f32::NEG_INFINITY));
        let scale = k.const_f32(self.bound.scale);
        let count = heads.end - heads.start;
        let at_once =
            [4, 2, 1].into_iter().find(|n| n * count <= self.most_sums && pages.page_tokens.is_multiple_of(*n));
        let at_once = at_once.unwrap_or(1);
        let last = k.sub(tokens, one);
        k.for_each((zero, tokens, at_once), |k, j| {
            let numbers: Vec<Val> = (0..at_once).map(|n| k.add_const(j, n)).collect();
            // of keys that there are not the last one, whose score is not taken
            let rows = numbers.iter().map(|&number| {
                let number = k.min_i64(number, last);
                (number, pages.row(k, keys, number))
            });
            let rows: Vec<(Val, Val)> = rows.collect();
            let mut sums = vec![zeros; (count * at_once) as usize];
            let mut add = |k: &mut KernelBuilder, line: Val, parts: u64, sums: &[Val]| {
                if let Some(next) = next {
                    let (rows, within) = (k.mul_const(j, pages.row.lines()), k.mul_const(line, at_once));
                    let first = k.add(rows, within);
                    ask(k, next, first, at_once);
                }
                let c = k.mul_const(line, pages.row.line_elems());
                let lines: Vec<Vec<Val>> = rows.iter().map(|&(_, row)| pages.load_line(k, row, line, parts)).collect();
                let mut sums = sums.to_vec();
                for part in 0..parts {
                    for (i, head) in heads.clone().enumerate() {
                        let at = k.add_const(c, head * self.bound.elems() + part * LANES);
                        let q = k.load_f32x16(self.q, at);
                        for (line, sums) in lines.iter().zip(sums.chunks_mut(count as usize)) {
                            sums[i] = k.fma(q, line[part as usize], sums[i]);
                        }
                    }
                }
                sums
            };
            self.for_lines(k, &mut sums, &mut add);
            for ((&j, &(number, _)), sums) in numbers.iter().zip(&rows).zip(sums.chunks(count as usize)) {
                let scale = match pages.scale(k, keys, number) {
                    Some(of_key) => k.fmul(of_key, scale),
                    None => scale,
                };
                let exists = k.cmp(Pred::Lt, j, tokens);
                for (head, &lanes) in heads.clone().zip(sums) {
                    let product = k.reduce_add(lanes);
                    let score = k.fmul(product, scale);
                    let score = k.select(exists, score, lowest);
                    let at = k.add_const(j, head * pages.page_tokens);
                    k.store(self.scores, at, score);
                }
            }
        });
    }

    /// Scores of one head to probabilities relative to the new maximum; what was summed before is scaled to it.
    fn soften(&self, k: &mut KernelBuilder, h: Val) {
        let scores = row_ptr(k, self.scores, h, self.bound.pages.page_tokens);
        let (lo, hi) = (k.const_i64(0), k.index(self.bound.pages.page_tokens));
        let old = k.load_f32(self.sums.max, h);
        let start = k.splat(old, 16);
        let largest = k.for_carry((lo, hi, LANES), &[start], |k, i, acc| {
            let s = k.load_f32x16(scores, i);
            vec![k.fmax(acc[0], s)]
        });
        let new = k.reduce_max(largest[0]);
        k.store(self.sums.max, h, new);
        let shift = k.splat(new, 16);
        let zeros = k.splat_f32(16, 0.0);
        let added = k.for_carry((lo, hi, LANES), &[zeros], |k, i, acc| {
            let s = k.load_f32x16(scores, i);
            let s = k.fsub(s, shift);
            let p = k.exp(s);
            k.store(scores, i, p);
            vec![k.fadd(acc[0], p)]
        });
        let added = k.reduce_add(added[0]);
        let change = k.fsub(old, new);
        let keep = k.exp(change);
        let sum = k.load_f32(self.sums.sum, h);
        let sum = k.fma(sum, keep, added);
        k.store(self.sums.sum, h, sum);
        let o = row_ptr(k, self.sums.o, h, self.bound.elems());
        let keep = k.splat(keep, 16);
        k.for_range(self.bound.elems(), LANES, |k, c| {
            let x = k.load_f32x16(o, c);
            let x = k.fmul(x, keep);
            k.store(o, c, x);
        });
    }

    /// `o[h] += Σ_j p[h][j] · values[j]`, one line of the values. Meanwhile a part of `next` is asked for.
    fn weigh_line(
        &self,
        k: &mut KernelBuilder,
        (values, next): (Val, Option<Val>),
        tokens: Val,
        (line, parts): (Val, u64),
        heads: Range<u64>,
    ) {
        let (zero, c) = (k.const_i64(0), k.mul_const(line, self.bound.pages.row.line_elems()));
        let places: Vec<Val> = (0..parts)
            .flat_map(|part| heads.clone().map(move |head| head * self.bound.elems() + part * LANES))
            .map(|at| k.add_const(c, at))
            .collect();
        let init: Vec<Val> = places.iter().map(|&at| k.load_f32x16(self.sums.o, at)).collect();
        let sums = k.for_carry((zero, tokens, 1), &init, |k, j, acc| {
            if let Some(next) = next {
                let before = k.mul_const(line, self.bound.pages.page_tokens);
                let first = k.add(before, j);
                ask(k, next, first, 1);
            }
            let row = self.bound.pages.row(k, values, j);
            let vectors = self.bound.pages.load_line(k, row, line, parts);
            let scale = self.bound.pages.scale(k, values, j);
            let weights = heads.clone().map(|head| {
                let at = k.add_const(j, head * self.bound.pages.page_tokens);
                let p = k.load_f32(self.scores, at);
                let p = scale.map_or(p, |scale| k.fmul(p, scale));
                k.splat(p, 16)
            });
            let weights: Vec<Val> = weights.collect();
            let pairs = vectors.iter().flat_map(|&v| weights.iter().map(move |&p| (p, v)));
            pairs.zip(acc).map(|((p, v), &sum)| k.fma(p, v, sum)).collect()
        });
        for (&at, &x) in places.iter().zip(&sums) {
            k.store(self.sums.o, at, x);
        }
    }

    /// Carries `sums` over the lines of a row.
    fn for_lines(&self, k: &mut KernelBuilder, sums: &mut [Val], body: &mut LineBody<'_>) {
        let row = self.bound.pages.row;
        let (lines, last) = (row.lines(), self.bound.pages.parts_of(row.lines() - 1));
        let full = if last == row.parts() { lines } else { lines - 1 };
        let (zero, end) = (k.const_i64(0), k.index(full));
        if full > 0 {
            let next = k.for_carry((zero, end, 1), sums, |k, line, sums| body(k, line, row.parts(), sums));
            sums.copy_from_slice(&next);
        }
        if full < lines {
            let next = body(k, end, last, sums);
            sums.copy_from_slice(&next);
        }
    }

    /// `out = o / sum · sigmoid(gate)`.
    pub fn finish(&self, k: &mut KernelBuilder, gate: Val, out: Val) {
        k.for_range(self.bound.shared, 1, |k, h| {
            let sum = k.load_f32(self.sums.sum, h);
            let [o, gate, out] = [self.sums.o, gate, out].map(|p| row_ptr(k, p, h, self.bound.elems()));
            self.bound.emit(k, (o, sum, gate, out));
        });
    }
}
