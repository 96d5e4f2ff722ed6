//! stub
use crate::{
    attr::Attrs,
    eval::{Cx, Datum, EvalError},
    op::ShapeError,
    types::Type,
};
/// stub
pub fn eval_append_kv<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_attention<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_gated_attention<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_norm_rope<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_norm_rope_append<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_rope<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn shape_append_kv(_: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    todo!()
}
/// stub
pub fn shape_attention(_: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    todo!()
}
/// stub
pub fn shape_gated_attention(_: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    todo!()
}
/// stub
pub fn shape_norm_rope(_: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    todo!()
}
/// stub
pub fn shape_norm_rope_append(_: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    todo!()
}
/// stub
pub fn shape_rope(_: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    todo!()
}
