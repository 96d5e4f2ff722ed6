//! The mixer of a full-attention layer: causal softmax attention with normed heads, partial rotary embedding and an
//! output gate; and its part that later tokens need.

use nextc_ir::build::BuildError;
use nextc_ir::{Attrs, Op, Stored, Type, Value};

use super::part::{Part, PartBuilder};
use super::{Weights, add_residual, eps, stream_types};
use crate::config::ModelConfig;

/// `@attention.I(x, ssq, seqs, kv, weights...) -> (x, ssq, kv)`.
pub(super) fn build(of: (&Weights, &ModelConfig, Stored), name: &str, prefix: &str) -> Result<Part, BuildError> {
    let (mut p, front) = begin(of, name, prefix)?;
    let (c, Front { x, h, seqs, .. }) = (of.1, front);
    let [w_q, w_gate, q_norm] = ["w_q", "w_gate", "q_norm"].map(|n| p.weight(n));
    let q = p.op(Op::Linear, &[h, w_q])?;
    let gate = p.op(Op::Linear, &[h, w_gate])?;
    let (kv, inv_freq) = append_keys(&mut p, c, front)?;
    let w_o = p.weight("w_o");
    let q = norm_rope(&mut p, c, [q, q_norm, inv_freq, seqs])?;
    let scale = Attrs::none().with("scale", (c.head_dim as f64).powf(-0.5));
    let o = p.op_with(Op::Attention, &[q, kv, seqs], scale)?;
    let gate = p.op(Op::Sigmoid, &[gate])?;
    let o = p.op(Op::Mul, &[o, gate])?;
    let y = p.op(Op::Linear, &[o, w_o])?;
    let [x, ssq] = add_residual(&mut p, x, y)?;
    Ok(p.finish(vec![x, ssq, kv]))
}

/// `@keys.I(x, ssq, seqs, kv, weights...) -> (kv)`: keys and values of tokens of which nothing else is wanted.
pub(super) fn keys(of: (&Weights, &ModelConfig, Stored), name: &str, prefix: &str) -> Result<Part, BuildError> {
    let (mut p, front) = begin(of, name, prefix)?;
    let (kv, _) = append_keys(&mut p, of.1, front)?;
    Ok(p.finish(vec![kv]))
}

/// What a mixer begins with.
#[derive(Clone, Copy)]
struct Front {
    x: Value,
    /// The normed stream.
    h: Value,
    seqs: Value,
    kv: Value,
}

fn begin<'a>(
    (w, c, kv): (&'a Weights, &ModelConfig, Stored),
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

/// The state with keys, normed and rotated, and values; and the frequencies.
fn append_keys(
    p: &mut PartBuilder<'_>,
    c: &ModelConfig,
    Front { h, seqs, kv, .. }: Front,
) -> Result<(Value, Value), BuildError> {
    let [w_k, w_v, k_norm] = ["w_k", "w_v", "k_norm"].map(|n| p.weight(n));
    let inv_freq = p.weight_as("inv_freq", "inv_freq".into());
    let k = p.op(Op::Linear, &[h, w_k])?;
    let v = p.op(Op::Linear, &[h, w_v])?;
    let k = norm_rope(p, c, [k, k_norm, inv_freq, seqs])?;
    Ok((p.op(Op::AppendKv, &[k, v, kv, seqs])?, inv_freq))
}

fn norm_rope(
    p: &mut PartBuilder<'_>,
    c: &ModelConfig,
    [x, gain, inv_freq, seqs]: [Value; 4],
) -> Result<Value, BuildError> {
    let x = p.op_with(Op::RmsNormPlusOne, &[x, gain], eps(c.rms_norm_eps))?;
    p.op_with(Op::Rope, &[x, inv_freq, seqs], Attrs::none().with("factor", c.rope.factor()))
}
