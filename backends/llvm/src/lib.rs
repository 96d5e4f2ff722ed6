//! Kernel IR to machine code by LLVM.
//!
//! [`compile`] gives one relocatable object a kernel, with the functions of the ABI that [`nextc_ir::kernel::Kernel`] states. Kernels
//! are compiled side by side, each with an LLVM context of its own, and the result does not depend on how many threads did it.
//! `emit` turns kernel IR into LLVM IR; `x86` and `nvptx` say what LLVM must be told about their machines;
//! `machine` runs LLVM's passes and its code generator.
//!
//! Arithmetic is strict: no fast-math flag is ever set and nothing is contracted, so a kernel's results are those of the kernel
//! interpreter, bit for bit (payloads of NaNs aside).

mod emit;
mod error;
mod machine;
mod nvptx;
mod x86;

pub use emit::EmitError;
pub use error::Error;

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};

use inkwell::context::Context;
use nextc_ir::Target;
use nextc_ir::schedule::KernelModule;

use machine::Machine;

/// Compiles every kernel: one ELF object each (for a GPU: one text of PTX), in the order of `module.kernels`. Object `i` exports
/// `nextc_kernel_{i}` and, if the kernel has a tail, `nextc_tail_{i}`; it needs no symbol of anyone.
///
/// # Errors
/// [`Error`] of the first kernel that LLVM does not take; it names the kernel.
pub fn compile(module: &KernelModule, target: &Target) -> Result<Vec<Vec<u8>>, Error> {
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get).min(module.kernels.len());
    let next = AtomicUsize::new(0);
    let mut objects = std::thread::scope(|scope| {
        let spawn = |_| {
            let worker = std::thread::Builder::new().stack_size(STACK_BYTES);
            worker.spawn_scoped(scope, || compile_claimed(module, target, &next)).map_err(Error::Thread)
        };
        let workers = (0..threads).map(spawn).collect::<Result<Vec<_>, _>>()?;
        Ok(workers.into_iter().flat_map(|w| w.join().expect("a worker returns its errors")).collect::<Vec<_>>())
    })?;
    objects.sort_by_key(|&(i, _)| i);
    objects.into_iter().map(|(_, object)| object).collect()
}

/// Stack of a worker: LLVM's code generator recurses along the longest chain of a basic block.
const STACK_BYTES: usize = 64 << 20;

/// One worker: compiles the kernel that `next` says until there is none.
fn compile_claimed(module: &KernelModule, target: &Target, next: &AtomicUsize) -> Vec<(usize, Result<Vec<u8>, Error>)> {
    std::iter::repeat_with(|| next.fetch_add(1, Ordering::Relaxed))
        .take_while(|&i| i < module.kernels.len())
        .map(|i| (i, compile_one(module, target, i)))
        .collect()
}

fn compile_one(module: &KernelModule, target: &Target, index: usize) -> Result<Vec<u8>, Error> {
    let context = Context::create();
    let machine = Machine::new(target)?;
    let unit = machine.build(&context, module, index)?;
    machine.optimise(&unit)?;
    match target.gpu {
        None => machine.object(&unit),
        Some(_) => Ok(machine.assembly(&unit)?.into_bytes()),
    }
}

/// The LLVM IR of one kernel as it is emitted, before LLVM's passes.
///
/// # Errors
/// [`Error`] if there is no kernel of that name, or LLVM does not take it.
pub fn ir(module: &KernelModule, target: &Target, kernel: &str) -> Result<String, Error> {
    let context = Context::create();
    let machine = Machine::new(target)?;
    Ok(machine.build(&context, module, find(module, kernel)?)?.text())
}

/// The assembly text of one kernel.
///
/// # Errors
/// As [`ir`].
pub fn asm(module: &KernelModule, target: &Target, kernel: &str) -> Result<String, Error> {
    let context = Context::create();
    let machine = Machine::new(target)?;
    let unit = machine.build(&context, module, find(module, kernel)?)?;
    machine.optimise(&unit)?;
    machine.assembly(&unit)
}

fn find(module: &KernelModule, name: &str) -> Result<usize, Error> {
    module.kernels.iter().position(|k| k.name == name).ok_or_else(|| Error::NoKernel {
        name: name.to_owned(),
        known: module.kernels.iter().map(|k| k.name.clone()).collect(),
    })
}
