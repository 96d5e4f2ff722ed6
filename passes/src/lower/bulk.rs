//! `bulk`: products of many tokens in tiles of a CPU's matrix unit.
//!
//! class    tokens of runs longer than 8 are `bulk`; the others take the products of [`super::matmul`], whatever else the step holds
//! panel    rows of x of a block of tokens, rounded to bf16, as tiles of 16 tokens by 32 columns in scratch
//! strip    16 weight rows as bf16 tiles of 32 columns: see [`super::strips`]
//! dot      two strips of the panel by two of the weight, over all columns; sums are f32, 32 columns by themselves first
//! epilogue as in [`super::matmul`], a token at a time
//! traffic  each weight once a task from memory and once a block from the second cache; bound by the matrix unit from about 64 tokens on
//!
//! One in several tasks takes the tiles of all of them, so that rows are rounded seldom. The order of a token's sums depends on its class alone.

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::layout::LINE_BYTES;
use nextc_ir::schedule::Input;
use nextc_ir::shape::{LANES, Sym};
use nextc_ir::target::BulkTile;
use nextc_ir::types::DECODE_TOKENS;
use nextc_ir::{DType, Format, Layout};

use super::matmul::{Epilogue, Rows, Weight, for_rows, row_ptr, tile_range};
use super::packed::Matrix;
use super::ports::{Port, Ports, Site};
use super::strips::{Group, STRIPS, Strips, TILE_BYTES, TILE_COLUMNS, for_groups, is_direct};

/// Tasks that every thread has at least, where tasks are joined.
const TASKS_PER_THREAD: u64 = 2;

/// How the arithmetic of a token is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Its sequence has at most [`DECODE_TOKENS`] tokens in the step.
    Decode,
    /// It has more.
    Bulk,
}

/// The classes of a step's tokens, in a kernel for a machine that tells them apart.
#[derive(Clone, Copy, Debug)]
pub struct Classes {
    cu_seqlens: Port,
    tile: BulkTile,
    threads: u64,
}

impl Classes {
    /// The ports; `None` where every token is computed alike: without a matrix unit, or if the rows are not the tokens of the step.
    pub fn ports(site: &Site<'_>, ports: &mut Ports, rows: Sym) -> Option<Self> {
        let tile = site.target.bulk_tile().filter(|_| rows == Sym::T)?;
        Some(Self { cu_seqlens: ports.step(Input::CuSeqlens), tile, threads: u64::from(site.target.threads.max(1)) })
    }

    /// Whether the sequence of tokens `begin..end` is `bulk`.
    pub fn is_bulk_run(k: &mut KernelBuilder, begin: Val, end: Val) -> Val {
        let (tokens, most) = (k.sub(end, begin), k.index(DECODE_TOKENS));
        k.cmp(Pred::Gt, tokens, most)
    }

    /// Runs `body(b, begin, end, is bulk)` for each sequence; `body` gives the next of what is carried.
    fn for_sequences(
        self,
        k: &mut KernelBuilder,
        init: &[Val],
        body: impl FnOnce(&mut KernelBuilder, [Val; 4], &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let (cu_seqlens, zero, count) = (k.param(self.cu_seqlens), k.const_i64(0), k.dim(Sym::B));
        k.for_carry((zero, count, 1), init, |k, b, carried| {
            let next = k.add_const(b, 1);
            let (begin, end) = (k.load_index(cu_seqlens, b), k.load_index(cu_seqlens, next));
            let bulk = Self::is_bulk_run(k, begin, end);
            body(k, [b, begin, end, bulk], carried)
        })
    }

    /// Runs `body(first, last)` for the tokens of a class: neighbouring sequences of one class together.
    pub fn for_runs(self, k: &mut KernelBuilder, class: Class, body: impl FnOnce(&mut KernelBuilder, Val, Val)) {
        let zero = k.const_i64(0);
        self.for_sequences(k, &[zero], |k, [b, _, end, bulk], begun| {
            let (cu_seqlens, count) = (k.param(self.cu_seqlens), k.dim(Sym::B));
            let (next, after) = (k.add_const(b, 1), k.add_const(b, 2));
            let after = k.min_i64(after, count);
            let after = k.load_index(cu_seqlens, after);
            let next_is_bulk = Self::is_bulk_run(k, end, after);
            let (changes, is_last) = (k.xor(bulk, next_is_bulk), k.cmp(Pred::Eq, next, count));
            let ends = k.or(changes, is_last);
            let is_wanted = if class == Class::Bulk { bulk } else { k.not(bulk) };
            let runs = k.and(ends, is_wanted);
            k.if_then(runs, |k| body(k, begun[0], end));
            vec![k.select(ends, end, begun[0])]
        });
    }

    /// Whether the step has tokens of the classes `decode` and `bulk`.
    pub fn mix(self, k: &mut KernelBuilder) -> Mix {
        let zero = k.const_i64(0);
        let none = k.cmp(Pred::Ne, zero, zero);
        let found = self.for_sequences(k, &[none, none], |k, [_, _, _, bulk], found| {
            let decode = k.not(bulk);
            vec![k.or(found[0], decode), k.or(found[1], bulk)]
        });
        Mix { classes: self, decode: found[0], bulk: found[1] }
    }

    /// How many tasks of `size` tiles one takes for `bulk` tokens, out of `tasks`.
    pub fn joined(self, size: u64, tasks: u64) -> u64 {
        let most = tasks / (TASKS_PER_THREAD * self.threads);
        (self.tile.row_tiles / size).min(most).max(1)
    }

    /// How many tiles of such a task of `matrix` are multiplied together. Packed tiles and those that follow them stay in the second cache beside the panel.
    pub fn at_once(self, matrix: &Matrix, size: u64, tasks: u64) -> u64 {
        let tiles = size * self.joined(size, tasks);
        let strip_bytes = matrix.planes.columns.div_ceil(TILE_COLUMNS) * TILE_BYTES;
        let fits = |n: &u64| {
            let is_small = *n == 2 || !is_direct(matrix) || n * strip_bytes <= self.tile.panel_bytes / 4;
            tiles.is_multiple_of(*n) && is_small
        };
        [STRIPS, 2].into_iter().find(fits).unwrap_or(1)
    }

    /// The tiles that task `group` takes for `bulk` tokens, of `tiles`; none for most tasks where `joined` are one.
    pub fn range(k: &mut KernelBuilder, group: Val, (size, joined): (u64, u64), tiles: u64) -> (Val, Val) {
        let (zero, part) = (k.const_i64(0), k.rem_const(group, joined));
        let first = k.cmp(Pred::Eq, part, zero);
        let (lo, _) = tile_range(k, group, size, tiles);
        let end = k.add_const(lo, size * joined);
        let tiles = k.index(tiles);
        let end = k.min_i64(end, tiles);
        (lo, k.select(first, end, lo))
    }
}

/// Which classes a step has.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    classes: Classes,
    /// Some tokens are `decode`.
    pub decode: Val,
    /// Some tokens are `bulk`.
    pub bulk: Val,
}

impl Mix {
    /// Whether token `t` is `bulk`: sought only in steps that have both.
    pub fn is_bulk(&self, k: &mut KernelBuilder, t: Val) -> Val {
        let both = k.and(self.decode, self.bulk);
        let search = |k: &mut KernelBuilder| {
            let zero = k.const_i64(0);
            let none = k.cmp(Pred::Ne, zero, zero);
            self.classes.for_sequences(k, &[none], |k, [_, begin, end, bulk], found| {
                let (after, before) = (k.cmp(Pred::Le, begin, t), k.cmp(Pred::Lt, t, end));
                let here = k.and(after, before);
                let here = k.and(here, bulk);
                vec![k.or(found[0], here)]
            })
        };
        k.if_else(both, search, |_| vec![self.bulk])[0]
    }
}

impl Mix {
    /// Runs `body(places)` for the places `run` of choices whose tokens are `decode`: in blocks of `block` where all of the step are. `token` gives the token
    /// of a place.
    pub fn for_decoded(
        &self,
        k: &mut KernelBuilder,
        (lo, hi): (Val, Val),
        block: u64,
        token: impl FnOnce(&mut KernelBuilder, Val) -> Val,
        body: &mut dyn FnMut(&mut KernelBuilder, &[Val]),
    ) {
        k.if_then(self.bulk, |k| {
            k.for_each((lo, hi, 1), |k, place| {
                let t = token(k, place);
                let is_bulk = self.is_bulk(k, t);
                let decodes = k.not(is_bulk);
                k.if_then(decodes, |k| body(k, &[place]));
            });
        });
        let alike = k.not(self.bulk);
        k.if_then(alike, |k| for_rows(k, (lo, hi), block, body));
    }

    /// Notes the number of a choice in row `i` of `numbers` if its token `t` is `bulk`, else -1.
    pub fn note(&self, k: &mut KernelBuilder, numbers: Val, i: Val, number: Val, t: Val) {
        let (is_bulk, none) = (self.is_bulk(k, t), k.const_i64(-1));
        let number = k.select(is_bulk, number, none);
        let number = k.narrow(number);
        k.store(numbers, i, number);
    }

    /// Runs `body(number)` if a choice was noted in row `i` of `numbers`.
    pub fn if_noted(k: &mut KernelBuilder, numbers: Val, i: Val, body: impl FnOnce(&mut KernelBuilder, Val)) {
        let (number, zero) = (k.load_index(numbers, i), k.const_i64(0));
        let noted = k.cmp(Pred::Ge, number, zero);
        k.if_then(noted, |k| body(k, number));
    }
}

/// True if products of many tokens with this matrix are made in tiles. Weights in f32 are not rounded, and columns in an order of their own are no tiles.
pub fn takes(matrix: &Matrix) -> bool {
    let p = &matrix.planes;
    p.format != Format::F32 && p.layout == Layout::Tile16 && !p.format.blocks().is_some_and(|b| b.ordered)
}

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

/// Scratch for products of a block of tokens.
#[derive(Clone, Copy, Debug)]
pub struct Panel {
    /// Most tokens of a block.
    tokens: u64,
    a: RowTiles,
    /// The weights.
    strips: Strips,
    /// Sums of 32 tokens by 32 weight rows, for each two strips.
    c: Val,
}

impl Panel {
    /// For products with `matrices`, which have one number of columns. Call it at the top level of the body.
    pub fn alloc(k: &mut KernelBuilder, classes: Classes, matrices: &[Matrix]) -> Self {
        let columns = matrices[0].planes.columns;
        let tokens = classes.tile.tokens(columns);
        Self {
            tokens,
            a: RowTiles::alloc(k, tokens, columns),
            strips: Strips::alloc(k, matrices, columns),
            c: k.alloc(DType::F32, STRIPS * 2 * LANES * LANES),
        }
    }

    /// Scratch for a number of each row. Call it at the top level of the body.
    pub fn numbers(&self, k: &mut KernelBuilder) -> Val {
        k.alloc(DType::I32, self.tokens)
    }

    /// Runs `body(first, count)` for blocks of the rows `lo..hi`.
    pub fn for_blocks(
        &self,
        k: &mut KernelBuilder,
        (lo, hi): (Val, Val),
        body: impl FnOnce(&mut KernelBuilder, Val, Val),
    ) {
        k.for_each((lo, hi, self.tokens), |k, first| {
            let (left, most) = (k.sub(hi, first), k.index(self.tokens));
            let count = k.min_i64(left, most);
            body(k, first, count);
        });
    }

    /// Rounds `count` rows into the panel: row `i` is row `row_of(i)` of x. The last strip is filled up with zeros.
    pub fn pack(
        &self,
        k: &mut KernelBuilder,
        rows: &Rows,
        count: Val,
        row_of: impl FnOnce(&mut KernelBuilder, Val) -> Val,
    ) {
        let zero = k.const_i64(0);
        k.for_each((zero, count, 1), |k, i| {
            let row = row_of(k, i);
            let numbers = rows.reader(k, row);
            self.a.pack(k, i, |k, c| numbers.at(k, c));
        });
        let end = round_up(k, count, LANES);
        self.a.fill(k, (count, end));
    }

    /// Products of a group of weights with the `count` rows of the panel: `each(row in panel, [a vector of 16 weight rows for each tile])`. The group that follows is
    /// asked for meanwhile.
    pub fn products(
        &self,
        k: &mut KernelBuilder,
        group: &Group,
        count: Val,
        each: impl FnOnce(&mut KernelBuilder, Val, &[Val]),
    ) {
        let (strips, ahead) = (self.strips.unpack(k, group), self.strips.ahead(k, group, count));
        let strips: Vec<&[Val]> = strips.chunks(2).collect();
        let sums: Vec<Val> = (0..strips.len() as u64)
            .map(|pair| {
                let bytes = k.index(pair * 4 * TILE_BYTES);
                k.offset(self.c, bytes)
            })
            .collect();
        let (zero, end) = (k.const_i64(0), round_up(k, count, LANES));
        k.for_each((zero, end, 2 * LANES), |k, first| {
            let (low, block) = (self.a.line(k, first), k.div_const(first, 2 * LANES));
            let (left, one) = (k.sub(end, first), k.index(LANES));
            let two = k.cmp(Pred::Gt, left, one);
            let dots = |k: &mut KernelBuilder, a: &[Val]| {
                for (pair, (&c, b)) in sums.iter().zip(&strips).enumerate() {
                    k.tile_dot(c, (a, b), self.a.depth(), |k, i| ahead.ask(k, pair, block, i));
                }
                Vec::new()
            };
            k.if_else(
                two,
                |k| {
                    let high = self.a.next(k, low);
                    dots(k, &[low, high])
                },
                |k| dots(k, &[low]),
            );
            let last = k.add_const(first, 2 * LANES);
            let last = k.min_i64(last, count);
            k.for_each((first, last, 1), |k, i| {
                let row = k.sub(i, first);
                let mut values = Vec::new();
                for (&c, pair) in sums.iter().zip(&strips) {
                    let row = row_ptr(k, c, row, LANES * pair.len() as u64);
                    for j in 0..pair.len() as u64 {
                        let at = k.index(j * LANES);
                        values.push(k.load_f32x16(row, at));
                    }
                }
                each(k, i, &values);
            });
        });
    }

    /// Rows `first..last` of x against tiles `lo..hi` of a matrix, `at_once` together.
    pub fn emit_tiles(
        &self,
        k: &mut KernelBuilder,
        (matrix, weight): (Matrix, Val),
        (rows, first, last): (&Rows, Val, Val),
        ((lo, hi), at_once): ((Val, Val), u64),
        epilogue: &mut Epilogue<'_>,
    ) {
        self.for_blocks(k, (first, last), |k, begin, count| {
            self.pack(k, rows, count, |k, i| k.add(begin, i));
            let end = k.add(begin, count);
            let is_last = k.cmp(Pred::Eq, end, last);
            let after = k.select(is_last, hi, lo);
            let tiles_at = |k: &mut KernelBuilder, tiles: &[Val]| matrix.tiles_at(k, weight, tiles);
            for_groups(k, (lo, hi, after), (matrix.tiles(), at_once), tiles_at, |k, tiles, group| {
                self.products(k, group, count, |k, i, values| {
                    let row = k.add(begin, i);
                    for (&t, &value) in tiles.iter().zip(values) {
                        epilogue(k, t, row, value);
                    }
                });
            });
        });
    }
}

impl Panel {
    /// `swiglu` of gate and up tiles `lo..hi`, counted from tile `begin` of both matrices on, for the `count` rows of the panel: `store(builder, tile, row in
    /// panel, value)`.
    pub fn swiglu(
        &self,
        k: &mut KernelBuilder,
        ((gate, gate_at), (up, up_at)): (Weight, Weight),
        (begin, lo, hi): (Val, Val, Val),
        count: Val,
        store: &mut Epilogue<'_>,
    ) {
        let pairs_at = |k: &mut KernelBuilder, tiles: &[Val]| {
            let numbers: Vec<Val> = tiles.iter().map(|&tile| k.add(begin, tile)).collect();
            [gate.tiles_at(k, gate_at, &numbers), up.tiles_at(k, up_at, &numbers)].concat()
        };
        for_groups(k, (lo, hi, hi), (1, 1), pairs_at, |k, tiles, group| {
            self.products(k, group, count, |k, i, values| {
                let g = k.silu(values[0]);
                let value = k.fmul(g, values[1]);
                store(k, tiles[0], i, value);
            });
        });
    }
}

/// The least multiple of `n` that is not less than `x`.
pub fn round_up(k: &mut KernelBuilder, x: Val, n: u64) -> Val {
    let up = k.add_const(x, n - 1);
    let up = k.div_const(up, n);
    k.mul_const(up, n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_are_joined_as_far_as_threads_have_enough() {
        let tile = BulkTile { panel_bytes: 1 << 19, most_tokens: 256, row_tiles: 16 };
        let joined = |threads, size, tasks| Classes { cu_seqlens: 0, tile, threads }.joined(size, tasks);
        assert_eq!([joined(2, 2, 64), joined(16, 2, 64), joined(64, 2, 64)], [8, 2, 1]);
        assert_eq!([joined(1, 4, 192), joined(2, 4, 1), joined(2, 32, 64)], [4, 1, 1]);
    }
}
