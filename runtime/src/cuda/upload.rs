//! Weights to the device: from their file through pinned buffers, or made up.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::CudaError;
use super::driver::{Context, Stream, driver};
use super::memory::{Pinned, copy_in};
use crate::info::human_bytes;
use crate::random::{fills, periods};
use nextc_abi::Weight;

/// Bytes of a pinned buffer.
const BUFFER_BYTES: usize = 16 << 20;
/// Threads that copy from the file: enough to keep the link busy while some wait for the device.
const MAX_THREADS: usize = 8;
/// How long copying takes before it says how far it is, and how often.
const PATIENCE: Duration = Duration::from_secs(1);

/// Copies bytes to the device at `to`, and waits until they are there.
pub(super) fn upload(context: &Context, bytes: &[u8], to: u64) -> Result<(), CudaError> {
    let pieces: Vec<&[u8]> = bytes.chunks(BUFFER_BYTES).collect();
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let failed = Mutex::new(None);
    let threads = crate::pool::available_threads().min(MAX_THREADS).min(pieces.len());
    std::thread::scope(|scope| {
        let work = || {
            if let Err(error) = copy_pieces(context, &pieces, to, &next, &done) {
                // the others have nothing more to do
                next.store(pieces.len(), Ordering::Relaxed);
                failed.lock().expect("noting an error does not panic").get_or_insert(error);
            }
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        show_progress(bytes.len(), &done, || workers.iter().all(|w| w.is_finished()));
    });
    failed.into_inner().expect("noting an error does not panic").map_or(Ok(()), Err)
}

/// Claims pieces and copies them, each through a pinned buffer of this thread.
fn copy_pieces(
    context: &Context,
    pieces: &[&[u8]],
    to: u64,
    next: &AtomicUsize,
    done: &AtomicUsize,
) -> Result<(), CudaError> {
    context.make_current()?;
    let (stream, mut buffer) = (Stream::new()?, Pinned::new(BUFFER_BYTES as u64)?);
    loop {
        let i = next.fetch_add(1, Ordering::Relaxed);
        let Some(piece) = pieces.get(i) else { return Ok(()) };
        buffer.as_mut_slice()[..piece.len()].copy_from_slice(piece);
        copy_in("weights", to + (i * BUFFER_BYTES) as u64, &buffer.as_slice()[..piece.len()], &stream)?;
        stream.wait(|| "copying weights".to_owned())?;
        done.fetch_add(piece.len(), Ordering::Relaxed);
    }
}

/// Says on a terminal how far copying is, until it is over.
fn show_progress(total: usize, done: &AtomicUsize, is_over: impl Fn() -> bool) {
    let (begun, mut shown) = (Instant::now(), 0);
    let human = |bytes: usize| human_bytes(bytes as f64);
    while !is_over() {
        std::thread::sleep(Duration::from_millis(1));
        let ticks = begun.elapsed().as_millis() / PATIENCE.as_millis();
        if ticks > shown && std::io::stderr().is_terminal() {
            eprint!("\rloading weights: {} of {}   ", human(done.load(Ordering::Relaxed)), human(total));
            shown = ticks;
        }
    }
    if shown > 0 {
        eprint!("\r\x1b[K");
    }
}

/// Makes weights up on the device: each pattern is copied there once, to the longest run that has it, and from there to
/// everywhere.
pub(super) fn make_up(entries: &[Weight], to: u64, stream: &Stream) -> Result<(), CudaError> {
    let mut fills = fills(entries);
    let periods = periods(&fills);
    fills.sort_by_key(|fill| std::cmp::Reverse(fill.bytes));
    let mut places = std::collections::HashMap::new();
    for fill in &fills {
        let (at, period) = (to + fill.at, &periods[&fill.pattern]);
        let mut have = match places.get(&fill.pattern) {
            Some(&place) => {
                copy_within(place, at, fill.bytes, stream)?;
                continue;
            }
            None => fill.bytes.min(period.len() as u64),
        };
        places.insert(fill.pattern, at);
        copy_in("made-up weights", at, &period[..have as usize], stream)?;
        while have < fill.bytes {
            let more = have.min(fill.bytes - have);
            copy_within(at, at + have, more, stream)?;
            have += more;
        }
    }
    stream.wait(|| "making weights up".to_owned())
}

fn copy_within(from: u64, to: u64, bytes: u64, stream: &Stream) -> Result<(), CudaError> {
    driver!("copying made-up weights", cuMemcpyDtoDAsync_v2(to, from, bytes as usize, stream.raw()))
}
