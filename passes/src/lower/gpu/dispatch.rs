//! Choices of many tokens: who chooses whom, and the choices by expert.
//!
//! .choose          a warp a token
//! .dispatch_some   a block for at most 1024 choices: warps find which of 32 choices are alike, a thread an expert counts them and finds where they
//!                  begin, and a thread a choice lists it
//! .dispatch        the same of more: a block for 1024 choices, or as many as its counts have room for, counts them; tail: where each begins among all, and lists them

use nextc_ir::DType;
use nextc_ir::kernel::{Kernel, KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::{Sym, pad};

use super::super::matmul::row_ptr;
use super::super::ports::{Port, Ports, Site};
use super::many::{FEW_ROWS, WARPS, many, some};
use super::router::Choice;
use super::{Place, begin, lanes_alike};

/// Tokens of a block that chooses: a warp each.
const CHOOSING: u64 = WARPS;
/// Choices that a block dispatches, at most.
const DISPATCHED: u64 = 1024;
/// Counts that such a block has room for: of each expert for each 32 choices.
const COUNTS: u64 = 1 << 14;

/// Chooses: a warp a token.
pub fn choose(site: &Site<'_>, ports: &Ports, outs: &[Port], (sym, choice): (Sym, &Choice)) -> Kernel {
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
pub fn dispatch_some(site: &Site<'_>, ports: &Ports, outs: &[Port], (sym, choice): (Sym, &Choice)) -> Kernel {
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
pub fn dispatch(site: &Site<'_>, ports: &Ports, outs: &[Port], (sym, choice): (Sym, &Choice)) -> Kernel {
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
