//! The Cranelift backend: kernel IR to an ELF relocatable object for x86-64, with 128-bit vectors and no LLVM.
//!
//! [`compile`] makes one object of a whole module: a function [`kernel_symbol`] for each kernel and [`tail_symbol`] for each tail, with the
//! signature that [`nextc_ir::kernel::Kernel`] describes. The code is position independent and calls nothing: what has no instruction on
//! the target is an error, not a call into a library. Kernels come in legalised to vectors of at most 128 bits, and verified.
//! [`clif`] and [`asm`] show one kernel for people.

mod address;
mod control;
mod error;
mod function;
mod isa;
mod object;
mod ops;
mod types;
mod vector;

pub use error::Error;

use nextc_ir::kernel::Kernel;
use nextc_ir::schedule::KernelModule;
use nextc_ir::target::Target;

use crate::function::Part;

/// The symbol of kernel `index` of a module.
pub fn kernel_symbol(index: usize) -> String {
    format!("nextc_kernel_{index}")
}

/// The symbol of the tail of kernel `index` of a module.
pub fn tail_symbol(index: usize) -> String {
    format!("nextc_tail_{index}")
}

/// Compiles every kernel of a module into one ELF relocatable object.
///
/// # Errors
/// [`Error::Feature`] if the target is too old for this backend; [`Error::Width`] and [`Error::Unsupported`] name the kernel
/// that was not legalised; [`Error::External`] if code would need a symbol from outside.
pub fn compile(module: &KernelModule, target: &Target) -> Result<Vec<u8>, Error> {
    let isa = isa::for_target(target)?;
    object::build(&module.kernels, &isa)
}

/// The Cranelift IR of one kernel and of its tail, as emitted and not yet optimised.
///
/// # Errors
/// As [`compile`], and [`Error::NoKernel`] if the module has no kernel called `kernel`.
pub fn clif(module: &KernelModule, target: &Target, kernel: &str) -> Result<String, Error> {
    let isa = isa::for_target(target)?;
    show(module, kernel, |k, part| Ok(function::emit(k, part, &*isa)?.display().to_string()))
}

/// The machine code of one kernel and of its tail, as assembler text with the registers that were assigned.
///
/// # Errors
/// As [`clif`].
pub fn asm(module: &KernelModule, target: &Target, kernel: &str) -> Result<String, Error> {
    let isa = isa::for_target(target)?;
    show(module, kernel, |k, part| object::disassemble(k, part, &*isa))
}

/// Finds a kernel by name and joins the text of its parts, each under its symbol.
fn show(
    module: &KernelModule,
    name: &str,
    text: impl Fn(&Kernel, Part) -> Result<String, Error>,
) -> Result<String, Error> {
    let (index, kernel) = module.kernels.iter().enumerate().find(|(_, k)| k.name == name).ok_or_else(|| {
        Error::NoKernel { name: name.to_owned(), known: module.kernels.iter().map(|k| k.name.clone()).collect() }
    })?;
    Part::of(kernel)
        .map(|part| Ok(format!("; {} ({})\n{}", part.symbol(index), kernel.name, text(kernel, part)?)))
        .collect::<Result<Vec<_>, Error>>()
        .map(|parts| parts.join("\n"))
}
