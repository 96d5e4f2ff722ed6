//! The packer: streams weights through their layouts into a file.
//!
//! The file begins with a [`WeightsHeader`] page; weights follow, each at a multiple of 64 bytes, large ones at a page.
//! Work is cut into blocks of [`BLOCK_BYTES`] packed bytes, which the threads claim in the order of the file, so that
//! memory stays bounded whatever the checkpoint and the disk sees a nearly sequential stream. Each weight gets the blocked
//! hash of its bytes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use indicatif::{ProgressBar, ProgressStyle};
use nextc_abi::hash::{self, BLOCK_BYTES, Hash};
use nextc_abi::weights::HEADER_BYTES;
use nextc_abi::{PAGE_BYTES, WeightsHeader, align_up};
use nextc_ir::dtype::DType;
use nextc_ir::layout::{Layout, flat_dims, tile_shape};
use nextc_ir::schedule::PackedWeight;
use nextc_ir::shape::{LANES, pad};
use nextc_ir::source::WeightSource;

use crate::error::LinkError;
use crate::rows::Rows;

/// Weights of this size and more begin at a page.
const LARGE_BYTES: u64 = 1 << 20;

/// Where each weight lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Offset of each weight from the header's beginning.
    pub offsets: Vec<u64>,
    /// Bytes of everything, header and padding included.
    pub bytes: u64,
}

/// Places the weights one after the other, in the order of the table.
pub fn place(weights: &[PackedWeight]) -> Placement {
    let mut at = HEADER_BYTES;
    let mut offsets = Vec::with_capacity(weights.len());
    for w in weights {
        let bytes = w.bytes();
        at = align_up(at, if bytes >= LARGE_BYTES { PAGE_BYTES } else { 64 });
        offsets.push(at);
        at += bytes;
    }
    Placement { offsets, bytes: align_up(at, PAGE_BYTES) }
}

/// What packing found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// Blocked hash of each weight.
    pub checksums: Vec<Hash>,
    /// Fingerprint of names, layouts and contents.
    pub fingerprint: Hash,
}

/// Writes the weights to `file` from `base` on.
/// # Errors
/// [`LinkError`] if a weight's origin does not fit it, or reading or writing fails.
pub fn pack(
    weights: &[PackedWeight],
    source: &dyn WeightSource,
    (file, path): (&File, &Path),
    base: u64,
    progress: bool,
) -> Result<Packed, LinkError> {
    let placement = place(weights);
    let blocks = blocks(weights, &placement);
    file.set_len(base + placement.bytes).map_err(LinkError::io(path))?;
    let packer =
        Packer { weights, source, file, path, base, blocks: &blocks, bar: progress_bar(placement.bytes, progress) };
    let hashes = packer.run()?;
    packer.bar.finish_and_clear();
    let packed = summarise(weights, &blocks, &hashes);
    let header = WeightsHeader::new(weights.len() as u32, placement.bytes, packed.fingerprint);
    file.write_all_at(header.as_bytes(), base).map_err(LinkError::io(path))?;
    Ok(packed)
}

/// The fingerprint of weights: of their names, shapes, formats, layouts and checksums.
fn summarise(weights: &[PackedWeight], blocks: &[Block], hashes: &[Hash]) -> Packed {
    let mut of_weight: Vec<Vec<Hash>> = vec![Vec::new(); weights.len()];
    for (block, hash) in blocks.iter().zip(hashes) {
        of_weight[block.weight].push(*hash);
    }
    let checksums: Vec<Hash> = of_weight.into_iter().map(hash::of_blocks).collect();
    let lines = weights.iter().zip(&checksums).map(|(w, checksum)| {
        let (shape, in_rank) = (&w.decl.shape, w.decl.in_rank);
        format!("{} {shape:?} {in_rank} {} {} {}", w.name, w.decl.format, w.layout, nextc_abi::to_hex(checksum))
    });
    let lines: Vec<String> = lines.collect();
    Packed { fingerprint: hash::of_parts(lines.iter().map(String::as_bytes)), checksums }
}

/// [`BLOCK_BYTES`] of one weight (fewer at its end).
#[derive(Clone, Copy, Debug)]
struct Block {
    weight: usize,
    /// First byte of the weight that it holds.
    first: u64,
    bytes: u64,
    /// Where it goes, from the header's beginning.
    offset: u64,
}

fn blocks(weights: &[PackedWeight], placement: &Placement) -> Vec<Block> {
    let mut blocks = Vec::new();
    for (weight, (w, &offset)) in weights.iter().zip(&placement.offsets).enumerate() {
        let total = w.bytes();
        for first in (0..total).step_by(BLOCK_BYTES as usize) {
            blocks.push(Block { weight, first, bytes: BLOCK_BYTES.min(total - first), offset: offset + first });
        }
    }
    blocks
}

fn progress_bar(bytes: u64, shown: bool) -> ProgressBar {
    if !shown {
        return ProgressBar::hidden();
    }
    let style =
        ProgressStyle::with_template("packing weights {wide_bar} {bytes} / {total_bytes}  {bytes_per_sec}  {eta}");
    ProgressBar::new(bytes).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

struct Packer<'a> {
    weights: &'a [PackedWeight],
    source: &'a dyn WeightSource,
    file: &'a File,
    path: &'a Path,
    base: u64,
    blocks: &'a [Block],
    bar: ProgressBar,
}

/// Working memory of one thread.
#[derive(Default)]
struct Buffers {
    packed: Vec<u8>,
    rows: Vec<f32>,
    stored: Vec<f32>,
}

impl Packer<'_> {
    /// Packs all blocks and gives their hashes.
    fn run(&self) -> Result<Vec<Hash>, LinkError> {
        let opened = self.weights.iter().map(|w| Rows::open(&w.name, &w.decl, self.source));
        let opened = opened.collect::<Result<Vec<_>, _>>()?;
        let hashes = Mutex::new(vec![[0; 32]; self.blocks.len()]);
        let (next, failed, error) = (AtomicUsize::new(0), AtomicBool::new(false), Mutex::new(None));
        rayon::broadcast(|_| {
            let mut buffers = Buffers::default();
            while !failed.load(Ordering::Relaxed) {
                let i = next.fetch_add(1, Ordering::Relaxed);
                let Some(block) = self.blocks.get(i) else { break };
                match self.pack_block(block, &opened[block.weight], &mut buffers) {
                    Ok(hash) => hashes.lock().expect("no thread panics with the lock")[i] = hash,
                    Err(e) => {
                        failed.store(true, Ordering::Relaxed);
                        error.lock().expect("no thread panics with the lock").get_or_insert(e);
                    }
                }
            }
        });
        match error.into_inner().expect("no thread panics with the lock") {
            Some(e) => Err(e),
            None => Ok(hashes.into_inner().expect("no thread panics with the lock")),
        }
    }

    fn pack_block(&self, block: &Block, rows: &Rows<'_>, buffers: &mut Buffers) -> Result<Hash, LinkError> {
        let weight = &self.weights[block.weight];
        match weight.layout {
            Layout::Flat => pack_flat(weight, block, rows, buffers)?,
            Layout::Tile16 => pack_tiles(weight, block, rows, buffers)?,
        }
        self.file.write_all_at(&buffers.packed, self.base + block.offset).map_err(LinkError::io(self.path))?;
        self.bar.inc(block.bytes);
        Ok(hash::of(&buffers.packed))
    }
}

/// Widened to f32, rows padded; convolutions transposed.
fn pack_flat(weight: &PackedWeight, block: &Block, rows: &Rows<'_>, buffers: &mut Buffers) -> Result<(), LinkError> {
    let shape = &weight.decl.shape;
    buffers.rows.resize(shape.iter().product::<u64>() as usize, 0.0);
    rows.read(0, &mut buffers.rows, &mut buffers.stored)?;
    let mut flat = vec![0f32; flat_dims(shape, weight.decl.in_rank).iter().product::<u64>() as usize];
    match *shape.as_slice() {
        [heads, width, taps] if weight.decl.in_rank == 0 => {
            transpose_taps(&buffers.rows, &mut flat, [heads as usize, width as usize, taps as usize]);
        }
        _ => {
            let width = shape.last().copied().unwrap_or(1) as usize;
            pad_rows(&buffers.rows, &mut flat, width, pad(width as u64) as usize);
        }
    }
    buffers.packed.clear();
    buffers.packed.extend(flat.iter().flat_map(|x| x.to_le_bytes()));
    buffers.packed.drain(..block.first as usize);
    buffers.packed.truncate(block.bytes as usize);
    Ok(())
}

/// `[heads, width, taps]` to `[taps, heads, pad(width)]`.
fn transpose_taps(from: &[f32], to: &mut [f32], [heads, width, taps]: [usize; 3]) {
    let padded = pad(width as u64) as usize;
    for head in 0..heads {
        for j in 0..width {
            for tap in 0..taps {
                to[(tap * heads + head) * padded + j] = from[(head * width + j) * taps + tap];
            }
        }
    }
}

/// Copies rows of `width` into rows of `padded`, which are zero.
fn pad_rows(from: &[f32], to: &mut [f32], width: usize, padded: usize) {
    for (from, to) in from.chunks_exact(width).zip(to.chunks_exact_mut(padded)) {
        to[..width].copy_from_slice(from);
    }
}

/// The tiles that the block touches, of which the block's bytes are kept.
fn pack_tiles(weight: &PackedWeight, block: &Block, rows: &Rows<'_>, buffers: &mut Buffers) -> Result<(), LinkError> {
    let decl = &weight.decl;
    let shape = tile_shape(decl.out_dims(), decl.in_dims(), decl.format);
    let tiles = block.first / shape.tile_bytes..(block.first + block.bytes).div_ceil(shape.tile_bytes);
    let runs = TileRows::new(decl.out_dims());
    let (first, end) = (runs.of(tiles.start).start, runs.of(tiles.end - 1).end);
    let columns = rows.columns as usize;
    buffers.rows.resize((end - first) as usize * columns, 0.0);
    rows.read(first, &mut buffers.rows, &mut buffers.stored)?;
    let width = decl.in_dims().last().copied().unwrap_or(1);
    let mut padded = Vec::new();
    buffers.packed.clear();
    for tile in tiles.clone() {
        let own = runs.of(tile);
        let own = &buffers.rows[(own.start - first) as usize * columns..(own.end - first) as usize * columns];
        padded.clear();
        padded.resize((LANES * shape.columns) as usize, 0.0);
        pad_rows(own, &mut padded, width as usize, pad(width) as usize);
        encode_tile(decl.format.def().dtype, &padded, shape.columns as usize, &mut buffers.packed);
    }
    buffers.packed.drain(..(block.first - tiles.start * shape.tile_bytes) as usize);
    buffers.packed.truncate(block.bytes as usize);
    Ok(())
}

/// Which rows of a matrix a tile holds: the innermost output dimension is padded to whole tiles.
struct TileRows {
    inner: u64,
    tiles_per_inner: u64,
}

impl TileRows {
    fn new(out_dims: &[u64]) -> Self {
        let inner = out_dims.last().copied().unwrap_or(1);
        Self { inner, tiles_per_inner: pad(inner) / LANES }
    }

    fn of(&self, tile: u64) -> std::ops::Range<u64> {
        let (outer, inner) = (tile / self.tiles_per_inner, tile % self.tiles_per_inner * LANES);
        let begin = outer * self.inner;
        begin + inner..begin + (inner + LANES).min(self.inner)
    }
}

/// Appends a tile of 16 rows of `columns` numbers: see [`nextc_ir::layout::tile_offset_bytes`].
fn encode_tile(dtype: DType, rows: &[f32], columns: usize, out: &mut Vec<u8>) {
    let lanes: [&[f32]; LANES as usize] = std::array::from_fn(|lane| &rows[lane * columns..(lane + 1) * columns]);
    match dtype {
        DType::F32 => {
            for i in 0..columns {
                let column: [[u8; 4]; LANES as usize] = lanes.map(|lane| lane[i].to_le_bytes());
                out.extend_from_slice(column.as_flattened());
            }
        }
        DType::F16 => encode_pairs(lanes, columns, out, |x| half::f16::from_f32(x).to_bits()),
        _ => encode_pairs(lanes, columns, out, |x| half::bf16::from_f32(x).to_bits()),
    }
}

#[inline(always)]
fn encode_pairs(lanes: [&[f32]; LANES as usize], columns: usize, out: &mut Vec<u8>, encode: impl Fn(f32) -> u16) {
    for column in (0..columns).step_by(2) {
        let pairs: [[u8; 4]; LANES as usize] = std::array::from_fn(|lane| {
            let (even, odd) = (encode(lanes[lane][column]), encode(lanes[lane][column + 1]));
            (u32::from(even) | u32::from(odd) << 16).to_le_bytes()
        });
        out.extend_from_slice(pairs.as_flattened());
    }
}
