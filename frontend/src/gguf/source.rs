//! A model in GGUF files as a source of weights: its tensors by their published names, with the published numbers.
//!
//! A file that was split is given by its first part; the others lie beside it. Rows go from the files straight into the caller's
//! buffer by positional reads: a model of any size takes the memory of its header and of the rows that are read.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use nextc_ir::format::codes::Codes;
use nextc_ir::format::decode_bf16;
use nextc_ir::source::{SourceError, StoredTensor};
use nextc_ir::{Format, WeightSource};

use super::blocks::Read;
use super::header::{self, Header, Tensor, Value};
use super::names::{self, Stored};
use crate::error::{Error, GgufProblem as Problem};
use crate::files::{file_name, open_file};

/// The key that says how many blocks there are, and the one that says how many of them are MTP modules.
pub const BLOCKS: &str = "qwen3next.block_count";
/// See [`BLOCKS`].
pub const MTP_BLOCKS: &str = "qwen3next.nextn_predict_layers";
const PART: &str = "split.no";
const PARTS: &str = "split.count";
/// The most parts of a file; names have five digits.
const MAX_PARTS: i128 = 99_999;

/// A model in GGUF files.
#[derive(Debug)]
pub struct Gguf {
    parts: Vec<Part>,
    /// Metadata of the first part.
    pub metadata: IndexMap<String, Value>,
    /// Tensors by their published names.
    tensors: IndexMap<String, Entry>,
    layers: u64,
}

#[derive(Debug)]
struct Part {
    name: String,
    file: File,
}

#[derive(Debug)]
struct Entry {
    part: usize,
    stored: Stored,
    tensor: Tensor,
}

impl Gguf {
    /// Opens the model in the file at `path`, and the further parts of it.
    /// # Errors
    /// [`Error::Gguf`] with what is wrong with which file, [`Error::Io`] if one cannot be read.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let (part, header) = open_part(path)?;
        let problem = |problem| Error::Gguf { file: file_name(path), problem };
        let int = |key: &str| int_of(&header, key).map_err(problem);
        let (number, count) = (int(PART)?.unwrap_or(0), int(PARTS)?.unwrap_or(1));
        if !(1..=MAX_PARTS).contains(&count) {
            let expected = format!("a number from 1 to {MAX_PARTS}");
            return Err(problem(Problem::Key { key: PARTS.into(), found: count.to_string(), expected }));
        }
        if number != 0 {
            let expected = "0: name the first part of the model, the others are found beside it".into();
            return Err(problem(Problem::Key { key: PART.into(), found: number.to_string(), expected }));
        }
        let blocks = int(BLOCKS)?.unwrap_or(0).saturating_sub(int(MTP_BLOCKS)?.unwrap_or(0));
        let layers = u64::try_from(blocks).unwrap_or(0);
        let Header { metadata, tensors } = header;
        let mut gguf = Self { parts: vec![part], metadata, tensors: IndexMap::new(), layers };
        gguf.add(tensors)?;
        for i in 1..count {
            let path = part_path(path, i, count).map_err(problem)?;
            let (part, header) = open_part(&path)?;
            let expect = |key: &str, expected: i128| match int_of(&header, key) {
                Ok(Some(found)) if found == expected => Ok(()),
                Ok(found) => Err(Problem::Key {
                    key: key.to_owned(),
                    found: found.map_or("missing".into(), |n| n.to_string()),
                    expected: expected.to_string(),
                }),
                Err(problem) => Err(problem),
            };
            let checked = expect(PART, i).and_then(|()| expect(PARTS, count));
            checked.map_err(|problem| Error::Gguf { file: part.name.clone(), problem })?;
            gguf.parts.push(part);
            gguf.add(header.tensors)?;
        }
        Ok(gguf)
    }

    /// Adds the tensors of the last part.
    fn add(&mut self, tensors: IndexMap<String, Tensor>) -> Result<(), Error> {
        let part = self.parts.len() - 1;
        for (name, mut tensor) in tensors {
            let (published, stored) = names::published(&name, self.layers);
            if stored == Stored::Row && tensor.shape.len() == 1 {
                tensor.shape.insert(0, 1);
            }
            if self.tensors.contains_key(&published) {
                let file = self.parts[part].name.clone();
                let reason = "it is there twice".to_owned();
                return Err(Error::Gguf { file, problem: Problem::Tensor { tensor: name, reason } });
            }
            self.tensors.insert(published, Entry { part, stored, tensor });
        }
        Ok(())
    }

    /// Layers of the trunk.
    pub const fn layers(&self) -> u64 {
        self.layers
    }

    /// The tensor whose published name is `name`.
    pub fn stored(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name).map(|entry| &entry.tensor)
    }

    /// The published names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The name in the file of the tensor whose published name is `name`.
    pub fn own_name(&self, name: &str) -> String {
        names::own(name, self.layers)
    }

    fn entry(&self, name: &str) -> Result<&Entry, SourceError> {
        self.tensors.get(name).ok_or_else(|| SourceError::Missing(self.own_name(name)))
    }

    /// The entry, after a check that it has rows `first .. first + rows`.
    fn rows(&self, name: &str, first: u64, rows: u64) -> Result<&Entry, SourceError> {
        let entry = self.entry(name)?;
        let (own, _) = rows_of(&entry.tensor.shape);
        let end = first.saturating_add(rows);
        if end > own {
            return Err(SourceError::Rows { tensor: self.own_name(name), rows: own, first, end });
        }
        Ok(entry)
    }

    /// Fills `out` from byte `at` of a tensor on.
    fn read(&self, entry: &Entry, at: u64, out: &mut [u8]) -> Result<(), SourceError> {
        let part = &self.parts[entry.part];
        let read = part.file.read_exact_at(out, entry.tensor.begin + at);
        read.map_err(|e| SourceError::Io { file: part.name.clone(), reason: e.to_string() })
    }

    /// Reads plain numbers from number `first` on, through a small buffer.
    fn floats(&self, entry: &Entry, format: Format, first: u64, out: &mut [f32]) -> Result<(), SourceError> {
        const BUFFER_BYTES: usize = 64 << 10;
        let width = entry.tensor.ty.block_bytes as usize;
        let mut buffer = vec![0; BUFFER_BYTES.min(out.len() * width)];
        let mut at = first * width as u64;
        for part in out.chunks_mut(BUFFER_BYTES / width) {
            let bytes = &mut buffer[..part.len() * width];
            self.read(entry, at, bytes)?;
            at += bytes.len() as u64;
            match format {
                Format::F16 => widen(bytes, part, |b| half::f16::from_le_bytes(b).to_f32()),
                Format::Bf16 => widen(bytes, part, |b| half::bf16::from_le_bytes(b).to_f32()),
                _ => widen(bytes, part, f32::from_le_bytes),
            }
        }
        Ok(())
    }

    /// Reads blocks of rows as codes, and checks that their scales are numbers.
    fn codes(&self, name: &str, first: u64, rows: u64, out: &mut Codes) -> Result<(), SourceError> {
        let entry = self.rows(name, first, rows)?;
        let own = |reason: String| SourceError::Contents { tensor: self.own_name(name), reason };
        let Some(Read::Blocks { decode, .. }) = entry.tensor.ty.read else {
            return Err(own("it is not stored in codes".to_owned()));
        };
        let row_bytes = entry.tensor.row_bytes();
        out.clear(entry.tensor.columns() as usize);
        let mut bytes = vec![0; row_bytes as usize];
        for row in first..first + rows {
            self.read(entry, row * row_bytes, &mut bytes)?;
            let (scales, units) = (out.scales.len(), out.units.len());
            bytes.chunks_exact(entry.tensor.ty.block_bytes as usize).for_each(|block| decode(block, out));
            let new = out.scales[scales..].iter().chain(out.units[units..].as_flattened());
            if let Some(x) = new.into_iter().find(|x| !x.is_finite()) {
                return Err(own(format!("a scale of row {row} is {x}, expected a finite number")));
            }
        }
        Ok(())
    }
}

fn widen<const N: usize>(bytes: &[u8], out: &mut [f32], read: impl Fn([u8; N]) -> f32) {
    for (x, raw) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *x = read(*raw);
    }
}

fn open_part(path: &Path) -> Result<(Part, Header), Error> {
    let (file, file_bytes) = open_file(path)?;
    let name = file_name(path);
    match header::read(&file, file_bytes) {
        Ok(header) => Ok((Part { name, file }, header)),
        Err(problem) => Err(Error::Gguf { file: name, problem }),
    }
}

fn int_of(header: &Header, key: &str) -> Result<Option<i128>, Problem> {
    match header.metadata.get(key) {
        None => Ok(None),
        Some(Value::Int(n)) => Ok(Some(*n)),
        Some(other) => Err(Problem::Key { key: key.into(), found: other.to_string(), expected: "an integer".into() }),
    }
}

/// Where part `i` of `count` lies: `NAME-00002-of-00003.gguf` beside `NAME-00001-of-00003.gguf`.
fn part_path(first: &Path, i: i128, count: i128) -> Result<PathBuf, Problem> {
    match parts_by_name(&file_name(first)) {
        Some((stem, parts)) if parts == count => {
            Ok(first.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", i + 1)))
        }
        _ => Err(Problem::PartName { count: count as u64, ending: format!("-00001-of-{count:05}.gguf") }),
    }
}

/// What a first part's name begins with, and how many parts it says there are.
fn parts_by_name(name: &str) -> Option<(&str, i128)> {
    let (stem, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    Some((stem.strip_suffix("-00001")?, count.parse().ok().filter(|n| (1..=MAX_PARTS).contains(n))?))
}

/// The files of the model whose first or only one is `path`, by its name.
pub fn files(path: &Path) -> Vec<PathBuf> {
    let count = parts_by_name(&file_name(path)).map_or(1, |(_, count)| count);
    let others = (1..count).filter_map(|i| part_path(path, i, count).ok());
    std::iter::once(path.to_owned()).chain(others).collect()
}

/// The name of the model whose first or only file is `path`.
pub fn model_name(path: &Path) -> String {
    let name = file_name(path);
    let stem = parts_by_name(&name).map(|(stem, _)| stem);
    stem.unwrap_or_else(|| name.strip_suffix(".gguf").unwrap_or(&name)).to_owned()
}

/// Rows and numbers of one row.
fn rows_of(shape: &[u64]) -> (u64, u64) {
    match shape {
        [n] => (*n, 1),
        [outer @ .., last] => (outer.iter().product(), *last),
        [] => (1, 1),
    }
}

/// The published number of a stored one, if it is one.
fn publish(stored: Stored, x: f32) -> Option<f32> {
    match stored {
        Stored::Same | Stored::Row => Some(x),
        Stored::PlusOne => Some(x - 1.0),
        Stored::NegExp => (x < 0.0 && x.is_finite()).then(|| log_of(-x)),
    }
}

/// The logarithm whose exponential is `x`: the bfloat16 among those that are rounded to it, as published models have it, else the
/// nearest float.
fn log_of(x: f32) -> f32 {
    let exact = f64::from(x).ln();
    let bits = (exact as f32).to_bits();
    let short = [bits >> 16, (bits >> 16) + 1].map(|b| decode_bf16(b as u16));
    // exponentials of converters are right to a bit or two
    let near = |log: &f32| (f64::from(*log).exp() - f64::from(x)).abs() <= 2.0 * f64::from(x) * f64::from(f32::EPSILON);
    short.into_iter().find(near).unwrap_or(exact as f32)
}

impl WeightSource for Gguf {
    fn tensor(&self, name: &str) -> Option<StoredTensor> {
        let tensor = self.stored(name)?;
        let format = tensor.ty.format()?;
        let (rows, columns) = rows_of(&tensor.shape);
        let shape = if tensor.shape.len() < 2 { vec![rows] } else { vec![rows, columns] };
        Some(StoredTensor { shape, format })
    }

    fn read_rows(&self, name: &str, first: u64, out: &mut [f32]) -> Result<(), SourceError> {
        let (_, columns) = rows_of(&self.entry(name)?.tensor.shape);
        let entry = self.rows(name, first, (out.len() as u64).div_ceil(columns))?;
        match entry.tensor.ty.read {
            Some(Read::Plain(format)) => {
                self.floats(entry, format, first * columns, out)?;
                for x in out {
                    *x = publish(entry.stored, *x).ok_or_else(|| SourceError::Contents {
                        tensor: self.own_name(name),
                        reason: format!("it holds {x}, expected negative numbers (`-exp(A_log)`)"),
                    })?;
                }
                Ok(())
            }
            Some(Read::Blocks { format, .. }) => {
                let mut codes = Codes::default();
                self.codes(name, first, out.len() as u64 / columns, &mut codes)?;
                codes.numbers(format, out);
                Ok(())
            }
            None => Err(SourceError::Contents {
                tensor: self.own_name(name),
                reason: format!("type {}, expected {}", entry.tensor.ty.name, super::blocks::READ),
            }),
        }
    }

    fn read_codes(&self, name: &str, first: u64, rows: u64, out: &mut Codes) -> Result<(), SourceError> {
        self.codes(name, first, rows, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithms_of_published_models_come_back() {
        for log in (0..200u16).flat_map(|i| [0x3c00 + 7 * i, 0xbc00 + 7 * i]).map(decode_bf16) {
            for exp in [log.exp(), log.exp().next_up(), log.exp().next_down()] {
                assert_eq!(publish(Stored::NegExp, -exp), Some(log), "exp({log})");
            }
        }
        let log = 1.234_567_8f32;
        let again = publish(Stored::NegExp, -log.exp()).expect("a negative number");
        assert!((again - log).abs() <= 2.0 * f32::EPSILON);
        assert_eq!(
            [-1.0, 0.0, 0.5, f32::NAN, f32::NEG_INFINITY].map(|x| publish(Stored::NegExp, x)),
            [Some(0.0), None, None, None, None]
        );
    }

    #[test]
    fn parts_lie_beside_the_first() {
        let path = |name: &str| part_path(Path::new(name), 1, 12);
        assert_eq!(path("a/m-00001-of-00012.gguf"), Ok("a/m-00002-of-00012.gguf".into()));
        assert!(path("a/m.gguf").is_err() && path("a/m-00001-of-00013.gguf").is_err());
        assert_eq!(files(Path::new("a/m-00001-of-00002.gguf")).len(), 2);
        assert_eq!(files(Path::new("a/m.gguf")), [Path::new("a/m.gguf")]);
        assert_eq!(["a/m-00001-of-00002.gguf", "m.gguf", "m"].map(|p| model_name(Path::new(p))), ["m"; 3]);
    }
}
