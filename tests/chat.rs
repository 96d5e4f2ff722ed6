//! The chat of an executable, driven on a terminal: what is said, what it costs, going back, files, and Ctrl-C.

mod support;

use std::path::Path;
use std::process::Command;

use support::exe::{Exe, succeed};
use support::terminal::Terminal;

const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/demo-model");
const GREEDY: [&str; 2] = ["--temperature", "0"];
const QUESTION: &str = "What is a compiler?";
const SECOND: &str = "And what is a cat?";
const THIRD: &str = "What is a dog?";

fn demo() -> Exe {
    Exe::build(Path::new(DEMO), "cranelift", &[])
}

fn start(exe: &Exe, args: &[&str]) -> Terminal {
    let mut terminal = Terminal::start(Command::new(exe.path()).args(args));
    terminal.wait_for("> ");
    terminal
}

/// Types a line and gives what is printed until the next prompt.
fn say(terminal: &mut Terminal, line: &str) -> String {
    terminal.type_line(line);
    // the line is drawn as it is typed, and again when it is done
    terminal.wait_for("\n");
    let said = terminal.wait_for("\n> ");
    said.trim().to_owned()
}

/// The numbers before `fed` and `reused`, and of the chat's tokens.
fn stats(terminal: &mut Terminal) -> [usize; 3] {
    let text = say(terminal, "/stats");
    let words: Vec<&str> = text.split_whitespace().collect();
    let before = |word: &str, back: usize| {
        let at = words.iter().position(|w| w.trim_end_matches(',') == word).unwrap_or_else(|| panic!("{text}"));
        words[at - back].parse().unwrap_or_else(|_| panic!("{text}"))
    };
    [before("fed", 2), before("reused", 1), before("of", 1)]
}

fn quit(mut terminal: Terminal) {
    terminal.type_line("/quit");
    assert!(terminal.end().success());
}

#[test]
fn a_chat_keeps_its_state_goes_back_and_is_saved() {
    let exe = demo();
    let expected = succeed(exe.command("generate").args(["-p", QUESTION]).args(GREEDY));
    let file = exe.dir().join("a chat");
    let file = file.to_str().expect("temporary folders have plain names");
    let mut terminal = start(&exe, &GREEDY);
    assert_eq!(say(&mut terminal, QUESTION), expected.trim(), "as `generate` answers");
    assert_eq!(stats(&mut terminal)[1], 0);
    let second = say(&mut terminal, SECOND);
    let [fed, reused, _] = stats(&mut terminal);
    assert!(fed < 25 && reused > 25, "{fed} fed, {reused} reused");

    assert!(say(&mut terminal, &format!("/save {file}")).starts_with("saved 2 turns"));
    let third = say(&mut terminal, THIRD);
    let third_stats = stats(&mut terminal);
    assert!(say(&mut terminal, "/undo").contains("2 turns left"));
    assert!(say(&mut terminal, "/undo").contains("1 turn left"));
    assert_eq!(say(&mut terminal, SECOND), second, "as if it had not been asked before");
    assert_eq!(stats(&mut terminal)[..2], [fed, reused], "going back costs nothing");
    assert_eq!(say(&mut terminal, THIRD), third);
    assert_eq!(stats(&mut terminal), third_stats);
    quit(terminal);

    // another process goes on as the first did, and only what is new costs
    for drafts in ["auto", "0", "3"] {
        let mut terminal = start(&exe, &[&GREEDY[..], &["--draft-tokens", drafts]].concat());
        assert!(say(&mut terminal, &format!("/load {file}")).starts_with("loaded 2 turns"));
        assert_eq!(say(&mut terminal, THIRD), third, "{drafts} drafts");
        assert_eq!(stats(&mut terminal)[..2], third_stats[..2]);
        quit(terminal);
    }
}

#[test]
fn damaged_files_and_files_of_another_model_are_refused() {
    let exe = demo();
    let path = exe.dir().join("chat");
    let file = path.to_str().expect("temporary folders have plain names");
    let mut terminal = start(&exe, &GREEDY);
    say(&mut terminal, QUESTION);
    say(&mut terminal, &format!("/save {file}"));
    let whole = std::fs::read(&path).expect("it was saved");
    for at in [40, whole.len() / 2, whole.len() - 5] {
        let mut bytes = whole.clone();
        bytes[at] ^= 4;
        std::fs::write(&path, bytes).expect("it can be written");
        assert!(say(&mut terminal, &format!("/load {file}")).contains("damaged: its checksum"));
    }
    std::fs::write(&path, &whole).expect("it can be written");
    let second = say(&mut terminal, SECOND);
    assert!(say(&mut terminal, &format!("/load {file}")).starts_with("loaded 1 turn,"));
    assert_eq!(say(&mut terminal, SECOND), second);
    quit(terminal);

    let other = Exe::build(Path::new(DEMO), "cranelift", &["--max-context", "512"]);
    let mut terminal = start(&other, &GREEDY);
    assert!(say(&mut terminal, &format!("/load {file}")).contains("saved by `demo-model` (fingerprint"));
    quit(terminal);
}

#[test]
fn control_c_stops_an_answer_and_twice_the_program() {
    let exe = demo();
    // so hot that it goes on until the context is full
    let mut terminal = start(&exe, &["--temperature", "9", "--top-k", "0", "--top-p", "1", "--seed", "1"]);
    terminal.type_line(QUESTION);
    terminal.wait_for("\n");
    terminal.wait_for(" ");
    terminal.press("\x03");
    terminal.wait_for("[stopped]\n> ");
    let [fed, _, tokens] = stats(&mut terminal);
    assert!(tokens > fed && tokens < 4000, "{tokens} tokens");
    // what there is of the answer stays, and the chat goes on
    terminal.type_line(SECOND);
    terminal.wait_for("\n");
    terminal.wait_for(" ");
    terminal.press("\x03");
    terminal.wait_for("[stopped]\n> ");
    let [fed, reused, _] = stats(&mut terminal);
    assert!(fed < 25 && reused + 2 >= tokens, "{fed} fed, {reused} reused of {tokens}");
    terminal.press("half a line\x03");
    terminal.wait_for("Ctrl-C again, or Ctrl-D, ends");
    terminal.wait_for("> ");
    terminal.press("\x03");
    assert!(terminal.end().success());
}

#[test]
fn lines_are_edited_joined_and_remembered() {
    let exe = demo();
    let mut terminal = start(&exe, &GREEDY);
    terminal.press("/hellp\x7f\x7fp");
    assert!(say(&mut terminal, "").contains("/undo"), "a line can be mended");
    terminal.press("\x1b[A");
    assert!(say(&mut terminal, "").contains("/undo"), "the arrow brings it back");
    let whole = say(&mut terminal, "/system Be brief.");
    assert!(whole.contains("new system message"), "{whole}");
    terminal.type_line("\"\"\"one");
    terminal.wait_for("\n. ");
    terminal.type_line("two\"\"\"");
    terminal.wait_for("\n> ");
    assert!(say(&mut terminal, "/nonsense").contains("there is no command `/nonsense`"));
    terminal.press("\x04");
    assert!(terminal.end().success());
}

#[test]
fn a_pipe_is_one_prompt() {
    use std::io::Write;
    let exe = demo();
    let mut command = Command::new(exe.path());
    command.args(GREEDY).stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut child = command.spawn().expect("it starts");
    child.stdin.take().expect("it is piped").write_all(QUESTION.as_bytes()).expect("it reads");
    let answer = child.wait_with_output().expect("it ends");
    let expected = succeed(exe.command("generate").args(["-p", QUESTION]).args(GREEDY));
    assert_eq!(String::from_utf8_lossy(&answer.stdout), expected);
    let refused = exe.run(&["--no-thinking"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("does not know `enable_thinking`"));
}
