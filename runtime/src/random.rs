//! Made-up weights for measurements: every format and layout, values as a model has them and none of them zero but the padding.

use nextc_abi::{Scaled, Weight};

/// A small, fast generator (SplitMix64); what it makes depends on the seed alone.
#[derive(Clone, Copy, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next 64 bits.
    pub fn next_bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number between `low` and `high`.
    pub fn between(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * (self.next_bits() >> 40) as f32 / (1u64 << 24) as f32
    }
}

/// Fills all weights of a table, on all processors; `memory` is laid out as the file.
pub fn fill(entries: &[Weight], memory: &mut [u8]) {
    let mut sorted: Vec<&Weight> = entries.iter().collect();
    sorted.sort_by_key(|w| w.offset);
    let (mut rest, mut begins) = (memory, 0);
    let mut parts = Vec::new();
    for (i, w) in sorted.into_iter().enumerate() {
        let (_, from_here) = rest.split_at_mut((w.offset - begins) as usize);
        let (own, after) = from_here.split_at_mut(w.bytes as usize);
        parts.push((i as u64, w, own));
        (rest, begins) = (after, w.offset + w.bytes);
    }
    let threads = crate::pool::available_threads();
    let parts = std::sync::Mutex::new(parts.into_iter());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let part = parts.lock().expect("filling does not panic").next();
                    let Some((i, weight, memory)) = part else { break };
                    fill_weight(weight, memory, Random(i << 32));
                }
            });
        }
    });
}

fn fill_weight(weight: &Weight, memory: &mut [u8], mut random: Random) {
    match weight.layout.as_str() {
        "flat" => fill_flat(weight, memory, &mut random),
        _ => match &weight.scaled {
            Some(scaled) => fill_scaled(weight, scaled, memory, &mut random),
            None => fill_tiles(weight, memory, &mut random),
        },
    }
}

/// Values of a vector or table, by what it is.
fn range_of(name: &str) -> (f32, f32) {
    let last = name.rsplit('.').next().unwrap_or(name);
    match last {
        "a_log" => (0.0, 2.5),
        "dt_bias" => (-4.0, -1.0),
        "inv_freq" => (1e-4, 1.0),
        name if name.contains("conv") => (-0.4, 0.6),
        // a gated norm's gain multiplies as it is; the zero-centred gains lie around zero, and a little more does no harm
        "norm" => (0.7, 1.3),
        _ => (0.01, 0.3),
    }
}

fn fill_flat(weight: &Weight, memory: &mut [u8], random: &mut Random) {
    let (low, high) = range_of(&weight.name);
    // convolutions are stored tap by tap, so their width is the middle dimension
    let inner = match weight.shape.as_slice() {
        [_, width, _] if weight.in_rank == 0 => *width,
        shape => shape.last().copied().unwrap_or(1),
    } as usize;
    for row in memory.chunks_mut(inner.next_multiple_of(16).max(16) * 4) {
        for (j, out) in row.chunks_exact_mut(4).enumerate() {
            let x = if j < inner { random.between(low, high) } else { 0.0 };
            out.copy_from_slice(&x.to_le_bytes());
        }
    }
}

/// Uniform numbers whose sum over a row has the variance of its input. The padding is made zero by column and row.
fn fill_tiles(weight: &Weight, memory: &mut [u8], random: &mut Random) {
    let tiles = Tiles::of(weight);
    let bound = (3.0 / tiles.fan_in as f32).sqrt();
    let unit = tiles.elem_bytes * 16 * if tiles.elem_bytes == 4 { 1 } else { 2 };
    for (tile, memory) in memory.chunks_exact_mut(tiles.columns * 16 * tiles.elem_bytes).enumerate() {
        let lanes = tiles.lanes(tile);
        for (group, memory) in memory.chunks_exact_mut(unit).enumerate() {
            for (i, out) in memory.chunks_exact_mut(tiles.elem_bytes).enumerate() {
                let (lane, column) = if tiles.elem_bytes == 4 { (i, group) } else { (i / 2, group * 2 + i % 2) };
                let x = if lane < lanes && tiles.is_column(column) { random.between(-bound, bound) } else { 0.0 };
                encode(x, weight.format == "f16", out);
            }
        }
    }
}

/// Codes that are anything but zero, and scales that give a row's sum the variance of its input; both zero in the padding.
fn fill_scaled(weight: &Weight, scaled: &Scaled, memory: &mut [u8], random: &mut Random) {
    let tiles = Tiles::of(weight);
    let per_word = 32 / scaled.bits as usize;
    let (codes, rest) = memory.split_at_mut(scaled.scales_at as usize);
    for (tile, codes) in codes.chunks_exact_mut(tiles.columns / per_word * 64).enumerate() {
        let lanes = tiles.lanes(tile);
        for (line, words) in codes.chunks_exact_mut(64).enumerate() {
            for (lane, word) in words.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                // columns of a word may be in any order: padding begins at a whole word or ends within one
                let padding = lane >= lanes || !tiles.is_column(line * per_word);
                *word = random_codes(&scaled.code, padding, random).to_le_bytes();
            }
        }
    }
    let scale = 1.0 / (spread(&scaled.code) * (tiles.fan_in as f32).sqrt());
    let (scales, order) = rest.split_at_mut(scaled.order_at.map_or(rest.len(), |at| (at - scaled.scales_at) as usize));
    let mut place = Places { scaled, bytes: if scaled.scale == "f32" { 4 } else { 2 } };
    for (tile, scales) in scales.chunks_exact_mut(scaled.tile_scale_bytes as usize).enumerate() {
        let lanes = if scaled.block_rows > 1 { 1 } else { tiles.lanes(tile) };
        for block in 0..tiles.columns.div_ceil(scaled.block_columns as usize) {
            for lane in 0..lanes {
                encode(scale * random.between(0.8, 1.2), scaled.scale == "f16", place.of(scales, block, lane, 0));
                if scaled.zero {
                    let zero = if random.next_bits() & 1 == 0 { 1.0 } else { -1.0 };
                    encode(zero, scaled.scale == "f16", place.of(scales, block, lane, 1));
                }
            }
        }
    }
    for (column, out) in order.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        *out = ((column % tiles.columns) as u32).to_le_bytes();
    }
}

/// Where the numbers of a block lie in the scales of a tile: see `ir/src/layout.rs`.
struct Places<'a> {
    scaled: &'a Scaled,
    bytes: usize,
}

impl Places<'_> {
    fn of<'m>(&mut self, scales: &'m mut [u8], block: usize, lane: usize, part: usize) -> &'m mut [u8] {
        let number = block * (1 + usize::from(self.scaled.zero)) + part;
        let at = match self.scaled.block_rows {
            1 => number * self.bytes / 4 * 64 + lane * 4 + number * self.bytes % 4,
            _ => number * self.bytes,
        };
        &mut scales[at..at + self.bytes]
    }
}

/// A word of random codes none of which stands for zero, or of codes that all do.
fn random_codes(code: &str, padding: bool, random: &mut Random) -> u32 {
    let bits = random.next_bits();
    match (code, padding) {
        ("q4", true) => 0x8888_8888,
        (_, true) => 0,
        // 1 to 15 but for 8
        ("q4", false) => (0..8).fold(0, |word, i| {
            let code = 1 + (bits >> (8 * i) & 0xff) as u32 % 14;
            word | (code + u32::from(code >= 8)) << (4 * i)
        }),
        // signs, exponents from 9 to 13, mantissas: numbers from 4 to 120
        ("fp8", false) => (0..4).fold(0, |word, i| {
            let own = (bits >> (16 * i)) as u32;
            word | ((own & 0x87) | (9 + (own >> 8 & 0xff) % 5) << 3) << (8 * i)
        }),
        // -127 to 127 but for 0
        _ => (0..4).fold(0, |word, i| {
            let own = (bits >> (16 * i)) as u32;
            let magnitude = 1 + (own >> 1) % 127;
            let code = if own & 1 == 0 { magnitude } else { 256 - magnitude };
            word | code << (8 * i)
        }),
    }
}

/// Root of the mean square of [`random_codes`].
fn spread(code: &str) -> f32 {
    match code {
        "q4" => 4.47,
        "fp8" => 48.4,
        _ => 73.6,
    }
}

/// The shape of a tiled weight: see `ir/src/layout.rs`.
struct Tiles {
    elem_bytes: usize,
    columns: usize,
    inner_width: usize,
    inner_rows: usize,
    fan_in: u64,
}

impl Tiles {
    fn of(weight: &Weight) -> Self {
        let (outer, inner) = weight.shape.split_at(weight.shape.len() - weight.in_rank as usize);
        let inner_width = inner.last().copied().unwrap_or(1) as usize;
        let fan_in: u64 = inner.iter().product();
        Self {
            elem_bytes: if weight.format == "f32" { 4 } else { 2 },
            columns: fan_in as usize / inner_width * inner_width.next_multiple_of(16),
            inner_width,
            inner_rows: outer.last().copied().unwrap_or(1) as usize,
            fan_in,
        }
    }

    /// Rows of a tile that are not padding.
    fn lanes(&self, tile: usize) -> usize {
        let tiles = self.inner_rows.div_ceil(16);
        (self.inner_rows - tile % tiles * 16).min(16)
    }

    /// True if a stored column is not padding.
    fn is_column(&self, column: usize) -> bool {
        column % self.inner_width.next_multiple_of(16) < self.inner_width
    }
}

/// Writes a number of moderate size in the format whose width `out` has.
fn encode(x: f32, half: bool, out: &mut [u8]) {
    match out.len() {
        4 => out.copy_from_slice(&x.to_le_bytes()),
        _ if half => out.copy_from_slice(&half_bits(x).to_le_bytes()),
        _ => out.copy_from_slice(&((x.to_bits() >> 16) as u16).to_le_bytes()),
    }
}

/// An IEEE half, truncated; for numbers below 65504, and zero for what would be a denormal.
fn half_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let sign = (bits >> 16 & 0x8000) as u16;
    let exponent = (bits >> 23 & 0xff) as i32 - 112;
    if exponent <= 0 {
        return sign;
    }
    sign | (exponent as u16) << 10 | (bits >> 13 & 0x3ff) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weight(shape: &[u64], in_rank: u64, format: &str, layout: &str, bytes: u64) -> Weight {
        Weight {
            name: "layers.0.w".to_owned(),
            shape: shape.to_vec(),
            in_rank,
            format: format.to_owned(),
            scaled: None,
            layout: layout.to_owned(),
            offset: 64,
            bytes,
            checksum: String::new(),
        }
    }

    #[test]
    fn weights_are_wide_and_their_padding_is_zero() {
        let w = weight(&[2, 20, 24], 1, "bf16", "tile16", 4 * 32 * 16 * 2);
        let mut memory = vec![0; 64 + w.bytes as usize];
        fill(std::slice::from_ref(&w), &mut memory);
        let read = |tile: usize, lane: usize, column: usize| {
            let at = 64 + tile * 32 * 16 * 2 + ((column / 2) * 32 + lane * 2 + column % 2) * 2;
            f32::from_bits(u32::from(u16::from_le_bytes([memory[at], memory[at + 1]])) << 16)
        };
        for tile in 0..4 {
            for (lane, column) in (0..16).flat_map(|l| (0..32).map(move |c| (l, c))) {
                let padding = column >= 24 || (tile % 2 == 1 && lane >= 4);
                let x = read(tile, lane, column);
                assert_eq!(x == 0.0, padding, "tile {tile} lane {lane} column {column}: {x}");
                assert!(x.abs() <= 0.354);
            }
        }
    }

    /// A scaled weight of two outer indices of 20 rows and 40 columns.
    fn scaled(code: &str, bits: u64, block_rows: u64, scale: &str, tile_scale_bytes: u64) -> Weight {
        let scales_at = 4 * 48 / (32 / bits) * 64;
        let scaled = Scaled {
            code: code.to_owned(),
            bits,
            block_rows,
            block_columns: 32,
            scale: scale.to_owned(),
            zero: false,
            scales_at,
            tile_scale_bytes,
            order_at: None,
        };
        let bytes = scales_at + 4 * tile_scale_bytes;
        Weight { scaled: Some(scaled), ..weight(&[2, 20, 40], 1, code, "tile16", bytes) }
    }

    #[test]
    fn scaled_weights_are_wide_and_their_padding_is_zero() {
        for (w, zero) in [
            (scaled("q4", 4, 1, "f16", 64), 8),
            (scaled("q8", 8, 1, "f16", 64), 0),
            (scaled("fp8", 8, 16, "f32", 8), 0),
        ] {
            let mut memory = vec![0; 64 + w.bytes as usize];
            fill(std::slice::from_ref(&w), &mut memory);
            let (own, planes) = (&memory[64..], w.scaled.as_ref().expect("it is scaled"));
            let per_word = 32 / planes.bits as usize;
            let mut seen = std::collections::BTreeSet::new();
            for (i, word) in own[..planes.scales_at as usize].as_chunks::<4>().0.iter().enumerate() {
                let (tile, line, lane) = (i / 16 / (48 / per_word), i / 16 % (48 / per_word), i % 16);
                let padding = line * per_word >= 40 || (tile % 2 == 1 && lane >= 4);
                for code in (0..per_word)
                    .map(|c| u32::from_le_bytes(*word) >> (c as u64 * planes.bits) & ((1 << planes.bits) - 1))
                {
                    assert_eq!(code == zero, padding, "{}: tile {tile} line {line} lane {lane}", planes.code);
                    assert!(planes.code != "fp8" || code & 0x7f < 0x7f, "no NaN");
                    seen.insert(code);
                }
            }
            assert!(seen.len() > 1 << (planes.bits - 2), "{}: {} codes", planes.code, seen.len());
            let scales = &own[planes.scales_at as usize..];
            let zeros = scales.chunks(if planes.scale == "f32" { 4 } else { 2 }).filter(|b| b.iter().all(|&x| x == 0));
            let expected = if planes.block_rows == 1 { 2 * 12 * 2 } else { 0 };
            assert_eq!(zeros.count(), expected, "{}", planes.code);
        }
    }

    #[test]
    fn vectors_have_the_range_of_what_they_are() {
        let mut w = weight(&[20], 0, "bf16", "flat", 128);
        w.name = "layers.3.dt_bias".to_owned();
        let mut memory = vec![0; 64 + 128];
        fill(&[w], &mut memory);
        let values: Vec<f32> = memory[64..].chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        assert!(values[..20].iter().all(|x| (-4.0..=-1.0).contains(x)));
        assert!(values[20..].iter().all(|&x| x == 0.0));
    }

    #[test]
    fn halves_are_truncated() {
        assert_eq!([half_bits(1.0), half_bits(-0.5), half_bits(0.1)], [0x3c00, 0xb800, 0x2e66]);
    }
}
