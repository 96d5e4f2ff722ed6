//! What stands between the projections of a gated-attention layer and its output projection, by blocks of threads.
//!
//! norm_rope_append, norm_append  a warp a head (`norm_rope`)
//! gated_attention   two classes of tokens, in products of fragments with sums in f32:
//!   runs that are decoded  a block a split of positions (`splits`, `decode`, `warp`); what the splits found is put together by the tail (`merge`)
//!   long runs              a block some tokens, over all their positions (`bulk`)
//! traffic  two rows of KV a kv head and position, for all query heads that share it: bound by memory in short runs
//!
//! Splits and tiles of positions lie at absolute places and are put together in order, so a token's bits depend on its class and position, not on the step. Decoded
//! tokens take q and probabilities as sums of two bf16, and KV as it is (f32 as the sum of two bf16); long runs round all of them to bf16.

mod bulk;
mod decode;
mod merge;
mod norm_rope;
mod runs;
mod splits;
mod warp;
mod words;

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};

use super::super::LowerError;
use super::super::attention::Attention;
use super::super::matmul::row_ptr;
use super::super::ports::{Lowered, Port, Ports, Site};
use runs::Tokens;
use words::BLOCK_ELEMS;

pub use norm_rope::lower_norm_append;
pub use runs::sequence_of;
pub use words::{Parts, across, four, pack};

/// Widest head: each thread of a warp holds sums of an eighth of its elements for a few rows.
const MOST_ELEMS: u64 = 256;
/// What a maximum begins with. Nothing less is scored, and its distance to itself is 0.
const LOWEST: f32 = f32::MIN;

/// `gated_attention`.
pub fn lower_gated_attention(site: &Site<'_>) -> Option<Result<Lowered, LowerError>> {
    let mut ports = Ports::default();
    let attention = Attention::ports(site, &mut ports);
    let pages = attention.pages;
    let fits = attention.elems() <= MOST_ELEMS
        && attention.shared <= bulk::ROWS
        && pages.page_tokens.is_multiple_of(decode::CHUNK)
        && pages.page_tokens.is_multiple_of(bulk::POSITIONS);
    let decoded = || decode::lower(site, ports.clone(), attention);
    fits.then(|| Ok(decoded().then(bulk::lower(site, ports.clone(), attention))))
}

impl Attention {
    /// Blocks of [`BLOCK_ELEMS`] elements of a head, of which the last may not be full.
    const fn blocks(&self) -> u64 {
        self.elems().div_ceil(BLOCK_ELEMS)
    }

    /// Pointer to the row of one query head of token `t`.
    fn row(&self, k: &mut KernelBuilder, port: Port, t: Val, head: Val) -> Val {
        let base = k.param(port);
        let row = row_ptr(k, base, t, self.heads * self.elems());
        row_ptr(k, row, head, self.elems())
    }

    /// `out = o / sum · sigmoid(output_gate)` of one element of a head of token `t`.
    fn finish(&self, k: &mut KernelBuilder, (o, sum): (Val, Val), (t, head, at): (Val, Val, Val)) {
        let (gate, out) = (self.row(k, self.gate, t, head), self.row(k, self.out, t, head));
        let gate = k.load_f32(gate, at);
        let x = self.gated(k, o, sum, gate);
        k.store(out, at, x);
    }

    /// The same of four neighbouring ones.
    fn finish_four(&self, k: &mut KernelBuilder, o: [Val; 4], sum: Val, (t, head, at): (Val, Val, Val)) {
        let (gate, out) = (self.row(k, self.gate, t, head), self.row(k, self.out, t, head));
        let gates = k.load(DType::F32, 4, gate, at);
        let values = [0, 1, 2, 3].map(|i: usize| {
            let gate = k.extract(gates, i as u32);
            self.gated(k, o[i], sum, gate)
        });
        let values = k.quad(values);
        k.store(out, at, values);
    }

    fn gated(&self, k: &mut KernelBuilder, o: Val, sum: Val, gate: Val) -> Val {
        let (x, gate) = (k.fdiv(o, sum), k.sigmoid(gate));
        k.fmul(x, gate)
    }

    /// Zeros for elements `from`, `from + step`, .. before `end` of one query head of token `t`.
    fn zero_out(&self, k: &mut KernelBuilder, elements: (Val, Val, u64), (t, head): (Val, Val)) {
        let (out, nothing) = (self.row(k, self.out, t, head), k.const_f32(0.0));
        k.for_each(elements, |k, c| k.store(out, c, nothing));
    }
}

/// Where the query heads of a kv head lie among the rows that a block works on: row `i · shared + h` is head `h` of token `i`.
struct RowOf {
    /// The token among those of the tile, and whether there is one.
    token: Val,
    exists: Val,
    /// The query head, of all.
    head: Val,
}

impl RowOf {
    fn new(k: &mut KernelBuilder, attention: &Attention, tokens: &Tokens, kv_head: Val, row: Val) -> Self {
        let (token, h) = (k.div_const(row, attention.shared), k.rem_const(row, attention.shared));
        let first = k.mul_const(kv_head, attention.shared);
        let exists = k.cmp(Pred::Lt, token, tokens.count);
        Self { token, exists, head: k.add(first, h) }
    }
}
