//! Each fused op means what the plain ops that it replaces mean, and every op means the same in f32 as in f64.

use std::sync::Arc;

use nextc_ir::eval::{Array, Cx, Datum, Real, Sequences, State, WeightStore, run};
use nextc_ir::op::Class;
use nextc_ir::{Function, Module, Op, Type, parse, print, verify};

const MODULE: &str = include_str!("graph/fused.graph");
const PAGE_TOKENS: usize = 4;
/// T, B, P, R.
const SYMS: [u64; 4] = [7, 3, 4, 2];

fn module() -> Module {
    parse::module(MODULE).unwrap_or_else(|e| panic!("{e}"))
}

/// SplitMix64: the same numbers on every run.
struct Random(u64);

impl Random {
    /// Uniform in [-1, 1), exact in f32.
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z >> 40) as f64 / f64::from(1 << 23) - 1.0
    }
}

fn floats<F: Real>(dims: &[usize], rng: &mut Random) -> Datum<F> {
    let count = dims.iter().product();
    Datum::floats(dims, (0..count).map(|_| F::of(rng.uniform())).collect()).unwrap()
}

/// A new sequence in slot 2, a padding row pair, and a sequence in slot 0 that goes on at position 9.
fn sequences() -> Sequences {
    let array = |dims: &[usize], data: &[i32]| Array::new(dims, data.to_vec()).unwrap();
    let positions = array(&[7], &[0, 1, 2, 0, 0, 9, 10]);
    let pages = array(&[3, 4], &[5, -1, -1, -1, -1, -1, -1, -1, 2, 0, 3, 1]);
    Sequences::new(&positions, &array(&[4], &[0, 3, 5, 7]), &array(&[3], &[2, -1, 0]), &pages).unwrap()
}

fn argument<F: Real>(ty: &Type, rng: &mut Random) -> Datum<F> {
    match ty {
        Type::Tensor(t) => floats(&t.shape.eval(&SYMS), rng),
        Type::Weight(w) => floats(&w.shape.iter().map(|&d| d as usize).collect::<Vec<_>>(), rng),
        Type::State(s) => {
            let mut state = State::new(s, PAGE_TOKENS);
            for unit in 0..4 {
                state.unit_mut(unit).iter_mut().for_each(|x| *x = F::of(rng.uniform()));
            }
            Datum::State(state)
        }
        Type::Sequences => Datum::Sequences(Arc::new(sequences())),
        Type::Bundle(_) => panic!("no parameter is a bundle"),
    }
}

/// All results of a function on arguments that depend on its parameters' types alone.
fn results<F: Real>(module: &Module, f: &Function) -> Vec<Vec<f64>> {
    let mut rng = Random(1);
    let args = f.params.iter().map(|&p| argument::<F>(&f.node(p).types[0], &mut rng)).collect();
    let results = run(module, &f.name, args, &WeightStore::new(), &Cx::new(PAGE_TOKENS));
    results.unwrap_or_else(|e| panic!("{e}")).iter().map(Datum::numbers).collect()
}

fn check_close(what: &str, a: &[Vec<f64>], b: &[Vec<f64>], tolerance: f64) {
    assert_eq!(a.len(), b.len(), "{what}");
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert_eq!(a.len(), b.len(), "{what}: result {i}");
        let close = |a: f64, b: f64| (a - b).abs() <= tolerance * (1.0 + b.abs());
        let far = a.iter().zip(b).position(|(&a, &b)| !close(a, b));
        assert_eq!(far.map(|at| (at, a[at], b[at])), None, "{what}: result {i}");
    }
}

#[test]
fn fused_ops_mean_what_they_replace() {
    let module = module();
    let plain = module.functions.iter().filter(|f| f.name.starts_with("plain."));
    for f in plain {
        let fused = module.function(&f.name.replace("plain.", "fused.")).expect("each plain form has a fused one");
        check_close(&f.name, &results::<f64>(&module, f), &results::<f64>(&module, fused), 1e-12);
        check_close(&f.name, &results::<f32>(&module, f), &results::<f32>(&module, fused), 2e-6);
    }
}

#[test]
fn f32_agrees_with_f64() {
    let module = module();
    for f in &module.functions {
        check_close(&f.name, &results::<f32>(&module, f), &results::<f64>(&module, f), 5e-6);
    }
}

#[test]
fn every_op_that_works_on_activations_is_among_them() {
    let module = module();
    let used: Vec<Op> = module.functions.iter().flat_map(|f| f.graph.node_weights().map(|n| n.op)).collect();
    let choosing = [Op::Argmax, Op::EditLogits, Op::TokenWeights, Op::Choose, Op::Accept];
    let elsewhere = [[Op::Embed, Op::GatherRows, Op::LinearWanted].as_slice(), &choosing].concat();
    let wanted = Op::ALL.iter().filter(|op| op.def().class != Class::Structure && !elsewhere.contains(op));
    let missing: Vec<&Op> = wanted.filter(|op| !used.contains(op)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn the_module_verifies_and_reads_back() {
    let module = module();
    assert_eq!(verify::verify(&module), Ok(()));
    let text = print::module(&module);
    assert_eq!(print::module(&parse::module(&text).unwrap()), text);
}
