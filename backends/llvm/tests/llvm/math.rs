//! The transcendentals of kernel IR: the same bits compiled as interpreted (`run` compares them), here on their whole domains.

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Val};

use super::{bits, run};

type Make = fn(&mut KernelBuilder, Val) -> Val;

/// Applies `ops` to each of `x`, 16 at a time and one at a time.
fn check(name: &str, ops: &[Make], x: &[f32]) {
    let n = x.len() as u64;
    for lanes in [1, 16] {
        let mut k = KernelBuilder::new(name, &[("x", false), ("y", true)], 1.into());
        let (from, to) = (k.param(0), k.param(1));
        k.for_range(n, u64::from(lanes), |k, i| {
            let x = k.load(DType::F32, lanes, from, i);
            for (j, op) in ops.iter().enumerate() {
                let (y, at) = (op(k, x), k.add_const(i, n * j as u64));
                k.store(to, at, y);
            }
        });
        let got = run(&k.finish(), [0; 4], &[bits(x.iter().copied()), vec![0; x.len() * ops.len()]]);
        assert!(got[1].chunks(x.len()).all(|y| y.iter().any(|&word| word != 0)), "{name} gives something");
    }
}

/// Numbers of both signs and every magnitude from 2^-149 to `largest`.
fn sweep(largest: f32) -> Vec<f32> {
    let positive = (0..4096u32).map(|i| f32::from_bits((u64::from(largest.to_bits()) * u64::from(i) / 4095) as u32));
    positive.flat_map(|x| [x, -x]).collect()
}

#[test]
fn functions_of_every_number() {
    let mut x = sweep(f32::INFINITY);
    x.extend([f32::NAN; 16]);
    let ops: [Make; 5] =
        [KernelBuilder::exp, KernelBuilder::sigmoid, KernelBuilder::silu, KernelBuilder::softplus, |k, x| {
            let x = k.fabs(x);
            k.rsqrt(x)
        }];
    check("everywhere", &ops, &x);
}

#[test]
fn logarithms_of_positive_numbers() {
    let x: Vec<f32> = sweep(f32::MAX).into_iter().map(|x| x.abs().max(1e-45)).collect();
    check("logarithm", &[KernelBuilder::log], &x);
}

#[test]
fn angles_to_a_million() {
    check("angles", &[|k, x| k.sin_cos(x).0, |k, x| k.sin_cos(x).1], &sweep(1e6));
}
