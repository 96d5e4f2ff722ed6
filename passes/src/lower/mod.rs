//! Graph IR to kernel IR: a kernel, on a GPU sometimes several, for each that `partition` drew, and the schedule of the entry points.
//!
//! A skeleton is a file: [`matmul`], [`bulk`] (weights: [`packed`], [`strips`]), [`experts`], [`delta_rule`], [`attention`], [`elementwise`], [`sample`], [`choose`]. Each gives a kernel and says what its
//! parameters are bound to in the function it came from ([`ports`]); this module resolves the bindings of every call to
//! places: weights, states, inputs and the arena.
//!
//! Everything in memory is padded to 16 along its innermost dimension, with finite numbers in the padding (zeros where
//! weights are zero), so no kernel has a tail in lanes.

pub mod attention;
pub mod bulk;
pub mod choose;
pub mod delta_rule;
pub mod elementwise;
pub mod experts;
pub mod gpu;
mod kv_codes;
pub mod matmul;
pub mod packed;
mod pages;
pub mod ports;
pub mod sample;
pub mod shorts;
pub mod strips;

use std::collections::HashMap;

use nextc_ir::graph::{Function, NodeId, Placement, Value};
use nextc_ir::kernel::Kernel;
use nextc_ir::op::Class;
use nextc_ir::schedule::{
    ArenaPlan, Arg, ENTRIES, Entry, Input, KernelModule, Launch, Output, PackedWeight, Program, StateDecl,
};
use nextc_ir::shape::{Dim, Sym, padded_elems};
use nextc_ir::{Module, Op, Target, Type};

use ports::{Bind, Lowered, Site};

/// Why a module cannot be lowered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LowerError {
    /// A skeleton does not cover this.
    #[error("@{function}: no kernel for `{op}`: {why}")]
    Unsupported {
        /// The function.
        function: String,
        /// The op.
        op: Op,
        /// What is not covered.
        why: String,
    },
    /// A node was not put into a kernel or not given a place: `partition` or `memory` did not run.
    #[error("@{function}: {what}")]
    NotReady {
        /// The function.
        function: String,
        /// What is missing.
        what: String,
    },
}

/// Lowers every function and lays out the schedule of each entry point.
/// # Errors
/// [`LowerError`] if an op has no skeleton, or if the passes before it did not run.
pub fn lower(module: &Module, target: &Target) -> Result<KernelModule, LowerError> {
    let mut out = KernelModule {
        info: module.info.clone(),
        kernels: Vec::new(),
        programs: Vec::new(),
        weights: packed_weights(module, target),
        states: Vec::new(),
        arena: ArenaPlan::default(),
        page_tokens: target.page_tokens,
    };
    let mut functions = HashMap::new();
    for f in module.functions.iter().filter(|f| ENTRIES.iter().all(|e| e.name != f.name)) {
        functions.insert(f.name.as_str(), lower_function(f, target, &mut out.kernels)?);
    }
    for (rules, f) in ENTRIES.iter().filter_map(|e| module.function(e.name).map(|f| (e, f))) {
        let base = rules.after.and_then(|name| module.function(name)).map(crate::memory::frame).unwrap_or_default();
        let frame = stack(base, crate::memory::frame(f));
        let callees = callees(module, f)?;
        let inner = callees.iter().map(|c| crate::memory::frame(c)).fold(ArenaPlan::default(), larger);
        let used = stack(frame, inner);
        out.arena = larger(out.arena, used);
        let scheduler = Scheduler { module, rules, entry: f, base, frame, functions: &functions, out: &mut out };
        let program = scheduler.program(used.unit_bytes[Sym::R.index()])?;
        out.programs.push(program);
    }
    if out.arena.unit_bytes[Sym::P.index()] > 0 {
        let what = "values of P rows in the arena, whose end would move between a step and what follows it".to_owned();
        return Err(LowerError::NotReady { function: ENTRIES[0].name.to_owned(), what });
    }
    Ok(out)
}

fn larger(a: ArenaPlan, b: ArenaPlan) -> ArenaPlan {
    let mut unit_bytes = a.unit_bytes;
    unit_bytes.iter_mut().zip(b.unit_bytes).for_each(|(x, y)| *x = (*x).max(y));
    ArenaPlan { fixed_bytes: a.fixed_bytes.max(b.fixed_bytes), unit_bytes }
}

fn stack(a: ArenaPlan, b: ArenaPlan) -> ArenaPlan {
    let mut unit_bytes = a.unit_bytes;
    unit_bytes.iter_mut().zip(b.unit_bytes).for_each(|(x, y)| *x += y);
    ArenaPlan { fixed_bytes: a.fixed_bytes + b.fixed_bytes, unit_bytes }
}

/// A place behind what another frame takes.
fn shifted(place: Placement, by: &ArenaPlan) -> Placement {
    let before = place.unit.map_or(by.fixed_bytes, |sym| by.unit_bytes[sym.index()]);
    Placement { at_bytes: place.at_bytes + before, ..place }
}

fn callees<'m>(module: &'m Module, f: &Function) -> Result<Vec<&'m Function>, LowerError> {
    let calls = f.order().into_iter().filter(|&n| f.node(n).op == Op::Call);
    calls.map(|n| callee(module, f, n)).collect()
}

fn callee<'m>(module: &'m Module, f: &Function, node: NodeId) -> Result<&'m Function, LowerError> {
    let name = f.node(node).attrs.str("function").unwrap_or_default();
    let what = || format!("a call of @{name}, which is not in the module");
    module.function(name).ok_or_else(|| LowerError::NotReady { function: f.name.clone(), what: what() })
}

/// The weight table with the layouts that the pass `layout` writes into the types.
fn packed_weights(module: &Module, target: &Target) -> Vec<PackedWeight> {
    let entry = |(name, decl): (&String, &nextc_ir::graph::WeightDecl)| PackedWeight {
        name: name.clone(),
        decl: decl.clone(),
        layout: crate::layout::of_decl(decl, target),
    };
    module.weights.iter().map(entry).collect()
}

/// The kernels of one function in order: index of the kernel, and what its parameters are bound to.
type FunctionKernels = Vec<(u32, Vec<Bind>)>;

fn lower_function(f: &Function, target: &Target, kernels: &mut Vec<Kernel>) -> Result<FunctionKernels, LowerError> {
    let mut groups: Vec<Vec<NodeId>> = Vec::new();
    for node in f.order() {
        let n = f.node(node);
        if n.op.def().class == Class::Structure {
            continue;
        }
        let what = || format!("`{}` is in no kernel", n.op);
        let kernel = n.kernel.ok_or_else(|| LowerError::NotReady { function: f.name.clone(), what: what() })? as usize;
        if groups.len() <= kernel {
            groups.resize(kernel + 1, Vec::new());
        }
        groups[kernel].push(node);
    }
    let mut out = Vec::new();
    for group in groups.iter().filter(|g| !g.is_empty()) {
        for part in lower_group(f, group, target)?.parts {
            out.push((kernels.len() as u32, part.binds));
            kernels.push(part.kernel);
        }
    }
    Ok(out)
}

/// The kernels of one group of nodes: a node with a skeleton of its own, or elementwise nodes in order.
/// # Errors
/// [`LowerError::Unsupported`] if no skeleton covers it.
pub fn lower_group(function: &Function, group: &[NodeId], target: &Target) -> Result<Lowered, LowerError> {
    let site = Site { function, node: group[0], target };
    if group.iter().all(|&n| function.node(n).op.def().class == Class::Elementwise) {
        return elementwise::lower_chain(&Site { node: group[group.len() - 1], ..site }, group);
    }
    if group.len() > 1 {
        return Err(site.error(format!("{} ops in one kernel that are not all elementwise", group.len())));
    }
    if let Some(lowered) = site.target.gpu.and_then(|_| gpu::lower(&site)) {
        return lowered;
    }
    match site.op() {
        Op::Embed => elementwise::lower_embed(&site),
        Op::GatherRows => elementwise::lower_gather_rows(&site),
        Op::SumSquares => elementwise::lower_sum_squares(&site),
        Op::RmsScale => elementwise::lower_rms_scale(&site),
        Op::RmsNorm | Op::RmsNormPlusOne => elementwise::lower_rms_norm(&site),
        Op::Linear | Op::Linears | Op::NormLinears => matmul::lower_linears(&site),
        Op::LinearWanted => matmul::lower_linear_wanted(&site),
        Op::LinearResidual => matmul::lower_linear_residual(&site),
        Op::NormSwiglu => matmul::lower_norm_swiglu(&site),
        Op::NormRopeAppend | Op::NormAppend => attention::lower_norm_append(&site),
        Op::GatedAttention => attention::lower_gated_attention(&site),
        Op::GatedDeltaNet => delta_rule::lower_gated_delta_net(&site),
        Op::NormRouter => experts::lower_norm_router(&site),
        Op::ExpertsGateUp => experts::lower_experts_gate_up(&site),
        Op::ExpertsDown => experts::lower_experts_down(&site),
        Op::Argmax => sample::lower_argmax(&site),
        Op::EditLogits => sample::lower_edit_logits(&site),
        Op::TokenWeights => sample::lower_token_weights(&site),
        Op::Choose => choose::vectors::lower_choose(&site),
        Op::Accept => sample::lower_accept(&site),
        _ => Err(site.error("it has no skeleton of its own; `rewrite` should have fused it")),
    }
}

/// Resolves what the kernels of an entry point's calls are bound to.
struct Scheduler<'a> {
    module: &'a Module,
    rules: &'a Entry,
    entry: &'a Function,
    /// Where the entry point's own values begin: behind the results that it takes over.
    base: ArenaPlan,
    /// Where those of its callees begin.
    frame: ArenaPlan,
    functions: &'a HashMap<&'a str, FunctionKernels>,
    out: &'a mut KernelModule,
}

impl Scheduler<'_> {
    fn program(mut self, row_bytes: u64) -> Result<Program, LowerError> {
        let mut launches = Vec::new();
        for node in self.entry.order() {
            let n = self.entry.node(node);
            match n.op {
                Op::Call => self.call(node, &mut launches)?,
                op if op.def().class == Class::Structure => {}
                op => return Err(self.not_ready(format!("`{op}` in an entry point, which may only call"))),
            }
        }
        let outputs = self.outputs()?;
        Ok(Program { name: self.entry.name.clone(), launches, outputs, row_bytes })
    }

    fn call(&mut self, node: NodeId, launches: &mut Vec<Launch>) -> Result<(), LowerError> {
        let callee = callee(self.module, self.entry, node)?;
        let functions = self.functions;
        let kernels = &functions[callee.name.as_str()];
        for (kernel, binds) in kernels {
            let args = binds.iter().map(|&b| self.bind(node, callee, b)).collect::<Result<_, _>>()?;
            launches.push(Launch { kernel: *kernel, args, label: self.label(node, callee) });
        }
        Ok(())
    }

    /// The function, and the layer whose weights the call binds.
    fn label(&self, node: NodeId, callee: &Function) -> String {
        let weights = self.entry.operands(node).into_iter().map(|v| self.entry.node(v.node));
        let name = weights.filter(|n| n.op == Op::Weight).filter_map(|n| n.attrs.str("name")).next();
        let layer = name.and_then(|n| n.strip_prefix("layers.")).and_then(|n| n.split('.').next());
        layer.map_or_else(|| callee.name.clone(), |i| format!("layers.{i}.{}", callee.name))
    }

    fn bind(&mut self, call: NodeId, callee: &Function, bind: Bind) -> Result<Arg, LowerError> {
        match bind {
            Bind::Step(input) => Ok(Arg::Input(input)),
            Bind::Value(v) => self.callee_value(call, callee, v),
        }
    }

    /// A value of the callee: its caller's argument, its caller's result, or a place in its own frame.
    fn callee_value(&mut self, call: NodeId, callee: &Function, v: Value) -> Result<Arg, LowerError> {
        if matches!(callee.ty(v), Type::State(_)) {
            let origin = state_origin(callee, v);
            return self.caller_arg(call, callee, origin);
        }
        if callee.node(v.node).op == Op::Param {
            return self.caller_arg(call, callee, v);
        }
        if let Some(i) = callee.results.iter().position(|&r| r == v) {
            return self.entry_value(Value { node: call, result: i as u32 });
        }
        let place = callee.node(v.node).placement[v.result as usize];
        let place = place.ok_or_else(|| self.not_ready(format!("a value of @{} without a place", callee.name)))?;
        Ok(Arg::Arena(shifted(place, &self.frame)))
    }

    fn caller_arg(&mut self, call: NodeId, callee: &Function, param: Value) -> Result<Arg, LowerError> {
        let index = callee.params.iter().position(|&p| p == param.node);
        let index = index.ok_or_else(|| self.not_ready(format!("a state of @{} that is no parameter", callee.name)))?;
        self.entry_value(self.entry.operands(call)[index])
    }

    /// A value of the entry point.
    fn entry_value(&mut self, v: Value) -> Result<Arg, LowerError> {
        let entry = self.entry;
        let node = entry.node(v.node);
        match (&node.types[v.result as usize], node.op) {
            (Type::State(_), _) => self.state(v),
            (_, Op::Weight) => {
                let name = node.attrs.str("name").unwrap_or_default();
                let index = self.module.weights.get_index_of(name);
                let index = index.ok_or_else(|| self.not_ready(format!("weight {name:?} is not in the table")))?;
                Ok(Arg::Weight(index as u32))
            }
            (_, Op::Param) => {
                let name = node.name.as_deref().unwrap_or_default();
                if let Some(place) = self.taken_over(name) {
                    return Ok(Arg::Arena(place));
                }
                let input = Input::ALL.into_iter().find(|i| i.name() == name);
                input.map(Arg::Input).ok_or_else(|| self.not_ready(format!("`{name}` is no input of a step")))
            }
            (_, Op::Call) => {
                let place = node.placement[v.result as usize].map(|place| shifted(place, &self.base));
                place.map(Arg::Arena).ok_or_else(|| self.not_ready("a call's result without a place".to_owned()))
            }
            (ty, op) => Err(self.not_ready(format!("a value {ty} of `{op}`"))),
        }
    }

    /// Where the result called `name` of the entry point before this one lies.
    fn taken_over(&self, name: &str) -> Option<Placement> {
        let before = self.out.programs.iter().find(|p| Some(p.name.as_str()) == self.rules.after)?;
        before.outputs.iter().find(|o| o.name == name).map(|o| o.at)
    }

    /// The entry of the state table for a version of a state: the parameter that it goes back to.
    fn state(&mut self, v: Value) -> Result<Arg, LowerError> {
        let mut at = v;
        while self.entry.node(at.node).op == Op::Call {
            let callee = callee(self.module, self.entry, at.node)?;
            let origin = state_origin(callee, callee.results[at.result as usize]);
            let index = callee.params.iter().position(|&p| p == origin.node);
            let index =
                index.ok_or_else(|| self.not_ready(format!("a state of @{} that is no parameter", callee.name)))?;
            at = self.entry.operands(at.node)[index];
        }
        let name = self.entry.node(at.node).name.clone().unwrap_or_default();
        let Type::State(ty) = self.entry.ty(at).clone() else { unreachable!("versions of a state are states") };
        let states = &mut self.out.states;
        let index = states.iter().position(|s| s.name == name).unwrap_or_else(|| {
            states.push(StateDecl { name, ty });
            states.len() - 1
        });
        Ok(Arg::State(index as u32))
    }

    fn outputs(&mut self) -> Result<Vec<Output>, LowerError> {
        let mut outputs = Vec::new();
        for (i, &v) in self.entry.results.iter().enumerate() {
            let Type::Tensor(t) = self.entry.ty(v) else { continue };
            let (Some(Dim::Sym(rows)), Some(inner)) = (t.shape.0.first(), t.shape.inner()) else {
                return Err(self.not_ready(format!("result {i} is {}", self.entry.ty(v))));
            };
            let Arg::Arena(at) = self.entry_value(v)? else {
                return Err(self.not_ready(format!("result {i} is not in the arena")));
            };
            let name = self.rules.results.get(outputs.len()).copied();
            let name = name.ok_or_else(|| self.not_ready(format!("result {i}, which has no name")))?.to_owned();
            outputs.push(Output { name, at, rows: *rows, width: inner.iter().product(), stride: padded_elems(&inner) });
        }
        Ok(outputs)
    }

    fn not_ready(&self, what: String) -> LowerError {
        LowerError::NotReady { function: self.entry.name.clone(), what }
    }
}

/// The parameter that a version of a state goes back to: state results of an op match its state operands in order.
fn state_origin(f: &Function, mut v: Value) -> Value {
    while f.node(v.node).op != Op::Param {
        let node = f.node(v.node);
        let number = node.types[..v.result as usize].iter().filter(|t| matches!(t, Type::State(_))).count();
        let operands = f.operands(v.node);
        let mut states = operands.into_iter().filter(|&o| matches!(f.ty(o), Type::State(_)));
        v = states.nth(number).expect("an op that gives a state takes it");
    }
    v
}
