//! `experts_gate_up` on a GPU: the first half of the routed and the shared experts.
//!
//! task     a tile of the shared expert's width; then a chosen expert and a tile of its width; which are chosen is read on the device
//! ahead    of one or two tokens their operands, while experts are chosen; of more a block has too many of which it needs one or two
//!
//! Of some tokens the same, eight of an expert at a time; of many, see [`super::many_experts`]. What is dispatched, and how, says
//! [`super::super::experts`].

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::{LANES, pad};

use super::super::LowerError;
use super::super::experts::{Choices, Table};
use super::super::matmul::{Normed, Rows};
use super::super::ports::{Lowered, Ports, Site};
use super::few::{Few, Memory};
use super::fragments::Fragments;
use super::many::{FEW_ROWS, few, some, some_tokens};
use super::many_experts;
use super::matmul::{pair_split, store_one, swiglu};
use super::tile::Product;
use super::{Place, begin_after, begin_alone};

/// Rows of a step whose operands every block makes before it knows which it needs.
const EARLY_ROWS: u64 = 2;

/// `experts_gate_up`.
pub fn lower_experts_gate_up(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let rows = Rows::Normed(Normed::ports(site, &mut ports)?);
    let (order, table) = (ports.read("order", site.named("order")), ports.read("table", site.named("table")));
    let shape = site.weight(site.named("w_gate")).shape.clone();
    let (experts, width) = (shape[0], shape[1]);
    let of = |name: &str| Fragments::of(site, site.named(name), 1);
    let (routed, dense) = (of("w_gate")?, of("s_gate")?);
    if [of("w_up")?.planes.format, of("s_up")?.planes.format] != [routed.planes.format, dense.planes.format] {
        return Err(site.error("gate and up projections in different formats"));
    }
    let [gate, up, s_gate, s_up] = ["w_gate", "w_up", "s_gate", "s_up"].map(|n| ports.read(n, site.named(n)));
    let (h, s) = (ports.write("h", site.result(0)), ports.write("s", site.result(1)));
    let (sym, choices) = (site.rows(site.result(0))?, site.inner(site.result(0))[0]);
    let s_stride = site.stride(site.result(1));
    let (expert_tiles, shared_tiles) = (pad(width) / LANES, dense.planes.tiles());
    let most = Extent::Const(experts).min(Extent::from(sym) * choices.into());
    let (split, some_most) = (pair_split(site, &routed), some_tokens(experts, choices));
    let by_expert = Choices { order, table, layout: Table { experts }, each: choices };
    let of = |part: &str, grid: Extent, (most, is_early): (u64, bool)| {
        let mut k = ports.builder_of(site, part, grid);
        k.threads(split.threads());
        let memory = Memory::alloc(&mut k, site.target, split, &[routed.form(), dense.form()]);
        let (place, tokens) = (Place::here(&mut k), k.dim(sym));
        let (task, shared_end) = (k.task(), k.index(shared_tiles));
        let is_shared = k.cmp(Pred::Lt, task, shared_end);
        // of few tokens the next kernel reads what is chosen before its own wait; and this one x, which is there before the router lets it begin
        let begins = if most <= FEW_ROWS { begin_alone } else { begin_after };
        let early = is_early && routed.form() == dense.form();
        let threads = split.threads().into();
        let filled = early && memory.fill(&mut k, (routed.form(), &rows), (place, threads), tokens);
        k.if_else(
            is_shared,
            |k| {
                let tiles = [s_gate, s_up].map(|w| {
                    let base = k.param(w);
                    dense.own_tile(k, base, task)
                });
                let product = Product::new(k, &dense, tiles.to_vec(), place, split.warps);
                let block = Few::new(product, split, &rows, memory).at_most(most).filled(filled);
                let asked = block.ask(k);
                begins(k);
                let out = k.param(s);
                block.products(k, asked, tokens, &mut |_, t| t, &mut |k, at, sum| {
                    let value = swiglu(k, sum);
                    k.if_then(at.exists, |k| store_one(k, (out, s_stride), at.token, task, sum.row, value));
                });
                Vec::new()
            },
            |k| {
                begins(k);
                let number = k.sub(task, shared_end);
                let (at, tile) = (k.div_const(number, expert_tiles), k.rem_const(number, expert_tiles));
                // of a single token, the choice that lies there too
                let (e, own) = (by_expert.active(k, at), by_expert.at(k, at).0);
                let none = k.const_i64(0);
                let chosen = k.cmp(Pred::Ge, e, none);
                k.if_then(chosen, |k| {
                    let base = k.mul_const(e, expert_tiles);
                    let weight_tile = k.add(base, tile);
                    let tiles = [gate, up].map(|w| {
                        let base = k.param(w);
                        routed.own_tile(k, base, weight_tile)
                    });
                    let product = Product::new(k, &routed, tiles.to_vec(), place, split.warps);
                    let block = Few::new(product, split, &rows, memory).at_most(most).filled(filled);
                    let asked = block.ask_late(k);
                    let (first, end) = by_expert.run(k, tokens, (at, e));
                    let (h, count) = (k.param(h), k.sub(end, first));
                    let mut row_of = |k: &mut KernelBuilder, i: Val| {
                        let at = k.add(first, i);
                        by_expert.token(k, tokens, at)
                    };
                    block.products(k, asked, count, &mut row_of, &mut |k, at, sum| {
                        let value = swiglu(k, sum);
                        k.if_then(at.exists, |k| {
                            let place = k.add(first, at.token);
                            let number = by_expert.number(k, tokens, (place, own));
                            store_one(k, (h, pad(width)), number, tile, sum.row, value);
                        });
                    });
                });
                Vec::new()
            },
        );
        k.finish()
    };
    let grid = Extent::from(shared_tiles) + most * expert_tiles.into();
    let kernels = [
        of("", few(sym, EARLY_ROWS, grid.clone()), (EARLY_ROWS, true)),
        of(".few", some(sym, (EARLY_ROWS, FEW_ROWS), grid.clone()), (FEW_ROWS, false)),
        of(".some", some(sym, (FEW_ROWS, some_most), grid), (some_most, false)),
    ];
    let many = many_experts::GateUp {
        rows: &rows,
        routed: (routed, [gate, up]),
        dense: (dense, [s_gate, s_up]),
        split,
        choices: by_expert,
        width,
        outs: [(h, pad(width)), (s, s_stride)],
    };
    let many = ports.clone().finish(many.kernel(site, &ports, (sym, some_most)));
    let [early, few, some] = kernels.map(|kernel| ports.clone().finish(kernel));
    Ok(early.then(few).then(some).then(many))
}
