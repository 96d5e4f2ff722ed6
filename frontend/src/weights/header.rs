//! The header of a safetensors file, checked in full before anything trusts it.
//!
//! The file is `u64 length | JSON header | tensor data`. What is checked: the length against the file and a limit, the JSON
//! (no name twice, no key too many), element types, shape against byte range without overflow, and that the tensors lie one
//! after the other and fill the data exactly.

use std::fmt;

use indexmap::IndexMap;
use nextc_ir::Format;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use crate::error::SafetensorsProblem as Problem;

/// The longest header, in bytes; that of the largest published checkpoints is a tenth of it.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Element types of the format: name and bits.
const DTYPES: &[(&str, u64)] = &[
    ("BOOL", 8),
    ("F4", 4),
    ("F6_E2M3", 6),
    ("F6_E3M2", 6),
    ("U8", 8),
    ("I8", 8),
    ("F8_E5M2", 8),
    ("F8_E4M3", 8),
    ("F8_E8M0", 8),
    ("F8_E4M3FNUZ", 8),
    ("F8_E5M2FNUZ", 8),
    ("I16", 16),
    ("U16", 16),
    ("F16", 16),
    ("BF16", 16),
    ("I32", 32),
    ("U32", 32),
    ("F32", 32),
    ("C64", 64),
    ("F64", 64),
    ("I64", 64),
    ("U64", 64),
];

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Element type, as the format names it.
    pub dtype: &'static str,
    /// Shape, outermost dimension first.
    pub shape: Vec<u64>,
    /// First byte, counted from the beginning of the file.
    pub begin: u64,
}

impl Tensor {
    /// The plain format of its numbers; `None` for other element types.
    pub fn plain_format(&self) -> Option<Format> {
        match self.dtype {
            "BF16" => Some(Format::Bf16),
            "F16" => Some(Format::F16),
            "F32" => Some(Format::F32),
            _ => None,
        }
    }
}

/// The element types that [`Tensor::plain_format`] knows, for messages.
pub const PLAIN: &str = "BF16, F16 or F32";

/// Length of the header, from a file's first eight bytes and its size.
/// # Errors
/// If the file is too short for it, or it is absurd.
pub fn header_bytes(first: [u8; 8], file_bytes: u64) -> Result<u64, Problem> {
    let header_bytes = u64::from_le_bytes(first);
    let limit_bytes = MAX_HEADER_BYTES.min(file_bytes.saturating_sub(8));
    if header_bytes > limit_bytes {
        return Err(Problem::HeaderLength { header_bytes, limit_bytes });
    }
    Ok(header_bytes)
}

/// The tensors that a header describes, by name, in the order in which they lie. `file_bytes` is the size of the file.
/// # Errors
/// The first thing that is wrong with the header.
pub fn parse(header: &[u8], file_bytes: u64) -> Result<IndexMap<String, Tensor>, Problem> {
    let Entries(mut entries) = serde_json::from_slice(header).map_err(|e| Problem::Header { reason: e.to_string() })?;
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    let data_begin = 8 + header.len() as u64;
    let mut expected = 0;
    let mut tensors = IndexMap::with_capacity(entries.len());
    for (name, entry) in entries {
        let (tensor, end) = check(&name, entry, expected, data_begin)?;
        expected = end;
        if tensors.contains_key(&name) {
            return Err(Problem::Header { reason: format!("tensor `{name}` appears twice") });
        }
        tensors.insert(name, tensor);
    }
    let found_bytes = file_bytes.saturating_sub(data_begin);
    if found_bytes != expected {
        return Err(Problem::DataLength { found_bytes, expected_bytes: expected });
    }
    Ok(tensors)
}

/// Checks one entry; gives the tensor and where it ends in the data.
fn check(name: &str, entry: Entry, expected: u64, data_begin: u64) -> Result<(Tensor, u64), Problem> {
    let Entry { dtype, shape, data_offsets: [begin, end] } = entry;
    let Some(&(dtype, bits)) = DTYPES.iter().find(|(known, _)| *known == dtype) else {
        return Err(Problem::DType { tensor: name.into(), found: dtype });
    };
    if begin != expected || end < begin {
        return Err(Problem::Offsets { tensor: name.into(), begin, end, expected });
    }
    let size_bits = shape.iter().try_fold(bits, |product, n| product.checked_mul(*n));
    let size_bytes = size_bits.filter(|b| b % 8 == 0).map(|b| b / 8);
    let file_begin = data_begin.checked_add(begin).filter(|b| b.checked_add(end - begin).is_some());
    match (size_bytes, file_begin) {
        (Some(size), Some(begin)) if size == end - expected => Ok((Tensor { dtype, shape, begin }, end)),
        _ => {
            let expected =
                size_bytes.map_or("a shape whose size is a number of bytes below 2^61".into(), |n| format!("{n} B"));
            Err(Problem::Size { tensor: name.into(), dtype, shape, found_bytes: end - begin, expected })
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The header's entries without `__metadata__`, which must be strings by name.
struct Entries(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntriesVisitor)
    }
}

struct EntriesVisitor;

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
        let mut entries = Vec::new();
        let mut metadata = false;
        while let Some(name) = map.next_key::<String>()? {
            if name != "__metadata__" {
                entries.push((name, map.next_value()?));
                continue;
            }
            if std::mem::replace(&mut metadata, true) {
                return Err(A::Error::custom("`__metadata__` appears twice"));
            }
            map.next_value::<IgnoredAny>()?;
        }
        Ok(Entries(entries))
    }
}
