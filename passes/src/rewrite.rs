//! `rewrite`: equality saturation with the rules of [`mod@crate::rules`], one function at a time, then the cheapest graph.
//!
//! Limits count iterations and terms, never seconds, so the result does not depend on the machine; stopping before
//! saturation is an error. Functions that call others have nothing to rewrite.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::time::Duration;

use egg::{Id, Language, Rewrite, Runner, SimpleScheduler, StopReason};
use nextc_ir::graph::{Function, Module};
use nextc_ir::{Op, Target, Type};

use crate::cost::{function_ns, op_ns};
use crate::egraph::{Data, Graph, Term, Terms, TermsError, Typing, attrs, to_function};
use crate::extract::{Alternative, Problem};
use crate::rules::{self, RuleError};
use crate::{Error, Pass};

/// The pass. It needs the projections that `join` has joined, and profits from functions that `specialise` has merged.
pub const PASS: Pass = Pass {
    name: "rewrite",
    doc: "fuses ops by equality saturation: the cheapest graph that the rules make of each function",
    run: |module, target| run_traced(module, target).map(|(module, _)| module),
};

/// Iterations after which saturation is given up.
const MAX_ITERATIONS: usize = 40;
/// Terms after which saturation is given up.
const MAX_TERMS: usize = 20_000;

/// What `rewrite` did to one function.
#[derive(Clone, Debug, PartialEq)]
pub struct FunctionTrace {
    /// The function.
    pub function: String,
    /// The rules that changed the e-graph, and how often, by name.
    pub fired: BTreeMap<String, usize>,
    /// Iterations until nothing changed.
    pub iterations: usize,
    /// Terms in the e-graph at the end.
    pub terms: usize,
    /// Classes of equal terms at the end.
    pub classes: usize,
    /// Why it stopped.
    pub stop: String,
    /// Cost of a decode step before, nanoseconds.
    pub before_ns: f64,
    /// Cost of a decode step after, nanoseconds.
    pub after_ns: f64,
}

/// What `rewrite` did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    /// Function by function.
    pub functions: Vec<FunctionTrace>,
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.functions.iter().try_for_each(|function| write!(f, "{function}"))
    }
}

impl fmt::Display for FunctionTrace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { function, iterations, terms, classes, stop, before_ns, after_ns, .. } = self;
        writeln!(f, "@{function}: {before_ns:.0} -> {after_ns:.0} ns a decode step")?;
        writeln!(f, "  {stop} after {iterations} iterations: {terms} terms in {classes} classes")?;
        self.fired.iter().try_for_each(|(rule, count)| writeln!(f, "  {count:3} x {rule}"))
    }
}

/// Why a function could not be rewritten.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RewriteError {
    /// A rule of the table is no rule.
    #[error(transparent)]
    Rule(#[from] RuleError),
    /// The function is no e-graph, or the e-graph no function.
    #[error("@{function}: {error}")]
    Terms {
        /// The function.
        function: String,
        /// What is wrong.
        error: TermsError,
    },
    /// The rules did not come to an end.
    #[error("@{function}: rewriting stopped before saturation ({reason}) at {terms} terms")]
    Unsaturated {
        /// The function.
        function: String,
        /// Why it stopped.
        reason: String,
        /// Terms in the e-graph.
        terms: usize,
    },
    /// No term can be taken for the results.
    #[error("@{function}: no graph of its e-graph writes each state once")]
    NoChoice {
        /// The function.
        function: String,
    },
}

/// Rewrites every function that calls no other, and says which rules fired.
/// # Errors
/// [`Error::Rewrite`] if a function is ill typed, a rule is wrong, or the rules do not come to an end.
pub fn run_traced(mut module: Module, target: &Target) -> Result<(Module, Trace), Error> {
    let rules = compile()?;
    let mut trace = Trace::default();
    for function in module.functions.iter_mut().filter(|f| !crate::calls(f)) {
        let (rewritten, entry) = rewrite_function(function, &rules, target)?;
        *function = rewritten;
        trace.functions.push(entry);
    }
    Ok((module, trace))
}

/// Every rule of the table, for `egg`.
fn compile() -> Result<Vec<Rewrite<Term, Typing>>, RewriteError> {
    rules::all().iter().map(|rule| Ok(rule.compile()?.rewrite())).collect()
}

fn rewrite_function(
    function: &Function,
    rules: &[Rewrite<Term, Typing>],
    target: &Target,
) -> Result<(Function, FunctionTrace), RewriteError> {
    let fail = |error| RewriteError::Terms { function: function.name.clone(), error };
    let Terms { graph, roots, own } = Terms::of(function).map_err(fail)?;
    let runner = saturate(graph, rules);
    let mut entry = trace_of(function, &runner, target);
    let terms = Terms { graph: runner.egraph, roots, own };
    terms.check().map_err(fail)?;
    if !matches!(runner.stop_reason, Some(StopReason::Saturated)) {
        let (function, reason) = (function.name.clone(), entry.stop);
        return Err(RewriteError::Unsaturated { function, reason, terms: entry.terms });
    }
    let taken = choose(&terms, target).ok_or_else(|| RewriteError::NoChoice { function: function.name.clone() })?;
    let rewritten = to_function(function, &terms.graph, &terms.roots, |id| taken.get(&id).copied()).map_err(fail)?;
    entry.after_ns = function_ns(&rewritten, target);
    Ok((rewritten, entry))
}

fn saturate(graph: Graph, rules: &[Rewrite<Term, Typing>]) -> Runner<Term, Typing> {
    Runner::new(Typing::default())
        .with_egraph(graph)
        .with_scheduler(SimpleScheduler)
        .with_iter_limit(MAX_ITERATIONS)
        .with_node_limit(MAX_TERMS)
        .with_time_limit(Duration::MAX)
        .run(rules)
}

fn trace_of(function: &Function, runner: &Runner<Term, Typing>, target: &Target) -> FunctionTrace {
    let mut fired = BTreeMap::new();
    for (rule, count) in runner.iterations.iter().flat_map(|i| &i.applied) {
        *fired.entry(rule.to_string()).or_insert(0) += count;
    }
    let stop = runner.stop_reason.as_ref().map_or_else(String::new, |reason| format!("{reason:?}").to_lowercase());
    FunctionTrace {
        function: function.name.clone(),
        fired,
        iterations: runner.iterations.len(),
        terms: runner.egraph.total_number_of_nodes(),
        classes: runner.egraph.number_of_classes(),
        stop,
        before_ns: function_ns(function, target),
        after_ns: 0.0,
    }
}

/// The term taken in each class.
fn choose<'a>(terms: &'a Terms, target: &Target) -> Option<HashMap<Id, &'a Term>> {
    let graph = &terms.graph;
    let mut ids: Vec<Id> = graph.classes().map(|c| c.id).collect();
    ids.sort_unstable();
    let index: HashMap<Id, usize> = ids.iter().enumerate().map(|(i, &id)| (id, i)).collect();
    let at = |id: Id| index[&graph.find(id)];
    let sorted = |id: Id| {
        let mut nodes: Vec<&Term> = graph[id].nodes.iter().collect();
        nodes.sort_unstable();
        nodes
    };
    let nodes: Vec<Vec<&Term>> = ids.iter().map(|&id| sorted(id)).collect();
    let alternative = |id: Id, term: &Term| Alternative {
        cost: term_ns(graph, id, term, target),
        children: term.children().iter().map(|&c| at(c)).collect(),
        writes: written(graph, id, term).iter().map(|&c| at(c)).collect(),
    };
    let classes = ids.iter().zip(&nodes).map(|(&id, nodes)| nodes.iter().map(|t| alternative(id, t)).collect());
    let problem = Problem { classes: classes.collect(), roots: terms.roots.iter().map(|&r| at(r)).collect() };
    let mut given = vec![None; ids.len()];
    for (id, term) in &terms.own {
        let term = term.clone().map_children(|c| graph.find(c));
        given[at(*id)] = nodes[at(*id)].iter().position(|&t| *t == term);
    }
    let choice = problem.solve(&given)?;
    Some(ids.iter().zip(&nodes).zip(&choice.taken).map(|((&id, nodes), &taken)| (id, nodes[taken])).collect())
}

fn term_ns(graph: &Graph, id: Id, term: &Term, target: &Target) -> f64 {
    let Term::Op(op, _) = term else { return 0.0 };
    let (Data::Values(results), Some(attrs)) = (&graph[id].data, attrs(graph, term)) else { return 0.0 };
    // only `proj` has an operand that is not one value, and it is free
    let operands: Option<Vec<&Type>> = term.split().0.iter().map(|&c| graph[c].data.ty()).collect();
    operands.map_or(0.0, |operands| op_ns(*op, &operands, results, &attrs, target))
}

/// The states that a term takes over: those of its operands, if it gives new versions.
fn written(graph: &Graph, id: Id, term: &Term) -> Vec<Id> {
    let is_state = |ty: &Type| ty.as_state().is_some();
    let gives = matches!(&graph[id].data, Data::Values(results) if results.iter().any(is_state));
    let declares = matches!(term, Term::Op(Op::Proj | Op::Param, _));
    if !gives || declares {
        return Vec::new();
    }
    term.split().0.iter().copied().filter(|&c| graph[c].data.ty().is_some_and(is_state)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::Rule;
    use nextc_ir::build::FunctionBuilder;
    use nextc_ir::{Shape, Sym};

    #[test]
    fn rules_without_an_end_are_an_error() {
        let mut b = FunctionBuilder::new("sum");
        let mut sum = b.param("x", Type::f32(Shape::rows(Sym::T, &[8])));
        for i in 0..12 {
            let y = b.param(&format!("y{i}"), Type::f32(Shape::rows(Sym::T, &[8])));
            sum = b.op(Op::Add, &[sum, y]).expect("it fits");
        }
        let function = b.finish(vec![sum]);
        let endless = [
            Rule::new("commute", vec![("(add ?a ?b)", "(add ?b ?a)")]),
            Rule::new("associate", vec![("(add (add ?a ?b) ?c)", "(add ?a (add ?b ?c))")]),
        ];
        let rules = endless.map(|rule| rule.compile().expect("it is a rule").rewrite());
        let error = rewrite_function(&function, &rules, &Target::cpu("x86-64-v3", &[], 256)).expect_err("it explodes");
        assert!(matches!(error, RewriteError::Unsaturated { .. }), "{error}");
    }
}
