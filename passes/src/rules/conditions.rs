//! Side conditions of rules, and attributes that rules compute, by name.

use std::fmt;

use egg::Var;
use nextc_ir::{Attr, Dim, Type};

use crate::egraph::Data;

/// When a rule applies.
#[derive(Clone)]
pub struct Condition {
    /// As `nextc rules` shows it.
    pub text: String,
    /// The variables it looks at.
    pub vars: Vec<Var>,
    /// Whether it holds for what they are bound to.
    pub holds: fn(&[Data]) -> bool,
}

/// An attribute that a rule computes.
#[derive(Clone)]
pub struct Computed {
    /// As `nextc rules` shows it.
    pub text: String,
    /// The variable it binds.
    pub var: Var,
    /// The variables it looks at.
    pub vars: Vec<Var>,
    /// The attribute, if there is one.
    pub compute: fn(&[Data]) -> Option<Attr>,
}

impl fmt::Debug for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Computed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

fn vars(names: &[&str]) -> Vec<Var> {
    names.iter().map(|name| name.parse().expect("rules name variables with a leading `?`")).collect()
}

fn condition(name: &str, of: &[&str], holds: fn(&[Data]) -> bool) -> Condition {
    Condition { text: format!("{name}({})", of.join(", ")), vars: vars(of), holds }
}

/// The value is one number a row: its innermost dimension is 1, and it has as few dimensions as a row can have.
pub fn row_scalar(x: &str) -> Condition {
    condition("row_scalar", &[x], |data| {
        shape(&data[0]).is_some_and(|dims| dims.len() == 2 && dims[1] == Dim::Const(1))
    })
}

/// The value is one row a token: `[T, width]`.
pub fn rows(x: &str) -> Condition {
    condition("rows", &[x], |data| shape(&data[0]).is_some_and(|dims| dims.len() == 2))
}

/// Both values have the same shape.
pub fn same_shape(a: &str, b: &str) -> Condition {
    condition("same_shape", &[a, b], |data| shape(&data[0]).is_some() && shape(&data[0]) == shape(&data[1]))
}

/// The attribute is the innermost dimension of the value.
pub fn is_width(width: &str, x: &str) -> Condition {
    condition("is_width", &[width, x], |data| data[0].attr().is_some() && data[0].attr() == last(&data[1]).as_ref())
}

/// The attribute is the outermost dimension of the weight.
pub fn is_rows_of(count: &str, weight: &str) -> Condition {
    let holds = |data: &[Data]| {
        let rows = data[1].ty().and_then(Type::as_weight).and_then(|w| w.shape.first().copied());
        rows.is_some() && data[0].attr() == rows.map(Attr::from).as_ref()
    };
    condition("is_rows_of", &[count, weight], holds)
}

/// Binds `var` to the innermost dimension of `x`.
pub fn width(var: &str, x: &str) -> Computed {
    let text = format!("{var} = width({x})");
    Computed { text, var: vars(&[var])[0], vars: vars(&[x]), compute: |data| last(&data[0]) }
}

fn shape(data: &Data) -> Option<&[Dim]> {
    data.ty().and_then(Type::as_tensor).map(|t| t.shape.0.as_slice())
}

fn last(data: &Data) -> Option<Attr> {
    shape(data)?.last()?.as_const().map(Attr::from)
}
