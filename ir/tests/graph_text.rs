//! Graph text: what is printed reads back as the same text, and no text makes the parser panic.

use nextc_ir::graph::{Origin, RowRun, WeightDecl};
use nextc_ir::{Format, Module, parse, print};
use proptest::prelude::*;

const MODULE: &str = include_str!("graph/module.graph");

fn check_error(text: &str, expected: &str) {
    assert_eq!(parse::module(text).unwrap_err().to_string(), expected);
}

#[test]
fn a_module_reads_back_as_itself() {
    let module = parse::module(MODULE).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(print::module(&module), MODULE);
}

#[test]
fn comments_and_missing_result_types_are_read() {
    let text = "; test pass=rewrite\nfunc @block(%q: tensor<T x 4 x f32>, %g: tensor<T x 4 x f32>) {\n  \
                %0 = sigmoid %g ; the gate\n  %1 = mul %0, %q\n  return %1\n}";
    let function = parse::function(text).unwrap();
    assert!(print::function(&function).starts_with(
        "func @block(%q: tensor<T x 4 x f32>, %g: tensor<T x 4 x f32>) -> (tensor<T x 4 x f32>) {\n  %0 = sigmoid %g\n"
    ));
}

#[test]
fn rows_read_back_whether_they_follow_a_pattern_or_not() {
    let run = |tensor: &str, first, rows, column| RowRun { tensor: tensor.into(), first, rows, column };
    let cases = [
        vec![run("a", 0, 4, 0)],
        vec![run("a", 0, 4, 0), run("a", 4, 4, 0)],
        vec![run("e.0.w", 0, 4, 0), run("e.1.w", 0, 4, 0), run("e.2.w", 0, 4, 0), run("e.4.w", 0, 4, 0)],
        (7..11).map(|i| run(&format!("l1.e.{i}.w2"), 2, 4, 3)).collect(),
        (0..4).map(|i| run(&format!("{{}}{i}"), 0, 1, 0)).collect(),
        vec![run("a", 0, 2, 1), run("a", 10, 2, 1), run("a", 20, 2, 1), run("a", 30, 2, 0)],
        vec![run("odd \"name\"\n", 0, 2, 0); 3],
        vec![],
    ];
    for runs in cases {
        let decl = WeightDecl { shape: vec![8, 2], in_rank: 1, format: Format::F16, origin: Origin::Rows(runs) };
        let mut module = Module::default();
        module.weights.insert("first".into(), decl.clone());
        module.weights.insert("second".into(), decl);
        let text = print::module(&module);
        let read = parse::module(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        assert_eq!(read.weights, module.weights, "{text}");
    }
}

#[test]
fn an_error_says_where_and_what() {
    let in_block =
        |line: &str| format!("func @f(%x: tensor<T x 4 x f32>, %y: tensor<T x 3 x f32>) {{\n  {line}\n  return %0\n}}");
    check_error(&in_block("%0 = mul %x, %z"), "line 2, column 16: unknown value `z`");
    check_error(&in_block("%0 = l2_norm %x"), "line 2, column 8: l2_norm: attribute `eps` is missing or not a number");
    check_error(
        &in_block("%0 = mul %x, %y"),
        "line 2, column 8: mul: `b` is tensor<T x 3 x f32>, expected what broadcasts with T x 4",
    );
    check_error(&in_block("%0 = call @g()"), "line 2, column 13: unknown function `@g`");
    check_error(&in_block("%0, %1 = neg %x"), "line 2, column 12: neg has 1 results, 2 are named");
    check_error(&in_block("%0 = param"), "line 2, column 8: unknown op `param`");
    check_error(&in_block("%x = neg %x"), "line 2, column 8: value `x` is there already");
    check_error(&in_block("%0 = neg %x !kernel -1"), "line 2, column 23: `-1` is out of range here");
    check_error(
        "func @f(%x: tensor<T x 4 x f32>) -> (sequences) {\n  return %x\n}",
        "line 2, column 10: returns (tensor<T x 4 x f32>), declared (sequences)",
    );
    let deep = parse::module(&format!("func @f(%x: {}", "bundle<".repeat(100_000))).unwrap_err();
    assert_eq!(deep.problem, parse::Problem::TooDeep);
}

#[test]
fn a_drawing_shows_kernels_as_boxes() {
    let module = parse::module(MODULE).unwrap();
    let text = print::dot(module.function("norm").unwrap());
    assert!(text.contains("subgraph cluster_3") && text.contains("rms_norm") && text.ends_with("}\n"), "{text}");
}

proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(
        at in 0..MODULE.len(),
        length in 0usize..40,
        insert in prop_oneof![
            Just(String::new()),
            Just("bundle<bundle<".to_owned()),
            Just("99999999999999999999".to_owned()),
            Just("18446744073709551615".to_owned()),
            "[ -~]{0,8}",
            any::<String>(),
        ],
    ) {
        let chars: Vec<char> = MODULE.chars().collect();
        let end = (at + length).min(chars.len());
        let text: String = chars[..at].iter().copied().chain(insert.chars()).chain(chars[end..].iter().copied()).collect();
        if let Ok(module) = parse::module(&text) {
            let printed = print::module(&module);
            let again = parse::module(&printed).expect("what is printed can be read");
            prop_assert_eq!(print::module(&again), printed);
        }
    }
}
