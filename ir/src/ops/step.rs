//! stub
use crate::{
    attr::Attrs,
    eval::{Cx, Datum, EvalError},
    op::ShapeError,
    types::Type,
};
/// stub
pub fn eval_bundle<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_declared<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_proj<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_sequences<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn shape_bundle(_: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    todo!()
}
/// stub
pub fn shape_declared(_: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    todo!()
}
/// stub
pub fn shape_proj(_: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    todo!()
}
/// stub
pub fn shape_sequences(_: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    todo!()
}
