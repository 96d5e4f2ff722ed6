//! The interpreter of the graph IR, in f32 or f64, with no cleverness: the truth that all rewriting and all backends are
//! compared with.
//!
//! Every op computes in f64 and rounds its results once to the numbers of the run, so in f32 an op is as close to exact as
//! an f32 result can be. [`run`] evaluates one function of a module; [`Session`] holds weights and states and takes steps,
//! as an executable would. The meanings of the ops are in [`crate::ops`], beside their shape rules.

mod datum;
mod error;
mod run;
mod session;
mod state;
mod weights;

pub use datum::{Array, Datum, Real, attr_float, attr_int, operands};
pub use error::EvalError;
pub use run::{evaluate, run};
pub use session::{Outputs, Session, StepInputs};
pub use state::{Run, Sequences, State};
pub use weights::WeightStore;

/// What an op may look at besides its operands.
#[derive(Clone, Copy, Debug)]
pub struct Cx<F> {
    /// Tokens in a page of KV.
    pub page_tokens: usize,
    /// The numbers computed in.
    pub real: std::marker::PhantomData<F>,
}

impl<F> Cx<F> {
    /// A context whose KV pages hold `page_tokens` tokens.
    pub fn new(page_tokens: usize) -> Self {
        Self { page_tokens, real: std::marker::PhantomData }
    }
}
