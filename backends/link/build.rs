//! Builds the runtime that every executable begins with, by a cargo of its own into a target directory of its own.
//!
//! `NEXTC_RUNTIME_ELF` names a runtime that has been built already and is taken as it is. `NEXTC_RUNTIME_TARGET_DIR` names a
//! target directory to share between checkouts.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-env-changed=NEXTC_RUNTIME_ELF");
    println!("cargo::rerun-if-env-changed=NEXTC_RUNTIME_TARGET_DIR");
    let elf = match env::var_os("NEXTC_RUNTIME_ELF") {
        Some(path) => PathBuf::from(path),
        None => build_runtime(),
    };
    println!("cargo::rerun-if-changed={}", elf.display());
    println!("cargo::rustc-env=NEXTC_RUNTIME_ELF={}", elf.display());
}

fn build_runtime() -> PathBuf {
    let manifest_dir = PathBuf::from(var("CARGO_MANIFEST_DIR"));
    let root = manifest_dir.ancestors().nth(2).expect("this crate lies in backends/link").to_owned();
    for path in ["runtime/src", "runtime/Cargo.toml", "runtime/abi/src", "runtime/abi/Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", root.join(path).display());
    }
    let out_dir = PathBuf::from(var("OUT_DIR"));
    let target_dir = env::var_os("NEXTC_RUNTIME_TARGET_DIR").map_or_else(|| out_dir.join("runtime"), PathBuf::from);
    run_cargo(&root, &target_dir);
    // a copy, since a shared target directory may hold another checkout's runtime by the time the compiler reads it
    let (built, kept) = (target_dir.join("release/nextc-runtime"), out_dir.join("nextc-runtime"));
    std::fs::copy(&built, &kept).unwrap_or_else(|e| panic!("copying {}: {e}", built.display()));
    kept
}

fn run_cargo(root: &Path, target_dir: &Path) {
    let mut cargo = Command::new(var("CARGO"));
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(leaks) {
            cargo.env_remove(name);
        }
    }
    cargo.args([
        "build",
        "--release",
        "--locked",
        "--package",
        "nextc-runtime",
        "--bin",
        "nextc-runtime",
        "--manifest-path",
    ]);
    cargo.arg(root.join("Cargo.toml")).arg("--target-dir").arg(target_dir).current_dir(root);
    cargo.env("CARGO_PROFILE_RELEASE_STRIP", "true");
    let status = cargo.status().unwrap_or_else(|e| panic!("starting cargo to build the runtime: {e}"));
    assert!(status.success(), "building the runtime failed: {status}; its messages are above");
}

/// True for variables that the outer build sets and that would change the inner one: its target directory, flags, profile and
/// wrappers (clippy is one).
fn leaks(name: &str) -> bool {
    const KEPT: [&str; 2] = ["CARGO_HOME", "CARGO_NET_OFFLINE"];
    const OTHERS: [&str; 9] = [
        "RUSTC",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTDOC",
        "RUSTFLAGS",
        "RUSTDOCFLAGS",
        "TARGET",
        "HOST",
        "PROFILE",
    ];
    let from_cargo = name.starts_with("CARGO")
        && !KEPT.contains(&name)
        && !name.starts_with("CARGO_REGISTR")
        && !name.starts_with("CARGO_HTTP");
    from_cargo
        || OTHERS.contains(&name)
        || name.starts_with("DEP_")
        || matches!(name, "OPT_LEVEL" | "DEBUG" | "OUT_DIR" | "NUM_JOBS")
}

fn var(name: &str) -> String {
    env::var(name).unwrap_or_else(|e| panic!("cargo sets {name} for build scripts: {e}"))
}
