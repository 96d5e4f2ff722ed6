//! What the tokens of a chunk are to each other: P and L of [`super::chunks`].
//!
//! decays   exp(g_i − g_j), at most 1, of rows i and columns j ≤ i
//! P        Q·Kᵀ ∘ decays for j ≤ i
//! A        β_i K·Kᵀ ∘ decays for j < i
//! L        (I + A)⁻¹ − I by forward substitution, in f32: L_i = −(A_i + Σ_{j<i} A_ij L_j), four rows at once over all rows before them
//!
//! `−A` lies where L comes to lie: row i needs no other row of A. An element of `(I + A)⁻¹` is `−β_i` times a key seen through products of `α (I − β k kᵀ)`, which
//! do not lengthen it, so it is at most 1.

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::shape::LANES;
use nextc_ir::types::CHUNK_TOKENS;

use super::super::bulk::tiles::TOGETHER;
use super::super::matmul::row_ptr;
use super::chunks::{Chunks, put_vectors, some_vectors};

/// Rows that are solved together.
const ROWS: u64 = 4;

impl Chunks<'_> {
    /// P and L of a value head.
    pub(super) fn within(&self, k: &mut KernelBuilder) {
        for block in 0..CHUNK_TOKENS / LANES {
            k.for_range(LANES, 1, |k, i| self.decay_row(k, block, i));
        }
        for block in 0..CHUNK_TOKENS / LANES {
            k.for_range(LANES, ROWS, |k, i| self.solve_rows(k, block, i));
        }
    }

    /// Rows of P and −A: row `i` of a block of 16.
    fn decay_row(&self, k: &mut KernelBuilder, block: u64, i: Val) {
        let row = k.add_const(i, block * LANES);
        let [g, beta] = [self.gates.g, self.gates.beta].map(|p| k.load_f32(p, row));
        let against = k.fneg(beta);
        let [g, against] = [g, against].map(|x| k.splat(x, 16));
        let (zero, nothing) = (k.const_i64(0), k.splat_f32(16, 0.0));
        let (own, numbers) = (k.narrow(i), k.load(DType::I32, 16, self.lanes, zero));
        let own = k.splat(own, 16);
        let (before, seen) = (k.cmp(Pred::Lt, numbers, own), k.cmp(Pred::Le, numbers, own));
        let (mut p, mut a) = (Vec::new(), Vec::new());
        for other in 0..=block {
            let at = k.index(other * LANES);
            let from = k.load_f32x16(self.gates.g, at);
            let difference = k.fsub(g, from);
            // more than 0 for what is not seen, or by rounding
            let difference = k.fmin(difference, nothing);
            let decay = k.exp(difference);
            let scores = [0, 1].map(|which| {
                let place = Self::scores_at(block * LANES, other * LANES) + which * CHUNK_TOKENS * CHUNK_TOKENS;
                let (line, at) = (k.mul_const(i, TOGETHER), k.index(place));
                let at = k.add(line, at);
                let score = k.load_f32x16(self.scores, at);
                k.fmul(decay, score)
            });
            let row = k.fmul(against, scores[1]);
            let is_own = other == block;
            p.push(if is_own { k.select(seen, scores[0], nothing) } else { scores[0] });
            a.push(if is_own { k.select(before, row, nothing) } else { row });
        }
        self.seen.put(k, row, &p);
        a.resize((CHUNK_TOKENS / LANES) as usize, nothing);
        let to = row_ptr(k, self.solution, row, CHUNK_TOKENS);
        put_vectors(k, to, &a);
    }

    /// L of the rows from `i` of a block of 16 on.
    fn solve_rows(&self, k: &mut KernelBuilder, block: u64, i: Val) {
        let (first, zero, count) = (k.add_const(i, block * LANES), k.const_i64(0), block + 1);
        let rows: Vec<Val> = (0..ROWS)
            .map(|n| {
                let row = k.add_const(first, n);
                row_ptr(k, self.solution, row, CHUNK_TOKENS)
            })
            .collect();
        let add = |k: &mut KernelBuilder, sums: &[Val], (row, j): (Val, Val), known: &[Val]| -> Vec<Val> {
            let factor = k.load_f32(row, j);
            let factor = k.splat(factor, 16);
            sums.iter().zip(known).map(|(&sum, &x)| k.fma(factor, x, sum)).collect()
        };
        let init: Vec<Val> = rows.iter().flat_map(|&row| some_vectors(k, row, count)).collect();
        let sums = k.for_carry((zero, first, 1), &init, |k, j, sums| {
            let known = row_ptr(k, self.solution, j, CHUNK_TOKENS);
            let known = some_vectors(k, known, count);
            let sums = sums.chunks(count as usize).zip(&rows);
            sums.flat_map(|(sums, &row)| add(k, sums, (row, j), &known)).collect()
        });
        let mut solved: Vec<Vec<Val>> = Vec::new();
        for (sums, &row) in sums.chunks(count as usize).zip(&rows) {
            let sums = (0..).zip(&solved).fold(sums.to_vec(), |sums, (n, known)| {
                let j = k.add_const(first, n);
                add(k, &sums, (row, j), known)
            });
            solved.push(sums);
        }
        for (n, (sums, &row)) in (0..).zip(solved.iter().zip(&rows)) {
            put_vectors(k, row, sums);
            let i = k.add_const(first, n);
            self.inverse.put(k, i, sums);
        }
    }
}
