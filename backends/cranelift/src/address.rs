//! Sums of addresses: integers and pointers as one term for each depth of loops, plus a constant.
//!
//! Cranelift moves what does not change out of a loop, but does not reassociate. So sums are kept apart by the depth at which their terms are
//! computed, and put together from the outside in: what is added in the innermost loop is only what changes there, and
//! constants become the displacement of the load or store. All arithmetic wraps, so this is exact.

use cranelift::prelude::{FunctionBuilder, InstBuilder, Value, types::I64};

/// A wrapping sum of 64-bit terms.
#[derive(Clone, Debug, Default)]
pub struct Sum {
    /// Depth and value of each term, outermost first, at most one a depth.
    terms: Vec<(u32, Value)>,
    constant: i64,
}

impl Sum {
    /// A constant.
    pub const fn constant(constant: i64) -> Self {
        Self { terms: Vec::new(), constant }
    }

    /// One value that is computed at a depth.
    pub fn term(depth: u32, value: Value) -> Self {
        Self { terms: vec![(depth, value)], constant: 0 }
    }

    /// The number, if it is a constant.
    pub const fn as_constant(&self) -> Option<i64> {
        if self.terms.is_empty() { Some(self.constant) } else { None }
    }

    /// The depth of its innermost term.
    pub fn depth(&self) -> u32 {
        self.terms.last().map_or(0, |t| t.0)
    }

    /// `self + other`.
    pub fn add(&self, fb: &mut FunctionBuilder<'_>, other: &Self) -> Self {
        let mut terms = self.terms.clone();
        for &(depth, value) in &other.terms {
            match terms.binary_search_by_key(&depth, |t| t.0) {
                Ok(i) => terms[i].1 = fb.ins().iadd(terms[i].1, value),
                Err(i) => terms.insert(i, (depth, value)),
            }
        }
        Self { terms, constant: self.constant.wrapping_add(other.constant) }
    }

    /// `self * factor`; powers of two become shifts, which x86 addressing can hold.
    pub fn scale(&self, fb: &mut FunctionBuilder<'_>, factor: i64) -> Self {
        if factor == 0 {
            return Self::constant(0);
        }
        let terms = self.terms.iter().map(|&(depth, value)| (depth, scaled(fb, value, factor))).collect();
        Self { terms, constant: self.constant.wrapping_mul(factor) }
    }

    /// The sum in one register.
    pub fn value(&self, fb: &mut FunctionBuilder<'_>) -> Value {
        match self.variable(fb) {
            None => fb.ins().iconst(I64, self.constant),
            Some(value) if self.constant == 0 => value,
            Some(value) => fb.ins().iadd_imm_s(value, self.constant),
        }
    }

    /// The sum as a register and a displacement.
    pub fn base_and_offset(&self, fb: &mut FunctionBuilder<'_>) -> (Value, i32) {
        match (self.variable(fb), i32::try_from(self.constant)) {
            (Some(value), Ok(offset)) => (value, offset),
            _ => (self.value(fb), 0),
        }
    }

    fn variable(&self, fb: &mut FunctionBuilder<'_>) -> Option<Value> {
        let mut terms = self.terms.iter();
        let first = terms.next()?.1;
        Some(terms.fold(first, |sum, &(_, term)| fb.ins().iadd(sum, term)))
    }
}

fn scaled(fb: &mut FunctionBuilder<'_>, value: Value, factor: i64) -> Value {
    match factor {
        1 => value,
        f if f > 0 && f.count_ones() == 1 => fb.ins().ishl_imm_u(value, i64::from(f.trailing_zeros())),
        f => {
            let factor = fb.ins().iconst(I64, f);
            fb.ins().imul(value, factor)
        }
    }
}
