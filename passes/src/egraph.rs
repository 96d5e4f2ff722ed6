//! Functions as e-graphs and back, naming no op but the ones that are structure.
//!
//! A [`Term`] is a leaf or an op of the table. The data of an e-class is what its terms are: the types of an op's results,
//! from the row's shape rule, or an attribute. Parameters and weights are leaves known by index and name. States are
//! ordinary operands and results, so order and the single writer follow from the terms. What a term costs and which one is
//! taken is the business of [`crate::cost`] and [`crate::extract`].

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use egg::{Analysis, DidMerge, EGraph, Id};
use nextc_ir::graph::{Function, Value};
use nextc_ir::{Attr, Attrs, Op, Type};

pub use crate::term::{Head, Term, TermError};

/// What the terms of an e-class are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    /// An attribute.
    Attr(Attr),
    /// A value of this type, or the results of an op with several.
    Values(Vec<Type>),
    /// A term that has no type; the reason is among [`Typing::errors`].
    IllTyped,
}

impl Data {
    /// The type, if this is one value.
    pub fn ty(&self) -> Option<&Type> {
        match self {
            Self::Values(types) if types.len() == 1 => types.first(),
            _ => None,
        }
    }

    /// The attribute, if it is one.
    pub fn attr(&self) -> Option<&Attr> {
        match self {
            Self::Attr(attr) => Some(attr),
            _ => None,
        }
    }
}

impl fmt::Display for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attr(attr) => write!(f, "{attr}"),
            Self::Values(types) => {
                let types: Vec<String> = types.iter().map(ToString::to_string).collect();
                f.write_str(&types.join(", "))
            }
            Self::IllTyped => f.write_str("a term without a type"),
        }
    }
}

/// The analysis: types of leaves, and what went wrong so far.
#[derive(Clone, Debug, Default)]
pub struct Typing {
    /// Types of the function's parameters.
    pub params: Vec<Type>,
    /// Types of the weights it names.
    pub weights: BTreeMap<String, Type>,
    /// Terms without a type, and merges of two types: a wrong rule, or a wrong function.
    pub errors: Vec<String>,
}

impl Typing {
    /// What `op` over `children` (operands, then attributes) is.
    /// # Errors
    /// Why it has no type.
    pub fn infer(&self, op: Op, children: &[&Data]) -> Result<Data, String> {
        let names = op.def().attrs;
        let Some(split) = children.len().checked_sub(names.len()) else {
            return Err(format!("`{op}` lacks attributes"));
        };
        let (operands, values) = children.split_at(split);
        let attrs = attrs_of(op, values).ok_or_else(|| format!("`{op}` has an operand where an attribute belongs"))?;
        match op {
            Op::Param => self.param(&attrs),
            Op::Weight => self.weight(&attrs),
            Op::Proj => project(operands, &attrs),
            _ => shape(op, operands, &attrs),
        }
        .ok_or_else(|| format!("`{op}` names nothing that is there"))?
        .map(Data::Values)
    }

    fn param(&self, attrs: &Attrs) -> Option<Result<Vec<Type>, String>> {
        let index = usize::try_from(attrs.int("index")?).ok()?;
        Some(Ok(vec![self.params.get(index)?.clone()]))
    }

    fn weight(&self, attrs: &Attrs) -> Option<Result<Vec<Type>, String>> {
        Some(Ok(vec![self.weights.get(attrs.str("name")?)?.clone()]))
    }
}

/// The attributes of `op` from its trailing operands.
fn attrs_of(op: Op, values: &[&Data]) -> Option<Attrs> {
    let named = op.def().attrs.iter().zip(values);
    named.map(|(&name, value)| Some((name.to_owned(), value.attr()?.clone()))).collect::<Option<_>>().map(Attrs)
}

fn project(operands: &[&Data], attrs: &Attrs) -> Option<Result<Vec<Type>, String>> {
    let (Data::Values(types), index) = (operands.first()?, usize::try_from(attrs.int("index")?).ok()?) else {
        return None;
    };
    Some(Ok(vec![types.get(index)?.clone()]))
}

fn shape(op: Op, operands: &[&Data], attrs: &Attrs) -> Option<Result<Vec<Type>, String>> {
    let types: Option<Vec<&Type>> = operands.iter().map(|d| d.ty()).collect();
    Some((op.def().shape)(&types?, attrs).map_err(|error| format!("{op}: {error}")))
}

/// An e-graph of the op table's terms.
pub type Graph = EGraph<Term, Typing>;

impl Analysis<Term> for Typing {
    type Data = Data;

    fn make(graph: &mut Graph, term: &Term, _: Id) -> Data {
        let result = match term {
            Term::Attr(attr) => Ok(Data::Attr(attr.clone())),
            Term::Op(op, children) => {
                let data: Vec<&Data> = children.iter().map(|&id| &graph[id].data).collect();
                graph.analysis.infer(*op, &data)
            }
        };
        result.unwrap_or_else(|error| {
            graph.analysis.errors.push(error);
            Data::IllTyped
        })
    }

    fn merge(&mut self, a: &mut Data, b: Data) -> DidMerge {
        if *a != b {
            self.errors.push(format!("two terms are said to be equal, but one is {a} and the other {b}"));
        }
        DidMerge(false, false)
    }
}

/// A function as an e-graph, before any rule.
#[derive(Debug)]
pub struct Terms {
    /// The e-graph.
    pub graph: Graph,
    /// The classes of the function's results.
    pub roots: Vec<Id>,
    /// The function's own terms, with the class each was added to.
    pub own: Vec<(Id, Term)>,
}

/// Why a function is no e-graph, or an e-graph no function.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TermsError {
    /// A node lacks an attribute that its row declares.
    #[error("`{op}` lacks its attribute `{attr}`")]
    Attr {
        /// The op.
        op: Op,
        /// The attribute.
        attr: &'static str,
    },
    /// Types do not fit: in the function, or because a rule is wrong.
    #[error("{}", .0.join("\n"))]
    Types(Vec<String>),
    /// The terms chosen do not make a function.
    #[error("the terms taken from the e-graph make no function: {0}")]
    Choice(String),
}

impl Terms {
    /// The e-graph of `function`.
    /// # Errors
    /// [`TermsError`] if it is not well typed.
    pub fn of(function: &Function) -> Result<Self, TermsError> {
        let mut terms = Self { graph: Graph::new(typing_of(function)), roots: Vec::new(), own: Vec::new() };
        let mut ids: HashMap<Value, Id> = HashMap::new();
        for node_id in function.order() {
            let node = function.node(node_id);
            let mut children: Vec<Id> = function.operands(node_id).iter().map(|v| ids[v]).collect();
            for &attr in node.op.def().attrs {
                let value = node.attrs.get(attr).ok_or(TermsError::Attr { op: node.op, attr })?;
                children.push(terms.add(Term::Attr(value.clone())));
            }
            let id = terms.add(Term::Op(node.op, children));
            for result in 0..node.types.len() as u32 {
                let value = if node.types.len() == 1 { id } else { terms.proj(id, result) };
                ids.insert(Value { node: node_id, result }, value);
            }
        }
        terms.roots = function.results.iter().map(|v| ids[v]).collect();
        terms.check().map(|()| terms)
    }

    /// Everything that went wrong so far.
    /// # Errors
    /// [`TermsError::Types`] if anything did.
    pub fn check(&self) -> Result<(), TermsError> {
        match self.graph.analysis.errors.as_slice() {
            [] => Ok(()),
            errors => Err(TermsError::Types(errors.to_vec())),
        }
    }

    fn add(&mut self, term: Term) -> Id {
        let id = self.graph.add(term.clone());
        self.own.push((id, term));
        id
    }

    fn proj(&mut self, tuple: Id, result: u32) -> Id {
        let index = self.add(Term::Attr(Attr::Int(i64::from(result))));
        self.add(Term::Op(Op::Proj, vec![tuple, index]))
    }
}

fn typing_of(function: &Function) -> Typing {
    let nodes = function.graph.node_weights().filter(|n| n.op == Op::Weight);
    let weights = nodes.filter_map(|n| Some((n.attrs.str("name")?.to_owned(), n.types.first()?.clone())));
    let params = function.params.iter().map(|&p| function.node(p).types[0].clone());
    Typing { params: params.collect(), weights: weights.collect(), errors: Vec::new() }
}

/// Attributes of a term, read from the classes of its trailing operands.
pub fn attrs(graph: &Graph, term: &Term) -> Option<Attrs> {
    let Term::Op(op, _) = term else { return None };
    let values: Vec<&Data> = term.split().1.iter().map(|&id| &graph[id].data).collect();
    attrs_of(*op, &values)
}

/// Makes a function with the signature of `like` whose results are `roots`, taking from each class the term `choose` gives.
/// # Errors
/// [`TermsError::Choice`] if a class has no term or needs itself.
pub fn to_function<'a>(
    like: &Function,
    graph: &'a Graph,
    roots: &[Id],
    choose: impl Fn(Id) -> Option<&'a Term>,
) -> Result<Function, TermsError> {
    let mut out = Emitter { graph, choose, function: Function::new(&like.name), done: HashMap::new() };
    for &param in &like.params {
        let old = like.node(param);
        let node = out.function.add_node(Op::Param, &[], old.attrs.clone(), old.types.clone());
        out.function.graph[node].name = old.name.clone();
        out.function.params.push(node);
    }
    let results: Result<Vec<Value>, TermsError> = roots.iter().map(|&root| out.value(root)).collect();
    out.function.results = results?;
    Ok(out.function)
}

struct Emitter<'a, C> {
    graph: &'a Graph,
    choose: C,
    function: Function,
    /// Values of classes that are made; `None` while a class is being made.
    done: HashMap<Id, Option<Value>>,
}

impl<'a, C: Fn(Id) -> Option<&'a Term>> Emitter<'a, C> {
    /// The value of a class; of an op with several results, the first.
    fn value(&mut self, id: Id) -> Result<Value, TermsError> {
        let id = self.graph.find(id);
        match self.done.get(&id) {
            Some(Some(value)) => return Ok(*value),
            Some(None) => return Err(TermsError::Choice("a value depends on itself".to_owned())),
            None => self.done.insert(id, None),
        };
        let value = self.make(id)?;
        self.done.insert(id, Some(value));
        Ok(value)
    }

    fn make(&mut self, id: Id) -> Result<Value, TermsError> {
        let term = (self.choose)(id).ok_or_else(|| TermsError::Choice(format!("class {id} has no term")))?;
        let Term::Op(op, _) = term else {
            return Err(TermsError::Choice("an attribute stands where a value belongs".to_owned()));
        };
        let attrs = attrs(self.graph, term).ok_or_else(|| TermsError::Choice(format!("`{op}` lacks attributes")))?;
        let index = attrs.int("index").and_then(|i| u32::try_from(i).ok()).unwrap_or(0);
        let operands: Vec<Value> = term.split().0.iter().map(|&id| self.value(id)).collect::<Result<_, _>>()?;
        Ok(match op {
            Op::Param => Value { node: self.function.params[index as usize], result: 0 },
            Op::Proj => Value { node: operands[0].node, result: index },
            _ => {
                let Data::Values(types) = &self.graph[id].data else {
                    return Err(TermsError::Choice(format!("`{op}` has no type")));
                };
                Value { node: self.function.add_node(*op, &operands, attrs, types.clone()), result: 0 }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nextc_ir::build::FunctionBuilder;
    use nextc_ir::{Shape, Sym, print};

    fn top_k() -> Function {
        let mut b = FunctionBuilder::new("top");
        let x = b.param("x", Type::f32(Shape::rows(Sym::T, &[8])));
        let top = b.op_n(Op::TopK, &[x], Attrs::none().with("k", 3i64)).expect("it fits");
        let weights = b.op(Op::Softmax, &[top[0]]).expect("it fits");
        b.finish(vec![weights, top[1]])
    }

    #[test]
    fn a_function_comes_back_as_it_went() {
        let function = top_k();
        let mut terms = Terms::of(&function).expect("it is well typed");
        terms.graph.rebuild();
        let back = to_function(&function, &terms.graph, &terms.roots, |id| terms.graph[id].nodes.first());
        assert_eq!(print::function(&back.expect("there is one term a class")), print::function(&function));
    }

    #[test]
    fn two_types_are_not_equal_and_the_error_names_both() {
        let mut terms = Terms::of(&top_k()).expect("it is well typed");
        terms.graph.union(terms.roots[0], terms.roots[1]);
        terms.graph.rebuild();
        let error = terms.check().expect_err("weights are no indices").to_string();
        assert!(error.contains("tensor<T x 3 x f32>") && error.contains("tensor<T x 3 x i32>"), "{error}");
    }

    #[test]
    fn a_class_without_a_term_is_an_error() {
        let function = top_k();
        let mut terms = Terms::of(&function).expect("it is well typed");
        terms.graph.rebuild();
        let error = to_function(&function, &terms.graph, &terms.roots, |_| None).expect_err("there is nothing to take");
        assert!(matches!(error, TermsError::Choice(_)));
    }
}
