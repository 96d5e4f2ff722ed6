//! What the engine needs of the machine that runs kernels. There is one implementation for each architecture that code
//! is made for; the executable's metadata says which one it needs.

use std::sync::Arc;

use nextc_abi::metadata::{NVPTX64, X86_64};

use crate::artifact::Artifact;
use crate::cuda::Cuda;
use crate::engine::EngineOptions;
use crate::error::Error;
use crate::host::Host;
use crate::limits::Limits;
use crate::state::States;
use crate::step::{KernelTime, StepInputs};

/// A run of bytes of the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// Where it begins.
    pub at: u64,
    /// Its length.
    pub bytes: u64,
}

/// A machine with the weights, the states of all sequences, and memory to run steps in.
pub(crate) trait Device: Send {
    /// Its name, and how much of it is used.
    fn describe(&self) -> String;

    /// What it can do at best, measured.
    fn limits(&mut self) -> Result<Limits, Error>;

    /// The width of a page table that is laid out for sequences of `pages` pages.
    fn page_width(&self, pages: usize) -> usize {
        pages
    }

    /// Makes the first `bytes` bytes of a state usable.
    fn grow_state(&mut self, state: usize, bytes: u64) -> Result<(), Error>;

    /// Copies bytes of a state out, from byte `at` on.
    fn read_state(&self, state: usize, at: u64, out: &mut [u8]) -> Result<(), Error>;

    /// Overwrites bytes of a state from byte `at` on.
    fn write_state(&mut self, state: usize, at: u64, bytes: &[u8]) -> Result<(), Error>;

    /// Runs an entry point. It may still be running when this returns; whatever is asked of the device afterwards
    /// happens after it.
    fn run(&mut self, program: usize, inputs: &StepInputs) -> Result<(), Error>;

    /// Bytes of the arena as the last step left them, in the order of `spans`.
    fn fetch(&mut self, spans: &[Span]) -> Result<Vec<&[u8]>, Error>;

    /// Gives what was measured of each kernel, and begins anew or stops measuring.
    fn profile(&mut self, go_on: bool) -> Vec<KernelTime>;
}

/// Sets up the machine that an executable needs.
/// # Errors
/// [`Error`] if it is not there, or too small.
pub(crate) fn open(
    artifact: &Arc<Artifact>,
    options: &EngineOptions,
    states: &States,
) -> Result<Box<dyn Device>, Error> {
    let target = &artifact.metadata().target;
    match target.arch.as_str() {
        X86_64 => Ok(Box::new(Host::open(Arc::clone(artifact), options, states)?)),
        NVPTX64 => Ok(Box::new(Cuda::open(Arc::clone(artifact), options, states)?)),
        arch => Err(Error::Architecture { arch: arch.to_owned() }),
    }
}
