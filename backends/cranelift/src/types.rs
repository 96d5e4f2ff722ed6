//! Kernel types as Cranelift types.
//!
//! A vector of 2 lanes lives in the lower half of a 128-bit register; its upper half is never looked at. A mask has one 32-bit lane of all
//! ones or all zeros for each `bool`; a scalar `bool` is a byte, 0 or 1. Two-byte floats are only moved, so they are integers here.

use cranelift::prelude::Type;
use cranelift::prelude::types::{F32, F32X4, I8, I8X16, I16, I16X8, I32, I32X4, I64, I64X2};
use nextc_ir::DType;
use nextc_ir::kernel::KType;

/// The register type of a kernel type, if it has one.
pub const fn machine_type(ty: KType) -> Option<Type> {
    let KType::Value { dtype, lanes } = ty else { return Some(I64) };
    Some(match (dtype, lanes) {
        (DType::F32, 1) => F32,
        (DType::I64, 1) => I64,
        (DType::I32, 1) => I32,
        (DType::F16 | DType::BF16, 1) => I16,
        (DType::U8 | DType::Bool, 1) => I8,
        (DType::F32, 2 | 4) => F32X4,
        (DType::I32 | DType::Bool, 2 | 4) => I32X4,
        (DType::I64, 2) => I64X2,
        (DType::F16 | DType::BF16, 4 | 8) => I16X8,
        (DType::U8, 8 | 16) => I8X16,
        _ => return None,
    })
}
