//! Models in GGUF files: one file, or the parts that it was split into, holds configuration, tokenizer, chat template and
//! tensors.
//!
//! [`header`] reads what a file says of itself, and believes none of it: every count, length, type and offset is checked against
//! the file before anything is allocated or read. [`config`] and [`tokenizer`] turn metadata into the files that a model's
//! folder has, so that they are checked and used as those are. [`names`] says which published tensor each tensor is, and
//! how its numbers differ; [`source`] gives their rows, and [`blocks`] the codes of the quantised ones.

pub mod blocks;
mod bytes;
pub mod config;
pub mod header;
pub mod names;
pub mod source;
pub mod tokenizer;

pub use source::Gguf;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// What every file begins with.
pub const MAGIC: [u8; 4] = *b"GGUF";

/// True if there is a file at `path` that calls itself GGUF, by its name or its first bytes.
pub fn is_gguf(path: &Path) -> bool {
    // a pipe is not opened: that could block
    path.is_file() && (path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) || begins_so(path))
}

fn begins_so(path: &Path) -> bool {
    let mut first = [0; 4];
    let read = File::open(path).and_then(|file| file.read_exact_at(&mut first, 0));
    read.is_ok() && first == MAGIC
}
