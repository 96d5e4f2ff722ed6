//! Graph IR: its text, its verifier, the passes over it.

use nextc_ir::target::Activations;
use nextc_ir::verify::{VerifyError, verify};
use nextc_ir::{Module, Target, parse, print};
use nextc_passes::{PIPELINE, Pass, rewrite};

use super::{Case, Checked, lines, text};

/// The machine that the passes think of: it is the same wherever the tests run.
pub fn target() -> Target {
    Target::named("x86-64-v3").expect("the least CPU there is")
}

/// The same with vectors of 512 bits, for which other tiles are chosen.
pub fn wide_target() -> Target {
    Target::named("x86-64-v4").expect("it is in the table of CPUs")
}

/// One with a matrix unit, in which activations are rounded.
pub fn tiles_target() -> Target {
    let named = Target::named("sapphirerapids").expect("it is in the table of CPUs");
    Target { activations: Activations::Bf16, ..named }
}

/// One whose vectors multiply bytes, in which activations are rounded to them.
pub fn bytes_target() -> Target {
    let named = Target::named("icelake-server").expect("it is in the table of CPUs");
    Target { activations: Activations::Int8, ..named }
}

/// One whose vectors multiply pairs of bfloat16, in which activations are rounded.
pub fn pairs_target() -> Target {
    let named = Target::named("cooperlake").expect("it is in the table of CPUs");
    Target { activations: Activations::Bf16, ..named }
}

/// A GPU.
pub fn gpu_target() -> Target {
    Target::gpu(nextc_ir::target::GPUS[0].name).expect("it is in the table of GPUs")
}

/// One with a single multiprocessor, on which kernels for many rows begin with the fewest.
pub fn small_gpu_target() -> Target {
    let mut target = gpu_target();
    if let Some(gpu) = &mut target.gpu {
        gpu.multiprocessors = 1;
    }
    target
}

/// The module that the text says.
pub fn module(case: &Case) -> Checked<Module> {
    parse::module(&case.body_in_place()).map_err(text)
}

/// `test text`.
pub fn check_text(case: &Case) -> Checked {
    case.only(&[])?;
    let module = module(case)?;
    // a file of one function leaves the facts of a model out
    let has_facts = case.body.trim_start().starts_with("module");
    case.compare_body(&if has_facts { print::module(&module) } else { functions(&module) })
}

/// The functions as text, with a line between them.
fn functions(module: &Module) -> String {
    module.functions.iter().map(print::function).collect::<Vec<_>>().join("\n")
}

/// `test verify`.
pub fn check_verify(case: &Case) -> Checked {
    case.only(&[])?;
    let body = case.body_in_place();
    let errors = match parse::module(&body) {
        Err(error) => vec![(error.line, error.problem.to_string())],
        Ok(module) => {
            let errors = verify(&module).err().unwrap_or_default();
            errors.into_iter().map(|e| (place(&body, &e), e.problem.to_string())).collect()
        }
    };
    case.compare_errors(&errors)
}

/// The line that an error of the verifier speaks of: that of the value, or the head of the function.
fn place(body: &str, error: &VerifyError) -> usize {
    let head = format!("func @{}(", error.function);
    let numbered = || body.lines().enumerate().skip_while(|(_, l)| !l.starts_with(&head));
    let value = error.place.trim_end_matches(": ");
    let defines = |l: &str| {
        let left = l.split(" = ").next().unwrap_or_default();
        !value.is_empty() && l.contains(" = ") && left.split(',').any(|name| name.trim() == value)
    };
    let at = numbered().find(|(_, l)| defines(l)).or_else(|| numbered().next());
    at.map_or(1, |(i, _)| i + 1)
}

/// `test pass=NAME`: this pass alone, or with those from `from=NAME` on.
pub fn check_pass(case: &Case, name: &str) -> Checked {
    case.only(&[])?;
    let mut module = module(case)?;
    verify(&module).map_err(lines)?;
    for pass in passes(case, name)? {
        module = (pass.run)(module, &target()).map_err(text)?;
        verify(&module).map_err(lines)?;
    }
    case.compare(&functions(&module))
}

/// The passes up to `name` that the header asks for.
fn passes(case: &Case, name: &str) -> Checked<&'static [Pass]> {
    let at = |name: &str| PIPELINE.iter().position(|p| p.name == name).ok_or_else(|| format!("no pass `{name}`"));
    let last = at(name)?;
    Ok(&PIPELINE[case.option("from").map_or(Ok(last), at)?..=last])
}

/// The rules that fire in a case of the pass `rewrite`.
pub fn rules_fired(case: &Case) -> Vec<String> {
    let traced = || {
        let earlier = passes(case, rewrite::PASS.name)?.iter().filter(|p| p.name != rewrite::PASS.name);
        let module = earlier.into_iter().try_fold(module(case)?, |m, p| (p.run)(m, &target())).map_err(text)?;
        rewrite::run_traced(module, &target()).map_err(text)
    };
    let (_, trace) = traced().unwrap_or_else(|e: String| panic!("{}: {e}", case.path.display()));
    trace.functions.into_iter().flat_map(|f| f.fired.into_keys()).collect()
}
