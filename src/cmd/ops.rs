//! `nextc ops`: the op tables.

use nextc_ir::Op;
use nextc_ir::kernel::KOp;
use serde_json::{Value as Json, json};

use crate::cli::OpsArgs;
use crate::show;

/// Prints the ops of the graph IR, or of the kernel IR.
pub fn run(args: &OpsArgs) -> anyhow::Result<()> {
    let rows = if args.kernel { kernel_ops() } else { graph_ops() };
    if args.json {
        return show::print(&format!("{}\n", Json::Array(rows.iter().map(Row::json).collect())));
    }
    show::print(&rows.iter().map(Row::text).collect::<String>())
}

struct Row {
    name: &'static str,
    operands: Vec<&'static str>,
    attributes: Vec<&'static str>,
    class: String,
    doc: String,
}

impl Row {
    fn text(&self) -> String {
        let attributes =
            if self.attributes.is_empty() { String::new() } else { format!("; {}", self.attributes.join(", ")) };
        let head = format!("{}({}{attributes})", self.name, self.operands.join(", "));
        format!("{head}    {}\n{}\n", self.class, show::indent(&self.doc, 4))
    }

    fn json(&self) -> Json {
        json!({"name": self.name, "operands": self.operands, "attributes": self.attributes, "class": self.class, "doc": self.doc})
    }
}

fn graph_ops() -> Vec<Row> {
    let row = |op: &Op| {
        let def = op.def();
        Row {
            name: def.name,
            operands: def.operands.to_vec(),
            attributes: def.attrs.to_vec(),
            class: format!("{:?}", def.class).to_lowercase(),
            doc: show::tidy(def.doc),
        }
    };
    Op::ALL.iter().map(row).collect()
}

fn kernel_ops() -> Vec<Row> {
    let row = |(name, sig, doc): &(&'static str, _, &'static str)| Row {
        name,
        operands: Vec::new(),
        attributes: Vec::new(),
        class: format!("{sig:?}").to_lowercase(),
        doc: show::tidy(doc),
    };
    KOp::TABLE.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_op_of_the_table_is_listed() {
        assert_eq!(graph_ops().len(), Op::ALL.len());
        assert_eq!(kernel_ops().len(), KOp::TABLE.len());
        let gated = graph_ops().into_iter().find(|r| r.name == "gated_attention").expect("it is in the table");
        assert!(
            gated.text().starts_with("gated_attention(q, output_gate, kv, seqs; scale)    kernel\n    `attention"),
            "{}",
            gated.text()
        );
    }
}
