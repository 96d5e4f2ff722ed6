//! Mixture of experts: router, dispatch, the experts' products and their weighted sum.

use super::check::{Operand, flag, operands, positive};
use super::math::{add_residual, dot, linear, logistic, map, product, swiglu, zip};
use super::norm::{blocks, map_rows, normed, rms_norm_ssq};
use crate::attr::Attrs;
use crate::eval::{self, Array, Cx, Datum, EvalError, Real, attr_int};
use crate::op::ShapeError;
use crate::shape::{Dim, Shape};
use crate::types::Type;

/// `x` `[T, n]`: values and indices `[T, k]`.
/// # Errors
/// [`ShapeError`] naming what does not fit.
pub fn shape_top_k(types: &[&Type], attrs: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [x] = operands(["x"], types)?;
    let k = positive(attrs, "k")?;
    let (first, [n]) = x.rows()?;
    if k > n {
        return Err(x.wrong(format!("at least k = {k} columns")));
    }
    let shape = Shape::rows(first, &[k]);
    Ok(vec![Type::f32(shape.clone()), Type::i32(shape)])
}

/// Entries of the dispatch table of `experts`.
pub const fn table_len(experts: u64) -> u64 {
    experts.saturating_mul(2).saturating_add(2)
}

/// First dimension and `k` of the choices `ids` `i32[T, k]`.
fn choices(ids: Operand) -> Result<(Dim, u64), ShapeError> {
    match ids.i32()?.0.as_slice() {
        &[first, Dim::Const(k)] => Ok((first, k)),
        _ => Err(ids.wrong("i32 of [T, k]")),
    }
}

/// Checks `order` and `table` of `dispatch` against the choices.
fn dispatched(order: Operand, table: Operand, first: Dim, k: u64, experts: u64) -> Result<(), ShapeError> {
    order.is_i32(first, &[k])?;
    table.is(&Type::i32(Shape::new([table_len(experts)])))
}

/// `ids` `i32[T, k]`: `order` `i32[T, k]` and `table` `i32[2·experts + 2]`.
/// # Errors
/// [`ShapeError`] naming what does not fit.
pub fn shape_dispatch(types: &[&Type], attrs: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [ids] = operands(["ids"], types)?;
    let experts = positive(attrs, "experts")?;
    choices(ids)?;
    Ok(vec![types[0].clone(), Type::i32(Shape::new([table_len(experts)]))])
}

/// `x` `[T, in]` or `[T, k, in]`, `w` `[num_experts, out, in]`: `[T, k, out]`.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_expert_linear(types: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [x, w, ids, order, table] = operands(["x", "w", "ids", "order", "table"], types)?;
    let (first, k) = choices(ids)?;
    let [experts, out, width] = w.weight()?;
    let rows = [Shape::rows(first, &[width]), Shape::rows(first, &[k, width])];
    if !rows.contains(x.f32()?) {
        return Err(x.wrong(format!("f32 of [{}] or [{}]", rows[0], rows[1])));
    }
    dispatched(order, table, first, k, experts)?;
    Ok(vec![Type::f32(Shape::rows(first, &[k, out]))])
}

/// `y` `[T, k, H]`, `weights` and `ids` `[T, k]`: `[T, H]`.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_combine(types: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [y, weights, ids] = operands(["y", "weights", "ids"], types)?;
    let (first, [k, width]) = y.rows()?;
    weights.is_f32(first, &[k])?;
    ids.is_i32(first, &[k])?;
    Ok(vec![Type::f32(Shape::rows(first, &[width]))])
}

/// `router` `[num_experts, H]`, `shared_gate` `[1, H]`: weights, ids, order `[T, k]`, table, shared `[T, 1]`, logits `[T, num_experts]`.
/// # Errors
/// [`ShapeError`] naming what does not fit.
pub fn shape_norm_router(types: &[&Type], attrs: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [x, ssq, gain, router, shared_gate] = operands(["x", "ssq", "gain", "router", "shared_gate"], types)?;
    let (first, width) = normed(x, ssq, gain, attrs)?;
    let k = positive(attrs, "k")?;
    flag(attrs, "renormalise")?;
    let [experts, _] = router.weight()?;
    router.is_weight(&[experts, width])?;
    shared_gate.is_weight(&[1, width])?;
    if k > experts {
        return Err(router.wrong(format!("at least k = {k} experts")));
    }
    let chosen = Shape::rows(first, &[k]);
    let table = Type::i32(Shape::new([table_len(experts)]));
    let shared = Type::f32(Shape::rows(first, &[1]));
    let logits = Type::f32(Shape::rows(first, &[experts]));
    Ok(vec![Type::f32(chosen.clone()), Type::i32(chosen.clone()), Type::i32(chosen), table, shared, logits])
}

/// `w_gate`, `w_up` `[num_experts, I, H]`, `s_gate`, `s_up` `[Is, H]`: `[T, k, I]` and `[T, Is]`.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_experts_gate_up(types: &[&Type], attrs: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [x, ssq, gain, ids, order, table, w_gate, w_up, s_gate, s_up] =
        operands(["x", "ssq", "gain", "ids", "order", "table", "w_gate", "w_up", "s_gate", "s_up"], types)?;
    let (first, width) = normed(x, ssq, gain, attrs)?;
    let (_, k) = choices(ids)?;
    ids.is_i32(first, &[k])?;
    let [experts, inner, _] = w_gate.weight()?;
    dispatched(order, table, first, k, experts)?;
    w_gate.is_weight(&[experts, inner, width])?;
    w_up.is_weight(&[experts, inner, width])?;
    let [shared_inner, _] = s_gate.weight()?;
    s_gate.is_weight(&[shared_inner, width])?;
    s_up.is_weight(&[shared_inner, width])?;
    Ok(vec![Type::f32(Shape::rows(first, &[k, inner])), linear(x, s_gate)?])
}

/// `h` `[T, k, I]`, `s` `[T, Is]`, `w_down` `[num_experts, H, I]`, `s_down` `[H, Is]`: `[T, H]` and its sums of squares.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_experts_down(types: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [h, s, weights, ids, order, table, shared, w_down, s_down, residual] =
        operands(["h", "s", "weights", "ids", "order", "table", "shared", "w_down", "s_down", "residual"], types)?;
    let (first, [width]) = residual.rows()?;
    let (_, [k, inner]) = h.rows()?;
    h.is_f32(first, &[k, inner])?;
    let (_, [shared_inner]) = s.rows()?;
    s.is_f32(first, &[shared_inner])?;
    weights.is_f32(first, &[k])?;
    ids.is_i32(first, &[k])?;
    shared.is_f32(first, &[1])?;
    let [experts, _, _] = w_down.weight()?;
    w_down.is_weight(&[experts, width, inner])?;
    s_down.is_weight(&[width, shared_inner])?;
    dispatched(order, table, first, k, experts)?;
    Ok(vec![types[9].clone(), Type::f32(Shape::rows(first, &[blocks(width)]))])
}

/// `exp(x - max) / sum` over the innermost dimension.
fn softmax<F: Real>(x: &Array<F>) -> Result<Array<F>, EvalError> {
    map_rows(x, x.width(), |row, out| {
        let max = row.iter().map(|x| x.get()).fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = row.iter().map(|x| (x.get() - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        out.extend(weights.iter().map(|w| F::of(w / sum)));
    })
}

/// The `k` largest of each row in descending order, the lower index first among equals, and their indices.
fn top_k<F: Real>(x: &Array<F>, k: usize) -> Result<(Array<F>, Array<i32>), EvalError> {
    let [rows, width] = x.rank()?;
    if k > width {
        return Err(EvalError::OutOfRange { what: "k", value: k as i64, limit: width });
    }
    let (mut values, mut indices) = (Vec::with_capacity(rows * k), Vec::with_capacity(rows * k));
    for t in 0..rows {
        let row = x.row(t);
        let mut order: Vec<usize> = (0..width).collect();
        // adding 0 makes -0 equal to 0, as a comparison sees them
        order.sort_by(|&a, &b| (row[b].get() + 0.0).total_cmp(&(row[a].get() + 0.0)));
        values.extend(order[..k].iter().map(|&i| row[i]));
        indices.extend(order[..k].iter().map(|&i| i as i32));
    }
    Ok((Array::new(&[rows, k], values)?, Array::new(&[rows, k], indices)?))
}

/// Expert `id` of `experts`.
fn expert(id: i32, experts: usize) -> Result<usize, EvalError> {
    let index = usize::try_from(id).ok().filter(|&i| i < experts);
    index.ok_or(EvalError::OutOfRange { what: "expert id", value: id.into(), limit: experts })
}

/// `order` and `table` of the choices `ids`.
fn dispatch<F: Real>(ids: &Array<i32>, experts: usize) -> Result<[Datum<F>; 2], EvalError> {
    let mut counts = vec![0; experts];
    for &id in ids.data() {
        counts[expert(id, experts)?] += 1;
    }
    let mut order: Vec<i32> = (0..ids.data().len() as i32).collect();
    order.sort_by_key(|&choice| ids.data()[choice as usize]);
    let mut table = vec![0];
    table.extend(counts.iter().scan(0, |start, &n| {
        *start += n;
        Some(*start)
    }));
    let chosen: Vec<i32> = (0..experts as i32).filter(|&e| counts[e as usize] > 0).collect();
    table.push(chosen.len() as i32);
    table.extend(chosen);
    table.resize(2 * experts + 2, -1);
    Ok([Datum::ints(ids.dims(), order)?, Datum::ints(&[table.len()], table)?])
}

/// `w[ids[t, s]] · x[t]`, or `· x[t, s]` if `x` has a row for each choice.
fn expert_product<F: Real>(x: &Array<F>, w: &Array<F>, ids: &Array<i32>) -> Result<Array<F>, EvalError> {
    let [tokens, k] = ids.rank()?;
    let [experts, out, width] = w.rank()?;
    let shared = x.dims().len() == 2;
    if shared {
        x.is(&[tokens, width])?
    } else {
        x.is(&[tokens, k, width])?
    };
    let mut data = Vec::with_capacity(tokens * k * out);
    for (choice, &id) in ids.data().iter().enumerate() {
        let row = if shared { choice / k } else { choice };
        let x = &x.data()[row * width..(row + 1) * width];
        let matrix = w.row(expert(id, experts)?);
        data.extend(matrix.chunks_exact(width.max(1)).map(|row| F::of(dot(x, row))));
    }
    Array::new(&[tokens, k, out], data)
}

/// `Σ_s weights[t, s] · y[t, s]`, in ascending order of the expert's index.
fn combine<F: Real>(y: &Array<F>, weights: &Array<F>, ids: &Array<i32>) -> Result<Array<F>, EvalError> {
    let [tokens, k, width] = y.rank()?;
    weights.is(&[tokens, k])?;
    ids.is(&[tokens, k])?;
    let mut data = Vec::with_capacity(tokens * width);
    for t in 0..tokens {
        let mut choices: Vec<usize> = (t * k..(t + 1) * k).collect();
        choices.sort_by_key(|&choice| ids.data()[choice]);
        let term = |choice: usize, i: usize| weights.data()[choice].get() * y.data()[choice * width + i].get();
        data.extend((0..width).map(|i| F::of(choices.iter().map(|&choice| term(choice, i)).sum())));
    }
    Array::new(&[tokens, width], data)
}

/// `softmax` as an op.
/// # Errors
/// [`EvalError`]; so for the functions below.
pub fn eval_softmax<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [x] = eval::operands(args)?;
    Ok(vec![softmax(x.float()?)?.into()])
}

/// `top_k` as an op.
/// # Errors
/// [`EvalError`].
pub fn eval_top_k<F: Real>(_: &Cx<F>, args: &[Datum<F>], attrs: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [x] = eval::operands(args)?;
    let (values, indices) = top_k(x.float()?, attr_int(attrs, "k")?)?;
    Ok(vec![values.into(), Datum::Int(indices)])
}

/// `x / sum(x)` over the innermost dimension.
/// # Errors
/// [`EvalError`].
pub fn eval_renormalise<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [x] = eval::operands(args)?;
    let x = x.float()?;
    let divided = map_rows(x, x.width(), |row, out| {
        let sum: f64 = row.iter().map(|x| x.get()).sum();
        out.extend(row.iter().map(|x| F::of(x.get() / sum)));
    });
    Ok(vec![divided?.into()])
}

/// `dispatch` as an op.
/// # Errors
/// [`EvalError`].
pub fn eval_dispatch<F: Real>(_: &Cx<F>, args: &[Datum<F>], attrs: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [ids] = eval::operands(args)?;
    Ok(dispatch(ids.int()?, attr_int(attrs, "experts")?)?.into())
}

/// `expert_product` as an op; `order` and `table` say nothing that `ids` does not.
/// # Errors
/// [`EvalError`].
pub fn eval_expert_linear<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [x, w, ids, _order, _table] = eval::operands(args)?;
    Ok(vec![expert_product(x.float()?, w.float()?, ids.int()?)?.into()])
}

/// `combine` as an op.
/// # Errors
/// [`EvalError`].
pub fn eval_combine<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [y, weights, ids] = eval::operands(args)?;
    Ok(vec![combine(y.float()?, weights.float()?, ids.int()?)?.into()])
}

/// Weights, ids, order, table of the router's choice, the shared expert's weight, and the logits.
/// # Errors
/// [`EvalError`].
pub fn eval_norm_router<F: Real>(_: &Cx<F>, args: &[Datum<F>], attrs: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [x, ssq, gain, router, shared_gate] = eval::operands(args)?;
    let k = attr_int(attrs, "k")?;
    let h = rms_norm_ssq(x, ssq, gain, attrs)?;
    let logits = product(&h, router.float()?)?;
    let (weights, ids) = if attr_int(attrs, "renormalise")? == 1 {
        let (largest, ids) = top_k(&logits, k)?;
        (softmax(&largest)?, ids)
    } else {
        top_k(&softmax(&logits)?, k)?
    };
    let [order, table] = dispatch(&ids, logits.width())?;
    let shared = map(&product(&h, shared_gate.float()?)?, logistic);
    Ok(vec![weights.into(), Datum::Int(ids), order, table, shared.into(), logits.into()])
}

/// The first half of the routed experts and of the shared one.
/// # Errors
/// [`EvalError`].
pub fn eval_experts_gate_up<F: Real>(_: &Cx<F>, args: &[Datum<F>], attrs: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [x, ssq, gain, ids, _order, _table, w_gate, w_up, s_gate, s_up] = eval::operands(args)?;
    let h = rms_norm_ssq(x, ssq, gain, attrs)?;
    let routed = |w: &Datum<F>| expert_product(&h, w.float()?, ids.int()?);
    let shared = |w: &Datum<F>| product(&h, w.float()?);
    Ok(vec![swiglu(&routed(w_gate)?, &routed(w_up)?)?.into(), swiglu(&shared(s_gate)?, &shared(s_up)?)?.into()])
}

/// `residual + (combine(expert_linear(h, w_down), weights) + shared · linear(s, s_down))` and its sums of squares.
/// # Errors
/// [`EvalError`].
pub fn eval_experts_down<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [h, s, weights, ids, _order, _table, shared, w_down, s_down, residual] = eval::operands(args)?;
    let routed = expert_product(h.float()?, w_down.float()?, ids.int()?)?;
    let routed = combine(&routed, weights.float()?, ids.int()?)?;
    let shared = zip(shared.float()?, &product(s.float()?, s_down.float()?)?, |a, b| a * b)?;
    add_residual(residual.float()?, &zip(&routed, &shared, |a, b| a + b)?)
}
