//! From the description of a target to Cranelift's: the machine that code is made *for*, never the one that it is made on.

use std::collections::BTreeSet;

use cranelift::codegen::isa::OwnedTargetIsa;
use cranelift::prelude::{Configurable, isa, settings};
use nextc_ir::target::Target;

use crate::Error;

/// A feature in LLVM's spelling, Cranelift's flag for it, and the feature that it implies.
const FEATURES: &[(&str, &str, Option<&str>)] = &[
    ("sse3", "has_sse3", None),
    ("ssse3", "has_ssse3", Some("sse3")),
    ("sse4.1", "has_sse41", Some("ssse3")),
    ("sse4.2", "has_sse42", Some("sse4.1")),
    ("avx", "has_avx", Some("sse4.2")),
    ("avx2", "has_avx2", Some("avx")),
    ("fma", "has_fma", Some("avx")),
    ("avxvnni", "has_avx_vnni", Some("avx2")),
    ("avx512f", "has_avx512f", Some("avx2")),
    ("avx512dq", "has_avx512dq", Some("avx512f")),
    ("avx512vl", "has_avx512vl", Some("avx512f")),
    ("avx512bitalg", "has_avx512bitalg", Some("avx512f")),
    ("avx512vbmi", "has_avx512vbmi", Some("avx512f")),
    ("avx512vnni", "has_avx512vnni", Some("avx512f")),
    ("popcnt", "has_popcnt", None),
    ("bmi", "has_bmi1", None),
    ("bmi2", "has_bmi2", None),
    ("lzcnt", "has_lzcnt", None),
    ("cx16", "has_cmpxchg16b", None),
];

/// What the emitter uses without asking: rounding and blending, and fused multiply-add (a call per lane where it is missing).
const NEEDED: [&str; 2] = ["sse4.1", "fma"];

/// The code generator for a target.
pub fn for_target(target: &Target) -> Result<OwnedTargetIsa, Error> {
    let features = implied(target);
    if let Some(feature) = NEEDED.into_iter().find(|f| !features.contains(f)) {
        return Err(Error::Feature { cpu: target.cpu.clone(), feature });
    }
    let refuse = |reason: String| Error::Isa { reason };
    let mut isa = isa::lookup_by_name("x86_64-unknown-linux-gnu").map_err(|e| refuse(e.to_string()))?;
    for (name, flag, _) in FEATURES {
        let value = if features.contains(name) { "true" } else { "false" };
        isa.set(flag, value).map_err(|e| refuse(e.to_string()))?;
    }
    isa.finish(flags()?).map_err(|e| refuse(e.to_string()))
}

/// Settings that do not depend on the machine.
fn flags() -> Result<settings::Flags, Error> {
    let verify = if cfg!(debug_assertions) { "true" } else { "false" };
    let mut builder = settings::builder();
    for (name, value) in [
        ("is_pic", "true"),
        ("opt_level", "speed"),
        ("enable_probestack", "false"),
        ("unwind_info", "false"),
        ("enable_verifier", verify),
    ] {
        builder.set(name, value).map_err(|e| Error::Isa { reason: e.to_string() })?;
    }
    Ok(settings::Flags::new(builder))
}

/// The target's features that Cranelift knows, with everything that they imply.
fn implied(target: &Target) -> BTreeSet<&'static str> {
    let mut found = BTreeSet::new();
    for feature in &target.features {
        let mut next = Some(feature.trim_start_matches('+'));
        while let Some(row) = next.and_then(|name| FEATURES.iter().find(|row| row.0 == name)) {
            found.insert(row.0);
            next = row.2;
        }
    }
    found
}
