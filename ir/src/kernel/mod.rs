//! The kernel IR: a small typed IR near the machine, of structured loops, vectors and pointers.
//!
//! A [`Kernel`] is one parallel region: its body runs once for each task of the grid, in any order and on any thread, and
//! its `tail`, if it has one, runs after all tasks: once, or on blocks for each task of a grid of its own. Every value is in SSA form and has a [`KType`]; loops carry values and
//! regions yield them, so there are no variables and no jumps.
//!
//! A task is one thread's, or a block of [`Kernel::threads`] threads that all run the body: then values differ from thread to thread,
//! and the ops of class [`op::Sig::Block`] let them work together.

pub mod build;
pub mod eval;
pub mod math;
pub mod op;
pub mod parse;
pub mod print;
pub mod random;
pub mod verify;

pub use build::KernelBuilder;
pub use op::{KOp, Pred};

use crate::dtype::DType;
use crate::schedule::Extent;

/// An SSA value of a kernel; [`Kernel::types`] holds its type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Val(pub u32);

/// Where a pointer points.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Space {
    /// Memory shared by all tasks: weights, states, activations, inputs.
    Global,
    /// Memory of one task, undefined when it begins.
    Scratch,
    /// Memory that the threads of one block share, undefined when it begins.
    Shared,
}

impl Space {
    /// The name in IR text.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Global => "global",
            Self::Scratch => "scratch",
            Self::Shared => "shared",
        }
    }
}

/// The type of a kernel value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KType {
    /// A scalar (`lanes` = 1) or a vector: `i64`, `f32x16`.
    Value {
        /// Element type.
        dtype: DType,
        /// Number of elements.
        lanes: u32,
    },
    /// A pointer: `ptr<global>`.
    Ptr(Space),
}

impl KType {
    /// A scalar of `dtype`.
    pub const fn scalar(dtype: DType) -> Self {
        Self::Value { dtype, lanes: 1 }
    }

    /// A vector of `lanes` elements (a scalar for 1).
    pub const fn vector(dtype: DType, lanes: u32) -> Self {
        Self::Value { dtype, lanes }
    }

    /// Element type of a value; `None` for a pointer.
    pub const fn dtype(self) -> Option<DType> {
        match self {
            Self::Value { dtype, .. } => Some(dtype),
            Self::Ptr(_) => None,
        }
    }

    /// Lanes of a value, 1 for a pointer.
    pub const fn lanes(self) -> u32 {
        match self {
            Self::Value { lanes, .. } => lanes,
            Self::Ptr(_) => 1,
        }
    }
}

impl std::fmt::Display for KType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Value { dtype, lanes: 1 } => write!(f, "{dtype}"),
            Self::Value { dtype, lanes } => write!(f, "{dtype}x{lanes}"),
            Self::Ptr(space) => write!(f, "ptr<{}>", space.name()),
        }
    }
}

/// One statement: an op, its operands, the constants that are part of it, nested regions, and the values it defines.
#[derive(Clone, Debug, PartialEq)]
pub struct Stmt {
    /// The op.
    pub op: KOp,
    /// Operands.
    pub args: Vec<Val>,
    /// Values that it defines.
    pub results: Vec<Val>,
    /// Nested regions: one for a loop, two for a condition.
    pub regions: Vec<Region>,
}

/// A list of statements with parameters (a loop's counter and carried values) and the values that it yields.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Region {
    /// Values that the region's owner defines at its beginning.
    pub params: Vec<Val>,
    /// Statements in order.
    pub stmts: Vec<Stmt>,
    /// Values that it hands to its owner at its end.
    pub yields: Vec<Val>,
}

impl Region {
    /// True if every thread waits for the launches before this one: a kernel that waits at all does so whatever its task is, to which the interpreter holds it.
    pub fn waits(&self) -> bool {
        self.has(&|op| op == KOp::Wait)
    }

    /// True if no thread lets the next launch begin before it has waited itself: then that one begins when all launches before this one are done.
    pub fn waits_first(&self) -> bool {
        self.after(false).is_some()
    }

    /// Whether a thread has waited after these statements; `None` if one may have let the next launch begin before.
    fn after(&self, mut waited: bool) -> Option<bool> {
        for stmt in &self.stmts {
            match stmt.op {
                KOp::Wait => waited = true,
                KOp::Release if !waited => return None,
                _ => {
                    let after: Vec<bool> = stmt.regions.iter().map(|r| r.after(waited)).collect::<Option<_>>()?;
                    // of a loop nobody knows whether it runs
                    waited |= after.len() == 2 && after.iter().all(|&waited| waited);
                }
            }
        }
        Some(waited)
    }

    /// True if it has such an op, at any depth.
    pub fn has(&self, such: &impl Fn(KOp) -> bool) -> bool {
        self.stmts.iter().any(|s| such(s.op) || s.regions.iter().any(|r| r.has(such)))
    }
}

/// A kernel's pointer parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KParam {
    /// Its name in text.
    pub name: String,
    /// True if the kernel stores through it.
    pub written: bool,
}

/// A kernel. Values 0 to 3 are the dimensions `T`, `B`, `P`, `R` of the step (`i64`), value 4 is the task (`i64`), and values from 5 on
/// are the parameters, all `ptr<global>`.
///
/// Machine code for a CPU is `extern "C" fn(args: *const u64, scratch: *mut u8, first: i64, last: i64)`: `args` holds the four dimensions, then the
/// threads of the team, the pointers, and that of its `partials` if it has some, each but the last at its value's number; it runs the tasks `first .. last`, as the tail's runs tasks of the tail. Code for a GPU
/// is an entry function of the dimensions, the pointers, a pointer to scratch of all tasks, and the number of tasks.
#[derive(Clone, Debug, PartialEq)]
pub struct Kernel {
    /// Its name: unique in the module, made of letters, digits, `_` and `.`.
    pub name: String,
    /// What was fused into it, for people.
    pub doc: String,
    /// Pointer parameters.
    pub params: Vec<KParam>,
    /// Number of tasks.
    pub grid: Extent,
    /// Threads of a task: 1, or a multiple of a warp. In blocks of threads, vectors in memory are aligned to their size (at most 16 bytes).
    pub threads: u32,
    /// Blocks that are to fit on a multiprocessor together, which bounds the registers of a thread; 1 bounds nothing.
    pub together: u32,
    /// What each task does.
    pub body: Region,
    /// What is done after all tasks.
    pub tail: Option<Region>,
    /// Number of tasks of the tail.
    pub tail_grid: Extent,
    /// The type of every value, indexed by [`Val`].
    pub types: Vec<KType>,
}

impl Kernel {
    /// Values that exist before the body: four dimensions and the task.
    pub const FIRST_PARAM: u32 = 5;
    /// The task.
    pub const TASK: Val = Val(4);
    /// Threads of a warp.
    pub const WARP: u32 = 32;
    /// Threads of a GPU's block that runs tasks of one thread, each a task.
    pub const SINGLE_THREADS: u32 = Self::WARP;
    /// Least alignment of memory that the threads of a block share, and of each piece of it, bytes.
    pub const SHARED_ALIGN: u64 = 128;
    /// Bytes of a shared array that may hold tokens of [`KOp::MmaGroup`], at least, and what such an array is aligned to.
    pub const SWIZZLED_BYTES: u64 = 1 << 15;
    /// See [`Self::SWIZZLED_BYTES`]: the exchange of pieces goes by addresses, and repeats after so many bytes.
    pub const SWIZZLED_ALIGN: u64 = 1024;
    /// Most threads of a block.
    pub const MAX_THREADS: u32 = 1024;

    /// True if a task is a block of threads.
    pub const fn is_block(&self) -> bool {
        self.threads > 1
    }

    /// The body, and the tail if there is one.
    pub fn regions(&self) -> impl Iterator<Item = &Region> {
        std::iter::once(&self.body).chain(&self.tail)
    }

    /// The type of a value.
    pub fn ty(&self, v: Val) -> KType {
        self.types[v.0 as usize]
    }

    /// The value of pointer parameter `i`.
    pub const fn param(&self, i: usize) -> Val {
        Val(Self::FIRST_PARAM + i as u32)
    }

    /// Bytes of scratch that one task needs: every `alloc` of body and tail, each rounded up to 64 bytes.
    pub fn scratch_bytes(&self) -> u64 {
        let bytes = |op| match op {
            KOp::Alloc { dtype, elems } => Some((elems * dtype.bytes()).next_multiple_of(64)),
            _ => None,
        };
        self.allocated(bytes).into_iter().sum()
    }

    /// Bytes that one task of the body hands to the tail: those of `partials`, which body and tail share.
    pub fn partial_bytes(&self) -> u64 {
        let bytes = |op| match op {
            KOp::Partials { dtype, elems } => Some(elems * dtype.bytes()),
            _ => None,
        };
        self.allocated(bytes).into_iter().fold(0, u64::max)
    }

    /// Bytes of memory that the threads of a block share: the larger of body and tail, each `shared` behind the one before.
    pub fn shared_bytes(&self) -> u64 {
        let of = |region: &Region| {
            region.stmts.iter().fold(0, |taken, s| match s.op {
                KOp::Shared { dtype, elems } => Self::place_shared(taken, elems * dtype.bytes()).1,
                _ => taken,
            })
        };
        self.regions().map(of).fold(0, u64::max)
    }

    /// Where an array of `bytes` lies that the threads of a block share, behind `taken` bytes; and how many are taken with it.
    pub const fn place_shared(taken: u64, bytes: u64) -> (u64, u64) {
        let align = if bytes < Self::SWIZZLED_BYTES { Self::SHARED_ALIGN } else { Self::SWIZZLED_ALIGN };
        let at = taken.next_multiple_of(align);
        (at, (at + bytes).next_multiple_of(Self::SHARED_ALIGN))
    }

    /// Bytes that body and tail allocate at their top level.
    fn allocated(&self, bytes: impl Fn(KOp) -> Option<u64>) -> [u64; 2] {
        let of = |region: &Region| region.stmts.iter().filter_map(|s| bytes(s.op)).sum();
        [of(&self.body), self.tail.as_ref().map_or(0, of)]
    }
}
