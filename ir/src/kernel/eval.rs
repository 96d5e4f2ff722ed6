//! The interpreter of the kernel IR: the oracle that machine code is compared with, bit for bit.
//!
//! [`Code`] is a kernel made ready, [`Code::run`] one launch of it: all tasks, in an order shuffled by a seed, then the tail.
//! [`Interpreter`] runs whole schedules. Memory is a set of [`Buffer`]s that know which of their words have been written, and
//! a parameter is a place in one of them ([`Place`]); several may share a buffer. What would be undefined on a machine is a
//! [`KernelFault`] here: reading what was never written, leaving a buffer or an allocation, dividing by zero, storing through
//! a read-only parameter, and two tasks of one launch touching the same word when one of them writes it.

mod code;
mod machine;
mod memory;
mod program;

pub use code::Code;
pub use memory::{Buffer, Place, Slot};
pub use program::{Interpreter, OutputRows};

use super::Kernel;
use super::verify::KernelError;

/// How to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Orders the tasks.
    pub seed: u64,
    /// Whether conflicts between tasks are looked for.
    pub races: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { seed: 1, races: true }
    }
}

/// What a kernel did that it must not do.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("kernel @{kernel}, {}: `{statement}`: {what}", task.map_or("tail".to_owned(), |t| format!("task {t}")))]
pub struct KernelFault {
    /// The kernel's name.
    pub kernel: String,
    /// The task; `None` in the tail.
    pub task: Option<u64>,
    /// The statement, as the kernel's text has it.
    pub statement: String,
    /// What it did.
    pub what: Misdeed,
}

/// See [`KernelFault`].
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum Misdeed {
    /// An access outside the buffer or the allocation.
    #[error("bytes {at} .. {at} + {bytes} of a buffer of {len} B")]
    OutOfBounds {
        /// First byte.
        at: i64,
        /// How many.
        bytes: u64,
        /// Bytes there are.
        len: u64,
    },
    /// An access at an address that is no multiple of the element's size.
    #[error("byte {at} is not aligned to an element of {bytes} B")]
    Misaligned {
        /// First byte.
        at: i64,
        /// Bytes of an element.
        bytes: u64,
    },
    /// A read of something never written.
    #[error("byte {at} is read before it is written")]
    Unwritten {
        /// The first such byte.
        at: u64,
    },
    /// A store through a parameter that is not marked as written, or into memory lent for reading.
    #[error("a store to read-only memory")]
    ReadOnly,
    /// Two tasks touch one word, and one of them writes it.
    #[error("byte {at} conflicts with task {other}")]
    Race {
        /// The byte.
        at: u64,
        /// The other task.
        other: u64,
    },
    /// A division by zero, or the one quotient that does not fit.
    #[error("a division by zero or an overflowing one")]
    Division,
    /// A shift by the width or more.
    #[error("a shift by the width or more")]
    Shift,
    /// A float without an i32.
    #[error("{0} does not fit in an i32")]
    ToInt(f32),
    /// A loop's step is not positive.
    #[error("the loop's step is {0}, expected a positive number")]
    Step(i64),
}

/// Why a run failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum EvalError {
    /// The kernel breaks an invariant.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Invalid(Vec<KernelError>),
    /// The kernel misbehaved.
    #[error(transparent)]
    Fault(#[from] KernelFault),
    /// Arguments that do not fit the kernel's parameters.
    #[error("kernel @{kernel}: {found} arguments, expected {expected}")]
    Args {
        /// The kernel.
        kernel: String,
        /// Arguments given.
        found: usize,
        /// Parameters it has.
        expected: usize,
    },
    /// An argument in a buffer that does not exist.
    #[error("kernel @{kernel}: argument {index} is in buffer {buffer}, there are {buffers}")]
    NoBuffer {
        /// The kernel.
        kernel: String,
        /// The argument.
        index: usize,
        /// The buffer named.
        buffer: usize,
        /// Buffers there are.
        buffers: usize,
    },
    /// A kernel of blocks of threads.
    #[error("kernel @{0}: its tasks are blocks of threads, which are not interpreted")]
    Block(String),
    /// More tasks than can be counted.
    #[error("kernel @{0}: the grid is larger than 2^32")]
    Grid(String),
    /// Something that a schedule needs is not there.
    #[error("{what} `{name}` is missing")]
    Missing {
        /// What it is.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// A table with the wrong number of entries.
    #[error("{found} {what}, expected {expected}")]
    Table {
        /// What is in it.
        what: &'static str,
        /// How many were given.
        found: usize,
        /// How many the module has.
        expected: usize,
    },
    /// An output was not written in full.
    #[error("output `{output}`, row {row}: {what}")]
    Output {
        /// The output.
        output: String,
        /// Its row.
        row: u64,
        /// What is wrong.
        what: Misdeed,
    },
}

/// Runs one launch of `kernel` on `buffers`: `args` says where each parameter points.
/// # Errors
/// [`EvalError`] if the kernel is broken, misbehaves, or the arguments do not fit it.
pub fn run(
    kernel: &Kernel,
    syms: [u64; 4],
    buffers: &mut [Buffer],
    args: &[Place],
    options: Options,
) -> Result<(), EvalError> {
    let mut slots: Vec<Slot<'_>> = buffers.iter_mut().map(Slot::Own).collect();
    Code::new(kernel)?.run(syms, &mut slots, args, options)
}
