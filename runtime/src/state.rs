//! What sequences carry from step to step: slots with convolution windows and delta matrices, and pages of KV. This is the
//! bookkeeping; the memory is the device's.
//!
//! Room is reserved for the longest contexts and takes memory by use. Nothing is cleared: kernels take position 0 as a fresh
//! sequence.

use nextc_abi::{Metadata, StateKind};

use crate::error::Error;
use crate::kept::Kept;

/// A sequence that the engine holds state for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SequenceId(pub(crate) u32);

/// Pages or slots, given out lowest first so that used memory stays together.
#[derive(Debug)]
pub struct Allocator {
    free: std::collections::BinaryHeap<std::cmp::Reverse<u32>>,
    fresh: u32,
    count: u32,
}

impl Allocator {
    /// An allocator of `count` numbers from 0.
    pub fn new(count: u32) -> Self {
        Self { free: Default::default(), fresh: 0, count }
    }

    /// Takes a number, if one is free.
    pub fn take(&mut self) -> Option<u32> {
        if let Some(std::cmp::Reverse(n)) = self.free.pop() {
            return Some(n);
        }
        (self.fresh < self.count).then(|| {
            self.fresh += 1;
            self.fresh - 1
        })
    }

    /// How many numbers have ever been taken: all of them lie below.
    pub fn reach(&self) -> u32 {
        self.fresh
    }

    /// Gives a number back that was taken.
    pub fn give_back(&mut self, n: u32) {
        debug_assert!(n < self.fresh, "only numbers that were taken come back");
        self.free.push(std::cmp::Reverse(n));
    }
}

/// One sequence: its length, slot and pages.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub slot: u32,
    pub pages: Vec<u32>,
    pub tokens: u64,
    /// Accepted tokens of the last step, which was tentative: the next step does them first.
    pub replay: u32,
}

/// The states of all sequences.
#[derive(Debug)]
pub struct States {
    pub(crate) kinds: Vec<(StateKind, u64)>,
    /// Behind them one that no kernel reads.
    pub(crate) kept: Kept,
    slots: Allocator,
    pages: Allocator,
    pub(crate) page_tokens: u64,
    max_context: u64,
    max_sequences: usize,
    sequences: Vec<Option<Sequence>>,
}

impl States {
    /// States for `slots` sequences, each as long as the context allows.
    /// # Errors
    /// [`Error::Memory`] if pages could not be numbered.
    pub fn new(metadata: &Metadata, slots: usize) -> Result<Self, Error> {
        let (page_tokens, max_context) = (metadata.page_tokens.max(1), metadata.model.max_context);
        let count = slots as u64;
        // one page more: the last drafts lie past the end of a full context
        let pages = count.saturating_mul(max_context.div_ceil(page_tokens) + 1);
        let too_many = |_| {
            let error = std::io::ErrorKind::OutOfMemory.into();
            Error::Memory { what: "states", bytes: u64::MAX, error }
        };
        let pages = u32::try_from(pages).map_err(too_many)?;
        Ok(Self {
            kinds: metadata.states.iter().map(|s| (s.kind, s.bytes)).collect(),
            kept: Kept::new(metadata, count),
            slots: Allocator::new(slots as u32),
            pages: Allocator::new(pages),
            page_tokens,
            max_context,
            max_sequences: slots,
            sequences: Vec::new(),
        })
    }

    /// Bytes of each state if all slots and pages are used.
    pub(crate) fn reserved_bytes(&self) -> impl Iterator<Item = u64> + '_ {
        self.bytes_of(self.pages.count, self.slots.count)
    }

    /// Bytes of each state of one page, or one slot.
    pub(crate) fn unit_bytes(&self) -> impl Iterator<Item = u64> + '_ {
        self.bytes_of(1, 1)
    }

    /// Pages and slots that were ever used: all lie below these.
    pub(crate) fn reach(&self) -> (u32, u32) {
        (self.pages.reach(), self.slots.reach())
    }

    /// Bytes of each state from its beginning to the last slot or page that was ever used.
    pub(crate) fn used_bytes(&self) -> impl Iterator<Item = u64> + '_ {
        self.bytes_of(self.pages.reach(), self.slots.reach())
    }

    fn bytes_of(&self, pages: u32, slots: u32) -> impl Iterator<Item = u64> + '_ {
        let of_kernels = self.kinds.iter().map(move |&(kind, bytes)| match kind {
            StateKind::Kv => bytes.saturating_mul(self.page_tokens).saturating_mul(u64::from(pages)),
            StateKind::Conv | StateKind::Delta => bytes.saturating_mul(u64::from(slots)),
        });
        of_kernels.chain([self.kept.bytes(u64::from(slots))])
    }

    /// The number of the state that no kernel reads.
    pub(crate) fn kept_state(&self) -> usize {
        self.kinds.len()
    }

    /// Begins a sequence.
    /// # Errors
    /// [`Error::Slots`] if there are as many as were reserved.
    pub fn begin(&mut self) -> Result<SequenceId, Error> {
        let slot = self.slots.take().ok_or(Error::Slots { slots: self.max_sequences })?;
        let sequence = Some(Sequence { slot, pages: Vec::new(), tokens: 0, replay: 0 });
        let free = self.sequences.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.sequences.push(None);
            self.sequences.len() - 1
        });
        self.sequences[index] = sequence;
        Ok(SequenceId(index as u32))
    }

    /// Ends a sequence; its slot and pages go to others.
    pub fn end(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.get_mut(id.0 as usize).and_then(Option::take) {
            self.slots.give_back(sequence.slot);
            sequence.pages.into_iter().for_each(|p| self.pages.give_back(p));
        }
    }

    /// The sequence.
    /// # Errors
    /// [`Error::Step`] if it has ended.
    pub(crate) fn get(&self, id: SequenceId) -> Result<&Sequence, Error> {
        self.sequences.get(id.0 as usize).and_then(Option::as_ref).ok_or(Error::Step("the sequence has ended"))
    }

    fn get_mut(&mut self, id: SequenceId) -> Result<&mut Sequence, Error> {
        self.sequences.get_mut(id.0 as usize).and_then(Option::as_mut).ok_or(Error::Step("the sequence has ended"))
    }

    /// The longest context.
    pub fn max_context(&self) -> u64 {
        self.max_context
    }

    /// Makes sure that a sequence has pages for `tokens` tokens.
    /// # Errors
    /// [`Error::Context`] (of sequence number `number`) if that is more than the context and a page hold.
    pub(crate) fn grow(&mut self, id: SequenceId, number: usize, tokens: u64) -> Result<(), Error> {
        let (page_tokens, max_context) = (self.page_tokens, self.max_context);
        let needed = tokens.div_ceil(page_tokens);
        let have = self.get(id)?.tokens;
        let overflow = Error::Context { sequence: number, have, adding: tokens.saturating_sub(have), max_context };
        if needed > max_context.div_ceil(page_tokens) + 1 {
            return Err(overflow);
        }
        while (self.get(id)?.pages.len() as u64) < needed {
            let Some(page) = self.pages.take() else { return Err(overflow) };
            self.get_mut(id)?.pages.push(page);
        }
        Ok(())
    }

    /// Says that a sequence has `tokens` tokens now, of which `replay` are kept from a tentative step.
    pub(crate) fn set_tokens(&mut self, id: SequenceId, tokens: u64, replay: u32) -> Result<(), Error> {
        let sequence = self.get_mut(id)?;
        (sequence.tokens, sequence.replay) = (tokens, replay);
        Ok(())
    }

    /// Tokens of a sequence.
    /// # Errors
    /// [`Error::Step`] if it has ended.
    pub fn tokens(&self, id: SequenceId) -> Result<u64, Error> {
        Ok(self.get(id)?.tokens)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn metadata() -> Metadata {
        let state =
            |name: &str, kind, bytes| nextc_abi::State { name: name.to_owned(), kind, bytes, rollback_bytes: 0 };
        let mut m = crate::sample_metadata();
        m.states = vec![state("layers.0.kv", StateKind::Kv, 512), state("layers.1.delta", StateKind::Delta, 4096)];
        m.page_tokens = 16;
        m.model.max_context = 100;
        m
    }

    #[test]
    fn pages_grow_with_use_and_come_back() {
        let mut states = States::new(&metadata(), 2).unwrap();
        let (a, b) = (states.begin().unwrap(), states.begin().unwrap());
        assert!(matches!(states.begin(), Err(Error::Slots { slots: 2 })));
        states.grow(a, 0, 17).unwrap();
        states.grow(b, 1, 1).unwrap();
        states.grow(a, 0, 33).unwrap();
        assert_eq!(states.get(a).unwrap().pages, [0, 1, 3]);
        assert_eq!(states.get(b).unwrap().pages, [2]);
        assert_eq!(states.used_bytes().collect::<Vec<_>>(), [512 * 16 * 4, 4096 * 2, 0]);
        assert_eq!(states.reserved_bytes().collect::<Vec<_>>(), [512 * 16 * 16, 4096 * 2, 0]);
        states.end(a);
        assert!(states.get(a).is_err());
        let c = states.begin().unwrap();
        states.grow(c, 0, 1).unwrap();
        assert_eq!(states.get(c).unwrap().pages, [0]);
        assert_eq!(states.get(c).unwrap().slot, 0);
    }

    #[test]
    fn a_context_that_is_too_long_says_by_how_much() {
        let mut states = States::new(&metadata(), 1).unwrap();
        let a = states.begin().unwrap();
        states.set_tokens(a, 90, 0).unwrap();
        let error = states.grow(a, 0, 200).unwrap_err();
        assert_eq!(error.to_string(), "sequence 0: 90 + 110 tokens are 100 more than the context of 100");
    }

    proptest! {
        #[test]
        fn nothing_is_given_out_twice(actions in proptest::collection::vec(any::<bool>(), 0..200)) {
            let mut allocator = Allocator::new(20);
            let mut taken = Vec::new();
            for take in actions {
                if take {
                    match allocator.take() {
                        Some(n) => {
                            prop_assert!(n < 20 && !taken.contains(&n));
                            taken.push(n);
                        }
                        None => prop_assert_eq!(taken.len(), 20),
                    }
                } else if !taken.is_empty() {
                    allocator.give_back(taken.swap_remove(taken.len() / 2));
                }
            }
        }
    }
}
