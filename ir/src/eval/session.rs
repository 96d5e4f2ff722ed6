//! A model that takes steps in the interpreter: weights, and the states from one step to the next.

use std::collections::HashMap;
use std::sync::Arc;

use super::datum::{Array, Datum, Real};
use super::state::State;
use super::weights::WeightStore;
use super::{Cx, EvalError, run};
use crate::graph::Module;
use crate::source::WeightSource;
use crate::types::Type;

/// The inputs of a step; see the entry functions in [`Module`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepInputs<F> {
    /// Token ids, `[T]`.
    pub tokens: Vec<i32>,
    /// Position of each token in its sequence, `[T]`.
    pub positions: Vec<i32>,
    /// Where each sequence begins among the tokens, and the end of the last: `[B+1]`.
    pub cu_seqlens: Vec<i32>,
    /// The state slot of each sequence, -1 for padding: `[B]`.
    pub slot: Vec<i32>,
    /// How many kept tokens of each sequence are replayed first, `[B]`; empty for none.
    pub replay: Vec<i32>,
    /// 1 for each sequence whose tokens are tentative, `[B]`; empty for none.
    pub tentative: Vec<i32>,
    /// The KV pages of each sequence, `[B, pages_per_sequence]`.
    pub page_table: Vec<i32>,
    /// Width of the page table.
    pub pages_per_sequence: usize,
    /// Rows for which logits are wanted, `[R]`.
    pub logit_rows: Vec<i32>,
    /// Hidden rows of the main model, `[T, hidden_size]`: only for `@draft` and `@guess`.
    pub hidden: Option<Vec<F>>,
    /// 1 for each 16 tokens of the vocabulary whose logits are wanted, `[ceil(vocab_size / 16)]`: only for `@guess`.
    pub wanted: Vec<i32>,
}

impl<F> StepInputs<F> {
    /// One sequence in slot 0: `tokens` from position `first` on, its pages numbered from 0, logits of every row.
    pub fn sequence(tokens: &[i32], first: i32, pages_per_sequence: usize) -> Self {
        let count = tokens.len() as i32;
        Self {
            tokens: tokens.to_vec(),
            positions: (first..first + count).collect(),
            cu_seqlens: vec![0, count],
            slot: vec![0],
            replay: Vec::new(),
            tentative: Vec::new(),
            page_table: (0..pages_per_sequence as i32).collect(),
            pages_per_sequence,
            logit_rows: (0..count).collect(),
            hidden: None,
            wanted: Vec::new(),
        }
    }
}

/// The results of a step: all empty where it gives none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outputs<F> {
    /// `[R, vocab_size]`.
    pub logits: Vec<F>,
    /// After the final norm: `[T, hidden_size]`.
    pub hidden: Vec<F>,
    /// The token with the largest logit of each row, `[R]`.
    pub best: Vec<i32>,
}

/// A model that takes steps. States are kept by the names of their parameters, so `@step` and `@draft` share nothing but weights.
#[derive(Debug)]
pub struct Session<'m, F> {
    module: &'m Module,
    weights: Arc<WeightStore<F>>,
    states: HashMap<String, Datum<F>>,
    cx: Cx<F>,
}

impl<'m, F: Real> Session<'m, F> {
    /// A session with empty states, whose weights are read from `source`.
    /// # Errors
    /// As [`WeightStore::load`].
    pub fn new(module: &'m Module, source: &dyn WeightSource, page_tokens: usize) -> Result<Self, EvalError> {
        Ok(Self::with_weights(module, Arc::new(WeightStore::load(module, source)?), page_tokens))
    }

    /// A session with empty states on weights that were read before.
    pub fn with_weights(module: &'m Module, weights: Arc<WeightStore<F>>, page_tokens: usize) -> Self {
        Self { module, weights, states: HashMap::new(), cx: Cx::new(page_tokens) }
    }

    /// The weights, to share them with another session.
    pub fn weights(&self) -> Arc<WeightStore<F>> {
        Arc::clone(&self.weights)
    }

    /// The state of a parameter, if a step has had it.
    pub fn state(&self, name: &str) -> Option<&Datum<F>> {
        self.states.get(name)
    }

    /// Forgets all states.
    pub fn reset(&mut self) {
        self.states.clear();
    }

    /// Runs the entry function `@entry` and keeps its new states.
    /// # Errors
    /// [`EvalError`]; the states are then those before the step.
    pub fn step(&mut self, entry: &str, inputs: &StepInputs<F>) -> Result<Outputs<F>, EvalError> {
        let function = self.module.function(entry).ok_or_else(|| EvalError::NoFunction(entry.to_owned()))?;
        let (mut args, mut states) = (Vec::new(), Vec::new());
        for &param in &function.params {
            let node = function.node(param);
            let name = node.name.as_deref().unwrap_or_default();
            args.push(match &node.types[0] {
                Type::State(ty) => {
                    states.push(name.to_owned());
                    let fresh = || Datum::State(State::new(ty, self.cx.page_tokens));
                    self.states.get(name).cloned().unwrap_or_else(fresh)
                }
                ty => self.input(name, ty, inputs)?,
            });
        }
        let results = run(self.module, entry, args, &self.weights, &self.cx)?;
        let rows = |d: &Datum<F>| Ok::<_, EvalError>(d.float()?.data().to_vec());
        let (own, new) = results.split_at(results.len().saturating_sub(states.len()));
        let outputs = match own {
            [] => Outputs::default(),
            [logits, hidden, best] => {
                Outputs { logits: rows(logits)?, hidden: rows(hidden)?, best: best.int()?.data().to_vec() }
            }
            _ => return Err(EvalError::Operands { found: results.len(), expected: states.len() + 3 }),
        };
        self.states.extend(states.into_iter().zip(new.iter().cloned()));
        Ok(outputs)
    }

    /// The input that the parameter `name` stands for.
    fn input(&self, name: &str, ty: &Type, inputs: &StepInputs<F>) -> Result<Datum<F>, EvalError> {
        let vector = |data: &[i32]| Array::new(&[data.len()], data.to_vec()).map(Datum::Int);
        match name {
            "tokens" => vector(&inputs.tokens),
            "positions" => vector(&inputs.positions),
            "cu_seqlens" => vector(&inputs.cu_seqlens),
            "slot" => vector(&inputs.slot),
            "replay" | "tentative" => {
                let given = if name == "replay" { &inputs.replay } else { &inputs.tentative };
                if given.is_empty() { vector(&vec![0; inputs.slot.len()]) } else { vector(given) }
            }
            "logit_rows" => vector(&inputs.logit_rows),
            "wanted" => vector(&inputs.wanted),
            "page_table" => {
                let dims = [inputs.slot.len(), inputs.pages_per_sequence];
                Array::new(&dims, inputs.page_table.clone()).map(Datum::Int)
            }
            "hidden" if inputs.hidden.is_some() => {
                let data = inputs.hidden.clone().unwrap_or_default();
                Datum::floats(&[inputs.tokens.len(), self.module.info.hidden_size as usize], data)
            }
            _ => Err(EvalError::Argument {
                name: name.to_owned(),
                found: "no input of the step".to_owned(),
                expected: ty.to_string(),
            }),
        }
    }
}
