//! Writing the output: the executable and the file of weights, aside and then renamed.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nextc_abi::{Footer, Metadata, PAGE_BYTES, Section, SectionKind, WeightsPlace, hash, to_hex};
use nextc_ir::source::WeightSource;
use tempfile::NamedTempFile;

use crate::error::LinkError;
use crate::runtime::RUNTIME;
use crate::{LinkInputs, Report, UNFINISHED_PREFIX, pack, weights_path};

/// Refuses an output that is no file or lies in no directory, before any work is done.
pub(crate) fn check_output(output: &Path) -> Result<(), LinkError> {
    let refuse = |reason| Err(LinkError::Output { path: output.to_owned(), reason });
    if output.file_name().is_none() || output.is_dir() {
        return refuse("is a directory, expected the name of a file");
    }
    if !directory(output).is_dir() {
        return refuse("its directory does not exist");
    }
    Ok(())
}

fn directory(output: &Path) -> &Path {
    match output.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// A file that is written beside its final place and vanishes unless it is kept.
fn aside(output: &Path, mode: u32) -> Result<NamedTempFile, LinkError> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(UNFINISHED_PREFIX).permissions(Permissions::from_mode(mode));
    builder.tempfile_in(directory(output)).map_err(LinkError::io(output))
}

/// Packed weights, not yet in their final place.
pub(crate) enum Weights {
    /// In a file that goes beside the executable.
    Beside(NamedTempFile),
    /// In the file that becomes the executable, from this offset on.
    Embedded(NamedTempFile, Layout),
}

/// Where the sections of an executable begin, known before the weights are packed: they are its last section but for the metadata,
/// whose length depends on them.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    code: u64,
    assets: u64,
    weights: u64,
    metadata: u64,
}

impl Layout {
    fn new(code_bytes: u64, asset_bytes: u64, weight_bytes: u64) -> Self {
        let page = |n: u64| n.next_multiple_of(PAGE_BYTES);
        let code = page(RUNTIME.len() as u64);
        let assets = page(code + code_bytes);
        let weights = page(assets + asset_bytes);
        Self { code, assets, weights, metadata: page(weights + weight_bytes) }
    }
}

fn layout(inputs: &LinkInputs<'_>, code_bytes: u64, embedded: u64) -> Layout {
    Layout::new(code_bytes, inputs.assets.iter().map(|(_, c)| c.len() as u64).sum(), embedded)
}

impl Weights {
    /// Packs the weights and enters checksums and fingerprint into the metadata.
    pub fn pack(
        inputs: &LinkInputs<'_>,
        source: &dyn WeightSource,
        code_bytes: u64,
        metadata: &mut Metadata,
    ) -> Result<Self, LinkError> {
        let layout = layout(inputs, code_bytes, metadata.weights.bytes);
        let path = if inputs.embed_weights { inputs.output.to_owned() } else { weights_path(inputs.output) };
        let (mode, base) = if inputs.embed_weights { (0o777, layout.weights) } else { (0o666, 0) };
        let file = aside(&path, mode)?;
        let packed =
            pack::pack(&inputs.versions[0].module.weights, source, (file.as_file(), &path), base, inputs.progress)?;
        for (entry, checksum) in metadata.weights.entries.iter_mut().zip(&packed.checksums) {
            entry.checksum = to_hex(checksum);
        }
        metadata.weights.fingerprint = to_hex(&packed.fingerprint);
        metadata.weights.place = if inputs.embed_weights { WeightsPlace::Embedded } else { WeightsPlace::Beside };
        Ok(if inputs.embed_weights { Self::Embedded(file, layout) } else { Self::Beside(file) })
    }
}

/// Writes the executable and puts both files into their places.
pub(crate) fn executable(
    inputs: &LinkInputs<'_>,
    code: &[u8],
    metadata: &Metadata,
    weights: Option<Weights>,
) -> Result<Report, LinkError> {
    let plain = layout(inputs, code.len() as u64, 0);
    let (file, layout, beside) = match weights {
        Some(Weights::Embedded(file, layout)) => (file, layout, None),
        Some(Weights::Beside(beside)) => (aside(inputs.output, 0o777)?, plain, Some(beside)),
        None => (aside(inputs.output, 0o777)?, plain, None),
    };
    let executable_bytes = write_sections(inputs, code, metadata, file.as_file(), layout)?;
    let weights_file = persist(inputs.output, file, beside)?;
    Ok(Report {
        executable: inputs.output.to_owned(),
        executable_bytes,
        weights_file,
        weights_bytes: metadata.weights.bytes,
        code_bytes: code.len() as u64,
        fingerprint: metadata.fingerprint.clone(),
    })
}

fn write_sections(
    inputs: &LinkInputs<'_>,
    code: &[u8],
    metadata: &Metadata,
    file: &File,
    at: Layout,
) -> Result<u64, LinkError> {
    let assets: Vec<u8> = inputs.assets.iter().flat_map(|(_, contents)| contents.iter().copied()).collect();
    let json = serde_json::to_vec(metadata)?;
    let embedded = if metadata.weights.place == WeightsPlace::Embedded { metadata.weights.bytes } else { 0 };
    let section = |offset, bytes: &[u8]| Section { offset, bytes: bytes.len() as u64, hash: hash::of(bytes) };
    let mut sections = [Section::default(); 4];
    sections[SectionKind::Code as usize] = section(at.code, code);
    sections[SectionKind::Metadata as usize] = section(at.metadata, &json);
    sections[SectionKind::Assets as usize] = section(at.assets, &assets);
    sections[SectionKind::Weights as usize] = Section { offset: at.weights, bytes: embedded, hash: [0; 32] };
    let footer_at = (at.metadata + json.len() as u64).next_multiple_of(PAGE_BYTES);
    let footer = Footer::new(at.code, footer_at + Footer::BYTES, runtime_hash(at.code), sections);
    for (offset, bytes) in
        [(0, RUNTIME), (at.code, code), (at.assets, &assets), (at.metadata, &json), (footer_at, footer.as_bytes())]
    {
        file.write_all_at(bytes, offset).map_err(LinkError::io(inputs.output))?;
    }
    Ok(footer.file_bytes)
}

/// Hash of everything before the payload: the runtime, and zeros up to the page.
fn runtime_hash(payload_offset: u64) -> hash::Hash {
    let mut bytes = RUNTIME.to_vec();
    bytes.resize(payload_offset as usize, 0);
    hash::of(&bytes)
}

/// Makes both files durable and renames them into place; if the second fails, the first goes again.
fn persist(output: &Path, file: NamedTempFile, beside: Option<NamedTempFile>) -> Result<Option<PathBuf>, LinkError> {
    let io = LinkError::io;
    file.as_file().sync_all().map_err(io(output))?;
    let weights = weights_path(output);
    if let Some(beside) = &beside {
        beside.as_file().sync_all().map_err(io(&weights))?;
    }
    let weights = match beside {
        Some(beside) => {
            beside.persist(&weights).map_err(|e| io(&weights)(e.error))?;
            Some(weights)
        }
        None => None,
    };
    if let Err(e) = file.persist(output) {
        if let Some(weights) = &weights {
            let _ = fs::remove_file(weights);
        }
        return Err(io(output)(e.error));
    }
    Ok(weights)
}
