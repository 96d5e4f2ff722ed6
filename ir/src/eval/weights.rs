//! The weights of a run, read once and shared.

use std::collections::HashMap;

use super::EvalError;
use super::datum::{Datum, Real};
use crate::format::codes::Codes;
use crate::graph::{Module, WeightDecl};
use crate::layout::padded_index;
use crate::rows::{Buffers, Rows};
use crate::source::WeightSource;

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
    /// [`EvalError::Rows`] if the checkpoint lacks something, or if its rows do not make up a weight.
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

/// Rows that are read together.
const BAND_ROWS: u64 = 1024;

fn load_weight<F: Real>(name: &str, decl: &WeightDecl, source: &dyn WeightSource) -> Result<Datum<F>, EvalError> {
    let dims: Vec<usize> = decl.shape.iter().map(|&d| d as usize).collect();
    let rows = Rows::open(name, decl, source)?;
    let mut buffers = Buffers::default();
    let mut data = Vec::with_capacity(dims.iter().product());
    for first in (0..rows.rows).step_by(BAND_ROWS as usize) {
        let count = BAND_ROWS.min(rows.rows - first);
        match decl.format.blocks() {
            Some(_) => load_codes(decl, &rows, (first, count), &mut data, &mut buffers)?,
            None => load_plain(decl, &rows, (first, count), &mut data, &mut buffers)?,
        }
    }
    Datum::floats(&dims, data)
}

/// Appends rows as their plain format holds them.
fn load_plain<F: Real>(
    decl: &WeightDecl,
    rows: &Rows<'_>,
    (first, count): (u64, u64),
    data: &mut Vec<F>,
    buffers: &mut Buffers,
) -> Result<(), EvalError> {
    let mut numbers = vec![0f32; (count * rows.columns) as usize];
    rows.read(first, &mut numbers, buffers)?;
    let def = decl.format.def();
    data.extend(numbers.iter().map(|&x| F::of(f64::from((def.decode)((def.encode)(x))))));
    Ok(())
}

/// Appends the numbers that rows of codes stand for.
fn load_codes<F: Real>(
    decl: &WeightDecl,
    rows: &Rows<'_>,
    (first, count): (u64, u64),
    data: &mut Vec<F>,
    buffers: &mut Buffers,
) -> Result<(), EvalError> {
    let mut codes = Codes::default();
    let inner = decl.out_dims().last().copied().unwrap_or(1);
    let mut row = first;
    while row < first + count {
        // an index of the outer dimensions at a time: each may have its own order of columns
        let end = (first + count).min((row / inner + 1) * inner);
        rows.read_codes(row, end - row, &mut codes, buffers)?;
        for r in 0..(end - row) as usize {
            let stored = |c: u64| padded_index(decl.in_dims(), c) as usize;
            data.extend((0..rows.columns).map(|c| F::of(codes.number(decl.format, r, stored(c)))));
        }
        row = end;
    }
    Ok(())
}
