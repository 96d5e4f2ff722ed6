//! Ctrl-C while building leaves nothing behind: files that are being written lie beside their final place under a name of
//! their own, and are removed before the process ends.

use std::ffi::OsStr;
use std::path::Path;

/// Waits for SIGINT and SIGTERM on a thread of its own. Call it before any other thread is started: they inherit that these
/// signals are not for them.
pub fn watch() {
    let signals = signal_set();
    // SAFETY: `signals` is an initialised set, and the old mask is not asked for
    let blocked = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut()) };
    if blocked == 0 {
        std::thread::spawn(move || wait(&signals));
    }
}

fn signal_set() -> libc::sigset_t {
    // SAFETY: a set is plain data, and `sigemptyset` initialises it
    unsafe {
        let mut signals: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut signals);
        libc::sigaddset(&raw mut signals, libc::SIGINT);
        libc::sigaddset(&raw mut signals, libc::SIGTERM);
        signals
    }
}

fn wait(signals: &libc::sigset_t) {
    let mut signal = 0;
    // SAFETY: both point to live values; the signals are blocked in every thread
    if unsafe { libc::sigwait(signals, &raw mut signal) } == 0 {
        remove_unfinished();
        eprintln!("\n{} interrupted; nothing was written", crate::show::error_prefix());
        std::process::exit(128 + signal);
    }
}

/// Removes the files that this process has open and that are not finished.
fn remove_unfinished() {
    for entry in std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten() {
        if let Some(path) = std::fs::read_link(entry.path()).ok().filter(|path| is_unfinished(path)) {
            // the process ends either way, and a file that cannot be removed has been seen by whoever owns it
            let _ = std::fs::remove_file(path);
        }
    }
}

fn is_unfinished(path: &Path) -> bool {
    path.file_name().and_then(OsStr::to_str).is_some_and(|name| name.starts_with(nextc_link::UNFINISHED_PREFIX))
}
