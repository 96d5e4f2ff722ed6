//! `gated_delta_net`: a DeltaNet mixer between its projections, token by token.
//!
//! task     one key head of one sequence, with the value heads that share it; tokens in blocks of 32
//! replay   before the first block: S ← fma(k, d, α S) for the accepted tokens of a tentative step, with the kept k, d, α
//! conv     q, k and v: causal convolution over the window in the conv state, SiLU; the window moves on
//! prologue q ← scale · q / |q|,  k ← k / |k|,  α = exp(-exp(a_log) · softplus(a + dt_bias)),  β = sigmoid(b)
//! sweep    some columns of S at a time, token by token: y = Sᵀk,  w = Sᵀq  over the old state, then
//!          d = β (v − α y);  o = α w + (k·q) d;  S ← fma(k, d, α S)
//! epilogue out = rms_norm(o, norm) · silu(z)
//! traffic  2 · 4 · head_k_dim · head_v_dim bytes a head, sequence and block: bound by memory at one token
//!
//! Several tokens sweep a copy of the columns, which is put back after them. A tentative sequence sweeps a copy of the columns and keeps k, d, α of each token and its inputs of the convolution
//! behind the window, so that the next step can replay as many as were accepted: the same operations in the same order.
//! A sequence whose first token of the step has position 0 begins with zero states.
//! Source: arXiv:2412.06464; the single-read form is algebra on its recurrence.

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::{Extent, Input};
use nextc_ir::shape::{LANES, Sym, pad};
use nextc_ir::types::{StateType, TENTATIVE_TOKENS};
use nextc_ir::{DType, Op};

use super::LowerError;
use super::matmul::{mean_rsqrt, row_ptr};
use super::ports::{Lowered, Port, Ports, Site};

/// One of q, k, v: its projection, its convolution and its window.
#[derive(Clone, Copy)]
pub struct Stream {
    /// The projection.
    pub x: Port,
    /// Taps of the convolution, the oldest first.
    pub w: Port,
    /// Its window.
    pub conv: Port,
    /// Heads.
    pub heads: u64,
    /// Elements of a head.
    pub width: u64,
    /// Tokens that a convolution sees.
    pub taps: u64,
}

impl Stream {
    fn ports(site: &Site<'_>, ports: &mut Ports, [x, w, conv]: [&str; 3]) -> Self {
        let shape = &site.weight(site.named(w)).shape;
        Self {
            heads: shape[0],
            width: shape[1],
            taps: shape[2],
            x: ports.read(x, site.named(x)),
            w: ports.read(w, site.named(w)),
            conv: ports.write(conv, site.named(conv)),
        }
    }

    /// Elements from one token to the next.
    pub(super) fn row(&self) -> u64 {
        self.heads * pad(self.width)
    }

    /// Pointer to the oldest row of head `head`'s window in slot `slot`; rows are `row()` elements apart.
    pub(super) fn window(&self, k: &mut KernelBuilder, slot: Val, head: Val) -> Val {
        let base = k.param(self.conv);
        let slot = row_ptr(k, base, slot, (self.taps - 1 + TENTATIVE_TOKENS) * self.row());
        row_ptr(k, slot, head, pad(self.width))
    }

    /// Moves the window on by the accepted tokens of a tentative step, whose inputs lie behind it.
    fn accept(&self, k: &mut KernelBuilder, window: Val, tokens: Val) {
        let ahead = row_ptr(k, window, tokens, self.row());
        k.for_range(pad(self.width), LANES, |k, c| {
            let rows: Vec<Val> = (0..self.taps - 1).map(|tap| k.add_const(c, tap * self.row())).collect();
            let inputs: Vec<Val> = rows.iter().map(|&at| k.load_f32x16(ahead, at)).collect();
            rows.iter().zip(inputs).for_each(|(&at, x)| k.store(window, at, x));
        });
    }

    fn clear(&self, k: &mut KernelBuilder, window: Val) {
        let zero = k.splat_f32(16, 0.0);
        for tap in 0..self.taps - 1 {
            k.for_range(pad(self.width), LANES, |k, c| {
                let at = k.add_const(c, tap * self.row());
                k.store(window, at, zero);
            });
        }
    }

    /// `out = silu(conv1d(x))` for one head of one token. The window moves on by one; or, where `kept` says that so many tentative
    /// tokens came before, it stays and the input is put behind theirs.
    fn step(&self, k: &mut KernelBuilder, t: Val, head: Val, window: Val, out: Val, kept: (Val, Val)) {
        let (x, w) = (k.param(self.x), k.param(self.w));
        let x = row_ptr(k, x, t, self.row());
        let x = row_ptr(k, x, head, pad(self.width));
        let w = row_ptr(k, w, head, pad(self.width));
        let (tentative, before) = kept;
        let window = row_ptr(k, window, before, self.row());
        k.for_range(pad(self.width), LANES, |k, c| {
            let rows: Vec<Val> = (0..self.taps).map(|tap| k.add_const(c, tap * self.row())).collect();
            let (newest, older) = rows.split_last().expect("a convolution has taps");
            let mut inputs: Vec<Val> = older.iter().map(|&at| k.load_f32x16(window, at)).collect();
            inputs.push(k.load_f32x16(x, c));
            let mut sum = k.splat_f32(16, 0.0);
            for (&at, &input) in rows.iter().zip(&inputs) {
                let weight = k.load_f32x16(w, at);
                sum = k.fma(weight, input, sum);
            }
            k.if_else(
                tentative,
                |k| {
                    k.store(window, *newest, inputs[inputs.len() - 1]);
                    Vec::new()
                },
                |k| {
                    older.iter().zip(&inputs[1..]).for_each(|(&at, &x)| k.store(window, at, x));
                    Vec::new()
                },
            );
            let value = k.silu(sum);
            k.store(out, c, value);
        });
    }
}

/// Everything the kernel is connected to.
pub struct Mixer {
    /// Queries.
    pub q: Stream,
    /// Keys.
    pub k: Stream,
    /// Values.
    pub v: Stream,
    gates: [Port; 4],
    /// The gate of the output.
    pub z: Port,
    /// The gain of the output's norm.
    pub norm: Port,
    delta: Port,
    out: Port,
    /// Added to the squared length of q and k.
    pub eps: f32,
    /// What q is multiplied with.
    pub scale: f32,
    /// The epsilon of the output's norm.
    pub norm_eps: f32,
    vector_bits: u32,
    /// The type of the delta state: where its matrix and its kept updates lie.
    state: StateType,
}

/// `gated_delta_net`.
pub fn lower_gated_delta_net(site: &Site<'_>) -> Result<Lowered, LowerError> {
    debug_assert_eq!(site.op(), Op::GatedDeltaNet);
    let mut ports = Ports::default();
    let mixer = Mixer::ports(site, &mut ports);
    let sequences = SequencePorts::new(&mut ports);
    let heads = mixer.q.heads;
    let mut k = ports.builder(site, Extent::from(Sym::B) * heads.into());
    let scratch = Scratch::alloc(&mut k, &mixer);
    let task = k.task();
    let (b, head) = (k.div_const(task, heads), k.rem_const(task, heads));
    let run = sequences.run(&mut k, b);
    let zero = k.const_i64(0);
    let live = k.cmp(Pred::Ge, run.slot, zero);
    k.if_else(
        live,
        |k| {
            mixer.run(k, &run, head, &scratch);
            Vec::new()
        },
        |k| {
            mixer.zero_out(k, &run, head);
            Vec::new()
        },
    );
    Ok(ports.finish(k.finish()))
}

/// The parts of `sequences` that say which tokens a sequence has.
#[derive(Clone, Copy)]
pub struct SequencePorts {
    positions: Port,
    cu_seqlens: Port,
    slot: Port,
    replay: Port,
    tentative: Port,
}

/// The tokens of one sequence in a step.
#[derive(Clone, Copy)]
pub struct Run {
    /// Its slot; negative for padding.
    pub slot: Val,
    /// Its first token.
    pub begin: Val,
    /// One past its last token.
    pub end: Val,
    /// Kept tokens of a tentative step that come before it.
    pub replay: Val,
    /// Whether its tokens are kept instead of done.
    pub tentative: Val,
    positions: Port,
}

impl Run {
    /// Whether the sequence begins with its first token, so that its states are zeros.
    pub fn is_fresh(&self, k: &mut KernelBuilder) -> Val {
        let positions = k.param(self.positions);
        let (zero, position) = (k.const_i64(0), k.load_index(positions, self.begin));
        k.cmp(Pred::Eq, position, zero)
    }
}

impl SequencePorts {
    /// The ports.
    pub fn new(ports: &mut Ports) -> Self {
        Self {
            positions: ports.step(Input::Positions),
            cu_seqlens: ports.step(Input::CuSeqlens),
            slot: ports.step(Input::Slot),
            replay: ports.step(Input::Replay),
            tentative: ports.step(Input::Tentative),
        }
    }

    /// Where sequences begin.
    pub const fn cu_seqlens(&self) -> Port {
        self.cu_seqlens
    }

    /// The tokens of sequence `b`.
    pub fn run(&self, k: &mut KernelBuilder, b: Val) -> Run {
        let [cu_seqlens, slot, replay, tentative] =
            [self.cu_seqlens, self.slot, self.replay, self.tentative].map(|p| k.param(p));
        let next = k.add_const(b, 1);
        let (zero, tentative) = (k.const_i64(0), k.load_index(tentative, b));
        Run {
            replay: k.load_index(replay, b),
            tentative: k.cmp(Pred::Ne, tentative, zero),
            slot: k.load_index(slot, b),
            begin: k.load_index(cu_seqlens, b),
            end: k.load_index(cu_seqlens, next),
            positions: self.positions,
        }
    }
}

/// Most tokens that are swept over the state together, tentative ones among them: so many that copying columns counts little.
const BLOCK: u64 = 4 * TENTATIVE_TOKENS;

/// From so many tokens of a block on its columns of the state are swept as a copy: rows that follow one another stay in the first cache, where every
/// eighth line of a matrix does not.
const COPIED_TOKENS: u64 = 3;

/// What is computed of a block of tokens, a row a token.
struct Scratch {
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
    fn alloc(k: &mut KernelBuilder, mixer: &Mixer) -> Self {
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

    /// What a convolution wants to know of row `i`: whether it is tentative, and how many tentative tokens come before it.
    fn kept(&self, k: &mut KernelBuilder, i: Val) -> (Val, Val) {
        let zero = k.const_i64(0);
        (self.run.tentative, k.select(self.run.tentative, i, zero))
    }
}

impl Mixer {
    pub(super) fn ports(site: &Site<'_>, ports: &mut Ports) -> Self {
        let read = |ports: &mut Ports, name: &str| ports.read(name, site.named(name));
        Self {
            q: Stream::ports(site, ports, ["q", "w_q", "conv_q"]),
            k: Stream::ports(site, ports, ["k", "w_k", "conv_k"]),
            v: Stream::ports(site, ports, ["v", "w_v", "conv_v"]),
            gates: ["a", "b", "a_log", "dt_bias"].map(|n| read(ports, n)),
            z: read(ports, "z"),
            norm: read(ports, "norm"),
            delta: ports.write("delta", site.named("delta")),
            out: ports.write("out", site.result(0)),
            eps: site.float("eps"),
            scale: site.float("scale"),
            norm_eps: site.float("norm_eps"),
            vector_bits: site.target.vector_bits,
            state: site.state(site.named("delta")).clone(),
        }
    }

    /// Value heads that share a key head.
    pub(super) fn shared_heads(&self) -> u64 {
        self.v.heads / self.q.heads
    }

    /// Value head number `i` of those that share key head `head`.
    pub(super) fn value_head(&self, k: &mut KernelBuilder, head: Val, i: Val) -> Val {
        let base = k.mul_const(head, self.shared_heads());
        k.add(base, i)
    }

    fn matrix_elems(&self) -> u64 {
        self.k.width * pad(self.v.width)
    }

    /// Pointer to one head's state.
    pub(super) fn state(&self, k: &mut KernelBuilder, slot: Val, head: Val) -> Val {
        let elems = self.state.delta_head_elems();
        let base = k.param(self.delta);
        let slot = row_ptr(k, base, slot, self.v.heads * elems);
        row_ptr(k, slot, head, elems)
    }

    /// Pointers to `k`, `d` and `α` of kept token `i`.
    pub(super) fn update(&self, k: &mut KernelBuilder, state: Val, i: Val) -> [Val; 3] {
        let at = k.mul_const(i, self.state.delta_update_elems());
        let at = k.add_const(at, self.matrix_elems());
        let one = row_ptr(k, state, at, 1);
        [0, pad(self.k.width), pad(self.k.width) + pad(self.v.width)].map(|elems| {
            let bytes = k.index(elems * 4);
            k.offset(one, bytes)
        })
    }

    fn run(&self, k: &mut KernelBuilder, run: &Run, head: Val, scratch: &Scratch) {
        let q_window = self.q.window(k, run.slot, head);
        let k_window = self.k.window(k, run.slot, head);
        let some = k.cmp(Pred::Lt, run.begin, run.end);
        let zero = k.const_i64(0);
        k.if_then(some, |k| {
            let fresh = run.is_fresh(k);
            k.if_then(fresh, |k| self.clear(k, run.slot, head, (q_window, k_window)));
            let kept = k.cmp(Pred::Gt, run.replay, zero);
            k.if_then(kept, |k| self.accept(k, run, head, (q_window, k_window)));
        });
        k.for_each((run.begin, run.end, BLOCK), |k, first| {
            let (left, most) = (k.sub(run.end, first), k.index(BLOCK));
            let count = k.min_i64(left, most);
            let is_first = k.cmp(Pred::Eq, first, run.begin);
            let replay = k.select(is_first, run.replay, zero);
            let block = Block { run, first, count, replay };
            block.each(k, |k, i, t| {
                let (q, key) =
                    (row_ptr(k, scratch.q, i, pad(self.q.width)), row_ptr(k, scratch.k, i, pad(self.k.width)));
                let kept = block.kept(k, i);
                self.q.step(k, t, head, q_window, q, kept);
                self.k.step(k, t, head, k_window, key, kept);
                l2_normalise(k, q, self.q.width, self.eps, self.scale);
                l2_normalise(k, key, self.k.width, self.eps, 1.0);
                let kq = dot_rows(k, key, q, pad(self.q.width));
                k.store(scratch.kq, i, kq);
            });
            k.for_range(self.shared_heads(), 1, |k, i| {
                let v_head = self.value_head(k, head, i);
                self.value_block(k, &block, v_head, scratch);
            });
        });
    }

    /// A block of tokens of one value head.
    fn value_block(&self, k: &mut KernelBuilder, block: &Block<'_>, head: Val, scratch: &Scratch) {
        let window = self.v.window(k, block.run.slot, head);
        let state = self.state(k, block.run.slot, head);
        let zero = k.const_i64(0);
        block.each(k, |k, i, t| {
            let v = row_ptr(k, scratch.v, i, pad(self.v.width));
            let kept = block.kept(k, i);
            self.v.step(k, t, head, window, v, kept);
            let (alpha, beta) = self.gate(k, t, head);
            k.store(scratch.alpha, i, alpha);
            k.store(scratch.beta, i, beta);
        });
        // before anything is kept of this block, as it would overwrite what is replayed
        let columns = pad(self.v.width);
        k.for_range(columns, self.sweep_elems(), |k, column| self.replay(k, block, state, column));
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
            self.epilogue(k, t, head, o);
        });
    }

    /// Moves the windows of a key head and its value heads on by the accepted tokens.
    fn accept(&self, k: &mut KernelBuilder, run: &Run, head: Val, (q_window, k_window): (Val, Val)) {
        self.q.accept(k, q_window, run.replay);
        self.k.accept(k, k_window, run.replay);
        k.for_range(self.shared_heads(), 1, |k, i| {
            let v_head = self.value_head(k, head, i);
            let window = self.v.window(k, run.slot, v_head);
            self.v.accept(k, window, run.replay);
        });
    }

    fn clear(&self, k: &mut KernelBuilder, slot: Val, head: Val, (q_window, k_window): (Val, Val)) {
        self.q.clear(k, q_window);
        self.k.clear(k, k_window);
        let zero = k.splat_f32(16, 0.0);
        k.for_range(self.shared_heads(), 1, |k, i| {
            let v_head = self.value_head(k, head, i);
            let window = self.v.window(k, slot, v_head);
            self.v.clear(k, window);
            let state = self.state(k, slot, v_head);
            k.for_range(self.matrix_elems(), LANES, |k, at| k.store(state, at, zero));
        });
    }

    /// `(α, β)` of one token and value head.
    pub(super) fn gate(&self, k: &mut KernelBuilder, t: Val, head: Val) -> (Val, Val) {
        let [a, b, a_log, dt_bias] = self.gates.map(|p| k.param(p));
        let (a, b) = (row_ptr(k, a, t, pad(self.v.heads)), row_ptr(k, b, t, pad(self.v.heads)));
        let [a, b, a_log, dt_bias] = [a, b, a_log, dt_bias].map(|p| k.load_f32(p, head));
        let shifted = k.fadd(a, dt_bias);
        let dt = k.softplus(shifted);
        let rate = k.exp(a_log);
        let product = k.fmul(rate, dt);
        let g = k.fneg(product);
        (k.exp(g), k.sigmoid(b))
    }

    /// Vectors of columns that are swept together: two accumulators each, in half of the registers.
    fn chunks(&self) -> u64 {
        let (most, columns) = (u64::from(self.vector_bits) / 128, pad(self.v.width) / LANES);
        [4, 2, 1].into_iter().find(|&n| n <= most && columns.is_multiple_of(n)).expect("1 divides everything")
    }

    /// Columns of a sweep.
    fn sweep_elems(&self) -> u64 {
        self.chunks() * LANES
    }

    /// `S ← fma(k, d, α S)` on some columns for each accepted token of the tentative step before.
    fn replay(&self, k: &mut KernelBuilder, block: &Block<'_>, state: Val, column: Val) {
        let zero = k.const_i64(0);
        let place = Columns { matrix: state, stride: pad(self.v.width), at: column, column };
        k.for_each((zero, block.replay, 1), |k, i| {
            let [key, d, alpha] = self.update(k, state, i);
            let alpha = k.load_f32(alpha, zero);
            let alpha = k.splat(alpha, 16);
            let deltas: Vec<Val> = (0..self.chunks())
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
            for c in 0..self.chunks() {
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
            for c in 0..self.chunks() {
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
            let init = vec![zeros; 2 * self.chunks() as usize];
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

    /// `out = rms_norm(o, norm) * silu(z)` for one head of one token.
    fn epilogue(&self, k: &mut KernelBuilder, t: Val, head: Val, o: Val) {
        let (z, norm) = (k.param(self.z), k.param(self.norm));
        let sum = dot_rows(k, o, o, pad(self.v.width));
        let scale = mean_rsqrt(k, sum, self.v.width, self.norm_eps);
        let scale = k.splat(scale, 16);
        let z = row_ptr(k, z, t, self.v.row());
        let z = row_ptr(k, z, head, pad(self.v.width));
        let out = self.out_row(k, t, head);
        k.for_range(pad(self.v.width), LANES, |k, c| {
            let [o, norm, z] = [o, norm, z].map(|p| k.load_f32x16(p, c));
            let normed = k.fmul(o, scale);
            let normed = k.fmul(normed, norm);
            let gate = k.silu(z);
            let value = k.fmul(normed, gate);
            k.store(out, c, value);
        });
    }

    /// Pointer to the gates of value heads from `head` on in token `t`.
    pub(super) fn z_row(&self, k: &mut KernelBuilder, t: Val, head: Val) -> Val {
        let z = k.param(self.z);
        let z = row_ptr(k, z, t, self.v.row());
        row_ptr(k, z, head, pad(self.v.width))
    }

    /// Pointer to the output of one head of one token.
    pub(super) fn out_row(&self, k: &mut KernelBuilder, t: Val, head: Val) -> Val {
        let out = k.param(self.out);
        let out = row_ptr(k, out, t, self.v.row());
        row_ptr(k, out, head, pad(self.v.width))
    }

    fn zero_out(&self, k: &mut KernelBuilder, run: &Run, head: Val) {
        let zero = k.splat_f32(16, 0.0);
        k.for_each((run.begin, run.end, 1), |k, t| {
            k.for_range(self.shared_heads(), 1, |k, i| {
                let v_head = self.value_head(k, head, i);
                let out = self.out_row(k, t, v_head);
                k.for_range(pad(self.v.width), LANES, |k, c| k.store(out, c, zero));
            });
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

/// `Σ a·b` over `elems` (a multiple of 16) elements.
pub fn dot_rows(k: &mut KernelBuilder, a: Val, b: Val, elems: u64) -> Val {
    let zero = k.splat_f32(16, 0.0);
    let (lo, hi) = (k.const_i64(0), k.index(elems));
    let sum = k.for_carry((lo, hi, LANES), &[zero], |k, i, acc| {
        let (x, y) = (k.load_f32x16(a, i), k.load_f32x16(b, i));
        vec![k.fma(x, y, acc[0])]
    });
    k.reduce_add(sum[0])
}

/// `x = scale * x / sqrt(Σ x² + eps)` in place.
fn l2_normalise(k: &mut KernelBuilder, x: Val, width: u64, eps: f32, scale: f32) {
    let sum = dot_rows(k, x, x, pad(width));
    let eps = k.const_f32(eps);
    let sum = k.fadd(sum, eps);
    let root = k.rsqrt(sum);
    let scale = k.const_f32(scale);
    let factor = k.fmul(root, scale);
    let factor = k.splat(factor, 16);
    k.for_range(pad(width), LANES, |k, i| {
        let v = k.load_f32x16(x, i);
        let v = k.fmul(v, factor);
        k.store(x, i, v);
    });
}
