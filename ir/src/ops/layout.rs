//! Rows in and out: the embedding and the choice of the rows that the head runs on.

use super::check::operands;
use crate::attr::Attrs;
use crate::eval::{self, Array, Cx, Datum, EvalError, Real};
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

/// Copies the rows `rows` of `x`; `what` they are called if one is out of range.
fn gather<F: Real>(x: &Array<F>, rows: &Array<i32>, what: &'static str) -> Result<Array<F>, EvalError> {
    let [count] = rows.rank()?;
    let (limit, elems) = x.rows();
    let mut data = Vec::with_capacity(count * elems);
    for &row in rows.data() {
        match usize::try_from(row) {
            Ok(i) if i < limit => data.extend_from_slice(x.row(i)),
            _ => return Err(EvalError::OutOfRange { what, value: row.into(), limit }),
        }
    }
    let inner = x.dims().get(1..).unwrap_or_default();
    Array::new(&[&[count], inner].concat(), data)
}

/// Rows of the embedding table; the first for -1, which is what a draft is where no logit is the largest: it is never right.
/// # Errors
/// [`EvalError::OutOfRange`] if a token id has no row.
pub fn eval_embed<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [tokens, w] = eval::operands(args)?;
    let tokens = tokens.int()?;
    let rows = tokens.data().iter().map(|&token| if token == -1 { 0 } else { token }).collect();
    Ok(vec![gather(w.float()?, &Array::new(tokens.dims(), rows)?, "token id")?.into()])
}

/// Rows of an activation.
/// # Errors
/// [`EvalError::OutOfRange`] if there is no such row.
pub fn eval_gather_rows<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [x, rows] = eval::operands(args)?;
    Ok(vec![gather(x.float()?, rows.int()?, "row")?.into()])
}
