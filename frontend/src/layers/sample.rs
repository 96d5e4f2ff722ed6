//! Choosing tokens from logits, and counting the drafts that are right.

use nextc_ir::build::BuildError;
use nextc_ir::ops::sample::{Choice, Factor};
use nextc_ir::{Dim, Op, Shape, Sym, Type, Value};

use super::part::{Part, PartBuilder};
use super::{Entry, Weights};
use crate::config::ModelConfig;

/// What an entry function that chooses tokens takes of a step's results, of the step itself, and of how each row is sampled.
fn inputs(vocab_size: u64) -> [(&'static str, Type); 8] {
    let ints = |sym: Sym| Type::i32(Shape::new([sym]));
    [
        ("logits", Type::f32(Shape::rows(Sym::R, &[vocab_size]))),
        ("best", ints(Sym::R)),
        ("tokens", ints(Sym::T)),
        ("factors", Type::f32(Shape::rows(Sym::R, &[Factor::COUNT]))),
        ("choices", Type::i32(Shape::rows(Sym::R, &[Choice::COUNT]))),
        ("edit_tokens", ints(Sym::P)),
        ("edit_counts", ints(Sym::P)),
        ("edit_biases", Type::f32(Shape::new([Sym::P]))),
    ]
}

/// `@choose(logits, best, tokens, factors, choices, edit_tokens, edit_counts, edit_biases) -> (tokens)`.
pub(super) fn choose(w: &Weights, c: &ModelConfig) -> Result<Part, BuildError> {
    let mut p = PartBuilder::new(w, "choose", "");
    let [logits, best, tokens, factors, choices, edit_tokens, edit_counts, edit_biases] =
        inputs(c.vocab_size).map(|(name, ty)| p.input(name, ty));
    let edits = [logits, tokens, factors, choices, edit_tokens, edit_counts, edit_biases];
    let [x, peaks] = p.op_pair(Op::EditLogits, &edits, nextc_ir::Attrs::none())?;
    let weights = p.op(Op::TokenWeights, &[x, peaks, factors])?;
    let chosen = p.op(Op::Choose, &[x, peaks, weights, best, factors, choices])?;
    Ok(p.finish(vec![chosen]))
}

/// `@accept(chosen, rows, tokens, cu_seqlens) -> (accepted)`.
pub(super) fn accept(w: &Weights) -> Result<Part, BuildError> {
    let mut p = PartBuilder::new(w, "accept", "");
    let ints = |dim: Dim| Type::i32(Shape(vec![dim]));
    let chosen = p.input("chosen", ints(Sym::R.into()));
    let rows = p.input("rows", ints(Sym::R.into()));
    let tokens = p.input("tokens", ints(Sym::T.into()));
    let cu_seqlens = p.input("cu_seqlens", ints(Dim::SymPlus(Sym::B, 1)));
    let accepted = p.op(Op::Accept, &[chosen, rows, tokens, cu_seqlens])?;
    Ok(p.finish(vec![accepted]))
}

/// `@sample`, or `@verify`, which also counts the drafts that are right.
pub(super) fn entry(name: &str, vocab_size: u64, choose: &Part, accept: Option<&Part>) -> nextc_ir::graph::Function {
    let mut entry = Entry::empty(name);
    let args: Vec<Value> = inputs(vocab_size).into_iter().map(|(name, ty)| entry.f.param(name, ty)).collect();
    let tokens = args[2];
    let more = accept.map(|accept| {
        let rows = entry.f.param("logit_rows", Type::i32(Shape::new([Sym::R])));
        let cu_seqlens = entry.f.param("cu_seqlens", Type::i32(Shape(vec![Dim::SymPlus(Sym::B, 1)])));
        (accept, rows, cu_seqlens)
    });
    let mut results = entry.call(choose, &args);
    if let Some((accept, rows, cu_seqlens)) = more {
        results.extend(entry.call(accept, &[results[0], rows, tokens, cu_seqlens]));
    }
    entry.f.finish(results)
}
