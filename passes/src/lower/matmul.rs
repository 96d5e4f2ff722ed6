//! `matmul`: rows of activations by tiles of 16 weight rows, the skeleton of every projection.
//!
//! task     a group of row tiles of one weight, over all rows of the step; rows in blocks, the last one smaller
//! prologue the rows as they are, or normalised into scratch
//! dot      per 16 weight rows and row of x: `even += w[2j] x[2j]`, `odd += w[2j+1] x[2j+1]` over j, then `even + odd`
//! epilogue store; or residual + store + sum of squares; or SwiGLU of a gate and an up tile
//! traffic  each weight once a block of rows (bound by memory at one row, by FMAs at many)
//!
//! The order of a row's sums depends on neither T nor the block, so a token has the same bits alone and among others.

use nextc_ir::format::Format;
use nextc_ir::graph::Value;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::layout::{TileShape, tile_shape};
use nextc_ir::shape::{LANES, Sym, pad};
use nextc_ir::target::MatmulTile;
use nextc_ir::{DType, Target};

use super::LowerError;
use super::ports::{Lowered, Port, Ports, Site};

/// Row tiles of one task, for matrices of many rows.
pub const GROUP_TILES: u64 = 4;
/// Pairs of columns in one turn of the inner loop.
const UNROLL_PAIRS: u64 = 2;

/// A weight matrix as packed.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// Its tiles.
    pub shape: TileShape,
    /// How its numbers are stored.
    pub format: Format,
}

impl Matrix {
    /// The matrix of a weight whose innermost `in_rank` dimensions are inputs. Experts are further rows.
    pub fn of(site: &Site<'_>, weight: Value, in_rank: usize) -> Self {
        let w = site.weight(weight);
        let split = w.shape.len() - in_rank;
        Self { shape: tile_shape(&w.shape[..split], &w.shape[split..], w.format), format: w.format }
    }

    /// Pointer to tile `tile`.
    pub fn tile(&self, k: &mut KernelBuilder, base: Val, tile: Val) -> Val {
        let bytes = k.mul_const(tile, self.shape.tile_bytes);
        k.offset(base, bytes)
    }
}

/// Dot products of every tile with every row: `[tile][row]`, each a vector of 16 weight rows.
pub fn dot(k: &mut KernelBuilder, tiles: &[(Val, Format)], rows: &[Val], columns: u64) -> Vec<Vec<Val>> {
    let zero = k.splat_f32(16, 0.0);
    let init = vec![zero; 2 * tiles.len() * rows.len()];
    let (lo, hi) = (k.const_i64(0), k.index(columns / 2));
    let sums = k.for_carry((lo, hi, UNROLL_PAIRS), &init, |k, first, carried| {
        let mut acc = carried.to_vec();
        for u in 0..UNROLL_PAIRS {
            let pair = k.add_const(first, u);
            let column = k.mul_const(pair, 2);
            let x: Vec<(Val, Val)> = rows.iter().map(|&row| load_two(k, row, column)).collect();
            for (i, &(tile, format)) in tiles.iter().enumerate() {
                let (even, odd) = (format.def().load_pair)(k, tile, pair);
                for (j, &(x0, x1)) in x.iter().enumerate() {
                    let at = 2 * (i * rows.len() + j);
                    acc[at] = k.fma(even, x0, acc[at]);
                    acc[at + 1] = k.fma(odd, x1, acc[at + 1]);
                }
            }
        }
        acc
    });
    let each = |i: usize, j: usize| 2 * (i * rows.len() + j);
    (0..tiles.len())
        .map(|i| (0..rows.len()).map(|j| k.fadd(sums[each(i, j)], sums[each(i, j) + 1])).collect())
        .collect()
}

/// Columns `column` and `column + 1` of a row, each in all lanes.
fn load_two(k: &mut KernelBuilder, row: Val, column: Val) -> (Val, Val) {
    let next = k.add_const(column, 1);
    let (a, b) = (k.load_f32(row, column), k.load_f32(row, next));
    (k.splat(a, 16), k.splat(b, 16))
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
    /// Elements of a row as stored.
    pub fn stride(&self) -> u64 {
        match self {
            Self::Plain { stride, .. } => *stride,
            Self::Normed(n) => pad(n.width),
        }
    }

    /// Scratch for a block of `rows` rows, if the rows are computed.
    pub fn scratch(&self, k: &mut KernelBuilder, rows: u64) -> Option<Val> {
        match self {
            Self::Plain { .. } => None,
            Self::Normed(_) => Some(k.alloc(DType::F32, rows * self.stride())),
        }
    }

    /// Pointers to the given rows of x, after the prologue.
    pub fn load(&self, k: &mut KernelBuilder, scratch: Option<Val>, rows: &[Val]) -> Vec<Val> {
        rows.iter()
            .enumerate()
            .map(|(i, &row)| match (self, scratch) {
                (Self::Normed(n), Some(scratch)) => {
                    let i = k.index(i as u64);
                    let out = row_ptr(k, scratch, i, self.stride());
                    normalise(k, n, row, out);
                    out
                }
                (Self::Plain { x, stride }, _) => {
                    let base = k.param(*x);
                    row_ptr(k, base, row, *stride)
                }
                (Self::Normed(_), None) => unreachable!("`scratch` gives scratch to rows that are computed"),
            })
            .collect()
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

/// `out = x[row] * rms_scale * (1 + gain)`.
fn normalise(k: &mut KernelBuilder, n: &Normed, row: Val, out: Val) {
    let stride = pad(n.width);
    let (x, ssq, gain) = (k.param(n.x), k.param(n.ssq), k.param(n.gain));
    let x = row_ptr(k, x, row, stride);
    let ssq = row_ptr(k, ssq, row, pad(n.width.div_ceil(LANES)));
    let scale = rms_scale(k, ssq, n.width, n.eps);
    let scale = k.splat(scale, 16);
    let one = k.splat_f32(16, 1.0);
    k.for_range(stride, LANES, |k, i| {
        let (v, g) = (k.load_f32x16(x, i), k.load_f32x16(gain, i));
        let g = k.fadd(g, one);
        let v = k.fmul(v, scale);
        let v = k.fmul(v, g);
        k.store(out, i, v);
    });
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
fn for_tiles(
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
type Epilogue<'a> = dyn FnMut(&mut KernelBuilder, Val, Val, Val) + 'a;

/// Emits one weight's share of a task: tiles `lo..hi` against all rows of the step.
fn emit_tiles(
    k: &mut KernelBuilder,
    (matrix, weight): (Matrix, Val),
    (rows, scratch, sym): (&Rows, Option<Val>, Sym),
    (lo, hi): (Val, Val),
    tile: MatmulTile,
    epilogue: &mut Epilogue<'_>,
) {
    let (first, last) = (k.const_i64(0), k.dim(sym));
    for_rows(k, (first, last), tile.tokens, |k, block| {
        let x = rows.load(k, scratch, block);
        for_tiles(k, (lo, hi), (matrix.shape.tiles, tile.row_tiles), |k, tiles| {
            let pointers: Vec<_> = tiles.iter().map(|&t| (matrix.tile(k, weight, t), matrix.format)).collect();
            let products = dot(k, &pointers, &x, matrix.shape.columns);
            for (&t, products) in tiles.iter().zip(products) {
                for (&row, value) in block.iter().zip(products) {
                    epilogue(k, t, row, value);
                }
            }
        });
    });
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
    let sym = site.rows(x)?;
    let tasks: u64 = segments.iter().map(|s| s.matrix.shape.tiles.div_ceil(GROUP_TILES)).sum();
    let mut k = ports.builder(site, tasks.into());
    let tile = site.target.matmul_tile();
    let scratch = rows.scratch(&mut k, tile.tokens);
    let mut begin = 0;
    for s in &segments {
        let tasks = s.matrix.shape.tiles.div_ceil(GROUP_TILES);
        in_range(&mut k, begin, begin + tasks, |k, group| {
            let range = tile_range(k, group, GROUP_TILES, s.matrix.shape.tiles);
            let (weight, out) = (k.param(s.weight), k.param(s.out));
            emit_tiles(k, (s.matrix, weight), (&rows, scratch, sym), range, tile, &mut |k, t, row, value| {
                store_tile(k, out, s.out_stride, t, row, value);
            });
        });
        begin += tasks;
    }
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
    let (sym, tiles, block) = (site.rows(x)?, matrix.shape.tiles, site.target.matmul_tile().tokens);
    let mut k = ports.builder(site, tiles.div_ceil(GROUP_TILES).into());
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
                    let x = rows.load(k, None, block);
                    let products = dot(k, &[(pointer, matrix.format)], &x, matrix.shape.columns);
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

/// Runs `body` with `task - begin` if the task is in `begin..end`.
pub fn in_range(k: &mut KernelBuilder, begin: u64, end: u64, body: impl FnOnce(&mut KernelBuilder, Val)) {
    let (task, lo, hi) = (k.task(), k.index(begin), k.index(end));
    let above = k.cmp(Pred::Ge, task, lo);
    k.if_then(above, |k| {
        let below = k.cmp(Pred::Lt, task, hi);
        k.if_then(below, |k| {
            let group = k.sub(task, lo);
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

    /// The pointer to result 0.
    pub fn out_param(&self, k: &KernelBuilder) -> Val {
        k.param(self.out)
    }

    /// `out = residual + value`, and the tile's sum of squares; the last tile fills the padding of the sums with zeros.
    pub fn store(&self, k: &mut KernelBuilder, tile: Val, row: Val, value: Val) {
        let (stride, parts) = (pad(self.width), self.width.div_ceil(LANES));
        let (residual, out, ssq) = (k.param(self.residual), k.param(self.out), k.param(self.ssq));
        let column = k.mul_const(tile, LANES);
        let from = row_ptr(k, residual, row, stride);
        let old = k.load_f32x16(from, column);
        let new = k.fadd(old, value);
        store_tile(k, out, stride, tile, row, new);
        let square = k.fmul(new, new);
        let sum = k.reduce_add(square);
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
    let sym = site.rows(x)?;
    let size = group_tiles(site.target);
    let mut k = ports.builder(site, matrix.shape.tiles.div_ceil(size).into());
    let task = k.task();
    let range = tile_range(&mut k, task, size, matrix.shape.tiles);
    let weight = k.param(weight);
    let tile = site.target.matmul_tile();
    emit_tiles(&mut k, (matrix, weight), (&rows, None, sym), range, tile, &mut |k, t, row, value| {
        residual.store(k, t, row, value);
    });
    Ok(ports.finish(k.finish()))
}

/// Tiles of one task where a matrix has few: as many as the micro-kernel takes at once.
pub fn group_tiles(target: &Target) -> u64 {
    target.matmul_tile().row_tiles.max(2)
}

/// Emits `swiglu` of gate and up tiles `lo..hi` for one block of rows: `store(builder, tile, row index in block, value)`.
pub fn emit_swiglu(
    k: &mut KernelBuilder,
    matrix: Matrix,
    (gate, up): (Val, Val),
    (lo, hi): (Val, Val),
    x: &[Val],
    mut store: impl FnMut(&mut KernelBuilder, Val, usize, Val),
) {
    k.for_each((lo, hi, 1), |k, tile| {
        let pair = [(matrix.tile(k, gate, tile), matrix.format), (matrix.tile(k, up, tile), matrix.format)];
        let products = dot(k, &pair, x, matrix.shape.columns);
        for (i, (&g, &u)) in products[0].iter().zip(&products[1]).enumerate() {
            let g = k.silu(g);
            let value = k.fmul(g, u);
            store(k, tile, i, value);
        }
    });
}

/// Rows of a block in kernels that compute gate and up together: half as many as two tiles take.
pub fn swiglu_rows(target: &Target) -> u64 {
    let tile = target.matmul_tile();
    (tile.tokens * tile.row_tiles / 2).max(1)
}

/// `norm_swiglu`: the front of a dense FFN.
pub fn lower_norm_swiglu(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let rows = Rows::Normed(Normed::ports(site, &mut ports)?);
    let (gate, up) = (site.named("w_gate"), site.named("w_up"));
    let matrix = Matrix::of(site, gate, 1);
    if Matrix::of(site, up, 1).format != matrix.format {
        return Err(site.error("`w_gate` and `w_up` in different formats"));
    }
    let (gate, up) = (ports.read("w_gate", gate), ports.read("w_up", up));
    let result = site.result(0);
    let out = ports.write("out", result);
    let (sym, stride) = (site.rows(result)?, site.stride(result));
    let mut k = ports.builder(site, matrix.shape.tiles.div_ceil(GROUP_TILES).into());
    let block = swiglu_rows(site.target);
    let scratch = rows.scratch(&mut k, block);
    let task = k.task();
    let range = tile_range(&mut k, task, GROUP_TILES, matrix.shape.tiles);
    let (gate, up, out) = (k.param(gate), k.param(up), k.param(out));
    let (first, last) = (k.const_i64(0), k.dim(sym));
    for_rows(&mut k, (first, last), block, |k, block| {
        let x = rows.load(k, scratch, block);
        emit_swiglu(k, matrix, (gate, up), range, &x, |k, tile, i, value| {
            store_tile(k, out, stride, tile, block[i], value);
        });
    });
    Ok(ports.finish(k.finish()))
}
