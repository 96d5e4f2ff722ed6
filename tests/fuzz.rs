//! The targets of `fuzz/` on stable Rust: their corpus, fixtures, and both with bytes changed, for `FUZZ_SECONDS` seconds a target (3
//! where that is not set; `make test` sets 60). A run begins where the seed says, `FUZZ_SEED`, so a failure can be repeated.

#[path = "support/gguf.rs"]
mod gguf;
#[path = "../fuzz/src/targets.rs"]
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use gguf::Random;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> Vec<u8> {
    std::fs::read(root().join(path.as_ref())).unwrap_or_else(|e| panic!("{}: {e}", path.as_ref().display()))
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().map_or(default, |n| n.parse().unwrap_or_else(|_| panic!("{variable}: a number")))
}

/// Bytes that often are somewhere in files of the kind, and those that numbers like to be.
const PIECES: &[&[u8]] = &[
    b"\0",
    b"\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\0\0\0\0\0\0\0\x80",
    b"\xff\xff\xff\x7f",
    b"\0\0\0\0\x01\0\0\0",
    b"-1",
    b"18446744073709551616",
    b"1e999",
    b"null",
    b"[[[[",
    b"{\"",
    b"\"\\u0000",
    b"\xc3\x28",
    b"qwen3next.",
    b"blk.4.",
    b"bundle<",
    b"for %1 = %0 to %0 step %0 {",
    b"weight<3 x 20 x 304 x q4<g32,zero>>",
];

/// Changes a few bytes, mostly near the beginning, where headers are.
fn change(bytes: &mut Vec<u8>, others: &[Vec<u8>], random: &mut Random) {
    for _ in 0..1 + random.bits() % 4 {
        let reach = if random.bits().is_multiple_of(4) { bytes.len() } else { bytes.len().min(12_000) };
        let at = (random.bits() as usize) % (reach + 1);
        let end = (at + (random.bits() % 16) as usize).min(bytes.len());
        match random.bits() % 8 {
            0 | 1 if at < bytes.len() => bytes[at] ^= 1 << (random.bits() % 8),
            2 if at < bytes.len() => bytes[at] = random.bits() as u8,
            3 => bytes.truncate(at),
            4 => drop(bytes.drain(at..end)),
            5 => {
                let other = &others[(random.bits() as usize) % others.len()];
                let from = (random.bits() as usize) % (other.len() + 1);
                let piece = &other[from..(from + (random.bits() % 64) as usize).min(other.len())];
                bytes.splice(at..at, piece.iter().copied());
            }
            n => {
                let piece = PIECES[(random.bits() as usize) % PIECES.len()];
                // in place of as many bytes, or between them
                let end = if n == 6 { (at + piece.len()).min(bytes.len()) } else { at };
                bytes.splice(at..end, piece.iter().copied());
            }
        }
    }
}

/// Runs a target over its corpus and `seeds`, then over changed ones until the time is up.
fn fuzz(name: &str, seeds: Vec<Vec<u8>>) {
    let target = targets::TARGETS.iter().find(|t| t.0 == name).unwrap_or_else(|| panic!("no target {name}")).1;
    let mut corpus = seeds;
    let mut files: Vec<PathBuf> = std::fs::read_dir(root().join("fuzz/corpus").join(name))
        .expect("the target has a corpus")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    corpus.extend(files.iter().map(read));
    assert!(!files.is_empty(), "the corpus of {name} is empty");
    let run = |bytes: &[u8], which: &str| {
        if catch_unwind(AssertUnwindSafe(|| target(bytes))).is_err() {
            let kept = std::env::temp_dir().join(format!("fuzz-{name}-{}", std::process::id()));
            std::fs::write(&kept, bytes).expect("written");
            panic!("{name}: {which} panics; it is kept in {}", kept.display());
        }
    };
    for (i, bytes) in corpus.iter().enumerate() {
        run(bytes, &format!("file {i} of the corpus"));
    }
    let seed = number("FUZZ_SEED", 1);
    let end = Instant::now() + Duration::from_secs(number("FUZZ_SECONDS", 3));
    let mut count = 0;
    while Instant::now() < end {
        let mut random = Random(seed.wrapping_add(count));
        let mut bytes = corpus[(random.bits() as usize) % corpus.len()].clone();
        change(&mut bytes, &corpus, &mut random);
        run(&bytes, &format!("the change of FUZZ_SEED={}", seed + count));
        count += 1;
    }
    println!("{name}: {count} changed files");
}

fn fixture(name: &str, file: &str) -> Vec<u8> {
    read(Path::new("tests/oracle").join(name).join(file))
}

#[test]
fn gguf_files() {
    let dir = root().join("tests/oracle/tiny");
    let config = serde_json::from_slice(&fixture("tiny", "config.json")).expect("JSON");
    let mut file = gguf::convert(&config, &gguf::published(&dir), &gguf::as_bf16, false);
    file.text("tokenizer.ggml.model", "gpt2");
    file.text("tokenizer.ggml.pre", "qwen2");
    file.texts("tokenizer.ggml.tokens", &["!", "a", "b", "ab", "<|end|>"].map(str::to_owned));
    file.i32s("tokenizer.ggml.token_type", &[1, 1, 1, 1, 3]);
    file.texts("tokenizer.ggml.merges", &["a b".to_owned()]);
    file.text("tokenizer.chat_template", "{{ messages }}");
    // header bytes that are changed lie among those of tensors otherwise
    fuzz("gguf", vec![file.bytes()]);
}

#[test]
fn safetensors_files() {
    let seed = |name: &str| [&fixture(name, "config.json")[..], b"\0", &fixture(name, "model.safetensors")].concat();
    fuzz("safetensors", ["tiny", "fp8", "int4", "gptq-int4"].map(seed).to_vec());
}

#[test]
fn configs() {
    let names = ["tiny", "odd", "dense-mix", "yarn", "fp8", "int4", "gptq-int4"];
    fuzz("config", names.map(|name| fixture(name, "config.json")).to_vec());
}

#[test]
fn indices() {
    fuzz("index", vec![fixture("odd", "model.safetensors.index.json")]);
}

#[test]
fn texts_of_graphs() {
    fuzz("graph_text", vec![read("ir/tests/graph/module.graph")]);
}

#[test]
fn texts_of_kernels() {
    let dir = root().join("tests/filetests/kernel");
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir).expect("there").map(|e| e.expect("an entry").path()).collect();
    files.sort();
    let text = |file: &PathBuf| -> String {
        let text = String::from_utf8(read(file)).expect("UTF-8");
        text.lines().map(|line| line.split(';').next().unwrap_or_default().to_owned() + "\n").collect()
    };
    let texts: Vec<String> = files.iter().map(text).collect();
    let read = texts.iter().filter(|text| nextc_ir::kernel::parse::kernel(text).is_ok()).count();
    assert!(read > 10, "{read} of {} texts are kernels", texts.len());
    fuzz("kernel_text", texts.into_iter().map(String::into_bytes).collect());
}
