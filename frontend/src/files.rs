//! Files opened with care: of a size that is expected, and never a pipe that would block.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use crate::error::Error;

/// The bytes of a file of at most `limit_bytes`; `None` if there is no such file.
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::TooLarge`] if it is too large.
pub fn read_limited(path: &Path, limit_bytes: u64) -> Result<Option<Vec<u8>>, Error> {
    if !present(path) {
        return Ok(None);
    }
    let file = file_name(path);
    let (opened, found_bytes) = open_file(path)?;
    if found_bytes > limit_bytes {
        return Err(Error::TooLarge { file, found_bytes, limit_bytes });
    }
    let mut bytes = Vec::with_capacity(found_bytes as usize);
    opened.take(found_bytes).read_to_end(&mut bytes).map_err(|reason| Error::Io { file, reason })?;
    Ok(Some(bytes))
}

/// True if there is something at `path`, even if it is a link that leads nowhere: opening it says what is wrong.
pub fn present(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Opens a regular file; also gives its size. Pipes and devices are refused before they can block.
/// # Errors
/// [`Error::Io`] if it cannot be opened or is something else.
pub fn open_file(path: &Path) -> Result<(File, u64), Error> {
    let open = || {
        let metadata = path.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        Ok((File::open(path)?, metadata.len()))
    };
    open().map_err(|reason| Error::Io { file: file_name(path), reason })
}

/// The last part of a path, for messages.
pub fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}
