//! `edit_logits` and `token_weights` on a GPU.
//!
//! edit_logits    a block of threads a (row, chunk of 4096 logits): copy, then biases and penalties of the tokens in the chunk, each by a
//!                thread, then peaks, a warp a block of logits
//! token_weights  a block of threads a (row, chunk)
//! traffic        logits are read once and written twice where a row is sampled

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::ops::sample::{BLOCK, Factor};
use nextc_ir::shape::pad;

use super::super::LowerError;
use super::super::matmul::row_ptr;
use super::super::ports::{Lowered, Ports, Site};
use super::super::sample::{Blocks, CHUNK_BLOCKS, Edits, bounded, chunk_tasks, weight};
use super::rows::{THREADS, begin_row, largest_of};
use super::{Place, warp_max};

/// Logits of a task.
const CHUNK: u64 = CHUNK_BLOCKS * BLOCK;

/// Runs `body` for every four of the logits `lo ..` of a chunk that are stored, shared by the threads.
fn each_four_of_chunk(k: &mut KernelBuilder, blocks: Blocks, lo: Val, mut body: impl FnMut(&mut KernelBuilder, Val)) {
    let thread = k.thread();
    let first = k.mul_const(thread, 4);
    let first = k.add(lo, first);
    let (behind, end) = (k.add_const(lo, CHUNK), k.index(blocks.stride()));
    let end = k.min_i64(behind, end);
    k.for_each((first, end, 4 * THREADS), |k, at| body(k, at));
}

/// `edit_logits`.
pub fn lower_edit_logits(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let blocks = Blocks::of(site, site.named("logits"));
    let edits = Edits::read(site, &mut ports);
    let logits = ports.read("logits", site.named("logits"));
    let (x, peaks) = (ports.write("x", site.result(0)), ports.write("peaks", site.result(1)));
    let mut k = ports.builder(site, chunk_tasks(site, blocks)?);
    begin_row(&mut k);
    let place = Place::here(&mut k);
    let (row, first, behind) = blocks.task(&mut k);
    let (logits, x, peaks) = (k.param(logits), k.param(x), k.param(peaks));
    let logits = row_ptr(&mut k, logits, row, blocks.stride());
    let (x, peaks) = (row_ptr(&mut k, x, row, blocks.stride()), row_ptr(&mut k, peaks, row, blocks.peaks_stride()));
    let edits = edits.of_row(&mut k, row);
    let plain = edits.settings.is_plain(&mut k);
    let wanted = k.not(plain);
    k.if_then(wanted, |k| {
        let lo = k.mul_const(first, BLOCK);
        each_four_of_chunk(k, blocks, lo, |k, at| copy_four(k, blocks, (logits, x), at));
        let hi = k.mul_const(behind, BLOCK);
        let chunk = edits.chunk(x, (lo, hi), blocks.vocab);
        k.barrier();
        edits.edit_listed(k, chunk, (place.thread, THREADS));
        k.barrier();
        edits.edit_drafts(k, chunk, (place.thread, THREADS));
        k.barrier();
        store_peaks(k, place, blocks, (x, peaks), (first, behind));
    });
    Ok(ports.finish(k.finish()))
}

/// Copies four logits, with -infinity behind the vocabulary.
fn copy_four(k: &mut KernelBuilder, blocks: Blocks, (from, to): (Val, Val), at: Val) {
    let v = k.load(DType::F32, 4, from, at);
    let v = if blocks.vocab.is_multiple_of(4) && blocks.vocab == blocks.stride() {
        v
    } else {
        let (lowest, vocab) = (k.const_f32(f32::NEG_INFINITY), k.index(blocks.vocab));
        let lanes = [0, 1, 2, 3].map(|lane| {
            let (x, at) = (k.extract(v, lane), k.add_const(at, lane.into()));
            let known = k.cmp(Pred::Lt, at, vocab);
            k.select(known, x, lowest)
        });
        k.quad(lanes)
    };
    k.store(to, at, v);
}

/// Writes the peaks of blocks `first .. behind`, and after the last block the padding.
fn store_peaks(
    k: &mut KernelBuilder,
    place: Place,
    blocks: Blocks,
    (x, peaks): (Val, Val),
    (first, behind): (Val, Val),
) {
    let (zero, lowest) = (k.const_i64(0), k.const_f32(f32::NEG_INFINITY));
    let own = k.add(first, place.warp);
    k.for_each((own, behind, THREADS / 32), |k, block| {
        let (lo, hi) = blocks.range(k, block, blocks.stride());
        let own = k.add(lo, place.lane);
        let peak = k.for_carry((own, hi, 32), &[lowest], |k, i, acc| {
            let x = k.load_f32(x, i);
            let x = bounded(k, x);
            vec![k.fmax(acc[0], x)]
        })[0];
        let peak = warp_max(k, peak);
        let leads = k.cmp(Pred::Eq, place.lane, zero);
        k.if_then(leads, |k| k.store(peaks, block, peak));
    });
    let (count, padded) = (k.index(blocks.count()), k.index(blocks.peaks_stride()));
    let is_last = k.cmp(Pred::Eq, behind, count);
    k.if_then(is_last, |k| {
        let own = k.add(count, place.thread);
        k.for_each((own, padded, THREADS), |k, i| k.store(peaks, i, lowest));
    });
}

/// `token_weights`.
pub fn lower_token_weights(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let blocks = Blocks::of(site, site.named("x"));
    let reads = ["x", "peaks", "factors"].map(|name| ports.read(name, site.named(name)));
    let weights = ports.write("weights", site.result(0));
    let mut k = ports.builder(site, chunk_tasks(site, blocks)?);
    let parts = k.shared(DType::F32, THREADS / 32);
    begin_row(&mut k);
    let place = Place::here(&mut k);
    let (row, first, _) = blocks.task(&mut k);
    let [x, peaks, factors] = reads.map(|port| k.param(port));
    let weights = k.param(weights);
    let (x, weights) = (row_ptr(&mut k, x, row, blocks.stride()), row_ptr(&mut k, weights, row, blocks.stride()));
    let factors = row_ptr(&mut k, factors, row, pad(Factor::COUNT));
    let at = k.index(Factor::Temperature.at());
    let (temperature, zero) = (k.load_f32(factors, at), k.const_f32(0.0));
    let drawn = k.cmp(Pred::Gt, temperature, zero);
    k.if_then(drawn, |k| {
        let peaks = row_ptr(k, peaks, row, blocks.peaks_stride());
        let largest = largest_of(k, place, parts, (blocks, peaks));
        let lo = k.mul_const(first, BLOCK);
        each_four_of_chunk(k, blocks, lo, |k, at| {
            let v = k.load(DType::F32, 4, x, at);
            let v = weight(k, v, largest, temperature);
            k.store(weights, at, v);
        });
    });
    Ok(ports.finish(k.finish()))
}
