//! `attention`: what stands between the projections of a gated-attention layer and its output projection.
//!
//! norm_rope_append  task: one token; q and k are normed and rotated, k and v appended to their page
//! gated_attention   two classes of tokens, all query heads that share a kv head together; online softmax over pages (`group`) or in `tiles`
//!   page    scores of up to `page_tokens` positions in scratch, `m ← max`, `p = exp(s − m)`, `l ← l·c + Σp`, `o ← o·c + p·V`
//!   epilogue  out = o / l · sigmoid(output_gate)
//!   runs that are decoded (`decode`)  a task a split of positions; a tail puts together what splits found
//!   long runs (`long`)                a task a token, or some in tiles
//! traffic  two rows of KV a kv head and position: bound by memory
//!
//! Pages and splits are absolute positions, taken in order: a token's bits depend on neither the step's size nor its neighbours.

mod decode;
mod group;
mod long;
mod tiles;

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::{LANES, Sym, pad};
use nextc_ir::{DType, Op};

use super::LowerError;
use super::delta_rule::dot_rows;
use super::matmul::{mean_rsqrt, row_ptr};
use super::pages::Pages;
use super::ports::{Lowered, Port, Ports, Site};

/// The rotation of one token: cosines and sines in scratch.
struct Rotation {
    frequencies: u64,
    cos: Val,
    sin: Val,
}

impl Rotation {
    fn compute(k: &mut KernelBuilder, inv_freq: Val, frequencies: u64, factor: f32, position: Val) -> Self {
        let n = pad(frequencies);
        let (cos_out, sin_out) = (k.alloc(DType::F32, n), k.alloc(DType::F32, n));
        let position = k.narrow(position);
        let position = k.to_float(position);
        let position = k.splat(position, 16);
        let factor = k.splat_f32(16, factor);
        k.for_range(n, LANES, |k, i| {
            let f = k.load_f32x16(inv_freq, i);
            let angle = k.fmul(position, f);
            let (sin, cos) = k.sin_cos(angle);
            let (sin, cos) = (k.fmul(sin, factor), k.fmul(cos, factor));
            k.store(cos_out, i, cos);
            k.store(sin_out, i, sin);
        });
        Self { frequencies, cos: cos_out, sin: sin_out }
    }

    /// Rotates the pairs `(j, j + n)` of a head in place.
    fn apply(&self, k: &mut KernelBuilder, head: Val) {
        let lanes = if self.frequencies.is_multiple_of(LANES) { LANES } else { 1 };
        k.for_range(self.frequencies, lanes, |k, j| {
            let partner = k.add_const(j, self.frequencies);
            let load = |k: &mut KernelBuilder, p: Val, at: Val| k.load(DType::F32, lanes as u32, p, at);
            let (a, b) = (load(k, head, j), load(k, head, partner));
            let (cos, sin) = (load(k, self.cos, j), load(k, self.sin, j));
            let (ac, bs) = (k.fmul(a, cos), k.fmul(b, sin));
            let (bc, as_) = (k.fmul(b, cos), k.fmul(a, sin));
            let (first, second) = (k.fsub(ac, bs), k.fadd(bc, as_));
            k.store(head, j, first);
            k.store(head, partner, second);
        });
    }
}

/// `out = x * rsqrt(mean(x²) + eps) * (1 + w)` for one head.
fn norm_head(k: &mut KernelBuilder, (x, w, out): (Val, Val, Val), width: u64, eps: f32) {
    let sum = dot_rows(k, x, x, pad(width));
    let scale = mean_rsqrt(k, sum, width, eps);
    let scale = k.splat(scale, 16);
    let one = k.splat_f32(16, 1.0);
    k.for_range(pad(width), LANES, |k, c| {
        let (x, w) = (k.load_f32x16(x, c), k.load_f32x16(w, c));
        let gain = k.fadd(w, one);
        let value = k.fmul(x, scale);
        let value = k.fmul(value, gain);
        k.store(out, c, value);
    });
}

/// The queries of `norm_rope_append`.
#[derive(Clone, Copy)]
pub(super) struct Queries {
    pub q: Port,
    pub q_norm: Port,
    pub out: Port,
    pub heads: u64,
}

/// What `norm_rope_append` and `norm_append` are connected to.
#[derive(Clone, Copy)]
pub(super) struct NormRope {
    pub pages: Pages,
    /// None of `norm_append`.
    pub queries: Option<Queries>,
    pub k: Port,
    pub v: Port,
    pub k_norm: Port,
    pub inv_freq: Port,
    pub frequencies: u64,
    pub factor: f32,
    pub eps: f32,
}

impl NormRope {
    pub fn ports(site: &Site<'_>, ports: &mut Ports) -> Self {
        let queries = (site.op() == Op::NormRopeAppend).then(|| Queries {
            q: ports.read("q", site.named("q")),
            q_norm: ports.read("q_norm", site.named("q_norm")),
            out: ports.write("q_out", site.result(0)),
            heads: site.inner(site.named("q"))[0],
        });
        let [k, v, k_norm, inv_freq] = ["k", "v", "k_norm", "inv_freq"].map(|n| ports.read(n, site.named(n)));
        Self {
            pages: Pages::ports(site, ports, true),
            queries,
            k,
            v,
            k_norm,
            inv_freq,
            frequencies: site.weight(site.named("inv_freq")).shape[0],
            factor: site.float("factor"),
            eps: site.float("eps"),
        }
    }

    /// Elements of a head, as stored.
    pub const fn elems(&self) -> u64 {
        pad(self.pages.row.width)
    }
}

/// `norm_rope_append` and `norm_append`.
pub fn lower_norm_append(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let bound = NormRope::ports(site, &mut ports);
    let (pages, head_elems) = (bound.pages, bound.elems());
    let (width, eps) = (pages.row.width, bound.eps);
    let mut k = ports.builder(site, Extent::Sym(Sym::T));
    let t = k.task();
    let position = pages.position(&mut k, t);
    let inv_freq = k.param(bound.inv_freq);
    let rotation = Rotation::compute(&mut k, inv_freq, bound.frequencies, bound.factor, position);
    let rotated = k.alloc(DType::F32, head_elems);
    let b = pages.sequence(&mut k, t);
    let slot = pages.slot(&mut k, b);
    let zero = k.const_i64(0);
    let live = k.cmp(Pred::Ge, slot, zero);
    let append = |k: &mut KernelBuilder| {
        if let Some(Queries { q, q_norm, out, heads }) = bound.queries {
            let [q_row, out_row] = [q, out].map(|port| {
                let base = k.param(port);
                row_ptr(k, base, t, heads * head_elems)
            });
            let q_norm = k.param(q_norm);
            k.for_range(heads, 1, |k, h| {
                let (x, y) = (row_ptr(k, q_row, h, head_elems), row_ptr(k, out_row, h, head_elems));
                norm_head(k, (x, q_norm, y), width, eps);
                rotation.apply(k, y);
            });
        }
        let (page, place) = (k.div_const(position, pages.page_tokens), k.rem_const(position, pages.page_tokens));
        let (key, v, k_norm) = (k.param(bound.k), k.param(bound.v), k.param(bound.k_norm));
        let key_row = row_ptr(k, key, t, pages.heads * head_elems);
        let v_row = row_ptr(k, v, t, pages.heads * head_elems);
        k.for_range(pages.heads, 1, |k, h| {
            let (keys, values) = pages.block(k, b, page, h);
            let (x, v) = (row_ptr(k, key_row, h, head_elems), row_ptr(k, v_row, h, head_elems));
            norm_head(k, (x, k_norm, rotated), width, eps);
            rotation.apply(k, rotated);
            pages.store_row(k, (keys, place), rotated);
            pages.store_row(k, (values, place), v);
        });
        Vec::new()
    };
    k.if_else(live, append, |k| {
        if let Some(Queries { out, heads, .. }) = bound.queries {
            let out = k.param(out);
            let out_row = row_ptr(k, out, t, heads * head_elems);
            let nothing = k.splat_f32(16, 0.0);
            k.for_range(heads * head_elems, LANES, |k, c| k.store(out_row, c, nothing));
        }
        Vec::new()
    });
    Ok(ports.finish(k.finish()))
}

/// What `gated_attention` is connected to.
#[derive(Clone, Copy)]
pub(super) struct Attention {
    pub pages: Pages,
    pub q: Port,
    pub gate: Port,
    pub out: Port,
    /// Query heads.
    pub heads: u64,
    /// Query heads of a kv head.
    pub shared: u64,
    pub scale: f32,
}

impl Attention {
    pub fn ports(site: &Site<'_>, ports: &mut Ports) -> Self {
        let heads = site.inner(site.named("q"))[0];
        let (q, gate) = (ports.read("q", site.named("q")), ports.read("output_gate", site.named("output_gate")));
        let pages = Pages::ports(site, ports, false);
        let out = ports.write("out", site.result(0));
        Self { pages, q, gate, out, heads, shared: heads / pages.heads, scale: site.float("scale") }
    }

    /// Elements of a head of q and of the output, as stored.
    pub const fn elems(&self) -> u64 {
        pad(self.pages.row.width)
    }

    /// Pointer to the rows of token `t` in a tensor of query heads that share a kv head.
    fn rows(&self, k: &mut KernelBuilder, port: Port, t: Val, kv_head: Val) -> Val {
        let base = k.param(port);
        let row = row_ptr(k, base, t, self.heads * self.elems());
        row_ptr(k, row, kv_head, self.shared * self.elems())
    }

    /// Zeros for the query heads of token `t` that share a kv head.
    fn zero(&self, k: &mut KernelBuilder, t: Val, kv_head: Val) {
        let (out, nothing) = (self.rows(k, self.out, t, kv_head), k.splat_f32(16, 0.0));
        k.for_range(self.shared * self.elems(), LANES, |k, c| k.store(out, c, nothing));
    }

    /// `out = o / sum · sigmoid(gate)` of a head.
    fn emit(&self, k: &mut KernelBuilder, (o, sum, gate, out): (Val, Val, Val, Val)) {
        let sum = k.splat(sum, 16);
        k.for_range(self.elems(), LANES, |k, c| {
            let (x, g) = (k.load_f32x16(o, c), k.load_f32x16(gate, c));
            let x = k.fdiv(x, sum);
            let g = k.sigmoid(g);
            let x = k.fmul(x, g);
            k.store(out, c, x);
        });
    }
}

/// `gated_attention`: the runs that are decoded, then the long ones.
pub fn lower_gated_attention(site: &Site<'_>) -> Result<Lowered, LowerError> {
    debug_assert_eq!(site.op(), Op::GatedAttention);
    let mut ports = Ports::default();
    let bound = Attention::ports(site, &mut ports);
    // threads of a GPU hand nothing to a tail
    let splits = site.target.gpu.is_none().then(|| decode::lower(site, ports.clone(), bound));
    let long = long::lower(site, ports, bound, splits.is_some());
    Ok(match splits {
        Some(splits) => splits.then(long),
        None => long,
    })
}
