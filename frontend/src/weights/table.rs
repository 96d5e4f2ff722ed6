//! The weight table: every weight of the graph with its shape, its format and the checkpoint rows that it is made of.
//!
//! The table is the same with and without a checkpoint; with one, each tensor's presence, shape and element type is
//! checked on the way, all problems are collected, and what is left over is named. A matrix keeps the format in which it
//! is stored (f32 where its tensors differ, or where it cannot keep their codes) unless another is asked for; weights without input dimensions are f32, as they are widened when packed.
//! Their runs take whole rows of their tensor.

use std::collections::HashSet;

use indexmap::IndexMap;
use nextc_ir::Format;
use nextc_ir::graph::{Origin, RowRun, WeightDecl};

use super::checkpoint::Checkpoint;
use super::keep;
use super::quant::{Quant, Quantise};
use super::rows::{self, run};
use crate::config::{Ffn, Mixer, ModelConfig, Quantization};
use crate::error::{Error, WeightProblem as Problem};

/// The weight table of a model and what was found out while making it.
pub struct WeightTable {
    /// Weights by name.
    pub weights: IndexMap<String, WeightDecl>,
    /// The FFN of the MTP module, if the model has one.
    pub mtp: Option<Ffn>,
    /// True if the head is the embedding.
    pub tied: bool,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// Makes the weight table of a model.
/// # Errors
/// [`Error::Weights`] with all tensors that are missing or do not fit.
pub fn build(config: &ModelConfig, checkpoint: Option<&Checkpoint>, quant: &Quantise) -> Result<WeightTable, Error> {
    let mut warnings = Vec::new();
    let all = quant.all.or_else(|| assumed(config, checkpoint, &mut warnings));
    let mtp = find_mtp(config, checkpoint, &mut warnings);
    let tied = find_tied(config, checkpoint, &mut warnings);
    let mut binder = Binder {
        config,
        checkpoint,
        quant: &Quantise { all, ..quant.clone() },
        weights: IndexMap::new(),
        used: HashSet::new(),
        problems: Vec::new(),
        widened: Vec::new(),
    };
    binder.globals(tied);
    for (i, layer) in config.layers.iter().enumerate() {
        let to = Names { table: format!("layers.{i}."), checkpoint: format!("model.layers.{i}.") };
        binder.layer(&to, layer.mixer, layer.ffn);
    }
    if let Some(ffn) = mtp {
        binder.mtp(ffn);
    }
    warnings.extend(binder.check_unused());
    warnings.extend(binder.name_widened());
    if !binder.problems.is_empty() {
        return Err(Error::Weights { problems: binder.problems });
    }
    check_exceptions(quant, &binder.weights)?;
    Ok(WeightTable { weights: binder.weights, mtp, tied, warnings })
}

/// Each exception of `--quant` is one of some matrix.
fn check_exceptions(quant: &Quantise, weights: &IndexMap<String, WeightDecl>) -> Result<(), Error> {
    let matrices = || weights.iter().filter(|(_, decl)| decl.in_rank > 0).map(|(name, _)| name);
    match quant.exceptions.iter().find(|e| !matrices().any(|name| e.matches(name))) {
        None => Ok(()),
        Some(exception) => {
            let mut known: Vec<String> = matrices().map(|name| of_any_layer(name)).collect();
            let mut seen = HashSet::new();
            known.retain(|name| seen.insert(name.clone()));
            Err(Error::QuantPattern { pattern: exception.pattern.clone(), known: known.join(", ") })
        }
    }
}

/// A weight's name with `*` for the number of its layer.
fn of_any_layer(name: &str) -> String {
    let last = name.strip_prefix("layers.").and_then(|rest| rest.split_once('.'));
    last.map_or_else(|| name.to_owned(), |(_, last)| format!("layers.*.{last}"))
}

/// Without a checkpoint no tensor says that it is quantised: the table of `--quant` stands for what the configuration promises.
fn assumed(c: &ModelConfig, checkpoint: Option<&Checkpoint>, warnings: &mut Vec<String>) -> Option<Quant> {
    let quantization = c.quantization.filter(|_| checkpoint.is_none())?;
    let quant = match quantization {
        Quantization::Fp8 { .. } => Quant::Fp8,
        Quantization::Packed | Quantization::Gptq(_) | Quantization::Awq(_) => Quant::Q4,
    };
    warnings.push("config.json: without weights, `quantization_config` counts as `--quant` of its kind".into());
    Some(quant)
}

/// MTP is there if its tensors are; where there are no tensors at all, if the configuration says so.
fn find_mtp(c: &ModelConfig, checkpoint: Option<&Checkpoint>, warnings: &mut Vec<String>) -> Option<Ffn> {
    let Some(checkpoint) = checkpoint else { return (c.mtp_layers == Some(1)).then_some(c.mtp_ffn) };
    let is_moe = |n: &str| n == "mtp.layers.0.mlp.gate.weight" || n.starts_with("mtp.layers.0.mlp.experts.");
    if !checkpoint.names().any(|n| n.starts_with("mtp.")) {
        if c.mtp_layers == Some(1) {
            warnings.push("an MTP module is promised, but the checkpoint has no tensors of it".into());
        }
        return None;
    }
    Some(if checkpoint.names().any(is_moe) { Ffn::Moe } else { Ffn::Dense })
}

fn find_tied(c: &ModelConfig, checkpoint: Option<&Checkpoint>, warnings: &mut Vec<String>) -> bool {
    if c.tie_word_embeddings {
        return true;
    }
    let absent = checkpoint.is_some_and(|c| !c.has("lm_head.weight"));
    if absent {
        warnings.push("the checkpoint has no `lm_head.weight`: the head is taken to be the embedding".into());
    }
    absent
}

/// Where a layer's names begin, in the weight table and in the checkpoint.
struct Names {
    table: String,
    checkpoint: String,
}

/// Binds weights to tensors, one after the other.
struct Binder<'a> {
    config: &'a ModelConfig,
    checkpoint: Option<&'a Checkpoint>,
    quant: &'a Quantise,
    weights: IndexMap<String, WeightDecl>,
    used: HashSet<String>,
    problems: Vec<Problem>,
    /// Weights that cannot keep the codes of their tensors.
    widened: Vec<String>,
}

impl Binder<'_> {
    fn globals(&mut self, tied: bool) {
        let c = self.config;
        self.matrix("embed", "model.embed_tokens.weight", &[c.vocab_size], &[c.hidden_size]);
        if !tied {
            self.matrix("head", "lm_head.weight", &[c.vocab_size], &[c.hidden_size]);
        }
        self.vector("final_norm", "model.norm.weight", c.hidden_size);
        let values = c.rope.inv_freq();
        let shape = vec![values.len() as u64];
        let decl = WeightDecl { shape, in_rank: 0, format: Format::F32, origin: Origin::Values(values) };
        self.weights.insert("inv_freq".into(), decl);
    }

    fn layer(&mut self, at: &Names, mixer: Mixer, ffn: Ffn) {
        let hidden = self.config.hidden_size;
        self.vector_at(at, "input_norm", "input_layernorm.weight", hidden);
        match mixer {
            Mixer::LinearAttention => self.delta(at),
            Mixer::FullAttention => self.attention(at),
        }
        self.vector_at(at, "post_norm", "post_attention_layernorm.weight", hidden);
        match ffn {
            Ffn::Moe => self.moe(at),
            Ffn::Dense => self.dense(at),
        }
    }

    fn delta(&mut self, at: &Names) {
        let c = self.config;
        let (keys, values) = (c.num_k_heads * c.head_k_dim, c.num_v_heads * c.head_v_dim);
        let hidden = [c.hidden_size];

        let [fused, qkv, gate] =
            ["qkvz", "qkv", "z"].map(|part| format!("{}linear_attn.in_proj_{part}.weight", at.checkpoint));
        let (rows::Qkvz { q, k, v, z }, format, z_format) = if self.has(&qkv) {
            let formats = [(&qkv, 2 * keys + values), (&gate, values)]
                .map(|(name, rows)| self.tensor(name, &[&[rows, c.hidden_size]]));
            (rows::qkv_z(c, &qkv, &gate), formats[0], formats[1])
        } else {
            let format = self.tensor(&fused, &[&[2 * keys + 2 * values, c.hidden_size]]);
            (rows::qkvz(c, &fused), format, format)
        };
        self.add_at(at, "w_q", &[c.num_k_heads, c.head_k_dim], &hidden, format, q);
        self.add_at(at, "w_k", &[c.num_k_heads, c.head_k_dim], &hidden, format, k);
        self.add_at(at, "w_v", &[c.num_v_heads, c.head_v_dim], &hidden, format, v);
        self.add_at(at, "w_z", &[c.num_v_heads, c.head_v_dim], &hidden, z_format, z);

        let fused = format!("{}linear_attn.in_proj_ba.weight", at.checkpoint);
        let format = self.tensor(&fused, &[&[2 * c.num_v_heads, c.hidden_size]]);
        let [b, a] = rows::ba(c, &fused);
        self.add_at(at, "w_b", &[c.num_v_heads], &hidden, format, b);
        self.add_at(at, "w_a", &[c.num_v_heads], &hidden, format, a);

        let conv = format!("{}linear_attn.conv1d.weight", at.checkpoint);
        let channels = 2 * keys + values;
        self.tensor(&conv, &[&[channels, 1, c.conv_taps], &[channels, c.conv_taps]]);
        // channels are not grouped: all of q, all of k, all of v
        let parts = [
            ("w_conv_q", c.num_k_heads, c.head_k_dim, 0),
            ("w_conv_k", c.num_k_heads, c.head_k_dim, keys),
            ("w_conv_v", c.num_v_heads, c.head_v_dim, 2 * keys),
        ];
        for (name, heads, width, first) in parts {
            let runs = vec![run(&conv, first, heads * width)];
            self.add_at(at, name, &[heads, width, c.conv_taps], &[], Format::F32, runs);
        }
        self.vector_at(at, "a_log", "linear_attn.A_log", c.num_v_heads);
        self.vector_at(at, "dt_bias", "linear_attn.dt_bias", c.num_v_heads);
        self.vector_at(at, "norm", "linear_attn.norm.weight", c.head_v_dim);
        self.matrix_at(at, "w_out", "linear_attn.out_proj.weight", &hidden, &[c.num_v_heads, c.head_v_dim]);
    }

    fn attention(&mut self, at: &Names) {
        let c = self.config;
        let hidden = [c.hidden_size];
        let fused = format!("{}self_attn.q_proj.weight", at.checkpoint);
        let format = self.tensor(&fused, &[&[2 * c.num_heads * c.head_dim, c.hidden_size]]);
        let [query, gate] = rows::query_gate(c, &fused);
        self.add_at(at, "w_q", &[c.num_heads, c.head_dim], &hidden, format, query);
        self.add_at(at, "w_gate", &[c.num_heads, c.head_dim], &hidden, format, gate);
        self.matrix_at(at, "w_k", "self_attn.k_proj.weight", &[c.num_kv_heads, c.head_dim], &hidden);
        self.matrix_at(at, "w_v", "self_attn.v_proj.weight", &[c.num_kv_heads, c.head_dim], &hidden);
        self.vector_at(at, "q_norm", "self_attn.q_norm.weight", c.head_dim);
        self.vector_at(at, "k_norm", "self_attn.k_norm.weight", c.head_dim);
        self.matrix_at(at, "w_o", "self_attn.o_proj.weight", &hidden, &[c.num_heads, c.head_dim]);
    }

    fn moe(&mut self, at: &Names) {
        let c = self.config;
        let (hidden, shared) = ([c.hidden_size], [c.shared_expert_intermediate_size]);
        self.matrix_at(at, "mlp.router", "mlp.gate.weight", &[c.num_experts], &hidden);
        self.experts(at);
        self.matrix_at(at, "mlp.shared_gate_proj", "mlp.shared_expert.gate_proj.weight", &shared, &hidden);
        self.matrix_at(at, "mlp.shared_up", "mlp.shared_expert.up_proj.weight", &shared, &hidden);
        self.matrix_at(at, "mlp.shared_down", "mlp.shared_expert.down_proj.weight", &hidden, &shared);
        self.matrix_at(at, "mlp.shared_gate", "mlp.shared_expert_gate.weight", &[1], &hidden);
    }

    /// Routed experts: one tensor an expert and projection, or stacked, gate and up in one or each by itself.
    fn experts(&mut self, at: &Names) {
        let c = self.config;
        let (experts, width, hidden) = (c.num_experts, c.moe_intermediate_size, c.hidden_size);
        let (inner, outer) = ([experts, width], [experts, hidden]);
        let gate_up = format!("{}mlp.experts.gate_up_proj", at.checkpoint);
        if self.has(&gate_up) {
            let format = self.tensor(&gate_up, &[&[experts, 2 * width, hidden]]);
            let part = |offset| rows::stacked(&gate_up, experts, 2 * width, offset, width);
            self.add_at(at, "mlp.experts_gate", &inner, &[hidden], format, part(0));
            self.add_at(at, "mlp.experts_up", &inner, &[hidden], format, part(width));
        } else {
            self.all_experts(at, "mlp.experts_gate", "gate_proj", &inner, hidden);
            self.all_experts(at, "mlp.experts_up", "up_proj", &inner, hidden);
        }
        self.all_experts(at, "mlp.experts_down", "down_proj", &outer, width);
    }

    /// One projection of all experts, from one tensor or from one each; `out_dims` are experts and rows.
    fn all_experts(&mut self, at: &Names, name: &str, projection: &str, out_dims: &[u64; 2], columns: u64) {
        let [experts, rows] = *out_dims;
        let stacked = format!("{}mlp.experts.{projection}", at.checkpoint);
        if self.stacks(&stacked) {
            let format = self.tensor(&stacked, &[&[experts, rows, columns]]);
            self.add_at(at, name, out_dims, &[columns], format, vec![run(&stacked, 0, experts * rows)]);
            return;
        }
        let (mut format, mut coded) = (None, false);
        let mut runs = Vec::with_capacity(experts as usize);
        for e in 0..experts {
            let tensor = format!("{}mlp.experts.{e}.{projection}.weight", at.checkpoint);
            let stored = self.tensor(&tensor, &[&[rows, columns]]);
            format = Some(format.map_or(stored, |f| if f == stored { f } else { Format::F32 }));
            coded |= stored.blocks().is_some();
            runs.push(RowRun { tensor, first: 0, rows, column: 0 });
        }
        if coded && format == Some(Format::F32) {
            self.widened.push(format!("{}{name}", at.table));
        }
        self.add_at(at, name, out_dims, &[columns], format.unwrap_or(self.config.format), runs);
    }

    fn dense(&mut self, at: &Names) {
        let (hidden, width) = ([self.config.hidden_size], [self.config.intermediate_size]);
        self.matrix_at(at, "mlp.w_gate", "mlp.gate_proj.weight", &width, &hidden);
        self.matrix_at(at, "mlp.w_up", "mlp.up_proj.weight", &width, &hidden);
        self.matrix_at(at, "mlp.w_down", "mlp.down_proj.weight", &hidden, &width);
    }

    fn mtp(&mut self, ffn: Ffn) {
        let hidden = self.config.hidden_size;
        // fc · concat(embedding, hidden) as the sum of its two column halves
        let fc = "mtp.fc.weight";
        let format = self.tensor(fc, &[&[hidden, 2 * hidden]]);
        for (name, column) in [("mtp.w_e", 0), ("mtp.w_h", hidden)] {
            let half = RowRun { column, ..run(fc, 0, hidden) };
            self.add(name.into(), &[hidden], &[hidden], format, vec![half]);
        }
        self.vector("mtp.norm_e", "mtp.pre_fc_norm_embedding.weight", hidden);
        self.vector("mtp.norm_h", "mtp.pre_fc_norm_hidden.weight", hidden);
        self.vector("mtp.norm", "mtp.norm.weight", hidden);
        let at = Names { table: "mtp.".into(), checkpoint: "mtp.layers.0.".into() };
        self.layer(&at, Mixer::FullAttention, ffn);
    }

    fn matrix_at(&mut self, at: &Names, name: &str, tensor: &str, out_dims: &[u64], in_dims: &[u64]) {
        self.matrix(&format!("{}{name}", at.table), &format!("{}{tensor}", at.checkpoint), out_dims, in_dims);
    }

    fn vector_at(&mut self, at: &Names, name: &str, tensor: &str, len: u64) {
        self.vector(&format!("{}{name}", at.table), &format!("{}{tensor}", at.checkpoint), len);
    }

    fn add_at(&mut self, at: &Names, name: &str, out: &[u64], inputs: &[u64], format: Format, runs: Vec<RowRun>) {
        self.add(format!("{}{name}", at.table), out, inputs, format, runs);
    }

    /// A whole tensor as a matrix.
    fn matrix(&mut self, name: &str, tensor: &str, out_dims: &[u64], in_dims: &[u64]) {
        let (rows, columns) = (out_dims.iter().product(), in_dims.iter().product());
        let format = self.tensor(tensor, &[&[rows, columns]]);
        self.add(name.into(), out_dims, in_dims, format, vec![run(tensor, 0, rows)]);
    }

    /// A whole tensor as a vector.
    fn vector(&mut self, name: &str, tensor: &str, len: u64) {
        self.tensor(tensor, &[&[len]]);
        self.add(name.into(), &[len], &[], Format::F32, vec![run(tensor, 0, len)]);
    }

    fn add(&mut self, name: String, out: &[u64], inputs: &[u64], stored: Format, runs: Vec<RowRun>) {
        let format = self.choose(&name, out, inputs, stored, &runs);
        let shape = [out, inputs].concat();
        let decl = WeightDecl { shape, in_rank: inputs.len(), format, origin: Origin::Rows(runs) };
        let before = self.weights.insert(name, decl);
        debug_assert!(before.is_none(), "a weight's name stands once");
    }

    /// The format of a weight whose tensors are stored as `stored`.
    fn choose(&mut self, name: &str, out: &[u64], inputs: &[u64], stored: Format, runs: &[RowRun]) -> Format {
        let asked = if inputs.is_empty() { None } else { self.quant.format(name) };
        match asked {
            Some(format) if format != stored => format,
            _ if stored.blocks().is_none() => stored,
            _ => keep::codes(stored, runs, out, inputs).unwrap_or_else(|| {
                self.widened.push(name.to_owned());
                Format::F32
            }),
        }
    }

    /// Says which weights take more memory than the checkpoint's.
    fn name_widened(&self) -> Option<String> {
        let first = self.widened.first()?;
        let count = self.widened.len();
        Some(format!(
            "{count} quantised weights are widened to f32, among them `{first}`: their scales' blocks do not fit their rows or columns, or differ from expert to expert"
        ))
    }

    fn has(&self, tensor: &str) -> bool {
        self.checkpoint.is_some_and(|c| c.has(tensor))
    }

    /// True if experts are in one tensor, or should be: in files that have no other form.
    fn stacks(&self, tensor: &str) -> bool {
        self.has(tensor) || matches!(self.checkpoint, Some(Checkpoint::Gguf(_)))
    }

    /// Checks that a tensor is there with one of `shapes`, and gives the format in which it is stored.
    fn tensor(&mut self, name: &str, shapes: &[&[u64]]) -> Format {
        let Some(checkpoint) = self.checkpoint else { return self.config.format };
        let (tensor, expected) =
            (checkpoint.own_name(name), || shapes.iter().map(|s| format!("{s:?}")).collect::<Vec<_>>().join(" or "));
        let Some(stored) = checkpoint.entry(name) else {
            self.problems.push(Problem::Missing { tensor, expected: expected() });
            return self.config.format;
        };
        self.used.insert(name.to_owned());
        if !shapes.contains(&stored.shape.as_slice()) {
            let problem = Problem::Shape { tensor: tensor.clone(), found: stored.shape.clone(), expected: expected() };
            self.problems.push(problem);
        }
        stored.format.unwrap_or_else(|| {
            let expected = checkpoint.read(stored.shape.len());
            self.problems.push(Problem::DType { tensor, found: stored.dtype.into(), expected });
            Format::F32
        })
    }

    /// Names what nothing has read: an error for MTP, where it would cost drafts without a sign, else a warning.
    fn check_unused(&mut self) -> Option<String> {
        const SHOWN: usize = 5;
        let checkpoint = self.checkpoint?;
        let unused = |n: &&str| !self.used.contains(*n) && !n.ends_with("rotary_emb.inv_freq");
        let (mtp, other): (Vec<&str>, Vec<&str>) =
            checkpoint.names().filter(unused).partition(|n| n.starts_with("mtp."));
        self.problems.extend(mtp.into_iter().map(|n| Problem::UnknownMtp { tensor: checkpoint.own_name(n) }));
        let listed: Vec<String> = other.iter().take(SHOWN).map(|n| format!("`{}`", checkpoint.own_name(n))).collect();
        let more = if other.len() > SHOWN { format!(" and {} more", other.len() - SHOWN) } else { String::new() };
        (!other.is_empty()).then(|| format!("tensors that nothing reads: {}{more}", listed.join(", ")))
    }
}
