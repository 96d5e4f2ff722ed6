//! `bulk`: products of many tokens, rounded: in tiles of a CPU's matrix unit, or as dot products of bytes or of pairs of bf16.
//!
//! class    tokens of runs longer than 8 are `bulk`; the others take the products of [`super::matmul`], whatever else the step holds
//! panel    rows of x of a block of tokens, rounded, in scratch
//! strip    16 weight rows in the form that they are multiplied in
//! dot      some rows of the panel by two strips: [`tiles`], [`bytes`], [`pairs`]
//! epilogue as in [`super::matmul`], a token at a time
//! traffic  each weight once a task from memory and once a block from the second cache; bound by arithmetic from about 64 tokens on
//!
//! One in several tasks takes the tiles of all of them, so that rows are rounded seldom. The order of a token's sums depends on its class alone.

pub mod bytes;
mod dots;
pub mod pairs;
pub mod tiles;
pub mod unit;

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Input;
use nextc_ir::shape::{LANES, Sym};
use nextc_ir::target::{BulkKind, BulkTile};
use nextc_ir::types::DECODE_TOKENS;

use self::bytes::Bytes;
use self::pairs::Pairs;
use self::tiles::Tiles;

use super::matmul::{Epilogue, Rows, Weight, for_rows, row_ptr, tile_range};
use super::packed::Matrix;
use super::ports::{Port, Ports, Site};
use super::strips::{Ahead, Group, STRIPS, for_groups};

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
}

impl Classes {
    /// The ports; `None` where every token is computed alike: if nothing is rounded, or if the rows are not the tokens of the step.
    pub fn ports(site: &Site<'_>, ports: &mut Ports, rows: Sym) -> Option<Self> {
        let tile = site.target.bulk_tile().filter(|_| rows == Sym::T)?;
        Some(Self { cu_seqlens: ports.step(Input::CuSeqlens), tile })
    }

    /// Whether the sequence of tokens `begin..end` is `bulk`.
    pub fn is_bulk_run(k: &mut KernelBuilder, begin: Val, end: Val) -> Val {
        let (tokens, most) = (k.sub(end, begin), k.index(DECODE_TOKENS));
        k.cmp(Pred::Gt, tokens, most)
    }

    /// Runs `body(b, begin, end, is bulk)` for each sequence; `body` gives the next of what is carried.
    pub fn for_sequences(
        k: &mut KernelBuilder,
        cu_seqlens: Port,
        init: &[Val],
        body: impl FnOnce(&mut KernelBuilder, [Val; 4], &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let (cu_seqlens, zero, count) = (k.param(cu_seqlens), k.const_i64(0), k.dim(Sym::B));
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
        Self::for_sequences(k, self.cu_seqlens, &[zero], |k, [b, _, end, bulk], begun| {
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
        let found = Self::for_sequences(k, self.cu_seqlens, &[none, none], |k, [_, _, _, bulk], found| {
            let decode = k.not(bulk);
            vec![k.or(found[0], decode), k.or(found[1], bulk)]
        });
        Mix { classes: self, decode: found[0], bulk: found[1] }
    }

    /// True if products of many tokens with this matrix are rounded.
    pub fn takes(self, matrix: &Matrix) -> bool {
        match self.tile.kind {
            BulkKind::Tiles => tiles::takes(matrix),
            BulkKind::Bytes => bytes::takes(matrix),
            BulkKind::Pairs => pairs::takes(matrix),
        }
    }

    /// Bytes of a rounded row.
    const fn row_bytes(self, columns: u64) -> u64 {
        match self.tile.kind {
            BulkKind::Tiles => Tiles::row_bytes(columns),
            BulkKind::Bytes => Bytes::row_bytes(columns),
            BulkKind::Pairs => Pairs::row_bytes(columns),
        }
    }

    /// How many tiles are multiplied together in tasks of `size` tiles or of several such.
    pub fn at_once(self, size: u64) -> u64 {
        let most = match self.tile.kind {
            BulkKind::Tiles => tiles::AT_ONCE,
            BulkKind::Bytes | BulkKind::Pairs => STRIPS,
        };
        if size.is_multiple_of(most) || most.is_multiple_of(size) { most } else { 1 }
    }

    /// How many tasks of `size` tiles one takes for `bulk` tokens, out of `tasks`: as many as leave each thread of the team some.
    fn joined(self, k: &mut KernelBuilder, size: u64, tasks: u64) -> Val {
        let least = (self.at_once(size) / size).max(1);
        let team = k.team();
        let wanted = k.mul_const(team, self.tile.kind.tasks_per_thread());
        let (tasks, most) = (k.index(tasks), k.index(self.tile.row_tiles / size));
        let each = k.div(tasks, wanted);
        let each = k.min_i64(each, most);
        let each = k.div_const(each, least);
        let one = k.const_i64(1);
        let is_some = k.cmp(Pred::Gt, each, one);
        let each = k.select(is_some, each, one);
        k.mul_const(each, least)
    }

    /// The tiles that task `group` takes for `bulk` tokens, of `tiles`, where `tasks` take `size` tiles each for others; none for most of them, as some are one.
    pub fn range(self, k: &mut KernelBuilder, group: Val, (size, tasks): (u64, u64), tiles: u64) -> (Val, Val) {
        let joined = self.joined(k, size, tasks);
        let (zero, part) = (k.const_i64(0), k.rem(group, joined));
        let first = k.cmp(Pred::Eq, part, zero);
        let (lo, _) = tile_range(k, group, size, tiles);
        let all = k.mul_const(joined, size);
        let end = k.add(lo, all);
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
            Classes::for_sequences(k, self.classes.cu_seqlens, &[none], |k, [_, begin, end, bulk], found| {
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

/// What becomes of the sums of a panel's rows.
pub trait Sink {
    /// Takes the sums of a row of the panel by some tiles, a vector of 16 weight rows for each.
    fn put(&mut self, k: &mut KernelBuilder, row: Val, sums: &[Val]);

    /// Asks for the memory that the sums of a row by so many tiles will change, before they are computed; where nothing is said it is not worth it.
    fn ask(&mut self, _k: &mut KernelBuilder, _row: Val, _tiles: u64) {}

    /// Whether it asks for any.
    fn asks(&self) -> bool {
        false
    }
}

impl<F: FnMut(&mut KernelBuilder, Val, &[Val])> Sink for F {
    fn put(&mut self, k: &mut KernelBuilder, row: Val, sums: &[Val]) {
        self(k, row, sums);
    }
}

/// A sink that asks: `ask(builder, row, tiles)`, `put(builder, row, sums)`.
pub struct Asking<A, P> {
    /// See [`Sink::ask`].
    pub ask: A,
    /// See [`Sink::put`].
    pub put: P,
}

impl<A, P> Sink for Asking<A, P>
where
    A: FnMut(&mut KernelBuilder, Val, u64),
    P: FnMut(&mut KernelBuilder, Val, &[Val]),
{
    fn put(&mut self, k: &mut KernelBuilder, row: Val, sums: &[Val]) {
        (self.put)(k, row, sums);
    }

    fn ask(&mut self, k: &mut KernelBuilder, row: Val, tiles: u64) {
        (self.ask)(k, row, tiles);
    }

    fn asks(&self) -> bool {
        true
    }
}

/// Asks for what the sums of rows `first..last` will change.
fn ask_rows(k: &mut KernelBuilder, sink: &mut dyn Sink, (first, last): (Val, Val), tiles: u64) {
    if sink.asks() {
        k.for_each((first, last, 1), |k, i| sink.ask(k, i, tiles));
    }
}

/// Rounded rows, and the weights that they are multiplied with.
#[derive(Clone, Copy, Debug)]
enum Rounded {
    Tiles(Tiles),
    Bytes(Bytes),
    Pairs(Pairs),
}

impl Rounded {
    const fn depth(&self) -> u64 {
        match self {
            Self::Tiles(rounded) => rounded.depth(),
            Self::Bytes(rounded) => rounded.depth(),
            Self::Pairs(rounded) => rounded.depth(),
        }
    }

    /// Strips that are multiplied together.
    const fn width(&self) -> u64 {
        match self {
            Self::Tiles(_) => tiles::AT_ONCE,
            Self::Bytes(_) => bytes::WIDTH,
            Self::Pairs(_) => pairs::WIDTH,
        }
    }

    /// As [`Panel::pack`].
    fn pack(&self, k: &mut KernelBuilder, i: Val, numbers: impl FnMut(&mut KernelBuilder, Val) -> Val) {
        match self {
            Self::Tiles(rounded) => rounded.pack(k, i, numbers),
            Self::Bytes(rounded) => rounded.pack(k, i, numbers),
            Self::Pairs(rounded) => rounded.pack(k, i, numbers),
        }
    }

    fn fill_behind(&self, k: &mut KernelBuilder, count: Val) {
        match self {
            Self::Tiles(rounded) => rounded.fill_behind(k, count),
            Self::Bytes(rounded) => rounded.fill_behind(k, count),
            Self::Pairs(rounded) => rounded.fill_behind(k, count),
        }
    }

    /// As [`Panel::products`].
    fn products(&self, k: &mut KernelBuilder, (group, ahead): (&Group, &Ahead<'_>), count: Val, sink: &mut dyn Sink) {
        match self {
            Self::Tiles(rounded) => rounded.products(k, (group, ahead), count, sink),
            Self::Bytes(rounded) => rounded.products(k, (group, ahead), count, sink),
            Self::Pairs(rounded) => rounded.products(k, (group, ahead), count, sink),
        }
    }
}

/// Scratch for products of a block of tokens.
#[derive(Clone, Copy, Debug)]
pub struct Panel {
    /// Most tokens of a block.
    tokens: u64,
    /// Tokens that are multiplied together.
    together: u64,
    rounded: Rounded,
}

impl Panel {
    /// For products with `matrices`, which have one number of columns. Call it at the top level of the body.
    pub fn alloc(k: &mut KernelBuilder, classes: Classes, matrices: &[Matrix]) -> Self {
        let (tile, columns) = (classes.tile, matrices[0].planes.columns);
        let tokens = tile.tokens(classes.row_bytes(columns));
        let rounded = match tile.kind {
            BulkKind::Tiles => Rounded::Tiles(Tiles::alloc(k, tokens, matrices)),
            BulkKind::Bytes => Rounded::Bytes(Bytes::alloc(k, tokens, columns)),
            BulkKind::Pairs => Rounded::Pairs(Pairs::alloc(k, tokens, columns)),
        };
        Self { tokens, together: tile.together(), rounded }
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

    /// Rounds `count` rows into the panel: row `i` is row `row_of(i)` of x. What is multiplied behind the last is filled with zeros.
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
            self.rounded.pack(k, i, |k, c| numbers.at(k, c));
        });
        self.rounded.fill_behind(k, count);
    }

    /// Products of a group of weights with the `count` rows of the panel. The group that follows is asked for meanwhile.
    pub fn products(&self, k: &mut KernelBuilder, group: &Group, count: Val, sink: &mut dyn Sink) {
        let ahead = Ahead::new(k, group, (count, self.together), self.rounded.depth());
        self.rounded.products(k, (group, &ahead), count, sink);
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
                self.products(k, group, count, &mut |k: &mut KernelBuilder, i, values: &[Val]| {
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
    /// `swiglu` of gate and up tiles `lo..hi`, out of `tiles` from tile `begin` of both matrices on, for the `count` rows of the panel: `store(builder, tile, row in
    /// panel, value)`.
    pub fn swiglu(
        &self,
        k: &mut KernelBuilder,
        ((gate, gate_at), (up, up_at)): (Weight, Weight),
        (begin, (lo, hi), tiles): (Val, (Val, Val), u64),
        count: Val,
        store: &mut Epilogue<'_>,
    ) {
        let pairs_at = |k: &mut KernelBuilder, tiles: &[Val]| {
            let numbers: Vec<Val> = tiles.iter().map(|&tile| k.add(begin, tile)).collect();
            [gate.tiles_at(k, gate_at, &numbers), up.tiles_at(k, up_at, &numbers)].concat()
        };
        for_groups(k, (lo, hi, hi), (tiles, self.rounded.width() / 2), pairs_at, |k, tiles, group| {
            self.products(k, group, count, &mut |k: &mut KernelBuilder, i, values: &[Val]| {
                let (gates, ups) = values.split_at(tiles.len());
                for (&tile, (&gate, &up)) in tiles.iter().zip(gates.iter().zip(ups)) {
                    let g = k.silu(gate);
                    let value = k.fmul(g, up);
                    store(k, tile, i, value);
                }
            });
        });
    }
}

/// The sums of row `i` by each of so many strips, which lie side by side.
pub fn sums_of(k: &mut KernelBuilder, sums: Val, i: Val, strips: u64) -> Vec<Val> {
    let row = row_ptr(k, sums, i, LANES * strips);
    (0..strips)
        .map(|strip| {
            let at = k.index(strip * LANES);
            k.load_f32x16(row, at)
        })
        .collect()
}

/// The least multiple of `n` that is not less than `x`.
pub fn round_up(k: &mut KernelBuilder, x: Val, n: u64) -> Val {
    let up = k.add_const(x, n - 1);
    let up = k.div_const(up, n);
    k.mul_const(up, n)
}

#[cfg(test)]
mod tests {
    use nextc_ir::kernel::eval::{Buffer, Options, Place, run};

    use super::*;

    /// How many of `tasks` one takes in a team of so many threads.
    fn joined(team: u32, size: u64, tasks: u64) -> i32 {
        let tile = BulkTile { kind: BulkKind::Tiles, panel_bytes: 1 << 19, most_tokens: 256, row_tiles: 16 };
        let mut k = KernelBuilder::new("joined", &[("out", true)], 1.into());
        let joined = Classes { cu_seqlens: 0, tile }.joined(&mut k, size, tasks);
        let (zero, joined) = (k.const_i64(0), k.narrow(joined));
        k.store(k.param(0), zero, joined);
        let mut buffers = [Buffer::uninit(4)];
        let options = Options { team, ..Options::default() };
        run(&k.finish(), [1; 4], &mut buffers, &[Place::start(0)], options).expect("the kernel is sound");
        buffers[0].to_i32()[0]
    }

    #[test]
    fn tasks_are_joined_as_far_as_threads_have_enough() {
        assert_eq!([joined(2, 2, 64), joined(16, 2, 64), joined(64, 2, 64)], [8, 2, 1]);
        assert_eq!([joined(1, 4, 192), joined(2, 4, 1), joined(2, 32, 64)], [4, 1, 1]);
        // no fewer than are multiplied together
        assert_eq!([joined(2, 1, 64), joined(5, 1, 64), joined(64, 1, 64)], [16, 6, 2]);
    }
}
