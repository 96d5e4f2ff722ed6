//! What a GPU can do at best: a measured copy, and the products that its data sheet promises.

use cudarc::driver::sys::CUdevice_attribute as Attribute;

use super::CudaError;
use super::driver::{Context, Event, Stream, driver};
use super::memory::Growing;
use crate::limits::Limits;

/// Bytes of a copy: much more than the L2 cache.
const COPY_BYTES: u64 = 512 << 20;
/// Copies; the best counts.
const COPIES: usize = 8;
/// Multiplications and additions that a multiprocessor of compute capability 9.0 does in a cycle with bf16 in tensor cores.
const TENSOR_FLOPS: f64 = 4096.0;

/// Measures memory and computes the rest.
pub(super) fn measure(context: &Context, stream: &Stream) -> Result<Limits, CudaError> {
    let multiprocessors = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as f64;
    let hertz = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)? as f64 * 1e3;
    Ok(Limits {
        read_bytes_per_s: copied_bytes_per_s(context, stream)?,
        flops_per_s: multiprocessors * hertz * TENSOR_FLOPS,
        arithmetic: "bf16 in tensor cores, by its clock; memory by a copy, both ways",
    })
}

/// Bytes that a copy within the device reads and writes a second.
fn copied_bytes_per_s(context: &Context, stream: &Stream) -> Result<f64, CudaError> {
    let mut memory = Growing::reserve(context, "a copy", 2 * COPY_BYTES)?;
    memory.grow(context, stream, 2 * COPY_BYTES)?;
    let (from, to) = (memory.address(), memory.address() + COPY_BYTES);
    let (begin, end) = (Event::new(true)?, Event::new(true)?);
    let mut best = f64::INFINITY;
    for _ in 0..COPIES {
        begin.record(stream)?;
        driver!("measuring a copy", cuMemcpyDtoDAsync_v2(to, from, COPY_BYTES as usize, stream.raw()))?;
        end.record(stream)?;
        end.wait()?;
        best = best.min(begin.seconds_until(&end)?);
    }
    Ok(2.0 * COPY_BYTES as f64 / best)
}
