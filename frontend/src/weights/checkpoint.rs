//! A checkpoint, in whichever files: its tensors by their published names.

use std::path::Path;

use nextc_ir::format::codes::Codes;
use nextc_ir::source::{SourceError, StoredTensor};
use nextc_ir::{Format, WeightSource};

use super::header;
use super::safetensors::Safetensors;
use crate::config::Quantization;
use crate::error::Error;
use crate::gguf::{self, Gguf};

/// The weights of a model.
#[derive(Debug)]
pub enum Checkpoint {
    /// In safetensors files.
    Safetensors(Safetensors),
    /// In GGUF files.
    Gguf(Gguf),
}

/// A tensor as a checkpoint has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its shape, outermost dimension first; rows and columns if it is stored in codes.
    pub shape: Vec<u64>,
    /// The format that holds its numbers; `None` if it is not read.
    pub format: Option<Format>,
    /// How the checkpoint calls its element type.
    pub dtype: &'static str,
}

impl Checkpoint {
    /// Opens the safetensors files of `directory`; `None` if there are none. How quantised tensors are to be read says `quantization`.
    /// Warnings go to `warnings`.
    /// # Errors
    /// [`Error::Safetensors`], [`Error::Io`] and [`Error::Weights`] with what is wrong.
    pub fn open(
        directory: &Path,
        quantization: Option<Quantization>,
        warnings: &mut Vec<String>,
    ) -> Result<Option<Self>, Error> {
        let Some(mut files) = Safetensors::open(directory, warnings)? else { return Ok(None) };
        files.find_coded(quantization)?;
        Ok(Some(Self::Safetensors(files)))
    }

    /// The tensor whose published name is `name`.
    pub fn entry(&self, name: &str) -> Option<Entry> {
        match self {
            Self::Safetensors(files) => match files.coded(name) {
                Some(c) => Some(Entry { shape: vec![c.rows, c.columns], format: Some(c.format), dtype: "codes" }),
                None => files.stored(name).map(|t| Entry {
                    shape: t.shape.clone(),
                    format: t.plain_format(),
                    dtype: t.dtype,
                }),
            },
            Self::Gguf(files) => files.stored(name).map(|t| {
                // a vector has no rows of whole blocks
                let format = t.ty.format().filter(|f| t.shape.len() > 1 || f.blocks().is_none());
                Entry { shape: t.shape.clone(), format, dtype: t.ty.name }
            }),
        }
    }

    /// True if there is a tensor whose published name is `name`.
    pub fn has(&self, name: &str) -> bool {
        match self {
            Self::Safetensors(files) => files.coded(name).is_some() || files.stored(name).is_some(),
            Self::Gguf(files) => files.stored(name).is_some(),
        }
    }

    /// The element types that are read of a tensor of so many dimensions.
    pub const fn read(&self, rank: usize) -> &'static str {
        match (self, rank) {
            (Self::Safetensors(_), _) => header::PLAIN,
            (Self::Gguf(_), 1) => gguf::blocks::PLAIN,
            (Self::Gguf(_), _) => gguf::blocks::READ,
        }
    }

    /// The published names of all tensors; one that is stored in codes has one name, whatever its parts are called.
    pub fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        match self {
            Self::Safetensors(files) => {
                let whole = files.names().filter(|name| !files.is_part(name));
                Box::new(whole.chain(files.coded_names()))
            }
            Self::Gguf(files) => Box::new(files.names()),
        }
    }

    /// The name that the checkpoint has for the tensor whose published name is `name`, for messages.
    pub fn own_name(&self, name: &str) -> String {
        match self {
            Self::Safetensors(_) => name.to_owned(),
            Self::Gguf(files) => files.own_name(name),
        }
    }

    fn source(&self) -> &dyn WeightSource {
        match self {
            Self::Safetensors(files) => files,
            Self::Gguf(files) => files,
        }
    }
}

impl WeightSource for Checkpoint {
    fn tensor(&self, name: &str) -> Option<StoredTensor> {
        self.source().tensor(name)
    }

    fn read_rows(&self, name: &str, first: u64, out: &mut [f32]) -> Result<(), SourceError> {
        self.source().read_rows(name, first, out)
    }

    fn read_codes(&self, name: &str, first: u64, rows: u64, out: &mut Codes) -> Result<(), SourceError> {
        self.source().read_codes(name, first, rows, out)
    }
}
