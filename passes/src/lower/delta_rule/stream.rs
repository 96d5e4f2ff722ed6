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

    /// Rows of a window. It is a ring: the input at position `p` lies in row `p % window_rows`, so nothing moves, whether tokens are tentative or not, and
    /// what a step reads is not what it writes.
    pub(in super::super) const fn window_rows(&self) -> u64 {
        self.taps - 1 + TENTATIVE_TOKENS
    }

    /// Pointer to a head's first row of the window in slot `slot`; rows are `row()` elements apart.
    pub(in super::super) fn window(&self, k: &mut KernelBuilder, slot: Val, head: Val) -> Val {
        let base = k.param(self.conv);
        let slot = row_ptr(k, base, slot, self.window_rows() * self.row());
        row_ptr(k, slot, head, pad(self.width))
    }

    /// The row of a window that has the input at a position, which may lie as far before the sequence's begin as a convolution sees.
    pub(in super::super) fn window_row(&self, k: &mut KernelBuilder, position: Val) -> Val {
        let up = k.add_const(position, self.window_rows());
        k.rem_const(up, self.window_rows())
    }

    /// The rows of inputs before the sequence's begin, which are zeros.
    pub(in super::super) fn rows_before(&self) -> std::ops::Range<u64> {
        TENTATIVE_TOKENS..self.window_rows()
    }

    pub(super) fn clear(&self, k: &mut KernelBuilder, window: Val) {
        let zero = k.splat_f32(16, 0.0);
        for row in self.rows_before() {
            k.for_range(pad(self.width), LANES, |k, c| {
                let at = k.add_const(c, row * self.row());
                k.store(window, at, zero);
            });
        }
    }

    /// `out = silu(conv1d(x))` for one head of token `t`, whose position is given, and its input into the window.
    pub(super) fn step(&self, k: &mut KernelBuilder, (t, position): (Val, Val), head: Val, window: Val, out: Val) {
        let (x, w) = (k.param(self.x), k.param(self.w));
        let x = row_ptr(k, x, t, self.row());
        let x = row_ptr(k, x, head, pad(self.width));
        let w = row_ptr(k, w, head, pad(self.width));
        let rows: Vec<Val> = (0..self.taps)
            .map(|tap| {
                let back = k.index(self.taps - 1 - tap);
                let position = k.sub(position, back);
                let row = self.window_row(k, position);
                row_ptr(k, window, row, self.row())
            })
            .collect();
        let (&newest, older) = rows.split_last().expect("a convolution has taps");
        k.for_range(pad(self.width), LANES, |k, c| {
            let mut inputs: Vec<Val> = older.iter().map(|&row| k.load_f32x16(row, c)).collect();
            let input = k.load_f32x16(x, c);
            k.store(newest, c, input);
            inputs.push(input);
            let start = k.splat_f32(16, 0.0);
            let sum = (0..).zip(&inputs).fold(start, |sum, (tap, &input)| {
                let at = k.add_const(c, tap * self.row());
                let weight = k.load_f32x16(w, at);
                k.fma(weight, input, sum)
            });
            let value = k.silu(sum);
            k.store(out, c, value);
        });
    }

    /// `out = silu(conv1d(x))` for one head of token `t` of a long run. What comes before the run is in the window, which stays as it is: see
    /// [`Self::take_last`].
    pub(super) fn convolve(&self, k: &mut KernelBuilder, run: &Run, t: Val, head: Val, out: Val) {
        let (x, w, window) = (k.param(self.x), k.param(self.w), self.window(k, run.slot, head));
        let [x, w] = [x, w].map(|p| row_ptr(k, p, head, pad(self.width)));
        let rows: Vec<Val> = (0..self.taps)
            .map(|tap| {
                let back = k.index(self.taps - 1 - tap);
                let at = k.sub(t, back);
                let is_input = k.cmp(Pred::Ge, at, run.begin);
                let before = run.position_of(k, at);
                let before = self.window_row(k, before);
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
            let position = run.position_of(k, t);
            let row = self.window_row(k, position);
            let (from, to) = (row_ptr(k, x, t, self.row()), row_ptr(k, window, row, self.row()));
            k.for_range(pad(self.width), LANES, |k, c| {
                let input = k.load_f32x16(from, c);
                k.store(to, c, input);
            });
        }
    }
}
