//! Weights in scaled formats: codes, scales, zero points and column orders that differ wherever they may.

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
        for block in 0..columns.div_ceil(width) as u64 {
            codes.scales.push((1 + mix(band, 1000 + block) % 7) as f32 / 64.0);
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
    let (bits, width) = (ty.format.def().bits, blocks.columns as usize);
    let mut bytes = vec![0; planes.bytes() as usize];
    let scale = nextc_ir::Format::plain(blocks.scale).expect("scales are floats").def();
    let mut put = |at: u64, x: f32| {
        let (at, count) = (at as usize, scale.bits as usize / 8);
        bytes[at..at + count].copy_from_slice(&(scale.encode)(x).to_le_bytes()[..count]);
    };
    for row in 0..codes.rows() {
        let stored = padded_index(out_dims, row as u64);
        for block in 0..codes.row_blocks() {
            let (column, at) = ((block * width) as u64, row * codes.row_blocks() + block);
            put(planes.scale(stored, column).expect("it is scaled"), codes.scales[at]);
            if let Some(zero) = planes.zero(stored, column) {
                put(zero, codes.zeros[at]);
            }
        }
    }
    for row in 0..codes.rows() {
        let stored = padded_index(out_dims, row as u64);
        for column in 0..codes.columns {
            let place = planes.code(stored, column as u64);
            let own = if blocks.ordered { codes.columns - 1 - column } else { column };
            let code = codes.codes[row * codes.columns + own];
            debug_assert!(bits + place.bit <= 8);
            bytes[place.byte as usize] |= code << place.bit;
            if blocks.ordered {
                let at = planes.order(stored, column as u64) as usize;
                bytes[at..at + 4].copy_from_slice(&(own as u32).to_le_bytes());
            }
        }
    }
    bytes
}
