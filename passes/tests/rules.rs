//! Every rewrite rule, on random instances that its left side accepts: both sides through the interpreter.
//!
//! A variable's name says what it may be bound to ([`candidates`]); a rule without an instance fails.

mod layers;
mod samples;

use std::collections::BTreeMap;

use egg::{ENodeOrVar, PatternAst, Var};
use layers::{Sizes, rows};
use nextc_ir::build::FunctionBuilder;
use nextc_ir::eval::{Cx, Datum, WeightStore, evaluate};
use nextc_ir::graph::Value;
use nextc_ir::types::StateKind;
use nextc_ir::{Attr, Attrs, Format, Op, Shape, Type};
use nextc_passes::egraph::{Data, Term, Typing};
use nextc_passes::rules::{Compiled, Rule, all, conditions, infer};
use samples::{PAGE_TOKENS, Rng, Step, difference};

/// Both sides are computed in f64.
const TOLERANCE: f64 = 1e-9;
/// Instances a rule is tested on, and attempts to find them.
const INSTANCES: usize = 12;
const ATTEMPTS: usize = 20_000;

fn sizes(rng: &mut Rng) -> Sizes {
    let (num_kv_heads, num_k_heads) = (rng.range(1, 2), rng.range(1, 2));
    let experts = rng.range(3, 7);
    Sizes {
        hidden: rng.range(2, 37),
        vocab: 7,
        num_heads: num_kv_heads * rng.range(1, 2),
        num_kv_heads,
        head_dim: rng.range(6, 20),
        frequencies: rng.range(1, 3),
        num_k_heads,
        num_v_heads: num_k_heads * rng.range(1, 3),
        head_k_dim: rng.range(2, 9),
        head_v_dim: rng.range(2, 9),
        taps: rng.range(2, 4),
        experts,
        top_k: rng.range(1, experts),
        expert_width: rng.range(2, 9),
        shared_width: rng.range(2, 9),
        mlp_width: rng.range(2, 20),
        layers: 1,
    }
}

/// What a variable of this name may be bound to. The wrong ones are there to be refused by types and side conditions.
fn candidates(name: &str, s: &Sizes) -> Vec<Data> {
    let weight = |shape: &[u64]| Type::weight(shape, Format::F32);
    let conv = |heads, width| Type::state(StateKind::Conv, &[heads, width, s.taps - 1]);
    let (q, v) = ([s.num_k_heads, s.head_k_dim], [s.num_v_heads, s.head_v_dim]);
    let (heads, kv_heads) = ([s.num_heads, s.head_dim], [s.num_kv_heads, s.head_dim]);
    let blocks = s.hidden.div_ceil(16);
    let types = match name {
        "?x" => vec![rows(&[s.hidden]), rows(&q)],
        "?ssq" => vec![rows(&[blocks])],
        "?gain" => vec![weight(&[s.hidden])],
        "?residual" => vec![rows(&[s.hidden]), rows(&[1])],
        "?row" => vec![rows(&[1]), rows(&[s.hidden])],
        "?w" => vec![
            weight(&[s.hidden, s.hidden]),
            weight(&[s.mlp_width, s.hidden]),
            weight(&[s.num_k_heads, s.head_k_dim, s.hidden]),
            weight(&[s.num_k_heads, s.head_k_dim, s.taps]),
        ],
        "?ws" => vec![Type::Bundle(vec![weight(&[s.mlp_width, s.hidden]), weight(&[2, 3, s.hidden])])],
        "?a" | "?b" => vec![rows(&[s.num_v_heads]), rows(&[1])],
        "?q" => vec![rows(&q), rows(&heads)],
        "?v" | "?z" => vec![rows(&v), rows(&kv_heads)],
        "?output_gate" => vec![rows(&heads)],
        "?q_norm" | "?k_norm" => vec![weight(&[s.head_dim])],
        "?inv_freq" => vec![weight(&[s.frequencies])],
        "?kv" => vec![Type::state(StateKind::Kv, &kv_heads)],
        "?seqs" => vec![Type::Sequences],
        "?a_log" | "?dt_bias" => vec![weight(&[s.num_v_heads])],
        "?norm" => vec![weight(&[s.head_v_dim])],
        "?delta" => vec![Type::state(StateKind::Delta, &[s.num_v_heads, s.head_k_dim, s.head_v_dim])],
        "?conv" | "?conv_q" | "?conv_k" => vec![conv(s.num_k_heads, s.head_k_dim)],
        "?conv_v" => vec![conv(s.num_v_heads, s.head_v_dim)],
        "?w_q" | "?w_k" => vec![weight(&[s.num_k_heads, s.head_k_dim, s.taps])],
        "?w_v" => vec![weight(&[s.num_v_heads, s.head_v_dim, s.taps])],
        "?logits" => vec![rows(&[s.experts])],
        "?router" => vec![weight(&[s.experts, s.hidden])],
        "?shared_gate" => vec![weight(&[1, s.hidden])],
        "?w_gate" | "?w_up" => vec![weight(&[s.experts, s.expert_width, s.hidden]), weight(&[s.mlp_width, s.hidden])],
        "?w_down" => vec![weight(&[s.experts, s.hidden, s.expert_width])],
        "?s_gate" | "?s_up" => vec![weight(&[s.shared_width, s.hidden])],
        "?s_down" => vec![weight(&[s.hidden, s.shared_width])],
        "?act" | "?h" => vec![rows(&[s.top_k, s.expert_width])],
        "?s" => vec![rows(&[s.hidden]), rows(&[s.shared_width])],
        "?weights" => vec![rows(&[s.top_k])],
        "?shared" => vec![rows(&[1])],
        "?ids" | "?order" => vec![Type::i32(Shape::rows(nextc_ir::Sym::T, &[s.top_k]))],
        "?table" => vec![Type::i32(Shape::new([2 * s.experts + 2]))],
        "?k" => vec![rows(&q), rows(&kv_heads)],
        _ => Vec::new(),
    };
    let attrs: Vec<Attr> = match name {
        "?k" => vec![s.top_k.into()],
        "?experts" => vec![s.experts.into(), (s.experts + 1).into()],
        "?width" => vec![s.hidden.into(), (s.hidden + 1).into()],
        "?eps" | "?norm_eps" => vec![1e-6.into(), 0.01.into()],
        "?scale" | "?factor" => vec![0.3.into(), 1.5.into()],
        _ => Vec::new(),
    };
    let values = types.into_iter().map(|ty| Data::Values(vec![ty]));
    values.chain(attrs.into_iter().map(Data::Attr)).collect()
}

type Binding = BTreeMap<String, Data>;

/// A binding of the rule's variables that its left side accepts.
fn instance(rule: &Compiled, s: &Sizes, rng: &mut Rng) -> Option<Binding> {
    let mut binding = Binding::new();
    for var in rule.find.vars() {
        let found = candidates(&var.to_string(), s);
        assert!(!found.is_empty(), "rule `{}`: no samples for `{var}`", rule.name);
        binding.insert(var.to_string(), rng.pick(&found).clone());
    }
    let typing = Typing::default();
    let computed = {
        let data = |var: Var| binding.get(&var.to_string()).cloned();
        infer(&typing, &rule.find.ast, &data)?;
        rule.applies(&typing, &data)?
    };
    binding.extend(computed.into_iter().map(|(var, data)| (var.to_string(), data)));
    Some(binding)
}

/// Both sides of every equation under a binding, as results of one function of the bound values.
struct Sides<'a> {
    binding: &'a Binding,
    builder: FunctionBuilder,
    params: BTreeMap<String, Value>,
}

impl Sides<'_> {
    fn value(&mut self, pattern: &PatternAst<Term>) -> Vec<Value> {
        let mut made: Vec<(Vec<Value>, Option<Attr>)> = Vec::new();
        for node in pattern {
            let next = match node {
                ENodeOrVar::Var(var) => match &self.binding[&var.to_string()] {
                    Data::Attr(attr) => (Vec::new(), Some(attr.clone())),
                    data => (vec![self.param(&var.to_string(), data.ty().expect("it is one value").clone())], None),
                },
                ENodeOrVar::ENode(Term::Attr(attr)) => (Vec::new(), Some(attr.clone())),
                ENodeOrVar::ENode(term @ Term::Op(op, _)) => (self.op(*op, term, &made), None),
            };
            made.push(next);
        }
        made.pop().expect("a pattern is not empty").0
    }

    fn param(&mut self, name: &str, ty: Type) -> Value {
        let builder = &mut self.builder;
        *self.params.entry(name.to_owned()).or_insert_with(|| builder.param(name, ty))
    }

    fn op(&mut self, op: Op, term: &Term, made: &[(Vec<Value>, Option<Attr>)]) -> Vec<Value> {
        let (operands, values) = term.split();
        let at = |id: &egg::Id| &made[usize::from(*id)];
        let attr = |id| at(id).1.clone().expect("it is an attribute");
        if op == Op::Proj {
            let Attr::Int(index) = attr(&values[0]) else { panic!("an index is an integer") };
            return vec![at(&operands[0]).0[index as usize]];
        }
        let attrs = Attrs(op.def().attrs.iter().map(|n| (*n).to_owned()).zip(values.iter().map(attr)).collect());
        let operands: Vec<Value> = operands.iter().map(|id| at(id).0[0]).collect();
        self.builder.op_n(op, &operands, attrs).expect("both sides are well typed")
    }
}

/// The largest difference between the sides of the rule's equations under a binding.
fn compare(rule: &Compiled, binding: &Binding, s: &Sizes, rng: &mut Rng) -> Result<f64, String> {
    let mut sides = Sides { binding, builder: FunctionBuilder::new("sides"), params: BTreeMap::new() };
    let (mut results, mut counts) = (Vec::new(), Vec::new());
    for (left, right) in &rule.equations {
        let (left, right) = (sides.value(left), sides.value(right));
        counts.push(left.len());
        results.extend([left, right].concat());
    }
    let function = sides.builder.finish(results);
    let step = Step::new(rng);
    let choices = step.choices(s.top_k, s.experts, rng).map_err(|e| e.to_string())?;
    let args = function.params.iter().map(|&p| {
        let node = function.node(p);
        match node.name.as_deref() {
            Some("?ids") => choices[0].clone(),
            Some("?order") => choices[1].clone(),
            Some("?table") => choices[2].clone(),
            name => step.datum(&node.types[0], name == Some("?ssq"), rng),
        }
    });
    let args: Vec<Datum<f64>> = args.collect();
    let out = evaluate(&function, args, &WeightStore::new(), &Cx::new(PAGE_TOKENS)).map_err(|e| e.to_string())?;
    let mut rest = out.as_slice();
    let mut worst: f64 = 0.0;
    for count in counts {
        let (left, after) = rest.split_at(count);
        let (right, after) = after.split_at(count);
        rest = after;
        worst = left.iter().zip(right).map(|(l, r)| difference(l, r)).fold(worst, f64::max);
    }
    Ok(worst)
}

/// Compares the sides of a rule on random instances; an error says which instance differs.
fn check(rule: &Rule) -> Result<(), String> {
    let compiled = rule.compile().map_err(|e| e.to_string())?;
    let mut rng = Rng(rule.name.bytes().fold(7u64, |seed, b| seed.wrapping_mul(31) + u64::from(b)));
    let mut found = 0;
    for _ in 0..ATTEMPTS {
        let s = sizes(&mut rng);
        let Some(binding) = instance(&compiled, &s, &mut rng) else { continue };
        let worst = compare(&compiled, &binding, &s, &mut rng)?;
        if worst > TOLERANCE {
            let bound: Vec<String> = binding.iter().map(|(name, data)| format!("{name} = {data}")).collect();
            return Err(format!("rule `{}`: the sides differ by {worst:e} where {}", rule.name, bound.join(", ")));
        }
        found += 1;
        if found == INSTANCES {
            return Ok(());
        }
    }
    Err(format!("rule `{}` has {found} instances, expected {INSTANCES}", rule.name))
}

#[test]
fn every_rule_states_the_truth() {
    let errors: Vec<String> = all().iter().filter_map(|rule| check(rule).err()).collect();
    assert!(errors.is_empty(), "{}", errors.join("\n"));
}

#[test]
fn names_are_unique_and_kebab_case() {
    let mut names: Vec<&str> = all().iter().map(|rule| rule.name).collect();
    assert!(names.iter().all(|n| n.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')));
    names.sort_unstable();
    let count = names.len();
    names.dedup();
    assert_eq!(names.len(), count);
}

fn refused(rule: &Rule, reason: &str) {
    let error = check(rule).expect_err("the rule is wrong");
    assert!(error.contains(reason), "{error}");
}

#[test]
fn a_wrong_rule_is_caught() {
    let rule = |name, left, right| Rule::new(name, vec![(left, right)]);
    refused(&rule("gain", "(rms_norm_plus_one ?x ?gain ?eps)", "(rms_norm ?x ?gain ?eps)"), "differ");
    refused(&rule("gate", "(swiglu ?a ?b)", "(swiglu ?b ?a)"), "differ");
    // a factor a column does not pass through a matmul
    let no_condition = rule("column", "(linear (mul ?x ?row) ?w)", "(mul (linear ?x ?w) ?row)");
    refused(&no_condition, "differ");
    // a state that was not written
    refused(&rule("state", "(proj (conv1d ?x ?w ?conv ?seqs) 1)", "?conv"), "differ");
    // the width is the norm's divisor: as many sums of squares do not make it the same
    let width = rule("width", "(rms_scale ?ssq ?width ?eps)", "(rms_scale ?ssq 3 ?eps)");
    refused(&width, "differ");
}

#[test]
fn a_rule_without_an_instance_is_an_error() {
    let never = rule_that_never_applies();
    refused(&never, "has 0 instances");
}

fn rule_that_never_applies() -> Rule {
    Rule::new("never", vec![("(mul ?x ?row)", "(mul ?row ?x)")]).when(conditions::is_width("?row", "?x"))
}

#[test]
fn a_pattern_that_is_none_is_an_error() {
    let broken = |left, right| Rule::new("broken", vec![(left, right)]).compile().map(|_| ()).unwrap_err().to_string();
    assert_eq!(broken("(mul ?a ?b)", "(mul ?a ?c)"), "rule `broken`: `?c`: is not bound");
    assert!(broken("(mull ?a ?b)", "?a").contains("mull"));
    assert!(broken("(mul ?a)", "?a").contains("`mul` has 1 operands and attributes, expected 2"));
}
