//! `sample`: what stands between logits and the choice of a token, and what becomes of drafts. The choice itself is
//! [`choose`](super::choose).
//!
//! argmax         tasks (row, chunk of 4096 logits): the peak of each 256; tail: the first of the largest
//! edit_logits    tasks (row, chunk): copy, biases and penalties of the tokens in the chunk, then peaks
//! token_weights  tasks (row, chunk): `exp((x - largest) / temperature)`
//! accept         a task for each sequence
//! traffic        logits are read once, and written twice where a row is sampled
//!
//! Logits are padded with -infinity behind the vocabulary once they are edited, so that later kernels take whole vectors.

use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::ops::sample::{BLOCK, Choice, Factor};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::{Dim, LANES, pad};
use nextc_ir::{DType, Type};

use super::LowerError;
use super::matmul::row_ptr;
use super::ports::{Lowered, Ports, Site};

/// Blocks of one task.
pub const CHUNK_BLOCKS: u64 = 16;

/// A row of logits in blocks.
#[derive(Clone, Copy, Debug)]
pub struct Blocks {
    /// Logits that count.
    pub vocab: u64,
}

impl Blocks {
    /// Those of the rows of `x`.
    pub fn of(site: &Site<'_>, x: nextc_ir::graph::Value) -> Self {
        Self { vocab: site.inner(x)[0] }
    }

    /// Logits as stored.
    pub const fn stride(self) -> u64 {
        pad(self.vocab)
    }

    /// How many blocks there are.
    pub const fn count(self) -> u64 {
        self.vocab.div_ceil(BLOCK)
    }

    /// Peaks of a row as stored.
    pub const fn peaks_stride(self) -> u64 {
        pad(self.count())
    }

    /// How many tasks a row has.
    pub const fn chunks(self) -> u64 {
        self.count().div_ceil(CHUNK_BLOCKS)
    }

    /// First element of `block`, and the first one behind it that is below `end`.
    pub fn range(self, k: &mut KernelBuilder, block: Val, end: u64) -> (Val, Val) {
        let first = k.mul_const(block, BLOCK);
        let (behind, end) = (k.add_const(first, BLOCK), k.index(end));
        (first, k.min_i64(behind, end))
    }

    /// Row and blocks of a task: `(row, first block, block behind the last)`.
    fn task(self, k: &mut KernelBuilder) -> (Val, Val, Val) {
        let task = k.task();
        let (row, chunk) = (k.div_const(task, self.chunks()), k.rem_const(task, self.chunks()));
        let first = k.mul_const(chunk, CHUNK_BLOCKS);
        let (behind, count) = (k.add_const(first, CHUNK_BLOCKS), k.index(self.count()));
        (row, first, k.min_i64(behind, count))
    }

    /// The peak of the elements `lo .. hi`, of which the last ones are not in whole vectors only if `ragged`.
    fn peak(self, k: &mut KernelBuilder, x: Val, (lo, hi): (Val, Val), ragged: bool) -> Val {
        let lowest = k.splat_f32(16, f32::NEG_INFINITY);
        let whole = if ragged {
            let end = k.index(self.vocab / LANES * LANES);
            k.min_i64(hi, end)
        } else {
            hi
        };
        let lanes = k.for_carry((lo, whole, LANES), &[lowest], |k, i, acc| {
            let v = k.load_f32x16(x, i);
            let v = bounded(k, v);
            vec![k.fmax(acc[0], v)]
        });
        let peak = k.reduce_max(lanes[0]);
        if !ragged || self.vocab.is_multiple_of(LANES) {
            return peak;
        }
        k.for_carry((whole, hi, 1), &[peak], |k, i, acc| {
            let v = k.load_f32(x, i);
            let v = bounded(k, v);
            vec![k.fmax(acc[0], v)]
        })[0]
    }

    /// Writes the peaks of blocks `first .. behind`, and after the last block the padding.
    fn store_peaks(self, k: &mut KernelBuilder, x: Val, peaks: Val, (first, behind): (Val, Val), ragged: bool) {
        k.for_each((first, behind, 1), |k, block| {
            let range = self.range(k, block, if ragged { self.vocab } else { self.stride() });
            let peak = self.peak(k, x, range, ragged);
            k.store(peaks, block, peak);
        });
        let (count, padded) = (k.index(self.count()), k.index(self.peaks_stride()));
        let is_last = k.cmp(Pred::Eq, behind, count);
        k.if_then(is_last, |k| {
            let lowest = k.const_f32(f32::NEG_INFINITY);
            k.for_each((count, padded, 1), |k, i| k.store(peaks, i, lowest));
        });
    }

    /// The largest peak of a row.
    pub fn largest(self, k: &mut KernelBuilder, peaks: Val) -> Val {
        let lowest = k.splat_f32(16, f32::NEG_INFINITY);
        let (lo, hi) = (k.const_i64(0), k.index(self.peaks_stride()));
        let lanes = k.for_carry((lo, hi, LANES), &[lowest], |k, i, acc| {
            let v = k.load_f32x16(peaks, i);
            vec![k.fmax(acc[0], v)]
        });
        k.reduce_max(lanes[0])
    }

    /// Index of the first element of `x` that is `largest`, which its peaks have; an i32.
    pub fn first_of(self, k: &mut KernelBuilder, x: Val, peaks: Val, largest: Val) -> Val {
        let (zero, blocks) = (k.const_i64(0), k.index(self.count()));
        let block = first_equal(k, peaks, (zero, blocks), largest);
        let range = self.range(k, block, self.vocab);
        let at = first_equal(k, x, range, largest);
        k.narrow(at)
    }
}

/// `x`, or +infinity where it is NaN.
pub fn bounded(k: &mut KernelBuilder, x: Val) -> Val {
    let infinity = k.f32_like(x, f32::INFINITY);
    let below = k.cmp(Pred::Lt, x, infinity);
    k.select(below, x, infinity)
}

/// Index of the first of the elements `lo .. hi` that equals `x`; `lo` if none does.
fn first_equal(k: &mut KernelBuilder, at: Val, (lo, hi): (Val, Val), x: Val) -> Val {
    let last = k.add(lo, hi);
    let one = k.const_i64(1);
    let last = k.sub(last, one);
    k.for_carry((lo, hi, 1), &[lo], |k, forward, found| {
        let i = k.sub(last, forward);
        let y = k.load_f32(at, i);
        let same = k.cmp(Pred::Eq, y, x);
        vec![k.select(same, i, found[0])]
    })[0]
}

/// True if `x` is neither infinite nor NaN, for what is no NaN.
pub fn is_finite(k: &mut KernelBuilder, x: Val) -> Val {
    let magnitude = k.fabs(x);
    let infinity = k.const_f32(f32::INFINITY);
    k.cmp(Pred::Lt, magnitude, infinity)
}

/// A task for each chunk of each row.
fn chunk_tasks(site: &Site<'_>, blocks: Blocks) -> Result<Extent, LowerError> {
    Ok(Extent::from(site.rows(site.result(0))?) * blocks.chunks().into())
}

/// `argmax`.
pub fn lower_argmax(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let blocks = Blocks::of(site, site.named("x"));
    let rows = site.rows(site.result(0))?;
    let x = ports.read("x", site.named("x"));
    let (best, peaks) = (ports.write("best", site.result(0)), ports.write("peaks", site.result(1)));
    let mut k = ports.builder(site, chunk_tasks(site, blocks)?);
    let (row, first, behind) = blocks.task(&mut k);
    let (x, peaks, best) = (k.param(x), k.param(peaks), k.param(best));
    let (own_x, own_peaks) =
        (row_ptr(&mut k, x, row, blocks.stride()), row_ptr(&mut k, peaks, row, blocks.peaks_stride()));
    blocks.store_peaks(&mut k, own_x, own_peaks, (first, behind), true);
    let kernel = k.finish_with_tail(|k| {
        let (zero, rows) = (k.const_i64(0), k.dim(rows));
        k.for_each((zero, rows, 1), |k, row| {
            let (x, peaks) = (row_ptr(k, x, row, blocks.stride()), row_ptr(k, peaks, row, blocks.peaks_stride()));
            let largest = blocks.largest(k, peaks);
            let finite = is_finite(k, largest);
            let found = k.if_else(finite, |k| vec![blocks.first_of(k, x, peaks, largest)], |k| vec![k.const_i32(-1)]);
            k.store(best, row, found[0]);
        });
    });
    Ok(ports.finish(kernel))
}

/// The settings of one row.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    factors: Val,
    choices: Val,
}

impl Settings {
    /// Those of row `row`.
    pub fn of(k: &mut KernelBuilder, factors: Val, choices: Val, row: Val) -> Self {
        let factors = row_ptr(k, factors, row, pad(Factor::COUNT));
        Self { factors, choices: row_ptr(k, choices, row, pad(Choice::COUNT)) }
    }

    /// A number.
    pub fn factor(self, k: &mut KernelBuilder, column: Factor) -> Val {
        let at = k.index(column.at());
        k.load_f32(self.factors, at)
    }

    /// A whole number, as an index.
    pub fn choice(self, k: &mut KernelBuilder, column: Choice) -> Val {
        let at = k.index(column.at());
        k.load_index(self.choices, at)
    }

    /// 32 bits, as a number that is not negative.
    pub fn word(self, k: &mut KernelBuilder, column: Choice) -> Val {
        let (x, mask) = (self.choice(k, column), k.const_i64(0xffff_ffff));
        k.and(x, mask)
    }

    fn is(self, k: &mut KernelBuilder, column: Factor, x: f32) -> Val {
        let (found, x) = (self.factor(k, column), k.const_f32(x));
        k.cmp(Pred::Eq, found, x)
    }

    /// True if penalties change nothing.
    fn unpenalised(self, k: &mut KernelBuilder) -> Val {
        let repetition = self.is(k, Factor::RepetitionPenalty, 1.0);
        let presence = self.is(k, Factor::PresencePenalty, 0.0);
        let frequency = self.is(k, Factor::FrequencyPenalty, 0.0);
        let both = k.and(repetition, presence);
        k.and(both, frequency)
    }

    /// True if nothing is edited and the largest is chosen.
    pub fn is_plain(self, k: &mut KernelBuilder) -> Val {
        let greedy = self.is(k, Factor::Temperature, 0.0);
        let unpenalised = self.unpenalised(k);
        let (first, end) = (self.choice(k, Choice::FirstEdit), self.choice(k, Choice::EndEdit));
        let unedited = k.cmp(Pred::Eq, first, end);
        let both = k.and(greedy, unpenalised);
        k.and(both, unedited)
    }
}

/// Lists that edits come from.
#[derive(Clone, Copy)]
struct Lists {
    tokens: Val,
    edit_tokens: Val,
    edit_counts: Val,
    edit_biases: Val,
    edits: (Val, Val),
    drafts: (Val, Val),
}

impl Lists {
    /// How often `token` (i32) is in `list`.
    fn occurrences(k: &mut KernelBuilder, list: Val, (lo, hi): (Val, Val), token: Val) -> Val {
        let (zero, one) = (k.const_i32(0), k.const_i32(1));
        k.for_carry((lo, hi, 1), &[zero], |k, i, count| {
            let other = k.load(DType::I32, 1, list, i);
            let same = k.cmp(Pred::Eq, other, token);
            let more = k.add(count[0], one);
            vec![k.select(same, more, count[0])]
        })[0]
    }
}

/// `edit_logits`.
pub fn lower_edit_logits(site: &Site<'_>) -> Result<Lowered, LowerError> {
    edit_logits(
        site,
        |_| (),
        |k, (), e| {
            copy(k, e.blocks, e.logits, e.x, (e.lo, e.hi));
            let all = k.const_i64(0);
            e.edit_listed(k, (all, 1));
            e.edit_drafts(k, (all, 1));
            e.blocks.store_peaks(k, e.x, e.peaks, (e.first, e.behind), false);
        },
    )
}

/// `edit_logits` where a task begins with `begin`, and `edit` does a chunk of a row that is edited.
pub fn edit_logits<T>(
    site: &Site<'_>,
    begin: impl FnOnce(&mut KernelBuilder) -> T,
    edit: impl FnOnce(&mut KernelBuilder, T, Editing),
) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let blocks = Blocks::of(site, site.named("logits"));
    let names = ["logits", "tokens", "factors", "choices", "edit_tokens", "edit_counts", "edit_biases"];
    let reads = names.map(|name| ports.read(name, site.named(name)));
    let (x, peaks) = (ports.write("x", site.result(0)), ports.write("peaks", site.result(1)));
    let mut k = ports.builder(site, chunk_tasks(site, blocks)?);
    let begun = begin(&mut k);
    let (row, first, behind) = blocks.task(&mut k);
    let [logits, tokens, factors, choices, edit_tokens, edit_counts, edit_biases] = reads.map(|port| k.param(port));
    let (x, peaks) = (k.param(x), k.param(peaks));
    let logits = row_ptr(&mut k, logits, row, blocks.stride());
    let (x, peaks) = (row_ptr(&mut k, x, row, blocks.stride()), row_ptr(&mut k, peaks, row, blocks.peaks_stride()));
    let settings = Settings::of(&mut k, factors, choices, row);
    let plain = settings.is_plain(&mut k);
    let wanted = k.not(plain);
    k.if_then(wanted, |k| {
        let (lo, hi) = (k.mul_const(first, BLOCK), k.mul_const(behind, BLOCK));
        let edits = (settings.choice(k, Choice::FirstEdit), settings.choice(k, Choice::EndEdit));
        let drafts = (settings.choice(k, Choice::FirstDraft), settings.choice(k, Choice::EndDraft));
        let lists = Lists { tokens, edit_tokens, edit_counts, edit_biases, edits, drafts };
        edit(k, begun, Editing { blocks, logits, x, peaks, first, behind, lo, hi, settings, lists });
    });
    Ok(ports.finish(k.finish()))
}

/// Copies the logits `lo .. hi`, with -infinity behind the vocabulary.
fn copy(k: &mut KernelBuilder, blocks: Blocks, from: Val, to: Val, (lo, hi): (Val, Val)) {
    let (whole, vocab, stride) =
        (k.index(blocks.vocab / LANES * LANES), k.index(blocks.vocab), k.index(blocks.stride()));
    let whole = k.min_i64(hi, whole);
    k.for_each((lo, whole, LANES), |k, i| {
        let v = k.load_f32x16(from, i);
        k.store(to, i, v);
    });
    if !blocks.vocab.is_multiple_of(LANES) {
        let (last, padded) = (k.min_i64(hi, vocab), k.min_i64(hi, stride));
        k.for_each((whole, last, 1), |k, i| {
            let v = k.load_f32(from, i);
            k.store(to, i, v);
        });
        let lowest = k.const_f32(f32::NEG_INFINITY);
        k.for_each((last, padded, 1), |k, i| k.store(to, i, lowest));
    }
}

/// A chunk of a row that is edited.
#[derive(Clone, Copy)]
pub struct Editing {
    /// The blocks of the row.
    pub blocks: Blocks,
    /// The row's logits, and where they go.
    pub logits: Val,
    /// See `logits`.
    pub x: Val,
    /// Where the peaks of blocks go.
    pub peaks: Val,
    /// The chunk's first block, and the one behind its last.
    pub first: Val,
    /// See `first`.
    pub behind: Val,
    /// The same as logits.
    pub lo: Val,
    /// See `lo`.
    pub hi: Val,
    settings: Settings,
    lists: Lists,
}

impl Editing {
    /// Runs `body` with the token as an index if it is one of the chunk's.
    fn if_has(self, k: &mut KernelBuilder, token: Val, body: impl FnOnce(&mut KernelBuilder, Val)) {
        let (at, vocab) = (k.widen(token), k.index(self.blocks.vocab));
        let above = k.cmp(Pred::Ge, at, self.lo);
        let below = k.cmp(Pred::Lt, at, self.hi);
        let known = k.cmp(Pred::Lt, at, vocab);
        let both = k.and(above, below);
        let inside = k.and(both, known);
        k.if_then(inside, |k| body(k, at));
    }

    /// Bias and penalties for a token that the output has `count` times.
    fn edit(self, k: &mut KernelBuilder, (at, bias, count): (Val, Val, Val)) {
        let settings = self.settings;
        let x = k.load_f32(self.x, at);
        let x = k.fadd(x, bias);
        let (zero, none) = (k.const_f32(0.0), k.const_i32(0));
        let repetition = settings.factor(k, Factor::RepetitionPenalty);
        let negative = k.cmp(Pred::Lt, x, zero);
        let (more, less) = (k.fmul(x, repetition), k.fdiv(x, repetition));
        let repeated = k.select(negative, more, less);
        let seen = k.cmp(Pred::Ge, count, none);
        let x = k.select(seen, repeated, x);
        let presence = settings.factor(k, Factor::PresencePenalty);
        let frequency = settings.factor(k, Factor::FrequencyPenalty);
        let times = k.to_float(count);
        let often = k.fmul(frequency, times);
        let present = k.fsub(x, presence);
        let present = k.fsub(present, often);
        let has = k.cmp(Pred::Gt, count, none);
        let x = k.select(has, present, x);
        k.store(self.x, at, x);
    }

    /// The edits of the row's list: number `first` of it, and every `step`th after that.
    pub fn edit_listed(self, k: &mut KernelBuilder, (first, step): (Val, u64)) {
        let lists = self.lists;
        let first = k.add(lists.edits.0, first);
        k.for_each((first, lists.edits.1, step), |k, i| {
            let token = k.load(DType::I32, 1, lists.edit_tokens, i);
            self.if_has(k, token, |k, at| {
                let bias = k.load_f32(lists.edit_biases, i);
                let count = k.load(DType::I32, 1, lists.edit_counts, i);
                let drafted = Lists::occurrences(k, lists.tokens, lists.drafts, token);
                let zero = k.const_i32(0);
                let unseen = k.cmp(Pred::Lt, count, zero);
                let listed = k.select(unseen, zero, count);
                let sum = k.add(listed, drafted);
                let any = k.cmp(Pred::Gt, drafted, zero);
                let count = k.select(any, sum, count);
                self.edit(k, (at, bias, count));
            });
        });
    }

    /// Penalties of the row's drafts that the list does not have, each once: number `first` of them, and every `step`th after that.
    pub fn edit_drafts(self, k: &mut KernelBuilder, (first, step): (Val, u64)) {
        let lists = self.lists;
        let first = k.add(lists.drafts.0, first);
        k.for_each((first, lists.drafts.1, step), |k, i| {
            let token = k.load(DType::I32, 1, lists.tokens, i);
            self.if_has(k, token, |k, at| {
                let listed = Lists::occurrences(k, lists.edit_tokens, lists.edits, token);
                let earlier = Lists::occurrences(k, lists.tokens, (lists.drafts.0, i), token);
                let (done, zero) = (k.add(listed, earlier), k.const_i32(0));
                let first = k.cmp(Pred::Eq, done, zero);
                k.if_then(first, |k| {
                    let bias = k.const_f32(0.0);
                    let count = Lists::occurrences(k, lists.tokens, lists.drafts, token);
                    self.edit(k, (at, bias, count));
                });
            });
        });
    }
}

/// `exp((x - largest) / temperature)`: the weight of a logit, of any lanes.
pub fn weight(k: &mut KernelBuilder, x: Val, largest: Val, temperature: Val) -> Val {
    let lanes = k.ty(x).lanes();
    let (largest, temperature) = (k.splat(largest, lanes), k.splat(temperature, lanes));
    let x = k.fsub(x, largest);
    let x = k.fdiv(x, temperature);
    k.exp(x)
}

/// `token_weights`.
pub fn lower_token_weights(site: &Site<'_>) -> Result<Lowered, LowerError> {
    token_weights(
        site,
        |_| (),
        |k, (), w| {
            let largest = w.blocks.largest(k, w.peaks);
            let (lo, hi, stride) =
                (k.mul_const(w.first, BLOCK), k.mul_const(w.behind, BLOCK), k.index(w.blocks.stride()));
            let hi = k.min_i64(hi, stride);
            k.for_each((lo, hi, LANES), |k, i| {
                let v = k.load_f32x16(w.x, i);
                let v = weight(k, v, largest, w.temperature);
                k.store(w.weights, i, v);
            });
        },
    )
}

/// A chunk of a row whose weights are wanted.
#[derive(Clone, Copy)]
pub struct Weighing {
    /// The blocks of the row.
    pub blocks: Blocks,
    /// The row's logits.
    pub x: Val,
    /// Where weights go.
    pub weights: Val,
    /// The peaks of blocks.
    pub peaks: Val,
    /// What logits are divided by.
    pub temperature: Val,
    /// The chunk's first block, and the one behind its last.
    pub first: Val,
    /// See `first`.
    pub behind: Val,
}

/// `token_weights` where a task begins with `begin`, and `weigh` does a chunk of a row that is drawn from.
pub fn token_weights<T>(
    site: &Site<'_>,
    begin: impl FnOnce(&mut KernelBuilder) -> T,
    weigh: impl FnOnce(&mut KernelBuilder, T, Weighing),
) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let blocks = Blocks::of(site, site.named("x"));
    let reads = ["x", "peaks", "factors"].map(|name| ports.read(name, site.named(name)));
    let weights = ports.write("weights", site.result(0));
    let mut k = ports.builder(site, chunk_tasks(site, blocks)?);
    let begun = begin(&mut k);
    let (row, first, behind) = blocks.task(&mut k);
    let [x, peaks, factors] = reads.map(|port| k.param(port));
    let weights = k.param(weights);
    let (x, weights) = (row_ptr(&mut k, x, row, blocks.stride()), row_ptr(&mut k, weights, row, blocks.stride()));
    let factors = row_ptr(&mut k, factors, row, pad(Factor::COUNT));
    let at = k.index(Factor::Temperature.at());
    let (temperature, zero) = (k.load_f32(factors, at), k.const_f32(0.0));
    let drawn = k.cmp(Pred::Gt, temperature, zero);
    k.if_then(drawn, |k| {
        let peaks = row_ptr(k, peaks, row, blocks.peaks_stride());
        weigh(k, begun, Weighing { blocks, x, weights, peaks, temperature, first, behind });
    });
    Ok(ports.finish(k.finish()))
}

/// `accept`.
pub fn lower_accept(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let rows = site.rows(site.named("chosen"))?;
    let names = ["chosen", "rows", "tokens", "cu_seqlens"];
    let reads = names.map(|name| ports.read(name, site.named(name)));
    let out = ports.write("accepted", site.result(0));
    let Type::Tensor(t) = site.function.ty(site.result(0)) else { unreachable!("the shape rule gives a tensor") };
    let Some(&Dim::Sym(sequences)) = t.shape.0.first() else { return Err(site.error("a count for no sequence")) };
    let mut k = ports.builder(site, Extent::from(sequences));
    let [chosen, row_tokens, tokens, cu_seqlens] = reads.map(|port| k.param(port));
    let (sequence, out) = (k.task(), k.param(out));
    let next = k.add_const(sequence, 1);
    let (begin, end) = (k.load_index(cu_seqlens, sequence), k.load_index(cu_seqlens, next));
    let (zero, one, rows) = (k.const_i64(0), k.const_i64(1), k.dim(rows));
    let (going, none) = (k.const_i64(1), k.const_i64(0));
    // `going` is 1 until a row's token is another than the one fed next
    let sums = k.for_carry((zero, rows, 1), &[none, going], |k, r, carried| {
        let row = k.load_index(row_tokens, r);
        let after_begin = k.cmp(Pred::Ge, row, begin);
        let before_end = k.cmp(Pred::Lt, row, end);
        let own = k.and(after_begin, before_end);
        k.if_else(
            own,
            |k| {
                let fed = k.add(row, one);
                let inside = k.cmp(Pred::Lt, fed, end);
                // a row without a next token is compared with its own, and not counted
                let fed = k.select(inside, fed, row);
                let (token, choice) = (k.load_index(tokens, fed), k.load_index(chosen, r));
                let same = k.cmp(Pred::Eq, token, choice);
                let right = k.and(inside, same);
                let right = k.select(right, carried[1], zero);
                vec![k.add(carried[0], right), right]
            },
            |_| carried.to_vec(),
        )
    });
    let count = k.narrow(sums[0]);
    k.store(out, sequence, count);
    Ok(ports.finish(k.finish()))
}
