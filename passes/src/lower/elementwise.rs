//! `elementwise`: rows in, rows out: embedding rows, gathered rows, sums and norms of a row, and chains of elementwise ops.
//!
//! task     one row, by one thread or a block of them
//! traffic  each operand and result once: bound by memory

use std::collections::HashMap;

use nextc_ir::graph::{NodeId, Value};
use nextc_ir::kernel::{KernelBuilder, Pred, Val};
use nextc_ir::schedule::Extent;
use nextc_ir::shape::{LANES, pad, padded_elems};
use nextc_ir::{DType, Op, Type};

use super::LowerError;
use super::delta_rule::dot_rows;
use super::gpu;
use super::matmul::{mean_rsqrt, rms_scale, row_ptr, zero_padding};
use super::packed::{Lanes, Matrix};
use super::ports::{Lowered, Port, Ports, Site, describe};

/// `embed`: one row of the packed matrix, which lies in one lane of a tile.
pub fn lower_embed(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let matrix = Matrix::of(site, site.named("w"), 1);
    let planes = matrix.planes;
    let blocks = planes.format.blocks();
    if blocks.is_some_and(|b| b.ordered) {
        return Err(site.error("an embedding whose columns are in an order of their own"));
    }
    let (tokens, w) = (ports.read("tokens", site.named("tokens")), ports.read("w", site.named("w")));
    let out = ports.write("out", site.result(0));
    let mut k = ports.builder(site, Extent::from(site.rows(site.result(0))?));
    let t = k.task();
    let (tokens, w, out) = (k.param(tokens), k.param(w), k.param(out));
    let token = token_row(&mut k, tokens, t);
    let (tile, lane) = (k.div_const(token, LANES), Lanes::One(k.rem_const(token, LANES)));
    let tile = matrix.tile(&mut k, w, tile);
    let out = row_ptr(&mut k, out, t, planes.columns);
    let (step, per_word) = (blocks.map_or(planes.columns, |b| u64::from(b.columns)), planes.format.group_columns());
    let end = k.index(planes.columns);
    k.for_range(planes.columns, step, |k, first| {
        let block = k.div_const(first, step);
        let block = tile.block(k, block, lane);
        let last = k.add_const(first, step);
        let last = k.min_i64(last, end);
        k.for_each((first, last, per_word), |k, column| {
            for (i, code) in (0..).zip(tile.codes(k, column, lane)) {
                let x = block.number(k, code);
                let at = k.add_const(column, i);
                k.store(out, at, x);
            }
        });
    });
    Ok(ports.finish(k.finish()))
}

/// The row of token `t`: the first for -1, a draft that there is none of.
pub fn token_row(k: &mut KernelBuilder, tokens: Val, t: Val) -> Val {
    let (token, first) = (k.load_index(tokens, t), k.index(0));
    let none = k.cmp(Pred::Lt, token, first);
    k.select(none, first, token)
}

/// `gather_rows`.
pub fn lower_gather_rows(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let stride = site.stride(site.named("x"));
    let (x, rows) = (ports.read("x", site.named("x")), ports.read("rows", site.named("rows")));
    let out = ports.write("out", site.result(0));
    let mut k = ports.builder(site, Extent::from(site.rows(site.result(0))?));
    if site.target.gpu.is_some() {
        gpu::rows::begin_row(&mut k);
    }
    let (r, x, rows, out) = (k.task(), k.param(x), k.param(rows), k.param(out));
    let row = k.load_index(rows, r);
    let (from, to) = (row_ptr(&mut k, x, row, stride), row_ptr(&mut k, out, r, stride));
    let copy = |k: &mut KernelBuilder, c: Val| {
        let v = k.load(DType::F32, lanes(site), from, c);
        k.store(to, c, v);
    };
    match site.target.gpu {
        None => k.for_range(stride, LANES, copy),
        Some(_) => gpu::rows::each_four(&mut k, stride, copy),
    }
    Ok(ports.finish(k.finish()))
}

/// `sum_squares`: the sum of squares of each 16 neighbours.
pub fn lower_sum_squares(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let (x, stride) = (site.named("x"), site.stride(site.named("x")));
    let parts = site.inner(site.result(0)).last().copied().ok_or_else(|| site.error("a row of unknown width"))?;
    let x = ports.read("x", x);
    let out = ports.write("out", site.result(0));
    let mut k = ports.builder(site, Extent::from(site.rows(site.result(0))?));
    let t = k.task();
    let (x, out) = (k.param(x), k.param(out));
    let (x, out) = (row_ptr(&mut k, x, t, stride), row_ptr(&mut k, out, t, pad(parts)));
    k.for_range(parts, 1, |k, i| {
        let at = k.mul_const(i, LANES);
        let v = k.load_f32x16(x, at);
        let square = k.fmul(v, v);
        let sum = k.reduce_add(square);
        k.store(out, i, sum);
    });
    zero_padding(&mut k, out, parts);
    Ok(ports.finish(k.finish()))
}

/// `rms_norm` and `rms_norm_plus_one` over the innermost dimension.
pub fn lower_rms_norm(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let (x, w, eps) = (site.named("x"), site.named("w"), site.float("eps"));
    let inner = site.inner(x);
    let (heads, width) = (inner[..inner.len() - 1].iter().product::<u64>(), inner[inner.len() - 1]);
    let plus_one = site.op() == Op::RmsNormPlusOne;
    let (x, w, out) = (ports.read("x", x), ports.read("w", w), ports.write("out", site.result(0)));
    let mut k = ports.builder(site, Extent::from(site.rows(site.result(0))?) * heads.into());
    let task = k.task();
    let (x, w, out) = (k.param(x), k.param(w), k.param(out));
    let (x, out) = (row_ptr(&mut k, x, task, pad(width)), row_ptr(&mut k, out, task, pad(width)));
    let sum = dot_rows(&mut k, x, x, pad(width));
    let scale = mean_rsqrt(&mut k, sum, width, eps);
    let scale = k.splat(scale, 16);
    let one = k.splat_f32(16, 1.0);
    k.for_range(pad(width), LANES, |k, c| {
        let (v, g) = (k.load_f32x16(x, c), k.load_f32x16(w, c));
        let g = if plus_one { k.fadd(g, one) } else { g };
        let v = k.fmul(v, scale);
        let v = k.fmul(v, g);
        k.store(out, c, v);
    });
    Ok(ports.finish(k.finish()))
}

/// Elements of a vector.
const fn lanes(site: &Site<'_>) -> u32 {
    if site.target.gpu.is_some() { 4 } else { LANES as u32 }
}

/// How an operand's elements meet the result's.
#[derive(Clone, Copy, PartialEq)]
enum Reach {
    /// Element by element.
    All,
    /// The innermost dimension again and again: a gain.
    Inner,
    /// One number for each run of the innermost dimension.
    Outer,
    /// One number a row.
    Row,
}

/// A group of elementwise ops over rows of one shape.
struct Chain<'a> {
    site: Site<'a>,
    nodes: &'a [NodeId],
    inner: Vec<u64>,
    ports: Ports,
    inputs: HashMap<Value, Port>,
}

/// A connected group of elementwise ops as one kernel.
pub fn lower_chain(site: &Site<'_>, nodes: &[NodeId]) -> Result<Lowered, LowerError> {
    let result = site.result(0);
    let mut chain =
        Chain { site: *site, nodes, inner: site.inner(result), ports: Ports::default(), inputs: HashMap::new() };
    let sym = site.rows(result)?;
    chain.declare_inputs();
    let outs = chain.declare_outputs();
    let mut k = chain.ports.builder(site, Extent::from(sym));
    if site.target.gpu.is_some() {
        gpu::rows::begin_row(&mut k);
    }
    chain.emit(&mut k, &outs)?;
    let kernel = k.finish();
    Ok(chain.ports.finish(kernel))
}

impl Chain<'_> {
    fn declare_inputs(&mut self) {
        for &node in self.nodes {
            for v in self.site.function.operands(node) {
                if !self.nodes.contains(&v.node) && !self.inputs.contains_key(&v) {
                    let name = format!("in{}", self.inputs.len());
                    let port = self.ports.read(&name, v);
                    self.inputs.insert(v, port);
                }
            }
        }
    }

    /// Values that somebody outside the group reads, or that the function returns.
    fn declare_outputs(&mut self) -> Vec<(NodeId, Port)> {
        let f = self.site.function;
        let mut outs = Vec::new();
        for &node in self.nodes {
            let value = Value { node, result: 0 };
            let used = f.users(node).iter().any(|(user, _)| !self.nodes.contains(user));
            if used || f.results.contains(&value) {
                outs.push((node, self.ports.write(&format!("out{}", outs.len()), value)));
            }
        }
        outs
    }

    fn emit(&self, k: &mut KernelBuilder, outs: &[(NodeId, Port)]) -> Result<(), LowerError> {
        let row = k.task();
        let stride = padded_elems(&self.inner);
        let scales = self.row_scales(k, row);
        let last = pad(*self.inner.last().unwrap_or(&1));
        let mut failure = None;
        let vector = |k: &mut KernelBuilder, outer: Val, c: Val| {
            let mut values = HashMap::new();
            for &node in self.nodes {
                match self.value(k, (row, outer, c), node, &values, &scales) {
                    Ok(v) => values.insert(node, v),
                    Err(e) => return failure = Some(e),
                };
            }
            for &(node, port) in outs {
                let base = k.param(port);
                let base = row_ptr(k, base, row, stride);
                let base = row_ptr(k, base, outer, last);
                k.store(base, c, values[&node]);
            }
        };
        self.each_vector(k, stride, last, vector);
        failure.map_or(Ok(()), Err)
    }

    /// Runs `body(outer, column)` for every vector of a row: in order, or shared by the threads of a block.
    fn each_vector(
        &self,
        k: &mut KernelBuilder,
        stride: u64,
        last: u64,
        mut body: impl FnMut(&mut KernelBuilder, Val, Val),
    ) {
        match self.site.target.gpu {
            None => k.for_range(stride / last, 1, |k, outer| k.for_range(last, LANES, |k, c| body(k, outer, c))),
            Some(_) => gpu::rows::each_four(k, stride, |k, at| {
                let (outer, c) = (k.div_const(at, last), k.rem_const(at, last));
                body(k, outer, c);
            }),
        }
    }

    fn vector(&self, k: &mut KernelBuilder, base: Val, column: Val) -> Val {
        k.load(DType::F32, lanes(&self.site), base, column)
    }

    /// `rms_scale` of each `rms_norm_ssq` in the group, once a row.
    fn row_scales(&self, k: &mut KernelBuilder, row: Val) -> HashMap<NodeId, Val> {
        let norms = self.nodes.iter().filter(|&&n| self.site.function.node(n).op == Op::RmsNormSsq);
        norms
            .map(|&node| {
                let operands = self.site.function.operands(node);
                let width = *self.inner.last().expect("a norm has a width");
                let ssq = k.param(self.inputs[&operands[1]]);
                let ssq = row_ptr(k, ssq, row, pad(width.div_ceil(LANES)));
                let eps = self.site.function.node(node).attrs.float("eps").expect("verified") as f32;
                let scale = rms_scale(k, ssq, width, eps);
                (node, k.splat(scale, lanes(&self.site)))
            })
            .collect()
    }

    fn value(
        &self,
        k: &mut KernelBuilder,
        at: (Val, Val, Val),
        node: NodeId,
        done: &HashMap<NodeId, Val>,
        scales: &HashMap<NodeId, Val>,
    ) -> Result<Val, LowerError> {
        let operands = self.site.function.operands(node);
        let n = self.site.function.node(node);
        let mut x = Vec::new();
        for (i, &v) in operands.iter().enumerate() {
            if n.op == Op::RmsNormSsq && i == 1 {
                continue;
            }
            x.push(match done.get(&v.node) {
                Some(&ready) => ready,
                None => self.load(k, at, v)?,
            });
        }
        Ok(match n.op {
            Op::Add => k.fadd(x[0], x[1]),
            Op::Mul => k.fmul(x[0], x[1]),
            Op::Neg => k.fneg(x[0]),
            Op::Exp => k.exp(x[0]),
            Op::Sigmoid => k.sigmoid(x[0]),
            Op::Silu => k.silu(x[0]),
            Op::Softplus => k.softplus(x[0]),
            Op::Scale => {
                let factor = k.splat_f32(lanes(&self.site), n.attrs.float("factor").expect("verified") as f32);
                k.fmul(x[0], factor)
            }
            Op::PlusOne => {
                let one = k.splat_f32(lanes(&self.site), 1.0);
                k.fadd(x[0], one)
            }
            Op::Swiglu => {
                let gate = k.silu(x[0]);
                k.fmul(gate, x[1])
            }
            Op::DecayGate => {
                let shifted = k.fadd(x[0], x[2]);
                let dt = k.softplus(shifted);
                let rate = k.exp(x[1]);
                let product = k.fmul(rate, dt);
                k.fneg(product)
            }
            Op::RmsNormSsq => {
                let one = k.splat_f32(lanes(&self.site), 1.0);
                let gain = k.fadd(x[1], one);
                let scaled = k.fmul(x[0], scales[&node]);
                k.fmul(scaled, gain)
            }
            op => return Err(self.site.error(format!("`{op}` in a group of elementwise ops"))),
        })
    }

    fn load(&self, k: &mut KernelBuilder, (row, outer, c): (Val, Val, Val), v: Value) -> Result<Val, LowerError> {
        let base = k.param(self.inputs[&v]);
        let (dims, base) = match self.site.function.ty(v) {
            Type::Tensor(_) => {
                let dims = self.site.inner(v);
                let base = row_ptr(k, base, row, padded_elems(&dims));
                (dims, base)
            }
            Type::Weight(w) => (w.shape.clone(), base),
            _ => return Err(self.unreachable(v)),
        };
        let zero = k.const_i64(0);
        match self.reach(&dims).ok_or_else(|| self.unreachable(v))? {
            Reach::All => {
                let base = row_ptr(k, base, outer, pad(*self.inner.last().unwrap_or(&1)));
                Ok(self.vector(k, base, c))
            }
            Reach::Inner => Ok(self.vector(k, base, c)),
            Reach::Outer => {
                let base = row_ptr(k, base, outer, LANES);
                let x = k.load_f32(base, zero);
                Ok(k.splat(x, lanes(&self.site)))
            }
            Reach::Row => {
                let x = k.load_f32(base, zero);
                Ok(k.splat(x, lanes(&self.site)))
            }
        }
    }

    fn reach(&self, dims: &[u64]) -> Option<Reach> {
        let (last, outer) = self.inner.split_last()?;
        if dims == self.inner {
            return Some(Reach::All);
        }
        let (d_last, d_outer) = dims.split_last()?;
        match () {
            () if d_outer.is_empty() && d_last == last => Some(Reach::Inner),
            () if d_outer == outer && *d_last == 1 => Some(Reach::Outer),
            () if dims.iter().all(|&d| d == 1) => Some(Reach::Row),
            () => None,
        }
    }

    fn unreachable(&self, v: Value) -> LowerError {
        let ty = describe(self.site.function, v);
        self.site.error(format!("an operand {ty} against rows of {:?}", self.inner))
    }
}

/// `rms_scale`: one number a row.
pub fn lower_rms_scale(site: &Site<'_>) -> Result<Lowered, LowerError> {
    let mut ports = Ports::default();
    let (width, eps, stride) = (site.int("width"), site.float("eps"), site.stride(site.named("ssq")));
    let (ssq, out) = (ports.read("ssq", site.named("ssq")), ports.write("out", site.result(0)));
    let mut k = ports.builder(site, Extent::from(site.rows(site.result(0))?));
    let t = k.task();
    let (ssq, out) = (k.param(ssq), k.param(out));
    let (ssq, out) = (row_ptr(&mut k, ssq, t, stride), row_ptr(&mut k, out, t, LANES));
    let scale = rms_scale(&mut k, ssq, width, eps);
    let (lanes, zero) = (k.splat(scale, 16), k.const_i64(0));
    k.store(out, zero, lanes);
    Ok(ports.finish(k.finish()))
}
