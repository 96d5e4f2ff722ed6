//! Operands of products of tiles that are the sum of two bf16, which has 16 bits of a number.

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Val};

use super::super::bulk::tiles::RowTiles;
use super::super::bulk::unit::Dot;

/// Tiles of the rounded numbers, and of what that left over.
#[derive(Clone, Copy, Debug)]
pub(super) struct Split {
    pub high: RowTiles,
    pub low: RowTiles,
}

impl Split {
    /// Call it at the top level of the body.
    pub fn alloc(k: &mut KernelBuilder, rows: u64, columns: u64) -> Self {
        Self { high: RowTiles::alloc(k, rows, columns), low: RowTiles::alloc(k, rows, columns) }
    }

    /// Puts a row of an A: see [`RowTiles::put`].
    pub fn put(&self, k: &mut KernelBuilder, i: Val, row: &[Val]) {
        let (high, low) = parts(k, row);
        self.high.put(k, i, &high);
        self.low.put(k, i, &low);
    }

    /// Puts two rows of a B: see [`RowTiles::put_pair`].
    pub fn put_pair(&self, k: &mut KernelBuilder, at: (Val, Val), rows: [&[Val]; 2]) {
        let [(even, even_low), (odd, odd_low)] = rows.map(|row| parts(k, row));
        self.high.put_pair(k, at, [&even, &odd]);
        self.low.put_pair(k, at, [&even_low, &odd_low]);
    }

    /// The products that make up those of two strips from row `row` on with two strips of a B from column `column` on, for
    /// [`unit::dots`](super::super::bulk::unit::dots): all but that of what was left over.
    pub fn dots(&self, k: &mut KernelBuilder, row: Val, (b, column): (&Self, Val), depth: u64) -> [Dot; 3] {
        let pairs = [(self.high, b.high), (self.high, b.low), (self.low, b.high)];
        pairs.map(|(a, b)| (a.two_strips(k, row), b.two_strips(k, column).to_vec(), depth))
    }
}

/// Numbers rounded to bf16, half away from zero, and the rest.
fn parts(k: &mut KernelBuilder, numbers: &[Val]) -> (Vec<Val>, Vec<Val>) {
    let part = |&x: &Val| {
        let (bits, half, upper) = (k.bitcast(x, DType::I32), k.splat_i32(16, 1 << 15), k.splat_i32(16, -1 << 16));
        let raised = k.add(bits, half);
        let kept = k.and(raised, upper);
        let high = k.bitcast(kept, DType::F32);
        (high, k.fsub(x, high))
    };
    numbers.iter().map(part).unzip()
}
