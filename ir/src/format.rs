//! Weight formats: how the numbers of a weight are stored. Each is declared once, in [`FORMATS`].
//!
//! A stored number is a **code** of a few bits. In the plain formats (bf16, f16, f32) the code is the number; in the others a
//! block of the matrix shares a scale, and perhaps a second number ([`Blocks`], [`Shift`]). A row of the
//! table says how wide a code is, what it means ([`FormatDef::decode`], the interpreter's reading), which code is nearest to a
//! number ([`FormatDef::encode`]) and how a kernel gets the numbers out of 32-bit words ([`FormatDef::unpack`], kernel IR).
//! Packer, interpreter, lowering, cost and `nextc formats` derive from the row; where codes and scales lie is [`crate::layout`]'s
//! business, and how a matrix is rounded to a format that of [`codes`].

use crate::dtype::DType;
use crate::kernel::{KernelBuilder, Val};

pub mod codes;
mod floats;
mod unpack;

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
    /// Eight-bit floats with four bits of exponent (e4m3fn), scaled.
    Fp8(Blocks),
    /// Eight-bit integers, scaled.
    Q8(Blocks),
    /// Four-bit integers from -8 to 7, scaled; stored with 8 added.
    Q4(Blocks),
    /// Four-bit integers from 0 to 15, scaled, and an offset.
    U4(Blocks),
    /// Six-bit integers from -32 to 31, scaled; stored with 32 added.
    Q6(Blocks),
}

/// What the second number of a block does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shift {
    /// A zero point, in codes: `number = (code - zero) * scale`.
    Zero,
    /// An offset: `number = code * scale + offset`.
    Offset,
}

/// What shares a scale, and how the scale is stored. In text: `g32`, `128x128`, `g128,bf16,zero`, `g16,k256`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Blocks {
    /// Rows of a block: 1, or a multiple of 16. A block ends where its index of the outer output dimensions (an expert, a head) ends.
    pub rows: u32,
    /// Columns of a block, counted as stored: a multiple of 16. The last block of a row may have fewer.
    pub columns: u32,
    /// The type of scales, and of second numbers where there are any: f16, bf16 or f32. With units, the type of these.
    pub scale: DType,
    /// True if a block also has a second number: [`FormatDef::shift`].
    pub zero: bool,
    /// 0, or columns of a row that share a unit, whole blocks of them: then scales are integers of eight bits, counted in units, and
    /// second numbers too, in a unit of their own.
    pub unit: u32,
    /// True if the columns are stored in an order of their own, which the weight's order plane holds.
    pub ordered: bool,
}

impl Blocks {
    /// A scale a row and `columns` columns, in f16.
    pub const fn group(columns: u32) -> Self {
        Self { rows: 1, columns, scale: DType::F16, zero: false, unit: 0, ordered: false }
    }

    /// A scale for `rows` rows by `columns` columns, in f32.
    pub const fn tile(rows: u32, columns: u32) -> Self {
        Self { rows, columns, scale: DType::F32, zero: false, unit: 0, ordered: false }
    }

    /// The same with scales that are counted in units of `columns` columns.
    pub const fn with_unit(self, columns: u32) -> Self {
        Self { unit: columns, ..self }
    }

    /// The same with second numbers.
    pub const fn with_second(self) -> Self {
        Self { zero: true, ..self }
    }

    /// Numbers that a block is described by: its scale, and its second number.
    pub const fn parts(self) -> u64 {
        1 + self.zero as u64
    }

    /// True if each 32 columns of a row share a scale and nothing else, and lie in their own order.
    pub const fn scales_bytes(self) -> bool {
        self.rows == 1 && self.columns.is_multiple_of(32) && !self.zero && !self.ordered
    }

    /// Bytes of a scale as it is stored.
    pub const fn scale_bytes(self) -> u64 {
        if self.unit > 0 { 1 } else { self.scale.bytes() }
    }
}

/// One row of the format table.
pub struct FormatDef {
    /// The format of this row; for a scaled one with the blocks that its bare name stands for.
    pub format: Format,
    /// The name in IR text and on the command line, without blocks.
    pub name: &'static str,
    /// Bits of a code.
    pub bits: u64,
    /// 32-bit words that a whole number of codes fills: columns go to memory in groups of as many.
    pub words: u64,
    /// The largest magnitude of a code in use: a block whose numbers reach `largest · scale` is not clipped.
    pub largest: f32,
    /// What the second number of a block does, where a block has one.
    pub shift: Shift,
    /// One sentence for `nextc formats`.
    pub doc: &'static str,
    /// The code nearest to `x` (of a scaled format: to a number already divided by its scale). Exact if `x` is a code's number.
    pub encode: fn(x: f32) -> u32,
    /// The number that a code stands for, before scale and second number.
    pub decode: fn(code: u32) -> f32,
    /// Emits the numbers of the [`Format::group_columns`] that a group of words holds, in their order: `f32` of as many lanes as the words.
    pub unpack: fn(k: &mut KernelBuilder, words: &[Val]) -> Vec<Val>,
}

/// The table: every format nextc reads and packs.
pub const FORMATS: &[FormatDef] = &[
    FormatDef {
        format: Format::Bf16,
        name: "bf16",
        bits: 16,
        words: 1,
        largest: f32::MAX,
        shift: Shift::Zero,
        doc: "bfloat16: the upper half of a float32",
        encode: |x| u32::from(encode_bf16(x)),
        decode: |c| decode_bf16(c as u16),
        unpack: unpack::bf16,
    },
    FormatDef {
        format: Format::F16,
        name: "f16",
        bits: 16,
        words: 1,
        largest: 65504.0,
        shift: Shift::Zero,
        doc: "IEEE half precision",
        encode: |x| u32::from(encode_f16(x)),
        decode: |c| decode_f16(c as u16),
        unpack: unpack::f16,
    },
    FormatDef {
        format: Format::F32,
        name: "f32",
        bits: 32,
        words: 1,
        largest: f32::MAX,
        shift: Shift::Zero,
        doc: "IEEE single precision",
        encode: f32::to_bits,
        decode: f32::from_bits,
        unpack: unpack::f32,
    },
    FormatDef {
        format: Format::Fp8(Blocks::tile(128, 128)),
        name: "fp8",
        bits: 8,
        words: 1,
        largest: 448.0,
        shift: Shift::Zero,
        doc: "8-bit floats (e4m3fn); an f32 scale for each 128 rows by 128 columns",
        encode: |x| u32::from(encode_e4m3(x)),
        decode: |c| decode_e4m3(c as u8),
        unpack: unpack::e4m3,
    },
    FormatDef {
        format: Format::Q8(Blocks::group(32)),
        name: "q8",
        bits: 8,
        words: 1,
        largest: 127.0,
        shift: Shift::Zero,
        doc: "8-bit integers; an f16 scale for each 32 columns of a row",
        encode: |x| u32::from((x.round_ties_even() as i8).max(-127).cast_unsigned()),
        decode: |c| f32::from((c as u8).cast_signed()),
        unpack: unpack::i8,
    },
    FormatDef {
        format: Format::Q4(Blocks::group(32)),
        name: "q4",
        bits: 4,
        words: 1,
        largest: 8.0,
        shift: Shift::Zero,
        doc: "4-bit integers from -8 to 7; an f16 scale for each 32 columns of a row",
        encode: |x| (x.round_ties_even().clamp(-8.0, 7.0) + 8.0) as u32,
        decode: |c| (c & 15) as f32 - 8.0,
        unpack: unpack::i4,
    },
    FormatDef {
        format: Format::U4(Blocks::group(32).with_second().with_unit(256)),
        name: "u4",
        bits: 4,
        words: 1,
        largest: 15.0,
        shift: Shift::Offset,
        doc: "4-bit integers from 0 to 15; for each 32 columns of a row a scale and an offset, integers in f16 units of 256 columns (GGUF's Q4_K)",
        encode: |x| x.round_ties_even().clamp(0.0, 15.0) as u32,
        decode: |c| (c & 15) as f32,
        unpack: unpack::u4,
    },
    FormatDef {
        format: Format::Q6(Blocks::group(16).with_unit(256)),
        name: "q6",
        bits: 6,
        words: 3,
        largest: 31.0,
        shift: Shift::Zero,
        doc: "6-bit integers from -32 to 31; a scale for each 16 columns of a row, an integer in f16 units of 256 columns (GGUF's Q6_K)",
        encode: |x| (x.round_ties_even().clamp(-32.0, 31.0) + 32.0) as u32,
        decode: |c| (c & 63) as f32 - 32.0,
        unpack: unpack::i6,
    },
];

impl Format {
    /// The format's row.
    pub fn def(self) -> &'static FormatDef {
        let same = |d: &&FormatDef| std::mem::discriminant(&d.format) == std::mem::discriminant(&self);
        FORMATS.iter().find(same).expect("every format has its row: tested")
    }

    /// True if its numbers are integers of at most eight bits times a scale that 32 columns of a row share, and nothing else: what is multiplied as bytes.
    pub fn is_bytes(self) -> bool {
        matches!(self, Self::Q8(blocks) | Self::Q4(blocks) if blocks.scales_bytes())
    }

    /// Its blocks, if it is scaled.
    pub const fn blocks(self) -> Option<Blocks> {
        match self {
            Self::Bf16 | Self::F16 | Self::F32 => None,
            Self::Fp8(b) | Self::Q8(b) | Self::Q4(b) | Self::U4(b) | Self::Q6(b) => Some(b),
        }
    }

    /// The same codes in other blocks; a plain format as it is.
    #[must_use]
    pub const fn with_blocks(self, blocks: Blocks) -> Self {
        match self {
            Self::Bf16 | Self::F16 | Self::F32 => self,
            Self::Fp8(_) => Self::Fp8(blocks),
            Self::Q8(_) => Self::Q8(blocks),
            Self::Q4(_) => Self::Q4(blocks),
            Self::U4(_) => Self::U4(blocks),
            Self::Q6(_) => Self::Q6(blocks),
        }
    }

    /// Columns of a group: those that a 32-bit word holds, or where codes do not fill one, several.
    pub fn group_columns(self) -> u64 {
        32 * self.def().words / self.def().bits
    }

    /// The plain format whose numbers are those of `dtype`.
    pub const fn plain(dtype: DType) -> Option<Self> {
        match dtype {
            DType::BF16 => Some(Self::Bf16),
            DType::F16 => Some(Self::F16),
            DType::F32 => Some(Self::F32),
            DType::I64 | DType::I32 | DType::U8 | DType::Bool => None,
        }
    }

    /// The format called `name`: a plain one, a scaled one (`q4` with its usual blocks), or one with blocks (`q4<g128,bf16,zero>`).
    pub fn from_name(name: &str) -> Option<Self> {
        let (family, blocks) = match name.split_once('<') {
            Some((family, rest)) => (family, Some(rest.strip_suffix('>')?)),
            None => (name, None),
        };
        let format = FORMATS.iter().find(|d| d.name == family)?.format;
        match (blocks, format.blocks()) {
            (None, _) => Some(format),
            (Some(text), Some(usual)) => Some(format.with_blocks(parse_blocks(text, usual)?)),
            (Some(_), None) => None,
        }
    }

    /// Bytes that `elems` weights take, with their scales; without padding.
    pub fn bytes(self, elems: u64) -> u64 {
        let codes = elems * self.def().bits / 8;
        let scales = self.blocks().map_or(0, |b| {
            let block = u64::from(b.rows) * u64::from(b.columns);
            let units = elems.checked_div(u64::from(b.unit)).unwrap_or(0);
            b.parts() * (elems.div_ceil(block) * b.scale_bytes() + units * b.scale.bytes())
        });
        codes + scales
    }
}

/// `g32`, `128x128`, `g128,bf16,zero,ordered`, `g16,k256`; what is not said is as in `usual`.
fn parse_blocks(text: &str, usual: Blocks) -> Option<Blocks> {
    let mut words = text.split(',');
    let size = words.next()?;
    let (rows, columns) = match (size.strip_prefix('g'), size.split_once('x')) {
        (Some(columns), _) => (1, columns.parse().ok()?),
        (None, Some((rows, columns))) => (rows.parse().ok()?, columns.parse().ok()?),
        (None, None) => return None,
    };
    let mut blocks = Blocks { rows, columns, unit: 0, ..usual };
    for word in words {
        let unit = word.strip_prefix('k').and_then(|n| n.parse().ok());
        match (word, DType::from_name(word)) {
            ("zero", _) => blocks.zero = true,
            ("ordered", _) => blocks.ordered = true,
            _ if unit.is_some() => blocks.unit = unit.unwrap_or(0),
            (_, Some(scale)) if Format::plain(scale).is_some() => blocks.scale = scale,
            _ => return None,
        }
    }
    let whole = |n: u32| n > 0 && n.is_multiple_of(16);
    let counted = blocks.unit == 0 || (rows == 1 && blocks.unit.is_multiple_of(columns));
    (whole(columns) && (rows == 1 || whole(rows)) && counted).then_some(blocks)
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let def = self.def();
        f.write_str(def.name)?;
        let (Some(b), Some(usual)) = (self.blocks(), def.format.blocks()) else { return Ok(()) };
        match b.rows {
            1 => write!(f, "<g{}", b.columns)?,
            rows => write!(f, "<{rows}x{}", b.columns)?,
        }
        if b.scale != usual.scale {
            write!(f, ",{}", b.scale)?;
        }
        if b.unit > 0 {
            write!(f, ",k{}", b.unit)?;
        }
        let zero = b.zero && def.shift == Shift::Zero;
        write!(f, "{}{}>", if zero { ",zero" } else { "" }, if b.ordered { ",ordered" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_has_a_row_and_its_text_is_read_back() {
        for def in FORMATS {
            assert_eq!(def.format.def().name, def.name);
            assert_eq!(Format::from_name(def.name), Some(def.format));
            assert_eq!(Format::from_name(&def.format.to_string()), Some(def.format));
        }
        for text in [
            "q4<g32>",
            "q4<g128,bf16,zero>",
            "q4<g64,f32,ordered>",
            "fp8<128x128>",
            "fp8<g64,bf16>",
            "q8<16x32>",
            "q8<g16,k256>",
            "u4<g32,k256>",
            "u4<g32>",
            "q6<g16,k256>",
            "q6<g32>",
        ] {
            assert_eq!(Format::from_name(text).expect(text).to_string(), text);
        }
        for text in [
            "q8<g32,k48>",
            "q8<16x32,k256>",
            "q8<g32,k>",
            "q4<>",
            "q4<g24>",
            "q4<g0>",
            "q4<32>",
            "fp8<8x128>",
            "bf16<g32>",
            "q4<g32",
            "q4<g32,i32>",
            "q3",
        ] {
            assert_eq!(Format::from_name(text), None, "{text}");
        }
    }

    #[test]
    fn every_code_is_the_nearest_to_its_own_number() {
        for def in FORMATS.iter().filter(|d| d.bits <= 16) {
            for code in 0..1u32 << def.bits {
                let x = (def.decode)(code);
                // -128 is not in use: scales are chosen for ±127
                if x.is_finite() && x.abs() <= def.largest {
                    let again = (def.decode)((def.encode)(x));
                    assert_eq!(again.to_bits(), x.to_bits(), "code {code:#x} of {}", def.name);
                }
            }
        }
    }

    #[test]
    fn bytes_are_integers_with_a_scale_for_32_columns_or_more() {
        let is_bytes = |name: &str| Format::from_name(name).expect("it is one").is_bytes();
        assert!(["q8<g32>", "q4<g32>", "q4<g128,bf16>", "q8<g64,f32>"].into_iter().all(is_bytes));
        let others = ["bf16", "fp8<128x128>", "q8<g16>", "q4<g32,zero>", "q4<g32,ordered>", "u4<g32>", "q6<g32>"];
        assert!(!others.into_iter().any(is_bytes));
    }

    #[test]
    fn bytes_count_scales() {
        let bytes = |name: &str| Format::from_name(name).expect(name).bytes(1 << 20) as f64 / f64::from(1 << 20);
        assert_eq!(bytes("bf16"), 2.0);
        assert_eq!(bytes("q8"), 1.0625);
        assert_eq!(bytes("q4"), 0.5625);
        assert_eq!(bytes("q4<g128,bf16,zero>"), 0.53125);
        assert_eq!(bytes("u4"), 0.578_125);
        assert_eq!(bytes("q6"), 0.820_312_5);
        assert_eq!(bytes("q8<g16,k256>"), 1.070_312_5);
        assert!((bytes("fp8") - 1.000_25).abs() < 1e-5);
    }
}
