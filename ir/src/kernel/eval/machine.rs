//! Running the instructions of a [`Code`].

use super::access::{Memory, Pointer};
use super::code::{Bank, Block, CmpOf, Code, FloatOp, HalfOp, Inst, IntOp, MmaGroup, Reg, TileStep, UnaryOp};
use super::half;
use super::mask::Masks;
use super::memory::{Place, Slot};
use super::tile::{self, Sums, Tile};
use super::{EvalError, KernelFault, Misdeed, Options};
use crate::kernel::{Kernel, Pred};
use crate::schedule::Extent;

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
        let grids = [self.grid(&self.kernel.grid, &syms)?, self.grid(&self.kernel.tail_grid, &syms)?];
        if self.kernel.is_block() {
            Machine::<false>::new(self, syms, slots, args, options).launch(grids, options.seed)?;
        } else {
            Machine::<true>::new(self, syms, slots, args, options).launch(grids, options.seed)?;
        }
        Ok(())
    }

    fn grid(&self, extent: &Extent, syms: &[u64; 4]) -> Result<u32, EvalError> {
        let tasks = tasks(extent, syms).and_then(|n| u32::try_from(n).ok()).filter(|&n| n < u32::MAX - 1);
        tasks.ok_or_else(|| EvalError::Grid(self.kernel.name.clone()))
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
        Extent::Above(parts) => {
            let [a, b, then, otherwise] = &**parts;
            tasks(if tasks(a, syms)? > tasks(b, syms)? { then } else { otherwise }, syms)?
        }
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

/// A machine for blocks, or (`SINGLE`) for tasks of one thread, which needs no masks: an instruction runs where its thread is.
struct Machine<'r, 's, const SINGLE: bool> {
    code: &'r Code,
    narrow: Vec<u32>,
    wide: Vec<i64>,
    pointers: Vec<Pointer>,
    /// The sums of tiles of a single thread.
    sums: Sums,
    memory: Memory<'r, 's>,
    team: u32,
    masks: Masks,
    /// `None` in a tail of one task of one thread.
    task: Option<u32>,
    /// The thread at work, where one alone can fail.
    thread: Option<usize>,
}

impl<'r, 's, const SINGLE: bool> Machine<'r, 's, SINGLE> {
    fn new(code: &'r Code, syms: [u64; 4], slots: &'r mut [Slot<'s>], args: &[Place], options: Options) -> Self {
        let depth = code.tail.as_ref().map_or(0, |t| t.depth).max(code.body.depth);
        let threads = code.kernel.threads as usize;
        let mut machine = Self {
            code,
            narrow: vec![0; code.narrow],
            wide: vec![0; code.wide],
            pointers: vec![Pointer::default(); code.pointers],
            sums: Sums::default(),
            memory: Memory::new(&code.kernel, slots, args, options.races),
            team: options.team,
            masks: Masks::new(threads, depth),
            task: None,
            thread: None,
        };
        debug_assert_eq!(SINGLE, threads == 1);
        for (&reg, &n) in code.implied.iter().zip(&syms) {
            machine.set_wide(reg, n as i64);
        }
        let params = code.implied[Kernel::FIRST_PARAM as usize..].iter().zip(&code.kernel.params);
        for ((&reg, param), arg) in params.zip(args) {
            let pointer = Pointer { buffer: arg.buffer, at: arg.at_bytes as i64, writable: param.written };
            machine.pointers[reg..reg + threads].fill(pointer);
        }
        machine
    }

    /// Threads of a task.
    #[inline(always)]
    fn threads(&self) -> usize {
        if SINGLE { 1 } else { self.masks.threads() }
    }

    /// The same i64 in all threads.
    fn set_wide(&mut self, reg: Reg, x: i64) {
        let threads = self.threads();
        self.wide[reg..reg + threads].fill(x);
    }

    /// Runs all tasks, then those of the tail.
    fn launch(&mut self, [tasks, tail_tasks]: [u32; 2], seed: u64) -> Result<(), KernelFault> {
        let code = self.code;
        self.memory.take_partials(code.kernel.partial_bytes() * u64::from(tasks));
        self.tasks(&code.body, tasks, seed)?;
        let Some(tail) = &code.tail else { return Ok(()) };
        let alone = SINGLE && tail_tasks == 1;
        self.memory.forget_tasks(alone);
        if alone {
            self.begin_task(None);
            return self.block(tail);
        }
        self.tasks(tail, tail_tasks, seed)
    }

    fn tasks(&mut self, block: &'r Block, tasks: u32, seed: u64) -> Result<(), KernelFault> {
        shuffled(tasks, seed).into_iter().try_for_each(|task| {
            self.begin_task(Some(task));
            self.block(block)
        })
    }

    fn begin_task(&mut self, task: Option<u32>) {
        self.task = task;
        self.set_wide(self.code.implied[Kernel::TASK.0 as usize], task.unwrap_or(0).into());
    }

    /// Runs a body for the current task, or the tail.
    fn block(&mut self, block: &'r Block) -> Result<(), KernelFault> {
        self.memory.begin(self.task, block);
        let mut at = 0;
        while let Some(inst) = block.insts.get(at) {
            if !SINGLE {
                self.thread = None;
            }
            at = self.step(block, inst, at + 1).map_err(|what| self.fault(block.stmts[at], what))?;
        }
        self.thread = None;
        match block.wait {
            Some(number) if self.memory.must_wait => Err(self.fault(number, Misdeed::NoWait)),
            _ => Ok(()),
        }
    }

    fn fault(&self, statement: u32, what: Misdeed) -> KernelFault {
        let kernel = &self.code.kernel;
        KernelFault {
            kernel: kernel.name.clone(),
            task: self.task.map(u64::from),
            thread: self.thread.filter(|_| kernel.is_block()).map(|t| t as u32),
            statement: self.code.statement(statement),
            what,
        }
    }

    /// Runs one instruction and says which is next.
    ///
    /// What cannot fail runs for all threads, whether they are here or not: what others compute in a region is never used.
    fn step(&mut self, block: &Block, inst: &Inst, next: usize) -> Result<usize, Misdeed> {
        let threads = self.threads();
        match *inst {
            Inst::Const32 { d, bits } => self.narrow[d..d + threads].fill(bits),
            Inst::Const64 { d, bits } => self.wide[d..d + threads].fill(bits),
            Inst::Own { d, piece } => {
                let pointer = self.memory.own(piece);
                self.pointers[d..d + threads].fill(pointer);
            }
            Inst::Partials { d } => {
                let pointer = self.memory.partials();
                self.pointers[d..d + threads].fill(pointer);
            }
            Inst::Splat32 { d, a, lanes } => splat(&mut self.narrow, d, a, lanes, threads),
            Inst::Splat64 { d, a, lanes } => splat(&mut self.wide, d, a, lanes, threads),
            Inst::Int32 { op, d, a, b, n } => self.int32(op, d, a, b, n)?,
            Inst::Int64 { op, d, a, b, n } => self.int64(op, d, a, b, n)?,
            Inst::Float { op, d, a, b, n } => self.float(op, d, a, b, n),
            Inst::Fma { d, a, b, c, n } => self.three(d, [a, b, c], n, |x, y, z| {
                f32::from_bits(x).mul_add(f32::from_bits(y), f32::from_bits(z)).to_bits()
            }),
            Inst::Unary { op, d, a, n } => self.unary(op, d, a, n)?,
            Inst::Cmp { of, pred, d, a, b, n } => self.cmp(of, pred, d, a, b, n),
            Inst::Select32 { d, c, a, b, n } => self.three(d, [c, a, b], n, |c, x, y| if c != 0 { x } else { y }),
            Inst::Select64 { d, c, a, b, n } => {
                let (from, to) = self.wide.split_at_mut(d);
                let either = from[a..a + n].iter().zip(&from[b..b + n]);
                for ((out, &c), (&x, &y)) in to[..n].iter_mut().zip(&self.narrow[c..c + n]).zip(either) {
                    *out = if c != 0 { x } else { y };
                }
            }
            Inst::Choose { bank, d, c, a, b, lanes } => self.choose(bank, d, c, (a, b), lanes),
            Inst::Widen { d, a, n } => {
                for (out, &x) in self.wide[d..d + n].iter_mut().zip(&self.narrow[a..a + n]) {
                    *out = i64::from(x.cast_signed());
                }
            }
            Inst::Narrow { d, a, n } => {
                for (out, &x) in self.narrow[d..d + n].iter_mut().zip(&self.wide[a..a + n]) {
                    *out = x as u32;
                }
            }
            Inst::Move { bank, d, a, n } => self.assign(bank, d, a, n),
            Inst::ReduceAdd { d, a, lanes } => self.reduce(d, a, lanes, |x, y| x + y),
            Inst::ReduceMax { d, a, lanes } => self.reduce(d, a, lanes, |x, y| if x > y { x } else { y }),
            Inst::Load32 { d, p, i, lanes } => self.load32(d, p, i, lanes)?,
            Inst::Load64 { d, p, i, lanes } => self.load64(d, p, i, lanes)?,
            Inst::Store32 { p, i, v, lanes } => self.store32(p, i, v, lanes)?,
            Inst::Store64 { p, i, v, lanes } => self.store64(p, i, v, lanes)?,
            Inst::Offset { d, p, bytes } => {
                for t in 0..threads {
                    let p = self.pointers[p + t];
                    self.pointers[d + t] = Pointer { at: p.at.wrapping_add(self.wide[bytes + t]), ..p };
                }
            }
            Inst::CheckStep { step } => self.each(|m, t| match m.wide[step + t] {
                ..=0 => Err(Misdeed::Step(m.wide[step + t])),
                _ => Ok(()),
            })?,
            Inst::Loop => {
                if !SINGLE {
                    self.masks.open();
                }
            }
            Inst::LoopHead { i, hi, out } => {
                let wide = &self.wide;
                if SINGLE {
                    return Ok(if wide[i] < wide[hi] { next } else { out });
                }
                return Ok(if self.masks.keep(|t| wide[i + t] < wide[hi + t]) { next } else { out });
            }
            Inst::LoopNext { i, step, head, out } => return Ok(if self.advance(i, step) { head } else { out }),
            Inst::If { c, otherwise } => {
                let narrow = &self.narrow;
                if SINGLE {
                    return Ok(if narrow[c] != 0 { next } else { otherwise });
                }
                return Ok(if self.masks.open_for(|t| narrow[c + t] != 0) { next } else { otherwise });
            }
            Inst::Else { c, end } => {
                let narrow = &self.narrow;
                if SINGLE {
                    return Ok(if narrow[c] == 0 { next } else { end });
                }
                return Ok(if self.masks.choose(|t| narrow[c + t] == 0) { next } else { end });
            }
            Inst::End => {
                if !SINGLE {
                    self.masks.close();
                }
            }
            Inst::Team { d } => self.wide[d..d + threads].fill(self.team.into()),
            Inst::Thread { d } => (0..threads).for_each(|t| self.wide[d + t] = t as i64),
            Inst::Barrier => {
                self.masks.whole_block()?;
                self.memory.barrier();
            }
            Inst::Shuffle { d, a, mask } => {
                self.masks.whole_warps()?;
                (0..threads).for_each(|t| self.narrow[d + t] = self.narrow[a + (t ^ mask)]);
            }
            Inst::Quad { d, from } => {
                (0..4).for_each(|lane| self.narrow.copy_within(from[lane]..from[lane] + threads, d + lane * threads));
            }
            Inst::Best { d, a, largest } => {
                for first in self.masks.whole_warps()? {
                    let warp = || (first..first + Kernel::WARP as usize).map(|t| self.narrow[a + t].cast_signed());
                    let best = if largest { warp().max() } else { warp().min() }.expect("a warp has threads");
                    self.narrow[d + first..][..Kernel::WARP as usize].fill(best.cast_unsigned());
                }
            }
            Inst::AtomicAdd { d, p, i, x } => self.each(|m, t| {
                m.narrow[d + t] = m.memory.atomic_add(m.pointers[p + t], m.wide[i + t], m.narrow[x + t], t)?;
                Ok(())
            })?,
            Inst::Half { op, d, a, b, c } => self.half(op, d, [a, b, c]),
            Inst::Mma { number } => {
                for first in self.masks.whole_warps()? {
                    half::mma(&block.mmas[number], &mut self.narrow, first, threads);
                }
            }
            Inst::MmaGroup { number } => self.mma_group(&block.mma_groups[number])?,
            Inst::CopyAsync { to, at, from, from_at } => self.each(|m, t| {
                let from = (m.pointers[from + t], m.wide[from_at + t]);
                m.memory.copy((m.pointers[to + t], m.wide[at + t]), from, t)
            })?,
            Inst::CopyCommit => {
                self.masks.whole_block()?;
                self.memory.commit_copies();
            }
            Inst::CopyWait { left } => {
                self.masks.whole_block()?;
                self.memory.wait_for_copies(left)?;
            }
            Inst::Prefetch { p, at, bytes } => {
                self.each(|m, t| m.memory.prefetch(m.pointers[p + t], m.wide[at + t], m.wide[bytes + t]))?;
            }
            Inst::Wait => {
                self.masks.whole_block()?;
                self.memory.must_wait = false;
            }
            Inst::Release => self.masks.whole_block()?,
            Inst::Nibble { d, a, shift, n } => {
                let (from, to) = self.narrow.split_at_mut(d);
                for (out, &word) in to[..n].iter_mut().zip(&from[a..a + n]) {
                    *out = ((word >> shift & 15) as f32 - 8.0).to_bits();
                }
            }
            Inst::Bf16 { in_a_row, d, a, b } => {
                let [a, b] = [a, b].map(|reg| std::array::from_fn(|lane| self.narrow[reg + lane]));
                let words = if in_a_row { tile::bf16_row(&a, &b) } else { tile::bf16_pairs(&a, &b) };
                self.narrow[d..d + words.len()].copy_from_slice(&words);
            }
            Inst::ByteRow { d, from } => {
                let row = from.map(|reg| std::array::from_fn(|lane| self.narrow[reg + lane]));
                self.narrow[d..d + tile::ROWS].copy_from_slice(&tile::byte_row(&row));
            }
            Inst::ByteDot { d, sum, a, b, n } => {
                for i in 0..n {
                    let [sum, a, b] = [sum, a, b].map(|reg| self.narrow[reg + i]);
                    self.narrow[d + i] = tile::byte_dot(sum, a, b);
                }
            }
            Inst::PairDot { d, sum, a, b, n } => {
                for i in 0..n {
                    let [sum, a, b] = [sum, a, b].map(|reg| self.narrow[reg + i]);
                    self.narrow[d + i] = tile::pair_dot(sum, a, b);
                }
            }
            Inst::ShortDot { d, sum, a, b, n } => {
                for i in 0..n {
                    let [sum, a, b] = [sum, a, b].map(|reg| self.narrow[reg + i]);
                    self.narrow[d + i] = tile::short_dot(sum, a, b);
                }
            }
            Inst::TileTurn { to, from } => self.tile_turn(to, from)?,
            Inst::TileZero => self.sums = Sums::default(),
            Inst::TileStep { number } => self.tile_step(&block.tile_steps[number])?,
            Inst::TileStore { c, rows, columns } => self.tile_store(c, rows as usize, columns as usize)?,
            Inst::TileLoad { c, rows, columns } => self.tile_load(c, rows as usize, columns as usize)?,
        }
        Ok(next)
    }

    /// The products of the groups of four warps that are here.
    fn mma_group(&mut self, m: &MmaGroup) -> Result<(), Misdeed> {
        let threads = self.threads();
        for first in self.masks.whole_warp_groups()? {
            self.thread = Some(first);
            let (b, index) = (self.pointers[m.b[0] + first], self.wide[m.b[1] + first]);
            let tokens = self.memory.swizzled(b, index, (8 * m.groups, m.a.len() / 4), first)?;
            for warp in 0..4 {
                half::mma_group(m, &mut self.narrow, &tokens, (first + warp * Kernel::WARP as usize, threads));
            }
        }
        Ok(())
    }

    /// What can fail, for each thread that is here.
    #[inline(always)]
    fn each(&mut self, mut f: impl FnMut(&mut Self, usize) -> Result<(), Misdeed>) -> Result<(), Misdeed> {
        if SINGLE {
            return f(self, 0);
        }
        for t in 0..self.threads() {
            if self.masks.has(t) {
                self.thread = Some(t);
                f(self, t)?;
            }
        }
        Ok(())
    }

    /// The same for each lane of each thread.
    fn each_lane(&mut self, n: usize, f: impl Fn(&mut Self, usize) -> Result<(), Misdeed>) -> Result<(), Misdeed> {
        let threads = self.threads();
        self.each(|m, t| (t..n).step_by(threads).try_for_each(|i| f(m, i)))
    }

    /// Moves for the threads that are here: a register that others still need stays as it is for them.
    fn assign(&mut self, bank: Bank, d: Reg, a: Reg, n: usize) {
        let all = SINGLE || self.masks.all();
        match bank {
            Bank::Narrow if all => self.narrow.copy_within(a..a + n, d),
            Bank::Wide if all => self.wide.copy_within(a..a + n, d),
            Bank::Pointer if all => self.pointers.copy_within(a..a + n, d),
            Bank::Narrow => assign(&mut self.narrow, d, a, n, &self.masks),
            Bank::Wide => assign(&mut self.wide, d, a, n, &self.masks),
            Bank::Pointer => assign(&mut self.pointers, d, a, n, &self.masks),
        }
    }

    fn choose(&mut self, bank: Bank, d: Reg, c: Reg, (a, b): (Reg, Reg), lanes: usize) {
        for t in 0..self.threads() {
            let from = if self.narrow[c + t] != 0 { a } else { b };
            for i in (t..lanes * self.threads()).step_by(self.threads()) {
                match bank {
                    Bank::Narrow => self.narrow[d + i] = self.narrow[from + i],
                    Bank::Wide => self.wide[d + i] = self.wide[from + i],
                    Bank::Pointer => self.pointers[d + i] = self.pointers[from + i],
                }
            }
        }
    }

    /// The next turn of the threads that loop; false if none does.
    fn advance(&mut self, i: Reg, step: Reg) -> bool {
        let wide = &mut self.wide;
        let mut next = |t: usize| match wide[i + t].checked_add(wide[step + t]) {
            Some(sum) => {
                wide[i + t] = sum;
                true
            }
            None => false,
        };
        if SINGLE { next(0) } else { self.masks.keep(next) }
    }

    #[inline(always)]
    fn two(&mut self, d: Reg, a: Reg, b: Reg, n: usize, f: impl Fn(u32, u32) -> u32) {
        let (from, to) = self.narrow.split_at_mut(d);
        for ((out, &x), &y) in to[..n].iter_mut().zip(&from[a..a + n]).zip(&from[b..b + n]) {
            *out = f(x, y);
        }
    }

    #[inline(always)]
    fn three(&mut self, d: Reg, [a, b, c]: [Reg; 3], n: usize, f: impl Fn(u32, u32, u32) -> u32) {
        let (from, to) = self.narrow.split_at_mut(d);
        let operands = from[a..a + n].iter().zip(&from[b..b + n]).zip(&from[c..c + n]);
        for (out, ((&x, &y), &z)) in to[..n].iter_mut().zip(operands) {
            *out = f(x, y, z);
        }
    }

    fn int32(&mut self, op: IntOp, d: Reg, a: Reg, b: Reg, n: usize) -> Result<(), Misdeed> {
        match op {
            IntOp::Add => self.two(d, a, b, n, u32::wrapping_add),
            IntOp::Sub => self.two(d, a, b, n, u32::wrapping_sub),
            IntOp::Mul => self.two(d, a, b, n, u32::wrapping_mul),
            IntOp::And => self.two(d, a, b, n, |x, y| x & y),
            IntOp::Or => self.two(d, a, b, n, |x, y| x | y),
            IntOp::Xor => self.two(d, a, b, n, |x, y| x ^ y),
            IntOp::Shl => self.two(d, a, b, n, u32::wrapping_shl),
            IntOp::Ushr => self.two(d, a, b, n, u32::wrapping_shr),
            IntOp::Sshr => self.two(d, a, b, n, |x, y| x.cast_signed().wrapping_shr(y).cast_unsigned()),
            IntOp::Div | IntOp::Rem => self.each(|m, t| {
                let (x, y) = (m.narrow[a + t].cast_signed(), m.narrow[b + t].cast_signed());
                let out = if matches!(op, IntOp::Div) { x.checked_div(y) } else { x.checked_rem(y) };
                m.narrow[d + t] = out.ok_or(Misdeed::Division)?.cast_unsigned();
                Ok(())
            })?,
        }
        if matches!(op, IntOp::Shl | IntOp::Ushr | IntOp::Sshr) && self.narrow[b..b + n].iter().any(|&s| s > 31) {
            self.each_lane(n, |m, i| if m.narrow[b + i] > 31 { Err(Misdeed::Shift) } else { Ok(()) })?;
        }
        Ok(())
    }

    fn int64(&mut self, op: IntOp, d: Reg, a: Reg, b: Reg, n: usize) -> Result<(), Misdeed> {
        let mut two = |f: fn(i64, i64) -> i64| {
            let (from, to) = self.wide.split_at_mut(d);
            for ((out, &x), &y) in to[..n].iter_mut().zip(&from[a..a + n]).zip(&from[b..b + n]) {
                *out = f(x, y);
            }
        };
        match op {
            IntOp::Add => two(i64::wrapping_add),
            IntOp::Sub => two(i64::wrapping_sub),
            IntOp::Mul => two(i64::wrapping_mul),
            IntOp::And => two(|x, y| x & y),
            IntOp::Or => two(|x, y| x | y),
            IntOp::Xor => two(|x, y| x ^ y),
            IntOp::Shl | IntOp::Ushr | IntOp::Sshr | IntOp::Div | IntOp::Rem => {
                return self.each_lane(n, |m, i| {
                    m.wide[d + i] = partial(op, m.wide[a + i], m.wide[b + i])?;
                    Ok(())
                });
            }
        }
        Ok(())
    }

    fn float(&mut self, op: FloatOp, d: Reg, a: Reg, b: Reg, n: usize) {
        match op {
            FloatOp::Add => self.two(d, a, b, n, on(|x, y| x + y)),
            FloatOp::Sub => self.two(d, a, b, n, on(|x, y| x - y)),
            FloatOp::Mul => self.two(d, a, b, n, on(|x, y| x * y)),
            FloatOp::Div => self.two(d, a, b, n, on(|x, y| x / y)),
            FloatOp::Min => self.two(d, a, b, n, on(|x, y| if x < y { x } else { y })),
            FloatOp::Max => self.two(d, a, b, n, on(|x, y| if x > y { x } else { y })),
        }
    }

    fn unary(&mut self, op: UnaryOp, d: Reg, a: Reg, n: usize) -> Result<(), Misdeed> {
        let mut one = |f: fn(u32) -> u32| {
            let (from, to) = self.narrow.split_at_mut(d);
            to[..n].iter_mut().zip(&from[a..a + n]).for_each(|(out, &x)| *out = f(x));
        };
        match op {
            UnaryOp::Neg => one(|x| x ^ 0x8000_0000),
            UnaryOp::Abs => one(|x| x & 0x7fff_ffff),
            UnaryOp::Sqrt => one(|x| f32::from_bits(x).sqrt().to_bits()),
            UnaryOp::Round => one(|x| f32::from_bits(x).round_ties_even().to_bits()),
            UnaryOp::ToFloat => one(|x| (x.cast_signed() as f32).to_bits()),
            UnaryOp::ToInt => {
                return self.each_lane(n, |m, i| {
                    m.narrow[d + i] = to_int(f32::from_bits(m.narrow[a + i]))?.cast_unsigned();
                    Ok(())
                });
            }
        }
        Ok(())
    }

    fn cmp(&mut self, of: CmpOf, pred: Pred, d: Reg, a: Reg, b: Reg, n: usize) {
        match of {
            CmpOf::F32 => {
                self.two(d, a, b, n, |x, y| u32::from(holds(pred, &f32::from_bits(x), &f32::from_bits(y))));
            }
            CmpOf::I32 => self.two(d, a, b, n, |x, y| u32::from(holds(pred, &x.cast_signed(), &y.cast_signed()))),
            CmpOf::I64 => {
                let operands = self.wide[a..a + n].iter().zip(&self.wide[b..b + n]);
                for (out, (x, y)) in self.narrow[d..d + n].iter_mut().zip(operands) {
                    *out = u32::from(holds(pred, x, y));
                }
            }
        }
    }

    #[inline(always)]
    fn reduce(&mut self, d: Reg, a: Reg, lanes: usize, f: impl Fn(f32, f32) -> f32) {
        let mut x = [0.0; 16];
        for t in 0..self.threads() {
            for (l, x) in x[..lanes].iter_mut().enumerate() {
                *x = f32::from_bits(self.narrow[a + l * self.threads() + t]);
            }
            let mut half = lanes / 2;
            while half > 0 {
                for l in 0..half {
                    x[l] = f(x[l], x[l + half]);
                }
                half /= 2;
            }
            self.narrow[d + t] = x[0].to_bits();
        }
    }

    fn half(&mut self, op: HalfOp, d: Reg, operands: [Reg; 3]) {
        self.three(d, operands, self.threads(), |x, y, z| half::apply(op, x, y, z));
    }

    /// Products of tiles; only single threads have them.
    fn tile_step(&mut self, step: &TileStep) -> Result<(), Misdeed> {
        for (i, &a) in step.a.iter().enumerate() {
            for (j, &b) in step.b.iter().enumerate() {
                let (a, b) = (self.tile(a)?, self.tile(b)?);
                tile::multiply_add(&mut self.sums[i * step.b.len() + j], &a, &b);
            }
        }
        Ok(())
    }

    fn tile_turn(&mut self, to: Reg, from: Reg) -> Result<(), Misdeed> {
        let tile = self.tile(from)?;
        for line in 0..tile::ROWS {
            let words = self.memory.write(self.pointers[to], (line * tile::ROWS) as i64, (tile::ROWS, 4), 0)?;
            words.iter_mut().zip(&tile).for_each(|(word, row)| *word = row[line]);
        }
        Ok(())
    }

    fn tile_store(&mut self, c: Reg, rows: usize, columns: usize) -> Result<(), Misdeed> {
        for (at, (sum, line)) in tile::lines(rows, columns) {
            let words = self.memory.write(self.pointers[c], at, (tile::ROWS, 4), 0)?;
            words.iter_mut().zip(&self.sums[sum][line]).for_each(|(word, x)| *word = x.to_bits());
        }
        Ok(())
    }

    fn tile_load(&mut self, c: Reg, rows: usize, columns: usize) -> Result<(), Misdeed> {
        for (at, (sum, line)) in tile::lines(rows, columns) {
            let words = self.memory.read(self.pointers[c], at, (tile::ROWS, 4), 0)?;
            self.sums[sum][line].iter_mut().zip(words).for_each(|(x, &word)| *x = f32::from_bits(word));
        }
        Ok(())
    }

    /// The tile that a pointer leads to.
    fn tile(&mut self, p: Reg) -> Result<Tile, Misdeed> {
        let mut tile = Tile::default();
        for (line, words) in (0..).zip(&mut tile) {
            words.copy_from_slice(self.memory.read(self.pointers[p], line * tile::ROWS as i64, (tile::ROWS, 4), 0)?);
        }
        Ok(tile)
    }

    fn load32(&mut self, d: Reg, p: Reg, i: Reg, lanes: usize) -> Result<(), Misdeed> {
        let threads = self.threads();
        self.each(|m, t| {
            let words = m.memory.read(m.pointers[p + t], m.wide[i + t], (lanes, 4), t)?;
            if SINGLE {
                m.narrow[d..d + lanes].copy_from_slice(words);
            } else {
                let out = m.narrow[d + t..].iter_mut().step_by(threads);
                out.zip(words).for_each(|(out, &word)| *out = word);
            }
            Ok(())
        })
    }

    fn load64(&mut self, d: Reg, p: Reg, i: Reg, lanes: usize) -> Result<(), Misdeed> {
        let threads = self.threads();
        self.each(|m, t| {
            let words = m.memory.read(m.pointers[p + t], m.wide[i + t], (lanes, 8), t)?;
            let out = m.wide[d + t..].iter_mut().step_by(threads);
            for (out, words) in out.zip(words.chunks(2)) {
                *out = (u64::from(words[0]) | u64::from(words[1]) << 32).cast_signed();
            }
            Ok(())
        })
    }

    fn store32(&mut self, p: Reg, i: Reg, v: Reg, lanes: usize) -> Result<(), Misdeed> {
        let threads = self.threads();
        self.each(|m, t| {
            let words = m.memory.write(m.pointers[p + t], m.wide[i + t], (lanes, 4), t)?;
            if SINGLE {
                words.copy_from_slice(&m.narrow[v..v + lanes]);
            } else {
                let value = m.narrow[v + t..].iter().step_by(threads);
                words.iter_mut().zip(value).for_each(|(word, &x)| *word = x);
            }
            Ok(())
        })
    }

    fn store64(&mut self, p: Reg, i: Reg, v: Reg, lanes: usize) -> Result<(), Misdeed> {
        let threads = self.threads();
        self.each(|m, t| {
            let words = m.memory.write(m.pointers[p + t], m.wide[i + t], (lanes, 8), t)?;
            let value = m.wide[v + t..].iter().step_by(threads);
            for (words, &x) in words.chunks_mut(2).zip(value) {
                words.copy_from_slice(&[x as u32, (x >> 32) as u32]);
            }
            Ok(())
        })
    }
}

/// A scalar of each thread in all lanes.
fn splat<T: Copy>(bank: &mut [T], d: Reg, a: Reg, lanes: usize, threads: usize) {
    (0..lanes).for_each(|l| bank.copy_within(a..a + threads, d + l * threads));
}

fn assign<T: Copy>(bank: &mut [T], d: Reg, a: Reg, n: usize, masks: &Masks) {
    for t in masks.active() {
        (t..n).step_by(masks.threads()).for_each(|i| bank[d + i] = bank[a + i]);
    }
}

/// A function of floats as one of their bits.
fn on(f: impl Fn(f32, f32) -> f32) -> impl Fn(u32, u32) -> u32 {
    move |x, y| f(f32::from_bits(x), f32::from_bits(y)).to_bits()
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

/// The ops that not all numbers have a result of.
fn partial(op: IntOp, x: i64, y: i64) -> Result<i64, Misdeed> {
    let shift = || u32::try_from(y).ok().filter(|&y| y < 64).ok_or(Misdeed::Shift);
    Ok(match op {
        IntOp::Div => x.checked_div(y).ok_or(Misdeed::Division)?,
        IntOp::Rem => x.checked_rem(y).ok_or(Misdeed::Division)?,
        IntOp::Shl => x << shift()?,
        IntOp::Ushr => (x.cast_unsigned() >> shift()?).cast_signed(),
        IntOp::Sshr => x >> shift()?,
        IntOp::Add | IntOp::Sub | IntOp::Mul | IntOp::And | IntOp::Or | IntOp::Xor => {
            unreachable!("they always have one")
        }
    })
}
