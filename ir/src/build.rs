//! The builder of graph functions: result types come from the op table's shape rules.

use crate::attr::Attrs;
use crate::graph::{Function, Value};
use crate::op::{Op, ShapeError};
use crate::types::Type;

/// Why a node cannot be built.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("@{function}: {op}: {error}")]
pub struct BuildError {
    /// The function being built.
    pub function: String,
    /// The op.
    pub op: Op,
    /// What does not fit.
    pub error: ShapeError,
}

/// Builds one function.
#[derive(Debug)]
pub struct FunctionBuilder {
    function: Function,
}

impl FunctionBuilder {
    /// An empty function called `name`.
    pub fn new(name: &str) -> Self {
        Self { function: Function::new(name) }
    }

    /// Goes on with a function that has been begun.
    pub fn from(function: Function) -> Self {
        Self { function }
    }

    /// Adds a parameter.
    pub fn param(&mut self, name: &str, ty: Type) -> Value {
        let attrs = Attrs::none().with("index", self.function.params.len() as i64);
        let node = self.function.add_node(Op::Param, &[], attrs, vec![ty]);
        self.function.graph[node].name = Some(name.to_owned());
        self.function.params.push(node);
        Value { node, result: 0 }
    }

    /// Adds a constant of the weight table.
    pub fn weight(&mut self, name: &str, ty: Type) -> Value {
        let node = self.function.add_node(Op::Weight, &[], Attrs::none().with("name", name), vec![ty]);
        Value { node, result: 0 }
    }

    /// Adds an op and gives all its results.
    /// # Errors
    /// [`BuildError`] if the operands do not fit the op.
    pub fn op_n(&mut self, op: Op, operands: &[Value], attrs: Attrs) -> Result<Vec<Value>, BuildError> {
        let types: Vec<&Type> = operands.iter().map(|&v| self.function.ty(v)).collect();
        let result = (op.def().shape)(&types, &attrs);
        let types = result.map_err(|error| BuildError { function: self.function.name.clone(), op, error })?;
        let count = types.len() as u32;
        let node = self.function.add_node(op, operands, attrs, types);
        Ok((0..count).map(|result| Value { node, result }).collect())
    }

    /// Adds an op with one result and no attributes.
    /// # Errors
    /// [`BuildError`] if the operands do not fit the op.
    pub fn op(&mut self, op: Op, operands: &[Value]) -> Result<Value, BuildError> {
        Ok(self.op_n(op, operands, Attrs::none())?[0])
    }

    /// Adds an op with one result and attributes.
    /// # Errors
    /// [`BuildError`] if the operands do not fit the op.
    pub fn op_with(&mut self, op: Op, operands: &[Value], attrs: Attrs) -> Result<Value, BuildError> {
        Ok(self.op_n(op, operands, attrs)?[0])
    }

    /// Adds a call of `callee` and gives its results.
    pub fn call(&mut self, callee: &Function, args: &[Value]) -> Vec<Value> {
        let types: Vec<Type> = callee.results.iter().map(|&v| callee.ty(v).clone()).collect();
        let count = types.len() as u32;
        let attrs = Attrs::none().with("function", callee.name.as_str());
        let node = self.function.add_node(Op::Call, args, attrs, types);
        (0..count).map(|result| Value { node, result }).collect()
    }

    /// The type of a value.
    pub fn ty(&self, v: Value) -> &Type {
        self.function.ty(v)
    }

    /// The function, returning `results`.
    pub fn finish(mut self, results: Vec<Value>) -> Function {
        self.function.results = results;
        self.function
    }
}
