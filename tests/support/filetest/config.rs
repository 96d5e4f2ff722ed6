//! `test config PATH after=PASS`: which kernels each function of a model has.
//!
//! `; at-most N @FUNCTION ..`: these functions together, a layer for instance, have no more than N kernels.

use nextc_frontend::Options;
use nextc_ir::{Function, Module, Op};
use nextc_passes::{partition, run_until};

use super::{Case, Checked, graph, line, repository, text};

/// `test config`.
pub fn check(case: &Case) -> Checked {
    case.only(&["at-most"])?;
    let path = case.kind.get(1).ok_or("`; test config PATH after=PASS`")?;
    let pass = case.option("after").ok_or("`after=PASS` is missing")?;
    let model = nextc_frontend::load(&repository().join(path), &Options::default()).map_err(text)?;
    let module = run_until(model.module, &graph::target(), pass).map_err(text)?;
    for limit in case.directives("at-most") {
        check_limit(&module, limit)?;
    }
    case.compare(&module.functions.iter().map(|f| summary(&module, f)).collect::<Vec<_>>().join("\n"))
}

fn check_limit(module: &Module, limit: &str) -> Checked {
    let mut words = limit.split_whitespace();
    let most: usize = words.next().and_then(|n| n.parse().ok()).ok_or("`; at-most N @FUNCTION ..`")?;
    let mut kernels = 0;
    for name in words {
        let function = module.function(name.trim_start_matches('@'));
        kernels += partition::kernels(function.ok_or_else(|| format!("there is no {name}"))?).len();
    }
    if kernels > most { Err(format!("{kernels} kernels, at most {limit}")) } else { Ok(()) }
}

/// A function's kernels, each with its ops; of an entry point, what it calls.
fn summary(module: &Module, function: &Function) -> String {
    let calls = calls(function);
    if !calls.is_empty() {
        let per_step: usize = calls.iter().map(|(name, n)| n * kernels_of(module, name)).sum();
        let each = calls.iter().map(|(name, n)| line(&format!("  {n} x @{name}")));
        return line(&format!("@{}: {per_step} launches", function.name)) + &each.collect::<String>();
    }
    let kernels = partition::kernels(function);
    let each = kernels.iter().enumerate().map(|(i, nodes)| {
        let ops: Vec<&str> = nodes.iter().map(|&n| function.node(n).op.def().name).collect();
        line(&format!("  {i}: {}", ops.join(", ")))
    });
    let count = kernels.len();
    line(&format!("@{}: {count} kernel{}", function.name, if count == 1 { "" } else { "s" }))
        + &each.collect::<String>()
}

fn kernels_of(module: &Module, name: &str) -> usize {
    module.function(name).map_or(0, |f| partition::kernels(f).len())
}

/// The functions that an entry point calls in a row, and how often, in the order of their first calls.
fn calls(function: &Function) -> Vec<(String, usize)> {
    let mut calls: Vec<(String, usize)> = Vec::new();
    for id in function.order() {
        let node = function.node(id);
        let Some(name) = node.attrs.str("function").filter(|_| node.op == Op::Call) else { continue };
        match calls.iter_mut().find(|(n, _)| n == name) {
            Some((_, count)) => *count += 1,
            None => calls.push((name.to_owned(), 1)),
        }
    }
    calls
}
