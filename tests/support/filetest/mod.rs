//! Files of IR text with what must become of it.
//!
//! | header | what is compared |
//! |---|---|
//! | `; test text` | print(parse(x)) with x |
//! | `; test verify` | all errors of parser or verifier with the `; error: ..` at the ends of lines |
//! | `; test pass=NAME` | the functions after this pass (with `from=NAME` after the passes from there on), or the kernels after `lower`, with the block after `; expect` |
//! | `; test config PATH after=PASS` | the kernels of each function of a model, with the block after `; expect` |
//! | `; test emit=clif`, `emit=llvm` | emitted text: each `; expect-line ..` in this order, no `; expect-none ..`; and the backend takes it |
//! | `; test run tol=NAME` | interpreter, kernel interpreter and machine code, on seeded inputs: see [`run`] |
//!
//! Files called `.graph` hold graph IR, those called `.kernel` one kernel. Lines that begin with `;;` are for people.

mod codes;
mod config;
mod emit;
mod graph;
mod kernel;
mod machine;
mod memory;
mod run;
mod tolerance;
mod values;

use std::path::{Path, PathBuf};

use nextc_ir::Op;
use nextc_ir::op::Class;
use rayon::prelude::*;

/// What a check gives: what is wrong, for people.
pub type Checked<T = ()> = Result<T, String>;

/// A file, taken apart.
#[derive(Debug)]
pub struct Case {
    path: PathBuf,
    /// The words after `; test`.
    kind: Vec<String>,
    /// The lines between the header and the text: first word, rest.
    directives: Vec<(String, String)>,
    /// Everything up to the header's end, as it stands.
    head: String,
    /// The IR text.
    body: String,
    /// The block after `; expect`.
    expect: Option<String>,
}

/// Runs all files of a folder and panics with everything that failed.
pub fn check_folder(folder: &str) {
    let wanted = std::env::var("FILETEST").unwrap_or_default();
    let files = files(folder);
    assert!(!files.is_empty(), "{folder} holds no files");
    let chosen = files.par_iter().filter(|path| path.to_string_lossy().contains(&wanted));
    let check = |path: &PathBuf| {
        let error = Case::read(path).and_then(|case| case.check()).err()?;
        Some(format!("{}:\n{error}\n\n", path.display()))
    };
    let failed: String = chosen.filter_map(check).collect();
    assert!(failed.is_empty(), "\n{failed}");
}

/// Every folder must be one of `known`.
pub fn check_folders(known: &[&str]) {
    let entries = std::fs::read_dir(root()).expect("the folder of file tests is there");
    for entry in entries {
        let name = entry.expect("it can be read").file_name();
        assert!(known.iter().any(|k| name == **k), "no test runs the files of {name:?}");
    }
}

/// Every op that is work must stand in a file of `run`.
pub fn check_ops_are_run() {
    let texts: Vec<String> = cases("run").into_iter().map(|case| case.body).collect();
    let works = Op::ALL.iter().filter(|op| op.def().class != Class::Structure);
    let missing: Vec<_> = works.filter(|op| !texts.iter().any(|t| t.contains(&format!(" = {op} ")))).collect();
    assert!(missing.is_empty(), "no file of run/ has {missing:?}");
}

/// Every rewrite rule must fire in a file of `rewrite`.
pub fn check_rules_fire() {
    let fired: Vec<String> = cases("rewrite").iter().flat_map(graph::rules_fired).collect();
    let rules = nextc_passes::rules().into_iter().map(|rule| rule.name);
    let missing: Vec<_> = rules.filter(|rule| !fired.iter().any(|f| f == rule)).collect();
    assert!(missing.is_empty(), "no file of rewrite/ needs {missing:?}");
}

fn cases(folder: &str) -> Vec<Case> {
    files(folder).iter().map(|path| Case::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).collect()
}

fn root() -> PathBuf {
    repository().join("tests/filetests")
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files(folder: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root().join(folder)).unwrap_or_else(|e| panic!("{folder}: {e}"));
    let mut files: Vec<PathBuf> = entries.map(|e| e.expect("it can be read").path()).collect();
    files.sort();
    files
}

fn bless() -> bool {
    std::env::var_os("BLESS").is_some_and(|v| v == "1")
}

impl Case {
    fn read(path: &Path) -> Checked<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| e.to_string())?;
        let first = text.lines().next().unwrap_or_default();
        let kind = first.strip_prefix("; test ").ok_or("the first line is no `; test KIND`")?;
        let head: String = text.lines().take_while(|l| l.starts_with(';') && *l != EXPECT).map(line).collect();
        let rest = &text[head.len()..];
        let (body, expect) = match rest.find(&line(EXPECT)) {
            Some(at) => (&rest[..at], Some(uncommented(&rest[at + EXPECT.len() + 1..])?)),
            None => (rest, None),
        };
        let directive = |l: &str| {
            let words = l.trim_start_matches(';').trim();
            let (word, rest) = words.split_once(' ').unwrap_or((words, ""));
            (word.to_owned(), rest.to_owned())
        };
        let lines = head.lines().skip(1).filter(|l| !l.starts_with(";;"));
        let directives = lines.map(directive).collect();
        let kind = kind.split_whitespace().map(str::to_owned).collect();
        Ok(Self { path: path.to_owned(), kind, directives, body: body.to_owned(), expect, head })
    }

    fn check(&self) -> Checked {
        let is_kernel = self.path.extension().is_some_and(|e| e == "kernel");
        match (self.kind[0].as_str(), is_kernel) {
            ("text", false) => graph::check_text(self),
            ("verify", false) => graph::check_verify(self),
            ("text", true) => kernel::check_text(self),
            ("verify", true) => kernel::check_verify(self),
            ("config", _) => config::check(self),
            ("run", false) => run::check(self),
            ("pass=lower", false) => emit::check_lower(self),
            (kind, _) if kind.starts_with("emit=") => emit::check(self, is_kernel),
            (kind, false) if kind.starts_with("pass=") => graph::check_pass(self, &kind["pass=".len()..]),
            (kind, _) => Err(format!("there is no test `{kind}` of this kind of file")),
        }
    }

    /// The value of `NAME=` in the header.
    fn option(&self, name: &str) -> Option<&str> {
        self.kind.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }

    /// What follows `word` in the lines of the header that begin with it.
    fn directives<'a>(&'a self, word: &'a str) -> impl Iterator<Item = &'a str> {
        self.directives.iter().filter(move |d| d.0 == word).map(|d| d.1.as_str())
    }

    /// An error if a line of the header begins with something else.
    fn only(&self, known: &[&str]) -> Checked {
        match self.directives.iter().find(|d| !known.contains(&d.0.as_str())) {
            Some((word, _)) => Err(format!("a line begins with `; {word}`, expected one of {known:?}")),
            None => Ok(()),
        }
    }

    /// Compares with the block after `; expect`, or writes it.
    fn compare(&self, found: &str) -> Checked {
        let found: String = found.lines().map(str::trim_end).map(line).collect();
        match &self.expect {
            Some(expect) if *expect == found => Ok(()),
            _ if bless() => {
                let commented: String = found.lines().map(|l| line(format!("; {l}").trim_end())).collect();
                self.write(&format!("{}{}{}{commented}", self.head, self.body, line(EXPECT)))
            }
            Some(expect) => Err(format!("found\n{found}\nexpected\n{expect}")),
            None => Err(format!("there is no `{EXPECT}` block; found\n{found}")),
        }
    }

    /// Compares with the text itself, or writes it.
    fn compare_body(&self, found: &str) -> Checked {
        match () {
            () if found == self.body => Ok(()),
            () if bless() => self.write(&format!("{}{found}", self.head)),
            () => Err(format!("found\n{found}\nexpected\n{}", self.body)),
        }
    }

    /// Compares the errors, each with its line in the file (from 1), with the `; error: ..` of that line, or writes these.
    fn compare_errors(&self, errors: &[(usize, String)]) -> Checked {
        let first = self.head.lines().count() + 1;
        let mut annotated = String::new();
        for (number, text) in (first..).zip(self.body.lines()) {
            let text = text.split("; error: ").next().unwrap_or_default().trim_end();
            let at = errors.iter().filter(|e| e.0 == number);
            let notes: String = at.map(|e| format!(" ; error: {}", e.1.replace('\n', " "))).collect();
            annotated.push_str(&line(&format!("{text}{notes}")));
        }
        if errors.is_empty() {
            return Err("there is no error".to_owned());
        }
        let last = first + self.body.lines().count();
        if let Some((at, error)) = errors.iter().find(|e| !(first..last).contains(&e.0)) {
            return Err(format!("an error on line {at}, which is not part of the text: {error}"));
        }
        self.compare_body(&annotated)
    }

    /// The text with as many empty lines before it as the header has, so that line numbers are those of the file.
    fn body_in_place(&self) -> String {
        "\n".repeat(self.head.lines().count()) + &self.body
    }

    fn write(&self, text: &str) -> Checked {
        std::fs::write(&self.path, text).map_err(|e| e.to_string())
    }
}

const EXPECT: &str = "; expect";

fn line(text: &str) -> String {
    format!("{text}\n")
}

/// The lines of a block of comments.
fn uncommented(block: &str) -> Checked<String> {
    let one = |l: &str| match l.strip_prefix(';') {
        Some(rest) => Ok(line(rest.strip_prefix(' ').unwrap_or(rest))),
        None => Err(format!("`{l}` in the block after `{EXPECT}` is no comment")),
    };
    block.lines().map(one).collect()
}

/// Errors as text.
fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A list of errors as lines of text.
fn lines<E: std::fmt::Display>(errors: Vec<E>) -> String {
    errors.iter().map(|e| line(&e.to_string())).collect()
}
