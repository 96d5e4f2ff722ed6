//! The language of the e-graph, derived from the op table.
//!
//! An op stands over its operands, then its attributes, which are leaves of their own. In patterns an op is its name in
//! the table, an attribute a number.

use std::fmt;

use egg::{FromOp, Id, Language};
use nextc_ir::{Attr, Op};

/// An e-node: an op of the table, or a constant attribute.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Term {
    /// An op over its operands followed by its attributes.
    Op(Op, Vec<Id>),
    /// An attribute.
    Attr(Attr),
}

/// What two e-nodes must share to be compared operand by operand.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Head {
    /// The op.
    Op(Op),
    /// The attribute itself.
    Attr(Attr),
}

impl Term {
    /// The ids of the operands and those of the attributes.
    pub fn split(&self) -> (&[Id], &[Id]) {
        match self {
            Self::Op(op, children) => children.split_at(children.len().saturating_sub(op.def().attrs.len())),
            Self::Attr(_) => (&[], &[]),
        }
    }
}

impl Language for Term {
    type Discriminant = Head;

    fn discriminant(&self) -> Head {
        match self {
            Self::Op(op, _) => Head::Op(*op),
            Self::Attr(attr) => Head::Attr(attr.clone()),
        }
    }

    fn matches(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Op(a, xs), Self::Op(b, ys)) => a == b && xs.len() == ys.len(),
            (Self::Attr(a), Self::Attr(b)) => a == b,
            _ => false,
        }
    }

    fn children(&self) -> &[Id] {
        match self {
            Self::Op(_, children) => children,
            Self::Attr(_) => &[],
        }
    }

    fn children_mut(&mut self) -> &mut [Id] {
        match self {
            Self::Op(_, children) => children,
            Self::Attr(_) => &mut [],
        }
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Op(op, _) => write!(f, "{op}"),
            Self::Attr(attr) => write!(f, "{attr}"),
        }
    }
}

/// Why a word of a pattern is no term.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TermError {
    /// Neither an op nor a number.
    #[error("`{0}` is neither an op of the table nor a number")]
    Unknown(String),
    /// An op with the wrong number of operands and attributes.
    #[error("`{op}` has {found} operands and attributes, expected {expected}")]
    Arity {
        /// The op.
        op: Op,
        /// How many it was given.
        found: usize,
        /// How many it takes.
        expected: usize,
    },
}

impl FromOp for Term {
    type Error = TermError;

    fn from_op(word: &str, children: Vec<Id>) -> Result<Self, TermError> {
        if let Some(op) = Op::from_name(word) {
            let (def, found) = (op.def(), children.len());
            let expected = def.operands.len() + def.attrs.len();
            let fits = if def.variadic() { found + 1 >= expected } else { found == expected };
            return if fits { Ok(Self::Op(op, children)) } else { Err(TermError::Arity { op, found, expected }) };
        }
        let number = word.parse::<i64>().map(Attr::from).or_else(|_| word.parse::<f64>().map(Attr::from));
        match number {
            Ok(attr) if children.is_empty() => Ok(Self::Attr(attr)),
            _ => Err(TermError::Unknown(word.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use egg::RecExpr;

    fn check(text: &str, expected: &str) {
        let printed = match text.parse::<RecExpr<Term>>() {
            Ok(term) => term.to_string(),
            Err(error) => error.to_string(),
        };
        assert!(printed.contains(expected), "{printed}");
    }

    #[test]
    fn terms_are_ops_with_trailing_attributes() {
        check("(scale (silu (param 0)) 0.5)", "(scale (silu (param 0)) 0.5)");
        check("(bundle (param 0) (param 1) (param 2))", "(bundle (param 0) (param 1) (param 2))");
        check("(scale (param 0))", "`scale` has 1 operands and attributes, expected 2");
        check("(sigmoidal (param 0))", "`sigmoidal` is neither an op of the table nor a number");
    }
}
