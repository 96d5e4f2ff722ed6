//! Codes, scales and column orders of matrices as their layouts want them: see [`Planes`]. Tiles are made as [`Layout::Tile16`] has them; other
//! layouts of tiles are permutations of that ([`Arrangement`]).

use std::ops::Range;

use nextc_ir::format::codes::Codes;
use nextc_ir::layout::{Piece, Planes, TURN_COLUMNS, pieces};
use nextc_ir::shape::{LANES, pad};
use nextc_ir::{DType, Format, Layout};

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

/// How the codes of a tile of [`Layout::Tile16`] lie in a turn of [`Layout::Mma16`]: 64 columns have the same bytes in both.
pub(crate) struct Arrangement {
    /// For each code of a turn, in the order of its bits, which one of the turn's codes in `Tile16` it is.
    from: Vec<u16>,
    bits: usize,
    turn_bytes: usize,
    /// The byte that holds codes of zero.
    zero: u8,
}

impl Arrangement {
    /// That of a matrix, if its layout is another than `Tile16`.
    pub fn of(planes: &Planes) -> Option<Self> {
        if planes.layout != Layout::Mma16 {
            return None;
        }
        let bits = planes.format.def().bits;
        let turn = |layout| Planes { layout, rows: LANES, inner_rows: LANES, columns: TURN_COLUMNS, ..*planes };
        let (tile16, mma16) = (turn(Layout::Tile16), turn(Layout::Mma16));
        let mut from = vec![0; (LANES * TURN_COLUMNS) as usize];
        for (row, column) in (0..LANES).flat_map(|r| (0..TURN_COLUMNS).map(move |c| (r, c))) {
            let [source, place] =
                [&tile16, &mma16].map(|p| p.code(row, column)[0]).map(|p| (p.byte * 8 + p.bit) / bits);
            from[place as usize] = source as u16;
        }
        let code = (planes.format.def().encode)(0.0);
        let zero = if bits == 4 { code | code << 4 } else { code } as u8;
        Some(Self { from, bits: bits as usize, turn_bytes: mma16.turn_bytes() as usize, zero })
    }

    /// Rearranges the tile that `bytes` holds from `begin` on, and fills up its last turn.
    pub fn apply(&self, bytes: &mut Vec<u8>, begin: usize) {
        let length = (bytes.len() - begin).next_multiple_of(self.turn_bytes);
        bytes.resize(begin + length, self.zero);
        let mut source = vec![0; self.turn_bytes];
        for turn in bytes[begin..].chunks_exact_mut(self.turn_bytes) {
            source.copy_from_slice(turn);
            match self.bits {
                16 => {
                    for (to, &from) in turn.chunks_exact_mut(2).zip(&self.from) {
                        to.copy_from_slice(&source[2 * usize::from(from)..][..2]);
                    }
                }
                8 => turn.iter_mut().zip(&self.from).for_each(|(to, &from)| *to = source[usize::from(from)]),
                _ => {
                    let nibble = |i: u16| source[usize::from(i / 2)] >> (4 * (i % 2)) & 15;
                    for (to, from) in turn.iter_mut().zip(self.from.chunks_exact(2)) {
                        *to = nibble(from[0]) | nibble(from[1]) << 4;
                    }
                }
            }
        }
    }
}

/// Appends the codes of one tile: `rows` are its rows among those of `codes`; the rest of 16 is zero.
pub(crate) fn push_codes(planes: &Planes, codes: &Codes, rows: Range<usize>, order: Option<&[u32]>, out: &mut Vec<u8>) {
    let columns = planes.format.group_columns() as usize;
    let places: Vec<(usize, Piece)> =
        (0..columns).flat_map(|c| pieces(planes.format, c as u64).map(move |piece| (c, piece))).collect();
    let zero = (planes.format.def().encode)(0.0);
    for first in (0..planes.columns as usize).step_by(columns) {
        for word in 0..planes.format.def().words {
            let own = || places.iter().filter(|(_, piece)| piece.word == word);
            let padding = own().fold(0, |bits, (_, piece)| bits | piece.of(zero));
            let begin = out.len();
            out.extend((0..LANES).flat_map(|_| padding.to_le_bytes()));
            for (lane, row) in rows.clone().enumerate() {
                let row = &codes.codes[row * codes.columns..(row + 1) * codes.columns];
                let code = |c: usize| row[order.map_or(first + c, |o| o[first + c] as usize)];
                let bits = own().fold(0, |bits, (c, piece)| bits | piece.of(code(*c).into()));
                out[begin + 4 * lane..begin + 4 * lane + 4].copy_from_slice(&bits.to_le_bytes());
            }
        }
    }
}

/// Appends the units of one tile, where scales are counted in units.
pub(crate) fn push_units(planes: &Planes, codes: &Codes, rows: Range<usize>, out: &mut Vec<u8>) -> Result<(), String> {
    let blocks = planes.format.blocks().ok_or("a plain format has no units")?;
    let (wide, begin) = (planes.row_units() as usize, out.len());
    if codes.units.len() != codes.rows() * wide {
        return Err(format!("{} units do not fit", codes.units.len()));
    }
    out.resize(begin + planes.tile_unit_bytes() as usize, 0);
    for (lane, row) in (0u64..).zip(rows) {
        for (column, units) in (0u64..).step_by(blocks.unit.max(1) as usize).zip(&codes.units[row * wide..][..wide]) {
            for (part, &unit) in (0u64..).zip(units) {
                let Some(at) = planes.unit(lane, column, part) else { continue };
                put(blocks.scale, unit, &mut out[begin + (at - planes.units_at()) as usize..]);
            }
        }
    }
    Ok(())
}

/// Appends the scales and second numbers of one tile.
pub(crate) fn push_scales(planes: &Planes, codes: &Codes, rows: Range<usize>, out: &mut Vec<u8>) -> Result<(), String> {
    let blocks = planes.format.blocks().ok_or("a plain format has no scales")?;
    let per_row = planes.column_blocks() as usize;
    if blocks.zero == codes.zeros.is_empty() || codes.row_blocks() != per_row {
        return Err(format!("{} scales and {} second numbers do not fit", codes.scales.len(), codes.zeros.len()));
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
                    _ if blocks.unit > 0 => tile[at] = (number as i8).cast_unsigned(),
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
