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

use crate::sample::SampleError;
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

/// What generation needs of a model.
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
    /// Runs one step: appends to each sequence its tokens (at least one), and gives the logits after the last token of each:
    /// `[runs.len(), vocab_size]`.
    /// # Errors
    /// If memory for the step or for KV is lacking.
    fn forward(&mut self, runs: &[(Sequence, &[u32])]) -> Result<&[f32], ModelError>;
    /// As [`Forward::forward`] for one sequence, but gives the logits after each of the tokens: `[tokens.len(), vocab_size]`.
    /// # Errors
    /// As [`Forward::forward`].
    fn forward_all(&mut self, sequence: Sequence, tokens: &[u32]) -> Result<&[f32], ModelError>;
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
    /// Drafts `count` tokens for each sequence after its `next` token, which the model has not been fed yet.
    /// # Errors
    /// As [`Forward::forward`].
    fn draft(&mut self, runs: &[(Sequence, u32)], count: usize) -> Result<Vec<Vec<u32>>, ModelError>;
    /// As [`Forward::forward`], but gives the logits of every token, and what was appended counts only once it is accepted.
    /// # Errors
    /// As [`Forward::forward`].
    fn forward_tentative(&mut self, runs: &[(Sequence, &[u32])]) -> Result<&[f32], ModelError>;
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
    /// No token can be chosen.
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
