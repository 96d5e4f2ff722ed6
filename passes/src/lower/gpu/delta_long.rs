//! `gated_delta_net` of long runs by blocks of threads, in three launches; short runs are for [`super::delta_rule`].
//!
//! .long    body: a block for 8 tokens of the step and a key head, a warp a token: convolutions, SiLU, norms, k·q, α and β, handed to the tail;
//!          tail: a block for some columns of one value head of a sequence sweeps over its tokens, what it needs of 8 at a time in shared memory, while
//!          what comes next is on its way
//! .norm    a block a token: out = rms_norm(o, norm) · silu(z); after the last token of a run its windows take its last inputs
//! traffic  what the body hands over, twice; bound by the latency of a token, all columns at once
//!
//! A column is summed in the same order as in short runs, so a token has the same bits in both.

use nextc_ir::DType;
use nextc_ir::kernel::{Kernel, KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::{LANES, Sym, pad};

use super::super::delta_rule::{Mixer, Run, SequencePorts, Stream};
use super::super::matmul::row_ptr;
use super::super::ports::{Lowered, Ports, Site};
use super::attention::sequence_of;
use super::delta_rule::{BLOCK, Block, SHORT, Smem, Tile, Tokens, norm_out, normed, short_run};
use super::{Place, begin, lanes_of, warp_sum};

/// Threads of a block: a warp a token of 8; those that sweep need no more.
const THREADS: u64 = BLOCK * 32;

/// The kernels of long runs.
pub struct Long<'a> {
    mixer: &'a Mixer,
    sequences: &'a SequencePorts,
    tile: Tile,
    /// Blocks that share a value head.
    slices: u64,
}

impl<'a> Long<'a> {
    /// `None` if short runs have to do.
    pub fn of(mixer: &'a Mixer, sequences: &'a SequencePorts) -> Option<Self> {
        let dv = pad(mixer.v.width);
        let slices = (1..=dv / LANES).filter(|n| (dv / LANES).is_multiple_of(*n));
        let of = |slices: u64| Self { mixer, sequences, tile: Tile::long(mixer, dv / slices), slices };
        // a window is taken from the run's own tokens
        let takes = mixer.q.taps <= SHORT;
        slices.map(of).find(|long| takes && long.tile.threads() <= THREADS)
    }

    /// The kernels.
    pub fn kernels(&self, site: &Site<'_>, ports: &Ports) -> Lowered {
        let [sweep, norm] = [self.sweep(site, ports), self.norm(site, ports)].map(|k| ports.clone().finish(k));
        sweep.then(norm)
    }

    /// A grid of steps that may have long runs: where each sequence has a token, one has more than a short run's only if there are so many.
    fn only_long(grid: Extent) -> Extent {
        grid.if_above(Sym::T, Extent::from(Sym::B) + (SHORT - 1).into(), 0.into())
    }

    /// Elements that are handed over of a token and a key head: q, k, v of its value heads.
    fn row_elems(&self) -> u64 {
        2 * pad(self.mixer.k.width) + self.mixer.shared_heads() * pad(self.mixer.v.width)
    }

    /// The same of gates: k·q, then α, then β of each value head.
    fn gate_elems(&self) -> u64 {
        1 + 2 * self.mixer.shared_heads()
    }

    /// Elements that a task hands over.
    fn task_elems(&self) -> u64 {
        (BLOCK * (self.row_elems() + self.gate_elems())).next_multiple_of(32)
    }

    fn sweep(&self, site: &Site<'_>, ports: &Ports) -> Kernel {
        let heads = self.mixer.q.heads;
        let grid = Self::only_long(Extent::from(Sym::T).ceil_div(BLOCK) * heads.into());
        let mut k = ports.builder_of(site, ".long", grid);
        k.threads(THREADS as u32);
        let partials = k.partials(DType::F32, self.task_elems());
        let (place, task) = (Place::here(&mut k), k.task());
        let (block, head) = (k.div_const(task, heads), k.rem_const(task, heads));
        begin(&mut k);
        let mine = row_ptr(&mut k, partials, task, self.task_elems());
        let (first, count) = (k.mul_const(block, BLOCK), k.dim(Sym::T));
        let t = k.add(first, place.warp);
        let exists = k.cmp(Pred::Lt, t, count);
        k.if_then(exists, |k| {
            let b = sequence_of(k, self.sequences.cu_seqlens(), place.lane, t);
            let run = self.sequences.run(k, b);
            let works = is_swept(k, &run);
            let token = Token { long: self, place, run, head, t, mine };
            k.if_then(works, |k| token.hand_over(k));
        });
        let grid = Self::only_long(Extent::from(Sym::B) * (self.mixer.v.heads * self.slices).into());
        k.finish_with_tail_grid(grid, |k| self.tail(k))
    }

    fn tail(&self, k: &mut KernelBuilder) {
        let (mixer, tile) = (self.mixer, self.tile);
        let partials = k.partials(DType::F32, self.task_elems());
        let smem = Smem::alloc(k, mixer, &tile);
        let (place, task) = (Place::here(k), k.task());
        let (pair, slice) = (k.div_const(task, self.slices), k.rem_const(task, self.slices));
        let (b, value_head) = (k.div_const(pair, mixer.v.heads), k.rem_const(pair, mixer.v.heads));
        k.wait();
        let run = self.sequences.run(k, b);
        let works = is_swept(k, &run);
        let (head, own) =
            (k.div_const(value_head, mixer.shared_heads()), k.rem_const(value_head, mixer.shared_heads()));
        let block = Block { mixer, tile, place, run, head, slice, smem };
        let sweep = Sweep { long: self, block, partials, own };
        k.if_then(works, |k| sweep.run(k, value_head));
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
fn is_swept(k: &mut KernelBuilder, run: &Run) -> Val {
    let (zero, is_short) = (k.const_i64(0), short_run(k, run));
    let (is_long, live) = (k.not(is_short), k.cmp(Pred::Ge, run.slot, zero));
    k.and(is_long, live)
}

/// Puts the run's last inputs into its windows.
fn move_windows(k: &mut KernelBuilder, mixer: &Mixer, run: &Run, thread: Val) {
    let zero = k.const_i64(0);
    for stream in [&mixer.q, &mixer.k, &mixer.v] {
        let (x, window, taken) = (k.param(stream.x), stream.window(k, run.slot, zero), k.index(stream.taps - 1));
        let first = k.sub(run.end, taken);
        let x = row_ptr(k, x, first, stream.row());
        let elems = k.index(stream.row() * (stream.taps - 1));
        k.for_each((thread, elems, THREADS), |k, i| {
            let value = k.load_f32(x, i);
            k.store(window, i, value);
        });
    }
}

/// A warp at work on a token and a key head.
struct Token<'a> {
    long: &'a Long<'a>,
    place: Place,
    run: Run,
    head: Val,
    t: Val,
    /// Where the block's tokens go.
    mine: Val,
}

impl Token<'_> {
    /// Convolutions, norms and gates.
    fn hand_over(&self, k: &mut KernelBuilder) {
        let (long, mixer, row, fresh) = (self.long, self.long.mixer, self.place.warp, self.run.is_fresh(k));
        let keys = pad(mixer.k.width);
        let to = row_ptr(k, self.mine, row, long.row_elems());
        let rows = [&mixer.q, &mixer.k].map(|stream| self.convolved(k, stream, self.head, fresh));
        let rows = normed(k, mixer, rows);
        let places = self.place.places(k, keys);
        for (which, row) in (0..).zip(&rows) {
            let bytes = k.index(which * keys * 4);
            let to = k.offset(to, bytes);
            places.iter().zip(row).for_each(|(place, &x)| place.store(k, to, x));
        }
        let zero = k.const_f32(0.0);
        let kq = rows[1].iter().zip(&rows[0]).fold(zero, |sum, (&x, &y)| k.fma(x, y, sum));
        let kq = warp_sum(k, kq);
        for i in 0..mixer.shared_heads() {
            let number = k.index(i);
            let head = mixer.value_head(k, self.head, number);
            let values = self.convolved(k, &mixer.v, head, fresh);
            let bytes = k.index((2 * keys + i * pad(mixer.v.width)) * 4);
            let to = k.offset(to, bytes);
            let places = self.place.places(k, pad(mixer.v.width));
            places.iter().zip(values).for_each(|(place, x)| place.store(k, to, x));
        }
        let bytes = k.index(BLOCK * long.row_elems() * 4);
        let gates = k.offset(self.mine, bytes);
        let gates = row_ptr(k, gates, row, long.gate_elems());
        let (first, heads) = (k.const_i64(0), k.index(mixer.shared_heads()));
        self.place.once_a_warp(k, |k| k.store(gates, first, kq));
        k.for_each((self.place.lane, heads, 32), |k, i| {
            let head = mixer.value_head(k, self.head, i);
            let (alpha, beta) = mixer.gate(k, self.t, head);
            let at = k.add_const(i, 1);
            k.store(gates, at, alpha);
            let at = k.add_const(at, mixer.shared_heads());
            k.store(gates, at, beta);
        });
    }

    /// `silu(conv1d(x))` of one head: the elements of this thread.
    fn convolved(&self, k: &mut KernelBuilder, stream: &Stream, head: Val, fresh: Val) -> Vec<Val> {
        let places = self.place.places(k, pad(stream.width));
        let (x, w, window) = (k.param(stream.x), k.param(stream.w), stream.window(k, self.run.slot, head));
        let [x, w] = [x, w].map(|p| row_ptr(k, p, head, pad(stream.width)));
        let none = k.const_f32(0.0);
        let mut sums = vec![none; places.len()];
        for tap in 0..stream.taps {
            let back = k.index(stream.taps - 1 - tap);
            let (t, begun) = (k.sub(self.t, back), k.not(fresh));
            let in_run = k.cmp(Pred::Ge, t, self.run.begin);
            let there = k.or(in_run, begun);
            // before the run: the window, as the accepted tokens have left it
            let before = k.sub(t, self.run.begin);
            let before = k.add_const(before, stream.taps - 1);
            let before = k.add(before, self.run.replay);
            let at = k.select(in_run, t, before);
            let from = k.select(in_run, x, window);
            let from = row_ptr(k, from, at, stream.row());
            let number = k.index(tap);
            let weights = row_ptr(k, w, number, stream.row());
            let loaded = k.if_else(
                there,
                |k| places.iter().map(|place| place.load(k, from)).collect(),
                |_| vec![none; places.len()],
            );
            for ((sum, x), place) in sums.iter_mut().zip(loaded).zip(&places) {
                let weight = place.load(k, weights);
                *sum = k.fma(weight, x, *sum);
            }
        }
        sums.into_iter().map(|sum| k.silu(sum)).collect()
    }
}

/// A block at work on some columns of a value head.
struct Sweep<'a> {
    long: &'a Long<'a>,
    block: Block<'a>,
    partials: Val,
    /// The value head among those that share its key head.
    own: Val,
}

/// Rows of a block of 8 tokens.
struct Rows {
    begin: Val,
    end: Val,
}

impl Rows {
    /// The row itself, or the nearest of these.
    fn within(&self, k: &mut KernelBuilder, row: Val) -> Val {
        let one = k.const_i64(1);
        let last = k.sub(self.end, one);
        let row = k.min_i64(row, last);
        let before = k.cmp(Pred::Lt, row, self.begin);
        k.select(before, self.begin, row)
    }
}

impl Sweep<'_> {
    fn run(&self, k: &mut KernelBuilder, value_head: Val) {
        let (block, run) = (&self.block, &self.block.run);
        let fresh = run.is_fresh(k);
        let turn = block.turn_of(k, value_head);
        let remembers = k.not(fresh);
        let state = block.load_state(k, &turn, remembers);
        let state = block.replay(k, &turn, &state, (run.replay, fresh));
        let first = k.div_const(run.begin, BLOCK);
        let first = k.mul_const(first, BLOCK);
        let staged = self.load(k, first);
        let carried = [staged.clone(), state].concat();
        let left = k.for_carry((first, run.end, BLOCK), &carried, |k, first, carried| {
            let (staged, state) = carried.split_at(staged.len());
            k.barrier();
            self.stage(k, staged);
            k.barrier();
            let next = k.add_const(first, BLOCK);
            let more = k.cmp(Pred::Lt, next, run.end);
            let next_block = k.select(more, next, first);
            let staged = self.load(k, next_block);
            let rows = self.rows(k, first);
            let last = k.cmp(Pred::Eq, next_block, first);
            let tokens = Tokens { first, count: rows.end, are_last: last };
            let state =
                k.for_carry((rows.begin, rows.end, 1), state, |k, i, state| block.sweep(k, &turn, (&tokens, i), state));
            [staged, state].concat()
        });
        block.store_state(k, &turn, &left[staged.len()..]);
    }

    /// Those of the step's tokens `first .. first + 8` that are the run's.
    fn rows(&self, k: &mut KernelBuilder, first: Val) -> Rows {
        let run = &self.block.run;
        let (zero, begins) = (k.const_i64(0), k.sub(run.begin, first));
        let later = k.cmp(Pred::Gt, begins, zero);
        let (ends, most) = (k.sub(run.end, first), k.index(BLOCK));
        Rows { begin: k.select(later, begins, zero), end: k.min_i64(ends, most) }
    }

    /// Quads of shared memory for q, k and v of 8 tokens.
    fn quads(&self) -> u64 {
        BLOCK * self.block.row_elems() / 4
    }

    /// This thread's share of what was handed over of the tokens from `first` on: quads, then k·q, α or β.
    fn load(&self, k: &mut KernelBuilder, first: Val) -> Vec<Val> {
        let (long, block) = (self.long, &self.block);
        let task = k.div_const(first, BLOCK);
        let task = k.mul_const(task, long.mixer.q.heads);
        let task = k.add(task, block.head);
        let from = row_ptr(k, self.partials, task, long.task_elems());
        let keys = 2 * block.key_elems();
        let rows = self.rows(k, first);
        let skipped = k.mul_const(self.own, pad(long.mixer.v.width));
        let columns = k.mul_const(block.slice, block.tile.columns);
        let skipped = k.add(skipped, columns);
        let mut loaded: Vec<Val> = (0..self.quads())
            .step_by(THREADS as usize)
            .flat_map(|begin| {
                let quad = k.add_const(block.place.thread, begin);
                let last = k.index(self.quads() - 1);
                let quad = k.min_i64(quad, last);
                let row_quads = block.row_elems() / 4;
                let (row, c) = (k.div_const(quad, row_quads), k.rem_const(quad, row_quads));
                let c = k.mul_const(c, 4);
                let (end, further) = (k.index(keys), k.add(c, skipped));
                let is_value = k.cmp(Pred::Ge, c, end);
                let c = k.select(is_value, further, c);
                let row = rows.within(k, row);
                let row = row_ptr(k, from, row, long.row_elems());
                let x = k.load(DType::F32, 4, row, c);
                lanes_of(k, x)
            })
            .collect();
        let last = k.index(3 * BLOCK - 1);
        let which = k.min_i64(block.place.thread, last);
        let (kind, row) = (k.div_const(which, BLOCK), k.rem_const(which, BLOCK));
        let bytes = k.index(BLOCK * long.row_elems() * 4);
        let gates = k.offset(from, bytes);
        let row = rows.within(k, row);
        let gates = row_ptr(k, gates, row, long.gate_elems());
        let zero = k.const_i64(0);
        let is_gate = k.cmp(Pred::Gt, kind, zero);
        let at = k.mul_const(kind, long.mixer.shared_heads());
        let at = k.add(at, self.own);
        // kind 1 is α: behind k·q and no α of other heads
        let skipped = k.index(long.mixer.shared_heads() - 1);
        let at = k.sub(at, skipped);
        let at = k.select(is_gate, at, zero);
        loaded.push(k.load_f32(gates, at));
        loaded
    }

    /// Puts it into shared memory.
    fn stage(&self, k: &mut KernelBuilder, staged: &[Val]) {
        let (smem, thread) = (&self.block.smem, self.block.place.thread);
        let (gate, quads) = staged.split_last().expect("there is a gate");
        for (begin, quad) in (0..self.quads()).step_by(THREADS as usize).zip(quads.chunks(4)) {
            let at = k.add_const(thread, begin);
            let end = k.index(self.quads());
            let exists = k.cmp(Pred::Lt, at, end);
            k.if_then(exists, |k| {
                let at = k.mul_const(at, 4);
                let words = k.quad([quad[0], quad[1], quad[2], quad[3]]);
                k.store(smem.tokens, at, words);
            });
        }
        for (kind, to) in (0..).zip([smem.kq, smem.alpha, smem.beta]) {
            let (lo, hi) = (k.index(kind * BLOCK), k.index((kind + 1) * BLOCK));
            let (from, to_end) = (k.cmp(Pred::Ge, thread, lo), k.cmp(Pred::Lt, thread, hi));
            let mine = k.and(from, to_end);
            k.if_then(mine, |k| {
                let row = k.sub(thread, lo);
                k.store(to, row, *gate);
            });
        }
    }
}
