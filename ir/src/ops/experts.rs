//! Mixture of experts: router, dispatch, the experts' products and their weighted sum.

use super::check::{Operand, flag, operands, positive};
use super::math::linear;
use super::norm::{blocks, normed};
use crate::attr::Attrs;
use crate::eval::{Cx, Datum, EvalError};
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

/// `router` `[num_experts, H]`, `shared_gate` `[1, H]`: weights, ids, order `[T, k]`, table, shared `[T, 1]`.
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
    Ok(vec![Type::f32(chosen.clone()), Type::i32(chosen.clone()), Type::i32(chosen), table, shared])
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

/// stub
pub fn eval_combine<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_dispatch<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_expert_linear<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_experts_down<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_experts_gate_up<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_norm_router<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_renormalise<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_softmax<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_top_k<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
