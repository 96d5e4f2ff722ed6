//! `specialise`: layers of one kind become one function.
//!
//! Two functions are of one kind if they are the same but for names: the same ops, attributes, types and uses, so the
//! same shapes and formats of weights, which are parameters. The kind is named by the part of its first function's name
//! before the dot; a second kind of that name is `NAME.1`. Functions that call others are entry points and stay.

use indexmap::IndexMap;
use nextc_ir::graph::{Function, Module, NodeId, Value};
use nextc_ir::{Attrs, Op, Target, Type};
use std::collections::HashMap;

use crate::{Error, Pass, calls};

/// The pass. It comes first, so that all later work is done once for each kind of layer.
pub const PASS: Pass =
    Pass { name: "specialise", doc: "merges the functions of layers of one kind, and points the calls to them", run };

/// A value without a name: the position of its node in the function's order, and which result.
type Place = (usize, u32);

/// A function without its names: the nodes in order, with their operands.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Kind {
    prefix: String,
    ops: Vec<(Op, Attrs)>,
    types: Vec<Vec<Type>>,
    operands: Vec<Vec<Place>>,
    results: Vec<Place>,
}

impl Kind {
    fn of(function: &Function) -> Self {
        let order = function.order();
        let position: HashMap<NodeId, usize> = order.iter().enumerate().map(|(i, &id)| (id, i)).collect();
        let place = |v: &Value| (position[&v.node], v.result);
        let nodes = || order.iter().map(|&id| function.node(id));
        Self {
            prefix: prefix(&function.name).to_owned(),
            ops: nodes().map(|node| (node.op, node.attrs.clone())).collect(),
            types: nodes().map(|node| node.types.clone()).collect(),
            operands: order.iter().map(|&id| function.operands(id).iter().map(place).collect()).collect(),
            results: function.results.iter().map(place).collect(),
        }
    }
}

fn prefix(name: &str) -> &str {
    name.split_once('.').map_or(name, |(prefix, _)| prefix)
}

fn run(mut module: Module, _: &Target) -> Result<Module, Error> {
    let mut kinds: IndexMap<Kind, String> = IndexMap::new();
    let mut counts: HashMap<String, usize> = HashMap::new();
    let mut renamed: HashMap<String, String> = HashMap::new();
    let mut functions = Vec::new();
    for mut function in std::mem::take(&mut module.functions) {
        if calls(&function) {
            functions.push(function);
            continue;
        }
        let kind = Kind::of(&function);
        let name = kinds.get(&kind).cloned().unwrap_or_else(|| {
            let old = function.name.clone();
            let name = next_name(&kind.prefix, &mut counts);
            function.name.clone_from(&name);
            functions.push(std::mem::replace(&mut function, Function::new(&old)));
            kinds.insert(kind, name.clone());
            name
        });
        renamed.insert(function.name, name);
    }
    module.functions = functions;
    module.functions.iter_mut().for_each(|function| repoint(function, &renamed));
    Ok(module)
}

fn next_name(prefix: &str, counts: &mut HashMap<String, usize>) -> String {
    let count = counts.entry(prefix.to_owned()).or_insert(0);
    *count += 1;
    match *count - 1 {
        0 => prefix.to_owned(),
        n => format!("{prefix}.{n}"),
    }
}

/// Points the calls of `function` to the kinds of their callees.
fn repoint(function: &mut Function, renamed: &HashMap<String, String>) {
    for node in function.graph.node_weights_mut().filter(|node| node.op == Op::Call) {
        if let Some(name) = node.attrs.str("function").and_then(|old| renamed.get(old)) {
            node.attrs = std::mem::take(&mut node.attrs).with("function", name.as_str());
        }
    }
}
