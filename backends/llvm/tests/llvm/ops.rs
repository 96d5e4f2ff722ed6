//! Each op without regions, on scalars and on vectors, with the values at which they go wrong.

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};

use super::{bits, canonical, run};

const FLOATS: [f32; 16] = [
    0.0,
    -0.0,
    1.0,
    -1.5,
    2.5,
    3.5,
    -0.5,
    16_777_217.0,
    f32::MAX,
    f32::MIN_POSITIVE,
    1e-40,
    -1e-45,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
    0.1,
];

const INTS: [i32; 16] =
    [0, 1, -1, 2, 7, -7, 31, i32::MAX, i32::MIN, i32::MIN + 1, 0x1234_5678, -65536, 255, 1 << 16, -3, 100];

/// All pairs of 16 values: two buffers of 256.
fn pairs<T: Copy>(x: [T; 16]) -> (Vec<T>, Vec<T>) {
    (0..256).map(|i| (x[i / 16], x[i % 16])).unzip()
}

/// What is built of two operands, and what it means.
type Make = fn(&mut KernelBuilder, Val, Val) -> Val;
type Meaning<T> = fn(T, T) -> T;

/// Applies `ops` to all elements of two buffers of 256 words, `lanes` at a time; op `j`'s results (of 32 bits) follow those of op `j - 1`.
fn apply(name: &str, dtype: DType, lanes: u32, ops: &[Make], a: &[u32], b: &[u32]) -> Vec<Vec<u32>> {
    let mut k = KernelBuilder::new(name, &[("a", false), ("b", false), ("out", true)], 1.into());
    let (pa, pb, out) = (k.param(0), k.param(1), k.param(2));
    k.for_range(256, u64::from(lanes), |k, i| {
        let (x, y) = (k.load(dtype, lanes, pa, i), k.load(dtype, lanes, pb, i));
        for (j, op) in ops.iter().enumerate() {
            let z = op(k, x, y);
            let at = k.add_const(i, 256 * j as u64);
            k.store(out, at, z);
        }
    });
    let buffers = run(&k.finish(), [0; 4], &[a.to_vec(), b.to_vec(), vec![0; 256 * ops.len()]]);
    buffers[2].chunks(256).map(<[u32]>::to_vec).collect()
}

/// Checks float ops against Rust functions; every NaN counts as the same.
fn check_floats(name: &str, cases: &[(Make, Meaning<f32>)]) {
    let (a, b) = pairs(FLOATS);
    let (a_bits, b_bits): (Vec<u32>, Vec<u32>) = (bits(a.iter().copied()), bits(b.iter().copied()));
    let makes: Vec<Make> = cases.iter().map(|c| c.0).collect();
    for lanes in [1, 4, 8, 16] {
        let got = apply(name, DType::F32, lanes, &makes, &a_bits, &b_bits);
        for (j, (_, want)) in cases.iter().enumerate() {
            let want = bits(a.iter().zip(&b).map(|(&x, &y)| want(x, y)));
            assert_eq!(canonical(&got[j]), want, "{name}: op {j}, {lanes} lanes");
        }
    }
}

/// Checks integer ops against Rust functions.
fn check_ints(name: &str, all_lanes: &[u32], cases: &[(Make, Meaning<i32>)]) {
    let (a, b) = pairs(INTS);
    let words = |x: &[i32]| x.iter().map(|&x| x as u32).collect::<Vec<_>>();
    let makes: Vec<Make> = cases.iter().map(|c| c.0).collect();
    for &lanes in all_lanes {
        let got = apply(name, DType::I32, lanes, &makes, &words(&a), &words(&b));
        for (j, (_, want)) in cases.iter().enumerate() {
            let want: Vec<i32> = a.iter().zip(&b).map(|(&x, &y)| want(x, y)).collect();
            assert_eq!(got[j], words(&want), "{name}: op {j}, {lanes} lanes");
        }
    }
}

#[test]
fn float_arithmetic_is_ieee() {
    check_floats(
        "arithmetic",
        &[
            (KernelBuilder::fadd, |x, y| x + y),
            (KernelBuilder::fsub, |x, y| x - y),
            (KernelBuilder::fmul, |x, y| x * y),
            (KernelBuilder::fdiv, |x, y| x / y),
            (|k, x, y| k.fma(x, y, x), |x, y| x.mul_add(y, x)),
            (|k, x, _| k.fneg(x), |x, _| -x),
            (|k, x, _| k.fabs(x), |x, _| x.abs()),
            (|k, x, _| k.fsqrt(x), |x, _| x.sqrt()),
            (|k, x, _| k.fround(x), |x, _| x.round_ties_even()),
        ],
    );
}

#[test]
fn a_product_and_a_sum_are_not_contracted() {
    check_floats(
        "contraction",
        &[
            (
                |k, x, y| {
                    let p = k.fmul(x, y);
                    k.fsub(p, y)
                },
                |x, y| x * y - y,
            ),
            (
                |k, x, y| {
                    let p = k.fmul(x, x);
                    let q = k.fmul(y, y);
                    k.fadd(p, q)
                },
                |x, y| x * x + y * y,
            ),
        ],
    );
}

#[test]
fn min_and_max_take_the_second_operand_unless_the_first_is_strictly_better() {
    let min: Meaning<f32> = |x, y| if x < y { x } else { y };
    let max: Meaning<f32> = |x, y| if x > y { x } else { y };
    check_floats("extremes", &[(KernelBuilder::fmin, min), (KernelBuilder::fmax, max)]);
}

#[test]
fn integers_wrap() {
    check_ints(
        "integers",
        &[1, 4, 16],
        &[
            (KernelBuilder::add, i32::wrapping_add),
            (KernelBuilder::sub, i32::wrapping_sub),
            (KernelBuilder::mul, i32::wrapping_mul),
            (KernelBuilder::and, |x, y| x & y),
            (KernelBuilder::or, |x, y| x | y),
            (KernelBuilder::xor, |x, y| x ^ y),
            (|k, x, y| shift(k, x, y, KernelBuilder::shl), |x, y| x.wrapping_shl(y as u32 & 31)),
            (|k, x, y| shift(k, x, y, KernelBuilder::ushr), |x, y| (x as u32).wrapping_shr(y as u32 & 31) as i32),
            (|k, x, y| shift(k, x, y, KernelBuilder::sshr), |x, y| x.wrapping_shr(y as u32 & 31)),
        ],
    );
}

/// `x` shifted by the lower five bits of `y`.
fn shift(k: &mut KernelBuilder, x: Val, y: Val, op: Make) -> Val {
    let mask = k.i32_like(y, 31);
    let by = k.and(y, mask);
    op(k, x, by)
}

#[test]
fn quotients_round_to_zero() {
    check_ints(
        "quotients",
        &[1],
        &[
            (|k, x, y| divide(k, x, y, KernelBuilder::div), |x, y| divide_in_rust(x, y, i64::wrapping_div)),
            (|k, x, y| divide(k, x, y, KernelBuilder::rem), |x, y| divide_in_rust(x, y, i64::wrapping_rem)),
        ],
    );
}

/// The quotient of i64 by `y | 1`, which is never 0.
fn divide(k: &mut KernelBuilder, x: Val, y: Val, op: Make) -> Val {
    let one = k.i32_like(y, 1);
    let odd = k.or(y, one);
    let (x, odd) = (k.widen(x), k.widen(odd));
    let q = op(k, x, odd);
    k.narrow(q)
}

fn divide_in_rust(x: i32, y: i32, op: fn(i64, i64) -> i64) -> i32 {
    op(i64::from(x), i64::from(y | 1)) as i32
}

#[test]
fn indices_have_64_bits() {
    check_ints(
        "indices",
        &[1, 8],
        &[
            (
                |k, x, y| {
                    let (x, y) = (k.widen(x), k.widen(y));
                    let p = k.mul(x, y);
                    let lanes = k.ty(p).lanes();
                    let by = k.const_i64(32);
                    let by = k.splat(by, lanes);
                    let high = k.sshr(p, by);
                    k.narrow(high)
                },
                |x, y| ((i64::from(x) * i64::from(y)) >> 32) as i32,
            ),
            (
                |k, x, _| {
                    let x = k.widen(x);
                    k.narrow(x)
                },
                |x, _| x,
            ),
        ],
    );
}

/// `condition ? 1 : 0` as i32.
fn truth(k: &mut KernelBuilder, condition: Val) -> Val {
    let lanes = k.ty(condition).lanes();
    let (one, zero) = (k.splat_i32(lanes, 1), k.splat_i32(lanes, 0));
    k.select(condition, one, zero)
}

/// One op a predicate.
macro_rules! compare {
    ($($pred:ident $rust:tt),*) => { [$((
        (|k: &mut KernelBuilder, x, y| { let c = k.cmp(Pred::$pred, x, y); truth(k, c) }) as Make,
        (|x, y| i32::from(x $rust y)) as fn(f32, f32) -> i32,
        (|x, y| i32::from(x $rust y)) as fn(i32, i32) -> i32,
    )),*] };
}

#[test]
fn comparisons_are_ordered_and_ne_is_not() {
    let cases = compare!(Eq ==, Ne !=, Lt <, Le <=, Gt >, Ge >=);
    assert_eq!(cases.len(), Pred::ALL.len());
    let ints: Vec<_> = cases.iter().map(|c| (c.0, c.2)).collect();
    check_ints("compare_ints", &[1, 16], &ints);

    let (a, b) = pairs(FLOATS);
    let makes: Vec<Make> = cases.iter().map(|c| c.0).collect();
    for lanes in [1, 16] {
        let got = apply("compare_floats", DType::F32, lanes, &makes, &bits(a.clone()), &bits(b.clone()));
        for (j, (_, want, _)) in cases.iter().enumerate() {
            let want: Vec<u32> = a.iter().zip(&b).map(|(&x, &y)| want(x, y) as u32).collect();
            assert_eq!(got[j], want, "{:?}, {lanes} lanes", Pred::ALL[j]);
        }
    }
}

#[test]
fn one_condition_selects_whole_vectors() {
    let make: Make = |k, x, y| {
        let (first, zero) = (k.extract(x, 0), k.const_f32(0.0));
        let positive = k.cmp(Pred::Gt, first, zero);
        k.select(positive, x, y)
    };
    let (a, b) = (bits((0..256).map(|i| if i % 32 < 16 { 1.0 } else { -1.0 })), bits([7.0; 256]));
    let got = apply("select", DType::F32, 16, &[make], &a, &b);
    assert_eq!(got[0], bits((0..256).map(|i| if i % 32 < 16 { 1.0 } else { 7.0 })));
}

#[test]
fn conversions_round_as_stated() {
    let x: Vec<f32> = (0..256).map(|i| (i - 128) as f32 * 1.37).collect();
    let ints: Vec<u32> = (0..256).map(|i| (i as u32).wrapping_mul(0x0135_79bd)).collect();
    for lanes in [1, 16] {
        let make: Make = |k, x, y| {
            let whole = k.to_int(x);
            let bits = k.bitcast(y, DType::I32);
            k.xor(whole, bits)
        };
        let got = apply("to_int", DType::F32, lanes, &[make], &bits(x.iter().copied()), &ints);
        let want: Vec<u32> = x.iter().zip(&ints).map(|(&x, &i)| x as i32 as u32 ^ i).collect();
        assert_eq!(got[0], want);
        let got = apply("to_float", DType::I32, lanes, &[|k, x, _| k.to_float(x)], &ints, &ints);
        assert_eq!(got[0], bits(ints.iter().map(|&i| i as i32 as f32)));
    }
}

#[test]
fn reductions_are_the_stated_tree() {
    fn tree(x: &[f32], join: fn(f32, f32) -> f32) -> f32 {
        if x.len() == 1 {
            return x[0];
        }
        let (low, high) = x.split_at(x.len() / 2);
        let half: Vec<f32> = low.iter().zip(high).map(|(&a, &b)| join(a, b)).collect();
        tree(&half, join)
    }
    let x: Vec<f32> = (0..256).map(|i| ((i * 7919 % 251) as f32 - 100.0) * 1.1e7f32.powi(i % 3 - 1)).collect();
    let makes: [Make; 2] = [
        |k, x, _| {
            let (s, lanes) = (k.reduce_add(x), k.ty(x).lanes());
            k.splat(s, lanes)
        },
        |k, x, _| {
            let (s, lanes) = (k.reduce_max(x), k.ty(x).lanes());
            k.splat(s, lanes)
        },
    ];
    let joins: [Meaning<f32>; 2] = [|a, b| a + b, |a, b| if a > b { a } else { b }];
    for lanes in [2, 4, 8, 16] {
        let got = apply("reduce", DType::F32, lanes, &makes, &bits(x.iter().copied()), &[0; 256]);
        for (got, join) in got.iter().zip(joins) {
            let want = x.chunks(lanes as usize).flat_map(|c| vec![tree(c, join); c.len()]);
            assert_eq!(*got, bits(want), "{lanes} lanes");
        }
    }
}

#[test]
fn constants_keep_their_bits() {
    let numbers = [f32::from_bits(0x7fc0_1234), -0.0, 1e-45, 0.1, f32::NEG_INFINITY];
    let mut k = KernelBuilder::new("constants", &[("out", true)], 1.into());
    let out = k.param(0);
    for (i, &x) in numbers.iter().enumerate() {
        let (at, x) = (k.index(i as u64), k.const_f32(x));
        k.store(out, at, x);
    }
    for (i, &x) in INTS.iter().enumerate() {
        let (at, x) = (k.index((numbers.len() + i) as u64), k.const_i32(x));
        k.store(out, at, x);
    }
    let got = run(&k.finish(), [0; 4], &[vec![0; 21]]);
    let want: Vec<u32> = numbers.iter().map(|x| x.to_bits()).chain(INTS.iter().map(|&x| x as u32)).collect();
    assert_eq!(got[0], want);
}
