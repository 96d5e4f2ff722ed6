//! Arithmetic on small floats: what `pack`, `half_fma`, `fp8_to_f16` and `mma` compute.

use super::code::{HalfOp, Mma, MmaGroup, Reg};
use crate::dtype::DType;
use crate::format::{decode_bf16, decode_e4m3, decode_f16, encode_bf16, encode_f16};

/// One op on words.
pub(super) fn apply(op: HalfOp, a: u32, b: u32, c: u32) -> u32 {
    match op {
        HalfOp::Pack(dtype) => both([a, b].map(|x| pack(dtype, f32::from_bits(x)))),
        HalfOp::Fma(dtype) => {
            let [a, b, c] = [a, b, c].map(|x| halves(x).map(|h| decode(dtype, h)));
            both([0, 1].map(|i| fma(dtype, a[i], b[i], c[i])))
        }
        HalfOp::ToFloat => decode_f16(a as u16).to_bits(),
        HalfOp::Fp8 => both([a as u8, (a >> 8) as u8].map(|x| encode_f16(decode_e4m3(x)))),
    }
}

/// The 16-bit floats of a word, the lower one first.
fn halves(word: u32) -> [u16; 2] {
    [word as u16, (word >> 16) as u16]
}

fn both([low, high]: [u16; 2]) -> u32 {
    u32::from(low) | u32::from(high) << 16
}

fn decode(dtype: DType, half: u16) -> f32 {
    if dtype == DType::F16 { decode_f16(half) } else { decode_bf16(half) }
}

fn encode(dtype: DType, x: f32) -> u16 {
    if dtype == DType::F16 { encode_f16(x) } else { encode_bf16(x) }
}

/// To nearest even; f16 is limited to its finite numbers.
fn pack(dtype: DType, x: f32) -> u16 {
    const LARGEST: f32 = 65504.0;
    // `clamp` keeps a NaN
    encode(dtype, if dtype == DType::F16 { x.clamp(-LARGEST, LARGEST) } else { x })
}

/// `a * b + c`, rounded once.
fn fma(dtype: DType, a: f32, b: f32, c: f32) -> u16 {
    // The product of two numbers of at most 11 bits is exact in f64.
    let (product, c) = (f64::from(a) * f64::from(b), f64::from(c));
    let sum = product + c;
    let error = two_sum_error(product, c, sum);
    encode(dtype, odd(sum, error))
}

/// What a sum of two lost by rounding, exactly (Knuth).
fn two_sum_error(a: f64, b: f64, sum: f64) -> f64 {
    let from_b = sum - a;
    (a - (sum - from_b)) + (b - from_b)
}

/// `sum + error` as f32, rounded to odd: towards zero, and where anything is lost with the last bit set. Rounding that to
/// a format of at most 22 bits gives what rounding the exact number would.
fn odd(sum: f64, error: f64) -> f32 {
    let near = sum as f32;
    let lost = if f64::from(near).is_finite() { (sum - f64::from(near)) + error } else { error };
    if !sum.is_finite() || (near.is_finite() && lost == 0.0) {
        return near;
    }
    let beyond = near.is_infinite() || (lost < 0.0) != (sum < 0.0);
    let towards_zero = near.to_bits() - u32::from(beyond);
    f32::from_bits(towards_zero | 1)
}

/// Rows of A and C, columns of B and C, and the dimension that is summed.
const M: usize = 16;
const N: usize = 8;
const K: usize = 16;

/// Where element (row, column) of a fragment of 8 columns, two neighbours a register, lies in a warp: the thread.
fn owner(row: usize, column: usize) -> usize {
    row % 8 * 4 + column % 8 / 2
}

/// A of the warp whose first thread is `first`, out of its four registers.
fn operand_a(dtype: DType, a: &[Reg], narrow: &[u32], first: usize) -> [[f64; K]; M] {
    each(|row, k| {
        let word = narrow[a[row / 8 + k / 8 * 2] + first + owner(row, k)];
        f64::from(decode(dtype, halves(word)[k % 2]))
    })
}

/// `C + A·B` of the warp whose first thread is `first`: registers have one number a thread, `threads` in all.
pub(super) fn mma(m: &Mma, narrow: &mut [u32], first: usize, threads: usize) {
    let half = |reg: Reg, thread: usize, i: usize| f64::from(decode(m.dtype, halves(narrow[reg + first + thread])[i]));
    let a = operand_a(m.dtype, &m.a, narrow, first);
    let b: [[f64; N]; K] = each(|k, n| half(m.b[k / 8], owner(n, k), k % 2));
    let at = |reg: Reg, row: usize, n: usize| reg + (row / 8 * 2 + n % 2) * threads + first + owner(row, n);
    let c: [[f64; N]; M] = each(|row, n| f64::from(f32::from_bits(narrow[at(m.c, row, n)])));
    for row in 0..M {
        let mut sums = c[row];
        for (x, b) in a[row].iter().zip(&b) {
            sums.iter_mut().zip(b).for_each(|(sum, y)| *sum += x * y);
        }
        for (n, sum) in sums.into_iter().enumerate() {
            narrow[at(m.d, row, n)] = (sum as f32).to_bits();
        }
    }
}

/// `A·B` of the warp whose first thread is `first`, where `tokens` has eight words a step of each column of B.
pub(super) fn mma_group(m: &MmaGroup, narrow: &mut [u32], tokens: &[Vec<u32>], (first, threads): (usize, usize)) {
    for (step, a) in m.a.chunks(4).enumerate() {
        let a = operand_a(m.dtype, a, narrow, first);
        for (n, token) in tokens.iter().enumerate() {
            let b: [f64; K] =
                std::array::from_fn(|k| f64::from(decode(m.dtype, halves(token[step * K / 2 + k / 2])[k % 2])));
            for (row, a) in a.iter().enumerate() {
                let number = n / N * 4 + row / 8 * 2 + n % 2;
                let at = m.d + number * threads + first + owner(row, n);
                let begin = if step == 0 { 0.0 } else { f64::from(f32::from_bits(narrow[at])) };
                let sum = a.iter().zip(&b).fold(begin, |sum, (x, y)| sum + x * y);
                narrow[at] = (sum as f32).to_bits();
            }
        }
    }
}

fn each<const COLUMNS: usize, const ROWS: usize>(f: impl Fn(usize, usize) -> f64) -> [[f64; COLUMNS]; ROWS] {
    std::array::from_fn(|row| std::array::from_fn(|column| f(row, column)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that look random, the same on every run.
    fn random(state: &mut u64) -> u32 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        (*state >> 20) as u32
    }

    /// `x · 2^60`, exact for what the tests use.
    fn fixed(x: f64) -> i128 {
        assert!(x == 0.0 || (x.abs() >= 2f64.powi(-60) && x.abs() < 2f64.powi(60)), "{x}");
        let (high, low) = ((x * 2f64.powi(20)).trunc(), (x * 2f64.powi(20)).fract());
        high as i128 * (1 << 40) + (low * 2f64.powi(40)) as i128
    }

    /// The result must be the nearest of its neighbours to the exact number, and even where two are.
    fn check_fma(dtype: DType, [a, b, c]: [u16; 3]) {
        let [x, y, z] = [a, b, c].map(|h| f64::from(decode(dtype, h)));
        let exact = fixed(x * y) + fixed(z);
        let found = fma(dtype, x as f32, y as f32, z as f32);
        let off = |h: u16| (fixed(f64::from(decode(dtype, h))) - exact).abs();
        assert!(exact == 0 || (found >> 15 == 1) == (exact < 0), "{dtype} {a:#x} {b:#x} {c:#x}: {found:#x}");
        for near in [found.wrapping_sub(1), found + 1].into_iter().filter(|h| h >> 15 == found >> 15) {
            let closer = off(found) < off(near) || (off(found) == off(near) && found.is_multiple_of(2));
            assert!(closer, "{dtype} {a:#x} * {b:#x} + {c:#x}: {found:#x}, but {near:#x} is nearer");
        }
    }

    #[test]
    fn fma_rounds_once_to_nearest_even() {
        let mut state = 1;
        for _ in 0..200_000 {
            // f16 with products of at most 2^15; bf16 between 2^-20 and 2^20
            let f16 = [(); 3].map(|()| (random(&mut state) & 0x83ff | ((random(&mut state) % 22) << 10)) as u16);
            check_fma(DType::F16, f16);
            let bf16 = [(); 3].map(|()| (random(&mut state) & 0x807f | ((107 + random(&mut state) % 41) << 7)) as u16);
            check_fma(DType::BF16, bf16);
        }
        // the product lies between two numbers, the sum a little beyond: f64 alone would round to the even one
        let [x, tiny] = [0x3f81, 0x0480];
        assert_eq!(fma(DType::BF16, decode_bf16(x), decode_bf16(x), 0.0), 0x3f82);
        let middle = [0x3f90, 0x3f88].map(decode_bf16);
        assert_eq!(f64::from(middle[0]) * f64::from(middle[1]), 1.195_312_5);
        assert_eq!(fma(DType::BF16, middle[0], middle[1], 0.0), 0x3f99);
        let half_way = [0x3f83, 0x3fc0].map(decode_bf16);
        assert_eq!(f64::from(half_way[0]) * f64::from(half_way[1]), 1.535_156_25);
        assert_eq!(fma(DType::BF16, half_way[0], half_way[1], 0.0), 0x3fc4);
        assert_eq!(fma(DType::BF16, half_way[0], half_way[1], decode_bf16(tiny)), 0x3fc5);
        assert_eq!(fma(DType::BF16, half_way[0], half_way[1], -decode_bf16(tiny)), 0x3fc4);
    }

    #[test]
    fn fma_knows_infinity_and_what_is_no_number() {
        let max = f32::MAX;
        assert_eq!(fma(DType::F16, 60000.0, 2.0, 0.0), 0x7c00);
        assert_eq!(fma(DType::F16, 60000.0, -2.0, 0.0), 0xfc00);
        assert_eq!(fma(DType::BF16, max, max, max), 0x7f80);
        assert!(decode_f16(fma(DType::F16, f32::INFINITY, 0.0, 1.0)).is_nan());
        assert!(decode_bf16(fma(DType::BF16, f32::INFINITY, 1.0, f32::NEG_INFINITY)).is_nan());
        assert_eq!(fma(DType::F16, -1.0, 0.0, 0.0), 0);
        // the smallest numbers, and half of them
        assert_eq!(fma(DType::F16, decode_f16(1), 1.0, decode_f16(1)), 2);
        assert_eq!(fma(DType::F16, decode_f16(1), 0.5, 0.0), 0);
        assert_eq!(fma(DType::F16, decode_f16(3), 0.5, 0.0), 2);
    }

    #[test]
    fn pack_limits_f16_and_keeps_what_is_no_number() {
        let pack = |dtype, a: f32, b: f32| apply(HalfOp::Pack(dtype), a.to_bits(), b.to_bits(), 0);
        assert_eq!(pack(DType::F16, 1.0, -2.0), 0xc000_3c00);
        assert_eq!(pack(DType::F16, 1e9, f32::NEG_INFINITY), 0xfbff_7bff);
        assert!(decode_f16(pack(DType::F16, f32::NAN, 0.0) as u16).is_nan());
        assert_eq!(pack(DType::BF16, 1.0, f32::INFINITY), 0x7f80_3f80);
        assert!(decode_bf16(pack(DType::BF16, f32::NAN, 0.0) as u16).is_nan());
        // halfway cases go to the even one
        assert_eq!(pack(DType::BF16, f32::from_bits(0x3f80_8000), f32::from_bits(0x3f81_8000)), 0x3f82_3f80);
        assert_eq!(pack(DType::F16, 2049.0, 2051.0), 0x6802_6800);
    }

    #[test]
    fn every_fp8_number_is_an_f16() {
        for b in 0..=u8::MAX {
            let word = apply(HalfOp::Fp8, u32::from(b) | 0x3800, 0, 0);
            let low = decode_f16(word as u16);
            assert_eq!(word >> 16, 0x3c00, "1.0 is in the upper half");
            assert!(low == decode_e4m3(b) || (low.is_nan() && b & 0x7f == 0x7f), "{b:#x}: {low}");
            assert_eq!(apply(HalfOp::ToFloat, word, 0, 0), low.to_bits());
        }
    }
}
