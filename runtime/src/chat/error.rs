//! Why a chat cannot go on.

use std::io;
use std::path::PathBuf;

use crate::generate::{GenerateError, ModelError};
use crate::template::TemplateError;
use crate::tokenizer::TokenizerError;

/// Why a chat, or one command of it, cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// The conversation is too long.
    #[error("the conversation has {tokens} tokens, {} more than the context of {max_context}; `/undo`, or `/reset`", tokens - max_context)]
    Full {
        /// Its length, with the new message.
        tokens: usize,
        /// The context.
        max_context: usize,
    },
    /// A file cannot be read or written.
    #[error("{path}: {error}")]
    File {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        error: io::Error,
    },
    /// A file is no saved chat.
    #[error("{path}: {found}, expected a chat that `/save` wrote")]
    NotAChat {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        found: &'static str,
    },
    /// A saved chat is damaged.
    #[error("{path}: damaged: {reason}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// A saved chat is of another model.
    #[error(
        "{path}: saved by `{found}` (fingerprint {found_fingerprint}), this is `{name}` (fingerprint {fingerprint})"
    )]
    OtherModel {
        /// The file.
        path: PathBuf,
        /// The model that saved it.
        found: String,
        /// Its fingerprint.
        found_fingerprint: String,
        /// This model.
        name: String,
        /// Its fingerprint.
        fingerprint: String,
    },
    /// The terminal fails.
    #[error("terminal: {0}")]
    Terminal(String),
    /// Output cannot be written.
    #[error("standard output: {0}")]
    Output(io::Error),
    /// Text and tokens cannot be converted.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat template fails.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// No answer can be made, for another reason.
    #[error(transparent)]
    Generate(Box<GenerateError>),
    /// The model fails.
    #[error("{0}")]
    Model(ModelError),
}

impl From<GenerateError> for ChatError {
    fn from(error: GenerateError) -> Self {
        match error {
            GenerateError::Output(error) => Self::Output(error),
            other => Self::Generate(Box::new(other)),
        }
    }
}
