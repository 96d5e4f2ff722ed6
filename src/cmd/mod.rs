//! One file a subcommand.

mod build;
mod dump;
mod explain;
mod formats;
mod ops;
mod passes;
mod rules;
mod run;

use crate::cli::Command;

/// Does what the command line asks for.
/// # Errors
/// Whatever went wrong, ready to be shown.
pub fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Build(args) => build::run(&args),
        Command::Run(args) => run::run(&args),
        Command::Dump(args) => dump::run(&args),
        Command::Explain(args) => explain::run(&args),
        Command::Ops(args) => ops::run(&args),
        Command::Rules(args) => rules::run(&args),
        Command::Passes(args) => passes::run(&args),
        Command::Formats(args) => formats::run(&args),
    }
}
