//! `strips`: weights for products in tiles, 16 rows a strip of bf16 tiles of 32 columns.
//!
//! group    strips that are multiplied together with each block of tokens
//! direct   bf16 weights are tiles as packed
//! unpacked quantised weights become tiles in scratch, once a block of tokens, before they are multiplied
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

/// Tiles of weights that are multiplied together, and those that follow.
pub struct Group {
    /// Those that are multiplied.
    pub tiles: Vec<Tile>,
    next: Vec<Tile>,
}

/// The strips of a panel's products.
#[derive(Clone, Copy, Debug)]
pub struct Strips {
    columns: u64,
    /// A group of strips, where weights are unpacked.
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
    /// For products with `matrices` of `columns` columns. Call it at the top level of the body.
    pub fn alloc(k: &mut KernelBuilder, matrices: &[Matrix], columns: u64) -> Self {
        let unpacks = matrices.iter().any(|m| takes(m) && !is_direct(m));
        let words = STRIPS * columns.div_ceil(TILE_COLUMNS) * TILE_BYTES / 4;
        Self { columns, scratch: unpacks.then(|| k.alloc(DType::I32, words)) }
    }

    /// Tiles of a strip.
    const fn depth(&self) -> u64 {
        self.columns.div_ceil(TILE_COLUMNS)
    }

    /// Pointers to the tiles of a group's strips, which are unpacked here.
    pub fn unpack(&self, k: &mut KernelBuilder, group: &Group) -> Vec<Val> {
        let strip = |(i, tile): (u64, &Tile)| match self.scratch {
            Some(scratch) if !is_direct(&tile.matrix) => {
                let bytes = k.index(i * self.depth() * TILE_BYTES);
                let to = k.offset(scratch, bytes);
                self.unpack_strip(k, tile, to);
                to
            }
            _ => tile.codes,
        };
        (0..).zip(&group.tiles).map(strip).collect()
    }

    /// Writes the numbers of a strip as bf16 lines of two columns.
    fn unpack_strip(&self, k: &mut KernelBuilder, tile: &Tile, to: Val) {
        let format = tile.matrix.planes.format;
        let block_columns = format.blocks().map_or(self.columns, |b| u64::from(b.columns).min(self.columns));
        let turn = if block_columns.is_multiple_of(TILE_COLUMNS) { TILE_COLUMNS } else { LANES };
        let put_block = |k: &mut KernelBuilder, block: Val, columns: u64| {
            let first = k.mul_const(block, block_columns);
            let block = tile.block(k, block, Lanes::All);
            let end = k.add_const(first, columns);
            let turn = if columns.is_multiple_of(turn) { turn } else { LANES };
            k.for_each((first, end, turn), |k, column| {
                for group in 0..turn / format.group_columns() {
                    let column = k.add_const(column, group * format.group_columns());
                    put_line(k, tile, block, column, to);
                }
            });
        };
        let (lo, hi) = (k.const_i64(0), k.index(self.columns / block_columns));
        k.for_each((lo, hi, 1), |k, block| put_block(k, block, block_columns));
        if !self.columns.is_multiple_of(block_columns) {
            put_block(k, hi, self.columns % block_columns);
        }
        let nothing = k.splat_i32(16, 0);
        for column in (self.columns..self.depth() * TILE_COLUMNS).step_by(2) {
            let at = k.index(column / 2 * LINE_WORDS);
            k.store(to, at, nothing);
        }
    }
}

/// The weights that are asked for while others are multiplied.
pub struct Ahead<'a> {
    next: &'a [Tile],
    /// Bytes of the codes of each strip that are asked for with each step.
    bytes: Val,
    /// Steps of a product.
    depth: u64,
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
        Self { next: &group.next, bytes: k.mul_const(lines, LINE_BYTES), depth }
    }

    /// What goes with step `i` of the products of block `block` of rows with strips `2 * pair` and the one behind it.
    pub fn ask(&self, k: &mut KernelBuilder, pair: usize, block: Val, i: Val) {
        let step = k.mul_const(block, self.depth);
        let step = k.add(step, i);
        let at = k.mul(step, self.bytes);
        for tile in self.next.chunks(2).nth(pair).into_iter().flatten() {
            // the last ones where there are no more
            let all = k.index(tile.matrix.planes.tile_bytes());
            let bytes = k.min_i64(self.bytes, all);
            let last = k.sub(all, bytes);
            let at = k.min_i64(at, last);
            k.prefetch(tile.codes, at, bytes);
        }
    }
}

/// Writes the numbers of a group of columns, from `column` on.
fn put_line(k: &mut KernelBuilder, tile: &Tile, block: Block, column: Val, to: Val) {
    let numbers = tile.numbers(k, column, block);
    for (pair, numbers) in (0..).zip(numbers.chunks(2)) {
        let words = k.bf16_pairs(numbers[0], numbers[1]);
        let at = k.add_const(column, 2 * pair);
        let at = k.mul_const(at, LINE_WORDS / 2);
        k.store(to, at, words);
    }
}
