//! `nextc run`: build into a cache, and execute.
//!
//! An entry of the cache is a folder named by a fingerprint of everything that the executable depends on: this compiler, the
//! options, and the model's files by their length and time of change (small ones by content).

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::UNIX_EPOCH;

use anyhow::{Context, bail};

use crate::cli::{ModelArgs, RunArgs};
use crate::{compile, show};

/// Name of the executable in its folder.
const EXECUTABLE: &str = "model";
/// Files up to this size count by their content.
const SMALL_BYTES: u64 = 32 << 20;

/// Builds where the cache has nothing, and becomes the executable.
pub fn run(args: &RunArgs) -> anyhow::Result<()> {
    let arguments = arguments(args);
    if args.no_cache {
        return run_once(&args.model, &arguments);
    }
    let entry = cache_dir()?.join(fingerprint(&args.model)?);
    let executable = entry.join(EXECUTABLE);
    if !executable.is_file() {
        fs::create_dir_all(&entry).with_context(|| entry.display().to_string())?;
        compile::build(&args.model, Some(&executable)).inspect_err(|_| {
            // only an empty folder goes; what another build put there stays
            let _ = fs::remove_dir(&entry);
        })?;
    }
    eprintln!("cache: {} ({})", entry.display(), show::bytes(size_of(&entry) as f64));
    let error = Command::new(&executable).args(arguments).exec();
    Err(error).with_context(|| executable.display().to_string())
}

fn run_once(model: &ModelArgs, arguments: &[OsString]) -> anyhow::Result<()> {
    let dir = tempfile::tempdir().context("a folder for the executable")?;
    let executable = dir.path().join(EXECUTABLE);
    compile::build(model, Some(&executable))?;
    let status =
        Command::new(&executable).args(arguments).status().with_context(|| executable.display().to_string())?;
    drop(dir);
    if !status.success() {
        std::process::exit(status.code().unwrap_or(1));
    }
    Ok(())
}

fn arguments(args: &RunArgs) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = Vec::new();
    if let Some(prompt) = &args.prompt {
        arguments.extend(["generate".into(), "--prompt".into(), prompt.into()]);
    }
    arguments.extend(args.args.iter().cloned());
    arguments
}

fn cache_dir() -> anyhow::Result<PathBuf> {
    let named = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    match named("XDG_CACHE_HOME").or_else(|| named("HOME").map(|home| home.join(".cache"))) {
        Some(dir) => Ok(dir.join("nextc")),
        None => bail!("neither XDG_CACHE_HOME nor HOME says where to keep what is built; set one, or use `--no-cache`"),
    }
}

/// Hashes what an executable depends on.
fn fingerprint(args: &ModelArgs) -> anyhow::Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut add = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    add(format!("{} {:?}", env!("CARGO_PKG_VERSION"), compile::default_backend()).as_bytes());
    add(identity(&std::env::current_exe()?)?.as_bytes());
    let options = ModelArgs { model: PathBuf::new(), ..args.clone() };
    add(format!("{options:?}").as_bytes());
    add(format!("{:?}", compile::Plan::new(args, None)?).as_bytes());
    for file in files_of(&args.model)? {
        add(file.to_string_lossy().as_bytes());
        let length = fs::metadata(&file).with_context(|| file.display().to_string())?.len();
        match length <= SMALL_BYTES {
            true => add(&fs::read(&file).with_context(|| file.display().to_string())?),
            false => add(identity(&file)?.as_bytes()),
        }
    }
    Ok(hasher.finalize().to_hex()[..24].to_owned())
}

/// Length and time of change of a file.
fn identity(file: &Path) -> anyhow::Result<String> {
    let metadata = fs::metadata(file).with_context(|| file.display().to_string())?;
    let changed = metadata.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
    Ok(format!("{} {:?}", metadata.len(), changed))
}

/// The files of a model, in order: the file itself and its further parts, or those of its folder.
fn files_of(model: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let model = model.canonicalize().with_context(|| model.display().to_string())?;
    if model.is_file() {
        return Ok(nextc_frontend::gguf::source::files(&model));
    }
    let entries = fs::read_dir(&model).with_context(|| model.display().to_string())?;
    let mut files: Vec<PathBuf> = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<std::io::Result<Vec<_>>>()
        .with_context(|| model.display().to_string())?;
    files.retain(|file| file.is_file());
    files.sort();
    Ok(files)
}

fn size_of(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command as Sub};
    use clap::Parser;

    fn model_args(line: &str) -> RunArgs {
        match Cli::try_parse_from(line.split_whitespace()).expect("it parses").command {
            Sub::Run(args) => args,
            other => panic!("{other:?} is not run"),
        }
    }

    #[test]
    fn a_prompt_becomes_generate_and_the_rest_is_handed_on() {
        let check = |line: &str, expected: &[&str]| assert_eq!(arguments(&model_args(line)), expected, "{line}");
        check("nextc run m", &[]);
        check("nextc run m -p hi", &["generate", "--prompt", "hi"]);
        check("nextc run m -p hi -- --seed 1", &["generate", "--prompt", "hi", "--seed", "1"]);
        check("nextc run m -- bench --json", &["bench", "--json"]);
    }

    #[test]
    fn the_fingerprint_follows_files_and_options() {
        let dir = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).expect("it can be written");
        let of = |options: &str| {
            let line = format!("nextc run {} --cpu x86-64-v3 {options}", dir.path().display());
            fingerprint(&model_args(&line).model).expect("the files are there")
        };
        write("config.json", "{}");
        let first = of("");
        assert_eq!(first, of(""));
        assert_ne!(first, of("--embed-weights"));
        write("config.json", "{ }");
        assert_ne!(first, of(""));
        write("config.json", "{}");
        assert_eq!(first, of(""));
        write("model.safetensors", "x");
        assert_ne!(first, of(""));
    }
}
