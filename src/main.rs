//! The `nextc` command: compiles a Qwen3-Next model to one native executable.
//!
//! Arguments in, calls to the floors below: [`cli`] holds the arguments, [`compile`] the path from a model's folder to kernels and
//! code, [`cmd`] a file for each subcommand, and the rest how things are shown.

mod account;
mod cli;
mod cmd;
mod compile;
mod diff;
mod interrupt;
mod measure;
mod ptxas;
mod quality;
mod show;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let command = cli::Cli::parse().command;
    interrupt::watch();
    match cmd::run(command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{} {error:#}", show::error_prefix());
            ExitCode::FAILURE
        }
    }
}

/// True if whoever read our output has seen enough (`nextc dump ... | head`).
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
