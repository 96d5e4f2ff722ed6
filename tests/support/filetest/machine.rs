//! Machine code in memory, called as the runtime calls it.

use nextc_ir::graph::ModelInfo;
use nextc_ir::kernel::Kernel;
use nextc_ir::kernel::eval::{Buffer, Place};
use nextc_ir::schedule::KernelModule;
use nextc_link::image::{self, Image};

use super::values::PAGE_TOKENS;
use super::{Checked, text};

type Code = unsafe extern "C" fn(*const u64, *mut u8, i64, i64);

/// The unit in which memory is given to kernels: they may rely on addresses that are multiples of it.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([u32; 16]);

/// A module of nothing but kernels.
pub fn module(kernels: Vec<Kernel>) -> KernelModule {
    KernelModule {
        info: ModelInfo::default(),
        kernels,
        programs: Vec::new(),
        weights: Vec::new(),
        states: Vec::new(),
        arena: Default::default(),
        page_tokens: PAGE_TOKENS as u64,
    }
}

/// Asks the kernel for tile registers, without which their instructions are illegal; whether it gives them.
pub fn allows_tiles() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: this call only widens what the process may use.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

/// Threads that code is told of: not as many as the interpreter's, so that results must not depend on them.
const TEAM: u64 = 16;

/// Code that can be called.
pub struct Loaded {
    image: Image,
    code: memmap2::Mmap,
}

impl Loaded {
    /// Links objects as the linker does, and maps the image.
    pub fn new(objects: &[Vec<u8>]) -> Checked<Self> {
        let image = image::build(objects).map_err(text)?;
        let mut code = memmap2::MmapMut::map_anon(image.bytes.len()).map_err(text)?;
        code.copy_from_slice(&image.bytes);
        Ok(Self { image, code: code.make_exec().map_err(text)? })
    }

    /// Runs kernel `index` of the module on `memory`: the later half of its tasks, the earlier one, so the tail.
    pub fn run(&self, index: usize, kernel: &Kernel, syms: [u64; 4], memory: &mut Memory, args: &[Place]) -> Checked {
        let mut words = syms.to_vec();
        words.push(TEAM);
        for place in args {
            words.push(memory.0[place.buffer].as_mut_ptr() as u64 + place.at_bytes);
        }
        let [tasks, tail_tasks] = [&kernel.grid, &kernel.tail_grid].map(|grid| grid.eval(&syms) as i64);
        let mut partials = vec![Line([0xa5a5_a5a5; 16]); (kernel.partial_bytes() * tasks as u64).div_ceil(64) as usize];
        words.push(partials.as_mut_ptr() as u64);
        let mut scratch = vec![Line([0xa5a5_a5a5; 16]); kernel.scratch_bytes().div_ceil(64) as usize];
        let mut call = |symbol: String, first, last| {
            let at = *self.image.symbols.get(&symbol).ok_or_else(|| format!("the image has no `{symbol}`"))?;
            // SAFETY: the image holds code for this signature at its symbols, and the kernel interpreter has run this kernel on
            // memory of these sizes without leaving it.
            unsafe {
                let code: Code = std::mem::transmute(self.code.as_ptr().add(at as usize));
                code(words.as_ptr(), scratch.as_mut_ptr().cast(), first, last);
            }
            Ok::<(), String>(())
        };
        call(format!("nextc_kernel_{index}"), tasks / 2, tasks)?;
        call(format!("nextc_kernel_{index}"), 0, tasks / 2)?;
        if kernel.tail.is_some() {
            call(format!("nextc_tail_{index}"), tail_tasks / 2, tail_tasks)?;
            call(format!("nextc_tail_{index}"), 0, tail_tasks / 2)?;
        }
        Ok(())
    }
}

/// Memory for machine code: what nobody has written holds NaNs.
pub struct Memory(Vec<Vec<Line>>);

impl Memory {
    /// A copy of the kernel interpreter's memory.
    pub fn of(buffers: &[Buffer]) -> Self {
        Self(buffers.iter().map(lines).collect())
    }

    /// Adds copies of buffers that have come since.
    pub fn grow(&mut self, buffers: &[Buffer]) {
        self.0.extend(buffers[self.0.len()..].iter().map(lines));
    }

    /// The first word that the kernel interpreter has written and that is another here, bit for bit.
    pub fn difference(&self, buffers: &[Buffer]) -> Option<(usize, usize)> {
        let of_buffer = |(b, buffer): (usize, &Buffer)| {
            let words = words(buffer);
            let here = self.0[b].iter().flat_map(|line| line.0);
            let at = here.zip(words).enumerate().position(|(i, (x, y))| buffer.is_written(i) && x != y)?;
            Some((b, at))
        };
        buffers.iter().enumerate().find_map(of_buffer)
    }
}

fn words(buffer: &Buffer) -> Vec<u32> {
    buffer.to_i32().into_iter().map(i32::cast_unsigned).collect()
}

fn lines(buffer: &Buffer) -> Vec<Line> {
    let words = words(buffer);
    let mut lines = vec![Line([u32::MAX; 16]); words.len().div_ceil(16)];
    for (i, word) in words.into_iter().enumerate().filter(|(i, _)| buffer.is_written(*i)) {
        lines[i / 16].0[i % 16] = word;
    }
    lines
}
