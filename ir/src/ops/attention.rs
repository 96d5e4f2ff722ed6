//! Gated attention: rotary embedding, the KV state, and the attention over it.

use super::check::{Operand, float, operands};
use super::math::{dot, logistic, map, zip};
use super::norm::rms_norm_plus_one;
use crate::attr::Attrs;
use crate::eval::{self, Array, Cx, Datum, EvalError, Real, Sequences, State, attr_float};
use crate::op::ShapeError;
use crate::shape::{Dim, Shape};
use crate::stored::Stored;
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
    let (first, [num_heads, head_dim]) = q.rows()?;
    let (_, [num_kv_heads, _]) = k.rows()?;
    k.is_f32(first, &[num_kv_heads, head_dim])?;
    q_norm.is_vector(head_dim)?;
    let kv = normed_and_appended([k, v, k_norm, inv_freq, kv, seqs], attrs)?;
    Ok(vec![Type::f32(Shape::rows(first, &[num_heads, head_dim])), kv])
}

/// `k`, `v` `[T, num_kv_heads, head_dim]` and a state of the same: the new state.
/// # Errors
/// [`ShapeError`] naming the operand that does not fit.
pub fn shape_norm_append(types: &[&Type], attrs: &Attrs) -> Result<Vec<Type>, ShapeError> {
    normed_and_appended(operands(["k", "v", "k_norm", "inv_freq", "kv", "seqs"], types)?, attrs).map(|kv| vec![kv])
}

/// The new KV state of keys that are normed and rotated before.
fn normed_and_appended([k, v, k_norm, inv_freq, kv, seqs]: [Operand; 6], attrs: &Attrs) -> Result<Type, ShapeError> {
    float(attrs, "eps")?;
    float(attrs, "factor")?;
    let (first, heads) = k.rows::<2>()?;
    k_norm.is_vector(heads[1])?;
    frequencies(inv_freq, heads[1])?;
    appended(v, kv, first, heads, seqs)
}

/// Rotates the pairs (`j`, `j + n`) of every head of the rows that belong to a sequence; other rows become zero.
/// # Errors
/// [`EvalError`] if the operands do not fit.
pub fn rope<F: Real>(x: &Array<F>, inv_freq: &Array<F>, seqs: &Sequences, factor: f64) -> Result<Array<F>, EvalError> {
    let [tokens, heads, head_dim] = x.rank()?;
    let [n] = inv_freq.rank()?;
    if 2 * n > head_dim || seqs.positions().len() != tokens {
        let expected = format!("{} rows of at least {} columns", seqs.positions().len(), 2 * n);
        return Err(EvalError::Dims { found: x.dims().to_vec(), expected });
    }
    let mut data = vec![F::default(); x.data().len()];
    for t in seqs.runs().iter().flat_map(|run| run.tokens.clone()) {
        for head in t * heads..(t + 1) * heads {
            let (from, to) = (head * head_dim, (head + 1) * head_dim);
            let (x, out) = (&x.data()[from..to], &mut data[from..to]);
            out.copy_from_slice(x);
            for (j, f) in inv_freq.data().iter().enumerate() {
                let (sin, cos) = F::of(f64::from(seqs.positions()[t]) * f.get()).get().sin_cos();
                let (sin, cos) = (sin * factor, cos * factor);
                let (a, b) = (x[j].get(), x[j + n].get());
                out[j] = F::of(a * cos - b * sin);
                out[j + n] = F::of(b * cos + a * sin);
            }
        }
    }
    Array::new(x.dims(), data)
}

/// The state with keys and values written at their positions, rounded to what it stores.
/// # Errors
/// [`EvalError`] if the operands do not fit or a position has no page.
pub fn append_kv<F: Real>(
    cx: &Cx<F>,
    k: &Array<F>,
    v: &Array<F>,
    kv: &State<F>,
    seqs: &Sequences,
) -> Result<State<F>, EvalError> {
    let [tokens, heads, head_dim] = k.rank()?;
    v.is(k.dims())?;
    kv.is(&[heads, head_dim])?;
    k.is(&[seqs.positions().len().max(tokens), heads, head_dim])?;
    let mut kv = kv.clone();
    let stored = kv.ty().stored;
    for run in seqs.runs() {
        for t in run.tokens.clone() {
            let (page, at) = seqs.page(run.sequence, seqs.positions()[t] as usize, cx.page_tokens)?;
            let unit = kv.unit_mut(page);
            for head in 0..heads {
                for (which, x) in [k, v].into_iter().enumerate() {
                    let to = ((head * 2 + which) * cx.page_tokens + at) * head_dim;
                    let row = &x.row(t)[head * head_dim..(head + 1) * head_dim];
                    unit[to..to + head_dim].copy_from_slice(&kept(stored, row));
                }
            }
        }
    }
    Ok(kv)
}

/// A row as a state keeps it.
fn kept<F: Real>(stored: Stored, row: &[F]) -> Vec<F> {
    if stored == Stored::F32 {
        return row.to_vec();
    }
    let mut row: Vec<f32> = row.iter().map(|x| x.get() as f32).collect();
    stored.round(&mut row);
    row.into_iter().map(|x| F::of(f64::from(x))).collect()
}

/// Keys (`which` = 0) or values (1) of one kv head at positions `0..count` of a sequence.
fn context<F: Real>(
    cx: &Cx<F>,
    kv: &State<F>,
    seqs: &Sequences,
    (sequence, count): (usize, usize),
    (head, which, head_dim): (usize, usize, usize),
) -> Result<Vec<F>, EvalError> {
    let mut rows = Vec::with_capacity(count * head_dim);
    for position in 0..count {
        let (page, at) = seqs.page(sequence, position, cx.page_tokens)?;
        let from = ((head * 2 + which) * cx.page_tokens + at) * head_dim;
        match kv.unit(page) {
            Some(unit) => rows.extend_from_slice(&unit[from..from + head_dim]),
            None => rows.resize(rows.len() + head_dim, F::default()),
        }
    }
    Ok(rows)
}

/// `softmax(scale · q kᵀ) v` of one query over the keys and values of positions `0..=p`, appended to `out`.
fn attend<F: Real>(q: &[F], keys: &[F], values: &[F], scale: f64, out: &mut [F]) {
    let mut weights: Vec<f64> = keys.chunks_exact(q.len()).map(|k| scale * dot(q, k)).collect();
    let max = weights.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    weights.iter_mut().for_each(|w| *w = (*w - max).exp());
    let sum: f64 = weights.iter().sum();
    let mut mixed = vec![0.0; q.len()];
    for (w, v) in weights.iter().zip(values.chunks_exact(q.len())) {
        mixed.iter_mut().zip(v).for_each(|(m, v)| *m += w * v.get());
    }
    out.iter_mut().zip(&mixed).for_each(|(o, m)| *o = F::of(m / sum));
}

/// Causal attention by absolute position; rows without a sequence become zero.
/// # Errors
/// [`EvalError`] if the operands do not fit or a position has no page.
pub fn attention<F: Real>(
    cx: &Cx<F>,
    q: &Array<F>,
    kv: &State<F>,
    seqs: &Sequences,
    scale: f64,
) -> Result<Array<F>, EvalError> {
    let [tokens, heads, head_dim] = q.rank()?;
    let kv_heads = kv.ty().dims.first().map_or(0, |&h| h as usize);
    kv.is(&[kv_heads, head_dim])?;
    q.is(&[seqs.positions().len().max(tokens), heads, head_dim])?;
    if kv_heads == 0 || heads % kv_heads != 0 || head_dim == 0 {
        return Err(EvalError::Dims { found: q.dims().to_vec(), expected: format!("a multiple of {kv_heads} heads") });
    }
    let mut data = vec![F::default(); q.data().len()];
    for run in seqs.runs() {
        let positions = &seqs.positions()[run.tokens.clone()];
        let count = positions.iter().max().map_or(0, |&p| p as usize + 1);
        for kv_head in 0..kv_heads {
            let keys = context(cx, kv, seqs, (run.sequence, count), (kv_head, 0, head_dim))?;
            let values = context(cx, kv, seqs, (run.sequence, count), (kv_head, 1, head_dim))?;
            for t in run.tokens.clone() {
                let seen = (seqs.positions()[t] as usize + 1) * head_dim;
                for head in heads / kv_heads * kv_head..heads / kv_heads * (kv_head + 1) {
                    let at = (t * heads + head) * head_dim..(t * heads + head + 1) * head_dim;
                    attend(&q.data()[at.clone()], &keys[..seen], &values[..seen], scale, &mut data[at]);
                }
            }
        }
    }
    Array::new(q.dims(), data)
}

/// [`rope`] as an op.
/// # Errors
/// [`EvalError`]; so for the functions below.
pub fn eval_rope<F: Real>(_: &Cx<F>, args: &[Datum<F>], attrs: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [x, inv_freq, seqs] = eval::operands(args)?;
    Ok(vec![rope(x.float()?, inv_freq.float()?, seqs.sequences()?, attr_float(attrs, "factor")?)?.into()])
}

/// [`append_kv`] as an op.
/// # Errors
/// [`EvalError`].
pub fn eval_append_kv<F: Real>(cx: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [k, v, kv, seqs] = eval::operands(args)?;
    let kv = append_kv(cx, k.float()?, v.float()?, kv.state(StateKind::Kv)?, seqs.sequences()?)?;
    Ok(vec![Datum::State(kv)])
}

/// [`attention`] as an op.
/// # Errors
/// [`EvalError`].
pub fn eval_attention<F: Real>(cx: &Cx<F>, args: &[Datum<F>], attrs: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [q, kv, seqs] = eval::operands(args)?;
    let scale = attr_float(attrs, "scale")?;
    Ok(vec![attention(cx, q.float()?, kv.state(StateKind::Kv)?, seqs.sequences()?, scale)?.into()])
}

/// `attention(q, kv) · sigmoid(output_gate)`.
/// # Errors
/// [`EvalError`].
pub fn eval_gated_attention<F: Real>(cx: &Cx<F>, args: &[Datum<F>], attrs: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [q, output_gate, kv, seqs] = eval::operands(args)?;
    let scale = attr_float(attrs, "scale")?;
    let out = attention(cx, q.float()?, kv.state(StateKind::Kv)?, seqs.sequences()?, scale)?;
    Ok(vec![zip(&out, &map(output_gate.float()?, logistic), |o, g| o * g)?.into()])
}

/// `rope(rms_norm_plus_one(x, w))`.
fn norm_rope<F: Real>(
    x: &Datum<F>,
    w: &Datum<F>,
    inv_freq: &Datum<F>,
    seqs: &Datum<F>,
    attrs: &Attrs,
) -> Result<Array<F>, EvalError> {
    let normed = rms_norm_plus_one(x.float()?, w.float()?, attr_float(attrs, "eps")?)?;
    rope(&normed, inv_freq.float()?, seqs.sequences()?, attr_float(attrs, "factor")?)
}

/// `rope(rms_norm_plus_one(x, w))`.
/// # Errors
/// [`EvalError`].
pub fn eval_norm_rope<F: Real>(_: &Cx<F>, args: &[Datum<F>], attrs: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [x, w, inv_freq, seqs] = eval::operands(args)?;
    Ok(vec![norm_rope(x, w, inv_freq, seqs, attrs)?.into()])
}

/// `(norm_rope(q), append_kv(norm_rope(k), v))`.
/// # Errors
/// [`EvalError`].
pub fn eval_norm_rope_append<F: Real>(
    cx: &Cx<F>,
    args: &[Datum<F>],
    attrs: &Attrs,
) -> Result<Vec<Datum<F>>, EvalError> {
    let [q, k, v, q_norm, k_norm, inv_freq, kv, seqs] = eval::operands(args)?;
    let q = norm_rope(q, q_norm, inv_freq, seqs, attrs)?;
    let kv = norm_append(cx, [k, v, k_norm, inv_freq, kv, seqs], attrs)?;
    Ok(vec![q.into(), kv])
}

/// `append_kv(norm_rope(k), v)`.
/// # Errors
/// [`EvalError`].
pub fn eval_norm_append<F: Real>(cx: &Cx<F>, args: &[Datum<F>], attrs: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [k, v, k_norm, inv_freq, kv, seqs] = eval::operands(args)?;
    Ok(vec![norm_append(cx, [k, v, k_norm, inv_freq, kv, seqs], attrs)?])
}

fn norm_append<F: Real>(
    cx: &Cx<F>,
    [k, v, k_norm, inv_freq, kv, seqs]: [&Datum<F>; 6],
    attrs: &Attrs,
) -> Result<Datum<F>, EvalError> {
    let k = norm_rope(k, k_norm, inv_freq, seqs, attrs)?;
    append_kv(cx, &k, v.float()?, kv.state(StateKind::Kv)?, seqs.sequences()?).map(Datum::State)
}
