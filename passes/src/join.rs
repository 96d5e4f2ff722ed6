//! `join`: the projections of a mixer become one op over a bundle of weights.
//!
//! `linear`s of one input are joined if one of them feeds an op on a state without another matmul in between: those are a
//! mixer's projections, which are wanted all at once. Others (router, gate and up projections) are left to the rules that
//! fuse them with what follows them.

use std::collections::BTreeMap;

use nextc_ir::graph::{Function, Module, NodeId, Value};
use nextc_ir::{Attrs, Op, Target, Type};

use crate::{Error, Pass, calls};

/// The pass. It comes before `rewrite`, whose rules know joined projections.
pub const PASS: Pass =
    Pass { name: "join", doc: "joins the projections of a mixer's input into one `linears` over their weights", run };

fn run(mut module: Module, _: &Target) -> Result<Module, Error> {
    for function in module.functions.iter_mut().filter(|f| !calls(f)) {
        for (x, group) in groups(function) {
            if group.len() > 1 && group.iter().any(|&id| feeds_state(function, id)) {
                join(function, x, &group)?;
            }
        }
    }
    Ok(module)
}

/// The `linear`s of each input, in the function's order.
fn groups(function: &Function) -> BTreeMap<Value, Vec<NodeId>> {
    let mut groups: BTreeMap<Value, Vec<NodeId>> = BTreeMap::new();
    for id in function.order() {
        if function.node(id).op == Op::Linear {
            groups.entry(function.operands(id)[0]).or_default().push(id);
        }
    }
    groups
}

/// True if a result of `id` reaches an op with a state operand without passing through a matmul.
fn feeds_state(function: &Function, id: NodeId) -> bool {
    let mut seen = vec![id];
    let mut next = 0;
    while let Some(&node) = seen.get(next) {
        next += 1;
        for (user, _) in function.users(node) {
            if has_state(function, user) {
                return true;
            }
            if function.node(user).op != Op::Linear && !seen.contains(&user) {
                seen.push(user);
            }
        }
    }
    false
}

fn has_state(function: &Function, id: NodeId) -> bool {
    function.operands(id).iter().any(|&v| function.ty(v).as_state().is_some())
}

/// Replaces `group` by one node and points their users to its results.
fn join(function: &mut Function, x: Value, group: &[NodeId]) -> Result<(), Error> {
    let weights: Vec<Value> = group.iter().map(|&id| function.operands(id)[1]).collect();
    let bundle = add(function, Op::Bundle, &weights)?;
    let joined = add(function, Op::Linears, &[x, Value { node: bundle, result: 0 }])?;
    for (result, &old) in (0..).zip(group) {
        let new = Value { node: joined, result };
        for (user, used) in function.users(old) {
            function.graph.add_edge(joined, user, nextc_ir::graph::Use { operand: used.operand, result });
        }
        function.results.iter_mut().filter(|v| v.node == old).for_each(|v| *v = new);
        function.graph.remove_node(old);
    }
    Ok(())
}

fn add(function: &mut Function, op: Op, operands: &[Value]) -> Result<NodeId, Error> {
    let operand_types: Vec<&Type> = operands.iter().map(|&v| function.ty(v)).collect();
    let types = (op.def().shape)(&operand_types, &Attrs::none()).map_err(|error| Error::Shape {
        function: function.name.clone(),
        op,
        error,
    })?;
    Ok(function.add_node(op, operands, Attrs::none(), types))
}
