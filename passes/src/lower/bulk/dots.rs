//! Rows that a CPU's vectors multiply six at a time with two or four strips of weights: where rows and sums lie, and the order of products.

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Val};
use nextc_ir::layout::LINE_BYTES;
use nextc_ir::shape::LANES;
use nextc_ir::target::BulkKind;

use super::super::strips::{Ahead, STRIPS};
use super::{Sink, ask_rows, sums_of};

/// Rows that are multiplied together.
pub const ROWS: u64 = BulkKind::Bytes.together();
const _: () = assert!(ROWS == BulkKind::Pairs.together());

/// Adds the products of a step to sums, of one row after the other: `(strips, rows)`, the step, the sums.
pub type AddStep<'a> = &'a dyn Fn(&mut KernelBuilder, (&[Val], &[Val]), Val, &[Val]) -> Vec<Val>;

/// Rounded rows, and room for their sums.
#[derive(Clone, Copy, Debug)]
pub struct Dots {
    /// Bytes of a row, in whole lines.
    row_bytes: u64,
    /// Steps of a product.
    depth: u64,
    /// Strips that are multiplied together: as many as the sums fit registers.
    width: u64,
    rows: Val,
    /// Sums of six rows by the weight rows of so many strips.
    sums: Val,
}

impl Dots {
    /// For `tokens` rows whose products with `width` strips have `depth` steps. Call it at the top level of the body.
    pub fn alloc(k: &mut KernelBuilder, tokens: u64, (row_bytes, depth, width): (u64, u64, u64)) -> Self {
        let rows = k.alloc(DType::I32, tokens * row_bytes / 4);
        Self { row_bytes, depth, width, rows, sums: k.alloc(DType::F32, STRIPS * ROWS * LANES) }
    }

    /// Steps of a product.
    pub const fn depth(&self) -> u64 {
        self.depth
    }

    /// Pointer to row `i`.
    pub fn row(&self, k: &mut KernelBuilder, i: Val) -> Val {
        let bytes = k.mul_const(i, self.row_bytes);
        k.offset(self.rows, bytes)
    }

    /// Fills what is multiplied behind the first `count` rows with zeros.
    pub fn fill_behind(&self, k: &mut KernelBuilder, count: Val) {
        let end = super::round_up(k, count, ROWS);
        k.for_each((count, end, 1), |k, i| {
            let (to, nothing) = (self.row(k, i), k.splat_i32(LANES as u32, 0));
            k.for_range(self.row_bytes / 4, LINE_BYTES / 4, |k, at| k.store(to, at, nothing));
        });
    }

    /// Products of strips with `count` rows: those of a row go to `sink`.
    pub fn products(
        &self,
        k: &mut KernelBuilder,
        (strips, ahead): (&[Val], &Ahead<'_>),
        count: Val,
        add: AddStep<'_>,
        sink: &mut dyn Sink,
    ) {
        let parts: Vec<(Val, &[Val])> = (0..)
            .zip(strips.chunks(self.width as usize))
            .map(|(part, strips)| {
                let bytes = k.index(part * 4 * self.width * LANES * ROWS);
                (k.offset(self.sums, bytes), strips)
            })
            .collect();
        let zero = k.const_i64(0);
        k.for_each((zero, count, ROWS), |k, first| {
            let last = k.add_const(first, ROWS);
            let last = k.min_i64(last, count);
            ask_rows(k, sink, (first, last), strips.len() as u64);
            self.six(k, first, &parts, ahead, add);
            k.for_each((first, last, 1), |k, i| {
                let row = k.sub(i, first);
                let sums = parts.iter().flat_map(|&(sums, strips)| sums_of(k, sums, row, strips.len() as u64));
                let values: Vec<Val> = sums.collect();
                sink.put(k, i, &values);
            });
        });
    }

    /// Products of rows `first..first + 6` with some strips after the others.
    fn six(&self, k: &mut KernelBuilder, first: Val, parts: &[(Val, &[Val])], ahead: &Ahead<'_>, add: AddStep<'_>) {
        let base = self.row(k, first);
        let rows: Vec<Val> = (0..ROWS)
            .map(|i| {
                let bytes = k.index(i * self.row_bytes);
                k.offset(base, bytes)
            })
            .collect();
        let steps = k.div_const(first, ROWS);
        let steps = k.mul_const(steps, self.depth);
        for (part, &(to, strips)) in parts.iter().enumerate() {
            let (zero, depth, nothing) = (k.const_i64(0), k.index(self.depth), k.splat_f32(LANES as u32, 0.0));
            let init = vec![nothing; strips.len() * rows.len()];
            let sums = k.for_carry((zero, depth, 1), &init, |k, block, sums| {
                let step = k.add(steps, block);
                ahead.ask(k, (part, self.width), step);
                add(k, (strips, &rows), block, sums)
            });
            for (at, sum) in (0..).step_by(LANES as usize).zip(sums) {
                let at = k.index(at);
                k.store(to, at, sum);
            }
        }
    }
}
