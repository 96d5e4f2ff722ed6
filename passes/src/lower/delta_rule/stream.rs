//! The convolutions of q, k and v.

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::shape::{LANES, pad};
use nextc_ir::types::TENTATIVE_TOKENS;

use super::super::matmul::row_ptr;
use super::super::ports::{Port, Ports, Site};
use super::Run;

/// One of q, k, v: its projection, its convolution and its window.
#[derive(Clone, Copy)]
pub struct Stream {
    /// The projection.
    pub x: Port,
    /// Taps of the convolution, the oldest first.
    pub w: Port,
    /// Its window.
    pub conv: Port,
    /// Heads.
    pub heads: u64,
    /// Elements of a head.
    pub width: u64,
    /// Tokens that a convolution sees.
    pub taps: u64,
}

impl Stream {
    pub(super) fn ports(site: &Site<'_>, ports: &mut Ports, [x, w, conv]: [&str; 3]) -> Self {
        let shape = &site.weight(site.named(w)).shape;
        Self {
            heads: shape[0],
            width: shape[1],
            taps: shape[2],
            x: ports.read(x, site.named(x)),
            w: ports.read(w, site.named(w)),
            conv: ports.write(conv, site.named(conv)),
        }
    }

    /// Elements from one token to the next.
    pub(in super::super) fn row(&self) -> u64 {
        self.heads * pad(self.width)
    }

    /// Pointer to the oldest row of head `head`'s window in slot `slot`; rows are `row()` elements apart.
    pub(in super::super) fn window(&self, k: &mut KernelBuilder, slot: Val, head: Val) -> Val {
        let base = k.param(self.conv);
        let slot = row_ptr(k, base, slot, (self.taps - 1 + TENTATIVE_TOKENS) * self.row());
        row_ptr(k, slot, head, pad(self.width))
    }

    /// Moves the window on by the accepted tokens of a tentative step, whose inputs lie behind it.
    pub(super) fn accept(&self, k: &mut KernelBuilder, window: Val, tokens: Val) {
        let ahead = row_ptr(k, window, tokens, self.row());
        k.for_range(pad(self.width), LANES, |k, c| {
            let rows: Vec<Val> = (0..self.taps - 1).map(|tap| k.add_const(c, tap * self.row())).collect();
            let inputs: Vec<Val> = rows.iter().map(|&at| k.load_f32x16(ahead, at)).collect();
            rows.iter().zip(inputs).for_each(|(&at, x)| k.store(window, at, x));
        });
    }

    pub(super) fn clear(&self, k: &mut KernelBuilder, window: Val) {
        let zero = k.splat_f32(16, 0.0);
        for tap in 0..self.taps - 1 {
            k.for_range(pad(self.width), LANES, |k, c| {
                let at = k.add_const(c, tap * self.row());
                k.store(window, at, zero);
            });
        }
    }

    /// `out = silu(conv1d(x))` for one head of one token. The window moves on by one; or, where `kept` says that so many tentative
    /// tokens came before, it stays and the input is put behind theirs.
    pub(super) fn step(&self, k: &mut KernelBuilder, t: Val, head: Val, window: Val, out: Val, kept: (Val, Val)) {
        let (x, w) = (k.param(self.x), k.param(self.w));
        let x = row_ptr(k, x, t, self.row());
        let x = row_ptr(k, x, head, pad(self.width));
        let w = row_ptr(k, w, head, pad(self.width));
        let (tentative, before) = kept;
        let window = row_ptr(k, window, before, self.row());
        k.for_range(pad(self.width), LANES, |k, c| {
            let rows: Vec<Val> = (0..self.taps).map(|tap| k.add_const(c, tap * self.row())).collect();
            let (newest, older) = rows.split_last().expect("a convolution has taps");
            let mut inputs: Vec<Val> = older.iter().map(|&at| k.load_f32x16(window, at)).collect();
            inputs.push(k.load_f32x16(x, c));
            let mut sum = k.splat_f32(16, 0.0);
            for (&at, &input) in rows.iter().zip(&inputs) {
                let weight = k.load_f32x16(w, at);
                sum = k.fma(weight, input, sum);
            }
            k.if_else(
                tentative,
                |k| {
                    k.store(window, *newest, inputs[inputs.len() - 1]);
                    Vec::new()
                },
                |k| {
                    older.iter().zip(&inputs[1..]).for_each(|(&at, &x)| k.store(window, at, x));
                    Vec::new()
                },
            );
            let value = k.silu(sum);
            k.store(out, c, value);
        });
    }

    /// `out = silu(conv1d(x))` for one head of token `t` of a run of which no token is kept. What comes before the run is the window, which stays as it is:
    /// see [`Self::take_last`].
    pub(super) fn convolve(&self, k: &mut KernelBuilder, run: &Run, t: Val, head: Val, out: Val) {
        let (x, w, window) = (k.param(self.x), k.param(self.w), self.window(k, run.slot, head));
        let [x, w] = [x, w].map(|p| row_ptr(k, p, head, pad(self.width)));
        let rows: Vec<Val> = (0..self.taps)
            .map(|tap| {
                let back = k.index(self.taps - 1 - tap);
                let at = k.sub(t, back);
                let is_input = k.cmp(Pred::Ge, at, run.begin);
                let before = k.sub(at, run.begin);
                let before = k.add_const(before, self.taps - 1);
                let (base, at) = (k.select(is_input, x, window), k.select(is_input, at, before));
                row_ptr(k, base, at, self.row())
            })
            .collect();
        run.ask_row(k, (x, self.row()), t, self.width);
        k.for_range(pad(self.width), LANES, |k, c| {
            let start = k.splat_f32(16, 0.0);
            let sum = (0..).zip(&rows).fold(start, |sum, (tap, &row)| {
                let at = k.add_const(c, tap * self.row());
                let (weight, input) = (k.load_f32x16(w, at), k.load_f32x16(row, c));
                k.fma(weight, input, sum)
            });
            let value = k.silu(sum);
            k.store(out, c, value);
        });
    }

    /// Puts the last inputs of a run, which has as many, into a head's window.
    pub(super) fn take_last(&self, k: &mut KernelBuilder, run: &Run, head: Val) {
        let (x, window) = (k.param(self.x), self.window(k, run.slot, head));
        let x = row_ptr(k, x, head, pad(self.width));
        for tap in 0..self.taps - 1 {
            let back = k.index(self.taps - 1 - tap);
            let t = k.sub(run.end, back);
            let from = row_ptr(k, x, t, self.row());
            k.for_range(pad(self.width), LANES, |k, c| {
                let (input, at) = (k.load_f32x16(from, c), k.add_const(c, tap * self.row()));
                k.store(window, at, input);
            });
        }
    }
}
