//! The intermediate representations of nextc and what they are made of.
//!
//! Two IRs live here: the **graph IR** ([`graph`]), a function of typed tensor ops per kind of layer, and the **kernel
//! IR** ([`kernel`]), loops and vectors near the machine. Both come with a builder, a text format that round-trips, a
//! verifier and an interpreter. Around them: element types, weight formats, types of state and layouts as data, the description of a
//! target, the schedule, and the trait through which weights are read. This crate knows no other crate of the workspace.

pub mod attr;
pub mod build;
pub mod cost;
pub mod dtype;
pub mod eval;
pub mod format;
pub mod graph;
pub mod kernel;
pub mod layout;
pub mod op;
pub mod ops;
pub mod parse;
pub mod print;
pub mod rows;
pub mod schedule;
pub mod shape;
pub mod source;
pub mod stored;
pub mod target;
pub mod types;
pub mod verify;

pub use attr::{Attr, Attrs};
pub use dtype::DType;
pub use format::Format;
pub use graph::{Function, Module, NodeId, Value};
pub use layout::Layout;
pub use op::Op;
pub use shape::{Dim, Shape, Sym};
pub use source::WeightSource;
pub use stored::Stored;
pub use target::Target;
pub use types::Type;
