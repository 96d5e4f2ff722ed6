//! Which tiles of weights a block takes.

use nextc_ir::kernel::{KernelBuilder, Pred, Val};

use super::WARPS;

/// Pairs of tiles of two matrices that a block takes in a go.
pub const PAIRS: u64 = WARPS / 2;

/// Tiles `first .. end` of a matrix, `each` of which a block takes in a go.
#[derive(Clone, Copy)]
pub struct Tiles {
    /// The first.
    pub first: Val,
    /// One past the last.
    pub end: Val,
    /// Of a go.
    pub each: u64,
    /// Most goes.
    pub most: u64,
}

impl Tiles {
    /// Of `all` tiles those of share `share`, in `goes` goes.
    pub fn of_share(k: &mut KernelBuilder, share: Val, (all, each, goes): (u64, u64, u64)) -> Self {
        let (first, all) = (k.mul_const(share, each * goes), k.index(all));
        let end = k.add_const(first, each * goes);
        Self { first, end: k.min_i64(end, all), each, most: goes }
    }

    /// How many shares there are of so many tiles.
    pub const fn shares((all, each, goes): (u64, u64, u64)) -> u64 {
        all.div_ceil(each * goes)
    }

    /// How many goes they take, if that need not be one.
    pub fn goes(&self, k: &mut KernelBuilder) -> Option<Val> {
        (self.most > 1).then(|| {
            let count = k.sub(self.end, self.first);
            let count = k.add_const(count, self.each - 1);
            k.div_const(count, self.each)
        })
    }

    /// Number `own` of a go, whether there is such a tile, and which to take where not.
    pub fn at(&self, k: &mut KernelBuilder, go: Val, own: Val) -> (Val, Val, Val) {
        let at = k.mul_const(go, self.each);
        let at = k.add(at, own);
        let at = k.add(self.first, at);
        let one = k.const_i64(1);
        let last = k.sub(self.end, one);
        (at, k.cmp(Pred::Le, at, last), k.min_i64(at, last))
    }
}
