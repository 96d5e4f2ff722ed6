//! The command `generate`: a prompt, or token ids, to new tokens.
//!
//! The model is behind the trait [`Forward`]; this module holds what is around it: arguments ([`args`]), prompts
//! ([`requests`]), the steps ([`decode`]) and who is in them ([`batch`]), stop texts ([`stop`]), how to choose ([`settings`]) and
//! what is printed.

pub mod args;
pub mod batch;
pub mod decode;
pub mod draft;
mod output;
pub mod requests;
pub mod settings;
pub mod stop;

use std::io::{self, Write};
use std::path::PathBuf;

use crate::sample::{Choosing, SampleError};
use crate::template::{ChatTemplate, TemplateError};
use crate::tokenizer::{LazyTokenizer, TokenizerError};
pub use args::GenerateArgs;
use output::Output;
use requests::Requests;
use settings::Settings;

/// Whatever error a model has.
pub type ModelError = Box<dyn std::error::Error + Send + Sync>;

/// A sequence of the model: its state and its KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sequence(pub u32);

/// A sequence's part of a step.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// The sequence.
    pub sequence: Sequence,
    /// What it is fed, at least one token.
    pub tokens: &'a [u32],
    /// How the token after it is chosen, if one is wanted.
    pub choosing: Option<Choosing<'a>>,
}

/// What a step says of a sequence's tentative tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// The token that is chosen after each of them; of use only up to the one after the last right one.
    pub tokens: Vec<u32>,
    /// How many of them after the first are right.
    pub accepted: usize,
}

/// What generation needs of a model. A step chooses tokens where the model computes; logits leave it only where they are asked for.
pub trait Forward {
    /// Token ids are below this.
    fn vocab_size(&self) -> usize;
    /// The most tokens a sequence may hold.
    fn max_context(&self) -> usize;
    /// Tokens that end an answer.
    fn eos_token_ids(&self) -> Vec<u32>;
    /// A new, empty sequence.
    /// # Errors
    /// If there is no room for another.
    fn begin(&mut self) -> Result<Sequence, ModelError>;
    /// Gives back what a sequence owns.
    fn end(&mut self, sequence: Sequence);
    /// Runs one step: appends to each sequence its tokens, and gives the tokens of those runs that choose one, in order.
    /// # Errors
    /// If memory for the step or for KV is lacking, or there is no token to choose.
    fn forward(&mut self, runs: &[Run<'_>]) -> Result<Vec<u32>, ModelError>;
    /// As [`Forward::forward`] for one sequence, and keeps the logits after each of its tokens.
    /// # Errors
    /// As [`Forward::forward`].
    fn forward_all(&mut self, run: Run<'_>) -> Result<Option<u32>, ModelError>;
    /// Says that logits will be asked for after each step.
    fn keep_logits(&mut self);
    /// A row of logits of the last step, if they are kept: after `forward` the rows of its runs, else the rows of its tokens.
    fn logits(&self, row: usize) -> &[f32];
    /// The model as one that drafts, if it can.
    fn drafter(&mut self) -> Option<&mut dyn Drafter> {
        None
    }
}

/// What speculative decoding needs of a model.
pub trait Drafter {
    /// Most tokens of a tentative step.
    fn tentative_tokens(&self) -> usize;
    /// Says that drafts will be asked for, so that what they need is kept from now on.
    fn prepare(&mut self);
    /// Drafts `drafts` tokens of each sequence after the one token of its run, and as [`Forward::forward`] feeds it all of them, but chooses a
    /// token after each one, and what was appended counts only once it is accepted. Every run chooses.
    /// # Errors
    /// As [`Forward::forward`].
    fn speculate(&mut self, runs: &[Run<'_>], drafts: usize) -> Result<Vec<Checked>, ModelError>;
    /// Makes the first `tokens` of a sequence's tentative tokens its own.
    /// # Errors
    /// As [`Forward::forward`].
    fn accept(&mut self, sequence: Sequence, tokens: usize) -> Result<(), ModelError>;
}

/// Why nothing, or no more, was generated.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// Drafts are asked for, and the model cannot draft.
    #[error("`--draft-tokens` is {0}, but this model has no multi-token prediction; expected 0 or auto")]
    NoDrafts(usize),
    /// More drafts are asked for than a step can check.
    #[error("`--draft-tokens` is {found}, expected at most {most}")]
    TooManyDrafts {
        /// How many.
        found: usize,
        /// How many there can be.
        most: usize,
    },
    /// The file of token ids is bad.
    #[error("{path}: {reason}")]
    Ids {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The checkpoint's defaults are bad.
    #[error("generation_config.json: {reason}")]
    Defaults {
        /// What is wrong.
        reason: String,
    },
    /// A line of a file of prompts is bad.
    #[error("{at}: {reason}")]
    Line {
        /// File and line.
        at: String,
        /// What is wrong.
        reason: String,
    },
    /// A prompt is empty.
    #[error("{at} has no tokens, expected at least one")]
    Empty {
        /// Which prompt.
        at: String,
    },
    /// A token does not exist.
    #[error("{at}: token {index} is {id}, the model's vocabulary has {vocab_size}")]
    Token {
        /// Which prompt.
        at: String,
        /// Position in it.
        index: usize,
        /// The id.
        id: u32,
        /// Ids are below this.
        vocab_size: usize,
    },
    /// A prompt is too long.
    #[error(
        "{at} has {tokens} tokens, {} more than the context holds ({max_context}); build with a larger `--max-context`, or shorten it",
        tokens - max_context
    )]
    TooLong {
        /// Which prompt.
        at: String,
        /// Its length.
        tokens: usize,
        /// The context.
        max_context: usize,
    },
    /// An option names a token that does not exist.
    #[error("`{option}` names token {id}, the model's vocabulary has {vocab_size}")]
    Option {
        /// The option.
        option: &'static str,
        /// The id.
        id: u32,
        /// Ids are below this.
        vocab_size: usize,
    },
    /// Text and tokens cannot be converted.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat template fails.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// A setting of how to choose is bad.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// The model fails.
    #[error("{0}")]
    Model(ModelError),
    /// Output cannot be written.
    #[error("standard output: {0}")]
    Output(#[from] io::Error),
}

/// The files of a checkpoint that text needs, as they lie in the executable.
pub struct TextFiles<'a> {
    /// From `tokenizer.json`.
    pub tokenizer: LazyTokenizer<'a>,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<&'a [u8]>,
    /// `chat_template.jinja`.
    pub chat_template: Option<&'a [u8]>,
    /// `generation_config.json`.
    pub generation_config: Option<&'a [u8]>,
}

impl<'a> TextFiles<'a> {
    /// Finds them by name.
    pub fn find(file: impl Fn(&str) -> Option<&'a [u8]>) -> Self {
        Self {
            tokenizer: LazyTokenizer::new(file("tokenizer.json")),
            tokenizer_config: file("tokenizer_config.json"),
            chat_template: file("chat_template.jinja"),
            generation_config: file("generation_config.json"),
        }
    }

    /// The chat template.
    /// # Errors
    /// [`TemplateError`] if there is none, or it does not parse.
    pub fn template(&self) -> Result<ChatTemplate, TemplateError> {
        ChatTemplate::from_files(self.tokenizer_config, self.chat_template)
    }
}

/// Runs `generate`. `load_s` is the time from the start of the process until the model was ready.
/// # Errors
/// [`GenerateError`]; nothing that was printed before it is taken back.
pub fn run(
    args: &GenerateArgs,
    model: &mut dyn Forward,
    files: &TextFiles<'_>,
    load_s: f64,
    out: &mut dyn Write,
) -> Result<(), GenerateError> {
    let drafts = args.draft_tokens.planner(model)?;
    let settings = Settings::new(args, files.generation_config, &model.eos_token_ids())?;
    settings.check(args, model.vocab_size())?;
    let requests = Requests::read(args, files, &settings.sampling)?;
    let mut decoder = settings.decoder(args, drafts);
    let mut output = Output::new(args, files, &requests, load_s, out)?;
    let timings = batch::run(model, &requests.list, args.batch as usize, &mut decoder, &mut output)?;
    output.finish(&timings)
}

#[cfg(test)]
mod tests;
