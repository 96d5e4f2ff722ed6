//! Weights: the files that hold them, and the table that says which rows of which tensor each weight of the graph is.

pub mod checkpoint;
pub mod coded;
pub mod header;
pub mod keep;
pub mod quant;
pub mod rows;
pub mod safetensors;
pub mod table;

pub use checkpoint::Checkpoint;
pub use quant::{Quant, Quantise};
