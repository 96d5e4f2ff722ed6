//! What the passes make of each kind of layer: the kernels, by name.

mod layers;

use layers::{BIG, SMALL, Sizes};
use nextc_ir::Target;
use nextc_ir::graph::{Function, Module};
use nextc_passes::{memory, partition, run_all};

fn target() -> Target {
    Target::cpu("x86-64-v3", &["avx2", "fma"], 256)
}

fn kernels(function: &Function) -> Vec<String> {
    let name =
        |kernel: &Vec<_>| kernel.iter().map(|&id| function.node(id).op.to_string()).collect::<Vec<_>>().join("+");
    partition::kernels(function).iter().map(name).collect()
}

fn check(build: impl Fn(&Sizes) -> Function, expected: &[&str]) {
    for sizes in [BIG, SMALL] {
        let module = Module { functions: vec![build(&sizes)], ..Module::default() };
        let module = run_all(module, &target()).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(kernels(&module.functions[0]), expected);
        memory::check(&module.functions[0]).unwrap();
    }
}

#[test]
fn a_delta_mixer_is_three_kernels() {
    check(|s| layers::delta("delta.0", s), &["norm_linears", "gated_delta_net", "linear_residual"]);
}

#[test]
fn an_attention_mixer_is_four_kernels() {
    check(
        |s| layers::attention("attention.3", s),
        &["norm_linears", "norm_rope_append", "gated_attention", "linear_residual"],
    );
}

#[test]
fn experts_are_three_kernels_with_either_kind_of_weights() {
    for renormalise in [true, false] {
        check(|s| layers::moe("moe.0", s, renormalise), &["norm_router", "experts_gate_up", "experts_down"]);
    }
}

#[test]
fn a_dense_ffn_is_two_kernels() {
    check(|s| layers::mlp("mlp.0", s), &["norm_swiglu", "linear_residual"]);
}

#[test]
fn the_ends_of_the_model_stay_plain() {
    check(|s| layers::embed("embed", s), &["embed", "sum_squares"]);
    check(|s| layers::head("head", s), &["rms_norm_ssq", "gather_rows", "linear"]);
    check(
        |s| layers::fuse_mtp("fuse.mtp", s),
        &["rms_norm_plus_one", "embed", "rms_norm_plus_one", "linear", "linear_residual"],
    );
}

#[test]
fn a_whole_model_has_one_function_a_kind() {
    let module = run_all(layers::model(&BIG), &target()).unwrap_or_else(|error| panic!("{error}"));
    let names: Vec<&str> = module.functions.iter().map(|f| f.name.as_str()).collect();
    assert_eq!(names, ["embed", "delta", "moe", "attention", "head", "step", "fuse", "draft"]);
    for function in &module.functions {
        memory::check(function).unwrap_or_else(|error| panic!("{error}"));
    }
    let step = module.function("step").unwrap();
    let calls: Vec<&str> = step.graph.node_weights().filter_map(|n| n.attrs.str("function")).collect();
    assert_eq!(calls.len(), 1 + 2 * 48 + 1);
    assert_eq!(calls[..4], ["embed", "delta", "moe", "delta"]);
    // two pairs of residual stream and sums of squares take turns
    let (stream, sums) = (4 * 2048 * 2, 4 * 128 * 2);
    assert_eq!(memory::frame(step).unit_bytes[0], stream + sums);
}
