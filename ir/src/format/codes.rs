//! Matrices in codes: what a quantised checkpoint stores and the packer places; and how numbers are rounded to it.

use super::{Blocks, Format, Shift, encode_bf16, encode_f16};
use crate::dtype::DType;
use crate::kernel::math::ROUNDER;

/// Rows of a scaled matrix: a code for each element, and scale and zero point for each block of columns of each row. Blocks of
/// several rows repeat theirs in each row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Codes {
    /// Columns of a row.
    pub columns: usize,
    /// The code of each element, row by row.
    pub codes: Vec<u8>,
    /// The scale of each row's blocks; a whole number where it is counted in units.
    pub scales: Vec<f32>,
    /// The second number of each row's blocks, likewise (a zero point is a number of the code's kind); empty where the format has none.
    pub zeros: Vec<f32>,
    /// The units of each row, those of second numbers behind those of scales; empty where nothing is counted in units.
    pub units: Vec<[f32; 2]>,
    /// The block of each column, the same for all rows; empty if blocks are neighbouring columns.
    pub blocks: Vec<u32>,
}

/// Why numbers have no form in a format.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum RoundError {
    /// The format has second numbers or units, which no rounding here finds.
    #[error("no numbers are rounded to {0}: weights have it where the checkpoint does")]
    Format(Format),
    /// Neither NaN nor infinities have a code.
    #[error("it holds {0}, expected finite numbers")]
    NotFinite(f32),
    /// The scale would be too large for its type.
    #[error("a block reaches {largest}, which needs a scale of {scale}, more than {dtype} holds")]
    Scale {
        /// The largest magnitude of the block.
        largest: f32,
        /// The scale that it needs.
        scale: f32,
        /// The type of scales.
        dtype: DType,
    },
}

impl Codes {
    /// Removes all rows, and says how wide further ones are.
    pub fn clear(&mut self, columns: usize) {
        self.columns = columns;
        self.codes.clear();
        self.scales.clear();
        self.zeros.clear();
        self.units.clear();
        self.blocks.clear();
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.codes.len().checked_div(self.columns).unwrap_or(0)
    }

    /// Blocks of columns of a row.
    pub fn row_blocks(&self) -> usize {
        self.scales.len().checked_div(self.rows()).unwrap_or(0)
    }

    /// The number that an element stands for: exact where f64 holds it, as it does for every format of the table.
    pub fn number(&self, format: Format, row: usize, column: usize) -> f64 {
        let blocks = format.blocks().expect("codes belong to scaled formats");
        let block = self.blocks.get(column).map_or(column / blocks.columns as usize, |&b| b as usize);
        let at = row * self.row_blocks() + block;
        let code = f64::from((format.def().decode)(u32::from(self.codes[row * self.columns + column])));
        let [unit, second_unit] = match blocks.unit {
            0 => [1.0; 2],
            columns => {
                let wide = self.columns.div_ceil(columns as usize);
                self.units[row * wide + block * blocks.columns as usize / columns as usize].map(f64::from)
            }
        };
        let scale = f64::from(self.scales[at]) * unit;
        let second = self.zeros.get(at).map_or(0.0, |&x| f64::from(x)) * second_unit;
        match format.def().shift {
            Shift::Zero => (code - second) * scale,
            Shift::Offset => code * scale + second,
        }
    }

    /// The numbers of all elements, rounded once.
    pub fn numbers(&self, format: Format, out: &mut [f32]) {
        for (row, out) in out.chunks_exact_mut(self.columns).enumerate() {
            out.iter_mut().enumerate().for_each(|(column, x)| *x = self.number(format, row, column) as f32);
        }
    }

    /// Appends rows of numbers, rounded to `format` without zero points and in the order of their columns. The first row begins
    /// a block, and no block goes beyond the last.
    /// # Errors
    /// [`RoundError`] if a number is not finite, or too large, or nothing is rounded to the format.
    pub fn round(&mut self, format: Format, rows: &[f32]) -> Result<(), RoundError> {
        let blocks =
            format.blocks().filter(|b| !b.zero && b.unit == 0 && !b.ordered).ok_or(RoundError::Format(format))?;
        let (columns, width) = (self.columns, blocks.columns as usize);
        for band in rows.chunks(columns * blocks.rows as usize) {
            let mut scales = Vec::with_capacity(columns.div_ceil(width));
            for first in (0..columns).step_by(width) {
                let end = (first + width).min(columns);
                scales.push(scale_of(format, blocks, band.chunks(columns).map(|row| &row[first..end]))?);
            }
            for row in band.chunks(columns) {
                for (part, &scale) in row.chunks(width).zip(&scales) {
                    self.codes.extend(part.iter().map(|&x| code_of(format, x, scale)));
                }
                self.scales.extend(&scales);
            }
        }
        Ok(())
    }
}

/// The code of `x` in a block of this scale.
fn code_of(format: Format, x: f32, scale: f32) -> u8 {
    let scaled = if scale == 0.0 { 0.0 } else { x / scale };
    (format.def().encode)(scaled) as u8
}

/// The scale of a block, as its type holds it.
fn scale_of<'a>(
    format: Format,
    blocks: Blocks,
    rows: impl Iterator<Item = &'a [f32]> + Clone,
) -> Result<f32, RoundError> {
    let numbers = rows.clone().flatten().copied();
    if let Some(x) = numbers.clone().find(|x| !x.is_finite()) {
        return Err(RoundError::NotFinite(x));
    }
    let largest = numbers.fold(0f32, |m, x| if x.abs() > m.abs() { x } else { m });
    let scale = match format {
        Format::Q4(_) => best_scale(blocks.scale, largest, &rows.flatten().copied().collect::<Vec<f32>>()),
        _ => stored(blocks.scale, largest.abs() / format.def().largest),
    };
    let too_large = RoundError::Scale { largest: largest.abs(), scale, dtype: blocks.scale };
    if scale.is_finite() { Ok(scale) } else { Err(too_large) }
}

/// `x` as the type of scales holds it.
fn stored(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::F16 => super::decode_f16(encode_f16(x)),
        DType::BF16 => super::decode_bf16(encode_bf16(x)),
        _ => x,
    }
}

/// The scale of four-bit codes with the least squared error among a few: the number of largest magnitude becomes about -8 (there
/// is no 8), or about 7; each trial's codes then choose their own best scale. All trials go over the numbers together, as lanes of vectors.
fn best_scale(dtype: DType, largest: f32, numbers: &[f32]) -> f32 {
    const TRIALS: [f32; 14] = [-8.0, -7.6, -7.2, -7.8, -7.4, -8.2, -8.4, -8.6, -8.8, 7.0, 7.2, 7.4, 6.8, 6.6];
    if largest == 0.0 {
        return 0.0;
    }
    let inverses = TRIALS.map(|trial| trial / largest);
    let (mut products, mut squares, mut errors) = ([0f32; 14], [0f32; 14], [0f32; 14]);
    for &x in numbers {
        for ((product, square), inverse) in products.iter_mut().zip(&mut squares).zip(inverses) {
            let code = nearest_code(x * inverse);
            *product += x * code;
            *square += code * code;
        }
    }
    let scales: [f32; 14] = std::array::from_fn(|i| stored(dtype, products[i] / squares[i]));
    for &x in numbers {
        for (error, scale) in errors.iter_mut().zip(scales) {
            let off = x - scale * nearest_code(x / scale);
            *error += off * off;
        }
    }
    let (mut best, mut least) = (stored(dtype, largest / TRIALS[0]), f32::INFINITY);
    for (scale, error) in scales.into_iter().zip(errors) {
        if scale.is_finite() && scale != 0.0 && error < least {
            (best, least) = (scale, error);
        }
    }
    best
}

/// The four-bit code nearest to a number, the even one of two.
fn nearest_code(x: f32) -> f32 {
    (x.clamp(-8.0, 7.0) + ROUNDER) - ROUNDER
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers with a bell-shaped distribution, the same every time.
    fn numbers(count: usize) -> Vec<f32> {
        let mut seed = 1u64;
        let mut uniform = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        (0..count).map(|_| (0..6).map(|_| uniform()).sum::<f32>() * 0.03).collect()
    }

    fn rounded(name: &str, columns: usize, x: &[f32]) -> (Format, Codes) {
        let format = Format::from_name(name).expect(name);
        let mut codes = Codes { columns, ..Codes::default() };
        codes.round(format, x).expect("the numbers fit");
        (format, codes)
    }

    /// Root of the mean squared error over that of the numbers.
    fn error(name: &str, columns: usize, x: &[f32]) -> f64 {
        let (format, codes) = rounded(name, columns, x);
        let off = |(i, &x): (usize, &f32)| (codes.number(format, i / columns, i % columns) - f64::from(x)).powi(2);
        let square: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
        (x.iter().enumerate().map(off).sum::<f64>() / square).sqrt()
    }

    #[test]
    fn rounding_is_as_good_as_the_bits_allow() {
        let x = numbers(64 * 256);
        for (name, least, most) in
            [("q8", 0.003, 0.006), ("q4", 0.06, 0.08), ("fp8", 0.02, 0.03), ("q4<g128>", 0.07, 0.1)]
        {
            let error = error(name, 256, &x);
            assert!((least..most).contains(&error), "{name}: {error}");
        }
    }

    #[test]
    fn numbers_of_a_format_keep_their_codes() {
        for name in ["q8", "q4", "fp8", "q4<g16,f32>"] {
            let (format, codes) = rounded(name, 96, &numbers(96 * 32));
            let again: Vec<f32> = (0..96 * 32).map(|i| codes.number(format, i / 96, i % 96) as f32).collect();
            let (_, second) = rounded(name, 96, &again);
            let worst = (0..96 * 32).map(|i| (second.number(format, i / 96, i % 96) - f64::from(again[i])).abs());
            let worst = worst.fold(0f64, f64::max);
            assert!(worst < 1e-4, "{name}: {worst}");
        }
    }

    #[test]
    fn offsets_and_units_count_as_they_should() {
        let format = Format::from_name("u4<g32,k64>").expect("a format");
        let codes = Codes {
            columns: 96,
            codes: vec![5; 96],
            scales: vec![3.0, 2.0, 7.0],
            zeros: vec![-1.0, 4.0, -8.0],
            units: vec![[0.5, 0.25], [2.0, 1.0]],
            ..Codes::default()
        };
        let numbers = [0, 32, 64].map(|c| codes.number(format, 0, c));
        assert_eq!(numbers, [5.0 * 1.5 - 0.25, 5.0 * 1.0 + 1.0, 5.0 * 14.0 - 8.0]);
    }

    #[test]
    fn a_block_of_zeros_stays_one() {
        let mut x = numbers(64);
        x[..32].fill(0.0);
        let (format, codes) = rounded("q4", 64, &x);
        assert!((0..32).all(|c| codes.number(format, 0, c) == 0.0));
        assert_eq!(codes.scales[0], 0.0);
    }

    #[test]
    fn what_has_no_form_is_refused() {
        let refused = |name: &str, x: f32| {
            let mut codes = Codes { columns: 32, ..Codes::default() };
            let mut numbers = numbers(32);
            numbers[7] = x;
            codes.round(Format::from_name(name).expect(name), &numbers).expect_err("it does not fit").to_string()
        };
        assert_eq!(refused("q4", f32::NAN), "it holds NaN, expected finite numbers");
        assert_eq!(refused("fp8", f32::INFINITY), "it holds inf, expected finite numbers");
        assert!(refused("q4<g32,zero>", 0.0).contains("rounded to q4<g32,zero>"));
        assert!(refused("q8<g16,k256>", 0.0).contains("rounded to"));
        assert!(refused("q8", 1e8).contains("more than f16 holds"));
        assert!(refused("q4", -1e8).contains("more than f16 holds"));
    }
}
