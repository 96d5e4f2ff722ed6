//! What stands between the projections of a gated-attention layer and its output projection, by blocks of threads.

use super::super::LowerError;
use super::super::ports::{Lowered, Site};

/// `norm_rope_append`.
pub fn lower_norm_rope_append(_: &Site<'_>) -> Option<Result<Lowered, LowerError>> {
    None
}

/// `gated_attention`.
pub fn lower_gated_attention(_: &Site<'_>) -> Option<Result<Lowered, LowerError>> {
    None
}
