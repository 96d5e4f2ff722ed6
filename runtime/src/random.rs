//! Made-up weights for measurements: every format and layout, values as a model has them and none of them zero but the
//! padding.
//!
//! The bytes of a long run repeat after a few MiB, so that a whole model is made in the time that copying takes.

use std::collections::HashMap;
use std::sync::Mutex;

use nextc_abi::{Holds, Number, Part, Weight};

use crate::pool::on_all_processors;

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

/// Bytes after which a run repeats, where no padding has to be kept.
const PERIOD_BYTES: u64 = 8 << 20;

/// A run of bytes of the weights that is one pattern, repeated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fill {
    /// Where it begins, from the beginning of all weights.
    pub at: u64,
    /// Bytes.
    pub bytes: u64,
    /// What is repeated.
    pub pattern: Pattern,
}

/// What the bytes of a run repeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Pattern {
    /// Rows of a vector or table in f32.
    Flat {
        values: Values,
        width: usize,
    },
    /// Tiles of 16 rows of a matrix in a plain format, whose padding is zero.
    Tiles(Tiles),
    /// Numbers, or codes, of a matrix with so many columns.
    Numbers {
        number: Number,
        fan_in: u64,
    },
    /// Scales that give numbers the variance of [`Pattern::Numbers`]; as zero points they are next to nothing.
    Scales {
        stored: Number,
        codes: Number,
        fan_in: u64,
    },
    Units {
        stored: Number,
        codes: Number,
        fan_in: u64,
    },
    /// Columns in their order.
    Order {
        columns: u64,
    },
}

/// The values of a vector or table, by what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Values {
    ALog,
    DtBias,
    InvFreq,
    Conv,
    /// A gated norm's gain, which multiplies as it is.
    Norm,
    /// Gains that lie around zero, where a little more does no harm, and the rest.
    Other,
}

impl Values {
    fn of(name: &str) -> Self {
        match name.rsplit('.').next().unwrap_or(name) {
            "a_log" => Self::ALog,
            "dt_bias" => Self::DtBias,
            "inv_freq" => Self::InvFreq,
            name if name.contains("conv") => Self::Conv,
            "norm" => Self::Norm,
            _ => Self::Other,
        }
    }

    const fn range(self) -> (f32, f32) {
        match self {
            Self::ALog => (0.0, 2.5),
            Self::DtBias => (-4.0, -1.0),
            Self::InvFreq => (1e-4, 1.0),
            Self::Conv => (-0.4, 0.6),
            Self::Norm => (0.7, 1.3),
            Self::Other => (0.01, 0.3),
        }
    }
}

/// The runs of all weights, without the gaps between them.
pub(crate) fn fills(entries: &[Weight]) -> Vec<Fill> {
    let of = |w: &Weight| {
        let fill = |p: &Part| Fill { at: w.offset + p.at, bytes: p.bytes, pattern: Pattern::of(w, p) };
        w.parts.iter().map(fill).collect::<Vec<_>>()
    };
    let mut fills: Vec<Fill> = entries.iter().flat_map(of).filter(|fill| fill.bytes > 0).collect();
    fills.sort_by_key(|fill| fill.at);
    fills
}

/// The bytes of each pattern that is needed, made on all processors: as many as its longest run has, or a period.
pub(crate) fn periods(fills: &[Fill]) -> HashMap<Pattern, Vec<u8>> {
    let mut longest: HashMap<Pattern, u64> = HashMap::new();
    for fill in fills {
        let bytes = longest.entry(fill.pattern).or_default();
        *bytes = (*bytes).max(fill.bytes);
    }
    let made = Mutex::new(HashMap::new());
    on_all_processors(longest.into_iter(), |(pattern, bytes)| {
        let period = pattern.period(bytes);
        made.lock().expect("making patterns does not panic").insert(pattern, period);
    });
    made.into_inner().expect("making patterns does not panic")
}

/// Fills all weights of a table; `memory` is laid out as the file.
pub fn fill(entries: &[Weight], memory: &mut [u8]) {
    let fills = fills(entries);
    let periods = periods(&fills);
    let (mut rest, mut begins) = (memory, 0);
    let mut parts = Vec::new();
    for fill in &fills {
        let (_, from_here) = rest.split_at_mut((fill.at - begins) as usize);
        let (own, after) = from_here.split_at_mut(fill.bytes as usize);
        let period = &periods[&fill.pattern];
        parts.extend(own.chunks_mut(period.len()).map(|memory| (memory, period)));
        (rest, begins) = (after, fill.at + fill.bytes);
    }
    on_all_processors(parts.into_iter(), |(memory, period)| memory.copy_from_slice(&period[..memory.len()]));
}

impl Pattern {
    fn of(weight: &Weight, part: &Part) -> Self {
        let fan_in = weight.shape[weight.shape.len() - weight.in_rank as usize..].iter().product();
        match part.holds {
            Holds::Scales { stored, codes } => Self::Scales { stored, codes, fan_in },
            Holds::Units { stored, codes } => Self::Units { stored, codes, fan_in },
            Holds::Order { columns } => Self::Order { columns },
            Holds::Numbers(_) if weight.layout == "flat" => {
                // convolutions are stored tap by tap, so their width is the middle dimension
                let width = match weight.shape.as_slice() {
                    [_, width, _] if weight.in_rank == 0 => *width,
                    shape => shape.last().copied().unwrap_or(1),
                };
                Self::Flat { values: Values::of(&weight.name), width: width as usize }
            }
            Holds::Numbers(number) => match Tiles::of(weight, number) {
                Some(tiles) if weight.layout == "tile16" && tiles.is_padded() => Self::Tiles(tiles),
                _ => Self::Numbers { number, fan_in },
            },
        }
    }

    /// The bytes that are repeated in runs of at most `longest` bytes.
    fn period(self, longest: u64) -> Vec<u8> {
        let mut random = Random(longest);
        let most = longest.min(PERIOD_BYTES) as usize;
        match self {
            Self::Flat { values, width } => {
                let (low, high) = values.range();
                let row = width.next_multiple_of(16).max(16);
                let number = |j: usize| if j % row < width { random.between(low, high) } else { 0.0 };
                (0..(most / 4 / row).max(1) * row).map(number).flat_map(f32::to_le_bytes).collect()
            }
            Self::Tiles(tiles) => tiles.period(&mut random),
            Self::Numbers { number, fan_in } => {
                let mut bytes = vec![0; most.next_multiple_of(4)];
                fill_numbers(number, (3.0 / fan_in as f32).sqrt(), &mut bytes, &mut random);
                bytes
            }
            // codes may lie around another number than zero, weights do not: else all tokens would become alike and choose the same experts
            Self::Scales { stored, codes, fan_in } => {
                scales(stored, (deviation(codes), &[1.0, -1.0]), fan_in, most, &mut random)
            }
            Self::Units { stored, codes, fan_in } => {
                let both = deviation(codes) * deviation(Number::I8);
                scales(stored, (both, &[1.0]), fan_in, most, &mut random)
            }
            Self::Order { columns } => (0..columns as i32).flat_map(i32::to_le_bytes).collect(),
        }
    }
}

/// Scales of codes with a deviation, such that the sum of a row has the variance of its input; each has one of some signs.
fn scales(stored: Number, (deviation, signs): (f32, &[f32]), fan_in: u64, most: usize, random: &mut Random) -> Vec<u8> {
    let scale = 1.0 / (deviation * (fan_in as f32).sqrt());
    let width = width_of(stored);
    let mut bytes = vec![0; most.next_multiple_of(width)];
    for out in bytes.chunks_exact_mut(width) {
        let sign = signs[random.next_bits() as usize % signs.len()];
        encode(stored, sign * scale * random.between(0.7, 1.3), out);
    }
    bytes
}

/// Writes uniform numbers between plus and minus `bound`; codes that have scales are of any size.
fn fill_numbers(number: Number, bound: f32, out: &mut [u8], random: &mut Random) {
    match number {
        Number::F32 | Number::F16 | Number::Bf16 => {
            for out in out.chunks_exact_mut(width_of(number)) {
                encode(number, random.between(-bound, bound), out);
            }
        }
        // any bits are a number
        Number::I8 | Number::U4 | Number::U6 => {
            for out in out.chunks_mut(8) {
                out.copy_from_slice(&random.next_bits().to_le_bytes()[..out.len()]);
            }
        }
        // exponents below the largest, with which there would be a NaN
        Number::E4m3 => {
            for out in out.chunks_mut(8) {
                let bits = random.next_bits() & 0xbfbf_bfbf_bfbf_bfbf | 0x2020_2020_2020_2020;
                out.copy_from_slice(&bits.to_le_bytes()[..out.len()]);
            }
        }
    }
}

/// About the standard deviation of the codes that [`fill_numbers`] writes.
const fn deviation(codes: Number) -> f32 {
    match codes {
        Number::I8 => 74.0,
        Number::U4 => 4.6,
        Number::U6 => 18.5,
        Number::E4m3 => 0.84,
        Number::F32 | Number::F16 | Number::Bf16 => 1.0,
    }
}

/// Bytes of a number of a plain format.
const fn width_of(number: Number) -> usize {
    if matches!(number, Number::F32) { 4 } else { 2 }
}

/// Writes a number of moderate size in a plain format.
fn encode(number: Number, x: f32, out: &mut [u8]) {
    match number {
        Number::F32 => out.copy_from_slice(&x.to_le_bytes()),
        Number::F16 => out.copy_from_slice(&half_bits(x).to_le_bytes()),
        _ => out.copy_from_slice(&((x.to_bits() >> 16) as u16).to_le_bytes()),
    }
}

/// The shape of a matrix in a plain format and tiles of 16 rows: see `ir/src/layout.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Tiles {
    number: Number,
    columns: usize,
    inner_width: usize,
    inner_rows: usize,
    fan_in: u64,
}

impl Tiles {
    /// `None` for codes that have scales.
    fn of(weight: &Weight, number: Number) -> Option<Self> {
        let (outer, inner) = weight.shape.split_at(weight.shape.len() - weight.in_rank as usize);
        let inner_width = inner.last().copied().unwrap_or(1) as usize;
        let fan_in: u64 = inner.iter().product();
        matches!(number, Number::F32 | Number::F16 | Number::Bf16).then(|| Self {
            number,
            columns: fan_in as usize / inner_width * inner_width.next_multiple_of(16),
            inner_width,
            inner_rows: outer.last().copied().unwrap_or(1) as usize,
            fan_in,
        })
    }

    fn is_padded(&self) -> bool {
        !self.inner_rows.is_multiple_of(16) || !self.inner_width.is_multiple_of(16)
    }

    /// The tiles of one index of the outer dimensions: uniform numbers whose sum over a row has the variance of its
    /// input, and zeros where rows and columns are padding.
    fn period(&self, random: &mut Random) -> Vec<u8> {
        let bound = (3.0 / self.fan_in as f32).sqrt();
        let width = width_of(self.number);
        // columns whose numbers of one row are neighbours
        let group = 4 / width;
        let mut bytes = vec![0; self.inner_rows.div_ceil(16) * 16 * self.columns * width];
        for (i, out) in bytes.chunks_exact_mut(width).enumerate() {
            let (tile, at) = (i / (16 * self.columns), i % (16 * self.columns));
            let (row, column) = (tile * 16 + at / group % 16, at / (16 * group) * group + at % group);
            if row < self.inner_rows && column % self.inner_width.next_multiple_of(16) < self.inner_width {
                encode(self.number, random.between(-bound, bound), out);
            }
        }
        bytes
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

    fn weight(shape: &[u64], in_rank: u64, layout: &str, parts: &[(u64, Holds)]) -> Weight {
        let mut at = 0;
        let mut part = |&(bytes, holds): &(u64, Holds)| {
            let part = Part { at, bytes, holds };
            at += bytes.next_multiple_of(64);
            part
        };
        let parts: Vec<Part> = parts.iter().map(&mut part).collect();
        Weight {
            name: "layers.0.w".to_owned(),
            shape: shape.to_vec(),
            in_rank,
            format: "bf16".to_owned(),
            layout: layout.to_owned(),
            offset: 64,
            bytes: parts.last().map_or(0, |p| p.at + p.bytes),
            parts,
            checksum: String::new(),
        }
    }

    #[test]
    fn weights_are_wide_and_their_padding_is_zero() {
        let w = weight(&[2, 20, 24], 1, "tile16", &[(4 * 32 * 16 * 2, Holds::Numbers(Number::Bf16))]);
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

    #[test]
    fn vectors_have_the_range_of_what_they_are() {
        let mut w = weight(&[20], 0, "flat", &[(128, Holds::Numbers(Number::F32))]);
        w.name = "layers.3.dt_bias".to_owned();
        let mut memory = vec![0; 64 + 128];
        fill(&[w], &mut memory);
        let values: Vec<f32> = memory[64..].chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        assert!(values[..20].iter().all(|x| (-4.0..=-1.0).contains(x)));
        assert!(values[20..].iter().all(|&x| x == 0.0));
    }

    #[test]
    fn scaled_codes_are_numbers_and_their_scales_fit_the_width() {
        let codes = (16 * 256, Holds::Numbers(Number::E4m3));
        let scales = (64, Holds::Scales { stored: Number::F32, codes: Number::E4m3 });
        let w = weight(&[16, 256], 1, "mma16", &[codes, scales]);
        let mut memory = vec![0; 64 + w.bytes as usize];
        fill(std::slice::from_ref(&w), &mut memory);
        let (codes, scales) = memory[64..].split_at(16 * 256);
        assert!(codes.iter().all(|c| c & 0x7f != 0x7f && c & 0x7f != 0), "neither NaN nor zero");
        let distinct: std::collections::HashSet<&u8> = codes.iter().collect();
        assert_eq!(distinct.len(), 64);
        let scales: Vec<f32> = scales.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        for scale in &scales {
            let deviation = scale * 0.84 * 16.0;
            assert!((0.69..1.31).contains(&deviation.abs()), "{deviation}");
        }
        let below = scales.iter().filter(|&&scale| scale < 0.0).count();
        assert!((3..scales.len() - 2).contains(&below), "weights lie around zero");
    }

    #[test]
    fn long_runs_repeat_one_period() {
        let run = |rows: u64| weight(&[rows, 256], 1, "mma16", &[(rows * 128, Holds::Numbers(Number::U4))]);
        let (long, short) = (run(100_000), run(16));
        let fills = fills(&[long.clone(), Weight { offset: 64 + long.bytes, ..short }]);
        let periods = periods(&fills);
        assert_eq!(periods.len(), 1);
        assert_eq!(periods[&fills[0].pattern].len() as u64, PERIOD_BYTES);
        let mut memory = vec![0; 64 + long.bytes as usize];
        fill(&[long], &mut memory);
        let period = PERIOD_BYTES as usize;
        assert_eq!(memory[64 + period..64 + period + 100], memory[64..164]);
        assert_ne!(memory[64..164], memory[164..264]);
    }

    #[test]
    fn halves_are_truncated() {
        assert_eq!([half_bits(1.0), half_bits(-0.5), half_bits(0.1)], [0x3c00, 0xb800, 0x2e66]);
    }
}
