//! `gated_delta_net` by blocks of threads.

use super::super::LowerError;
use super::super::ports::{Lowered, Site};

/// `gated_delta_net`.
pub fn lower_gated_delta_net(_: &Site<'_>) -> Option<Result<Lowered, LowerError>> {
    None
}
