//! A checkpoint in safetensors files, read a block of rows at a time.
//!
//! Rows go from the file straight into the caller's buffer by positional reads, so streaming a checkpoint of any size keeps
//! a few kilobytes of memory, and any number of threads may read at once.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path};

use indexmap::IndexMap;
use nextc_ir::WeightSource;
use nextc_ir::format::codes::Codes;
use nextc_ir::source::{SourceError, StoredTensor};

use super::coded::read::Parts;
use super::coded::{self, Coded, Found};
use super::header::{self, Tensor};
use crate::config::Quantization;
use crate::error::{Error, SafetensorsProblem as Problem};
use crate::files::{file_name, open_file, present, read_limited};
use crate::json::parse_object;

/// The file that holds all weights of a small checkpoint.
pub const SINGLE: &str = "model.safetensors";
/// The file that names the shards of a large one.
pub const INDEX: &str = "model.safetensors.index.json";
const INDEX_LIMIT_BYTES: u64 = 256 << 20;

/// The tensors of a model directory.
///
/// As a [`WeightSource`] it presents every tensor of two or more dimensions as a matrix whose row is the innermost
/// dimension: experts stacked as `[E, 2I, H]` are `E · 2I` rows of `H`, convolution weights `[C, 1, K]` are `C` rows of
/// `K`. Row runs count in these rows.
#[derive(Debug)]
pub struct Safetensors {
    shards: Vec<Shard>,
    tensors: IndexMap<String, (usize, Tensor)>,
    found: Found,
}

#[derive(Debug)]
struct Shard {
    name: String,
    file: File,
}

impl Safetensors {
    /// Opens the weights of `directory`: `model.safetensors`, or else exactly the shards that
    /// `model.safetensors.index.json` names. `None` if it has neither. Warnings go to `warnings`.
    /// # Errors
    /// [`Error::Safetensors`] with what is wrong with which file, [`Error::Io`] if one cannot be read.
    pub fn open(directory: &Path, warnings: &mut Vec<String>) -> Result<Option<Self>, Error> {
        let mut checkpoint = Self { shards: Vec::new(), tensors: IndexMap::new(), found: Found::default() };
        if present(&directory.join(SINGLE)) {
            checkpoint.add_shard(directory, SINGLE)?;
            if present(&directory.join(INDEX)) {
                warnings.push(format!("{INDEX} is ignored since there is {SINGLE}"));
            }
            return Ok(Some(checkpoint));
        }
        let Some(bytes) = read_limited(&directory.join(INDEX), INDEX_LIMIT_BYTES)? else { return Ok(None) };
        let index = parse_index(&bytes)?;
        let mut shards: Vec<&str> = index.values().map(String::as_str).collect();
        shards.sort_unstable();
        shards.dedup();
        for shard in shards {
            checkpoint.add_shard(directory, shard)?;
        }
        checkpoint.check_index(&index)?;
        let unlisted = checkpoint.tensors.keys().filter(|name| !index.contains_key(*name)).count();
        if unlisted > 0 {
            warnings
                .push(format!("{INDEX}: the shards hold {unlisted} tensors that it does not list; they are ignored"));
            checkpoint.tensors.retain(|name, _| index.contains_key(name));
        }
        Ok(Some(checkpoint))
    }

    fn add_shard(&mut self, directory: &Path, name: &str) -> Result<(), Error> {
        let io_error = |reason| Error::Io { file: name.to_owned(), reason };
        let problem = |problem| Error::Safetensors { file: name.to_owned(), problem };
        let (file, file_bytes) = open_file(&directory.join(name))?;
        if file_bytes < 8 {
            return Err(problem(Problem::NoHeader { found_bytes: file_bytes }));
        }
        let mut first = [0; 8];
        file.read_exact_at(&mut first, 0).map_err(io_error)?;
        let header_bytes = header::header_bytes(first, file_bytes).map_err(problem)?;
        let mut text = vec![0; header_bytes as usize];
        file.read_exact_at(&mut text, 8).map_err(io_error)?;
        let shard = self.shards.len();
        for (tensor, stored) in header::parse(&text, file_bytes).map_err(problem)? {
            if let Some((other, _)) = self.tensors.get(&tensor) {
                let other = self.shards[*other].name.clone();
                return Err(problem(Problem::Duplicate { tensor, other }));
            }
            self.tensors.insert(tensor, (shard, stored));
        }
        self.shards.push(Shard { name: name.to_owned(), file });
        Ok(())
    }

    /// Every tensor of the index lies in the shard that it names.
    fn check_index(&self, index: &IndexMap<String, String>) -> Result<(), Error> {
        for (tensor, shard) in index {
            let found = match self.tensors.get(tensor) {
                Some((i, _)) if self.shards[*i].name == *shard => continue,
                Some((i, _)) => format!("but lies in {}", self.shards[*i].name),
                None => "which does not have it".to_owned(),
            };
            let problem = Problem::NotInShard { tensor: tensor.clone(), shard: shard.clone(), found };
            return Err(Error::Safetensors { file: INDEX.into(), problem });
        }
        Ok(())
    }

    /// Finds the tensors that are stored in codes; from then on they are there by their own name, `X.weight`.
    /// # Errors
    /// [`Error::Weights`] with everything about them that does not fit.
    pub fn find_coded(&mut self, quantization: Option<Quantization>) -> Result<(), Error> {
        let tensors = self.tensors.iter().map(|(name, (_, tensor))| (name.as_str(), tensor));
        let found = coded::find(tensors, quantization, &|name| self.read_shape(name));
        self.found = found.map_err(|problems| Error::Weights { problems })?;
        Ok(())
    }

    /// The two numbers of an I64 tensor.
    fn read_shape(&self, name: &str) -> Option<[u64; 2]> {
        let mut bytes = [0; 16];
        Parts::bytes(self, name, 0, &mut bytes).ok()?;
        let number =
            |at: usize| bytes[at..at + 8].try_into().map(i64::from_le_bytes).ok().and_then(|n| n.try_into().ok());
        Some([number(0)?, number(8)?])
    }

    /// The matrix called `name`, if it is stored in codes.
    pub fn coded(&self, name: &str) -> Option<&Coded> {
        self.found.coded.get(name)
    }

    /// The names of the matrices that are stored in codes.
    pub fn coded_names(&self) -> impl Iterator<Item = &str> {
        self.found.coded.keys().map(String::as_str)
    }

    /// True if a tensor is part of a matrix that is stored in codes, or describes one.
    pub fn is_part(&self, name: &str) -> bool {
        self.found.parts.contains(name)
    }

    /// The tensor called `name`: element type and shape as stored.
    pub fn stored(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name).map(|(_, tensor)| tensor)
    }

    /// The names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }
}

/// The shard of each tensor.
fn parse_index(bytes: &[u8]) -> Result<IndexMap<String, String>, Error> {
    let problem = |problem| Error::Safetensors { file: INDEX.into(), problem };
    let reason = |reason: &str| problem(Problem::Index { reason: reason.into() });
    let object = parse_object(INDEX, bytes)?;
    let map = object.get("weight_map").ok_or_else(|| reason("`weight_map` is missing"))?;
    let map = map.as_object().ok_or_else(|| reason("`weight_map` is not an object"))?;
    if map.is_empty() {
        return Err(reason("`weight_map` is empty"));
    }
    let entry = |(tensor, shard): (&String, &serde_json::Value)| {
        let shard =
            shard.as_str().ok_or_else(|| reason(&format!("`weight_map.{tensor}` is not the name of a file")))?;
        if !is_file_name(shard) {
            return Err(problem(Problem::ShardName { tensor: tensor.clone(), shard: shard.into() }));
        }
        Ok((tensor.clone(), shard.to_owned()))
    };
    map.iter().map(entry).collect()
}

/// A plain name: no directory, no `..`, no NUL.
fn is_file_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
        && !name.contains('\0')
}

/// Rows and elements of one row, as [`Safetensors`] presents them.
fn rows_of(shape: &[u64]) -> (u64, u64) {
    match shape {
        [] => (1, 1),
        [n] => (*n, 1),
        [outer @ .., last] => (outer.iter().product(), *last),
    }
}

impl WeightSource for Safetensors {
    fn tensor(&self, name: &str) -> Option<StoredTensor> {
        if let Some(coded) = self.coded(name) {
            return Some(StoredTensor { shape: vec![coded.rows, coded.columns], format: coded.format });
        }
        let tensor = self.stored(name)?;
        let format = tensor.plain_format()?;
        let (rows, row_elems) = rows_of(&tensor.shape);
        let shape = if tensor.shape.len() < 2 { vec![rows] } else { vec![rows, row_elems] };
        Some(StoredTensor { shape, format })
    }

    fn read_rows(&self, name: &str, first: u64, out: &mut [f32]) -> Result<(), SourceError> {
        if let Some(coded) = self.coded(name) {
            return read_numbers(self, coded, name, first, out);
        }
        let (_, tensor) = self.tensors.get(name).ok_or_else(|| SourceError::Missing(name.to_owned()))?;
        let (rows, row_elems) = rows_of(&tensor.shape);
        let elems = out.len() as u64;
        let asked = elems.div_ceil(row_elems.max(1));
        let end = first.saturating_add(asked);
        if end > rows || !elems.is_multiple_of(row_elems.max(1)) {
            return Err(SourceError::Rows { tensor: name.to_owned(), rows, first, end });
        }
        self.floats(name, first * row_elems, out)
    }

    fn read_codes(&self, name: &str, first: u64, rows: u64, out: &mut Codes) -> Result<(), SourceError> {
        let coded = self.coded(name).ok_or_else(|| SourceError::Missing(name.to_owned()))?;
        let end = first.saturating_add(rows);
        if end > coded.rows {
            return Err(SourceError::Rows { tensor: name.to_owned(), rows: coded.rows, first, end });
        }
        coded.read(self, first, rows, out)
    }
}

impl Parts for Safetensors {
    fn bytes(&self, name: &str, first: u64, out: &mut [u8]) -> Result<(), SourceError> {
        let (shard, tensor) = self.tensors.get(name).ok_or_else(|| SourceError::Missing(name.to_owned()))?;
        let shard = &self.shards[*shard];
        let read = shard.file.read_exact_at(out, tensor.begin + first);
        read.map_err(|e| SourceError::Io { file: shard.name.clone(), reason: e.to_string() })
    }

    fn floats(&self, name: &str, first: u64, out: &mut [f32]) -> Result<(), SourceError> {
        let (shard, tensor) = self.tensors.get(name).ok_or_else(|| SourceError::Missing(name.to_owned()))?;
        let shard = &self.shards[*shard];
        let io_error = |reason: String| SourceError::Io { file: shard.name.clone(), reason };
        let at = |bytes: u64| tensor.begin + first * bytes;
        let read = match tensor.dtype {
            "F32" => read_widened(&shard.file, at(4), out, f32::from_le_bytes),
            "F16" => read_widened(&shard.file, at(2), out, |b| half::f16::from_le_bytes(b).to_f32()),
            "BF16" => read_widened(&shard.file, at(2), out, |b| half::bf16::from_le_bytes(b).to_f32()),
            other => return Err(io_error(format!("tensor `{name}` has dtype {other}, expected BF16, F16 or F32"))),
        };
        read.map_err(|e| io_error(e.to_string()))
    }
}

/// The numbers of rows that are stored in codes.
fn read_numbers(c: &Safetensors, coded: &Coded, name: &str, first: u64, out: &mut [f32]) -> Result<(), SourceError> {
    let rows = out.len() as u64 / coded.columns;
    let mut codes = Codes::default();
    c.read_codes(name, first, rows, &mut codes)?;
    codes.numbers(coded.format, out);
    Ok(())
}

/// Fills `out` with the elements of `N` bytes that begin at byte `at`, through a small buffer.
fn read_widened<const N: usize>(
    file: &File,
    mut at: u64,
    out: &mut [f32],
    widen: impl Fn([u8; N]) -> f32,
) -> std::io::Result<()> {
    const BUFFER_BYTES: usize = 64 << 10;
    let mut buffer = [0; BUFFER_BYTES];
    for block in out.chunks_mut(BUFFER_BYTES / N) {
        let bytes = &mut buffer[..block.len() * N];
        file.read_exact_at(bytes, at)?;
        at += bytes.len() as u64;
        for (x, raw) in block.iter_mut().zip(bytes.as_chunks::<N>().0) {
            *x = widen(*raw);
        }
    }
    Ok(())
}

/// The model directory's name, for messages and `info`.
pub(crate) fn directory_name(directory: &Path) -> String {
    let full = directory.canonicalize().unwrap_or_else(|_| directory.to_owned());
    file_name(&full)
}
