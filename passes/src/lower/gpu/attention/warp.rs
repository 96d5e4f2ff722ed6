//! A warp of [`decode`](super::decode) at work on its chunks of positions.

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::shape::LANES;

use super::super::super::matmul::row_ptr;
use super::super::super::pages::Pages;
use super::decode::{Block, CHUNK, ROWS, THREADS, WARPS};
use super::words::{BLOCK_ELEMS, BLOCK_WORDS, Loaded, Parts, Share, across, four, pack, value_element};
use super::{Attention, LOWEST, merge};

/// Keys of a product.
const KEYS: u64 = 8;

/// What a thread reads of a chunk's keys, or of its values.
#[derive(Clone, Copy)]
struct Asked {
    shares: [Share; 4],
    /// Pointers to the scales of positions `2 q`, `2 q + 1`, `2 q + 8` and `2 q + 9`, where rows have some.
    scales: [Option<Val>; 4],
}

impl Asked {
    /// This, or another where the condition does not hold.
    fn or(self, k: &mut KernelBuilder, condition: Val, other: Self) -> Self {
        Self {
            shares: [0, 1, 2, 3].map(|i: usize| self.shares[i].or(k, condition, other.shares[i])),
            scales: [0, 1, 2, 3].map(|i: usize| {
                let pair = self.scales[i].zip(other.scales[i]);
                pair.map(|(own, other)| k.select(condition, own, other))
            }),
        }
    }

    /// What is there: the shares' vectors, one after the other, then the scales.
    fn load(&self, k: &mut KernelBuilder, pages: &Pages) -> Vec<Val> {
        let zero = k.const_i64(0);
        let mut loaded: Vec<Val> = self.shares.iter().flat_map(|share| share.load(k, pages)).collect();
        loaded.extend(self.scales.iter().flatten().map(|&at| k.load_f32(at, zero)));
        loaded
    }
}

/// Keys and values of the page that holds a chunk.
struct Rows {
    keys: Val,
    values: Val,
    /// The chunk's first row in it.
    first: Val,
    /// The last row, counted from there, that somebody sees.
    last: Val,
}

impl Rows {
    /// The row of the page of position `number` of the chunk; of what nobody sees the last that somebody does.
    fn number(&self, k: &mut KernelBuilder, number: Val) -> Val {
        let number = k.min_i64(number, self.last);
        k.add(self.first, number)
    }
}

/// A warp at work on its chunks.
pub struct Warp<'a> {
    /// The block.
    pub block: &'a Block<'a>,
    /// The first position, and how many chunks.
    pub first: Val,
    /// See `first`.
    pub chunks: Val,
    /// Which eight and which four of a warp's threads this is: the row of q and the key that it holds words of, and which words.
    pub g: Val,
    /// See `g`.
    pub q: Val,
}

impl Warp<'_> {
    fn attention(&self) -> &Attention {
        self.block.attention()
    }

    /// Works on them; what it finds goes to shared memory.
    pub fn run(&self, k: &mut KernelBuilder) {
        let (zero, one) = (k.const_i64(0), k.const_i64(1));
        let pages = &self.attention().pages;
        let keys = self.keys(k, zero).load(k, pages);
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
            let ahead = keys_next.or(k, more, values).load(k, pages);
            let scores = self.score(k, chunk, keys);
            let max = scores.into_iter().fold(max[0], |max, s| k.fmax(max, s));
            [ahead, vec![max]].concat()
        });
        let (values, max) = left.split_at(left.len() - 1);
        let max = of_four(k, max[0], |k, a, b| k.fmax(a, b));
        let none = k.splat_f32(4, 0.0);
        let nothing = k.const_f32(0.0);
        let sums = vec![none; 4 * self.pairs() as usize];
        let carried = [values.to_vec(), sums.clone(), vec![nothing]].concat();
        let left = k.for_carry((zero, self.chunks, 1), &carried, |k, chunk, carried| {
            let (values, rest) = carried.split_at(values.len());
            let (sums, sum) = rest.split_at(sums.len());
            let next = k.add(chunk, one);
            let more = k.cmp(Pred::Lt, next, self.chunks);
            let load = |k: &mut KernelBuilder| self.values(k, next).load(k, pages);
            let ahead = k.if_else(more, load, |_| values.to_vec());
            let (loaded, scales) = self.loaded(values);
            let (weights, sum) = self.soften(k, chunk, max, (sum[0], scales));
            let sums = self.weigh(k, loaded, &weights, sums.to_vec());
            [ahead, sums, vec![sum]].concat()
        });
        let (sums, sum) = left[values.len()..].split_at(sums.len());
        let sum = of_four(k, sum[0], |k, a, b| k.fadd(a, b));
        self.store_found(k, max, sum);
        self.store_sums(k, sums);
    }

    /// Where the keys and values of a chunk lie; one that nobody sees is the last that somebody does.
    fn rows(&self, k: &mut KernelBuilder, chunk: Val) -> Rows {
        let (pages, pair) = (&self.attention().pages, self.block.pair);
        let first = k.mul_const(chunk, CHUNK);
        let first = k.add(self.first, first);
        let within = k.rem_const(self.block.last, CHUNK);
        let most = k.sub(self.block.last, within);
        let first = k.min_i64(first, most);
        let (page, at) = (k.div_const(first, pages.page_tokens), k.rem_const(first, pages.page_tokens));
        let (keys, values) = pages.block(k, pair.tokens.sequence, page, pair.kv_head);
        Rows { keys, values, first: at, last: k.sub(self.block.last, first) }
    }

    /// Pointers to the scales of the positions that this thread has scores of, where rows have some.
    fn scale_ptrs(&self, k: &mut KernelBuilder, rows: &Rows, of: Val) -> [Option<Val>; 4] {
        let own = k.mul_const(self.q, 2);
        [0, 1, 8, 9].map(|i| {
            let number = k.add_const(own, i);
            let number = rows.number(k, number);
            self.attention().pages.scale_ptr(k, of, number)
        })
    }

    /// What was loaded of keys or values, and their scales.
    fn loaded<'v>(&self, loaded: &'v [Val]) -> (Loaded<'v>, &'v [Val]) {
        Loaded::new(self.attention().pages, loaded, (4, self.pairs() as usize))
    }

    /// Pairs of blocks of a head.
    fn pairs(&self) -> u64 {
        self.attention().blocks().div_ceil(2)
    }

    /// Words of the keys of a chunk: of keys `g` and `g + 8`, of even and of odd blocks.
    fn keys(&self, k: &mut KernelBuilder, chunk: Val) -> Asked {
        let rows = self.rows(k, chunk);
        let shares = [(0, 0), (0, 1), (KEYS, 0), (KEYS, 1)].map(|(key, second)| {
            let number = k.add_const(self.g, key);
            let number = rows.number(k, number);
            let row = self.attention().pages.row(k, rows.keys, number);
            Share::of_key(k, &self.attention().pages, row, self.q, second)
        });
        Asked { shares, scales: self.scale_ptrs(k, &rows, rows.keys) }
    }

    /// Words of the values of a chunk: of positions `2 q`, `2 q + 1`, `2 q + 8` and `2 q + 9`, of the blocks that are this thread's.
    fn values(&self, k: &mut KernelBuilder, chunk: Val) -> Asked {
        let rows = self.rows(k, chunk);
        let own = k.mul_const(self.q, 2);
        let shares = [0, 1, 8, 9].map(|i| {
            let number = k.add_const(own, i);
            let number = rows.number(k, number);
            let row = self.attention().pages.row(k, rows.values, number);
            Share::of_value(k, &self.attention().pages, row, self.g)
        });
        Asked { shares, scales: self.scale_ptrs(k, &rows, rows.values) }
    }

    /// The scores of this thread's row with four positions of a chunk, the lowest where it does not see them; kept in shared memory too.
    fn score(&self, k: &mut KernelBuilder, chunk: Val, keys: &[Val]) -> [Val; 4] {
        let (attention, smem) = (self.attention(), &self.block.smem);
        let (keys, scales) = self.loaded(keys);
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
                for key in keys.key(k, n, block as usize) {
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
            let of_key = scales.get((2 * n + i) as usize);
            let score = of_key.map_or(score, |&of_key| k.fmul(score, of_key));
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

    /// The probabilities of a chunk relative to the maximum, as words, times the scales of its values where they have some; and the sum with theirs.
    fn soften(
        &self,
        k: &mut KernelBuilder,
        chunk: Val,
        max: Val,
        (sum, scales): (Val, &[Val]),
    ) -> (Vec<Vec<Val>>, Val) {
        let at = self.own_scores(k, chunk);
        let scores = k.load(DType::F32, 4, self.block.smem.scores, at);
        let (zero, lowest) = (k.const_f32(0.0), k.const_f32(LOWEST));
        let p = four(k, scores).map(|score| {
            let sees = k.cmp(Pred::Gt, score, lowest);
            let p = merge::factor(k, score, max);
            k.select(sees, p, zero)
        });
        let sum = p.iter().fold(sum, |sum, &p| k.fadd(sum, p));
        let p = [0, 1, 2, 3].map(|i: usize| scales.get(i).map_or(p[i], |&scale| k.fmul(p[i], scale)));
        (vec![pack(k, [p[0], p[1]], Parts::Sum), pack(k, [p[2], p[3]], Parts::Sum)], sum)
    }

    /// Adds values times probabilities: for each pair of blocks and word the thread's two elements, of two rows each.
    fn weigh(&self, k: &mut KernelBuilder, values: Loaded<'_>, weights: &[Vec<Val>], mut sums: Vec<Val>) -> Vec<Val> {
        for (pair, sums) in sums.chunks_mut(4).enumerate() {
            let rows = [0, 1, 2, 3].map(|row| values.value(k, row, pair));
            for (part, first_row) in rows[0].iter().enumerate() {
                for (word, sum) in sums.iter_mut().enumerate() {
                    let [a0, a1] = across(k, first_row[word], rows[1][part][word]);
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
        let first_row = k.mul_const(self.block.place.warp, ROWS);
        let pair = k.mul_const(self.q, 2);
        let first_row = k.add(first_row, pair);
        let elems = self.attention().blocks() * BLOCK_ELEMS;
        for (first, sums) in (0..).step_by(2 * BLOCK_ELEMS as usize).zip(sums.chunks(4)) {
            let sums: Vec<[Val; 4]> = sums.iter().map(|&sum| four(k, sum)).collect();
            let mut word = 0;
            while word < 4 {
                let (at, follow) = value_element(k, &self.attention().pages, self.g, word);
                let at = k.add_const(at, first);
                let words = word as usize..(word + follow) as usize;
                let store = |k: &mut KernelBuilder| {
                    for (half, row) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                        let to = k.add_const(first_row, row);
                        let to = row_ptr(k, smem.o, to, decode.o_stride());
                        let at = k.add_const(at, half * LANES);
                        let values: Vec<Val> = words.clone().map(|w| sums[w][(2 * half + row) as usize]).collect();
                        store_all(k, to, at, &values);
                    }
                };
                if first + 2 * BLOCK_ELEMS <= elems {
                    store(k);
                } else {
                    let end = k.index(elems);
                    let exists = k.cmp(Pred::Lt, at, end);
                    k.if_then(exists, store);
                }
                word += follow;
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

/// Stores neighbouring elements, four at once.
fn store_all(k: &mut KernelBuilder, to: Val, at: Val, values: &[Val]) {
    if let &[a, b, c, d] = values {
        let values = k.quad([a, b, c, d]);
        return k.store(to, at, values);
    }
    for (i, &x) in (0..).zip(values) {
        let at = k.add_const(at, i);
        k.store(to, at, x);
    }
}

/// Joins the numbers of the four threads that hold words of one row.
pub fn of_four(k: &mut KernelBuilder, x: Val, join: impl Fn(&mut KernelBuilder, Val, Val) -> Val) -> Val {
    [1, 2].into_iter().fold(x, |x, mask| {
        let other = k.shuffle_xor(x, mask);
        join(k, x, other)
    })
}
