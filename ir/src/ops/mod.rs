//! Shape rules and meanings of the ops, by family; the rows of [`crate::op`] name them.

pub mod attention;
pub mod check;
pub mod delta;
pub mod experts;
pub mod layout;
pub mod math;
pub mod norm;
pub mod sample;
pub mod step;
