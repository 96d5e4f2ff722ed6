//! What an executable made by nextc runs: it opens its own payload, maps its weights, and runs the schedule of kernels that the
//! compiler made, on threads and memory of its own. It owns memory and time, not mathematics.

pub mod artifact;
pub mod bench;
pub mod chat;
pub mod cli;
pub mod cpu;
mod cuda;
mod device;
pub mod engine;
pub mod error;
pub mod eval;
pub mod generate;
mod host;
pub mod info;
mod kept;
mod lag;
pub mod limits;
pub mod memory;
mod piece;
pub mod pool;
pub mod random;
mod recent;
pub mod sample;
pub mod shortlist;
pub mod snapshot;
pub mod state;
mod stats;
mod step;
pub mod template;
pub mod tensors;
mod text;
pub mod tokenizer;
pub mod weights;

pub use artifact::Artifact;
pub use engine::draft::{DraftInput, HiddenRows};
pub use engine::{Engine, EngineOptions, LogitRows};
pub use error::Error;
pub use state::SequenceId;
pub use step::KernelTime;
pub use step::Rows;

/// Metadata of a model without kernels, for tests.
#[cfg(test)]
pub(crate) fn sample_metadata() -> nextc_abi::Metadata {
    use nextc_abi::{Arena, Metadata, Model, Target, WeightTable, WeightsPlace};
    let place = WeightsPlace::None;
    Metadata {
        version: nextc_abi::VERSION,
        compiler: "test".to_owned(),
        backend: "test".to_owned(),
        fingerprint: String::new(),
        model: Model { name: "sample".to_owned(), vocab_size: 16, hidden_size: 8, max_context: 64, ..Model::default() },
        target: Target { arch: nextc_abi::metadata::X86_64.to_owned(), ..Target::default() },
        kernels: Vec::new(),
        programs: Vec::new(),
        weights: WeightTable {
            place,
            bytes: nextc_abi::weights::HEADER_BYTES,
            fingerprint: String::new(),
            entries: Vec::new(),
        },
        states: Vec::new(),
        arena: Arena::default(),
        page_tokens: 16,
        tentative_tokens: 8,
        assets: Vec::new(),
        others: Vec::new(),
    }
}
