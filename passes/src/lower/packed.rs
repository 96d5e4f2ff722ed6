//! `packed`: weight matrices as they lie in memory: tiles of 16 rows, words of codes, and what blocks of columns share.
//!
//! A vector has a lane for each row of a tile; or a scalar is read, of one row. What a word holds stands in the format's table.

use nextc_ir::format::{Blocks, Format, Shift};
use nextc_ir::graph::Value;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::layout::{LINE_BYTES, Planes, pieces};
use nextc_ir::shape::LANES;
use nextc_ir::{DType, Layout};

use super::ports::Site;

/// What is asked for is a multiple of so many bytes.
const PREFETCH_BYTES: u64 = 16;

/// Most bytes of codes of a tile that one turn of the inner loop reads where vectors hold all of its rows: more are asked for in bursts that memory answers less well.
const TURN_BYTES: u64 = 256;

/// A weight matrix as packed.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// Where everything lies.
    pub planes: Planes,
    /// Whether vectors hold all rows of a tile, so that what needs 512 bits may be used.
    pub wide: bool,
    /// Columns in one turn of the inner loop, where the format is scaled: see [`MatmulTile`](nextc_ir::target::MatmulTile).
    pub turn_columns: u64,
    /// Whether rows are rounded to 16 bits for its products.
    pub shorts: bool,
    /// How far ahead of its use a tile is asked for, in bytes; 0 where nothing is.
    ahead_bytes: u64,
}

impl Matrix {
    /// The matrix of a weight whose innermost `in_rank` dimensions are inputs. Experts are further rows.
    pub fn of(site: &Site<'_>, weight: Value, in_rank: usize) -> Self {
        let w = site.weight(weight);
        let (out_dims, in_dims) = w.shape.split_at(w.shape.len() - in_rank);
        let planes = Planes::new(w.layout.unwrap_or(Layout::Tile16), w.format, out_dims, in_dims);
        let wide = site.target.vector_bits == 512 && site.target.gpu.is_none();
        let (turn_columns, ahead_bytes) = (site.target.matmul_tile().columns, site.target.ahead_bytes());
        let shorts = site.target.rounds_to_shorts() && super::shorts::takes(planes.format, planes.layout);
        let own = Self { planes, wide, turn_columns, shorts, ahead_bytes };
        let most = (TURN_BYTES / own.column_bytes()).max(LANES) / LANES * LANES;
        Self { turn_columns: if wide { turn_columns.min(most) } else { turn_columns }, ..own }
    }

    /// What zero counts in [`Tile::halves`].
    pub const fn halves_zero(&self) -> i32 {
        if matches!(self.planes.format, Format::Q4(_)) { 8 } else { 128 }
    }

    /// Its row tiles.
    pub const fn tiles(&self) -> u64 {
        self.planes.tiles()
    }

    /// Tile `tile`.
    pub fn tile(&self, k: &mut KernelBuilder, base: Val, tile: Val) -> Tile {
        let p = &self.planes;
        let bytes = k.mul_const(tile, p.tile_bytes());
        let codes = k.offset(base, bytes);
        let scales = p.format.blocks().map(|_| {
            let bytes = k.mul_const(tile, p.tile_scale_bytes());
            let bytes = k.add_const(bytes, p.scales_at());
            k.offset(base, bytes)
        });
        let order = p.format.blocks().filter(|b| b.ordered).map(|_| {
            let outer = k.div_const(tile, p.inner_rows / LANES);
            let bytes = k.mul_const(outer, p.columns * 4);
            let bytes = k.add_const(bytes, p.order_at());
            k.offset(base, bytes)
        });
        let units = p.format.blocks().filter(|b| b.unit > 0).map(|_| {
            let bytes = k.mul_const(tile, p.tile_unit_bytes());
            let bytes = k.add_const(bytes, p.units_at());
            k.offset(base, bytes)
        });
        Tile { matrix: *self, codes, scales, units, order, next: None }
    }

    /// Tile `tile`, which is read before tile `next`, or, if there is none, before the last.
    pub fn tile_before(&self, k: &mut KernelBuilder, base: Val, tile: Val, next: Val) -> Tile {
        let own = self.tile(k, base, tile);
        if self.ahead_bytes == 0 {
            return own;
        }
        let last = k.index(self.tiles() - 1);
        let next = k.min_i64(next, last);
        let next = self.tile(k, base, next);
        Tile { next: Some(Next { codes: next.codes, scales: next.scales }), ..own }
    }

    /// Bytes of the codes of a column of a tile.
    fn column_bytes(&self) -> u64 {
        let format = self.planes.format;
        format.def().words * LINE_BYTES / format.group_columns()
    }

    /// Neighbouring tiles that are read together, before as many that follow.
    pub fn tiles_in_turn(&self, k: &mut KernelBuilder, base: Val, numbers: &[Val]) -> Vec<Tile> {
        let tile = |&number| {
            let next = k.add_const(number, numbers.len() as u64);
            self.tile_before(k, base, number, next)
        };
        numbers.iter().map(tile).collect()
    }

    /// The tiles of these numbers, the last one in the place of those that there are not.
    pub fn tiles_at(&self, k: &mut KernelBuilder, base: Val, numbers: &[Val]) -> Vec<Tile> {
        let last = k.index(self.tiles() - 1);
        let tile = |&number| {
            let number = k.min_i64(number, last);
            self.tile(k, base, number)
        };
        numbers.iter().map(tile).collect()
    }
}

/// Pointers to the parts of one tile.
#[derive(Clone, Copy, Debug)]
pub struct Tile {
    /// The matrix.
    pub matrix: Matrix,
    /// The codes.
    pub codes: Val,
    scales: Option<Val>,
    units: Option<Val>,
    /// The order of columns, where it is not their own.
    pub order: Option<Val>,
    /// What is read after it, where that is asked for in time.
    next: Option<Next>,
}

/// The codes and scales of a tile that is read after another one.
#[derive(Clone, Copy, Debug)]
struct Next {
    codes: Val,
    scales: Option<Val>,
}

/// What the columns of a block share: scale and second number, for the formats that have them.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    /// What multiplies the sum, or each number.
    pub scale: Option<Val>,
    second: Option<(Shift, Val)>,
}

impl Block {
    /// What a code counts in its block's sum: a part of its number if the sum is scaled, else its number.
    pub fn term(self, k: &mut KernelBuilder, code: Val) -> Val {
        match (self.second, self.scale) {
            (Some((Shift::Zero, zero)), _) => k.fsub(code, zero),
            (Some((Shift::Offset, offset)), Some(scale)) => k.fma(code, scale, offset),
            _ => code,
        }
    }

    /// `acc` and the sum of a block's terms.
    pub fn add(self, k: &mut KernelBuilder, sum: Val, acc: Val) -> Val {
        match (self.second, self.scale) {
            (Some((Shift::Offset, _)), _) | (_, None) => k.fadd(acc, sum),
            (_, Some(scale)) => k.fma(sum, scale, acc),
        }
    }

    /// The number of a code.
    pub fn number(self, k: &mut KernelBuilder, code: Val) -> Val {
        let term = self.term(k, code);
        match (self.second, self.scale) {
            (Some((Shift::Offset, _)), _) | (_, None) => term,
            (_, Some(scale)) => k.fmul(term, scale),
        }
    }
}

/// What is read of a tile: all its rows, a lane each, or one row.
#[derive(Clone, Copy, Debug)]
pub enum Lanes {
    /// The 16 rows.
    All,
    /// The row in this lane.
    One(Val),
}

impl Lanes {
    /// The words of a line that begins at word `at`: of all rows, or of one.
    fn load(self, k: &mut KernelBuilder, dtype: DType, lines: Val, at: Val) -> Val {
        match self {
            Self::All => k.load(dtype, LANES as u32, lines, at),
            Self::One(lane) => {
                let at = k.add(at, lane);
                k.load(dtype, 1, lines, at)
            }
        }
    }

    fn splat(self, k: &mut KernelBuilder, x: Val) -> Val {
        match self {
            Self::All => k.splat(x, LANES as u32),
            Self::One(_) => x,
        }
    }
}

impl Tile {
    /// Asks for codes that are read some lines after those of `columns` columns from `column` on: further ones, or the next tile's.
    pub fn ask_codes(&self, k: &mut KernelBuilder, column: Val, columns: u64) {
        let Some(next) = self.next else { return };
        let (own, column_bytes) = (self.matrix.planes.tile_bytes(), self.matrix.column_bytes());
        let turn = columns * column_bytes;
        let (at, bytes) = (k.mul_const(column, column_bytes), k.index(turn));
        if own <= self.matrix.ahead_bytes {
            return k.prefetch(next.codes, at, bytes);
        }
        // whole turns, so that none lies partly behind the tile's end
        let own_bytes = (own - self.matrix.ahead_bytes) / turn * turn;
        let border = k.index(own_bytes);
        let is_own = k.cmp(Pred::Lt, at, border);
        let (further, of_next) = (k.add_const(at, own - own_bytes), k.sub(at, border));
        let (codes, at) = (k.select(is_own, self.codes, next.codes), k.select(is_own, further, of_next));
        k.prefetch(codes, at, bytes);
    }

    /// Asks for the next tile's scales of block `block`.
    pub fn ask_scales(&self, k: &mut KernelBuilder, block: Val) {
        let Some(scales) = self.next.and_then(|next| next.scales) else { return };
        let planes = &self.matrix.planes;
        let bytes = planes.tile_scale_bytes() / planes.column_blocks();
        if bytes.is_multiple_of(PREFETCH_BYTES) {
            let (at, bytes) = (k.mul_const(block, bytes), k.index(bytes));
            k.prefetch(scales, at, bytes);
        }
    }

    /// The codes of column `column` and those of its group, as numbers; it is the first of them.
    pub fn codes(&self, k: &mut KernelBuilder, column: Val, lanes: Lanes) -> Vec<Val> {
        let format = self.matrix.planes.format;
        let def = format.def();
        let at = k.mul_const(column, LANES * def.words / format.group_columns());
        let word = |word: u64| {
            let at = k.add_const(at, word * LANES);
            lanes.load(k, DType::I32, self.codes, at)
        };
        let words: Vec<Val> = (0..def.words).map(word).collect();
        match (format, lanes, &words[..]) {
            (Format::Q4(_), Lanes::All, &[word]) if self.matrix.wide => {
                let shifts = (0..format.group_columns()).flat_map(|c| pieces(format, c));
                shifts.map(|piece| k.nibble(word, piece.shift)).collect()
            }
            _ => (def.unpack)(k, &words),
        }
    }

    /// The numbers of column `column` and those of its group, of all rows.
    pub fn numbers(&self, k: &mut KernelBuilder, column: Val, block: Block) -> Vec<Val> {
        if let (Format::Q8(blocks), Some(scale)) = (self.matrix.planes.format, block.scale)
            && block.second.is_none()
            && blocks.unit == 0
            && blocks.scale != DType::F32
        {
            return self.scaled_bytes(k, column, scale);
        }
        let codes = self.codes(k, column, Lanes::All);
        codes.into_iter().map(|code| block.number(k, code)).collect()
    }

    /// `code · scale` of four signed bytes a word, without conversions: a byte whose sign is flipped is `code + 128`, in bits 8 to 15 of 2^15 as f32 it is
    /// `2^15 + 128 + code`, and that times a scale of 16 bits, less `(2^15 + 128) · scale`, is exact.
    fn scaled_bytes(&self, k: &mut KernelBuilder, column: Val, scale: Val) -> Vec<Val> {
        let at = k.mul_const(column, LANES / 4);
        let words = k.load(DType::I32, LANES as u32, self.codes, at);
        let [signs, byte, exponent, eight, sixteen] =
            [0x8080_8080, 0xff00, 0x4700_0000, 8, 16].map(|x: u32| k.splat_i32(LANES as u32, x.cast_signed()));
        let zero = k.splat_f32(LANES as u32, -32896.0);
        let (words, zero) = (k.xor(words, signs), k.fmul(scale, zero));
        let moved = [k.shl(words, eight), words, k.ushr(words, eight), k.ushr(words, sixteen)];
        let number = |words: Val| {
            let byte = k.and(words, byte);
            let bits = k.or(byte, exponent);
            let x = k.bitcast(bits, DType::F32);
            k.fma(x, scale, zero)
        };
        moved.into_iter().map(number).collect()
    }

    /// The numbers of `columns` columns from column `column` on, four a word in lines of 16 rows, as unsigned bytes less 128: of codes of eight bits these, of
    /// codes of four bits 16 times these. The format is one of [`Format::is_bytes`].
    pub fn bytes(&self, k: &mut KernelBuilder, column: Val, columns: u64) -> Vec<Val> {
        let format = self.matrix.planes.format;
        let lines = (0..columns).step_by(format.group_columns() as usize).map(|i| {
            let at = k.add_const(column, i);
            let at = k.mul_const(at, LANES / format.group_columns());
            let words = k.load(DType::I32, LANES as u32, self.codes, at);
            let [signs, uppers, four] =
                [0x8080_8080, 0xf0f0_f0f0, 4].map(|x: u32| k.splat_i32(LANES as u32, x.cast_signed()));
            match format {
                // 8 is added to them as stored
                Format::Q4(_) => {
                    let lowers = k.shl(words, four);
                    vec![k.and(lowers, uppers), k.and(words, uppers)]
                }
                _ => vec![k.xor(words, signs)],
            }
        });
        lines.flatten().collect()
    }

    /// The numbers of a word's columns, column `column` the first of them, two in a lane, each [`Matrix::halves_zero`] more than it counts; and how far from
    /// `column` the first of the two is, the other being two columns after it. The format is one of [`Format::is_bytes`].
    pub fn halves(&self, k: &mut KernelBuilder, column: Val) -> Vec<(Val, u64)> {
        let format = self.matrix.planes.format;
        let at = k.mul_const(column, LANES / format.group_columns());
        let words = k.load(DType::I32, LANES as u32, self.codes, at);
        let splat = |k: &mut KernelBuilder, x: u32| k.splat_i32(LANES as u32, x.cast_signed());
        // 8 is added to codes of four bits as stored
        let (words, mask, parts): (Val, u32, &[(u32, u64)]) = match format {
            Format::Q4(_) => (words, 0x000f_000f, &[(0, 0), (8, 1), (4, 4), (12, 5)]),
            _ => {
                let signs = splat(k, 0x8080_8080);
                (k.xor(words, signs), 0x00ff_00ff, &[(0, 0), (8, 1)])
            }
        };
        let mask = splat(k, mask);
        let half = |&(shift, column): &(u32, u64)| {
            let by = splat(k, shift);
            let words = if shift == 0 { words } else { k.ushr(words, by) };
            (k.and(words, mask), column)
        };
        parts.iter().map(half).collect()
    }

    /// What counts one in [`Tile::bytes`] of block `block` of `columns` columns.
    pub fn byte_scales(&self, k: &mut KernelBuilder, block: Val, columns: u64) -> Val {
        let format = self.matrix.planes.format;
        let own = format.blocks().map_or(columns, |blocks| blocks.columns.into());
        let block = quotient(k, block, own / columns);
        let scale = self.block(k, block, Lanes::All).scale.expect("a format of scaled integers");
        match format {
            Format::Q4(_) => {
                let part = k.splat_f32(LANES as u32, 1.0 / 16.0);
                k.fmul(scale, part)
            }
            _ => scale,
        }
    }

    /// What the blocks of columns `block` share.
    pub fn block(&self, k: &mut KernelBuilder, block: Val, lanes: Lanes) -> Block {
        let (Some(blocks), Some(scales)) = (self.matrix.planes.format.blocks(), self.scales) else {
            return Block { scale: None, second: None };
        };
        let (scale, second) = match (blocks.rows, self.units) {
            (1, None) => floats(k, blocks, scales, block, lanes),
            (1, Some(units)) => {
                let unit = quotient(k, block, u64::from(blocks.unit / blocks.columns));
                let units = floats(k, blocks, units, unit, lanes);
                let [scale, second] = counted(k, blocks, scales, block, lanes);
                (k.fmul(scale, units.0), units.1.map(|unit| k.fmul(second, unit)))
            }
            _ => {
                let number = k.mul_const(block, blocks.parts());
                let scale = k.load_f32(scales, number);
                (lanes.splat(k, scale), None)
            }
        };
        Block { scale: Some(scale), second: second.map(|x| (self.matrix.planes.format.def().shift, x)) }
    }
}

/// Number `block` of the floats that lie in lines, and the second number behind it where there is one.
fn floats(k: &mut KernelBuilder, blocks: Blocks, lines: Val, block: Val, lanes: Lanes) -> (Val, Option<Val>) {
    let plain = Format::plain(blocks.scale).expect("scales are floats");
    match (blocks.scale, blocks.zero) {
        (DType::F32, zero) => {
            let number = k.mul_const(block, blocks.parts());
            let at = k.mul_const(number, LANES);
            let scale = lanes.load(k, DType::F32, lines, at);
            let next = k.add_const(at, LANES);
            (scale, zero.then(|| lanes.load(k, DType::F32, lines, next)))
        }
        // a scale and its second number share a word
        (_, true) => {
            let at = k.mul_const(block, LANES);
            let words = lanes.load(k, DType::I32, lines, at);
            let both = (plain.def().unpack)(k, &[words]);
            (both[0], Some(both[1]))
        }
        // the scales of two blocks share a word
        (_, false) => {
            let words = word_of(k, lines, block, 2, lanes);
            ((plain.def().unpack)(k, &[words])[0], None)
        }
    }
}

/// Number `block` of the signed bytes that lie in lines, and the one behind it.
fn counted(k: &mut KernelBuilder, blocks: Blocks, lines: Val, block: Val, lanes: Lanes) -> [Val; 2] {
    let number = k.mul_const(block, blocks.parts());
    let words = word_of(k, lines, number, 4, lanes);
    let bytes = (Format::Q8(blocks).def().unpack)(k, &[words]);
    [bytes[0], bytes[1]]
}

/// `x / n` of an index, by a shift where that is enough.
pub fn quotient(k: &mut KernelBuilder, x: Val, n: u64) -> Val {
    if n > 1 && n.is_power_of_two() {
        let bits = k.index(n.trailing_zeros().into());
        return k.ushr(x, bits);
    }
    k.div_const(x, n)
}

/// The word that holds number `number` of the lines, `per_word` numbers a word, shifted so that the number is its lowest.
fn word_of(k: &mut KernelBuilder, lines: Val, number: Val, per_word: u64, lanes: Lanes) -> Val {
    let line = quotient(k, number, per_word);
    let at = k.mul_const(line, LANES);
    let words = lanes.load(k, DType::I32, lines, at);
    let (last, bits) = (k.index(per_word - 1), k.const_i32((32 / per_word) as i32));
    let within = k.and(number, last);
    let within = k.narrow(within);
    let shift = k.mul(within, bits);
    let shift = lanes.splat(k, shift);
    k.ushr(words, shift)
}
