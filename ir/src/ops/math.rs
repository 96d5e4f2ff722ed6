//! stub
use crate::{
    attr::Attrs,
    eval::{Cx, Datum, EvalError},
    op::ShapeError,
    types::Type,
};
/// stub
pub fn eval_add<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_exp<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_linear<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_linear_residual<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_linears<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_mul<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_neg<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_plus_one<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_scale<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_sigmoid<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_silu<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_softplus<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_swiglu<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn shape_binary(_: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    todo!()
}
/// stub
pub fn shape_linear(_: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    todo!()
}
/// stub
pub fn shape_linear_residual(_: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    todo!()
}
/// stub
pub fn shape_linears(_: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    todo!()
}
/// stub
pub fn shape_unary(_: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    todo!()
}
