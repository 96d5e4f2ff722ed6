//! What stands before and after the layers: embedding and head.

use nextc_ir::build::BuildError;
use nextc_ir::{Attrs, Op, Shape, Sym, Type};

use super::part::{Part, PartBuilder};
use super::{Weights, eps, stream_types};
use crate::config::ModelConfig;

/// `@embed(tokens, w) -> (x, ssq)`.
pub(super) fn embed(w: &Weights) -> Result<Part, BuildError> {
    let mut p = PartBuilder::new(w, "embed", "");
    let tokens = p.input("tokens", Type::i32(Shape::new([Sym::T])));
    let table = p.weight_as("w", "embed".into());
    let x = p.op(Op::Embed, &[tokens, table])?;
    let ssq = p.op(Op::SumSquares, &[x])?;
    Ok(p.finish(vec![x, ssq]))
}

/// `@head(x, ssq, rows, gain, w) -> (logits, hidden, best)`: the norm of all rows, which the draft continues from, the head of the rows asked for,
/// and the token with the largest logit of each.
pub(super) fn head(w: &Weights, c: &ModelConfig, name: &str, gain: &str, head: &str) -> Result<Part, BuildError> {
    let mut p = PartBuilder::new(w, name, "");
    let [x, ssq] = p.stream(stream_types(c));
    let rows = p.input("rows", Type::i32(Shape::new([Sym::R])));
    let gain = p.weight_as("gain", gain.into());
    let head = p.weight_as("w", head.into());
    let hidden = p.op_with(Op::RmsNormSsq, &[x, ssq, gain], eps(c.rms_norm_eps))?;
    let asked = p.op(Op::GatherRows, &[hidden, rows])?;
    let logits = p.op(Op::Linear, &[asked, head])?;
    let [best, _peaks] = p.op_pair(Op::Argmax, &[logits], Attrs::none())?;
    Ok(p.finish(vec![logits, hidden, best]))
}
