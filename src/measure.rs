//! What an executable's kernels take on this machine, asked of the executable itself: its `bench`, with made-up weights.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use serde_json::Value;

use crate::account::{KernelAccount, Step};

/// Steps that a row of a kind of step consists of: decoding is measured over so many tokens.
const DECODE_TOKENS: u64 = 32;
/// Most tokens of a step that checks drafts.
const VERIFY_TOKENS: u64 = 8;

/// What was measured.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// By entry point.
    entries: BTreeMap<&'static str, Entry>,
}

/// What was measured of an entry point.
#[derive(Clone, Debug, Default)]
pub struct Entry {
    /// Whole steps, with nothing measured inside.
    pub tokens_per_s: f64,
    /// By kernel: how often it ran, and how long one run took in the mean, nanoseconds.
    kernels: BTreeMap<String, (u64, f64)>,
}

impl Entry {
    /// Nanoseconds of one call of a kernel, all that do its work together; none if it did not run.
    pub fn ns(&self, kernel: &KernelAccount) -> Option<f64> {
        let times = || kernel.names.iter().filter_map(|name| self.kernels.get(name));
        let calls = times().map(|(runs, _)| *runs).max()?;
        Some(times().map(|(runs, ns)| *runs as f64 * ns).sum::<f64>() / calls as f64)
    }
}

impl Measured {
    /// Runs an executable.
    /// # Errors
    /// What the executable says, or an answer that is none.
    pub fn of(executable: &Path, step: Step, mtp: bool) -> anyhow::Result<Self> {
        let (kind, tokens) = match step.tokens {
            1 => ("decode", DECODE_TOKENS),
            2..=VERIFY_TOKENS => ("verify", step.tokens),
            _ => ("prefill", step.tokens),
        };
        let rows: &[_] = if mtp { &[("step", kind, tokens), ("draft", "draft", 1)] } else { &[("step", kind, tokens)] };
        let mut arguments: Vec<String> = ["bench", "--random-weights", "--json", "--depth"].map(str::to_owned).to_vec();
        arguments.push(step.context.to_string());
        // these two have defaults that would take long
        for (kind, least) in [("prefill", 1), ("decode", 1), ("verify", 0), ("draft", 0)] {
            let tokens = rows.iter().find(|row| row.1 == kind).map_or(least, |row| row.2);
            if tokens > 0 {
                arguments.extend([format!("--{kind}"), tokens.to_string()]);
            }
        }
        let whole = bench(executable, &arguments)?;
        arguments.push("--profile".to_owned());
        let profiled = bench(executable, &arguments)?;
        let entries = rows.iter().map(|&(entry, kind, tokens)| {
            let (whole, profiled) = (row(&whole, kind, tokens)?, row(&profiled, kind, tokens)?);
            let tokens_per_s = whole["tokens_per_s"].as_f64().context("`bench` gives no `tokens_per_s`")?;
            Ok((entry, Entry { tokens_per_s, kernels: kernels(profiled)? }))
        });
        Ok(Self { entries: entries.collect::<anyhow::Result<_>>()? })
    }

    /// What was measured of an entry point.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }
}

/// Runs `bench`, whose last line is JSON.
fn bench(executable: &Path, arguments: &[String]) -> anyhow::Result<Value> {
    let output = Command::new(executable).args(arguments).stderr(Stdio::inherit()).output();
    let output = output.with_context(|| executable.display().to_string())?;
    if !output.status.success() {
        bail!("the executable could not be measured on this machine (`{}`)", arguments.join(" "));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(text.lines().last().unwrap_or_default()).context("what `bench --json` printed")
}

fn row<'a>(report: &'a Value, kind: &str, tokens: u64) -> anyhow::Result<&'a Value> {
    let rows = report["rows"].as_array().into_iter().flatten();
    let row = rows.into_iter().find(|row| row["kind"] == kind && row["tokens"] == tokens);
    row.with_context(|| format!("`bench` gives no row of {kind}, {tokens} tokens"))
}

fn kernels(row: &Value) -> anyhow::Result<BTreeMap<String, (u64, f64)>> {
    let kernels = row["kernels"].as_array().context("`bench` gives no `kernels`")?;
    let each = kernels.iter().map(|kernel| {
        let time = kernel["runs"].as_u64().zip(kernel["us_per_run"].as_f64());
        let name = kernel["kernel"].as_str().map(str::to_owned);
        name.zip(time.map(|(runs, us)| (runs, 1e3 * us)))
            .with_context(|| format!("a kernel without its time: {kernel}"))
    });
    each.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_a_kernels_work_counts_to_it() {
        let kernels = [("a.0.x", (4, 10.0)), ("a.0.x.some", (2, 30.0)), ("b.0.x", (1, 1.0))];
        let kernels = kernels.map(|(name, time)| (name.to_owned(), time)).into();
        let entry = Entry { tokens_per_s: 1.0, kernels };
        let kernel = |names: &[&str]| {
            let names = names.iter().map(|&name| name.to_owned()).collect();
            KernelAccount { names, doc: String::new(), bytes: 0.0, flops: 0.0, ns: 0.0 }
        };
        assert_eq!(entry.ns(&kernel(&["a.0.x", "a.0.x.some"])), Some(25.0));
        assert_eq!(entry.ns(&kernel(&["a.0.x.many"])), None);
    }
}
