//! The types of GGUF's tensors, and the blocks of the quantised ones as codes.
//!
//! A row of a quantised tensor is a sequence of blocks, each a few bytes: scales, and codes in an order of their own. What they stand
//! for is `codes` times scales, so each type has a [`Format`] that holds the same numbers; here the blocks are taken apart.
//!
//! | type | columns | bytes of a block |
//! |---|---|---|
//! | Q8_0 | 32 | f16 scale, 32 i8 |
//! | Q4_0 | 32 | f16 scale, 16 bytes of two codes: column `j` and column `16 + j` |
//! | Q4_K | 256 | f16 units of scales and of minima, 12 bytes of 8 scales and 8 minima of six bits, 128 bytes of codes: column `64 i + j` and column `64 i + 32 + j` in byte `32 i + j` |
//! | Q6_K | 256 | 128 bytes of the codes' lower four bits, 64 of their upper two, 16 i8 scales, f16 unit |
//!
//! Source: `ggml-quants.c` and `gguf-py/gguf/quants.py` (llama.cpp).

use nextc_ir::Format;
use nextc_ir::format::codes::Codes;
use nextc_ir::format::{Blocks, decode_f16};

/// An element type of GGUF.
#[derive(Debug)]
pub struct Type {
    /// Its number in files.
    pub id: u32,
    /// Its name.
    pub name: &'static str,
    /// Numbers of a block; 1 for plain types.
    pub block_elems: u64,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// What is read of it; nothing for the types that are only known by name.
    pub read: Option<Read>,
}

/// How numbers of a type are read.
#[derive(Clone, Copy, Debug)]
pub enum Read {
    /// They are numbers of a plain format.
    Plain(Format),
    /// They are blocks, which `decode` appends as codes of the format.
    Blocks {
        /// The format that has the same numbers.
        format: Format,
        /// Appends a block.
        decode: fn(block: &[u8], out: &mut Codes),
    },
}

impl Type {
    /// The format that has its numbers, if it is read.
    pub fn format(&self) -> Option<Format> {
        match self.read? {
            Read::Plain(format) | Read::Blocks { format, .. } => Some(format),
        }
    }
}

impl PartialEq for Type {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl Eq for Type {}

/// The types that are read, for messages.
pub const READ: &str = "F32, F16, BF16, Q8_0, Q4_0, Q4_K or Q6_K";
/// Plain types, for messages.
pub const PLAIN: &str = "F32, F16 or BF16";

/// Columns that share units in the K types.
const K: u32 = 256;

const fn plain(id: u32, name: &'static str, block_bytes: u64, format: Format) -> Type {
    Type { id, name, block_elems: 1, block_bytes, read: Some(Read::Plain(format)) }
}

const fn coded(
    (id, name): (u32, &'static str),
    (block_elems, block_bytes): (u64, u64),
    format: Format,
    decode: fn(&[u8], &mut Codes),
) -> Type {
    Type { id, name, block_elems, block_bytes, read: Some(Read::Blocks { format, decode }) }
}

const fn known(id: u32, name: &'static str, block_elems: u64, block_bytes: u64) -> Type {
    Type { id, name, block_elems, block_bytes, read: None }
}

/// The table: every type of the format.
pub const TYPES: &[Type] = &[
    plain(0, "F32", 4, Format::F32),
    plain(1, "F16", 2, Format::F16),
    plain(30, "BF16", 2, Format::Bf16),
    coded((8, "Q8_0"), (32, 34), Format::Q8(Blocks::group(32)), q8_0),
    coded((2, "Q4_0"), (32, 18), Format::Q4(Blocks::group(32)), q4_0),
    coded((12, "Q4_K"), (256, 144), Format::U4(Blocks::group(32).with_second().with_unit(K)), q4_k),
    coded((14, "Q6_K"), (256, 210), Format::Q6(Blocks::group(16).with_unit(K)), q6_k),
    known(3, "Q4_1", 32, 20),
    known(6, "Q5_0", 32, 22),
    known(7, "Q5_1", 32, 24),
    known(9, "Q8_1", 32, 36),
    known(10, "Q2_K", 256, 84),
    known(11, "Q3_K", 256, 110),
    known(13, "Q5_K", 256, 176),
    known(15, "Q8_K", 256, 292),
    known(16, "IQ2_XXS", 256, 66),
    known(17, "IQ2_XS", 256, 74),
    known(18, "IQ3_XXS", 256, 98),
    known(19, "IQ1_S", 256, 50),
    known(20, "IQ4_NL", 32, 18),
    known(21, "IQ3_S", 256, 110),
    known(22, "IQ2_S", 256, 82),
    known(23, "IQ4_XS", 256, 136),
    known(24, "I8", 1, 1),
    known(25, "I16", 1, 2),
    known(26, "I32", 1, 4),
    known(27, "I64", 1, 8),
    known(28, "F64", 1, 8),
    known(29, "IQ1_M", 256, 56),
    known(34, "TQ1_0", 256, 54),
    known(35, "TQ2_0", 256, 66),
    known(39, "MXFP4", 32, 17),
    known(40, "NVFP4", 64, 36),
    known(41, "Q1_0", 128, 18),
];

/// The f16 that begins at byte `at`.
fn half(block: &[u8], at: usize) -> f32 {
    decode_f16(u16::from_le_bytes([block[at], block[at + 1]]))
}

fn q8_0(block: &[u8], out: &mut Codes) {
    out.scales.push(half(block, 0));
    out.codes.extend(&block[2..]);
}

fn q4_0(block: &[u8], out: &mut Codes) {
    out.scales.push(half(block, 0));
    push_nibbles(&block[2..], &mut out.codes);
}

/// The lower halves of bytes, then the upper ones.
fn push_nibbles(bytes: &[u8], codes: &mut Vec<u8>) {
    codes.extend(bytes.iter().map(|b| b & 15));
    codes.extend(bytes.iter().map(|b| b >> 4));
}

fn q4_k(block: &[u8], out: &mut Codes) {
    out.units.push([half(block, 0), half(block, 2)]);
    let packed = &block[4..16];
    for i in 0..8 {
        let (scale, minimum) = scale_and_minimum(packed, i);
        out.scales.push(scale.into());
        out.zeros.push(-f32::from(minimum));
    }
    block[16..].chunks_exact(32).for_each(|bytes| push_nibbles(bytes, &mut out.codes));
}

/// Scale and minimum `i` of eight: the first four have six bits of a byte, the others their lower four in a third run of bytes and
/// their upper two where the first four leave room.
fn scale_and_minimum(packed: &[u8], i: usize) -> (u8, u8) {
    if i < 4 {
        return (packed[i] & 63, packed[i + 4] & 63);
    }
    let (low, high, last) = (packed[i - 4], packed[i], packed[i + 4]);
    (last & 15 | (low >> 6) << 4, last >> 4 | (high >> 6) << 4)
}

fn q6_k(block: &[u8], out: &mut Codes) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    out.units.push([half(block, 208), 0.0]);
    out.scales.extend(scales.iter().map(|&s| f32::from(s.cast_signed())));
    for (low, high) in low.chunks_exact(64).zip(high.chunks_exact(32)) {
        for part in 0..4 {
            let code = |j: usize| {
                let four = low[32 * (part % 2) + j] >> (4 * (part / 2)) & 15;
                let two = high[j] >> (2 * part) & 3;
                four | two << 4
            };
            out.codes.extend((0..32).map(code));
        }
    }
}
