//! Each lowered kernel, run in the kernel interpreter, against its op's meaning in the graph interpreter: sizes that divide
//! the tile and sizes that do not, one token and many, sequences that begin and sequences that go on.

use nextc_ir::build::FunctionBuilder;
use nextc_ir::eval::{Cx, Datum, Sequences, State, WeightStore, evaluate};
use nextc_ir::graph::{Function, NodeId, Value};
use nextc_ir::kernel::eval::{Buffer, Options, Place, run};
use nextc_ir::kernel::verify::verify_kernel;
use nextc_ir::layout::{padded_index, tile_offset_bytes, tile_shape};
use nextc_ir::op::Class;
use nextc_ir::schedule::Input;
use nextc_ir::shape::{Shape, Sym, pad, padded_elems};
use nextc_ir::types::{StateKind, StateType, TENTATIVE_TOKENS};
use nextc_ir::{Attrs, DType, Format, Op, Target, Type};
use nextc_passes::lower::{lower_group, ports::Bind};

const PAGE_TOKENS: usize = 64;

/// A small generator: xorshift, uniform in -1..1.
struct Random(u64);

impl Random {
    fn many(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.one()).collect()
    }

    fn one(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// The sequences of a step as (first position, tokens, slot), and the rows that are gathered.
struct Step {
    runs: Vec<(i32, usize, i32)>,
    /// Replayed tokens of each sequence, and whether it is tentative.
    kept: Vec<(i32, i32)>,
    rows: Vec<i32>,
}

impl Step {
    fn tokens(&self) -> usize {
        self.runs.iter().map(|r| r.1).sum()
    }

    fn input(&self, input: Input) -> Vec<i32> {
        match input {
            Input::Positions => self.runs.iter().flat_map(|&(first, n, _)| first..first + n as i32).collect(),
            Input::CuSeqlens => self.runs.iter().fold(vec![0], |mut ends, r| {
                ends.push(ends[ends.len() - 1] + r.1 as i32);
                ends
            }),
            Input::Slot => self.runs.iter().map(|r| r.2).collect(),
            Input::Replay => self.kept.iter().map(|r| r.0).collect(),
            Input::Tentative => self.kept.iter().map(|r| r.1).collect(),
            Input::PageTable => (0..self.page_count() as i32).rev().collect(),
            Input::LogitRows => self.rows.clone(),
            Input::Tokens | Input::Hidden => unreachable!("operands of their own"),
        }
    }

    /// Pages of one sequence.
    fn pages(&self) -> usize {
        self.runs.iter().map(|r| (r.0 as usize + r.1).div_ceil(PAGE_TOKENS)).max().unwrap_or(1)
    }

    fn page_count(&self) -> usize {
        self.pages() * self.runs.len()
    }

    /// Pages or slots that a state has.
    fn units(&self, kind: StateKind) -> usize {
        if kind == StateKind::Kv { self.page_count() } else { self.runs.len() }
    }

    fn syms(&self) -> [u64; 4] {
        [self.tokens(), self.runs.len(), self.pages(), self.rows.len()].map(|n| n as u64)
    }

    fn sequences(&self) -> Datum<f32> {
        let array = |input, dims: &[usize]| {
            Datum::<f32>::ints(dims, self.input(input)).expect("the size fits").int().expect("integers").clone()
        };
        let (t, b) = (self.tokens(), self.runs.len());
        let sequences = Sequences::new(
            &array(Input::Positions, &[t]),
            &array(Input::CuSeqlens, &[b + 1]),
            &array(Input::Slot, &[b]),
            &array(Input::PageTable, &[b, self.pages()]),
        );
        let kept = [Input::Replay, Input::Tentative].map(|input| array(input, &[b]));
        let sequences = sequences.and_then(|s| s.with_tentative(&kept[0], &kept[1]));
        Datum::Sequences(sequences.expect("consistent sequences").into())
    }
}

/// Steps of one token, of a run that does not fill a block, and of several sequences: fresh, going on, and padding.
fn steps() -> Vec<Step> {
    let several = [(0, 5, 1), (63, 3, 2), (9, 2, -1), (130, 1, 0)];
    let (plain, kept) = (vec![(0, 0); 4], vec![(0, 1), (2, 1), (1, 0), (3, 0)]);
    let steps = [
        (vec![(0, 1, 0)], plain[..1].to_vec()),
        (vec![(70, 1, 0)], vec![(4, 1)]),
        (vec![(0, 19, 0)], plain[..1].to_vec()),
        (several.to_vec(), plain),
        (several.to_vec(), kept),
    ];
    steps.map(|(runs, kept)| Step { runs, kept, rows: vec![0] }).into()
}

/// A parameter of a case: its name, its type, and how many innermost dimensions of a weight are inputs.
type Spec = (&'static str, Type, usize);

/// A function of one op on parameters.
struct Case {
    function: Function,
    node: NodeId,
    in_ranks: Vec<usize>,
}

fn case(op: Op, specs: &[Spec], attrs: Attrs) -> Case {
    let mut b = FunctionBuilder::new("test");
    let mut values: Vec<Value> = specs.iter().map(|(name, ty, _)| b.param(name, ty.clone())).collect();
    if op.def().operands.last() == Some(&"ws") {
        let first = specs.iter().position(|s| s.2 > 0).expect("a matrix");
        let items = values.split_off(first);
        values.push(b.op(Op::Bundle, &items).expect("a bundle"));
    }
    let results = b.op_n(op, &values, attrs).expect("the operands fit");
    let node = results[0].node;
    Case { function: b.finish(results), node, in_ranks: specs.iter().map(|s| s.2).collect() }
}

fn rows(inner: &[u64]) -> Type {
    Type::f32(Shape::rows(Sym::T, inner))
}

fn flat(shape: &[u64]) -> Type {
    Type::weight(shape, Format::F32)
}

fn bf16(shape: &[u64]) -> Type {
    Type::weight(shape, Format::Bf16)
}

/// Words of rows over `dims`, each row padded.
fn pad_words(dims: &[u64], words: &[u32]) -> Vec<u32> {
    let (elems, stride) = (dims.iter().product::<u64>().max(1), padded_elems(dims));
    let mut out = vec![0; (words.len() as u64 / elems * stride) as usize];
    for (i, &w) in (0u64..).zip(words) {
        out[(i / elems * stride + padded_index(dims, i % elems)) as usize] = w;
    }
    out
}

fn words(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn from_words(words: &[u32]) -> Buffer {
    Buffer::from_bytes(&words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>())
}

/// A weight as the packer lays it out.
fn pack(shape: &[u64], in_rank: usize, format: Format, values: &[f32]) -> Buffer {
    if let (0, &[heads, width, taps]) = (in_rank, shape) {
        let at = |i: u64| values[((i % (heads * width)) * taps + i / (heads * width)) as usize];
        let tap_major: Vec<f32> = (0..heads * width * taps).map(at).collect();
        return from_words(&pad_words(&[width], &words(&tap_major)));
    }
    if in_rank == 0 {
        return from_words(&pad_words(&shape[shape.len() - 1..], &words(values)));
    }
    let (out_dims, in_dims) = shape.split_at(shape.len() - in_rank);
    let tiles = tile_shape(out_dims, in_dims, format);
    let columns: u64 = in_dims.iter().product();
    let mut bytes = vec![0; (tiles.tiles * tiles.tile_bytes) as usize];
    for (i, &x) in (0u64..).zip(values) {
        let (row, column) = (padded_index(out_dims, i / columns), padded_index(in_dims, i % columns));
        let at = (row / 16 * tiles.tile_bytes + tile_offset_bytes(format, row % 16, column)) as usize;
        (format.def().encode)(x, &mut bytes[at..at + format.def().dtype.bytes() as usize]);
    }
    Buffer::from_bytes(&bytes)
}

/// Where element `i` of a unit of the graph interpreter's state lies in a unit in memory.
fn place(ty: &StateType, i: u64) -> u64 {
    let d = &ty.dims;
    match ty.kind {
        StateKind::Kv | StateKind::Conv => i / d[1] * pad(d[1]) + i % d[1],
        StateKind::Delta => {
            let (matrix, update) = (d[1] * d[2], d[1] + d[2] + 1);
            let (head, i) = (i / (matrix + TENTATIVE_TOKENS * update), i % (matrix + TENTATIVE_TOKENS * update));
            head * ty.delta_head_elems()
                + match i.checked_sub(matrix) {
                    None => padded_index(&d[1..], i),
                    Some(i) => d[1] * pad(d[2]) + i / update * ty.delta_update_elems() + within_update(d, i % update),
                }
        }
    }
}

/// Where element `i` of a kept update lies: `k`, `d` and the decay are padded.
fn within_update(d: &[u64], i: u64) -> u64 {
    match i.checked_sub(d[1]) {
        None => i,
        Some(i) if i < d[2] => pad(d[1]) + i,
        Some(_) => pad(d[1]) + pad(d[2]),
    }
}

fn unit_words(ty: &StateType) -> u64 {
    ty.bytes() / 4 * if ty.kind == StateKind::Kv { PAGE_TOKENS as u64 } else { 1 }
}

fn state_buffer(ty: &StateType, state: &State<f32>, units: usize) -> Buffer {
    let mut out = vec![0u32; unit_words(ty) as usize * units];
    for (unit, values) in state.units() {
        for (i, x) in (0u64..).zip(values) {
            out[(u64::from(unit) * unit_words(ty) + place(ty, i)) as usize] = x.to_bits();
        }
    }
    from_words(&out)
}

/// Runs the kernel of a case for two targets and its op's meaning on the same data, and compares every result and state.
fn check(case: &Case, step: &Step, args: &[Datum<f32>], tolerance: f32) {
    let want = evaluate(&case.function, args.to_vec(), &WeightStore::new(), &Cx::new(PAGE_TOKENS)).expect("evaluates");
    for bits in [512, 128] {
        check_on(case, step, (args, &want), tolerance, &Target::cpu("x86-64-v3", &[], bits));
    }
}

fn check_on(case: &Case, step: &Step, (args, want): (&[Datum<f32>], &[Datum<f32>]), tolerance: f32, target: &Target) {
    let f = &case.function;
    let op = f.node(case.node).op;
    let lowered = lower_group(f, &[case.node], target).expect("the op has a skeleton");
    verify_kernel(&lowered.kernel).unwrap_or_else(|e| panic!("{op}: {e:?}"));
    let mut buffers: Vec<Buffer> = lowered.binds.iter().map(|b| buffer(case, step, args, b)).collect();
    let places: Vec<Place> = (0..buffers.len()).map(|buffer| Place { buffer, at_bytes: 0 }).collect();
    run(&lowered.kernel, step.syms(), &mut buffers, &places, Options::default())
        .unwrap_or_else(|e| panic!("{op}: {e}"));
    let bound = |v: Value| lowered.binds.iter().position(|b| *b == Bind::Value(v));
    let mut states = f.params.iter().filter(|&&p| matches!(f.node(p).types[0], Type::State(_)));
    for (i, want) in want.iter().enumerate() {
        if let Datum::State(want) = want {
            let param = *states.next().expect("a state result has its operand");
            let at = bound(Value { node: param, result: 0 }).expect("states are bound");
            compare_state(want, &buffers[at], tolerance);
        } else {
            let v = Value { node: case.node, result: i as u32 };
            compare_tensor(f, v, want, &buffers[bound(v).expect("results are bound")], tolerance);
        }
    }
}

fn buffer(case: &Case, step: &Step, args: &[Datum<f32>], bind: &Bind) -> Buffer {
    let f = &case.function;
    let v = match bind {
        Bind::Step(input) => return Buffer::from_i32(&step.input(*input)),
        Bind::Value(v) => *v,
    };
    let Some(param) = f.params.iter().position(|&p| p == v.node) else {
        let dims = f.ty(v).as_tensor().expect("results are tensors").shape.eval(&step.syms());
        let dims: Vec<u64> = dims.into_iter().map(|d| d as u64).collect();
        return Buffer::uninit(padded_elems(&dims) * 4);
    };
    match (f.ty(v), &args[param]) {
        (Type::Weight(w), Datum::Float(a)) => pack(&w.shape, case.in_ranks[param], w.format, a.data()),
        (Type::Tensor(t), Datum::Float(a)) => {
            from_words(&pad_words(&t.shape.inner().expect("constants"), &words(a.data())))
        }
        (Type::Tensor(t), Datum::Int(a)) if t.shape.rank() == 2 && f.node(v.node).name.as_deref() != Some("order") => {
            let words: Vec<u32> = a.data().iter().map(|x| x.cast_unsigned()).collect();
            from_words(&pad_words(&t.shape.inner().expect("constants"), &words))
        }
        (Type::Tensor(_), Datum::Int(a)) => Buffer::from_i32(a.data()),
        (Type::State(s), Datum::State(state)) => state_buffer(s, state, step.units(s.kind)),
        (ty, _) => panic!("no buffer for {ty}"),
    }
}

fn compare_tensor(f: &Function, v: Value, want: &Datum<f32>, got: &Buffer, tolerance: f32) {
    let op = f.node(v.node).op;
    let t = f.ty(v).as_tensor().expect("a tensor");
    let inner = t.shape.inner().expect("constants");
    let order = op == Op::NormRouter && v.result == 2;
    let (elems, stride) = (inner.iter().product::<u64>(), padded_elems(&inner));
    let at = |i: usize| match i as u64 {
        _ if order || t.shape.rank() == 1 => i,
        i => (i / elems * stride + padded_index(&inner, i % elems)) as usize,
    };
    if let Datum::Int(want) = want {
        let got = got.to_i32();
        let got: Vec<i32> = (0..want.data().len()).map(|i| got[at(i)]).collect();
        assert_eq!(got, want.data(), "{op}: result {}", v.result);
        return;
    }
    let (want, got) = (want.float().expect("floats").data(), got.to_f32());
    let scale = want.iter().fold(1e-6f32, |m, x| m.max(x.abs()));
    for (i, &w) in want.iter().enumerate() {
        let g = got[at(i)];
        assert!((g - w).abs() <= tolerance * scale, "{op}: result {}, element {i}: {g}, expected {w}", v.result);
    }
}

fn compare_state(want: &State<f32>, got: &Buffer, tolerance: f32) {
    let (ty, got) = (want.ty(), got.to_f32());
    for (unit, values) in want.units() {
        for (i, &w) in (0u64..).zip(values) {
            let g = got[(u64::from(unit) * unit_words(ty) + place(ty, i)) as usize];
            assert!(
                (g - w).abs() <= tolerance * w.abs().max(1.0),
                "{:?} {unit}, element {i}: {g}, expected {w}",
                ty.kind
            );
        }
    }
}

/// Random data for every parameter of a case; `given` may say what some are.
fn data(case: &Case, step: &Step, given: &dyn Fn(&str) -> Option<Datum<f32>>) -> Vec<Datum<f32>> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let each = case.function.params.iter().map(|&p| {
        let node = case.function.node(p);
        let name = node.name.as_deref().unwrap_or_default();
        given(name).unwrap_or_else(|| random_datum(&node.types[0], name, step, &mut random))
    });
    each.collect()
}

fn random_datum(ty: &Type, name: &str, step: &Step, random: &mut Random) -> Datum<f32> {
    match ty {
        Type::Tensor(t) => {
            assert_eq!(t.dtype, DType::F32, "integers are given");
            let dims = t.shape.eval(&step.syms());
            let mut values = random.many(dims.iter().product());
            if name == "ssq" {
                values.iter_mut().for_each(|x| *x = x.abs() * 16.0 + 0.1);
            }
            Datum::floats(&dims, values).expect("the size fits")
        }
        Type::Weight(w) => {
            let dims: Vec<usize> = w.shape.iter().map(|&d| d as usize).collect();
            let def = w.format.def();
            let mut bytes = vec![0; def.dtype.bytes() as usize];
            let stored = random.many(dims.iter().product()).into_iter().map(|x| {
                (def.encode)(x, &mut bytes);
                (def.decode)(&bytes)
            });
            Datum::floats(&dims, stored.collect()).expect("the size fits")
        }
        Type::State(s) => {
            let mut state = State::new(s, PAGE_TOKENS);
            let elems = state.unit_elems();
            for u in 0..step.units(s.kind) {
                state.unit_mut(u as u32).copy_from_slice(&random.many(elems));
            }
            Datum::State(state)
        }
        Type::Sequences => step.sequences(),
        Type::Bundle(_) => panic!("bundles are made in the function"),
    }
}

/// Checks an op on random data for all steps.
fn check_op(op: Op, specs: &[Spec], attrs: Attrs, tolerance: f32) {
    let case = case(op, specs, attrs);
    for step in steps() {
        check(&case, &step, &data(&case, &step, &|_| None), tolerance);
    }
}

/// The operands of a norm in a prologue, and what follows.
fn normed(width: u64, rest: &[Spec]) -> Vec<Spec> {
    let mut specs =
        vec![("x", rows(&[width]), 0), ("ssq", rows(&[width.div_ceil(16)]), 0), ("gain", flat(&[width]), 0)];
    specs.extend_from_slice(rest);
    specs
}

fn eps() -> Attrs {
    Attrs::none().with("eps", 1e-6)
}

#[test]
fn linears_in_every_format_and_size() {
    for format in [Format::Bf16, Format::F16, Format::F32] {
        for width in [64, 40] {
            let w = |out: &[u64]| Type::weight(&[out, &[width]].concat(), format);
            check_op(Op::Linear, &[("x", rows(&[width]), 0), ("w", w(&[24, 20]), 1)], Attrs::none(), 1e-5);
            let specs = normed(width, &[("w0", w(&[3, 20]), 1), ("w1", w(&[160]), 1), ("w2", w(&[6]), 1)]);
            check_op(Op::NormLinears, &specs, eps(), 2e-5);
        }
    }
}

#[test]
fn linear_residual_over_heads() {
    for (heads, width, hidden) in [(2, 16, 96), (3, 20, 40)] {
        let w = bf16(&[hidden, heads, width]);
        let specs = [("x", rows(&[heads, width]), 0), ("w", w, 2), ("residual", rows(&[hidden]), 0)];
        check_op(Op::LinearResidual, &specs, Attrs::none(), 1e-5);
    }
}

#[test]
fn norm_swiglu() {
    let specs = normed(80, &[("w_gate", bf16(&[112, 80]), 1), ("w_up", bf16(&[112, 80]), 1)]);
    check_op(Op::NormSwiglu, &specs, eps(), 2e-5);
}

#[test]
fn gated_delta_net() {
    for (k_heads, v_heads, dk, dv) in [(2, 4, 16, 16), (3, 6, 12, 20), (1, 3, 32, 64)] {
        let conv = |heads, width| Type::state(StateKind::Conv, &[heads, width, 3]);
        let specs = [
            ("q", rows(&[k_heads, dk]), 0),
            ("k", rows(&[k_heads, dk]), 0),
            ("v", rows(&[v_heads, dv]), 0),
            ("z", rows(&[v_heads, dv]), 0),
            ("a", rows(&[v_heads]), 0),
            ("b", rows(&[v_heads]), 0),
            ("w_q", flat(&[k_heads, dk, 4]), 0),
            ("w_k", flat(&[k_heads, dk, 4]), 0),
            ("w_v", flat(&[v_heads, dv, 4]), 0),
            ("a_log", flat(&[v_heads]), 0),
            ("dt_bias", flat(&[v_heads]), 0),
            ("norm", flat(&[dv]), 0),
            ("conv_q", conv(k_heads, dk), 0),
            ("conv_k", conv(k_heads, dk), 0),
            ("conv_v", conv(v_heads, dv), 0),
            ("delta", Type::state(StateKind::Delta, &[v_heads, dk, dv]), 0),
            ("seqs", Type::Sequences, 0),
        ];
        let attrs = eps().with("scale", (dk as f64).powf(-0.5)).with("norm_eps", 1e-6);
        check_op(Op::GatedDeltaNet, &specs, attrs, 5e-5);
    }
}

#[test]
fn attention_between_its_projections() {
    for (heads, kv_heads, width, n) in [(4, 2, 32, 4), (9, 3, 24, 3), (10, 1, 64, 16)] {
        let kv = || ("kv", Type::state(StateKind::Kv, &[kv_heads, width]), 0);
        let front = [
            ("q", rows(&[heads, width]), 0),
            ("k", rows(&[kv_heads, width]), 0),
            ("v", rows(&[kv_heads, width]), 0),
            ("q_norm", flat(&[width]), 0),
            ("k_norm", flat(&[width]), 0),
            ("inv_freq", flat(&[n]), 0),
            kv(),
            ("seqs", Type::Sequences, 0),
        ];
        check_op(Op::NormRopeAppend, &front, eps().with("factor", 1.1386), 3e-5);
        let gate = ("output_gate", rows(&[heads, width]), 0);
        let back = [("q", rows(&[heads, width]), 0), gate, kv(), ("seqs", Type::Sequences, 0)];
        check_op(Op::GatedAttention, &back, Attrs::none().with("scale", (width as f64).powf(-0.5)), 3e-5);
    }
}

#[test]
fn router_with_top_k_and_dispatch() {
    for (experts, k, width) in [(8, 2u64, 64), (12, 3, 96), (40, 10, 48)] {
        for renormalise in [0i64, 1] {
            let matrices = [("router", bf16(&[experts, width]), 1), ("shared_gate", bf16(&[1, width]), 1)];
            let attrs = eps().with("k", k).with("renormalise", renormalise);
            check_op(Op::NormRouter, &normed(width, &matrices), attrs, 2e-5);
        }
    }
}

/// `k` different experts for each token, and their dispatch as the graph interpreter makes it.
fn choices(step: &Step, experts: usize, k: usize) -> [Datum<f32>; 3] {
    let ids = (0..step.tokens()).flat_map(|t| (0..k).map(move |s| ((t * t + s * 5) % experts) as i32)).collect();
    let ids = Datum::ints(&[step.tokens(), k], ids).expect("the size fits");
    let ty = Type::i32(Shape::rows(Sym::T, &[k as u64]));
    let case = case(Op::Dispatch, &[("ids", ty, 0)], Attrs::none().with("experts", experts as i64));
    let out = evaluate(&case.function, vec![ids.clone()], &WeightStore::new(), &Cx::new(PAGE_TOKENS));
    let out = out.expect("the op evaluates");
    [ids, out[0].clone(), out[1].clone()]
}

#[test]
fn both_halves_of_the_experts() {
    for (experts, k, hidden, inner, shared) in [(8u64, 2u64, 64u64, 32u64, 32u64), (12, 3, 96, 40, 56)] {
        let i32s = Type::i32(Shape::rows(Sym::T, &[k]));
        let table = Type::i32(Shape::new([2 * experts + 2]));
        let routing = [("ids", i32s.clone(), 0), ("order", i32s, 0), ("table", table, 0)];
        let gates = [("w_gate", bf16(&[experts, inner, hidden]), 1), ("w_up", bf16(&[experts, inner, hidden]), 1)];
        let s_gates = [("s_gate", bf16(&[shared, hidden]), 1), ("s_up", bf16(&[shared, hidden]), 1)];
        let up = normed(hidden, &[routing.as_slice(), &gates, &s_gates].concat());
        let front = [("h", rows(&[k, inner]), 0), ("s", rows(&[shared]), 0), ("weights", rows(&[k]), 0)];
        let back = [
            ("shared", rows(&[1]), 0),
            ("w_down", bf16(&[experts, hidden, inner]), 1),
            ("s_down", bf16(&[hidden, shared]), 1),
            ("residual", rows(&[hidden]), 0),
        ];
        let down = [front.as_slice(), &routing, &back].concat();
        for (op, specs, attrs) in [(Op::ExpertsGateUp, up, eps()), (Op::ExpertsDown, down, Attrs::none())] {
            let case = case(op, &specs, attrs);
            for step in steps() {
                let [ids, order, table] = choices(&step, experts as usize, k as usize);
                let given = |name: &str| match name {
                    "ids" => Some(ids.clone()),
                    "order" => Some(order.clone()),
                    "table" => Some(table.clone()),
                    _ => None,
                };
                check(&case, &step, &data(&case, &step, &given), 2e-5);
            }
        }
    }
}

#[test]
fn rows_in_and_out() {
    let step = Step { runs: vec![(0, 5, 0)], kept: vec![(0, 0)], rows: vec![4, 0] };
    let tokens = Datum::ints(&[5], vec![0, 49, 17, 16, 3]).expect("the size fits");
    let chosen = Datum::ints(&[2], step.rows.clone()).expect("the size fits");
    let given = |name: &str| match name {
        "tokens" => Some(tokens.clone()),
        "rows" => Some(chosen.clone()),
        _ => None,
    };
    let index = |sym: Sym| Type::i32(Shape::new([sym]));
    let cases = [
        case(Op::Embed, &[("tokens", index(Sym::T), 0), ("w", bf16(&[50, 40]), 1)], Attrs::none()),
        case(Op::GatherRows, &[("x", rows(&[40]), 0), ("rows", index(Sym::R), 0)], Attrs::none()),
        case(Op::RmsNorm, &[("x", rows(&[3, 24]), 0), ("w", flat(&[24]), 0)], eps()),
        case(Op::RmsNormPlusOne, &[("x", rows(&[3, 24]), 0), ("w", flat(&[24]), 0)], eps()),
        case(Op::SumSquares, &[("x", rows(&[40]), 0)], Attrs::none()),
    ];
    for case in cases {
        check(&case, &step, &data(&case, &step, &given), 1e-5);
    }
}

#[test]
fn elementwise_ops() {
    let plain = |op: &&Op| op.def().class == Class::Elementwise && op.def().operands == ["x"];
    for &op in Op::ALL.iter().filter(plain) {
        let attrs = if op == Op::Scale { Attrs::none().with("factor", 0.3) } else { Attrs::none() };
        check_op(op, &[("x", rows(&[2, 20]), 0)], attrs, 1e-5);
    }
    for (op, count) in [(Op::Add, 3), (Op::Mul, 3), (Op::Swiglu, 1)] {
        for other in [rows(&[2, 20]), flat(&[20]), rows(&[2, 1])].into_iter().take(count) {
            let names = if op == Op::Swiglu { ["gate", "up"] } else { ["a", "b"] };
            check_op(op, &[(names[0], rows(&[2, 20]), 0), (names[1], other, 0)], Attrs::none(), 1e-5);
        }
    }
    let ssq = rows(&[3]);
    check_op(Op::RmsNormSsq, &[("x", rows(&[40]), 0), ("ssq", ssq, 0), ("w", flat(&[40]), 0)], eps(), 1e-5);
}
