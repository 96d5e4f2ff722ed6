//! Kernels compiled by LLVM, loaded and run: their results against the kernel interpreter's and numbers computed in Rust.
//!
//! One test binary, since each one links LLVM. Every kernel is compiled for this machine and for x86-64-v3, and both must agree.

mod control;
mod gemv;
mod loader;
mod math;
mod objects;
mod ops;
mod ptx;
#[path = "../../../../tests/support/ptxas.rs"]
mod ptxas;
mod random;
mod tile;

use loader::{Code, Line};
use nextc_ir::Target;
use nextc_ir::kernel::Kernel;
use nextc_ir::kernel::eval::{self, Buffer, Options, Place};
use nextc_ir::schedule::KernelModule;

/// A module of these kernels, without launches.
fn module(kernels: Vec<Kernel>) -> KernelModule {
    KernelModule {
        info: Default::default(),
        kernels,
        programs: Vec::new(),
        weights: Vec::new(),
        states: Vec::new(),
        arena: Default::default(),
        page_tokens: 64,
    }
}

fn native() -> Target {
    Target::native().expect("tests run on x86-64-v3 or better")
}

fn minimum() -> Target {
    Target::named("x86-64-v3").expect("it is in the table")
}

/// Runs all tasks of a kernel and its tail on 32-bit words; gives the words that it leaves: the same on every target and in the interpreter.
fn run(kernel: &Kernel, dims: [u64; 4], buffers: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let tasks = (0, kernel.grid.eval(&dims) as i64);
    let wide = run_on(&native(), kernel, dims, tasks, buffers);
    let least = run_on(&minimum(), kernel, dims, tasks, buffers);
    assert_eq!(wide, least, "`{}` on this machine (left) and on x86-64-v3", kernel.name);
    for (got, want) in wide.iter().zip(interpret(kernel, dims, buffers)) {
        assert_eq!(canonical(got), canonical(&want), "`{}` compiled (left) and interpreted", kernel.name);
    }
    wide
}

fn interpret(kernel: &Kernel, dims: [u64; 4], buffers: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let ints = |words: &Vec<u32>| words.iter().map(|w| w.cast_signed()).collect::<Vec<_>>();
    let mut memory: Vec<_> = buffers.iter().map(|b| Buffer::from_i32(&ints(b))).collect();
    let places: Vec<_> = (0..buffers.len()).map(|buffer| Place { buffer, at_bytes: 0 }).collect();
    eval::run(kernel, dims, &mut memory, &places, Options::default()).expect("the kernel runs");
    memory.iter().map(|b| b.to_i32().iter().map(|w| w.cast_unsigned()).collect()).collect()
}

fn run_on(target: &Target, kernel: &Kernel, dims: [u64; 4], tasks: (i64, i64), buffers: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let objects = nextc_llvm::compile(&module(vec![kernel.clone()]), target).expect("the kernel compiles");
    let code = Code::load(&objects[0]);
    let mut buffers = buffers.to_vec();
    let mut args = dims.to_vec();
    args.push(1);
    args.extend(buffers.iter_mut().map(|b| b.as_mut_ptr() as u64));
    let [all, tail] = [&kernel.grid, &kernel.tail_grid].map(|grid| grid.eval(&dims));
    let mut partials = vec![Line([0xa5; 64]); (kernel.partial_bytes() * all).div_ceil(64) as usize];
    args.push(partials.as_mut_ptr() as u64);
    let mut scratch = vec![Line([0xa5; 64]); kernel.scratch_bytes() as usize / 64];
    assert!(code.call("nextc_kernel_0", &args, &mut scratch, tasks), "the kernel is exported");
    assert_eq!(code.call("nextc_tail_0", &args, &mut scratch, (0, tail as i64)), kernel.tail.is_some());
    buffers
}

/// The bits of floats, every NaN as the same one.
fn bits(x: impl IntoIterator<Item = f32>) -> Vec<u32> {
    x.into_iter().map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }).collect()
}

/// The same for floats that are bits already.
fn canonical(x: &[u32]) -> Vec<u32> {
    bits(x.iter().map(|&b| f32::from_bits(b)))
}
