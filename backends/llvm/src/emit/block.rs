//! What the threads of a block do together, as LLVM's NVPTX intrinsics; as PTX where LLVM has none, or drops the ordering of an atomic.
//!
//! Source: the PTX ISA manual, sections 9.7.9 (conversions), 9.7.13 (synchronisation) and 9.7.14 (matrix multiply-accumulate).

use std::borrow::Cow;
use std::fmt::Write as _;

use inkwell::attributes::{Attribute, AttributeLoc};
use inkwell::intrinsics::Intrinsic;
use inkwell::module::Linkage;
use inkwell::types::{BasicMetadataTypeEnum, BasicType, BasicTypeEnum};
use inkwell::values::{BasicMetadataValueEnum, BasicValueEnum, CallSiteValue, IntValue};
use nextc_ir::DType;
use nextc_ir::kernel::{Kernel, Space, Stmt};

use super::gpu::address_space;
use super::{EmitError, Emitter, Result, kind};

/// The symbol of the memory that a launch gives each block.
const SHARED: &str = "nextc_shared";

/// What a descriptor of a matrix in shared memory says beside its address: lines of 128 bytes whose pieces are exchanged, eight lines every 1024 bytes
/// (section 9.7.15.5.1).
const SWIZZLED_128: u64 = 1 << 62 | 64 << 32 | 1 << 16;

/// A piece of PTX: text, constraints, and whether it does more than compute its result.
struct Ptx {
    text: String,
    constraints: Cow<'static, str>,
    effects: bool,
}

impl<'c> Emitter<'_, 'c> {
    /// The thread's number in its block.
    pub(super) fn thread(&self) -> Result<IntValue<'c>> {
        self.special_register("llvm.nvvm.read.ptx.sreg.tid.x")
    }

    /// A 32-bit special register as i64.
    pub(super) fn special_register(&self, name: &'static str) -> Result<IntValue<'c>> {
        let value = self.call_intrinsic(name, &[])?.try_as_basic_value().basic().ok_or(EmitError::Intrinsic(name))?;
        Ok(self.builder.build_int_z_extend(value.into_int_value(), self.context.i64_type(), "")?)
    }

    pub(super) fn call_intrinsic(
        &self,
        name: &'static str,
        args: &[BasicMetadataValueEnum<'c>],
    ) -> Result<CallSiteValue<'c>> {
        self.call_overloaded(name, &[], args)
    }

    /// A call of an intrinsic that is overloaded on types.
    pub(super) fn call_overloaded(
        &self,
        name: &'static str,
        types: &[BasicTypeEnum<'c>],
        args: &[BasicMetadataValueEnum<'c>],
    ) -> Result<CallSiteValue<'c>> {
        let callee = Intrinsic::find(name).and_then(|i| i.get_declaration(self.module, types));
        Ok(self.builder.build_call(callee.ok_or(EmitError::Intrinsic(name))?, args, "")?)
    }

    /// An intrinsic without operands that only orders things.
    pub(super) fn order(&self, name: &'static str) -> Result<()> {
        self.call_intrinsic(name, &[]).map(drop)
    }

    /// Meets the other threads. What they wrote to shared memory is seen by their products too, which read it by a way of their own (section 9.7.15.4).
    pub(super) fn barrier(&self) -> Result<()> {
        if self.has_groups {
            let fence = Ptx {
                text: "fence.proxy.async.shared::cta;".to_owned(),
                constraints: "~{memory}".into(),
                effects: true,
            };
            self.call_ptx(&fence, None, &[])?;
        }
        let first = self.context.i32_type().const_zero();
        self.call_intrinsic("llvm.nvvm.barrier.cta.sync.aligned.all", &[first.into()]).map(drop)
    }

    /// The next piece of the block's shared memory.
    pub(super) fn shared(&mut self, dtype: DType, elems: u64) -> Result<BasicValueEnum<'c>> {
        let bytes = self.context.i8_type();
        let memory = self.module.get_global(SHARED).unwrap_or_else(|| {
            let memory = self.module.add_global(bytes.array_type(0), Some(address_space(Space::Shared)), SHARED);
            memory.set_linkage(Linkage::External);
            memory.set_alignment(Kernel::SWIZZLED_ALIGN as u32);
            memory
        });
        let (at, taken) = Kernel::place_shared(self.taken_bytes, elems * dtype.bytes());
        self.taken_bytes = taken;
        let at = self.context.i64_type().const_int(at, false);
        Ok(self.element(bytes.into(), memory.as_pointer_value(), at)?.into())
    }

    pub(super) fn shuffle_xor(&self, stmt: &Stmt, mask: u32) -> Result<BasicValueEnum<'c>> {
        let x = self.arg(stmt, 0)?;
        let i32 = self.context.i32_type();
        let name = match x {
            BasicValueEnum::FloatValue(_) => "llvm.nvvm.shfl.sync.bfly.f32",
            BasicValueEnum::IntValue(_) => "llvm.nvvm.shfl.sync.bfly.i32",
            other => return Err(kind(stmt, other, "a 32-bit scalar")),
        };
        let (all, lanes) = (i32.const_all_ones(), i32.const_int(31, false));
        let args = [all.into(), x.into(), i32.const_int(mask.into(), false).into(), lanes.into()];
        self.call_intrinsic(name, &args)?.try_as_basic_value().basic().ok_or(EmitError::Intrinsic(name))
    }

    pub(super) fn quad(&self, stmt: &Stmt) -> Result<BasicValueEnum<'c>> {
        let vector = match self.arg(stmt, 0)? {
            BasicValueEnum::FloatValue(x) => x.get_type().vec_type(4),
            BasicValueEnum::IntValue(x) => x.get_type().vec_type(4),
            other => return Err(kind(stmt, other, "a 32-bit scalar")),
        };
        let mut quad = vector.get_undef();
        for lane in 0..4 {
            let at = self.context.i32_type().const_int(lane, false);
            quad = self.builder.build_insert_element(quad, self.arg(stmt, lane as usize)?, at, "quad")?;
        }
        Ok(quad.into())
    }

    /// The largest or smallest i32 of a warp.
    pub(super) fn warp_best(&self, stmt: &Stmt, name: &'static str) -> Result<BasicValueEnum<'c>> {
        let all = self.context.i32_type().const_all_ones();
        let args = [self.arg(stmt, 0)?.into(), all.into()];
        self.call_intrinsic(name, &args)?.try_as_basic_value().basic().ok_or(EmitError::Intrinsic(name))
    }

    /// LLVM's `atomicrmw` loses its ordering on the way to PTX, so this is PTX.
    pub(super) fn atomic_add(&self, stmt: &Stmt) -> Result<BasicValueEnum<'c>> {
        let i32 = self.context.i32_type();
        let at = self.element(i32.into(), self.pointer(stmt, 0)?, self.int(stmt, 1)?)?;
        let ptx = Ptx {
            text: "atom.acq_rel.gpu.global.add.u32 $0, [$1], $2;".to_owned(),
            constraints: "=r,l,r,~{memory}".into(),
            effects: true,
        };
        self.ptx(&ptx, Some(i32.into()), &[at.into(), self.arg(stmt, 2)?])
    }

    pub(super) fn pack(&self, stmt: &Stmt, dtype: DType) -> Result<BasicValueEnum<'c>> {
        let text = match dtype {
            DType::F16 => "cvt.rn.satfinite.f16x2.f32 $0, $2, $1;",
            _ => "cvt.rn.bf16x2.f32 $0, $2, $1;",
        };
        let args = [self.arg(stmt, 0)?, self.arg(stmt, 1)?];
        self.pure_ptx(text.to_owned(), "=r,f,f", self.context.i32_type().into(), &args)
    }

    pub(super) fn half_fma(&self, stmt: &Stmt, dtype: DType) -> Result<BasicValueEnum<'c>> {
        let text = format!("fma.rn.{}x2 $0, $1, $2, $3;", dtype.name());
        let args = [self.arg(stmt, 0)?, self.arg(stmt, 1)?, self.arg(stmt, 2)?];
        self.pure_ptx(text, "=r,r,r,r", self.context.i32_type().into(), &args)
    }

    pub(super) fn half_to_float(&self, stmt: &Stmt) -> Result<BasicValueEnum<'c>> {
        let bits = self.builder.build_int_truncate(self.int(stmt, 0)?, self.context.i16_type(), "")?;
        let half = self.builder.build_bit_cast(bits, self.context.f16_type(), "")?.into_float_value();
        Ok(self.builder.build_float_ext(half, self.context.f32_type(), "")?.into())
    }

    pub(super) fn fp8_to_f16(&self, stmt: &Stmt) -> Result<BasicValueEnum<'c>> {
        let pair = self.builder.build_int_truncate(self.int(stmt, 0)?, self.context.i16_type(), "")?;
        let text = "cvt.rn.f16x2.e4m3x2 $0, $1;".to_owned();
        self.pure_ptx(text, "=r,h", self.context.i32_type().into(), &[pair.into()])
    }

    /// `mma.sync` needs all threads of the warp: the call is convergent.
    pub(super) fn mma(&self, stmt: &Stmt, dtype: DType) -> Result<BasicValueEnum<'c>> {
        let ty = dtype.name();
        let text = format!(
            "mma.sync.aligned.m16n8k16.row.col.f32.{ty}.{ty}.f32 {{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9}}, {{$10,$11,$12,$13}};"
        );
        let mut args = (0..6).map(|i| self.arg(stmt, i)).collect::<Result<Vec<_>>>()?;
        let BasicValueEnum::VectorValue(c) = self.arg(stmt, 6)? else {
            return Err(kind(stmt, self.arg(stmt, 6)?, "four floats"));
        };
        let lane = |i: u64| self.context.i32_type().const_int(i, false);
        for i in 0..4 {
            args.push(self.builder.build_extract_element(c, lane(i), "c")?);
        }
        let f32 = self.context.f32_type();
        let four = self.context.struct_type(&[f32.into(); 4], false);
        let sums = self.pure_ptx(text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", four.into(), &args)?.into_struct_value();
        let mut d = c.get_type().get_poison();
        for i in 0..4 {
            let sum = self.builder.build_extract_value(sums, i as u32, "d")?;
            d = self.builder.build_insert_element(d, sum, lane(i), "d")?;
        }
        Ok(d.into())
    }

    /// `wgmma`, started and waited for at once: what overlaps are the groups of warps.
    pub(super) fn mma_group(
        &self,
        stmt: &Stmt,
        dtype: DType,
        (steps, groups): (u32, u32),
    ) -> Result<BasicValueEnum<'c>> {
        let (sums, words, ty) = (4 * groups, 4 * steps, dtype.name());
        let list = |from: u32, count: u32| (from..from + count).map(|i| format!("${i}")).collect::<Vec<_>>().join(", ");
        let (d, begin) = (list(0, sums), sums + words);
        let mut text = format!(
            "{{\n.reg .pred first, other;\n.reg .b32 at;\n.reg .b64 b;\n\
             setp.ne.u32 first, 0, 0;\nsetp.eq.u32 other, 0, 0;\n\
             shr.u32 at, ${begin}, 4;\nand.b32 at, at, 0x3fff;\ncvt.u64.u32 b, at;\nor.b64 b, b, {SWIZZLED_128:#x};\n\
             wgmma.fence.sync.aligned;\n"
        );
        for step in 0..steps {
            let (a, adds) = (list(sums + 4 * step, 4), if step == 0 { "first" } else { "other" });
            let tokens = 8 * groups;
            if step > 0 {
                // a step is 32 bytes, and an address counts in sixteens
                text.push_str("add.s64 b, b, 2;\n");
            }
            writeln!(
                text,
                "wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{ty}.{ty} {{{d}}}, {{{a}}}, b, {adds}, 1, 1, 0;"
            )
            .expect("a string takes everything");
        }
        text.push_str("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n}");
        let at = self.element(self.context.i32_type().into(), self.pointer(stmt, 0)?, self.int(stmt, 1)?)?;
        let at = self.builder.build_ptr_to_int(at, self.context.i32_type(), "b")?;
        let mut args = (0..words as usize).map(|i| self.arg(stmt, 2 + i)).collect::<Result<Vec<_>>>()?;
        args.push(at.into());
        let of = |kind: &str, count: u32| vec![kind; count as usize].join(",");
        let constraints = [of("=f", sums), of("r", words + 1), "~{memory}".to_owned()].join(",");
        let f32 = self.context.f32_type();
        let all = self.context.struct_type(&vec![f32.into(); sums as usize], false);
        let ptx = Ptx { text, constraints: constraints.into(), effects: true };
        let found = self.ptx(&ptx, Some(all.into()), &args)?.into_struct_value();
        let mut d = f32.vec_type(sums).get_poison();
        for i in 0..sums {
            let sum = self.builder.build_extract_value(found, i, "d")?;
            d = self.builder.build_insert_element(d, sum, self.context.i32_type().const_int(i.into(), false), "d")?;
        }
        Ok(d.into())
    }

    pub(super) fn copy_async(&self, stmt: &Stmt) -> Result<()> {
        let i32 = self.context.i32_type();
        let to = self.element(i32.into(), self.pointer(stmt, 0)?, self.int(stmt, 1)?)?;
        let from = self.element(i32.into(), self.pointer(stmt, 2)?, self.int(stmt, 3)?)?;
        self.call_intrinsic("llvm.nvvm.cp.async.cg.shared.global.16", &[to.into(), from.into()]).map(drop)
    }

    pub(super) fn copy_wait(&self, left: u32) -> Result<()> {
        let left = self.context.i32_type().const_int(left.into(), false);
        self.call_intrinsic("llvm.nvvm.cp.async.wait.group", &[left.into()]).map(drop)
    }

    pub(super) fn prefetch(&self, stmt: &Stmt) -> Result<()> {
        let at = self.element(self.context.i8_type().into(), self.pointer(stmt, 0)?, self.int(stmt, 1)?)?;
        let bytes = self.builder.build_int_truncate(self.int(stmt, 2)?, self.context.i32_type(), "")?;
        let ptx = Ptx {
            text: "cp.async.bulk.prefetch.L2.global [$0], $1;".to_owned(),
            constraints: "l,r".into(),
            effects: true,
        };
        self.call_ptx(&ptx, None, &[at.into(), bytes.into()]).map(drop)
    }

    /// PTX that only computes.
    fn pure_ptx(
        &self,
        text: String,
        constraints: &'static str,
        ty: BasicTypeEnum<'c>,
        args: &[BasicValueEnum<'c>],
    ) -> Result<BasicValueEnum<'c>> {
        self.ptx(&Ptx { text, constraints: constraints.into(), effects: false }, Some(ty), args)
    }

    fn ptx(&self, ptx: &Ptx, ty: Option<BasicTypeEnum<'c>>, args: &[BasicValueEnum<'c>]) -> Result<BasicValueEnum<'c>> {
        self.call_ptx(ptx, ty, args)?.try_as_basic_value().basic().ok_or(EmitError::Intrinsic("a result of inline PTX"))
    }

    fn call_ptx(
        &self,
        ptx: &Ptx,
        ty: Option<BasicTypeEnum<'c>>,
        args: &[BasicValueEnum<'c>],
    ) -> Result<CallSiteValue<'c>> {
        let params: Vec<BasicMetadataTypeEnum<'c>> = args.iter().map(|a| a.get_type().into()).collect();
        let function = match ty {
            Some(ty) => ty.fn_type(&params, false),
            None => self.context.void_type().fn_type(&params, false),
        };
        let code = self.context.create_inline_asm(
            function,
            ptx.text.clone(),
            ptx.constraints.to_string(),
            ptx.effects,
            false,
            None,
            false,
        );
        let args: Vec<BasicMetadataValueEnum<'c>> = args.iter().map(|&a| a.into()).collect();
        let call = self.builder.build_indirect_call(function, code, &args, "")?;
        let convergent = Attribute::get_named_enum_kind_id("convergent");
        call.add_attribute(AttributeLoc::Function, self.context.create_enum_attribute(convergent, 0));
        Ok(call)
    }
}
