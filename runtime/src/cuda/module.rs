//! PTX to functions of the device: the driver compiles each kernel's text, many at once, and keeps what it made in its own cache
//! (`~/.nv/ComputeCache`, or where `CUDA_CACHE_PATH` says), so that the next start only loads.

use std::ffi::{CStr, CString, c_void};
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use cudarc::driver::sys::{self, CUfunction_attribute as Attribute, CUjit_option as Option_, CUresult};
use nextc_abi::Kernel;

use super::CudaError;
use super::driver::{Context, describe, driver};
use crate::artifact::Artifact;
use crate::error::Error;

/// Bytes of the compiler's log that are kept.
const LOG_BYTES: usize = 16 << 10;
/// Bytes of shared memory that a block may have without being asked for.
const PLAIN_SHARED_BYTES: u64 = 48 << 10;

/// The functions of one kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Functions {
    module: sys::CUmodule,
    pub body: sys::CUfunction,
    pub tail: Option<sys::CUfunction>,
}

// SAFETY: handles of a context that every thread may use.
unsafe impl Send for Functions {}

/// The functions of all kernels.
#[derive(Debug)]
pub(super) struct Modules(Vec<Functions>);

impl Modules {
    /// Compiles and loads the kernels of an executable on several threads.
    /// # Errors
    /// [`CudaError::Compile`] for the first kernel that cannot be, with what the driver's compiler says.
    pub fn load(context: &Context, artifact: &Artifact) -> Result<Self, Error> {
        let kernels = &artifact.metadata().kernels;
        let next = AtomicUsize::new(0);
        let loaded = Mutex::new(Vec::with_capacity(kernels.len()));
        std::thread::scope(|scope| {
            let work = || {
                while let Some((i, kernel)) = claim(&next, kernels) {
                    let functions = context.make_current().map_err(Error::from).and_then(|()| {
                        let text = artifact.text(kernel.entry)?;
                        Ok(load(text, i, kernel)?)
                    });
                    loaded.lock().expect("loading does not panic").push((i, functions));
                }
            };
            for _ in 0..crate::pool::available_threads().min(kernels.len()) {
                scope.spawn(work);
            }
        });
        let mut loaded = loaded.into_inner().expect("loading does not panic");
        loaded.sort_by_key(|(i, _)| *i);
        loaded.into_iter().map(|(_, functions)| functions).collect::<Result<_, _>>().map(Self)
    }

    /// The functions of a kernel.
    pub fn functions(&self, kernel: usize) -> &Functions {
        &self.0[kernel]
    }
}

impl Drop for Modules {
    fn drop(&mut self) {
        for functions in &self.0 {
            let _ = driver!("unloading a kernel", cuModuleUnload(functions.module));
        }
    }
}

fn claim<'a>(next: &AtomicUsize, kernels: &'a [Kernel]) -> Option<(usize, &'a Kernel)> {
    let i = next.fetch_add(1, Ordering::Relaxed);
    kernels.get(i).map(|k| (i, k))
}

/// Compiles and loads one kernel, ready to be launched.
fn load(text: &CStr, index: usize, kernel: &Kernel) -> Result<Functions, CudaError> {
    let module = compile(text, kernel)?;
    let function = |prefix: &str| {
        let name = CString::new(format!("nextc_{prefix}_{index}")).expect("a name without NUL");
        let mut function = ptr::null_mut();
        let doing = format!("kernel `{}`: finding {name:?}", kernel.name);
        driver!(doing, cuModuleGetFunction(&mut function, module, name.as_ptr()))?;
        prepare(function, kernel)?;
        Ok::<_, CudaError>(function)
    };
    let tail = kernel.tail.map(|_| function("tail")).transpose()?;
    Ok(Functions { module, body: function("kernel")?, tail })
}

/// Loads the code now, since a graph could not be captured while it is loaded, and asks for much shared memory where it is needed.
fn prepare(function: sys::CUfunction, kernel: &Kernel) -> Result<(), CudaError> {
    let name = &kernel.name;
    driver!(format!("kernel `{name}`: loading its code"), cuFuncLoad(function))?;
    if kernel.shared_bytes > PLAIN_SHARED_BYTES {
        let bytes = i32::try_from(kernel.shared_bytes).unwrap_or(i32::MAX);
        driver!(
            format!("kernel `{name}`: asking for {bytes} B of shared memory"),
            cuFuncSetAttribute(function, Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes)
        )?;
    }
    Ok(())
}

fn compile(text: &CStr, kernel: &Kernel) -> Result<sys::CUmodule, CudaError> {
    let mut log = vec![0u8; LOG_BYTES];
    let mut options = [Option_::CU_JIT_ERROR_LOG_BUFFER, Option_::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    // the driver takes a number as if it were a pointer
    let mut values = [log.as_mut_ptr().cast::<c_void>(), ptr::without_provenance_mut(LOG_BYTES - 1)];
    let mut module = ptr::null_mut();
    // SAFETY: the text ends with a NUL; the log has as many bytes as the options say; all of it lives through the call.
    let status = unsafe {
        let (options, values) = (options.as_mut_ptr(), values.as_mut_ptr());
        sys::cuModuleLoadDataEx(&mut module, text.as_ptr().cast(), 2, options, values)
    };
    match status {
        CUresult::CUDA_SUCCESS => Ok(module),
        status => {
            let log = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy().trim_end().to_owned();
            Err(CudaError::Compile { kernel: kernel.name.clone(), error: describe(status), log })
        }
    }
}
