//! Products of some rows: more than one product has, and too few for [`super::many`] to keep the machine busy.
//!
//! task     some tiles of weight rows by some groups of eight tokens
//! ahead    the tiles towards L2
//! scales   of normed rows, once a block, in shared memory
//! products the warps share the columns as in [`super::few`]: each makes its columns of the tokens operands, in registers, and multiplies all tiles
//!          with them, so nobody waits for another before the end
//! epilogue the warps' sums meet in shared memory and are added up in order; a half warp has the 16 rows of a tile, of one token
//! traffic  each weight once for the tokens of a block, each row of x once for its tiles: bound by L2
//!
//! The columns are summed in the same parts and order as in few, so a token has the same bits.

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::{LANES, Sym};
use nextc_ir::{DType, Target};

use super::super::matmul::{Rows, mean_rsqrt, row_ptr};
use super::few::{At, Epilogue, Sum};
use super::stage::quad_ssq;
use super::tile::{Product, Row, SUMS, Split, TOKENS, sum_of};

/// Tiles of a block.
const TILES: u64 = 4;
/// Groups of eight tokens of a block, at most.
const MOST_GROUPS: u64 = 4;
/// Threads of a multiprocessor that have 255 registers each.
const FULL_THREADS: u32 = 256;

/// How blocks share some rows of a step.
#[derive(Clone, Copy, Debug)]
pub struct Blocks {
    /// How a block's threads share its product.
    pub split: Split,
    /// Groups of tokens of a block.
    groups: u64,
}

impl Blocks {
    /// Of a matrix with `tiles` tiles, whose columns `warps` warps share: with as many tokens as leave blocks enough.
    pub fn of(target: &Target, warps: u64, tiles: u64) -> Self {
        let groups = if tiles / TILES >= target.multiprocessors() { MOST_GROUPS } else { MOST_GROUPS / 2 };
        Self { split: Split { warps, tiles: TILES }, groups }
    }

    const fn tokens(&self) -> u64 {
        self.groups * TOKENS
    }

    /// The grid where there are `blocks` for the same tokens.
    pub fn grid(&self, sym: Sym, blocks: u64) -> Extent {
        Extent::from(sym).ceil_div(self.tokens()) * blocks.into()
    }

    /// Begins a kernel of such blocks.
    pub fn begin(&self, k: &mut KernelBuilder) -> Memory {
        k.threads(self.split.threads());
        // a thread may have all the registers that it can name
        k.together((FULL_THREADS / self.split.threads()).max(1));
        Memory {
            sums: k.shared(DType::F32, self.groups * self.split.warps * self.split.tiles * SUMS),
            scales: k.shared(DType::F32, self.tokens()),
        }
    }

    /// Blocks of a matrix of `tiles` tiles, for the same tokens.
    pub const fn tasks(&self, tiles: u64) -> u64 {
        tiles.div_ceil(TILES)
    }

    /// The first token of this block, and which of `blocks` for the same tokens it is.
    pub fn block_of(&self, k: &mut KernelBuilder, blocks: u64) -> (Val, Val) {
        let task = k.task();
        let (block, group) = (k.div_const(task, blocks), k.rem_const(task, blocks));
        (k.mul_const(block, self.tokens()), group)
    }
}

/// Shared memory of a block.
#[derive(Clone, Copy)]
pub struct Memory {
    /// The sums of its warps, of each group.
    sums: Val,
    /// What each normed row is multiplied with.
    scales: Val,
}

/// The products of a block with some rows.
pub struct SomeRows<'a> {
    /// The product of one group, whose tiles are those of the block.
    pub product: Product<'a>,
    /// See [`Blocks`].
    pub blocks: Blocks,
    /// What is multiplied.
    pub rows: &'a Rows,
    /// Where warps meet.
    pub memory: Memory,
}

impl SomeRows<'_> {
    /// Asks for what depends on nothing.
    pub fn ask(&self, k: &mut KernelBuilder) {
        let product = &self.product;
        product.place().once(k, |k| product.tiles.iter().for_each(|&tile| product.fragments.prefetch(k, tile)));
    }

    /// With the rows of a block from `first` on, of `count`.
    pub fn products(&self, k: &mut KernelBuilder, (first, count): (Val, Val), epilogue: &mut Epilogue<'_>) {
        self.find_scales(k, (first, count));
        let product = &self.product;
        let rows: Vec<Row> = (0..self.blocks.groups).map(|group| self.row(k, group, (first, count))).collect();
        let none = product.no_sums(k);
        let start: Vec<Val> = rows.iter().flat_map(|_| none.clone()).collect();
        let (lo, hi) = product.turn_range(k);
        let sums = k.for_carry((lo, hi, 1), &start, |k, turn, sums| {
            let mut sums: Vec<Vec<Val>> = sums.chunks(none.len()).map(<[Val]>::to_vec).collect();
            let codes = product.codes(k, turn);
            let groups: Vec<_> = rows.iter().map(|&row| product.tokens(k, turn, row)).collect();
            product.turn_sums_by_tile(k, turn, &codes, &groups, &mut sums);
            sums.concat()
        });
        for (group, sums) in (0..).zip(sums.chunks(none.len())) {
            for (tile, sums) in (0..).zip(product.split_sums(k, sums)) {
                let at = k.mul_const(product.warp(), self.blocks.split.tiles);
                let at = k.add_const(at, group * self.blocks.split.warps * self.blocks.split.tiles + tile);
                product.store(k, self.memory.sums, at, sums);
            }
        }
        k.barrier();
        self.each_sum(k, (first, count), epilogue);
    }

    /// What each normed row is multiplied with: four threads a row.
    fn find_scales(&self, k: &mut KernelBuilder, (first, count): (Val, Val)) {
        let Rows::Normed(n) = self.rows else { return };
        let thread = self.product.thread();
        let end = k.index(4 * self.blocks.tokens());
        let threads = u64::from(self.blocks.split.threads());
        k.for_each((thread, end, threads), |k, item| {
            let (number, q) = (k.div_const(item, 4), k.rem_const(item, 4));
            let token = self.token(k, number, (first, count));
            let sum = quad_ssq(k, n, (token, q));
            let scale = mean_rsqrt(k, sum, n.width, n.eps);
            let leader = k.const_i64(0);
            let leads = k.cmp(Pred::Eq, q, leader);
            k.if_then(leads, |k| k.store(self.memory.scales, number, scale));
        });
        k.barrier();
    }

    /// Token `number` of the block, or the last one.
    fn token(&self, k: &mut KernelBuilder, number: Val, (first, count): (Val, Val)) -> Val {
        let one = k.const_i64(1);
        let (token, last) = (k.add(first, number), k.sub(count, one));
        k.min_i64(token, last)
    }

    /// The row of the thread's token of a group.
    fn row(&self, k: &mut KernelBuilder, group: u64, range: (Val, Val)) -> Row {
        let number = k.add_const(self.product.token(), group * TOKENS);
        let token = self.token(k, number, range);
        let base = k.param(self.rows.source());
        let x = row_ptr(k, base, token, self.rows.stride());
        let Rows::Normed(n) = self.rows else { return Row { x, norm: None } };
        Row { x, norm: Some((k.load_f32(self.memory.scales, number), k.param(n.gain))) }
    }

    /// Runs `epilogue` for each token of the block and row of its tiles, in half warps of 16 rows; all threads of a warp come along.
    fn each_sum(&self, k: &mut KernelBuilder, (first, count): (Val, Val), epilogue: &mut Epilogue<'_>) {
        let Blocks { split, groups } = self.blocks;
        let (start, end) = (self.product.thread(), k.index(groups * TOKENS * LANES));
        k.for_each((start, end, split.threads().into()), |k, item| {
            let (number, row) = (k.div_const(item, LANES), k.rem_const(item, LANES));
            let (group, token) = (k.div_const(number, TOKENS), k.rem_const(number, TOKENS));
            let sums = row_ptr(k, self.memory.sums, group, split.warps * split.tiles * SUMS);
            let values = (0..split.tiles).map(|tile| sum_of(k, split, sums, (tile, token, row))).collect();
            let at = k.add(first, number);
            let exists = k.cmp(Pred::Lt, at, count);
            epilogue(k, &At { token: at, exists }, &Sum { token, row, values });
        });
    }
}
