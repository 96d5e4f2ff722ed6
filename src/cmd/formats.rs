//! `nextc formats`: the weight formats, from their table.

use nextc_ir::format::{FORMATS, FormatDef};
use serde_json::{Value as Json, json};

use crate::cli::TableArgs;
use crate::show;

/// Prints every format.
pub fn run(args: &TableArgs) -> anyhow::Result<()> {
    if args.json {
        let json = |d: &FormatDef| json!({"name": d.name, "format": d.format.to_string(), "bits": d.bits, "bytes_of_1024": d.format.bytes(1024), "doc": d.doc});
        return show::print(&format!("{}\n", Json::Array(FORMATS.iter().map(json).collect())));
    }
    show::print(&FORMATS.iter().map(|d| format!("{:<6} {}\n", d.name, d.doc)).collect::<String>())
}
