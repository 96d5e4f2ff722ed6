//! `norm_rope_append` and `norm_append` by blocks of threads: a warp a head of q, or a kv head with its v, of one token.

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::Sym;

use super::super::super::LowerError;
use super::super::super::attention::{NormRope, Queries};
use super::super::super::matmul::{mean_rsqrt, row_ptr};
use super::super::super::ports::{Lowered, Port, Ports, Site};
use super::super::{Element, Place, begin, warp_sum};
use super::runs::sequence_of;

/// Heads that a block norms: a warp each.
const NORM_WARPS: u64 = 4;

impl NormRope {
    /// `x * rsqrt(mean(x²) + eps) * (1 + w)` of one head, by a warp, to shared memory.
    fn norm(&self, k: &mut KernelBuilder, elements: &[Element], (x, w, to): (Val, Val, Val)) {
        let zero = k.const_f32(0.0);
        let [x, w] = [x, w].map(|p| elements.iter().map(|e| e.load(k, p)).collect::<Vec<_>>());
        let sum = x.iter().fold(zero, |sum, &x| k.fma(x, x, sum));
        let sum = warp_sum(k, sum);
        let scale = mean_rsqrt(k, sum, self.pages.row.width, self.eps);
        let one = k.const_f32(1.0);
        for ((element, x), w) in elements.iter().zip(x).zip(w) {
            let gain = k.fadd(w, one);
            let value = k.fmul(x, scale);
            let value = k.fmul(value, gain);
            element.store(k, to, value);
        }
    }

    /// The rotated element of a normed head: pairs are `(j, j + n)`.
    fn rotated(&self, k: &mut KernelBuilder, normed: Val, element: &Element, first: u64, position: Val) -> Val {
        let own = element.load(k, normed);
        if first >= 2 * self.frequencies {
            return own;
        }
        let n = k.index(self.frequencies);
        let ends = k.add(n, n);
        let rotates = k.cmp(Pred::Lt, element.at, ends);
        let rotate = |k: &mut KernelBuilder| {
            let is_first = k.cmp(Pred::Lt, element.at, n);
            let (further, back) = (k.add(element.at, n), k.sub(element.at, n));
            let (j, partner) = (k.select(is_first, element.at, back), k.select(is_first, further, back));
            let inv_freq = k.param(self.inv_freq);
            let (f, other) = (k.load_f32(inv_freq, j), k.load_f32(normed, partner));
            let position = k.narrow(position);
            let position = k.to_float(position);
            let angle = k.fmul(position, f);
            let (sin, cos) = k.sin_cos(angle);
            let factor = k.const_f32(self.factor);
            let (sin, cos) = (k.fmul(sin, factor), k.fmul(cos, factor));
            let (straight, crossed) = (k.fmul(own, cos), k.fmul(other, sin));
            let (minus, plus) = (k.fsub(straight, crossed), k.fadd(straight, crossed));
            vec![k.select(is_first, minus, plus)]
        };
        k.if_else(rotates, rotate, |_| vec![own])[0]
    }
}

/// `norm_rope_append` and `norm_append`.
pub fn lower_norm_append(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let bound = NormRope::ports(site, &mut ports);
    let (pages, heads, elems) = (bound.pages, bound.queries.map_or(0, |q| q.heads), bound.elems());
    let all_heads = heads + pages.heads;
    let groups = all_heads.div_ceil(NORM_WARPS);
    let mut k = ports.builder(site, Extent::Sym(Sym::T) * groups.into());
    k.threads(NORM_WARPS as u32 * 32);
    let place = Place::here(&mut k);
    let task = k.task();
    let (t, group) = (k.div_const(task, groups), k.rem_const(task, groups));
    let first = k.mul_const(group, NORM_WARPS);
    let head = k.add(first, place.warp);
    let normed = k.shared(DType::F32, NORM_WARPS * elems);
    let normed = row_ptr(&mut k, normed, place.warp, elems);
    let elements = place.places(&mut k, elems);
    let [q_heads, ends] = [heads, all_heads].map(|n| k.index(n));
    let (is_query, exists) = (k.cmp(Pred::Lt, head, q_heads), k.cmp(Pred::Lt, head, ends));
    begin(&mut k);
    let b = sequence_of(&mut k, pages.cu_seqlens, place.lane, t);
    let (slot, position, zero) = (pages.slot(&mut k, b), pages.position(&mut k, t), k.const_i64(0));
    let live = k.cmp(Pred::Ge, slot, zero);
    // a warp without a head does what the last one does, and stores nothing
    let last = k.index(all_heads - 1);
    let head = k.min_i64(head, last);
    let kv_head = k.sub(head, q_heads);
    let kv_head = k.select(is_query, zero, kv_head);
    let row = |k: &mut KernelBuilder, port: Port, heads: u64, head: Val| {
        let base = k.param(port);
        let row = row_ptr(k, base, t, heads * elems);
        row_ptr(k, row, head, elems)
    };
    let (x, w, v) =
        (row(&mut k, bound.k, pages.heads, kv_head), k.param(bound.k_norm), row(&mut k, bound.v, pages.heads, kv_head));
    let query = bound.queries.map(|Queries { q, q_norm, out, .. }| {
        let q_head = k.select(is_query, head, zero);
        (row(&mut k, q, heads, q_head), k.param(q_norm), row(&mut k, out, heads, q_head))
    });
    let (x, w) = query.map_or((x, w), |(q, q_norm, _)| (k.select(is_query, q, x), k.select(is_query, q_norm, w)));
    bound.norm(&mut k, &elements, (x, w, normed));
    k.barrier();
    let queries = |k: &mut KernelBuilder, out: Val| {
        for (element, first) in elements.iter().zip((0..).step_by(32)) {
            let nothing = k.const_f32(0.0);
            let value = bound.rotated(k, normed, element, first, position);
            let value = k.select(live, value, nothing);
            element.store(k, out, value);
        }
        Vec::new()
    };
    let keys = |k: &mut KernelBuilder| {
        let appends = k.and(live, exists);
        k.if_then(appends, |k| {
            let (page, at) = (k.div_const(position, pages.page_tokens), k.rem_const(position, pages.page_tokens));
            let (keys, values) = pages.block(k, b, page, kv_head);
            let own = elements.iter().zip((0..).step_by(32));
            let key: Vec<Val> =
                own.map(|(element, first)| bound.rotated(k, normed, element, first, position)).collect();
            pages.store_by_warp(k, (keys, at), (&elements, &key));
            let value: Vec<Val> = elements.iter().map(|element| element.load(k, v)).collect();
            pages.store_by_warp(k, (values, at), (&elements, &value));
        });
        Vec::new()
    };
    match query {
        Some((_, _, out)) => k.if_else(is_query, |k| queries(k, out), keys),
        None => keys(&mut k),
    };
    Ok(ports.finish(k.finish()))
}
