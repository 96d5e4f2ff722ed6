//! What an executable made by nextc holds, declared once for the linker that writes it and the runtime that reads it.
//!
//! An executable is the runtime's own ELF file, followed by a page-aligned **payload** and, as its last bytes, a
//! [`Footer`]. The payload is sections: the code image, the [`Metadata`] as JSON, the assets (tokenizer files) and, if they
//! are embedded, the weights. Otherwise the weights are a file of their own beside it, `EXE.weights`. Weights begin with a
//! [`WeightsHeader`] in both cases.
//!
//! ```text
//! runtime ELF | pad | code image | pad | metadata | pad | assets | pad | [weights | pad] | footer
//! ```

pub mod footer;
pub mod hash;
pub mod metadata;
pub mod sampling;
pub mod weights;

pub use footer::{Footer, FooterError, Section, SectionKind};
pub use hash::{Hash, from_hex, to_hex};
pub use metadata::{
    Arena, Arg, Asset, Cost, Extent, Holds, Input, Kernel, Launch, Metadata, Model, Number, Output, Part, Placement,
    Program, Span, State, StateKind, Sym, Target, Version, Weight, WeightTable, WeightsPlace,
};
pub use sampling::{Choice, Factor};
pub use weights::{WeightsHeader, WeightsHeaderError};

/// Version of everything in this crate; footer, metadata and weights header carry it.
pub const VERSION: u32 = 2;

/// Alignment of sections, so that they can be mapped.
pub const PAGE_BYTES: u64 = 4096;

/// A sequence with at most so many tokens in a step is computed in the arithmetic of decoding, a longer run in that of many tokens. The compiler's own constant
/// of this name is the same: the linker checks it.
pub const DECODE_TOKENS: usize = 8;

/// Long runs may be computed in chunks from one multiple of so many positions to the next. Again the compiler has the same constant.
pub const CHUNK_TOKENS: usize = 64;

/// Machine code of a kernel, or of its tail. `args` points to the four dimensions of the step (`T`, `B`, `P`, `R`), how many threads share the tasks, and then the
/// addresses of the kernel's parameters and of its partials, if it has some; `scratch` to memory of the calling thread alone, aligned to 64 bytes; it
/// runs the tasks `first .. last`.
pub type KernelFn = unsafe extern "C" fn(args: *const u64, scratch: *mut u8, first: i64, last: i64);

/// `n` rounded up to a multiple of `align`.
pub const fn align_up(n: u64, align: u64) -> u64 {
    n.div_ceil(align) * align
}
