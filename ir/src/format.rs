//! Weight formats: how the numbers of a weight are stored. Each is declared once, in [`FORMATS`].
//!
//! A row says how wide a number is, which checkpoint type it is read from, what it means ([`FormatDef::decode`], the
//! interpreter's reading) and how a kernel reads two neighbouring columns of 16 rows
//! ([`FormatDef::load_pair`], kernel IR). Packer, interpreter, lowering, cost and `nextc formats` derive from the row.

use crate::dtype::DType;
use crate::kernel::{KernelBuilder, Val};

mod floats;

pub use floats::{decode_bf16, decode_e4m3, decode_f16, encode_bf16, encode_e4m3, encode_f16};

/// A weight format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Format {
    /// bfloat16, as the published checkpoints store nearly everything.
    Bf16,
    /// IEEE binary16.
    F16,
    /// IEEE binary32.
    F32,
}

/// One row of the format table.
pub struct FormatDef {
    /// The format of this row.
    pub format: Format,
    /// The name in IR text and on the command line.
    pub name: &'static str,
    /// The element type as packed.
    pub dtype: DType,
    /// One sentence for `nextc formats`.
    pub doc: &'static str,
    /// Encodes `x` to `dtype.bytes()` little-endian bytes; exact if `x` came from this format.
    pub encode: fn(x: f32, out: &mut [u8]),
    /// The number that `dtype.bytes()` little-endian bytes stand for.
    pub decode: fn(bytes: &[u8]) -> f32,
    /// Emits the load of columns `2j` and `2j+1` of a 16-row tile: two `f32x16`.
    pub load_pair: fn(k: &mut KernelBuilder, tile: Val, pair: Val) -> (Val, Val),
}

/// The table: every format nextc reads and packs.
pub const FORMATS: &[FormatDef] = &[
    FormatDef {
        format: Format::Bf16,
        name: "bf16",
        dtype: DType::BF16,
        doc: "bfloat16: the upper half of a float32; 2 bytes a weight",
        encode: |x, out| out.copy_from_slice(&encode_bf16(x).to_le_bytes()),
        decode: |b| decode_bf16(u16::from_le_bytes([b[0], b[1]])),
        load_pair: load_pair_bf16,
    },
    FormatDef {
        format: Format::F16,
        name: "f16",
        dtype: DType::F16,
        doc: "IEEE half precision; 2 bytes a weight",
        encode: |x, out| out.copy_from_slice(&encode_f16(x).to_le_bytes()),
        decode: |b| decode_f16(u16::from_le_bytes([b[0], b[1]])),
        load_pair: load_pair_f16,
    },
    FormatDef {
        format: Format::F32,
        name: "f32",
        dtype: DType::F32,
        doc: "IEEE single precision; 4 bytes a weight",
        encode: |x, out| out.copy_from_slice(&x.to_le_bytes()),
        decode: |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        load_pair: load_pair_f32,
    },
];

impl Format {
    /// The format's row.
    pub fn def(self) -> &'static FormatDef {
        FORMATS.iter().find(|d| d.format == self).expect("every format has its row: tested")
    }

    /// The name in IR text.
    pub fn name(self) -> &'static str {
        self.def().name
    }

    /// The format called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        FORMATS.iter().find(|d| d.name == name).map(|d| d.format)
    }

    /// Bytes that `elems` weights take.
    pub fn bytes(self, elems: u64) -> u64 {
        elems * self.def().dtype.bytes()
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Pairs are interleaved, so one 32-bit lane holds both columns: the even one in its lower half.
fn load_pair_bf16(k: &mut KernelBuilder, tile: Val, pair: Val) -> (Val, Val) {
    let at = k.mul_const(pair, 16);
    let both = k.load(DType::I32, 16, tile, at);
    let sixteen = k.splat_i32(16, 16);
    let high = k.splat_i32(16, 0xffff_0000_u32 as i32);
    let even = k.shl(both, sixteen);
    let odd = k.and(both, high);
    (k.bitcast(even, DType::F32), k.bitcast(odd, DType::F32))
}

/// As bf16, each half widened by moving its exponent: exact for every finite half, denormals included.
fn load_pair_f16(k: &mut KernelBuilder, tile: Val, pair: Val) -> (Val, Val) {
    let at = k.mul_const(pair, 16);
    let both = k.load(DType::I32, 16, tile, at);
    let sixteen = k.splat_i32(16, 16);
    let even = k.shl(both, sixteen);
    (widen_f16(k, even), widen_f16(k, both))
}

/// The half in the upper 16 bits of each lane as f32.
fn widen_f16(k: &mut KernelBuilder, lanes: Val) -> Val {
    let magnitude_mask = k.splat_i32(16, 0x7fff_0000);
    let sign_mask = k.splat_i32(16, 0x8000_0000_u32 as i32);
    let three = k.splat_i32(16, 3);
    let magnitude = k.and(lanes, magnitude_mask);
    let sign = k.and(lanes, sign_mask);
    let shifted = k.ushr(magnitude, three);
    let small = k.bitcast(shifted, DType::F32);
    let scale = k.splat_f32(16, f32::from_bits(0x7780_0000));
    let value = k.fmul(small, scale);
    let bits = k.bitcast(value, DType::I32);
    let signed = k.or(bits, sign);
    k.bitcast(signed, DType::F32)
}

/// f32 is not interleaved: column `2j` is 16 floats, column `2j+1` the next 16.
fn load_pair_f32(k: &mut KernelBuilder, tile: Val, pair: Val) -> (Val, Val) {
    let even_at = k.mul_const(pair, 32);
    let odd_at = k.add_const(even_at, 16);
    (k.load(DType::F32, 16, tile, even_at), k.load(DType::F32, 16, tile, odd_at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_has_a_row_and_decodes_what_it_encodes() {
        for def in FORMATS {
            assert_eq!(Format::from_name(def.name), Some(def.format));
            for x in [0.0f32, -0.0, 1.0, -2.5, 0.15625, 6.1035e-5, 65504.0 / 4.0] {
                let mut bytes = vec![0; def.dtype.bytes() as usize];
                (def.encode)(x, &mut bytes);
                let once = (def.decode)(&bytes);
                (def.encode)(once, &mut bytes);
                assert_eq!(once.to_bits(), (def.decode)(&bytes).to_bits(), "{} of {x}", def.name);
            }
        }
    }
}
