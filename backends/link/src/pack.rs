//! The packer: streams weights through their layouts into a file.
//!
//! The file begins with a [`WeightsHeader`] page; weights follow, each at a multiple of 64 bytes, large ones at a page.
//! Work is cut into blocks of [`BLOCK_BYTES`] packed bytes, which the threads claim in the order of the file, so that
//! memory stays bounded whatever the checkpoint and the disk sees a nearly sequential stream. Each weight gets the blocked
//! hash of its bytes. Of a scaled weight only the codes are cut into blocks; scales come into being with them, are kept, and
//! written when the weight's last codes are done.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use indicatif::{ProgressBar, ProgressStyle};
use nextc_abi::hash::{self, BLOCK_BYTES, Hash};
use nextc_abi::weights::HEADER_BYTES;
use nextc_abi::{PAGE_BYTES, WeightsHeader, align_up};
use nextc_ir::Format;
use nextc_ir::format::codes::Codes;
use nextc_ir::layout::{Layout, Planes, flat_dims};
use nextc_ir::rows::{Buffers as RowBuffers, Rows};
use nextc_ir::schedule::PackedWeight;
use nextc_ir::shape::{LANES, pad};
use nextc_ir::source::WeightSource;

use crate::error::LinkError;
use crate::tiles::{self, Arrangement, TileRows};

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
    let bar = progress_bar(placement.bytes, progress);
    let tails = weights.iter().map(Tail::new).collect::<Vec<_>>();
    let hashes = weights.iter().map(|w| vec![[0; 32]; w.bytes().div_ceil(BLOCK_BYTES) as usize]).collect();
    let packer = Packer { weights, source, file, path, base, blocks: &blocks, tails, hashes: Mutex::new(hashes), bar };
    let hashes = packer.run()?;
    let packed = summarise(weights, hashes);
    let header = WeightsHeader::new(weights.len() as u32, placement.bytes, packed.fingerprint);
    file.write_all_at(header.as_bytes(), base).map_err(LinkError::io(path))?;
    Ok(packed)
}

/// The fingerprint of weights: of their names, shapes, formats, layouts and checksums.
fn summarise(weights: &[PackedWeight], hashes: Vec<Vec<Hash>>) -> Packed {
    let checksums: Vec<Hash> = hashes.into_iter().map(hash::of_blocks).collect();
    let lines = weights.iter().zip(&checksums).map(|(w, checksum)| {
        let (shape, in_rank) = (&w.decl.shape, w.decl.in_rank);
        format!("{} {shape:?} {in_rank} {} {} {}", w.name, w.decl.format, w.layout, nextc_abi::to_hex(checksum))
    });
    let lines: Vec<String> = lines.collect();
    Packed { fingerprint: hash::of_parts(lines.iter().map(String::as_bytes)), checksums }
}

/// [`BLOCK_BYTES`] of one weight (fewer at its end); of a scaled weight, of its codes.
#[derive(Clone, Copy, Debug)]
struct Block {
    /// Which weight.
    weight: usize,
    /// First byte of the weight that it holds.
    first: u64,
    bytes: u64,
    /// Where the weight begins, from the header's beginning.
    offset: u64,
}

/// The planes of a scaled weight.
fn scaled(weight: &PackedWeight) -> Option<Planes> {
    weight.decl.format.blocks().filter(|_| weight.layout != Layout::Flat).map(|_| weight.planes())
}

fn blocks(weights: &[PackedWeight], placement: &Placement) -> Vec<Block> {
    let mut blocks = Vec::new();
    for (weight, (w, &offset)) in weights.iter().zip(&placement.offsets).enumerate() {
        let total = scaled(w).map_or_else(|| w.bytes(), |planes| planes.code_bytes());
        for first in (0..total).step_by(BLOCK_BYTES as usize) {
            blocks.push(Block { weight, first, bytes: BLOCK_BYTES.min(total - first), offset });
        }
    }
    blocks
}

/// What of a scaled weight is kept until all its codes are done: the codes behind the last whole block, and the other planes.
#[derive(Debug, Default)]
struct Tail {
    /// First byte of the weight that it holds.
    first: u64,
    /// Blocks of codes that are not done.
    left: AtomicUsize,
    /// The bytes; none before the first block of codes is done.
    bytes: Mutex<Vec<u8>>,
}

impl Tail {
    fn new(weight: &PackedWeight) -> Self {
        let Some(planes) = scaled(weight) else { return Self::default() };
        let own = planes.code_bytes().div_ceil(BLOCK_BYTES);
        Self {
            first: planes.code_bytes() / BLOCK_BYTES * BLOCK_BYTES,
            left: AtomicUsize::new(own as usize),
            ..Self::default()
        }
    }

    /// Puts bytes of the weight at `at`.
    fn put(&self, weight: &PackedWeight, at: u64, bytes: &[u8]) {
        let mut kept = self.bytes.lock().expect("no thread panics with the lock");
        kept.resize((weight.bytes() - self.first) as usize, 0);
        let at = (at - self.first) as usize;
        kept[at..at + bytes.len()].copy_from_slice(bytes);
    }
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
    tails: Vec<Tail>,
    hashes: Mutex<Vec<Vec<Hash>>>,
    bar: ProgressBar,
}

/// Working memory of one thread.
#[derive(Default)]
struct Buffers {
    packed: Vec<u8>,
    scales: Vec<u8>,
    units: Vec<u8>,
    numbers: Vec<f32>,
    codes: Codes,
    rows: RowBuffers,
}

impl Packer<'_> {
    /// Packs all blocks and gives the hashes of each weight's blocks.
    fn run(self) -> Result<Vec<Vec<Hash>>, LinkError> {
        let opened = self.weights.iter().map(|w| Rows::open(&w.name, &w.decl, self.source));
        let opened = opened.collect::<Result<Vec<_>, _>>()?;
        let (next, failed, error) = (AtomicUsize::new(0), AtomicBool::new(false), Mutex::new(None));
        rayon::broadcast(|_| {
            let mut buffers = Buffers::default();
            while !failed.load(Ordering::Relaxed) {
                let i = next.fetch_add(1, Ordering::Relaxed);
                let Some(block) = self.blocks.get(i) else { break };
                if let Err(e) = self.pack_block(block, &opened[block.weight], &mut buffers) {
                    failed.store(true, Ordering::Relaxed);
                    error.lock().expect("no thread panics with the lock").get_or_insert(e);
                }
            }
        });
        self.bar.finish_and_clear();
        match error.into_inner().expect("no thread panics with the lock") {
            Some(e) => Err(e),
            None => Ok(self.hashes.into_inner().expect("no thread panics with the lock")),
        }
    }

    fn pack_block(&self, block: &Block, rows: &Rows<'_>, buffers: &mut Buffers) -> Result<(), LinkError> {
        let weight = &self.weights[block.weight];
        if let Some(planes) = scaled(weight) {
            return self.pack_codes(&planes, block, rows, buffers);
        }
        match weight.layout {
            Layout::Flat => pack_flat(weight, block, rows, buffers)?,
            Layout::Tile16 | Layout::Mma16 => pack_tiles(weight, block, rows, buffers)?,
        }
        self.write(block, block.first, &buffers.packed)
    }

    /// Writes whole blocks of a weight from byte `first` of it on, and keeps their hashes.
    fn write(&self, block: &Block, first: u64, bytes: &[u8]) -> Result<(), LinkError> {
        self.file.write_all_at(bytes, self.base + block.offset + first).map_err(LinkError::io(self.path))?;
        let hashes: Vec<Hash> = bytes.chunks(BLOCK_BYTES as usize).map(hash::of).collect();
        let at = (first / BLOCK_BYTES) as usize;
        let mut all = self.hashes.lock().expect("no thread panics with the lock");
        all[block.weight][at..at + hashes.len()].copy_from_slice(&hashes);
        self.bar.inc(bytes.len() as u64);
        Ok(())
    }

    /// Packs a block of codes with their scales; after the weight's last block, writes what was kept.
    fn pack_codes(
        &self,
        planes: &Planes,
        block: &Block,
        rows: &Rows<'_>,
        buffers: &mut Buffers,
    ) -> Result<(), LinkError> {
        let (weight, tail) = (&self.weights[block.weight], &self.tails[block.weight]);
        let tile_bytes = planes.tile_bytes();
        let numbers = block.first / tile_bytes..(block.first + block.bytes).div_ceil(tile_bytes);
        let runs = TileRows::new(weight.decl.out_dims());
        let arrangement = Arrangement::of(planes);
        buffers.packed.clear();
        buffers.scales.clear();
        buffers.units.clear();
        for part in runs.parts(numbers.clone(), weight.decl.format) {
            let (first, end) = (runs.of(part.start).start, runs.of(part.end - 1).end);
            rows.read_codes(first, end - first, &mut buffers.codes, &mut buffers.rows)?;
            let order = tiles::column_order(planes, &buffers.codes).map_err(|reason| wrong(weight, reason))?;
            for tile in part.clone() {
                let own = runs.of(tile);
                let own = (own.start - first) as usize..(own.end - first) as usize;
                let begin = buffers.packed.len();
                tiles::push_codes(planes, &buffers.codes, own.clone(), order.as_deref(), &mut buffers.packed);
                arrangement.iter().for_each(|a| a.apply(&mut buffers.packed, begin));
                let pushed = tiles::push_scales(planes, &buffers.codes, own.clone(), &mut buffers.scales);
                let pushed = pushed.and_then(|()| tiles::push_units(planes, &buffers.codes, own, &mut buffers.units));
                pushed.map_err(|reason| wrong(weight, reason))?;
            }
            if let Some(order) = order {
                let bytes: Vec<u8> = order.iter().flat_map(|c| c.to_le_bytes()).collect();
                tail.put(weight, planes.order(part.start * LANES, 0), &bytes);
            }
        }
        let skip = (block.first - numbers.start * tile_bytes) as usize;
        let codes = &buffers.packed[skip..skip + block.bytes as usize];
        tail.put(weight, planes.scales_at() + numbers.start * planes.tile_scale_bytes(), &buffers.scales);
        if !buffers.units.is_empty() {
            tail.put(weight, planes.units_at() + numbers.start * planes.tile_unit_bytes(), &buffers.units);
        }
        match block.first < tail.first {
            true => self.write(block, block.first, codes)?,
            false => tail.put(weight, block.first, codes),
        }
        if tail.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            let kept = std::mem::take(&mut *tail.bytes.lock().expect("no thread panics with the lock"));
            self.write(block, tail.first, &kept)?;
        }
        Ok(())
    }
}

fn wrong(weight: &PackedWeight, reason: String) -> LinkError {
    nextc_ir::rows::RowsError::Weight { weight: weight.name.clone(), reason }.into()
}

/// Widened to f32, rows padded; convolutions transposed.
fn pack_flat(weight: &PackedWeight, block: &Block, rows: &Rows<'_>, buffers: &mut Buffers) -> Result<(), LinkError> {
    let shape = &weight.decl.shape;
    buffers.numbers.resize(shape.iter().product::<u64>() as usize, 0.0);
    rows.read(0, &mut buffers.numbers, &mut buffers.rows)?;
    let mut flat = vec![0f32; flat_dims(shape, weight.decl.in_rank).iter().product::<u64>() as usize];
    match *shape.as_slice() {
        [heads, width, taps] if weight.decl.in_rank == 0 => {
            transpose_taps(&buffers.numbers, &mut flat, [heads as usize, width as usize, taps as usize]);
        }
        _ => {
            let width = shape.last().copied().unwrap_or(1) as usize;
            pad_rows(&buffers.numbers, &mut flat, width, pad(width as u64) as usize);
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
    let planes = weight.planes();
    let tile_bytes = planes.tile_bytes();
    let tiles = block.first / tile_bytes..(block.first + block.bytes).div_ceil(tile_bytes);
    let (runs, arrangement) = (TileRows::new(decl.out_dims()), Arrangement::of(&planes));
    let (first, end) = (runs.of(tiles.start).start, runs.of(tiles.end - 1).end);
    let columns = rows.columns as usize;
    buffers.numbers.resize((end - first) as usize * columns, 0.0);
    rows.read(first, &mut buffers.numbers, &mut buffers.rows)?;
    let width = decl.in_dims().last().copied().unwrap_or(1);
    let mut padded = Vec::new();
    buffers.packed.clear();
    for tile in tiles.clone() {
        let own = runs.of(tile);
        let own = &buffers.numbers[(own.start - first) as usize * columns..(own.end - first) as usize * columns];
        padded.clear();
        padded.resize((LANES * planes.columns) as usize, 0.0);
        pad_rows(own, &mut padded, width as usize, pad(width) as usize);
        let begin = buffers.packed.len();
        encode_tile(decl.format, &padded, planes.columns as usize, &mut buffers.packed);
        arrangement.iter().for_each(|a| a.apply(&mut buffers.packed, begin));
    }
    buffers.packed.drain(..(block.first - tiles.start * tile_bytes) as usize);
    buffers.packed.truncate(block.bytes as usize);
    Ok(())
}

/// Appends a tile of 16 rows of `columns` numbers in a plain format: see [`nextc_ir::layout::Planes::code`].
fn encode_tile(format: Format, rows: &[f32], columns: usize, out: &mut Vec<u8>) {
    let lanes: [&[f32]; LANES as usize] = std::array::from_fn(|lane| &rows[lane * columns..(lane + 1) * columns]);
    match format {
        Format::F16 => encode_pairs(lanes, columns, out, |x| half::f16::from_f32(x).to_bits()),
        Format::Bf16 => encode_pairs(lanes, columns, out, |x| half::bf16::from_f32(x).to_bits()),
        Format::F32 | Format::Fp8(_) | Format::Q8(_) | Format::Q4(_) | Format::U4(_) | Format::Q6(_) => {
            for i in 0..columns {
                let column: [[u8; 4]; LANES as usize] = lanes.map(|lane| lane[i].to_le_bytes());
                out.extend_from_slice(column.as_flattened());
            }
        }
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
