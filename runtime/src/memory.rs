//! Memory from the operating system: reserved address space that grows with use, and mapped files.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

/// What may be done with a mapped file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading.
    Read,
    /// Reading and executing, never writing.
    ReadExecute,
}

/// A run of pages, given back when dropped.
#[derive(Debug)]
pub struct Region {
    at: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a region is plain memory that it owns; who may write it is up to those who hand out its address.
unsafe impl Send for Region {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for Region {}

impl Region {
    /// Address space for `bytes` bytes, zero when first touched. It takes memory only where it is touched.
    /// # Errors
    /// The operating system's, if there is not that much address space.
    pub fn reserve(bytes: u64) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        Self::map(bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    }

    /// Bytes `offset ..` of a file, whose contents must not change meanwhile. `offset` is a multiple of the page size.
    /// # Errors
    /// The operating system's.
    pub fn of_file(file: &File, offset: u64, bytes: u64, access: Access) -> io::Result<Self> {
        let protection = match access {
            Access::Read => libc::PROT_READ,
            Access::ReadExecute => libc::PROT_READ | libc::PROT_EXEC,
        };
        Self::map(bytes, protection, libc::MAP_PRIVATE, file.as_raw_fd(), offset)
    }

    fn map(bytes: u64, protection: i32, flags: i32, fd: i32, offset: u64) -> io::Result<Self> {
        let too_large = |_| io::Error::from(io::ErrorKind::OutOfMemory);
        let bytes = usize::try_from(bytes.max(1)).map_err(too_large)?;
        let offset = libc::off_t::try_from(offset).map_err(too_large)?;
        // SAFETY: a fresh mapping at a place of the kernel's choice touches no memory of ours.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, fd, offset) };
        match NonNull::new(at.cast::<u8>()) {
            Some(at) if at.as_ptr().cast() != libc::MAP_FAILED => Ok(Self { at, bytes }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The address of its first byte.
    pub fn address(&self) -> u64 {
        self.at.as_ptr() as u64
    }

    /// Bytes it has.
    pub fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// Its bytes. For anonymous memory: as the last step left them.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the mapping lives as long as `self` and is readable over its whole length. Kernels write it only while the engine
        // is borrowed mutably, and mapped files are not changed by those who installed them.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.bytes) }
    }

    /// Its bytes, to write; for anonymous memory only.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and `self` is borrowed mutably. Writing a read-only mapping would fault, not corrupt.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.bytes) }
    }

    /// Asks for large pages, where the system gives them.
    pub fn advise_huge(&self) {
        // SAFETY: advice changes no contents; the range is our own mapping.
        unsafe { libc::madvise(self.at.as_ptr().cast(), self.bytes, libc::MADV_HUGEPAGE) };
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `map` made, and nobody holds a reference into it any more.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.bytes) };
    }
}

/// Bytes of memory that can be had without swapping, as the system estimates it.
pub fn available_bytes() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_memory_is_zero_and_costs_nothing_until_touched() {
        let mut region = Region::reserve(1 << 40).unwrap();
        let last = region.bytes() as usize - 1;
        assert_eq!(region.as_slice()[last], 0);
        region.as_mut_slice()[last / 2] = 7;
        assert_eq!(region.as_slice()[last / 2], 7);
        assert_eq!(region.address() % 4096, 0);
    }

    #[test]
    fn available_memory_is_known() {
        assert!(available_bytes().unwrap() > 1 << 20);
    }
}
