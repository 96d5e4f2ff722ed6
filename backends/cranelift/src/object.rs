//! Compiled functions as one ELF object. Functions are compiled side by side and laid down in the order of the module.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use cranelift::codegen::control::ControlPlane;
use cranelift::codegen::{CompiledCode, Context};
use cranelift::prelude::isa::{OwnedTargetIsa, TargetIsa};
use cranelift_module::{Linkage, Module, default_libcall_names};
use cranelift_object::object::SectionKind;
use cranelift_object::{ObjectBuilder, ObjectModule};
use nextc_ir::kernel::Kernel;

use crate::Error;
use crate::function::{self, Part};

/// One function to compile.
struct Job<'a> {
    kernel: &'a Kernel,
    part: Part,
    symbol: String,
}

/// Machine code of one function.
struct Code {
    bytes: Vec<u8>,
    alignment: u64,
}

/// The object with every part of every kernel.
pub fn build(kernels: &[Kernel], isa: &OwnedTargetIsa) -> Result<Vec<u8>, Error> {
    let jobs: Vec<Job<'_>> = kernels
        .iter()
        .enumerate()
        .flat_map(|(i, kernel)| Part::of(kernel).map(move |part| Job { kernel, part, symbol: part.symbol(i) }))
        .collect();
    let codes = compile_all(&jobs, &**isa)?;
    let fail = |reason: String| Error::Object { reason };
    let builder = ObjectBuilder::new(isa.clone(), "nextc", default_libcall_names()).map_err(|e| fail(e.to_string()))?;
    let mut module = ObjectModule::new(builder);
    for (job, code) in jobs.iter().zip(codes) {
        let signature = module.make_signature();
        let id = module.declare_function(&job.symbol, Linkage::Export, &signature).map_err(|e| fail(e.to_string()))?;
        module.define_function_bytes(id, code.alignment, &code.bytes, &[]).map_err(|e| fail(e.to_string()))?;
    }
    let mut product = module.finish();
    // A linker takes an object without this note as one that wants an executable stack.
    product.object.add_section(Vec::new(), b".note.GNU-stack".to_vec(), SectionKind::Other);
    product.emit().map_err(|e| fail(e.to_string()))
}

/// Assembler text of one part.
pub fn disassemble(kernel: &Kernel, part: Part, isa: &dyn TargetIsa) -> Result<String, Error> {
    with_compiled(kernel, part, isa, true, |code| code.vcode.clone().unwrap_or_default())
}

/// Compiles all jobs on as many threads as there are; the first job in order that fails is the one reported.
fn compile_all(jobs: &[Job<'_>], isa: &dyn TargetIsa) -> Result<Vec<Code>, Error> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(jobs.len()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(jobs.len());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((i, job)) = claim(jobs, &next) {
                    let code = compile(job, isa);
                    done.lock().expect("no holder of the lock panics").push((i, code));
                }
            });
        }
    });
    let mut done = done.into_inner().expect("no holder of the lock panics");
    done.sort_by_key(|(i, _)| *i);
    done.into_iter().map(|(_, code)| code).collect()
}

fn claim<'j, 'a>(jobs: &'j [Job<'a>], next: &AtomicUsize) -> Option<(usize, &'j Job<'a>)> {
    let i = next.fetch_add(1, Ordering::Relaxed);
    jobs.get(i).map(|job| (i, job))
}

fn compile(job: &Job<'_>, isa: &dyn TargetIsa) -> Result<Code, Error> {
    let alignment = u64::from(isa.function_alignment().preferred);
    with_compiled(job.kernel, job.part, isa, false, |code| Code {
        bytes: code.code_buffer().to_vec(),
        alignment: alignment.max(u64::from(code.buffer.alignment)),
    })
}

/// Compiles one part and hands over the result, once it is known to refer to nothing outside of itself.
fn with_compiled<T>(
    kernel: &Kernel,
    part: Part,
    isa: &dyn TargetIsa,
    text: bool,
    take: impl FnOnce(&CompiledCode) -> T,
) -> Result<T, Error> {
    let mut context = Context::for_function(function::emit(kernel, part, isa)?);
    context.set_disasm(text);
    let code = context
        .compile(isa, &mut ControlPlane::default())
        .map_err(|e| Error::Codegen { kernel: kernel.name.clone(), reason: format!("{:?}", e.inner) })?;
    match code.buffer.relocs().first() {
        None => Ok(take(code)),
        Some(reloc) => Err(Error::External { kernel: kernel.name.clone(), symbol: format!("{:?}", reloc.target) }),
    }
}
