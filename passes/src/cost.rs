//! What a term costs on a target: the longer of moving its bytes and doing its arithmetic, and the start of its kernel.

use nextc_ir::cost::Cost;
use nextc_ir::graph::Function;
use nextc_ir::op::Class;
use nextc_ir::{Attrs, Op, Target, Type};

/// The step that is paid for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Workload {
    /// Tokens of the step.
    pub tokens: f64,
    /// Sequences of the step.
    pub sequences: f64,
    /// Tokens that each sequence already has.
    pub context: f64,
}

/// One token of one sequence: what a person waits for, and where a launch weighs most.
pub const DECODE: Workload = Workload { tokens: 1.0, sequences: 1.0, context: 1024.0 };

/// Share of a launch that an op is charged with. An elementwise op mostly shares its kernel with others.
fn launches(class: Class) -> f64 {
    match class {
        Class::Structure => 0.0,
        Class::Elementwise => 0.25,
        Class::RowReduction | Class::Kernel => 1.0,
    }
}

/// Nanoseconds of a step's worth of `cost`, without the launch.
pub fn roofline_ns(cost: &Cost, work: Workload, target: &Target) -> f64 {
    let bytes = cost.bytes(work.tokens, work.sequences, work.context);
    let flops = cost.flops(work.tokens, work.context);
    (bytes / target.read_bytes_per_s).max(flops / target.flops_per_s) * 1e9
}

/// Nanoseconds of one op in a decode step.
pub fn op_ns(op: Op, operands: &[&Type], results: &[Type], attrs: &Attrs, target: &Target) -> f64 {
    let def = op.def();
    let cost = (def.cost)(operands, results, attrs);
    roofline_ns(&cost, DECODE, target) + launches(def.class) * target.launch_ns
}

/// Nanoseconds of all ops of a function in a decode step.
pub fn function_ns(function: &Function, target: &Target) -> f64 {
    let node_ns = |id| {
        let node = function.node(id);
        let values = function.operands(id);
        let operands: Vec<&Type> = values.iter().map(|&v| function.ty(v)).collect();
        op_ns(node.op, &operands, &node.types, &node.attrs, target)
    };
    function.order().into_iter().map(node_ns).sum()
}
