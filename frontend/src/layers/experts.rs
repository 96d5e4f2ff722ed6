//! The FFN of a sparse layer: routed experts, and a shared one behind a gate of its own.

use nextc_ir::build::BuildError;
use nextc_ir::{Attrs, Op};

use super::part::{Part, PartBuilder};
use super::{Weights, add_residual, eps, stream_types};
use crate::config::ModelConfig;

/// `@moe.I(x, ssq, weights...) -> (x, ssq)`.
pub(super) fn build(w: &Weights, c: &ModelConfig, name: &str, prefix: &str) -> Result<Part, BuildError> {
    let mut p = PartBuilder::new(w, name, prefix);
    let [x, ssq] = p.stream(stream_types(c));
    let gain = p.weight("post_norm");
    let router = p.weight("mlp.router");
    let [w_gate, w_up, w_down] = ["experts_gate", "experts_up", "experts_down"].map(|n| p.weight(&format!("mlp.{n}")));
    let [s_gate, s_up, s_down] =
        ["shared_gate_proj", "shared_up", "shared_down"].map(|n| p.weight(&format!("mlp.{n}")));
    let shared_gate = p.weight("mlp.shared_gate");

    let h = p.op_with(Op::RmsNormSsq, &[x, ssq, gain], eps(c.rms_norm_eps))?;
    let logits = p.op(Op::Linear, &[h, router])?;
    let probabilities = p.op(Op::Softmax, &[logits])?;
    let top_k = Attrs::none().with("k", c.num_experts_per_tok);
    let [mut weights, ids] = p.op_pair(Op::TopK, &[probabilities], top_k)?;
    if c.norm_topk_prob {
        weights = p.op(Op::Renormalise, &[weights])?;
    }
    let [order, table] = p.op_pair(Op::Dispatch, &[ids], Attrs::none().with("experts", c.num_experts))?;
    let gate = p.op(Op::ExpertLinear, &[h, w_gate, ids, order, table])?;
    let up = p.op(Op::ExpertLinear, &[h, w_up, ids, order, table])?;
    let inner = p.op(Op::Swiglu, &[gate, up])?;
    let outer = p.op(Op::ExpertLinear, &[inner, w_down, ids, order, table])?;
    let y = p.op(Op::Combine, &[outer, weights, ids])?;

    let gate = p.op(Op::Linear, &[h, s_gate])?;
    let up = p.op(Op::Linear, &[h, s_up])?;
    let inner = p.op(Op::Swiglu, &[gate, up])?;
    let s = p.op(Op::Linear, &[inner, s_down])?;
    let share = p.op(Op::Linear, &[h, shared_gate])?;
    let share = p.op(Op::Sigmoid, &[share])?;
    let s = p.op(Op::Mul, &[share, s])?;
    let y = p.op(Op::Add, &[y, s])?;
    let [x, ssq] = add_residual(&mut p, x, y)?;
    Ok(p.finish(vec![x, ssq]))
}
