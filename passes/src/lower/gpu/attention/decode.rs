//! Attention of runs that are decoded: a block scores and weighs one split of positions for eight rows, query heads of a kv head.
//!
//! warp     32 positions, all that it loads asked for at once
//! score    A: eight rows of q, rounded, and what that left over; B: eight keys, a thread the words of one key that the products want; `s = scale · (sum + rest)`
//! soften   `m` the largest, `p = exp(s − m)`, `l = Σp`: a thread has two positions of each product, of one row
//! weigh    A: values, words across two positions; B: p, which lie as the scores came
//! together the warps' (m, l, o) become the block's, in order; the tail puts those of all splits together

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::Sym;

use super::super::super::matmul::row_ptr;
use super::super::super::ports::{Lowered, Ports, Site};
use super::super::{Place, begin, extent};
use super::merge::{self, Partials};
use super::runs::{Runs, Tokens};
use super::words::{BLOCK_WORDS, Parts, Quad, across, four, of_floats, of_kv, pack};
use super::{Attention, LOWEST, RowOf};

/// Positions of a warp.
pub const WARP_POSITIONS: u64 = 32;
/// Warps of a block.
const WARPS: u64 = 4;
/// Positions of a split.
pub const SPLIT: u64 = WARPS * WARP_POSITIONS;
/// Threads of a block.
pub const THREADS: u64 = WARPS * 32;
/// Rows of a block.
pub const ROWS: u64 = 8;
/// Keys of a product.
const KEYS: u64 = 8;
/// Positions of a product that weighs.
const WEIGHED: u64 = 16;

/// The kernel, with the tail that puts splits together.
pub fn lower(site: &Site<'_>, ports: Ports, attention: Attention) -> Lowered {
    let tokens = (ROWS / attention.shared).max(1);
    let decode = Decode {
        attention,
        runs: Runs { pages: attention.pages, tokens, long: false },
        groups: (tokens * attention.shared).div_ceil(ROWS),
    };
    let splits = (Extent::from(Sym::P) * attention.pages.page_tokens.into()).ceil_div(SPLIT);
    let pairs = decode.pairs();
    let mut k = ports.builder(site, splits * pairs.clone());
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
            o: k.shared(DType::F32, WARPS * ROWS * self.o_stride()),
            found: k.shared(DType::F32, 2 * WARPS * ROWS),
        };
        let partials = Partials::here(k, self.attention.elems());
        let (task, pairs) = (k.task(), extent(k, pairs));
        begin(k);
        let (split, number) = (k.div(task, pairs), k.rem(task, pairs));
        let (exists, pair) = self.pair(k, place.lane, number);
        let first = k.mul_const(split, SPLIT);
        let end = k.add(pair.tokens.position, pair.tokens.count);
        let some = k.cmp(Pred::Lt, first, end);
        let works = k.and(exists, pair.tokens.live);
        let works = k.and(works, some);
        k.if_then(works, |k| {
            let block = Block { decode: self, place, smem, pair: &pair, end };
            block.load_queries(k);
            k.barrier();
            block.work(k, first);
            k.barrier();
            block.together(k, partials);
        });
    }

    /// Elements from one row's sums to the next in shared memory: four more keep threads in different banks.
    const fn o_stride(&self) -> u64 {
        self.attention.blocks() * super::BLOCK_ELEMS + 4
    }
}

/// Memory that the threads of a block share.
#[derive(Clone, Copy)]
struct Smem {
    /// `[part][row][words]`.
    q: Val,
    /// Words from one row to the next.
    stride: u64,
    /// `[warp][row][elements]`.
    o: Val,
    /// `[m, l][warp][row]`.
    found: Val,
}

/// A block at work.
struct Block<'a> {
    decode: &'a Decode,
    place: Place,
    smem: Smem,
    pair: &'a Pair,
    /// One past the last position that a token sees.
    end: Val,
}

impl Block<'_> {
    fn attention(&self) -> &Attention {
        &self.decode.attention
    }

    /// The row with number `row` among the eight.
    fn row_of(&self, k: &mut KernelBuilder, row: Val) -> RowOf {
        let row = k.add(self.pair.first_row, row);
        RowOf::new(k, self.attention(), &self.pair.tokens, self.pair.kv_head, row)
    }

    /// Rows of q as words. Of those that do not exist the last token's, which nobody uses.
    fn load_queries(&self, k: &mut KernelBuilder) {
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

    /// The warp's positions of the split that begins at `first`; its sums go to shared memory.
    fn work(&self, k: &mut KernelBuilder, first: Val) {
        let own = k.mul_const(self.place.warp, WARP_POSITIONS);
        let first = k.add(first, own);
        let some = k.cmp(Pred::Lt, first, self.end);
        let (g, q) = (k.div_const(self.place.lane, 4), k.rem_const(self.place.lane, 4));
        let warp = Warp { block: self, first, g, q };
        k.if_else(
            some,
            |k| {
                warp.run(k);
                Vec::new()
            },
            |k| {
                let (lowest, zero) = (k.const_f32(LOWEST), k.const_f32(0.0));
                warp.store_found(k, lowest, zero);
                let none = k.splat_f32(4, 0.0);
                let sums = vec![none; 4 * self.attention().blocks().div_ceil(2) as usize];
                warp.store_sums(k, &sums);
                Vec::new()
            },
        );
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

/// A warp at work on its positions.
struct Warp<'a> {
    block: &'a Block<'a>,
    /// The first position.
    first: Val,
    /// Which eight and which four of a warp's threads this is: the row of q and the key that it holds words of, and which words.
    g: Val,
    q: Val,
}

impl Warp<'_> {
    fn run(&self, k: &mut KernelBuilder) {
        let pages = &self.block.attention().pages;
        let (page, at) = (k.div_const(self.first, pages.page_tokens), k.rem_const(self.first, pages.page_tokens));
        let pair = self.block.pair;
        let (keys, values) = pages.block(k, pair.tokens.sequence, page, pair.kv_head);
        let [keys, values] = [keys, values].map(|rows| pages.row(k, rows, at));
        let (one, left) = (k.const_i64(1), k.sub(self.block.end, self.first));
        let last = k.sub(left, one);
        let keys = self.load_keys(k, keys, last);
        let values = self.load_values(k, values, last);
        let scores = self.score(k, &keys);
        let weights = self.soften(k, &scores);
        let sums = self.weigh(k, &values, &weights);
        self.store_sums(k, &sums);
    }

    /// For each product its key's words, by block: of positions that nobody sees those of the last that somebody does.
    fn load_keys(&self, k: &mut KernelBuilder, keys: Val, last: Val) -> Vec<Vec<Vec<[Val; 4]>>> {
        let attention = self.block.attention();
        let of = |n: u64| {
            let number = k.add_const(self.g, n * KEYS);
            let number = k.min_i64(number, last);
            let row = attention.pages.row(k, keys, number);
            let words = (0..attention.blocks()).map(|block| {
                let block = k.index(block);
                of_kv(k, &attention.pages, row, Quad { block, quad: self.q }, Parts::Sum)
            });
            words.collect()
        };
        (0..WARP_POSITIONS / KEYS).map(of).collect()
    }

    /// For each product that weighs and each pair of blocks the words of its four positions.
    fn load_values(&self, k: &mut KernelBuilder, values: Val, last: Val) -> Vec<Vec<[Vec<[Val; 4]>; 4]>> {
        let attention = self.block.attention();
        let (second, quad) = (k.div_const(self.g, 4), k.rem_const(self.g, 4));
        let own = k.mul_const(self.q, 2);
        let of = |n: u64| {
            let rows = [0, 1, 8, 9].map(|i| {
                let number = k.add_const(own, n * WEIGHED + i);
                let number = k.min_i64(number, last);
                attention.pages.row(k, values, number)
            });
            let blocks = (0..attention.blocks()).step_by(2).map(|first| {
                let block = k.add_const(second, first);
                let last = k.index(attention.blocks() - 1);
                let block = k.min_i64(block, last);
                rows.map(|row| of_kv(k, &attention.pages, row, Quad { block, quad }, Parts::Sum))
            });
            blocks.collect()
        };
        (0..WARP_POSITIONS / WEIGHED).map(of).collect()
    }

    /// For each product the scores of this thread's row with two positions, the lowest where it does not see them.
    fn score(&self, k: &mut KernelBuilder, keys: &[Vec<Vec<[Val; 4]>>]) -> Vec<[(Val, Val); 2]> {
        let (attention, smem) = (self.block.attention(), &self.block.smem);
        let none = k.splat_f32(4, 0.0);
        let mut sums = vec![none; keys.len()];
        for block in 0..attention.blocks() {
            let at = k.mul_const(self.q, 4);
            let at = k.add_const(at, block * BLOCK_WORDS);
            let [high, rest] = [0, 1].map(|part| {
                let row = k.add_const(self.g, part * ROWS);
                let row = row_ptr(k, smem.q, row, smem.stride);
                let words = k.load(DType::I32, 4, row, at);
                four(k, words)
            });
            for (sum, keys) in sums.iter_mut().zip(keys) {
                for key in &keys[block as usize] {
                    for i in [0, 2] {
                        let a = [high[i], rest[i], high[i + 1], rest[i + 1]];
                        *sum = k.mma(DType::BF16, a, [key[i], key[i + 1]], *sum);
                    }
                }
            }
        }
        let of = self.block.row_of(k, self.g);
        let own = k.add(self.block.pair.tokens.position, of.token);
        let mut scores = Vec::new();
        for (n, sum) in (0..).zip(sums) {
            let sum = four(k, sum);
            let pair = k.mul_const(self.q, 2);
            let first = k.add(self.first, pair);
            scores.push([0, 1].map(|i: u64| {
                let position = k.add_const(first, n * KEYS + i);
                let sees = k.cmp(Pred::Le, position, own);
                let sees = k.and(sees, of.exists);
                let (scale, lowest) = (k.const_f32(attention.scale), k.const_f32(LOWEST));
                let score = k.fadd(sum[i as usize], sum[i as usize + 2]);
                let score = k.fmul(score, scale);
                (k.select(sees, score, lowest), sees)
            }));
        }
        scores
    }

    /// Scores to probabilities relative to their maximum, as words; maximum and sum go to shared memory.
    fn soften(&self, k: &mut KernelBuilder, scores: &[[(Val, Val); 2]]) -> Vec<Vec<Val>> {
        let lowest = k.const_f32(LOWEST);
        let max = scores.iter().flatten().fold(lowest, |max, &(s, _)| k.fmax(max, s));
        let max = of_four(k, max, |k, a, b| k.fmax(a, b));
        let zero = k.const_f32(0.0);
        let mut sum = zero;
        let mut words = Vec::new();
        for pair in scores {
            let p = pair.map(|(score, sees)| {
                let p = merge::factor(k, score, max);
                k.select(sees, p, zero)
            });
            sum = p.iter().fold(sum, |sum, &p| k.fadd(sum, p));
            words.push(pack(k, p, Parts::Sum));
        }
        let sum = of_four(k, sum, |k, a, b| k.fadd(a, b));
        self.store_found(k, max, sum);
        words
    }

    /// Sums of values times probabilities: for each pair of blocks and word the thread's two elements, of two rows each.
    fn weigh(&self, k: &mut KernelBuilder, values: &[Vec<[Vec<[Val; 4]>; 4]>], weights: &[Vec<Val>]) -> Vec<Val> {
        let none = k.splat_f32(4, 0.0);
        let mut sums = vec![none; 4 * self.block.attention().blocks().div_ceil(2) as usize];
        for (values, weights) in values.iter().zip(weights.chunks(2)) {
            for (sums, rows) in sums.chunks_mut(4).zip(values) {
                for part in 0..rows[0].len() {
                    for (word, sum) in sums.iter_mut().enumerate() {
                        let [a0, a1] = across(k, rows[0][part][word], rows[1][part][word]);
                        let [a2, a3] = across(k, rows[2][part][word], rows[3][part][word]);
                        for (&first, &second) in weights[0].iter().zip(&weights[1]) {
                            *sum = k.mma(DType::BF16, [a0, a1, a2, a3], [first, second], *sum);
                        }
                    }
                }
            }
        }
        sums
    }

    fn store_sums(&self, k: &mut KernelBuilder, sums: &[Val]) {
        let (decode, smem) = (self.block.decode, &self.block.smem);
        let blocks = self.block.attention().blocks();
        let (second, quad) = (k.div_const(self.g, 4), k.rem_const(self.g, 4));
        let first_row = k.mul_const(self.block.place.warp, ROWS);
        let pair = k.mul_const(self.q, 2);
        let first_row = k.add(first_row, pair);
        for (first, sums) in (0..).step_by(2).zip(sums.chunks(4)) {
            let block = k.add_const(second, first);
            let store = |k: &mut KernelBuilder| {
                let sums: Vec<[Val; 4]> = sums.iter().map(|&sum| four(k, sum)).collect();
                let at = k.mul_const(block, super::BLOCK_ELEMS);
                let own = k.mul_const(quad, 4);
                let at = k.add(at, own);
                for (half, row) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                    let to = k.add_const(first_row, row);
                    let to = row_ptr(k, smem.o, to, decode.o_stride());
                    let at = k.add_const(at, half * super::BLOCK_ELEMS / 2);
                    let values = k.quad([0, 1, 2, 3].map(|word: usize| sums[word][(2 * half + row) as usize]));
                    k.store(to, at, values);
                }
            };
            if first + 2 <= blocks {
                store(k);
            } else {
                let end = k.index(blocks);
                let exists = k.cmp(Pred::Lt, block, end);
                k.if_then(exists, store);
            }
        }
    }

    fn store_found(&self, k: &mut KernelBuilder, max: Val, sum: Val) {
        let zero = k.const_i64(0);
        let is_first = k.cmp(Pred::Eq, self.q, zero);
        k.if_then(is_first, |k| {
            let at = k.mul_const(self.block.place.warp, ROWS);
            let at = k.add(at, self.g);
            k.store(self.block.smem.found, at, max);
            let at = k.add_const(at, WARPS * ROWS);
            k.store(self.block.smem.found, at, sum);
        });
    }
}

/// Joins the numbers of the four threads that hold words of one row.
pub fn of_four(k: &mut KernelBuilder, x: Val, join: impl Fn(&mut KernelBuilder, Val, Val) -> Val) -> Val {
    [1, 2].into_iter().fold(x, |x, mask| {
        let other = k.shuffle_xor(x, mask);
        join(k, x, other)
    })
}
