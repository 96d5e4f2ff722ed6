//! From a model's graph to kernels: graph -> graph passes, then [`lower`] and [`legalise`].

pub mod cost;
pub mod egraph;
pub mod extract;
pub mod join;
pub mod layout;
pub mod legalise;
pub mod lower;
pub mod memory;
pub mod partition;
pub mod rewrite;
pub mod rules;
pub mod specialise;
pub mod term;

use nextc_ir::graph::{Function, Module};
use nextc_ir::op::ShapeError;
use nextc_ir::verify::{VerifyError, verify};
use nextc_ir::{Op, Target};

/// Why a pass failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// There is no such pass.
    #[error("there is no pass `{0}`, expected one of {names}", names = names())]
    NoPass(String),
    /// A pass left a module that the verifier refuses: a bug of the pass.
    #[error("pass `{pass}` broke the module:\n{}", lines(.errors))]
    Broken {
        /// The pass.
        pass: &'static str,
        /// All that is wrong.
        errors: Vec<VerifyError>,
    },
    /// An op does not fit its operands.
    #[error("@{function}: {op}: {error}")]
    Shape {
        /// The function.
        function: String,
        /// The op.
        op: Op,
        /// What does not fit.
        error: ShapeError,
    },
    /// A function names a weight that the weight table does not have.
    #[error("weight `{0}` is not in the weight table")]
    NoWeight(String),
    /// Two calls pass weights of different layouts.
    #[error("@{function}: parameter {param} is passed weights of two layouts")]
    TwoLayouts {
        /// The function that is called.
        function: String,
        /// The parameter.
        param: usize,
    },
    /// Rewriting failed.
    #[error(transparent)]
    Rewrite(#[from] rewrite::RewriteError),
    /// A value has no place in the arena.
    #[error(transparent)]
    Memory(#[from] memory::MemoryError),
}

/// What passes return.
pub type Result<T> = std::result::Result<T, Error>;

/// A pass over a module.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// Its name.
    pub name: &'static str,
    /// What it does, one sentence.
    pub doc: &'static str,
    /// The pass.
    pub run: fn(Module, &Target) -> Result<Module>,
}

/// The order is the list; each entry says what it needs of those before it.
pub const PIPELINE: &[Pass] =
    &[specialise::PASS, join::PASS, rewrite::PASS, layout::PASS, partition::PASS, memory::PASS];

/// Runs all passes, with the verifier after each.
/// # Errors
/// [`Error`] of the pass that failed.
pub fn run_all(module: Module, target: &Target) -> Result<Module> {
    PIPELINE.iter().try_fold(module, |module, pass| run_pass(pass, module, target))
}

/// Runs the passes up to and including `after`.
/// # Errors
/// [`Error::NoPass`] if there is no such pass, and those of the passes.
pub fn run_until(module: Module, target: &Target, after: &str) -> Result<Module> {
    let last = PIPELINE.iter().position(|p| p.name == after).ok_or_else(|| Error::NoPass(after.to_owned()))?;
    PIPELINE[..=last].iter().try_fold(module, |module, pass| run_pass(pass, module, target))
}

fn run_pass(pass: &Pass, module: Module, target: &Target) -> Result<Module> {
    let module = (pass.run)(module, target)?;
    verify(&module).map_err(|errors| Error::Broken { pass: pass.name, errors })?;
    Ok(module)
}

/// One line of `nextc rules`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleInfo {
    /// The rule.
    pub name: &'static str,
    /// Its family: `algebra`, `norm`, `attention`, `delta`, `experts`.
    pub family: &'static str,
    /// Its equations and conditions, as text.
    pub text: String,
    /// The float sum that it adds in another order, if it does.
    pub reorders: Option<&'static str>,
}

/// Every rewrite rule.
pub fn rules() -> Vec<RuleInfo> {
    let info = |family, rule: rules::Rule| {
        let (name, reorders) = (rule.name, rule.reorders);
        RuleInfo { name, family, text: rule.to_string(), reorders }
    };
    rules::FAMILIES.iter().flat_map(|(family, rules)| rules().into_iter().map(|rule| info(*family, rule))).collect()
}

/// True if the function calls others: an entry point.
pub(crate) fn calls(function: &Function) -> bool {
    function.graph.node_weights().any(|node| node.op == Op::Call)
}

fn lines(errors: &[VerifyError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

fn names() -> String {
    PIPELINE.iter().map(|pass| format!("`{}`", pass.name)).collect::<Vec<_>>().join(", ")
}
