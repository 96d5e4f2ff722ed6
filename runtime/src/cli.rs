//! The command line of an executable.

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::artifact::Artifact;
use crate::chat::{self, args::ChatArgs};
use crate::engine::EngineOptions;
use crate::error::Error;
use crate::generate::GenerateArgs;
use crate::{bench, eval, info, text};

/// A Qwen3-Next model, compiled by nextc.
#[derive(Debug, Parser)]
#[command(
    version,
    about,
    long_about = "A Qwen3-Next model, compiled by nextc. Without a command it chats on a terminal, or answers one prompt from a pipe.",
    args_conflicts_with_subcommands = true
)]
struct Cli {
    #[command(flatten)]
    chat: ChatArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Generates tokens after a prompt or token ids
    Generate(Box<GenerateArgs>),
    /// Computes logits and perplexity of given token ids
    Eval(eval::EvalArgs),
    /// Measures the speed of prefill and decode
    Bench(bench::BenchArgs),
    /// Says what this executable holds and how much memory it takes
    Info(info::InfoArgs),
}

/// Options about the machine, shared by the commands.
#[derive(Clone, Copy, Debug, Args)]
pub struct MachineArgs {
    /// Threads to compute with; all processors unless given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
}

impl MachineArgs {
    /// Threads to compute with.
    pub fn threads(&self) -> usize {
        self.threads.map_or_else(crate::pool::available_threads, |n| n as usize)
    }

    /// Options of an engine for `sequences` sequences.
    pub fn engine(&self, sequences: usize) -> EngineOptions {
        EngineOptions { threads: self.threads(), sequences, ..EngineOptions::default() }
    }
}

/// Runs the command line; the executable's `main`.
pub fn main() -> ExitCode {
    // a closed pipe ends the program, as it ends others: nobody reads on
    // SAFETY: no other thread runs yet, and the default action needs no handler of ours.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<(), Error> {
    let artifact = Artifact::open_self()?;
    match cli.command {
        None => chat::run(artifact, &cli.chat),
        Some(Command::Generate(args)) => text::generate(artifact, &args),
        Some(Command::Eval(args)) => eval::run(artifact, &args),
        Some(Command::Bench(args)) => bench::run(artifact, &args),
        Some(Command::Info(args)) => info::run(&artifact, &args),
    }
}
