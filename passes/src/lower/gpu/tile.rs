//! Sixteen rows of a weight times eight tokens, by warps: the micro-kernel of every projection on a GPU.
//!
//! The weight is operand A of `mma.m16n8k16` and lies in memory as a warp's threads hold it ([`Layout::Mma16`]); it is made 16-bit floats in registers. Tokens are
//! operand B, eight of them, whatever the step's size: columns beyond the last token repeat it and are not stored. The warps of a
//! block share a tile's columns by turns of 64 and add up in shared memory, in order. So a token's bits depend on neither T nor its neighbours.
//!
//! fragment  16 bytes a thread and load, asked for before the kernel waits for its input
//! products  16-bit floats (f16; for weights in bf16 a row of x as the sum of two bf16), sums in f32; of scaled formats for each block of columns, then `sum += scale · part`

use nextc_ir::format::{Blocks, Format};
use nextc_ir::graph::Value;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::layout::{Layout, Planes, TURN_COLUMNS};
use nextc_ir::shape::LANES;
use nextc_ir::{DType, Target};

use super::super::LowerError;
use super::super::ports::Site;
use super::Place;

/// Tokens of a product.
pub const TOKENS: u64 = 8;
/// Elements from one token's sums of a tile to the next in shared memory: 16 rows, and 4 that keep threads in different banks.
const SUM_STRIDE: u64 = LANES + 4;
/// Loads of 16 bytes that a thread has in flight.
const LOADS: u64 = 8;

/// True for the formats that can lie as fragments.
pub fn covers(format: Format) -> bool {
    let blocks = |b: Blocks| b.columns.is_multiple_of(32) && !b.ordered && b.unit == 0;
    match format {
        Format::F32 | Format::U4(_) | Format::Q6(_) => false,
        Format::Bf16 | Format::F16 => true,
        Format::Fp8(b) | Format::Q8(b) | Format::Q4(b) => blocks(b),
    }
}

/// A weight matrix that lies as fragments.
#[derive(Clone, Copy, Debug)]
pub struct Fragments {
    /// Where everything lies.
    pub planes: Planes,
}

/// Pointers to one tile of a matrix.
#[derive(Clone, Copy, Debug)]
pub struct Tile {
    /// Its codes.
    pub codes: Val,
    /// Its scales; its codes again where nothing is scaled.
    pub scales: Val,
}

impl Fragments {
    /// The matrix of a weight whose innermost `in_rank` dimensions are inputs.
    /// # Errors
    /// [`LowerError::Unsupported`] if the weight does not lie as fragments.
    pub fn of(site: &Site<'_>, weight: Value, in_rank: usize) -> Result<Self, LowerError> {
        let w = site.weight(weight);
        if w.layout != Some(Layout::Mma16) {
            return Err(site.error(format!("no kernel for a GPU reads weights of format `{}`", w.format)));
        }
        let (out_dims, in_dims) = w.shape.split_at(w.shape.len() - in_rank);
        Ok(Self { planes: Planes::new(Layout::Mma16, w.format, out_dims, in_dims) })
    }

    /// Tile `tile` of the weight at `base`, whose scales begin `scales_at` bytes behind it.
    pub fn tile(&self, k: &mut KernelBuilder, base: Val, scales_at: Val, tile: Val) -> Tile {
        let bytes = k.mul_const(tile, self.planes.tile_bytes());
        let codes = k.offset(base, bytes);
        if self.planes.format.blocks().is_none() {
            return Tile { codes, scales: codes };
        }
        let bytes = k.mul_const(tile, self.planes.tile_scale_bytes());
        let bytes = k.add(bytes, scales_at);
        Tile { codes, scales: k.offset(base, bytes) }
    }

    /// Tile `tile` of the whole weight at `base`.
    pub fn own_tile(&self, k: &mut KernelBuilder, base: Val, tile: Val) -> Tile {
        let scales_at = k.index(self.planes.scales_at());
        self.tile(k, base, scales_at, tile)
    }

    /// The type of the products' operands.
    pub const fn half(&self) -> DType {
        match self.planes.format {
            Format::Bf16 => DType::BF16,
            _ => DType::F16,
        }
    }

    /// Loads of 16 bytes a thread and turn.
    pub fn loads(&self) -> u64 {
        self.planes.format.def().bits / 4
    }

    /// Operands of a turn: 2 where a row of x is taken as the sum of two 16-bit floats because one has 8 bits (bf16).
    pub fn operands(&self) -> u64 {
        if self.half() == DType::BF16 { 2 } else { 1 }
    }

    /// Asks for a tile's codes to be brought near.
    pub fn prefetch(&self, k: &mut KernelBuilder, tile: Tile) {
        let (zero, bytes) = (k.const_i64(0), k.index(self.planes.tile_bytes()));
        k.prefetch(tile.codes, zero, bytes);
    }

    /// The thread's codes of one turn.
    fn load(&self, k: &mut KernelBuilder, tile: Tile, lane: Val, turn: Val) -> Vec<Val> {
        let first = k.mul_const(turn, self.planes.turn_bytes() / 4);
        let own = k.mul_const(lane, 4);
        let first = k.add(first, own);
        (0..self.loads())
            .map(|i| {
                let at = k.add_const(first, i * 128);
                k.load(DType::I32, 4, tile.codes, at)
            })
            .collect()
    }

    /// Operand A of step `step` of half turn `half`. `bias` is what is added to the codes of rows `r` and `r + 8`, where the format wants that.
    fn operand(&self, k: &mut KernelBuilder, codes: &[Val], half: usize, step: usize, bias: [Val; 2]) -> [Val; 4] {
        let word = |k: &mut KernelBuilder, load: usize, lane: usize| k.extract(codes[load], lane as u32);
        match self.planes.format {
            Format::Bf16 | Format::F16 | Format::F32 => [0, 2, 1, 3].map(|lane| word(k, 2 * half + step, lane)),
            Format::Fp8(_) | Format::Q8(_) => {
                let rows = [word(k, half, step), word(k, half, 2 + step)];
                let pairs = [(0, 0), (1, 0), (0, 1), (1, 1)];
                pairs.map(|(row, pair)| self.bytes(k, rows[row], pair, bias[row]))
            }
            Format::Q4(_) | Format::U4(_) | Format::Q6(_) => {
                let rows = [word(k, 0, half), word(k, 0, 2 + half)];
                let pairs = [(0, 0), (1, 0), (0, 1), (1, 1)];
                pairs.map(|(row, pair)| nibbles(k, rows[row], 2 * step as i32 + pair, bias[row]))
            }
        }
    }

    /// Bytes `2 pair` and `2 pair + 1` of a word as two f16.
    fn bytes(&self, k: &mut KernelBuilder, word: Val, pair: i32, bias: Val) -> Val {
        let shift = k.const_i32(16 * pair);
        let two = if pair == 0 { word } else { k.ushr(word, shift) };
        if matches!(self.planes.format, Format::Fp8(_)) {
            return k.fp8_to_f16(two);
        }
        // 1024 + (x + 128) as the mantissa of an f16; the bias takes both away
        let (low, high, eight, base) =
            (k.const_i32(0xff), k.const_i32(0xff00), k.const_i32(8), k.const_i32(0x6480_6480));
        let first = k.and(two, low);
        let second = k.and(two, high);
        let second = k.shl(second, eight);
        let both = k.or(first, second);
        let flipped = k.xor(both, base);
        let one = k.const_i32(ONES);
        k.half_fma(DType::F16, flipped, one, bias)
    }

    /// What is added to the codes of a row: nothing, or what makes the mantissa trick's numbers codes, less the zero point.
    fn bias(&self, k: &mut KernelBuilder, zero: Option<Val>) -> Val {
        let offset = match self.planes.format {
            Format::Q8(_) => 1152.0,
            Format::Q4(_) => 1032.0,
            _ => return k.const_i32(0),
        };
        let offset = k.const_f32(offset);
        let sum = match zero {
            Some(zero) => k.fadd(offset, zero),
            None => offset,
        };
        let bias = k.fneg(sum);
        k.pack(DType::F16, bias, bias)
    }

    /// Scale, and zero point where there is one, of row `row` of a tile and block number `block` of columns.
    fn scale(&self, k: &mut KernelBuilder, blocks: Blocks, tile: Tile, row: Val, block: Val) -> (Val, Option<Val>) {
        let word_numbers = 4 / blocks.scale.bytes();
        let number = k.mul_const(block, blocks.parts());
        let word = k.div_const(number, word_numbers);
        let at = match blocks.rows {
            1 => {
                let line = k.mul_const(word, LANES);
                k.add(line, row)
            }
            _ => word,
        };
        if blocks.scale == DType::F32 {
            let scale = k.load_f32(tile.scales, at);
            let next = k.add_const(at, if blocks.rows == 1 { LANES } else { 1 });
            return (scale, blocks.zero.then(|| k.load_f32(tile.scales, next)));
        }
        let word = k.load(DType::I32, 1, tile.scales, at);
        if blocks.zero {
            return (low_half(k, blocks.scale, word), Some(high_half(k, blocks.scale, word)));
        }
        let which = k.rem_const(number, word_numbers);
        let which = k.narrow(which);
        let sixteen = k.const_i32(16);
        let shift = k.mul(which, sixteen);
        let word = k.ushr(word, shift);
        (low_half(k, blocks.scale, word), None)
    }

    /// The four numbers of row `row` (of the tile) from column `column` (a multiple of 4) on.
    pub fn four(&self, k: &mut KernelBuilder, tile: Tile, row: Val, column: Val) -> [Val; 4] {
        let parts = |k: &mut KernelBuilder, x: Val, n: u64| (k.div_const(x, n), k.rem_const(x, n));
        let (turn, within) = parts(k, column, TURN_COLUMNS);
        let (half, within) = parts(k, within, 32);
        let (q, within) = parts(k, within, 8);
        let step = k.div_const(within, 4);
        let (eight, row_in) = parts(k, row, 8);
        let thread = k.mul_const(row_in, 4);
        let thread = k.add(thread, q);
        let sum = |k: &mut KernelBuilder, terms: &[(Val, u64)]| {
            let zero = k.const_i64(0);
            terms.iter().fold(zero, |sum, &(x, n)| {
                let x = k.mul_const(x, n);
                k.add(sum, x)
            })
        };
        let turn_words = self.planes.turn_bytes() / 4;
        let pairs: [Val; 2] = match self.planes.format.def().bits {
            16 => {
                let at = sum(k, &[(turn, turn_words), (half, 256), (step, 128), (thread, 4), (eight, 2)]);
                let both = k.load(DType::I32, 2, tile.codes, at);
                [k.extract(both, 0), k.extract(both, 1)]
            }
            8 => {
                let at = sum(k, &[(turn, turn_words), (half, 128), (thread, 4), (eight, 2), (step, 1)]);
                let word = k.load(DType::I32, 1, tile.codes, at);
                let bias = self.bias(k, None);
                [0, 1].map(|pair| self.bytes(k, word, pair, bias))
            }
            _ => {
                let at = sum(k, &[(turn, turn_words), (thread, 4), (eight, 2), (half, 1)]);
                let word = k.load(DType::I32, 1, tile.codes, at);
                let (step, eight) = (k.narrow(step), k.const_i32(8));
                let shift = k.mul(step, eight);
                let word = k.ushr(word, shift);
                let bias = self.bias(k, None);
                [0, 1].map(|pair| nibbles(k, word, pair, bias))
            }
        };
        let dtype = self.half();
        let [a, b] = pairs.map(|pair| [low_half(k, dtype, pair), high_half(k, dtype, pair)]);
        let numbers = [a[0], a[1], b[0], b[1]];
        let Some(blocks) = self.planes.format.blocks() else { return numbers };
        let block = k.div_const(column, blocks.columns.into());
        let (scale, zero) = self.scale(k, blocks, tile, row, block);
        numbers.map(|x| {
            let x = zero.map_or(x, |zero| k.fsub(x, zero));
            k.fmul(x, scale)
        })
    }
}

/// Two f16 of 1.
const ONES: i32 = 0x3c00_3c00;

/// Nibbles `pair` and `pair + 4` of a word as two f16.
fn nibbles(k: &mut KernelBuilder, word: Val, pair: i32, bias: Val) -> Val {
    let (shift, mask, base) = (k.const_i32(4 * pair), k.const_i32(0x000f_000f), k.const_i32(0x6400_6400));
    let shifted = if pair == 0 { word } else { k.ushr(word, shift) };
    let codes = k.and(shifted, mask);
    let codes = k.or(codes, base);
    let one = k.const_i32(ONES);
    k.half_fma(DType::F16, codes, one, bias)
}

/// The lower 16-bit float of a word.
fn low_half(k: &mut KernelBuilder, dtype: DType, word: Val) -> Val {
    if dtype == DType::F16 {
        return k.half_to_float(word);
    }
    let sixteen = k.const_i32(16);
    let bits = k.shl(word, sixteen);
    k.bitcast(bits, DType::F32)
}

/// The upper 16-bit float of a word.
fn high_half(k: &mut KernelBuilder, dtype: DType, word: Val) -> Val {
    if dtype == DType::F16 {
        let sixteen = k.const_i32(16);
        let upper = k.ushr(word, sixteen);
        return k.half_to_float(upper);
    }
    let mask = k.const_i32(0xffff_0000_u32 as i32);
    let bits = k.and(word, mask);
    k.bitcast(bits, DType::F32)
}

/// A row of x as one thread reads it, and what is done to it.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Its f32 elements.
    pub x: Val,
    /// `(rms_scale, gain)` of a norm in the prologue.
    pub norm: Option<(Val, Val)>,
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
        let multiprocessors = target.gpu.map_or(1, |g| u64::from(g.multiprocessors));
        let fills = |n: u64| tiles / n * 2 >= multiprocessors * 5;
        Self { warps, tiles: [4, 2].into_iter().find(|&n| fills(n)).unwrap_or(1) }
    }

    /// Threads of a block.
    pub const fn threads(&self) -> u32 {
        self.warps as u32 * 32
    }

    /// Shared memory for the sums.
    pub fn shared(&self, k: &mut KernelBuilder) -> Val {
        k.shared(DType::F32, self.warps * self.tiles * TOKENS * SUM_STRIDE)
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
    /// Whether rows of x are taken as the sum of two 16-bit floats: where one has 8 bits (bf16), and for products that decide something.
    precise: bool,
    /// Row of the thread's fragments, and its token; and which eight columns of a half turn are its own.
    row: Val,
    q: Val,
}

/// Operand B of a turn: of each half turn and step, the thread's four columns of its token.
pub type Operand = [[[Val; 2]; 2]; 2];

/// Columns of a turn that share scales, of one tile, as numbers.
struct Block {
    tile: usize,
    /// Operand A, by half turn and step.
    a: Vec<(usize, usize, [Val; 4])>,
    /// Scales of rows `r` and `r + 8`, where there are some.
    scales: Option<[Val; 2]>,
}

/// Codes that have been asked for: by turn, tile and load.
pub type Ahead = Vec<Vec<Vec<Val>>>;

impl<'a> Product<'a> {
    /// Of all columns by one warp of `warps`.
    pub fn new(k: &mut KernelBuilder, fragments: &'a Fragments, tiles: Vec<Tile>, place: Place, warps: u64) -> Self {
        let all_turns = fragments.planes.turns();
        let most = all_turns.div_ceil(warps);
        let first = if warps == 1 { k.const_i64(0) } else { k.mul_const(place.warp, most) };
        let (row, q) = (k.div_const(place.lane, 4), k.rem_const(place.lane, 4));
        let even = all_turns == most * warps;
        Self {
            fragments,
            tiles,
            turns: (first, most),
            all_turns,
            even,
            place,
            precise: fragments.half() == DType::BF16,
            row,
            q,
        }
    }

    /// The same with rows of x as sums of two 16-bit floats.
    #[must_use]
    pub fn precise(self) -> Self {
        Self { precise: true, ..self }
    }

    /// The number of the thread's token among the eight.
    pub const fn token(&self) -> Val {
        self.row
    }

    /// Which part of a row the thread reads with the three others of its token.
    pub const fn q(&self) -> Val {
        self.q
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

    /// Asks for the first codes, which depend on nothing.
    pub fn ahead(&self, k: &mut KernelBuilder) -> Option<Ahead> {
        self.even.then(|| self.load(k, self.turns.0, self.chunk()))
    }

    /// The codes of `count` turns.
    fn load(&self, k: &mut KernelBuilder, first: Val, count: u64) -> Ahead {
        (0..count)
            .map(|i| {
                let turn = k.add_const(first, i);
                self.tiles.iter().map(|&tile| self.fragments.load(k, tile, self.place.lane, turn)).collect()
            })
            .collect()
    }

    /// The sums of this warp's columns: of each tile four, for rows `row` and `row + 8` and tokens `2q` and `2q + 1`.
    pub fn run(&self, k: &mut KernelBuilder, x: Row, ahead: Option<Ahead>) -> Vec<[Val; 4]> {
        let mut sums = self.no_sums(k);
        let (first, most) = self.turns;
        let mut lo = first;
        let mut left = most;
        if let Some(ahead) = ahead {
            sums = self.chunk_sums(k, first, &ahead, x, &sums);
            lo = k.add_const(first, self.chunk());
            left -= self.chunk();
        }
        let end = k.add_const(first, most);
        let hi = if self.even {
            end
        } else {
            let all = k.index(self.all_turns);
            k.min_i64(end, all)
        };
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

    fn chunk_sums(&self, k: &mut KernelBuilder, first: Val, codes: &Ahead, x: Row, sums: &[Val]) -> Vec<Val> {
        let mut sums = sums.to_vec();
        for (i, codes) in codes.iter().enumerate() {
            let turn = k.add_const(first, i as u64);
            for b in self.tokens(k, turn, x) {
                self.turn_sums(k, turn, codes, &b, &mut sums);
            }
        }
        sums
    }

    /// Adds the products of a turn to the sums of one group of tokens.
    fn turn_sums(&self, k: &mut KernelBuilder, turn: Val, codes: &[Vec<Val>], b: &Operand, sums: &mut [Val]) {
        for (tile, codes) in codes.iter().enumerate() {
            for block in self.blocks(k, turn, (tile, codes)) {
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
        let tiles: Vec<Vec<Block>> = (0..codes.len()).map(|tile| self.blocks(k, turn, (tile, &codes[tile]))).collect();
        for (group, sums) in sums.iter_mut().enumerate() {
            let b = b(k, group);
            tiles.iter().flatten().for_each(|block| self.block_sums(k, block, &b, sums));
        }
    }

    /// The blocks of columns of a turn that share scales, or the whole turn where nothing is scaled.
    fn blocks(&self, k: &mut KernelBuilder, turn: Val, (tile, codes): (usize, &[Val])) -> Vec<Block> {
        let Some(blocks) = self.fragments.planes.format.blocks() else {
            let none = k.const_i32(0);
            return vec![Block { tile, a: self.operands_a(k, codes, &[0, 1], [none; 2]), scales: None }];
        };
        let whole = u64::from(blocks.columns).is_multiple_of(TURN_COLUMNS);
        let parts: &[&[usize]] = if whole { &[&[0, 1]] } else { &[&[0], &[1]] };
        let of = |&halves: &&[usize]| {
            let scales = self.scales(k, blocks, self.tiles[tile], turn, halves[0] as u64);
            let bias = scales.map(|(_, zero)| self.fragments.bias(k, zero));
            Block { tile, a: self.operands_a(k, codes, halves, bias), scales: Some(scales.map(|(scale, _)| scale)) }
        };
        parts.iter().map(of).collect()
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
        self.load(k, turn, 1).remove(0)
    }

    /// Turns of all columns.
    pub const fn all_turns(&self) -> u64 {
        self.all_turns
    }

    /// Turns whose sums are added up before they are added to the others'.
    pub const fn part_turns(&self) -> u64 {
        self.turns.1
    }

    /// Operands of a turn: 2 where rows of x are sums of two numbers.
    pub const fn operands(&self) -> u64 {
        if self.precise { 2 } else { 1 }
    }

    /// Operand B of a turn; twice if rows of x are sums of two numbers.
    pub fn tokens(&self, k: &mut KernelBuilder, turn: Val, x: Row) -> Vec<Operand> {
        let numbers = [0, 1].map(|half| {
            let base = k.mul_const(turn, TURN_COLUMNS);
            let base = k.add_const(base, 32 * half);
            let own = k.mul_const(self.q, 8);
            let column = k.add(base, own);
            self.eight(k, column, x)
        });
        let half = self.fragments.half();
        let pack = |k: &mut KernelBuilder, x: &[[[Val; 4]; 2]; 2]| {
            x.map(|steps| steps.map(|v| [k.pack(half, v[0], v[1]), k.pack(half, v[2], v[3])]))
        };
        let first = pack(k, &numbers);
        if !self.precise {
            return vec![first];
        }
        let mut rest = numbers;
        for (rest, packed) in rest.iter_mut().flatten().zip(first.iter().flatten()) {
            for (i, x) in rest.iter_mut().enumerate() {
                let taken =
                    if i % 2 == 0 { low_half(k, half, packed[i / 2]) } else { high_half(k, half, packed[i / 2]) };
                *x = k.fsub(*x, taken);
            }
        }
        vec![first, pack(k, &rest)]
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

    /// Scale and zero point of the thread's two rows in half turn `half`.
    fn scales(
        &self,
        k: &mut KernelBuilder,
        blocks: Blocks,
        tile: Tile,
        turn: Val,
        half: u64,
    ) -> [(Val, Option<Val>); 2] {
        let column = k.mul_const(turn, TURN_COLUMNS);
        let column = k.add_const(column, 32 * half);
        let mut block = k.div_const(column, blocks.columns.into());
        if !self.fragments.planes.columns.is_multiple_of(TURN_COLUMNS) {
            let last = k.index(self.fragments.planes.column_blocks() - 1);
            block = k.min_i64(block, last);
        }
        let first = self.fragments.scale(k, blocks, tile, self.row, block);
        if blocks.rows > 1 {
            return [first; 2];
        }
        let lower = k.add_const(self.row, 8);
        [first, self.fragments.scale(k, blocks, tile, lower, block)]
    }

    /// Puts a warp's sums of tile number `tile` where [`sum_of`] finds them: as part `part` of `tiles` a part.
    pub fn store(&self, k: &mut KernelBuilder, shared: Val, at: Val, sums: [Val; 4]) {
        let base = k.mul_const(at, TOKENS * SUM_STRIDE);
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
    let part = |w: u64| (w * split.tiles + tile) * TOKENS * SUM_STRIDE;
    let first = k.add_const(base, part(0));
    let first = k.load_f32(shared, first);
    (1..split.warps).fold(first, |sum, w| {
        let at = k.add_const(base, part(w));
        let x = k.load_f32(shared, at);
        k.fadd(sum, x)
    })
}
