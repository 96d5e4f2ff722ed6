//! Launches of kernels on a stream.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys;

use super::CudaError;
use super::driver::{Stream, check};
use super::module::Functions;
use super::plan::Planned;

/// Launches a kernel or its tail behind what the stream holds; if `early`, as soon as the kernel before it lets it, where the
/// plan says that it may.
pub(super) fn launch(
    functions: &Functions,
    planned: &Planned,
    stream: &Stream,
    early: bool,
    doing: impl FnOnce() -> String,
) -> Result<(), CudaError> {
    let function = if planned.tail { functions.tail.unwrap_or(ptr::null_mut()) } else { functions.body };
    let mut args: Vec<*mut c_void> = planned.args.iter().map(|a| ptr::from_ref(a).cast_mut().cast()).collect();
    let mut attributes = [early_attribute()];
    let config = sys::CUlaunchConfig {
        gridDimX: planned.blocks,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: planned.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: planned.shared_bytes,
        hStream: stream.raw(),
        attrs: attributes.as_mut_ptr(),
        numAttrs: u32::from(early && planned.early),
    };
    // SAFETY: the function's parameters are the dimensions, as many pointers as the metadata says (`check_entries`), scratch and
    // tasks, all of 8 bytes, and the driver copies them before it returns. The pointers lead to memory of the device that lives as
    // long as the engine and is as large as the linker planned for these dimensions.
    let status = unsafe { sys::cuLaunchKernelEx(&config, function, args.as_mut_ptr(), ptr::null_mut()) };
    check(status, "cuLaunchKernelEx", doing)
}

/// Lets a launch begin while the one before it in the stream still runs.
fn early_attribute() -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    }
}
