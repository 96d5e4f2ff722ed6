//! What is fuzzed: each function takes any bytes as one kind of file, and must come back. What is accepted must be sound, and reading it
//! may fail but not panic.

use std::path::Path;

use nextc_frontend::{Checkpoint, Model, Options, load};
use nextc_ir::rows::{Buffers, Rows};
use nextc_ir::{kernel, parse, print, verify};

/// Takes any bytes as one kind of file.
pub type Target = fn(&[u8]);

/// Every target with its name, which is that of its folder in `corpus`.
pub const TARGETS: &[(&str, Target)] = &[
    ("gguf", gguf),
    ("safetensors", safetensors),
    ("config", config),
    ("index", index),
    ("graph_text", graph_text),
    ("kernel_text", kernel_text),
];

/// A model in a GGUF file.
pub fn gguf(data: &[u8]) {
    in_folder(&[("model.gguf", data)], |dir| check(load(&dir.join("model.gguf"), &Options::default()).ok()));
}

/// Weights: up to a NUL their `config.json`, behind it the file.
pub fn safetensors(data: &[u8]) {
    let end = data.iter().position(|&b| b == 0).unwrap_or(data.len());
    let (config, file) = (&data[..end], data.get(end + 1..).unwrap_or(&[]));
    let files = [("config.json", config), ("model.safetensors", file)];
    in_folder(&files, |dir| check(load(dir, &Options::default()).ok()));
}

/// A `config.json` without weights.
pub fn config(data: &[u8]) {
    if let Ok((config, _)) = nextc_frontend::config::parse("config.json", data) {
        // the graph of a model with millions of parts takes its time
        let parts = config.layers.len() as u64 * (config.num_experts + config.num_v_heads);
        if parts < 4096 {
            in_folder(&[("config.json", data)], |dir| check(load(&dir.join("config.json"), &Options::default()).ok()));
        }
    }
}

/// An index of shards, of which none is there.
pub fn index(data: &[u8]) {
    in_folder(&[("model.safetensors.index.json", data)], |dir| {
        let _ = Checkpoint::open(dir, None, &mut Vec::new());
    });
}

/// The text of a module.
pub fn graph_text(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(module) = parse::module(text) else { return };
    let printed = print::module(&module);
    let again = parse::module(&printed).expect("what is printed can be read");
    assert_eq!(print::module(&again), printed);
    let _ = verify::verify(&module);
}

/// The text of a kernel.
pub fn kernel_text(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(parsed) = kernel::parse::kernel(text) else { return };
    let printed = kernel::print::kernel(&parsed);
    let again = kernel::parse::kernel(&printed).expect("what is printed can be read");
    assert_eq!(kernel::print::kernel(&again), printed);
    let _ = kernel::verify::verify_kernel(&parsed);
}

fn in_folder(files: &[(&str, &[u8])], run: impl FnOnce(&Path)) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for (name, bytes) in files {
        std::fs::write(dir.path().join(name), bytes).expect("written");
    }
    run(dir.path());
}

/// A model that was accepted is sound, and of each of its weights the first and the last row can be asked for.
fn check(model: Option<Model>) {
    let Some(model) = model else { return };
    assert_eq!(verify::verify(&model.module), Ok(()));
    let Some(source) = &model.source else { return };
    for (name, decl) in &model.module.weights {
        let Ok(rows) = Rows::open(name, decl, source) else { continue };
        let mut out = vec![0.0; rows.columns as usize];
        for row in [0, rows.rows.saturating_sub(1)] {
            let _ = rows.read(row, &mut out, &mut Buffers::default());
        }
    }
}
