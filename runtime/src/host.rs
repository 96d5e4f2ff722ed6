//! The processor as a device: kernels run on a team of threads, in memory of this process.

use std::sync::Arc;
use std::time::Instant;

use nextc_abi::{KernelFn, Metadata, Program, Span};

use crate::artifact::Artifact;
use crate::cpu;
use crate::device::{CopyRows, Device, Memory};
use crate::engine::{EngineOptions, check_available};
use crate::error::Error;
use crate::limits::Limits;
use crate::memory::Region;
use crate::pool::Pool;
use crate::recent::Recent;
use crate::state::States;
use crate::step::{Addresses, KernelTime, Resolved, SLACK_BYTES, StepInputs, Team, resolve};
use crate::weights::Weights;

/// Dimensions of a program that are kept resolved.
const KEPT_DIMS: usize = 8;
/// Bytes of a page of KV, or of a slot, from which on a state lies in large pages: below, what is never touched of those would cost more than they save.
const LARGE_UNIT_BYTES: u64 = 1 << 16;

/// Threads, and the memory that steps work in.
pub(crate) struct Host {
    artifact: Arc<Artifact>,
    weights: Weights,
    states: Vec<Region>,
    pool: Pool,
    arena: Region,
    /// Bytes of it that the last program has used.
    used_bytes: u64,
    inputs: Region,
    scratch: Region,
    scratch_bytes: u64,
    /// What tasks of a launch hand to its tail.
    partials: Region,
    /// The machine code of each kernel and of its tail.
    entries: Vec<(KernelFn, Option<KernelFn>)>,
    /// By program and dimensions: those of the steps that check 1 to 8 tokens come again and again.
    resolved: Recent<(usize, [u64; 4]), Resolved>,
    /// Runs and time of each kernel, while that is asked for.
    profile: Option<Vec<KernelTime>>,
}

impl Host {
    /// Maps the weights, reserves states and starts threads.
    /// # Errors
    /// [`Error`] if the processor, the weights or the memory will not do.
    pub fn open(artifact: Arc<Artifact>, options: &EngineOptions, states: &States) -> Result<Self, Error> {
        artifact.check_cpu()?;
        let metadata = artifact.metadata();
        let threads = options.threads.max(1);
        let scratch_bytes = metadata.kernels.iter().map(|k| k.scratch_bytes).max().unwrap_or(0);
        // a page between threads keeps their lines apart
        let scratch_bytes = nextc_abi::align_up(scratch_bytes + SLACK_BYTES, nextc_abi::PAGE_BYTES);
        let entry = |k: &nextc_abi::Kernel| (artifact.entry(k.entry), k.tail.map(|t| artifact.entry(t)));
        Ok(Self {
            weights: match options.random_weights {
                true => Weights::random(&artifact)?,
                false => Weights::map(&artifact)?,
            },
            states: reserve_states(states)?,
            pool: Pool::new(threads).map_err(|error| Error::Threads { threads, error })?,
            arena: reserve("arena", 0)?,
            used_bytes: 0,
            inputs: reserve("inputs", 0)?,
            scratch: reserve("scratch", scratch_bytes * threads as u64)?,
            scratch_bytes,
            partials: reserve("partials", 0)?,
            entries: metadata.kernels.iter().map(entry).collect(),
            resolved: Recent::new(KEPT_DIMS * metadata.programs.len()),
            profile: None,
            artifact,
        })
    }

    /// Makes arena and inputs large enough. Results of the step before that this one goes on from are kept. Addresses resolved before are void if one has moved.
    fn make_room(&mut self, program: usize, inputs: &StepInputs) -> Result<(), Error> {
        let metadata = self.artifact.metadata();
        let arena = metadata.arena.bytes_of(&metadata.programs[program], &inputs.dims()) + SLACK_BYTES;
        let keep = if inputs.need_arena() { self.used_bytes as usize } else { 0 };
        self.used_bytes = arena - SLACK_BYTES;
        let regions = [(&mut self.arena, arena, "arena", keep), (&mut self.inputs, inputs.placed_bytes(), "inputs", 0)];
        for (region, bytes, what, keep) in regions {
            if region.bytes() < bytes {
                check_available(what, bytes)?;
                let mut larger = reserve(what, bytes.next_power_of_two())?;
                larger.advise_huge();
                larger.as_mut_slice()[..keep].copy_from_slice(&region.as_slice()[..keep]);
                *region = larger;
                self.resolved.clear();
            }
        }
        // address space for all tasks: only those that have work touch theirs
        let partials = partial_bytes(metadata, &metadata.programs[program], &inputs.dims());
        if self.partials.bytes() < partials {
            self.partials = reserve("partials", partials.checked_next_power_of_two().unwrap_or(partials))?;
            self.resolved.clear();
        }
        Ok(())
    }
}

/// Memory for states, in large pages where a page of KV or a slot is no small part of one.
fn reserve_states(states: &States) -> Result<Vec<Region>, Error> {
    let sizes = states.reserved_bytes().zip(states.unit_bytes());
    let regions = sizes.map(|(bytes, unit)| {
        let region = reserve("states", bytes)?;
        if unit >= LARGE_UNIT_BYTES {
            region.advise_huge();
        }
        Ok(region)
    });
    regions.collect()
}

/// Bytes that the tasks of a launch of a program hand to its tail, at most.
fn partial_bytes(metadata: &Metadata, program: &Program, dims: &[u64; 4]) -> u64 {
    let kernels = program.launches.iter().map(|launch| &metadata.kernels[launch.kernel as usize]);
    let hand_over = kernels.filter(|kernel| kernel.partial_bytes > 0);
    hand_over.map(|kernel| kernel.partial_bytes.saturating_mul(kernel.grid.eval(dims))).max().unwrap_or(0)
}

/// What runs the launches of a step.
struct Runner<'a> {
    pool: &'a mut Pool,
    entries: &'a [(KernelFn, Option<KernelFn>)],
    profile: Option<&'a mut [KernelTime]>,
    /// Where scratch begins, and how much a thread has.
    scratch: (u64, u64),
}

impl Runner<'_> {
    fn run(&mut self, resolved: &Resolved) {
        let (scratch, scratch_bytes) = self.scratch;
        for launch in &resolved.launches {
            let begun = self.profile.is_some().then(Instant::now);
            let args = SharedArgs(resolved.args[launch.args.start..].as_ptr());
            let own_scratch = |thread: usize| (scratch + thread as u64 * scratch_bytes) as *mut u8;
            let (entry, tail) = self.entries[launch.kernel];
            for (code, tasks) in std::iter::once((entry, launch.tasks)).chain(tail.map(|t| (t, launch.tail_tasks))) {
                self.pool.run(i64::try_from(tasks).unwrap_or(i64::MAX), &|thread, first, last| {
                    let args = &args;
                    // SAFETY: the arguments are the kernel's own (`check_entries`): addresses of inputs, arena, weights,
                    // states and partials that live through the step and are as large as the linker planned for these
                    // dimensions. Ranges are disjoint and within the grid, each thread has scratch of its own, and nobody
                    // else touches this memory while the engine is borrowed. The tail follows when all tasks are done.
                    unsafe { code(args.0, own_scratch(thread), first, last) }
                });
            }
            if let (Some(times), Some(begun)) = (&mut self.profile, begun) {
                times[launch.kernel].add(begun.elapsed().as_secs_f64());
            }
        }
    }
}

impl Device for Host {
    fn describe(&self) -> String {
        format!("{}, {} threads", cpu::name(), self.pool.threads())
    }

    fn limits(&mut self) -> Result<Limits, Error> {
        Limits::measure(&mut self.pool, self.artifact.metadata().weights.bytes)
    }

    /// Address space is there, and takes memory when it is touched.
    fn grow_state(&mut self, _state: usize, _bytes: u64) -> Result<(), Error> {
        Ok(())
    }

    fn read_state(&self, state: usize, at: u64, out: &mut [u8]) -> Result<(), Error> {
        out.copy_from_slice(&self.states[state].as_slice()[at as usize..at as usize + out.len()]);
        Ok(())
    }

    fn write_state(&mut self, state: usize, at: u64, bytes: &[u8]) -> Result<(), Error> {
        self.states[state].as_mut_slice()[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn keep(&mut self, state: usize, rows: &[CopyRows]) -> Result<(), Error> {
        rows.iter().for_each(|rows| copy_rows(rows, &self.arena, &mut self.states[state]));
        Ok(())
    }

    fn run(&mut self, program: usize, inputs: &StepInputs) -> Result<(), Error> {
        self.make_room(program, inputs)?;
        let dims = inputs.dims();
        let base = self.inputs.address();
        let offsets = inputs.write(self.inputs.as_mut_slice());
        for (memory, rows) in inputs.taken_to(&offsets) {
            let from = match memory {
                Memory::Arena => &self.arena,
                Memory::State(state) => &self.states[state],
            };
            copy_rows(&rows, from, &mut self.inputs);
        }
        let places = offsets.map(|offset| base + offset);
        let (arena, weights, metadata) = (self.arena.address(), self.weights.address(), self.artifact.metadata());
        let team = Some(Team { threads: self.pool.threads() as u64, partials: self.partials.address() });
        let states = &self.states;
        let make = || {
            let states: Vec<u64> = states.iter().map(Region::address).collect();
            let addresses = Addresses { inputs: places, arena, weights, states: &states, team };
            Ok::<_, Error>(resolve(metadata, &metadata.programs[program], dims, &addresses))
        };
        let resolved = self.resolved.get_or_make((program, dims), make)?;
        let scratch = (self.scratch.address(), self.scratch_bytes);
        let profile = self.profile.as_deref_mut();
        Runner { pool: &mut self.pool, entries: &self.entries, profile, scratch }.run(resolved);
        Ok(())
    }

    fn fetch(&mut self, spans: &[Span]) -> Result<Vec<&[u8]>, Error> {
        let arena = self.arena.as_slice();
        Ok(spans.iter().map(|s| &arena[s.at as usize..(s.at + s.bytes) as usize]).collect())
    }

    fn profile(&mut self, go_on: bool) -> Vec<KernelTime> {
        let begin = go_on.then(|| vec![KernelTime::default(); self.entries.len()]);
        std::mem::replace(&mut self.profile, begin).unwrap_or_default()
    }
}

fn copy_rows(rows: &CopyRows, from: &Region, to: &mut Region) {
    let (from, to) = (from.as_slice(), to.as_mut_slice());
    for row in 0..rows.rows {
        let [from_at, to_at] = [rows.from, rows.to].map(|place| (place.at + row * place.stride) as usize);
        let bytes = rows.bytes as usize;
        to[to_at..to_at + bytes].copy_from_slice(&from[from_at..from_at + bytes]);
    }
}

fn reserve(what: &'static str, bytes: u64) -> Result<Region, Error> {
    Region::reserve(bytes).map_err(|error| Error::Memory { what, bytes, error })
}

/// Arguments that several threads read.
struct SharedArgs(*const u64);

// SAFETY: the arguments are not written while a step runs.
unsafe impl Sync for SharedArgs {}
