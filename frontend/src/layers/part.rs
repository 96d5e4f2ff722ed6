//! One function of the module together with what an entry function must pass to it.

use nextc_ir::build::{BuildError, FunctionBuilder};
use nextc_ir::graph::Function;
use nextc_ir::{Attrs, Op, Type, Value};

use super::Weights;

/// A function and its arguments after the inputs: states, then weights.
#[derive(Clone)]
pub(super) struct Part {
    pub function: Function,
    /// States by the entry function's name for them; the function returns them last, in this order.
    pub states: Vec<(String, Type)>,
    /// Weights of the table.
    pub weights: Vec<(String, Type)>,
    /// True if it takes the sequences of the step.
    pub mixer: bool,
}

/// Builds a part: first inputs, then states, then weights, then ops.
pub(super) struct PartBuilder<'a> {
    f: FunctionBuilder,
    table: &'a Weights,
    prefix: &'a str,
    states: Vec<(String, Type)>,
    weights: Vec<(String, Type)>,
    mixer: bool,
}

impl<'a> PartBuilder<'a> {
    /// `prefix` leads from a weight's or state's name to its name in the module: `layers.3.`.
    pub fn new(table: &'a Weights, name: &str, prefix: &'a str) -> Self {
        let f = FunctionBuilder::new(name);
        Self { f, table, prefix, states: Vec::new(), weights: Vec::new(), mixer: false }
    }

    pub fn input(&mut self, name: &str, ty: Type) -> Value {
        self.f.param(name, ty)
    }

    /// The residual stream and its sums of squares.
    pub fn stream(&mut self, [x, ssq]: [Type; 2]) -> [Value; 2] {
        [self.input("x", x), self.input("ssq", ssq)]
    }

    pub fn sequences(&mut self) -> Value {
        self.mixer = true;
        self.input("seqs", Type::Sequences)
    }

    pub fn state(&mut self, name: &str, ty: Type) -> Value {
        self.states.push((format!("{}{name}", self.prefix), ty.clone()));
        self.f.param(name, ty)
    }

    /// The layer's weight called `name`.
    pub fn weight(&mut self, name: &str) -> Value {
        let full = format!("{}{name}", self.prefix);
        self.weight_as(name.trim_start_matches("mlp."), full)
    }

    /// A weight of the table that is not the layer's own, as parameter `param`.
    pub fn weight_as(&mut self, param: &str, full: String) -> Value {
        let ty = self.table[full.as_str()].ty();
        self.weights.push((full, ty.clone()));
        self.f.param(param, ty)
    }

    pub fn op(&mut self, op: Op, operands: &[Value]) -> Result<Value, BuildError> {
        self.f.op(op, operands)
    }

    pub fn op_with(&mut self, op: Op, operands: &[Value], attrs: Attrs) -> Result<Value, BuildError> {
        self.f.op_with(op, operands, attrs)
    }

    /// An op with exactly two results.
    pub fn op_pair(&mut self, op: Op, operands: &[Value], attrs: Attrs) -> Result<[Value; 2], BuildError> {
        let results = self.f.op_n(op, operands, attrs)?;
        Ok([results[0], results[1]])
    }

    pub fn finish(self, results: Vec<Value>) -> Part {
        let Self { f, states, weights, mixer, .. } = self;
        Part { function: f.finish(results), states, weights, mixer }
    }
}
