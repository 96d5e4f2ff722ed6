//! Memory as a running kernel sees it: buffers, the allocations of the task at work, and what is looked for at every access.

use std::collections::VecDeque;
use std::ops::Range;

use super::Misdeed;
use super::code::Block;
use super::memory::{Buffer, Place, Slot};
use super::shadow::{Clock, Shadow};
use crate::kernel::Kernel;

/// A pointer: `buffer` counts the run's slots first, then what the body hands to the tail, then the task's allocations.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pointer {
    pub(super) buffer: usize,
    pub(super) at: i64,
    pub(super) writable: bool,
}

/// The lowest alignment of a vector that blocks do not ask for, in bytes.
const MOST_ALIGNED: u64 = 16;

/// A thread's copy of four words that is under way: where to, and what.
struct Copy {
    to: (Pointer, i64),
    words: [u32; 4],
    thread: usize,
}

/// What is found where a copy has not come to yet: no number.
const UNDER_WAY: u32 = 0x7fc0_dead;

pub(super) struct Memory<'r, 's> {
    slots: &'r mut [Slot<'s>],
    /// What the current task has allocated.
    own: Vec<Buffer>,
    /// One for each slot that a parameter may write; none if races are not looked for.
    shadows: Vec<Option<Shadow>>,
    /// What the body hands to the tail: a slot behind the last.
    partials: Buffer,
    /// One for each allocation that threads share.
    own_shadows: Vec<Shadow>,
    clock: Clock,
    /// Copies under way: the groups that are closed, and the open one.
    groups: VecDeque<Vec<Copy>>,
    open: Vec<Copy>,
    /// Whether a task is a block of threads.
    is_block: bool,
    races: bool,
    /// The launches before may still run: nothing is to be touched but weights.
    pub(super) must_wait: bool,
}

impl<'r, 's> Memory<'r, 's> {
    pub(super) fn new(kernel: &Kernel, slots: &'r mut [Slot<'s>], args: &[Place], races: bool) -> Self {
        let (own, own_shadows, is_block) = (Vec::new(), Vec::new(), kernel.is_block());
        let (clock, must_wait, partials) = (Clock::default(), false, Buffer::uninit(0));
        let (shadows, groups, open) = (Vec::new(), VecDeque::new(), Vec::new());
        let mut this =
            Self { slots, own, partials, shadows, own_shadows, clock, groups, open, is_block, races, must_wait };
        if races {
            let written = |i: usize| kernel.params.iter().zip(args).any(|(p, a)| p.written && a.buffer == i);
            let shadow = |(i, slot): (usize, &Slot<'_>)| written(i).then(|| Shadow::new(slot.get()));
            this.shadows = this.slots.iter().enumerate().map(shadow).collect();
        }
        this
    }

    /// Makes room for what the body hands to the tail.
    pub(super) fn take_partials(&mut self, bytes: u64) {
        self.partials = Buffer::uninit(bytes);
        if self.races {
            self.shadows.push(Some(Shadow::new(&self.partials)));
        }
    }

    /// A pointer to what the body hands to the tail.
    pub(super) fn partials(&self) -> Pointer {
        Pointer { buffer: self.slots.len(), at: 0, writable: true }
    }

    /// A task begins; `None` is a tail of one task of one thread.
    pub(super) fn begin(&mut self, task: Option<u32>, block: &Block) {
        self.clock.begin(task);
        self.must_wait = block.wait.is_some();
        self.groups.clear();
        self.open.clear();
        let same = self.own.len() == block.own.len()
            && self.own.iter().zip(&block.own).all(|(b, &n)| b.len_bytes() == n.next_multiple_of(4));
        if same {
            return self.own.iter_mut().for_each(Buffer::forget);
        }
        self.own = block.own.iter().map(|&n| Buffer::uninit(n)).collect();
        let shared = if self.is_block && self.races { self.own.as_slice() } else { &[] };
        self.own_shadows = shared.iter().map(Shadow::new).collect();
    }

    /// Before the tail: all tasks are done. A thread `alone` conflicts with nobody.
    pub(super) fn forget_tasks(&mut self, alone: bool) {
        if alone {
            return self.shadows.clear();
        }
        let buffers = self.slots.iter().map(Slot::get).chain([&self.partials]);
        for (shadow, buffer) in self.shadows.iter_mut().zip(buffers) {
            if let Some(shadow) = shadow {
                *shadow = Shadow::new(buffer);
            }
        }
    }

    /// All threads of the block have met.
    pub(super) fn barrier(&mut self) {
        self.clock.barrier();
    }

    /// A pointer to allocation `piece` of the task.
    pub(super) fn own(&self, piece: usize) -> Pointer {
        Pointer { buffer: self.slots.len() + 1 + piece, at: 0, writable: true }
    }

    /// The words that an access reads.
    pub(super) fn read(
        &mut self,
        p: Pointer,
        index: i64,
        (lanes, elem_bytes): (usize, u64),
        thread: usize,
    ) -> Result<&[u32], Misdeed> {
        let at = address(p.at, index, elem_bytes);
        self.check(p, at, lanes as u64 * elem_bytes)?;
        let slots = self.slots.len();
        let buffer = match self.slots.get(p.buffer) {
            Some(slot) => slot.get(),
            None if p.buffer == slots => &self.partials,
            None => &self.own[p.buffer - slots - 1],
        };
        let range = buffer.range(at, lanes, elem_bytes)?;
        if self.must_wait && self.slots.get(p.buffer).is_some_and(|slot| !slot.is_settled(range.clone())) {
            return Err(Misdeed::BeforeWait);
        }
        let words = buffer.read(range.clone())?;
        if let Some(Some(shadow)) = self.shadows.get_mut(p.buffer) {
            let read = shadow.read(range, self.clock.in_launch(thread));
            read.map_err(|c| self.clock.race(&c))?;
        } else if let Some(shadow) = own(&mut self.own_shadows, p, self.slots.len()) {
            let read = shadow.read(range, self.clock.in_task(thread));
            read.map_err(|c| self.clock.race(&c))?;
        }
        Ok(words)
    }

    /// The words that an access writes.
    pub(super) fn write(
        &mut self,
        p: Pointer,
        index: i64,
        (lanes, elem_bytes): (usize, u64),
        thread: usize,
    ) -> Result<&mut [u32], Misdeed> {
        let range = self.writable(p, index, (lanes, elem_bytes))?;
        if let Some(Some(shadow)) = self.shadows.get_mut(p.buffer) {
            let written = shadow.write(range.clone(), self.clock.in_launch(thread));
            written.map_err(|c| self.clock.race(&c))?;
        } else if let Some(shadow) = own(&mut self.own_shadows, p, self.slots.len()) {
            let written = shadow.write(range.clone(), self.clock.in_task(thread));
            written.map_err(|c| self.clock.race(&c))?;
        }
        Ok(self.buffer_mut(p.buffer)?.write(range))
    }

    /// Adds to a word and gives what was there.
    pub(super) fn atomic_add(&mut self, p: Pointer, index: i64, x: u32, thread: usize) -> Result<u32, Misdeed> {
        let range = self.writable(p, index, (1, 4))?;
        if let Some(Some(shadow)) = self.shadows.get_mut(p.buffer) {
            let added = shadow.add(range.start, self.clock.in_launch(thread));
            added.map_err(|c| self.clock.race(&c))?;
        }
        let buffer = self.buffer_mut(p.buffer)?;
        let before = buffer.read(range.clone())?[0];
        buffer.write(range)[0] = before.wrapping_add(x);
        Ok(before)
    }

    /// A thread copies four words: from now on nobody may touch where they go, and they are there when [`Self::wait_for_copies`] says so.
    pub(super) fn copy(
        &mut self,
        to: (Pointer, i64),
        (from, from_at): (Pointer, i64),
        thread: usize,
    ) -> Result<(), Misdeed> {
        let read = self.read(from, from_at, (4, 4), thread)?;
        let words = std::array::from_fn(|i| read[i]);
        self.write(to.0, to.1, (4, 4), thread)?.fill(UNDER_WAY);
        self.open.push(Copy { to, words, thread });
        Ok(())
    }

    /// Closes the group of copies that is open.
    pub(super) fn commit_copies(&mut self) {
        let group = std::mem::take(&mut self.open);
        self.groups.push_back(group);
    }

    /// All but the youngest `left` groups of copies arrive.
    pub(super) fn wait_for_copies(&mut self, left: usize) -> Result<(), Misdeed> {
        while self.groups.len() > left {
            for copy in self.groups.pop_front().unwrap_or_default() {
                self.write(copy.to.0, copy.to.1, (4, 4), copy.thread)?.copy_from_slice(&copy.words);
            }
        }
        Ok(())
    }

    /// The words of `tokens` lines of which sixteen bytes each are exchanged by the number of their line, from word `index` on: eight for each of `steps` steps.
    /// `thread` reads them.
    pub(super) fn swizzled(
        &mut self,
        p: Pointer,
        index: i64,
        (tokens, steps): (usize, usize),
        thread: usize,
    ) -> Result<Vec<Vec<u32>>, Misdeed> {
        let at = address(p.at, index, 4);
        let (align, line) = (Kernel::SWIZZLED_ALIGN as i64, 128);
        let own = p.buffer.checked_sub(self.slots.len() + 1).and_then(|piece| self.own.get(piece));
        let fits = own.is_some_and(|b| b.len_bytes() >= Kernel::SWIZZLED_BYTES);
        if !fits || at % 32 != 0 || at % align + 32 * steps as i64 > line {
            return Err(Misdeed::Misaligned { at, bytes: Kernel::SWIZZLED_ALIGN });
        }
        let (base, piece) = (at / align * align, at % align / 16);
        let mut lines = Vec::with_capacity(tokens);
        for n in 0..tokens as i64 {
            let mut words = Vec::with_capacity(8 * steps);
            for piece in piece..piece + 2 * steps as i64 {
                let at = base + n * line + (piece ^ (n % 8)) * 16;
                words.extend_from_slice(self.read(Pointer { at, ..p }, 0, (4, 4), thread)?);
            }
            lines.push(words);
        }
        Ok(lines)
    }

    /// Looks whether bytes that are asked for are there.
    pub(super) fn prefetch(&self, p: Pointer, at: i64, bytes: i64) -> Result<(), Misdeed> {
        let (at, len) = (p.at.saturating_add(at), self.slots[p.buffer].get().len_bytes());
        if let Some(&at) = [at, bytes].iter().find(|n| *n % MOST_ALIGNED as i64 != 0) {
            return Err(Misdeed::Misaligned { at, bytes: MOST_ALIGNED });
        }
        let inside = at >= 0 && bytes >= 0 && at.saturating_add(bytes) as u64 <= len;
        if inside { Ok(()) } else { Err(Misdeed::OutOfBounds { at, bytes: bytes.max(0) as u64, len }) }
    }

    fn writable(&mut self, p: Pointer, index: i64, (lanes, elem_bytes): (usize, u64)) -> Result<Range<usize>, Misdeed> {
        if !p.writable {
            return Err(Misdeed::ReadOnly);
        }
        if self.must_wait && matches!(self.slots.get(p.buffer), Some(Slot::Own { .. })) {
            return Err(Misdeed::BeforeWait);
        }
        let at = address(p.at, index, elem_bytes);
        self.check(p, at, lanes as u64 * elem_bytes)?;
        self.buffer_mut(p.buffer)?.range(at, lanes, elem_bytes)
    }

    /// What holds for every access in a block of threads.
    fn check(&self, p: Pointer, at: i64, bytes: u64) -> Result<(), Misdeed> {
        if !self.is_block {
            return Ok(());
        }
        let aligned = bytes.min(MOST_ALIGNED);
        if at % aligned as i64 != 0 {
            return Err(Misdeed::Misaligned { at, bytes: aligned });
        }
        if self.must_wait && p.buffer == self.slots.len() { Err(Misdeed::BeforeWait) } else { Ok(()) }
    }

    fn buffer_mut(&mut self, buffer: usize) -> Result<&mut Buffer, Misdeed> {
        let slots = self.slots.len();
        match self.slots.get_mut(buffer) {
            Some(slot) => slot.get_mut(),
            None if buffer == slots => Ok(&mut self.partials),
            None => Ok(&mut self.own[buffer - slots - 1]),
        }
    }
}

fn own(shadows: &mut [Shadow], p: Pointer, slots: usize) -> Option<&mut Shadow> {
    shadows.get_mut(p.buffer.checked_sub(slots + 1)?)
}

/// Where an element lies; what does not fit is outside every buffer.
fn address(at: i64, index: i64, elem_bytes: u64) -> i64 {
    index.saturating_mul(elem_bytes as i64).saturating_add(at)
}
