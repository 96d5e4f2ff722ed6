//! The last stage of a build: object code, the runtime and the weights become one executable.
//!
//! [`link`] resolves the backend's objects into one position-independent [`image`], streams the weights through their
//! layouts into a file ([`pack`]), and writes the runtime with a payload behind it ([`write`]). Output files are
//! written aside and renamed, so a failed build leaves none; the same inputs give the same bytes.

mod convert;
mod error;
pub mod image;
pub mod pack;
mod runtime;
mod tiles;
mod write;

use std::path::{Path, PathBuf};

use nextc_ir::schedule::KernelModule;
use nextc_ir::source::WeightSource;
use nextc_ir::{Module, Target};

pub use convert::arch;
pub use error::LinkError;

/// How the names of files begin that are being written, beside their final place.
pub const UNFINISHED_PREFIX: &str = ".nextc-";

/// The code for one machine, and what goes with it.
#[derive(Clone, Copy)]
pub struct Version<'a> {
    /// Relocatable objects with the symbols `nextc_kernel_{i}` and `nextc_tail_{i}`; for a GPU one text of PTX a kernel.
    pub objects: &'a [Vec<u8>],
    /// For a GPU, what an assembler made of each text; none if there was no assembler: then the driver compiles the texts when the executable first starts.
    pub binaries: &'a [Vec<u8>],
    /// Kernels, schedules and tables.
    pub module: &'a KernelModule,
    /// The graph after all passes, from which the cost of a step is counted; without it a step counts as reading all weights.
    pub graph: Option<&'a Module>,
    /// The machine that the code was made for.
    pub target: &'a Target,
}

impl Version<'_> {
    fn image(&self) -> Result<image::Image, LinkError> {
        match self.target.gpu {
            None => image::build(self.objects),
            Some(_) => Ok(image::of_ptx(self.objects, self.binaries)),
        }
    }
}

/// Everything that goes into an executable.
pub struct LinkInputs<'a> {
    /// Code for one CPU or several of one model, the best first, or for a GPU.
    pub versions: &'a [Version<'a>],
    /// The backend that made it.
    pub backend: &'a str,
    /// Version of the compiler.
    pub compiler: &'a str,
    /// Where weights come from; `None` for a build from a `config.json` alone.
    pub source: Option<&'a dyn WeightSource>,
    /// Files for the runtime: name (`tokenizer.json`, ...) and contents.
    pub assets: &'a [(String, Vec<u8>)],
    /// The executable; weights go beside it, to the same name with `.weights` appended.
    pub output: &'a Path,
    /// Put the weights into the executable.
    pub embed_weights: bool,
    /// Show a progress bar where standard error is a terminal.
    pub progress: bool,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The executable.
    pub executable: PathBuf,
    /// Its length.
    pub executable_bytes: u64,
    /// The file of weights beside it, if there is one.
    pub weights_file: Option<PathBuf>,
    /// Bytes of weights with header and padding, wherever they are.
    pub weights_bytes: u64,
    /// Bytes of machine code and its constants.
    pub code_bytes: u64,
    /// Fingerprint of code, schedule and weights.
    pub fingerprint: String,
}

/// Links an executable.
/// # Errors
/// [`LinkError`] says what does not fit or which file could not be written; then neither output file has been touched.
pub fn link(inputs: &LinkInputs<'_>) -> Result<Report, LinkError> {
    let images = inputs.versions.iter().map(Version::image).collect::<Result<Vec<_>, _>>()?;
    let (code, images) = image::join(images);
    let mut metadata = convert::metadata(inputs, &images)?;
    write::check_output(inputs.output)?;
    let weights = inputs.source.map(|source| write::Weights::pack(inputs, source, code.len() as u64, &mut metadata));
    let weights = weights.transpose()?;
    metadata.fingerprint = convert::fingerprint(&metadata, &code)?;
    write::executable(inputs, &code, &metadata, weights)
}

/// Where the weights of the executable `exe` are: its whole name with `.weights` appended.
pub fn weights_path(exe: &Path) -> PathBuf {
    let mut name = exe.as_os_str().to_owned();
    name.push(".weights");
    name.into()
}

/// Bytes that `module`'s weights take when packed, with header and padding.
pub fn packed_bytes(module: &KernelModule) -> u64 {
    pack::place(&module.weights).bytes
}
