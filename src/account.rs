//! What a step costs, kernel by kernel, counted from the fused graph.

use std::collections::BTreeMap;

use nextc_ir::cost::Cost;
use nextc_ir::graph::{Function, Module, NodeId};
use nextc_ir::kernel::Kernel;
use nextc_ir::op::Class;
use nextc_ir::schedule::KernelModule;
use nextc_ir::{Dim, Op, Target, shape::Sym};
use nextc_passes::lower::ports::kernel_prefix;

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
    /// The names, as in the kernel module, of the kernel and of those that do its work for other numbers of tokens.
    pub names: Vec<String>,
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

impl KernelAccount {
    /// The name of the first.
    pub fn name(&self) -> &str {
        self.names.first().map_or("", String::as_str)
    }
}

impl LayerAccount {
    /// The sum over its kernels, for one call.
    pub fn sum(&self, of: impl Fn(&KernelAccount) -> f64) -> f64 {
        self.kernels.iter().map(of).sum()
    }
}

/// The layers that `entry` calls, in the order of their first call; nothing if there is no such entry point.
pub fn layers(fused: &Module, kernels: &KernelModule, target: &Target, entry: &str, step: Step) -> Vec<LayerAccount> {
    let Some(entry) = fused.function(entry) else { return Vec::new() };
    let mut layers: Vec<LayerAccount> = Vec::new();
    for name in calls(entry) {
        if let Some(layer) = layers.iter_mut().find(|l| l.name == name) {
            layer.calls += 1;
        } else if let Some(function) = fused.function(name) {
            let accounts = kernels_of(function).into_iter();
            let accounts = accounts.map(|(kernel, nodes)| account(function, (kernel, &nodes), kernels, target, step));
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
    (index, nodes): (u32, &[NodeId]),
    kernels: &KernelModule,
    target: &Target,
    step: Step,
) -> KernelAccount {
    let ops = || nodes.iter().map(|&id| function.node(id).op.to_string()).collect::<Vec<_>>().join(" + ");
    let lowered: Vec<_> = lowered(function, index, kernels).collect();
    let cost = nodes.iter().map(|&id| cost_of(function, id)).fold(Cost::default(), |a, b| a + b);
    let tokens = if nodes.iter().any(|&id| is_of_rows(function, id)) { 1.0 } else { step.tokens as f64 };
    let (bytes, flops) = (cost.bytes(tokens, 1.0, step.context as f64), cost.flops(tokens, step.context as f64));
    KernelAccount {
        names: if lowered.is_empty() { vec![ops()] } else { lowered.iter().map(|k| k.name.clone()).collect() },
        doc: lowered.first().map_or_else(ops, |k| k.doc.clone()),
        bytes,
        flops,
        ns: 1e9 * (bytes / target.read_bytes_per_s).max(flops / target.flops_per_s) + target.launch_ns,
    }
}

/// What kernel `index` of a function became: on a GPU one for each way to do it.
fn lowered<'a>(function: &Function, index: u32, kernels: &'a KernelModule) -> impl Iterator<Item = &'a Kernel> {
    let prefix = kernel_prefix(function, index);
    // another function may be called `head.1`
    let is_op = |rest: &str| rest.starts_with(|c: char| !c.is_ascii_digit());
    kernels.kernels.iter().filter(move |k| k.name.strip_prefix(&prefix).is_some_and(is_op))
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
