//! The packed weights in memory: mapped from their file, or made up for measurements.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use nextc_abi::hash::{self, BLOCK_BYTES};
use nextc_abi::{SectionKind, Weight, WeightsHeader, WeightsPlace, to_hex};

use crate::artifact::Artifact;
use crate::error::Error;
use crate::memory::{Access, Region};
use crate::random;

/// All weights, as one run of memory laid out as in the file.
#[derive(Debug)]
pub struct Weights {
    region: Region,
    path: PathBuf,
    /// Where the weights begin in the file.
    base: u64,
}

impl Weights {
    /// Maps the weights and checks their header against the executable.
    /// # Errors
    /// [`Error`] if there are none, or they belong to another build.
    pub fn map(artifact: &Artifact) -> Result<Self, Error> {
        let table = &artifact.metadata().weights;
        let (region, path, base) = match table.place {
            WeightsPlace::None => return Err(Error::NoWeights { path: artifact.path().to_owned() }),
            WeightsPlace::Embedded => map_embedded(artifact)?,
            WeightsPlace::Beside => map_beside(artifact)?,
        };
        let check = WeightsHeader::check(region.as_slice(), table.bytes, &table.fingerprint);
        check.map_err(|error| Error::Weights { path: path.clone(), error })?;
        Ok(Self { region, path, base })
    }

    /// Makes weights up, in every format and layout with values as a model has them.
    /// # Errors
    /// [`Error::TooLarge`] if there is not enough memory for them.
    pub fn random(artifact: &Artifact) -> Result<Self, Error> {
        let table = &artifact.metadata().weights;
        crate::engine::check_available("random weights", table.bytes)?;
        let memory = |error| Error::Memory { what: "random weights", bytes: table.bytes, error };
        let mut region = Region::reserve(table.bytes).map_err(memory)?;
        region.advise_huge();
        random::fill(&table.entries, region.as_mut_slice());
        Ok(Self { region, path: artifact.path().to_owned(), base: 0 })
    }

    /// The address of the first byte.
    pub(crate) fn address(&self) -> u64 {
        self.region.address()
    }

    /// All bytes, as in the file.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.region.as_slice()
    }

    /// Reads every byte and compares each weight with its checksum.
    /// # Errors
    /// [`Error::WeightDamaged`] names the first weight that differs.
    pub fn verify(&self, entries: &[Weight], threads: usize) -> Result<(), Error> {
        let next = AtomicUsize::new(0);
        let damaged = std::thread::scope(|scope| {
            let work = || {
                let mut first = None;
                while let Some((i, weight)) = claim(&next, entries) {
                    if self.checksum(weight) != weight.checksum {
                        first.get_or_insert(i);
                    }
                }
                first
            };
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            workers.into_iter().filter_map(|w| w.join().expect("hashing does not panic")).min()
        });
        match damaged.map(|i| &entries[i]) {
            None => Ok(()),
            Some(w) => Err(Error::WeightDamaged {
                path: self.path.clone(),
                weight: w.name.clone(),
                offset: self.base + w.offset,
                bytes: w.bytes,
            }),
        }
    }

    fn checksum(&self, weight: &Weight) -> String {
        let bytes = &self.region.as_slice()[weight.offset as usize..(weight.offset + weight.bytes) as usize];
        to_hex(&hash::of_blocks(bytes.chunks(BLOCK_BYTES as usize).map(hash::of)))
    }
}

fn claim<'a>(next: &AtomicUsize, entries: &'a [Weight]) -> Option<(usize, &'a Weight)> {
    let i = next.fetch_add(1, Ordering::Relaxed);
    entries.get(i).map(|w| (i, w))
}

fn map_embedded(artifact: &Artifact) -> Result<(Region, PathBuf, u64), Error> {
    let section = artifact.footer().section(SectionKind::Weights);
    let path = artifact.path().to_owned();
    let region =
        Region::of_file(artifact.file(), section.offset, section.bytes, Access::Read).map_err(Error::io(&path))?;
    Ok((region, path, section.offset))
}

/// Where the weights of an executable are, if they are beside it.
pub fn path_beside(exe: &Path) -> PathBuf {
    let mut name = exe.as_os_str().to_owned();
    name.push(".weights");
    name.into()
}

fn map_beside(artifact: &Artifact) -> Result<(Region, PathBuf, u64), Error> {
    let path = path_beside(artifact.path());
    let error = |error| Error::WeightsFile { path: path.clone(), error };
    let file = File::open(&path).map_err(error)?;
    let bytes = file.metadata().map_err(error)?.len();
    let region = Region::of_file(&file, 0, bytes, Access::Read).map_err(error)?;
    Ok((region, path, 0))
}
