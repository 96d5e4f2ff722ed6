//! NVIDIA GPUs as a device, through the driver alone: no toolkit, and no library but `libcuda.so.1`, which is loaded when an
//! executable for a GPU runs. GPU 0 of those that `CUDA_VISIBLE_DEVICES` shows is taken.
//!
//! Weights are copied to the device once. States, arena and scratch are ranges of addresses that get memory by use and never move, so
//! what was worked out for a step stays right. A step is one copy of its inputs and its launches, in one stream.
//!
//! `NEXTC_LAUNCH` chooses how kernels are launched: `stream` (one after the other), or `trace`, which waits after each
//! one, so that an error names its kernel.

mod driver;
mod error;
mod launch;
mod limits;
mod memory;
mod module;
mod plan;

use std::sync::Arc;

use nextc_abi::{Metadata, Program};

use self::driver::{Context, Event, Stream};
pub use self::error::CudaError;
use self::memory::{Growing, Pinned, copy_in, copy_out};
use self::module::Modules;
use self::plan::Planned;
use crate::artifact::Artifact;
use crate::device::{Device, Span};
use crate::engine::EngineOptions;
use crate::error::Error;
use crate::limits::Limits;
use crate::state::States;
use crate::step::{Addresses, KernelTime, SLACK_BYTES, StepInputs, resolve};
use crate::weights::Weights;

/// The variable that says how kernels are launched.
const LAUNCH_VARIABLE: &str = "NEXTC_LAUNCH";

/// How kernels are launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// One after the other.
    Stream,
    /// Each when the one before it is done, and waited for.
    Trace,
}

impl How {
    /// As the environment says.
    fn chosen() -> Result<Self, CudaError> {
        Self::parse(std::env::var(LAUNCH_VARIABLE).unwrap_or_default())
    }

    fn parse(value: String) -> Result<Self, CudaError> {
        match value.as_str() {
            "" | "stream" => Ok(Self::Stream),
            "trace" => Ok(Self::Trace),
            _ => Err(CudaError::Variable { name: LAUNCH_VARIABLE, found: value, expected: "`stream` or `trace`" }),
        }
    }
}

/// A GPU with all that an executable keeps on it.
pub(crate) struct Cuda {
    // in this order: what is dropped first needs what is dropped last
    plans: Vec<Option<Plan>>,
    modules: Modules,
    profile: Option<Profile>,
    /// The program that ran last.
    last: usize,
    outputs: Pinned,
    inputs: Inputs,
    scratch: Growing,
    arena: Growing,
    states: Vec<Growing>,
    weights: Growing,
    stream: Stream,
    how: How,
    artifact: Arc<Artifact>,
    context: Context,
}

/// The launches of a program in steps of certain dimensions.
struct Plan {
    dims: [u64; 4],
    launches: Vec<Planned>,
}

/// Where a step's inputs lie: on the host, from where they are copied, and on the device.
struct Inputs {
    host: Pinned,
    device: Growing,
    /// Reached when the host's may be written again.
    copied: Event,
}

impl Cuda {
    /// Opens the GPU, compiles the kernels and copies the weights.
    /// # Errors
    /// [`CudaError`] if there is no GPU, or it cannot run this, or has too little memory; [`Error`] for bad weights.
    pub fn open(artifact: Arc<Artifact>, options: &EngineOptions, states: &States) -> Result<Self, Error> {
        let metadata = artifact.metadata();
        let how = How::chosen()?;
        let context = Context::open(&metadata.target.cpu)?;
        let (_, total) = context.memory()?;
        let stream = Stream::new()?;
        let reserve = |what, bytes| Growing::reserve(&context, what, bytes);
        let states = states.reserved_bytes().map(|bytes| reserve("states", bytes)).collect::<Result<_, _>>()?;
        let inputs = Inputs { host: Pinned::new(1)?, device: reserve("inputs", total)?, copied: Event::new(false)? };
        let (arena, scratch) = (reserve("arena", total)?, reserve("scratch", total)?);
        let mut weights = reserve("weights", metadata.weights.bytes)?;
        let host = match options.random_weights {
            true => Weights::random(&artifact)?,
            false => Weights::map(&artifact)?,
        };
        weights.grow(&context, &stream, metadata.weights.bytes)?;
        let bytes = &host.bytes()[..metadata.weights.bytes as usize];
        copy_in("weights", weights.address(), bytes, &stream)?;
        let modules = Modules::load(&context, &artifact)?;
        stream.wait(|| "copying the weights".to_owned())?;
        let plans = metadata.programs.iter().map(|_| None).collect();
        let (outputs, profile, last) = (Pinned::new(1)?, None, 0);
        Ok(Self {
            plans,
            modules,
            profile,
            last,
            outputs,
            inputs,
            scratch,
            arena,
            states,
            weights,
            stream,
            how,
            artifact,
            context,
        })
    }

    fn metadata(&self) -> &Metadata {
        self.artifact.metadata()
    }

    fn program(&self, program: usize) -> &Program {
        &self.metadata().programs[program]
    }

    /// Copies the inputs to the device, and gives their addresses.
    fn copy_inputs(&mut self, inputs: &StepInputs) -> Result<[u64; crate::step::INPUTS], CudaError> {
        let bytes = inputs.placed_bytes();
        let Self { inputs: Inputs { host, device, copied }, stream, context, .. } = self;
        copied.wait()?;
        if host.bytes() < bytes {
            *host = Pinned::new(bytes.next_power_of_two())?;
        }
        device.grow(context, stream, bytes)?;
        let offsets = inputs.write(host.as_mut_slice());
        copy_in("inputs", device.address(), &host.as_slice()[..bytes as usize], stream)?;
        copied.record(stream)?;
        Ok(offsets.map(|offset| device.address() + offset))
    }

    /// Works out the launches of a program for steps of `dims`, and makes room for them.
    fn prepare(&mut self, program: usize, dims: [u64; 4], inputs: [u64; crate::step::INPUTS]) -> Result<(), CudaError> {
        if self.plans[program].as_ref().is_some_and(|plan| plan.dims == dims) {
            return Ok(());
        }
        let artifact = Arc::clone(&self.artifact);
        let metadata = artifact.metadata();
        let states: Vec<u64> = self.states.iter().map(Growing::address).collect();
        let (arena, weights) = (self.arena.address(), self.weights.address());
        let addresses = Addresses { inputs, arena, weights, states: &states };
        let resolved = resolve(metadata, self.program(program), dims, &addresses);
        self.arena.grow(&self.context, &self.stream, metadata.arena.bytes(&dims) + SLACK_BYTES)?;
        self.scratch.grow(&self.context, &self.stream, plan::scratch_bytes(metadata, &resolved))?;
        let launches = plan::plan(metadata, self.program(program), &resolved, self.scratch.address())?;
        self.plans[program] = Some(Plan { dims, launches });
        Ok(())
    }

    fn launch_all(&mut self, program: usize) -> Result<(), CudaError> {
        let Some(plan) = &self.plans[program] else { return Ok(()) };
        let early = self.how == How::Stream && self.profile.is_none();
        if let Some(profile) = &mut self.profile {
            profile.begin(plan.launches.len(), &self.stream)?;
        }
        for (i, planned) in plan.launches.iter().enumerate() {
            let place = || place(self.metadata(), program, planned);
            launch::launch(self.modules.functions(planned.kernel), planned, &self.stream, early, place)?;
            if let Some(profile) = &self.profile {
                profile.events[i + 1].record(&self.stream)?;
            }
            if self.how == How::Trace {
                let dims = plan.dims;
                self.stream.wait(|| format!("{} in a step of T, B, P, R = {dims:?}: {planned:x?}", place()))?;
            }
        }
        if let Some(profile) = &mut self.profile {
            self.stream.wait(|| format!("program `{}`", self.artifact.metadata().programs[program].name))?;
            profile.end(&plan.launches)?;
        }
        Ok(())
    }
}

/// Where in the model a launch is, for messages.
fn place(metadata: &Metadata, program: usize, planned: &Planned) -> String {
    let program = &metadata.programs[program];
    let (kernel, label) = (&metadata.kernels[planned.kernel].name, &program.launches[planned.launch].label);
    let tail = if planned.tail { "the tail of " } else { "" };
    format!("program `{}`, {tail}kernel `{kernel}` ({label})", program.name)
}

/// Times of kernels, from events between them.
struct Profile {
    times: Vec<KernelTime>,
    events: Vec<Event>,
}

impl Profile {
    /// Has an event for each of so many launches and one before them, and records that one.
    fn begin(&mut self, launches: usize, stream: &Stream) -> Result<(), CudaError> {
        while self.events.len() < launches + 1 {
            self.events.push(Event::new(true)?);
        }
        self.events[0].record(stream)
    }

    /// Adds up the times between events that have been reached. A tail counts to its kernel.
    fn end(&mut self, launches: &[Planned]) -> Result<(), CudaError> {
        for (planned, events) in launches.iter().zip(self.events.windows(2)) {
            let time = &mut self.times[planned.kernel];
            time.runs += u64::from(!planned.tail);
            time.seconds += events[0].seconds_until(&events[1])?;
        }
        Ok(())
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

    fn grow_state(&mut self, state: usize, bytes: u64) -> Result<(), Error> {
        self.context.make_current()?;
        Ok(self.states[state].grow(&self.context, &self.stream, bytes)?)
    }

    fn read_state(&self, state: usize, at: u64, out: &mut [u8]) -> Result<(), Error> {
        self.context.make_current()?;
        let from = self.states[state].check_range(at, out.len() as u64)?;
        copy_out("states", out, from, &self.stream)?;
        Ok(self.stream.wait(|| "reading states".to_owned())?)
    }

    fn write_state(&mut self, state: usize, at: u64, bytes: &[u8]) -> Result<(), Error> {
        self.context.make_current()?;
        let to = self.states[state].check_range(at, bytes.len() as u64)?;
        copy_in("states", to, bytes, &self.stream)?;
        Ok(self.stream.wait(|| "writing states".to_owned())?)
    }

    fn run(&mut self, program: usize, inputs: &StepInputs) -> Result<(), Error> {
        self.context.make_current()?;
        self.last = program;
        let places = self.copy_inputs(inputs)?;
        self.prepare(program, inputs.dims(), places)?;
        Ok(self.launch_all(program)?)
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
            copy_out("outputs", part, self.arena.check_range(span.at, span.bytes)?, &self.stream)?;
            rest = after;
        }
        let name = &self.artifact.metadata().programs[self.last].name;
        self.stream.wait(|| format!("program `{name}` (`{LAUNCH_VARIABLE}=trace` names the kernel)"))?;
        let mut rest = self.outputs.as_slice();
        Ok(spans
            .iter()
            .map(|span| {
                let (part, after) = rest.split_at(span.bytes as usize);
                rest = after;
                part
            })
            .collect())
    }

    fn profile(&mut self, go_on: bool) -> Vec<KernelTime> {
        let times = vec![KernelTime::default(); self.metadata().kernels.len()];
        let begin = go_on.then(|| Profile { times, events: Vec::new() });
        std::mem::replace(&mut self.profile, begin).map_or_else(Vec::new, |profile| profile.times)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_of_launching_is_one_of_a_few() {
        let check = |value: &str| How::parse(value.to_owned());
        assert!(matches!(
            (check(""), check("stream"), check("trace")),
            (Ok(How::Stream), Ok(How::Stream), Ok(How::Trace))
        ));
        let error = check("fast").unwrap_err().to_string();
        assert_eq!(error, "`NEXTC_LAUNCH` is `fast`, expected `stream` or `trace`");
    }
}
