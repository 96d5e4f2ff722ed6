//! The executable as an artifact: its footer, code, metadata and assets, checked before anything is run.

use std::ffi::CStr;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nextc_abi::metadata::NVPTX64;
use nextc_abi::{Asset, Footer, FooterError, KernelFn, Metadata, Section, SectionKind, Span, Target, hash};

use crate::cpu;
use crate::error::Error;
use crate::memory::{Access, Region};

/// Files that came with the checkpoint.
#[derive(Debug)]
pub struct Assets {
    bytes: Vec<u8>,
    table: Vec<Asset>,
}

impl Assets {
    /// The file called `name`.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        let asset = self.table.iter().find(|a| a.name == name)?;
        Some(&self.bytes[asset.offset as usize..(asset.offset + asset.bytes) as usize])
    }
}

/// An opened executable.
#[derive(Debug)]
pub struct Artifact {
    path: PathBuf,
    file: File,
    footer: Footer,
    metadata: Metadata,
    code: Region,
}

impl Artifact {
    /// Opens the executable that is running.
    /// # Errors
    /// As [`Artifact::open`].
    pub fn open_self() -> Result<Self, Error> {
        let link = Path::new("/proc/self/exe");
        let path = std::env::current_exe().map_err(Error::io(link))?;
        // the link, not the path: it leads to the running file even if another one has taken its name
        let file = File::open(link).map_err(Error::io(link))?;
        Self::of_file(path, file)
    }

    /// Opens an executable; checks footer, code and metadata.
    /// # Errors
    /// [`Error`] says what is damaged and what to do.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(Error::io(path))?;
        Self::of_file(path.to_owned(), file)
    }

    fn of_file(path: PathBuf, file: File) -> Result<Self, Error> {
        let footer = read_footer(&path, &file)?;
        let mut metadata = read_metadata(&path, &file, &footer)?;
        let code = map_code(&path, &file, &footer, &metadata.target.arch)?;
        for number in 0..=metadata.others.len() {
            metadata.choose(number);
            check_entries(&path, &metadata, code.bytes())?;
            metadata.choose(number);
        }
        let targets: Vec<&Target> = metadata.targets().collect();
        let number = cpu::choose(&targets, std::env::var(cpu::CHOICE).ok().as_deref(), cpu::suits)?;
        metadata.choose(number);
        Ok(Self { path, file, footer, metadata, code })
    }

    /// Where the executable lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it holds.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Its footer.
    pub fn footer(&self) -> &Footer {
        &self.footer
    }

    /// The opened file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Refuses a processor that lacks what the code uses.
    /// # Errors
    /// [`Error::Cpu`] names what is missing.
    pub fn check_cpu(&self) -> Result<(), Error> {
        let target = &self.metadata.target;
        let missing = cpu::missing_features(&target.features);
        if !missing.is_empty() {
            return Err(Error::Cpu { missing: missing.join(", "), cpu: target.cpu.clone() });
        }
        let no_tiles = |_| Error::Cpu { missing: "permission to use AMX tiles".to_owned(), cpu: target.cpu.clone() };
        cpu::request_tiles(&target.features).map_err(no_tiles)
    }

    /// The files of the section `assets`.
    /// # Errors
    /// [`Error::Damaged`] if the section's hash does not match.
    pub fn assets(&self) -> Result<Assets, Error> {
        let bytes = read_section(&self.path, &self.file, &self.footer, SectionKind::Assets)?;
        let inside = |a: &Asset| a.offset.checked_add(a.bytes).is_some_and(|end| end <= bytes.len() as u64);
        if !self.metadata.assets.iter().all(inside) {
            return Err(damaged(&self.path, &self.footer, SectionKind::Assets));
        }
        Ok(Assets { bytes, table: self.metadata.assets.clone() })
    }

    /// Compares the runtime and every section with their hashes (weights have checksums of their own).
    /// # Errors
    /// [`Error::Damaged`] names the part that differs.
    pub fn verify(&self) -> Result<(), Error> {
        let mut runtime = vec![0; self.footer.payload_offset as usize];
        self.file.read_exact_at(&mut runtime, 0).map_err(Error::io(&self.path))?;
        if hash::of(&runtime) != self.footer.runtime_hash {
            return Err(Error::Damaged { path: self.path.clone(), section: "runtime", offset: 0 });
        }
        for kind in [SectionKind::Code, SectionKind::Metadata, SectionKind::Assets] {
            read_section(&self.path, &self.file, &self.footer, kind)?;
        }
        Ok(())
    }

    /// The text at an offset of the image, which `check_entries` has found to lie inside it, up to a NUL.
    /// # Errors
    /// [`Error::Metadata`] if nothing ends it.
    pub(crate) fn text(&self, offset: u64) -> Result<&CStr, Error> {
        let bytes =
            self.code.as_slice()[..self.footer.section(SectionKind::Code).bytes as usize].get(offset as usize..);
        let text = bytes.and_then(|bytes| CStr::from_bytes_until_nul(bytes).ok());
        let reason = || format!("the text at offset {offset} of the code has no end");
        text.ok_or_else(|| Error::Metadata { path: self.path.clone(), reason: reason() })
    }

    /// Bytes of the image, which `check_entries` has found to lie inside it.
    pub(crate) fn binary(&self, span: Span) -> &[u8] {
        &self.code.as_slice()[span.at as usize..][..span.bytes as usize]
    }

    /// The machine code at an offset of the image, which `check_entries` has found to lie inside it.
    pub(crate) fn entry(&self, offset: u64) -> KernelFn {
        debug_assert!(offset < self.code.bytes());
        let address = (self.code.address() + offset) as usize;
        // SAFETY: the image is mapped executable for as long as `self` lives, its hash is that of the linker's output, and the
        // metadata under the same footer says that a function of this type begins here.
        unsafe { std::mem::transmute::<usize, KernelFn>(address) }
    }
}

fn read_footer(path: &Path, file: &File) -> Result<Footer, Error> {
    let bytes = file.metadata().map_err(Error::io(path))?.len();
    let error = |error| Error::Footer { path: path.to_owned(), error };
    let at = bytes.checked_sub(Footer::BYTES).ok_or_else(|| error(FooterError::Missing))?;
    let mut tail = vec![0; Footer::BYTES as usize];
    file.read_exact_at(&mut tail, at).map_err(Error::io(path))?;
    Footer::parse(&tail, bytes).map_err(error)
}

fn damaged(path: &Path, footer: &Footer, kind: SectionKind) -> Error {
    Error::Damaged { path: path.to_owned(), section: kind.name(), offset: footer.section(kind).offset }
}

fn read_section(path: &Path, file: &File, footer: &Footer, kind: SectionKind) -> Result<Vec<u8>, Error> {
    let section: &Section = footer.section(kind);
    let mut bytes = vec![0; section.bytes as usize];
    file.read_exact_at(&mut bytes, section.offset).map_err(Error::io(path))?;
    if hash::of(&bytes) != section.hash {
        return Err(damaged(path, footer, kind));
    }
    Ok(bytes)
}

fn read_metadata(path: &Path, file: &File, footer: &Footer) -> Result<Metadata, Error> {
    let bytes = read_section(path, file, footer, SectionKind::Metadata)?;
    let error = |reason: String| Error::Metadata { path: path.to_owned(), reason };
    let metadata: Metadata = serde_json::from_slice(&bytes).map_err(|e| error(e.to_string()))?;
    if metadata.version != nextc_abi::VERSION {
        return Err(error(format!("version {}, expected {}", metadata.version, nextc_abi::VERSION)));
    }
    Ok(metadata)
}

fn map_code(path: &Path, file: &File, footer: &Footer, arch: &str) -> Result<Region, Error> {
    let section = footer.section(SectionKind::Code);
    let access = if arch == NVPTX64 { Access::Read } else { Access::ReadExecute };
    let code = Region::of_file(file, section.offset, section.bytes, access).map_err(Error::io(path))?;
    if hash::of(&code.as_slice()[..section.bytes as usize]) != section.hash {
        return Err(damaged(path, footer, SectionKind::Code));
    }
    Ok(code)
}

/// Checks that every index and offset of the metadata leads to something.
fn check_entries(path: &Path, metadata: &Metadata, code_bytes: u64) -> Result<(), Error> {
    use nextc_abi::Arg;
    let error = |reason: String| Err(Error::Metadata { path: path.to_owned(), reason });
    for k in &metadata.kernels {
        let binary_is_inside = k.binary.is_none_or(|span| span.is_within(code_bytes));
        if k.entry >= code_bytes || k.tail.is_some_and(|t| t >= code_bytes) || !binary_is_inside {
            return error(format!("kernel `{}` lies outside the code", k.name));
        }
    }
    let known = |arg: &Arg| match arg {
        Arg::Weight(i) => (*i as usize) < metadata.weights.entries.len(),
        Arg::State(i) => (*i as usize) < metadata.states.len(),
        Arg::Input(_) | Arg::Arena(_) => true,
    };
    for (program, launch) in metadata.programs.iter().flat_map(|p| p.launches.iter().map(move |l| (p, l))) {
        let kernel = metadata.kernels.get(launch.kernel as usize);
        let fits = kernel.is_some_and(|k| k.params as usize == launch.args.len()) && launch.args.iter().all(known);
        if !fits {
            return error(format!(
                "program `{}`: the arguments of `{}` do not fit its kernel",
                program.name, launch.label
            ));
        }
    }
    for w in &metadata.weights.entries {
        let inside = w.offset.checked_add(w.bytes).is_some_and(|end| end <= metadata.weights.bytes);
        if !inside || w.offset % 64 != 0 {
            return error(format!("weight `{}` lies outside the weights", w.name));
        }
    }
    Ok(())
}
