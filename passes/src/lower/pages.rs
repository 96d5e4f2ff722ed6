//! KV in memory: which page holds a position, and how rows of it are read and written.
//!
//! `[page][kv head][k, v][page tokens]` rows of [`KvRow`], whose lines of 64 bytes are read as one vector of 16 elements for each part of a word.

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Input;
use nextc_ir::shape::{LANES, Sym};
use nextc_ir::types::KvRow;
use nextc_ir::{DType, Format};

use super::gpu::Element;
use super::matmul::row_ptr;
use super::ports::{Port, Ports, Site};

/// Where the keys and values of a layer lie.
#[derive(Clone, Copy)]
pub(super) struct Pages {
    kv: Port,
    table: Port,
    positions: Port,
    /// Where the tokens of sequences begin.
    pub cu_seqlens: Port,
    slot: Port,
    /// Heads of keys and values.
    pub heads: u64,
    /// A head of either.
    pub row: KvRow,
    /// Positions of a page.
    pub page_tokens: u64,
}

impl Pages {
    pub(super) fn ports(site: &Site<'_>, ports: &mut Ports, written: bool) -> Self {
        let kv = site.named("kv");
        let state = site.state(kv);
        Self {
            heads: state.dims[0],
            row: state.kv_row(),
            kv: if written { ports.write("kv", kv) } else { ports.read("kv", kv) },
            table: ports.step(Input::PageTable),
            positions: ports.step(Input::Positions),
            cu_seqlens: ports.step(Input::CuSeqlens),
            slot: ports.step(Input::Slot),
            page_tokens: site.target.page_tokens,
        }
    }

    /// The sequence that token `t` belongs to: how many sequences end at or before it.
    pub(super) fn sequence(&self, k: &mut KernelBuilder, t: Val) -> Val {
        let cu_seqlens = k.param(self.cu_seqlens);
        let (zero, count) = (k.const_i64(0), k.dim(Sym::B));
        k.for_carry((zero, count, 1), &[zero], |k, b, found| {
            let next = k.add_const(b, 1);
            let end = k.load_index(cu_seqlens, next);
            let before = k.cmp(Pred::Le, end, t);
            vec![k.select(before, next, found[0])]
        })[0]
    }

    /// The slot of sequence `b`; negative for padding.
    pub(super) fn slot(&self, k: &mut KernelBuilder, b: Val) -> Val {
        let slot = k.param(self.slot);
        k.load_index(slot, b)
    }

    /// The position of token `t`.
    pub(super) fn position(&self, k: &mut KernelBuilder, t: Val) -> Val {
        let positions = k.param(self.positions);
        k.load_index(positions, t)
    }

    /// Pointers to the keys and values of one kv head in page number `page` of sequence `b`.
    pub(super) fn block(&self, k: &mut KernelBuilder, b: Val, page: Val, head: Val) -> (Val, Val) {
        let (table, kv, pages) = (k.param(self.table), k.param(self.kv), k.dim(Sym::P));
        let row = k.mul(b, pages);
        let at = k.add(row, page);
        let id = k.load_index(table, at);
        let words = self.page_tokens * self.row.bytes() / 4;
        let page = row_ptr(k, kv, id, self.heads * 2 * words);
        let keys = row_ptr(k, page, head, 2 * words);
        let bytes = k.index(words * 4);
        (keys, k.offset(keys, bytes))
    }

    /// Pointer to row `number` of the keys or the values of a page.
    pub(super) fn row(&self, k: &mut KernelBuilder, rows: Val, number: Val) -> Val {
        row_ptr(k, rows, number, self.row.bytes() / 4)
    }

    /// Vectors of a line that hold elements.
    pub(super) fn parts_of(&self, line: u64) -> u64 {
        let left = self.row.width - line * self.row.line_elems();
        left.div_ceil(LANES).min(self.row.parts())
    }

    /// The first `parts` vectors of a line of a row, each the next 16 elements.
    pub(super) fn load_line(&self, k: &mut KernelBuilder, row: Val, line: Val, parts: u64) -> Vec<Val> {
        let at = k.mul_const(line, LANES);
        if self.row.dtype == DType::F32 {
            return vec![k.load_f32x16(row, at)];
        }
        let words = k.load(DType::I32, LANES as u32, row, at);
        let mut halves = (Format::Bf16.def().unpack)(k, &[words]);
        halves.truncate(parts as usize);
        halves
    }

    /// All of a row, each vector the next 16 elements.
    pub(super) fn load_row(&self, k: &mut KernelBuilder, row: Val) -> Vec<Val> {
        let lines = (0..self.row.lines()).map(|line| {
            let at = k.index(line);
            self.load_line(k, row, at, self.parts_of(line))
        });
        lines.collect::<Vec<_>>().concat()
    }

    /// Stores the head at `from`, as f32, as a row.
    pub(super) fn store_row(&self, k: &mut KernelBuilder, row: Val, from: Val) {
        for line in 0..self.row.lines() {
            let vectors = (0..self.parts_of(line)).map(|part| {
                let at = k.index(line * self.row.line_elems() + part * LANES);
                k.load_f32x16(from, at)
            });
            let vectors: Vec<Val> = vectors.collect();
            let at = k.index(line * LANES);
            let words = match (self.row.dtype, vectors.as_slice()) {
                (DType::F32, &[x]) => x,
                (_, &[low]) => {
                    let none = k.splat_f32(LANES as u32, 0.0);
                    both_bf16(k, low, none)
                }
                (_, halves) => both_bf16(k, halves[0], halves[1]),
            };
            k.store(row, at, words);
        }
    }

    /// Stores 32 elements of a row from `first` on, of which each thread of a warp has one, if it exists.
    pub(super) fn store_32(&self, k: &mut KernelBuilder, (row, first): (Val, u64), element: &Element, x: Val) {
        if self.row.dtype == DType::F32 {
            return element.store(k, row, x);
        }
        let nothing = k.const_f32(0.0);
        let x = element.exists.map_or(x, |exists| k.select(exists, x, nothing));
        let other = k.shuffle_xor(x, LANES as u32);
        let word = k.pack(self.row.dtype, x, other);
        let (at, half) = (k.add_const(element.lane, first / 2), k.index(LANES));
        let is_low = k.cmp(Pred::Lt, element.lane, half);
        k.if_then(is_low, |k| k.store(row, at, word));
    }
}

/// The upper half of a word.
pub(super) const UPPER: i32 = 0xffff_0000_u32 as i32;

/// Two vectors rounded to bf16, to nearest even, as the halves of words. A NaN as arithmetic makes it stays one.
fn both_bf16(k: &mut KernelBuilder, low: Val, high: Val) -> Val {
    let [low, high] = [low, high].map(|x| {
        let bits = k.bitcast(x, DType::I32);
        let (sixteen, one, half) = (k.i32_like(bits, 16), k.i32_like(bits, 1), k.i32_like(bits, 0x7fff));
        let odd = k.ushr(bits, sixteen);
        let odd = k.and(odd, one);
        let up = k.add(odd, half);
        k.add(bits, up)
    });
    let (sixteen, upper) = (k.i32_like(low, 16), k.i32_like(low, UPPER));
    let (low, high) = (k.ushr(low, sixteen), k.and(high, upper));
    k.or(low, high)
}
