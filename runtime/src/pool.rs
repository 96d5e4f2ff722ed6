//! The thread team that runs kernels: threads that stay, spin for a while and then sleep.
//!
//! A region of work is `tasks` tasks, of which the threads claim runs: long ones first, as neighbours read memory in one sweep, and single ones at the end, so
//! that all threads end together. One word holds the region's number and how many tasks are left, so a thread that comes late can never claim work of a region that
//! is over. The caller works too and returns when every task has been done; threads that slept through a region are not waited for.

use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// Turns of the waiting loop before a thread goes to sleep: about a millisecond.
const SPIN_TURNS: u32 = 20_000;
/// Turns of the caller's waiting loop before it lets other threads run.
const WAIT_TURNS: u32 = 2_000;
/// A thread claims this part of its share of what is left.
const CLAIM_DIVISOR: u32 = 4;

/// A value alone on its cache lines.
#[repr(align(128))]
struct Alone<T>(T);

type Call = unsafe fn(job: *const (), thread: usize, first: i64, last: i64);

/// What the threads share. The fields of the region are atomics because a late thread may read them while the next region is being
/// set up; it then fails to claim a task and drops what it read.
struct Shared {
    /// The region's number in the upper half, the units that nobody has claimed in the lower.
    claim: Alone<AtomicU64>,
    /// Units done.
    done: Alone<AtomicU32>,
    /// The region's number, for sleeping.
    region: Alone<AtomicU32>,
    sleepers: AtomicU32,
    stop: AtomicBool,
    /// What is left is divided by this for a claim.
    divisor: u32,
    tasks: AtomicU64,
    /// Tasks of a unit: one, unless there are more than the word can count.
    unit: AtomicU64,
    job: AtomicPtr<()>,
    call: AtomicUsize,
}

/// A team of threads; the thread that calls [`Pool::run`] is its leader.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    region: u32,
}

impl Pool {
    /// A team of `threads` threads, the caller included.
    /// # Errors
    /// The operating system's, if a thread cannot be started.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::new(threads));
        let mut pool = Self { shared, threads: Vec::new(), region: 0 };
        for thread in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let builder = std::thread::Builder::new().name(format!("team-{thread}"));
            pool.threads.push(builder.spawn(move || shared.work(thread))?);
        }
        Ok(pool)
    }

    /// Threads of the team, the leader included.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Runs `job(thread, first, last)` over disjoint ranges that cover `0 .. tasks`, and returns when all are done. `job` must not
    /// panic.
    pub fn run<F: Fn(usize, i64, i64) + Sync>(&mut self, tasks: i64, job: &F) {
        if tasks <= 0 {
            return;
        }
        if tasks == 1 || self.threads.is_empty() {
            return job(0, 0, tasks);
        }
        let unit = (tasks / i64::from(u32::MAX / 2)).max(1);
        let units = ((tasks - 1) / unit + 1) as u32;
        self.region = self.region.wrapping_add(1);
        self.shared.publish(self.region, tasks, unit, units, std::ptr::from_ref(job).cast(), call::<F>);
        self.shared.work_on(self.region, 0);
        self.shared.wait(units);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.region.0.store(self.region.wrapping_add(1), Ordering::SeqCst);
        futex_wake_all(&self.shared.region.0);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Calls a job through its erased address.
/// # Safety
/// `job` is the address of a living `F`.
unsafe fn call<F: Fn(usize, i64, i64) + Sync>(job: *const (), thread: usize, first: i64, last: i64) {
    // SAFETY: the caller's promise; `F: Sync`, so a shared reference may be used on any thread.
    unsafe { (*job.cast::<F>())(thread, first, last) }
}

impl Shared {
    fn new(threads: usize) -> Self {
        Self {
            claim: Alone(AtomicU64::new(0)),
            done: Alone(AtomicU32::new(0)),
            region: Alone(AtomicU32::new(0)),
            sleepers: AtomicU32::new(0),
            stop: AtomicBool::new(false),
            divisor: (threads as u32).saturating_mul(CLAIM_DIVISOR).max(1),
            tasks: AtomicU64::new(0),
            unit: AtomicU64::new(1),
            job: AtomicPtr::new(std::ptr::null_mut()),
            call: AtomicUsize::new(0),
        }
    }

    /// Sets a region up and wakes those who sleep. The region before it is over: all its tasks have been done.
    fn publish(&self, region: u32, tasks: i64, unit: i64, units: u32, job: *const (), call: Call) {
        self.done.0.store(0, Ordering::Relaxed);
        self.tasks.store(tasks as u64, Ordering::Relaxed);
        self.unit.store(unit as u64, Ordering::Relaxed);
        self.job.store(job.cast_mut(), Ordering::Relaxed);
        self.call.store(call as usize, Ordering::Relaxed);
        self.claim.0.store(u64::from(region) << 32 | u64::from(units), Ordering::SeqCst);
        self.region.0.store(region, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            futex_wake_all(&self.region.0);
        }
    }

    /// Claims and does tasks of a region until none is left.
    fn work_on(&self, region: u32, thread: usize) {
        let mut claim = self.claim.0.load(Ordering::Acquire);
        while (claim >> 32) as u32 == region && claim as u32 > 0 {
            // read before the claim: if it succeeds, the region was not over, and these were its own
            let (tasks, unit) = (self.tasks.load(Ordering::Relaxed), self.unit.load(Ordering::Relaxed));
            let (job, call) = (self.job.load(Ordering::Relaxed), self.call.load(Ordering::Relaxed));
            let left = claim as u32;
            let taken = (left / self.divisor).max(1);
            let rest = claim - u64::from(taken);
            match self.claim.0.compare_exchange_weak(claim, rest, Ordering::AcqRel, Ordering::Acquire) {
                Err(now) => claim = now,
                Ok(_) => {
                    let first = (tasks.div_ceil(unit) - u64::from(left)) * unit;
                    let last = (first + u64::from(taken) * unit).min(tasks);
                    // SAFETY: `call` was stored by `publish` from a function of this type, and the claim succeeded, so `job` is the
                    // job of a region whose leader still waits for these tasks.
                    unsafe {
                        let call = std::mem::transmute::<usize, Call>(call);
                        call(job, thread, first as i64, last as i64);
                    }
                    self.done.0.fetch_add(taken, Ordering::Release);
                    claim = self.claim.0.load(Ordering::Acquire);
                }
            }
        }
    }

    /// Waits until `units` units of the current region have been done.
    fn wait(&self, units: u32) {
        let mut turns = 0;
        while self.done.0.load(Ordering::Acquire) < units {
            turns += 1;
            if turns < WAIT_TURNS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }

    /// What a thread of the team does until the team ends.
    fn work(&self, thread: usize) {
        let mut seen = 0;
        loop {
            seen = self.next_region(seen);
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            self.work_on(seen, thread);
        }
    }

    /// Waits for a region other than `seen`: spinning first, then asleep.
    fn next_region(&self, seen: u32) -> u32 {
        for _ in 0..SPIN_TURNS {
            let region = self.region.0.load(Ordering::Acquire);
            if region != seen {
                return region;
            }
            std::hint::spin_loop();
        }
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let mut region = self.region.0.load(Ordering::SeqCst);
        while region == seen {
            futex_wait(&self.region.0, seen);
            region = self.region.0.load(Ordering::SeqCst);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        region
    }
}

/// Sleeps while `word` is `value`.
fn futex_wait(word: &AtomicU32, value: u32) {
    let flags = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the word lives through the call; a null timeout means to wait for ever.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), flags, value, std::ptr::null::<libc::timespec>()) };
}

/// Wakes all that sleep on `word`.
fn futex_wake_all(word: &AtomicU32) {
    let flags = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the word lives through the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), flags, i32::MAX) };
}

/// Threads that this process may run at once.
pub fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Does `work` on every item, on as many threads as there are processors.
pub(crate) fn on_all_processors<T: Send>(items: impl Iterator<Item = T> + Send, work: impl Fn(T) + Sync) {
    let items = Mutex::new(items);
    std::thread::scope(|scope| {
        for _ in 0..available_threads() {
            scope.spawn(|| {
                loop {
                    let item = items.lock().expect("taking an item does not panic").next();
                    let Some(item) = item else { break };
                    work(item);
                }
            });
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(threads: usize, regions: usize, pause: bool) {
        let mut pool = Pool::new(threads).unwrap();
        let hits: Vec<AtomicU32> = (0..1000).map(|_| AtomicU32::new(0)).collect();
        let mut expected = vec![0; hits.len()];
        for i in 0..regions {
            let tasks = i * 7919 % hits.len();
            pool.run(tasks as i64, &|thread, first, last| {
                assert!(thread < threads);
                for hit in &hits[first as usize..last as usize] {
                    hit.fetch_add(1, Ordering::Relaxed);
                }
            });
            expected[..tasks].iter_mut().for_each(|n| *n += 1);
            if pause && i % 50 == 0 {
                std::thread::sleep(std::time::Duration::from_millis(3));
            }
            if i % 97 == 0 {
                let found: Vec<u32> = hits.iter().map(|h| h.load(Ordering::Relaxed)).collect();
                assert_eq!(found, expected, "region {i}");
            }
        }
    }

    #[test]
    fn every_task_runs_once() {
        check(1, 300, false);
        check(2, 20_000, false);
        check(7, 3_000, false);
    }

    #[test]
    fn threads_that_fell_asleep_come_back() {
        check(4, 400, true);
    }

    #[test]
    fn writes_of_one_region_are_seen_by_the_next() {
        let mut pool = Pool::new(3).unwrap();
        let cells: Vec<AtomicU64> = (0..256).map(|_| AtomicU64::new(0)).collect();
        for round in 0..2000u64 {
            pool.run(256, &|_, first, last| {
                for i in first..last {
                    let neighbour = cells[(i as usize + 1) % 256].load(Ordering::Relaxed);
                    assert!(neighbour == round || neighbour == round + 1);
                    cells[i as usize].store(round + 1, Ordering::Relaxed);
                }
            });
        }
    }
}
