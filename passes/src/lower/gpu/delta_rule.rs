//! `gated_delta_net` by blocks of threads.
//!
//! block    of short runs: one key head of one sequence, with the value heads that share it (so a convolution's window has one owner);
//!          of long runs: some columns of one value head; tokens in blocks of 8
//! thread   some rows of a few columns of S, in registers for the whole run; neighbouring threads have the other rows
//! replay   S ← fma(k, d, α S) for the accepted tokens of a tentative step, with the kept k, d, α
//! conv     a thread a channel of q, k and v; its window in registers; SiLU; to shared memory
//! norm     a warp a token: q ← scale · q / |q|,  k ← k / |k|,  k·q
//! sweep    token by token: y = Sᵀk,  w = Sᵀq  summed over the parts of a column, d = β (v − α y);  o = α w + (k·q) d;  S ← fma(k, d, α S)
//! epilogue a warp a token and value head: out = rms_norm(o, norm) · silu(z); of long runs in the tail, which moves their windows too
//! traffic  2 · 4 · head_k_dim · head_v_dim bytes a head and sequence: bound by memory at one token, by arithmetic in long runs
//!
//! What is kept of tentative tokens is as in [`super::super::delta_rule`].

use nextc_ir::DType;
use nextc_ir::kernel::{Kernel, KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::{LANES, Sym, pad};
use nextc_ir::types::TENTATIVE_TOKENS;

use super::super::LowerError;
use super::super::delta_rule::{Mixer, Run, SequencePorts, Stream};
use super::super::matmul::{mean_rsqrt, row_ptr};
use super::super::ports::{Lowered, Ports, Site};
use super::attention::sequence_of;
use super::{Place, across, begin, lanes_of, warp_sum};

/// Tokens between two passes over the convolution and the norms.
const BLOCK: u64 = TENTATIVE_TOKENS;
/// Most threads of a block: with 128 registers each they fill a multiprocessor.
const MOST_THREADS: u64 = 512;
/// Most elements of S that a thread holds.
const MOST_HELD: u64 = 64;
/// Threads that share a column, at most.
const MOST_PARTS: u64 = 8;
/// Columns of a thread in blocks of short runs and of long ones, at most.
const THREAD_COLUMNS: [u64; 2] = [4, 1];
/// Threads of a block of a long run, at most.
const LONG_THREADS: u64 = 256;
/// Tokens of a short run, at most.
const SHORT: u64 = TENTATIVE_TOKENS;

/// How the states of a block lie in the registers of its threads.
#[derive(Clone, Copy)]
struct Tile {
    /// Whether blocks are those of long runs.
    long: bool,
    /// Value heads that are done together; those that share a key head are done in so many turns.
    heads: u64,
    turns: u64,
    /// Columns of these heads, padding of a head included; of long runs, those of one slice of a head.
    columns: u64,
    /// Slices of a head.
    slices: u64,
    /// Columns of a thread.
    own: u64,
    /// Threads that a column is shared by.
    parts: u64,
    /// Rows of a thread.
    rows: u64,
}

impl Tile {
    /// The tile of short runs with the fewest turns; `None` if a single head does not fit.
    fn short(mixer: &Mixer) -> Option<Self> {
        let (shared, dv) = (mixer.shared_heads(), pad(mixer.v.width));
        let of = |heads: u64| Self::of(mixer, (heads, heads * dv), THREAD_COLUMNS[0]);
        let heads = (1..=shared).rev().filter(|h| shared.is_multiple_of(*h));
        heads.filter_map(of).find(|t| t.threads() <= MOST_THREADS && t.threads() >= BLOCK * t.heads)
    }

    /// The tile of long runs, where there is one.
    fn long(mixer: &Mixer) -> Option<Self> {
        let dv = pad(mixer.v.width);
        let slices = (1..=dv / LANES).filter(|n| (dv / LANES).is_multiple_of(*n));
        let of = |slices: u64| Some(Self { long: true, slices, ..Self::of(mixer, (1, dv / slices), THREAD_COLUMNS[1])? });
        // a window is taken from the run's own tokens
        let takes = mixer.q.taps <= SHORT;
        slices.filter_map(of).find(|t| takes && t.threads() <= LONG_THREADS)
    }

    fn of(mixer: &Mixer, (heads, columns): (u64, u64), most_own: u64) -> Option<Self> {
        let dk = mixer.k.width;
        let parts = [MOST_PARTS, 4, 2, 1].into_iter().find(|p| dk.is_multiple_of(4 * p) || (*p == 1))?;
        let rows = dk / parts;
        let own = [most_own, 2, 1].into_iter().find(|own| rows * own <= MOST_HELD)?;
        Some(Self { long: false, heads, turns: mixer.shared_heads() / heads, columns, slices: 1, own, parts, rows })
    }

    /// Columns of a warp.
    fn warp_columns(&self) -> u64 {
        32 / self.parts * self.own
    }

    fn threads(&self) -> u64 {
        self.columns.div_ceil(self.warp_columns()) * 32
    }
}

/// `gated_delta_net`: a kernel for short runs, and one for long ones.
pub fn lower_gated_delta_net(site: &Site<'_>) -> Option<Result<Lowered, LowerError>> {
    let mut ports = Ports::default();
    let mixer = Mixer::ports(site, &mut ports);
    let (short, long) = (Tile::short(&mixer)?, Tile::long(&mixer));
    let sequences = SequencePorts::new(&mut ports);
    let heads = mixer.q.heads;
    let mut k = ports.builder(site, Extent::from(Sym::B) * heads.into());
    k.threads(short.threads() as u32);
    let place = Place::here(&mut k);
    let task = k.task();
    let (b, head) = (k.div_const(task, heads), k.rem_const(task, heads));
    let smem = Smem::alloc(&mut k, &mixer, &short);
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
    let block = Block { mixer: &mixer, tile: short, place, run, head, slice: zero, smem };
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
    let lowered = ports.clone().finish(k.finish());
    Some(Ok(match long {
        Some(tile) => lowered.then(ports.clone().finish(long_runs(site, &ports, &mixer, &sequences, tile))),
        None => lowered,
    }))
}

/// The kernel of long runs.
fn long_runs(site: &Site<'_>, ports: &Ports, mixer: &Mixer, sequences: &SequencePorts, tile: Tile) -> Kernel {
    let (heads, shared) = (mixer.v.heads, mixer.shared_heads());
    let only_long = |grid: Extent| grid.if_above(Sym::T, SHORT, 0.into());
    let grid = Extent::from(Sym::B) * (heads * tile.slices).into();
    let mut k = ports.builder_of(site, ".long", only_long(grid));
    k.threads(tile.threads() as u32);
    let place = Place::here(&mut k);
    let smem = Smem::alloc(&mut k, mixer, &tile);
    let task = k.task();
    let (pair, slice) = (k.div_const(task, tile.slices), k.rem_const(task, tile.slices));
    let (b, value_head) = (k.div_const(pair, heads), k.rem_const(pair, heads));
    begin(&mut k);
    let run = sequences.run(&mut k, b);
    let (zero, is_short) = (k.const_i64(0), short_run(&mut k, &run));
    let (is_long, live) = (k.not(is_short), k.cmp(Pred::Ge, run.slot, zero));
    let is_mine = k.and(is_long, live);
    let head = k.div_const(value_head, shared);
    let block = Block { mixer, tile, place, run, head, slice, smem };
    k.if_then(is_mine, |k| block.run_long(k, value_head));
    k.finish_with_tail_grid(only_long(Sym::T.into()), |k| {
        begin(k);
        let place = Place::here(k);
        let t = k.task();
        let b = sequence_of(k, sequences.cu_seqlens(), place.lane, t);
        let run = sequences.run(k, b);
        let is_short = short_run(k, &run);
        let is_long = k.not(is_short);
        let tail = Tail { mixer, threads: tile.threads(), place, run };
        k.if_then(is_long, |k| tail.run(k, t));
    })
}

/// Whether a sequence's run is one of few tokens.
fn short_run(k: &mut KernelBuilder, run: &Run) -> Val {
    let (tokens, most) = (k.sub(run.end, run.begin), k.index(SHORT));
    k.cmp(Pred::Le, tokens, most)
}

/// What the threads of a block share.
#[derive(Clone, Copy)]
struct Smem {
    /// `[BLOCK][q, k, v]`: the convolutions' outputs; q and k then normed.
    tokens: Val,
    /// `[BLOCK][columns]`; in short runs.
    o: Option<Val>,
    /// `[BLOCK]`: `k · q`.
    kq: Val,
    /// `[BLOCK][heads]`.
    alpha: Val,
    /// As `alpha`.
    beta: Val,
}

impl Smem {
    fn alloc(k: &mut KernelBuilder, mixer: &Mixer, tile: &Tile) -> Self {
        let mut array = |elems: u64| k.shared(DType::F32, elems);
        Self {
            tokens: array(BLOCK * (2 * pad(mixer.k.width) + tile.columns)),
            o: (!tile.long).then(|| array(BLOCK * tile.columns)),
            kq: array(BLOCK),
            alpha: array(BLOCK * tile.heads),
            beta: array(BLOCK * tile.heads),
        }
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
struct Turn {
    /// The first value head.
    first_head: Val,
    /// Of this thread: its first column among those of the block, and in its value head; and whether it has one.
    lane: Val,
    column: Val,
    live: Val,
    /// Of this thread: its part of a column.
    part: Val,
    /// Pointer to the state of its head.
    state: Val,
    channels: Vec<Channel>,
}

/// What a thread reads of a block of tokens.
struct Inputs {
    /// What α and β of its token and value head are made of.
    gates: [Val; 2],
    /// Its channels' inputs, each of all tokens.
    x: Vec<Val>,
}

impl Inputs {
    fn flat(&self) -> Vec<Val> {
        [&self.gates, self.x.as_slice()].concat()
    }

    fn of(flat: &[Val]) -> Self {
        Self { gates: [flat[0], flat[1]], x: flat[2..].to_vec() }
    }
}

/// A block of tokens.
struct Tokens {
    first: Val,
    count: Val,
}

/// A block of threads at work on a sequence.
struct Block<'a> {
    mixer: &'a Mixer,
    tile: Tile,
    place: Place,
    run: Run,
    head: Val,
    /// The slice of the value head.
    slice: Val,
    smem: Smem,
}

impl Block<'_> {
    fn key_elems(&self) -> u64 {
        pad(self.mixer.k.width)
    }

    /// Elements of one token in shared memory.
    fn row_elems(&self) -> u64 {
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
        let positions = k.param(self.run.positions);
        let (zero, position) = (k.const_i64(0), k.load_index(positions, self.run.begin));
        let fresh = k.cmp(Pred::Eq, position, zero);
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
                let inputs = self.inputs(k, &turn, first);
                let (windows, state) = self.tokens(k, &turn, &tokens, windows, &inputs, state);
                [windows, state].concat()
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

    /// All tokens of a long run. What it says of tokens is not normed yet; the windows stay, since other blocks begin with them too.
    fn run_long(&self, k: &mut KernelBuilder, value_head: Val) {
        let positions = k.param(self.run.positions);
        let (zero, position) = (k.const_i64(0), k.load_index(positions, self.run.begin));
        let fresh = k.cmp(Pred::Eq, position, zero);
        let never = k.cmp(Pred::Lt, zero, zero);
        let turn = self.turn_of(k, value_head, never);
        let windows = turn.channels.iter().flat_map(|c| self.load_window(k, c, fresh)).collect::<Vec<_>>();
        let state = self.load_state(k, &turn, fresh);
        let state = self.replay(k, &turn, &state, fresh);
        // what comes next is asked for before it is needed
        let inputs = self.inputs(k, &turn, self.run.begin).flat();
        let carried = [windows.clone(), inputs.clone(), state].concat();
        let left = k.for_carry((self.run.begin, self.run.end, BLOCK), &carried, |k, first, carried| {
            let (left, most) = (k.sub(self.run.end, first), k.index(BLOCK));
            let tokens = Tokens { first, count: k.min_i64(left, most) };
            let next = k.add_const(first, BLOCK);
            let next = self.inputs(k, &turn, next).flat();
            let (windows, rest) = carried.split_at(windows.len());
            let (inputs, state) = rest.split_at(inputs.len());
            let (windows, state) = self.tokens(k, &turn, &tokens, windows, &Inputs::of(inputs), state);
            [windows, next, state].concat()
        });
        self.store_state(k, &turn, &left[windows.len() + inputs.len()..]);
    }

    fn turn(&self, k: &mut KernelBuilder, turn: Val) -> Turn {
        let skipped = k.mul_const(turn, self.tile.heads);
        let first_head = self.mixer.value_head(k, self.head, skipped);
        let last_turn = k.index(self.tile.turns - 1);
        let last_turn = k.cmp(Pred::Eq, turn, last_turn);
        self.turn_of(k, first_head, last_turn)
    }

    /// What is about the value heads from `first_head` on.
    fn turn_of(&self, k: &mut KernelBuilder, first_head: Val, last_turn: Val) -> Turn {
        let (mixer, tile) = (self.mixer, &self.tile);
        let width = pad(mixer.v.width);
        let (group, part) = (k.div_const(self.place.thread, tile.parts), k.rem_const(self.place.thread, tile.parts));
        let lane = k.mul_const(group, tile.own);
        let columns = k.index(tile.columns);
        let live = k.cmp(Pred::Lt, lane, columns);
        let last = k.index(tile.columns - tile.own);
        let lane = k.min_i64(lane, last);
        let (head, column) = (k.div_const(lane, width), k.rem_const(lane, width));
        let skipped = k.mul_const(self.slice, tile.columns);
        let value_head = k.add(first_head, head);
        Turn {
            first_head,
            lane,
            column: k.add(column, skipped),
            live,
            part,
            state: mixer.state(k, self.run.slot, value_head),
            channels: self.channels(k, first_head, last_turn),
        }
    }

    /// The channels of this thread: q, then k, then v of the turn's heads.
    fn channels(&self, k: &mut KernelBuilder, first_head: Val, last_turn: Val) -> Vec<Channel> {
        let (mixer, keys, none) = (self.mixer, self.key_elems(), k.const_i64(0));
        let skipped = k.mul_const(self.slice, self.tile.columns);
        let streams = [
            (&mixer.q, self.head, 0, none),
            (&mixer.k, self.head, keys, none),
            (&mixer.v, first_head, 2 * keys, skipped),
        ];
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
                let places = streams.map(|(s, head, begin, skipped)| {
                    let channel = k.add(channel, skipped);
                    self.stream_place(k, s, head, (channel, begin))
                });
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

    /// Index of row `i` of this thread in its first column: rows lie in chunks, chunk by chunk those of all parts.
    fn state_index(&self, k: &mut KernelBuilder, turn: &Turn, i: u64) -> Val {
        let (width, chunk) = (pad(self.mixer.v.width), self.chunk() as u64);
        let row = i / chunk * chunk * self.tile.parts + i % chunk;
        let first = k.mul_const(turn.part, chunk * width);
        let first = k.add(first, turn.column);
        k.add_const(first, row * width)
    }

    /// The state, row by row, of each this thread's columns.
    fn load_state(&self, k: &mut KernelBuilder, turn: &Turn, fresh: Val) -> Vec<Val> {
        let (zero, begun) = (k.const_f32(0.0), k.not(fresh));
        let loads = k.and(begun, turn.live);
        let tile = self.tile;
        k.if_else(
            loads,
            |k| {
                let load = |i| {
                    let at = self.state_index(k, turn, i);
                    let columns = k.load(DType::F32, tile.own as u32, turn.state, at);
                    lanes_of(k, columns)
                };
                (0..tile.rows).flat_map(load).collect()
            },
            |_| vec![zero; (tile.rows * tile.own) as usize],
        )
    }

    fn store_state(&self, k: &mut KernelBuilder, turn: &Turn, state: &[Val]) {
        k.if_then(turn.live, |k| {
            for (i, columns) in (0..).zip(state.chunks(self.tile.own as usize)) {
                let at = self.state_index(k, turn, i);
                if let &[a, b, c, d] = columns {
                    let columns = k.quad([a, b, c, d]);
                    k.store(turn.state, at, columns);
                    continue;
                }
                for (j, &s) in (0..).zip(columns) {
                    let at = k.add_const(at, j);
                    k.store(turn.state, at, s);
                }
            }
        });
    }

    /// The state after the accepted tokens; in memory too, where it is not written at the end.
    fn replay(&self, k: &mut KernelBuilder, turn: &Turn, state: &[Val], fresh: Val) -> Vec<Val> {
        let (zero, mixer) = (k.const_i64(0), self.mixer);
        let state = k.for_carry((zero, self.run.replay, 1), state, |k, i, state| {
            let [key, d, alpha] = mixer.update(k, turn.state, i);
            let d = k.load(DType::F32, self.tile.own as u32, d, turn.column);
            let (d, alpha) = (lanes_of(k, d), k.load_f32(alpha, zero));
            self.apply(k, turn, state, key, (&d, alpha))
        });
        let kept = k.cmp(Pred::Gt, self.run.replay, zero);
        let changed = k.or(kept, fresh);
        let stays = k.and(changed, self.run.tentative);
        k.if_then(stays, |k| self.store_state(k, turn, &state));
        state
    }

    /// `S ← fma(k, d, α S)`: the one place where a state changes. `key` points to k; d is that of each of the thread's columns.
    fn apply(&self, k: &mut KernelBuilder, turn: &Turn, state: &[Val], key: Val, (d, alpha): (&[Val], Val)) -> Vec<Val> {
        let mut next = Vec::with_capacity(state.len());
        for (i, chunk) in state.chunks(self.chunk() * d.len()).enumerate() {
            let keys = self.load_rows(k, turn, key, i);
            for (row, ki) in chunk.chunks(d.len()).zip(keys) {
                for (&s, &d) in row.iter().zip(d) {
                    let decayed = k.fmul(alpha, s);
                    next.push(k.fma(ki, d, decayed));
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
    fn tokens(
        &self,
        k: &mut KernelBuilder,
        turn: &Turn,
        tokens: &Tokens,
        windows: &[Val],
        inputs: &Inputs,
        state: &[Val],
    ) -> (Vec<Val>, Vec<Val>) {
        let per = (self.mixer.q.taps - 1) as usize;
        self.gates(k, turn, tokens, inputs.gates);
        let mut next = Vec::with_capacity(windows.len());
        for (i, (channel, inputs)) in turn.channels.iter().zip(inputs.x.chunks(BLOCK as usize)).enumerate() {
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
        if let Some(o) = self.smem.o {
            self.epilogue(k, turn, tokens, o);
        }
        (next, state)
    }

    /// What this thread reads of the block that begins with token `first`; of tokens that do not exist, the last one's.
    fn inputs(&self, k: &mut KernelBuilder, turn: &Turn, first: Val) -> Inputs {
        let one = k.const_i64(1);
        let last = k.sub(self.run.end, one);
        let of_channel = |channel: &Channel| {
            let (x, row) = channel.x;
            let load = |i| {
                let t = k.add_const(first, i);
                let t = k.min_i64(t, last);
                let at = k.mul(t, row);
                k.load_f32(x, at)
            };
            (0..BLOCK).map(load).collect::<Vec<_>>()
        };
        let x = turn.channels.iter().flat_map(of_channel).collect();
        let (t, head) = self.gate_place(k, turn, self.place.thread, first);
        let t = k.min_i64(t, last);
        Inputs { gates: self.mixer.gate_inputs(k, t, head), x }
    }

    /// The token and the value head of gate number `pair` of a block of tokens, or of the last.
    fn gate_place(&self, k: &mut KernelBuilder, turn: &Turn, pair: Val, first: Val) -> (Val, Val) {
        let last = k.index(BLOCK * self.tile.heads - 1);
        let pair = k.min_i64(pair, last);
        let (i, head) = (k.div_const(pair, self.tile.heads), k.rem_const(pair, self.tile.heads));
        (k.add(first, i), k.add(turn.first_head, head))
    }

    /// α and β of the block: a thread a token and value head; there are threads enough.
    fn gates(&self, k: &mut KernelBuilder, turn: &Turn, tokens: &Tokens, inputs: [Val; 2]) {
        let pairs = k.mul_const(tokens.count, self.tile.heads);
        let exists = k.cmp(Pred::Lt, self.place.thread, pairs);
        k.if_then(exists, |k| {
            let (_, head) = self.gate_place(k, turn, self.place.thread, tokens.first);
            let (alpha, beta) = self.mixer.gate_of(k, inputs, head);
            k.store(self.smem.alpha, self.place.thread, alpha);
            k.store(self.smem.beta, self.place.thread, beta);
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
        let zero = k.const_f32(0.0);
        let sum = elements.iter().fold(zero, |sum, &x| k.fma(x, x, sum));
        let sum = warp_sum(k, sum);
        let eps = k.const_f32(self.mixer.eps);
        let sum = k.fadd(sum, eps);
        let root = k.rsqrt(sum);
        let scale = k.const_f32(scale);
        let factor = k.fmul(root, scale);
        let normed: Vec<Val> = elements.iter().map(|&x| k.fmul(x, factor)).collect();
        places.iter().zip(&normed).for_each(|(p, &y)| p.store(k, x, y));
        normed
    }

    /// Token `i` of the block through the recurrence; gives the state after it.
    fn sweep(&self, k: &mut KernelBuilder, turn: &Turn, (tokens, i): (&Tokens, Val), state: &[Val]) -> Vec<Val> {
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
        // the parts of a column are neighbours
        let masks: Vec<u32> = [4, 2, 1].into_iter().filter(|&mask| u64::from(mask) < tile.parts).collect();
        let [y, w] = [y, w].map(|sums| {
            let whole = sums.into_iter().map(|x| across(k, &masks, x, |k, a, b| k.fadd(a, b)));
            whole.collect::<Vec<_>>()
        });
        let head = k.div_const(turn.lane, pad(self.mixer.v.width));
        let pair = k.mul_const(i, tile.heads);
        let pair = k.add(pair, head);
        let (alpha, beta) = (k.load_f32(self.smem.alpha, pair), k.load_f32(self.smem.beta, pair));
        let v = k.load(DType::F32, tile.own as u32, v, turn.lane);
        let (v, kq) = (lanes_of(k, v), k.load_f32(self.smem.kq, i));
        let (mut d, mut out) = (Vec::with_capacity(own), Vec::with_capacity(own));
        for column in 0..own {
            let decayed = k.fmul(alpha, y[column]);
            let error = k.fsub(v[column], decayed);
            d.push(k.fmul(beta, error));
            let mixed = k.fmul(alpha, w[column]);
            out.push(k.fma(kq, d[column], mixed));
        }
        let first = k.const_i64(0);
        let writes = k.cmp(Pred::Eq, turn.part, first);
        let writes = k.and(writes, turn.live);
        k.if_then(writes, |k| {
            let (o, at) = match self.smem.o {
                Some(o) => (row_ptr(k, o, i, tile.columns), turn.lane),
                None => {
                    let t = k.add(tokens.first, i);
                    (self.mixer.out_row(k, t, turn.first_head), turn.column)
                }
            };
            for (j, &out) in (0..).zip(&out) {
                let at = k.add_const(at, j);
                k.store(o, at, out);
            }
            if !tile.long {
                k.if_then(self.run.tentative, |k| {
                    let [_, kept, _] = self.mixer.update(k, turn.state, i);
                    for (j, &d) in (0..).zip(&d) {
                        let at = k.add_const(turn.column, j);
                        k.store(kept, at, d);
                    }
                });
            }
        });
        if !tile.long {
            k.if_then(self.run.tentative, |k| self.keep(k, turn, i, key));
        }
        self.apply(k, turn, state, key, (&d, alpha))
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
    fn epilogue(&self, k: &mut KernelBuilder, turn: &Turn, tokens: &Tokens, o: Val) {
        let width = pad(self.mixer.v.width);
        let pairs = k.mul_const(tokens.count, self.tile.heads);
        k.for_each((self.place.warp, pairs, self.tile.threads() / 32), |k, pair| {
            let (i, head) = (k.div_const(pair, self.tile.heads), k.rem_const(pair, self.tile.heads));
            let (t, value_head) = (k.add(tokens.first, i), k.add(turn.first_head, head));
            let o = row_ptr(k, o, pair, width);
            norm_out(k, self.mixer, &self.place, (t, value_head), o);
        });
    }
}

/// `out = rms_norm(o, norm) · silu(z)` of a value head of token `t`, by a warp.
fn norm_out(k: &mut KernelBuilder, mixer: &Mixer, place: &Place, (t, head): (Val, Val), o: Val) {
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

/// The tail of long runs at work on a token.
struct Tail<'a> {
    mixer: &'a Mixer,
    threads: u64,
    place: Place,
    run: Run,
}

impl Tail<'_> {
    fn run(&self, k: &mut KernelBuilder, t: Val) {
        let zero = k.const_i64(0);
        let live = k.cmp(Pred::Ge, self.run.slot, zero);
        k.if_else(
            live,
            |k| {
                let heads = k.index(self.mixer.v.heads);
                k.for_each((self.place.warp, heads, self.threads / 32), |k, head| {
                    let o = self.mixer.out_row(k, t, head);
                    norm_out(k, self.mixer, &self.place, (t, head), o);
                });
                let next = k.add_const(t, 1);
                let is_last = k.cmp(Pred::Eq, next, self.run.end);
                k.if_then(is_last, |k| self.move_windows(k));
                Vec::new()
            },
            |k| {
                let (out, nothing) = (self.mixer.out_row(k, t, zero), k.const_f32(0.0));
                let elems = k.index(self.mixer.v.row());
                k.for_each((self.place.thread, elems, self.threads), |k, c| k.store(out, c, nothing));
                Vec::new()
            },
        );
    }

    /// Puts the run's last inputs into the windows.
    fn move_windows(&self, k: &mut KernelBuilder) {
        let zero = k.const_i64(0);
        for stream in [&self.mixer.q, &self.mixer.k, &self.mixer.v] {
            let (x, window) = (k.param(stream.x), stream.window(k, self.run.slot, zero));
            let taken = k.index(stream.taps - 1);
            let first = k.sub(self.run.end, taken);
            let x = row_ptr(k, x, first, stream.row());
            let elems = k.index(stream.row() * (stream.taps - 1));
            k.for_each((self.place.thread, elems, self.threads), |k, i| {
                let value = k.load_f32(x, i);
                k.store(window, i, value);
            });
        }
    }
}

/// Where a channel would lie if it were one of a stream's.
struct StreamPlace {
    x: Val,
    w: Val,
    window: Val,
    row: Val,
}
