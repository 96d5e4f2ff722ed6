//! Generation with this executable's engine: the model behind [`Forward`], and the files of the checkpoint.

use std::time::Instant;

use crate::artifact::Artifact;
use crate::engine::{Engine, EngineOptions, LogitRows};
use crate::error::Error;
use crate::generate::{self, Forward, GenerateArgs, ModelError, Sequence, TextFiles};
use crate::state::SequenceId;

/// An engine as generation sees it.
struct Model {
    engine: Engine,
    /// Logits of the last step, without padding.
    logits: Vec<f32>,
}

impl Model {
    fn open(artifact: Artifact, args: &GenerateArgs) -> Result<Self, Error> {
        let sequences = match &args.tokens {
            Some(path) => generate::read_ids(path)?.0.len().max(1),
            None => 1,
        };
        let threads = args.threads.unwrap_or_else(crate::pool::available_threads);
        let step_tokens = args.step_tokens as usize;
        let options = EngineOptions { threads, sequences, step_tokens, random_weights: false };
        Ok(Self { engine: Engine::new(artifact, &options)?, logits: Vec::new() })
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
        self.engine.end_sequence(SequenceId(sequence.0));
    }

    fn forward(&mut self, runs: &[(Sequence, &[u32])]) -> Result<&[f32], ModelError> {
        let batch: Vec<(SequenceId, &[u32])> = runs.iter().map(|(s, tokens)| (SequenceId(s.0), *tokens)).collect();
        let output = self.engine.forward(&batch, LogitRows::Last)?;
        self.logits.clear();
        output.logits.iter().for_each(|row| self.logits.extend_from_slice(row));
        Ok(&self.logits)
    }
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
