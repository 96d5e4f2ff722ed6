//! `nextc build`: a model to an executable.

use std::time::Instant;

use crate::cli::BuildArgs;
use crate::quality::{self, Quality};
use crate::{compile, show};

/// Builds, and says what was written.
pub fn run(args: &BuildArgs) -> anyhow::Result<()> {
    let sequences = args.quality.as_deref().map(quality::read).transpose()?;
    let begun = Instant::now();
    let (report, fused) = compile::build(&args.model, args.output.as_deref())?;
    let mut text = format!(
        "{}  {} ({} of code), fingerprint {}\n",
        report.executable.display(),
        show::bytes(report.executable_bytes as f64),
        show::bytes(report.code_bytes as f64),
        report.fingerprint.get(..16).unwrap_or(&report.fingerprint),
    );
    match &report.weights_file {
        Some(file) => text.push_str(&format!("{}  {}\n", file.display(), show::bytes(report.weights_bytes as f64))),
        None if fused.info.has_weights => {
            text.push_str(&format!("with {} of weights inside\n", show::bytes(report.weights_bytes as f64)));
        }
        None => text.push_str("without weights: it can `info` and `bench --random-weights`\n"),
    }
    text.push_str(&format!("built in {:.1} s\n", begun.elapsed().as_secs_f64()));
    show::print(&text)?;
    let Some(sequences) = sequences else { return Ok(()) };
    let quality = Quality::measure(&args.model, &fused.info, &report.executable, &sequences)?;
    show::print(&quality.table())
}
