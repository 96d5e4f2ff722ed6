//! The command line: subcommands and options. What an option does stands in the subcommand's file.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use nextc_frontend::{Quantise, RopeScaling};

use crate::ptxas::Ptxas;

/// Compiles a Qwen3-Next model to one native executable.
#[derive(Debug, Parser)]
#[command(name = "nextc", version, arg_required_else_help = true, after_help = EXAMPLES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  nextc build examples/demo-model -o demo     compile a checkpoint
  ./demo generate -p 'What is a compiler?'    and run it; it needs nothing else
  nextc run examples/demo-model -p 'Hi'       both at once, from a cache
  nextc explain examples/demo-model           kernels, bytes, time, memory
  nextc dump examples/demo-model --stage fused --function delta";

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Compile a model to an executable.
    #[command(after_help = BUILD_EXAMPLES)]
    Build(BuildArgs),
    /// Build into a cache and execute.
    #[command(after_help = RUN_EXAMPLES)]
    Run(RunArgs),
    /// Print the program at a stage of its compilation.
    #[command(after_help = DUMP_EXAMPLES)]
    Dump(DumpArgs),
    /// Say what each kernel does and costs, and what memory the model needs.
    Explain(ExplainArgs),
    /// List the ops of the graph IR.
    Ops(OpsArgs),
    /// List the rewrite rules.
    Rules(TableArgs),
    /// List the passes in their order.
    Passes(TableArgs),
    /// List the weight formats.
    Formats(TableArgs),
}

const BUILD_EXAMPLES: &str = "\
Examples:
  nextc build ~/models/Qwen3-Next-80B-A3B-Instruct -o qwen
  nextc build demo-model --cpu x86-64-v3 --embed-weights     one file for any CPU since 2013
  nextc build demo-model --cpu x86-64-v3,sapphirerapids      the best of both, wherever it runs
  nextc build Qwen3-Next-80B-A3B-Instruct-Q4_K_M.gguf        one file with everything in it
  nextc build qwen --quant q4,head=q8                        four bits, but eight for the head
  nextc build demo-model --quant q4 --quality ids.json       what four bits cost
  nextc build qwen --rope-scaling yarn,factor=4              four times the context
  nextc build config.json                                    no weights: `info`, and `bench --random-weights`";

const RUN_EXAMPLES: &str = "\
Examples:
  nextc run demo-model -p 'What is a linker?'
  nextc run demo-model -- bench --json          anything the executable can do";

const DUMP_EXAMPLES: &str = "\
Examples:
  nextc dump demo-model                                      the graph as it is built
  nextc dump demo-model --after rewrite --diff               what a pass changed, and which rules fired
  nextc dump demo-model --stage fused --function delta --format dot | dot -Tsvg > delta.svg
  nextc dump demo-model --stage asm --function KERNEL        names are those of --stage kernels";

/// Which model to compile and how: what `build`, `run`, `dump` and `explain` share.
#[derive(Clone, Debug, Args)]
pub struct ModelArgs {
    /// A checkpoint's folder, a GGUF file (the first, if there are several), or a `config.json` alone.
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// The kind of machine.
    #[arg(long, value_enum, default_value_t = TargetKind::Cpu)]
    pub target: TargetKind,
    /// What makes machine code [default: llvm where it is compiled in, else cranelift].
    #[arg(long, value_enum)]
    pub backend: Option<Backend>,
    /// How weights are stored: `keep`, `bf16`, `fp8`, `q8` or `q4`, and exceptions, as in `q4,head=q8` [default: keep].
    ///
    /// `keep` is as the checkpoint has them; `nextc formats` lists what the others make of which weights. An exception is PATTERN=FORMAT: a
    /// word of that list (`experts`), or the name of a weight or its last parts, with `*` for any letters (`layers.1*.w_q`); and `keep` or a
    /// format (`q4<g64>`). A later one goes before an earlier one.
    #[arg(long, value_name = "QUANT[,PATTERN=FORMAT...]", default_value = "keep", hide_default_value = true)]
    pub quant: Quantise,
    /// What activations may be rounded to, in products of more than 8 tokens of a sequence (int16: in all).
    #[arg(long, value_enum, default_value_t = Activations::Auto)]
    pub activations: Activations,
    /// What keys and values are kept in for the tokens to come.
    #[arg(long, value_enum, default_value_t = Kv::Auto)]
    pub kv: Kv,
    /// The CPU that code is made for: `native`, `x86-64-v3`, `x86-64-v4`, `sapphirerapids`, ...; or several, `x86-64-v3,sapphirerapids`.
    ///
    /// An executable with code for several takes the best that the machine has when it starts, or that which NEXTC_CPU names. `dump` and
    /// `explain` show that for the best.
    #[arg(long, value_name = "NAME[,NAME...]", default_value = "native")]
    pub cpu: String,
    /// The GPU that code is made for.
    #[arg(long, value_name = "NAME")]
    pub gpu: Option<String>,
    /// What makes GPU code of PTX when the executable is built: `auto`, `none`, or the file of NVIDIA's ptxas (CUDA 12.8 or newer).
    ///
    /// With it an executable starts at once. Without it the GPU's driver compiles the PTX when the executable first starts on a machine, some seconds for a large
    /// model, and keeps what it made. `auto` takes the one that NEXTC_PTXAS names, else one on PATH, in CUDA_HOME, or that `make ptxas` fetched.
    #[arg(long, value_name = "auto|none|FILE", default_value = "auto")]
    pub ptxas: Ptxas,
    /// The most tokens a sequence may hold [default: the model's].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_context: Option<u64>,
    /// Reach further than the model was trained for: `yarn,factor=4`, or `default` for no scaling [default: the model's].
    ///
    /// Takes the keys of `rope_scaling` in config.json, and their values, in place of those there, for instance
    /// `yarn,factor=4,original_max_position_embeddings=262144`. Without an original context that is `max_position_embeddings`. The
    /// context becomes the original times the factor, unless --max-context says less. Short texts are affected too.
    #[arg(long, value_name = "yarn,KEY=X,...")]
    pub rope_scaling: Option<RopeScaling>,
    /// Put the weights into the executable instead of a file beside it.
    #[arg(long)]
    pub embed_weights: bool,
}

/// `--target`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TargetKind {
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// Both in one executable.
    #[value(name = "cpu+cuda")]
    CpuCuda,
}

/// `--backend`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// LLVM: vectors as wide as the CPU has them.
    Llvm,
    /// Cranelift: always there, 128-bit vectors, compiles in a moment.
    Cranelift,
}

/// `--activations`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Activations {
    /// What the machine is fastest with: bfloat16 if it has a matrix unit (AMX), else int8 if its vectors multiply bytes (AVX-512 VNNI) and weights are integers that can
    /// be multiplied so, or bfloat16 if they multiply that (AVX-512 BF16), or int16 if they are narrower (AVX2) and weights are such integers, else float32.
    Auto,
    /// float32 throughout: the form that is compared with the reference.
    F32,
    /// bfloat16, in a matrix unit; or by vectors, with weights in bfloat16 alone, in attention and in the delta rule.
    Bf16,
    /// 8-bit integers, a scale for 32 of them, with weights of 8 or 4 bits whose blocks have a scale and no zero point; with others float32. Attention and the delta rule
    /// in bfloat16 where the machine multiplies that.
    Int8,
    /// 16-bit integers, a scale for 32 of them, with the same weights, in products of any number of tokens; for vectors of less than 512 bits.
    Int16,
}

/// `--kv`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kv {
    /// bfloat16, but float32 with `--activations f32`.
    Auto,
    /// float32: the form that is compared with the reference.
    F32,
    /// bfloat16: half the memory, and half of what a long context reads for each token.
    Bf16,
    /// 8-bit integers with a scale for each head and token: a quarter of float32.
    Int8,
    /// 8-bit floats (e4m3) with such a scale.
    Fp8,
}

/// Arguments of `build`.
#[derive(Clone, Debug, Args)]
pub struct BuildArgs {
    /// What to compile.
    #[command(flatten)]
    pub model: ModelArgs,
    /// The executable [default: the model's name, in this folder].
    #[arg(short, long, value_name = "EXE")]
    pub output: Option<PathBuf>,
    /// Say what the build costs with these token ids: nats a token, and divergence from float32.
    ///
    /// The file holds a JSON array of token ids, or an array of such arrays, in any length. The executable is run, and one of the same checkpoint with nothing rounded,
    /// which is built for this and thrown away: it needs the checkpoint's size on the disk once more.
    #[arg(long, value_name = "IDS.json")]
    pub quality: Option<PathBuf>,
}

/// Arguments of `run`.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// What to compile.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Answer this prompt; without it the executable decides (a chat).
    #[arg(short, long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Build anew, and keep nothing.
    #[arg(long)]
    pub no_cache: bool,
    /// Further arguments for the executable.
    #[arg(last = true, value_name = "ARGS")]
    pub args: Vec<std::ffi::OsString>,
}

/// `--stage`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Stage {
    /// The graph as it is built from the configuration.
    Graph,
    /// The graph after all passes: fused, with layouts and places in memory.
    Fused,
    /// Kernel IR, schedule and tables.
    Kernels,
    /// LLVM IR.
    Llvm,
    /// Machine code as text.
    Asm,
    /// Cranelift's IR.
    Clif,
    /// NVIDIA's assembly.
    Ptx,
}

/// `--format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// The IR's text.
    Text,
    /// A picture for Graphviz.
    Dot,
}

/// Arguments of `dump`.
#[derive(Clone, Debug, Args)]
pub struct DumpArgs {
    /// What to compile.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Which form to print [default: graph].
    #[arg(long, value_enum, conflicts_with = "after")]
    pub stage: Option<Stage>,
    /// The graph after this pass (`nextc passes` lists them).
    #[arg(long, value_name = "PASS")]
    pub after: Option<String>,
    /// Show what changed: by the pass of --after, or by all of them.
    #[arg(long)]
    pub diff: bool,
    /// Only this function, or this kernel.
    #[arg(long, value_name = "NAME")]
    pub function: Option<String>,
    /// Text or a picture.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
}

/// Arguments of `explain`.
#[derive(Clone, Debug, Args)]
pub struct ExplainArgs {
    /// What to compile.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Tokens of the step.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub tokens: u64,
    /// Tokens that the sequence already holds.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub context: u64,
    /// Also build it without weights, run it here with made-up ones, and show what each kernel takes.
    #[arg(long)]
    pub measure: bool,
}

/// Arguments of `ops`.
#[derive(Clone, Debug, Args)]
pub struct OpsArgs {
    /// The ops of the kernel IR instead.
    #[arg(long)]
    pub kernel: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of the other tables.
#[derive(Clone, Debug, Args)]
pub struct TableArgs {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parses(line: &str) -> bool {
        Cli::try_parse_from(std::iter::once("nextc").chain(line.split_whitespace())).is_ok()
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_option_of_build_is_one_of_dump_and_explain() {
        let options = "m --target cpu+cuda --backend cranelift --quant q4,head=q8 --activations f32 --kv bf16 --cpu x86-64-v3 --gpu sm_90a --ptxas none --max-context 9 --rope-scaling yarn,factor=4 --embed-weights";
        for command in ["build", "run", "dump", "explain"] {
            assert!(parses(&format!("{command} {options}")), "{command}");
        }
    }

    #[test]
    fn wrong_usage_is_refused() {
        for line in [
            "",
            "build",
            "build m --quant q3",
            "build m --quant q4,head",
            "build m --max-context 0",
            "build m --kv int3",
            "build m --rope-scaling linear,factor=2",
            "dump m --stage x",
            "explain m --tokens 0",
            "dump m --stage kernels --after rewrite",
        ] {
            assert!(!parses(line), "{line}");
        }
        assert!(parses("run m -p hi -- --json --seed 1"));
    }
}
