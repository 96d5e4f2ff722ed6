//! What can go wrong when an executable runs.

use std::path::{Path, PathBuf};

use nextc_abi::{FooterError, WeightsHeaderError};

use crate::chat::ChatError;
use crate::cuda::CudaError;
use crate::generate::GenerateError;
use crate::sample::SampleError;

/// What can go wrong when an executable runs; each message says where, what was found and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        error: std::io::Error,
    },
    /// The executable's payload is not sound.
    #[error("{}: {error}; build it again, or copy it again from where it was built", path.display())]
    Footer {
        /// The executable.
        path: PathBuf,
        /// What is wrong.
        error: FooterError,
    },
    /// A section of the payload is damaged.
    #[error("{}: section `{section}` at offset {offset} is damaged: its hash does not match; build it again", path.display())]
    Damaged {
        /// The executable.
        path: PathBuf,
        /// The section.
        section: &'static str,
        /// Where it begins.
        offset: u64,
    },
    /// The metadata contradicts itself or this runtime.
    #[error("{}: metadata: {reason}; build it again", path.display())]
    Metadata {
        /// The executable.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The processor is too old.
    #[error(
        "this processor lacks {missing}, which the code made for `{cpu}` uses; build with `--cpu native` on this machine, or with a lesser `--cpu`"
    )]
    Cpu {
        /// The features it lacks.
        missing: String,
        /// What the code was made for.
        cpu: String,
    },
    /// There is no code for the CPU that is asked for.
    #[error("there is no code for `{asked}` (`NEXTC_CPU`), expected {known}")]
    Version {
        /// The CPU.
        asked: String,
        /// Those that there is code for.
        known: String,
    },
    /// The code is for no machine that this runtime knows.
    #[error("the code is for `{arch}`, which this runtime does not know; build it again")]
    Architecture {
        /// The architecture.
        arch: String,
    },
    /// A GPU cannot do what is asked of it.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// There are no weights.
    #[error("{}: built from a `config.json` alone, so there are no weights; only `info` and `bench --random-weights` work", path.display())]
    NoWeights {
        /// The executable.
        path: PathBuf,
    },
    /// The file of weights is not there.
    #[error("{}: {error}; it was made beside the executable and must stay beside it (or build with `--embed-weights`)", path.display())]
    WeightsFile {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        error: std::io::Error,
    },
    /// The weights do not belong to the executable.
    #[error("{}: {error}; build again, or put back the file that was made with this executable", path.display())]
    Weights {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        error: WeightsHeaderError,
    },
    /// Bytes of weights are damaged.
    #[error("{}: weight `{weight}` at offset {offset} ({bytes} B) is damaged: its checksum does not match; build again", path.display())]
    WeightDamaged {
        /// The file.
        path: PathBuf,
        /// The weight.
        weight: String,
        /// Where it begins in the file.
        offset: u64,
        /// Its length.
        bytes: u64,
    },
    /// Memory could not be had.
    #[error("{what}: {bytes} B of memory: {error}")]
    Memory {
        /// What it was for.
        what: &'static str,
        /// How much.
        bytes: u64,
        /// What went wrong.
        error: std::io::Error,
    },
    /// There is not enough free memory for what was asked for.
    #[error("{what}: {needed} B of memory needed, {available} B available")]
    TooLarge {
        /// What.
        what: &'static str,
        /// How much it takes.
        needed: u64,
        /// How much there is.
        available: u64,
    },
    /// A thread could not be started.
    #[error("starting {threads} threads: {error}")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// What went wrong.
        error: std::io::Error,
    },
    /// A token id that the model does not have.
    #[error("token {token} (number {index} of sequence {sequence}): the model has ids 0 to {}", vocab_size - 1)]
    Token {
        /// The id.
        token: u32,
        /// Its place among the new tokens.
        index: usize,
        /// Which sequence of the batch.
        sequence: usize,
        /// Ids are below this.
        vocab_size: u64,
    },
    /// A sequence would become longer than the context.
    #[error("sequence {sequence}: {have} + {adding} tokens are {} more than the context of {max_context}", have + adding - max_context)]
    Context {
        /// Which sequence of the batch.
        sequence: usize,
        /// Tokens it has.
        have: u64,
        /// Tokens to be added.
        adding: u64,
        /// The longest context.
        max_context: u64,
    },
    /// More sequences than there are slots.
    #[error("all {slots} slots for sequences are taken")]
    Slots {
        /// Slots there are.
        slots: usize,
    },
    /// A step that cannot be run.
    #[error("step: {0}")]
    Step(&'static str),
    /// The model has no multi-token prediction.
    #[error("`{model}` has no multi-token prediction (MTP); leave out `{option}`")]
    NoMtp {
        /// The model.
        model: String,
        /// The option that asked for it.
        option: &'static str,
    },
    /// An input file does not hold what is expected.
    #[error("{}: {reason}", path.display())]
    Input {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// There is no token to choose.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// Nothing, or no more, was generated.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// A chat cannot go on.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// An option's value does not fit this executable.
    #[error("`{option}`: {reason}")]
    Option {
        /// The option.
        option: &'static str,
        /// What is wrong.
        reason: String,
    },
}

impl Error {
    /// An I/O error at `path`.
    pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |error| Self::Io { path: path.to_owned(), error }
    }
}
