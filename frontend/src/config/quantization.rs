//! `quantization_config`: known methods have their keys checked. Which tensors are quantised say the tensors themselves, since lists
//! of modules are spelt in many ways; the configuration says how to read them.

use serde_json::{Map, Value};

use crate::error::ConfigProblem;
use crate::json::shown;

/// How quantised tensors are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantization {
    /// `fp8`: e4m3fn and `weight_scale_inv`.
    Fp8 {
        /// Rows and columns that share a scale.
        block: [u64; 2],
    },
    /// `compressed-tensors`, `pack-quantized`: `weight_packed`, `weight_scale`, and what else there is.
    Packed,
    /// `gptq`: `qweight`, `qzeros`, `scales`, `g_idx`.
    Gptq(Grouped),
    /// `awq`: `qweight`, `qzeros`, `scales`.
    Awq(Grouped),
}

/// What the tensors of `gptq` and `awq` do not say themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grouped {
    /// Bits of a code: 4 or 8.
    pub bits: u64,
    /// Columns of a group; `None`: all.
    pub group_size: Option<u64>,
    /// True if zero points are the middle of the codes, so that there are none.
    pub symmetric: bool,
    /// True if columns belong to groups by `g_idx` (`desc_act`).
    pub ordered: bool,
    /// What is added to a stored zero point: 1 in files of the first version.
    pub zero_offset: u32,
}

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

type Keys = Map<String, Value>;

/// A method: its name, its keys with whether they must be there, and what they say; or what of it cannot be compiled.
struct Method {
    name: &'static str,
    keys: &'static [(&'static str, bool, Kind)],
    read: fn(&Keys) -> Result<Quantization, String>,
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
        read: read_fp8,
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
        read: read_packed,
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
        read: read_gptq,
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
        read: read_awq,
    },
];

fn read_fp8(keys: &Keys) -> Result<Quantization, String> {
    let sizes = keys.get("weight_block_size").and_then(Value::as_array);
    let block = sizes.map_or([128, 128], |s| [0, 1].map(|i| s.get(i).and_then(Value::as_u64).unwrap_or(0)));
    if block.iter().any(|n| !n.is_multiple_of(16)) {
        return Err(format!("blocks of {} by {} (not multiples of 16)", block[0], block[1]));
    }
    Ok(Quantization::Fp8 { block })
}

fn read_packed(keys: &Keys) -> Result<Quantization, String> {
    match text(keys, "format").unwrap_or("pack-quantized") {
        "pack-quantized" | "dense" => Ok(Quantization::Packed),
        other => Err(format!("`{other}`")),
    }
}

fn read_gptq(keys: &Keys) -> Result<Quantization, String> {
    let zero_offset = match text(keys, "checkpoint_format").unwrap_or("gptq") {
        "gptq" => 1,
        "gptq_v2" => 0,
        other => return Err(format!("`{other}`")),
    };
    let flag = |key, default| keys.get(key).and_then(Value::as_bool).unwrap_or(default);
    let (symmetric, ordered) = (flag("sym", true), flag("desc_act", false));
    Ok(Quantization::Gptq(Grouped { symmetric, ordered, zero_offset, ..grouped(keys)? }))
}

fn read_awq(keys: &Keys) -> Result<Quantization, String> {
    match text(keys, "version").unwrap_or("gemm") {
        "gemm" | "GEMM" => {
            let symmetric = keys.get("zero_point").and_then(Value::as_bool) == Some(false);
            Ok(Quantization::Awq(Grouped { symmetric, ..grouped(keys)? }))
        }
        other => Err(format!("`{other}`")),
    }
}

fn text<'k>(keys: &'k Keys, key: &str) -> Option<&'k str> {
    keys.get(key).and_then(Value::as_str)
}

fn grouped(keys: &Keys) -> Result<Grouped, String> {
    let bits = keys.get("bits").and_then(Value::as_u64).unwrap_or(0);
    let group_size = keys.get("group_size").and_then(Value::as_u64);
    match (bits, group_size) {
        (4 | 8, Some(n)) if !n.is_multiple_of(16) => Err(format!("groups of {n} columns (not a multiple of 16)")),
        (4 | 8, _) => Ok(Grouped { bits, group_size, symmetric: true, ordered: false, zero_offset: 0 }),
        _ => Err(format!("{bits} bits")),
    }
}

/// Reads and checks `quantization_config`.
pub(crate) fn read(value: &Value) -> Result<Quantization, Vec<ConfigProblem>> {
    let Some(object) = value.as_object() else {
        return Err(vec![problem("quantization_config", shown(value), "an object or null".into())]);
    };
    let known = METHODS.iter().find(|m| object.get("quant_method").and_then(Value::as_str) == Some(m.name));
    let Some(method) = known else {
        let found = object.get("quant_method").map_or_else(|| "missing".into(), shown);
        let names: Vec<String> = METHODS.iter().map(|m| format!("{:?}", m.name)).collect();
        let expected = format!("one of {}", names.join(", "));
        return Err(vec![problem("quantization_config.quant_method", found, expected)]);
    };
    let problems: Vec<_> =
        method.keys.iter().filter_map(|&(key, must, kind)| key_problem(object, key, must, kind)).collect();
    if !problems.is_empty() {
        return Err(problems);
    }
    (method.read)(object).map_err(|what| vec![ConfigProblem::Format { method: method.name.into(), what }])
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
