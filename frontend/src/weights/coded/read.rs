//! Rows of quantised tensors, as the files hold them, to codes, scales and zero points.

use std::ops::Range;

use nextc_ir::format::codes::Codes;
use nextc_ir::source::SourceError;

use super::{Coded, Kind};
use crate::config::Grouped;

/// Numbers of a stored tensor by position: what a checkpoint offers to read coded tensors with.
pub trait Parts {
    /// Bytes of `name` from byte `first` on.
    /// # Errors
    /// [`SourceError`] if the file cannot be read.
    fn bytes(&self, name: &str, first: u64, out: &mut [u8]) -> Result<(), SourceError>;

    /// Elements of the float tensor `name` from element `first` on, widened.
    /// # Errors
    /// [`SourceError`] if the file cannot be read.
    fn floats(&self, name: &str, first: u64, out: &mut [f32]) -> Result<(), SourceError>;
}

/// Columns of AWQ's words in the order of their nibbles.
const AWQ_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

impl Coded {
    /// Reads rows `first .. first + rows` into `out`, which is empty.
    /// # Errors
    /// [`SourceError`] if a file cannot be read, or holds what no code or scale can be.
    pub fn read(&self, parts: &impl Parts, first: u64, rows: u64, out: &mut Codes) -> Result<(), SourceError> {
        out.clear(self.columns as usize);
        let reader = Reader { coded: self, parts, rows: first..first + rows };
        match self.kind {
            Kind::Fp8 => reader.fp8(out),
            Kind::Packed => reader.packed(out),
            Kind::Gptq(grouped) => reader.gptq(grouped, out),
            Kind::Awq(grouped) => reader.awq(grouped, out),
        }
    }
}

struct Reader<'a, P> {
    coded: &'a Coded,
    parts: &'a P,
    rows: Range<u64>,
}

impl<P: Parts> Reader<'_, P> {
    fn name(&self, part: &str) -> String {
        format!("{}.{part}", self.coded.prefix)
    }

    fn wrong(&self, part: &str, reason: String) -> SourceError {
        SourceError::Contents { tensor: self.name(part), reason }
    }

    fn bits(&self) -> u64 {
        self.coded.format.def().bits
    }

    /// Codes in a word.
    fn per_word(&self) -> u64 {
        32 / self.bits()
    }

    fn count(&self) -> u64 {
        self.rows.end - self.rows.start
    }

    fn block(&self) -> (u64, u64) {
        self.coded.format.blocks().map_or((1, 1), |b| (u64::from(b.rows), u64::from(b.columns)))
    }

    fn column_blocks(&self) -> u64 {
        self.coded.columns.div_ceil(self.block().1)
    }

    /// Words `first ..` of a part.
    fn words(&self, part: &str, first: u64, count: u64) -> Result<Vec<u32>, SourceError> {
        let mut bytes = vec![0; count as usize * 4];
        self.parts.bytes(&self.name(part), first * 4, &mut bytes)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect())
    }

    /// Scales `first ..` of a part, which are finite.
    fn scales(&self, part: &str, first: u64, count: u64) -> Result<Vec<f32>, SourceError> {
        let mut scales = vec![0.0; count as usize];
        self.parts.floats(&self.name(part), first, &mut scales)?;
        match scales.iter().position(|x| !x.is_finite()) {
            None => Ok(scales),
            Some(i) => {
                Err(self
                    .wrong(part, format!("element {} is {}, expected a finite number", first + i as u64, scales[i])))
            }
        }
    }

    /// A stored code as the format has it: integers of eight bits are stored with 128 added.
    fn code(&self, stored: u32) -> u8 {
        (if self.bits() == 8 { stored ^ 0x80 } else { stored }) as u8
    }

    /// Code `i` of a word.
    fn nibble(&self, word: u32, i: u64) -> u32 {
        word >> (i * self.bits()) & ((1 << self.bits()) - 1)
    }

    /// The middle of the codes, which stands for zero.
    fn middle(&self) -> u32 {
        1 << (self.bits() - 1)
    }

    fn fp8(&self, out: &mut Codes) -> Result<(), SourceError> {
        let columns = self.coded.columns;
        out.codes.resize((self.count() * columns) as usize, 0);
        self.parts.bytes(&self.name("weight"), self.rows.start * columns, &mut out.codes)?;
        if let Some(i) = out.codes.iter().position(|c| c & 0x7f == 0x7f) {
            let row = self.rows.start + i as u64 / columns;
            return Err(self.wrong("weight", format!("row {row} holds NaN, expected finite numbers")));
        }
        let (block, wide) = (self.block().0, self.column_blocks());
        let bands = self.rows.start / block..self.rows.end.div_ceil(block);
        let scales = self.scales("weight_scale_inv", bands.start * wide, (bands.end - bands.start) * wide)?;
        for row in self.rows.clone() {
            let at = ((row / block - bands.start) * wide) as usize;
            out.scales.extend(&scales[at..at + wide as usize]);
        }
        Ok(())
    }

    fn packed(&self, out: &mut Codes) -> Result<(), SourceError> {
        let (per_word, columns, groups) = (self.per_word(), self.coded.columns, self.column_blocks());
        let wide = columns.div_ceil(per_word);
        let words = self.words("weight_packed", self.rows.start * wide, self.count() * wide)?;
        for row in words.chunks(wide as usize) {
            out.codes.extend((0..columns).map(|c| self.code(self.nibble(row[(c / per_word) as usize], c % per_word))));
        }
        out.scales = self.scales("weight_scale", self.rows.start * groups, self.count() * groups)?;
        let blocks = self.coded.format.blocks();
        if blocks.is_some_and(|b| b.zero) {
            let bands = self.rows.start / per_word..self.rows.end.div_ceil(per_word);
            let words = self.words("weight_zero_point", bands.start * groups, (bands.end - bands.start) * groups)?;
            for row in self.rows.clone() {
                let band = ((row / per_word - bands.start) * groups) as usize;
                let own = &words[band..band + groups as usize];
                out.zeros.extend(own.iter().map(|&w| self.zero(self.nibble(w, row % per_word))));
            }
        }
        if blocks.is_some_and(|b| b.ordered) {
            out.blocks = self.order("weight_g_idx")?;
        }
        Ok(())
    }

    /// A stored zero point, as a difference from the middle.
    fn zero(&self, stored: u32) -> f32 {
        stored as f32 - self.middle() as f32
    }

    /// The group of each column.
    fn order(&self, part: &str) -> Result<Vec<u32>, SourceError> {
        let (order, groups) = (self.words(part, 0, self.coded.columns)?, self.column_blocks());
        match order.iter().position(|&g| u64::from(g) >= groups) {
            None => Ok(order),
            Some(c) => {
                let found = order[c].cast_signed();
                Err(self.wrong(part, format!("column {c} is in group {found}, expected one of {groups} groups")))
            }
        }
    }

    fn gptq(&self, grouped: Grouped, out: &mut Codes) -> Result<(), SourceError> {
        let (per_word, columns, rows) = (self.per_word(), self.coded.columns, self.coded.rows);
        let count = self.count() as usize;
        out.codes.resize(count * columns as usize, 0);
        for word in 0..columns / per_word {
            let words = self.words("qweight", word * rows + self.rows.start, self.count())?;
            for (row, &w) in words.iter().enumerate() {
                let at = row * columns as usize + (word * per_word) as usize;
                for i in 0..per_word {
                    out.codes[at + i as usize] = self.code(self.nibble(w, i));
                }
            }
        }
        self.transposed_scales(grouped, out, |i| i)?;
        if grouped.ordered {
            out.blocks = self.order("g_idx")?;
        } else if let Some(order) = self.order_in_place()? {
            out.blocks = order;
        }
        Ok(())
    }

    /// The groups of the columns where a file has them although it should not need them, and they are not in place.
    fn order_in_place(&self) -> Result<Option<Vec<u32>>, SourceError> {
        match self.order("g_idx") {
            Ok(order) => {
                let size = self.block().1 as usize;
                let in_place = order.iter().enumerate().all(|(c, &g)| g as usize == c / size);
                Ok((!in_place).then_some(order))
            }
            Err(SourceError::Missing(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn awq(&self, grouped: Grouped, out: &mut Codes) -> Result<(), SourceError> {
        let (per_word, columns) = (self.per_word(), self.coded.columns);
        let wide = self.coded.rows / per_word;
        let bands = self.rows.start / per_word..self.rows.end.div_ceil(per_word);
        out.codes.resize((self.count() * columns) as usize, 0);
        for column in 0..columns {
            let words = self.words("qweight", column * wide + bands.start, bands.end - bands.start)?;
            for row in self.rows.clone() {
                let word = words[(row / per_word - bands.start) as usize];
                let at = (row - self.rows.start) * columns + column;
                out.codes[at as usize] = self.code(self.nibble(word, awq_slot(row % per_word)));
            }
        }
        self.transposed_scales(grouped, out, awq_slot)
    }

    /// Scales `[groups, rows]` and zero points `[groups, rows / per_word]`, of which `slot` says where in its word a row is.
    fn transposed_scales(&self, grouped: Grouped, out: &mut Codes, slot: fn(u64) -> u64) -> Result<(), SourceError> {
        let (per_word, rows, groups) = (self.per_word(), self.coded.rows, self.column_blocks());
        let bands = self.rows.start / per_word..self.rows.end.div_ceil(per_word);
        let size = (self.count() * groups) as usize;
        out.scales.resize(size, 0.0);
        let mut zeros = vec![0.0; size];
        for group in 0..groups {
            let scales = self.scales("scales", group * rows + self.rows.start, self.count())?;
            let words = self.words("qzeros", group * (rows / per_word) + bands.start, bands.end - bands.start)?;
            for row in self.rows.clone() {
                let (own, word) = (row - self.rows.start, words[(row / per_word - bands.start) as usize]);
                let at = (own * groups + group) as usize;
                out.scales[at] = scales[own as usize];
                zeros[at] = self.zero(self.nibble(word, slot(row % per_word)) + grouped.zero_offset);
            }
        }
        match zeros.iter().position(|&z| z != 0.0) {
            _ if !grouped.symmetric => out.zeros = zeros,
            None => {}
            Some(i) => {
                let (found, middle) = (zeros[i] + self.middle() as f32, self.middle());
                let reason =
                    format!("a zero point is {found}, expected {middle} as `quantization_config` says symmetric");
                return Err(self.wrong("qzeros", reason));
            }
        }
        Ok(())
    }
}

/// Where in AWQ's word the code of row `i` of its eight is.
fn awq_slot(i: u64) -> u64 {
    AWQ_ORDER.iter().position(|&row| row as u64 == i).unwrap_or(0) as u64
}
