//! A kernel made ready to run: its tree as a list of instructions over registers.
//!
//! There are three banks: values of 32 bits and truth values, i64, pointers. A register holds one number for each lane and
//! thread of the block, lane by lane (`lane * threads + thread`), so that an elementwise op is one loop. Registers are numbered in the order in
//! which values are defined: a result lies behind its operands. Loops and conditions become jumps, and masks of threads.

use super::EvalError;
use super::make::Maker;
use crate::dtype::DType;
use crate::kernel::{Kernel, Pred, Region, Stmt};

/// Where a register begins in its bank.
pub(super) type Reg = usize;

/// Integer ops of two operands.
#[derive(Clone, Copy, Debug)]
pub(super) enum IntOp {
    Add,
    Sub,
    Mul,
    Div,
    Rem,
    And,
    Or,
    Xor,
    Shl,
    Ushr,
    Sshr,
}

/// Float ops of two operands.
#[derive(Clone, Copy, Debug)]
pub(super) enum FloatOp {
    Add,
    Sub,
    Mul,
    Div,
    Min,
    Max,
}

/// Ops of one operand from 32 bits to 32 bits.
#[derive(Clone, Copy, Debug)]
pub(super) enum UnaryOp {
    Neg,
    Abs,
    Sqrt,
    Round,
    ToFloat,
    ToInt,
}

/// What is compared.
#[derive(Clone, Copy, Debug)]
pub(super) enum CmpOf {
    F32,
    I32,
    I64,
}

/// The banks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bank {
    Narrow,
    Wide,
    Pointer,
}

/// Ops on 16-bit and smaller floats in an i32.
#[derive(Clone, Copy, Debug)]
pub(super) enum HalfOp {
    Pack(DType),
    Fma(DType),
    ToFloat,
    Fp8,
}

/// The operands of a product of fragments.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mma {
    pub dtype: DType,
    pub d: Reg,
    pub a: [Reg; 4],
    pub b: [Reg; 2],
    pub c: Reg,
}

/// The operands of a product by a group of warps.
#[derive(Clone, Debug)]
pub(super) struct MmaGroup {
    pub dtype: DType,
    pub d: Reg,
    /// Pointer and index of B.
    pub b: [Reg; 2],
    /// Four of each step.
    pub a: Vec<Reg>,
    /// Groups of eight tokens.
    pub groups: usize,
}

/// The operands of products of tiles.
#[derive(Clone, Debug)]
pub(super) struct TileStep {
    pub a: Vec<Reg>,
    pub b: Vec<Reg>,
}

/// One instruction: `d` is where the result goes, `n` how many numbers it has in all threads, `lanes` how many in one.
#[derive(Clone, Copy, Debug)]
pub(super) enum Inst {
    Const32 {
        d: Reg,
        bits: u32,
    },
    Const64 {
        d: Reg,
        bits: i64,
    },
    /// A pointer to an allocation.
    Own {
        d: Reg,
        piece: usize,
    },
    /// Threads that share the tasks.
    Team {
        d: Reg,
    },
    /// A pointer to what the body hands to the tail.
    Partials {
        d: Reg,
    },
    Splat32 {
        d: Reg,
        a: Reg,
        lanes: usize,
    },
    Splat64 {
        d: Reg,
        a: Reg,
        lanes: usize,
    },
    Int32 {
        op: IntOp,
        d: Reg,
        a: Reg,
        b: Reg,
        n: usize,
    },
    Int64 {
        op: IntOp,
        d: Reg,
        a: Reg,
        b: Reg,
        n: usize,
    },
    Float {
        op: FloatOp,
        d: Reg,
        a: Reg,
        b: Reg,
        n: usize,
    },
    Fma {
        d: Reg,
        a: Reg,
        b: Reg,
        c: Reg,
        n: usize,
    },
    Unary {
        op: UnaryOp,
        d: Reg,
        a: Reg,
        n: usize,
    },
    Cmp {
        of: CmpOf,
        pred: Pred,
        d: Reg,
        a: Reg,
        b: Reg,
        n: usize,
    },
    /// Lane by lane.
    Select32 {
        d: Reg,
        c: Reg,
        a: Reg,
        b: Reg,
        n: usize,
    },
    Select64 {
        d: Reg,
        c: Reg,
        a: Reg,
        b: Reg,
        n: usize,
    },
    /// All lanes by one condition.
    Choose {
        bank: Bank,
        d: Reg,
        c: Reg,
        a: Reg,
        b: Reg,
        lanes: usize,
    },
    Widen {
        d: Reg,
        a: Reg,
        n: usize,
    },
    Narrow {
        d: Reg,
        a: Reg,
        n: usize,
    },
    Move {
        bank: Bank,
        d: Reg,
        a: Reg,
        n: usize,
    },
    ReduceAdd {
        d: Reg,
        a: Reg,
        lanes: usize,
    },
    ReduceMax {
        d: Reg,
        a: Reg,
        lanes: usize,
    },
    Load32 {
        d: Reg,
        p: Reg,
        i: Reg,
        lanes: usize,
    },
    Load64 {
        d: Reg,
        p: Reg,
        i: Reg,
        lanes: usize,
    },
    Store32 {
        p: Reg,
        i: Reg,
        v: Reg,
        lanes: usize,
    },
    Store64 {
        p: Reg,
        i: Reg,
        v: Reg,
        lanes: usize,
    },
    Offset {
        d: Reg,
        p: Reg,
        bytes: Reg,
    },
    CheckStep {
        step: Reg,
    },
    /// Opens a region for the threads that are here.
    Loop,
    /// Goes on with the threads whose counter has not reached `hi`.
    LoopHead {
        i: Reg,
        hi: Reg,
        out: usize,
    },
    LoopNext {
        i: Reg,
        step: Reg,
        head: usize,
        out: usize,
    },
    /// Opens a region for the threads whose condition holds; without any goes on at `otherwise`, which is an [`Inst::Else`].
    If {
        c: Reg,
        otherwise: usize,
    },
    /// The same for the other threads.
    Else {
        c: Reg,
        end: usize,
    },
    /// Closes a region.
    End,
    Thread {
        d: Reg,
    },
    Barrier,
    Shuffle {
        d: Reg,
        a: Reg,
        mask: usize,
    },
    Quad {
        d: Reg,
        from: [Reg; 4],
    },
    /// The best of each warp.
    Best {
        d: Reg,
        a: Reg,
        largest: bool,
    },
    AtomicAdd {
        d: Reg,
        p: Reg,
        i: Reg,
        x: Reg,
    },
    Half {
        op: HalfOp,
        d: Reg,
        a: Reg,
        b: Reg,
        c: Reg,
    },
    /// The product of this number in [`Block::mmas`].
    Mma {
        number: usize,
    },
    /// The product of this number in [`Block::mma_groups`].
    MmaGroup {
        number: usize,
    },
    CopyAsync {
        to: Reg,
        at: Reg,
        from: Reg,
        from_at: Reg,
    },
    CopyCommit,
    CopyWait {
        left: usize,
    },
    Prefetch {
        p: Reg,
        at: Reg,
        bytes: Reg,
    },
    Wait,
    Release,
    /// Four bits of each word, less 8.
    Nibble {
        d: Reg,
        a: Reg,
        shift: u32,
        n: usize,
    },
    /// Two vectors of 16 as bf16: in a row, or pairs of lanes.
    Bf16 {
        in_a_row: bool,
        d: Reg,
        a: Reg,
        b: Reg,
    },
    /// The lowest bytes of four vectors of 16 in a row.
    ByteRow {
        d: Reg,
        from: [Reg; 4],
    },
    /// `sum` and the products of the halves of `a` and `b`.
    ShortDot {
        d: Reg,
        sum: Reg,
        a: Reg,
        b: Reg,
        n: usize,
    },
    /// `sum` and the products of bytes, unsigned ones of `a` and signed ones of `b`.
    ByteDot {
        d: Reg,
        sum: Reg,
        a: Reg,
        b: Reg,
        n: usize,
    },
    /// `sum` and the products of two bf16.
    PairDot {
        d: Reg,
        sum: Reg,
        a: Reg,
        b: Reg,
        n: usize,
    },
    TileTurn {
        to: Reg,
        from: Reg,
    },
    TileZero,
    /// The products of this number in [`Block::tile_steps`].
    TileStep {
        number: usize,
    },
    TileStore {
        c: Reg,
        rows: u32,
        columns: u32,
    },
    TileLoad {
        c: Reg,
        rows: u32,
        columns: u32,
    },
}

/// The instructions of a body or a tail.
#[derive(Clone, Debug, Default)]
pub(super) struct Block {
    pub insts: Vec<Inst>,
    /// For each instruction, the number of its statement in the order of the text.
    pub stmts: Vec<u32>,
    /// Bytes of each allocation, scratch or shared.
    pub own: Vec<u64>,
    /// Products of fragments.
    pub mmas: Vec<Mma>,
    /// Products by groups of warps.
    pub mma_groups: Vec<MmaGroup>,
    /// Products of tiles.
    pub tile_steps: Vec<TileStep>,
    /// How deep regions lie in regions.
    pub depth: usize,
    /// The number of the first statement that waits for the launches before.
    pub wait: Option<u32>,
}

/// A kernel made ready to run; see [`super`].
#[derive(Clone, Debug)]
pub struct Code {
    pub(super) kernel: Kernel,
    pub(super) body: Block,
    pub(super) tail: Option<Block>,
    /// Sizes of the three banks.
    pub(super) narrow: usize,
    pub(super) wide: usize,
    pub(super) pointers: usize,
    /// The registers of the implied values: dimensions, task, parameters.
    pub(super) implied: Vec<Reg>,
}

impl Code {
    /// Checks a kernel and makes it ready.
    /// # Errors
    /// [`EvalError::Invalid`] with every invariant that the kernel breaks.
    pub fn new(kernel: &Kernel) -> Result<Self, EvalError> {
        crate::kernel::verify::verify_kernel(kernel).map_err(EvalError::Invalid)?;
        let mut maker = Maker::new(kernel);
        let body = maker.top(&kernel.body);
        let tail = kernel.tail.as_ref().map(|tail| maker.top(tail));
        let [narrow, wide, pointers] = maker.sizes();
        let implied = maker.implied();
        Ok(Self { kernel: kernel.clone(), body, tail, narrow, wide, pointers, implied })
    }

    /// The kernel.
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// The statement of this number in the order of the text.
    pub(super) fn statement(&self, number: u32) -> String {
        fn find<'k>(region: &'k Region, left: &mut u32) -> Option<&'k Stmt> {
            for s in &region.stmts {
                if *left == 0 {
                    return Some(s);
                }
                *left -= 1;
                if let Some(found) = s.regions.iter().find_map(|r| find(r, left)) {
                    return Some(found);
                }
            }
            None
        }
        let mut left = number;
        let regions = self.kernel.regions();
        let found = regions.into_iter().find_map(|r| find(r, &mut left));
        found.map_or_else(String::new, |s| crate::kernel::print::statement_in(&self.kernel, s))
    }
}
