//! The last bytes of an executable: where its sections lie and what they hash to.

use bytemuck::{Pod, Zeroable};

use crate::hash::{self, Hash};
use crate::{PAGE_BYTES, VERSION};

/// The first bytes of a footer.
pub const MAGIC: [u8; 8] = *b"nextcEXE";

/// What a section holds; its index in [`Footer::sections`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SectionKind {
    /// Machine code, position independent, mapped readable and executable.
    Code,
    /// [`crate::Metadata`] as JSON.
    Metadata,
    /// Tokenizer files, listed in the metadata.
    Assets,
    /// The weights, with their header; empty unless they are embedded. Its hash is not set: weights have checksums each.
    Weights,
}

impl SectionKind {
    /// Every kind, in the order of the file.
    pub const ALL: [Self; 4] = [Self::Code, Self::Metadata, Self::Assets, Self::Weights];

    /// The name in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Code => "code",
            Self::Metadata => "metadata",
            Self::Assets => "assets",
            Self::Weights => "weights",
        }
    }
}

/// A run of bytes of the executable.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Section {
    /// Offset from the beginning of the file; a multiple of [`PAGE_BYTES`].
    pub offset: u64,
    /// Length, without padding.
    pub bytes: u64,
    /// Hash of the bytes.
    pub hash: Hash,
}

/// The footer. Integers are little-endian.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Footer {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// [`VERSION`].
    pub version: u32,
    /// Number of sections.
    pub section_count: u32,
    /// Where the payload begins.
    pub payload_offset: u64,
    /// Length of the whole file, footer included.
    pub file_bytes: u64,
    /// Hash of everything before the payload.
    pub runtime_hash: Hash,
    /// The sections, indexed by [`SectionKind`].
    pub sections: [Section; 4],
    /// Hash of all fields above.
    pub hash: Hash,
}

/// Why the end of a file is not a sound footer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FooterError {
    /// There is no footer at the end of the file.
    #[error("no payload at the end of the file (was it stripped or cut short?)")]
    Missing,
    /// It is of another version.
    #[error("payload of version {found}, expected {VERSION}")]
    Version {
        /// The version found.
        found: u32,
    },
    /// Its own hash does not fit.
    #[error("the footer is damaged: its hash does not match")]
    Damaged,
    /// The file is longer or shorter than when it was written.
    #[error("the file has {found} B, expected {expected} B")]
    Length {
        /// Bytes it has.
        found: u64,
        /// Bytes it had when it was written.
        expected: u64,
    },
    /// A section does not lie inside the file.
    #[error("section `{section}` lies outside the file")]
    Bounds {
        /// The section.
        section: &'static str,
    },
}

impl Footer {
    /// Bytes of a footer.
    pub const BYTES: u64 = size_of::<Self>() as u64;

    /// A footer of these sections.
    pub fn new(payload_offset: u64, file_bytes: u64, runtime_hash: Hash, sections: [Section; 4]) -> Self {
        let mut footer = Self {
            magic: MAGIC,
            version: VERSION,
            section_count: sections.len() as u32,
            payload_offset,
            file_bytes,
            runtime_hash,
            sections,
            hash: [0; 32],
        };
        footer.hash = footer.own_hash();
        footer
    }

    /// The section of a kind.
    pub fn section(&self, kind: SectionKind) -> &Section {
        &self.sections[kind as usize]
    }

    /// As written to the file.
    pub fn as_bytes(&self) -> &[u8] {
        bytemuck::bytes_of(self)
    }

    /// Reads the footer of a file of `file_bytes` bytes from its last [`Footer::BYTES`] bytes.
    /// # Errors
    /// [`FooterError`] says what is wrong with them.
    pub fn parse(tail: &[u8], file_bytes: u64) -> Result<Self, FooterError> {
        let footer: Self = bytemuck::try_pod_read_unaligned(tail).map_err(|_| FooterError::Missing)?;
        if footer.magic != MAGIC {
            return Err(FooterError::Missing);
        }
        if footer.version != VERSION {
            return Err(FooterError::Version { found: footer.version });
        }
        if footer.hash != footer.own_hash() {
            return Err(FooterError::Damaged);
        }
        if footer.file_bytes != file_bytes {
            return Err(FooterError::Length { found: file_bytes, expected: footer.file_bytes });
        }
        footer.check_bounds()?;
        Ok(footer)
    }

    fn check_bounds(&self) -> Result<(), FooterError> {
        let end = self.file_bytes - Self::BYTES;
        for kind in SectionKind::ALL {
            let section = self.section(kind);
            let inside = section.offset.checked_add(section.bytes).is_some_and(|last| last <= end);
            if !inside || !section.offset.is_multiple_of(PAGE_BYTES) {
                return Err(FooterError::Bounds { section: kind.name() });
            }
        }
        Ok(())
    }

    fn own_hash(&self) -> Hash {
        let bytes = self.as_bytes();
        hash::of(&bytes[..bytes.len() - size_of::<Hash>()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn footer() -> Footer {
        let section = |i: u64| Section { offset: i * PAGE_BYTES, bytes: 100, hash: [i as u8; 32] };
        Footer::new(
            PAGE_BYTES,
            5 * PAGE_BYTES + Footer::BYTES,
            [9; 32],
            [section(1), section(2), section(3), section(4)],
        )
    }

    #[test]
    fn a_footer_round_trips() {
        let f = footer();
        assert_eq!(Footer::parse(f.as_bytes(), f.file_bytes), Ok(f));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let f = footer();
        for i in 0..f.as_bytes().len() {
            let mut bytes = f.as_bytes().to_vec();
            bytes[i] ^= 4;
            assert!(Footer::parse(&bytes, f.file_bytes).is_err(), "byte {i}");
        }
    }

    #[test]
    fn another_length_and_other_bytes_are_refused() {
        let f = footer();
        let expected = f.file_bytes;
        assert_eq!(Footer::parse(f.as_bytes(), 77), Err(FooterError::Length { found: 77, expected }));
        assert_eq!(Footer::parse(&f.as_bytes()[1..], expected), Err(FooterError::Missing));
        assert_eq!(Footer::parse(&vec![0; f.as_bytes().len()], expected), Err(FooterError::Missing));
    }

    #[test]
    fn sections_outside_the_file_are_refused() {
        let mut f = footer();
        f.sections[2].bytes = 1 << 40;
        f.hash = f.own_hash();
        assert_eq!(Footer::parse(f.as_bytes(), f.file_bytes), Err(FooterError::Bounds { section: "assets" }));
    }
}
