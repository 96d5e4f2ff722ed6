//! Sums of a tile, turn by turn.

use nextc_ir::kernel::{KernelBuilder, Val};

use super::super::tile::{Block, Product};
use super::rows::Tokens;
use super::{STAGE_TURNS, Width};

/// The sums of a tile that a thread has: of each group four; those of the part of the columns at work, and where there are several parts those before it.
pub(super) struct Sums {
    own: Vec<Val>,
    before: Vec<Val>,
}

impl Sums {
    pub(super) fn none(k: &mut KernelBuilder, width: Width, product: &Product<'_>) -> Self {
        let none = vec![k.const_f32(0.0); width.sums()];
        let before = if product.part_turns() < product.all_turns() { none.clone() } else { Vec::new() };
        Self { own: none, before }
    }

    pub(super) fn carried(self) -> Vec<Val> {
        [self.own, self.before].concat()
    }

    pub(super) fn of(width: Width, carried: &[Val]) -> Self {
        let (own, before) = carried.split_at(width.sums());
        Self { own: own.to_vec(), before: before.to_vec() }
    }

    /// After a turn whose codes are `codes`, and whose lines begin at a word of shared memory.
    pub(super) fn turn(
        self,
        k: &mut KernelBuilder,
        product: &Product<'_>,
        ((i, turn), blocks): ((u64, Val), &[Block]),
        (tokens, b): (&Tokens, (Val, Val)),
    ) -> Self {
        // a part may begin only where a stage does
        let goes_on = product.part_turns().is_multiple_of(STAGE_TURNS) && i > 0;
        let (own, before) = match self.before.is_empty() || goes_on {
            true => (self.own, self.before),
            false => product.end_part(k, turn, &self.own, &self.before),
        };
        let some = |k: &mut KernelBuilder, groups: u64, mut own: Vec<Val>| {
            blocks.iter().for_each(|block| product.group_sums(k, block, b, &mut own[..4 * groups as usize]));
            own
        };
        let own = most_of(k, &tokens.wants, &tokens.variants, &|k, groups| some(k, groups, own.clone()));
        Self { own, before }
    }

    /// All of them.
    pub(super) fn total(self, k: &mut KernelBuilder) -> Vec<Val> {
        if self.before.is_empty() {
            return self.own;
        }
        self.before.iter().zip(&self.own).map(|(&before, &own)| k.fadd(before, own)).collect()
    }
}

/// What `some` does with as many groups as are wanted, the first of `variants` whose condition holds, or the last.
fn most_of(
    k: &mut KernelBuilder,
    wants: &[Val],
    variants: &[u64],
    some: &dyn Fn(&mut KernelBuilder, u64) -> Vec<Val>,
) -> Vec<Val> {
    match wants {
        [] => some(k, variants[0]),
        [first, rest @ ..] => k.if_else(*first, |k| some(k, variants[0]), |k| most_of(k, rest, &variants[1..], some)),
    }
}
