//! Memory of the interpreter: words, and which of them have been written.

use super::Misdeed;

/// A piece of memory, in words of four bytes; each knows whether it has been written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Buffer {
    words: Vec<u32>,
    /// One bit a word, and one spare entry so that two neighbours always exist.
    written: Vec<u64>,
    /// The same of what was written since [`Self::take_recent`], where that is asked for.
    recent: Option<Vec<u64>>,
}

/// Where a parameter points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index of the buffer.
    pub buffer: usize,
    /// Byte in it.
    pub at_bytes: u64,
}

impl Place {
    /// The beginning of a buffer.
    pub const fn start(buffer: usize) -> Self {
        Self { buffer, at_bytes: 0 }
    }
}

/// A buffer lent to a run.
#[derive(Debug)]
pub enum Slot<'a> {
    /// For reading, and the same before and after every launch: a weight, or an input of the step.
    Constant(&'a Buffer),
    /// For reading and writing.
    Own {
        /// It.
        buffer: &'a mut Buffer,
        /// What of it a launch may read before its wait.
        settled: Settled,
    },
}

/// What of a buffer a launch may read before it waits for the launches before it.
#[derive(Debug)]
pub enum Settled {
    /// All: no launch of the program has written it yet, as none has a state when it begins.
    All,
    /// Nothing.
    None,
    /// Words whose bits are not set: the launch before this one is known to have begun its work when those before it were done, and it has written the others.
    But(Vec<u64>),
}

impl Settled {
    /// Whether all of some words may be read.
    fn covers(&self, mut words: std::ops::Range<usize>) -> bool {
        match self {
            Self::All => true,
            Self::None => false,
            Self::But(bits) => !words.any(|i| is_set(bits, i)),
        }
    }
}

impl Buffer {
    /// Memory of `bytes` bytes that nobody has written, rounded up to a word.
    pub fn uninit(bytes: u64) -> Self {
        let words = bytes.div_ceil(4) as usize;
        Self { words: vec![0; words], written: vec![0; words / 64 + 2], recent: None }
    }

    fn from_words(words: Vec<u32>) -> Self {
        let written = vec![u64::MAX; words.len() / 64 + 2];
        Self { words, written, recent: None }
    }

    /// Memory of zeros.
    pub fn zeroed(bytes: u64) -> Self {
        Self::from_words(vec![0; bytes.div_ceil(4) as usize])
    }

    /// Memory that holds these floats.
    pub fn from_f32(values: &[f32]) -> Self {
        Self::from_words(values.iter().map(|x| x.to_bits()).collect())
    }

    /// Memory that holds these integers.
    pub fn from_i32(values: &[i32]) -> Self {
        Self::from_words(values.iter().map(|x| x.cast_unsigned()).collect())
    }

    /// Memory that holds these bytes; zeros fill the last word.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let word = |chunk: &[u8]| {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            u32::from_le_bytes(word)
        };
        Self::from_words(bytes.chunks(4).map(word).collect())
    }

    /// True if none of these words is one that [`Self::take_recent`] would name.
    fn is_not_recent(&self, mut words: std::ops::Range<usize>) -> bool {
        self.recent.as_ref().is_none_or(|bits| !words.any(|i| is_set(bits, i)))
    }

    /// Its size.
    pub fn len_bytes(&self) -> u64 {
        self.words.len() as u64 * 4
    }

    /// Every word as a float, written or not.
    pub fn to_f32(&self) -> Vec<f32> {
        self.words.iter().map(|&w| f32::from_bits(w)).collect()
    }

    /// Every word as an integer, written or not.
    pub fn to_i32(&self) -> Vec<i32> {
        self.words.iter().map(|w| w.cast_signed()).collect()
    }

    /// Its bytes, written or not.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    /// True if word `i` has been written.
    pub fn is_written(&self, i: usize) -> bool {
        is_set(&self.written, i)
    }

    /// Forgets what was written: the memory is as at its making.
    pub fn forget(&mut self) {
        self.written.fill(0);
    }

    /// The words of `lanes` elements of `elem_bytes` from byte `at` on, or why there are none.
    pub(super) fn range(&self, at: i64, lanes: usize, elem_bytes: u64) -> Result<std::ops::Range<usize>, Misdeed> {
        let bytes = lanes as u64 * elem_bytes;
        let inside =
            u64::try_from(at).ok().and_then(|a| a.checked_add(bytes)).is_some_and(|end| end <= self.len_bytes());
        if !inside {
            return Err(Misdeed::OutOfBounds { at, bytes, len: self.len_bytes() });
        }
        if !(at as u64).is_multiple_of(elem_bytes) {
            return Err(Misdeed::Misaligned { at, bytes: elem_bytes });
        }
        let first = at as usize / 4;
        Ok(first..first + bytes as usize / 4)
    }

    /// Words of a range that [`Self::range`] gave; at most 32.
    pub(super) fn read(&self, range: std::ops::Range<usize>) -> Result<&[u32], Misdeed> {
        let missing = !self.written_bits(range.start) & mask(range.len());
        if missing != 0 {
            return Err(Misdeed::Unwritten { at: (range.start as u64 + u64::from(missing.trailing_zeros())) * 4 });
        }
        Ok(&self.words[range])
    }

    /// Words of a range that [`Self::range`] gave, counted as written from now on; at most 32.
    pub(super) fn write(&mut self, range: std::ops::Range<usize>) -> &mut [u32] {
        let (entry, shift) = (range.start / 64, range.start % 64);
        let mask = mask(range.len());
        for bits in [Some(&mut self.written), self.recent.as_mut()].into_iter().flatten() {
            bits[entry] |= mask << shift;
            if shift > 0 {
                bits[entry + 1] |= mask >> (64 - shift);
            }
        }
        &mut self.words[range]
    }

    /// A bit for each word that was written since the last call. The first one begins to note them.
    pub(super) fn take_recent(&mut self) -> Vec<u64> {
        let none = vec![0; self.written.len()];
        self.recent.replace(none.clone()).unwrap_or(none)
    }

    /// The bits of 64 words from `first` on.
    fn written_bits(&self, first: usize) -> u64 {
        let (entry, shift) = (first / 64, first % 64);
        let low = self.written[entry] >> shift;
        if shift == 0 { low } else { low | self.written[entry + 1] << (64 - shift) }
    }
}

/// Whether bit `i` is set.
fn is_set(bits: &[u64], i: usize) -> bool {
    bits[i / 64] >> (i % 64) & 1 == 1
}

/// The lowest `n <= 32` bits.
const fn mask(n: usize) -> u64 {
    (1 << n) - 1
}

impl Slot<'_> {
    /// The buffer, to read.
    pub fn get(&self) -> &Buffer {
        match self {
            Self::Constant(b) => b,
            Self::Own { buffer, .. } => buffer,
        }
    }

    /// The buffer, to write, if it may be.
    pub(super) fn get_mut(&mut self) -> Result<&mut Buffer, Misdeed> {
        match self {
            Self::Constant(_) => Err(Misdeed::ReadOnly),
            Self::Own { buffer, .. } => Ok(buffer),
        }
    }

    /// Says what a launch may read before its wait from now on.
    pub(super) fn settle(&mut self, now: Settled) {
        if let Self::Own { settled, .. } = self {
            *settled = now;
        }
    }

    /// The same where `whole` says that all launches but the last one are done.
    pub(super) fn settle_recent(&mut self, whole: bool) {
        if let Self::Own { buffer, settled } = self {
            let recent = buffer.take_recent();
            *settled = if whole { Settled::But(recent) } else { Settled::None };
        }
    }

    /// Whether words may be read before the wait.
    pub(super) fn is_settled(&self, words: std::ops::Range<usize>) -> bool {
        match self {
            Self::Constant(_) => true,
            Self::Own { buffer, settled } => settled.covers(words.clone()) && buffer.is_not_recent(words),
        }
    }
}
