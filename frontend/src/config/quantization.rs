//! `quantization_config`: known methods have their keys checked; none can be compiled yet, and the error says so.

use serde_json::{Map, Value};

use crate::error::ConfigProblem;
use crate::json::shown;

/// What a key of a quantisation method must hold.
#[derive(Clone, Copy)]
enum Kind {
    /// One of these strings.
    OneOf(&'static [&'static str]),
    /// An integer from the first to the second; -1 too where the third says so.
    Int(i64, i64, bool),
    /// true or false.
    Bool,
    /// Two positive integers.
    Block,
    /// A list of names.
    Names,
    /// An object of objects.
    Groups,
}

/// A method: its name, and its keys with whether they must be there.
struct Method {
    name: &'static str,
    keys: &'static [(&'static str, bool, Kind)],
}

const GROUP_SIZE: Kind = Kind::Int(1, 65536, true);

const METHODS: &[Method] = &[
    Method {
        name: "fp8",
        keys: &[
            ("fmt", false, Kind::OneOf(&["e4m3"])),
            ("activation_scheme", false, Kind::OneOf(&["dynamic", "static"])),
            ("weight_block_size", false, Kind::Block),
            ("modules_to_not_convert", false, Kind::Names),
            ("ignored_layers", false, Kind::Names),
        ],
    },
    Method {
        name: "compressed-tensors",
        keys: &[
            ("config_groups", true, Kind::Groups),
            (
                "format",
                false,
                Kind::OneOf(&[
                    "dense",
                    "pack-quantized",
                    "int-quantized",
                    "float-quantized",
                    "naive-quantized",
                    "nvfp4-pack-quantized",
                    "mxfp4-pack-quantized",
                    "mixed-precision",
                    "marlin-24",
                ]),
            ),
            ("quantization_status", false, Kind::OneOf(&["initialized", "calibration", "frozen", "compressed"])),
            ("ignore", false, Kind::Names),
        ],
    },
    Method {
        name: "gptq",
        keys: &[
            ("bits", true, Kind::Int(2, 8, false)),
            ("group_size", true, GROUP_SIZE),
            ("desc_act", false, Kind::Bool),
            ("sym", false, Kind::Bool),
            ("lm_head", false, Kind::Bool),
            ("static_groups", false, Kind::Bool),
            ("true_sequential", false, Kind::Bool),
            ("checkpoint_format", false, Kind::OneOf(&["gptq", "gptq_v2", "marlin"])),
        ],
    },
    Method {
        name: "awq",
        keys: &[
            ("bits", true, Kind::Int(2, 8, false)),
            ("group_size", true, GROUP_SIZE),
            ("zero_point", false, Kind::Bool),
            ("version", false, Kind::OneOf(&["gemm", "gemv", "GEMM", "GEMV"])),
            ("modules_to_not_convert", false, Kind::Names),
        ],
    },
];

/// The problems of `quantization_config`; at least one, since no method can be compiled yet.
pub(crate) fn check(value: &Value) -> Vec<ConfigProblem> {
    let Some(object) = value.as_object() else {
        return vec![problem("quantization_config", shown(value), "an object or null".into())];
    };
    let known = METHODS.iter().find(|m| object.get("quant_method").and_then(Value::as_str) == Some(m.name));
    let Some(method) = known else {
        let found = object.get("quant_method").map_or_else(|| "missing".into(), shown);
        let names: Vec<String> = METHODS.iter().map(|m| format!("{:?}", m.name)).collect();
        return vec![problem("quantization_config.quant_method", found, format!("one of {}", names.join(", ")))];
    };
    let mut problems: Vec<_> =
        method.keys.iter().filter_map(|&(key, must, kind)| key_problem(object, key, must, kind)).collect();
    problems.push(ConfigProblem::Format { method: method.name.into() });
    problems
}

fn key_problem(object: &Map<String, Value>, key: &str, must: bool, kind: Kind) -> Option<ConfigProblem> {
    let full = format!("quantization_config.{key}");
    match object.get(key).filter(|v| !v.is_null()) {
        None if must => Some(problem(&full, "missing".into(), expected(kind))),
        None => None,
        Some(value) if fits(value, kind) => None,
        Some(value) => Some(problem(&full, shown(value), expected(kind))),
    }
}

fn fits(value: &Value, kind: Kind) -> bool {
    match kind {
        Kind::OneOf(names) => value.as_str().is_some_and(|s| names.contains(&s)),
        Kind::Int(low, high, minus_one) => {
            value.as_i64().is_some_and(|n| (low..=high).contains(&n) || (minus_one && n == -1))
        }
        Kind::Bool => value.is_boolean(),
        Kind::Block => {
            value.as_array().is_some_and(|a| a.len() == 2 && a.iter().all(|n| n.as_u64().is_some_and(|n| n > 0)))
        }
        Kind::Names => value.as_array().is_some_and(|a| a.iter().all(Value::is_string)),
        Kind::Groups => value.as_object().is_some_and(|o| o.values().all(Value::is_object)),
    }
}

fn expected(kind: Kind) -> String {
    match kind {
        Kind::OneOf(names) => {
            let quoted: Vec<String> = names.iter().map(|n| format!("{n:?}")).collect();
            format!("one of {}", quoted.join(", "))
        }
        Kind::Int(low, high, false) => format!("an integer from {low} to {high}"),
        Kind::Int(low, high, true) => format!("-1 or an integer from {low} to {high}"),
        Kind::Bool => "true or false".into(),
        Kind::Block => "two positive integers".into(),
        Kind::Names => "a list of names".into(),
        Kind::Groups => "an object of objects".into(),
    }
}

fn problem(key: &str, found: String, expected: String) -> ConfigProblem {
    ConfigProblem::Value { key: key.into(), found, expected }
}
