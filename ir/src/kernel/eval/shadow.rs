//! Who touched each word of a buffer in the current launch, and which accesses are not ordered.
//!
//! Time is counted in epochs: one begins with each task, and with each barrier of a block. Two accesses of one task are ordered
//! if one thread does both or if a barrier lies between them; accesses of two tasks never are.

use std::ops::Range;

use super::Misdeed;
use super::memory::Buffer;

/// An epoch and a thread, packed so that later epochs are larger numbers; 0 is nobody.
type Mark = u64;

const THREAD_BITS: u32 = 16;
/// In place of a thread: several of one epoch.
const SEVERAL_THREADS: Mark = (1 << THREAD_BITS) - 1;
/// Accesses of several tasks.
const SEVERAL_TASKS: Mark = Mark::MAX;

/// Which epoch it is.
#[derive(Clone, Debug, Default)]
pub(super) struct Clock {
    epoch: u64,
    /// The epoch that each task began with, and the task, in the order in which they ran; `None` is a tail of one task of one thread.
    tasks: Vec<(u64, Option<u32>)>,
}

/// Who touches memory now.
#[derive(Clone, Copy, Debug)]
pub(super) struct Who {
    mark: Mark,
    /// The smallest mark of the current task.
    first: Mark,
    /// Marks below this one are forgotten.
    since: Mark,
}

/// The other side of a conflict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rival {
    /// Another task, by its number.
    Task(u64),
    /// Another thread of the block.
    Thread(u32),
    /// Several others.
    Several,
}

impl std::fmt::Display for Rival {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Task(task) => write!(f, "task {task}"),
            Self::Thread(thread) => write!(f, "thread {thread} of the block, with no barrier between"),
            Self::Several => f.write_str("several others"),
        }
    }
}

impl Clock {
    /// A task begins.
    pub(super) fn begin(&mut self, task: Option<u32>) {
        self.epoch += 1;
        self.tasks.push((self.epoch, task));
    }

    /// All threads of the block have met.
    pub(super) fn barrier(&mut self) {
        self.epoch += 1;
    }

    fn first(&self) -> Mark {
        self.tasks.last().map_or(1, |&(epoch, _)| epoch) << THREAD_BITS
    }

    /// A thread, in memory of the whole launch.
    pub(super) fn in_launch(&self, thread: usize) -> Who {
        Who { mark: self.epoch << THREAD_BITS | thread as u64, first: self.first(), since: 1 << THREAD_BITS }
    }

    /// A thread, in memory of its block.
    pub(super) fn in_task(&self, thread: usize) -> Who {
        Who { since: self.first(), ..self.in_launch(thread) }
    }

    /// What a conflict is called.
    pub(super) fn race(&self, conflict: &Conflict) -> Misdeed {
        Misdeed::Race { at: conflict.word as u64 * 4, other: self.rival(conflict.mark) }
    }

    /// Who left a mark, seen from the current task.
    fn rival(&self, mark: Mark) -> Rival {
        let (epoch, thread) = (mark >> THREAD_BITS, mark & SEVERAL_THREADS);
        if mark == SEVERAL_TASKS {
            Rival::Several
        } else if mark >= self.first() {
            if thread == SEVERAL_THREADS { Rival::Several } else { Rival::Thread(thread as u32) }
        } else {
            let after = self.tasks.partition_point(|&(first, _)| first <= epoch);
            let task = after.checked_sub(1).and_then(|i| self.tasks[i].1);
            task.map_or(Rival::Several, |task| Rival::Task(task.into()))
        }
    }
}

impl Who {
    fn conflicts(self, mark: Mark) -> bool {
        let same_epoch = mark >> THREAD_BITS == self.mark >> THREAD_BITS;
        mark != self.mark && mark >= self.since && (mark < self.first || same_epoch || mark == SEVERAL_TASKS)
    }

    /// The mark of those who left `mark` and this one: what is ordered before this one is forgotten.
    fn joins(self, mark: Mark) -> Mark {
        let (epoch, now) = (mark >> THREAD_BITS, self.mark >> THREAD_BITS);
        let ordered = mark < self.since || (mark >= self.first && epoch < now);
        if mark == self.mark || ordered {
            self.mark
        } else if epoch == now {
            self.mark | SEVERAL_THREADS
        } else {
            SEVERAL_TASKS
        }
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Shadow {
    writers: Vec<Mark>,
    readers: Vec<Mark>,
    /// Who added atomically; empty if nobody has.
    adders: Vec<Mark>,
}

/// A word, and who else touched it.
pub(super) struct Conflict {
    word: usize,
    mark: Mark,
}

impl Shadow {
    pub(super) fn new(buffer: &Buffer) -> Self {
        let words = (buffer.len_bytes() / 4) as usize;
        Self { writers: vec![0; words], readers: vec![0; words], adders: Vec::new() }
    }

    pub(super) fn read(&mut self, range: Range<usize>, who: Who) -> Result<(), Conflict> {
        let readers = self.readers[range.clone()].iter_mut();
        for ((word, reader), &writer) in range.clone().zip(readers).zip(&self.writers[range]) {
            if who.conflicts(writer) {
                return Err(Conflict { word, mark: writer });
            }
            if *reader != who.mark {
                *reader = who.joins(*reader);
            }
            against(&self.adders, word, who)?;
        }
        Ok(())
    }

    pub(super) fn write(&mut self, range: Range<usize>, who: Who) -> Result<(), Conflict> {
        for word in range {
            against(&self.writers, word, who)?;
            against(&self.readers, word, who)?;
            against(&self.adders, word, who)?;
            self.writers[word] = who.mark;
        }
        Ok(())
    }

    /// An atomic addition, which conflicts with everything but its like.
    pub(super) fn add(&mut self, word: usize, who: Who) -> Result<(), Conflict> {
        against(&self.writers, word, who)?;
        against(&self.readers, word, who)?;
        self.adders.resize(self.writers.len(), 0);
        self.adders[word] = who.joins(self.adders[word]);
        Ok(())
    }
}

fn against(marks: &[Mark], word: usize, who: Who) -> Result<(), Conflict> {
    match marks.get(word) {
        Some(&mark) if who.conflicts(mark) => Err(Conflict { word, mark }),
        _ => Ok(()),
    }
}
