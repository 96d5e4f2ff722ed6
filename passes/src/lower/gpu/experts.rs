//! `experts` on a GPU: the router with its dispatch, and the two halves of the routed and the shared experts.
//!
//! norm_router      blocks over tiles of router logits; tail, one block: a warp a token chooses, then a thread an expert counts and lists
//! experts_gate_up  blocks (chosen expert, tile of its width), then tiles of the shared expert
//! experts_down     a block a tile of the residual stream: its warps take the chosen experts in turn, sums of a token in the order of its choices
//!
//! What is dispatched, and how, says [`super::super::experts`].

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::{LANES, pad};

use super::super::LowerError;
use super::super::experts::Table;
use super::super::matmul::{Normed, Residual, Rows, in_range, row_ptr};
use super::super::ports::{Lowered, Port, Ports, Site};
use super::matmul::{Block, ask_ahead, load_row, pair_split, products, store_one, store_residual, swiglu};
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
    let mut k = ports.builder(site, (tiles + 1).into());
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
        products(k, split, (&product, ahead, shared), &rows, count, &mut |_, token| token, &mut |k, at, sum| {
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
    Ok(ports.finish(k.finish_with_tail(|k| choice.emit(k, &outs))))
}

/// The tail of the router: choice of experts, and their dispatch.
struct Choice {
    experts: u64,
    k: u64,
    renormalise: bool,
    threads: u64,
    tokens: Val,
}

/// Choices that lie in shared memory at once.
const CHUNK: u64 = 4096;

impl Choice {
    fn emit(&self, k: &mut KernelBuilder, outs: &[Port]) {
        let scan: [Val; 4] = std::array::from_fn(|_| k.shared(DType::I32, self.slots() * self.threads));
        let ids_near = k.shared(DType::I32, CHUNK);
        let place = Place::here(k);
        begin(k);
        let [weights, ids, order, table, _, logits] = [0, 1, 2, 3, 4, 5].map(|i: usize| k.param(outs[i]));
        k.for_each((place.warp, self.tokens, self.threads / 32), |k, t| {
            self.choose(k, place, t, (logits, weights, ids));
        });
        k.barrier();
        self.dispatch(k, place.thread, (ids, order, table), ids_near, scan);
    }

    /// Experts that one thread counts.
    const fn slots(&self) -> u64 {
        self.experts.div_ceil(self.threads)
    }

    /// Logits that one lane holds.
    const fn held(&self) -> u64 {
        self.experts.div_ceil(32)
    }

    /// The experts of token `t`: the largest logits in descending order, the lower index first among equals.
    fn choose(&self, k: &mut KernelBuilder, place: Place, t: Val, (logits, weights, ids): (Val, Val, Val)) {
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
        let some = k.cmp(Pred::Gt, found[0].0, lowest);
        let (mut best, mut id) = (found[0].0, k.select(some, found[0].1, last));
        for mask in [16, 8, 4, 2, 1] {
            let (x, e) = (k.shuffle_xor(best, mask), k.shuffle_xor(id, mask));
            let (larger, same, lower) = (k.cmp(Pred::Gt, x, best), k.cmp(Pred::Eq, x, best), k.cmp(Pred::Lt, e, id));
            let earlier = k.and(same, lower);
            let better = k.or(larger, earlier);
            (best, id) = (k.select(better, x, best), k.select(better, e, id));
        }
        (best, id)
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

    /// Counting sort of all choices by expert: each thread counts and lists its own experts.
    fn dispatch(
        &self,
        k: &mut KernelBuilder,
        thread: Val,
        (ids, order, table): (Val, Val, Val),
        near: Val,
        scan: [Val; 4],
    ) {
        let own: Vec<Val> = (0..self.slots()).map(|i| k.add_const(thread, i * self.threads)).collect();
        let own32: Vec<Val> = own.iter().map(|&e| k.narrow(e)).collect();
        let (zero, one) = (k.const_i32(0), k.const_i32(1));
        let counts = self.for_choices(k, thread, ids, near, vec![zero; own.len()], |k, _, id, counts| {
            let add = |(&e, &count): (&Val, &Val)| {
                let mine = k.cmp(Pred::Eq, id, e);
                let more = k.add(count, one);
                k.select(mine, more, count)
            };
            own32.iter().zip(counts).map(add).collect()
        });
        for (&e, &count) in own.iter().zip(&counts) {
            let some = k.cmp(Pred::Gt, count, zero);
            let some = k.select(some, one, zero);
            k.store(scan[0], e, count);
            k.store(scan[1], e, some);
        }
        let [starts, actives] = self.prefix_sums(k, &own, scan);
        let experts = k.index(self.experts);
        let last = k.index(self.experts - 1);
        let active_count = k.load(DType::I32, 1, actives, last);
        let mut cursors = Vec::new();
        for (i, (&e, &count)) in own.iter().zip(&counts).enumerate() {
            let (end, active) = (k.load(DType::I32, 1, starts, e), k.load(DType::I32, 1, actives, e));
            let start = k.sub(end, count);
            let exists = k.cmp(Pred::Lt, e, experts);
            k.if_then(exists, |k| {
                self.enter(k, table, (e, own32[i], last), (start, end, count), (active, active_count))
            });
            cursors.push(start);
        }
        self.for_choices(k, thread, ids, near, cursors, |k, number, id, cursors| {
            let list = |(&e, &cursor): (&Val, &Val)| {
                let mine = k.cmp(Pred::Eq, id, e);
                k.if_then(mine, |k| {
                    let (at, number) = (k.widen(cursor), k.narrow(number));
                    k.store(order, at, number);
                });
                let more = k.add(cursor, one);
                k.select(mine, more, cursor)
            };
            own32.iter().zip(cursors).map(list).collect()
        });
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

    /// Runs `body(number, expert, carried)` for every choice, in order, in every thread; choices come through shared memory.
    fn for_choices(
        &self,
        k: &mut KernelBuilder,
        thread: Val,
        ids: Val,
        near: Val,
        init: Vec<Val>,
        mut body: impl FnMut(&mut KernelBuilder, Val, Val, &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let (zero, choices) = (k.const_i64(0), k.mul_const(self.tokens, self.k));
        k.for_carry((zero, choices, CHUNK), &init, |k, first, carried| {
            let (left, most) = (k.sub(choices, first), k.index(CHUNK));
            let count = k.min_i64(left, most);
            k.barrier();
            k.for_each((thread, count, self.threads), |k, i| {
                let number = k.add(first, i);
                let (t, s) = (k.div_const(number, self.k), k.rem_const(number, self.k));
                let row = row_ptr(k, ids, t, pad(self.k));
                let id = k.load(DType::I32, 1, row, s);
                k.store(near, i, id);
            });
            k.barrier();
            k.for_carry((zero, count, 1), carried, |k, i, carried| {
                let number = k.add(first, i);
                let id = k.load(DType::I32, 1, near, i);
                body(k, number, id, carried)
            })
        })
    }
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
    let split = pair_split(site, &routed);
    let mut k = ports.builder(site, Extent::from(shared_tiles) + most * expert_tiles.into());
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
            let active = layout.count(k, table);
            let chosen = k.cmp(Pred::Lt, at, active);
            k.if_then(chosen, |k| {
                let e = layout.active(k, table, at);
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
    Ok(ports.finish(k.finish()))
}

/// Warps of a block of `experts_down`.
const DOWN_WARPS: u64 = 12;
/// Tokens whose sums lie in shared memory at once, if they have ten choices each.
const DOWN_TOKENS: u64 = 64;

/// `experts_down` and what it is connected to.
struct Down {
    routed: Fragments,
    dense: Fragments,
    w_down: Port,
    s_down: Port,
    h: Rows,
    s: Rows,
    weights: Port,
    order: Port,
    table: Port,
    shared: Port,
    residual: Residual,
    layout: Table,
    choices: u64,
    /// Tiles of an expert.
    tiles: u64,
    /// Tokens whose sums lie in shared memory at once.
    tokens: u64,
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
        order: read(&mut ports, "order"),
        table: read(&mut ports, "table"),
        shared: read(&mut ports, "shared"),
        w_down: read(&mut ports, "w_down"),
        s_down: read(&mut ports, "s_down"),
        residual: Residual::ports(site, &mut ports)?,
        layout: Table { experts: shape[0] },
        choices,
        tiles: pad(shape[1]) / LANES,
        tokens: (DOWN_TOKENS * 11 / (choices + 1)).max(TOKENS),
    };
    let sym = site.rows(site.result(0))?;
    let mut k = ports.builder(site, down.tiles.into());
    k.threads(DOWN_WARPS as u32 * 32);
    let sums = k.shared(DType::F32, down.tokens * (choices + 1) * LANES);
    let place = Place::here(&mut k);
    let (tile, base) = (k.task(), k.param(down.s_down));
    let dense_tile = down.dense.own_tile(&mut k, base, tile);
    let zero = k.const_i64(0);
    let leads = k.cmp(Pred::Eq, place.thread, zero);
    k.if_then(leads, |k| down.dense.prefetch(k, dense_tile));
    begin(&mut k);
    let count = k.dim(sym);
    k.for_each((zero, count, down.tokens), |k, first| {
        let (left, most) = (k.sub(count, first), k.index(down.tokens));
        let tokens = k.min_i64(left, most);
        k.barrier();
        down.products(k, place, dense_tile, (first, tokens), sums);
        k.barrier();
        down.combine(k, place, (first, tokens), sums);
    });
    Ok(ports.finish(k.finish()))
}

impl Down {
    /// The products of tokens `first .. first + tokens`: warps take chosen experts, then the shared one, eight tokens at a time.
    fn products(
        &self,
        k: &mut KernelBuilder,
        place: Place,
        dense: super::tile::Tile,
        (first, tokens): (Val, Val),
        sums: Val,
    ) {
        let (table, tile) = (k.param(self.table), k.task());
        let active = self.layout.count(k, table);
        let groups = k.add_const(tokens, TOKENS - 1);
        let groups = k.div_const(groups, TOKENS);
        let units = k.add(active, groups);
        k.for_each((place.warp, units, DOWN_WARPS), |k, unit| {
            let routed = k.cmp(Pred::Lt, unit, active);
            k.if_else(
                routed,
                |k| {
                    self.routed(k, place, (unit, tile), (first, tokens), sums);
                    Vec::new()
                },
                |k| {
                    let group = k.sub(unit, active);
                    let begin = k.mul_const(group, TOKENS);
                    let product = Product::new(k, &self.dense, vec![dense], place, 1);
                    let last = k.index(1);
                    let last = k.sub(tokens, last);
                    let i = k.add(begin, product.token());
                    let i = k.min_i64(i, last);
                    let token = k.add(first, i);
                    let x = load_row(k, &self.s, token, product.q());
                    let ahead = product.ahead(k);
                    let result = product.run(k, x, ahead)[0];
                    let routed_sums = k.index(self.tokens * self.choices);
                    self.keep(k, &product, result, (begin, tokens), sums, &mut |k, i| k.add(routed_sums, i));
                    Vec::new()
                },
            );
        });
    }

    /// The products of one chosen expert with those of its tokens that are among `first .. first + tokens`.
    fn routed(
        &self,
        k: &mut KernelBuilder,
        place: Place,
        (unit, tile): (Val, Val),
        (first, tokens): (Val, Val),
        sums: Val,
    ) {
        let (table, order, base) = (k.param(self.table), k.param(self.order), k.param(self.w_down));
        let e = self.layout.active(k, table, unit);
        let (begin, end) = self.layout.run(k, table, e);
        let first_choice = k.mul_const(first, self.choices);
        let end_token = k.add(first, tokens);
        let end_choice = k.mul_const(end_token, self.choices);
        let (begin, end) =
            (lower_bound(k, order, (begin, end), first_choice), lower_bound(k, order, (begin, end), end_choice));
        let own = k.mul_const(e, self.tiles);
        let own = k.add(own, tile);
        let weight = self.routed.own_tile(k, base, own);
        k.for_each((begin, end, TOKENS), |k, from| {
            let product = Product::new(k, &self.routed, vec![weight], place, 1);
            let ahead = product.ahead(k);
            let choice = |k: &mut KernelBuilder, at: Val| {
                let (one, last) = (k.const_i64(1), end);
                let last = k.sub(last, one);
                let at = k.min_i64(at, last);
                k.load_index(order, at)
            };
            let at = k.add(from, product.token());
            let number = choice(k, at);
            let x = load_row(k, &self.h, number, product.q());
            let result = product.run(k, x, ahead)[0];
            self.keep(k, &product, result, (from, end), sums, &mut |k, at| {
                let number = choice(k, at);
                k.sub(number, first_choice)
            });
        });
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
    fn combine(&self, k: &mut KernelBuilder, place: Place, (first, tokens): (Val, Val), sums: Val) {
        let (weights, shared, tile) = (k.param(self.weights), k.param(self.shared), k.task());
        let (half, row) = (k.div_const(place.thread, LANES), k.rem_const(place.thread, LANES));
        // whole warps come along, since 16 threads add up squares
        let even = k.add_const(tokens, 1);
        let even = k.div_const(even, 2);
        let warp_tokens = k.mul_const(even, 2);
        k.for_each((half, warp_tokens, 2 * DOWN_WARPS), |k, i| {
            let exists = k.cmp(Pred::Lt, i, tokens);
            let zero = k.const_i64(0);
            let i = k.select(exists, i, zero);
            let token = k.add(first, i);
            let weights = row_ptr(k, weights, token, pad(self.choices));
            let base = k.mul_const(i, self.choices * LANES);
            let base = k.add(base, row);
            let nothing = k.const_f32(0.0);
            let choices = k.index(self.choices);
            let routed = k.for_carry((zero, choices, 1), &[nothing], |k, s, sum| {
                let at = k.mul_const(s, LANES);
                let at = k.add(base, at);
                let (weight, x) = (k.load_f32(weights, s), k.load_f32(sums, at));
                vec![k.fma(weight, x, sum[0])]
            })[0];
            let shared = row_ptr(k, shared, token, LANES);
            let weight = k.load_f32(shared, zero);
            let at = k.mul_const(i, LANES);
            let at = k.add_const(at, self.tokens * self.choices * LANES);
            let at = k.add(at, row);
            let x = k.load_f32(sums, at);
            let sum = k.fma(weight, x, routed);
            store_residual(k, &self.residual, tile, &Block { token, exists }, row, sum);
        });
    }
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
