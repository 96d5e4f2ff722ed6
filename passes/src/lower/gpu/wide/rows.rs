//! Rows of x as operands: packed by the body or made by a block, and which of them a block has.

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::layout::TURN_COLUMNS;

use super::super::super::matmul::{Rows, mean_rsqrt, row_ptr};
use super::super::fragments::Fragments;
use super::super::stage::own_ssq;
use super::super::tile::TOKENS as GROUP_TOKENS;
use super::super::{Place, begin, warp_sum};
use super::{LINE_WORDS, PIECES, ROWS_AT_ONCE, THREADS, Width};

/// Rows of x as operands that the body of a kernel hands to its tail.
#[derive(Clone, Copy, Debug)]
pub struct Packed {
    columns: u64,
    half: DType,
}

impl Packed {
    /// Of rows that are multiplied with such a matrix.
    pub fn of(fragments: &Fragments) -> Self {
        Self { columns: fragments.planes.columns, half: fragments.half() }
    }

    pub(super) const fn row_words(&self) -> u64 {
        self.columns.div_ceil(TURN_COLUMNS) * LINE_WORDS
    }

    /// What the body hands to the tail: a row of a task. Call it in both.
    pub fn rows(&self, k: &mut KernelBuilder) -> Val {
        k.partials(DType::I32, self.row_words())
    }

    /// The body: the task's row.
    pub fn body(&self, k: &mut KernelBuilder, rows: &Rows) {
        k.threads(THREADS as u32);
        let to = self.rows(k);
        begin(k);
        let (place, task) = (Place::here(k), k.task());
        let row = Row::of(k, rows, task, place.lane);
        let to = row_ptr(k, to, task, self.row_words());
        let end = k.index(self.row_words() / 4);
        k.for_each((place.thread, end, THREADS), |k, i| {
            let (turn, piece) = (k.div_const(i, PIECES), k.rem_const(i, PIECES));
            let words = row.piece(k, self, turn, piece);
            let at = k.mul_const(i, 4);
            k.store(to, at, words);
        });
    }
}

/// A row of x, and what it is multiplied with where it is normed.
pub(super) struct Row {
    x: Val,
    norm: Option<(Val, Val)>,
}

impl Row {
    /// Row `row`; all threads of a warp find its scale together.
    pub(super) fn of(k: &mut KernelBuilder, rows: &Rows, row: Val, lane: Val) -> Self {
        let base = k.param(rows.source());
        let x = row_ptr(k, base, row, rows.stride());
        let Rows::Normed(n) = rows else { return Self { x, norm: None } };
        let sum = own_ssq(k, n, lane, row);
        let sum = warp_sum(k, sum);
        Self { x, norm: Some((mean_rsqrt(k, sum, n.width, n.eps), k.param(n.gain))) }
    }

    /// Piece `piece` of turn `turn` as operand B: of a step of 16 columns the first or the second pair of each four that a thread has of a tile's row.
    fn piece(&self, k: &mut KernelBuilder, packed: &Packed, turn: Val, piece: Val) -> Val {
        let (half, within) = (k.div_const(piece, PIECES / 2), k.rem_const(piece, PIECES / 2));
        let (base, half, within) = (k.mul_const(turn, TURN_COLUMNS), k.mul_const(half, 32), k.mul_const(within, 2));
        let base = k.add(base, half);
        let ends = !packed.columns.is_multiple_of(TURN_COLUMNS);
        let words = [0, 8, 16, 24].map(|q| {
            let eight = k.add_const(base, q);
            let column = k.add(eight, within);
            if !ends {
                return self.pair(k, packed.half, column);
            }
            let (end, zero) = (k.index(packed.columns), k.const_i32(0));
            let exists = k.cmp(Pred::Lt, eight, end);
            k.if_else(exists, |k| vec![self.pair(k, packed.half, column)], |_| vec![zero])[0]
        });
        k.quad(words)
    }

    /// Two neighbouring columns.
    fn pair(&self, k: &mut KernelBuilder, half: DType, column: Val) -> Val {
        let mut x = k.load(DType::F32, 2, self.x, column);
        if let Some((scale, gain)) = self.norm {
            let (gain, one, scale) = (k.load(DType::F32, 2, gain, column), k.splat_f32(2, 1.0), k.splat(scale, 2));
            let gain = k.fadd(gain, one);
            x = k.fmul(x, scale);
            x = k.fmul(x, gain);
        }
        let [low, high] = [0, 1].map(|lane| k.extract(x, lane));
        k.pack(half, low, high)
    }
}

/// The tokens of a block: `first ..` of `count`.
pub(super) struct Tokens {
    pub(super) first: Val,
    pub(super) count: Val,
    /// Numbers of groups that may be multiplied, and whether each but the last is needed.
    pub(super) variants: Vec<u64>,
    pub(super) wants: Vec<Val>,
    /// How many tokens' lines are read.
    pub(super) lines: Val,
}

impl Tokens {
    pub(super) fn of(k: &mut KernelBuilder, width: Width, (first, count): (Val, Val)) -> Self {
        let (here, variants) = (k.sub(count, first), width.variants());
        let fewer = &variants[1..];
        let wants: Vec<Val> = fewer
            .iter()
            .map(|&n| {
                let fewer = k.index(n * GROUP_TOKENS);
                k.cmp(Pred::Gt, here, fewer)
            })
            .collect();
        let mut lines = k.index(variants[variants.len() - 1] * GROUP_TOKENS);
        for (&n, &wants) in variants.iter().zip(&wants).rev() {
            let more = k.index(n * GROUP_TOKENS);
            lines = k.select(wants, more, lines);
        }
        Self { first, count, variants, wants, lines }
    }

    /// The token of line `line`, or the last one.
    pub(super) fn token(&self, k: &mut KernelBuilder, line: Val) -> Val {
        let one = k.const_i64(1);
        let (token, last) = (k.add(self.first, line), k.sub(self.count, one));
        k.min_i64(token, last)
    }
}

/// The part of a thread in what a block copies: a piece of some lines.
pub(super) struct Copier {
    piece: Val,
    /// Numbers of its lines, and whether they are read.
    pub(super) lines: Vec<(Val, Val)>,
    /// Where its piece of its first line lies among the words of a turn: that of the others as far behind as they are.
    at: Val,
}

impl Copier {
    pub(super) fn of(k: &mut KernelBuilder, width: Width, place: Place, tokens: &Tokens) -> Self {
        let (line, piece) = (k.div_const(place.thread, PIECES), k.rem_const(place.thread, PIECES));
        let lines = (0..width.tokens()).step_by(ROWS_AT_ONCE as usize).map(|from| {
            let line = k.add_const(line, from);
            (line, k.cmp(Pred::Lt, line, tokens.lines))
        });
        let lines = lines.collect();
        let eight = k.rem_const(line, 8);
        let place = k.xor(piece, eight);
        let (at, place) = (k.mul_const(line, LINE_WORDS), k.mul_const(place, 4));
        Self { piece, lines, at: k.add(at, place) }
    }

    /// Copies its pieces of turn `turn` of packed rows to lines that begin at a word.
    pub(super) fn copy(&self, k: &mut KernelBuilder, rows: &[Val], turn: Val, (lines, lines_at): (Val, Val)) {
        let from = k.mul_const(turn, PIECES);
        let from = k.add(from, self.piece);
        let from = k.mul_const(from, 4);
        for (i, (&row, &(_, is_read))) in rows.iter().zip(&self.lines).enumerate() {
            let to = self.place(k, lines_at, i);
            k.if_then(is_read, |k| k.copy_async((lines, to), (row, from)));
        }
    }

    /// Makes its pieces of turn `turn` of rows that are not packed yet.
    pub(super) fn make(
        &self,
        k: &mut KernelBuilder,
        packed: &Packed,
        rows: &[Row],
        turn: Val,
        (lines, lines_at): (Val, Val),
    ) {
        for (i, (row, &(_, is_read))) in rows.iter().zip(&self.lines).enumerate() {
            let to = self.place(k, lines_at, i);
            k.if_then(is_read, |k| {
                let words = row.piece(k, packed, turn, self.piece);
                k.store(lines, to, words);
            });
        }
    }

    /// Where its piece of line number `i` of its own lies.
    fn place(&self, k: &mut KernelBuilder, turn_at: Val, i: usize) -> Val {
        let at = k.add(turn_at, self.at);
        k.add_const(at, i as u64 * ROWS_AT_ONCE * LINE_WORDS)
    }
}

/// Where the products of a block's tokens go: the row of each line, in shared memory; of lines without a token that of the last.
#[derive(Clone, Copy)]
pub(super) struct OutRows {
    rows: Val,
    width: Width,
}

impl OutRows {
    pub(super) fn alloc(k: &mut KernelBuilder, width: Width) -> Self {
        Self { rows: k.shared(DType::I32, width.tokens()), width }
    }

    /// Finds them, for after the next barrier; `row_to` gives the row of a token.
    pub(super) fn find(&self, k: &mut KernelBuilder, place: Place, tokens: &Tokens, row_to: &mut RowOf<'_>) {
        let end = k.index(self.width.tokens());
        let works = k.cmp(Pred::Lt, place.thread, end);
        k.if_then(works, |k| {
            let token = tokens.token(k, place.thread);
            let row = row_to(k, token);
            let row = k.narrow(row);
            k.store(self.rows, place.thread, row);
        });
    }

    pub(super) fn of(&self, k: &mut KernelBuilder, line: Val) -> Val {
        k.load_index(self.rows, line)
    }
}

/// Gives the row of a token.
pub type RowOf<'e> = dyn FnMut(&mut KernelBuilder, Val) -> Val + 'e;

/// The row of a token where tokens are rows.
pub fn same(_: &mut KernelBuilder, token: Val) -> Val {
    token
}
