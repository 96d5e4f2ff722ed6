//! The key table: every key of `config.json` that nextc knows, once, with how it is treated.
//!
//! A key that is not here is named in a warning. A reader that asks for a key which the table does not call
//! [`Role::Read`] is a bug that debug builds catch, so the table is complete.

/// A value that a [`Role::Fixed`] key may have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lit {
    /// `null`; for all of these keys the same as an absent key.
    Null,
    /// A boolean.
    Bool(bool),
    /// A number, integer or not.
    Num(f64),
    /// A string.
    Str(&'static str),
    /// An array without elements, or an object without keys.
    Empty,
}

/// How a key is treated.
#[derive(Clone, Copy, Debug)]
pub enum Role {
    /// Read into the model configuration and checked there.
    Read,
    /// Would change the mathematics: anything but these values is an error, for the reason given.
    Fixed(&'static [Lit], &'static str),
    /// Has no effect on inference.
    Ignored,
}

/// One row of a key table.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// The key.
    pub name: &'static str,
    /// How it is treated.
    pub role: Role,
}

const fn read(name: &'static str) -> Key {
    Key { name, role: Role::Read }
}

const fn fixed(name: &'static str, values: &'static [Lit], why: &'static str) -> Key {
    Key { name, role: Role::Fixed(values, why) }
}

const fn ignored(name: &'static str) -> Key {
    Key { name, role: Role::Ignored }
}

const FALSE: &[Lit] = &[Lit::Bool(false), Lit::Null];
const TRUE: &[Lit] = &[Lit::Bool(true), Lit::Null];
const ONE: &[Lit] = &[Lit::Num(1.0), Lit::Null];
const NOTHING: &[Lit] = &[Lit::Null];
const SILU: &[Lit] = &[Lit::Str("silu"), Lit::Str("swish"), Lit::Null];

/// The keys at the top of `config.json`.
pub const CONFIG_KEYS: &[Key] = &[
    // what it is
    read("model_type"),
    read("architectures"),
    read("dtype"),
    read("torch_dtype"),
    read("quantization_config"),
    // sizes
    read("vocab_size"),
    read("hidden_size"),
    read("num_hidden_layers"),
    read("layer_types"),
    read("full_attention_interval"),
    read("num_attention_heads"),
    read("num_key_value_heads"),
    read("head_dim"),
    read("linear_num_key_heads"),
    read("linear_num_value_heads"),
    read("linear_key_head_dim"),
    read("linear_value_head_dim"),
    read("linear_conv_kernel_dim"),
    read("num_experts"),
    read("num_experts_per_tok"),
    read("moe_intermediate_size"),
    read("shared_expert_intermediate_size"),
    read("norm_topk_prob"),
    read("decoder_sparse_step"),
    read("mlp_only_layers"),
    read("intermediate_size"),
    read("rms_norm_eps"),
    read("tie_word_embeddings"),
    read("num_nextn_predict_layers"),
    read("mtp_num_hidden_layers"),
    // positions
    read("partial_rotary_factor"),
    read("rope_theta"),
    read("rope_scaling"),
    read("rope_parameters"),
    read("max_position_embeddings"),
    // tokens
    read("bos_token_id"),
    read("eos_token_id"),
    // known to change the mathematics
    fixed("hidden_act", SILU, "other activations are not supported"),
    fixed("attention_bias", FALSE, "biases on the attention projections are not supported"),
    fixed("qkv_bias", FALSE, "biases on the attention projections are not supported"),
    fixed("mlp_bias", FALSE, "biases on the FFN projections are not supported"),
    fixed("attn_output_gate", TRUE, "attention without its output gate is not supported"),
    fixed("output_gate_type", SILU, "other output gates of DeltaNet are not supported"),
    fixed("layer_scale", FALSE, "scaled layer outputs are not supported"),
    fixed("use_sliding_window", FALSE, "sliding window attention is not supported"),
    fixed("dual_chunk_attention_config", NOTHING, "dual chunk attention is not supported"),
    fixed("mtp_use_dedicated_embeddings", FALSE, "an MTP module with embeddings of its own is not supported"),
    fixed("scoring_func", &[Lit::Str("softmax"), Lit::Null], "other router scores are not supported"),
    fixed("routed_scaling_factor", ONE, "scaled expert outputs are not supported"),
    fixed("n_group", ONE, "grouped routing is not supported"),
    fixed("topk_group", ONE, "grouped routing is not supported"),
    fixed("logit_scale", ONE, "scaled logits are not supported"),
    fixed("logits_scaling", ONE, "scaled logits are not supported"),
    fixed("lm_head_multiplier", ONE, "scaled logits are not supported"),
    fixed("embedding_multiplier", ONE, "scaled embeddings are not supported"),
    fixed("residual_multiplier", ONE, "scaled residuals are not supported"),
    fixed("attention_multiplier", NOTHING, "another softmax scale is not supported"),
    fixed("query_pre_attn_scalar", NOTHING, "another softmax scale is not supported"),
    fixed("final_logit_softcapping", NOTHING, "soft-capped logits are not supported"),
    fixed("attn_logit_softcapping", NOTHING, "soft-capped attention scores are not supported"),
    fixed("is_encoder_decoder", FALSE, "encoder-decoder models are not supported"),
    fixed("add_cross_attention", FALSE, "cross attention is not supported"),
    fixed("text_config", NOTHING, "multimodal models are not supported"),
    fixed("vision_config", NOTHING, "multimodal models are not supported"),
    fixed("pruned_heads", &[Lit::Null, Lit::Empty], "pruned heads are not supported"),
    // without effect on inference
    ignored("sliding_window"),
    ignored("max_window_layers"),
    ignored("mamba_ssm_dtype"),
    ignored("router_aux_loss_coef"),
    ignored("output_router_logits"),
    ignored("attention_dropout"),
    ignored("hidden_dropout"),
    ignored("initializer_range"),
    ignored("use_cache"),
    ignored("pad_token_id"),
    ignored("sep_token_id"),
    ignored("decoder_start_token_id"),
    ignored("transformers_version"),
    ignored("_name_or_path"),
    ignored("_attn_implementation_autoset"),
    ignored("return_dict"),
    ignored("output_attentions"),
    ignored("output_hidden_states"),
    ignored("chunk_size_feed_forward"),
    ignored("id2label"),
    ignored("label2id"),
    ignored("problem_type"),
    ignored("task_specific_params"),
    ignored("is_decoder"),
    ignored("tie_encoder_decoder"),
    ignored("cross_attention_hidden_size"),
    ignored("tokenizer_class"),
    ignored("prefix"),
    ignored("finetuning_task"),
    ignored("torchscript"),
    ignored("use_bfloat16"),
];

/// The keys of `rope_parameters` (transformers 5) and `rope_scaling` (transformers 4), but for those of YaRN.
pub const ROPE_KEYS: &[Key] = &[read("rope_type"), read("type"), read("rope_theta"), read("partial_rotary_factor")];

/// The keys beside them that say how YaRN scales; `--rope-scaling` takes the same.
pub const YARN_KEYS: &[Key] = &[
    read("factor"),
    read("original_max_position_embeddings"),
    read("attention_factor"),
    read("beta_fast"),
    read("beta_slow"),
    read("truncate"),
    read("mscale"),
    read("mscale_all_dim"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_stands_once() {
        for table in [CONFIG_KEYS, ROPE_KEYS, YARN_KEYS] {
            for (i, key) in table.iter().enumerate() {
                assert!(table[..i].iter().all(|k| k.name != key.name), "`{}` stands twice", key.name);
            }
        }
    }
}
