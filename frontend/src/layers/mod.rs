//! The graph of a model: one function a mixer and FFN of each layer, and the entry functions that call them.
//!
//! Everything is in plain ops; the passes merge functions that are equal and fuse what stands in them. An entry function
//! holds nothing but parameters, weights, the sequences of the step and calls:
//!
//! - `@step(tokens, positions, cu_seqlens, slot, replay, tentative, page_table, logit_rows, states...) -> (logits, hidden, best, states...)`
//! - `@draft(the same eight, hidden, mtp.kv) -> (logits, hidden, best, mtp.kv)`, where there is an MTP module
//! - `@guess(the same, wanted, mtp.kv)`, which is `@draft` with the logits of the tokens that are wanted, where the vocabulary is large
//! - `@follow(the same eight, hidden, mtp.kv) -> (mtp.kv)`: what later drafts need of tokens after which nothing is drafted
//! - `@sample(logits, best, tokens, factors, choices, edit_tokens, edit_counts, edit_biases) -> (tokens)` after `@step`, whose `logits` and `best`
//!   it takes
//! - `@verify(the same, logit_rows, cu_seqlens) -> (tokens, accepted)`, where there is an MTP module

mod attention;
mod delta;
mod ends;
mod experts;
mod mlp;
mod mtp;
mod part;
mod sample;

use indexmap::IndexMap;
use nextc_ir::build::{BuildError, FunctionBuilder};
use nextc_ir::graph::{Function, ModelInfo, WeightDecl};
use nextc_ir::{Attrs, Dim, Module, Op, Shape, Stored, Sym, Type, Value};

use self::part::{Part, PartBuilder};
use crate::config::{Ffn, LayerKind, Mixer, ModelConfig};
use crate::weights::table::WeightTable;

type Weights = IndexMap<String, WeightDecl>;

/// Builds the module of a model whose KV is stored as `kv`.
/// # Errors
/// [`BuildError`] if an op refuses its operands, which a checked configuration does not lead to.
pub fn build_module(
    config: &ModelConfig,
    table: WeightTable,
    info: ModelInfo,
    kv: Stored,
) -> Result<Module, BuildError> {
    let weights = &table.weights;
    let head = if table.tied { "embed" } else { "head" };
    let mut parts = vec![ends::embed(weights)?];
    for (i, layer) in config.layers.iter().enumerate() {
        parts.extend(layer_parts((weights, config, kv), *layer, &i.to_string(), &format!("layers.{i}."))?);
    }
    parts.push(ends::head(weights, config, ("head", "final_norm", head), false)?);
    let mut functions = vec![step(&parts)?];
    let choose = sample::choose(weights, config)?;
    let accept = sample::accept(weights)?;
    if let Some(ffn) = table.mtp {
        let kind = LayerKind { mixer: Mixer::FullAttention, ffn };
        let mut draft_parts = vec![mtp::fuse(weights, config)?];
        draft_parts.extend(layer_parts((weights, config, kv), kind, "mtp", "mtp.")?);
        let front = draft_parts.clone();
        draft_parts.push(ends::head(weights, config, ("head.mtp", "mtp.norm", head), false)?);
        functions.push(draft("draft", &draft_parts, config, false)?);
        let followed = [front[0].clone(), attention::keys((weights, config, kv), "keys.mtp", "mtp.")?];
        functions.push(follow(&followed, config)?);
        let [_, keys] = followed;
        parts.push(keys);
        if config.vocab_size >= LARGE_VOCABULARY {
            let head = ends::head(weights, config, ("head.guess", "mtp.norm", head), true)?;
            functions.push(draft("guess", &[front, vec![head.clone()]].concat(), config, true)?);
            draft_parts.push(head);
        }
        parts.append(&mut draft_parts);
    }
    functions.push(sample::entry("sample", config.vocab_size, &choose, None));
    parts.push(choose);
    if table.mtp.is_some() {
        let choose = &parts[parts.len() - 1];
        functions.push(sample::entry("verify", config.vocab_size, choose, Some(&accept)));
        parts.push(accept);
    }
    let functions = parts.into_iter().map(|p| p.function).chain(functions).collect();
    Ok(Module { info, functions, weights: table.weights })
}

/// Smallest vocabulary of which a draft chooses from a part: most of its time goes into the head.
const LARGE_VOCABULARY: u64 = 4096;

/// The mixer and the FFN of a layer; `id` is what its functions' names end in.
fn layer_parts(
    (w, c, kv): (&Weights, &ModelConfig, Stored),
    kind: LayerKind,
    id: &str,
    prefix: &str,
) -> Result<[Part; 2], BuildError> {
    let mixer = match kind.mixer {
        Mixer::LinearAttention => delta::build(w, c, &format!("delta.{id}"), prefix)?,
        Mixer::FullAttention => attention::build((w, c, kv), &format!("attention.{id}"), prefix)?,
    };
    let ffn = match kind.ffn {
        Ffn::Moe => experts::build(w, c, &format!("moe.{id}"), prefix)?,
        Ffn::Dense => mlp::build(w, c, &format!("mlp.{id}"), prefix)?,
    };
    Ok([mixer, ffn])
}

/// The residual stream, and its sums of squares.
fn stream_types(c: &ModelConfig) -> [Type; 2] {
    let tensor = |width: u64| Type::f32(Shape::rows(Sym::T, &[width]));
    [tensor(c.hidden_size), tensor(c.hidden_size.div_ceil(16))]
}

/// The residual stream after a block: `x + y`, with its sums of squares.
fn add_residual(p: &mut PartBuilder<'_>, x: Value, y: Value) -> Result<[Value; 2], BuildError> {
    let x = p.op(Op::Add, &[x, y])?;
    Ok([x, p.op(Op::SumSquares, &[x])?])
}

fn eps(eps: f64) -> Attrs {
    Attrs::none().with("eps", eps)
}

/// An entry function that is begun.
struct Entry {
    f: FunctionBuilder,
    weights: IndexMap<String, Value>,
    states: IndexMap<String, Value>,
}

/// The inputs of a step.
struct StepInputs {
    tokens: Value,
    logit_rows: Value,
    wanted: Option<Value>,
    seqs: [Value; 6],
}

impl StepInputs {
    fn of(f: &mut FunctionBuilder) -> Self {
        let mut input = |name: &str, dims: Vec<Dim>| f.param(name, Type::i32(Shape(dims)));
        let tokens = input("tokens", vec![Sym::T.into()]);
        let seqs = [
            input("positions", vec![Sym::T.into()]),
            input("cu_seqlens", vec![Dim::SymPlus(Sym::B, 1)]),
            input("slot", vec![Sym::B.into()]),
            input("replay", vec![Sym::B.into()]),
            input("tentative", vec![Sym::B.into()]),
            input("page_table", vec![Sym::B.into(), Sym::P.into()]),
        ];
        let logit_rows = input("logit_rows", vec![Sym::R.into()]);
        Self { tokens, logit_rows, wanted: None, seqs }
    }
}

impl Entry {
    fn empty(name: &str) -> Self {
        Self { f: FunctionBuilder::new(name), weights: IndexMap::new(), states: IndexMap::new() }
    }

    /// Adds the states of `parts` as parameters.
    fn add_states(&mut self, parts: &[Part]) {
        for (name, ty) in parts.iter().flat_map(|p| &p.states) {
            let state = self.f.param(name, ty.clone());
            self.states.insert(name.clone(), state);
        }
    }

    /// Calls `part`: its inputs, its states in their newest versions, its weights. Gives its results without the states.
    fn call(&mut self, part: &Part, inputs: &[Value]) -> Vec<Value> {
        let mut args = inputs.to_vec();
        args.extend(part.states.iter().map(|(name, _)| self.states[name]));
        for (name, ty) in &part.weights {
            let f = &mut self.f;
            args.push(*self.weights.entry(name.clone()).or_insert_with(|| f.weight(name, ty.clone())));
        }
        let mut results = self.f.call(&part.function, &args);
        let states = results.split_off(results.len() - part.states.len());
        for ((name, _), state) in part.states.iter().zip(states) {
            self.states.insert(name.clone(), state);
        }
        results
    }

    /// Runs the layers between the first part, whose results are given, and the last one, the head.
    fn finish(
        mut self,
        inputs: &StepInputs,
        layers: &[Part],
        head: &Part,
        mut stream: Vec<Value>,
    ) -> Result<Function, BuildError> {
        let seqs = self.f.op(Op::Sequences, &inputs.seqs)?;
        for part in layers {
            let mut args = stream;
            if part.mixer {
                args.push(seqs);
            }
            stream = self.call(part, &args);
        }
        stream.push(inputs.logit_rows);
        stream.extend(inputs.wanted);
        let mut results = self.call(head, &stream);
        results.extend(self.states.values());
        Ok(self.f.finish(results))
    }
}

/// `@step`: `parts` are the embedding, the layers, and the head.
fn step(parts: &[Part]) -> Result<Function, BuildError> {
    let [embed, layers @ .., head] = parts else { unreachable!("a model has an embedding and a head") };
    let mut entry = Entry::empty("step");
    let inputs = StepInputs::of(&mut entry.f);
    entry.add_states(parts);
    let stream = entry.call(embed, &[inputs.tokens]);
    entry.finish(&inputs, layers, head, stream)
}

/// `@draft` or `@guess`: `parts` are the fusion of embedding and hidden row, the layer, and the head.
fn draft(name: &str, parts: &[Part], config: &ModelConfig, some: bool) -> Result<Function, BuildError> {
    let [_, layers @ .., head] = parts else { unreachable!("a draft begins with the fusion and ends with a head") };
    let (entry, inputs, stream) = fused(name, parts, config, some);
    entry.finish(&inputs, layers, head, stream)
}

/// `@follow`: `parts` are the fusion of embedding and hidden row, and the keys and values of the layer.
fn follow(parts: &[Part; 2], config: &ModelConfig) -> Result<Function, BuildError> {
    let (mut entry, inputs, mut stream) = fused("follow", parts, config, false);
    stream.push(entry.f.op(Op::Sequences, &inputs.seqs)?);
    entry.call(&parts[1], &stream);
    let results = entry.states.values().copied().collect();
    Ok(entry.f.finish(results))
}

/// An entry function that is fed hidden rows, begun with the first of `parts`, which gives its stream; `some`: with the tokens that are wanted.
fn fused(name: &str, parts: &[Part], config: &ModelConfig, some: bool) -> (Entry, StepInputs, Vec<Value>) {
    let mut entry = Entry::empty(name);
    let mut inputs = StepInputs::of(&mut entry.f);
    let hidden = entry.f.param("hidden", Type::f32(Shape::rows(Sym::T, &[config.hidden_size])));
    inputs.wanted = some.then(|| entry.f.param("wanted", ends::wanted_type(config)));
    entry.add_states(parts);
    let stream = entry.call(&parts[0], &[inputs.tokens, hidden]);
    (entry, inputs, stream)
}
