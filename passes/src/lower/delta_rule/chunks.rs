//! `gated_delta_net` of long runs, in chunks of 64 tokens, by a CPU's matrix unit or its vectors: see [`unit`].
//!
//! chunk    the run's tokens between two multiples of 64 positions; rows that it lacks are zeros that decay nothing
//! keys     once a key head: convolutions and norms of q and k; K·Kᵀ, Q·Kᵀ
//! within   g summed up from the chunk's first token; P = lower(Q·Kᵀ ∘ exp(g_i − g_j)) and L = (I + A)⁻¹ − I, see [`super::within`]
//! errors   R = β (V − exp(g) ∘ K·S)
//! updates  D = R + L·R, which solves (I + A) D = R: the d of the recurrence
//! out      O = (exp(g) ∘ Q)·S + P·D, then the epilogue
//! state    S ← exp(g_C) S + Kᵀ·(exp(g_C − g) ∘ D), in f32
//! products 720 of tiles (16 by 16 by 32) a chunk and value head, if heads have 128 elements and two share a key head: 4 us at a matrix unit's limit. There bound by what
//!          is around them, SiLU of q, k, v and z and the reading of their rows above all
//!
//! Operands of products are rounded to bf16, their sums are f32; Q and K in Q·Kᵀ and K·Kᵀ, P and D in P·D are sums of two bf16, as what they lose is most of what all would
//! ([`super::split`]). Convolutions, norms, gates and L are f32. What a token may not see is multiplied with zeros, so
//! its bits depend on the tokens of its run before it, and on where in its chunk the run begins.
//!
//! Source: Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", arXiv:2406.06484 (the WY representation, the UT
//! transform); with gates: arXiv:2412.06464 and `torch_chunk_gated_delta_rule` (transformers). Those multiply with T = (I + A)⁻¹ before S is known, to have chunks
//! side by side; here they come one after the other, and `T(βV) − T(β exp(g) K) S` is `T R`.

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::shape::{LANES, pad};
use nextc_ir::target::Unit;
use nextc_ir::types::{CHUNK_TOKENS, DECODE_TOKENS};

use super::super::bulk::tiles::{RowTiles, SUMS, TOGETHER, lane_numbers};
use super::super::bulk::unit::{self, Dot};
use super::super::matmul::row_ptr;
use super::super::strips::TILE_COLUMNS;
use super::split::Split;
use super::{LEAST_LOG_DECAY, Mixer, Run, Stream, l2_normalise};

/// Chunks of a key head and the value heads that share it, in scratch.
pub(super) struct Chunks<'a> {
    pub mixer: &'a Mixer,
    unit: Unit,
    /// `[64][pad(head_k_dim)]`: queries and keys.
    q: Val,
    k: Val,
    /// The same as A.
    queries: Split,
    keys: Split,
    /// Kᵀ as B, then K as B, and Kᵀ as A.
    key_columns: Split,
    key_pairs: RowTiles,
    key_rows: RowTiles,
    /// Q·Kᵀ and K·Kᵀ: see [`Self::scores_at`].
    pub scores: Val,
    /// `[64][pad(head_v_dim)]`: V, then R.
    v: Val,
    pub gates: Gates,
    /// `[64][64]`: −A, then L.
    pub solution: Val,
    /// L as A.
    pub inverse: RowTiles,
    /// `exp(g) Q` and P as A.
    reads: RowTiles,
    pub seen: Split,
    /// S, R, D and `exp(g_C − g) D` as B.
    state: RowTiles,
    errors: RowTiles,
    updates: Split,
    kept: RowTiles,
    /// Sums of products: matrices of 32 by 32.
    sums: Val,
    /// The numbers 0 to 15.
    pub lanes: Val,
}

/// `[64]` each, of a chunk and a value head.
pub(super) struct Gates {
    /// The logarithm of the decay, from before the chunk to after each token.
    pub g: Val,
    pub beta: Val,
    /// What is left after each token of what was before the chunk, `exp(g)`.
    begin: Val,
    /// What is left after the chunk of what each token has added, `exp(g_C − g)`.
    end: Val,
}

/// Tokens of a run in one chunk.
struct Chunk<'a> {
    run: &'a Run,
    first: Val,
    count: Val,
}

impl<'a> Chunks<'a> {
    /// Whether a long run has as many inputs as windows take.
    pub fn take(mixer: &Mixer) -> bool {
        [mixer.q, mixer.k, mixer.v].iter().all(|stream| stream.taps <= DECODE_TOKENS)
    }

    /// Call it at the top level of the body.
    pub fn alloc(k: &mut KernelBuilder, mixer: &'a Mixer, unit: Unit) -> Self {
        let (dk, dv) = (pad(mixer.k.width), pad(mixer.v.width));
        let [key_rows, value_rows] = [dk, dv].map(|elems| elems.next_multiple_of(TOGETHER));
        let rows = |k: &mut KernelBuilder, elems: u64| k.alloc(DType::F32, CHUNK_TOKENS * elems);
        let tiles = RowTiles::alloc;
        Self {
            mixer,
            unit,
            q: rows(k, dk),
            k: rows(k, dk),
            queries: Split::alloc(k, CHUNK_TOKENS, dk),
            keys: Split::alloc(k, CHUNK_TOKENS, dk),
            key_columns: Split::alloc(k, CHUNK_TOKENS, dk),
            key_pairs: tiles(k, key_rows, CHUNK_TOKENS),
            key_rows: tiles(k, key_rows, CHUNK_TOKENS),
            scores: k.alloc(DType::F32, 2 * CHUNK_TOKENS * CHUNK_TOKENS),
            v: rows(k, dv),
            gates: Gates { g: rows(k, 1), beta: rows(k, 1), begin: rows(k, 1), end: rows(k, 1) },
            solution: rows(k, CHUNK_TOKENS),
            inverse: tiles(k, CHUNK_TOKENS, CHUNK_TOKENS),
            reads: tiles(k, CHUNK_TOKENS, dk),
            seen: Split::alloc(k, CHUNK_TOKENS, CHUNK_TOKENS),
            state: tiles(k, value_rows, dk),
            errors: tiles(k, value_rows, CHUNK_TOKENS),
            updates: Split::alloc(k, value_rows, CHUNK_TOKENS),
            kept: tiles(k, value_rows, CHUNK_TOKENS),
            sums: k.alloc(DType::F32, value_rows / TOGETHER * SUMS),
            lanes: lane_numbers(k),
        }
    }

    fn dots(&self, k: &mut KernelBuilder, c: Val, dots: &[Dot]) {
        unit::dots(k, self.unit, c, dots);
    }

    fn dk(&self) -> u64 {
        pad(self.mixer.k.width)
    }

    fn dv(&self) -> u64 {
        pad(self.mixer.v.width)
    }

    /// Elements of a key with whole tiles.
    fn key_elems(&self) -> u64 {
        self.dk().next_multiple_of(TILE_COLUMNS)
    }

    /// All tokens of a long run of a key head, which has a slot and has begun.
    pub fn run(&self, k: &mut KernelBuilder, run: &Run, head: Val) {
        let mixer = self.mixer;
        self.clear(k);
        mixer.for_value_heads(k, head, |k, head| {
            let state = mixer.state(k, run.slot, head);
            mixer.replay(k, run.replay, state);
        });
        let (begin, tokens) = (run.position(k), k.sub(run.end, run.begin));
        let (first, end) = (k.div_const(begin, CHUNK_TOKENS), k.add(begin, tokens));
        let first = k.mul_const(first, CHUNK_TOKENS);
        k.for_each((first, end, CHUNK_TOKENS), |k, low| {
            let high = k.add_const(low, CHUNK_TOKENS);
            let (begun, high) = (k.cmp(Pred::Lt, low, begin), k.min_i64(high, end));
            let low = k.select(begun, begin, low);
            let before = k.sub(low, begin);
            let chunk = Chunk { run, first: k.add(run.begin, before), count: k.sub(high, low) };
            self.keys(k, &chunk, head);
            mixer.for_value_heads(k, head, |k, head| self.values(k, &chunk, head));
        });
        mixer.q.take_last(k, run, head);
        mixer.k.take_last(k, run, head);
        mixer.for_value_heads(k, head, |k, head| mixer.v.take_last(k, run, head));
    }

    /// Zeros where nothing is put: what fills tiles up.
    fn clear(&self, k: &mut KernelBuilder) {
        let value_elems = self.dv().next_multiple_of(TOGETHER);
        let (zero, keys, values) = (k.const_i64(0), k.index(self.key_elems()), k.index(value_elems));
        self.key_pairs.fill(k, (zero, keys));
        for tiles in [&self.state, &self.errors, &self.updates.high, &self.updates.low, &self.kept] {
            tiles.fill(k, (zero, values));
        }
    }

    /// `silu(conv1d(x))` of a head as rows, then `body(row)`; zeros from the chunk's end on.
    fn rows(
        &self,
        k: &mut KernelBuilder,
        chunk: &Chunk<'_>,
        (stream, head, to): (&Stream, Val, Val),
        body: impl FnOnce(&mut KernelBuilder, Val),
    ) {
        let (zero, all, elems) = (k.const_i64(0), k.index(CHUNK_TOKENS), pad(stream.width));
        k.for_each((zero, chunk.count, 1), |k, i| {
            let (t, row) = (k.add(chunk.first, i), row_ptr(k, to, i, elems));
            stream.convolve(k, chunk.run, t, head, row);
            body(k, row);
        });
        k.for_each((chunk.count, all, 1), |k, i| {
            let (row, nothing) = (row_ptr(k, to, i, elems), k.splat_f32(16, 0.0));
            k.for_range(elems, LANES, |k, c| k.store(row, c, nothing));
        });
    }

    /// What the value heads share.
    fn keys(&self, k: &mut KernelBuilder, chunk: &Chunk<'_>, head: Val) {
        let mixer = self.mixer;
        let norm = |k: &mut KernelBuilder, row: Val, scale: f32| l2_normalise(k, row, mixer.k.width, mixer.eps, scale);
        self.rows(k, chunk, (&mixer.q, head, self.q), |k, row| norm(k, row, mixer.scale));
        self.rows(k, chunk, (&mixer.k, head, self.k), |k, row| norm(k, row, 1.0));
        k.for_range(CHUNK_TOKENS, 1, |k, i| {
            for (tiles, rows) in [(&self.queries, self.q), (&self.keys, self.k)] {
                let row = vectors(k, rows, i, self.dk());
                tiles.put(k, i, &row);
            }
        });
        self.keys.high.turn(k, &self.key_columns.high, CHUNK_TOKENS);
        self.keys.low.turn(k, &self.key_columns.low, CHUNK_TOKENS);
        let zero = k.const_i64(0);
        k.for_range(CHUNK_TOKENS, 2, |k, i| {
            let next = k.add_const(i, 1);
            let [even, odd] = [i, next].map(|i| vectors(k, self.k, i, self.dk()));
            self.key_pairs.put_pair(k, (i, zero), [&even, &odd]);
        });
        self.key_pairs.turn(k, &self.key_rows, self.key_elems());
        for (which, tiles) in (0..).zip([&self.queries, &self.keys]) {
            for row in blocks() {
                for column in blocks().take_while(|&column| column <= row) {
                    let at = k.index(which * CHUNK_TOKENS * CHUNK_TOKENS + Self::scores_at(row, column));
                    let (low, first, to) = (k.index(row), k.index(column), row_ptr(k, self.scores, at, 1));
                    let dots = tiles.dots(k, low, (&self.key_columns, first), tiles.high.depth());
                    self.dots(k, to, &dots);
                }
            }
        }
    }

    /// Where 16 scores of row `row` lie from column `column` on: matrices of 32 by 32.
    pub const fn scores_at(row: u64, column: u64) -> u64 {
        (row / TOGETHER * 2 + column / TOGETHER) * SUMS + row % TOGETHER * TOGETHER + column % TOGETHER
    }

    /// A chunk of one value head.
    fn values(&self, k: &mut KernelBuilder, chunk: &Chunk<'_>, head: Val) {
        let state = self.mixer.state(k, chunk.run.slot, head);
        self.rows(k, chunk, (&self.mixer.v, head, self.v), |_, _| {});
        self.gate(k, chunk, head);
        self.within(k);
        k.for_range(CHUNK_TOKENS, 1, |k, i| {
            let row = vectors(k, self.q, i, self.dk());
            let row = scaled(k, self.gates.begin, i, &row);
            self.reads.put(k, i, &row);
        });
        self.pack_state(k, state);
        for row in blocks() {
            self.errors(k, row);
        }
        for row in blocks() {
            self.updates(k, row);
        }
        for row in blocks() {
            self.outputs(k, chunk, row, head);
        }
        self.update(k, state);
    }

    /// Gates of a value head.
    fn gate(&self, k: &mut KernelBuilder, chunk: &Chunk<'_>, head: Val) {
        let (gates, zero, all, one) = (&self.gates, k.const_i64(0), k.index(CHUNK_TOKENS), k.const_i64(1));
        let last = k.sub(chunk.count, one);
        k.for_each((zero, all, 1), |k, i| {
            let within = k.min_i64(i, last);
            let t = k.add(chunk.first, within);
            let [a, b] = self.mixer.gate_inputs(k, t, head);
            k.store(gates.g, i, a);
            k.store(gates.beta, i, b);
        });
        let count = k.narrow(chunk.count);
        let (count, numbers) = (k.splat(count, 16), k.load(DType::I32, 16, self.lanes, zero));
        k.for_each((zero, all, LANES), |k, i| {
            let inputs = [gates.g, gates.beta].map(|p| k.load_f32x16(p, i));
            let (g, beta) = self.mixer.log_gate(k, head, inputs);
            let least = k.splat_f32(16, LEAST_LOG_DECAY);
            let g = k.fmax(g, least);
            let first = k.narrow(i);
            let first = k.splat(first, 16);
            let (row, nothing) = (k.add(first, numbers), k.splat_f32(16, 0.0));
            let exists = k.cmp(Pred::Lt, row, count);
            let [g, beta] = [g, beta].map(|x| k.select(exists, x, nothing));
            k.store(gates.g, i, g);
            k.store(gates.beta, i, beta);
        });
        let none = k.const_f32(0.0);
        let total = k.for_carry((zero, all, 1), &[none], |k, i, sum| {
            let g = k.load_f32(gates.g, i);
            let sum = k.fadd(sum[0], g);
            k.store(gates.g, i, sum);
            vec![sum]
        });
        let total = k.splat(total[0], 16);
        k.for_each((zero, all, LANES), |k, i| {
            let g = k.load_f32x16(gates.g, i);
            let left = k.fsub(total, g);
            let [begin, end] = [g, left].map(|x| k.exp(x));
            k.store(gates.begin, i, begin);
            k.store(gates.end, i, end);
        });
    }

    /// S as a B.
    fn pack_state(&self, k: &mut KernelBuilder, state: Val) {
        let (zero, rows) = (k.const_i64(0), self.mixer.k.width);
        k.for_range(rows / 2 * 2, 2, |k, i| {
            let next = k.add_const(i, 1);
            let [even, odd] = [i, next].map(|i| vectors(k, state, i, self.dv()));
            self.state.put_pair(k, (i, zero), [&even, &odd]);
        });
        if rows % 2 == 1 {
            let last = k.index(rows - 1);
            let (even, nothing) = (vectors(k, state, last, self.dv()), k.splat_f32(16, 0.0));
            let odd = vec![nothing; even.len()];
            self.state.put_pair(k, (last, zero), [&even, &odd]);
        }
    }

    /// `body(column, vectors)` for the columns of a value, as many as two strips have.
    fn for_columns(&self, k: &mut KernelBuilder, body: &mut dyn FnMut(&mut KernelBuilder, Val, u64)) {
        let paired = self.dv() / TOGETHER * TOGETHER;
        k.for_range(paired, TOGETHER, |k, column| body(k, column, 2));
        if paired < self.dv() {
            let last = k.index(paired);
            body(k, last, 1);
        }
    }

    /// `body(two rows, sums of each)` for the rows of a product that are neighbours, counted from the chunk's begin.
    fn for_pairs(
        &self,
        k: &mut KernelBuilder,
        (row, count): (u64, u64),
        body: impl FnOnce(&mut KernelBuilder, [Val; 2], [Vec<Val>; 2]),
    ) {
        k.for_range(TOGETHER, 2, |k, i| {
            let next = k.add_const(i, 1);
            let sums = [i, next].map(|i| {
                let from = row_ptr(k, self.sums, i, TOGETHER);
                some_vectors(k, from, count)
            });
            let rows = [i, next].map(|i| k.add_const(i, row));
            body(k, rows, sums);
        });
    }

    /// `R = β (V − exp(g) ∘ K·S)`, rows from `row` on.
    fn errors(&self, k: &mut KernelBuilder, row: u64) {
        let low = k.index(row);
        let keys = self.keys.high.two_strips(k, low);
        self.for_columns(k, &mut |k, column, count| {
            let states = self.state.two_strips(k, column);
            self.dots(k, self.sums, &[(keys, states.to_vec(), self.state.depth())]);
            self.for_pairs(k, (row, count), |k, rows, sums| {
                let errors = [0, 1].map(|n| {
                    let i = rows[n];
                    let at = self.value_at(k, i, column);
                    let values = some_vectors(k, at, count);
                    let known = scaled(k, self.gates.begin, i, &sums[n]);
                    let missing: Vec<Val> = values.iter().zip(known).map(|(&v, known)| k.fsub(v, known)).collect();
                    let errors = scaled(k, self.gates.beta, i, &missing);
                    put_vectors(k, at, &errors);
                    errors
                });
                self.errors.put_pair(k, (rows[0], column), [&errors[0], &errors[1]]);
            });
        });
    }

    /// `D = R + L·R`, rows from `row` on.
    fn updates(&self, k: &mut KernelBuilder, row: u64) {
        let low = k.index(row);
        let inverse = self.inverse.two_strips(k, low);
        self.for_columns(k, &mut |k, column, count| {
            let errors = self.errors.two_strips(k, column);
            self.dots(k, self.sums, &[(inverse, errors.to_vec(), row / TOGETHER + 1)]);
            self.for_pairs(k, (row, count), |k, rows, sums| {
                let updates = [0, 1].map(|n| {
                    let at = self.value_at(k, rows[n], column);
                    let errors = some_vectors(k, at, count);
                    errors.iter().zip(&sums[n]).map(|(&r, &sum)| k.fadd(r, sum)).collect::<Vec<Val>>()
                });
                let kept = [0, 1].map(|n| scaled(k, self.gates.end, rows[n], &updates[n]));
                self.kept.put_pair(k, (rows[0], column), [&kept[0], &kept[1]]);
                self.updates.put_pair(k, (rows[0], column), [&updates[0], &updates[1]]);
            });
        });
    }

    /// `O = (exp(g) ∘ Q)·S + P·D` and what comes after, rows from `row` on.
    fn outputs(&self, k: &mut KernelBuilder, chunk: &Chunk<'_>, row: u64, head: Val) {
        let low = k.index(row);
        let reads = self.reads.two_strips(k, low);
        self.for_columns(k, &mut |k, column, _| {
            let (state, sums) = (self.state.two_strips(k, column), row_ptr(k, self.sums, column, TOGETHER));
            let of_chunk = self.seen.dots(k, low, (&self.updates, column), row / TOGETHER + 1);
            self.dots(k, sums, &[&[(reads, state.to_vec(), self.state.depth())], &of_chunk[..]].concat());
        });
        let end = k.index(row + TOGETHER);
        let end = k.min_i64(end, chunk.count);
        let start = k.const_i64(0);
        let gates = self.mixer.z_row(k, start, head);
        k.for_each((low, end, 1), |k, i| {
            let (t, within) = (k.add(chunk.first, i), k.sub(i, low));
            chunk.run.ask_row(k, (gates, self.mixer.v.row()), t, self.mixer.v.width);
            let sums = row_ptr(k, self.sums, within, TOGETHER);
            self.mixer.epilogue(k, t, head, &|k, c| {
                let (block, within) = (k.div_const(c, TOGETHER), k.rem_const(c, TOGETHER));
                let block = k.mul_const(block, SUMS);
                let at = k.add(block, within);
                k.load_f32x16(sums, at)
            });
        });
    }

    /// `S ← exp(g_C) S + Kᵀ·(exp(g_C − g) ∘ D)`.
    fn update(&self, k: &mut KernelBuilder, state: Val) {
        let last = k.index(CHUNK_TOKENS - 1);
        k.for_range(self.key_elems(), TOGETHER, |k, row| {
            let (keys, all) = (self.key_rows.two_strips(k, row), k.index(self.mixer.k.width));
            let (left, most, zero) = (k.sub(all, row), k.index(TOGETHER), k.const_i64(0));
            let rows = k.min_i64(left, most);
            self.for_columns(k, &mut |k, column, count| {
                let kept = self.kept.two_strips(k, column);
                self.dots(k, self.sums, &[(keys, kept.to_vec(), self.kept.depth())]);
                k.for_each((zero, rows, 1), |k, i| {
                    let (from, i) = (row_ptr(k, self.sums, i, TOGETHER), k.add(row, i));
                    let at = row_ptr(k, state, i, self.dv());
                    let at = row_ptr(k, at, column, 1);
                    let (before, added) = (some_vectors(k, at, count), some_vectors(k, from, count));
                    let left = scaled(k, self.gates.begin, last, &before);
                    let after: Vec<Val> = left.iter().zip(added).map(|(&s, sum)| k.fadd(s, sum)).collect();
                    put_vectors(k, at, &after);
                });
            });
        });
    }

    /// Pointer to a column of row `i` of V or R.
    fn value_at(&self, k: &mut KernelBuilder, i: Val, column: Val) -> Val {
        let row = row_ptr(k, self.v, i, self.dv());
        row_ptr(k, row, column, 1)
    }
}

/// The first rows, or columns, of products of a chunk.
fn blocks() -> impl Iterator<Item = u64> {
    (0..CHUNK_TOKENS).step_by(TOGETHER as usize)
}

/// All vectors of row `i`.
fn vectors(k: &mut KernelBuilder, rows: Val, i: Val, elems: u64) -> Vec<Val> {
    let row = row_ptr(k, rows, i, elems);
    some_vectors(k, row, elems / LANES)
}

/// The first `count` vectors at a place.
pub(super) fn some_vectors(k: &mut KernelBuilder, at: Val, count: u64) -> Vec<Val> {
    let vector = |n| {
        let c = k.index(n * LANES);
        k.load_f32x16(at, c)
    };
    (0..count).map(vector).collect()
}

pub(super) fn put_vectors(k: &mut KernelBuilder, at: Val, vectors: &[Val]) {
    for (n, &x) in (0..).zip(vectors) {
        let c = k.index(n * LANES);
        k.store(at, c, x);
    }
}

/// Vectors times number `i` of those at `factors`.
fn scaled(k: &mut KernelBuilder, factors: Val, i: Val, vectors: &[Val]) -> Vec<Val> {
    let factor = k.load_f32(factors, i);
    let factor = k.splat(factor, 16);
    vectors.iter().map(|&x| k.fmul(factor, x)).collect()
}
