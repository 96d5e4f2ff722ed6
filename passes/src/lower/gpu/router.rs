//! `norm_router` on a GPU: which experts each token chooses, and which tokens each expert has.
//!
//! logits   blocks over tiles of the router; one more for the shared expert's gate
//! tail     of few tokens, one block: a warp a token chooses, then each choice and each expert finds its place
//!
//! Of more tokens see [`super::many_experts`]. What is dispatched, and how, says [`super::super::experts`].

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::shape::{LANES, pad};

use super::super::LowerError;
use super::super::matmul::{Normed, Rows, number_in_range, row_ptr};
use super::super::ports::{Lowered, Port, Ports, Site};
use super::few::{Few, Memory, Spread};
use super::fragments::Fragments;
use super::many::{FEW_ROWS, TILES, few, few_rows};
use super::many_experts;
use super::matmul::store_one;
use super::tile::{Product, Split};
use super::{Place, begin, begin_alone, lanes_before, warp_count, warp_sum};

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
    let spread = Spread::of(site.target, tiles + 1);
    let mut k = ports.builder(site, few(sym, most, spread.grid(sym)));
    k.threads(split.threads());
    let forms = [router_matrix, gate_matrix].map(|m| m.form().precise());
    let memory = Memory::alloc(&mut k, site.target, split, &forms);
    let (place, count) = (Place::here(&mut k), k.dim(sym));
    let (number, share) = spread.block(&mut k);
    let block = |k: &mut KernelBuilder, fragments: &Fragments, weight: Port, tile: Val, is_gate: bool| {
        let base = k.param(weight);
        let tiles = vec![fragments.own_tile(k, base, tile)];
        let product = Product::new(k, fragments, tiles, place, split.warps).precise();
        let block = Few::new(product, split, &rows, memory).of_share(share);
        let asked = block.ask(k);
        begin(k);
        let out = k.param(outs[if is_gate { 4 } else { 5 }]);
        let stride = if is_gate { LANES } else { pad(experts) };
        block.products(k, asked, count, &mut |_, token| token, &mut |k, at, sum| {
            let value = if is_gate { k.sigmoid(sum.values[0]) } else { sum.values[0] };
            k.if_then(at.exists, |k| store_one(k, (out, stride), at.token, tile, sum.row, value));
        });
    };
    number_in_range(&mut k, number, (0, tiles), |k, tile| block(k, &router_matrix, router, tile, false));
    number_in_range(&mut k, number, (tiles, tiles + 1), |k, tile| block(k, &gate_matrix, gate, tile, true));
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
        begin_alone(k);
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

    /// Carries something over all choices of few tokens: those of a token at once, so that their loads are under way together.
    fn over_choices(
        &self,
        k: &mut KernelBuilder,
        init: &[Val],
        mut body: impl FnMut(&mut KernelBuilder, Val, &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let zero = k.const_i64(0);
        k.for_carry((zero, self.tokens, 1), init, |k, t, carried| {
            let first = k.mul_const(t, self.k);
            (0..self.k).fold(carried.to_vec(), |carried, s| {
                let i = k.add_const(first, s);
                body(k, i, &carried)
            })
        })
    }

    /// Lists few choices by expert: each finds its place by comparing itself with all others, and so does each expert.
    fn list(&self, k: &mut KernelBuilder, thread: Val, (order, table): (Val, Val), listed: &Listed) {
        let choices = k.mul_const(self.tokens, self.k);
        let (none, one) = (k.const_i32(0), k.const_i32(1));
        let count = |k: &mut KernelBuilder, counts: Val, sum: Val| {
            let more = k.select(counts, one, none);
            k.add(sum, more)
        };
        k.for_each((thread, choices, self.threads), |k, c| {
            let id = k.load(DType::I32, 1, listed.ids, c);
            let found = self.over_choices(k, &[none, none], |k, i, found| {
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
            let found = self.over_choices(k, &[none; 4], |k, i, found| {
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

    /// Experts, and those that there would be if every thread had as many.
    pub const fn padded_experts(&self) -> u64 {
        self.slots() * self.threads
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

    /// Enters the thread's experts, whose choices are `counts`, into the table, where `enters` says so; gives where each one's run begins. `totals`
    /// is shared memory for [`Self::totals`] numbers.
    pub fn enter_all(
        &self,
        k: &mut KernelBuilder,
        place: Place,
        table: Val,
        (counts, totals): (&[Val], Val),
        enters: Val,
    ) -> Vec<Val> {
        let (zero, one) = (k.const_i32(0), k.const_i32(1));
        let numbers: Vec<[Val; 2]> = counts
            .iter()
            .map(|&count| {
                let some = k.cmp(Pred::Gt, count, zero);
                [count, k.select(some, one, zero)]
            })
            .collect();
        let (before, [_, active_count]) = self.sums_before(k, place, &numbers, totals);
        let (experts, last) = (k.index(self.experts), k.index(self.experts - 1));
        let mut starts = Vec::new();
        for ((e, &count), [start, active]) in self.own_experts(k, place.thread).into_iter().zip(counts).zip(before) {
            let end = k.add(start, count);
            let active = k.add(active, one);
            let exists = k.cmp(Pred::Lt, e, experts);
            let exists = k.and(exists, enters);
            let e32 = k.narrow(e);
            k.if_then(exists, |k| {
                self.enter(k, table, (e, e32, last), (start, end, count), (active, active_count));
            });
            starts.push(start);
        }
        starts
    }

    /// The experts of a thread, by slot.
    pub fn own_experts(&self, k: &mut KernelBuilder, thread: Val) -> Vec<Val> {
        (0..self.slots()).map(|slot| k.add_const(thread, slot * self.threads)).collect()
    }

    /// Warps that have experts, of all slots.
    const fn expert_warps(&self) -> u64 {
        self.padded_experts() / 32
    }

    /// Numbers that [`Self::enter_all`] keeps in shared memory.
    pub const fn totals(&self) -> u64 {
        2 * self.expert_warps()
    }

    /// Of two numbers of each expert, of which `numbers` has the thread's: the sums of those of all experts before it, and of all.
    fn sums_before(
        &self,
        k: &mut KernelBuilder,
        place: Place,
        numbers: &[[Val; 2]],
        totals: Val,
    ) -> (Vec<[Val; 2]>, [Val; 2]) {
        let (none, add) = (k.const_i32(0), |k: &mut KernelBuilder, a: Val, b: Val| k.add(a, b));
        let warps: Vec<Val> = (0..self.slots()).map(|slot| k.add_const(place.warp, slot * self.threads / 32)).collect();
        let mut before = Vec::new();
        for (numbers, &warp) in numbers.iter().zip(&warps) {
            let both = numbers.map(|x| lanes_before(k, place.lane, (none, x), add));
            place.once_a_warp(k, |k| {
                for (which, (_, all)) in (0..).zip(both) {
                    let at = k.add_const(warp, which * self.expert_warps());
                    k.store(totals, at, all);
                }
            });
            before.push(both.map(|(before, _)| before));
        }
        k.barrier();
        let places = place.places(k, self.expert_warps());
        let mut sums = [none; 2];
        for which in 0..2 {
            let row = k.index(which);
            let row = row_ptr(k, totals, row, self.expert_warps());
            let of_warps: Vec<Val> = places.iter().map(|p| p.load_i32(k, row)).collect();
            let sum = of_warps.iter().fold(none, |sum, &x| k.add(sum, x));
            sums[which as usize] = warp_count(k, sum);
            for (before, &warp) in before.iter_mut().zip(&warps) {
                let earlier = places.iter().zip(&of_warps).fold(none, |sum, (p, &x)| {
                    let counts = k.cmp(Pred::Lt, p.at, warp);
                    let x = k.select(counts, x, none);
                    k.add(sum, x)
                });
                let earlier = warp_count(k, earlier);
                before[which as usize] = k.add(before[which as usize], earlier);
            }
        }
        (before, sums)
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
