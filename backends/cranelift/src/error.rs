//! What can go wrong in this backend.

use nextc_ir::kernel::KType;

/// Why a module could not be compiled.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value does not fit in a register of this backend.
    #[error(
        "kernel `{kernel}`: `{ty}` has no 128-bit register form, expected kernels legalised to vectors of 128 bits"
    )]
    Width {
        /// The kernel.
        kernel: String,
        /// The type.
        ty: KType,
    },
    /// An op has no meaning, or no instruction, for its operand type.
    #[error("kernel `{kernel}`: `{op}` of `{ty}` is not supported by the Cranelift backend")]
    Unsupported {
        /// The kernel.
        kernel: String,
        /// The op.
        op: &'static str,
        /// Type of the operand that it does not take.
        ty: KType,
    },
    /// An op of a block of threads, which a CPU does not have.
    #[error("`{op}` is of blocks of threads, expected kernels whose tasks are one thread's")]
    Block {
        /// The op.
        op: &'static str,
    },
    /// An op of 512-bit vectors or of a matrix unit, for which Cranelift has no instructions.
    #[error(
        "`{op}` is of 512-bit vectors or a CPU's matrix unit, expected kernels without: lowering for this backend makes none"
    )]
    Tile {
        /// The op.
        op: &'static str,
    },
    /// A statement does not have the operands, regions or results of its op: the kernel was not verified.
    #[error("kernel `{kernel}`: `{op}` has {found} {what}, expected {expected}")]
    Shape {
        /// The kernel.
        kernel: String,
        /// The op.
        op: &'static str,
        /// Operands, results or regions.
        what: &'static str,
        /// How many it has.
        found: usize,
        /// How many it should have.
        expected: usize,
    },
    /// A value is used before it is defined: the kernel was not verified.
    #[error("kernel `{kernel}`: value %{value} is used before it is defined")]
    Undefined {
        /// The kernel.
        kernel: String,
        /// The value.
        value: u32,
    },
    /// The target lacks an instruction set that this backend builds on.
    #[error("target `{cpu}` has no `{feature}`, which the Cranelift backend needs; choose x86-64-v3 or later")]
    Feature {
        /// The CPU.
        cpu: String,
        /// The missing feature, in LLVM's spelling.
        feature: &'static str,
    },
    /// The module has no kernel of this name.
    #[error("no kernel is called `{name}`, the module has: {}", .known.join(", "))]
    NoKernel {
        /// What was asked for.
        name: String,
        /// What there is.
        known: Vec<String>,
    },
    /// Compiled code refers to a symbol outside of itself.
    #[error("kernel `{kernel}`: its code needs `{symbol}` from outside, expected code that calls nothing")]
    External {
        /// The kernel.
        kernel: String,
        /// The symbol.
        symbol: String,
    },
    /// Cranelift was not built for, or does not know, the target.
    #[error("cranelift refuses the target: {reason}")]
    Isa {
        /// What it says.
        reason: String,
    },
    /// Cranelift could not compile a kernel.
    #[error("kernel `{kernel}`: cranelift: {reason}")]
    Codegen {
        /// The kernel.
        kernel: String,
        /// What it says.
        reason: String,
    },
    /// The object could not be written.
    #[error("object file: {reason}")]
    Object {
        /// What the writer says.
        reason: String,
    },
}
