//! Sixteen rows of a weight times eight tokens, by warps: the micro-kernel of every projection on a GPU.
//!
//! The weight is operand A of `mma.m16n8k16` and lies in memory as a warp's threads hold it ([`Layout::Mma16`](nextc_ir::Layout::Mma16)); it is made 16-bit floats in registers. Tokens are
//! operand B, eight of them, whatever the step's size: columns beyond the last token repeat it and are not stored. The warps of a
//! block share a tile's columns by turns of 64 and add up in shared memory, in order. So a token's bits depend on neither T nor its neighbours.
//!
//! fragment  16 bytes a thread and load, asked for before the kernel waits for its input
//! products  16-bit floats (f16; for weights in bf16 a row of x as the sum of two bf16), sums in f32; of scaled formats for each block of columns, then `sum += scale · part`

use nextc_ir::format::Blocks;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::layout::{Planes, TURN_COLUMNS};
use nextc_ir::shape::LANES;
use nextc_ir::{DType, Target};

use super::Place;
use super::fragments::{Fragments, Numbers, Tile};
use super::stage::Stage;

/// Tokens of a product.
pub const TOKENS: u64 = 8;
/// Elements from one token's sums of a tile to the next in shared memory: 16 rows, and 4 that keep threads in different banks.
const SUM_STRIDE: u64 = LANES + 4;
/// Elements of the sums of a tile in shared memory.
pub const SUMS: u64 = TOKENS * SUM_STRIDE;
/// Loads of 16 bytes that a thread has in flight.
const LOADS: u64 = 8;

/// A row of x as one thread reads it, and what is done to it.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Its f32 elements.
    pub x: Val,
    /// `(rms_scale, gain)` of a norm in the prologue.
    pub norm: Option<(Val, Val)>,
}

/// Where a product finds its rows of x.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// Each thread makes its own operands of a row.
    Row(Row),
    /// They lie in shared memory; the place of the thread's token.
    Stage(&'a Stage<'a>, Val),
}

/// How the threads of a block share the product of some tiles with eight tokens.
#[derive(Clone, Copy, Debug)]
pub struct Split {
    /// Warps that share the columns.
    pub warps: u64,
    /// Tiles of a block.
    pub tiles: u64,
}

impl Split {
    /// For a matrix of so many tiles and columns: blocks that fill the machine, and turns enough for each warp to have loads in flight.
    pub fn of(target: &Target, tiles: u64, planes: &Planes) -> Self {
        let warps = (planes.turns() / 4).clamp(4, 16).next_power_of_two().min(16);
        let fills = |n: u64| tiles / n * 2 >= target.multiprocessors() * 5;
        Self { warps, tiles: [4, 2].into_iter().find(|&n| fills(n)).unwrap_or(1) }
    }

    /// Threads of a block.
    pub const fn threads(&self) -> u32 {
        self.warps as u32 * 32
    }

    /// Shared memory for the sums.
    pub fn shared(&self, k: &mut KernelBuilder) -> Val {
        k.shared(DType::F32, self.warps * self.tiles * SUMS)
    }
}

/// The product of some tiles with the tokens of a block.
pub struct Product<'a> {
    /// The matrix.
    pub fragments: &'a Fragments,
    /// Its tiles.
    pub tiles: Vec<Tile>,
    /// Turns of this warp: the first, and how many at most.
    turns: (Val, u64),
    /// All turns.
    all_turns: u64,
    /// Whether every warp has as many turns.
    even: bool,
    place: Place,
    numbers: Numbers,
    /// Row of the thread's fragments, and its token; and which eight columns of a half turn are its own.
    row: Val,
    q: Val,
}

/// Operand B of a turn: of each half turn and step, the thread's four columns of its token.
pub type Operand = [[[Val; 2]; 2]; 2];

/// Columns of a turn that share scales, of one tile, as numbers.
pub struct Block {
    tile: usize,
    /// Operand A, by half turn and step.
    a: Vec<(usize, usize, [Val; 4])>,
    /// Scales of rows `r` and `r + 8`, where there are some.
    scales: Option<[Val; 2]>,
}

/// What has been asked for of one turn of a tile.
pub struct Asked {
    /// Its codes.
    codes: Vec<Val>,
    /// Of each block of columns in it, what the scales of the thread's two rows are read from.
    scales: Vec<[[Val; 2]; 2]>,
}

/// What has been asked for, by turn and tile.
pub type Ahead = Vec<Vec<Asked>>;

/// The half turns of a turn that share scales.
fn turn_parts(blocks: Blocks) -> &'static [&'static [usize]] {
    if u64::from(blocks.columns).is_multiple_of(TURN_COLUMNS) { &[&[0, 1]] } else { &[&[0], &[1]] }
}

impl<'a> Product<'a> {
    /// Of all columns by one warp of `warps`.
    pub fn new(k: &mut KernelBuilder, fragments: &'a Fragments, tiles: Vec<Tile>, place: Place, warps: u64) -> Self {
        let all_turns = fragments.planes.turns();
        let most = all_turns.div_ceil(warps);
        let first = if warps == 1 { k.const_i64(0) } else { k.mul_const(place.warp, most) };
        let (row, q) = (k.div_const(place.lane, 4), k.rem_const(place.lane, 4));
        let even = all_turns == most * warps;
        Self { fragments, tiles, turns: (first, most), all_turns, even, place, numbers: fragments.numbers(), row, q }
    }

    /// The same with rows of x as sums of two 16-bit floats.
    #[must_use]
    pub fn precise(self) -> Self {
        Self { numbers: Numbers { split: true, ..self.numbers }, ..self }
    }

    /// The number of the thread's token among the eight.
    pub const fn token(&self) -> Val {
        self.row
    }

    /// Which part of a row the thread reads with the three others of its token.
    pub const fn q(&self) -> Val {
        self.q
    }

    /// The place of the thread.
    pub const fn place(&self) -> Place {
        self.place
    }

    /// The thread's warp.
    pub const fn warp(&self) -> Val {
        self.place.warp
    }

    /// The thread's number in the warp.
    pub const fn lane(&self) -> Val {
        self.place.lane
    }

    /// The thread's number in the block.
    pub const fn thread(&self) -> Val {
        self.place.thread
    }

    /// Turns whose loads are in flight together; divides the warp's turns.
    fn chunk(&self) -> u64 {
        let each = self.fragments.loads() * self.tiles.len() as u64;
        let most = (LOADS / each).max(1);
        (1..=most.min(self.turns.1)).rev().find(|n| self.turns.1.is_multiple_of(*n)).unwrap_or(1)
    }

    /// Whether the first codes are all.
    pub fn asks_for_all(&self) -> bool {
        self.even && self.chunk() == self.turns.1
    }

    /// Asks for the first codes, which depend on nothing.
    pub fn ahead(&self, k: &mut KernelBuilder) -> Option<Ahead> {
        self.even.then(|| self.load(k, self.turns.0, self.chunk()))
    }

    /// The codes and scales of `count` turns.
    fn load(&self, k: &mut KernelBuilder, first: Val, count: u64) -> Ahead {
        let mut turns = Vec::new();
        for i in 0..count {
            let turn = k.add_const(first, i);
            let of = |&tile: &Tile| Asked {
                codes: self.fragments.load(k, tile, self.place.lane, turn),
                scales: self.scale_words(k, tile, turn),
            };
            turns.push(self.tiles.iter().map(of).collect());
        }
        turns
    }

    /// The sums of this warp's columns: of each tile four, for rows `row` and `row + 8` and tokens `2q` and `2q + 1`.
    pub fn run(&self, k: &mut KernelBuilder, x: Source<'_>, ahead: Option<Ahead>) -> Vec<[Val; 4]> {
        let mut sums = self.no_sums(k);
        let (first, most) = self.turns;
        let mut lo = first;
        let mut left = most;
        if let Some(ahead) = ahead {
            sums = self.chunk_sums(k, first, &ahead, x, &sums);
            lo = k.add_const(first, self.chunk());
            left -= self.chunk();
        }
        let (_, hi) = self.turn_range(k);
        if left == 0 {
            return self.split_sums(k, &sums);
        }
        let step = if self.even { self.chunk() } else { 1 };
        let sums = k.for_carry((lo, hi, step), &sums, |k, turn, sums| {
            let codes = self.load(k, turn, step);
            self.chunk_sums(k, turn, &codes, x, sums)
        });
        self.split_sums(k, &sums)
    }

    /// The warp's turns: the first, and one past the last.
    pub fn turn_range(&self, k: &mut KernelBuilder) -> (Val, Val) {
        let (first, most) = self.turns;
        let end = k.add_const(first, most);
        if self.even {
            return (first, end);
        }
        let all = k.index(self.all_turns);
        (first, k.min_i64(end, all))
    }

    /// Sums of nothing, for one group of tokens.
    pub fn no_sums(&self, k: &mut KernelBuilder) -> Vec<Val> {
        match self.fragments.planes.format.blocks() {
            Some(_) => vec![k.const_f32(0.0); 4 * self.tiles.len()],
            None => vec![k.splat_f32(4, 0.0); self.tiles.len()],
        }
    }

    /// Sums of one group of tokens, of each tile four.
    pub fn split_sums(&self, k: &mut KernelBuilder, sums: &[Val]) -> Vec<[Val; 4]> {
        if self.fragments.planes.format.blocks().is_some() {
            return sums.chunks(4).map(|c| [c[0], c[1], c[2], c[3]]).collect();
        }
        sums.iter().map(|&v| [0, 1, 2, 3].map(|i| k.extract(v, i))).collect()
    }

    fn chunk_sums(&self, k: &mut KernelBuilder, first: Val, asked: &Ahead, x: Source<'_>, sums: &[Val]) -> Vec<Val> {
        let mut sums = sums.to_vec();
        for (i, asked) in asked.iter().enumerate() {
            let turn = k.add_const(first, i as u64);
            let operands = match x {
                Source::Row(row) => self.tokens(k, turn, row),
                Source::Stage(stage, token) => stage.operands(k, (token, self.q), turn),
            };
            for b in operands {
                self.turn_sums(k, turn, asked, &b, &mut sums);
            }
        }
        sums
    }

    /// Adds the products of a turn to the sums of one group of tokens.
    fn turn_sums(&self, k: &mut KernelBuilder, turn: Val, asked: &[Asked], b: &Operand, sums: &mut [Val]) {
        for (tile, asked) in asked.iter().enumerate() {
            for block in self.blocks(k, turn, tile, asked) {
                self.block_sums(k, &block, b, sums);
            }
        }
    }

    /// The same of some groups, whose operands `b(group)` gives: the codes become numbers once for all of them, and an operand serves all tiles.
    pub fn turn_sums_of_many(
        &self,
        k: &mut KernelBuilder,
        turn: Val,
        codes: &[Vec<Val>],
        b: &dyn Fn(&mut KernelBuilder, usize) -> Operand,
        sums: &mut [Vec<Val>],
    ) {
        let tiles: Vec<Vec<Block>> =
            codes.iter().enumerate().map(|(tile, codes)| self.blocks_of(k, turn, tile, codes)).collect();
        for (group, sums) in sums.iter_mut().enumerate() {
            let b = b(k, group);
            tiles.iter().flatten().for_each(|block| self.block_sums(k, block, &b, sums));
        }
    }

    /// The same of groups that all have their operands: one tile's numbers at a time are in registers.
    pub fn turn_sums_by_tile(
        &self,
        k: &mut KernelBuilder,
        turn: Val,
        codes: &[Vec<Val>],
        groups: &[Vec<Operand>],
        sums: &mut [Vec<Val>],
    ) {
        for (tile, codes) in codes.iter().enumerate() {
            let blocks = self.blocks_of(k, turn, tile, codes);
            for (operands, sums) in groups.iter().zip(sums.iter_mut()) {
                for b in operands {
                    blocks.iter().for_each(|block| self.block_sums(k, block, b, sums));
                }
            }
        }
    }

    /// Where a part of the columns begins with turn `t`, its sums begin anew, and those before are added to the ones before them.
    pub fn end_part(&self, k: &mut KernelBuilder, t: Val, own: &[Val], before: &[Val]) -> (Vec<Val>, Vec<Val>) {
        let within = k.rem_const(t, self.part_turns());
        let zero = k.const_i64(0);
        let begins = k.cmp(Pred::Eq, within, zero);
        let both = k.if_else(
            begins,
            |k| {
                let none = self.no_sums(k);
                let anew = own.iter().zip(none.iter().cycle()).map(|(_, &none)| none).collect::<Vec<_>>();
                let added = before.iter().zip(own).map(|(&before, &own)| k.fadd(before, own)).collect();
                [anew, added].concat()
            },
            |_| [own, before].concat(),
        );
        let (own, before) = both.split_at(own.len());
        (own.to_vec(), before.to_vec())
    }

    /// Adds the scaled products of a block of columns with groups of eight tokens, whose lines of this turn begin at a word of shared memory; four sums a group.
    pub fn group_sums(&self, k: &mut KernelBuilder, block: &Block, (b, index): (Val, Val), sums: &mut [Val]) {
        let a: Vec<[Val; 4]> = block.a.iter().map(|&(_, _, a)| a).collect();
        let (half, step, _) = block.a[0];
        let index = k.add_const(index, 8 * (2 * half + step) as u64);
        let products = k.mma_group(self.fragments.half(), &a, (b, index), sums.len() as u32 / 4);
        for (i, sum) in sums.iter_mut().enumerate() {
            let x = k.extract(products, i as u32);
            *sum = match block.scales {
                Some(scales) => k.fma(x, scales[i / 2 % 2], *sum),
                None => k.fadd(x, *sum),
            };
        }
    }

    /// The same of two rows of weights that may be of two tiles: the thread's codes are of eight rows of each.
    pub fn blocks_of_rows(
        &self,
        k: &mut KernelBuilder,
        turn: Val,
        codes: &[Val],
        rows: [(Tile, Val); 2],
    ) -> Vec<Block> {
        let scales = self.scale_words_of(k, rows, turn);
        self.blocks(k, turn, 0, &Asked { codes: codes.to_vec(), scales })
    }

    /// The blocks of columns of a turn whose codes are `codes`.
    fn blocks_of(&self, k: &mut KernelBuilder, turn: Val, tile: usize, codes: &[Val]) -> Vec<Block> {
        let scales = self.scale_words(k, self.tiles[tile], turn);
        self.blocks(k, turn, tile, &Asked { codes: codes.to_vec(), scales })
    }

    /// The blocks of columns of a turn that share scales, or the whole turn where nothing is scaled.
    fn blocks(&self, k: &mut KernelBuilder, turn: Val, tile: usize, asked: &Asked) -> Vec<Block> {
        let Some(blocks) = self.fragments.planes.format.blocks() else {
            let none = k.const_i32(0);
            return vec![Block { tile, a: self.operands_a(k, &asked.codes, &[0, 1], [none; 2]), scales: None }];
        };
        let mut made = Vec::new();
        for (halves, words) in turn_parts(blocks).iter().zip(&asked.scales) {
            let block = self.column_block(k, blocks, turn, halves[0] as u64);
            let scales = [0, 1].map(|row: usize| Fragments::scale_of(k, blocks, block, words[row]));
            let bias = scales.map(|(_, zero)| self.fragments.bias(k, zero));
            let a = self.operands_a(k, &asked.codes, halves, bias);
            made.push(Block { tile, a, scales: Some(scales.map(|(scale, _)| scale)) });
        }
        made
    }

    /// `sum += scale · product` of a block of columns.
    fn block_sums(&self, k: &mut KernelBuilder, block: &Block, b: &Operand, sums: &mut [Val]) {
        let half = self.fragments.half();
        let Some(scales) = block.scales else {
            let sum = &mut sums[block.tile];
            *sum = block.a.iter().fold(*sum, |sum, &(h, step, a)| k.mma(half, a, b[h][step], sum));
            return;
        };
        let none = k.splat_f32(4, 0.0);
        let product = block.a.iter().fold(none, |sum, &(h, step, a)| k.mma(half, a, b[h][step], sum));
        for (i, sum) in sums[4 * block.tile..4 * block.tile + 4].iter_mut().enumerate() {
            let x = k.extract(product, i as u32);
            *sum = k.fma(x, scales[i / 2], *sum);
        }
    }

    /// Operand A of some half turns, step by step.
    fn operands_a(
        &self,
        k: &mut KernelBuilder,
        codes: &[Val],
        halves: &[usize],
        bias: [Val; 2],
    ) -> Vec<(usize, usize, [Val; 4])> {
        let steps = halves.iter().flat_map(|&half| [(half, 0), (half, 1)]);
        steps.map(|(half, step)| (half, step, self.fragments.operand(k, codes, half, step, bias))).collect()
    }

    /// The codes of one turn of each tile.
    pub fn codes(&self, k: &mut KernelBuilder, turn: Val) -> Vec<Vec<Val>> {
        self.tiles.iter().map(|&tile| self.fragments.load(k, tile, self.place.lane, turn)).collect()
    }

    /// Turns of all columns.
    pub const fn all_turns(&self) -> u64 {
        self.all_turns
    }

    /// Turns whose sums are added up before they are added to the others'.
    pub const fn part_turns(&self) -> u64 {
        self.turns.1
    }

    /// What its operands are made of.
    pub const fn numbers(&self) -> Numbers {
        self.numbers
    }

    /// Operand B of a turn; twice if rows of x are sums of two numbers.
    pub fn tokens(&self, k: &mut KernelBuilder, turn: Val, x: Row) -> Vec<Operand> {
        let halves = [0, 1].map(|half| {
            let base = k.mul_const(turn, TURN_COLUMNS);
            let base = k.add_const(base, 32 * half);
            let own = k.mul_const(self.q, 8);
            let column = k.add(base, own);
            let numbers = self.eight(k, column, x);
            self.numbers.pack(k, numbers)
        });
        (0..halves[0].len()).map(|operand| [halves[0][operand], halves[1][operand]]).collect()
    }

    /// Columns `column .. column + 8` of the thread's token, zeros beyond the last column.
    fn eight(&self, k: &mut KernelBuilder, column: Val, x: Row) -> [[Val; 4]; 2] {
        let columns = self.fragments.planes.columns;
        let inside = (!columns.is_multiple_of(TURN_COLUMNS)).then(|| {
            let end = k.index(columns);
            k.cmp(Pred::Lt, column, end)
        });
        let zero = k.const_i64(0);
        let column = inside.map_or(column, |inside| k.select(inside, column, zero));
        [0, 4].map(|offset| {
            let at = k.add_const(column, offset);
            let mut v = k.load(DType::F32, 4, x.x, at);
            if let Some((scale, gain)) = x.norm {
                let gain = k.load(DType::F32, 4, gain, at);
                let one = k.splat_f32(4, 1.0);
                let gain = k.fadd(gain, one);
                let scale = k.splat(scale, 4);
                v = k.fmul(v, scale);
                v = k.fmul(v, gain);
            }
            if let Some(inside) = inside {
                let nothing = k.splat_f32(4, 0.0);
                v = k.select(inside, v, nothing);
            }
            [0, 1, 2, 3].map(|i| k.extract(v, i))
        })
    }

    /// What the scales of a turn are read from: of each block of columns in it, for the thread's two rows.
    fn scale_words(&self, k: &mut KernelBuilder, tile: Tile, turn: Val) -> Vec<[[Val; 2]; 2]> {
        let lower = k.add_const(self.row, 8);
        self.scale_words_of(k, [(tile, self.row), (tile, lower)], turn)
    }

    /// The same of two rows of tiles.
    fn scale_words_of(&self, k: &mut KernelBuilder, rows: [(Tile, Val); 2], turn: Val) -> Vec<[[Val; 2]; 2]> {
        let Some(blocks) = self.fragments.planes.format.blocks() else { return Vec::new() };
        let [first, second] = rows;
        let mut words = Vec::new();
        for halves in turn_parts(blocks) {
            let block = self.column_block(k, blocks, turn, halves[0] as u64);
            let mut read = |(tile, row): (Tile, Val)| self.fragments.scale_words(k, blocks, tile, (row, block));
            let above = read(first);
            // a tile has one scale for several rows, or one for each
            let below = if blocks.rows > 1 && first.0.scales == second.0.scales { above } else { read(second) };
            words.push([above, below]);
        }
        words
    }

    /// The block of columns that half turn `half` is in.
    fn column_block(&self, k: &mut KernelBuilder, blocks: Blocks, turn: Val, half: u64) -> Val {
        let column = k.mul_const(turn, TURN_COLUMNS);
        let column = k.add_const(column, 32 * half);
        let block = k.div_const(column, blocks.columns.into());
        if self.fragments.planes.columns.is_multiple_of(TURN_COLUMNS) {
            return block;
        }
        let last = k.index(self.fragments.planes.column_blocks() - 1);
        k.min_i64(block, last)
    }

    /// Puts a warp's sums of tile number `tile` where [`sum_of`] finds them: as part `part` of `tiles` a part.
    pub fn store(&self, k: &mut KernelBuilder, shared: Val, at: Val, sums: [Val; 4]) {
        let base = k.mul_const(at, SUMS);
        let token = k.mul_const(self.q, 2 * SUM_STRIDE);
        let base = k.add(base, token);
        let base = k.add(base, self.row);
        for (i, sum) in sums.into_iter().enumerate() {
            let at = k.add_const(base, (i as u64 % 2) * SUM_STRIDE + (i as u64 / 2) * 8);
            k.store(shared, at, sum);
        }
    }
}

/// Adds up the sums of all warps for tile number `tile`, a token and a row.
pub fn sum_of(k: &mut KernelBuilder, split: Split, shared: Val, (tile, token, row): (u64, Val, Val)) -> Val {
    let token = k.mul_const(token, SUM_STRIDE);
    let base = k.add(token, row);
    let part = |w: u64| (w * split.tiles + tile) * SUMS;
    let first = k.add_const(base, part(0));
    let first = k.load_f32(shared, first);
    (1..split.warps).fold(first, |sum, w| {
        let at = k.add_const(base, part(w));
        let x = k.load_f32(shared, at);
        k.fadd(sum, x)
    })
}
