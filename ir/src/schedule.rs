//! The schedule: which kernels an entry point runs, in order, and what their parameters are bound to. Data, apart from the
//! kernels' code.

use std::fmt;

use crate::graph::{ModelInfo, Placement, WeightDecl};
use crate::kernel::Kernel;
use crate::layout::{Layout, Planes};
use crate::shape::Sym;
use crate::types::StateType;

/// A number that depends on the dimensions of a step: the tasks of a grid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Extent {
    /// A constant.
    Const(u64),
    /// A dimension of the step.
    Sym(Sym),
    /// Sum.
    Add(Box<Extent>, Box<Extent>),
    /// Product.
    Mul(Box<Extent>, Box<Extent>),
    /// Quotient by a constant, rounded up.
    CeilDiv(Box<Extent>, u64),
    /// The smaller.
    Min(Box<Extent>, Box<Extent>),
    /// `[a, b, then, otherwise]`: `then` if `a` is larger than `b`, else `otherwise`.
    Above(Box<[Extent; 4]>),
}

impl Extent {
    /// The number under given dimensions (indexed by [`Sym::index`]).
    pub fn eval(&self, syms: &[u64; 4]) -> u64 {
        match self {
            Self::Const(n) => *n,
            Self::Sym(s) => syms[s.index()],
            Self::Add(a, b) => a.eval(syms) + b.eval(syms),
            Self::Mul(a, b) => a.eval(syms) * b.eval(syms),
            Self::CeilDiv(a, n) => a.eval(syms).div_ceil(*n),
            Self::Min(a, b) => a.eval(syms).min(b.eval(syms)),
            Self::Above(parts) => {
                let [a, b, then, otherwise] = &**parts;
                if a.eval(syms) > b.eval(syms) { then.eval(syms) } else { otherwise.eval(syms) }
            }
        }
    }

    /// The smaller of two.
    #[must_use]
    pub fn min(self, other: Self) -> Self {
        Self::Min(Box::new(self), Box::new(other))
    }

    /// This if `a` is larger than `b`, else `otherwise`.
    #[must_use]
    pub fn if_above(self, a: impl Into<Self>, b: impl Into<Self>, otherwise: Self) -> Self {
        Self::Above(Box::new([a.into(), b.into(), self, otherwise]))
    }

    /// Divided by a constant, rounded up.
    #[must_use]
    pub fn ceil_div(self, n: u64) -> Self {
        Self::CeilDiv(Box::new(self), n)
    }
}

impl From<u64> for Extent {
    fn from(n: u64) -> Self {
        Self::Const(n)
    }
}
impl From<Sym> for Extent {
    fn from(s: Sym) -> Self {
        Self::Sym(s)
    }
}
impl std::ops::Add for Extent {
    type Output = Self;
    fn add(self, o: Self) -> Self {
        Self::Add(Box::new(self), Box::new(o))
    }
}
impl std::ops::Mul for Extent {
    type Output = Self;
    fn mul(self, o: Self) -> Self {
        Self::Mul(Box::new(self), Box::new(o))
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Const(n) => write!(f, "{n}"),
            Self::Sym(s) => f.write_str(s.name()),
            Self::Add(a, b) => write!(f, "({a} + {b})"),
            Self::Mul(a, b) => write!(f, "({a} * {b})"),
            Self::CeilDiv(a, n) => write!(f, "ceil({a} / {n})"),
            Self::Min(a, b) => write!(f, "min({a}, {b})"),
            Self::Above(parts) => {
                let [a, b, then, otherwise] = &**parts;
                write!(f, "if({a} > {b}, {then}, {otherwise})")
            }
        }
    }
}

/// An input of a step, in the order of [`Input::ALL`]. All are `i32` but `Hidden`, `Factors` and `EditBiases`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// `tokens[T]`.
    Tokens,
    /// `positions[T]`.
    Positions,
    /// `cu_seqlens[B+1]`.
    CuSeqlens,
    /// `slot[B]`, -1 for a padding sequence.
    Slot,
    /// `replay[B]`: how many tokens of the sequence's last step, which was tentative, were accepted; 0 after an ordinary one.
    Replay,
    /// `tentative[B]`: 1 if this step's tokens may yet be taken back, at most [`crate::types::TENTATIVE_TOKENS`] of them.
    Tentative,
    /// `page_table[B, P]`, rows without padding.
    PageTable,
    /// `logit_rows[R]`.
    LogitRows,
    /// `hidden[T, hidden_size]`, f32, rows padded to 16: what `@draft` continues from.
    Hidden,
    /// `factors[R, 6]`, f32, rows padded to 16: see [`crate::ops::sample::Factor`].
    Factors,
    /// `choices[R, 9]`, rows padded to 16: see [`crate::ops::sample::Choice`].
    Choices,
    /// `edit_tokens[P]`: tokens whose logits are changed, of all rows.
    EditTokens,
    /// `edit_counts[P]`: how often the output has each, -1 if the prompt has it not either.
    EditCounts,
    /// `edit_biases[P]`, f32: what is added to each one's logit.
    EditBiases,
    /// `wanted[ceil(vocab_size / 16)]`: 1 where the logits of 16 tokens are wanted of `@guess`.
    Wanted,
}

impl Input {
    /// Every input.
    pub const ALL: [Self; 15] = [
        Self::Tokens,
        Self::Positions,
        Self::CuSeqlens,
        Self::Slot,
        Self::Replay,
        Self::Tentative,
        Self::PageTable,
        Self::LogitRows,
        Self::Hidden,
        Self::Factors,
        Self::Choices,
        Self::EditTokens,
        Self::EditCounts,
        Self::EditBiases,
        Self::Wanted,
    ];

    /// The parameter's name in the entry functions.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tokens => "tokens",
            Self::Positions => "positions",
            Self::CuSeqlens => "cu_seqlens",
            Self::Slot => "slot",
            Self::Replay => "replay",
            Self::Tentative => "tentative",
            Self::PageTable => "page_table",
            Self::LogitRows => "logit_rows",
            Self::Hidden => "hidden",
            Self::Factors => "factors",
            Self::Choices => "choices",
            Self::EditTokens => "edit_tokens",
            Self::EditCounts => "edit_counts",
            Self::EditBiases => "edit_biases",
            Self::Wanted => "wanted",
        }
    }
}

/// What a kernel's parameter is bound to in one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arg {
    /// An input of the step.
    Input(Input),
    /// A place in the arena.
    Arena(Placement),
    /// An entry of the weight table.
    Weight(u32),
    /// An entry of the state table.
    State(u32),
}

/// One run of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Index of the kernel.
    pub kernel: u32,
    /// One argument for each of its parameters.
    pub args: Vec<Arg>,
    /// The function of the graph that it came from, and the layer: for `explain` and profiles.
    pub label: String,
}

/// A result of an entry point: `rows` rows of `width` numbers of 4 bytes, stored `stride` apart: floats, or i32 for tokens and counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Its name: see [`ENTRIES`].
    pub name: String,
    /// Where it lies.
    pub at: Placement,
    /// How many rows it has.
    pub rows: Sym,
    /// Numbers of one row.
    pub width: u64,
    /// Numbers from one row to the next.
    pub stride: u64,
}

/// What is fixed of an entry point.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Its name.
    pub name: &'static str,
    /// The names of its results but states.
    pub results: &'static [&'static str],
    /// The entry point that has run before it with the same dimensions (but `P`): its parameters that are named like results of that
    /// one are those, where they lie.
    pub after: Option<&'static str>,
}

/// Every entry point that a module can have.
pub const ENTRIES: [Entry; 6] = [
    Entry { name: "step", results: &["logits", "hidden", "best"], after: None },
    Entry { name: "draft", results: &["logits", "hidden", "best"], after: None },
    Entry { name: "guess", results: &["logits", "hidden", "best"], after: None },
    Entry { name: "follow", results: &[], after: None },
    Entry { name: "sample", results: &["tokens"], after: Some("step") },
    Entry { name: "verify", results: &["tokens", "accepted"], after: Some("step") },
];

/// An entry point of [`ENTRIES`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Its name.
    pub name: String,
    /// What it runs, in order.
    pub launches: Vec<Launch>,
    /// What it gives.
    pub outputs: Vec<Output>,
    /// Bytes a row of logits that it uses of the arena's last region; other programs may use more.
    pub row_bytes: u64,
}

/// Bytes of the arena: `bytes[Sym]` for each unit of the symbol, and a fixed part. The regions follow one another: fixed, then T, B, P, R.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArenaPlan {
    /// Bytes that do not depend on the step.
    pub fixed_bytes: u64,
    /// Bytes a unit of each symbol (indexed by [`Sym::index`]); multiples of 64.
    pub unit_bytes: [u64; 4],
}

impl ArenaPlan {
    /// Bytes for a step of these dimensions.
    pub fn bytes(&self, syms: &[u64; 4]) -> u64 {
        self.fixed_bytes + self.unit_bytes.iter().zip(syms).map(|(b, n)| b * n).sum::<u64>()
    }
}

/// An entry of the weight table, with its layout.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedWeight {
    /// Its name.
    pub name: String,
    /// What it is and where it comes from.
    pub decl: WeightDecl,
    /// Where its elements lie.
    pub layout: Layout,
}

impl PackedWeight {
    /// Where everything lies, if it is a matrix.
    pub fn planes(&self) -> Planes {
        Planes::new(self.layout, self.decl.format, self.decl.out_dims(), self.decl.in_dims())
    }

    /// Bytes as packed (without alignment).
    pub fn bytes(&self) -> u64 {
        match self.layout {
            Layout::Flat => crate::layout::flat_dims(&self.decl.shape, self.decl.in_rank).iter().product::<u64>() * 4,
            Layout::Tile16 | Layout::Mma16 => self.planes().bytes(),
        }
    }
}

/// An entry of the state table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateDecl {
    /// Its name: `layers.3.kv`.
    pub name: String,
    /// Its type.
    pub ty: StateType,
}

/// Everything that the backends and the linker need: kernels, schedules and tables.
#[derive(Clone, Debug)]
pub struct KernelModule {
    /// Facts of the model.
    pub info: ModelInfo,
    /// The kernels, each once per kind of layer.
    pub kernels: Vec<Kernel>,
    /// The entry points.
    pub programs: Vec<Program>,
    /// The weight table.
    pub weights: Vec<PackedWeight>,
    /// The state table.
    pub states: Vec<StateDecl>,
    /// The arena.
    pub arena: ArenaPlan,
    /// Tokens in a page of KV.
    pub page_tokens: u64,
}
