//! `nextc passes`: what runs over a model's graph, in order.

use nextc_passes::{PIPELINE, Pass};
use serde_json::{Value as Json, json};

use crate::cli::TableArgs;
use crate::show;

/// Prints the pipeline.
pub fn run(args: &TableArgs) -> anyhow::Result<()> {
    if args.json {
        let json = |p: &Pass| json!({"name": p.name, "doc": p.doc});
        return show::print(&format!("{}\n", Json::Array(PIPELINE.iter().map(json).collect())));
    }
    show::print(&PIPELINE.iter().map(|p| format!("{:<12} {}\n", p.name, p.doc)).collect::<String>())
}
