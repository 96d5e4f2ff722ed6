//! The command `generate`: a prompt, or token ids, to new tokens.
//!
//! The model is behind the trait [`Forward`]; this module holds what is around it: arguments, prompts, the loop ([`decode`]),
//! stop texts ([`stop`]), defaults of the checkpoint ([`settings`]) and what is printed.

pub mod decode;
pub mod draft;
pub mod settings;
pub mod stop;

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};

use crate::sample::SampleError;
use crate::template::{Chat, ChatTemplate, TemplateError};
use crate::tokenizer::{LazyTokenizer, Special, TextStream, Tokenizer, TokenizerError};
use decode::{Completion, Finish, Limits, Timings};
use draft::DraftTokens;
use settings::Settings;
use stop::StopTexts;

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
    /// A prompt is empty.
    #[error("sequence {0} has no tokens, expected at least one")]
    Empty(usize),
    /// A token does not exist.
    #[error("sequence {sequence}: token {index} is {id}, the model's vocabulary has {vocab_size}")]
    Token {
        /// Which sequence.
        sequence: usize,
        /// Position in it.
        index: usize,
        /// The id.
        id: u32,
        /// Ids are below this.
        vocab_size: usize,
    },
    /// A prompt is too long.
    #[error(
        "sequence {sequence} has {tokens} tokens, the context holds {max_context}; build with a larger `--max-context`, or shorten it"
    )]
    TooLong {
        /// Which sequence.
        sequence: usize,
        /// Its length.
        tokens: usize,
        /// The context.
        max_context: usize,
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

/// The arguments of `generate`.
#[derive(Clone, Debug, clap::Args)]
pub struct GenerateArgs {
    /// The prompt, put into the model's chat template.
    #[arg(short, long, value_name = "TEXT", required_unless_present = "tokens", conflicts_with = "tokens")]
    pub prompt: Option<String>,
    /// A system message before the prompt.
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["raw", "tokens"])]
    pub system: Option<String>,
    /// Continue the prompt as it stands, without the chat template.
    #[arg(long, conflicts_with = "tokens")]
    pub raw: bool,
    /// Token ids instead of a prompt: a JSON array, or an array of arrays, which run as one batch.
    #[arg(long, value_name = "IDS.json")]
    pub tokens: Option<PathBuf>,
    /// Stop after so many new tokens.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 512)]
    pub max_new_tokens: usize,
    /// 0 takes the most probable token; higher is more varied [default: the checkpoint's].
    #[arg(long, value_name = "X")]
    pub temperature: Option<f32>,
    /// Choose among the K most probable tokens, 0 for all [default: the checkpoint's].
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Choose among the fewest tokens whose probabilities sum to X [default: the checkpoint's].
    #[arg(long, value_name = "X")]
    pub top_p: Option<f32>,
    /// Seed of the random numbers: the same seed gives the same tokens [default: another one each time].
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Stop where this text appears; may be given several times.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Go on after a token that ends the answer.
    #[arg(long)]
    pub ignore_eos: bool,
    /// Tokens that the model's own multi-token prediction drafts ahead of each step: a number, or auto. The tokens stay the same.
    #[arg(long, value_name = "K|auto", default_value = "auto")]
    pub draft_tokens: DraftTokens,
    /// Most tokens of a prompt in one step.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub step_tokens: u32,
    /// Print one line of JSON at the end instead of text as it comes.
    #[arg(long)]
    pub json: bool,
    /// Threads that compute [default: one a core].
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
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
    let prompts = prompts(args, files)?;
    let limits = Limits {
        max_new_tokens: args.max_new_tokens,
        step_tokens: args.step_tokens as usize,
        eos: if args.ignore_eos { Vec::new() } else { settings.eos.clone() },
        sampling: settings.sampling,
        drafts,
    };
    let mut texts = Texts::new(args, files, &prompts, out)?;
    let (completions, timings) =
        decode::run(model, &prompts.sequences, &limits, &mut |sequence, token| texts.push(sequence, token))?;
    texts.finish(&completions)?;
    let report = Report { prompts: &prompts, completions: &completions, timings, load_s, settings: &settings };
    if args.json {
        let text = report.texts(args, files)?;
        writeln!(out, "{}", report.json(&text))?;
    } else {
        eprintln!("{}", report.speed());
    }
    Ok(out.flush()?)
}

/// What is to be continued.
struct Prompts {
    sequences: Vec<Vec<u32>>,
    /// An array of arrays was given: answers are a list too.
    batch: bool,
    /// Special tokens in the new text: they show where they stood in what was given.
    special: Special,
}

fn prompts(args: &GenerateArgs, files: &TextFiles<'_>) -> Result<Prompts, GenerateError> {
    if let Some(path) = &args.tokens {
        let (sequences, batch) = read_ids(path)?;
        return Ok(Prompts { sequences, batch, special: Special::Keep });
    }
    let prompt = args.prompt.as_deref().unwrap_or_default();
    let (text, special) = if args.raw {
        (prompt.to_owned(), Special::Keep)
    } else {
        files.tokenizer.is_present().then_some(()).ok_or(TokenizerError::Absent)?;
        (files.template()?.render(&chat(prompt, args.system.as_deref()))?, Special::Skip)
    };
    Ok(Prompts { sequences: vec![files.tokenizer.get()?.encode(&text)?], batch: false, special })
}

fn chat(prompt: &str, system: Option<&str>) -> Chat {
    let mut chat = Chat::of_user(prompt);
    if let Some(system) = system {
        chat.messages.insert(0, json!({"role": "system", "content": system}));
    }
    chat
}

/// Reads a JSON array of token ids, or an array of such arrays; says whether it was the latter.
/// # Errors
/// [`GenerateError::Ids`] naming the file and what stands where an id should.
pub fn read_ids(path: &Path) -> Result<(Vec<Vec<u32>>, bool), GenerateError> {
    let bad = |reason: String| GenerateError::Ids { path: path.to_owned(), reason };
    let bytes = std::fs::read(path).map_err(|e| bad(e.to_string()))?;
    let value: Json = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
    let items = value.as_array().ok_or_else(|| bad("expected an array of token ids".to_owned()))?;
    if items.first().is_some_and(Json::is_array) {
        let inner = |(i, item): (usize, &Json)| match item {
            Json::Array(ids) => ids_of(ids).map_err(|e| bad(format!("[{i}]{e}"))),
            other => Err(bad(format!("[{i}] is {other}, expected an array of token ids like [0]"))),
        };
        return Ok((items.iter().enumerate().map(inner).collect::<Result<_, _>>()?, true));
    }
    Ok((vec![ids_of(items).map_err(bad)?], false))
}

fn ids_of(items: &[Json]) -> Result<Vec<u32>, String> {
    let id = |(i, item): (usize, &Json)| {
        let id = item.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| format!("[{i}] is {item}, expected a token id"))
    };
    items.iter().enumerate().map(id).collect()
}

/// Text as it comes: prints it, and watches for stop texts.
struct Texts<'a> {
    out: &'a mut dyn Write,
    streams: Vec<Stream<'a>>,
    /// Print while it comes: one sequence, and no JSON.
    live: bool,
    json: bool,
    batch: bool,
}

struct Stream<'a> {
    /// None where there is no tokenizer.
    text: Option<TextStream<'a>>,
    stops: StopTexts,
    /// All text so far, without a stop text.
    complete: String,
}

impl<'a> Texts<'a> {
    /// The tokenizer is read only if text is printed or watched.
    fn new(
        args: &GenerateArgs,
        files: &'a TextFiles<'_>,
        prompts: &Prompts,
        out: &'a mut dyn Write,
    ) -> Result<Self, GenerateError> {
        let wanted = !args.stop.is_empty() || (!args.json && files.tokenizer.is_present());
        let tokenizer: Option<&'a Tokenizer> = if wanted { Some(files.tokenizer.get()?) } else { None };
        let stream = |_| Stream {
            text: tokenizer.map(|t| TextStream::new(t, prompts.special)),
            stops: StopTexts::new(&args.stop),
            complete: String::new(),
        };
        let live = !prompts.batch && !args.json;
        let streams = prompts.sequences.iter().map(stream).collect();
        Ok(Self { out, streams, live, json: args.json, batch: prompts.batch })
    }

    fn push(&mut self, sequence: usize, token: u32) -> Result<ControlFlow<()>, GenerateError> {
        let stream = &mut self.streams[sequence];
        let (text, flow) = match &mut stream.text {
            Some(text) => stream.stops.push(&text.push(token)),
            None => (format!("{token} "), ControlFlow::Continue(())),
        };
        stream.complete.push_str(&text);
        if self.live {
            return print(self.out, &text).map(|printed| if printed.is_break() { printed } else { flow });
        }
        Ok(flow)
    }

    fn finish(&mut self, completions: &[Completion]) -> Result<(), GenerateError> {
        for (i, (stream, completion)) in self.streams.iter_mut().zip(completions).enumerate() {
            let mut rest = String::new();
            if let (Some(text), false) = (&mut stream.text, completion.stopped_by_text) {
                rest = stream.stops.finish(&text.finish());
            }
            stream.complete.push_str(&rest);
            if self.live && print(self.out, &format!("{rest}\n"))?.is_break() {
                break;
            }
            if self.batch && !self.json && print(self.out, &format!("[{i}] {}\n", stream.complete))?.is_break() {
                break;
            }
        }
        Ok(())
    }
}

/// Prints at once; a reader that has gone away ends generation without an error.
fn print(out: &mut dyn Write, text: &str) -> Result<ControlFlow<()>, GenerateError> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(ControlFlow::Continue(())),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
        Err(e) => Err(e.into()),
    }
}

/// What came of it.
struct Report<'a> {
    prompts: &'a Prompts,
    completions: &'a [Completion],
    timings: Timings,
    load_s: f64,
    settings: &'a Settings,
}

impl Report<'_> {
    /// The text of each completion; none without a tokenizer.
    fn texts(&self, args: &GenerateArgs, files: &TextFiles<'_>) -> Result<Vec<Option<String>>, GenerateError> {
        if !files.tokenizer.is_present() {
            return Ok(vec![None; self.completions.len()]);
        }
        let tokenizer = files.tokenizer.get()?;
        let text = |completion: &Completion| {
            let text = tokenizer.decode(completion.without_eos(), self.prompts.special)?;
            let mut stops = StopTexts::new(&args.stop);
            let (mut kept, flow) = stops.push(&text);
            if flow.is_continue() {
                kept.push_str(&stops.finish(""));
            }
            Ok(Some(kept))
        };
        self.completions.iter().map(text).collect()
    }

    fn json(&self, texts: &[Option<String>]) -> Json {
        let each = |((completion, prompt), text): ((&Completion, &Vec<u32>), &Option<String>)| {
            json!({
                "tokens": completion.tokens,
                "text": text,
                "finish_reason": completion.finish.name(),
                "prompt_tokens": prompt.len(),
                "completion_tokens": completion.tokens.len(),
                "timings": {
                    "prefill_tokens_per_s": self.timings.prefill_tokens_per_s(),
                    "decode_tokens_per_s": completion.decode_tokens_per_s(),
                    "load_s": self.load_s,
                },
                "mtp": {"drafted": completion.drafted, "accepted": completion.accepted},
                "seed": self.settings.sampling.seed,
            })
        };
        let mut objects: Vec<Json> =
            self.completions.iter().zip(&self.prompts.sequences).zip(texts).map(each).collect();
        match self.prompts.batch {
            true => json!({"sequences": objects}),
            false => objects.pop().unwrap_or(Json::Null),
        }
    }

    fn speed(&self) -> String {
        let t = &self.timings;
        let ended = self.completions.iter().filter(|c| c.finish == Finish::Stop).count();
        format!(
            "loaded in {:.3} s | prompt: {} tokens, {:.1} tokens/s | answer: {} tokens, {:.1} tokens/s | {ended} of {} ended by itself | seed {}",
            self.load_s,
            t.prefill_tokens,
            t.prefill_tokens_per_s(),
            self.completions.iter().map(|c| c.tokens.len()).sum::<usize>(),
            t.decode_tokens_per_s(),
            self.completions.len(),
            self.settings.sampling.seed,
        )
    }
}

#[cfg(test)]
mod tests;
