//! Structure: parameters, bundles, projections and the sequences of a step.

use std::sync::Arc;

use super::check::operands;
use crate::attr::Attrs;
use crate::eval::{self, Cx, Datum, EvalError, Real, Sequences, attr_int};
use crate::op::{Op, ShapeError};
use crate::shape::{Dim, Shape, Sym};
use crate::types::Type;

/// `param`, `weight` and `call` declare the types of their results; no rule gives them.
/// # Errors
/// Always.
pub fn shape_declared(types: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    Err(ShapeError::Arity { found: types.len(), expected: "declared result types; no rule gives them".to_owned() })
}

/// Item `index` of a bundle.
/// # Errors
/// [`ShapeError`] if the operand is no bundle or has no such item.
pub fn shape_proj(types: &[&Type], attrs: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [tuple] = operands(["tuple"], types)?;
    let missing = ShapeError::Attr { name: "index", expected: "the index of an item" };
    let index = attrs.int("index").and_then(|i| usize::try_from(i).ok()).ok_or(missing)?;
    match types[0] {
        Type::Bundle(items) if index < items.len() => Ok(vec![items[index].clone()]),
        _ => Err(tuple.wrong(format!("a bundle with an item {index}"))),
    }
}

/// The bundle of all operands.
/// # Errors
/// [`ShapeError::Arity`] if there are none.
pub fn shape_bundle(types: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    if types.is_empty() {
        return Err(ShapeError::Arity { found: 0, expected: "at least 1".to_owned() });
    }
    Ok(vec![Type::Bundle(types.iter().map(|&t| t.clone()).collect())])
}

/// positions `i32[T]`, cu_seqlens `i32[B+1]`, slot, replay and tentative `i32[B]`, page_table `i32[B, P]`.
/// # Errors
/// [`ShapeError`] naming the operand that is something else.
pub fn shape_sequences(types: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    let [positions, cu_seqlens, slot, replay, tentative, page_table] =
        operands(["positions", "cu_seqlens", "slot", "replay", "tentative", "page_table"], types)?;
    positions.is_i32(Sym::T.into(), &[])?;
    cu_seqlens.is_i32(Dim::SymPlus(Sym::B, 1), &[])?;
    for each in [slot, replay, tentative] {
        each.is_i32(Sym::B.into(), &[])?;
    }
    page_table.is(&Type::i32(Shape::new([Sym::B, Sym::P])))?;
    Ok(vec![Type::Sequences])
}

/// Parameters, weights and calls have no meaning outside a function.
/// # Errors
/// Always.
pub fn eval_declared<F: Real>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    Err(EvalError::Structure(Op::Call))
}

/// Item `index` of a bundle.
/// # Errors
/// [`EvalError`] if there is no such item.
pub fn eval_proj<F: Real>(_: &Cx<F>, args: &[Datum<F>], attrs: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [tuple] = eval::operands(args)?;
    let (items, index) = (tuple.bundle()?, attr_int(attrs, "index")?);
    let missing = EvalError::OutOfRange { what: "item", value: index as i64, limit: items.len() };
    items.get(index).map(|item| vec![item.clone()]).ok_or(missing)
}

/// The bundle of all operands.
/// # Errors
/// None.
pub fn eval_bundle<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    Ok(vec![Datum::Bundle(args.to_vec())])
}

/// The sequences of the step, checked.
/// # Errors
/// [`EvalError::Sequences`] if they contradict each other.
pub fn eval_sequences<F: Real>(_: &Cx<F>, args: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    let [positions, cu_seqlens, slot, replay, tentative, page_table] = eval::operands(args)?;
    let sequences = Sequences::new(positions.int()?, cu_seqlens.int()?, slot.int()?, page_table.int()?)?;
    let sequences = sequences.with_tentative(replay.int()?, tentative.int()?)?;
    Ok(vec![Datum::Sequences(Arc::new(sequences))])
}
