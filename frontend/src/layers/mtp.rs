//! The front of the MTP module: the next token's embedding and the main model's hidden row become one residual stream.
//!
//! The hidden row is the one after the final norm. Both are normed, then `fc · concat(embedding, hidden)` is the sum of
//! two products with the column halves of `fc`.

use nextc_ir::build::BuildError;
use nextc_ir::{Op, Shape, Sym, Type};

use super::part::{Part, PartBuilder};
use super::{Weights, eps, stream_types};
use crate::config::ModelConfig;

/// `@fuse.mtp(tokens, hidden, embed, norm_e, norm_h, w_e, w_h) -> (x, ssq)`.
pub(super) fn fuse(w: &Weights, c: &ModelConfig) -> Result<Part, BuildError> {
    let mut p = PartBuilder::new(w, "fuse.mtp", "mtp.");
    let tokens = p.input("tokens", Type::i32(Shape::new([Sym::T])));
    let [hidden_type, _] = stream_types(c);
    let hidden = p.input("hidden", hidden_type);
    let embed = p.weight_as("embed", "embed".into());
    let [norm_e, norm_h, w_e, w_h] = ["norm_e", "norm_h", "w_e", "w_h"].map(|n| p.weight(n));

    let e = p.op(Op::Embed, &[tokens, embed])?;
    let e = p.op_with(Op::RmsNormPlusOne, &[e, norm_e], eps(c.rms_norm_eps))?;
    let h = p.op_with(Op::RmsNormPlusOne, &[hidden, norm_h], eps(c.rms_norm_eps))?;
    let e = p.op(Op::Linear, &[e, w_e])?;
    let h = p.op(Op::Linear, &[h, w_h])?;
    let x = p.op(Op::Add, &[e, h])?;
    let ssq = p.op(Op::SumSquares, &[x])?;
    Ok(p.finish(vec![x, ssq]))
}
