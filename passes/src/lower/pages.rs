//! KV in memory: which page holds a position, and how rows of it are read and written.
//!
//! `[page][kv head][k, v]`: rows of [`KvRow`] for all tokens of a page, whose lines of 64 bytes are read as one vector of 16 elements for each part of a word, then
//! their scales, where they have some.

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Input;
use nextc_ir::shape::{LANES, Sym};
use nextc_ir::types::KvRow;
use nextc_ir::{DType, Stored};

use super::gpu::{Element, warp_max, warp_sum};
use super::kv_codes::{self, Extremes};
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
        let words = self.row.page_bytes(self.page_tokens) / 4;
        let page = row_ptr(k, kv, id, self.heads * 2 * words);
        let keys = row_ptr(k, page, head, 2 * words);
        let bytes = k.index(words * 4);
        (keys, k.offset(keys, bytes))
    }

    /// Pointer to row `number` of the keys or the values of a page.
    pub(super) fn row(&self, k: &mut KernelBuilder, rows: Val, number: Val) -> Val {
        row_ptr(k, rows, number, self.row.bytes() / 4)
    }

    /// Pointer to the scale of row `number` of the keys or the values of a page, where rows have one.
    pub(super) fn scale_ptr(&self, k: &mut KernelBuilder, rows: Val, number: Val) -> Option<Val> {
        self.row.stored.is_scaled().then(|| {
            let scales = k.index(self.page_tokens * self.row.bytes());
            let scales = k.offset(rows, scales);
            row_ptr(k, scales, number, self.row.scale_bytes() / 4)
        })
    }

    /// The scale of row `number` of the keys or the values of a page, where rows have one.
    pub(super) fn scale(&self, k: &mut KernelBuilder, rows: Val, number: Val) -> Option<Val> {
        let at = self.scale_ptr(k, rows, number)?;
        let zero = k.const_i64(0);
        Some(k.load_f32(at, zero))
    }

    /// Vectors of a line that hold elements.
    pub(super) fn parts_of(&self, line: u64) -> u64 {
        let left = self.row.width - line * self.row.line_elems();
        left.div_ceil(LANES).min(self.row.parts())
    }

    /// The first `parts` vectors of a line of a row, each the next 16 elements, before their scale.
    pub(super) fn load_line(&self, k: &mut KernelBuilder, row: Val, line: Val, parts: u64) -> Vec<Val> {
        let at = k.mul_const(line, LANES);
        let words = k.load(DType::I32, LANES as u32, row, at);
        let mut vectors = (self.row.stored.format().def().unpack)(k, &[words]);
        vectors.truncate(parts as usize);
        vectors
    }

    /// All of row `number` of the keys or the values of a page, each vector the next 16 elements.
    pub(super) fn load_row(&self, k: &mut KernelBuilder, rows: Val, number: Val) -> Vec<Val> {
        let row = self.row(k, rows, number);
        let lines = (0..self.row.lines()).map(|line| {
            let at = k.index(line);
            self.load_line(k, row, at, self.parts_of(line))
        });
        let vectors = lines.collect::<Vec<_>>().concat();
        let Some(scale) = self.scale(k, rows, number) else { return vectors };
        let scale = k.splat(scale, LANES as u32);
        vectors.into_iter().map(|x| k.fmul(x, scale)).collect()
    }

    /// Stores the head at `from`, as f32, as row `number` of the keys or the values of a page.
    pub(super) fn store_row(&self, k: &mut KernelBuilder, (rows, number): (Val, Val), from: Val) {
        let vectors: Vec<Val> = (0..self.row.width)
            .step_by(LANES as usize)
            .map(|at| {
                let at = k.index(at);
                k.load_f32x16(from, at)
            })
            .collect();
        let scale = self.scale_ptr(k, rows, number).map(|at| {
            let lanes = Extremes::of(k, &vectors);
            let all = Extremes { largest: k.reduce_max(lanes.largest), spoilt: k.reduce_add(lanes.spoilt) };
            let (scale, zero) = (all.scale(k, self.row.stored), k.const_i64(0));
            k.store(at, zero, scale);
            k.splat(scale, LANES as u32)
        });
        let row = self.row(k, rows, number);
        for (line, vectors) in (0..).zip(vectors.chunks(self.row.parts() as usize)) {
            let at = k.index(line * LANES);
            let words = self.encode_line(k, vectors, scale);
            k.store(row, at, words);
        }
    }

    /// The words of a line that holds these vectors.
    fn encode_line(&self, k: &mut KernelBuilder, vectors: &[Val], scale: Option<Val>) -> Val {
        match (scale, vectors) {
            (Some(scale), vectors) => {
                let codes: Vec<Val> = vectors.iter().map(|&x| kv_codes::encode(k, self.row.stored, x, scale)).collect();
                kv_codes::words(k, &codes)
            }
            (None, &[x]) if self.row.stored == Stored::F32 => x,
            (None, &[low]) => {
                let none = k.splat_f32(LANES as u32, 0.0);
                both_bf16(k, low, none)
            }
            (None, halves) => both_bf16(k, halves[0], halves[1]),
        }
    }

    /// Stores a head as row `number` of the keys or the values of a page, by a warp: element `lane + 32 i` is number `i` of thread `lane`.
    pub(super) fn store_by_warp(
        &self,
        k: &mut KernelBuilder,
        (rows, number): (Val, Val),
        (elements, numbers): (&[Element], &[Val]),
    ) {
        let row = self.row(k, rows, number);
        if self.row.stored == Stored::F32 {
            elements.iter().zip(numbers).for_each(|(element, &x)| element.store(k, row, x));
            return;
        }
        let nothing = k.const_f32(0.0);
        let numbers: Vec<Val> = elements
            .iter()
            .zip(numbers)
            .map(|(element, &x)| element.exists.map_or(x, |exists| k.select(exists, x, nothing)))
            .collect();
        let lane = elements[0].lane;
        let (zero, half) = (k.const_i64(0), k.index(LANES));
        let is_low = k.cmp(Pred::Lt, lane, half);
        let scale = self.scale_ptr(k, rows, number).map(|at| {
            let own = Extremes::of(k, &numbers);
            let all = Extremes { largest: warp_max(k, own.largest), spoilt: warp_sum(k, own.spoilt) };
            let scale = all.scale(k, self.row.stored);
            let is_first = k.cmp(Pred::Eq, lane, zero);
            k.if_then(is_first, |k| k.store(at, zero, scale));
            scale
        });
        // a thread of the lower half has one part of each two of a line, its partner the other
        for (line, numbers) in (0..).zip(numbers.chunks(self.row.parts() as usize / 2)) {
            let pairs = numbers.iter().map(|&x| match scale {
                None => {
                    let other = k.shuffle_xor(x, LANES as u32);
                    vec![k.pack(DType::BF16, x, other)]
                }
                Some(scale) => {
                    let code = kv_codes::encode(k, self.row.stored, x, scale);
                    vec![code, k.shuffle_xor(code, LANES as u32)]
                }
            });
            let codes = pairs.collect::<Vec<_>>().concat();
            let word = if scale.is_some() { kv_codes::words(k, &codes) } else { codes[0] };
            let at = k.add_const(lane, line * LANES);
            k.if_then(is_low, |k| k.store(row, at, word));
        }
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
