//! From a kernel's tree to instructions.

use super::code::{Bank, Block, CmpOf, FloatOp, HalfOp, Inst, IntOp, Mma, MmaGroup, Reg, TileStep, UnaryOp};
use crate::dtype::DType;
use crate::kernel::{KOp, KType, Kernel, Region, Stmt, Val};

/// Makes the instructions of a kernel's body and tail.
pub(super) struct Maker<'k> {
    kernel: &'k Kernel,
    threads: usize,
    /// The register of each value that has been defined.
    regs: Vec<Reg>,
    /// How much of each bank is taken; what a region has taken is free again after it.
    taken: [usize; 3],
    /// The most that was taken at once.
    sizes: [usize; 3],
    block: Block,
    depth: usize,
    next_stmt: u32,
    stmt: u32,
}

fn bank(ty: KType) -> Bank {
    match ty {
        KType::Ptr(_) => Bank::Pointer,
        KType::Value { dtype: DType::I64, .. } => Bank::Wide,
        KType::Value { .. } => Bank::Narrow,
    }
}

impl<'k> Maker<'k> {
    pub(super) fn new(kernel: &'k Kernel) -> Self {
        let (regs, threads) = (vec![0; kernel.types.len()], kernel.threads as usize);
        let (taken, sizes, block) = ([0; 3], [0; 3], Block::default());
        let mut maker = Self { kernel, threads, regs, taken, sizes, block, depth: 0, next_stmt: 0, stmt: 0 };
        for v in 0..maker.implied_values() {
            maker.define(Val(v));
        }
        maker
    }

    fn implied_values(&self) -> u32 {
        Kernel::FIRST_PARAM + self.kernel.params.len() as u32
    }

    /// The registers of the implied values.
    pub(super) fn implied(&self) -> Vec<Reg> {
        self.regs[..self.implied_values() as usize].to_vec()
    }

    /// The sizes of the banks.
    pub(super) fn sizes(&self) -> [usize; 3] {
        self.sizes
    }

    pub(super) fn top(&mut self, region: &Region) -> Block {
        let taken = self.taken;
        self.region(region);
        self.taken = taken;
        std::mem::take(&mut self.block)
    }

    fn region(&mut self, region: &Region) {
        for s in &region.stmts {
            self.stmt = self.next_stmt;
            self.next_stmt += 1;
            self.statement(s);
        }
    }

    fn push(&mut self, inst: Inst) -> usize {
        self.block.insts.push(inst);
        self.block.stmts.push(self.stmt);
        self.block.insts.len() - 1
    }

    /// Numbers that a value of this type has in all threads.
    fn numbers(&self, ty: KType) -> usize {
        ty.lanes() as usize * self.threads
    }

    /// A fresh register.
    fn take(&mut self, ty: KType) -> Reg {
        let numbers = self.numbers(ty);
        let bank = bank(ty) as usize;
        let reg = self.taken[bank];
        self.taken[bank] += numbers;
        self.sizes[bank] = self.sizes[bank].max(self.taken[bank]);
        reg
    }

    fn define(&mut self, v: Val) {
        self.regs[v.0 as usize] = self.take(self.kernel.ty(v));
    }

    fn define_all(&mut self, vals: &[Val]) {
        vals.iter().for_each(|&v| self.define(v));
    }

    fn deeper(&mut self, region: &Region) {
        self.depth += 1;
        self.block.depth = self.block.depth.max(self.depth);
        self.region(region);
        self.depth -= 1;
    }

    fn reg(&self, v: Val) -> Reg {
        self.regs[v.0 as usize]
    }

    fn ty(&self, v: Val) -> KType {
        self.kernel.ty(v)
    }

    fn moves(&mut self, to: &[Val], from: &[Val]) {
        for (&d, &a) in to.iter().zip(from) {
            let (ty, d, a) = (self.ty(d), self.reg(d), self.reg(a));
            if d != a {
                self.push(Inst::Move { bank: bank(ty), d, a, n: self.numbers(ty) });
            }
        }
    }

    /// Moves as if all at once: through fresh registers if one target is another's source.
    fn moves_at_once(&mut self, to: &[Val], from: &[Val]) {
        if !from.iter().enumerate().any(|(i, a)| to.iter().enumerate().any(|(j, d)| i != j && a == d)) {
            return self.moves(to, from);
        }
        let fresh: Vec<Reg> = from.iter().map(|&v| self.take(self.kernel.ty(v))).collect();
        for (&a, &d) in from.iter().zip(&fresh) {
            let ty = self.ty(a);
            self.push(Inst::Move { bank: bank(ty), d, a: self.reg(a), n: self.numbers(ty) });
        }
        for (&d, &a) in to.iter().zip(&fresh) {
            let ty = self.ty(d);
            self.push(Inst::Move { bank: bank(ty), d: self.reg(d), a, n: self.numbers(ty) });
        }
    }

    fn statement(&mut self, s: &Stmt) {
        match s.op {
            KOp::For => self.for_loop(s),
            KOp::If => self.condition(s),
            _ => {
                self.define_all(&s.results);
                let inst = self.plain(s);
                self.push(inst);
            }
        }
    }

    fn for_loop(&mut self, s: &Stmt) {
        let inner = &s.regions[0];
        let (hi, step, number) = (self.reg(s.args[1]), self.reg(s.args[2]), self.stmt);
        self.define_all(&inner.params);
        self.define_all(&s.results);
        self.push(Inst::CheckStep { step });
        self.moves(&inner.params[..1], &s.args[..1]);
        self.moves(&inner.params[1..], &s.args[3..]);
        let i = self.reg(inner.params[0]);
        self.push(Inst::Loop);
        let head = self.push(Inst::LoopHead { i, hi, out: 0 });
        let taken = self.taken;
        self.deeper(inner);
        self.stmt = number;
        self.moves_at_once(&inner.params[1..], &inner.yields);
        self.taken = taken;
        let next = self.push(Inst::LoopNext { i, step, head, out: 0 });
        let out = self.push(Inst::End);
        self.block.insts[head] = Inst::LoopHead { i, hi, out };
        self.block.insts[next] = Inst::LoopNext { i, step, head, out };
        self.moves(&s.results, &inner.params[1..]);
    }

    fn condition(&mut self, s: &Stmt) {
        let (c, number) = (self.reg(s.args[0]), self.stmt);
        self.define_all(&s.results);
        let taken = self.taken;
        let first = self.push(Inst::If { c, otherwise: 0 });
        self.deeper(&s.regions[0]);
        self.stmt = number;
        self.moves(&s.results, &s.regions[0].yields);
        self.taken = taken;
        let second = self.push(Inst::Else { c, end: 0 });
        self.deeper(&s.regions[1]);
        self.stmt = number;
        self.moves(&s.results, &s.regions[1].yields);
        self.taken = taken;
        let end = self.push(Inst::End);
        self.block.insts[first] = Inst::If { c, otherwise: second };
        self.block.insts[second] = Inst::Else { c, end };
    }

    /// An allocation of the current task.
    fn own(&mut self, d: Reg, bytes: u64) -> Inst {
        self.block.own.push(bytes);
        Inst::Own { d, piece: self.block.own.len() - 1 }
    }

    fn plain(&mut self, s: &Stmt) -> Inst {
        let arg = |i: usize| s.args.get(i).map_or(0, |&v| self.reg(v));
        let d = s.results.first().map_or(0, |&v| self.reg(v));
        let (a, b) = (arg(0), arg(1));
        let first = s.args.first().map(|&v| self.ty(v));
        let lanes = first.map_or(1, |ty| ty.lanes() as usize);
        let n = lanes * self.threads;
        let wide = first.is_some_and(|ty| bank(ty) == Bank::Wide);
        let int = |op| if wide { Inst::Int64 { op, d, a, b, n } } else { Inst::Int32 { op, d, a, b, n } };
        let float = |op| Inst::Float { op, d, a, b, n };
        let unary = |op| Inst::Unary { op, d, a, n };
        match s.op {
            KOp::Const { dtype: DType::I64, bits } => Inst::Const64 { d, bits },
            KOp::Const { bits, .. } => Inst::Const32 { d, bits: bits as u32 },
            KOp::Alloc { dtype, elems } | KOp::Shared { dtype, elems } => self.own(d, dtype.bytes() * elems),
            KOp::Splat { lanes } if wide => Inst::Splat64 { d, a, lanes: lanes as usize },
            KOp::Splat { lanes } => Inst::Splat32 { d, a, lanes: lanes as usize },
            KOp::Extract { lane } => {
                let a = a + lane as usize * self.threads;
                Inst::Move { bank: if wide { Bank::Wide } else { Bank::Narrow }, d, a, n: self.threads }
            }
            KOp::Add => int(IntOp::Add),
            KOp::Sub => int(IntOp::Sub),
            KOp::Mul => int(IntOp::Mul),
            KOp::Div => int(IntOp::Div),
            KOp::Rem => int(IntOp::Rem),
            KOp::And => int(IntOp::And),
            KOp::Or => int(IntOp::Or),
            KOp::Xor => int(IntOp::Xor),
            KOp::Shl => int(IntOp::Shl),
            KOp::Ushr => int(IntOp::Ushr),
            KOp::Sshr => int(IntOp::Sshr),
            KOp::Fadd => float(FloatOp::Add),
            KOp::Fsub => float(FloatOp::Sub),
            KOp::Fmul => float(FloatOp::Mul),
            KOp::Fdiv => float(FloatOp::Div),
            KOp::Fmin => float(FloatOp::Min),
            KOp::Fmax => float(FloatOp::Max),
            KOp::Fma => Inst::Fma { d, a, b, c: arg(2), n },
            KOp::Fneg => unary(UnaryOp::Neg),
            KOp::Fabs => unary(UnaryOp::Abs),
            KOp::Fsqrt => unary(UnaryOp::Sqrt),
            KOp::Fround => unary(UnaryOp::Round),
            KOp::ToFloat => unary(UnaryOp::ToFloat),
            KOp::ToInt => unary(UnaryOp::ToInt),
            KOp::Cmp { pred } => {
                let of = match first.and_then(KType::dtype) {
                    Some(DType::F32) => CmpOf::F32,
                    Some(DType::I64) => CmpOf::I64,
                    _ => CmpOf::I32,
                };
                Inst::Cmp { of, pred, d, a, b, n }
            }
            KOp::Select => {
                let ty = self.ty(s.args[1]);
                let (of, n) = (ty.lanes() as usize, self.numbers(ty));
                let (c, a, b) = (a, b, arg(2));
                match bank(ty) {
                    bank if lanes == 1 => Inst::Choose { bank, d, c, a, b, lanes: of },
                    Bank::Wide => Inst::Select64 { d, c, a, b, n },
                    _ => Inst::Select32 { d, c, a, b, n },
                }
            }
            KOp::Widen => Inst::Widen { d, a, n },
            KOp::Narrow => Inst::Narrow { d, a, n },
            KOp::Bitcast { .. } => Inst::Move { bank: if wide { Bank::Wide } else { Bank::Narrow }, d, a, n },
            KOp::ReduceAdd => Inst::ReduceAdd { d, a, lanes },
            KOp::ReduceMax => Inst::ReduceMax { d, a, lanes },
            KOp::Load { dtype: DType::I64, lanes } => Inst::Load64 { d, p: a, i: b, lanes: lanes as usize },
            KOp::Load { lanes, .. } => Inst::Load32 { d, p: a, i: b, lanes: lanes as usize },
            KOp::Store => {
                let (ty, v) = (self.ty(s.args[2]), arg(2));
                let lanes = ty.lanes() as usize;
                if bank(ty) == Bank::Wide {
                    Inst::Store64 { p: a, i: b, v, lanes }
                } else {
                    Inst::Store32 { p: a, i: b, v, lanes }
                }
            }
            KOp::Offset => Inst::Offset { d, p: a, bytes: b },
            KOp::For | KOp::If => unreachable!("control is made in `statement`"),
            KOp::Partials { .. } => Inst::Partials { d },
            KOp::Team => Inst::Team { d },
            KOp::Thread => Inst::Thread { d },
            KOp::Barrier => Inst::Barrier,
            KOp::ShuffleXor { mask } => Inst::Shuffle { d, a, mask: mask as usize },
            KOp::Quad => Inst::Quad { d, from: [0, 1, 2, 3].map(arg) },
            KOp::WarpMax | KOp::WarpMin => Inst::Best { d, a, largest: s.op == KOp::WarpMax },
            KOp::AtomicAdd => Inst::AtomicAdd { d, p: a, i: b, x: arg(2) },
            KOp::Pack { dtype } => Inst::Half { op: HalfOp::Pack(dtype), d, a, b, c: 0 },
            KOp::HalfFma { dtype } => Inst::Half { op: HalfOp::Fma(dtype), d, a, b, c: arg(2) },
            KOp::HalfToFloat => Inst::Half { op: HalfOp::ToFloat, d, a, b: a, c: 0 },
            KOp::Fp8ToF16 => Inst::Half { op: HalfOp::Fp8, d, a, b: a, c: 0 },
            KOp::Mma { dtype } => {
                let mma = Mma { dtype, d, a: [0, 1, 2, 3].map(arg), b: [4, 5].map(arg), c: arg(6) };
                self.block.mmas.push(mma);
                Inst::Mma { number: self.block.mmas.len() - 1 }
            }
            KOp::MmaGroup { dtype, steps, groups } => {
                let rows = (2..2 + 4 * steps as usize).map(arg).collect();
                self.block.mma_groups.push(MmaGroup { dtype, d, b: [a, b], a: rows, groups: groups as usize });
                Inst::MmaGroup { number: self.block.mma_groups.len() - 1 }
            }
            KOp::CopyAsync => Inst::CopyAsync { to: a, at: b, from: arg(2), from_at: arg(3) },
            KOp::CopyCommit => Inst::CopyCommit,
            KOp::CopyWait { left } => Inst::CopyWait { left: left as usize },
            KOp::Prefetch => Inst::Prefetch { p: a, at: b, bytes: arg(2) },
            KOp::Wait => {
                self.block.wait.get_or_insert(self.stmt);
                Inst::Wait
            }
            KOp::Release => Inst::Release,
            KOp::Nibble { shift } => Inst::Nibble { d, a, shift, n },
            KOp::Bf16Row => Inst::Bf16 { in_a_row: true, d, a, b },
            KOp::Bf16Pairs => Inst::Bf16 { in_a_row: false, d, a, b },
            KOp::ByteRow => Inst::ByteRow { d, from: [0, 1, 2, 3].map(arg) },
            KOp::ByteDot => Inst::ByteDot { d, sum: a, a: b, b: arg(2), n },
            KOp::PairDot => Inst::PairDot { d, sum: a, a: b, b: arg(2), n },
            KOp::ShortDot => Inst::ShortDot { d, sum: a, a: b, b: arg(2), n },
            KOp::TileTurn => Inst::TileTurn { to: a, from: b },
            KOp::TileZero => Inst::TileZero,
            KOp::TileStep { rows, columns, .. } => {
                let (rows, all) = (rows as usize, (rows + columns) as usize);
                let (a, b) = ((0..rows).map(arg).collect(), (rows..all).map(arg).collect());
                self.block.tile_steps.push(TileStep { a, b });
                Inst::TileStep { number: self.block.tile_steps.len() - 1 }
            }
            KOp::TileStore { rows, columns } => Inst::TileStore { c: a, rows, columns },
            KOp::TileLoad { rows, columns } => Inst::TileLoad { c: a, rows, columns },
        }
    }
}
