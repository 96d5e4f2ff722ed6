//! `nextc dump`: the program at each stage of its compilation.

use anyhow::bail;
use nextc_ir::graph::{Function, Module};
use nextc_ir::kernel::{Kernel, print as kernel_text};
use nextc_ir::{Target, print};
use nextc_passes::{PIPELINE, rewrite, run_until};

use crate::cli::{Backend, DumpArgs, Format, Stage};
use crate::compile::{self, Plan};
use crate::{diff, show};

/// Prints a stage, or what changed on the way to it.
pub fn run(args: &DumpArgs) -> anyhow::Result<()> {
    let stage = stage_of(args)?;
    let mut plan = Plan::new(&args.model, implied_backend(stage))?;
    check_backend(stage, &plan)?;
    let model = compile::load(&args.model, plan.kv)?;
    plan.target = compile::target_of(&plan, &model);
    let graph = model.module;
    if args.diff {
        return show::print(&difference(graph, &plan.target, args)?);
    }
    match stage {
        Stage::Graph => match &args.after {
            Some(pass) => print_graph(&run_until(graph, &plan.target, pass)?, args),
            None => print_graph(&graph, args),
        },
        Stage::Fused => print_graph(&compile::fuse(graph, &plan.target)?, args),
        _ => print_code(stage, graph, &plan, args),
    }
}

fn stage_of(args: &DumpArgs) -> anyhow::Result<Stage> {
    let stage = args.stage.unwrap_or(if args.diff && args.after.is_none() { Stage::Fused } else { Stage::Graph });
    let of_graph = matches!(stage, Stage::Graph | Stage::Fused);
    if args.format == Format::Dot && !of_graph {
        bail!("`--format dot` draws graphs, expected `--stage graph` or `--stage fused`");
    }
    if args.diff && (stage != Stage::Fused && args.after.is_none() || args.format == Format::Dot) {
        bail!("`--diff` compares the text of graphs; give it `--after PASS`, or `--stage fused` for all passes");
    }
    Ok(stage)
}

/// The backend that a stage belongs to.
fn implied_backend(stage: Stage) -> Option<Backend> {
    match stage {
        Stage::Llvm => Some(Backend::Llvm),
        Stage::Clif => Some(Backend::Cranelift),
        _ => None,
    }
}

fn check_backend(stage: Stage, plan: &Plan) -> anyhow::Result<()> {
    if stage == Stage::Ptx && plan.target.gpu.is_none() {
        bail!("`--stage ptx` is of GPUs; use `--target cuda`");
    }
    match (stage, plan.backend) {
        (Stage::Llvm, Backend::Cranelift) => bail!("`--stage llvm` is of the backend llvm, not of cranelift"),
        (Stage::Clif, Backend::Llvm) => bail!("`--stage clif` is of the backend cranelift, not of llvm"),
        _ => Ok(()),
    }
}

fn print_graph(module: &Module, args: &DumpArgs) -> anyhow::Result<()> {
    let Some(name) = &args.function else {
        return show::print(&match args.format {
            Format::Text => print::module(module),
            Format::Dot => module.functions.iter().map(print::dot).collect(),
        });
    };
    let function = find_function(module, name)?;
    show::print(&match args.format {
        Format::Text => print::function(function),
        Format::Dot => print::dot(function),
    })
}

fn find_function<'m>(module: &'m Module, name: &str) -> anyhow::Result<&'m Function> {
    let name = name.strip_prefix('@').unwrap_or(name);
    match module.function(name) {
        Some(function) => Ok(function),
        None => {
            bail!("there is no function `{name}`, expected one of {}", names(module.functions.iter().map(|f| &f.name)))
        }
    }
}

fn names<'a>(names: impl Iterator<Item = &'a String>) -> String {
    names.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// What the pass `--after` changed, or all passes together; and for rewriting, which rules fired.
fn difference(graph: Module, target: &Target, args: &DumpArgs) -> anyhow::Result<String> {
    let before = match &args.after {
        Some(pass) => before_pass(graph, target, pass)?,
        None => graph,
    };
    let mut text = String::new();
    let after = match args.after.as_deref() {
        Some(pass) if pass == rewrite::PASS.name => {
            let (after, trace) = rewrite::run_traced(before.clone(), target)?;
            text.push_str(&of_function(&trace, args.function.as_deref()));
            after
        }
        Some(pass) => (pass_called(pass)?.run)(before.clone(), target)?,
        None => compile::fuse(before.clone(), target)?,
    };
    text.push_str(&diff::functions(&named(&before, args), &named(&after, args)));
    Ok(text)
}

fn before_pass(graph: Module, target: &Target, pass: &str) -> anyhow::Result<Module> {
    pass_called(pass)?;
    let earlier = PIPELINE.iter().take_while(|p| p.name != pass).last();
    Ok(match earlier {
        Some(earlier) => run_until(graph, target, earlier.name)?,
        None => graph,
    })
}

fn pass_called(name: &str) -> anyhow::Result<&'static nextc_passes::Pass> {
    match PIPELINE.iter().find(|p| p.name == name) {
        Some(pass) => Ok(pass),
        None => Err(nextc_passes::Error::NoPass(name.to_owned()).into()),
    }
}

fn of_function(trace: &rewrite::Trace, function: Option<&str>) -> String {
    let wanted = |name: &str| function.is_none_or(|f| f.strip_prefix('@').unwrap_or(f) == name);
    trace.functions.iter().filter(|t| wanted(&t.function)).map(ToString::to_string).collect()
}

/// The functions to compare: all, or the one of `--function` where the module has it.
fn named(module: &Module, args: &DumpArgs) -> Vec<diff::Named> {
    let wanted = args.function.as_deref().map(|f| f.strip_prefix('@').unwrap_or(f));
    let functions = module.functions.iter().filter(|f| wanted.is_none_or(|w| f.name == w));
    functions.map(|f| (f.name.clone(), print::function(f))).collect()
}

fn print_code(stage: Stage, graph: Module, plan: &Plan, args: &DumpArgs) -> anyhow::Result<()> {
    let fused = compile::fuse(graph, &plan.target)?;
    let kernels = compile::lower_to_kernels(&fused, &plan.target)?;
    let chosen: Vec<&Kernel> = match &args.function {
        None if stage == Stage::Kernels => return show::print(&kernel_text::module(&kernels)),
        None => kernels.kernels.iter().collect(),
        Some(name) => {
            let name = name.strip_prefix('@').unwrap_or(name);
            let found: Vec<_> = kernels.kernels.iter().filter(|k| k.name == name).collect();
            if found.is_empty() {
                bail!(
                    "there is no kernel `{name}`, expected one of {}",
                    names(kernels.kernels.iter().map(|k| &k.name))
                );
            }
            found
        }
    };
    for kernel in chosen {
        let text = match (stage, plan.backend) {
            (Stage::Kernels, _) => kernel_text::kernel(kernel),
            (Stage::Clif, _) => nextc_cranelift::clif(&kernels, &plan.target, &kernel.name)?,
            (_, Backend::Cranelift) => nextc_cranelift::asm(&kernels, &plan.target, &kernel.name)?,
            (_, Backend::Llvm) => llvm_text(stage, &kernels, plan, kernel)?,
        };
        show::print(&format!("{}\n\n", text.trim_end()))?;
    }
    Ok(())
}

#[cfg(feature = "llvm")]
fn llvm_text(
    stage: Stage,
    kernels: &nextc_ir::schedule::KernelModule,
    plan: &Plan,
    kernel: &Kernel,
) -> anyhow::Result<String> {
    Ok(match stage {
        Stage::Llvm => nextc_llvm::ir(kernels, &plan.target, &kernel.name)?,
        _ => nextc_llvm::asm(kernels, &plan.target, &kernel.name)?,
    })
}

#[cfg(not(feature = "llvm"))]
fn llvm_text(_: Stage, _: &nextc_ir::schedule::KernelModule, _: &Plan, _: &Kernel) -> anyhow::Result<String> {
    bail!("this nextc was built without LLVM")
}
