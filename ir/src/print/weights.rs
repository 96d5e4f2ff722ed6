//! The weight table as text. Runs of rows that follow a pattern are written as the pattern:
//!
//! - `"t"[0..128]`, and `"t"[0..128, col 64]` where the first column is not 0
//! - `"t"[0..128 by 768 x 16]`: 16 runs of 128 rows, beginning 768 rows apart
//! - `"experts.{}.w"[0..32] for 0..8`: one run of each of 8 tensors

use std::fmt::Write;

use indexmap::IndexMap;

use crate::graph::{Origin, RowRun, WeightDecl};

/// Fewer runs than this are written one by one.
const WORTH_A_PATTERN: usize = 3;

/// The whole table.
pub fn table(weights: &IndexMap<String, WeightDecl>) -> String {
    let mut text = "weights {\n".to_owned();
    for (name, decl) in weights {
        let _ = writeln!(text, "  {name:?}: {} in {} {}", decl.ty(), decl.in_rank, origin(&decl.origin));
    }
    text + "}\n"
}

fn origin(origin: &Origin) -> String {
    match origin {
        Origin::Values(values) => format!("values {values:?}"),
        Origin::Rows(runs) => format!("rows {}", rows(runs)).trim_end().to_owned(),
    }
}

fn rows(mut runs: &[RowRun]) -> String {
    let mut parts = Vec::new();
    while let Some(first) = runs.first() {
        let strided = strided(runs);
        let (text, count) = match numbered(runs) {
            Some((text, count)) if count >= WORTH_A_PATTERN => (text, count),
            _ if strided >= WORTH_A_PATTERN => (spaced(first, runs[1].first - first.first, strided), strided),
            _ => (format!("{:?}[{}..{}{}]", first.tensor, first.first, end(first), column(first)), 1),
        };
        parts.push(text);
        runs = &runs[count..];
    }
    parts.join(", ")
}

fn end(run: &RowRun) -> u64 {
    run.first.saturating_add(run.rows)
}

fn column(run: &RowRun) -> String {
    if run.column == 0 { String::new() } else { format!(", col {}", run.column) }
}

fn spaced(run: &RowRun, step: u64, count: usize) -> String {
    format!("{:?}[{}..{} by {step} x {count}{}]", run.tensor, run.first, end(run), column(run))
}

/// How many runs from the first are equal but for a first row that grows by one step.
fn strided(runs: &[RowRun]) -> usize {
    let step = match runs {
        [a, b, ..] => b.first.checked_sub(a.first).filter(|&step| step > 0),
        _ => None,
    };
    let Some(step) = step else { return 1 };
    let follows = |pair: &&[RowRun]| {
        let (a, b) = (&pair[0], &pair[1]);
        a.tensor == b.tensor && a.rows == b.rows && a.column == b.column && a.first.checked_add(step) == Some(b.first)
    };
    1 + runs.windows(2).take_while(follows).count()
}

/// The longest pattern of runs from the first that are equal but for a number in the tensor's name that counts up.
fn numbered(runs: &[RowRun]) -> Option<(String, usize)> {
    let name = &runs.first()?.tensor;
    let count = |(prefix, number, suffix): &(&str, u64, &str)| {
        let same = |(i, run): &(usize, &RowRun)| {
            let number = number.checked_add(*i as u64);
            number.is_some_and(|n| run.tensor == format!("{prefix}{n}{suffix}"))
                && (run.first, run.rows, run.column) == (runs[0].first, runs[0].rows, runs[0].column)
        };
        runs.iter().enumerate().take_while(same).count()
    };
    let best = numbers(name).into_iter().max_by_key(count)?;
    let (prefix, number, suffix) = best;
    let (count, template) = (count(&best), format!("{prefix}{{}}{suffix}"));
    let end = number.checked_add(count as u64)?;
    if template.matches("{}").count() != 1 {
        return None;
    }
    let run = &runs[0];
    Some((format!("{template:?}[{}..{}{}] for {number}..{end}", run.first, self::end(run), column(run)), count))
}

/// The numbers in a name, each with what stands before and after it.
fn numbers(name: &str) -> Vec<(&str, u64, &str)> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(start) = name[at..].find(|c: char| c.is_ascii_digit()).map(|i| at + i) {
        let end = name[start..].find(|c: char| !c.is_ascii_digit()).map_or(name.len(), |i| start + i);
        let digits = &name[start..end];
        if let Ok(n) = digits.parse::<u64>()
            && n.to_string() == digits
        {
            found.push((&name[..start], n, &name[end..]));
        }
        at = end;
    }
    found
}
