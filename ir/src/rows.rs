//! Rows of a weight from the checkpoint: the runs of an [`Origin`] as one matrix, as numbers or in the codes of its format.

use crate::format::codes::Codes;
use crate::format::{Blocks, Format};
use crate::graph::{Origin, RowRun, WeightDecl};
use crate::shape::pad;
use crate::source::{SourceError, WeightSource};

/// Why a weight cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RowsError {
    /// Its origin does not make it up, or what stands there has no form in its format.
    #[error("weight `{weight}`: {reason}")]
    Weight {
        /// The weight.
        weight: String,
        /// What is wrong.
        reason: String,
    },
    /// Reading failed.
    #[error("weight `{weight}`: {error}")]
    Source {
        /// The weight.
        weight: String,
        /// What happened.
        error: SourceError,
    },
}

/// A weight as a matrix with rows of `columns` numbers, read from where it comes from.
pub struct Rows<'a> {
    name: &'a str,
    decl: &'a WeightDecl,
    runs: Vec<Run<'a>>,
    values: &'a [f32],
    source: &'a dyn WeightSource,
    /// Numbers of a row.
    pub columns: u64,
    /// Rows.
    pub rows: u64,
}

/// A run of rows of a stored tensor, and where it begins in the weight.
struct Run<'a> {
    run: &'a RowRun,
    begins: u64,
    stored_columns: u64,
    format: Format,
}

/// Working memory that is kept from call to call.
#[derive(Debug, Default)]
pub struct Buffers {
    numbers: Vec<f32>,
    stored: Vec<f32>,
    codes: Codes,
}

/// True if rows stored as `stored` have the codes and scales of `wanted`: blocks may be cut into lower ones.
fn has_codes_of(stored: Format, wanted: Format) -> bool {
    match (stored.blocks(), wanted.blocks()) {
        (Some(s), Some(w)) => w.rows <= s.rows && stored.with_blocks(Blocks { rows: w.rows, ..s }) == wanted,
        _ => false,
    }
}

impl<'a> Rows<'a> {
    /// Opens a weight and checks that its origin has exactly its numbers.
    /// # Errors
    /// [`RowsError`] if it has not.
    pub fn open(name: &'a str, decl: &'a WeightDecl, source: &'a dyn WeightSource) -> Result<Self, RowsError> {
        let wrong = |reason: String| RowsError::Weight { weight: name.to_owned(), reason };
        let elems = decl.shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
        let elems = elems.ok_or_else(|| wrong(format!("shape {:?} is too large", decl.shape)))?;
        let (runs, values) = match &decl.origin {
            Origin::Values(values) => (&[][..], values.as_slice()),
            Origin::Rows(runs) => (runs.as_slice(), &[][..]),
        };
        let mut columns = match decl.in_rank {
            0 => None,
            _ => Some(decl.in_dims().iter().product::<u64>()),
        };
        let mut opened = Vec::with_capacity(runs.len());
        let mut begins = 0u64;
        for run in runs {
            let stored = source.tensor(&run.tensor);
            let stored = stored.ok_or_else(|| wrong(format!("the checkpoint has no tensor `{}`", run.tensor)))?;
            let stored_columns: u64 = stored.shape.iter().skip(1).product();
            let stored_rows = stored.shape.first().copied().unwrap_or(1);
            // a vector or table takes whole stored rows
            let columns = *columns.get_or_insert(stored_columns);
            let (end, last) = (run.first.saturating_add(run.rows), run.column.saturating_add(columns));
            if end > stored_rows || last > stored_columns {
                return Err(wrong(format!(
                    "rows {}..{end} and columns {}..{last} of `{}`, which is {:?}",
                    run.first, run.column, run.tensor, stored.shape
                )));
            }
            opened.push(Run { run, begins, stored_columns, format: stored.format });
            begins = begins.saturating_add(run.rows);
        }
        let columns = columns.unwrap_or(1);
        let found = if runs.is_empty() { values.len() as u64 } else { begins.saturating_mul(columns) };
        if found != elems {
            return Err(wrong(format!("{found} numbers for shape {:?}, expected {elems}", decl.shape)));
        }
        let rows = elems.checked_div(columns).unwrap_or(0);
        Ok(Self { name, decl, runs: opened, values, source, columns, rows })
    }

    fn wrong(&self, reason: impl ToString) -> RowsError {
        RowsError::Weight { weight: self.name.to_owned(), reason: reason.to_string() }
    }

    /// Reads the numbers of rows `first ..` into `out`, whole rows, as the checkpoint has them.
    /// # Errors
    /// [`RowsError`] if reading fails.
    pub fn read(&self, first: u64, out: &mut [f32], buffers: &mut Buffers) -> Result<(), RowsError> {
        self.read_numbers(first, out, &mut buffers.stored)
    }

    fn read_numbers(&self, first: u64, out: &mut [f32], stored: &mut Vec<f32>) -> Result<(), RowsError> {
        let columns = self.columns as usize;
        if self.runs.is_empty() {
            let at = first as usize * columns;
            out.copy_from_slice(&self.values[at..at + out.len()]);
            return Ok(());
        }
        let mut rest = out;
        for (run, from, rows) in self.parts(first, (rest.len() / columns) as u64) {
            let (part, after) = rest.split_at_mut(rows as usize * columns);
            self.read_run(run, from, part, stored)?;
            rest = after;
        }
        Ok(())
    }

    /// The parts of runs that make up `rows` rows from `first` on: run, first row of the tensor, rows.
    fn parts(&self, first: u64, rows: u64) -> impl Iterator<Item = (&Run<'a>, u64, u64)> {
        let begin = self.runs.partition_point(|r| r.begins <= first).saturating_sub(1);
        let end = first + rows;
        self.runs[begin..].iter().take_while(move |r| r.begins < end).map(move |r| {
            let (from, to) = (first.max(r.begins), end.min(r.begins + r.run.rows));
            (r, r.run.first + from - r.begins, to - from)
        })
    }

    fn read_run(&self, run: &Run<'_>, first: u64, out: &mut [f32], stored: &mut Vec<f32>) -> Result<(), RowsError> {
        let read = |first, out: &mut [f32]| {
            let result = self.source.read_rows(&run.run.tensor, first, out);
            result.map_err(|error| RowsError::Source { weight: self.name.to_owned(), error })
        };
        if run.stored_columns == self.columns {
            return read(first, out);
        }
        let (wide, columns, skip) = (run.stored_columns as usize, self.columns as usize, run.run.column as usize);
        stored.resize(out.len() / columns * wide, 0.0);
        read(first, stored)?;
        for (to, from) in out.chunks_exact_mut(columns).zip(stored.chunks_exact(wide)) {
            to.copy_from_slice(&from[skip..skip + columns]);
        }
        Ok(())
    }

    /// Columns of a row as stored.
    fn padded_columns(&self) -> u64 {
        crate::shape::padded_elems(self.decl.in_dims())
    }

    /// Reads rows `first .. first + rows` in the codes of the weight's format, in columns as stored (padding is zero): as the
    /// checkpoint has them where it is stored in this format, else rounded to it.
    /// # Errors
    /// [`RowsError`] if reading fails, or if a number has no code.
    pub fn read_codes(&self, first: u64, rows: u64, out: &mut Codes, buffers: &mut Buffers) -> Result<(), RowsError> {
        out.clear(self.padded_columns() as usize);
        let stored = |r: &Run<'_>| has_codes_of(r.format, self.decl.format);
        if !self.runs.is_empty() && self.runs.iter().all(stored) {
            return self.copy_codes(first, rows, out, &mut buffers.codes);
        }
        self.round_codes(first, rows, out, buffers)
    }

    fn copy_codes(&self, first: u64, rows: u64, out: &mut Codes, part: &mut Codes) -> Result<(), RowsError> {
        let format = self.decl.format;
        let blocks = format.blocks().ok_or_else(|| self.wrong("a plain format has no codes"))?;
        let (width, padding) = self.inner_width();
        let zero = (format.def().encode)(0.0) as u8;
        for (run, from, count) in self.parts(first, rows) {
            part.clear(run.stored_columns as usize);
            let read = self.source.read_codes(&run.run.tensor, from, count, part);
            read.map_err(|error| RowsError::Source { weight: self.name.to_owned(), error })?;
            let (skip, columns) = (run.run.column as usize, self.columns as usize);
            for row in part.codes.chunks_exact(run.stored_columns as usize) {
                for inner in row[skip..skip + columns].chunks(width) {
                    out.codes.extend(inner);
                    out.codes.extend(std::iter::repeat_n(zero, padding));
                }
            }
            let per_row = part.row_blocks().max(1);
            let (skip, used) = match part.blocks.is_empty() {
                true => (skip / blocks.columns as usize, columns.div_ceil(blocks.columns as usize)),
                false => (0, per_row),
            };
            let cut = |from: &[f32], to: &mut Vec<f32>| {
                from.chunks_exact(per_row).for_each(|row| to.extend(&row[skip..skip + used]));
            };
            cut(&part.scales, &mut out.scales);
            cut(&part.zeros, &mut out.zeros);
            if blocks.unit > 0 {
                let unit = blocks.unit as usize;
                let (skip, used) = (run.run.column as usize / unit, columns.div_ceil(unit));
                let wide = (run.stored_columns as usize).div_ceil(unit);
                part.units.chunks_exact(wide).for_each(|row| out.units.extend(&row[skip..skip + used]));
            }
            if !part.blocks.is_empty() && out.blocks.is_empty() {
                out.blocks.clone_from(&part.blocks);
            } else if part.blocks != out.blocks {
                return Err(self.wrong("rows of tensors whose columns have different orders"));
            }
        }
        Ok(())
    }

    /// Width of the innermost input dimension, and how much padding follows it.
    fn inner_width(&self) -> (usize, usize) {
        let width = self.decl.in_dims().last().copied().unwrap_or(1);
        (width as usize, (pad(width) - width) as usize)
    }

    fn round_codes(&self, first: u64, rows: u64, out: &mut Codes, buffers: &mut Buffers) -> Result<(), RowsError> {
        let blocks = self.decl.format.blocks().ok_or_else(|| self.wrong("a plain format has no codes"))?;
        let Buffers { numbers, stored, codes } = buffers;
        let inner = self.decl.out_dims().last().copied().unwrap_or(1);
        let (width, _) = self.inner_width();
        let end = first + rows;
        let mut row = first;
        while row < end {
            // whole blocks of rows, as far as this index of the outer dimensions goes
            let outer = row / inner * inner;
            let begin = outer + (row - outer) / u64::from(blocks.rows) * u64::from(blocks.rows);
            let stop = outer + (end.min(outer + inner) - outer).next_multiple_of(u64::from(blocks.rows)).min(inner);
            numbers.resize(((stop - begin) * self.columns) as usize, 0.0);
            self.read_numbers(begin, numbers, stored)?;
            codes.clear(out.columns);
            let mut padded = vec![0f32; (stop - begin) as usize * out.columns];
            for (from, to) in numbers.chunks(width).zip(padded.chunks_mut(pad(width as u64) as usize)) {
                to[..width].copy_from_slice(from);
            }
            codes.round(self.decl.format, &padded).map_err(|e| self.wrong(e))?;
            let kept = (row - begin) as usize..(end.min(stop) - begin) as usize;
            out.codes.extend(&codes.codes[kept.start * out.columns..kept.end * out.columns]);
            let per_row = codes.row_blocks();
            out.scales.extend(&codes.scales[kept.start * per_row..kept.end * per_row]);
            row = end.min(stop);
        }
        Ok(())
    }
}
