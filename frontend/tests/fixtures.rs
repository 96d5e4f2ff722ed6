//! Every fixture of the repository loads, or says why it cannot.

use std::path::{Path, PathBuf};
use std::time::Instant;

use nextc_frontend::{Error, Model, Options, load};
use nextc_ir::graph::{Origin, RowRun};
use nextc_ir::verify::verify;
use nextc_ir::{Op, WeightSource, print};

fn repository(path: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join(path)
}

fn load_fixture(path: &str) -> Model {
    load(&repository(path), &Options::default()).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn runs<'a>(model: &'a Model, weight: &str) -> &'a [RowRun] {
    match &model.module.weights[weight].origin {
        Origin::Rows(runs) => runs,
        Origin::Values(_) => panic!("`{weight}` has no rows"),
    }
}

const LOADING: &[&str] = &[
    "tests/oracle/tiny",
    "tests/oracle/odd",
    "tests/oracle/dense-mix",
    "tests/oracle/yarn",
    "tests/oracle/long",
    "tests/oracle/fp8",
    "tests/oracle/int4",
    "tests/oracle/gptq-int4",
    "examples/demo-model",
];

#[test]
fn fixtures_load_without_surprises() {
    for path in LOADING {
        let model = load_fixture(path);
        let unexpected: Vec<_> = model.warnings.iter().filter(|w| !w.contains("tokenizer.json")).collect();
        assert!(unexpected.is_empty(), "{path}: {unexpected:?}");
        verify(&model.module).unwrap_or_else(|errors| panic!("{path}: {errors:?}"));
        let info = &model.module.info;
        assert!(info.has_weights && info.mtp, "{path}");
        assert_eq!(info.num_layers, model.config.layers.len() as u64);
        assert!(model.module.function("step").is_some() && model.module.function("draft").is_some(), "{path}");
    }
}

#[test]
fn entry_functions_only_call() {
    use Op::{Call, Param, Sequences, Weight};
    for path in LOADING {
        let model = load_fixture(path);
        for name in ["step", "draft", "follow", "sample", "verify"] {
            let entry = model.module.function(name).expect(name);
            assert!(entry.graph.node_weights().all(|n| [Call, Param, Sequences, Weight].contains(&n.op)), "{path}");
        }
        for f in &model.module.functions {
            assert!(
                f.graph.node_weights().all(|n| n.types.iter().all(|t| !t.to_string().contains("x 0"))),
                "{}",
                f.name
            );
        }
    }
}

#[test]
fn the_step_takes_and_returns_each_state() {
    let model = load_fixture("tests/oracle/tiny");
    let step = model.module.function("step").expect("step");
    let params: Vec<&str> = step.params.iter().filter_map(|p| step.node(*p).name.as_deref()).collect();
    let inputs = ["tokens", "positions", "cu_seqlens", "slot", "replay", "tentative", "page_table", "logit_rows"];
    let count = inputs.len();
    assert_eq!(params[..count], inputs);
    assert_eq!(params[count..count + 4], ["layers.0.conv_q", "layers.0.conv_k", "layers.0.conv_v", "layers.0.delta"]);
    assert_eq!(params[count + 12..], ["layers.3.kv"]);
    assert_eq!(step.results.len(), 3 + params.len() - count);
    for (param, result) in step.params[count..].iter().zip(&step.results[3..]) {
        assert_eq!(step.node(*param).types[0], *step.ty(*result));
    }
    let draft = model.module.function("draft").expect("draft");
    let params: Vec<&str> = draft.params.iter().filter_map(|p| draft.node(*p).name.as_deref()).collect();
    assert_eq!(params, [&inputs[..], &["hidden", "mtp.kv"]].concat());
    assert_eq!(draft.results.len(), 4);
}

/// The parts of each fused tensor take every row of it exactly once.
#[test]
fn row_maps_are_permutations() {
    for path in LOADING {
        let model = load_fixture(path);
        let source = model.source.as_ref().expect("the fixture has weights");
        let mut rows: std::collections::BTreeMap<(&str, u64), Vec<u64>> = Default::default();
        for name in model.module.weights.keys().filter(|n| *n != "inv_freq") {
            for run in runs(&model, name) {
                rows.entry((&run.tensor, run.column)).or_default().extend(run.first..run.first + run.rows);
            }
        }
        for ((tensor, _), mut taken) in rows {
            taken.sort_unstable();
            let all = source.tensor(tensor).expect("it is there").shape[0];
            assert!(taken.iter().copied().eq(0..all), "{path}: {tensor}");
        }
    }
}

/// The row map of the specification, component by component.
#[test]
fn qkvz_rows_follow_their_formula() {
    let model = load_fixture("tests/oracle/odd");
    let c = &model.config;
    let (dk, dv, r) = (c.head_k_dim, c.head_v_dim, c.num_v_heads / c.num_k_heads);
    let group = 2 * dk + 2 * r * dv;
    let flat = |weight: &str| -> Vec<u64> {
        runs(&model, weight).iter().flat_map(|run| run.first..run.first + run.rows).collect()
    };
    let map = |heads: u64, width: u64, row: &dyn Fn(u64, u64) -> u64| -> Vec<u64> {
        (0..heads).flat_map(|h| (0..width).map(move |i| (h, i))).map(|(h, i)| row(h, i)).collect()
    };
    assert_eq!(flat("layers.0.w_q"), map(c.num_k_heads, dk, &|h, i| h * group + i));
    assert_eq!(flat("layers.0.w_k"), map(c.num_k_heads, dk, &|h, i| h * group + dk + i));
    let v = |h: u64, i: u64| h / r * group + 2 * dk + h % r * dv + i;
    assert_eq!(flat("layers.0.w_v"), map(c.num_v_heads, dv, &v));
    assert_eq!(flat("layers.0.w_z"), map(c.num_v_heads, dv, &|h, i| v(h, i) + r * dv));
    assert_eq!(flat("layers.0.w_b"), map(c.num_v_heads, 1, &|h, _| h / r * 2 * r + h % r));
    assert_eq!(flat("layers.0.w_a"), map(c.num_v_heads, 1, &|h, _| h / r * 2 * r + r + h % r));
    assert_eq!(flat("layers.3.w_gate"), map(c.num_heads, c.head_dim, &|h, i| (2 * h + 1) * c.head_dim + i));
}

#[test]
fn quantised_fixtures_keep_their_formats() {
    for (path, format) in [("fp8", "fp8<128x128>"), ("int4", "q4<g32,bf16>"), ("gptq-int4", "q4<g32>")] {
        let model = load_fixture(&format!("tests/oracle/{path}"));
        let of = |name: &str| model.module.weights[name].format.to_string();
        for name in ["layers.0.w_z", "layers.3.w_gate", "layers.1.mlp.experts_down", "layers.2.mlp.shared_up"] {
            assert_eq!(of(name), format, "{path}: {name}");
        }
        for name in ["embed", "head", "layers.0.w_a", "layers.0.mlp.router", "mtp.w_e"] {
            assert_eq!(of(name), "bf16", "{path}: {name}");
        }
    }
}

#[test]
fn tied_dense_and_moe_layers_are_told_apart() {
    let model = load_fixture("tests/oracle/dense-mix");
    assert!(!model.module.weights.contains_key("head"));
    let names: Vec<&str> = model.module.functions.iter().map(|f| f.name.as_str()).collect();
    let ffns: Vec<&str> = names.iter().copied().filter(|n| n.starts_with("mlp.") || n.starts_with("moe.")).collect();
    assert_eq!(ffns, ["mlp.0", "mlp.1", "mlp.2", "moe.3", "mlp.4", "moe.5", "mlp.6", "moe.7", "mlp.mtp"]);
    assert_eq!(model.config.rope.rotary_dim, 16);
}

#[test]
fn a_config_alone_has_no_weights_and_no_mtp() {
    let model = load_fixture("tests/oracle/tiny/config.json");
    assert!(model.source.is_none() && model.assets.is_empty() && !model.module.info.mtp);
    assert_eq!(model.module.info.name, "tiny");
    assert_eq!(model.module.info.eos_token_ids, [1]);
    assert!(load_fixture("examples/demo-model/config.json").module.info.mtp);
}

#[test]
fn the_80b_model_is_built_in_a_moment() {
    let begun = Instant::now();
    let model = load_fixture("examples/qwen3-next-80b-a3b/config.json");
    assert!(begun.elapsed().as_secs() < 5, "{:?}", begun.elapsed());
    assert!(model.warnings.is_empty(), "{:?}", model.warnings);
    verify(&model.module).expect("the module is sound");
    assert_eq!(model.module.functions.iter().filter(|f| f.name.starts_with("delta.")).count(), 36);
    let elems = |w: &nextc_ir::graph::WeightDecl| w.shape.iter().product::<u64>();
    let parameters: u64 = model.module.weights.iter().filter(|(n, _)| *n != "inv_freq").map(|(_, w)| elems(w)).sum();
    assert_eq!(parameters, 79_674_391_296);
    let names = model.module.weights.keys().filter(|n| *n != "inv_freq");
    let tensors: std::collections::HashSet<&str> =
        names.flat_map(|n| runs(&model, n)).map(|run| run.tensor.as_str()).collect();
    assert_eq!(tensors.len(), 74_391);
}

#[test]
fn max_context_is_checked_against_the_config() {
    let path = repository("tests/oracle/tiny");
    let error = load(&path, &Options { max_context: Some(5000), ..Options::default() }).expect_err("too long");
    assert!(matches!(error, Error::MaxContext { asked: 5000, limit: 4096, .. }));
    assert_eq!(
        error.to_string(),
        "`--max-context` is 5000 tokens, expected at most 4096, as far as config.json reaches; `--rope-scaling` can reach further"
    );
    assert_eq!(
        load(&path, &Options { max_context: Some(128), ..Options::default() })
            .expect("it fits")
            .module
            .info
            .max_context,
        128
    );
}

#[test]
fn a_rope_scaling_that_is_asked_for_makes_the_same_graph_as_one_in_the_config() {
    let path = repository("tests/oracle/yarn/config.json");
    let whole: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).expect("readable")).expect("JSON");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let dir = dir.path().join("yarn");
    std::fs::create_dir(&dir).expect("an empty folder");
    let scaled = |original: u64, max_context: Option<u64>, option: &str| {
        let mut config = whole.clone();
        config.as_object_mut().expect("an object").remove("rope_scaling");
        config["max_position_embeddings"] = original.into();
        std::fs::write(dir.join("config.json"), config.to_string()).expect("written");
        let rope_scaling = Some(option.parse().unwrap_or_else(|e| panic!("{option}: {e}")));
        load(&dir.join("config.json"), &Options { max_context, rope_scaling, ..Options::default() })
            .expect(option)
            .module
    };
    let config = print::module(&load_fixture("tests/oracle/yarn/config.json").module);
    assert_eq!(print::module(&scaled(64, None, "yarn,factor=4")), config);
    let option = "yarn,factor=4.0,original_max_position_embeddings=64";
    assert_eq!(print::module(&scaled(256, None, option)), config);
    assert_eq!(scaled(64, Some(100), "yarn,factor=4").info.max_context, 100);
    assert_ne!(print::module(&scaled(64, None, "default")), config);
    // in place of the config's own: what stands beside the factor is not taken over, but for the original context
    let options = |text: &str| Options { rope_scaling: Some(text.parse().expect(text)), ..Options::default() };
    let asked = |text: &str| load(&path, &options(text)).expect(text).module;
    assert_eq!(print::module(&asked("yarn,factor=4")), config);
    assert_eq!(asked("yarn,factor=8").info.max_context, 512);
    assert_eq!(asked("default").info.max_context, 256);
}

/// The reader agrees with another implementation of the format, on every tensor and at any offset.
#[test]
fn rows_are_those_of_the_safetensors_crate() {
    let model = load_fixture("tests/oracle/tiny");
    let source = model.source.as_ref().expect("the fixture has weights");
    let bytes = std::fs::read(repository("tests/oracle/tiny/model.safetensors")).expect("readable");
    let other = safetensors::SafeTensors::deserialize(&bytes).expect("valid");
    for (name, view) in other.tensors() {
        let want: Vec<f32> =
            view.data().chunks(2).map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16)).collect();
        let shape = source.tensor(&name).expect("it is there").shape;
        let width = shape.get(1).copied().unwrap_or(1) as usize;
        for first in [0, shape[0] as usize / 2] {
            let mut got = vec![0.0; want.len() - first * width];
            source.read_rows(&name, first as u64, &mut got).expect("rows are there");
            assert_eq!(got, want[first * width..], "{name}");
        }
    }
    let mut out = [0.0; 64];
    assert!(source.read_rows("model.norm.weight", 1, &mut out).is_err());
    assert!(source.read_rows("none", 0, &mut out).is_err());
}
