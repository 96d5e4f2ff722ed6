//! `shorts`: rows as signed numbers of 16 bits, multiplied two at a time with weights that are integers of 8 or 4 bits, by vectors of less than 512 bits.
//!
//! row      in scratch behind its numbers in f32: words of 16-bit codes, word `c` those of columns `c` and `c + 2`; then for each block of 32 columns a scale (its
//!          largest magnitude over 32767) and the sum of its codes; what is infinite or no number makes the row's first scale NaN, and with it all products
//! weights  in each 16-bit half of a word an unsigned number, 8 or 128 more than it counts: bytes 0 and 2 of a word of four columns, then 1 and 3; of words of eight columns first the lower
//!          halves of bytes, then the upper ones
//! dot      in each block integers, which begin with what those add too much and so are exact; then `sum += integer · (weight's scale · row's scale)` by one fused
//!          multiply-add, over the blocks in order
//! traffic  half an operation a weight and lane, where conversions to f32 and their products are four

use nextc_ir::kernel::math::ROUNDER;
use nextc_ir::kernel::{KernelBuilder, Val};
use nextc_ir::shape::LANES;
use nextc_ir::{DType, Format, Layout};

use super::kv_codes::Extremes;
use super::packed::{Lanes, Tile, quotient};

/// Columns that share a scale.
const BLOCK: u64 = 32;
/// The largest code.
const LARGEST: f32 = 32767.0;
/// The least magnitude that a scale stands for: its inverse is finite.
const LEAST: f32 = 1e-30;

/// True if rows are rounded for products with this matrix, where the machine has such products.
pub fn takes(format: Format, layout: Layout) -> bool {
    layout == Layout::Tile16 && format.is_bytes()
}

/// Words of a row of `columns` numbers behind them: its codes, what is read behind the last, and for each block two.
pub const fn row_words(columns: u64) -> u64 {
    codes_words(columns) + (2 * columns.div_ceil(BLOCK)).next_multiple_of(LANES)
}

const fn codes_words(columns: u64) -> u64 {
    columns + LANES
}

/// Where the words of the row at `row` lie.
fn words_of(k: &mut KernelBuilder, row: Val, columns: u64) -> Val {
    let bytes = k.index(4 * columns);
    k.offset(row, bytes)
}

/// Rounds the `columns` numbers at `row`, behind them.
pub fn write(k: &mut KernelBuilder, row: Val, columns: u64) {
    let to = words_of(k, row, columns);
    let (zero, whole, nothing) = (k.const_i64(0), k.index(columns / BLOCK * BLOCK), k.splat_f32(16, 0.0));
    let spoilt = k.for_carry((zero, whole, BLOCK), &[nothing], |k, first, spoilt| {
        vec![put_block(k, (row, to), (first, BLOCK), columns, spoilt[0])]
    })[0];
    let spoilt = match columns % BLOCK {
        0 => spoilt,
        rest => put_block(k, (row, to), (whole, rest), columns, spoilt),
    };
    let (behind, empty) = (k.index(columns), k.splat_i32(16, 0));
    k.store(to, behind, empty);
    // each number beside the one two columns after it
    k.for_range(columns, LANES, |k, c| {
        let after = k.add_const(c, 2);
        let [low, high] = [c, after].map(|at| k.load(DType::I32, LANES as u32, to, at));
        let (half, sixteen) = (k.splat_i32(16, 0xffff), k.splat_i32(16, 16));
        let (low, high) = (k.and(low, half), k.shl(high, sixteen));
        let both = k.or(low, high);
        k.store(to, c, both);
    });
    let (first, spoilt) = (k.index(codes_words(columns)), k.reduce_add(spoilt));
    let scale = k.load_f32(to, first);
    let scale = k.fadd(scale, spoilt);
    k.store(to, first, scale);
}

/// Writes the codes of `count` columns from column `first` on, a word each, their scale and their sum; adds zero times the numbers to `spoilt`.
fn put_block(
    k: &mut KernelBuilder,
    (row, to): (Val, Val),
    (first, count): (Val, u64),
    columns: u64,
    spoilt: Val,
) -> Val {
    let places: Vec<Val> = (0..count).step_by(LANES as usize).map(|i| k.add_const(first, i)).collect();
    let numbers: Vec<Val> = places.iter().map(|&at| k.load_f32x16(row, at)).collect();
    let lanes = Extremes::of(k, &numbers);
    let (largest, least, most) = (k.reduce_max(lanes.largest), k.const_f32(LEAST), k.const_f32(LARGEST));
    let largest = k.fmax(largest, least);
    let (scale, inverse) = (k.fdiv(largest, most), k.fdiv(most, largest));
    let (inverse, shift) = (k.splat(inverse, LANES as u32), k.splat_f32(LANES as u32, ROUNDER));
    let mut total = k.splat_f32(LANES as u32, 0.0);
    for (&at, &x) in places.iter().zip(&numbers) {
        // an integer in the last bits, without a conversion that has no result for NaN
        let sum = k.fma(x, inverse, shift);
        let code = k.fsub(sum, shift);
        total = k.fadd(total, code);
        let code = k.bitcast(sum, DType::I32);
        k.store(to, at, code);
    }
    let (total, shift) = (k.reduce_add(total), k.const_f32(ROUNDER));
    let total = k.fadd(total, shift);
    let (total, shift) = (k.bitcast(total, DType::I32), k.bitcast(shift, DType::I32));
    let total = k.sub(total, shift);
    let at = k.div_const(first, BLOCK / 2);
    let at = k.add_const(at, codes_words(columns));
    k.store(to, at, scale);
    let at = k.add_const(at, 1);
    k.store(to, at, total);
    k.fadd(spoilt, lanes.spoilt)
}

/// Dot products of every tile, all of one format, with every row, `tile · rows + row`: each a vector of 16 weight rows.
pub fn dot(k: &mut KernelBuilder, tiles: &[Tile], rows: &[Val]) -> Vec<Val> {
    let columns = tiles[0].matrix.planes.columns;
    let rows: Vec<Val> = rows.iter().map(|&row| words_of(k, row, columns)).collect();
    let init = vec![k.splat_f32(16, 0.0); tiles.len() * rows.len()];
    let (lo, hi) = (k.const_i64(0), k.index(columns / BLOCK));
    let sums = k.for_carry((lo, hi, 1), &init, |k, block, sums| add_block(k, tiles, &rows, (block, BLOCK), sums));
    match columns % BLOCK {
        0 => sums,
        rest => add_block(k, tiles, &rows, (hi, rest), &sums),
    }
}

/// Adds the products of the `count` columns of a block.
fn add_block(
    k: &mut KernelBuilder,
    tiles: &[Tile],
    rows: &[Val],
    (block, count): (Val, u64),
    sums: &[Val],
) -> Vec<Val> {
    let planes = tiles[0].matrix.planes;
    let (columns, group) = (planes.columns, planes.format.group_columns());
    let first = k.mul_const(block, BLOCK);
    let at = k.mul_const(block, 2);
    let at = k.add_const(at, codes_words(columns));
    let after = k.add_const(at, 1);
    let less = k.const_i32(-tiles[0].matrix.halves_zero());
    let begins: Vec<Val> = rows
        .iter()
        .map(|&row| {
            let total = k.load(DType::I32, 1, row, after);
            let begin = k.mul(total, less);
            k.splat(begin, LANES as u32)
        })
        .collect();
    let begins: Vec<Val> = tiles.iter().flat_map(|_| begins.iter().copied()).collect();
    let turn = tiles[0].matrix.turn_columns.max(group).min(count);
    let end = k.add_const(first, count);
    let integers = k.for_carry((first, end, turn), &begins, |k, column, integers| {
        tiles.iter().for_each(|tile| tile.ask_codes(k, column, turn));
        let mut integers = integers.to_vec();
        for i in (0..turn).step_by(group as usize) {
            let column = k.add_const(column, i);
            add_word(k, tiles, rows, column, &mut integers);
        }
        integers
    });
    let own: u64 = planes.format.blocks().map_or(columns, |blocks| blocks.columns.into());
    let mut added = Vec::new();
    for (tile, (integers, sums)) in tiles.iter().zip(integers.chunks(rows.len()).zip(sums.chunks(rows.len()))) {
        let of_block = quotient(k, block, own / BLOCK);
        tile.ask_scales(k, of_block);
        let scale = tile.block(k, of_block, Lanes::All).scale.expect("a format of scaled integers");
        for (&row, (&integer, &sum)) in rows.iter().zip(integers.iter().zip(sums)) {
            let x = k.load_f32(row, at);
            let x = k.splat(x, LANES as u32);
            let (number, both) = (k.to_float(integer), k.fmul(scale, x));
            added.push(k.fma(number, both, sum));
        }
    }
    added
}

/// Adds the products of the columns of a word, from `column` on.
fn add_word(k: &mut KernelBuilder, tiles: &[Tile], rows: &[Val], column: Val, integers: &mut [Val]) {
    for (tile, integers) in tiles.iter().zip(integers.chunks_mut(rows.len())) {
        for (halves, offset) in tile.halves(k, column) {
            let at = k.add_const(column, offset);
            for (&row, integer) in rows.iter().zip(integers.iter_mut()) {
                // as floats, which there are instructions to spread for
                let x = k.load_f32(row, at);
                let x = k.splat(x, LANES as u32);
                let x = k.bitcast(x, DType::I32);
                *integer = k.short_dot(*integer, halves, x);
            }
        }
    }
}
