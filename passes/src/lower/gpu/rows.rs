//! `rows` on a GPU: embedding rows, sums of squares, norms of whole rows, the largest logit.
//!
//! task     one row; threads take four columns each
//! traffic  each row once: bound by the launch

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::ops::sample::BLOCK;
use nextc_ir::schedule::Extent;
use nextc_ir::shape::{LANES, pad};
use nextc_ir::{DType, Op};

use super::super::LowerError;
use super::super::elementwise::token_row;
use super::super::matmul::{mean_rsqrt, row_ptr};
use super::super::ports::{Lowered, Ports, Site};
use super::super::sample::{Blocks, bounded, is_finite};
use super::fragments::Fragments;
use super::{Place, WARP, across, begin, half_warp_sum, warp_max, warp_sum};

/// Threads of a row.
pub const THREADS: u64 = 256;

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
    let token = token_row(&mut k, tokens, t);
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
        let sum = half_warp_sum(k, square);
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
    each_warp(k, place, parts, sum, (DType::F32, |k, a, b| k.fadd(a, b)))
}

/// `argmax`: a warp a block of logits finds its peak; in the tail a block of threads a row finds the first of the largest.
pub fn lower_argmax(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let blocks = Blocks::of(site, site.named("x"));
    let rows = site.rows(site.result(0))?;
    let x = ports.read("x", site.named("x"));
    let (best, peaks) = (ports.write("best", site.result(0)), ports.write("peaks", site.result(1)));
    let groups = blocks.peaks_stride().div_ceil(THREADS / 32);
    let mut k = ports.builder(site, Extent::from(rows) * groups.into());
    begin_row(&mut k);
    let (place, task) = (Place::here(&mut k), k.task());
    let (row, group) = (k.div_const(task, groups), k.rem_const(task, groups));
    let (x, peaks, best) = (k.param(x), k.param(peaks), k.param(best));
    let (own_x, own_peaks) =
        (row_ptr(&mut k, x, row, blocks.stride()), row_ptr(&mut k, peaks, row, blocks.peaks_stride()));
    let block = k.mul_const(group, THREADS / 32);
    let block = k.add(block, place.warp);
    let peak = peak_of_block(&mut k, place, own_x, block, blocks.vocab);
    let (zero, count) = (k.const_i64(0), k.index(blocks.peaks_stride()));
    let leads = k.cmp(Pred::Eq, place.lane, zero);
    let exists = k.cmp(Pred::Lt, block, count);
    let leads = k.and(leads, exists);
    k.if_then(leads, |k| k.store(own_peaks, block, peak));
    let kernel = k.finish_with_tail_grid(rows.into(), |k| {
        let (parts, firsts) = (k.shared(DType::F32, THREADS / 32), k.shared(DType::I32, THREADS / 32));
        begin(k);
        let (place, row) = (Place::here(k), k.task());
        let (x, peaks) = (row_ptr(k, x, row, blocks.stride()), row_ptr(k, peaks, row, blocks.peaks_stride()));
        let largest = largest_of(k, place, parts, (blocks, peaks));
        let at = first_of_largest(k, place, firsts, (blocks, x, peaks), largest);
        let (finite, no) = (is_finite(k, largest), k.const_i32(-1));
        let found = k.select(finite, at, no);
        place.once(k, |k| k.store(best, row, found));
    });
    Ok(ports.finish(kernel))
}

/// The peak of block `block` of the logits `..end`, by a warp, in all its threads; -infinity of none.
pub fn peak_of_block(k: &mut KernelBuilder, place: Place, x: Val, block: Val, end: u64) -> Val {
    let first = k.mul_const(block, BLOCK);
    let lowest = k.const_f32(f32::NEG_INFINITY);
    let end = k.index(end);
    let mut peak = lowest;
    for i in 0..BLOCK / 32 {
        let at = k.add_const(first, 32 * i);
        let at = k.add(at, place.lane);
        let exists = k.cmp(Pred::Lt, at, end);
        let x = k.if_else(exists, |k| vec![k.load_f32(x, at)], |_| vec![lowest])[0];
        let x = bounded(k, x);
        peak = k.fmax(peak, x);
    }
    warp_max(k, peak)
}

/// The largest peak of a row, in all threads of a block of [`THREADS`]; `parts` holds a number a warp.
pub fn largest_of(k: &mut KernelBuilder, place: Place, parts: Val, (blocks, peaks): (Blocks, Val)) -> Val {
    let (lowest, count) = (k.const_f32(f32::NEG_INFINITY), k.index(blocks.count()));
    let peak = k.for_carry((place.thread, count, THREADS), &[lowest], |k, i, acc| {
        let peak = k.load_f32(peaks, i);
        vec![k.fmax(acc[0], peak)]
    })[0];
    block_max(k, place, parts, peak)
}

/// Index of the first logit of a row that is `largest`, in all threads; an i32. `parts` holds a number a warp.
pub fn first_of_largest(
    k: &mut KernelBuilder,
    place: Place,
    parts: Val,
    (blocks, x, peaks): (Blocks, Val, Val),
    largest: Val,
) -> Val {
    let (none, count) = (k.const_i32(i32::MAX), k.index(blocks.count()));
    let own = k.for_carry((place.thread, count, THREADS), &[none], |k, i, acc| {
        let (peak, i) = (k.load_f32(peaks, i), k.narrow(i));
        vec![first_if_equal(k, (peak, largest), i, acc[0])]
    })[0];
    let block = block_min(k, place, parts, own);
    let block = k.widen(block);
    let (first, end) = blocks.range(k, block, blocks.vocab);
    let own = k.add(first, place.thread);
    let own = k.for_carry((own, end, THREADS), &[none], |k, i, acc| {
        let (x, i) = (k.load_f32(x, i), k.narrow(i));
        vec![first_if_equal(k, (x, largest), i, acc[0])]
    })[0];
    k.barrier();
    block_min(k, place, parts, own)
}

/// The smaller of `i` and `found` if `x` equals `wanted`, else `found`.
fn first_if_equal(k: &mut KernelBuilder, (x, wanted): (Val, Val), i: Val, found: Val) -> Val {
    let (same, lower) = (k.cmp(Pred::Eq, x, wanted), k.cmp(Pred::Lt, i, found));
    let better = k.and(same, lower);
    k.select(better, i, found)
}

/// The largest over the threads of a block of [`THREADS`], in all of them; `parts` holds a number a warp.
fn block_max(k: &mut KernelBuilder, place: Place, parts: Val, x: Val) -> Val {
    let most = warp_max(k, x);
    each_warp(k, place, parts, most, (DType::F32, |k, a, b| k.fmax(a, b)))
}

/// The smallest i32 over the threads of a block of [`THREADS`], in all of them; `parts` holds a number a warp.
fn block_min(k: &mut KernelBuilder, place: Place, parts: Val, x: Val) -> Val {
    let least = |k: &mut KernelBuilder, a: Val, b: Val| {
        let less = k.cmp(Pred::Lt, a, b);
        k.select(less, a, b)
    };
    let own = across(k, &WARP, x, least);
    each_warp(k, place, parts, own, (DType::I32, least))
}

/// Joins what each warp has found.
fn each_warp(
    k: &mut KernelBuilder,
    place: Place,
    parts: Val,
    own: Val,
    (dtype, join): (DType, impl Fn(&mut KernelBuilder, Val, Val) -> Val),
) -> Val {
    place.once_a_warp(k, |k| k.store(parts, place.warp, own));
    k.barrier();
    let zero = k.const_i64(0);
    let first = k.load(dtype, 1, parts, zero);
    (1..THREADS / 32).fold(first, |joined, i| {
        let i = k.index(i);
        let part = k.load(dtype, 1, parts, i);
        join(k, joined, part)
    })
}
