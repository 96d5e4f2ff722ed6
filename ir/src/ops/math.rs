//! Elementwise mathematics and matrix products.

use super::check::{Operand, float, operands};
use super::norm::{blocks, sum_squares};
use crate::attr::Attrs;
use crate::eval::{self, Array, Cx, Datum, EvalError, Real, attr_float};
use crate::op::ShapeError;
use crate::shape::{Dim, LANES, Shape};
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

/// `x` `[T, in...]`, `w` `[out, in...]`, `wanted` `i32[ceil(out / 16)]`: `[T, out]`.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_linear_wanted(types: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [x, w, wanted] = operands(["x", "w", "wanted"], types)?;
    let out = linear(x, w)?;
    let (_, [rows]) = out
        .as_tensor()
        .and_then(|t| Some((t.shape.0[0], <[u64; 1]>::try_from(t.shape.inner()?).ok()?)))
        .ok_or_else(|| w.wrong("a weight of one output dimension"))?;
    wanted.is(&Type::i32(Shape::new([blocks(rows)])))?;
    Ok(vec![out])
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

/// `1 / (1 + exp(-x))`.
pub fn logistic(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `log(1 + exp(x))`, linear above 20 as in torch.
pub fn log1p_exp(x: f64) -> f64 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

/// `f` of every element.
pub fn map<F: Real>(x: &Array<F>, f: impl Fn(f64) -> f64) -> Array<F> {
    let data = x.data().iter().map(|&x| F::of(f(x.get()))).collect();
    Array::new(x.dims(), data).expect("as many elements as before")
}

/// `f` of the elements at each place, the operands broadcast to one shape.
/// # Errors
/// [`EvalError::Dims`] if they do not broadcast.
pub fn zip<F: Real>(a: &Array<F>, b: &Array<F>, f: impl Fn(f64, f64) -> f64) -> Result<Array<F>, EvalError> {
    let dims = |x: &Array<F>| Shape::new(x.dims().iter().map(|&d| d as u64));
    let shape = broadcast_shapes(&dims(a), &dims(b));
    let mismatch = || EvalError::Dims { found: b.dims().to_vec(), expected: format!("broadcast with {:?}", a.dims()) };
    let dims = shape.ok_or_else(mismatch)?.eval(&[0; 4]);
    let (left, right) = (places(a.dims(), &dims), places(b.dims(), &dims));
    let data = left.iter().zip(&right).map(|(&i, &j)| F::of(f(a.data()[i].get(), b.data()[j].get())));
    Array::new(&dims, data.collect())
}

/// For each element of a result of `dims`, in order, the index of the element of an operand of `from` that meets it.
fn places(from: &[usize], dims: &[usize]) -> Vec<usize> {
    let mut places = vec![0];
    let missing = dims.len() - from.len();
    for (axis, &n) in dims.iter().enumerate() {
        let own = axis.checked_sub(missing).map_or(1, |axis| from[axis]);
        let step = |place: usize, i: usize| place * own + if own == 1 { 0 } else { i };
        places = places.iter().flat_map(|&place| (0..n).map(move |i| step(place, i))).collect();
    }
    places
}

fn unary<F: Real>(args: &[Datum<F>], f: impl Fn(f64) -> f64) -> Result<Vec<Datum<F>>, EvalError> {
    let [x] = eval::operands(args)?;
    Ok(vec![map(x.float()?, f).into()])
}

/// `-x`.
/// # Errors
/// [`EvalError`] if the operand is no array of floats.
pub fn eval_neg<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    unary(args, |x| -x)
}

/// `exp(x)`.
/// # Errors
/// [`EvalError`] if the operand is no array of floats.
pub fn eval_exp<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    unary(args, f64::exp)
}

/// `1 / (1 + exp(-x))`.
/// # Errors
/// [`EvalError`] if the operand is no array of floats.
pub fn eval_sigmoid<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    unary(args, logistic)
}

/// `x · sigmoid(x)`.
/// # Errors
/// [`EvalError`] if the operand is no array of floats.
pub fn eval_silu<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    unary(args, |x| x * logistic(x))
}

/// `log(1 + exp(x))`, linear above 20.
/// # Errors
/// [`EvalError`] if the operand is no array of floats.
pub fn eval_softplus<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    unary(args, log1p_exp)
}

/// `1 + x`.
/// # Errors
/// [`EvalError`] if the operand is no array of floats.
pub fn eval_plus_one<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    unary(args, |x| 1.0 + x)
}

/// `x · factor`.
/// # Errors
/// [`EvalError`] if the operand is no array of floats.
pub fn eval_scale<F: Real>(_: &Cx<F>, args: &[Datum<F>], attrs: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let factor = attr_float(attrs, "factor")?;
    unary(args, |x| x * factor)
}

/// `a + b`.
/// # Errors
/// [`EvalError`] if the operands do not broadcast.
pub fn eval_add<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [a, b] = eval::operands(args)?;
    Ok(vec![zip(a.float()?, b.float()?, |a, b| a + b)?.into()])
}

/// `a · b`.
/// # Errors
/// [`EvalError`] if the operands do not broadcast.
pub fn eval_mul<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [a, b] = eval::operands(args)?;
    Ok(vec![zip(a.float()?, b.float()?, |a, b| a * b)?.into()])
}

/// `silu(gate) · up`.
/// # Errors
/// [`EvalError`] if the operands do not broadcast.
pub fn eval_swiglu<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [gate, up] = eval::operands(args)?;
    Ok(vec![swiglu(gate.float()?, up.float()?)?.into()])
}

/// `silu(gate) · up`.
/// # Errors
/// [`EvalError::Dims`] if they do not broadcast.
pub fn swiglu<F: Real>(gate: &Array<F>, up: &Array<F>) -> Result<Array<F>, EvalError> {
    zip(gate, up, |gate, up| gate * logistic(gate) * up)
}

/// `Σ a·b` in f64.
pub fn dot<F: Real>(a: &[F], b: &[F]) -> f64 {
    let mut sums = [0.0; 4];
    let (left, right) = (a.chunks_exact(4), b.chunks_exact(4));
    let rest = left.remainder().iter().zip(right.remainder());
    let rest: f64 = rest.map(|(x, y)| x.get() * y.get()).sum();
    for (x, y) in left.zip(right) {
        sums[0] += x[0].get() * y[0].get();
        sums[1] += x[1].get() * y[1].get();
        sums[2] += x[2].get() * y[2].get();
        sums[3] += x[3].get() * y[3].get();
    }
    sums[0] + sums[1] + (sums[2] + sums[3]) + rest
}

/// `x · wᵀ`: contracts all dimensions of `x` but the first.
/// # Errors
/// [`EvalError::Dims`] if `w` does not end in those.
pub fn product<F: Real>(x: &Array<F>, w: &Array<F>) -> Result<Array<F>, EvalError> {
    let inner = x.dims().get(1..).unwrap_or_default();
    let mismatch = || EvalError::Dims { found: w.dims().to_vec(), expected: format!("what ends in {inner:?}") };
    let out = w.dims().strip_suffix(inner).filter(|out| !out.is_empty()).ok_or_else(mismatch)?;
    let (tokens, width) = x.rows();
    let mut data = Vec::with_capacity(tokens * out.iter().product::<usize>());
    for t in 0..tokens {
        data.extend(w.data().chunks_exact(width.max(1)).map(|row| F::of(dot(x.row(t), row))));
    }
    Array::new(&[&[tokens], out].concat(), data)
}

/// `x · wᵀ` for each weight.
/// # Errors
/// As [`product`].
pub fn products<F: Real>(x: &Array<F>, ws: &Datum<F>) -> Result<Vec<Datum<F>>, EvalError> {
    ws.bundle()?.iter().map(|w| Ok(product(x, w.float()?)?.into())).collect()
}

/// `x · wᵀ`.
/// # Errors
/// [`EvalError`] if the operands do not fit.
pub fn eval_linear<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [x, w] = eval::operands(args)?;
    Ok(vec![product(x.float()?, w.float()?)?.into()])
}

/// `x · wᵀ`, minus infinity where a row of `w` is not wanted.
/// # Errors
/// [`EvalError`] if the operands do not fit.
pub fn eval_linear_wanted<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [x, w, wanted] = eval::operands(args)?;
    let (all, wanted) = (product(x.float()?, w.float()?)?, wanted.int()?.data());
    let is_wanted = |row: usize| wanted.get(row / LANES as usize).is_some_and(|&flag| flag != 0);
    let width = all.width();
    let pick = |(i, &y): (usize, &F)| if is_wanted(i % width.max(1)) { y } else { F::of(f64::NEG_INFINITY) };
    Ok(vec![Array::new(all.dims(), all.data().iter().enumerate().map(pick).collect())?.into()])
}

/// `x · wᵀ` for each weight of the bundle.
/// # Errors
/// [`EvalError`] if the operands do not fit.
pub fn eval_linears<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [x, ws] = eval::operands(args)?;
    products(x.float()?, ws)
}

/// `residual + x · wᵀ` and its sums of squares.
/// # Errors
/// [`EvalError`] if the operands do not fit.
pub fn eval_linear_residual<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [x, w, residual] = eval::operands(args)?;
    add_residual(residual.float()?, &product(x.float()?, w.float()?)?)
}

/// `residual + y` and its sums of squares.
/// # Errors
/// [`EvalError::Dims`] if they differ in shape.
pub fn add_residual<F: Real>(residual: &Array<F>, y: &Array<F>) -> Result<Vec<Datum<F>>, EvalError> {
    residual.is(y.dims())?;
    let out = zip(residual, y, |a, b| a + b)?;
    let ssq = sum_squares(&out)?;
    Ok(vec![out.into(), ssq.into()])
}
