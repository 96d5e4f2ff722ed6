//! Attention of long runs: a block takes 128 rows, query heads of a kv head of some tokens, over all their positions.
//!
//! warp     16 rows; their sums, of all elements, stay in registers
//! stage    32 positions: keys as they lie, values as words across two positions, in shared memory; the next ones are asked for before these are worked on
//! score    A: q, B: keys; `s = scale · q · k`
//! soften   `m ← max`, `p = exp(s − m)`, `l ← l·c + Σp`, `o ← o·c` where a maximum of the warp has changed
//! weigh    A: p, which lie as the scores came, B: values
//! epilogue out = o / l · sigmoid(output_gate)
//! traffic  each row of KV once for 128 rows: bound by products and by shared memory

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::shape::Sym;
use nextc_ir::types::DECODE_TOKENS;

use super::super::super::matmul::row_ptr;
use super::super::super::ports::{Lowered, Ports, Site};
use super::super::{Place, begin, many};
use super::runs::{Runs, Tokens};
use super::warp::of_four;
use super::words::{BLOCK_ELEMS, BLOCK_WORDS, Parts, Quad, Raw, across, four, of_floats, pack};
use super::{Attention, LOWEST, RowOf, merge};

/// Rows of a block.
pub const ROWS: u64 = WARPS * WARP_ROWS;
/// Positions of a stage.
pub const POSITIONS: u64 = 32;
/// Rows of a warp.
const WARP_ROWS: u64 = 16;
/// Warps of a block.
const WARPS: u64 = 8;
/// Threads of a block.
const THREADS: u64 = WARPS * 32;
/// Keys of a product.
const KEYS: u64 = 8;
/// Positions of a product that weighs.
const WEIGHED: u64 = 16;
/// Loads of q that a thread has in flight.
const LOADS: u64 = 4;

/// The kernel for long runs.
pub fn lower(site: &Site<'_>, ports: Ports, attention: Attention) -> Lowered {
    let runs = Runs { pages: attention.pages, tokens: ROWS / attention.shared, long: true };
    let grid = many::many(Sym::T, DECODE_TOKENS, runs.most() * attention.pages.heads.into());
    let mut k = ports.builder_of(site, ".bulk", grid);
    k.threads(THREADS as u32);
    body(&mut k, &attention, &runs);
    ports.finish(k.finish())
}

fn body(k: &mut KernelBuilder, attention: &Attention, runs: &Runs) {
    let place = Place::here(k);
    // rows whose distance keeps threads in different banks
    let key_words = attention.blocks() * BLOCK_WORDS + BLOCK_WORDS;
    let value_words = attention.blocks() * BLOCK_ELEMS + 8;
    let smem = Smem {
        q: k.shared(DType::I32, ROWS * key_words),
        keys: k.shared(DType::I32, 2 * POSITIONS * key_words),
        values: k.shared(DType::I32, 2 * POSITIONS / 2 * value_words),
        key_words,
        value_words,
    };
    let task = k.task();
    begin(k);
    let heads = attention.pages.heads;
    let (number, kv_head) = (k.div_const(task, heads), k.rem_const(task, heads));
    // those that see most come first
    let (all, one) = (k.extent(&runs.most()), k.const_i64(1));
    let last = k.sub(all, one);
    let number = k.sub(last, number);
    let (exists, tokens) = runs.find(k, place.lane, number);
    let (g, q) = (k.div_const(place.lane, 4), k.rem_const(place.lane, 4));
    k.if_then(exists, |k| {
        let block = Block { attention, place, smem, tokens: &tokens, kv_head, g, q };
        k.if_else(
            tokens.live,
            |k| {
                block.run(k);
                Vec::new()
            },
            |k| {
                block.zero_out(k);
                Vec::new()
            },
        );
    });
}

/// Memory that the threads of a block share.
#[derive(Clone, Copy)]
struct Smem {
    /// `[row][words]`.
    q: Val,
    /// `[stage][position][words]`.
    keys: Val,
    /// `[stage][two positions][elements]`: a word is an element of both.
    values: Val,
    /// Words from one row, or position, to the next.
    key_words: u64,
    value_words: u64,
}

/// A block at work.
struct Block<'a> {
    attention: &'a Attention,
    place: Place,
    smem: Smem,
    tokens: &'a Tokens,
    kv_head: Val,
    /// Which eight and which four of a warp's threads this is.
    g: Val,
    q: Val,
}

/// What a warp carries: of each product the thread's two elements of rows `g` and `g + 8`; maximum and sum of both rows.
#[derive(Clone)]
struct Sums {
    o: Vec<Val>,
    max: [Val; 2],
    sum: [Val; 2],
}

impl Sums {
    fn begin(k: &mut KernelBuilder, attention: &Attention) -> Self {
        let (none, lowest, zero) = (k.splat_f32(4, 0.0), k.const_f32(LOWEST), k.const_f32(0.0));
        Self { o: vec![none; 4 * attention.blocks() as usize], max: [lowest; 2], sum: [zero; 2] }
    }

    fn flat(&self) -> Vec<Val> {
        [self.o.as_slice(), &self.max, &self.sum].concat()
    }

    fn of(flat: &[Val]) -> Self {
        let (o, rest) = flat.split_at(flat.len() - 4);
        Self { o: o.to_vec(), max: [rest[0], rest[1]], sum: [rest[2], rest[3]] }
    }
}

/// What a thread has loaded of a stage: words of keys, and of values of two positions.
struct Loaded {
    keys: Vec<Raw>,
    values: Vec<[Raw; 2]>,
}

impl Block<'_> {
    fn run(&self, k: &mut KernelBuilder) {
        let end = k.add(self.tokens.position, self.tokens.count);
        let zero = k.const_i64(0);
        let loaded = self.load(k, zero, end);
        self.load_queries(k);
        self.put(k, zero, &loaded);
        k.barrier();
        let begin = Sums::begin(k, self.attention).flat();
        let sums = k.for_carry((zero, end, POSITIONS), &begin, |k, first, sums| {
            let number = k.div_const(first, POSITIONS);
            let (next, number_after) = (k.add_const(first, POSITIONS), k.add_const(number, 1));
            let [stage, other] = [number, number_after].map(|n| k.rem_const(n, 2));
            // of what does not exist the last positions again
            let loaded = self.load(k, next, end);
            let sums = self.stage(k, first, stage, &Sums::of(sums));
            self.put(k, other, &loaded);
            k.barrier();
            sums.flat()
        });
        self.finish(k, &Sums::of(&sums));
    }

    /// The row of q with this number, and its token and head.
    fn row_of(&self, k: &mut KernelBuilder, row: Val) -> RowOf {
        RowOf::new(k, self.attention, self.tokens, self.kv_head, row)
    }

    /// Runs `body(number)` for this thread's share of `count` pieces of work.
    fn share(&self, k: &mut KernelBuilder, count: u64, mut body: impl FnMut(&mut KernelBuilder, Val)) {
        for first in (0..count).step_by(THREADS as usize) {
            let number = k.add_const(self.place.thread, first);
            if first + THREADS <= count {
                body(k, number);
            } else {
                let all = k.index(count);
                let exists = k.cmp(Pred::Lt, number, all);
                k.if_then(exists, |k| body(k, number));
            }
        }
    }

    /// The rows of q as words; of those that do not exist the last token's, which nobody uses.
    fn load_queries(&self, k: &mut KernelBuilder) {
        let (quads, blocks) = (self.attention.blocks() * BLOCK_WORDS / 4, self.attention.blocks());
        let (all, elems) = (ROWS * quads, self.attention.elems());
        let end = k.index(all);
        k.for_each((self.place.thread, end, THREADS * LOADS), |k, first| {
            let numbers: Vec<Val> = (0..LOADS).map(|i| k.add_const(first, i * THREADS)).collect();
            let words: Vec<[Val; 4]> = numbers
                .iter()
                .map(|&number| {
                    let last = k.index(all - 1);
                    let number = k.min_i64(number, last);
                    let (row, at) = (k.div_const(number, quads), k.rem_const(number, quads));
                    let (block, quad) = (k.div_const(at, 4), k.rem_const(at, 4));
                    let of = self.row_of(k, row);
                    let one = k.const_i64(1);
                    let last = k.sub(self.tokens.count, one);
                    let token = k.min_i64(of.token, last);
                    let t = k.add(self.tokens.first, token);
                    let q = self.attention.row(k, self.attention.q, t, of.head);
                    of_floats(k, q, elems, Quad { block, quad }, Parts::One)[0]
                })
                .collect();
            debug_assert_eq!(quads, 4 * blocks);
            for (number, words) in numbers.into_iter().zip(words) {
                let exists = k.cmp(Pred::Lt, number, end);
                k.if_then(exists, |k| {
                    let (row, at) = (k.div_const(number, quads), k.rem_const(number, quads));
                    let to = row_ptr(k, self.smem.q, row, self.smem.key_words);
                    let (at, words) = (k.mul_const(at, 4), k.quad(words));
                    k.store(to, at, words);
                });
            }
        });
    }

    /// This thread's share of keys and values of the stage that begins at `first`; of positions that nobody sees those of the last that somebody does.
    fn load(&self, k: &mut KernelBuilder, first: Val, end: Val) -> Loaded {
        let pages = &self.attention.pages;
        let one = k.const_i64(1);
        let last = k.sub(end, one);
        let first = {
            let within = k.rem_const(last, POSITIONS);
            let last_first = k.sub(last, within);
            k.min_i64(first, last_first)
        };
        let (page, first_row) = (k.div_const(first, pages.page_tokens), k.rem_const(first, pages.page_tokens));
        let (keys, values) = pages.block(k, self.tokens.sequence, page, self.kv_head);
        let last = k.sub(last, first);
        let quads = self.attention.blocks() * BLOCK_WORDS / 4;
        let words = |k: &mut KernelBuilder, rows: Val, position: Val, at: Val| {
            let position = k.min_i64(position, last);
            let number = k.add(first_row, position);
            let (block, quad) = (k.div_const(at, 4), k.rem_const(at, 4));
            Raw::load(k, pages, (rows, number), Quad { block, quad })
        };
        let mut loaded = Loaded { keys: Vec::new(), values: Vec::new() };
        self.clamped(k, POSITIONS * quads, |k, number| {
            let (position, at) = (k.div_const(number, quads), k.rem_const(number, quads));
            loaded.keys.push(words(k, keys, position, at));
        });
        self.clamped(k, POSITIONS / 2 * quads, |k, number| {
            let (pair, at) = (k.div_const(number, quads), k.rem_const(number, quads));
            let first = k.mul_const(pair, 2);
            let second = k.add_const(first, 1);
            loaded.values.push([first, second].map(|position| words(k, values, position, at)));
        });
        loaded
    }

    /// As [`Self::share`], but a thread whose share does not exist does the last one's.
    fn clamped(&self, k: &mut KernelBuilder, count: u64, mut body: impl FnMut(&mut KernelBuilder, Val)) {
        for first in (0..count).step_by(THREADS as usize) {
            let number = k.add_const(self.place.thread, first);
            let last = k.index(count - 1);
            let number = if first + THREADS <= count { number } else { k.min_i64(number, last) };
            body(k, number);
        }
    }

    /// Puts what was loaded where the products find it.
    fn put(&self, k: &mut KernelBuilder, stage: Val, loaded: &Loaded) {
        let pages = &self.attention.pages;
        let quads = self.attention.blocks() * BLOCK_WORDS / 4;
        let keys = row_ptr(k, self.smem.keys, stage, POSITIONS * self.smem.key_words);
        let mut words = loaded.keys.iter();
        self.share(k, POSITIONS * quads, |k, number| {
            let (position, at) = (k.div_const(number, quads), k.rem_const(number, quads));
            let to = row_ptr(k, keys, position, self.smem.key_words);
            let words = words.next().expect("as many as were loaded").words(k, pages);
            let (at, words) = (k.mul_const(at, 4), k.quad(words));
            k.store(to, at, words);
        });
        let values = row_ptr(k, self.smem.values, stage, POSITIONS / 2 * self.smem.value_words);
        let mut words = loaded.values.iter();
        self.share(k, POSITIONS / 2 * quads, |k, number| {
            let (pair, at) = (k.div_const(number, quads), k.rem_const(number, quads));
            let to = row_ptr(k, values, pair, self.smem.value_words);
            let (block, quad) = (k.div_const(at, 4), k.rem_const(at, 4));
            let [first, second] = words.next().expect("as many as were loaded").map(|raw| raw.words(k, pages));
            let both = [0, 1, 2, 3].map(|i: usize| across(k, first[i], second[i]));
            let (at, own) = (k.mul_const(block, BLOCK_ELEMS), k.mul_const(quad, 4));
            let at = k.add(at, own);
            for half in 0..2 {
                let at = k.add_const(at, half * BLOCK_ELEMS / 2);
                let words = k.quad(both.map(|b| b[half as usize]));
                k.store(to, at, words);
            }
        });
    }

    /// The sums after the positions of a stage.
    fn stage(&self, k: &mut KernelBuilder, first: Val, stage: Val, sums: &Sums) -> Sums {
        let scores = self.score(k, stage);
        let scores = self.seen(k, first, scores);
        let (weights, sums) = self.soften(k, &scores, sums);
        Sums { o: self.weigh(k, stage, &weights, sums.o), ..sums }
    }

    /// For each product the scores of rows `g` and `g + 8`, two positions each.
    fn score(&self, k: &mut KernelBuilder, stage: Val) -> Vec<Val> {
        let keys = row_ptr(k, self.smem.keys, stage, POSITIONS * self.smem.key_words);
        let row = k.mul_const(self.place.warp, WARP_ROWS);
        let row = k.add(row, self.g);
        let rows = [0, 8].map(|i| {
            let row = k.add_const(row, i);
            row_ptr(k, self.smem.q, row, self.smem.key_words)
        });
        let none = k.splat_f32(4, 0.0);
        let mut sums = vec![none; (POSITIONS / KEYS) as usize];
        for block in 0..self.attention.blocks() {
            let own = k.mul_const(self.q, 4);
            let at = k.add_const(own, block * BLOCK_WORDS);
            let load = |k: &mut KernelBuilder, row: Val| {
                let words = k.load(DType::I32, 4, row, at);
                four(k, words)
            };
            let [upper, lower] = rows.map(|row| load(k, row));
            for (n, sum) in (0..).zip(&mut sums) {
                let position = k.add_const(self.g, n * KEYS);
                let row = row_ptr(k, keys, position, self.smem.key_words);
                let key = load(k, row);
                for i in [0, 2] {
                    let a = [upper[i], lower[i], upper[i + 1], lower[i + 1]];
                    *sum = k.mma(DType::BF16, a, [key[i], key[i + 1]], *sum);
                }
            }
        }
        sums
    }

    /// The scores, and whether they are seen: of each product two of row `g`, then two of row `g + 8`.
    fn seen(&self, k: &mut KernelBuilder, first: Val, sums: Vec<Val>) -> Vec<[(Val, Val); 4]> {
        let row = k.mul_const(self.place.warp, WARP_ROWS);
        let row = k.add(row, self.g);
        let own = [0, 8].map(|i| {
            let row = k.add_const(row, i);
            let of = self.row_of(k, row);
            let own = k.add(self.tokens.position, of.token);
            // a row that does not exist sees nothing
            let none = k.const_i64(-1);
            k.select(of.exists, own, none)
        });
        let pair = k.mul_const(self.q, 2);
        let first = k.add(first, pair);
        let (scale, lowest) = (k.const_f32(self.attention.scale), k.const_f32(LOWEST));
        let of = |(n, sum): (u64, Val)| {
            let sum = four(k, sum);
            [0, 1, 2, 3].map(|i: usize| {
                let position = k.add_const(first, n * KEYS + i as u64 % 2);
                let sees = k.cmp(Pred::Le, position, own[i / 2]);
                let score = k.fmul(sum[i], scale);
                (k.select(sees, score, lowest), sees)
            })
        };
        (0..).zip(sums).map(of).collect()
    }

    /// Scores to probabilities relative to the new maxima, as operands A of the products that weigh; the sums before are scaled to them.
    fn soften(&self, k: &mut KernelBuilder, scores: &[[(Val, Val); 4]], before: &Sums) -> (Vec<[Val; 4]>, Sums) {
        let max = [0, 1].map(|row: usize| {
            let own = scores.iter().flat_map(|s| &s[2 * row..2 * row + 2]);
            let max = own.fold(before.max[row], |max, &(s, _)| k.fmax(max, s));
            of_four(k, max, |k, a, b| k.fmax(a, b))
        });
        let change = [0, 1].map(|row: usize| merge::factor(k, before.max[row], max[row]));
        let nothing = k.const_f32(0.0);
        let mut added = [nothing; 2];
        let mut words = Vec::new();
        for scores in scores {
            let p = [0, 1, 2, 3].map(|i: usize| {
                let (score, sees) = scores[i];
                let p = merge::factor(k, score, max[i / 2]);
                let p = k.select(sees, p, nothing);
                added[i / 2] = k.fadd(added[i / 2], p);
                p
            });
            words.push([[p[0], p[1]], [p[2], p[3]]].map(|pair| pack(k, pair, Parts::One)[0]));
        }
        let sum = [0, 1].map(|row: usize| {
            let added = of_four(k, added[row], |k, a, b| k.fadd(a, b));
            k.fma(before.sum[row], change[row], added)
        });
        let o = self.rescale(k, (before.max, max), change, &before.o);
        let weights = words.chunks(2).map(|w| [w[0][0], w[0][1], w[1][0], w[1][1]]).collect();
        (weights, Sums { o, max, sum })
    }

    /// `o · change`, if a maximum of the warp's rows has changed: else each change is 1.
    fn rescale(&self, k: &mut KernelBuilder, max: ([Val; 2], [Val; 2]), change: [Val; 2], o: &[Val]) -> Vec<Val> {
        let (yes, no) = (k.const_i32(1), k.const_i32(0));
        let changed = [0, 1].map(|row: usize| {
            let changed = k.cmp(Pred::Ne, max.0[row], max.1[row]);
            k.select(changed, yes, no)
        });
        let changed = k.or(changed[0], changed[1]);
        let changed = k.warp_max(changed);
        let changed = k.cmp(Pred::Ne, changed, no);
        let scale = |k: &mut KernelBuilder| {
            let factors = k.quad([change[0], change[0], change[1], change[1]]);
            o.iter().map(|&o| k.fmul(o, factors)).collect()
        };
        k.if_else(changed, scale, |_| o.to_vec())
    }

    /// Adds values times probabilities: product `4 b + i` has elements `32 b + 4 n + i` of values for columns `n`.
    fn weigh(&self, k: &mut KernelBuilder, stage: Val, weights: &[[Val; 4]], mut o: Vec<Val>) -> Vec<Val> {
        let values = row_ptr(k, self.smem.values, stage, POSITIONS / 2 * self.smem.value_words);
        let own = k.mul_const(self.g, 4);
        for (n, &weights) in (0..).zip(weights) {
            let rows = [0, 4].map(|i| {
                let pair = k.add_const(self.q, n * WEIGHED / 2 + i);
                row_ptr(k, values, pair, self.smem.value_words)
            });
            for (block, o) in (0..).zip(o.chunks_mut(4)) {
                let at = k.add_const(own, block * BLOCK_ELEMS);
                let [first, second] = rows.map(|row| {
                    let words = k.load(DType::I32, 4, row, at);
                    four(k, words)
                });
                for (i, o) in o.iter_mut().enumerate() {
                    *o = k.mma(DType::BF16, weights, [first[i], second[i]], *o);
                }
            }
        }
        o
    }

    /// Stores the output of this thread's rows: eight neighbouring elements of each block.
    fn finish(&self, k: &mut KernelBuilder, sums: &Sums) {
        let row = k.mul_const(self.place.warp, WARP_ROWS);
        let row = k.add(row, self.g);
        for half in 0..2 {
            let row = k.add_const(row, 8 * half);
            let of = self.row_of(k, row);
            k.if_then(of.exists, |k| {
                let t = k.add(self.tokens.first, of.token);
                let own = k.mul_const(self.q, 8);
                for (block, o) in (0..).zip(sums.o.chunks(4)) {
                    let o: Vec<[Val; 4]> = o.iter().map(|&o| four(k, o)).collect();
                    for i in 0..2 {
                        let at = k.add_const(own, block * BLOCK_ELEMS + 4 * i);
                        let values = [0, 1, 2, 3].map(|n: usize| o[n][(2 * half + i) as usize]);
                        let store = |k: &mut KernelBuilder| {
                            self.attention.finish_four(k, values, sums.sum[half as usize], (t, of.head, at));
                        };
                        if (block + 1) * BLOCK_ELEMS <= self.attention.elems() {
                            store(k);
                        } else {
                            let end = k.index(self.attention.elems());
                            let exists = k.cmp(Pred::Lt, at, end);
                            k.if_then(exists, store);
                        }
                    }
                }
            });
        }
    }

    fn zero_out(&self, k: &mut KernelBuilder) {
        let first = k.mul_const(self.kv_head, self.attention.shared);
        let zero = k.const_i64(0);
        k.for_each((zero, self.tokens.count, 1), |k, i| {
            let t = k.add(self.tokens.first, i);
            k.for_range(self.attention.shared, 1, |k, h| {
                let head = k.add(first, h);
                let end = k.index(self.attention.elems());
                self.attention.zero_out(k, (self.place.thread, end, THREADS), (t, head));
            });
        });
    }
}
