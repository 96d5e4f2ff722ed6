//! `gated_delta_net` by blocks of threads.
//!
//! Of short runs; long ones are for [`super::delta_long`]:
//!
//! block    one key head of one sequence, with the value heads that share it, so a convolution's window has one owner; tokens in blocks of 8
//! thread   some rows of a few columns of S, in registers for the whole run; a warp reads whole lines of a state
//! replay   S ← fma(k, d, α S) for the accepted tokens of a tentative step, with the kept k, d, α
//! conv     a thread a channel of q, k and v; its window in registers; SiLU; to shared memory
//! norm     a warp a token: q ← scale · q / |q|,  k ← k / |k|,  k·q
//! sweep    token by token: y = Sᵀk,  w = Sᵀq  summed over the parts of a column, d = β (v − α y);  o = α w + (k·q) d;  S ← fma(k, d, α S)
//! epilogue a warp a token and value head: out = rms_norm(o, norm) · silu(z)
//! traffic  2 · 4 · head_k_dim · head_v_dim bytes a head and sequence: bound by memory
//!
//! What is kept of tentative tokens is as in [`super::super::delta_rule`].

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::{Sym, pad};
use nextc_ir::types::TENTATIVE_TOKENS;

use super::super::LowerError;
use super::super::delta_rule::{Mixer, Run, SequencePorts, Stream};
use super::super::matmul::{mean_rsqrt, row_ptr};
use super::super::ports::{Lowered, Ports, Site};
use super::delta_long;
use super::{Place, across, begin, lanes_of, warp_sum};

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
/// Tokens of a short run, at most.
pub const SHORT: u64 = TENTATIVE_TOKENS;

/// How the states of a block lie in the registers of its threads.
#[derive(Clone, Copy)]
pub struct Tile {
    /// Value heads that are done together; those that share a key head are done in so many turns.
    pub heads: u64,
    turns: u64,
    /// Columns of these heads, padding of a head included; of long runs, those of one slice of a head.
    pub columns: u64,
    /// Columns of a thread.
    pub own: u64,
    /// Threads that a column is shared by.
    pub parts: u64,
    /// Rows of a thread.
    pub rows: u64,
    /// Whether the threads of a column are neighbours; else they are in different warps.
    pub neighbours: bool,
}

impl Tile {
    /// The tile of short runs with the fewest turns; `None` if a single head does not fit.
    fn short(mixer: &Mixer) -> Option<Self> {
        let (shared, dv) = (mixer.shared_heads(), pad(mixer.v.width));
        let (parts, rows) = Self::parts(mixer);
        let own = [OWN_COLUMNS, 2, 1].into_iter().find(|own| rows * own <= MOST_HELD)?;
        let tile = |heads: u64| Self {
            heads,
            turns: shared / heads,
            columns: heads * dv,
            own,
            parts,
            rows,
            neighbours: false,
        };
        let heads = (1..=shared).rev().filter(|h| shared.is_multiple_of(*h));
        heads.map(tile).find(|t| t.threads() <= MOST_THREADS && t.threads() >= BLOCK * t.heads)
    }

    /// The tile of `columns` columns of a head in a long run.
    pub fn long(mixer: &Mixer, columns: u64) -> Self {
        let (parts, rows) = Self::parts(mixer);
        Self { heads: 1, turns: 1, columns, own: 1, parts, rows, neighbours: true }
    }

    /// Threads that share a column, and rows of each: the order in which a column is summed, the same in all blocks.
    fn parts(mixer: &Mixer) -> (u64, u64) {
        let dk = mixer.k.width;
        let parts = [MOST_PARTS, 4, 2].into_iter().find(|p| dk.is_multiple_of(4 * p)).unwrap_or(1);
        (parts, dk / parts)
    }

    /// Columns of a warp, and of the warps that share them.
    fn warp_columns(&self) -> u64 {
        if self.neighbours { 32 / self.parts * self.own } else { 32 * self.own }
    }

    /// Threads of a block.
    pub fn threads(&self) -> u64 {
        let warps = self.columns.div_ceil(self.warp_columns());
        32 * if self.neighbours { warps } else { warps * self.parts }
    }

    /// Columns with those that nobody has.
    fn padded_columns(&self) -> u64 {
        self.columns.next_multiple_of(self.warp_columns())
    }
}

/// `gated_delta_net`: a kernel for short runs, and those of long ones.
pub fn lower_gated_delta_net(site: &Site<'_>) -> Option<Result<Lowered, LowerError>> {
    let mut ports = Ports::default();
    let mixer = Mixer::ports(site, &mut ports);
    let tile = Tile::short(&mixer)?;
    let sequences = SequencePorts::new(&mut ports);
    let long = delta_long::Long::of(&mixer, &sequences);
    let heads = mixer.q.heads;
    let mut k = ports.builder(site, Extent::from(Sym::B) * heads.into());
    k.threads(tile.threads() as u32);
    let place = Place::here(&mut k);
    let task = k.task();
    let (b, head) = (k.div_const(task, heads), k.rem_const(task, heads));
    let smem = Smem::short(&mut k, &mixer, &tile);
    begin(&mut k);
    let run = sequences.run(&mut k, b);
    let zero = k.const_i64(0);
    let live = k.cmp(Pred::Ge, run.slot, zero);
    let some = k.cmp(Pred::Lt, run.begin, run.end);
    let is_mine = match long {
        Some(_) => {
            let is_short = short_run(&mut k, &run);
            k.and(some, is_short)
        }
        None => some,
    };
    let block = Block { mixer: &mixer, tile, place, run, head, slice: zero, smem };
    k.if_then(is_mine, |k| {
        k.if_else(
            live,
            |k| {
                block.run(k);
                Vec::new()
            },
            |k| {
                block.zero_out(k);
                Vec::new()
            },
        );
    });
    let short = ports.clone().finish(k.finish());
    Some(Ok(match long {
        Some(long) => short.then(long.kernels(site, &ports)),
        None => short,
    }))
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
    /// Of short runs only.
    short: Option<Short>,
}

/// What the threads of a block share in short runs.
#[derive(Clone, Copy)]
struct Short {
    /// `[BLOCK][columns]`.
    o: Val,
    /// `[parts][2][columns]`: `Sᵀk` and `Sᵀq` of the parts.
    parts: Val,
    /// `[2][columns]`: their sums.
    sums: Val,
}

impl Smem {
    /// What all blocks share.
    pub fn alloc(k: &mut KernelBuilder, mixer: &Mixer, tile: &Tile) -> Self {
        let mut array = |elems: u64| k.shared(DType::F32, elems);
        Self {
            tokens: array(BLOCK * (2 * pad(mixer.k.width) + tile.columns)),
            kq: array(BLOCK),
            alpha: array(BLOCK * tile.heads),
            beta: array(BLOCK * tile.heads),
            short: None,
        }
    }

    fn short(k: &mut KernelBuilder, mixer: &Mixer, tile: &Tile) -> Self {
        let all = Self::alloc(k, mixer, tile);
        let columns = tile.padded_columns();
        let mut array = |elems: u64| k.shared(DType::F32, elems);
        let short =
            Short { o: array(BLOCK * tile.columns), parts: array(2 * tile.parts * columns), sums: array(2 * columns) };
        Self { short: Some(short), ..all }
    }
}

/// A channel of a convolution that a thread owns.
struct Channel {
    /// Its input of token 0, and elements from one token to the next.
    x: (Val, Val),
    /// Its oldest tap; the others follow as far apart as tokens do.
    weights: Val,
    /// The oldest place of its window, and elements from one to the next.
    window: (Val, Val),
    /// Its output of the block's first token.
    out: Val,
    /// Whether the thread has it alone; else it only computes what another does too.
    owned: Val,
    /// Whether its window is to be moved on this turn.
    moves: Val,
}

/// Some value heads that share a key head: what one turn is about.
pub struct Turn {
    /// The first value head.
    pub first_head: Val,
    /// The columns of this thread.
    own: Vec<Column>,
    /// Its part of each.
    part: Val,
    channels: Vec<Channel>,
}

/// A column of a thread.
struct Column {
    /// Its number among those of the block, and in its value head.
    lane: Val,
    column: Val,
    /// Whether there is such a column; else it is the last one.
    live: Val,
    /// Pointer to the state of its head.
    state: Val,
}

/// A block of tokens.
pub struct Tokens {
    /// The first, and how many.
    pub first: Val,
    /// See `first`.
    pub count: Val,
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
    /// The slice of a value head, in long runs.
    pub slice: Val,
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
        2 * self.key_elems() + self.tile.columns
    }

    fn zero_out(&self, k: &mut KernelBuilder) {
        let zero = k.const_f32(0.0);
        let (i, elems) = (k.const_i64(0), k.index(self.mixer.shared_heads() * pad(self.mixer.v.width)));
        let head = self.mixer.value_head(k, self.head, i);
        k.for_each((self.run.begin, self.run.end, 1), |k, t| {
            let out = self.mixer.out_row(k, t, head);
            k.for_each((self.place.thread, elems, self.tile.threads()), |k, c| k.store(out, c, zero));
        });
    }

    /// All tokens of the sequence.
    fn run(&self, k: &mut KernelBuilder) {
        let fresh = self.run.is_fresh(k);
        k.for_range(self.tile.turns, 1, |k, turn| {
            let turn = self.turn(k, turn);
            let windows = turn.channels.iter().flat_map(|c| self.load_window(k, c, fresh)).collect::<Vec<_>>();
            let state = self.load_state(k, &turn, fresh);
            let state = self.replay(k, &turn, &state, fresh);
            let carried = [windows.clone(), state].concat();
            let left = k.for_carry((self.run.begin, self.run.end, BLOCK), &carried, |k, first, carried| {
                let (left, most) = (k.sub(self.run.end, first), k.index(BLOCK));
                let tokens = Tokens { first, count: k.min_i64(left, most) };
                let (windows, state) = carried.split_at(windows.len());
                self.tokens(k, &turn, &tokens, windows, state)
            });
            let (windows, state) = left.split_at(windows.len());
            let windows = windows.chunks((self.mixer.q.taps - 1).max(1) as usize);
            turn.channels.iter().zip(windows).for_each(|(c, window)| self.store_window(k, c, window));
            let settled = k.not(self.run.tentative);
            k.if_then(settled, |k| self.store_state(k, &turn, state));
            // before the next turn uses the same shared memory
            k.barrier();
        });
    }

    fn turn(&self, k: &mut KernelBuilder, turn: Val) -> Turn {
        let skipped = k.mul_const(turn, self.tile.heads);
        let first_head = self.mixer.value_head(k, self.head, skipped);
        let last_turn = k.index(self.tile.turns - 1);
        let last_turn = k.cmp(Pred::Eq, turn, last_turn);
        let channels = self.channels(k, first_head, last_turn);
        Turn { channels, ..self.turn_of(k, first_head) }
    }

    /// What is about the value heads from `first_head` on, without channels.
    pub fn turn_of(&self, k: &mut KernelBuilder, first_head: Val) -> Turn {
        let (mixer, tile) = (self.mixer, &self.tile);
        let width = pad(mixer.v.width);
        let (which, of) =
            if tile.neighbours { (self.place.thread, tile.own) } else { (self.place.warp, 32 * tile.own) };
        let (group, part) = (k.div_const(which, tile.parts), k.rem_const(which, tile.parts));
        let first = k.mul_const(group, of);
        let first = if tile.neighbours { first } else { k.add(first, self.place.lane) };
        let step = if tile.neighbours { 1 } else { 32 };
        let skipped = k.mul_const(self.slice, tile.columns);
        let own = (0..tile.own)
            .map(|i| {
                let (lane, columns) = (k.add_const(first, i * step), k.index(tile.columns));
                let live = k.cmp(Pred::Lt, lane, columns);
                let last = k.index(tile.columns - 1);
                let lane = k.min_i64(lane, last);
                let (head, column) = (k.div_const(lane, width), k.rem_const(lane, width));
                let value_head = k.add(first_head, head);
                let column = k.add(column, skipped);
                Column { lane, column, live, state: mixer.state(k, self.run.slot, value_head) }
            })
            .collect();
        Turn { first_head, own, part, channels: Vec::new() }
    }

    /// The channels of this thread: q, then k, then v of the turn's heads.
    fn channels(&self, k: &mut KernelBuilder, first_head: Val, last_turn: Val) -> Vec<Channel> {
        let (mixer, keys) = (self.mixer, self.key_elems());
        let streams = [(&mixer.q, self.head, 0), (&mixer.k, self.head, keys), (&mixer.v, first_head, 2 * keys)];
        (0..self.row_elems())
            .step_by(self.tile.threads() as usize)
            .map(|from| {
                let channel = k.add_const(self.place.thread, from);
                let total = k.index(self.row_elems());
                let owned = k.cmp(Pred::Lt, channel, total);
                let last = k.index(self.row_elems() - 1);
                let channel = k.min_i64(channel, last);
                let ends = [keys, 2 * keys].map(|end| {
                    let end = k.index(end);
                    k.cmp(Pred::Lt, channel, end)
                });
                let places = streams.map(|(s, head, begin)| self.stream_place(k, s, head, (channel, begin)));
                let mut choose = |f: fn(&StreamPlace) -> Val| {
                    let [q, key, v] = [f(&places[0]), f(&places[1]), f(&places[2])];
                    let rest = k.select(ends[1], key, v);
                    k.select(ends[0], q, rest)
                };
                let (x, row, w, window) = (choose(|p| p.x), choose(|p| p.row), choose(|p| p.w), choose(|p| p.window));
                let not_key = k.not(ends[1]);
                Channel {
                    x: (x, row),
                    weights: w,
                    window: (window, row),
                    out: row_ptr(k, self.smem.tokens, channel, 1),
                    owned,
                    moves: k.or(last_turn, not_key),
                }
            })
            .collect()
    }

    /// Where channel `channel - begin` of a head lies; meaningless, but in the same tensor, for a channel of another stream.
    fn stream_place(&self, k: &mut KernelBuilder, s: &Stream, head: Val, (channel, begin): (Val, u64)) -> StreamPlace {
        let begin = k.index(begin);
        let at = k.sub(channel, begin);
        let (x, w, window) = (k.param(s.x), k.param(s.w), s.window(k, self.run.slot, head));
        let [x, w] = [x, w].map(|p| row_ptr(k, p, head, pad(s.width)));
        let [x, w, window] = [x, w, window].map(|p| row_ptr(k, p, at, 1));
        StreamPlace { x, w, window, row: k.index(s.row()) }
    }

    /// A channel's window as the accepted tokens have left it; zeros where the sequence begins.
    fn load_window(&self, k: &mut KernelBuilder, channel: &Channel, fresh: Val) -> Vec<Val> {
        let (window, row) = channel.window;
        let load = |k: &mut KernelBuilder, i: u64| {
            let place = k.add_const(self.run.replay, i);
            let at = k.mul(place, row);
            k.load_f32(window, at)
        };
        let rows = 0..self.mixer.q.taps - 1;
        let (zero, begun) = (k.const_f32(0.0), k.not(fresh));
        let loads = k.and(begun, channel.owned);
        k.if_else(loads, |k| rows.clone().map(|i| load(k, i)).collect(), |_| rows.clone().map(|_| zero).collect())
    }

    fn store_window(&self, k: &mut KernelBuilder, channel: &Channel, values: &[Val]) {
        let (window, row) = channel.window;
        let stores = k.and(channel.owned, channel.moves);
        k.if_then(stores, |k| {
            for (i, &x) in (0..).zip(values) {
                let i = k.index(i);
                let at = k.mul(i, row);
                k.store(window, at, x);
            }
        });
    }

    /// Index of row `i` of this thread in a column: rows lie in chunks, chunk by chunk those of all parts.
    fn state_index(&self, k: &mut KernelBuilder, turn: &Turn, column: &Column, i: u64) -> Val {
        let (width, chunk) = (pad(self.mixer.v.width), self.chunk() as u64);
        let row = i / chunk * chunk * self.tile.parts + i % chunk;
        let first = k.mul_const(turn.part, chunk * width);
        let first = k.add(first, column.column);
        k.add_const(first, row * width)
    }

    /// The state: row by row, of each this thread's columns.
    pub fn load_state(&self, k: &mut KernelBuilder, turn: &Turn, fresh: Val) -> Vec<Val> {
        let (zero, begun) = (k.const_f32(0.0), k.not(fresh));
        let columns: Vec<Vec<Val>> = turn
            .own
            .iter()
            .map(|column| {
                let loads = k.and(begun, column.live);
                let load = |k: &mut KernelBuilder, i| {
                    let at = self.state_index(k, turn, column, i);
                    k.load_f32(column.state, at)
                };
                let rows = 0..self.tile.rows;
                k.if_else(
                    loads,
                    |k| rows.clone().map(|i| load(k, i)).collect(),
                    |_| rows.clone().map(|_| zero).collect(),
                )
            })
            .collect();
        (0..self.tile.rows as usize).flat_map(|i| columns.iter().map(move |column| column[i])).collect()
    }

    /// Stores what [`Self::load_state`] gives.
    pub fn store_state(&self, k: &mut KernelBuilder, turn: &Turn, state: &[Val]) {
        for (j, column) in turn.own.iter().enumerate() {
            k.if_then(column.live, |k| {
                for (i, row) in (0..).zip(state.chunks(turn.own.len())) {
                    let at = self.state_index(k, turn, column, i);
                    k.store(column.state, at, row[j]);
                }
            });
        }
    }

    /// The state after the accepted tokens; in memory too, where it is not written at the end.
    pub fn replay(&self, k: &mut KernelBuilder, turn: &Turn, state: &[Val], fresh: Val) -> Vec<Val> {
        let (zero, mixer) = (k.const_i64(0), self.mixer);
        let state = k.for_carry((zero, self.run.replay, 1), state, |k, i, state| {
            let updates: Vec<[Val; 3]> = turn.own.iter().map(|c| mixer.update(k, c.state, i)).collect();
            let d: Vec<Val> = turn.own.iter().zip(&updates).map(|(c, u)| k.load_f32(u[1], c.column)).collect();
            let alpha: Vec<Val> = updates.iter().map(|u| k.load_f32(u[2], zero)).collect();
            let keys: Vec<Val> = updates.iter().map(|u| u[0]).collect();
            let one_head = pad(mixer.v.width).is_multiple_of(32 * self.tile.own) || self.tile.own == 1;
            self.apply(k, turn, state, if one_head { &keys[..1] } else { &keys }, (&d, &alpha))
        });
        let kept = k.cmp(Pred::Gt, self.run.replay, zero);
        let changed = k.or(kept, fresh);
        let stays = k.and(changed, self.run.tentative);
        k.if_then(stays, |k| self.store_state(k, turn, &state));
        state
    }

    /// `S ← fma(k, d, α S)`: the one place where a state changes. `keys` point to k, one for all of the thread's columns or one for each; d and α
    /// are those of each.
    fn apply(
        &self,
        k: &mut KernelBuilder,
        turn: &Turn,
        state: &[Val],
        keys: &[Val],
        (d, alpha): (&[Val], &[Val]),
    ) -> Vec<Val> {
        let mut next = Vec::with_capacity(state.len());
        for (i, chunk) in state.chunks(self.chunk() * d.len()).enumerate() {
            let keys: Vec<Vec<Val>> = keys.iter().map(|&key| self.load_rows(k, turn, key, i)).collect();
            for (r, row) in chunk.chunks(d.len()).enumerate() {
                for (j, &s) in row.iter().enumerate() {
                    let decayed = k.fmul(alpha[j], s);
                    next.push(k.fma(keys[j % keys.len()][r], d[j], decayed));
                }
            }
        }
        next
    }

    /// Rows that are loaded at once.
    fn chunk(&self) -> usize {
        if self.tile.rows.is_multiple_of(4) { 4 } else { 1 }
    }

    /// Chunk `i` of this thread's rows of a vector over rows.
    fn load_rows(&self, k: &mut KernelBuilder, turn: &Turn, from: Val, i: usize) -> Vec<Val> {
        let lanes = self.chunk() as u64;
        let first = k.mul_const(turn.part, lanes);
        let at = k.add_const(first, i as u64 * lanes * self.tile.parts);
        let rows = k.load(DType::F32, lanes as u32, from, at);
        lanes_of(k, rows)
    }

    /// A block of tokens; gives the windows and the state after it.
    fn tokens(&self, k: &mut KernelBuilder, turn: &Turn, tokens: &Tokens, windows: &[Val], state: &[Val]) -> Vec<Val> {
        let per = (self.mixer.q.taps - 1) as usize;
        let inputs: Vec<Vec<Val>> = turn.channels.iter().map(|c| self.inputs(k, c, tokens)).collect();
        self.gates(k, turn, tokens);
        let mut next = Vec::with_capacity(windows.len() + state.len());
        for (i, (channel, inputs)) in turn.channels.iter().zip(&inputs).enumerate() {
            let history = [&windows[i * per..(i + 1) * per], inputs].concat();
            self.convolve(k, channel, tokens, &history);
            next.extend(self.moved_window(k, tokens, &history));
        }
        k.barrier();
        self.norms(k, tokens);
        k.barrier();
        let zero = k.const_i64(0);
        let state = k.for_carry((zero, tokens.count, 1), state, |k, i, state| self.sweep(k, turn, (tokens, i), state));
        k.barrier();
        self.epilogue(k, turn, tokens);
        next.extend(state);
        next
    }

    /// A channel's inputs of the block; of tokens that do not exist, the last one's.
    fn inputs(&self, k: &mut KernelBuilder, channel: &Channel, tokens: &Tokens) -> Vec<Val> {
        let (x, row) = channel.x;
        let one = k.const_i64(1);
        let last = k.sub(self.run.end, one);
        (0..BLOCK)
            .map(|i| {
                let t = k.add_const(tokens.first, i);
                let t = k.min_i64(t, last);
                let at = k.mul(t, row);
                k.load_f32(x, at)
            })
            .collect()
    }

    /// α and β of the block: a thread a token and value head; there are threads enough.
    fn gates(&self, k: &mut KernelBuilder, turn: &Turn, tokens: &Tokens) {
        let pair = self.place.thread;
        let pairs = k.mul_const(tokens.count, self.tile.heads);
        let exists = k.cmp(Pred::Lt, pair, pairs);
        k.if_then(exists, |k| {
            let (i, head) = (k.div_const(pair, self.tile.heads), k.rem_const(pair, self.tile.heads));
            let (t, head) = (k.add(tokens.first, i), k.add(turn.first_head, head));
            let (alpha, beta) = self.mixer.gate(k, t, head);
            k.store(self.smem.alpha, pair, alpha);
            k.store(self.smem.beta, pair, beta);
        });
    }

    /// `silu(conv1d(x))` of one channel; tentative inputs go behind the window. `history` is the window, then the inputs.
    fn convolve(&self, k: &mut KernelBuilder, channel: &Channel, tokens: &Tokens, history: &[Val]) {
        let taps = self.mixer.q.taps as usize;
        let weights: Vec<Val> = (0..self.mixer.q.taps)
            .map(|tap| {
                let tap = k.index(tap);
                let at = k.mul(tap, channel.x.1);
                k.load_f32(channel.weights, at)
            })
            .collect();
        for i in 0..BLOCK {
            let number = k.index(i);
            let exists = k.cmp(Pred::Lt, number, tokens.count);
            let writes = k.and(exists, channel.owned);
            k.if_then(writes, |k| {
                let seen = &history[i as usize..i as usize + taps];
                let zero = k.const_f32(0.0);
                let sum = weights.iter().zip(seen).fold(zero, |sum, (&w, &x)| k.fma(w, x, sum));
                let value = k.silu(sum);
                let at = k.index(i * self.row_elems());
                k.store(channel.out, at, value);
                let keeps = k.and(self.run.tentative, channel.moves);
                k.if_then(keeps, |k| {
                    let (window, row) = channel.window;
                    let place = k.index(taps as u64 - 1 + i);
                    let at = k.mul(place, row);
                    k.store(window, at, seen[taps - 1]);
                });
            });
        }
    }

    /// The window after the block: its tokens further, or where it was if these are tentative.
    fn moved_window(&self, k: &mut KernelBuilder, tokens: &Tokens, history: &[Val]) -> Vec<Val> {
        let none = k.const_i64(0);
        let moved = k.select(self.run.tentative, none, tokens.count);
        let is: Vec<Val> = (1..=BLOCK)
            .map(|n| {
                let n = k.index(n);
                k.cmp(Pred::Eq, moved, n)
            })
            .collect();
        let places = 0..history.len() - BLOCK as usize;
        places
            .map(|j| is.iter().enumerate().fold(history[j], |value, (n, &is)| k.select(is, history[j + n + 1], value)))
            .collect()
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
            let rows = [(q, self.mixer.scale), (key, 1.0)].map(|(x, scale)| self.normed(k, x, scale));
            let zero = k.const_f32(0.0);
            let kq = rows[1].iter().zip(&rows[0]).fold(zero, |sum, (&x, &y)| k.fma(x, y, sum));
            let kq = warp_sum(k, kq);
            let first = k.const_i64(0);
            let writes = k.cmp(Pred::Eq, self.place.lane, first);
            k.if_then(writes, |k| k.store(self.smem.kq, i, kq));
        });
    }

    /// `x ← scale · x / |x|` by a warp; gives the new elements of this thread, zeros where it has none.
    fn normed(&self, k: &mut KernelBuilder, x: Val, scale: f32) -> Vec<Val> {
        let places = self.place.places(k, self.key_elems());
        let elements: Vec<Val> = places.iter().map(|p| p.load(k, x)).collect();
        let normed = normed(k, self.mixer, &elements, scale);
        places.iter().zip(&normed).for_each(|(p, &y)| p.store(k, x, y));
        normed
    }

    /// Token `i` of the block through the recurrence; gives the state after it.
    pub fn sweep(&self, k: &mut KernelBuilder, turn: &Turn, (tokens, i): (&Tokens, Val), state: &[Val]) -> Vec<Val> {
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
        let (mut d, mut alphas) = (Vec::with_capacity(own), Vec::with_capacity(own));
        for (j, column) in turn.own.iter().enumerate() {
            let head = k.div_const(column.lane, pad(self.mixer.v.width));
            let pair = k.mul_const(i, tile.heads);
            let pair = k.add(pair, head);
            let (alpha, beta) = (k.load_f32(self.smem.alpha, pair), k.load_f32(self.smem.beta, pair));
            let v = k.load_f32(v, column.lane);
            let decayed = k.fmul(alpha, y[j]);
            let error = k.fsub(v, decayed);
            let update = k.fmul(beta, error);
            let mixed = k.fmul(alpha, w[j]);
            let out = k.fma(kq, update, mixed);
            let first = k.const_i64(0);
            let writes = k.cmp(Pred::Eq, turn.part, first);
            let writes = k.and(writes, column.live);
            k.if_then(writes, |k| self.say(k, turn, (tokens, i), column, (out, update)));
            d.push(update);
            alphas.push(alpha);
        }
        if self.smem.short.is_some() {
            k.if_then(self.run.tentative, |k| self.keep(k, turn, i, key));
        }
        self.apply(k, turn, state, &[key], (&d, &alphas))
    }

    /// Stores what a column says of token `i`, and keeps its update where that may have to be replayed.
    fn say(
        &self,
        k: &mut KernelBuilder,
        turn: &Turn,
        (tokens, i): (&Tokens, Val),
        column: &Column,
        (out, update): (Val, Val),
    ) {
        let Some(short) = self.smem.short else {
            let t = k.add(tokens.first, i);
            let row = self.mixer.out_row(k, t, turn.first_head);
            k.store(row, column.column, out);
            return;
        };
        let row = row_ptr(k, short.o, i, self.tile.columns);
        k.store(row, column.lane, out);
        k.if_then(self.run.tentative, |k| {
            let [_, kept, _] = self.mixer.update(k, column.state, i);
            k.store(kept, column.column, update);
        });
    }

    /// Sums over the parts of this thread's columns, as a tree: those of parts `p` and `p ^ mask`, as in [`across`].
    fn sum_parts(&self, k: &mut KernelBuilder, turn: &Turn, sums: [Vec<Val>; 2]) -> [Vec<Val>; 2] {
        let tile = &self.tile;
        let masks: Vec<u32> = [4, 2, 1].into_iter().filter(|&mask| u64::from(mask) < tile.parts).collect();
        let Some(short) = self.smem.short else {
            let whole = |k: &mut KernelBuilder, x: Val| across(k, &masks, x, |k, a, b| k.fadd(a, b));
            return sums.map(|sums| sums.into_iter().map(|x| whole(k, x)).collect());
        };
        let columns = tile.padded_columns();
        let mine = row_ptr(k, short.parts, turn.part, 2 * columns);
        let lanes: Vec<Val> = self.padded_lanes(k, turn);
        for (which, sums) in (0..).zip(&sums) {
            for (&lane, &x) in lanes.iter().zip(sums) {
                let at = k.add_const(lane, which * columns);
                k.store(mine, at, x);
            }
        }
        k.barrier();
        let items = k.index(2 * columns);
        k.for_each((self.place.thread, items, tile.threads()), |k, item| {
            let load = |part| {
                let at = k.add_const(item, part * 2 * columns);
                k.load_f32(short.parts, at)
            };
            let mut parts: Vec<Val> = (0..tile.parts).map(load).collect();
            while parts.len() > 1 {
                let (low, high) = parts.split_at(parts.len() / 2);
                parts = low.iter().zip(high).map(|(&a, &b)| k.fadd(a, b)).collect();
            }
            k.store(short.sums, item, parts[0]);
        });
        k.barrier();
        [0, 1].map(|which| {
            let load = |&lane: &Val| {
                let at = k.add_const(lane, which * columns);
                k.load_f32(short.sums, at)
            };
            lanes.iter().map(load).collect()
        })
    }

    /// The places of a thread's columns among all, those that nobody has included.
    fn padded_lanes(&self, k: &mut KernelBuilder, turn: &Turn) -> Vec<Val> {
        let group = k.div_const(self.place.warp, self.tile.parts);
        let first = k.mul_const(group, 32 * self.tile.own);
        let first = k.add(first, self.place.lane);
        (0..turn.own.len() as u64).map(|i| k.add_const(first, 32 * i)).collect()
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
                let pair = k.mul_const(i, self.tile.heads);
                let pair = k.add(pair, head);
                let alpha = k.load_f32(self.smem.alpha, pair);
                k.store(kept_alpha, zero, alpha);
            });
        });
    }

    /// The norms of what the block says of its tokens: a warp a token and value head.
    fn epilogue(&self, k: &mut KernelBuilder, turn: &Turn, tokens: &Tokens) {
        let Some(short) = self.smem.short else { return };
        let width = pad(self.mixer.v.width);
        let pairs = k.mul_const(tokens.count, self.tile.heads);
        k.for_each((self.place.warp, pairs, self.tile.threads() / 32), |k, pair| {
            let (i, head) = (k.div_const(pair, self.tile.heads), k.rem_const(pair, self.tile.heads));
            let (t, value_head) = (k.add(tokens.first, i), k.add(turn.first_head, head));
            let o = row_ptr(k, short.o, pair, width);
            norm_out(k, self.mixer, &self.place, (t, value_head), o);
        });
    }
}

/// `scale · x / |x|` of the elements that the threads of a warp have.
pub fn normed(k: &mut KernelBuilder, mixer: &Mixer, elements: &[Val], scale: f32) -> Vec<Val> {
    let zero = k.const_f32(0.0);
    let sum = elements.iter().fold(zero, |sum, &x| k.fma(x, x, sum));
    let sum = warp_sum(k, sum);
    let eps = k.const_f32(mixer.eps);
    let sum = k.fadd(sum, eps);
    let root = k.rsqrt(sum);
    let scale = k.const_f32(scale);
    let factor = k.fmul(root, scale);
    elements.iter().map(|&x| k.fmul(x, factor)).collect()
}

/// `out = rms_norm(o, norm) · silu(z)` of a value head of token `t`, by a warp.
pub fn norm_out(k: &mut KernelBuilder, mixer: &Mixer, place: &Place, (t, head): (Val, Val), o: Val) {
    let width = pad(mixer.v.width);
    let (norm, z) = (k.param(mixer.norm), k.param(mixer.z));
    let z = row_ptr(k, z, t, mixer.v.row());
    let z = row_ptr(k, z, head, width);
    let places = place.places(k, width);
    let [o, norm, z] = [o, norm, z].map(|p| places.iter().map(|at| at.load(k, p)).collect::<Vec<_>>());
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

/// Where a channel would lie if it were one of a stream's.
struct StreamPlace {
    x: Val,
    w: Val,
    window: Val,
    row: Val,
}
