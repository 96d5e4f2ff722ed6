//! `rows` on a GPU: embedding rows, gathered rows, sums of squares, norms of whole rows.
//!
//! task     one row; threads take four columns each
//! traffic  each row once: bound by the launch

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::{LANES, pad};
use nextc_ir::{DType, Op};

use super::super::LowerError;
use super::super::matmul::{mean_rsqrt, row_ptr};
use super::super::ports::{Lowered, Ports, Site};
use super::tile::Fragments;
use super::{Place, begin, warp_sum};

/// Threads of a row.
const THREADS: u64 = 256;

/// Makes each task a block for one row, and waits.
pub fn begin_row(k: &mut KernelBuilder) {
    k.threads(THREADS as u32);
    begin(k);
}

/// Runs `body` for every four columns of a row of `columns`, a multiple of 4, shared by the threads.
pub fn each_four(k: &mut KernelBuilder, columns: u64, mut body: impl FnMut(&mut KernelBuilder, Val)) {
    let thread = k.thread();
    let (first, end) = (k.mul_const(thread, 4), k.index(columns));
    k.for_each((first, end, 4 * THREADS), |k, column| body(k, column));
}

/// `embed`: one row of the packed matrix.
pub fn lower_embed(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let fragments = Fragments::of(site, site.named("w"), 1)?;
    let (tokens, w) = (ports.read("tokens", site.named("tokens")), ports.read("w", site.named("w")));
    let out = ports.write("out", site.result(0));
    let mut k = ports.builder(site, Extent::from(site.rows(site.result(0))?));
    begin_row(&mut k);
    let (t, tokens, w, out) = (k.task(), k.param(tokens), k.param(w), k.param(out));
    let token = k.load_index(tokens, t);
    let (tile, row) = (k.div_const(token, LANES), k.rem_const(token, LANES));
    let tile = fragments.own_tile(&mut k, w, tile);
    let out = row_ptr(&mut k, out, t, fragments.planes.columns);
    each_four(&mut k, fragments.planes.columns, |k, column| {
        for (i, x) in fragments.four(k, tile, row, column).into_iter().enumerate() {
            let at = k.add_const(column, i as u64);
            k.store(out, at, x);
        }
    });
    Ok(ports.finish(k.finish()))
}

/// `gather_rows`.
pub fn lower_gather_rows(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let stride = site.stride(site.named("x"));
    let (x, rows) = (ports.read("x", site.named("x")), ports.read("rows", site.named("rows")));
    let out = ports.write("out", site.result(0));
    let mut k = ports.builder(site, Extent::from(site.rows(site.result(0))?));
    begin_row(&mut k);
    let (r, x, rows, out) = (k.task(), k.param(x), k.param(rows), k.param(out));
    let row = k.load_index(rows, r);
    let (from, to) = (row_ptr(&mut k, x, row, stride), row_ptr(&mut k, out, r, stride));
    each_four(&mut k, stride, |k, column| {
        let v = k.load(DType::F32, 4, from, column);
        k.store(to, column, v);
    });
    Ok(ports.finish(k.finish()))
}

/// `sum_squares`: the sum of squares of each 16 neighbours, which 16 neighbouring threads add up.
pub fn lower_sum_squares(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let (x, stride) = (site.named("x"), site.stride(site.named("x")));
    let parts = site.inner(site.result(0)).last().copied().ok_or_else(|| site.error("a row of unknown width"))?;
    let x = ports.read("x", x);
    let out = ports.write("out", site.result(0));
    let mut k = ports.builder(site, Extent::from(site.rows(site.result(0))?));
    begin_row(&mut k);
    let place = Place::here(&mut k);
    let (t, x, out) = (k.task(), k.param(x), k.param(out));
    let (x, out) = (row_ptr(&mut k, x, t, stride), row_ptr(&mut k, out, t, pad(parts)));
    let (lane, inside) = (k.rem_const(place.thread, LANES), k.index(stride));
    // whole warps come along: 16 threads write one sum, padding of the sums included
    let (zero, end) = (k.const_i64(0), k.index(pad(parts) * LANES));
    k.for_each((zero, end, THREADS), |k, first| {
        let column = k.add(first, place.thread);
        let exists = k.cmp(Pred::Lt, column, inside);
        let nothing = k.const_f32(0.0);
        let x = k.if_else(exists, |k| vec![k.load_f32(x, column)], |_| vec![nothing])[0];
        let square = k.fmul(x, x);
        let sum = [8, 4, 2, 1].into_iter().fold(square, |sum, mask| {
            let other = k.shuffle_xor(sum, mask);
            k.fadd(sum, other)
        });
        let leads = k.cmp(Pred::Eq, lane, zero);
        k.if_then(leads, |k| {
            let part = k.div_const(column, LANES);
            k.store(out, part, sum);
        });
    });
    Ok(ports.finish(k.finish()))
}

/// `rms_norm` and `rms_norm_plus_one` over the innermost dimension: a block a row and head.
pub fn lower_rms_norm(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let (x, w, eps) = (site.named("x"), site.named("w"), site.float("eps"));
    let inner = site.inner(x);
    let (heads, width) = (inner[..inner.len() - 1].iter().product::<u64>(), inner[inner.len() - 1]);
    let gain_offset = if site.op() == Op::RmsNormPlusOne { 1.0 } else { 0.0 };
    let (x, w, out) = (ports.read("x", x), ports.read("w", w), ports.write("out", site.result(0)));
    let mut k = ports.builder(site, Extent::from(site.rows(site.result(0))?) * heads.into());
    let parts = k.shared(DType::F32, THREADS / 32);
    begin_row(&mut k);
    let place = Place::here(&mut k);
    let task = k.task();
    let (x, w, out) = (k.param(x), k.param(w), k.param(out));
    let (x, out) = (row_ptr(&mut k, x, task, pad(width)), row_ptr(&mut k, out, task, pad(width)));
    let (first, end, nothing) = (k.mul_const(place.thread, 4), k.index(pad(width)), k.splat_f32(4, 0.0));
    let sum = k.for_carry((first, end, 4 * THREADS), &[nothing], |k, c, sum| {
        let v = k.load(DType::F32, 4, x, c);
        vec![k.fma(v, v, sum[0])]
    });
    let sum = k.reduce_add(sum[0]);
    let sum = block_sum(&mut k, place, parts, sum);
    let scale = mean_rsqrt(&mut k, sum, width, eps);
    let (scale, offset) = (k.splat(scale, 4), k.splat_f32(4, gain_offset));
    each_four(&mut k, pad(width), |k, c| {
        let (v, g) = (k.load(DType::F32, 4, x, c), k.load(DType::F32, 4, w, c));
        let g = k.fadd(g, offset);
        let v = k.fmul(v, scale);
        let v = k.fmul(v, g);
        k.store(out, c, v);
    });
    Ok(ports.finish(k.finish()))
}

/// Sum over all threads of a block of [`THREADS`], in all of them; `parts` holds a number a warp.
fn block_sum(k: &mut KernelBuilder, place: Place, parts: Val, x: Val) -> Val {
    let sum = warp_sum(k, x);
    let zero = k.const_i64(0);
    let leads = k.cmp(Pred::Eq, place.lane, zero);
    k.if_then(leads, |k| k.store(parts, place.warp, sum));
    k.barrier();
    let nothing = k.const_f32(0.0);
    (0..THREADS / 32).fold(nothing, |sum, i| {
        let i = k.index(i);
        let part = k.load_f32(parts, i);
        k.fadd(sum, part)
    })
}
