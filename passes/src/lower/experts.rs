//! `experts`: the router with its dispatch, and the two halves of the routed and the shared experts.
//!
//! Tokens are grouped by expert: `order` lists the choices `t·k + s` by expert, `table` holds where each expert's run begins
//! and which experts anybody chose. So a step of any size reads the weights of each chosen expert once, and the same code
//! serves one token and a thousand. Every output has one writer, and a token's experts are summed in ascending order.
//!
//! norm_router      tasks over tiles of router logits; tail: top-k, weights and dispatch of all tokens
//! experts_gate_up  tasks (chosen expert, tiles of its width), then tiles of the shared expert
//! experts_down     tasks over tiles of the residual stream: all experts of all tokens for these rows

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::{LANES, Sym, pad};
use nextc_ir::{DType, Op};

use super::LowerError;
use super::matmul::{
    GROUP_TILES, Matrix, Normed, Residual, Rows, dot, emit_swiglu, for_rows, group_tiles, in_range, row_ptr,
    store_tile, swiglu_rows, tile_range,
};
use super::ports::{Lowered, Port, Ports, Site};

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
    let mut k = ports.builder(site, (router_tasks + 1).into());
    let tile = site.target.matmul_tile();
    let scratch = rows.scratch(&mut k, tile.tokens);
    let (first, last) = (k.const_i64(0), k.dim(sym));
    in_range(&mut k, 0, router_tasks, |k, group| {
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
    in_range(&mut k, router_tasks, router_tasks + 1, |k, _| {
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
    let kernel = k.finish_with_tail(|k| {
        let [weights, ids, order, table, _, logits] = [0, 1, 2, 3, 4, 5].map(|i: usize| k.param(outs[i]));
        let work = k.alloc(DType::F32, pad(experts));
        let cursor = k.alloc(DType::I32, experts + 1);
        let (first, last) = (k.const_i64(0), k.dim(sym));
        k.for_each((first, last, 1), |k, t| choice.top_k(k, t, logits, work, weights, ids));
        choice.dispatch(k, ids, order, table, cursor);
    });
    Ok(ports.finish(kernel))
}

/// The choice of experts for one token after the other.
struct Choice {
    experts: u64,
    k: u64,
    renormalise: bool,
    sym: Sym,
}

impl Choice {
    /// Top-k of one row of logits, the lower index first among equals, and the weights of the chosen.
    fn top_k(&self, k: &mut KernelBuilder, t: Val, logits: Val, work: Val, weights: Val, ids: Val) {
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
            let id = self.first_equal(k, work, best);
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

    /// Index of the first element equal to `best`; the last expert if none is (all NaN).
    fn first_equal(&self, k: &mut KernelBuilder, work: Val, best: Val) -> Val {
        let none = k.const_i32(self.experts as i32 - 1);
        let (lo, hi) = (k.const_i64(0), k.index(self.experts));
        k.for_carry((lo, hi, 1), &[none], |k, back, found| {
            let end = k.index(self.experts - 1);
            let i = k.sub(end, back);
            let x = k.load_f32(work, i);
            let same = k.cmp(Pred::Eq, x, best);
            let index = k.narrow(i);
            vec![k.select(same, index, found[0])]
        })[0]
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

/// `experts_gate_up`.
pub fn lower_experts_gate_up(site: &Site<'_>) -> Result<Lowered, LowerError> {
    debug_assert_eq!(site.op(), Op::ExpertsGateUp);
    let mut ports = Ports::default();
    let rows = Rows::Normed(Normed::ports(site, &mut ports)?);
    let (order, table) = (ports.read("order", site.named("order")), ports.read("table", site.named("table")));
    let shape = site.weight(site.named("w_gate")).shape.clone();
    let (experts, width) = (shape[0], shape[1]);
    let [routed_gate, routed_up, shared_gate, shared_up] =
        ["w_gate", "w_up", "s_gate", "s_up"].map(|n| Matrix::of(site, site.named(n), 1));
    let [gate, up, s_gate, s_up] = ["w_gate", "w_up", "s_gate", "s_up"].map(|n| ports.read(n, site.named(n)));
    let (h, s) = (ports.write("h", site.result(0)), ports.write("s", site.result(1)));
    let (sym, choices) = (site.rows(site.result(0))?, site.inner(site.result(0))[0]);
    let s_stride = site.stride(site.result(1));
    let expert_tiles = pad(width) / LANES;
    let groups = expert_tiles.div_ceil(GROUP_TILES);
    let most = Extent::Const(experts).min(Extent::from(sym) * choices.into());
    let shared_groups = shared_gate.tiles().div_ceil(GROUP_TILES);
    let mut k = ports.builder(site, most.clone() * groups.into() + shared_groups.into());
    let block = swiglu_rows(site.target);
    let scratch = rows.scratch(&mut k, block);
    let layout = Table { experts };

    let (task, tokens) = (k.task(), k.dim(sym));
    let all_choices = k.mul_const(tokens, choices);
    let all_experts = k.index(experts);
    let most = k.min_i64(all_choices, all_experts);
    let routed_tasks = k.mul_const(most, groups);
    let is_routed = k.cmp(Pred::Lt, task, routed_tasks);
    k.if_else(
        is_routed,
        |k| {
            let (place, group) = (k.div_const(task, groups), k.rem_const(task, groups));
            let table = k.param(table);
            let count = layout.count(k, table);
            let chosen = k.cmp(Pred::Lt, place, count);
            k.if_then(chosen, |k| {
                let e = layout.active(k, table, place);
                let run = layout.run(k, table, e);
                let begin = k.mul_const(e, expert_tiles);
                let weights = ((routed_gate, k.param(gate)), (routed_up, k.param(up)));
                let (order, h) = (k.param(order), k.param(h));
                let (lo, hi) = tile_range(k, group, GROUP_TILES, expert_tiles);
                for_rows(k, run, block, |k, places| {
                    let numbers: Vec<Val> = places.iter().map(|&p| k.load_index(order, p)).collect();
                    let tokens: Vec<Val> = numbers.iter().map(|&n| k.div_const(n, choices)).collect();
                    let x = rows.load(k, scratch, &tokens);
                    emit_swiglu(k, weights, (begin, lo, hi), &x, |k, tile, i, value| {
                        store_tile(k, h, pad(width), tile, numbers[i], value);
                    });
                });
            });
            Vec::new()
        },
        |k| {
            let group = k.sub(task, routed_tasks);
            let (lo, hi) = tile_range(k, group, GROUP_TILES, shared_gate.tiles());
            let s = k.param(s);
            let weights = ((shared_gate, k.param(s_gate)), (shared_up, k.param(s_up)));
            let first = k.const_i64(0);
            for_rows(k, (first, tokens), block, |k, block| {
                let x = rows.load(k, scratch, block);
                emit_swiglu(k, weights, (first, lo, hi), &x, |k, tile, i, value| {
                    store_tile(k, s, s_stride, tile, block[i], value);
                });
            });
            Vec::new()
        },
    );
    Ok(ports.finish(k.finish()))
}

/// `experts_down`.
pub fn lower_experts_down(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let (h, s) = (ports.read("h", site.named("h")), ports.read("s", site.named("s")));
    let [weights, order, table, shared] = ["weights", "order", "table", "shared"].map(|n| ports.read(n, site.named(n)));
    let shape = site.weight(site.named("w_down")).shape.clone();
    let (routed, dense) = (Matrix::of(site, site.named("w_down"), 1), Matrix::of(site, site.named("s_down"), 1));
    let (w_down, s_down) = (ports.read("w_down", site.named("w_down")), ports.read("s_down", site.named("s_down")));
    let residual = Residual::ports(site, &mut ports)?;
    let choices = site.inner(site.named("weights"))[0];
    let (sym, h_stride, s_stride) = (site.rows(site.result(0))?, pad(shape[2]), site.stride(site.named("s")));
    let (experts, tiles) = (shape[0], pad(shape[1]) / LANES);
    let size = group_tiles(site.target);
    let mut k = ports.builder(site, tiles.div_ceil(size).into());
    let block = site.target.matmul_tile().tokens;
    // one tile's sums of all tokens: in the tile's own column of `out`, which nobody else touches
    let out = residual.out_param(&k);
    let out_stride = pad(shape[1]);
    let layout = Table { experts };
    let task = k.task();
    let (lo, hi) = tile_range(&mut k, task, size, tiles);
    k.for_each((lo, hi, 1), |k, tile| {
        let zero = k.splat_f32(16, 0.0);
        let (first, tokens) = (k.const_i64(0), k.dim(sym));
        k.for_each((first, tokens, 1), |k, t| store_tile(k, out, out_stride, tile, t, zero));
        let table = k.param(table);
        let count = layout.count(k, table);
        k.for_each((first, count, 1), |k, place| {
            let e = layout.active(k, table, place);
            let run = layout.run(k, table, e);
            let e_tile = k.mul_const(e, tiles);
            let e_tile = k.add(e_tile, tile);
            let base = k.param(w_down);
            let e_tile = routed.tile(k, base, e_tile);
            let (order, h, weights) = (k.param(order), k.param(h), k.param(weights));
            for_rows(k, run, block, |k, places| {
                let numbers: Vec<Val> = places.iter().map(|&p| k.load_index(order, p)).collect();
                let x: Vec<Val> = numbers.iter().map(|&n| row_ptr(k, h, n, h_stride)).collect();
                let products = dot(k, &[e_tile], &x);
                for (&number, &value) in numbers.iter().zip(&products[0]) {
                    let (t, choice) = (k.div_const(number, choices), k.rem_const(number, choices));
                    let row = row_ptr(k, weights, t, pad(choices));
                    let weight = k.load_f32(row, choice);
                    accumulate(k, (out, out_stride), tile, t, weight, value);
                }
            });
        });
        let (s, shared, base) = (k.param(s), k.param(shared), k.param(s_down));
        let dense_tile = dense.tile(k, base, tile);
        for_rows(k, (first, tokens), block, |k, rows| {
            let x: Vec<Val> = rows.iter().map(|&t| row_ptr(k, s, t, s_stride)).collect();
            let products = dot(k, &[dense_tile], &x);
            for (&t, &value) in rows.iter().zip(&products[0]) {
                let zero = k.const_i64(0);
                let row = row_ptr(k, shared, t, LANES);
                let weight = k.load_f32(row, zero);
                let sum = accumulate(k, (out, out_stride), tile, t, weight, value);
                residual.store(k, tile, t, sum);
            }
        });
    });
    Ok(ports.finish(k.finish()))
}

/// `out[t][tile] += weight * value`; gives the new sum.
fn accumulate(k: &mut KernelBuilder, (out, stride): (Val, u64), tile: Val, t: Val, weight: Val, value: Val) -> Val {
    let row = row_ptr(k, out, t, stride);
    let column = k.mul_const(tile, LANES);
    let old = k.load_f32x16(row, column);
    let weight = k.splat(weight, 16);
    let new = k.fma(weight, value, old);
    k.store(row, column, new);
    new
}
