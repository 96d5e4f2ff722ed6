//! `gated_delta_net` by blocks of threads.
//!
//! block    one key head of one sequence, with the value heads that share it (so a convolution's window has one owner); tokens in blocks of 8
//! thread   some rows of one column of S, in registers for the whole run
//! replay   S ← fma(k, d, α S) for the accepted tokens of a tentative step, with the kept k, d, α
//! conv     a thread a channel of q, k and v; its window in registers; SiLU; to shared memory
//! norm     a warp a token: q ← scale · q / |q|,  k ← k / |k|,  k·q
//! sweep    token by token: y = Sᵀk,  w = Sᵀq  summed over the parts of a column, d = β (v − α y);  o = α w + (k·q) d;  S ← fma(k, d, α S)
//! epilogue a warp a token and value head: out = rms_norm(o, norm) · silu(z)
//! traffic  2 · 4 · head_k_dim · head_v_dim bytes a head and sequence: bound by memory at one token, by arithmetic in long runs
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
use super::{Place, begin, lanes_of, warp_sum};

/// Tokens between two passes over the convolution and the norms.
const BLOCK: u64 = TENTATIVE_TOKENS;
/// Most threads of a block: with 128 registers each they fill a multiprocessor.
const MOST_THREADS: u64 = 512;
/// Most rows of a column that a thread holds.
const MOST_ROWS: u64 = 64;

/// How the state of a key head lies in the registers of a block.
#[derive(Clone, Copy)]
struct Tile {
    /// Value heads that are done together; those that share a key head are done in so many turns.
    heads: u64,
    turns: u64,
    /// Columns of these heads, padding of a head included.
    columns: u64,
    /// Threads of one part: the columns, rounded up to a warp.
    lanes: u64,
    /// Parts that a column is cut into.
    parts: u64,
    /// Rows of a part.
    rows: u64,
}

impl Tile {
    /// The tile with the fewest turns, and of these the one with the most parts; `None` if a single head does not fit.
    fn of(mixer: &Mixer) -> Option<Self> {
        let (shared, dk, dv) = (mixer.shared_heads(), mixer.k.width, pad(mixer.v.width));
        let tile = |heads: u64, parts: u64| {
            let columns = heads * dv;
            Self { heads, turns: shared / heads, columns, lanes: columns.next_multiple_of(32), parts, rows: dk / parts }
        };
        let fits = |t: &Self| t.lanes * t.parts <= MOST_THREADS && t.rows <= MOST_ROWS;
        let heads = (1..=shared).rev().filter(|h| shared.is_multiple_of(*h));
        let parts =
            |dk: u64| [16, 8, 4, 2, 1].into_iter().filter(move |p| dk.is_multiple_of(*p) && dk / p >= 4.min(dk));
        heads.flat_map(|h| parts(dk).map(move |p| (h, p))).map(|(h, p)| tile(h, p)).find(fits)
    }

    fn threads(&self) -> u64 {
        self.lanes * self.parts
    }
}

/// `gated_delta_net`.
pub fn lower_gated_delta_net(site: &Site<'_>) -> Option<Result<Lowered, LowerError>> {
    let mut ports = Ports::default();
    let mixer = Mixer::ports(site, &mut ports);
    let tile = Tile::of(&mixer)?;
    let sequences = SequencePorts::new(&mut ports);
    let heads = mixer.q.heads;
    let mut k = ports.builder(site, Extent::from(Sym::B) * heads.into());
    k.threads(tile.threads() as u32);
    let place = Place::here(&mut k);
    let task = k.task();
    let (b, head) = (k.div_const(task, heads), k.rem_const(task, heads));
    let smem = Smem::alloc(&mut k, &mixer, &tile);
    begin(&mut k);
    let run = sequences.run(&mut k, b);
    let zero = k.const_i64(0);
    let live = k.cmp(Pred::Ge, run.slot, zero);
    let block = Block { mixer: &mixer, tile, place, run, head, smem };
    k.if_else(
        live,
        |k| {
            let some = k.cmp(Pred::Lt, block.run.begin, block.run.end);
            k.if_then(some, |k| block.run(k));
            Vec::new()
        },
        |k| {
            block.zero_out(k);
            Vec::new()
        },
    );
    Some(Ok(ports.finish(k.finish())))
}

/// What the threads of a block share.
#[derive(Clone, Copy)]
struct Smem {
    /// `[BLOCK][q, k, v]`: the convolutions' outputs; q and k then normed.
    tokens: Val,
    /// `[BLOCK][columns]`.
    o: Val,
    /// `[BLOCK]`: `k · q`.
    kq: Val,
    /// `[BLOCK][heads]`.
    alpha: Val,
    /// As `alpha`.
    beta: Val,
    /// `[2][parts][2][lanes]`: `Sᵀk` and `Sᵀq` of the parts, for tokens of even and of odd numbers.
    sums: Val,
}

impl Smem {
    fn alloc(k: &mut KernelBuilder, mixer: &Mixer, tile: &Tile) -> Self {
        let mut array = |elems: u64| k.shared(DType::F32, elems);
        Self {
            tokens: array(BLOCK * (2 * pad(mixer.k.width) + tile.columns)),
            o: array(BLOCK * tile.columns),
            kq: array(BLOCK),
            alpha: array(BLOCK * tile.heads),
            beta: array(BLOCK * tile.heads),
            sums: array(2 * tile.parts * 2 * tile.lanes),
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
    /// Of this thread: the column in its value head, and whether it has one.
    column: Val,
    live: Val,
    /// Of this thread: its part of a column.
    part: Val,
    /// Pointer to the state of its head.
    state: Val,
    channels: Vec<Channel>,
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
        let (mixer, tile) = (self.mixer, &self.tile);
        let width = pad(mixer.v.width);
        let skipped = k.mul_const(turn, tile.heads);
        let first_head = mixer.value_head(k, self.head, skipped);
        let (part, lane) = (k.div_const(self.place.thread, tile.lanes), k.rem_const(self.place.thread, tile.lanes));
        let columns = k.index(tile.columns);
        let live = k.cmp(Pred::Lt, lane, columns);
        let last = k.index(tile.columns - 1);
        let lane = k.min_i64(lane, last);
        let (head, column) = (k.div_const(lane, width), k.rem_const(lane, width));
        let value_head = k.add(first_head, head);
        let last_turn = k.index(tile.turns - 1);
        let last_turn = k.cmp(Pred::Eq, turn, last_turn);
        Turn {
            first_head,
            column,
            live,
            part,
            state: mixer.state(k, self.run.slot, value_head),
            channels: self.channels(k, first_head, last_turn),
        }
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

    /// Index of row `i` of this thread's part of its column.
    fn state_index(&self, k: &mut KernelBuilder, turn: &Turn, i: u64) -> Val {
        let width = pad(self.mixer.v.width);
        let first = k.mul_const(turn.part, self.tile.rows * width);
        let first = k.add(first, turn.column);
        k.add_const(first, i * width)
    }

    fn load_state(&self, k: &mut KernelBuilder, turn: &Turn, fresh: Val) -> Vec<Val> {
        let (zero, begun) = (k.const_f32(0.0), k.not(fresh));
        let loads = k.and(begun, turn.live);
        k.if_else(
            loads,
            |k| {
                let load = |i| {
                    let at = self.state_index(k, turn, i);
                    k.load_f32(turn.state, at)
                };
                (0..self.tile.rows).map(load).collect()
            },
            |_| vec![zero; self.tile.rows as usize],
        )
    }

    fn store_state(&self, k: &mut KernelBuilder, turn: &Turn, state: &[Val]) {
        k.if_then(turn.live, |k| {
            for (i, &s) in (0..).zip(state) {
                let at = self.state_index(k, turn, i);
                k.store(turn.state, at, s);
            }
        });
    }

    /// The state after the accepted tokens; in memory too, where it is not written at the end.
    fn replay(&self, k: &mut KernelBuilder, turn: &Turn, state: &[Val], fresh: Val) -> Vec<Val> {
        let (zero, mixer) = (k.const_i64(0), self.mixer);
        let state = k.for_carry((zero, self.run.replay, 1), state, |k, i, state| {
            let [key, d, alpha] = mixer.update(k, turn.state, i);
            let (d, alpha) = (k.load_f32(d, turn.column), k.load_f32(alpha, zero));
            self.apply(k, turn, state, key, (d, alpha))
        });
        let kept = k.cmp(Pred::Gt, self.run.replay, zero);
        let changed = k.or(kept, fresh);
        let stays = k.and(changed, self.run.tentative);
        k.if_then(stays, |k| self.store_state(k, turn, &state));
        state
    }

    /// `S ← fma(k, d, α S)`: the one place where a state changes. `key` points to k.
    fn apply(&self, k: &mut KernelBuilder, turn: &Turn, state: &[Val], key: Val, (d, alpha): (Val, Val)) -> Vec<Val> {
        let mut next = Vec::with_capacity(state.len());
        for (i, chunk) in state.chunks(self.chunk()).enumerate() {
            let keys = self.load_rows(k, turn, key, i);
            for (&s, ki) in chunk.iter().zip(keys) {
                let decayed = k.fmul(alpha, s);
                next.push(k.fma(ki, d, decayed));
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
        let lanes = self.chunk() as u32;
        let first = k.mul_const(turn.part, self.tile.rows);
        let at = k.add_const(first, i as u64 * u64::from(lanes));
        let rows = k.load(DType::F32, lanes, from, at);
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
        let state = k.for_carry((zero, tokens.count, 1), state, |k, i, state| self.sweep(k, turn, i, state));
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

    /// α and β of the block: a thread a token and value head.
    fn gates(&self, k: &mut KernelBuilder, turn: &Turn, tokens: &Tokens) {
        let pairs = k.mul_const(tokens.count, self.tile.heads);
        k.for_each((self.place.thread, pairs, self.tile.threads()), |k, pair| {
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
    fn sweep(&self, k: &mut KernelBuilder, turn: &Turn, i: Val, state: &[Val]) -> Vec<Val> {
        let tile = &self.tile;
        let [q, key, v] = self.token(k, i);
        let zero = k.const_f32(0.0);
        let (mut y, mut w) = (zero, zero);
        for (c, chunk) in state.chunks(self.chunk()).enumerate() {
            let (keys, queries) = (self.load_rows(k, turn, key, c), self.load_rows(k, turn, q, c));
            for ((&s, ki), qi) in chunk.iter().zip(keys).zip(queries) {
                y = k.fma(s, ki, y);
                w = k.fma(s, qi, w);
            }
        }
        let lane = k.rem_const(self.place.thread, tile.lanes);
        let [y, w] = self.sum_parts(k, turn, (i, lane), [y, w]);
        let head = k.div_const(lane, pad(self.mixer.v.width));
        let last = k.index(tile.heads - 1);
        let head = k.min_i64(head, last);
        let pair = k.mul_const(i, tile.heads);
        let pair = k.add(pair, head);
        let (alpha, beta) = (k.load_f32(self.smem.alpha, pair), k.load_f32(self.smem.beta, pair));
        let last = k.index(tile.columns - 1);
        let lane = k.min_i64(lane, last);
        let (v, kq) = (k.load_f32(v, lane), k.load_f32(self.smem.kq, i));
        let decayed = k.fmul(alpha, y);
        let error = k.fsub(v, decayed);
        let d = k.fmul(beta, error);
        let mixed = k.fmul(alpha, w);
        let out = k.fma(kq, d, mixed);
        let first = k.const_i64(0);
        let writes = k.cmp(Pred::Eq, turn.part, first);
        let writes = k.and(writes, turn.live);
        k.if_then(writes, |k| {
            let o = row_ptr(k, self.smem.o, i, tile.columns);
            k.store(o, lane, out);
            k.if_then(self.run.tentative, |k| {
                let [_, kept, _] = self.mixer.update(k, turn.state, i);
                k.store(kept, turn.column, d);
            });
        });
        k.if_then(self.run.tentative, |k| self.keep(k, turn, i, key));
        self.apply(k, turn, state, key, (d, alpha))
    }

    /// Sums of all parts of this thread's column, in order. Token by token they lie in two places, so that one barrier is enough.
    fn sum_parts(&self, k: &mut KernelBuilder, turn: &Turn, (i, lane): (Val, Val), own: [Val; 2]) -> [Val; 2] {
        let tile = &self.tile;
        if tile.parts == 1 {
            return own;
        }
        let parity = k.rem_const(i, 2);
        let sums = row_ptr(k, self.smem.sums, parity, tile.parts * 2 * tile.lanes);
        let mine = row_ptr(k, sums, turn.part, 2 * tile.lanes);
        for (which, x) in (0..).zip(own) {
            let at = k.add_const(lane, which * tile.lanes);
            k.store(mine, at, x);
        }
        k.barrier();
        [0, 1].map(|which| {
            let parts = (0..tile.parts).map(|part| {
                let at = k.add_const(lane, (2 * part + which) * tile.lanes);
                k.load_f32(sums, at)
            });
            let parts: Vec<Val> = parts.collect();
            parts[1..].iter().fold(parts[0], |sum, &x| k.fadd(sum, x))
        })
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

    /// `out = rms_norm(o, norm) · silu(z)`: a warp a token and value head.
    fn epilogue(&self, k: &mut KernelBuilder, turn: &Turn, tokens: &Tokens) {
        let (mixer, width) = (self.mixer, pad(self.mixer.v.width));
        let pairs = k.mul_const(tokens.count, self.tile.heads);
        k.for_each((self.place.warp, pairs, self.tile.threads() / 32), |k, pair| {
            let (i, head) = (k.div_const(pair, self.tile.heads), k.rem_const(pair, self.tile.heads));
            let (t, value_head) = (k.add(tokens.first, i), k.add(turn.first_head, head));
            let (norm, z) = (k.param(mixer.norm), k.param(mixer.z));
            let z = row_ptr(k, z, t, mixer.v.row());
            let z = row_ptr(k, z, value_head, width);
            let o = row_ptr(k, self.smem.o, pair, width);
            let places = self.place.places(k, width);
            let [o, norm, z] = [o, norm, z].map(|p| places.iter().map(|at| at.load(k, p)).collect::<Vec<_>>());
            let zero = k.const_f32(0.0);
            let sum = o.iter().fold(zero, |sum, &x| k.fma(x, x, sum));
            let sum = warp_sum(k, sum);
            let scale = mean_rsqrt(k, sum, mixer.v.width, mixer.norm_eps);
            let out = mixer.out_row(k, t, value_head);
            for (i, place) in places.iter().enumerate() {
                let normed = k.fmul(o[i], scale);
                let normed = k.fmul(normed, norm[i]);
                let gate = k.silu(z[i]);
                let value = k.fmul(normed, gate);
                place.store(k, out, value);
            }
        });
    }
}

/// Where a channel would lie if it were one of a stream's.
struct StreamPlace {
    x: Val,
    w: Val,
    window: Val,
    row: Val,
}
