//! Launches recorded once as a graph, which the driver starts at once.

use std::ptr;

use cudarc::driver::sys;

use super::CudaError;
use super::driver::{Stream, driver};

/// A graph of launches, ready to start.
#[derive(Debug)]
pub(super) struct Graph(sys::CUgraphExec);

// SAFETY: a handle of a context that every thread may use.
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `launch` puts into the stream, in its order; nothing of it runs. A launch that may begin early
    /// becomes a node with a programmatic edge.
    pub fn record(
        stream: &Stream,
        what: &str,
        launch: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<Self, CudaError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        driver!(format!("recording {what}"), cuStreamBeginCapture_v2(stream.raw(), mode))?;
        let launched = launch();
        let mut graph = ptr::null_mut();
        let ended = driver!(format!("recording {what}"), cuStreamEndCapture(stream.raw(), &mut graph));
        // an error of a launch comes first: it names its kernel
        let mut exec = ptr::null_mut();
        let made = launched.and(ended).and_then(|()| {
            driver!(format!("making a graph of {what}"), cuGraphInstantiateWithFlags(&mut exec, graph, 0))
        });
        if !graph.is_null() {
            let _ = driver!("dropping a graph", cuGraphDestroy(graph));
        }
        made.map(|()| Self(exec))
    }

    /// Starts the launches behind what the stream holds.
    pub fn start(&self, stream: &Stream, what: &str) -> Result<(), CudaError> {
        driver!(format!("starting the graph of {what}"), cuGraphLaunch(self.0, stream.raw()))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = driver!("dropping a graph", cuGraphExecDestroy(self.0));
    }
}
