//! The interpreters as subjects: of the graph before rewriting, of the graph after it, and of the kernels.

use std::os::unix::fs::FileExt;
use std::path::Path;

use nextc_ir::eval::{Outputs, Session, StepInputs};
use nextc_ir::kernel::eval::{self as kernel_eval, Buffer, Options};
use nextc_ir::schedule::{Input, KernelModule, PackedWeight};
use nextc_ir::shape::pad;
use nextc_ir::{Module, Target};

use super::{Feed, Rows, Subject, argmax};

/// A model in an interpreter.
pub struct Interpreter {
    model: nextc_frontend::Model,
    module: Module,
    kernels: Option<Kernels>,
}

/// The kernels of a module and its weights as packed.
struct Kernels {
    module: KernelModule,
    weights: Vec<Buffer>,
}

/// Something that takes steps and keeps states.
trait Stepper {
    fn step(&mut self, entry: &str, inputs: &StepInputs<f32>) -> Outputs<f32>;
}

impl Stepper for Session<'_, f32> {
    fn step(&mut self, entry: &str, inputs: &StepInputs<f32>) -> Outputs<f32> {
        Session::step(self, entry, inputs).expect("the step runs")
    }
}

/// The kernel interpreter with its states.
struct KernelSession<'k> {
    kernels: &'k Kernels,
    interpreter: kernel_eval::Interpreter<'k>,
    states: Vec<Buffer>,
}

impl Stepper for KernelSession<'_> {
    fn step(&mut self, entry: &str, inputs: &StepInputs<f32>) -> Outputs<f32> {
        let dims = [inputs.tokens.len(), inputs.slot.len(), inputs.pages_per_sequence, inputs.logit_rows.len()];
        let rows = |data: &[f32]| {
            let width = self.kernels.module.info.hidden_size as usize;
            let padded = pad(width as u64) as usize;
            let row =
                |r: &[f32]| r.iter().copied().chain(std::iter::repeat_n(0.0, padded - width)).collect::<Vec<f32>>();
            Buffer::from_f32(&data.chunks(width).flat_map(row).collect::<Vec<f32>>())
        };
        let zeros = || Buffer::from_i32(&vec![0; inputs.slot.len()]);
        let mut buffers = vec![
            (Input::Tokens, Buffer::from_i32(&inputs.tokens)),
            (Input::Positions, Buffer::from_i32(&inputs.positions)),
            (Input::CuSeqlens, Buffer::from_i32(&inputs.cu_seqlens)),
            (Input::Slot, Buffer::from_i32(&inputs.slot)),
            (Input::Replay, zeros()),
            (Input::Tentative, zeros()),
            (Input::PageTable, Buffer::from_i32(&inputs.page_table)),
            (Input::LogitRows, Buffer::from_i32(&inputs.logit_rows)),
        ];
        buffers.extend(inputs.hidden.as_ref().map(|h| (Input::Hidden, rows(h))));
        let (weights, states) = (&self.kernels.weights, &mut self.states);
        let out = self.interpreter.run_program(entry, dims.map(|n| n as u64), &buffers, weights, states);
        let [logits, hidden, best] =
            <[_; 3]>::try_from(out.expect("the kernels run")).expect("logits, hidden and best");
        let best = best.values.iter().map(|x| x.to_bits().cast_signed()).collect();
        Outputs { logits: logits.values, hidden: hidden.values, best }
    }
}

const PAGE_TOKENS: usize = 64;
/// Pages and sequences that the kernel interpreter has room for.
const ROOM: (u64, u64) = (64, 8);

impl Interpreter {
    /// The graph as the frontend builds it.
    pub fn plain(dir: &Path) -> Self {
        Self::quantised(dir, None)
    }

    /// The graph with weights rounded to other formats.
    pub fn quantised(dir: &Path, quant: Option<nextc_frontend::Quant>) -> Self {
        let options = nextc_frontend::Options { quant: quant.into(), ..nextc_frontend::Options::default() };
        let model = nextc_frontend::load(dir, &options).expect("the fixture loads");
        let module = model.module.clone();
        Self { model, module, kernels: None }
    }

    /// The graph after all passes for a backend with vectors of so many bits.
    pub fn fused(dir: &Path, target: &Target) -> Self {
        Self::fused_of(Self::plain(dir), target)
    }

    fn fused_of(plain: Self, target: &Target) -> Self {
        let module = nextc_passes::run_all(plain.module, target).expect("the passes run");
        Self { module, ..plain }
    }

    /// The kernels as a backend gets them.
    pub fn kernels(dir: &Path, target: &Target) -> Self {
        Self::quantised_kernels(dir, None, target)
    }

    /// The same with weights rounded to other formats.
    pub fn quantised_kernels(dir: &Path, quant: Option<nextc_frontend::Quant>, target: &Target) -> Self {
        let fused = Self::fused_of(Self::quantised(dir, quant), target);
        let module = nextc_passes::lower::lower(&fused.module, target).expect("the module lowers");
        let module = nextc_passes::legalise::legalise(module, target).expect("the kernels legalise");
        let weights = packed(&module, fused.model.source.as_ref().expect("the fixture has weights"));
        Self { kernels: Some(Kernels { module, weights }), ..fused }
    }

    fn stepper(&self) -> Box<dyn Stepper + '_> {
        let Some(kernels) = &self.kernels else {
            let source = self.model.source.as_ref().expect("the fixture has weights");
            return Box::new(Session::<f32>::new(&self.module, source, PAGE_TOKENS).expect("the weights load"));
        };
        let interpreter = kernel_eval::Interpreter::new(&kernels.module, Options::default()).expect("sound kernels");
        let states = interpreter.states(ROOM.0, ROOM.1);
        Box::new(KernelSession { kernels, interpreter, states })
    }
}

/// The weights as the packer writes them.
fn packed(module: &KernelModule, source: &dyn nextc_ir::WeightSource) -> Vec<Buffer> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("weights");
    let options = std::fs::OpenOptions::new().read(true).write(true).create_new(true).open(&path);
    let file = options.expect("the file is made");
    nextc_link::pack::pack(&module.weights, source, (&file, &path), 0, false).expect("the weights pack");
    let placement = nextc_link::pack::place(&module.weights);
    let read = |(w, &at): (&PackedWeight, &u64)| {
        let mut bytes = vec![0; w.bytes() as usize];
        file.read_exact_at(&mut bytes, at).expect("the file has the weight");
        Buffer::from_bytes(&bytes)
    };
    module.weights.iter().zip(&placement.offsets).map(read).collect()
}

/// Where each sequence stands.
struct Cursor {
    at: usize,
    hidden: Vec<f32>,
}

impl Subject for Interpreter {
    fn logits(&self, sequences: &[Vec<i32>], feed: Feed, drafts: usize) -> Vec<Rows> {
        let mut session = self.stepper();
        let vocab = self.module.info.vocab_size as usize;
        let width = self.module.info.hidden_size as usize;
        let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
        let pages = (longest + drafts).div_ceil(PAGE_TOKENS) + 1;
        let piece = match feed {
            Feed::Prefill => longest,
            Feed::Pieces(n) => n,
            Feed::Decode => 1,
        };
        let mut rows: Vec<Rows> = sequences.iter().map(|_| Rows { logits: Vec::new(), mtp: Vec::new() }).collect();
        let mut cursors: Vec<Cursor> = sequences.iter().map(|_| Cursor { at: 0, hidden: Vec::new() }).collect();
        while cursors.iter().zip(sequences).any(|(c, s)| c.at < s.len()) {
            let (inputs, live) = ragged(sequences, &cursors, piece, pages);
            let out = session.step("step", &inputs);
            let mut row = 0;
            for (s, count) in live {
                rows[s].logits.extend(&out.logits[row * vocab..(row + count) * vocab]);
                cursors[s].hidden.extend(&out.hidden[row * width..(row + count) * width]);
                cursors[s].at += count;
                row += count;
            }
        }
        for (s, tokens) in sequences.iter().enumerate().filter(|_| drafts > 0) {
            rows[s].mtp =
                self.drafts(session.as_mut(), (s, tokens), (&rows[s].logits, &cursors[s].hidden), drafts, pages);
        }
        rows
    }
}

/// The inputs of the next step: the next piece of each sequence that has one, and which those are.
fn ragged(
    sequences: &[Vec<i32>],
    cursors: &[Cursor],
    piece: usize,
    pages: usize,
) -> (StepInputs<f32>, Vec<(usize, usize)>) {
    let mut inputs = StepInputs { cu_seqlens: vec![0], pages_per_sequence: pages, ..StepInputs::default() };
    let mut live = Vec::new();
    for (s, (tokens, cursor)) in sequences.iter().zip(cursors).enumerate() {
        let count = piece.min(tokens.len() - cursor.at);
        if count == 0 {
            continue;
        }
        inputs.tokens.extend(&tokens[cursor.at..cursor.at + count]);
        inputs.positions.extend((cursor.at..cursor.at + count).map(|p| p as i32));
        inputs.cu_seqlens.push(inputs.tokens.len() as i32);
        inputs.slot.push(s as i32);
        inputs.page_table.extend((0..pages).map(|p| (s * pages + p) as i32));
        live.push((s, count));
    }
    inputs.logit_rows = (0..inputs.tokens.len() as i32).collect();
    (inputs, live)
}

impl Interpreter {
    /// `[T, K, vocab]`: for each position in ascending order, a chain of drafts; what a chain writes beyond its position is
    /// overwritten or masked later.
    fn drafts(
        &self,
        session: &mut dyn Stepper,
        (slot, tokens): (usize, &[i32]),
        (logits, hidden): (&[f32], &[f32]),
        drafts: usize,
        pages: usize,
    ) -> Vec<f32> {
        let vocab = self.module.info.vocab_size as usize;
        let width = self.module.info.hidden_size as usize;
        let mut out = Vec::new();
        for t in 0..tokens.len() {
            let greedy = || argmax(&logits[t * vocab..(t + 1) * vocab]) as i32;
            let mut token = tokens.get(t + 1).copied().unwrap_or_else(greedy);
            let mut row = hidden[t * width..(t + 1) * width].to_vec();
            for k in 0..drafts {
                let inputs = StepInputs {
                    page_table: (0..pages).map(|p| (slot * pages + p) as i32).collect(),
                    hidden: Some(row),
                    ..StepInputs::sequence(&[token], (t + k) as i32, pages)
                };
                let step = session.step("draft", &inputs);
                token = argmax(&step.logits) as i32;
                row = step.hidden;
                out.extend(step.logits);
            }
        }
        out
    }
}
