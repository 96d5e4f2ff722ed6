//! The PTX of whole models, assembled by NVIDIA's assembler: the official config, and those of all fixtures.
//!
//! Every kernel must assemble. How many registers a kernel of blocks of threads has, and how many bytes it spills, is kept
//! in `tests/ptx/registers.txt`, with its threads and its shared memory, so that a change of them is seen; `BLESS=1 cargo test --features llvm --test ptx` rewrites it.
//! Kernels that decode spill nothing; those of prompts alone may. Kernels of single threads are what GPUs run until there is one of blocks, and may spill.

#![cfg(feature = "llvm")]

#[path = "support/ptxas.rs"]
mod ptxas;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use nextc_ir::kernel::Kernel;
use nextc_ir::schedule::KernelModule;
use nextc_ir::{Stored, Target};

/// The fixtures whose configs are compiled beside the official one.
const FIXTURES: [&str; 8] = ["tiny", "odd", "dense-mix", "yarn", "long", "fp8", "int4", "gptq-int4"];

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn target() -> Target {
    Target::gpu(ptxas::GPU).expect("a GPU that is known")
}

/// The kernels of a config, as `nextc build --target cuda` makes them.
fn kernels(config: &Path, kv: Stored) -> KernelModule {
    let options = nextc_frontend::Options { kv, ..Default::default() };
    let model = nextc_frontend::load(config, &options);
    let module = model.unwrap_or_else(|e| panic!("{}: {e}", config.display())).module;
    let target = Target { max_context: module.info.max_context, ..target() };
    let fused = nextc_passes::run_all(module, &target).expect("the passes run");
    let lowered = nextc_passes::lower::lower(&fused, &target).expect("the module lowers");
    nextc_passes::legalise::legalise(lowered, &target).expect("the kernels legalise")
}

/// False for kernels of long runs, and of more rows than decoding has.
fn decodes(kernel: &Kernel) -> bool {
    !["many", "long", "bulk"].iter().any(|part| kernel.name.ends_with(&format!(".{part}")))
}

/// The models by name; of the official one also what reads and writes KV in 8 bits.
fn models() -> Vec<(&'static str, KernelModule)> {
    let official = repository().join("examples/qwen3-next-80b-a3b/config.json");
    let fixture = |name| (name, repository().join("tests/oracle").join(name).join("config.json"));
    let configs: Vec<(&str, PathBuf)> =
        std::iter::once(("official", official.clone())).chain(FIXTURES.map(fixture)).collect();
    let whole = configs.into_iter().map(|(name, config)| (name, kernels(&config, Stored::Bf16)));
    let of_kv = [("official --kv int8", Stored::Int8), ("official --kv fp8", Stored::Fp8)];
    let parts = of_kv.into_iter().map(|(name, kv)| (name, with_kv(kernels(&official, kv))));
    whole.chain(parts).collect()
}

/// The kernels that read or write KV.
fn with_kv(module: KernelModule) -> KernelModule {
    let kernels = module.kernels.into_iter().filter(|k| k.params.iter().any(|p| p.name == "kv")).collect();
    KernelModule { kernels, programs: Vec::new(), ..module }
}

/// Emits and assembles a kernel, and looks at both texts.
fn make(kernel: &Kernel, module: &KernelModule, ptx: &str) -> Result<Vec<ptxas::Entry>, String> {
    let ir = nextc_llvm::ir(module, &target(), &kernel.name).map_err(|e| e.to_string())?;
    let ordered = ir.lines().find(|l| l.contains("atomicrmw") && !l.contains(" monotonic"));
    if let Some(line) = ordered {
        return Err(format!("LLVM drops the ordering of `{}` on the way to PTX", line.trim()));
    }
    ptxas::assemble(ptx)
}

/// What each kernel came to; equal texts of PTX are assembled once.
fn make_all(models: &[(&str, KernelModule)]) -> BTreeMap<(usize, usize), Result<Vec<ptxas::Entry>, String>> {
    let texts: Vec<Vec<Vec<u8>>> = models
        .iter()
        .map(|(name, m)| nextc_llvm::compile(m, &target()).unwrap_or_else(|e| panic!("{name}: {e}")))
        .collect();
    let all = models.iter().enumerate().flat_map(|(m, (_, module))| (0..module.kernels.len()).map(move |k| (m, k)));
    let mut seen = std::collections::HashSet::new();
    let work: Vec<(usize, usize)> = all.filter(|&(m, k)| seen.insert(&texts[m][k])).collect();
    let (next, made) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(&(m, k)) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let module = &models[m].1;
                    let result = make(&module.kernels[k], module, &String::from_utf8_lossy(&texts[m][k]));
                    made.lock().expect("nobody panicked").insert((m, k), result);
                }
            });
        }
    });
    made.into_inner().expect("nobody panicked")
}

#[test]
fn every_kernel_assembles_with_the_registers_that_are_kept() {
    let models = models();
    let mut table = String::from(
        "model kernel: threads, bytes of shared memory, registers of body and tail, and bytes that they spill\n",
    );
    let mut errors = String::new();
    for ((m, k), made) in make_all(&models) {
        let (name, module) = &models[m];
        let kernel = &module.kernels[k];
        match made {
            Err(error) => writeln!(errors, "{name}: kernel @{}: {error}\n", kernel.name),
            Ok(entries) if kernel.is_block() => {
                if decodes(kernel) && entries.iter().any(|e| e.spilled_bytes > 0) {
                    writeln!(errors, "{name}: kernel @{} decodes, and spills: {entries:?}\n", kernel.name)
                        .expect("a string takes everything");
                }
                let size = |e: &ptxas::Entry| match e.spilled_bytes {
                    0 => e.registers.to_string(),
                    bytes => format!("{} ({bytes} B spilled)", e.registers),
                };
                let registers: Vec<String> = entries.iter().map(size).collect();
                let (threads, shared) = (kernel.threads, kernel.shared_bytes());
                writeln!(table, "{name} {}: {threads}, {shared} B, {}", kernel.name, registers.join(" + "))
            }
            Ok(_) => Ok(()),
        }
        .expect("a string takes everything");
    }
    assert!(errors.is_empty(), "\n{errors}");
    compare(&table);
}

/// Compares with the table that is kept, or keeps this one.
fn compare(table: &str) {
    let path = repository().join("tests/ptx/registers.txt");
    if std::env::var_os("BLESS").is_some_and(|v| v == "1") {
        return std::fs::write(&path, table).expect("it can be written");
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<std::collections::BTreeSet<_>>();
    let (kept, found) = (lines(&kept), lines(table));
    let list = |lines: Vec<&String>| lines.into_iter().map(|l| format!("  {l}\n")).collect::<String>();
    let (gone, new) = (list(kept.difference(&found).collect()), list(found.difference(&kept).collect()));
    assert!(kept == found, "{} no longer holds; was\n{gone}is\n{new}BLESS=1 keeps what is", path.display());
}
