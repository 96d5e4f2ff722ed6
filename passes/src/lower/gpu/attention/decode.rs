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
use nextc_ir::shape::Sym;

use super::super::super::matmul::row_ptr;
use super::super::super::ports::{Lowered, Ports, Site};
use super::super::{Place, begin, extent};
use super::merge::{self, Partials};
use super::runs::{Runs, Tokens};
use super::words::{BLOCK_ELEMS, BLOCK_WORDS, Parts, Quad, Share, across, four, of_floats, pack};
use super::{Attention, LOWEST, RowOf};

/// Positions of a chunk.
pub const CHUNK: u64 = 16;
/// Warps of a block.
const WARPS: u64 = 4;
/// Threads of a block.
pub const THREADS: u64 = WARPS * 32;
/// Rows of a block.
pub const ROWS: u64 = 8;
/// Keys of a product.
const KEYS: u64 = 8;
/// Chunks of a warp where a context begins, where one chunk each keeps more blocks busy, and beyond.
const FEW_CHUNKS: u64 = 1;
const MANY_CHUNKS: u64 = 4;
/// The first position of the splits of many chunks.
const MANY_FROM: u64 = 1024;
/// Splits before it.
const FEW_SPLITS: u64 = MANY_FROM / split_positions(FEW_CHUNKS);

/// Positions of a split.
const fn split_positions(chunks: u64) -> u64 {
    WARPS * chunks * CHUNK
}

/// How many splits a token of this position sees.
pub fn splits_of(k: &mut KernelBuilder, position: Val) -> Val {
    let border = k.index(MANY_FROM);
    let beyond = k.cmp(Pred::Ge, position, border);
    let further = k.sub(position, border);
    let further = k.div_const(further, split_positions(MANY_CHUNKS));
    let (few, many) = (k.div_const(position, split_positions(FEW_CHUNKS)), k.add_const(further, FEW_SPLITS));
    let number = k.select(beyond, many, few);
    k.add_const(number, 1)
}

/// The first position of split `number`, and how many chunks a warp has of it.
fn split_range(k: &mut KernelBuilder, number: Val) -> (Val, Val) {
    let (border, few) = (k.index(MANY_FROM), k.index(FEW_SPLITS));
    let beyond = k.cmp(Pred::Ge, number, few);
    let further = k.sub(number, few);
    let further = k.mul_const(further, split_positions(MANY_CHUNKS));
    let (many, first) = (k.add(border, further), k.mul_const(number, split_positions(FEW_CHUNKS)));
    let (few_chunks, many_chunks) = (k.index(FEW_CHUNKS), k.index(MANY_CHUNKS));
    (k.select(beyond, many, first), k.select(beyond, many_chunks, few_chunks))
}

/// The splits that the pages of a step may have.
fn split_bound(page_tokens: u64) -> Extent {
    let positions = Extent::from(Sym::P) * page_tokens.into();
    let few = positions.clone().ceil_div(split_positions(FEW_CHUNKS)).min(FEW_SPLITS.into());
    few + positions.ceil_div(split_positions(MANY_CHUNKS))
}

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
            scores: k.shared(DType::F32, MANY_CHUNKS * THREADS * 4),
            o: k.shared(DType::F32, WARPS * ROWS * self.o_stride()),
            found: k.shared(DType::F32, 2 * WARPS * ROWS),
        };
        let partials = Partials::here(k, self.attention.elems());
        let (task, pairs) = (k.task(), extent(k, pairs));
        begin(k);
        let (split, number) = divided(k, task, pairs);
        let (exists, pair) = self.pair(k, place.lane, number);
        let (first, chunks) = split_range(k, split);
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
    const fn o_stride(&self) -> u64 {
        self.attention.blocks() * BLOCK_ELEMS + 4
    }
}

/// Memory that the threads of a block share.
#[derive(Clone, Copy)]
struct Smem {
    /// `[part][row][words]`.
    q: Val,
    /// Words from one row to the next.
    stride: u64,
    /// `[chunk][thread][4]`: each thread's own scores.
    scores: Val,
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
    /// The last position that a token sees.
    last: Val,
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

/// A warp at work on its chunks.
struct Warp<'a> {
    block: &'a Block<'a>,
    /// The first position, and how many chunks.
    first: Val,
    chunks: Val,
    /// Which eight and which four of a warp's threads this is: the row of q and the key that it holds words of, and which words.
    g: Val,
    q: Val,
}

impl Warp<'_> {
    fn attention(&self) -> &Attention {
        self.block.attention()
    }

    fn run(&self, k: &mut KernelBuilder) {
        let (zero, one) = (k.const_i64(0), k.const_i64(1));
        let shares = self.keys(k, zero);
        let keys = self.load(k, &shares);
        self.block.load_queries(k);
        // loads cannot wait behind it
        k.barrier();
        let lowest = k.const_f32(LOWEST);
        let carried = [keys, vec![lowest]].concat();
        let left = k.for_carry((zero, self.chunks, 1), &carried, |k, chunk, carried| {
            let (keys, max) = carried.split_at(carried.len() - 1);
            let next = k.add(chunk, one);
            let more = k.cmp(Pred::Lt, next, self.chunks);
            let (keys_next, values) = (self.keys(k, next), self.values(k, zero));
            let shares = [0, 1, 2, 3].map(|i: usize| keys_next[i].or(k, more, values[i]));
            let ahead = self.load(k, &shares);
            let scores = self.score(k, chunk, keys);
            let max = scores.into_iter().fold(max[0], |max, s| k.fmax(max, s));
            [ahead, vec![max]].concat()
        });
        let (values, max) = left.split_at(left.len() - 1);
        let max = of_four(k, max[0], |k, a, b| k.fmax(a, b));
        let none = k.splat_f32(4, 0.0);
        let nothing = k.const_f32(0.0);
        let sums = vec![none; 4 * self.attention().blocks().div_ceil(2) as usize];
        let carried = [values.to_vec(), sums.clone(), vec![nothing]].concat();
        let left = k.for_carry((zero, self.chunks, 1), &carried, |k, chunk, carried| {
            let (values, rest) = carried.split_at(values.len());
            let (sums, sum) = rest.split_at(sums.len());
            let next = k.add(chunk, one);
            let more = k.cmp(Pred::Lt, next, self.chunks);
            let load = |k: &mut KernelBuilder| {
                let shares = self.values(k, next);
                self.load(k, &shares)
            };
            let ahead = k.if_else(more, load, |_| values.to_vec());
            let (weights, sum) = self.soften(k, chunk, max, sum[0]);
            let sums = self.weigh(k, values, &weights, sums.to_vec());
            [ahead, sums, vec![sum]].concat()
        });
        let (sums, sum) = left[values.len()..].split_at(sums.len());
        let sum = of_four(k, sum[0], |k, a, b| k.fadd(a, b));
        self.store_found(k, max, sum);
        self.store_sums(k, sums);
    }

    /// Rows of keys (or values) from the first position of a chunk on, and the number of the last that somebody sees: of positions that nobody sees those of the
    /// last that somebody does are read.
    fn rows(&self, k: &mut KernelBuilder, chunk: Val) -> ((Val, Val), Val) {
        let (pages, pair) = (&self.attention().pages, self.block.pair);
        let first = k.mul_const(chunk, CHUNK);
        let first = k.add(self.first, first);
        let within = k.rem_const(self.block.last, CHUNK);
        let most = k.sub(self.block.last, within);
        let first = k.min_i64(first, most);
        let (page, at) = (k.div_const(first, pages.page_tokens), k.rem_const(first, pages.page_tokens));
        let (keys, values) = pages.block(k, pair.tokens.sequence, page, pair.kv_head);
        let [keys, values] = [keys, values].map(|rows| pages.row(k, rows, at));
        ((keys, values), k.sub(self.block.last, first))
    }

    /// Words of the keys of a chunk: of keys `g` and `g + 8`, of even and of odd blocks.
    fn keys(&self, k: &mut KernelBuilder, chunk: Val) -> [Share; 4] {
        let ((keys, _), last) = self.rows(k, chunk);
        [(0, 0), (0, 1), (KEYS, 0), (KEYS, 1)].map(|(key, odd)| {
            let number = k.add_const(self.g, key);
            let number = k.min_i64(number, last);
            let row = self.attention().pages.row(k, keys, number);
            let odd = k.const_i64(odd);
            Share::new(k, &self.attention().pages, row, odd, self.q)
        })
    }

    /// Words of the values of a chunk: of positions `2 q`, `2 q + 1`, `2 q + 8` and `2 q + 9`, of the blocks that are this thread's.
    fn values(&self, k: &mut KernelBuilder, chunk: Val) -> [Share; 4] {
        let ((_, values), last) = self.rows(k, chunk);
        let (odd, quad) = (k.div_const(self.g, 4), k.rem_const(self.g, 4));
        let own = k.mul_const(self.q, 2);
        [0, 1, 8, 9].map(|i| {
            let number = k.add_const(own, i);
            let number = k.min_i64(number, last);
            let row = self.attention().pages.row(k, values, number);
            Share::new(k, &self.attention().pages, row, odd, quad)
        })
    }

    /// What `shares` have, one after the other.
    fn load(&self, k: &mut KernelBuilder, shares: &[Share; 4]) -> Vec<Val> {
        shares.iter().flat_map(|share| share.load(k, &self.attention().pages)).collect()
    }

    /// The words of share `share` in pair `pair` of blocks, for each part.
    fn words(&self, k: &mut KernelBuilder, loaded: &[Val], share: usize, pair: usize) -> Vec<[Val; 4]> {
        let pages = &self.attention().pages;
        let each = Share::vectors(pages);
        let pairs = self.attention().blocks().div_ceil(2) as usize;
        let from = (share * pairs + pair) * each;
        Share::words(k, pages, &loaded[from..from + each], Parts::Sum)
    }

    /// The scores of this thread's row with four positions of a chunk, the lowest where it does not see them; kept in shared memory too.
    fn score(&self, k: &mut KernelBuilder, chunk: Val, keys: &[Val]) -> [Val; 4] {
        let (attention, smem) = (self.attention(), &self.block.smem);
        let none = k.splat_f32(4, 0.0);
        let mut sums = [none; 2];
        for block in 0..attention.blocks() {
            let at = k.mul_const(self.q, 4);
            let at = k.add_const(at, block * BLOCK_WORDS);
            let [high, rest] = [0, 1].map(|part| {
                let row = k.add_const(self.g, part * ROWS);
                let row = row_ptr(k, smem.q, row, smem.stride);
                let words = k.load(DType::I32, 4, row, at);
                four(k, words)
            });
            for (n, sum) in sums.iter_mut().enumerate() {
                for key in self.words(k, keys, 2 * n + (block % 2) as usize, (block / 2) as usize) {
                    for i in [0, 2] {
                        let a = [high[i], rest[i], high[i + 1], rest[i + 1]];
                        *sum = k.mma(DType::BF16, a, [key[i], key[i + 1]], *sum);
                    }
                }
            }
        }
        let of = self.block.row_of(k, self.g);
        let own = k.add(self.block.pair.tokens.position, of.token);
        let none = k.const_i64(-1);
        let own = k.select(of.exists, own, none);
        let (first, pair) = (k.mul_const(chunk, CHUNK), k.mul_const(self.q, 2));
        let first = k.add(first, pair);
        let first = k.add(self.first, first);
        let (scale, lowest) = (k.const_f32(attention.scale), k.const_f32(LOWEST));
        let scores = [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(n, i): (u64, u64)| {
            let position = k.add_const(first, n * KEYS + i);
            let sees = k.cmp(Pred::Le, position, own);
            let [sum, rest] = [0, 2].map(|part| k.extract(sums[n as usize], part + i as u32));
            let score = k.fadd(sum, rest);
            let score = k.fmul(score, scale);
            k.select(sees, score, lowest)
        });
        let at = self.own_scores(k, chunk);
        let kept = k.quad(scores);
        k.store(smem.scores, at, kept);
        scores
    }

    fn own_scores(&self, k: &mut KernelBuilder, chunk: Val) -> Val {
        let at = k.mul_const(chunk, THREADS);
        let at = k.add(at, self.block.place.thread);
        k.mul_const(at, 4)
    }

    /// The probabilities of a chunk relative to the maximum, as words, and the sum with theirs.
    fn soften(&self, k: &mut KernelBuilder, chunk: Val, max: Val, sum: Val) -> (Vec<Vec<Val>>, Val) {
        let at = self.own_scores(k, chunk);
        let scores = k.load(DType::F32, 4, self.block.smem.scores, at);
        let (zero, lowest) = (k.const_f32(0.0), k.const_f32(LOWEST));
        let p = four(k, scores).map(|score| {
            let sees = k.cmp(Pred::Gt, score, lowest);
            let p = merge::factor(k, score, max);
            k.select(sees, p, zero)
        });
        let sum = p.iter().fold(sum, |sum, &p| k.fadd(sum, p));
        (vec![pack(k, [p[0], p[1]], Parts::Sum), pack(k, [p[2], p[3]], Parts::Sum)], sum)
    }

    /// Adds values times probabilities: for each pair of blocks and word the thread's two elements, of two rows each.
    fn weigh(&self, k: &mut KernelBuilder, values: &[Val], weights: &[Vec<Val>], mut sums: Vec<Val>) -> Vec<Val> {
        for (pair, sums) in sums.chunks_mut(4).enumerate() {
            let rows = [0, 1, 2, 3].map(|row| self.words(k, values, row, pair));
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
                let at = k.mul_const(block, BLOCK_ELEMS);
                let own = k.mul_const(quad, 4);
                let at = k.add(at, own);
                for (half, row) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                    let to = k.add_const(first_row, row);
                    let to = row_ptr(k, smem.o, to, decode.o_stride());
                    let at = k.add_const(at, half * BLOCK_ELEMS / 2);
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

/// Quotient and remainder of what fits 32 bits, which takes a GPU a fraction of the time that 64 do.
pub fn divided(k: &mut KernelBuilder, x: Val, by: Val) -> (Val, Val) {
    let (x, by) = (k.narrow(x), k.narrow(by));
    let quotient = k.div(x, by);
    let whole = k.mul(quotient, by);
    let rest = k.sub(x, whole);
    (k.widen(quotient), k.widen(rest))
}

/// Joins the numbers of the four threads that hold words of one row.
pub fn of_four(k: &mut KernelBuilder, x: Val, join: impl Fn(&mut KernelBuilder, Val, Val) -> Val) -> Val {
    [1, 2].into_iter().fold(x, |x, mask| {
        let other = k.shuffle_xor(x, mask);
        join(k, x, other)
    })
}
