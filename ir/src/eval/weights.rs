//! The weights of a run, read once and shared.

use std::collections::HashMap;

use super::EvalError;
use super::datum::{Datum, Real};
use crate::graph::{Module, Origin, RowRun, WeightDecl};
use crate::source::{SourceError, WeightSource};

/// Named weights, as the numbers they stand for. Clone an `Arc` of it to share it between sessions.
#[derive(Clone, Debug, Default)]
pub struct WeightStore<F> {
    weights: HashMap<String, Datum<F>>,
}

impl<F: Real> WeightStore<F> {
    /// A store of no weights.
    pub fn new() -> Self {
        Self { weights: HashMap::new() }
    }

    /// Reads every weight of the module's table.
    /// # Errors
    /// [`EvalError::Source`] if the checkpoint lacks something, [`EvalError::Weight`] if its rows do not make up a weight.
    pub fn load(module: &Module, source: &dyn WeightSource) -> Result<Self, EvalError> {
        let load = |(name, decl): (&String, &WeightDecl)| Ok((name.clone(), load_weight(name, decl, source)?));
        Ok(Self { weights: module.weights.iter().map(load).collect::<Result<_, EvalError>>()? })
    }

    /// Adds or replaces a weight.
    pub fn insert(&mut self, name: &str, value: Datum<F>) {
        self.weights.insert(name.to_owned(), value);
    }

    /// The weight called `name`.
    /// # Errors
    /// [`EvalError::NoWeight`] if there is none.
    pub fn get(&self, name: &str) -> Result<&Datum<F>, EvalError> {
        self.weights.get(name).ok_or_else(|| EvalError::NoWeight(name.to_owned()))
    }
}

/// Elements that a weight takes from each row of its runs: all runs together make up its shape.
fn taken_per_row(decl: &WeightDecl, runs: &[RowRun]) -> Option<usize> {
    let elems = decl.shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d))?;
    let rows = runs.iter().try_fold(0u64, |n, run| n.checked_add(run.rows))?;
    let taken = elems.checked_div(rows)?;
    (taken * rows == elems).then_some(taken as usize)
}

fn load_weight<F: Real>(name: &str, decl: &WeightDecl, source: &dyn WeightSource) -> Result<Datum<F>, EvalError> {
    let dims: Vec<usize> = decl.shape.iter().map(|&d| d as usize).collect();
    let wrong = |reason: String| EvalError::Weight { weight: name.to_owned(), reason };
    let runs = match &decl.origin {
        Origin::Values(values) => return Datum::floats(&dims, values.iter().map(|&v| F::of(f64::from(v))).collect()),
        Origin::Rows(runs) => runs,
    };
    let taken = taken_per_row(decl, runs).ok_or_else(|| wrong(format!("{runs:?} do not make up {dims:?}")))?;
    let mut data = Vec::with_capacity(dims.iter().product());
    for run in runs {
        let stored = source.tensor(&run.tensor).ok_or_else(|| SourceError::Missing(run.tensor.clone()))?;
        let width = stored.shape.iter().skip(1).product::<u64>() as usize;
        let rows = stored.shape.first().copied().unwrap_or(1);
        if run.first.checked_add(run.rows).is_none_or(|end| end > rows) {
            let end = run.first.saturating_add(run.rows);
            return Err(SourceError::Rows { tensor: run.tensor.clone(), rows, first: run.first, end }.into());
        }
        let column = run.column as usize;
        if column.checked_add(taken).is_none_or(|end| end > width) {
            return Err(wrong(format!("{taken} columns from {column} of `{}`, which has {width}", run.tensor)));
        }
        let mut block = vec![0.0f32; run.rows as usize * width];
        source.read_rows(&run.tensor, run.first, &mut block)?;
        for row in block.chunks_exact(width) {
            data.extend(row[column..column + taken].iter().map(|&v| F::of(f64::from(v))));
        }
    }
    Datum::floats(&dims, data)
}
