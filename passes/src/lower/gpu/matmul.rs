//! `matmul` on a GPU: projections of rows of activations, and what is fused into them.
//!
//! Each has a kernel for few rows (`few.rs`), one for some (`some.rs`), where the one for many would leave multiprocessors idle, and one for many (`many.rs`, or
//! `wide/` for weights with scales):
//!
//! prologue the rows as they are, or `x · rms_scale · (1 + gain)`
//! epilogue store; or residual + store + sum of squares; or SwiGLU of a gate and an up tile

use nextc_ir::Op;
use nextc_ir::graph::Value;
use nextc_ir::kernel::{Kernel, KernelBuilder, Pred, Val};
use nextc_ir::shape::{LANES, Sym};

use super::super::LowerError;
use super::super::matmul::{Normed, Residual, Rows, for_parts, row_ptr};
use super::super::ports::{Lowered, Port, Ports, Site};
use super::few::{At, Few, Memory, Sum};
use super::fragments::{Fragments, Tile};
use super::many::{self, FEW_ROWS, OwnTiles, Pair, TILES, WARPS, few, few_rows, many, some, some_rows, token_blocks};
use super::some::{Blocks, SomeRows};
use super::stage::Form;
use super::tile::{Product, Split};
use super::wide::linears::{GateUp, linears};
use super::wide::{self, Width};
use super::{Place, across, begin, begin_after, half_warp_sum};

/// Some weights of one format and width, and where their products go.
pub(super) struct Segment {
    pub(super) fragments: Fragments,
    weight: Port,
    out: Port,
    stride: u64,
}

/// What a block found out about its segment.
#[derive(Clone, Copy)]
pub(super) struct Chosen {
    pub(super) weight: Val,
    pub(super) scales_at: Val,
    pub(super) out: Val,
    pub(super) stride: Val,
    /// Its first tile, and the segment's last.
    pub(super) first: Val,
    /// See `first`.
    pub(super) last: Val,
}

/// `linear`, `linears`, `norm_linears`: tasks are groups of tiles of one weight after the other. Weights of one format share their code.
pub fn lower_linears(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let x = site.named("x");
    let rows = match site.op() {
        Op::NormLinears => Rows::Normed(Normed::ports(site, &mut ports)?),
        _ => Rows::Plain { x: ports.read("x", x), stride: site.stride(x) },
    };
    let weights = match site.op() {
        Op::Linear => vec![site.named("w")],
        _ => site.bundle(site.named("ws"))?,
    };
    let in_rank = site.tensor(x).shape.rank() - 1;
    let segments = weights.iter().enumerate().map(|(i, &w)| segment(site, &mut ports, in_rank, i, w));
    let groups = by_format(segments.collect::<Result<Vec<_>, _>>()?);
    let sym = site.rows(x)?;
    let all: u64 = groups.iter().flatten().map(|s| s.fragments.planes.tiles()).sum();
    let splits: Vec<Split> =
        groups.iter().map(|g| Split::of(site.target, all.min(tiles_of(g)), &g[0].fragments.planes)).collect();
    let warps = splits.iter().map(|s| s.warps).max().unwrap_or(1);
    let splits: Vec<Split> = splits.into_iter().map(|s| Split { warps, ..s }).collect();
    let tasks = |i: usize| groups[i].iter().map(|s| s.fragments.planes.tiles().div_ceil(splits[i].tiles)).sum::<u64>();
    let mut k = ports.builder(site, few(sym, FEW_ROWS, (0..groups.len()).map(tasks).sum::<u64>().into()));
    k.threads(warps as u32 * 32);
    k.together(2);
    let widest = splits.iter().copied().max_by_key(|s| s.tiles).unwrap_or(Split { warps, tiles: 1 });
    let forms: Vec<Form> = groups.iter().map(|g| g[0].fragments.form()).collect();
    let memory = Memory::alloc(&mut k, site.target, widest, &forms);
    let place = Place::here(&mut k);
    let count = k.dim(sym);
    let task = k.task();
    for_parts(&mut k, task, (0..groups.len()).map(tasks), |k, i, task| {
        linears_block(k, (&groups[i], splits[i]), task, (&rows, count), (place, memory));
    });
    let most = some_rows(site.target, groups.iter().map(|g| many_tasks(g)).sum());
    let some = (most > FEW_ROWS).then(|| {
        let blocks = Blocks::of(site.target, warps, all);
        linears_of_some(site, &ports, (&groups, blocks), (&rows, sym, most))
    });
    let (wide, other): (Vec<_>, Vec<_>) =
        groups.into_iter().partition(|g| wide::covers(site.target, Width::PLAIN, [&g[0].fragments]));
    let mut many = Vec::new();
    if !wide.is_empty() {
        many.push(linears(site, &ports, (&wide, warps), (&rows, sym, most)));
    }
    if !other.is_empty() {
        many.push(linears_of_many(site, &ports, (&other, warps), (&rows, sym, most)));
    }
    Ok(by_rows(ports, k.finish(), some, many))
}

/// The kernels of a node for steps of few, of some, if there is one, and of many rows.
fn by_rows(ports: Ports, few: Kernel, some: Option<Kernel>, many: Vec<Kernel>) -> Lowered {
    let kernels = some.into_iter().chain(many);
    kernels.fold(ports.clone().finish(few), |all, kernel| all.then(ports.clone().finish(kernel)))
}

/// The kernel for some rows, at most `most`.
fn linears_of_some(
    site: &Site<'_>,
    ports: &Ports,
    (groups, blocks): (&[Vec<Segment>], Blocks),
    (rows, sym, most): (&Rows, Sym, u64),
) -> Kernel {
    let tasks = |group: &[Segment]| group.iter().map(|s| blocks.tasks(s.fragments.planes.tiles())).sum::<u64>();
    let all: u64 = groups.iter().map(|g| tasks(g)).sum();
    let mut k = ports.builder_of(site, ".some", some(sym, (FEW_ROWS, most), blocks.grid(sym, all)));
    let memory = blocks.begin(&mut k);
    let (place, count) = (Place::here(&mut k), k.dim(sym));
    let (first, number) = blocks.block_of(&mut k, all);
    for_parts(&mut k, number, groups.iter().map(|g| tasks(g)), |k, i, number| {
        let group = &groups[i];
        let own = OwnSegment::of(k, group, blocks.split, number);
        let product = Product::new(k, &group[0].fragments, own.tiles.clone(), place, blocks.split.warps);
        let block = SomeRows { product, blocks, rows, memory };
        block.ask(k);
        begin_after(k);
        block.products(k, (first, count), &mut |k, at, sum| own.store(k, at, sum));
    });
    k.finish()
}

/// The kernel for more rows than `above`; `warps` share the columns in the one for few.
fn linears_of_many(
    site: &Site<'_>,
    ports: &Ports,
    (groups, warps): (&[Vec<Segment>], u64),
    (rows, sym, above): (&Rows, Sym, u64),
) -> Kernel {
    let all: u64 = groups.iter().map(|g| many_tasks(g)).sum();
    let mut k = ports.builder_of(site, ".many", many(sym, above, token_blocks(sym) * all.into()));
    let place = many::begin_block(&mut k);
    let operands = groups.iter().map(|g| g[0].fragments.numbers().operands()).max().unwrap_or(1);
    let stage = many::stage(&mut k, operands);
    let (task, count) = (k.task(), k.dim(sym));
    let (first, number) = many::block_of(&mut k, task, all);
    for_parts(&mut k, number, groups.iter().map(|g| many_tasks(g)), |k, i, number| {
        let group = &groups[i];
        let fragments = group[0].fragments;
        let chosen = choose(k, group, Split { warps, tiles: TILES }, number);
        let own = OwnTiles::of(k, chosen.first, chosen.last, place);
        let tiles = own.load(k, |k, n| fragments.tile(k, chosen.weight, chosen.scales_at, n));
        let product = Product::new(k, &fragments, tiles, place, warps);
        many::products(k, (&product, stage), rows, (first, count), &mut |_, token| token, &mut |k, at, pair| {
            let row = k.mul(at.token, chosen.stride);
            let row = row_ptr(k, chosen.out, row, 1);
            own.each(k, at, pair, |k, tile, at, values| {
                k.if_then(at.exists, |k| {
                    let column = k.mul_const(tile, LANES);
                    let column = k.add(column, pair.row);
                    let lower = k.add_const(column, LANES / 2);
                    k.store(row, column, values[0]);
                    k.store(row, lower, values[1]);
                });
            });
        });
    });
    k.finish()
}

/// Groups of [`TILES`] tiles.
fn many_tasks(group: &[Segment]) -> u64 {
    group.iter().map(|s| s.fragments.planes.tiles().div_ceil(TILES)).sum()
}

fn tiles_of(group: &[Segment]) -> u64 {
    group.iter().map(|s| s.fragments.planes.tiles()).sum()
}

fn segment(site: &Site<'_>, ports: &mut Ports, in_rank: usize, i: usize, w: Value) -> Result<Segment, LowerError> {
    let out = site.result(i as u32);
    Ok(Segment {
        fragments: Fragments::of(site, w, in_rank)?,
        weight: ports.read(&format!("w{i}"), w),
        out: ports.write(&format!("out{i}"), out),
        stride: site.stride(out),
    })
}

/// Segments of one format together, in the order of their first.
fn by_format(segments: Vec<Segment>) -> Vec<Vec<Segment>> {
    let mut groups: Vec<Vec<Segment>> = Vec::new();
    for s in segments {
        match groups.iter_mut().find(|g| g[0].fragments.planes.format == s.fragments.planes.format) {
            Some(group) => group.push(s),
            None => groups.push(vec![s]),
        }
    }
    groups
}

fn linears_block(
    k: &mut KernelBuilder,
    (group, split): (&[Segment], Split),
    task: Val,
    (rows, count): (&Rows, Val),
    (place, memory): (Place, Memory),
) {
    let own = OwnSegment::of(k, group, split, task);
    let product = Product::new(k, &group[0].fragments, own.tiles.clone(), place, split.warps);
    let few = Few::new(product, split, rows, memory).at_most(FEW_ROWS);
    let asked = few.ask(k);
    begin(k);
    few.products(k, asked, count, &mut |_, token| token, &mut |k, at, sum| own.store(k, at, sum));
}

/// The tiles of a block in its segment.
struct OwnSegment {
    chosen: Chosen,
    numbers: Vec<Val>,
    /// Of each number that tile, or the last where there is none.
    tiles: Vec<Tile>,
}

impl OwnSegment {
    fn of(k: &mut KernelBuilder, group: &[Segment], split: Split, task: Val) -> Self {
        let chosen = choose(k, group, split, task);
        let fragments = group[0].fragments;
        let numbers: Vec<Val> = (0..split.tiles).map(|i| k.add_const(chosen.first, i)).collect();
        let tile = |&n: &Val| {
            let n = k.min_i64(n, chosen.last);
            fragments.tile(k, chosen.weight, chosen.scales_at, n)
        };
        let tiles = numbers.iter().map(tile).collect();
        Self { chosen, numbers, tiles }
    }

    /// Stores a sum of each tile that exists.
    fn store(&self, k: &mut KernelBuilder, at: &At, sum: &Sum) {
        let row = k.mul(at.token, self.chosen.stride);
        let row = row_ptr(k, self.chosen.out, row, 1);
        for (&tile, &value) in self.numbers.iter().zip(&sum.values) {
            let exists = k.cmp(Pred::Le, tile, self.chosen.last);
            let exists = k.and(exists, at.exists);
            k.if_then(exists, |k| {
                let column = k.mul_const(tile, LANES);
                let column = k.add(column, sum.row);
                k.store(row, column, value);
            });
        }
    }
}

/// Finds the segment of a task.
pub(super) fn choose(k: &mut KernelBuilder, group: &[Segment], split: Split, task: Val) -> Chosen {
    let of = |k: &mut KernelBuilder, s: &Segment, begin: u64| {
        let begin = k.index(begin);
        let number = k.sub(task, begin);
        Chosen {
            weight: k.param(s.weight),
            scales_at: k.index(s.fragments.planes.scales_at()),
            out: k.param(s.out),
            stride: k.index(s.stride),
            first: k.mul_const(number, split.tiles),
            last: k.index(s.fragments.planes.tiles() - 1),
        }
    };
    let mut chosen = of(k, &group[0], 0);
    let mut begin = 0;
    for pair in group.windows(2) {
        begin += pair[0].fragments.planes.tiles().div_ceil(split.tiles);
        let next = of(k, &pair[1], begin);
        let at = k.index(begin);
        let further = k.cmp(Pred::Ge, task, at);
        let mut pick = |a: Val, b: Val| k.select(further, a, b);
        chosen = Chosen {
            weight: pick(next.weight, chosen.weight),
            scales_at: pick(next.scales_at, chosen.scales_at),
            out: pick(next.out, chosen.out),
            stride: pick(next.stride, chosen.stride),
            first: pick(next.first, chosen.first),
            last: pick(next.last, chosen.last),
        };
    }
    chosen
}

/// `linear_residual`.
pub fn lower_linear_residual(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let (x, w) = (site.named("x"), site.named("w"));
    let rows = Rows::Plain { x: ports.read("x", x), stride: site.stride(x) };
    let fragments = Fragments::of(site, w, site.tensor(x).shape.rank() - 1)?;
    let weight = ports.read("w", w);
    let residual = Residual::ports(site, &mut ports)?;
    let sym = site.rows(x)?;
    let tiles = fragments.planes.tiles();
    let split = Split { tiles: 1, ..Split::of(site.target, tiles, &fragments.planes) };
    let mut k = ports.builder(site, few(sym, FEW_ROWS, tiles.into()));
    k.threads(split.threads());
    let memory = Memory::alloc(&mut k, site.target, split, &[fragments.form()]);
    let place = Place::here(&mut k);
    let base = k.param(weight);
    let tile = k.task();
    let own = fragments.own_tile(&mut k, base, tile);
    let product = Product::new(&mut k, &fragments, vec![own], place, split.warps);
    let block = Few::new(product, split, &rows, memory).at_most(FEW_ROWS);
    let asked = block.ask(&mut k);
    begin(&mut k);
    let count = k.dim(sym);
    // the residual of the first rows is asked for with x
    let mut early = block.first_sum(&mut k, count).map(|(at, row)| {
        let zero = k.const_f32(0.0);
        let load = |k: &mut KernelBuilder| {
            let column = column_of(k, tile, row);
            vec![residual.load_one(k, at.token, column)]
        };
        k.if_else(at.exists, load, |_| vec![zero])[0]
    });
    block.products(&mut k, asked, count, &mut |_, token| token, &mut |k, at, sum| {
        store_residual(k, &residual, tile, at, (sum.row, early.take()), sum.values[0]);
    });
    let few = k.finish();

    let node = ResidualNode { rows: &rows, fragments, weight, residual: &residual, warps: split.warps };
    let most = some_rows(site.target, tiles.div_ceil(TILES));
    let some = (most > FEW_ROWS).then(|| node.some(site, &ports, (sym, most)));
    let many = if wide::covers(site.target, Width::PLAIN, [&fragments]) {
        wide::linears::residual(&node, site, &ports, (sym, most))
    } else {
        node.many(site, &ports, (sym, most))
    };
    Ok(by_rows(ports, few, some, vec![many]))
}

/// `linear_residual` and what it is connected to.
pub(super) struct ResidualNode<'a> {
    pub(super) rows: &'a Rows,
    pub(super) fragments: Fragments,
    pub(super) weight: Port,
    pub(super) residual: &'a Residual,
    /// Warps that share the columns.
    pub(super) warps: u64,
}

impl ResidualNode<'_> {
    /// The kernel for some rows, at most `most`.
    fn some(&self, site: &Site<'_>, ports: &Ports, (sym, most): (Sym, u64)) -> Kernel {
        let tiles = self.fragments.planes.tiles();
        let blocks = Blocks::of(site.target, self.warps, tiles);
        let all = blocks.tasks(tiles);
        let mut k = ports.builder_of(site, ".some", some(sym, (FEW_ROWS, most), blocks.grid(sym, all)));
        let memory = blocks.begin(&mut k);
        let (place, base, count) = (Place::here(&mut k), k.param(self.weight), k.dim(sym));
        let (first, group) = blocks.block_of(&mut k, all);
        let (group, last) = (k.mul_const(group, blocks.split.tiles), k.index(tiles - 1));
        let numbers: Vec<Val> = (0..blocks.split.tiles).map(|i| k.add_const(group, i)).collect();
        let own = numbers.iter().map(|&n| {
            let n = k.min_i64(n, last);
            self.fragments.own_tile(&mut k, base, n)
        });
        let own = own.collect();
        let product = Product::new(&mut k, &self.fragments, own, place, blocks.split.warps);
        let block = SomeRows { product, blocks, rows: self.rows, memory };
        block.ask(&mut k);
        begin(&mut k);
        block.products(&mut k, (first, count), &mut |k, at, sum| {
            for (&tile, &value) in numbers.iter().zip(&sum.values) {
                let exists = k.cmp(Pred::Le, tile, last);
                let at = At { exists: k.and(exists, at.exists), ..*at };
                store_residual(k, self.residual, tile, &at, (sum.row, None), value);
            }
        });
        k.finish()
    }

    /// The kernel for more rows than `above`.
    fn many(&self, site: &Site<'_>, ports: &Ports, (sym, above): (Sym, u64)) -> Kernel {
        let (fragments, tiles) = (&self.fragments, self.fragments.planes.tiles());
        let groups = tiles.div_ceil(TILES);
        let mut k = ports.builder_of(site, ".many", many(sym, above, token_blocks(sym) * groups.into()));
        let place = many::begin_block(&mut k);
        let stage = many::stage(&mut k, fragments.numbers().operands());
        let (base, task, count) = (k.param(self.weight), k.task(), k.dim(sym));
        let (first, group) = many::block_of(&mut k, task, groups);
        let own = OwnTiles::of_group(&mut k, group, tiles, place);
        let own_tiles = own.load(&mut k, |k, n| fragments.own_tile(k, base, n));
        let product = Product::new(&mut k, fragments, own_tiles, place, self.warps);
        many::products(
            &mut k,
            (&product, stage),
            self.rows,
            (first, count),
            &mut |_, token| token,
            &mut |k, at, pair| {
                own.each(k, at, pair, |k, tile, at, values| {
                    store_residual_pair(k, self.residual, tile, at, (pair.row, None), values);
                });
            },
        );
        k.finish()
    }
}

/// `linear_wanted`: minus infinity where a tile is not wanted.
pub fn lower_linear_wanted(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let (x, w, out) = (site.named("x"), site.named("w"), site.result(0));
    let rows = Rows::Plain { x: ports.read("x", x), stride: site.stride(x) };
    let fragments = Fragments::of(site, w, site.tensor(x).shape.rank() - 1)?;
    let (weight, wanted) = (ports.read("w", w), ports.read("wanted", site.named("wanted")));
    let (out, stride, sym) = (ports.write("out", out), site.stride(out), site.rows(x)?);
    let split = Split { tiles: 1, ..Split::of(site.target, fragments.planes.tiles(), &fragments.planes) };
    let mut k = ports.builder(site, fragments.planes.tiles().into());
    k.threads(split.threads());
    let memory = Memory::alloc(&mut k, site.target, split, &[fragments.form()]);
    let (place, tile, weight) = (Place::here(&mut k), k.task(), k.param(weight));
    let own = fragments.own_tile(&mut k, weight, tile);
    begin(&mut k);
    let (wanted, out, count, zero) = (k.param(wanted), k.param(out), k.dim(sym), k.const_i64(0));
    let flag = k.load_index(wanted, tile);
    let is_wanted = k.cmp(Pred::Ne, flag, zero);
    k.if_else(
        is_wanted,
        |k| {
            let product = Product::new(k, &fragments, vec![own], place, split.warps);
            let block = Few::new(product, split, &rows, memory);
            let asked = block.ask_late(k);
            // however many rows there are: the tiles that are wanted are few
            block.products(k, asked, count, &mut |_, token| token, &mut |k, at, sum| {
                k.if_then(at.exists, |k| store_one(k, (out, stride), at.token, tile, sum.row, sum.values[0]));
            });
            Vec::new()
        },
        |k| {
            let (elems, least) = (k.mul_const(count, LANES), k.const_f32(f32::NEG_INFINITY));
            k.for_each((place.thread, elems, split.threads().into()), |k, i| {
                let (token, row) = (k.div_const(i, LANES), k.rem_const(i, LANES));
                store_one(k, (out, stride), token, tile, row, least);
            });
            Vec::new()
        },
    );
    Ok(ports.finish(k.finish()))
}

/// `out = residual + value`, and the sum of squares of the tile's 16 rows, which 16 neighbouring threads hold. All threads of a warp come along. `old`
/// is the residual, where it has been read.
pub fn store_residual(
    k: &mut KernelBuilder,
    residual: &Residual,
    tile: Val,
    at: &At,
    (row, old): (Val, Option<Val>),
    value: Val,
) {
    let column = column_of(k, tile, row);
    let zero = k.const_f32(0.0);
    let new = |k: &mut KernelBuilder| {
        let old = old.unwrap_or_else(|| residual.load_one(k, at.token, column));
        vec![residual.add_one(k, (at.token, column), old, value)]
    };
    let new = k.if_else(at.exists, new, |_| vec![zero])[0];
    let square = k.fmul(new, new);
    let sum = half_warp_sum(k, square);
    let first = k.const_i64(0);
    let leads = k.cmp(Pred::Eq, row, first);
    let leads = k.and(leads, at.exists);
    k.if_then(leads, |k| residual.store_sum(k, tile, at.token, sum));
}

impl Residual {
    /// The residual of a token at rows `row` and `row + 8` of a tile of weights.
    pub(super) fn load_pair(&self, k: &mut KernelBuilder, tile: Val, (token, row): (Val, Val)) -> [Val; 2] {
        let column = column_of(k, tile, row);
        let lower = k.add_const(column, LANES / 2);
        [column, lower].map(|column| self.load_one(k, token, column))
    }
}

/// The column of row `row` of a tile of weights.
pub fn column_of(k: &mut KernelBuilder, tile: Val, row: Val) -> Val {
    let column = k.mul_const(tile, LANES);
    k.add(column, row)
}

/// The same where a thread has rows `row` and `row + 8`, and the others of a token lie four threads apart.
pub fn store_residual_pair(
    k: &mut KernelBuilder,
    residual: &Residual,
    tile: Val,
    at: &At,
    (row, old): (Val, Option<[Val; 2]>),
    values: [Val; 2],
) {
    let column = column_of(k, tile, row);
    let lower = k.add_const(column, LANES / 2);
    let zero = k.const_f32(0.0);
    let new = |k: &mut KernelBuilder| {
        let old = old.unwrap_or_else(|| residual.load_pair(k, tile, (at.token, row)));
        let add = |(column, old, value)| residual.add_one(k, (at.token, column), old, value);
        [(column, old[0], values[0]), (lower, old[1], values[1])].map(add).to_vec()
    };
    let new = k.if_else(at.exists, new, |_| vec![zero; 2]);
    let squares = [k.fmul(new[0], new[0]), k.fmul(new[1], new[1])];
    let sum = k.fadd(squares[0], squares[1]);
    let sum = across(k, &[16, 8, 4], sum, |k, a, b| k.fadd(a, b));
    let first = k.const_i64(0);
    let leads = k.cmp(Pred::Eq, row, first);
    let leads = k.and(leads, at.exists);
    k.if_then(leads, |k| residual.store_sum(k, tile, at.token, sum));
}

/// `norm_swiglu`: the front of a dense FFN.
pub fn lower_norm_swiglu(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let rows = Rows::Normed(Normed::ports(site, &mut ports)?);
    let (gate, up) = (site.named("w_gate"), site.named("w_up"));
    let fragments = Fragments::of(site, gate, 1)?;
    if Fragments::of(site, up, 1)?.planes.format != fragments.planes.format {
        return Err(site.error("`w_gate` and `w_up` in different formats"));
    }
    let weights = [ports.read("w_gate", gate), ports.read("w_up", up)];
    let result = site.result(0);
    let out = ports.write("out", result);
    let (sym, stride): (Sym, u64) = (site.rows(result)?, site.stride(result));
    let split = pair_split(site, &fragments);
    let groups = fragments.planes.tiles().div_ceil(WARPS);
    let mut k = ports.builder(site, few(sym, few_rows(site.target, groups), fragments.planes.tiles().into()));
    k.threads(split.threads());
    let memory = Memory::alloc(&mut k, site.target, split, &[fragments.form()]);
    let place = Place::here(&mut k);
    let (task, to) = (k.task(), k.param(out));
    let tiles = weights.map(|w| {
        let base = k.param(w);
        fragments.own_tile(&mut k, base, task)
    });
    let product = Product::new(&mut k, &fragments, tiles.to_vec(), place, split.warps);
    let block = Few::new(product, split, &rows, memory);
    let asked = block.ask(&mut k);
    begin(&mut k);
    let count = k.dim(sym);
    block.products(&mut k, asked, count, &mut |_, token| token, &mut |k, at, sum| {
        let value = swiglu(k, sum);
        k.if_then(at.exists, |k| store_one(k, (to, stride), at.token, task, sum.row, value));
    });
    let few = k.finish();

    let above = few_rows(site.target, groups);
    if wide::covers(site.target, Width::PAIRS, [&fragments]) {
        let pairs = GateUp { rows: &rows, fragments: &fragments, weights, warps: split.warps, out: (out, stride) };
        let many = pairs.kernel(site, &ports, (sym, above));
        let many = ports.clone().finish(many);
        return Ok(ports.finish(few).then(many));
    }
    let mut k = ports.builder_of(site, ".many", many(sym, above, token_blocks(sym) * groups.into()));
    let place = many::begin_block(&mut k);
    let stage = many::stage(&mut k, fragments.numbers().operands());
    let (task, to) = (k.task(), k.param(out));
    let (first, group) = many::block_of(&mut k, task, groups);
    let pair = GatePair::of(&mut k, (&fragments, weights), (group, fragments.planes.tiles()), place);
    let product = Product::new(&mut k, &fragments, pair.tiles.to_vec(), place, split.warps);
    many::products(&mut k, (&product, stage), &rows, (first, count), &mut |_, token| token, &mut |k, at, sums| {
        pair.store(k, at, sums, (to, stride), at.token);
    });
    let many = ports.clone().finish(k.finish());
    Ok(ports.finish(few).then(many))
}

/// A gate tile and an up tile of one warp in a product of many rows.
pub struct GatePair {
    /// Both tiles.
    pub tiles: [Tile; 2],
    /// Their number, and whether there is such a tile.
    tile: Val,
    exists: Val,
}

impl GatePair {
    /// That of a warp in group `group` of pairs; `tiles` is how many pairs there are.
    pub fn of(
        k: &mut KernelBuilder,
        (fragments, weights): (&Fragments, [Port; 2]),
        (group, tiles): (Val, u64),
        place: Place,
    ) -> Self {
        let zero = k.const_i64(0);
        Self::of_expert(k, (fragments, weights), zero, (group, tiles), place)
    }

    /// The same of expert `expert`, of `tiles` pairs each.
    pub fn of_expert(
        k: &mut KernelBuilder,
        (fragments, weights): (&Fragments, [Port; 2]),
        expert: Val,
        (group, tiles): (Val, u64),
        place: Place,
    ) -> Self {
        let tile = k.mul_const(group, WARPS);
        let tile = k.add(tile, place.warp);
        let last = k.index(tiles - 1);
        let exists = k.cmp(Pred::Le, tile, last);
        let within = k.min_i64(tile, last);
        let number = k.mul_const(expert, tiles);
        let number = k.add(number, within);
        let tiles = weights.map(|w| {
            let base = k.param(w);
            fragments.own_tile(k, base, number)
        });
        Self { tiles, tile, exists }
    }

    /// `out[row] = silu(gate) · up` of a token.
    pub fn store(&self, k: &mut KernelBuilder, at: &At, sums: &Pair, out: (Val, u64), row: Val) {
        let exists = k.and(at.exists, self.exists);
        k.if_then(exists, |k| {
            let values = [0, 1].map(|i: usize| silu_times(k, sums.values[0][i], sums.values[1][i]));
            store_pair(k, out, row, (self.tile, sums.row), values);
        });
    }
}

/// How a block computes a gate and an up tile.
pub fn pair_split(site: &Site<'_>, fragments: &Fragments) -> Split {
    let split = Split::of(site.target, fragments.planes.tiles(), &fragments.planes);
    // a warp has as many loads as it has of one tile elsewhere, where a tile is so small
    let warps = if fragments.loads() == 1 { (split.warps / 2).max(4) } else { split.warps };
    Split { warps, tiles: 2 }
}

/// `silu(gate) · up` of the block's two tiles.
pub fn swiglu(k: &mut KernelBuilder, sum: &Sum) -> Val {
    silu_times(k, sum.values[0], sum.values[1])
}

pub(super) fn silu_times(k: &mut KernelBuilder, gate: Val, up: Val) -> Val {
    let gate = k.silu(gate);
    k.fmul(gate, up)
}

/// `out[token][tile * 16 + row] = value`.
pub fn store_one(k: &mut KernelBuilder, (out, stride): (Val, u64), token: Val, tile: Val, row: Val, value: Val) {
    let out = row_ptr(k, out, token, stride);
    let column = k.mul_const(tile, LANES);
    let column = k.add(column, row);
    k.store(out, column, value);
}

/// The same of rows `row` and `row + 8`.
pub fn store_pair(k: &mut KernelBuilder, out: (Val, u64), token: Val, (tile, row): (Val, Val), values: [Val; 2]) {
    for (i, value) in (0..).zip(values) {
        let row = k.add_const(row, LANES / 2 * i);
        store_one(k, out, token, tile, row, value);
    }
}
