//! `gated_delta_net`, token by token: the recurrence in blocks of 32 tokens.
//!
//! replay   before the first block: S ← fma(k, d, α S) for the accepted tokens of a tentative step, with the kept k, d, α
//! conv     q, k and v: causal convolution over the window in the conv state, a ring by position, SiLU
//! sweep    some columns of S at a time, token by token: y = Sᵀk,  w = Sᵀq  over the old state, then
//!          d = β (v − α y);  o = α w + (k·q) d;  S ← fma(k, d, α S)
//! traffic  2 · 4 · head_k_dim · head_v_dim bytes a head, sequence and block: bound by memory at one token
//!
//! Several tokens sweep a copy of the columns, which is put back after them. A tentative sequence sweeps a copy of the columns and keeps k, d, α of each token; its inputs stay
//! in the window, so that the next step can replay as many as were accepted: the same operations in the same order.
//! Source: arXiv:2412.06464; the single-read form is algebra on its recurrence.

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::shape::{LANES, pad};
use nextc_ir::types::TENTATIVE_TOKENS;

use super::super::matmul::row_ptr;
use super::{Mixer, Run, dot_rows, l2_normalise};

/// Most tokens that are swept over the state together, tentative ones among them: so many that copying columns counts little.
const BLOCK: u64 = 4 * TENTATIVE_TOKENS;

/// From so many tokens of a block on its columns of the state are swept as a copy: rows that follow one another stay in the first cache, where every
/// eighth line of a matrix does not.
const COPIED_TOKENS: u64 = 3;

/// What is computed of a block of tokens, a row a token.
pub(super) struct Scratch {
    /// `[BLOCK][pad(head_k_dim)]`.
    q: Val,
    /// As `q`.
    k: Val,
    /// `[BLOCK]`: `k · q`.
    kq: Val,
    /// `[BLOCK][pad(head_v_dim)]`.
    v: Val,
    /// As `v`.
    o: Val,
    /// `[BLOCK]`.
    alpha: Val,
    /// `[BLOCK]`.
    beta: Val,
    /// `[head_k_dim][columns of a sweep]`: a part of the state, of a tentative sequence or for several tokens.
    copy: Val,
}

impl Scratch {
    pub(super) fn alloc(k: &mut KernelBuilder, mixer: &Mixer) -> Self {
        let mut rows = |width: u64| k.alloc(DType::F32, BLOCK * width);
        let (dk, dv) = (pad(mixer.k.width), pad(mixer.v.width));
        let (q, key, kq, v, o) = (rows(dk), rows(dk), rows(1), rows(dv), rows(dv));
        let (alpha, beta) = (rows(1), rows(1));
        Self { q, k: key, kq, v, o, alpha, beta, copy: k.alloc(DType::F32, mixer.k.width * mixer.sweep_elems()) }
    }
}

/// A block of tokens of one sequence.
struct Block<'a> {
    run: &'a Run,
    /// The first token.
    first: Val,
    /// How many.
    count: Val,
    /// Kept tokens that are replayed before it.
    replay: Val,
}

impl Block<'_> {
    /// Runs `body(row in scratch, token)` for each token.
    fn each(&self, k: &mut KernelBuilder, body: impl FnOnce(&mut KernelBuilder, Val, Val)) {
        let zero = k.const_i64(0);
        k.for_each((zero, self.count, 1), |k, i| {
            let t = k.add(self.first, i);
            body(k, i, t);
        });
    }
}

impl Mixer {
    /// All tokens of a run.
    pub(super) fn sweep_run(&self, k: &mut KernelBuilder, run: &Run, head: Val, scratch: &Scratch) {
        let [q_window, k_window] = self.key_windows(k, run, head);
        let zero = k.const_i64(0);
        k.for_each((run.begin, run.end, BLOCK), |k, first| {
            let (left, most) = (k.sub(run.end, first), k.index(BLOCK));
            let count = k.min_i64(left, most);
            let is_first = k.cmp(Pred::Eq, first, run.begin);
            let replay = k.select(is_first, run.replay, zero);
            let block = Block { run, first, count, replay };
            block.each(k, |k, i, t| {
                let (q, key) =
                    (row_ptr(k, scratch.q, i, pad(self.q.width)), row_ptr(k, scratch.k, i, pad(self.k.width)));
                let position = run.position_of(k, t);
                self.q.step(k, (t, position), head, q_window, q);
                self.k.step(k, (t, position), head, k_window, key);
                l2_normalise(k, q, self.q.width, self.eps, self.scale);
                l2_normalise(k, key, self.k.width, self.eps, 1.0);
                let kq = dot_rows(k, key, q, pad(self.q.width));
                k.store(scratch.kq, i, kq);
            });
            self.for_value_heads(k, head, |k, head| self.value_block(k, &block, head, scratch));
        });
    }

    /// A block of tokens of one value head.
    fn value_block(&self, k: &mut KernelBuilder, block: &Block<'_>, head: Val, scratch: &Scratch) {
        let window = self.v.window(k, block.run.slot, head);
        let state = self.state(k, block.run.slot, head);
        let zero = k.const_i64(0);
        block.each(k, |k, i, t| {
            let v = row_ptr(k, scratch.v, i, pad(self.v.width));
            let position = block.run.position_of(k, t);
            self.v.step(k, (t, position), head, window, v);
            let (alpha, beta) = self.gate(k, t, head);
            k.store(scratch.alpha, i, alpha);
            k.store(scratch.beta, i, beta);
        });
        // before anything is kept of this block, as it would overwrite what is replayed
        let columns = pad(self.v.width);
        self.replay(k, block.replay, state);
        k.if_else(
            block.run.tentative,
            |k| {
                block.each(k, |k, i, _| self.keep(k, i, state, scratch));
                k.for_range(columns, self.sweep_elems(), |k, column| {
                    self.copy_columns(k, state, scratch.copy, column);
                    let place = Columns { matrix: scratch.copy, stride: self.sweep_elems(), at: zero, column };
                    self.sweep(k, block, scratch, &place, Some(state));
                });
                Vec::new()
            },
            |k| {
                let (few, count) = (k.index(COPIED_TOKENS), block.count);
                let is_few = k.cmp(Pred::Lt, count, few);
                k.for_range(columns, self.sweep_elems(), |k, column| {
                    k.if_else(
                        is_few,
                        |k| {
                            let place = Columns { matrix: state, stride: columns, at: column, column };
                            self.sweep(k, block, scratch, &place, None);
                            Vec::new()
                        },
                        |k| {
                            self.copy_columns(k, state, scratch.copy, column);
                            let place = Columns { matrix: scratch.copy, stride: self.sweep_elems(), at: zero, column };
                            self.sweep(k, block, scratch, &place, None);
                            self.put_columns(k, scratch.copy, state, column);
                            Vec::new()
                        },
                    );
                });
                Vec::new()
            },
        );
        block.each(k, |k, i, t| {
            let o = row_ptr(k, scratch.o, i, pad(self.v.width));
            self.epilogue(k, t, head, &|k, c| k.load_f32x16(o, c));
        });
    }

    /// Vectors of columns that are swept together: two accumulators each, in half of the registers.
    fn vectors(&self) -> u64 {
        let (most, columns) = (u64::from(self.vector_bits) / 128, pad(self.v.width) / LANES);
        [4, 2, 1].into_iter().find(|&n| n <= most && columns.is_multiple_of(n)).expect("1 divides everything")
    }

    /// Columns of a sweep.
    fn sweep_elems(&self) -> u64 {
        self.vectors() * LANES
    }

    /// `S ← fma(k, d, α S)` for each of so many accepted tokens of the tentative step before.
    pub(super) fn replay(&self, k: &mut KernelBuilder, tokens: Val, state: Val) {
        k.for_range(pad(self.v.width), self.sweep_elems(), |k, column| self.replay_columns(k, tokens, state, column));
    }

    fn replay_columns(&self, k: &mut KernelBuilder, tokens: Val, state: Val, column: Val) {
        let zero = k.const_i64(0);
        let place = Columns { matrix: state, stride: pad(self.v.width), at: column, column };
        k.for_each((zero, tokens, 1), |k, i| {
            let [key, d, alpha] = self.update(k, state, i);
            let alpha = k.load_f32(alpha, zero);
            let alpha = k.splat(alpha, 16);
            let deltas: Vec<Val> = (0..self.vectors())
                .map(|c| {
                    let at = k.add_const(column, c * LANES);
                    k.load_f32x16(d, at)
                })
                .collect();
            self.apply(k, &place, key, alpha, &deltas);
        });
    }

    /// Keeps `k` and `α` of token `i` of the block; its `d` is kept as columns are swept.
    fn keep(&self, k: &mut KernelBuilder, i: Val, state: Val, scratch: &Scratch) {
        let [key, _, alpha] = self.update(k, state, i);
        let from = row_ptr(k, scratch.k, i, pad(self.k.width));
        k.for_range(pad(self.k.width), LANES, |k, c| {
            let x = k.load_f32x16(from, c);
            k.store(key, c, x);
        });
        let (zero, decay) = (k.const_i64(0), k.load_f32(scratch.alpha, i));
        k.store(alpha, zero, decay);
    }

    fn copy_columns(&self, k: &mut KernelBuilder, state: Val, copy: Val, column: Val) {
        k.for_range(self.k.width, 1, |k, i| {
            let from = row_ptr(k, state, i, pad(self.v.width));
            let to = row_ptr(k, copy, i, self.sweep_elems());
            for c in 0..self.vectors() {
                let (at, place) = (k.add_const(column, c * LANES), k.index(c * LANES));
                let x = k.load_f32x16(from, at);
                k.store(to, place, x);
            }
        });
    }

    /// Puts columns that were copied back.
    fn put_columns(&self, k: &mut KernelBuilder, copy: Val, state: Val, column: Val) {
        k.for_range(self.k.width, 1, |k, i| {
            let from = row_ptr(k, copy, i, self.sweep_elems());
            let to = row_ptr(k, state, i, pad(self.v.width));
            for c in 0..self.vectors() {
                let (place, at) = (k.index(c * LANES), k.add_const(column, c * LANES));
                let x = k.load_f32x16(from, place);
                k.store(to, at, x);
            }
        });
    }

    /// A block of the recurrence on some columns of one head's state; outputs go to `scratch.o`, and `d` to the kept updates of `keep`.
    fn sweep(&self, k: &mut KernelBuilder, block: &Block<'_>, scratch: &Scratch, place: &Columns, keep: Option<Val>) {
        let (zero, rows, zeros) = (k.const_i64(0), k.index(self.k.width), k.splat_f32(16, 0.0));
        block.each(k, |k, i, _| {
            let (key, q) = (row_ptr(k, scratch.k, i, pad(self.k.width)), row_ptr(k, scratch.q, i, pad(self.q.width)));
            let (v, o) = (row_ptr(k, scratch.v, i, pad(self.v.width)), row_ptr(k, scratch.o, i, pad(self.v.width)));
            let [alpha, beta, kq] = [scratch.alpha, scratch.beta, scratch.kq].map(|p| {
                let x = k.load_f32(p, i);
                k.splat(x, 16)
            });
            let init = vec![zeros; 2 * self.vectors() as usize];
            let sums = k.for_carry((zero, rows, 1), &init, |k, row, acc| {
                let (ki, qi) = (k.load_f32(key, row), k.load_f32(q, row));
                let (ki, qi) = (k.splat(ki, 16), k.splat(qi, 16));
                let mut next = Vec::new();
                for (c, pair) in acc.chunks(2).enumerate() {
                    let at = place.index(k, row, c as u64);
                    let s = k.load_f32x16(place.matrix, at);
                    next.push(k.fma(s, ki, pair[0]));
                    next.push(k.fma(s, qi, pair[1]));
                }
                next
            });
            let mut deltas = Vec::new();
            for (c, pair) in sums.chunks(2).enumerate() {
                let at = k.add_const(place.column, c as u64 * LANES);
                let v = k.load_f32x16(v, at);
                let decayed = k.fmul(alpha, pair[0]);
                let error = k.fsub(v, decayed);
                let d = k.fmul(beta, error);
                let mixed = k.fmul(alpha, pair[1]);
                let out = k.fma(kq, d, mixed);
                k.store(o, at, out);
                if let Some(state) = keep {
                    let [_, kept, _] = self.update(k, state, i);
                    k.store(kept, at, d);
                }
                deltas.push(d);
            }
            self.apply(k, place, key, alpha, &deltas);
        });
    }

    /// `S ← fma(k, d, α S)` on some columns: the one place where a state changes.
    fn apply(&self, k: &mut KernelBuilder, place: &Columns, key: Val, alpha: Val, deltas: &[Val]) {
        k.for_range(self.k.width, 1, |k, row| {
            let ki = k.load_f32(key, row);
            let ki = k.splat(ki, 16);
            for (c, &d) in deltas.iter().enumerate() {
                let at = place.index(k, row, c as u64);
                let s = k.load_f32x16(place.matrix, at);
                let decayed = k.fmul(alpha, s);
                let new = k.fma(ki, d, decayed);
                k.store(place.matrix, at, new);
            }
        });
    }
}

/// Some columns of a head's state.
struct Columns {
    /// Where its rows lie.
    matrix: Val,
    /// Elements from one row to the next.
    stride: u64,
    /// The first column's place in a row.
    at: Val,
    /// The first column's number.
    column: Val,
}

impl Columns {
    /// Index of vector `chunk` of row `row`.
    fn index(&self, k: &mut KernelBuilder, row: Val, chunk: u64) -> Val {
        let row = k.mul_const(row, self.stride);
        let at = k.add(row, self.at);
        k.add_const(at, chunk * LANES)
    }
}
