//! NVIDIA's PTX assembler: what it says about a text of PTX.
//!
//! `scripts/install-ptxas.sh` fetches it into the target directory; `NEXTC_PTXAS` names another one.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The GPU that PTX is assembled for.
pub const GPU: &str = "sm_90a";

/// What the assembler says of an entry function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes that a thread spills, stores and loads together.
    pub spilled_bytes: u32,
}

/// Where the assembler is.
fn assembler() -> PathBuf {
    let own = std::env::var_os("NEXTC_PTXAS").map(PathBuf::from);
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("it lies in the target directory");
    let path = own.unwrap_or_else(|| target.join("ptxas/nvidia/cu13/bin/ptxas"));
    assert!(
        path.exists(),
        "there is no ptxas at {}; `make ptxas` fetches it with pip, and NEXTC_PTXAS names one of your own (CUDA 13.0)",
        path.display()
    );
    path
}

/// Assembles a text.
/// # Errors
/// What the assembler says where it refuses the text, or warns that it gave up an instruction's speed (C75xx).
pub fn assemble(ptx: &str) -> Result<Vec<Entry>, String> {
    let dir = tempfile::tempdir().expect("a folder");
    let text = dir.path().join("kernel.ptx");
    std::fs::write(&text, ptx).expect("it can be written");
    let output = Command::new(assembler())
        .args([&format!("-arch={GPU}"), "-v", "-o", "kernel.cubin", "kernel.ptx"])
        .current_dir(dir.path())
        .output()
        .expect("ptxas can be started");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    if !output.status.success() || said.contains("(C75") {
        return Err(format!("{said}\nof\n{ptx}"));
    }
    entries(&said).ok_or_else(|| format!("ptxas says what is not understood:\n{said}"))
}

/// Reads `ptxas -v`: a line that names an entry, then its stack and spills, then its registers.
fn entries(said: &str) -> Option<Vec<Entry>> {
    let mut entries: Vec<Entry> = Vec::new();
    for line in said.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let name = rest.split('\'').next()?.to_owned();
            entries.push(Entry { name, registers: 0, spilled_bytes: 0 });
        } else if line.contains("bytes spill stores") {
            entries.last_mut()?.spilled_bytes =
                before(line, "bytes spill stores")? + before(line, "bytes spill loads")?;
        } else if line.contains("Used ") {
            entries.last_mut()?.registers = before(line, "registers")?;
        }
    }
    (!entries.is_empty() && entries.iter().all(|e| e.registers > 0)).then_some(entries)
}

/// The number before some words.
fn before(line: &str, words: &str) -> Option<u32> {
    line.split(words).next()?.split_whitespace().next_back()?.parse().ok()
}
