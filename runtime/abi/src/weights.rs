//! The first page of packed weights: what they are, so that an executable never runs with weights of another build.

use bytemuck::{Pod, Zeroable};

use crate::VERSION;
use crate::hash::Hash;

/// The first bytes of packed weights.
pub const MAGIC: [u8; 8] = *b"nextcWTS";

/// Bytes that the header takes; the first weight follows.
pub const HEADER_BYTES: u64 = crate::PAGE_BYTES;

/// Header of packed weights. Integers are little-endian; the rest of its page is zero.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct WeightsHeader {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// [`VERSION`].
    pub version: u32,
    /// Number of weights.
    pub count: u32,
    /// Length of everything, header included.
    pub bytes: u64,
    /// Fingerprint of names, layouts and contents.
    pub fingerprint: Hash,
}

/// Why packed weights cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WeightsHeaderError {
    /// They do not begin with a header.
    #[error("not a weights file of nextc")]
    Foreign,
    /// They are of another version.
    #[error("weights of version {found}, expected {VERSION}")]
    Version {
        /// The version found.
        found: u32,
    },
    /// They are longer or shorter than expected.
    #[error("{found} B of weights, expected {expected} B (cut short?)")]
    Length {
        /// Bytes there are.
        found: u64,
        /// Bytes there should be.
        expected: u64,
    },
    /// They belong to another build.
    #[error("weights of another build: fingerprint {found}, expected {expected}")]
    Fingerprint {
        /// The fingerprint found.
        found: String,
        /// The fingerprint that the executable was linked with.
        expected: String,
    },
}

impl WeightsHeader {
    /// A header.
    pub fn new(count: u32, bytes: u64, fingerprint: Hash) -> Self {
        Self { magic: MAGIC, version: VERSION, count, bytes, fingerprint }
    }

    /// As written to the file.
    pub fn as_bytes(&self) -> &[u8] {
        bytemuck::bytes_of(self)
    }

    /// Reads the header at the beginning of `bytes` and checks it against what the executable expects.
    /// # Errors
    /// [`WeightsHeaderError`] says what does not fit.
    pub fn check(bytes: &[u8], expected_bytes: u64, fingerprint: &str) -> Result<Self, WeightsHeaderError> {
        let head = bytes.get(..size_of::<Self>()).ok_or(WeightsHeaderError::Foreign)?;
        let header: Self = bytemuck::pod_read_unaligned(head);
        if header.magic != MAGIC {
            return Err(WeightsHeaderError::Foreign);
        }
        if header.version != VERSION {
            return Err(WeightsHeaderError::Version { found: header.version });
        }
        let found = crate::to_hex(&header.fingerprint);
        if found != fingerprint {
            return Err(WeightsHeaderError::Fingerprint { found, expected: fingerprint.to_owned() });
        }
        for found in [header.bytes, bytes.len() as u64] {
            if found != expected_bytes {
                return Err(WeightsHeaderError::Length { found, expected: expected_bytes });
            }
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_checked_field_by_field() {
        let print = crate::to_hex(&[7; 32]);
        let mut page = vec![0; HEADER_BYTES as usize];
        let header = WeightsHeader::new(3, HEADER_BYTES, [7; 32]);
        page[..header.as_bytes().len()].copy_from_slice(header.as_bytes());
        assert_eq!(WeightsHeader::check(&page, HEADER_BYTES, &print), Ok(header));
        let cut = WeightsHeader::check(&page[..100], HEADER_BYTES, &print);
        assert_eq!(cut, Err(WeightsHeaderError::Length { found: 100, expected: HEADER_BYTES }));
        let other = WeightsHeader::check(&page, HEADER_BYTES, &crate::to_hex(&[8; 32]));
        assert!(matches!(other, Err(WeightsHeaderError::Fingerprint { .. })));
        page[0] = 0;
        assert_eq!(WeightsHeader::check(&page, HEADER_BYTES, &print), Err(WeightsHeaderError::Foreign));
    }
}
