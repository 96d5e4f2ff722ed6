//! What stands before and after the layers: embedding and head.

use nextc_ir::build::BuildError;
use nextc_ir::shape::LANES;
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

/// `@head(x, ssq, rows, [wanted,] gain, w) -> (logits, hidden, best)`: the norm of all rows, which the draft continues from, the head of the rows
/// asked for, with logits of all tokens or with `some` of those that are wanted, and the token with the largest logit of each.
pub(super) fn head(
    w: &Weights,
    c: &ModelConfig,
    (name, gain, head): (&str, &str, &str),
    some: bool,
) -> Result<Part, BuildError> {
    let mut p = PartBuilder::new(w, name, "");
    let [x, ssq] = p.stream(stream_types(c));
    let rows = p.input("rows", Type::i32(Shape::new([Sym::R])));
    let wanted = some.then(|| p.input("wanted", wanted_type(c)));
    let gain = p.weight_as("gain", gain.into());
    let head = p.weight_as("w", head.into());
    let hidden = p.op_with(Op::RmsNormSsq, &[x, ssq, gain], eps(c.rms_norm_eps))?;
    let asked = p.op(Op::GatherRows, &[hidden, rows])?;
    let logits = match wanted {
        None => p.op(Op::Linear, &[asked, head])?,
        Some(wanted) => p.op(Op::LinearWanted, &[asked, head, wanted])?,
    };
    let [best, _peaks] = p.op_pair(Op::Argmax, &[logits], Attrs::none())?;
    Ok(p.finish(vec![logits, hidden, best]))
}

/// A flag for each 16 tokens.
pub(super) fn wanted_type(c: &ModelConfig) -> Type {
    Type::i32(Shape::new([c.vocab_size.div_ceil(LANES)]))
}
