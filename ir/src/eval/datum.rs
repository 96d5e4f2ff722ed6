//! The values of the interpreter. All are cheap to clone: what is large is shared.

use std::sync::Arc;

use super::state::{Sequences, State};
use super::{Cx, EvalError};
use crate::attr::Attrs;
use crate::op::{EvalRule, OpDef};
use crate::types::StateKind;

/// The numbers a run computes in: f32 or f64.
pub trait Real: Copy + Default + PartialEq + std::fmt::Debug + Send + Sync + 'static {
    /// The nearest number of this type.
    fn of(x: f64) -> Self;
    /// The number, exactly.
    fn get(self) -> f64;
    /// The meaning of an op in these numbers.
    fn meaning(def: &OpDef) -> EvalRule<Self>;
}

impl Real for f32 {
    fn of(x: f64) -> Self {
        x as f32
    }
    fn get(self) -> f64 {
        f64::from(self)
    }
    fn meaning(def: &OpDef) -> EvalRule<Self> {
        def.eval32
    }
}

impl Real for f64 {
    fn of(x: f64) -> Self {
        x
    }
    fn get(self) -> f64 {
        self
    }
    fn meaning(def: &OpDef) -> EvalRule<Self> {
        def.eval64
    }
}

/// A dense array, outermost dimension first, without padding.
#[derive(Clone, Debug, PartialEq)]
pub struct Array<E> {
    dims: Vec<usize>,
    data: Arc<Vec<E>>,
}

impl<E> Array<E> {
    /// An array of `dims`.
    /// # Errors
    /// [`EvalError::Dims`] if `data` has another number of elements.
    pub fn new(dims: &[usize], data: Vec<E>) -> Result<Self, EvalError> {
        let elems = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        if elems != Some(data.len()) {
            return Err(EvalError::Dims { found: dims.to_vec(), expected: format!("{} elements", data.len()) });
        }
        Ok(Self { dims: dims.to_vec(), data: Arc::new(data) })
    }

    /// The dimensions.
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// All elements, row-major.
    pub fn data(&self) -> &[E] {
        &self.data
    }

    /// The dimensions, if there are `N`.
    /// # Errors
    /// [`EvalError::Dims`] if there are more or fewer.
    pub fn rank<const N: usize>(&self) -> Result<[usize; N], EvalError> {
        let expected = || EvalError::Dims { found: self.dims.clone(), expected: format!("{N} dimensions") };
        self.dims.as_slice().try_into().map_err(|_| expected())
    }

    /// Demands exactly `dims`.
    /// # Errors
    /// [`EvalError::Dims`] if they are others.
    pub fn is(&self, dims: &[usize]) -> Result<(), EvalError> {
        if self.dims == dims {
            return Ok(());
        }
        Err(EvalError::Dims { found: self.dims.clone(), expected: format!("{dims:?}") })
    }

    /// Rows (the first dimension) and elements of a row.
    pub fn rows(&self) -> (usize, usize) {
        match self.dims.split_first() {
            Some((&rows, inner)) => (rows, inner.iter().product()),
            None => (1, 1),
        }
    }

    /// The innermost dimension; 1 for a single number.
    pub fn width(&self) -> usize {
        self.dims.last().copied().unwrap_or(1)
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &[E] {
        let (_, elems) = self.rows();
        &self.data[i * elems..(i + 1) * elems]
    }
}

/// A value of the interpreter.
#[derive(Clone, Debug, PartialEq)]
pub enum Datum<F> {
    /// A tensor of floats, or a weight.
    Float(Array<F>),
    /// A tensor of integers.
    Int(Array<i32>),
    /// One version of a state.
    State(State<F>),
    /// The sequences of the step.
    Sequences(Arc<Sequences>),
    /// Several values.
    Bundle(Vec<Datum<F>>),
}

impl<F> From<Array<F>> for Datum<F> {
    fn from(array: Array<F>) -> Self {
        Self::Float(array)
    }
}

impl<F: Real> Datum<F> {
    /// An array of floats.
    /// # Errors
    /// [`EvalError::Dims`] if `data` has another number of elements than `dims`.
    pub fn floats(dims: &[usize], data: Vec<F>) -> Result<Self, EvalError> {
        Array::new(dims, data).map(Self::Float)
    }

    /// An array of integers.
    /// # Errors
    /// [`EvalError::Dims`] if `data` has another number of elements than `dims`.
    pub fn ints(dims: &[usize], data: Vec<i32>) -> Result<Self, EvalError> {
        Array::new(dims, data).map(Self::Int)
    }

    /// What it is, in a word.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Float(_) => "floats",
            Self::Int(_) => "integers",
            Self::State(s) => s.kind().name(),
            Self::Sequences(_) => "sequences",
            Self::Bundle(_) => "a bundle",
        }
    }

    fn wrong(&self, expected: &'static str) -> EvalError {
        EvalError::Kind { found: self.kind(), expected }
    }

    /// The floats.
    /// # Errors
    /// [`EvalError::Kind`] if it is something else; so for the methods below.
    pub fn float(&self) -> Result<&Array<F>, EvalError> {
        match self {
            Self::Float(a) => Ok(a),
            _ => Err(self.wrong("floats")),
        }
    }

    /// The integers.
    /// # Errors
    /// [`EvalError::Kind`].
    pub fn int(&self) -> Result<&Array<i32>, EvalError> {
        match self {
            Self::Int(a) => Ok(a),
            _ => Err(self.wrong("integers")),
        }
    }

    /// The state of `kind`.
    /// # Errors
    /// [`EvalError::Kind`].
    pub fn state(&self, kind: StateKind) -> Result<&State<F>, EvalError> {
        match self {
            Self::State(s) if s.kind() == kind => Ok(s),
            _ => Err(self.wrong(kind.name())),
        }
    }

    /// The sequences of the step.
    /// # Errors
    /// [`EvalError::Kind`].
    pub fn sequences(&self) -> Result<&Sequences, EvalError> {
        match self {
            Self::Sequences(s) => Ok(s),
            _ => Err(self.wrong("sequences")),
        }
    }

    /// The values of a bundle.
    /// # Errors
    /// [`EvalError::Kind`].
    pub fn bundle(&self) -> Result<&[Self], EvalError> {
        match self {
            Self::Bundle(items) => Ok(items),
            _ => Err(self.wrong("a bundle")),
        }
    }

    /// Every number in it, in a fixed order: what tests compare.
    pub fn numbers(&self) -> Vec<f64> {
        match self {
            Self::Float(a) => a.data().iter().map(|x| x.get()).collect(),
            Self::Int(a) => a.data().iter().map(|&x| f64::from(x)).collect(),
            Self::State(s) => s.units().flat_map(|(_, unit)| unit.iter().map(|x| x.get())).collect(),
            Self::Sequences(_) => Vec::new(),
            Self::Bundle(items) => items.iter().flat_map(Self::numbers).collect(),
        }
    }
}

/// Exactly `N` operands.
/// # Errors
/// [`EvalError::Operands`] if there are more or fewer.
pub fn operands<F, const N: usize>(args: &[Datum<F>]) -> Result<&[Datum<F>; N], EvalError> {
    args.try_into().map_err(|_| EvalError::Operands { found: args.len(), expected: N })
}

/// The attribute `name`, a number.
/// # Errors
/// [`EvalError::Attr`] if it is missing or none.
pub fn attr_float(attrs: &Attrs, name: &'static str) -> Result<f64, EvalError> {
    attrs.float(name).ok_or(EvalError::Attr(name))
}

/// The attribute `name`, a natural number.
/// # Errors
/// [`EvalError::Attr`] if it is missing or none.
pub fn attr_int(attrs: &Attrs, name: &'static str) -> Result<usize, EvalError> {
    attrs.int(name).and_then(|v| usize::try_from(v).ok()).ok_or(EvalError::Attr(name))
}

impl<F: Real> Cx<F> {
    /// The meaning of `def` on `args`.
    /// # Errors
    /// What the op's meaning gives.
    pub fn eval(&self, def: &OpDef, args: &[Datum<F>], attrs: &Attrs) -> Result<Vec<Datum<F>>, EvalError> {
        F::meaning(def)(self, args, attrs)
    }
}
