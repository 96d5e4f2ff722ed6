//! Whole kernels: tasks, loops, conditions, scratch, tails, addresses.

mod loader;

use loader::{Loaded, module, target};
use nextc_cranelift::{Error, asm, clif, compile};
use nextc_ir::DType;
use nextc_ir::kernel::{Kernel, KernelBuilder, Pred};
use nextc_ir::shape::Sym;

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// `out[task] = x[task] + T`, for as many tasks as are asked for.
fn add_dim() -> Kernel {
    let mut k = KernelBuilder::new("add_dim", &[("x", false), ("out", true)], 8.into());
    let x = k.load(DType::I32, 1, k.param(0), k.task());
    let t = k.narrow(k.dim(Sym::T));
    let y = k.add(x, t);
    k.store(k.param(1), k.task(), y);
    k.finish()
}

#[test]
fn tasks_run_from_first_to_last() {
    let loaded = Loaded::new(&module(vec![add_dim()]));
    let mut x: Vec<u32> = (0..8).collect();
    let mut out = vec![0; 8];
    loaded.call("nextc_kernel_0", [100, 0, 0, 0], &mut [&mut x, &mut out], (2, 5));
    assert_eq!(out, [0, 0, 102, 103, 104, 0, 0, 0]);
    loaded.call("nextc_kernel_0", [100, 0, 0, 0], &mut [&mut x, &mut out], (5, 5));
    assert_eq!(out[5], 0, "no task, no work");
}

/// Dot products of rows of `w` with `x`: one row a task, four lanes, the sums carried.
fn matvec(columns: u64) -> Kernel {
    let mut k = KernelBuilder::new("matvec", &[("w", false), ("x", false), ("out", true)], Sym::R.into());
    let row = k.mul_const(k.task(), columns);
    let lo = k.const_i64(0);
    let hi = k.index(columns);
    let zero = k.splat_f32(4, 0.0);
    let sum = k.for_carry((lo, hi, 8), &[zero, zero], |k, i, sums| {
        (0..2)
            .map(|part| {
                let at = k.add_const(i, 4 * part);
                let x = k.load(DType::F32, 4, k.param(1), at);
                let at = k.add(row, at);
                let w = k.load(DType::F32, 4, k.param(0), at);
                k.fma(w, x, sums[part as usize])
            })
            .collect()
    });
    let sum = k.fadd(sum[0], sum[1]);
    let sum = k.reduce_add(sum);
    k.store(k.param(2), k.task(), sum);
    k.finish()
}

#[test]
fn loops_carry_values() {
    let loaded = Loaded::new(&module(vec![add_dim(), matvec(24)]));
    let w: Vec<f32> = (0..72).map(|i| (i as f32).sin()).collect();
    let x: Vec<f32> = (0..24).map(|i| (i as f32).cos()).collect();
    let expected: Vec<u32> = w
        .chunks(24)
        .map(|row| {
            let mut sums = [0.0_f32; 8];
            for (i, (w, x)) in row.iter().zip(&x).enumerate() {
                sums[i % 8] = w.mul_add(*x, sums[i % 8]);
            }
            let s: Vec<f32> = (0..4).map(|i| sums[i] + sums[i + 4]).collect();
            ((s[0] + s[2]) + (s[1] + s[3])).to_bits()
        })
        .collect();
    let mut out = vec![0; 3];
    loaded.call("nextc_kernel_1", [0, 0, 0, 3], &mut [&mut bits(&w), &mut bits(&x), &mut out], (0, 3));
    assert_eq!(out, expected);
}

#[test]
fn loops_with_dynamic_bounds_may_run_never_and_nest() {
    // out[task] = sum over i < T of sum over j in (i, i + 2, ..) < B of i * j, seeded with 7
    let mut k = KernelBuilder::new("nest", &[("out", true)], 1.into());
    let zero = k.const_i64(0);
    let seed = k.const_i64(7);
    let (t, b) = (k.dim(Sym::T), k.dim(Sym::B));
    let sum = k.for_carry((zero, t, 1), &[seed], |k, i, sum| {
        k.for_carry((i, b, 2), sum, |k, j, sum| {
            let product = k.mul(i, j);
            vec![k.add(sum[0], product)]
        })
    });
    let sum = k.narrow(sum[0]);
    k.store(k.param(0), k.task(), sum);
    let loaded = Loaded::new(&module(vec![k.finish()]));
    for (t, b) in [(0, 5), (3, 0), (1, 1), (4, 9), (9, 4)] {
        let expected = 7 + (0..t).flat_map(|i| (i..b).step_by(2).map(move |j| i * j)).sum::<u64>();
        let mut out = vec![0];
        loaded.call("nextc_kernel_0", [t, b, 0, 0], &mut [&mut out], (0, 1));
        assert_eq!(u64::from(out[0]), expected, "T {t}, B {b}");
    }
}

#[test]
fn conditions_yield_values_and_guard_stores() {
    let mut k = KernelBuilder::new("branch", &[("out", true)], 8.into());
    let (three, task) = (k.const_i64(3), k.task());
    let low = k.cmp(Pred::Lt, task, three);
    let chosen = k.if_else(
        low,
        |k| vec![k.const_i32(10), k.splat_f32(4, 1.5)],
        |k| {
            let x = k.narrow(task);
            vec![x, k.splat_f32(4, -2.0)]
        },
    );
    let lane = k.extract(chosen[1], 3);
    let lane = k.to_int(lane);
    let sum = k.add(chosen[0], lane);
    let odd = k.rem_const(task, 2);
    let one = k.const_i64(1);
    let odd = k.cmp(Pred::Eq, odd, one);
    k.if_then(odd, |k| k.store(k.param(0), task, sum));
    let loaded = Loaded::new(&module(vec![k.finish()]));
    let mut out = vec![99; 6];
    loaded.call("nextc_kernel_0", [0; 4], &mut [&mut out], (0, 6));
    assert_eq!(out, [99, 11, 99, 1, 99, 3]);
}

#[test]
fn body_and_tail_have_their_own_scratch_and_symbol() {
    let mut k = KernelBuilder::new("twice", &[("x", true), ("sum", true)], 4.into());
    let (small, large) = (k.alloc(DType::F32, 3), k.alloc(DType::I32, 20));
    let (zero, nine) = (k.const_i64(0), k.const_i64(9));
    let x = k.load_f32(k.param(0), k.task());
    k.store(small, zero, x);
    let seven = k.const_i32(7);
    k.store(large, zero, seven);
    k.store(large, nine, seven);
    let x = k.load_f32(small, zero);
    let n = k.load(DType::I32, 1, large, nine);
    let n = k.to_float(n);
    let y = k.fmul(x, n);
    k.store(k.param(0), k.task(), y);
    let kernel = k.finish_with_tail(|k| {
        let scratch = k.alloc(DType::F32, 4);
        let zero = k.const_i64(0);
        let x = k.load(DType::F32, 4, k.param(0), zero);
        k.store(scratch, zero, x);
        let bytes = k.const_i64(4);
        let second = k.offset(scratch, bytes);
        let two = k.load(DType::F32, 2, second, zero);
        let sum = k.reduce_add(two);
        k.store(k.param(1), zero, sum);
        k.store(k.param(1), bytes, two);
    });
    assert_eq!(kernel.scratch_bytes(), 64 + 128 + 64);
    let loaded = Loaded::new(&module(vec![add_dim(), kernel]));
    assert_eq!(loaded.symbols(), ["nextc_kernel_0", "nextc_kernel_1", "nextc_tail_1"]);
    let mut x = bits(&[1.0, 2.0, 3.0, 4.0]);
    let mut sum = vec![0; 7];
    loaded.call("nextc_kernel_1", [0; 4], &mut [&mut x, &mut sum], (0, 4));
    loaded.call("nextc_tail_1", [0; 4], &mut [&mut x, &mut sum], (0, 1));
    assert_eq!(x, bits(&[7.0, 14.0, 21.0, 28.0]));
    assert_eq!(sum, bits(&[35.0, 0.0, 0.0, 0.0, 14.0, 21.0, 0.0]), "two lanes are stored as two");
}

#[test]
fn addresses_wrap_and_need_no_alignment() {
    let mut k = KernelBuilder::new("address", &[("x", false), ("out", true)], 1.into());
    let (t, b) = (k.dim(Sym::T), k.dim(Sym::B));
    let three = k.const_i64(3);
    let two = k.const_i64(2);
    let shifted = k.shl(t, two);
    let minus = k.sub(shifted, b);
    let scaled = k.mul(minus, three);
    let at = k.add_const(scaled, 1);
    let x = k.load(DType::F32, 4, k.param(0), at);
    let bytes = k.const_i64(-4);
    let before = k.offset(k.param(0), bytes);
    let y = k.load(DType::F32, 4, before, at);
    let sum = k.fadd(x, y);
    let zero = k.const_i64(0);
    k.store(k.param(1), zero, sum);
    let loaded = Loaded::new(&module(vec![k.finish()]));
    let x: Vec<f32> = (0..32).map(|i| i as f32).collect();
    let mut out = vec![0; 4];
    loaded.call("nextc_kernel_0", [2, 3, 0, 0], &mut [&mut bits(&x), &mut out], (0, 1));
    assert_eq!(out, bits(&[31.0, 33.0, 35.0, 37.0]), "(2 << 2) - 3 = 5, * 3 + 1 = 16");
}

#[test]
fn kernels_can_be_shown() {
    let m = module(vec![matvec(24)]);
    let text = clif(&m, &target(), "matvec").expect("the kernel is there");
    assert!(text.contains("nextc_kernel_0") && text.contains("fma"), "{text}");
    let text = asm(&m, &target(), "matvec").expect("the kernel is there");
    assert!(text.contains("vfmadd"), "{text}");
    assert!(matches!(clif(&m, &target(), "matmul"), Err(Error::NoKernel { name, .. }) if name == "matmul"));
}

#[test]
fn wide_vectors_old_targets_and_broken_kernels_are_errors() {
    let mut k = KernelBuilder::new("wide", &[("x", true)], 1.into());
    let x = k.load_f32x16(k.param(0), k.task());
    k.store(k.param(0), k.task(), x);
    let error = compile(&module(vec![k.finish()]), &target()).expect_err("16 lanes do not fit");
    assert_eq!(
        error.to_string(),
        "kernel `wide`: `f32x16` has no 128-bit register form, expected kernels legalised to vectors of 128 bits"
    );

    let mut old = target();
    old.features.retain(|f| f != "fma");
    let error = compile(&module(vec![add_dim()]), &old).expect_err("no fused multiply-add");
    assert!(matches!(error, Error::Feature { feature: "fma", .. }), "{error}");

    let mut broken = add_dim();
    broken.body.stmts.remove(0);
    let error = compile(&module(vec![broken]), &target()).expect_err("a value has no definition");
    assert!(matches!(error, Error::Undefined { .. }), "{error}");
}
