//! `pairs`: rows and weights as bf16, multiplied two at a time by a CPU's vectors.
//!
//! panel    rows of x as bf16, one after the other
//! strip    16 weight rows, where they lie: for each two columns a line of 16 pairs
//! dot      six tokens by four strips, 24 sums in registers; `sum + a[1]·b[1] + a[0]·b[0]` by VDPBF16PS, over the columns in order
//! traffic  of each two columns four lines of weights for 24 products of 64 bytes
//!
//! Weights in bf16 alone are multiplied so: others would have to be unpacked, and bytes are faster. Tokens are filled up with rows of zeros.

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Val};
use nextc_ir::layout::LINE_BYTES;
use nextc_ir::shape::LANES;

use super::super::packed::Matrix;
use super::super::strips::{Ahead, Group, STRIPS, is_direct};
use super::Sink;
use super::dots::Dots;

/// Columns of a step.
const STEP: u64 = LINE_BYTES / 2;
/// Strips that are multiplied together.
pub const WIDTH: u64 = STRIPS;
/// Words of a line: pairs of 16 rows, or 32 numbers of one.
const LINE_WORDS: u64 = LINE_BYTES / 4;

/// True if products of many tokens with this matrix can be made of pairs.
pub fn takes(matrix: &Matrix) -> bool {
    is_direct(matrix)
}

/// Rows as pairs.
#[derive(Clone, Copy, Debug)]
pub struct Pairs {
    /// Columns of a row: whole lines.
    columns: u64,
    dots: Dots,
}

impl Pairs {
    /// Bytes of a row of `columns` numbers.
    pub const fn row_bytes(columns: u64) -> u64 {
        2 * columns.next_multiple_of(STEP)
    }

    /// For `tokens` rows of `columns` columns. Call it at the top level of the body.
    pub fn alloc(k: &mut KernelBuilder, tokens: u64, columns: u64) -> Self {
        Self { columns, dots: Dots::alloc(k, tokens, (Self::row_bytes(columns), columns.div_ceil(STEP), WIDTH)) }
    }

    /// Steps of a product.
    pub const fn depth(&self) -> u64 {
        self.dots.depth()
    }

    /// Rounds a row, whose 16 numbers from column `c` on `numbers(c)` gives, into row `i`.
    pub fn pack(&self, k: &mut KernelBuilder, i: Val, mut numbers: impl FnMut(&mut KernelBuilder, Val) -> Val) {
        let to = self.dots.row(k, i);
        k.for_range(self.columns, STEP, |k, c| {
            let next = k.add_const(c, LANES);
            let (first, second) = (numbers(k, c), numbers(k, next));
            let (words, at) = (k.bf16_row(first, second), k.div_const(c, 2));
            k.store(to, at, words);
        });
    }

    /// Fills what is multiplied behind the first `count` rows with zeros.
    pub fn fill_behind(&self, k: &mut KernelBuilder, count: Val) {
        self.dots.fill_behind(k, count);
    }

    /// Products of a group's strips with `count` rows: those of a row go to `sink`.
    pub fn products(
        &self,
        k: &mut KernelBuilder,
        (group, ahead): (&Group, &Ahead<'_>),
        count: Val,
        sink: &mut dyn Sink,
    ) {
        let strips: Vec<Val> = group.tiles.iter().map(|tile| tile.codes).collect();
        self.dots.products(k, (&strips, ahead), count, &add_step, sink);
    }
}

/// Adds the products of the columns of a step to sums, of one row after the other.
pub fn add_step(k: &mut KernelBuilder, (strips, rows): (&[Val], &[Val]), step: Val, sums: &[Val]) -> Vec<Val> {
    let mut sums = sums.to_vec();
    let (words, lines) = (k.mul_const(step, LINE_WORDS), k.mul_const(step, LINE_WORDS * STEP / 2));
    for pair in 0..STEP / 2 {
        let (word, line) = (k.add_const(words, pair), k.add_const(lines, pair * LINE_WORDS));
        let weights: Vec<Val> = strips.iter().map(|&strip| k.load(DType::I32, LANES as u32, strip, line)).collect();
        for (&row, sums) in rows.iter().zip(sums.chunks_mut(strips.len())) {
            let x = k.load(DType::I32, 1, row, word);
            let x = k.splat(x, LANES as u32);
            for (&w, sum) in weights.iter().zip(sums) {
                *sum = k.pair_dot(*sum, w, x);
            }
        }
    }
    sums
}
