//! What is typed: lines to messages and commands.

use std::path::PathBuf;

use super::error::ChatError;

/// One line that was typed, or why there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// A line, without its end.
    Text(String),
    /// Ctrl-C.
    Interrupted,
    /// Ctrl-D, or the terminal is gone.
    End,
}

/// Where lines come from.
pub trait Lines {
    /// The next line, asked for with `prompt`.
    /// # Errors
    /// [`ChatError::Terminal`] if the terminal fails.
    fn line(&mut self, prompt: &str) -> Result<Line, ChatError>;
    /// Remembers a message for the arrow keys.
    fn remember(&mut self, message: &str);
}

/// A line editor on the terminal.
pub(super) struct Editor(rustyline::DefaultEditor);

impl Editor {
    pub fn new() -> Result<Self, ChatError> {
        rustyline::DefaultEditor::new().map(Self).map_err(|e| ChatError::Terminal(e.to_string()))
    }
}

impl Lines for Editor {
    fn line(&mut self, prompt: &str) -> Result<Line, ChatError> {
        use rustyline::error::ReadlineError;
        match self.0.readline(prompt) {
            Ok(text) => Ok(Line::Text(text)),
            Err(ReadlineError::Interrupted) => Ok(Line::Interrupted),
            Err(ReadlineError::Eof) => Ok(Line::End),
            Err(error) => Err(ChatError::Terminal(error.to_string())),
        }
    }

    fn remember(&mut self, message: &str) {
        // history is a comfort: without it the chat goes on
        let _ = self.0.add_history_entry(message);
    }
}

const FIRST: &str = "> ";
const FURTHER: &str = ". ";
const QUOTES: &str = "\"\"\"";

/// The next message, which may have several lines: a line that ends with `\` goes on, and `"""` begins text up to the next `"""`.
/// # Errors
/// [`ChatError::Terminal`] if the terminal fails.
pub fn read_message(lines: &mut dyn Lines) -> Result<Line, ChatError> {
    let mut text = match lines.line(FIRST)? {
        Line::Text(text) => text,
        other => return Ok(other),
    };
    loop {
        let quoted = text.trim_start().starts_with(QUOTES);
        let open = quoted && !text.trim_start()[QUOTES.len()..].contains(QUOTES);
        let goes_on = !quoted && text.ends_with('\\');
        if !open && !goes_on {
            break;
        }
        if goes_on {
            text.pop();
        }
        match lines.line(FURTHER)? {
            Line::Text(more) => text = format!("{text}\n{more}"),
            other => return Ok(other),
        }
    }
    if !text.trim().is_empty() {
        lines.remember(&text);
    }
    Ok(Line::Text(without_quotes(&text)))
}

fn without_quotes(text: &str) -> String {
    let inner = text.trim_start().strip_prefix(QUOTES).and_then(|t| t.split_once(QUOTES));
    inner.map_or_else(|| text.to_owned(), |(inner, after)| format!("{inner}{after}").trim_matches('\n').to_owned())
}

/// What a message asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Nothing.
    Nothing,
    /// An answer to this.
    Say(String),
    /// A list of commands.
    Help,
    /// Forget everything but the system message.
    Reset,
    /// Take the last question and its answer back.
    Undo,
    /// Say what the last turn cost.
    Stats,
    /// Write the chat to a file.
    Save(PathBuf),
    /// Read a chat from a file.
    Load(PathBuf),
    /// Set the system message, or show it.
    System(Option<String>),
    /// End.
    Quit,
    /// A command that cannot be obeyed, and why.
    Wrong(String),
}

impl Request {
    /// Reads a message: commands begin with `/` and a letter.
    pub fn of(message: &str) -> Self {
        let text = message.trim();
        let is_command = text.strip_prefix('/').is_some_and(|t| t.starts_with(|c: char| c.is_ascii_alphabetic()));
        let (name, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        // a path is no command
        if !is_command || name[1..].contains('/') {
            return if text.is_empty() { Self::Nothing } else { Self::Say(message.to_owned()) };
        }
        let rest = rest.trim();
        let file = |make: fn(PathBuf) -> Self| match rest {
            "" => Self::Wrong(format!("`{name}` needs a file: `{name} FILE`")),
            path => make(PathBuf::from(path)),
        };
        match name {
            "/save" => file(Self::Save),
            "/load" => file(Self::Load),
            "/system" => Self::System((!rest.is_empty()).then(|| rest.to_owned())),
            _ if !rest.is_empty() && COMMANDS.iter().any(|(c, _)| *c == name) => {
                Self::Wrong(format!("`{name}` takes nothing, `{rest}` was given"))
            }
            "/help" => Self::Help,
            "/reset" => Self::Reset,
            "/undo" => Self::Undo,
            "/stats" => Self::Stats,
            "/quit" => Self::Quit,
            _ => Self::Wrong(format!("there is no command `{name}`; `/help` lists them")),
        }
    }
}

/// Commands, and what they do.
pub const COMMANDS: &[(&str, &str)] = &[
    ("/help", "this list"),
    ("/reset", "forget everything but the system message"),
    ("/undo", "take back the last question and its answer"),
    ("/stats", "tokens, speed and memory"),
    ("/save FILE", "write the chat with its state to a file"),
    ("/load FILE", "go on with a chat from a file"),
    ("/system TEXT", "set the system message; without TEXT, show it"),
    ("/quit", "end; so do Ctrl-D, and Ctrl-C twice"),
];

#[cfg(test)]
mod tests {
    use super::*;

    struct Typed(Vec<Line>, Vec<String>);

    impl Lines for Typed {
        fn line(&mut self, _: &str) -> Result<Line, ChatError> {
            Ok(if self.0.is_empty() { Line::End } else { self.0.remove(0) })
        }
        fn remember(&mut self, message: &str) {
            self.1.push(message.to_owned());
        }
    }

    fn check(lines: &[&str], expected: &str) {
        let lines = lines.iter().map(|&l| Line::Text(l.to_owned())).collect();
        let message = read_message(&mut Typed(lines, Vec::new())).unwrap();
        assert_eq!(message, Line::Text(expected.to_owned()));
    }

    #[test]
    fn messages_may_have_several_lines() {
        check(&["one"], "one");
        check(&["one\\", "two\\", "three", "four"], "one\ntwo\nthree");
        check(&["\"\"\"one", "two\\", "\"\"\"", "three"], "one\ntwo\\");
        check(&["\"\"\"", "one", "", "two\"\"\""], "one\n\ntwo");
        check(&["\"\"\"one\"\"\""], "one");
        check(&["say \"\"\"", "x"], "say \"\"\"");
    }

    #[test]
    fn interrupts_and_ends_are_handed_on() {
        for end in [Line::Interrupted, Line::End] {
            assert_eq!(read_message(&mut Typed(vec![end.clone()], Vec::new())).unwrap(), end);
            let lines = vec![Line::Text("a\\".to_owned()), end.clone()];
            assert_eq!(read_message(&mut Typed(lines, Vec::new())).unwrap(), end);
        }
    }

    #[test]
    fn messages_are_remembered_whole() {
        let mut typed = Typed(vec![Line::Text("a\\".to_owned()), Line::Text("b".to_owned())], Vec::new());
        read_message(&mut typed).unwrap();
        assert_eq!(typed.1, ["a\nb"]);
    }

    #[test]
    fn commands_are_told_from_messages() {
        assert_eq!(Request::of("  "), Request::Nothing);
        assert_eq!(Request::of("hello /help"), Request::Say("hello /help".to_owned()));
        assert_eq!(Request::of("/etc/passwd is a file"), Request::Say("/etc/passwd is a file".to_owned()));
        assert_eq!(Request::of("// comment"), Request::Say("// comment".to_owned()));
        assert_eq!(Request::of(" /undo "), Request::Undo);
        assert_eq!(Request::of("/save a b"), Request::Save("a b".into()));
        assert_eq!(Request::of("/system Be  brief."), Request::System(Some("Be  brief.".to_owned())));
        assert_eq!(Request::of("/system"), Request::System(None));
        assert!(matches!(Request::of("/load"), Request::Wrong(_)));
        assert!(matches!(Request::of("/quit now"), Request::Wrong(_)));
        assert!(matches!(Request::of("/exit"), Request::Wrong(_)));
    }
}
