//! KV in 8 bits: the scale of a row and the codes of its numbers, as [`Stored`] defines them, to the bit.

use nextc_ir::kernel::math::ROUNDER;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::stored::{LEAST_SCALE, SCALE_REST};
use nextc_ir::{DType, Stored};

/// What the numbers of some places of a row, or of all, say of its scale.
#[derive(Clone, Copy)]
pub(super) struct Extremes {
    /// The largest magnitude.
    pub largest: Val,
    /// The sum of each number times zero, which is NaN where one is infinite or no number.
    pub spoilt: Val,
}

impl Extremes {
    /// Of numbers (or vectors, lane by lane).
    pub fn of(k: &mut KernelBuilder, numbers: &[Val]) -> Self {
        let zero = k.f32_like(numbers[0], 0.0);
        numbers.iter().fold(Self { largest: zero, spoilt: zero }, |e, &x| {
            let magnitude = k.fabs(x);
            Self { largest: k.fmax(magnitude, e.largest), spoilt: k.fma(x, zero, e.spoilt) }
        })
    }

    /// The scale of the row.
    pub fn scale(self, k: &mut KernelBuilder, stored: Stored) -> Val {
        let most = k.const_f32(stored.format().def().largest);
        let scale = k.fdiv(self.largest, most);
        let bits = k.bitcast(scale, DType::I32);
        let (rest, kept) = (k.const_i32(SCALE_REST as i32), k.const_i32(!SCALE_REST as i32));
        let bits = k.add(bits, rest);
        let bits = k.and(bits, kept);
        let (scale, least) = (k.bitcast(bits, DType::F32), k.const_f32(LEAST_SCALE));
        let scale = k.fmax(scale, least);
        k.fadd(scale, self.spoilt)
    }
}

/// The integer whose sum with [`ROUNDER`] is `sum`: it lies in the last bits, without a conversion that has no result for NaN.
pub(super) fn integer_of(k: &mut KernelBuilder, sum: Val) -> Val {
    let shift = k.const_f32(ROUNDER);
    let (sum, shift) = (k.bitcast(sum, DType::I32), k.bitcast(shift, DType::I32));
    k.sub(sum, shift)
}

/// The codes of numbers of a row with this scale (of as many lanes), in the lowest byte of each lane; the other bytes are zero.
pub(super) fn encode(k: &mut KernelBuilder, stored: Stored, x: Val, scale: Val) -> Val {
    let x = k.fdiv(x, scale);
    match stored {
        Stored::F32 | Stored::Bf16 => unreachable!("rows of {stored:?} have no scale"),
        Stored::Int8 => {
            // the sum's last bit is worth 1
            let shift = k.f32_like(x, ROUNDER);
            let sum = k.fadd(x, shift);
            let bits = k.bitcast(sum, DType::I32);
            let byte = k.i32_like(bits, 0xff);
            k.and(bits, byte)
        }
        Stored::Fp8 => encode_e4m3(k, x),
    }
}

/// The nearest e4m3 of a number of at most 448, ties to even.
fn encode_e4m3(k: &mut KernelBuilder, x: Val) -> Val {
    let bits = k.bitcast(x, DType::I32);
    let (one, twenty, half, sign) =
        (k.i32_like(bits, 1), k.i32_like(bits, 20), k.i32_like(bits, 0x7_ffff), k.i32_like(bits, 0x80));
    let magnitude = k.fabs(x);
    let normal = {
        let bits = k.bitcast(magnitude, DType::I32);
        let odd = k.ushr(bits, twenty);
        let odd = k.and(odd, one);
        let up = k.add(odd, half);
        let bits = k.add(bits, up);
        let bits = k.ushr(bits, twenty);
        // the exponent's bias is 7 instead of 127
        let bias = k.i32_like(bits, 120 << 3);
        k.sub(bits, bias)
    };
    // the last bit of such a sum is worth 2^-9, which is what codes without an exponent count
    let shift = k.f32_like(magnitude, 16_384.0);
    let sum = k.fadd(magnitude, shift);
    let (sum, base) = (k.bitcast(sum, DType::I32), k.bitcast(shift, DType::I32));
    let small = k.sub(sum, base);
    let least = k.f32_like(magnitude, 0.015_625);
    let is_small = k.cmp(Pred::Lt, magnitude, least);
    let code = k.select(is_small, small, normal);
    let top = k.i32_like(bits, 24);
    let own_sign = k.ushr(bits, top);
    let own_sign = k.and(own_sign, sign);
    let code = k.or(code, own_sign);
    let byte = k.i32_like(code, 0xff);
    k.and(code, byte)
}

/// Words of four codes each, the first in the lowest byte; of codes that are missing the zero.
pub(super) fn words(k: &mut KernelBuilder, codes: &[Val]) -> Val {
    (1..codes.len()).fold(codes[0], |word, i| {
        let by = k.i32_like(codes[i], 8 * i as i32);
        let moved = k.shl(codes[i], by);
        k.or(word, moved)
    })
}

#[cfg(test)]
mod tests {
    use nextc_ir::kernel::eval::{Buffer, Options, Place, run};
    use nextc_ir::shape::LANES;

    use super::*;

    /// The scale of a row, a multiple of 16 numbers, and its codes, as a kernel makes them.
    fn of_kernel(stored: Stored, row: &[f32]) -> (f32, Vec<u32>) {
        let n = row.len() as u64;
        let mut k = KernelBuilder::new("encode", &[("x", false), ("out", true)], 1.into());
        let places: Vec<Val> = (0..n).step_by(LANES as usize).map(|i| k.index(i)).collect();
        let vectors: Vec<Val> = places.iter().map(|&at| k.load_f32x16(k.param(0), at)).collect();
        let lanes = Extremes::of(&mut k, &vectors);
        let all = Extremes { largest: k.reduce_max(lanes.largest), spoilt: k.reduce_add(lanes.spoilt) };
        let scale = all.scale(&mut k, stored);
        let at = k.index(n);
        k.store(k.param(1), at, scale);
        let scale = k.splat(scale, LANES as u32);
        for (&at, x) in places.iter().zip(vectors) {
            let codes = encode(&mut k, stored, x, scale);
            k.store(k.param(1), at, codes);
        }
        let mut buffers = [Buffer::from_f32(row), Buffer::uninit(4 * n + 4)];
        run(&k.finish(), [1; 4], &mut buffers, &[Place::start(0), Place::start(1)], Options::default())
            .expect("the kernel runs");
        let mut out = buffers[1].to_f32();
        let scale = out.pop().expect("a scale");
        (scale, out.into_iter().map(f32::to_bits).collect())
    }

    #[test]
    fn kernels_round_as_states_do() {
        // all between two codes and on them, both signs, for the row's largest of 448 and 127, and others
        let ladder = |largest: f32| {
            let steps = (0..2048).map(move |i| largest * (i as f32 / 2047.0) * if i % 3 == 0 { -1.0 } else { 1.0 });
            steps.chain((-12..4).map(move |i| largest * 2.0_f32.powi(i - 4)))
        };
        let rows = [448.0, 127.0, 1.0, 3.3e-5, 0.0, 1e30].map(|largest| ladder(largest).collect::<Vec<f32>>());
        for (stored, row) in [Stored::Int8, Stored::Fp8].into_iter().flat_map(|s| rows.iter().map(move |r| (s, r))) {
            let (scale, codes) = of_kernel(stored, row);
            assert_eq!(scale.to_bits(), stored.scale(row).to_bits(), "{stored:?}");
            let largest = row.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
            for (x, code) in row.iter().zip(codes) {
                assert_eq!(code, stored.encode(*x, scale), "{stored:?}: {x:e} of {largest:e}");
            }
        }
    }

    #[test]
    fn a_row_with_what_is_no_number_has_no_scale() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut row = [1.0; 16];
            row[7] = bad;
            assert!(of_kernel(Stored::Int8, &row).0.is_nan());
        }
    }
}
