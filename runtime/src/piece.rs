//! Where a sequence's tokens may be cut into the pieces that steps are fed.
//!
//! A run of at most [`DECODE_TOKENS`] tokens is computed in another arithmetic than a longer one. So tokens that could be one long run are cut into long
//! runs only: what a prompt becomes depends neither on the size of steps nor on what else they hold.

use nextc_abi::DECODE_TOKENS;

/// How many of the next `tokens` tokens of a sequence to feed, at most `room`. 0 if that is too few to begin with, though not if the room is `all` that a step
/// ever has.
pub fn cut(tokens: usize, room: usize, all: bool) -> usize {
    if tokens <= room || tokens <= DECODE_TOKENS {
        return tokens.min(room);
    }
    let piece = room.min(tokens - (DECODE_TOKENS + 1));
    match piece {
        0..=DECODE_TOKENS if all => room,
        0..=DECODE_TOKENS => 0,
        piece => piece,
    }
}

/// The most tokens that cannot be two long runs.
const UNCUT_TOKENS: usize = 2 * DECODE_TOKENS + 1;

/// How many tokens of a sequence steps of `step_tokens` keep for the last one, if there are as many: what cannot be cut, or one.
pub const fn kept(step_tokens: usize) -> usize {
    if step_tokens < UNCUT_TOKENS { 1 } else { UNCUT_TOKENS }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pieces of `tokens` tokens in steps of `room`.
    fn pieces(tokens: usize, room: usize) -> Vec<usize> {
        let mut left = tokens;
        std::iter::from_fn(|| {
            let piece = cut(left, room, true);
            left -= piece;
            (piece > 0).then_some(piece)
        })
        .collect()
    }

    #[test]
    fn long_runs_are_cut_into_long_runs() {
        assert_eq!(pieces(40, 100), [40]);
        assert_eq!(pieces(40, 16), [16, 15, 9]);
        assert_eq!(pieces(40, 31), [31, 9]);
        assert_eq!(pieces(5, 2), [2, 2, 1]);
        for (tokens, room) in (9..80).flat_map(|tokens| (18..40).map(move |room| (tokens, room))) {
            let pieces = pieces(tokens, room);
            assert_eq!(pieces.iter().sum::<usize>(), tokens);
            assert!(pieces.iter().all(|&n| n > DECODE_TOKENS && n <= room), "{tokens} in {room}: {pieces:?}");
        }
    }

    #[test]
    fn small_steps_go_on_and_small_room_is_left() {
        assert_eq!(pieces(12, 4), [4, 4, 4]);
        assert_eq!(cut(40, 8, false), 0);
        assert_eq!(cut(6, 3, false), 3);
        assert_eq!(cut(10, 0, false), 0);
        assert_eq!(cut(12, 11, false), 0);
        // a longer run than what is kept can always be cut
        assert_eq!((kept(16), kept(17)), (1, 17));
        assert!((kept(17) + 1..100).all(|tokens| cut(tokens, 17, false) > DECODE_TOKENS));
    }
}
