//! Weights that lie as fragments of products, tile by tile, and what their codes become in registers; and rows of x as the other operand.

use nextc_ir::DType;
use nextc_ir::format::{Blocks, Format};
use nextc_ir::graph::Value;
use nextc_ir::kernel::{KernelBuilder, Val};
use nextc_ir::layout::{Layout, Planes, TURN_COLUMNS};
use nextc_ir::shape::LANES;

use super::super::LowerError;
use super::super::ports::Site;
use super::stage::Form;

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

    /// What the operands of its products are made of.
    pub fn numbers(&self) -> Numbers {
        Numbers { half: self.half(), split: self.half() == DType::BF16 }
    }

    /// How the operands of its products lie.
    pub fn form(&self) -> Form {
        Form { columns: self.planes.columns, numbers: self.numbers() }
    }

    /// Asks for a tile's codes to be brought near.
    pub fn prefetch(&self, k: &mut KernelBuilder, tile: Tile) {
        let (zero, bytes) = (k.const_i64(0), k.index(self.planes.tile_bytes()));
        k.prefetch(tile.codes, zero, bytes);
    }

    /// The thread's codes of one turn.
    pub fn load(&self, k: &mut KernelBuilder, tile: Tile, lane: Val, turn: Val) -> Vec<Val> {
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
    pub fn operand(&self, k: &mut KernelBuilder, codes: &[Val], half: usize, step: usize, bias: [Val; 2]) -> [Val; 4] {
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
    pub fn bias(&self, k: &mut KernelBuilder, zero: Option<Val>) -> Val {
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

    /// The words of which [`Self::scale_of`] makes the scale of row `row` of a tile and block number `block` of columns.
    pub fn scale_words(&self, k: &mut KernelBuilder, blocks: Blocks, tile: Tile, (row, block): (Val, Val)) -> [Val; 2] {
        let number = k.mul_const(block, blocks.parts());
        let word = k.div_const(number, 4 / blocks.scale.bytes());
        let at = match blocks.rows {
            1 => {
                let line = k.mul_const(word, LANES);
                k.add(line, row)
            }
            _ => word,
        };
        let word = k.load(DType::I32, 1, tile.scales, at);
        if blocks.scale != DType::F32 || !blocks.zero {
            return [word; 2];
        }
        let next = k.add_const(at, if blocks.rows == 1 { LANES } else { 1 });
        [word, k.load(DType::I32, 1, tile.scales, next)]
    }

    /// Scale, and zero point where there is one, from the words of block number `block` of columns.
    pub fn scale_of(k: &mut KernelBuilder, blocks: Blocks, block: Val, words: [Val; 2]) -> (Val, Option<Val>) {
        if blocks.scale == DType::F32 {
            let [scale, zero] = words.map(|word| k.bitcast(word, DType::F32));
            return (scale, blocks.zero.then_some(zero));
        }
        let [word, _] = words;
        if blocks.zero {
            return (low_half(k, blocks.scale, word), Some(high_half(k, blocks.scale, word)));
        }
        let number = k.mul_const(block, blocks.parts());
        let which = k.rem_const(number, 4 / blocks.scale.bytes());
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
        let words = self.scale_words(k, blocks, tile, (row, block));
        let (scale, zero) = Self::scale_of(k, blocks, block, words);
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

/// What operands are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbers {
    /// 16-bit floats of this type.
    pub half: DType,
    /// Whether a number is the sum of two of them: where one has 8 bits (bf16), and in products that decide something.
    pub split: bool,
}

impl Numbers {
    /// Operands of a turn.
    pub const fn operands(&self) -> u64 {
        if self.split { 2 } else { 1 }
    }

    /// Two times four numbers as two pairs each, of each operand.
    pub fn pack(&self, k: &mut KernelBuilder, mut steps: [[Val; 4]; 2]) -> Vec<[[Val; 2]; 2]> {
        let half = self.half;
        let pack = |k: &mut KernelBuilder, steps: &[[Val; 4]; 2]| {
            steps.map(|v| [k.pack(half, v[0], v[1]), k.pack(half, v[2], v[3])])
        };
        let first = pack(k, &steps);
        if !self.split {
            return vec![first];
        }
        for (rest, packed) in steps.iter_mut().zip(&first) {
            for (i, x) in rest.iter_mut().enumerate() {
                let taken =
                    if i % 2 == 0 { low_half(k, half, packed[i / 2]) } else { high_half(k, half, packed[i / 2]) };
                *x = k.fsub(*x, taken);
            }
        }
        vec![first, pack(k, &steps)]
    }
}
