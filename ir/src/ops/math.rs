//! Elementwise mathematics and matrix products.

use super::check::{Operand, float, operands};
use super::norm::blocks;
use crate::attr::Attrs;
use crate::eval::{Cx, Datum, EvalError};
use crate::op::ShapeError;
use crate::shape::{Dim, Shape};
use crate::types::Type;

/// The result has the operand's shape; of a weight, a tensor of constants.
/// # Errors
/// [`ShapeError`] if the operand is no tensor of f32 and no weight.
pub fn shape_unary(types: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [x] = operands(["x"], types)?;
    Ok(vec![Type::f32(x.numbers()?)])
}

/// As [`shape_unary`], with the attribute `factor`.
/// # Errors
/// [`ShapeError`] if the operand is no tensor of f32 and no weight, or `factor` is no number.
pub fn shape_scale(types: &[&Type], attrs: &Attrs) -> Result<Vec<Type>, ShapeError> {
    float(attrs, "factor")?;
    shape_unary(types, attrs)
}

/// Shapes broadcast, aligned at the innermost dimension.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_binary(types: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [a, b] = operands(["a", "b"], types)?;
    broadcast(a, b)
}

/// As [`shape_binary`], with the names of SwiGLU's operands.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_swiglu(types: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [gate, up] = operands(["gate", "up"], types)?;
    broadcast(gate, up)
}

fn broadcast(a: Operand, b: Operand) -> Result<Vec<Type>, ShapeError> {
    let (left, right) = (a.numbers()?, b.numbers()?);
    let shape = broadcast_shapes(&left, &right);
    shape.map(|s| vec![Type::f32(s)]).ok_or_else(|| b.wrong(format!("what broadcasts with {left}")))
}

/// The shape both broadcast to, as in numpy: aligned at the innermost dimension, equal or one of them 1.
pub fn broadcast_shapes(a: &Shape, b: &Shape) -> Option<Shape> {
    let rank = a.rank().max(b.rank());
    let dim = |s: &Shape, i: usize| (i + s.rank()).checked_sub(rank).map_or(Dim::Const(1), |i| s.0[i]);
    let pair = |i| match (dim(a, i), dim(b, i)) {
        (x, y) if x == y => Some(x),
        (x, Dim::Const(1)) => Some(x),
        (Dim::Const(1), y) => Some(y),
        _ => None,
    };
    (0..rank).map(pair).collect::<Option<Vec<_>>>().map(Shape)
}

/// `x` `[T, in...]`, `w` `[out..., in...]`: `[T, out...]`.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_linear(types: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [x, w] = operands(["x", "w"], types)?;
    Ok(vec![linear(x, w)?])
}

/// One result a weight of the bundle.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_linears(types: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [x, ws] = operands(["x", "ws"], types)?;
    ws.bundle()?.into_iter().map(|w| linear(x, w)).collect()
}

/// `residual` and the first result have the product's shape, of rank 2; the second result is its sums of squares.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_linear_residual(types: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [x, w, residual] = operands(["x", "w", "residual"], types)?;
    let out = linear(x, w)?;
    residual.is(&out)?;
    let (first, [width]) = residual.rows()?;
    Ok(vec![out, Type::f32(Shape::rows(first, &[blocks(width)]))])
}

/// The type of `x · wᵀ`.
/// # Errors
/// [`ShapeError`] if `x` has no constant inner dimensions or `w` does not end in them.
pub fn linear(x: Operand, w: Operand) -> Result<Type, ShapeError> {
    let shape = x.f32()?;
    let inner = shape.inner().filter(|inner| !inner.is_empty());
    let inner = inner.ok_or_else(|| x.wrong("f32 rows of constant dimensions"))?;
    match w.any_weight()?.strip_suffix(inner.as_slice()) {
        Some(out) if !out.is_empty() => Ok(Type::f32(Shape::rows(shape.0[0], out))),
        _ => Err(w.wrong(format!("a weight with output dimensions and then {}", Shape::new(inner)))),
    }
}

/// stub
pub fn eval_add<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_exp<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_linear<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_linear_residual<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_linears<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_mul<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_neg<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_plus_one<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_scale<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_sigmoid<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_silu<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_softplus<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_swiglu<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
