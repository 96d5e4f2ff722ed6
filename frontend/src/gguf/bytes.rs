//! A file's bytes in their order, through a window, so that neither a length nor a count in it is believed before it is
//! compared with what is left.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::error::GgufProblem as Problem;

/// Bytes at any position: a file, or memory.
pub trait Bytes {
    /// Fills `out` from byte `at` on.
    /// # Errors
    /// What the system says.
    fn read_at(&self, out: &mut [u8], at: u64) -> io::Result<()>;
}

impl Bytes for File {
    fn read_at(&self, out: &mut [u8], at: u64) -> io::Result<()> {
        self.read_exact_at(out, at)
    }
}

impl Bytes for [u8] {
    fn read_at(&self, out: &mut [u8], at: u64) -> io::Result<()> {
        let from = usize::try_from(at).ok().and_then(|at| self.get(at..)?.get(..out.len()));
        out.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// Bytes that are read at once.
const WINDOW_BYTES: u64 = 64 << 10;

/// A position in a file.
pub struct Cursor<'f, B: ?Sized> {
    file: &'f B,
    /// The position: the next byte.
    pub at: u64,
    /// Where the header must have ended.
    end: u64,
    window: Vec<u8>,
    window_at: u64,
}

impl<'f, B: Bytes + ?Sized> Cursor<'f, B> {
    /// At the beginning; nothing is read from byte `end` on.
    pub const fn new(file: &'f B, end: u64) -> Self {
        Self { file, at: 0, end, window: Vec::new(), window_at: 0 }
    }

    /// Bytes that are left.
    pub const fn left(&self) -> u64 {
        self.end - self.at
    }

    /// The next `count` bytes of `what`.
    pub fn bytes(&mut self, count: u64, what: &str) -> Result<Vec<u8>, Problem> {
        self.check_left(count, what)?;
        let mut out = vec![0; count as usize];
        self.read(&mut out)?;
        Ok(out)
    }

    fn check_left(&self, needs_bytes: u64, what: &str) -> Result<(), Problem> {
        if needs_bytes <= self.left() {
            return Ok(());
        }
        Err(Problem::Ends { what: what.to_owned(), at: self.at, needs_bytes, left_bytes: self.left() })
    }

    fn read(&mut self, out: &mut [u8]) -> Result<(), Problem> {
        let count = out.len() as u64;
        let failed = |at: u64| move |e: io::Error| Problem::Read { at, reason: e.to_string() };
        if count > WINDOW_BYTES {
            self.file.read_at(out, self.at).map_err(failed(self.at))?;
            self.at += count;
            return Ok(());
        }
        if self.at < self.window_at || self.at + count > self.window_at + self.window.len() as u64 {
            self.window.resize(WINDOW_BYTES.min(self.left()) as usize, 0);
            self.window_at = self.at;
            self.file.read_at(&mut self.window, self.at).map_err(failed(self.at))?;
        }
        let begin = (self.at - self.window_at) as usize;
        out.copy_from_slice(&self.window[begin..begin + out.len()]);
        self.at += count;
        Ok(())
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Problem> {
        self.check_left(N as u64, what)?;
        let mut out = [0; N];
        self.read(&mut out)?;
        Ok(out)
    }

    /// The next four bytes as a number.
    pub fn u32(&mut self, what: &str) -> Result<u32, Problem> {
        self.array(what).map(u32::from_le_bytes)
    }

    /// The next eight bytes as a number.
    pub fn u64(&mut self, what: &str) -> Result<u64, Problem> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of things of which each takes at least `each_bytes`: no more than the file has room for.
    pub fn count(&mut self, each_bytes: u64, what: &str) -> Result<u64, Problem> {
        let at = self.at;
        let found = self.u64(what)?;
        let most = self.left() / each_bytes;
        if found > most { Err(Problem::Count { what: what.to_owned(), at, found, most }) } else { Ok(found) }
    }

    /// A text of at most `most_bytes`, with its length before it.
    pub fn text(&mut self, most_bytes: u64, what: &str) -> Result<String, Problem> {
        let at = self.at;
        let count = self.count(1, &format!("the length of {what}"))?;
        if count > most_bytes {
            let what = format!("the length of {what}");
            return Err(Problem::Count { what, at, found: count, most: most_bytes });
        }
        let bytes = self.bytes(count, what)?;
        String::from_utf8(bytes).map_err(|e| Problem::Text {
            what: what.to_owned(),
            at: at + 8,
            reason: e.utf8_error().to_string(),
        })
    }
}
