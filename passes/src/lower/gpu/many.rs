//! Products of many rows: 64 tokens at a time, for weights without scales and rows that are sums of two numbers. Others have [`wide`](super::wide).
//!
//! task     16 tiles of weight rows by 64 tokens; a warp has two tiles, for all columns and all tokens
//! stage    four turns of columns: the threads make operand B of the tokens in shared memory, once for all warps
//! products as in [`tile`](super::tile): the columns in the same parts, summed in the same order, so a token has the bits that it has in a step of few
//! epilogue a thread has rows `r` and `r + 8` of a tile, of two tokens of each group of eight
//! traffic  each weight once for 64 tokens: bound by shared memory
//!
//! A node that multiplies rows by a matrix has a kernel for steps of few rows ([`few_rows`]), and this one for others; between them may be one for some
//! ([`some`](super::some)).

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::Sym;
use nextc_ir::{DType, Target};

use super::super::matmul::Rows;
use super::Place;
use super::few::{At, load_row};
use super::fragments::Tile;
use super::tile::{Operand, Product, TOKENS};

/// Rows of a product of few, and most rows of a step of which kernels that work on experts count as few.
pub const FEW_ROWS: u64 = 8;
/// Warps of a block.
pub const WARPS: u64 = 8;
/// Tiles of a warp.
pub const WARP_TILES: u64 = 2;
/// Tiles of a block.
pub const TILES: u64 = WARPS * WARP_TILES;
/// Groups of eight tokens of a block.
const GROUPS: u64 = 8;
/// Groups that are done where there are no more tokens.
const HALF_GROUPS: usize = GROUPS as usize / 2;
/// Tokens of a block.
pub const MANY_TOKENS: u64 = GROUPS * TOKENS;
/// Turns of a stage.
const STAGE_TURNS: u64 = 4;

/// Most rows that a kernel for few is used for at all.
const MOST_FEW_ROWS: u64 = 256;

/// Most rows of a step in which the kernel for few does the work, where there is none for some and the one for many has `groups` groups of tiles: below
/// them it would have too few blocks to keep the machine busy.
pub fn few_rows(target: &Target, groups: u64) -> u64 {
    idle_below(target, groups, MANY_TOKENS / 4)
}

/// Most rows of a step in which a kernel for some does the work: beyond them the one for many has blocks enough.
pub fn some_rows(target: &Target, groups: u64) -> u64 {
    idle_below(target, groups, MANY_TOKENS)
}

/// The rows that make `groups` blocks for each `tokens` of them as many as there are multiprocessors, within bounds.
fn idle_below(target: &Target, groups: u64, tokens: u64) -> u64 {
    (target.multiprocessors() / groups * tokens).clamp(FEW_ROWS, MOST_FEW_ROWS)
}

/// Most tokens of a step whose experts are those of few tokens each, of a model with so many experts and so many of a token.
pub fn some_tokens(experts: u64, choices: u64) -> u64 {
    (4 * experts / choices).clamp(FEW_ROWS, MOST_FEW_ROWS)
}

/// The grid of a kernel for more rows than the first number and at most the second.
pub fn some(sym: Sym, (above, most): (u64, u64), grid: Extent) -> Extent {
    few(sym, most, many(sym, above, grid))
}

/// The grid of a kernel for at most `rows` rows.
pub fn few(sym: Sym, rows: u64, grid: Extent) -> Extent {
    Extent::from(0).if_above(sym, rows, grid)
}

/// The grid of a kernel for more rows than that.
pub fn many(sym: Sym, rows: u64, grid: Extent) -> Extent {
    grid.if_above(sym, rows, 0.into())
}

/// Blocks over `rows` tokens.
pub fn token_blocks(rows: impl Into<Extent>) -> Extent {
    rows.into().ceil_div(MANY_TOKENS)
}

/// Begins a block of this kind.
pub fn begin_block(k: &mut KernelBuilder) -> Place {
    k.threads(WARPS as u32 * 32);
    // what comes next would take room from the blocks that are still to come
    k.wait();
    Place::here(k)
}

/// Which tokens and which of `groups` groups of tiles a task is about: the first token, and the group.
pub fn block_of(k: &mut KernelBuilder, task: Val, groups: u64) -> (Val, Val) {
    let (block, group) = (k.div_const(task, groups), k.rem_const(task, groups));
    (k.mul_const(block, MANY_TOKENS), group)
}

/// A warp's tiles of a group of [`TILES`].
#[derive(Clone, Copy)]
pub struct OwnTiles {
    numbers: [Val; WARP_TILES as usize],
    /// The last tile there is.
    last: Val,
}

impl OwnTiles {
    /// Of the group that begins with tile `first`, where `last` is the last tile.
    pub fn of(k: &mut KernelBuilder, first: Val, last: Val, place: Place) -> Self {
        let own = k.mul_const(place.warp, WARP_TILES);
        let own = k.add(first, own);
        Self { numbers: std::array::from_fn(|i| k.add_const(own, i as u64)), last }
    }

    /// Of group `group` of `tiles` tiles.
    pub fn of_group(k: &mut KernelBuilder, group: Val, tiles: u64, place: Place) -> Self {
        let (first, last) = (k.mul_const(group, TILES), k.index(tiles - 1));
        Self::of(k, first, last, place)
    }

    /// What `tile` gives for each, or for the last where there is none.
    pub fn load(&self, k: &mut KernelBuilder, tile: impl Fn(&mut KernelBuilder, Val) -> Tile) -> Vec<Tile> {
        let of = |&number: &Val| {
            let number = k.min_i64(number, self.last);
            tile(k, number)
        };
        self.numbers.iter().map(of).collect()
    }

    /// Runs `body(number of a tile, the token if there is one and the tile, its sums)` for each.
    pub fn each(
        &self,
        k: &mut KernelBuilder,
        at: &At,
        pair: &Pair,
        mut body: impl FnMut(&mut KernelBuilder, Val, &At, [Val; 2]),
    ) {
        for (&number, &values) in self.numbers.iter().zip(&pair.values) {
            let exists = k.cmp(Pred::Le, number, self.last);
            let exists = k.and(exists, at.exists);
            body(k, number, &At { exists, ..*at }, values);
        }
    }
}

/// Shared memory for the operands of a stage of a product with `operands` operands a turn.
pub fn stage(k: &mut KernelBuilder, operands: u64) -> Val {
    k.shared(DType::I32, STAGE_TURNS * GROUPS * operands * 2 * 32 * 4)
}

/// Two rows of a tile, 8 apart, of one token.
pub struct Pair {
    /// The first of the rows.
    pub row: Val,
    /// The sums of both, of each tile of the warp.
    pub values: Vec<[Val; 2]>,
}

/// The products of a block with tokens `first .. first + 64` of `count`; `row_of` gives the row of x of a token. `product` has the warp's tiles
/// and the parts of the kernel for few. `epilogue` gets each token with the sums of its pair of rows; all threads of a warp come along.
pub fn products(
    k: &mut KernelBuilder,
    (product, stage): (&Product<'_>, Val),
    rows: &Rows,
    (first, count): (Val, Val),
    row_of: &mut dyn FnMut(&mut KernelBuilder, Val) -> Val,
    epilogue: &mut dyn FnMut(&mut KernelBuilder, &At, &Pair),
) {
    let groups = Groups { product, stage };
    let sums = groups.sums(k, rows, (first, count), row_of);
    for (g, sums) in (0..).zip(sums) {
        let sums = product.split_sums(k, &sums);
        let pair = k.mul_const(product.q(), 2);
        let token = k.add(first, pair);
        for j in 0..2 {
            let token = k.add_const(token, g * TOKENS + j);
            let exists = k.cmp(Pred::Lt, token, count);
            let values = sums.iter().map(|s| [s[j as usize], s[2 + j as usize]]).collect();
            epilogue(k, &At { token, exists }, &Pair { row: product.token(), values });
        }
    }
}

/// The groups of tokens of a block.
struct Groups<'a> {
    product: &'a Product<'a>,
    stage: Val,
}

impl Groups<'_> {
    /// The sums of all columns, of each group as [`Product::split_sums`] takes them.
    fn sums(
        &self,
        k: &mut KernelBuilder,
        rows: &Rows,
        (first, count): (Val, Val),
        row_of: &mut dyn FnMut(&mut KernelBuilder, Val) -> Val,
    ) -> Vec<Vec<Val>> {
        let product = self.product;
        let own_group = k.rem_const(product.warp(), GROUPS);
        let token = k.mul_const(own_group, TOKENS);
        let token = k.add(token, product.token());
        let token = k.add(token, first);
        let one = k.const_i64(1);
        let last = k.sub(count, one);
        let token = k.min_i64(token, last);
        let row = row_of(k, token);
        let x = load_row(k, rows, row, product.q());

        // the last tokens of a run are often few
        let half = k.add_const(first, HALF_GROUPS as u64 * TOKENS);
        let is_full = k.cmp(Pred::Lt, half, count);
        let all = product.all_turns();
        let (zero, end) = (k.const_i64(0), k.index(all));
        let no_sums = product.no_sums(k);
        let sums: Vec<Val> = (0..GROUPS).flat_map(|_| no_sums.clone()).collect();
        let codes = product.codes(k, zero).concat();
        let parts = product.part_turns() < all;
        let carried: Vec<Val> = [sums.clone(), if parts { sums.clone() } else { Vec::new() }, codes.clone()].concat();
        let left = k.for_carry((zero, end, STAGE_TURNS), &carried, |k, turn, carried| {
            k.barrier();
            self.fill(k, turn, (own_group, x));
            k.barrier();
            let stop = k.add_const(turn, STAGE_TURNS);
            let stop = k.min_i64(stop, end);
            k.for_carry((turn, stop, 1), carried, |k, t, carried| {
                let (own, rest) = carried.split_at(sums.len());
                let (before, codes) = rest.split_at(rest.len() - codes.len());
                let next = k.add_const(t, 1);
                let last = k.index(all - 1);
                let next = k.min_i64(next, last);
                let ahead = product.codes(k, next).concat();
                let (own, before) =
                    if parts { product.end_part(k, t, own, before) } else { (own.to_vec(), Vec::new()) };
                let own: Vec<Vec<Val>> = own.chunks(no_sums.len()).map(<[Val]>::to_vec).collect();
                let codes: Vec<Vec<Val>> =
                    codes.chunks(codes.len() / product.tiles.len()).map(<[Val]>::to_vec).collect();
                let within = k.sub(t, turn);
                let (less, more) = (own[..HALF_GROUPS].to_vec(), own.clone());
                let own = k.if_else(
                    is_full,
                    |k| self.turn(k, (t, within), &codes, more),
                    |k| [self.turn(k, (t, within), &codes, less), own[HALF_GROUPS..].concat()].concat(),
                );
                [own, before, ahead].concat()
            })
        });
        let (own, rest) = left.split_at(sums.len());
        let all: Vec<Val> = match parts {
            true => own.iter().zip(rest).map(|(&own, &before)| k.fadd(before, own)).collect(),
            false => own.to_vec(),
        };
        all.chunks(no_sums.len()).map(<[Val]>::to_vec).collect()
    }

    /// The sums of some groups after a turn.
    fn turn(
        &self,
        k: &mut KernelBuilder,
        (turn, within): (Val, Val),
        codes: &[Vec<Val>],
        mut sums: Vec<Vec<Val>>,
    ) -> Vec<Val> {
        for operand in 0..self.product.numbers().operands() {
            let b = |k: &mut KernelBuilder, g: usize| self.operand(k, (within, g as u64), operand);
            self.product.turn_sums_of_many(k, turn, codes, &b, &mut sums);
        }
        sums.concat()
    }

    /// Makes the operands of a stage: this warp those of one group, of some turns.
    fn fill(&self, k: &mut KernelBuilder, first: Val, (group, x): (Val, super::tile::Row)) {
        let own = k.div_const(self.product.warp(), GROUPS);
        for i in (0..STAGE_TURNS).step_by((WARPS / GROUPS) as usize) {
            let within = k.add_const(own, i);
            let turn = k.add(first, within);
            let make = |k: &mut KernelBuilder| {
                for (operand, b) in (0..).zip(self.product.tokens(k, turn, x)) {
                    for (half, b) in (0..).zip(b) {
                        let at = self.place(k, (within, group), operand, half);
                        let words = k.quad([b[0][0], b[0][1], b[1][0], b[1][1]]);
                        k.store(self.stage, at, words);
                    }
                }
            };
            if self.product.all_turns().is_multiple_of(STAGE_TURNS) {
                make(k);
            } else {
                let end = k.index(self.product.all_turns());
                let exists = k.cmp(Pred::Lt, turn, end);
                k.if_then(exists, make);
            }
        }
    }

    /// Where this thread's four words of a turn of the stage, group, operand and half turn lie.
    fn place(&self, k: &mut KernelBuilder, (turn, group): (Val, Val), operand: u64, half: u64) -> Val {
        let at = k.mul_const(turn, GROUPS);
        let at = k.add(at, group);
        let at = k.mul_const(at, self.product.numbers().operands());
        let at = k.add_const(at, operand);
        let at = k.mul_const(at, 2);
        let at = k.add_const(at, half);
        let at = k.mul_const(at, 32);
        let at = k.add(at, self.product.lane());
        k.mul_const(at, 4)
    }

    /// Operand B of a group in a turn of the stage.
    fn operand(&self, k: &mut KernelBuilder, (turn, group): (Val, u64), operand: u64) -> Operand {
        let group = k.index(group);
        [0, 1].map(|half| {
            let at = self.place(k, (turn, group), operand, half);
            let words = k.load(DType::I32, 4, self.stage, at);
            let [a, b, c, d] = [0, 1, 2, 3].map(|i| k.extract(words, i));
            [[a, b], [c, d]]
        })
    }
}
