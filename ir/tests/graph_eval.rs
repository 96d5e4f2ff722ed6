//! The meaning of ops on values computed by hand, of states over steps, and the errors of bad data.

use nextc_ir::eval::{Cx, Datum, EvalError, Session, StepInputs, WeightStore, evaluate};
use nextc_ir::source::{SourceError, StoredTensor, WeightSource};
use nextc_ir::{Format, Module, parse, verify};

const PAGE_TOKENS: usize = 2;

fn floats(dims: &[usize], data: &[f64]) -> Datum<f64> {
    Datum::floats(dims, data.to_vec()).unwrap()
}

fn ints(dims: &[usize], data: &[i32]) -> Datum<f64> {
    Datum::ints(dims, data.to_vec()).unwrap()
}

/// The results of one op on `args`, whose types are `types`.
fn eval(types: &str, line: &str, args: Vec<Datum<f64>>) -> Result<Vec<Vec<f64>>, EvalError> {
    let results = line.split(" = ").next().unwrap();
    let function = parse::function(&format!("func @f({types}) {{\n{line}\nreturn {results}\n}}")).unwrap();
    let results = evaluate(&function, args, &WeightStore::new(), &Cx::new(PAGE_TOKENS))?;
    Ok(results.iter().map(Datum::numbers).collect())
}

fn check(types: &str, line: &str, args: Vec<Datum<f64>>, expected: &[&[f64]]) {
    let found = eval(types, line, args).unwrap_or_else(|e| panic!("{line}: {e}"));
    assert_eq!(found.len(), expected.len(), "{line}");
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!(found.len(), expected.len(), "{line}");
        let close = found.iter().zip(*expected).all(|(a, b)| (a - b).abs() < 1e-9 || a == b);
        assert!(close, "{line}: {found:?}, expected {expected:?}");
    }
}

#[test]
fn elementwise_ops_broadcast_and_do_not_overflow() {
    let x = "%x: tensor<T x 2 x f32>";
    check(x, "%0 = softplus %x", vec![floats(&[1, 2], &[0.0, 800.0])], &[&[2f64.ln(), 800.0]]);
    check(x, "%0 = sigmoid %x", vec![floats(&[1, 2], &[0.0, -800.0])], &[&[0.5, 0.0]]);
    check(x, "%0 = softmax %x", vec![floats(&[1, 2], &[1000.0, 1000.0])], &[&[0.5, 0.5]]);
    let args = vec![floats(&[2, 2], &[1.0, 2.0, 3.0, 4.0]), floats(&[2, 1], &[10.0, 20.0])];
    check("%x: tensor<T x 2 x f32>, %s: tensor<T x 1 x f32>", "%0 = add %x, %s", args, &[&[11.0, 12.0, 23.0, 24.0]]);
}

#[test]
fn norms_divide_by_the_root_of_the_mean_or_of_the_sum() {
    let x = || floats(&[1, 2], &[3.0, 4.0]);
    check("%x: tensor<T x 2 x f32>", "%0 = l2_norm %x {eps = 0}", vec![x()], &[&[0.6, 0.8]]);
    let types = "%x: tensor<T x 2 x f32>, %w: weight<2 x f32>";
    let rms = 12.5f64.sqrt();
    check(types, "%0 = rms_norm %x, %w {eps = 0}", vec![x(), floats(&[2], &[1.0, 2.0])], &[&[3.0 / rms, 8.0 / rms]]);
    let line = "%0 = rms_norm_plus_one %x, %w {eps = 0}";
    check(types, line, vec![x(), floats(&[2], &[0.0, 1.0])], &[&[3.0 / rms, 8.0 / rms]]);
}

#[test]
fn rows_that_are_not_wanted_give_minus_infinity() {
    let types = "%x: tensor<T x 1 x f32>, %w: weight<18 x 1 x f32>, %wanted: tensor<2 x i32>";
    let w: Vec<f64> = (0..18).map(f64::from).collect();
    let args = |wanted: &[i32]| vec![floats(&[1, 1], &[2.0]), floats(&[18, 1], &w), ints(&[2], wanted)];
    let least = f64::NEG_INFINITY;
    let line = "%0 = linear_wanted %x, %w, %wanted";
    check(types, line, args(&[0, 1]), &[&[[least; 16].as_slice(), &[32.0, 34.0]].concat()]);
    let first: Vec<f64> = (0..16).map(|i| 2.0 * f64::from(i)).collect();
    check(types, line, args(&[3, 0]), &[&[first.as_slice(), &[least; 2]].concat()]);
}

#[test]
fn sums_of_squares_are_of_16_neighbours() {
    let x = floats(&[1, 17], &[1.0; 17]);
    check("%x: tensor<T x 17 x f32>", "%0 = sum_squares %x", vec![x], &[&[16.0, 1.0]]);
}

#[test]
fn top_k_takes_the_lower_index_among_equals() {
    let x = floats(&[1, 4], &[-0.0, 2.0, 0.0, 2.0]);
    check("%x: tensor<T x 4 x f32>", "%0, %1 = top_k %x {k = 3}", vec![x], &[&[2.0, 2.0, 0.0], &[1.0, 3.0, 0.0]]);
}

#[test]
fn dispatch_groups_choices_by_expert() {
    let ids = ints(&[3, 2], &[3, 0, 3, 1, 0, 3]);
    let order: &[f64] = &[1.0, 4.0, 3.0, 0.0, 2.0, 5.0];
    let table: &[f64] = &[0.0, 2.0, 3.0, 3.0, 6.0, 3.0, 0.0, 1.0, 3.0, -1.0];
    check("%ids: tensor<T x 2 x i32>", "%0, %1 = dispatch %ids {experts = 4}", vec![ids], &[order, table]);
}

#[test]
fn penalties_and_biases_are_those_computed_by_hand() {
    let types = "%l: tensor<R x 5 x f32>, %t: tensor<T x i32>, %f: tensor<R x 6 x f32>, %c: tensor<R x 9 x i32>, %n: tensor<P x i32>, %k: tensor<P x i32>, %b: tensor<P x f32>";
    let line = "%0, %1 = edit_logits %l, %t, %f, %c, %n, %k, %b";
    // token 1 is biased by 5; the prompt has 0 and 1, the output 2 thrice and 4 once, the last of which is a draft
    let (tokens, counts, biases) = ([0, 1, 2], [0, 0, 3], [0.0, 5.0, 0.0]);
    let at = |penalties: [f64; 3], expected: [f64; 5]| {
        let args = vec![
            floats(&[1, 5], &[1.0, -2.0, 3.0, 0.5, -1.0]),
            ints(&[2], &[2, 4]),
            floats(&[1, 6], &[&[1.0, 1.0, 0.0], penalties.as_slice()].concat()),
            ints(&[1, 9], &[0, 0, 0, 0, 0, 0, 3, 1, 2]),
            ints(&[3], &tokens),
            ints(&[3], &counts),
            floats(&[3], &biases),
        ];
        check(types, line, args, &[&expected, &[expected.into_iter().fold(f64::NEG_INFINITY, f64::max)]]);
    };
    at([1.0, 0.0, 0.0], [1.0, 3.0, 3.0, 0.5, -1.0]);
    at([2.0, 0.0, 0.0], [0.5, 1.5, 1.5, 0.5, -2.0]);
    at([1.0, 0.75, 0.0], [1.0, 3.0, 2.25, 0.5, -1.75]);
    at([1.0, 0.0, 0.75], [1.0, 3.0, 0.75, 0.5, -1.75]);
    at([1.0, 0.0, -0.5], [1.0, 3.0, 4.5, 0.5, -0.5]);
    // bias before repetition: (-2 + 5) / 2; presence and frequency after it: 3 / 2 - 1 - 3 * 0.25
    at([2.0, 1.0, 0.25], [0.5, 1.5, -0.25, 0.5, -3.25]);
}

#[test]
fn a_draft_that_there_is_none_of_embeds_as_the_first_token() {
    let args = vec![ints(&[2], &[2, -1]), floats(&[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])];
    let rows = eval("%i: tensor<T x i32>, %w: weight<3 x 2 x f32>", "%0 = embed %i, %w", args).unwrap();
    assert_eq!(rows, [[5.0, 6.0, 1.0, 2.0]]);
}

#[test]
fn what_points_outside_is_an_error() {
    let types = "%i: tensor<T x i32>, %w: weight<3 x 2 x f32>";
    for id in [3, -2] {
        let args = vec![ints(&[1], &[id]), floats(&[3, 2], &[0.0; 6])];
        let error = eval(types, "%0 = embed %i, %w", args).unwrap_err().to_string();
        assert_eq!(error, format!("@f: embed: token id `{id}` is out of range, there are 3"));
    }
    let line = "%0, %1 = dispatch %ids {experts = 4}";
    let error = eval("%ids: tensor<T x 1 x i32>", line, vec![ints(&[1, 1], &[4])]).unwrap_err().to_string();
    assert_eq!(error, "@f: dispatch: expert id `4` is out of range, there are 4");
}

#[test]
fn arguments_must_agree_on_the_symbols() {
    let args = vec![floats(&[1, 2], &[0.0; 2]), floats(&[2, 2], &[0.0; 4])];
    let error = eval("%x: tensor<T x 2 x f32>, %y: tensor<T x 2 x f32>", "%0 = add %x, %y", args).unwrap_err();
    assert!(matches!(error, EvalError::Argument { name, .. } if name == "y"));
}

#[test]
fn contradicting_sequences_are_errors() {
    let types = "%p: tensor<T x i32>, %c: tensor<B+1 x i32>, %s: tensor<B x i32>, %r: tensor<B x i32>, %m: tensor<B x i32>, %t: tensor<B x P x i32>";
    let kept = |positions: &[i32], ends: &[i32], slots: &[i32], replay: &[i32]| {
        let batch = slots.len();
        let vector = |values: &[i32]| ints(&[values.len()], values);
        let (tentative, table) = (vector(&vec![1; batch]), ints(&[batch, 1], &vec![0; batch]));
        let args = vec![vector(positions), vector(ends), vector(slots), vector(replay), tentative, table];
        eval(types, "%0 = sequences %p, %c, %s, %r, %m, %t", args).map(|_| ()).map_err(|e| e.to_string())
    };
    let sequences =
        |positions: &[i32], ends: &[i32], slots: &[i32]| kept(positions, ends, slots, &vec![0; slots.len()]);
    assert_eq!(kept(&[3, 4], &[0, 1, 2], &[0, 1], &[8, 0]), Ok(()));
    assert!(kept(&[3, 4], &[0, 1, 2], &[0, 1], &[9, 0]).unwrap_err().contains("more than 8 tokens"));
    assert!(sequences(&[0, 1, 2, 3, 4, 5, 6, 7, 8], &[0, 9], &[0]).unwrap_err().contains("more than 8 tokens"));
    assert_eq!(sequences(&[0, 1], &[0, 1, 2], &[0, 1]), Ok(()));
    assert!(sequences(&[0, 1], &[0, 1, 2], &[1, 1]).unwrap_err().contains("slot 1 belongs to two"));
    assert!(sequences(&[0, 1], &[0, 1, 3], &[0, 1]).unwrap_err().contains("ascend"));
    assert!(sequences(&[0, 1], &[0, 2, 1], &[0, 1]).unwrap_err().contains("ascend"));
    assert!(sequences(&[0, -1], &[0, 2], &[0]).unwrap_err().contains("negative"));
}

/// A model of one head everywhere: `delta_rule` plus `attention`, both of `conv1d(embed(token))`.
const MODEL: &str = include_str!("graph/model.graph");

struct Source;

impl Source {
    /// `embed`: row v is (v, -v, v/2); `conv`: taps 1 and 2, of the older and the newer token.
    fn rows(name: &str) -> Option<(Vec<u64>, Vec<f32>)> {
        match name {
            "model.embed" => Some((vec![4, 3], (0..4).flat_map(|v| [v as f32, -v as f32, v as f32 / 2.0]).collect())),
            "model.conv.0" | "model.conv.1" => Some((vec![1, 2], vec![1.0, 2.0])),
            _ => None,
        }
    }
}

impl WeightSource for Source {
    fn tensor(&self, name: &str) -> Option<StoredTensor> {
        Self::rows(name).map(|(shape, _)| StoredTensor { shape, format: Format::F32 })
    }

    fn read_rows(&self, name: &str, first: u64, out: &mut [f32]) -> Result<(), SourceError> {
        let (shape, data) = Self::rows(name).ok_or_else(|| SourceError::Missing(name.to_owned()))?;
        let from = (first * shape[1]) as usize;
        out.copy_from_slice(&data[from..from + out.len()]);
        Ok(())
    }
}

fn model() -> Module {
    let module = parse::module(MODEL).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(verify::verify(&module), Ok(()));
    module
}

#[test]
fn a_step_computes_what_the_formulas_say() {
    let module = model();
    let mut session = Session::<f64>::new(&module, &Source, PAGE_TOKENS).unwrap();
    let outputs = session.step("step", &StepInputs::sequence(&[1, 2], 0, 4)).unwrap();
    // columns 1.. of the rows 1 and 2: (-1, 0.5), (-2, 1); convolved with taps (1, 2): (-2, 1), (-5, 2.5)
    let (x0, x1) = ([-2.0, 1.0], [-5.0, 2.5]);
    let dot = |a: [f64; 2], b: [f64; 2]| a[0] * b[0] + a[1] * b[1];
    // g and beta are the same for all tokens
    let (g, beta) = (-0.5f64, 0.25f64);
    let s0 = |i: usize, j: usize| beta * x0[i] * x0[j];
    let read = |j: usize| g.exp() * (s0(0, j) * x1[0] + s0(1, j) * x1[1]);
    let d = [beta * (x1[0] - read(0)), beta * (x1[1] - read(1))];
    let s1 = |i: usize, j: usize| g.exp() * s0(i, j) + x1[i] * d[j];
    let out0 = [0, 1].map(|j| s0(0, j) * x0[0] + s0(1, j) * x0[1]);
    let out1 = [0, 1].map(|j| s1(0, j) * x1[0] + s1(1, j) * x1[1]);
    let (a, b) = ((0.1 * dot(x1, x0)).exp(), (0.1 * dot(x1, x1)).exp());
    let attended = [x0, [(a * x0[0] + b * x1[0]) / (a + b), (a * x0[1] + b * x1[1]) / (a + b)]];
    for t in 0..2 {
        for j in 0..2 {
            let expected = [out0, out1][t][j] + attended[t][j];
            let found = outputs.hidden[2 * t + j];
            assert!((found - expected).abs() < 1e-9 * expected.abs(), "[{t}, {j}]: {found}, expected {expected}");
        }
    }
}

#[test]
fn steps_of_any_length_give_the_same_bits() {
    let module = model();
    let mut session = Session::<f32>::new(&module, &Source, PAGE_TOKENS).unwrap();
    let tokens = [1, 3, 2, 0, 1, 2, 3];
    let whole = session.step("step", &StepInputs::sequence(&tokens, 0, 4)).unwrap();
    let mut again = Session::with_weights(&module, session.weights(), PAGE_TOKENS);
    for cut in [1, 3, 6] {
        // position 0 begins anew: what the slot held before does not matter
        let head = again.step("step", &StepInputs::sequence(&tokens[..cut], 0, 4)).unwrap();
        let tail = again.step("step", &StepInputs::sequence(&tokens[cut..], cut as i32, 4)).unwrap();
        assert_eq!([head.logits, tail.logits].concat(), whole.logits);
        assert_eq!(session.state("layers.0.delta"), again.state("layers.0.delta"));
    }
}

#[test]
fn sequences_of_a_batch_do_not_see_each_other() {
    let module = model();
    let mut session = Session::<f32>::new(&module, &Source, PAGE_TOKENS).unwrap();
    let alone = session.step("step", &StepInputs::sequence(&[1, 3, 2], 0, 2)).unwrap();
    session.reset();
    let batch = StepInputs {
        tokens: vec![2, 2, 1, 3, 2, 3],
        positions: vec![0, 0, 0, 1, 2, 0],
        cu_seqlens: vec![0, 1, 2, 5, 6],
        slot: vec![4, -1, 7, 0],
        replay: Vec::new(),
        tentative: Vec::new(),
        page_table: vec![9, -1, -1, -1, 3, 5, 8, -1],
        pages_per_sequence: 2,
        logit_rows: vec![1, 4, 3, 2],
        hidden: None,
        wanted: Vec::new(),
    };
    let outputs = session.step("step", &batch).unwrap();
    assert!(outputs.logits[..4].iter().all(|&x| x == 0.0), "a row without a slot gives zeros");
    let rows = |i: usize| &alone.logits[i * 4..(i + 1) * 4];
    assert_eq!(outputs.logits[4..], [rows(2), rows(1), rows(0)].concat());
    let nextc_ir::eval::Datum::State(delta) = session.state("layers.0.delta").unwrap() else { panic!("a state") };
    assert_eq!(delta.units().map(|(slot, _)| slot).collect::<Vec<_>>(), [0, 4, 7]);
}

#[test]
fn a_failed_step_changes_nothing_and_says_why() {
    let module = model();
    let mut session = Session::<f32>::new(&module, &Source, PAGE_TOKENS).unwrap();
    session.step("step", &StepInputs::sequence(&[1], 0, 1)).unwrap();
    let before = session.state("layers.0.kv").cloned();
    let long = session.step("step", &StepInputs::sequence(&[1, 1], 1, 1)).unwrap_err();
    assert_eq!(long.to_string(), "@step: call: @mixer: append_kv: position `2` is out of range, there are 2");
    let wide = session.step("step", &StepInputs::sequence(&[9], 1, 1)).unwrap_err();
    assert_eq!(wide.to_string(), "@step: call: @embed: embed: token id `9` is out of range, there are 4");
    assert!(matches!(session.step("draft", &StepInputs::default()), Err(EvalError::NoFunction(_))));
    assert_eq!(session.state("layers.0.kv").cloned(), before);
}

#[test]
fn weights_that_the_checkpoint_lacks_are_errors() {
    let check = |from: &str, to: &str, expected: &str| {
        let module = parse::module(&MODEL.replace(from, to)).unwrap();
        let error = Session::<f32>::new(&module, &Source, PAGE_TOKENS).unwrap_err().to_string();
        assert_eq!(error, expected);
    };
    check("\"model.embed\"", "\"model.enbed\"", "weight `embed`: the checkpoint has no tensor `model.enbed`");
    check(
        "[0..4, col 1]",
        "[1..5, col 1]",
        "weight `embed`: rows 1..5 and columns 1..3 of `model.embed`, which is [4, 3]",
    );
    check(
        "[0..4, col 1]",
        "[0..4, col 2]",
        "weight `embed`: rows 0..4 and columns 2..4 of `model.embed`, which is [4, 3]",
    );
}
