//! What Cranelift has no single op for: vector constants, lane moves, minima, selection by mask, trees of lanes.

use cranelift::codegen::ir::{ConstantData, Endianness};
use cranelift::prelude::types::{F32, F32X4, F64X2, I8X16, I16X8, I32, I32X4, I64X2};
use cranelift::prelude::{FloatCC, FunctionBuilder, InstBuilder, MemFlagsData, Type, Value};

/// The same bits as another type of the same width.
pub fn bitcast(fb: &mut FunctionBuilder<'_>, ty: Type, x: Value) -> Value {
    if fb.func.dfg.value_type(x) == ty {
        return x;
    }
    fb.ins().bitcast(ty, MemFlagsData::new().with_endianness(Endianness::Little), x)
}

/// A vector constant whose lanes all hold `bits`, of as many bytes as a lane has.
pub fn splat_constant(fb: &mut FunctionBuilder<'_>, ty: Type, bits: i64) -> Value {
    let lane = &bits.to_le_bytes()[..ty.lane_type().bytes() as usize];
    let data = ConstantData::from(lane.repeat(ty.lane_count() as usize));
    let constant = fb.func.dfg.constants.insert(data);
    fb.ins().vconst(ty, constant)
}

/// The 32-bit lanes of a vector in another order.
pub fn permute(fb: &mut FunctionBuilder<'_>, x: Value, lanes: [u8; 4]) -> Value {
    let ty = fb.func.dfg.value_type(x);
    let bytes: Vec<u8> = lanes.iter().flat_map(|lane| (0..4).map(move |byte| 4 * lane + byte)).collect();
    let mask = fb.func.dfg.immediates.push(ConstantData::from(bytes));
    let x = bitcast(fb, I8X16, x);
    let y = fb.ins().shuffle(x, x, mask);
    bitcast(fb, ty, y)
}

/// The sums of two products each of signed halves of lanes: what `pmaddwd` does, and how Cranelift finds it.
pub fn short_products(fb: &mut FunctionBuilder<'_>, a: Value, b: Value) -> Value {
    let [a, b] = [a, b].map(|x| bitcast(fb, I16X8, x));
    let [a_low, b_low] = [a, b].map(|x| fb.ins().swiden_low(x));
    let low = fb.ins().imul(a_low, b_low);
    let [a_high, b_high] = [a, b].map(|x| fb.ins().swiden_high(x));
    let high = fb.ins().imul(a_high, b_high);
    fb.ins().iadd_pairwise(low, high)
}

/// `a < b ? a : b`, `b` where either is NaN: what `minps` and `minss` do, and how Cranelift finds them.
pub fn fmin(fb: &mut FunctionBuilder<'_>, a: Value, b: Value) -> Value {
    choose(fb, (a, b), a, b)
}

/// `a > b ? a : b`, `b` where either is NaN.
pub fn fmax(fb: &mut FunctionBuilder<'_>, a: Value, b: Value) -> Value {
    choose(fb, (b, a), a, b)
}

/// `less.0 < less.1 ? a : b` of floats.
fn choose(fb: &mut FunctionBuilder<'_>, less: (Value, Value), a: Value, b: Value) -> Value {
    let condition = fb.ins().fcmp(FloatCC::LessThan, less.0, less.1);
    let ty = fb.func.dfg.value_type(a);
    if ty.is_vector() {
        let mask = bitcast(fb, ty, condition);
        fb.ins().bitselect(mask, a, b)
    } else {
        fb.ins().select(condition, a, b)
    }
}

/// `mask ? a : b`, lane by lane; the mask has 32-bit lanes, `a` and `b` have 32 or 64.
pub fn blend(fb: &mut FunctionBuilder<'_>, mask: Value, a: Value, b: Value) -> Value {
    let ty = fb.func.dfg.value_type(a);
    if ty == I64X2 {
        let mask = fb.ins().swiden_low(mask);
        return fb.ins().blendv(mask, a, b);
    }
    let (a, b) = (bitcast(fb, I32X4, a), bitcast(fb, I32X4, b));
    let chosen = fb.ins().blendv(mask, a, b);
    bitcast(fb, ty, chosen)
}

/// f32 to i32, rounded to zero; out of range is the smallest integer, as the instruction has it.
pub fn truncate(fb: &mut FunctionBuilder<'_>, x: Value) -> Value {
    if fb.func.dfg.value_type(x) == F32X4 {
        return fb.ins().x86_cvtt2dq(I32X4, x);
    }
    let vector = fb.ins().scalar_to_vector(F32X4, x);
    let truncated = fb.ins().x86_cvtt2dq(I32X4, vector);
    fb.ins().extractlane(truncated, 0)
}

/// All lanes by a tree of `join`: lane `i` with lane `i + n/2`, then the same on the halves.
pub fn reduce(
    fb: &mut FunctionBuilder<'_>,
    x: Value,
    lanes: u32,
    join: impl Fn(&mut FunctionBuilder<'_>, Value, Value) -> Value,
) -> Value {
    let half = if lanes == 4 {
        let upper = permute(fb, x, [2, 3, 2, 3]);
        join(fb, x, upper)
    } else {
        x
    };
    let (first, second) = (fb.ins().extractlane(half, 0), fb.ins().extractlane(half, 1));
    join(fb, first, second)
}

/// `shift(x, amount)` for each lane on its own.
pub fn shift_lanes(
    fb: &mut FunctionBuilder<'_>,
    (x, amounts): (Value, Value),
    shift: impl Fn(&mut FunctionBuilder<'_>, Value, Value) -> Value,
) -> Value {
    let lanes = fb.func.dfg.value_type(x).lane_count() as u8;
    (0..lanes).fold(x, |vector, lane| {
        let (one, amount) = (fb.ins().extractlane(x, lane), fb.ins().extractlane(amounts, lane));
        let shifted = shift(fb, one, amount);
        fb.ins().insertlane(vector, shifted, lane)
    })
}

/// The lower 64 bits as a scalar, and a scalar of 64 bits as a vector: how half registers meet memory.
pub fn lower_half(fb: &mut FunctionBuilder<'_>, x: Value) -> Value {
    let x = bitcast(fb, F64X2, x);
    fb.ins().extractlane(x, 0)
}

/// The inverse of [`lower_half`]; the upper half is undefined.
pub fn from_lower_half(fb: &mut FunctionBuilder<'_>, ty: Type, x: Value) -> Value {
    let x = fb.ins().scalar_to_vector(F64X2, x);
    bitcast(fb, ty, x)
}

/// A scalar truth value in every lane of a mask.
pub fn splat_mask(fb: &mut FunctionBuilder<'_>, x: Value) -> Value {
    let mask = fb.ins().bmask(I32, x);
    fb.ins().splat(I32X4, mask)
}

/// The sum of two lanes' worth of floats or integers.
pub fn add(fb: &mut FunctionBuilder<'_>, a: Value, b: Value) -> Value {
    if fb.func.dfg.value_type(a).lane_type() == F32 { fb.ins().fadd(a, b) } else { fb.ins().iadd(a, b) }
}
