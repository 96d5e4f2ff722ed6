//! Codes of a warp on their way through shared memory.

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};

use super::super::Place;
use super::super::fragments::{Fragments, Tile};
use super::super::tile::{Block, Product};
use super::{STAGE_TURNS, WARPS, Width};

/// The rows of weights that a warp multiplies.
#[derive(Clone, Copy)]
pub enum Own {
    /// A tile.
    Tile(Tile),
    /// Eight rows of one tile, then the same eight of another: two neighbouring warps share the tiles. So a thread has the sums of both, row by row.
    Both([Tile; 2]),
}

/// A ring of stages in shared memory: codes, and lines of tokens unless they are there for good.
#[derive(Clone, Copy)]
pub(super) struct Ring {
    pub(super) width: Width,
    pub(super) codes: Val,
    pub(super) lines: Val,
    /// Whether the lines are there for good, of all turns.
    pub(super) resident: bool,
    pub(super) stages: u64,
}

impl Ring {
    /// Where the lines at place `i` of a slot begin, which are those of turn `turn`.
    pub(super) fn lines_at(&self, k: &mut KernelBuilder, (slot, i): (Val, u64), turn: Val) -> Val {
        if self.resident {
            return k.mul_const(turn, self.width.turn_words());
        }
        let at = k.mul_const(slot, STAGE_TURNS);
        let at = k.add_const(at, i);
        k.mul_const(at, self.width.turn_words())
    }
}

/// Bytes of the codes of a stage.
pub(super) fn code_bytes(m: &Fragments) -> u64 {
    STAGE_TURNS * WARPS * m.planes.turn_bytes()
}

/// Stages that find room in `bytes` bytes, of `stage` bytes each; more than a few do not help.
pub(super) const fn stages_in(bytes: u64, stage: u64) -> u64 {
    let fit = bytes / stage;
    if fit < MOST_STAGES { fit } else { MOST_STAGES }
}

/// Most stages of a ring, and the fewest with which anything is asked for ahead.
const MOST_STAGES: u64 = 4;
/// See [`MOST_STAGES`].
pub(super) const LEAST_STAGES: u64 = 3;

/// Codes of a warp on their way through a ring.
pub(super) struct Codes<'a> {
    pub(super) fragments: &'a Fragments,
    pub(super) ring: Ring,
    pub(super) place: Place,
}

impl Codes<'_> {
    fn turn_words(&self) -> u64 {
        self.fragments.planes.turn_bytes() / 4
    }

    /// Where the codes of a warp in a slot begin.
    fn slot_at(&self, k: &mut KernelBuilder, slot: Val, warp: Val) -> Val {
        let at = k.mul_const(slot, WARPS);
        let at = k.add(at, warp);
        k.mul_const(at, STAGE_TURNS * self.turn_words())
    }

    /// Whether the warp is the second of the two that share tiles.
    fn is_second(&self, k: &mut KernelBuilder) -> Val {
        let (odd, one) = (k.rem_const(self.place.warp, 2), k.const_i64(1));
        k.cmp(Pred::Eq, odd, one)
    }

    /// Copies turn `turn` of a tile to place `i` of a slot: of two tiles each of the warps one.
    pub(super) fn copy(&self, k: &mut KernelBuilder, own: Own, turn: Val, (slot, i): (Val, u64)) {
        let codes = match own {
            Own::Tile(tile) => tile.codes,
            Own::Both([first, second]) => {
                let is_second = self.is_second(k);
                k.select(is_second, second.codes, first.codes)
            }
        };
        let lane = k.mul_const(self.place.lane, 4);
        let (from, to) = (k.mul_const(turn, self.turn_words()), self.slot_at(k, slot, self.place.warp));
        let (from, to) = (k.add(from, lane), k.add(to, lane));
        for load in 0..self.fragments.loads() {
            let (from, to) = (k.add_const(from, load * 128), k.add_const(to, i * self.turn_words() + load * 128));
            k.copy_async((self.ring.codes, to), (codes, from));
        }
    }

    /// The codes at place `i` of a slot: as [`Fragments::load`] gives them of a tile.
    pub(super) fn load(&self, k: &mut KernelBuilder, own: Own, (slot, i): (Val, u64)) -> Vec<Val> {
        let lane = k.mul_const(self.place.lane, 4);
        let Own::Both(_) = own else {
            let at = self.slot_at(k, slot, self.place.warp);
            let at = k.add(at, lane);
            let load = |load| {
                let at = k.add_const(at, i * self.turn_words() + load * 128);
                k.load(DType::I32, 4, self.ring.codes, at)
            };
            return (0..self.fragments.loads()).map(load).collect();
        };
        let second = k.rem_const(self.place.warp, 2);
        let first = k.sub(self.place.warp, second);
        let other = k.add_const(first, 1);
        // of the 16 bytes of a thread the first half is of row `r`, the other of row `r + 8`
        let half = k.mul_const(second, 2);
        let half = k.add(lane, half);
        let [first, other] = [first, other].map(|warp| {
            let at = self.slot_at(k, slot, warp);
            k.add(at, half)
        });
        let load = |load| {
            let halves = [first, other].map(|at| {
                let at = k.add_const(at, i * self.turn_words() + load * 128);
                k.load(DType::I32, 2, self.ring.codes, at)
            });
            let words = [0, 1, 2, 3].map(|i: usize| k.extract(halves[i / 2], i as u32 % 2));
            k.quad(words)
        };
        (0..self.fragments.loads()).map(load).collect()
    }

    /// What the codes of a turn stand for.
    pub(super) fn blocks(
        &self,
        k: &mut KernelBuilder,
        product: &Product<'_>,
        own: Own,
        turn: Val,
        codes: &[Val],
    ) -> Vec<Block> {
        let row = product.token();
        let lower = |k: &mut KernelBuilder| k.add_const(row, 8);
        match own {
            Own::Tile(tile) => {
                let lower = lower(k);
                product.blocks_of_rows(k, turn, codes, [(tile, row), (tile, lower)])
            }
            Own::Both(tiles) => {
                let (is_second, lower) = (self.is_second(k), lower(k));
                let row = k.select(is_second, lower, row);
                product.blocks_of_rows(k, turn, codes, tiles.map(|tile| (tile, row)))
            }
        }
    }
}
