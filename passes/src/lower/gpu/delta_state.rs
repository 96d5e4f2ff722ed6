//! A delta state in the registers of the threads of [`super::delta_rule`].
//!
//! A thread has some rows of a few columns that follow one another, the other rows of these columns other warps: a warp reads whole lines.

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::shape::pad;

use super::super::matmul::row_ptr;
use super::delta_rule::{Block, Turn};
use super::{lanes_of, tree_sum};

/// The columns of a thread: they follow one another in one value head.
pub struct Columns {
    /// The number of the first among those of the block; and that of the last columns there are where these are beyond.
    pub place: Val,
    /// See `place`.
    pub lane: Val,
    /// The same in its value head, and which of the turn's heads this is.
    pub column: Val,
    /// See `column`.
    pub head: Val,
    /// Whether there are such columns.
    pub live: Val,
    /// Pointer to the state of the head.
    pub state: Val,
}

impl Block<'_> {
    /// Elements of S that a thread holds.
    pub(super) fn held(&self) -> usize {
        (self.tile.rows * self.tile.own) as usize
    }

    /// Index of row `i` of this thread in its first column: rows lie in chunks, chunk by chunk those of all parts.
    pub(super) fn state_index(&self, k: &mut KernelBuilder, turn: &Turn, i: u64) -> Val {
        let (width, chunk) = (pad(self.mixer.v.width), self.chunk() as u64);
        let row = i / chunk * chunk * self.tile.parts + i % chunk;
        let first = k.mul_const(turn.part, chunk * width);
        let first = k.add(first, turn.own.column);
        k.add_const(first, row * width)
    }

    /// The numbers of this thread's columns in a row.
    pub(super) fn load_own(&self, k: &mut KernelBuilder, from: Val, at: Val) -> Vec<Val> {
        let row = k.load(DType::F32, self.tile.own as u32, from, at);
        lanes_of(k, row)
    }

    /// The state: row by row, of each this thread's columns; zeros where the sequence has no past.
    pub fn load_state(&self, k: &mut KernelBuilder, turn: &Turn, remembers: Val) -> Vec<Val> {
        let zero = k.const_f32(0.0);
        let loads = k.and(remembers, turn.own.live);
        let load = |k: &mut KernelBuilder| {
            let row = |i| {
                let at = self.state_index(k, turn, i);
                self.load_own(k, turn.own.state, at)
            };
            (0..self.tile.rows).flat_map(row).collect()
        };
        k.if_else(loads, load, |_| vec![zero; self.held()])
    }

    /// Stores what [`Self::load_state`] gives.
    pub fn store_state(&self, k: &mut KernelBuilder, turn: &Turn, state: &[Val]) {
        k.if_then(turn.own.live, |k| {
            for (i, row) in (0..).zip(state.chunks(self.tile.own as usize)) {
                let at = self.state_index(k, turn, i);
                store_lanes(k, turn.own.state, at, row);
            }
        });
    }

    /// The state after `accepted` kept tokens; in memory too, where it is not written at the end. `fresh` says whether the sequence begins.
    pub fn replay(&self, k: &mut KernelBuilder, turn: &Turn, state: &[Val], (accepted, fresh): (Val, Val)) -> Vec<Val> {
        let (zero, mixer) = (k.const_i64(0), self.mixer);
        let state = k.for_carry((zero, accepted, 1), state, |k, i, state| {
            let [key, d, alpha] = mixer.update(k, turn.own.state, i);
            let (d, alpha) = (self.load_own(k, d, turn.own.column), k.load_f32(alpha, zero));
            self.apply(k, turn, state, key, (&d, alpha))
        });
        let kept = k.cmp(Pred::Gt, accepted, zero);
        let changed = k.or(kept, fresh);
        let stays = k.and(changed, self.run.tentative);
        k.if_then(stays, |k| self.store_state(k, turn, &state));
        state
    }

    /// `S ← fma(k, d, α S)`: the one place where a state changes. `key` points to k; d is that of each of the thread's columns.
    pub(super) fn apply(
        &self,
        k: &mut KernelBuilder,
        turn: &Turn,
        state: &[Val],
        key: Val,
        (d, alpha): (&[Val], Val),
    ) -> Vec<Val> {
        let mut next = Vec::with_capacity(state.len());
        for (i, chunk) in state.chunks(self.chunk() * d.len()).enumerate() {
            let keys = self.load_rows(k, turn, key, i);
            for (&ki, row) in keys.iter().zip(chunk.chunks(d.len())) {
                for (&s, &dj) in row.iter().zip(d) {
                    let decayed = k.fmul(alpha, s);
                    next.push(k.fma(ki, dj, decayed));
                }
            }
        }
        next
    }

    /// Rows that are loaded at once.
    pub(super) fn chunk(&self) -> usize {
        if self.tile.rows.is_multiple_of(4) { 4 } else { 1 }
    }

    /// Chunk `i` of this thread's rows of a vector over rows.
    pub(super) fn load_rows(&self, k: &mut KernelBuilder, turn: &Turn, from: Val, i: usize) -> Vec<Val> {
        let lanes = self.chunk() as u64;
        let first = k.mul_const(turn.part, lanes);
        let at = k.add_const(first, i as u64 * lanes * self.tile.parts);
        let rows = k.load(DType::F32, lanes as u32, from, at);
        lanes_of(k, rows)
    }

    /// Sums over the parts of this thread's columns, as a tree: see [`tree_sum`].
    pub(super) fn sum_parts(&self, k: &mut KernelBuilder, turn: &Turn, sums: [Vec<Val>; 2]) -> [Vec<Val>; 2] {
        let tile = &self.tile;
        let columns = tile.padded_columns();
        let mine = row_ptr(k, self.smem.parts, turn.part, 2 * columns);
        for (which, sums) in (0..).zip(&sums) {
            let at = k.add_const(turn.own.place, which * columns);
            store_lanes(k, mine, at, sums);
        }
        k.barrier();
        let items = k.index(2 * columns);
        k.for_each((self.place.thread, items, tile.threads()), |k, item| {
            let load = |part| {
                let at = k.add_const(item, part * 2 * columns);
                k.load_f32(self.smem.parts, at)
            };
            let parts = (0..tile.parts).map(load).collect();
            let sum = tree_sum(k, parts);
            k.store(self.smem.sums, item, sum);
        });
        k.barrier();
        [0, 1].map(|which| {
            let at = k.add_const(turn.own.place, which * columns);
            self.load_own(k, self.smem.sums, at)
        })
    }
}

/// Stores neighbours: four at once.
pub fn store_lanes(k: &mut KernelBuilder, to: Val, at: Val, x: &[Val]) {
    if let &[a, b, c, d] = x {
        let x = k.quad([a, b, c, d]);
        return k.store(to, at, x);
    }
    for (i, &x) in (0..).zip(x) {
        let at = k.add_const(at, i);
        k.store(to, at, x);
    }
}
