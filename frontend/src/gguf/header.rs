//! What a GGUF file says of itself: metadata and tensors, checked in full before anything trusts it.
//!
//! The file is `"GGUF" | u32 version | u64 tensors | u64 keys | keys | tensors | padding | tensor data`. What is checked: every count
//! and length against the bytes that are left, types against the tables, no key and no tensor twice, shapes against rows of
//! whole blocks, and that each tensor lies in the file, aligned, and on no other.

use indexmap::IndexMap;

use super::blocks::{TYPES, Type};
use super::bytes::{Bytes, Cursor};
use crate::error::GgufProblem as Problem;

/// The versions that are read; they differ in nothing that matters here.
const VERSIONS: [u32; 2] = [2, 3];
/// The longest header, in bytes: vocabularies take a few million of them.
const MAX_HEADER_BYTES: u64 = 256 << 20;
const MAX_KEY_BYTES: u64 = 1 << 16;
const MAX_NAME_BYTES: u64 = 1 << 10;
const MAX_DIMS: u32 = 4;
/// Where tensors begin if the file does not say so.
const ALIGNMENT: u64 = 32;
const ALIGNMENT_KEY: &str = "general.alignment";

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// An integer of any width.
    Int(i128),
    /// A float; of 32 bits as the shortest decimal number that it stands for.
    Float(f64),
    /// true or false.
    Bool(bool),
    /// A text.
    Text(String),
    /// A list of texts.
    Texts(Vec<String>),
    /// A list of integers, floats or booleans.
    Numbers(Numbers),
}

/// A list of numbers as the file has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Numbers {
    kind: Kind,
    bytes: Vec<u8>,
}

impl Numbers {
    /// The numbers, one after the other.
    pub fn iter(&self) -> impl Iterator<Item = Value> {
        self.bytes.chunks_exact(self.kind.bytes as usize).map(|bytes| (self.kind.read)(bytes))
    }
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const SHOWN: usize = 60;
        match self {
            Self::Int(n) => write!(f, "{n}"),
            Self::Float(x) => write!(f, "{x}"),
            Self::Bool(b) => write!(f, "{b}"),
            Self::Text(text) if text.chars().count() > SHOWN => {
                write!(f, "{:?}...", text.chars().take(SHOWN).collect::<String>())
            }
            Self::Text(text) => write!(f, "{text:?}"),
            Self::Texts(texts) => write!(f, "a list of {} texts", texts.len()),
            Self::Numbers(numbers) => write!(f, "a list of {} numbers", numbers.iter().count()),
        }
    }
}

/// A type of metadata with values of a fixed size.
#[derive(Clone, Copy)]
struct Kind {
    id: u32,
    bytes: u64,
    /// Reads a value from so many bytes.
    read: fn(&[u8]) -> Value,
}

impl PartialEq for Kind {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl std::fmt::Debug for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "type {}", self.id)
    }
}

/// An integer from its little-endian bytes.
fn unsigned(bytes: &[u8]) -> i128 {
    bytes.iter().rev().fold(0, |n, &b| n << 8 | i128::from(b))
}

fn signed(bytes: &[u8]) -> i128 {
    let unused = 128 - 8 * bytes.len() as u32;
    unsigned(bytes) << unused >> unused
}

fn float32(bytes: &[u8]) -> Value {
    let x = f32::from_bits(unsigned(bytes) as u32);
    // 1e-6 is meant, not 9.999999974752427e-7
    Value::Float(x.to_string().parse().unwrap_or_else(|_| f64::from(x)))
}

const KINDS: &[Kind] = &[
    Kind { id: 0, bytes: 1, read: |b| Value::Int(unsigned(b)) },
    Kind { id: 1, bytes: 1, read: |b| Value::Int(signed(b)) },
    Kind { id: 2, bytes: 2, read: |b| Value::Int(unsigned(b)) },
    Kind { id: 3, bytes: 2, read: |b| Value::Int(signed(b)) },
    Kind { id: 4, bytes: 4, read: |b| Value::Int(unsigned(b)) },
    Kind { id: 5, bytes: 4, read: |b| Value::Int(signed(b)) },
    Kind { id: 6, bytes: 4, read: float32 },
    Kind { id: 7, bytes: 1, read: |b| Value::Bool(unsigned(b) != 0) },
    Kind { id: 10, bytes: 8, read: |b| Value::Int(unsigned(b)) },
    Kind { id: 11, bytes: 8, read: |b| Value::Int(signed(b)) },
    Kind { id: 12, bytes: 8, read: |b| Value::Float(f64::from_bits(unsigned(b) as u64)) },
];
const TEXT: u32 = 8;
const LIST: u32 = 9;

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// How its numbers are stored.
    pub ty: &'static Type,
    /// Its shape, outermost dimension first (the file has the innermost first).
    pub shape: Vec<u64>,
    /// First byte, counted from the beginning of the file.
    pub begin: u64,
}

impl Tensor {
    /// Numbers of a row: of the innermost dimension.
    pub fn columns(&self) -> u64 {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> u64 {
        self.columns() / self.ty.block_elems * self.ty.block_bytes
    }
}

/// What a file says of itself.
#[derive(Clone, Debug)]
pub struct Header {
    /// Metadata by key, in the order of the file.
    pub metadata: IndexMap<String, Value>,
    /// Tensors by name, in the order of the file.
    pub tensors: IndexMap<String, Tensor>,
}

/// Reads the header of a file of `file_bytes` bytes.
/// # Errors
/// The first thing that is wrong with it, and where.
pub fn read<B: Bytes + ?Sized>(file: &B, file_bytes: u64) -> Result<Header, Problem> {
    let mut cursor = Cursor::new(file, file_bytes.min(MAX_HEADER_BYTES));
    let magic = cursor.bytes(4, "the file's mark")?;
    if magic != super::MAGIC {
        return Err(Problem::Mark { found: String::from_utf8_lossy(&magic).into_owned() });
    }
    let version = cursor.u32("the version")?;
    if !VERSIONS.contains(&version) {
        return Err(Problem::Version { found: version });
    }
    // a tensor takes a name, a number of dimensions, at least one, a type and an offset; a key its text, a type and a value
    let tensors = cursor.count(8 + 1 + 4 + 8 + 4 + 8, "the number of tensors")?;
    let keys = cursor.count(8 + 1 + 4 + 1, "the number of keys")?;
    let mut metadata = IndexMap::new();
    for i in 0..keys {
        let key = cursor.text(MAX_KEY_BYTES, &format!("key {i}"))?;
        let value = read_value(&mut cursor, &key)?;
        if metadata.contains_key(&key) {
            return Err(Problem::Key { key, found: "there twice".into(), expected: "once".into() });
        }
        metadata.insert(key, value);
    }
    let mut entries = IndexMap::new();
    for i in 0..tensors {
        let name = cursor.text(MAX_NAME_BYTES, &format!("the name of tensor {i}"))?;
        let entry = read_tensor(&mut cursor, &name)?;
        if entries.contains_key(&name) {
            return Err(Problem::Tensor { tensor: name, reason: "it is there twice".into() });
        }
        entries.insert(name, entry);
    }
    let alignment = alignment(&metadata)?;
    place(&mut entries, cursor.at.next_multiple_of(alignment), alignment, file_bytes)?;
    Ok(Header { metadata, tensors: entries })
}

fn read_value<B: Bytes + ?Sized>(cursor: &mut Cursor<'_, B>, key: &str) -> Result<Value, Problem> {
    let what = format!("the value of `{key}`");
    match type_of(cursor, &what)? {
        TEXT => Ok(Value::Text(cursor.text(MAX_HEADER_BYTES, &what)?)),
        LIST => read_list(cursor, &what),
        id => {
            let kind = kind(id, cursor.at - 4, &what)?;
            Ok((kind.read)(&cursor.bytes(kind.bytes, &what)?))
        }
    }
}

fn type_of<B: Bytes + ?Sized>(cursor: &mut Cursor<'_, B>, what: &str) -> Result<u32, Problem> {
    cursor.u32(&format!("the type of {what}"))
}

fn kind(id: u32, at: u64, what: &str) -> Result<Kind, Problem> {
    let known = KINDS.iter().find(|k| k.id == id).copied();
    known.ok_or_else(|| Problem::ValueType { what: what.to_owned(), at, found: id })
}

fn read_list<B: Bytes + ?Sized>(cursor: &mut Cursor<'_, B>, what: &str) -> Result<Value, Problem> {
    let at = cursor.at;
    let element = format!("an element of {what}");
    let id = type_of(cursor, &element)?;
    let length = format!("the length of {what}");
    if id == TEXT {
        let count = cursor.count(8, &length)?;
        return (0..count).map(|_| cursor.text(MAX_KEY_BYTES, &element)).collect::<Result<_, _>>().map(Value::Texts);
    }
    // lists of lists are in no model
    let kind = kind(id, at, &element)?;
    let count = cursor.count(kind.bytes, &length)?;
    Ok(Value::Numbers(Numbers { kind, bytes: cursor.bytes(count * kind.bytes, what)? }))
}

/// A tensor whose `begin` is still its offset in the data.
fn read_tensor<B: Bytes + ?Sized>(cursor: &mut Cursor<'_, B>, name: &str) -> Result<Tensor, Problem> {
    let at = cursor.at;
    let what = format!("tensor `{name}`");
    let wrong = |reason: String| Problem::Tensor { tensor: name.to_owned(), reason };
    let dims = cursor.u32(&what)?;
    if !(1..=MAX_DIMS).contains(&dims) {
        return Err(wrong(format!("{dims} dimensions (byte {at}), expected 1 to {MAX_DIMS}")));
    }
    let mut shape = (0..dims).map(|_| cursor.u64(&what)).collect::<Result<Vec<u64>, _>>()?;
    shape.reverse();
    let id = cursor.u32(&what)?;
    let begin = cursor.u64(&what)?;
    let ty = TYPES.iter().find(|t| t.id == id).ok_or_else(|| wrong(format!("type {id}, which GGUF does not have")))?;
    let columns = shape.last().copied().unwrap_or(1);
    if !columns.is_multiple_of(ty.block_elems) {
        let each = ty.block_elems;
        return Err(wrong(format!("rows of {columns} numbers, expected a multiple of {each} ({})", ty.name)));
    }
    Ok(Tensor { ty, shape, begin })
}

fn alignment(metadata: &IndexMap<String, Value>) -> Result<u64, Problem> {
    match metadata.get(ALIGNMENT_KEY) {
        None => Ok(ALIGNMENT),
        Some(Value::Int(n @ 1..=0x1_0000)) if n.count_ones() == 1 => Ok(*n as u64),
        Some(other) => Err(Problem::Key {
            key: ALIGNMENT_KEY.into(),
            found: other.to_string(),
            expected: "a power of two up to 65536".into(),
        }),
    }
}

/// Turns offsets into positions in the file, and checks that each tensor has its own bytes of it.
fn place(
    tensors: &mut IndexMap<String, Tensor>,
    data_begin: u64,
    alignment: u64,
    file_bytes: u64,
) -> Result<(), Problem> {
    let mut ends = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors.iter_mut() {
        let wrong = |reason: String| Problem::Tensor { tensor: name.clone(), reason };
        let rows = tensor.shape.iter().rev().skip(1).try_fold(1u64, |n, &d| n.checked_mul(d));
        let row_bytes = (tensor.columns() / tensor.ty.block_elems).checked_mul(tensor.ty.block_bytes);
        let bytes = rows.zip(row_bytes).and_then(|(n, each)| n.checked_mul(each)).filter(|n| *n > 0);
        let bytes = bytes.ok_or_else(|| wrong(format!("shape {:?}, which no file can hold", tensor.shape)))?;
        if !tensor.begin.is_multiple_of(alignment) {
            return Err(wrong(format!("offset {}, expected a multiple of {alignment}", tensor.begin)));
        }
        let begin = tensor.begin.checked_add(data_begin);
        let end = begin.and_then(|b| b.checked_add(bytes)).filter(|end| *end <= file_bytes);
        let (Some(begin), Some(end)) = (begin, end) else {
            let (shape, offset) = (&tensor.shape, tensor.begin);
            return Err(wrong(format!(
                "{bytes} B of {} {shape:?} from byte {offset} of the data on, expected them before the file's end, byte {file_bytes}",
                tensor.ty.name
            )));
        };
        tensor.begin = begin;
        ends.push((begin, end, name.clone()));
    }
    ends.sort_unstable();
    match ends.windows(2).find(|pair| pair[1].0 < pair[0].1) {
        None => Ok(()),
        Some([first, second]) => {
            let reason = format!("it begins at byte {}, before the end of `{}`, byte {}", second.0, first.2, first.1);
            Err(Problem::Tensor { tensor: second.2.clone(), reason })
        }
        Some(_) => unreachable!("windows of two"),
    }
}
