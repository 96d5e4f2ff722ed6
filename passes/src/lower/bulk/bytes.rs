//! `bytes`: rows as signed bytes and weights as unsigned ones, multiplied four at a time by a CPU's vectors.
//!
//! panel    a row of x as codes from -127 to 127, a scale for each block of 32 columns (its largest magnitude over 127, see [`Stored::Int8`]), and beside it
//!          -128 times the sum of the block's codes; what is infinite or no number makes the row's first scale NaN, and with it all products
//! strip    16 weight rows: for each block 8 lines of four columns of 16 rows, each byte 128 more than its number counts, and a line of scales
//! dot      six tokens by two strips: in each block integers, which begin with what the 128 add too much and so are exact; then
//!          `sum += integer · (weight's scale · token's scale)` by one fused multiply-add, over the blocks in order
//! traffic  of a block 16 lines of codes for 96 products of 64 bytes, and three operations for each sum
//!
//! Columns are filled up with codes of zero, tokens with rows of zeros.

use nextc_ir::kernel::math::ROUNDER;
use nextc_ir::kernel::{KernelBuilder, Val};
use nextc_ir::layout::LINE_BYTES;
use nextc_ir::shape::LANES;
use nextc_ir::{DType, Layout, Stored};

use super::super::kv_codes::{Extremes, integer_of};
use super::super::packed::{Matrix, Tile};
use super::super::strips::{Ahead, Group, STRIPS};
use super::Sink;
use super::dots::Dots;

/// Columns that share a scale.
const BLOCK: u64 = 32;
/// Columns of a line: one word a row.
const LINE_COLUMNS: u64 = 4;
/// Words of a line.
const LINE_WORDS: u64 = LINE_BYTES / 4;
/// Lines of codes of a block of a strip.
const LINES: u64 = BLOCK / LINE_COLUMNS;
/// Words of a block of a strip: its codes and its scales.
const STRIP_WORDS: u64 = (LINES + 1) * LINE_WORDS;

/// Strips that are multiplied together: each has integer sums of a block beside those of all.
pub const WIDTH: u64 = 2;

/// True if products of many tokens with this matrix can be made of bytes.
pub fn takes(matrix: &Matrix) -> bool {
    matrix.planes.layout == Layout::Tile16 && matrix.planes.format.is_bytes()
}

/// Rows as bytes, and the weights that they are multiplied with.
#[derive(Clone, Copy, Debug)]
pub struct Bytes {
    /// Columns of a row as stored.
    columns: u64,
    dots: Dots,
    /// A group of strips.
    strips: Val,
}

impl Bytes {
    /// Bytes of a row of `columns` numbers: codes in whole lines, then for each block its scale and what its sums begin with.
    pub const fn row_bytes(columns: u64) -> u64 {
        (4 * codes_words(columns) + 8 * columns.div_ceil(BLOCK)).next_multiple_of(LINE_BYTES)
    }

    /// For `tokens` rows of `columns` columns. Call it at the top level of the body.
    pub fn alloc(k: &mut KernelBuilder, tokens: u64, columns: u64) -> Self {
        let depth = columns.div_ceil(BLOCK);
        let dots = Dots::alloc(k, tokens, (Self::row_bytes(columns), depth, WIDTH));
        Self { columns, dots, strips: k.alloc(DType::I32, STRIPS * depth * STRIP_WORDS) }
    }

    /// Steps of a product: blocks of columns.
    pub const fn depth(&self) -> u64 {
        self.dots.depth()
    }

    /// Rounds a row, whose 16 numbers from column `c` on `numbers(c)` gives, into row `i`.
    pub fn pack(&self, k: &mut KernelBuilder, i: Val, mut numbers: impl FnMut(&mut KernelBuilder, Val) -> Val) {
        const TURN: u64 = 2 * BLOCK;
        let (to, whole) = (self.dots.row(k, i), self.columns / TURN * TURN);
        let (zero, end, nothing) = (k.const_i64(0), k.index(whole), k.splat_f32(16, 0.0));
        let mut turn = |k: &mut KernelBuilder, first: Val, columns: u64, spoilt: Val| {
            let at = (0..columns).step_by(LANES as usize);
            let vectors: Vec<Val> = at
                .map(|i| {
                    let c = k.add_const(first, i);
                    numbers(k, c)
                })
                .collect();
            self.put(k, to, first, &vectors, spoilt)
        };
        let spoilt = k.for_carry((zero, end, TURN), &[nothing], |k, c, spoilt| vec![turn(k, c, TURN, spoilt[0])])[0];
        let spoilt = if whole < self.columns { turn(k, end, self.columns - whole, spoilt) } else { spoilt };
        let (first, spoilt) = (k.index(codes_words(self.columns)), k.reduce_add(spoilt));
        let scale = k.load_f32(to, first);
        let scale = k.fadd(scale, spoilt);
        k.store(to, first, scale);
    }

    /// Writes up to two blocks of a row, from column `c` on; adds zero times their numbers to `spoilt`.
    fn put(&self, k: &mut KernelBuilder, to: Val, c: Val, vectors: &[Val], mut spoilt: Val) -> Val {
        let mut codes = Vec::new();
        let at = k.div_const(c, BLOCK / 2);
        let at = k.add_const(at, codes_words(self.columns));
        for (block, numbers) in (0..).zip(vectors.chunks(2)) {
            let lanes = Extremes::of(k, numbers);
            spoilt = k.fadd(spoilt, lanes.spoilt);
            // a row is spoilt as a whole, at its end
            let all = Extremes { largest: k.reduce_max(lanes.largest), spoilt: k.const_f32(0.0) };
            let scale = all.scale(k, Stored::Int8);
            let one = k.const_f32(1.0);
            let inverse = k.fdiv(one, scale);
            let (inverse, shift) = (k.splat(inverse, LANES as u32), k.splat_f32(LANES as u32, ROUNDER));
            let sums: Vec<Val> = numbers.iter().map(|&x| k.fma(x, inverse, shift)).collect();
            let rounded: Vec<Val> = sums.iter().map(|&sum| k.fsub(sum, shift)).collect();
            let total = rounded.into_iter().reduce(|a, b| k.fadd(a, b)).expect("a block has numbers");
            let total = k.reduce_add(total);
            let (many, shift) = (k.const_f32(-128.0), k.const_f32(ROUNDER));
            let begin = k.fma(total, many, shift);
            let begin = integer_of(k, begin);
            let at = k.add_const(at, 2 * block);
            k.store(to, at, scale);
            let at = k.add_const(at, 1);
            k.store(to, at, begin);
            codes.extend(sums.into_iter().map(|sum| k.bitcast(sum, DType::I32)));
        }
        let nothing = k.splat_i32(LANES as u32, 0);
        let row = k.byte_row(std::array::from_fn(|i| *codes.get(i).unwrap_or(&nothing)));
        let at = k.div_const(c, LINE_COLUMNS);
        k.store(to, at, row);
        spoilt
    }

    /// Writes a group's strips; gives pointers to them.
    fn unpack(&self, k: &mut KernelBuilder, group: &Group) -> Vec<Val> {
        let strip = |(i, tile): (u64, &Tile)| {
            let bytes = k.index(i * self.depth() * 4 * STRIP_WORDS);
            let to = k.offset(self.strips, bytes);
            self.unpack_strip(k, tile, to);
            to
        };
        (0..).zip(&group.tiles).map(strip).collect()
    }

    fn unpack_strip(&self, k: &mut KernelBuilder, tile: &Tile, to: Val) {
        let whole = self.columns / BLOCK;
        let put = |k: &mut KernelBuilder, block: Val, columns: u64| {
            let (first, at) = (k.mul_const(block, BLOCK), k.mul_const(block, STRIP_WORDS));
            let bytes = tile.bytes(k, first, columns);
            let nothing = k.splat_i32(LANES as u32, 0);
            for line in 0..LINES {
                let at = k.add_const(at, line * LINE_WORDS);
                k.store(to, at, *bytes.get(line as usize).unwrap_or(&nothing));
            }
            let (scales, at) = (tile.byte_scales(k, block, BLOCK), k.add_const(at, LINES * LINE_WORDS));
            k.store(to, at, scales);
        };
        k.for_range(whole, 1, |k, block| put(k, block, BLOCK));
        if whole < self.depth() {
            let block = k.index(whole);
            put(k, block, self.columns % BLOCK);
        }
    }

    /// Products of a group's strips with `count` rows: those of a row go to `sink`.
    pub fn products(
        &self,
        k: &mut KernelBuilder,
        (group, ahead): (&Group, &Ahead<'_>),
        count: Val,
        sink: &mut dyn Sink,
    ) {
        let strips = self.unpack(k, group);
        let add = |k: &mut KernelBuilder, operands: (&[Val], &[Val]), block, sums: &[Val]| {
            self.add_block(k, operands, block, sums)
        };
        self.dots.products(k, (&strips, ahead), count, &add, sink);
    }

    /// Fills what is multiplied behind the first `count` rows with zeros.
    pub fn fill_behind(&self, k: &mut KernelBuilder, count: Val) {
        self.dots.fill_behind(k, count);
    }

    /// Adds the products of a block of columns to sums, of one row after the other.
    fn add_block(&self, k: &mut KernelBuilder, (strips, rows): (&[Val], &[Val]), block: Val, sums: &[Val]) -> Vec<Val> {
        let (codes, line) = (k.mul_const(block, LINES), k.mul_const(block, STRIP_WORDS));
        let scale = k.mul_const(block, 2);
        let scale = k.add_const(scale, codes_words(self.columns));
        let begin = k.add_const(scale, 1);
        let mut integers: Vec<Val> = Vec::new();
        for &row in rows {
            let begin = k.load(DType::I32, 1, row, begin);
            let begin = k.splat(begin, LANES as u32);
            integers.extend(strips.iter().map(|_| begin));
        }
        for number in 0..LINES {
            let (code, line) = (k.add_const(codes, number), k.add_const(line, number * LINE_WORDS));
            let weights: Vec<Val> = strips.iter().map(|&strip| k.load(DType::I32, LANES as u32, strip, line)).collect();
            for (&row, integers) in rows.iter().zip(integers.chunks_mut(strips.len())) {
                let x = k.load(DType::I32, 1, row, code);
                let x = k.splat(x, LANES as u32);
                for (&w, sum) in weights.iter().zip(integers) {
                    *sum = k.byte_dot(*sum, w, x);
                }
            }
        }
        let line = k.add_const(line, LINES * LINE_WORDS);
        let scales: Vec<Val> = strips.iter().map(|&strip| k.load_f32x16(strip, line)).collect();
        let of_rows = rows.iter().zip(integers.chunks(strips.len()).zip(sums.chunks(strips.len())));
        let mut added = Vec::new();
        for (&row, (integers, sums)) in of_rows {
            let x = k.load_f32(row, scale);
            let x = k.splat(x, LANES as u32);
            for (&w, (&integer, &sum)) in scales.iter().zip(integers.iter().zip(sums)) {
                let (number, both) = (k.to_float(integer), k.fmul(w, x));
                added.push(k.fma(number, both, sum));
            }
        }
        added
    }
}

/// Words of a row's codes.
const fn codes_words(columns: u64) -> u64 {
    columns.next_multiple_of(LINE_BYTES) / LINE_COLUMNS
}

#[cfg(test)]
mod tests {
    use nextc_ir::kernel::eval::{Buffer, Options, Place, run};

    use super::super::super::matmul::row_ptr;
    use super::*;

    /// A strip of codes from -127 to 127, and their scales: `[row][column]`, `[block][row]`.
    struct Strip {
        codes: Vec<Vec<i32>>,
        scales: Vec<Vec<f32>>,
    }

    impl Strip {
        fn new(columns: usize) -> Self {
            let code = |row: usize, column: usize| (row * 31 + column * 17) as i32 % 255 - 127;
            let codes = (0..16).map(|row| (0..columns).map(|column| code(row, column)).collect()).collect();
            let scale = |block: usize, row: usize| 0.01 * (1 + block + row) as f32;
            let blocks = columns.div_ceil(BLOCK as usize);
            Self { codes, scales: (0..blocks).map(|b| (0..16).map(|row| scale(b, row)).collect()).collect() }
        }

        /// As [`Bytes::unpack`] writes it.
        fn words(&self) -> Vec<i32> {
            let byte = |row: &[i32], column: usize| row.get(column).map_or(0, |code| (code + 128) as u8);
            let word = |row: &[i32], column| i32::from_le_bytes(std::array::from_fn(|i| byte(row, column + i)));
            let block = |(block, scales): (usize, &Vec<f32>)| {
                let columns =
                    (0..LINES as usize).map(move |line| block * BLOCK as usize + line * LINE_COLUMNS as usize);
                let codes = columns.flat_map(|column| self.codes.iter().map(move |row| word(row, column)));
                codes.chain(scales.iter().map(|s| s.to_bits().cast_signed())).collect::<Vec<_>>()
            };
            self.scales.iter().enumerate().flat_map(block).collect()
        }

        /// The product with a row, and how far a rounded one may be from it.
        fn product(&self, x: &[f32], row: usize) -> (f64, f64) {
            let (mut product, mut room) = (0.0, 0.0);
            for (b, block) in x.chunks(BLOCK as usize).enumerate() {
                let scale = f64::from(self.scales[b][row]);
                let step = f64::from(Stored::Int8.scale(block));
                for (i, &x) in block.iter().enumerate() {
                    let w = f64::from(self.codes[row][b * BLOCK as usize + i]) * scale;
                    product += w * f64::from(x);
                    room += w.abs() * step * 0.501;
                }
            }
            (product, room)
        }
    }

    /// Products of six rows with a strip: of each row 16 numbers.
    fn products(rows: &[Vec<f32>; 6], strip: &Strip) -> Vec<f32> {
        let columns = rows[0].len() as u64;
        let mut k = KernelBuilder::new("bytes", &[("x", false), ("strip", false), ("out", true)], 1.into());
        let (x, weights, out) = (k.param(0), k.param(1), k.param(2));
        let bytes = Bytes::alloc(&mut k, 6, columns);
        let rounded: Vec<Val> = (0..6)
            .map(|i| {
                let i = k.index(i);
                let row = row_ptr(&mut k, x, i, columns);
                bytes.pack(&mut k, i, |k, c| k.load_f32x16(row, c));
                bytes.dots.row(&mut k, i)
            })
            .collect();
        let (zero, depth, nothing) = (k.const_i64(0), k.index(bytes.depth()), k.splat_f32(16, 0.0));
        let sums = k.for_carry((zero, depth, 1), &[nothing; 6], |k, block, sums| {
            bytes.add_block(k, (&[weights], &rounded), block, sums)
        });
        for (i, sum) in (0..).zip(sums) {
            let at = k.index(16 * i);
            k.store(out, at, sum);
        }
        let x: Vec<f32> = rows.concat();
        let mut buffers = [Buffer::from_f32(&x), Buffer::from_i32(&strip.words()), Buffer::uninit(6 * 64)];
        run(&k.finish(), [1; 4], &mut buffers, &[0, 1, 2].map(Place::start), Options::default())
            .expect("the kernel runs");
        buffers[2].to_f32()
    }

    /// Numbers of all magnitudes, the largest of each block another.
    fn row(columns: usize, seed: usize) -> Vec<f32> {
        let number = |i: usize| ((i * 7919 + seed * 104_729) % 2001) as f32 / 1000.0 - 1.0;
        (0..columns).map(|i| number(i) * 2.0_f32.powi((i / 32 * 5 + seed) as i32 % 9 - 4)).collect()
    }

    #[test]
    fn products_are_as_far_from_exact_ones_as_numbers_were_rounded() {
        for columns in [16, 32, 48, 64, 80, 112, 128, 208] {
            let rows: [Vec<f32>; 6] = std::array::from_fn(|i| row(columns, i));
            let strip = Strip::new(columns);
            for (i, got) in products(&rows, &strip).into_iter().enumerate() {
                let (want, room) = strip.product(&rows[i / 16], i % 16);
                let far = (f64::from(got) - want).abs();
                assert!(far <= room, "{columns} columns, row {}: {got} for {want}, at most {room} apart", i / 16);
            }
        }
    }

    #[test]
    fn zeros_stay_and_what_is_no_number_spoils_its_row_alone() {
        for columns in [16, 48, 64, 176] {
            let mut rows: [Vec<f32>; 6] = std::array::from_fn(|i| row(columns, i));
            rows[0].fill(0.0);
            rows[1].fill(-0.0);
            rows[2][columns - 1] = f32::NAN;
            rows[3][columns / 2] = f32::INFINITY;
            rows[4][0] = f32::NEG_INFINITY;
            let got = products(&rows, &Strip::new(columns));
            assert!(got[..32].iter().all(|&x| x == 0.0), "{columns} columns: {:?}", &got[..32]);
            assert!(got[32..80].iter().all(|x| x.is_nan()), "{columns} columns: {:?}", &got[32..80]);
            assert!(got[80..].iter().all(|x| x.is_finite()), "{columns} columns: {:?}", &got[80..]);
        }
    }
}
