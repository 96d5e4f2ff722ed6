//! Layouts: where each element of a weight lies in the packed file. A layout is data; the packer and the kernels read it.

use crate::dtype::DType;
use crate::format::Format;
use crate::shape::{LANES, pad, padded_elems};

/// How a weight lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Layout {
    /// A vector or small table, widened to f32: row-major, the innermost dimension padded to 16. The taps of a convolution
    /// (`[heads, width, taps]` without input dimensions) come first: `[taps, heads, width]`; see [`flat_dims`].
    Flat,
    /// A matrix `[rows, columns]` as tiles of 16 rows; a tile holds all columns, two by two: `[columns / 2][16 rows][2]`
    /// for two-byte formats (what VNNI, VDPBF16PS and AMX read), `[columns][16 rows]` for f32.
    Tile16,
}

/// A matrix as packed by [`Layout::Tile16`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileShape {
    /// Row tiles of 16.
    pub tiles: u64,
    /// Columns as stored (each innermost input dimension padded to 16).
    pub columns: u64,
    /// Bytes of one tile.
    pub tile_bytes: u64,
}

impl Layout {
    /// The name in IR text.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Flat => "flat",
            Self::Tile16 => "tile16",
        }
    }

    /// The layout called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Flat, Self::Tile16].into_iter().find(|l| l.name() == name)
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

/// The tiles of a matrix whose rows run over `out_dims` and columns over `in_dims`; innermost dimensions padded to 16.
pub fn tile_shape(out_dims: &[u64], in_dims: &[u64], format: Format) -> TileShape {
    let columns = padded_elems(in_dims);
    TileShape { tiles: padded_elems(out_dims) / LANES, columns, tile_bytes: format.bytes(columns * LANES) }
}

/// Byte offset of element (`lane`, `column`) inside its tile.
pub fn tile_offset_bytes(format: Format, lane: u64, column: u64) -> u64 {
    let dtype = format.def().dtype;
    match dtype {
        DType::F32 => (column * LANES + lane) * 4,
        _ => ((column / 2) * LANES * 2 + lane * 2 + column % 2) * dtype.bytes(),
    }
}

/// Position in padded storage of logical index `i` over `dims` (row-major): the innermost dimension takes `pad(last)`.
pub fn padded_index(dims: &[u64], i: u64) -> u64 {
    let Some(&last) = dims.last() else { return 0 };
    (i / last) * pad(last) + i % last
}
