//! How the numbers of a state are stored.
//!
//! Codes are those of a format of weights ([`crate::format`]), which says what they mean; here is what the numbers of one row of keys or values share, and how a
//! row is rounded. Kernels do the same (`passes/src/lower/kv_codes.rs`), to the bit.

use crate::format::{Blocks, Format};

/// How the numbers of a state are stored. What is kept is the number rounded to that, to nearest even.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stored {
    /// As they are.
    F32,
    /// bfloat16.
    Bf16,
    /// Integers from -127 to 127, times a scale for each head of keys or of values of a token.
    Int8,
    /// Eight-bit floats (e4m3), times such a scale.
    Fp8,
}

/// The bits of an f32 that a scale does not use: what it is times the largest code is exact then, so what was rounded once stays as it is.
pub const SCALE_REST: u32 = 0x1ff;
/// The smallest scale: of a row of zeros too.
pub const LEAST_SCALE: f32 = f32::from_bits(0x0080_0000);

impl Stored {
    /// Every one.
    pub const ALL: [Self; 4] = [Self::F32, Self::Bf16, Self::Int8, Self::Fp8];

    /// The name in IR text, and of `--kv`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Fp8 => "fp8",
        }
    }

    /// The one called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.name() == name)
    }

    /// The format whose codes it has.
    pub const fn format(self) -> Format {
        match self {
            Self::F32 => Format::F32,
            Self::Bf16 => Format::Bf16,
            Self::Int8 => Format::Q8(Blocks::group(32)),
            Self::Fp8 => Format::Fp8(Blocks::tile(128, 128)),
        }
    }

    /// Bytes of a code.
    pub fn code_bytes(self) -> usize {
        self.format().def().bits as usize / 8
    }

    /// True if a row of numbers has a scale.
    pub const fn is_scaled(self) -> bool {
        self.format().blocks().is_some()
    }

    /// The scale of a row: its largest magnitude is the largest code, or a little less. NaN if the row holds one, or what is infinite.
    pub fn scale(self, row: &[f32]) -> f32 {
        if !self.is_scaled() {
            return 1.0;
        }
        let largest = row.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
        let bits = (largest / self.format().def().largest).to_bits();
        let scale = f32::from_bits((bits + SCALE_REST) & !SCALE_REST).max(LEAST_SCALE);
        // NaN where a number is: the sum of zeros is one, and that of what is no number is none
        row.iter().fold(scale, |scale, x| scale + x * 0.0)
    }

    /// The code of a number of a row with this scale.
    pub fn encode(self, x: f32, scale: f32) -> u32 {
        (self.format().def().encode)(if self.is_scaled() { x / scale } else { x })
    }

    /// The number of a code.
    pub fn decode(self, code: u32, scale: f32) -> f32 {
        let x = (self.format().def().decode)(code);
        if self.is_scaled() { x * scale } else { x }
    }

    /// A row as it is kept.
    pub fn round(self, row: &mut [f32]) {
        let scale = self.scale(row);
        row.iter_mut().for_each(|x| *x = self.decode(self.encode(*x, scale), scale));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Some rows of numbers of all magnitudes.
    fn rows() -> Vec<Vec<f32>> {
        let mut state = 1_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        let row = |i: i32| (0..64).map(|_| next() * 2.0_f32.powi(i - 30)).collect();
        (0..60).map(row).chain([vec![0.0; 16], vec![1e-44; 16], vec![1e38, 1.0]]).collect()
    }

    #[test]
    fn what_was_rounded_stays_as_it_is() {
        for (stored, row) in Stored::ALL.into_iter().flat_map(|s| rows().into_iter().map(move |row| (s, row))) {
            let (mut once, scale) = (row.clone(), stored.scale(&row));
            stored.round(&mut once);
            let mut twice = once.clone();
            stored.round(&mut twice);
            assert_eq!(once, twice, "{stored:?}");
            let largest = stored.format().def().largest;
            assert!(!stored.is_scaled() || row.iter().all(|x| x.abs() <= largest * scale), "{stored:?} {row:?}");
        }
    }

    #[test]
    fn numbers_are_near_what_they_were() {
        let of_largest = [(Stored::Int8, 0.5001 / 127.0), (Stored::Fp8, 16.01 / 448.0)];
        for ((stored, error), row) in of_largest.into_iter().flat_map(|s| rows().into_iter().map(move |row| (s, row))) {
            let largest = row.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
            let mut kept = row.clone();
            stored.round(&mut kept);
            let far = row.iter().zip(&kept).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
            assert!(far <= error * largest.max(127.0 * LEAST_SCALE), "{stored:?}: {far} of {largest}");
        }
    }

    #[test]
    fn what_is_no_number_spoils_its_row() {
        for stored in [Stored::Int8, Stored::Fp8] {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut row = [1.0, bad, -2.0];
                stored.round(&mut row);
                assert!(row.iter().all(|x| x.is_nan()), "{stored:?} {row:?}");
            }
        }
    }
}
