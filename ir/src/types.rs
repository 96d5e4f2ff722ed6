//! The types of graph values.

use std::fmt;

use crate::dtype::DType;
use crate::format::Format;
use crate::layout::{Layout, padded_index};
use crate::shape::{Dim, LANES, Shape, pad};
use crate::stored::Stored;

/// What a value of a graph is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Type {
    /// An activation, or an input of the step: `tensor<T x 2048 x f32>`.
    Tensor(TensorType),
    /// A named constant of the checkpoint: `weight<16 x 128 x 2048 x bf16>`, after `layout` also `@ tile16`.
    Weight(WeightType),
    /// One version of a piece of state: `state<delta x 32 x 128 x 128>`, `state<kv x 2 x 256 x bf16>`.
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
    /// The last inputs of a causal convolution: `[heads, head_dim, taps - 1]` a slot and room for those of a tentative step, as a ring of `taps - 1 +` [`TENTATIVE_TOKENS`]
    /// rows: the input at position `p` lies in row `p % rows`, so that no step writes what it reads.
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

/// Tokens of a chunk of the delta rule where long runs are computed in chunks: positions from one multiple of this to the next.
pub const CHUNK_TOKENS: u64 = 64;

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
    /// How its numbers are stored: anything for KV, `f32` for the others.
    pub stored: Stored,
}

/// How a head of keys or values lies: its numbers in lines of 64 bytes, and apart from them its scale, where its type has one. A line is [`LANES`] words of 32 bits,
/// and part `p` of word `j` is element `p * LANES + j` of those of the line: whichever the type, words that follow one another hold elements that follow one
/// another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvRow {
    /// Elements of a head.
    pub width: u64,
    /// How they are stored.
    pub stored: Stored,
}

impl KvRow {
    /// Elements in a word.
    pub fn parts(&self) -> u64 {
        32 / self.stored.format().def().bits
    }

    /// Elements of a line.
    pub fn line_elems(&self) -> u64 {
        LANES * self.parts()
    }

    /// Lines of a row, of which the last may not be full.
    pub fn lines(&self) -> u64 {
        self.width.div_ceil(self.line_elems())
    }

    /// Bytes of a row, without its scale.
    pub fn bytes(&self) -> u64 {
        self.lines() * LANES * 4
    }

    /// Bytes of a row's scale.
    pub fn scale_bytes(&self) -> u64 {
        if self.stored.is_scaled() { DType::F32.bytes() } else { 0 }
    }

    /// Bytes of the keys, or the values, of one head in a page: the rows, then their scales.
    pub fn page_bytes(&self, page_tokens: u64) -> u64 {
        page_tokens * (self.bytes() + self.scale_bytes())
    }

    /// The byte of a row that element `i` begins in.
    pub fn byte(&self, i: u64) -> u64 {
        let (line, within) = (i / self.line_elems(), i % self.line_elems());
        (line * LANES + within % LANES) * 4 + within / LANES * (4 / self.parts())
    }
}

impl StateType {
    /// Elements that share what [`Stored`] says of a row: a head of keys or values; of other states any.
    pub fn row_elems(&self) -> usize {
        match self.kind {
            StateKind::Kv => self.dims[1] as usize,
            StateKind::Conv | StateKind::Delta => 1,
        }
    }

    /// How a head of keys or values lies.
    pub fn kv_row(&self) -> KvRow {
        KvRow { width: self.dims[1], stored: self.stored }
    }

    /// Bytes as stored: of one token for [`StateKind::Kv`] (keys and values), of one slot for the others.
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
            StateKind::Kv => 2 * self.dims[0] * self.kv_row().page_bytes(1),
            StateKind::Conv => self.dims[2] * self.dims[0] * pad(self.dims[1]) * 4,
            StateKind::Delta => self.dims[0] * self.dims[1] * pad(self.dims[2]) * 4,
        }
    }

    /// The byte of a unit (a page of `page_tokens`, a slot) that its element `i` begins in, if elements are numbered without padding as the graph
    /// interpreter does: see [`crate::eval::State`].
    pub fn stored_byte(&self, i: u64, page_tokens: u64) -> u64 {
        match self.kind {
            StateKind::Kv => {
                let (row, width) = (self.kv_row(), self.dims[1]);
                let (head, number) = (i / width / page_tokens, i / width % page_tokens);
                head * row.page_bytes(page_tokens) + number * row.bytes() + row.byte(i % width)
            }
            StateKind::Conv => padded_index(&self.dims[..2], i) * 4,
            StateKind::Delta => self.delta_index(i) * 4,
        }
    }

    /// The byte that the scale of the row of element `i` begins in, where rows have one.
    pub fn scale_byte(&self, i: u64, page_tokens: u64) -> Option<u64> {
        let row = self.kv_row();
        let (head, number) = (i / row.width / page_tokens, i / row.width % page_tokens);
        let scales = head * row.page_bytes(page_tokens) + page_tokens * row.bytes();
        self.stored.is_scaled().then(|| scales + number * row.scale_bytes())
    }

    /// The number that a delta state has element `i` as.
    fn delta_index(&self, i: u64) -> u64 {
        let (width, depth) = (self.dims[1], self.dims[2]);
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

    /// A state of f32.
    pub fn state(kind: StateKind, dims: &[u64]) -> Self {
        Self::State(StateType { kind, dims: dims.to_vec(), stored: Stored::F32 })
    }

    /// Keys and values of so many heads of so many elements.
    pub fn kv(heads: u64, head_dim: u64, stored: Stored) -> Self {
        Self::State(StateType { kind: StateKind::Kv, dims: vec![heads, head_dim], stored })
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
                if s.stored != Stored::F32 {
                    write!(f, " x {}", s.stored.name())?;
                }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Each element of a page has bytes of its own, none of them those of a scale, and words that follow one another hold neighbours.
    #[test]
    fn rows_of_kv_hold_every_element_once() {
        let types = Stored::ALL.into_iter().flat_map(|stored| [12, 24, 56, 72, 256].map(|width| (width, stored)));
        for (width, stored) in types {
            let page_tokens = 4;
            let Type::State(state) = Type::kv(2, width, stored) else { panic!("KV is a state") };
            let row = state.kv_row();
            let (elems, bytes) = (2 * 2 * page_tokens * width, 4 / row.parts());
            let mut taken: Vec<u64> = (0..elems).map(|i| state.stored_byte(i, page_tokens)).collect();
            assert_eq!(taken[1] - taken[0], 4, "{width} x {stored:?}");
            taken.sort_unstable();
            taken.dedup();
            assert_eq!(taken.len() as u64, elems, "{width} x {stored:?}");
            let page = row.page_bytes(page_tokens);
            assert!(taken.iter().all(|at| at % page + bytes <= page_tokens * row.bytes()), "{width} x {stored:?}");
            assert!(taken.iter().all(|at| at + bytes <= page_tokens * state.bytes()), "{width} x {stored:?}");
        }
    }

    #[test]
    fn kv_takes_the_bytes_of_its_type_where_lines_are_full() {
        let bytes = |width, stored| Type::kv(2, width, stored).as_state().map(StateType::bytes);
        assert_eq!(bytes(256, Stored::F32), Some(2 * 2 * 256 * 4));
        assert_eq!(bytes(256, Stored::Bf16), Some(2 * 2 * 256 * 2));
        assert_eq!(bytes(256, Stored::Int8), Some(2 * 2 * (256 + 4)));
        assert_eq!(bytes(24, Stored::Bf16), bytes(32, Stored::Bf16));
    }
}
