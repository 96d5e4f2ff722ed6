//! Gated attention: rotary embedding, the KV state, and the attention over it.

use super::check::{Operand, float, operands};
use crate::attr::Attrs;
use crate::eval::{Cx, Datum, EvalError};
use crate::op::ShapeError;
use crate::shape::{Dim, Shape};
use crate::types::{StateKind, Type};

/// Demands frequencies for at most half of `head_dim`.
fn frequencies(inv_freq: Operand, head_dim: u64) -> Result<(), ShapeError> {
    match inv_freq.vector()? {
        n if n <= head_dim / 2 => Ok(()),
        _ => Err(inv_freq.wrong(format!("a weight of at most {}, half the head", head_dim / 2))),
    }
}

/// `x` `[T, heads, head_dim]`: like `x`.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_rope(types: &[&Type], attrs: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [x, inv_freq, seqs] = operands(["x", "inv_freq", "seqs"], types)?;
    float(attrs, "factor")?;
    let (_, [_, head_dim]) = x.rows()?;
    frequencies(inv_freq, head_dim)?;
    seqs.is_sequences()?;
    Ok(vec![types[0].clone()])
}

/// `k`, `v` `[T, num_kv_heads, head_dim]` and a state of the same: the new state.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_append_kv(types: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [k, v, kv, seqs] = operands(["k", "v", "kv", "seqs"], types)?;
    let (first, heads) = k.rows::<2>()?;
    appended(v, kv, first, heads, seqs).map(|kv| vec![kv])
}

/// The new KV state, where keys have `heads` = `[num_kv_heads, head_dim]`.
fn appended(v: Operand, kv: Operand, first: Dim, heads: [u64; 2], seqs: Operand) -> Result<Type, ShapeError> {
    v.is_f32(first, &heads)?;
    seqs.is_sequences()?;
    kv.is_state(StateKind::Kv, &heads)
}

/// `q` `[T, num_heads, head_dim]`: like `q`.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_attention(types: &[&Type], attrs: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [q, kv, seqs] = operands(["q", "kv", "seqs"], types)?;
    attended(q, kv, seqs, attrs)
}

/// `q` and `output_gate` `[T, num_heads, head_dim]`: like `q`.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_gated_attention(types: &[&Type], attrs: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [q, output_gate, kv, seqs] = operands(["q", "output_gate", "kv", "seqs"], types)?;
    output_gate.is(types[0])?;
    attended(q, kv, seqs, attrs)
}

fn attended(q: Operand, kv: Operand, seqs: Operand, attrs: &Attrs) -> Result<Vec<Type>, ShapeError> {
    float(attrs, "scale")?;
    let (first, [num_heads, head_dim]) = q.rows()?;
    let [num_kv_heads, kv_head_dim] = kv.state(StateKind::Kv)?;
    if kv_head_dim != head_dim || num_kv_heads == 0 || num_heads % num_kv_heads != 0 {
        return Err(kv.wrong(format!("heads of {head_dim} whose count divides {num_heads}")));
    }
    seqs.is_sequences()?;
    Ok(vec![Type::f32(Shape::rows(first, &[num_heads, head_dim]))])
}

/// `x` `[T, heads, head_dim]`, `w` `[head_dim]`: like `x`.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_norm_rope(types: &[&Type], attrs: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [x, w, inv_freq, seqs] = operands(["x", "w", "inv_freq", "seqs"], types)?;
    float(attrs, "eps")?;
    float(attrs, "factor")?;
    let (_, [_, head_dim]) = x.rows()?;
    w.is_vector(head_dim)?;
    frequencies(inv_freq, head_dim)?;
    seqs.is_sequences()?;
    Ok(vec![types[0].clone()])
}

/// The rotated `q` and the new KV state.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_norm_rope_append(types: &[&Type], attrs: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [q, k, v, q_norm, k_norm, inv_freq, kv, seqs] =
        operands(["q", "k", "v", "q_norm", "k_norm", "inv_freq", "kv", "seqs"], types)?;
    float(attrs, "eps")?;
    float(attrs, "factor")?;
    let (first, [num_heads, head_dim]) = q.rows()?;
    let (_, [num_kv_heads, _]) = k.rows()?;
    k.is_f32(first, &[num_kv_heads, head_dim])?;
    q_norm.is_vector(head_dim)?;
    k_norm.is_vector(head_dim)?;
    frequencies(inv_freq, head_dim)?;
    let kv = appended(v, kv, first, [num_kv_heads, head_dim], seqs)?;
    Ok(vec![Type::f32(Shape::rows(first, &[num_heads, head_dim])), kv])
}

/// stub
pub fn eval_append_kv<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_attention<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_gated_attention<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_norm_rope<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_norm_rope_append<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_rope<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
