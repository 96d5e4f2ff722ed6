//! Products of many rows by groups of four warps ([`KOp::MmaGroup`](nextc_ir::kernel::KOp::MmaGroup)), for weights with scales. What [`super::many`] does for others.
//!
//! pack     a block a row of x: norms it and makes it operand B, in lines of 128 bytes a turn; handed to the tail
//! task     12 tiles of weight rows, one a warp, by 80 to 96 tokens ([`Width`]); then the next 12, some goes
//! ring     codes and operands come into shared memory two turns at a time, some stages ahead of their use, also over the end of a go
//! products `mma_group`: four warps' tiles in registers times the tokens in shared memory, a block of columns at a time from zeros; then `sum += scale · part`
//!          in registers, the columns in the parts and the order of [`tile`](super::tile): a token has the bits that it has in a step of few
//! epilogue a thread has rows `r` and `r + 8` of its tile, or row `r` of two matrices, of two tokens of each group of eight
//! traffic  each weight once for so many tokens, each row of x once for 12 tiles; bound by products and the scaling of their sums, three groups of warps of which
//!          one multiplies while others scale
//!
//! Where a row is short ([`X::Plain`]), it is made operand B in shared memory by the block that multiplies it, once for all its goes.

mod codes;
pub mod experts;
pub mod linears;
mod rows;
mod sums;
mod tiles;

use nextc_ir::kernel::{Kernel, KernelBuilder, Pred, Val};
use nextc_ir::layout::TURN_COLUMNS;
use nextc_ir::schedule::Extent;
use nextc_ir::{DType, Target};

use super::super::matmul::{Rows, row_ptr};
use super::Place;
use super::few::At;
use super::fragments::Fragments;
use super::tile::{Product, TOKENS as GROUP_TOKENS};
pub use codes::Own;
use codes::{Codes, LEAST_STAGES, Ring, code_bytes, stages_in};
use rows::{Copier, OutRows, Row, Tokens};
pub use rows::{Packed, RowOf, same};
use sums::Sums;
pub use tiles::{PAIRS, Tiles};

/// Warps of a block, each with a tile.
pub const WARPS: u64 = 12;
/// Threads of a block.
pub const THREADS: u64 = WARPS * 32;
/// Tokens of a block, in groups of eight: as many as leave each thread registers enough.
#[derive(Clone, Copy, Debug)]
pub struct Width(u64);

impl Width {
    /// Of plain projections.
    pub const PLAIN: Self = Self(11);
    /// Of two matrices at once.
    pub const PAIRS: Self = Self(10);
    /// Of products without parts, which need a third fewer sums.
    pub const WHOLE: Self = Self(12);
    /// Numbers of groups that are multiplied where there are no more tokens.
    const FEWER: [u64; 3] = [10, 5, 2];

    /// Tokens.
    pub const fn tokens(self) -> u64 {
        self.0 * GROUP_TOKENS
    }

    /// Blocks over `rows` tokens.
    pub fn token_blocks(self, rows: impl Into<Extent>) -> Extent {
        rows.into().ceil_div(self.tokens())
    }

    /// Which tokens and which of `shares` shares of tiles a task is about: the first token, and the share.
    pub fn block_of(self, k: &mut KernelBuilder, task: Val, shares: u64) -> (Val, Val) {
        let (block, share) = (k.div_const(task, shares), k.rem_const(task, shares));
        (k.mul_const(block, self.tokens()), share)
    }

    /// How many groups may be multiplied: all, or fewer.
    fn variants(self) -> Vec<u64> {
        std::iter::once(self.0).chain(Self::FEWER.into_iter().filter(|&n| n < self.0)).collect()
    }

    /// Words of the tokens' lines of one turn.
    const fn turn_words(self) -> u64 {
        self.tokens() * LINE_WORDS
    }

    /// Bytes of the lines of a stage.
    const fn line_bytes(self) -> u64 {
        STAGE_TURNS * self.turn_words() * 4
    }

    /// Sums of a tile that a thread has.
    const fn sums(self) -> usize {
        4 * self.0 as usize
    }

    /// Bytes that a block has for its ring.
    fn room(self, target: &Target) -> u64 {
        // beside it lie where products go, and what each array is aligned to
        let beside = self.tokens() * 4 + 2 * Kernel::SWIZZLED_ALIGN;
        target.gpu.map_or(0, |gpu| gpu.shared_bytes.saturating_sub(beside))
    }
}

/// Turns of a stage.
const STAGE_TURNS: u64 = 2;
/// Words of a token's line, which is a turn of its row.
const LINE_WORDS: u64 = TURN_COLUMNS / 2;
/// Pieces of 16 bytes of a line.
const PIECES: u64 = LINE_WORDS / 4;
/// Rows of which all threads copy a piece.
const ROWS_AT_ONCE: u64 = THREADS / PIECES;

/// Begins a block in a tail.
pub fn begin_block(k: &mut KernelBuilder) -> Place {
    // what comes next would take room from the blocks that are still to come
    k.wait();
    Place::here(k)
}

/// True if such blocks multiply matrices of these fragments.
pub fn covers<'a>(target: &Target, width: Width, matrices: impl IntoIterator<Item = &'a Fragments>) -> bool {
    let fits = |m: &Fragments| stages_in(width.room(target), code_bytes(m) + width.line_bytes()) >= LEAST_STAGES;
    matrices.into_iter().all(|m| is_scaled(m) && fits(m))
}

/// The same where the block makes operands of its rows itself.
pub fn covers_plain<'a>(
    target: &Target,
    width: Width,
    matrices: impl IntoIterator<Item = &'a Fragments> + Clone,
) -> bool {
    let turns = matrices.clone().into_iter().map(|m| m.planes.turns()).max().unwrap_or(0);
    let left = width.room(target).saturating_sub(resident_bytes(width, turns));
    matrices.into_iter().all(|m| is_scaled(m) && stages_in(left, code_bytes(m)) >= LEAST_STAGES)
}

/// Bytes of the lines of all turns, at least so many that the array is aligned as products want it.
fn resident_bytes(width: Width, turns: u64) -> u64 {
    (turns * width.turn_words() * 4).max(Kernel::SWIZZLED_BYTES)
}

/// True for weights with scales, which are multiplied as single 16-bit floats.
fn is_scaled(m: &Fragments) -> bool {
    m.planes.format.blocks().is_some() && !m.numbers().split
}

/// Shared memory of a block.
#[derive(Clone, Copy)]
pub struct Memory {
    ring: Ring,
    out_rows: OutRows,
}

impl Memory {
    /// For matrices of these fragments and rows that come packed.
    pub fn alloc<'a>(
        k: &mut KernelBuilder,
        (target, width): (&Target, Width),
        matrices: impl IntoIterator<Item = &'a Fragments>,
    ) -> Self {
        let code_bytes = matrices.into_iter().map(code_bytes).max().unwrap_or(0);
        let stages = stages_in(width.room(target), code_bytes + width.line_bytes());
        let lines = k.shared(DType::I32, stages * width.line_bytes() / 4);
        let codes = k.shared(DType::I32, stages * code_bytes / 4);
        let ring = Ring { width, codes, lines, resident: false, stages };
        Self { ring, out_rows: OutRows::alloc(k, width) }
    }

    /// For matrices of these fragments and rows that each block makes operands of itself.
    pub fn resident<'a>(
        k: &mut KernelBuilder,
        (target, width): (&Target, Width),
        matrices: impl IntoIterator<Item = &'a Fragments> + Clone,
    ) -> Self {
        let turns = matrices.clone().into_iter().map(|m| m.planes.turns()).max().unwrap_or(0);
        let code_bytes = matrices.into_iter().map(code_bytes).max().unwrap_or(0);
        let bytes = resident_bytes(width, turns);
        let stages = stages_in(width.room(target) - bytes, code_bytes);
        let lines = k.shared(DType::I32, bytes / 4);
        let codes = k.shared(DType::I32, stages * code_bytes / 4);
        let ring = Ring { width, codes, lines, resident: true, stages };
        Self { ring, out_rows: OutRows::alloc(k, width) }
    }
}

/// Rows of x.
#[derive(Clone, Copy)]
pub enum X<'a> {
    /// That the body packed.
    Packed(Packed, Val),
    /// That the block makes operands.
    Plain(&'a Rows),
}

/// The work of a block: some tokens times some times 12 tiles, or as many of two matrices.
pub struct Block<'a> {
    /// The matrix, or one of two alike.
    pub fragments: &'a Fragments,
    /// Warps that share the columns in the kernel for few.
    pub warps: u64,
    /// The thread.
    pub place: Place,
    /// Shared memory.
    pub memory: Memory,
    /// What is multiplied.
    pub x: X<'a>,
    /// The tokens: from the first on, before the second.
    pub range: (Val, Val),
}

/// Which tiles a block takes.
pub struct Goes<'a> {
    /// How often 12, if not once.
    pub count: Option<Val>,
    /// The warp's rows of weights in a go.
    pub own: &'a dyn Fn(&mut KernelBuilder, Val) -> Own,
}

impl Block<'_> {
    /// The products of tokens each of which is a row of x and of the products.
    pub fn of_tokens<A>(
        &self,
        k: &mut KernelBuilder,
        goes: &Goes<'_>,
        ask: impl FnMut(&mut KernelBuilder, Val, &At) -> A,
        epilogue: impl FnMut(&mut KernelBuilder, Val, &At, [Val; 2], A),
    ) {
        self.products(k, goes, (&mut same, &mut same), ask, epilogue);
    }

    /// The products: `row_of` gives the row of x of a token, `row_to` that of its products. In each go what `ask` reads of each pair of products (it gets the go and the place of one) is asked
    /// for before `epilogue` gets the first. All threads of a warp come along.
    pub fn products<A>(
        &self,
        k: &mut KernelBuilder,
        goes: &Goes<'_>,
        (row_of, row_to): (&mut RowOf<'_>, &mut RowOf<'_>),
        mut ask: impl FnMut(&mut KernelBuilder, Val, &At) -> A,
        mut epilogue: impl FnMut(&mut KernelBuilder, Val, &At, [Val; 2], A),
    ) {
        let (place, ring, width) = (self.place, self.memory.ring, self.memory.ring.width);
        let tokens = Tokens::of(k, width, self.range);
        let out_rows = self.memory.out_rows;
        out_rows.find(k, place, &tokens, row_to);
        let codes = Codes { fragments: self.fragments, ring, place };
        let all = self.fragments.planes.turns();
        let stages = all.div_ceil(STAGE_TURNS);
        let (zero, end) = (k.const_i64(0), k.index(all));
        let all_stages = match goes.count {
            Some(count) => k.mul_const(count, stages),
            None => k.index(stages),
        };
        let copier = Copier::of(k, width, place, &tokens);
        let rows: Vec<Val> = copier
            .lines
            .iter()
            .map(|&(line, _)| {
                let token = tokens.token(k, line);
                row_of(k, token)
            })
            .collect();
        let lines: Option<Vec<Val>> = match self.x {
            X::Packed(packed, base) => {
                Some(rows.iter().map(|&row| row_ptr(k, base, row, packed.row_words())).collect())
            }
            X::Plain(_) => None,
        };
        let ask_for = |k: &mut KernelBuilder, number: Val| {
            let exists = k.cmp(Pred::Lt, number, all_stages);
            k.if_then(exists, |k| {
                let (go, stage) = match goes.count {
                    Some(_) => (k.div_const(number, stages), k.rem_const(number, stages)),
                    None => (zero, number),
                };
                let (slot, turn) = (k.rem_const(number, ring.stages), k.mul_const(stage, STAGE_TURNS));
                let own = (goes.own)(k, go);
                each_turn(k, all, turn, Vec::new(), |k, i, t, _| {
                    codes.copy(k, own, t, (slot, i));
                    if let Some(lines) = &lines {
                        let to = ring.lines_at(k, (slot, i), t);
                        copier.copy(k, lines, t, (ring.lines, to));
                    }
                    Vec::new()
                });
            });
            k.copy_commit();
        };
        for stage in 0..ring.stages - 1 {
            let number = k.index(stage);
            ask_for(k, number);
        }
        if let X::Plain(x) = self.x {
            let packed = Packed::of(self.fragments);
            let rows: Vec<Row> = rows.iter().map(|&row| Row::of(k, x, row, place.lane)).collect();
            k.for_each((zero, end, 1), |k, turn| {
                let to = k.mul_const(turn, width.turn_words());
                copier.make(k, &packed, &rows, turn, (ring.lines, to));
            });
            k.barrier();
        }
        let mut run = |k: &mut KernelBuilder, go: Val| {
            let own = (goes.own)(k, go);
            let (Own::Tile(tile) | Own::Both([tile, _])) = own;
            let product = Product::new(k, self.fragments, vec![tile], place, self.warps);
            let none = Sums::none(k, width, &product).carried();
            let begin = k.mul_const(go, stages);
            let sums = k.for_carry((zero, end, STAGE_TURNS), &none, |k, turn, sums| {
                k.copy_wait(ring.stages as u32 - 2);
                // beside lines, neighbouring warps may have copied codes for each other
                if !ring.resident {
                    k.barrier();
                }
                let stage = k.div_const(turn, STAGE_TURNS);
                let number = k.add(begin, stage);
                let next = k.add_const(number, ring.stages - 1);
                ask_for(k, next);
                let slot = k.rem_const(number, ring.stages);
                each_turn(k, all, turn, sums.to_vec(), |k, i, t, sums| {
                    let words = codes.load(k, own, (slot, i));
                    let blocks = codes.blocks(k, &product, own, t, &words);
                    let b = (ring.lines, ring.lines_at(k, (slot, i), t));
                    Sums::of(width, &sums).turn(k, &product, ((i, t), &blocks), (&tokens, b)).carried()
                })
            });
            let sums = Sums::of(width, &sums).total(k);
            let places: Vec<At> = lines_of(k, width, product.q())
                .into_iter()
                .map(|line| {
                    let token = k.add(tokens.first, line);
                    At { token: out_rows.of(k, line), exists: k.cmp(Pred::Lt, token, tokens.count) }
                })
                .collect();
            let asked: Vec<A> = places.iter().map(|at| ask(k, go, at)).collect();
            let pairs = sums.chunks(4).flat_map(|s| [[s[0], s[2]], [s[1], s[3]]]);
            for ((at, pair), asked) in places.iter().zip(pairs).zip(asked) {
                epilogue(k, go, at, pair, asked);
            }
        };
        match goes.count {
            Some(count) => k.for_each((zero, count, 1), run),
            None => run(k, zero),
        }
    }
}

/// The lines of the tokens of which a thread has sums, two of each group.
fn lines_of(k: &mut KernelBuilder, width: Width, q: Val) -> Vec<Val> {
    let pair = k.mul_const(q, 2);
    (0..width.sums() as u64 / 2).map(|i| k.add_const(pair, i / 2 * GROUP_TOKENS + i % 2)).collect()
}

/// The turns of a stage that begins with `turn`: runs `body(k, place in the stage, turn)` for each that there is.
fn each_turn(
    k: &mut KernelBuilder,
    all: u64,
    turn: Val,
    carried: Vec<Val>,
    mut body: impl FnMut(&mut KernelBuilder, u64, Val, Vec<Val>) -> Vec<Val>,
) -> Vec<Val> {
    (0..STAGE_TURNS).fold(carried, |carried, i| {
        let t = k.add_const(turn, i);
        if i == 0 || all.is_multiple_of(STAGE_TURNS) {
            return body(k, i, t, carried);
        }
        let end = k.index(all);
        let exists = k.cmp(Pred::Lt, t, end);
        let otherwise = carried.clone();
        k.if_else(exists, |k| body(k, i, t, carried), |_| otherwise)
    })
}
