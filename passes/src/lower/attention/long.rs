//! `gated_attention` of long runs: in tiles, or a token at a time where the machine has no unit that multiplies them.

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::Sym;
use nextc_ir::types::DECODE_TOKENS;

use super::super::bulk::Classes;
use super::super::ports::{Lowered, Ports, Site};
use super::Attention;
use super::group::{Group, Sums};
use super::tiles::{Run, Tiles};

/// A task for each token and kv head, left out of steps without a long run. `apart`: runs that are decoded have a kernel of their own.
pub fn lower(site: &Site<'_>, ports: Ports, bound: Attention, apart: bool) -> Lowered {
    let pages = bound.pages;
    let tasks = Extent::from(Sym::T) * pages.heads.into();
    let (part, tasks) = match apart {
        true => (".long", tasks.if_above(Sym::T, DECODE_TOKENS, 0.into())),
        false => ("", tasks),
    };
    let mut k = ports.builder_of(site, part, tasks);
    let task = k.task();
    let (t, kv_head) = (k.div_const(task, pages.heads), k.rem_const(task, pages.heads));
    let tiles = site.target.unit().map(|unit| Tiles::alloc(&mut k, bound, unit));
    let alone = tiles.is_none().then(|| {
        let scores = Group::scores(&mut k, &bound);
        let sums = k.alloc(DType::F32, Sums::elems(&bound));
        (scores, sums)
    });
    let b = pages.sequence(&mut k, t);
    let (cu_seqlens, next) = (k.param(pages.cu_seqlens), k.add_const(b, 1));
    let (begin, end) = (k.load_index(cu_seqlens, b), k.load_index(cu_seqlens, next));
    let attend = |k: &mut KernelBuilder| {
        let (slot, zero) = (pages.slot(k, b), k.const_i64(0));
        let live = k.cmp(Pred::Ge, slot, zero);
        let run = |k: &mut KernelBuilder| {
            if let Some(tiles) = &tiles {
                // the first token of a block does the work of all
                let before = k.sub(t, begin);
                let within = k.rem_const(before, Tiles::tokens(&bound));
                let is_first = k.cmp(Pred::Eq, within, zero);
                k.if_then(is_first, |k| {
                    let last = k.add_const(t, Tiles::tokens(&bound));
                    let end = k.min_i64(last, end);
                    tiles.run(k, Run { b, kv_head, first: t, end });
                });
            }
            if let Some((scores, sums)) = alone {
                let (q, sums) = (bound.rows(k, bound.q, t, kv_head), Sums::at(k, &bound, sums));
                let (gate, out) = (bound.rows(k, bound.gate, t, kv_head), bound.rows(k, bound.out, t, kv_head));
                let group = Group { bound: &bound, q, scores, sums, most_sums: site.target.most_sums() };
                let position = pages.position(k, t);
                let length = k.add_const(position, 1);
                group.attend(k, (b, kv_head), (zero, length), length);
                group.finish(k, gate, out);
            }
            Vec::new()
        };
        k.if_else(live, run, |k| {
            bound.zero(k, t, kv_head);
            Vec::new()
        });
    };
    match apart {
        true => {
            let is_long = Classes::is_bulk_run(&mut k, begin, end);
            k.if_then(is_long, attend);
        }
        false => attend(&mut k),
    }
    ports.finish(k.finish())
}
