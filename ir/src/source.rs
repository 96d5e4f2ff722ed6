//! Where weights come from: the trait through which the packer and the interpreter read them, a block of rows at a time.

use crate::dtype::DType;

/// A tensor as a checkpoint stores it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// Its shape, outermost dimension first.
    pub shape: Vec<u64>,
    /// Its element type.
    pub dtype: DType,
}

/// Why a weight could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The checkpoint has no such tensor.
    #[error("tensor `{0}` is not in the checkpoint")]
    Missing(String),
    /// The rows asked for are not there.
    #[error("tensor `{tensor}` has {rows} rows, asked for rows {first}..{end}")]
    Rows {
        /// The tensor.
        tensor: String,
        /// Rows it has.
        rows: u64,
        /// First row asked for.
        first: u64,
        /// One past the last row asked for.
        end: u64,
    },
    /// Reading failed.
    #[error("{file}: {reason}")]
    Io {
        /// The file.
        file: String,
        /// What went wrong.
        reason: String,
    },
}

/// A checkpoint's tensors. A row is everything after the first dimension, contiguous.
pub trait WeightSource: Sync {
    /// Shape and type of `name`, if the checkpoint has it.
    fn tensor(&self, name: &str) -> Option<StoredTensor>;

    /// Reads rows `first .. first + out.len() / row_elems` of `name`, widened exactly to f32.
    /// # Errors
    /// [`SourceError`] if there is no such tensor, no such rows, or the file cannot be read.
    fn read_rows(&self, name: &str, first: u64, out: &mut [f32]) -> Result<(), SourceError>;
}
