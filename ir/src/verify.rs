//! What every pass may rely on, checked: all errors are reported, not the first.
//!
//! Operands and attributes are those of the op's row, types are what the shape rules give, values are defined before they
//! are used, calls name earlier functions and pass what those take, weights are entries of the table. Of states: each
//! version has at most one writer, and of each state parameter that is written the last version is returned, in the
//! parameters' order.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::graph::{Function, Module, Node, NodeId, Value};
use crate::op::{Op, ShapeError};
use crate::print;
use crate::types::Type;

/// Something that does not hold, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("@{function}: {place}{problem}")]
pub struct VerifyError {
    /// The function.
    pub function: String,
    /// The value in it, as printed, with `: ` after it; empty if the whole function is meant.
    pub place: String,
    /// What does not hold.
    pub problem: Problem,
}

/// What does not hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// Two functions have one name.
    #[error("another function has this name")]
    DuplicateFunction,
    /// A value depends on itself.
    #[error("the graph has a cycle")]
    Cycle,
    /// A parameter or result was removed from the graph.
    #[error("a parameter or result is a node that is not there")]
    Gone,
    /// The operands of a node are not numbered from 0 without gaps, or take results that are not there.
    #[error("{op}: operand {operand} is missing, is there twice or takes a result that is not there")]
    Operand {
        /// The op.
        op: Op,
        /// Its place among the operands.
        operand: usize,
    },
    /// A value is returned that is not there.
    #[error("result {0} is not there")]
    Result(usize),
    /// Parameters are not the nodes `param` numbered from 0.
    #[error("parameter {0} is no `param` with this index and one type, or not among the parameters")]
    Param(usize),
    /// An op does not take these operands or attributes.
    #[error("{op}: {error}")]
    Shape {
        /// The op.
        op: Op,
        /// What does not fit.
        error: ShapeError,
    },
    /// The declared types are not those of the shape rule, the callee or the weight table.
    #[error("{op}: declared ({declared}), expected ({expected})")]
    Types {
        /// The op.
        op: Op,
        /// Types of the node.
        declared: String,
        /// Types it should have.
        expected: String,
    },
    /// An attribute that the op's row lacks, or the other way round.
    #[error("{op}: attributes are {found:?}, expected {expected:?}")]
    Attrs {
        /// The op.
        op: Op,
        /// Names of its attributes.
        found: Vec<String>,
        /// Names its row has.
        expected: Vec<String>,
    },
    /// A call of something that is no earlier function.
    #[error("call of `@{0}`, which is no earlier function")]
    Callee(String),
    /// A call passes what the callee does not take.
    #[error("call of `@{callee}` passes ({found}), expected ({expected})")]
    Arguments {
        /// The callee.
        callee: String,
        /// Types passed.
        found: String,
        /// Types of its parameters.
        expected: String,
    },
    /// A weight that the table lacks.
    #[error("weight `{0}` is not in the table")]
    Weight(String),
    /// Placements are not one a result.
    #[error("{results} results, but {placements} placements")]
    Placements {
        /// Results of the node.
        results: usize,
        /// Placements it has.
        placements: usize,
    },
    /// The states an op gives are not the states it takes.
    #[error("{op}: takes states ({taken}) and gives ({given})")]
    States {
        /// The op.
        op: Op,
        /// Types of the states it takes.
        taken: String,
        /// Types of the states it gives.
        given: String,
    },
    /// A version of a state has several writers.
    #[error("this state is written {0} times")]
    Writers(usize),
    /// The last versions of the state parameters are not what is returned.
    #[error("returns states ({returned}), expected the last versions ({expected})")]
    LastVersion {
        /// States returned, as printed.
        returned: String,
        /// Last versions in the parameters' order; those in brackets may be left out.
        expected: String,
    },
    /// A weight's declaration contradicts itself.
    #[error("weight `{0}` has more input dimensions than dimensions")]
    InRank(String),
}

/// Checks a whole module.
/// # Errors
/// Everything that does not hold.
pub fn verify(module: &Module) -> Result<(), Vec<VerifyError>> {
    let mut errors = Vec::new();
    let whole = |function: &str, problem| VerifyError { function: function.to_owned(), place: String::new(), problem };
    for (name, decl) in &module.weights {
        if decl.in_rank > decl.shape.len() {
            errors.push(whole("weights", Problem::InRank(name.clone())));
        }
    }
    for (i, function) in module.functions.iter().enumerate() {
        let earlier = &module.functions[..i];
        if earlier.iter().any(|f| f.name == function.name) {
            errors.push(whole(&function.name, Problem::DuplicateFunction));
        }
        let there = |id: &NodeId| function.graph.contains_node(*id);
        if !function.params.iter().chain(function.results.iter().map(|v| &v.node)).all(there) {
            errors.push(whole(&function.name, Problem::Gone));
            continue;
        }
        if petgraph::algo::is_cyclic_directed(&function.graph) {
            errors.push(whole(&function.name, Problem::Cycle));
            continue;
        }
        let names = print::names(function);
        let mut checker = Checker { module, function, earlier, names, errors: &mut errors };
        checker.check();
    }
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

/// Checks one function; what a call may name are the `earlier` ones.
struct Checker<'a> {
    module: &'a Module,
    function: &'a Function,
    earlier: &'a [Function],
    names: HashMap<Value, String>,
    errors: &'a mut Vec<VerifyError>,
}

fn list<'t>(types: impl IntoIterator<Item = &'t Type>) -> String {
    types.into_iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

impl Checker<'_> {
    fn check(&mut self) {
        self.params();
        let before = self.errors.len();
        for id in self.function.order() {
            self.operands(id);
        }
        for (i, v) in self.function.results.iter().enumerate() {
            if self.ty(*v).is_none() {
                self.report(Problem::Result(i));
            }
        }
        // what follows looks at types of operands and results, which must be there
        if self.errors.len() > before {
            return;
        }
        for id in self.function.order() {
            self.node(id);
        }
        self.states();
    }

    fn report(&mut self, problem: Problem) {
        self.errors.push(VerifyError { function: self.function.name.clone(), place: String::new(), problem });
    }

    fn report_at(&mut self, id: NodeId, problem: Problem) {
        let name = self.names.get(&Value { node: id, result: 0 });
        let place = name.map(|name| format!("%{name}: ")).unwrap_or_default();
        self.errors.push(VerifyError { function: self.function.name.clone(), place, problem });
    }

    fn ty(&self, v: Value) -> Option<&Type> {
        self.function.graph.node_weight(v.node)?.types.get(v.result as usize)
    }

    fn name(&self, v: Value) -> String {
        format!("%{}", self.names.get(&v).map_or("?", String::as_str))
    }

    fn params(&mut self) {
        let is_param = |node: &Node, i: usize| {
            node.op == Op::Param && node.types.len() == 1 && node.attrs.int("index") == i64::try_from(i).ok()
        };
        for (i, &id) in self.function.params.iter().enumerate() {
            if !self.function.graph.node_weight(id).is_some_and(|node| is_param(node, i)) {
                self.report(Problem::Param(i));
            }
        }
        let known: BTreeSet<NodeId> = self.function.params.iter().copied().collect();
        for id in self.function.graph.node_indices() {
            let node = self.function.node(id);
            if node.op == Op::Param && !known.contains(&id) {
                self.report_at(id, Problem::Param(node.attrs.int("index").unwrap_or(0) as usize));
            }
        }
    }

    /// Operands are numbered from 0, and each takes a result that is there.
    fn operands(&mut self, id: NodeId) {
        use petgraph::visit::EdgeRef;
        let incoming = self.function.graph.edges_directed(id, petgraph::Direction::Incoming);
        let mut uses: Vec<(u32, bool)> = incoming
            .map(|e| (e.weight().operand, self.ty(Value { node: e.source(), result: e.weight().result }).is_some()))
            .collect();
        uses.sort_unstable();
        let wrong = |&(i, &(operand, there)): &(usize, &(u32, bool))| operand as usize != i || !there;
        if let Some((operand, _)) = uses.iter().enumerate().find(wrong) {
            self.report_at(id, Problem::Operand { op: self.function.node(id).op, operand });
        }
    }

    fn node(&mut self, id: NodeId) {
        let function = self.function;
        let node = function.node(id);
        let types: Vec<&Type> = function.operands(id).iter().map(|&v| function.ty(v)).collect();
        if node.placement.len() != node.types.len() {
            let problem = Problem::Placements { results: node.types.len(), placements: node.placement.len() };
            self.report_at(id, problem);
        }
        self.attrs(id, node);
        match node.op {
            Op::Param => self.expect_no_operands(id, node, &types),
            Op::Weight => {
                self.expect_no_operands(id, node, &types);
                self.weight(id, node);
            }
            Op::Call => self.call(id, node, &types),
            op => match (op.def().shape)(&types, &node.attrs) {
                Ok(expected) => self.expect_types(id, node, &expected),
                Err(error) => self.report_at(id, Problem::Shape { op, error }),
            },
        }
    }

    fn attrs(&mut self, id: NodeId, node: &Node) {
        let mut expected: Vec<String> = node.op.def().attrs.iter().map(|&a| a.to_owned()).collect();
        expected.sort_unstable();
        let found: Vec<String> = node.attrs.0.keys().cloned().collect();
        if found != expected {
            self.report_at(id, Problem::Attrs { op: node.op, found, expected });
        }
    }

    fn expect_no_operands(&mut self, id: NodeId, node: &Node, types: &[&Type]) {
        if !types.is_empty() {
            let error = ShapeError::Arity { found: types.len(), expected: "0".to_owned() };
            self.report_at(id, Problem::Shape { op: node.op, error });
        }
    }

    fn expect_types(&mut self, id: NodeId, node: &Node, expected: &[Type]) {
        if node.types != expected {
            let problem = Problem::Types { op: node.op, declared: list(&node.types), expected: list(expected) };
            self.report_at(id, problem);
        }
    }

    /// A weight is in the table, with this shape and format; its layout is the passes' business.
    fn weight(&mut self, id: NodeId, node: &Node) {
        let name = node.attrs.str("name").unwrap_or_default();
        let Some(decl) = self.module.weights.get(name) else {
            return self.report_at(id, Problem::Weight(name.to_owned()));
        };
        let fits = |ty: &Type| ty.as_weight().is_some_and(|w| w.shape == decl.shape && w.format == decl.format);
        if !matches!(node.types.as_slice(), [ty] if fits(ty)) {
            let problem = Problem::Types { op: node.op, declared: list(&node.types), expected: decl.ty().to_string() };
            self.report_at(id, problem);
        }
    }

    fn call(&mut self, id: NodeId, node: &Node, types: &[&Type]) {
        let name = node.attrs.str("function").unwrap_or_default();
        let Some(callee) = self.earlier.iter().find(|f| f.name == name) else {
            return self.report_at(id, Problem::Callee(name.to_owned()));
        };
        let type_of = |v: Value| callee.graph.node_weight(v.node).and_then(|n| n.types.get(v.result as usize));
        let params = callee.params.iter().filter_map(|&node| type_of(Value { node, result: 0 }));
        let params: Vec<&Type> = params.collect();
        if params != types {
            let (found, expected) = (list(types.iter().copied()), list(params));
            self.report_at(id, Problem::Arguments { callee: name.to_owned(), found, expected });
        }
        let expected: Vec<Type> = callee.results.iter().filter_map(|&v| type_of(v).cloned()).collect();
        self.expect_types(id, node, &expected);
    }

    /// State operands of a node that gives states: it writes them in order. A node that gives none only reads.
    fn writes(&mut self, id: NodeId) -> Vec<(Value, Value)> {
        let function = self.function;
        let is_state = |v: &Value| function.ty(*v).as_state().is_some();
        let taken: Vec<Value> = function.operands(id).into_iter().filter(is_state).collect();
        let results = (0..function.node(id).types.len() as u32).map(|result| Value { node: id, result });
        let given: Vec<Value> = results.filter(is_state).collect();
        let op = function.node(id).op;
        if given.is_empty() || op == Op::Param {
            return Vec::new();
        }
        let types = |values: &[Value]| list(values.iter().map(|&v| function.ty(v)));
        if types(&taken) != types(&given) {
            self.report_at(id, Problem::States { op, taken: types(&taken), given: types(&given) });
        }
        taken.into_iter().zip(given).collect()
    }

    fn states(&mut self) {
        let mut written: BTreeMap<Value, Vec<Value>> = BTreeMap::new();
        for id in self.function.order() {
            for (old, new) in self.writes(id) {
                written.entry(old).or_default().push(new);
            }
        }
        for (old, new) in &written {
            if new.len() > 1 {
                self.report_at(old.node, Problem::Writers(new.len()));
            }
        }
        self.last_versions(&written);
    }

    /// The states returned are the last versions of the parameters, in order; one never written may be left out.
    fn last_versions(&mut self, written: &BTreeMap<Value, Vec<Value>>) {
        let function = self.function;
        let is_state = |v: &Value| function.ty(*v).as_state().is_some();
        let params = function.params.iter().map(|&node| Value { node, result: 0 }).filter(is_state);
        let last = |mut v: Value| {
            while let Some(new) = written.get(&v).and_then(|new| new.last()) {
                v = *new;
            }
            v
        };
        let expected: Vec<(Value, Value)> = params.map(|p| (p, last(p))).collect();
        let returned: Vec<Value> = function.results.iter().copied().filter(is_state).collect();
        let mut rest = returned.iter().peekable();
        let in_order = expected.iter().all(|(param, last)| rest.next_if(|v| *v == last).is_some() || param == last);
        if !in_order || rest.next().is_some() {
            let optional = |(param, last): &(Value, Value)| match param == last {
                true => format!("[{}]", self.name(*last)),
                false => self.name(*last),
            };
            let expected: Vec<String> = expected.iter().map(optional).collect();
            let returned: Vec<String> = returned.iter().map(|&v| self.name(v)).collect();
            self.report(Problem::LastVersion { returned: returned.join(", "), expected: expected.join(", ") });
        }
    }
}
