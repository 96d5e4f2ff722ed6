//! Vector widths of a backend: kernel IR to kernel IR.
//!
//! A backend with 128-bit registers sees no vector of more than four lanes: each wider value becomes several parts, in loops,
//! conditions and memory alike. The numbers stay the same, bit for bit: what is elementwise does not care, and a sum over
//! lanes keeps the tree of its op (lane `i` with lane `i + n/2`), of which the first levels are whole parts. Backends with
//! wider registers get kernels as they are.

use std::collections::BTreeMap;

use nextc_ir::DType;
use nextc_ir::Target;
use nextc_ir::kernel::verify::{KernelError, verify_kernel};
use nextc_ir::kernel::{KOp, KType, Kernel, Region, Stmt, Val};
use nextc_ir::schedule::KernelModule;

/// Why a module cannot be made legal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A kernel was broken before.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Broken(Vec<KernelError>),
    /// A vector of i64 is wider than a register: its parts would have fewer lanes than those of i32 that it converts to.
    #[error("kernel @{kernel}: %{} is {ty}, expected no i64 vector wider than {bits} bits", value.0)]
    WideInt {
        /// The kernel.
        kernel: String,
        /// The value.
        value: Val,
        /// Its type.
        ty: KType,
        /// Bits of a vector register.
        bits: u32,
    },
}

/// Splits every vector that is wider than the target's registers, if these have 128 bits.
/// # Errors
/// [`Error`] if a kernel is broken, or has i64 vectors that do not fit.
pub fn legalise(mut module: KernelModule, target: &Target) -> Result<KernelModule, Error> {
    if target.vector_bits <= 128 {
        module.kernels =
            module.kernels.iter().map(|k| legalise_kernel(k, target.vector_bits)).collect::<Result<_, _>>()?;
    }
    Ok(module)
}

/// Splits the vectors of one kernel into parts of `bits`.
/// # Errors
/// See [`legalise`].
pub fn legalise_kernel(kernel: &Kernel, bits: u32) -> Result<Kernel, Error> {
    verify_kernel(kernel).map_err(Error::Broken)?;
    let wide = |ty: &KType| ty.dtype() == Some(DType::I64) && ty.lanes() > 1 && ty.lanes() * 64 > bits;
    if let Some(i) = kernel.types.iter().position(wide) {
        let (value, ty) = (Val(i as u32), kernel.types[i]);
        return Err(Error::WideInt { kernel: kernel.name.clone(), value, ty, bits });
    }
    Ok(Splitter::new(kernel, (bits / 32).max(1)).kernel())
}

struct Splitter<'k> {
    old: &'k Kernel,
    /// Lanes of a part.
    lanes: u32,
    types: Vec<KType>,
    /// The parts of each old value.
    parts: Vec<Vec<Val>>,
    /// Constants at the beginning of the body or the tail: offsets of parts.
    offsets: BTreeMap<i64, Val>,
    out: Vec<Stmt>,
}

impl<'k> Splitter<'k> {
    fn new(old: &'k Kernel, lanes: u32) -> Self {
        let implied = Kernel::FIRST_PARAM as usize + old.params.len();
        let mut parts = vec![Vec::new(); old.types.len()];
        for (i, parts) in parts[..implied].iter_mut().enumerate() {
            parts.push(Val(i as u32));
        }
        let types = old.types[..implied].to_vec();
        Self { old, lanes, types, parts, offsets: BTreeMap::new(), out: Vec::new() }
    }

    fn kernel(mut self) -> Kernel {
        let body = self.top(&self.old.body);
        let tail = self.old.tail.as_ref().map(|tail| self.top(tail));
        Kernel {
            name: self.old.name.clone(),
            doc: self.old.doc.clone(),
            params: self.old.params.clone(),
            grid: self.old.grid.clone(),
            threads: self.old.threads,
            together: self.old.together,
            body,
            tail,
            tail_grid: self.old.tail_grid.clone(),
            types: self.types,
        }
    }

    fn top(&mut self, region: &Region) -> Region {
        let mut region = self.region(region);
        let offsets = std::mem::take(&mut self.offsets);
        let constant = |(bits, v): (i64, Val)| Stmt {
            op: KOp::Const { dtype: DType::I64, bits },
            args: Vec::new(),
            results: vec![v],
            regions: Vec::new(),
        };
        region.stmts.splice(0..0, offsets.into_iter().map(constant));
        region
    }

    fn region(&mut self, region: &Region) -> Region {
        let outer = std::mem::take(&mut self.out);
        let params = self.define(&region.params);
        region.stmts.iter().for_each(|s| self.stmt(s));
        let stmts = std::mem::replace(&mut self.out, outer);
        Region { params, stmts, yields: self.all_parts(&region.yields) }
    }

    fn value(&mut self, ty: KType) -> Val {
        self.types.push(ty);
        Val(self.types.len() as u32 - 1)
    }

    /// The type of a part of a value, and how many parts it has.
    fn split(&self, ty: KType) -> (KType, usize) {
        match ty {
            KType::Value { dtype, lanes } if lanes > self.lanes && dtype != DType::I64 => {
                (KType::vector(dtype, self.lanes), (lanes / self.lanes) as usize)
            }
            ty => (ty, 1),
        }
    }

    /// Fresh parts for old values that a region or a statement with regions defines.
    fn define(&mut self, vals: &[Val]) -> Vec<Val> {
        for &v in vals {
            let (ty, n) = self.split(self.old.ty(v));
            self.parts[v.0 as usize] = (0..n).map(|_| self.value(ty)).collect();
        }
        self.all_parts(vals)
    }

    fn all_parts(&self, vals: &[Val]) -> Vec<Val> {
        vals.iter().flat_map(|v| self.parts[v.0 as usize].iter().copied()).collect()
    }

    /// Part `i` of an operand; what has one part serves every part of the result.
    fn part(&self, v: Val, i: usize) -> Val {
        let parts = &self.parts[v.0 as usize];
        if parts.len() == 1 { parts[0] } else { parts[i] }
    }

    fn emit(&mut self, op: KOp, args: Vec<Val>, ty: KType) -> Val {
        let v = self.value(ty);
        self.out.push(Stmt { op, args, results: vec![v], regions: Vec::new() });
        v
    }

    fn stmt(&mut self, s: &Stmt) {
        match s.op {
            KOp::For | KOp::If => self.control(s),
            KOp::Store => self.store(s),
            // its operands have one part each
            KOp::Prefetch => {
                let args = self.all_parts(&s.args);
                self.out.push(Stmt { op: s.op, args, results: Vec::new(), regions: Vec::new() });
            }
            op => {
                let result = s.results[0];
                self.parts[result.0 as usize] = match op {
                    KOp::Splat { .. } => self.splat(s),
                    KOp::Extract { lane } => vec![self.extract(s, lane)],
                    KOp::ReduceAdd => vec![self.reduce(s, KOp::Fadd)],
                    KOp::ReduceMax => vec![self.reduce(s, KOp::Fmax)],
                    KOp::Load { dtype, .. } => self.load(s, dtype),
                    _ => self.elementwise(s),
                };
            }
        }
    }

    fn control(&mut self, s: &Stmt) {
        let args = self.all_parts(&s.args);
        let regions = s.regions.iter().map(|r| self.region(r)).collect();
        let results = self.define(&s.results);
        self.out.push(Stmt { op: s.op, args, results, regions });
    }

    fn elementwise(&mut self, s: &Stmt) -> Vec<Val> {
        let (ty, n) = self.split(self.old.ty(s.results[0]));
        (0..n)
            .map(|i| {
                let args = s.args.iter().map(|&a| self.part(a, i)).collect();
                self.emit(s.op, args, ty)
            })
            .collect()
    }

    fn splat(&mut self, s: &Stmt) -> Vec<Val> {
        let (ty, n) = self.split(self.old.ty(s.results[0]));
        let scalar = self.part(s.args[0], 0);
        let part = if ty.lanes() == 1 { scalar } else { self.emit(KOp::Splat { lanes: ty.lanes() }, vec![scalar], ty) };
        vec![part; n]
    }

    fn extract(&mut self, s: &Stmt, lane: u32) -> Val {
        let (ty, _) = self.split(self.old.ty(s.args[0]));
        let part = self.parts[s.args[0].0 as usize][(lane / ty.lanes()) as usize];
        if ty.lanes() == 1 {
            return part;
        }
        self.emit(KOp::Extract { lane: lane % ty.lanes() }, vec![part], self.old.ty(s.results[0]))
    }

    /// The tree of a reduction: while there are several parts its levels are whole parts, then lanes of one.
    fn reduce(&mut self, s: &Stmt, pair: KOp) -> Val {
        let mut parts = self.parts[s.args[0].0 as usize].clone();
        let ty = self.types[parts[0].0 as usize];
        while parts.len() > 1 {
            let (low, high) = parts.split_at(parts.len() / 2);
            parts = low.iter().zip(high).map(|(&a, &b)| self.emit(pair, vec![a, b], ty)).collect();
        }
        if ty.lanes() == 1 { parts[0] } else { self.emit(s.op, parts, KType::scalar(DType::F32)) }
    }

    /// The index of part `i`: `index + i * lanes`.
    fn index(&mut self, index: Val, i: usize, lanes: u32) -> Val {
        let index = self.part(index, 0);
        if i == 0 {
            return index;
        }
        let scalar = KType::scalar(DType::I64);
        let by = i as i64 * i64::from(lanes);
        let by = match self.offsets.get(&by) {
            Some(&v) => v,
            None => {
                let v = self.value(scalar);
                self.offsets.insert(by, v);
                v
            }
        };
        self.emit(KOp::Add, vec![index, by], scalar)
    }

    fn load(&mut self, s: &Stmt, dtype: DType) -> Vec<Val> {
        let (ty, n) = self.split(self.old.ty(s.results[0]));
        let pointer = self.part(s.args[0], 0);
        (0..n)
            .map(|i| {
                let index = self.index(s.args[1], i, ty.lanes());
                self.emit(KOp::Load { dtype, lanes: ty.lanes() }, vec![pointer, index], ty)
            })
            .collect()
    }

    fn store(&mut self, s: &Stmt) {
        let parts = self.parts[s.args[2].0 as usize].clone();
        let pointer = self.part(s.args[0], 0);
        for (i, part) in parts.into_iter().enumerate() {
            let lanes = self.types[part.0 as usize].lanes();
            let index = self.index(s.args[1], i, lanes);
            let args = vec![pointer, index, part];
            self.out.push(Stmt { op: KOp::Store, args, results: Vec::new(), regions: Vec::new() });
        }
    }
}

#[cfg(test)]
mod tests {
    use nextc_ir::kernel::eval::{Buffer, Options, Place, run};
    use nextc_ir::kernel::{KernelBuilder, Pred};
    use nextc_ir::schedule::Extent;
    use proptest::prelude::*;

    use super::*;

    const X: [(&str, bool); 2] = [("x", false), ("out", true)];

    /// Splits a kernel, checks that no vector is too wide, and that both forms write the same bits.
    fn check(kernel: &Kernel, x: &[f32], out_bytes: u64) {
        let split = legalise_kernel(kernel, 128).expect("the kernel is sound");
        verify_kernel(&split).expect("the split kernel is sound");
        assert!(split.types.iter().all(|ty| ty.lanes() <= 4));
        let run = |kernel: &Kernel| {
            let mut buffers = [Buffer::from_f32(x), Buffer::uninit(out_bytes)];
            run(kernel, [3, 1, 1, 1], &mut buffers, &[Place::start(0), Place::start(1)], Options::default()).map(|()| {
                let [_, out] = buffers;
                out
            })
        };
        assert_eq!(run(kernel).expect("the kernel runs"), run(&split).expect("the split kernel runs"));
    }

    fn numbers(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + 13) % 1009) as f32 * 0.013 - 6.0 + 1e-3 / (i + 1) as f32).collect()
    }

    #[test]
    fn loops_conditions_and_sums_keep_their_bits() {
        let mut k = KernelBuilder::new("loops", &X, Extent::from(2));
        let (zero, four) = (k.const_i64(0), k.const_i64(64));
        let (sum, top) = (k.splat_f32(16, 0.0), k.splat_f32(8, -1.0));
        let ends = k.for_carry((zero, four, 16), &[sum, top], |k, i, carried| {
            let x = k.load_f32x16(k.param(0), i);
            let y = k.load(DType::F32, 8, k.param(0), i);
            let e = k.exp(x);
            let (a, b) = (k.fma(e, x, carried[0]), k.fmax(carried[1], y));
            vec![a, b]
        });
        let (total, largest, lane) = (k.reduce_add(ends[0]), k.reduce_max(ends[1]), k.extract(ends[0], 13));
        let first = k.cmp(Pred::Eq, k.task(), zero);
        let chosen = k.if_else(first, |k| vec![k.silu(ends[0])], |k| vec![k.fneg(ends[0])]);
        let at = k.mul_const(k.task(), 19);
        k.store(k.param(1), at, chosen[0]);
        for (i, v) in [total, largest, lane].into_iter().enumerate() {
            let at = k.add_const(at, 16 + i as u64);
            k.store(k.param(1), at, v);
        }
        let kernel = k.finish_with_tail(|k| {
            let at = k.const_i64(40);
            let x = k.load_f32x16(k.param(0), at);
            k.store(k.param(1), at, x);
        });
        check(&kernel, &numbers(64), 4 * 56);
    }

    #[test]
    fn a_wide_i64_vector_is_refused_by_name() {
        let mut k = KernelBuilder::new("wide", &X, Extent::from(1));
        let x = k.splat_i32(16, 1);
        let _ = k.widen(x);
        let kernel = k.finish();
        assert!(matches!(legalise_kernel(&kernel, 128), Err(Error::WideInt { .. })));
    }

    #[test]
    fn only_narrow_targets_change_a_module() {
        let mut k = KernelBuilder::new("copy", &X, Extent::from(1));
        let zero = k.const_i64(0);
        let x = k.load_f32x16(k.param(0), zero);
        k.store(k.param(1), zero, x);
        let module = KernelModule {
            info: nextc_ir::graph::ModelInfo::default(),
            kernels: vec![k.finish()],
            programs: Vec::new(),
            weights: Vec::new(),
            states: Vec::new(),
            arena: nextc_ir::schedule::ArenaPlan::default(),
            page_tokens: 64,
        };
        let widest = |bits| {
            let legal = legalise(module.clone(), &Target::cpu("test", &[], bits)).expect("the module is sound");
            legal.kernels[0].types.iter().map(|ty| ty.lanes()).max()
        };
        assert_eq!([widest(128), widest(256), widest(512)], [Some(4), Some(16), Some(16)]);
    }

    /// Appends one op, chosen by numbers, to pools of vectors of one width.
    fn random_op(k: &mut KernelBuilder, floats: &mut Vec<Val>, ints: &mut Vec<Val>, (op, i, j): (u8, usize, usize)) {
        let (x, y) = (floats[i % floats.len()], floats[j % floats.len()]);
        let (a, b) = (ints[i % ints.len()], ints[j % ints.len()]);
        let lanes = k.ty(x).lanes();
        match op % 14 {
            0 => floats.push(k.fadd(x, y)),
            1 => floats.push(k.fma(x, y, x)),
            2 => floats.push(k.fmin(x, y)),
            3 => floats.push(k.sigmoid(x)),
            4 => ints.push(k.xor(a, b)),
            5 => ints.push(k.mul(a, b)),
            6 => floats.push(k.to_float(a)),
            7 => ints.push(k.bitcast(x, DType::I32)),
            8 => {
                let mask = k.cmp(Pred::Lt, x, y);
                floats.push(k.select(mask, y, x));
            }
            9 => {
                let lane = k.extract(a, j as u32 % lanes);
                let zero = k.const_i32(0);
                let one_for_all = k.cmp(Pred::Gt, lane, zero);
                ints.push(k.select(one_for_all, a, b));
            }
            10 => {
                let sum = k.reduce_add(x);
                floats.push(k.splat(sum, lanes));
            }
            11 => {
                let top = k.reduce_max(x);
                floats.push(k.splat(top, lanes));
            }
            12 => {
                let mask = k.cmp(Pred::Ge, a, b);
                let other = k.cmp(Pred::Ne, x, y);
                let both = k.and(mask, other);
                ints.push(k.select(both, b, a));
            }
            _ => {
                let lane = k.extract(x, j as u32 % lanes);
                floats.push(k.splat(lane, lanes));
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn random_kernels_keep_their_bits(
            width in 2u32..5,
            ops in prop::collection::vec((any::<u8>(), 0usize..1000, 0usize..1000), 1..40),
        ) {
            let lanes = 1 << width;
            let mut k = KernelBuilder::new("random", &X, Extent::from(1));
            let zero = k.const_i64(0);
            let x = k.load(DType::F32, lanes, k.param(0), zero);
            let (mut floats, mut ints) = (vec![x], vec![k.bitcast(x, DType::I32)]);
            for op in ops {
                random_op(&mut k, &mut floats, &mut ints, op);
            }
            for (i, v) in floats.iter().chain(&ints).enumerate() {
                let at = k.index(u64::from(lanes) * i as u64);
                k.store(k.param(1), at, *v);
            }
            let bytes = 4 * u64::from(lanes) * (floats.len() + ints.len()) as u64;
            check(&k.finish(), &numbers(16), bytes);
        }
    }
}
