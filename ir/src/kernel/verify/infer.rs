//! The types of ops: what operands each takes, and what comes out.

use super::Broken;
use crate::dtype::DType;
use crate::kernel::op::Sig;
use crate::kernel::{KOp, KType, Space};

/// The type of the result of an op without regions, from its operands' types; `None` for a store.
///
/// The parser types what it reads with this, the verifier compares.
/// # Errors
/// What is wrong with the operands or the op's constants.
pub fn infer(op: KOp, args: &[KType]) -> Result<Option<KType>, Broken> {
    let (i64_scalar, i32_scalar) = (KType::scalar(DType::I64), KType::scalar(DType::I32));
    let like_first = |want: &str, ok: bool| if ok { Ok(Some(args[0])) } else { Err(operand(args, 0, want)) };
    count("operands", args.len(), arity(op))?;
    Ok(match op {
        KOp::Const { dtype, bits } => Some(constant(dtype, bits)?),
        KOp::Alloc { dtype, elems } => {
            in_memory(dtype)?;
            range("elements", elems, (1..=1 << 40).contains(&elems), "1 to 2^40")?;
            Some(KType::Ptr(Space::Scratch))
        }
        KOp::Splat { lanes } => {
            range("lanes", lanes.into(), lanes > 1 && lanes_exist(lanes), "2, 4, 8 or 16")?;
            let dtype = element(args, 0, 1)?;
            Some(KType::vector(dtype, lanes))
        }
        KOp::Extract { lane } => {
            let dtype = value(args, 0)?;
            range("lane", lane.into(), lane < args[0].lanes(), "less than the lanes")?;
            Some(KType::scalar(dtype))
        }
        KOp::Add | KOp::Sub | KOp::Mul | KOp::Shl | KOp::Ushr | KOp::Sshr => {
            same(args, 1)?;
            like_first("i32 or i64", is_int(args[0]))?
        }
        KOp::Div | KOp::Rem => {
            same(args, 1)?;
            like_first("an i32 or i64 scalar", is_int(args[0]) && args[0].lanes() == 1)?
        }
        KOp::And | KOp::Or | KOp::Xor => {
            same(args, 1)?;
            like_first("i32, i64 or bool", is_int(args[0]) || args[0].dtype() == Some(DType::Bool))?
        }
        KOp::Fadd | KOp::Fsub | KOp::Fmul | KOp::Fdiv | KOp::Fmin | KOp::Fmax | KOp::Fma => {
            (1..args.len()).try_for_each(|i| same(args, i))?;
            like_first("f32", is(args[0], DType::F32))?
        }
        KOp::ShortDot => {
            (1..args.len()).try_for_each(|i| same(args, i))?;
            like_first("i32 in 4, 8 or 16 lanes", is(args[0], DType::I32) && args[0].lanes() >= 4)?
        }
        KOp::Fneg | KOp::Fabs | KOp::Fsqrt | KOp::Fround => like_first("f32", is(args[0], DType::F32))?,
        KOp::Cmp { .. } => {
            same(args, 1)?;
            like_first("f32, i32 or i64", is_int(args[0]) || is(args[0], DType::F32))?;
            Some(KType::vector(DType::Bool, args[0].lanes()))
        }
        KOp::Select => {
            if args[1] != args[2] {
                return Err(operand(args, 2, &args[1].to_string()));
            }
            let lanes = args[0].lanes();
            if !is(args[0], DType::Bool) || (lanes != 1 && lanes != args[1].lanes()) {
                return Err(operand(args, 0, "bool of the same lanes, or one"));
            }
            Some(args[1])
        }
        KOp::ToFloat => Some(convert(args, DType::I32, DType::F32)?),
        KOp::ToInt => Some(convert(args, DType::F32, DType::I32)?),
        KOp::Widen => Some(convert(args, DType::I32, DType::I64)?),
        KOp::Narrow => Some(convert(args, DType::I64, DType::I32)?),
        KOp::Bitcast { dtype } => {
            in_memory(dtype)?;
            let from = value(args, 0)?;
            if from == DType::Bool || from.bytes() != dtype.bytes() {
                return Err(operand(args, 0, &format!("as wide as {dtype}")));
            }
            Some(KType::vector(dtype, args[0].lanes()))
        }
        KOp::ReduceAdd | KOp::ReduceMax => {
            like_first("an f32 vector", is(args[0], DType::F32) && args[0].lanes() > 1)?;
            Some(KType::scalar(DType::F32))
        }
        KOp::Load { dtype, lanes } => {
            pointer(args, 0)?;
            exact(args, 1, i64_scalar)?;
            in_memory(dtype)?;
            range("lanes", lanes.into(), lanes_exist(lanes), "1, 2, 4, 8 or 16")?;
            Some(KType::vector(dtype, lanes))
        }
        KOp::Store => {
            pointer(args, 0)?;
            exact(args, 1, i64_scalar)?;
            if value(args, 2)? == DType::Bool {
                return Err(operand(args, 2, "f32, i32 or i64"));
            }
            None
        }
        KOp::Offset => {
            pointer(args, 0)?;
            exact(args, 1, i64_scalar)?;
            Some(args[0])
        }
        KOp::Team | KOp::Thread => Some(i64_scalar),
        KOp::Shared { dtype, elems } => {
            in_memory(dtype)?;
            range("elements", elems, (1..=1 << 18).contains(&elems), "1 to 2^18")?;
            Some(KType::Ptr(Space::Shared))
        }
        KOp::Partials { dtype, elems } => {
            in_memory(dtype)?;
            range("elements", elems, (1..=1 << 24).contains(&elems), "1 to 2^24")?;
            Some(KType::Ptr(Space::Scratch))
        }
        KOp::Barrier | KOp::Wait | KOp::Release => None,
        KOp::ShuffleXor { mask } => {
            range("mask", mask.into(), (1..32).contains(&mask), "1 to 31")?;
            like_first("an f32 or i32 scalar", is_lane(args[0]))?
        }
        KOp::Quad => {
            (1..4).try_for_each(|i| same(args, i))?;
            like_first("an f32 or i32 scalar", is_lane(args[0]))?;
            args[0].dtype().map(|dtype| KType::vector(dtype, 4))
        }
        KOp::WarpMax | KOp::WarpMin => {
            exact(args, 0, i32_scalar)?;
            Some(i32_scalar)
        }
        KOp::AtomicAdd => {
            exact(args, 0, KType::Ptr(Space::Global))?;
            exact(args, 1, i64_scalar)?;
            exact(args, 2, i32_scalar)?;
            Some(i32_scalar)
        }
        KOp::Pack { dtype } => {
            half(dtype)?;
            (0..2).try_for_each(|i| exact(args, i, KType::scalar(DType::F32)))?;
            Some(i32_scalar)
        }
        KOp::HalfFma { dtype } => {
            half(dtype)?;
            (0..3).try_for_each(|i| exact(args, i, i32_scalar))?;
            Some(i32_scalar)
        }
        KOp::HalfToFloat => {
            exact(args, 0, i32_scalar)?;
            Some(KType::scalar(DType::F32))
        }
        KOp::Fp8ToF16 => {
            exact(args, 0, i32_scalar)?;
            Some(i32_scalar)
        }
        KOp::Mma { dtype } => {
            half(dtype)?;
            (0..6).try_for_each(|i| exact(args, i, i32_scalar))?;
            exact(args, 6, KType::vector(DType::F32, 4))?;
            Some(args[6])
        }
        KOp::MmaGroup { dtype, steps, groups } => {
            half(dtype)?;
            range("steps", steps.into(), (1..=4).contains(&steps), "1 to 4")?;
            range("groups", groups.into(), (1..=MOST_GROUPS).contains(&groups), "1 to 32")?;
            exact(args, 0, KType::Ptr(Space::Shared))?;
            exact(args, 1, i64_scalar)?;
            (2..args.len()).try_for_each(|i| exact(args, i, i32_scalar))?;
            Some(KType::vector(DType::F32, 4 * groups))
        }
        KOp::CopyAsync => {
            exact(args, 0, KType::Ptr(Space::Shared))?;
            pointer(args, 2)?;
            [1, 3].into_iter().try_for_each(|i| exact(args, i, i64_scalar))?;
            None
        }
        KOp::CopyCommit | KOp::CopyWait { .. } => None,
        KOp::Prefetch => {
            exact(args, 0, KType::Ptr(Space::Global))?;
            (1..3).try_for_each(|i| exact(args, i, i64_scalar))?;
            None
        }
        KOp::Nibble { shift } => {
            range("shift", shift.into(), shift <= 28, "0 to 28")?;
            exact(args, 0, KType::vector(DType::I32, 16))?;
            Some(KType::vector(DType::F32, 16))
        }
        KOp::Bf16Row | KOp::Bf16Pairs => {
            (0..2).try_for_each(|i| exact(args, i, KType::vector(DType::F32, 16)))?;
            Some(KType::vector(DType::I32, 16))
        }
        KOp::ByteRow | KOp::ByteDot => {
            (0..args.len()).try_for_each(|i| exact(args, i, KType::vector(DType::I32, 16)))?;
            Some(KType::vector(DType::I32, 16))
        }
        KOp::PairDot => {
            exact(args, 0, KType::vector(DType::F32, 16))?;
            (1..3).try_for_each(|i| exact(args, i, KType::vector(DType::I32, 16)))?;
            Some(args[0])
        }
        KOp::TileZero => None,
        KOp::TileTurn => {
            (0..2).try_for_each(|i| pointer(args, i))?;
            None
        }
        KOp::TileStep { rows, columns, .. } | KOp::TileStore { rows, columns } | KOp::TileLoad { rows, columns } => {
            range("rows", rows.into(), (1..=2).contains(&rows), "1 or 2")?;
            range("columns", columns.into(), (1..=2).contains(&columns), "1 or 2")?;
            (0..args.len()).try_for_each(|i| pointer(args, i))?;
            None
        }
        // checked with their regions
        KOp::For | KOp::If => None,
    })
}

/// How many operands an op has (for a loop: at least).
const fn arity(op: KOp) -> usize {
    match op {
        KOp::Splat { .. } | KOp::Extract { .. } | KOp::If => 1,
        KOp::ShuffleXor { .. }
        | KOp::WarpMax
        | KOp::WarpMin
        | KOp::HalfToFloat
        | KOp::Fp8ToF16
        | KOp::Nibble { .. } => 1,
        KOp::Load { .. } | KOp::Offset | KOp::Pack { .. } => 2,
        KOp::Store | KOp::For | KOp::AtomicAdd | KOp::HalfFma { .. } | KOp::Prefetch => 3,
        KOp::ByteDot | KOp::PairDot => 3,
        KOp::Quad | KOp::ByteRow | KOp::CopyAsync => 4,
        KOp::MmaGroup { steps, .. } => 2 + 4 * steps as usize,
        KOp::Mma { .. } => 7,
        KOp::TileStep { rows, columns, .. } => (rows + columns) as usize,
        KOp::TileStore { .. } | KOp::TileLoad { .. } => 1,
        KOp::Bf16Row | KOp::Bf16Pairs | KOp::TileTurn => 2,
        _ => match op.sig() {
            Sig::Leaf | Sig::Special | Sig::Block | Sig::Tile => 0,
            Sig::Unary | Sig::FloatUnary | Sig::Convert | Sig::Reduce => 1,
            Sig::IntBinary | Sig::FloatBinary | Sig::Compare => 2,
            Sig::FloatTernary | Sig::IntTernary | Sig::Select => 3,
        },
    }
}

pub(super) fn count(of: &'static str, found: usize, expected: usize) -> Result<(), Broken> {
    if found == expected { Ok(()) } else { Err(Broken::Count { of, found, expected }) }
}

fn range(what: &'static str, found: u64, ok: bool, expected: &'static str) -> Result<(), Broken> {
    if ok { Ok(()) } else { Err(Broken::Constant { what, found: found as i64, expected }) }
}

fn constant(dtype: DType, bits: i64) -> Result<KType, Broken> {
    let fits = match dtype {
        DType::I64 => true,
        DType::I32 => i32::try_from(bits).is_ok(),
        DType::F32 => u32::try_from(bits).is_ok(),
        DType::Bool => (0..=1).contains(&bits),
        DType::F16 | DType::BF16 | DType::U8 => false,
    };
    let ty = KType::scalar(dtype);
    if fits { Ok(ty) } else { Err(Broken::Constant { what: "bits", found: bits, expected: "of the constant's type" }) }
}

fn operand(args: &[KType], index: usize, expected: &str) -> Broken {
    Broken::Operand { index, found: args[index].to_string(), expected: expected.to_owned() }
}

pub(super) fn exact(args: &[KType], i: usize, want: KType) -> Result<(), Broken> {
    if args[i] == want { Ok(()) } else { Err(operand(args, i, &want.to_string())) }
}

fn same(args: &[KType], i: usize) -> Result<(), Broken> {
    exact(args, i, args[0])
}

fn value(args: &[KType], i: usize) -> Result<DType, Broken> {
    args[i].dtype().ok_or_else(|| operand(args, i, "a number"))
}

fn element(args: &[KType], i: usize, lanes: u32) -> Result<DType, Broken> {
    if args[i].lanes() != lanes {
        return Err(operand(args, i, "a scalar"));
    }
    value(args, i)
}

fn convert(args: &[KType], from: DType, to: DType) -> Result<KType, Broken> {
    if !is(args[0], from) {
        return Err(operand(args, 0, from.name()));
    }
    Ok(KType::vector(to, args[0].lanes()))
}

fn pointer(args: &[KType], i: usize) -> Result<(), Broken> {
    if matches!(args[i], KType::Ptr(_)) { Ok(()) } else { Err(operand(args, i, "a pointer")) }
}

fn in_memory(dtype: DType) -> Result<(), Broken> {
    let ok = matches!(dtype, DType::F32 | DType::I32 | DType::I64);
    if ok {
        return Ok(());
    }
    let expected = "f32, i32 or i64".to_owned();
    Err(Broken::Operand { index: 0, found: dtype.name().to_owned(), expected })
}

fn half(dtype: DType) -> Result<(), Broken> {
    if matches!(dtype, DType::F16 | DType::BF16) {
        return Ok(());
    }
    let expected = "f16 or bf16".to_owned();
    Err(Broken::Operand { index: 0, found: dtype.name().to_owned(), expected })
}

/// True for what a register of 32 bits holds.
fn is_lane(ty: KType) -> bool {
    ty.lanes() == 1 && (is(ty, DType::F32) || is(ty, DType::I32))
}

fn is(ty: KType, dtype: DType) -> bool {
    ty.dtype() == Some(dtype)
}

fn is_int(ty: KType) -> bool {
    is(ty, DType::I32) || is(ty, DType::I64)
}

/// Most groups of eight tokens of a product by groups of warps.
pub(super) const MOST_GROUPS: u32 = 32;

pub(super) const fn lanes_exist(lanes: u32) -> bool {
    matches!(lanes, 1 | 2 | 4 | 8 | 16)
}
