//! Arithmetic of a CPU's widest vectors and its matrix unit: what `bf16_row`, `bf16_pairs`, `byte_row`, `byte_dot`, `pair_dot`, `short_dot` and `tile_step` compute.
//!
//! Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: VCVTNE2PS2BF16 and TDPBF16PS. Both round to nearest even and
//! take numbers smaller than the least normal one for zeros, whatever MXCSR says.

use crate::format::{decode_bf16, encode_bf16};

/// Lines of a tile, and words of a line.
pub(super) const ROWS: usize = 16;

/// A tile: lines of words, each two bf16.
pub(super) type Tile = [[u32; ROWS]; ROWS];

/// Four sums of tiles.
pub(super) type Sums = [[[f32; ROWS]; ROWS]; 4];

/// For each line of 16 numbers of a matrix of sums, where it begins: the number of the sum and of the line in it.
pub(super) fn lines(rows: usize, columns: usize) -> impl Iterator<Item = (i64, (usize, usize))> {
    (0..rows * ROWS * columns).map(move |i| {
        let (row, column) = (i / columns, i % columns);
        ((i * ROWS) as i64, (row / ROWS * columns + column, row % ROWS))
    })
}

/// A number that is too small to be a normal one as a zero of its sign.
fn flushed(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

fn to_bf16(bits: u32) -> u32 {
    encode_bf16(flushed(f32::from_bits(bits))).into()
}

/// The lanes of `a`, then those of `b`, two a word.
pub(super) fn bf16_row(a: &[u32; ROWS], b: &[u32; ROWS]) -> [u32; ROWS] {
    let number = |i: usize| to_bf16(if i < ROWS { a[i] } else { b[i - ROWS] });
    std::array::from_fn(|word| number(2 * word) | number(2 * word + 1) << 16)
}

/// A lane of `a` and the same of `b` in each word.
pub(super) fn bf16_pairs(a: &[u32; ROWS], b: &[u32; ROWS]) -> [u32; ROWS] {
    std::array::from_fn(|lane| to_bf16(a[lane]) | to_bf16(b[lane]) << 16)
}

/// The lowest byte of each lane, four a word.
pub(super) fn byte_row(vectors: &[[u32; ROWS]; 4]) -> [u32; ROWS] {
    let byte = |i: usize| vectors[i / ROWS][i % ROWS] & 0xff;
    std::array::from_fn(|word| (0..4).fold(0, |bytes, i| bytes | byte(4 * word + i) << (8 * i)))
}

/// `sum` and the products of the bytes of `a`, which are unsigned, with those of `b`, which are signed.
pub(super) fn byte_dot(sum: u32, a: u32, b: u32) -> u32 {
    let products = a.to_le_bytes().into_iter().zip(b.to_le_bytes());
    products.fold(sum, |sum, (a, b)| sum.wrapping_add_signed(i32::from(a) * i32::from(b.cast_signed())))
}

/// `sum` and the products of the signed halves of `a` and `b`.
pub(super) fn short_dot(sum: u32, a: u32, b: u32) -> u32 {
    let half = |word: u32, upper: u32| i32::from((word >> (16 * upper)) as u16 as i16);
    [0, 1].into_iter().fold(sum, |sum, upper| sum.wrapping_add_signed(half(a, upper) * half(b, upper)))
}

/// `sum` and the products of the bf16 of `a` and `b`, those of the upper halves first.
pub(super) fn pair_dot(sum: u32, a: u32, b: u32) -> u32 {
    let half = |word: u32, upper: u32| flushed(decode_bf16((word >> (16 * upper)) as u16));
    let add = |sum: f32, upper| flushed(half(a, upper).mul_add(half(b, upper), sum));
    [1, 0].into_iter().fold(flushed(f32::from_bits(sum)), add).to_bits()
}

/// `c += a·b`: row `m` of `a` times column `n` of `b`.
pub(super) fn multiply_add(c: &mut [[f32; ROWS]; ROWS], a: &Tile, b: &Tile) {
    let numbers = |tile: &Tile| -> [[[f32; 2]; ROWS]; ROWS] {
        tile.map(|line| line.map(|word| [word as u16, (word >> 16) as u16].map(|half| flushed(decode_bf16(half)))))
    };
    let (a, b) = (numbers(a), numbers(b));
    for (c, a) in c.iter_mut().zip(&a) {
        let mut sums = [[0f32; 2]; ROWS];
        for (x, line) in a.iter().zip(&b) {
            for (sum, y) in sums.iter_mut().zip(line) {
                *sum = [0, 1].map(|half| flushed(x[half].mul_add(y[half], sum[half])));
            }
        }
        for (c, [even, odd]) in c.iter_mut().zip(sums) {
            *c = flushed(*c + flushed(even + odd));
        }
    }
}
