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

#[cfg(test)]
mod tests {
    use super::*;
    use nextc_ir::{Format, Shape, Sym};

    fn target() -> Target {
        Target::cpu("x86-64-v3", &[], 256)
    }

    fn check(op: Op, operands: &[Type], bytes: f64, launches: f64) {
        let operands: Vec<&Type> = operands.iter().collect();
        let results = (op.def().shape)(&operands, &Attrs::none()).expect("it fits");
        let ns = op_ns(op, &operands, &results, &Attrs::none(), &target());
        let expected = bytes / target().read_bytes_per_s * 1e9 + launches * target().launch_ns;
        assert!((ns - expected).abs() < 1e-6 * expected.max(1.0), "{op}: {ns} ns, expected {expected}");
    }

    #[test]
    fn one_token_is_paid_in_bytes_and_launches() {
        let x = Type::f32(Shape::rows(Sym::T, &[2048]));
        let w = Type::weight(&[512, 2048], Format::Bf16);
        check(Op::Linear, &[x.clone(), w.clone()], 512.0 * 2048.0 * 2.0 + (2048.0 + 512.0) * 4.0, 1.0);
        check(Op::Silu, std::slice::from_ref(&x), 2.0 * 2048.0 * 4.0, 0.25);
        check(Op::Bundle, &[w.clone(), w], 0.0, 0.0);
    }

    #[test]
    fn experts_are_read_as_often_as_they_are_chosen() {
        let cost = Cost { expert_bytes: 10.0, experts: (512, 10), ..Cost::default() };
        let ns = |tokens| roofline_ns(&cost, Workload { tokens, ..DECODE }, &target());
        assert!((ns(1.0) * target().read_bytes_per_s / 1e9 - 100.0).abs() < 1e-6);
        assert!(ns(1e6) <= 512.0 * 10.0 / target().read_bytes_per_s * 1e9 * (1.0 + 1e-9));
    }
}
