//! Every op of the kernel IR as Cranelift instructions.

use cranelift::prelude::types::{F32, F32X4, F64, I8, I32, I32X4, I64, I64X2};
use cranelift::prelude::{FloatCC, Ieee32, InstBuilder, IntCC, Type, Value};
use nextc_ir::DType;
use nextc_ir::kernel::{KOp, KType, Pred, Stmt, Val};

use crate::Error;
use crate::address::Sum;
use crate::function::{Emitter, Known};
use crate::types::machine_type;
use crate::vector;

impl Emitter<'_, '_> {
    /// Emits one statement.
    pub fn stmt(&mut self, stmt: &Stmt) -> Result<(), Error> {
        match stmt.op {
            KOp::Const { dtype, bits } => self.constant(stmt, dtype, bits),
            KOp::Team => {
                let value = self.team();
                self.result(stmt, value)
            }
            KOp::Alloc { dtype, elems } => {
                let [] = self.args(stmt)?;
                let sum = self.alloc(elems * dtype.bytes());
                self.result_sum(stmt, sum)
            }
            KOp::Splat { lanes: _ } => self.splat(stmt),
            KOp::Extract { lane } => self.extract(stmt, lane),
            KOp::Add | KOp::Sub | KOp::Mul => self.sum_or_product(stmt),
            KOp::Div | KOp::Rem => self.quotient(stmt),
            KOp::And => self.binary(stmt, |e, a, b| e.fb.ins().band(a, b)),
            KOp::Or => self.binary(stmt, |e, a, b| e.fb.ins().bor(a, b)),
            KOp::Xor => self.binary(stmt, |e, a, b| e.fb.ins().bxor(a, b)),
            KOp::Shl | KOp::Ushr | KOp::Sshr => self.shift(stmt),
            KOp::Fadd => self.binary(stmt, |e, a, b| e.fb.ins().fadd(a, b)),
            KOp::Fsub => self.binary(stmt, |e, a, b| e.fb.ins().fsub(a, b)),
            KOp::Fmul => self.binary(stmt, |e, a, b| e.fb.ins().fmul(a, b)),
            KOp::Fdiv => self.binary(stmt, |e, a, b| e.fb.ins().fdiv(a, b)),
            KOp::Fmin => self.binary(stmt, |e, a, b| vector::fmin(&mut e.fb, a, b)),
            KOp::Fmax => self.binary(stmt, |e, a, b| vector::fmax(&mut e.fb, a, b)),
            KOp::Fma => {
                let [a, b, c] = self.values_of(stmt)?;
                let value = self.fb.ins().fma(a, b, c);
                self.result(stmt, value)
            }
            KOp::ShortDot => {
                let [sum, a, b] = self.values_of(stmt)?;
                let products = vector::short_products(&mut self.fb, a, b);
                let value = self.fb.ins().iadd(sum, products);
                self.result(stmt, value)
            }
            KOp::Fneg => self.unary(stmt, |e, x| e.fb.ins().fneg(x)),
            KOp::Fabs => self.unary(stmt, |e, x| e.fb.ins().fabs(x)),
            KOp::Fsqrt => self.unary(stmt, |e, x| e.fb.ins().sqrt(x)),
            KOp::Fround => self.unary(stmt, |e, x| e.fb.ins().nearest(x)),
            KOp::Cmp { pred } => self.compare(stmt, pred),
            KOp::Select => self.select(stmt),
            KOp::ToFloat | KOp::ToInt | KOp::Widen | KOp::Narrow | KOp::Bitcast { dtype: _ } => self.convert(stmt),
            KOp::ReduceAdd | KOp::ReduceMax => self.reduce(stmt),
            KOp::Load { dtype, lanes } => self.load(stmt, dtype, lanes),
            KOp::Store => self.store(stmt),
            KOp::Offset => {
                let [pointer, bytes] = self.args(stmt)?;
                let (pointer, bytes) = (self.sum(pointer)?, self.sum(bytes)?);
                let sum = pointer.add(&mut self.fb, &bytes);
                self.result_sum(stmt, sum)
            }
            KOp::Partials { .. } => {
                let value = self.partials();
                self.result(stmt, value)
            }
            KOp::For => self.for_loop(stmt),
            KOp::If => self.if_else(stmt),
            KOp::Thread
            | KOp::Shared { .. }
            | KOp::Barrier
            | KOp::ShuffleXor { .. }
            | KOp::Quad
            | KOp::WarpMax
            | KOp::WarpMin
            | KOp::AtomicAdd
            | KOp::Pack { .. }
            | KOp::HalfFma { .. }
            | KOp::HalfToFloat
            | KOp::Fp8ToF16
            | KOp::Mma { .. }
            | KOp::MmaGroup { .. }
            | KOp::CopyAsync
            | KOp::CopyCommit
            | KOp::CopyWait { .. }
            | KOp::Wait
            | KOp::Release => Err(Error::Block { op: stmt.op.name() }),
            // changes nothing
            KOp::Prefetch => Ok(()),
            KOp::Nibble { .. }
            | KOp::Bf16Row
            | KOp::Bf16Pairs
            | KOp::ByteRow
            | KOp::ByteDot
            | KOp::PairDot
            | KOp::TileTurn
            | KOp::TileZero
            | KOp::TileStep { .. }
            | KOp::TileStore { .. }
            | KOp::TileLoad { .. } => Err(Error::Tile { op: stmt.op.name() }),
        }
    }

    fn constant(&mut self, stmt: &Stmt, dtype: DType, bits: i64) -> Result<(), Error> {
        let val = self.result_of(stmt)?;
        if dtype == DType::I64 {
            self.define_sum(val, Sum::constant(bits));
            return Ok(());
        }
        let ty = self.register(KType::scalar(dtype))?;
        let bits = if dtype == DType::Bool { i64::from(bits != 0) } else { bits };
        let value = if ty == F32 {
            self.fb.ins().f32const(Ieee32::with_bits(bits as u32))
        } else {
            let unsigned = bits & (-1_i64 as u64 >> (64 - ty.bits())) as i64;
            self.fb.ins().iconst(ty, unsigned)
        };
        self.set(val, Known { value, depth: 0, sum: None, constant: Some(bits), splat: None });
        Ok(())
    }

    fn splat(&mut self, stmt: &Stmt) -> Result<(), Error> {
        let [scalar] = self.args(stmt)?;
        let val = self.result_of(stmt)?;
        let known = self.known(scalar)?.clone();
        let ty = self.register(self.kernel.ty(val))?;
        let is_bool = self.kernel.ty(scalar).dtype() == Some(DType::Bool);
        let value = match known.constant {
            _ if !ty.is_vector() => known.value,
            Some(bits) => vector::splat_constant(&mut self.fb, ty, if is_bool { -bits } else { bits }),
            None if is_bool => vector::splat_mask(&mut self.fb, known.value),
            None => self.fb.ins().splat(ty, known.value),
        };
        self.set(val, Known { value, depth: known.depth, sum: None, constant: None, splat: Some(scalar) });
        Ok(())
    }

    fn extract(&mut self, stmt: &Stmt, lane: u32) -> Result<(), Error> {
        let [vector] = self.args(stmt)?;
        let ty = self.kernel.ty(vector);
        if lane >= ty.lanes() || ty.lanes() == 1 {
            return Err(self.unsupported(stmt, ty));
        }
        let x = self.value(vector)?;
        let mut value = self.fb.ins().extractlane(x, lane as u8);
        if ty.dtype() == Some(DType::Bool) {
            value = self.fb.ins().icmp_imm_u(IntCC::NotEqual, value, 0);
        }
        self.result(stmt, value)
    }

    /// Sums and products; those of addresses are kept as sums.
    fn sum_or_product(&mut self, stmt: &Stmt) -> Result<(), Error> {
        let [a, b] = self.args(stmt)?;
        if self.kernel.ty(a) != KType::scalar(DType::I64) {
            return self.binary(stmt, |e, a, b| match stmt.op {
                KOp::Sub => e.fb.ins().isub(a, b),
                KOp::Mul => e.fb.ins().imul(a, b),
                _ => e.fb.ins().iadd(a, b),
            });
        }
        let (a, b) = (self.sum(a)?, self.sum(b)?);
        let fb = &mut self.fb;
        let sum = match (stmt.op, a.as_constant(), b.as_constant()) {
            (KOp::Mul, _, Some(factor)) => a.scale(fb, factor),
            (KOp::Mul, Some(factor), None) => b.scale(fb, factor),
            (KOp::Mul, None, None) => {
                let (x, y) = (a.value(fb), b.value(fb));
                Sum::term(a.depth().max(b.depth()), fb.ins().imul(x, y))
            }
            (KOp::Sub, ..) => {
                let negative = b.scale(fb, -1);
                a.add(fb, &negative)
            }
            _ => a.add(fb, &b),
        };
        self.result_sum(stmt, sum)
    }

    fn quotient(&mut self, stmt: &Stmt) -> Result<(), Error> {
        let [a, _] = self.args(stmt)?;
        let ty = self.kernel.ty(a);
        if ty.lanes() != 1 {
            return Err(self.unsupported(stmt, ty));
        }
        let is_div = stmt.op == KOp::Div;
        self.binary(stmt, |e, a, b| if is_div { e.fb.ins().sdiv(a, b) } else { e.fb.ins().srem(a, b) })
    }

    /// Cranelift shifts all lanes by one scalar; amounts that are not a splat go lane by lane.
    fn shift(&mut self, stmt: &Stmt) -> Result<(), Error> {
        let [x, amount] = self.args(stmt)?;
        let one = |fb: &mut cranelift::prelude::FunctionBuilder<'_>, x: Value, amount: Value| match stmt.op {
            KOp::Ushr => fb.ins().ushr(x, amount),
            KOp::Sshr => fb.ins().sshr(x, amount),
            _ => fb.ins().ishl(x, amount),
        };
        let is_index = self.kernel.ty(x) == KType::scalar(DType::I64);
        if let (KOp::Shl, true, Some(bits @ 0..63)) = (stmt.op, is_index, self.known(amount)?.constant) {
            let sum = self.sum(x)?.scale(&mut self.fb, 1 << bits);
            return self.result_sum(stmt, sum);
        }
        let (vector, amounts) = (self.value(x)?, self.value(amount)?);
        let value = match self.known(amount)?.splat {
            Some(scalar) => {
                let amount = self.value(scalar)?;
                one(&mut self.fb, vector, amount)
            }
            None if self.kernel.ty(x).lanes() > 1 => vector::shift_lanes(&mut self.fb, (vector, amounts), one),
            None => one(&mut self.fb, vector, amounts),
        };
        self.result(stmt, value)
    }

    fn compare(&mut self, stmt: &Stmt, pred: Pred) -> Result<(), Error> {
        let [a, b] = self.values_of(stmt)?;
        let ty = self.fb.func.dfg.value_type(a);
        let mut value = if ty.lane_type() == F32 {
            self.fb.ins().fcmp(float_condition(pred), a, b)
        } else {
            self.fb.ins().icmp(int_condition(pred), a, b)
        };
        if ty == I64X2 {
            let mask = vector::bitcast(&mut self.fb, I32X4, value);
            value = vector::permute(&mut self.fb, mask, [0, 2, 0, 2]);
        } else if ty.is_vector() && ty.lane_bits() != 32 {
            return Err(self.unsupported(stmt, self.kernel.ty(stmt.args[0])));
        }
        self.result(stmt, value)
    }

    fn select(&mut self, stmt: &Stmt) -> Result<(), Error> {
        let [condition, a, b] = self.values_of(stmt)?;
        let ty = self.fb.func.dfg.value_type(a);
        let value = if !self.fb.func.dfg.value_type(condition).is_vector() {
            self.fb.ins().select(condition, a, b)
        } else if matches!(ty, F32X4 | I32X4 | I64X2) {
            vector::blend(&mut self.fb, condition, a, b)
        } else {
            return Err(self.unsupported(stmt, self.kernel.ty(stmt.args[1])));
        };
        self.result(stmt, value)
    }

    fn convert(&mut self, stmt: &Stmt) -> Result<(), Error> {
        let [x] = self.values_of(stmt)?;
        let to = self.register(self.kernel.ty(self.result_of(stmt)?))?;
        let from = self.fb.func.dfg.value_type(x);
        let value = match (stmt.op, from, to) {
            (KOp::ToFloat, I32, F32) | (KOp::ToFloat, I32X4, F32X4) => self.fb.ins().fcvt_from_sint(to, x),
            (KOp::ToInt, F32, I32) | (KOp::ToInt, F32X4, I32X4) => vector::truncate(&mut self.fb, x),
            (KOp::Widen, I32, I64) => self.fb.ins().sextend(I64, x),
            (KOp::Widen, I32X4, I64X2) => self.fb.ins().swiden_low(x),
            (KOp::Narrow, I64, I32) => self.fb.ins().ireduce(I32, x),
            (KOp::Narrow, I64X2, I32X4) => {
                let x = vector::bitcast(&mut self.fb, I32X4, x);
                vector::permute(&mut self.fb, x, [0, 2, 0, 2])
            }
            (KOp::Bitcast { .. }, from, to) if from.bits() == to.bits() && to != I8 => {
                vector::bitcast(&mut self.fb, to, x)
            }
            _ => return Err(self.unsupported(stmt, self.kernel.ty(stmt.args[0]))),
        };
        self.result(stmt, value)
    }

    fn reduce(&mut self, stmt: &Stmt) -> Result<(), Error> {
        let [x] = self.values_of(stmt)?;
        let ty = self.kernel.ty(stmt.args[0]);
        let value = match (stmt.op, ty.dtype(), ty.lanes()) {
            (_, _, 1) => x,
            (KOp::ReduceAdd, Some(DType::F32 | DType::I32 | DType::I64), lanes) => {
                vector::reduce(&mut self.fb, x, lanes, vector::add)
            }
            (KOp::ReduceMax, Some(DType::F32), lanes) => vector::reduce(&mut self.fb, x, lanes, vector::fmax),
            _ => return Err(self.unsupported(stmt, ty)),
        };
        self.result(stmt, value)
    }

    fn load(&mut self, stmt: &Stmt, dtype: DType, lanes: u32) -> Result<(), Error> {
        let [pointer, index] = self.args(stmt)?;
        let ty = self.register(KType::vector(dtype, lanes))?;
        let (base, offset) = self.address(stmt, pointer, index, dtype)?;
        let flags = self.memory_flags(self.space(stmt, pointer)?);
        let value = if is_half(ty, dtype, lanes) {
            let half = self.fb.ins().load(F64, flags, base, offset);
            vector::from_lower_half(&mut self.fb, ty, half)
        } else {
            self.fb.ins().load(ty, flags, base, offset)
        };
        let val = self.result_of(stmt)?;
        self.define(val, value);
        Ok(())
    }

    fn store(&mut self, stmt: &Stmt) -> Result<(), Error> {
        let [pointer, index, stored] = self.args(stmt)?;
        let KType::Value { dtype, lanes } = self.kernel.ty(stored) else {
            return Err(self.unsupported(stmt, self.kernel.ty(stored)));
        };
        let (base, offset) = self.address(stmt, pointer, index, dtype)?;
        let flags = self.memory_flags(self.space(stmt, pointer)?);
        let mut value = self.value(stored)?;
        if is_half(self.fb.func.dfg.value_type(value), dtype, lanes) {
            value = vector::lower_half(&mut self.fb, value);
        }
        self.fb.ins().store(flags, value, base, offset);
        Ok(())
    }

    /// Register and displacement of element `index` of a pointer.
    fn address(&mut self, stmt: &Stmt, pointer: Val, index: Val, dtype: DType) -> Result<(Value, i32), Error> {
        if dtype == DType::Bool {
            return Err(self.unsupported(stmt, KType::scalar(dtype)));
        }
        let (pointer, index) = (self.sum(pointer)?, self.sum(index)?);
        let bytes = index.scale(&mut self.fb, dtype.bytes() as i64);
        Ok(pointer.add(&mut self.fb, &bytes).base_and_offset(&mut self.fb))
    }

    fn space(&self, stmt: &Stmt, pointer: Val) -> Result<nextc_ir::kernel::Space, Error> {
        match self.kernel.ty(pointer) {
            KType::Ptr(space) => Ok(space),
            ty @ KType::Value { .. } => Err(self.unsupported(stmt, ty)),
        }
    }

    // ---- operands and results
    fn unary(&mut self, stmt: &Stmt, emit: impl Fn(&mut Self, Value) -> Value) -> Result<(), Error> {
        let [x] = self.values_of(stmt)?;
        let value = emit(self, x);
        self.result(stmt, value)
    }

    fn binary(&mut self, stmt: &Stmt, emit: impl Fn(&mut Self, Value, Value) -> Value) -> Result<(), Error> {
        let [a, b] = self.values_of(stmt)?;
        let value = emit(self, a, b);
        self.result(stmt, value)
    }

    /// Checks a count that the verifier should have checked.
    pub fn expect(&self, stmt: &Stmt, what: &'static str, found: usize, expected: usize) -> Result<(), Error> {
        if found == expected {
            return Ok(());
        }
        Err(Error::Shape { kernel: self.kernel.name.clone(), op: stmt.op.name(), what, found, expected })
    }

    fn args<const N: usize>(&self, stmt: &Stmt) -> Result<[Val; N], Error> {
        self.expect(stmt, "operands", stmt.args.len(), N)?;
        Ok(std::array::from_fn(|i| stmt.args[i]))
    }

    fn values_of<const N: usize>(&self, stmt: &Stmt) -> Result<[Value; N], Error> {
        let args = self.args::<N>(stmt)?;
        let values = self.all_values(&args)?;
        Ok(std::array::from_fn(|i| values[i]))
    }

    fn result_of(&self, stmt: &Stmt) -> Result<Val, Error> {
        self.expect(stmt, "results", stmt.results.len(), 1)?;
        Ok(stmt.results[0])
    }

    /// Defines the result of a pure op: it changes where its operands do.
    fn result(&mut self, stmt: &Stmt, value: Value) -> Result<(), Error> {
        let val = self.result_of(stmt)?;
        self.register(self.kernel.ty(val))?;
        let mut depth = 0;
        for &arg in &stmt.args {
            depth = depth.max(self.known(arg)?.depth);
        }
        self.define_at(val, value, depth);
        Ok(())
    }

    fn result_sum(&mut self, stmt: &Stmt, sum: Sum) -> Result<(), Error> {
        let val = self.result_of(stmt)?;
        self.define_sum(val, sum);
        Ok(())
    }

    /// The register type of a kernel type.
    fn register(&self, ty: KType) -> Result<Type, Error> {
        machine_type(ty).ok_or_else(|| Error::Width { kernel: self.kernel.name.clone(), ty })
    }

    fn unsupported(&self, stmt: &Stmt, ty: KType) -> Error {
        Error::Unsupported { kernel: self.kernel.name.clone(), op: stmt.op.name(), ty }
    }
}

/// True if a vector fills half of its register in memory.
fn is_half(ty: Type, dtype: DType, lanes: u32) -> bool {
    ty.is_vector() && dtype.bytes() * u64::from(lanes) == 8
}

const fn float_condition(pred: Pred) -> FloatCC {
    match pred {
        Pred::Eq => FloatCC::Equal,
        Pred::Ne => FloatCC::NotEqual,
        Pred::Lt => FloatCC::LessThan,
        Pred::Le => FloatCC::LessThanOrEqual,
        Pred::Gt => FloatCC::GreaterThan,
        Pred::Ge => FloatCC::GreaterThanOrEqual,
    }
}

const fn int_condition(pred: Pred) -> IntCC {
    match pred {
        Pred::Eq => IntCC::Equal,
        Pred::Ne => IntCC::NotEqual,
        Pred::Lt => IntCC::SignedLessThan,
        Pred::Le => IntCC::SignedLessThanOrEqual,
        Pred::Gt => IntCC::SignedGreaterThan,
        Pred::Ge => IntCC::SignedGreaterThanOrEqual,
    }
}
