//! Weights in scaled formats: codes, scales, second numbers, units and column orders that differ wherever they may.

use nextc_ir::format::codes::Codes;
use nextc_ir::layout::{Planes, padded_index};
use nextc_ir::shape::padded_elems;
use nextc_ir::types::WeightType;

/// A small number that looks random.
fn mix(a: u64, b: u64) -> u64 {
    let x = (a.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ b.wrapping_mul(0xc2b2_ae3d_27d4_eb4f))
        .wrapping_mul(0xff51_afd7_ed55_8ccd);
    x >> 40
}

/// The codes of a weight: its rows without padding, its columns as stored, where padding is zero.
pub fn of(ty: &WeightType, in_rank: usize) -> Codes {
    let (out_dims, in_dims) = ty.shape.split_at(ty.shape.len() - in_rank);
    let blocks = ty.format.blocks().expect("the format is scaled");
    let (def, width) = (ty.format.def(), blocks.columns as usize);
    let columns = padded_elems(in_dims) as usize;
    let (rows, inputs): (u64, u64) = (out_dims.iter().product(), in_dims.iter().product());
    let inner = out_dims.last().copied().unwrap_or(1);
    let zero = (def.encode)(0.0) as u8;
    let mut codes = Codes { columns, ..Codes::default() };
    for row in 0..rows {
        let begin = codes.codes.len();
        codes.codes.resize(begin + columns, zero);
        for column in 0..inputs {
            let code = mix(row, column) as u32 & ((1 << def.bits) - 1);
            // NaN has no place in a weight
            let code = if (def.decode)(code).is_nan() { 0 } else { code };
            codes.codes[begin + padded_index(in_dims, column) as usize] = code as u8;
        }
        let band = row / inner * inner + row % inner / u64::from(blocks.rows);
        for unit in 0..columns.div_ceil(blocks.unit.max(1) as usize).min(columns * blocks.unit as usize) as u64 {
            codes.units.push([3000, 4000].map(|of| (1 + mix(row, of + unit) % 5) as f32 / 512.0));
        }
        for block in 0..columns.div_ceil(width) as u64 {
            let scale = (1 + mix(band, 1000 + block) % 7) as f32;
            codes.scales.push(if blocks.unit > 0 { scale - 9.0 } else { scale / 64.0 });
            if blocks.zero {
                codes.zeros.push((mix(band, 2000 + block) % 17) as f32 - 8.0);
            }
        }
    }
    if blocks.ordered {
        // the last columns come first
        codes.blocks = (0..columns).map(|c| ((columns - 1 - c) / width) as u32).collect();
    }
    codes
}

/// The numbers of a weight, row by row and without padding.
pub fn numbers(ty: &WeightType, in_rank: usize) -> Vec<f32> {
    let (out_dims, in_dims) = ty.shape.split_at(ty.shape.len() - in_rank);
    let (rows, inputs): (u64, u64) = (out_dims.iter().product(), in_dims.iter().product());
    let codes = of(ty, in_rank);
    let number = |row: u64, c: u64| codes.number(ty.format, row as usize, padded_index(in_dims, c) as usize) as f32;
    (0..rows).flat_map(|row| (0..inputs).map(move |c| (row, c))).map(|(row, c)| number(row, c)).collect()
}

/// The weight in memory, as `planes` says.
pub fn bytes(ty: &WeightType, in_rank: usize, planes: &Planes) -> Vec<u8> {
    let (out_dims, _) = ty.shape.split_at(ty.shape.len() - in_rank);
    let codes = of(ty, in_rank);
    let blocks = ty.format.blocks().expect("the format is scaled");
    let width = blocks.columns as usize;
    let mut bytes = vec![0; planes.bytes() as usize];
    let scale = nextc_ir::Format::plain(blocks.scale).expect("scales are floats").def();
    let mut put = |at: u64, x: f32, counted: bool| {
        let (at, count) = (at as usize, if counted { 1 } else { scale.bits as usize / 8 });
        let number = if counted { (x as i8 as u8).into() } else { (scale.encode)(x) };
        bytes[at..at + count].copy_from_slice(&number.to_le_bytes()[..count]);
    };
    let wide = planes.row_units() as usize;
    for row in 0..codes.rows() {
        let stored = padded_index(out_dims, row as u64);
        for block in 0..codes.row_blocks() {
            let (column, at) = ((block * width) as u64, row * codes.row_blocks() + block);
            put(planes.scale(stored, column).expect("it is scaled"), codes.scales[at], blocks.unit > 0);
            if let Some(zero) = planes.zero(stored, column) {
                put(zero, codes.zeros[at], blocks.unit > 0);
            }
        }
        for unit in 0..wide {
            for (part, &x) in (0..).zip(&codes.units[row * wide + unit]) {
                if let Some(at) = planes.unit(stored, unit as u64 * u64::from(blocks.unit), part) {
                    put(at, x, false);
                }
            }
        }
    }
    for row in 0..codes.rows() {
        let stored = padded_index(out_dims, row as u64);
        for column in 0..codes.columns {
            let own = if blocks.ordered { codes.columns - 1 - column } else { column };
            let code = codes.codes[row * codes.columns + own];
            for place in planes.code(stored, column as u64) {
                let (first, count) = place.of_code;
                for i in 0..count {
                    let at = place.byte * 8 + place.bit + i;
                    bytes[at as usize / 8] |= (code >> (first + i) & 1) << (at % 8);
                }
            }
            if blocks.ordered {
                let at = planes.order(stored, column as u64) as usize;
                bytes[at..at + 4].copy_from_slice(&(own as u32).to_le_bytes());
            }
        }
    }
    bytes
}
