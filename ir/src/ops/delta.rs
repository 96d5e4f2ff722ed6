//! Gated DeltaNet: the causal convolution, the decay and the delta rule, and their fused forms.

use super::check::{Operand, float, operands};
use crate::attr::Attrs;
use crate::eval::{Cx, Datum, EvalError};
use crate::op::ShapeError;
use crate::shape::{Dim, Shape};
use crate::types::{StateKind, Type};

/// `x` `[T, heads, width]`, `w` `[heads, width, taps]`: like `x`, and the new window.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_conv1d(types: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [x, w, conv, seqs] = operands(["x", "w", "conv", "seqs"], types)?;
    seqs.is_sequences()?;
    Ok(vec![types[0].clone(), convolved(x, w, conv)?])
}

/// The new window of a convolution of `x`.
fn convolved(x: Operand, w: Operand, conv: Operand) -> Result<Type, ShapeError> {
    let (_, [heads, width]) = x.rows()?;
    let [_, _, taps] = w.weight()?;
    if taps == 0 {
        return Err(w.wrong("at least one tap"));
    }
    w.is_weight(&[heads, width, taps])?;
    conv.is_state(StateKind::Conv, &[heads, width, taps - 1])
}

/// `a` `[T, num_v_heads]`, `a_log` and `dt_bias` `[num_v_heads]`: like `a`.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_decay_gate(types: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [a, a_log, dt_bias] = operands(["a", "a_log", "dt_bias"], types)?;
    let (_, [num_v_heads]) = a.rows()?;
    a_log.is_vector(num_v_heads)?;
    dt_bias.is_vector(num_v_heads)?;
    Ok(vec![types[0].clone()])
}

/// What q, k and v say about the heads.
struct Heads {
    first: Dim,
    num_v_heads: u64,
    head_v_dim: u64,
    state: [u64; 3],
}

/// Checks q, k and v against each other.
fn heads(q: Operand, k: Operand, v: Operand) -> Result<Heads, ShapeError> {
    let (first, [num_k_heads, head_k_dim]) = q.rows()?;
    k.is_f32(first, &[num_k_heads, head_k_dim])?;
    let (_, [num_v_heads, head_v_dim]) = v.rows()?;
    v.is_f32(first, &[num_v_heads, head_v_dim])?;
    if num_k_heads == 0 || num_v_heads % num_k_heads != 0 {
        return Err(v.wrong(format!("a multiple of {num_k_heads} heads")));
    }
    Ok(Heads { first, num_v_heads, head_v_dim, state: [num_v_heads, head_k_dim, head_v_dim] })
}

impl Heads {
    /// Demands one number a value head.
    fn per_head(&self, operands: &[Operand]) -> Result<(), ShapeError> {
        operands.iter().try_for_each(|o| o.is_f32(self.first, &[self.num_v_heads]))
    }

    /// The output and the new state.
    fn results(&self, delta: Operand, seqs: Operand) -> Result<Vec<Type>, ShapeError> {
        let state = delta.is_state(StateKind::Delta, &self.state)?;
        seqs.is_sequences()?;
        Ok(vec![Type::f32(Shape::rows(self.first, &[self.num_v_heads, self.head_v_dim])), state])
    }

    /// Checks `a`, `b`, `a_log` and `dt_bias` of the gated forms.
    fn gates(&self, per_token: [Operand; 2], per_head: [Operand; 2], attrs: &Attrs) -> Result<(), ShapeError> {
        float(attrs, "eps")?;
        float(attrs, "scale")?;
        self.per_head(&per_token)?;
        per_head.iter().try_for_each(|o| o.is_vector(self.num_v_heads))
    }

    /// Checks `z` and `norm` of the gated norm behind the rule.
    fn epilogue(&self, z: Operand, norm: Operand, attrs: &Attrs) -> Result<(), ShapeError> {
        float(attrs, "norm_eps")?;
        z.is_f32(self.first, &[self.num_v_heads, self.head_v_dim])?;
        norm.is_vector(self.head_v_dim)
    }
}

/// `q`, `k` `[T, num_k_heads, head_k_dim]`, `v` `[T, num_v_heads, head_v_dim]`, `g`, `beta` `[T, num_v_heads]`: like `v`, and the new state.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_delta_rule(types: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [q, k, v, g, beta, delta, seqs] = operands(["q", "k", "v", "g", "beta", "delta", "seqs"], types)?;
    let heads = heads(q, k, v)?;
    heads.per_head(&[g, beta])?;
    heads.results(delta, seqs)
}

/// As [`shape_delta_rule`], from `a` and `b` `[T, num_v_heads]`.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_delta_rule_gated(types: &[&Type], attrs: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [q, k, v, a, b, a_log, dt_bias, delta, seqs] =
        operands(["q", "k", "v", "a", "b", "a_log", "dt_bias", "delta", "seqs"], types)?;
    let heads = heads(q, k, v)?;
    heads.gates([a, b], [a_log, dt_bias], attrs)?;
    heads.results(delta, seqs)
}

/// As [`shape_delta_rule_gated`], with `z` like `v` and `norm` `[head_v_dim]`.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_delta_rule_normed(types: &[&Type], attrs: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [q, k, v, z, a, b, a_log, dt_bias, norm, delta, seqs] =
        operands(["q", "k", "v", "z", "a", "b", "a_log", "dt_bias", "norm", "delta", "seqs"], types)?;
    let heads = heads(q, k, v)?;
    heads.gates([a, b], [a_log, dt_bias], attrs)?;
    heads.epilogue(z, norm, attrs)?;
    heads.results(delta, seqs)
}

/// As [`shape_delta_rule_normed`], with the convolutions of q, k and v: the output, and the new `conv_q`, `conv_k`, `conv_v`, `delta`.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_gated_delta_net(types: &[&Type], attrs: &Attrs) -> Result<Vec<Type>, ShapeError> {
    #[rustfmt::skip]
    let [q, k, v, z, a, b, w_q, w_k, w_v, a_log, dt_bias, norm, conv_q, conv_k, conv_v, delta, seqs] = operands(
        ["q", "k", "v", "z", "a", "b", "w_q", "w_k", "w_v", "a_log", "dt_bias", "norm", "conv_q", "conv_k", "conv_v", "delta", "seqs"],
        types,
    )?;
    let heads = heads(q, k, v)?;
    heads.gates([a, b], [a_log, dt_bias], attrs)?;
    heads.epilogue(z, norm, attrs)?;
    let windows = [convolved(q, w_q, conv_q)?, convolved(k, w_k, conv_k)?, convolved(v, w_v, conv_v)?];
    let mut results = heads.results(delta, seqs)?;
    results.splice(1..1, windows);
    Ok(results)
}

/// stub
pub fn eval_conv1d<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_conv1d_silu<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_decay_gate<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_delta_rule<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_delta_rule_gated<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_delta_rule_normed<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}

/// stub
pub fn eval_gated_delta_net<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
