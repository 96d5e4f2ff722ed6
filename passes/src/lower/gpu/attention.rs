//! What stands between the projections of a gated-attention layer and its output projection, by blocks of threads.
//!
//! norm_rope_append  a warp a head of q, or a kv head with its v, of one token
//! gated_attention   block: one kv head with the query heads that share it, for a few tokens of one sequence; 32 positions at a time:
//!   score   a warp some positions: keys in registers, `s = scale · q · k`
//!   soften  a warp a row: `m ← max`, `p = exp(s − m)`, `l ← l·c + Σp`
//!   weigh   a thread a column and some of the positions: `o ← o·c + Σ p·v`; what comes next is loaded meanwhile
//!   split   at the end of a split of positions the threads of a column put their sums together; (m, l, o) are merged with those before: `o ← o·a + o'·c`
//!   epilogue  out = o / l · sigmoid(output_gate)
//! traffic  2 · 4 · head_dim bytes a kv head and position: bound by memory in short runs
//!
//! Splits are laid by absolute position (`SPLITS`). In runs of few tokens each split is a block's, which hands its (m, l, o) to the tail, and this merges them; in
//! longer runs one block does all splits of its tokens. Both merge in the order of positions, with the same operations: a token's bits depend on neither.

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::{Sym, pad};
use nextc_ir::types::TENTATIVE_TOKENS;

use super::super::LowerError;
use super::super::matmul::{mean_rsqrt, row_ptr};
use super::super::pages::Pages;
use super::super::ports::{Lowered, Port, Ports, Site};
use super::{Element, Place, begin, extent, lanes_before, lanes_of, warp_count, warp_max, warp_sum, warp_sums};

/// Heads that a block norms: a warp each.
const NORM_WARPS: u64 = 4;

/// The sequence of token `t`, by a warp: how many sequences end at or before it.
pub fn sequence_of(k: &mut KernelBuilder, cu_seqlens: Port, lane: Val, t: Val) -> Val {
    let cu_seqlens = k.param(cu_seqlens);
    let (count, none) = (k.dim(Sym::B), k.const_i32(0));
    let one = k.const_i32(1);
    let mine = k.for_carry((lane, count, 32), &[none], |k, b, found| {
        let next = k.add_const(b, 1);
        let end = k.load_index(cu_seqlens, next);
        let before = k.cmp(Pred::Le, end, t);
        let more = k.add(found[0], one);
        vec![k.select(before, more, found[0])]
    })[0];
    let all = warp_count(k, mine);
    k.widen(all)
}

/// What norms and rotates heads.
struct Rotation {
    inv_freq: Port,
    frequencies: u64,
    factor: f32,
    eps: f32,
    width: u64,
}

impl Rotation {
    /// `x * rsqrt(mean(x²) + eps) * (1 + w)` of one head, by a warp, to shared memory.
    fn norm(&self, k: &mut KernelBuilder, elements: &[Element], (x, w, to): (Val, Val, Val)) {
        let zero = k.const_f32(0.0);
        let [x, w] = [x, w].map(|p| elements.iter().map(|e| e.load(k, p)).collect::<Vec<_>>());
        let sum = x.iter().fold(zero, |sum, &x| k.fma(x, x, sum));
        let sum = warp_sum(k, sum);
        let scale = mean_rsqrt(k, sum, self.width, self.eps);
        let one = k.const_f32(1.0);
        for ((element, x), w) in elements.iter().zip(x).zip(w) {
            let gain = k.fadd(w, one);
            let value = k.fmul(x, scale);
            let value = k.fmul(value, gain);
            element.store(k, to, value);
        }
    }

    /// The rotated element of a normed head: pairs are `(j, j + n)`.
    fn rotated(&self, k: &mut KernelBuilder, normed: Val, element: &Element, first: u64, position: Val) -> Val {
        let own = element.load(k, normed);
        if first >= 2 * self.frequencies {
            return own;
        }
        let n = k.index(self.frequencies);
        let ends = k.add(n, n);
        let rotates = k.cmp(Pred::Lt, element.at, ends);
        let rotate = |k: &mut KernelBuilder| {
            let is_first = k.cmp(Pred::Lt, element.at, n);
            let (further, back) = (k.add(element.at, n), k.sub(element.at, n));
            let (j, partner) = (k.select(is_first, element.at, back), k.select(is_first, further, back));
            let inv_freq = k.param(self.inv_freq);
            let (f, other) = (k.load_f32(inv_freq, j), k.load_f32(normed, partner));
            let position = k.narrow(position);
            let position = k.to_float(position);
            let angle = k.fmul(position, f);
            let (sin, cos) = k.sin_cos(angle);
            let factor = k.const_f32(self.factor);
            let (sin, cos) = (k.fmul(sin, factor), k.fmul(cos, factor));
            let (straight, crossed) = (k.fmul(own, cos), k.fmul(other, sin));
            let (minus, plus) = (k.fsub(straight, crossed), k.fadd(straight, crossed));
            vec![k.select(is_first, minus, plus)]
        };
        k.if_else(rotates, rotate, |_| vec![own])[0]
    }
}

/// `norm_rope_append`.
pub fn lower_norm_rope_append(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let heads = site.inner(site.named("q"))[0];
    let [q, key, v, q_norm, k_norm, inv_freq] =
        ["q", "k", "v", "q_norm", "k_norm", "inv_freq"].map(|n| ports.read(n, site.named(n)));
    let pages = Pages::ports(site, &mut ports, true);
    let out = ports.write("q_out", site.result(0));
    let rotation = Rotation {
        inv_freq,
        frequencies: site.weight(site.named("inv_freq")).shape[0],
        factor: site.float("factor"),
        eps: site.float("eps"),
        width: pages.row.width,
    };
    let elems = pad(pages.row.width);
    let all_heads = heads + pages.heads;
    let groups = all_heads.div_ceil(NORM_WARPS);
    let mut k = ports.builder(site, Extent::Sym(Sym::T) * groups.into());
    k.threads(NORM_WARPS as u32 * 32);
    let place = Place::here(&mut k);
    let task = k.task();
    let (t, group) = (k.div_const(task, groups), k.rem_const(task, groups));
    let first = k.mul_const(group, NORM_WARPS);
    let head = k.add(first, place.warp);
    let normed = k.shared(DType::F32, NORM_WARPS * elems);
    let normed = row_ptr(&mut k, normed, place.warp, elems);
    let elements = place.places(&mut k, elems);
    let [q_heads, ends] = [heads, all_heads].map(|n| k.index(n));
    let (is_query, exists) = (k.cmp(Pred::Lt, head, q_heads), k.cmp(Pred::Lt, head, ends));
    begin(&mut k);
    let b = sequence_of(&mut k, pages.cu_seqlens, place.lane, t);
    let (slot, position, zero) = (pages.slot(&mut k, b), pages.position(&mut k, t), k.const_i64(0));
    let live = k.cmp(Pred::Ge, slot, zero);
    // a warp without a head does what the last one does, and stores nothing
    let last = k.index(all_heads - 1);
    let head = k.min_i64(head, last);
    let kv_head = k.sub(head, q_heads);
    let kv_head = k.select(is_query, zero, kv_head);
    let q_head = k.select(is_query, head, zero);
    let row = |k: &mut KernelBuilder, port: Port, heads: u64, head: Val| {
        let base = k.param(port);
        let row = row_ptr(k, base, t, heads * elems);
        row_ptr(k, row, head, elems)
    };
    let (x, w, out) = (row(&mut k, q, heads, q_head), k.param(q_norm), row(&mut k, out, heads, q_head));
    let (kx, kw, v) = (row(&mut k, key, pages.heads, kv_head), k.param(k_norm), row(&mut k, v, pages.heads, kv_head));
    let (x, w) = (k.select(is_query, x, kx), k.select(is_query, w, kw));
    rotation.norm(&mut k, &elements, (x, w, normed));
    k.barrier();
    let queries = |k: &mut KernelBuilder| {
        for (element, first) in elements.iter().zip((0..).step_by(32)) {
            let nothing = k.const_f32(0.0);
            let value = rotation.rotated(k, normed, element, first, position);
            let value = k.select(live, value, nothing);
            element.store(k, out, value);
        }
        Vec::new()
    };
    let keys = |k: &mut KernelBuilder| {
        let appends = k.and(live, exists);
        k.if_then(appends, |k| {
            let (page, at) = (k.div_const(position, pages.page_tokens), k.rem_const(position, pages.page_tokens));
            let (keys, values) = pages.block(k, b, page, kv_head);
            let (key_out, v_out) = (pages.row(k, keys, at), pages.row(k, values, at));
            for (element, first) in elements.iter().zip((0..).step_by(32)) {
                let value = rotation.rotated(k, normed, element, first, position);
                pages.store_32(k, (key_out, first), element, value);
                let value = element.load(k, v);
                pages.store_32(k, (v_out, first), element, value);
            }
        });
        Vec::new()
    };
    k.if_else(is_query, queries, keys);
    Ok(ports.finish(k.finish()))
}

/// Positions that are done together.
const CHUNK: u64 = 32;
/// Splits of positions, each row `(positions of a split, position where the next row begins)`; the last row has no end. Short at the beginning, where a short context
/// would else keep few blocks busy.
const SPLITS: [(u64, u64); 3] = [(32, 1024), (128, 4096), (512, u64::MAX)];
/// Rows (tokens times query heads) of a block at most, if a token has not more: each is an accumulator in every thread.
const MOST_ROWS: u64 = 16;
/// Query heads that are scored together: with some positions one product a lane.
const HEADS_AT_ONCE: u64 = 8;
/// Positions that a warp scores together.
const POSITIONS_AT_ONCE: usize = 4;
/// Threads of a block: with 128 registers each they fill a multiprocessor.
const THREADS: u64 = 512;
/// Most threads that share a column: each weighs at least four positions of a chunk.
const MOST_GROUPS: u64 = 8;
/// Most rows of a token.
const MOST_HEADS: u64 = 32;
/// Splits whose factors the tail works out together, and whose sums it asks for together.
const MERGED: u64 = 16;

/// The splits that `P` pages of `page_tokens` positions may have: no fewer than there are.
fn split_bound(page_tokens: u64) -> Extent {
    let mut bound = Extent::from(0);
    let mut begin = 0;
    for (positions, end) in SPLITS {
        let covering = (Extent::from(Sym::P) * page_tokens.into()).ceil_div(positions);
        let most = if end == u64::MAX { covering } else { covering.min(((end - begin) / positions).into()) };
        bound = if begin == 0 { most } else { bound + most };
        begin = end;
    }
    bound
}

/// How the work is cut.
#[derive(Clone, Copy)]
struct Tile {
    /// Query heads of a kv head.
    heads: u64,
    /// Tokens of a block.
    tokens: u64,
    /// Elements of a head.
    elems: u64,
    /// Threads that have a column each, some of them none.
    columns: u64,
    /// Threads that have the same column, each with its part of a chunk.
    groups: u64,
}

impl Tile {
    fn of(heads: u64, elems: u64) -> Option<Self> {
        let tokens = (MOST_ROWS / heads.max(1)).clamp(1, TENTATIVE_TOKENS);
        let columns = elems.next_power_of_two().max(32);
        let groups = (THREADS / columns).min(MOST_GROUPS);
        (heads <= MOST_HEADS && groups > 0).then_some(Self { heads, tokens, elems, columns, groups })
    }

    fn rows(&self) -> u64 {
        self.heads * self.tokens
    }

    fn threads(&self) -> u64 {
        self.columns * self.groups
    }

    /// Rows of a thread, once the sums of a column are put together.
    fn own_rows(&self) -> u64 {
        self.rows().div_ceil(self.groups)
    }

    /// Positions of a chunk that a thread weighs.
    fn weighed(&self) -> u64 {
        CHUNK / self.groups
    }

    /// Positions of a chunk that a warp scores, for one token or for all.
    fn scored(&self) -> u64 {
        CHUNK / self.scoring_warps()
    }

    /// Warps that share the positions of a token: those of a block, or its share of them where they can be shared out.
    fn scoring_warps(&self) -> u64 {
        let shared = self.warps() / self.tokens;
        if self.warps().is_multiple_of(self.tokens) && CHUNK.is_multiple_of(shared) { shared } else { self.warps() }
    }

    fn warps(&self) -> u64 {
        self.threads() / 32
    }

    /// Rows of a warp at most.
    fn warp_rows(&self) -> u64 {
        self.rows().div_ceil(self.warps())
    }

    /// Elements that a task hands to the tail: o of its rows, then m, then l.
    fn partial_elems(&self) -> u64 {
        self.rows() * self.elems + 2 * pad(self.rows())
    }

    /// Most tiles of runs that are split.
    fn split_tiles(&self) -> Extent {
        (Extent::from(Sym::B) * TENTATIVE_TOKENS.div_ceil(self.tokens).into()).min(Sym::T.into())
    }

    /// Most tiles of longer runs: of each at most one is not full.
    fn whole_tiles(&self) -> Extent {
        Extent::from(Sym::T).ceil_div(self.tokens) + Extent::from(Sym::T).ceil_div(TENTATIVE_TOKENS + 1)
    }
}

/// `gated_attention`.
pub fn lower_gated_attention(site: &Site<'_>) -> Option<Result<Lowered, LowerError>> {
    let mut ports = Ports::default();
    let heads = site.inner(site.named("q"))[0];
    let (q, gate) = (ports.read("q", site.named("q")), ports.read("output_gate", site.named("output_gate")));
    let pages = Pages::ports(site, &mut ports, false);
    let out = ports.write("out", site.result(0));
    let tile = Tile::of(heads / pages.heads, pad(pages.row.width))?;
    if !pages.page_tokens.is_multiple_of(CHUNK) || pages.row.dtype != DType::F32 {
        return None;
    }
    let splits = split_bound(pages.page_tokens);
    let split_tasks = tile.split_tiles() * pages.heads.into() * splits.clone();
    let grid = split_tasks.clone() + tile.whole_tiles() * pages.heads.into();
    let mut k = ports.builder(site, grid);
    k.threads(tile.threads() as u32);
    let attention = Attention { tile, pages, q, gate, out, heads, scale: site.float("scale") };
    attention.body(&mut k, &splits, &split_tasks);
    let tail_grid = tile.split_tiles() * (tile.tokens * heads).into();
    Some(Ok(ports.finish(k.finish_with_tail_grid(tail_grid, |k| attention.tail(k, &splits)))))
}

/// What the kernel is connected to.
struct Attention {
    tile: Tile,
    pages: Pages,
    q: Port,
    gate: Port,
    out: Port,
    heads: u64,
    scale: f32,
}

/// Some tokens of one sequence.
#[derive(Clone, Copy)]
struct Tokens {
    /// The sequence.
    sequence: Val,
    /// Whether it is one; else the tokens are padding.
    live: Val,
    first: Val,
    count: Val,
    /// The position of the first.
    position: Val,
}

/// Memory that the threads of a block share.
#[derive(Clone, Copy)]
struct Smem {
    /// `[tokens][heads][elems]`.
    q: Val,
    /// `[2][rows][CHUNK]`: scores, then probabilities, of chunks of even and of odd numbers.
    scores: Val,
    /// `[2][rows]`: what sums so far are multiplied with.
    changes: Val,
    /// `[groups][rows][elems]`: sums of the threads of a column, to be put together.
    parts: Val,
    /// `[2][rows]`: a and c of a merge.
    factors: Val,
}

/// Running sums of a block, in registers.
#[derive(Clone)]
struct Sums {
    /// The column of this thread, of each row of the block; put together, of each row of the thread.
    o: Vec<Val>,
    /// For each row of the warp.
    max: Vec<Val>,
    /// As `max`.
    sum: Vec<Val>,
}

impl Sums {
    fn flat(&self) -> Vec<Val> {
        [self.o.as_slice(), &self.max, &self.sum].concat()
    }

    fn of(tile: &Tile, flat: &[Val]) -> Self {
        let (o, rest) = flat.split_at(flat.len() - 2 * tile.warp_rows() as usize);
        let (max, sum) = rest.split_at(tile.warp_rows() as usize);
        Self { o: o.to_vec(), max: max.to_vec(), sum: sum.to_vec() }
    }

    /// Sums of nothing, over so many rows of this thread.
    fn begin(k: &mut KernelBuilder, tile: &Tile, rows: u64) -> Self {
        let (zero, lowest) = (k.const_f32(0.0), k.const_f32(f32::NEG_INFINITY));
        let warp_rows = tile.warp_rows() as usize;
        Self { o: vec![zero; rows as usize], max: vec![lowest; warp_rows], sum: vec![zero; warp_rows] }
    }
}

impl Attention {
    /// The `number`th tile of the runs that are split, or of the longer ones, by a warp; `None` in the first value if there is none.
    fn find(&self, k: &mut KernelBuilder, lane: Val, number: Val, split: bool) -> (Val, Tokens) {
        let cu_seqlens = k.param(self.pages.cu_seqlens);
        let (zero, count, number) = (k.const_i64(0), k.dim(Sym::B), k.narrow(number));
        let (none, one) = (k.const_i32(0), k.const_i32(1));
        let found = k.for_carry((zero, count, 32), &[none, none, none], |k, base, carried| {
            let b = k.add(base, lane);
            let exists = k.cmp(Pred::Lt, b, count);
            let length = k.if_else(
                exists,
                |k| {
                    let next = k.add_const(b, 1);
                    let (begin, end) = (k.load(DType::I32, 1, cu_seqlens, b), k.load(DType::I32, 1, cu_seqlens, next));
                    vec![k.sub(end, begin)]
                },
                |_| vec![none],
            )[0];
            let (up, size) = (k.const_i32(self.tile.tokens as i32 - 1), k.const_i32(self.tile.tokens as i32));
            let up = k.add(length, up);
            let tiles = k.div(up, size);
            let most = k.const_i32(TENTATIVE_TOKENS as i32);
            let is_mine = k.cmp(if split { Pred::Le } else { Pred::Gt }, length, most);
            let tiles = k.select(is_mine, tiles, none);
            let (before, total) = lanes_before(k, lane, (none, tiles), |k, a, b| k.add(a, b));
            let before = k.add(before, carried[0]);
            let within = k.sub(number, before);
            let (from, to) = (k.cmp(Pred::Ge, within, none), k.cmp(Pred::Lt, within, tiles));
            let hit = k.and(from, to);
            let (b, index) = (k.narrow(b), k.add(within, one));
            let pair = [b, index].map(|x| {
                let x = k.select(hit, x, none);
                warp_count(k, x)
            });
            vec![k.add(carried[0], total), k.add(carried[1], pair[0]), k.add(carried[2], pair[1])]
        });
        let exists = k.cmp(Pred::Gt, found[2], none);
        let (sequence, index) = (k.widen(found[1]), k.sub(found[2], one));
        let index = k.select(exists, index, none);
        let index = k.widen(index);
        let next = k.add_const(sequence, 1);
        let (begin, end) = (k.load_index(cu_seqlens, sequence), k.load_index(cu_seqlens, next));
        let skipped = k.mul_const(index, self.tile.tokens);
        let first = k.add(begin, skipped);
        let (left, most) = (k.sub(end, first), k.index(self.tile.tokens));
        let (slot, position) = (self.pages.slot(k, sequence), self.pages.position(k, begin));
        let tokens = Tokens {
            sequence,
            live: k.cmp(Pred::Ge, slot, zero),
            first,
            count: k.min_i64(left, most),
            position: k.add(position, skipped),
        };
        (exists, tokens)
    }

    fn body(&self, k: &mut KernelBuilder, splits: &Extent, split_tasks: &Extent) {
        let tile = &self.tile;
        let place = Place::here(k);
        let smem = Smem {
            q: k.shared(DType::F32, tile.rows() * tile.elems),
            scores: k.shared(DType::F32, 2 * tile.rows() * CHUNK),
            changes: k.shared(DType::F32, 2 * tile.rows()),
            parts: k.shared(DType::F32, tile.groups * tile.rows() * tile.elems),
            factors: k.shared(DType::F32, 2 * tile.rows()),
        };
        let partials = k.partials(DType::F32, tile.partial_elems());
        let (task, splits, split_tasks) = (k.task(), extent(k, splits), extent(k, split_tasks));
        begin(k);
        let is_split = k.cmp(Pred::Lt, task, split_tasks);
        let block = Block { attention: self, place, smem };
        k.if_else(
            is_split,
            |k| {
                let (pair, split) = (k.div(task, splits), k.rem(task, splits));
                let (number, head) = (k.div_const(pair, self.pages.heads), k.rem_const(pair, self.pages.heads));
                let (exists, tokens) = self.find(k, place.lane, number, true);
                let live = k.and(exists, tokens.live);
                k.if_then(live, |k| block.split(k, &tokens, head, split, partials));
                Vec::new()
            },
            |k| {
                let pair = k.sub(task, split_tasks);
                let (number, head) = (k.div_const(pair, self.pages.heads), k.rem_const(pair, self.pages.heads));
                let (exists, tokens) = self.find(k, place.lane, number, false);
                k.if_then(exists, |k| block.whole(k, &tokens, head));
                Vec::new()
            },
        );
    }

    /// Pointer to the row of one query head of token `t`.
    fn row(&self, k: &mut KernelBuilder, port: Port, t: Val, head: Val) -> Val {
        let base = k.param(port);
        let row = row_ptr(k, base, t, self.heads * self.tile.elems);
        row_ptr(k, row, head, self.tile.elems)
    }

    /// `out = o / sum · sigmoid(gate)` of one element.
    fn finish(&self, k: &mut KernelBuilder, (o, sum): (Val, Val), (t, head, column): (Val, Val, Val)) {
        let (gate, out) = (self.row(k, self.gate, t, head), self.row(k, self.out, t, head));
        let gate = k.load_f32(gate, column);
        let x = k.fdiv(o, sum);
        let gate = k.sigmoid(gate);
        let x = k.fmul(x, gate);
        k.store(out, column, x);
    }

    /// Merges the splits of one query head of one token.
    fn tail(&self, k: &mut KernelBuilder, splits: &Extent) {
        let tile = &self.tile;
        let place = Place::here(k);
        let factors = k.shared(DType::F32, 3 * MERGED);
        let partials = k.partials(DType::F32, tile.partial_elems());
        let (task, splits) = (k.task(), extent(k, splits));
        let (pair, head) = (k.div_const(task, self.heads), k.rem_const(task, self.heads));
        let (number, i) = (k.div_const(pair, tile.tokens), k.rem_const(pair, tile.tokens));
        begin(k);
        let (exists, tokens) = self.find(k, place.lane, number, true);
        let is_token = k.cmp(Pred::Lt, i, tokens.count);
        let exists = k.and(exists, is_token);
        let (kv_head, shared) = (k.div_const(head, tile.heads), k.rem_const(head, tile.heads));
        let row = k.mul_const(i, tile.heads);
        let row = k.add(row, shared);
        let first = k.mul_const(number, self.pages.heads);
        let first = k.add(first, kv_head);
        let first = k.mul(first, splits);
        let first = row_ptr(k, partials, first, tile.partial_elems());
        k.if_then(exists, |k| {
            let t = k.add(tokens.first, i);
            k.if_else(
                tokens.live,
                |k| {
                    let position = k.add(tokens.position, i);
                    let count = splits_of(k, position);
                    let merged = Merge { attention: self, place, factors, first, row, count };
                    merged.run(k, (t, head));
                    Vec::new()
                },
                |k| {
                    self.zero_out(k, &place, t, head);
                    Vec::new()
                },
            );
        });
    }

    fn zero_out(&self, k: &mut KernelBuilder, place: &Place, t: Val, head: Val) {
        let (out, nothing, elems) = (self.row(k, self.out, t, head), k.const_f32(0.0), k.index(self.tile.elems));
        k.for_each((place.thread, elems, self.tile.threads()), |k, c| k.store(out, c, nothing));
    }
}

/// How many splits a token of this position sees: the number of the split that the position lies in, and one.
fn splits_of(k: &mut KernelBuilder, position: Val) -> Val {
    let number = chosen_split(k, position, |k, position, (begin, number, positions)| {
        let begin = k.index(begin);
        let within = k.sub(position, begin);
        let within = k.div_const(within, positions);
        k.add_const(within, number)
    });
    k.add_const(number, 1)
}

/// `f` of the row of [`SPLITS`] that holds a position: `(first position, number of its first split, positions of a split)`.
fn chosen_split(
    k: &mut KernelBuilder,
    position: Val,
    f: impl Fn(&mut KernelBuilder, Val, (u64, u64, u64)) -> Val,
) -> Val {
    let (mut begin, mut number, mut chosen) = (0, 0, None);
    for (positions, end) in SPLITS {
        let value = f(k, position, (begin, number, positions));
        chosen = Some(match chosen {
            None => value,
            Some(before) => {
                let border = k.index(begin);
                let beyond = k.cmp(Pred::Ge, position, border);
                k.select(beyond, value, before)
            }
        });
        number += (end - begin) / positions;
        begin = end;
    }
    chosen.expect("there are splits")
}

/// The first position of split `number`, and how many it has.
fn split_range(k: &mut KernelBuilder, number: Val) -> (Val, Val) {
    let (mut begin, mut first, mut chosen) = (0, 0, None);
    for (positions, end) in SPLITS {
        let (row, base) = (k.index(first), k.index(begin));
        let within = k.sub(number, row);
        let within = k.mul_const(within, positions);
        let (at, size) = (k.add(base, within), k.index(positions));
        chosen = Some(match chosen {
            None => (at, size),
            Some((before, before_size)) => {
                let beyond = k.cmp(Pred::Ge, number, row);
                (k.select(beyond, at, before), k.select(beyond, size, before_size))
            }
        });
        first += (end - begin) / positions;
        begin = end;
    }
    chosen.expect("there are splits")
}

/// A block of threads at work on some tokens.
struct Block<'a> {
    attention: &'a Attention,
    place: Place,
    smem: Smem,
}

/// What a block sums over.
struct Context<'a> {
    tokens: &'a Tokens,
    /// The kv head.
    head: Val,
    /// One past the last position that a token of the block sees.
    end: Val,
}

/// A chunk of positions.
#[derive(Clone, Copy)]
struct Chunk<'a> {
    tokens: &'a Tokens,
    /// The first position.
    first: Val,
    /// Where scores and changes go.
    scores: Val,
    changes: Val,
}

impl Block<'_> {
    fn tile(&self) -> &Tile {
        &self.attention.tile
    }

    /// One split; its sums go to the tail.
    fn split(&self, k: &mut KernelBuilder, tokens: &Tokens, head: Val, split: Val, partials: Val) {
        let (first, size) = split_range(k, split);
        let end = self.positions(k, tokens);
        let some = k.cmp(Pred::Lt, first, end);
        k.if_then(some, |k| {
            self.load_queries(k, tokens, head);
            let sums = self.positions_of(k, tokens, head, first, size);
            self.hand_over(k, &sums, partials);
        });
    }

    /// One past the last position that a token sees.
    fn positions(&self, k: &mut KernelBuilder, tokens: &Tokens) -> Val {
        k.add(tokens.position, tokens.count)
    }

    fn load_queries(&self, k: &mut KernelBuilder, tokens: &Tokens, head: Val) {
        let tile = self.tile();
        let row = tile.heads * tile.elems;
        let first_head = k.mul_const(head, tile.heads);
        let (from, elems) = (k.mul_const(self.place.thread, 4), k.mul_const(tokens.count, row));
        k.for_each((from, elems, tile.threads() * 4), |k, at| {
            let (i, c) = (k.div_const(at, row), k.rem_const(at, row));
            let t = k.add(tokens.first, i);
            let q = self.attention.row(k, self.attention.q, t, first_head);
            let x = k.load(DType::F32, 4, q, c);
            k.store(self.smem.q, at, x);
        });
        k.barrier();
    }

    /// The sums over `size` positions from `first` on, as far as tokens see them, put together.
    fn positions_of(&self, k: &mut KernelBuilder, tokens: &Tokens, head: Val, first: Val, size: Val) -> Sums {
        let tile = self.tile();
        let end = self.positions(k, tokens);
        let stop = k.add(first, size);
        let stop = k.min_i64(stop, end);
        let context = Context { tokens, head, end };
        let (sums, keys) = (Sums::begin(k, tile, tile.rows()).flat(), self.load_keys(k, &context, first));
        let carried = [sums.clone(), keys].concat();
        let left = k.for_carry((first, stop, CHUNK), &carried, |k, first, carried| {
            let (flat, keys) = carried.split_at(sums.len());
            let values = self.load_values(k, &context, first);
            let next = k.add_const(first, CHUNK);
            let more = k.cmp(Pred::Lt, next, stop);
            let number = k.div_const(first, CHUNK);
            let parity = k.rem_const(number, 2);
            let chunk = Chunk {
                tokens,
                first,
                scores: row_ptr(k, self.smem.scores, parity, tile.rows() * CHUNK),
                changes: row_ptr(k, self.smem.changes, parity, tile.rows()),
            };
            self.score(k, &chunk, keys);
            // on their way while scores become weights
            let next = k.if_else(more, |k| self.load_keys(k, &context, next), |_| keys.to_vec());
            let sums = self.weigh_chunk(k, &chunk, &values, &Sums::of(tile, flat));
            [sums.flat(), next].concat()
        });
        let sums = Sums::of(tile, &left[..sums.len()]);
        self.put_together(k, sums)
    }

    /// Keys and values of the chunk that begins at `first`, and the number of its last position that somebody sees: of later ones those of this are read.
    fn rows_of(&self, k: &mut KernelBuilder, context: &Context<'_>, first: Val) -> (Val, Val, Val) {
        let (tile, pages) = (self.tile(), &self.attention.pages);
        let (page, at) = (k.div_const(first, pages.page_tokens), k.rem_const(first, pages.page_tokens));
        let (keys, values) = pages.block(k, context.tokens.sequence, page, context.head);
        let [keys, values] = [keys, values].map(|rows| row_ptr(k, rows, at, tile.elems));
        let (one, left) = (k.const_i64(1), k.sub(context.end, first));
        (keys, values, k.sub(left, one))
    }

    /// This thread's share of the keys of a chunk: quads of its warp's positions.
    fn load_keys(&self, k: &mut KernelBuilder, context: &Context<'_>, first: Val) -> Vec<Val> {
        let tile = self.tile();
        let (keys, _, last) = self.rows_of(k, context, first);
        let quads = self.place.places(k, tile.elems / 4);
        let from = self.first_scored(k);
        let rows = (0..tile.scored()).flat_map(|j| {
            let j = k.add_const(from, j);
            let row = k.min_i64(j, last);
            self.row_quads(k, keys, row, &quads)
        });
        rows.collect()
    }

    /// The first position that this warp scores.
    fn first_scored(&self, k: &mut KernelBuilder) -> Val {
        let number = k.rem_const(self.place.warp, self.tile().scoring_warps());
        k.mul_const(number, self.tile().scored())
    }

    /// This thread's share of the values of a chunk: its column of its group's positions.
    fn load_values(&self, k: &mut KernelBuilder, context: &Context<'_>, first: Val) -> Vec<Val> {
        let tile = self.tile();
        let (_, values, last) = self.rows_of(k, context, first);
        let (group, column) = self.column(k);
        let last_column = k.index(tile.elems - 1);
        let column = k.min_i64(column, last_column);
        let from = k.mul_const(group, tile.weighed());
        let load = |j| {
            let j = k.add_const(from, j);
            let row = k.min_i64(j, last);
            let at = k.mul_const(row, tile.elems);
            let at = k.add(at, column);
            k.load_f32(values, at)
        };
        (0..tile.weighed()).map(load).collect()
    }

    /// The group of this thread, and its column.
    fn column(&self, k: &mut KernelBuilder) -> (Val, Val) {
        let columns = self.tile().columns;
        (k.div_const(self.place.thread, columns), k.rem_const(self.place.thread, columns))
    }

    /// A chunk of positions that are scored.
    fn weigh_chunk(&self, k: &mut KernelBuilder, chunk: &Chunk<'_>, values: &[Val], sums: &Sums) -> Sums {
        k.barrier();
        let (max, sum) = self.soften(k, chunk, sums);
        k.barrier();
        Sums { o: self.weigh(k, chunk, values, &sums.o), max, sum }
    }

    /// The rows that are this thread's once sums are put together: `(row, whether there is one and the thread has a column)`.
    fn own_rows(&self, k: &mut KernelBuilder) -> Vec<(Val, Val)> {
        let tile = self.tile();
        let (group, column) = self.column(k);
        let (rows, elems) = (k.index(tile.rows()), k.index(tile.elems));
        let has_column = k.cmp(Pred::Lt, column, elems);
        (0..tile.own_rows())
            .map(|i| {
                let row = k.add_const(group, i * tile.groups);
                let exists = k.cmp(Pred::Lt, row, rows);
                (row, k.and(exists, has_column))
            })
            .collect()
    }

    /// The sums of all threads of a column, in the order of the groups, of the rows that are this thread's.
    fn put_together(&self, k: &mut KernelBuilder, sums: Sums) -> Sums {
        let tile = self.tile();
        let (group, column) = self.column(k);
        let elems = k.index(tile.elems);
        let has_column = k.cmp(Pred::Lt, column, elems);
        let mine = row_ptr(k, self.smem.parts, group, tile.rows() * tile.elems);
        k.if_then(has_column, |k| {
            for (row, &o) in (0..).zip(&sums.o) {
                let at = k.add_const(column, row * tile.elems);
                k.store(mine, at, o);
            }
        });
        k.barrier();
        let zero = k.const_f32(0.0);
        let together = self.own_rows(k).into_iter().map(|(row, exists)| {
            let sum = |k: &mut KernelBuilder| {
                let at = k.mul_const(row, tile.elems);
                let at = k.add(at, column);
                let parts = (0..tile.groups).map(|group| {
                    let at = k.add_const(at, group * tile.rows() * tile.elems);
                    k.load_f32(self.smem.parts, at)
                });
                let parts: Vec<Val> = parts.collect();
                vec![parts[1..].iter().fold(parts[0], |sum, &x| k.fadd(sum, x))]
            };
            k.if_else(exists, sum, |_| vec![zero])[0]
        });
        Sums { o: together.collect(), ..sums }
    }

    /// If token `i` of the block sees some of the chunk: what `then` gives, else `otherwise`.
    fn if_seen(
        &self,
        k: &mut KernelBuilder,
        chunk: &Chunk<'_>,
        i: Val,
        then: impl FnOnce(&mut KernelBuilder) -> Vec<Val>,
        otherwise: &[Val],
    ) -> Vec<Val> {
        let position = k.add(chunk.tokens.position, i);
        let (exists, sees) = (k.cmp(Pred::Lt, i, chunk.tokens.count), k.cmp(Pred::Ge, position, chunk.first));
        let both = k.and(exists, sees);
        k.if_else(both, then, |_| otherwise.to_vec())
    }

    /// `scores[row][j] = scale · q[row] · keys[j]`, lowest for what a token does not see.
    fn score(&self, k: &mut KernelBuilder, chunk: &Chunk<'_>, keys: &[Val]) {
        let tile = self.tile();
        let quads = self.place.places(k, tile.elems / 4);
        let keys: Vec<&[Val]> = keys.chunks(4 * quads.len()).collect();
        let first = self.first_scored(k);
        // a warp scores for one token, or for all
        let tokens: Vec<Val> = match tile.scoring_warps() {
            warps if warps < tile.warps() => vec![k.div_const(self.place.warp, warps)],
            _ => (0..tile.tokens).map(|i| k.index(i)).collect(),
        };
        for (batch, keys) in (0..).step_by(POSITIONS_AT_ONCE).zip(keys.chunks(POSITIONS_AT_ONCE)) {
            let from = k.add_const(first, batch);
            for &i in &tokens {
                let score = |k: &mut KernelBuilder| {
                    for head in (0..tile.heads).step_by(HEADS_AT_ONCE as usize) {
                        self.score_heads(k, chunk, (i, head), (from, keys), &quads);
                    }
                    Vec::new()
                };
                self.if_seen(k, chunk, i, score, &[]);
            }
        }
    }

    /// This thread's share of a row, four neighbours at a time.
    fn row_quads(&self, k: &mut KernelBuilder, rows: Val, row: Val, quads: &[Element]) -> Vec<Val> {
        let row = row_ptr(k, rows, row, self.tile().elems);
        quads
            .iter()
            .flat_map(|quad| {
                let load = |k: &mut KernelBuilder| {
                    let at = k.mul_const(quad.at, 4);
                    let x = k.load(DType::F32, 4, row, at);
                    lanes_of(k, x)
                };
                let zero = k.const_f32(0.0);
                match quad.exists {
                    None => load(k),
                    Some(exists) => k.if_else(exists, load, |_| vec![zero; 4]),
                }
            })
            .collect()
    }

    /// The scores of some heads of token `i` with some positions from `from` on.
    fn score_heads(
        &self,
        k: &mut KernelBuilder,
        chunk: &Chunk<'_>,
        (i, head): (Val, u64),
        (from, keys): (Val, &[&[Val]]),
        quads: &[Element],
    ) {
        let tile = self.tile();
        let zero = k.const_f32(0.0);
        let first_row = k.mul_const(i, tile.heads);
        let mut products = vec![zero; keys.len() * HEADS_AT_ONCE as usize];
        for h in 0..HEADS_AT_ONCE.min(tile.heads - head) {
            let row = k.add_const(first_row, head + h);
            let query = self.row_quads(k, self.smem.q, row, quads);
            for (j, key) in keys.iter().enumerate() {
                let pairs = query.iter().zip(key.iter());
                products[j * HEADS_AT_ONCE as usize + h as usize] = pairs.fold(zero, |sum, (&q, &x)| k.fma(q, x, sum));
            }
        }
        let shares = 32 / products.len() as u64;
        let sum = warp_sums(k, self.place.lane, products);
        let number = k.div_const(self.place.lane, shares);
        let (j, h) = (k.div_const(number, HEADS_AT_ONCE), k.rem_const(number, HEADS_AT_ONCE));
        let (j, row) = (k.add(from, j), k.add_const(h, head));
        let (heads, is_first) = (k.index(tile.heads), k.rem_const(self.place.lane, shares));
        let none = k.const_i64(0);
        let (exists, stores) = (k.cmp(Pred::Lt, row, heads), k.cmp(Pred::Eq, is_first, none));
        let stores = k.and(exists, stores);
        k.if_then(stores, |k| {
            let scale = k.const_f32(self.attention.scale);
            let (score, lowest) = (k.fmul(sum, scale), k.const_f32(f32::NEG_INFINITY));
            let (own, position) = (k.add(chunk.tokens.position, i), k.add(chunk.first, j));
            let sees = k.cmp(Pred::Le, position, own);
            let score = k.select(sees, score, lowest);
            let row = k.add(first_row, row);
            let at = k.mul_const(row, CHUNK);
            let at = k.add(at, j);
            k.store(chunk.scores, at, score);
        });
    }

    /// The rows of this warp: `(number among them, row, its token)`.
    fn warp_rows(&self, k: &mut KernelBuilder) -> Vec<(usize, Val, Val)> {
        let tile = self.tile();
        (0..tile.warp_rows())
            .map(|i| {
                let row = k.add_const(self.place.warp, i * tile.warps());
                (i as usize, row, k.div_const(row, tile.heads))
            })
            .collect()
    }

    /// Scores to probabilities relative to the new maximum; gives the new maxima and sums.
    fn soften(&self, k: &mut KernelBuilder, chunk: &Chunk<'_>, sums: &Sums) -> (Vec<Val>, Vec<Val>) {
        let rows = self.warp_rows(k);
        let pairs = rows.into_iter().map(|(i, row, token)| {
            let (old, sum) = (sums.max[i], sums.sum[i]);
            let soften = |k: &mut KernelBuilder| {
                let at = k.mul_const(row, CHUNK);
                let at = k.add(at, self.place.lane);
                let score = k.load_f32(chunk.scores, at);
                let largest = warp_max(k, score);
                let new = k.fmax(old, largest);
                let shifted = k.fsub(score, new);
                let p = k.exp(shifted);
                k.store(chunk.scores, at, p);
                let change = k.fsub(old, new);
                let change = k.exp(change);
                let zero = k.const_i64(0);
                let is_first = k.cmp(Pred::Eq, self.place.lane, zero);
                k.if_then(is_first, |k| k.store(chunk.changes, row, change));
                let added = warp_sum(k, p);
                vec![new, k.fma(sum, change, added)]
            };
            let pair = self.if_seen(k, chunk, token, soften, &[old, sum]);
            (pair[0], pair[1])
        });
        pairs.unzip()
    }

    /// `o[row] ← o[row] · change + Σ_j p[row][j] · values[j]` over the positions of this thread's group.
    fn weigh(&self, k: &mut KernelBuilder, chunk: &Chunk<'_>, values: &[Val], o: &[Val]) -> Vec<Val> {
        let tile = self.tile();
        let heads = tile.heads as usize;
        let (group, _) = self.column(k);
        let scores = row_ptr(k, chunk.scores, group, tile.weighed());
        let mut next = Vec::with_capacity(o.len());
        for (i, o) in o.chunks(heads).enumerate() {
            let weigh = |k: &mut KernelBuilder| {
                let rows = o.iter().enumerate().map(|(h, &o)| {
                    let row = k.index((i * heads + h) as u64);
                    let change = k.load_f32(chunk.changes, row);
                    // a sum, so that it is no negative zero, which what is not seen would change
                    let zero = k.const_f32(0.0);
                    let mut sum = k.fma(o, change, zero);
                    for (quad, values) in values.chunks(4).enumerate() {
                        let at = k.index((i * heads + h) as u64 * CHUNK + 4 * quad as u64);
                        let p = k.load(DType::F32, 4, scores, at);
                        for (p, &v) in lanes_of(k, p).into_iter().zip(values) {
                            sum = k.fma(p, v, sum);
                        }
                    }
                    sum
                });
                rows.collect()
            };
            let token = k.index(i as u64);
            next.extend(self.if_seen(k, chunk, token, weigh, o));
        }
        next
    }

    /// Stores the sums where the tail finds them.
    fn hand_over(&self, k: &mut KernelBuilder, sums: &Sums, partials: Val) {
        let tile = self.tile();
        let task = k.task();
        let mine = row_ptr(k, partials, task, tile.partial_elems());
        let (_, column) = self.column(k);
        for ((row, exists), &o) in self.own_rows(k).into_iter().zip(&sums.o) {
            k.if_then(exists, |k| {
                let at = k.mul_const(row, tile.elems);
                let at = k.add(at, column);
                k.store(mine, at, o);
            });
        }
        for (i, row, _) in self.warp_rows(k) {
            let (zero, rows) = (k.const_i64(0), k.index(tile.rows()));
            let (is_first, exists) = (k.cmp(Pred::Eq, self.place.lane, zero), k.cmp(Pred::Lt, row, rows));
            let stores = k.and(is_first, exists);
            k.if_then(stores, |k| {
                let at = k.add_const(row, tile.rows() * tile.elems);
                k.store(mine, at, sums.max[i]);
                let at = k.add_const(at, pad(tile.rows()));
                k.store(mine, at, sums.sum[i]);
            });
        }
    }

    /// All splits of some tokens, one after the other.
    fn whole(&self, k: &mut KernelBuilder, tokens: &Tokens, head: Val) {
        k.if_else(
            tokens.live,
            |k| {
                self.load_queries(k, tokens, head);
                self.all_splits(k, tokens, head);
                Vec::new()
            },
            |k| {
                let first_head = k.mul_const(head, self.tile().heads);
                let zero = k.const_i64(0);
                k.for_each((zero, tokens.count, 1), |k, i| {
                    let t = k.add(tokens.first, i);
                    k.for_range(self.tile().heads, 1, |k, h| {
                        let head = k.add(first_head, h);
                        self.attention.zero_out(k, &self.place, t, head);
                    });
                });
                Vec::new()
            },
        );
    }

    fn all_splits(&self, k: &mut KernelBuilder, tokens: &Tokens, head: Val) {
        let tile = self.tile();
        let (zero, end, one) = (k.const_i64(0), self.positions(k, tokens), k.const_i64(1));
        let last = k.sub(end, one);
        let count = splits_of(k, last);
        let begin = Sums::begin(k, tile, tile.own_rows()).flat();
        let merged = k.for_carry((zero, count, 1), &begin, |k, split, flat| {
            let (first, size) = split_range(k, split);
            let sums = self.positions_of(k, tokens, head, first, size);
            self.merge(k, tokens, first, &Sums::of(tile, flat), &sums).flat()
        });
        let merged = Sums::of(tile, &merged);
        self.finish(k, tokens, head, &merged);
    }

    /// The sums before a split merged with those of the split that begins at `first`, as far as tokens see it.
    fn merge(&self, k: &mut KernelBuilder, tokens: &Tokens, first: Val, before: &Sums, split: &Sums) -> Sums {
        let tile = self.tile();
        let (a, c) = (self.smem.factors, row_ptr_of(k, self.smem.factors, tile.rows()));
        let rows = self.warp_rows(k);
        let (mut max, mut sum) = (Vec::new(), Vec::new());
        for (i, row, token) in rows {
            let position = k.add(tokens.position, token);
            let (exists, sees) = (k.cmp(Pred::Lt, token, tokens.count), k.cmp(Pred::Ge, position, first));
            let merges = k.and(exists, sees);
            let pair = k.if_else(
                merges,
                |k| {
                    let factors = factors(k, before.max[i], split.max[i]);
                    let zero = k.const_i64(0);
                    let is_first = k.cmp(Pred::Eq, self.place.lane, zero);
                    k.if_then(is_first, |k| {
                        k.store(a, row, factors.before);
                        k.store(c, row, factors.split);
                    });
                    vec![factors.max, join(k, before.sum[i], split.sum[i], factors.before, factors.split)]
                },
                |_| vec![before.max[i], before.sum[i]],
            );
            max.push(pair[0]);
            sum.push(pair[1]);
        }
        k.barrier();
        let o = self.own_rows(k).into_iter().enumerate().map(|(i, (row, exists))| {
            let token = k.div_const(row, tile.heads);
            let position = k.add(tokens.position, token);
            let (is_token, sees) = (k.cmp(Pred::Lt, token, tokens.count), k.cmp(Pred::Ge, position, first));
            let merges = k.and(is_token, sees);
            let merges = k.and(merges, exists);
            let joined = |k: &mut KernelBuilder| {
                let (a, c) = (k.load_f32(a, row), k.load_f32(c, row));
                vec![join(k, before.o[i], split.o[i], a, c)]
            };
            k.if_else(merges, joined, |_| vec![before.o[i]])[0]
        });
        let o = o.collect();
        // before the next split's factors and parts
        k.barrier();
        Sums { o, max, sum }
    }

    fn finish(&self, k: &mut KernelBuilder, tokens: &Tokens, head: Val, sums: &Sums) {
        let tile = self.tile();
        for (i, row, _) in self.warp_rows(k) {
            let (zero, rows) = (k.const_i64(0), k.index(tile.rows()));
            let (is_first, exists) = (k.cmp(Pred::Eq, self.place.lane, zero), k.cmp(Pred::Lt, row, rows));
            let stores = k.and(is_first, exists);
            k.if_then(stores, |k| k.store(self.smem.factors, row, sums.sum[i]));
        }
        k.barrier();
        let (_, column) = self.column(k);
        let first_head = k.mul_const(head, tile.heads);
        for ((row, exists), &o) in self.own_rows(k).into_iter().zip(&sums.o) {
            let (i, h) = (k.div_const(row, tile.heads), k.rem_const(row, tile.heads));
            let is_token = k.cmp(Pred::Lt, i, tokens.count);
            let exists = k.and(exists, is_token);
            k.if_then(exists, |k| {
                let (t, h) = (k.add(tokens.first, i), k.add(first_head, h));
                let sum = k.load_f32(self.smem.factors, row);
                self.attention.finish(k, (o, sum), (t, h, column));
            });
        }
    }
}

fn row_ptr_of(k: &mut KernelBuilder, base: Val, elems: u64) -> Val {
    let one = k.const_i64(1);
    row_ptr(k, base, one, elems)
}

/// What sums are multiplied with where two maxima become one.
struct Factors {
    max: Val,
    before: Val,
    split: Val,
}

fn factors(k: &mut KernelBuilder, before: Val, split: Val) -> Factors {
    let max = k.fmax(before, split);
    let [before, split] = [before, split].map(|x| {
        let change = k.fsub(x, max);
        k.exp(change)
    });
    Factors { max, before, split }
}

/// `before · a + split · c`: the one place where splits are merged.
fn join(k: &mut KernelBuilder, before: Val, split: Val, a: Val, c: Val) -> Val {
    let scaled = k.fmul(split, c);
    k.fma(before, a, scaled)
}

/// The tail at work on one query head of one token.
struct Merge<'a> {
    attention: &'a Attention,
    place: Place,
    /// `[3][MERGED]`: a, c and l of some splits.
    factors: Val,
    /// The partials of the first split.
    first: Val,
    /// The row in a partial.
    row: Val,
    /// How many splits.
    count: Val,
}

impl Merge<'_> {
    fn run(&self, k: &mut KernelBuilder, (t, head): (Val, Val)) {
        let tile = &self.attention.tile;
        let (zero, nothing, lowest) = (k.const_i64(0), k.const_f32(0.0), k.const_f32(f32::NEG_INFINITY));
        let last_column = k.index(tile.elems - 1);
        let column = k.min_i64(self.place.thread, last_column);
        let sums = k.for_carry((zero, self.count, MERGED), &[nothing, nothing, lowest], |k, from, carried| {
            let parts = self.parts(k, from, column);
            let max = self.work_out(k, from, carried[2]);
            k.barrier();
            let (mut o, mut sum) = (carried[0], carried[1]);
            for (i, part) in (0..).zip(parts) {
                let [a, c, l] = [0, 1, 2].map(|which| {
                    let at = k.index(which * MERGED + i);
                    k.load_f32(self.factors, at)
                });
                let split = k.add_const(from, i);
                let exists = k.cmp(Pred::Lt, split, self.count);
                let (next_o, next_sum) = (join(k, o, part, a, c), join(k, sum, l, a, c));
                o = k.select(exists, next_o, o);
                sum = k.select(exists, next_sum, sum);
            }
            k.barrier();
            vec![o, sum, max]
        });
        let elems = k.index(tile.elems);
        let has_column = k.cmp(Pred::Lt, self.place.thread, elems);
        k.if_then(has_column, |k| self.attention.finish(k, (sums[0], sums[1]), (t, head, self.place.thread)));
    }

    /// The partials of split `number`, or of the last.
    fn split(&self, k: &mut KernelBuilder, number: Val) -> Val {
        let one = k.const_i64(1);
        let last = k.sub(self.count, one);
        let number = k.min_i64(number, last);
        row_ptr(k, self.first, number, self.attention.tile.partial_elems())
    }

    /// A column of the sums of some splits.
    fn parts(&self, k: &mut KernelBuilder, from: Val, column: Val) -> Vec<Val> {
        let at = k.mul_const(self.row, self.attention.tile.elems);
        let at = k.add(at, column);
        (0..MERGED)
            .map(|i| {
                let number = k.add_const(from, i);
                let split = self.split(k, number);
                k.load_f32(split, at)
            })
            .collect()
    }

    /// The factors of some splits, by the first warp; gives the maximum after them, in all.
    fn work_out(&self, k: &mut KernelBuilder, from: Val, max: Val) -> Val {
        let tile = &self.attention.tile;
        let (rows, lowest) = (tile.rows() * tile.elems, k.const_f32(f32::NEG_INFINITY));
        let number = k.add(from, self.place.lane);
        let split = self.split(k, number);
        let at = k.add_const(self.row, rows);
        let (own, l) = (k.load_f32(split, at), {
            let at = k.add_const(at, pad(tile.rows()));
            k.load_f32(split, at)
        });
        let merged = k.index(MERGED);
        let (in_batch, exists) = (k.cmp(Pred::Lt, self.place.lane, merged), k.cmp(Pred::Lt, number, self.count));
        let merges = k.and(in_batch, exists);
        let own = k.select(merges, own, lowest);
        let (before, total) = lanes_before(k, self.place.lane, (max, own), |k, a, b| k.fmax(a, b));
        let zero = k.const_i64(0);
        let first_warp = k.cmp(Pred::Eq, self.place.warp, zero);
        let stores = k.and(first_warp, in_batch);
        k.if_then(stores, |k| {
            let factors = factors(k, before, own);
            for (which, x) in [factors.before, factors.split, l].into_iter().enumerate() {
                let at = k.add_const(self.place.lane, which as u64 * MERGED);
                k.store(self.factors, at, x);
            }
        });
        k.fmax(max, total)
    }
}
