//! LLVM's side of the work: a target machine, its passes, its object and assembly writers.

use inkwell::OptimizationLevel;
use inkwell::context::Context;
use inkwell::memory_buffer::MemoryBuffer;
use inkwell::module::Module;
use inkwell::passes::PassBuilderOptions;
use inkwell::targets::{
    CodeModel, FileType, InitializationConfig, RelocMode, Target as LlvmTarget, TargetMachine, TargetTriple,
};
use nextc_ir::Target;
use nextc_ir::schedule::KernelModule;

use crate::emit;
use crate::error::Error;
use crate::{nvptx, x86};

/// LLVM's passes. Kernel IR is vectorised by its skeletons, so LLVM's own vectorisers are switched off.
const PASSES: &str = "default<O3>";

/// A code generator for one target.
pub struct Machine<'t> {
    target: &'t Target,
    machine: TargetMachine,
}

/// One kernel as an LLVM module.
pub struct Unit<'c> {
    module: Module<'c>,
    kernel: String,
}

impl Unit<'_> {
    /// The module as LLVM prints it.
    pub fn text(&self) -> String {
        self.module.print_to_string().to_string()
    }
}

impl<'t> Machine<'t> {
    /// The code generator for `target`.
    pub fn new(target: &'t Target) -> Result<Self, Error> {
        let fail = |reason: String| Error::Machine { cpu: target.cpu.clone(), reason };
        let (name, cpu, features) = match &target.gpu {
            None => (x86::TRIPLE, x86::BASELINE, x86::features(target)),
            Some(gpu) => (nvptx::TRIPLE, gpu.name, nvptx::features(gpu)),
        };
        LlvmTarget::initialize_x86(&InitializationConfig::default());
        LlvmTarget::initialize_nvptx(&InitializationConfig::default());
        let triple = TargetTriple::create(name);
        let machine = LlvmTarget::from_triple(&triple)
            .map_err(|e| fail(e.to_string()))?
            .create_target_machine(
                &triple,
                cpu,
                &features,
                OptimizationLevel::Aggressive,
                RelocMode::PIC,
                CodeModel::Small,
            )
            .ok_or_else(|| fail(format!("there is no machine for {name}")))?;
        Ok(Self { target, machine })
    }

    /// Emits kernel `index` of a module and has LLVM verify it.
    pub fn build<'c>(&self, context: &'c Context, kernels: &KernelModule, index: usize) -> Result<Unit<'c>, Error> {
        let kernel = &kernels.kernels[index];
        let module = context.create_module(&kernel.name);
        module.set_triple(&self.machine.get_triple());
        module.set_data_layout(&self.machine.get_target_data().get_data_layout());
        let emitted = match &self.target.gpu {
            None => {
                emit::kernel(context, &module, kernels, index, |function| x86::mark(context, function, self.target))
            }
            Some(_) => emit::gpu_kernel(context, &module, kernels, index),
        };
        emitted.map_err(|source| Error::Emit { kernel: kernel.name.clone(), source })?;
        module.verify().map_err(|e| Error::Verify { kernel: kernel.name.clone(), reason: e.to_string() })?;
        Ok(Unit { module, kernel: kernel.name.clone() })
    }

    /// Runs LLVM's passes.
    pub fn optimise(&self, unit: &Unit<'_>) -> Result<(), Error> {
        let options = PassBuilderOptions::create();
        options.set_loop_vectorization(false);
        options.set_loop_slp_vectorization(false);
        unit.module.run_passes(PASSES, &self.machine, options).map_err(|e| Error::Generate {
            kernel: unit.kernel.clone(),
            stage: "optimise",
            reason: e.to_string(),
        })
    }

    /// The unit as an ELF object.
    pub fn object(&self, unit: &Unit<'_>) -> Result<Vec<u8>, Error> {
        Ok(self.write(unit, FileType::Object)?.as_slice().to_vec())
    }

    /// The unit as assembly text.
    pub fn assembly(&self, unit: &Unit<'_>) -> Result<String, Error> {
        Ok(String::from_utf8_lossy(self.write(unit, FileType::Assembly)?.as_slice()).into_owned())
    }

    fn write(&self, unit: &Unit<'_>, file: FileType) -> Result<MemoryBuffer<'static>, Error> {
        self.machine.write_to_memory_buffer(&unit.module, file).map_err(|e| Error::Generate {
            kernel: unit.kernel.clone(),
            stage: "assemble",
            reason: e.to_string(),
        })
    }
}
