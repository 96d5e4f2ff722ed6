//! `nextc formats`: the weight formats and what `--quant` makes of which weights, from their tables.

use nextc_frontend::weights::quant::{CHOICES, Choice};
use nextc_ir::Format;
use nextc_ir::format::{FORMATS, FormatDef};
use serde_json::{Value as Json, json};

use crate::cli::TableArgs;
use crate::show;

/// Prints every format, and the choices of `--quant`.
pub fn run(args: &TableArgs) -> anyhow::Result<()> {
    if args.json {
        let formats = Json::Array(FORMATS.iter().map(json_of).collect());
        return show::print(&format!("{formats}\n"));
    }
    let mut text: String = FORMATS.iter().map(line).collect();
    text.push_str("\nWhat `--quant` makes of a bf16 checkpoint's matrices (`-`: as stored):\n\n");
    text.push_str(&format!("{:<10} {:<46} {:<13} {:<8} {:<8} why\n", "", "weights", "fp8", "q8", "q4"));
    text.extend(CHOICES.iter().map(choice));
    text.push_str("\nExceptions go behind it: `--quant q4,head=q8,layers.0.*=bf16`, by the words on the left or by names of weights.\n");
    show::print(&text)
}

/// Bits a weight, scales included.
fn bits(def: &FormatDef) -> f64 {
    const MANY: u64 = 1 << 20;
    8.0 * def.format.bytes(MANY) as f64 / MANY as f64
}

fn json_of(def: &FormatDef) -> Json {
    json!({"name": def.name, "format": def.format.to_string(), "bits": def.bits, "bits_with_scales": bits(def), "doc": def.doc})
}

fn line(def: &FormatDef) -> String {
    format!("{:<14} {:>7.3} bits a weight  {}\n", def.format.to_string(), bits(def), def.doc)
}

fn choice(choice: &Choice) -> String {
    let name = |format: Option<Format>| format.map_or("-".to_owned(), |f| f.to_string());
    let [fp8, q8, q4] = [choice.fp8, choice.q8, choice.q4].map(name);
    format!("{:<10} {:<46} {fp8:<13} {q8:<8} {q4:<8} {}\n", choice.word, choice.what, choice.why)
}
