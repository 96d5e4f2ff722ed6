//! Random values of given types: the operands on which graphs are compared.
#![allow(dead_code, reason = "each test uses some of them")]

use std::sync::Arc;

use nextc_ir::eval::{Array, Cx, Datum, EvalError, Sequences, State};
use nextc_ir::types::{StateKind, StateType};
use nextc_ir::{DType, Op, Type};

/// Tokens in a page of KV, in tests.
pub const PAGE_TOKENS: usize = 4;
/// Pages a sequence can own, in tests.
const PAGES: usize = 4;

/// A small seeded generator (splitmix64).
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A number of `low..=high`.
    pub fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low + 1)
    }

    /// A number between -1 and 1.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.range(0, items.len() as u64 - 1) as usize]
    }
}

/// A ragged step: runs of tokens, one of which goes on with a sequence, and one of padding.
#[derive(Clone, Debug)]
pub struct Step {
    pub tokens: usize,
    pub positions: Array<i32>,
    pub cu_seqlens: Array<i32>,
    pub slot: Array<i32>,
    pub replay: Array<i32>,
    pub tentative: Array<i32>,
    pub page_table: Array<i32>,
}

impl Step {
    pub fn new(rng: &mut Rng) -> Self {
        // (first position, tokens, slot)
        let runs = [(0, rng.range(1, 5), 1), (rng.range(1, 7), rng.range(1, 3), 0), (0, 1, -1)];
        let mut positions = Vec::new();
        let mut ends = vec![0];
        for (first, tokens, _) in runs {
            positions.extend((first..first + tokens).map(|p| p as i32));
            ends.push(positions.len() as i32);
        }
        let ints = |dims: &[usize], data| Array::new(dims, data).expect("sizes agree");
        let table = (0..runs.len() * PAGES).map(|i| (i * 7 % (runs.len() * PAGES)) as i32).collect();
        Self {
            tokens: positions.len(),
            cu_seqlens: ints(&[runs.len() + 1], ends),
            slot: ints(&[runs.len()], runs.iter().map(|r| r.2).collect()),
            replay: ints(&[runs.len()], vec![0, 2, 0]),
            tentative: ints(&[runs.len()], vec![0, 1, 0]),
            page_table: ints(&[runs.len(), PAGES], table),
            positions: ints(&[positions.len()], positions),
        }
    }

    pub fn sequences(&self) -> Sequences {
        let sequences = Sequences::new(&self.positions, &self.cu_seqlens, &self.slot, &self.page_table);
        let sequences = sequences.and_then(|s| s.with_tentative(&self.replay, &self.tentative));
        sequences.expect("the step is sound")
    }

    /// T, B, P and R.
    pub fn syms(&self) -> [u64; 4] {
        [self.tokens as u64, 3, PAGES as u64, 2]
    }

    /// A random value of `ty`; `positive` where a negative number makes no sense.
    pub fn datum(&self, ty: &Type, positive: bool, rng: &mut Rng) -> Datum<f64> {
        let mut float = || if positive { rng.unit().abs() + 0.1 } else { rng.unit() };
        match ty {
            Type::Tensor(t) => {
                let dims = t.shape.eval(&self.syms());
                let elems: usize = dims.iter().product();
                match t.dtype {
                    DType::F32 => Datum::floats(&dims, (0..elems).map(|_| float()).collect()),
                    _ => Datum::ints(&dims, (0..elems).map(|i| (i % self.tokens) as i32).collect()),
                }
                .expect("sizes agree")
            }
            Type::Weight(w) => {
                let dims: Vec<usize> = w.shape.iter().map(|&d| d as usize).collect();
                let data = (0..dims.iter().product()).map(|_| float()).collect();
                Datum::floats(&dims, data).expect("sizes agree")
            }
            Type::State(s) => Datum::State(state(s, rng)),
            Type::Sequences => Datum::Sequences(Arc::new(self.sequences())),
            Type::Bundle(types) => Datum::Bundle(types.iter().map(|ty| self.datum(ty, positive, rng)).collect()),
        }
    }

    /// Choices of `top_k` of `experts`, with the order and the table that `dispatch` gives for them.
    pub fn choices(&self, top_k: u64, experts: u64, rng: &mut Rng) -> Result<[Datum<f64>; 3], EvalError> {
        let mut ids = Vec::new();
        for _ in 0..self.tokens {
            let first = rng.range(0, experts - 1);
            ids.extend((0..top_k).map(|s| ((first + s) % experts) as i32));
        }
        let ids = Datum::ints(&[self.tokens, top_k as usize], ids)?;
        let attrs = nextc_ir::Attrs::none().with("experts", experts);
        let mut out = Cx::new(PAGE_TOKENS).eval(Op::Dispatch.def(), std::slice::from_ref(&ids), &attrs)?.into_iter();
        let mut next = || out.next().expect("dispatch gives two results");
        Ok([ids, next(), next()])
    }
}

/// A state in which every slot and page holds something.
fn state(ty: &StateType, rng: &mut Rng) -> State<f64> {
    let mut state = State::new(ty, PAGE_TOKENS);
    let units = if ty.kind == StateKind::Kv { 3 * PAGES as u32 } else { 2 };
    for unit in 0..units {
        state.unit_mut(unit).iter_mut().for_each(|x| *x = rng.unit());
    }
    state
}

/// The largest difference, relative to the largest number; infinite if they are not of one size or one is not finite.
pub fn difference(a: &Datum<f64>, b: &Datum<f64>) -> f64 {
    let (a, b) = (a.numbers(), b.numbers());
    if a.len() != b.len() || !a.iter().chain(&b).all(|x| x.is_finite()) {
        return f64::INFINITY;
    }
    let scale = a.iter().fold(1e-300, |m: f64, x| m.max(x.abs()));
    a.iter().zip(&b).map(|(a, b)| (a - b).abs() / scale).fold(0.0, f64::max)
}
