//! Graph IR as text. [`crate::parse`] reads it back; printing what was parsed gives the same text.
//!
//! ```text
//! func @norm(%x: tensor<T x 64 x f32>, %w: weight<64 x bf16>) -> (tensor<T x 64 x f32>) {
//!   %0 = rms_norm %x, %w {eps = 1e-6} !kernel 3 !at T:512
//!   return %0
//! }
//! ```
//!
//! A name that is no word, or is taken, gives way to a number, as all values without a name have one. `!kernel` is the
//! node's kernel, `!at` where its results lie: `T:512` is 512 bytes for each unit of `T`, `fixed:0` a fixed place, `_` no
//! place in the arena.

mod dot;
mod weights;

use std::collections::{HashMap, HashSet};
use std::fmt::Write;

pub use dot::dot;

use crate::graph::{Function, Module, Node, NodeId, Placement, Value};
use crate::op::Op;

/// Longest line of a function's head before its parameters get lines of their own.
const HEAD_CHARS: usize = 110;

/// A module: its facts, its weight table, its functions.
pub fn module(module: &Module) -> String {
    let mut parts = vec![info(module)];
    if !module.weights.is_empty() {
        parts.push(weights::table(&module.weights));
    }
    parts.extend(module.functions.iter().map(function));
    parts.join("\n")
}

fn info(module: &Module) -> String {
    let info = &module.info;
    format!(
        "module {:?} {{\n  vocab_size = {}\n  hidden_size = {}\n  num_layers = {}\n  max_context = {}\n  \
         eos_token_ids = {:?}\n  mtp = {}\n  has_weights = {}\n}}\n",
        info.name,
        info.vocab_size,
        info.hidden_size,
        info.num_layers,
        info.max_context,
        info.eos_token_ids,
        info.mtp,
        info.has_weights
    )
}

/// One function.
pub fn function(f: &Function) -> String {
    let names = names(f);
    let params: Vec<String> = f.params.iter().map(|&p| parameter(f, p, &names)).collect();
    let results: Vec<String> = f.results.iter().map(|&v| type_of(f, v)).collect();
    let name = function_name(&f.name);
    let mut text = format!("func {name}({}) -> ({}) {{\n", params.join(", "), results.join(", "));
    if text.chars().count() > HEAD_CHARS {
        text = format!("func {name}(\n  {}\n) -> ({}) {{\n", params.join(",\n  "), results.join(", "));
    }
    for id in f.order().into_iter().filter(|id| !f.params.contains(id)) {
        let _ = writeln!(text, "  {}", statement(f, id, &names));
    }
    let results: Vec<String> = f.results.iter().map(|v| value(&names, v)).collect();
    let _ = writeln!(text, "  {}\n}}", format!("return {}", results.join(", ")).trim_end());
    text
}

fn type_of(f: &Function, v: Value) -> String {
    f.graph[v.node].types.get(v.result as usize).map_or_else(|| "?".to_owned(), ToString::to_string)
}

fn value(names: &HashMap<Value, String>, v: &Value) -> String {
    names.get(v).map_or_else(|| "%?".to_owned(), |name| format!("%{name}"))
}

fn parameter(f: &Function, id: NodeId, names: &HashMap<Value, String>) -> String {
    let v = Value { node: id, result: 0 };
    format!("{}: {}{}", value(names, &v), type_of(f, v), annotations(f.node(id)))
}

/// One node as a line of text, without the indent.
fn statement(f: &Function, id: NodeId, names: &HashMap<Value, String>) -> String {
    let node = f.node(id);
    let results = (0..node.types.len() as u32).map(|result| value(names, &Value { node: id, result }));
    let results: Vec<String> = results.collect();
    let equals = if results.is_empty() { "" } else { " = " };
    let operands: Vec<String> = f.operands(id).iter().map(|v| value(names, v)).collect();
    let operands = operands.join(", ");
    let body = match (node.op, node.attrs.str("name"), node.attrs.str("function")) {
        (Op::Weight, Some(name), _) => format!("weight {name:?} : {}", type_of(f, Value { node: id, result: 0 })),
        (Op::Call, _, Some(callee)) => format!("call {}({operands})", function_name(callee)),
        _ => format!("{} {operands}{}", node.op, attributes(node)).trim_end().to_owned(),
    };
    format!("{}{equals}{body}{}", results.join(", "), annotations(node))
}

fn attributes(node: &Node) -> String {
    if node.attrs.is_empty() {
        return String::new();
    }
    let attrs: Vec<String> = node.attrs.0.iter().map(|(name, value)| format!("{name} = {value}")).collect();
    format!(" {{{}}}", attrs.join(", "))
}

fn annotations(node: &Node) -> String {
    let kernel = node.kernel.map(|k| format!(" !kernel {k}")).unwrap_or_default();
    if node.placement.iter().all(Option::is_none) {
        return kernel;
    }
    let places: Vec<String> = node.placement.iter().map(|p| place(*p)).collect();
    format!("{kernel} !at {}", places.join(" "))
}

fn place(placement: Option<Placement>) -> String {
    match placement {
        None => "_".to_owned(),
        Some(Placement { unit: Some(unit), at_bytes }) => format!("{}:{at_bytes}", unit.name()),
        Some(Placement { unit: None, at_bytes }) => format!("fixed:{at_bytes}"),
    }
}

/// True for letters, digits, `_` and `.`, of which names are made.
pub(crate) fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == '.'
}

/// A function's name in text: quoted where it is no word.
fn function_name(name: &str) -> String {
    if !name.is_empty() && name.chars().all(is_name_char) { format!("@{name}") } else { format!("@{name:?}") }
}

/// The names of all values as printed, without the `%`: those the nodes have, and numbers in the order of printing.
pub fn names(f: &Function) -> HashMap<Value, String> {
    let usable = |name: &str| !name.starts_with(|c: char| c.is_ascii_digit()) && name.chars().all(is_name_char);
    let (mut names, mut taken, mut count) = (HashMap::new(), HashSet::new(), 0u32);
    for id in f.order() {
        let node = f.node(id);
        for result in 0..node.types.len() as u32 {
            let own = node.name.as_deref().filter(|n| result == 0 && !n.is_empty() && usable(n));
            let name = own.filter(|n| taken.insert((*n).to_owned())).map_or_else(
                || {
                    count += 1;
                    (count - 1).to_string()
                },
                str::to_owned,
            );
            names.insert(Value { node: id, result }, name);
        }
    }
    names
}
