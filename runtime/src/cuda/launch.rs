//! Launches of kernels on a stream: as graphs, one by one, timed or traced.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys;
use nextc_abi::{Metadata, Program};

use super::CudaError;
use super::driver::{Stream, check};
use super::graph::Graph;
use super::module::{Function, Modules};
use super::plan::Planned;
use super::profile::Profile;

/// The variable that says how kernels are launched.
const VARIABLE: &str = "NEXTC_LAUNCH";

/// How kernels are launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// As graphs, but for what runs for the first time.
    Graph,
    /// One after the other.
    Stream,
    /// Each when the one before it is done and was without error.
    Trace,
}

impl How {
    /// As the environment says.
    /// # Errors
    /// [`CudaError::Variable`] if it says something else.
    pub fn chosen() -> Result<Self, CudaError> {
        Self::parse(std::env::var(VARIABLE).unwrap_or_default())
    }

    fn parse(value: String) -> Result<Self, CudaError> {
        match value.as_str() {
            "" | "graph" => Ok(Self::Graph),
            "stream" => Ok(Self::Stream),
            "trace" => Ok(Self::Trace),
            _ => {
                let expected = "`graph`, `stream` or `trace`";
                Err(CudaError::Variable { name: VARIABLE, found: value, expected })
            }
        }
    }
}

/// The launches of a program in steps of certain dimensions.
#[derive(Debug)]
pub(super) struct Plan {
    program: usize,
    dims: [u64; 4],
    launches: Vec<Planned>,
    /// True once it has run: what runs again is worth a graph.
    seen: bool,
    graph: Option<Graph>,
}

impl Plan {
    /// A plan that has not run yet.
    pub fn new(program: usize, dims: [u64; 4], launches: Vec<Planned>) -> Self {
        Self { program, dims, launches, seen: false, graph: None }
    }
}

/// Runs plans.
#[derive(Debug)]
pub(super) struct Launcher {
    pub how: How,
    pub modules: Modules,
    /// Times of kernels, while they are asked for.
    pub profile: Option<Profile>,
}

impl Launcher {
    /// Puts the launches of a plan into the stream.
    /// # Errors
    /// [`CudaError::Call`] names the kernel, or the program if only the wait for all of them tells.
    pub fn run(&mut self, metadata: &Metadata, stream: &Stream, plan: &mut Plan) -> Result<(), CudaError> {
        let program = &metadata.programs[plan.program];
        match (self.how, &mut self.profile) {
            (How::Graph | How::Stream, Some(profile)) => {
                profile.mark(0, stream)?;
                put(&self.modules, metadata, plan, stream, false, |i, _| profile.mark(i + 1, stream))?;
                stream.wait(|| describe(program))?;
                profile.add(&plan.launches)
            }
            (How::Stream, None) => put(&self.modules, metadata, plan, stream, true, |_, _| Ok(())),
            (How::Graph, None) => self.run_graph(metadata, stream, plan),
            (How::Trace, _) => put(&self.modules, metadata, plan, stream, false, |_, planned| {
                let dims = plan.dims;
                let place = place(metadata, program, planned);
                stream.wait(|| format!("{place} in a step of T, B, P, R = {dims:?}: {planned:x?}"))
            }),
        }
    }

    fn run_graph(&self, metadata: &Metadata, stream: &Stream, plan: &mut Plan) -> Result<(), CudaError> {
        let name = &metadata.programs[plan.program].name;
        if plan.graph.is_none() && plan.seen {
            let launch = || put(&self.modules, metadata, plan, stream, true, |_, _| Ok(()));
            plan.graph = Some(Graph::record(stream, name, launch)?);
        }
        plan.seen = true;
        match &plan.graph {
            Some(graph) => graph.start(stream, name),
            None => put(&self.modules, metadata, plan, stream, true, |_, _| Ok(())),
        }
    }
}

/// Puts the launches of a plan into the stream one by one, and says so of each.
fn put(
    modules: &Modules,
    metadata: &Metadata,
    plan: &Plan,
    stream: &Stream,
    early: bool,
    mut then: impl FnMut(usize, &Planned) -> Result<(), CudaError>,
) -> Result<(), CudaError> {
    let program = &metadata.programs[plan.program];
    for (i, planned) in plan.launches.iter().enumerate() {
        let functions = modules.functions(planned.kernel);
        let function = functions.tail.filter(|_| planned.tail).unwrap_or(functions.body);
        launch(function, planned, stream, early, || place(metadata, program, planned))?;
        then(i, planned)?;
    }
    Ok(())
}

/// What is said of an error that came to light when a whole program was waited for.
pub(super) fn describe(program: &Program) -> String {
    format!("program `{}` (`{VARIABLE}=trace` names the kernel)", program.name)
}

/// Where in the model a launch is.
fn place(metadata: &Metadata, program: &Program, planned: &Planned) -> String {
    let (kernel, label) = (&metadata.kernels[planned.kernel].name, &program.launches[planned.launch].label);
    let tail = if planned.tail { "the tail of " } else { "" };
    format!("program `{}`, {tail}kernel `{kernel}` ({label})", program.name)
}

/// Launches a function behind what the stream holds; if `early`, as soon as the kernel before it lets it, where the
/// plan says that it may.
pub(super) fn launch(
    function: Function,
    planned: &Planned,
    stream: &Stream,
    early: bool,
    doing: impl FnOnce() -> String,
) -> Result<(), CudaError> {
    let mut args: Vec<*mut c_void> = planned.args.iter().map(|a| ptr::from_ref(a).cast_mut().cast()).collect();
    let mut attributes = [early_attribute()];
    let config = sys::CUlaunchConfig {
        gridDimX: planned.blocks,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: planned.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: planned.shared_bytes,
        hStream: stream.raw(),
        attrs: attributes.as_mut_ptr(),
        numAttrs: u32::from(early && planned.early),
    };
    // SAFETY: the function's parameters are those of the plan: the dimensions, as many pointers as the metadata says
    // (`check_entries`), scratch and tasks, all of 8 bytes, and the driver copies them before it returns. The pointers
    // lead to memory of the device that lives as long as the engine and is as large as the linker planned for these
    // dimensions.
    let status = unsafe { sys::cuLaunchKernelEx(&config, function.0, args.as_mut_ptr(), ptr::null_mut()) };
    check(status, "cuLaunchKernelEx", doing)
}

/// Lets a launch begin while the one before it in the stream still runs.
fn early_attribute() -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_of_launching_is_one_of_three() {
        let check = |value: &str, expected| assert_eq!(How::parse(value.to_owned()).unwrap(), expected);
        check("", How::Graph);
        check("graph", How::Graph);
        check("stream", How::Stream);
        check("trace", How::Trace);
        let error = How::parse("fast".to_owned()).unwrap_err().to_string();
        assert_eq!(error, "`NEXTC_LAUNCH` is `fast`, expected `graph`, `stream` or `trace`");
    }
}
