//! Mixture of experts: the router with its norm and dispatch, both halves of all experts, the shared one beside the routed.

use super::conditions::{is_rows_of, rows};
use super::{Rule, rw};

/// The normalised input of the router and of all experts.
const H: (&str, &str) = ("%h", "(rms_norm_ssq ?x ?ssq ?gain ?eps)");
/// The sum of an expert layer: routed experts and, beside them, the shared one with its gate.
const SUM: (&str, &str) = ("%sum", "(add (combine %routed ?weights ?ids) (mul ?shared (linear ?s ?s_down)))");

/// The rules of this family.
#[rustfmt::skip]
pub fn rules() -> Vec<Rule> { vec![
    // the softmax of all logits is not needed where the chosen ones are normalised anyway
    rw!("top-k-then-softmax";
        "(renormalise (proj (top_k (softmax ?logits) ?k) 0))" => "(softmax (proj (top_k ?logits ?k) 0))",
        "(proj (top_k (softmax ?logits) ?k) 1)"               => "(proj (top_k ?logits ?k) 1)")
        .reorders("the sum runs over the chosen instead of all"),

    router("norm-router-softmax", "(softmax (proj %top 0))", "(top_k (linear %h ?router) ?k)",
        "(norm_router ?x ?ssq ?gain ?router ?shared_gate ?eps ?k 1)"),
    router("norm-router-probabilities", "(proj %top 0)", "(top_k (softmax (linear %h ?router)) ?k)",
        "(norm_router ?x ?ssq ?gain ?router ?shared_gate ?eps ?k 0)"),

    rw!("experts-gate-up";
        "(swiglu (expert_linear %h ?w_gate ?ids ?order ?table) (expert_linear %h ?w_up ?ids ?order ?table))" => "(proj %all 0)",
        "(swiglu (linear %h ?s_gate) (linear %h ?s_up))"                                                     => "(proj %all 1)")
        .find("(add (combine (expert_linear %routed ?w_down ?ids ?order ?table) ?weights ?ids) (mul ?shared (linear %s ?s_down)))")
        .term(H.0, H.1)
        .term("%routed", "(swiglu (expert_linear %h ?w_gate ?ids ?order ?table) (expert_linear %h ?w_up ?ids ?order ?table))")
        .term("%s", "(swiglu (linear %h ?s_gate) (linear %h ?s_up))")
        .term("%all", "(experts_gate_up ?x ?ssq ?gain ?ids ?order ?table ?w_gate ?w_up ?s_gate ?s_up ?eps)"),

    rw!("experts-down";
        "(add ?residual %sum)"               => "(proj %all 0)",
        "(sum_squares (add ?residual %sum))" => "(proj %all 1)").when(rows("?residual"))
        .term("%routed", "(expert_linear ?h ?w_down ?ids ?order ?table)")
        .term(SUM.0, SUM.1)
        .term("%all", "(experts_down ?h ?s ?weights ?ids ?order ?table ?shared ?w_down ?s_down ?residual)"),
]}

/// The router in one kernel, where `weights` is how the experts' weights come from `top`.
#[rustfmt::skip]
fn router(name: &'static str, weights: &'static str, top: &'static str, all: &'static str) -> Rule {
    Rule::new(name, vec![
        (weights,                                "(proj %all 0)"),
        ("(proj %top 1)",                        "(proj %all 1)"),
        ("(proj %dispatch 0)",                   "(proj %all 2)"),
        ("(proj %dispatch 1)",                   "(proj %all 3)"),
        ("(sigmoid (linear %h ?shared_gate))",   "(proj %all 4)"),
        ("(linear %h ?router)",                  "(proj %all 5)"),
    ])
    .find("(add (combine %routed %weights (proj %top 1)) (mul (sigmoid (linear %h ?shared_gate)) ?s))")
    .when(is_rows_of("?experts", "?router"))
    .term(H.0, H.1)
    .term("%top", top)
    .term("%weights", weights)
    .term("%dispatch", "(dispatch (proj %top 1) ?experts)")
    .term("%routed", "(expert_linear ?act ?w_down (proj %top 1) (proj %dispatch 0) (proj %dispatch 1))")
    .term("%all", all)
}
