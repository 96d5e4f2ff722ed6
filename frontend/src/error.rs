//! Everything that can be wrong with a model directory, with fields that say where, what was found and what was expected.

use std::fmt::Display;

use nextc_ir::build::BuildError;

/// Why a model cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be opened or read.
    #[error("{file}: {reason}")]
    Io {
        /// The file.
        file: String,
        /// What the system says.
        reason: std::io::Error,
    },
    /// A file is larger than such a file can sensibly be.
    #[error("{file}: {found_bytes} B, expected at most {limit_bytes} B")]
    TooLarge {
        /// The file.
        file: String,
        /// Its size.
        found_bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// A file is not the text or the JSON that it should be.
    #[error("{file}: {reason}")]
    Text {
        /// The file.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The configuration does not describe a model that can be compiled: all of its problems.
    #[error("{}", lines(file, problems))]
    Config {
        /// The file.
        file: String,
        /// What is wrong, in the order of the file's key table.
        problems: Vec<ConfigProblem>,
    },
    /// `--max-context` asks for more than the model can do.
    #[error(
        "`--max-context` is {asked} tokens, expected at most {limit}, as far as {file} reaches; `--rope-scaling` can reach further"
    )]
    MaxContext {
        /// What was asked for.
        asked: u64,
        /// The model's own limit.
        limit: u64,
        /// The configuration that sets it.
        file: String,
    },
    /// An exception of `--quant` is one of no matrix.
    #[error(
        "`--quant`: no matrix is called `{pattern}`, expected a word that `nextc formats` lists, or one of {known}"
    )]
    QuantPattern {
        /// The exception's pattern.
        pattern: String,
        /// The names of all matrices, those of all layers as one.
        known: String,
    },
    /// A safetensors file or its index is malformed.
    #[error("{file}: {problem}")]
    Safetensors {
        /// The file.
        file: String,
        /// What is wrong with it.
        problem: SafetensorsProblem,
    },
    /// A GGUF file is malformed, or is not such a model.
    #[error("{file}: {problem}")]
    Gguf {
        /// The file.
        file: String,
        /// What is wrong with it.
        problem: GgufProblem,
    },
    /// The tensors are not those that the configuration asks for: all problems.
    #[error("{}", lines("checkpoint", problems))]
    Weights {
        /// What is wrong, in the order in which tensors are bound.
        problems: Vec<WeightProblem>,
    },
    /// The graph of the model cannot be built; a configuration that passed its checks should not get here.
    #[error(transparent)]
    Build(#[from] BuildError),
}

/// Something wrong with a key of `config.json`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigProblem {
    /// The value of a key.
    #[error("`{key}` is {found}, expected {expected}")]
    Value {
        /// The key, with the keys that lead to it.
        key: String,
        /// Its value as JSON, or `missing`.
        found: String,
        /// What would be accepted, and why where that is not obvious.
        expected: String,
    },
    /// The weights are quantised in a format that is known but cannot be compiled.
    #[error(
        "weights quantised by {method} as {what} (`quantization_config`) cannot be compiled; use another checkpoint of this model"
    )]
    Format {
        /// The quantisation method.
        method: String,
        /// What of it cannot be compiled.
        what: String,
    },
}

/// Something wrong with a safetensors file or its index.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SafetensorsProblem {
    /// Too short to hold the length of its header.
    #[error("{found_bytes} B, too short for a safetensors header")]
    NoHeader {
        /// Size of the file.
        found_bytes: u64,
    },
    /// The header does not fit the file, or is absurdly long.
    #[error("header of {header_bytes} B, expected at most {limit_bytes} B")]
    HeaderLength {
        /// Length that the first eight bytes state.
        header_bytes: u64,
        /// What the file, or good sense, leaves room for.
        limit_bytes: u64,
    },
    /// The header is not the JSON object it should be.
    #[error("header: {reason}")]
    Header {
        /// What the parser says.
        reason: String,
    },
    /// An element type that the format does not have.
    #[error("tensor `{tensor}` has dtype {found}, which safetensors does not have")]
    DType {
        /// The tensor.
        tensor: String,
        /// Its dtype as written.
        found: String,
    },
    /// Shape, element type and byte range of a tensor disagree.
    #[error("tensor `{tensor}` of {dtype} {shape:?} lies in {found_bytes} B, expected {expected}")]
    Size {
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: &'static str,
        /// Its shape.
        shape: Vec<u64>,
        /// Length of its byte range.
        found_bytes: u64,
        /// Bytes of the shape, or that there is no such number.
        expected: String,
    },
    /// A tensor ends before it begins, or does not begin where the one before it ended.
    #[error("tensor `{tensor}` lies at {begin}..{end}, expected it to begin at {expected} and not to end before")]
    Offsets {
        /// The tensor.
        tensor: String,
        /// First byte of the data.
        begin: u64,
        /// One past the last byte.
        end: u64,
        /// Where the tensors before it end.
        expected: u64,
    },
    /// The file is shorter or longer than its tensors.
    #[error("{found_bytes} B of tensor data, expected {expected_bytes} B: the file is truncated or has a tail")]
    DataLength {
        /// Bytes after the header.
        found_bytes: u64,
        /// Bytes that the header describes.
        expected_bytes: u64,
    },
    /// The index is not what it should be.
    #[error("{reason}")]
    Index {
        /// What is wrong.
        reason: String,
    },
    /// A shard name that is not the name of a file beside the index.
    #[error("`{tensor}` lies in {shard:?}, expected the name of a file in the same directory")]
    ShardName {
        /// A tensor that is said to lie there.
        tensor: String,
        /// The name.
        shard: String,
    },
    /// A tensor is not in the shard that the index names.
    #[error("`{tensor}` should lie in {shard}, {found}")]
    NotInShard {
        /// The tensor.
        tensor: String,
        /// The shard named by the index.
        shard: String,
        /// Where it is instead.
        found: String,
    },
    /// Two shards hold a tensor of one name.
    #[error("tensor `{tensor}` is in this file and in {other}")]
    Duplicate {
        /// The tensor.
        tensor: String,
        /// The other shard.
        other: String,
    },
}

/// Something wrong with a GGUF file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GgufProblem {
    /// It does not begin as GGUF files do.
    #[error("it begins with {found:?}, expected \"GGUF\"")]
    Mark {
        /// Its first four bytes.
        found: String,
    },
    /// A version that is not read; big-endian files seem to have one too.
    #[error("version {found}, expected 2 or 3 (little-endian)")]
    Version {
        /// The version.
        found: u32,
    },
    /// The file, or what may be its header, ends too early.
    #[error(
        "byte {at}: {what} needs {needs_bytes} B, the header has {left_bytes} B left: the file is truncated or damaged"
    )]
    Ends {
        /// What was being read.
        what: String,
        /// Where.
        at: u64,
        /// Bytes that it needs.
        needs_bytes: u64,
        /// Bytes that are there.
        left_bytes: u64,
    },
    /// A count for which the file has no room.
    #[error("byte {at}: {what} is {found}, expected at most {most}")]
    Count {
        /// What is counted.
        what: String,
        /// Where.
        at: u64,
        /// The count.
        found: u64,
        /// What the file has room for, or good sense allows.
        most: u64,
    },
    /// A text that is no UTF-8.
    #[error("byte {at}: {what} is no text: {reason}")]
    Text {
        /// What was being read.
        what: String,
        /// Where.
        at: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// A type of metadata that GGUF does not have, or a list of lists.
    #[error("byte {at}: {what} has type {found}, expected one of 0 to 12, and no list in a list")]
    ValueType {
        /// What was being read.
        what: String,
        /// Where.
        at: u64,
        /// The type.
        found: u32,
    },
    /// A key whose value is not what it should be.
    #[error("`{key}` is {found}, expected {expected}")]
    Key {
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What would be accepted.
        expected: String,
    },
    /// A tensor that is not where or what it should be.
    #[error("tensor `{tensor}`: {reason}")]
    Tensor {
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The first of several parts has another name than it should.
    #[error(
        "it is the first of {count} parts, expected a name that ends in `{ending}`, so that the others can be found"
    )]
    PartName {
        /// How many parts there are.
        count: u64,
        /// What its name should end in.
        ending: String,
    },
    /// Reading failed.
    #[error("byte {at}: {reason}")]
    Read {
        /// Where.
        at: u64,
        /// What the system says.
        reason: String,
    },
}

/// Something wrong with the tensors of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WeightProblem {
    /// A tensor that the configuration asks for is not there.
    #[error("tensor `{tensor}` is missing, expected shape {expected}")]
    Missing {
        /// The tensor.
        tensor: String,
        /// The shapes that would do.
        expected: String,
    },
    /// A tensor has another shape than the configuration asks for.
    #[error("tensor `{tensor}` has shape {found:?}, expected {expected}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Vec<u64>,
        /// The shapes that would do.
        expected: String,
    },
    /// A tensor has an element type that is not read there.
    #[error("tensor `{tensor}` has dtype {found}, expected {expected}")]
    DType {
        /// The tensor.
        tensor: String,
        /// Its dtype.
        found: String,
        /// The dtypes that would do.
        expected: &'static str,
    },
    /// A tensor that belongs to quantised weights of a kind that is not read, or without its companions.
    #[error("tensor `{tensor}` belongs to quantised weights: {reason}")]
    Quantised {
        /// The tensor.
        tensor: String,
        /// Why it cannot be read.
        reason: String,
    },
    /// A tensor of the MTP module that nothing reads: dropping it would silently cost accepted drafts.
    #[error("tensor `{tensor}` is not part of an MTP module as this model has it")]
    UnknownMtp {
        /// The tensor.
        tensor: String,
    },
}

/// Problems shown at once; a checkpoint with one wrong size has thousands.
const SHOWN: usize = 20;

fn lines(place: &str, problems: &[impl Display]) -> String {
    let mut text: Vec<String> = problems.iter().take(SHOWN).map(|p| format!("{place}: {p}")).collect();
    if problems.len() > SHOWN {
        text.push(format!("{place}: and {} more", problems.len() - SHOWN));
    }
    text.join("\n")
}
