//! Rows of a weight from the checkpoint: the runs of an [`Origin`] as one matrix.

use nextc_ir::graph::{Origin, RowRun, WeightDecl};
use nextc_ir::source::WeightSource;

use crate::error::LinkError;

/// A weight as a matrix with rows of `columns` numbers, read from where it comes from.
pub(crate) struct Rows<'a> {
    name: &'a str,
    runs: Vec<Run<'a>>,
    values: &'a [f32],
    source: &'a dyn WeightSource,
    /// Numbers of a row.
    pub columns: u64,
}

/// A run of rows of a stored tensor, and where it begins in the weight.
struct Run<'a> {
    run: &'a RowRun,
    begins: u64,
    stored_columns: u64,
}

impl<'a> Rows<'a> {
    /// Opens a weight and checks that its origin has exactly its numbers.
    pub fn open(name: &'a str, decl: &'a WeightDecl, source: &'a dyn WeightSource) -> Result<Self, LinkError> {
        let elems: u64 = decl.shape.iter().product();
        let error = |reason: String| LinkError::Weight { weight: name.to_owned(), reason };
        let (runs, values) = match &decl.origin {
            Origin::Values(values) => (&[][..], values.as_slice()),
            Origin::Rows(runs) => (runs.as_slice(), &[][..]),
        };
        let mut columns = match decl.in_rank {
            0 => None,
            _ => Some(decl.in_dims().iter().product::<u64>()),
        };
        let mut opened = Vec::with_capacity(runs.len());
        let mut begins = 0;
        for run in runs {
            let stored = source
                .tensor(&run.tensor)
                .ok_or_else(|| error(format!("the checkpoint has no tensor `{}`", run.tensor)))?;
            let stored_columns: u64 = stored.shape.iter().skip(1).product();
            let stored_rows = stored.shape.first().copied().unwrap_or(1);
            // a vector or table takes whole stored rows
            let columns = *columns.get_or_insert(stored_columns);
            if run.first + run.rows > stored_rows || run.column + columns > stored_columns {
                return Err(error(format!(
                    "rows {}..{} and columns {}..{} of `{}`, which is {:?}",
                    run.first,
                    run.first + run.rows,
                    run.column,
                    run.column + columns,
                    run.tensor,
                    stored.shape
                )));
            }
            opened.push(Run { run, begins, stored_columns });
            begins += run.rows;
        }
        let columns = columns.unwrap_or(1);
        let found = if runs.is_empty() { values.len() as u64 } else { begins * columns };
        if found != elems {
            return Err(error(format!("{found} numbers for shape {:?}, expected {elems}", decl.shape)));
        }
        Ok(Self { name, runs: opened, values, source, columns })
    }

    /// Reads rows `first ..` into `out`, whole rows; `buffer` is working memory that is kept from call to call.
    pub fn read(&self, first: u64, out: &mut [f32], buffer: &mut Vec<f32>) -> Result<(), LinkError> {
        let columns = self.columns as usize;
        if self.runs.is_empty() {
            let at = first as usize * columns;
            out.copy_from_slice(&self.values[at..at + out.len()]);
            return Ok(());
        }
        let (mut row, mut out) = (first, out);
        while !out.is_empty() {
            let run = &self.runs[self.runs.partition_point(|r| r.begins <= row) - 1];
            let skip = row - run.begins;
            let rows = (run.run.rows - skip).min((out.len() / columns) as u64);
            let (part, rest) = out.split_at_mut(rows as usize * columns);
            self.read_run(run, run.run.first + skip, part, buffer)?;
            out = rest;
            row += rows;
        }
        Ok(())
    }

    fn read_run(&self, run: &Run<'_>, first: u64, out: &mut [f32], buffer: &mut Vec<f32>) -> Result<(), LinkError> {
        let read = |first, out: &mut [f32]| {
            let result = self.source.read_rows(&run.run.tensor, first, out);
            result.map_err(|error| LinkError::Source { weight: self.name.to_owned(), error })
        };
        if run.stored_columns == self.columns {
            return read(first, out);
        }
        let (stored, columns, skip) = (run.stored_columns as usize, self.columns as usize, run.run.column as usize);
        buffer.resize(out.len() / columns * stored, 0.0);
        read(first, buffer)?;
        for (to, from) in out.chunks_exact_mut(columns).zip(buffer.chunks_exact(stored)) {
            to.copy_from_slice(&from[skip..skip + columns]);
        }
        Ok(())
    }
}
