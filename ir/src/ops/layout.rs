//! Rows in and out: the embedding and the choice of the rows that the head runs on.

use super::check::operands;
use crate::attr::Attrs;
use crate::eval::{Cx, Datum, EvalError};
use crate::op::ShapeError;
use crate::shape::{Dim, Shape};
use crate::types::Type;

/// `tokens` `i32[T]`, `w` `[V, H...]`: `f32[T, H...]`.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_embed(types: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [tokens, w] = operands(["tokens", "w"], types)?;
    let &[first] = tokens.i32()?.0.as_slice() else { return Err(tokens.wrong("i32 of one dimension")) };
    match w.any_weight()? {
        [_, row @ ..] if !row.is_empty() => Ok(vec![Type::f32(Shape::rows(first, row))]),
        _ => Err(w.wrong("a weight of at least 2 dimensions")),
    }
}

/// `x` `[T, ...]` of f32, `rows` `i32[R]`: `[R, ...]`.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_gather_rows(types: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [x, rows] = operands(["x", "rows"], types)?;
    let &[first] = rows.i32()?.0.as_slice() else { return Err(rows.wrong("i32 of one dimension")) };
    let shape = x.f32()?;
    let inner: &[Dim] = shape.0.get(1..).ok_or_else(|| x.wrong("a tensor of rows"))?;
    Ok(vec![Type::f32(Shape(std::iter::once(first).chain(inner.iter().copied()).collect()))])
}

/// stub
pub fn eval_embed<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_gather_rows<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
