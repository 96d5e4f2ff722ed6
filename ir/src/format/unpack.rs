//! Kernel IR that gets the numbers out of words of codes. Each function works for words of any number of lanes, so that a
//! lane may be a weight row (CPU tiles), a thread's register (GPU fragments) or a single word (a row of the embedding).

use crate::dtype::DType;
use crate::kernel::{KernelBuilder, Val};

/// `words >> n`, logical.
fn right(k: &mut KernelBuilder, words: Val, n: i32) -> Val {
    if n == 0 {
        return words;
    }
    let n = k.i32_like(words, n);
    k.ushr(words, n)
}

fn left(k: &mut KernelBuilder, words: Val, n: i32) -> Val {
    if n == 0 {
        return words;
    }
    let n = k.i32_like(words, n);
    k.shl(words, n)
}

fn mask(k: &mut KernelBuilder, words: Val, bits: u32) -> Val {
    let bits = k.i32_like(words, bits.cast_signed());
    k.and(words, bits)
}

/// Two halves of a word: the even column in the lower one.
pub fn bf16(k: &mut KernelBuilder, words: &[Val]) -> Vec<Val> {
    let (even, odd) = (left(k, words[0], 16), mask(k, words[0], 0xffff_0000));
    vec![k.bitcast(even, DType::F32), k.bitcast(odd, DType::F32)]
}

/// As bf16, each half widened by moving its exponent: exact for every finite half, denormals included.
pub fn f16(k: &mut KernelBuilder, words: &[Val]) -> Vec<Val> {
    let even = left(k, words[0], 16);
    vec![widen_f16(k, even), widen_f16(k, words[0])]
}

/// The half in the upper 16 bits of each lane as f32.
fn widen_f16(k: &mut KernelBuilder, lanes: Val) -> Val {
    let (magnitude, sign) = (mask(k, lanes, 0x7fff_0000), mask(k, lanes, 0x8000_0000));
    let shifted = right(k, magnitude, 3);
    let small = k.bitcast(shifted, DType::F32);
    let scale = k.f32_like(small, f32::from_bits(0x7780_0000));
    let value = k.fmul(small, scale);
    let bits = k.bitcast(value, DType::I32);
    let signed = k.or(bits, sign);
    k.bitcast(signed, DType::F32)
}

/// A word is the number.
pub fn f32(k: &mut KernelBuilder, words: &[Val]) -> Vec<Val> {
    vec![k.bitcast(words[0], DType::F32)]
}

/// Four bytes: sign, exponent and mantissa to their places in an f32, then the exponent moved by 2^120.
pub fn e4m3(k: &mut KernelBuilder, words: &[Val]) -> Vec<Val> {
    let scale = k.f32_like(words[0], f32::from_bits(0x7b80_0000));
    let byte = |i: i32| {
        let top = left(k, words[0], 24 - 8 * i);
        let four = k.i32_like(words[0], 4);
        // the sign's copies below it are masked off
        let moved = k.sshr(top, four);
        let bits = mask(k, moved, 0x87f0_0000);
        let small = k.bitcast(bits, DType::F32);
        k.fmul(small, scale)
    };
    (0..4).map(byte).collect()
}

/// Four signed bytes.
pub fn i8(k: &mut KernelBuilder, words: &[Val]) -> Vec<Val> {
    let byte = |i: i32| {
        let top = left(k, words[0], 24 - 8 * i);
        let n = k.i32_like(words[0], 24);
        let value = k.sshr(top, n);
        k.to_float(value)
    };
    (0..4).map(byte).collect()
}

/// How far down a word is moved for the codes in its upper half.
const DOWN: i32 = 12;

/// The `bits` bits from bit `at` of `words` on, less `middle`; `high` are the words moved down.
///
/// A code `s` bits from the bottom of an f32 whose last bits stand for `2^-s` counts as units: exponent in, one subtraction,
/// no conversion.
fn field(k: &mut KernelBuilder, [words, high]: [Val; 2], (at, bits): (i32, i32), middle: f32) -> Val {
    // the mantissa has 23 bits: what lies above is taken from the words moved down
    let (from, s) = if at + bits > 23 { (high, at - DOWN) } else { (words, at) };
    let code = mask(k, from, ((1 << bits) - 1) << s);
    let exponent = k.i32_like(words, (150 - s) << 23);
    let code = k.or(code, exponent);
    let shifted = k.bitcast(code, DType::F32);
    let base = k.f32_like(words, 2f32.powi(23 - s) + middle);
    k.fsub(shifted, base)
}

/// Eight nibbles with 8 added.
pub fn i4(k: &mut KernelBuilder, words: &[Val]) -> Vec<Val> {
    nibbles(k, words[0], 8.0)
}

/// Eight nibbles.
pub fn u4(k: &mut KernelBuilder, words: &[Val]) -> Vec<Val> {
    nibbles(k, words[0], 0.0)
}

/// Eight nibbles less `middle`; byte `b` holds column `b` in its lower half and column `4 + b` in its upper.
fn nibbles(k: &mut KernelBuilder, words: Val, middle: f32) -> Vec<Val> {
    let both = [words, right(k, words, DOWN)];
    (0..8).map(|i: i32| field(k, both, (8 * (i % 4) + 4 * (i / 4), 4), middle)).collect()
}

/// Sixteen codes of six bits with 32 added in three words: five in each, and the last in what they leave.
pub fn i6(k: &mut KernelBuilder, words: &[Val]) -> Vec<Val> {
    const MIDDLE: f32 = 32.0;
    let mut numbers = Vec::with_capacity(16);
    for &word in words {
        let both = [word, right(k, word, DOWN)];
        numbers.extend((0..5).map(|i| field(k, both, (6 * i, 6), MIDDLE)));
    }
    let parts = [30, 28, 26].into_iter().zip(words);
    let rests: Vec<Val> = parts.map(|(n, &word)| right(k, word, n)).collect();
    let (second, third) = (mask(k, rests[1], 3 << 2), mask(k, rests[2], 3 << 4));
    let last = k.or(rests[0], second);
    let last = k.or(last, third);
    numbers.push(field(k, [last; 2], (0, 6), MIDDLE));
    numbers
}

#[cfg(test)]
mod tests {
    use crate::format::FORMATS;
    use crate::kernel::KernelBuilder;
    use crate::kernel::eval::{Buffer, Options, Place, run};
    use crate::layout::pieces;
    use crate::{DType, Format};

    /// Unpacks the groups of words of 16 lanes.
    fn unpacked(format: Format, words: &[[u32; 16]]) -> Vec<f32> {
        let columns = format.group_columns();
        let mut k = KernelBuilder::new("unpack", &[("w", false), ("out", true)], 1.into());
        let mut group = Vec::new();
        for i in 0..words.len() {
            let at = k.index(16 * i as u64);
            group.push(k.load(DType::I32, 16, k.param(0), at));
        }
        for (i, v) in (0..).zip((format.def().unpack)(&mut k, &group)) {
            let at = k.index(16 * i);
            k.store(k.param(1), at, v);
        }
        let bytes: Vec<u8> = words.as_flattened().iter().flat_map(|w| w.to_le_bytes()).collect();
        let mut buffers = [Buffer::from_bytes(&bytes), Buffer::uninit(64 * columns)];
        let places = [Place::start(0), Place::start(1)];
        run(&k.finish(), [1; 4], &mut buffers, &places, Options::default()).expect("the kernel runs");
        buffers[1].to_f32()
    }

    #[test]
    fn kernels_read_every_code_as_the_table_says() {
        for def in FORMATS.iter().filter(|d| d.bits <= 16) {
            let (columns, codes) = (def.format.group_columns(), 1u32 << def.bits);
            for first in (0..codes).step_by(16) {
                // lane `lane` of the words holds its code in one column after the other, and its neighbours around it
                let code = |lane: usize, column: u64| (first + lane as u32).wrapping_add(column as u32 * 5) % codes;
                let mut words = vec![[0; 16]; def.words as usize];
                for (lane, column) in (0..16).flat_map(|lane| (0..columns).map(move |c| (lane, c))) {
                    for piece in pieces(def.format, column) {
                        words[piece.word as usize][lane] |= piece.of(code(lane, column));
                    }
                }
                let got = unpacked(def.format, &words);
                for (i, got) in got.iter().enumerate() {
                    let want = (def.decode)(code(i % 16, i as u64 / 16));
                    // NaN codes are refused when a checkpoint is read
                    if want.is_finite() {
                        assert_eq!(
                            got.to_bits(),
                            want.to_bits(),
                            "{}: code {:#x}",
                            def.name,
                            code(i % 16, i as u64 / 16)
                        );
                    }
                }
            }
        }
    }
}
