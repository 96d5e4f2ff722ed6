//! What a step costs, kernel by kernel, counted from the fused graph.

use std::collections::BTreeMap;

use nextc_ir::cost::Cost;
use nextc_ir::graph::{Function, Module, NodeId};
use nextc_ir::op::Class;
use nextc_ir::schedule::KernelModule;
use nextc_ir::{Dim, Op, Target, shape::Sym};

/// The step that is counted: one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Tokens of the step.
    pub tokens: u64,
    /// Tokens that the sequence already holds.
    pub context: u64,
}

/// One kernel's part of a step.
#[derive(Clone, Debug)]
pub struct KernelAccount {
    /// Its name, as in the kernel module.
    pub name: String,
    /// What was fused into it.
    pub doc: String,
    /// Bytes that it must move.
    pub bytes: f64,
    /// Arithmetic that it must do.
    pub flops: f64,
    /// The least time it can take on the target, nanoseconds: memory or arithmetic, and its launch.
    pub ns: f64,
}

/// A kind of layer in an entry point.
#[derive(Clone, Debug)]
pub struct LayerAccount {
    /// The function's name.
    pub name: String,
    /// How often the entry point calls it.
    pub calls: u64,
    /// Its kernels in order.
    pub kernels: Vec<KernelAccount>,
}

impl LayerAccount {
    /// The sum over its kernels, for one call.
    pub fn sum(&self, of: fn(&KernelAccount) -> f64) -> f64 {
        self.kernels.iter().map(of).sum()
    }
}

/// The layers that `entry` calls, in the order of their first call; nothing if there is no such entry point.
pub fn layers(fused: &Module, kernels: &KernelModule, target: &Target, entry: &str, step: Step) -> Vec<LayerAccount> {
    let Some(entry) = fused.function(entry) else { return Vec::new() };
    let first = first_kernels(fused);
    let mut layers: Vec<LayerAccount> = Vec::new();
    for name in calls(entry) {
        if let Some(layer) = layers.iter_mut().find(|l| l.name == name) {
            layer.calls += 1;
        } else if let Some(function) = fused.function(name) {
            let index = first.get(name).copied().unwrap_or(0);
            let accounts = kernels_of(function).into_values().enumerate();
            let accounts = accounts.map(|(i, nodes)| account(function, &nodes, kernels, index + i, target, step));
            layers.push(LayerAccount { name: name.to_owned(), calls: 1, kernels: accounts.collect() });
        }
    }
    layers
}

/// Names of the functions that an entry point calls, in order.
fn calls(entry: &Function) -> Vec<&str> {
    let nodes = entry.order().into_iter().map(|id| entry.node(id));
    nodes.filter(|n| n.op == Op::Call).filter_map(|n| n.attrs.str("function")).collect()
}

/// The index of each function's first kernel: lowering goes through the functions in their order.
fn first_kernels(fused: &Module) -> BTreeMap<&str, usize> {
    let mut next = 0;
    let mut first = BTreeMap::new();
    for function in fused.functions.iter().filter(|f| calls(f).is_empty()) {
        first.insert(function.name.as_str(), next);
        next += kernels_of(function).len();
    }
    first
}

/// The nodes of each kernel.
fn kernels_of(function: &Function) -> BTreeMap<u32, Vec<NodeId>> {
    let mut kernels: BTreeMap<u32, Vec<NodeId>> = BTreeMap::new();
    for id in function.order() {
        let node = function.node(id);
        if let (Some(kernel), true) = (node.kernel, node.op.def().class != Class::Structure) {
            kernels.entry(kernel).or_default().push(id);
        }
    }
    kernels
}

fn account(
    function: &Function,
    nodes: &[NodeId],
    kernels: &KernelModule,
    index: usize,
    target: &Target,
    step: Step,
) -> KernelAccount {
    let ops = || nodes.iter().map(|&id| function.node(id).op.to_string()).collect::<Vec<_>>().join(" + ");
    let kernel = kernels.kernels.get(index);
    let cost = nodes.iter().map(|&id| cost_of(function, id)).fold(Cost::default(), |a, b| a + b);
    let tokens = if nodes.iter().any(|&id| is_of_rows(function, id)) { 1.0 } else { step.tokens as f64 };
    let (bytes, flops) = (cost.bytes(tokens, 1.0, step.context as f64), cost.flops(tokens, step.context as f64));
    KernelAccount {
        name: kernel.map_or_else(ops, |k| k.name.clone()),
        doc: kernel.map_or_else(ops, |k| k.doc.clone()),
        bytes,
        flops,
        ns: 1e9 * (bytes / target.read_bytes_per_s).max(flops / target.flops_per_s) + target.launch_ns,
    }
}

fn cost_of(function: &Function, id: NodeId) -> Cost {
    let node = function.node(id);
    let operands = function.operands(id);
    let types: Vec<_> = operands.iter().map(|&v| function.ty(v)).collect();
    (node.op.def().cost)(&types, &node.types, &node.attrs)
}

/// True if a node computes the rows that the head was asked for, which are fewer than the tokens.
fn is_of_rows(function: &Function, id: NodeId) -> bool {
    let tensor = function.node(id).types.first().and_then(|t| t.as_tensor());
    tensor.is_some_and(|t| t.shape.0.first() == Some(&Dim::Sym(Sym::R)))
}
