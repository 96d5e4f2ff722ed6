//! The op table: every op of the graph IR, declared once.
//!
//! A row holds name, operands, attributes, shape rule, cost and meaning. `enum Op`, [`Op::ALL`] and [`Op::def`] are made
//! from it; printer, parser, verifier, interpreter, e-graph language, cost model and `nextc ops` read the row.
//!
//! Conventions: the innermost dimensions of a weight are its input dimensions, those before it its output dimensions, so
//! `linear` of `[T, heads, width]` by `[H, heads, width]` contracts both. `T` is tokens; every op but convolution,
//! attention and the delta rule is per token.

use crate::attr::Attrs;
use crate::cost::{self, Cost};
use crate::eval::{Cx, Datum, EvalError};
use crate::ops::{attention, delta, experts, layout, math, norm, sample, step};
use crate::types::Type;

/// Why operands do not fit an op.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// Operand `operand` has a type that does not fit.
    #[error("`{operand}` is {found}, expected {expected}")]
    Mismatch {
        /// The operand's name in the op table.
        operand: &'static str,
        /// Its type, as printed.
        found: String,
        /// What would fit.
        expected: String,
    },
    /// The number of operands is wrong.
    #[error("{found} operands, expected {expected}")]
    Arity {
        /// How many there are.
        found: usize,
        /// How many there should be.
        expected: String,
    },
    /// An attribute is missing or of the wrong kind.
    #[error("attribute `{name}` is missing or not {expected}")]
    Attr {
        /// Its name.
        name: &'static str,
        /// What it should be.
        expected: &'static str,
    },
}

/// The kind of work an op is; partition and lowering decide by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// Not work: parameters, weights, calls, projections, bundles.
    Structure,
    /// One output element from the elements at its place (broadcasting): fuses with others of its kind into one kernel.
    Elementwise,
    /// A sum, maximum or selection along the innermost dimension.
    RowReduction,
    /// Anything else: a kernel of its own.
    Kernel,
}

/// The types of the operands to the types of the results.
pub type ShapeRule = fn(&[&Type], &Attrs) -> Result<Vec<Type>, ShapeError>;
/// Types of operands and results to bytes and FLOPs.
pub type CostRule = fn(&[&Type], &[Type], &Attrs) -> Cost;
/// What an op means, in numbers of type `F`.
pub type EvalRule<F> = fn(&Cx<F>, &[Datum<F>], &Attrs) -> Result<Vec<Datum<F>>, EvalError>;

/// One row of the table.
pub struct OpDef {
    /// The op.
    pub op: Op,
    /// Its name in IR text and in rules.
    pub name: &'static str,
    /// What it computes.
    pub doc: &'static str,
    /// Names of its operands; the last one ends in `...` if it stands for any number.
    pub operands: &'static [&'static str],
    /// Names of its attributes, which are trailing operands in rules.
    pub attrs: &'static [&'static str],
    /// What kind of work it is.
    pub class: Class,
    /// The shape rule.
    pub shape: ShapeRule,
    /// Bytes and FLOPs.
    pub cost: CostRule,
    /// Its meaning in f32.
    pub eval32: EvalRule<f32>,
    /// Its meaning in f64.
    pub eval64: EvalRule<f64>,
}

impl OpDef {
    /// True if the last operand stands for any number of operands.
    pub fn variadic(&self) -> bool {
        self.operands.last().is_some_and(|o| o.ends_with("..."))
    }
}

macro_rules! ops {
    ($( $(#[doc = $doc:literal])* $op:ident = $name:literal ($($operand:literal),* ; $($attr:literal),*) $class:ident => $shape:path, $cost:path, $($eval:ident)::+; )*) => {
        /// An op of the graph IR. See [`OpDef`] for its row.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Op { $( $(#[doc = $doc])* $op, )* }

        impl Op {
            /// Every op, in the order of the table.
            pub const ALL: &'static [Op] = &[ $( Op::$op, )* ];

            /// The op's row.
            pub fn def(self) -> &'static OpDef {
                static TABLE: &[OpDef] = &[ $( OpDef {
                    op: Op::$op, name: $name, doc: concat!($($doc, "\n",)*), operands: &[$($operand),*], attrs: &[$($attr),*],
                    class: Class::$class, shape: $shape, cost: $cost, eval32: $($eval)::+::<f32>, eval64: $($eval)::+::<f64>,
                }, )* ];
                &TABLE[self as usize]
            }

            /// The op called `name` in text.
            pub fn from_name(name: &str) -> Option<Op> {
                match name { $( $name => Some(Op::$op), )* _ => None }
            }
        }
    };
}

ops! {
    // ---- structure
    /// A parameter of the function; `index` counts from 0.
    Param = "param" (; "index") Structure => step::shape_declared, cost::free, step::eval_declared;
    /// A named constant of the checkpoint: an entry of the module's weight table.
    Weight = "weight" (; "name") Structure => step::shape_declared, cost::free, step::eval_declared;
    /// The results of another function of the module.
    Call = "call" ("args..."; "function") Structure => step::shape_declared, cost::free, step::eval_declared;
    /// Result `index` of an op with several results (e-graphs only; in text results have names of their own).
    Proj = "proj" ("tuple"; "index") Structure => step::shape_proj, cost::free, step::eval_proj;
    /// Several values as one operand.
    Bundle = "bundle" ("items..."; ) Structure => step::shape_bundle, cost::free, step::eval_bundle;
    /// The sequences of a step. positions `i32[T]`, cu_seqlens `i32[B+1]`, slot `i32[B]`, replay `i32[B]`, tentative `i32[B]`, page_table `i32[B, P]`.
    /// A tentative sequence leaves convolution and delta states as they are but for what its tokens would do, which the next
    /// step does first for `replay` of them.
    Sequences = "sequences" ("positions", "cu_seqlens", "slot", "replay", "tentative", "page_table"; ) Structure => step::shape_sequences, cost::free, step::eval_sequences;

    // ---- layout: rows in and out
    /// Row `tokens[t]` of the embedding table, the first for -1: `[T, hidden_size]`.
    Embed = "embed" ("tokens", "w"; ) Kernel => layout::shape_embed, cost::rows_of_weight, layout::eval_embed;
    /// Rows `rows[r]` of `x`: `[R, ...]`.
    GatherRows = "gather_rows" ("x", "rows"; ) Kernel => layout::shape_gather_rows, cost::streaming, layout::eval_gather_rows;

    // ---- elementwise math; shapes broadcast as in numpy, aligned at the innermost dimension; a weight may be an operand
    /// `a + b`.
    Add = "add" ("a", "b"; ) Elementwise => math::shape_binary, cost::elementwise, math::eval_add;
    /// `a * b`.
    Mul = "mul" ("a", "b"; ) Elementwise => math::shape_binary, cost::elementwise, math::eval_mul;
    /// `-x`.
    Neg = "neg" ("x"; ) Elementwise => math::shape_unary, cost::elementwise, math::eval_neg;
    /// `exp(x)`.
    Exp = "exp" ("x"; ) Elementwise => math::shape_unary, cost::elementwise, math::eval_exp;
    /// Logistic gate, `1 / (1 + exp(-x))`.
    Sigmoid = "sigmoid" ("x"; ) Elementwise => math::shape_unary, cost::elementwise, math::eval_sigmoid;
    /// `x * sigmoid(x)`.
    Silu = "silu" ("x"; ) Elementwise => math::shape_unary, cost::elementwise, math::eval_silu;
    /// `log(1 + exp(x))`, linear above 20 as in torch.
    Softplus = "softplus" ("x"; ) Elementwise => math::shape_unary, cost::elementwise, math::eval_softplus;
    /// `x * factor`.
    Scale = "scale" ("x"; "factor") Elementwise => math::shape_scale, cost::elementwise, math::eval_scale;
    /// `1 + x`: the gain of a zero-centred norm from its stored weight.
    PlusOne = "plus_one" ("x"; ) Elementwise => math::shape_unary, cost::elementwise, math::eval_plus_one;
    /// `silu(gate) * up`.
    Swiglu = "swiglu" ("gate", "up"; ) Elementwise => math::shape_swiglu, cost::elementwise, math::eval_swiglu;

    // ---- matmul
    /// `x · wᵀ`: `x` is `[T, in...]`, `w` is `[out..., in...]`, the result `[T, out...]`.
    Linear = "linear" ("x", "w"; ) Kernel => math::shape_linear, cost::weights, math::eval_linear;
    /// `linear` with some rows of `w` `[out, in]`: of each 16 neighbours those for which `wanted` `i32[ceil(out / 16)]` is not 0. The others give
    /// minus infinity.
    LinearWanted = "linear_wanted" ("x", "w", "wanted"; ) Kernel => math::shape_linear_wanted, cost::weights, math::eval_linear_wanted;
    /// Several projections of one input in one kernel, each weight in its own format: one result a weight of the bundle.
    Linears = "linears" ("x", "ws"; ) Kernel => math::shape_linears, cost::weights, math::eval_linears;
    /// `residual + x · wᵀ`, and the sum of squares of the result.
    LinearResidual = "linear_residual" ("x", "w", "residual"; ) Kernel => math::shape_linear_residual, cost::weights, math::eval_linear_residual;

    // ---- norms
    /// Sums of squares of each 16 neighbours of the innermost dimension: `[T, ceil(n / 16)]`, so that tiles of a matmul can write their part.
    SumSquares = "sum_squares" ("x"; ) RowReduction => norm::shape_sum_squares, cost::elementwise, norm::eval_sum_squares;
    /// `rsqrt(sum(ssq) / width + eps)`: `[T, 1]`, from the sums that `sum_squares` gives for rows of `width`.
    RmsScale = "rms_scale" ("ssq"; "width", "eps") RowReduction => norm::shape_row_scalar, cost::elementwise, norm::eval_rms_scale;
    /// `x * rsqrt(mean(x²) + eps) * w` over the innermost dimension.
    RmsNorm = "rms_norm" ("x", "w"; "eps") RowReduction => norm::shape_norm, cost::elementwise, norm::eval_rms_norm;
    /// `x * rsqrt(mean(x²) + eps) * (1 + w)`: Qwen3-Next's zero-centred norm.
    RmsNormPlusOne = "rms_norm_plus_one" ("x", "w"; "eps") RowReduction => norm::shape_norm, cost::elementwise, norm::eval_rms_norm_plus_one;
    /// The same with the sums of squares given: `x * rms_scale(ssq) * (1 + w)`.
    RmsNormSsq = "rms_norm_ssq" ("x", "ssq", "w"; "eps") Elementwise => norm::shape_norm_ssq, cost::elementwise, norm::eval_rms_norm_ssq;
    /// `x / sqrt(sum(x²) + eps)` over the innermost dimension.
    L2Norm = "l2_norm" ("x"; "eps") RowReduction => norm::shape_l2_norm, cost::elementwise, norm::eval_l2_norm;
    /// `linears(rms_norm_ssq(x, ssq, gain), ws)`: the norm is the matmul's prologue.
    NormLinears = "norm_linears" ("x", "ssq", "gain", "ws"; "eps") Kernel => norm::shape_norm_linears, cost::weights, norm::eval_norm_linears;
    /// `swiglu(linear(h, w_gate), linear(h, w_up))` with `h = rms_norm_ssq(x, ssq, gain)`: the front of a dense FFN.
    NormSwiglu = "norm_swiglu" ("x", "ssq", "gain", "w_gate", "w_up"; "eps") Kernel => norm::shape_norm_swiglu, cost::weights, norm::eval_norm_swiglu;

    // ---- gated attention
    /// Rotary embedding, half-split pairs: dimension `j` of a head pairs with `j + n`, `n` = number of frequencies; the rest pass.
    /// `angle = f32(position * inv_freq[j])`; cos and sin are multiplied by `factor` (YaRN).
    Rope = "rope" ("x", "inv_freq", "seqs"; "factor") Kernel => attention::shape_rope, cost::elementwise, attention::eval_rope;
    /// Appends keys and values `[T, num_kv_heads, head_dim]` at their positions; gives the new state.
    AppendKv = "append_kv" ("k", "v", "kv", "seqs"; ) Kernel => attention::shape_append_kv, cost::streaming, attention::eval_append_kv;
    /// Causal softmax attention over a KV state (pure: appending to KV is an op of its own).
    Attention = "attention" ("q", "kv", "seqs"; "scale") Kernel => attention::shape_attention, cost::attention, attention::eval_attention;
    /// `attention(q, kv) * sigmoid(output_gate)`.
    GatedAttention = "gated_attention" ("q", "output_gate", "kv", "seqs"; "scale") Kernel => attention::shape_gated_attention, cost::attention, attention::eval_gated_attention;
    /// `rope(rms_norm_plus_one(x, w))`.
    NormRope = "norm_rope" ("x", "w", "inv_freq", "seqs"; "eps", "factor") Kernel => attention::shape_norm_rope, cost::elementwise, attention::eval_norm_rope;
    /// `append_kv(norm_rope(k), v)`: what later tokens need of one that nobody attends from.
    NormAppend = "norm_append" ("k", "v", "k_norm", "inv_freq", "kv", "seqs"; "eps", "factor") Kernel => attention::shape_norm_append, cost::streaming, attention::eval_norm_append;
    /// `(norm_rope(q), append_kv(norm_rope(k), v))`: everything between the projections and the attention.
    NormRopeAppend = "norm_rope_append" ("q", "k", "v", "q_norm", "k_norm", "inv_freq", "kv", "seqs"; "eps", "factor") Kernel => attention::shape_norm_rope_append, cost::streaming, attention::eval_norm_rope_append;

    // ---- gated DeltaNet
    /// Depthwise causal convolution over the tokens of each sequence, no bias: `w` is `[heads, width, taps]`, the last tap meets the
    /// newest token; gives the output and the new window.
    Conv1d = "conv1d" ("x", "w", "conv", "seqs"; ) Kernel => delta::shape_conv1d, cost::streaming, delta::eval_conv1d;
    /// `silu` of `conv1d`'s output.
    Conv1dSilu = "conv1d_silu" ("x", "w", "conv", "seqs"; ) Kernel => delta::shape_conv1d, cost::streaming, delta::eval_conv1d_silu;
    /// Log of the decay: `g = -exp(a_log) * softplus(a + dt_bias)`, ≤ 0.
    DecayGate = "decay_gate" ("a", "a_log", "dt_bias"; ) Elementwise => delta::shape_decay_gate, cost::elementwise, delta::eval_decay_gate;
    /// Gated delta rule, the recurrence of a DeltaNet layer, over the tokens of each sequence.
    /// Per value head and token, in f32: `S ← exp(g)·S;  S ← S + k ⊗ (beta·(v − kᵀS));  out = qᵀS`.
    /// `q`, `k`: `[T, num_k_heads, head_k_dim]`, value head `j` uses key head `j / (num_v_heads / num_k_heads)`; `v`: `[T, num_v_heads, head_v_dim]`.
    DeltaRule = "delta_rule" ("q", "k", "v", "g", "beta", "delta", "seqs"; ) Kernel => delta::shape_delta_rule, cost::delta, delta::eval_delta_rule;
    /// `delta_rule` with `q = scale · l2_norm(q)`, `k = l2_norm(k)`, `g = decay_gate(a, ..)`, `beta = sigmoid(b)` in its prologue.
    DeltaRuleGated = "delta_rule_gated" ("q", "k", "v", "a", "b", "a_log", "dt_bias", "delta", "seqs"; "eps", "scale") Kernel => delta::shape_delta_rule_gated, cost::delta, delta::eval_delta_rule_gated;
    /// `delta_rule_gated` with the gated norm `rms_norm(out, norm) * silu(z)` as its epilogue.
    DeltaRuleNormed = "delta_rule_normed" ("q", "k", "v", "z", "a", "b", "a_log", "dt_bias", "norm", "delta", "seqs"; "eps", "scale", "norm_eps") Kernel => delta::shape_delta_rule_normed, cost::delta, delta::eval_delta_rule_normed;
    /// A whole DeltaNet mixer between its projections: `delta_rule_normed` of the `conv1d_silu` of q, k and v.
    /// Gives the output and the new `conv_q`, `conv_k`, `conv_v` and `delta`.
    GatedDeltaNet = "gated_delta_net" ("q", "k", "v", "z", "a", "b", "w_q", "w_k", "w_v", "a_log", "dt_bias", "norm", "conv_q", "conv_k", "conv_v", "delta", "seqs"; "eps", "scale", "norm_eps") Kernel => delta::shape_gated_delta_net, cost::delta, delta::eval_gated_delta_net;

    // ---- mixture of experts
    /// `exp(x - max) / sum` over the innermost dimension.
    Softmax = "softmax" ("x"; ) RowReduction => norm::shape_keep, cost::elementwise, experts::eval_softmax;
    /// The `k` largest of the innermost dimension in descending order, the lower index first among equals: values and indices `[T, k]`.
    TopK = "top_k" ("x"; "k") RowReduction => experts::shape_top_k, cost::elementwise, experts::eval_top_k;
    /// `x / sum(x)` over the innermost dimension.
    Renormalise = "renormalise" ("x"; ) RowReduction => norm::shape_keep, cost::elementwise, experts::eval_renormalise;
    /// The choices of all tokens grouped by expert. `order` `i32[T, k]`: the choices `t·k + s` sorted by expert, then by number (stored flat,
    /// without padding). `table` `i32[2·experts + 2]`: `starts[experts + 1]` of each expert's run in `order`, the number of experts that
    /// anybody chose, and their indices in ascending order (then -1).
    Dispatch = "dispatch" ("ids"; "experts") RowReduction => experts::shape_dispatch, cost::elementwise, experts::eval_dispatch;
    /// `w[ids[t, s]] · x[t]` for each chosen expert: `w` is `[num_experts, out, in]`; `x` is `[T, in]`, or `[T, k, in]` with a row for each choice.
    ExpertLinear = "expert_linear" ("x", "w", "ids", "order", "table"; ) Kernel => experts::shape_expert_linear, cost::experts, experts::eval_expert_linear;
    /// `Σ_s weights[t, s] · y[t, s]`, summed in ascending order of the expert's index.
    Combine = "combine" ("y", "weights", "ids"; ) Kernel => experts::shape_combine, cost::elementwise, experts::eval_combine;
    /// The router with the norm before it and the dispatch after it, `h = rms_norm_ssq(x, ssq, gain)`: `top_k` of the logits `h · router`,
    /// softmaxed over the chosen (`renormalise` = 1), or `top_k` of the softmax of all (0).
    /// Gives weights and ids `[T, k]`, `order` and `table` of `dispatch`, `shared = sigmoid(h · shared_gate)` `[T, 1]`,
    /// and the logits `[T, num_experts]`, which a kernel's tasks hand to its tail.
    NormRouter = "norm_router" ("x", "ssq", "gain", "router", "shared_gate"; "eps", "k", "renormalise") Kernel => experts::shape_norm_router, cost::weights, experts::eval_norm_router;
    /// The first half of all experts: `swiglu(expert_linear(h, w_gate), expert_linear(h, w_up))` `[T, k, moe_intermediate_size]` and the shared
    /// expert's `swiglu(linear(h, s_gate), linear(h, s_up))`, with `h = rms_norm_ssq(x, ssq, gain)`.
    ExpertsGateUp = "experts_gate_up" ("x", "ssq", "gain", "ids", "order", "table", "w_gate", "w_up", "s_gate", "s_up"; "eps") Kernel => experts::shape_experts_gate_up, cost::experts, experts::eval_experts_gate_up;
    /// The second half: `residual + (combine(expert_linear(h, w_down), weights) + shared · linear(s, s_down))`, and its sum of squares.
    ExpertsDown = "experts_down" ("h", "s", "weights", "ids", "order", "table", "shared", "w_down", "s_down", "residual"; ) Kernel => experts::shape_experts_down, cost::experts, experts::eval_experts_down;

    // ---- choosing tokens
    /// Index of the largest of each row, the lowest among equals; -1 if an element is NaN or +infinity, or all are -infinity.
    /// With the largest of each 256 neighbours, infinite where one is NaN or +infinity, which tasks hand to the tail.
    Argmax = "argmax" ("x"; ) Kernel => sample::shape_argmax, cost::elementwise, sample::eval_argmax;
    /// Logits with biases and penalties, and their peaks as of `argmax`. Row `r` of `factors` `[R, 6]` and `choices` `[R, 9]` says how row `r` is
    /// sampled (the columns: `ir/src/ops/sample.rs`). Edit `i` changes the logit of `edit_tokens[i]`, which the output has `edit_counts[i]` times (-1: nor
    /// has the prompt it), by `edit_biases[i]` and the penalties; no token stands twice among a row's edits. The row's drafts among the step's `tokens`
    /// count as output too. A row that needs no sampling is not defined.
    EditLogits = "edit_logits" ("logits", "tokens", "factors", "choices", "edit_tokens", "edit_counts", "edit_biases"; ) Kernel => sample::shape_edit_logits, cost::elementwise, sample::eval_edit_logits;
    /// `exp((x - largest) / temperature)`; not defined at temperature 0.
    TokenWeights = "token_weights" ("x", "peaks", "factors"; ) Kernel => sample::shape_token_weights, cost::elementwise, sample::eval_token_weights;
    /// A token for each row of processed logits `x`: `best` where nothing is to be processed, the largest at temperature 0, else drawn from what
    /// `top_k`, then `top_p`, then `min_p` leave, by the random number of seed, sequence and position; -1 if `best` is, or there is no finite largest.
    Choose = "choose" ("x", "peaks", "weights", "best", "factors", "choices"; ) Kernel => sample::shape_choose, cost::elementwise, sample::eval_choose;
    /// How many drafts of each sequence are right: of its rows (`rows[r]` is a row's token in the step), those from its first on whose `chosen` token is the
    /// next token that the step has fed to the sequence.
    Accept = "accept" ("chosen", "rows", "tokens", "cu_seqlens"; ) Kernel => sample::shape_accept, cost::free, sample::eval_accept;
}

impl std::fmt::Display for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.def().name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_is_found_by_its_op_and_its_name() {
        for &op in Op::ALL {
            assert_eq!(op.def().op, op);
            assert_eq!(Op::from_name(op.def().name), Some(op));
            assert!(!op.def().doc.trim().is_empty(), "{op} has no doc");
        }
    }
}
