//! Norms, alone and as the prologue of the projections that follow them.

use super::check::{Operand, float, operands, positive};
use super::math::linear;
use crate::attr::Attrs;
use crate::eval::{Cx, Datum, EvalError};
use crate::op::ShapeError;
use crate::shape::{Dim, LANES, Shape};
use crate::types::Type;

/// How many sums of squares a row of `width` has.
pub const fn blocks(width: u64) -> u64 {
    width.div_ceil(LANES)
}

/// The shape of an f32 tensor with a constant innermost dimension.
fn innermost(x: Operand<'_>) -> Result<(&Shape, u64), ShapeError> {
    let shape = x.f32()?;
    match shape.last() {
        Some(n) if n > 0 => Ok((shape, n)),
        _ => Err(x.wrong("f32 with a constant innermost dimension")),
    }
}

/// The result is like the operand.
/// # Errors
/// [`ShapeError`] if it is not f32 with a constant innermost dimension.
pub fn shape_keep(types: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [x] = operands(["x"], types)?;
    Ok(vec![Type::f32(innermost(x)?.0.clone())])
}

/// As [`shape_keep`], with the attribute `eps`.
/// # Errors
/// [`ShapeError`] if the operand does not fit or `eps` is no number.
pub fn shape_l2_norm(types: &[&Type], attrs: &Attrs) -> Result<Vec<Type>, ShapeError> {
    float(attrs, "eps")?;
    shape_keep(types, attrs)
}

/// The innermost dimension `n` becomes `ceil(n / 16)`.
/// # Errors
/// [`ShapeError`] if the operand is not f32 with a constant innermost dimension.
pub fn shape_sum_squares(types: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [x] = operands(["x"], types)?;
    let (shape, width) = innermost(x)?;
    let mut dims = shape.0.clone();
    *dims.last_mut().expect("it has an innermost dimension") = Dim::Const(blocks(width));
    Ok(vec![Type::f32(Shape(dims))])
}

/// `ssq` `[T, ceil(width / 16)]`: `[T, 1]`.
/// # Errors
/// [`ShapeError`] if the operand or an attribute does not fit.
pub fn shape_row_scalar(types: &[&Type], attrs: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [ssq] = operands(["ssq"], types)?;
    float(attrs, "eps")?;
    let width = positive(attrs, "width")?;
    let (first, _) = ssq.rows::<1>()?;
    ssq.is_f32(first, &[blocks(width)])?;
    Ok(vec![Type::f32(Shape::rows(first, &[1]))])
}

/// `x` `[.., n]`, `w` `[n]`: like `x`.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_norm(types: &[&Type], attrs: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [x, w] = operands(["x", "w"], types)?;
    float(attrs, "eps")?;
    let (shape, width) = innermost(x)?;
    w.is_vector(width)?;
    Ok(vec![Type::f32(shape.clone())])
}

/// `x` `[T, n]`, `ssq` `[T, ceil(n / 16)]`, `w` `[n]`: like `x`.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_norm_ssq(types: &[&Type], attrs: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [x, ssq, w] = operands(["x", "ssq", "w"], types)?;
    let (first, width) = normed(x, ssq, w, attrs)?;
    Ok(vec![Type::f32(Shape::rows(first, &[width]))])
}

/// First dimension and width of a row, its sums of squares and the gain, which must agree.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn normed(x: Operand, ssq: Operand, gain: Operand, attrs: &Attrs) -> Result<(Dim, u64), ShapeError> {
    float(attrs, "eps")?;
    let (first, [width]) = x.rows()?;
    ssq.is_f32(first, &[blocks(width)])?;
    gain.is_vector(width)?;
    Ok((first, width))
}

/// One result a weight of the bundle.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_norm_linears(types: &[&Type], attrs: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [x, ssq, gain, ws] = operands(["x", "ssq", "gain", "ws"], types)?;
    normed(x, ssq, gain, attrs)?;
    ws.bundle()?.into_iter().map(|w| linear(x, w)).collect()
}

/// `w_gate` and `w_up` `[I, H]`: `[T, I]`.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_norm_swiglu(types: &[&Type], attrs: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [x, ssq, gain, w_gate, w_up] = operands(["x", "ssq", "gain", "w_gate", "w_up"], types)?;
    normed(x, ssq, gain, attrs)?;
    let out = linear(x, w_gate)?;
    w_up.is_weight(w_gate.any_weight()?)?;
    Ok(vec![out])
}

/// stub
pub fn eval_l2_norm<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_norm_linears<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_norm_swiglu<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_rms_norm<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_rms_norm_plus_one<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_rms_norm_ssq<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_rms_scale<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_sum_squares<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
