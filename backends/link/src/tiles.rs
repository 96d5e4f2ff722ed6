//! Codes, scales and column orders of scaled matrices as [`nextc_ir::Layout::Tile16`] lays them out: see [`Planes`].

use std::ops::Range;

use nextc_ir::format::codes::Codes;
use nextc_ir::layout::{Planes, word_shift};
use nextc_ir::shape::{LANES, pad};
use nextc_ir::{DType, Format};

/// Which rows of a matrix a tile holds: the innermost output dimension is padded to whole tiles.
pub(crate) struct TileRows {
    inner: u64,
    tiles_per_inner: u64,
}

impl TileRows {
    /// Of a matrix whose rows run over `out_dims`.
    pub fn new(out_dims: &[u64]) -> Self {
        let inner = out_dims.last().copied().unwrap_or(1);
        Self { inner, tiles_per_inner: pad(inner) / LANES }
    }

    /// The rows of tile `tile`.
    pub fn of(&self, tile: u64) -> Range<u64> {
        let (outer, inner) = (tile / self.tiles_per_inner, tile % self.tiles_per_inner * LANES);
        let begin = outer * self.inner;
        begin + inner..begin + (inner + LANES).min(self.inner)
    }

    /// `tiles` in parts that are read together: all, or where columns have orders one index of the outer dimensions at a time.
    pub fn parts(&self, tiles: Range<u64>, format: Format) -> Vec<Range<u64>> {
        if !format.blocks().is_some_and(|b| b.ordered) {
            return vec![tiles];
        }
        let mut parts = Vec::new();
        let mut begin = tiles.start;
        while begin < tiles.end {
            let end = tiles.end.min((begin / self.tiles_per_inner + 1) * self.tiles_per_inner);
            parts.push(begin..end);
            begin = end;
        }
        parts
    }
}

/// The columns in the order in which a format with an order stores them: block by block. `None` where columns stay in place.
pub(crate) fn column_order(planes: &Planes, codes: &Codes) -> Result<Option<Vec<u32>>, String> {
    let Some(blocks) = planes.format.blocks() else { return Ok(None) };
    let in_place = |(column, &block): (usize, &u32)| block as usize == column / blocks.columns as usize;
    if !blocks.ordered {
        return match codes.blocks.iter().enumerate().all(in_place) {
            true => Ok(None),
            false => Err("its columns are not in the order of their groups, although the configuration says so".into()),
        };
    }
    let mut order: Vec<u32> = (0..planes.columns as u32).collect();
    order.sort_by_key(|&c| codes.blocks.get(c as usize).copied().unwrap_or(c / blocks.columns));
    let block = |c: &u32| codes.blocks.get(*c as usize).map_or(c / blocks.columns, |&b| b);
    let whole = order.iter().enumerate().all(|(at, c)| block(c) as usize == at / blocks.columns as usize);
    if whole { Ok(Some(order)) } else { Err(format!("its groups do not have {} columns each", blocks.columns)) }
}

/// Appends the codes of one tile: `rows` are its rows among those of `codes`; the rest of 16 is zero.
pub(crate) fn push_codes(planes: &Planes, codes: &Codes, rows: Range<usize>, order: Option<&[u32]>, out: &mut Vec<u8>) {
    let per_word = planes.format.word_columns() as usize;
    let zero = (planes.format.def().encode)(0.0);
    let padding = (0..per_word as u64).fold(0, |word, c| word | zero << word_shift(planes.format, c));
    for first in (0..planes.columns as usize).step_by(per_word) {
        let begin = out.len();
        out.extend((0..LANES).flat_map(|_| padding.to_le_bytes()));
        for (lane, row) in rows.clone().enumerate() {
            let row = &codes.codes[row * codes.columns..(row + 1) * codes.columns];
            let code = |c: usize| row[order.map_or(first + c, |o| o[first + c] as usize)];
            let word =
                (0..per_word).fold(0, |word, c| word | u32::from(code(c)) << word_shift(planes.format, c as u64));
            out[begin + 4 * lane..begin + 4 * lane + 4].copy_from_slice(&word.to_le_bytes());
        }
    }
}

/// Appends the scales and zero points of one tile.
pub(crate) fn push_scales(planes: &Planes, codes: &Codes, rows: Range<usize>, out: &mut Vec<u8>) -> Result<(), String> {
    let blocks = planes.format.blocks().ok_or("a plain format has no scales")?;
    let per_row = planes.column_blocks() as usize;
    if blocks.zero == codes.zeros.is_empty() || codes.row_blocks() != per_row {
        return Err(format!("{} scales and {} zero points do not fit", codes.scales.len(), codes.zeros.len()));
    }
    let begin = out.len();
    out.resize(begin + planes.tile_scale_bytes() as usize, 0);
    let tile = &mut out[begin..];
    for (numbers, is_zero) in [(&codes.scales, false), (&codes.zeros, true)].into_iter().take(blocks.parts() as usize) {
        // offsets of the first tile are those in every tile
        let place = |lane: usize, block: usize| {
            let (row, column) = (lane as u64, block as u64 * u64::from(blocks.columns));
            if is_zero { planes.zero(row, column) } else { planes.scale(row, column) }
        };
        for (lane, row) in rows.clone().enumerate() {
            for block in 0..per_row {
                let number = numbers[row * per_row + block];
                let at = place(lane, block).map_or(0, |at| at - planes.scales_at()) as usize;
                match blocks.rows {
                    1 => put(blocks.scale, number, &mut tile[at..]),
                    _ if lane == 0 => put(blocks.scale, number, &mut tile[at..]),
                    _ if number == numbers[rows.start * per_row + block] => {}
                    _ => return Err("rows of one tile have different scales".into()),
                }
            }
        }
    }
    Ok(())
}

fn put(dtype: DType, x: f32, out: &mut [u8]) {
    let plain = Format::plain(dtype).expect("scales are floats");
    let bytes = (plain.def().encode)(x).to_le_bytes();
    let count = dtype.bytes() as usize;
    out[..count].copy_from_slice(&bytes[..count]);
}
