//! The inner loop that decode spends its time in: a tile of 16 bf16 rows times one token.

use nextc_ir::kernel::{Kernel, KernelBuilder};
use nextc_ir::{DType, Format};

use super::{bits, module, native, run};

/// `y[16·task ..] = W·x`: two tiles of 16 rows and 2·`pairs` columns a task, four accumulators.
fn gemv(pairs: u64, tasks: u64) -> Kernel {
    let mut k = KernelBuilder::new("gemv", &[("w", false), ("x", false), ("y", true)], tasks.into());
    let (w, x, y, task) = (k.param(0), k.param(1), k.param(2), k.task());
    let tiles = k.mul_const(task, 2 * pairs * 64);
    let first = k.offset(w, tiles);
    let tile_bytes = k.index(pairs * 64);
    let second = k.offset(first, tile_bytes);
    let zero = k.splat_f32(16, 0.0);
    let (lo, hi) = (k.const_i64(0), k.index(pairs));
    let sums = k.for_carry((lo, hi, 1), &[zero; 4], |k, pair, c| {
        let even = k.mul_const(pair, 2);
        let odd = k.add_const(even, 1);
        let (x_even, x_odd) = (k.load_f32(x, even), k.load_f32(x, odd));
        let (x_even, x_odd) = (k.splat(x_even, 16), k.splat(x_odd, 16));
        let mut next = Vec::new();
        for (tile, c) in [(first, &c[..2]), (second, &c[2..])] {
            let at = k.mul_const(pair, 16);
            let words = k.load(DType::I32, 16, tile, at);
            let w = (Format::Bf16.def().unpack)(k, &[words]);
            next.push(k.fma(w[0], x_even, c[0]));
            next.push(k.fma(w[1], x_odd, c[1]));
        }
        next
    });
    let row = k.mul_const(task, 32);
    for tile in 0..2 {
        let sum = k.fadd(sums[2 * tile], sums[2 * tile + 1]);
        let at = k.add_const(row, 16 * tile as u64);
        k.store(y, at, sum);
    }
    k.finish()
}

#[test]
fn a_bf16_tile_times_a_vector() {
    let (pairs, tasks) = (24usize, 3);
    let w: Vec<u32> =
        (0..tasks * 2 * pairs * 16).map(|i| (i as u32).wrapping_mul(2_654_435_761) & 0xbfff_bfff).collect();
    let x: Vec<f32> = (0..2 * pairs).map(|i| (i as f32 - 20.0) * 1e-3).collect();
    let row = |tile: usize, lane: usize| {
        let column = |pair: usize, half: u32| {
            let both = w[(tile * pairs + pair) * 16 + lane];
            f32::from_bits(if half == 0 { both << 16 } else { both & 0xffff_0000 })
        };
        let sum =
            |half: u32| (0..pairs).fold(0f32, |c, pair| column(pair, half).mul_add(x[2 * pair + half as usize], c));
        sum(0) + sum(1)
    };
    let want = bits((0..tasks * 32).map(|i| row(i / 16, i % 16)));
    let got =
        run(&gemv(pairs as u64, tasks as u64), [0; 4], &[w.clone(), bits(x.iter().copied()), vec![0; tasks * 32]]);
    assert_eq!(got[2], want);
}

#[test]
fn it_loads_whole_registers() {
    let target = native();
    let asm = nextc_llvm::asm(&module(vec![gemv(1024, 1)]), &target, "gemv").expect("the kernel compiles");
    let register = if target.vector_bits == 512 { "zmm" } else { "ymm" };
    let fused = asm.lines().filter(|l| l.contains("vfmadd") && l.contains(register)).count();
    assert!(fused >= 4, "{fused} whole fused multiply-adds in:\n{asm}");
}
