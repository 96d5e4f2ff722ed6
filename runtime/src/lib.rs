//! The runtime of a compiled model.

pub mod generate;
pub mod sample;
pub mod template;
pub mod tokenizer;
