//! `gated_delta_net`: a DeltaNet mixer between its projections, token by token.
//!
//! task     one key head of one sequence, with the value heads that share it
//! conv     q, k and v: causal convolution over the window in the conv state, SiLU; the window moves on
//! prologue q ← scale · q / |q|,  k ← k / |k|,  α = exp(-exp(a_log) · softplus(a + dt_bias)),  β = sigmoid(b)
//! read     y = Sᵀk,  w = Sᵀq  over the old state, some columns at a time
//! update   d = β (v − α y);  o = α w + (k·q) d;  S ← fma(k, d, α S)
//! epilogue out = rms_norm(o, norm) · silu(z)
//! traffic  2 · 4 · head_k_dim · head_v_dim bytes a head and sequence: bound by memory at one token
//!
//! A sequence whose first token of the step has position 0 begins with zero states.
//! Source: arXiv:2412.06464; the single-read form is algebra on its recurrence.

use nextc_ir::graph::Value;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::{Extent, Input};
use nextc_ir::shape::{LANES, Sym, pad};
use nextc_ir::{DType, Op};

use super::LowerError;
use super::matmul::{mean_rsqrt, row_ptr};
use super::ports::{Lowered, Port, Ports, Site};

/// One of q, k, v: its projection, its convolution and its window.
#[derive(Clone, Copy)]
struct Stream {
    x: Port,
    w: Port,
    conv: Port,
    heads: u64,
    width: u64,
    taps: u64,
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

    fn row(&self) -> u64 {
        self.heads * pad(self.width)
    }

    /// Pointer to the oldest row of head `head`'s window in slot `slot`; rows are `row()` elements apart.
    fn window(&self, k: &mut KernelBuilder, slot: Val, head: Val) -> Val {
        let base = k.param(self.conv);
        let slot = row_ptr(k, base, slot, (self.taps - 1) * self.row());
        row_ptr(k, slot, head, pad(self.width))
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

    /// `out = silu(conv1d(x))` for one head of one token; the window moves on by one.
    fn step(&self, k: &mut KernelBuilder, t: Val, head: Val, window: Val, out: Val) {
        let (x, w) = (k.param(self.x), k.param(self.w));
        let x = row_ptr(k, x, t, self.row());
        let x = row_ptr(k, x, head, pad(self.width));
        let w = row_ptr(k, w, head, pad(self.width));
        k.for_range(pad(self.width), LANES, |k, c| {
            let mut inputs = Vec::new();
            for tap in 0..self.taps - 1 {
                let at = k.add_const(c, tap * self.row());
                inputs.push(k.load_f32x16(window, at));
            }
            inputs.push(k.load_f32x16(x, c));
            let mut sum = k.splat_f32(16, 0.0);
            for (tap, &input) in inputs.iter().enumerate() {
                let at = k.add_const(c, tap as u64 * self.row());
                let weight = k.load_f32x16(w, at);
                sum = k.fma(weight, input, sum);
            }
            for (tap, &input) in inputs.iter().enumerate().skip(1) {
                let at = k.add_const(c, (tap as u64 - 1) * self.row());
                k.store(window, at, input);
            }
            let value = k.silu(sum);
            k.store(out, c, value);
        });
    }
}

/// Everything the kernel is connected to.
struct Mixer {
    q: Stream,
    k: Stream,
    v: Stream,
    gates: [Port; 4],
    z: Port,
    norm: Port,
    delta: Port,
    out: Port,
    eps: f32,
    scale: f32,
    norm_eps: f32,
    vector_bits: u32,
}

/// `gated_delta_net`.
pub fn lower_gated_delta_net(site: &Site<'_>) -> Result<Lowered, LowerError> {
    debug_assert_eq!(site.op(), Op::GatedDeltaNet);
    let mut ports = Ports::default();
    let read = |ports: &mut Ports, name: &str| ports.read(name, site.named(name));
    let mixer = Mixer {
        q: Stream::ports(site, &mut ports, ["q", "w_q", "conv_q"]),
        k: Stream::ports(site, &mut ports, ["k", "w_k", "conv_k"]),
        v: Stream::ports(site, &mut ports, ["v", "w_v", "conv_v"]),
        gates: ["a", "b", "a_log", "dt_bias"].map(|n| read(&mut ports, n)),
        z: read(&mut ports, "z"),
        norm: read(&mut ports, "norm"),
        delta: ports.write("delta", site.named("delta")),
        out: ports.write("out", site.result(0)),
        eps: site.float("eps"),
        scale: site.float("scale"),
        norm_eps: site.float("norm_eps"),
        vector_bits: site.target.vector_bits,
    };
    let sequences = SequencePorts::new(site.named("seqs"), &mut ports);
    let heads = mixer.q.heads;
    let mut k = ports.builder(site, Extent::from(Sym::B) * heads.into());
    let scratch = Scratch {
        q: k.alloc(DType::F32, pad(mixer.q.width)),
        k: k.alloc(DType::F32, pad(mixer.k.width)),
        v: k.alloc(DType::F32, pad(mixer.v.width)),
        o: k.alloc(DType::F32, pad(mixer.v.width)),
    };
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
    positions: Port,
}

impl SequencePorts {
    /// The ports.
    pub fn new(_seqs: Value, ports: &mut Ports) -> Self {
        Self {
            positions: ports.step(Input::Positions),
            cu_seqlens: ports.step(Input::CuSeqlens),
            slot: ports.step(Input::Slot),
        }
    }

    /// The tokens of sequence `b`.
    pub fn run(&self, k: &mut KernelBuilder, b: Val) -> Run {
        let (cu_seqlens, slot) = (k.param(self.cu_seqlens), k.param(self.slot));
        let next = k.add_const(b, 1);
        Run {
            slot: k.load_index(slot, b),
            begin: k.load_index(cu_seqlens, b),
            end: k.load_index(cu_seqlens, next),
            positions: self.positions,
        }
    }
}

struct Scratch {
    q: Val,
    k: Val,
    v: Val,
    o: Val,
}

impl Mixer {
    fn shared_heads(&self) -> u64 {
        self.v.heads / self.q.heads
    }

    /// Value head number `i` of those that share key head `head`.
    fn value_head(&self, k: &mut KernelBuilder, head: Val, i: Val) -> Val {
        let base = k.mul_const(head, self.shared_heads());
        k.add(base, i)
    }

    fn state(&self, k: &mut KernelBuilder, slot: Val, head: Val) -> Val {
        let elems = self.k.width * pad(self.v.width);
        let base = k.param(self.delta);
        let slot = row_ptr(k, base, slot, self.v.heads * elems);
        row_ptr(k, slot, head, elems)
    }

    fn run(&self, k: &mut KernelBuilder, run: &Run, head: Val, scratch: &Scratch) {
        let q_window = self.q.window(k, run.slot, head);
        let k_window = self.k.window(k, run.slot, head);
        let some = k.cmp(Pred::Lt, run.begin, run.end);
        k.if_then(some, |k| {
            let positions = k.param(run.positions);
            let first = k.load_index(positions, run.begin);
            let zero = k.const_i64(0);
            let fresh = k.cmp(Pred::Eq, first, zero);
            k.if_then(fresh, |k| self.clear(k, run.slot, head, (q_window, k_window)));
        });
        k.for_each((run.begin, run.end, 1), |k, t| {
            self.q.step(k, t, head, q_window, scratch.q);
            self.k.step(k, t, head, k_window, scratch.k);
            l2_normalise(k, scratch.q, self.q.width, self.eps, self.scale);
            l2_normalise(k, scratch.k, self.k.width, self.eps, 1.0);
            let kq = dot_rows(k, scratch.k, scratch.q, pad(self.q.width));
            k.for_range(self.shared_heads(), 1, |k, i| {
                let v_head = self.value_head(k, head, i);
                let window = self.v.window(k, run.slot, v_head);
                self.v.step(k, t, v_head, window, scratch.v);
                let (alpha, beta) = self.gate(k, t, v_head);
                let state = self.state(k, run.slot, v_head);
                self.update(k, scratch, state, (alpha, beta, kq));
                self.epilogue(k, t, v_head, scratch.o);
            });
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
            k.for_range(self.k.width * pad(self.v.width), LANES, |k, at| k.store(state, at, zero));
        });
    }

    /// `(α, β)` of one token and value head.
    fn gate(&self, k: &mut KernelBuilder, t: Val, head: Val) -> (Val, Val) {
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
    fn chunks(&self, columns: u64) -> u64 {
        let most = u64::from(self.vector_bits) / 128;
        [4, 2, 1].into_iter().find(|&n| n <= most && columns.is_multiple_of(n)).expect("1 divides everything")
    }

    /// One token of the recurrence on one head's state; the output goes to `scratch.o`.
    fn update(&self, k: &mut KernelBuilder, scratch: &Scratch, state: Val, (alpha, beta, kq): (Val, Val, Val)) {
        let stride = pad(self.v.width);
        let chunks = self.chunks(stride / LANES);
        let [alpha, beta, kq] = [alpha, beta, kq].map(|x| k.splat(x, 16));
        let zero = k.splat_f32(16, 0.0);
        let (lo, rows) = (k.const_i64(0), k.index(self.k.width));
        k.for_range(stride, chunks * LANES, |k, column| {
            let at = |k: &mut KernelBuilder, i: Val, c: u64| {
                let row = k.mul_const(i, stride);
                let at = k.add(row, column);
                k.add_const(at, c * LANES)
            };
            let init = vec![zero; 2 * chunks as usize];
            let sums = k.for_carry((lo, rows, 1), &init, |k, i, acc| {
                let (ki, qi) = (k.load_f32(scratch.k, i), k.load_f32(scratch.q, i));
                let (ki, qi) = (k.splat(ki, 16), k.splat(qi, 16));
                let mut next = Vec::new();
                for c in 0..chunks {
                    let place = at(k, i, c);
                    let s = k.load_f32x16(state, place);
                    next.push(k.fma(s, ki, acc[2 * c as usize]));
                    next.push(k.fma(s, qi, acc[2 * c as usize + 1]));
                }
                next
            });
            let mut deltas = Vec::new();
            for c in 0..chunks {
                let (y, w) = (sums[2 * c as usize], sums[2 * c as usize + 1]);
                let place = k.add_const(column, c * LANES);
                let v = k.load_f32x16(scratch.v, place);
                let decayed = k.fmul(alpha, y);
                let error = k.fsub(v, decayed);
                let d = k.fmul(beta, error);
                let kept = k.fmul(alpha, w);
                let o = k.fma(kq, d, kept);
                k.store(scratch.o, place, o);
                deltas.push(d);
            }
            k.for_each((lo, rows, 1), |k, i| {
                let ki = k.load_f32(scratch.k, i);
                let ki = k.splat(ki, 16);
                for (c, &d) in deltas.iter().enumerate() {
                    let place = at(k, i, c as u64);
                    let s = k.load_f32x16(state, place);
                    let decayed = k.fmul(alpha, s);
                    let new = k.fma(ki, d, decayed);
                    k.store(state, place, new);
                }
            });
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

    fn out_row(&self, k: &mut KernelBuilder, t: Val, head: Val) -> Val {
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
