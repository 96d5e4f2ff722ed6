//! Skeletons for GPUs: each task is a block of threads.
//!
//! A kernel first does what depends on nothing (addresses, asking for its weights), then waits for the launches before it ([`begin`]), then
//! works. Kernels that have no skeleton here are those of CPUs, run by single threads.

pub mod attention;
pub mod choose;
pub mod delta_conv;
pub mod delta_long;
pub mod delta_rule;
pub mod delta_state;
pub mod delta_sweep;
pub mod delta_within;
pub mod dispatch;
pub mod down_few;
pub mod experts_down;
pub mod experts_gate_up;
pub mod few;
pub mod fragments;
pub mod many;
pub mod many_experts;
pub mod matmul;
pub mod router;
pub mod rows;
pub mod sample;
pub mod some;
pub mod stage;
pub mod tile;
pub mod wide;

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::{DType, Layout, Op};

use super::LowerError;
use super::ports::{Lowered, Site};

/// The kernel of one node, if there is a skeleton of blocks for it.
/// # Errors
/// [`LowerError::Unsupported`] if the skeleton does not cover it.
pub fn lower(site: &Site<'_>) -> Option<Result<Lowered, LowerError>> {
    match layouts(site) {
        (false, true) => return None,
        (true, true) => return Some(Err(site.error("weights of which only some lie as fragments of products"))),
        _ => {}
    }
    match site.op() {
        Op::Embed => Some(rows::lower_embed(site)),
        Op::SumSquares => Some(rows::lower_sum_squares(site)),
        Op::Argmax => Some(rows::lower_argmax(site)),
        Op::EditLogits => Some(sample::lower_edit_logits(site)),
        Op::TokenWeights => Some(sample::lower_token_weights(site)),
        Op::Choose => choose::lower_choose(site),
        Op::RmsNorm | Op::RmsNormPlusOne => Some(rows::lower_rms_norm(site)),
        Op::Linear | Op::Linears | Op::NormLinears => Some(matmul::lower_linears(site)),
        Op::LinearWanted => Some(matmul::lower_linear_wanted(site)),
        Op::LinearResidual => Some(matmul::lower_linear_residual(site)),
        Op::NormSwiglu => Some(matmul::lower_norm_swiglu(site)),
        Op::NormRouter => Some(router::lower_norm_router(site)),
        Op::ExpertsGateUp => Some(experts_gate_up::lower_experts_gate_up(site)),
        Op::ExpertsDown => Some(experts_down::lower_experts_down(site)),
        Op::NormRopeAppend | Op::NormAppend => Some(attention::lower_norm_append(site)),
        Op::GatedAttention => attention::lower_gated_attention(site),
        Op::GatedDeltaNet => delta_rule::lower_gated_delta_net(site),
        _ => None,
    }
}

/// Whether a node has weights that lie as fragments, and whether it has matrices that lie as for CPUs.
fn layouts(site: &Site<'_>) -> (bool, bool) {
    let f = site.function;
    let operands = f.operands(site.node);
    let bundled = operands.iter().filter(|v| f.node(v.node).op == Op::Bundle).flat_map(|v| f.operands(v.node));
    let layouts: Vec<_> =
        operands.iter().copied().chain(bundled).filter_map(|v| f.ty(v).as_weight().and_then(|w| w.layout)).collect();
    (layouts.contains(&Layout::Mma16), layouts.contains(&Layout::Tile16))
}

/// The place of a thread in its block.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Its number in the block.
    pub thread: Val,
    /// Its warp.
    pub warp: Val,
    /// Its number in the warp.
    pub lane: Val,
}

impl Place {
    /// The place of this thread.
    pub fn here(k: &mut KernelBuilder) -> Self {
        let thread = k.thread();
        Self { thread, warp: k.div_const(thread, 32), lane: k.rem_const(thread, 32) }
    }

    /// Runs `body` in the first thread of the block.
    pub fn once(&self, k: &mut KernelBuilder, body: impl FnOnce(&mut KernelBuilder)) {
        let first = k.const_i64(0);
        let leads = k.cmp(Pred::Eq, self.thread, first);
        k.if_then(leads, body);
    }

    /// Runs `body` in the first thread of each warp.
    pub fn once_a_warp(&self, k: &mut KernelBuilder, body: impl FnOnce(&mut KernelBuilder)) {
        let first = k.const_i64(0);
        let leads = k.cmp(Pred::Eq, self.lane, first);
        k.if_then(leads, body);
    }
}

/// One of some elements that a warp shares out: number `lane`, `lane + 32`, ..
#[derive(Clone, Copy, Debug)]
pub struct Element {
    /// Its number.
    pub at: Val,
    /// The thread's number in the warp.
    pub lane: Val,
    /// Whether it is this thread's, where it need not be.
    pub exists: Option<Val>,
}

impl Place {
    /// This thread's share of `elems` elements.
    pub fn places(&self, k: &mut KernelBuilder, elems: u64) -> Vec<Element> {
        let of = |first: u64| {
            let at = k.add_const(self.lane, first);
            if first + 32 <= elems {
                return Element { at, lane: self.lane, exists: None };
            }
            let end = k.index(elems);
            let exists = k.cmp(Pred::Lt, at, end);
            Element { at, lane: self.lane, exists: Some(exists) }
        };
        (0..elems).step_by(32).map(of).collect()
    }
}

impl Element {
    /// The element of an array of f32; 0 if it is not this thread's.
    pub fn load(&self, k: &mut KernelBuilder, from: Val) -> Val {
        let zero = k.const_f32(0.0);
        match self.exists {
            None => k.load_f32(from, self.at),
            Some(exists) => k.if_else(exists, |k| vec![k.load_f32(from, self.at)], |_| vec![zero])[0],
        }
    }

    /// The element of an array of i32; 0 if it is not this thread's.
    pub fn load_i32(&self, k: &mut KernelBuilder, from: Val) -> Val {
        let load = |k: &mut KernelBuilder| k.load(DType::I32, 1, from, self.at);
        let zero = k.const_i32(0);
        match self.exists {
            None => load(k),
            Some(exists) => k.if_else(exists, |k| vec![load(k)], |_| vec![zero])[0],
        }
    }

    /// Stores it, if it is this thread's.
    pub fn store(&self, k: &mut KernelBuilder, to: Val, x: Val) {
        match self.exists {
            None => k.store(to, self.at, x),
            Some(exists) => k.if_then(exists, |k| k.store(to, self.at, x)),
        }
    }
}

/// The lanes of a vector.
pub fn lanes_of(k: &mut KernelBuilder, x: Val) -> Vec<Val> {
    match k.ty(x).lanes() {
        1 => vec![x],
        n => (0..n).map(|lane| k.extract(x, lane)).collect(),
    }
}

/// Ends what depends on nothing: lets the next kernel begin, and waits for those before.
pub fn begin(k: &mut KernelBuilder) {
    k.release();
    k.wait();
}

/// The same the other way round, so that the next kernel may read before its wait what launches before this one wrote.
pub fn begin_alone(k: &mut KernelBuilder) {
    k.wait();
    k.release();
}

/// Begins a kernel that starts when all before it are done: its blocks fill the machine more than once, and those that waited would take room from those that
/// still work.
pub fn begin_after(k: &mut KernelBuilder) {
    k.release();
}

/// Lanes whose numbers meet, turn by turn, until each thread of a warp has met all.
const WARP: [u32; 5] = [16, 8, 4, 2, 1];
/// The same of half a warp.
const HALF_WARP: [u32; 4] = [8, 4, 2, 1];

/// Sum of some numbers, a power of two, as a fixed tree: those of the first half with those of the second, and so on.
pub fn tree_sum(k: &mut KernelBuilder, mut x: Vec<Val>) -> Val {
    while x.len() > 1 {
        let (low, high) = x.split_at(x.len() / 2);
        x = low.iter().zip(high).map(|(&a, &b)| k.fadd(a, b)).collect();
    }
    x[0]
}

/// Joins the numbers of neighbouring threads, in all of them, as a fixed tree: in each turn those of `lane` and `lane ^ mask`.
fn across(k: &mut KernelBuilder, masks: &[u32], x: Val, join: impl Fn(&mut KernelBuilder, Val, Val) -> Val) -> Val {
    masks.iter().fold(x, |joined, &mask| {
        let other = k.shuffle_xor(joined, mask);
        join(k, joined, other)
    })
}

/// Sum over the threads of a warp, in all of them.
pub fn warp_sum(k: &mut KernelBuilder, x: Val) -> Val {
    across(k, &WARP, x, |k, a, b| k.fadd(a, b))
}

/// Sum of an i32 over the threads of a warp, in all of them.
pub fn warp_count(k: &mut KernelBuilder, x: Val) -> Val {
    across(k, &WARP, x, |k, a, b| k.add(a, b))
}

/// Sum over the 16 threads of half a warp, in all of them.
pub fn half_warp_sum(k: &mut KernelBuilder, x: Val) -> Val {
    across(k, &HALF_WARP, x, |k, a, b| k.fadd(a, b))
}

/// Largest number of the threads of a warp, in all of them.
pub fn warp_max(k: &mut KernelBuilder, x: Val) -> Val {
    across(k, &WARP, x, |k, a, b| k.fmax(a, b))
}

/// `start` joined with the numbers of the lanes before this one, and the join of the numbers of all lanes.
pub fn lanes_before(
    k: &mut KernelBuilder,
    lane: Val,
    (start, x): (Val, Val),
    join: impl Fn(&mut KernelBuilder, Val, Val) -> Val,
) -> (Val, Val) {
    let (none, lane) = (k.const_i32(0), k.narrow(lane));
    WARP.into_iter().rev().fold((start, x), |(before, all), mask| {
        let other = k.shuffle_xor(all, mask);
        let bit = k.const_i32(mask as i32);
        let bit = k.and(lane, bit);
        let is_upper = k.cmp(Pred::Ne, bit, none);
        let more = join(k, before, other);
        (k.select(is_upper, more, before), join(k, all, other))
    })
}

/// How many lanes before this one have the same i32, and whether none behind it has.
pub fn lanes_alike(k: &mut KernelBuilder, lane: Val, x: Val) -> (Val, Val) {
    let (none, one, lane) = (k.const_i32(0), k.const_i32(1), k.narrow(lane));
    let [mut before, mut behind] = [none; 2];
    for top in WARP.into_iter().rev() {
        let bit = k.const_i32(top as i32);
        let bit = k.and(lane, bit);
        let is_upper = k.cmp(Pred::Ne, bit, none);
        // lanes that differ in this bit and in lower ones: all before this lane, or all behind it
        let alike = (top..2 * top).fold(none, |sum, mask| {
            let other = k.shuffle_xor(x, mask);
            let same = k.cmp(Pred::Eq, other, x);
            let more = k.select(same, one, none);
            k.add(sum, more)
        });
        let [lower, upper] = [k.select(is_upper, alike, none), k.select(is_upper, none, alike)];
        (before, behind) = (k.add(before, lower), k.add(behind, upper));
    }
    (before, k.cmp(Pred::Eq, behind, none))
}

/// Sums of several numbers (a power of two, at most 32) over the threads of a warp: thread `lane` gets that of number `lane / (32 / n)`. The tree of each is that of
/// [`warp_sum`].
pub fn warp_sums(k: &mut KernelBuilder, lane: Val, mut x: Vec<Val>) -> Val {
    let (lane, zero) = (k.narrow(lane), k.const_i32(0));
    for mask in WARP {
        if x.len() == 1 {
            let other = k.shuffle_xor(x[0], mask);
            x[0] = k.fadd(x[0], other);
            continue;
        }
        let bit = k.const_i32(mask as i32);
        let bit = k.and(lane, bit);
        let is_upper = k.cmp(Pred::Ne, bit, zero);
        let (low, high) = x.split_at(x.len() / 2);
        let pairs = low.iter().zip(high);
        x = pairs
            .map(|(&low, &high)| {
                let (own, given) = (k.select(is_upper, high, low), k.select(is_upper, low, high));
                let other = k.shuffle_xor(given, mask);
                k.fadd(own, other)
            })
            .collect();
    }
    x[0]
}
