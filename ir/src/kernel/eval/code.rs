//! A kernel made ready to run: its tree as a list of instructions over registers.
//!
//! Values of 32 bits and masks have a register of 16 lanes each; an i64 has one slot for each lane; pointers have a bank
//! of their own. Loops and conditions become jumps.

use super::EvalError;
use crate::dtype::DType;
use crate::kernel::{KOp, KType, Kernel, Pred, Region, Stmt, Val};

/// A register's index in its bank.
pub(super) type Reg = usize;

/// Integer ops of two operands.
#[derive(Clone, Copy, Debug)]
pub(super) enum IntOp {
    Add,
    Sub,
    Mul,
    Div,
    Rem,
    And,
    Or,
    Xor,
    Shl,
    Ushr,
    Sshr,
}

/// Float ops of two operands.
#[derive(Clone, Copy, Debug)]
pub(super) enum FloatOp {
    Add,
    Sub,
    Mul,
    Div,
    Min,
    Max,
}

/// Ops of one operand from 32 bits to 32 bits.
#[derive(Clone, Copy, Debug)]
pub(super) enum UnaryOp {
    Neg,
    Abs,
    Sqrt,
    Round,
    ToFloat,
    ToInt,
}

/// What is compared.
#[derive(Clone, Copy, Debug)]
pub(super) enum CmpOf {
    F32,
    I32,
    I64,
}

/// The banks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bank {
    Narrow,
    Wide,
    Pointer,
}

/// One instruction: `d` is where the result goes, `n` the number of lanes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Inst {
    Const32 {
        d: Reg,
        bits: u32,
    },
    Const64 {
        d: Reg,
        bits: i64,
    },
    Alloc {
        d: Reg,
        scratch: usize,
    },
    Splat32 {
        d: Reg,
        a: Reg,
        n: usize,
    },
    Splat64 {
        d: Reg,
        a: Reg,
        n: usize,
    },
    Extract32 {
        d: Reg,
        a: Reg,
        lane: usize,
    },
    Int32 {
        op: IntOp,
        d: Reg,
        a: Reg,
        b: Reg,
        n: usize,
    },
    Int64 {
        op: IntOp,
        d: Reg,
        a: Reg,
        b: Reg,
        n: usize,
    },
    Float {
        op: FloatOp,
        d: Reg,
        a: Reg,
        b: Reg,
        n: usize,
    },
    Fma {
        d: Reg,
        a: Reg,
        b: Reg,
        c: Reg,
        n: usize,
    },
    Unary {
        op: UnaryOp,
        d: Reg,
        a: Reg,
        n: usize,
    },
    Cmp {
        of: CmpOf,
        pred: Pred,
        d: Reg,
        a: Reg,
        b: Reg,
        n: usize,
    },
    /// Lane by lane.
    Select32 {
        d: Reg,
        c: Reg,
        a: Reg,
        b: Reg,
        n: usize,
    },
    Select64 {
        d: Reg,
        c: Reg,
        a: Reg,
        b: Reg,
        n: usize,
    },
    /// All lanes by one condition.
    Choose {
        bank: Bank,
        d: Reg,
        c: Reg,
        a: Reg,
        b: Reg,
        n: usize,
    },
    Widen {
        d: Reg,
        a: Reg,
        n: usize,
    },
    Narrow {
        d: Reg,
        a: Reg,
        n: usize,
    },
    Move {
        bank: Bank,
        d: Reg,
        a: Reg,
        n: usize,
    },
    ReduceAdd {
        d: Reg,
        a: Reg,
        n: usize,
    },
    ReduceMax {
        d: Reg,
        a: Reg,
        n: usize,
    },
    Load32 {
        d: Reg,
        p: Reg,
        i: Reg,
        n: usize,
    },
    Load64 {
        d: Reg,
        p: Reg,
        i: Reg,
        n: usize,
    },
    Store32 {
        p: Reg,
        i: Reg,
        v: Reg,
        n: usize,
    },
    Store64 {
        p: Reg,
        i: Reg,
        v: Reg,
        n: usize,
    },
    Offset {
        d: Reg,
        p: Reg,
        bytes: Reg,
    },
    Jump {
        to: usize,
    },
    JumpUnless {
        c: Reg,
        to: usize,
    },
    CheckStep {
        step: Reg,
    },
    /// Leaves the loop when its counter has reached `hi`.
    LoopHead {
        i: Reg,
        hi: Reg,
        out: usize,
    },
    LoopNext {
        i: Reg,
        step: Reg,
        head: usize,
        out: usize,
    },
}

/// The instructions of a body or a tail.
#[derive(Clone, Debug, Default)]
pub(super) struct Block {
    pub insts: Vec<Inst>,
    /// For each instruction, the number of its statement in the order of the text.
    pub stmts: Vec<u32>,
    /// Bytes of each allocation.
    pub scratch: Vec<u64>,
}

/// A kernel made ready to run; see [`super`].
#[derive(Clone, Debug)]
pub struct Code {
    pub(super) kernel: Kernel,
    pub(super) body: Block,
    pub(super) tail: Option<Block>,
    /// Sizes of the three banks.
    pub(super) narrow: usize,
    pub(super) wide: usize,
    pub(super) pointers: usize,
    /// The registers of the implied values: dimensions, task, parameters.
    pub(super) implied: Vec<Reg>,
}

impl Code {
    /// Checks a kernel and makes it ready.
    /// # Errors
    /// [`EvalError::Invalid`] with every invariant that the kernel breaks.
    pub fn new(kernel: &Kernel) -> Result<Self, EvalError> {
        crate::kernel::verify::verify_kernel(kernel).map_err(EvalError::Invalid)?;
        if kernel.is_block() {
            return Err(EvalError::Block(kernel.name.clone()));
        }
        let mut maker =
            Maker { kernel, regs: Vec::new(), sizes: [0; 3], block: Block::default(), next_stmt: 0, stmt: 0 };
        maker.regs = kernel.types.iter().map(|&ty| maker.sizes.take(ty)).collect();
        let body = maker.top(&kernel.body);
        let tail = kernel.tail.as_ref().map(|tail| maker.top(tail));
        let [narrow, wide, pointers] = maker.sizes;
        let implied = maker.regs[..Kernel::FIRST_PARAM as usize + kernel.params.len()].to_vec();
        Ok(Self { kernel: kernel.clone(), body, tail, narrow, wide, pointers, implied })
    }

    /// The kernel.
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// The statement of this number in the order of the text.
    pub(super) fn statement(&self, number: u32) -> String {
        fn find<'k>(region: &'k Region, left: &mut u32) -> Option<&'k Stmt> {
            for s in &region.stmts {
                if *left == 0 {
                    return Some(s);
                }
                *left -= 1;
                if let Some(found) = s.regions.iter().find_map(|r| find(r, left)) {
                    return Some(found);
                }
            }
            None
        }
        let mut left = number;
        let regions = std::iter::once(&self.kernel.body).chain(&self.kernel.tail);
        let found = regions.into_iter().find_map(|r| find(r, &mut left));
        found.map_or_else(String::new, |s| crate::kernel::print::statement_in(&self.kernel, s))
    }
}

trait Sizes {
    fn take(&mut self, ty: KType) -> Reg;
}

impl Sizes for [usize; 3] {
    /// A fresh register for a value of type `ty`.
    fn take(&mut self, ty: KType) -> Reg {
        let bank = bank(ty);
        let reg = self[bank as usize];
        self[bank as usize] += if bank == Bank::Wide { ty.lanes() as usize } else { 1 };
        reg
    }
}

fn bank(ty: KType) -> Bank {
    match ty {
        KType::Ptr(_) => Bank::Pointer,
        KType::Value { dtype: DType::I64, .. } => Bank::Wide,
        KType::Value { .. } => Bank::Narrow,
    }
}

struct Maker<'k> {
    kernel: &'k Kernel,
    regs: Vec<Reg>,
    sizes: [usize; 3],
    block: Block,
    next_stmt: u32,
    stmt: u32,
}

impl Maker<'_> {
    fn top(&mut self, region: &Region) -> Block {
        self.region(region);
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

    fn here(&self) -> usize {
        self.block.insts.len()
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
                self.push(Inst::Move { bank: bank(ty), d, a, n: ty.lanes() as usize });
            }
        }
    }

    /// Moves as if all at once: through fresh registers if one target is another's source.
    fn moves_at_once(&mut self, to: &[Val], from: &[Val]) {
        if !from.iter().enumerate().any(|(i, a)| to.iter().enumerate().any(|(j, d)| i != j && a == d)) {
            return self.moves(to, from);
        }
        let fresh: Vec<Reg> = from.iter().map(|&v| self.sizes.take(self.kernel.ty(v))).collect();
        for (&a, &d) in from.iter().zip(&fresh) {
            let ty = self.ty(a);
            self.push(Inst::Move { bank: bank(ty), d, a: self.reg(a), n: ty.lanes() as usize });
        }
        for (&d, &a) in to.iter().zip(&fresh) {
            let ty = self.ty(d);
            self.push(Inst::Move { bank: bank(ty), d: self.reg(d), a, n: ty.lanes() as usize });
        }
    }

    fn statement(&mut self, s: &Stmt) {
        match s.op {
            KOp::For => self.for_loop(s),
            KOp::If => self.condition(s),
            _ => {
                let inst = self.plain(s);
                self.push(inst);
            }
        }
    }

    fn for_loop(&mut self, s: &Stmt) {
        let inner = &s.regions[0];
        let (i, hi, step) = (inner.params[0], self.reg(s.args[1]), self.reg(s.args[2]));
        let number = self.stmt;
        self.push(Inst::CheckStep { step });
        self.moves(&[i], &s.args[..1]);
        self.moves(&inner.params[1..], &s.args[3..]);
        let i = self.reg(i);
        let head = self.push(Inst::LoopHead { i, hi, out: 0 });
        self.region(inner);
        self.stmt = number;
        self.moves_at_once(&inner.params[1..], &inner.yields);
        let next = self.push(Inst::LoopNext { i, step, head, out: 0 });
        let out = self.here();
        self.block.insts[head] = Inst::LoopHead { i, hi, out };
        self.block.insts[next] = Inst::LoopNext { i, step, head, out };
        self.moves(&s.results, &inner.params[1..]);
    }

    fn condition(&mut self, s: &Stmt) {
        let (c, number) = (self.reg(s.args[0]), self.stmt);
        let branch = self.push(Inst::JumpUnless { c, to: 0 });
        self.region(&s.regions[0]);
        self.stmt = number;
        self.moves(&s.results, &s.regions[0].yields);
        let jump = self.push(Inst::Jump { to: 0 });
        self.block.insts[branch] = Inst::JumpUnless { c, to: self.here() };
        self.region(&s.regions[1]);
        self.stmt = number;
        self.moves(&s.results, &s.regions[1].yields);
        self.block.insts[jump] = Inst::Jump { to: self.here() };
    }

    fn plain(&mut self, s: &Stmt) -> Inst {
        let arg = |i: usize| s.args.get(i).map_or(0, |&v| self.reg(v));
        let d = s.results.first().map_or(0, |&v| self.reg(v));
        let (a, b) = (arg(0), arg(1));
        let first = s.args.first().map(|&v| self.ty(v));
        let n = first.map_or(1, |ty| ty.lanes() as usize);
        let wide = first.is_some_and(|ty| bank(ty) == Bank::Wide);
        let int = |op| if wide { Inst::Int64 { op, d, a, b, n } } else { Inst::Int32 { op, d, a, b, n } };
        let float = |op| Inst::Float { op, d, a, b, n };
        let unary = |op| Inst::Unary { op, d, a, n };
        match s.op {
            KOp::Const { dtype: DType::I64, bits } => Inst::Const64 { d, bits },
            KOp::Const { bits, .. } => Inst::Const32 { d, bits: bits as u32 },
            KOp::Alloc { dtype, elems } => {
                self.block.scratch.push(dtype.bytes() * elems);
                Inst::Alloc { d, scratch: self.block.scratch.len() - 1 }
            }
            KOp::Splat { lanes } if wide => Inst::Splat64 { d, a, n: lanes as usize },
            KOp::Splat { lanes } => Inst::Splat32 { d, a, n: lanes as usize },
            KOp::Extract { lane } if wide => Inst::Move { bank: Bank::Wide, d, a: a + lane as usize, n: 1 },
            KOp::Extract { lane } => Inst::Extract32 { d, a, lane: lane as usize },
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
                let lanes = ty.lanes() as usize;
                let (c, a, b) = (a, b, arg(2));
                match bank(ty) {
                    bank if n == 1 => Inst::Choose { bank, d, c, a, b, n: lanes },
                    Bank::Wide => Inst::Select64 { d, c, a, b, n: lanes },
                    _ => Inst::Select32 { d, c, a, b, n: lanes },
                }
            }
            KOp::Widen => Inst::Widen { d, a, n },
            KOp::Narrow => Inst::Narrow { d, a, n },
            KOp::Bitcast { .. } => Inst::Move { bank: if wide { Bank::Wide } else { Bank::Narrow }, d, a, n },
            KOp::ReduceAdd => Inst::ReduceAdd { d, a, n },
            KOp::ReduceMax => Inst::ReduceMax { d, a, n },
            KOp::Load { dtype: DType::I64, lanes } => Inst::Load64 { d, p: a, i: b, n: lanes as usize },
            KOp::Load { lanes, .. } => Inst::Load32 { d, p: a, i: b, n: lanes as usize },
            KOp::Store => {
                let (ty, v) = (self.ty(s.args[2]), arg(2));
                let n = ty.lanes() as usize;
                if bank(ty) == Bank::Wide {
                    Inst::Store64 { p: a, i: b, v, n }
                } else {
                    Inst::Store32 { p: a, i: b, v, n }
                }
            }
            KOp::Offset => Inst::Offset { d, p: a, bytes: b },
            KOp::For | KOp::If => unreachable!("control is made in `statement`"),
            KOp::Thread
            | KOp::Shared { .. }
            | KOp::Partials { .. }
            | KOp::Barrier
            | KOp::ShuffleXor { .. }
            | KOp::AtomicAdd
            | KOp::Pack { .. }
            | KOp::HalfFma { .. }
            | KOp::HalfToFloat
            | KOp::Fp8ToF16
            | KOp::Mma { .. }
            | KOp::Prefetch
            | KOp::Wait
            | KOp::Release => unreachable!("blocks of threads are refused before"),
        }
    }
}
