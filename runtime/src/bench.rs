//! `bench`: speed of prefill and decode, beside what the machine could do.

use clap::Args;

use crate::artifact::Artifact;
use crate::error::Error;

/// Arguments of `bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {}

/// Runs `bench`.
/// # Errors
/// [`Error`]
pub fn run(_: Artifact, _: &BenchArgs) -> Result<(), Error> {
    Ok(())
}
