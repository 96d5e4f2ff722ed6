//! Kernel IR to LLVM IR: functions, regions, loops and branches. `ops` holds what the other statements become.
//!
//! A kernel is one function: a prologue that reads the dimensions and the pointers, and a loop over tasks around the body. A tail is
//! a second one without the loop. Kernel IR is in SSA form, and so is this: carried values and yields are phis, nothing lives in memory
//! that kernel IR does not store. The emitter trusts the kernel verifier for types and scopes; LLVM's verifier follows.

mod block;
mod gpu;
mod ops;
mod params;
mod tile;

pub use gpu::kernel as gpu_kernel;

use inkwell::attributes::{Attribute, AttributeLoc};
use inkwell::basic_block::BasicBlock;
use inkwell::builder::{Builder, BuilderError};
use inkwell::context::Context;
use inkwell::module::Module;
use inkwell::types::{BasicTypeEnum, VectorType};
use inkwell::values::{BasicValue, BasicValueEnum, FunctionValue, IntValue, PhiValue, PointerValue};
use inkwell::{AddressSpace, IntPredicate};
use nextc_ir::DType;
use nextc_ir::kernel::{KOp, KType, Kernel, Region, Space, Stmt, Val};
use nextc_ir::schedule::KernelModule;

/// What the emitter cannot express.
#[derive(Debug, thiserror::Error)]
pub enum EmitError {
    /// LLVM's builder refuses.
    #[error(transparent)]
    Builder(#[from] BuilderError),
    /// A value is used where it does not exist.
    #[error("%{} is used before it is defined", .0.0)]
    Undefined(Val),
    /// A value is of another kind than its use wants.
    #[error("{op}: operand is {found}, expected {expected}")]
    Kind {
        /// The op.
        op: &'static str,
        /// What it is in LLVM.
        found: String,
        /// What it should be.
        expected: &'static str,
    },
    /// A statement has too few operands, results or regions.
    #[error("{op}: it has {found} {what}, expected {expected}")]
    Count {
        /// The op.
        op: &'static str,
        /// `operands`, `results` or `regions`.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// How many there should be.
        expected: usize,
    },
    /// A reduction over a number of lanes that is no power of two.
    #[error("{op}: the vector has {lanes} lanes, expected a power of two")]
    Lanes {
        /// The op.
        op: &'static str,
        /// Lanes of the operand.
        lanes: u32,
    },
    /// Scratch in a block of threads.
    #[error("alloc: a block of threads has no scratch")]
    NoScratch,
    /// What a thread of a CPU's team has, on a GPU.
    #[error("{0}: a GPU has none for tasks of one thread")]
    NoTeam(&'static str),
    /// An intrinsic that this LLVM does not have.
    #[error("this LLVM has no `{0}`")]
    Intrinsic(&'static str),
}

type Result<T> = std::result::Result<T, EmitError>;

/// Emits the functions of kernel `index`; `mark` sets the attributes that the target wants.
pub fn kernel<'c>(
    context: &'c Context,
    module: &Module<'c>,
    kernels: &KernelModule,
    index: usize,
    mark: impl Fn(FunctionValue<'c>),
) -> Result<()> {
    let kernel = &kernels.kernels[index];
    let constant = params::constant(kernels, index);
    let function = declare(context, module, &format!("nextc_kernel_{index}"));
    mark(function);
    Emitter::begin(context, module, kernel, &constant, function)?.tasks(&kernel.body)?;
    if let Some(tail) = &kernel.tail {
        let function = declare(context, module, &format!("nextc_tail_{index}"));
        mark(function);
        Emitter::begin(context, module, kernel, &constant, function)?.tasks(tail)?;
    }
    Ok(())
}

/// Declares `void name(ptr args, ptr scratch, i64 first, i64 last)`. Nobody writes `args` while a kernel runs, and no parameter points
/// into a task's scratch.
fn declare<'c>(context: &'c Context, module: &Module<'c>, name: &str) -> FunctionValue<'c> {
    let ptr = context.ptr_type(AddressSpace::default());
    let i64 = context.i64_type();
    let ty = context.void_type().fn_type(&[ptr.into(), ptr.into(), i64.into(), i64.into()], false);
    let function = module.add_function(name, ty, None);
    let attribute = |name, value| context.create_enum_attribute(Attribute::get_named_enum_kind_id(name), value);
    for (param, name, value) in
        [(0, "noalias", 0), (0, "readonly", 0), (0, "align", 8), (1, "noalias", 0), (1, "align", SCRATCH_ALIGN)]
    {
        function.add_attribute(AttributeLoc::Param(param), attribute(name, value));
    }
    function
}

/// Alignment of scratch and of each allocation in it, bytes.
const SCRATCH_ALIGN: u64 = 64;

/// The state of one function while it is emitted.
struct Emitter<'a, 'c> {
    context: &'c Context,
    module: &'a Module<'c>,
    builder: Builder<'c>,
    kernel: &'a Kernel,
    function: FunctionValue<'c>,
    /// What each kernel value is, once it is defined.
    values: Vec<Option<BasicValueEnum<'c>>>,
    /// For each kernel value, whether it points into memory that never changes.
    constant: Vec<bool>,
    /// Where the task's scratch begins.
    scratch: Option<PointerValue<'c>>,
    /// Bytes of scratch, or of shared memory, that are taken.
    taken_bytes: u64,
    /// Whether spaces of memory are told apart, as GPUs want it.
    spaces: bool,
    /// Whether groups of warps multiply what lies in shared memory.
    has_groups: bool,
}

impl<'a, 'c> Emitter<'a, 'c> {
    /// Opens the function: reads dimensions and pointers.
    fn begin(
        context: &'c Context,
        module: &'a Module<'c>,
        kernel: &'a Kernel,
        constant_params: &[bool],
        function: FunctionValue<'c>,
    ) -> Result<Self> {
        let mut this = Self::open(context, module, kernel, function, false);
        this.scratch = Some(this.param(1).into_pointer_value());
        for slot in 0..Kernel::TASK.0 {
            let value = this.load_arg(u64::from(slot), context.i64_type().into())?;
            this.define(Val(slot), value);
        }
        for i in 0..kernel.params.len() {
            let param = kernel.param(i);
            let value = this.load_arg(param.0.into(), this.pointer_type(Space::Global))?;
            this.define(param, value);
        }
        this.mark_constant(constant_params);
        Ok(this)
    }

    /// An emitter at the beginning of a function.
    fn open(
        context: &'c Context,
        module: &'a Module<'c>,
        kernel: &'a Kernel,
        function: FunctionValue<'c>,
        spaces: bool,
    ) -> Self {
        let builder = context.create_builder();
        builder.position_at_end(context.append_basic_block(function, "entry"));
        let count = kernel.types.len();
        let (values, constant) = (vec![None; count], vec![false; count]);
        let (scratch, taken_bytes) = (None, 0);
        let has_groups = kernel.regions().any(|r| r.has(&|op| matches!(op, KOp::MmaGroup { .. })));
        Self { context, module, builder, kernel, function, values, constant, scratch, taken_bytes, spaces, has_groups }
    }

    /// Notes which parameters point to memory that never changes.
    fn mark_constant(&mut self, params: &[bool]) {
        for (i, &is_constant) in params.iter().enumerate() {
            self.constant[self.kernel.param(i).0 as usize] = is_constant;
        }
    }

    /// Entry `slot` of the argument table.
    fn load_arg(&self, slot: u64, ty: BasicTypeEnum<'c>) -> Result<BasicValueEnum<'c>> {
        let at = self.context.i64_type().const_int(slot, false);
        let ptr = self.element(self.context.i64_type().into(), self.param(0).into_pointer_value(), at)?;
        let value = self.builder.build_load(ty, ptr, "arg")?;
        self.mark_invariant(value);
        Ok(value)
    }

    /// The body or the tail in a loop over the tasks `first .. last`.
    fn tasks(mut self, part: &Region) -> Result<()> {
        let (first, last) = (self.param(2).into_int_value(), self.param(3).into_int_value());
        let one = self.context.i64_type().const_int(1, false);
        let tiles = self.begin_tiles(part)?;
        self.counted_loop((first, last, one), &[], |this, task, _| {
            this.define(Kernel::TASK, task.into());
            this.region(part)
        })?;
        self.end_tiles(tiles)?;
        self.builder.build_return(None)?;
        Ok(())
    }

    /// Emits a region's statements and gives what it yields.
    fn region(&mut self, region: &Region) -> Result<Vec<BasicValueEnum<'c>>> {
        for stmt in &region.stmts {
            self.stmt(stmt)?;
        }
        region.yields.iter().map(|&v| self.value(v)).collect()
    }

    fn for_loop(&mut self, stmt: &Stmt) -> Result<()> {
        let region = stmt.regions.first().ok_or_else(|| count(stmt, "regions", stmt.regions.len(), 1))?;
        let expected = stmt.args.len().saturating_sub(2);
        if stmt.args.len() < 3 || region.params.len() != expected {
            return Err(count(stmt, "parameters", region.params.len(), expected.max(1)));
        }
        let bounds = (self.int(stmt, 0)?, self.int(stmt, 1)?, self.int(stmt, 2)?);
        let init = stmt.args[3..].iter().map(|&v| self.value(v)).collect::<Result<Vec<_>>>()?;
        let results = self.counted_loop(bounds, &init, |this, i, carried| {
            this.define(region.params[0], i.into());
            for (&param, &value) in region.params[1..].iter().zip(carried) {
                this.define(param, value);
            }
            this.region(region)
        })?;
        self.define_all(stmt, &results)
    }

    /// `for i in (lo .. hi).step_by(step)`: a test before the first turn, and one at each turn's end.
    fn counted_loop(
        &mut self,
        (lo, hi, step): (IntValue<'c>, IntValue<'c>, IntValue<'c>),
        init: &[BasicValueEnum<'c>],
        body: impl FnOnce(&mut Self, IntValue<'c>, &[BasicValueEnum<'c>]) -> Result<Vec<BasicValueEnum<'c>>>,
    ) -> Result<Vec<BasicValueEnum<'c>>> {
        let before = self.block()?;
        let [turn, done] = ["loop", "done"].map(|name| self.context.append_basic_block(self.function, name));
        let enters = self.builder.build_int_compare(IntPredicate::SLT, lo, hi, "enters")?;
        self.builder.build_conditional_branch(enters, turn, done)?;

        self.builder.position_at_end(turn);
        let counter = self.phi(lo.get_type().into(), "i")?;
        let carried = self.phis(init, "carried")?;
        let values: Vec<_> = carried.iter().map(|p| p.as_basic_value()).collect();
        let next = body(self, counter.as_basic_value().into_int_value(), &values)?;

        let latch = self.block()?;
        let i = counter.as_basic_value().into_int_value();
        // `i` is less than `hi`, an index of memory: one step further is far from the end of i64.
        let further = self.builder.build_int_nsw_add(i, step, "further")?;
        let again = self.builder.build_int_compare(IntPredicate::SLT, further, hi, "again")?;
        self.builder.build_conditional_branch(again, turn, done)?;
        counter.add_incoming(&[(&lo, before), (&further, latch)]);
        join(&carried, &[(init, before), (&next, latch)]);

        self.builder.position_at_end(done);
        let results = self.phis(init, "result")?;
        join(&results, &[(init, before), (&next, latch)]);
        Ok(results.iter().map(|p| p.as_basic_value()).collect())
    }

    fn branch(&mut self, stmt: &Stmt) -> Result<()> {
        let [first, second] = stmt.regions.as_slice() else {
            return Err(count(stmt, "regions", stmt.regions.len(), 2));
        };
        let condition = self.int(stmt, 0)?;
        let [then, otherwise, done] =
            ["then", "else", "endif"].map(|name| self.context.append_basic_block(self.function, name));
        self.builder.build_conditional_branch(condition, then, otherwise)?;
        let mut arm = |block: BasicBlock<'c>, region: &Region| {
            self.builder.position_at_end(block);
            let yields = self.region(region)?;
            let end = self.block()?;
            self.builder.build_unconditional_branch(done)?;
            Ok::<_, EmitError>((yields, end))
        };
        let (a, a_end) = arm(then, first)?;
        let (b, b_end) = arm(otherwise, second)?;
        self.builder.position_at_end(done);
        let results = self.phis(&a, "either")?;
        join(&results, &[(&a, a_end), (&b, b_end)]);
        let results: Vec<_> = results.iter().map(|p| p.as_basic_value()).collect();
        self.define_all(stmt, &results)
    }

    fn phi(&self, ty: BasicTypeEnum<'c>, name: &str) -> Result<PhiValue<'c>> {
        Ok(self.builder.build_phi(ty, name)?)
    }

    /// One empty phi for each value, of its type.
    fn phis(&self, like: &[BasicValueEnum<'c>], name: &str) -> Result<Vec<PhiValue<'c>>> {
        like.iter().map(|v| self.phi(v.get_type(), name)).collect()
    }

    /// The block that is being filled.
    fn block(&self) -> Result<BasicBlock<'c>> {
        self.builder.get_insert_block().ok_or(EmitError::Builder(BuilderError::UnsetPosition))
    }

    fn param(&self, i: u32) -> BasicValueEnum<'c> {
        self.function.get_nth_param(i).expect("the function is declared with its parameters")
    }

    fn define(&mut self, v: Val, value: BasicValueEnum<'c>) {
        self.values[v.0 as usize] = Some(value);
    }

    fn define_all(&mut self, stmt: &Stmt, values: &[BasicValueEnum<'c>]) -> Result<()> {
        if stmt.results.len() != values.len() {
            return Err(count(stmt, "results", stmt.results.len(), values.len()));
        }
        for (&v, &value) in stmt.results.iter().zip(values) {
            self.define(v, value);
        }
        Ok(())
    }

    fn value(&self, v: Val) -> Result<BasicValueEnum<'c>> {
        self.values.get(v.0 as usize).copied().flatten().ok_or(EmitError::Undefined(v))
    }

    /// Operand `i` of a statement.
    fn arg(&self, stmt: &Stmt, i: usize) -> Result<BasicValueEnum<'c>> {
        let &v = stmt.args.get(i).ok_or_else(|| count(stmt, "operands", stmt.args.len(), i + 1))?;
        self.value(v)
    }

    /// Operand `i`, a scalar integer.
    fn int(&self, stmt: &Stmt, i: usize) -> Result<IntValue<'c>> {
        match self.arg(stmt, i)? {
            BasicValueEnum::IntValue(x) => Ok(x),
            other => Err(kind(stmt, other, "a scalar integer")),
        }
    }

    /// Operand `i`, a pointer.
    fn pointer(&self, stmt: &Stmt, i: usize) -> Result<PointerValue<'c>> {
        match self.arg(stmt, i)? {
            BasicValueEnum::PointerValue(x) => Ok(x),
            other => Err(kind(stmt, other, "a pointer")),
        }
    }

    fn pointer_type(&self, space: Space) -> BasicTypeEnum<'c> {
        let space = if self.spaces { gpu::address_space(space) } else { AddressSpace::default() };
        self.context.ptr_type(space).into()
    }

    fn scalar_type(&self, dtype: DType) -> BasicTypeEnum<'c> {
        match dtype {
            DType::F32 => self.context.f32_type().into(),
            DType::F16 => self.context.f16_type().into(),
            DType::BF16 => self.context.bf16_type().into(),
            DType::I64 => self.context.i64_type().into(),
            DType::I32 => self.context.i32_type().into(),
            DType::U8 => self.context.i8_type().into(),
            DType::Bool => self.context.bool_type().into(),
        }
    }

    fn ty(&self, ty: KType) -> BasicTypeEnum<'c> {
        match ty {
            KType::Ptr(space) => self.pointer_type(space),
            KType::Value { dtype, lanes: 1 } => self.scalar_type(dtype),
            KType::Value { dtype, lanes } => vector_of(self.scalar_type(dtype), lanes).into(),
        }
    }
}

/// The vector type of `lanes` scalars.
fn vector_of(scalar: BasicTypeEnum<'_>, lanes: u32) -> VectorType<'_> {
    match scalar {
        BasicTypeEnum::FloatType(t) => t.vec_type(lanes),
        BasicTypeEnum::IntType(t) => t.vec_type(lanes),
        BasicTypeEnum::PointerType(t) => t.vec_type(lanes),
        _ => unreachable!("kernel IR has scalars and pointers only"),
    }
}

/// Fills phis with what arrives over each edge.
fn join<'c>(phis: &[PhiValue<'c>], edges: &[(&[BasicValueEnum<'c>], BasicBlock<'c>)]) {
    for &(values, block) in edges {
        for (phi, value) in phis.iter().zip(values) {
            phi.add_incoming(&[(value as &dyn BasicValue<'c>, block)]);
        }
    }
}

fn kind(stmt: &Stmt, found: BasicValueEnum<'_>, expected: &'static str) -> EmitError {
    EmitError::Kind { op: stmt.op.name(), found: found.get_type().print_to_string().to_string(), expected }
}

fn count(stmt: &Stmt, what: &'static str, found: usize, expected: usize) -> EmitError {
    EmitError::Count { op: stmt.op.name(), what, found, expected }
}
