//! `experts` on a GPU: the router with its dispatch, and the two halves of the routed and the shared experts.
//!
//! Of few tokens:
//!
//! norm_router      blocks over tiles of router logits; tail, one block: a warp a token chooses, then a thread an expert counts and lists
//! experts_gate_up  blocks (chosen expert, tile of its width), then tiles of the shared expert
//! experts_down     a block a tile of the residual stream: its warps take the chosen experts in turn, sums of a token in the order of its choices
//!
//! Of some tokens the same, in several goes; of many tokens, see [`super::many_experts`].
//!
//! What is dispatched, and how, says [`super::super::experts`].

use nextc_ir::DType;
use nextc_ir::kernel::{Kernel, KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::{LANES, Sym, pad};

use super::super::LowerError;
use super::super::experts::{Choices, Table};
use super::super::matmul::{Normed, Residual, Rows, in_range, row_ptr};
use super::super::ports::{Lowered, Port, Ports, Site};
use super::many::{FEW_ROWS, TILES, few, few_rows, some, some_tokens};
use super::many_experts;
use super::matmul::{
    At, Run, ask_ahead, load_row, pair_split, products, products_of_all, products_of_some, store_one, store_residual,
    swiglu,
};
use super::tile::{Fragments, Product, Split, TOKENS};
use super::{Place, begin, warp_sum};

/// `norm_router`.
pub fn lower_norm_router(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let rows = Rows::Normed(Normed::ports(site, &mut ports)?);
    let (router, gate) = (site.named("router"), site.named("shared_gate"));
    let (router_matrix, gate_matrix) = (Fragments::of(site, router, 1)?, Fragments::of(site, gate, 1)?);
    let experts = site.weight(router).shape[0];
    let (router, gate) = (ports.read("router", router), ports.read("shared_gate", gate));
    let names = ["weights", "ids", "order", "table", "shared", "logits"];
    let outs: Vec<Port> = (0..6).map(|i| ports.write(names[i as usize], site.result(i))).collect();
    let sym = site.rows(site.result(0))?;
    let tiles = router_matrix.planes.tiles();
    let split = Split { tiles: 1, ..Split::of(site.target, tiles, &router_matrix.planes) };
    let most = few_rows(site.target, tiles.div_ceil(TILES) + 1);
    let mut k = ports.builder(site, few(sym, most, (tiles + 1).into()));
    k.threads(split.threads());
    let shared = split.shared(&mut k);
    let (place, count) = (Place::here(&mut k), k.dim(sym));
    let block = |k: &mut KernelBuilder, fragments: &Fragments, weight: Port, tile: Val, is_gate: bool| {
        let base = k.param(weight);
        let tiles = vec![fragments.own_tile(k, base, tile)];
        let product = Product::new(k, fragments, tiles, place, split.warps).precise();
        let ahead = ask_ahead(k, &product);
        begin(k);
        let out = k.param(outs[if is_gate { 4 } else { 5 }]);
        let stride = if is_gate { LANES } else { pad(experts) };
        products_of_all(k, split, (&product, ahead, shared), &rows, count, &mut |k, at, sum| {
            let value = if is_gate { k.sigmoid(sum.values[0]) } else { sum.values[0] };
            k.if_then(at.exists, |k| store_one(k, (out, stride), at.token, tile, sum.row, value));
        });
    };
    in_range(&mut k, 0, tiles, |k, tile| block(k, &router_matrix, router, tile, false));
    in_range(&mut k, tiles, tiles + 1, |k, tile| block(k, &gate_matrix, gate, tile, true));
    let chosen = site.int("k");
    if chosen > 32 {
        return Err(site.error(format!("{chosen} experts a token, expected at most 32")));
    }
    let choice = Choice {
        experts,
        k: chosen,
        renormalise: site.int("renormalise") != 0,
        threads: u64::from(split.threads()),
        tokens: count,
    };
    let few = k.finish_with_tail_grid(few(sym, FEW_ROWS, 1.into()), |k| choice.emit(k, &outs));
    let router = many_experts::Router { rows: &rows, matrices: [(router_matrix, router), (gate_matrix, gate)], split };
    let many = router.kernels(site, &ports, &outs, (sym, &choice));
    Ok(ports.finish(few).then(many))
}

/// The tail of the router: choice of experts, and their dispatch.
#[derive(Clone, Copy)]
pub struct Choice {
    /// All experts.
    pub experts: u64,
    /// Those of a token.
    pub k: u64,
    /// Whether the weights of a token add up to 1.
    pub renormalise: bool,
    /// Threads of the block.
    pub threads: u64,
    /// Tokens of the step.
    pub tokens: Val,
}

impl Choice {
    /// Chooses for each of few tokens, and lists their choices.
    fn emit(&self, k: &mut KernelBuilder, outs: &[Port]) {
        let most = FEW_ROWS * self.k;
        let listed = Listed { ids: k.shared(DType::I32, most), firsts: k.shared(DType::I32, most) };
        let place = Place::here(k);
        begin(k);
        let [weights, ids, order, table, _, logits] = [0, 1, 2, 3, 4, 5].map(|i: usize| k.param(outs[i]));
        k.for_each((place.warp, self.tokens, self.threads / 32), |k, t| {
            let chosen = self.choose(k, place, t, (logits, weights, ids));
            k.if_then(chosen.exists, |k| {
                let at = k.mul_const(t, self.k);
                let at = k.add(at, place.lane);
                k.store(listed.ids, at, chosen.id);
            });
        });
        k.barrier();
        self.list(k, place.thread, (order, table), &listed);
    }

    /// Lists few choices by expert: each finds its place by comparing itself with all others, and so does each expert.
    fn list(&self, k: &mut KernelBuilder, thread: Val, (order, table): (Val, Val), listed: &Listed) {
        let (start, choices) = (k.const_i64(0), k.mul_const(self.tokens, self.k));
        let (none, one) = (k.const_i32(0), k.const_i32(1));
        let count = |k: &mut KernelBuilder, counts: Val, sum: Val| {
            let more = k.select(counts, one, none);
            k.add(sum, more)
        };
        k.for_each((thread, choices, self.threads), |k, c| {
            let id = k.load(DType::I32, 1, listed.ids, c);
            let found = k.for_carry((start, choices, 1), &[none, none], |k, i, found| {
                let other = k.load(DType::I32, 1, listed.ids, i);
                let (less, same, before) =
                    (k.cmp(Pred::Lt, other, id), k.cmp(Pred::Eq, other, id), k.cmp(Pred::Lt, i, c));
                let earlier = k.and(same, before);
                vec![count(k, less, found[0]), count(k, earlier, found[1])]
            });
            let at = k.add(found[0], found[1]);
            let (at, number) = (k.widen(at), k.narrow(c));
            k.store(order, at, number);
            let is_first = k.cmp(Pred::Eq, found[1], none);
            let is_first = k.select(is_first, one, none);
            k.store(listed.firsts, c, is_first);
        });
        k.barrier();
        for slot in 0..self.slots() {
            let e = k.add_const(thread, slot * self.threads);
            let e32 = k.narrow(e);
            // choices of experts before this one, and of this one; experts before this one that were chosen, and all
            let found = k.for_carry((start, choices, 1), &[none; 4], |k, i, found| {
                let (id, first) = (k.load(DType::I32, 1, listed.ids, i), k.load(DType::I32, 1, listed.firsts, i));
                let (less, same) = (k.cmp(Pred::Lt, id, e32), k.cmp(Pred::Eq, id, e32));
                let active = k.select(less, first, none);
                vec![
                    count(k, less, found[0]),
                    count(k, same, found[1]),
                    k.add(found[2], active),
                    k.add(found[3], first),
                ]
            });
            let (end, last) = (k.index(self.experts), k.index(self.experts - 1));
            let exists = k.cmp(Pred::Lt, e, end);
            k.if_then(exists, |k| {
                let run_end = k.add(found[0], found[1]);
                let active = k.add(found[2], one);
                self.enter(k, table, (e, e32, last), (found[0], run_end, found[1]), (active, found[3]));
            });
        }
    }

    /// Experts that one thread counts.
    pub const fn slots(&self) -> u64 {
        self.experts.div_ceil(self.threads)
    }

    /// Logits that one lane holds.
    const fn held(&self) -> u64 {
        self.experts.div_ceil(32)
    }

    /// The experts of token `t`: the largest logits in descending order, the lower index first among equals.
    pub fn choose(
        &self,
        k: &mut KernelBuilder,
        place: Place,
        t: Val,
        (logits, weights, ids): (Val, Val, Val),
    ) -> Chosen {
        let logits = row_ptr(k, logits, t, pad(self.experts));
        let lowest = k.const_f32(f32::NEG_INFINITY);
        let numbers: Vec<Val> = (0..self.held()).map(|i| k.add_const(place.lane, 32 * i)).collect();
        let held: Vec<Val> = numbers
            .iter()
            .map(|&e| {
                let end = k.index(self.experts);
                let exists = k.cmp(Pred::Lt, e, end);
                let x = k.if_else(exists, |k| vec![k.load_f32(logits, e)], |_| vec![lowest])[0];
                // NaN is no larger than anything
                k.fmax(x, lowest)
            })
            .collect();
        let (largest, _) = self.best(k, &held, &numbers);
        let zero = k.const_f32(0.0);
        let own_id = k.const_i32(0);
        let init: Vec<Val> = [zero, own_id, zero].into_iter().chain(held.iter().copied()).collect();
        let (lo, hi) = (k.const_i64(0), k.index(self.k));
        let carried = k.for_carry((lo, hi, 1), &init, |k, s, carried| {
            let (own, held) = carried.split_at(3);
            let (best, id) = self.best(k, held, &numbers);
            let shifted = k.fsub(best, largest);
            let weight = k.exp(shifted);
            let mine = k.cmp(Pred::Eq, place.lane, s);
            let sum = k.fadd(own[2], weight);
            let mut next = vec![k.select(mine, weight, own[0]), k.select(mine, id, own[1]), sum];
            for (&x, &e) in held.iter().zip(&numbers) {
                let e = k.narrow(e);
                let gone = k.cmp(Pred::Eq, e, id);
                next.push(k.select(gone, lowest, x));
            }
            next
        });
        let divisor = if self.renormalise { carried[2] } else { self.sum_exp(k, &held, largest) };
        let weight = k.fdiv(carried[0], divisor);
        let end = k.index(self.k);
        let chooses = k.cmp(Pred::Lt, place.lane, end);
        k.if_then(chooses, |k| {
            let (weights, ids) = (row_ptr(k, weights, t, pad(self.k)), row_ptr(k, ids, t, pad(self.k)));
            k.store(weights, place.lane, weight);
            k.store(ids, place.lane, carried[1]);
        });
        Chosen { exists: chooses, id: carried[1] }
    }

    /// The largest of the warp's numbers and its expert, in all lanes; the last expert if there is none (all NaN).
    fn best(&self, k: &mut KernelBuilder, held: &[Val], numbers: &[Val]) -> (Val, Val) {
        let (lowest, last) = (k.const_f32(f32::NEG_INFINITY), k.const_i32(self.experts as i32 - 1));
        let mut found: Vec<(Val, Val)> = held.iter().zip(numbers).map(|(&x, &e)| (x, k.narrow(e))).collect();
        while found.len() > 1 {
            // the later one of a pair has the higher number: it must be larger
            let join = |pair: &[(Val, Val)]| match *pair {
                [(x, e), (y, f)] => {
                    let larger = k.cmp(Pred::Gt, y, x);
                    (k.select(larger, y, x), k.select(larger, f, e))
                }
                _ => pair[0],
            };
            found = found.chunks(2).map(join).collect();
        }
        let (own, id) = found[0];
        let key = ordered(k, own);
        let best = k.warp_max(key);
        let is_best = k.cmp(Pred::Eq, key, best);
        let id = k.select(is_best, id, last);
        let id = k.warp_min(id);
        let lowest = ordered(k, lowest);
        let some = k.cmp(Pred::Gt, best, lowest);
        (unordered(k, best), k.select(some, id, last))
    }

    fn sum_exp(&self, k: &mut KernelBuilder, held: &[Val], largest: Val) -> Val {
        let mut sum = k.const_f32(0.0);
        for &x in held {
            let shifted = k.fsub(x, largest);
            let e = k.exp(shifted);
            sum = k.fadd(sum, e);
        }
        warp_sum(k, sum)
    }

    /// Enters the thread's experts into the table, where `enters` says so; gives where each one's run begins.
    pub fn enter_all(
        &self,
        k: &mut KernelBuilder,
        table: Val,
        (own, counts): (&[Val], &[Val]),
        scan: [Val; 4],
        enters: Val,
    ) -> Vec<Val> {
        let (zero, one) = (k.const_i32(0), k.const_i32(1));
        for (&e, &count) in own.iter().zip(counts) {
            let some = k.cmp(Pred::Gt, count, zero);
            let some = k.select(some, one, zero);
            k.store(scan[0], e, count);
            k.store(scan[1], e, some);
        }
        let [starts, actives] = self.prefix_sums(k, own, scan);
        let experts = k.index(self.experts);
        let last = k.index(self.experts - 1);
        let active_count = k.load(DType::I32, 1, actives, last);
        let mut cursors = Vec::new();
        for (&e, &count) in own.iter().zip(counts) {
            let (end, active) = (k.load(DType::I32, 1, starts, e), k.load(DType::I32, 1, actives, e));
            let start = k.sub(end, count);
            let exists = k.cmp(Pred::Lt, e, experts);
            let exists = k.and(exists, enters);
            let e32 = k.narrow(e);
            k.if_then(exists, |k| {
                self.enter(k, table, (e, e32, last), (start, end, count), (active, active_count));
            });
            cursors.push(start);
        }
        cursors
    }

    /// Enters expert `e` into the table: where its run begins, and its place among those that anybody chose.
    fn enter(
        &self,
        k: &mut KernelBuilder,
        table: Val,
        (e, e32, last): (Val, Val, Val),
        (start, end, count): (Val, Val, Val),
        (active, active_count): (Val, Val),
    ) {
        k.store(table, e, start);
        let zero = k.const_i32(0);
        let chosen = k.cmp(Pred::Gt, count, zero);
        k.if_then(chosen, |k| {
            let at = k.widen(active);
            let at = k.add_const(at, self.experts + 1);
            k.store(table, at, e32);
        });
        let beyond = k.cmp(Pred::Ge, e32, active_count);
        k.if_then(beyond, |k| {
            let (at, missing) = (k.add_const(e, self.experts + 2), k.const_i32(-1));
            k.store(table, at, missing);
        });
        let is_last = k.cmp(Pred::Eq, e, last);
        k.if_then(is_last, |k| {
            let at = k.index(self.experts);
            k.store(table, at, end);
            let at = k.index(self.experts + 1);
            k.store(table, at, active_count);
        });
    }

    /// Inclusive sums over the experts of both arrays; `scan` holds them, and room for two more.
    fn prefix_sums(&self, k: &mut KernelBuilder, own: &[Val], scan: [Val; 4]) -> [Val; 2] {
        let (mut from, mut to) = ([scan[0], scan[1]], [scan[2], scan[3]]);
        let mut distance = 1;
        k.barrier();
        while distance < self.experts {
            let by = k.index(distance);
            for &e in own {
                let far = k.cmp(Pred::Ge, e, by);
                for (&from, &to) in from.iter().zip(&to) {
                    let x = k.load(DType::I32, 1, from, e);
                    let zero = k.const_i32(0);
                    let other = k.if_else(
                        far,
                        |k| {
                            let at = k.sub(e, by);
                            vec![k.load(DType::I32, 1, from, at)]
                        },
                        |_| vec![zero],
                    )[0];
                    let sum = k.add(x, other);
                    k.store(to, e, sum);
                }
            }
            k.barrier();
            std::mem::swap(&mut from, &mut to);
            distance *= 2;
        }
        from
    }
}

/// What a lane has chosen for its token.
pub struct Chosen {
    /// Whether it has chosen one.
    pub exists: Val,
    /// The expert.
    pub id: Val,
}

/// The choices of few tokens, in shared memory.
struct Listed {
    /// The expert of each.
    ids: Val,
    /// 1 for each that is the first of its expert.
    firsts: Val,
}

/// A float, no NaN, as an integer that compares as it does.
fn ordered(k: &mut KernelBuilder, x: Val) -> Val {
    // so that both zeros are one
    let zero = k.const_f32(0.0);
    let x = k.fadd(x, zero);
    let bits = k.bitcast(x, DType::I32);
    flip_negative(k, bits)
}

/// The float of [`ordered`].
fn unordered(k: &mut KernelBuilder, bits: Val) -> Val {
    let bits = flip_negative(k, bits);
    k.bitcast(bits, DType::F32)
}

fn flip_negative(k: &mut KernelBuilder, bits: Val) -> Val {
    let (sign, magnitude) = (k.const_i32(31), k.const_i32(i32::MAX));
    let sign = k.sshr(bits, sign);
    let flips = k.and(sign, magnitude);
    k.xor(bits, flips)
}

/// `experts_gate_up`.
pub fn lower_experts_gate_up(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let rows = Rows::Normed(Normed::ports(site, &mut ports)?);
    let (order, table) = (ports.read("order", site.named("order")), ports.read("table", site.named("table")));
    let shape = site.weight(site.named("w_gate")).shape.clone();
    let (experts, width) = (shape[0], shape[1]);
    let of = |name: &str| Fragments::of(site, site.named(name), 1);
    let (routed, dense) = (of("w_gate")?, of("s_gate")?);
    if [of("w_up")?.planes.format, of("s_up")?.planes.format] != [routed.planes.format, dense.planes.format] {
        return Err(site.error("gate and up projections in different formats"));
    }
    let [gate, up, s_gate, s_up] = ["w_gate", "w_up", "s_gate", "s_up"].map(|n| ports.read(n, site.named(n)));
    let (h, s) = (ports.write("h", site.result(0)), ports.write("s", site.result(1)));
    let (sym, choices) = (site.rows(site.result(0))?, site.inner(site.result(0))[0]);
    let s_stride = site.stride(site.result(1));
    let (expert_tiles, shared_tiles) = (pad(width) / LANES, dense.planes.tiles());
    let most = Extent::Const(experts).min(Extent::from(sym) * choices.into());
    let (split, some_most) = (pair_split(site, &routed), some_tokens(experts, choices));
    let of = |part: &str, grid: Extent, products: Run| {
        let mut k = ports.builder_of(site, part, grid);
        k.threads(split.threads());
        let shared = split.shared(&mut k);
        let (place, tokens, layout) = (Place::here(&mut k), k.dim(sym), Table { experts });
        let (task, shared_end) = (k.task(), k.index(shared_tiles));
        let is_shared = k.cmp(Pred::Lt, task, shared_end);
        k.if_else(
            is_shared,
            |k| {
                let tiles = [s_gate, s_up].map(|w| {
                    let base = k.param(w);
                    dense.own_tile(k, base, task)
                });
                let product = Product::new(k, &dense, tiles.to_vec(), place, split.warps);
                let ahead = ask_ahead(k, &product);
                begin(k);
                let out = k.param(s);
                products(k, split, (&product, ahead, shared), &rows, tokens, &mut |_, t| t, &mut |k, at, sum| {
                    let value = swiglu(k, sum);
                    k.if_then(at.exists, |k| store_one(k, (out, s_stride), at.token, task, sum.row, value));
                });
                Vec::new()
            },
            |k| {
                begin(k);
                let number = k.sub(task, shared_end);
                let (at, tile) = (k.div_const(number, expert_tiles), k.rem_const(number, expert_tiles));
                let table = k.param(table);
                let (e, none) = (layout.active(k, table, at), k.const_i64(0));
                let chosen = k.cmp(Pred::Ge, e, none);
                k.if_then(chosen, |k| {
                    let (first, end) = layout.run(k, table, e);
                    let base = k.mul_const(e, expert_tiles);
                    let weight_tile = k.add(base, tile);
                    let tiles = [gate, up].map(|w| {
                        let base = k.param(w);
                        routed.own_tile(k, base, weight_tile)
                    });
                    let product = Product::new(k, &routed, tiles.to_vec(), place, split.warps);
                    let ahead = product.ahead(k);
                    let (order, h, count) = (k.param(order), k.param(h), k.sub(end, first));
                    let choice = |k: &mut KernelBuilder, i: Val| {
                        let at = k.add(first, i);
                        k.load_index(order, at)
                    };
                    let mut row_of = |k: &mut KernelBuilder, i: Val| {
                        let number = choice(k, i);
                        k.div_const(number, choices)
                    };
                    products(k, split, (&product, ahead, shared), &rows, count, &mut row_of, &mut |k, at, sum| {
                        let value = swiglu(k, sum);
                        k.if_then(at.exists, |k| {
                            let number = choice(k, at.token);
                            store_one(k, (h, pad(width)), number, tile, sum.row, value);
                        });
                    });
                });
                Vec::new()
            },
        );
        k.finish()
    };
    let grid = Extent::from(shared_tiles) + most * expert_tiles.into();
    let kernels = [
        of("", few(sym, FEW_ROWS, grid.clone()), products),
        of(".some", some(sym, (FEW_ROWS, some_most), grid), products_of_some),
    ];
    let many = many_experts::GateUp {
        rows: &rows,
        routed: (routed, [gate, up]),
        dense: (dense, [s_gate, s_up]),
        split,
        choices: Choices { order, table, layout: Table { experts }, each: choices },
        width,
        outs: [(h, pad(width)), (s, s_stride)],
    };
    let many = ports.clone().finish(many.kernel(site, &ports, (sym, some_most)));
    let [few, some] = kernels.map(|kernel| ports.clone().finish(kernel));
    Ok(few.then(some).then(many))
}

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
        let place = Place::here(&mut k);
        let (tile, base) = (k.task(), k.param(self.s_down));
        let dense = self.dense.own_tile(&mut k, base, tile);
        let zero = k.const_i64(0);
        let leads = k.cmp(Pred::Eq, place.thread, zero);
        k.if_then(leads, |k| self.dense.prefetch(k, dense));
        begin(&mut k);
        let count = k.dim(sym);
        let work = |k: &mut KernelBuilder, first: Val, tokens: Val| {
            let part = Part { first, tokens, at_once, sums };
            self.products(k, place, dense, &part);
            k.barrier();
            self.combine(k, place, &part);
        };
        if at_once == FEW_ROWS {
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
    fn products(&self, k: &mut KernelBuilder, place: Place, dense: super::tile::Tile, part: &Part) {
        let (zero, one, experts) = (k.const_i64(0), k.const_i64(1), k.index(self.choices.layout.experts));
        let groups = part.at_once / TOKENS;
        let most = k.mul_const(k.dim(Sym::T), self.choices.each);
        let most = k.min_i64(most, experts);
        let units = k.add_const(most, groups);
        k.for_each((place.warp, units, DOWN_WARPS), |k, unit| {
            let end = k.index(groups);
            let is_shared = k.cmp(Pred::Lt, unit, end);
            k.if_else(
                is_shared,
                |k| {
                    let begin = k.mul_const(unit, TOKENS);
                    let some = k.cmp(Pred::Lt, begin, part.tokens);
                    k.if_then(some, |k| {
                        let product = Product::new(k, &self.dense, vec![dense], place, 1);
                        let ahead = product.ahead(k);
                        let last = k.sub(part.tokens, one);
                        let token = k.add(begin, product.token());
                        let token = k.min_i64(token, last);
                        let token = k.add(part.first, token);
                        let x = load_row(k, &self.s, token, product.q());
                        let result = product.run(k, x, ahead)[0];
                        let routed_sums = k.index(part.at_once * self.choices.each);
                        let range = (begin, part.tokens);
                        self.keep(k, &product, result, range, part.sums, &mut |k, i| k.add(routed_sums, i));
                    });
                    Vec::new()
                },
                |k| {
                    let number = k.sub(unit, end);
                    let table = k.param(self.choices.table);
                    let e = self.choices.layout.active(k, table, number);
                    let chosen = k.cmp(Pred::Ge, e, zero);
                    k.if_then(chosen, |k| self.routed(k, place, e, part));
                    Vec::new()
                },
            );
        });
    }

    /// The products of chosen expert `e` with those of its tokens that are in the part.
    fn routed(&self, k: &mut KernelBuilder, place: Place, e: Val, part: &Part) {
        let (table, order, base, tile) =
            (k.param(self.choices.table), k.param(self.choices.order), k.param(self.w_down), k.task());
        let own = k.mul_const(e, self.tiles);
        let own = k.add(own, tile);
        let weight = self.routed.own_tile(k, base, own);
        let product = Product::new(k, &self.routed, vec![weight], place, 1);
        let (begin, end) = self.choices.layout.run(k, table, e);
        let first_choice = k.mul_const(part.first, self.choices.each);
        let eight = |k: &mut KernelBuilder, from: Val, end: Val| {
            let ahead = product.ahead(k);
            let one = k.const_i64(1);
            let last = k.sub(end, one);
            let choice = |k: &mut KernelBuilder, at: Val| {
                let at = k.min_i64(at, last);
                k.load_index(order, at)
            };
            let at = k.add(from, product.token());
            let number = choice(k, at);
            let x = load_row(k, &self.h, number, product.q());
            let result = product.run(k, x, ahead)[0];
            self.keep(k, &product, result, (from, end), part.sums, &mut |k, at| {
                let number = choice(k, at);
                k.sub(number, first_choice)
            });
        };
        if part.at_once == FEW_ROWS {
            eight(k, begin, end);
            return;
        }
        let end_token = k.add(part.first, part.tokens);
        let end_choice = k.mul_const(end_token, self.choices.each);
        let range = [first_choice, end_choice].map(|choice| lower_bound(k, order, (begin, end), choice));
        k.for_each((range[0], range[1], TOKENS), |k, from| eight(k, from, range[1]));
    }

    /// Puts the sums of a product where `combine` finds them: `place` gives the number of token `at`, which counts from `first` and is less than `end`.
    fn keep(
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
            let sum = self.weighted(k, token, (part.sums, base, LANES), (part.sums, at));
            store_residual(k, &self.residual, tile, &At { token, exists }, row, sum);
        });
    }

    /// `Σ weight · sum + shared · sum` of one row of a token: the sums of its choices begin at an element and lie so many apart; then where that of
    /// the shared expert lies.
    pub fn weighted(
        &self,
        k: &mut KernelBuilder,
        token: Val,
        (sums, base, stride): (Val, Val, u64),
        (shared_sums, at): (Val, Val),
    ) -> Val {
        let (weights, shared) = (k.param(self.weights), k.param(self.shared));
        let weights = row_ptr(k, weights, token, pad(self.choices.each));
        let (zero, nothing, choices) = (k.const_i64(0), k.const_f32(0.0), k.index(self.choices.each));
        let routed = k.for_carry((zero, choices, 1), &[nothing], |k, s, sum| {
            let at = k.mul_const(s, stride);
            let at = k.add(base, at);
            let (weight, x) = (k.load_f32(weights, s), k.load_f32(sums, at));
            vec![k.fma(weight, x, sum[0])]
        })[0];
        let shared = row_ptr(k, shared, token, LANES);
        let (weight, x) = (k.load_f32(shared, zero), k.load_f32(shared_sums, at));
        k.fma(weight, x, routed)
    }
}

/// Tokens of a step whose products lie in shared memory at once.
struct Part {
    first: Val,
    tokens: Val,
    /// At most so many.
    at_once: u64,
    /// `[at_once][choices][16]`, then `[at_once][16]` of the shared expert.
    sums: Val,
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
