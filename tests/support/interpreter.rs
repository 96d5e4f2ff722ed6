//! The graph interpreter as a subject: before rewriting, or after.

use std::path::Path;

use nextc_ir::eval::{Session, StepInputs};
use nextc_ir::{Module, Target};

use super::{Feed, Rows, Subject, argmax};

/// A module with its weights, in the interpreter.
pub struct Interpreter {
    model: nextc_frontend::Model,
    module: Module,
}

const PAGE_TOKENS: usize = 64;

impl Interpreter {
    /// The graph as the frontend builds it.
    pub fn plain(dir: &Path) -> Self {
        let model = nextc_frontend::load(dir, &nextc_frontend::Options::default()).expect("the fixture loads");
        let module = model.module.clone();
        Self { model, module }
    }

    /// The graph after all passes.
    pub fn fused(dir: &Path) -> Self {
        let plain = Self::plain(dir);
        let module = nextc_passes::run_all(plain.module, &Target::cpu("x86-64-v3", &[], 256)).expect("the passes run");
        Self { module, ..plain }
    }
}

/// Where each sequence stands.
struct Cursor {
    at: usize,
    hidden: Vec<f32>,
}

impl Subject for Interpreter {
    fn logits(&self, sequences: &[Vec<i32>], feed: Feed, drafts: usize) -> Vec<Rows> {
        let source = self.model.source.as_ref().expect("the fixture has weights");
        let mut session = Session::<f32>::new(&self.module, source, PAGE_TOKENS).expect("the weights load");
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
            let out = session.step("step", &inputs).expect("the step runs");
            let mut row = 0;
            for (s, count) in live {
                rows[s].logits.extend(&out.logits[row * vocab..(row + count) * vocab]);
                cursors[s].hidden.extend(&out.hidden[row * width..(row + count) * width]);
                cursors[s].at += count;
                row += count;
            }
        }
        for (s, tokens) in sequences.iter().enumerate().filter(|_| drafts > 0) {
            rows[s].mtp = self.drafts(&mut session, (s, tokens), (&rows[s].logits, &cursors[s].hidden), drafts, pages);
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
        session: &mut Session<'_, f32>,
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
                let step = session.step("draft", &inputs).expect("the draft runs");
                token = argmax(&step.logits) as i32;
                row = step.hidden;
                out.extend(step.logits);
            }
        }
        out
    }
}
