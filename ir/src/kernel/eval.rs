//! The interpreter of the kernel IR: the oracle that machine code is compared with, bit for bit.
//!
//! [`Code`] is a kernel made ready, [`Code::run`] one launch of it: all tasks, in an order shuffled by a seed, then those of the tail.
//! [`Interpreter`] runs whole schedules. Memory is a set of [`Buffer`]s that know which of their words have been written, and
//! a parameter is a place in one of them ([`Place`]); several may share a buffer. What would be undefined on a machine is a
//! [`KernelFault`] here: reading what was never written, leaving a buffer or an allocation, dividing by zero, storing through
//! a read-only parameter, and two tasks of one launch touching the same word when one of them writes it.
//!
//! # Blocks of threads
//!
//! The threads of a block go through the kernel in step: each value is one number a thread, a loop goes on while any thread
//! loops, and of a condition both regions run, each for its threads. A single thread is a block of one. Further faults:
//!
//! - a `barrier`, `wait` or `release` that not all threads of the block reach, a `shuffle_xor` or `mma` that not all of the warp reach;
//! - a word, shared or global, that one thread writes and another touches with no barrier between, even if both write the same number. Atomic
//!   additions conflict with all other accesses, but not with one another, between blocks too;
//! - a vector that is not aligned to its size, at most 16 bytes;
//! - in a body or tail that has a `wait`: touching anything but weights and inputs of the step ([`Slot::Constant`])
//!   before it, or ending without it; what no launch of the program has written yet, as a state, may be read.
//!
//! `mma` sums its products, which are exact, and `c` in f64, in the order of `k`, and rounds once. Hardware sums in an order and with a truncation that
//! are not published, so machine code with `mma` is compared with a tolerance; all else is bit for bit.

mod access;
mod code;
mod half;
mod machine;
mod make;
mod mask;
mod memory;
mod program;
mod shadow;
mod tile;

pub use code::Code;
pub use memory::{Buffer, Place, Settled, Slot};
pub use program::{Interpreter, OutputRows};
pub use shadow::Rival;

use super::Kernel;
use super::verify::KernelError;

/// How to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Orders the tasks.
    pub seed: u64,
    /// Whether conflicts between tasks are looked for.
    pub races: bool,
    /// Threads that the kernel is told of.
    pub team: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self { seed: 1, races: true, team: 3 }
    }
}

/// What a kernel did that it must not do.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("kernel @{kernel}, {}{}: `{statement}`: {what}", task.map_or("tail".to_owned(), |t| format!("task {t}")), of_thread(*thread))]
pub struct KernelFault {
    /// The kernel's name.
    pub kernel: String,
    /// The task; `None` in a tail of one task of one thread.
    pub task: Option<u64>,
    /// The thread of the block; `None` in a task of one thread, and for what the block does together.
    pub thread: Option<u32>,
    /// The statement, as the kernel's text has it.
    pub statement: String,
    /// What it did.
    pub what: Misdeed,
}

fn of_thread(thread: Option<u32>) -> String {
    thread.map_or(String::new(), |t| format!(", thread {t}"))
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
    /// An access at an address that is no multiple of the element's size, or of what a block's vectors are aligned to.
    #[error("byte {at} is not aligned to {bytes} B")]
    Misaligned {
        /// First byte.
        at: i64,
        /// What it should be a multiple of.
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
    /// Two tasks, or two threads with no barrier between, touch one word, and one of them writes it.
    #[error("byte {at} conflicts with {other}")]
    Race {
        /// The byte.
        at: u64,
        /// Who else touched it.
        other: Rival,
    },
    /// Not all threads are where all have to be.
    #[error("{here} threads of the {group} are here, expected all {of}")]
    Diverged {
        /// `block` or `warp`.
        group: &'static str,
        /// Threads that are here.
        here: usize,
        /// Threads that there are.
        of: usize,
    },
    /// An access to what the launches before may still be writing.
    #[error("memory that launches before this one may still write is touched before the `wait`")]
    BeforeWait,
    /// The kernel has a `wait` that was not reached.
    #[error("the kernel ends without having waited")]
    NoWait,
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

/// Runs one launch of `kernel` on `buffers`: `args` says where each parameter points. What no parameter writes counts as constant,
/// the rest as states that no launch has written.
/// # Errors
/// [`EvalError`] if the kernel is broken, misbehaves, or the arguments do not fit it.
pub fn run(
    kernel: &Kernel,
    syms: [u64; 4],
    buffers: &mut [Buffer],
    args: &[Place],
    options: Options,
) -> Result<(), EvalError> {
    let written = |b: usize| kernel.params.iter().zip(args).any(|(p, a)| p.written && a.buffer == b);
    let slot =
        |(b, buffer)| if written(b) { Slot::Own { buffer, settled: Settled::All } } else { Slot::Constant(buffer) };
    let mut slots: Vec<Slot<'_>> = buffers.iter_mut().enumerate().map(slot).collect();
    Code::new(kernel)?.run(syms, &mut slots, args, options)
}
