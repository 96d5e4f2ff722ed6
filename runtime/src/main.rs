//! The program that every executable made by nextc begins with.

fn main() -> std::process::ExitCode {
    nextc_runtime::cli::main()
}
