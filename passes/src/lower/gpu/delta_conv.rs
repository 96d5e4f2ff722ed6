//! The convolutions of [`super::delta_rule`]'s short runs: a thread a channel of q, k and v, its window in registers.
//!
//! Windows and taps are asked for before the wait. Inputs go through token by token, each into its row of the window.

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::shape::pad;

use super::super::delta_rule::Stream;
use super::super::matmul::row_ptr;
use super::delta_rule::{Block, Tokens};

/// A channel of a convolution that a thread owns.
pub struct Channel {
    /// Its input of token 0, and elements from one token to the next.
    x: (Val, Val),
    /// Its oldest tap; the others follow as far apart as tokens do.
    taps: Val,
    /// The first row of its window, and elements from one to the next.
    window: (Val, Val),
    /// Its output of the block's first token.
    out: Val,
    /// Whether the thread has it alone in the block; else it only computes what another does too.
    owned: Val,
    /// Whether it writes the window: of blocks that share a key head the first does.
    keeps: Val,
}

/// Where a channel would lie if it were one of a stream's.
struct StreamPlace {
    x: Val,
    w: Val,
    window: Val,
    row: Val,
}

impl Block<'_> {
    /// Inputs in the window of a convolution.
    pub(super) fn window(&self) -> usize {
        self.mixer.q.taps as usize - 1
    }

    /// The channels of this thread: q, then k, then v of the block's heads.
    pub(super) fn channels(&self, k: &mut KernelBuilder) -> Vec<Channel> {
        let (mixer, keys, zero) = (self.mixer, self.key_elems(), k.const_i64(0));
        let first_head = self.own_head(k, zero);
        let is_first = k.cmp(Pred::Eq, self.first, zero);
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
                let out = row_ptr(k, self.smem.tokens, channel, 1);
                let (is_value, owned) = (k.not(ends[1]), owned);
                let keeps = k.or(is_value, is_first);
                let keeps = k.and(keeps, owned);
                Channel { x: (x, row), taps: w, window: (window, row), out, owned, keeps }
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

    pub(super) fn load_taps(&self, k: &mut KernelBuilder, channel: &Channel) -> Vec<Val> {
        (0..self.mixer.q.taps)
            .map(|tap| {
                let tap = k.index(tap);
                let at = k.mul(tap, channel.x.1);
                k.load_f32(channel.taps, at)
            })
            .collect()
    }

    /// What a channel sees of the tokens before the run, the oldest first; zeros where the sequence has no past.
    pub(super) fn load_window(&self, k: &mut KernelBuilder, channel: &Channel, remembers: Val) -> Vec<Val> {
        let (window, row) = channel.window;
        let stream = &self.mixer.q;
        let (position, zero) = (self.run.position(k), k.const_f32(0.0));
        let load = |k: &mut KernelBuilder, i: u64| {
            let back = k.index(stream.taps - 1 - i);
            let before = k.sub(position, back);
            let place = stream.window_row(k, before);
            let at = k.mul(place, row);
            k.load_f32(window, at)
        };
        let rows = 0..stream.taps - 1;
        let loads = k.and(remembers, channel.owned);
        k.if_else(loads, |k| rows.clone().map(|i| load(k, i)).collect(), |_| rows.clone().map(|_| zero).collect())
    }

    /// Zeros where the window has what comes before the sequence's begin.
    pub(super) fn clear_window(&self, k: &mut KernelBuilder, channel: &Channel) {
        let (window, row) = channel.window;
        let zero = k.const_f32(0.0);
        k.if_then(channel.keeps, |k| {
            for i in self.mixer.q.rows_before() {
                let i = k.index(i);
                let at = k.mul(i, row);
                k.store(window, at, zero);
            }
        });
    }

    /// Each channel's input of token `t`; of one beyond the run, the last one's.
    pub(super) fn inputs(&self, k: &mut KernelBuilder, channels: &[Channel], t: Val) -> Vec<Val> {
        let one = k.const_i64(1);
        let last = k.sub(self.run.end, one);
        let t = k.min_i64(t, last);
        let load = |channel: &Channel| {
            let (x, row) = channel.x;
            let at = k.mul(t, row);
            k.load_f32(x, at)
        };
        channels.iter().map(load).collect()
    }

    /// `silu(conv1d(x))` of the channels, token by token. Gives what the token after the block sees of those before it.
    pub(super) fn convolve(
        &self,
        k: &mut KernelBuilder,
        channels: &[Channel],
        tokens: &Tokens,
        (windows, taps): (&[Val], &[Val]),
        inputs: Vec<Val>,
    ) -> Vec<Val> {
        let (zero, per) = (k.const_i64(0), self.window());
        let carried = [windows.to_vec(), inputs].concat();
        let position = self.run.position_of(k, tokens.first);
        k.for_carry((zero, tokens.count, 1), &carried, |k, i, carried| {
            let (windows, inputs) = carried.split_at(windows.len());
            let position = k.add(position, i);
            let row = self.mixer.q.window_row(k, position);
            let following = k.add(tokens.first, i);
            let following = k.add_const(following, 1);
            let following = self.inputs(k, channels, following);
            let mut moved = Vec::with_capacity(carried.len());
            for (c, (channel, &x)) in channels.iter().zip(inputs).enumerate() {
                let seen = [&windows[c * per..(c + 1) * per], &[x]].concat();
                self.convolve_one(k, channel, (i, row), (&seen, &taps[c * (per + 1)..(c + 1) * (per + 1)]));
                moved.extend(&seen[1..]);
            }
            [moved, following].concat()
        })
    }

    /// One channel's output for token `i` of the block, of the inputs that it sees; the last of them goes into row `row` of the window.
    pub(super) fn convolve_one(
        &self,
        k: &mut KernelBuilder,
        channel: &Channel,
        (i, row): (Val, Val),
        (seen, taps): (&[Val], &[Val]),
    ) {
        let zero = k.const_f32(0.0);
        let sum = taps.iter().zip(seen).fold(zero, |sum, (&w, &x)| k.fma(w, x, sum));
        let value = k.silu(sum);
        let at = k.mul_const(i, self.row_elems());
        k.if_then(channel.owned, |k| k.store(channel.out, at, value));
        k.if_then(channel.keeps, |k| {
            let (window, stride) = channel.window;
            let at = k.mul(row, stride);
            k.store(window, at, seen[seen.len() - 1]);
        });
    }
}
