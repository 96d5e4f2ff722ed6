//! Layouts: where each element of a weight lies in the packed file. A layout is data; the packer and the kernels read it.
//!
//! A matrix is packed as **planes**, one after the other, each at a multiple of 64 bytes: the codes of its format, then the
//! scales and zero points of its blocks, then the order of its columns. Which planes there are and where everything lies in
//! them says [`Planes`], from shape, format and layout alone.

use crate::format::{Blocks, Format};
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
    ///   f32, two halves, four bytes (what VDPBF16PS, VNNI and AMX read), eight nibbles (see [`word_shift`])
    /// - scales of blocks of one row: for each tile as the codes of a matrix of the scales' type, whose columns are the blocks'
    ///   scales, each followed by its zero point where there is one; an odd last column is padded
    /// - scales of blocks of several rows: for each tile the scale of each of its blocks
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

/// Where a code lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The byte that it begins in.
    pub byte: u64,
    /// The bit of that byte: 0, or 4 for the upper nibble.
    pub bit: u64,
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
            _ => self.columns / self.format.word_columns() * LINE_BYTES,
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
    fn mma_code(&self, row: u64, column: u64) -> Place {
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
        Place { byte: bit / 8, bit: bit % 8 }
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
            1 => numbers.div_ceil(scale_word_columns(blocks)) * LINE_BYTES,
            _ => numbers * blocks.scale.bytes(),
        }
    }

    /// Where the scales begin.
    pub fn scales_at(&self) -> u64 {
        self.code_bytes().next_multiple_of(PLANE_ALIGN_BYTES)
    }

    /// Where the columns' order begins.
    pub fn order_at(&self) -> u64 {
        (self.scales_at() + self.tiles() * self.tile_scale_bytes()).next_multiple_of(PLANE_ALIGN_BYTES)
    }

    /// Bytes of everything.
    pub fn bytes(&self) -> u64 {
        match self.format.blocks() {
            None => self.code_bytes(),
            Some(blocks) if blocks.ordered => self.order(self.rows, 0),
            Some(_) => self.scales_at() + self.tiles() * self.tile_scale_bytes(),
        }
    }

    /// Where the code of an element lies.
    pub fn code(&self, row: u64, column: u64) -> Place {
        if self.layout == Layout::Mma16 {
            let place = self.mma_code(row, column);
            return Place { byte: row / LANES * self.tile_bytes() + place.byte, ..place };
        }
        let per_word = self.format.word_columns();
        let word = row / LANES * self.tile_bytes() + column / per_word * LINE_BYTES + row % LANES * 4;
        let shift = word_shift(self.format, column % per_word);
        Place { byte: word + shift / 8, bit: shift % 8 }
    }

    /// Where the scale of an element's block lies; `None` if nothing is scaled.
    pub fn scale(&self, row: u64, column: u64) -> Option<u64> {
        self.part(row, column, 0)
    }

    /// Where the zero point of an element's block lies, if it has one.
    pub fn zero(&self, row: u64, column: u64) -> Option<u64> {
        self.format.blocks().filter(|b| b.zero).and_then(|_| self.part(row, column, 1))
    }

    fn part(&self, row: u64, column: u64, part: u64) -> Option<u64> {
        let blocks = self.format.blocks()?;
        let number = column / u64::from(blocks.columns) * blocks.parts() + part;
        let within = match blocks.rows {
            1 => {
                let per_word = scale_word_columns(blocks);
                number / per_word * LINE_BYTES + row % LANES * 4 + number % per_word * blocks.scale.bytes()
            }
            _ => number * blocks.scale.bytes(),
        };
        Some(self.scales_at() + row / LANES * self.tile_scale_bytes() + within)
    }

    /// Where the number of the column of x lies that a stored column is multiplied with, for formats with an order.
    pub fn order(&self, row: u64, column: u64) -> u64 {
        self.order_at() + (row / self.inner_rows * self.columns + column) * 4
    }
}

/// Scales and zero points in a 32-bit word.
fn scale_word_columns(blocks: Blocks) -> u64 {
    4 / blocks.scale.bytes()
}

/// How far column `column` of those that share a word is shifted in it.
///
/// Columns follow one another from the lowest bits on, but for nibbles: byte `b` holds column `b` in its lower half and column
/// `4 + b` in its upper, so that both halves of a line, as bytes, are lines of the eight-bit formats.
pub fn word_shift(format: Format, column: u64) -> u64 {
    match format.def().bits {
        4 => 8 * (column % 4) + 4 * (column / 4),
        bits => bits * column,
    }
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
        let (mut scales, mut orders) = (HashSet::new(), HashSet::new());
        for (row, column) in (0..planes.rows).flat_map(|r| (0..planes.columns).map(move |c| (r, c))) {
            let place = planes.code(row, column);
            assert!(place.byte < planes.code_bytes());
            take(place.byte, place.bit, bits);
            scales.extend(planes.scale(row, column));
            scales.extend(planes.zero(row, column));
            if blocks.is_some_and(|b| b.ordered) {
                orders.insert(planes.order(row, column));
            }
        }
        let scale_bits = blocks.map_or(0, |b| b.scale.bytes() * 8);
        scales.iter().for_each(|&at| take(at, 0, scale_bits));
        orders.iter().for_each(|&at| take(at, 0, 32));
        assert!(scales.iter().all(|&at| at >= planes.code_bytes()));
        let Some(b) = blocks else { return };
        let row_blocks = if b.rows == 1 { planes.rows } else { planes.tiles() };
        assert_eq!(scales.len() as u64, row_blocks * planes.column_blocks() * b.parts(), "{format}");
        assert_eq!(planes.scales_at() % 64, 0);
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
        assert_eq!(planes("q4<g128,zero,ordered>").bytes(), 512 * 2048 / 2 + 512 * 16 * 4 + 2048 * 4);
    }
}
