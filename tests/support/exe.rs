//! A built executable as a subject.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::golden::Golden;
use super::{Feed, Rows, Subject};

/// An executable in a directory of its own.
pub struct Exe {
    dir: tempfile::TempDir,
    path: PathBuf,
}

/// The `nextc` of this build.
pub fn nextc() -> Command {
    Command::new(env!("CARGO_BIN_EXE_nextc"))
}

/// Runs a command that must succeed, and gives its standard output.
pub fn succeed(command: &mut Command) -> String {
    let out = command.output().expect("the command starts");
    assert!(out.status.success(), "{command:?}: {}\n{}", out.status, String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("UTF-8")
}

/// The backends that this build has.
pub fn backends() -> Vec<&'static str> {
    if cfg!(feature = "llvm") { vec!["cranelift", "llvm"] } else { vec!["cranelift"] }
}

impl Exe {
    /// Builds a model in float32.
    pub fn build(model: &Path, backend: &str, extra: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("exe");
        succeed(
            nextc()
                .arg("build")
                .arg(model)
                .arg("-o")
                .arg(&path)
                .args(["--backend", backend])
                .args(if extra.contains(&"--activations") { &[][..] } else { &["--activations", "f32"] })
                .args(extra),
        );
        Self { dir, path }
    }

    /// One that has been built before, if it is there.
    pub fn packed(path: &Path) -> Option<Self> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        path.is_file().then(|| Self { dir, path: path.to_owned() })
    }

    /// Token ids that it generates for each prompt, whatever ends sequences, and how many drafts were right.
    pub fn generate(&self, prompts: &[Vec<i32>], args: &[&str]) -> (Vec<Vec<i32>>, u64) {
        let ids = self.ids(prompts);
        let fixed = ["--tokens", ids.to_str().expect("UTF-8"), "--ignore-eos", "--json"];
        let out = self.json("generate", &[&fixed, args].concat());
        let one = [out.clone()];
        let sequences = out["sequences"].as_array().map_or(one.as_slice(), Vec::as_slice);
        let tokens = |s: &serde_json::Value| serde_json::from_value(s["tokens"].clone()).expect("token ids");
        let right = sequences.iter().filter_map(|s| s["mtp"]["accepted"].as_u64()).sum();
        (sequences.iter().map(tokens).collect(), right)
    }

    /// A directory that lives as long as the executable.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A command of the executable.
    pub fn command(&self, name: &str) -> Command {
        let mut c = Command::new(&self.path);
        c.arg(name);
        c
    }

    /// Runs a command of the executable, whatever comes.
    pub fn run(&self, args: &[&str]) -> Output {
        Command::new(&self.path).args(args).output().expect("the executable starts")
    }

    /// Writes token ids to a file.
    pub fn ids(&self, sequences: &[Vec<i32>]) -> PathBuf {
        let path = self.dir.path().join("ids.json");
        let json =
            if sequences.len() == 1 { serde_json::to_string(&sequences[0]) } else { serde_json::to_string(sequences) };
        std::fs::write(&path, json.expect("plain numbers")).expect("the file is written");
        path
    }

    /// Runs a command whose last line is JSON.
    pub fn json(&self, name: &str, args: &[&str]) -> serde_json::Value {
        let text = succeed(self.command(name).args(args));
        let last = text.lines().last().unwrap_or_default();
        serde_json::from_str(last).unwrap_or_else(|e| panic!("{name}: {e}: {last}"))
    }
}

impl Subject for Exe {
    fn logits(&self, sequences: &[Vec<i32>], feed: Feed, drafts: usize) -> Vec<Rows> {
        let (ids, out) = (self.ids(sequences), self.dir.path().join("out.safetensors"));
        let mut command = self.command("eval");
        command.arg("--tokens").arg(&ids).arg("--out").arg(&out);
        match feed {
            Feed::Prefill => command.args(["--mode", "prefill"]),
            Feed::Pieces(n) => command.args(["--mode", "prefill", "--step-tokens", &n.to_string()]),
            Feed::Decode => command.args(["--mode", "decode"]),
        };
        if drafts > 0 {
            command.args(["--mtp", &drafts.to_string()]);
        }
        succeed(&mut command);
        let result = Golden::read(&out);
        let name = |base: &str, i: usize| if sequences.len() == 1 { base.to_owned() } else { format!("{base}.{i}") };
        (0..sequences.len())
            .map(|i| Rows {
                logits: result.floats(&name("logits", i)).0.to_vec(),
                mtp: if drafts > 0 { result.floats(&name("mtp_logits", i)).0.to_vec() } else { Vec::new() },
            })
            .collect()
    }
}
