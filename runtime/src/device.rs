//! What the engine needs of the machine that runs kernels. There is one implementation for each architecture that code
//! is made for; the executable's metadata says which one it needs.

use std::sync::Arc;

use nextc_abi::Span;
use nextc_abi::metadata::{NVPTX64, X86_64};

use crate::artifact::Artifact;
use crate::cuda::Cuda;
use crate::engine::EngineOptions;
use crate::error::Error;
use crate::host::Host;
use crate::limits::Limits;
use crate::state::States;
use crate::step::{KernelTime, StepInputs};

/// Where rows of bytes lie: the first, and how many bytes from one to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Strided {
    /// Where the first begins.
    pub at: u64,
    /// Bytes from one to the next.
    pub stride: u64,
}

/// Rows of bytes that are copied from one memory of a device to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CopyRows {
    /// How many rows.
    pub rows: u64,
    /// Bytes of each.
    pub bytes: u64,
    /// Where they are.
    pub from: Strided,
    /// Where they go.
    pub to: Strided,
}

impl CopyRows {
    /// A copy of `bytes` bytes that lie together.
    pub fn whole(from: u64, to: u64, bytes: u64) -> Self {
        let together = |at| Strided { at, stride: bytes };
        Self { rows: 1, bytes, from: together(from), to: together(to) }
    }

    /// True if `next`, like these rows, is one run of bytes, and begins where they end.
    pub fn is_before(&self, next: &Self) -> bool {
        let ends = [self.from, self.to].map(|place| place.at + self.bytes);
        self.rows == 1 && next.rows == 1 && ends == [next.from.at, next.to.at]
    }

    /// Bytes from the beginning of the first to the end of the last, where they are.
    pub fn source_bytes(&self) -> u64 {
        self.bytes + self.from.stride * self.rows.saturating_sub(1)
    }

    /// The same where they go.
    pub fn target_bytes(&self) -> u64 {
        self.bytes + self.to.stride * self.rows.saturating_sub(1)
    }
}

/// A memory of a device that a step may take inputs from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Memory {
    /// Where the program before this one has left its results.
    Arena,
    /// A state.
    State(usize),
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

    /// How many sequences a step of `sequences` is filled up to.
    fn batch_width(&self, sequences: usize) -> usize {
        sequences
    }

    /// Makes the first `bytes` bytes of a state usable.
    fn grow_state(&mut self, state: usize, bytes: u64) -> Result<(), Error>;

    /// Copies bytes of a state out, from byte `at` on.
    fn read_state(&self, state: usize, at: u64, out: &mut [u8]) -> Result<(), Error>;

    /// Overwrites bytes of a state from byte `at` on.
    fn write_state(&mut self, state: usize, at: u64, bytes: &[u8]) -> Result<(), Error>;

    /// Copies results of the last program from the arena to a state, behind what was asked of the device before. Nobody waits.
    fn keep(&mut self, state: usize, rows: &[CopyRows]) -> Result<(), Error>;

    /// Runs an entry point, with inputs from the host and, where they say so, from memory of the device. It may still be running when this
    /// returns; whatever is asked of the device afterwards happens after it.
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
