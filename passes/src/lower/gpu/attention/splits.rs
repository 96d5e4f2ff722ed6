//! Where the splits of positions lie that decoded runs are worked on in.

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::Sym;

use super::decode::{CHUNK, WARPS};

/// How positions are split: rows `(chunks of a warp, position where they begin)`. Few where a context begins, so that a short one keeps more blocks busy.
const SPLITS: [(u64, u64); 2] = [(1, 0), (MOST_CHUNKS, 4096)];
/// Most chunks of a warp.
pub const MOST_CHUNKS: u64 = 4;

/// A row of [`SPLITS`].
struct Row {
    /// Its first position, and the number of its first split.
    position: u64,
    number: u64,
    chunks: u64,
}

impl Row {
    fn all() -> impl Iterator<Item = Self> {
        let ends = SPLITS.into_iter().skip(1).map(|(_, position)| Some(position)).chain([None]);
        SPLITS.into_iter().zip(ends).scan(0, |next, ((chunks, position), end)| {
            let row = Self { position, number: *next, chunks };
            *next += end.map_or(0, |end| (end - position) / row.positions());
            Some(row)
        })
    }

    /// Positions of a split.
    const fn positions(&self) -> u64 {
        WARPS * self.chunks * CHUNK
    }
}

/// `f` of the row that `x` lies in, where rows begin at `begin`.
fn chosen<const N: usize>(
    k: &mut KernelBuilder,
    x: Val,
    begin: impl Fn(&Row) -> u64,
    f: impl Fn(&mut KernelBuilder, &Row, Val) -> [Val; N],
) -> [Val; N] {
    let mut found: Option<[Val; N]> = None;
    for row in Row::all() {
        let border = k.index(begin(&row));
        let within = k.sub(x, border);
        let values = f(k, &row, within);
        found = Some(match found {
            None => values,
            Some(before) => {
                let beyond = k.cmp(Pred::Ge, x, border);
                std::array::from_fn(|i| k.select(beyond, values[i], before[i]))
            }
        });
    }
    found.expect("there are rows")
}

/// How many splits a token of this position sees.
pub fn splits_of(k: &mut KernelBuilder, position: Val) -> Val {
    let [count] = chosen(
        k,
        position,
        |row| row.position,
        |k, row, within| {
            let number = k.div_const(within, row.positions());
            [k.add_const(number, row.number + 1)]
        },
    );
    count
}

/// The first position of split `number`, and how many chunks a warp has of it.
pub fn split_range(k: &mut KernelBuilder, number: Val) -> [Val; 2] {
    chosen(
        k,
        number,
        |row| row.number,
        |k, row, within| {
            let first = k.mul_const(within, row.positions());
            [k.add_const(first, row.position), k.index(row.chunks)]
        },
    )
}

/// The splits that the pages of a step may have: no fewer than there are.
pub fn split_bound(page_tokens: u64) -> Extent {
    let rows: Vec<Row> = Row::all().collect();
    let bound = |(i, row): (usize, &Row)| {
        let all = (Extent::from(Sym::P) * page_tokens.into()).ceil_div(row.positions());
        rows.get(i + 1).map_or(all.clone(), |next| all.min((next.number - row.number).into()))
    };
    let bounds = rows.iter().enumerate().map(bound);
    bounds.reduce(|sum, bound| sum + bound).expect("there are rows")
}
