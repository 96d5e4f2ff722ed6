//! Evaluation of functions.

use std::collections::HashMap;

use super::datum::{Datum, Real};
use super::weights::WeightStore;
use super::{Cx, EvalError};
use crate::dtype::DType;
use crate::graph::{Function, Module, NodeId, Value};
use crate::op::Op;
use crate::shape::{Dim, Shape};
use crate::types::Type;

/// Evaluates `@name` of `module` on `args`, one for each parameter.
/// # Errors
/// [`EvalError`]: no such function, arguments that do not fit, or what failed in an op.
pub fn run<F: Real>(
    module: &Module,
    name: &str,
    args: Vec<Datum<F>>,
    weights: &WeightStore<F>,
    cx: &Cx<F>,
) -> Result<Vec<Datum<F>>, EvalError> {
    let missing = || EvalError::NoFunction(name.to_owned());
    let index = module.functions.iter().position(|f| f.name == name).ok_or_else(missing)?;
    Frame { callees: &module.functions[..index], weights, cx }.function(&module.functions[index], args)
}

/// Evaluates a function that calls no other.
/// # Errors
/// As [`run`].
pub fn evaluate<F: Real>(
    function: &Function,
    args: Vec<Datum<F>>,
    weights: &WeightStore<F>,
    cx: &Cx<F>,
) -> Result<Vec<Datum<F>>, EvalError> {
    Frame { callees: &[], weights, cx }.function(function, args)
}

/// What a function may see: the functions before it, and the weights.
#[derive(Clone, Copy)]
struct Frame<'a, F> {
    callees: &'a [Function],
    weights: &'a WeightStore<F>,
    cx: &'a Cx<F>,
}

impl<F: Real> Frame<'_, F> {
    fn function(self, f: &Function, args: Vec<Datum<F>>) -> Result<Vec<Datum<F>>, EvalError> {
        check_arguments(f, &args)?;
        let mut values: HashMap<NodeId, Vec<Datum<F>>> = HashMap::new();
        for (&param, arg) in f.params.iter().zip(args) {
            values.insert(param, vec![arg]);
        }
        for id in f.order().into_iter().skip(f.params.len()) {
            let at = |error| EvalError::At { function: f.name.clone(), op: f.node(id).op, error: Box::new(error) };
            let results = self.node(f, id, &values).map_err(at)?;
            values.insert(id, results);
        }
        let wanted = |&v: &Value| {
            take(&values, v).ok_or(EvalError::OutOfRange {
                what: "result",
                value: v.result.into(),
                limit: f.graph[v.node].types.len(),
            })
        };
        f.results.iter().map(wanted).collect()
    }

    fn node(
        self,
        f: &Function,
        id: NodeId,
        values: &HashMap<NodeId, Vec<Datum<F>>>,
    ) -> Result<Vec<Datum<F>>, EvalError> {
        let node = f.node(id);
        let uses = f.operands(id);
        let args: Vec<_> = uses.iter().filter_map(|&v| take(values, v)).collect();
        if args.len() != uses.len() {
            return Err(EvalError::Operands { found: args.len(), expected: uses.len() });
        }
        match node.op {
            Op::Weight => {
                let name = node.attrs.str("name").ok_or(EvalError::Attr("name"))?;
                Ok(vec![self.weights.get(name)?.clone()])
            }
            Op::Call => {
                let name = node.attrs.str("function").ok_or(EvalError::Attr("function"))?;
                let index = self.callees.iter().position(|f| f.name == name);
                let index = index.ok_or_else(|| EvalError::NoFunction(name.to_owned()))?;
                Self { callees: &self.callees[..index], ..self }.function(&self.callees[index], args)
            }
            op => self.cx.eval(op.def(), &args, &node.attrs),
        }
    }
}

fn take<F: Clone>(values: &HashMap<NodeId, Vec<Datum<F>>>, v: Value) -> Option<Datum<F>> {
    values.get(&v.node).and_then(|results| results.get(v.result as usize)).cloned()
}

/// Each argument must have its parameter's type, under one binding of the symbols for all.
fn check_arguments<F: Real>(f: &Function, args: &[Datum<F>]) -> Result<(), EvalError> {
    if args.len() != f.params.len() {
        return Err(EvalError::Operands { found: args.len(), expected: f.params.len() });
    }
    let mut syms = [None; 4];
    for (&param, arg) in f.params.iter().zip(args) {
        let node = f.node(param);
        if !fits(&node.types[0], arg, &mut syms) {
            let name = node.name.clone().unwrap_or_default();
            let expected = format!("{} with T, B, P, R = {syms:?}", node.types[0]);
            return Err(EvalError::Argument { name, found: describe(arg), expected });
        }
    }
    Ok(())
}

fn describe<F: Real>(arg: &Datum<F>) -> String {
    match arg {
        Datum::Float(a) => format!("floats {:?}", a.dims()),
        Datum::Int(a) => format!("integers {:?}", a.dims()),
        Datum::State(s) => Type::State(s.ty().clone()).to_string(),
        Datum::Sequences(_) | Datum::Bundle(_) => arg.kind().to_owned(),
    }
}

fn fits<F: Real>(ty: &Type, arg: &Datum<F>, syms: &mut [Option<usize>; 4]) -> bool {
    match (ty, arg) {
        (Type::Tensor(t), Datum::Float(a)) => t.dtype == DType::F32 && binds(&t.shape, a.dims(), syms),
        (Type::Tensor(t), Datum::Int(a)) => t.dtype == DType::I32 && binds(&t.shape, a.dims(), syms),
        (Type::Weight(w), Datum::Float(a)) => w.shape.iter().map(|&d| d as usize).eq(a.dims().iter().copied()),
        (Type::State(s), Datum::State(state)) => state.ty() == s,
        (Type::Sequences, Datum::Sequences(_)) => true,
        (Type::Bundle(types), Datum::Bundle(items)) => {
            types.len() == items.len() && types.iter().zip(items).all(|(t, i)| fits(t, i, syms))
        }
        _ => false,
    }
}

fn binds(shape: &Shape, dims: &[usize], syms: &mut [Option<usize>; 4]) -> bool {
    let mut bind = |dim: Dim, n: usize| match dim {
        Dim::Const(c) => c == n as u64,
        Dim::Sym(s) => *syms[s.index()].get_or_insert(n) == n,
        Dim::SymPlus(s, k) => n.checked_sub(k as usize).is_some_and(|n| *syms[s.index()].get_or_insert(n) == n),
    };
    shape.rank() == dims.len() && shape.0.iter().zip(dims).all(|(&dim, &n)| bind(dim, n))
}
