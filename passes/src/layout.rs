//! `layout`: where the elements of each weight lie.
//!
//! A weight with input dimensions is a matrix and is stored in tiles of 16 rows; norm gains, gates, convolution taps and
//! other small tables are flat. The layout is part of a weight's type, in the functions that name the weight and in those
//! it is passed to.

use std::collections::HashMap;

use nextc_ir::graph::{Function, Module, NodeId, WeightDecl};
use nextc_ir::types::StateKind;
use nextc_ir::{Format, Layout, Op, Target, Type};

use crate::{Error, Pass};

/// The pass. It needs nothing of earlier ones; lowering needs it.
pub const PASS: Pass = Pass { name: "layout", doc: "assigns each weight a layout: matrices tiles, the rest flat", run };

/// The layout of a weight.
pub fn of_decl(decl: &WeightDecl, target: &Target) -> Layout {
    if decl.in_rank > 0 { of_matrix(decl.format, target) } else { Layout::Flat }
}

/// The layout of a matrix: fragments of a warp's products on GPUs, where a format is made for that.
fn of_matrix(format: Format, target: &Target) -> Layout {
    if target.gpu.is_some() && crate::lower::gpu::fragments::covers(format) { Layout::Mma16 } else { Layout::Tile16 }
}

fn run(mut module: Module, target: &Target) -> Result<Module, Error> {
    name_weights(&mut module, target)?;
    let passed = passed(&module)?;
    for function in &mut module.functions {
        for index in 0..function.params.len() {
            let param = function.params[index];
            let given = passed.get(&(function.name.clone(), index)).copied();
            let layout = given.unwrap_or_else(|| by_use(function, param, target));
            set(&mut function.graph[param].types[0], layout);
        }
        retype(function)?;
    }
    Ok(module)
}

/// Assigns the layouts of weights where they are named.
fn name_weights(module: &mut Module, target: &Target) -> Result<(), Error> {
    let Module { functions, weights, .. } = module;
    for function in functions {
        for node in function.graph.node_weights_mut().filter(|node| node.op == Op::Weight) {
            let name = node.attrs.str("name").unwrap_or_default();
            let decl = weights.get(name).ok_or_else(|| Error::NoWeight(name.to_owned()))?;
            set(&mut node.types[0], of_decl(decl, target));
        }
    }
    Ok(())
}

/// The layouts of the weights that calls pass, by callee and parameter.
fn passed(module: &Module) -> Result<HashMap<(String, usize), Layout>, Error> {
    let mut passed = HashMap::new();
    for function in &module.functions {
        for id in function.order() {
            let node = function.node(id);
            let Some(callee) = node.attrs.str("function").filter(|_| node.op == Op::Call) else { continue };
            for (index, &arg) in function.operands(id).iter().enumerate() {
                let Some(layout) = function.ty(arg).as_weight().and_then(|w| w.layout) else { continue };
                if *passed.entry((callee.to_owned(), index)).or_insert(layout) != layout {
                    return Err(Error::TwoLayouts { function: callee.to_owned(), param: index });
                }
            }
        }
    }
    Ok(passed)
}

/// The layout of a weight that nobody passes (a function on its own): vectors and what stands beside a convolution's state
/// are flat.
fn by_use(function: &Function, param: NodeId, target: &Target) -> Layout {
    let is_conv = |user: NodeId| {
        let mut operands = function.operands(user).into_iter();
        operands.any(|v| function.ty(v).as_state().is_some_and(|s| s.kind == StateKind::Conv))
    };
    let matrix = function.node(param).types[0].as_weight().filter(|w| w.shape.len() >= 2);
    let matrix = matrix.filter(|_| !function.users(param).iter().any(|(user, _)| is_conv(*user)));
    matrix.map_or(Layout::Flat, |w| of_matrix(w.format, target))
}

fn set(ty: &mut Type, layout: Layout) {
    if let Type::Weight(weight) = ty {
        weight.layout = Some(layout);
    }
}

/// Computes the types of everything that is not declared again, since bundles hold the types of weights.
fn retype(function: &mut Function) -> Result<(), Error> {
    for id in function.order() {
        let node = function.node(id);
        if matches!(node.op, Op::Param | Op::Weight | Op::Call) {
            continue;
        }
        let values = function.operands(id);
        let operands: Vec<&Type> = values.iter().map(|&v| function.ty(v)).collect();
        let types = (node.op.def().shape)(&operands, &node.attrs);
        let fail = |error| Error::Shape { function: function.name.clone(), op: node.op, error };
        let types = types.map_err(fail)?;
        function.graph[id].types = types;
    }
    Ok(())
}
