//! What a kernel is connected to: its pointer parameters, in order, and the graph values they are bound to.

use nextc_ir::graph::{Function, NodeId, Value};
use nextc_ir::kernel::{Kernel, KernelBuilder};
use nextc_ir::schedule::{Extent, Input};
use nextc_ir::shape::{Dim, Sym, padded_elems};
use nextc_ir::types::{StateType, TensorType, WeightType};
use nextc_ir::{Op, Target, Type};

use super::LowerError;

/// What a parameter of a kernel is bound to, in terms of the function that it was lowered from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bind {
    /// A value of the function: a tensor, a weight, or a version of a state.
    Value(Value),
    /// A part of the step's sequences.
    Step(Input),
}

/// A kernel and what its parameters are bound to.
#[derive(Clone, Debug)]
pub struct Part {
    /// The kernel.
    pub kernel: Kernel,
    /// One entry for each of its parameters.
    pub binds: Vec<Bind>,
}

/// What a node, or a chain of nodes, becomes: one kernel or several, launched in order. Those whose grid is empty in a step are left out.
#[derive(Clone, Debug)]
pub struct Lowered {
    /// The kernels.
    pub parts: Vec<Part>,
}

impl Lowered {
    /// These kernels, then those of `other`.
    #[must_use]
    pub fn then(mut self, other: Self) -> Self {
        self.parts.extend(other.parts);
        self
    }
}

/// A node to be lowered, with what is around it.
#[derive(Clone, Copy)]
pub struct Site<'a> {
    /// The function.
    pub function: &'a Function,
    /// The node.
    pub node: NodeId,
    /// The machine.
    pub target: &'a Target,
}

impl<'a> Site<'a> {
    /// The op.
    pub fn op(&self) -> Op {
        self.function.node(self.node).op
    }

    /// An error about this node.
    pub fn error(&self, why: impl Into<String>) -> LowerError {
        LowerError::Unsupported { function: self.function.name.clone(), op: self.op(), why: why.into() }
    }

    /// Operand `i`.
    pub fn operand(&self, i: usize) -> Value {
        self.function.operands(self.node)[i]
    }

    /// The operand called `name` in the op table.
    pub fn named(&self, name: &str) -> Value {
        let position = self.op().def().operands.iter().position(|o| *o == name);
        self.operand(position.expect("a skeleton asks for operands that its op has"))
    }

    /// Result `i`.
    pub fn result(&self, i: u32) -> Value {
        Value { node: self.node, result: i }
    }

    /// A float attribute; the verifier has checked that it is there.
    pub fn float(&self, name: &str) -> f32 {
        self.function.node(self.node).attrs.float(name).expect("verified") as f32
    }

    /// An integer attribute; the verifier has checked that it is there.
    pub fn int(&self, name: &str) -> u64 {
        self.function.node(self.node).attrs.int(name).expect("verified") as u64
    }

    /// The tensor type of a value.
    pub fn tensor(&self, v: Value) -> &'a TensorType {
        self.function.ty(v).as_tensor().expect("the shape rule asked for a tensor")
    }

    /// The weight type of a value.
    pub fn weight(&self, v: Value) -> &'a WeightType {
        self.function.ty(v).as_weight().expect("the shape rule asked for a weight")
    }

    /// The state type of a value.
    pub fn state(&self, v: Value) -> &'a StateType {
        self.function.ty(v).as_state().expect("the shape rule asked for a state")
    }

    /// The rows of a tensor: the symbol of its first dimension.
    pub fn rows(&self, v: Value) -> Result<Sym, LowerError> {
        match self.tensor(v).shape.0.first() {
            Some(Dim::Sym(s)) => Ok(*s),
            _ => Err(self.error(format!("rows of {}", self.function.ty(v)))),
        }
    }

    /// The dimensions of a tensor after its rows.
    pub fn inner(&self, v: Value) -> Vec<u64> {
        self.tensor(v).shape.inner().expect("only the first dimension is a symbol")
    }

    /// Elements from one row of a tensor to the next.
    pub fn stride(&self, v: Value) -> u64 {
        padded_elems(&self.inner(v))
    }

    /// The members of a bundle operand.
    pub fn bundle(&self, v: Value) -> Result<Vec<Value>, LowerError> {
        match self.function.node(v.node).op {
            Op::Bundle => Ok(self.function.operands(v.node)),
            op => Err(self.error(format!("a bundle made by `{op}`"))),
        }
    }
}

/// Collects the parameters of a kernel.
#[derive(Clone, Debug, Default)]
pub struct Ports {
    names: Vec<(String, bool)>,
    binds: Vec<Bind>,
}

/// A parameter that has been asked for; [`Ports::builder`] makes the values.
pub type Port = usize;

impl Ports {
    fn push(&mut self, name: &str, written: bool, bind: Bind) -> Port {
        self.names.push((name.to_owned(), written));
        self.binds.push(bind);
        self.names.len() - 1
    }

    /// A value that is read.
    pub fn read(&mut self, name: &str, value: Value) -> Port {
        self.push(name, false, Bind::Value(value))
    }

    /// A value that is written: a result, or a state that is updated in place.
    pub fn write(&mut self, name: &str, value: Value) -> Port {
        self.push(name, true, Bind::Value(value))
    }

    /// An input of the step.
    pub fn step(&mut self, input: Input) -> Port {
        self.push(input.name(), false, Bind::Step(input))
    }

    /// The builder of a kernel with these parameters.
    pub fn builder(&self, site: &Site<'_>, grid: Extent) -> KernelBuilder {
        self.builder_of(site, "", grid)
    }

    /// The builder of one kernel of several; `part` ends its name.
    pub fn builder_of(&self, site: &Site<'_>, part: &str, grid: Extent) -> KernelBuilder {
        let number = site.function.node(site.node).kernel.unwrap_or(0);
        let name = format!("{}{}{part}", kernel_prefix(site.function, number), site.op());
        let names: Vec<(&str, bool)> = self.names.iter().map(|(n, w)| (n.as_str(), *w)).collect();
        let mut k = KernelBuilder::new(&name, &names, grid);
        k.doc(site.op().def().doc.trim());
        k
    }

    /// The kernel with its bindings.
    pub fn finish(self, kernel: Kernel) -> Lowered {
        Lowered { parts: vec![Part { kernel, binds: self.binds }] }
    }
}

/// What the names of the kernels begin with that do kernel `number` of a function; an op follows.
pub fn kernel_prefix(function: &Function, number: u32) -> String {
    format!("{}.{number}.", function.name)
}

/// The type of a value as text, for errors.
pub fn describe(function: &Function, v: Value) -> String {
    let ty: &Type = function.ty(v);
    ty.to_string()
}
