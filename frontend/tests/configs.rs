//! What `config.json` may say, and what is said about one that may not.

use nextc_frontend::config::{Mixer, parse};
use nextc_frontend::{ModelConfig, RopeScaling};
use serde_json::{Value, json};

fn tiny() -> Value {
    json!({
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "torch_dtype": "bfloat16",
        "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4, "full_attention_interval": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
        "partial_rotary_factor": 0.25, "rope_theta": 10000000, "max_position_embeddings": 4096,
    })
}

/// `tiny` with the keys of `changes` replaced.
fn changed(changes: &Value) -> Value {
    let mut config = tiny();
    let object = config.as_object_mut().expect("an object");
    object.extend(changes.as_object().expect("an object").clone());
    config
}

fn parse_value(config: &Value) -> Result<(ModelConfig, Vec<String>), String> {
    parse("config.json", config.to_string().as_bytes()).map_err(|e| e.to_string())
}

fn accept(changes: Value) -> ModelConfig {
    let (config, warnings) = parse_value(&changed(&changes)).unwrap_or_else(|e| panic!("{changes}: {e}"));
    assert!(warnings.is_empty(), "{warnings:?}");
    config
}

/// Each line of the error is `config.json: ` and then the line expected.
fn refuse(changes: Value, expected: &[&str]) {
    let error = parse_value(&changed(&changes)).expect_err(&changes.to_string());
    let lines: Vec<&str> = error.lines().map(|l| l.strip_prefix("config.json: ").unwrap_or(l)).collect();
    assert_eq!(lines, expected, "{changes}");
}

#[test]
fn sizes_out_of_range_are_refused() {
    refuse(json!({"num_attention_heads": 0}), &["`num_attention_heads` is 0, expected an integer from 1 to 1024"]);
    refuse(json!({"hidden_size": 64.5}), &["`hidden_size` is 64.5, expected an integer from 1 to 1048576"]);
    refuse(json!({"hidden_size": 64.0}), &["`hidden_size` is 64.0, expected an integer from 1 to 1048576"]);
    refuse(json!({"hidden_size": "64"}), &["`hidden_size` is \"64\", expected an integer from 1 to 1048576"]);
    refuse(json!({"hidden_size": null}), &["`hidden_size` is null, expected an integer from 1 to 1048576"]);
    refuse(json!({"hidden_size": -1}), &["`hidden_size` is -1, expected an integer from 1 to 1048576"]);
    refuse(
        json!({"num_hidden_layers": 1u64 << 40}),
        &["`num_hidden_layers` is 1099511627776, expected an integer from 1 to 512"],
    );
    refuse(json!({"linear_conv_kernel_dim": 1}), &["`linear_conv_kernel_dim` is 1, expected an integer from 2 to 16"]);
    refuse(json!({"rms_norm_eps": -1e-6}), &["`rms_norm_eps` is -1e-6, expected a number above 0 and at most 1"]);
    refuse(json!({"norm_topk_prob": 1}), &["`norm_topk_prob` is 1, expected true or false"]);
    refuse(
        json!({"moe_intermediate_size": 1 << 20, "hidden_size": 1 << 20}),
        &[
            "`hidden_size` is 1048576, expected sizes that give at most 17592186044416 parameters, these give 105555997754880",
        ],
    );
}

#[test]
fn all_problems_are_reported_at_once() {
    refuse(
        json!({"head_dim": 1, "vocab_size": 0, "attention_bias": true}),
        &[
            "`head_dim` is 1, expected an integer from 2 to 4096",
            "`vocab_size` is 0, expected an integer from 1 to 1048576",
            "`attention_bias` is true, expected false (biases on the attention projections are not supported)",
        ],
    );
}

#[test]
fn sizes_that_disagree_are_refused() {
    refuse(
        json!({"num_key_value_heads": 3}),
        &["`num_key_value_heads` is 3, expected a divisor of `num_attention_heads` (4)"],
    );
    refuse(
        json!({"linear_num_key_heads": 3}),
        &["`linear_num_key_heads` is 3, expected a divisor of `linear_num_value_heads` (4)"],
    );
    refuse(json!({"num_experts_per_tok": 9}), &["`num_experts_per_tok` is 9, expected at most `num_experts` (8)"]);
    refuse(
        json!({"num_hidden_layers": 400, "num_experts": 4096}),
        &["`num_experts` is 4096, expected at most 262144 over all 400 layers together"],
    );
    refuse(
        json!({"mlp_only_layers": [4]}),
        &["`mlp_only_layers` is [4], expected a list of layer indices below `num_hidden_layers` (4)"],
    );
    refuse(json!({"dtype": "float16"}), &["`torch_dtype` is bf16, expected f16 as in `dtype`"]);
    refuse(
        json!({"num_nextn_predict_layers": 1, "mtp_num_hidden_layers": 0}),
        &["`mtp_num_hidden_layers` is 0, expected 1 as `num_nextn_predict_layers`"],
    );
    refuse(
        json!({"partial_rotary_factor": 0.1}),
        &["`partial_rotary_factor` is 0.1, expected a share of `head_dim` (32) that is even and not 0"],
    );
}

#[test]
fn layer_types_are_checked() {
    let [linear, full] = ["linear_attention", "full_attention"];
    refuse(
        json!({"layer_types": [linear, linear, full]}),
        &["`layer_types` is a list of 3, expected `num_hidden_layers` (4) entries"],
    );
    refuse(
        json!({"layer_types": [linear, linear, "sliding_attention", full], "full_attention_interval": null}),
        &["`layer_types[2]` is \"sliding_attention\", expected \"linear_attention\" or \"full_attention\""],
    );
    refuse(
        json!({"layer_types": [linear, full, linear, full]}),
        &[
            "`layer_types[1]` is \"full_attention\", expected what `full_attention_interval` (4) gives; remove one of the two keys",
        ],
    );
    let types = json!({"layer_types": [linear, full, linear, full], "full_attention_interval": null});
    let mixers: Vec<Mixer> = accept(types).layers.iter().map(|l| l.mixer).collect();
    use Mixer::{FullAttention, LinearAttention};
    assert_eq!(mixers, [LinearAttention, FullAttention, LinearAttention, FullAttention]);
    let mixers: Vec<Mixer> = accept(json!({})).layers.iter().map(|l| l.mixer).collect();
    assert_eq!(mixers, [LinearAttention, LinearAttention, LinearAttention, FullAttention]);
}

#[test]
fn what_changes_the_mathematics_is_refused() {
    let cases = [
        (
            json!({"qkv_bias": true}),
            "`qkv_bias` is true, expected false (biases on the attention projections are not supported)",
        ),
        (
            json!({"layer_scale": true}),
            "`layer_scale` is true, expected false (scaled layer outputs are not supported)",
        ),
        (
            json!({"attn_output_gate": false}),
            "`attn_output_gate` is false, expected true (attention without its output gate is not supported)",
        ),
        (
            json!({"output_gate_type": "sigmoid"}),
            "`output_gate_type` is \"sigmoid\", expected \"silu\" or \"swish\" (other output gates of DeltaNet are not supported)",
        ),
        (
            json!({"dual_chunk_attention_config": {"chunk_size": 1}}),
            "`dual_chunk_attention_config` is {\"chunk_size\":1}, expected null (dual chunk attention is not supported)",
        ),
        (
            json!({"use_sliding_window": true}),
            "`use_sliding_window` is true, expected false (sliding window attention is not supported)",
        ),
        (
            json!({"hidden_act": "gelu"}),
            "`hidden_act` is \"gelu\", expected \"silu\" or \"swish\" (other activations are not supported)",
        ),
        (json!({"logit_scale": 0.5}), "`logit_scale` is 0.5, expected 1 (scaled logits are not supported)"),
        (
            json!({"model_type": "llama"}),
            "`model_type` is \"llama\", expected \"qwen3_next\" (the model type that is supported)",
        ),
        (
            json!({"architectures": ["Qwen3NextForSequenceClassification"]}),
            "`architectures` is [\"Qwen3NextForSequenceClassification\"], expected [\"Qwen3NextForCausalLM\"] (the architecture that is supported)",
        ),
    ];
    for (changes, expected) in cases {
        refuse(changes, &[expected]);
    }
}

#[test]
fn unknown_keys_are_named_in_warnings() {
    let (_, warnings) = parse_value(&changed(&json!({"wings": 2, "use_cache": false}))).expect("it is fine otherwise");
    assert_eq!(warnings, ["config.json: `wings` is not a known key and has no effect"]);
}

#[test]
fn stop_tokens_beyond_the_vocabulary_are_left_out() {
    let (config, warnings) = parse_value(&changed(&json!({"eos_token_id": [1, 512, 1]}))).expect("valid");
    assert_eq!(config.eos_token_ids, [1]);
    assert_eq!(warnings, ["config.json: `eos_token_id` is [1,512,1], which goes beyond `vocab_size` (512)"]);
    refuse(json!({"eos_token_id": [-1]}), &["`eos_token_id` is [-1], expected a token id or a list of them"]);
}

#[test]
fn both_spellings_of_rope_mean_the_same() {
    let old =
        accept(json!({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}));
    let mut new = tiny();
    let object = new.as_object_mut().expect("an object");
    object.remove("rope_theta");
    object.remove("partial_rotary_factor");
    let parameters = json!({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 1024,
        "rope_theta": 1e7, "partial_rotary_factor": 0.25});
    object.insert("rope_parameters".into(), parameters);
    let (new, _) = parse_value(&new).expect("valid");
    assert_eq!(old, new);
    assert_eq!(old.max_context(), 4096);
}

#[test]
fn rope_that_is_not_supported_is_refused() {
    let scaling = |value: Value| json!({ "rope_scaling": value });
    for kind in ["linear", "dynamic", "llama3", "longrope"] {
        let expected = format!(
            "`rope_parameters.rope_type` is {kind:?}, expected \"default\" or \"yarn\" (other rotary scalings are not supported)"
        );
        refuse(scaling(json!({"rope_type": kind, "factor": 2.0})), &[&expected]);
    }
    let yarn = |key: &str, value: Value| {
        let mut object = json!({"rope_type": "yarn", "factor": 2.0});
        object[key] = value;
        scaling(object)
    };
    refuse(yarn("factor", json!(0.5)), &["`rope_parameters.factor` is 0.5, expected a number from 1 to 1000000"]);
    refuse(
        yarn("wings", json!(2)),
        &["`rope_parameters.wings` is 2, expected no such key: its effect on the frequencies is not known"],
    );
    refuse(
        yarn("type", json!("default")),
        &["`rope_parameters.type` is \"default\", expected \"yarn\" as in `rope_type`"],
    );
    refuse(yarn("rope_theta", json!(5)), &["`rope_parameters.rope_theta` is 5, expected 10000000 as at the top level"]);
    refuse(yarn("beta_fast", json!(0.5)), &["`rope_parameters.beta_fast` is 0.5, expected at least `beta_slow` (1)"]);
    refuse(scaling(json!([])), &["`rope_scaling` is [], expected an object or null"]);
    refuse(
        scaling(json!({"type": "yarn"})),
        &["`rope_parameters.factor` is missing, expected a number of at least 1 (YaRN needs it)"],
    );
}

#[test]
fn a_rope_scaling_that_cannot_be_is_refused() {
    let check = |text: &str, expected: &str| {
        let error = text.parse::<RopeScaling>().expect_err(text);
        assert!(error.contains(expected), "{text}: {error}");
    };
    check("", "no rotary scaling is called ``; expected `yarn,factor=X`");
    check("linear,factor=2", "no rotary scaling is called `linear`; expected `yarn,factor=X`");
    check("yarn", "`factor` is missing, expected a number of at least 1");
    check("yarn,4", "`4` is no KEY=VALUE; expected `yarn,factor=X`");
    check("yarn,factor=four", "`factor` is `four`, expected a number");
    check("yarn,factor=0.5", "`factor` is 0.5, expected a number from 1 to 1000000");
    check("yarn,factor=2,factor=4", "`factor` stands twice");
    check(
        "yarn,factor=2,original=64",
        "`original` is no key of YaRN, expected one of factor, original_max_position_embeddings,",
    );
    check("yarn,factor=2,rope_theta=5", "`rope_theta` is no key of YaRN");
    check("yarn,factor=2,original_max_position_embeddings=0", "is 0, expected an integer from 1 to");
    check("yarn,factor=2,beta_fast=0.5", "`beta_fast` is 0.5, expected at least `beta_slow` (1)");
    check(
        "yarn,factor=0,truncate=1",
        "`factor` is 0, expected a number from 1 to 1000000; `truncate` is 1, expected true or false",
    );
    check("default,factor=2", "`default` takes no keys");
}

/// Values of the published reference, computed in f32.
#[test]
fn yarn_frequencies_are_those_of_the_reference() {
    let config = accept(json!({
        "head_dim": 256, "max_position_embeddings": 262144,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144},
    }));
    let inv_freq = config.rope.inv_freq();
    assert_eq!(inv_freq.len(), 32);
    let reference = [
        (0, 1.0f32),
        (1, 0.604_296_4),
        (13, 0.001_433_012_7),
        (14, 0.000_865_964_34),
        (15, 0.000_474_239_82),
        (18, 7.217_387_6e-5),
        (21, 8.759_771e-6),
        (22, 3.849_816e-6),
        (31, 4.137_042_7e-8),
    ];
    for (j, want) in reference {
        assert!((inv_freq[j] - want).abs() <= want * 2e-7, "{j}: {} is not {want}", inv_freq[j]);
    }
    assert!((config.rope.factor() - 1.138_629_436_111_989).abs() < 1e-12);
    assert_eq!(config.max_context(), 1 << 20);
}

#[test]
fn yarn_keys_have_their_effect() {
    let rope = |extra: Value| {
        let mut scaling = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024});
        scaling.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        accept(json!({"rope_scaling": scaling, "head_dim": 256})).rope
    };
    let plain = rope(json!({}));
    assert_eq!(rope(json!({"attention_factor": 1.5})).factor(), 1.5);
    assert_eq!(rope(json!({"mscale": 1.0, "mscale_all_dim": 1.0})).factor(), 1.0);
    assert_eq!(rope(json!({"mscale": 0.0, "mscale_all_dim": 1.0})).factor(), plain.factor());
    assert_ne!(rope(json!({"truncate": false})).inv_freq(), plain.inv_freq());
    assert_ne!(rope(json!({"beta_fast": 16})).inv_freq(), plain.inv_freq());
    assert_ne!(rope(json!({"beta_slow": 4.0})).inv_freq(), plain.inv_freq());
    assert_eq!(rope(json!({"beta_slow": 0, "beta_fast": null})).inv_freq(), plain.inv_freq());
}

#[test]
fn quantisation_is_checked() {
    let refused = |method: &str, what: &str| {
        format!(
            "weights quantised by {method} as {what} (`quantization_config`) cannot be compiled; \
             use another checkpoint of this model"
        )
    };
    let gptq = |more: Value| {
        let mut config = json!({"quant_method": "gptq", "bits": 4, "group_size": 128});
        config.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        json!({"quantization_config": config})
    };
    refuse(gptq(json!({"bits": 3})), &[&refused("gptq", "3 bits")]);
    refuse(gptq(json!({"group_size": 24})), &[&refused("gptq", "groups of 24 columns (not a multiple of 16)")]);
    refuse(gptq(json!({"checkpoint_format": "marlin"})), &[&refused("gptq", "`marlin`")]);
    refuse(
        gptq(json!({"bits": 9, "group_size": null, "sym": 1})),
        &[
            "`quantization_config.bits` is 9, expected an integer from 2 to 8",
            "`quantization_config.group_size` is missing, expected -1 or an integer from 1 to 65536",
            "`quantization_config.sym` is 1, expected true or false",
        ],
    );
    refuse(
        json!({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 100]}}),
        &[&refused("fp8", "blocks of 128 by 100 (not multiples of 16)")],
    );
    refuse(
        json!({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}, "format": "marlin-24"}}),
        &[&refused("compressed-tensors", "`marlin-24`")],
    );
    refuse(
        json!({"quantization_config": {"quant_method": "magic"}}),
        &[
            "`quantization_config.quant_method` is \"magic\", expected one of \"fp8\", \"compressed-tensors\", \"gptq\", \"awq\"",
        ],
    );
    refuse(json!({"quantization_config": 4}), &["`quantization_config` is 4, expected an object or null"]);
}

#[test]
fn text_that_is_not_such_an_object_is_refused() {
    let deep = "[".repeat(100_000);
    let cases: &[(&str, &str)] = &[
        ("", "EOF while parsing a value"),
        ("[]", "the file holds an array, expected an object"),
        ("{} {}", "trailing characters"),
        (r#"{"model_type": "a", "model_type": "b"}"#, "the key `model_type` appears twice"),
        (r#"{"a": {"b": 1, "b": 1}}"#, "the key `b` appears twice"),
        (r#"{"hidden_size": 1e999}"#, "number out of range"),
        (r#"{"hidden_size": NaN}"#, "expected value"),
        (&deep, "recursion limit exceeded"),
        ("{\"a\": \"\\ud800\"}", "hex escape"),
    ];
    for (text, expected) in cases {
        let error = parse("config.json", text.as_bytes()).expect_err(expected).to_string();
        assert!(error.starts_with("config.json: ") && error.contains(expected), "{error}");
    }
    assert!(parse("config.json", b"{\"a\": \"\xff\"}").is_err());
}
