//! A toy model for tests of link and runtime: the logits of a token are the sum of the embeddings of its sequence so far, once
//! summed in a `delta` state and once more over the pages of `kv`.

use std::io::ErrorKind;
use std::path::Path;
use std::process::{self, Command};

use nextc_ir::format::Format;
use nextc_ir::graph::{ModelInfo, Origin, Placement, RowRun, WeightDecl};
use nextc_ir::kernel::{Kernel, KernelBuilder, Pred, Val};
use nextc_ir::layout::Layout;
use nextc_ir::schedule::{
    ArenaPlan, Arg, Extent, Input, KernelModule, Launch, Output, PackedWeight, Program, StateDecl,
};
use nextc_ir::shape::Sym;
use nextc_ir::source::{SourceError, StoredTensor, WeightSource};
use nextc_ir::types::{StateKind, StateType};
use nextc_ir::{Stored, Target};
use nextc_link::{LinkError, LinkInputs, Report, Version};

/// Width of everything, and size of the vocabulary.
pub const WIDTH: usize = 16;
/// Tokens in a page.
const PAGE_TOKENS: u64 = 4;
/// The longest context.
pub const MAX_CONTEXT: u64 = 24;

/// The embedding of a token.
pub fn embedding(token: u32) -> Vec<f32> {
    (0..WIDTH as u32).map(|j| ((token * 7 + j * 3) % 11) as f32 - 5.0).collect()
}

/// The logits after each token of a sequence.
pub fn logits(tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut sum = [0.0; WIDTH];
    let mut step = |&token: &u32| {
        sum.iter_mut().zip(embedding(token)).for_each(|(s, x)| *s += x);
        sum.iter().map(|s| 2.0 * s).collect()
    };
    tokens.iter().map(&mut step).collect()
}

/// The checkpoint: the embedding, and a matrix that no kernel reads.
pub struct Checkpoint;

impl WeightSource for Checkpoint {
    fn tensor(&self, name: &str) -> Option<StoredTensor> {
        let shape = match name {
            "embed" => vec![WIDTH as u64, WIDTH as u64],
            "matrix" => vec![40, 24],
            _ => return None,
        };
        Some(StoredTensor { shape, format: Format::F32 })
    }

    fn read_rows(&self, name: &str, first: u64, out: &mut [f32]) -> Result<(), SourceError> {
        match name {
            "embed" => {
                for (row, out) in (first..).zip(out.chunks_exact_mut(WIDTH)) {
                    out.copy_from_slice(&embedding(row as u32));
                }
            }
            _ => out.iter_mut().zip(first * 24..).for_each(|(x, i)| *x = matrix_value(i)),
        }
        Ok(())
    }
}

/// Number `i` of the matrix, exact in bf16.
pub fn matrix_value(i: u64) -> f32 {
    (i % 127) as f32 - 63.0
}

/// The toy model.
pub fn module() -> KernelModule {
    let info = ModelInfo {
        name: "toy".to_owned(),
        vocab_size: WIDTH as u64,
        hidden_size: WIDTH as u64,
        num_layers: 1,
        max_context: MAX_CONTEXT,
        eos_token_ids: vec![1],
        mtp: true,
        has_weights: true,
    };
    let state = |name: &str, kind, dims: &[u64]| StateDecl {
        name: name.to_owned(),
        ty: StateType { kind, dims: dims.to_vec(), stored: Stored::F32 },
    };
    KernelModule {
        info,
        kernels: vec![embed(), accumulate(), append(), read(), head(), draft_rows()],
        programs: vec![step(), draft(), sample()],
        weights: weights(),
        states: vec![
            state("layers.0.delta", StateKind::Delta, &[1, 1, 16]),
            state("layers.0.kv", StateKind::Kv, &[1, 16]),
        ],
        arena: ArenaPlan { fixed_bytes: 0, unit_bytes: [192, 0, 0, 128] },
        page_tokens: PAGE_TOKENS,
    }
}

fn weights() -> Vec<PackedWeight> {
    let rows = |tensor: &str, rows| Origin::Rows(vec![RowRun { tensor: tensor.to_owned(), first: 0, rows, column: 0 }]);
    let embed = WeightDecl { shape: vec![16, 16], in_rank: 0, format: Format::F32, origin: rows("embed", 16) };
    let matrix = WeightDecl { shape: vec![2, 20, 24], in_rank: 1, format: Format::Bf16, origin: rows("matrix", 40) };
    let table =
        WeightDecl { shape: vec![3], in_rank: 0, format: Format::F32, origin: Origin::Values(vec![1.0, 2.0, 3.0]) };
    let weight = |name: &str, decl, layout| PackedWeight { name: name.to_owned(), decl, layout };
    vec![
        weight("embed", embed, Layout::Flat),
        weight("matrix", matrix, Layout::Tile16),
        weight("table", table, Layout::Flat),
    ]
}

const fn at(unit: Sym, at_bytes: u64) -> Placement {
    Placement { unit: Some(unit), at_bytes }
}
const X: Arg = Arg::Arena(at(Sym::T, 0));
const Y: Arg = Arg::Arena(at(Sym::T, 64));
const HIDDEN: Placement = at(Sym::T, 128);
const Z: Arg = Arg::Arena(HIDDEN);
const LOGITS: Placement = at(Sym::R, 0);
const BEST: Placement = at(Sym::R, 64);

fn launch(kernel: u32, args: &[Arg]) -> Launch {
    Launch { kernel, args: args.to_vec(), label: format!("kernel {kernel}") }
}

fn outputs() -> Vec<Output> {
    let output = |name: &str, at, rows| Output { name: name.to_owned(), at, rows, width: 16, stride: 16 };
    vec![output("logits", LOGITS, Sym::R), output("hidden", HIDDEN, Sym::T), tokens("best")]
}

fn tokens(name: &str) -> Output {
    Output { name: name.to_owned(), at: BEST, rows: Sym::R, width: 1, stride: 1 }
}

fn step() -> Program {
    use Input::{CuSeqlens, LogitRows, PageTable, Positions, Slot, Tokens};
    let sequences = [Positions, CuSeqlens, Slot, PageTable].map(Arg::Input);
    let (delta, kv) = (Arg::State(0), Arg::State(1));
    let with = |first: Arg, last: &[Arg]| [&[first], &sequences[..], last].concat();
    let launches = vec![
        launch(0, &[Arg::Input(Tokens), Arg::Weight(0), X]),
        launch(1, &with(X, &[delta, Y])),
        launch(2, &with(X, &[kv])),
        launch(3, &with(Y, &[kv, Z])),
        launch(4, &[Z, Arg::Input(LogitRows), Arg::Arena(LOGITS), Arg::Arena(BEST)]),
    ];
    Program { name: "step".to_owned(), launches, outputs: outputs(), row_bytes: 128 }
}

fn draft() -> Program {
    let [tokens, hidden, rows] = [Input::Tokens, Input::Hidden, Input::LogitRows].map(Arg::Input);
    let launches = vec![
        launch(5, &[tokens, hidden, Arg::Weight(0), Z]),
        launch(4, &[Z, rows, Arg::Arena(LOGITS), Arg::Arena(BEST)]),
    ];
    Program { name: "draft".to_owned(), launches, outputs: outputs(), row_bytes: 128 }
}

/// Whatever is asked for, the likeliest tokens of the step.
fn sample() -> Program {
    Program { name: "sample".to_owned(), launches: Vec::new(), outputs: vec![tokens("tokens")], row_bytes: 128 }
}

/// `base + row * 16 + j` as an element's index.
fn element(k: &mut KernelBuilder, row: Val, j: Val) -> Val {
    let row = k.mul_const(row, 16);
    k.add(row, j)
}

fn copy_row(k: &mut KernelBuilder, (from, from_row): (Val, Val), (to, to_row): (Val, Val)) {
    k.for_range(16, 1, |k, j| {
        let source = element(k, from_row, j);
        let target = element(k, to_row, j);
        let x = k.load_f32(from, source);
        k.store(to, target, x);
    });
}

fn embed() -> Kernel {
    let mut k = KernelBuilder::new("embed", &[("tokens", false), ("w", false), ("x", true)], Extent::from(Sym::T));
    let (tokens, w, x, t) = (k.param(0), k.param(1), k.param(2), k.task());
    let token = k.load_index(tokens, t);
    copy_row(&mut k, (w, token), (x, t));
    k.finish()
}

const SEQUENCES: [(&str, bool); 4] =
    [("positions", false), ("cu_seqlens", false), ("slot", false), ("page_table", false)];

/// A kernel with a task a sequence, if that is no padding; `body` gets the parameters, the sequence's slot, and each token and its position.
fn per_sequence(name: &str, last: &[(&str, bool)], body: impl Fn(&mut KernelBuilder, Val, Val, Val)) -> Kernel {
    let params = [&[("x", false)], &SEQUENCES[..], last].concat();
    let mut k = KernelBuilder::new(name, &params, Extent::from(Sym::B));
    let (positions, cu_seqlens, slot, b) = (k.param(1), k.param(2), k.param(3), k.task());
    let next = k.add_const(b, 1);
    let (begin, end) = (k.load_index(cu_seqlens, b), k.load_index(cu_seqlens, next));
    let slot = k.load_index(slot, b);
    let zero = k.const_i64(0);
    let exists = k.cmp(Pred::Ge, slot, zero);
    k.if_then(exists, |k| {
        k.for_each((begin, end, 1), |k, t| {
            let position = k.load_index(positions, t);
            body(k, slot, t, position);
        });
    });
    k.finish()
}

fn accumulate() -> Kernel {
    per_sequence("accumulate", &[("delta", true), ("y", true)], |k, slot, t, position| {
        let (x, delta, y) = (k.param(0), k.param(5), k.param(6));
        let one = k.const_i64(1);
        let old = k.min_i64(position, one);
        let old = k.narrow(old);
        let old = k.to_float(old);
        k.for_range(16, 1, |k, j| {
            let (own, state) = (element(k, t, j), element(k, slot, j));
            let (value, before) = (k.load_f32(x, own), k.load_f32(delta, state));
            let kept = k.fmul(before, old);
            let sum = k.fadd(kept, value);
            k.store(delta, state, sum);
            k.store(y, own, sum);
        });
    })
}

/// The first element's index of a position's key in `kv`.
fn kv_index(k: &mut KernelBuilder, page_table: Val, position: Val) -> Val {
    let page = k.div_const(position, PAGE_TOKENS);
    let row = k.mul(k.task(), k.dim(Sym::P));
    let entry = k.add(row, page);
    let page = k.load_index(page_table, entry);
    let page = k.mul_const(page, 2 * PAGE_TOKENS);
    let place = k.rem_const(position, PAGE_TOKENS);
    k.add(page, place)
}

fn append() -> Kernel {
    per_sequence("append", &[("kv", true)], |k, _, t, position| {
        let (x, page_table, kv) = (k.param(0), k.param(4), k.param(5));
        let row = kv_index(k, page_table, position);
        copy_row(k, (x, t), (kv, row));
    })
}

fn read() -> Kernel {
    per_sequence("read", &[("kv", false), ("z", true)], |k, _, t, position| {
        let (y, page_table, kv, z) = (k.param(0), k.param(4), k.param(5), k.param(6));
        let (zero, end) = (k.const_i64(0), k.add_const(position, 1));
        k.for_range(16, 1, |k, j| {
            let own = element(k, t, j);
            let first = k.load_f32(y, own);
            let sum = k.for_carry((zero, end, 1), &[first], |k, past, sum| {
                let row = kv_index(k, page_table, past);
                let at = element(k, row, j);
                let value = k.load_f32(kv, at);
                vec![k.fadd(sum[0], value)]
            });
            k.store(z, own, sum[0]);
        });
    })
}

fn head() -> Kernel {
    let params = [("z", false), ("rows", false), ("logits", true), ("best", true)];
    let mut k = KernelBuilder::new("head", &params, Extent::from(Sym::R));
    let (z, rows, logits, r) = (k.param(0), k.param(1), k.param(2), k.task());
    let row = k.load_index(rows, r);
    copy_row(&mut k, (z, row), (logits, r));
    let (zero, first, lowest) = (k.const_i64(0), k.const_i32(0), k.const_f32(f32::NEG_INFINITY));
    let end = k.const_i64(16);
    let best = k.for_carry((zero, end, 1), &[first, lowest], |k, j, best| {
        let at = element(k, r, j);
        let (x, token) = (k.load_f32(logits, at), k.narrow(j));
        let more = k.cmp(Pred::Gt, x, best[1]);
        vec![k.select(more, token, best[0]), k.select(more, x, best[1])]
    });
    k.store(k.param(3), r, best[0]);
    k.finish()
}

/// Hidden rows are the given ones plus twice the token's embedding: what `step` would give.
fn draft_rows() -> Kernel {
    let params = [("tokens", false), ("hidden", false), ("w", false), ("out", true)];
    let mut k = KernelBuilder::new("draft_rows", &params, Extent::from(Sym::T));
    let [tokens, hidden, w, out] = std::array::from_fn(|i| k.param(i));
    let row = k.task();
    let token = k.load_index(tokens, row);
    k.for_range(16, 1, |k, j| {
        let (at, embedded) = (element(k, row, j), element(k, token, j));
        let (h, e) = (k.load_f32(hidden, at), k.load_f32(w, embedded));
        let e = k.fadd(e, e);
        let sum = k.fadd(h, e);
        k.store(out, at, sum);
    });
    k.finish()
}

/// The better of two CPUs.
pub const WIDE: &str = "x86-64-v4";

/// How the toy model is linked.
#[derive(Clone, Copy, Debug, Default)]
pub struct How {
    /// Put the weights into the executable.
    pub embed: bool,
    /// Leave the weights out.
    pub config_only: bool,
    /// With code for two CPUs, the better one of which is [`WIDE`].
    pub two_cpus: bool,
    /// For a GPU, with a text a kernel that says where its code for the processor is: see `stand_in/driver.c`.
    pub stand_in: bool,
    /// Binaries beside the texts of a GPU: such as the driver takes, and then the texts lead nowhere; or such as it refuses.
    pub binaries: Option<bool>,
}

/// Texts and binaries of kernels for which `good` are the texts.
fn with_binaries(good: Vec<Vec<u8>>, taken: Option<bool>) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let bad = |text: &[u8]| vec![text.to_vec(); good.len()];
    match taken {
        None => (good, Vec::new()),
        Some(true) => (bad(b"not a text"), good.iter().map(|text| [text, &b"\0"[..]].concat()).collect()),
        Some(false) => {
            let binaries = bad(b"\x7fELF for another GPU\0");
            (good, binaries)
        }
    }
}

/// Compiles and links the toy model.
pub fn link(output: &Path, how: How) -> Result<Report, LinkError> {
    let module = module();
    let cpu = Target::cpu("x86-64-v3", &["avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "popcnt"], 128);
    // the same code, but it says that it needs more
    let wide = Target::cpu(WIDE, &["avx512f", "avx512vl", "avx512bw", "avx512dq", "avx512cd"], 512);
    let object = nextc_cranelift::compile(&module, &cpu).expect("the toy kernels compile");
    let (target, (objects, binaries)) = match how.stand_in {
        false => (cpu, (vec![object], Vec::new())),
        true => {
            let texts = stand_in_texts(output, &module, &object);
            (Target::gpu("sm_90a").expect("a GPU that is known"), with_binaries(texts, how.binaries))
        }
    };
    let version = |target, objects| Version { objects, binaries: &binaries, module: &module, graph: None, target };
    let mut versions = vec![version(&target, objects.as_slice())];
    if how.two_cpus {
        versions.insert(0, version(&wide, objects.as_slice()));
    }
    nextc_link::link(&LinkInputs {
        versions: &versions,
        backend: "cranelift",
        compiler: "test",
        source: (!how.config_only).then_some(&Checkpoint as &dyn WeightSource),
        assets: &[("tokenizer_config.json".to_owned(), b"{}".to_vec())],
        output,
        embed_weights: how.embed,
        progress: false,
    })
}

/// Puts the kernels into a shared library beside the executable, and gives the texts that lead to it.
fn stand_in_texts(output: &Path, module: &KernelModule, object: &[u8]) -> Vec<Vec<u8>> {
    let (from, to) = (output.with_extension("o"), output.with_extension("so"));
    std::fs::write(&from, object).expect("a place for the object");
    compile_c(&from, &to);
    let text = |k: &Kernel| format!("{} {}", k.params.len(), to.display()).into_bytes();
    module.kernels.iter().map(text).collect()
}

/// Lets the C compiler make a shared library.
pub fn compile_c(from: &Path, to: &Path) {
    let status = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(to).arg(from).status();
    assert!(status.expect("there is a C compiler").success(), "{}", from.display());
}

/// Runs a command to its end; again while its file counts as open for writing: a file is written here, and a child that another test starts meanwhile
/// holds all descriptors until it is itself.
pub fn output(command: &mut Command) -> process::Output {
    loop {
        match command.output() {
            Err(e) if e.kind() == ErrorKind::ExecutableFileBusy => std::thread::yield_now(),
            output => return output.unwrap(),
        }
    }
}
