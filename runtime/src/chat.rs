//! A chat on a terminal that keeps its state: a turn costs only its own tokens.
//!
//! [`session`] holds the model's sequence and goes back to snapshots of it; [`conversation`] makes tokens of messages;
//! [`save`] writes both to a file. This module reads what is typed and shows the answers.

pub mod args;
pub mod conversation;
pub mod error;
pub mod input;
mod interrupt;
pub mod model;
pub mod save;
pub mod session;
pub mod thoughts;

use std::io::{self, IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::Path;

use crate::artifact::Artifact;
use crate::error::Error;
use crate::generate::{TextFiles, settings::Settings};
use crate::template::ChatTemplate;
use crate::text::Model;
use crate::tokenizer::{Special, TextStream, Tokenizer};
use args::ChatArgs;
use conversation::Conversation;
pub use error::ChatError;
use input::{COMMANDS, Line, Lines, Request, read_message};
use model::{ChatModel, OneSequence};
use session::{Answering, End, MAX_SNAPSHOTS, Session, TurnStats};
use thoughts::{Run, Thoughts};

/// Begins thoughts on a terminal, and ends them.
const DIM: [&str; 2] = ["\x1b[2m", "\x1b[0m"];

/// Chats on a terminal until the user ends it, or answers one prompt from a pipe.
/// # Errors
/// [`Error`] says what is wrong. What goes wrong in a turn of a chat is told there, and the chat goes on.
pub(crate) fn run(artifact: Artifact, args: &ChatArgs) -> Result<(), Error> {
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        return converse(artifact, args);
    }
    let mut prompt = String::new();
    stdin.lock().read_to_string(&mut prompt).map_err(Error::io(Path::new("standard input")))?;
    crate::text::generate(artifact, &args.generate(prompt.trim_end()))
}

fn converse(artifact: Artifact, chat_args: &ChatArgs) -> Result<(), Error> {
    let args = &chat_args.generate("").for_machine(&artifact.metadata().target.arch);
    let assets = artifact.assets()?;
    let files = TextFiles::find(|name| assets.get(name));
    let template = files.template().map_err(ChatError::from)?;
    let tokenizer = files.tokenizer.get().map_err(ChatError::from)?;
    let variables = template.thinking(args.no_thinking).map_err(ChatError::from)?;
    let settings = Settings::new(args, files.generation_config, &artifact.metadata().model.eos_token_ids)?;
    let mut model = OneSequence::begin(Model::open(artifact, args)?)?;
    let decoder = settings.decoder(args, args.draft_tokens.planner(&mut model)?);
    decoder.prepare(&mut model);
    let answering = Answering { max_new_tokens: chat_args.max_answer(), sampling: settings.sampling, decoder };
    let out = std::io::stdout();
    let mut chat = Chat {
        session: Session::new(model),
        conversation: Conversation::new(args.system.clone(), variables),
        template,
        tokenizer,
        answering,
        last: TurnStats::default(),
        dim: out.is_terminal(),
        out: Box::new(out),
    };
    interrupt::watch();
    eprintln!("{}: `/help` lists commands, Ctrl-C stops an answer, Ctrl-D ends", chat.session.model().name());
    chat.converse(&mut input::Editor::new()?)?;
    Ok(())
}

/// A chat with all that belongs to it.
struct Chat<'a, M: ChatModel> {
    session: Session<M>,
    conversation: Conversation,
    template: ChatTemplate,
    tokenizer: &'a Tokenizer,
    answering: Answering,
    last: TurnStats,
    /// Show thoughts dimmed.
    dim: bool,
    out: Box<dyn Write>,
}

impl<M: ChatModel> Chat<'_, M> {
    /// Reads and obeys until the user ends it.
    fn converse(&mut self, lines: &mut dyn Lines) -> Result<(), ChatError> {
        let mut interrupted = false;
        loop {
            match read_message(lines)? {
                Line::End => return Ok(()),
                Line::Interrupted if interrupted => return Ok(()),
                Line::Interrupted => {
                    interrupted = true;
                    self.print("Ctrl-C again, or Ctrl-D, ends\n")?;
                }
                Line::Text(message) => {
                    interrupted = false;
                    if self.obey(Request::of(&message))?.is_break() {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Does what is asked for; what goes wrong is told.
    fn obey(&mut self, request: Request) -> Result<ControlFlow<()>, ChatError> {
        if request == Request::Quit {
            return Ok(ControlFlow::Break(()));
        }
        match self.try_to(request) {
            Ok(said) => self.print(&said)?,
            Err(error @ (ChatError::Output(_) | ChatError::Terminal(_))) => return Err(error),
            Err(error) => self.print(&format!("error: {error}\n"))?,
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Does what is asked for, and gives what is to be said about it.
    fn try_to(&mut self, request: Request) -> Result<String, ChatError> {
        Ok(match request {
            Request::Nothing | Request::Quit => String::new(),
            Request::Wrong(why) => format!("{why}\n"),
            Request::Help => help(),
            Request::Stats => self.stats(),
            Request::Say(text) => self.turn(&text)?.to_owned(),
            Request::Undo if self.conversation.undo() => {
                let known = self.conversation.known(&self.template);
                self.session.go_back_to(&known)?;
                format!("took back a turn; {} left\n", count(self.turns(), "turn"))
            }
            Request::Undo => "nothing to take back\n".to_owned(),
            Request::Reset => {
                self.conversation.reset();
                self.session.reset()?;
                "forgot everything\n".to_owned()
            }
            Request::System(None) => match &self.conversation.system {
                Some(system) => format!("{system}\n"),
                None => "there is no system message\n".to_owned(),
            },
            Request::System(text) => {
                self.conversation.system = text;
                "the next turn begins with the new system message, so it reads the whole chat again\n".to_owned()
            }
            Request::Save(path) => self.save(&path)?,
            Request::Load(path) => self.load(&path)?,
        })
    }

    /// Answers a message, and gives what is to be said after the answer. If there is no answer, the message is taken back.
    fn turn(&mut self, message: &str) -> Result<&'static str, ChatError> {
        self.conversation.ask(message);
        let result = self.answer();
        if !matches!(result, Ok((End::Stop | End::Length, _) | (End::Interrupted, true))) {
            self.conversation.undo();
        }
        Ok(match result? {
            (End::Stop, _) => "\n",
            (End::Length, _) => "\n[cut off: as long as allowed]\n",
            (End::Interrupted, true) => "\n[stopped]\n",
            (End::Interrupted, false) => "[stopped before an answer; the message is taken back]\n",
        })
    }

    /// Answers the conversation; says how it ended, and whether anything was answered.
    fn answer(&mut self) -> Result<(End, bool), ChatError> {
        let (prompt, thinking) = self.conversation.prompt(&self.template, self.tokenizer)?;
        let mut shown = Shown {
            text: TextStream::new(self.tokenizer, Special::Skip),
            thoughts: Thoughts::new(thinking),
            dim: self.dim,
            dimmed: false,
            out: &mut self.out,
        };
        interrupt::take();
        let result = self.session.answer(&prompt, &mut self.answering, &mut |token| {
            if let Some(token) = token {
                shown.push(token)?;
            }
            Ok(if interrupt::take() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        });
        shown.finish().map_err(ChatError::Output)?;
        let unfinished = shown.thoughts.inside();
        let answer = result?;
        self.last = answer.stats;
        let answered = !answer.tokens.is_empty();
        if answered || answer.end != End::Interrupted {
            self.conversation.answer(&answer.tokens, unfinished, self.tokenizer)?;
            if self.conversation.goes_on(&self.template) {
                self.session.forget_snapshot(prompt.stable);
            }
        }
        Ok((answer.end, answered))
    }

    fn turns(&self) -> usize {
        self.conversation.messages.iter().filter(|m| m["role"] == "user").count()
    }

    fn stats(&self) -> String {
        let last = &self.last;
        let rate = |tokens: usize, seconds: f64| if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 };
        let fed = self.session.fed().len();
        let model = self.session.model();
        let (snapshots, snapshot_bytes) = self.session.snapshots();
        format!(
            "last turn: {} fed, {} reused, {:.1} tokens/s | answer: {}, {:.1} tokens/s, {} of {} right\n\
             chat: {}, {} of {} tokens\n\
             memory: {:.1} MB of state, {:.1} MB in {} (at most {MAX_SNAPSHOTS}) | seed {}\n",
            count(last.fed, "token"),
            last.reused,
            rate(last.fed, last.prefill_s),
            count(last.answer, "token"),
            rate(last.answer.saturating_sub(1), last.decode_s),
            last.accepted,
            count(last.drafted, "draft"),
            count(self.turns(), "turn"),
            fed,
            model.max_context(),
            model.state_bytes() as f64 / 1e6,
            snapshot_bytes as f64 / 1e6,
            count(snapshots, "snapshot"),
            self.answering.sampling.seed,
        )
    }

    fn save(&mut self, path: &Path) -> Result<String, ChatError> {
        let bytes = save::save(path, &self.session, &self.conversation, self.answering.sampling.seed)?;
        let what = format!("{}, {}", count(self.turns(), "turn"), count(self.session.fed().len(), "token"));
        Ok(format!("saved {what}: {}, {:.1} MB\n", path.display(), bytes as f64 / 1e6))
    }

    fn load(&mut self, path: &Path) -> Result<String, ChatError> {
        let loaded = save::load(path, &mut self.session)?;
        self.conversation = loaded.conversation;
        self.answering.sampling.seed = loaded.seed;
        self.last = TurnStats::default();
        Ok(format!("loaded {}, {}\n", count(self.turns(), "turn"), count(self.session.fed().len(), "token")))
    }

    fn print(&mut self, text: &str) -> Result<(), ChatError> {
        write(&mut *self.out, text).map_err(ChatError::Output)
    }
}

fn help() -> String {
    let width = COMMANDS.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let commands: String = COMMANDS.iter().map(|(name, what)| format!("{name:width$}  {what}\n")).collect();
    format!("{commands}A line that ends with `\\` goes on in the next; text between `\"\"\"` may have many lines.\n")
}

fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

fn write(out: &mut dyn Write, text: &str) -> io::Result<()> {
    out.write_all(text.as_bytes()).and_then(|()| out.flush())
}

/// An answer on its way to the terminal.
struct Shown<'a> {
    text: TextStream<'a>,
    thoughts: Thoughts,
    dim: bool,
    dimmed: bool,
    out: &'a mut dyn Write,
}

impl Shown<'_> {
    fn push(&mut self, token: u32) -> io::Result<()> {
        let runs = self.thoughts.push(&self.text.push(token));
        self.show(runs)
    }

    /// Shows what was held back, and ends thoughts on the terminal.
    fn finish(&mut self) -> io::Result<()> {
        let mut runs = self.thoughts.push(&self.text.finish());
        runs.extend(self.thoughts.finish());
        self.show(runs)?;
        self.set_dimmed(false)
    }

    fn show(&mut self, runs: Vec<Run>) -> io::Result<()> {
        runs.into_iter().try_for_each(|run| {
            self.set_dimmed(run.thought)?;
            write(self.out, &run.text)
        })
    }

    fn set_dimmed(&mut self, dimmed: bool) -> io::Result<()> {
        if self.dim && dimmed != self.dimmed {
            write(self.out, DIM[usize::from(!dimmed)])?;
        }
        self.dimmed = dimmed;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
