//! Elementwise algebra and what a matmul lets through.

use super::conditions::{row_scalar, rows};
use super::{Rule, rw};

/// The rules of this family.
#[rustfmt::skip]
pub fn rules() -> Vec<Rule> { vec![
    rw!("commute-add"; "(add ?a ?b)"                  => "(add ?b ?a)"),
    rw!("commute-mul"; "(mul ?a ?b)"                  => "(mul ?b ?a)"),
    rw!("silu";        "(mul ?a (sigmoid ?a))"        => "(silu ?a)"),
    rw!("swiglu";      "(mul (silu ?a) ?b)"           => "(swiglu ?a ?b)"),

    // 1/rms, one number a row, passes through a matmul, so that the matmul need not wait for it
    rw!("scale-behind-linear"; "(linear (mul ?x ?row) ?w)" => "(mul (linear ?x ?w) ?row)").when(row_scalar("?row"))
        .reorders("the factor is applied to the sum instead of its terms"),

    // a matmul's epilogue adds the residual and leaves the sum of squares for the next norm
    rw!("linear-residual";
        "(add ?residual (linear ?x ?w))"                => "(proj (linear_residual ?x ?w ?residual) 0)",
        "(sum_squares (add ?residual (linear ?x ?w)))"  => "(proj (linear_residual ?x ?w ?residual) 1)").when(rows("?residual")),
]}
