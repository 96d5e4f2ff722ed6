//! Times of kernels, from events between their launches.
//!
//! Launches follow one another without graphs and none begins early. Where the device is done before the host has put
//! the next launch into the stream, the time until then counts to that launch: a floor of a few microseconds.

use super::CudaError;
use super::driver::{Event, Stream};
use super::plan::Planned;
use crate::step::KernelTime;

/// Sums by kernel, and the events of a step.
#[derive(Debug)]
pub(super) struct Profile {
    times: Vec<KernelTime>,
    events: Vec<Event>,
}

impl Profile {
    /// Nothing measured yet, of so many kernels.
    pub fn new(kernels: usize) -> Self {
        Self { times: vec![KernelTime::default(); kernels], events: Vec::new() }
    }

    /// What was measured, by kernel; a tail counts to its kernel.
    pub fn times(self) -> Vec<KernelTime> {
        self.times
    }

    /// Says that the stream now holds the first `launches` launches of a step.
    pub fn mark(&mut self, launches: usize, stream: &Stream) -> Result<(), CudaError> {
        while self.events.len() <= launches {
            self.events.push(Event::new(true)?);
        }
        self.events[launches].record(stream)
    }

    /// Adds up a step's launches, which are done.
    pub fn add(&mut self, launches: &[Planned]) -> Result<(), CudaError> {
        let seconds = self.events.windows(2).map(|events| events[0].seconds_until(&events[1]));
        let each = launches.iter().zip(seconds).map(|(planned, seconds)| Ok((planned, seconds?)));
        let each = each.collect::<Result<Vec<_>, CudaError>>()?;
        for launch in each.chunk_by(|(a, _), (b, _)| a.launch == b.launch) {
            self.times[launch[0].0.kernel].add(launch.iter().map(|(_, seconds)| seconds).sum());
        }
        Ok(())
    }
}
