//! Random functions of plain ops over one stream of rows.

use nextc_ir::build::FunctionBuilder;
use nextc_ir::graph::{Function, Value};
use nextc_ir::{Attrs, Format, Op, Shape, Sym, Type};

use crate::samples::Rng;

/// Width of the rows.
const WIDTH: u64 = 20;

/// Ops of one operand; those of two take another value of the same rows.
const UNARY: &[Op] = &[Op::Neg, Op::Sigmoid, Op::Silu, Op::Softmax, Op::SumSquares];

struct Graph<'a> {
    b: FunctionBuilder,
    rng: &'a mut Rng,
    /// Tensors `[T, WIDTH]` and `[R, WIDTH]`.
    values: Vec<Value>,
    made: Vec<Value>,
}

/// A function of about `ops` ops.
pub fn function(ops: usize, rng: &mut Rng) -> Function {
    let mut b = FunctionBuilder::new("random");
    let wide = |dim| Type::f32(Shape::rows(dim, &[WIDTH]));
    let values = vec![b.param("x", wide(Sym::T)), b.param("y", wide(Sym::T))];
    let rows = b.param("rows", Type::i32(Shape::new([Sym::R])));
    let gain = b.param("gain", Type::weight(&[WIDTH], Format::F32));
    let w = b.param("w", Type::weight(&[WIDTH, WIDTH], Format::F32));
    let mut graph = Graph { b, rng, values, made: Vec::new() };
    for _ in 0..ops {
        graph.grow(rows, gain, w);
    }
    let mut results = vec![graph.made[graph.made.len() - 1]];
    for i in 0..graph.made.len() - 1 {
        if graph.rng.range(0, 4) == 0 {
            results.push(graph.made[i]);
        }
    }
    graph.b.finish(results)
}

impl Graph<'_> {
    fn grow(&mut self, rows: Value, gain: Value, w: Value) {
        let x = *self.rng.pick(&self.values);
        let ty = self.b.ty(x).clone();
        let alike: Vec<Value> = self.values.iter().copied().filter(|&v| *self.b.ty(v) == ty).collect();
        let y = *self.rng.pick(&alike);
        let is_tokens = ty == *self.b.ty(self.values[0]);
        let eps = Attrs::none().with("eps", 0.01);
        let (op, operands, attrs) = match self.rng.range(0, 9) {
            0 | 1 => (Op::Add, vec![x, y], Attrs::none()),
            2 => (Op::Mul, vec![x, y], Attrs::none()),
            3 => (Op::Swiglu, vec![x, y], Attrs::none()),
            4 => (Op::Linear, vec![x, w], Attrs::none()),
            5 => (Op::RmsNormPlusOne, vec![x, gain], eps),
            6 if is_tokens => (Op::GatherRows, vec![x, rows], Attrs::none()),
            _ => (*self.rng.pick(UNARY), vec![x], Attrs::none()),
        };
        let out = self.b.op_with(op, &operands, attrs).expect("the op fits");
        self.made.push(out);
        if self.b.ty(out).shape().and_then(|s| s.last()) == Some(WIDTH) {
            self.values.push(out);
        }
    }
}
