//! `eval`: logits and perplexity of given token ids, in prefill or decode steps, alone or as a batch.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use nextc_abi::Model;
use serde_json::{Value, json};

use crate::artifact::Artifact;
use crate::cli::MachineArgs;
use crate::engine::draft::{DraftInput, HiddenRows};
use crate::engine::{Engine, LogitRows};
use crate::error::Error;
use crate::piece::{Steps, Unread};
use crate::sample::SampleError;
use crate::state::SequenceId;
use crate::step::Rows;
use crate::tensors::{TensorFile, TensorSpec};

/// Arguments of `eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// File with a JSON array of token ids, or an array of such arrays: a batch
    #[arg(long, value_name = "IDS.json")]
    tokens: PathBuf,
    /// File to write the logits to, as safetensors
    #[arg(long, value_name = "OUT.safetensors")]
    out: Option<PathBuf>,
    /// Whole sequences in one step, or token by token
    #[arg(long, value_enum, default_value_t = Mode::Prefill)]
    mode: Mode,
    /// In prefill, feed at most N tokens of a sequence in one step
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    step_tokens: Option<u32>,
    /// Also K drafts by multi-token prediction after each position
    #[arg(long, value_name = "K", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=64))]
    mtp: u32,
    /// Begin anew every N tokens
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), conflicts_with = "mtp")]
    window: Option<u32>,
    #[command(flatten)]
    machine: MachineArgs,
}

/// How sequences are cut into steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Whole sequences, or pieces of `--step-tokens`
    Prefill,
    /// One token a step
    Decode,
}

/// Runs `eval`.
/// # Errors
/// [`Error`] says which file or token is wrong; the output file is written only if everything went well.
pub fn run(artifact: Artifact, args: &EvalArgs) -> Result<(), Error> {
    let batch = Batch::read(&args.tokens)?;
    if args.mtp > 0 && !artifact.metadata().model.mtp {
        return Err(Error::NoMtp { model: artifact.metadata().model.name.clone(), option: "--mtp" });
    }
    batch.check(&artifact.metadata().model, args.window)?;
    let mut engine = Engine::new(artifact, &args.machine.engine(batch.sequences.len()))?;
    let vocab_size = engine.metadata().model.vocab_size;
    let out =
        args.out.as_deref().map(|path| TensorFile::create(path, &batch.tensors(vocab_size, args.mtp))).transpose()?;
    let mut eval = Eval { batch: &batch, drafts: args.mtp as usize, out, loss: Loss::default() };
    let begun = std::time::Instant::now();
    eval.run(&mut engine, args)?;
    let seconds = begun.elapsed().as_secs_f64();
    if let Some(out) = eval.out {
        out.finish()?;
    }
    println!("{}", report(&batch, &eval.loss, seconds));
    Ok(())
}

fn report(batch: &Batch, loss: &Loss, seconds: f64) -> Value {
    let mean = (loss.tokens > 0).then(|| loss.nats / loss.tokens as f64);
    let fed: usize = batch.sequences.iter().map(Vec::len).sum();
    json!({
        "tokens": loss.tokens,
        "nats_per_token": mean,
        "perplexity": mean.map(f64::exp),
        "sequences": batch.sequences.len(),
        "fed_tokens": fed,
        "seconds": seconds,
    })
}

/// The sequences of a file of token ids.
#[derive(Debug)]
struct Batch {
    sequences: Vec<Vec<u32>>,
    /// True if the file holds an array of arrays: its tensors are numbered.
    numbered: bool,
}

impl Batch {
    fn read(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read(path).map_err(Error::io(path))?;
        let error = |reason: String| Error::Input { path: path.to_owned(), reason };
        let value: Value = serde_json::from_slice(&text).map_err(|e| error(e.to_string()))?;
        let batch = Self::parse(&value).map_err(error)?;
        match batch.sequences.iter().position(Vec::is_empty) {
            Some(i) => Err(Error::Input { path: path.to_owned(), reason: format!("sequence {i} has no tokens") }),
            None => Ok(batch),
        }
    }

    fn parse(value: &Value) -> Result<Self, String> {
        let expected = "expected a JSON array of token ids, or an array of such arrays";
        let items = value.as_array().filter(|a| !a.is_empty()).ok_or(expected)?;
        let numbered = items.iter().any(Value::is_array);
        let ids = |v: &Value| serde_json::from_value::<Vec<u32>>(v.clone()).map_err(|e| format!("{e}; {expected}"));
        let sequences = if numbered { items.iter().map(ids).collect::<Result<_, _>>()? } else { vec![ids(value)?] };
        Ok(Self { sequences, numbered })
    }

    /// Refuses tokens and lengths that the model does not take, before anything runs.
    fn check(&self, model: &Model, window: Option<u32>) -> Result<(), Error> {
        let (vocab_size, max_context) = (model.vocab_size, model.max_context);
        for (sequence, tokens) in self.sequences.iter().enumerate() {
            let unknown = tokens.iter().position(|&t| u64::from(t) >= vocab_size);
            if let Some(index) = unknown {
                return Err(Error::Token { token: tokens[index], index, sequence, vocab_size });
            }
            let adding = (tokens.len() as u64).min(window.map_or(u64::MAX, u64::from));
            if adding > max_context {
                return Err(Error::Context { sequence, have: 0, adding, max_context });
            }
        }
        Ok(())
    }

    /// The name of a tensor of sequence `i`.
    fn name(&self, tensor: &str, i: usize) -> String {
        if self.numbered { format!("{tensor}.{i}") } else { tensor.to_owned() }
    }

    fn tensors(&self, vocab_size: u64, drafts: u32) -> Vec<TensorSpec> {
        let of = |(i, s): (usize, &Vec<u32>)| {
            let tokens = s.len() as u64;
            let logits = TensorSpec { name: self.name("logits", i), shape: vec![tokens, vocab_size] };
            let shape = vec![tokens, u64::from(drafts), vocab_size];
            let mtp = (drafts > 0).then(|| TensorSpec { name: self.name("mtp_logits", i), shape });
            [Some(logits), mtp].into_iter().flatten()
        };
        self.sequences.iter().enumerate().flat_map(of).collect()
    }
}

/// The sum of the losses of known next tokens.
#[derive(Debug, Default)]
struct Loss {
    tokens: u64,
    nats: f64,
}

impl Loss {
    fn add(&mut self, logits: &[f32], target: u32) {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
        self.nats += f64::from(max) + sum.ln() - f64::from(logits[target as usize]);
        self.tokens += 1;
    }
}

/// The token that a step found to be the likeliest.
/// # Errors
/// [`Error::Sample`] if there is none.
fn likeliest(best: i32, logits: &[f32]) -> Result<u32, Error> {
    u32::try_from(best).map_err(|_| SampleError::of_row(logits).into())
}

struct Eval<'a> {
    batch: &'a Batch,
    drafts: usize,
    out: Option<TensorFile>,
    loss: Loss,
}

/// The tokens of one sequence in one step.
struct Piece<'a> {
    /// Number of the sequence in the batch.
    number: usize,
    sequence: SequenceId,
    first: usize,
    tokens: &'a [u32],
}

impl Eval<'_> {
    fn run(&mut self, engine: &mut Engine, args: &EvalArgs) -> Result<(), Error> {
        let step = match args.mode {
            Mode::Decode => 1,
            Mode::Prefill => args.step_tokens.map_or(usize::MAX, |n| n as usize),
        };
        let window = args.window.map_or(usize::MAX, |n| n as usize);
        let longest = self.batch.sequences.iter().map(Vec::len).max().unwrap_or(0);
        let mut begin = 0;
        while begin < longest {
            let end = begin.saturating_add(window).min(longest);
            self.run_window(engine, begin, end, step)?;
            begin = end;
        }
        Ok(())
    }

    /// Feeds tokens `begin .. end` of every sequence to fresh states.
    fn run_window(&mut self, engine: &mut Engine, begin: usize, end: usize, step: usize) -> Result<(), Error> {
        let ids: Vec<SequenceId> =
            self.batch.sequences.iter().map(|_| engine.new_sequence()).collect::<Result<_, _>>()?;
        let mut read = vec![begin; ids.len()];
        loop {
            let pieces: Vec<Piece<'_>> = (self.batch.sequences.iter().zip(&ids).zip(&mut read).enumerate())
                .filter_map(|(number, ((tokens, &sequence), at))| {
                    let (first, left) = (*at, end.min(tokens.len()).checked_sub(*at)?);
                    *at += Steps::of(step).cut(Unread { position: first - begin, tokens: left }, step, true);
                    (left > 0).then(|| Piece { number, sequence, first, tokens: &tokens[first..*at] })
                })
                .collect();
            if pieces.is_empty() {
                break;
            }
            self.run_step(engine, &pieces)?;
        }
        ids.into_iter().for_each(|id| engine.end_sequence(id));
        Ok(())
    }

    fn run_step(&mut self, engine: &mut Engine, pieces: &[Piece<'_>]) -> Result<(), Error> {
        let batch: Vec<(SequenceId, &[u32])> = pieces.iter().map(|p| (p.sequence, p.tokens)).collect();
        engine.forward(&batch, LogitRows::All)?;
        let best = if self.drafts > 0 { engine.best()?.to_vec() } else { Vec::new() };
        let following = self.take_logits(pieces, engine.logits()?, &best)?;
        if self.drafts > 0 {
            let hidden: Vec<f32> = engine.hidden()?.iter().flatten().copied().collect();
            self.run_drafts(engine, pieces, &hidden, &following)?;
        }
        Ok(())
    }

    /// Writes a step's logits, adds up its loss, and gives the token after each row: the known one, or the likeliest after the last.
    fn take_logits(&mut self, pieces: &[Piece<'_>], logits: Rows<'_>, best: &[i32]) -> Result<Vec<u32>, Error> {
        let mut rows = logits.iter().enumerate();
        let mut following = Vec::with_capacity(best.len());
        for piece in pieces {
            let sequence = &self.batch.sequences[piece.number];
            for (i, (row, logits)) in (piece.first..).zip(rows.by_ref().take(piece.tokens.len())) {
                if let Some(out) = &mut self.out {
                    out.write_row(&self.batch.name("logits", piece.number), i, logits)?;
                }
                let target = sequence.get(i + 1).copied();
                if let Some(target) = target {
                    self.loss.add(logits, target);
                }
                if self.drafts > 0 {
                    following.push(target.map_or_else(|| likeliest(best[row], logits), Ok)?);
                }
            }
        }
        Ok(following)
    }

    /// After each position in turn, a chain of drafts. The chain's own KV lies past the position, where the next one overwrites it.
    fn run_drafts(
        &mut self,
        engine: &mut Engine,
        pieces: &[Piece<'_>],
        hidden: &[f32],
        following: &[u32],
    ) -> Result<(), Error> {
        let width = engine.metadata().model.hidden_size as usize;
        let mut rows = hidden.chunks_exact(width).zip(following);
        for piece in pieces {
            for (i, (hidden, &next)) in (piece.first..).zip(rows.by_ref().take(piece.tokens.len())) {
                self.run_chain(engine, piece, i, hidden, next)?;
            }
        }
        Ok(())
    }

    fn run_chain(
        &mut self,
        engine: &mut Engine,
        piece: &Piece<'_>,
        i: usize,
        hidden: &[f32],
        next: u32,
    ) -> Result<(), Error> {
        let (mut hidden, mut token) = (hidden.to_vec(), next);
        for draft in 0..self.drafts {
            // without windows a token's index is its position
            let position = (i + draft) as u64;
            let hidden_rows = HiddenRows::Host(&hidden);
            let input = DraftInput { sequence: piece.sequence, position, tokens: &[token], hidden: hidden_rows };
            engine.draft(&[input], LogitRows::Last)?;
            let (best, next) = (engine.best()?[0], engine.hidden()?.row(0).to_vec());
            let rows = engine.logits()?;
            let logits = rows.row(0);
            if let Some(out) = &mut self.out {
                out.write_row(&self.batch.name("mtp_logits", piece.number), i * self.drafts + draft, logits)?;
            }
            token = if draft + 1 < self.drafts { likeliest(best, logits)? } else { token };
            hidden = next;
        }
        Ok(())
    }
}
