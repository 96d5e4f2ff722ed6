//! A program on a terminal of its own, driven as a person would.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Longer than anything takes, on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A running program and its terminal.
pub struct Terminal {
    child: Child,
    keys: File,
    screen: Receiver<Vec<u8>>,
    /// What has come and was not waited for yet, without escape sequences.
    seen: String,
    raw: Vec<u8>,
}

impl Terminal {
    /// Starts a program on a new terminal.
    pub fn start(command: &mut Command) -> Self {
        let (master, slave) = open();
        let end = || Stdio::from(slave.try_clone().expect("a descriptor"));
        command.stdin(end()).stdout(end()).stderr(end()).env("TERM", "xterm");
        // SAFETY: both calls are allowed between fork and exec, and take no pointers.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                match libc::ioctl(0, libc::TIOCSCTTY, 0) {
                    -1 => Err(std::io::Error::last_os_error()),
                    _ => Ok(()),
                }
            });
        }
        let child = command.spawn().expect("the program starts");
        let keys = File::from(master);
        let mut output = keys.try_clone().expect("a descriptor");
        let (sender, screen) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // the read fails once the program has gone
            while let Ok(n @ 1..) = output.read(&mut buffer) {
                if sender.send(buffer[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { child, keys, screen, seen: String::new(), raw: Vec::new() }
    }

    /// Presses keys.
    pub fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).expect("the terminal is there");
    }

    /// Types a line.
    pub fn type_line(&mut self, line: &str) {
        self.press(&format!("{line}\r"));
    }

    /// Waits for `text` on the screen, and gives what came before it.
    pub fn wait_for(&mut self, text: &str) -> String {
        let begun = Instant::now();
        loop {
            if let Some(at) = self.seen.find(text) {
                let rest = self.seen.split_off(at + text.len());
                let mut before = std::mem::replace(&mut self.seen, rest);
                before.truncate(at);
                return before;
            }
            match self.screen.recv_timeout(PATIENCE.saturating_sub(begun.elapsed())) {
                Ok(bytes) => self.take(&bytes),
                Err(RecvTimeoutError::Timeout) => panic!("no `{text}` on the screen: {:?}", self.seen),
                Err(RecvTimeoutError::Disconnected) => panic!("the program ended before `{text}`: {:?}", self.seen),
            }
        }
    }

    /// Waits until the program ends.
    pub fn end(mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("it is our child") {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "the program does not end: {:?}", self.seen);
            let _ = self.screen.recv_timeout(Duration::from_millis(20));
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        self.raw.extend_from_slice(bytes);
        let (text, used) = plain(&self.raw);
        self.raw.drain(..used);
        self.seen.push_str(&text);
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Text without escape sequences and carriage returns, and the bytes it was made of; what is incomplete waits.
fn plain(bytes: &[u8]) -> (String, usize) {
    let (mut text, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        match bytes[at..] {
            [0x1b, b'[', ref rest @ ..] => match rest.iter().position(|b| (0x40..=0x7e).contains(b)) {
                Some(end) => at += end + 3,
                None => break,
            },
            [0x1b, _, ..] => at += 2,
            [0x1b] => break,
            [b'\r', ..] => at += 1,
            [byte, ..] => {
                text.push(byte);
                at += 1;
            }
            [] => break,
        }
    }
    let valid = std::str::from_utf8(&text).map_or_else(|e| e.valid_up_to(), str::len);
    // the rest of a split character comes with the next bytes
    let kept = if text.len() - valid < 4 { text.len() - valid } else { 0 };
    (String::from_utf8_lossy(&text[..text.len() - kept]).into_owned(), at - kept)
}

fn open() -> (OwnedFd, OwnedFd) {
    let (mut master, mut slave) = (-1, -1);
    let size = libc::winsize { ws_row: 50, ws_col: 200, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the descriptors are written to live integers; no name and no settings are given.
    let opened = unsafe {
        libc::openpty(&raw mut master, &raw mut slave, std::ptr::null_mut(), std::ptr::null(), &raw const size)
    };
    assert_eq!(opened, 0, "a terminal: {}", std::io::Error::last_os_error());
    for fd in [master, slave] {
        // SAFETY: the descriptor is ours; neither shall be left open in the program.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    // SAFETY: both were opened just now, and nobody else owns them.
    unsafe { (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) }
}
