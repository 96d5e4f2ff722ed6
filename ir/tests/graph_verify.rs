//! The verifier finds what is wrong, all of it, and says where.

use nextc_ir::graph::{Use, Value};
use nextc_ir::{Attrs, Module, Op, Shape, Sym, Type, parse, verify};

const MODEL: &str = include_str!("graph/model.graph");

/// What the verifier says of the model after `change`.
fn errors(change: impl FnOnce(&mut Module)) -> Vec<String> {
    let mut module = parse::module(MODEL).unwrap_or_else(|e| panic!("{e}"));
    change(&mut module);
    verify::verify(&module).err().into_iter().flatten().map(|e| e.to_string()).collect()
}

fn check(change: impl FnOnce(&mut Module), expected: &[&str]) {
    assert_eq!(errors(change), expected);
}

/// The first result of the first node with `op` in a function.
fn value(module: &Module, function: &str, op: Op) -> Value {
    let f = module.function(function).expect("the function is there");
    let node = f.graph.node_indices().find(|&id| f.node(id).op == op).expect("the op is there");
    Value { node, result: 0 }
}

#[test]
fn a_sound_module_passes() {
    check(|_| {}, &[]);
}

#[test]
fn every_error_is_reported() {
    check(
        |m| {
            let add = value(m, "mixer", Op::Add);
            let scale = value(m, "mixer", Op::Scale);
            let mixer = m.function_mut("mixer").unwrap();
            mixer.graph[add.node].types = vec![Type::f32(Shape::rows(Sym::T, &[2]))];
            mixer.graph[scale.node].attrs = Attrs::none().with("factor", "big").with("extra", 1i64);
            m.weights.shift_remove("unit");
        },
        &[
            "@mixer: %3: scale: attributes are [\"extra\", \"factor\"], expected [\"factor\"]",
            "@mixer: %3: scale: attribute `factor` is missing or not a number",
            "@mixer: %4: add: declared (tensor<T x 2 x f32>), expected (tensor<T x 1 x f32>)",
            "@mixer: %6: delta_rule: `g` is tensor<T x 2 x f32>, expected tensor<T x 1 x f32>",
            "@step: %unit: weight `unit` is not in the table",
        ],
    );
}

#[test]
fn operands_must_be_there_and_in_order() {
    check(
        |m| {
            let append = value(m, "mixer", Op::AppendKv);
            let mixer = m.function_mut("mixer").unwrap();
            mixer.graph.add_edge(append.node, append.node, Use { operand: 9, result: 0 });
        },
        &["@mixer: the graph has a cycle"],
    );
    check(
        |m| {
            let (append, x) = (value(m, "mixer", Op::AppendKv), value(m, "mixer", Op::Linear));
            let mixer = m.function_mut("mixer").unwrap();
            mixer.graph.add_edge(x.node, append.node, Use { operand: 5, result: 0 });
            let results = mixer.results.len();
            mixer.results.push(Value { node: x.node, result: results as u32 });
        },
        &[
            "@mixer: %8: append_kv: operand 4 is missing, is there twice or takes a result that is not there",
            "@mixer: result 4 is not there",
        ],
    );
    check(
        |m| {
            let step = m.function_mut("step").unwrap();
            let gone = step.results[0].node;
            step.graph.remove_node(gone);
        },
        &["@step: a parameter or result is a node that is not there"],
    );
}

#[test]
fn calls_name_earlier_functions_and_pass_what_they_take() {
    check(|m| m.functions.swap(2, 3), &["@step: %5: call of `@head`, which is no earlier function"]);
    check(
        |m| {
            let embed = m.function_mut("embed").unwrap();
            let token = embed.params[0];
            embed.graph[token].types = vec![Type::i32(Shape::new([Sym::R]))];
            let out = embed.results[0].node;
            embed.graph[out].types = vec![Type::f32(Shape::rows(Sym::R, &[1, 2]))];
        },
        &[
            "@step: %0: call of `@embed` passes (tensor<T x i32>, weight<4 x 1 x 2 x f32>), expected (tensor<R x i32>, \
             weight<4 x 1 x 2 x f32>)",
            "@step: %0: call: declared (tensor<T x 1 x 2 x f32>), expected (tensor<R x 1 x 2 x f32>)",
        ],
    );
    check(
        |m| m.functions[1].name = "embed".into(),
        &["@embed: another function has this name", "@step: %1: call of `@mixer`, which is no earlier function"],
    );
}

#[test]
fn a_weight_has_the_shape_and_format_of_the_table() {
    check(
        |m| {
            m.weights["conv"].format = nextc_ir::Format::Bf16;
            m.weights["unit"].in_rank = 4;
        },
        &[
            "@weights: weight `unit` has more input dimensions than dimensions",
            "@step: %conv: weight: declared (weight<1 x 2 x 2 x f32>), expected (weight<1 x 2 x 2 x bf16>)",
        ],
    );
}

#[test]
fn a_state_has_one_writer_and_its_last_version_is_returned() {
    check(
        |m| m.function_mut("step").unwrap().results.swap(3, 4),
        &["@step: returns states (%3, %2, %4), expected the last versions (%2, %3, %4)"],
    );
    check(
        |m| {
            let append = value(m, "mixer", Op::AppendKv);
            let mixer = m.function_mut("mixer").unwrap();
            let operands = mixer.operands(append.node);
            let ty = mixer.ty(append).clone();
            mixer.add_node(Op::AppendKv, &operands, Attrs::none(), vec![ty]);
        },
        &[
            "@mixer: %kv: this state is written 2 times",
            "@mixer: returns states (%1, %7, %8), expected the last versions (%1, %7, %11)",
        ],
    );
    // a state that nobody writes may be returned or not
    let reader = "func @f(%q: tensor<T x 1 x 2 x f32>, %kv: state<kv x 1 x 2>, %s: sequences) {\n\
                  %0 = attention %q, %kv, %s {scale = 1}\nreturn %0}";
    for text in [reader.to_owned(), reader.replace("return %0", "return %0, %kv")] {
        assert_eq!(verify::verify(&parse::module(&text).unwrap()), Ok(()));
    }
    let twice = parse::module(&reader.replace("return %0", "return %kv, %kv")).unwrap();
    let errors = verify::verify(&twice).unwrap_err();
    assert_eq!(errors[0].to_string(), "@f: returns states (%kv, %kv), expected the last versions ([%kv])");
}
