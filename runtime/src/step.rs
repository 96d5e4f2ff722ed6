//! One step, whatever runs it: the inputs of an entry point, the arguments of its kernels, and the rows that it gives.

use std::ops::Range;

use nextc_abi::{Arg, DECODE_TOKENS, Input, Metadata, Output, Program, Span};

use crate::device::{CopyRows, Memory};

/// Bytes behind each input and the arena, so that a kernel may read whole vectors at their ends.
pub(crate) const SLACK_BYTES: u64 = 64;

/// Number of inputs an entry point can have.
pub(crate) const INPUTS: usize = 15;

/// The inputs of a step, as its kernels read them.
#[derive(Debug, Default)]
pub(crate) struct StepInputs {
    pub tokens: Vec<i32>,
    pub positions: Vec<i32>,
    pub cu_seqlens: Vec<i32>,
    pub slot: Vec<i32>,
    /// `[B]`: kept tokens that are done first.
    pub replay: Vec<i32>,
    /// `[B]`: 1 if the tokens are kept instead of done.
    pub tentative: Vec<i32>,
    /// `[B, P]`.
    pub page_table: Vec<i32>,
    pub logit_rows: Vec<i32>,
    /// `[T, pad(hidden_size)]`; empty but for drafts, and where the rows are taken from the device.
    pub hidden: Vec<f32>,
    /// Bytes of `hidden`, wherever it comes from.
    pub hidden_bytes: u64,
    /// `[ceil(vocab_size / 16)]`; empty but for guesses.
    pub wanted: Vec<i32>,
    /// How rows are sampled, for the entry points that do that.
    pub sampling: Option<SamplingInputs>,
    /// What is on the device already, and takes the place of what the host gives.
    pub taken: Vec<Taken>,
    /// Sequences at the end that are padding, and their tokens.
    pub padding: Padding,
}

/// Sequences that fill a step up: they have slot -1, which no state belongs to, and what comes of them is of no interest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Padding {
    pub sequences: usize,
    /// Of all of them.
    pub tokens: usize,
}

/// Rows of an input that are copied from memory of the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Taken {
    /// Where from.
    pub memory: Memory,
    /// Which input.
    pub input: Input,
    /// The rows; they go to a place in the input.
    pub rows: CopyRows,
}

/// How each row of a step is sampled.
#[derive(Debug, Default)]
pub(crate) struct SamplingInputs {
    /// `[R, 16]`: see [`nextc_abi::Factor`].
    pub factors: Vec<f32>,
    /// `[R, 16]`: see [`nextc_abi::Choice`].
    pub choices: Vec<i32>,
    /// The rows' lists, one after the other.
    pub edit_tokens: Vec<i32>,
    /// As many.
    pub edit_counts: Vec<i32>,
    /// As many.
    pub edit_biases: Vec<f32>,
}

impl SamplingInputs {
    const NONE: &'static Self = &Self {
        factors: Vec::new(),
        choices: Vec::new(),
        edit_tokens: Vec::new(),
        edit_counts: Vec::new(),
        edit_biases: Vec::new(),
    };
}

impl StepInputs {
    /// The dimensions `T`, `B`, `P`, `R`; where rows are sampled, `P` is the length of their lists.
    pub fn dims(&self) -> [u64; 4] {
        let sequences = self.slot.len() as u64;
        let pages = self.page_table.len() as u64 / sequences.max(1);
        let width = self.sampling.as_ref().map_or(pages, |s| s.edit_tokens.len() as u64);
        [self.tokens.len() as u64, sequences, width, self.logit_rows.len() as u64]
    }

    /// The dimensions without padding.
    pub fn wanted_dims(&self) -> [u64; 4] {
        let [_, _, width, _] = self.dims();
        let (tokens, sequences) = (self.tokens.len() - self.padding.tokens, self.slot.len() - self.padding.sequences);
        let rows = self.logit_rows.iter().filter(|&&row| (row as usize) < tokens).count();
        [tokens as u64, sequences as u64, width, rows as u64]
    }

    /// Fills up to `sequences` sequences, each of as many tokens as all of those that there are, or leaves them alone if they have different ones, or more than
    /// are decoded.
    pub fn pad(&mut self, sequences: usize) {
        let Some(count) = sequences.checked_sub(self.slot.len()).filter(|&n| n > 0) else { return };
        let each = self.cu_seqlens[1];
        let alike = self.cu_seqlens.windows(2).all(|ends| ends[1] - ends[0] == each);
        if !alike || each as usize > DECODE_TOKENS {
            return;
        }
        let width = self.page_table.len() / self.slot.len();
        for _ in 0..count {
            self.positions.extend(0..each);
            self.cu_seqlens.push(self.positions.len() as i32);
        }
        self.tokens.resize(self.positions.len(), 0);
        self.slot.resize(sequences, -1);
        self.replay.resize(sequences, 0);
        self.tentative.resize(sequences, 0);
        self.page_table.resize(sequences * width, 0);
        self.padding = Padding { sequences: count, tokens: count * each as usize };
    }

    /// True if they are taken from the arena, so that it must stay as it is until they are.
    pub fn need_arena(&self) -> bool {
        self.sampling.is_some() || self.taken.iter().any(|taken| taken.memory == Memory::Arena)
    }

    /// Bytes of all inputs, one after the other.
    pub fn placed_bytes(&self) -> u64 {
        self.host_bytes() + self.hidden_bytes - bytemuck::cast_slice::<_, u8>(&self.hidden).len() as u64
    }

    /// Bytes from the first input to the end of the last that comes from the host: what [`StepInputs::write`] needs.
    pub fn host_bytes(&self) -> u64 {
        self.bytes().iter().map(|b| place_bytes(b)).sum()
    }

    /// Writes what comes from the host, one input after the other, and says at which offset each begins.
    pub fn write(&self, memory: &mut [u8]) -> [u64; INPUTS] {
        let mut at = 0;
        self.bytes().map(|bytes| {
            let begin = at as usize;
            memory[begin..begin + bytes.len()].copy_from_slice(bytes);
            at += place_bytes(bytes);
            begin as u64
        })
    }

    /// What is taken from the device, with where it goes as an offset or address, where the inputs begin at `places`.
    pub fn taken_to<'a>(&'a self, places: &'a [u64; INPUTS]) -> impl Iterator<Item = (Memory, CopyRows)> + 'a {
        self.taken.iter().map(|taken| {
            let mut rows = taken.rows;
            rows.to.at += places[input_index(taken.input)];
            (taken.memory, rows)
        })
    }

    /// What comes from the host, as bytes; hidden rows, which may lie on the device, are the last.
    fn bytes(&self) -> [&[u8]; INPUTS] {
        use bytemuck::cast_slice as bytes;
        let none = SamplingInputs::NONE;
        let sampling = self.sampling.as_ref().unwrap_or(none);
        [
            bytes(&self.tokens),
            bytes(&self.positions),
            bytes(&self.cu_seqlens),
            bytes(&self.slot),
            bytes(&self.replay),
            bytes(&self.tentative),
            bytes(&self.page_table),
            bytes(&self.logit_rows),
            bytes(&sampling.factors),
            bytes(&sampling.choices),
            bytes(&sampling.edit_tokens),
            bytes(&sampling.edit_counts),
            bytes(&sampling.edit_biases),
            bytes(&self.wanted),
            bytes(&self.hidden),
        ]
    }
}

const fn input_index(input: Input) -> usize {
    match input {
        Input::Tokens => 0,
        Input::Positions => 1,
        Input::CuSeqlens => 2,
        Input::Slot => 3,
        Input::Replay => 4,
        Input::Tentative => 5,
        Input::PageTable => 6,
        Input::LogitRows => 7,
        Input::Factors => 8,
        Input::Choices => 9,
        Input::EditTokens => 10,
        Input::EditCounts => 11,
        Input::EditBiases => 12,
        Input::Wanted => 13,
        Input::Hidden => 14,
    }
}

/// Rows of floats that a step gave.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    data: &'a [f32],
    count: usize,
    width: usize,
    stride: usize,
}

impl<'a> Rows<'a> {
    /// The rows of an output in the bytes that it takes, of a step of `dims`.
    pub(crate) fn new(output: &Output, dims: &[u64; 4], bytes: &'a [u8]) -> Self {
        let count = dims[output.rows as usize] as usize;
        Self { data: bytemuck::cast_slice(bytes), count, width: output.width as usize, stride: output.stride as usize }
    }

    /// How many rows.
    pub fn len(&self) -> usize {
        self.count
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &'a [f32] {
        &self.data[i * self.stride..i * self.stride + self.width]
    }

    /// All rows in order.
    pub fn iter(&self) -> impl Iterator<Item = &'a [f32]> + use<'a> {
        let rows = *self;
        (0..rows.count).map(move |i| rows.row(i))
    }
}

/// Where those rows of an output that are wanted lie in the arena.
pub(crate) fn span_of(metadata: &Metadata, output: &Output, dims: &[u64; 4], wanted: &[u64; 4]) -> Span {
    let bytes = wanted[output.rows as usize] * output.stride * size_of::<f32>() as u64;
    Span { at: metadata.arena.offset(&output.at, dims), bytes }
}

fn place_bytes(input: &[u8]) -> u64 {
    nextc_abi::align_up(input.len() as u64, 64) + SLACK_BYTES
}

/// A launch with its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ResolvedLaunch {
    /// Index of its kernel.
    pub kernel: usize,
    /// Number of its tasks.
    pub tasks: u64,
    /// Number of tasks of its tail.
    pub tail_tasks: u64,
    /// Where in [`Resolved::args`] its arguments lie: the dimensions, then addresses.
    pub args: Range<usize>,
}

/// An entry point resolved for steps of certain dimensions.
#[derive(Debug)]
pub(crate) struct Resolved {
    pub args: Vec<u64>,
    pub launches: Vec<ResolvedLaunch>,
}

/// What code for a CPU is told of the thread team.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Team {
    pub threads: u64,
    /// What tasks hand to tails.
    pub partials: u64,
}

/// Where things are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Addresses<'a> {
    pub inputs: [u64; INPUTS],
    pub arena: u64,
    pub weights: u64,
    pub states: &'a [u64],
    /// What code for a CPU is told beside.
    pub team: Option<Team>,
}

/// The launches of a program in steps of dimensions `dims`, with their arguments.
pub(crate) fn resolve(metadata: &Metadata, program: &Program, dims: [u64; 4], at: &Addresses<'_>) -> Resolved {
    let mut resolved = Resolved { args: Vec::new(), launches: Vec::with_capacity(program.launches.len()) };
    for launch in &program.launches {
        let first = resolved.args.len();
        resolved.args.extend_from_slice(&dims);
        resolved.args.extend(at.team.map(|team| team.threads));
        resolved.args.extend(launch.args.iter().map(|arg| match arg {
            Arg::Input(input) => at.inputs[input_index(*input)],
            Arg::Arena(placement) => at.arena + metadata.arena.offset(placement, &dims),
            Arg::Weight(i) => at.weights + metadata.weights.entries[*i as usize].offset,
            Arg::State(i) => at.states[*i as usize],
        }));
        let index = launch.kernel as usize;
        let kernel = &metadata.kernels[index];
        resolved.args.extend(at.team.filter(|_| kernel.partial_bytes > 0).map(|team| team.partials));
        let [tasks, tail_tasks] = [&kernel.grid, &kernel.tail_grid].map(|grid| grid.eval(&dims));
        resolved.launches.push(ResolvedLaunch { kernel: index, tasks, tail_tasks, args: first..resolved.args.len() });
    }
    resolved
}

/// How often a kernel ran, and how long it took from its start until all threads were done.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct KernelTime {
    /// Launches.
    pub runs: u64,
    /// Seconds of all of them.
    pub seconds: f64,
    /// Seconds of the fastest: what it takes where nothing else runs.
    pub least_s: f64,
}

impl KernelTime {
    pub(crate) fn add(&mut self, seconds: f64) {
        self.least_s = if self.runs == 0 { seconds } else { self.least_s.min(seconds) };
        self.runs += 1;
        self.seconds += seconds;
    }
}

/// The widest dimension that addresses and `i32` inputs can hold.
pub(crate) const MAX_DIM: u64 = i32::MAX as u64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dimensions_follow_from_the_inputs() {
        let inputs = StepInputs {
            tokens: vec![1, 2, 3],
            positions: vec![0, 1, 5],
            cu_seqlens: vec![0, 2, 3],
            slot: vec![0, 4],
            replay: vec![0],
            tentative: vec![0],
            page_table: vec![0, 1, 2, 0, 0, 0],
            logit_rows: vec![2],
            ..StepInputs::default()
        };
        assert_eq!(inputs.dims(), [3, 2, 3, 1]);
        assert_eq!(inputs.dims()[nextc_abi::Sym::P as usize], 3);
    }

    #[test]
    fn sequences_that_are_alike_are_filled_up() {
        let decoded = |ends: &[i32]| StepInputs {
            tokens: vec![9; ends[ends.len() - 1] as usize],
            positions: vec![5; ends[ends.len() - 1] as usize],
            cu_seqlens: ends.to_vec(),
            slot: vec![0; ends.len() - 1],
            page_table: vec![7; 2 * (ends.len() - 1)],
            ..StepInputs::default()
        };
        let mut inputs = decoded(&[0, 2, 4, 6]);
        inputs.pad(5);
        inputs.logit_rows = (0..10).collect();
        assert_eq!((inputs.dims(), inputs.wanted_dims()), ([10, 5, 2, 10], [6, 3, 2, 6]));
        assert_eq!(
            (inputs.slot.as_slice(), &inputs.positions[6..]),
            ([0, 0, 0, -1, -1].as_slice(), [0, 1, 0, 1].as_slice())
        );
        assert_eq!((inputs.cu_seqlens[5], &inputs.tokens[6..], inputs.page_table[6]), (10, [0; 4].as_slice(), 0));
        for ends in [&[0, 1, 3][..], &[0, 9]] {
            let mut others = decoded(ends);
            others.pad(5);
            assert_eq!((others.padding, others.slot.len()), (Padding::default(), ends.len() - 1));
        }
    }

    #[test]
    fn what_is_taken_goes_to_the_place_of_its_input() {
        let rows = CopyRows::whole(640, 64, 32);
        let taken = Taken { memory: Memory::Arena, input: Input::Hidden, rows };
        let inputs = StepInputs { tokens: vec![1], hidden_bytes: 4096, taken: vec![taken], ..StepInputs::default() };
        let mut memory = vec![0xff; inputs.host_bytes() as usize];
        let places = inputs.write(&mut memory);
        assert_eq!(memory[..4], 1i32.to_le_bytes());
        assert_eq!(inputs.placed_bytes(), memory.len() as u64 + 4096);
        let (memory, rows) = inputs.taken_to(&places).next().unwrap();
        let hidden = places[input_index(Input::Hidden)];
        assert_eq!((memory, rows), (Memory::Arena, CopyRows::whole(640, hidden + 64, 32)));
        assert!(rows.to.at + 32 <= inputs.placed_bytes() && inputs.need_arena());
    }
}
