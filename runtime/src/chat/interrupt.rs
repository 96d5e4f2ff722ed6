//! Ctrl-C while an answer is written.

use std::sync::atomic::{AtomicBool, Ordering};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_signal: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// From now on Ctrl-C is noted instead of ending the program.
pub(super) fn watch() {
    let handler: extern "C" fn(libc::c_int) = note;
    // SAFETY: the handler only stores to an atomic, which is allowed in a signal handler.
    unsafe { libc::signal(libc::SIGINT, handler as libc::sighandler_t) };
}

/// True once after each Ctrl-C.
pub(super) fn take() -> bool {
    INTERRUPTED.swap(false, Ordering::Relaxed)
}
