//! Gated DeltaNet: convolution, gates and norms as prologue and epilogue of the delta rule.

use super::{Rule, rw};

/// The rules of this family.
#[rustfmt::skip]
pub fn rules() -> Vec<Rule> { vec![
    rw!("decay-gate"; "(neg (mul (exp ?a_log) (softplus (add ?a ?dt_bias))))" => "(decay_gate ?a ?a_log ?dt_bias)"),

    rw!("conv1d-silu";
        "(silu (proj (conv1d ?x ?w ?conv ?seqs) 0))" => "(proj (conv1d_silu ?x ?w ?conv ?seqs) 0)",
        "(proj (conv1d ?x ?w ?conv ?seqs) 1)"        => "(proj (conv1d_silu ?x ?w ?conv ?seqs) 1)"),

    // l2 norms, scale and both gates as prologue; the results, output and state, are the same two
    rw!("gate-delta-rule"; "(delta_rule (scale (l2_norm ?q ?eps) ?scale) (l2_norm ?k ?eps) ?v (decay_gate ?a ?a_log ?dt_bias) (sigmoid ?b) ?delta ?seqs)"
        => "(delta_rule_gated ?q ?k ?v ?a ?b ?a_log ?dt_bias ?delta ?seqs ?eps ?scale)"),

    // the gated norm as epilogue
    rw!("norm-delta-rule";
        "(mul (rms_norm (proj %gated 0) ?norm ?norm_eps) (silu ?z))" => "(proj %normed 0)",
        "(proj %gated 1)"                                            => "(proj %normed 1)")
        .term("%gated", "(delta_rule_gated ?q ?k ?v ?a ?b ?a_log ?dt_bias ?delta ?seqs ?eps ?scale)")
        .term("%normed", "(delta_rule_normed ?q ?k ?v ?z ?a ?b ?a_log ?dt_bias ?norm ?delta ?seqs ?eps ?scale ?norm_eps)"),

    // the convolutions as prologue: every state of the mixer has one writer
    rw!("gated-delta-net";
        "(proj %rule 0)"   => "(proj %all 0)",
        "(proj %conv_q 1)" => "(proj %all 1)",
        "(proj %conv_k 1)" => "(proj %all 2)",
        "(proj %conv_v 1)" => "(proj %all 3)",
        "(proj %rule 1)"   => "(proj %all 4)")
        .find("%rule")
        .term("%conv_q", "(conv1d_silu ?q ?w_q ?conv_q ?seqs)")
        .term("%conv_k", "(conv1d_silu ?k ?w_k ?conv_k ?seqs)")
        .term("%conv_v", "(conv1d_silu ?v ?w_v ?conv_v ?seqs)")
        .term("%rule", "(delta_rule_normed (proj %conv_q 0) (proj %conv_k 0) (proj %conv_v 0) ?z ?a ?b ?a_log ?dt_bias ?norm ?delta ?seqs ?eps ?scale ?norm_eps)")
        .term("%all", "(gated_delta_net ?q ?k ?v ?z ?a ?b ?w_q ?w_k ?w_v ?a_log ?dt_bias ?norm ?conv_q ?conv_k ?conv_v ?delta ?seqs ?eps ?scale ?norm_eps)"),
]}
