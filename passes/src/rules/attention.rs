//! Gated attention: norm and RoPE of q and k beside the append, the output gate behind the attention.

use super::{Rule, rw};

/// The rules of this family.
#[rustfmt::skip]
pub fn rules() -> Vec<Rule> { vec![
    rw!("norm-rope";      "(rope (rms_norm_plus_one ?q ?q_norm ?eps) ?inv_freq ?seqs ?factor)" => "(norm_rope ?q ?q_norm ?inv_freq ?seqs ?eps ?factor)"),
    rw!("norm-append";    "(append_kv (norm_rope ?k ?k_norm ?inv_freq ?seqs ?eps ?factor) ?v ?kv ?seqs)" => "(norm_append ?k ?v ?k_norm ?inv_freq ?kv ?seqs ?eps ?factor)"),
    rw!("gate-attention"; "(mul (attention ?q ?kv ?seqs ?scale) (sigmoid ?output_gate))"       => "(gated_attention ?q ?output_gate ?kv ?seqs ?scale)"),

    // the queries of an attention and the keys appended just before it have one kernel
    rw!("norm-rope-append";
        "(norm_rope ?q ?q_norm ?inv_freq ?seqs ?eps ?factor)" => "(proj %all 0)",
        "%appended"                                           => "(proj %all 1)")
        .find("(attention (norm_rope ?q ?q_norm ?inv_freq ?seqs ?eps ?factor) %appended ?seqs ?scale)")
        .term("%appended", "(append_kv (norm_rope ?k ?k_norm ?inv_freq ?seqs ?eps ?factor) ?v ?kv ?seqs)")
        .term("%all", "(norm_rope_append ?q ?k ?v ?q_norm ?k_norm ?inv_freq ?kv ?seqs ?eps ?factor)"),
]}
