//! Gated DeltaNet: the causal convolution, the decay and the delta rule, and their fused forms.

use super::check::{Operand, float, operands};
use super::math::{log1p_exp, logistic, map, zip};
use super::norm::{l2_norm, rms_norm};
use crate::attr::Attrs;
use crate::eval::{self, Array, Cx, Datum, EvalError, Real, Sequences, State, attr_float};
use crate::op::ShapeError;
use crate::shape::{Dim, Shape};
use crate::types::{StateKind, TENTATIVE_TOKENS, Type};

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

/// Depthwise causal convolution of each sequence's tokens, and the new window.
/// # Errors
/// [`EvalError`] if the operands do not fit.
pub fn conv1d<F: Real>(
    x: &Array<F>,
    w: &Array<F>,
    conv: &State<F>,
    seqs: &Sequences,
) -> Result<(Array<F>, State<F>), EvalError> {
    let [tokens, heads, width] = x.rank()?;
    let [_, _, taps] = w.rank()?;
    w.is(&[heads, width, taps.max(1)])?;
    conv.is(&[heads, width, taps - 1])?;
    x.is(&[seqs.positions().len().max(tokens), heads, width])?;
    let channels = heads * width;
    let (mut data, mut conv) = (vec![F::default(); x.data().len()], conv.clone());
    // where the input at position `before - (taps - 1)` lies
    let rows = taps - 1 + TENTATIVE_TOKENS as usize;
    let row = |before: usize| (before + TENTATIVE_TOKENS as usize) % rows * channels;
    for run in seqs.runs() {
        let first = seqs.positions()[run.tokens.start] as usize;
        let mut window = vec![F::default(); (taps - 1) * channels];
        if let Some(unit) = conv.unit(run.slot).filter(|_| !seqs.begins(run)) {
            for (i, seen) in window.chunks_mut(channels.max(1)).enumerate() {
                seen.copy_from_slice(&unit[row(first + i)..][..channels]);
            }
        }
        window.extend_from_slice(&x.data()[run.tokens.start * channels..run.tokens.end * channels]);
        for (i, t) in run.tokens.clone().enumerate() {
            for c in 0..channels {
                let products = (0..taps).map(|j| w.data()[c * taps + j].get() * window[(i + j) * channels + c].get());
                data[t * channels + c] = F::of(products.sum());
            }
        }
        // what was seen before the first token is there already, unless the sequence begins
        let known = if seqs.begins(run) { 0 } else { taps - 1 };
        let unit = conv.unit_mut(run.slot);
        for (i, input) in window.chunks(channels.max(1)).enumerate().skip(known) {
            unit[row(first + i)..][..channels].copy_from_slice(input);
        }
    }
    Ok((Array::new(x.dims(), data)?, conv))
}

/// `silu` of [`conv1d`]'s output, as a datum, and the new window.
fn conv1d_silu<F: Real>(
    x: &Datum<F>,
    w: &Datum<F>,
    conv: &Datum<F>,
    seqs: &Datum<F>,
) -> Result<[Datum<F>; 2], EvalError> {
    let (y, conv) = conv1d(x.float()?, w.float()?, conv.state(StateKind::Conv)?, seqs.sequences()?)?;
    Ok([map(&y, |x| x * logistic(x)).into(), Datum::State(conv)])
}

/// `-exp(a_log) · softplus(a + dt_bias)`.
/// # Errors
/// [`EvalError::Dims`] if the operands do not fit.
pub fn decay_gate<F: Real>(a: &Array<F>, a_log: &Array<F>, dt_bias: &Array<F>) -> Result<Array<F>, EvalError> {
    let [tokens, heads] = a.rank()?;
    a_log.is(&[heads])?;
    dt_bias.is(&[heads])?;
    let gate = |i: usize, a: f64| -a_log.data()[i].get().exp() * log1p_exp(a + dt_bias.data()[i].get());
    let data = (0..tokens * heads).map(|i| F::of(gate(i % heads, a.data()[i].get())));
    Array::new(a.dims(), data.collect())
}

/// What one value head sees of one token.
struct DeltaToken<'a, F> {
    q: &'a [F],
    k: &'a [F],
    v: &'a [F],
    g: f64,
    beta: f64,
}

impl<F: Real> DeltaToken<'_, F> {
    /// `S ← exp(g)·S;  d = beta·(v − Sᵀk);  S ← S + k dᵀ;  out = Sᵀq`, with `state` = `S` `[head_k_dim][head_v_dim]`. Gives `k`, `d` and the
    /// decay, from which [`replay`] does the same to `S`.
    fn step(&self, state: &mut [F], out: &mut [F]) -> Vec<F> {
        let (width, decay) = (self.v.len(), F::of(self.g.exp()).get());
        let mut read = vec![0.0; width];
        for (row, k) in state.chunks_exact(width).zip(self.k) {
            let k = decay * k.get();
            read.iter_mut().zip(row).for_each(|(r, s)| *r += s.get() * k);
        }
        let change: Vec<F> = read.iter().zip(self.v).map(|(r, v)| F::of(self.beta * (v.get() - r))).collect();
        let update: Vec<F> = self.k.iter().chain(&change).copied().chain([F::of(decay)]).collect();
        replay(state, &update, width);
        let mut mixed = vec![0.0; width];
        for (row, q) in state.chunks_exact(width).zip(self.q) {
            row.iter().zip(&mut mixed).for_each(|(s, m)| *m += s.get() * q.get());
        }
        out.iter_mut().zip(&mixed).for_each(|(o, m)| *o = F::of(*m));
        update
    }
}

/// `S ← decay·S + k dᵀ` for one update `(k, d, decay)`.
fn replay<F: Real>(state: &mut [F], update: &[F], width: usize) {
    let (k, rest) = update.split_at(state.len() / width);
    let (change, decay) = (&rest[..width], rest[width].get());
    for (row, k) in state.chunks_exact_mut(width).zip(k) {
        row.iter_mut().zip(change).for_each(|(s, d)| *s = F::of(decay * s.get() + k.get() * d.get()));
    }
}

/// The operands of the delta rule, as arrays.
struct DeltaInputs<'a, F> {
    q: &'a Array<F>,
    k: &'a Array<F>,
    v: &'a Array<F>,
    g: &'a Array<F>,
    beta: &'a Array<F>,
}

impl<F: Real> DeltaInputs<'_, F> {
    /// Heads and widths `[num_k_heads, head_k_dim, num_v_heads, head_v_dim]`, if all operands agree.
    fn dims(&self, delta: &State<F>, seqs: &Sequences) -> Result<[usize; 4], EvalError> {
        let [tokens, num_k_heads, head_k_dim] = self.q.rank()?;
        let [_, num_v_heads, head_v_dim] = self.v.rank()?;
        self.q.is(&[seqs.positions().len().max(tokens), num_k_heads, head_k_dim])?;
        self.k.is(self.q.dims())?;
        self.v.is(&[tokens, num_v_heads, head_v_dim])?;
        self.g.is(&[tokens, num_v_heads])?;
        self.beta.is(&[tokens, num_v_heads])?;
        delta.is(&[num_v_heads, head_k_dim, head_v_dim])?;
        if num_k_heads == 0 || num_v_heads % num_k_heads != 0 || head_k_dim * head_v_dim == 0 {
            let expected = format!("a multiple of {num_k_heads} heads, none empty");
            return Err(EvalError::Dims { found: self.v.dims().to_vec(), expected });
        }
        Ok([num_k_heads, head_k_dim, num_v_heads, head_v_dim])
    }

    /// The recurrence over each sequence's tokens: the output and the new state.
    fn run(&self, delta: &State<F>, seqs: &Sequences) -> Result<Vec<Datum<F>>, EvalError> {
        let [num_k_heads, dk, num_v_heads, dv] = self.dims(delta, seqs)?;
        let (mut data, mut delta) = (vec![F::default(); self.v.data().len()], delta.clone());
        for run in seqs.runs() {
            let state = delta.unit_mut(run.slot);
            let head_elems = state.len() / num_v_heads;
            for (head, unit) in state.chunks_exact_mut(head_elems).enumerate() {
                let (matrix, kept) = unit.split_at_mut(dk * dv);
                if seqs.begins(run) {
                    matrix.fill(F::default());
                }
                let update_elems = dk + dv + 1;
                kept.chunks_exact(update_elems).take(run.replay).for_each(|update| replay(matrix, update, dv));
                let mut tentative = if run.tentative { matrix.to_vec() } else { Vec::new() };
                for (i, t) in run.tokens.clone().enumerate() {
                    let at = t * num_v_heads + head;
                    let key = t * num_k_heads + head / (num_v_heads / num_k_heads);
                    let token = DeltaToken {
                        q: &self.q.data()[key * dk..(key + 1) * dk],
                        k: &self.k.data()[key * dk..(key + 1) * dk],
                        v: &self.v.data()[at * dv..(at + 1) * dv],
                        g: self.g.data()[at].get(),
                        beta: self.beta.data()[at].get(),
                    };
                    let out = &mut data[at * dv..(at + 1) * dv];
                    if run.tentative {
                        let update = token.step(&mut tentative, out);
                        kept[i * update_elems..(i + 1) * update_elems].copy_from_slice(&update);
                    } else {
                        token.step(matrix, out);
                    }
                }
            }
        }
        Ok(vec![Datum::floats(self.v.dims(), data)?, Datum::State(delta)])
    }
}

/// [`conv1d`] as an op.
/// # Errors
/// [`EvalError`]; so for the functions below.
pub fn eval_conv1d<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [x, w, conv, seqs] = eval::operands(args)?;
    let (y, conv) = conv1d(x.float()?, w.float()?, conv.state(StateKind::Conv)?, seqs.sequences()?)?;
    Ok(vec![y.into(), Datum::State(conv)])
}

/// `silu` of the convolution.
/// # Errors
/// [`EvalError`].
pub fn eval_conv1d_silu<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [x, w, conv, seqs] = eval::operands(args)?;
    Ok(conv1d_silu(x, w, conv, seqs)?.into())
}

/// [`decay_gate`] as an op.
/// # Errors
/// [`EvalError`].
pub fn eval_decay_gate<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [a, a_log, dt_bias] = eval::operands(args)?;
    Ok(vec![decay_gate(a.float()?, a_log.float()?, dt_bias.float()?)?.into()])
}

/// The recurrence over each sequence's tokens.
/// # Errors
/// [`EvalError`].
pub fn eval_delta_rule<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [q, k, v, g, beta, delta, seqs] = eval::operands(args)?;
    let inputs = DeltaInputs { q: q.float()?, k: k.float()?, v: v.float()?, g: g.float()?, beta: beta.float()? };
    inputs.run(delta.state(StateKind::Delta)?, seqs.sequences()?)
}

/// `delta_rule` of `scale · l2_norm(q)`, `l2_norm(k)`, `v`, `decay_gate(a, ..)` and `sigmoid(b)`.
/// # Errors
/// [`EvalError`].
pub fn eval_delta_rule_gated<F: Real>(_: &Cx<F>, args: &[Datum<F>], attrs: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [q, k, v, a, b, a_log, dt_bias, delta, seqs] = eval::operands(args)?;
    let (eps, scale) = (attr_float(attrs, "eps")?, attr_float(attrs, "scale")?);
    let inputs = DeltaInputs {
        q: &map(&l2_norm(q.float()?, eps)?, |x| x * scale),
        k: &l2_norm(k.float()?, eps)?,
        v: v.float()?,
        g: &decay_gate(a.float()?, a_log.float()?, dt_bias.float()?)?,
        beta: &map(b.float()?, logistic),
    };
    inputs.run(delta.state(StateKind::Delta)?, seqs.sequences()?)
}

/// `rms_norm(out, norm) · silu(z)` of the output of `delta_rule_gated`.
/// # Errors
/// [`EvalError`].
pub fn eval_delta_rule_normed<F: Real>(
    cx: &Cx<F>,
    args: &[Datum<F>],
    attrs: &Attrs,
) -> Result<Vec<Datum<F>>, EvalError> {
    let [q, k, v, z, a, b, a_log, dt_bias, norm, delta, seqs] = eval::operands(args)?;
    let gated = [q, k, v, a, b, a_log, dt_bias, delta, seqs].map(Clone::clone);
    let mut results = eval_delta_rule_gated(cx, &gated, attrs)?;
    let normed = rms_norm(results[0].float()?, norm.float()?, attr_float(attrs, "norm_eps")?, |w| w)?;
    results[0] = zip(&normed, &map(z.float()?, |z| z * logistic(z)), |o, z| o * z)?.into();
    Ok(results)
}

/// `delta_rule_normed` of the `conv1d_silu` of q, k and v.
/// # Errors
/// [`EvalError`].
pub fn eval_gated_delta_net<F: Real>(cx: &Cx<F>, args: &[Datum<F>], attrs: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [q, k, v, z, a, b, w_q, w_k, w_v, a_log, dt_bias, norm, conv_q, conv_k, conv_v, delta, seqs] =
        eval::operands(args)?;
    let [q, conv_q] = conv1d_silu(q, w_q, conv_q, seqs)?;
    let [k, conv_k] = conv1d_silu(k, w_k, conv_k, seqs)?;
    let [v, conv_v] = conv1d_silu(v, w_v, conv_v, seqs)?;
    let rest = [z, a, b, a_log, dt_bias, norm, delta, seqs].map(Clone::clone);
    let mut results = eval_delta_rule_normed(cx, &[&[q, k, v], rest.as_slice()].concat(), attrs)?;
    results.splice(1..1, [conv_q, conv_k, conv_v]);
    Ok(results)
}
