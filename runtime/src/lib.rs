//! The runtime of a compiled model.

pub mod sample;
pub mod template;
pub mod tokenizer;
