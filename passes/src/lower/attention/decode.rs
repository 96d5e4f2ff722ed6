//! `gated_attention` of runs that are decoded: positions are split, so that all threads work on one long context.
//!
//! task    a token, a kv head and a split of 512 positions: what `group` finds in its pages; tasks of a run's tokens on one split are neighbours
//! tail    a token and query head: `f = exp(m − max)` of each split, `out = Σ f·o / Σ f·l · sigmoid(output_gate)`, in order
//! traffic two rows of KV a kv head and position, and 8 KB a split between them (eight query heads of 256 elements)
//!
//! Splits lie at absolute positions. Whoever sees a single one is done without the tail, which short contexts leave out.

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::{LANES, Sym};
use nextc_ir::types::DECODE_TOKENS;

use super::super::bulk::Classes;
use super::super::matmul::row_ptr;
use super::super::ports::{Lowered, Ports, Site};
use super::Attention;
use super::group::{Group, Sums};

/// Positions of a split, where pages are no longer: a multiple of theirs.
const SPLIT: u64 = 512;

/// The kernel, with the tail that puts splits together.
pub fn lower(site: &Site<'_>, ports: Ports, bound: Attention) -> Lowered {
    let (pages, decode) = (bound.pages, Decode { bound, most_sums: site.target.most_sums() });
    let (tokens, splits) = (Decode::tokens(), decode.splits());
    let mut k = ports.builder(site, Extent::from(pages.heads) * splits.clone() * tokens.clone());
    decode.body(&mut k);
    let tail = (tokens * bound.heads.into()).if_above(splits, 1, 0.into());
    ports.finish(k.finish_with_tail_grid(tail, |k| decode.tail(k)))
}

#[derive(Clone, Copy)]
struct Decode {
    bound: Attention,
    most_sums: u64,
}

/// A token of a run that is decoded.
struct Token {
    /// Its sequence.
    b: Val,
    t: Val,
    /// Whether the sequence is one; else it is padding.
    live: Val,
    /// Positions that it sees.
    length: Val,
}

impl Decode {
    /// Most tokens of such runs.
    fn tokens() -> Extent {
        (Extent::from(Sym::B) * DECODE_TOKENS.into()).min(Sym::T.into())
    }

    /// Positions of a split.
    fn split(&self) -> u64 {
        SPLIT.next_multiple_of(self.bound.pages.page_tokens)
    }

    /// Runs `body` for token `number` of those in runs that are decoded, if there is one.
    fn for_token(&self, k: &mut KernelBuilder, number: Val, body: impl FnOnce(&mut KernelBuilder, &Token)) {
        let pages = self.bound.pages;
        let (zero, none) = (k.const_i64(0), k.const_i64(-1));
        let init = [number, zero, none];
        let found = Classes::for_sequences(k, pages.cu_seqlens, &init, |k, [b, begin, end, is_long], carried| {
            let tokens = k.sub(end, begin);
            let tokens = k.select(is_long, zero, tokens);
            let left = carried[0];
            let (from, to) = (k.cmp(Pred::Ge, left, zero), k.cmp(Pred::Lt, left, tokens));
            let is_here = k.and(from, to);
            let t = k.add(begin, left);
            vec![k.sub(left, tokens), k.select(is_here, b, carried[1]), k.select(is_here, t, carried[2])]
        });
        let (b, t) = (found[1], found[2]);
        let exists = k.cmp(Pred::Ge, t, zero);
        k.if_then(exists, |k| {
            let (slot, position) = (pages.slot(k, b), pages.position(k, t));
            let live = k.cmp(Pred::Ge, slot, zero);
            let length = k.add_const(position, 1);
            body(k, &Token { b, t, live, length });
        });
    }

    /// Splits of a step, at most.
    fn splits(&self) -> Extent {
        (Extent::from(Sym::P) * self.bound.pages.page_tokens.into()).ceil_div(self.split())
    }

    /// Where the sums of a task of the body lie.
    fn sums(&self, k: &mut KernelBuilder, partials: Val, task: Val) -> Sums {
        let base = row_ptr(k, partials, task, Sums::elems(&self.bound));
        Sums::at(k, &self.bound, base)
    }

    fn body(&self, k: &mut KernelBuilder) {
        let bound = &self.bound;
        let partials = k.partials(DType::F32, Sums::elems(bound));
        let scores = Group::scores(k, bound);
        let (task, splits, tokens) = (k.task(), k.extent(&self.splits()), k.extent(&Self::tokens()));
        let (row, number) = (k.div(task, tokens), k.rem(task, tokens));
        let (kv_head, split) = (k.div(row, splits), k.rem(row, splits));
        let first = k.mul_const(split, self.split());
        self.for_token(k, number, |k, token| {
            let attend = |k: &mut KernelBuilder| {
                let sees = k.cmp(Pred::Lt, first, token.length);
                k.if_then(sees, |k| {
                    let end = k.add_const(first, self.split());
                    let end = k.min_i64(end, token.length);
                    let sums = self.sums(k, partials, task);
                    let q = bound.rows(k, bound.q, token.t, kv_head);
                    let group = Group { bound, q, scores, sums, most_sums: self.most_sums };
                    group.attend(k, (token.b, kv_head), (first, end), token.length);
                    let one = k.index(self.split());
                    let is_all = k.cmp(Pred::Le, token.length, one);
                    k.if_then(is_all, |k| {
                        let gate = bound.rows(k, bound.gate, token.t, kv_head);
                        let out = bound.rows(k, bound.out, token.t, kv_head);
                        group.finish(k, gate, out);
                    });
                });
                Vec::new()
            };
            k.if_else(token.live, attend, |k| {
                let zero = k.const_i64(0);
                let is_first = k.cmp(Pred::Eq, first, zero);
                k.if_then(is_first, |k| bound.zero(k, token.t, kv_head));
                Vec::new()
            });
        });
    }

    fn tail(&self, k: &mut KernelBuilder) {
        let bound = &self.bound;
        let partials = k.partials(DType::F32, Sums::elems(bound));
        let o = k.alloc(DType::F32, bound.elems());
        let task = k.task();
        let (number, head) = (k.div_const(task, bound.heads), k.rem_const(task, bound.heads));
        let (kv_head, within) = (k.div_const(head, bound.shared), k.rem_const(head, bound.shared));
        let (splits, tokens) = (k.extent(&self.splits()), k.extent(&Self::tokens()));
        let first_row = k.mul(kv_head, splits);
        self.for_token(k, number, |k, token| {
            let one = k.index(self.split());
            let is_split = k.cmp(Pred::Gt, token.length, one);
            let works = k.and(token.live, is_split);
            k.if_then(works, |k| {
                let up = k.add_const(token.length, self.split() - 1);
                let (zero, count) = (k.const_i64(0), k.div_const(up, self.split()));
                // the task of the body that had this token, kv head and split
                let sums = |k: &mut KernelBuilder, split| {
                    let row = k.add(first_row, split);
                    let row = k.mul(row, tokens);
                    let task = k.add(row, number);
                    self.sums(k, partials, task)
                };
                let lowest = k.const_f32(f32::NEG_INFINITY);
                let max = k.for_carry((zero, count, 1), &[lowest], |k, split, max| {
                    let sums = sums(k, split);
                    let found = k.load_f32(sums.max, within);
                    vec![k.fmax(max[0], found)]
                })[0];
                let (nothing, none) = (k.splat_f32(16, 0.0), k.const_f32(0.0));
                k.for_range(bound.elems(), LANES, |k, c| k.store(o, c, nothing));
                let sum = k.for_carry((zero, count, 1), &[none], |k, split, sum| {
                    let sums = sums(k, split);
                    let (found, of_split) = (k.load_f32(sums.max, within), k.load_f32(sums.sum, within));
                    let change = k.fsub(found, max);
                    let factor = k.exp(change);
                    let sum = k.fma(factor, of_split, sum[0]);
                    let (factor, from) = (k.splat(factor, 16), row_ptr(k, sums.o, within, bound.elems()));
                    k.for_range(bound.elems(), LANES, |k, c| {
                        let (x, before) = (k.load_f32x16(from, c), k.load_f32x16(o, c));
                        let x = k.fma(factor, x, before);
                        k.store(o, c, x);
                    });
                    vec![sum]
                })[0];
                let [gate, out] = [bound.gate, bound.out].map(|port| {
                    let rows = bound.rows(k, port, token.t, kv_head);
                    row_ptr(k, rows, within, bound.elems())
                });
                bound.emit(k, (o, sum, gate, out));
            });
        });
    }
}
