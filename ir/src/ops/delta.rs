//! stub
use crate::{
    attr::Attrs,
    eval::{Cx, Datum, EvalError},
    op::ShapeError,
    types::Type,
};
/// stub
pub fn eval_conv1d<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_conv1d_silu<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_decay_gate<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_delta_rule<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_delta_rule_gated<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_delta_rule_normed<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_gated_delta_net<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn shape_conv1d(_: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    todo!()
}
/// stub
pub fn shape_decay_gate(_: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    todo!()
}
/// stub
pub fn shape_delta_rule(_: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    todo!()
}
/// stub
pub fn shape_delta_rule_gated(_: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    todo!()
}
/// stub
pub fn shape_delta_rule_normed(_: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    todo!()
}
/// stub
pub fn shape_gated_delta_net(_: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    todo!()
}
