//! Whether a weight can keep the codes of the tensors that it is made of: whether the scales' blocks, which lie in the tensors,
//! are blocks of the weight too, whose rows are in another order and whose columns may be a part.

use nextc_ir::Format;
use nextc_ir::format::Blocks;
use nextc_ir::graph::RowRun;
use nextc_ir::shape::LANES;

/// The format in which a weight keeps the codes of its tensors, which are stored as `stored`; blocks of several rows may become
/// lower. `None` if the blocks do not fit. `out` and `inputs` are the weight's dimensions.
pub fn codes(stored: Format, runs: &[RowRun], out: &[u64], inputs: &[u64]) -> Option<Format> {
    let blocks = stored.blocks()?;
    let columns: u64 = inputs.iter().product();
    let last = inputs.last().copied()?;
    // padding inside a row would move columns out of their blocks
    let in_place = inputs.len() == 1 || last.is_multiple_of(LANES);
    // padded columns need a code that is zero, and a place in the order
    let whole = columns.is_multiple_of(LANES) || !(blocks.zero || blocks.ordered);
    let begins = |run: &RowRun| match blocks.ordered {
        true => run.column == 0,
        false => run.column.is_multiple_of(u64::from(blocks.columns.max(blocks.unit))),
    };
    if !in_place || !whole || !runs.iter().all(begins) {
        return None;
    }
    if blocks.rows == 1 {
        return Some(stored);
    }
    let inner = out.last().copied()?;
    let heights = [blocks.rows, 128, 64, 32, 16].into_iter().filter(|&h| h <= blocks.rows);
    let mut fitting = heights.filter(|&h| bands_fit(runs, inner, u64::from(blocks.rows), u64::from(h)));
    fitting.next().map(|rows| stored.with_blocks(Blocks { rows, ..blocks }))
}

/// True if every band of `height` rows of the weight (which ends where its index of the outer dimensions ends, `inner` rows
/// apart) lies in one block of `block` rows of one tensor.
fn bands_fit(runs: &[RowRun], inner: u64, block: u64, height: u64) -> bool {
    let mut row = 0;
    let mut last: Option<(u64, &str, u64)> = None;
    for run in runs {
        let end = row + run.rows;
        let mut stored = run.first;
        while row < end {
            let (outer, within) = (row / inner, row % inner);
            let band_end = outer * inner + (within / height + 1).saturating_mul(height).min(inner);
            let band = outer * inner.div_ceil(height) + within / height;
            let at = (band, run.tensor.as_str(), stored / block);
            if last.is_some_and(|(b, tensor, of)| b == band && (tensor, of) != (at.1, at.2)) {
                return false;
            }
            last = Some(at);
            let step = (band_end - row).min(end - row).min((stored / block + 1) * block - stored);
            row += step;
            stored += step;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, rows: u64) -> RowRun {
        RowRun { tensor: "t".into(), first, rows, column: 0 }
    }

    fn kept(name: &str, runs: &[RowRun], out: &[u64], inputs: &[u64]) -> Option<String> {
        codes(Format::from_name(name).expect(name), runs, out, inputs).map(|f| f.to_string())
    }

    #[test]
    fn blocks_move_with_whole_heads() {
        // heads of 128 rows, 768 apart, as in the published model
        let heads: Vec<RowRun> = (0..4).map(|h| run(h * 768 + 128, 128)).collect();
        assert_eq!(kept("fp8", &heads, &[4, 128], &[2048]).as_deref(), Some("fp8<128x128>"));
        // value heads, two of them a run
        let values: Vec<RowRun> = (0..4).map(|h| run(h * 768 + 256, 256)).collect();
        assert_eq!(kept("fp8", &values, &[8, 128], &[2048]).as_deref(), Some("fp8<128x128>"));
        // small heads lie within a block
        let small: Vec<RowRun> = (0..2).map(|h| run(h * 96 + 16, 16)).collect();
        assert_eq!(kept("fp8", &small, &[2, 16], &[64]).as_deref(), Some("fp8<128x128>"));
        // heads that cross a block need lower ones
        let crossing: Vec<RowRun> = (0..4).map(|h| run(h * 96, 96)).collect();
        assert_eq!(kept("fp8", &crossing, &[4, 96], &[64]).as_deref(), Some("fp8<32x128>"));
        let odd: Vec<RowRun> = (0..8).map(|h| run(h * 20, 20)).collect();
        assert_eq!(kept("fp8", &odd, &[8, 20], &[64]), None);
    }

    #[test]
    fn columns_keep_their_blocks() {
        let all = [run(0, 64)];
        assert_eq!(kept("q4", &all, &[64], &[4, 16]).as_deref(), Some("q4<g32>"));
        assert_eq!(kept("q4", &all, &[64], &[4, 20]), None);
        assert_eq!(kept("q4", &all, &[64], &[40]).as_deref(), Some("q4<g32>"));
        assert_eq!(kept("q4<g32,zero>", &all, &[64], &[40]), None);
        let half = |column| [RowRun { column, ..run(0, 64) }];
        assert_eq!(kept("q4", &half(64), &[64], &[64]).as_deref(), Some("q4<g32>"));
        assert_eq!(kept("q4", &half(48), &[64], &[48]), None);
        assert_eq!(kept("q4<g32,ordered>", &half(64), &[64], &[64]), None);
        assert_eq!(kept("u4", &half(256), &[64], &[256]).as_deref(), Some("u4<g32,k256>"));
        assert_eq!(kept("u4", &half(128), &[64], &[256]), None);
    }
}
