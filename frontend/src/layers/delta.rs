//! The mixer of a linear layer: Gated DeltaNet.
//!
//! Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks", arXiv:2412.06464.

use nextc_ir::build::BuildError;
use nextc_ir::types::StateKind;
use nextc_ir::{Attrs, Op, Type, Value};

use super::part::{Part, PartBuilder};
use super::{Weights, add_residual, eps, stream_types};
use crate::config::ModelConfig;

/// Added to the sum of squares when q and k are normalised; a constant of the architecture, not `rms_norm_eps`.
const L2_NORM_EPS: f64 = 1e-6;

/// `@delta.I(x, ssq, seqs, conv_q, conv_k, conv_v, delta, weights...) -> (x, ssq, conv_q, conv_k, conv_v, delta)`.
pub(super) fn build(w: &Weights, c: &ModelConfig, name: &str, prefix: &str) -> Result<Part, BuildError> {
    let mut p = PartBuilder::new(w, name, prefix);
    let [x, ssq] = p.stream(stream_types(c));
    let seqs = p.sequences();
    let window = c.conv_taps - 1;
    let conv_q = p.state("conv_q", Type::state(StateKind::Conv, &[c.num_k_heads, c.head_k_dim, window]));
    let conv_k = p.state("conv_k", Type::state(StateKind::Conv, &[c.num_k_heads, c.head_k_dim, window]));
    let conv_v = p.state("conv_v", Type::state(StateKind::Conv, &[c.num_v_heads, c.head_v_dim, window]));
    let delta = p.state("delta", Type::state(StateKind::Delta, &[c.num_v_heads, c.head_k_dim, c.head_v_dim]));
    let gain = p.weight("input_norm");
    let [w_q, w_k, w_v, w_z, w_b, w_a] = ["w_q", "w_k", "w_v", "w_z", "w_b", "w_a"].map(|n| p.weight(n));
    let [w_conv_q, w_conv_k, w_conv_v] = ["w_conv_q", "w_conv_k", "w_conv_v"].map(|n| p.weight(n));
    let [a_log, dt_bias, norm, w_out] = ["a_log", "dt_bias", "norm", "w_out"].map(|n| p.weight(n));

    let h = p.op_with(Op::RmsNormSsq, &[x, ssq, gain], eps(c.rms_norm_eps))?;
    let q = p.op(Op::Linear, &[h, w_q])?;
    let k = p.op(Op::Linear, &[h, w_k])?;
    let v = p.op(Op::Linear, &[h, w_v])?;
    let z = p.op(Op::Linear, &[h, w_z])?;
    let b = p.op(Op::Linear, &[h, w_b])?;
    let a = p.op(Op::Linear, &[h, w_a])?;
    let [q, conv_q] = conv_silu(&mut p, [q, w_conv_q, conv_q, seqs])?;
    let [k, conv_k] = conv_silu(&mut p, [k, w_conv_k, conv_k, seqs])?;
    let [v, conv_v] = conv_silu(&mut p, [v, w_conv_v, conv_v, seqs])?;
    let q = p.op_with(Op::L2Norm, &[q], eps(L2_NORM_EPS))?;
    let q = p.op_with(Op::Scale, &[q], Attrs::none().with("factor", (c.head_k_dim as f64).powf(-0.5)))?;
    let k = p.op_with(Op::L2Norm, &[k], eps(L2_NORM_EPS))?;
    let g = p.op(Op::DecayGate, &[a, a_log, dt_bias])?;
    let beta = p.op(Op::Sigmoid, &[b])?;
    let [o, delta] = p.op_pair(Op::DeltaRule, &[q, k, v, g, beta, delta, seqs], Attrs::none())?;
    let o = p.op_with(Op::RmsNorm, &[o, norm], eps(c.rms_norm_eps))?;
    let z = p.op(Op::Silu, &[z])?;
    let o = p.op(Op::Mul, &[o, z])?;
    let y = p.op(Op::Linear, &[o, w_out])?;
    let [x, ssq] = add_residual(&mut p, x, y)?;
    Ok(p.finish(vec![x, ssq, conv_q, conv_k, conv_v, delta]))
}

/// Convolution and its activation: the result and the new window.
fn conv_silu(p: &mut PartBuilder<'_>, operands: [Value; 4]) -> Result<[Value; 2], BuildError> {
    let [y, conv] = p.op_pair(Op::Conv1d, &operands, Attrs::none())?;
    Ok([p.op(Op::Silu, &[y])?, conv])
}
