//! The prebuilt runtime that every executable begins with: an ELF file made by this crate's build script.

/// The runtime's ELF file.
pub(crate) static RUNTIME: &[u8] = include_bytes!(env!("NEXTC_RUNTIME_ELF"));
