//! Which tokens a block is about: tiles of a few neighbouring ones of a sequence's run.

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::Sym;
use nextc_ir::types::DECODE_TOKENS;

use super::super::super::pages::Pages;
use super::super::super::ports::Port;
use super::super::{lanes_before, warp_count};

/// The sequence of token `t`, by a warp: how many sequences end at or before it.
pub fn sequence_of(k: &mut KernelBuilder, cu_seqlens: Port, lane: Val, t: Val) -> Val {
    let cu_seqlens = k.param(cu_seqlens);
    let (count, none) = (k.dim(Sym::B), k.const_i32(0));
    let one = k.const_i32(1);
    let mine = k.for_carry((lane, count, 32), &[none], |k, b, found| {
        let next = k.add_const(b, 1);
        let end = k.load_index(cu_seqlens, next);
        let before = k.cmp(Pred::Le, end, t);
        let more = k.add(found[0], one);
        vec![k.select(before, more, found[0])]
    })[0];
    let all = warp_count(k, mine);
    k.widen(all)
}

/// Some tokens of one sequence.
#[derive(Clone, Copy)]
pub struct Tokens {
    /// The sequence.
    pub sequence: Val,
    /// Whether it is one; else the tokens are padding.
    pub live: Val,
    /// The first of them.
    pub first: Val,
    /// How many.
    pub count: Val,
    /// The position of the first.
    pub position: Val,
}

/// The tiles of the runs of one class.
#[derive(Clone, Copy)]
pub struct Runs {
    /// Where the sequences are.
    pub pages: Pages,
    /// Tokens of a tile.
    pub tokens: u64,
    /// Of long runs, or of those that are decoded.
    pub long: bool,
}

impl Runs {
    /// Most tiles of a step.
    pub fn most(&self) -> Extent {
        match self.long {
            // of each run at most one tile is not full
            true => Extent::from(Sym::T).ceil_div(self.tokens) + Extent::from(Sym::T).ceil_div(DECODE_TOKENS + 1),
            false => (Extent::from(Sym::B) * DECODE_TOKENS.div_ceil(self.tokens).into()).min(Sym::T.into()),
        }
    }

    /// Tile `number`, by a warp, and whether there is one.
    pub fn find(&self, k: &mut KernelBuilder, lane: Val, number: Val) -> (Val, Tokens) {
        let cu_seqlens = k.param(self.pages.cu_seqlens);
        let (zero, count, number) = (k.const_i64(0), k.dim(Sym::B), k.narrow(number));
        let (none, one) = (k.const_i32(0), k.const_i32(1));
        let found = k.for_carry((zero, count, 32), &[none, none, none], |k, base, carried| {
            let b = k.add(base, lane);
            let exists = k.cmp(Pred::Lt, b, count);
            let length = k.if_else(
                exists,
                |k| {
                    let next = k.add_const(b, 1);
                    let (begin, end) = (k.load(DType::I32, 1, cu_seqlens, b), k.load(DType::I32, 1, cu_seqlens, next));
                    vec![k.sub(end, begin)]
                },
                |_| vec![none],
            )[0];
            let (up, size) = (k.const_i32(self.tokens as i32 - 1), k.const_i32(self.tokens as i32));
            let up = k.add(length, up);
            let tiles = k.div(up, size);
            let most = k.const_i32(DECODE_TOKENS as i32);
            let is_mine = k.cmp(if self.long { Pred::Gt } else { Pred::Le }, length, most);
            let tiles = k.select(is_mine, tiles, none);
            let (before, total) = lanes_before(k, lane, (none, tiles), |k, a, b| k.add(a, b));
            let before = k.add(before, carried[0]);
            let within = k.sub(number, before);
            let (from, to) = (k.cmp(Pred::Ge, within, none), k.cmp(Pred::Lt, within, tiles));
            let hit = k.and(from, to);
            let (b, index) = (k.narrow(b), k.add(within, one));
            let pair = [b, index].map(|x| {
                let x = k.select(hit, x, none);
                warp_count(k, x)
            });
            vec![k.add(carried[0], total), k.add(carried[1], pair[0]), k.add(carried[2], pair[1])]
        });
        let exists = k.cmp(Pred::Gt, found[2], none);
        let (sequence, index) = (k.widen(found[1]), k.sub(found[2], one));
        let index = k.select(exists, index, none);
        let index = k.widen(index);
        let next = k.add_const(sequence, 1);
        let (begin, end) = (k.load_index(cu_seqlens, sequence), k.load_index(cu_seqlens, next));
        let skipped = k.mul_const(index, self.tokens);
        let first = k.add(begin, skipped);
        let (left, most) = (k.sub(end, first), k.index(self.tokens));
        let (slot, position) = (self.pages.slot(k, sequence), self.pages.position(k, begin));
        let tokens = Tokens {
            sequence,
            live: k.cmp(Pred::Ge, slot, zero),
            first,
            count: k.min_i64(left, most),
            position: k.add(position, skipped),
        };
        (exists, tokens)
    }
}
