//! Products of few rows: eight at a time.
//!
//! task     some tiles of weight rows, for all rows that there are
//! ahead    the warps' first codes and scales and the threads' gains into registers, the rest of the tiles towards L2 where that holds those of all blocks at work
//! stage    the operands of eight rows in shared memory ([`stage`]), where there is room; else each thread reads its own
//! products the warps share the columns; their sums meet in shared memory and are added up in order
//! epilogue a half warp has the 16 rows of a tile, of one token
//! traffic  each weight once for eight rows: bound by memory

use nextc_ir::Target;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::{LANES, Sym};

use super::super::matmul::{Rows, mean_rsqrt, row_ptr};
use super::Place;
use super::stage::{self, Form, Gain, Stage, quad_ssq};
use super::tile::{Ahead, Product, Row, Source, Split, TOKENS, sum_of};

/// The row of x that a thread reads, after the prologue. Threads `4n .. 4n + 4` read the same row together: `q` is the thread's part of it.
pub fn load_row(k: &mut KernelBuilder, rows: &Rows, row: Val, q: Val) -> Row {
    let x = rows.source();
    let base = k.param(x);
    let x = row_ptr(k, base, row, rows.stride());
    let Rows::Normed(n) = rows else { return Row { x, norm: None } };
    let gain = k.param(n.gain);
    let sum = quad_ssq(k, n, (row, q));
    Row { x, norm: Some((mean_rsqrt(k, sum, n.width, n.eps), gain)) }
}

/// Shared memory of a block.
#[derive(Clone, Copy)]
pub struct Memory {
    /// The sums of its warps.
    sums: Val,
    /// Operands.
    operands: Option<Val>,
    /// Bytes that the block may ask for towards L2: two blocks of each multiprocessor fill it with as many.
    near: u64,
}

impl Memory {
    /// For products split in a way, whose operands have one of some forms.
    pub fn alloc(k: &mut KernelBuilder, target: &Target, split: Split, forms: &[Form]) -> Self {
        let near = target.gpu.map_or(0, |gpu| gpu.l2_bytes / (2 * target.multiprocessors()));
        Self { sums: split.shared(k), operands: stage::alloc(k, target, forms), near }
    }

    /// Makes the operands of all `count` rows, of which there are few, if there is room for them. Gives whether there is.
    pub fn fill(self, k: &mut KernelBuilder, (form, rows): (Form, &Rows), block: (Place, u64), count: Val) -> bool {
        let Some(words) = self.operands else { return false };
        let stage = Stage::new(form, rows, words, block);
        let gain = stage.gain(k);
        stage.fill(k, &gain, count, &mut |_, row| row);
        true
    }
}

/// One number of a product: of one tile (by its number in the block), token and row.
pub struct Sum {
    /// The token among the eight.
    pub token: Val,
    /// The row of the tile.
    pub row: Val,
    /// Of each tile of the block that is asked for.
    pub values: Vec<Val>,
}

/// The token of a sum.
#[derive(Clone, Copy, Debug)]
pub struct At {
    /// Its number among those of the product.
    pub token: Val,
    /// Whether there is such a token.
    pub exists: Val,
}

/// How many blocks share the rows of a step, of which each takes eight in turn: where a matrix has few tiles, so that all of the machine works.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    /// Blocks for all rows, and how many times as many there are at most.
    blocks: u64,
    most: u64,
}

/// Which rows a block takes.
#[derive(Clone, Copy)]
pub struct Share {
    number: Val,
    of: u64,
}

impl Spread {
    /// Of a kernel with so many blocks for all rows.
    pub fn of(target: &Target, blocks: u64) -> Self {
        Self { blocks, most: (2 * target.multiprocessors() / blocks).max(1) }
    }

    /// The grid.
    pub fn grid(&self, rows: Sym) -> Extent {
        Extent::from(rows).ceil_div(TOKENS).min(self.most.into()) * self.blocks.into()
    }

    /// The number of this block among those for all rows, and its share.
    pub fn block(&self, k: &mut KernelBuilder) -> (Val, Share) {
        let task = k.task();
        (k.rem_const(task, self.blocks), Share { number: k.div_const(task, self.blocks), of: self.most })
    }
}

/// The products of a block with some rows.
pub struct Few<'a> {
    product: Product<'a>,
    split: Split,
    rows: &'a Rows,
    sums: Val,
    stage: Option<Stage<'a>>,
    near: u64,
    /// Most rows.
    most: u64,
    /// Its share of the rows, where several blocks share them.
    share: Option<Share>,
    /// Whether the operands are made already, of rows by their number.
    filled: bool,
}

/// What has been asked for before the wait.
pub struct Asked {
    codes: Option<Ahead>,
    gain: Gain,
}

/// Gets each sum with its token; all threads of a warp come along.
pub type Epilogue<'e> = dyn FnMut(&mut KernelBuilder, &At, &Sum) + 'e;
/// Gives the row of x of a token.
pub type RowOf<'e> = dyn FnMut(&mut KernelBuilder, Val) -> Val + 'e;

impl<'a> Few<'a> {
    /// Of a product in a block's memory.
    pub fn new(product: Product<'a>, split: Split, rows: &'a Rows, memory: Memory) -> Self {
        let form = Form::of(&product);
        let block = (product.place(), split.threads().into());
        let stage = memory.operands.map(|words| Stage::new(form, rows, words, block));
        Self {
            product,
            split,
            rows,
            sums: memory.sums,
            stage,
            near: memory.near,
            most: u64::MAX,
            share: None,
            filled: false,
        }
    }

    /// The same with at most so many rows.
    #[must_use]
    pub fn at_most(self, rows: u64) -> Self {
        Self { most: rows, ..self }
    }

    /// The same with a share of the rows.
    #[must_use]
    pub fn of_share(self, share: Share) -> Self {
        Self { share: Some(share), ..self }
    }

    /// The same with operands that the block has made before.
    #[must_use]
    pub fn filled(self, filled: bool) -> Self {
        Self { filled, ..self }
    }

    /// Asks for what depends on nothing.
    pub fn ask(&self, k: &mut KernelBuilder) -> Asked {
        let codes = self.product.ahead(k);
        let (place, product) = (self.product.place(), &self.product);
        let bytes = product.tiles.len() as u64 * product.fragments.planes.tile_bytes();
        if !product.asks_for_all() && bytes <= self.near {
            place.once(k, |k| product.tiles.iter().for_each(|&tile| product.fragments.prefetch(k, tile)));
        }
        Asked { codes, gain: self.ask_gain(k) }
    }

    /// The same where the block has waited: nothing is brought near for later.
    pub fn ask_late(&self, k: &mut KernelBuilder) -> Asked {
        Asked { codes: self.product.ahead(k), gain: self.ask_gain(k) }
    }

    fn ask_gain(&self, k: &mut KernelBuilder) -> Gain {
        let makes = self.stage.as_ref().filter(|_| !self.filled);
        makes.map(|stage| stage.gain(k)).unwrap_or_default()
    }

    /// With `count` rows, eight at a time: the first with what was asked for.
    pub fn products(
        &self,
        k: &mut KernelBuilder,
        asked: Asked,
        count: Val,
        row_of: &mut RowOf<'_>,
        epilogue: &mut Epilogue<'_>,
    ) {
        let (first, step) = self.range(k);
        self.eight(k, (asked.codes, &asked.gain), (first, count), row_of, epilogue);
        if self.most <= TOKENS {
            return;
        }
        let next = k.add_const(first, step);
        k.for_each((next, count, step), |k, first| {
            k.barrier();
            self.eight(k, (None, &asked.gain), (first, count), row_of, epilogue);
        });
    }

    /// The first row, and how far it is to the next eight.
    fn range(&self, k: &mut KernelBuilder) -> (Val, u64) {
        match self.share {
            None => (k.const_i64(0), TOKENS),
            Some(share) => (k.mul_const(share.number, TOKENS), TOKENS * share.of),
        }
    }

    /// Of which token and row the first sum will be that this thread gets in the epilogue; `None` if it gets several at once.
    pub fn first_sum(&self, k: &mut KernelBuilder, count: Val) -> Option<(At, Val)> {
        let (thread, items) = (self.product.thread(), TOKENS * LANES);
        if u64::from(self.split.threads()) < items {
            return None;
        }
        let ((first, _), end) = (self.range(k), k.index(items));
        let (token, row) = (k.div_const(thread, LANES), k.rem_const(thread, LANES));
        let token = k.add(first, token);
        let (works, exists) = (k.cmp(Pred::Lt, thread, end), k.cmp(Pred::Lt, token, count));
        Some((At { token, exists: k.and(works, exists) }, row))
    }

    /// With rows `first .. first + 8` of `count`.
    fn eight(
        &self,
        k: &mut KernelBuilder,
        (codes, gain): (Option<Ahead>, &Gain),
        (first, count): (Val, Val),
        row_of: &mut RowOf<'_>,
        epilogue: &mut Epilogue<'_>,
    ) {
        let product = &self.product;
        let (one, most) = (k.const_i64(1), k.index(TOKENS));
        let left = k.sub(count, first);
        let some = k.min_i64(left, most);
        let last = k.sub(some, one);
        let token = k.min_i64(product.token(), last);
        let x = match &self.stage {
            None => {
                let token = k.add(first, token);
                let row = row_of(k, token);
                Source::Row(load_row(k, self.rows, row, product.q()))
            }
            Some(stage) if self.filled => {
                let token = k.add(first, token);
                let row = row_of(k, token);
                // codes are on their way now: nothing that follows may put them off
                k.barrier();
                Source::Stage(stage, row)
            }
            Some(stage) => {
                stage.fill(k, gain, some, &mut |k, token| {
                    let token = k.add(first, token);
                    row_of(k, token)
                });
                k.barrier();
                Source::Stage(stage, token)
            }
        };
        let sums = product.run(k, x, codes);
        for (i, sums) in sums.into_iter().enumerate() {
            let at = k.mul_const(product.warp(), self.split.tiles);
            let at = k.add_const(at, i as u64);
            product.store(k, self.sums, at, sums);
        }
        k.barrier();
        self.each_sum(k, |k, sum| {
            let token = k.add(first, sum.token);
            let exists = k.cmp(Pred::Lt, token, count);
            epilogue(k, &At { token, exists }, sum);
        });
    }

    /// Runs `body` for each token and row of a tile, in half warps of 16 rows; all threads of a warp come along.
    fn each_sum(&self, k: &mut KernelBuilder, mut body: impl FnMut(&mut KernelBuilder, &Sum)) {
        let (threads, items) = (u64::from(self.split.threads()), TOKENS * LANES);
        let mut some = |k: &mut KernelBuilder, item: Val| {
            let (token, row) = (k.div_const(item, LANES), k.rem_const(item, LANES));
            let values =
                (0..self.split.tiles).map(|tile| sum_of(k, self.split, self.sums, (tile, token, row))).collect();
            body(k, &Sum { token, row, values });
        };
        let thread = self.product.thread();
        if threads <= items {
            for first in (0..items).step_by(threads as usize) {
                let item = k.add_const(thread, first);
                some(k, item);
            }
            return;
        }
        let end = k.index(items);
        let works = k.cmp(Pred::Lt, thread, end);
        k.if_then(works, |k| some(k, thread));
    }
}
