//! One step: the inputs of an entry point, the addresses of its kernels' arguments, and their run on the thread team.

use std::time::Instant;

use nextc_abi::{Arg, Input, KernelFn, Metadata, Program};

use crate::artifact::Artifact;
use crate::engine::check_available;
use crate::error::Error;
use crate::memory::Region;
use crate::pool::Pool;
use crate::state::States;
use crate::weights::Weights;

/// Bytes between inputs, so that a kernel may read whole vectors at their ends.
const SLACK_BYTES: u64 = 64;

/// Dimensions of a program that are kept resolved: those of the steps that check 1 to 8 tokens come again and again.
const KEPT_DIMS: usize = 8;

/// Number of inputs an entry point can have.
const INPUTS: usize = 10;

/// The inputs of a step, as its kernels read them.
#[derive(Debug, Default)]
pub(crate) struct StepInputs {
    pub tokens: Vec<i32>,
    pub positions: Vec<i32>,
    pub cu_seqlens: Vec<i32>,
    pub slot: Vec<i32>,
    /// `[B]`: kept tokens that are done first.
    pub replay: Vec<i32>,
    /// `[B]`: 1 if the tokens are kept instead of done.
    pub tentative: Vec<i32>,
    /// `[B, P]`.
    pub page_table: Vec<i32>,
    pub logit_rows: Vec<i32>,
    /// `[T, pad(hidden_size)]`; empty but for drafts.
    pub hidden: Vec<f32>,
    /// `[ceil(vocab_size / 16)]`; empty but for guesses.
    pub wanted: Vec<i32>,
}

impl StepInputs {
    /// The dimensions `T`, `B`, `P`, `R`.
    pub fn dims(&self) -> [u64; 4] {
        let sequences = self.slot.len() as u64;
        let pages = self.page_table.len() as u64 / sequences.max(1);
        [self.tokens.len() as u64, sequences, pages, self.logit_rows.len() as u64]
    }

    /// The inputs as bytes, in the order of [`Input`].
    fn bytes(&self) -> [&[u8]; INPUTS] {
        use bytemuck::cast_slice as bytes;
        [
            bytes(&self.tokens),
            bytes(&self.positions),
            bytes(&self.cu_seqlens),
            bytes(&self.slot),
            bytes(&self.replay),
            bytes(&self.tentative),
            bytes(&self.page_table),
            bytes(&self.logit_rows),
            bytes(&self.hidden),
            bytes(&self.wanted),
        ]
    }
}

const fn input_index(input: Input) -> usize {
    match input {
        Input::Tokens => 0,
        Input::Positions => 1,
        Input::CuSeqlens => 2,
        Input::Slot => 3,
        Input::Replay => 4,
        Input::Tentative => 5,
        Input::PageTable => 6,
        Input::LogitRows => 7,
        Input::Hidden => 8,
        Input::Wanted => 9,
    }
}

/// Rows of floats that a step gave.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    data: &'a [f32],
    count: usize,
    width: usize,
    stride: usize,
}

impl<'a> Rows<'a> {
    /// How many rows.
    pub fn len(&self) -> usize {
        self.count
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &'a [f32] {
        &self.data[i * self.stride..i * self.stride + self.width]
    }

    /// All rows in order.
    pub fn iter(&self) -> impl Iterator<Item = &'a [f32]> + use<'a> {
        let rows = *self;
        (0..rows.count).map(move |i| rows.row(i))
    }
}

/// A launch with its addresses.
#[derive(Debug)]
struct ResolvedLaunch {
    /// Index of its kernel.
    kernel: usize,
    entry: KernelFn,
    tail: Option<KernelFn>,
    tasks: i64,
    /// Where its arguments begin.
    args: usize,
}

/// An entry point resolved for steps of certain dimensions.
#[derive(Debug)]
struct Resolved {
    dims: [u64; 4],
    args: Vec<u64>,
    launches: Vec<ResolvedLaunch>,
}

/// Runs steps: owns the threads and the memory that steps work in.
pub(crate) struct Executor {
    pool: Pool,
    arena: Region,
    inputs: Region,
    scratch: Region,
    scratch_bytes: u64,
    /// For each program, those of the dimensions it was run with last, the newest at the end.
    resolved: Vec<Vec<Resolved>>,
    /// Runs and time of each kernel, while that is asked for.
    profile: Option<Vec<KernelTime>>,
}

/// How often a kernel ran, and how long it took from its start until all threads were done.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct KernelTime {
    /// Launches.
    pub runs: u64,
    /// Seconds of all of them.
    pub seconds: f64,
    /// Seconds of the fastest: what it takes where nothing else runs.
    pub least_s: f64,
}

impl KernelTime {
    fn add(&mut self, seconds: f64) {
        self.least_s = if self.runs == 0 { seconds } else { self.least_s.min(seconds) };
        self.runs += 1;
        self.seconds += seconds;
    }
}

impl Executor {
    pub fn new(metadata: &Metadata, threads: usize) -> Result<Self, Error> {
        let pool = Pool::new(threads).map_err(|error| Error::Threads { threads, error })?;
        let scratch_bytes = metadata.kernels.iter().map(|k| k.scratch_bytes).max().unwrap_or(0);
        // a page between threads keeps their lines apart
        let scratch_bytes = nextc_abi::align_up(scratch_bytes + SLACK_BYTES, nextc_abi::PAGE_BYTES);
        Ok(Self {
            pool,
            arena: reserve("arena", 0)?,
            inputs: reserve("inputs", 0)?,
            scratch: reserve("scratch", scratch_bytes * threads as u64)?,
            scratch_bytes,
            resolved: metadata.programs.iter().map(|_| Vec::new()).collect(),
            profile: None,
        })
    }

    /// Threads of the team.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Gives what was measured of each kernel and begins anew, or stops measuring.
    pub fn profile(&mut self, go_on: bool, kernels: usize) -> Vec<KernelTime> {
        std::mem::replace(&mut self.profile, go_on.then(|| vec![KernelTime::default(); kernels])).unwrap_or_default()
    }

    /// Runs entry point `program` on `inputs`.
    pub fn run(
        &mut self,
        artifact: &Artifact,
        weights: &Weights,
        states: &States,
        program: usize,
        inputs: &StepInputs,
    ) -> Result<(), Error> {
        let metadata = artifact.metadata();
        let dims = inputs.dims();
        self.make_room(metadata, inputs)?;
        let places = self.write_inputs(inputs);
        let known = &mut self.resolved[program];
        let resolved = match known.iter().position(|r| r.dims == dims) {
            Some(i) => known.remove(i),
            None => {
                let addresses = Addresses { inputs: places, arena: self.arena.address(), weights, states };
                resolve(artifact, &metadata.programs[program], dims, &addresses)
            }
        };
        let profile = self.profile.as_deref_mut();
        run_launches(&mut self.pool, &resolved, (self.scratch.address(), self.scratch_bytes), profile);
        if known.len() == KEPT_DIMS {
            known.remove(0);
        }
        known.push(resolved);
        Ok(())
    }

    /// Makes arena and inputs large enough; addresses resolved before are void if one has moved.
    fn make_room(&mut self, metadata: &Metadata, inputs: &StepInputs) -> Result<(), Error> {
        let arena = metadata.arena.bytes(&inputs.dims()) + SLACK_BYTES;
        let input = inputs.bytes().iter().map(|b| place_bytes(b)).sum();
        for (region, bytes, what) in [(&mut self.arena, arena, "arena"), (&mut self.inputs, input, "inputs")] {
            if region.bytes() < bytes {
                check_available(what, bytes)?;
                *region = reserve(what, bytes.next_power_of_two())?;
                region.advise_huge();
                self.resolved.iter_mut().for_each(Vec::clear);
            }
        }
        Ok(())
    }

    /// Copies the inputs to where kernels read them, and says where.
    fn write_inputs(&mut self, inputs: &StepInputs) -> [u64; INPUTS] {
        let base = self.inputs.address();
        let memory = self.inputs.as_mut_slice();
        let mut at = 0;
        inputs.bytes().map(|bytes| {
            let begin = at as usize;
            memory[begin..begin + bytes.len()].copy_from_slice(bytes);
            at += place_bytes(bytes);
            base + begin as u64
        })
    }

    /// An output of the step that was run last.
    pub fn output(&self, metadata: &Metadata, program: &Program, name: &str, dims: &[u64; 4]) -> Option<Rows<'_>> {
        let output = program.outputs.iter().find(|o| o.name == name)?;
        let count = dims[output.rows as usize] as usize;
        let at = metadata.arena.offset(&output.at, dims) as usize;
        let bytes = count * output.stride as usize * size_of::<f32>();
        let data = bytemuck::cast_slice(&self.arena.as_slice()[at..at + bytes]);
        Some(Rows { data, count, width: output.width as usize, stride: output.stride as usize })
    }
}

fn place_bytes(input: &[u8]) -> u64 {
    nextc_abi::align_up(input.len() as u64, 64) + SLACK_BYTES
}

fn reserve(what: &'static str, bytes: u64) -> Result<Region, Error> {
    Region::reserve(bytes).map_err(|error| Error::Memory { what, bytes, error })
}

/// Where things are.
struct Addresses<'a> {
    inputs: [u64; INPUTS],
    arena: u64,
    weights: &'a Weights,
    states: &'a States,
}

fn resolve(artifact: &Artifact, program: &Program, dims: [u64; 4], at: &Addresses<'_>) -> Resolved {
    let metadata = artifact.metadata();
    let mut resolved = Resolved { dims, args: Vec::new(), launches: Vec::with_capacity(program.launches.len()) };
    for launch in &program.launches {
        let kernel = &metadata.kernels[launch.kernel as usize];
        let args = resolved.args.len();
        resolved.args.extend_from_slice(&dims);
        resolved.args.extend(launch.args.iter().map(|arg| match arg {
            Arg::Input(input) => at.inputs[input_index(*input)],
            Arg::Arena(placement) => at.arena + metadata.arena.offset(placement, &dims),
            Arg::Weight(i) => at.weights.address(&metadata.weights.entries[*i as usize]),
            Arg::State(i) => at.states.address(*i as usize),
        }));
        let tasks = i64::try_from(kernel.grid.eval(&dims)).unwrap_or(i64::MAX);
        let tail = kernel.tail.map(|t| artifact.entry(t));
        let (kernel, entry) = (launch.kernel as usize, artifact.entry(kernel.entry));
        resolved.launches.push(ResolvedLaunch { kernel, entry, tail, tasks, args });
    }
    resolved
}

fn run_launches(
    pool: &mut Pool,
    resolved: &Resolved,
    (scratch, scratch_bytes): (u64, u64),
    mut profile: Option<&mut [KernelTime]>,
) {
    for launch in &resolved.launches {
        let begun = profile.is_some().then(Instant::now);
        let args = SharedArgs(resolved.args[launch.args..].as_ptr());
        let own_scratch = |thread: usize| (scratch + thread as u64 * scratch_bytes) as *mut u8;
        pool.run(launch.tasks, &|thread, first, last| {
            let args = &args;
            // SAFETY: the arguments are the kernel's own (`check_entries`): addresses of inputs, arena, weights and states that live
            // through the step and are as large as the linker planned for these dimensions. Ranges are disjoint and within the
            // grid, each thread has scratch of its own, and nobody else touches this memory while the engine is borrowed.
            unsafe { (launch.entry)(args.0, own_scratch(thread), first, last) }
        });
        if let Some(tail) = launch.tail {
            // SAFETY: as above; all tasks are done, so the tail runs alone.
            unsafe { tail(args.0, own_scratch(0), 0, 0) }
        }
        if let (Some(times), Some(begun)) = (profile.as_deref_mut(), begun) {
            times[launch.kernel].add(begun.elapsed().as_secs_f64());
        }
    }
}

/// Arguments that several threads read.
struct SharedArgs(*const u64);

// SAFETY: the arguments are not written while a step runs.
unsafe impl Sync for SharedArgs {}

/// The widest dimension that addresses and `i32` inputs can hold.
pub(crate) const MAX_DIM: u64 = i32::MAX as u64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dimensions_follow_from_the_inputs() {
        let inputs = StepInputs {
            tokens: vec![1, 2, 3],
            positions: vec![0, 1, 5],
            cu_seqlens: vec![0, 2, 3],
            slot: vec![0, 4],
            replay: vec![0],
            tentative: vec![0],
            page_table: vec![0, 1, 2, 0, 0, 0],
            logit_rows: vec![2],
            hidden: Vec::new(),
            wanted: Vec::new(),
        };
        assert_eq!(inputs.dims(), [3, 2, 3, 1]);
        assert_eq!(inputs.dims()[nextc_abi::Sym::P as usize], 3);
    }
}
