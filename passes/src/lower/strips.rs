//! `strips`: weights for products in tiles, 16 rows a strip of bf16 tiles of 32 columns.
//!
//! group    strips that are multiplied together with each block of tokens
//! direct   bf16 weights are tiles as packed
//! unpacked quantised weights become tiles in scratch, once a block of tokens, before they are multiplied
//! part     512 columns of two strips stay in the first cache while all rows of a panel are multiplied with them; their sums wait in memory for the next
//! ahead    with each step of products some lines of the group that follows are asked for, so that it is in the second cache in time
//! traffic  each weight once a task from memory, and once a block of tokens through the vector units where it is unpacked

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::layout::LINE_BYTES;
use nextc_ir::shape::LANES;
use nextc_ir::{DType, Format};

use super::bulk::tiles::takes;
use super::matmul::for_tiles;
use super::packed::{Block, Lanes, Matrix, Tile};

/// Columns of a tile.
pub const TILE_COLUMNS: u64 = 32;
/// Bytes of a tile.
pub const TILE_BYTES: u64 = 1024;
/// Words of a line.
const LINE_WORDS: u64 = LINE_BYTES / 4;
/// Most strips of a group: their sums are neighbours in memory.
pub const STRIPS: u64 = 4;
/// Most tiles of a strip that are multiplied with all rows of a panel before the others: two strips of them stay in the first cache, 32 KiB of 48.
const PART_TILES: u64 = 16;

/// Tiles of weights that are multiplied together, and those that follow.
pub struct Group {
    /// Those that are multiplied.
    pub tiles: Vec<Tile>,
    next: Vec<Tile>,
}

/// The strips of a panel's products, some columns at a time.
#[derive(Clone, Copy, Debug)]
pub struct Strips {
    columns: u64,
    /// Most tiles of a strip at a time.
    part: u64,
    /// This many of some strips, where weights are unpacked.
    scratch: Option<Val>,
}

/// True if the packed codes of a matrix are bf16 tiles.
pub fn is_direct(matrix: &Matrix) -> bool {
    matrix.planes.format == Format::Bf16 && matrix.planes.columns.is_multiple_of(TILE_COLUMNS)
}

/// Runs `body(tiles, group)` for groups of `at_once` of the tiles `lo..hi`, out of `tiles`, for which `tiles_at` gives weights; tile `after` and its neighbours
/// follow the last.
pub fn for_groups(
    k: &mut KernelBuilder,
    (lo, hi, after): (Val, Val, Val),
    (tiles, at_once): (u64, u64),
    tiles_at: impl Fn(&mut KernelBuilder, &[Val]) -> Vec<Tile>,
    mut body: impl FnMut(&mut KernelBuilder, &[Val], &Group),
) {
    for_tiles(k, (lo, hi), (tiles, at_once), |k, numbers| {
        let n = numbers.len() as u64;
        let follows = k.add_const(numbers[0], n);
        let is_last = k.cmp(Pred::Ge, follows, hi);
        let follows = k.select(is_last, after, follows);
        let next: Vec<Val> = (0..n).map(|i| k.add_const(follows, i)).collect();
        let group = Group { tiles: tiles_at(k, numbers), next: tiles_at(k, &next) };
        body(k, numbers, &group);
    });
}

impl Strips {
    /// For products with `matrices` of `columns` columns, `at_once` strips together. Call it at the top level of the body.
    pub fn alloc(k: &mut KernelBuilder, matrices: &[Matrix], columns: u64, at_once: u64) -> Self {
        let unpacks = |m: &&Matrix| takes(m) && !is_direct(m);
        let is_cut = |m: &Matrix| {
            let width = block_columns(m);
            width == columns || (PART_TILES * TILE_COLUMNS).is_multiple_of(width)
        };
        let depth = columns.div_ceil(TILE_COLUMNS);
        let part = if matrices.iter().filter(unpacks).all(is_cut) { depth.min(PART_TILES) } else { depth };
        let words = at_once * part * TILE_BYTES / 4;
        let scratch = matrices.iter().any(|m| unpacks(&m)).then(|| k.alloc(DType::I32, words));
        Self { columns, part, scratch }
    }

    /// Tiles of a strip.
    const fn depth(&self) -> u64 {
        self.columns.div_ceil(TILE_COLUMNS)
    }

    /// Runs `body(part)` for all columns, as many at a time as stay in the first cache.
    pub fn for_parts(&self, k: &mut KernelBuilder, body: impl FnOnce(&mut KernelBuilder, &Part)) {
        let parts = self.depth().div_ceil(self.part);
        if parts == 1 {
            let (first, tiles) = (k.const_i64(0), k.index(self.depth()));
            body(k, &Part { first, tiles, ends: None });
            return;
        }
        k.for_range(self.depth(), self.part, |k, first| {
            let (depth, most, zero) = (k.index(self.depth()), k.index(self.part), k.const_i64(0));
            let left = k.sub(depth, first);
            let (is_first, is_last) = (k.cmp(Pred::Eq, first, zero), k.cmp(Pred::Le, left, most));
            let tiles = k.min_i64(left, most);
            body(k, &Part { first, tiles, ends: Some((is_first, is_last)) });
        });
    }

    /// Pointers to a part of a group's strips, which is unpacked here.
    pub fn unpack(&self, k: &mut KernelBuilder, group: &Group, part: &Part) -> Vec<Val> {
        let strip = |(i, tile): (u64, &Tile)| match self.scratch {
            Some(scratch) if !is_direct(&tile.matrix) => {
                let bytes = k.index(i * self.part * TILE_BYTES);
                let to = k.offset(scratch, bytes);
                self.unpack_strip(k, tile, part, to);
                to
            }
            _ => {
                let bytes = k.mul_const(part.first, TILE_BYTES);
                k.offset(tile.codes, bytes)
            }
        };
        (0..).zip(&group.tiles).map(strip).collect()
    }

    /// Writes the numbers of a part of a strip as bf16 lines of two columns.
    fn unpack_strip(&self, k: &mut KernelBuilder, tile: &Tile, part: &Part, to: Val) {
        let width = block_columns(&tile.matrix);
        let columns = [width, self.columns];
        let turn = if columns.iter().all(|n| n.is_multiple_of(TILE_COLUMNS)) { TILE_COLUMNS } else { LANES };
        let group_columns = tile.matrix.planes.format.group_columns();
        let begin = k.mul_const(part.first, TILE_COLUMNS);
        let (behind, all) = (k.mul_const(part.tiles, TILE_COLUMNS), k.index(self.columns));
        let behind = k.add(begin, behind);
        let end = k.min_i64(behind, all);
        k.for_each((begin, end, width), |k, first| {
            let block = k.div_const(first, width);
            let block = tile.block(k, block, Lanes::All);
            let last = k.add_const(first, width);
            let last = k.min_i64(last, end);
            k.for_each((first, last, turn), |k, column| {
                let line = k.sub(column, begin);
                for i in (0..turn).step_by(group_columns as usize) {
                    let (column, line) = (k.add_const(column, i), k.add_const(line, i));
                    put_line(k, tile, block, column, (to, line));
                }
            });
        });
        let nothing = k.splat_i32(16, 0);
        k.for_each((end, behind, 2), |k, column| {
            let line = k.sub(column, begin);
            let at = k.mul_const(line, LINE_WORDS / 2);
            k.store(to, at, nothing);
        });
    }
}

/// Some columns of strips.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// The first tile of a strip.
    pub first: Val,
    /// How many tiles.
    pub tiles: Val,
    /// Whether it is the first part and the last; `None` if it is all of a strip.
    pub ends: Option<(Val, Val)>,
}

/// How many columns share what a block has.
fn block_columns(matrix: &Matrix) -> u64 {
    let columns = matrix.planes.columns;
    matrix.planes.format.blocks().map_or(columns, |b| u64::from(b.columns).min(columns))
}

/// The weights that are asked for while others are multiplied.
pub struct Ahead<'a> {
    next: &'a [Tile],
    /// Bytes of the codes of each strip that are asked for with each step.
    bytes: Val,
}

impl<'a> Ahead<'a> {
    /// Beside the products of a group with `count` rows, of which some are multiplied together in `depth` steps.
    pub fn new(k: &mut KernelBuilder, group: &'a Group, (count, together): (Val, u64), depth: u64) -> Self {
        let lines = |t: &Tile| t.matrix.planes.tile_bytes().div_ceil(LINE_BYTES * depth);
        let lines = group.next.iter().map(lines).max().unwrap_or(0);
        let blocks = k.add_const(count, together - 1);
        let blocks = k.div_const(blocks, together);
        let lines = k.add_const(blocks, lines.saturating_sub(1));
        let lines = k.div(lines, blocks);
        Self { next: &group.next, bytes: k.mul_const(lines, LINE_BYTES) }
    }

    /// What goes with step `step` of all products with part `part` of the strips, `width` of them.
    pub fn ask(&self, k: &mut KernelBuilder, (part, width): (usize, u64), step: Val) {
        let at = k.mul(step, self.bytes);
        for tile in self.next.chunks(width as usize).nth(part).into_iter().flatten() {
            // the last ones where there are no more
            let all = k.index(tile.matrix.planes.tile_bytes());
            let bytes = k.min_i64(self.bytes, all);
            let last = k.sub(all, bytes);
            let at = k.min_i64(at, last);
            k.prefetch(tile.codes, at, bytes);
        }
    }
}

/// Writes the numbers of a group of columns, from `column` on, as those from column `line` on of `to`.
fn put_line(k: &mut KernelBuilder, tile: &Tile, block: Block, column: Val, (to, line): (Val, Val)) {
    let numbers = tile.numbers(k, column, block);
    for (pair, numbers) in (0..).zip(numbers.chunks(2)) {
        let words = k.bf16_pairs(numbers[0], numbers[1]);
        let at = k.add_const(line, 2 * pair);
        let at = k.mul_const(at, LINE_WORDS / 2);
        k.store(to, at, words);
    }
}
