//! What a step launches: grids, blocks and arguments of each kernel and tail, worked out once for a program and its
//! dimensions.

use nextc_abi::metadata::SINGLE_THREADS;
use nextc_abi::{Kernel, Launch, Metadata, Program};

use super::CudaError;
use crate::step::Resolved;

/// Most blocks of a grid in its first dimension.
const MAX_BLOCKS: u64 = (1 << 31) - 1;
/// Alignment of the scratch of a task.
const SCRATCH_ALIGN: u64 = 128;

/// One launch of a kernel or of its tail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Planned {
    /// Index of the launch in its program.
    pub launch: usize,
    /// Index of its kernel.
    pub kernel: usize,
    /// True for the tail of the kernel.
    pub tail: bool,
    /// Blocks.
    pub blocks: u32,
    /// Threads of a block.
    pub threads: u32,
    /// Shared memory of a block.
    pub shared_bytes: u32,
    /// True if it may begin while the launch before it still runs.
    pub early: bool,
    /// Its arguments, each of 8 bytes.
    pub args: Vec<u64>,
}

/// Bytes of scratch that the launches of a program need at most, in steps of `dims`.
pub(super) fn scratch_bytes(metadata: &Metadata, program: &Program, dims: &[u64; 4]) -> u64 {
    let of = |launch: &Launch| {
        let kernel = &metadata.kernels[launch.kernel as usize];
        // tasks of the tail work in the scratch of those of the body; of blocks, which have none, it is what they hand to the tail
        let tasks = kernel.grid.eval(dims).max(kernel.tail_grid.eval(dims)).max(1);
        (kernel.scratch_bytes + kernel.partial_bytes).saturating_mul(tasks)
    };
    let bytes = program.launches.iter().map(of).max().unwrap_or(0);
    bytes.checked_next_multiple_of(SCRATCH_ALIGN).unwrap_or(u64::MAX)
}

/// Bytes of the device that steps of `dims` work in.
pub(crate) fn step_bytes(metadata: &Metadata, dims: &[u64; 4]) -> u64 {
    let most = |of: &dyn Fn(&Program) -> u64| metadata.programs.iter().map(of).max().unwrap_or(0);
    // the arena and the scratch stay as large as they ever were
    most(&|p| metadata.arena.bytes_of(p, dims)).saturating_add(most(&|p| scratch_bytes(metadata, p, dims)))
}

/// The launches of a program, with scratch at an address.
/// # Errors
/// [`CudaError::Call`] if a grid is larger than a device takes.
pub(super) fn plan(
    metadata: &Metadata,
    program: &Program,
    resolved: &Resolved,
    scratch: u64,
) -> Result<Vec<Planned>, CudaError> {
    let mut planned: Vec<Planned> = Vec::with_capacity(resolved.launches.len());
    for (launch, r) in resolved.launches.iter().enumerate() {
        let kernel = &metadata.kernels[r.kernel];
        let (blocks, threads) = shape(kernel, r.tasks);
        let too_many = |_| CudaError::Call {
            doing: format!("program `{}`, kernel `{}` ({})", program.name, kernel.name, program.launches[launch].label),
            call: "launch",
            error: format!("{} tasks, {} of its tail, expected at most {MAX_BLOCKS} blocks", r.tasks, r.tail_tasks),
        };
        let fits = |n: u64| u32::try_from(n).ok().filter(|&n| u64::from(n) <= MAX_BLOCKS).ok_or(()).map_err(too_many);
        let (blocks, tail_blocks) = (fits(blocks)?, fits(r.tail_tasks)?);
        let mut args = resolved.args[r.args.clone()].to_vec();
        args.extend([scratch, r.tasks]);
        let shared_bytes = u32::try_from(kernel.shared_bytes).unwrap_or(u32::MAX);
        let body = Planned { launch, kernel: r.kernel, tail: false, blocks, threads, shared_bytes, early: false, args };
        // the first launch has none before it: what it follows is a copy
        if blocks > 0 {
            planned.push(Planned { early: kernel.waits && !planned.is_empty(), ..body.clone() });
        }
        if kernel.tail.is_some() && tail_blocks > 0 {
            planned.push(Planned {
                tail: true,
                blocks: tail_blocks,
                early: kernel.tail_waits && !planned.is_empty(),
                ..body
            });
        }
    }
    Ok(planned)
}

/// Blocks and threads of a block for so many tasks.
fn shape(kernel: &Kernel, tasks: u64) -> (u64, u32) {
    match kernel.threads {
        0 | 1 => (tasks.div_ceil(SINGLE_THREADS.into()), SINGLE_THREADS),
        threads => (tasks, threads),
    }
}

#[cfg(test)]
mod tests {
    use nextc_abi::{Arg, Extent, Input, Sym};

    use super::*;
    use crate::step::{Addresses, INPUTS, resolve};

    fn kernel(threads: u32, tail: bool, waits: bool) -> Kernel {
        Kernel {
            name: format!("k{threads}"),
            doc: String::new(),
            entry: 0,
            tail: tail.then_some(0),
            binary: None,
            scratch_bytes: if threads > 1 { 0 } else { 192 },
            partial_bytes: if threads > 1 { 192 } else { 0 },
            threads,
            shared_bytes: if threads > 1 { 1024 } else { 0 },
            waits,
            tail_waits: waits,
            params: 1,
            grid: Extent::Mul(Box::new(Extent::Sym(Sym::T)), Box::new(Extent::Const(10))),
            tail_grid: if threads > 1 { Extent::Sym(Sym::T) } else { Extent::Const(1) },
        }
    }

    fn planned(kernels: Vec<Kernel>, tokens: u64) -> (Vec<Planned>, u64) {
        let mut metadata = crate::sample_metadata();
        let launch = |kernel| Launch { kernel, args: vec![Arg::Input(Input::Tokens)], label: "layer".to_owned() };
        let program = Program {
            name: "step".to_owned(),
            launches: (0..kernels.len() as u32).map(launch).collect(),
            outputs: Vec::new(),
            row_bytes: 0,
            cost: Default::default(),
        };
        metadata.kernels = kernels;
        let at = Addresses { inputs: [0x1000; INPUTS], arena: 0, weights: 0, states: &[], team: None };
        let dims = [tokens, 1, 2, 0];
        let resolved = resolve(&metadata, &program, dims, &at);
        let bytes = scratch_bytes(&metadata, &program, &dims);
        (plan(&metadata, &program, &resolved, 0x2000).unwrap(), bytes)
    }

    #[test]
    fn tasks_of_one_thread_share_blocks_and_tails_follow_on_their_own_grid() {
        let (planned, scratch) = planned(vec![kernel(1, true, false), kernel(256, true, false)], 7);
        let shape = |p: &Planned| (p.kernel, p.tail, p.blocks, p.threads, p.shared_bytes);
        let shapes: Vec<_> = planned.iter().map(shape).collect();
        assert_eq!(
            shapes,
            [(0, false, 3, 32, 0), (0, true, 1, 32, 0), (1, false, 70, 256, 1024), (1, true, 7, 256, 1024)]
        );
        assert_eq!(planned[0].args, [7, 1, 2, 0, 0x1000, 0x2000, 70]);
        assert_eq!(scratch, 70 * 192);
    }

    #[test]
    fn only_kernels_that_wait_begin_early_and_never_the_first() {
        let kernels = || vec![kernel(64, true, true), kernel(1, false, false), kernel(64, false, true)];
        let early = |tokens| planned(kernels(), tokens).0.iter().map(|p| p.early).collect::<Vec<_>>();
        assert_eq!(early(1), [false, true, false, true]);
        // a grid of no task is left out
        assert!(early(0).is_empty());
    }
}
