//! The passes one by one, on small functions.

mod layers;

use layers::{Layer, SMALL, rows};
use nextc_ir::graph::{Function, Module, Value};
use nextc_ir::types::StateKind;
use nextc_ir::{Attrs, Format, Layout, Op, Target, Type, print};
use nextc_passes::{Error, memory, partition, rewrite, run_all, run_until};

fn target() -> Target {
    Target::cpu("x86-64-v3", &[], 256)
}

fn module(functions: Vec<Function>) -> Module {
    Module { functions, ..Module::default() }
}

fn until(functions: Vec<Function>, pass: &str) -> Vec<Function> {
    run_until(module(functions), &target(), pass).unwrap_or_else(|error| panic!("{error}")).functions
}

fn ops(function: &Function) -> Vec<&'static str> {
    let order = function.order().into_iter().map(|id| function.node(id).op);
    order.filter(|op| !matches!(op, Op::Param)).map(|op| op.def().name).collect()
}

fn kernels(function: &Function) -> Vec<Vec<&'static str>> {
    let names = |kernel: &Vec<_>| kernel.iter().map(|&id| function.node(id).op.def().name).collect();
    partition::kernels(function).iter().map(names).collect()
}

#[test]
fn a_pass_is_found_by_its_name() {
    let error = run_until(module(Vec::new()), &target(), "inline").unwrap_err();
    assert_eq!(error, Error::NoPass("inline".into()));
    assert_eq!(
        error.to_string(),
        "there is no pass `inline`, expected one of `specialise`, `join`, `rewrite`, `layout`, `partition`, `memory`"
    );
}

#[test]
fn layers_of_one_kind_are_one_function_and_others_are_numbered() {
    let other = layers::Sizes { mlp_width: 30, ..SMALL };
    let functions = vec![
        layers::mlp("mlp.0", &SMALL),
        layers::mlp("mlp.1", &SMALL),
        layers::mlp("mlp.2", &other),
        layers::moe("moe.3", &SMALL, true),
        layers::moe("moe.4", &SMALL, false),
        layers::mlp("mlp.mtp", &other),
    ];
    let names: Vec<String> = until(functions, "specialise").into_iter().map(|f| f.name).collect();
    assert_eq!(names, ["mlp", "mlp.1", "moe", "moe.1"]);
}

#[test]
fn calls_follow_the_functions_that_were_merged() {
    let module = run_until(layers::model(&SMALL), &target(), "specialise").unwrap();
    let step = module.function("step").unwrap();
    let calls: Vec<&str> = step.order().into_iter().filter_map(|id| step.graph[id].attrs.str("function")).collect();
    let mixers = ["delta", "delta", "delta", "attention"];
    let expected: Vec<&str> = mixers.iter().flat_map(|mixer| [*mixer, "moe"]).collect();
    assert_eq!(calls, [vec!["embed"], expected, vec!["head"]].concat());
}

#[test]
fn a_mixers_projections_are_joined_and_the_routers_are_not() {
    let functions = until(vec![layers::attention("attention", &SMALL), layers::moe("moe", &SMALL, true)], "join");
    let count = |function: &Function, op: &str| ops(function).iter().filter(|name| **name == op).count();
    assert_eq!((count(&functions[0], "linears"), count(&functions[0], "linear")), (1, 1));
    assert_eq!((count(&functions[1], "linears"), count(&functions[1], "linear")), (0, 5));
}

/// A convolution of which `silu` and, if `raw`, the plain output are used.
fn conv(raw: bool) -> Function {
    let mut f = Layer::new("conv");
    let x = f.param("x", rows(&[2, 8]));
    let w = f.param("w", Type::weight(&[2, 8, 4], Format::F32));
    let state = f.param("conv", Type::state(StateKind::Conv, &[2, 8, 3]));
    let seqs = f.param("seqs", Type::Sequences);
    let out = f.n(Op::Conv1d, &[x, w, state, seqs], Attrs::none());
    let silu = f.op(Op::Silu, &[out[0]]);
    let results = if raw { vec![silu, out[0], out[1]] } else { vec![silu, out[1]] };
    f.finish(results)
}

#[test]
fn a_state_is_never_written_twice() {
    assert_eq!(ops(&until(vec![conv(false)], "rewrite")[0]), ["conv1d_silu"]);
    assert_eq!(ops(&until(vec![conv(true)], "rewrite")[0]), ["conv1d", "silu"]);
}

#[test]
fn rewriting_is_saturated_cheaper_and_the_same_every_time() {
    let run = || {
        let module = run_until(layers::model(&SMALL), &target(), "join").unwrap();
        rewrite::run_traced(module, &target()).unwrap()
    };
    let (first, trace) = run();
    for entry in &trace.functions {
        assert_eq!(entry.stop, "saturated", "@{}", entry.function);
        assert!(entry.after_ns <= entry.before_ns, "@{}", entry.function);
    }
    assert!(trace.to_string().contains("x gated-delta-net"), "{trace}");
    let (second, again) = run();
    assert_eq!(print::module(&first), print::module(&second));
    assert_eq!(trace, again);
}

#[test]
fn every_rule_is_shown_with_its_terms_spelled_out() {
    let rules = nextc_passes::rules();
    assert!(rules.iter().all(|rule| !rule.text.contains('%')), "{rules:?}");
    let find = |name| rules.iter().find(|rule| rule.name == name).unwrap();
    assert_eq!(find("silu").text, "(mul ?a (sigmoid ?a)) => (silu ?a)");
    assert!(find("linear-residual").text.ends_with("if rows(?residual)"));
    assert!(find("norm-from-sums").reorders.is_some());
}

#[test]
fn matrices_get_tiles_and_the_rest_is_flat() {
    let module = run_until(layers::model(&SMALL), &target(), "layout").unwrap();
    let delta = module.function("delta").unwrap();
    for &param in &delta.params {
        let node = delta.node(param);
        let Some(weight) = node.types[0].as_weight() else { continue };
        let name = node.name.as_deref().unwrap();
        let flat = ["gain", "w_conv_q", "w_conv_k", "w_conv_v", "a_log", "dt_bias", "norm"].contains(&name);
        assert_eq!(weight.layout, Some(if flat { Layout::Flat } else { Layout::Tile16 }), "{name}");
    }
    // the function alone, without a caller, says the same
    let alone = until(vec![layers::delta("delta", &SMALL)], "layout");
    let types = |f: &Function| f.params.iter().map(|&p| f.node(p).types[0].clone()).collect::<Vec<_>>();
    assert_eq!(types(&alone[0]), types(delta));
}

/// `a` feeds `c` both at once and by way of a norm.
fn around_a_norm() -> Function {
    let mut f = Layer::new("around");
    let x = f.param("x", rows(&[16]));
    let a = f.op(Op::Sigmoid, &[x]);
    let norm = f.n(Op::L2Norm, &[a], Attrs::none().with("eps", 1e-6))[0];
    let b = f.op(Op::Neg, &[norm]);
    let c = f.op(Op::Add, &[a, b]);
    f.finish(vec![c])
}

#[test]
fn elementwise_neighbours_share_a_kernel_unless_a_value_leaves_and_returns() {
    let function = until(vec![around_a_norm()], "partition").remove(0);
    assert_eq!(kernels(&function), [vec!["sigmoid"], vec!["l2_norm"], vec!["neg", "add"]]);
}

/// A factor a row, and what it is multiplied with.
fn gated() -> Function {
    let mut f = Layer::new("gated");
    let gate = f.param("gate", rows(&[1]));
    let x = f.param("x", rows(&[16]));
    let gate = f.op(Op::Sigmoid, &[gate]);
    let x = f.op(Op::Neg, &[x]);
    let out = f.op(Op::Mul, &[gate, x]);
    f.finish(vec![out])
}

#[test]
fn elementwise_ops_of_other_shapes_do_not_share_a_kernel() {
    let function = until(vec![gated()], "partition").remove(0);
    assert_eq!(kernels(&function), [vec!["sigmoid"], vec!["neg", "mul"]]);
}

/// A chain of matmuls with `count` elementwise ops of one width between them.
fn chain(count: usize) -> Function {
    let mut f = Layer::new("chain");
    let mut x = f.param("x", rows(&[20]));
    let w = f.param("w", Type::weight(&[20, 20], Format::F32));
    for _ in 0..count {
        x = f.op(Op::Linear, &[x, w]);
        x = f.op(Op::Sigmoid, &[x]);
    }
    let out = f.op(Op::Linear, &[x, w]);
    f.finish(vec![out])
}

#[test]
fn a_chain_lives_in_two_places_and_elementwise_ops_write_in_place() {
    let function = run_all(module(vec![chain(5)]), &target()).unwrap().functions.remove(0);
    let padded = 32 * 4;
    assert_eq!(memory::frame(&function).unit_bytes[0], 2 * padded);
    assert_eq!(memory::frame(&function).fixed_bytes, 0);
    for id in function.graph.node_indices().filter(|&id| function.node(id).op == Op::Sigmoid) {
        let operand = function.operands(id)[0];
        assert_eq!(function.node(id).placement[0], function.node(operand.node).placement[0]);
    }
    let out: Value = function.results[0];
    assert_eq!(function.node(out.node).placement, [None]);
}
