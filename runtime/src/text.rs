//! Generation with this executable's engine: the model behind [`Forward`], and the files of the checkpoint.

use std::collections::HashMap;
use std::time::Instant;

use crate::artifact::Artifact;
use crate::engine::draft::{DraftInput, HiddenRows, HiddenRun};
use crate::engine::{Engine, EngineOptions, LogitRows};
use crate::error::Error;
use crate::generate::{self, Checked, Drafter, Forward, GenerateArgs, ModelError, Run, Sequence, TextFiles};
use crate::kept::KEPT_ROWS;
use crate::lag::Lag;
use crate::sample::Choosing;
use crate::sample::rows::Row;
use crate::shortlist::Shortlist;
use crate::state::SequenceId;

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
        let options = EngineOptions { threads, sequences, step_tokens: args.step_tokens(), random_weights: false };
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
        self.catch_up_before(runs)?;
        self.engine.forward(&batch, rows)?;
        self.keep_hidden(runs, &positions)?;
        let wanted: Vec<Row<'_>> = runs.iter().flat_map(|run| wanted_rows(run, rows)).collect();
        let mut tokens = Vec::new();
        if runs.iter().any(|run| run.choosing.is_some()) {
            let chosen = self.engine.sample(&wanted)?.to_vec();
            for (r, _) in wanted.iter().enumerate().filter(|(_, row)| row.choosing.is_some()) {
                tokens.push(self.engine.token(r, chosen[r])?);
            }
        }
        self.keep_logits_of(rows == LogitRows::All)?;
        self.follow_long_runs(runs, &positions)?;
        self.catch_up(runs, MOST_LAG)?;
        Ok(tokens)
    }

    /// Copies the logits of the last step, if somebody wants them.
    fn keep_logits_of(&mut self, wanted: bool) -> Result<(), ModelError> {
        self.logits.clear();
        if wanted || self.logits_wanted {
            self.engine.logits()?.iter().for_each(|row| self.logits.extend_from_slice(row));
        }
        Ok(())
    }

    /// Before a long run the draft is fed all that it lags behind: the rows of the run itself are not kept, but fed to it where they lie.
    fn catch_up_before(&mut self, runs: &[Run<'_>]) -> Result<(), ModelError> {
        for run in runs.iter().filter(|run| is_long(run)) {
            let Some(lag) = self.lags.get_mut(&run.sequence).filter(|lag| lag.rows > 0) else { continue };
            lag.next.push(run.tokens[0]);
            self.engine.follow(&[lag.input(run.sequence, lag.rows)])?;
            lag.forget(lag.rows);
        }
        Ok(())
    }

    /// Keeps the hidden rows of what was fed from `positions` on; of long runs only the last, whose next token is not known.
    fn keep_hidden(&mut self, runs: &[Run<'_>], positions: &[u64]) -> Result<(), ModelError> {
        if !self.drafts_wanted {
            return Ok(());
        }
        let (mut kept, mut end) = (Vec::with_capacity(runs.len()), 0);
        for (run, &position) in runs.iter().zip(positions) {
            end += run.tokens.len();
            let before = if is_long(run) { run.tokens.len() - 1 } else { 0 };
            let (position, tokens) = (position + before as u64, &run.tokens[before..]);
            let (sequence, rows) = (SequenceId(run.sequence.0), tokens.len());
            kept.push(HiddenRun { sequence, position, first: end - rows, rows });
            self.lags.entry(run.sequence).or_default().extend(position, tokens);
            self.shortlist.feed(run.tokens);
        }
        Ok(self.engine.keep_hidden(&kept)?)
    }

    /// Feeds the draft the rows of long runs, which the last step has left, but for the last of each.
    fn follow_long_runs(&mut self, runs: &[Run<'_>], positions: &[u64]) -> Result<(), ModelError> {
        if !self.drafts_wanted {
            return Ok(());
        }
        let (mut inputs, mut first) = (Vec::new(), 0);
        for (run, &position) in runs.iter().zip(positions) {
            if is_long(run) {
                let (sequence, hidden) = (SequenceId(run.sequence.0), HiddenRows::Left(first));
                inputs.push(DraftInput { sequence, position, tokens: &run.tokens[1..], hidden });
            }
            first += run.tokens.len();
        }
        if !inputs.is_empty() {
            self.engine.follow(&inputs)?;
        }
        Ok(())
    }

    /// Feeds the draft of each sequence that lags behind more than `most` tokens all of them but one.
    fn catch_up(&mut self, runs: &[Run<'_>], most: usize) -> Result<(), ModelError> {
        for run in runs {
            let Some(lag) = self.lags.get_mut(&run.sequence).filter(|lag| lag.next.len() > most) else { continue };
            let count = lag.next.len() - 1;
            self.engine.follow(&[lag.input(run.sequence, count)])?;
            lag.forget(count);
        }
        Ok(())
    }
}

/// True for more tokens than a draft may lag behind when it drafts.
fn is_long(run: &Run<'_>) -> bool {
    run.tokens.len() > FEW_ROWS
}

/// Rows that a draft may lag behind when it drafts: of those it computes more than what later tokens need, which is less work than a step
/// of its own.
const FEW_ROWS: usize = 8;
/// Rows that it may lag behind in all before it is fed them without being asked for drafts: where drafts do not pay, that comes seldom.
const MOST_LAG: usize = 256;
const _: () = assert!((MOST_LAG + FEW_ROWS) < KEPT_ROWS as usize, "what lags behind is kept");

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

    fn speculate(&mut self, runs: &[Run<'_>], drafts: usize) -> Result<Vec<Checked>, ModelError> {
        for run in runs {
            let lag = self.lags.get_mut(&run.sequence).filter(|lag| lag.rows > 0 && run.tokens.len() == 1);
            let lag = lag.ok_or(Error::Step("drafts were not prepared for this sequence"))?;
            lag.next.extend_from_slice(run.tokens);
            self.shortlist.feed(run.tokens);
        }
        self.catch_up(runs, FEW_ROWS)?;
        let inputs: Vec<_> = runs.iter().map(|run| (run.sequence, &self.lags[&run.sequence])).collect();
        let inputs: Vec<_> = inputs.iter().map(|(sequence, lag)| lag.input(*sequence, lag.rows)).collect();
        self.engine.draft_ahead(&inputs, drafts, self.shortlist.flags())?;
        let (batch, rows) = (Self::batch(runs), drafts + 1);
        self.engine.forward_tentative(&batch, drafts)?;
        let kept = batch.iter().enumerate().map(|(i, &(sequence, _))| {
            let position = self.engine.tokens(sequence)?;
            Ok(HiddenRun { sequence, position, first: i * rows, rows })
        });
        let kept = kept.collect::<Result<Vec<_>, Error>>()?;
        self.engine.keep_hidden(&kept)?;
        // the host waits here for the first time
        let (tokens, accepted) = self.engine.verify(&tentative_rows(runs, drafts))?;
        let (tokens, accepted) = (tokens.to_vec(), accepted.to_vec());
        self.keep_logits_of(false)?;
        let mut checked = Vec::with_capacity(runs.len());
        for (i, (run, accepted)) in runs.iter().zip(accepted).enumerate() {
            let (first, accepted) = (i * rows, usize::try_from(accepted).unwrap_or(0));
            // what comes after a wrong draft is of no use, and may be no token
            let of_use = tokens[first..=first + accepted].iter().enumerate();
            let tokens: Vec<u32> =
                of_use.map(|(i, &token)| self.engine.token(first + i, token)).collect::<Result<_, _>>()?;
            let position = self.engine.tokens(SequenceId(run.sequence.0))?;
            // drafts that are right are the tokens before them
            let next = tokens[..accepted].to_vec();
            self.lags.insert(run.sequence, Lag { position, rows, next });
            checked.push(Checked { tokens, accepted });
        }
        Ok(checked)
    }

    fn accept(&mut self, sequence: Sequence, tokens: usize) -> Result<(), ModelError> {
        self.engine.accept(SequenceId(sequence.0), tokens as u32)?;
        if let Some(lag) = self.lags.get_mut(&sequence) {
            lag.truncate(tokens);
        }
        Ok(())
    }
}

/// The rows of a step that a run has: a token is chosen for the last one at most.
fn wanted_rows<'a>(run: &Run<'a>, rows: LogitRows) -> impl Iterator<Item = Row<'a>> + use<'a> {
    let before = if rows == LogitRows::All { run.tokens.len() - 1 } else { 0 };
    std::iter::repeat_n(None, before).chain([run.choosing]).map(|choosing| Row { choosing, drafts: (0, 0) })
}

/// How the token after each tentative one is chosen: those before it, but for the first, count as output.
fn tentative_rows<'a>(runs: &[Run<'a>], drafts: usize) -> Vec<Row<'a>> {
    let mut rows = Vec::new();
    for run in runs {
        let first_draft = rows.len() + 1;
        for i in 0..=drafts {
            let after = |c: Choosing<'a>| Choosing { position: c.position.saturating_add(i as u32), ..c };
            rows.push(Row { choosing: run.choosing.map(after), drafts: (first_draft, i) });
        }
    }
    rows
}

/// Runs `generate`.
/// # Errors
/// [`Error`] says what is wrong.
pub(crate) fn generate(artifact: Artifact, args: &GenerateArgs) -> Result<(), Error> {
    let begun = Instant::now();
    let args = &args.clone().for_machine(&artifact.metadata().target.arch);
    let assets = artifact.assets()?;
    let files = TextFiles::find(|name| assets.get(name));
    let mut model = Model::open(artifact, args)?;
    let load_s = begun.elapsed().as_secs_f64();
    Ok(generate::run(args, &mut model, &files, load_s, &mut std::io::stdout().lock())?)
}
