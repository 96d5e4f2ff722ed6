//! `nextc explain`: what each kernel does and costs, and what memory the model needs.

use std::collections::BTreeSet;
use std::fmt::Write;

use anyhow::Context;
use nextc_abi::metadata::default_step_tokens;
use nextc_ir::Module;
use nextc_ir::schedule::KernelModule;
use nextc_ir::types::StateKind;

use crate::account::{self, KernelAccount, LayerAccount, Step};
use crate::cli::ExplainArgs;
use crate::compile::{self, Plan};
use crate::measure::{Entry, Measured};
use crate::show;

/// Columns of a bar.
const BAR: usize = 24;

/// Explains a model.
pub fn run(args: &ExplainArgs) -> anyhow::Result<()> {
    let mut plan = Plan::new(&args.model, None)?;
    let model = compile::load(&args.model, plan.kv)?;
    plan.target = compile::target_of(&plan, &model);
    let step = Step { tokens: args.tokens, context: args.context };
    let measured = if args.measure { measure(&plan, model.module.clone(), step)? } else { Measured::default() };
    let fused = compile::fuse(model.module, &plan.target)?;
    let kernels = compile::lower_to_kernels(&fused, &plan.target)?;
    let mut text = heading(&fused, &plan, step);
    let mut described = BTreeSet::new();
    for (entry, title) in [("step", "a step"), ("draft", "a draft of the MTP module")] {
        let layers = account::layers(&fused, &kernels, &plan.target, entry, step);
        if !layers.is_empty() {
            entry_text(&mut text, title, &layers, (step, measured.entry(entry)), &mut described);
        }
    }
    // what a card holds is not known here
    let machine = if plan.target.gpu.is_some() { None } else { machine_bytes() };
    Memory::of(&kernels, nextc_link::arch(&plan.target)).write(&mut text, machine);
    show::print(&text)
}

/// Builds the model without weights in a folder that goes, and measures it.
fn measure(plan: &Plan, module: Module, step: Step) -> anyhow::Result<Measured> {
    let dir = tempfile::tempdir().context("a folder for the executable")?;
    let executable = dir.path().join("model");
    let mtp = module.info.mtp;
    compile::build_without_weights(plan, module, &executable)?;
    show::progress("measuring");
    Measured::of(&executable, step, mtp)
}

fn put(text: &mut String, line: std::fmt::Arguments<'_>) {
    let line = line.to_string();
    writeln!(text, "{}", line.trim_end()).expect("a string takes all text");
}

fn heading(fused: &Module, plan: &Plan, step: Step) -> String {
    let (info, target) = (&fused.info, &plan.target);
    let mut text = String::new();
    put(
        &mut text,
        format_args!(
            "{}: {} layers, {} wide, {} tokens in its vocabulary",
            info.name, info.num_layers, info.hidden_size, info.vocab_size
        ),
    );
    put(
        &mut text,
        format_args!(
            "for {} by {}, {}-bit vectors; assumed of the machine: {} a second from memory, {} a second, {} a launch",
            target.cpu,
            plan.backend_name(),
            target.vector_bits,
            show::bytes(target.read_bytes_per_s),
            show::flops(target.flops_per_s),
            show::time_ns(target.launch_ns),
        ),
    );
    put(
        &mut text,
        format_args!(
            "step of {} after {} tokens of context; time is the least that memory and arithmetic allow",
            count(step.tokens, "token"),
            step.context
        ),
    );
    text
}

fn count(n: u64, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// `described` are the kernels whose fusion has been told already.
fn entry_text(
    text: &mut String,
    title: &str,
    layers: &[LayerAccount],
    (step, measured): (Step, Option<&Entry>),
    described: &mut BTreeSet<String>,
) {
    let total = |of: fn(&KernelAccount) -> f64| layers.iter().map(|l| l.calls as f64 * l.sum(of)).sum::<f64>();
    let ns = total(|k| k.ns);
    for layer in layers {
        layer_text(text, layer, (ns, measured), described);
    }
    let launches: u64 = layers.iter().map(|l| l.calls * l.kernels.len() as u64).sum();
    put(
        text,
        format_args!(
            "\n{title}: {}, {}, {}, {}: at most {:.1} tokens/s",
            count(launches, "kernel"),
            show::bytes(total(|k| k.bytes)),
            show::flops(total(|k| k.flops)),
            show::time_ns(ns),
            step.tokens as f64 * 1e9 / ns,
        ),
    );
    let Some(measured) = measured else { return };
    let took = layers.iter().map(|l| l.calls as f64 * l.sum(|k| measured.ns(k).unwrap_or(0.0))).sum::<f64>();
    put(
        text,
        format_args!(
            "measured: kernels one by one {}; whole steps {:.1} tokens/s, {:.0} % of the most",
            show::time_ns(took),
            measured.tokens_per_s,
            100.0 * measured.tokens_per_s * ns / (step.tokens as f64 * 1e9),
        ),
    );
}

fn layer_text(
    text: &mut String,
    layer: &LayerAccount,
    (total_ns, measured): (f64, Option<&Entry>),
    described: &mut BTreeSet<String>,
) {
    let share = layer.calls as f64 * layer.sum(|k| k.ns) / total_ns;
    put(
        text,
        format_args!(
            "\n@{} x {}: {}, {:.1} % of the step",
            layer.name,
            layer.calls,
            count(layer.kernels.len() as u64, "kernel"),
            100.0 * share
        ),
    );
    for kernel in &layer.kernels {
        let share = layer.calls as f64 * kernel.ns / total_ns;
        let took = measured.map(|measured| took(measured.ns(kernel), kernel.ns)).unwrap_or_default();
        put(
            text,
            format_args!(
                "  {:<40} {:>9} {:>12} {:>9}{took}  {}",
                kernel.name(),
                show::bytes(kernel.bytes),
                show::flops(kernel.flops),
                show::time_ns(kernel.ns),
                show::bar(share, BAR),
            ),
        );
        if described.insert(kernel.name().to_owned()) {
            put(text, format_args!("{}", show::indent(&show::tidy(&kernel.doc), 6)));
        }
    }
}

/// The columns of what was measured: the time, and the share of it that the least time is.
fn took(measured: Option<f64>, least: f64) -> String {
    match measured {
        Some(ns) => format!(" {:>9} {:>4.0} %", show::time_ns(ns), 100.0 * least / ns),
        None => format!(" {:>9} {:>6}", "-", ""),
    }
}

/// Exact memory of a model.
struct Memory {
    weights: u64,
    kv_per_token: u64,
    state_per_sequence: u64,
    arena_decode: u64,
    arena_prefill: u64,
    /// Tokens of a prefill step.
    step_tokens: u64,
    max_context: u64,
}

impl Memory {
    fn of(kernels: &KernelModule, arch: &str) -> Self {
        let step_tokens = u64::from(default_step_tokens(arch)).min(kernels.info.max_context);
        let states =
            |kv: bool| kernels.states.iter().filter(|s| (s.ty.kind == StateKind::Kv) == kv).map(|s| s.ty.bytes()).sum();
        let pages = kernels.info.max_context.div_ceil(kernels.page_tokens.max(1));
        let arena = |tokens| kernels.arena.bytes(&[tokens, 1, pages, 1]);
        Self {
            weights: nextc_link::packed_bytes(kernels),
            kv_per_token: states(true),
            state_per_sequence: states(false),
            arena_decode: arena(1),
            arena_prefill: arena(step_tokens),
            step_tokens,
            max_context: kernels.info.max_context,
        }
    }

    /// Bytes of one sequence with `context` tokens, all told.
    fn total(&self, context: u64) -> u64 {
        self.weights + self.state_per_sequence + self.kv_per_token * context + self.arena_prefill
    }

    fn write(&self, text: &mut String, machine: Option<u64>) {
        put(text, format_args!("\nmemory"));
        let row = |text: &mut String, what: &str, bytes: u64| {
            put(text, format_args!("  {what:<34} {:>9}  {bytes} B", show::bytes(bytes as f64)));
        };
        row(text, "weights", self.weights);
        row(text, "KV, a token", self.kv_per_token);
        row(text, "state, a sequence", self.state_per_sequence);
        row(text, "arena, a step of 1 token", self.arena_decode);
        row(text, &format!("arena, a step of {} tokens", self.step_tokens), self.arena_prefill);
        let whole = self.total(self.max_context);
        row(text, &format!("all, one sequence of {} tokens", self.max_context), whole);
        let Some(machine) = machine else { return };
        row(text, "this machine", machine);
        put(text, format_args!("  {}", self.verdict(machine)));
    }

    fn verdict(&self, machine: u64) -> String {
        let empty = self.total(0);
        if self.total(self.max_context) <= machine {
            return "it fits, with its whole context".to_owned();
        }
        if empty <= machine {
            let context = (machine - empty) / self.kv_per_token.max(1);
            return format!("it fits with a context of up to {context} tokens");
        }
        format!(
            "it does not fit: {} more are needed; weights would be read from disk again and again",
            show::bytes((empty - machine) as f64)
        )
    }
}

/// Main memory of this machine.
fn machine_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_says_whether_it_fits() {
        let memory = Memory {
            weights: 1000,
            kv_per_token: 10,
            state_per_sequence: 100,
            arena_decode: 1,
            arena_prefill: 50,
            step_tokens: 512,
            max_context: 20,
        };
        assert_eq!(memory.total(20), 1350);
        assert_eq!(memory.verdict(1350), "it fits, with its whole context");
        assert_eq!(memory.verdict(1349), "it fits with a context of up to 19 tokens");
        assert!(memory.verdict(1149).starts_with("it does not fit: 1 B more"));
    }

    #[test]
    fn this_machine_has_memory() {
        assert!(machine_bytes().expect("/proc/meminfo says so") > 1 << 28);
    }
}
