//! NVIDIA's assembler (`ptxas`): where it is, and binaries for a GPU from texts of PTX.
//!
//! An executable with binaries starts at once; without, the GPU's driver compiles the texts one after the other when it first starts, and keeps what it made.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, bail};
use rayon::prelude::*;

/// The variable that names an assembler.
const VARIABLE: &str = "NEXTC_PTXAS";
/// Where `make ptxas` puts one, from the folder of `nextc` on.
const OWN: &str = "../ptxas/nvidia/cu13/bin/ptxas";

/// `--ptxas`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ptxas {
    /// One that is found, if there is one that takes the texts.
    Auto,
    /// None.
    None,
    /// This one.
    File(PathBuf),
}

impl FromStr for Ptxas {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text {
            "auto" => Self::Auto,
            "none" => Self::None,
            file => Self::File(file.into()),
        })
    }
}

/// What came of the texts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Assembled {
    /// A binary of each.
    Binaries(Vec<Vec<u8>>),
    /// The driver is to compile them, for this reason.
    Texts(String),
}

impl Ptxas {
    /// Makes a binary of each text, for the GPU called `gpu`.
    /// # Errors
    /// What an assembler that is named on the command line says.
    pub fn assemble(&self, gpu: &str, texts: &[Vec<u8>]) -> anyhow::Result<Assembled> {
        match self {
            Self::None => Ok(Assembled::Texts("`--ptxas none`".to_owned())),
            Self::File(ptxas) => assemble(ptxas, gpu, texts).map(Assembled::Binaries).context("--ptxas"),
            Self::Auto => Ok(match find() {
                None => Assembled::Texts(format!("there is no ptxas on PATH, in CUDA_HOME or in {VARIABLE}")),
                Some(ptxas) => match assemble(&ptxas, gpu, texts) {
                    Ok(binaries) => Assembled::Binaries(binaries),
                    Err(error) => Assembled::Texts(format!("{error:#}")),
                },
            }),
        }
    }
}

/// The assembler that [`VARIABLE`] names, or the first of those on `PATH`, in `CUDA_HOME` and beside this program.
fn find() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os(VARIABLE) {
        return Some(named.into());
    }
    let on_path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&on_path).map(|dir| dir.join("ptxas"));
    let of_toolkit = std::env::var_os("CUDA_HOME").map(|dir| Path::new(&dir).join("bin/ptxas"));
    let own = std::env::current_exe().ok().and_then(|exe| Some(exe.canonicalize().ok()?.parent()?.join(OWN)));
    on_path.chain(of_toolkit).chain(own).find(|file| file.is_file())
}

/// A binary of each text, several at once.
fn assemble(ptxas: &Path, gpu: &str, texts: &[Vec<u8>]) -> anyhow::Result<Vec<Vec<u8>>> {
    let dir = tempfile::tempdir().context("a folder for PTX")?;
    texts.par_iter().enumerate().map(|(i, text)| assemble_one(ptxas, gpu, (i, text), dir.path())).collect()
}

fn assemble_one(ptxas: &Path, gpu: &str, (i, text): (usize, &[u8]), dir: &Path) -> anyhow::Result<Vec<u8>> {
    let (from, to) = (dir.join(format!("{i}.ptx")), dir.join(format!("{i}.cubin")));
    std::fs::write(&from, text).with_context(|| from.display().to_string())?;
    let mut command = Command::new(ptxas);
    command.arg(format!("-arch={gpu}")).arg("-o").args([&to, &from]);
    let output = command.output().with_context(|| ptxas.display().to_string())?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        let said = said.lines().next().unwrap_or("it says nothing").trim();
        bail!("{} refuses kernel {i} ({}): {said}", ptxas.display(), output.status);
    }
    std::fs::read(&to).with_context(|| to.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b".version 8.0\n.target sm_90a\n.address_size 64\n.visible .entry k() { ret; }\n";

    #[test]
    fn an_assembler_is_one_of_three() {
        let parse = |text: &str| text.parse::<Ptxas>().expect("all texts are taken");
        assert_eq!(
            [parse("auto"), parse("none"), parse("/x/ptxas")],
            [Ptxas::Auto, Ptxas::None, Ptxas::File("/x/ptxas".into())]
        );
    }

    #[test]
    fn what_is_not_assembled_is_said() {
        let texts = [TEXT.to_vec()];
        assert_eq!(
            Ptxas::None.assemble("sm_90a", &texts).expect("nothing is started"),
            Assembled::Texts("`--ptxas none`".to_owned())
        );
        let missing = Ptxas::File("/nowhere/ptxas".into());
        let error = format!("{:#}", missing.assemble("sm_90a", &texts).expect_err("there is no such file"));
        assert!(error.contains("--ptxas") && error.contains("/nowhere/ptxas"), "{error}");
        let refuses = Ptxas::File("/bin/false".into());
        let error = format!("{:#}", refuses.assemble("sm_90a", &texts).expect_err("it fails"));
        assert!(error.contains("/bin/false refuses kernel 0") && error.contains("it says nothing"), "{error}");
    }
}
