//! What holds between kernels, schedules and tables.

use std::collections::HashSet;

use super::{Broken, KernelError, error, verify_kernel};
use crate::graph::Placement;
use crate::schedule::{Arg, KernelModule, Launch, Program};
use crate::shape::Sym;

/// Checks every kernel, and that schedules and tables fit together.
/// # Errors
/// Every invariant that is broken.
pub fn verify(module: &KernelModule) -> Result<(), Vec<KernelError>> {
    let mut errors: Vec<KernelError> = module.kernels.iter().filter_map(|k| verify_kernel(k).err()).flatten().collect();
    let mut names = HashSet::new();
    for kernel in &module.kernels {
        if !names.insert(&kernel.name) {
            errors.push(error(&kernel.name, "module", Broken::Name(kernel.name.clone())));
        }
    }
    for (i, &bytes) in module.arena.unit_bytes.iter().enumerate() {
        if !bytes.is_multiple_of(64) {
            let broken = Broken::Constant { what: "bytes a unit", found: bytes as i64, expected: "a multiple of 64" };
            errors.push(error("arena", Sym::ALL[i].name(), broken));
        }
    }
    for program in &module.programs {
        verify_program(module, program, &mut errors);
    }
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

fn verify_program(module: &KernelModule, program: &Program, errors: &mut Vec<KernelError>) {
    for (i, launch) in program.launches.iter().enumerate() {
        let place = format!("launch {i} of program `{}` ({})", program.name, launch.label);
        let name = module.kernels.get(launch.kernel as usize).map_or("?", |k| &k.name);
        errors.extend(launch_problems(module, launch).into_iter().map(|b| error(name, &place, b)));
    }
    for out in &program.outputs {
        let row_bytes = if out.at.unit == Some(out.rows) { out.stride * 4 } else { 1 };
        let place = format!("output `{}`", out.name);
        if let Some(b) = outside(module, out.at, row_bytes) {
            errors.push(error(&program.name, &place, b));
        }
        if out.width > out.stride {
            let broken = Broken::Constant { what: "width", found: out.width as i64, expected: "at most the stride" };
            errors.push(error(&program.name, &place, broken));
        }
    }
}

fn launch_problems(module: &KernelModule, launch: &Launch) -> Vec<Broken> {
    let Some(kernel) = module.kernels.get(launch.kernel as usize) else {
        let len = module.kernels.len() as u64;
        return vec![Broken::Missing { what: "kernel", index: launch.kernel.into(), len }];
    };
    let mut problems = Vec::new();
    if launch.args.len() != kernel.params.len() {
        let (found, expected) = (launch.args.len(), kernel.params.len());
        problems.push(Broken::Count { of: "arguments", found, expected });
    }
    for (arg, param) in launch.args.iter().zip(&kernel.params) {
        let table = |what, index: u32, len: usize| {
            (index as usize >= len).then_some(Broken::Missing { what, index: index.into(), len: len as u64 })
        };
        problems.extend(match *arg {
            Arg::Arena(at) => outside(module, at, 1),
            Arg::Weight(w) => table("weight", w, module.weights.len()),
            Arg::State(s) => table("state", s, module.states.len()),
            Arg::Input(_) => None,
        });
        if param.written && matches!(arg, Arg::Input(_) | Arg::Weight(_)) {
            problems.push(Broken::Constness(param.name.clone()));
        }
    }
    problems
}

/// A problem if `bytes` at a placement are not inside the plan, or not aligned to an element.
fn outside(module: &KernelModule, at: Placement, bytes: u64) -> Option<Broken> {
    let plan = at.unit.map_or(module.arena.fixed_bytes, |s| module.arena.unit_bytes[s.index()]);
    let end = at.at_bytes.saturating_add(bytes);
    if !at.at_bytes.is_multiple_of(4) {
        return Some(Broken::Constant { what: "placement", found: at.at_bytes as i64, expected: "a multiple of 4 B" });
    }
    (end > plan).then_some(Broken::Placement { at, end, plan })
}
