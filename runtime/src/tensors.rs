//! Writing a safetensors file row by row: the shapes are known first, the numbers come as they are computed.

use std::collections::HashMap;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tempfile::NamedTempFile;

use crate::error::Error;

/// A tensor of f32 that a file will hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<u64>,
}

impl TensorSpec {
    fn bytes(&self) -> u64 {
        self.shape.iter().product::<u64>() * 4
    }
}

/// A file that is being written beside its final place.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: NamedTempFile,
    /// Where each tensor's numbers begin.
    begins: HashMap<String, u64>,
}

impl TensorFile {
    /// Begins a file with these tensors.
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn create(path: &Path, tensors: &[TensorSpec]) -> Result<Self, Error> {
        let dir = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut builder = tempfile::Builder::new();
        builder.prefix(".nextc-").permissions(std::fs::Permissions::from_mode(0o666));
        let file = builder.tempfile_in(dir).map_err(Error::io(path))?;
        let header = header(tensors);
        let data = 8 + header.len() as u64;
        let mut begins = HashMap::new();
        let mut at = data;
        for t in tensors {
            begins.insert(t.name.clone(), at);
            at += t.bytes();
        }
        let write = |bytes: &[u8], at| file.as_file().write_all_at(bytes, at).map_err(Error::io(path));
        write(&(header.len() as u64).to_le_bytes(), 0)?;
        write(header.as_bytes(), 8)?;
        file.as_file().set_len(at).map_err(Error::io(path))?;
        Ok(Self { path: path.to_owned(), file, begins })
    }

    /// Writes row `row` of a tensor, of rows as wide as `values`.
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn write_row(&mut self, tensor: &str, row: usize, values: &[f32]) -> Result<(), Error> {
        let begin = self.begins.get(tensor).copied().ok_or(Error::Step("the output file has no such tensor"))?;
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let at = begin + row as u64 * bytes.len() as u64;
        self.file.as_file().write_all_at(bytes, at).map_err(Error::io(&self.path))
    }

    /// Puts the file into its place.
    /// # Errors
    /// [`Error::Io`] if it cannot be renamed.
    pub fn finish(self) -> Result<(), Error> {
        let Self { path, file, .. } = self;
        file.persist(&path).map(drop).map_err(|e| Error::io(&path)(e.error))
    }
}

/// The header, padded so that numbers are aligned.
fn header(tensors: &[TensorSpec]) -> String {
    let mut at = 0;
    let mut entries = Map::new();
    for t in tensors {
        let end = at + t.bytes();
        let entry: Value = json!({ "dtype": "F32", "shape": t.shape, "data_offsets": [at, end] });
        entries.insert(t.name.clone(), entry);
        at = end;
    }
    let mut text = Value::Object(entries).to_string();
    text.push_str(&" ".repeat(text.len().next_multiple_of(64) - text.len()));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_in_any_order_make_a_file_that_readers_accept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.safetensors");
        let spec = |name: &str, shape: &[u64]| TensorSpec { name: name.to_owned(), shape: shape.to_vec() };
        let mut file = TensorFile::create(&path, &[spec("logits.0", &[2, 3]), spec("logits.1", &[1, 3])]).unwrap();
        file.write_row("logits.0", 1, &[4.0, 5.0, 6.0]).unwrap();
        file.write_row("logits.1", 0, &[7.0, 8.0, 9.0]).unwrap();
        file.write_row("logits.0", 0, &[1.0, 2.0, 3.0]).unwrap();
        assert!(!path.exists());
        file.finish().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensor = read.tensor("logits.0").unwrap();
        assert_eq!(tensor.shape(), [2, 3]);
        let floats = |b: &[u8]| b.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>();
        let values = floats(tensor.data());
        assert_eq!(values, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(floats(read.tensor("logits.1").unwrap().data()), [7.0, 8.0, 9.0]);
    }
}
