//! Kernels as entry functions of a GPU: parameters, tasks and their threads.
//!
//! An entry function takes the four dimensions, the kernel's pointers, a pointer to the scratch of all tasks, and the number of tasks.
//! A task that is a block of threads is a block of the grid; tasks of one thread are spread over blocks of [`Kernel::SINGLE_THREADS`].

use inkwell::AddressSpace;
use inkwell::IntPredicate;
use inkwell::attributes::AttributeLoc;
use inkwell::context::Context;
use inkwell::module::{Linkage, Module};
use inkwell::values::{FunctionValue, IntValue};
use nextc_ir::kernel::{Kernel, Region, Space, Val};
use nextc_ir::schedule::KernelModule;

use super::{Emitter, Result, params};

/// LLVM's calling convention of entry functions (`ptx_kernel`).
const PTX_KERNEL: u32 = 71;

/// The address space of LLVM's NVPTX for a space of kernel IR.
pub(super) fn address_space(space: Space) -> AddressSpace {
    AddressSpace::from(match space {
        Space::Global | Space::Scratch => 1_u16,
        Space::Shared => 3,
    })
}

/// Emits the entry functions of kernel `index`.
pub fn kernel<'c>(context: &'c Context, module: &Module<'c>, kernels: &KernelModule, index: usize) -> Result<()> {
    let kernel = &kernels.kernels[index];
    let constant = params::constant(kernels, index);
    let function = declare(context, module, kernel, &format!("nextc_kernel_{index}"));
    let mut emitter = Emitter::enter(context, module, kernel, function)?;
    emitter.mark_constant(&constant);
    emitter.grid_task()?;
    if let Some(tail) = &kernel.tail {
        let function = declare(context, module, kernel, &format!("nextc_tail_{index}"));
        let mut emitter = Emitter::enter(context, module, kernel, function)?;
        emitter.mark_constant(&constant);
        emitter.grid_tail(tail)?;
    }
    Ok(())
}

fn declare<'c>(context: &'c Context, module: &Module<'c>, kernel: &Kernel, name: &str) -> FunctionValue<'c> {
    let (i64, global) = (context.i64_type(), context.ptr_type(address_space(Space::Global)));
    let dims = (0..Kernel::TASK.0).map(|_| i64.into());
    let pointers = kernel.params.iter().map(|_| global.into());
    let params: Vec<_> = dims.chain(pointers).chain([global.into(), i64.into()]).collect();
    let function = module.add_function(name, context.void_type().fn_type(&params, false), Some(Linkage::External));
    function.set_call_conventions(PTX_KERNEL);
    let threads = if kernel.is_block() { kernel.threads } else { Kernel::SINGLE_THREADS };
    let attribute = context.create_string_attribute("nvvm.maxntid", &threads.to_string());
    function.add_attribute(AttributeLoc::Function, attribute);
    if kernel.together > 1 {
        let attribute = context.create_string_attribute("nvvm.minctasm", &kernel.together.to_string());
        function.add_attribute(AttributeLoc::Function, attribute);
    }
    function
}

impl<'a, 'c> Emitter<'a, 'c> {
    /// Opens an entry function: dimensions and pointers are its parameters.
    fn enter(
        context: &'c Context,
        module: &'a Module<'c>,
        kernel: &'a Kernel,
        function: FunctionValue<'c>,
    ) -> Result<Self> {
        let mut this = Self::open(context, module, kernel, function, true);
        for slot in 0..Kernel::TASK.0 {
            this.define(Val(slot), this.param(slot));
        }
        for i in 0..kernel.params.len() {
            this.define(kernel.param(i), this.param(Kernel::TASK.0 + i as u32));
        }
        Ok(this)
    }

    /// The scratch pointer and the number of tasks, which follow the kernel's own parameters.
    pub(super) fn grid_param(&self, which: u32) -> inkwell::values::BasicValueEnum<'c> {
        self.param(Kernel::TASK.0 + self.kernel.params.len() as u32 + which)
    }

    /// The body for the task of this block, or of this thread.
    fn grid_task(mut self) -> Result<()> {
        let block = self.block_number()?;
        let kernel = self.kernel;
        if kernel.is_block() {
            self.define(Kernel::TASK, block.into());
            self.region(&kernel.body)?;
        } else {
            let i64 = self.context.i64_type();
            let threads = i64.const_int(Kernel::SINGLE_THREADS.into(), false);
            let first = self.builder.build_int_mul(block, threads, "first")?;
            let task = self.builder.build_int_add(first, self.thread()?, "task")?;
            self.single(task)?;
        }
        self.builder.build_return(None)?;
        Ok(())
    }

    fn block_number(&self) -> Result<IntValue<'c>> {
        self.special_register("llvm.nvvm.read.ptx.sreg.ctaid.x")
    }

    /// The body for one thread, if there is such a task.
    fn single(&mut self, task: IntValue<'c>) -> Result<()> {
        let tasks = self.grid_param(1).into_int_value();
        let exists = self.builder.build_int_compare(IntPredicate::SLT, task, tasks, "exists")?;
        let [run, done] = ["run", "end"].map(|name| self.context.append_basic_block(self.function, name));
        self.builder.build_conditional_branch(exists, run, done)?;
        self.builder.position_at_end(run);
        self.define(Kernel::TASK, task.into());
        self.own_scratch(task)?;
        let kernel = self.kernel;
        self.region(&kernel.body)?;
        self.builder.build_unconditional_branch(done)?;
        self.builder.position_at_end(done);
        Ok(())
    }

    fn own_scratch(&mut self, task: IntValue<'c>) -> Result<()> {
        let bytes = self.context.i64_type().const_int(self.kernel.scratch_bytes(), false);
        let at = self.builder.build_int_mul(task, bytes, "scratch")?;
        let base = self.grid_param(0).into_pointer_value();
        self.scratch = Some(self.element(self.context.i8_type().into(), base, at)?);
        Ok(())
    }

    /// The tail, by blocks, or by the first thread of one.
    fn grid_tail(mut self, tail: &Region) -> Result<()> {
        let block = self.block_number()?;
        self.define(Kernel::TASK, block.into());
        if !self.kernel.is_block() {
            let thread = self.thread()?;
            let zero = self.context.i64_type().const_zero();
            let first = self.builder.build_int_compare(IntPredicate::EQ, thread, zero, "first")?;
            let [run, done] = ["run", "end"].map(|name| self.context.append_basic_block(self.function, name));
            self.builder.build_conditional_branch(first, run, done)?;
            self.builder.position_at_end(done);
            self.builder.build_return(None)?;
            self.builder.position_at_end(run);
            self.own_scratch(block)?;
        }
        self.region(tail)?;
        self.builder.build_return(None)?;
        Ok(())
    }
}
