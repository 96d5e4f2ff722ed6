//! Layers and a whole step mean the same before and after the passes.

mod layers;
mod samples;

use layers::{SMALL, Sizes};
use nextc_ir::Target;
use nextc_ir::eval::{Cx, Datum, WeightStore, evaluate, run};
use nextc_ir::graph::{Function, Module};
use nextc_passes::run_all;
use samples::{PAGE_TOKENS, Rng, Step, difference};

const TOLERANCE: f64 = 1e-10;

fn fused(module: Module) -> Module {
    run_all(module, &Target::cpu("x86-64-v3", &[], 256)).unwrap_or_else(|error| panic!("{error}"))
}

fn args(function: &Function, step: &Step, rng: &mut Rng) -> Vec<Datum<f64>> {
    let param = |&p| {
        let node = function.node(p);
        match node.name.as_deref() {
            Some("positions") => Datum::Int(step.positions.clone()),
            Some("cu_seqlens") => Datum::Int(step.cu_seqlens.clone()),
            Some("slot") => Datum::Int(step.slot.clone()),
            Some("replay") => Datum::Int(step.replay.clone()),
            Some("tentative") => Datum::Int(step.tentative.clone()),
            Some("page_table") => Datum::Int(step.page_table.clone()),
            name => step.datum(&node.types[0], name == Some("ssq"), rng),
        }
    };
    function.params.iter().map(param).collect()
}

fn same(before: &[Datum<f64>], after: &[Datum<f64>]) {
    assert_eq!(before.len(), after.len());
    for (i, (a, b)) in before.iter().zip(after).enumerate() {
        let difference = difference(a, b);
        assert!(difference < TOLERANCE, "result {i} differs by {difference:e}");
    }
}

fn check(build: impl Fn(&Sizes) -> Function) {
    for seed in 0..8 {
        let mut rng = Rng(seed);
        let plain = build(&SMALL);
        let after = fused(Module { functions: vec![plain.clone()], ..Module::default() });
        let step = Step::new(&mut rng);
        let args = args(&plain, &step, &mut rng);
        let eval = |f: &Function| evaluate(f, args.clone(), &WeightStore::new(), &Cx::new(PAGE_TOKENS)).unwrap();
        same(&eval(&plain), &eval(&after.functions[0]));
    }
}

#[test]
fn each_kind_of_layer() {
    check(|s| layers::delta("delta.0", s));
    check(|s| layers::attention("attention.3", s));
    check(|s| layers::moe("moe.0", s, true));
    check(|s| layers::moe("moe.0", s, false));
    check(|s| layers::mlp("mlp.0", s));
    check(|s| layers::embed("embed", s));
    check(|s| layers::head("head", s));
    check(|s| layers::fuse_mtp("fuse.mtp", s));
}

#[test]
fn a_step_and_a_draft_of_a_whole_model() {
    let plain = layers::model(&SMALL);
    let after = fused(plain.clone());
    let mut rng = Rng(3);
    let step = Step::new(&mut rng);
    let mut weights = WeightStore::new();
    for (name, decl) in &plain.weights {
        weights.insert(name, step.datum(&decl.ty(), false, &mut rng));
    }
    for entry in ["step", "draft"] {
        let args = args(plain.function(entry).unwrap(), &step, &mut rng);
        let eval = |m: &Module| run(m, entry, args.clone(), &weights, &Cx::new(PAGE_TOKENS)).unwrap();
        same(&eval(&plain), &eval(&after));
    }
}
