//! The mixer of a full-attention layer: causal softmax attention with normed heads, partial rotary embedding and an
//! output gate; and its part that later tokens need.

use nextc_ir::build::BuildError;
use nextc_ir::{Attrs, DType, Op, Type, Value};

use super::part::{Part, PartBuilder};
use super::{Weights, add_residual, eps, stream_types};
use crate::config::ModelConfig;

/// `@attention.I(x, ssq, seqs, kv, weights...) -> (x, ssq, kv)`.
pub(super) fn build(of: (&Weights, &ModelConfig, DType), name: &str, prefix: &str) -> Result<Part, BuildError> {
    let (mut p, Front { x, h, seqs, kv }) = begin(of, name, prefix)?;
    let c = of.1;
    let [w_q, w_gate, q_norm] = ["w_q", "w_gate", "q_norm"].map(|n| p.weight(n));
    let q = p.op(Op::Linear, &[h, w_q])?;
    let gate = p.op(Op::Linear, &[h, w_gate])?;
    let (k, v, inv_freq) = keys_and_values(&mut p, c, h, seqs)?;
    let w_o = p.weight("w_o");
    let q = norm_rope(&mut p, c, [q, q_norm, inv_freq, seqs])?;
    let kv = p.op(Op::AppendKv, &[k, v, kv, seqs])?;
    let scale = Attrs::none().with("scale", (c.head_dim as f64).powf(-0.5));
    let o = p.op_with(Op::Attention, &[q, kv, seqs], scale)?;
    let gate = p.op(Op::Sigmoid, &[gate])?;
    let o = p.op(Op::Mul, &[o, gate])?;
    let y = p.op(Op::Linear, &[o, w_o])?;
    let [x, ssq] = add_residual(&mut p, x, y)?;
    Ok(p.finish(vec![x, ssq, kv]))
}

/// `@keys.I(x, ssq, seqs, kv, weights...) -> (kv)`: keys and values of tokens of which nothing else is wanted.
pub(super) fn keys(of: (&Weights, &ModelConfig, DType), name: &str, prefix: &str) -> Result<Part, BuildError> {
    let (mut p, Front { h, seqs, kv, .. }) = begin(of, name, prefix)?;
    let (k, v, _) = keys_and_values(&mut p, of.1, h, seqs)?;
    let kv = p.op(Op::AppendKv, &[k, v, kv, seqs])?;
    Ok(p.finish(vec![kv]))
}

/// What a mixer begins with.
struct Front {
    x: Value,
    /// The normed stream.
    h: Value,
    seqs: Value,
    kv: Value,
}

fn begin<'a>(
    (w, c, kv): (&'a Weights, &ModelConfig, DType),
    name: &str,
    prefix: &'a str,
) -> Result<(PartBuilder<'a>, Front), BuildError> {
    let mut p = PartBuilder::new(w, name, prefix);
    let [x, ssq] = p.stream(stream_types(c));
    let seqs = p.sequences();
    let kv = p.state("kv", Type::kv(c.num_kv_heads, c.head_dim, kv));
    let gain = p.weight("input_norm");
    let h = p.op_with(Op::RmsNormSsq, &[x, ssq, gain], eps(c.rms_norm_eps))?;
    Ok((p, Front { x, h, seqs, kv }))
}

/// Keys, normed and rotated, values, and the frequencies.
fn keys_and_values(
    p: &mut PartBuilder<'_>,
    c: &ModelConfig,
    h: Value,
    seqs: Value,
) -> Result<(Value, Value, Value), BuildError> {
    let [w_k, w_v, k_norm] = ["w_k", "w_v", "k_norm"].map(|n| p.weight(n));
    let inv_freq = p.weight_as("inv_freq", "inv_freq".into());
    let k = p.op(Op::Linear, &[h, w_k])?;
    let v = p.op(Op::Linear, &[h, w_v])?;
    let k = norm_rope(p, c, [k, k_norm, inv_freq, seqs])?;
    Ok((k, v, inv_freq))
}

fn norm_rope(
    p: &mut PartBuilder<'_>,
    c: &ModelConfig,
    [x, gain, inv_freq, seqs]: [Value; 4],
) -> Result<Value, BuildError> {
    let x = p.op_with(Op::RmsNormPlusOne, &[x, gain], eps(c.rms_norm_eps))?;
    p.op_with(Op::Rope, &[x, inv_freq, seqs], Attrs::none().with("factor", c.rope.factor()))
}
