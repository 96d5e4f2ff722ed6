//! Kernels from a function: their own text after `lower`, and the text that a backend makes of them.
//!
//! - `; expect-line TEXT`: a line of what is emitted has TEXT in it, after the line of the `expect-line` before
//! - `; expect-none TEXT`: no line has it

use nextc_ir::kernel::{parse, print};
use nextc_ir::schedule::KernelModule;
use nextc_passes::legalise::legalise;

use super::{Case, Checked, graph, line, machine, run, text};

/// `test pass=lower`: the kernels of a function, for 256-bit vectors.
pub fn check_lower(case: &Case) -> Checked {
    case.only(&[])?;
    let kernels = run::kernels(&graph::module(case)?, &graph::target())?;
    let texts: Vec<String> = kernels.module.kernels.iter().map(print::kernel).collect();
    case.compare(&texts.join("\n"))
}

/// `test emit=BACKEND`.
pub fn check(case: &Case, is_kernel: bool) -> Checked {
    case.only(&["expect-line", "expect-none"])?;
    let emitted = match case.option("emit") {
        Some("clif") => {
            let target = graph::target().for_cranelift();
            let module = module(case, is_kernel, &target)?;
            nextc_cranelift::compile(&module, &target).map_err(text)?;
            of_all(&module, |name| nextc_cranelift::clif(&module, &target, name).map_err(text))?
        }
        #[cfg(feature = "llvm")]
        Some("llvm") => {
            let target = graph::target();
            let module = module(case, is_kernel, &target)?;
            nextc_llvm::compile(&module, &target).map_err(text)?;
            of_all(&module, |name| nextc_llvm::ir(&module, &target, name).map_err(text))?
        }
        #[cfg(not(feature = "llvm"))]
        Some("llvm") => {
            eprintln!("skipped: {}: built without the feature `llvm`", case.path.display());
            return Ok(());
        }
        other => return Err(format!("nothing emits {other:?}, expected `clif` or `llvm`")),
    };
    check_lines(case, &emitted)
}

fn module(case: &Case, is_kernel: bool, target: &nextc_ir::Target) -> Checked<KernelModule> {
    if !is_kernel {
        return Ok(run::kernels(&graph::module(case)?, target)?.module);
    }
    let kernel = parse::kernel(&case.body_in_place()).map_err(text)?;
    legalise(machine::module(vec![kernel]), target).map_err(text)
}

fn of_all(module: &KernelModule, emit: impl Fn(&str) -> Checked<String>) -> Checked<String> {
    module.kernels.iter().map(|k| emit(&k.name)).collect()
}

fn check_lines(case: &Case, emitted: &str) -> Checked {
    let mut rest = emitted.lines();
    for wanted in case.directives("expect-line") {
        if !rest.by_ref().any(|l| l.contains(wanted)) {
            return Err(format!("no line has `{wanted}` where it should, in\n{emitted}"));
        }
    }
    match case.directives("expect-none").find(|unwanted| emitted.contains(unwanted)) {
        Some(unwanted) => Err(format!("`{unwanted}` is in\n{emitted}")),
        None if case.directives.is_empty() => Err(format!("nothing is expected of\n{}", line(emitted))),
        None => Ok(()),
    }
}
