//! `shorts`: rows as signed numbers of 16 bits, multiplied two at a time with weights that are integers of 8 or 4 bits, by vectors of less than 512 bits.
//!
//! row      in scratch behind its numbers in f32: words of 16-bit codes, word `c` those of columns `c` and `c + 2`; then for each block of 32 columns a scale (its
//!          largest magnitude over 32767) and the sum of its codes; what is infinite or no number makes the row's first scale NaN, and with it all products
//! weights  in each 16-bit half of a word an unsigned number, 8 or 128 more than it counts: bytes 0 and 2 of a word of four columns, then 1 and 3; of words of
//!          eight columns first the lower halves of bytes, then the upper ones
//! dot      in each block integers, which begin with what those add too much and so are exact; then `sum += integer · (weight's scale · row's scale)` by one fused
//!          multiply-add, over the blocks in order
//! traffic  half an operation a weight and lane, where conversions to f32 and their products are four

use nextc_ir::kernel::math::ROUNDER;
use nextc_ir::kernel::{KernelBuilder, Val};
use nextc_ir::shape::LANES;
use nextc_ir::{DType, Format, Layout};

use super::kv_codes::{Extremes, integer_of};
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
        // its last 16 bits are the code
        let sum = k.fma(x, inverse, shift);
        let code = k.fsub(sum, shift);
        total = k.fadd(total, code);
        let code = k.bitcast(sum, DType::I32);
        k.store(to, at, code);
    }
    let (total, shift) = (k.reduce_add(total), k.const_f32(ROUNDER));
    let total = k.fadd(total, shift);
    let total = integer_of(k, total);
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

#[cfg(test)]
mod tests {
    use nextc_ir::kernel::eval::{Buffer, Options, Place, run};

    use super::*;

    /// What [`write`] writes behind a row: its words.
    fn written(row: &[f32]) -> Vec<u32> {
        let columns = row.len() as u64;
        let words = columns + row_words(columns);
        let mut k = KernelBuilder::new("write", &[("row", false), ("out", true)], 1.into());
        let (from, to) = (k.param(0), k.param(1));
        k.for_range(columns, LANES, |k, i| {
            let x = k.load_f32x16(from, i);
            k.store(to, i, x);
        });
        write(&mut k, to, columns);
        let mut buffers = [Buffer::from_f32(row), Buffer::from_f32(&vec![0.0; words as usize])];
        let places = [Place::start(0), Place::start(1)];
        run(&k.finish(), [1; 4], &mut buffers, &places, Options::default()).expect("the kernel runs");
        buffers[1].to_f32()[row.len()..].iter().map(|x| x.to_bits()).collect()
    }

    /// Numbers of all magnitudes, the largest of each block another.
    fn row(columns: usize) -> Vec<f32> {
        let number = |i: usize| ((i * 7919) % 2001) as f32 / 1000.0 - 1.0;
        (0..columns).map(|i| number(i) * 2.0_f32.powi((i / 32 * 5) as i32 % 9 - 4)).collect()
    }

    #[test]
    fn a_word_has_two_codes_and_a_block_its_scale_and_sum() {
        for columns in [16, 32, 48, 96, 208] {
            let row = row(columns);
            let words = written(&row);
            let of_blocks = &words[codes_words(columns as u64) as usize..];
            let code = |c: usize| words[c] as u16 as i16;
            for (block, numbers) in row.chunks(BLOCK as usize).enumerate() {
                let scale = f32::from_bits(of_blocks[2 * block]);
                let largest = numbers.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
                assert_eq!(scale, largest / LARGEST, "block {block} of {columns} columns");
                let mut sum = 0;
                for (i, &x) in numbers.iter().enumerate() {
                    let c = block * BLOCK as usize + i;
                    let far = (f64::from(code(c)) * f64::from(scale) - f64::from(x)).abs();
                    assert!(
                        far <= 0.502 * f64::from(scale),
                        "column {c} of {columns}: {far:e} apart, steps of {scale:e}"
                    );
                    let after = if c + 2 < columns { code(c + 2) } else { 0 };
                    assert_eq!((words[c] >> 16) as u16 as i16, after, "column {c} of {columns}");
                    sum += i32::from(code(c));
                }
                assert_eq!(of_blocks[2 * block + 1].cast_signed(), sum, "block {block} of {columns} columns");
            }
        }
    }

    #[test]
    fn zeros_stay_and_what_is_no_number_spoils_the_row() {
        let words = written(&[0.0; 48]);
        assert!(words[..48].iter().all(|&word| word == 0), "{words:?}");
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut row = row(48);
            row[40] = bad;
            let words = written(&row);
            let first = f32::from_bits(words[codes_words(48) as usize]);
            assert!(first.is_nan(), "{bad}: the first scale is {first}");
        }
    }
}
