//! `edit_logits` and `token_weights` on a GPU.
//!
//! edit_logits    a block of threads a (row, chunk of 4096 logits): copy, then biases and penalties of the tokens in the chunk, each by a
//!                thread, then peaks, a warp a block of logits
//! token_weights  a block of threads a (row, chunk)
//! traffic        logits are read once and written twice where a row is sampled

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::ops::sample::BLOCK;

use super::super::LowerError;
use super::super::ports::{Lowered, Site};
use super::super::sample::{self, Blocks, CHUNK_BLOCKS, weight};
use super::Place;
use super::rows::{THREADS, begin_row, largest_of, peak_of_block};

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
    let begin = |k: &mut KernelBuilder| {
        begin_row(k);
        Place::here(k)
    };
    sample::edit_logits(site, begin, |k, place, e| {
        each_four_of_chunk(k, e.blocks, e.lo, |k, at| copy_four(k, e.blocks, (e.logits, e.x), at));
        k.barrier();
        e.edit_listed(k, (place.thread, THREADS));
        k.barrier();
        e.edit_drafts(k, (place.thread, THREADS));
        k.barrier();
        store_peaks(k, place, e.blocks, (e.x, e.peaks), (e.first, e.behind));
    })
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
    let (count, padded) = (k.index(blocks.count()), k.index(blocks.peaks_stride()));
    let is_last = k.cmp(Pred::Eq, behind, count);
    let (own, end) = (k.add(first, place.warp), k.select(is_last, padded, behind));
    k.for_each((own, end, THREADS / 32), |k, block| {
        let peak = peak_of_block(k, place, x, block, blocks.stride());
        place.once_a_warp(k, |k| k.store(peaks, block, peak));
    });
}

/// `token_weights`.
pub fn lower_token_weights(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let begin = |k: &mut KernelBuilder| {
        let parts = k.shared(DType::F32, THREADS / 32);
        begin_row(k);
        (Place::here(k), parts)
    };
    sample::token_weights(site, begin, |k, (place, parts), w| {
        let largest = largest_of(k, place, parts, (w.blocks, w.peaks));
        let lo = k.mul_const(w.first, BLOCK);
        each_four_of_chunk(k, w.blocks, lo, |k, at| {
            let v = k.load(DType::F32, 4, w.x, at);
            let v = weight(k, v, largest, w.temperature);
            k.store(w.weights, at, v);
        });
    })
}
