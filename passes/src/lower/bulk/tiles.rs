//! `tiles`: rows and weights as bf16 tiles of 16 by 32 numbers, multiplied by a CPU's matrix unit.
//!
//! panel    rows of x as tiles of 16 tokens by 32 columns
//! strip    16 weight rows as such tiles: see [`strips`](super::super::strips)
//! dot      two strips of the panel by two of the weight, 512 columns of them, so that those of the weight stay in the first cache; sums are f32, 32 columns by
//!          themselves first

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::layout::LINE_BYTES;
use nextc_ir::shape::LANES;
use nextc_ir::{DType, Format, Layout};

use super::super::matmul::row_ptr;
use super::super::packed::Matrix;
use super::super::strips::{Ahead, Group, Part, Strips, TILE_BYTES, TILE_COLUMNS};
use super::{Sink, ask_rows, round_up, sums_of};

/// True if products of many tokens with this matrix can be made in tiles. Weights in f32 are not rounded, and columns in an order of their own are no tiles.
pub fn takes(matrix: &Matrix) -> bool {
    let p = &matrix.planes;
    p.format != Format::F32 && p.layout == Layout::Tile16 && !p.format.blocks().is_some_and(|b| b.ordered)
}

/// Strips that are multiplied together.
pub const AT_ONCE: u64 = 2;
/// Rows and columns of a product that are computed together: two strips of each.
pub const TOGETHER: u64 = 2 * LANES;
/// Numbers of its sums.
pub const SUMS: u64 = TOGETHER * TOGETHER;

/// The numbers 0 to 15 in scratch. Call it at the top level of the body.
pub fn lane_numbers(k: &mut KernelBuilder) -> Val {
    let lanes = k.alloc(DType::I32, LANES);
    for i in 0..LANES {
        let (at, value) = (k.index(i), k.const_i32(i as i32));
        k.store(lanes, at, value);
    }
    lanes
}

/// Tiles in scratch, of rows of an A or columns of a B: strips of 16 rows, in each the tiles of 32 columns one after the other. What is said of an A is
/// so of the turned B.
#[derive(Clone, Copy, Debug)]
pub struct RowTiles {
    /// Columns of a row as stored.
    columns: u64,
    /// The first strip.
    pub at: Val,
}

impl RowTiles {
    /// Call it at the top level of the body.
    pub fn alloc(k: &mut KernelBuilder, rows: u64, columns: u64) -> Self {
        let words = rows.div_ceil(LANES) * columns.div_ceil(TILE_COLUMNS) * TILE_BYTES / 4;
        Self { columns, at: k.alloc(DType::I32, words) }
    }

    /// Tiles of a strip.
    pub const fn depth(&self) -> u64 {
        self.columns.div_ceil(TILE_COLUMNS)
    }

    /// Pointer to row `i` in its strip's first tile; further tiles are 1 KiB apart.
    pub fn line(&self, k: &mut KernelBuilder, i: Val) -> Val {
        let (strip, within) = (k.div_const(i, LANES), k.rem_const(i, LANES));
        let (strip, within) = (k.mul_const(strip, self.depth() * TILE_BYTES), k.mul_const(within, LINE_BYTES));
        let bytes = k.add(strip, within);
        k.offset(self.at, bytes)
    }

    /// The strip after the one at `strip`.
    pub fn next(&self, k: &mut KernelBuilder, strip: Val) -> Val {
        let bytes = k.index(self.depth() * TILE_BYTES);
        k.offset(strip, bytes)
    }

    /// Rounds a row, whose vectors are given, into row `i`; of the last columns some may be left as they are.
    pub fn put(&self, k: &mut KernelBuilder, i: Val, row: &[Val]) {
        let to = self.line(k, i);
        let nothing = k.splat_f32(16, 0.0);
        for (tile, pair) in (0..).zip(row.chunks(2)) {
            let words = k.bf16_row(pair[0], *pair.get(1).unwrap_or(&nothing));
            let at = k.index(tile * TILE_BYTES / 4);
            k.store(to, at, words);
        }
    }

    /// Rounds vectors of rows `i`, which is even, and `i + 1` of a B, those from column `column` on.
    pub fn put_pair(&self, k: &mut KernelBuilder, (i, column): (Val, Val), [even, odd]: [&[Val]; 2]) {
        let (strip, bytes) = (self.line(k, column), k.mul_const(i, LINE_BYTES / 2));
        let to = k.offset(strip, bytes);
        for (strip, (&a, &b)) in (0..).zip(even.iter().zip(odd)) {
            let words = k.bf16_pairs(a, b);
            let at = k.index(strip * self.depth() * TILE_BYTES / 4);
            k.store(to, at, words);
        }
    }

    /// The strip with row `i`, a multiple of 32, and the one behind it.
    pub fn two_strips(&self, k: &mut KernelBuilder, i: Val) -> [Val; 2] {
        let first = self.line(k, i);
        [first, self.next(k, first)]
    }

    /// Turns all tiles into `to`: what were rows of an A are columns of a B there.
    pub fn turn(&self, k: &mut KernelBuilder, to: &Self, rows: u64) {
        k.for_range(rows.div_ceil(LANES) * self.depth() * TILE_BYTES, TILE_BYTES, |k, tile| {
            let (to, from) = (k.offset(to.at, tile), k.offset(self.at, tile));
            k.tile_turn(to, from);
        });
    }

    /// Rounds a row, whose 16 numbers from column `c` on `numbers(c)` gives, into row `i`.
    pub fn pack(&self, k: &mut KernelBuilder, i: Val, mut numbers: impl FnMut(&mut KernelBuilder, Val) -> Val) {
        let to = self.line(k, i);
        let put = |k: &mut KernelBuilder, c: Val, first: Val, second: Val| {
            let words = k.bf16_row(first, second);
            let at = k.mul_const(c, TILE_BYTES / 4 / TILE_COLUMNS);
            k.store(to, at, words);
        };
        let whole = self.columns / TILE_COLUMNS * TILE_COLUMNS;
        k.for_range(whole, TILE_COLUMNS, |k, c| {
            let next = k.add_const(c, LANES);
            let (first, second) = (numbers(k, c), numbers(k, next));
            put(k, c, first, second);
        });
        if whole < self.columns {
            let (c, nothing) = (k.index(whole), k.splat_f32(16, 0.0));
            let first = numbers(k, c);
            put(k, c, first, nothing);
        }
    }

    /// Fills rows `first..end` with zeros.
    pub fn fill(&self, k: &mut KernelBuilder, (first, end): (Val, Val)) {
        k.for_each((first, end, 1), |k, i| {
            let (to, nothing) = (self.line(k, i), k.splat_i32(16, 0));
            k.for_range(self.depth() * TILE_BYTES / 4, TILE_BYTES / 4, |k, at| k.store(to, at, nothing));
        });
    }
}

/// Rows as tiles, and the weights that they are multiplied with.
#[derive(Clone, Copy, Debug)]
pub struct Tiles {
    rows: RowTiles,
    strips: Strips,
    /// Sums of all rows by two strips.
    sums: Val,
}

impl Tiles {
    /// Bytes of a row of `columns` numbers.
    pub const fn row_bytes(columns: u64) -> u64 {
        2 * columns
    }

    /// For `tokens` rows and products with `matrices`. Call it at the top level of the body.
    pub fn alloc(k: &mut KernelBuilder, tokens: u64, matrices: &[Matrix]) -> Self {
        let columns = matrices[0].planes.columns;
        Self {
            rows: RowTiles::alloc(k, tokens, columns),
            strips: Strips::alloc(k, matrices, columns, AT_ONCE),
            sums: k.alloc(DType::F32, tokens.next_multiple_of(LANES) * AT_ONCE * LANES),
        }
    }

    /// Steps of a product.
    pub const fn depth(&self) -> u64 {
        self.rows.depth()
    }

    /// Rounds a row, whose 16 numbers from column `c` on `numbers(c)` gives, into row `i`.
    pub fn pack(&self, k: &mut KernelBuilder, i: Val, numbers: impl FnMut(&mut KernelBuilder, Val) -> Val) {
        self.rows.pack(k, i, numbers);
    }

    /// Fills what is multiplied behind the first `count` rows with zeros.
    pub fn fill_behind(&self, k: &mut KernelBuilder, count: Val) {
        let end = round_up(k, count, LANES);
        self.rows.fill(k, (count, end));
    }

    /// Products of a group's strips with `count` rows: those of a row go to `sink`.
    pub fn products(
        &self,
        k: &mut KernelBuilder,
        (group, ahead): (&Group, &Ahead<'_>),
        count: Val,
        sink: &mut dyn Sink,
    ) {
        let (zero, end) = (k.const_i64(0), round_up(k, count, LANES));
        let blocks = round_up(k, count, TOGETHER);
        let blocks = k.div_const(blocks, TOGETHER);
        let width = group.tiles.len() as u64;
        self.strips.for_parts(k, |k, part| {
            let strips = self.strips.unpack(k, group, part);
            let steps = k.mul(part.first, blocks);
            k.for_each((zero, count, TOGETHER), |k, first| {
                let block = k.div_const(first, TOGETHER);
                let step = k.mul(block, part.tiles);
                let step = k.add(steps, step);
                let at = (first, row_ptr(k, self.sums, first, width * LANES));
                let last = k.add_const(first, TOGETHER);
                let last = k.min_i64(last, count);
                ask_rows(k, sink, (first, last), width);
                self.add_block(k, at, end, (&strips, part), |k, i| {
                    let step = k.add(step, i);
                    ahead.ask(k, (0, AT_ONCE), step);
                });
                let mut finish = |k: &mut KernelBuilder| {
                    k.for_each((first, last, 1), |k, i| {
                        let values = sums_of(k, self.sums, i, width);
                        sink.put(k, i, &values);
                    });
                };
                match part.ends {
                    Some((_, is_last)) => k.if_then(is_last, finish),
                    None => finish(k),
                }
            });
        });
    }

    /// Adds the products of rows from `first` on, a multiple of 32, of `end`, with a part of some strips.
    fn add_block(
        &self,
        k: &mut KernelBuilder,
        (first, sums): (Val, Val),
        end: Val,
        (strips, part): (&[Val], &Part),
        mut beside: impl FnMut(&mut KernelBuilder, Val),
    ) {
        let low = self.rows.line(k, first);
        let bytes = k.mul_const(part.first, TILE_BYTES);
        let low = k.offset(low, bytes);
        let (left, one) = (k.sub(end, first), k.index(LANES));
        let two = k.cmp(Pred::Gt, left, one);
        let is_first = part.ends.map(|(is_first, _)| is_first);
        let mut add = |k: &mut KernelBuilder, a: &[Val]| {
            k.tile_add((sums, is_first), (a, strips), part.tiles, &mut beside);
        };
        let high = self.rows.next(k, low);
        k.if_then(two, |k| add(k, &[low, high]));
        let alone = k.not(two);
        k.if_then(alone, |k| add(k, &[low]));
    }
}
