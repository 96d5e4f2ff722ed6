//! The metadata of an executable: the model, the machine, kernels, schedules and tables, stored as JSON.
//!
//! These mirror the schedule of the compiler's IR (`ir/src/schedule.rs`), which the linker converts; the runtime knows only
//! these.

use serde::{Deserialize, Serialize};

/// Everything that the runtime must know of what it runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metadata {
    /// [`crate::VERSION`].
    pub version: u32,
    /// Version of the compiler.
    pub compiler: String,
    /// The backend that made the code.
    pub backend: String,
    /// Fingerprint of code, schedule and weights.
    pub fingerprint: String,
    /// The model.
    pub model: Model,
    /// The machine that the code needs.
    pub target: Target,
    /// The kernels.
    pub kernels: Vec<Kernel>,
    /// The entry points: `step` and `sample`, and `draft` and `verify` where the model has MTP.
    pub programs: Vec<Program>,
    /// The weights.
    pub weights: WeightTable,
    /// The states of a sequence.
    pub states: Vec<State>,
    /// The arena.
    pub arena: Arena,
    /// Tokens in a page of KV.
    pub page_tokens: u64,
    /// Tokens of a tentative step at most.
    pub tentative_tokens: u64,
    /// Files of the section `assets`.
    pub assets: Vec<Asset>,
    /// Code for lesser CPUs, the best first, where the executable has code for several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<Version>,
}

/// What differs from CPU to CPU: what [`Metadata`] says under the same names is that for the best of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Version {
    /// The machine that the code needs.
    pub target: Target,
    /// The kernels.
    pub kernels: Vec<Kernel>,
    /// The entry points.
    pub programs: Vec<Program>,
    /// The arena.
    pub arena: Arena,
}

impl Metadata {
    /// The entry point called `name`.
    pub fn program(&self, name: &str) -> Option<&Program> {
        self.programs.iter().find(|p| p.name == name)
    }

    /// The machines that there is code for, the best first.
    pub fn targets(&self) -> impl Iterator<Item = &Target> {
        std::iter::once(&self.target).chain(self.others.iter().map(|version| &version.target))
    }

    /// Puts version `number`, in the order of [`Self::targets`], in the place of the first.
    pub fn choose(&mut self, number: usize) {
        let Some(version) = number.checked_sub(1).and_then(|i| self.others.get_mut(i)) else { return };
        std::mem::swap(&mut self.target, &mut version.target);
        std::mem::swap(&mut self.kernels, &mut version.kernels);
        std::mem::swap(&mut self.programs, &mut version.programs);
        std::mem::swap(&mut self.arena, &mut version.arena);
    }

    /// Bytes that one sequence takes apart from KV: all states with one entry a slot.
    pub fn state_bytes_per_sequence(&self) -> u64 {
        self.states.iter().filter(|s| s.kind != StateKind::Kv).map(|s| s.bytes).sum()
    }

    /// How many of them are there so that tokens can be taken back: the inputs and updates of a tentative step.
    pub fn rollback_bytes_per_sequence(&self) -> u64 {
        self.states.iter().map(|s| s.rollback_bytes).sum()
    }

    /// Bytes of KV a token, over all layers.
    pub fn kv_bytes_per_token(&self) -> u64 {
        self.states.iter().filter(|s| s.kind == StateKind::Kv).map(|s| s.bytes).sum()
    }
}

/// Facts of the model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// Its name.
    pub name: String,
    /// Token ids are below this.
    pub vocab_size: u64,
    /// Width of the residual stream.
    pub hidden_size: u64,
    /// Layers of the trunk.
    pub num_layers: u64,
    /// The longest context of a sequence, in tokens.
    pub max_context: u64,
    /// Stop tokens.
    pub eos_token_ids: Vec<u32>,
    /// True if there is an entry point `draft`.
    pub mtp: bool,
}

/// [`Target::arch`] of CPUs.
pub const X86_64: &str = "x86_64";
/// [`Target::arch`] of NVIDIA GPUs.
pub const NVPTX64: &str = "nvptx64";

/// Most tokens of prompts in a step where nobody says otherwise: so many that products are as fast as they get, which on a GPU are more.
pub fn default_step_tokens(arch: &str) -> u32 {
    if arch == NVPTX64 { 4096 } else { 512 }
}

/// Threads of a GPU's block that runs tasks of one thread, each a task.
pub const SINGLE_THREADS: u32 = 32;

/// The machine that the code was made for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// Architecture: [`X86_64`] or [`NVPTX64`].
    pub arch: String,
    /// The CPU or GPU as named on the compiler's command line.
    pub cpu: String,
    /// Instruction-set features that the code uses, in LLVM's spelling.
    pub features: Vec<String>,
}

/// A kernel of the code image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Kernel {
    /// Its name.
    pub name: String,
    /// What was fused into it.
    pub doc: String,
    /// Offset of its code in the image. For a GPU that is the text of its PTX, up to a NUL; kernel `i` is the entry function `nextc_kernel_{i}`.
    pub entry: u64,
    /// Offset of its tail's code, if it has one; for a GPU the same text, with the entry function `nextc_tail_{i}`.
    pub tail: Option<u64>,
    /// For a GPU: what an assembler made of the text (a cubin), where there was one when the executable was built.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub binary: Option<Span>,
    /// Bytes of scratch that a thread needs (on a GPU: a task).
    pub scratch_bytes: u64,
    /// Bytes that a task hands to the tail, one task's after another's.
    pub partial_bytes: u64,
    /// Threads of a task: 1, or those of a block of a GPU.
    pub threads: u32,
    /// Bytes of memory that the threads of a block share.
    pub shared_bytes: u64,
    /// True if every thread waits for the launch before this one, so that this one may begin while that one still runs.
    pub waits: bool,
    /// The same of its tail.
    pub tail_waits: bool,
    /// Number of parameters, without the dimensions.
    pub params: u32,
    /// Number of tasks.
    pub grid: Extent,
    /// Number of tasks of its tail.
    pub tail_grid: Extent,
}

/// A run of bytes: of the code image, or of the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Offset of the first.
    pub at: u64,
    /// How many there are.
    pub bytes: u64,
}

impl Span {
    /// True if all of them lie among the first `bytes` of the image.
    pub fn is_within(self, bytes: u64) -> bool {
        self.at.checked_add(self.bytes).is_some_and(|end| end <= bytes)
    }
}

/// A dimension that only a step knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sym {
    /// Tokens of the step.
    T,
    /// Sequences of the step.
    B,
    /// Width of the page table.
    P,
    /// Rows with logits.
    R,
}

/// A number that depends on the dimensions of a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// The number under given dimensions (`T`, `B`, `P`, `R`).
    pub fn eval(&self, dims: &[u64; 4]) -> u64 {
        match self {
            Self::Const(n) => *n,
            Self::Sym(s) => dims[*s as usize],
            Self::Add(a, b) => a.eval(dims).saturating_add(b.eval(dims)),
            Self::Mul(a, b) => a.eval(dims).saturating_mul(b.eval(dims)),
            Self::CeilDiv(a, n) => a.eval(dims).div_ceil((*n).max(1)),
            Self::Min(a, b) => a.eval(dims).min(b.eval(dims)),
            Self::Above(parts) => {
                let [a, b, then, otherwise] = &**parts;
                if a.eval(dims) > b.eval(dims) { then.eval(dims) } else { otherwise.eval(dims) }
            }
        }
    }
}

/// An input of a step. All are `i32` but `Hidden`, `Factors` and `EditBiases`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Input {
    /// `tokens[T]`.
    Tokens,
    /// `positions[T]`.
    Positions,
    /// `cu_seqlens[B+1]`.
    CuSeqlens,
    /// `slot[B]`, -1 for a padding sequence.
    Slot,
    /// `replay[B]`: kept tokens of each sequence that are done first.
    Replay,
    /// `tentative[B]`: 1 if a sequence's tokens are kept instead of done.
    Tentative,
    /// `page_table[B, P]`.
    PageTable,
    /// `logit_rows[R]`.
    LogitRows,
    /// `hidden[T, hidden_size]`, f32, rows padded to 16.
    Hidden,
    /// `factors[R, 6]`, f32, rows padded to 16: [`crate::Factor`].
    Factors,
    /// `choices[R, 9]`, rows padded to 16: [`crate::Choice`].
    Choices,
    /// `edit_tokens[P]`: tokens whose logits are changed, of all rows.
    EditTokens,
    /// `edit_counts[P]`: how often the output has each, -1 if the prompt has it not either.
    EditCounts,
    /// `edit_biases[P]`, f32: what is added to each one's logit.
    EditBiases,
    /// `wanted[ceil(vocab_size / 16)]`: 1 where the logits of 16 tokens are wanted.
    Wanted,
}

/// A place in the arena: `at_bytes` a unit of `unit`, inside the region of that unit; a fixed place if there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// The dimension that the size is a multiple of.
    pub unit: Option<Sym>,
    /// Offset in bytes a unit.
    pub at_bytes: u64,
}

/// What a parameter of a kernel is bound to in one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// Index of the kernel.
    pub kernel: u32,
    /// One argument for each of its parameters.
    pub args: Vec<Arg>,
    /// The function and the layer that it came from.
    pub label: String,
}

/// A result of an entry point: `rows` rows of `width` numbers of 4 bytes, `stride` apart: floats, or i32 for tokens and counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// Its name: `logits`, `hidden`, `best`; `tokens`, `accepted`.
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

/// An entry point.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Program {
    /// Its name.
    pub name: String,
    /// What it runs, in order.
    pub launches: Vec<Launch>,
    /// What it gives.
    pub outputs: Vec<Output>,
    /// Bytes a row of logits that it uses of the arena's last region; other programs may use more.
    pub row_bytes: u64,
    /// What one step costs.
    pub cost: Cost,
}

/// Bytes and FLOPs of a step, as polynomials in its tokens, sequences and context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Weight bytes read once a step.
    pub weight_bytes: f64,
    /// Weight bytes read for each expert index that is chosen by some token, over all layers.
    pub expert_bytes: f64,
    /// Experts of a layer.
    pub experts: u64,
    /// Experts that a token chooses.
    pub experts_per_token: u64,
    /// Bytes of rows gathered from weights a token.
    pub token_bytes: f64,
    /// State bytes read and written a sequence.
    pub state_bytes: f64,
    /// KV bytes read for each token of context.
    pub context_bytes: f64,
    /// FLOPs a token.
    pub token_flops: f64,
    /// FLOPs a row of logits.
    pub row_flops: f64,
    /// FLOPs a token for each token of context.
    pub context_flops: f64,
}

impl Cost {
    /// Bytes that a step of `tokens` tokens over `sequences` sequences, each with `context` tokens already, must move. Experts
    /// count as often as `tokens` uniform choices hit different ones.
    pub fn bytes(&self, tokens: f64, sequences: f64, context: f64) -> f64 {
        let (experts, chosen) = (self.experts as f64, self.experts_per_token as f64);
        let touched = if experts > 0.0 { experts * (1.0 - (1.0 - chosen / experts).powf(tokens)) } else { 0.0 };
        self.weight_bytes
            + touched * self.expert_bytes
            + tokens * self.token_bytes
            + sequences * (self.state_bytes + context * self.context_bytes)
    }
}

/// Where the weights are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightsPlace {
    /// Nowhere: built from a `config.json` alone.
    None,
    /// In the section `weights`.
    Embedded,
    /// In `EXE.weights`.
    Beside,
}

/// The weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WeightTable {
    /// Where they are.
    pub place: WeightsPlace,
    /// Bytes of all of them with their header and padding.
    pub bytes: u64,
    /// Fingerprint of names, layouts and contents; empty if there are none.
    pub fingerprint: String,
    /// The weights.
    pub entries: Vec<Weight>,
}

/// A packed weight.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Weight {
    /// Its name: `layers.3.w_q`.
    pub name: String,
    /// Its dimensions before padding: output dimensions, then input dimensions.
    pub shape: Vec<u64>,
    /// How many of the innermost dimensions are inputs.
    pub in_rank: u64,
    /// How its numbers are stored: `bf16`, `f16`, `f32`.
    pub format: String,
    /// Where its elements lie: `tile16`, `flat`.
    pub layout: String,
    /// Offset from the beginning of the weights; a multiple of 64.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
    /// What its bytes mean, for weights that are made up.
    pub parts: Vec<Part>,
    /// Its blocked hash ([`crate::hash::of_blocks`]); empty if there are no weights.
    pub checksum: String,
}

/// A run of a weight's bytes that mean one thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Offset from the beginning of the weight.
    pub at: u64,
    /// Bytes.
    pub bytes: u64,
    /// What they are.
    pub holds: Holds,
}

/// What bytes of a weight are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Holds {
    /// Numbers, or codes that have scales.
    Numbers(Number),
    /// Scales, and between them second numbers where there are any.
    Scales {
        /// How they are stored.
        stored: Number,
        /// What they scale.
        codes: Number,
    },
    /// Units of scales that are signed bytes.
    Units {
        /// How they are stored.
        stored: Number,
        /// What the scales scale.
        codes: Number,
    },
    /// For each of so many stored columns the number of the column that it is, i32; for many groups of rows one after the other.
    Order {
        /// Columns.
        columns: u64,
    },
}

/// How a number is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Number {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// FP8 (e4m3fn).
    E4m3,
    /// A signed byte.
    I8,
    /// Four bits: a number from -8 to 7 with 8 added, or one from 0 to 15.
    U4,
    /// Six bits: a number from -32 to 31 with 32 added.
    U6,
}

/// The kinds of state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StateKind {
    /// Keys and values, paged.
    Kv,
    /// The last inputs of a convolution, one entry a slot.
    Conv,
    /// The matrix of the delta rule, one entry a slot.
    Delta,
}

/// A state that each sequence carries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Its name: `layers.3.kv`.
    pub name: String,
    /// What it is.
    pub kind: StateKind,
    /// Bytes of a token for KV, of a slot for the others.
    pub bytes: u64,
    /// How many of them keep what tentative tokens would have done.
    pub rollback_bytes: u64,
}

/// Bytes of the arena. The regions follow one another: fixed, then `T`, `B`, `P`, `R`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arena {
    /// Bytes that do not depend on the step.
    pub fixed_bytes: u64,
    /// Bytes a unit of each dimension.
    pub unit_bytes: [u64; 4],
}

impl Arena {
    /// Bytes for a step of these dimensions.
    pub fn bytes(&self, dims: &[u64; 4]) -> u64 {
        self.fixed_bytes + self.unit_bytes.iter().zip(dims).map(|(b, n)| b * n).sum::<u64>()
    }

    /// Bytes that `program` uses of an arena of these dimensions.
    pub fn bytes_of(&self, program: &Program, dims: &[u64; 4]) -> u64 {
        let rows = dims[Sym::R as usize];
        self.bytes(dims) - (self.unit_bytes[Sym::R as usize] - program.row_bytes) * rows
    }

    /// Offset of a placement under given dimensions.
    pub fn offset(&self, at: &Placement, dims: &[u64; 4]) -> u64 {
        let Some(unit) = at.unit else { return at.at_bytes };
        let before = (0..unit as usize).map(|i| self.unit_bytes[i] * dims[i]).sum::<u64>();
        self.fixed_bytes + before + at.at_bytes * dims[unit as usize]
    }
}

/// A file of the section `assets`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asset {
    /// Its name: `tokenizer.json`.
    pub name: String,
    /// Offset in the section.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_of_the_arena_follow_one_another() {
        let arena = Arena { fixed_bytes: 64, unit_bytes: [128, 64, 0, 256] };
        let dims = [3, 2, 5, 1];
        let at = |unit, at_bytes| arena.offset(&Placement { unit, at_bytes }, &dims);
        assert_eq!(at(None, 32), 32);
        assert_eq!(at(Some(Sym::T), 64), 64 + 192);
        assert_eq!(at(Some(Sym::B), 0), 64 + 384);
        assert_eq!(at(Some(Sym::R), 128), 64 + 384 + 128 + 128);
        assert_eq!(arena.bytes(&dims), 64 + 384 + 128 + 256);
    }

    #[test]
    fn extents_survive_json() {
        let e = Extent::Min(
            Box::new(Extent::CeilDiv(Box::new(Extent::Sym(Sym::T)), 4)),
            Box::new(Extent::Mul(Box::new(Extent::Const(3)), Box::new(Extent::Sym(Sym::R)))),
        );
        let text = serde_json::to_string(&e).unwrap();
        assert_eq!(serde_json::from_str::<Extent>(&text).unwrap(), e);
        assert_eq!(e.eval(&[9, 1, 1, 2]), 3);
    }

    #[test]
    fn experts_count_once_each() {
        let cost = Cost { expert_bytes: 10.0, experts: 4, experts_per_token: 2, ..Cost::default() };
        assert_eq!(cost.bytes(1.0, 1.0, 0.0), 20.0);
        assert!(cost.bytes(100.0, 1.0, 0.0) <= 40.0);
    }
}
