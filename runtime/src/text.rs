//! Generation with this executable's engine: the model behind [`Forward`], and the files of the checkpoint.

use std::collections::HashMap;
use std::time::Instant;

use crate::artifact::Artifact;
use crate::engine::{DraftInput, Engine, EngineOptions, LogitRows};
use crate::error::Error;
use crate::generate::{self, Checked, Drafter, Forward, GenerateArgs, ModelError, Run, Sequence, TextFiles};
use crate::sample::Choosing;
use crate::sample::rows::Row;
use crate::shortlist::Shortlist;
use crate::state::SequenceId;
use crate::step::Rows;

/// An engine as generation sees it.
pub(crate) struct Model {
    pub(crate) engine: Engine,
    /// Logits of the last step, without padding, where they are asked for.
    logits: Vec<f32>,
    logits_wanted: bool,
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
        Ok(Self {
            engine,
            logits: Vec::new(),
            logits_wanted: false,
            lags: HashMap::new(),
            drafts_wanted: false,
            shortlist,
        })
    }

    fn batch<'a>(runs: &[Run<'a>]) -> Vec<(SequenceId, &'a [u32])> {
        runs.iter().map(|run| (SequenceId(run.sequence.0), run.tokens)).collect()
    }

    /// A step that counts, with a token for the last row of each run that chooses.
    fn forward_rows(&mut self, runs: &[Run<'_>], rows: LogitRows) -> Result<Vec<u32>, ModelError> {
        let batch = Self::batch(runs);
        let positions: Vec<u64> = batch.iter().map(|(s, _)| self.engine.tokens(*s)).collect::<Result<_, _>>()?;
        self.engine.forward(&batch, rows)?;
        let wanted: Vec<Row<'_>> = runs.iter().flat_map(|run| wanted_rows(run, rows)).collect();
        let mut tokens = Vec::new();
        if runs.iter().any(|run| run.choosing.is_some()) {
            let chosen = self.engine.sample(&wanted)?.to_vec();
            for (r, _) in wanted.iter().enumerate().filter(|(_, row)| row.choosing.is_some()) {
                tokens.push(self.engine.token(r, chosen[r])?);
            }
        }
        self.keep_rows(rows == LogitRows::All)?;
        if self.drafts_wanted {
            runs.iter().for_each(|run| self.shortlist.feed(run.tokens));
            extend_lags(&mut self.lags, runs, &positions, self.engine.hidden()?);
            let most = |tokens: usize| if tokens > 1 { FEW_ROWS } else { MOST_LAG };
            self.catch_up(runs.iter().map(|run| (run.sequence, most(run.tokens.len()))))?;
        }
        Ok(tokens)
    }

    /// Copies the logits of the last step, if somebody wants them.
    fn keep_rows(&mut self, wanted: bool) -> Result<(), ModelError> {
        self.logits.clear();
        if wanted || self.logits_wanted {
            self.engine.logits()?.iter().for_each(|row| self.logits.extend_from_slice(row));
        }
        Ok(())
    }

    /// Feeds the draft of each sequence that lags behind more than so many rows all of them but one, in steps of few tokens.
    fn catch_up(&mut self, sequences: impl Iterator<Item = (Sequence, usize)>) -> Result<(), ModelError> {
        let width = self.engine.metadata().model.hidden_size as usize;
        for (sequence, most) in sequences {
            let Some(lag) = self.lags.get_mut(&sequence) else { continue };
            if lag.next.len() <= most {
                continue;
            }
            while lag.next.len() > 1 {
                let count = (lag.next.len() - 1).min(CATCH_UP_STEP);
                self.engine.follow(&[lag.input(sequence, count, width)])?;
                lag.forget(count, width);
            }
        }
        Ok(())
    }
}

/// Tokens that a draft is fed at once to catch up, at most.
const CATCH_UP_STEP: usize = 512;
/// Rows that it may lag behind when it drafts, and after a step of a prompt: of those it computes more than what later tokens need, which is
/// less work than a step of its own.
const FEW_ROWS: usize = 8;
/// Rows that it may lag behind in all before it is fed them without being asked for drafts: where drafts do not pay, that comes seldom.
const MOST_LAG: usize = 256;

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

    fn forward(&mut self, runs: &[Run<'_>]) -> Result<Vec<u32>, ModelError> {
        self.forward_rows(runs, LogitRows::Last)
    }

    fn forward_all(&mut self, run: Run<'_>) -> Result<Option<u32>, ModelError> {
        Ok(self.forward_rows(&[run], LogitRows::All)?.first().copied())
    }

    fn keep_logits(&mut self) {
        self.logits_wanted = true;
    }

    fn logits(&self, row: usize) -> &[f32] {
        let width = self.vocab_size();
        &self.logits[row * width..(row + 1) * width]
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
        self.catch_up(runs.iter().map(|&(s, _)| (s, FEW_ROWS)))?;
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
        self.engine.guess(&inputs, self.shortlist.flags())?;
        let rows = self.engine.hidden()?;
        let mut hidden: Vec<f32> = ends.iter().flat_map(|end| rows.row(end - 1)).copied().collect();
        take_drafts(&mut self.engine, &mut drafts)?;
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
            self.engine.guess(&inputs, self.shortlist.flags())?;
            hidden = self.engine.hidden()?.iter().flatten().copied().collect();
            take_drafts(&mut self.engine, &mut drafts)?;
            position.iter_mut().for_each(|p| *p += 1);
        }
        Ok(drafts)
    }

    fn forward_tentative(&mut self, runs: &[Run<'_>]) -> Result<Vec<Checked>, ModelError> {
        let batch = Self::batch(runs);
        let positions: Vec<u64> = batch.iter().map(|(s, _)| self.engine.tokens(*s)).collect::<Result<_, _>>()?;
        self.engine.forward_tentative(&batch)?;
        let (tokens, accepted) = self.engine.verify(&tentative_rows(runs))?;
        let (tokens, accepted) = (tokens.to_vec(), accepted.to_vec());
        self.keep_rows(false)?;
        extend_lags(&mut self.lags, runs, &positions, self.engine.hidden()?);
        let (mut checked, mut first) = (Vec::with_capacity(runs.len()), 0);
        for (run, accepted) in runs.iter().zip(accepted) {
            let own = &tokens[first..first + run.tokens.len()];
            let accepted = usize::try_from(accepted).unwrap_or(0);
            // what comes after a wrong draft is of no use, and may be no token
            let of_use = own[..=accepted].iter().enumerate();
            let tokens = of_use.map(|(i, &token)| self.engine.token(first + i, token)).collect::<Result<_, _>>()?;
            checked.push(Checked { tokens, accepted });
            first += run.tokens.len();
        }
        Ok(checked)
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
fn extend_lags(lags: &mut HashMap<Sequence, Lag>, runs: &[Run<'_>], positions: &[u64], hidden: Rows<'_>) {
    let mut rows = hidden.iter();
    for (run, &position) in runs.iter().zip(positions) {
        let own = rows.by_ref().take(run.tokens.len());
        lags.entry(run.sequence).or_default().extend(position, run.tokens, own);
    }
}

/// The rows of a step that a run has: a token is chosen for the last one at most.
fn wanted_rows<'a>(run: &Run<'a>, rows: LogitRows) -> impl Iterator<Item = Row<'a>> + use<'a> {
    let before = if rows == LogitRows::All { run.tokens.len() - 1 } else { 0 };
    std::iter::repeat_n(None, before).chain([run.choosing]).map(|choosing| Row { choosing, drafts: (0, 0) })
}

/// How the token after each tentative one is chosen: those before it, but for the first, count as output.
fn tentative_rows<'a>(runs: &[Run<'a>]) -> Vec<Row<'a>> {
    let mut rows = Vec::new();
    for run in runs {
        let first_draft = rows.len() + 1;
        for i in 0..run.tokens.len() {
            let after = |c: Choosing<'a>| Choosing { position: c.position.saturating_add(i as u32), ..c };
            rows.push(Row { choosing: run.choosing.map(after), drafts: (first_draft, i) });
        }
    }
    rows
}

/// Adds to each sequence's drafts the most probable token of its row.
fn take_drafts(engine: &mut Engine, drafts: &mut [Vec<u32>]) -> Result<(), ModelError> {
    let best = engine.best()?.to_vec();
    for (row, (drafts, best)) in drafts.iter_mut().zip(best).enumerate() {
        drafts.push(engine.token(row, best)?);
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
