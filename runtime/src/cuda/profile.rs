//! Times of kernels, from events between their launches.
//!
//! Launches follow one another without graphs and none begins early. Where the device is done before the host has put the next launch
//! into the stream, the time until then counts to that launch: a floor of a few microseconds.

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
        for (planned, events) in launches.iter().zip(self.events.windows(2)) {
            let time = &mut self.times[planned.kernel];
            time.runs += u64::from(!planned.tail);
            time.seconds += events[0].seconds_until(&events[1])?;
        }
        Ok(())
    }
}
