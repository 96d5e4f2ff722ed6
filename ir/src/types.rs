//! The types of graph values.

use std::fmt;

use crate::dtype::DType;
use crate::format::Format;
use crate::layout::{Layout, padded_index};
use crate::shape::{Dim, LANES, Shape, pad};

/// What a value of a graph is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Type {
    /// An activation, or an input of the step: `tensor<T x 2048 x f32>`.
    Tensor(TensorType),
    /// A named constant of the checkpoint: `weight<16 x 128 x 2048 x bf16>`, after `layout` also `@ tile16`.
    Weight(WeightType),
    /// One version of a piece of state: `state<delta x 32 x 128 x 128>`.
    State(StateType),
    /// The sequences of a step (positions, cu_seqlens, slot, page_table), as one value: `sequences`.
    Sequences,
    /// Several values as one operand: `bundle<weight<..>, weight<..>>`.
    Bundle(Vec<Type>),
}

/// See [`Type::Tensor`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TensorType {
    /// Dimensions, outermost first.
    pub shape: Shape,
    /// Element type: `f32` or `i32`.
    pub dtype: DType,
}

/// See [`Type::Weight`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WeightType {
    /// Dimensions: output dimensions, then input dimensions; experts first where there are any.
    pub shape: Vec<u64>,
    /// How its numbers are stored.
    pub format: Format,
    /// Where they lie; assigned by the pass `layout`.
    pub layout: Option<Layout>,
}

/// The kinds of state a sequence carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StateKind {
    /// Keys (after norm and RoPE) and values, paged: `[num_kv_heads, head_dim]` a token.
    Kv,
    /// The last inputs of a causal convolution: `[heads, head_dim, taps - 1]` a slot, and behind them the inputs of a tentative step.
    Conv,
    /// The matrix of the delta rule: `[num_v_heads, head_k_dim, head_v_dim]` a slot, and for each head behind it the updates
    /// `(k, d, decay)` of a tentative step.
    Delta,
}

/// Tokens of a tentative step at most: a known token and the drafts that it is followed by. A tentative step changes neither windows nor
/// matrices; it keeps what its tokens would have done, and the next step replays as many of them as were accepted.
pub const TENTATIVE_TOKENS: u64 = 8;

/// A sequence with at most so many tokens in a step is decoded: its tokens are of the class `decode`, those of a longer run are of the class `bulk`. In each class a
/// token's arithmetic is the same whatever else the step holds; a tentative run is always decoded.
pub const DECODE_TOKENS: u64 = TENTATIVE_TOKENS;

impl StateKind {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::Kv, Self::Conv, Self::Delta];

    /// The name in IR text.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kv => "kv",
            Self::Conv => "conv",
            Self::Delta => "delta",
        }
    }

    /// The kind called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|k| k.name() == name)
    }
}

/// See [`Type::State`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StateType {
    /// What it is.
    pub kind: StateKind,
    /// Its dimensions: see [`StateKind`].
    pub dims: Vec<u64>,
}

impl StateType {
    /// Bytes as stored in f32: of one token for [`StateKind::Kv`] (keys and values), of one slot for the others.
    pub fn bytes(&self) -> u64 {
        match self.kind {
            StateKind::Kv => self.step_bytes(),
            StateKind::Conv => (self.dims[2] + TENTATIVE_TOKENS) * self.dims[0] * pad(self.dims[1]) * 4,
            StateKind::Delta => self.dims[0] * self.delta_head_elems() * 4,
        }
    }

    /// Bytes of that which an ordinary step reads and writes: without what is kept of tentative tokens.
    pub fn step_bytes(&self) -> u64 {
        match self.kind {
            StateKind::Kv => 2 * self.dims[0] * pad(self.dims[1]) * 4,
            StateKind::Conv => self.dims[2] * self.dims[0] * pad(self.dims[1]) * 4,
            StateKind::Delta => self.dims[0] * self.dims[1] * pad(self.dims[2]) * 4,
        }
    }

    /// Where element `i` of a unit (a page, a slot) lies in memory, if a unit is numbered without padding as the graph interpreter
    /// does: see [`crate::eval::State`].
    pub fn stored_index(&self, i: u64) -> u64 {
        let [heads, width, depth] = [0, 1, 2].map(|d| self.dims.get(d).copied().unwrap_or(1));
        if self.kind != StateKind::Delta {
            return padded_index(&[heads, width], i);
        }
        let (matrix, update) = (width * depth, width + depth + 1);
        let head_elems = matrix + TENTATIVE_TOKENS * update;
        let (head, i) = (i / head_elems, i % head_elems);
        let within = match i.checked_sub(matrix) {
            None => padded_index(&[width, depth], i),
            Some(i) => {
                let part = match i % update {
                    k if k < width => k,
                    d if d < width + depth => pad(width) + d - width,
                    _ => pad(width) + pad(depth),
                };
                width * pad(depth) + i / update * self.delta_update_elems() + part
            }
        };
        head * self.delta_head_elems() + within
    }

    /// Elements of one head of a delta state: the matrix, then the kept updates.
    pub fn delta_head_elems(&self) -> u64 {
        self.dims[1] * pad(self.dims[2]) + TENTATIVE_TOKENS * self.delta_update_elems()
    }

    /// Elements of one kept update of a delta state: `k`, then `d`, then the decay, each padded.
    pub fn delta_update_elems(&self) -> u64 {
        pad(self.dims[1]) + pad(self.dims[2]) + LANES
    }
}

impl Type {
    /// A tensor of `f32`.
    pub fn f32(shape: Shape) -> Self {
        Self::Tensor(TensorType { shape, dtype: DType::F32 })
    }

    /// A tensor of `i32`.
    pub fn i32(shape: Shape) -> Self {
        Self::Tensor(TensorType { shape, dtype: DType::I32 })
    }

    /// A weight without a layout yet.
    pub fn weight(shape: &[u64], format: Format) -> Self {
        Self::Weight(WeightType { shape: shape.to_vec(), format, layout: None })
    }

    /// A state.
    pub fn state(kind: StateKind, dims: &[u64]) -> Self {
        Self::State(StateType { kind, dims: dims.to_vec() })
    }

    /// The tensor type, if it is one.
    pub fn as_tensor(&self) -> Option<&TensorType> {
        match self {
            Self::Tensor(t) => Some(t),
            _ => None,
        }
    }

    /// The weight type, if it is one.
    pub fn as_weight(&self) -> Option<&WeightType> {
        match self {
            Self::Weight(w) => Some(w),
            _ => None,
        }
    }

    /// The state type, if it is one.
    pub fn as_state(&self) -> Option<&StateType> {
        match self {
            Self::State(s) => Some(s),
            _ => None,
        }
    }

    /// The shape of a tensor, or of a weight as constants.
    pub fn shape(&self) -> Option<Shape> {
        match self {
            Self::Tensor(t) => Some(t.shape.clone()),
            Self::Weight(w) => Some(Shape(w.shape.iter().map(|&n| Dim::Const(n)).collect())),
            _ => None,
        }
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims = |f: &mut fmt::Formatter<'_>, dims: &[u64]| dims.iter().try_for_each(|d| write!(f, "{d} x "));
        match self {
            Self::Tensor(t) if t.shape.rank() == 0 => write!(f, "tensor<{}>", t.dtype),
            Self::Tensor(t) => write!(f, "tensor<{} x {}>", t.shape, t.dtype),
            Self::Weight(w) => {
                f.write_str("weight<")?;
                dims(f, &w.shape)?;
                write!(f, "{}", w.format)?;
                if let Some(layout) = w.layout {
                    write!(f, " @ {layout}")?;
                }
                f.write_str(">")
            }
            Self::State(s) => {
                write!(f, "state<{}", s.kind.name())?;
                s.dims.iter().try_for_each(|d| write!(f, " x {d}"))?;
                f.write_str(">")
            }
            Self::Sequences => f.write_str("sequences"),
            Self::Bundle(types) => {
                f.write_str("bundle<")?;
                for (i, t) in types.iter().enumerate() {
                    write!(f, "{}{t}", if i > 0 { ", " } else { "" })?;
                }
                f.write_str(">")
            }
        }
    }
}
