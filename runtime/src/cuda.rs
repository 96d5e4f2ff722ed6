//! NVIDIA GPUs as a device, through the driver alone: no toolkit, and no library but `libcuda.so.1`, which is loaded
//! when an executable for a GPU runs. GPU 0 of those that `CUDA_VISIBLE_DEVICES` shows is taken.
//!
//! Weights are copied to the device once. States, arena and scratch are ranges of addresses that get memory by use and
//! never move, so what was worked out for a step stays right. A step is one copy of its inputs and its launches, in one
//! stream; the launches of a program and dimensions that come again are a graph.
//!
//! The variable `NEXTC_LAUNCH` says how kernels are launched: `graph` (the default), `stream` (one after the other,
//! without graphs), or `trace`, which waits after each one, so that an error names its kernel.

mod copy;
mod driver;
mod error;
mod graph;
mod launch;
mod limits;
mod memory;
mod module;
pub(crate) mod plan;
mod profile;
mod upload;

use std::sync::Arc;

use nextc_abi::{Metadata, Span};

use self::copy::Copier;
use self::driver::{Context, Event, Stream};
pub use self::error::CudaError;
use self::launch::{How, Launcher, Plan};
use self::memory::{Growing, Pinned, copy_in, copy_out};
use self::module::Modules;
use self::profile::Profile;
use crate::artifact::Artifact;
use crate::device::{self, CopyRows, Device};
use crate::engine::EngineOptions;
use crate::error::Error;
use crate::info::human_bytes;
use crate::limits::Limits;
use crate::recent::Recent;
use crate::state::States;
use crate::step::{Addresses, INPUTS, KernelTime, SLACK_BYTES, StepInputs, resolve};
use crate::weights::Weights;

/// Programs with dimensions whose plans and graphs are kept.
const MAX_PLANS: usize = 64;

/// From so many bytes of weights on it is said what memory will be needed.
const STATED_BYTES: u64 = 1 << 30;

/// A GPU with all that an executable keeps on it.
pub(crate) struct Cuda {
    // in this order: what is dropped first needs what is dropped last
    plans: Recent<(usize, [u64; 4]), Plan>,
    launcher: Launcher,
    copier: Copier,
    outputs: Pinned,
    memory: Memory,
    stream: Stream,
    /// The program that ran last.
    last: usize,
    artifact: Arc<Artifact>,
    context: Context,
}

/// The device's memory, by use.
struct Memory {
    inputs: Inputs,
    arena: Growing,
    scratch: Growing,
    states: Vec<Growing>,
    weights: Growing,
}

/// Where a step's inputs lie: on the host, from where they are copied, and on the device.
struct Inputs {
    /// In turn, so that programs may be asked for while those before them run.
    host: [Staged; STAGED_INPUTS],
    turn: usize,
    device: Growing,
}

/// Inputs on the host.
struct Staged {
    bytes: Pinned,
    /// Reached when they may be written again.
    copied: Event,
}

/// Programs that the host may be ahead of the device: a round of drafts is a program for each, the step, and the choice of tokens.
const STAGED_INPUTS: usize = 8;

impl Staged {
    fn new() -> Result<Self, CudaError> {
        Ok(Self { bytes: Pinned::new(1)?, copied: Event::new(false)? })
    }
}

impl Cuda {
    /// Opens the GPU, compiles the kernels and copies the weights.
    /// # Errors
    /// [`CudaError`] if there is no GPU, or it cannot run this, or has too little memory; [`Error`] for bad weights.
    pub fn open(artifact: Arc<Artifact>, options: &EngineOptions, states: &States) -> Result<Self, Error> {
        let metadata = artifact.metadata();
        let how = How::chosen()?;
        let context = Context::open(&metadata.target.cpu)?;
        let stream = Stream::new()?;
        let mut memory = Memory::reserve(&context, metadata, states)?;
        // before memory is taken: a missing file is the better message
        let host = if options.random_weights { None } else { Some(Weights::map(&artifact)?) };
        check_memory(&context, metadata, options, states.kept.bytes(options.sequences as u64))?;
        memory.weights.grow(&context, &stream, metadata.weights.bytes)?;
        stream.wait(|| "clearing the weights".to_owned())?;
        let to = memory.weights.address();
        // both take time, and each something else: processors, and the link to the device
        let (modules, copied) = std::thread::scope(|scope| {
            let modules = scope.spawn(|| Modules::load(&context, &artifact));
            let copied = match host {
                Some(host) => upload::upload(&context, &host.bytes()[..metadata.weights.bytes as usize], to),
                None => upload::make_up(&metadata.weights.entries, to, &stream),
            };
            (modules.join().expect("loading does not panic"), copied)
        });
        let modules = modules?;
        copied?;
        let launcher = Launcher { how, modules, profile: None };
        let (plans, copier, outputs) = (Recent::new(MAX_PLANS), Copier::new()?, Pinned::new(1)?);
        Ok(Self { plans, launcher, copier, outputs, memory, stream, last: 0, artifact, context })
    }
}

/// How many sequences a step of `sequences` is filled up to, so that few batches need a plan and a graph of their own. Less than an eighth is added.
fn batch_width(sequences: usize) -> usize {
    sequences.next_multiple_of((sequences.next_power_of_two() / 16).max(1))
}

/// Refuses what would not fit in the end: weights, the states of all sequences with a page each, and the largest steps.
/// It is stated first where it is much.
fn check_memory(context: &Context, metadata: &Metadata, options: &EngineOptions, kept: u64) -> Result<(), CudaError> {
    let (sequences, tokens) = (options.sequences as u64, options.step_tokens as u64);
    let width = batch_width(options.sequences) as u64;
    let page = metadata.kv_bytes_per_token().saturating_mul(metadata.page_tokens);
    let states =
        metadata.state_bytes_per_sequence().saturating_add(page).saturating_mul(sequences).saturating_add(kept);
    let steps = plan::step_bytes(metadata, &[tokens.max(width), width, 1, width]);
    let (weights, (free, _)) = (metadata.weights.bytes, context.memory()?);
    let needed = weights.saturating_add(states).saturating_add(steps);
    let human = |bytes: u64| human_bytes(bytes as f64);
    if weights >= STATED_BYTES {
        let parts = [weights, states, steps, free].map(human);
        let [weights, states, steps, free] = parts;
        eprintln!("{}: {weights} of weights, {states} of states, {steps} for steps; {free} free", context.name());
    }
    match needed > free {
        true => {
            let what = "weights, states and the largest steps (`--step-tokens`)";
            Err(CudaError::Memory { device: context.name().to_owned(), what, needed, free })
        }
        false => Ok(()),
    }
}

impl Memory {
    fn reserve(context: &Context, metadata: &Metadata, states: &States) -> Result<Self, CudaError> {
        let (_, total) = context.memory()?;
        let reserve = |what, bytes| Growing::reserve(context, what, bytes);
        let staged: Vec<Staged> = (0..STAGED_INPUTS).map(|_| Staged::new()).collect::<Result<_, _>>()?;
        let Ok(host) = staged.try_into() else { unreachable!("as many as were made") };
        Ok(Self {
            inputs: Inputs { host, turn: 0, device: reserve("inputs", total)? },
            arena: reserve("arena", total)?,
            scratch: reserve("scratch", total)?,
            states: states.reserved_bytes().map(|bytes| reserve("states", bytes)).collect::<Result<_, _>>()?,
            weights: reserve("weights", metadata.weights.bytes)?,
        })
    }

    /// The copies of what a step takes from memory of the device, to inputs at `places`.
    fn taken(&self, inputs: &StepInputs, places: &[u64; INPUTS]) -> Result<Vec<CopyRows>, CudaError> {
        let copies = inputs.taken_to(places).map(|(from, mut rows)| {
            let from = match from {
                device::Memory::Arena => &self.arena,
                device::Memory::State(state) => &self.states[state],
            };
            rows.from.at = from.check_range(rows.from.at, rows.source_bytes())?;
            Ok(rows)
        });
        copies.collect()
    }

    /// Works out the launches of a program for steps of `dims`, and makes room for them.
    fn plan(
        &mut self,
        context: &Context,
        stream: &Stream,
        metadata: &Metadata,
        (program, dims): (usize, [u64; 4]),
        inputs: [u64; INPUTS],
    ) -> Result<Plan, CudaError> {
        let states: Vec<u64> = self.states.iter().map(Growing::address).collect();
        let (arena, weights) = (self.arena.address(), self.weights.address());
        let addresses = Addresses { inputs, arena, weights, states: &states, team: None };
        let resolved = resolve(metadata, &metadata.programs[program], dims, &addresses);
        let arena_bytes = metadata.arena.bytes_of(&metadata.programs[program], &dims);
        self.arena.grow(context, stream, arena_bytes + SLACK_BYTES)?;
        self.scratch.grow(context, stream, plan::scratch_bytes(metadata, &metadata.programs[program], &dims))?;
        let launches = plan::plan(metadata, &metadata.programs[program], &resolved, self.scratch.address())?;
        Ok(Plan::new(program, dims, launches))
    }
}

impl Inputs {
    /// Copies the inputs from the host to the device, and gives their addresses, which depend on their lengths alone.
    fn copy(&mut self, context: &Context, stream: &Stream, inputs: &StepInputs) -> Result<[u64; INPUTS], CudaError> {
        let bytes = inputs.host_bytes();
        let staged = &mut self.host[self.turn];
        self.turn = (self.turn + 1) % STAGED_INPUTS;
        staged.copied.wait()?;
        if staged.bytes.bytes() < bytes {
            staged.bytes = Pinned::new(bytes.next_power_of_two())?;
        }
        self.device.grow(context, stream, inputs.placed_bytes())?;
        let offsets = inputs.write(staged.bytes.as_mut_slice());
        copy_in("inputs", self.device.address(), &staged.bytes.as_slice()[..bytes as usize], stream)?;
        staged.copied.record(stream)?;
        Ok(offsets.map(|offset| self.device.address() + offset))
    }
}

impl Device for Cuda {
    fn describe(&self) -> String {
        self.context.name().to_owned()
    }

    fn limits(&mut self) -> Result<Limits, Error> {
        self.context.make_current()?;
        Ok(limits::measure(&self.context, &self.stream)?)
    }

    /// Few widths, since each needs a plan and a graph of its own.
    fn page_width(&self, pages: usize) -> usize {
        pages.next_power_of_two()
    }

    fn batch_width(&self, sequences: usize) -> usize {
        batch_width(sequences)
    }

    fn grow_state(&mut self, state: usize, bytes: u64) -> Result<(), Error> {
        self.context.make_current()?;
        Ok(self.memory.states[state].grow(&self.context, &self.stream, bytes)?)
    }

    fn read_state(&self, state: usize, at: u64, out: &mut [u8]) -> Result<(), Error> {
        self.context.make_current()?;
        let from = self.memory.states[state].check_range(at, out.len() as u64)?;
        copy_out("states", out, from, &self.stream)?;
        Ok(self.stream.wait(|| "reading states".to_owned())?)
    }

    fn write_state(&mut self, state: usize, at: u64, bytes: &[u8]) -> Result<(), Error> {
        self.context.make_current()?;
        let to = self.memory.states[state].check_range(at, bytes.len() as u64)?;
        copy_in("states", to, bytes, &self.stream)?;
        Ok(self.stream.wait(|| "writing states".to_owned())?)
    }

    fn keep(&mut self, state: usize, rows: &[CopyRows]) -> Result<(), Error> {
        self.context.make_current()?;
        let (arena, state) = (&self.memory.arena, &self.memory.states[state]);
        let mut copies = rows.to_vec();
        for rows in &mut copies {
            rows.from.at = arena.check_range(rows.from.at, rows.source_bytes())?;
            rows.to.at = state.check_range(rows.to.at, rows.target_bytes())?;
        }
        Ok(self.copier.copy(&copies, &self.stream)?)
    }

    fn run(&mut self, program: usize, inputs: &StepInputs) -> Result<(), Error> {
        let Self { plans, launcher, copier, memory, stream, artifact, context, .. } = self;
        context.make_current()?;
        let (metadata, key) = (artifact.metadata(), (program, inputs.dims()));
        let places = memory.inputs.copy(context, stream, inputs)?;
        copier.copy(&memory.taken(inputs, &places)?, stream)?;
        let plan = plans.get_or_make(key, || memory.plan(context, stream, metadata, key, places))?;
        self.last = program;
        Ok(launcher.run(metadata, stream, plan)?)
    }

    fn fetch(&mut self, spans: &[Span]) -> Result<Vec<&[u8]>, Error> {
        self.context.make_current()?;
        let total: u64 = spans.iter().map(|s| s.bytes).sum();
        if self.outputs.bytes() < total {
            self.outputs = Pinned::new(total.next_power_of_two())?;
        }
        let mut rest = self.outputs.as_mut_slice();
        for span in spans {
            let (part, after) = rest.split_at_mut(span.bytes as usize);
            copy_out("outputs", part, self.memory.arena.check_range(span.at, span.bytes)?, &self.stream)?;
            rest = after;
        }
        self.stream.wait(|| launch::describe(&self.artifact.metadata().programs[self.last]))?;
        let ends = spans.iter().scan(0, |end, span| {
            *end += span.bytes as usize;
            Some(*end)
        });
        Ok(spans.iter().zip(ends).map(|(span, end)| &self.outputs.as_slice()[end - span.bytes as usize..end]).collect())
    }

    fn profile(&mut self, go_on: bool) -> Vec<KernelTime> {
        let begin = go_on.then(|| Profile::new(self.artifact.metadata().kernels.len()));
        std::mem::replace(&mut self.launcher.profile, begin).map(Profile::times).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::batch_width;

    #[test]
    fn batches_have_few_sizes_and_little_padding() {
        assert_eq!([1, 7, 8, 9, 16, 17, 33, 64, 65].map(batch_width), [1, 7, 8, 9, 16, 18, 36, 64, 72]);
        let widths: std::collections::BTreeSet<_> = (1..=64).map(batch_width).collect();
        assert!(widths.len() <= 32 && (1..=64).all(|n| 8 * (batch_width(n) - n) < n), "{widths:?}");
    }
}
