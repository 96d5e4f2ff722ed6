//! A function of the graph IR as a picture for Graphviz: what flows goes down, a box around the ops of one kernel.

use std::collections::BTreeMap;
use std::fmt::Write;

use nextc_ir::graph::{Function, NodeId};
use nextc_ir::op::Class;
use nextc_ir::{Op, Type};

/// Functions as one picture.
pub fn functions(functions: &[&Function]) -> String {
    let mut out = String::from("digraph nextc {\n  rankdir=TB; fontname=\"Helvetica\"; nodesep=0.25; ranksep=0.35;\n  node [shape=box, style=\"rounded,filled\", fontname=\"Helvetica\", fontsize=11, fillcolor=white, color=\"#555555\"];\n  edge [fontname=\"Helvetica\", fontsize=9, color=\"#555555\", arrowsize=0.7];\n");
    for (i, function) in functions.iter().enumerate() {
        put(&mut out, format_args!("  subgraph cluster_{i} {{\n    label={}; color=\"#bbbbbb\";\n", quote(&format!("@{}", function.name))));
        Picture { function, prefix: format!("f{i}") }.write(&mut out);
        out.push_str("  }\n");
    }
    out.push_str("}\n");
    out
}

fn put(out: &mut String, text: std::fmt::Arguments<'_>) {
    out.write_fmt(text).expect("a string takes all text");
}

fn quote(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}

struct Picture<'a> {
    function: &'a Function,
    prefix: String,
}

impl Picture<'_> {
    fn write(&self, out: &mut String) {
        let mut kernels: BTreeMap<Option<u32>, Vec<NodeId>> = BTreeMap::new();
        let order = self.function.order();
        for &id in &order {
            kernels.entry(self.function.node(id).kernel).or_default().push(id);
        }
        for (kernel, nodes) in &kernels {
            if let Some(kernel) = kernel {
                put(out, format_args!("    subgraph cluster_{}_k{kernel} {{ label=\"kernel {kernel}\"; style=\"rounded,dashed\"; color=\"#3366aa\"; fontcolor=\"#3366aa\"; fontsize=10;\n", self.prefix));
            }
            for &id in nodes {
                self.node(out, id);
            }
            if kernel.is_some() {
                out.push_str("    }\n");
            }
        }
        for &id in &order {
            self.edges(out, id);
        }
        self.results(out);
    }

    fn id(&self, node: NodeId) -> String {
        format!("{}_{}", self.prefix, node.index())
    }

    fn node(&self, out: &mut String, id: NodeId) {
        let node = self.function.node(id);
        let op = node.op.def();
        let types: Vec<String> = node.types.iter().map(Type::to_string).collect();
        let (title, shape) = match node.op {
            Op::Param => (node.name.clone().unwrap_or_else(|| "param".to_owned()), "ellipse"),
            Op::Weight => (node.attrs.str("name").unwrap_or("weight").to_owned(), "ellipse"),
            Op::Call => (format!("call @{}", node.attrs.str("function").unwrap_or("?")), "box"),
            _ => (op.name.to_owned(), "box"),
        };
        let fill = match op.class {
            Class::Structure if shape == "ellipse" => "#f2f2f2",
            Class::Structure => "white",
            Class::Elementwise => "#e8f3e8",
            Class::RowReduction => "#fdf3dc",
            Class::Kernel => "#dfeaf7",
        };
        let label = quote(&format!("{title}\n{}", types.join("\n")));
        put(out, format_args!("      {} [label={label}, shape={shape}, fillcolor=\"{fill}\"];\n", self.id(id)));
    }

    fn edges(&self, out: &mut String, id: NodeId) {
        let names = self.function.node(id).op.def().operands;
        for (i, operand) in self.function.operands(id).into_iter().enumerate() {
            let name = names.get(i).filter(|n| !n.ends_with("...")).unwrap_or(&"");
            put(out, format_args!("    {} -> {} [label={}];\n", self.id(operand.node), self.id(id), quote(name)));
        }
    }

    fn results(&self, out: &mut String) {
        put(out, format_args!("    {0}_return [label=\"return\", shape=plaintext, fillcolor=none, style=\"\"];\n", self.prefix));
        for value in &self.function.results {
            put(out, format_args!("    {} -> {}_return;\n", self.id(value.node), self.prefix));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nextc_ir::build::FunctionBuilder;
    use nextc_ir::{Shape, shape::Sym};

    #[test]
    fn a_function_is_boxes_and_named_edges() {
        let mut b = FunctionBuilder::new("gate \"x\"");
        let x = b.param("x", Type::f32(Shape::rows(Sym::T, &[16])));
        let y = b.op(Op::Sigmoid, &[x]).expect("it fits");
        let z = b.op(Op::Mul, &[x, y]).expect("it fits");
        let mut function = b.finish(vec![z]);
        function.graph[y.node].kernel = Some(0);
        function.graph[z.node].kernel = Some(0);
        let dot = functions(&[&function]);
        assert!(dot.contains("label=\"@gate \\\"x\\\"\""));
        assert!(dot.contains("f0_0 [label=\"x\\ntensor<T x 16 x f32>\", shape=ellipse"), "{dot}");
        assert!(dot.contains("f0_1 -> f0_2 [label=\"b\"]"));
        assert!(dot.contains("label=\"kernel 0\""));
        assert!(dot.contains("f0_2 -> f0_return"));
        assert_eq!(dot.matches('{').count(), dot.matches('}').count());
    }
}
