//! Layers as a frontend writes them, plain op by plain op, and a module of a whole model.
#![allow(dead_code, reason = "each test uses some of them")]

use nextc_ir::build::FunctionBuilder;
use nextc_ir::graph::{Function, ModelInfo, Module, Origin, Value, WeightDecl};
use nextc_ir::types::StateKind;
use nextc_ir::{Attrs, Dim, Format, Op, Shape, Sym, Type};

/// The sizes of a model.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub hidden: u64,
    pub vocab: u64,
    pub num_heads: u64,
    pub num_kv_heads: u64,
    pub head_dim: u64,
    pub frequencies: u64,
    pub num_k_heads: u64,
    pub num_v_heads: u64,
    pub head_k_dim: u64,
    pub head_v_dim: u64,
    pub taps: u64,
    pub experts: u64,
    pub top_k: u64,
    pub expert_width: u64,
    pub shared_width: u64,
    pub mlp_width: u64,
    pub layers: u64,
}

/// Qwen3-Next-80B-A3B.
pub const BIG: Sizes = Sizes {
    hidden: 2048,
    vocab: 151_936,
    num_heads: 16,
    num_kv_heads: 2,
    head_dim: 256,
    frequencies: 32,
    num_k_heads: 16,
    num_v_heads: 32,
    head_k_dim: 128,
    head_v_dim: 128,
    taps: 4,
    experts: 512,
    top_k: 10,
    expert_width: 512,
    shared_width: 512,
    mlp_width: 5120,
    layers: 48,
};

/// Small, and odd enough that padding shows.
pub const SMALL: Sizes = Sizes {
    hidden: 40,
    vocab: 50,
    num_heads: 4,
    num_kv_heads: 2,
    head_dim: 12,
    frequencies: 2,
    num_k_heads: 2,
    num_v_heads: 4,
    head_k_dim: 8,
    head_v_dim: 20,
    taps: 4,
    experts: 6,
    top_k: 2,
    expert_width: 24,
    shared_width: 10,
    mlp_width: 28,
    layers: 4,
};

pub fn rows(inner: &[u64]) -> Type {
    Type::f32(Shape::rows(Sym::T, inner))
}

/// A builder whose ops must fit.
pub struct Layer {
    b: FunctionBuilder,
    pub weights: Vec<(String, Type)>,
}

impl Layer {
    pub fn new(name: &str) -> Self {
        Self { b: FunctionBuilder::new(name), weights: Vec::new() }
    }

    pub fn param(&mut self, name: &str, ty: Type) -> Value {
        self.b.param(name, ty)
    }

    fn weight(&mut self, name: &str, shape: &[u64]) -> Value {
        self.b.param(name, Type::weight(shape, if shape.len() > 1 { Format::Bf16 } else { Format::F32 }))
    }

    pub fn op(&mut self, op: Op, operands: &[Value]) -> Value {
        self.n(op, operands, Attrs::none())[0]
    }

    fn with(&mut self, op: Op, operands: &[Value], name: &str, value: f64) -> Value {
        self.n(op, operands, Attrs::none().with(name, value))[0]
    }

    pub fn n(&mut self, op: Op, operands: &[Value], attrs: Attrs) -> Vec<Value> {
        self.b.op_n(op, operands, attrs).unwrap_or_else(|error| panic!("{error}"))
    }

    pub fn finish(self, results: Vec<Value>) -> Function {
        self.b.finish(results)
    }

    fn stream(&mut self, s: &Sizes) -> (Value, Value) {
        let x = self.param("x", rows(&[s.hidden]));
        (x, self.param("ssq", rows(&[s.hidden.div_ceil(16)])))
    }

    /// The normed input of a layer.
    fn normed(&mut self, s: &Sizes, x: Value, ssq: Value) -> Value {
        let gain = self.weight("gain", &[s.hidden]);
        self.with(Op::RmsNormSsq, &[x, ssq, gain], "eps", 1e-6)
    }

    fn linear(&mut self, x: Value, name: &str, shape: &[u64]) -> Value {
        let w = self.weight(name, shape);
        self.op(Op::Linear, &[x, w])
    }

    /// `x + y` and its sum of squares.
    fn residual(&mut self, x: Value, y: Value) -> [Value; 2] {
        let x = self.op(Op::Add, &[x, y]);
        [x, self.op(Op::SumSquares, &[x])]
    }
}

pub fn delta(name: &str, s: &Sizes) -> Function {
    let mut f = Layer::new(name);
    let (x, ssq) = f.stream(s);
    let seqs = f.param("seqs", Type::Sequences);
    let heads = [(s.num_k_heads, s.head_k_dim), (s.num_k_heads, s.head_k_dim), (s.num_v_heads, s.head_v_dim)];
    let conv: Vec<Value> = ["conv_q", "conv_k", "conv_v"]
        .iter()
        .zip(heads)
        .map(|(name, (heads, width))| f.param(name, Type::state(StateKind::Conv, &[heads, width, s.taps - 1])))
        .collect();
    let delta = f.param("delta", Type::state(StateKind::Delta, &[s.num_v_heads, s.head_k_dim, s.head_v_dim]));
    let h = f.normed(s, x, ssq);
    let mut projected = Vec::new();
    for (name, (heads, width)) in ["w_q", "w_k", "w_v", "w_z"].iter().zip([heads[0], heads[1], heads[2], heads[2]]) {
        projected.push(f.linear(h, name, &[heads, width, s.hidden]));
    }
    let b = f.linear(h, "w_b", &[s.num_v_heads, s.hidden]);
    let a = f.linear(h, "w_a", &[s.num_v_heads, s.hidden]);
    let mut states = Vec::new();
    let mut qkv = Vec::new();
    for (i, (heads, width)) in heads.into_iter().enumerate() {
        let w = f.weight(["w_conv_q", "w_conv_k", "w_conv_v"][i], &[heads, width, s.taps]);
        let out = f.n(Op::Conv1d, &[projected[i], w, conv[i], seqs], Attrs::none());
        qkv.push(f.op(Op::Silu, &[out[0]]));
        states.push(out[1]);
    }
    let q = f.with(Op::L2Norm, &[qkv[0]], "eps", 1e-6);
    let q = f.with(Op::Scale, &[q], "factor", (s.head_k_dim as f64).powf(-0.5));
    let k = f.with(Op::L2Norm, &[qkv[1]], "eps", 1e-6);
    let a_log = f.weight("a_log", &[s.num_v_heads]);
    let dt_bias = f.weight("dt_bias", &[s.num_v_heads]);
    let g = f.op(Op::DecayGate, &[a, a_log, dt_bias]);
    let beta = f.op(Op::Sigmoid, &[b]);
    let out = f.n(Op::DeltaRule, &[q, k, qkv[2], g, beta, delta, seqs], Attrs::none());
    states.push(out[1]);
    let norm = f.weight("norm", &[s.head_v_dim]);
    let o = f.with(Op::RmsNorm, &[out[0], norm], "eps", 1e-6);
    let z = f.op(Op::Silu, &[projected[3]]);
    let o = f.op(Op::Mul, &[o, z]);
    let y = f.linear(o, "w_out", &[s.hidden, s.num_v_heads, s.head_v_dim]);
    let [x, ssq] = f.residual(x, y);
    f.finish([vec![x, ssq], states].concat())
}

pub fn attention(name: &str, s: &Sizes) -> Function {
    let mut f = Layer::new(name);
    let (x, ssq) = f.stream(s);
    let seqs = f.param("seqs", Type::Sequences);
    let kv = f.param("kv", Type::state(StateKind::Kv, &[s.num_kv_heads, s.head_dim]));
    let h = f.normed(s, x, ssq);
    let q = f.linear(h, "w_q", &[s.num_heads, s.head_dim, s.hidden]);
    let gate = f.linear(h, "w_gate", &[s.num_heads, s.head_dim, s.hidden]);
    let k = f.linear(h, "w_k", &[s.num_kv_heads, s.head_dim, s.hidden]);
    let v = f.linear(h, "w_v", &[s.num_kv_heads, s.head_dim, s.hidden]);
    let inv_freq = f.weight("inv_freq", &[s.frequencies]);
    let rotated = [(q, "q_norm"), (k, "k_norm")].map(|(x, norm)| {
        let w = f.weight(norm, &[s.head_dim]);
        let x = f.with(Op::RmsNormPlusOne, &[x, w], "eps", 1e-6);
        f.with(Op::Rope, &[x, inv_freq, seqs], "factor", 1.0)
    });
    let kv = f.op(Op::AppendKv, &[rotated[1], v, kv, seqs]);
    let o = f.with(Op::Attention, &[rotated[0], kv, seqs], "scale", (s.head_dim as f64).powf(-0.5));
    let gate = f.op(Op::Sigmoid, &[gate]);
    let o = f.op(Op::Mul, &[o, gate]);
    let y = f.linear(o, "w_o", &[s.hidden, s.num_heads, s.head_dim]);
    let [x, ssq] = f.residual(x, y);
    f.finish(vec![x, ssq, kv])
}

pub fn moe(name: &str, s: &Sizes, renormalise: bool) -> Function {
    let mut f = Layer::new(name);
    let (x, ssq) = f.stream(s);
    let h = f.normed(s, x, ssq);
    let logits = f.linear(h, "router", &[s.experts, s.hidden]);
    let p = f.op(Op::Softmax, &[logits]);
    let top = f.n(Op::TopK, &[p], Attrs::none().with("k", s.top_k));
    let weights = if renormalise { f.op(Op::Renormalise, &[top[0]]) } else { top[0] };
    let dispatch = f.n(Op::Dispatch, &[top[1]], Attrs::none().with("experts", s.experts));
    let route = [top[1], dispatch[0], dispatch[1]];
    let expert = |f: &mut Layer, x: Value, name: &str, out: u64, width: u64| {
        let w = f.weight(name, &[s.experts, out, width]);
        f.op(Op::ExpertLinear, &[x, w, route[0], route[1], route[2]])
    };
    let g = expert(&mut f, h, "w_gate", s.expert_width, s.hidden);
    let u = expert(&mut f, h, "w_up", s.expert_width, s.hidden);
    let act = f.op(Op::Swiglu, &[g, u]);
    let y = expert(&mut f, act, "w_down", s.hidden, s.expert_width);
    let y = f.op(Op::Combine, &[y, weights, top[1]]);
    let g = f.linear(h, "s_gate", &[s.shared_width, s.hidden]);
    let u = f.linear(h, "s_up", &[s.shared_width, s.hidden]);
    let act = f.op(Op::Swiglu, &[g, u]);
    let shared = f.linear(act, "s_down", &[s.hidden, s.shared_width]);
    let gate = f.linear(h, "shared_gate", &[1, s.hidden]);
    let gate = f.op(Op::Sigmoid, &[gate]);
    let shared = f.op(Op::Mul, &[gate, shared]);
    let y = f.op(Op::Add, &[y, shared]);
    let results = f.residual(x, y);
    f.finish(results.to_vec())
}

pub fn mlp(name: &str, s: &Sizes) -> Function {
    let mut f = Layer::new(name);
    let (x, ssq) = f.stream(s);
    let h = f.normed(s, x, ssq);
    let g = f.linear(h, "w_gate", &[s.mlp_width, s.hidden]);
    let u = f.linear(h, "w_up", &[s.mlp_width, s.hidden]);
    let act = f.op(Op::Swiglu, &[g, u]);
    let y = f.linear(act, "w_down", &[s.hidden, s.mlp_width]);
    let results = f.residual(x, y);
    f.finish(results.to_vec())
}

pub fn embed(name: &str, s: &Sizes) -> Function {
    let mut f = Layer::new(name);
    let tokens = f.param("tokens", Type::i32(Shape::new([Sym::T])));
    let w = f.weight("embed", &[s.vocab, s.hidden]);
    let x = f.op(Op::Embed, &[tokens, w]);
    let ssq = f.op(Op::SumSquares, &[x]);
    f.finish(vec![x, ssq])
}

pub fn head(name: &str, s: &Sizes) -> Function {
    let mut f = Layer::new(name);
    let (x, ssq) = f.stream(s);
    let at = f.param("logit_rows", Type::i32(Shape::new([Sym::R])));
    let hidden = f.normed(s, x, ssq);
    let asked = f.op(Op::GatherRows, &[hidden, at]);
    let logits = f.linear(asked, "head", &[s.vocab, s.hidden]);
    f.finish(vec![logits, hidden])
}

pub fn fuse_mtp(name: &str, s: &Sizes) -> Function {
    let mut f = Layer::new(name);
    let tokens = f.param("tokens", Type::i32(Shape::new([Sym::T])));
    let hidden = f.param("hidden", rows(&[s.hidden]));
    let w = f.weight("embed", &[s.vocab, s.hidden]);
    let e = f.op(Op::Embed, &[tokens, w]);
    let sides = [(e, "norm_e", "w_e"), (hidden, "norm_h", "w_h")].map(|(x, norm, w)| {
        let gain = f.weight(norm, &[s.hidden]);
        let x = f.with(Op::RmsNormPlusOne, &[x, gain], "eps", 1e-6);
        f.linear(x, w, &[s.hidden, s.hidden])
    });
    let results = f.residual(sides[0], sides[1]);
    f.finish(results.to_vec())
}

/// A module with functions of its own for each layer, and entry points that call them.
pub fn model(s: &Sizes) -> Module {
    let mut m = ModelBuilder { module: Module::default(), sizes: *s };
    m.module.info = ModelInfo { name: "test".into(), mtp: true, ..ModelInfo::default() };
    m.step();
    m.draft();
    m.module
}

struct ModelBuilder {
    module: Module,
    sizes: Sizes,
}

struct Entry {
    b: FunctionBuilder,
    tokens: Value,
    rows: Value,
    seqs: Value,
}

impl Entry {
    fn new(name: &str) -> Self {
        let mut b = FunctionBuilder::new(name);
        let tokens = b.param("tokens", Type::i32(Shape::new([Sym::T])));
        let positions = b.param("positions", Type::i32(Shape::new([Sym::T])));
        let cu_seqlens = b.param("cu_seqlens", Type::i32(Shape(vec![Dim::SymPlus(Sym::B, 1)])));
        let slot = b.param("slot", Type::i32(Shape::new([Sym::B])));
        let page_table = b.param("page_table", Type::i32(Shape::new([Sym::B, Sym::P])));
        let rows = b.param("logit_rows", Type::i32(Shape::new([Sym::R])));
        let [replay, tentative] = ["replay", "tentative"].map(|n| b.param(n, Type::i32(Shape::new([Sym::B]))));
        let seqs = b
            .op(Op::Sequences, &[positions, cu_seqlens, slot, replay, tentative, page_table])
            .expect("these are sequences");
        Self { b, tokens, rows, seqs }
    }
}

impl ModelBuilder {
    /// Calls `callee`: values by parameter name come from `given`, states become parameters, weights entries of the table.
    fn call(&mut self, entry: &mut Entry, callee: Function, given: &[(&str, Value)], prefix: &str) -> Vec<Value> {
        let mut args = Vec::new();
        for &param in &callee.params {
            let node = callee.node(param);
            let name = node.name.clone().expect("parameters have names");
            let ty = node.types[0].clone();
            let value = given.iter().find(|(n, _)| *n == name).map(|g| g.1);
            args.push(value.unwrap_or_else(|| match &ty {
                Type::Weight(w) => {
                    let full = if name == "embed" { name } else { format!("{prefix}.{}.{name}", callee.name) };
                    let flat = w.shape.len() < 2 || full.contains("conv");
                    let in_rank = if flat {
                        0
                    } else if full.ends_with("w_out") || full.ends_with("w_o") {
                        2
                    } else {
                        1
                    };
                    let decl =
                        WeightDecl { shape: w.shape.clone(), in_rank, format: w.format, origin: Origin::Rows(vec![]) };
                    self.module.weights.entry(full.clone()).or_insert(decl);
                    entry.b.weight(&full, ty)
                }
                _ => entry.b.param(&format!("{prefix}.{name}"), ty),
            }));
        }
        let results = entry.b.call(&callee, &args);
        if self.module.function(&callee.name).is_none() {
            self.module.functions.push(callee);
        }
        results
    }

    fn layer(
        &mut self,
        entry: &mut Entry,
        stream: &mut [Value; 2],
        mixer: Function,
        ffn: Function,
        prefix: &str,
    ) -> Vec<Value> {
        let mut states = Vec::new();
        for function in [mixer, ffn] {
            let given = [("x", stream[0]), ("ssq", stream[1]), ("seqs", entry.seqs)];
            let out = self.call(entry, function, &given, prefix);
            *stream = [out[0], out[1]];
            states.extend(out.into_iter().skip(2));
        }
        states
    }

    fn step(&mut self) {
        let s = self.sizes;
        let mut entry = Entry::new("step");
        let tokens = entry.tokens;
        let out = self.call(&mut entry, embed("embed", &s), &[("tokens", tokens)], "embed");
        let mut stream = [out[0], out[1]];
        let mut states = Vec::new();
        for i in 0..s.layers {
            let mixer =
                if i % 4 == 3 { attention(&format!("attention.{i}"), &s) } else { delta(&format!("delta.{i}"), &s) };
            let ffn = moe(&format!("moe.{i}"), &s, true);
            states.extend(self.layer(&mut entry, &mut stream, mixer, ffn, &format!("layers.{i}")));
        }
        self.finish(entry, stream, states, "head");
    }

    fn draft(&mut self) {
        let s = self.sizes;
        let mut entry = Entry::new("draft");
        let tokens = entry.tokens;
        let hidden = entry.b.param("hidden", rows(&[s.hidden]));
        let given = [("tokens", tokens), ("hidden", hidden)];
        let out = self.call(&mut entry, fuse_mtp("fuse.mtp", &s), &given, "mtp");
        let mut stream = [out[0], out[1]];
        let (mixer, ffn) = (attention("attention.mtp", &s), moe("moe.mtp", &s, true));
        let states = self.layer(&mut entry, &mut stream, mixer, ffn, "mtp");
        self.finish(entry, stream, states, "head.mtp");
    }

    fn finish(&mut self, mut entry: Entry, stream: [Value; 2], states: Vec<Value>, name: &str) {
        let s = self.sizes;
        let given = [("x", stream[0]), ("ssq", stream[1]), ("logit_rows", entry.rows)];
        let out = self.call(&mut entry, head(name, &s), &given, name);
        let function = entry.b.finish([out, states].concat());
        self.module.functions.push(function);
    }
}
