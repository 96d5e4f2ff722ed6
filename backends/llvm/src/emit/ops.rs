//! What each statement becomes: arithmetic, conversions, reductions and memory here, control in the parent. One arm an op, and none for the rest.

use inkwell::intrinsics::Intrinsic;
use inkwell::types::{BasicTypeEnum, VectorType};
use inkwell::values::{
    BasicMetadataValueEnum, BasicValue, BasicValueEnum, InstructionOpcode, IntValue, PointerValue, VectorValue,
};
use inkwell::{FloatPredicate, IntPredicate};
use nextc_ir::DType;
use nextc_ir::kernel::{KOp, Kernel, Pred, Space, Stmt};

use super::{EmitError, Emitter, Result, SCRATCH_ALIGN, count, kind, vector_of};

impl<'c> Emitter<'_, 'c> {
    /// Emits a statement and defines its results.
    pub(super) fn stmt(&mut self, stmt: &Stmt) -> Result<()> {
        use InstructionOpcode as I;
        let result = match stmt.op {
            KOp::Const { dtype, bits } => self.constant_value(dtype, bits)?,
            KOp::Team => self.team()?,
            KOp::Alloc { dtype, elems } => self.alloc(dtype, elems)?,
            KOp::Splat { lanes } => self.splat(self.arg(stmt, 0)?, lanes)?,
            KOp::Extract { lane } => {
                let lane = self.context.i32_type().const_int(u64::from(lane), false);
                self.builder.build_extract_element(self.vector(stmt, 0)?, lane, "lane")?
            }

            KOp::Add => self.binary(stmt, I::Add)?,
            KOp::Sub => self.binary(stmt, I::Sub)?,
            KOp::Mul => self.binary(stmt, I::Mul)?,
            KOp::Div => self.binary(stmt, I::SDiv)?,
            KOp::Rem => self.binary(stmt, I::SRem)?,
            KOp::And => self.binary(stmt, I::And)?,
            KOp::Or => self.binary(stmt, I::Or)?,
            KOp::Xor => self.binary(stmt, I::Xor)?,
            KOp::Shl => self.binary(stmt, I::Shl)?,
            KOp::Ushr => self.binary(stmt, I::LShr)?,
            KOp::Sshr => self.binary(stmt, I::AShr)?,

            KOp::Fadd => self.binary(stmt, I::FAdd)?,
            KOp::Fsub => self.binary(stmt, I::FSub)?,
            KOp::Fmul => self.binary(stmt, I::FMul)?,
            KOp::Fdiv => self.binary(stmt, I::FDiv)?,
            KOp::Fmin => self.pick(FloatPredicate::OLT, self.arg(stmt, 0)?, self.arg(stmt, 1)?)?,
            KOp::Fmax => self.pick(FloatPredicate::OGT, self.arg(stmt, 0)?, self.arg(stmt, 1)?)?,
            KOp::Fma => self.intrinsic(stmt, "llvm.fma")?,
            KOp::Fneg => self.negate(stmt)?,
            KOp::Fabs => self.intrinsic(stmt, "llvm.fabs")?,
            KOp::Fsqrt => self.intrinsic(stmt, "llvm.sqrt")?,
            KOp::Fround => self.intrinsic(stmt, "llvm.roundeven")?,

            KOp::Cmp { pred } => self.compare(stmt, pred)?,
            KOp::Select => {
                self.choose_constant(stmt);
                self.select(self.arg(stmt, 0)?, self.arg(stmt, 1)?, self.arg(stmt, 2)?)?
            }

            KOp::ToFloat => self.convert(stmt, I::SIToFP)?,
            KOp::ToInt => self.convert(stmt, I::FPToSI)?,
            KOp::Widen => self.convert(stmt, I::SExt)?,
            KOp::Narrow => self.convert(stmt, I::Trunc)?,
            KOp::Bitcast { dtype: _ } => self.convert(stmt, I::BitCast)?,

            KOp::ReduceAdd => self.reduce(stmt, |this, a, b| Ok(this.builder.build_float_add(a, b, "sum")?))?,
            KOp::ReduceMax => self.reduce(stmt, |this, a, b| {
                Ok(this.pick(FloatPredicate::OGT, a.into(), b.into())?.into_vector_value())
            })?,

            KOp::Load { dtype, lanes } => self.load(stmt, dtype, lanes)?,
            KOp::Store => return self.store(stmt),
            KOp::Offset => self.offset(stmt)?,

            KOp::Thread => self.thread()?.into(),
            KOp::Shared { dtype, elems } => self.shared(dtype, elems)?,
            KOp::Partials { dtype: _, elems: _ } => self.partials()?,
            KOp::Barrier => return self.barrier(),
            KOp::ShuffleXor { mask } => self.shuffle_xor(stmt, mask)?,
            KOp::Quad => self.quad(stmt)?,
            KOp::WarpMax => self.warp_best(stmt, "llvm.nvvm.redux.sync.max")?,
            KOp::WarpMin => self.warp_best(stmt, "llvm.nvvm.redux.sync.min")?,
            KOp::AtomicAdd => self.atomic_add(stmt)?,
            KOp::Pack { dtype } => self.pack(stmt, dtype)?,
            KOp::HalfFma { dtype } => self.half_fma(stmt, dtype)?,
            KOp::HalfToFloat => self.half_to_float(stmt)?,
            KOp::Fp8ToF16 => self.fp8_to_f16(stmt)?,
            KOp::Mma { dtype } => self.mma(stmt, dtype)?,
            KOp::MmaGroup { dtype, steps, groups } => self.mma_group(stmt, dtype, (steps, groups))?,
            KOp::CopyAsync => return self.copy_async(stmt),
            KOp::CopyCommit => return self.order("llvm.nvvm.cp.async.commit.group"),
            KOp::CopyWait { left } => return self.copy_wait(left),
            KOp::Prefetch if self.kernel.is_block() => return self.prefetch(stmt),
            KOp::Prefetch => return self.prefetch_lines(stmt),
            KOp::Wait => return self.order("llvm.nvvm.griddepcontrol.wait"),
            KOp::Release => return self.order("llvm.nvvm.griddepcontrol.launch.dependents"),

            KOp::Nibble { shift } => self.nibble(stmt, shift)?,
            KOp::Bf16Row => self.bf16_row(stmt)?,
            KOp::Bf16Pairs => self.bf16_pairs(stmt)?,
            KOp::ByteRow => self.byte_row(stmt)?,
            KOp::ByteDot => self.byte_dot(stmt)?,
            KOp::PairDot => self.pair_dot(stmt)?,
            KOp::ShortDot => self.short_dot(stmt)?,
            KOp::TileTurn => return self.tile_turn(stmt),
            KOp::TileZero => return self.tile_zero(),
            KOp::TileStep { rows, columns, once } => {
                return self.tile_step(stmt, (rows as usize, columns as usize), once);
            }
            KOp::TileStore { rows, columns } => {
                return self.move_sums("llvm.x86.tilestored64", stmt, (rows as usize, columns as usize));
            }
            KOp::TileLoad { rows, columns } => {
                return self.move_sums("llvm.x86.tileloadd64", stmt, (rows as usize, columns as usize));
            }

            KOp::For => return self.for_loop(stmt),
            KOp::If => return self.branch(stmt),
        };
        self.define_all(stmt, &[result])
    }

    fn constant_value(&self, dtype: DType, bits: i64) -> Result<BasicValueEnum<'c>> {
        let int = self.context.custom_width_int_type(bit_width(dtype)).expect("widths of numbers are legal");
        let bits = int.const_int(bits as u64 & (u64::MAX >> (64 - int.get_bit_width())), false);
        // A float by its bits, so that every number is exact.
        if dtype.is_float() {
            Ok(self.builder.build_bit_cast(bits, self.scalar_type(dtype), "")?)
        } else {
            Ok(bits.into())
        }
    }

    /// What the body hands to the tail: on a CPU the last of the arguments, for blocks of a GPU the scratch of all tasks.
    fn partials(&self) -> Result<BasicValueEnum<'c>> {
        match self.spaces {
            true if self.kernel.is_block() => Ok(self.grid_param(0)),
            true => Err(EmitError::NoTeam("partials")),
            false => {
                let behind = self.kernel.param(self.kernel.params.len());
                self.load_arg(behind.0.into(), self.pointer_type(Space::Scratch))
            }
        }
    }

    /// How many threads share the tasks: in the place of the task's number among the arguments.
    fn team(&self) -> Result<BasicValueEnum<'c>> {
        match self.spaces {
            true => Err(EmitError::NoTeam("team")),
            false => self.load_arg(Kernel::TASK.0.into(), self.context.i64_type().into()),
        }
    }

    /// The next piece of scratch.
    fn alloc(&mut self, dtype: DType, elems: u64) -> Result<BasicValueEnum<'c>> {
        let at = self.context.i64_type().const_int(self.taken_bytes, false);
        self.taken_bytes += (elems * dtype.bytes()).next_multiple_of(SCRATCH_ALIGN);
        let scratch = self.scratch.ok_or(EmitError::NoScratch)?;
        Ok(self.element(self.context.i8_type().into(), scratch, at)?.into())
    }

    fn splat(&self, x: BasicValueEnum<'c>, lanes: u32) -> Result<BasicValueEnum<'c>> {
        let i32 = self.context.i32_type();
        let empty = vector_of(x.get_type(), lanes).get_poison();
        let one = self.builder.build_insert_element(empty, x, i32.const_zero(), "one")?;
        let mask = i32.vec_type(lanes).const_zero();
        Ok(self.builder.build_shuffle_vector(one, empty, mask, "splat")?.into())
    }

    fn binary(&self, stmt: &Stmt, op: InstructionOpcode) -> Result<BasicValueEnum<'c>> {
        Ok(self.builder.build_binop(op, self.arg(stmt, 0)?, self.arg(stmt, 1)?, "")?)
    }

    fn negate(&self, stmt: &Stmt) -> Result<BasicValueEnum<'c>> {
        Ok(match self.arg(stmt, 0)? {
            BasicValueEnum::FloatValue(x) => self.builder.build_float_neg(x, "")?.into(),
            BasicValueEnum::VectorValue(x) => self.builder.build_float_neg(x, "")?.into(),
            other => return Err(kind(stmt, other, "a float")),
        })
    }

    fn compare(&self, stmt: &Stmt, pred: Pred) -> Result<BasicValueEnum<'c>> {
        let is_float = self.kernel.ty(stmt.args[0]).dtype().is_some_and(DType::is_float);
        let (a, b) = (self.arg(stmt, 0)?, self.arg(stmt, 1)?);
        if is_float { self.compare_floats(float_predicate(pred), a, b) } else { self.compare_ints(stmt, pred, a, b) }
    }

    fn compare_ints(
        &self,
        stmt: &Stmt,
        pred: Pred,
        a: BasicValueEnum<'c>,
        b: BasicValueEnum<'c>,
    ) -> Result<BasicValueEnum<'c>> {
        use BasicValueEnum as V;
        let pred = int_predicate(pred);
        Ok(match (a, b) {
            (V::IntValue(a), V::IntValue(b)) => self.builder.build_int_compare(pred, a, b, "")?.into(),
            (V::VectorValue(a), V::VectorValue(b)) => self.builder.build_int_compare(pred, a, b, "")?.into(),
            (other, _) => return Err(kind(stmt, other, "two integers of one type")),
        })
    }

    fn compare_floats(
        &self,
        pred: FloatPredicate,
        a: BasicValueEnum<'c>,
        b: BasicValueEnum<'c>,
    ) -> Result<BasicValueEnum<'c>> {
        use BasicValueEnum as V;
        Ok(match (a, b) {
            (V::FloatValue(a), V::FloatValue(b)) => self.builder.build_float_compare(pred, a, b, "")?.into(),
            (V::VectorValue(a), V::VectorValue(b)) => self.builder.build_float_compare(pred, a, b, "")?.into(),
            (other, _) => {
                let found = other.get_type().print_to_string().to_string();
                return Err(EmitError::Kind { op: "cmp", found, expected: "two floats of one type" });
            }
        })
    }

    /// `a pred b ? a : b`, which the code generator knows as `minps` and `maxps`.
    fn pick(&self, pred: FloatPredicate, a: BasicValueEnum<'c>, b: BasicValueEnum<'c>) -> Result<BasicValueEnum<'c>> {
        let first = self.compare_floats(pred, a, b)?;
        self.select(first, a, b)
    }

    fn select(
        &self,
        condition: BasicValueEnum<'c>,
        a: BasicValueEnum<'c>,
        b: BasicValueEnum<'c>,
    ) -> Result<BasicValueEnum<'c>> {
        Ok(match condition {
            BasicValueEnum::IntValue(c) => self.builder.build_select(c, a, b, "")?,
            BasicValueEnum::VectorValue(c) => self.builder.build_select(c, a, b, "")?,
            other => {
                let found = other.get_type().print_to_string().to_string();
                return Err(EmitError::Kind { op: "select", found, expected: "a condition" });
            }
        })
    }

    fn convert(&self, stmt: &Stmt, op: InstructionOpcode) -> Result<BasicValueEnum<'c>> {
        let &result = stmt.results.first().ok_or_else(|| count(stmt, "results", 0, 1))?;
        Ok(self.builder.build_cast(op, self.arg(stmt, 0)?, self.ty(self.kernel.ty(result)), "")?)
    }

    /// A call of an intrinsic that is overloaded on its operands' one type.
    fn intrinsic(&self, stmt: &Stmt, name: &'static str) -> Result<BasicValueEnum<'c>> {
        let args = (0..stmt.args.len()).map(|i| self.arg(stmt, i)).collect::<Result<Vec<_>>>()?;
        let ty = args.first().ok_or_else(|| count(stmt, "operands", 0, 1))?.get_type();
        let callee = Intrinsic::find(name)
            .and_then(|i| i.get_declaration(self.module, &[ty]))
            .ok_or(EmitError::Intrinsic(name))?;
        let args: Vec<BasicMetadataValueEnum<'c>> = args.into_iter().map(Into::into).collect();
        let call = self.builder.build_call(callee, &args, "")?;
        call.try_as_basic_value().basic().ok_or(EmitError::Intrinsic(name))
    }

    /// Joins the two halves of a vector until one lane is left: lane `i` with lane `i + n/2`.
    fn reduce(
        &self,
        stmt: &Stmt,
        join: impl Fn(&Self, VectorValue<'c>, VectorValue<'c>) -> Result<VectorValue<'c>>,
    ) -> Result<BasicValueEnum<'c>> {
        let mut x = self.vector(stmt, 0)?;
        let mut lanes = x.get_type().get_size();
        if !lanes.is_power_of_two() {
            return Err(EmitError::Lanes { op: stmt.op.name(), lanes });
        }
        while lanes > 1 {
            lanes /= 2;
            x = join(self, self.lanes_of(x, 0..lanes)?, self.lanes_of(x, lanes..2 * lanes)?)?;
        }
        Ok(self.builder.build_extract_element(x, self.context.i32_type().const_zero(), "reduced")?)
    }

    /// Some neighbouring lanes of a vector.
    fn lanes_of(&self, x: VectorValue<'c>, lanes: std::ops::Range<u32>) -> Result<VectorValue<'c>> {
        let lanes: Vec<_> = lanes.map(|l| self.context.i32_type().const_int(u64::from(l), false)).collect();
        Ok(self.builder.build_shuffle_vector(x, x.get_type().get_poison(), VectorType::const_vector(&lanes), "half")?)
    }

    fn load(&self, stmt: &Stmt, dtype: DType, lanes: u32) -> Result<BasicValueEnum<'c>> {
        let scalar = self.scalar_type(dtype);
        let ptr = self.element(scalar, self.pointer(stmt, 0)?, self.int(stmt, 1)?)?;
        let ty = if lanes == 1 { scalar } else { vector_of(scalar, lanes).into() };
        let value = self.builder.build_load(ty, ptr, "")?;
        let access = value.as_instruction_value().expect("a load is an instruction");
        access.set_alignment(self.alignment(dtype, lanes)).expect("sizes of numbers are powers of two");
        if self.constant[stmt.args[0].0 as usize] {
            self.mark_invariant(value);
        }
        Ok(value)
    }

    fn store(&self, stmt: &Stmt) -> Result<()> {
        let value = self.arg(stmt, 2)?;
        let ty = self.kernel.ty(stmt.args[2]);
        let dtype = ty.dtype().ok_or_else(|| kind(stmt, value, "a number or a vector"))?;
        let ptr = self.element(self.scalar_type(dtype), self.pointer(stmt, 0)?, self.int(stmt, 1)?)?;
        let access = self.builder.build_store(ptr, value)?;
        access.set_alignment(self.alignment(dtype, ty.lanes())).expect("sizes of numbers are powers of two");
        Ok(())
    }

    /// Bytes that an access may count on: one element; in blocks of threads the whole vector, up to 16 bytes.
    fn alignment(&self, dtype: DType, lanes: u32) -> u32 {
        let lanes = if self.kernel.is_block() { lanes } else { 1 };
        (dtype.bytes() as u32 * lanes).min(16)
    }

    /// One of two pointers into memory that never changes is such a pointer.
    fn choose_constant(&mut self, stmt: &Stmt) {
        if let (&[_, a, b], &[to]) = (stmt.args.as_slice(), stmt.results.as_slice()) {
            self.constant[to.0 as usize] = self.constant[a.0 as usize] && self.constant[b.0 as usize];
        }
    }

    fn offset(&mut self, stmt: &Stmt) -> Result<BasicValueEnum<'c>> {
        let moved = self.element(self.context.i8_type().into(), self.pointer(stmt, 0)?, self.int(stmt, 1)?)?;
        if let (Some(from), Some(to)) = (stmt.args.first(), stmt.results.first()) {
            self.constant[to.0 as usize] = self.constant[from.0 as usize];
        }
        Ok(moved.into())
    }

    /// The address of element `index` of an array. `inbounds` holds, since kernels never leave the tensor that a pointer belongs to; `nuw` does not,
    /// since an index may be negative.
    pub(super) fn element(
        &self,
        scalar: BasicTypeEnum<'c>,
        ptr: PointerValue<'c>,
        index: IntValue<'c>,
    ) -> Result<PointerValue<'c>> {
        // SAFETY: the index has one level and the type is sized; that the address is in bounds is what kernel IR promises of every access.
        Ok(unsafe { self.builder.build_in_bounds_gep(scalar, ptr, &[index], "at")? })
    }

    /// Says that a load gives the same whenever it is done.
    pub(super) fn mark_invariant(&self, load: BasicValueEnum<'c>) {
        let kind = self.context.get_kind_id("invariant.load");
        let access = load.as_instruction_value().expect("a load is an instruction");
        access.set_metadata(self.context.metadata_node(&[]), kind).expect("a node is metadata");
    }

    fn vector(&self, stmt: &Stmt, i: usize) -> Result<VectorValue<'c>> {
        match self.arg(stmt, i)? {
            BasicValueEnum::VectorValue(x) => Ok(x),
            other => Err(kind(stmt, other, "a vector")),
        }
    }
}

/// Bits of a number in a register.
fn bit_width(dtype: DType) -> std::num::NonZero<u32> {
    let bits = if dtype == DType::Bool { 1 } else { dtype.bytes() as u32 * 8 };
    std::num::NonZero::new(bits).expect("numbers have bits")
}

const fn int_predicate(pred: Pred) -> IntPredicate {
    match pred {
        Pred::Eq => IntPredicate::EQ,
        Pred::Ne => IntPredicate::NE,
        Pred::Lt => IntPredicate::SLT,
        Pred::Le => IntPredicate::SLE,
        Pred::Gt => IntPredicate::SGT,
        Pred::Ge => IntPredicate::SGE,
    }
}

const fn float_predicate(pred: Pred) -> FloatPredicate {
    match pred {
        Pred::Eq => FloatPredicate::OEQ,
        Pred::Ne => FloatPredicate::UNE,
        Pred::Lt => FloatPredicate::OLT,
        Pred::Le => FloatPredicate::OLE,
        Pred::Gt => FloatPredicate::OGT,
        Pred::Ge => FloatPredicate::OGE,
    }
}
