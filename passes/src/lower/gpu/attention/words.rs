//! Operands of products: words of two bf16.
//!
//! A word holds elements `j` and `j + 16` of a block of 32: the order in which KV in bf16 lies ([`KvRow`](nextc_ir::types::KvRow)), and in which everything that is
//! multiplied with it is put.

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::shape::{LANES, pad};
use nextc_ir::{DType, Format, Stored};

use super::super::super::pages::{Pages, UPPER};

/// Elements of a block.
pub const BLOCK_ELEMS: u64 = 2 * LANES;
/// Words of a block.
pub const BLOCK_WORDS: u64 = LANES;

/// Words `4 quad .. 4 quad + 4` of a block of a row.
#[derive(Clone, Copy)]
pub struct Quad {
    /// The block.
    pub block: Val,
    /// Which four words of it.
    pub quad: Val,
}

/// How many 16-bit floats a number becomes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Parts {
    /// One: it is rounded.
    One,
    /// Two, whose sum it nearly is, if it has more bits than one.
    Sum,
}

/// Two numbers as words of bf16: rounded, and where a sum is wanted what that left over.
pub fn pack(k: &mut KernelBuilder, pair: [Val; 2], parts: Parts) -> Vec<Val> {
    pack_as(k, DType::BF16, pair, parts, |k, word| (Format::Bf16.def().unpack)(k, &[word]))
}

/// The same as words of f16.
pub fn pack_f16(k: &mut KernelBuilder, pair: [Val; 2], parts: Parts) -> Vec<Val> {
    pack_as(k, DType::F16, pair, parts, |k, word| {
        let sixteen = k.const_i32(16);
        let upper = k.ushr(word, sixteen);
        vec![k.half_to_float(word), k.half_to_float(upper)]
    })
}

fn pack_as(
    k: &mut KernelBuilder,
    dtype: DType,
    [low, high]: [Val; 2],
    parts: Parts,
    unpack: impl FnOnce(&mut KernelBuilder, Val) -> Vec<Val>,
) -> Vec<Val> {
    let word = k.pack(dtype, low, high);
    if parts == Parts::One {
        return vec![word];
    }
    let rounded = unpack(k, word);
    let (low, high) = (k.fsub(low, rounded[0]), k.fsub(high, rounded[1]));
    vec![word, k.pack(dtype, low, high)]
}

/// Four words of numbers in f32, for each part.
fn pack_four(k: &mut KernelBuilder, low: Val, high: Val, parts: Parts) -> Vec<[Val; 4]> {
    let words = [0, 1, 2, 3].map(|lane| {
        let pair = [k.extract(low, lane), k.extract(high, lane)];
        pack(k, pair, parts)
    });
    (0..words[0].len()).map(|part| [0, 1, 2, 3].map(|i: usize| words[i][part])).collect()
}

/// Four words of a row of `elems` numbers in f32.
pub fn of_floats(k: &mut KernelBuilder, row: Val, elems: u64, at: Quad, parts: Parts) -> Vec<[Val; 4]> {
    let (first, own) = (k.mul_const(at.block, BLOCK_ELEMS), k.mul_const(at.quad, 4));
    let first = k.add(first, own);
    let low = k.load(DType::F32, 4, row, first);
    let second = k.add_const(first, LANES);
    if elems.is_multiple_of(BLOCK_ELEMS) {
        let high = k.load(DType::F32, 4, row, second);
        return pack_four(k, low, high, parts);
    }
    let (end, nothing) = (k.index(elems), k.splat_f32(4, 0.0));
    let exists = k.cmp(Pred::Lt, second, end);
    let second = k.select(exists, second, first);
    let high = k.load(DType::F32, 4, row, second);
    let high = k.select(exists, high, nothing);
    pack_four(k, low, high, parts)
}

/// Four words of a row of KV as they lie: unpacked where they are put.
#[derive(Clone, Copy)]
pub struct Raw {
    words: [Val; 4],
    /// Of codes in 8 bits: where the block's begin in a word, and the row's scale.
    coded: Option<(Val, Val)>,
}

impl Raw {
    /// Those of row `number` of the keys or the values of a page.
    pub fn load(k: &mut KernelBuilder, pages: &Pages, (rows, number): (Val, Val), at: Quad) -> Self {
        let row = pages.row(k, rows, number);
        if pages.row.stored == Stored::F32 {
            let words = of_floats(k, row, pad(pages.row.width), at, Parts::One)[0];
            return Self { words, coded: None };
        }
        let in_line = pages.row.parts() / 2;
        let (line, part) = (k.div_const(at.block, in_line), k.rem_const(at.block, in_line));
        let (first, own) = (k.mul_const(line, BLOCK_WORDS), k.mul_const(at.quad, 4));
        let first = k.add(first, own);
        let words = k.load(DType::I32, 4, row, first);
        let scale = pages.scale(k, rows, number);
        Self { words: four(k, words), coded: scale.map(|scale| (shift(k, part), scale)) }
    }

    /// Its numbers, rounded.
    pub fn words(self, k: &mut KernelBuilder, pages: &Pages) -> [Val; 4] {
        let Some((shift, scale)) = self.coded else { return self.words };
        self.words.map(|word| {
            let codes = decode_two(k, pages.row.stored, word, shift);
            let [low, high] = [0, 1].map(|i: usize| (Format::Bf16.def().unpack)(k, &[codes])[i]);
            let (low, high) = (k.fmul(low, scale), k.fmul(high, scale));
            k.pack(DType::BF16, low, high)
        })
    }
}

/// How far block `part` of a line of four parts lies up in its words.
fn shift(k: &mut KernelBuilder, part: Val) -> Val {
    let (part, sixteen) = (k.narrow(part), k.const_i32(16));
    k.mul(part, sixteen)
}

/// Two codes of 8 bits, from bit `shift` of a word on, as two bf16, which hold them exactly: before their scale.
fn decode_two(k: &mut KernelBuilder, stored: Stored, word: Val, shift: Val) -> Val {
    let (low, high, eight) = (k.const_i32(0xff), k.const_i32(0xff00), k.const_i32(8));
    let two = k.ushr(word, shift);
    let (first, second) = (k.and(two, low), k.and(two, high));
    let second = k.shl(second, eight);
    let both = k.or(first, second);
    let (top, rest) = (k.const_i32(0x0080_0080), k.const_i32(0x007f_007f));
    let (top, rest) = (k.and(both, top), k.and(both, rest));
    if stored == Stored::Int8 {
        // 128 + the lower bits, less 128 or 256
        let (base, minus_one) = (k.const_i32(0x4300_4300), k.const_i32(0xbf80_bf80_u32 as i32));
        let (top, rest) = (k.or(top, base), k.or(rest, base));
        return k.half_fma(DType::BF16, top, minus_one, rest);
    }
    // sign, exponent and mantissa to their places, then the exponent moved by 2^120
    let (four, moved) = (k.const_i32(4), k.const_i32(0x7b80_7b80));
    let (sign, magnitude) = (k.shl(top, eight), k.shl(rest, four));
    let (bits, none) = (k.or(sign, magnitude), k.const_i32(0x8000_8000_u32 as i32));
    k.half_fma(DType::BF16, bits, moved, none)
}

/// A thread's part of a row of KV, loaded first and unpacked later: four words of every other block, or of codes in 8 bits, two words of every line.
#[derive(Clone, Copy)]
pub struct Share {
    /// Where it begins.
    base: Val,
    /// Of blocks: whether it has the second of each pair, 1 or 0.
    odd: Val,
}

impl Share {
    /// The part of a key for thread `q` of four: words `4 q .. 4 q + 4` of even blocks and, as the `second` part, of odd ones; of codes words `4 q`, `4 q + 1` of
    /// lines and, as the second part, the next two.
    pub fn of_key(k: &mut KernelBuilder, pages: &Pages, row: Val, q: Val, second: u64) -> Self {
        let odd = k.index(second);
        if !pages.row.stored.is_scaled() {
            return Self::of_blocks(k, pages, row, (odd, q));
        }
        let own = k.mul_const(q, 16);
        let own = k.add_const(own, 8 * second);
        Self { base: k.offset(row, own), odd }
    }

    /// The part of a value for thread `g` of eight: words `4 (g % 4) ..` of even or of odd blocks; of codes words `2 g` and `2 g + 1` of lines.
    pub fn of_value(k: &mut KernelBuilder, pages: &Pages, row: Val, g: Val) -> Self {
        let (odd, quad) = (k.div_const(g, 4), k.rem_const(g, 4));
        if !pages.row.stored.is_scaled() {
            return Self::of_blocks(k, pages, row, (odd, quad));
        }
        let own = k.mul_const(g, 8);
        Self { base: k.offset(row, own), odd }
    }

    fn of_blocks(k: &mut KernelBuilder, pages: &Pages, row: Val, (odd, quad): (Val, Val)) -> Self {
        let (block, own) = (k.mul_const(odd, block_bytes(pages)), k.mul_const(quad, 16));
        let bytes = k.add(block, own);
        Self { base: k.offset(row, bytes), odd }
    }

    /// This one, or another where the condition does not hold.
    pub fn or(self, k: &mut KernelBuilder, condition: Val, other: Self) -> Self {
        let odd = k.select(condition, self.odd, other.odd);
        Self { base: k.select(condition, self.base, other.base), odd }
    }

    /// Vectors of a pair of blocks.
    pub fn vectors(pages: &Pages) -> usize {
        block_bytes(pages).div_ceil(64) as usize
    }

    /// The vectors of all pairs. In place of a block that does not exist the one before it is read.
    pub fn load(&self, k: &mut KernelBuilder, pages: &Pages) -> Vec<Val> {
        let (elems, bytes) = (pad(pages.row.width), block_bytes(pages));
        let blocks = elems.div_ceil(BLOCK_ELEMS);
        let none = k.const_i64(0);
        let mut vectors = Vec::new();
        for pair in 0..blocks.div_ceil(2) {
            let at = k.index(pair * 2 * bytes / 4);
            if pages.row.stored.is_scaled() {
                vectors.push(k.load(DType::I32, 2, self.base, at));
                continue;
            }
            let is_odd = k.cmp(Pred::Ne, self.odd, none);
            let at = if 2 * pair + 2 <= blocks {
                at
            } else {
                let before = k.const_i64((pair * 2 * bytes / 4) as i64 - (bytes / 4) as i64);
                k.select(is_odd, before, at)
            };
            if pages.row.stored != Stored::F32 {
                vectors.push(k.load(DType::I32, 4, self.base, at));
                continue;
            }
            vectors.push(k.load(DType::F32, 4, self.base, at));
            let second = k.add_const(at, LANES);
            if pair + 1 < blocks.div_ceil(2) || elems.is_multiple_of(BLOCK_ELEMS) {
                vectors.push(k.load(DType::F32, 4, self.base, second));
                continue;
            }
            // the last block has one half: it is the odd one if their number is even
            let yes = k.cmp(Pred::Eq, none, none);
            let is_last = if blocks.is_multiple_of(2) { is_odd } else { yes };
            let (second, nothing) = (k.select(is_last, at, second), k.splat_f32(4, 0.0));
            let high = k.load(DType::F32, 4, self.base, second);
            vectors.push(k.select(is_last, nothing, high));
        }
        vectors
    }
}

/// What several shares have loaded, one after the other.
#[derive(Clone, Copy)]
pub struct Loaded<'v> {
    pages: Pages,
    vectors: &'v [Val],
    /// Vectors of a share.
    each: usize,
}

impl<'v> Loaded<'v> {
    /// Of shares of `pairs` pairs of blocks; and what was loaded behind them.
    pub fn new(pages: Pages, loaded: &'v [Val], (shares, pairs): (usize, usize)) -> (Self, &'v [Val]) {
        let each = pairs * Share::vectors(&pages);
        let (vectors, rest) = loaded.split_at(shares * each);
        (Self { pages, vectors, each }, rest)
    }

    /// The vectors of share `share` of pair `pair`.
    fn of(&self, share: usize, pair: usize) -> &'v [Val] {
        let vectors = Share::vectors(&self.pages);
        &self.vectors[share * self.each + pair * vectors..][..vectors]
    }

    /// Words `4 q .. 4 q + 4` of block `block` of key `key`, which has two shares, for each part; codes in 8 bits before their scale.
    pub fn key(&self, k: &mut KernelBuilder, key: usize, block: usize) -> Vec<[Val; 4]> {
        let (pair, odd) = (block / 2, block % 2);
        if !self.pages.row.stored.is_scaled() {
            return self.blocks(k, 2 * key + odd, pair);
        }
        let lines = [0, 1].map(|part| self.of(2 * key + part, pair)[0]);
        vec![[0, 1, 2, 3].map(|i: usize| self.codes(k, lines[i / 2], i % 2, odd))]
    }

    /// Four words of pair `pair` of value `value`, for each part: those that [`value_element`] says; codes in 8 bits before their scale.
    pub fn value(&self, k: &mut KernelBuilder, value: usize, pair: usize) -> Vec<[Val; 4]> {
        if !self.pages.row.stored.is_scaled() {
            return self.blocks(k, value, pair);
        }
        let line = self.of(value, pair)[0];
        vec![[0, 1, 2, 3].map(|i: usize| self.codes(k, line, i % 2, i / 2))]
    }

    fn blocks(&self, k: &mut KernelBuilder, share: usize, pair: usize) -> Vec<[Val; 4]> {
        match *self.of(share, pair) {
            [low, high] => pack_four(k, low, high, Parts::Sum),
            ref words => vec![four(k, words[0])],
        }
    }

    /// The codes of block `odd` of a line in word `word` of two.
    fn codes(&self, k: &mut KernelBuilder, words: Val, word: usize, odd: usize) -> Val {
        let (word, shift) = (k.extract(words, word as u32), k.const_i32(16 * odd as i32));
        decode_two(k, self.pages.row.stored, word, shift)
    }
}

/// The element of a pair of blocks whose value is in the lower half of word `word` of [`Loaded::value`], for thread `g` of eight; that in the upper one is [`LANES`]
/// further. How many words from this one on hold elements that follow one another: 4, or 2.
pub fn value_element(k: &mut KernelBuilder, pages: &Pages, g: Val, word: u64) -> (Val, u64) {
    if pages.row.stored.is_scaled() {
        let own = k.mul_const(g, 2);
        return (k.add_const(own, word / 2 * BLOCK_ELEMS + word % 2), 2 - word % 2);
    }
    let (odd, quad) = (k.div_const(g, 4), k.rem_const(g, 4));
    let (block, own) = (k.mul_const(odd, BLOCK_ELEMS), k.mul_const(quad, 4));
    let at = k.add(block, own);
    (k.add_const(at, word), 4 - word)
}

/// Bytes of a block of KV.
fn block_bytes(pages: &Pages) -> u64 {
    BLOCK_ELEMS * pages.row.stored.format().def().bits / 8
}

/// The words of a vector.
pub fn four(k: &mut KernelBuilder, words: Val) -> [Val; 4] {
    [0, 1, 2, 3].map(|lane| k.extract(words, lane))
}

/// The words of one element of two rows each: of the lower halves, and of the upper ones.
pub fn across(k: &mut KernelBuilder, first: Val, second: Val) -> [Val; 2] {
    let (sixteen, lower, upper) = (k.const_i32(16), k.const_i32(!UPPER), k.const_i32(UPPER));
    let (low, moved) = (k.and(first, lower), k.shl(second, sixteen));
    let (down, high) = (k.ushr(first, sixteen), k.and(second, upper));
    [k.or(low, moved), k.or(down, high)]
}
