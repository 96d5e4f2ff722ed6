//! `experts`: the router with its dispatch, and the two halves of the routed and the shared experts.
//!
//! Tokens are grouped by expert: `order` lists the choices `t·k + s` by expert, `table` holds where each expert's run begins
//! and which experts anybody chose. So a step of any size reads the weights of each chosen expert once, and the same code
//! serves one token and a thousand. Every output has one writer, and a token's experts are summed in ascending order.
//!
//! norm_router      tasks over blocks of tokens and tiles of router logits; tail: top-k and weights of some tokens, and the dispatch of few
//! .dispatch        that of many, once all have chosen
//! experts_gate_up  tiles of the shared expert, whose tasks take longest where there are many tokens, then tasks (chosen expert, tiles of its width)
//! experts_down     tasks over tiles of the residual stream: all experts of all tokens for these rows

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::{LANES, Sym, pad};
use nextc_ir::target::MatmulTile;
use nextc_ir::{DType, Op};

use super::LowerError;
use super::bulk::{Asking, Class, Classes, Mix, Panel};
use super::matmul::{
    GROUP_TILES, Multiplier, Normed, Residual, Rows, Scratch, Weight, dot, emit_swiglu, for_rows, for_tiles,
    group_tiles, number_in_range, row_ptr, store_tile, swiglu_rows, tile_range,
};
use super::packed::{Matrix, Tile};
use super::ports::{Lowered, Port, Ports, Site};
use super::strips::for_groups;

/// The layout of `dispatch`'s table for a number of experts.
#[derive(Clone, Copy)]
pub struct Table {
    /// How many experts there are.
    pub experts: u64,
}

impl Table {
    /// `(begin, end)` of the run of expert `e` in `order`.
    pub fn run(self, k: &mut KernelBuilder, table: Val, e: Val) -> (Val, Val) {
        let next = k.add_const(e, 1);
        (k.load_index(table, e), k.load_index(table, next))
    }

    /// How many experts were chosen by anybody.
    pub fn count(self, k: &mut KernelBuilder, table: Val) -> Val {
        let at = k.index(self.experts + 1);
        k.load_index(table, at)
    }

    /// The expert at place `i` among the chosen ones.
    pub fn active(self, k: &mut KernelBuilder, table: Val, i: Val) -> Val {
        let at = k.add_const(i, self.experts + 2);
        k.load_index(table, at)
    }
}

/// `norm_router`.
pub fn lower_norm_router(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let rows = Rows::Normed(Normed::ports(site, &mut ports)?);
    let (router, gate) = (site.named("router"), site.named("shared_gate"));
    let (router_matrix, gate_matrix) = (Matrix::of(site, router, 1), Matrix::of(site, gate, 1));
    let experts = site.weight(router).shape[0];
    let (router, gate) = (ports.read("router", router), ports.read("shared_gate", gate));
    let names = ["weights", "ids", "order", "table", "shared", "logits"];
    let outs: Vec<Port> = (0..6).map(|i| ports.write(names[i as usize], site.result(i))).collect();
    let sym = site.rows(site.result(0))?;
    let router_tasks = router_matrix.tiles().div_ceil(group_tiles(site.target));
    let groups = router_tasks + 1;
    let mut k = ports.builder(site, Extent::from(sym).ceil_div(ROUTED_TOKENS) * groups.into());
    let tile = site.target.matmul_tile();
    let scratch = rows.scratch(&mut k, tile.tokens, &[router_matrix, gate_matrix]);
    let (block, group) = (k.div_const(k.task(), groups), k.rem_const(k.task(), groups));
    let (first, all) = (k.mul_const(block, ROUTED_TOKENS), k.dim(sym));
    let last = k.add_const(first, ROUTED_TOKENS);
    let last = k.min_i64(last, all);
    number_in_range(&mut k, group, (0, router_tasks), |k, group| {
        let range = tile_range(k, group, group_tiles(site.target), router_matrix.tiles());
        let (weight, logits) = (k.param(router), k.param(outs[5]));
        for_rows(k, (first, last), tile.tokens, |k, block| {
            let x = rows.load(k, scratch, block);
            k.for_each((range.0, range.1, 1), |k, t| {
                let tile = router_matrix.tile(k, weight, t);
                let products = dot(k, &[tile], &x);
                for (&row, &value) in block.iter().zip(&products[0]) {
                    store_tile(k, logits, pad(experts), t, row, value);
                }
            });
        });
    });
    number_in_range(&mut k, group, (router_tasks, groups), |k, _| {
        let (weight, shared) = (k.param(gate), k.param(outs[4]));
        for_rows(k, (first, last), 1, |k, block| {
            let x = rows.load(k, scratch, block);
            let zero = k.const_i64(0);
            let tile = gate_matrix.tile(k, weight, zero);
            let products = dot(k, &[tile], &x);
            let value = k.sigmoid(products[0][0]);
            store_tile(k, shared, LANES, zero, block[0], value);
        });
    });
    let choice = Choice { experts, k: site.int("k"), renormalise: site.int("renormalise") != 0, sym };
    let kernel = k.finish_with_tail_grid(Extent::from(sym).ceil_div(TOP_K_TOKENS), |k| {
        let [weights, ids, order, table, _, logits] = [0, 1, 2, 3, 4, 5].map(|i: usize| k.param(outs[i]));
        let (work, numbers) = (k.alloc(DType::F32, pad(experts)), k.alloc(DType::F32, pad(experts)));
        choice.count(k, numbers);
        let cursor = k.alloc(DType::I32, experts + 1);
        let (first, all) = (k.mul_const(k.task(), TOP_K_TOKENS), k.dim(sym));
        let last = k.add_const(first, TOP_K_TOKENS);
        let last = k.min_i64(last, all);
        k.for_each((first, last, 1), |k, t| choice.top_k(k, t, logits, (work, numbers), weights, ids));
        let most = k.index(TOP_K_TOKENS);
        let alone = k.cmp(Pred::Le, all, most);
        k.if_then(alone, |k| choice.dispatch(k, ids, order, table, cursor));
    });
    let mut k = ports.builder_of(site, ".dispatch", Extent::from(1).if_above(sym, TOP_K_TOKENS, 0.into()));
    let cursor = k.alloc(DType::I32, experts + 1);
    let [ids, order, table] = [1, 2, 3].map(|i: usize| k.param(outs[i]));
    choice.dispatch(&mut k, ids, order, table, cursor);
    Ok(ports.clone().finish(kernel).then(ports.finish(k.finish())))
}

/// Tokens of a task that makes router logits.
const ROUTED_TOKENS: u64 = 64;
/// Tokens of a task that chooses experts.
const TOP_K_TOKENS: u64 = 16;

/// The choice of experts for one token after the other.
struct Choice {
    experts: u64,
    k: u64,
    renormalise: bool,
    sym: Sym,
}

impl Choice {
    /// Top-k of one row of logits, the lower index first among equals, and the weights of the chosen.
    fn top_k(&self, k: &mut KernelBuilder, t: Val, logits: Val, (work, numbers): (Val, Val), weights: Val, ids: Val) {
        let logits = row_ptr(k, logits, t, pad(self.experts));
        let weights = row_ptr(k, weights, t, pad(self.k));
        let ids = row_ptr(k, ids, t, pad(self.k));
        let lowest = k.splat_f32(16, f32::NEG_INFINITY);
        k.for_range(pad(self.experts), LANES, |k, i| k.store(work, i, lowest));
        k.for_range(self.experts, 1, |k, i| {
            let x = k.load_f32(logits, i);
            k.store(work, i, x);
        });
        let largest = self.largest(k, work);
        let divisor = if self.renormalise { None } else { Some(self.sum_exp(k, work, largest)) };
        k.for_range(self.k, 1, |k, s| {
            let best = self.largest(k, work);
            let id = self.first_equal(k, work, numbers, best);
            let shifted = k.fsub(best, largest);
            let weight = k.exp(shifted);
            k.store(weights, s, weight);
            k.store(ids, s, id);
            let at = k.widen(id);
            let gone = k.const_f32(f32::NEG_INFINITY);
            k.store(work, at, gone);
        });
        let divisor = divisor.unwrap_or_else(|| self.sum_chosen(k, weights));
        k.for_range(self.k, 1, |k, s| {
            let w = k.load_f32(weights, s);
            let w = k.fdiv(w, divisor);
            k.store(weights, s, w);
        });
    }

    fn over(
        &self,
        k: &mut KernelBuilder,
        init: f32,
        work: Val,
        f: impl FnOnce(&mut KernelBuilder, Val, Val) -> Val,
    ) -> Val {
        let init = k.splat_f32(16, init);
        let (lo, hi) = (k.const_i64(0), k.index(pad(self.experts)));
        k.for_carry((lo, hi, LANES), &[init], |k, i, acc| {
            let x = k.load_f32x16(work, i);
            vec![f(k, acc[0], x)]
        })[0]
    }

    fn largest(&self, k: &mut KernelBuilder, work: Val) -> Val {
        let lanes = self.over(k, f32::NEG_INFINITY, work, |k, acc, x| k.fmax(acc, x));
        k.reduce_max(lanes)
    }

    fn sum_exp(&self, k: &mut KernelBuilder, work: Val, largest: Val) -> Val {
        let largest = k.splat(largest, 16);
        let lanes = self.over(k, 0.0, work, |k, acc, x| {
            let shifted = k.fsub(x, largest);
            let e = k.exp(shifted);
            k.fadd(acc, e)
        });
        k.reduce_add(lanes)
    }

    fn sum_chosen(&self, k: &mut KernelBuilder, weights: Val) -> Val {
        let zero = k.const_f32(0.0);
        let (lo, hi) = (k.const_i64(0), k.index(self.k));
        k.for_carry((lo, hi, 1), &[zero], |k, s, acc| {
            let w = k.load_f32(weights, s);
            vec![k.fadd(acc[0], w)]
        })[0]
    }

    /// Index of the first element equal to `best`; the last expert if none is (all NaN). `numbers` holds the indices as floats, which are exact.
    fn first_equal(&self, k: &mut KernelBuilder, work: Val, numbers: Val, best: Val) -> Val {
        let (best, none) = (k.splat(best, 16), k.splat_f32(16, 1.0 - self.experts as f32));
        let (lo, hi) = (k.const_i64(0), k.index(pad(self.experts)));
        // the largest of negative numbers
        let found = k.for_carry((lo, hi, LANES), &[none], |k, i, found| {
            let (x, number) = (k.load_f32x16(work, i), k.load_f32x16(numbers, i));
            let same = k.cmp(Pred::Eq, x, best);
            let number = k.fneg(number);
            let number = k.select(same, number, none);
            vec![k.fmax(found[0], number)]
        });
        let found = k.reduce_max(found[0]);
        let index = k.fneg(found);
        k.to_int(index)
    }

    /// Fills `numbers` with the indices of experts.
    fn count(&self, k: &mut KernelBuilder, numbers: Val) {
        k.for_range(pad(self.experts), 1, |k, i| {
            let number = k.narrow(i);
            let number = k.to_float(number);
            k.store(numbers, i, number);
        });
    }

    /// Counting sort of all choices by expert.
    fn dispatch(&self, k: &mut KernelBuilder, ids: Val, order: Val, table: Val, cursor: Val) {
        let (zero, one) = (k.const_i32(0), k.const_i64(1));
        k.for_range(self.experts + 1, 1, |k, e| k.store(cursor, e, zero));
        let (first, rows) = (k.const_i64(0), k.dim(self.sym));
        self.for_choices(k, (first, rows), ids, |k, _, e| {
            let at = k.add(e, one);
            bump(k, cursor, at);
        });
        let starts = k.const_i32(0);
        let (lo, hi) = (k.const_i64(0), k.index(self.experts + 1));
        k.for_carry((lo, hi, 1), &[starts], |k, e, sum| {
            let count = k.load(DType::I32, 1, cursor, e);
            let sum = k.add(sum[0], count);
            k.store(table, e, sum);
            k.store(cursor, e, sum);
            vec![sum]
        });
        self.for_choices(k, (first, rows), ids, |k, number, e| {
            let place = bump(k, cursor, e);
            let place = k.widen(place);
            let number = k.narrow(number);
            k.store(order, place, number);
        });
        self.list_active(k, table);
    }

    /// Runs `body(number, expert)` for every choice, in order.
    fn for_choices(
        &self,
        k: &mut KernelBuilder,
        (lo, hi): (Val, Val),
        ids: Val,
        body: impl FnOnce(&mut KernelBuilder, Val, Val),
    ) {
        k.for_each((lo, hi, 1), |k, t| {
            let ids = row_ptr(k, ids, t, pad(self.k));
            let base = k.mul_const(t, self.k);
            k.for_range(self.k, 1, |k, s| {
                let e = k.load_index(ids, s);
                let number = k.add(base, s);
                body(k, number, e);
            });
        });
    }

    /// The experts that have a run, in ascending order, and how many there are.
    fn list_active(&self, k: &mut KernelBuilder, table: Val) {
        let count = k.const_i64(0);
        let (lo, hi) = (k.const_i64(0), k.index(self.experts));
        let missing = k.const_i32(-1);
        k.for_each((lo, hi, 1), |k, e| {
            let at = k.add_const(e, self.experts + 2);
            k.store(table, at, missing);
        });
        let layout = Table { experts: self.experts };
        let count = k.for_carry((lo, hi, 1), &[count], |k, e, count| {
            let (begin, end) = layout.run(k, table, e);
            let chosen = k.cmp(Pred::Gt, end, begin);
            let count = count[0];
            k.if_then(chosen, |k| {
                let at = k.add_const(count, self.experts + 2);
                let e = k.narrow(e);
                k.store(table, at, e);
            });
            let more = k.add_const(count, 1);
            vec![k.select(chosen, more, count)]
        });
        let at = k.index(self.experts + 1);
        let count = k.narrow(count[0]);
        k.store(table, at, count);
    }
}

/// Adds one to an i32 and gives what it was.
fn bump(k: &mut KernelBuilder, counts: Val, at: Val) -> Val {
    let old = k.load(DType::I32, 1, counts, at);
    let one = k.const_i32(1);
    let new = k.add(old, one);
    k.store(counts, at, new);
    old
}

/// Where the choices of a step are, by expert.
#[derive(Clone, Copy)]
pub struct Choices {
    /// Choices by expert.
    pub order: Port,
    /// See [`Table`].
    pub table: Port,
    /// Its layout.
    pub layout: Table,
    /// Experts of a token.
    pub each: u64,
}

impl Choices {
    /// The number of the choice at a place, and its token.
    pub fn at(self, k: &mut KernelBuilder, place: Val) -> (Val, Val) {
        let order = k.param(self.order);
        let number = k.load_index(order, place);
        (number, k.div_const(number, self.each))
    }

    /// Runs `body(expert, its places, group)` for what task `task` does, out of `groups` groups of the tiles of each chosen expert. There are tasks for `most` experts;
    /// where fewer are chosen the tasks with work lie as far apart as they can, as threads claim neighbours.
    fn expert(
        self,
        k: &mut KernelBuilder,
        (task, most, groups): (Val, Val, u64),
        body: impl FnOnce(&mut KernelBuilder, Val, (Val, Val), Val),
    ) {
        let table = k.param(self.table);
        let (count, next) = (self.layout.count(k, table), k.add_const(task, 1));
        let [item, next] = [task, next].map(|task| {
            let share = k.mul(task, count);
            k.div(share, most)
        });
        let works = k.cmp(Pred::Lt, item, next);
        k.if_then(works, |k| {
            let (place, group) = (k.div_const(item, groups), k.rem_const(item, groups));
            let e = self.layout.active(k, table, place);
            let run = self.layout.run(k, table, e);
            body(k, e, run, group);
        });
    }

    /// The same for every chosen expert, in ascending order; `body` gets its place in front.
    fn for_experts(self, k: &mut KernelBuilder, body: impl FnOnce(&mut KernelBuilder, Val, Val, (Val, Val))) {
        let (zero, table) = (k.const_i64(0), k.param(self.table));
        let count = self.layout.count(k, table);
        k.for_each((zero, count, 1), |k, i| {
            let e = self.layout.active(k, table, i);
            let run = self.layout.run(k, table, e);
            body(k, i, e, run);
        });
    }

    /// The expert behind place `i`, or the first one behind the last, and whether `i` is the last place.
    fn after(self, k: &mut KernelBuilder, i: Val) -> (Val, Val) {
        let table = k.param(self.table);
        let (next, count, zero) = (k.add_const(i, 1), self.layout.count(k, table), k.const_i64(0));
        let is_last = k.cmp(Pred::Ge, next, count);
        let next = k.select(is_last, zero, next);
        (self.layout.active(k, table, next), is_last)
    }
}

/// `experts_gate_up`.
pub fn lower_experts_gate_up(site: &Site<'_>) -> Result<Lowered, LowerError> {
    debug_assert_eq!(site.op(), Op::ExpertsGateUp);
    let mut ports = Ports::default();
    let rows = Rows::Normed(Normed::ports(site, &mut ports)?);
    let (order, table) = (ports.read("order", site.named("order")), ports.read("table", site.named("table")));
    let shape = site.weight(site.named("w_gate")).shape.clone();
    let (experts, width) = (shape[0], shape[1]);
    let names = ["w_gate", "w_up", "s_gate", "s_up"];
    let [routed_gate, routed_up, shared_gate, shared_up] = names.map(|n| Matrix::of(site, site.named(n), 1));
    let [gate, up, s_gate, s_up] = names.map(|n| ports.read(n, site.named(n)));
    let (h, s) = (ports.write("h", site.result(0)), ports.write("s", site.result(1)));
    let (sym, each) = (site.rows(site.result(0))?, site.inner(site.result(0))[0]);
    let s_stride = site.stride(site.result(1));
    let expert_tiles = pad(width) / LANES;
    let groups = expert_tiles.div_ceil(GROUP_TILES);
    let most = Extent::Const(experts).min(Extent::from(sym) * each.into());
    let shared_groups = shared_gate.tiles().div_ceil(GROUP_TILES);
    let pairs = [[routed_gate, routed_up], [shared_gate, shared_up]];
    let mut multiplier = Multiplier::of_pairs(site, &mut ports, rows, sym, &pairs);
    let mut k = ports.builder(site, most.clone() * groups.into() + shared_groups.into());
    multiplier.alloc(&mut k, pairs.as_flattened());
    let numbers = multiplier.by_class().map(|(classes, panel)| (classes.mix(&mut k), panel.numbers(&mut k)));

    let (task, shared_tasks) = (k.task(), k.index(shared_groups));
    let is_shared = k.cmp(Pred::Lt, task, shared_tasks);
    let front = Front {
        choices: Choices { order, table, layout: Table { experts }, each },
        multiplier,
        block: swiglu_rows(site.target.matmul_tile()),
        tiles: expert_tiles,
        tasks: experts * groups,
        h,
        stride: pad(width),
        weights: ((routed_gate, k.param(gate)), (routed_up, k.param(up))),
        numbers,
    };
    k.if_else(
        is_shared,
        |k| {
            let s = k.param(s);
            let weights = ((shared_gate, k.param(s_gate)), (shared_up, k.param(s_up)));
            let size = (GROUP_TILES, experts * groups);
            front.multiplier.swiglu_task(k, weights, task, size, &mut |k, tile, row, value| {
                store_tile(k, s, s_stride, tile, row, value);
            });
            Vec::new()
        },
        |k| {
            let (task, rows, all) = (k.sub(task, shared_tasks), k.dim(sym), k.index(experts));
            let choices = k.mul_const(rows, each);
            let most = k.min_i64(choices, all);
            front.choices.expert(k, (task, most, groups), |k, e, run, group| front.task(k, e, run, group));
            Vec::new()
        },
    );
    Ok(ports.finish(k.finish()))
}

/// The first half of the routed experts.
struct Front {
    choices: Choices,
    multiplier: Multiplier,
    /// Rows of a block that is decoded.
    block: u64,
    /// Tiles of an expert's gate.
    tiles: u64,
    /// Tasks where every expert is chosen.
    tasks: u64,
    h: Port,
    stride: u64,
    weights: (Weight, Weight),
    /// Where classes are told apart: which there are, and scratch for the numbers of a panel's rows.
    numbers: Option<(Mix, Val)>,
}

impl Front {
    /// Group `group` of the tiles of expert `e`, for the choices at `run`.
    fn task(&self, k: &mut KernelBuilder, e: Val, run: (Val, Val), group: Val) {
        let begin = k.mul_const(e, self.tiles);
        let (lo, hi) = tile_range(k, group, GROUP_TILES, self.tiles);
        let mut decode = |k: &mut KernelBuilder, places: &[Val]| self.decode(k, places, (begin, lo, hi));
        let (Some((mix, numbers)), Some((classes, panel))) = (self.numbers, self.multiplier.by_class()) else {
            return for_rows(k, run, self.block, decode);
        };
        k.if_then(mix.decode, |k| {
            mix.for_decoded(k, run, self.block, |k, place| self.choices.at(k, place).1, &mut decode);
        });
        let (lo, hi) = classes.range(k, group, (GROUP_TILES, self.tasks), self.tiles);
        let some = k.cmp(Pred::Lt, lo, hi);
        let some = k.and(some, mix.bulk);
        k.if_then(some, |k| {
            panel.for_blocks(k, run, |k, first, count| {
                panel.pack(k, &self.multiplier.rows, count, |k, i| {
                    let place = k.add(first, i);
                    let (number, t) = self.choices.at(k, place);
                    mix.note(k, numbers, i, number, t);
                    t
                });
                let h = k.param(self.h);
                panel.swiglu(k, self.weights, (begin, (lo, hi), self.tiles), count, &mut |k, tile, i, value| {
                    Mix::if_noted(k, numbers, i, |k, number| store_tile(k, h, self.stride, tile, number, value));
                });
            });
        });
    }

    /// A block of choices in the arithmetic of tokens that are decoded.
    fn decode(&self, k: &mut KernelBuilder, places: &[Val], tiles: (Val, Val, Val)) {
        let choices: Vec<(Val, Val)> = places.iter().map(|&p| self.choices.at(k, p)).collect();
        let tokens: Vec<Val> = choices.iter().map(|c| c.1).collect();
        let x = self.multiplier.rows.load(k, self.multiplier.scratch, &tokens);
        let h = k.param(self.h);
        emit_swiglu(k, self.weights, tiles, &x, |k, tile, i, value| {
            store_tile(k, h, self.stride, tile, choices[i].0, value);
        });
    }
}

/// `experts_down`.
pub fn lower_experts_down(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let (h, s) = (ports.read("h", site.named("h")), ports.read("s", site.named("s")));
    let [weights, order, table, shared] = ["weights", "order", "table", "shared"].map(|n| ports.read(n, site.named(n)));
    let shape = site.weight(site.named("w_down")).shape.clone();
    let [routed, dense] = ["w_down", "s_down"].map(|n| Matrix::of(site, site.named(n), 1));
    let [w_down, s_down] = ["w_down", "s_down"].map(|n| ports.read(n, site.named(n)));
    let residual = Residual::ports(site, &mut ports)?;
    let each = site.inner(site.named("weights"))[0];
    let (experts, tiles) = (shape[0], pad(shape[1]) / LANES);
    let sym = site.rows(site.result(0))?;
    let classes = Classes::ports(site, &mut ports, sym).filter(|c| [routed, dense].iter().all(|m| c.takes(m)));
    let size = group_tiles(site.target);
    let tasks = tiles.div_ceil(size);
    let mut k = ports.builder(site, tasks.into());
    let tile = site.target.matmul_tile();
    let [h, s] = [(h, pad(shape[2])), (s, site.stride(site.named("s")))].map(|(x, stride)| Rows::Plain { x, stride });
    let scratch = [(h, routed), (s, dense)].map(|(rows, m)| rows.scratch(&mut k, tile.tokens, &[m]));
    let back = Back {
        choices: Choices { order, table, layout: Table { experts }, each },
        h,
        s,
        weights,
        shared,
        routed: (routed, k.param(w_down)),
        dense: (dense, k.param(s_down)),
        residual,
        tiles,
        tile,
        sym,
        scratch,
    };
    let bulk = classes.map(|classes| {
        let [h, s] = [routed, dense].map(|m| Panel::alloc(&mut k, classes, &[m]));
        let at_once = classes.at_once(size);
        BackBulk { classes, mix: classes.mix(&mut k), numbers: h.numbers(&mut k), at_once, h, s }
    });
    let task = k.task();
    let range = tile_range(&mut k, task, size, tiles);
    let Some(bulk) = bulk else {
        back.decode(&mut k, range, None);
        return Ok(ports.finish(k.finish()));
    };
    k.if_then(bulk.mix.decode, |k| back.decode(k, range, Some(&bulk)));
    let (lo, hi) = bulk.classes.range(&mut k, task, (size, tasks), tiles);
    let some = k.cmp(Pred::Lt, lo, hi);
    let some = k.and(some, bulk.mix.bulk);
    k.if_then(some, |k| back.bulk(k, (lo, hi), &bulk));
    Ok(ports.finish(k.finish()))
}

/// The second half of all experts. A tile's sums of all tokens lie in the tile's own column of the result, which nobody else touches.
struct Back {
    choices: Choices,
    h: Rows,
    s: Rows,
    weights: Port,
    shared: Port,
    routed: Weight,
    dense: Weight,
    residual: Residual,
    /// Tiles of an expert.
    tiles: u64,
    /// Tiles and tokens that are decoded together.
    tile: MatmulTile,
    sym: Sym,
    /// Scratch for rows of h and of s, where they are rounded.
    scratch: [Option<Scratch>; 2],
}

/// The tiles that rows are multiplied with.
#[derive(Clone, Copy)]
enum Tiles<'a> {
    /// These, together.
    Some(&'a [Val]),
    /// All from the first to before the second, one by one.
    All(Val, Val),
}

impl Tiles<'_> {
    /// Those that are known before any row is.
    const fn known(&self) -> Option<&[Val]> {
        match self {
            Self::Some(tiles) => Some(tiles),
            Self::All(..) => None,
        }
    }

    fn each(&self, k: &mut KernelBuilder, body: &mut dyn FnMut(&mut KernelBuilder, &[Val])) {
        match *self {
            Self::Some(tiles) => body(k, tiles),
            Self::All(lo, hi) => k.for_each((lo, hi, 1), |k, tile| body(k, &[tile])),
        }
    }
}

/// What products of `bulk` tokens need.
struct BackBulk {
    classes: Classes,
    mix: Mix,
    /// Scratch for the numbers of a panel's rows.
    numbers: Val,
    /// Tiles that are multiplied together.
    at_once: u64,
    h: Panel,
    s: Panel,
}

impl Back {
    /// Runs `body(first, last)` for the tokens that are decoded.
    fn for_decoded(
        &self,
        k: &mut KernelBuilder,
        bulk: Option<&BackBulk>,
        body: impl FnOnce(&mut KernelBuilder, Val, Val),
    ) {
        match bulk {
            Some(bulk) => bulk.classes.for_runs(k, Class::Decode, body),
            None => {
                let (first, last) = (k.const_i64(0), k.dim(self.sym));
                body(k, first, last);
            }
        }
    }

    /// `out[first..last][tile] = 0`.
    fn clear(&self, k: &mut KernelBuilder, tile: Val, first: Val, last: Val) {
        let (zero, out) = (k.splat_f32(16, 0.0), self.residual.out_param(k));
        k.for_each((first, last, 1), |k, t| store_tile(k, out, self.residual.stride(), tile, t, zero));
    }

    /// Tiles `lo..hi` for the tokens that are decoded: all of them, unless the step may have others. Where rows are rounded, all of these tiles are multiplied with a
    /// row while it is in scratch.
    fn decode(&self, k: &mut KernelBuilder, (lo, hi): (Val, Val), bulk: Option<&BackBulk>) {
        if self.scratch.iter().any(Option::is_some) {
            return self.decode_tiles(k, Tiles::All(lo, hi), bulk);
        }
        for_tiles(k, (lo, hi), (self.tiles, self.tile.row_tiles), |k, tiles| {
            self.decode_tiles(k, Tiles::Some(tiles), bulk);
        });
    }

    fn decode_tiles(&self, k: &mut KernelBuilder, tiles: Tiles<'_>, bulk: Option<&BackBulk>) {
        tiles.each(k, &mut |k, tiles| {
            for &tile in tiles {
                self.for_decoded(k, bulk, |k, first, last| self.clear(k, tile, first, last));
            }
        });
        self.choices.for_experts(k, |k, i, e, run| {
            let known = tiles.known().map(|tiles| self.routed_tiles(k, tiles, i, e));
            let mut body = |k: &mut KernelBuilder, places: &[Val]| {
                let choices: Vec<(Val, Val)> = places.iter().map(|&p| self.choices.at(k, p)).collect();
                let numbers: Vec<Val> = choices.iter().map(|c| c.0).collect();
                let x = self.h.load(k, self.scratch[0], &numbers);
                tiles.each(k, &mut |k, tiles| {
                    let weights = known.clone().unwrap_or_else(|| self.routed_tiles(k, tiles, i, e));
                    for (&tile, products) in tiles.iter().zip(dot(k, &weights, &x)) {
                        for (&(number, t), value) in choices.iter().zip(products) {
                            self.add_routed(k, tile, number, t, value);
                        }
                    }
                });
            };
            match bulk {
                Some(bulk) => {
                    let token = |k: &mut KernelBuilder, place| self.choices.at(k, place).1;
                    bulk.mix.for_decoded(k, run, self.tile.tokens, token, &mut body);
                }
                None => for_rows(k, run, self.tile.tokens, body),
            }
        });
        let (dense, at) = self.dense;
        let known = tiles.known().map(|tiles| dense.tiles_in_turn(k, at, tiles));
        self.for_decoded(k, bulk, |k, first, last| {
            for_rows(k, (first, last), self.tile.tokens, |k, rows| {
                let x = self.s.load(k, self.scratch[1], rows);
                tiles.each(k, &mut |k, tiles| {
                    let weights = known.clone().unwrap_or_else(|| dense.tiles_in_turn(k, at, tiles));
                    for (&tile, products) in tiles.iter().zip(dot(k, &weights, &x)) {
                        for (&t, value) in rows.iter().zip(products) {
                            self.add_shared(k, tile, t, value);
                        }
                    }
                });
            });
        });
    }

    /// The weights of these tiles for the expert `e` at place `i`. The next expert's are read after them; after the last one's the first one's of the
    /// tiles that follow.
    fn routed_tiles(&self, k: &mut KernelBuilder, tiles: &[Val], i: Val, e: Val) -> Vec<Tile> {
        let (matrix, at) = self.routed;
        let (next, is_last) = self.choices.after(k, i);
        let [begin, next] = [e, next].map(|e| k.mul_const(e, self.tiles));
        let beyond = k.add_const(next, tiles.len() as u64);
        let next = k.select(is_last, beyond, next);
        let tile = |&tile| {
            let [own, next] = [begin, next].map(|begin| k.add(begin, tile));
            matrix.tile_before(k, at, own, next)
        };
        tiles.iter().map(tile).collect()
    }

    /// Tiles `lo..hi` for `bulk` tokens.
    fn bulk(&self, k: &mut KernelBuilder, (lo, hi): (Val, Val), bulk: &BackBulk) {
        bulk.classes.for_runs(k, Class::Bulk, |k, first, last| {
            k.for_each((lo, hi, 1), |k, tile| self.clear(k, tile, first, last));
        });
        self.choices.for_experts(k, |k, _, e, run| {
            bulk.h.for_blocks(k, run, |k, first, count| {
                bulk.h.pack(k, &self.h, count, |k, i| {
                    let place = k.add(first, i);
                    let (number, t) = self.choices.at(k, place);
                    bulk.mix.note(k, bulk.numbers, i, number, t);
                    number
                });
                let begin = k.mul_const(e, self.tiles);
                let after = k.add_const(lo, self.tiles);
                let tiles_at = |k: &mut KernelBuilder, tiles: &[Val]| {
                    let numbers: Vec<Val> = tiles.iter().map(|&tile| k.add(begin, tile)).collect();
                    self.routed.0.tiles_at(k, self.routed.1, &numbers)
                };
                let shape = (self.tiles, bulk.at_once);
                for_groups(k, (lo, hi, after), shape, tiles_at, |k, tiles, group| {
                    let ask = |k: &mut KernelBuilder, i, tiles_asked: u64| {
                        Mix::if_noted(k, bulk.numbers, i, |k, number| {
                            let t = k.div_const(number, self.choices.each);
                            self.ask(k, tiles[0], t, tiles_asked);
                        });
                    };
                    let put = |k: &mut KernelBuilder, i, values: &[Val]| {
                        Mix::if_noted(k, bulk.numbers, i, |k, number| {
                            let t = k.div_const(number, self.choices.each);
                            for (&tile, &value) in tiles.iter().zip(values) {
                                self.add_routed(k, tile, number, t, value);
                            }
                        });
                    };
                    bulk.h.products(k, group, count, &mut Asking { ask, put });
                });
            });
        });
        bulk.classes.for_runs(k, Class::Bulk, |k, first, last| {
            bulk.s.emit_tiles(
                k,
                self.dense,
                (&self.s, first, last),
                ((lo, hi), bulk.at_once),
                &mut |k, tile, t, value| {
                    self.add_shared(k, tile, t, value);
                },
            );
        });
    }

    /// Asks for the sums of a token in some tiles: those of other tokens lie so far away that nothing else does.
    fn ask(&self, k: &mut KernelBuilder, tile: Val, t: Val, tiles: u64) {
        let (out, line) = (self.residual.out_param(k), LANES * 4);
        let row = row_ptr(k, out, t, self.residual.stride());
        let (at, bytes) = (k.mul_const(tile, line), k.index(tiles * line));
        k.prefetch(row, at, bytes);
    }

    /// Adds the product of choice `number` of token `t`, times its weight.
    fn add_routed(&self, k: &mut KernelBuilder, tile: Val, number: Val, t: Val, value: Val) {
        let (weights, choice) = (k.param(self.weights), k.rem_const(number, self.choices.each));
        let row = row_ptr(k, weights, t, pad(self.choices.each));
        let weight = k.load_f32(row, choice);
        self.accumulate(k, tile, t, weight, value);
    }

    /// Adds the product of the shared expert, times its gate, and finishes the tile.
    fn add_shared(&self, k: &mut KernelBuilder, tile: Val, t: Val, value: Val) {
        let (shared, zero) = (k.param(self.shared), k.const_i64(0));
        let row = row_ptr(k, shared, t, LANES);
        let weight = k.load_f32(row, zero);
        let sum = self.accumulate(k, tile, t, weight, value);
        self.residual.store(k, tile, t, sum);
    }

    /// `out[t][tile] += weight * value`; gives the new sum.
    fn accumulate(&self, k: &mut KernelBuilder, tile: Val, t: Val, weight: Val, value: Val) -> Val {
        let out = self.residual.out_param(k);
        let row = row_ptr(k, out, t, self.residual.stride());
        let column = k.mul_const(tile, LANES);
        let old = k.load_f32x16(row, column);
        let weight = k.splat(weight, 16);
        let new = k.fma(weight, value, old);
        k.store(row, column, new);
        new
    }
}
