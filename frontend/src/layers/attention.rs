//! The mixer of a full-attention layer: causal softmax attention with normed heads, partial rotary embedding and an
//! output gate.

use nextc_ir::build::BuildError;
use nextc_ir::{Attrs, DType, Op, Type};

use super::part::{Part, PartBuilder};
use super::{Weights, add_residual, eps, stream_types};
use crate::config::ModelConfig;

/// `@attention.I(x, ssq, seqs, kv, weights...) -> (x, ssq, kv)`.
pub(super) fn build((w, c, kv): (&Weights, &ModelConfig, DType), name: &str, prefix: &str) -> Result<Part, BuildError> {
    let mut p = PartBuilder::new(w, name, prefix);
    let [x, ssq] = p.stream(stream_types(c));
    let seqs = p.sequences();
    let kv = p.state("kv", Type::kv(c.num_kv_heads, c.head_dim, kv));
    let gain = p.weight("input_norm");
    let [w_q, w_gate, w_k, w_v] = ["w_q", "w_gate", "w_k", "w_v"].map(|n| p.weight(n));
    let [q_norm, k_norm] = ["q_norm", "k_norm"].map(|n| p.weight(n));
    let inv_freq = p.weight_as("inv_freq", "inv_freq".into());
    let w_o = p.weight("w_o");

    let norm = eps(c.rms_norm_eps);
    let h = p.op_with(Op::RmsNormSsq, &[x, ssq, gain], norm.clone())?;
    let q = p.op(Op::Linear, &[h, w_q])?;
    let gate = p.op(Op::Linear, &[h, w_gate])?;
    let k = p.op(Op::Linear, &[h, w_k])?;
    let v = p.op(Op::Linear, &[h, w_v])?;
    let rope = Attrs::none().with("factor", c.rope.factor());
    let q = p.op_with(Op::RmsNormPlusOne, &[q, q_norm], norm.clone())?;
    let q = p.op_with(Op::Rope, &[q, inv_freq, seqs], rope.clone())?;
    let k = p.op_with(Op::RmsNormPlusOne, &[k, k_norm], norm)?;
    let k = p.op_with(Op::Rope, &[k, inv_freq, seqs], rope)?;
    let kv = p.op(Op::AppendKv, &[k, v, kv, seqs])?;
    let scale = Attrs::none().with("scale", (c.head_dim as f64).powf(-0.5));
    let o = p.op_with(Op::Attention, &[q, kv, seqs], scale)?;
    let gate = p.op(Op::Sigmoid, &[gate])?;
    let o = p.op(Op::Mul, &[o, gate])?;
    let y = p.op(Op::Linear, &[o, w_o])?;
    let [x, ssq] = add_residual(&mut p, x, y)?;
    Ok(p.finish(vec![x, ssq, kv]))
}
