//! The options of `generate`.

use std::path::{Path, PathBuf};

use nextc_abi::metadata::{X86_64, default_step_tokens};

use super::GenerateError;
use super::draft::DraftTokens;
use super::requests::{read_ids, read_lines};
use super::settings::parse_bias;
use crate::sample::settings::parse_number;

/// The arguments of `generate`.
#[derive(Clone, Debug, clap::Args)]
pub struct GenerateArgs {
    /// The prompt, put into the model's chat template.
    #[arg(short, long, value_name = "TEXT", required_unless_present_any = ["tokens", "prompts"])]
    pub prompt: Option<String>,
    /// A system message before the prompt.
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["raw", "tokens"])]
    pub system: Option<String>,
    /// Answer without thoughts, where the model's chat template knows `enable_thinking`.
    #[arg(long, conflicts_with_all = ["raw", "tokens"])]
    pub no_thinking: bool,
    /// Continue the prompt as it stands, without the chat template.
    #[arg(long, conflicts_with = "tokens")]
    pub raw: bool,
    /// Token ids instead of a prompt: a JSON array, or an array of arrays, which run as one batch.
    #[arg(long, value_name = "IDS.json", conflicts_with = "prompt")]
    pub tokens: Option<PathBuf>,
    /// Many prompts: a text a line, or a JSON object a line with `prompt`, `tokens` or `messages`, and options of its own.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "tokens"])]
    pub prompts: Option<PathBuf>,
    /// Most sequences that run at once; when one ends, the next begins.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub batch: u32,
    /// Stop after so many new tokens.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 512)]
    pub max_new_tokens: usize,
    /// 0 takes the most probable token; higher is more varied [default: the checkpoint's].
    #[arg(long, value_name = "X", value_parser = parse_number("temperature"), allow_hyphen_values = true)]
    pub temperature: Option<f64>,
    /// Choose among the K most probable tokens, 0 for all [default: the checkpoint's].
    #[arg(long, value_name = "K", value_parser = parse_number("top_k"), allow_hyphen_values = true)]
    pub top_k: Option<f64>,
    /// Choose among the fewest tokens whose probabilities sum to X [default: the checkpoint's].
    #[arg(long, value_name = "X", value_parser = parse_number("top_p"), allow_hyphen_values = true)]
    pub top_p: Option<f64>,
    /// Choose among tokens at least X times as probable as the most probable [default: the checkpoint's].
    #[arg(long, value_name = "X", value_parser = parse_number("min_p"), allow_hyphen_values = true)]
    pub min_p: Option<f64>,
    /// Divide the logits of tokens of prompt and answer by X, multiply negative ones [default: the checkpoint's].
    #[arg(long, value_name = "X", value_parser = parse_number("repetition_penalty"), allow_hyphen_values = true)]
    pub repetition_penalty: Option<f64>,
    /// Subtract X from the logits of tokens of the answer.
    #[arg(long, value_name = "X", value_parser = parse_number("presence_penalty"), allow_hyphen_values = true)]
    pub presence_penalty: Option<f64>,
    /// Subtract X from the logit of a token for each time that the answer has it.
    #[arg(long, value_name = "X", value_parser = parse_number("frequency_penalty"), allow_hyphen_values = true)]
    pub frequency_penalty: Option<f64>,
    /// Add VALUE to the logit of token ID; may be given several times.
    #[arg(long, value_name = "ID=VALUE", value_parser = parse_bias, allow_hyphen_values = true)]
    pub logit_bias: Vec<(u32, f64)>,
    /// Seed of the random numbers: the same seed gives the same tokens [default: another one each time].
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Stop where this text appears; may be given several times.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub stop: Vec<String>,
    /// Stop at this token, also with `--ignore-eos`; may be given several times.
    #[arg(long, value_name = "ID")]
    pub stop_token: Vec<u32>,
    /// Go on after a token that ends the answer.
    #[arg(long)]
    pub ignore_eos: bool,
    /// In JSON, the logarithm of each new token's probability, and the N most probable ones.
    #[arg(long, value_name = "N", requires = "json", value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub logprobs: Option<u32>,
    /// The same for the tokens of the prompt.
    #[arg(long, value_name = "N", requires = "json", value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub prompt_logprobs: Option<u32>,
    /// Tokens that the model's own multi-token prediction drafts ahead of each step: a number, or auto. The tokens stay the same.
    #[arg(long, value_name = "K|auto", default_value = "auto", allow_hyphen_values = true)]
    pub draft_tokens: DraftTokens,
    /// Most tokens of prompts in one step [default: 512; on a GPU 4096].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub step_tokens: Option<u32>,
    /// Print JSON instead of text as it comes: one line at the end, or with `--prompts` one line for each.
    #[arg(long)]
    pub json: bool,
    /// Threads that compute [default: one a core].
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

impl GenerateArgs {
    /// Most tokens of prompts in one step.
    pub fn step_tokens(&self) -> usize {
        self.step_tokens.unwrap_or_else(|| default_step_tokens(X86_64)) as usize
    }

    /// The same arguments, with what a machine wants where they say nothing.
    pub fn for_machine(mut self, arch: &str) -> Self {
        self.step_tokens.get_or_insert_with(|| default_step_tokens(arch));
        self
    }

    /// The numbers that say how to choose, by their names in [`crate::sample::settings`].
    pub fn numbers(&self) -> [(&'static str, Option<f64>); 7] {
        [
            ("repetition_penalty", self.repetition_penalty),
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
            ("temperature", self.temperature),
            ("top_k", self.top_k),
            ("top_p", self.top_p),
            ("min_p", self.min_p),
        ]
    }

    /// Most sequences at once: what a model must have room for.
    /// # Errors
    /// [`GenerateError`] if a file of prompts or token ids is bad.
    pub fn sequences(&self) -> Result<usize, GenerateError> {
        let batch = self.batch as usize;
        // what can be read only once, as a pipe, is not read to be counted
        let is_pipe = |path: &Path| std::fs::metadata(path).is_ok_and(|m| !m.is_file());
        match (&self.tokens, &self.prompts) {
            (Some(path), _) | (_, Some(path)) if is_pipe(path) => Ok(batch),
            (Some(path), _) => Ok(read_ids(path)?.0.len().clamp(1, batch)),
            (None, Some(path)) => Ok(read_lines(path)?.len().clamp(1, batch)),
            (None, None) => Ok(1),
        }
    }
}
