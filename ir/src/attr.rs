//! Attributes of ops: small constants that are part of an op, ordered and hashable.

use std::collections::BTreeMap;
use std::fmt;

/// A float with total order and hash by its bits, so that it may stand in an e-graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Bits(u64);

impl Bits {
    /// The float.
    pub fn get(self) -> f64 {
        f64::from_bits(self.0)
    }
}

/// The value of one attribute.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Attr {
    /// An integer.
    Int(i64),
    /// A float, printed so that it always holds a `.` or an `e`.
    Float(Bits),
    /// A name: a weight, a function, a grouping.
    Str(String),
    /// A list of integers.
    Ints(Vec<i64>),
}

impl From<i64> for Attr {
    fn from(v: i64) -> Self {
        Self::Int(v)
    }
}
impl From<u64> for Attr {
    fn from(v: u64) -> Self {
        Self::Int(i64::try_from(v).expect("attributes are far below 2^63"))
    }
}
impl From<f64> for Attr {
    fn from(v: f64) -> Self {
        Self::Float(Bits(v.to_bits()))
    }
}
impl From<&str> for Attr {
    fn from(v: &str) -> Self {
        Self::Str(v.to_owned())
    }
}
impl From<String> for Attr {
    fn from(v: String) -> Self {
        Self::Str(v)
    }
}
impl From<Vec<i64>> for Attr {
    fn from(v: Vec<i64>) -> Self {
        Self::Ints(v)
    }
}

impl fmt::Display for Attr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(v) => write!(f, "{v}"),
            Self::Float(v) => write!(f, "{:?}", v.get()),
            Self::Str(v) => write!(f, "{v:?}"),
            Self::Ints(v) => write!(f, "{v:?}"),
        }
    }
}

/// The attributes of one op by name; the op table says which names an op has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Attrs(pub BTreeMap<String, Attr>);

impl Attrs {
    /// No attributes.
    pub fn none() -> Self {
        Self::default()
    }

    /// These attributes and one more.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Attr>) -> Self {
        self.0.insert(name.to_owned(), value.into());
        self
    }

    /// The attribute called `name`.
    pub fn get(&self, name: &str) -> Option<&Attr> {
        self.0.get(name)
    }

    /// The integer called `name`; the verifier has checked that it is there.
    pub fn int(&self, name: &str) -> Option<i64> {
        match self.get(name) {
            Some(Attr::Int(v)) => Some(*v),
            _ => None,
        }
    }

    /// The float called `name` (an integer counts as one).
    pub fn float(&self, name: &str) -> Option<f64> {
        match self.get(name) {
            Some(Attr::Float(v)) => Some(v.get()),
            Some(Attr::Int(v)) => Some(*v as f64),
            _ => None,
        }
    }

    /// The string called `name`.
    pub fn str(&self, name: &str) -> Option<&str> {
        match self.get(name) {
            Some(Attr::Str(v)) => Some(v),
            _ => None,
        }
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
