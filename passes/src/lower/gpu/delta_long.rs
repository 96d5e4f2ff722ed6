//! `gated_delta_net` of long runs by blocks of threads, in chunks of 64 tokens: the WY form of [`super::super::delta_rule`] for a CPU's matrix unit, in three launches.
//! Short runs are for [`super::delta_rule`].
//!
//! .long    body: a block a chunk and key head does what does not depend on the state ([`super::delta_within`]), and hands it to the tail;
//!          tail: a block some columns of one value head of a sequence goes through its chunks ([`super::delta_sweep`])
//! .norm    a block a token: out = rms_norm(o, norm) · silu(z); after the last token of a run its windows take its last inputs
//! traffic  what the body hands over (`Handed`) once in and once out for each slice of a value head; bound by products and by shared memory
//!
//! Operands of products are rounded to f16, which loses an eighth of what bf16 does (with bf16, logits of 700 tokens of the fixture `long` were 2.5e-2 from those in
//! float32) and reaches to 65504, where they stop; their sums are f32; Q and K in Q·Kᵀ and K·Kᵀ, P and D in P·D are sums of two f16. Convolutions, norms, gates, the
//! inverse and the state itself are f32. What a token may not see is multiplied with zeros, so its bits depend on the tokens of its run before it, and on where in
//! its chunk the run begins: what the chunks of a CPU promise.

use nextc_ir::kernel::{Kernel, KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::{Sym, pad};
use nextc_ir::types::CHUNK_TOKENS;

use super::super::delta_rule::{Mixer, Run, SequencePorts};
use super::super::matmul::row_ptr;
use super::super::ports::{Lowered, Ports, Site};
use super::attention::sequence_of;
use super::delta_rule::{SHORT, norm_out, short_run};
use super::{Place, begin};

/// Threads of a block that norms, and of one that does what does not depend on the state.
pub(super) const THREADS: u64 = 256;
/// Elements of a key that are loaded together as operands: four steps of products.
const KEY_ELEMS: u64 = 64;
/// Most elements of a key: a thread of the sweep holds half as many numbers of the state.
const MOST_KEY_ELEMS: u64 = 128;
/// Rows of a product's fragment: columns of a value that a warp of the sweep has.
pub(super) const TILE: u64 = 16;
/// Most of these in a block.
const MOST_TILES: u64 = 4;
/// Words of a fragment of 16 by 16 numbers, as two operands B: four a thread.
pub(super) const FRAGMENT_WORDS: u64 = 128;
/// Fragments of 16 by 16 numbers on and below the diagonal of a matrix of a chunk's tokens by themselves.
pub(super) const FRAGMENTS: u64 = 10;

/// Where a chunk's numbers lie that a task of the body hands over, in words of 32 bits. K, then Q, `[64][row_words()]`, are rows of pairs of f16 in the order of
/// [`Handed::word_at`]; then for each value head:
///
/// P        as operand B for each 8 rows and 16 columns on and below the diagonal, each thread's two words of the rounded numbers and two of the rest
/// L        the same in 16 rows by 16 columns, two words of the first 8 rows and two of the others
/// gates    `exp(g)`, β and `exp(g_C − g)` of 64 tokens each; `exp(g_C)`
/// V        `[pad(head_v_dim)][64]` f32
#[derive(Clone, Copy)]
pub(super) struct Handed {
    /// Elements of a key, in whole operands.
    pub keys: u64,
    /// Elements of a value.
    pub values: u64,
    /// Value heads.
    pub shared: u64,
}

impl Handed {
    /// Numbers of the gates, in whole quads.
    const GATES: u64 = 3 * CHUNK_TOKENS + 4;
    /// Where L lies behind P.
    pub const INVERSE_AT: u64 = 2 * FRAGMENTS * FRAGMENT_WORDS;
    /// Where gates lie behind P.
    pub const GATES_AT: u64 = Self::INVERSE_AT + FRAGMENTS * FRAGMENT_WORDS;
    /// Where V lies behind P.
    pub const VALUES_AT: u64 = Self::GATES_AT + Self::GATES;

    fn of(mixer: &Mixer) -> Self {
        let keys = mixer.k.width.next_multiple_of(KEY_ELEMS);
        Self { keys, values: pad(mixer.v.width), shared: mixer.shared_heads() }
    }

    /// Words of a row of K or Q.
    pub const fn row_words(&self) -> u64 {
        self.keys / 2
    }

    /// Words of a row in shared memory: so that the rows of a product's operand lie in different banks.
    pub const fn stride(&self) -> u64 {
        self.row_words() + 4
    }

    /// Groups of four steps of a product over the elements of a key.
    pub const fn groups(&self) -> u64 {
        self.keys / KEY_ELEMS
    }

    /// Where the first value head lies.
    pub const fn heads_at(&self) -> u64 {
        2 * CHUNK_TOKENS * self.row_words()
    }

    /// Words of a value head.
    pub const fn head_words(&self) -> u64 {
        Self::VALUES_AT + self.values * CHUNK_TOKENS
    }

    /// Words of a task.
    pub const fn words(&self) -> u64 {
        (self.heads_at() + self.shared * self.head_words()).next_multiple_of(32)
    }

    /// Where word `j` of eight of group `group` lies in a row: behind it the same words of the group's other blocks of 16 elements.
    pub fn word_at(k: &mut KernelBuilder, group: Val, j: Val) -> Val {
        let first = k.mul_const(group, 8);
        let first = k.add(first, j);
        k.mul_const(first, 4)
    }
}

/// The kernels of long runs.
pub struct Long<'a> {
    pub(super) mixer: &'a Mixer,
    pub(super) sequences: &'a SequencePorts,
    pub(super) handed: Handed,
    /// Columns of a value of a block of the sweep, in fragments.
    pub(super) tiles: u64,
}

impl<'a> Long<'a> {
    /// `None` if short runs have to do: keys are wider than a thread has room for, or a window takes more than the run's own tokens.
    pub fn of(mixer: &'a Mixer, sequences: &'a SequencePorts) -> Option<Self> {
        let fits = pad(mixer.k.width) <= MOST_KEY_ELEMS && mixer.q.taps <= SHORT;
        let all = pad(mixer.v.width) / TILE;
        let tiles = (1..=MOST_TILES).rev().find(|n| all.is_multiple_of(*n)).expect("1 divides everything");
        fits.then(|| Self { mixer, sequences, handed: Handed::of(mixer), tiles })
    }

    /// The kernels.
    pub fn kernels(&self, site: &Site<'_>, ports: &Ports) -> Lowered {
        let [chunks, norm] = [self.chunks(site, ports), self.norm(site, ports)].map(|k| ports.clone().finish(k));
        chunks.then(norm)
    }

    /// A grid of steps that may have long runs: where each sequence has a token, one has more than a short run's only if there are so many.
    fn only_long(grid: Extent) -> Extent {
        grid.if_above(Sym::T, Extent::from(Sym::B) + (SHORT - 1).into(), 0.into())
    }

    /// Most chunks of a step's long runs, and those that no run has: see [`Self::first_chunk`].
    fn most_chunks() -> Extent {
        let long = Extent::from(Sym::B).min(Extent::from(Sym::T).ceil_div(SHORT + 1));
        Extent::from(Sym::T).ceil_div(CHUNK_TOKENS) + long * 2.into()
    }

    /// The number of the first chunk of a sequence that begins with token `begin`. A long run of `n` tokens has at most `⌊n / 64⌋ + 2` chunks, so none has those of
    /// another; of what is before token `begin` at most `begin / 9` runs are long.
    pub(super) fn first_chunk(k: &mut KernelBuilder, b: Val, begin: Val) -> Val {
        let (whole, long) = (k.div_const(begin, CHUNK_TOKENS), k.div_const(begin, SHORT + 1));
        let long = k.min_i64(long, b);
        let cut = k.mul_const(long, 2);
        k.add(whole, cut)
    }

    fn chunks(&self, site: &Site<'_>, ports: &Ports) -> Kernel {
        let mut k = ports.builder_of(site, ".long", Self::only_long(Self::most_chunks() * self.mixer.q.heads.into()));
        k.threads(THREADS as u32);
        self.within(&mut k);
        let slices = self.handed.values / (self.tiles * TILE);
        let grid = Self::only_long(Extent::from(Sym::B) * (self.mixer.v.heads * slices).into());
        k.finish_with_tail_grid(grid, |k| self.sweep(k, slices))
    }

    fn norm(&self, site: &Site<'_>, ports: &Ports) -> Kernel {
        let mut k = ports.builder_of(site, ".norm", Self::only_long(Sym::T.into()));
        k.threads(THREADS as u32);
        begin(&mut k);
        let (place, t) = (Place::here(&mut k), k.task());
        let b = sequence_of(&mut k, self.sequences.cu_seqlens(), place.lane, t);
        let run = self.sequences.run(&mut k, b);
        let is_short = short_run(&mut k, &run);
        let (is_long, mixer, zero) = (k.not(is_short), self.mixer, k.const_i64(0));
        let live = k.cmp(Pred::Ge, run.slot, zero);
        k.if_then(is_long, |k| {
            k.if_else(
                live,
                |k| {
                    let heads = k.index(mixer.v.heads);
                    k.for_each((place.warp, heads, THREADS / 32), |k, head| {
                        let o = mixer.out_row(k, t, head);
                        let (norm, z) = (k.param(mixer.norm), mixer.z_row(k, t, head));
                        norm_out(k, mixer, &place, (t, head), [o, norm, z]);
                    });
                    let next = k.add_const(t, 1);
                    let is_last = k.cmp(Pred::Eq, next, run.end);
                    k.if_then(is_last, |k| move_windows(k, mixer, &run, place.thread));
                    Vec::new()
                },
                |k| {
                    let (out, nothing, elems) = (mixer.out_row(k, t, zero), k.const_f32(0.0), k.index(mixer.v.row()));
                    k.for_each((place.thread, elems, THREADS), |k, c| k.store(out, c, nothing));
                    Vec::new()
                },
            );
        });
        k.finish()
    }
}

/// Whether a sequence has a state and a run that is long.
pub(super) fn is_swept(k: &mut KernelBuilder, run: &Run) -> Val {
    let (zero, is_short) = (k.const_i64(0), short_run(k, run));
    let (is_long, live) = (k.not(is_short), k.cmp(Pred::Ge, run.slot, zero));
    k.and(is_long, live)
}

/// The tokens of a run in one of its chunks.
pub(super) struct Chunk {
    /// The first of them, and how many; not more than 0 if the run has no such chunk.
    pub first: Val,
    /// See `first`.
    pub count: Val,
}

impl Chunk {
    /// Number `number` of the chunks of a run, whose first token has position `begin`.
    pub fn of(k: &mut KernelBuilder, run: &Run, begin: Val, number: Val) -> Self {
        let tokens = k.sub(run.end, run.begin);
        let end = k.add(begin, tokens);
        let before = k.div_const(begin, CHUNK_TOKENS);
        let number = k.add(before, number);
        let low = k.mul_const(number, CHUNK_TOKENS);
        let high = k.add_const(low, CHUNK_TOKENS);
        let begun = k.cmp(Pred::Lt, low, begin);
        let (low, high) = (k.select(begun, begin, low), k.min_i64(high, end));
        let skipped = k.sub(low, begin);
        Self { first: k.add(run.begin, skipped), count: k.sub(high, low) }
    }

    /// How many it has.
    pub fn all(k: &mut KernelBuilder, run: &Run, begin: Val) -> Val {
        let (within, tokens) = (k.rem_const(begin, CHUNK_TOKENS), k.sub(run.end, run.begin));
        let end = k.add(within, tokens);
        let end = k.add_const(end, CHUNK_TOKENS - 1);
        k.div_const(end, CHUNK_TOKENS)
    }
}

/// Puts the run's last inputs into its windows.
fn move_windows(k: &mut KernelBuilder, mixer: &Mixer, run: &Run, thread: Val) {
    let zero = k.const_i64(0);
    for stream in [&mixer.q, &mixer.k, &mixer.v] {
        let (x, window, taken) = (k.param(stream.x), stream.window(k, run.slot, zero), k.index(stream.taps - 1));
        let first = k.sub(run.end, taken);
        let position = run.position_of(k, first);
        let elems = k.index(stream.row());
        for i in 0..stream.taps - 1 {
            let (t, position) = (k.add_const(first, i), k.add_const(position, i));
            let row = stream.window_row(k, position);
            let (from, to) = (row_ptr(k, x, t, stream.row()), row_ptr(k, window, row, stream.row()));
            k.for_each((thread, elems, THREADS), |k, c| {
                let value = k.load_f32(from, c);
                k.store(to, c, value);
            });
        }
    }
}
