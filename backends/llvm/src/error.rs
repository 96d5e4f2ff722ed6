//! What can go wrong between kernel IR and an object.

use crate::emit::EmitError;

/// Why a kernel did not become machine code.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// LLVM has no code generator for the target.
    #[error("cpu `{cpu}`: LLVM makes no code for it: {reason}")]
    Machine {
        /// The CPU.
        cpu: String,
        /// What LLVM says.
        reason: String,
    },
    /// The kernel IR could not be expressed.
    #[error("kernel `{kernel}`: {source}")]
    Emit {
        /// The kernel.
        kernel: String,
        /// What it was.
        source: EmitError,
    },
    /// LLVM's verifier refused what was emitted: a bug of the emitter, or kernel IR that was not verified.
    #[error("kernel `{kernel}`: LLVM's verifier refuses it: {reason}")]
    Verify {
        /// The kernel.
        kernel: String,
        /// What LLVM says.
        reason: String,
    },
    /// LLVM's passes or its code generator failed.
    #[error("kernel `{kernel}`: LLVM fails to {stage} it: {reason}")]
    Generate {
        /// The kernel.
        kernel: String,
        /// `optimise` or `assemble`.
        stage: &'static str,
        /// What LLVM says.
        reason: String,
    },
    /// The system starts no thread for a worker.
    #[error("no thread to compile on: {0}")]
    Thread(std::io::Error),
    /// No kernel has this name.
    #[error("no kernel is called `{name}`, expected one of {}", known.join(", "))]
    NoKernel {
        /// The name.
        name: String,
        /// The names that exist.
        known: Vec<String>,
    },
}
