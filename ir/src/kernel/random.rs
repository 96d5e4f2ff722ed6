//! Counter-based random numbers, defined once for numbers and for kernels: a number depends on its counter and key alone,
//! not on how many were drawn before.

use super::{KernelBuilder, Val};

/// What a random number is for; numbers of one position for different purposes are independent.
pub const PURPOSE_TOKEN: u64 = 0;

const MULTIPLIERS: [u64; 2] = [0xd251_1f53, 0xcd9e_8d57];
const WEYL: [u64; 2] = [0x9e37_79b9, 0xbb67_ae85];
const LOW: u64 = 0xffff_ffff;

/// Arithmetic on words of 64 bits: of numbers, or of the values of a kernel.
pub trait Words {
    /// A word.
    type Word: Copy;
    /// A constant.
    fn constant(&mut self, x: u64) -> Self::Word;
    /// `a + b`, wrapping.
    fn sum(&mut self, a: Self::Word, b: Self::Word) -> Self::Word;
    /// `a * b`, wrapping.
    fn product(&mut self, a: Self::Word, b: Self::Word) -> Self::Word;
    /// `a ^ b`.
    fn exclusive_or(&mut self, a: Self::Word, b: Self::Word) -> Self::Word;
    /// The lower 32 bits.
    fn low(&mut self, x: Self::Word) -> Self::Word;
    /// The upper 32 bits, moved down.
    fn high(&mut self, x: Self::Word) -> Self::Word;
}

/// Words that are numbers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Numbers;

impl Words for Numbers {
    type Word = u64;
    fn constant(&mut self, x: u64) -> u64 {
        x
    }
    fn sum(&mut self, a: u64, b: u64) -> u64 {
        a.wrapping_add(b)
    }
    fn product(&mut self, a: u64, b: u64) -> u64 {
        a.wrapping_mul(b)
    }
    fn exclusive_or(&mut self, a: u64, b: u64) -> u64 {
        a ^ b
    }
    fn low(&mut self, x: u64) -> u64 {
        x & LOW
    }
    fn high(&mut self, x: u64) -> u64 {
        x >> 32
    }
}

impl Words for KernelBuilder {
    type Word = Val;
    fn constant(&mut self, x: u64) -> Val {
        self.const_i64(x.cast_signed())
    }
    fn sum(&mut self, a: Val, b: Val) -> Val {
        self.add(a, b)
    }
    fn product(&mut self, a: Val, b: Val) -> Val {
        self.mul(a, b)
    }
    fn exclusive_or(&mut self, a: Val, b: Val) -> Val {
        self.xor(a, b)
    }
    fn low(&mut self, x: Val) -> Val {
        let mask = self.const_i64(LOW.cast_signed());
        self.and(x, mask)
    }
    fn high(&mut self, x: Val) -> Val {
        let by = self.const_i64(32);
        self.ushr(x, by)
    }
}

/// Philox4x32-10 of a counter and a key of 32-bit words: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as
/// 1, 2, 3", SC 2011.
pub fn philox<A: Words>(a: &mut A, mut counter: [A::Word; 4], mut key: [A::Word; 2]) -> [A::Word; 4] {
    let multipliers = MULTIPLIERS.map(|m| a.constant(m));
    let weyl = WEYL.map(|w| a.constant(w));
    for _ in 0..10 {
        let [c0, c1, c2, c3] = counter;
        let (p, q) = (a.product(c0, multipliers[0]), a.product(c2, multipliers[1]));
        let (p_high, q_high) = (a.high(p), a.high(q));
        let (first, third) = (a.exclusive_or(q_high, c1), a.exclusive_or(p_high, c3));
        counter = [a.exclusive_or(first, key[0]), a.low(q), a.exclusive_or(third, key[1]), a.low(p)];
        key = [0, 1].map(|i| {
            let next = a.sum(key[i], weyl[i]);
            a.low(next)
        });
    }
    counter
}

/// The 64 random bits, in halves, by which the token at a position of a sequence is drawn.
pub fn token_bits<A: Words>(a: &mut A, seed: [A::Word; 2], sequence: A::Word, position: A::Word) -> [A::Word; 2] {
    let (purpose, zero) = (a.constant(PURPOSE_TOKEN), a.constant(0));
    let [high, low, ..] = philox(a, [position, sequence, purpose, zero], seed);
    [high, low]
}

/// `bits · total / 2^64`, rounded down: a random number below `total` from 64 random bits, given in halves.
pub fn below<A: Words>(a: &mut A, [high, low]: [A::Word; 2], total: A::Word) -> A::Word {
    let (t_high, t_low) = (a.high(total), a.low(total));
    let (p, q) = (a.product(high, t_low), a.product(low, t_high));
    let (r, s) = (a.product(low, t_low), a.product(high, t_high));
    let (p_low, q_low, r_high) = (a.low(p), a.low(q), a.high(r));
    let middle = a.sum(p_low, q_low);
    let middle = a.sum(middle, r_high);
    let (p_high, q_high, carry) = (a.high(p), a.high(q), a.high(middle));
    let sum = a.sum(s, p_high);
    let sum = a.sum(sum, q_high);
    a.sum(sum, carry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::eval::{Buffer, Options, Place, run};
    use crate::schedule::Extent;

    /// Counter, key, and what comes out: the vectors published with the generator.
    const PUBLISHED: [([u64; 4], [u64; 2], [u64; 4]); 3] = [
        ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
        ([LOW; 4], [LOW; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
        (
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        ),
    ];

    /// What a kernel computes.
    fn in_kernel(f: impl FnOnce(&mut KernelBuilder) -> Vec<Val>) -> Vec<u64> {
        let mut k = KernelBuilder::new("random", &[("out", true)], Extent::from(1));
        let values = f(&mut k);
        let count = values.len() as u64;
        for (i, v) in (0..).zip(values) {
            let at = k.index(i);
            k.store(k.param(0), at, v);
        }
        let mut buffers = [Buffer::uninit(8 * count)];
        run(&k.finish(), [0; 4], &mut buffers, &[Place::start(0)], Options::default()).expect("the kernel is sound");
        let words = buffers[0].to_i32();
        let word = |i: usize| u64::from(words[i].cast_unsigned());
        (0..count as usize).map(|i| word(2 * i) | word(2 * i + 1) << 32).collect()
    }

    #[test]
    fn philox_gives_the_published_vectors_as_numbers_and_in_kernels() {
        for (counter, key, expected) in PUBLISHED {
            assert_eq!(philox(&mut Numbers, counter, key), expected);
            let kernel = in_kernel(|k| {
                let (counter, key) = (counter.map(|c| k.constant(c)), key.map(|x| k.constant(x)));
                philox(k, counter, key).to_vec()
            });
            assert_eq!(kernel, expected);
        }
    }

    #[test]
    fn below_is_the_upper_half_of_the_product() {
        for total in [1, 2, 1000, (1 << 42) + 12345, (1u64 << 62) - 1] {
            for bits in [0, 1, u64::MAX, 0x0123_4567_89ab_cdef, 1 << 63] {
                let expected = ((u128::from(bits) * u128::from(total)) >> 64) as u64;
                let halves = [bits >> 32, bits & LOW];
                assert_eq!(below(&mut Numbers, halves, total), expected);
                let kernel = in_kernel(|k| {
                    let (halves, total) = (halves.map(|h| k.constant(h)), k.constant(total));
                    vec![below(k, halves, total)]
                });
                assert_eq!(kernel, [expected]);
            }
        }
    }
}
