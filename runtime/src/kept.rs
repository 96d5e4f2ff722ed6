//! What stays on the device from program to program beside the states of kernels, in a state that none of them reads: the drafts of a
//! round, and hidden rows that the draft has not been fed.
//!
//! A sequence's hidden rows lie in a ring of its slot, by position, so who knows the positions knows where they are.

use nextc_abi::Metadata;

use crate::device::Strided;

/// Hidden rows that a sequence keeps at most.
pub(crate) const KEPT_ROWS: u64 = 320;

/// Bytes of a token.
const TOKEN_BYTES: u64 = size_of::<i32>() as u64;

/// Where it lies in the state: drafts of all sequences of a step, then the rings of the slots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kept {
    /// Drafts of one sequence at most.
    drafts: u64,
    /// Sequences of a step at most.
    sequences: u64,
    /// Bytes of a hidden row, padding included.
    pub row_bytes: u64,
}

impl Kept {
    /// That of a model for steps of `sequences` sequences; nothing where it has no draft.
    pub fn new(metadata: &Metadata, sequences: u64) -> Self {
        match metadata.model.mtp {
            true => Self {
                drafts: metadata.tentative_tokens,
                sequences,
                row_bytes: metadata.model.hidden_size.next_multiple_of(16) * size_of::<f32>() as u64,
            },
            false => Self::default(),
        }
    }

    /// Bytes with the rings of so many slots.
    pub fn bytes(&self, slots: u64) -> u64 {
        self.rings_at().saturating_add(self.ring_bytes().saturating_mul(slots))
    }

    fn rings_at(&self) -> u64 {
        nextc_abi::align_up(self.drafts * self.sequences * TOKEN_BYTES, 64)
    }

    fn ring_bytes(&self) -> u64 {
        KEPT_ROWS * self.row_bytes
    }

    /// Draft `number` of each sequence of a step; a sequence's own follow one another.
    pub fn draft(&self, number: u64) -> Strided {
        Strided { at: number * TOKEN_BYTES, stride: self.drafts * TOKEN_BYTES }
    }

    /// The hidden rows of `rows` positions from `position` on: runs of them, each with where it begins and how many it has.
    pub fn rows(&self, slot: u32, position: u64, rows: u64) -> impl Iterator<Item = (u64, u64)> + use<> {
        let (first, row_bytes) = (position % KEPT_ROWS, self.row_bytes);
        let ring = self.rings_at() + self.ring_bytes() * u64::from(slot);
        let before_end = rows.min(KEPT_ROWS - first);
        let runs = [(ring + first * row_bytes, before_end), (ring, rows - before_end)];
        runs.into_iter().filter(|&(_, rows)| rows > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_lie_in_the_ring_of_their_slot() {
        let kept = Kept { drafts: 8, sequences: 3, row_bytes: 64 };
        let ring = |slot: u64| 128 + slot * KEPT_ROWS * 64;
        let check = |slot, position, rows, expected: &[(u64, u64)]| {
            assert_eq!(kept.rows(slot, position, rows).collect::<Vec<_>>(), expected);
        };
        check(0, 0, 3, &[(128, 3)]);
        check(2, KEPT_ROWS + 5, 1, &[(ring(2) + 5 * 64, 1)]);
        check(1, KEPT_ROWS - 2, 5, &[(ring(1) + (KEPT_ROWS - 2) * 64, 2), (ring(1), 3)]);
        check(1, 7, 0, &[]);
        assert_eq!(kept.bytes(3), ring(3));
        assert_eq!(kept.draft(2), Strided { at: 8, stride: 32 });
    }

    #[test]
    fn a_model_without_drafts_keeps_nothing() {
        let mut metadata = crate::sample_metadata();
        assert_eq!(Kept::new(&metadata, 4).bytes(4), 0);
        metadata.model.mtp = true;
        assert_eq!(Kept::new(&metadata, 4).bytes(4), 128 + 4 * KEPT_ROWS * 64);
    }
}
