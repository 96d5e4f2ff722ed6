//! What the chunks of [`super::delta_long`] need that does not depend on the state: a block a chunk and a key head.
//!
//! gates    a warp a value head: g summed up from the chunk's first token, β
//! rows     a warp four tokens at a time: convolutions, SiLU and norms of q and k; as sums of two f16 to shared memory, rounded to what is handed over
//! scores   Q·Kᵀ and K·Kᵀ on and below the diagonal: a warp 16 rows of one of them
//! decays   P = Q·Kᵀ ∘ exp(g_i − g_j) for j ≤ i;  −A = −β_i K·Kᵀ ∘ exp(g_i − g_j) for j < i
//! solve    L = (I + A)⁻¹ − I in f32, a thread a column: L_i = −(A_i + Σ_{j<i} A_ij L_j), eight rows at once over all rows before them; meanwhile the other warps do
//!          the convolutions of v
//! traffic  q, k and v of 64 tokens in, what is handed over out: bound by what is computed between
//!
//! Rows that a chunk lacks are zeros that decay nothing.

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::shape::pad;
use nextc_ir::types::CHUNK_TOKENS;

use super::super::delta_rule::{LEAST_LOG_DECAY, Mixer, Run, Stream};
use super::super::matmul::row_ptr;
use super::attention::{Parts, four, pack_f16};
use super::delta_long::{Chunk, FRAGMENT_WORDS, FRAGMENTS, Handed, Long, THREADS, TILE, is_swept};
use super::{Place, begin, lanes_before, lanes_of, warp_sum};

/// Warps of a block.
const WARPS: u64 = THREADS / 32;
/// Tokens that a warp convolves at once: so few that two blocks have room for their registers.
const TOKENS: u64 = 4;
/// So many tokens in a chunk.
const GROUPS: u64 = CHUNK_TOKENS / TOKENS;
/// Rows that are solved together.
const ROWS: u64 = 8;
/// Elements from one row of scores to the next: so that rows lie in different banks.
const SCORES_STRIDE: u64 = CHUNK_TOKENS + 8;
/// The same of A.
const SYSTEM_STRIDE: u64 = CHUNK_TOKENS + 4;

impl Long<'_> {
    /// The body.
    pub(super) fn within(&self, k: &mut KernelBuilder) {
        let (mixer, handed) = (self.mixer, self.handed);
        let partials = k.partials(DType::F32, handed.words());
        // the value heads of a turn: as many as threads solve and others convolve meanwhile
        let together = if handed.shared.is_multiple_of(2) { 2 } else { 1 };
        let of_rows = 4 * CHUNK_TOKENS * handed.stride();
        let of_turn = together * CHUNK_TOKENS * (SYSTEM_STRIDE + CHUNK_TOKENS);
        let rows = k.shared(DType::I32, of_rows.max(of_turn));
        let scores = k.shared(DType::F32, 2 * CHUNK_TOKENS * SCORES_STRIDE);
        let gates = k.shared(DType::F32, handed.shared * 2 * CHUNK_TOKENS);
        let (place, task) = (Place::here(k), k.task());
        let (number, head) = (k.div_const(task, mixer.q.heads), k.rem_const(task, mixer.q.heads));
        begin(k);
        let (exists, run, number) = self.find(k, place.lane, number);
        let is_swept = is_swept(k, &run);
        let works = k.and(is_swept, exists);
        let out = row_ptr(k, partials, task, handed.words());
        let (g, q) = (k.div_const(place.lane, 4), k.rem_const(place.lane, 4));
        k.if_then(works, |k| {
            let (begin, none) = (run.position(k), k.const_i64(0));
            let chunk = Chunk::of(k, &run, begin, number);
            let has = k.cmp(Pred::Gt, chunk.count, none);
            let within = Within { mixer, handed, place, g, q, run, chunk, head, rows, scores, gates, together, out };
            k.if_then(has, |k| within.run(k));
        });
    }

    /// The run that has the step's chunk `number`, whether there is one, and which of its chunks it is.
    fn find(&self, k: &mut KernelBuilder, lane: Val, number: Val) -> (Val, Run, Val) {
        let cu_seqlens = k.param(self.sequences.cu_seqlens());
        let (count, none, one) = (k.dim(nextc_ir::shape::Sym::B), k.const_i32(0), k.const_i32(1));
        let before = k.for_carry((lane, count, 32), &[none], |k, b, found| {
            let next = k.add_const(b, 1);
            let begin = k.load_index(cu_seqlens, next);
            let first = Self::first_chunk(k, next, begin);
            let is_before = k.cmp(Pred::Le, first, number);
            let more = k.add(found[0], one);
            vec![k.select(is_before, more, found[0])]
        })[0];
        let b = super::warp_count(k, before);
        let b = k.widen(b);
        let exists = k.cmp(Pred::Lt, b, count);
        let first = k.const_i64(0);
        let b = k.select(exists, b, first);
        let run = self.sequences.run(k, b);
        let begins = Self::first_chunk(k, b, run.begin);
        (exists, run, k.sub(number, begins))
    }
}

/// Pointers to a head of token 0 of a step, of the oldest tap, and of the oldest place of the window.
struct Inputs {
    x: Val,
    w: Val,
    window: Val,
}

/// A block at work on a chunk.
struct Within<'a> {
    mixer: &'a Mixer,
    handed: Handed,
    place: Place,
    /// Which eight and which four of a warp's threads this is.
    g: Val,
    q: Val,
    run: Run,
    chunk: Chunk,
    /// The key head.
    head: Val,
    /// Q, what rounding left of it, K, and of that: `[64][stride]` words each. Then for each value head of a turn `[64][68]` f32, −A with rows and columns
    /// exchanged, and `[64][64]`, L.
    rows: Val,
    /// `[64][72]`: Q·Kᵀ, then K·Kᵀ.
    scores: Val,
    /// g and β of each value head, `[64]` each.
    gates: Val,
    /// Value heads of a turn.
    together: u64,
    /// What is handed over.
    out: Val,
}

impl Within<'_> {
    fn run(&self, k: &mut KernelBuilder) {
        let (heads, zero) = (k.index(self.handed.shared), k.const_i64(0));
        k.for_each((self.place.warp, heads, WARPS), |k, own| self.gate(k, own));
        self.keys(k);
        k.barrier();
        self.multiply(k);
        k.for_each((zero, heads, self.together), |k, first| {
            // the rows' memory becomes the turn's
            k.barrier();
            self.decays(k, first);
            k.barrier();
            self.solve_and_convolve(k, first);
            k.barrier();
            self.put_inverse(k, first);
        });
    }

    /// Pointer to what is handed over of a value head of those that share the key head.
    fn head_out(&self, k: &mut KernelBuilder, own: Val) -> Val {
        let bytes = k.index(self.handed.heads_at() * 4);
        let heads = k.offset(self.out, bytes);
        row_ptr(k, heads, own, self.handed.head_words())
    }

    /// Pointers to g and β of a value head.
    fn gates_of(&self, k: &mut KernelBuilder, own: Val) -> [Val; 2] {
        let g = row_ptr(k, self.gates, own, 2 * CHUNK_TOKENS);
        let bytes = k.index(CHUNK_TOKENS * 4);
        [g, k.offset(g, bytes)]
    }

    /// The gates of a value head, by a warp.
    fn gate(&self, k: &mut KernelBuilder, own: Val) {
        let (head, [to_g, to_beta]) = (self.mixer.value_head(k, self.head, own), self.gates_of(k, own));
        let one = k.const_i64(1);
        let last = k.sub(self.chunk.count, one);
        let (nothing, least) = (k.const_f32(0.0), k.const_f32(LEAST_LOG_DECAY));
        let (mut before, mut sums) = (nothing, Vec::new());
        for half in 0..CHUNK_TOKENS / 32 {
            let i = k.add_const(self.place.lane, 32 * half);
            let within = k.min_i64(i, last);
            let t = k.add(self.chunk.first, within);
            let inputs = self.mixer.gate_inputs(k, t, head);
            let (g, beta) = self.mixer.log_gate(k, head, inputs);
            let g = k.fmax(g, least);
            let exists = k.cmp(Pred::Lt, i, self.chunk.count);
            let [g, beta] = [g, beta].map(|x| k.select(exists, x, nothing));
            let (sum, all) = lanes_before(k, self.place.lane, (before, g), |k, a, b| k.fadd(a, b));
            let sum = k.fadd(sum, g);
            before = k.fadd(before, all);
            k.store(to_g, i, sum);
            k.store(to_beta, i, beta);
            sums.push((i, sum, beta));
        }
        let (out, bytes) = (self.head_out(k, own), k.index(Handed::GATES_AT * 4));
        let out = k.offset(out, bytes);
        for (i, sum, beta) in sums {
            let left = k.fsub(before, sum);
            let left = k.fmin(left, nothing);
            let [begin, end] = [sum, left].map(|x| k.exp(x));
            for (n, x) in (0..).zip([begin, beta, end]) {
                let at = k.add_const(i, n * CHUNK_TOKENS);
                k.store(out, at, x);
            }
        }
        // three more, that whole quads have numbers
        let (four, all) = (k.const_i64(4), k.exp(before));
        let writes = k.cmp(Pred::Lt, self.place.lane, four);
        let at = k.add_const(self.place.lane, 3 * CHUNK_TOKENS);
        k.if_then(writes, |k| k.store(out, at, all));
    }

    /// Convolutions and norms of q and k.
    fn keys(&self, k: &mut KernelBuilder) {
        let (mixer, end) = (self.mixer, k.index(2 * GROUPS));
        k.for_each((self.place.warp, end, WARPS), |k, item| {
            let (which, group, zero) = (k.div_const(item, GROUPS), k.rem_const(item, GROUPS), k.const_i64(0));
            let is_query = k.cmp(Pred::Eq, which, zero);
            let [q, key] = [&mixer.q, &mixer.k].map(|stream| self.inputs(k, stream, self.head));
            let inputs = Inputs {
                x: k.select(is_query, q.x, key.x),
                w: k.select(is_query, q.w, key.w),
                window: k.select(is_query, q.window, key.window),
            };
            let [scale, one] = [mixer.scale, 1.0].map(|scale| k.const_f32(scale));
            let scale = k.select(is_query, scale, one);
            let first = k.mul_const(group, TOKENS);
            let rows = self.convolved(k, &mixer.k, &inputs, first);
            for (i, row) in (0..).zip(rows) {
                let row = self.normed(k, row, scale);
                let i = k.add_const(first, i);
                self.put_row(k, which, i, &row);
            }
        });
    }

    /// Quads of a head that this thread has, and whether it has: of those beyond the last.
    fn quads(&self, k: &mut KernelBuilder, elems: u64) -> Vec<(Val, Option<Val>)> {
        (0..elems / 4)
            .step_by(32)
            .map(|from| {
                let quad = k.add_const(self.place.lane, from);
                let end = k.index(elems / 4);
                (quad, (from + 32 > elems / 4).then(|| k.cmp(Pred::Lt, quad, end)))
            })
            .collect()
    }

    /// Where a convolution of a head reads.
    fn inputs(&self, k: &mut KernelBuilder, stream: &Stream, head: Val) -> Inputs {
        let [x, w] = [stream.x, stream.w].map(|port| {
            let base = k.param(port);
            row_ptr(k, base, head, pad(stream.width))
        });
        Inputs { x, w, window: stream.window(k, self.run.slot, head) }
    }

    /// `silu(conv1d(x))` of a head for some tokens from row `first` of the chunk on: this thread's quads of each; zeros where there is none.
    fn convolved(&self, k: &mut KernelBuilder, stream: &Stream, inputs: &Inputs, first: Val) -> Vec<Vec<Val>> {
        let Inputs { x, w, window } = *inputs;
        let fresh = self.run.is_fresh(k);
        let (begun, zero, one, nothing) = (k.not(fresh), k.const_i64(0), k.const_i64(1), k.splat_f32(4, 0.0));
        let position = self.run.position(k);
        let newest = k.add(self.chunk.first, first);
        let last = k.sub(self.run.end, one);
        let rows: Vec<(Val, Val)> = (0..TOKENS + stream.taps - 1)
            .map(|row| {
                let (t, back) = (k.add_const(newest, row), k.index(stream.taps - 1));
                let t = k.sub(t, back);
                let number = k.sub(t, self.run.begin);
                let in_run = k.cmp(Pred::Ge, number, zero);
                let not_in_run = k.not(in_run);
                // before the run: the window
                let from_window = k.and(not_in_run, begun);
                let before = k.add(position, number);
                let before = stream.window_row(k, before);
                let own = k.select(in_run, t, self.run.begin);
                let own = k.min_i64(own, last);
                let (at, from) = (k.select(from_window, before, own), k.select(from_window, window, x));
                (row_ptr(k, from, at, stream.row()), k.or(in_run, begun))
            })
            .collect();
        let quads = self.quads(k, pad(stream.width));
        let exist: Vec<Val> = (0..TOKENS)
            .map(|i| {
                let row = k.add_const(first, i);
                k.cmp(Pred::Lt, row, self.chunk.count)
            })
            .collect();
        let mut convolved = vec![Vec::new(); TOKENS as usize];
        for (quad, has) in quads {
            let at = k.mul_const(quad, 4);
            let at = has.map_or(at, |has| k.select(has, at, zero));
            let taps: Vec<Val> = (0..stream.taps)
                .map(|tap| {
                    let at = k.add_const(at, tap * stream.row());
                    k.load(DType::F32, 4, w, at)
                })
                .collect();
            let seen: Vec<Val> = rows
                .iter()
                .map(|&(row, there)| {
                    let x = k.load(DType::F32, 4, row, at);
                    k.select(there, x, nothing)
                })
                .collect();
            for (i, row) in convolved.iter_mut().enumerate() {
                let sum = taps.iter().zip(&seen[i..]).fold(nothing, |sum, (&w, &x)| k.fma(w, x, sum));
                let value = k.silu(sum);
                let has = has.map_or(exist[i], |has| k.and(has, exist[i]));
                row.push(k.select(has, value, nothing));
            }
        }
        convolved
    }

    /// `scale · x / |x|` of a row that a warp has.
    fn normed(&self, k: &mut KernelBuilder, row: Vec<Val>, scale: Val) -> Vec<Val> {
        let nothing = k.splat_f32(4, 0.0);
        let squares = row.iter().fold(nothing, |sum, &x| k.fma(x, x, sum));
        let sum = k.reduce_add(squares);
        let sum = warp_sum(k, sum);
        let eps = k.const_f32(self.mixer.eps);
        let sum = k.fadd(sum, eps);
        let root = k.rsqrt(sum);
        let factor = k.fmul(root, scale);
        let factor = k.splat(factor, 4);
        row.into_iter().map(|x| k.fmul(x, factor)).collect()
    }

    /// Rows of Q or K in shared memory: rounded, or what that left over.
    fn rows_of(&self, k: &mut KernelBuilder, which: Val, part: u64) -> Val {
        let words = CHUNK_TOKENS * self.handed.stride();
        let rows = row_ptr(k, self.rows, which, 2 * words);
        let bytes = k.index(part * words * 4);
        k.offset(rows, bytes)
    }

    /// Puts row `i` of Q (0) or K (1) where products find it, zeros behind its last element.
    fn put_row(&self, k: &mut KernelBuilder, which: Val, i: Val, row: &[Val]) {
        let (nothing, one) = (k.splat_f32(4, 0.0), k.const_i64(1));
        // K is handed over first
        let number = k.sub(one, which);
        let number = k.mul_const(number, CHUNK_TOKENS);
        let number = k.add(number, i);
        let out = row_ptr(k, self.out, number, self.handed.row_words());
        let parts = [0, 1].map(|part| {
            let rows = self.rows_of(k, which, part);
            row_ptr(k, rows, i, self.handed.stride())
        });
        for (n, (quad, has)) in self.quads(k, self.handed.keys).into_iter().enumerate() {
            let x = row.get(n).copied().unwrap_or(nothing);
            let x = four(k, x);
            let words = [[x[0], x[1]], [x[2], x[3]]].map(|pair| pack_f16(k, pair, Parts::Sum));
            let (block, first) = (k.div_const(quad, 4), k.rem_const(quad, 4));
            let (group, step, first) = (k.div_const(block, 4), k.rem_const(block, 4), k.mul_const(first, 2));
            let at = Handed::word_at(k, group, first);
            let at = k.add(at, step);
            let put = |k: &mut KernelBuilder| {
                for (j, words) in (0..).zip(&words) {
                    let at = k.add_const(at, 4 * j);
                    k.store(out, at, words[0]);
                    parts.iter().zip(words).for_each(|(&to, &word)| k.store(to, at, word));
                }
            };
            match has {
                None => put(k),
                Some(has) => k.if_then(has, put),
            }
        }
    }

    /// Q·Kᵀ by the first four warps, K·Kᵀ by the others: 16 rows each, of which those that have most columns share a scheduler with those that have fewest.
    fn multiply(&self, k: &mut KernelBuilder) {
        let (which, number) = (k.div_const(self.place.warp, 4), k.rem_const(self.place.warp, 4));
        let (zero, three) = (k.const_i64(0), k.const_i64(3));
        let (is_first, other) = (k.cmp(Pred::Eq, which, zero), k.sub(three, number));
        let block = k.select(is_first, number, other);
        let one = k.const_i64(1);
        let [rows, columns] = [which, one].map(|which| [0, 1].map(|part| self.rows_of(k, which, part)));
        let row = k.mul_const(block, TILE);
        let row = k.add(row, self.g);
        let stride = self.handed.stride();
        let to = row_ptr(k, self.scores, which, CHUNK_TOKENS * SCORES_STRIDE);
        let end = k.add_const(block, 1);
        k.for_each((zero, end, 1), |k, tile| {
            let column = k.mul_const(tile, TILE);
            let own = k.add(column, self.g);
            let none = k.splat_f32(4, 0.0);
            // for each eight columns the product of the rounded numbers, and those with what was left over
            let mut sums = [[none; 2]; 2];
            for group in 0..self.handed.groups() {
                let a = rows.map(|rows| {
                    let [upper, lower] = [0, 8].map(|n| {
                        let row = k.add_const(row, n);
                        let row = row_ptr(k, rows, row, stride);
                        operands(k, row, self.q, group)
                    });
                    [0, 1, 2, 3].map(|i: usize| [upper[i][0], lower[i][0], upper[i][1], lower[i][1]])
                });
                for (n, sums) in (0..).zip(&mut sums) {
                    let row = k.add_const(own, 8 * n);
                    let b = columns.map(|columns| {
                        let row = row_ptr(k, columns, row, stride);
                        operands(k, row, self.q, group)
                    });
                    for i in 0..4 {
                        sums[0] = k.mma(DType::F16, a[0][i], b[0][i], sums[0]);
                        sums[1] = k.mma(DType::F16, a[0][i], b[1][i], sums[1]);
                        sums[1] = k.mma(DType::F16, a[1][i], b[0][i], sums[1]);
                    }
                }
            }
            let pair = k.mul_const(self.q, 2);
            let column = k.add(column, pair);
            for (n, sums) in (0..).zip(sums) {
                let sum = k.fadd(sums[0], sums[1]);
                let sum = four(k, sum);
                for half in 0..2 {
                    let row = k.add_const(row, 8 * half);
                    let to = row_ptr(k, to, row, SCORES_STRIDE);
                    for i in 0..2 {
                        let at = k.add_const(column, 8 * n + i);
                        k.store(to, at, sum[(2 * half + i) as usize]);
                    }
                }
            }
        });
    }

    /// Pointers to −A and L of a value head of the turn.
    fn system(&self, k: &mut KernelBuilder, number: Val) -> [Val; 2] {
        let system = row_ptr(k, self.rows, number, CHUNK_TOKENS * (SYSTEM_STRIDE + CHUNK_TOKENS));
        let bytes = k.index(CHUNK_TOKENS * SYSTEM_STRIDE * 4);
        [system, k.offset(system, bytes)]
    }

    /// Runs `body(number of the head in the turn, block of rows, block of columns, number of the fragment)` for those of this warp.
    fn fragments(&self, k: &mut KernelBuilder, per: u64, body: impl FnOnce(&mut KernelBuilder, [Val; 4])) {
        let end = k.index(self.together * per * FRAGMENTS);
        k.for_each((self.place.warp, end, WARPS), |k, item| {
            let (number, at) = (k.div_const(item, per * FRAGMENTS), k.rem_const(item, per * FRAGMENTS));
            let fragment = k.div_const(at, per);
            let zero = k.const_i64(0);
            // of block row m the first is m (m + 1) / 2
            let (mut row, mut first) = (zero, zero);
            for m in 1..CHUNK_TOKENS / TILE {
                let (begin, m) = (k.index(m * (m + 1) / 2), k.index(m));
                let reached = k.cmp(Pred::Ge, fragment, begin);
                (row, first) = (k.select(reached, m, row), k.select(reached, begin, first));
            }
            let column = k.sub(fragment, first);
            body(k, [number, row, column, at]);
        });
    }

    /// P, which is handed over, and −A of the turn's heads.
    fn decays(&self, k: &mut KernelBuilder, first: Val) {
        self.fragments(k, 2, |k, [number, row, column, at]| {
            let own = k.add(first, number);
            let (half, [system, _], [g, beta]) = (k.rem_const(at, 2), self.system(k, number), self.gates_of(k, own));
            let (row, half, column) = (k.mul_const(row, TILE), k.mul_const(half, 8), k.mul_const(column, TILE));
            let i = k.add(row, half);
            let i = k.add(i, self.g);
            let pair = k.mul_const(self.q, 2);
            let j = k.add(column, pair);
            let (own_g, beta, nothing) = (k.load_f32(g, i), k.load_f32(beta, i), k.const_f32(0.0));
            let against = k.fneg(beta);
            let row = row_ptr(k, self.scores, i, SCORES_STRIDE);
            let bytes = k.index(CHUNK_TOKENS * SCORES_STRIDE * 4);
            let keys = k.offset(row, bytes);
            let mut seen = Vec::new();
            for j in [j, k.add_const(j, 8)] {
                let [from, queries, keys] = [g, row, keys].map(|p| {
                    let x = k.load(DType::F32, 2, p, j);
                    lanes_of(k, x)
                });
                let p = [0, 1].map(|n: usize| {
                    let j = k.add_const(j, n as u64);
                    let difference = k.fsub(own_g, from[n]);
                    // more than 0 for what is not seen, or by rounding
                    let difference = k.fmin(difference, nothing);
                    let decay = k.exp(difference);
                    let (sees, before) = (k.cmp(Pred::Le, j, i), k.cmp(Pred::Lt, j, i));
                    let [p, a] = [queries[n], keys[n]].map(|x| k.fmul(decay, x));
                    let a = k.fmul(against, a);
                    let a = k.select(before, a, nothing);
                    let to = row_ptr(k, system, j, SYSTEM_STRIDE);
                    k.store(to, i, a);
                    k.select(sees, p, nothing)
                });
                seen.push(pack_f16(k, p, Parts::Sum));
            }
            let words = k.quad([seen[0][0], seen[1][0], seen[0][1], seen[1][1]]);
            let out = self.head_out(k, own);
            self.put_fragment(k, out, at, words);
        });
    }

    /// Stores this thread's words of fragment `at`.
    fn put_fragment(&self, k: &mut KernelBuilder, out: Val, at: Val, words: Val) {
        let to = row_ptr(k, out, at, FRAGMENT_WORDS);
        let own = k.mul_const(self.place.lane, 4);
        k.store(to, own, words);
    }

    /// L of the turn's heads by the first warps; V by the others.
    fn solve_and_convolve(&self, k: &mut KernelBuilder, first: Val) {
        let solvers = self.together * CHUNK_TOKENS / 32;
        let end = k.index(solvers);
        let solves = k.cmp(Pred::Lt, self.place.warp, end);
        k.if_else(
            solves,
            |k| {
                let (number, column) =
                    (k.div_const(self.place.thread, CHUNK_TOKENS), k.rem_const(self.place.thread, CHUNK_TOKENS));
                self.solve(k, number, column);
                Vec::new()
            },
            |k| {
                let (own, end) = (k.sub(self.place.warp, end), k.index(self.together * GROUPS));
                k.for_each((own, end, WARPS - solvers), |k, item| {
                    let (number, group) = (k.div_const(item, GROUPS), k.rem_const(item, GROUPS));
                    let (own, row) = (k.add(first, number), k.mul_const(group, TOKENS));
                    self.put_values(k, own, row);
                });
                Vec::new()
            },
        );
    }

    /// Column `column` of L.
    fn solve(&self, k: &mut KernelBuilder, number: Val, column: Val) {
        let ([system, solution], zero, all) = (self.system(k, number), k.const_i64(0), k.index(CHUNK_TOKENS));
        // the first rows of a warp's columns are zeros
        let warp = k.div_const(column, 32);
        let begin = k.mul_const(warp, 32);
        let factors = |k: &mut KernelBuilder, j: Val, i: Val| -> Vec<Val> {
            let row = row_ptr(k, system, j, SYSTEM_STRIDE);
            (0..ROWS)
                .step_by(4)
                .flat_map(|n| {
                    let at = k.add_const(i, n);
                    let x = k.load(DType::F32, 4, row, at);
                    lanes_of(k, x)
                })
                .collect()
        };
        let nothing = k.const_f32(0.0);
        k.for_each((zero, all, ROWS), |k, i| {
            let last = k.add_const(i, ROWS - 1);
            let known = k.cmp(Pred::Le, column, last);
            let within = k.min_i64(column, last);
            let own = factors(k, within, i);
            let own: Vec<Val> = own.into_iter().map(|x| k.select(known, x, nothing)).collect();
            let sums = k.for_carry((begin, i, 4), &own, |k, j, sums| {
                (0..4).fold(sums.to_vec(), |sums, n| {
                    let j = k.add_const(j, n);
                    let row = row_ptr(k, solution, j, CHUNK_TOKENS);
                    let (x, factors) = (k.load_f32(row, column), factors(k, j, i));
                    sums.iter().zip(factors).map(|(&sum, factor)| k.fma(factor, x, sum)).collect()
                })
            });
            let mut solved = sums;
            for n in 0..ROWS as usize {
                let j = k.add_const(i, n as u64);
                let row = row_ptr(k, solution, j, CHUNK_TOKENS);
                k.store(row, column, solved[n]);
                if n + 1 < ROWS as usize {
                    let factors = factors(k, j, i);
                    for m in n + 1..ROWS as usize {
                        solved[m] = k.fma(factors[m], solved[n], solved[m]);
                    }
                }
            }
        });
    }

    /// Hands some tokens of V of a value head over.
    fn put_values(&self, k: &mut KernelBuilder, own: Val, row: Val) {
        let head = self.mixer.value_head(k, self.head, own);
        let inputs = self.inputs(k, &self.mixer.v, head);
        let rows = self.convolved(k, &self.mixer.v, &inputs, row);
        let (out, bytes) = (self.head_out(k, own), k.index(Handed::VALUES_AT * 4));
        let out = k.offset(out, bytes);
        for (n, (quad, has)) in self.quads(k, self.handed.values).into_iter().enumerate() {
            let tokens: Vec<[Val; 4]> = rows.iter().map(|row| four(k, row[n])).collect();
            let column = k.mul_const(quad, 4);
            let put = |k: &mut KernelBuilder| {
                for c in 0..4 {
                    let column = k.add_const(column, c);
                    let to = row_ptr(k, out, column, CHUNK_TOKENS);
                    let x = k.quad([0, 1, 2, 3].map(|i: usize| tokens[i][c as usize]));
                    k.store(to, row, x);
                }
            };
            match has {
                None => put(k),
                Some(has) => k.if_then(has, put),
            }
        }
    }

    /// Hands L of the turn's heads over.
    fn put_inverse(&self, k: &mut KernelBuilder, first: Val) {
        self.fragments(k, 1, |k, [number, row, column, at]| {
            let [_, solution] = self.system(k, number);
            let (row, column, pair) = (k.mul_const(row, TILE), k.mul_const(column, TILE), k.mul_const(self.q, 2));
            let (i, j) = (k.add(row, self.g), k.add(column, pair));
            let words = [(0, 0), (0, 8), (8, 0), (8, 8)].map(|(down, right)| {
                let (i, j) = (k.add_const(i, down), k.add_const(j, right));
                let row = row_ptr(k, solution, i, CHUNK_TOKENS);
                let x = k.load(DType::F32, 2, row, j);
                let x = lanes_of(k, x);
                pack_f16(k, [x[0], x[1]], Parts::One)[0]
            });
            let (own, words) = (k.add(first, number), k.quad(words));
            let (out, bytes) = (self.head_out(k, own), k.index(Handed::INVERSE_AT * 4));
            let out = k.offset(out, bytes);
            self.put_fragment(k, out, at, words);
        });
    }
}

/// Words `2 q` and `2 q + 1` of the four blocks of a group of a row, as the thread's operands of four steps of a product: of the first two blocks and the others the
/// former words, then the latter. So a step's two words are neighbours in registers as they are in memory.
pub(super) fn operands(k: &mut KernelBuilder, row: Val, q: Val, group: u64) -> [[Val; 2]; 4] {
    let (group, first) = (k.index(group), k.mul_const(q, 2));
    let at = Handed::word_at(k, group, first);
    let next = k.add_const(at, 4);
    let [first, second] = [at, next].map(|at| {
        let words = k.load(DType::I32, 4, row, at);
        four(k, words)
    });
    [[first[0], first[1]], [first[2], first[3]], [second[0], second[1]], [second[2], second[3]]]
}
