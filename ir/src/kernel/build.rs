//! The builder of kernels: each method appends one statement and gives its result.

use super::{KOp, KParam, KType, Kernel, Pred, Region, Space, Stmt, Val};
use crate::dtype::DType;
use crate::schedule::Extent;
use crate::shape::Sym;

/// Builds one kernel, statement by statement. Loops and conditions take closures for their regions.
#[derive(Debug)]
pub struct KernelBuilder {
    kernel: Kernel,
    /// Open regions, innermost last.
    open: Vec<Region>,
}

impl KernelBuilder {
    /// A kernel with these pointer parameters (name, is it written).
    pub fn new(name: &str, params: &[(&str, bool)], grid: Extent) -> Self {
        let mut types = vec![KType::scalar(DType::I64); Kernel::FIRST_PARAM as usize];
        types.extend(params.iter().map(|_| KType::Ptr(Space::Global)));
        let params = params.iter().map(|&(name, written)| KParam { name: name.to_owned(), written }).collect();
        let kernel = Kernel {
            name: name.to_owned(),
            doc: String::new(),
            params,
            grid,
            threads: 1,
            together: 1,
            body: Region::default(),
            tail: None,
            tail_grid: 1.into(),
            types,
        };
        Self { kernel, open: vec![Region::default()] }
    }

    /// Makes each task a block of `threads` threads.
    pub fn threads(&mut self, threads: u32) {
        self.kernel.threads = threads;
    }

    /// Threads of a task.
    pub const fn block_threads(&self) -> u32 {
        self.kernel.threads
    }

    /// Makes room for so many blocks on a multiprocessor.
    pub fn together(&mut self, blocks: u32) {
        self.kernel.together = blocks;
    }

    /// Says what was fused into the kernel.
    pub fn doc(&mut self, doc: impl Into<String>) {
        self.kernel.doc = doc.into();
    }

    /// A dimension of the step.
    pub const fn dim(&self, sym: Sym) -> Val {
        Val(sym.index() as u32)
    }

    /// The task.
    pub const fn task(&self) -> Val {
        Kernel::TASK
    }

    /// Pointer parameter `i`.
    pub const fn param(&self, i: usize) -> Val {
        Val(Kernel::FIRST_PARAM + i as u32)
    }

    /// The type of a value.
    pub fn ty(&self, v: Val) -> KType {
        self.kernel.ty(v)
    }

    /// The finished kernel, without a tail.
    pub fn finish(mut self) -> Kernel {
        self.kernel.body = self.open.pop().expect("the body is open");
        assert!(self.open.is_empty(), "regions close with their closures");
        self.kernel
    }

    /// The finished kernel with a tail, which `build` writes.
    pub fn finish_with_tail(mut self, build: impl FnOnce(&mut Self)) -> Kernel {
        self.kernel.body = self.open.pop().expect("the body is open");
        self.open.push(Region::default());
        build(&mut self);
        self.kernel.tail = self.open.pop();
        self.kernel
    }

    /// The finished kernel with a tail that is run for each task of `grid`.
    pub fn finish_with_tail_grid(mut self, grid: Extent, build: impl FnOnce(&mut Self)) -> Kernel {
        self.kernel.tail_grid = grid;
        self.finish_with_tail(build)
    }

    fn value(&mut self, ty: KType) -> Val {
        self.kernel.types.push(ty);
        Val(self.kernel.types.len() as u32 - 1)
    }

    fn push(&mut self, op: KOp, args: &[Val], results: Vec<Val>, regions: Vec<Region>) {
        let stmt = Stmt { op, args: args.to_vec(), results, regions };
        self.open.last_mut().expect("a region is open").stmts.push(stmt);
    }

    /// Appends an op with one result of type `ty`.
    pub fn emit(&mut self, op: KOp, args: &[Val], ty: KType) -> Val {
        let v = self.value(ty);
        self.push(op, args, vec![v], Vec::new());
        v
    }

    fn like(&mut self, op: KOp, args: &[Val]) -> Val {
        let ty = self.ty(args[0]);
        self.emit(op, args, ty)
    }

    // ---- constants
    /// An i64.
    pub fn const_i64(&mut self, x: i64) -> Val {
        self.emit(KOp::Const { dtype: DType::I64, bits: x }, &[], KType::scalar(DType::I64))
    }
    /// An index: a `u64` that fits in an i64.
    pub fn index(&mut self, x: u64) -> Val {
        self.const_i64(i64::try_from(x).expect("an index fits in 63 bits"))
    }
    /// How many threads share the tasks.
    pub fn team(&mut self) -> Val {
        self.emit(KOp::Team, &[], KType::scalar(DType::I64))
    }
    /// An extent under the dimensions of the step.
    pub fn extent(&mut self, e: &Extent) -> Val {
        match e {
            Extent::Const(n) => self.index(*n),
            Extent::Sym(s) => self.dim(*s),
            Extent::Add(a, b) => {
                let (a, b) = (self.extent(a), self.extent(b));
                self.add(a, b)
            }
            Extent::Mul(a, b) => {
                let (a, b) = (self.extent(a), self.extent(b));
                self.mul(a, b)
            }
            Extent::CeilDiv(a, n) => {
                let a = self.extent(a);
                let up = self.add_const(a, n - 1);
                self.div_const(up, *n)
            }
            Extent::Min(a, b) => {
                let (a, b) = (self.extent(a), self.extent(b));
                self.min_i64(a, b)
            }
            Extent::Above(parts) => {
                let [a, b, then, otherwise] = std::array::from_fn(|i| self.extent(&parts[i]));
                let above = self.cmp(Pred::Gt, a, b);
                self.select(above, then, otherwise)
            }
        }
    }
    /// An i32.
    pub fn const_i32(&mut self, x: i32) -> Val {
        self.emit(KOp::Const { dtype: DType::I32, bits: i64::from(x) }, &[], KType::scalar(DType::I32))
    }
    /// An f32.
    pub fn const_f32(&mut self, x: f32) -> Val {
        self.emit(KOp::Const { dtype: DType::F32, bits: i64::from(x.to_bits()) }, &[], KType::scalar(DType::F32))
    }
    /// An f32 constant with as many lanes as `like` has.
    pub fn f32_like(&mut self, like: Val, x: f32) -> Val {
        let lanes = self.ty(like).lanes();
        self.splat_f32(lanes, x)
    }
    /// An i32 constant with as many lanes as `like` has.
    pub fn i32_like(&mut self, like: Val, x: i32) -> Val {
        let lanes = self.ty(like).lanes();
        self.splat_i32(lanes, x)
    }
    /// `lanes` times the same f32 (a scalar for 1).
    pub fn splat_f32(&mut self, lanes: u32, x: f32) -> Val {
        let s = self.const_f32(x);
        self.splat(s, lanes)
    }
    /// `lanes` times the same i32 (a scalar for 1).
    pub fn splat_i32(&mut self, lanes: u32, x: i32) -> Val {
        let s = self.const_i32(x);
        self.splat(s, lanes)
    }
    /// A scalar in every one of `lanes` lanes; the scalar itself for 1.
    pub fn splat(&mut self, x: Val, lanes: u32) -> Val {
        if lanes == 1 {
            return x;
        }
        let dtype = self.ty(x).dtype().expect("only values are splat");
        self.emit(KOp::Splat { lanes }, &[x], KType::vector(dtype, lanes))
    }
    /// Lane `lane` of a vector.
    pub fn extract(&mut self, x: Val, lane: u32) -> Val {
        let dtype = self.ty(x).dtype().expect("only vectors have lanes");
        self.emit(KOp::Extract { lane }, &[x], KType::scalar(dtype))
    }

    // ---- integers
    /// `a + b`.
    pub fn add(&mut self, a: Val, b: Val) -> Val {
        self.like(KOp::Add, &[a, b])
    }
    /// `a - b`.
    pub fn sub(&mut self, a: Val, b: Val) -> Val {
        self.like(KOp::Sub, &[a, b])
    }
    /// `a * b`.
    pub fn mul(&mut self, a: Val, b: Val) -> Val {
        self.like(KOp::Mul, &[a, b])
    }
    /// `a / b`, signed, rounded to zero.
    pub fn div(&mut self, a: Val, b: Val) -> Val {
        self.like(KOp::Div, &[a, b])
    }
    /// `a % b`, signed.
    pub fn rem(&mut self, a: Val, b: Val) -> Val {
        self.like(KOp::Rem, &[a, b])
    }
    /// `x + n` for an i64 scalar; `x` itself for 0.
    pub fn add_const(&mut self, x: Val, n: u64) -> Val {
        if n == 0 {
            return x;
        }
        let n = self.index(n);
        self.add(x, n)
    }
    /// `x * n` for an i64 scalar; `x` itself for 1.
    pub fn mul_const(&mut self, x: Val, n: u64) -> Val {
        if n == 1 {
            return x;
        }
        let n = self.index(n);
        self.mul(x, n)
    }
    /// `x / n` for a non-negative i64 scalar.
    pub fn div_const(&mut self, x: Val, n: u64) -> Val {
        if n == 1 {
            return x;
        }
        let n = self.index(n);
        self.div(x, n)
    }
    /// `x % n` for a non-negative i64 scalar.
    pub fn rem_const(&mut self, x: Val, n: u64) -> Val {
        let n = self.index(n);
        self.rem(x, n)
    }
    /// The smaller of two i64 scalars.
    pub fn min_i64(&mut self, a: Val, b: Val) -> Val {
        let less = self.cmp(Pred::Lt, a, b);
        self.select(less, a, b)
    }
    /// Bitwise and.
    pub fn and(&mut self, a: Val, b: Val) -> Val {
        self.like(KOp::And, &[a, b])
    }
    /// Bitwise or.
    pub fn or(&mut self, a: Val, b: Val) -> Val {
        self.like(KOp::Or, &[a, b])
    }
    /// Bitwise exclusive or.
    pub fn xor(&mut self, a: Val, b: Val) -> Val {
        self.like(KOp::Xor, &[a, b])
    }
    /// Shift left.
    pub fn shl(&mut self, a: Val, b: Val) -> Val {
        self.like(KOp::Shl, &[a, b])
    }
    /// Logical shift right.
    pub fn ushr(&mut self, a: Val, b: Val) -> Val {
        self.like(KOp::Ushr, &[a, b])
    }
    /// Arithmetic shift right.
    pub fn sshr(&mut self, a: Val, b: Val) -> Val {
        self.like(KOp::Sshr, &[a, b])
    }

    // ---- floats
    /// `a + b`.
    pub fn fadd(&mut self, a: Val, b: Val) -> Val {
        self.like(KOp::Fadd, &[a, b])
    }
    /// `a - b`.
    pub fn fsub(&mut self, a: Val, b: Val) -> Val {
        self.like(KOp::Fsub, &[a, b])
    }
    /// `a * b`.
    pub fn fmul(&mut self, a: Val, b: Val) -> Val {
        self.like(KOp::Fmul, &[a, b])
    }
    /// `a / b`.
    pub fn fdiv(&mut self, a: Val, b: Val) -> Val {
        self.like(KOp::Fdiv, &[a, b])
    }
    /// The smaller.
    pub fn fmin(&mut self, a: Val, b: Val) -> Val {
        self.like(KOp::Fmin, &[a, b])
    }
    /// The larger.
    pub fn fmax(&mut self, a: Val, b: Val) -> Val {
        self.like(KOp::Fmax, &[a, b])
    }
    /// `a * b + c` with one rounding.
    pub fn fma(&mut self, a: Val, b: Val, c: Val) -> Val {
        self.like(KOp::Fma, &[a, b, c])
    }
    /// `-x`.
    pub fn fneg(&mut self, x: Val) -> Val {
        self.like(KOp::Fneg, &[x])
    }
    /// `|x|`.
    pub fn fabs(&mut self, x: Val) -> Val {
        self.like(KOp::Fabs, &[x])
    }
    /// `sqrt(x)`.
    pub fn fsqrt(&mut self, x: Val) -> Val {
        self.like(KOp::Fsqrt, &[x])
    }
    /// Nearest integer as a float.
    pub fn fround(&mut self, x: Val) -> Val {
        self.like(KOp::Fround, &[x])
    }

    // ---- comparing, choosing, converting
    /// Compares two values of one type.
    pub fn cmp(&mut self, pred: Pred, a: Val, b: Val) -> Val {
        let lanes = self.ty(a).lanes();
        self.emit(KOp::Cmp { pred }, &[a, b], KType::vector(DType::Bool, lanes))
    }
    /// `condition ? a : b`.
    pub fn select(&mut self, condition: Val, a: Val, b: Val) -> Val {
        let ty = self.ty(a);
        self.emit(KOp::Select, &[condition, a, b], ty)
    }
    /// True where `condition`, a scalar, is false.
    pub fn not(&mut self, condition: Val) -> Val {
        let (yes, no) = (self.const_i32(1), self.const_i32(0));
        let inverse = self.select(condition, no, yes);
        self.cmp(Pred::Ne, inverse, no)
    }
    /// i32 to f32.
    pub fn to_float(&mut self, x: Val) -> Val {
        let lanes = self.ty(x).lanes();
        self.emit(KOp::ToFloat, &[x], KType::vector(DType::F32, lanes))
    }
    /// f32 to i32, rounded to zero.
    pub fn to_int(&mut self, x: Val) -> Val {
        let lanes = self.ty(x).lanes();
        self.emit(KOp::ToInt, &[x], KType::vector(DType::I32, lanes))
    }
    /// i32 to i64.
    pub fn widen(&mut self, x: Val) -> Val {
        let lanes = self.ty(x).lanes();
        self.emit(KOp::Widen, &[x], KType::vector(DType::I64, lanes))
    }
    /// i64 to i32.
    pub fn narrow(&mut self, x: Val) -> Val {
        let lanes = self.ty(x).lanes();
        self.emit(KOp::Narrow, &[x], KType::vector(DType::I32, lanes))
    }
    /// The same bits as `dtype`.
    pub fn bitcast(&mut self, x: Val, dtype: DType) -> Val {
        let lanes = self.ty(x).lanes();
        self.emit(KOp::Bitcast { dtype }, &[x], KType::vector(dtype, lanes))
    }
    /// Sum of all lanes; the scalar itself if there is one lane.
    pub fn reduce_add(&mut self, x: Val) -> Val {
        if self.ty(x).lanes() == 1 {
            return x;
        }
        self.emit(KOp::ReduceAdd, &[x], KType::scalar(DType::F32))
    }
    /// Largest lane; the scalar itself if there is one lane.
    pub fn reduce_max(&mut self, x: Val) -> Val {
        if self.ty(x).lanes() == 1 {
            return x;
        }
        self.emit(KOp::ReduceMax, &[x], KType::scalar(DType::F32))
    }

    // ---- memory
    /// Scratch for this task. Call it at the top level of the body or of the tail.
    pub fn alloc(&mut self, dtype: DType, elems: u64) -> Val {
        self.emit(KOp::Alloc { dtype, elems }, &[], KType::Ptr(Space::Scratch))
    }
    /// `lanes` elements from element `index` on.
    pub fn load(&mut self, dtype: DType, lanes: u32, ptr: Val, index: Val) -> Val {
        self.emit(KOp::Load { dtype, lanes }, &[ptr, index], KType::vector(dtype, lanes))
    }
    /// 16 floats from element `index` on.
    pub fn load_f32x16(&mut self, ptr: Val, index: Val) -> Val {
        self.load(DType::F32, 16, ptr, index)
    }
    /// One float.
    pub fn load_f32(&mut self, ptr: Val, index: Val) -> Val {
        self.load(DType::F32, 1, ptr, index)
    }
    /// One i32, widened to an index.
    pub fn load_index(&mut self, ptr: Val, index: Val) -> Val {
        let x = self.load(DType::I32, 1, ptr, index);
        self.widen(x)
    }
    /// Stores `value` from element `index` on.
    pub fn store(&mut self, ptr: Val, index: Val, value: Val) {
        self.push(KOp::Store, &[ptr, index, value], Vec::new(), Vec::new());
    }
    /// A pointer `bytes` further.
    pub fn offset(&mut self, ptr: Val, bytes: Val) -> Val {
        self.like(KOp::Offset, &[ptr, bytes])
    }

    // ---- a block of threads
    /// The thread's number in its block.
    pub fn thread(&mut self) -> Val {
        self.emit(KOp::Thread, &[], KType::scalar(DType::I64))
    }
    /// Memory that the threads of a block share. Call it at the top level of the body or of the tail.
    pub fn shared(&mut self, dtype: DType, elems: u64) -> Val {
        self.emit(KOp::Shared { dtype, elems }, &[], KType::Ptr(Space::Shared))
    }
    /// Memory for what tasks of the body hand to the tail, `elems` elements a task. Call it at the top level of both.
    pub fn partials(&mut self, dtype: DType, elems: u64) -> Val {
        self.emit(KOp::Partials { dtype, elems }, &[], KType::Ptr(Space::Scratch))
    }
    /// Waits for all threads of the block.
    pub fn barrier(&mut self) {
        self.push(KOp::Barrier, &[], Vec::new(), Vec::new());
    }
    /// The 32-bit scalar of thread `lane ^ mask` of the warp.
    pub fn shuffle_xor(&mut self, x: Val, mask: u32) -> Val {
        self.like(KOp::ShuffleXor { mask }, &[x])
    }
    /// Four scalars as a vector.
    pub fn quad(&mut self, x: [Val; 4]) -> Val {
        let dtype = self.ty(x[0]).dtype().expect("a scalar");
        self.emit(KOp::Quad, &x, KType::vector(dtype, 4))
    }
    /// The largest i32 of the warp's threads.
    pub fn warp_max(&mut self, x: Val) -> Val {
        self.like(KOp::WarpMax, &[x])
    }
    /// The smallest i32 of the warp's threads.
    pub fn warp_min(&mut self, x: Val) -> Val {
        self.like(KOp::WarpMin, &[x])
    }
    /// Adds to an i32 in memory and gives what was there before.
    pub fn atomic_add(&mut self, ptr: Val, index: Val, x: Val) -> Val {
        self.emit(KOp::AtomicAdd, &[ptr, index, x], KType::scalar(DType::I32))
    }
    /// Two f32 as two 16-bit floats in one i32.
    pub fn pack(&mut self, dtype: DType, low: Val, high: Val) -> Val {
        self.emit(KOp::Pack { dtype }, &[low, high], KType::scalar(DType::I32))
    }
    /// `a * b + c` on two 16-bit floats in one i32.
    pub fn half_fma(&mut self, dtype: DType, a: Val, b: Val, c: Val) -> Val {
        self.like(KOp::HalfFma { dtype }, &[a, b, c])
    }
    /// The f16 in the lower half as f32.
    pub fn half_to_float(&mut self, x: Val) -> Val {
        self.emit(KOp::HalfToFloat, &[x], KType::scalar(DType::F32))
    }
    /// Two FP8 numbers as two f16.
    pub fn fp8_to_f16(&mut self, x: Val) -> Val {
        self.like(KOp::Fp8ToF16, &[x])
    }
    /// `c + a·b` by a warp.
    pub fn mma(&mut self, dtype: DType, a: [Val; 4], b: [Val; 2], c: Val) -> Val {
        let args = [a[0], a[1], a[2], a[3], b[0], b[1], c];
        self.emit(KOp::Mma { dtype }, &args, KType::vector(DType::F32, 4))
    }
    /// Products of rows of A that four warps have with tokens in shared memory: of each group of eight tokens four numbers.
    pub fn mma_group(&mut self, dtype: DType, a: &[[Val; 4]], (b, index): (Val, Val), groups: u32) -> Val {
        let args: Vec<Val> = [b, index].into_iter().chain(a.iter().flatten().copied()).collect();
        let op = KOp::MmaGroup { dtype, steps: a.len() as u32, groups };
        self.emit(op, &args, KType::vector(DType::F32, 4 * groups))
    }
    /// Copies 16 bytes into shared memory while the thread goes on.
    pub fn copy_async(&mut self, (to, at): (Val, Val), (from, from_at): (Val, Val)) {
        self.push(KOp::CopyAsync, &[to, at, from, from_at], Vec::new(), Vec::new());
    }
    /// Ends a group of copies.
    pub fn copy_commit(&mut self) {
        self.push(KOp::CopyCommit, &[], Vec::new(), Vec::new());
    }
    /// Waits for all but the youngest `left` groups of copies.
    pub fn copy_wait(&mut self, left: u32) {
        self.push(KOp::CopyWait { left }, &[], Vec::new(), Vec::new());
    }
    /// Asks for memory to be brought near.
    pub fn prefetch(&mut self, ptr: Val, at: Val, bytes: Val) {
        self.push(KOp::Prefetch, &[ptr, at, bytes], Vec::new(), Vec::new());
    }
    /// Waits for the launches before this one.
    pub fn wait(&mut self) {
        self.push(KOp::Wait, &[], Vec::new(), Vec::new());
    }
    /// Lets the next launch begin.
    pub fn release(&mut self) {
        self.push(KOp::Release, &[], Vec::new(), Vec::new());
    }

    // ---- a CPU's widest vectors and its matrix unit
    /// The numbers of four bits from bit `shift` on, less 8.
    pub fn nibble(&mut self, words: Val, shift: u64) -> Val {
        self.emit(KOp::Nibble { shift: shift as u32 }, &[words], KType::vector(DType::F32, 16))
    }
    /// Two f32 vectors as 32 bf16 in a row.
    pub fn bf16_row(&mut self, first: Val, second: Val) -> Val {
        self.emit(KOp::Bf16Row, &[first, second], KType::vector(DType::I32, 16))
    }
    /// Two f32 vectors as pairs of bf16.
    pub fn bf16_pairs(&mut self, first: Val, second: Val) -> Val {
        self.emit(KOp::Bf16Pairs, &[first, second], KType::vector(DType::I32, 16))
    }
    /// The lowest bytes of four vectors in a row.
    pub fn byte_row(&mut self, vectors: [Val; 4]) -> Val {
        self.emit(KOp::ByteRow, &vectors, KType::vector(DType::I32, 16))
    }
    /// `sum + a[1]·b[1] + a[0]·b[0]` over the two bf16 of a lane.
    pub fn pair_dot(&mut self, sum: Val, a: Val, b: Val) -> Val {
        self.emit(KOp::PairDot, &[sum, a, b], KType::vector(DType::F32, 16))
    }
    /// `sum + Σ a·b` over the four bytes of a lane: unsigned ones of `a`, signed ones of `b`.
    pub fn byte_dot(&mut self, sum: Val, a: Val, b: Val) -> Val {
        self.emit(KOp::ByteDot, &[sum, a, b], KType::vector(DType::I32, 16))
    }
    /// In each lane `sum` and the products of two signed numbers of 16 bits.
    pub fn short_dot(&mut self, sum: Val, a: Val, b: Val) -> Val {
        self.like(KOp::ShortDot, &[sum, a, b])
    }
    /// `c = Σ a·b` in tiles over products of some strips by some, as many in each: the strips, and how many tiles lie one after the other in them.
    pub fn tile_dots(&mut self, c: Val, dots: &[(&[Val], &[Val], u64)]) {
        self.push(KOp::TileZero, &[], Vec::new(), Vec::new());
        for &(a, b, depth) in dots {
            let depth = self.index(depth);
            self.tile_steps((a, b), depth, false, |_, _| {});
        }
        let [(a, b, _), ..] = dots else { return };
        let store = KOp::TileStore { rows: a.len() as u32, columns: b.len() as u32 };
        self.push(store, &[c], Vec::new(), Vec::new());
    }
    /// `c += Σ a·b` of `depth` tiles, but `c = Σ a·b` where `is_first` holds or is none. The tiles of A should leave those of B in the first cache; with tile
    /// `i` of each goes `beside(builder, i)`.
    pub fn tile_add(
        &mut self,
        (c, is_first): (Val, Option<Val>),
        (a, b): (&[Val], &[Val]),
        depth: Val,
        beside: impl FnOnce(&mut Self, Val),
    ) {
        let (rows, columns) = (a.len() as u32, b.len() as u32);
        let begin = |k: &mut Self, op: KOp, args: &[Val]| {
            k.push(op, args, Vec::new(), Vec::new());
            Vec::new()
        };
        let (zero, load) = (KOp::TileZero, KOp::TileLoad { rows, columns });
        match is_first {
            None => begin(self, zero, &[]),
            Some(is_first) => self.if_else(is_first, |k| begin(k, zero, &[]), |k| begin(k, load, &[c])),
        };
        self.tile_steps((a, b), depth, true, beside);
        self.push(KOp::TileStore { rows, columns }, &[c], Vec::new(), Vec::new());
    }

    fn tile_steps(&mut self, (a, b): (&[Val], &[Val]), depth: Val, once: bool, beside: impl FnOnce(&mut Self, Val)) {
        const TILE_BYTES: u64 = 1024;
        let step = KOp::TileStep { rows: a.len() as u32, columns: b.len() as u32, once };
        let zero = self.const_i64(0);
        self.for_each((zero, depth, 1), |k, i| {
            let bytes = k.mul_const(i, TILE_BYTES);
            let tiles: Vec<Val> = a.iter().chain(b).map(|&strip| k.offset(strip, bytes)).collect();
            k.push(step, &tiles, Vec::new(), Vec::new());
            beside(k, i);
        });
    }

    /// `to` becomes the tile `from` with lines and words exchanged.
    pub fn tile_turn(&mut self, to: Val, from: Val) {
        self.push(KOp::TileTurn, &[to, from], Vec::new(), Vec::new());
    }

    // ---- control
    /// A loop with carried values: `body(builder, i, carried)` gives their next values.
    pub fn for_carry(
        &mut self,
        (lo, hi, step): (Val, Val, u64),
        init: &[Val],
        body: impl FnOnce(&mut Self, Val, &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let step = self.index(step);
        let i = self.value(KType::scalar(DType::I64));
        let carried: Vec<Val> = init.iter().map(|&v| self.value(self.ty(v))).collect();
        self.open
            .push(Region { params: std::iter::once(i).chain(carried.iter().copied()).collect(), ..Region::default() });
        let yields = body(self, i, &carried);
        assert_eq!(yields.len(), init.len(), "a loop yields what it carries");
        let mut region = self.open.pop().expect("the loop's region is open");
        region.yields = yields;
        let results: Vec<Val> = init.iter().map(|&v| self.value(self.ty(v))).collect();
        let args: Vec<Val> = [lo, hi, step].into_iter().chain(init.iter().copied()).collect();
        self.push(KOp::For, &args, results.clone(), vec![region]);
        results
    }
    /// A loop from `lo` to `hi` by `step` that carries nothing.
    pub fn for_each(&mut self, (lo, hi, step): (Val, Val, u64), body: impl FnOnce(&mut Self, Val)) {
        self.for_carry((lo, hi, step), &[], |k, i, _| {
            body(k, i);
            Vec::new()
        });
    }
    /// A loop from 0 to `n` by `step`.
    pub fn for_range(&mut self, n: u64, step: u64, body: impl FnOnce(&mut Self, Val)) {
        let lo = self.const_i64(0);
        let hi = self.index(n);
        self.for_each((lo, hi, step), body);
    }
    /// A condition whose regions yield values of one type each.
    pub fn if_else(
        &mut self,
        condition: Val,
        then: impl FnOnce(&mut Self) -> Vec<Val>,
        otherwise: impl FnOnce(&mut Self) -> Vec<Val>,
    ) -> Vec<Val> {
        self.open.push(Region::default());
        let yields = then(self);
        let mut first = self.open.pop().expect("the first region is open");
        first.yields = yields;
        self.open.push(Region::default());
        let yields = otherwise(self);
        let mut second = self.open.pop().expect("the second region is open");
        second.yields = yields;
        let results: Vec<Val> = first.yields.iter().map(|&v| self.value(self.ty(v))).collect();
        self.push(KOp::If, &[condition], results.clone(), vec![first, second]);
        results
    }
    /// A condition without results and without an else.
    pub fn if_then(&mut self, condition: Val, then: impl FnOnce(&mut Self)) {
        self.if_else(
            condition,
            |k| {
                then(k);
                Vec::new()
            },
            |_| Vec::new(),
        );
    }
}
