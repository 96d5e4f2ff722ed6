//! Which published tensor each tensor of a GGUF file is, and how its numbers differ from the published ones.

use std::cmp::Ordering;

/// How a tensor's numbers are made from the published ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// They are the same.
    Same,
    /// The gain of a norm, with the 1 that it is added to.
    PlusOne,
    /// `-exp(A_log)`.
    NegExp,
    /// The same, but the only row of a matrix as a vector.
    Row,
}

/// A tensor: what its name ends in here, what the published one's does, and how its numbers are made.
type Name = (&'static str, &'static str, Stored);

const GLOBALS: &[Name] = &[
    ("token_embd.weight", "model.embed_tokens.weight", Stored::Same),
    ("output.weight", "lm_head.weight", Stored::Same),
    ("output_norm.weight", "model.norm.weight", Stored::PlusOne),
];

const LAYER: &[Name] = &[
    ("attn_norm.weight", "input_layernorm.weight", Stored::PlusOne),
    ("post_attention_norm.weight", "post_attention_layernorm.weight", Stored::PlusOne),
    ("attn_q.weight", "self_attn.q_proj.weight", Stored::Same),
    ("attn_k.weight", "self_attn.k_proj.weight", Stored::Same),
    ("attn_v.weight", "self_attn.v_proj.weight", Stored::Same),
    ("attn_q_norm.weight", "self_attn.q_norm.weight", Stored::PlusOne),
    ("attn_k_norm.weight", "self_attn.k_norm.weight", Stored::PlusOne),
    ("attn_output.weight", "self_attn.o_proj.weight", Stored::Same),
    // all of q, all of k, all of v; `ssm_in` of older files is the published tensor, grouped by key head
    ("attn_qkv.weight", "linear_attn.in_proj_qkv.weight", Stored::Same),
    ("attn_gate.weight", "linear_attn.in_proj_z.weight", Stored::Same),
    ("ssm_in.weight", "linear_attn.in_proj_qkvz.weight", Stored::Same),
    ("ssm_ba.weight", "linear_attn.in_proj_ba.weight", Stored::Same),
    ("ssm_conv1d.weight", "linear_attn.conv1d.weight", Stored::Same),
    ("ssm_a", "linear_attn.A_log", Stored::NegExp),
    ("ssm_dt.bias", "linear_attn.dt_bias", Stored::Same),
    ("ssm_norm.weight", "linear_attn.norm.weight", Stored::Same),
    ("ssm_out.weight", "linear_attn.out_proj.weight", Stored::Same),
    ("ffn_gate_inp.weight", "mlp.gate.weight", Stored::Same),
    ("ffn_gate_inp_shexp.weight", "mlp.shared_expert_gate.weight", Stored::Row),
    ("ffn_gate_shexp.weight", "mlp.shared_expert.gate_proj.weight", Stored::Same),
    ("ffn_up_shexp.weight", "mlp.shared_expert.up_proj.weight", Stored::Same),
    ("ffn_down_shexp.weight", "mlp.shared_expert.down_proj.weight", Stored::Same),
    ("ffn_gate_exps.weight", "mlp.experts.gate_proj", Stored::Same),
    ("ffn_up_exps.weight", "mlp.experts.up_proj", Stored::Same),
    ("ffn_gate_up_exps.weight", "mlp.experts.gate_up_proj", Stored::Same),
    ("ffn_down_exps.weight", "mlp.experts.down_proj", Stored::Same),
    ("ffn_gate.weight", "mlp.gate_proj.weight", Stored::Same),
    ("ffn_up.weight", "mlp.up_proj.weight", Stored::Same),
    ("ffn_down.weight", "mlp.down_proj.weight", Stored::Same),
];

/// What the block of the MTP module has beside a layer's tensors.
const MTP: &[Name] = &[
    ("nextn.eh_proj.weight", "fc.weight", Stored::Same),
    ("nextn.enorm.weight", "pre_fc_norm_embedding.weight", Stored::PlusOne),
    ("nextn.hnorm.weight", "pre_fc_norm_hidden.weight", Stored::PlusOne),
    ("nextn.shared_head_norm.weight", "norm.weight", Stored::PlusOne),
];

/// Where the published names of a block begin; block `layers` is the MTP module, and the model has no further ones.
fn prefix(block: u64, layers: u64) -> Option<String> {
    match block.cmp(&layers) {
        Ordering::Less => Some(format!("model.layers.{block}.")),
        Ordering::Equal => Some("mtp.layers.0.".into()),
        Ordering::Greater => None,
    }
}

/// The published name of tensor `name` in a file whose first `layers` blocks are layers of the trunk, and how its numbers are made. What the model does not
/// have keeps its name; beside an MTP module it begins with `mtp.`.
pub fn published(name: &str, layers: u64) -> (String, Stored) {
    let find = |table: &[Name], name: &str| table.iter().find(|n| n.0 == name).copied();
    if let Some((_, published, stored)) = find(GLOBALS, name) {
        return (published.to_owned(), stored);
    }
    let parts = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    let block = parts.and_then(|(block, last)| Some((block.parse().ok()?, last)));
    let Some((block, last, prefix)) = block.and_then(|(block, last)| Some((block, last, prefix(block, layers)?)))
    else {
        return (name.to_owned(), Stored::Same);
    };
    if let Some((_, published, stored)) = find(LAYER, last) {
        return (format!("{prefix}{published}"), stored);
    }
    match find(MTP, last).filter(|_| block == layers) {
        Some((_, published, stored)) => (format!("mtp.{published}"), stored),
        None if block == layers => (format!("mtp.{name}"), Stored::Same),
        None => (name.to_owned(), Stored::Same),
    }
}

/// The name here of the published tensor `name`; itself where the model has no such tensor.
pub fn own(name: &str, layers: u64) -> String {
    let find = |table: &[Name], name: &str| table.iter().find(|n| n.1 == name).map(|n| n.0);
    let parts = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
    let layer = parts.and_then(|(i, last)| Some(format!("blk.{i}.{}", find(LAYER, last)?)));
    let mtp_layer = || Some(format!("blk.{layers}.{}", find(LAYER, name.strip_prefix("mtp.layers.0.")?)?));
    let mtp = || Some(format!("blk.{layers}.{}", find(MTP, name.strip_prefix("mtp.")?)?));
    let other = || name.strip_prefix("mtp.").filter(|rest| rest.starts_with("blk.")).map(str::to_owned);
    let global = || find(GLOBALS, name).map(str::to_owned);
    layer.or_else(mtp_layer).or_else(mtp).or_else(global).or_else(other).unwrap_or_else(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_stands_once_and_leads_back() {
        for table in [GLOBALS, LAYER, MTP] {
            for (i, (own, published, _)) in table.iter().enumerate() {
                assert!(table[..i].iter().all(|n| n.0 != *own && n.1 != *published), "{own}");
            }
        }
        let there_and_back = |name: &str, expected: &str| {
            assert_eq!(published(name, 4).0, expected);
            assert_eq!(own(expected, 4), name);
        };
        there_and_back("token_embd.weight", "model.embed_tokens.weight");
        there_and_back("blk.3.attn_norm.weight", "model.layers.3.input_layernorm.weight");
        there_and_back("blk.0.ssm_a", "model.layers.0.linear_attn.A_log");
        there_and_back("blk.4.ffn_down_exps.weight", "mtp.layers.0.mlp.experts.down_proj");
        there_and_back("blk.4.nextn.eh_proj.weight", "mtp.fc.weight");
        there_and_back("blk.4.nextn.embed_tokens.weight", "mtp.blk.4.nextn.embed_tokens.weight");
        there_and_back("blk.5.attn_norm.weight", "blk.5.attn_norm.weight");
        there_and_back("blk.3.attn_rot_embd", "blk.3.attn_rot_embd");
        there_and_back("rope_freqs.weight", "rope_freqs.weight");
        there_and_back("blk.x.attn_norm.weight", "blk.x.attn_norm.weight");
    }
}
