//! `attention`: what stands between the projections of a gated-attention layer and its output projection.
//!
//! norm_rope_append  task: one token; q and k are normed and rotated, k and v appended to their page
//! gated_attention   task: one token and kv head with the query heads that share it; online softmax over pages; long runs: `tiles`
//!   page    scores of up to `page_tokens` positions in scratch, `m ← max`, `p = exp(s − m)`, `l ← l·c + Σp`, `o ← o·c + p·V`
//!   epilogue  out = o / l · sigmoid(output_gate)
//! traffic  two rows of KV a kv head and position: bound by memory
//!
//! Pages are absolute positions, taken in order: a token's bits depend on neither the step's size nor its neighbours.

mod tiles;

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::{LANES, Sym, pad};
use nextc_ir::{DType, Op};

use self::tiles::{Run, Tiles};
use super::LowerError;
use super::bulk::Classes;
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

/// Query heads whose sums are kept in registers together.
const HEADS_AT_ONCE: u64 = 8;

/// The query heads that share a kv head, and their running softmax in scratch.
struct Group {
    /// Query heads.
    heads: u64,
    /// Elements of a head.
    elems: u64,
    pages: Pages,
    scale: f32,
    /// `[heads][elems]`: the queries.
    q: Val,
    /// `[heads][page_tokens]`: scores, then probabilities of one page.
    scores: Val,
    /// `[heads][elems]`: weighted sums of values.
    o: Val,
    /// `[heads]`: running maximum.
    max: Val,
    /// `[heads]`: running sum.
    sum: Val,
}

/// What is done with a line: its number, the vectors of it that hold elements, and the sums before give the sums after.
type LineBody<'a> = dyn FnMut(&mut KernelBuilder, Val, u64, &[Val]) -> Vec<Val> + 'a;

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

/// `gated_attention`.
pub fn lower_gated_attention(site: &Site<'_>) -> Result<Lowered, LowerError> {
    debug_assert_eq!(site.op(), Op::GatedAttention);
    let mut ports = Ports::default();
    let bound = Attention::ports(site, &mut ports);
    let (pages, shared, elems) = (bound.pages, bound.shared, bound.elems());
    let mut k = ports.builder(site, Extent::from(Sym::T) * pages.heads.into());
    let task = k.task();
    let (t, kv_head) = (k.div_const(task, pages.heads), k.rem_const(task, pages.heads));
    let row = |k: &mut KernelBuilder, port: Port| {
        let base = k.param(port);
        let row = row_ptr(k, base, t, bound.heads * elems);
        row_ptr(k, row, kv_head, shared * elems)
    };
    let group = Group {
        heads: shared,
        elems,
        pages,
        scale: bound.scale,
        q: row(&mut k, bound.q),
        scores: k.alloc(DType::F32, shared * pages.page_tokens),
        o: k.alloc(DType::F32, shared * elems),
        max: k.alloc(DType::F32, shared),
        sum: k.alloc(DType::F32, shared),
    };
    let tiles = site.target.unit().map(|unit| Tiles::alloc(&mut k, bound, unit));
    let b = pages.sequence(&mut k, t);
    let slot = pages.slot(&mut k, b);
    let zero = k.const_i64(0);
    let live = k.cmp(Pred::Ge, slot, zero);
    let (gate, out) = (row(&mut k, bound.gate), row(&mut k, bound.out));
    let alone = |k: &mut KernelBuilder| {
        group.begin(k);
        let position = pages.position(k, t);
        let length = k.add_const(position, 1);
        let up = k.add_const(position, pages.page_tokens);
        let count = k.div_const(up, pages.page_tokens);
        let one = k.const_i64(1);
        let last = k.sub(count, one);
        k.for_each((zero, count, 1), |k, page| {
            let block = pages.block(k, b, page, kv_head);
            let next = k.add_const(page, 1);
            let next = k.min_i64(next, last);
            let next = pages.block(k, b, next, kv_head);
            let first = k.mul_const(page, pages.page_tokens);
            let left = k.sub(length, first);
            let full = k.index(pages.page_tokens);
            let tokens = k.min_i64(left, full);
            group.page(k, block, next, tokens);
        });
        group.finish(k, &bound, gate, out);
        Vec::new()
    };
    let attend = |k: &mut KernelBuilder| match &tiles {
        None => alone(k),
        Some(tiles) => {
            let cu_seqlens = k.param(pages.cu_seqlens);
            let next = k.add_const(b, 1);
            let (begin, end) = (k.load_index(cu_seqlens, b), k.load_index(cu_seqlens, next));
            let is_bulk = Classes::is_bulk_run(k, begin, end);
            // the first token of a block does the work of all
            let together = |k: &mut KernelBuilder| {
                let before = k.sub(t, begin);
                let within = k.rem_const(before, Tiles::tokens(&bound));
                let is_first = k.cmp(Pred::Eq, within, zero);
                k.if_then(is_first, |k| {
                    let last = k.add_const(t, Tiles::tokens(&bound));
                    let end = k.min_i64(last, end);
                    tiles.run(k, Run { b, kv_head, first: t, end });
                });
                Vec::new()
            };
            k.if_else(is_bulk, together, alone)
        }
    };
    k.if_else(live, attend, |k| {
        let nothing = k.splat_f32(16, 0.0);
        k.for_range(shared * elems, LANES, |k, c| k.store(out, c, nothing));
        Vec::new()
    });
    Ok(ports.finish(k.finish()))
}

impl Group {
    fn begin(&self, k: &mut KernelBuilder) {
        let (zeros, zero, lowest) = (k.splat_f32(16, 0.0), k.const_f32(0.0), k.const_f32(f32::NEG_INFINITY));
        k.for_range(self.heads * self.elems, LANES, |k, c| k.store(self.o, c, zeros));
        k.for_range(self.heads, 1, |k, h| {
            k.store(self.max, h, lowest);
            k.store(self.sum, h, zero);
        });
    }

    /// Query heads in batches that fit the registers: `(first, how many)`.
    fn batches(&self) -> Vec<(u64, u64)> {
        (0..self.heads).step_by(HEADS_AT_ONCE as usize).map(|h| (h, HEADS_AT_ONCE.min(self.heads - h))).collect()
    }

    /// Adds the first `tokens` positions of one page. Those of the next one are asked for meanwhile.
    fn page(&self, k: &mut KernelBuilder, (keys, values): (Val, Val), next: (Val, Val), tokens: Val) {
        let lowest = k.splat_f32(16, f32::NEG_INFINITY);
        k.for_range(self.heads * self.pages.page_tokens, LANES, |k, i| k.store(self.scores, i, lowest));
        for &(first, count) in &self.batches() {
            let next = (first == 0).then_some(next);
            self.score(k, (keys, next), tokens, first, count);
        }
        k.for_range(self.heads, 1, |k, h| self.soften(k, h));
        for &(first, count) in &self.batches() {
            self.weigh(k, values, tokens, first, count);
        }
    }

    /// `scores[h][j] = scale · q[h] · keys[j]`. With each key, a key and a value of the next page are asked for, if it is given.
    fn score(
        &self,
        k: &mut KernelBuilder,
        (keys, next): (Val, Option<(Val, Val)>),
        tokens: Val,
        first: u64,
        count: u64,
    ) {
        let zero = k.const_i64(0);
        let zeros = k.splat_f32(16, 0.0);
        let scale = k.const_f32(self.scale);
        k.for_each((zero, tokens, 1), |k, j| {
            let key = self.pages.row(k, keys, j);
            if let Some((keys, values)) = next {
                let row_bytes = self.pages.row.bytes();
                let (at, bytes) = (k.mul_const(j, row_bytes), k.index(row_bytes));
                k.prefetch(keys, at, bytes);
                k.prefetch(values, at, bytes);
            }
            let mut sums = vec![zeros; count as usize];
            let mut add = |k: &mut KernelBuilder, line: Val, parts: u64, sums: &[Val]| {
                let c = k.mul_const(line, self.pages.row.line_elems());
                let vectors = self.pages.load_line(k, key, line, parts);
                (0..).step_by(LANES as usize).zip(vectors).fold(sums.to_vec(), |sums, (part, x)| {
                    let heads = (first..).zip(sums);
                    let add = heads.map(|(head, sum)| {
                        let at = k.add_const(c, head * self.elems + part);
                        let q = k.load_f32x16(self.q, at);
                        k.fma(q, x, sum)
                    });
                    add.collect()
                })
            };
            self.for_lines(k, &mut sums, &mut add);
            let scale = match self.pages.scale(k, keys, j) {
                Some(of_key) => k.fmul(of_key, scale),
                None => scale,
            };
            for (i, &lanes) in sums.iter().enumerate() {
                let product = k.reduce_add(lanes);
                let score = k.fmul(product, scale);
                let at = k.add_const(j, (first + i as u64) * self.pages.page_tokens);
                k.store(self.scores, at, score);
            }
        });
    }

    /// Scores of one head to probabilities relative to the new maximum; what was summed before is scaled to it.
    fn soften(&self, k: &mut KernelBuilder, h: Val) {
        let scores = row_ptr(k, self.scores, h, self.pages.page_tokens);
        let (lo, hi) = (k.const_i64(0), k.index(self.pages.page_tokens));
        let old = k.load_f32(self.max, h);
        let start = k.splat(old, 16);
        let largest = k.for_carry((lo, hi, LANES), &[start], |k, i, acc| {
            let s = k.load_f32x16(scores, i);
            vec![k.fmax(acc[0], s)]
        });
        let new = k.reduce_max(largest[0]);
        k.store(self.max, h, new);
        let shift = k.splat(new, 16);
        let zeros = k.splat_f32(16, 0.0);
        let added = k.for_carry((lo, hi, LANES), &[zeros], |k, i, acc| {
            let s = k.load_f32x16(scores, i);
            let s = k.fsub(s, shift);
            let p = k.exp(s);
            k.store(scores, i, p);
            vec![k.fadd(acc[0], p)]
        });
        let added = k.reduce_add(added[0]);
        let change = k.fsub(old, new);
        let keep = k.exp(change);
        let sum = k.load_f32(self.sum, h);
        let sum = k.fma(sum, keep, added);
        k.store(self.sum, h, sum);
        let o = row_ptr(k, self.o, h, self.elems);
        let keep = k.splat(keep, 16);
        k.for_range(self.elems, LANES, |k, c| {
            let x = k.load_f32x16(o, c);
            let x = k.fmul(x, keep);
            k.store(o, c, x);
        });
    }

    /// `o[h] += Σ_j p[h][j] · values[j]`.
    fn weigh(&self, k: &mut KernelBuilder, values: Val, tokens: Val, first: u64, count: u64) {
        // as many sums in registers as if a line had one part
        let at_once = (HEADS_AT_ONCE / self.pages.row.parts()).max(1);
        for head in (first..first + count).step_by(at_once as usize) {
            let heads = at_once.min(first + count - head);
            self.for_lines(k, &mut [], &mut |k, line, parts, _| {
                self.weigh_line(k, values, tokens, (line, parts), (head, heads));
                Vec::new()
            });
        }
    }

    /// The part of [`Self::weigh`] for one line of the values.
    fn weigh_line(
        &self,
        k: &mut KernelBuilder,
        values: Val,
        tokens: Val,
        (line, parts): (Val, u64),
        (first, count): (u64, u64),
    ) {
        let (zero, c) = (k.const_i64(0), k.mul_const(line, self.pages.row.line_elems()));
        let heads = || first..first + count;
        let places: Vec<Val> = (0..parts)
            .flat_map(|part| heads().map(move |head| head * self.elems + part * LANES))
            .map(|at| k.add_const(c, at))
            .collect();
        let init: Vec<Val> = places.iter().map(|&at| k.load_f32x16(self.o, at)).collect();
        let sums = k.for_carry((zero, tokens, 1), &init, |k, j, acc| {
            let row = self.pages.row(k, values, j);
            let vectors = self.pages.load_line(k, row, line, parts);
            let scale = self.pages.scale(k, values, j);
            let weights = heads().map(|head| {
                let at = k.add_const(j, head * self.pages.page_tokens);
                let p = k.load_f32(self.scores, at);
                let p = scale.map_or(p, |scale| k.fmul(p, scale));
                k.splat(p, 16)
            });
            let weights: Vec<Val> = weights.collect();
            let pairs = vectors.iter().flat_map(|&v| weights.iter().map(move |&p| (p, v)));
            pairs.zip(acc).map(|((p, v), &sum)| k.fma(p, v, sum)).collect()
        });
        for (&at, &x) in places.iter().zip(&sums) {
            k.store(self.o, at, x);
        }
    }

    /// Carries `sums` over the lines of a row.
    fn for_lines(&self, k: &mut KernelBuilder, sums: &mut [Val], body: &mut LineBody<'_>) {
        let row = self.pages.row;
        let (lines, last) = (row.lines(), self.pages.parts_of(row.lines() - 1));
        let full = if last == row.parts() { lines } else { lines - 1 };
        let (zero, end) = (k.const_i64(0), k.index(full));
        if full > 0 {
            let next = k.for_carry((zero, end, 1), sums, |k, line, sums| body(k, line, row.parts(), sums));
            sums.copy_from_slice(&next);
        }
        if full < lines {
            let next = body(k, end, last, sums);
            sums.copy_from_slice(&next);
        }
    }

    /// `out = o / sum · sigmoid(gate)`.
    fn finish(&self, k: &mut KernelBuilder, bound: &Attention, gate: Val, out: Val) {
        k.for_range(self.heads, 1, |k, h| {
            let sum = k.load_f32(self.sum, h);
            let [o, gate, out] = [self.o, gate, out].map(|p| row_ptr(k, p, h, self.elems));
            bound.emit(k, (o, sum, gate, out));
        });
    }
}
