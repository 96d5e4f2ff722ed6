//! Dimensions and shapes of tensors: constants, or the symbols of a step.

use std::fmt;

/// A dimension that only a step knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Sym {
    /// Tokens of the step, over all its sequences.
    T,
    /// Sequences of the step.
    B,
    /// Pages a sequence can own: the width of the page table.
    P,
    /// Rows for which the head computes logits.
    R,
}

impl Sym {
    /// Every symbol, in the order in which a step's dimensions are passed to kernels.
    pub const ALL: [Self; 4] = [Self::T, Self::B, Self::P, Self::R];

    /// The letter in IR text.
    pub const fn name(self) -> &'static str {
        match self {
            Self::T => "T",
            Self::B => "B",
            Self::P => "P",
            Self::R => "R",
        }
    }

    /// Position in [`Sym::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }
}

/// One dimension of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dim {
    /// A number known when compiling.
    Const(u64),
    /// A symbol of the step.
    Sym(Sym),
    /// A symbol plus a constant: `B+1`.
    SymPlus(Sym, u64),
}

impl Dim {
    /// The number, if it is a constant.
    pub const fn as_const(self) -> Option<u64> {
        match self {
            Self::Const(n) => Some(n),
            _ => None,
        }
    }

    /// The number under given values of the symbols (indexed by [`Sym::index`]).
    pub fn eval(self, syms: &[u64; 4]) -> u64 {
        match self {
            Self::Const(n) => n,
            Self::Sym(s) => syms[s.index()],
            Self::SymPlus(s, n) => syms[s.index()] + n,
        }
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Const(n) => write!(f, "{n}"),
            Self::Sym(s) => f.write_str(s.name()),
            Self::SymPlus(s, n) => write!(f, "{}+{n}", s.name()),
        }
    }
}

impl From<u64> for Dim {
    fn from(n: u64) -> Self {
        Self::Const(n)
    }
}

impl From<Sym> for Dim {
    fn from(s: Sym) -> Self {
        Self::Sym(s)
    }
}

/// The dimensions of a tensor, outermost first. Activations have a symbol first (`T` or `R`) and constants after it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Shape(pub Vec<Dim>);

impl Shape {
    /// A shape of `dims`.
    pub fn new(dims: impl IntoIterator<Item = impl Into<Dim>>) -> Self {
        Self(dims.into_iter().map(Into::into).collect())
    }

    /// A shape of one leading dimension and constants: `rows([T], [16, 256])`.
    pub fn rows(first: impl Into<Dim>, rest: &[u64]) -> Self {
        Self(std::iter::once(first.into()).chain(rest.iter().map(|&n| Dim::Const(n))).collect())
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.0.len()
    }

    /// The dimensions after the first, if all are constants.
    pub fn inner(&self) -> Option<Vec<u64>> {
        self.0.get(1..)?.iter().map(|d| d.as_const()).collect()
    }

    /// The last dimension, if it is a constant.
    pub fn last(&self) -> Option<u64> {
        self.0.last().and_then(|d| d.as_const())
    }

    /// Sizes under given values of the symbols.
    pub fn eval(&self, syms: &[u64; 4]) -> Vec<usize> {
        self.0.iter().map(|d| d.eval(syms) as usize).collect()
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, d) in self.0.iter().enumerate() {
            write!(f, "{}{d}", if i > 0 { " x " } else { "" })?;
        }
        Ok(())
    }
}

/// Lanes of a kernel's vectors: the innermost dimension of everything in memory is padded to a multiple of it.
pub const LANES: u64 = 16;

/// `n` rounded up to a multiple of [`LANES`].
pub const fn pad(n: u64) -> u64 {
    n.div_ceil(LANES) * LANES
}

/// Elements of one row (all dimensions after the first) as stored: the innermost padded, the others as they are.
pub fn padded_elems(inner: &[u64]) -> u64 {
    match inner.split_last() {
        Some((last, outer)) => outer.iter().product::<u64>() * pad(*last),
        None => 1,
    }
}
