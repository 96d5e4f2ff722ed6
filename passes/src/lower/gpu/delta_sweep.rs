//! The chunks of [`super::delta_long`], one after the other: a block some columns of a value head of a sequence.
//!
//! warp     16 columns of the state, of all rows, in f32 in its registers, as Sᵀ; nothing goes from one such warp to another
//! stage    the other warps bring what the next chunk needs to shared memory, while this one is computed
//! errors   Rᵀ = β (Vᵀ − exp(g) ∘ Sᵀ·Kᵀ)
//! updates  Dᵀ = Rᵀ + Rᵀ·Lᵀ
//! out      Oᵀ = exp(g) ∘ Sᵀ·Qᵀ + Dᵀ·Pᵀ, to where the norm finds it
//! state    Sᵀ ← exp(g_C) Sᵀ + (exp(g_C − g) ∘ Dᵀ)·K, the operand K from the same words
//! products 272 of fragments (16 by 8 by 16) a chunk and warp, if a key has 128 elements; each operand B is read by all warps, which takes shared memory as long as it takes a
//!          scheduler to multiply
//!
//! Sums of one product are operand A of the next as they lie: of two tiles of 8 tokens each, and of Sᵀ of two tiles whose columns are the even and the odd rows of 16 of S.

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::types::CHUNK_TOKENS;

use super::super::delta_rule::{Mixer, Run};
use super::super::matmul::row_ptr;
use super::Place;
use super::attention::{Parts, across, four, pack};
use super::delta_long::{Chunk, FRAGMENT_WORDS, Handed, Long, THREADS, TILE, is_swept};
use super::delta_within::operands;
use super::lanes_of;

/// Loads of a thread of theirs that are in flight.
const LOADS: u64 = 8;
/// Tokens of a product.
const TOKENS: u64 = 8;
/// Products over the tokens of a chunk.
const PRODUCTS: usize = (CHUNK_TOKENS / TOKENS) as usize;

impl Long<'_> {
    /// The tail, in so many slices of a value head.
    pub(super) fn sweep(&self, k: &mut KernelBuilder, slices: u64) {
        let (mixer, handed) = (self.mixer, self.handed);
        let partials = k.partials(DType::F32, handed.words());
        let stage_words = 2 * CHUNK_TOKENS * handed.stride() + Handed::VALUES_AT;
        let stages = k.shared(DType::I32, 2 * stage_words);
        let (place, task) = (Place::here(k), k.task());
        let (pair, slice) = (k.div_const(task, slices), k.rem_const(task, slices));
        let (b, value_head) = (k.div_const(pair, mixer.v.heads), k.rem_const(pair, mixer.v.heads));
        k.wait();
        let run = self.sequences.run(k, b);
        let works = is_swept(k, &run);
        let shared = mixer.shared_heads();
        let (head, own) = (k.div_const(value_head, shared), k.rem_const(value_head, shared));
        let state = mixer.state(k, run.slot, value_head);
        let (g, q) = (k.div_const(place.lane, 4), k.rem_const(place.lane, 4));
        let tile = k.mul_const(slice, self.tiles);
        let tile = k.add(tile, place.warp);
        let column = k.mul_const(tile, TILE);
        let column = k.add(column, g);
        let bringers_from = k.index(self.tiles);
        let multiplies = k.cmp(Pred::Lt, place.warp, bringers_from);
        let first_chunk = Self::first_chunk(k, b, run.begin);
        let sweep = Sweep {
            mixer,
            handed,
            place,
            g,
            q,
            run,
            value_head,
            state,
            column,
            multiplies,
            first_bringer: 32 * self.tiles,
            stages,
            stage_words,
            partials,
            key: (head, own),
            first_chunk,
        };
        k.if_then(works, |k| sweep.run(k));
    }
}

/// A block at work on some columns of a value head.
struct Sweep<'a> {
    mixer: &'a Mixer,
    handed: Handed,
    place: Place,
    /// Which eight and which four of a warp's threads this is.
    g: Val,
    q: Val,
    run: Run,
    value_head: Val,
    /// Pointer to the state.
    state: Val,
    /// The first of this thread's two columns; the other is eight further.
    column: Val,
    /// Whether its warp has columns; else it brings what is next.
    multiplies: Val,
    /// The first thread that does.
    first_bringer: u64,
    /// Two stages of `stage_words` words: K and Q, `[64][stride]` each, then P, L and gates as they are handed over.
    stages: Val,
    stage_words: u64,
    partials: Val,
    /// The key head, and the value head among those that share it.
    key: (Val, Val),
    /// The number of the run's first chunk in the step.
    first_chunk: Val,
}

/// The state's rows that a product takes at once.
const STEP: u64 = 16;

impl Sweep<'_> {
    fn run(&self, k: &mut KernelBuilder) {
        let (zero, position) = (k.const_i64(0), self.run.position(k));
        let chunks = Chunk::all(k, &self.run, position);
        let (none, nothing) = (k.splat_f32(4, 0.0), k.splat_f32(2, 0.0));
        let (tiles, values) = (2 * self.steps() as usize, 2 * PRODUCTS);
        let empty = [vec![none; tiles], vec![nothing; values]].concat();
        let begin = k.if_else(
            self.multiplies,
            |k| {
                let state = self.begin(k);
                [state, self.values(k, zero)].concat()
            },
            |k| {
                self.bring(k, zero, zero);
                empty
            },
        );
        k.barrier();
        let left = k.for_carry((zero, chunks, 1), &begin, |k, chunk, carried| {
            let next = k.add_const(chunk, 1);
            let more = k.cmp(Pred::Lt, next, chunks);
            let [stage, other] = [chunk, next].map(|n| k.rem_const(n, 2));
            let carried = k.if_else(
                self.multiplies,
                |k| {
                    let (state, values) = carried.split_at(tiles);
                    // of the last chunk again where there is none
                    let next = k.select(more, next, chunk);
                    self.chunk(k, (position, chunk, next), stage, (state, values))
                },
                |k| {
                    k.if_then(more, |k| self.bring(k, next, other));
                    carried.to_vec()
                },
            );
            k.barrier();
            carried
        });
        k.if_then(self.multiplies, |k| self.store_state(k, &left[..tiles]));
    }

    /// Steps of a product over the elements of a key.
    const fn steps(&self) -> u64 {
        self.handed.keys / STEP
    }

    /// Pointer to what is handed over of a chunk of the run.
    fn handed_over(&self, k: &mut KernelBuilder, chunk: Val) -> Val {
        let number = k.add(self.first_chunk, chunk);
        let task = k.mul_const(number, self.mixer.q.heads);
        let task = k.add(task, self.key.0);
        row_ptr(k, self.partials, task, self.handed.words())
    }

    /// Pointer to that of the value head.
    fn of_head(&self, k: &mut KernelBuilder, from: Val) -> Val {
        let bytes = k.index(self.handed.heads_at() * 4);
        let heads = k.offset(from, bytes);
        row_ptr(k, heads, self.key.1, self.handed.head_words())
    }

    /// Brings what a chunk needs to a stage.
    fn bring(&self, k: &mut KernelBuilder, chunk: Val, stage: Val) {
        let from = self.handed_over(k, chunk);
        let head = self.of_head(k, from);
        let to = row_ptr(k, self.stages, stage, self.stage_words);
        let first = k.index(self.first_bringer);
        let thread = k.sub(self.place.thread, first);
        let row_quads = self.handed.row_words() / 4;
        let (row, at) = (k.div_const(thread, row_quads), k.rem_const(thread, row_quads));
        let (row, at) = (k.mul_const(row, self.handed.stride()), k.mul_const(at, 4));
        let own = k.add(row, at);
        let rows = row_ptr(k, to, own, 1);
        let rows_further = self.bringers() / row_quads * self.handed.stride();
        self.copy(k, thread, (from, rows), 2 * CHUNK_TOKENS * row_quads, rows_further);
        let (bytes, own) = (k.index(2 * CHUNK_TOKENS * self.handed.stride() * 4), k.mul_const(thread, 4));
        let to = k.offset(to, bytes);
        let to = row_ptr(k, to, own, 1);
        self.copy(k, thread, (head, to), Handed::VALUES_AT / 4, 4 * self.bringers());
    }

    /// Threads that bring what is next: whole rows at once.
    const fn bringers(&self) -> u64 {
        THREADS - self.first_bringer
    }

    /// Copies quads: of each round this thread's goes to a place so many words further than that of the round before.
    fn copy(&self, k: &mut KernelBuilder, thread: Val, (from, to): (Val, Val), quads: u64, further: u64) {
        let own = k.mul_const(thread, 4);
        let from = row_ptr(k, from, own, 1);
        let load = |k: &mut KernelBuilder, round: u64| {
            let at = k.index(round * 4 * self.bringers());
            k.load(DType::I32, 4, from, at)
        };
        let store = |k: &mut KernelBuilder, round: u64, words: Val| {
            let at = k.index(round * further);
            k.store(to, at, words);
        };
        let whole = quads / self.bringers();
        for first in (0..whole).step_by(LOADS as usize) {
            let rounds = first..whole.min(first + LOADS);
            let loaded: Vec<Val> = rounds.clone().map(|round| load(k, round)).collect();
            rounds.zip(loaded).for_each(|(round, words)| store(k, round, words));
        }
        let left = quads % self.bringers();
        if left > 0 {
            let end = k.index(left);
            let exists = k.cmp(Pred::Lt, thread, end);
            k.if_then(exists, |k| {
                let words = load(k, whole);
                store(k, whole, words);
            });
        }
    }

    /// This thread's numbers of V of a chunk: for each eight tokens two neighbours of its first column, then of its second.
    fn values(&self, k: &mut KernelBuilder, chunk: Val) -> Vec<Val> {
        let from = self.handed_over(k, chunk);
        let (head, bytes) = (self.of_head(k, from), k.index(Handed::VALUES_AT * 4));
        let values = k.offset(head, bytes);
        let pair = k.mul_const(self.q, 2);
        let columns = [0, 8].map(|n| {
            let column = k.add_const(self.column, n);
            row_ptr(k, values, column, CHUNK_TOKENS)
        });
        (0..PRODUCTS as u64)
            .flat_map(|n| {
                let at = k.add_const(pair, n * TOKENS);
                columns.map(|column| k.load(DType::F32, 2, column, at))
            })
            .collect()
    }

    /// Runs `body(row, is there one)` for the rows of S that this thread has of 16: four neighbours.
    fn rows(&self, k: &mut KernelBuilder, step: u64, mut body: impl FnMut(&mut KernelBuilder, Val, Option<Val>)) {
        let own = k.mul_const(self.q, 4);
        for n in 0..4 {
            let row = k.add_const(own, step * STEP + n);
            let end = k.index(self.mixer.k.width);
            let exists = ((step + 1) * STEP > self.mixer.k.width).then(|| k.cmp(Pred::Lt, row, end));
            body(k, row, exists);
        }
    }

    /// This thread's numbers of two tiles of Sᵀ in the order of their rows of S: of the first column, then of the second.
    fn by_rows(k: &mut KernelBuilder, tiles: &[Val]) -> [[Val; 2]; 4] {
        let [even, odd] = [four(k, tiles[0]), four(k, tiles[1])];
        [[even[0], even[2]], [odd[0], odd[2]], [even[1], even[3]], [odd[1], odd[3]]]
    }

    /// The tiles of these.
    fn of_rows(k: &mut KernelBuilder, rows: &[[Val; 2]]) -> [Val; 2] {
        [0, 1].map(|odd: usize| {
            let [first, second] = [rows[odd], rows[odd + 2]];
            k.quad([first[0], second[0], first[1], second[1]])
        })
    }

    /// The index of a row of S in this thread's first column.
    fn state_at(&self, k: &mut KernelBuilder, row: Val) -> Val {
        let at = k.mul_const(row, self.handed.values);
        k.add(at, self.column)
    }

    /// The state before the run: zeros where the sequence has no past, after the accepted tokens of a tentative step.
    fn begin(&self, k: &mut KernelBuilder) -> Vec<Val> {
        let fresh = self.run.is_fresh(k);
        let none = k.splat_f32(4, 0.0);
        let (zero, nothing) = (k.const_i64(0), k.const_f32(0.0));
        let load = |k: &mut KernelBuilder| {
            let mut tiles = Vec::new();
            for step in 0..self.steps() {
                let mut rows = Vec::new();
                self.rows(k, step, |k, row, exists| {
                    let load = |k: &mut KernelBuilder| {
                        let at = self.state_at(k, row);
                        [0, 8].map(|n| {
                            let at = k.add_const(at, n);
                            k.load_f32(self.state, at)
                        })
                    };
                    rows.push(match exists {
                        None => load(k),
                        Some(exists) => {
                            let pair = k.if_else(exists, |k| load(k).to_vec(), |_| vec![nothing; 2]);
                            [pair[0], pair[1]]
                        }
                    });
                });
                tiles.extend(Self::of_rows(k, &rows));
            }
            tiles
        };
        let state = k.if_else(fresh, |_| vec![none; 2 * self.steps() as usize], load);
        k.for_carry((zero, self.run.replay, 1), &state, |k, i, state| self.replay(k, i, state))
    }

    /// `S ← fma(k, d, α S)` of kept token `i`, as in short runs.
    fn replay(&self, k: &mut KernelBuilder, i: Val, state: &[Val]) -> Vec<Val> {
        let ([key, d, alpha], zero, nothing) = (self.mixer.update(k, self.state, i), k.const_i64(0), k.const_f32(0.0));
        let alpha = k.load_f32(alpha, zero);
        let d = [0, 8].map(|n| {
            let column = k.add_const(self.column, n);
            k.load_f32(d, column)
        });
        let mut next = Vec::new();
        for (step, tiles) in (0..).zip(state.chunks(2)) {
            let (before, mut rows) = (Self::by_rows(k, tiles).into_iter(), Vec::new());
            let mut before = before;
            self.rows(k, step, |k, row, exists| {
                let ki = match exists {
                    None => k.load_f32(key, row),
                    Some(exists) => k.if_else(exists, |k| vec![k.load_f32(key, row)], |_| vec![nothing])[0],
                };
                let pair = before.next().expect("as many as rows");
                rows.push([0, 1].map(|n: usize| {
                    let decayed = k.fmul(alpha, pair[n]);
                    k.fma(ki, d[n], decayed)
                }));
            });
            next.extend(Self::of_rows(k, &rows));
        }
        next
    }

    fn store_state(&self, k: &mut KernelBuilder, state: &[Val]) {
        for (step, tiles) in (0..).zip(state.chunks(2)) {
            let mut pairs = Self::by_rows(k, tiles).into_iter();
            self.rows(k, step, |k, row, exists| {
                let pair = pairs.next().expect("as many as rows");
                let put = |k: &mut KernelBuilder| {
                    let at = self.state_at(k, row);
                    for (n, x) in (0..).zip(pair) {
                        let at = k.add_const(at, 8 * n);
                        k.store(self.state, at, x);
                    }
                };
                match exists {
                    None => put(k),
                    Some(exists) => k.if_then(exists, put),
                }
            });
        }
    }

    /// A chunk, whose operands lie in a stage, through the state; gives it, and V of the next.
    fn chunk(
        &self,
        k: &mut KernelBuilder,
        (position, number, next): (Val, Val, Val),
        stage: Val,
        (state, values): (&[Val], &[Val]),
    ) -> Vec<Val> {
        let stage = Stage::at(k, self, stage);
        let operand = self.state_operand(k, state);
        let known = self.times_rows(k, &operand, stage.keys);
        let errors = self.errors(k, &stage, &known, values);
        let out = self.times_rows(k, &operand, stage.queries);
        let out = stage.scaled(k, self.q, BEGIN, out);
        let updates = self.updates(k, &stage, errors);
        let kept = stage.scaled(k, self.q, END, updates.clone());
        let kept = token_operands(k, &kept, Parts::One);
        let updates = token_operands(k, &updates, Parts::Sum);
        let chunk = Chunk::of(k, &self.run, position, number);
        self.say(k, &stage, &chunk, (&updates, out));
        let values = self.values(k, next);
        [self.update(k, &stage, state, &kept), values].concat()
    }

    /// `Rᵀ = β (Vᵀ − exp(g) ∘ Sᵀ·Kᵀ)`.
    fn errors(&self, k: &mut KernelBuilder, stage: &Stage, known: &[Val], values: &[Val]) -> Vec<Val> {
        let error = |(n, &known): (usize, &Val)| {
            let [first, second] = [values[2 * n], values[2 * n + 1]].map(|x| lanes_of(k, x));
            let v = k.quad([first[0], first[1], second[0], second[1]]);
            let [begin, beta] = [BEGIN, BETA].map(|which| stage.gate(k, self.q, which, n as u64));
            let known = k.fmul(begin, known);
            let missing = k.fsub(v, known);
            k.fmul(beta, missing)
        };
        known.iter().enumerate().map(error).collect()
    }

    /// The state as operand A of the steps of [`operands`].
    fn state_operand(&self, k: &mut KernelBuilder, state: &[Val]) -> Vec<[Val; 4]> {
        let mut steps = Vec::new();
        for group in state.chunks(8) {
            let tiles: Vec<[Val; 4]> = group.iter().map(|&tile| four(k, tile)).collect();
            for word in 0..2 {
                for blocks in tiles.chunks(4) {
                    let words = blocks.chunks(2).flat_map(|tile| [word, word + 2].map(|i| [tile[0][i], tile[1][i]]));
                    let words: Vec<Val> = words.map(|[even, odd]| k.pack(DType::BF16, even, odd)).collect();
                    steps.push([words[0], words[1], words[2], words[3]]);
                }
            }
        }
        steps
    }

    /// `Sᵀ·Xᵀ` for the rows of K or Q: for each eight tokens.
    fn times_rows(&self, k: &mut KernelBuilder, state: &[[Val; 4]], rows: Val) -> Vec<Val> {
        let none = k.splat_f32(4, 0.0);
        let rows: Vec<Val> = (0..PRODUCTS as u64)
            .map(|n| {
                let row = k.add_const(self.g, n * TOKENS);
                row_ptr(k, rows, row, self.handed.stride())
            })
            .collect();
        let mut sums = vec![none; PRODUCTS];
        for (group, steps) in (0..).zip(state.chunks(4)) {
            for (sum, &row) in sums.iter_mut().zip(&rows) {
                let b = operands(k, row, self.q, group);
                for (&a, b) in steps.iter().zip(b) {
                    *sum = k.mma(DType::BF16, a, b, *sum);
                }
            }
        }
        sums
    }

    /// `Dᵀ = Rᵀ + Rᵀ·Lᵀ`.
    fn updates(&self, k: &mut KernelBuilder, stage: &Stage, errors: Vec<Val>) -> Vec<Val> {
        let (operands, mut updates) = (token_operands(k, &errors, Parts::One), errors);
        for block in 0..PRODUCTS / 2 {
            for (step, a) in operands.iter().enumerate().take(block + 1) {
                let words = stage.fragment(k, &self.place, stage.inverse, fragment(block, step));
                for half in 0..2 {
                    let sum = &mut updates[2 * block + half];
                    *sum = k.mma(DType::BF16, a[0], [words[2 * half], words[2 * half + 1]], *sum);
                }
            }
        }
        updates
    }

    /// Stores `Oᵀ`, which is `out` and `Dᵀ·Pᵀ`.
    fn say(
        &self,
        k: &mut KernelBuilder,
        stage: &Stage,
        chunk: &Chunk,
        (updates, mut out): (&[Vec<[Val; 4]>], Vec<Val>),
    ) {
        for (n, sum) in out.iter_mut().enumerate() {
            for (step, a) in updates.iter().enumerate().take(n / 2 + 1) {
                let at = 2 * fragment(n / 2, step) + n as u64 % 2;
                let [high0, high1, low0, low1] = stage.fragment(k, &self.place, stage.seen, at);
                *sum = k.mma(DType::BF16, a[0], [high0, high1], *sum);
                *sum = k.mma(DType::BF16, a[0], [low0, low1], *sum);
                *sum = k.mma(DType::BF16, a[1], [high0, high1], *sum);
            }
        }
        let pair = k.mul_const(self.q, 2);
        let (first, left) = (k.add(chunk.first, pair), k.sub(chunk.count, pair));
        let to = self.mixer.out_row(k, first, self.value_head);
        let to = row_ptr(k, to, self.column, 1);
        for (n, sum) in (0..).zip(out) {
            let sum = four(k, sum);
            for i in 0..2 {
                let row = k.index(n * TOKENS + i);
                let exists = k.cmp(Pred::Lt, row, left);
                k.if_then(exists, |k| {
                    for half in 0..2 {
                        let at = k.index((n * TOKENS + i) * self.mixer.v.row() + 8 * half);
                        k.store(to, at, sum[(2 * half + i) as usize]);
                    }
                });
            }
        }
    }

    /// `Sᵀ ← exp(g_C) Sᵀ + (exp(g_C − g) ∘ Dᵀ)·K`.
    fn update(&self, k: &mut KernelBuilder, stage: &Stage, state: &[Val], kept: &[Vec<[Val; 4]>]) -> Vec<Val> {
        let left = stage.left(k);
        let mut state: Vec<Val> = state.iter().map(|&s| k.fmul(left, s)).collect();
        let pair = k.mul_const(self.q, 2);
        for (step, a) in (0..).zip(kept) {
            let rows = [0, 1, 8, 9].map(|n| {
                let row = k.add_const(pair, step * STEP + n);
                row_ptr(k, stage.keys, row, self.handed.stride())
            });
            for (group, tiles) in (0..).zip(state.chunks_mut(8)) {
                let group = k.index(group);
                let at = Handed::word_at(k, group, self.g);
                let words = rows.map(|row| {
                    let words = k.load(DType::I32, 4, row, at);
                    four(k, words)
                });
                for (i, tiles) in tiles.chunks_mut(2).enumerate() {
                    let [first, second] = [0, 2].map(|n: usize| across(k, words[n][i], words[n + 1][i]));
                    for (odd, tile) in tiles.iter_mut().enumerate() {
                        *tile = k.mma(DType::BF16, a[0], [first[odd], second[odd]], *tile);
                    }
                }
            }
        }
        state
    }
}

/// The number of the fragment of a block of rows and one of columns among those on and below the diagonal.
const fn fragment(row: usize, column: usize) -> u64 {
    (row * (row + 1) / 2 + column) as u64
}

/// Numbers of eight tokens each as operand A: for each 16 tokens the rounded numbers and, of a sum, what that left over.
fn token_operands(k: &mut KernelBuilder, numbers: &[Val], parts: Parts) -> Vec<Vec<[Val; 4]>> {
    let of = |pair: &[Val]| {
        let words: Vec<Vec<Val>> = pair
            .iter()
            .flat_map(|&x| {
                let x = four(k, x);
                [[x[0], x[1]], [x[2], x[3]]].map(|pair| pack(k, pair, parts))
            })
            .collect();
        (0..words[0].len()).map(|part| [0, 1, 2, 3].map(|i: usize| words[i][part])).collect()
    };
    numbers.chunks(2).map(of).collect()
}

/// Which of the gates is `exp(g)`.
const BEGIN: u64 = 0;
/// Which is β.
const BETA: u64 = 1;
/// Which is `exp(g_C − g)`.
const END: u64 = 2;

/// What a chunk needs, in shared memory.
struct Stage {
    keys: Val,
    queries: Val,
    seen: Val,
    inverse: Val,
    gates: Val,
}

impl Stage {
    fn at(k: &mut KernelBuilder, sweep: &Sweep<'_>, number: Val) -> Self {
        let keys = row_ptr(k, sweep.stages, number, sweep.stage_words);
        let rows = CHUNK_TOKENS * sweep.handed.stride();
        let [queries, seen, inverse, gates] =
            [rows, 2 * rows, 2 * rows + Handed::INVERSE_AT, 2 * rows + Handed::GATES_AT].map(|words| {
                let bytes = k.index(words * 4);
                k.offset(keys, bytes)
            });
        Self { keys, queries, seen, inverse, gates }
    }

    /// Gate `which` of the tokens of product `n` that this thread has sums of.
    fn gate(&self, k: &mut KernelBuilder, q: Val, which: u64, n: u64) -> Val {
        let pair = k.mul_const(q, 2);
        let at = k.add_const(pair, which * CHUNK_TOKENS + n * TOKENS);
        let both = k.load(DType::F32, 2, self.gates, at);
        let both = lanes_of(k, both);
        k.quad([both[0], both[1], both[0], both[1]])
    }

    /// Numbers of all products times a gate of their tokens.
    fn scaled(&self, k: &mut KernelBuilder, q: Val, which: u64, numbers: Vec<Val>) -> Vec<Val> {
        let one = |(n, x): (u64, Val)| {
            let gate = self.gate(k, q, which, n);
            k.fmul(gate, x)
        };
        (0..).zip(numbers).map(one).collect()
    }

    /// What is left of the state after the chunk, as often as a tile has numbers.
    fn left(&self, k: &mut KernelBuilder) -> Val {
        let at = k.index(3 * CHUNK_TOKENS);
        let left = k.load_f32(self.gates, at);
        k.splat(left, 4)
    }

    /// This thread's words of a fragment.
    fn fragment(&self, k: &mut KernelBuilder, place: &Place, of: Val, number: u64) -> [Val; 4] {
        let own = k.mul_const(place.lane, 4);
        let at = k.add_const(own, number * FRAGMENT_WORDS);
        let words = k.load(DType::I32, 4, of, at);
        four(k, words)
    }
}
