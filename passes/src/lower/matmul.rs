//! `matmul`: rows of activations by tiles of 16 weight rows, the skeleton of every projection.
//!
//! task     a group of row tiles of one weight, over all rows of the step; rows in blocks, the last one smaller
//! prologue the rows as they are, or normalised into scratch
//! dot      per 16 weight rows and row of x: `even += w[2j] x[2j]`, `odd += w[2j+1] x[2j+1]` over j, then `even + odd`;
//!          of scaled formats so for each block of columns, and `sum += scale · (even + odd)` over the blocks (or, where blocks
//!          have offsets, `w = code · scale + offset` and `sum += even + odd`)
//! rounded  integer weights meet rows of 16 bits where vectors have less than 512 and may round: [`super::shorts`]
//! epilogue store; or residual + store + sum of squares; or SwiGLU of a gate and an up tile
//! ahead    with each turn of the inner loop the weights of a later one are asked for, at a tile's end those of the tile that is read next: unpacking and products
//!          fill the processor's window with a few lines, which is less than memory needs to be kept busy
//! traffic  each weight once a block of rows (bound by memory at one row, by FMAs at many)
//!
//! Where the target may round and multiplies rounded numbers fast, these are the products of tokens that are decoded; those of longer runs are [`super::bulk`]'s.
//!
//! The order of a row's sums depends on neither T nor the block, so a token has the same bits alone and among others.

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::shape::{LANES, Sym, pad};
use nextc_ir::target::MatmulTile;
use nextc_ir::{DType, Target};

use super::LowerError;
use super::bulk::{Class, Classes, Panel};
use super::packed::{Block, Lanes, Matrix, Tile};
use super::ports::{Lowered, Port, Ports, Site};
use super::shorts;

/// Row tiles of one task, for matrices of many rows.
pub const GROUP_TILES: u64 = 4;
/// Columns of plain formats in one turn of the inner loop, if a word has no more.
const TURN_COLUMNS: u64 = 4;

/// Dot products of every tile with every row: `[tile][row]`, each a vector of 16 weight rows.
pub fn dot(k: &mut KernelBuilder, tiles: &[Tile], rows: &[Val]) -> Vec<Vec<Val>> {
    let (first, others) = tiles.split_first().expect("a product has tiles");
    if others.iter().any(|t| t.matrix.planes.format != first.matrix.planes.format) {
        return tiles.iter().flat_map(|t| dot(k, std::slice::from_ref(t), rows)).collect();
    }
    let columns = first.matrix.planes.columns;
    if first.matrix.shorts {
        return shorts::dot(k, tiles, rows).chunks(rows.len()).map(<[Val]>::to_vec).collect();
    }
    let sums = match first.matrix.planes.format.blocks() {
        None => {
            let zero = k.const_i64(0);
            sum_columns(k, tiles, &[], rows, zero, columns)
        }
        Some(blocks) => sum_blocks(k, tiles, rows, u64::from(blocks.columns).min(columns)),
    };
    sums.chunks(rows.len()).map(<[Val]>::to_vec).collect()
}

/// The sums of all blocks of columns, each times its scale.
fn sum_blocks(k: &mut KernelBuilder, tiles: &[Tile], rows: &[Val], block_columns: u64) -> Vec<Val> {
    let columns = tiles[0].matrix.planes.columns;
    let zero = k.splat_f32(16, 0.0);
    let init = vec![zero; tiles.len() * rows.len()];
    let add_block = |k: &mut KernelBuilder, block: Val, columns: u64, acc: &[Val]| -> Vec<Val> {
        let first = k.mul_const(block, block_columns);
        tiles.iter().for_each(|tile| tile.ask_scales(k, block));
        let blocks: Vec<Block> = tiles.iter().map(|t| t.block(k, block, Lanes::All)).collect();
        let sums = sum_columns(k, tiles, &blocks, rows, first, columns);
        let added = (0..).zip(sums.iter().zip(acc));
        added.map(|(i, (&sum, &acc)): (usize, _)| blocks[i / rows.len()].add(k, sum, acc)).collect()
    };
    let (lo, hi) = (k.const_i64(0), k.index(columns / block_columns));
    let acc = k.for_carry((lo, hi, 1), &init, |k, block, acc| add_block(k, block, block_columns, acc));
    match columns % block_columns {
        0 => acc,
        rest => add_block(k, hi, rest, &acc),
    }
}

/// Sums over `columns` columns from column `first` on, for each tile and row: even and odd columns apart, then both.
fn sum_columns(
    k: &mut KernelBuilder,
    tiles: &[Tile],
    blocks: &[Block],
    rows: &[Val],
    first: Val,
    columns: u64,
) -> Vec<Val> {
    let format = tiles[0].matrix.planes.format;
    let per_word = format.group_columns();
    let turn = match (format.blocks(), tiles[0].matrix.turn_columns.max(per_word)) {
        (None, _) => TURN_COLUMNS.max(per_word),
        (Some(_), turn) if columns.is_multiple_of(turn) => turn,
        (Some(_), _) => LANES,
    };
    let zero = k.splat_f32(16, 0.0);
    let init = vec![zero; 2 * tiles.len() * rows.len()];
    let add_turn = |k: &mut KernelBuilder, column: Val, acc: &[Val]| -> Vec<Val> {
        let mut acc = acc.to_vec();
        tiles.iter().for_each(|tile| tile.ask_codes(k, column, turn));
        for line in 0..turn / per_word {
            let column = k.add_const(column, line * per_word);
            add_line(k, tiles, blocks, rows, (column, line * per_word), &mut acc);
        }
        acc
    };
    let sums = if columns == turn {
        add_turn(k, first, &init)
    } else {
        let end = k.add_const(first, columns);
        k.for_carry((first, end, turn), &init, add_turn)
    };
    sums.chunks(2).map(|pair| k.fadd(pair[0], pair[1])).collect()
}

/// Adds the products of one line's columns; `number` is the line's first column within its turn.
fn add_line(
    k: &mut KernelBuilder,
    tiles: &[Tile],
    blocks: &[Block],
    rows: &[Val],
    (column, number): (Val, u64),
    acc: &mut [Val],
) {
    let per_word = tiles[0].matrix.planes.format.group_columns();
    let shared: Vec<Vec<Val>> = match tiles[0].order {
        None => (0..per_word).map(|i| load_column(k, rows, column, i, None)).collect(),
        Some(_) => Vec::new(),
    };
    for (t, tile) in tiles.iter().enumerate() {
        let codes = tile.codes(k, column, Lanes::All);
        for (i, code) in (0..).zip(codes) {
            let w = blocks.get(t).map_or(code, |block| block.term(k, code));
            let own = tile.order.map(|order| load_column(k, rows, column, i, Some(order)));
            let x = own.as_ref().unwrap_or_else(|| &shared[i as usize]);
            for (j, &x) in x.iter().enumerate() {
                let at = 2 * (t * rows.len() + j) + ((number + i) % 2) as usize;
                acc[at] = k.fma(w, x, acc[at]);
            }
        }
    }
}

/// Column `column + i` of each row, in all lanes; with an order the column that it names.
fn load_column(k: &mut KernelBuilder, rows: &[Val], column: Val, i: u64, order: Option<Val>) -> Vec<Val> {
    let at = k.add_const(column, i);
    let at = order.map_or(at, |order| k.load_index(order, at));
    rows.iter()
        .map(|&row| {
            let x = k.load_f32(row, at);
            k.splat(x, 16)
        })
        .collect()
}

/// Pointer to row `row` of a tensor of `stride` f32 elements a row.
pub fn row_ptr(k: &mut KernelBuilder, base: Val, row: Val, stride: u64) -> Val {
    let bytes = k.mul_const(row, stride * 4);
    k.offset(base, bytes)
}

/// Where the rows of x come from.
#[derive(Clone, Copy, Debug)]
pub enum Rows {
    /// A tensor as it is.
    Plain {
        /// The tensor.
        x: Port,
        /// Elements a row.
        stride: u64,
    },
    /// `rms_norm_ssq(x, ssq, gain)`, computed into scratch.
    Normed(Normed),
}

/// The operands of a norm in a prologue.
#[derive(Clone, Copy, Debug)]
pub struct Normed {
    /// The residual stream.
    pub x: Port,
    /// Its sums of squares.
    pub ssq: Port,
    /// The stored gain.
    pub gain: Port,
    /// Elements of a row that count.
    pub width: u64,
    /// Epsilon.
    pub eps: f32,
}

impl Normed {
    /// The ports of the operands `x`, `ssq` and `gain` of a node.
    pub fn ports(site: &Site<'_>, ports: &mut Ports) -> Result<Self, LowerError> {
        let (x, ssq, gain) = (site.named("x"), site.named("ssq"), site.named("gain"));
        let width = site.tensor(x).shape.last().ok_or_else(|| site.error("a row of unknown width"))?;
        Ok(Self {
            x: ports.read("x", x),
            ssq: ports.read("ssq", ssq),
            gain: ports.read("gain", gain),
            width,
            eps: site.float("eps"),
        })
    }
}

impl Rows {
    /// The tensor that they are read from.
    pub const fn source(&self) -> Port {
        match self {
            Self::Plain { x, .. } => *x,
            Self::Normed(n) => n.x,
        }
    }

    /// Elements of a row as stored.
    pub fn stride(&self) -> u64 {
        match self {
            Self::Plain { stride, .. } => *stride,
            Self::Normed(n) => pad(n.width),
        }
    }

    /// Scratch for a block of `rows` rows that are multiplied with `matrices`, if they are computed or rounded.
    pub fn scratch(&self, k: &mut KernelBuilder, rows: u64, matrices: &[Matrix]) -> Option<Scratch> {
        let shorts = matrices.iter().any(|m| m.shorts);
        let is_computed = matches!(self, Self::Normed(_)) || shorts;
        let stride = self.stride();
        let words = stride + if shorts { shorts::row_words(stride) } else { 0 };
        is_computed.then(|| Scratch { at: k.alloc(DType::F32, rows * words), words, shorts })
    }

    /// Row `row` of x after the prologue, to be read vector by vector.
    pub fn reader(&self, k: &mut KernelBuilder, row: Val) -> RowReader {
        match self {
            Self::Plain { x, stride } => {
                let base = k.param(*x);
                RowReader { x: row_ptr(k, base, row, *stride), norm: None }
            }
            Self::Normed(n) => n.reader(k, row),
        }
    }

    /// Pointers to the given rows of x, after the prologue.
    pub fn load(&self, k: &mut KernelBuilder, scratch: Option<Scratch>, rows: &[Val]) -> Vec<Val> {
        let load = |(i, &row): (u64, &Val)| {
            let reader = self.reader(k, row);
            let Some(scratch) = scratch else {
                assert!(reader.norm.is_none(), "`scratch` gives scratch to rows that are computed");
                return reader.x;
            };
            let i = k.index(i);
            let out = row_ptr(k, scratch.at, i, scratch.words);
            k.for_range(self.stride(), LANES, |k, i| {
                let v = reader.at(k, i);
                k.store(out, i, v);
            });
            if scratch.shorts {
                shorts::write(k, out, self.stride());
            }
            out
        };
        (0..).zip(rows).map(load).collect()
    }
}

/// Scratch for rows that are computed, or rounded to 16 bits behind what they are.
#[derive(Clone, Copy, Debug)]
pub struct Scratch {
    at: Val,
    /// Words of a row.
    words: u64,
    shorts: bool,
}

/// A row of x, and what a norm makes of it: its scale in all lanes, and the stored gain.
#[derive(Clone, Copy, Debug)]
pub struct RowReader {
    x: Val,
    norm: Option<(Val, Val)>,
}

impl RowReader {
    /// The 16 elements from element `i` on: `x`, or `x * rms_scale * (1 + gain)`.
    pub fn at(self, k: &mut KernelBuilder, i: Val) -> Val {
        let v = k.load_f32x16(self.x, i);
        let Some((scale, gain)) = self.norm else { return v };
        let (g, one) = (k.load_f32x16(gain, i), k.splat_f32(16, 1.0));
        let g = k.fadd(g, one);
        let v = k.fmul(v, scale);
        k.fmul(v, g)
    }
}

/// `rsqrt(sum(ssq) / width + eps)` of one row of sums of squares.
pub fn rms_scale(k: &mut KernelBuilder, ssq_row: Val, width: u64, eps: f32) -> Val {
    let zero = k.splat_f32(16, 0.0);
    let (lo, hi) = (k.const_i64(0), k.index(pad(width.div_ceil(LANES))));
    let sum = k.for_carry((lo, hi, LANES), &[zero], |k, i, acc| {
        let part = k.load_f32x16(ssq_row, i);
        vec![k.fadd(acc[0], part)]
    });
    let sum = k.reduce_add(sum[0]);
    mean_rsqrt(k, sum, width, eps)
}

/// `1 / sqrt(sum / width + eps)`.
pub fn mean_rsqrt(k: &mut KernelBuilder, sum: Val, width: u64, eps: f32) -> Val {
    let (width, eps) = (k.const_f32(width as f32), k.const_f32(eps));
    let mean = k.fdiv(sum, width);
    let shifted = k.fadd(mean, eps);
    k.rsqrt(shifted)
}

impl Normed {
    fn reader(&self, k: &mut KernelBuilder, row: Val) -> RowReader {
        let (x, ssq, gain) = (k.param(self.x), k.param(self.ssq), k.param(self.gain));
        let x = row_ptr(k, x, row, pad(self.width));
        let ssq = row_ptr(k, ssq, row, pad(self.width.div_ceil(LANES)));
        let scale = rms_scale(k, ssq, self.width, self.eps);
        RowReader { x, norm: Some((k.splat(scale, 16), gain)) }
    }
}

/// Runs `body` for every row in `lo..hi`: in blocks of `block`, and what is left as one smaller block, so that two or three rows cost one
/// sweep over the weights as well. `body` gets the rows of a block.
pub fn for_rows(
    k: &mut KernelBuilder,
    (lo, hi): (Val, Val),
    block: u64,
    mut body: impl FnMut(&mut KernelBuilder, &[Val]),
) {
    if block == 1 {
        return k.for_each((lo, hi, 1), |k, row| body(k, &[row]));
    }
    let count = k.sub(hi, lo);
    let rest = k.rem_const(count, block);
    let split = k.sub(hi, rest);
    k.for_each((lo, split, block), |k, first| {
        let rows: Vec<Val> = (0..block).map(|i| k.add_const(first, i)).collect();
        body(k, &rows);
    });
    for size in 1..block {
        let expected = k.index(size);
        let is_left = k.cmp(Pred::Eq, rest, expected);
        k.if_then(is_left, |k| {
            let rows: Vec<Val> = (0..size).map(|i| k.add_const(split, i)).collect();
            body(k, &rows);
        });
    }
}

/// Runs `body` for every tile in `lo..hi` of a matrix of `tiles`, `step` at a time; one by one at the end where `step` leaves a rest.
pub fn for_tiles(
    k: &mut KernelBuilder,
    (lo, hi): (Val, Val),
    (tiles, step): (u64, u64),
    mut body: impl FnMut(&mut KernelBuilder, &[Val]),
) {
    if !tiles.is_multiple_of(step) {
        return for_rows(k, (lo, hi), step, body);
    }
    k.for_each((lo, hi, step), |k, first| {
        let block: Vec<Val> = (0..step).map(|i| k.add_const(first, i)).collect();
        body(k, &block);
    });
}

/// What becomes of a tile's dot products: `epilogue(builder, tile, row, value)`.
pub type Epilogue<'a> = dyn FnMut(&mut KernelBuilder, Val, Val, Val) + 'a;

/// Emits one weight's share of a task: tiles `lo..hi` against rows `first..last`.
fn emit_tiles(
    k: &mut KernelBuilder,
    (matrix, weight): (Matrix, Val),
    (rows, scratch): (&Rows, Option<Scratch>),
    (first, last): (Val, Val),
    (lo, hi): (Val, Val),
    tile: MatmulTile,
    epilogue: &mut Epilogue<'_>,
) {
    for_rows(k, (first, last), tile.tokens, |k, block| {
        let x = rows.load(k, scratch, block);
        for_tiles(k, (lo, hi), (matrix.tiles(), tile.row_tiles), |k, tiles| {
            let pointers = matrix.tiles_in_turn(k, weight, tiles);
            let products = dot(k, &pointers, &x);
            for (&t, products) in tiles.iter().zip(products) {
                for (&row, value) in block.iter().zip(products) {
                    epilogue(k, t, row, value);
                }
            }
        });
    });
}

/// What a kernel needs to multiply the rows of a step: all alike, or by their classes.
pub struct Multiplier {
    /// Where rows come from.
    pub rows: Rows,
    sym: Sym,
    tile: MatmulTile,
    classes: Option<Classes>,
    /// Scratch for rows that are computed.
    pub scratch: Option<Scratch>,
    panel: Option<Panel>,
}

impl Multiplier {
    /// For rows of `sym`, which are not multiplied yet; asks for its ports.
    pub fn ports(site: &Site<'_>, ports: &mut Ports, rows: Rows, sym: Sym, matrices: &[Matrix]) -> Self {
        let classes = Classes::ports(site, ports, sym).filter(|classes| matrices.iter().any(|m| classes.takes(m)));
        Self { rows, sym, tile: site.target.matmul_tile(), classes, scratch: None, panel: None }
    }

    /// As [`Multiplier::ports`], for pairs of a gate and an up matrix, all of which are multiplied alike.
    pub fn of_pairs(site: &Site<'_>, ports: &mut Ports, rows: Rows, sym: Sym, pairs: &[[Matrix; 2]]) -> Self {
        let classes =
            Classes::ports(site, ports, sym).filter(|classes| pairs.iter().flatten().all(|m| classes.takes(m)));
        Self { rows, sym, tile: site.target.matmul_tile(), classes, scratch: None, panel: None }
    }

    /// The classes and the panel, where rows are multiplied by their classes.
    pub fn by_class(&self) -> Option<(Classes, Panel)> {
        self.classes.zip(self.panel)
    }

    /// Takes scratch. Call it at the top level of the body.
    pub fn alloc(&mut self, k: &mut KernelBuilder, matrices: &[Matrix]) {
        self.scratch = self.rows.scratch(k, self.tile.tokens, matrices);
        self.panel = self.classes.map(|classes| Panel::alloc(k, classes, matrices));
    }

    /// Task `group` of `tasks`, each with `size` tiles of `matrix`, against all rows.
    pub fn task(
        &self,
        k: &mut KernelBuilder,
        (matrix, weight): (Matrix, Val),
        group: Val,
        (size, tasks): (u64, u64),
        epilogue: &mut Epilogue<'_>,
    ) {
        let range = tile_range(k, group, size, matrix.tiles());
        let by_class = self.by_class().filter(|(classes, _)| classes.takes(&matrix));
        let Some((classes, panel)) = by_class else {
            let all = (k.const_i64(0), k.dim(self.sym));
            return emit_tiles(k, (matrix, weight), (&self.rows, self.scratch), all, range, self.tile, epilogue);
        };
        classes.for_runs(k, Class::Decode, |k, first, last| {
            let rows = (&self.rows, self.scratch);
            emit_tiles(k, (matrix, weight), rows, (first, last), range, self.tile, epilogue);
        });
        let (lo, hi) = classes.range(k, group, (size, tasks), matrix.tiles());
        let some = k.cmp(Pred::Lt, lo, hi);
        k.if_then(some, |k| {
            classes.for_runs(k, Class::Bulk, |k, first, last| {
                let tiles = ((lo, hi), classes.at_once(size));
                panel.emit_tiles(k, (matrix, weight), (&self.rows, first, last), tiles, epilogue);
            });
        });
    }

    /// Task `group` of `tasks`, each with `size` tiles of a gate and an up matrix, against all rows: `swiglu` of both.
    pub fn swiglu_task(
        &self,
        k: &mut KernelBuilder,
        weights: (Weight, Weight),
        group: Val,
        (size, tasks): (u64, u64),
        store: &mut Epilogue<'_>,
    ) {
        let (tiles, zero) = (weights.0.0.tiles(), k.const_i64(0));
        let (lo, hi) = tile_range(k, group, size, tiles);
        let decode = |k: &mut KernelBuilder, rows: (Val, Val), store: &mut Epilogue<'_>| {
            for_rows(k, rows, swiglu_rows(self.tile), |k, block| {
                let x = self.rows.load(k, self.scratch, block);
                emit_swiglu(k, weights, (zero, lo, hi), &x, |k, tile, i, value| store(k, tile, block[i], value));
            });
        };
        let Some((classes, panel)) = self.by_class() else {
            let all = (zero, k.dim(self.sym));
            return decode(k, all, store);
        };
        classes.for_runs(k, Class::Decode, |k, first, last| decode(k, (first, last), store));
        let (lo, hi) = classes.range(k, group, (size, tasks), tiles);
        let some = k.cmp(Pred::Lt, lo, hi);
        k.if_then(some, |k| {
            classes.for_runs(k, Class::Bulk, |k, first, last| {
                panel.for_blocks(k, (first, last), |k, begin, count| {
                    panel.pack(k, &self.rows, count, |k, i| k.add(begin, i));
                    panel.swiglu(k, weights, (zero, (lo, hi), tiles), count, &mut |k, tile, i, value| {
                        let row = k.add(begin, i);
                        store(k, tile, row, value);
                    });
                });
            });
        });
    }
}

/// One weight of a kernel and where its products go.
struct Segment {
    matrix: Matrix,
    weight: Port,
    out: Port,
    out_stride: u64,
}

/// `linear`, `linears`, `norm_linears`: tasks are groups of tiles of one weight after the other.
pub fn lower_linears(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let x = site.named("x");
    let rows = match site.op() {
        nextc_ir::Op::NormLinears => Rows::Normed(Normed::ports(site, &mut ports)?),
        _ => Rows::Plain { x: ports.read("x", x), stride: site.stride(x) },
    };
    let weights = match site.op() {
        nextc_ir::Op::Linear => vec![site.named("w")],
        _ => site.bundle(site.named("ws"))?,
    };
    let in_rank = site.tensor(x).shape.rank() - 1;
    let segments: Vec<Segment> = weights
        .iter()
        .enumerate()
        .map(|(i, &w)| {
            let out = site.result(i as u32);
            Segment {
                matrix: Matrix::of(site, w, in_rank),
                weight: ports.read(&format!("w{i}"), w),
                out: ports.write(&format!("out{i}"), out),
                out_stride: site.stride(out),
            }
        })
        .collect();
    let matrices: Vec<Matrix> = segments.iter().map(|s| s.matrix).collect();
    let mut multiplier = Multiplier::ports(site, &mut ports, rows, site.rows(x)?, &matrices);
    let tasks: Vec<u64> = matrices.iter().map(|m| m.tiles().div_ceil(GROUP_TILES)).collect();
    let all: u64 = tasks.iter().sum();
    let mut k = ports.builder(site, all.into());
    multiplier.alloc(&mut k, &matrices);
    let task = k.task();
    for_parts(&mut k, task, tasks, |k, part, group| {
        let s = &segments[part];
        let (weight, out) = (k.param(s.weight), k.param(s.out));
        multiplier.task(k, (s.matrix, weight), group, (GROUP_TILES, all), &mut |k, t, row, value| {
            store_tile(k, out, s.out_stride, t, row, value);
        });
    });
    Ok(ports.finish(k.finish()))
}

/// `linear_wanted`: tasks are groups of tiles; of a tile that is not wanted only minus infinity is written.
pub fn lower_linear_wanted(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let (x, w, out) = (site.named("x"), site.named("w"), site.result(0));
    let rows = Rows::Plain { x: ports.read("x", x), stride: site.stride(x) };
    let matrix = Matrix::of(site, w, site.tensor(x).shape.rank() - 1);
    let (weight, wanted) = (ports.read("w", w), ports.read("wanted", site.named("wanted")));
    let (out, stride) = (ports.write("out", out), site.stride(out));
    let (sym, tiles, block) = (site.rows(x)?, matrix.tiles(), site.target.matmul_tile().tokens);
    let mut k = ports.builder(site, tiles.div_ceil(GROUP_TILES).into());
    let scratch = rows.scratch(&mut k, block, &[matrix]);
    let task = k.task();
    let (lo, hi) = tile_range(&mut k, task, GROUP_TILES, tiles);
    let (weight, wanted, out) = (k.param(weight), k.param(wanted), k.param(out));
    k.for_each((lo, hi, 1), |k, tile| {
        let (first, last, zero) = (k.const_i64(0), k.dim(sym), k.const_i64(0));
        let flag = k.load_index(wanted, tile);
        let is_wanted = k.cmp(Pred::Ne, flag, zero);
        k.if_else(
            is_wanted,
            |k| {
                let pointer = matrix.tile(k, weight, tile);
                for_rows(k, (first, last), block, |k, block| {
                    let x = rows.load(k, scratch, block);
                    let products = dot(k, &[pointer], &x);
                    for (&row, &value) in block.iter().zip(&products[0]) {
                        store_tile(k, out, stride, tile, row, value);
                    }
                });
                Vec::new()
            },
            |k| {
                let least = k.splat_f32(16, f32::NEG_INFINITY);
                k.for_each((first, last, 1), |k, row| store_tile(k, out, stride, tile, row, least));
                Vec::new()
            },
        );
    });
    Ok(ports.finish(k.finish()))
}

/// Of parts with so many numbers each, one after the other: runs `body(part, number within it)` for the one that has `number`.
pub fn for_parts(
    k: &mut KernelBuilder,
    number: Val,
    counts: impl IntoIterator<Item = u64>,
    mut body: impl FnMut(&mut KernelBuilder, usize, Val),
) {
    let mut begin = 0;
    for (part, count) in counts.into_iter().enumerate() {
        number_in_range(k, number, (begin, begin + count), |k, number| body(k, part, number));
        begin += count;
    }
}

/// Runs `body` with `number - begin` if the number is in `begin..end`.
pub fn number_in_range(
    k: &mut KernelBuilder,
    number: Val,
    (begin, end): (u64, u64),
    body: impl FnOnce(&mut KernelBuilder, Val),
) {
    let (lo, hi) = (k.index(begin), k.index(end));
    let above = k.cmp(Pred::Ge, number, lo);
    k.if_then(above, |k| {
        let below = k.cmp(Pred::Lt, number, hi);
        k.if_then(below, |k| {
            let group = k.sub(number, lo);
            body(k, group);
        });
    });
}

/// The tiles of group `group`: `group * size .. min((group + 1) * size, tiles)`.
pub fn tile_range(k: &mut KernelBuilder, group: Val, size: u64, tiles: u64) -> (Val, Val) {
    let lo = k.mul_const(group, size);
    let end = k.add_const(lo, size);
    let tiles = k.index(tiles);
    (lo, k.min_i64(end, tiles))
}

/// `out[row][tile * 16 ..] = value`.
pub fn store_tile(k: &mut KernelBuilder, out: Val, stride: u64, tile: Val, row: Val, value: Val) {
    let row = row_ptr(k, out, row, stride);
    let column = k.mul_const(tile, LANES);
    k.store(row, column, value);
}

/// The residual stream that an epilogue adds to, and what it writes.
#[derive(Clone, Copy, Debug)]
pub struct Residual {
    residual: Port,
    out: Port,
    ssq: Port,
    width: u64,
}

impl Residual {
    /// The ports of operand `residual` and results 0 and 1 of a node.
    pub fn ports(site: &Site<'_>, ports: &mut Ports) -> Result<Self, LowerError> {
        let residual = site.named("residual");
        let width = site.tensor(residual).shape.last().ok_or_else(|| site.error("a residual of unknown width"))?;
        Ok(Self {
            residual: ports.read("residual", residual),
            out: ports.write("out", site.result(0)),
            ssq: ports.write("ssq_out", site.result(1)),
            width,
        })
    }

    /// Elements of a row of result 0.
    pub fn stride(&self) -> u64 {
        pad(self.width)
    }

    /// The pointer to result 0.
    pub fn out_param(&self, k: &KernelBuilder) -> Val {
        k.param(self.out)
    }

    /// `out = residual + value`, and the tile's sum of squares; the last tile fills the padding of the sums with zeros.
    pub fn store(&self, k: &mut KernelBuilder, tile: Val, row: Val, value: Val) {
        let stride = pad(self.width);
        let (residual, out) = (k.param(self.residual), k.param(self.out));
        let column = k.mul_const(tile, LANES);
        let from = row_ptr(k, residual, row, stride);
        let old = k.load_f32x16(from, column);
        let new = k.fadd(old, value);
        store_tile(k, out, stride, tile, row, new);
        let square = k.fmul(new, new);
        let sum = k.reduce_add(square);
        self.store_sum(k, tile, row, sum);
    }

    /// `residual[row][column]`.
    pub fn load_one(&self, k: &mut KernelBuilder, row: Val, column: Val) -> Val {
        let residual = k.param(self.residual);
        let residual = row_ptr(k, residual, row, pad(self.width));
        k.load_f32(residual, column)
    }

    /// `out[row][column] = old + value`; gives the new value.
    pub fn add_one(&self, k: &mut KernelBuilder, (row, column): (Val, Val), old: Val, value: Val) -> Val {
        let out = k.param(self.out);
        let out = row_ptr(k, out, row, pad(self.width));
        let new = k.fadd(old, value);
        k.store(out, column, new);
        new
    }

    /// The sum of squares of a tile of a row; the last tile fills the padding of the sums with zeros.
    pub fn store_sum(&self, k: &mut KernelBuilder, tile: Val, row: Val, sum: Val) {
        let (parts, ssq) = (self.width.div_ceil(LANES), k.param(self.ssq));
        let ssq_row = row_ptr(k, ssq, row, pad(parts));
        k.store(ssq_row, tile, sum);
        if !parts.is_multiple_of(LANES) {
            let last = k.index(parts - 1);
            let is_last = k.cmp(Pred::Eq, tile, last);
            k.if_then(is_last, |k| zero_padding(k, ssq_row, parts));
        }
    }
}

/// Zeros in the padding of a row of `width` elements.
pub fn zero_padding(k: &mut KernelBuilder, row: Val, width: u64) {
    let zero = k.const_f32(0.0);
    for i in width..pad(width) {
        let i = k.index(i);
        k.store(row, i, zero);
    }
}

/// `linear_residual`.
pub fn lower_linear_residual(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let (x, w) = (site.named("x"), site.named("w"));
    let rows = Rows::Plain { x: ports.read("x", x), stride: site.stride(x) };
    let matrix = Matrix::of(site, w, site.tensor(x).shape.rank() - 1);
    let weight = ports.read("w", w);
    let residual = Residual::ports(site, &mut ports)?;
    let mut multiplier = Multiplier::ports(site, &mut ports, rows, site.rows(x)?, &[matrix]);
    let size = group_tiles(site.target);
    let tasks = matrix.tiles().div_ceil(size);
    let mut k = ports.builder(site, tasks.into());
    multiplier.alloc(&mut k, &[matrix]);
    let (task, weight) = (k.task(), k.param(weight));
    multiplier.task(&mut k, (matrix, weight), task, (size, tasks), &mut |k, t, row, value| {
        residual.store(k, t, row, value);
    });
    Ok(ports.finish(k.finish()))
}

/// Tiles of one task where a matrix has few: as many as the micro-kernel takes at once, or as many as are worth rounding a row for.
pub fn group_tiles(target: &Target) -> u64 {
    if target.rounds_to_shorts() { GROUP_TILES } else { target.matmul_tile().row_tiles.max(2) }
}

/// A matrix and the pointer to its weight.
pub type Weight = (Matrix, Val);

/// Emits `swiglu` of gate and up tiles `lo..hi` for one block of rows: `store(builder, tile, row index in block, value)`. Tiles are
/// counted from tile `begin` of both matrices on.
pub fn emit_swiglu(
    k: &mut KernelBuilder,
    ((gate, gate_at), (up, up_at)): (Weight, Weight),
    (begin, lo, hi): (Val, Val, Val),
    x: &[Val],
    mut store: impl FnMut(&mut KernelBuilder, Val, usize, Val),
) {
    k.for_each((lo, hi, 1), |k, tile| {
        let number = k.add(begin, tile);
        let pair = [(gate, gate_at), (up, up_at)].map(|(matrix, at)| matrix.tiles_in_turn(k, at, &[number])[0]);
        let products = dot(k, &pair, x);
        for (i, (&g, &u)) in products[0].iter().zip(&products[1]).enumerate() {
            let g = k.silu(g);
            let value = k.fmul(g, u);
            store(k, tile, i, value);
        }
    });
}

/// Rows of a block in kernels that compute gate and up together: half as many as two tiles take.
pub fn swiglu_rows(tile: MatmulTile) -> u64 {
    (tile.tokens * tile.row_tiles / 2).max(1)
}

/// `norm_swiglu`: the front of a dense FFN.
pub fn lower_norm_swiglu(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let rows = Rows::Normed(Normed::ports(site, &mut ports)?);
    let (gate, up) = (site.named("w_gate"), site.named("w_up"));
    let matrices = (Matrix::of(site, gate, 1), Matrix::of(site, up, 1));
    let tiles = matrices.0.tiles();
    let (gate, up) = (ports.read("w_gate", gate), ports.read("w_up", up));
    let result = site.result(0);
    let (out, stride) = (ports.write("out", result), site.stride(result));
    let both = [matrices.0, matrices.1];
    let mut multiplier = Multiplier::of_pairs(site, &mut ports, rows, site.rows(result)?, &[both]);
    let tasks = tiles.div_ceil(GROUP_TILES);
    let mut k = ports.builder(site, tasks.into());
    multiplier.alloc(&mut k, &both);
    let (task, gate, up, out) = (k.task(), k.param(gate), k.param(up), k.param(out));
    let weights = ((matrices.0, gate), (matrices.1, up));
    multiplier.swiglu_task(&mut k, weights, task, (GROUP_TILES, tasks), &mut |k, tile, row, value| {
        store_tile(k, out, stride, tile, row, value);
    });
    Ok(ports.finish(k.finish()))
}
