//! The first unit of each warp in `experts_down` of few tokens: the shared expert, or one of the first chosen ones; of a single token that is all.
//!
//! ahead    `experts_gate_up` lets this kernel begin when the router is done ([`begin_alone`](super::begin_alone)), so experts, their choices and the first codes are
//!          read before the wait, and the other codes asked for
//! products as in [`super::tile`]; h and s come after the wait

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::shape::Sym;

use super::super::matmul::{Rows, row_ptr};
use super::Place;
use super::experts_down::{Down, Part};
use super::tile::{Ahead, Product, Row, Source};

/// A warp's first unit, and what it has asked for.
pub(super) struct First<'a> {
    is_shared: Val,
    /// Whether there is one.
    exists: Val,
    /// Where its choices begin and end; of the shared expert, its tokens.
    range: (Val, Val),
    /// Of a single token, the number of its choice.
    own: Val,
    product: Product<'a>,
    ahead: Option<Ahead>,
}

impl Down {
    /// Whether one code multiplies with both kinds of experts.
    pub(super) fn are_alike(&self) -> bool {
        let (a, b) = (&self.routed.planes, &self.dense.planes);
        (a.format, a.columns) == (b.format, b.columns)
    }

    /// Asks for the codes of a warp's first unit.
    pub(super) fn ask_first(&self, k: &mut KernelBuilder, place: Place) -> First<'_> {
        let (zero, one, tokens) = (k.const_i64(0), k.const_i64(1), k.dim(Sym::T));
        let experts = k.index(self.choices.layout.experts);
        let is_shared = k.cmp(Pred::Eq, place.warp, zero);
        let number = k.sub(place.warp, one);
        let number = k.select(is_shared, zero, number);
        let most = k.mul_const(tokens, self.choices.each);
        let most = k.min_i64(most, experts);
        let within = k.cmp(Pred::Lt, number, most);
        // the first choice where there are not as many
        let number = k.select(within, number, zero);
        let (e, own) = (self.choices.active(k, number), self.choices.at(k, number).0);
        let chosen = k.cmp(Pred::Ge, e, zero);
        let chosen = k.and(within, chosen);
        let routed = k.not(is_shared);
        let routed = k.and(routed, chosen);
        let e = k.select(chosen, e, zero);
        let (begin, end) = self.choices.run(k, tokens, (number, e));
        let range = (k.select(is_shared, zero, begin), k.select(is_shared, tokens, end));
        // a warp that has none asks for what another has asked for
        let (base, task) = (k.param(self.s_down), k.task());
        let (dense, own_tile) = (self.dense.own_tile(k, base, task), self.own_tile(k, e));
        let mut tile = dense;
        tile.codes = k.select(routed, own_tile.codes, dense.codes);
        tile.scales = match self.routed.planes.format.blocks() {
            Some(_) => k.select(routed, own_tile.scales, dense.scales),
            None => tile.codes,
        };
        let product = Product::new(k, &self.routed, vec![tile], place, 1);
        let ahead = product.ahead(k);
        if !product.asks_for_all() {
            place.once_a_warp(k, |k| self.routed.prefetch(k, tile));
        }
        First { is_shared, exists: k.or(is_shared, routed), range, own, product, ahead }
    }

    /// The products of a warp's first unit.
    pub(super) fn first(&self, k: &mut KernelBuilder, first: First<'_>, part: &Part) {
        let First { is_shared, exists, range, own, product, ahead } = first;
        let tokens = k.dim(Sym::T);
        let number = |k: &mut KernelBuilder, at: Val| {
            let of_routed = self.choices.number(k, tokens, (at, own));
            k.select(is_shared, at, of_routed)
        };
        k.if_then(exists, |k| {
            let one = k.const_i64(1);
            let last = k.sub(range.1, one);
            let at = k.add(range.0, product.token());
            let at = k.min_i64(at, last);
            let row = number(k, at);
            let [h, s] = [&self.h, &self.s].map(|rows: &Rows| {
                let base = k.param(rows.source());
                row_ptr(k, base, row, rows.stride())
            });
            let x = Row { x: k.select(is_shared, s, h), norm: None };
            let result = product.run(k, Source::Row(x), ahead)[0];
            let routed_sums = k.index(part.at_once * self.choices.each);
            self.keep(k, &product, result, range, part.sums, &mut |k, at| {
                let number = number(k, at);
                let beyond = k.add(number, routed_sums);
                k.select(is_shared, beyond, number)
            });
        });
    }
}
