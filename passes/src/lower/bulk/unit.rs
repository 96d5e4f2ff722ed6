//! Products of rows that lie in scratch as [`RowTiles`](super::tiles::RowTiles): by a CPU's matrix unit, or by vectors that multiply pairs of bf16.
//!
//! tiles    2 strips of A by some of B, sums in the unit's registers
//! pairs    8 rows of A by 2 strips of B, or 16 rows by one: 16 sums in registers; of each two columns of B a line, of A a pair in all lanes
//!
//! Both read the same tiles, so what makes operands of numbers and what uses the sums is one code.

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::layout::LINE_BYTES;
use nextc_ir::shape::LANES;
use nextc_ir::target::Unit;

use super::super::matmul::row_ptr;
use super::super::strips::TILE_BYTES;
use super::pairs::add_step;
use super::tiles::TOGETHER;

/// Two strips of an A, one or two strips of a B, and how many tiles of each are multiplied.
pub type Dot = ([Val; 2], Vec<Val>, u64);

/// Sums that vectors keep in registers.
const SUMS: u64 = 16;

/// `c = Σ A·B` over `dots`, which have as many strips each: a matrix of 32 by 16 or 32 f32, row by row.
pub fn dots(k: &mut KernelBuilder, unit: Unit, c: Val, dots: &[Dot]) {
    match unit {
        Unit::Tiles => {
            let dots: Vec<_> = dots.iter().map(|(a, b, depth)| (&a[..], &b[..], *depth)).collect();
            k.tile_dots(c, &dots);
        }
        Unit::Pairs => pair_dots(k, c, dots),
    }
}

fn pair_dots(k: &mut KernelBuilder, c: Val, dots: &[Dot]) {
    let columns = dots[0].1.len() as u64;
    let rows = SUMS / columns;
    k.for_range(TOGETHER, rows, |k, first| {
        let nothing = k.splat_f32(LANES as u32, 0.0);
        let sums = dots.iter().fold(vec![nothing; SUMS as usize], |sums, dot| add_rows(k, dot, (first, rows), &sums));
        let to = row_ptr(k, c, first, columns * LANES);
        for (n, sum) in (0..).zip(sums) {
            let at = k.index(n * LANES);
            k.store(to, at, sum);
        }
    });
}

/// Adds the products of `rows` rows from `first` on.
fn add_rows(k: &mut KernelBuilder, (a, b, depth): &Dot, (first, rows): (Val, u64), sums: &[Val]) -> Vec<Val> {
    let (strip, line) = (k.div_const(first, LANES), k.rem_const(first, LANES));
    let (one, line) = (k.const_i64(1), k.mul_const(line, LINE_BYTES));
    let is_second = k.cmp(Pred::Eq, strip, one);
    let a = k.select(is_second, a[1], a[0]);
    let (a, zero, bytes) = (k.offset(a, line), k.const_i64(0), k.index(depth * TILE_BYTES));
    k.for_carry((zero, bytes, TILE_BYTES), sums, |k, tile, sums| {
        let (a, step) = (k.offset(a, tile), k.const_i64(0));
        let b: Vec<Val> = b.iter().map(|&strip| k.offset(strip, tile)).collect();
        let line = |row| {
            let bytes = k.index(row * LINE_BYTES);
            k.offset(a, bytes)
        };
        let rows: Vec<Val> = (0..rows).map(line).collect();
        add_step(k, (&b, &rows), step, sums)
    })
}
