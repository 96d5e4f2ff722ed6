//! Rows of x as operands of products: made once by all threads of a block, and kept in shared memory for its warps.
//!
//! ahead    a thread's share of the gain, which depends on nothing
//! fill     x and its sums of squares, asked for together; then a thread norms and packs eight columns of a token at a time
//! operand  16 bytes of shared memory a half turn
//! layout   a token after the other: of each operand, turn, half turn and quarter of it four words
//! traffic  a row of x once a block, however many warps there are

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::layout::TURN_COLUMNS;
use nextc_ir::shape::{LANES, pad};
use nextc_ir::{DType, Target};

use super::super::matmul::{Normed, Rows, mean_rsqrt, row_ptr};
use super::fragments::Numbers;
use super::tile::{Operand, Product, TOKENS};
use super::{Place, tree_sum, warp_sum};

/// Columns of a thread and turn of [`Stage::fill`].
const EIGHT: u64 = 8;
/// Tokens whose rows are asked for together, where there are several.
const AT_ONCE: u64 = 2;
/// Words of a turn of one operand.
const TURN_WORDS: u64 = TURN_COLUMNS / 2;
/// Words between two tokens that keep the threads of a product in different banks.
const GAP: u64 = 16;

/// How the operands of one kind of product lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    /// Columns of a row.
    pub columns: u64,
    /// What the operands are made of.
    pub numbers: Numbers,
}

impl Form {
    /// That of a product.
    pub const fn of(product: &Product<'_>) -> Self {
        Self { columns: product.fragments.planes.columns, numbers: product.numbers() }
    }

    /// The same with rows of x as sums of two 16-bit floats.
    #[must_use]
    pub fn precise(self) -> Self {
        Self { numbers: Numbers { split: true, ..self.numbers }, ..self }
    }

    const fn turns(&self) -> u64 {
        self.columns.div_ceil(TURN_COLUMNS)
    }

    /// Words from one token to the next.
    const fn token_words(&self) -> u64 {
        self.turns() * TURN_WORDS * self.numbers.operands() + GAP
    }
}

/// Shared memory for the operands of eight tokens in any of some forms, where there is room for two such blocks on a multiprocessor.
pub fn alloc(k: &mut KernelBuilder, target: &Target, forms: &[Form]) -> Option<Val> {
    let words = TOKENS * forms.iter().map(Form::token_words).max()?;
    let room = target.gpu.map_or(0, |gpu| gpu.shared_bytes / 2);
    (words * 4 < room).then(|| k.shared(DType::I32, words))
}

/// The operands of eight tokens.
pub struct Stage<'a> {
    form: Form,
    rows: &'a Rows,
    words: Val,
    place: Place,
    threads: u64,
}

/// A thread's share of the gain, by turn of [`Stage::fill`].
pub type Gain = Vec<[Val; 2]>;

impl<'a> Stage<'a> {
    /// Of rows of x, by a block of `threads` threads, in memory from [`alloc`].
    pub const fn new(form: Form, rows: &'a Rows, words: Val, (place, threads): (Place, u64)) -> Self {
        Self { form, rows, words, place, threads }
    }

    /// Columns with those that fill up the last turn.
    const fn padded(&self) -> u64 {
        self.form.turns() * TURN_COLUMNS
    }

    /// This thread's first column in each turn of the block over a row, and whether there is one where that is not certain.
    fn columns(&self, k: &mut KernelBuilder) -> Vec<(Val, Option<Val>)> {
        let own = k.mul_const(self.place.thread, EIGHT);
        let block = self.threads * EIGHT;
        (0..self.padded())
            .step_by(block as usize)
            .map(|from| {
                let column = k.add_const(own, from);
                let exists = (from + block > self.padded()).then(|| {
                    let end = k.index(self.padded());
                    k.cmp(Pred::Lt, column, end)
                });
                (column, exists)
            })
            .collect()
    }

    /// The eight numbers of a row from `column` on as two vectors; zeros beyond the row.
    fn eight(&self, k: &mut KernelBuilder, from: Val, column: Val) -> [Val; 2] {
        let load = |k: &mut KernelBuilder| {
            let second = k.add_const(column, EIGHT / 2);
            vec![k.load(DType::F32, 4, from, column), k.load(DType::F32, 4, from, second)]
        };
        let both =
            if self.threads * EIGHT <= self.form.columns && self.form.columns.is_multiple_of(self.threads * EIGHT) {
                load(k)
            } else {
                let (end, zero) = (k.index(self.form.columns), k.splat_f32(4, 0.0));
                let inside = k.cmp(Pred::Lt, column, end);
                k.if_else(inside, load, |_| vec![zero; 2])
            };
        [both[0], both[1]]
    }

    /// Asks for this thread's share of the gain, which depends on nothing.
    pub fn gain(&self, k: &mut KernelBuilder) -> Gain {
        let Rows::Normed(n) = self.rows else { return Vec::new() };
        let (gain, columns) = (k.param(n.gain), self.columns(k));
        columns.into_iter().map(|(column, _)| self.eight(k, gain, column)).collect()
    }

    /// Makes the operands of `count` tokens, at most eight; `row_of` gives the row of x of each. Nobody may still read those before.
    pub fn fill(
        &self,
        k: &mut KernelBuilder,
        gain: &Gain,
        count: Val,
        row_of: &mut dyn FnMut(&mut KernelBuilder, Val) -> Val,
    ) {
        let (zero, one) = (k.const_i64(0), k.const_i64(1));
        let is_one = k.cmp(Pred::Eq, count, one);
        let last = k.sub(count, one);
        let row_of = std::cell::RefCell::new(row_of);
        k.if_else(
            is_one,
            |k| {
                let row = (row_of.borrow_mut())(k, zero);
                self.some(k, gain, &[(zero, row)]);
                Vec::new()
            },
            |k| {
                k.for_each((zero, count, AT_ONCE), |k, first| {
                    let tokens: Vec<(Val, Val)> = (0..AT_ONCE)
                        .map(|i| {
                            let place = k.add_const(first, i);
                            let token = k.min_i64(place, last);
                            (place, (row_of.borrow_mut())(k, token))
                        })
                        .collect();
                    self.some(k, gain, &tokens);
                });
                Vec::new()
            },
        );
    }

    /// The operands of some tokens, given by their place and row.
    fn some(&self, k: &mut KernelBuilder, gain: &Gain, tokens: &[(Val, Val)]) {
        let base = k.param(self.rows.source());
        let (columns, one) = (self.columns(k), k.splat_f32(4, 1.0));
        let sums: Vec<Val> = match self.rows {
            Rows::Plain { .. } => Vec::new(),
            Rows::Normed(n) => tokens.iter().map(|&(_, row)| own_ssq(k, n, self.place.lane, row)).collect(),
        };
        let loaded: Vec<Vec<[Val; 2]>> = tokens
            .iter()
            .map(|&(_, row)| {
                let x = row_ptr(k, base, row, self.rows.stride());
                columns.iter().map(|&(column, _)| self.eight(k, x, column)).collect()
            })
            .collect();
        for (t, (&(place, _), loaded)) in tokens.iter().zip(&loaded).enumerate() {
            let scale = match self.rows {
                Rows::Plain { .. } => None,
                Rows::Normed(n) => {
                    let sum = warp_sum(k, sums[t]);
                    let scale = mean_rsqrt(k, sum, n.width, n.eps);
                    Some(k.splat(scale, 4))
                }
            };
            for (i, (&(column, exists), &x)) in columns.iter().zip(loaded).enumerate() {
                let x = match scale {
                    None => x,
                    Some(scale) => [0, 1].map(|j: usize| {
                        let (x, gain) = (k.fmul(x[j], scale), k.fadd(gain[i][j], one));
                        k.fmul(x, gain)
                    }),
                };
                match exists {
                    None => self.put(k, place, column, x),
                    Some(exists) => k.if_then(exists, |k| self.put(k, place, column, x)),
                }
            }
        }
    }

    /// Packs eight numbers of a token.
    fn put(&self, k: &mut KernelBuilder, token: Val, column: Val, x: [Val; 2]) {
        let steps = x.map(|x| [0, 1, 2, 3].map(|i| k.extract(x, i)));
        let at = k.mul_const(token, self.form.token_words());
        let own = k.div_const(column, 2);
        let at = k.add(at, own);
        for (operand, w) in (0..).zip(self.form.numbers.pack(k, steps)) {
            let at = k.add_const(at, operand * self.form.turns() * TURN_WORDS);
            let words = k.quad([w[0][0], w[0][1], w[1][0], w[1][1]]);
            k.store(self.words, at, words);
        }
    }

    /// Operand B of a turn, once or twice, of the token at a place: the part that threads with number `q` of four hold.
    pub fn operands(&self, k: &mut KernelBuilder, (token, q): (Val, Val), turn: Val) -> Vec<Operand> {
        let at = k.mul_const(token, self.form.token_words());
        let own = k.mul_const(q, 4);
        let at = k.add(at, own);
        let turn = k.mul_const(turn, TURN_WORDS);
        let at = k.add(at, turn);
        (0..self.form.numbers.operands())
            .map(|operand| {
                [0, 1].map(|half| {
                    let at = k.add_const(at, operand * self.form.turns() * TURN_WORDS + half * TURN_WORDS / 2);
                    let words = k.load(DType::I32, 4, self.words, at);
                    let [a, b, c, d] = [0, 1, 2, 3].map(|i| k.extract(words, i));
                    [[a, b], [c, d]]
                })
            })
            .collect()
    }
}

/// Vectors of sums of squares that a warp reads at once.
const WARP_PARTS: u64 = 4 * 32;

/// What thread `lane` of a warp has of a row's sum of squares: [`warp_sum`] of it is the sum.
pub fn own_ssq(k: &mut KernelBuilder, n: &Normed, lane: Val, row: Val) -> Val {
    let parts = pad(n.width.div_ceil(LANES));
    let ssq = k.param(n.ssq);
    let (ssq, own) = (row_ptr(k, ssq, row, parts), k.mul_const(lane, 4));
    let zeros = k.splat_f32(4, 0.0);
    let sum = (0..parts).step_by(WARP_PARTS as usize).fold(None, |sum, from| {
        let at = k.add_const(own, from);
        let x = if from + WARP_PARTS <= parts {
            k.load(DType::F32, 4, ssq, at)
        } else {
            let end = k.index(parts);
            let exists = k.cmp(Pred::Lt, at, end);
            k.if_else(exists, |k| vec![k.load(DType::F32, 4, ssq, at)], |_| vec![zeros])[0]
        };
        Some(sum.map_or(x, |sum| k.fadd(sum, x)))
    });
    k.reduce_add(sum.unwrap_or(zeros))
}

/// The same sum by the four threads that read a row together, of which this is number `q`: each adds up what eight threads of a warp have.
pub fn quad_ssq(k: &mut KernelBuilder, n: &Normed, (row, q): (Val, Val)) -> Val {
    let parts = pad(n.width.div_ceil(LANES));
    let ssq = k.param(n.ssq);
    let (ssq, own) = (row_ptr(k, ssq, row, parts), k.mul_const(q, 4));
    let nothing = k.const_f32(0.0);
    let mut sums: Vec<Val> = (0..parts.min(WARP_PARTS))
        .step_by(16)
        .map(|first| {
            let vectors = (first..parts).step_by(WARP_PARTS as usize);
            let sum = vectors.fold(None, |sum: Option<Val>, from| {
                let at = k.add_const(own, from);
                let x = k.load(DType::F32, 4, ssq, at);
                Some(sum.map_or(x, |sum| k.fadd(sum, x)))
            });
            sum.map_or(nothing, |sum| k.reduce_add(sum))
        })
        .collect();
    sums.resize(8, nothing);
    let sum = tree_sum(k, sums);
    super::across(k, &[2, 1], sum, |k, a, b| k.fadd(a, b))
}
