//! `info`: what an executable holds and how much memory it takes.

use clap::Args;
use nextc_abi::metadata::NVPTX64;
use nextc_abi::{Metadata, SectionKind, WeightsPlace};
use serde_json::{Value, json};

use crate::artifact::Artifact;
use crate::cli::MachineArgs;
use crate::cuda::plan;
use crate::error::Error;
use crate::weights::Weights;

/// Arguments of `info`.
#[derive(Debug, Args)]
pub struct InfoArgs {
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
    /// Check every byte of the executable and of the weights against its checksum
    #[arg(long)]
    verify: bool,
    /// Tokens of the step whose working memory is stated
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = clap::value_parser!(u64).range(1..))]
    step_tokens: u64,
    /// Also list the kernels
    #[arg(long)]
    kernels: bool,
    #[command(flatten)]
    machine: MachineArgs,
}

/// Runs `info`.
/// # Errors
/// [`Error`] if `--verify` finds damage.
pub fn run(artifact: &Artifact, args: &InfoArgs) -> Result<(), Error> {
    if args.verify {
        artifact.verify()?;
        if artifact.metadata().weights.place != WeightsPlace::None {
            Weights::map(artifact)?.verify(&artifact.metadata().weights.entries, args.machine.threads())?;
        }
    }
    let facts = facts(artifact, args);
    if args.json {
        println!("{facts}");
    } else {
        print_table(&facts);
        if args.kernels {
            print_kernels(artifact.metadata());
        }
        if args.verify {
            println!("every checksum matches");
        }
    }
    Ok(())
}

/// Bytes of the arena for a step of `tokens` tokens of one sequence at full context, with one row of logits.
fn arena_bytes(metadata: &Metadata, tokens: u64) -> u64 {
    let pages = metadata.model.max_context.div_ceil(metadata.page_tokens.max(1));
    metadata.arena.bytes(&[tokens, 1, pages, 1])
}

/// Bytes of a GPU for weights, the states of one sequence at full context, and steps of `tokens` tokens; `None` for a processor.
fn device_bytes(metadata: &Metadata, tokens: u64) -> Option<u64> {
    let kv = metadata.kv_bytes_per_token().saturating_mul(metadata.model.max_context);
    let pages = metadata.model.max_context.div_ceil(metadata.page_tokens.max(1)).next_power_of_two();
    let steps = plan::step_bytes(metadata, &[tokens, 1, pages, 1]);
    let parts = [metadata.weights.bytes, metadata.state_bytes_per_sequence(), kv, steps];
    (metadata.target.arch == NVPTX64).then(|| parts.into_iter().fold(0, u64::saturating_add))
}

fn facts(artifact: &Artifact, args: &InfoArgs) -> Value {
    let (m, footer) = (artifact.metadata(), artifact.footer());
    json!({
        "model": m.model.name,
        "vocab_size": m.model.vocab_size,
        "hidden_size": m.model.hidden_size,
        "num_layers": m.model.num_layers,
        "max_context": m.model.max_context,
        "mtp": m.model.mtp,
        "eos_token_ids": m.model.eos_token_ids,
        "backend": m.backend,
        "arch": m.target.arch,
        "cpu": m.target.cpu,
        "features": m.target.features,
        "cpus": m.targets().map(|target| target.cpu.as_str()).collect::<Vec<_>>(),
        "compiler": m.compiler,
        "fingerprint": m.fingerprint,
        "weights_fingerprint": m.weights.fingerprint,
        "weights": match m.weights.place {
            WeightsPlace::None => "none",
            WeightsPlace::Embedded => "embedded",
            WeightsPlace::Beside => "beside",
        },
        "weights_bytes": m.weights.bytes,
        "weights_count": m.weights.entries.len(),
        "state_bytes_per_sequence": m.state_bytes_per_sequence(),
        "rollback_bytes_per_sequence": m.rollback_bytes_per_sequence(),
        "kv_bytes_per_token": m.kv_bytes_per_token(),
        "page_tokens": m.page_tokens,
        "step_tokens": args.step_tokens,
        "arena_bytes": arena_bytes(m, args.step_tokens),
        "arena_bytes_decode": arena_bytes(m, 1),
        "device_bytes": device_bytes(m, args.step_tokens),
        "payload_offset": footer.payload_offset,
        "file_bytes": footer.file_bytes,
        "code_bytes": footer.section(SectionKind::Code).bytes,
        "metadata_bytes": footer.section(SectionKind::Metadata).bytes,
        "assets": m.assets.iter().map(|a| a.name.as_str()).collect::<Vec<_>>(),
        "kernels": m.kernels.iter().map(|k| k.name.as_str()).collect::<Vec<_>>(),
        "launches": m.programs.iter().map(|p| (p.name.clone(), json!(p.launches.len()))).collect::<serde_json::Map<_, _>>(),
        "verified": args.verify,
    })
}

fn print_table(facts: &Value) {
    let Value::Object(facts) = facts else { return };
    let width = facts.keys().map(String::len).max().unwrap_or(0);
    for (name, value) in facts {
        let value = match value {
            Value::String(s) => s.clone(),
            Value::Number(n) if name.contains("bytes") => format!("{n} ({})", human_bytes(n.as_f64().unwrap_or(0.0))),
            Value::Array(items) => items.iter().map(plain).collect::<Vec<_>>().join(" "),
            other => other.to_string(),
        };
        println!("{name:width$}  {value}");
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// A number of bytes for people: `1.5 GiB`.
pub fn human_bytes(bytes: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let power = (0..units.len() - 1).find(|&p| bytes < 1024f64.powi(p as i32 + 1)).unwrap_or(units.len() - 1);
    let value = bytes / 1024f64.powi(power as i32);
    if power == 0 { format!("{value:.0} B") } else { format!("{value:.1} {}", units[power]) }
}

fn print_kernels(metadata: &Metadata) {
    for (i, k) in metadata.kernels.iter().enumerate() {
        let launches: usize =
            metadata.programs.iter().flat_map(|p| &p.launches).filter(|l| l.kernel as usize == i).count();
        println!("{:4}  {:24}  {launches:4} launches  scratch {} B  {}", i, k.name, k.scratch_bytes, k.doc);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_readable() {
        assert_eq!(
            [0.0, 1023.0, 1536.0, 3.0 * 1024f64.powi(3)].map(human_bytes),
            ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]
        );
    }
}
