//! Loops, conditions, scratch, tails, dimensions and pointers.

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred};
use nextc_ir::shape::Sym;

use super::{bits, native, run, run_on};

#[test]
fn a_loop_carries_values_and_takes_no_turn_if_it_is_empty() {
    let mut k = KernelBuilder::new("fibonacci", &[("bounds", false), ("out", true)], 6.into());
    let (bounds, out, task) = (k.param(0), k.param(1), k.task());
    let triple = k.mul_const(task, 2);
    let lo = k.load_index(bounds, triple);
    let next = k.add_const(triple, 1);
    let hi = k.load_index(bounds, next);
    let (zero, one) = (k.const_i32(0), k.const_i32(1));
    let last = k.for_carry((lo, hi, 3), &[zero, one], |k, _, c| vec![c[1], k.add(c[0], c[1])]);
    k.store(out, triple, last[0]);
    k.store(out, next, last[1]);
    let bounds: Vec<u32> = vec![0, 0, 0, 1, 0, 3, 0, 4, 5, 2, (-7i32) as u32, 8];
    let got = run(&k.finish(), [0; 4], &[bounds, vec![9; 12]]);
    // 0, 1, 1, 2, 0 and 5 turns
    assert_eq!(got[1], [0, 1, 1, 1, 1, 1, 1, 2, 0, 1, 5, 8]);
}

#[test]
fn conditions_yield_and_nest_in_loops() {
    let mut k = KernelBuilder::new("collatz", &[("out", true)], 40.into());
    let (out, task) = (k.param(0), k.task());
    let (zero, hi) = (k.const_i64(0), k.const_i64(200));
    let start = k.add_const(task, 1);
    let steps = k.for_carry((zero, hi, 1), &[start, zero], |k, _, c| {
        let one = k.const_i64(1);
        let done = k.cmp(Pred::Eq, c[0], one);
        k.if_else(
            done,
            |_| c.to_vec(),
            |k| {
                let (zero, odd) = (k.const_i64(0), k.rem_const(c[0], 2));
                let even = k.cmp(Pred::Eq, odd, zero);
                let next = k.if_else(
                    even,
                    |k| vec![k.div_const(c[0], 2)],
                    |k| {
                        let triple = k.mul_const(c[0], 3);
                        vec![k.add_const(triple, 1)]
                    },
                );
                vec![next[0], k.add_const(c[1], 1)]
            },
        )
    });
    let steps = k.narrow(steps[1]);
    k.store(out, task, steps);
    let want = (1..=40u64).map(|start| {
        let turn = |x: &u64| (*x != 1).then_some(if x.is_multiple_of(2) { x / 2 } else { 3 * x + 1 });
        std::iter::successors(Some(start), turn).count() as u32 - 1
    });
    let got = run(&k.finish(), [0; 4], &[vec![0; 40]]);
    assert_eq!(got[0], want.collect::<Vec<_>>());
}

#[test]
fn only_the_tasks_that_are_asked_for_run() {
    let mut k = KernelBuilder::new("some", &[("out", true)], 64.into());
    let (out, task) = (k.param(0), k.task());
    let x = k.narrow(task);
    k.store(out, task, x);
    let got = run_on(&native(), &k.finish(), [0; 4], (3, 6), &[vec![99; 8]]);
    assert_eq!(got[0], [99, 99, 99, 3, 4, 5, 99, 99]);
}

#[test]
fn dimensions_arrive_in_order() {
    let mut k = KernelBuilder::new("dimensions", &[("out", true)], 1.into());
    let out = k.param(0);
    for (i, sym) in [Sym::T, Sym::B, Sym::P, Sym::R].into_iter().enumerate() {
        let (at, dim) = (k.index(i as u64), k.dim(sym));
        let dim = k.narrow(dim);
        k.store(out, at, dim);
    }
    assert_eq!(run(&k.finish(), [11, 12, 13, 14], &[vec![0; 4]])[0], [11, 12, 13, 14]);
}

#[test]
fn scratch_is_apart_and_the_tail_runs_once() {
    // Each task keeps 20 numbers and their squares in scratch; the tail sums the sums of all tasks.
    let mut k = KernelBuilder::new("scratch", &[("sums", true), ("total", true)], 5.into());
    let (sums, total, task) = (k.param(0), k.param(1), k.task());
    let (plain, squares) = (k.alloc(DType::F32, 20), k.alloc(DType::F32, 20));
    k.for_range(20, 1, |k, i| {
        let x = k.add(i, task);
        let x = k.narrow(x);
        let x = k.to_float(x);
        let square = k.fmul(x, x);
        k.store(plain, i, x);
        k.store(squares, i, square);
    });
    let zero = k.const_f32(0.0);
    let (lo, hi) = (k.const_i64(0), k.const_i64(20));
    let sum = k.for_carry((lo, hi, 1), &[zero], |k, i, c| {
        let (x, square) = (k.load_f32(plain, i), k.load_f32(squares, i));
        let both = k.fadd(x, square);
        vec![k.fadd(c[0], both)]
    });
    k.store(sums, task, sum[0]);
    let kernel = k.finish_with_tail(|k| {
        let (lo, hi, zero) = (k.const_i64(0), k.const_i64(5), k.const_f32(0.0));
        let all = k.for_carry((lo, hi, 1), &[zero], |k, i, c| {
            let x = k.load_f32(sums, i);
            vec![k.fadd(c[0], x)]
        });
        k.store(total, lo, all[0]);
    });
    let sum = |task: u32| (0..20).map(|i| (i + task) as f32).map(|x| x + x * x).sum::<f32>();
    let sums: Vec<f32> = (0..5).map(sum).collect();
    let got = run(&kernel, [0; 4], &[vec![0; 5], vec![0]]);
    assert_eq!(got, [bits(sums.iter().copied()), bits([sums.iter().sum()])]);
}

#[test]
fn pointers_move_by_bytes_and_through_control() {
    let mut k = KernelBuilder::new("pointers", &[("a", false), ("b", false), ("out", true)], 4.into());
    let (a, b, out, task) = (k.param(0), k.param(1), k.param(2), k.task());
    let (odd, one) = (k.rem_const(task, 2), k.const_i64(1));
    let takes_b = k.cmp(Pred::Eq, odd, one);
    let from = k.if_else(takes_b, |_| vec![b], |_| vec![a]);
    let bytes = k.mul_const(task, 4);
    let from = k.offset(from[0], bytes);
    let lo = k.const_i64(0);
    let last = k.for_carry((lo, task, 1), &[from], |k, _, c| {
        let four = k.const_i64(-4);
        vec![k.offset(c[0], four)]
    });
    let x = k.load(DType::I32, 1, last[0], task);
    k.store(out, task, x);
    let got = run(&k.finish(), [0; 4], &[vec![1, 2, 3, 4], vec![10, 20, 30, 40], vec![0; 4]]);
    assert_eq!(got[2], [1, 20, 3, 40]);
}

#[test]
fn parameters_may_be_the_same_memory() {
    // y[i + 1] = x[i] with x = y: what is stored must be seen by the next load.
    let mut k = KernelBuilder::new("in_place", &[("x", false), ("y", true)], 1.into());
    let (x, y) = (k.param(0), k.param(1));
    k.for_range(7, 1, |k, i| {
        let (value, next) = (k.load_f32(x, i), k.add_const(i, 1));
        k.store(y, next, value);
    });
    let kernel = k.finish();
    let objects = nextc_llvm::compile(&super::module(vec![kernel]), &native()).expect("the kernel compiles");
    let mut words = bits((0..8u8).map(|i| f32::from(i) + 5.0));
    let at = words.as_mut_ptr() as u64;
    super::Code::load(&objects[0]).call("nextc_kernel_0", &[0, 0, 0, 0, 1, at, at], &mut [], (0, 1));
    assert_eq!(words, bits([5.0; 8]));
}
