//! From a model's graph to kernels: graph -> graph passes, then [`lower`] and [`legalise`].

pub mod legalise;
pub mod lower;
pub mod memory;
