//! Where a sequence's tokens may be cut into the pieces that steps are fed.
//!
//! A run of at most [`DECODE_TOKENS`] tokens is computed in another arithmetic than a longer one, and longer ones may be computed in chunks between multiples of
//! [`CHUNK_TOKENS`] positions. So tokens that could be one long run are cut into long runs only, and these at such multiples: what a prompt becomes depends neither
//! on the size of steps nor on what else they hold. Steps with less room than [`CHUNKED_TOKENS`] cannot always do the second, and don't.

use nextc_abi::{CHUNK_TOKENS, DECODE_TOKENS};

/// Tokens of which more can always be cut between two chunks, with a long run on both sides: at the next multiple, or else at the one after.
pub const CHUNKED_TOKENS: usize = CHUNK_TOKENS + 2 * DECODE_TOKENS;

/// The most tokens that cannot be two long runs.
const UNCUT_TOKENS: usize = 2 * DECODE_TOKENS + 1;

/// The tokens that a sequence is to be fed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unread {
    /// The position of the first.
    pub position: usize,
    /// How many.
    pub tokens: usize,
}

/// What steps have room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Steps {
    tokens: usize,
}

impl Steps {
    /// Steps of at most `tokens` tokens.
    pub const fn of(tokens: usize) -> Self {
        Self { tokens }
    }

    /// How many tokens of a sequence to feed in a step with room for `room`. 0 if that is too few to begin with, though not if small steps never have more:
    /// then the room is `all` there is.
    pub fn cut(self, unread: Unread, room: usize, all: bool) -> usize {
        let Unread { position, tokens } = unread;
        if tokens <= room || tokens <= DECODE_TOKENS {
            return tokens.min(room);
        }
        let most = room.min(tokens - (DECODE_TOKENS + 1));
        if self.tokens >= CHUNKED_TOKENS {
            let piece = most.saturating_sub((position + most) % CHUNK_TOKENS);
            return if piece > DECODE_TOKENS { piece } else { 0 };
        }
        match most {
            0..=DECODE_TOKENS if all => room,
            0..=DECODE_TOKENS => 0,
            piece => piece,
        }
    }

    /// How many tokens of a sequence are kept for the last step, if there are as many: what cannot be cut, or one.
    pub const fn kept(self) -> usize {
        match self.tokens {
            CHUNKED_TOKENS.. => CHUNKED_TOKENS,
            UNCUT_TOKENS.. => UNCUT_TOKENS,
            _ => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pieces of `tokens` tokens from a position on, in steps of `room`.
    fn pieces_from(position: usize, tokens: usize, room: usize) -> Vec<usize> {
        let mut unread = Unread { position, tokens };
        std::iter::from_fn(|| {
            let piece = Steps::of(room).cut(unread, room, true);
            unread = Unread { position: unread.position + piece, tokens: unread.tokens - piece };
            (piece > 0).then_some(piece)
        })
        .collect()
    }

    fn pieces(tokens: usize, room: usize) -> Vec<usize> {
        pieces_from(0, tokens, room)
    }

    #[track_caller]
    fn check_long(pieces: &[usize], tokens: usize, room: usize) {
        assert_eq!(pieces.iter().sum::<usize>(), tokens, "{tokens} in {room}: {pieces:?}");
        assert!(pieces.iter().all(|&n| n > DECODE_TOKENS && n <= room), "{tokens} in {room}: {pieces:?}");
    }

    #[test]
    fn long_runs_are_cut_into_long_runs() {
        assert_eq!(pieces(40, 100), [40]);
        assert_eq!(pieces(40, 16), [16, 15, 9]);
        assert_eq!(pieces(40, 31), [31, 9]);
        assert_eq!(pieces(5, 2), [2, 2, 1]);
        for (tokens, room) in (9..80).flat_map(|tokens| (18..40).map(move |room| (tokens, room))) {
            check_long(&pieces(tokens, room), tokens, room);
        }
    }

    #[test]
    fn steps_with_room_are_cut_between_chunks() {
        assert_eq!(pieces(300, 512), [300]);
        assert_eq!(pieces(300, 100), [64, 64, 64, 64, 44]);
        assert_eq!(pieces(300, 200), [192, 108]);
        // 8 tokens alone would be decoded
        assert_eq!(pieces(200, 80), [64, 64, 72]);
        assert_eq!(pieces_from(60, 100, 80), [68, 32]);
        for (position, room) in
            (0..=CHUNK_TOKENS).flat_map(|position| [80, 81, 100, 128, 200].map(|room| (position, room)))
        {
            for tokens in 9..400 {
                let pieces = pieces_from(position, tokens, room);
                check_long(&pieces, tokens, room);
                let mut begins = pieces.iter().scan(position, |at, n| Some(std::mem::replace(at, *at + n))).skip(1);
                assert!(begins.all(|at| at % CHUNK_TOKENS == 0), "{tokens} from {position} in {room}: {pieces:?}");
            }
        }
    }

    #[test]
    fn small_steps_go_on_and_small_room_is_left() {
        let cut = |tokens, room, steps| Steps::of(steps).cut(Unread { position: 0, tokens }, room, false);
        assert_eq!(pieces(12, 4), [4, 4, 4]);
        assert_eq!(cut(40, 8, 40), 0);
        assert_eq!(cut(6, 3, 40), 3);
        assert_eq!(cut(10, 0, 40), 0);
        assert_eq!(cut(12, 11, 40), 0);
        assert_eq!(cut(100, 70, 512), 64);
        assert_eq!(cut(100, 60, 512), 0);
    }

    #[test]
    fn a_longer_run_than_what_is_kept_can_always_be_cut() {
        assert_eq!([16, 17, 79, 80].map(|steps| Steps::of(steps).kept()), [1, 17, 17, 80]);
        for steps in [17, 30, 80, 81, 128] {
            let steps = Steps::of(steps);
            for (position, tokens) in (0..CHUNK_TOKENS).flat_map(|p| (steps.kept() + 1..200).map(move |n| (p, n))) {
                let piece = steps.cut(Unread { position, tokens }, steps.tokens.min(tokens - 1), false);
                assert!(piece > DECODE_TOKENS, "{tokens} from {position} in {steps:?}");
            }
        }
    }
}
