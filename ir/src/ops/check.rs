//! What shape rules are written with: operands by name, and checks that say which operand does not fit and why.

use crate::attr::Attrs;
use crate::dtype::DType;
use crate::op::ShapeError;
use crate::shape::{Dim, Shape};
use crate::types::{StateKind, Type};

/// One operand of an op: its name in the table, and the type it has here.
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a> {
    name: &'static str,
    ty: &'a Type,
}

/// Pairs the operands' types with their names.
/// # Errors
/// [`ShapeError::Arity`] if there are not exactly as many types as names.
pub fn operands<'a, const N: usize>(
    names: [&'static str; N],
    types: &[&'a Type],
) -> Result<[Operand<'a>; N], ShapeError> {
    let types: [&'a Type; N] =
        types.try_into().map_err(|_| ShapeError::Arity { found: types.len(), expected: N.to_string() })?;
    Ok(std::array::from_fn(|i| Operand { name: names[i], ty: types[i] }))
}

impl<'a> Operand<'a> {
    /// The error that this operand should be `expected`.
    pub fn wrong(&self, expected: impl std::fmt::Display) -> ShapeError {
        ShapeError::Mismatch { operand: self.name, found: self.ty.to_string(), expected: expected.to_string() }
    }

    fn tensor(&self, dtype: DType) -> Option<&'a Shape> {
        self.ty.as_tensor().filter(|t| t.dtype == dtype).map(|t| &t.shape)
    }

    /// Its shape, if it is a tensor of f32.
    pub fn f32(&self) -> Result<&'a Shape, ShapeError> {
        self.tensor(DType::F32).ok_or_else(|| self.wrong("a tensor of f32"))
    }

    /// Its shape, if it is a tensor of i32.
    pub fn i32(&self) -> Result<&'a Shape, ShapeError> {
        self.tensor(DType::I32).ok_or_else(|| self.wrong("a tensor of i32"))
    }

    /// Its shape, if elementwise ops take it: a tensor of f32, or a weight.
    pub fn numbers(&self) -> Result<Shape, ShapeError> {
        let shape = if self.ty.as_weight().is_some() { self.ty.shape() } else { self.tensor(DType::F32).cloned() };
        shape.ok_or_else(|| self.wrong("a tensor of f32 or a weight"))
    }

    /// Rows of f32: the first dimension, and `N` constant ones after it.
    pub fn rows<const N: usize>(&self) -> Result<(Dim, [u64; N]), ShapeError> {
        let shape = self.f32()?;
        let inner = shape.inner().and_then(|d| <[u64; N]>::try_from(d).ok());
        match (shape.0.first(), inner) {
            (Some(&first), Some(inner)) => Ok((first, inner)),
            _ => Err(self.wrong(format!("f32 rows of {N} constant dimensions"))),
        }
    }

    /// The dimensions of a weight of rank `N`.
    pub fn weight<const N: usize>(&self) -> Result<[u64; N], ShapeError> {
        let dims = self.ty.as_weight().and_then(|w| <[u64; N]>::try_from(w.shape.as_slice()).ok());
        dims.ok_or_else(|| self.wrong(format!("a weight of {N} dimensions")))
    }

    /// The dimensions of a weight of any rank.
    pub fn any_weight(&self) -> Result<&'a [u64], ShapeError> {
        self.ty.as_weight().map(|w| w.shape.as_slice()).ok_or_else(|| self.wrong("a weight"))
    }

    /// Demands a weight of exactly `dims`.
    pub fn is_weight(&self, dims: &[u64]) -> Result<(), ShapeError> {
        match self.ty.as_weight() {
            Some(w) if w.shape == dims => Ok(()),
            _ => Err(self.wrong(format!("a weight of {}", Shape::new(dims.iter().copied())))),
        }
    }

    /// The dimensions of a vector known when compiling: a weight, or a tensor of f32 without symbols.
    pub fn vector(&self) -> Result<u64, ShapeError> {
        match self.numbers()?.0.as_slice() {
            [Dim::Const(n)] => Ok(*n),
            _ => Err(self.wrong("a weight of one dimension")),
        }
    }

    /// Demands a vector of `n` numbers known when compiling: a weight, or made from weights.
    pub fn is_vector(&self, n: u64) -> Result<(), ShapeError> {
        match self.vector() {
            Ok(found) if found == n => Ok(()),
            _ => Err(self.wrong(format!("a weight of {n}"))),
        }
    }

    /// Demands exactly this f32 shape.
    pub fn is_f32(&self, first: Dim, inner: &[u64]) -> Result<(), ShapeError> {
        self.is(&Type::f32(Shape::rows(first, inner)))
    }

    /// Demands exactly this i32 shape.
    pub fn is_i32(&self, first: Dim, inner: &[u64]) -> Result<(), ShapeError> {
        self.is(&Type::i32(Shape::rows(first, inner)))
    }

    /// Demands exactly this type.
    pub fn is(&self, ty: &Type) -> Result<(), ShapeError> {
        if self.ty == ty { Ok(()) } else { Err(self.wrong(ty)) }
    }

    /// Demands a state of `kind` with `dims`; gives its type, which the new version has too.
    pub fn is_state(&self, kind: StateKind, dims: &[u64]) -> Result<Type, ShapeError> {
        match self.ty.as_state() {
            Some(s) if s.kind == kind && s.dims == dims => Ok(self.ty.clone()),
            _ => Err(self.wrong(Type::state(kind, dims))),
        }
    }

    /// The dimensions of a state of `kind`, of which there are `N`.
    pub fn state<const N: usize>(&self, kind: StateKind) -> Result<[u64; N], ShapeError> {
        let state = self.ty.as_state().filter(|s| s.kind == kind);
        let dims = state.and_then(|s| <[u64; N]>::try_from(s.dims.as_slice()).ok());
        dims.ok_or_else(|| self.wrong(format!("a {} state of {N} dimensions", kind.name())))
    }

    /// Demands the sequences of a step.
    pub fn is_sequences(&self) -> Result<(), ShapeError> {
        self.is(&Type::Sequences)
    }

    /// The items of a bundle, each under this operand's name; at least one.
    pub fn bundle(&self) -> Result<Vec<Operand<'a>>, ShapeError> {
        match self.ty {
            Type::Bundle(items) if !items.is_empty() => {
                Ok(items.iter().map(|ty| Operand { name: self.name, ty }).collect())
            }
            _ => Err(self.wrong("a bundle of at least one value")),
        }
    }
}

/// The attribute `name`, a float.
/// # Errors
/// [`ShapeError::Attr`] if it is missing or no number.
pub fn float(attrs: &Attrs, name: &'static str) -> Result<f64, ShapeError> {
    attrs.float(name).ok_or(ShapeError::Attr { name, expected: "a number" })
}

/// The attribute `name`, a positive integer.
/// # Errors
/// [`ShapeError::Attr`] if it is missing or not positive.
pub fn positive(attrs: &Attrs, name: &'static str) -> Result<u64, ShapeError> {
    let value = attrs.int(name).and_then(|v| u64::try_from(v).ok()).filter(|&v| v > 0);
    value.ok_or(ShapeError::Attr { name, expected: "a positive integer" })
}

/// The attribute `name`, 0 or 1.
/// # Errors
/// [`ShapeError::Attr`] if it is missing or neither.
pub fn flag(attrs: &Attrs, name: &'static str) -> Result<bool, ShapeError> {
    match attrs.int(name) {
        Some(0) => Ok(false),
        Some(1) => Ok(true),
        _ => Err(ShapeError::Attr { name, expected: "0 or 1" }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::Sym;

    #[test]
    fn an_error_names_the_operand_what_it_is_and_what_fits() {
        let ty = Type::f32(Shape::rows(Sym::T, &[16]));
        let [x] = operands(["x"], &[&ty]).unwrap();
        assert_eq!(
            x.rows::<2>().unwrap_err().to_string(),
            "`x` is tensor<T x 16 x f32>, expected f32 rows of 2 constant dimensions"
        );
        assert_eq!(operands(["x", "w"], &[&ty]).unwrap_err().to_string(), "1 operands, expected 2");
        assert!(x.rows::<1>().is_ok() && x.i32().is_err() && x.is_sequences().is_err());
    }
}
