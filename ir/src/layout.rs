//! Layouts: where each element of a weight lies in the packed file. A layout is data; the packer and the kernels read it.
//!
//! A matrix is packed as **planes**, one after the other, each at a multiple of 64 bytes: the codes of its format, then the
//! scales and second numbers of its blocks, then the units that these are counted in, then the order of its columns. Which planes there are and where everything lies in
//! them says [`Planes`], from shape, format and layout alone.

use crate::format::Format;
use crate::shape::{LANES, pad, padded_elems};

/// How a weight lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Layout {
    /// A vector or small table, widened to f32: row-major, the innermost dimension padded to 16. The taps of a convolution
    /// (`[heads, width, taps]` without input dimensions) come first: `[taps, heads, width]`; see [`flat_dims`].
    Flat,
    /// A matrix `[rows, columns]` as tiles of 16 rows; a tile holds all columns.
    ///
    /// - codes: lines of 64 bytes, a 32-bit word for each of the 16 rows; a word holds neighbouring columns of its row: one
    ///   f32, two halves, four bytes (what VDPBF16PS, VNNI and AMX read), eight nibbles; where codes do not fill a word, several lines hold a
    ///   group of columns (see [`pieces`])
    /// - scales of blocks of one row: for each tile as the codes of a matrix of the scales' type, whose columns are the blocks'
    ///   scales, each followed by its zero point where there is one; an odd last column is padded
    /// - scales of blocks of several rows: for each tile the scale of each of its blocks
    /// - units of scales: for each tile as the scales of blocks as wide as the units
    /// - order: for each index of the outer output dimensions the column of x, i32, that each stored column is multiplied with
    Tile16,
    /// A matrix as tiles of 16 rows whose codes lie as the threads of a warp hold them for `mma.m16n8k16`, in turns of 64 columns: thread `4·(row % 8) + q` holds
    /// columns `8q .. 8q + 8` of each half turn, of rows `row % 8` and `row % 8 + 8`, four columns a step of the product. Each thread's 16 bytes
    /// are neighbours, so a warp reads 512 bytes at once. Scales lie as in [`Layout::Tile16`]. A last turn is filled up with zeros.
    Mma16,
}

impl Layout {
    /// Every layout.
    pub const ALL: [Self; 3] = [Self::Flat, Self::Tile16, Self::Mma16];

    /// The name in IR text.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Flat => "flat",
            Self::Tile16 => "tile16",
            Self::Mma16 => "mma16",
        }
    }

    /// The layout called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|l| l.name() == name)
    }
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Dimensions of a weight as [`Layout::Flat`] stores it, the innermost padded.
pub fn flat_dims(shape: &[u64], in_rank: usize) -> Vec<u64> {
    match *shape {
        [heads, width, taps] if in_rank == 0 => vec![taps, heads, pad(width)],
        [ref outer @ .., last] => outer.iter().copied().chain([pad(last)]).collect(),
        [] => vec![pad(1)],
    }
}

/// Planes begin at multiples of this many bytes.
const PLANE_ALIGN_BYTES: u64 = 64;
/// Columns of a turn of [`Layout::Mma16`].
pub const TURN_COLUMNS: u64 = 64;
/// Bytes of a line of [`Layout::Tile16`]: a word for each row of the tile.
pub const LINE_BYTES: u64 = 4 * LANES;

/// A matrix as packed: its size as stored, and where its codes, scales, zero points and column order lie.
///
/// Rows and columns are counted as stored: the innermost output dimension and the innermost input dimension are padded to
/// multiples of 16 ([`padded_index`] leads there). All offsets are bytes from the beginning of the weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planes {
    /// How numbers are stored.
    pub format: Format,
    /// Where they lie.
    pub layout: Layout,
    /// Rows.
    pub rows: u64,
    /// Rows of one index of the outer output dimensions: of an expert, of a head.
    pub inner_rows: u64,
    /// Columns.
    pub columns: u64,
}

/// Where bits of a code lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The byte that they begin in.
    pub byte: u64,
    /// The bit of that byte.
    pub bit: u64,
    /// The first of these bits in the code, and how many they are.
    pub of_code: (u64, u64),
}

/// Bits of a code in one of the words of its group of columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The word.
    pub word: u64,
    /// How far they are shifted in it.
    pub shift: u64,
    /// The first of these bits in the code, and how many they are.
    pub of_code: (u64, u64),
}

impl Piece {
    /// The bits of `code` at their place in the word.
    pub const fn of(self, code: u32) -> u32 {
        let (first, bits) = self.of_code;
        let mask = if bits < 32 { (1 << bits) - 1 } else { u32::MAX };
        (code >> first & mask) << self.shift
    }
}

impl Planes {
    /// The matrix whose rows run over `out_dims` and columns over `in_dims`.
    pub fn new(layout: Layout, format: Format, out_dims: &[u64], in_dims: &[u64]) -> Self {
        let inner_rows = pad(out_dims.last().copied().unwrap_or(1));
        Self {
            format,
            layout,
            rows: padded_elems(out_dims).max(inner_rows),
            inner_rows,
            columns: padded_elems(in_dims),
        }
    }

    /// Tiles of 16 rows.
    pub const fn tiles(&self) -> u64 {
        self.rows / LANES
    }

    /// Bytes of a tile's codes.
    pub fn tile_bytes(&self) -> u64 {
        match self.layout {
            Layout::Mma16 => self.turns() * self.turn_bytes(),
            _ => self.columns / self.format.group_columns() * self.format.def().words * LINE_BYTES,
        }
    }

    /// Turns of [`Layout::Mma16`] that the columns of a tile take.
    pub const fn turns(&self) -> u64 {
        self.columns.div_ceil(TURN_COLUMNS)
    }

    /// Bytes of a tile's codes in one turn.
    pub fn turn_bytes(&self) -> u64 {
        TURN_COLUMNS * LANES * self.format.def().bits / 8
    }

    /// Where the code of an element of [`Layout::Mma16`] lies in its tile.
    fn mma_code(&self, row: u64, column: u64) -> (u64, u64) {
        let (turn, half_turn, q) = (column / TURN_COLUMNS, column % TURN_COLUMNS / 32, column % 32 / 8);
        let (step, at, half) = (column % 8 / 4, column % 4, row % LANES / 8);
        let bits = self.format.def().bits;
        // the 16 bytes of a thread, and the bit of the code in them
        let (load, bit) = match bits {
            16 => (half_turn * 2 + step, half * 64 + at * 16),
            8 => (half_turn, half * 64 + step * 32 + at * 8),
            _ => (0, half * 64 + half_turn * 32 + word_shift_of_pairs(column % 8)),
        };
        let thread = row % 8 * 4 + q;
        let bit = (turn * self.turn_bytes() + load * 512 + thread * 16) * 8 + bit;
        (bit / 8, bit % 8)
    }

    /// Bytes of the codes.
    pub fn code_bytes(&self) -> u64 {
        self.tiles() * self.tile_bytes()
    }

    /// Blocks of columns of a row; 0 where nothing is scaled.
    pub fn column_blocks(&self) -> u64 {
        self.format.blocks().map_or(0, |b| self.columns.div_ceil(u64::from(b.columns)))
    }

    /// Bytes of the scales and zero points of a tile.
    pub fn tile_scale_bytes(&self) -> u64 {
        let Some(blocks) = self.format.blocks() else { return 0 };
        let numbers = self.column_blocks() * blocks.parts();
        match blocks.rows {
            1 => numbers.div_ceil(4 / blocks.scale_bytes()) * LINE_BYTES,
            _ => numbers * blocks.scale.bytes(),
        }
    }

    /// Units of a row; 0 where scales are not counted in units.
    pub fn row_units(&self) -> u64 {
        let unit = self.format.blocks().map_or(0, |b| u64::from(b.unit));
        if unit == 0 { 0 } else { self.columns.div_ceil(unit) }
    }

    /// Bytes of the units of a tile.
    pub fn tile_unit_bytes(&self) -> u64 {
        let Some(blocks) = self.format.blocks() else { return 0 };
        (self.row_units() * blocks.parts()).div_ceil(4 / blocks.scale.bytes()) * LINE_BYTES
    }

    /// Where the units begin.
    pub fn units_at(&self) -> u64 {
        (self.scales_at() + self.tiles() * self.tile_scale_bytes()).next_multiple_of(PLANE_ALIGN_BYTES)
    }

    /// Where the scales begin.
    pub fn scales_at(&self) -> u64 {
        self.code_bytes().next_multiple_of(PLANE_ALIGN_BYTES)
    }

    /// Where the columns' order begins.
    pub fn order_at(&self) -> u64 {
        (self.units_at() + self.tiles() * self.tile_unit_bytes()).next_multiple_of(PLANE_ALIGN_BYTES)
    }

    /// Bytes of everything.
    pub fn bytes(&self) -> u64 {
        match self.format.blocks() {
            None => self.code_bytes(),
            Some(blocks) if blocks.ordered => self.order(self.rows, 0),
            Some(blocks) if blocks.unit > 0 => self.units_at() + self.tiles() * self.tile_unit_bytes(),
            Some(_) => self.scales_at() + self.tiles() * self.tile_scale_bytes(),
        }
    }

    /// Where the code of an element lies, in one place or in several.
    pub fn code(&self, row: u64, column: u64) -> Vec<Place> {
        let tile = row / LANES * self.tile_bytes();
        if self.layout == Layout::Mma16 {
            let (byte, bit) = self.mma_code(row, column);
            return vec![Place { byte: tile + byte, bit, of_code: (0, self.format.def().bits) }];
        }
        let columns = self.format.group_columns();
        let line = tile + column / columns * self.format.def().words * LINE_BYTES + row % LANES * 4;
        let place =
            |p: Piece| Place { byte: line + p.word * LINE_BYTES + p.shift / 8, bit: p.shift % 8, of_code: p.of_code };
        pieces(self.format, column % columns).map(place).collect()
    }

    /// Where the scale of an element's block lies; `None` if nothing is scaled.
    pub fn scale(&self, row: u64, column: u64) -> Option<u64> {
        self.part(row, column, 0)
    }

    /// Where the second number of an element's block lies, if it has one.
    pub fn zero(&self, row: u64, column: u64) -> Option<u64> {
        self.format.blocks().filter(|b| b.zero).and_then(|_| self.part(row, column, 1))
    }

    fn part(&self, row: u64, column: u64, part: u64) -> Option<u64> {
        let blocks = self.format.blocks()?;
        let number = column / u64::from(blocks.columns) * blocks.parts() + part;
        let within = match blocks.rows {
            1 => in_lines(row, number, blocks.scale_bytes()),
            _ => number * blocks.scale.bytes(),
        };
        Some(self.scales_at() + row / LANES * self.tile_scale_bytes() + within)
    }

    /// Where the unit lies in which the scale (`part` 0) or the second number (1) of an element's block is counted, if it is.
    pub fn unit(&self, row: u64, column: u64, part: u64) -> Option<u64> {
        let blocks = self.format.blocks().filter(|b| b.unit > 0 && part < b.parts())?;
        let number = column / u64::from(blocks.unit) * blocks.parts() + part;
        let tile = self.units_at() + row / LANES * self.tile_unit_bytes();
        Some(tile + in_lines(row, number, blocks.scale.bytes()))
    }

    /// Where the number of the column of x lies that a stored column is multiplied with, for formats with an order.
    pub fn order(&self, row: u64, column: u64) -> u64 {
        self.order_at() + (row / self.inner_rows * self.columns + column) * 4
    }
}

/// Where number `number` of a row lies in its tile, whose lines hold a word of such numbers for each row.
const fn in_lines(row: u64, number: u64, bytes: u64) -> u64 {
    let per_word = 4 / bytes;
    number / per_word * LINE_BYTES + row % LANES * 4 + number % per_word * bytes
}

/// Where the bits of column `column` of a group lie in its words.
///
/// Columns follow one another from the lowest bits on, but for nibbles: byte `b` holds column `b` in its lower half and column
/// `4 + b` in its upper, so that both halves of a line, as bytes, are lines of the eight-bit formats. Of sixteen codes of six bits five
/// lie in each of three words, and two bits of the last in what each of them leaves.
pub fn pieces(format: Format, column: u64) -> impl Iterator<Item = Piece> {
    let whole = |word, shift, bits| vec![Piece { word, shift, of_code: (0, bits) }];
    let pieces = match (format.def().bits, column) {
        (4, _) => whole(0, 8 * (column % 4) + 4 * (column / 4), 4),
        (6, 15) => (0..3).map(|word| Piece { word, shift: 30, of_code: (2 * word, 2) }).collect(),
        (6, _) => whole(column / 5, column % 5 * 6, 6),
        (bits, _) => whole(0, bits * column, bits),
    };
    pieces.into_iter()
}

/// How far nibble `column` of eight is shifted in a word of [`Layout::Mma16`]: the columns of a pair lie 16 bits apart, as both halves of a product's
/// operand do.
const fn word_shift_of_pairs(column: u64) -> u64 {
    4 * (column / 2) + 16 * (column % 2)
}

/// Position in padded storage of logical index `i` over `dims` (row-major): the innermost dimension takes `pad(last)`.
pub fn padded_index(dims: &[u64], i: u64) -> u64 {
    let Some(&last) = dims.last() else { return 0 };
    (i / last) * pad(last) + i % last
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Every code, scale, zero point and order lies in its plane, and none on another.
    fn check(layout: Layout, format: &str, out_dims: &[u64], in_dims: &[u64]) {
        let format = Format::from_name(format).expect(format);
        let planes = Planes::new(layout, format, out_dims, in_dims);
        let (bits, blocks) = (format.def().bits, format.blocks());
        let mut used = HashSet::new();
        let mut take = |byte: u64, bit: u64, bits: u64| {
            (0..bits).for_each(|i| assert!(used.insert(byte * 8 + bit + i), "{format}: byte {byte} is taken twice"));
            assert!(byte * 8 + bit + bits <= planes.bytes() * 8, "{format}: byte {byte} is outside");
        };
        let (mut scales, mut units, mut orders) = (HashSet::new(), HashSet::new(), HashSet::new());
        for (row, column) in (0..planes.rows).flat_map(|r| (0..planes.columns).map(move |c| (r, c))) {
            let mut of_code = 0;
            for place in planes.code(row, column) {
                assert!(place.byte < planes.code_bytes() && place.of_code.0 == of_code);
                take(place.byte, place.bit, place.of_code.1);
                of_code += place.of_code.1;
            }
            assert_eq!(of_code, bits);
            scales.extend(planes.scale(row, column));
            scales.extend(planes.zero(row, column));
            units.extend([0, 1].into_iter().filter_map(|part| planes.unit(row, column, part)));
            if blocks.is_some_and(|b| b.ordered) {
                orders.insert(planes.order(row, column));
            }
        }
        let [scale_bits, unit_bits] = blocks.map_or([0; 2], |b| [b.scale_bytes() * 8, b.scale.bytes() * 8]);
        scales.iter().for_each(|&at| take(at, 0, scale_bits));
        units.iter().for_each(|&at| take(at, 0, unit_bits));
        orders.iter().for_each(|&at| take(at, 0, 32));
        assert!(scales.iter().all(|&at| at >= planes.code_bytes()));
        let Some(b) = blocks else { return };
        let row_blocks = if b.rows == 1 { planes.rows } else { planes.tiles() };
        assert_eq!(scales.len() as u64, row_blocks * planes.column_blocks() * b.parts(), "{format}");
        assert_eq!(units.len() as u64, planes.rows * planes.row_units() * b.parts(), "{format}");
        assert_eq!([planes.scales_at() % 64, planes.units_at() % 64], [0; 2]);
    }

    #[test]
    fn nothing_lies_on_anything_else() {
        for format in [
            "bf16",
            "f32",
            "fp8",
            "q8",
            "q4",
            "q4<g128,bf16,zero>",
            "q4<g16,f32,zero,ordered>",
            "fp8<16x32>",
            "q8<g48>",
            "q8<g16,k256>",
            "u4<g32,k64>",
            "u4<g32>",
            "q6<g16,k256>",
        ] {
            check(Layout::Tile16, format, &[3, 20], &[2, 40]);
            check(Layout::Tile16, format, &[32], &[256]);
        }
        for format in ["bf16", "f16", "fp8", "q8", "q4", "q4<g128,bf16,zero>", "fp8<16x32>"] {
            check(Layout::Mma16, format, &[3, 20], &[2, 40]);
            check(Layout::Mma16, format, &[32], &[256]);
        }
    }

    #[test]
    fn sizes_are_what_they_should_be() {
        let planes = |format| Planes::new(Layout::Tile16, Format::from_name(format).expect(format), &[512], &[2048]);
        assert_eq!(planes("bf16").bytes(), 512 * 2048 * 2);
        assert_eq!(planes("q8").bytes(), 512 * 2048 * 34 / 32);
        assert_eq!(planes("q4").bytes(), 512 * 2048 * 18 / 32);
        assert_eq!(planes("fp8").bytes(), 512 * 2048 + 32 * 16 * 4);
        assert_eq!(planes("u4").bytes(), 512 * 2048 / 256 * 148);
        assert_eq!(planes("q6").bytes(), 512 * 2048 / 256 * 210);
        assert_eq!(planes("q8<g16,k256>").bytes(), 512 * 2048 / 256 * 274);
        assert_eq!(planes("q4<g128,zero,ordered>").bytes(), 512 * 2048 / 2 + 512 * 16 * 4 + 2048 * 4);
    }
}
