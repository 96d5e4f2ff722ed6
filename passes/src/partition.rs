//! `partition`: which nodes are one kernel, and in which order kernels run.
//!
//! Every op that is work gets the number of its kernel; numbers ascend in execution order. An op that is not elementwise
//! is a kernel of its own. Elementwise ops that feed one another and give values of one shape are one kernel, unless a
//! value would have to leave the kernel and come back.

use std::collections::{BTreeMap, BTreeSet};

use nextc_ir::graph::{Function, Module, NodeId};
use nextc_ir::op::Class;
use nextc_ir::{Shape, Target};

use crate::{Error, Pass};

/// The pass. It needs the ops that `rewrite` has chosen; no later pass may add or remove any.
pub const PASS: Pass = Pass {
    name: "partition",
    doc: "numbers the kernels of each function; neighbouring elementwise ops share one",
    run,
};

fn run(mut module: Module, _: &Target) -> Result<Module, Error> {
    module.functions.iter_mut().for_each(number);
    Ok(module)
}

/// The kernels of a function in execution order, each with its nodes in execution order.
pub fn kernels(function: &Function) -> Vec<Vec<NodeId>> {
    let mut kernels: BTreeMap<u32, Vec<NodeId>> = BTreeMap::new();
    for id in function.order() {
        if let Some(kernel) = function.node(id).kernel {
            kernels.entry(kernel).or_default().push(id);
        }
    }
    kernels.into_values().collect()
}

fn number(function: &mut Function) {
    let order: Vec<NodeId> =
        function.order().into_iter().filter(|&id| function.node(id).op.def().class != Class::Structure).collect();
    let mut groups = Groups::of(function, &order);
    groups.merge_neighbours(function);
    for (kernel, nodes) in (0..).zip(groups.sorted()) {
        nodes.iter().for_each(|&at| function.graph[order[at]].kernel = Some(kernel));
    }
}

/// Nodes by position in execution order, each in a group that is named by one of its positions.
struct Groups<'a> {
    order: &'a [NodeId],
    /// For each node, the nodes that make its operands.
    makers: Vec<Vec<usize>>,
    group: Vec<usize>,
}

impl<'a> Groups<'a> {
    fn of(function: &Function, order: &'a [NodeId]) -> Self {
        let position: BTreeMap<NodeId, usize> = order.iter().enumerate().map(|(i, &id)| (id, i)).collect();
        let makers = order.iter().map(|&id| {
            let nodes = function.operands(id).into_iter().filter_map(|v| position.get(&v.node).copied());
            nodes.collect::<BTreeSet<usize>>().into_iter().collect()
        });
        Self { order, makers: makers.collect(), group: (0..order.len()).collect() }
    }

    fn merge_neighbours(&mut self, function: &Function) {
        for user in 0..self.order.len() {
            for maker in self.makers[user].clone() {
                let elems = elems(function, self.order[user]);
                let same_elems = elems.is_some() && elems == self::elems(function, self.order[maker]);
                let (from, to) = (self.group[maker], self.group[user]);
                if same_elems && from != to && !self.leaves_and_returns(from, to) {
                    self.group.iter_mut().filter(|g| **g == to).for_each(|g| *g = from);
                }
            }
        }
    }

    /// The groups whose values `group` uses.
    fn needs(&self, group: usize) -> BTreeSet<usize> {
        let members = (0..self.group.len()).filter(|&n| self.group[n] == group);
        let makers = members.flat_map(|n| &self.makers[n]).map(|&m| self.group[m]);
        makers.filter(|&g| g != group).collect()
    }

    /// True if `to` uses `from` through another group as well.
    fn leaves_and_returns(&self, from: usize, to: usize) -> bool {
        let mut stack: Vec<usize> = self.needs(to).into_iter().filter(|&g| g != from).collect();
        let mut seen = BTreeSet::new();
        while let Some(group) = stack.pop() {
            if group == from {
                return true;
            }
            if seen.insert(group) {
                stack.extend(self.needs(group));
            }
        }
        false
    }

    /// The groups in execution order: each as early as its first node allows.
    fn sorted(&self) -> Vec<Vec<usize>> {
        let mut members: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (node, &group) in self.group.iter().enumerate() {
            members.entry(group).or_default().push(node);
        }
        let mut sorted = Vec::new();
        let mut done = BTreeSet::new();
        while done.len() < members.len() {
            let ready = members.keys().copied().filter(|g| !done.contains(g) && self.needs(*g).is_subset(&done));
            let next = ready.min_by_key(|g| members[g][0]).expect("groups that form no cycle have a next one");
            done.insert(next);
            sorted.push(members[&next].clone());
        }
        sorted
    }
}

/// What an elementwise op runs over: the shape of its result.
fn elems(function: &Function, id: NodeId) -> Option<&Shape> {
    let node = function.node(id);
    let tensor = node.types.first()?.as_tensor()?;
    (node.op.def().class == Class::Elementwise).then_some(&tensor.shape)
}
