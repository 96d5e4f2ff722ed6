//! The interpreter of the graph IR, in f32 or f64, with no cleverness: the truth that all rewriting and all backends are
//! compared with.

/// What an op may look at besides its operands.
#[derive(Debug)]
pub struct Cx<F> {
    /// Tokens in a page of KV.
    pub page_tokens: usize,
    /// The numbers computed in.
    pub real: std::marker::PhantomData<F>,
}

/// A value of the interpreter.
#[derive(Clone, Debug)]
pub struct Datum<F>(pub Vec<F>);

/// Why evaluation failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EvalError {}
