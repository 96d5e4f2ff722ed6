//! Norms, alone and as the prologue of the projections that follow them.

use super::check::{Operand, float, operands, positive};
use super::math::{dot, linear, product, products, swiglu};
use crate::attr::Attrs;
use crate::eval::{self, Array, Cx, Datum, EvalError, Real, attr_float, attr_int};
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

/// `f` of each row of the innermost dimension, which it turns into a row of `width`.
pub fn map_rows<F: Real>(x: &Array<F>, width: usize, f: impl Fn(&[F], &mut Vec<F>)) -> Result<Array<F>, EvalError> {
    let mut dims = x.dims().to_vec();
    let narrow = EvalError::Dims { found: dims.clone(), expected: "a row of at least one element".to_owned() };
    let Some(last @ 1..) = dims.last_mut() else { return Err(narrow) };
    let from = std::mem::replace(last, width);
    let mut data = Vec::with_capacity(x.data().len() / from * width);
    x.data().chunks_exact(from).for_each(|row| f(row, &mut data));
    Array::new(&dims, data)
}

/// Sums of squares of each 16 neighbours.
/// # Errors
/// [`EvalError::Dims`] if `x` has no elements in a row.
pub fn sum_squares<F: Real>(x: &Array<F>) -> Result<Array<F>, EvalError> {
    map_rows(x, x.width().div_ceil(LANES as usize), |row, out| {
        out.extend(row.chunks(LANES as usize).map(|block| F::of(dot(block, block))));
    })
}

/// `rsqrt(mean + eps)` of rows of `width` whose sums of squares are `sums`.
fn rms_factor<F: Real>(sums: &[F], width: usize, eps: f64) -> f64 {
    1.0 / (sums.iter().map(|s| s.get()).sum::<f64>() / width as f64 + eps).sqrt()
}

/// `x · rsqrt(mean(x²) + eps) · gain(w)` over the innermost dimension.
pub fn rms_norm<F: Real>(
    x: &Array<F>,
    w: &Array<F>,
    eps: f64,
    gain: impl Fn(f64) -> f64,
) -> Result<Array<F>, EvalError> {
    w.is(&[x.width()])?;
    map_rows(x, x.width(), |row, out| {
        let factor = 1.0 / (dot(row, row) / row.len() as f64 + eps).sqrt();
        out.extend(row.iter().zip(w.data()).map(|(x, w)| F::of(x.get() * factor * gain(w.get()))));
    })
}

/// `x · rsqrt(mean(x²) + eps) · (1 + w)`.
/// # Errors
/// [`EvalError::Dims`] if `w` has another width.
pub fn rms_norm_plus_one<F: Real>(x: &Array<F>, w: &Array<F>, eps: f64) -> Result<Array<F>, EvalError> {
    rms_norm(x, w, eps, |w| 1.0 + w)
}

/// [`rms_norm_plus_one`] with the sums of squares given.
/// # Errors
/// [`EvalError`] if the operands do not fit.
pub fn rms_norm_ssq<F: Real>(x: &Datum<F>, ssq: &Datum<F>, w: &Datum<F>, attrs: &Attrs) -> Result<Array<F>, EvalError> {
    let (x, ssq, w, eps) = (x.float()?, ssq.float()?, w.float()?, attr_float(attrs, "eps")?);
    let [rows, width] = x.rank()?;
    ssq.is(&[rows, width.div_ceil(LANES as usize)])?;
    w.is(&[width])?;
    let mut data = Vec::with_capacity(rows * width);
    for t in 0..rows {
        let factor = rms_factor(ssq.row(t), width, eps);
        data.extend(x.row(t).iter().zip(w.data()).map(|(x, w)| F::of(x.get() * factor * (1.0 + w.get()))));
    }
    Array::new(x.dims(), data)
}

/// `x / sqrt(sum(x²) + eps)`.
/// # Errors
/// [`EvalError::Dims`] if `x` has no elements in a row.
pub fn l2_norm<F: Real>(x: &Array<F>, eps: f64) -> Result<Array<F>, EvalError> {
    map_rows(x, x.width(), |row, out| {
        let norm = (dot(row, row) + eps).sqrt();
        out.extend(row.iter().map(|x| F::of(x.get() / norm)));
    })
}

/// Sums of squares of each 16 neighbours.
/// # Errors
/// [`EvalError`] if the operand does not fit; so for the functions below.
pub fn eval_sum_squares<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [x] = eval::operands(args)?;
    Ok(vec![sum_squares(x.float()?)?.into()])
}

/// `rsqrt(sum(ssq) / width + eps)`.
/// # Errors
/// [`EvalError`].
pub fn eval_rms_scale<F: Real>(_: &Cx<F>, args: &[Datum<F>], attrs: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [ssq] = eval::operands(args)?;
    let (width, eps) = (attr_int(attrs, "width")?, attr_float(attrs, "eps")?);
    Ok(vec![map_rows(ssq.float()?, 1, |row, out| out.push(F::of(rms_factor(row, width, eps))))?.into()])
}

/// `x · rsqrt(mean(x²) + eps) · w`.
/// # Errors
/// [`EvalError`].
pub fn eval_rms_norm<F: Real>(_: &Cx<F>, args: &[Datum<F>], attrs: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [x, w] = eval::operands(args)?;
    Ok(vec![rms_norm(x.float()?, w.float()?, attr_float(attrs, "eps")?, |w| w)?.into()])
}

/// `x · rsqrt(mean(x²) + eps) · (1 + w)`.
/// # Errors
/// [`EvalError`].
pub fn eval_rms_norm_plus_one<F: Real>(
    _: &Cx<F>,
    args: &[Datum<F>],
    attrs: &Attrs,
) -> Result<Vec<Datum<F>>, EvalError> {
    let [x, w] = eval::operands(args)?;
    Ok(vec![rms_norm_plus_one(x.float()?, w.float()?, attr_float(attrs, "eps")?)?.into()])
}

/// [`rms_norm_ssq`].
/// # Errors
/// [`EvalError`].
pub fn eval_rms_norm_ssq<F: Real>(_: &Cx<F>, args: &[Datum<F>], attrs: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [x, ssq, w] = eval::operands(args)?;
    Ok(vec![rms_norm_ssq(x, ssq, w, attrs)?.into()])
}

/// `x / sqrt(sum(x²) + eps)`.
/// # Errors
/// [`EvalError`].
pub fn eval_l2_norm<F: Real>(_: &Cx<F>, args: &[Datum<F>], attrs: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [x] = eval::operands(args)?;
    Ok(vec![l2_norm(x.float()?, attr_float(attrs, "eps")?)?.into()])
}

/// `linears(rms_norm_ssq(x, ssq, gain), ws)`.
/// # Errors
/// [`EvalError`].
pub fn eval_norm_linears<F: Real>(_: &Cx<F>, args: &[Datum<F>], attrs: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [x, ssq, gain, ws] = eval::operands(args)?;
    products(&rms_norm_ssq(x, ssq, gain, attrs)?, ws)
}

/// `swiglu(linear(h, w_gate), linear(h, w_up))` with `h = rms_norm_ssq(x, ssq, gain)`.
/// # Errors
/// [`EvalError`].
pub fn eval_norm_swiglu<F: Real>(_: &Cx<F>, args: &[Datum<F>], attrs: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [x, ssq, gain, w_gate, w_up] = eval::operands(args)?;
    let h = rms_norm_ssq(x, ssq, gain, attrs)?;
    Ok(vec![swiglu(&product(&h, w_gate.float()?)?, &product(&h, w_up.float()?)?)?.into()])
}
