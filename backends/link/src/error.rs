//! Why an executable could not be made.

use std::path::{Path, PathBuf};

use nextc_ir::rows::RowsError;

/// Why an executable could not be made.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// An object file cannot be read.
    #[error("object {index}: {reason}")]
    Object {
        /// Which of the objects.
        index: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// Code refers to something that no object defines.
    #[error("object {index}: undefined symbol `{symbol}`; code may call nothing outside itself")]
    Undefined {
        /// Which of the objects.
        index: usize,
        /// The symbol.
        symbol: String,
    },
    /// A symbol is defined twice.
    #[error("object {index}: symbol `{symbol}` is defined twice")]
    Duplicate {
        /// The object with the second definition.
        index: usize,
        /// The symbol.
        symbol: String,
    },
    /// A relocation that an image without a loader cannot hold.
    #[error(
        "object {index}, section `{section}` at {offset:#x}: {kind} relocation against `{symbol}`, expected a PC-relative one"
    )]
    Relocation {
        /// Which of the objects.
        index: usize,
        /// The section that holds it.
        section: String,
        /// Where in the section.
        offset: u64,
        /// Its kind.
        kind: String,
        /// What it refers to.
        symbol: String,
    },
    /// A section with data that code would write.
    #[error("object {index}: section `{section}` is writable; code keeps no data of its own")]
    Writable {
        /// Which of the objects.
        index: usize,
        /// The section.
        section: String,
    },
    /// There is no code for any machine.
    #[error("there is no code for any machine")]
    NoVersion,
    /// Code for different CPUs wants weights or states that lie differently.
    #[error(
        "code for `{other}` does not read the weights and states of that for `{first}`; build an executable for each"
    )]
    Versions {
        /// The CPU of the first version.
        first: String,
        /// The CPU of the one that differs.
        other: String,
    },
    /// A kernel has no code.
    #[error("no object defines `{symbol}`, the code of kernel `{kernel}`")]
    NoCode {
        /// The symbol expected.
        symbol: String,
        /// The kernel.
        kernel: String,
    },
    /// A weight cannot be read, or has no form in its format.
    #[error(transparent)]
    Rows(#[from] RowsError),
    /// A file could not be written.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        error: std::io::Error,
    },
    /// The output cannot be written there.
    #[error("{}: {reason}", path.display())]
    Output {
        /// The output.
        path: PathBuf,
        /// Why not.
        reason: &'static str,
    },
    /// The metadata could not be written as JSON.
    #[error("metadata: {0}")]
    Json(#[from] serde_json::Error),
}

impl LinkError {
    /// An I/O error at `path`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |error| Self::Io { path: path.to_owned(), error }
    }
}
