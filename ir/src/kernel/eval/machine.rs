//! Running the instructions of a [`Code`].

use super::code::{Bank, Block, CmpOf, Code, FloatOp, Inst, IntOp, Reg, UnaryOp};
use super::memory::{Buffer, Place, Shadow, Slot};
use super::{EvalError, KernelFault, Misdeed, Options};
use crate::kernel::{Kernel, Pred};
use crate::schedule::Extent;

/// A register of the narrow bank.
type Lanes = [u32; 16];

/// A pointer: `buffer` counts the run's slots first, then the task's allocations.
#[derive(Clone, Copy, Debug, Default)]
struct Pointer {
    buffer: usize,
    at: i64,
    writable: bool,
}

impl Code {
    /// Runs all tasks, in an order that the seed gives, then the tail. `args` says where each parameter points.
    /// # Errors
    /// [`EvalError`] if the kernel misbehaves or the arguments do not fit it.
    pub fn run(
        &self,
        syms: [u64; 4],
        slots: &mut [Slot<'_>],
        args: &[Place],
        options: Options,
    ) -> Result<(), EvalError> {
        self.check_args(slots, args)?;
        let tasks = tasks(&self.kernel.grid, &syms).and_then(|n| u32::try_from(n).ok()).filter(|&n| n < u32::MAX - 1);
        let tasks = tasks.ok_or_else(|| EvalError::Grid(self.kernel.name.clone()))?;
        let mut machine = Machine::new(self, syms, slots, args, options.races);
        for task in shuffled(tasks, options.seed) {
            machine.task = task + 1;
            machine.wide[self.implied[Kernel::TASK.0 as usize]] = i64::from(task);
            machine.block(&self.body)?;
        }
        machine.task = 0;
        machine.shadows.clear();
        self.tail.as_ref().map_or(Ok(()), |tail| Ok(machine.block(tail)?))
    }

    fn check_args(&self, slots: &[Slot<'_>], args: &[Place]) -> Result<(), EvalError> {
        let kernel = &self.kernel;
        if args.len() != kernel.params.len() {
            let (found, expected) = (args.len(), kernel.params.len());
            return Err(EvalError::Args { kernel: kernel.name.clone(), found, expected });
        }
        match args.iter().position(|a| a.buffer >= slots.len()) {
            None => Ok(()),
            Some(index) => Err(EvalError::NoBuffer {
                kernel: kernel.name.clone(),
                index,
                buffer: args[index].buffer,
                buffers: slots.len(),
            }),
        }
    }
}

/// The number of tasks; `None` if it does not fit.
fn tasks(extent: &Extent, syms: &[u64; 4]) -> Option<u64> {
    Some(match extent {
        Extent::Const(n) => *n,
        Extent::Sym(s) => syms[s.index()],
        Extent::Add(a, b) => tasks(a, syms)?.checked_add(tasks(b, syms)?)?,
        Extent::Mul(a, b) => tasks(a, syms)?.checked_mul(tasks(b, syms)?)?,
        Extent::CeilDiv(a, n) => tasks(a, syms)?.div_ceil(*n),
        Extent::Min(a, b) => tasks(a, syms)?.min(tasks(b, syms)?),
    })
}

/// `0 .. n` in an order that depends on the seed alone.
fn shuffled(n: u32, seed: u64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..n).collect();
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for i in (1..order.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        order.swap(i, (state >> 16) as usize % (i + 1));
    }
    order
}

struct Machine<'r, 's> {
    code: &'r Code,
    slots: &'r mut [Slot<'s>],
    narrow: Vec<Lanes>,
    wide: Vec<i64>,
    pointers: Vec<Pointer>,
    scratch: Vec<Buffer>,
    /// One for each slot that a parameter may write; none if races are not looked for.
    shadows: Vec<Option<Shadow>>,
    /// The task's number plus one; 0 in the tail.
    task: u32,
}

impl<'r, 's> Machine<'r, 's> {
    fn new(code: &'r Code, syms: [u64; 4], slots: &'r mut [Slot<'s>], args: &[Place], races: bool) -> Self {
        let mut wide = vec![0; code.wide];
        let mut pointers = vec![Pointer::default(); code.pointers];
        for (&reg, &n) in code.implied.iter().zip(&syms) {
            wide[reg] = n as i64;
        }
        let params = code.implied[Kernel::FIRST_PARAM as usize..].iter().zip(&code.kernel.params);
        let mut written = vec![false; slots.len()];
        for ((&reg, param), arg) in params.zip(args) {
            pointers[reg] = Pointer { buffer: arg.buffer, at: arg.at_bytes as i64, writable: param.written };
            written[arg.buffer] |= param.written;
        }
        let shadow = |(slot, written): (&Slot<'_>, bool)| written.then(|| Shadow::new(slot.get()));
        let shadows = if races { slots.iter().zip(written).map(shadow).collect() } else { Vec::new() };
        let narrow = vec![[0; 16]; code.narrow];
        Self { code, slots, narrow, wide, pointers, scratch: Vec::new(), shadows, task: 0 }
    }

    /// Runs a body for the current task, or the tail.
    fn block(&mut self, block: &Block) -> Result<(), KernelFault> {
        let same = self.scratch.len() == block.scratch.len()
            && self.scratch.iter().zip(&block.scratch).all(|(b, &n)| b.len_bytes() == n);
        if same {
            self.scratch.iter_mut().for_each(Buffer::forget);
        } else {
            self.scratch = block.scratch.iter().map(|&n| Buffer::uninit(n)).collect();
        }
        let mut at = 0;
        while let Some(&inst) = block.insts.get(at) {
            at = self.step(inst, at + 1).map_err(|what| KernelFault {
                kernel: self.code.kernel.name.clone(),
                task: self.task.checked_sub(1).map(u64::from),
                statement: self.code.statement(block.stmts[at]),
                what,
            })?;
        }
        Ok(())
    }

    /// Runs one instruction and says which is next.
    fn step(&mut self, inst: Inst, next: usize) -> Result<usize, Misdeed> {
        match inst {
            Inst::Const32 { d, bits } => self.narrow[d][0] = bits,
            Inst::Const64 { d, bits } => self.wide[d] = bits,
            Inst::Alloc { d, scratch } => {
                self.pointers[d] = Pointer { buffer: self.slots.len() + scratch, at: 0, writable: true };
            }
            Inst::Splat32 { d, a, n } => {
                let x = self.narrow[a][0];
                self.narrow[d][..n].fill(x);
            }
            Inst::Splat64 { d, a, n } => {
                let x = self.wide[a];
                self.wide[d..d + n].fill(x);
            }
            Inst::Extract32 { d, a, lane } => self.narrow[d][0] = self.narrow[a][lane],
            Inst::Int32 { op, d, a, b, n } => self.int32(op, d, a, b, n)?,
            Inst::Int64 { op, d, a, b, n } => {
                for l in 0..n {
                    self.wide[d + l] = int64(op, self.wide[a + l], self.wide[b + l])?;
                }
            }
            Inst::Float { op, d, a, b, n } => self.float(op, d, a, b, n),
            Inst::Fma { d, a, b, c, n } => {
                let (x, y, z) = (self.narrow[a], self.narrow[b], self.narrow[c]);
                for (l, out) in self.narrow[d][..n].iter_mut().enumerate() {
                    *out = f32::from_bits(x[l]).mul_add(f32::from_bits(y[l]), f32::from_bits(z[l])).to_bits();
                }
            }
            Inst::Unary { op, d, a, n } => self.unary(op, d, a, n)?,
            Inst::Cmp { of, pred, d, a, b, n } => self.cmp(of, pred, d, a, b, n),
            Inst::Select32 { d, c, a, b, n } => {
                let (c, x, y) = (self.narrow[c], self.narrow[a], self.narrow[b]);
                for (l, out) in self.narrow[d][..n].iter_mut().enumerate() {
                    *out = if c[l] != 0 { x[l] } else { y[l] };
                }
            }
            Inst::Select64 { d, c, a, b, n } => {
                for l in 0..n {
                    self.wide[d + l] = self.wide[if self.narrow[c][l] != 0 { a } else { b } + l];
                }
            }
            Inst::Choose { bank, d, c, a, b, n } => {
                let from = if self.narrow[c][0] != 0 { a } else { b };
                self.assign(bank, d, from, n);
            }
            Inst::Widen { d, a, n } => {
                for l in 0..n {
                    self.wide[d + l] = i64::from(self.narrow[a][l].cast_signed());
                }
            }
            Inst::Narrow { d, a, n } => {
                for l in 0..n {
                    self.narrow[d][l] = self.wide[a + l] as u32;
                }
            }
            Inst::Move { bank, d, a, n } => self.assign(bank, d, a, n),
            Inst::ReduceAdd { d, a, n } => self.reduce(d, a, n, |x, y| x + y),
            Inst::ReduceMax { d, a, n } => self.reduce(d, a, n, |x, y| if x > y { x } else { y }),
            Inst::Load32 { d, p, i, n } => self.load32(d, p, i, n)?,
            Inst::Load64 { d, p, i, n } => self.load64(d, p, i, n)?,
            Inst::Store32 { p, i, v, n } => self.store32(p, i, v, n)?,
            Inst::Store64 { p, i, v, n } => self.store64(p, i, v, n)?,
            Inst::Offset { d, p, bytes } => {
                let p = self.pointers[p];
                self.pointers[d] = Pointer { at: p.at.wrapping_add(self.wide[bytes]), ..p };
            }
            Inst::Jump { to } => return Ok(to),
            Inst::JumpUnless { c, to } => return Ok(if self.narrow[c][0] != 0 { next } else { to }),
            Inst::CheckStep { step } => {
                if self.wide[step] <= 0 {
                    return Err(Misdeed::Step(self.wide[step]));
                }
            }
            Inst::LoopHead { i, hi, out } => return Ok(if self.wide[i] < self.wide[hi] { next } else { out }),
            Inst::LoopNext { i, step, head, out } => {
                let Some(sum) = self.wide[i].checked_add(self.wide[step]) else { return Ok(out) };
                self.wide[i] = sum;
                return Ok(head);
            }
        }
        Ok(next)
    }

    fn assign(&mut self, bank: Bank, d: Reg, a: Reg, n: usize) {
        match bank {
            Bank::Narrow => self.narrow[d] = self.narrow[a],
            Bank::Wide => self.wide.copy_within(a..a + n, d),
            Bank::Pointer => self.pointers[d] = self.pointers[a],
        }
    }

    #[inline(always)]
    fn lanes(&mut self, d: Reg, a: Reg, b: Reg, n: usize, f: impl Fn(u32, u32) -> u32) {
        let (x, y) = (self.narrow[a], self.narrow[b]);
        for (out, (&x, &y)) in self.narrow[d][..n].iter_mut().zip(x.iter().zip(&y)) {
            *out = f(x, y);
        }
    }

    fn int32(&mut self, op: IntOp, d: Reg, a: Reg, b: Reg, n: usize) -> Result<(), Misdeed> {
        if matches!(op, IntOp::Shl | IntOp::Ushr | IntOp::Sshr) && self.narrow[b][..n].iter().any(|&s| s > 31) {
            return Err(Misdeed::Shift);
        }
        match op {
            IntOp::Add => self.lanes(d, a, b, n, u32::wrapping_add),
            IntOp::Sub => self.lanes(d, a, b, n, u32::wrapping_sub),
            IntOp::Mul => self.lanes(d, a, b, n, u32::wrapping_mul),
            IntOp::And => self.lanes(d, a, b, n, |x, y| x & y),
            IntOp::Or => self.lanes(d, a, b, n, |x, y| x | y),
            IntOp::Xor => self.lanes(d, a, b, n, |x, y| x ^ y),
            IntOp::Shl => self.lanes(d, a, b, n, |x, y| x << y),
            IntOp::Ushr => self.lanes(d, a, b, n, |x, y| x >> y),
            IntOp::Sshr => self.lanes(d, a, b, n, |x, y| (x.cast_signed() >> y).cast_unsigned()),
            IntOp::Div | IntOp::Rem => {
                let (x, y) = (self.narrow[a][0].cast_signed(), self.narrow[b][0].cast_signed());
                let out = if matches!(op, IntOp::Div) { x.checked_div(y) } else { x.checked_rem(y) };
                self.narrow[d][0] = out.ok_or(Misdeed::Division)?.cast_unsigned();
            }
        }
        Ok(())
    }

    fn float(&mut self, op: FloatOp, d: Reg, a: Reg, b: Reg, n: usize) {
        match op {
            FloatOp::Add => self.lanes(d, a, b, n, on(|x, y| x + y)),
            FloatOp::Sub => self.lanes(d, a, b, n, on(|x, y| x - y)),
            FloatOp::Mul => self.lanes(d, a, b, n, on(|x, y| x * y)),
            FloatOp::Div => self.lanes(d, a, b, n, on(|x, y| x / y)),
            FloatOp::Min => self.lanes(d, a, b, n, on(|x, y| if x < y { x } else { y })),
            FloatOp::Max => self.lanes(d, a, b, n, on(|x, y| if x > y { x } else { y })),
        }
    }

    fn unary(&mut self, op: UnaryOp, d: Reg, a: Reg, n: usize) -> Result<(), Misdeed> {
        let x = self.narrow[a];
        for (out, &x) in self.narrow[d][..n].iter_mut().zip(&x) {
            *out = match op {
                UnaryOp::Neg => x ^ 0x8000_0000,
                UnaryOp::Abs => x & 0x7fff_ffff,
                UnaryOp::Sqrt => f32::from_bits(x).sqrt().to_bits(),
                UnaryOp::Round => f32::from_bits(x).round_ties_even().to_bits(),
                UnaryOp::ToFloat => (x.cast_signed() as f32).to_bits(),
                UnaryOp::ToInt => to_int(f32::from_bits(x))?.cast_unsigned(),
            };
        }
        Ok(())
    }

    fn cmp(&mut self, of: CmpOf, pred: Pred, d: Reg, a: Reg, b: Reg, n: usize) {
        match of {
            CmpOf::F32 => {
                self.lanes(d, a, b, n, |x, y| u32::from(holds(pred, &f32::from_bits(x), &f32::from_bits(y))));
            }
            CmpOf::I32 => self.lanes(d, a, b, n, |x, y| u32::from(holds(pred, &x.cast_signed(), &y.cast_signed()))),
            CmpOf::I64 => {
                for l in 0..n {
                    self.narrow[d][l] = u32::from(holds(pred, &self.wide[a + l], &self.wide[b + l]));
                }
            }
        }
    }

    #[inline(always)]
    fn reduce(&mut self, d: Reg, a: Reg, n: usize, f: impl Fn(f32, f32) -> f32) {
        let mut x = self.narrow[a].map(f32::from_bits);
        let mut half = n / 2;
        while half > 0 {
            for l in 0..half {
                x[l] = f(x[l], x[l + half]);
            }
            half /= 2;
        }
        self.narrow[d][0] = x[0].to_bits();
    }

    /// The words that an access reads.
    fn read(&mut self, p: Reg, i: Reg, n: usize, elem_bytes: u64) -> Result<&[u32], Misdeed> {
        let p = self.pointers[p];
        let at = address(p.at, self.wide[i], elem_bytes);
        let buffer = match self.slots.get(p.buffer) {
            Some(slot) => slot.get(),
            None => &self.scratch[p.buffer - self.slots.len()],
        };
        let range = buffer.range(at, n, elem_bytes)?;
        let words = buffer.read(range.clone())?;
        if let Some(Some(shadow)) = self.shadows.get_mut(p.buffer) {
            shadow.read(range, self.task)?;
        }
        Ok(words)
    }

    /// The words that an access writes.
    fn written(
        &mut self,
        p: Reg,
        i: Reg,
        n: usize,
        elem_bytes: u64,
    ) -> Result<(usize, std::ops::Range<usize>), Misdeed> {
        let p = self.pointers[p];
        if !p.writable {
            return Err(Misdeed::ReadOnly);
        }
        let at = address(p.at, self.wide[i], elem_bytes);
        let range = self.buffer_mut(p.buffer)?.range(at, n, elem_bytes)?;
        if let Some(Some(shadow)) = self.shadows.get_mut(p.buffer) {
            shadow.write(range.clone(), self.task)?;
        }
        Ok((p.buffer, range))
    }

    fn buffer_mut(&mut self, buffer: usize) -> Result<&mut Buffer, Misdeed> {
        let slots = self.slots.len();
        match self.slots.get_mut(buffer) {
            Some(slot) => slot.get_mut(),
            None => Ok(&mut self.scratch[buffer - slots]),
        }
    }

    fn load32(&mut self, d: Reg, p: Reg, i: Reg, n: usize) -> Result<(), Misdeed> {
        let mut lanes = [0; 16];
        lanes[..n].copy_from_slice(self.read(p, i, n, 4)?);
        self.narrow[d] = lanes;
        Ok(())
    }

    fn load64(&mut self, d: Reg, p: Reg, i: Reg, n: usize) -> Result<(), Misdeed> {
        let mut lanes = [0; 16];
        for (lane, words) in lanes.iter_mut().zip(self.read(p, i, n, 8)?.chunks(2)) {
            *lane = (u64::from(words[0]) | u64::from(words[1]) << 32).cast_signed();
        }
        self.wide[d..d + n].copy_from_slice(&lanes[..n]);
        Ok(())
    }

    fn store32(&mut self, p: Reg, i: Reg, v: Reg, n: usize) -> Result<(), Misdeed> {
        let (buffer, range) = self.written(p, i, n, 4)?;
        let value = self.narrow[v];
        self.buffer_mut(buffer)?.write(range).copy_from_slice(&value[..n]);
        Ok(())
    }

    fn store64(&mut self, p: Reg, i: Reg, v: Reg, n: usize) -> Result<(), Misdeed> {
        let (buffer, range) = self.written(p, i, n, 8)?;
        let mut value = [0; 16];
        value[..n].copy_from_slice(&self.wide[v..v + n]);
        let words = self.buffer_mut(buffer)?.write(range);
        for (words, x) in words.chunks_mut(2).zip(value) {
            words.copy_from_slice(&[x as u32, (x >> 32) as u32]);
        }
        Ok(())
    }
}

/// A function of floats as one of their bits.
fn on(f: impl Fn(f32, f32) -> f32) -> impl Fn(u32, u32) -> u32 {
    move |x, y| f(f32::from_bits(x), f32::from_bits(y)).to_bits()
}

/// Where an element lies; what does not fit is outside every buffer.
fn address(at: i64, index: i64, elem_bytes: u64) -> i64 {
    index.saturating_mul(elem_bytes as i64).saturating_add(at)
}

fn holds<T: PartialOrd>(pred: Pred, x: &T, y: &T) -> bool {
    match pred {
        Pred::Eq => x == y,
        Pred::Ne => x != y,
        Pred::Lt => x < y,
        Pred::Le => x <= y,
        Pred::Gt => x > y,
        Pred::Ge => x >= y,
    }
}

fn to_int(x: f32) -> Result<i32, Misdeed> {
    // the bounds are exact: -2^31 is a float, and no float lies between it and -2^31 - 1
    if (-2_147_483_648.0..2_147_483_648.0).contains(&x) { Ok(x as i32) } else { Err(Misdeed::ToInt(x)) }
}

fn int64(op: IntOp, x: i64, y: i64) -> Result<i64, Misdeed> {
    let shift = || u32::try_from(y).ok().filter(|&y| y < 64).ok_or(Misdeed::Shift);
    Ok(match op {
        IntOp::Add => x.wrapping_add(y),
        IntOp::Sub => x.wrapping_sub(y),
        IntOp::Mul => x.wrapping_mul(y),
        IntOp::Div => x.checked_div(y).ok_or(Misdeed::Division)?,
        IntOp::Rem => x.checked_rem(y).ok_or(Misdeed::Division)?,
        IntOp::And => x & y,
        IntOp::Or => x | y,
        IntOp::Xor => x ^ y,
        IntOp::Shl => x << shift()?,
        IntOp::Ushr => (x.cast_unsigned() >> shift()?).cast_signed(),
        IntOp::Sshr => x >> shift()?,
    })
}
