//! `experts` of many tokens on a GPU.
//!
//! norm_router      blocks as in `many.rs`
//! .choose, .dispatch  see `dispatch.rs`
//! experts_gate_up  blocks (64 tokens of the shared expert, or of the run of a chosen one; eight tiles of its width)
//! experts_down     blocks as before, by 16 tiles of the residual stream, hand all products to the tail: a block a token adds up those of
//!                  its choices in their order
//!
//! Weights with scales have blocks of `wide/experts.rs` instead. What is dispatched, and how, says [`super::super::experts`].

use nextc_ir::DType;
use nextc_ir::kernel::{Kernel, KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::{LANES, Sym, pad};

use super::super::experts::Choices;
use super::super::matmul::{Rows, for_parts, row_ptr};
use super::super::ports::{Lowered, Port, Ports, Site};
use super::experts_down::Down;
use super::few::At;
use super::fragments::Fragments;
use super::many::{self, MANY_TOKENS, OwnTiles, TILES, WARPS, few_rows, many, token_blocks};
use super::matmul::{GatePair, store_pair, store_residual};
use super::router::Choice;
use super::tile::{Product, Split};
use super::wide::{self, Width};
use super::{Place, begin, dispatch, lanes_before, warp_count};

/// The products of the router.
pub struct Router<'a> {
    /// What it reads.
    pub rows: &'a Rows,
    /// The matrix of the experts, and the gate of the shared one.
    pub matrices: [(Fragments, Port); 2],
    /// How the kernel for few tokens splits columns.
    pub split: Split,
}

impl Router<'_> {
    /// The kernels; `outs` are the results of the node.
    pub fn kernels(&self, site: &Site<'_>, ports: &Ports, outs: &[Port], (sym, choice): (Sym, &Choice)) -> Lowered {
        let kernels = [
            self.logits(site, ports, outs, (sym, choice)),
            dispatch::choose(site, ports, outs, (sym, choice)),
            dispatch::dispatch_some(site, ports, outs, (sym, choice)),
            dispatch::dispatch(site, ports, outs, (sym, choice)),
        ];
        let [logits, choose, dispatch_some, dispatch] = kernels.map(|kernel| ports.clone().finish(kernel));
        logits.then(choose).then(dispatch_some).then(dispatch)
    }

    fn logits(&self, site: &Site<'_>, ports: &Ports, outs: &[Port], (sym, choice): (Sym, &Choice)) -> Kernel {
        let groups = self.matrices.map(|(m, _)| m.planes.tiles().div_ceil(TILES));
        let all: u64 = groups.iter().sum();
        let mut k =
            ports.builder_of(site, ".many", many(sym, few_rows(site.target, all), token_blocks(sym) * all.into()));
        let place = many::begin_block(&mut k);
        let stage = many::stage(&mut k, 2);
        let (task, count) = (k.task(), k.dim(sym));
        let (first, number) = many::block_of(&mut k, task, all);
        for_parts(&mut k, number, groups, |k, part, group| {
            let is_gate = part == 1;
            let (fragments, weight) = self.matrices[part];
            let base = k.param(weight);
            let own = OwnTiles::of_group(k, group, fragments.planes.tiles(), place);
            let tiles = own.load(k, |k, n| fragments.own_tile(k, base, n));
            let product = Product::new(k, &fragments, tiles, place, self.split.warps).precise();
            let out = k.param(outs[if is_gate { 4 } else { 5 }]);
            let stride = if is_gate { LANES } else { pad(choice.experts) };
            many::products(k, (&product, stage), self.rows, (first, count), &mut |_, t| t, &mut |k, at, pair| {
                own.each(k, at, pair, |k, tile, at, values| {
                    k.if_then(at.exists, |k| {
                        let values = if is_gate { values.map(|value| k.sigmoid(value)) } else { values };
                        store_pair(k, (out, stride), at.token, (tile, pair.row), values);
                    });
                });
            });
        });
        k.finish()
    }
}

/// Some tokens of an expert: where in `order` they begin, and where its run ends.
pub(super) struct Unit {
    pub(super) expert: Val,
    pub(super) first: Val,
    pub(super) end: Val,
}

impl Choices {
    /// The expert at place `i` among the chosen ones, or -1.
    pub fn active(&self, k: &mut KernelBuilder, i: Val) -> Val {
        let table = k.param(self.table);
        self.layout.active(k, table, i)
    }

    /// Where the choices of expert `e`, chosen as number `number`, begin and end: of a single token each chosen expert has one.
    pub fn run(&self, k: &mut KernelBuilder, tokens: Val, (number, e): (Val, Val)) -> (Val, Val) {
        let table = k.param(self.table);
        let one = k.const_i64(1);
        let is_one = k.cmp(Pred::Eq, tokens, one);
        let range = k.if_else(
            is_one,
            |k| vec![number, k.add_const(number, 1)],
            |k| {
                let (begin, end) = self.layout.run(k, table, e);
                vec![begin, end]
            },
        );
        (range[0], range[1])
    }

    /// The number of the choice at a place; of a single token it is `own`.
    pub fn number(&self, k: &mut KernelBuilder, tokens: Val, (place, own): (Val, Val)) -> Val {
        let one = k.const_i64(1);
        let is_one = k.cmp(Pred::Eq, tokens, one);
        k.if_else(is_one, |_| vec![own], |k| vec![self.at(k, place).0])[0]
    }

    /// The token of the choice at a place, of `tokens` tokens.
    pub fn token(&self, k: &mut KernelBuilder, tokens: Val, place: Val) -> Val {
        let (zero, one) = (k.const_i64(0), k.const_i64(1));
        let is_one = k.cmp(Pred::Eq, tokens, one);
        k.if_else(is_one, |_| vec![zero], |k| vec![self.at(k, place).1])[0]
    }

    /// Most units of the routed experts, of `tokens` tokens each.
    pub(super) fn units(&self, sym: Sym, tokens: u64) -> Extent {
        let choices = Extent::from(sym) * self.each.into();
        choices.clone().ceil_div(tokens) + Extent::from(self.layout.experts).min(choices)
    }

    /// Unit `number` of the routed experts, by a warp, and whether there is one: runs of experts in blocks of `tokens` tokens.
    pub(super) fn unit(&self, k: &mut KernelBuilder, lane: Val, (number, tokens): (Val, u64)) -> (Val, Unit) {
        let per_lane = self.layout.experts.div_ceil(32);
        let (table, number) = (k.param(self.table), k.narrow(number));
        let (none, one) = (k.const_i32(0), k.const_i32(1));
        let (up, size) = (k.const_i32(tokens as i32 - 1), k.const_i32(tokens as i32));
        let own = k.mul_const(lane, per_lane);
        let end = k.index(self.layout.experts);
        let units: Vec<(Val, Val)> = (0..per_lane)
            .map(|i| {
                let e = k.add_const(own, i);
                let exists = k.cmp(Pred::Lt, e, end);
                let count = |k: &mut KernelBuilder| {
                    let next = k.add_const(e, 1);
                    let (begin, end) = (k.load(DType::I32, 1, table, e), k.load(DType::I32, 1, table, next));
                    let count = k.sub(end, begin);
                    let count = k.add(count, up);
                    vec![k.div(count, size)]
                };
                (e, k.if_else(exists, count, |_| vec![none])[0])
            })
            .collect();
        let mine = units.iter().fold(none, |sum, &(_, n)| k.add(sum, n));
        let (before, _) = lanes_before(k, lane, (none, mine), |k, a, b| k.add(a, b));
        let (mut at, mut expert, mut index) = (before, none, none);
        for (e, n) in units {
            let within = k.sub(number, at);
            let (from, to) = (k.cmp(Pred::Ge, within, none), k.cmp(Pred::Lt, within, n));
            let hit = k.and(from, to);
            let (e, i) = (k.narrow(e), k.add(within, one));
            expert = k.select(hit, e, expert);
            index = k.select(hit, i, index);
            at = k.add(at, n);
        }
        let (expert, index) = (warp_count(k, expert), warp_count(k, index));
        let exists = k.cmp(Pred::Gt, index, none);
        let index = k.sub(index, one);
        let index = k.select(exists, index, none);
        let (expert, index) = (k.widen(expert), k.widen(index));
        let (begin, end) = self.layout.run(k, table, expert);
        let skipped = k.mul_const(index, tokens);
        (exists, Unit { expert, first: k.add(begin, skipped), end })
    }
}

/// `experts_gate_up`.
pub struct GateUp<'a> {
    /// What all experts read.
    pub rows: &'a Rows,
    /// Gate and up of the routed experts.
    pub routed: (Fragments, [Port; 2]),
    /// The same of the shared one.
    pub dense: (Fragments, [Port; 2]),
    /// How the kernel for few tokens splits columns.
    pub split: Split,
    /// Who reads what.
    pub choices: Choices,
    /// Width of a routed expert.
    pub width: u64,
    /// Where the products of both go, and elements from one row to the next.
    pub outs: [(Port, u64); 2],
}

impl GateUp<'_> {
    /// The kernel for steps of more tokens than `above`.
    pub fn kernel(&self, site: &Site<'_>, ports: &Ports, (sym, above): (Sym, u64)) -> Kernel {
        if wide::covers(site.target, Width::PAIRS, [&self.routed.0, &self.dense.0]) {
            return wide::experts::gate_up(self, site, ports, (sym, above));
        }
        let (dense_tiles, tiles) = (self.dense.0.planes.tiles(), pad(self.width) / LANES);
        let [dense_groups, groups] = [dense_tiles, tiles].map(|n| n.div_ceil(WARPS));
        let shared_tasks = token_blocks(sym) * dense_groups.into();
        let grid = shared_tasks.clone() + self.choices.units(sym, MANY_TOKENS) * groups.into();
        let mut k = ports.builder_of(site, ".many", many(sym, above, grid));
        let place = many::begin_block(&mut k);
        let operands = [self.routed.0, self.dense.0].map(|f| f.numbers().operands()).into_iter().max();
        let stage = many::stage(&mut k, operands.unwrap_or(1));
        let (task, count) = (k.task(), k.dim(sym));
        let shared_end = k.extent(&shared_tasks);
        let is_shared = k.cmp(Pred::Lt, task, shared_end);
        let [routed_out, shared_out] = self.outs.map(|(port, stride)| (k.param(port), stride));
        k.if_else(
            is_shared,
            |k| {
                let (first, group) = many::block_of(k, task, dense_groups);
                let pair = GatePair::of(k, (&self.dense.0, self.dense.1), (group, dense_tiles), place);
                let product = Product::new(k, &self.dense.0, pair.tiles.to_vec(), place, self.split.warps);
                many::products(k, (&product, stage), self.rows, (first, count), &mut |_, t| t, &mut |k, at, sums| {
                    pair.store(k, at, sums, shared_out, at.token);
                });
                Vec::new()
            },
            |k| {
                let number = k.sub(task, shared_end);
                let (number, group) = (k.div_const(number, groups), k.rem_const(number, groups));
                let (exists, unit) = self.choices.unit(k, place.lane, (number, MANY_TOKENS));
                k.if_then(exists, |k| {
                    let pair =
                        GatePair::of_expert(k, (&self.routed.0, self.routed.1), unit.expert, (group, tiles), place);
                    let product = Product::new(k, &self.routed.0, pair.tiles.to_vec(), place, self.split.warps);
                    let mut row_of = |k: &mut KernelBuilder, at: Val| self.choices.at(k, at).1;
                    let range = (unit.first, unit.end);
                    many::products(k, (&product, stage), self.rows, range, &mut row_of, &mut |k, at, sums| {
                        let number =
                            k.if_else(at.exists, |k| vec![self.choices.at(k, at.token).0], |_| vec![unit.first])[0];
                        pair.store(k, at, sums, routed_out, number);
                    });
                });
                Vec::new()
            },
        );
        k.finish()
    }
}

/// `experts_down`.
pub fn down(site: &Site<'_>, ports: &Ports, down: &Down, (sym, above): (Sym, u64)) -> Kernel {
    if wide::covers_plain(site.target, Width::WHOLE, [&down.routed, &down.dense]) {
        return wide::experts::down(down, site, ports, (sym, above));
    }
    let (groups, stride) = (down.tiles.div_ceil(TILES), down.tiles * LANES);
    let shared_tasks = token_blocks(sym) * groups.into();
    let grid = shared_tasks.clone() + down.choices.units(sym, MANY_TOKENS) * groups.into();
    let mut k = ports.builder_of(site, ".many", many(sym, above, grid));
    let place = many::begin_block(&mut k);
    let operands = [down.routed, down.dense].map(|f| f.numbers().operands()).into_iter().max();
    let stage = many::stage(&mut k, operands.unwrap_or(1));
    // a row of the residual stream for each choice, then one for each token: there are tasks for as many blocks of tokens of both
    let partials = k.partials(DType::F32, MANY_TOKENS * TILES * LANES);
    let (task, count) = (k.task(), k.dim(sym));
    let shared_end = k.extent(&shared_tasks);
    let is_shared = k.cmp(Pred::Lt, task, shared_end);
    let choices = k.mul_const(count, down.choices.each);
    let block = DownBlock { down, place, stage, partials, stride };
    k.if_else(
        is_shared,
        |k| {
            let ((first, group), zero) = (many::block_of(k, task, groups), k.const_i64(0));
            let weight = (&down.dense, k.param(down.s_down), zero);
            block.run(k, weight, group, (&down.s, (first, count)), &mut |_, t| t, &mut |k, t| k.add(choices, t));
            Vec::new()
        },
        |k| {
            let number = k.sub(task, shared_end);
            let (number, group) = (k.div_const(number, groups), k.rem_const(number, groups));
            let (exists, unit) = down.choices.unit(k, place.lane, (number, MANY_TOKENS));
            k.if_then(exists, |k| {
                let weight = (&down.routed, k.param(down.w_down), unit.expert);
                let mut choice = |k: &mut KernelBuilder, at: Val| down.choices.at(k, at).0;
                let mut row = |k: &mut KernelBuilder, at: Val| down.choices.at(k, at).0;
                block.run(k, weight, group, (&down.h, (unit.first, unit.end)), &mut choice, &mut row);
            });
            Vec::new()
        },
    );
    combine(k, down, (sym, above), MANY_TOKENS * TILES * LANES)
}

/// Adds the tail: a block a token adds up the products of its choices, whose tasks had room for `elems` each.
pub(super) fn combine(k: KernelBuilder, down: &Down, (sym, above): (Sym, u64), elems: u64) -> Kernel {
    let (stride, threads) = (down.tiles * LANES, u64::from(k.block_threads()));
    k.finish_with_tail_grid(many(sym, above, sym.into()), |k| {
        let partials = k.partials(DType::F32, elems);
        begin(k);
        let (thread, token) = (k.thread(), k.task());
        let (first, choices) = (k.mul_const(token, down.choices.each), k.mul_const(k.dim(sym), down.choices.each));
        let [sums, shared] = [first, k.add(choices, token)].map(|row| row_ptr(k, partials, row, stride));
        let (zero, end) = (k.const_i64(0), k.index(stride));
        k.for_each((zero, end, threads), |k, from| {
            let column = k.add(from, thread);
            let exists = k.cmp(Pred::Lt, column, end);
            let column = k.select(exists, column, zero);
            let factors = down.factors(k, token);
            let sum = down.weighted(k, factors, (sums, column, stride), (shared, column));
            let (tile, row) = (k.div_const(column, LANES), k.rem_const(column, LANES));
            store_residual(k, &down.residual, tile, &At { token, exists }, (row, None), sum);
        });
    })
}

/// A block at work on products for the tail.
struct DownBlock<'a> {
    down: &'a Down,
    place: Place,
    stage: Val,
    partials: Val,
    stride: u64,
}

impl DownBlock<'_> {
    /// The products of some tokens with the tiles of `group` of an expert; `row_to` says in which row of the partials a token's go.
    fn run(
        &self,
        k: &mut KernelBuilder,
        (fragments, base, expert): (&Fragments, Val, Val),
        group: Val,
        (rows, range): (&Rows, (Val, Val)),
        row_of: &mut dyn FnMut(&mut KernelBuilder, Val) -> Val,
        row_to: &mut dyn FnMut(&mut KernelBuilder, Val) -> Val,
    ) {
        let skipped = k.mul_const(expert, self.down.tiles);
        let own = OwnTiles::of_group(k, group, self.down.tiles, self.place);
        let tiles = own.load(k, |k, n| {
            let n = k.add(skipped, n);
            fragments.own_tile(k, base, n)
        });
        let product = Product::new(k, fragments, tiles, self.place, 1);
        many::products(k, (&product, self.stage), rows, range, row_of, &mut |k, at, pair| {
            k.if_then(at.exists, |k| {
                let row = row_to(k, at.token);
                own.each(k, at, pair, |k, tile, at, values| {
                    k.if_then(at.exists, |k| {
                        store_pair(k, (self.partials, self.stride), row, (tile, pair.row), values);
                    });
                });
            });
        });
    }
}
