//! Generation with this executable's engine: the model behind [`Forward`], and the files of the checkpoint.

use std::collections::HashMap;
use std::time::Instant;

use crate::artifact::Artifact;
use crate::engine::{DraftInput, Engine, EngineOptions, LogitRows, Output};
use crate::error::Error;
use crate::generate::{self, Drafter, Forward, GenerateArgs, ModelError, Sequence, TextFiles};
use crate::shortlist::Shortlist;
use crate::state::SequenceId;

/// An engine as generation sees it.
pub(crate) struct Model {
    pub(crate) engine: Engine,
    /// Logits of the last step, without padding.
    logits: Vec<f32>,
    /// What the draft of each sequence has not been fed yet; empty unless drafts are wanted.
    pub(crate) lags: HashMap<Sequence, Lag>,
    drafts_wanted: bool,
    shortlist: Shortlist,
}

impl Model {
    pub(crate) fn open(artifact: Artifact, args: &GenerateArgs) -> Result<Self, Error> {
        let sequences = args.sequences()?;
        let threads = args.threads.unwrap_or_else(crate::pool::available_threads);
        let step_tokens = args.step_tokens as usize;
        let options = EngineOptions { threads, sequences, step_tokens, random_weights: false };
        let engine = Engine::new(artifact, &options)?;
        let shortlist = Shortlist::new(engine.metadata().model.vocab_size as usize);
        Ok(Self { engine, logits: Vec::new(), lags: HashMap::new(), drafts_wanted: false, shortlist })
    }

    fn batch<'a>(runs: &[(Sequence, &'a [u32])]) -> Vec<(SequenceId, &'a [u32])> {
        runs.iter().map(|(s, tokens)| (SequenceId(s.0), *tokens)).collect()
    }

    /// A step that counts, with the logits of some tokens.
    fn forward_rows(&mut self, runs: &[(Sequence, &[u32])], rows: LogitRows) -> Result<&[f32], ModelError> {
        let batch = Self::batch(runs);
        let positions: Vec<u64> = batch.iter().map(|(s, _)| self.engine.tokens(*s)).collect::<Result<_, _>>()?;
        let output = self.engine.forward(&batch, rows)?;
        self.logits.clear();
        output.logits.iter().for_each(|row| self.logits.extend_from_slice(row));
        if self.drafts_wanted {
            runs.iter().for_each(|(_, tokens)| self.shortlist.feed(tokens));
            extend_lags(&mut self.lags, runs, &positions, &output);
            self.catch_up(runs)?;
        }
        Ok(&self.logits)
    }

    /// Feeds the draft what it lags behind, but for the newest row of each sequence, whose next token is not known.
    fn catch_up(&mut self, runs: &[(Sequence, &[u32])]) -> Result<(), ModelError> {
        let width = self.engine.metadata().model.hidden_size as usize;
        let behind =
            |s: &Sequence| self.lags.get(s).filter(|lag| lag.next.len() >= CATCH_UP_TOKENS.min(lag.rows(width)));
        let inputs: Vec<DraftInput<'_>> = runs
            .iter()
            .filter_map(|(s, _)| {
                behind(s).filter(|lag| !lag.next.is_empty()).map(|lag| lag.input(*s, lag.next.len(), width))
            })
            .collect();
        if inputs.is_empty() {
            return Ok(());
        }
        let fed: Vec<Sequence> = inputs.iter().map(|i| Sequence(i.sequence.0)).collect();
        let inputs: Vec<DraftInput<'_>> = inputs;
        self.engine.draft(&inputs, LogitRows::None)?;
        for s in fed {
            if let Some(lag) = self.lags.get_mut(&s) {
                lag.forget(lag.next.len(), width);
            }
        }
        Ok(())
    }
}

/// Rows that a draft may lag behind before it is fed them without being asked for drafts.
const CATCH_UP_TOKENS: usize = 64;

/// What the draft of a sequence has not been fed yet: it is fed the hidden row of a position with the token after it, so it
/// lags behind the model by one token at least.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Lag {
    /// Position of the first row.
    pub position: u64,
    /// Hidden rows.
    pub hidden: Vec<f32>,
    /// The token after each row but the last.
    pub next: Vec<u32>,
}

impl Lag {
    fn rows(&self, width: usize) -> usize {
        self.hidden.len() / width
    }

    /// The model was fed `tokens` from `position` on and gave `hidden`.
    fn extend<'r>(&mut self, position: u64, tokens: &[u32], hidden: impl Iterator<Item = &'r [f32]>) {
        if self.hidden.is_empty() {
            self.position = position;
            self.next.extend_from_slice(&tokens[1..]);
        } else {
            self.next.extend_from_slice(tokens);
        }
        hidden.for_each(|row| self.hidden.extend_from_slice(row));
    }

    /// The first `count` rows as the draft is fed them.
    fn input(&self, sequence: Sequence, count: usize, width: usize) -> DraftInput<'_> {
        DraftInput {
            sequence: SequenceId(sequence.0),
            position: self.position,
            tokens: &self.next[..count],
            hidden: &self.hidden[..count * width],
        }
    }

    /// The draft has been fed the first `count` rows.
    fn forget(&mut self, count: usize, width: usize) {
        self.position += count as u64;
        self.next.drain(..count);
        self.hidden.drain(..count * width);
    }
}

impl Forward for Model {
    fn vocab_size(&self) -> usize {
        self.engine.metadata().model.vocab_size as usize
    }

    fn max_context(&self) -> usize {
        self.engine.metadata().model.max_context as usize
    }

    fn eos_token_ids(&self) -> Vec<u32> {
        self.engine.metadata().model.eos_token_ids.clone()
    }

    fn begin(&mut self) -> Result<Sequence, ModelError> {
        Ok(Sequence(self.engine.new_sequence()?.0))
    }

    fn end(&mut self, sequence: Sequence) {
        self.lags.remove(&sequence);
        self.engine.end_sequence(SequenceId(sequence.0));
    }

    fn forward(&mut self, runs: &[(Sequence, &[u32])]) -> Result<&[f32], ModelError> {
        self.forward_rows(runs, LogitRows::Last)
    }

    fn forward_all(&mut self, sequence: Sequence, tokens: &[u32]) -> Result<&[f32], ModelError> {
        self.forward_rows(&[(sequence, tokens)], LogitRows::All)
    }

    fn drafter(&mut self) -> Option<&mut dyn Drafter> {
        if self.engine.has_draft() { Some(self) } else { None }
    }
}

impl Drafter for Model {
    fn tentative_tokens(&self) -> usize {
        self.engine.metadata().tentative_tokens as usize
    }

    fn prepare(&mut self) {
        self.drafts_wanted = true;
    }

    fn draft(&mut self, runs: &[(Sequence, u32)], count: usize) -> Result<Vec<Vec<u32>>, ModelError> {
        let width = self.engine.metadata().model.hidden_size as usize;
        for (s, next) in runs {
            let lag = self.lags.get_mut(s).ok_or(Error::Step("drafts were not prepared for this sequence"))?;
            lag.next.push(*next);
            self.shortlist.feed(&[*next]);
        }
        let mut drafts = vec![Vec::with_capacity(count); runs.len()];
        let mut position: Vec<u64> = Vec::new();
        let inputs: Vec<DraftInput<'_>> = runs
            .iter()
            .map(|(s, _)| {
                let lag = &self.lags[s];
                position.push(lag.position + lag.next.len() as u64);
                lag.input(*s, lag.next.len(), width)
            })
            .collect();
        let ends: Vec<usize> = inputs
            .iter()
            .scan(0, |end, i| {
                *end += i.tokens.len();
                Some(*end)
            })
            .collect();
        let output = self.engine.guess(&inputs, self.shortlist.flags())?;
        let mut hidden: Vec<f32> = ends.iter().flat_map(|end| output.hidden.row(end - 1)).copied().collect();
        take_drafts(&output, &mut drafts)?;
        for (s, _) in runs {
            if let Some(lag) = self.lags.get_mut(s) {
                lag.forget(lag.next.len(), width);
            }
        }
        for _ in 1..count {
            let newest: Vec<u32> = drafts.iter().map(|d| d[d.len() - 1]).collect();
            let inputs: Vec<DraftInput<'_>> = (0..runs.len())
                .map(|i| DraftInput {
                    sequence: SequenceId(runs[i].0.0),
                    position: position[i],
                    tokens: &newest[i..=i],
                    hidden: &hidden[i * width..(i + 1) * width],
                })
                .collect();
            let output = self.engine.guess(&inputs, self.shortlist.flags())?;
            let rows: Vec<f32> = output.hidden.iter().flatten().copied().collect();
            take_drafts(&output, &mut drafts)?;
            hidden = rows;
            position.iter_mut().for_each(|p| *p += 1);
        }
        Ok(drafts)
    }

    fn forward_tentative(&mut self, runs: &[(Sequence, &[u32])]) -> Result<&[f32], ModelError> {
        let batch = Self::batch(runs);
        let positions: Vec<u64> = batch.iter().map(|(s, _)| self.engine.tokens(*s)).collect::<Result<_, _>>()?;
        let output = self.engine.forward_tentative(&batch)?;
        self.logits.clear();
        output.logits.iter().for_each(|row| self.logits.extend_from_slice(row));
        extend_lags(&mut self.lags, runs, &positions, &output);
        Ok(&self.logits)
    }

    fn accept(&mut self, sequence: Sequence, tokens: usize) -> Result<(), ModelError> {
        self.engine.accept(SequenceId(sequence.0), tokens as u32)?;
        let width = self.engine.metadata().model.hidden_size as usize;
        if let Some(lag) = self.lags.get_mut(&sequence) {
            let kept = (self.engine.tokens(SequenceId(sequence.0))? - lag.position) as usize;
            lag.hidden.truncate(kept * width);
            lag.next.truncate(kept.saturating_sub(1));
        }
        Ok(())
    }
}

/// Notes the hidden rows of what each sequence was fed from its position on.
fn extend_lags(lags: &mut HashMap<Sequence, Lag>, runs: &[(Sequence, &[u32])], positions: &[u64], output: &Output<'_>) {
    let mut rows = output.hidden.iter();
    for ((s, tokens), &position) in runs.iter().zip(positions) {
        lags.entry(*s).or_default().extend(position, tokens, rows.by_ref().take(tokens.len()));
    }
}

/// Adds to each sequence's drafts the most probable token of its row.
fn take_drafts(output: &Output<'_>, drafts: &mut [Vec<u32>]) -> Result<(), ModelError> {
    for (drafts, row) in drafts.iter_mut().zip(output.logits.iter()) {
        drafts.push(crate::sample::greedy(row)?);
    }
    Ok(())
}

/// Runs `generate`.
/// # Errors
/// [`Error`] says what is wrong.
pub(crate) fn generate(artifact: Artifact, args: &GenerateArgs) -> Result<(), Error> {
    let begun = Instant::now();
    let assets = artifact.assets()?;
    let files = TextFiles::find(|name| assets.get(name));
    let mut model = Model::open(artifact, args)?;
    let load_s = begun.elapsed().as_secs_f64();
    Ok(generate::run(args, &mut model, &files, load_s, &mut std::io::stdout().lock())?)
}
