//! Why evaluation fails.

use crate::op::Op;
use crate::rows::RowsError;

/// Why evaluation failed.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// An op got too few or too many operands.
    #[error("{found} operands, expected {expected}")]
    Operands {
        /// How many there are.
        found: usize,
        /// How many it takes.
        expected: usize,
    },
    /// A value is of the wrong kind.
    #[error("found {found}, expected {expected}")]
    Kind {
        /// What it is.
        found: &'static str,
        /// What it should be.
        expected: &'static str,
    },
    /// An array has the wrong dimensions.
    #[error("found dimensions {found:?}, expected {expected}")]
    Dims {
        /// Its dimensions.
        found: Vec<usize>,
        /// What they should be.
        expected: String,
    },
    /// An attribute is missing or not a number.
    #[error("attribute `{0}` is missing or of the wrong kind")]
    Attr(&'static str),
    /// A token id, expert id, row, slot or page points outside what there is.
    #[error("{what} `{value}` is out of range, there are {limit}")]
    OutOfRange {
        /// What points.
        what: &'static str,
        /// Where it points.
        value: i64,
        /// How many there are.
        limit: usize,
    },
    /// The inputs that say which sequences a step has contradict each other.
    #[error("sequences of the step: {0}")]
    Sequences(String),
    /// An op that has no meaning by itself.
    #[error("`{0}` has no meaning outside a function")]
    Structure(Op),
    /// The module has no such function, or the caller precedes it.
    #[error("no function `@{0}` before its use")]
    NoFunction(String),
    /// There is no such weight.
    #[error("no weight `{0}`")]
    NoWeight(String),
    /// A function got an argument that its parameter does not take.
    #[error("argument `{name}` is {found}, expected {expected}")]
    Argument {
        /// The parameter.
        name: String,
        /// What was given.
        found: String,
        /// The parameter's type, under the symbols bound so far.
        expected: String,
    },
    /// A weight cannot be read from the checkpoint.
    #[error(transparent)]
    Rows(#[from] RowsError),
    /// Something failed in an op of a function.
    #[error("@{function}: {op}: {error}")]
    At {
        /// The function.
        function: String,
        /// The op.
        op: Op,
        /// What failed.
        error: Box<EvalError>,
    },
}
