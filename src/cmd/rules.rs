//! `nextc rules`: the rewrite rules, from their table.

use serde_json::{Value as Json, json};

use crate::cli::TableArgs;
use crate::show;

/// Prints every rule: its name, its equations and conditions, and whether it adds in another order.
pub fn run(args: &TableArgs) -> anyhow::Result<()> {
    let rules = nextc_passes::rules();
    if args.json {
        let json = |r: &nextc_passes::RuleInfo| json!({"name": r.name, "rule": r.text, "reorders": r.reorders});
        return show::print(&format!("{}\n", Json::Array(rules.iter().map(json).collect())));
    }
    let text = |r: &nextc_passes::RuleInfo| {
        let note = r.reorders.map_or_else(String::new, |sum| format!("    adds in another order: {sum}\n"));
        format!("{}\n{}\n{note}", r.name, show::indent(&r.text.replace(";  ", "\n"), 4))
    };
    show::print(&rules.iter().map(text).collect::<String>())
}
