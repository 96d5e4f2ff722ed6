//! A function as a Graphviz drawing.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::graph::{Function, NodeId};
use crate::op::Op;

/// The function for Graphviz's `dot`: an arrow a use, and a box around each kernel once `partition` has made them.
pub fn dot(f: &Function) -> String {
    let mut kernels: BTreeMap<Option<u32>, Vec<NodeId>> = BTreeMap::new();
    for id in f.order() {
        kernels.entry(f.node(id).kernel).or_default().push(id);
    }
    let mut text = format!("digraph {:?} {{\n  node [shape=box, fontname=monospace];\n", f.name);
    for (kernel, nodes) in kernels {
        let indent = if let Some(k) = kernel {
            let _ = writeln!(text, "  subgraph cluster_{k} {{\n    label=\"kernel {k}\";");
            "    "
        } else {
            "  "
        };
        for id in nodes {
            let _ = writeln!(text, "{indent}n{} [label={:?}];", id.index(), label(f, id));
        }
        if kernel.is_some() {
            text.push_str("  }\n");
        }
    }
    for id in f.order() {
        for v in f.operands(id) {
            let ty = f.node(v.node).types.get(v.result as usize).map(ToString::to_string).unwrap_or_default();
            let _ = writeln!(text, "  n{} -> n{} [label={ty:?}];", v.node.index(), id.index());
        }
    }
    text.push_str("  return [shape=plaintext];\n");
    for v in &f.results {
        let _ = writeln!(text, "  n{} -> return;", v.node.index());
    }
    text.push_str("}\n");
    text
}

fn label(f: &Function, id: NodeId) -> String {
    let node = f.node(id);
    match node.op {
        Op::Param => format!("%{}", node.name.as_deref().unwrap_or("?")),
        Op::Weight => node.attrs.str("name").unwrap_or("weight").to_owned(),
        Op::Call => format!("@{}", node.attrs.str("function").unwrap_or("?")),
        op => op.to_string(),
    }
}
