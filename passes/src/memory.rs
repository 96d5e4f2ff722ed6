//! `memory`: a place in the arena for every value that a function makes and does not return.
//!
//! Values of different units (`T` rows, `R` rows, constant) lie in different regions, so places are planned for each unit
//! on its own, in bytes a unit. All that a kernel reads lives until the kernel ends, all that it writes lives from its
//! start; in an entry function the same holds of calls. Values whose lives do not meet share space, and an elementwise op
//! writes over an operand of its shape that nobody reads any more. A function's results are written to where its caller
//! wants them; its parameters are the caller's, and are never written over.

use std::collections::{BTreeMap, HashMap};

use nextc_ir::graph::{Function, Module, NodeId, Placement, Value};
use nextc_ir::op::Class;
use nextc_ir::schedule::ArenaPlan;
use nextc_ir::shape::padded_elems;
use nextc_ir::types::TensorType;
use nextc_ir::{Dim, Op, Sym, Target};

use crate::partition::kernels;
use crate::{Error, Pass, calls};

/// The pass. It needs the kernels that `partition` has numbered.
pub const PASS: Pass = Pass { name: "memory", doc: "gives each value a place in the arena, reusing space", run };

/// Every place begins at a multiple of this.
const ALIGN_BYTES: u64 = 64;

/// Why a value has no place, or a wrong one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// A value's size is no multiple of one symbol.
    #[error("@{function}: {op} gives {found}, expected constant dimensions after at most one symbol")]
    Size {
        /// The function.
        function: String,
        /// The op.
        op: Op,
        /// The type.
        found: String,
    },
    /// A value that needs a place has none.
    #[error("@{function}: a result of {op} has no place in the arena")]
    Missing {
        /// The function.
        function: String,
        /// The op.
        op: Op,
    },
    /// Two values live in one place at one time.
    #[error("@{function}: results of {first} and {second} lie in the same bytes at the same time")]
    Overlap {
        /// The function.
        function: String,
        /// The op that makes the first.
        first: Op,
        /// The op that makes the second.
        second: Op,
    },
}

/// A value, its size, and the points from which and until which it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Life {
    value: Value,
    unit: Option<Sym>,
    bytes: u64,
    first: usize,
    last: usize,
}

fn run(mut module: Module, _: &Target) -> Result<Module, Error> {
    for function in &mut module.functions {
        place(function)?;
    }
    Ok(module)
}

/// Gives each value of `function` its place.
fn place(function: &mut Function) -> Result<(), MemoryError> {
    let lives = lives(function)?;
    let buffers = buffers(function, &lives);
    let mut placed: Vec<(Buffer, u64)> = Vec::new();
    for buffer in buffers {
        let at_bytes = first_gap(&buffer, &placed);
        for life in &buffer.lives {
            let placement = Placement { unit: life.unit, at_bytes };
            function.graph[life.value.node].placement[life.value.result as usize] = Some(placement);
        }
        placed.push((buffer, at_bytes));
    }
    Ok(())
}

/// Bytes that a function's own values take.
pub fn frame(function: &Function) -> ArenaPlan {
    let mut plan = ArenaPlan::default();
    for node in function.graph.node_weights() {
        for (ty, placement) in node.types.iter().zip(&node.placement) {
            let (Some(tensor), Some(placement)) = (ty.as_tensor(), placement) else { continue };
            let Some((_, bytes)) = size(tensor) else { continue };
            let region = match placement.unit {
                Some(sym) => &mut plan.unit_bytes[sym.index()],
                None => &mut plan.fixed_bytes,
            };
            *region = (*region).max(placement.at_bytes + bytes);
        }
    }
    plan
}

/// Checks that every value has a place, and that no two that live at one time share a byte.
/// # Errors
/// [`MemoryError`]: the first value that is wrong.
pub fn check(function: &Function) -> Result<(), MemoryError> {
    let lives = lives(function)?;
    let op = |life: &Life| function.node(life.value.node).op;
    let name = || function.name.clone();
    for (i, a) in lives.iter().enumerate() {
        let Some(at) = placement(function, a) else {
            return Err(MemoryError::Missing { function: name(), op: op(a) });
        };
        for b in &lives[..i] {
            let Some(other) = placement(function, b) else { continue };
            let apart = at.at_bytes + a.bytes <= other.at_bytes || other.at_bytes + b.bytes <= at.at_bytes;
            let disjoint = at.unit != other.unit || apart || a.last < b.first || b.last < a.first;
            if !disjoint && !in_place(function, a, b) && !in_place(function, b, a) {
                return Err(MemoryError::Overlap { function: name(), first: op(b), second: op(a) });
            }
        }
    }
    Ok(())
}

fn placement(function: &Function, life: &Life) -> Option<Placement> {
    function.node(life.value.node).placement[life.value.result as usize]
}

/// What happens one after the other: calls of an entry function, kernels of another.
fn points(function: &Function) -> Vec<Vec<NodeId>> {
    if calls(function) {
        let nodes = function.order().into_iter().filter(|&id| function.node(id).op == Op::Call);
        return nodes.map(|id| vec![id]).collect();
    }
    kernels(function)
}

/// The values that need a place.
fn lives(function: &Function) -> Result<Vec<Life>, MemoryError> {
    let points = points(function);
    let point: HashMap<NodeId, usize> =
        (0..).zip(&points).flat_map(|(at, ids)| ids.iter().map(move |&id| (id, at))).collect();
    let entry = calls(function);
    let mut lives = Vec::new();
    for &node in points.iter().flatten() {
        for (result, ty) in (0..).zip(&function.node(node).types) {
            let value = Value { node, result };
            let returned = function.results.contains(&value);
            let Some(tensor) = ty.as_tensor() else { continue };
            if returned && !entry {
                continue;
            }
            let (unit, bytes) = size(tensor).ok_or_else(|| MemoryError::Size {
                function: function.name.clone(),
                op: function.node(node).op,
                found: ty.to_string(),
            })?;
            let last = if returned { points.len() } else { last_read(function, value, &point).max(point[&node]) };
            lives.push(Life { value, unit, bytes, first: point[&node], last });
        }
    }
    Ok(lives)
}

/// The last point that reads a value, also by way of a bundle.
fn last_read(function: &Function, value: Value, point: &HashMap<NodeId, usize>) -> usize {
    let readers = function.users(value.node).into_iter().filter(|(_, used)| used.result == value.result);
    let at = |(user, _): (NodeId, _)| {
        point.get(&user).copied().unwrap_or_else(|| last_read(function, Value { node: user, result: 0 }, point))
    };
    readers.map(at).max().unwrap_or(0)
}

/// The symbol that a tensor's size is a multiple of, and its bytes a unit.
fn size(tensor: &TensorType) -> Option<(Option<Sym>, u64)> {
    let dims = &tensor.shape.0;
    let (unit, inner) = match dims.first() {
        Some(Dim::Sym(sym)) => (Some(*sym), &dims[1..]),
        _ => (None, &dims[..]),
    };
    let inner: Vec<u64> = inner.iter().map(|d| d.as_const()).collect::<Option<_>>()?;
    Some((unit, (padded_elems(&inner) * 4).next_multiple_of(ALIGN_BYTES)))
}

/// True if `new` may be written over `old`: an elementwise op reads each element of `old` just where it writes `new`, and
/// nothing else reads `old` then or later.
fn in_place(function: &Function, old: &Life, new: &Life) -> bool {
    let node = function.node(new.value.node);
    let readers: Vec<NodeId> = function.users(old.value.node).iter().map(|(user, _)| *user).collect();
    let at_once = readers.iter().filter(|&&user| function.node(user).kernel == node.kernel);
    node.op.def().class == Class::Elementwise
        && function.ty(old.value) == function.ty(new.value)
        && old.last == new.first
        && old.first < new.first
        && at_once.clone().count() > 0
        && at_once.copied().all(|user| user == new.value.node)
}

/// Values that are written over one another, as one stretch of space.
#[derive(Debug)]
struct Buffer {
    lives: Vec<Life>,
}

impl Buffer {
    fn meets(&self, other: &Self) -> bool {
        let (a, b) = (self.span(), other.span());
        self.unit() == other.unit() && a.0 <= b.1 && b.0 <= a.1
    }

    fn span(&self) -> (usize, usize) {
        let first = self.lives.iter().map(|l| l.first).min().unwrap_or(0);
        (first, self.lives.iter().map(|l| l.last).max().unwrap_or(0))
    }

    fn unit(&self) -> Option<Sym> {
        self.lives[0].unit
    }

    fn bytes(&self) -> u64 {
        self.lives[0].bytes
    }
}

/// The buffers of a function, large ones first: they leave the gaps that small ones fill.
fn buffers(function: &Function, lives: &[Life]) -> Vec<Buffer> {
    let mut buffers: Vec<Buffer> = Vec::new();
    for &life in lives {
        let over = buffers.iter_mut().find(|b| in_place(function, &b.lives[b.lives.len() - 1], &life));
        match over {
            Some(buffer) => buffer.lives.push(life),
            None => buffers.push(Buffer { lives: vec![life] }),
        }
    }
    buffers.sort_by_key(|b| (std::cmp::Reverse(b.bytes()), b.span()));
    buffers
}

/// The smallest gap that holds `buffer` among the buffers that live while it does; the end if there is none.
fn first_gap(buffer: &Buffer, placed: &[(Buffer, u64)]) -> u64 {
    let taken: BTreeMap<u64, u64> =
        placed.iter().filter(|(other, _)| other.meets(buffer)).fold(BTreeMap::new(), |mut taken, (other, at)| {
            let end = taken.entry(*at).or_insert(0);
            *end = (*end).max(at + other.bytes());
            taken
        });
    let mut end = 0;
    let mut best: Option<(u64, u64)> = None;
    for (at, until) in taken {
        let gap = at.saturating_sub(end);
        if gap >= buffer.bytes() && best.is_none_or(|(smallest, _)| gap < smallest) {
            best = Some((gap, end));
        }
        end = end.max(until);
    }
    best.map_or(end, |(_, at)| at)
}
