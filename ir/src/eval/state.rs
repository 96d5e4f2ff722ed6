//! What sequences carry from step to step, and which sequences a step has.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use super::EvalError;
use super::datum::{Array, Real};
use crate::types::{StateKind, StateType, TENTATIVE_TOKENS};

/// One version of a state: units (pages of KV, slots of the others) that exist once they are touched, zero before.
///
/// A unit holds, row-major and without padding: KV `[num_kv_heads][k, v][page_tokens][head_dim]`; conv
/// `[taps - 1 + TENTATIVE_TOKENS][heads][width]`, a ring: the input at position `p` in row `p % rows`, zeros where a sequence begins; delta for each value head
/// `[head_k_dim][head_v_dim]`, then `k`, `d` and the decay of each tentative token. A clone shares its units until one is
/// written.
#[derive(Clone, Debug, PartialEq)]
pub struct State<F> {
    ty: StateType,
    unit_elems: usize,
    units: BTreeMap<u32, Arc<Vec<F>>>,
}

impl<F: Real> State<F> {
    /// A state that nothing was written to.
    pub fn new(ty: &StateType, page_tokens: usize) -> Self {
        let elems = ty.dims.iter().product::<u64>() as usize;
        let kept = TENTATIVE_TOKENS as usize;
        let dims: Vec<usize> = ty.dims.iter().map(|&d| d as usize).collect();
        let unit_elems = match (ty.kind, dims.as_slice()) {
            (StateKind::Kv, _) => 2 * page_tokens * elems,
            (StateKind::Conv, [heads, width, _]) => elems + kept * heads * width,
            (StateKind::Delta, [heads, dk, dv]) => elems + kept * heads * (dk + dv + 1),
            _ => elems,
        };
        Self { ty: ty.clone(), unit_elems, units: BTreeMap::new() }
    }

    /// What it is.
    pub fn kind(&self) -> StateKind {
        self.ty.kind
    }

    /// Its type.
    pub fn ty(&self) -> &StateType {
        &self.ty
    }

    /// Elements of one unit.
    pub fn unit_elems(&self) -> usize {
        self.unit_elems
    }

    /// The units that were touched, in order.
    pub fn units(&self) -> impl Iterator<Item = (u32, &[F])> {
        self.units.iter().map(|(&i, unit)| (i, unit.as_slice()))
    }

    /// Unit `i`, if it was touched.
    pub fn unit(&self, i: u32) -> Option<&[F]> {
        self.units.get(&i).map(|unit| unit.as_slice())
    }

    /// Unit `i`, to write.
    pub fn unit_mut(&mut self, i: u32) -> &mut [F] {
        let unit: &mut Arc<Vec<F>> =
            self.units.entry(i).or_insert_with(|| Arc::new(vec![F::default(); self.unit_elems]));
        Arc::make_mut(unit).as_mut_slice()
    }

    /// Demands the dimensions `dims`.
    /// # Errors
    /// [`EvalError::Dims`] if it has others.
    pub fn is(&self, dims: &[usize]) -> Result<(), EvalError> {
        let found: Vec<usize> = self.ty.dims.iter().map(|&d| d as usize).collect();
        if found == dims { Ok(()) } else { Err(EvalError::Dims { found, expected: format!("{dims:?}") }) }
    }
}

/// The tokens of one sequence in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Which sequence of the step.
    pub sequence: usize,
    /// Its rows.
    pub tokens: Range<usize>,
    /// The slot of its state.
    pub slot: u32,
    /// Kept tokens that come before it.
    pub replay: usize,
    /// Whether its tokens are kept instead of done.
    pub tentative: bool,
}

/// The sequences of a step, checked: rows are within the step, no slot is owned twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequences {
    positions: Vec<i32>,
    runs: Vec<Run>,
    page_table: Vec<i32>,
    pages: usize,
}

impl Sequences {
    /// From positions `[T]`, cu_seqlens `[B+1]`, slot `[B]` and page_table `[B, P]`.
    /// # Errors
    /// [`EvalError::Sequences`] saying what contradicts what.
    pub fn new(
        positions: &Array<i32>,
        cu_seqlens: &Array<i32>,
        slot: &Array<i32>,
        page_table: &Array<i32>,
    ) -> Result<Self, EvalError> {
        let ([tokens], [count], [_]) = (positions.rank()?, slot.rank()?, cu_seqlens.rank()?);
        let [_, pages] = page_table.rank()?;
        page_table.is(&[count, pages])?;
        cu_seqlens.is(&[count + 1])?;
        let wrong = |reason: String| Err(EvalError::Sequences(reason));
        let (ends, positions) = (cu_seqlens.data(), positions.data().to_vec());
        if ends[0] != 0 || ends.windows(2).any(|w| w[0] > w[1]) || ends[count] as usize > tokens {
            return wrong(format!("`cu_seqlens` {ends:?} does not ascend from 0 to at most {tokens} tokens"));
        }
        let mut runs = Vec::new();
        let mut owned = BTreeSet::new();
        for (sequence, &slot) in slot.data().iter().enumerate() {
            let Ok(slot) = u32::try_from(slot) else { continue };
            let tokens = ends[sequence] as usize..ends[sequence + 1] as usize;
            if tokens.is_empty() {
                continue;
            }
            if !owned.insert(slot) {
                return wrong(format!("slot {slot} belongs to two sequences"));
            }
            if let Some(p) = positions[tokens.clone()].iter().find(|&&p| p < 0) {
                return wrong(format!("position {p} of sequence {sequence} is negative"));
            }
            runs.push(Run { sequence, tokens, slot, replay: 0, tentative: false });
        }
        Ok(Self { positions, runs, page_table: page_table.data().to_vec(), pages })
    }

    /// The same with `replay` and `tentative` `[B]`.
    /// # Errors
    /// [`EvalError::Sequences`] if more tokens are kept or replayed than a state holds.
    pub fn with_tentative(mut self, replay: &Array<i32>, tentative: &Array<i32>) -> Result<Self, EvalError> {
        let most = TENTATIVE_TOKENS as usize;
        for run in &mut self.runs {
            let of = |a: &Array<i32>| a.data().get(run.sequence).copied().and_then(|n| usize::try_from(n).ok());
            let (Some(replay), Some(tentative)) = (of(replay), of(tentative)) else {
                return Err(EvalError::Sequences(format!("sequence {} has no `replay` or `tentative`", run.sequence)));
            };
            if replay > most || (tentative != 0 && run.tokens.len() > most) {
                let reason = format!("sequence {}: more than {most} tokens replayed or tentative", run.sequence);
                return Err(EvalError::Sequences(reason));
            }
            (run.replay, run.tentative) = (replay, tentative != 0);
        }
        Ok(self)
    }

    /// The sequences that have a slot and tokens.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The position of each row.
    pub fn positions(&self) -> &[i32] {
        &self.positions
    }

    /// True if a run is its sequence's beginning: states count as zero.
    pub fn begins(&self, run: &Run) -> bool {
        self.positions[run.tokens.start] == 0
    }

    /// The page that holds `position` of a sequence, and the place in it.
    /// # Errors
    /// [`EvalError::OutOfRange`] if the page table has no such page.
    pub fn page(&self, sequence: usize, position: usize, page_tokens: usize) -> Result<(u32, usize), EvalError> {
        let index = position.checked_div(page_tokens).unwrap_or(usize::MAX);
        if index >= self.pages {
            return Err(EvalError::OutOfRange {
                what: "position",
                value: position as i64,
                limit: self.pages * page_tokens,
            });
        }
        let page = self.page_table[sequence * self.pages + index];
        let missing = EvalError::Sequences(format!("sequence {sequence} has page {page} for position {position}"));
        u32::try_from(page).map(|page| (page, position % page_tokens)).map_err(|_| missing)
    }
}
