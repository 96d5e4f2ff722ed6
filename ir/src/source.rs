//! Where weights come from: the trait through which the packer and the interpreter read them, a block of rows at a time.

use crate::format::Format;
use crate::format::codes::Codes;

/// A tensor as a checkpoint stores it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// Its shape, outermost dimension first.
    pub shape: Vec<u64>,
    /// How its numbers are stored.
    pub format: Format,
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
    /// A tensor's contents are not what its format allows.
    #[error("tensor `{tensor}`: {reason}")]
    Contents {
        /// The tensor.
        tensor: String,
        /// What was found where, and what was expected.
        reason: String,
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

    /// Reads rows `first .. first + out.len() / row_elems` of `name`: widened exactly to f32, or of a scaled tensor the numbers that its
    /// codes stand for, rounded once.
    /// # Errors
    /// [`SourceError`] if there is no such tensor, no such rows, or the file cannot be read.
    fn read_rows(&self, name: &str, first: u64, out: &mut [f32]) -> Result<(), SourceError>;

    /// Reads rows `first .. first + rows` of the scaled tensor `name` as its codes. A source of plain tensors has none.
    /// # Errors
    /// As [`WeightSource::read_rows`], and [`SourceError::Contents`] if a code or scale is not a number.
    fn read_codes(&self, name: &str, _first: u64, _rows: u64, _out: &mut Codes) -> Result<(), SourceError> {
        Err(SourceError::Contents { tensor: name.to_owned(), reason: "it is not stored in codes".to_owned() })
    }
}
