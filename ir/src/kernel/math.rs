//! Transcendental functions, expanded once in kernel IR, so that every backend and the interpreter compute the same bits.
//!
//! Each method takes an f32 scalar or vector of any lanes and uses only ops of [`KOp`](super::KOp) that are exact or
//! rounded once. Largest errors, measured by the tests of this file on dense sweeps through the interpreter:
//!
//! | function | domain | largest error | outside, and at the edges |
//! |---|---|---|---|
//! | `exp` | all | 1 ulp | `+inf` above 88.73, denormals and then 0 below -87.34, NaN stays NaN |
//! | `log` | finite `x > 0`, denormals too | 1 ulp | unspecified for `x <= 0`, `inf` and NaN |
//! | `sigmoid` | all | 2.5 ulp | 0 and 1 at the infinities, NaN stays NaN |
//! | `silu` | finite, above -87 | 3 ulp | NaN at `-inf` (`-inf · 0`), as in the published code |
//! | `softplus` | all | 2 ulp | `x` itself above 20, 0 at `-inf`, NaN stays NaN |
//! | `rsqrt` | `x >= 0` | 1.5 ulp | `inf` at 0, NaN below |
//! | `sin_cos` | `abs(x) <= 2^20` | 2^-23 absolute | unspecified |

use super::{KernelBuilder, Pred, Val};
use crate::dtype::DType;

/// `ln 2` in two parts, the first rounded to nearest.
const LN_2: [f32; 2] = [std::f32::consts::LN_2, -1.904_654_2e-9];
/// `pi / 2` in three parts, each the rest of those before, rounded to nearest.
const HALF_PI: [u32; 3] = [0x3fc9_0fdb, 0xb33b_bd2e, 0xa6f7_2ced];
/// `1.5 · 2^23`: a number added to it is rounded to an integer, which stands in the low bits of the sum.
pub const ROUNDER: f32 = 12_582_912.0;
/// `(e^r - 1 - r) / r^2` on `abs(r) <= ln 2 / 2`, interpolated at Chebyshev nodes; relative error of `e^r` 1e-8.
const EXP: [f32; 5] = [0.5, 0.166_665_77, 0.041_666_555, 0.008_363_173, 0.001_392_617_6];
/// `(atanh(s) / s - 1) · 2 / s^2` in powers of `s^2`; for `s <= 0.172` the terms left out are below 1e-9.
const ATANH: [f32; 4] = [2.0 / 3.0, 2.0 / 5.0, 2.0 / 7.0, 2.0 / 9.0];
/// `(sin(r) / r - 1) / r^2` in powers of `r^2`; for `abs(r) <= 0.84` the terms left out are below 4e-9.
const SIN: [f32; 4] = [-1.0 / 6.0, 1.0 / 120.0, -1.0 / 5040.0, 1.0 / 362_880.0];
/// `(cos(r) - 1) / r^2` in powers of `r^2`; for `abs(r) <= 0.84` the terms left out are below 3e-10.
const COS: [f32; 5] = [-0.5, 1.0 / 24.0, -1.0 / 720.0, 1.0 / 40_320.0, -1.0 / 3_628_800.0];

impl KernelBuilder {
    /// `e^x`, within 1 ulp; see the module's table.
    pub fn exp(&mut self, x: Val) -> Val {
        // In `fmin` and `fmax` the second operand wins against NaN.
        let (low, high) = (self.f32_like(x, -110.0), self.f32_like(x, 100.0));
        let x = self.fmin(high, x);
        let x = self.fmax(low, x);
        let (n, n_bits) = self.round_scaled(x, std::f32::consts::LOG2_E);
        let r = self.sub_product(x, n, LN_2[0]);
        let r = self.sub_product(r, n, LN_2[1]);
        let rest = self.polynomial(r, &EXP);
        let square = self.fmul(r, r);
        let rest = self.fma(rest, square, r);
        let one = self.f32_like(x, 1.0);
        let p = self.fadd(one, rest);
        // 2^n in two factors: neither leaves the normal numbers, so the result is rounded once, overflow and denormals included.
        let shift = self.i32_like(x, 1);
        let half = self.sshr(n_bits, shift);
        let other = self.sub(n_bits, half);
        let (half, other) = (self.power_of_two(half), self.power_of_two(other));
        let p = self.fmul(p, half);
        self.fmul(p, other)
    }

    /// `ln x` for finite `x > 0`, within 1 ulp.
    pub fn log(&mut self, x: Val) -> Val {
        let least = self.f32_like(x, f32::MIN_POSITIVE);
        let denormal = self.cmp(Pred::Lt, x, least);
        let up = self.f32_like(x, 16_777_216.0);
        let scaled = self.fmul(x, up);
        let x = self.select(denormal, scaled, x);
        let (none, down) = (self.i32_like(x, 0), self.i32_like(x, -24));
        let exponent = self.select(denormal, down, none);
        self.log_normal(x, exponent)
    }

    /// `1 / (1 + e^-x)`, within 2.5 ulp, for very negative `x` too.
    pub fn sigmoid(&mut self, x: Val) -> Val {
        let t = self.exp_of_minus_abs(x);
        let (zero, one) = (self.f32_like(x, 0.0), self.f32_like(x, 1.0));
        let negative = self.cmp(Pred::Lt, x, zero);
        let numerator = self.select(negative, t, one);
        let denominator = self.fadd(one, t);
        self.fdiv(numerator, denominator)
    }

    /// `x · sigmoid(x)`.
    pub fn silu(&mut self, x: Val) -> Val {
        let gate = self.sigmoid(x);
        self.fmul(x, gate)
    }

    /// `ln(1 + e^x)`, within 2 ulp, for very negative `x` too.
    pub fn softplus(&mut self, x: Val) -> Val {
        let t = self.exp_of_minus_abs(x);
        // ln(1 + t) = ln(u) + (what u = 1 + t lost in rounding) / u
        let (zero, one) = (self.f32_like(x, 0.0), self.f32_like(x, 1.0));
        let u = self.fadd(one, t);
        let kept = self.fsub(u, one);
        let lost = self.fsub(t, kept);
        let correction = self.fdiv(lost, u);
        let exponent = self.i32_like(x, 0);
        let log = self.log_normal(u, exponent);
        let log = self.fadd(log, correction);
        let linear = self.fmax(zero, x);
        self.fadd(linear, log)
    }

    /// `1 / sqrt(x)`: exactly these two ops, each rounded once.
    pub fn rsqrt(&mut self, x: Val) -> Val {
        let root = self.fsqrt(x);
        let one = self.f32_like(x, 1.0);
        self.fdiv(one, root)
    }

    /// `(sin x, cos x)` for `abs(x) <= 2^20`, within 2^-23 absolute.
    pub fn sin_cos(&mut self, x: Val) -> (Val, Val) {
        let (n, quadrant) = self.round_scaled(x, std::f32::consts::FRAC_2_PI);
        let r = HALF_PI.iter().fold(x, |r, &part| self.sub_product(r, n, f32::from_bits(part)));
        let square = self.fmul(r, r);
        let rest = self.polynomial(square, &SIN);
        let cube = self.fmul(square, r);
        let sin = self.fma(rest, cube, r);
        let rest = self.polynomial(square, &COS);
        let one = self.f32_like(x, 1.0);
        let cos = self.fma(rest, square, one);
        let (first, zero) = (self.i32_like(x, 1), self.i32_like(x, 0));
        let odd = self.and(quadrant, first);
        let swap = self.cmp(Pred::Ne, odd, zero);
        let (in_sin, in_cos) = (self.select(swap, cos, sin), self.select(swap, sin, cos));
        let next = self.add(quadrant, first);
        (self.negate_by_bit_1(in_sin, quadrant), self.negate_by_bit_1(in_cos, next))
    }

    /// `e^-|x|`, in `[0, 1]`.
    fn exp_of_minus_abs(&mut self, x: Val) -> Val {
        let magnitude = self.fabs(x);
        let negative = self.fneg(magnitude);
        self.exp(negative)
    }

    /// `ln x + exponent · ln 2` for a normal `x`.
    fn log_normal(&mut self, x: Val, exponent: Val) -> Val {
        // x = 2^e · m with m in [sqrt(1/2), sqrt(2))
        let bits = self.bitcast(x, DType::I32);
        let low = self.i32_like(x, std::f32::consts::FRAC_1_SQRT_2.to_bits().cast_signed());
        let width = self.i32_like(x, 23);
        let above = self.sub(bits, low);
        let e = self.sshr(above, width);
        let e_bits = self.shl(e, width);
        let m_bits = self.sub(bits, e_bits);
        let m = self.bitcast(m_bits, DType::F32);
        let e = self.add(e, exponent);
        let e = self.to_float(e);
        // ln(1 + f) = 2 atanh(s), s = f / (2 + f);  2 s = f - s f, and s f = f²/2 - s f²/2
        let (one, two, half) = (self.f32_like(x, 1.0), self.f32_like(x, 2.0), self.f32_like(x, 0.5));
        let f = self.fsub(m, one);
        let below = self.fadd(two, f);
        let s = self.fdiv(f, below);
        let z = self.fmul(s, s);
        let series = self.polynomial(z, &ATANH);
        let series = self.fmul(z, series);
        let f_half = self.fmul(half, f);
        let half_square = self.fmul(f_half, f);
        let both = self.fadd(half_square, series);
        let low_part = self.f32_like(x, LN_2[1]);
        let low_part = self.fmul(e, low_part);
        let rest = self.fma(s, both, low_part);
        let rest = self.fsub(rest, half_square);
        let log_m = self.fadd(f, rest);
        let high_part = self.f32_like(x, LN_2[0]);
        self.fma(e, high_part, log_m)
    }

    /// `x · scale` rounded to an integer, as f32 and as i32 (meaningless but defined for NaN); its magnitude is below `2^22`.
    fn round_scaled(&mut self, x: Val, scale: f32) -> (Val, Val) {
        let (scale, rounder) = (self.f32_like(x, scale), self.f32_like(x, ROUNDER));
        let sum = self.fma(x, scale, rounder);
        let n = self.fsub(sum, rounder);
        let bits = self.bitcast(sum, DType::I32);
        let zero = self.i32_like(x, ROUNDER.to_bits().cast_signed());
        (n, self.sub(bits, zero))
    }

    /// `a - n · part` with one rounding.
    fn sub_product(&mut self, a: Val, n: Val, part: f32) -> Val {
        let part = self.f32_like(a, -part);
        self.fma(n, part, a)
    }

    /// `c[0] + c[1] x + c[2] x² + ...` by Horner's rule.
    fn polynomial(&mut self, x: Val, coefficients: &[f32]) -> Val {
        let (&last, rest) = coefficients.split_last().expect("a polynomial has a coefficient");
        let last = self.f32_like(x, last);
        rest.iter().rev().fold(last, |sum, &c| {
            let c = self.f32_like(x, c);
            self.fma(sum, x, c)
        })
    }

    /// `2^n` as f32 for `n` in `-126 ..= 127`.
    fn power_of_two(&mut self, n: Val) -> Val {
        let (bias, width) = (self.i32_like(n, 127), self.i32_like(n, 23));
        let biased = self.add(n, bias);
        let bits = self.shl(biased, width);
        self.bitcast(bits, DType::F32)
    }

    /// `-x` where bit 1 of `bits` is set, else `x`.
    fn negate_by_bit_1(&mut self, x: Val, bits: Val) -> Val {
        let (two, thirty) = (self.i32_like(x, 2), self.i32_like(x, 30));
        let bit = self.and(bits, two);
        let sign = self.shl(bit, thirty);
        let x = self.bitcast(x, DType::I32);
        let x = self.xor(x, sign);
        self.bitcast(x, DType::F32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::eval::{Buffer, Options, Place, run};
    use crate::schedule::Extent;

    /// Runs a function over all of `xs` (a multiple of 16), 16 lanes at a time; `results` values for each.
    fn apply(xs: &[f32], results: usize, f: impl Fn(&mut KernelBuilder, Val) -> Vec<Val>) -> Vec<Vec<f32>> {
        assert_eq!(xs.len() % 16, 0);
        let mut k = KernelBuilder::new("math", &[("x", false), ("out", true)], Extent::from(1));
        let n = xs.len() as u64;
        k.for_range(n, 16, |k, i| {
            let x = k.load_f32x16(k.param(0), i);
            for (r, y) in f(k, x).into_iter().enumerate() {
                let at = k.add_const(i, n * r as u64);
                k.store(k.param(1), at, y);
            }
        });
        let kernel = k.finish();
        let mut buffers = [Buffer::from_f32(xs), Buffer::uninit(4 * n * results as u64)];
        let options = Options { races: false, ..Options::default() };
        run(&kernel, [0; 4], &mut buffers, &[Place::start(0), Place::start(1)], options).expect("the kernel is sound");
        buffers[1].to_f32().chunks(xs.len()).map(<[f32]>::to_vec).collect()
    }

    fn one(xs: &[f32], f: impl Fn(&mut KernelBuilder, Val) -> Val) -> Vec<f32> {
        apply(xs, 1, |k, x| vec![f(k, x)]).remove(0)
    }

    /// Distance in units of the last place of an f32 near `want` (the spacing of denormals at least).
    fn ulps(got: f32, want: f64) -> f64 {
        let rounded = want as f32;
        if got == rounded || (got.is_nan() && want.is_nan()) {
            return if rounded.is_finite() { (f64::from(got) - want).abs() / spacing(want) } else { 0.0 };
        }
        (f64::from(got) - want).abs() / spacing(want)
    }

    fn spacing(x: f64) -> f64 {
        2f64.powi((x.abs().max(f64::from(f32::MIN_POSITIVE)).log2().floor() as i32) - 23)
    }

    /// Every float of `low ..= high` (of one sign) whose bits are `step` apart.
    fn sweep(low: f32, high: f32, step: usize) -> Vec<f32> {
        let (a, b) = (low.to_bits().min(high.to_bits()), low.to_bits().max(high.to_bits()));
        let mut xs: Vec<f32> = (a..=b).step_by(step).map(f32::from_bits).collect();
        xs.resize(xs.len().next_multiple_of(16), high);
        xs
    }

    fn worst(xs: &[f32], f: impl Fn(&mut KernelBuilder, Val) -> Val, want: impl Fn(f64) -> f64) -> f64 {
        let got = one(xs, f);
        let errors = xs.iter().zip(got).map(|(&x, y)| (ulps(y, want(f64::from(x))), x, y));
        let (error, x, y) = errors.max_by(|a, b| a.0.total_cmp(&b.0)).expect("there are points");
        println!("worst {error} ulp at {x:e} ({y:e})");
        error
    }

    fn softplus(x: f64) -> f64 {
        x.max(0.0) + (-x.abs()).exp().ln_1p()
    }

    fn sigmoid(x: f64) -> f64 {
        1.0 / (1.0 + (-x).exp())
    }

    #[test]
    fn exp_is_within_an_ulp() {
        for xs in [sweep(1e-9, 89.5, 911), sweep(-1e-9, -105.0, 911)] {
            assert!(worst(&xs, KernelBuilder::exp, f64::exp) <= 1.0);
        }
    }

    #[test]
    fn log_is_within_an_ulp() {
        for xs in [sweep(f32::from_bits(1), f32::MAX, 4001), sweep(0.5, 2.0, 97)] {
            assert!(worst(&xs, KernelBuilder::log, f64::ln) <= 1.0);
        }
    }

    #[test]
    fn sigmoid_silu_and_softplus_are_within_their_bounds() {
        for xs in [sweep(1e-9, 1e30, 1511), sweep(-1e-9, -1e30, 1511), sweep(-0.01, -110.0, 311)] {
            assert!(worst(&xs, KernelBuilder::sigmoid, sigmoid) <= 2.5);
            assert!(worst(&xs, KernelBuilder::softplus, softplus) <= 2.0);
        }
        for xs in [sweep(1e-9, 1e30, 1511), sweep(-1e-9, -87.0, 1511)] {
            assert!(worst(&xs, KernelBuilder::silu, |x| x * sigmoid(x)) <= 3.0);
        }
    }

    #[test]
    fn rsqrt_is_within_an_ulp_and_a_half() {
        let xs = sweep(f32::from_bits(1), f32::MAX, 4001);
        assert!(worst(&xs, KernelBuilder::rsqrt, |x| 1.0 / x.sqrt()) <= 1.5);
    }

    #[test]
    fn sin_and_cos_hold_their_bound_up_to_2_to_the_20() {
        let mut all = sweep(1e-9, 1_048_576.0, 501);
        all.extend(sweep(-1e-9, -1_048_576.0, 1501));
        // next to multiples of pi / 2 the reduction cancels most
        all.extend((0..667_520).map(|n| (f64::from(n) * std::f64::consts::FRAC_PI_2) as f32));
        all.extend((0..1_048_576).map(|n| n as f32));
        let got = apply(&all, 2, |k, x| {
            let (sin, cos) = k.sin_cos(x);
            vec![sin, cos]
        });
        let mut worst = 0f64;
        for (i, &x) in all.iter().enumerate() {
            let (sin, cos) = f64::from(x).sin_cos();
            worst = worst.max((f64::from(got[0][i]) - sin).abs()).max((f64::from(got[1][i]) - cos).abs());
        }
        println!("worst 2^{}", worst.log2());
        assert!(worst <= 2f64.powi(-23));
    }

    #[test]
    fn edges_saturate() {
        let inf = f32::INFINITY;
        let mut xs =
            vec![0.0, -0.0, inf, -inf, f32::NAN, 1e30, -1e30, 88.72, 88.73, -87.0, -103.9, -104.1, 20.5, f32::MAX];
        xs.resize(16, 1.0);
        let exp = one(&xs, KernelBuilder::exp);
        assert_eq!(exp[..4], [1.0, 1.0, inf, 0.0]);
        assert!(exp[4].is_nan());
        assert_eq!(exp[5..7], [inf, 0.0]);
        assert!(exp[7].is_finite());
        assert_eq!((exp[8], exp[10], exp[11]), (inf, f32::from_bits(1), 0.0));
        let sigmoid = one(&xs, KernelBuilder::sigmoid);
        assert_eq!(sigmoid[..4], [0.5, 0.5, 1.0, 0.0]);
        assert!(sigmoid[4].is_nan());
        assert_eq!(sigmoid[5..7], [1.0, 0.0]);
        let softplus = one(&xs, KernelBuilder::softplus);
        assert_eq!(softplus[2..4], [inf, 0.0]);
        assert!(softplus[4].is_nan());
        assert_eq!((softplus[5], softplus[6], softplus[12], softplus[13]), (1e30, 0.0, 20.5, f32::MAX));
        let silu = one(&xs, KernelBuilder::silu);
        assert_eq!((silu[5], silu[6]), (1e30, 0.0));
        let rsqrt = one(&xs, KernelBuilder::rsqrt);
        assert_eq!((rsqrt[0], rsqrt[2]), (inf, 0.0));
    }

    #[test]
    fn scalars_and_vectors_agree() {
        let mut k = KernelBuilder::new("scalar", &[("x", false), ("out", true)], Extent::from(8));
        let at = k.task();
        let x = k.load_f32(k.param(0), at);
        let values = [k.exp(x), k.log(x), k.softplus(x), k.sin_cos(x).0];
        let base = k.mul_const(at, 4);
        for (i, v) in values.into_iter().enumerate() {
            let at = k.add_const(base, i as u64);
            k.store(k.param(1), at, v);
        }
        let xs: Vec<f32> = (0..16).map(|i| 0.3 + i as f32 * 0.7).collect();
        let mut buffers = [Buffer::from_f32(&xs), Buffer::uninit(128)];
        run(&k.finish(), [0; 4], &mut buffers, &[Place::start(0), Place::start(1)], Options::default()).expect("sound");
        let vectors = apply(&xs, 4, |k, x| vec![k.exp(x), k.log(x), k.softplus(x), k.sin_cos(x).0]);
        let got = buffers[1].to_f32();
        for i in 0..8 {
            for r in 0..4 {
                assert_eq!(got[i * 4 + r].to_bits(), vectors[r][i].to_bits());
            }
        }
    }
}
