//! Which threads of a block run, region by region: structured control needs a stack of masks and no more.

use super::Misdeed;
use crate::kernel::Kernel;

/// The masks of the open regions, the innermost last.
#[derive(Debug)]
pub(super) struct Masks {
    threads: usize,
    /// `threads` for each depth.
    bits: Vec<bool>,
    /// How many are set, for each depth.
    live: Vec<usize>,
    depth: usize,
}

impl Masks {
    /// All threads, with room for regions in regions `depth` deep.
    pub(super) fn new(threads: usize, depth: usize) -> Self {
        Self { threads, bits: vec![true; threads * (depth + 1)], live: vec![threads; depth + 1], depth: 0 }
    }

    /// True if every thread of the block is here.
    pub(super) fn all(&self) -> bool {
        self.live[self.depth] == self.threads
    }

    /// Threads of the block.
    pub(super) fn threads(&self) -> usize {
        self.threads
    }

    /// True if a thread is here.
    pub(super) fn has(&self, thread: usize) -> bool {
        self.bits[self.depth * self.threads + thread]
    }

    /// The threads that are here.
    pub(super) fn active(&self) -> impl Iterator<Item = usize> {
        let bits = &self.bits[self.depth * self.threads..][..self.threads];
        bits.iter().enumerate().filter_map(|(t, &on)| on.then_some(t))
    }

    /// Opens a region for all that are here.
    pub(super) fn open(&mut self) {
        self.open_for(|_| true);
    }

    /// Opens a region for the chosen ones of those that are here; false if there are none.
    pub(super) fn open_for(&mut self, chosen: impl Fn(usize) -> bool) -> bool {
        self.depth += 1;
        self.choose(chosen)
    }

    /// Closes the innermost region.
    pub(super) fn close(&mut self) {
        self.depth -= 1;
    }

    /// Of those that the region around the innermost one has, the innermost goes on with the chosen; false if there are none.
    pub(super) fn choose(&mut self, chosen: impl Fn(usize) -> bool) -> bool {
        let (outer, inner) = self.bits[(self.depth - 1) * self.threads..].split_at_mut(self.threads);
        let mut live = 0;
        for (t, (on, &outer)) in inner[..self.threads].iter_mut().zip(outer.iter()).enumerate() {
            *on = outer && chosen(t);
            live += usize::from(*on);
        }
        self.live[self.depth] = live;
        live > 0
    }

    /// The innermost region goes on with those that stay; false if there are none.
    pub(super) fn keep(&mut self, mut stays: impl FnMut(usize) -> bool) -> bool {
        let mut live = 0;
        for (t, on) in self.bits[self.depth * self.threads..][..self.threads].iter_mut().enumerate() {
            *on = *on && stays(t);
            live += usize::from(*on);
        }
        self.live[self.depth] = live;
        live > 0
    }

    /// What the whole block does together.
    pub(super) fn whole_block(&self) -> Result<(), Misdeed> {
        let here = self.live[self.depth];
        if self.all() { Ok(()) } else { Err(Misdeed::Diverged { group: "block", here, of: self.threads }) }
    }

    /// What warps do together: the first thread of each warp that is here, whole.
    pub(super) fn whole_warps(&self) -> Result<Vec<usize>, Misdeed> {
        self.whole("warp", Kernel::WARP as usize)
    }

    /// The first threads of the groups of four warps that are here; each is here as a whole.
    pub(super) fn whole_warp_groups(&self) -> Result<Vec<usize>, Misdeed> {
        self.whole("group of four warps", 4 * Kernel::WARP as usize)
    }

    fn whole(&self, group: &'static str, warp: usize) -> Result<Vec<usize>, Misdeed> {
        let bits = &self.bits[self.depth * self.threads..][..self.threads];
        let mut first = Vec::with_capacity(self.threads / warp);
        for (i, bits) in bits.chunks(warp).enumerate() {
            match bits.iter().filter(|&&on| on).count() {
                0 => {}
                here if here == warp => first.push(i * warp),
                here => return Err(Misdeed::Diverged { group, here, of: warp }),
            }
        }
        Ok(first)
    }
}
