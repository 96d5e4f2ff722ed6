//! The op table of the kernel IR. Printer, parser, verifier, interpreter, legalisation and both emitters `match` on it
//! without a wildcard, so that a new op is a compile error wherever it wants thought.
//!
//! Ops of class [`Sig::Block`] exist in kernels whose tasks are blocks of threads: code for GPUs; `prefetch` in all kernels. Those of class [`Sig::Tile`] exist in
//! kernels for CPUs with 512-bit vectors, or with a matrix unit ([`crate::Target::bulk_tile`]).

use crate::dtype::DType;

/// A comparison. Integers compare signed; floats compare ordered (false if either is NaN), `Ne` is unordered-or-unequal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pred {
    /// Equal.
    Eq,
    /// Not equal.
    Ne,
    /// Less.
    Lt,
    /// Less or equal.
    Le,
    /// Greater.
    Gt,
    /// Greater or equal.
    Ge,
}

impl Pred {
    /// Every comparison.
    pub const ALL: [Self; 6] = [Self::Eq, Self::Ne, Self::Lt, Self::Le, Self::Gt, Self::Ge];

    /// The name in IR text.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Eq => "eq",
            Self::Ne => "ne",
            Self::Lt => "lt",
            Self::Le => "le",
            Self::Gt => "gt",
            Self::Ge => "ge",
        }
    }
}

/// How many operands of which type, and what comes out: the signature classes that the verifier checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sig {
    /// `() -> given type`: constants and allocations.
    Leaf,
    /// `(a) -> a`, any value type.
    Unary,
    /// `(a, a) -> a`, integers.
    IntBinary,
    /// `(a) -> a`, f32.
    FloatUnary,
    /// `(a, a) -> a`, f32.
    FloatBinary,
    /// `(a, a, a) -> a`, f32.
    FloatTernary,
    /// `(a, a, a) -> a`, vectors of i32.
    IntTernary,
    /// `(a, a) -> bool` of the same lanes.
    Compare,
    /// `(bool, a, a) -> a`; condition of the same lanes, or one for all.
    Select,
    /// A change of type; the row's result type says to what.
    Convert,
    /// A vector to a scalar of its element type.
    Reduce,
    /// Memory and control: checked op by op.
    Special,
    /// What only a block of threads can do: checked op by op.
    Block,
    /// What only a CPU with 512-bit vectors or a matrix unit can do: checked op by op.
    Tile,
}

macro_rules! kops {
    ($( $(#[doc = $doc:literal])* $op:ident $({ $($field:ident : $fty:ty),* })? = $name:literal $sig:ident; )*) => {
        /// An op of the kernel IR, with the constants that are part of it.
        #[derive(Clone, Copy, Debug, PartialEq)]
        pub enum KOp { $( $(#[doc = $doc])* $op $({ $(#[doc = "See the op."] $field: $fty),* })?, )* }

        impl KOp {
            /// The op's name in IR text.
            pub const fn name(&self) -> &'static str {
                match self { $( KOp::$op $({ $($field: _),* })? => $name, )* }
            }

            /// Its signature class.
            pub const fn sig(&self) -> Sig {
                match self { $( KOp::$op $({ $($field: _),* })? => Sig::$sig, )* }
            }

            /// Names, signature classes and docs of all ops, for `nextc ops --kernel`.
            pub const TABLE: &'static [(&'static str, Sig, &'static str)] = &[ $( ($name, Sig::$sig, concat!($($doc, "\n",)*)), )* ];
        }
    };
}

kops! {
    /// A scalar constant. `bits` is the integer, or the bits of the `f32`.
    Const { dtype: DType, bits: i64 } = "const" Leaf;
    /// How many threads share the tasks, an i64; on a CPU only. It says how work is best cut, and results do not depend on it.
    Team = "team" Leaf;
    /// `elems` elements of scratch, 64-byte aligned; only at the top level of a region, never in a loop.
    Alloc { dtype: DType, elems: u64 } = "alloc" Leaf;
    /// A scalar in every lane.
    Splat { lanes: u32 } = "splat" Special;
    /// One lane of a vector.
    Extract { lane: u32 } = "extract" Special;

    /// Wrapping integer sum.
    Add = "add" IntBinary;
    /// Wrapping integer difference.
    Sub = "sub" IntBinary;
    /// Wrapping integer product.
    Mul = "mul" IntBinary;
    /// Signed quotient, rounded to zero; the divisor is not 0. Scalars only.
    Div = "div" IntBinary;
    /// Signed remainder of `div`. Scalars only.
    Rem = "rem" IntBinary;
    /// Bitwise and.
    And = "and" IntBinary;
    /// Bitwise or.
    Or = "or" IntBinary;
    /// Bitwise exclusive or.
    Xor = "xor" IntBinary;
    /// Shift left; the amount is less than the width.
    Shl = "shl" IntBinary;
    /// Logical shift right.
    Ushr = "ushr" IntBinary;
    /// Arithmetic shift right.
    Sshr = "sshr" IntBinary;

    /// `a + b`, IEEE.
    Fadd = "fadd" FloatBinary;
    /// `a - b`.
    Fsub = "fsub" FloatBinary;
    /// `a * b`.
    Fmul = "fmul" FloatBinary;
    /// `a / b`.
    Fdiv = "fdiv" FloatBinary;
    /// The smaller: `a < b ? a : b` (so `b` if either is NaN).
    Fmin = "fmin" FloatBinary;
    /// The larger: `a > b ? a : b` (so `b` if either is NaN).
    Fmax = "fmax" FloatBinary;
    /// `a * b + c` with one rounding.
    Fma = "fma" FloatTernary;
    /// In each lane `sum + a[0]·b[0] + a[1]·b[1]`, where `a` and `b` are two signed numbers of 16 bits each, the first in the lower half: `(sum, a, b)`. What does
    /// not fit 32 bits wraps. Source: Intel's Software Developer's Manual, PMADDWD.
    ShortDot = "short_dot" IntTernary;
    /// `-x`.
    Fneg = "fneg" FloatUnary;
    /// `|x|`.
    Fabs = "fabs" FloatUnary;
    /// `sqrt(x)`, correctly rounded.
    Fsqrt = "fsqrt" FloatUnary;
    /// Nearest integer, ties to even.
    Fround = "fround" FloatUnary;

    /// Compares two integers or two floats.
    Cmp { pred: Pred } = "cmp" Compare;
    /// `condition ? a : b`, lane by lane or all at once.
    Select = "select" Select;

    /// i32 to f32, rounded to nearest.
    ToFloat = "to_float" Convert;
    /// f32 to i32, rounded to zero; the number is in range.
    ToInt = "to_int" Convert;
    /// i32 to i64, sign extended.
    Widen = "widen" Convert;
    /// i64 to i32, the lower half.
    Narrow = "narrow" Convert;
    /// The same bits as another type of the same width, lane by lane (i32 and f32).
    Bitcast { dtype: DType } = "bitcast" Convert;

    /// Sum of all lanes as a fixed tree: lane `i` with lane `i + n/2`, then the same on the halves.
    ReduceAdd = "reduce_add" Reduce;
    /// Largest lane, by the same tree of `fmax`.
    ReduceMax = "reduce_max" Reduce;

    /// `lanes` neighbouring elements from element `index` (i64) of a pointer: `(ptr, index)`. Needs no alignment beyond an element's.
    Load { dtype: DType, lanes: u32 } = "load" Special;
    /// Stores a value at element `index` of a pointer: `(ptr, index, value)`.
    Store = "store" Special;
    /// A pointer `bytes` (i64) further: `(ptr, bytes)`.
    Offset = "offset" Special;

    /// `for i in (lo .. hi).step_by(step)` with carried values: `(lo, hi, step, init...)`; `step` is positive. The region's parameters are `i` and
    /// the carried values; it yields their next values; the results are the last ones.
    For = "for" Special;
    /// Two regions, of which one runs: `(condition)`; the results are what it yields.
    If = "if" Special;
    /// Memory in which tasks of the body hand to the tail what they found: `elems` elements for each task, one task's after another's, undefined when the body
    /// begins. 128-byte aligned as a whole; only at the top level of a region, the same in body and tail. On a GPU only blocks of threads have it.
    Partials { dtype: DType, elems: u64 } = "partials" Special;

    // ---- a block of threads: 32 neighbouring ones are a warp
    /// The thread's number in its block, an i64.
    Thread = "thread" Block;
    /// `elems` elements that the threads of a block share, 128-byte aligned, undefined when the block begins; only at the top level of a region.
    Shared { dtype: DType, elems: u64 } = "shared" Block;
    /// Waits until every thread of the block is here; what was written before is seen by all after.
    Barrier = "barrier" Block;
    /// Four 32-bit scalars of one type as the lanes of a vector.
    Quad = "quad" Block;
    /// The 32-bit scalar that the thread `lane ^ mask` of the warp has. Every thread of the warp is here.
    ShuffleXor { mask: u32 } = "shuffle_xor" Block;
    /// The largest i32 of the warp's threads, in all of them. Every thread of the warp is here.
    WarpMax = "warp_max" Block;
    /// The smallest.
    WarpMin = "warp_min" Block;
    /// Adds to an i32 in global memory and gives what was there before: `(ptr, index, x)`. Acquires and releases, for the whole device.
    AtomicAdd = "atomic_add" Block;
    /// Two f32 rounded to nearest even as one i32 of two 16-bit floats, the first in the lower half; a number too large becomes the largest finite one in f16.
    Pack { dtype: DType } = "pack" Block;
    /// `a * b + c` with one rounding on both 16-bit floats of i32s.
    HalfFma { dtype: DType } = "half_fma" Block;
    /// The f16 in the lower half of an i32 as f32.
    HalfToFloat = "half_to_float" Block;
    /// Two FP8 numbers (e4m3) in the lower half of an i32 as two f16; exact.
    Fp8ToF16 = "fp8_to_f16" Block;
    /// `C + A·B` by a warp, `mma.m16n8k16` of the PTX ISA: `(a0, a1, a2, a3, b0, b1, c)`. A is 16 rows by 16 columns of 16-bit floats, B 16 by 8, C 16 by 8 of f32
    /// (`f32x4`), in the fragments that the manual draws (section 9.7.14.5.8). Every thread of the warp is here.
    Mma { dtype: DType } = "mma" Block;
    /// `A·B` by four neighbouring warps of which the first has a number that is a multiple of 4, `wgmma` of the PTX ISA (section 9.7.15): `(b, index, a...)`. Warp `w` has rows
    /// `16w ..` of A as [`KOp::Mma`] wants them, four words for each of `steps` steps of 16 columns. B is 8 · `groups` tokens in shared memory, in an array of
    /// [`Kernel::SWIZZLED_BYTES`](super::Kernel::SWIZZLED_BYTES) at least, from i32 element `index` on: a token has a line of 128 bytes, and the sixteen bytes that would be
    /// piece `p` of line `n` are piece `p ^ (n % 8)`. `index` is where a line of number `8 · i` has its first step, before that exchange; the others follow.
    /// The result is what `groups` products of [`KOp::Mma`] would be, step by step from zeros, four numbers each. All four warps are here.
    MmaGroup { dtype: DType, steps: u32, groups: u32 } = "mma_group" Block;
    /// Copies 16 bytes, four i32 elements, from global to shared memory while the thread goes on: `(to, at, from, at)`.
    CopyAsync = "copy_async" Block;
    /// Ends a group of the thread's copies. Every thread of the block is here.
    CopyCommit = "copy_commit" Block;
    /// Waits until at most `left` of the thread's groups of copies are under way, the youngest. Others see what came after the next barrier. Every thread of the block is here.
    CopyWait { left: u32 } = "copy_wait" Block;
    /// Asks for `bytes` bytes from byte `at` of a pointer to global memory to be brought near, both multiples of 16: `(ptr, at, bytes)`. Changes nothing.
    Prefetch = "prefetch" Block;
    /// Waits until the launches before this one are done and what they wrote is seen. Every thread of the block is here; before it a kernel
    /// reads only weights, inputs of the step, and states that no launch before it has written: the last step that did is done, since a program begins after all before it.
    /// And what launches wrote that came before the last one, if that one has waited before it let this one begin.
    Wait = "wait" Block;
    /// Lets the next launch begin, as far as it need not wait. Every thread of the block is here.
    Release = "release" Block;

    // ---- a CPU's widest vectors and its matrix unit
    /// In each of 16 lanes the number of four bits of an i32, from bit `shift` on, less 8: `(words) -> f32x16`. One look into a table of 16 lanes.
    Nibble { shift: u32 } = "nibble" Tile;
    /// Two vectors of 16 f32 as 32 bf16 that follow one another: `(first, second) -> i32x16`. Rounded to nearest even; what is smaller than the least
    /// normal number counts as zero (VCVTNE2PS2BF16).
    Bf16Row = "bf16_row" Tile;
    /// Two vectors of 16 f32 as 16 pairs of bf16, a pair a lane, the first in the lower half: `(first, second) -> i32x16`. Rounded as `bf16_row` does.
    Bf16Pairs = "bf16_pairs" Tile;
    /// The lowest bytes of four vectors of 16 i32 as 64 bytes that follow one another: `(first, second, third, fourth) -> i32x16`.
    ByteRow = "byte_row" Tile;
    /// In each of 16 lanes `sum + Σ a[i]·b[i]` over the four bytes of an i32, unsigned ones of `a` and signed ones of `b`: `(sum, a, b) -> i32x16`. What does not fit
    /// 32 bits wraps. Source: Intel's Software Developer's Manual, VPDPBUSD.
    ByteDot = "byte_dot" Tile;
    /// In each of 16 lanes `(sum + a[1]·b[1]) + a[0]·b[0]` over the two bf16 of an i32, the first in the lower half, by fused multiply-adds: `(sum, a, b) -> f32x16`. Numbers
    /// smaller than the least normal one count as zero, as operands and as results. Source: Intel's Software Developer's Manual, VDPBF16PS.
    PairDot = "pair_dot" Tile;
    /// Sets the sums of tiles of the task to zeros. There are four, 16 by 16 f32 each, which nothing else changes.
    TileZero = "tile_zero" Tile;
    /// Adds products of tiles to the sums, `sum[i · columns + j] += A[i]·B[j]` for `rows` times `columns` of them: `(a..., b...)`. Each pointer leads to a tile of
    /// 1 KiB, 16 lines of 64 bytes. A line of an A is 32 numbers of a row, a line of a B one pair of numbers of each of 16 columns; all are bf16.
    ///
    /// `even += a[2p]·b[2p]` and `odd += a[2p+1]·b[2p+1]` by fused multiply-adds over the pairs `p` in order, from zeros; then `sum += even + odd`. Numbers
    /// smaller than the least normal one count as zero, as operands and as results. Source: Intel's Software Developer's Manual, TDPBF16PS.
    ///
    /// `once` says that the tiles of A should leave what is in the first cache there (TILELOADDT1).
    TileStep { rows: u32, columns: u32, once: bool } = "tile_step" Tile;
    /// Writes a tile with lines and words exchanged, `to[i][j] = from[j][i]`: `(to, from)`. What were rows of an A are columns of a B.
    TileTurn = "tile_turn" Tile;
    /// Writes `rows` times `columns` sums as a matrix of `16 · rows` by `16 · columns` f32, row by row: `(c)`.
    TileStore { rows: u32, columns: u32 } = "tile_store" Tile;
    /// Sets `rows` times `columns` sums to what [`KOp::TileStore`] wrote: `(c)`.
    TileLoad { rows: u32, columns: u32 } = "tile_load" Tile;
}
