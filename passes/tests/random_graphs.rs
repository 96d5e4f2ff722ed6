//! Random functions through the passes: they mean the same, and no value is written over while it is needed.

mod random;
mod samples;

use std::collections::HashMap;

use nextc_ir::Target;
use nextc_ir::eval::{Cx, WeightStore, evaluate};
use nextc_ir::graph::{Function, Module, NodeId, Value};
use nextc_ir::op::Class;
use nextc_ir::shape::padded_elems;
use nextc_passes::memory::{self, MemoryError};
use nextc_passes::{partition, run_all};
use samples::{PAGE_TOKENS, Rng, Step, difference};

fn target() -> Target {
    Target::cpu("x86-64-v3", &[], 256)
}

fn passed(function: &Function) -> Function {
    let module = Module { functions: vec![function.clone()], ..Module::default() };
    let mut module = run_all(module, &target()).unwrap_or_else(|error| panic!("{error}"));
    module.functions.remove(0)
}

#[test]
fn a_function_means_the_same_after_the_passes() {
    for seed in 0..150 {
        let mut rng = Rng(seed);
        let plain = random::function(14, &mut rng);
        let fused = passed(&plain);
        let step = Step::new(&mut rng);
        let args: Vec<_> = plain.params.iter().map(|&p| step.datum(&plain.node(p).types[0], false, &mut rng)).collect();
        let eval = |f: &Function| evaluate(f, args.clone(), &WeightStore::new(), &Cx::new(PAGE_TOKENS)).unwrap();
        for (a, b) in eval(&plain).iter().zip(&eval(&fused)) {
            let difference = difference(a, b);
            assert!(difference < 1e-9, "seed {seed}: {difference:e}\n{}", nextc_ir::print::function(&fused));
        }
    }
}

/// The arena as its units of 64 bytes, each with the value it holds, by the unit of the region.
type Arena = HashMap<(Option<nextc_ir::Sym>, u64), Value>;

fn blocks(f: &Function, v: Value) -> Vec<(Option<nextc_ir::Sym>, u64)> {
    let Some(place) = f.node(v.node).placement[v.result as usize] else { return Vec::new() };
    let shape = f.ty(v).shape().expect("it is a tensor");
    let bytes = padded_elems(&shape.inner().expect("inner dimensions are constant")) * 4;
    (place.at_bytes / 64..(place.at_bytes + bytes).div_ceil(64)).map(|b| (place.unit, b)).collect()
}

/// Runs the kernels on an arena that remembers whose bytes are where.
fn simulate(f: &Function) {
    let mut arena = Arena::new();
    for kernel in partition::kernels(f) {
        let outside = |v: &Value| !kernel.contains(&v.node);
        for v in kernel.iter().flat_map(|&id| f.operands(id)).filter(outside) {
            assert!(blocks(f, v).iter().all(|b| arena.get(b) == Some(&v)), "a value was written over");
        }
        let results = |&id: &NodeId| (0..f.node(id).types.len() as u32).map(move |result| Value { node: id, result });
        for v in kernel.iter().flat_map(results) {
            arena.extend(blocks(f, v).into_iter().map(|block| (block, v)));
        }
    }
}

#[test]
fn kernels_and_places_are_sound() {
    for seed in 0..150 {
        let f = passed(&random::function(30, &mut Rng(seed)));
        memory::check(&f).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        simulate(&f);
        let mut seen = Vec::new();
        for kernel in partition::kernels(&f) {
            let alone = |id: &NodeId| f.node(*id).op.def().class != Class::Elementwise;
            assert!(kernel.len() == 1 || !kernel.iter().any(alone), "seed {seed}: only elementwise ops share a kernel");
            seen.extend(kernel.iter().copied());
            for v in kernel.iter().flat_map(|&id| f.operands(id)) {
                let ready = seen.contains(&v.node) || f.node(v.node).op.def().class == Class::Structure;
                assert!(ready, "seed {seed}: a kernel runs before its operand");
            }
        }
    }
}

#[test]
fn the_checker_sees_values_that_lie_on_one_another() {
    let mut caught = 0;
    for seed in 0..50 {
        let mut f = passed(&random::function(30, &mut Rng(seed)));
        let nodes: Vec<NodeId> = f.graph.node_indices().collect();
        for id in nodes {
            f.graph[id].placement.iter_mut().flatten().for_each(|place| place.at_bytes = 0);
        }
        caught += usize::from(matches!(memory::check(&f), Err(MemoryError::Overlap { .. })));
    }
    assert!(caught > 40, "caught {caught} of 50");
}
