//! `gated_delta_net`: a DeltaNet mixer between its projections.
//!
//! task     one key head of one sequence, with the value heads that share it
//! begin    zero states where the sequence begins with the step's first token; windows move on by the accepted tokens of a tentative step
//! forms    token by token (`sweep.rs`); where a CPU has a matrix unit, long runs in chunks of tokens (`chunks.rs`)
//! prologue q ← scale · q / |q|,  k ← k / |k|,  α = exp(-exp(a_log) · softplus(a + dt_bias)),  β = sigmoid(b)
//! epilogue out = rms_norm(o, norm) · silu(z)

mod chunks;
mod split;
mod stream;
mod sweep;
mod within;

use nextc_ir::Op;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::{Extent, Input};
use nextc_ir::shape::{LANES, Sym, pad};
use nextc_ir::types::StateType;

use super::LowerError;
use super::bulk::Classes;
use super::matmul::{mean_rsqrt, row_ptr};
use super::ports::{Lowered, Port, Ports, Site};
use chunks::Chunks;
pub use stream::Stream;
use sweep::Scratch;

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
    let unit = site.target.unit().filter(|_| Chunks::take(&mixer));
    let chunks = unit.map(|unit| Chunks::alloc(&mut k, &mixer, unit));
    let task = k.task();
    let (b, head) = (k.div_const(task, heads), k.rem_const(task, heads));
    let run = sequences.run(&mut k, b);
    let zero = k.const_i64(0);
    let live = k.cmp(Pred::Ge, run.slot, zero);
    k.if_else(
        live,
        |k| {
            mixer.run(k, &run, head, (&scratch, chunks.as_ref()));
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

/// The least logarithm of a token's decay in a chunk: its exponential is 0 in f32 already, and sums of it are still near the others.
pub const LEAST_LOG_DECAY: f32 = -128.0;

/// How many tokens ahead rows of a run are asked for.
const TOKENS_AHEAD: u64 = 8;

impl Run {
    /// The position of its first token.
    pub fn position(&self, k: &mut KernelBuilder) -> Val {
        let positions = k.param(self.positions);
        k.load_index(positions, self.begin)
    }

    /// The position of token `t` of the run, or of one before it.
    pub fn position_of(&self, k: &mut KernelBuilder, t: Val) -> Val {
        let (first, before) = (self.position(k), k.sub(t, self.begin));
        k.add(first, before)
    }

    /// Asks for the elements of a head some tokens after token `t` of the run: the heads of tokens lie so far apart that nothing else does. `rows` is the head of
    /// token 0, and how many elements there are from one token to the next.
    fn ask_row(&self, k: &mut KernelBuilder, (rows, stride): (Val, u64), t: Val, elems: u64) {
        let (further, one, zero) = (k.add_const(t, TOKENS_AHEAD), k.const_i64(1), k.const_i64(0));
        let last = k.sub(self.end, one);
        let further = k.min_i64(further, last);
        let (row, bytes) = (row_ptr(k, rows, further, stride), k.index(pad(elems) * 4));
        k.prefetch(row, zero, bytes);
    }

    /// Whether the sequence begins with its first token, so that its states are zeros.
    pub fn is_fresh(&self, k: &mut KernelBuilder) -> Val {
        let (zero, position) = (k.const_i64(0), self.position(k));
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

    /// Runs `body(value head)` for those that share key head `head`.
    fn for_value_heads(&self, k: &mut KernelBuilder, head: Val, body: impl FnOnce(&mut KernelBuilder, Val)) {
        k.for_range(self.shared_heads(), 1, |k, i| {
            let head = self.value_head(k, head, i);
            body(k, head);
        });
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

    /// All tokens of a run, which has a slot.
    fn run(&self, k: &mut KernelBuilder, run: &Run, head: Val, (scratch, chunks): (&Scratch, Option<&Chunks<'_>>)) {
        let some = k.cmp(Pred::Lt, run.begin, run.end);
        k.if_then(some, |k| {
            self.begin(k, run, head);
            let Some(chunks) = chunks else { return self.sweep_run(k, run, head, scratch) };
            let is_bulk = Classes::is_bulk_run(k, run.begin, run.end);
            k.if_then(is_bulk, |k| chunks.run(k, run, head));
            let decodes = k.not(is_bulk);
            k.if_then(decodes, |k| self.sweep_run(k, run, head, scratch));
        });
    }

    /// The windows of a key head's queries and keys.
    fn key_windows(&self, k: &mut KernelBuilder, run: &Run, head: Val) -> [Val; 2] {
        [&self.q, &self.k].map(|stream| stream.window(k, run.slot, head))
    }

    /// Zero states for a fresh sequence.
    fn begin(&self, k: &mut KernelBuilder, run: &Run, head: Val) {
        let windows = self.key_windows(k, run, head);
        let fresh = run.is_fresh(k);
        k.if_then(fresh, |k| self.clear(k, run.slot, head, windows));
    }

    fn clear(&self, k: &mut KernelBuilder, slot: Val, head: Val, [q_window, k_window]: [Val; 2]) {
        self.q.clear(k, q_window);
        self.k.clear(k, k_window);
        let zero = k.splat_f32(16, 0.0);
        self.for_value_heads(k, head, |k, v_head| {
            let window = self.v.window(k, slot, v_head);
            self.v.clear(k, window);
            let state = self.state(k, slot, v_head);
            k.for_range(self.matrix_elems(), LANES, |k, at| k.store(state, at, zero));
        });
    }

    /// `(α, β)` of one token and value head.
    pub(super) fn gate(&self, k: &mut KernelBuilder, t: Val, head: Val) -> (Val, Val) {
        let numbers = self.gate_inputs(k, t, head);
        let (g, beta) = self.log_gate(k, head, numbers);
        (k.exp(g), beta)
    }

    /// What the projections give for the gates of one token and value head: a and b.
    pub(super) fn gate_inputs(&self, k: &mut KernelBuilder, t: Val, head: Val) -> [Val; 2] {
        [self.gates[0], self.gates[1]].map(|port| {
            let base = k.param(port);
            let row = row_ptr(k, base, t, pad(self.v.heads));
            k.load_f32(row, head)
        })
    }

    /// `(ln α, β)` from a and b of a value head, of one token or of a vector of tokens.
    pub(super) fn log_gate(&self, k: &mut KernelBuilder, head: Val, [a, b]: [Val; 2]) -> (Val, Val) {
        let lanes = k.ty(a).lanes();
        let [a_log, dt_bias] = [self.gates[2], self.gates[3]].map(|port| {
            let base = k.param(port);
            k.load_f32(base, head)
        });
        let dt_bias = k.splat(dt_bias, lanes);
        let shifted = k.fadd(a, dt_bias);
        let dt = k.softplus(shifted);
        let rate = k.exp(a_log);
        let rate = k.splat(rate, lanes);
        let product = k.fmul(rate, dt);
        (k.fneg(product), k.sigmoid(b))
    }

    /// `out = rms_norm(o, norm) * silu(z)` for one head of one token; `o` gives 16 numbers from a column on.
    fn epilogue(&self, k: &mut KernelBuilder, t: Val, head: Val, o: &dyn Fn(&mut KernelBuilder, Val) -> Val) {
        let (z, norm) = (k.param(self.z), k.param(self.norm));
        let sum = sum_products(k, pad(self.v.width), |k, c| {
            let x = o(k, c);
            (x, x)
        });
        let scale = mean_rsqrt(k, sum, self.v.width, self.norm_eps);
        let scale = k.splat(scale, 16);
        let z = row_ptr(k, z, t, self.v.row());
        let z = row_ptr(k, z, head, pad(self.v.width));
        let out = self.out_row(k, t, head);
        k.for_range(pad(self.v.width), LANES, |k, c| {
            let [norm, z] = [norm, z].map(|p| k.load_f32x16(p, c));
            let o = o(k, c);
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
            self.for_value_heads(k, head, |k, v_head| {
                let out = self.out_row(k, t, v_head);
                k.for_range(pad(self.v.width), LANES, |k, c| k.store(out, c, zero));
            });
        });
    }
}

/// `Σ a·b` over `elems` (a multiple of 16) elements.
pub fn dot_rows(k: &mut KernelBuilder, a: Val, b: Val, elems: u64) -> Val {
    sum_products(k, elems, |k, i| (k.load_f32x16(a, i), k.load_f32x16(b, i)))
}

/// `Σ a·b` over `elems` (a multiple of 16) elements, 16 of which `pair(i)` gives from `i` on.
fn sum_products(k: &mut KernelBuilder, elems: u64, pair: impl FnOnce(&mut KernelBuilder, Val) -> (Val, Val)) -> Val {
    let zero = k.splat_f32(16, 0.0);
    let (lo, hi) = (k.const_i64(0), k.index(elems));
    let sum = k.for_carry((lo, hi, LANES), &[zero], |k, i, acc| {
        let (x, y) = pair(k, i);
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
