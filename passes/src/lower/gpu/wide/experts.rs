//! Experts of many tokens: see [`super`] for the blocks, [`many_experts`](super::super::many_experts) for the nodes.
//!
//! experts_gate_up  blocks (tokens of the shared expert, or of the run of a chosen one; six tiles of its width)
//! experts_down     blocks (the same tokens; half of the tiles of the residual stream): rows are short, so each block makes its own operands

use nextc_ir::DType;
use nextc_ir::kernel::{Kernel, KernelBuilder, Pred, Val};
use nextc_ir::shape::{LANES, Sym, pad};

use super::super::super::matmul::Rows;
use super::super::super::ports::{Port, Ports, Site};
use super::super::experts_down::Down;
use super::super::fragments::Fragments;
use super::super::many::many;
use super::super::many_experts::{GateUp, combine};
use super::super::matmul::store_pair;
use super::linears::Pairs;
use super::{Block, Goes, Memory, Own, PAIRS, Packed, RowOf, THREADS, Tiles, WARPS, Width, X, begin_block, same};

/// Blocks that share the tiles of an expert's `down` for the same tokens.
const DOWN_SHARES: u64 = 2;

/// `experts_gate_up` of more tokens than `above`.
pub fn gate_up(node: &GateUp<'_>, site: &Site<'_>, ports: &Ports, (sym, above): (Sym, u64)) -> Kernel {
    let shape = |tiles: u64| (tiles, PAIRS, 1);
    let (dense_shape, shape) = (shape(node.dense.0.planes.tiles()), shape(pad(node.width) / LANES));
    let [dense_shares, shares] = [dense_shape, shape].map(Tiles::shares);
    let shared_tasks = Width::PAIRS.token_blocks(sym) * dense_shares.into();
    let grid = shared_tasks.clone() + node.choices.units(sym, Width::PAIRS.tokens()) * shares.into();
    let packed = Packed::of(&node.routed.0);
    let mut k = ports.builder_of(site, ".wide", many(sym, above, sym.into()));
    packed.body(&mut k, node.rows);
    k.finish_with_tail_grid(many(sym, above, grid), |k| {
        let memory = Memory::alloc(k, (site.target, Width::PAIRS), [&node.routed.0, &node.dense.0]);
        let x = X::Packed(packed, packed.rows(k));
        let place = begin_block(k);
        let (task, count) = (k.task(), k.dim(sym));
        let shared_end = k.extent(&shared_tasks);
        let is_shared = k.cmp(Pred::Lt, task, shared_end);
        let [routed_out, shared_out] = node.outs.map(|(port, stride)| (k.param(port), stride));
        let warps = node.split.warps;
        k.if_else(
            is_shared,
            |k| {
                let ((first, share), skipped) = (Width::PAIRS.block_of(k, task, dense_shares), k.const_i64(0));
                let (fragments, weights) = (&node.dense.0, node.dense.1);
                let pairs = Pairs { fragments, weights, skipped, tiles: Tiles::of_share(k, share, dense_shape) };
                let block = Block { fragments, warps, place, memory, x, range: (first, count) };
                pairs.products(k, &block, (&mut same, &mut same), shared_out);
                Vec::new()
            },
            |k| {
                let number = k.sub(task, shared_end);
                let (number, share) = (k.div_const(number, shares), k.rem_const(number, shares));
                let (exists, unit) = node.choices.unit(k, place.lane, (number, Width::PAIRS.tokens()));
                k.if_then(exists, |k| {
                    let skipped = k.mul_const(unit.expert, shape.0);
                    let (fragments, weights) = (&node.routed.0, node.routed.1);
                    let pairs = Pairs { fragments, weights, skipped, tiles: Tiles::of_share(k, share, shape) };
                    let range = (unit.first, unit.end);
                    let block = Block { fragments, warps, place, memory, x, range };
                    let mut row_of = |k: &mut KernelBuilder, at: Val| node.choices.at(k, at).1;
                    let mut row_to = |k: &mut KernelBuilder, at: Val| node.choices.at(k, at).0;
                    pairs.products(k, &block, (&mut row_of, &mut row_to), routed_out);
                });
                Vec::new()
            },
        );
    })
}

/// `experts_down` of more tokens than `above`: a block takes half of the tiles of an expert for its tokens, and hands all products to the tail.
pub fn down(down: &Down, site: &Site<'_>, ports: &Ports, (sym, above): (Sym, u64)) -> Kernel {
    let shape = (down.tiles, WARPS, down.tiles.div_ceil(WARPS).div_ceil(DOWN_SHARES));
    let (shares, stride) = (Tiles::shares(shape), down.tiles * LANES);
    let shared_tasks = Width::WHOLE.token_blocks(sym) * shares.into();
    let grid = shared_tasks.clone() + down.choices.units(sym, Width::WHOLE.tokens()) * shares.into();
    let mut k = ports.builder_of(site, ".wide", many(sym, above, grid));
    k.threads(THREADS as u32);
    let memory = Memory::resident(&mut k, (site.target, Width::WHOLE), [&down.routed, &down.dense]);
    // as for blocks without groups of warps
    let elems = Width::WHOLE.tokens() * shape.1 * shape.2 * LANES;
    let partials = k.partials(DType::F32, elems);
    let place = begin_block(&mut k);
    let (task, count) = (k.task(), k.dim(sym));
    let shared_end = k.extent(&shared_tasks);
    let is_shared = k.cmp(Pred::Lt, task, shared_end);
    let choices = k.mul_const(count, down.choices.each);
    let row = k.div_const(place.lane, 4);
    let products = |k: &mut KernelBuilder,
                    (fragments, weight, skipped): (&Fragments, Port, Val),
                    (rows, range, share): (&Rows, (Val, Val), Val),
                    both: (&mut RowOf<'_>, &mut RowOf<'_>)| {
        let (tiles, base) = (Tiles::of_share(k, share, shape), k.param(weight));
        let own = |k: &mut KernelBuilder, go: Val| {
            let (_, _, tile) = tiles.at(k, go, place.warp);
            let tile = k.add(skipped, tile);
            Own::Tile(fragments.own_tile(k, base, tile))
        };
        let block = Block { fragments, warps: 1, place, memory, x: X::Plain(rows), range };
        let goes = Goes { count: tiles.goes(k), own: &own };
        block.products(
            k,
            &goes,
            both,
            |_, _, _| (),
            |k, go, at, values, ()| {
                let (tile, is_tile, _) = tiles.at(k, go, place.warp);
                let exists = k.and(at.exists, is_tile);
                k.if_then(exists, |k| store_pair(k, (partials, stride), at.token, (tile, row), values));
            },
        );
    };
    k.if_else(
        is_shared,
        |k| {
            let ((first, share), none) = (Width::WHOLE.block_of(k, task, shares), k.const_i64(0));
            let mut row_to = |k: &mut KernelBuilder, t: Val| k.add(choices, t);
            let weight = (&down.dense, down.s_down, none);
            products(k, weight, (&down.s, (first, count), share), (&mut same, &mut row_to));
            Vec::new()
        },
        |k| {
            let number = k.sub(task, shared_end);
            let (number, share) = (k.div_const(number, shares), k.rem_const(number, shares));
            let (exists, unit) = down.choices.unit(k, place.lane, (number, Width::WHOLE.tokens()));
            k.if_then(exists, |k| {
                let skipped = k.mul_const(unit.expert, down.tiles);
                let mut rows = [(); 2].map(|()| |k: &mut KernelBuilder, at: Val| down.choices.at(k, at).0);
                let [row_of, row_to] = &mut rows;
                let weight = (&down.routed, down.w_down, skipped);
                products(k, weight, (&down.h, (unit.first, unit.end), share), (row_of, row_to));
            });
            Vec::new()
        },
    );
    combine(k, down, (sym, above), elems)
}
