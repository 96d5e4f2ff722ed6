//! Invariants of kernels and of kernel modules, checked after lowering, after legalisation and before code is made.
//!
//! Every error is reported, not the first alone. What holds for a kernel that passes: operands and results have the types
//! that the op table asks for; each value is defined once, before its uses and in a region that encloses them; scratch is
//! allocated at the top level; stores go through scratch or through parameters marked as written. In memory are only `f32`,
//! `i32` and `i64`. For a module also: launches bind every parameter, to something that exists and may be written.

mod infer;
mod module;
mod regions;

pub use infer::infer;
pub use module::verify;

use super::{KType, Kernel, Val};
use crate::graph::Placement;
use crate::shape::Sym;

/// A broken invariant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("kernel @{kernel}: {place}: {broken}")]
pub struct KernelError {
    /// The kernel, or the program with its launch.
    pub kernel: String,
    /// The statement, or the part of the kernel.
    pub place: String,
    /// What is wrong.
    pub broken: Broken,
}

/// What can be wrong with a kernel or a schedule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// A wrong number of things.
    #[error("{found} {of}, expected {expected}")]
    Count {
        /// What is counted.
        of: &'static str,
        /// How many there are.
        found: usize,
        /// How many there should be.
        expected: usize,
    },
    /// An operand of a wrong type.
    #[error("operand {index} is {found}, expected {expected}")]
    Operand {
        /// Which operand.
        index: usize,
        /// Its type.
        found: String,
        /// What the op takes.
        expected: String,
    },
    /// A result, a yield or a parameter of a region of a wrong type.
    #[error("{what} %{} is {found}, expected {expected}", value.0)]
    Type {
        /// What it is.
        what: &'static str,
        /// The value.
        value: Val,
        /// Its type.
        found: KType,
        /// The type it should have.
        expected: KType,
    },
    /// A type that no value may have.
    #[error("value %{} has type {ty}, expected f32, i32, i64 or bool of 1, 2, 4, 8 or 16 lanes (f32 of any multiple of 4 up to 128)", value.0)]
    NoSuchType {
        /// The value.
        value: Val,
        /// Its type.
        ty: KType,
    },
    /// A use of a value that is not defined there.
    #[error("%{} is used where it is not defined", .0.0)]
    Undefined(Val),
    /// A second definition.
    #[error("%{} is defined twice", .0.0)]
    Redefined(Val),
    /// An op's constant is out of range.
    #[error("{what} is {found}, expected {expected}")]
    Constant {
        /// The constant.
        what: &'static str,
        /// What it is.
        found: i64,
        /// What it may be.
        expected: &'static str,
    },
    /// An allocation in a loop or a condition.
    #[error("scratch is allocated inside a region, expected at the top level")]
    NestedAlloc,
    /// An op that tasks of so many threads do not have: scratch and tiles are a single thread's, what a block does together needs several.
    #[error("not in a kernel whose tasks have {0} threads")]
    Threads(u32),
    /// A second `partials` in a region, or one in the tail that is not the body's.
    #[error("body and tail have one `partials` each at most, and the same")]
    Partials,
    /// A store through a parameter that is not marked as written.
    #[error("stores through parameter `{0}`, which is not marked `mut`")]
    ReadOnly(String),
    /// A bad or doubled name.
    #[error("name `{0}` is taken, reserved, or not made of letters, digits, `_` and `.`")]
    Name(String),
    /// A launch or output refers to something that does not exist.
    #[error("{what} {index} does not exist, there are {len}")]
    Missing {
        /// What.
        what: &'static str,
        /// Its index.
        index: u64,
        /// How many there are.
        len: u64,
    },
    /// A written parameter is bound to an input or a weight.
    #[error("parameter `{0}` is written, but bound to an input or a weight")]
    Constness(String),
    /// A placement outside the arena's plan.
    #[error("{} B .. {end} B per {} is outside the arena, which has {plan} B", at.at_bytes, unit(*at))]
    Placement {
        /// The placement.
        at: Placement,
        /// Its end, as far as known.
        end: u64,
        /// Bytes that the plan has for its unit.
        plan: u64,
    },
}

fn unit(at: Placement) -> &'static str {
    at.unit.map_or("step", Sym::name)
}

/// Checks one kernel.
/// # Errors
/// Every invariant it breaks.
pub fn verify_kernel(kernel: &Kernel) -> Result<(), Vec<KernelError>> {
    let errors = regions::check(kernel);
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

fn error(kernel: &str, place: &str, broken: Broken) -> KernelError {
    KernelError { kernel: kernel.to_owned(), place: place.to_owned(), broken }
}

/// Names with a meaning of their own in text.
pub(super) const RESERVED: [&str; 5] = ["T", "B", "P", "R", "task"];

/// True for a name made of letters, digits, `_` and `.` that does not begin with a digit.
pub(super) fn is_name(name: &str) -> bool {
    let begins = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    begins && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.')
}
