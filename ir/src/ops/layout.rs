//! stub
use crate::{
    attr::Attrs,
    eval::{Cx, Datum, EvalError},
    op::ShapeError,
    types::Type,
};
/// stub
pub fn eval_embed<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn eval_gather_rows<F>(_: &Cx<F>, _: &[Datum<F>], _: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
    todo!()
}
/// stub
pub fn shape_embed(_: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    todo!()
}
/// stub
pub fn shape_gather_rows(_: &[&Type], _: &Attrs) -> Result<Vec<Type>, ShapeError> {
    todo!()
}
