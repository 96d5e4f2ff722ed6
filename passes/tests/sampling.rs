//! The sampler three times: in kernels, in the graph interpreter, and as its settings are described, with sorted
//! probabilities in f64. They must choose the same tokens wherever no decision is closer than f32 can tell.

use std::collections::HashMap;

use nextc_ir::build::FunctionBuilder;
use nextc_ir::eval::{Cx, Datum, WeightStore, evaluate};
use nextc_ir::graph::{Function, Value};
use nextc_ir::kernel::eval::{Buffer, Options, Place, run};
use nextc_ir::kernel::random::{Numbers, token_bits};
use nextc_ir::ops::sample::{Choice, Factor};
use nextc_ir::shape::{pad, padded_elems};
use nextc_ir::{Attrs, Op, Shape, Sym, Target, Type};
use nextc_passes::lower::{lower_group, ports::Bind};
use proptest::prelude::*;

/// How one row is sampled.
#[derive(Clone, Debug)]
struct Setting {
    temperature: f32,
    top_k: i32,
    top_p: f32,
    min_p: f32,
    /// Repetition, presence, frequency.
    penalties: [f32; 3],
    seed: u64,
    sequence: i32,
    position: i32,
    edits: (usize, usize),
    drafts: (usize, usize),
}

/// A step whose rows are sampled.
#[derive(Clone, Debug)]
struct Case {
    vocab: usize,
    logits: Vec<Vec<f32>>,
    settings: Vec<Setting>,
    tokens: Vec<i32>,
    edits: Vec<(i32, i32, f32)>,
}

/// `@choose` for a vocabulary.
fn function(vocab: usize) -> Function {
    let mut b = FunctionBuilder::new("choose");
    let vector = |sym: Sym| Type::i32(Shape::new([sym]));
    let logits = b.param("logits", Type::f32(Shape::rows(Sym::R, &[vocab as u64])));
    let tokens = b.param("tokens", vector(Sym::T));
    let factors = b.param("factors", Type::f32(Shape::rows(Sym::R, &[Factor::COUNT])));
    let choices = b.param("choices", Type::i32(Shape::rows(Sym::R, &[Choice::COUNT])));
    let [edit_tokens, edit_counts] = ["edit_tokens", "edit_counts"].map(|name| b.param(name, vector(Sym::P)));
    let edit_biases = b.param("edit_biases", Type::f32(Shape::new([Sym::P])));
    let mut op = |op, operands: &[Value]| b.op_n(op, operands, Attrs::none()).expect("the operands fit");
    let best = op(Op::Argmax, &[logits])[0];
    let edited = [logits, tokens, factors, choices, edit_tokens, edit_counts, edit_biases];
    let edited = op(Op::EditLogits, &edited);
    let weights = op(Op::TokenWeights, &[edited[0], edited[1], factors])[0];
    let chosen = op(Op::Choose, &[edited[0], edited[1], weights, best, factors, choices])[0];
    b.finish(vec![chosen])
}

impl Case {
    fn args(&self) -> Vec<Datum<f32>> {
        let rows = self.logits.len();
        let factors: Vec<f32> = self.settings.iter().flat_map(Setting::factors).collect();
        let choices: Vec<i32> = self.settings.iter().flat_map(Setting::choices).collect();
        let count = self.edits.len();
        let args = [
            Datum::floats(&[rows, self.vocab], self.logits.concat()),
            Datum::ints(&[self.tokens.len()], self.tokens.clone()),
            Datum::floats(&[rows, Factor::COUNT as usize], factors),
            Datum::ints(&[rows, Choice::COUNT as usize], choices),
            Datum::ints(&[count], self.edits.iter().map(|e| e.0).collect()),
            Datum::ints(&[count], self.edits.iter().map(|e| e.1).collect()),
            Datum::floats(&[count], self.edits.iter().map(|e| e.2).collect()),
        ];
        args.into_iter().collect::<Result<_, _>>().expect("the sizes agree")
    }

    /// By the graph interpreter.
    fn interpreted(&self, f: &Function) -> Vec<i32> {
        let out = evaluate(f, self.args(), &WeightStore::new(), &Cx::new(64)).expect("it evaluates");
        out[0].int().expect("tokens").data().to_vec()
    }

    /// By the kernels for a machine.
    fn compiled(&self, f: &Function, target: &Target) -> Vec<i32> {
        let syms = [self.tokens.len(), 1, self.edits.len(), self.logits.len()].map(|n| n as u64);
        let mut buffers = Vec::new();
        let mut values: HashMap<Value, usize> = HashMap::new();
        for (&param, arg) in f.params.iter().zip(self.args()) {
            values.insert(Value { node: param, result: 0 }, buffers.len());
            buffers.push(match &arg {
                Datum::Float(a) => Buffer::from_f32(&padded(a.dims(), a.data())),
                Datum::Int(a) => Buffer::from_i32(&padded(a.dims(), a.data())),
                _ => unreachable!("parameters are tensors"),
            });
        }
        for node in f.order().into_iter().skip(f.params.len()) {
            for (result, ty) in (0..).zip(&f.node(node).types) {
                let shape = &ty.as_tensor().expect("results are tensors").shape;
                let elems = shape.0[0].eval(&syms) * padded_elems(&shape.inner().expect("constants"));
                values.insert(Value { node, result }, buffers.len());
                buffers.push(Buffer::uninit(4 * elems));
            }
            let lowered = lower_group(f, &[node], target).expect("it lowers");
            let place = |bind: &Bind| match bind {
                Bind::Value(v) => Place::start(values[v]),
                Bind::Step(input) => unreachable!("{input:?} is no operand"),
            };
            for part in &lowered.parts {
                let places: Vec<Place> = part.binds.iter().map(place).collect();
                run(&part.kernel, syms, &mut buffers, &places, Options::default()).unwrap_or_else(|e| panic!("{e}"));
            }
        }
        buffers[values[&f.results[0]]].to_i32()[..self.logits.len()].to_vec()
    }

    /// The token of a row as the settings describe it, and how far the nearest decision was from another outcome.
    fn described(&self, r: usize) -> (Option<usize>, f64) {
        let s = &self.settings[r];
        let mut logits: Vec<f64> = self.logits[r].iter().map(|&x| x.into()).collect();
        if logits.iter().any(|x| x.is_nan() || *x == f64::INFINITY) {
            return (None, 1.0);
        }
        self.process(s, &mut logits);
        let mut order: Vec<usize> = (0..self.vocab).collect();
        order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).expect("no NaN"));
        let largest = logits[order[0]];
        if largest == f64::NEG_INFINITY {
            return (None, 1.0);
        }
        // a different logit that is as near as roundings of edits may confuse ranks
        let gaps = order.windows(2).map(|w| logits[w[0]] - logits[w[1]]).filter(|&gap| gap > 0.0);
        let mut margin = if self.edits.is_empty() { 1.0 } else { gaps.fold(1.0, f64::min) };
        if s.temperature == 0.0 {
            return (Some(order[0]), margin);
        }
        let temperature = f64::from(s.temperature);
        let weight = |i: usize| ((logits[i] - largest) / temperature).exp();
        if s.top_k > 0 {
            order.truncate(s.top_k as usize);
        }
        if s.top_p < 1.0 {
            let total: f64 = order.iter().map(|&i| weight(i)).sum();
            let (mut sum, mut kept) = (0.0, 0);
            while kept < order.len() && sum < f64::from(s.top_p) * total {
                sum += weight(order[kept]);
                kept += 1;
                margin = margin.min((sum / total - f64::from(s.top_p)).abs());
            }
            order.truncate(kept.max(1));
        }
        if s.min_p > 0.0 {
            margin = order.iter().map(|&i| (weight(i) / f64::from(s.min_p) - 1.0).abs()).fold(margin, f64::min);
            order.retain(|&i| weight(i) >= f64::from(s.min_p));
        }
        order.sort_unstable();
        let total: f64 = order.iter().map(|&i| weight(i)).sum();
        let [high, low] = token_bits(
            &mut Numbers,
            [s.seed & 0xffff_ffff, s.seed >> 32],
            s.sequence.cast_unsigned().into(),
            s.position.cast_unsigned().into(),
        );
        let random = ((high << 32 | low) as f64) / 2f64.powi(64);
        let mut sum = 0.0;
        let mut drawn = None;
        for &i in &order {
            sum += weight(i) / total;
            margin = margin.min((sum - random).abs());
            if drawn.is_none() && sum > random {
                drawn = Some(i);
            }
        }
        (drawn, margin)
    }

    fn process(&self, s: &Setting, logits: &mut [f64]) {
        let drafts = &self.tokens[s.drafts.0..s.drafts.1];
        let mut counts: HashMap<i32, (Option<i32>, f64)> = HashMap::new();
        for &(token, count, bias) in &self.edits[s.edits.0..s.edits.1] {
            counts.insert(token, ((count >= 0).then_some(count), bias.into()));
        }
        for &draft in drafts {
            let entry = counts.entry(draft).or_insert((None, 0.0));
            entry.0 = Some(entry.0.unwrap_or(0) + 1);
        }
        let [repetition, presence, frequency] = s.penalties.map(f64::from);
        for (token, (count, bias)) in counts {
            let x = &mut logits[token as usize];
            *x += bias;
            let Some(count) = count else { continue };
            *x = if *x < 0.0 { *x * repetition } else { *x / repetition };
            *x -= if count > 0 { presence + frequency * f64::from(count) } else { 0.0 };
        }
    }
}

impl Setting {
    fn factors(&self) -> [f32; 6] {
        let [repetition, presence, frequency] = self.penalties;
        [self.temperature, self.top_p, self.min_p, repetition, presence, frequency]
    }

    fn choices(&self) -> [i32; 9] {
        let range = |(a, b): (usize, usize)| [a as i32, b as i32];
        let ([e0, e1], [d0, d1]) = (range(self.edits), range(self.drafts));
        let (low, high) = (self.seed as i32, (self.seed >> 32) as i32);
        [self.top_k, low, high, self.sequence, self.position, e0, e1, d0, d1]
    }
}

/// Rows with their innermost dimension padded.
fn padded<E: Copy + Default>(dims: &[usize], data: &[E]) -> Vec<E> {
    let [_, width] = *dims else { return data.to_vec() };
    let stride = pad(width as u64) as usize;
    let row =
        |row: &[E]| row.iter().copied().chain(std::iter::repeat_n(E::default(), stride - width)).collect::<Vec<E>>();
    data.chunks(width).flat_map(row).collect()
}

fn logits(vocab: usize) -> impl Strategy<Value = Vec<f32>> {
    let smooth = prop::collection::vec(-9.0f32..9.0, vocab);
    let coarse = prop::collection::vec((-6i32..6).prop_map(|x| x as f32 * 0.5), vocab);
    let ruled_out = prop::collection::vec(prop_oneof![3 => Just(f32::NEG_INFINITY), 1 => -3.0f32..3.0], vocab);
    let huge = prop::collection::vec(prop_oneof![-1e37f32..1e37, -1.0f32..1.0], vocab);
    let broken = prop::collection::vec(prop_oneof![99 => -3.0f32..3.0, 1 => Just(f32::NAN)], vocab);
    prop_oneof![6 => smooth, 4 => coarse, 1 => ruled_out, 1 => huge, 1 => broken]
}

fn setting(edits: usize, drafts: usize) -> impl Strategy<Value = Setting> {
    let temperature = prop_oneof![1 => Just(0.0f32), 2 => Just(1.0), 4 => 0.05f32..3.0];
    let top_k = prop_oneof![2 => Just(0), 1 => Just(1), 4 => 2i32..60, 1 => 60i32..9000];
    let top_p = prop_oneof![1 => Just(1.0f32), 1 => Just(1e-6), 3 => 0.05f32..0.999];
    let min_p = prop_oneof![3 => Just(0.0f32), 1 => 0.001f32..0.9];
    let penalties = prop_oneof![
        Just([1.0f32, 0.0, 0.0]),
        (0.7f32..1.5, -0.5f32..1.0, -0.3f32..0.5).prop_map(|(a, b, c)| [a, b, c]),
    ];
    let range = |n: usize| (0..=n, 0..=n).prop_map(|(a, b): (usize, usize)| (a.min(b), a.max(b)));
    let numbers = (any::<u64>(), any::<i32>(), any::<i32>());
    (temperature, top_k, top_p, min_p, penalties, numbers, range(edits), range(drafts)).prop_map(
        |(temperature, top_k, top_p, min_p, penalties, (seed, sequence, position), edits, drafts)| Setting {
            temperature,
            top_k,
            top_p,
            min_p,
            penalties,
            seed,
            sequence,
            position,
            edits,
            drafts,
        },
    )
}

fn case() -> impl Strategy<Value = Case> {
    let sizes = (prop_oneof![3 => 1usize..80, 2 => 250usize..1100, 1 => 4000usize..8300], 1usize..4);
    let lists = (prop::collection::vec((any::<prop::sample::Index>(), (-1i32..4, -2.0f32..2.0)), 0..7), 0usize..6);
    (sizes, lists).prop_flat_map(|((vocab, rows), (edits, drafts))| {
        let edits: std::collections::BTreeMap<i32, (i32, f32)> =
            edits.into_iter().map(|(at, edit)| (at.index(vocab) as i32, edit)).collect();
        let edits: Vec<(i32, i32, f32)> =
            edits.into_iter().map(|(token, (count, bias))| (token, count, bias)).collect();
        let settings = prop::collection::vec(setting(edits.len(), drafts), rows);
        let tokens = prop::collection::vec(0..(vocab as i32).min(30), drafts);
        (prop::collection::vec(logits(vocab), rows), settings, tokens)
            .prop_map(move |(logits, settings, tokens)| Case { vocab, logits, settings, tokens, edits: edits.clone() })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn kernels_interpreter_and_description_choose_the_same_tokens(case in case()) {
        let f = function(case.vocab);
        let machines = [Target::cpu("test", &[], 512), Target::gpu("sm_90a").expect("it is known")];
        let [cpu, gpu] = machines.map(|target| case.compiled(&f, &target));
        let interpreted = case.interpreted(&f);
        for r in 0..case.logits.len() {
            let (token, margin) = case.described(r);
            if margin > 1e-5 {
                let token = token.map_or(-1, |t| t as i32);
                prop_assert_eq!([cpu[r], gpu[r], interpreted[r]], [token; 3], "row {}, margin {}", r, margin);
            }
        }
    }
}
