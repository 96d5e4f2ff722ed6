//! RMSNorm and what follows it: sums of squares that come with the residual stream, norms as the prologue of matmuls.

use super::conditions::{is_width, rows, width};
use super::{Rule, rw};

/// The rules of this family.
#[rustfmt::skip]
pub fn rules() -> Vec<Rule> { vec![
    rw!("norm-from-sums"; "(rms_norm_plus_one ?x ?gain ?eps)" => "(rms_norm_ssq ?x (sum_squares ?x) ?gain ?eps)").when(rows("?x"))
        .reorders("the squares are added by sixteens"),

    // the two factors of a norm: the gain 1 + w, a column each, and 1/rms, a row each
    rw!("split-norm"; "(rms_norm_ssq ?x ?ssq ?gain ?eps)" => "(mul (mul ?x (plus_one ?gain)) (rms_scale ?ssq ?width ?eps))")
        .computing(width("?width", "?x")),
    rw!("join-norm";  "(mul (mul ?x (plus_one ?gain)) (rms_scale ?ssq ?width ?eps))" => "(rms_norm_ssq ?x ?ssq ?gain ?eps)")
        .when(is_width("?width", "?x")),

    // the norm with its gain in the prologue of the projections
    rw!("norm-linears"; "(linears (rms_norm_ssq ?x ?ssq ?gain ?eps) ?ws)" => "(norm_linears ?x ?ssq ?gain ?ws ?eps)"),
    rw!("norm-swiglu";  "(swiglu (linear %h ?w_gate) (linear %h ?w_up))"  => "(norm_swiglu ?x ?ssq ?gain ?w_gate ?w_up ?eps)")
        .term("%h", "(rms_norm_ssq ?x ?ssq ?gain ?eps)"),
]}
