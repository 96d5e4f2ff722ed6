//! Projections of many rows, and what is fused into them: see [`super`] for the blocks, [`matmul`](super::super::matmul) for the nodes.

use nextc_ir::kernel::{Kernel, KernelBuilder, Val};
use nextc_ir::shape::{LANES, Sym};

use super::super::super::matmul::{Rows, for_parts, row_ptr};
use super::super::super::ports::{Port, Ports, Site};
use super::super::few::At;
use super::super::fragments::Fragments;
use super::super::many::many;
use super::super::matmul::{ResidualNode, Segment, choose, column_of, silu_times, store_one, store_residual_pair};
use super::super::tile::Split;
use super::{Block, Goes, Memory, Own, PAIRS, Packed, RowOf, Tiles, WARPS, Width, X, begin_block, same};

/// `linear`, `linears`, `norm_linears` of more rows than `above`; `warps` share the columns in the kernel for few.
pub(in super::super) fn linears(
    site: &Site<'_>,
    ports: &Ports,
    (groups, warps): (&[Vec<Segment>], u64),
    (rows, sym, above): (&Rows, Sym, u64),
) -> Kernel {
    let each = WARPS;
    let tasks = |group: &[Segment]| group.iter().map(|s| s.fragments.planes.tiles().div_ceil(each)).sum::<u64>();
    let all: u64 = groups.iter().map(|g| tasks(g)).sum();
    let packed = Packed::of(&groups[0][0].fragments);
    let mut k = ports.builder_of(site, ".wide", many(sym, above, sym.into()));
    packed.body(&mut k, rows);
    k.finish_with_tail_grid(many(sym, above, Width::PLAIN.token_blocks(sym) * all.into()), |k| {
        let memory = Memory::alloc(k, (site.target, Width::PLAIN), groups.iter().map(|g| &g[0].fragments));
        let x = X::Packed(packed, packed.rows(k));
        let place = begin_block(k);
        let (task, count) = (k.task(), k.dim(sym));
        let (first, number) = Width::PLAIN.block_of(k, task, all);
        for_parts(k, number, groups.iter().map(|g| tasks(g)), |k, i, number| {
            let group = &groups[i];
            let fragments = &group[0].fragments;
            let chosen = choose(k, group, Split { warps, tiles: each }, number);
            let (behind, end) = (k.add_const(chosen.last, 1), k.add_const(chosen.first, each));
            let tiles = Tiles { first: chosen.first, end: k.min_i64(end, behind), each, most: 1 };
            let own = |k: &mut KernelBuilder, go: Val| {
                let (_, _, tile) = tiles.at(k, go, place.warp);
                Own::Tile(fragments.tile(k, chosen.weight, chosen.scales_at, tile))
            };
            let block = Block { fragments, warps, place, memory, x, range: (first, count) };
            let row = k.div_const(place.lane, 4);
            let goes = Goes { count: tiles.goes(k), own: &own };
            block.of_tokens(
                k,
                &goes,
                |_, _, _| (),
                |k, go, at, values, ()| {
                    let (tile, is_tile, _) = tiles.at(k, go, place.warp);
                    let exists = k.and(at.exists, is_tile);
                    k.if_then(exists, |k| {
                        let to = k.mul(at.token, chosen.stride);
                        let to = row_ptr(k, chosen.out, to, 1);
                        let column = column_of(k, tile, row);
                        let lower = k.add_const(column, LANES / 2);
                        k.store(to, column, values[0]);
                        k.store(to, lower, values[1]);
                    });
                },
            );
        });
    })
}

/// `linear_residual` of more rows than `above`.
pub(in super::super) fn residual(
    node: &ResidualNode<'_>,
    site: &Site<'_>,
    ports: &Ports,
    (sym, above): (Sym, u64),
) -> Kernel {
    let (fragments, packed) = (&node.fragments, Packed::of(&node.fragments));
    let shape = (fragments.planes.tiles(), WARPS, 1);
    let shares = Tiles::shares(shape);
    let mut k = ports.builder_of(site, ".wide", many(sym, above, sym.into()));
    packed.body(&mut k, node.rows);
    k.finish_with_tail_grid(many(sym, above, Width::PLAIN.token_blocks(sym) * shares.into()), |k| {
        let memory = Memory::alloc(k, (site.target, Width::PLAIN), [fragments]);
        let x = X::Packed(packed, packed.rows(k));
        let place = begin_block(k);
        let (base, task, count) = (k.param(node.weight), k.task(), k.dim(sym));
        let (first, share) = Width::PLAIN.block_of(k, task, shares);
        let tiles = Tiles::of_share(k, share, shape);
        let own = |k: &mut KernelBuilder, go: Val| {
            let (_, _, tile) = tiles.at(k, go, place.warp);
            Own::Tile(fragments.own_tile(k, base, tile))
        };
        let block = Block { fragments, warps: node.warps, place, memory, x, range: (first, count) };
        let row = k.div_const(place.lane, 4);
        let ask = |k: &mut KernelBuilder, go: Val, at: &At| {
            let (_, _, tile) = tiles.at(k, go, place.warp);
            node.residual.load_pair(k, tile, (at.token, row))
        };
        let goes = Goes { count: tiles.goes(k), own: &own };
        block.of_tokens(k, &goes, ask, |k, go, at, values, old| {
            let (tile, is_tile, _) = tiles.at(k, go, place.warp);
            let at = At { exists: k.and(at.exists, is_tile), ..*at };
            store_residual_pair(k, node.residual, tile, &at, (row, Some(old)), values);
        });
    })
}

/// `norm_swiglu`: gate and up of the same rows.
pub struct GateUp<'a> {
    /// What is multiplied.
    pub rows: &'a Rows,
    /// Both matrices.
    pub fragments: &'a Fragments,
    /// Where they lie.
    pub weights: [Port; 2],
    /// Warps that share the columns in the kernel for few.
    pub warps: u64,
    /// Where the products go, and elements from one row to the next.
    pub out: (Port, u64),
}

impl GateUp<'_> {
    /// The kernel for more rows than `above`.
    pub fn kernel(&self, site: &Site<'_>, ports: &Ports, (sym, above): (Sym, u64)) -> Kernel {
        let (packed, width) = (Packed::of(self.fragments), Width::PAIRS);
        let shape = (self.fragments.planes.tiles(), PAIRS, 1);
        let shares = Tiles::shares(shape);
        let mut k = ports.builder_of(site, ".wide", many(sym, above, sym.into()));
        packed.body(&mut k, self.rows);
        k.finish_with_tail_grid(many(sym, above, width.token_blocks(sym) * shares.into()), |k| {
            let memory = Memory::alloc(k, (site.target, width), [self.fragments]);
            let x = X::Packed(packed, packed.rows(k));
            let place = begin_block(k);
            let (task, count) = (k.task(), k.dim(sym));
            let (to, none) = (k.param(self.out.0), k.const_i64(0));
            let (first, share) = width.block_of(k, task, shares);
            let pairs = Pairs {
                fragments: self.fragments,
                weights: self.weights,
                skipped: none,
                tiles: Tiles::of_share(k, share, shape),
            };
            let block = Block { fragments: self.fragments, warps: self.warps, place, memory, x, range: (first, count) };
            pairs.products(k, &block, (&mut same, &mut same), (to, self.out.1));
        })
    }
}

/// Tiles of gate and of up of a block.
pub struct Pairs<'a> {
    /// Both matrices.
    pub fragments: &'a Fragments,
    /// Where they lie.
    pub weights: [Port; 2],
    /// Tiles before those of the expert.
    pub skipped: Val,
    /// Which tiles the block takes.
    pub tiles: Tiles,
}

impl Pairs<'_> {
    /// `out = silu(gate) · up` of the block's tokens: `row_of` gives the row of x of one, `row_to` that of its products.
    pub fn products(
        &self,
        k: &mut KernelBuilder,
        block: &Block<'_>,
        rows: (&mut RowOf<'_>, &mut RowOf<'_>),
        out: (Val, u64),
    ) {
        let pair = k.div_const(block.place.warp, 2);
        let own = |k: &mut KernelBuilder, go: Val| {
            let (_, _, tile) = self.tiles.at(k, go, pair);
            let tile = k.add(self.skipped, tile);
            Own::Both(self.weights.map(|w| {
                let base = k.param(w);
                self.fragments.own_tile(k, base, tile)
            }))
        };
        // the second of two warps has rows 8 and more
        let (second, row) = (k.rem_const(block.place.warp, 2), k.div_const(block.place.lane, 4));
        let skipped = k.mul_const(second, LANES / 2);
        let row = k.add(row, skipped);
        let goes = Goes { count: self.tiles.goes(k), own: &own };
        block.products(
            k,
            &goes,
            rows,
            |_, _, _| (),
            |k, go, at, [gate, up], ()| {
                let (tile, is_tile, _) = self.tiles.at(k, go, pair);
                let exists = k.and(at.exists, is_tile);
                k.if_then(exists, |k| {
                    let value = silu_times(k, gate, up);
                    store_one(k, out, at.token, tile, row, value);
                });
            },
        );
    }
}
