//! What a GPU can do at best: memory as a kernel reads it, and the products that the data sheet promises.

use std::ffi::CStr;

use cudarc::driver::sys::CUdevice_attribute as Attribute;

use super::CudaError;
use super::driver::{Context, Event, Stream};
use super::launch::launch;
use super::memory::Growing;
use super::module::Module;
use super::plan::Planned;
use crate::limits::Limits;

/// The kernel that reads.
const READ: &str = concat!(include_str!("read.ptx"), "\0");
/// Threads of its blocks.
const READ_THREADS: u32 = 1024;
/// Bytes that a block reads at a time: eight vectors of 16 bytes a thread.
const CHUNK_BYTES: u64 = READ_THREADS as u64 * 16 * 8;
/// Bytes that are read: much more than the L2 cache, and at most a quarter of what is free.
const READ_BYTES: u64 = 4 << 30;
/// Passes; the best counts.
const PASSES: usize = 8;
/// Multiplications and additions that a multiprocessor of compute capability 9.0 does in a cycle, of bf16 with sums in
/// f32.
const TENSOR_FLOPS: f64 = 4096.0;

/// Measures memory and computes the rest.
pub(super) fn measure(context: &Context, stream: &Stream) -> Result<Limits, CudaError> {
    let multiprocessors = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    let hertz = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)? as f64 * 1e3;
    Ok(Limits {
        read_bytes_per_s: read(context, stream, multiprocessors)?,
        flops_per_s: multiprocessors as f64 * hertz * TENSOR_FLOPS,
        arithmetic: "bf16 in tensor cores at the highest clock",
    })
}

/// Bytes that a kernel reads a second.
fn read(context: &Context, stream: &Stream, multiprocessors: u64) -> Result<f64, CudaError> {
    let text = CStr::from_bytes_with_nul(READ.as_bytes()).expect("the text ends with its only NUL");
    let module = Module::compile(text, "read")?;
    let function = module.function("nextc_read", "read", 0)?;
    let (free, _) = context.memory()?;
    let chunks = (READ_BYTES.min(free / 4) / CHUNK_BYTES).max(1);
    let mut memory = Growing::reserve(context, "what is read", chunks * CHUNK_BYTES)?;
    memory.grow(context, stream, chunks * CHUNK_BYTES)?;
    let planned = Planned {
        launch: 0,
        kernel: 0,
        tail: false,
        blocks: (2 * multiprocessors) as u32,
        threads: READ_THREADS,
        shared_bytes: 0,
        early: false,
        args: vec![memory.address(), chunks, memory.address()],
    };
    let (begin, end) = (Event::new(true)?, Event::new(true)?);
    let mut best = f64::INFINITY;
    for _ in 0..PASSES {
        begin.record(stream)?;
        launch(function, &planned, stream, false, || "measuring memory".to_owned())?;
        end.record(stream)?;
        end.wait()?;
        best = best.min(begin.seconds_until(&end)?);
    }
    Ok((chunks * CHUNK_BYTES) as f64 / best)
}
