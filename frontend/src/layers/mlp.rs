//! The FFN of a dense layer: SwiGLU.

use nextc_ir::Op;
use nextc_ir::build::BuildError;

use super::part::{Part, PartBuilder};
use super::{Weights, add_residual, eps, stream_types};
use crate::config::ModelConfig;

/// `@mlp.I(x, ssq, weights...) -> (x, ssq)`.
pub(super) fn build(w: &Weights, c: &ModelConfig, name: &str, prefix: &str) -> Result<Part, BuildError> {
    let mut p = PartBuilder::new(w, name, prefix);
    let [x, ssq] = p.stream(stream_types(c));
    let gain = p.weight("post_norm");
    let [w_gate, w_up, w_down] = ["mlp.w_gate", "mlp.w_up", "mlp.w_down"].map(|n| p.weight(n));

    let h = p.op_with(Op::RmsNormSsq, &[x, ssq, gain], eps(c.rms_norm_eps))?;
    let gate = p.op(Op::Linear, &[h, w_gate])?;
    let up = p.op(Op::Linear, &[h, w_up])?;
    let inner = p.op(Op::Swiglu, &[gate, up])?;
    let y = p.op(Op::Linear, &[inner, w_down])?;
    let [x, ssq] = add_residual(&mut p, x, y)?;
    Ok(p.finish(vec![x, ssq]))
}
