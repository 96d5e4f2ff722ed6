//! No input, however damaged, makes the loader panic; what it accepts, it builds.

use std::path::Path;

use nextc_frontend::weights::header;
use nextc_frontend::{Options, config, load};
use proptest::prelude::*;
use serde_json::{Value, json};

fn read(path: &str) -> Vec<u8> {
    std::fs::read(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/oracle")).join(path))
        .expect("the fixture is there")
}

/// Values that a key may be given: plausible, extreme, or of another type.
fn any_value() -> impl Strategy<Value = Value> {
    let small = (0u64..20).prop_map(Value::from);
    let int = any::<i64>().prop_map(Value::from);
    let large = (0u32..64).prop_map(|n| Value::from(1u64 << n));
    let float = any::<f64>().prop_map(Value::from);
    let other = prop::sample::select(vec![
        json!(null),
        json!(true),
        json!(false),
        json!(0.25),
        json!(1e-6),
        json!(""),
        json!("yarn"),
        json!("linear_attention"),
        json!([]),
        json!([1, 0]),
        json!(["full_attention", "full_attention", "full_attention", "full_attention"]),
        json!({}),
        json!({"rope_type": "yarn", "factor": 4.0}),
        json!({"quant_method": "gptq"}),
        json!({"type": "yarn", "factor": 2, "beta_fast": 1, "truncate": false, "attention_factor": 1e-300}),
    ]);
    prop_oneof![3 => small, 1 => int, 2 => large, 1 => float, 3 => other]
}

fn keys() -> Vec<&'static str> {
    config::keys::CONFIG_KEYS.iter().map(|k| k.name).filter(|k| *k != "model_type").collect()
}

fn any_key() -> impl Strategy<Value = &'static str> {
    prop::sample::select(keys())
}

fn config_with(fixture: &str, changes: &[(&str, Value)]) -> Value {
    let mut config: Value = serde_json::from_slice(&read(&format!("{fixture}/config.json"))).expect("JSON");
    for (key, value) in changes {
        config[*key] = value.clone();
    }
    config
}

/// A config is refused as one, or what is built of it is sound.
fn check(config: &Value) -> Result<(), TestCaseError> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("config.json");
    std::fs::write(&path, config.to_string()).expect("written");
    match load(&path, &Options::default()) {
        Ok(model) => prop_assert_eq!(nextc_ir::verify::verify(&model.module), Ok(())),
        Err(nextc_frontend::Error::Config { problems, .. }) => prop_assert!(!problems.is_empty()),
        Err(other) => prop_assert!(false, "{other}"),
    }
    Ok(())
}

#[test]
fn a_config_with_any_power_of_two_is_built_or_refused() {
    for key in keys() {
        for power in 0..64 {
            let config = config_with("tiny", &[(key, Value::from(1_u64 << power))]);
            check(&config).unwrap_or_else(|e| panic!("`{key}` is 2^{power}: {e}"));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_config_with_other_values_is_built_or_refused(
        fixture in prop::sample::select(vec!["tiny", "odd", "dense-mix", "yarn"]),
        changes in prop::collection::vec((any_key(), any_value()), 1..4),
    ) {
        check(&config_with(fixture, &changes))?;
    }

    #[test]
    fn a_config_with_other_bytes_is_read_or_refused(
        at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>(), truncate in any::<bool>(),
    ) {
        let mut bytes = read("tiny/config.json");
        let i = at.index(bytes.len());
        bytes[i] = byte;
        if truncate {
            bytes.truncate(cut.index(bytes.len()));
        }
        let _ = config::parse("config.json", &bytes);
    }

    #[test]
    fn a_header_with_other_bits_is_read_or_refused(
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..6), tail in 0u64..3,
    ) {
        let file = read("tiny/model.safetensors");
        let length = u64::from_le_bytes(file[..8].try_into().expect("eight bytes")) as usize;
        let mut header = file[8..8 + length].to_vec();
        for (at, bit) in &flips {
            let i = at.index(header.len());
            header[i] ^= 1 << bit;
        }
        if let Ok(tensors) = header::parse(&header, file.len() as u64 + tail) {
            for tensor in tensors.values() {
                prop_assert!(tensor.begin <= file.len() as u64 + tail);
            }
        }
    }

    #[test]
    fn a_truncated_file_is_refused(length in 0usize..400_000) {
        let file = read("tiny/model.safetensors");
        let dir = tempfile::tempdir().expect("a temporary directory");
        std::fs::write(dir.path().join("config.json"), read("tiny/config.json")).expect("written");
        std::fs::write(dir.path().join("model.safetensors"), &file[..length]).expect("written");
        prop_assert!(load(dir.path(), &Options::default()).is_err());
    }
}
