//! `experts_down` on a GPU: the second half of the routed and the shared experts, and their sum.
//!
//! task     a tile of the residual stream: its warps take the shared expert and the chosen ones in turn
//! combine  a half warp the 16 rows of a token: its sums in the order of its choices, then the shared expert's, then the residual
//!
//! Of some tokens the same, in several goes; of many, see [`super::many_experts`]. What is dispatched, and how, says [`super::super::experts`].

use nextc_ir::DType;
use nextc_ir::kernel::{Kernel, KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::{LANES, Sym, pad};

use super::super::LowerError;
use super::super::experts::{Choices, Table};
use super::super::matmul::{Residual, Rows, row_ptr};
use super::super::ports::{Lowered, Port, Ports, Site};
use super::few::{At, load_row};
use super::fragments::{Fragments, Tile};
use super::many::{FEW_ROWS, few, some, some_tokens};
use super::many_experts;
use super::matmul::{column_of, store_residual};
use super::tile::{Product, Source, TOKENS};
use super::{Place, begin};

/// Warps of a block of `experts_down`.
const DOWN_WARPS: u64 = 12;
/// Tokens whose products lie in shared memory at once, where a step has more than few.
const SOME_TOKENS: u64 = 64;

/// `experts_down` and what it is connected to.
pub struct Down {
    /// The routed experts' matrices, and the shared one's.
    pub routed: Fragments,
    /// See `routed`.
    pub dense: Fragments,
    /// The weights of both.
    pub w_down: Port,
    /// See `w_down`.
    pub s_down: Port,
    /// What both are multiplied with.
    pub h: Rows,
    /// See `h`.
    pub s: Rows,
    /// Weights of a token's choices.
    pub weights: Port,
    /// The weight of the shared expert.
    pub shared: Port,
    /// Where results go.
    pub residual: Residual,
    /// Who chose whom.
    pub choices: Choices,
    /// Tiles of an expert.
    pub tiles: u64,
}

/// `experts_down`.
pub fn lower_experts_down(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let shape = site.weight(site.named("w_down")).shape.clone();
    let read = |ports: &mut Ports, name: &str| ports.read(name, site.named(name));
    let choices = site.inner(site.named("weights"))[0];
    let down = Down {
        routed: Fragments::of(site, site.named("w_down"), 1)?,
        dense: Fragments::of(site, site.named("s_down"), 1)?,
        h: Rows::Plain { x: read(&mut ports, "h"), stride: pad(shape[2]) },
        s: Rows::Plain { x: read(&mut ports, "s"), stride: site.stride(site.named("s")) },
        weights: read(&mut ports, "weights"),
        choices: Choices {
            order: read(&mut ports, "order"),
            table: read(&mut ports, "table"),
            layout: Table { experts: shape[0] },
            each: choices,
        },
        shared: read(&mut ports, "shared"),
        w_down: read(&mut ports, "w_down"),
        s_down: read(&mut ports, "s_down"),
        residual: Residual::ports(site, &mut ports)?,
        tiles: pad(shape[1]) / LANES,
    };
    let sym = site.rows(site.result(0))?;
    let some_most = some_tokens(shape[0], choices);
    let tiles = Extent::from(down.tiles);
    let kernels = [
        down.kernel(ports.builder(site, few(sym, FEW_ROWS, tiles.clone())), sym, FEW_ROWS),
        down.kernel(ports.builder_of(site, ".some", some(sym, (FEW_ROWS, some_most), tiles)), sym, SOME_TOKENS),
        many_experts::down(site, &ports, &down, (sym, some_most)),
    ];
    let [few, some, many] = kernels.map(|kernel| ports.clone().finish(kernel));
    Ok(few.then(some).then(many))
}

impl Down {
    /// The kernel for few tokens, or for some, `at_once` at a time.
    fn kernel(&self, mut k: KernelBuilder, sym: Sym, at_once: u64) -> Kernel {
        k.threads(DOWN_WARPS as u32 * 32);
        let sums = k.shared(DType::F32, at_once * (self.choices.each + 1) * LANES);
        let near = (at_once == FEW_ROWS).then(|| Near {
            weights: k.shared(DType::F32, at_once * self.choices.each),
            shared: k.shared(DType::F32, at_once),
            residual: k.shared(DType::F32, at_once * LANES),
        });
        let place = Place::here(&mut k);
        let (tile, base) = (k.task(), k.param(self.s_down));
        let dense = self.dense.own_tile(&mut k, base, tile);
        let (zero, count) = (k.const_i64(0), k.dim(sym));
        let mut first = near.filter(|_| self.are_alike()).map(|_| self.ask_first(&mut k, place));
        if first.is_none() {
            place.once(&mut k, |k| self.dense.prefetch(k, dense));
        }
        if let Some(near) = near {
            self.bring_near(&mut k, place, near, count);
        }
        begin(&mut k);
        let mut work = |k: &mut KernelBuilder, first_token: Val, tokens: Val| {
            let part = Part { first: first_token, tokens, at_once, sums, near };
            let begun = first.take().map(|first| self.first(k, first, &part)).is_some();
            self.products(k, place, dense, (&part, begun));
            k.barrier();
            self.combine(k, place, &part);
        };
        if near.is_some() {
            work(&mut k, zero, count);
        } else {
            k.for_each((zero, count, at_once), |k, first| {
                let (left, most) = (k.sub(count, first), k.index(at_once));
                let tokens = k.min_i64(left, most);
                k.barrier();
                work(k, first, tokens);
            });
        }
        k.finish()
    }

    /// The products of some tokens: warps take the shared expert, eight tokens at a time, then the chosen ones in turn.
    fn products(&self, k: &mut KernelBuilder, place: Place, dense: Tile, (part, begun): (&Part, bool)) {
        let (zero, experts) = (k.const_i64(0), k.index(self.choices.layout.experts));
        let groups = part.at_once / TOKENS;
        let most = k.mul_const(k.dim(Sym::T), self.choices.each);
        let most = k.min_i64(most, experts);
        let units = k.add_const(most, groups);
        let unit = if begun { k.add_const(place.warp, DOWN_WARPS) } else { place.warp };
        let first = self.expert_of(k, unit, groups);
        k.for_carry((unit, units, DOWN_WARPS), &[first], |k, unit, carried| {
            let end = k.index(groups);
            let is_shared = k.cmp(Pred::Lt, unit, end);
            let next = k.add_const(unit, DOWN_WARPS);
            let next = self.expert_of(k, next, groups);
            if part.at_once > FEW_ROWS {
                self.bring_next(k, place, next);
            }
            let routed = |k: &mut KernelBuilder| {
                let number = k.sub(unit, end);
                // of a single token, the choice that lies there too
                let (e, own) = (carried[0], self.choices.at(k, number).0);
                let chosen = k.cmp(Pred::Ge, e, zero);
                k.if_then(chosen, |k| self.routed(k, place, (number, e, own), part));
                Vec::new()
            };
            let shared = |k: &mut KernelBuilder| {
                self.shared(k, place, (dense, unit), part);
                Vec::new()
            };
            // the shared expert comes first
            if begun {
                routed(k);
            } else {
                k.if_else(is_shared, shared, routed);
            }
            vec![next]
        });
    }

    /// The products of the shared expert with eight tokens, number `unit` of those of the part.
    fn shared(&self, k: &mut KernelBuilder, place: Place, (dense, unit): (Tile, Val), part: &Part) {
        let begin = k.mul_const(unit, TOKENS);
        let some = k.cmp(Pred::Lt, begin, part.tokens);
        k.if_then(some, |k| {
            let product = Product::new(k, &self.dense, vec![dense], place, 1);
            let (ahead, one) = (product.ahead(k), k.const_i64(1));
            let last = k.sub(part.tokens, one);
            let token = k.add(begin, product.token());
            let token = k.min_i64(token, last);
            let token = k.add(part.first, token);
            let x = load_row(k, &self.s, token, product.q());
            let result = product.run(k, Source::Row(x), ahead)[0];
            let routed_sums = k.index(part.at_once * self.choices.each);
            let range = (begin, part.tokens);
            self.keep(k, &product, result, range, part.sums, &mut |k, i| k.add(routed_sums, i));
        });
    }

    /// The expert that unit `unit` is about, where that is one: `groups` units come before those of experts. Asked for a turn before it is needed.
    fn expert_of(&self, k: &mut KernelBuilder, unit: Val, groups: u64) -> Val {
        let (zero, first, last) = (k.const_i64(0), k.index(groups), k.index(self.choices.layout.experts - 1));
        let number = k.sub(unit, first);
        let is_shared = k.cmp(Pred::Lt, number, zero);
        let number = k.select(is_shared, zero, number);
        let number = k.min_i64(number, last);
        self.choices.active(k, number)
    }

    /// Asks for the block's tile of an expert towards L2, if it is one.
    fn bring_next(&self, k: &mut KernelBuilder, place: Place, e: Val) {
        let zero = k.const_i64(0);
        let chosen = k.cmp(Pred::Ge, e, zero);
        k.if_then(chosen, |k| {
            place.once_a_warp(k, |k| {
                let weight = self.own_tile(k, e);
                self.routed.prefetch(k, weight);
            });
        });
    }

    /// The block's tile of an expert.
    pub(super) fn own_tile(&self, k: &mut KernelBuilder, e: Val) -> Tile {
        let (base, first_tile) = (k.param(self.w_down), k.mul_const(e, self.tiles));
        let tile = k.add(first_tile, k.task());
        self.routed.own_tile(k, base, tile)
    }

    /// The products of expert `e`, chosen as number `number`, with those of its tokens that are in the part.
    fn routed(&self, k: &mut KernelBuilder, place: Place, (number, e, own): (Val, Val, Val), part: &Part) {
        let (tokens, weight) = (k.dim(Sym::T), self.own_tile(k, e));
        let product = Product::new(k, &self.routed, vec![weight], place, 1);
        let (begin, end) = self.choices.run(k, tokens, (number, e));
        let first_choice = k.mul_const(part.first, self.choices.each);
        let eight = |k: &mut KernelBuilder, from: Val, end: Val| {
            let ahead = product.ahead(k);
            let one = k.const_i64(1);
            let last = k.sub(end, one);
            let choice = |k: &mut KernelBuilder, at: Val| {
                let at = k.min_i64(at, last);
                self.choices.number(k, tokens, (at, own))
            };
            let at = k.add(from, product.token());
            let number = choice(k, at);
            let x = load_row(k, &self.h, number, product.q());
            let result = product.run(k, Source::Row(x), ahead)[0];
            self.keep(k, &product, result, (from, end), part.sums, &mut |k, at| {
                let number = choice(k, at);
                k.sub(number, first_choice)
            });
        };
        if part.at_once == FEW_ROWS {
            eight(k, begin, end);
            return;
        }
        let (order, most) = (k.param(self.choices.order), k.index(part.at_once));
        let is_whole = k.cmp(Pred::Le, tokens, most);
        let range = k.if_else(
            is_whole,
            |_| vec![begin, end],
            |k| {
                let end_token = k.add(part.first, part.tokens);
                let end_choice = k.mul_const(end_token, self.choices.each);
                [first_choice, end_choice].map(|choice| lower_bound(k, order, (begin, end), choice)).to_vec()
            },
        );
        k.for_each((range[0], range[1], TOKENS), |k, from| eight(k, from, range[1]));
    }

    /// Puts the sums of a product where `combine` finds them: `place` gives the number of token `at`, which counts from `first` and is less than `end`.
    pub(super) fn keep(
        &self,
        k: &mut KernelBuilder,
        product: &Product<'_>,
        result: [Val; 4],
        (first, end): (Val, Val),
        sums: Val,
        place: &mut dyn FnMut(&mut KernelBuilder, Val) -> Val,
    ) {
        let token = k.mul_const(product.q(), 2);
        let token = k.add(first, token);
        for i in 0..2 {
            let at = k.add_const(token, i);
            let exists = k.cmp(Pred::Lt, at, end);
            k.if_then(exists, |k| {
                let number = place(k, at);
                let base = k.mul_const(number, LANES);
                let base = k.add(base, product.token());
                let lower = k.add_const(base, 8);
                k.store(sums, base, result[i as usize]);
                k.store(sums, lower, result[2 + i as usize]);
            });
        }
    }

    /// `out = residual + Σ weight · sum + shared · sum`, a half warp of 16 rows a token.
    fn combine(&self, k: &mut KernelBuilder, place: Place, part: &Part) {
        let tile = k.task();
        let (half, row) = (k.div_const(place.thread, LANES), k.rem_const(place.thread, LANES));
        // whole warps come along, since 16 threads add up squares
        let even = k.add_const(part.tokens, 1);
        let even = k.div_const(even, 2);
        let warp_tokens = k.mul_const(even, 2);
        k.for_each((half, warp_tokens, 2 * DOWN_WARPS), |k, i| {
            let exists = k.cmp(Pred::Lt, i, part.tokens);
            let zero = k.const_i64(0);
            let i = k.select(exists, i, zero);
            let token = k.add(part.first, i);
            let base = k.mul_const(i, self.choices.each * LANES);
            let base = k.add(base, row);
            let at = k.mul_const(i, LANES);
            let at = k.add_const(at, part.at_once * self.choices.each * LANES);
            let at = k.add(at, row);
            let (factors, old) = match part.near {
                None => (self.factors(k, token), None),
                Some(near) => {
                    let (weights, shared) =
                        (row_ptr(k, near.weights, i, self.choices.each), row_ptr(k, near.shared, i, 1));
                    let residual = row_ptr(k, near.residual, i, LANES);
                    ([weights, shared], Some(k.load_f32(residual, row)))
                }
            };
            let sum = self.weighted(k, factors, (part.sums, base, LANES), (part.sums, at));
            store_residual(k, &self.residual, tile, &At { token, exists }, (row, old), sum);
        });
    }

    /// Reads what the sums of `tokens` few tokens are joined with. It is there before the wait: see [`super::down_few`].
    fn bring_near(&self, k: &mut KernelBuilder, place: Place, near: Near, tokens: Val) {
        let (threads, each, tile, zero) = (DOWN_WARPS * 32, self.choices.each, k.task(), k.const_i64(0));
        let choices = k.mul_const(tokens, each);
        k.for_each((place.thread, choices, threads), |k, i| {
            let (token, choice) = (k.div_const(i, each), k.rem_const(i, each));
            let [weights, _] = self.factors(k, token);
            let weight = k.load_f32(weights, choice);
            k.store(near.weights, i, weight);
        });
        k.for_each((place.thread, tokens, threads), |k, token| {
            let [_, shared] = self.factors(k, token);
            let weight = k.load_f32(shared, zero);
            k.store(near.shared, token, weight);
        });
        let rows = k.mul_const(tokens, LANES);
        k.for_each((place.thread, rows, threads), |k, i| {
            let (token, row) = (k.div_const(i, LANES), k.rem_const(i, LANES));
            let column = column_of(k, tile, row);
            let old = self.residual.load_one(k, token, column);
            k.store(near.residual, i, old);
        });
    }

    /// Pointers to the weights of a token's choices and to that of the shared expert.
    pub fn factors(&self, k: &mut KernelBuilder, token: Val) -> [Val; 2] {
        let (weights, shared) = (k.param(self.weights), k.param(self.shared));
        [row_ptr(k, weights, token, pad(self.choices.each)), row_ptr(k, shared, token, LANES)]
    }

    /// `Σ weight · sum + shared · sum` of one row of a token: the sums of its choices begin at an element and lie so many apart; then where that of
    /// the shared expert lies.
    pub fn weighted(
        &self,
        k: &mut KernelBuilder,
        [weights, shared]: [Val; 2],
        (sums, base, stride): (Val, Val, u64),
        (shared_sums, at): (Val, Val),
    ) -> Val {
        let (zero, nothing, choices) = (k.const_i64(0), k.const_f32(0.0), k.index(self.choices.each));
        let routed = k.for_carry((zero, choices, 1), &[nothing], |k, s, sum| {
            let at = k.mul_const(s, stride);
            let at = k.add(base, at);
            let (weight, x) = (k.load_f32(weights, s), k.load_f32(sums, at));
            vec![k.fma(weight, x, sum[0])]
        })[0];
        let (weight, x) = (k.load_f32(shared, zero), k.load_f32(shared_sums, at));
        k.fma(weight, x, routed)
    }
}

/// Tokens of a step whose products lie in shared memory at once.
pub(super) struct Part {
    first: Val,
    tokens: Val,
    /// At most so many.
    pub(super) at_once: u64,
    /// `[at_once][choices][16]`, then `[at_once][16]` of the shared expert.
    pub(super) sums: Val,
    near: Option<Near>,
}

/// What sums are joined with, in shared memory, where tokens are few.
#[derive(Clone, Copy)]
struct Near {
    /// `[tokens][choices]`.
    weights: Val,
    /// `[tokens]`.
    shared: Val,
    /// `[tokens][16]`.
    residual: Val,
}

/// The first place of `begin .. end` in `order`, which ascends there, whose choice is at least `choice`.
fn lower_bound(k: &mut KernelBuilder, order: Val, (begin, end): (Val, Val), choice: Val) -> Val {
    let (zero, steps) = (k.const_i64(0), k.index(24));
    k.for_carry((zero, steps, 1), &[begin, end], |k, _, range| {
        let (lo, hi) = (range[0], range[1]);
        let open = k.cmp(Pred::Lt, lo, hi);
        k.if_else(
            open,
            |k| {
                let sum = k.add(lo, hi);
                let middle = k.div_const(sum, 2);
                let number = k.load_index(order, middle);
                let before = k.cmp(Pred::Lt, number, choice);
                let next = k.add_const(middle, 1);
                vec![k.select(before, next, lo), k.select(before, hi, middle)]
            },
            |_| vec![lo, hi],
        )
    })[0]
}
