//! One function of Cranelift IR for a kernel's body or tail: signature, prologue, task loop, and what is known of each value.

use cranelift::codegen::ir::{AliasRegion, AliasRegionData, Function, UserFuncName};
use cranelift::prelude::types::I64;
use cranelift::prelude::{
    AbiParam, FunctionBuilder, FunctionBuilderContext, InstBuilder, IntCC, MemFlagsData, Signature, Value, isa,
};
use nextc_ir::kernel::{Kernel, Region, Space, Val};

use crate::Error;
use crate::address::Sum;

/// The two functions that a kernel may become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// What each task does, in a loop over tasks.
    Body,
    /// What is done once after all tasks.
    Tail,
}

impl Part {
    /// The parts that a kernel has.
    pub fn of(kernel: &Kernel) -> impl Iterator<Item = Self> + use<> {
        std::iter::once(Self::Body).chain(kernel.tail.is_some().then_some(Self::Tail))
    }

    /// Its symbol in the object.
    pub fn symbol(self, index: usize) -> String {
        match self {
            Self::Body => crate::kernel_symbol(index),
            Self::Tail => crate::tail_symbol(index),
        }
    }
}

/// Emits one part of a kernel.
pub fn emit(kernel: &Kernel, part: Part, isa: &dyn isa::TargetIsa) -> Result<Function, Error> {
    let mut func = Function::with_name_signature(UserFuncName::default(), signature());
    let mut context = FunctionBuilderContext::new();
    let mut emitter = Emitter::new(kernel, FunctionBuilder::new(&mut func, &mut context));
    match (part, &kernel.tail) {
        (Part::Tail, Some(tail)) => emitter.tasks(tail)?,
        (Part::Body | Part::Tail, _) => emitter.tasks(&kernel.body)?,
    }
    emitter.fb.seal_all_blocks();
    emitter.fb.finalize(isa.frontend_config());
    Ok(func)
}

/// `fn(args: *const u64, scratch: *mut u8, first: i64, last: i64)`.
fn signature() -> Signature {
    let mut signature = Signature::new(isa::CallConv::SystemV);
    signature.params = vec![AbiParam::new(I64); 4];
    signature
}

/// What is known of a value while its function is emitted.
#[derive(Clone, Debug)]
pub struct Known {
    /// Its register.
    pub value: Value,
    /// Depth of loops at which it is computed.
    pub depth: u32,
    /// An i64 or a pointer as a sum.
    pub sum: Option<Sum>,
    /// Bits of a scalar constant.
    pub constant: Option<i64>,
    /// The scalar that is in every lane.
    pub splat: Option<Val>,
}

/// The state of emitting one function.
pub struct Emitter<'a, 'f> {
    pub kernel: &'a Kernel,
    pub fb: FunctionBuilder<'f>,
    /// Depth of loops at the point of emission; the task loop is 1.
    pub depth: u32,
    known: Vec<Option<Known>>,
    /// The four parameters of the function.
    arguments: [Value; 4],
    scratch_bytes: u64,
    regions: [AliasRegion; 2],
}

impl<'a, 'f> Emitter<'a, 'f> {
    fn new(kernel: &'a Kernel, mut fb: FunctionBuilder<'f>) -> Self {
        let entry = fb.create_block();
        fb.append_block_params_for_function_params(entry);
        fb.switch_to_block(entry);
        let arguments = std::array::from_fn(|i| fb.block_params(entry)[i]);
        let regions = [Space::Global, Space::Scratch].map(|space| {
            let data = AliasRegionData { user_id: space as u32, description: space.name().into() };
            fb.func.dfg.alias_regions.insert(data)
        });
        Self { kernel, fb, depth: 0, known: vec![None; kernel.types.len()], arguments, scratch_bytes: 0, regions }
    }

    /// Flags of a load or store: it cannot fault, and global memory and scratch do not overlap.
    pub fn memory_flags(&self, space: Space) -> MemFlagsData {
        MemFlagsData::new().with_notrap().with_alias_region(Some(self.regions[space as usize]))
    }

    /// The next piece of scratch.
    pub fn alloc(&mut self, bytes: u64) -> Sum {
        let at = self.scratch_bytes;
        self.scratch_bytes += bytes.div_ceil(64) * 64;
        let base = Sum::term(0, self.arguments[1]);
        base.add(&mut self.fb, &Sum::constant(at as i64))
    }

    /// What the body hands to the tail: the last entry of the argument block.
    pub fn partials(&mut self) -> Value {
        self.argument(self.kernel.param(self.kernel.params.len()))
    }

    /// How many threads share the tasks: in the place of the task's number in the argument block.
    pub fn team(&mut self) -> Value {
        self.argument(Kernel::TASK)
    }

    fn argument(&mut self, place: Val) -> Value {
        let flags = MemFlagsData::trusted().with_readonly().with_can_move();
        self.fb.ins().load(I64, flags, self.arguments[0], 8 * place.0 as i32)
    }

    /// Loads the dimensions and pointers from the argument block.
    fn prologue(&mut self) {
        let dims = (0..Kernel::TASK.0).map(Val);
        let params = (0..self.kernel.params.len()).map(|i| self.kernel.param(i));
        for val in dims.chain(params) {
            let value = self.argument(val);
            self.define(val, value);
        }
    }

    /// The body or the tail in a loop over the tasks `first .. last`.
    fn tasks(&mut self, region: &Region) -> Result<(), Error> {
        self.prologue();
        let [_, _, first, last] = self.arguments;
        let (task_loop, exit) = (self.fb.create_block(), self.fb.create_block());
        let task = self.fb.append_block_param(task_loop, I64);
        let any = self.fb.ins().icmp(IntCC::SignedLessThan, first, last);
        self.fb.ins().brif(any, task_loop, &[first.into()], exit, &[]);
        self.fb.switch_to_block(task_loop);
        self.depth = 1;
        self.define(Kernel::TASK, task);
        self.stmts(region)?;
        let next = self.fb.ins().iadd_imm_s(task, 1);
        let more = self.fb.ins().icmp(IntCC::SignedLessThan, next, last);
        self.fb.ins().brif(more, task_loop, &[next.into()], exit, &[]);
        self.fb.switch_to_block(exit);
        self.fb.ins().return_(&[]);
        Ok(())
    }

    /// What is known of a value.
    pub fn known(&self, val: Val) -> Result<&Known, Error> {
        self.known
            .get(val.0 as usize)
            .and_then(Option::as_ref)
            .ok_or_else(|| Error::Undefined { kernel: self.kernel.name.clone(), value: val.0 })
    }

    /// The register of a value.
    pub fn value(&self, val: Val) -> Result<Value, Error> {
        Ok(self.known(val)?.value)
    }

    /// The registers of values.
    pub fn all_values(&self, vals: &[Val]) -> Result<Vec<Value>, Error> {
        vals.iter().map(|&v| self.value(v)).collect()
    }

    /// An i64 or pointer as a sum.
    pub fn sum(&self, val: Val) -> Result<Sum, Error> {
        let known = self.known(val)?;
        Ok(known.sum.clone().unwrap_or_else(|| Sum::term(known.depth, known.value)))
    }

    /// Says that a value is in a register and changes with the loop around this point.
    pub fn define(&mut self, val: Val, value: Value) {
        self.define_at(val, value, self.depth);
    }

    /// Says that a value is in a register, and at which depth of loops it was last needed to compute it.
    pub fn define_at(&mut self, val: Val, value: Value, depth: u32) {
        self.set(val, Known { value, depth, sum: None, constant: None, splat: None });
    }

    /// Defines a value by a sum.
    pub fn define_sum(&mut self, val: Val, sum: Sum) {
        let value = sum.value(&mut self.fb);
        let constant = sum.as_constant();
        self.set(val, Known { value, depth: sum.depth(), sum: Some(sum), constant, splat: None });
    }

    /// Sets all that is known of a value.
    pub fn set(&mut self, val: Val, known: Known) {
        if let Some(slot) = self.known.get_mut(val.0 as usize) {
            *slot = Some(known);
        }
    }
}
