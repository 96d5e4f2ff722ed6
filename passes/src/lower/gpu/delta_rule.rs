//! `gated_delta_net` by blocks of threads.
//!
//! Of short runs; long ones are for [`super::delta_long`]:
//!
//! block    one key head of one sequence, with the value heads that share it, or, of few sequences, with one of them; tokens in blocks of 8
//! thread   some rows of a few columns of S, in registers for its turn; a warp reads whole lines of a state
//! ahead    where all heads of a block are one turn, its state into registers, else the states of all turns towards L2
//! replay   S ← fma(k, d, α S) for the accepted tokens of a tentative step, with the kept k, d, α
//! conv     a thread a channel of q, k and v; its window in registers; SiLU; to shared memory
//! norm     a warp a token: q ← scale · q / |q|,  k ← k / |k|,  k·q
//! sweep    token by token: y = Sᵀk,  w = Sᵀq  summed over the parts of a column, d = β (v − α y);  o = α w + (k·q) d;  S ← fma(k, d, α S)
//! epilogue after the turns, a warp a token and value head: out = rms_norm(o, norm) · silu(z)
//! traffic  2 · 4 · head_k_dim · head_v_dim bytes a head and sequence: bound by memory
//!
//! What is kept of tentative tokens is as in [`super::super::delta_rule`].

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::{Sym, pad};
use nextc_ir::types::TENTATIVE_TOKENS;

use super::super::LowerError;
use super::super::delta_rule::{Mixer, Run, SequencePorts};
use super::super::matmul::{mean_rsqrt, row_ptr};
use super::super::ports::{Lowered, Ports, Site};
use super::delta_conv::Channel;
use super::delta_long;
use super::delta_state::{Columns, store_lanes};
use super::many::{few, many};
use super::{Place, begin, warp_sum};

/// Tokens between two passes over the convolution and the norms.
pub const BLOCK: u64 = TENTATIVE_TOKENS;
/// Most threads of a block: with 128 registers each they fill a multiprocessor.
const MOST_THREADS: u64 = 512;
/// Most elements of S that a thread holds.
const MOST_HELD: u64 = 64;
/// Threads that share a column, at most.
const MOST_PARTS: u64 = 8;
/// Columns of a thread, at most.
const OWN_COLUMNS: u64 = 4;
/// The same where a block does one value head.
const SINGLE_COLUMNS: u64 = 4;
/// Tokens of a short run, at most.
pub const SHORT: u64 = TENTATIVE_TOKENS;

/// How the states of a block lie in the registers of its threads.
#[derive(Clone, Copy)]
pub struct Tile {
    /// Value heads that are done together; those of a block are done in so many turns.
    pub heads: u64,
    /// In how many turns.
    pub turns: u64,
    /// Columns of the heads of a turn, padding of a head included.
    pub columns: u64,
    /// Columns of a thread.
    pub own: u64,
    /// Threads that a column is shared by.
    pub parts: u64,
    /// Rows of a thread.
    pub rows: u64,
}

impl Tile {
    /// The tile of short runs with the fewest turns; `None` if a single head does not fit.
    fn short(mixer: &Mixer, most_threads: u64) -> Option<Self> {
        Self::of(mixer, mixer.shared_heads(), (OWN_COLUMNS, most_threads))
    }

    /// The tile of blocks that do one value head, for short runs of few sequences.
    fn single(mixer: &Mixer) -> Option<Self> {
        Self::of(mixer, 1, (SINGLE_COLUMNS, MOST_THREADS)).filter(|_| mixer.shared_heads() > 1)
    }

    /// The tile of blocks that do `shared` value heads in the fewest turns, a thread at most so many columns.
    fn of(mixer: &Mixer, shared: u64, (columns, most_threads): (u64, u64)) -> Option<Self> {
        let dv = pad(mixer.v.width);
        let (parts, rows) = Self::parts(mixer);
        let own = [OWN_COLUMNS, 2, 1].into_iter().find(|&own| own <= columns && rows * own <= MOST_HELD)?;
        let tile = |heads: u64| Self { heads, turns: shared / heads, columns: heads * dv, own, parts, rows };
        let heads = (1..=shared).rev().filter(|h| shared.is_multiple_of(*h));
        heads.map(tile).find(|t| t.threads() <= most_threads)
    }

    /// Threads that share a column, and rows of each: the order in which a column is summed, the same in all blocks.
    fn parts(mixer: &Mixer) -> (u64, u64) {
        let dk = mixer.k.width;
        let parts = [MOST_PARTS, 4, 2].into_iter().find(|p| dk.is_multiple_of(4 * p)).unwrap_or(1);
        (parts, dk / parts)
    }

    /// Value heads of a block.
    pub fn all_heads(&self) -> u64 {
        self.heads * self.turns
    }

    /// Columns of all turns.
    pub fn all_columns(&self) -> u64 {
        self.columns * self.turns
    }

    /// Columns of the warps that share them.
    const fn warp_columns(&self) -> u64 {
        32 * self.own
    }

    /// Threads of a block.
    pub fn threads(&self) -> u64 {
        32 * self.columns.div_ceil(self.warp_columns()) * self.parts
    }

    /// Columns with those that nobody has.
    pub fn padded_columns(&self) -> u64 {
        self.columns.next_multiple_of(self.warp_columns())
    }
}

/// `gated_delta_net`: kernels for short runs, of few and of many sequences, and those of long runs.
pub fn lower_gated_delta_net(site: &Site<'_>) -> Option<Result<Lowered, LowerError>> {
    let mut ports = Ports::default();
    let mixer = Mixer::ports(site, &mut ports);
    let tile = Tile::short(&mixer, MOST_THREADS)?;
    let sequences = SequencePorts::new(&mut ports);
    let long = delta_long::Long::of(&mixer, &sequences);
    let heads = mixer.q.heads;
    let of = |part: &str, grid: Extent, (tile, together): (Tile, u32)| {
        let mut k = ports.builder_of(site, part, grid);
        k.together(together);
        short_runs(&mut k, (&mixer, &sequences), tile, long.is_some());
        ports.clone().finish(k.finish())
    };
    let grid = Extent::from(Sym::B) * heads.into();
    // of few sequences a block does one value head, so that more multiprocessors work; of many two blocks share a multiprocessor, so that one reads while the
    // other computes
    let fills = |blocks: u64| site.target.multiprocessors() / blocks;
    let single = Tile::single(&mixer).filter(|_| long.is_some() && fills(mixer.v.heads) > 0);
    let half = Tile::short(&mixer, MOST_THREADS / 2).filter(|half| half.threads() < tile.threads());
    let (alone, most) = (single.map_or(0, |_| fills(mixer.v.heads)), fills(heads).max(1));
    let own = many(Sym::B, alone, grid.clone());
    let name = if single.is_some() { ".some" } else { "" };
    let mut parts = vec![match half {
        Some(_) => of(name, few(Sym::B, most, own), (tile, 1)),
        None => of(name, own, (tile, 1)),
    }];
    if let Some(single) = single {
        let grid = Extent::from(Sym::B) * mixer.v.heads.into();
        parts.insert(0, of("", few(Sym::B, alone, grid), (single, 1)));
    }
    if let Some(half) = half {
        parts.push(of(".batch", many(Sym::B, most, grid), (half, 2)));
    }
    parts.extend(long.as_ref().map(|long| long.kernels(site, &ports)));
    Some(parts.into_iter().reduce(Lowered::then).ok_or_else(|| site.error("a delta rule without a kernel")))
}

/// A block of threads does the short runs, or all where nobody else does the long ones.
fn short_runs(k: &mut KernelBuilder, (mixer, sequences): (&Mixer, &SequencePorts), tile: Tile, long_elsewhere: bool) {
    k.threads(tile.threads() as u32);
    let (place, task) = (Place::here(k), k.task());
    // blocks that share a key head
    let groups = mixer.shared_heads() / tile.all_heads();
    let (b, number) = (k.div_const(task, groups * mixer.q.heads), k.rem_const(task, groups * mixer.q.heads));
    let (head, group) = (k.div_const(number, groups), k.rem_const(number, groups));
    let first = k.mul_const(group, tile.all_heads());
    let smem = Smem::alloc(k, mixer, &tile);
    let run = sequences.run(k, b);
    let zero = k.const_i64(0);
    let live = k.cmp(Pred::Ge, run.slot, zero);
    let some = k.cmp(Pred::Lt, run.begin, run.end);
    let is_mine = if long_elsewhere {
        let is_short = short_run(k, &run);
        k.and(some, is_short)
    } else {
        some
    };
    let block = Block { mixer, tile, place, run, head, first, smem };
    let works = k.and(is_mine, live);
    let fresh = k.if_else(some, |k| vec![run.is_fresh(k)], |_| vec![some])[0];
    let begun = k.not(fresh);
    let remembers = k.and(works, begun);
    let channels = block.channels(k);
    let asked = block.ask(k, &channels, remembers);
    begin(k);
    k.if_then(is_mine, |k| {
        k.if_else(
            live,
            |k| {
                block.run(k, &channels, &asked, (fresh, remembers), long_elsewhere);
                Vec::new()
            },
            |k| {
                block.zero_out(k);
                Vec::new()
            },
        );
    });
}

/// Whether a sequence's run is one of few tokens.
pub fn short_run(k: &mut KernelBuilder, run: &Run) -> Val {
    let (tokens, most) = (k.sub(run.end, run.begin), k.index(SHORT));
    k.cmp(Pred::Le, tokens, most)
}

/// What the threads of a block share.
#[derive(Clone, Copy)]
pub struct Smem {
    /// `[BLOCK][q, k, v]`: the convolutions' outputs; q and k then normed.
    pub tokens: Val,
    /// `[BLOCK]`: `k · q`.
    pub kq: Val,
    /// `[BLOCK][heads]`.
    pub alpha: Val,
    /// As `alpha`.
    pub beta: Val,
    /// `[BLOCK][columns]`.
    pub o: Val,
    /// `[parts][2][columns]`: `Sᵀk` and `Sᵀq` of the parts.
    pub parts: Val,
    /// `[2][columns]`: their sums.
    pub sums: Val,
    /// `[BLOCK][columns]`: the gates of the output, as they are.
    pub z: Val,
    /// The gain of the output's norm.
    pub norm: Val,
}

impl Smem {
    fn alloc(k: &mut KernelBuilder, mixer: &Mixer, tile: &Tile) -> Self {
        let columns = tile.padded_columns();
        let mut array = |elems: u64| k.shared(DType::F32, elems);
        Self {
            tokens: array(BLOCK * (2 * pad(mixer.k.width) + tile.all_columns())),
            kq: array(BLOCK),
            alpha: array(BLOCK * tile.all_heads()),
            beta: array(BLOCK * tile.all_heads()),
            o: array(BLOCK * tile.all_columns()),
            parts: array(2 * tile.parts * columns),
            sums: array(2 * columns),
            z: array(BLOCK * tile.all_columns()),
            norm: array(pad(mixer.v.width)),
        }
    }
}

/// Some value heads that share a key head: what one turn is about.
pub struct Turn {
    /// The first value head, and its number among those of the block.
    pub first_head: Val,
    /// See `first_head`.
    pub before: Val,
    /// The columns of this thread.
    pub own: Columns,
    /// Its part of each.
    pub part: Val,
}

/// A block of tokens.
pub struct Tokens {
    /// The first, and how many.
    pub first: Val,
    /// See `first`.
    pub count: Val,
    /// Whether they are the last of their sequence.
    pub are_last: Val,
}

/// A block of threads at work on a sequence.
pub struct Block<'a> {
    /// What the kernel is connected to.
    pub mixer: &'a Mixer,
    /// How states lie.
    pub tile: Tile,
    /// The thread.
    pub place: Place,
    /// The sequence's tokens.
    pub run: Run,
    /// The key head.
    pub head: Val,
    /// The first of the block's value heads among those that share it.
    pub first: Val,
    /// Shared memory.
    pub smem: Smem,
}

impl Block<'_> {
    /// Elements of a key.
    pub fn key_elems(&self) -> u64 {
        pad(self.mixer.k.width)
    }

    /// Elements of one token in shared memory.
    pub fn row_elems(&self) -> u64 {
        2 * self.key_elems() + self.tile.all_columns()
    }

    /// Value head number `i` of the block.
    pub fn own_head(&self, k: &mut KernelBuilder, i: Val) -> Val {
        let i = k.add(self.first, i);
        self.mixer.value_head(k, self.head, i)
    }

    fn zero_out(&self, k: &mut KernelBuilder) {
        let zero = k.const_f32(0.0);
        let (i, elems) = (k.const_i64(0), k.index(self.tile.all_columns()));
        let head = self.own_head(k, i);
        k.for_each((self.run.begin, self.run.end, 1), |k, t| {
            let out = self.mixer.out_row(k, t, head);
            k.for_each((self.place.thread, elems, self.tile.threads()), |k, c| k.store(out, c, zero));
        });
    }

    /// All tokens of the sequence, a block of them after the other, unless they are one block. `asked` is what was asked for; whether the sequence begins
    /// here, and whether it has a past.
    fn run(
        &self,
        k: &mut KernelBuilder,
        channels: &[Channel],
        asked: &[Val],
        (fresh, remembers): (Val, Val),
        is_one_block: bool,
    ) {
        let (windows, rest) = asked.split_at(channels.len() * self.window());
        let (taps, state) = rest.split_at(channels.len() * (self.window() + 1));
        k.if_then(fresh, |k| channels.iter().for_each(|channel| self.clear_window(k, channel)));
        let carried = [windows, state].concat();
        let block = |k: &mut KernelBuilder, first: Val, carried: &[Val]| {
            let (left, most) = (k.sub(self.run.end, first), k.index(BLOCK));
            let tokens = Tokens { first, count: k.min_i64(left, most), are_last: k.cmp(Pred::Le, left, most) };
            let (windows, state) = carried.split_at(windows.len());
            let left = self.prepare(k, channels, &tokens, (windows, taps));
            let state = self.turns(k, &tokens, state, (fresh, remembers));
            k.barrier();
            self.epilogue(k, &tokens);
            [&left[..windows.len()], &state].concat()
        };
        if is_one_block {
            block(k, self.run.begin, &carried);
            return;
        }
        k.for_carry((self.run.begin, self.run.end, BLOCK), &carried, |k, first, carried| {
            let left = block(k, first, carried);
            // before the next tokens use the same shared memory
            k.barrier();
            left
        });
    }

    /// Asks for what no launch of the step writes: the channels' windows, where the sequence has a past, and taps; then the state, where there is
    /// one turn, or towards L2. And keeps the gain of the output's norm.
    fn ask(&self, k: &mut KernelBuilder, channels: &[Channel], remembers: Val) -> Vec<Val> {
        if self.tile.turns > 1 {
            self.bring_near(k, remembers);
        }
        let windows: Vec<Val> = channels.iter().flat_map(|c| self.load_window(k, c, remembers)).collect();
        let taps: Vec<Val> = channels.iter().flat_map(|c| self.load_taps(k, c)).collect();
        let mut state = Vec::new();
        if self.tile.turns == 1 {
            let zero = k.const_i64(0);
            let turn = self.turn(k, zero);
            state = self.load_state(k, &turn, remembers);
        }
        let (norm, width) = (k.param(self.mixer.norm), k.index(pad(self.mixer.v.width)));
        k.for_each((self.place.thread, width, self.tile.threads()), |k, c| {
            let gain = k.load_f32(norm, c);
            k.store(self.smem.norm, c, gain);
        });
        [windows, taps, state].concat()
    }

    /// The states of all value heads towards L2, where the sequence has a past: a warp a part of each.
    fn bring_near(&self, k: &mut KernelBuilder, remembers: Val) {
        let warps = self.tile.threads() / 32;
        let elems = (self.mixer.k.width * pad(self.mixer.v.width)).div_ceil(warps).next_multiple_of(4);
        k.if_then(remembers, |k| {
            self.place.once_a_warp(k, |k| {
                for head in 0..self.tile.all_heads() {
                    let head = k.index(head);
                    let head = self.own_head(k, head);
                    let state = self.mixer.state(k, self.run.slot, head);
                    let (at, bytes) = (k.mul_const(self.place.warp, elems), k.index(elems * 4));
                    k.prefetch(state, at, bytes);
                }
            });
        });
    }

    /// The value heads of the block in turn. `held` is the state where there is one turn; else it lies in memory. Gives what is held then.
    fn turns(&self, k: &mut KernelBuilder, tokens: &Tokens, held: &[Val], (fresh, remembers): (Val, Val)) -> Vec<Val> {
        let (zero, turns) = (k.const_i64(0), k.index(self.tile.turns));
        if self.tile.turns == 1 {
            let turn = self.turn(k, zero);
            return self.recur(k, &turn, tokens, held, fresh);
        }
        let follows = k.cmp(Pred::Gt, tokens.first, self.run.begin);
        let remembers = k.or(remembers, follows);
        k.for_each((zero, turns, 1), |k, number| {
            let turn = self.turn(k, number);
            let state = self.load_state(k, &turn, remembers);
            self.recur(k, &turn, tokens, &state, fresh);
        });
        Vec::new()
    }

    /// Turn number `number`.
    fn turn(&self, k: &mut KernelBuilder, number: Val) -> Turn {
        let (mixer, tile) = (self.mixer, &self.tile);
        let before = k.mul_const(number, tile.heads);
        let first_head = self.own_head(k, before);
        let (group, part) = (k.div_const(self.place.warp, tile.parts), k.rem_const(self.place.warp, tile.parts));
        let (place, own) = (k.mul_const(group, tile.warp_columns()), k.mul_const(self.place.lane, tile.own));
        let place = k.add(place, own);
        let (columns, last) = (k.index(tile.columns), k.index(tile.columns - tile.own));
        let live = k.cmp(Pred::Lt, place, columns);
        let lane = k.min_i64(place, last);
        let width = pad(mixer.v.width);
        let (head, column) = (k.div_const(lane, width), k.rem_const(lane, width));
        let value_head = k.add(first_head, head);
        let state = mixer.state(k, self.run.slot, value_head);
        Turn { first_head, before, own: Columns { place, lane, column, head, live, state }, part }
    }

    /// What all value heads need of a block of tokens; gives what the token after it sees.
    fn prepare(
        &self,
        k: &mut KernelBuilder,
        channels: &[Channel],
        tokens: &Tokens,
        (windows, taps): (&[Val], &[Val]),
    ) -> Vec<Val> {
        let inputs = self.inputs(k, channels, tokens.first);
        self.gates(k, tokens);
        let next = self.convolve(k, channels, tokens, (windows, taps), inputs);
        k.barrier();
        self.norms(k, tokens);
        k.barrier();
        next
    }

    /// A block of tokens through the recurrence of a turn's heads; gives the state after it, and stores it where nobody holds it longer.
    fn recur(&self, k: &mut KernelBuilder, turn: &Turn, tokens: &Tokens, state: &[Val], fresh: Val) -> Vec<Val> {
        let zero = k.const_i64(0);
        let are_first = k.cmp(Pred::Eq, tokens.first, self.run.begin);
        let accepted = k.select(are_first, self.run.replay, zero);
        let state = self.replay(k, turn, state, (accepted, fresh));
        let state = k.for_carry((zero, tokens.count, 1), &state, |k, i, state| self.sweep(k, turn, i, state));
        let settled = k.not(self.run.tentative);
        let stores = if self.tile.turns == 1 { k.and(settled, tokens.are_last) } else { settled };
        k.if_then(stores, |k| self.store_state(k, turn, &state));
        state
    }

    /// α and β of the block: a thread a token and value head. And the gates of the output.
    fn gates(&self, k: &mut KernelBuilder, tokens: &Tokens) {
        let (tile, zero) = (&self.tile, k.const_i64(0));
        let first_head = self.own_head(k, zero);
        let elems = k.mul_const(tokens.count, tile.all_columns());
        k.for_each((self.place.thread, elems, tile.threads()), |k, at| {
            let (i, c) = (k.div_const(at, tile.all_columns()), k.rem_const(at, tile.all_columns()));
            let t = k.add(tokens.first, i);
            let z = self.mixer.z_row(k, t, first_head);
            let z = k.load_f32(z, c);
            k.store(self.smem.z, at, z);
        });
        // the last threads: the first have the norms to do
        let last = k.index(tile.threads() - 1);
        let (pairs, own) = (k.mul_const(tokens.count, tile.all_heads()), k.sub(last, self.place.thread));
        k.for_each((own, pairs, tile.threads()), |k, pair| {
            let (i, head) = (k.div_const(pair, tile.all_heads()), k.rem_const(pair, tile.all_heads()));
            let (t, head) = (k.add(tokens.first, i), k.add(first_head, head));
            let (alpha, beta) = self.mixer.gate(k, t, head);
            k.store(self.smem.alpha, pair, alpha);
            k.store(self.smem.beta, pair, beta);
        });
    }

    /// Pointers to q, k and v of token `i` of the block.
    fn token(&self, k: &mut KernelBuilder, i: Val) -> [Val; 3] {
        let row = row_ptr(k, self.smem.tokens, i, self.row_elems());
        [0, 1, 2].map(|part| {
            let bytes = k.index(part * self.key_elems() * 4);
            k.offset(row, bytes)
        })
    }

    /// The norms of q and k, and their product: a warp a token.
    fn norms(&self, k: &mut KernelBuilder, tokens: &Tokens) {
        let warps = self.tile.threads() / 32;
        k.for_each((self.place.warp, tokens.count, warps), |k, i| {
            let [q, key, _] = self.token(k, i);
            let places = self.place.places(k, self.key_elems());
            let rows = [q, key].map(|x| places.iter().map(|p| p.load(k, x)).collect::<Vec<Val>>());
            let rows = normed(k, self.mixer, rows);
            for (to, row) in [q, key].into_iter().zip(&rows) {
                places.iter().zip(row).for_each(|(p, &y)| p.store(k, to, y));
            }
            let zero = k.const_f32(0.0);
            let kq = rows[1].iter().zip(&rows[0]).fold(zero, |sum, (&x, &y)| k.fma(x, y, sum));
            let kq = warp_sum(k, kq);
            let first = k.const_i64(0);
            let writes = k.cmp(Pred::Eq, self.place.lane, first);
            k.if_then(writes, |k| k.store(self.smem.kq, i, kq));
        });
    }

    /// Token `i` of the block through the recurrence; gives the state after it.
    fn sweep(&self, k: &mut KernelBuilder, turn: &Turn, i: Val, state: &[Val]) -> Vec<Val> {
        let tile = &self.tile;
        let own = tile.own as usize;
        let [q, key, v] = self.token(k, i);
        let zero = k.const_f32(0.0);
        let (mut y, mut w) = (vec![zero; own], vec![zero; own]);
        for (c, chunk) in state.chunks(self.chunk() * own).enumerate() {
            let (keys, queries) = (self.load_rows(k, turn, key, c), self.load_rows(k, turn, q, c));
            for ((row, ki), qi) in chunk.chunks(own).zip(keys).zip(queries) {
                for (column, &s) in row.iter().enumerate() {
                    y[column] = k.fma(s, ki, y[column]);
                    w[column] = k.fma(s, qi, w[column]);
                }
            }
        }
        let [y, w] = self.sum_parts(k, turn, [y, w]);
        let kq = k.load_f32(self.smem.kq, i);
        let pair = self.pair(k, turn, i, turn.own.head);
        let (alpha, beta) = (k.load_f32(self.smem.alpha, pair), k.load_f32(self.smem.beta, pair));
        let lane = self.lane(k, turn);
        let v = self.load_own(k, v, lane);
        let (mut d, mut out) = (Vec::with_capacity(own), Vec::with_capacity(own));
        for ((&v, &y), &w) in v.iter().zip(&y).zip(&w) {
            let decayed = k.fmul(alpha, y);
            let error = k.fsub(v, decayed);
            let update = k.fmul(beta, error);
            let mixed = k.fmul(alpha, w);
            out.push(k.fma(kq, update, mixed));
            d.push(update);
        }
        let first = k.const_i64(0);
        let writes = k.cmp(Pred::Eq, turn.part, first);
        let writes = k.and(writes, turn.own.live);
        k.if_then(writes, |k| self.say(k, turn, i, (&out, &d)));
        k.if_then(self.run.tentative, |k| self.keep(k, turn, i, key));
        self.apply(k, turn, state, key, (&d, alpha))
    }

    /// The number of token `i` and a head of the turn among those of the block.
    fn pair(&self, k: &mut KernelBuilder, turn: &Turn, i: Val, head: Val) -> Val {
        let pair = k.mul_const(i, self.tile.all_heads());
        let pair = k.add(pair, turn.before);
        k.add(pair, head)
    }

    /// Where this thread's columns lie in a row of the block.
    fn lane(&self, k: &mut KernelBuilder, turn: &Turn) -> Val {
        let before = k.mul_const(turn.before, pad(self.mixer.v.width));
        k.add(before, turn.own.lane)
    }

    /// Stores what the thread's columns say of token `i`, and keeps their updates where they may have to be replayed.
    fn say(&self, k: &mut KernelBuilder, turn: &Turn, i: Val, (out, update): (&[Val], &[Val])) {
        let (row, lane) = (row_ptr(k, self.smem.o, i, self.tile.all_columns()), self.lane(k, turn));
        store_lanes(k, row, lane, out);
        k.if_then(self.run.tentative, |k| {
            let [_, kept, _] = self.mixer.update(k, turn.own.state, i);
            store_lanes(k, kept, turn.own.column, update);
        });
    }

    /// Keeps k and α of token `i` with every head of the turn; its d is kept by the threads that have it.
    fn keep(&self, k: &mut KernelBuilder, turn: &Turn, i: Val, key: Val) {
        let zero = k.const_i64(0);
        let first = self.place.thread;
        let elems = k.index(self.tile.heads * self.key_elems());
        k.for_each((first, elems, self.tile.threads()), |k, at| {
            let (head, c) = (k.div_const(at, self.key_elems()), k.rem_const(at, self.key_elems()));
            let value_head = k.add(turn.first_head, head);
            let state = self.mixer.state(k, self.run.slot, value_head);
            let [kept, _, kept_alpha] = self.mixer.update(k, state, i);
            let x = k.load_f32(key, c);
            k.store(kept, c, x);
            let is_first = k.cmp(Pred::Eq, c, zero);
            k.if_then(is_first, |k| {
                let pair = self.pair(k, turn, i, head);
                let alpha = k.load_f32(self.smem.alpha, pair);
                k.store(kept_alpha, zero, alpha);
            });
        });
    }

    /// The norms of what the block says of its tokens: a warp a token and value head.
    fn epilogue(&self, k: &mut KernelBuilder, tokens: &Tokens) {
        let (width, heads) = (pad(self.mixer.v.width), self.tile.all_heads());
        let pairs = k.mul_const(tokens.count, heads);
        k.for_each((self.place.warp, pairs, self.tile.threads() / 32), |k, pair| {
            let (i, head) = (k.div_const(pair, heads), k.rem_const(pair, heads));
            let (t, value_head) = (k.add(tokens.first, i), self.own_head(k, head));
            let [o, z] = [self.smem.o, self.smem.z].map(|rows| row_ptr(k, rows, pair, width));
            norm_out(k, self.mixer, &self.place, (t, value_head), [o, self.smem.norm, z]);
        });
    }
}

/// `scale · q / |q|` and `k / |k|` of the elements that the threads of a warp have.
fn normed(k: &mut KernelBuilder, mixer: &Mixer, rows: [Vec<Val>; 2]) -> [Vec<Val>; 2] {
    let (zero, eps) = (k.const_f32(0.0), k.const_f32(mixer.eps));
    let sums = [0, 1].map(|i: usize| rows[i].iter().fold(zero, |sum, &x| k.fma(x, x, sum)));
    let sums = sums.map(|sum| warp_sum(k, sum));
    let factors = [(sums[0], mixer.scale), (sums[1], 1.0)].map(|(sum, scale)| {
        let sum = k.fadd(sum, eps);
        let (root, scale) = (k.rsqrt(sum), k.const_f32(scale));
        k.fmul(root, scale)
    });
    [0, 1].map(|i: usize| rows[i].iter().map(|&x| k.fmul(x, factors[i])).collect())
}

/// `out = rms_norm(o, norm) · silu(z)` of a value head of token `t`, by a warp: o, the gain and z are pointers.
pub fn norm_out(k: &mut KernelBuilder, mixer: &Mixer, place: &Place, (t, head): (Val, Val), from: [Val; 3]) {
    let places = place.places(k, pad(mixer.v.width));
    let [o, norm, z] = from.map(|p| places.iter().map(|at| at.load(k, p)).collect::<Vec<_>>());
    let zero = k.const_f32(0.0);
    let sum = o.iter().fold(zero, |sum, &x| k.fma(x, x, sum));
    let sum = warp_sum(k, sum);
    let scale = mean_rsqrt(k, sum, mixer.v.width, mixer.norm_eps);
    let out = mixer.out_row(k, t, head);
    for (i, place) in places.iter().enumerate() {
        let normed = k.fmul(o[i], scale);
        let normed = k.fmul(normed, norm[i]);
        let gate = k.silu(z[i]);
        let value = k.fmul(normed, gate);
        place.store(k, out, value);
    }
}
