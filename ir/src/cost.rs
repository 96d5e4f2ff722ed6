//! What an op costs: bytes that must move and arithmetic that must be done, for a given step.

use crate::attr::Attrs;
use crate::dtype::DType;
use crate::types::Type;

/// Bytes and FLOPs of one op, as polynomials in the tokens of a step: a part that is there once, and a part a token.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Weight bytes read once a step (dense weights).
    pub weight_bytes: f64,
    /// Weight bytes read once for each expert that is chosen by some token.
    pub expert_bytes: f64,
    /// Experts there are, and experts a token chooses (both 0 where there are none).
    pub experts: (u64, u64),
    /// Activation bytes read and written a token.
    pub token_bytes: f64,
    /// State bytes read and written a sequence.
    pub state_bytes: f64,
    /// KV bytes read for each token of context.
    pub context_bytes: f64,
    /// FLOPs a token.
    pub token_flops: f64,
    /// FLOPs a token for each token of context.
    pub context_flops: f64,
}

/// No work.
pub fn free(_: &[&Type], _: &[Type], _: &Attrs) -> Cost {
    Cost::default()
}

/// Elements a token of `t` (the product of all constant dimensions), 0 if it has no symbol first.
fn token_elems(t: &Type) -> f64 {
    t.as_tensor().map_or(0.0, |t| t.shape.0.iter().filter_map(|d| d.as_const()).product::<u64>() as f64)
}

fn token_bytes(t: &Type) -> f64 {
    t.as_tensor().map_or(0.0, |tensor| token_elems(t) * tensor.dtype.bytes() as f64)
}

fn moved(operands: &[&Type], results: &[Type]) -> f64 {
    operands.iter().map(|t| token_bytes(t)).sum::<f64>() + results.iter().map(token_bytes).sum::<f64>()
}

/// Bytes of a weight, or of a bundle's weights; vectors count as f32.
pub fn weight_bytes(t: &Type) -> f64 {
    match t {
        Type::Weight(w) if w.shape.len() >= 2 => w.format.bytes(w.shape.iter().product()) as f64,
        Type::Weight(w) => (w.shape.iter().product::<u64>() * DType::F32.bytes()) as f64,
        Type::Bundle(items) => items.iter().map(weight_bytes).sum(),
        _ => 0.0,
    }
}

fn weight_elems(t: &Type) -> f64 {
    match t {
        Type::Weight(w) if w.shape.len() >= 2 => w.shape.iter().product::<u64>() as f64,
        Type::Bundle(items) => items.iter().map(weight_elems).sum(),
        _ => 0.0,
    }
}

/// A few FLOPs an element; operands and results move.
pub fn elementwise(operands: &[&Type], results: &[Type], _: &Attrs) -> Cost {
    let elems: f64 = results.iter().map(token_elems).sum();
    Cost {
        weight_bytes: operands.iter().map(|t| weight_bytes(t)).sum(),
        token_bytes: moved(operands, results),
        token_flops: 4.0 * elems,
        ..Cost::default()
    }
}

/// Operands, results and states move once; arithmetic does not count.
pub fn streaming(operands: &[&Type], results: &[Type], attrs: &Attrs) -> Cost {
    let state = operands.iter().filter_map(|t| t.as_state()).filter(|s| s.kind != crate::types::StateKind::Kv);
    Cost {
        state_bytes: 2.0 * state.map(|s| s.step_bytes() as f64).sum::<f64>(),
        ..elementwise(operands, results, attrs)
    }
}

/// One row of the weight a token.
pub fn rows_of_weight(operands: &[&Type], results: &[Type], _: &Attrs) -> Cost {
    let row = |t: &Type| t.as_weight().map_or(0.0, |w| w.format.bytes(w.shape[1..].iter().product()) as f64);
    Cost { token_bytes: moved(operands, results) + operands.iter().map(|t| row(t)).sum::<f64>(), ..Cost::default() }
}

/// Every weight once; two FLOPs a weight and token.
pub fn weights(operands: &[&Type], results: &[Type], _: &Attrs) -> Cost {
    Cost {
        weight_bytes: operands.iter().map(|t| weight_bytes(t)).sum(),
        token_bytes: moved(operands, results),
        token_flops: 2.0 * operands.iter().map(|t| weight_elems(t)).sum::<f64>(),
        ..Cost::default()
    }
}

/// Weights of rank 3 are experts': read for each expert that is chosen.
pub fn experts(operands: &[&Type], results: &[Type], attrs: &Attrs) -> Cost {
    let routed = |t: &&&Type| t.as_weight().is_some_and(|w| w.shape.len() == 3);
    let dense: Vec<&Type> = operands.iter().filter(|t| !routed(t)).copied().collect();
    let stacked: Vec<&Type> = operands.iter().filter(routed).copied().collect();
    let num_experts = stacked.first().and_then(|t| t.as_weight()).map_or(0, |w| w.shape[0]);
    let ids = operands.iter().filter_map(|t| t.as_tensor()).find(|t| t.dtype == DType::I32);
    let chosen = ids.and_then(|t| t.shape.last()).unwrap_or(1);
    let each = |f: fn(&Type) -> f64| stacked.iter().map(|t| f(t)).sum::<f64>() / num_experts.max(1) as f64;
    let base = weights(&dense, results, attrs);
    Cost {
        expert_bytes: each(weight_bytes),
        experts: (num_experts, chosen),
        token_flops: base.token_flops + 2.0 * chosen as f64 * each(weight_elems),
        ..base
    }
}

/// KV is read once a token of context; two products of `head_dim` a query head.
pub fn attention(operands: &[&Type], results: &[Type], attrs: &Attrs) -> Cost {
    let kv = operands.iter().filter_map(|t| t.as_state()).map(|s| s.bytes() as f64).sum();
    let context_flops = 4.0 * results.iter().map(token_elems).sum::<f64>();
    Cost { context_bytes: kv, context_flops, ..elementwise(operands, results, attrs) }
}

/// The state is read and written once a sequence; seven FLOPs an element and token.
pub fn delta(operands: &[&Type], results: &[Type], attrs: &Attrs) -> Cost {
    let states = operands.iter().filter_map(|t| t.as_state());
    let state_bytes: f64 = states.map(|s| s.step_bytes() as f64).sum();
    let token_flops = 7.0 * state_bytes / 4.0;
    Cost { state_bytes: 2.0 * state_bytes, token_flops, ..elementwise(operands, results, attrs) }
}

impl Cost {
    /// Bytes that a step of `tokens` (over `sequences`, each with `context` tokens already) must move.
    pub fn bytes(&self, tokens: f64, sequences: f64, context: f64) -> f64 {
        let (experts, chosen) = (self.experts.0 as f64, self.experts.1 as f64);
        let touched = if experts > 0.0 { experts * (1.0 - (1.0 - chosen / experts).powf(tokens)) } else { 0.0 };
        self.weight_bytes
            + touched * self.expert_bytes
            + tokens * self.token_bytes
            + sequences * (self.state_bytes + context * self.context_bytes)
    }

    /// FLOPs of the same step.
    pub fn flops(&self, tokens: f64, context: f64) -> f64 {
        tokens * (self.token_flops + (context + tokens / 2.0) * self.context_flops)
    }
}

impl std::ops::Add for Cost {
    type Output = Self;
    fn add(self, o: Self) -> Self {
        Self {
            weight_bytes: self.weight_bytes + o.weight_bytes,
            expert_bytes: self.expert_bytes + o.expert_bytes,
            experts: if self.experts.0 > 0 { self.experts } else { o.experts },
            token_bytes: self.token_bytes + o.token_bytes,
            state_bytes: self.state_bytes + o.state_bytes,
            context_bytes: self.context_bytes + o.context_bytes,
            token_flops: self.token_flops + o.token_flops,
            context_flops: self.context_flops + o.context_flops,
        }
    }
}
