//! `experts` of many tokens on a GPU.
//!
//! norm_router      blocks as in `many.rs`
//! .choose          a warp a token
//! .dispatch_some   a block for at most 1024 choices: warps find which of 32 choices are alike, a thread an expert counts them and finds where they
//!                  begin, and a thread a choice lists it
//! .dispatch        the same of more: a block for 1024 choices, or as many as its counts have room for, counts them; tail: where each begins among all, and lists them
//! experts_gate_up  blocks (64 tokens of the shared expert, or of the run of a chosen one; eight tiles of its width)
//! experts_down     blocks as before, by 16 tiles of the residual stream, hand all products to the tail: a block a token adds up those of
//!                  its choices in their order
//!
//! What is dispatched, and how, says [`super::super::experts`].

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
use super::many::{self, FEW_ROWS, MANY_TOKENS, OwnTiles, TILES, WARPS, few_rows, many, some, token_blocks};
use super::matmul::{GatePair, WidePairs, store_pair, store_residual};
use super::router::Choice;
use super::tile::{Product, Split};
use super::wide::{self, Goes, Own, Packed, Tiles, Width, X};
use super::{Place, begin, lanes_alike, lanes_before, warp_count};

/// The products of the router.
pub struct Router<'a> {
    /// What it reads.
    pub rows: &'a Rows,
    /// The matrix of the experts, and the gate of the shared one.
    pub matrices: [(Fragments, Port); 2],
    /// How the kernel for few tokens splits columns.
    pub split: Split,
}

/// Tokens of a block that chooses: a warp each.
const CHOOSING: u64 = WARPS;
/// Choices that a block dispatches, at most.
const DISPATCHED: u64 = 1024;
/// Counts that such a block has room for: of each expert for each 32 choices.
const COUNTS: u64 = 1 << 14;

impl Router<'_> {
    /// The kernels; `outs` are the results of the node.
    pub fn kernels(&self, site: &Site<'_>, ports: &Ports, outs: &[Port], (sym, choice): (Sym, &Choice)) -> Lowered {
        let kernels = [
            self.logits(site, ports, outs, (sym, choice)),
            choose(site, ports, outs, (sym, choice)),
            dispatch_some(site, ports, outs, (sym, choice)),
            dispatch(site, ports, outs, (sym, choice)),
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

/// Chooses: a warp a token.
fn choose(site: &Site<'_>, ports: &Ports, outs: &[Port], (sym, choice): (Sym, &Choice)) -> Kernel {
    let choice = Choice { threads: CHOOSING * 32, ..*choice };
    let mut k = ports.builder_of(site, ".choose", many(sym, FEW_ROWS, Extent::from(sym).ceil_div(CHOOSING)));
    k.threads(choice.threads as u32);
    begin(&mut k);
    let place = Place::here(&mut k);
    let [weights, ids, logits] = [0, 1, 5].map(|i: usize| k.param(outs[i]));
    let task = k.task();
    let t = k.mul_const(task, CHOOSING);
    let t = k.add(t, place.warp);
    let exists = k.cmp(Pred::Lt, t, choice.tokens);
    k.if_then(exists, |k| {
        choice.choose(k, place, t, (logits, weights, ids));
    });
    k.finish()
}

/// Choices that a block dispatches.
fn dispatched(choice: &Choice) -> u64 {
    (COUNTS / choice.padded_experts() * 32).clamp(32, DISPATCHED)
}

/// Most tokens of a step whose choices one block dispatches.
fn one_block(choice: &Choice) -> u64 {
    (dispatched(choice) / choice.k).max(FEW_ROWS)
}

/// The choice for blocks that dispatch.
fn dispatching(choice: &Choice) -> Choice {
    Choice { threads: choice.experts.next_multiple_of(32).clamp(64, 512), ..*choice }
}

/// Lists the choices of some tokens by expert.
fn dispatch_some(site: &Site<'_>, ports: &Ports, outs: &[Port], (sym, choice): (Sym, &Choice)) -> Kernel {
    let choice = dispatching(choice);
    let mut k = ports.builder_of(site, ".dispatch_some", some(sym, (FEW_ROWS, one_block(&choice)), 1.into()));
    k.threads(choice.threads as u32);
    let chunk = Chunk::new(&mut k, &choice);
    begin(&mut k);
    let [ids, order, table] = [1, 2, 3].map(|i: usize| k.param(outs[i]));
    let (listed, counts) = chunk.take(&mut k, ids);
    let first = k.const_i64(0);
    let enters = k.cmp(Pred::Eq, k.task(), first);
    let starts = choice.enter_all(&mut k, chunk.place, table, (&counts, chunk.totals), enters);
    chunk.list(&mut k, order, &listed, &starts);
    k.finish()
}

/// Lists the choices by expert.
fn dispatch(site: &Site<'_>, ports: &Ports, outs: &[Port], (sym, choice): (Sym, &Choice)) -> Kernel {
    let choice = dispatching(choice);
    let chunks = (Extent::from(sym) * choice.k.into()).ceil_div(dispatched(&choice));
    let grid = many(sym, one_block(&choice), chunks);
    let mut k = ports.builder_of(site, ".dispatch", grid.clone());
    k.threads(choice.threads as u32);
    let row = choice.padded_experts();
    let chunk = Chunk::new(&mut k, &choice);
    let counts = k.partials(DType::I32, row);
    begin(&mut k);
    let ids = k.param(outs[1]);
    let (_, found) = chunk.take(&mut k, ids);
    let task = k.task();
    let mine = row_ptr(&mut k, counts, task, row);
    let own = choice.own_experts(&mut k, chunk.place.thread);
    own.iter().zip(found).for_each(|(&e, count)| k.store(mine, e, count));
    k.finish_with_tail_grid(grid, |k| {
        let chunk = Chunk::new(k, &choice);
        let counts = k.partials(DType::I32, row);
        begin(k);
        let [ids, order, table] = [1, 2, 3].map(|i: usize| k.param(outs[i]));
        let (listed, _) = chunk.take(k, ids);
        let own = choice.own_experts(k, chunk.place.thread);
        let (none, first) = (k.const_i32(0), k.const_i64(0));
        let all = k.mul_const(choice.tokens, choice.k);
        let all = k.add_const(all, chunk.most() - 1);
        let all = k.div_const(all, chunk.most());
        let begin = vec![none; 2 * own.len()];
        // of each expert all choices, and those of the chunks before this one
        let sums = k.for_carry((first, all, 1), &begin, |k, c, sums| {
            let counts = row_ptr(k, counts, c, row);
            let (sums, before) = sums.split_at(own.len());
            let is_before = k.cmp(Pred::Lt, c, k.task());
            let found: Vec<Val> = own.iter().map(|&e| k.load(DType::I32, 1, counts, e)).collect();
            let sums = found.iter().zip(sums).map(|(&n, &sum)| k.add(n, sum)).collect::<Vec<_>>();
            let before = found.iter().zip(before).map(|(&n, &sum)| {
                let n = k.select(is_before, n, none);
                k.add(n, sum)
            });
            let before = before.collect();
            [sums, before].concat()
        });
        let (sums, before) = sums.split_at(own.len());
        let enters = k.cmp(Pred::Eq, k.task(), first);
        let starts = choice.enter_all(k, chunk.place, table, (sums, chunk.totals), enters);
        let starts: Vec<Val> = starts.iter().zip(before).map(|(&start, &before)| k.add(start, before)).collect();
        chunk.list(k, order, &listed, &starts);
    })
}

/// The choices of one block of the dispatch, and its shared memory.
struct Chunk<'a> {
    choice: &'a Choice,
    place: Place,
    /// `[choices]`: the expert of each.
    ids: Val,
    /// `[choices / 32][experts]`: how many of the 32 choices of a warp are of an expert; then how many are in the warps before.
    counts: Val,
    /// `[experts]`: where the chunk's choices of each begin.
    starts: Val,
    /// What [`Choice::enter_all`] needs.
    totals: Val,
}

/// A choice of a thread.
struct Listed {
    /// Its number in the chunk, and whether there is one.
    at: Val,
    exists: Val,
    /// Its expert, and how many choices of it are before this one in its warp.
    expert: Val,
    before: Val,
}

impl<'a> Chunk<'a> {
    fn new(k: &mut KernelBuilder, choice: &'a Choice) -> Self {
        let (experts, most) = (choice.padded_experts(), dispatched(choice));
        let mut array = |elems: u64| k.shared(DType::I32, elems);
        let [ids, counts] = [most, most / 32 * experts].map(&mut array);
        let [starts, totals] = [experts, choice.totals()].map(&mut array);
        Self { choice, place: Place::here(k), ids, counts, starts, totals }
    }

    /// Choices that it has at most.
    fn most(&self) -> u64 {
        dispatched(self.choice)
    }

    /// The number of its first choice.
    fn first(&self, k: &mut KernelBuilder) -> Val {
        let task = k.task();
        k.mul_const(task, self.most())
    }

    /// How many choices the chunk has.
    fn len(&self, k: &mut KernelBuilder) -> Val {
        let (first, all) = (self.first(k), k.mul_const(self.choice.tokens, self.choice.k));
        let (left, room) = (k.sub(all, first), k.index(self.most()));
        k.min_i64(left, room)
    }

    /// Reads the chunk. Gives the thread's choices, and how many there are of each of its experts.
    fn take(&self, k: &mut KernelBuilder, ids: Val) -> (Vec<Listed>, Vec<Val>) {
        self.read(k, ids);
        let listed = self.group(k);
        (listed, self.count(k))
    }

    /// Brings the experts of the chunk's choices near.
    fn read(&self, k: &mut KernelBuilder, ids: Val) {
        let (choice, first, len) = (self.choice, self.first(k), self.len(k));
        k.for_each((self.place.thread, len, choice.threads), |k, i| {
            let number = k.add(first, i);
            let (t, s) = (k.div_const(number, choice.k), k.rem_const(number, choice.k));
            let row = row_ptr(k, ids, t, pad(choice.k));
            let id = k.load(DType::I32, 1, row, s);
            k.store(self.ids, i, id);
        });
    }

    /// Counts the choices of each expert among each 32. Gives those of this thread.
    fn group(&self, k: &mut KernelBuilder) -> Vec<Listed> {
        let (threads, len, none) = (self.choice.threads, self.len(k), k.const_i32(0));
        let groups = k.add_const(len, 31);
        let groups = k.div_const(groups, 32);
        let cells = k.mul_const(groups, self.choice.padded_experts() / 4);
        let nothing = k.quad([none; 4]);
        k.for_each((self.place.thread, cells, threads), |k, i| {
            let at = k.mul_const(i, 4);
            k.store(self.counts, at, nothing);
        });
        k.barrier();
        let missing = k.const_i32(-1);
        let listed: Vec<Listed> = (0..self.most())
            .step_by(threads as usize)
            .map(|from| {
                let at = k.add_const(self.place.thread, from);
                let exists = k.cmp(Pred::Lt, at, len);
                let load = |k: &mut KernelBuilder| vec![k.load(DType::I32, 1, self.ids, at)];
                let expert = k.if_else(exists, load, |_| vec![missing])[0];
                let (before, is_last) = lanes_alike(k, self.place.lane, expert);
                let counts = k.and(exists, is_last);
                k.if_then(counts, |k| {
                    let one = k.const_i32(1);
                    let (count, cell) = (k.add(before, one), self.cell(k, at, expert));
                    k.store(self.counts, cell, count);
                });
                Listed { at, exists, expert, before }
            })
            .collect();
        k.barrier();
        listed
    }

    /// Where the count of a choice's expert among the 32 of its warp lies.
    fn cell(&self, k: &mut KernelBuilder, at: Val, expert: Val) -> Val {
        let (group, expert) = (k.div_const(at, 32), k.widen(expert));
        let row = k.mul_const(group, self.choice.padded_experts());
        k.add(row, expert)
    }

    /// Adds up the counts of this thread's experts; instead of each stands what comes before it.
    fn count(&self, k: &mut KernelBuilder) -> Vec<Val> {
        let own = self.choice.own_experts(k, self.place.thread);
        let (zero, len, none) = (k.const_i64(0), self.len(k), k.const_i32(0));
        k.for_carry((zero, len, 32), &vec![none; own.len()], |k, at, sums| {
            let group = k.div_const(at, 32);
            let row = row_ptr(k, self.counts, group, self.choice.padded_experts());
            let of_one = |(&e, &sum): (&Val, &Val)| {
                let count = k.load(DType::I32, 1, row, e);
                k.store(row, e, sum);
                k.add(sum, count)
            };
            own.iter().zip(sums).map(of_one).collect()
        })
    }

    /// Lists the choices by expert: `starts` says where those of the thread's experts begin; each comes after those of its expert before it.
    fn list(&self, k: &mut KernelBuilder, order: Val, listed: &[Listed], starts: &[Val]) {
        let own = self.choice.own_experts(k, self.place.thread);
        own.iter().zip(starts).for_each(|(&e, &start)| k.store(self.starts, e, start));
        k.barrier();
        let first = self.first(k);
        for choice in listed {
            k.if_then(choice.exists, |k| {
                let (e, cell) = (k.widen(choice.expert), self.cell(k, choice.at, choice.expert));
                let (start, warps) = (k.load(DType::I32, 1, self.starts, e), k.load(DType::I32, 1, self.counts, cell));
                let at = k.add(start, warps);
                let at = k.add(at, choice.before);
                let number = k.add(first, choice.at);
                let (at, number) = (k.widen(at), k.narrow(number));
                k.store(order, at, number);
            });
        }
    }
}

/// Some tokens of an expert: where in `order` they begin, and where its run ends.
struct Unit {
    expert: Val,
    first: Val,
    end: Val,
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
    fn units(&self, sym: Sym, tokens: u64) -> Extent {
        let choices = Extent::from(sym) * self.each.into();
        choices.clone().ceil_div(tokens) + Extent::from(self.layout.experts).min(choices)
    }

    /// Unit `number` of the routed experts, by a warp, and whether there is one: runs of experts in blocks of `tokens` tokens.
    fn unit(&self, k: &mut KernelBuilder, lane: Val, (number, tokens): (Val, u64)) -> (Val, Unit) {
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
            return self.wide(site, ports, (sym, above));
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
        let shared_end = super::extent(&mut k, &shared_tasks);
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

impl GateUp<'_> {
    /// The same by groups of warps.
    fn wide(&self, site: &Site<'_>, ports: &Ports, (sym, above): (Sym, u64)) -> Kernel {
        let shape = |tiles: u64| (tiles, wide::PAIRS, 1);
        let (dense_shape, shape) = (shape(self.dense.0.planes.tiles()), shape(pad(self.width) / LANES));
        let [dense_shares, shares] = [dense_shape, shape].map(Tiles::shares);
        let shared_tasks = Width::PAIRS.token_blocks(sym) * dense_shares.into();
        let grid = shared_tasks.clone() + self.choices.units(sym, Width::PAIRS.tokens()) * shares.into();
        let packed = Packed::of(&self.routed.0);
        let mut k = ports.builder_of(site, ".wide", many(sym, above, sym.into()));
        packed.body(&mut k, self.rows);
        k.finish_with_tail_grid(many(sym, above, grid), |k| {
            let memory = wide::Memory::alloc(k, (site.target, Width::PAIRS), [&self.routed.0, &self.dense.0]);
            let x = X::Packed(packed, packed.rows(k));
            let place = wide::begin_block(k);
            let (task, count) = (k.task(), k.dim(sym));
            let shared_end = super::extent(k, &shared_tasks);
            let is_shared = k.cmp(Pred::Lt, task, shared_end);
            let [routed_out, shared_out] = self.outs.map(|(port, stride)| (k.param(port), stride));
            let warps = self.split.warps;
            k.if_else(
                is_shared,
                |k| {
                    let ((first, share), skipped) = (Width::PAIRS.block_of(k, task, dense_shares), k.const_i64(0));
                    let (fragments, weights) = (&self.dense.0, self.dense.1);
                    let pairs =
                        WidePairs { fragments, weights, skipped, tiles: Tiles::of_share(k, share, dense_shape) };
                    let block = wide::Block { fragments, warps, place, memory, x, range: (first, count) };
                    let mut same = [(); 2].map(|()| |_: &mut KernelBuilder, token: Val| token);
                    let [row_of, row_to] = &mut same;
                    pairs.products(k, &block, (row_of, row_to), shared_out);
                    Vec::new()
                },
                |k| {
                    let number = k.sub(task, shared_end);
                    let (number, share) = (k.div_const(number, shares), k.rem_const(number, shares));
                    let (exists, unit) = self.choices.unit(k, place.lane, (number, Width::PAIRS.tokens()));
                    k.if_then(exists, |k| {
                        let skipped = k.mul_const(unit.expert, shape.0);
                        let (fragments, weights) = (&self.routed.0, self.routed.1);
                        let pairs = WidePairs { fragments, weights, skipped, tiles: Tiles::of_share(k, share, shape) };
                        let range = (unit.first, unit.end);
                        let block = wide::Block { fragments, warps, place, memory, x, range };
                        let mut row_of = |k: &mut KernelBuilder, at: Val| self.choices.at(k, at).1;
                        let mut row_to = |k: &mut KernelBuilder, at: Val| self.choices.at(k, at).0;
                        pairs.products(k, &block, (&mut row_of, &mut row_to), routed_out);
                    });
                    Vec::new()
                },
            );
        })
    }
}

/// Blocks that share the tiles of an expert's `down` for the same tokens.
const DOWN_SHARES: u64 = 2;

/// `experts_down`.
pub fn down(site: &Site<'_>, ports: &Ports, down: &Down, (sym, above): (Sym, u64)) -> Kernel {
    if wide::covers_plain(site.target, Width::WHOLE, [&down.routed, &down.dense]) {
        return wide_down(site, ports, down, (sym, above));
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
    let shared_end = super::extent(&mut k, &shared_tasks);
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

/// The same by groups of warps: a block takes half of the tiles of an expert for its tokens.
fn wide_down(site: &Site<'_>, ports: &Ports, down: &Down, (sym, above): (Sym, u64)) -> Kernel {
    let shape = (down.tiles, wide::WARPS, down.tiles.div_ceil(wide::WARPS).div_ceil(DOWN_SHARES));
    let (shares, stride) = (Tiles::shares(shape), down.tiles * LANES);
    let shared_tasks = Width::WHOLE.token_blocks(sym) * shares.into();
    let grid = shared_tasks.clone() + down.choices.units(sym, Width::WHOLE.tokens()) * shares.into();
    let mut k = ports.builder_of(site, ".wide", many(sym, above, grid));
    k.threads(wide::THREADS as u32);
    let memory = wide::Memory::resident(&mut k, (site.target, Width::WHOLE), [&down.routed, &down.dense]);
    // as for blocks without groups of warps
    let elems = Width::WHOLE.tokens() * shape.1 * shape.2 * LANES;
    let partials = k.partials(DType::F32, elems);
    let place = wide::begin_block(&mut k);
    let (task, count) = (k.task(), k.dim(sym));
    let shared_end = super::extent(&mut k, &shared_tasks);
    let is_shared = k.cmp(Pred::Lt, task, shared_end);
    let choices = k.mul_const(count, down.choices.each);
    let row = k.div_const(place.lane, 4);
    let products = |k: &mut KernelBuilder,
                    (fragments, weight, skipped): (&Fragments, Port, Val),
                    (rows, range, share): (&Rows, (Val, Val), Val),
                    both: (&mut wide::RowOf<'_>, &mut wide::RowOf<'_>)| {
        let (tiles, base) = (Tiles::of_share(k, share, shape), k.param(weight));
        let own = |k: &mut KernelBuilder, go: Val| {
            let (_, _, tile) = tiles.at(k, go, place.warp);
            let tile = k.add(skipped, tile);
            Own::Tile(fragments.own_tile(k, base, tile))
        };
        let block = wide::Block { fragments, warps: 1, place, memory, x: X::Plain(rows), range };
        let goes = Goes { count: tiles.goes(k), own: &own };
        block.products(
            k,
            &goes,
            both,
            |_, _, _| (),
            |k, go, at, values, ()| {
                let (tile, is_tile, _) = tiles.at(k, go, place.warp);
                let exists = k.and(at.exists, is_tile);
                k.if_then(exists, |k| store_pair(k, (partials, stride), at.token, (tile, row), values));
            },
        );
    };
    k.if_else(
        is_shared,
        |k| {
            let ((first, share), none) = (Width::WHOLE.block_of(k, task, shares), k.const_i64(0));
            let (mut row_of, mut row_to) =
                (|_: &mut KernelBuilder, t: Val| t, |k: &mut KernelBuilder, t: Val| k.add(choices, t));
            let weight = (&down.dense, down.s_down, none);
            products(k, weight, (&down.s, (first, count), share), (&mut row_of, &mut row_to));
            Vec::new()
        },
        |k| {
            let number = k.sub(task, shared_end);
            let (number, share) = (k.div_const(number, shares), k.rem_const(number, shares));
            let (exists, unit) = down.choices.unit(k, place.lane, (number, Width::WHOLE.tokens()));
            k.if_then(exists, |k| {
                let skipped = k.mul_const(unit.expert, down.tiles);
                let mut rows = [(); 2].map(|()| |k: &mut KernelBuilder, at: Val| down.choices.at(k, at).0);
                let [row_of, row_to] = &mut rows;
                let weight = (&down.routed, down.w_down, skipped);
                products(k, weight, (&down.h, (unit.first, unit.end), share), (row_of, row_to));
            });
            Vec::new()
        },
    );
    combine(k, down, (sym, above), elems)
}

/// Adds the tail: a block a token adds up the products of its choices, whose tasks had room for `elems` each.
fn combine(k: KernelBuilder, down: &Down, (sym, above): (Sym, u64), elems: u64) -> Kernel {
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
