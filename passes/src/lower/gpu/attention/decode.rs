//! Attention of runs that are decoded: a block scores and weighs one split of positions for eight rows, query heads of a kv head.
//!
//! warp     some chunks of 16 positions: first the keys of all, then their values; what comes next is asked for before this is worked on
//! score    A: eight rows of q, rounded, and what that left over; B: eight keys, a thread the words of one key that the products want; `s = scale · (sum + rest)`
//! soften   `m` the largest, `p = exp(s − m)`, `l = Σp`: a thread has two positions of each product, of one row
//! weigh    A: values, words across two positions; B: p, which lie as the scores came
//! together the warps' (m, l, o) become the block's, in order; the tail puts those of all splits together

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;

use super::super::super::matmul::row_ptr;
use super::super::super::ports::{Lowered, Ports, Site};
use super::super::{Place, begin};
use super::merge::{self, Partials};
use super::runs::{Runs, Tokens};
use super::splits::{MOST_CHUNKS, split_bound, split_range};
use super::warp::Warp;
use super::words::{BLOCK_ELEMS, BLOCK_WORDS, Parts, Quad, four, of_floats};
use super::{Attention, RowOf};

/// Positions of a chunk.
pub const CHUNK: u64 = 16;
/// Warps of a block.
pub const WARPS: u64 = 4;
/// Threads of a block.
pub const THREADS: u64 = WARPS * 32;
/// Rows of a block.
pub const ROWS: u64 = 8;
/// The kernel, with the tail that puts splits together.
pub fn lower(site: &Site<'_>, ports: Ports, attention: Attention) -> Lowered {
    let tokens = (ROWS / attention.shared).max(1);
    let decode = Decode {
        attention,
        runs: Runs { pages: attention.pages, tokens, long: false },
        groups: (tokens * attention.shared).div_ceil(ROWS),
    };
    let pairs = decode.pairs();
    let mut k = ports.builder(site, split_bound(attention.pages.page_tokens) * pairs.clone());
    k.threads(THREADS as u32);
    decode.body(&mut k, &pairs);
    let tail = merge::grid(&decode, &pairs);
    ports.finish(k.finish_with_tail_grid(tail, |k| merge::tail(k, &decode, &pairs)))
}

/// How the work is cut.
pub struct Decode {
    /// What the kernel is connected to.
    pub attention: Attention,
    /// The tokens of a block.
    pub runs: Runs,
    /// Blocks that share the rows of a tile and kv head.
    pub groups: u64,
}

/// What a block is about.
pub struct Pair {
    /// Some tokens.
    pub tokens: Tokens,
    /// The head of KV.
    pub kv_head: Val,
    /// The first of the eight rows.
    pub first_row: Val,
}

impl Decode {
    /// Tiles, kv heads and groups of rows: what one split has blocks for.
    fn pairs(&self) -> Extent {
        self.runs.most() * (self.attention.pages.heads * self.groups).into()
    }

    /// Pair `number`, by a warp, and whether there is one.
    pub fn pair(&self, k: &mut KernelBuilder, lane: Val, number: Val) -> (Val, Pair) {
        let (number, group) = (k.div_const(number, self.groups), k.rem_const(number, self.groups));
        let heads = self.attention.pages.heads;
        let (number, kv_head) = (k.div_const(number, heads), k.rem_const(number, heads));
        let (exists, tokens) = self.runs.find(k, lane, number);
        (exists, Pair { tokens, kv_head, first_row: k.mul_const(group, ROWS) })
    }

    fn body(&self, k: &mut KernelBuilder, pairs: &Extent) {
        let place = Place::here(k);
        let stride = self.attention.blocks() * BLOCK_WORDS + BLOCK_WORDS;
        let smem = Smem {
            q: k.shared(DType::I32, 2 * ROWS * stride),
            stride,
            scores: k.shared(DType::F32, MOST_CHUNKS * THREADS * 4),
            o: k.shared(DType::F32, WARPS * ROWS * self.o_stride()),
            found: k.shared(DType::F32, 2 * WARPS * ROWS),
        };
        let partials = Partials::here(k, self.attention.elems());
        let (task, pairs) = (k.task(), k.extent(pairs));
        begin(k);
        let (split, number) = divided(k, task, pairs);
        let (exists, pair) = self.pair(k, place.lane, number);
        let [first, chunks] = split_range(k, split);
        let end = k.add(pair.tokens.position, pair.tokens.count);
        let some = k.cmp(Pred::Lt, first, end);
        let works = k.and(exists, pair.tokens.live);
        let works = k.and(works, some);
        k.if_then(works, |k| {
            let one = k.const_i64(1);
            let block = Block { decode: self, place, smem, pair: &pair, last: k.sub(end, one) };
            block.work(k, first, chunks);
            k.barrier();
            block.together(k, partials);
        });
    }

    /// Elements from one row's sums to the next in shared memory: four more keep threads in different banks.
    pub const fn o_stride(&self) -> u64 {
        self.attention.blocks() * BLOCK_ELEMS + 4
    }
}

/// Memory that the threads of a block share.
#[derive(Clone, Copy)]
pub struct Smem {
    /// `[part][row][words]`.
    pub q: Val,
    /// Words from one row to the next.
    pub stride: u64,
    /// `[chunk][thread][4]`: each thread's own scores.
    pub scores: Val,
    /// `[warp][row][elements]`.
    pub o: Val,
    /// `[m, l][warp][row]`.
    pub found: Val,
}

/// A block at work.
pub struct Block<'a> {
    /// How the work is cut.
    pub decode: &'a Decode,
    /// This thread.
    pub place: Place,
    /// Shared memory.
    pub smem: Smem,
    /// What it is about.
    pub pair: &'a Pair,
    /// The last position that a token sees.
    pub last: Val,
}

impl Block<'_> {
    pub fn attention(&self) -> &Attention {
        &self.decode.attention
    }

    /// The row with number `row` among the eight.
    pub fn row_of(&self, k: &mut KernelBuilder, row: Val) -> RowOf {
        let row = k.add(self.pair.first_row, row);
        RowOf::new(k, self.attention(), &self.pair.tokens, self.pair.kv_head, row)
    }

    /// Rows of q as words. Of those that do not exist the last token's, which nobody uses.
    pub fn load_queries(&self, k: &mut KernelBuilder) {
        let quads = self.attention().blocks() * BLOCK_WORDS / 4;
        for i in 0..(ROWS * quads).div_ceil(THREADS) {
            let number = k.add_const(self.place.thread, i * THREADS);
            let load = |k: &mut KernelBuilder| {
                let (row, at) = (k.div_const(number, quads), k.rem_const(number, quads));
                let (block, quad) = (k.div_const(at, BLOCK_WORDS / 4), k.rem_const(at, BLOCK_WORDS / 4));
                let of = self.row_of(k, row);
                let one = k.const_i64(1);
                let last = k.sub(self.pair.tokens.count, one);
                let token = k.min_i64(of.token, last);
                let t = k.add(self.pair.tokens.first, token);
                let q = self.attention().row(k, self.attention().q, t, of.head);
                let words = of_floats(k, q, self.attention().elems(), Quad { block, quad }, Parts::Sum);
                let at = k.mul_const(at, 4);
                for (part, words) in (0..).zip(words) {
                    let to = k.add_const(row, part * ROWS);
                    let to = row_ptr(k, self.smem.q, to, self.smem.stride);
                    let words = k.quad(words);
                    k.store(to, at, words);
                }
            };
            if (ROWS * quads).is_multiple_of(THREADS) {
                load(k);
            } else {
                let all = k.index(ROWS * quads);
                let exists = k.cmp(Pred::Lt, number, all);
                k.if_then(exists, load);
            }
        }
    }

    /// The warp's chunks of the split that begins at `first`; its sums go to shared memory.
    fn work(&self, k: &mut KernelBuilder, first: Val, chunks: Val) {
        let own = k.mul(self.place.warp, chunks);
        let own = k.mul_const(own, CHUNK);
        let first = k.add(first, own);
        // chunks that nobody sees are left out, but for one, whose positions nobody sees
        let left = k.sub(self.last, first);
        let left = k.add_const(left, CHUNK);
        let left = k.div_const(left, CHUNK);
        let one = k.const_i64(1);
        let some = k.cmp(Pred::Gt, left, one);
        let left = k.select(some, left, one);
        let chunks = k.min_i64(chunks, left);
        let (g, q) = (k.div_const(self.place.lane, 4), k.rem_const(self.place.lane, 4));
        Warp { block: self, first, chunks, g, q }.run(k);
    }

    /// What the warps found, put together in their order, to where the tail finds it.
    fn together(&self, k: &mut KernelBuilder, partials: Partials) {
        let of_row = THREADS / ROWS;
        let (row, own) = (k.div_const(self.place.thread, of_row), k.rem_const(self.place.thread, of_row));
        let [m, l]: [Vec<Val>; 2] = [0, 1].map(|which| {
            let at = (0..WARPS).map(|warp| k.add_const(row, (which * WARPS + warp) * ROWS)).collect::<Vec<_>>();
            at.into_iter().map(|at| k.load_f32(self.smem.found, at)).collect()
        });
        let max = m[1..].iter().fold(m[0], |max, &m| k.fmax(max, m));
        let factors: Vec<Val> = m.iter().map(|&m| merge::factor(k, m, max)).collect();
        let sum = merge::weighted(k, &factors, &l);
        let task = k.task();
        let out = partials.of(k, task);
        let out_row = partials.row(k, out, row);
        let quads = self.attention().elems() / 4;
        for i in 0..quads.div_ceil(of_row) {
            let number = k.add_const(own, i * of_row);
            let at = k.mul_const(number, 4);
            let put = |k: &mut KernelBuilder| {
                let parts: Vec<[Val; 4]> = (0..WARPS)
                    .map(|warp| {
                        let from = k.add_const(row, warp * ROWS);
                        let from = row_ptr(k, self.smem.o, from, self.decode.o_stride());
                        let o = k.load(DType::F32, 4, from, at);
                        four(k, o)
                    })
                    .collect();
                let o = [0, 1, 2, 3].map(|i: usize| {
                    let parts: Vec<Val> = parts.iter().map(|p| p[i]).collect();
                    merge::weighted(k, &factors, &parts)
                });
                let o = k.quad(o);
                k.store(out_row, at, o);
            };
            if quads.is_multiple_of(of_row) {
                put(k);
            } else {
                let all = k.index(quads);
                let exists = k.cmp(Pred::Lt, number, all);
                k.if_then(exists, put);
            }
        }
        let zero = k.const_i64(0);
        let is_first = k.cmp(Pred::Eq, own, zero);
        k.if_then(is_first, |k| {
            for (at, x) in partials.found(k, row).into_iter().zip([max, sum]) {
                k.store(out, at, x);
            }
        });
    }
}

/// Quotient and remainder of what fits 32 bits, which takes a GPU a fraction of the time that 64 do.
pub fn divided(k: &mut KernelBuilder, x: Val, by: Val) -> (Val, Val) {
    let (x, by) = (k.narrow(x), k.narrow(by));
    let quotient = k.div(x, by);
    let whole = k.mul(quotient, by);
    let rest = k.sub(x, whole);
    (k.widen(quotient), k.widen(rest))
}
