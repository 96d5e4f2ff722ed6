//! Kernels to functions of the device. A kernel is loaded from its binary, where the build had an assembler (`ptxas`); where it had none, or the driver
//! does not take what it made (it is older, the device another one), the driver compiles the kernel's text of PTX and keeps
//! the result in its own cache (`~/.nv/ComputeCache`, or where `CUDA_CACHE_PATH` says), so that the next start only loads.
//!
//! The driver compiles one text after the other, whatever threads ask: 7 to 8 s for the official model.

use std::ffi::{CStr, CString, c_void};
use std::ptr;
use std::sync::Mutex;

use cudarc::driver::sys::{self, CUfunction_attribute as Attribute, CUjit_option as JitOption, CUresult};
use nextc_abi::Kernel;

use super::CudaError;
use super::driver::{Context, describe, driver};
use crate::artifact::Artifact;
use crate::error::Error;
use crate::pool::on_all_processors;

/// Bytes of the compiler's log that are kept.
const LOG_BYTES: usize = 16 << 10;
/// Bytes of shared memory that a block may have without being asked for.
const PLAIN_SHARED_BYTES: u64 = 48 << 10;

/// Code on the device.
#[derive(Debug)]
pub(super) struct Module(sys::CUmodule);

// SAFETY: a handle of a context that every thread may use.
unsafe impl Send for Module {}

/// A function of a [`Module`] that lives.
#[derive(Clone, Copy, Debug)]
pub(super) struct Function(pub sys::CUfunction);

// SAFETY: as above.
unsafe impl Send for Function {}

impl Module {
    /// Loads a binary; `None` if the driver does not take it.
    fn of_binary(binary: &[u8]) -> Option<Self> {
        let mut module = ptr::null_mut();
        // SAFETY: the driver reads as many bytes as the binary's own headers say; they are as the assembler wrote them, since the hash of the image is that of
        // the linker's output.
        let status = unsafe { sys::cuModuleLoadData(&mut module, binary.as_ptr().cast()) };
        (status == CUresult::CUDA_SUCCESS).then_some(Self(module))
    }

    /// Compiles a text.
    /// # Errors
    /// [`CudaError::Compile`] with what the driver's compiler says of `name`.
    pub fn compile(text: &CStr, name: &str) -> Result<Self, CudaError> {
        let mut log = vec![0u8; LOG_BYTES];
        let mut options = [JitOption::CU_JIT_ERROR_LOG_BUFFER, JitOption::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
        // the driver takes a number as if it were a pointer
        let mut values = [log.as_mut_ptr().cast::<c_void>(), ptr::without_provenance_mut(LOG_BYTES - 1)];
        let mut module = ptr::null_mut();
        // SAFETY: the text ends with a NUL; the log has as many bytes as the options say; all of it lives through the
        // call.
        let status = unsafe {
            let (options, values) = (options.as_mut_ptr(), values.as_mut_ptr());
            sys::cuModuleLoadDataEx(&mut module, text.as_ptr().cast(), 2, options, values)
        };
        match status {
            CUresult::CUDA_SUCCESS => Ok(Self(module)),
            status => {
                let log = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy().trim_end().to_owned();
                Err(CudaError::Compile { kernel: name.to_owned(), error: describe(status), log })
            }
        }
    }

    /// The entry function `entry`, ready to be launched with so much shared memory. Its code is loaded now, since a
    /// graph could not be recorded while it is loaded.
    pub fn function(&self, entry: &str, kernel: &str, shared_bytes: u64) -> Result<Function, CudaError> {
        let name = CString::new(entry).expect("a name without NUL");
        let mut function = ptr::null_mut();
        let doing = format!("kernel `{kernel}`: finding `{entry}`");
        driver!(doing, cuModuleGetFunction(&mut function, self.0, name.as_ptr()))?;
        driver!(format!("kernel `{kernel}`: loading its code"), cuFuncLoad(function))?;
        if shared_bytes > PLAIN_SHARED_BYTES {
            let bytes = i32::try_from(shared_bytes).unwrap_or(i32::MAX);
            driver!(
                format!("kernel `{kernel}`: asking for {bytes} B of shared memory"),
                cuFuncSetAttribute(function, Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes)
            )?;
        }
        Ok(Function(function))
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let _ = driver!("unloading code", cuModuleUnload(self.0));
    }
}

/// The functions of one kernel.
#[derive(Debug)]
pub(super) struct Functions {
    pub body: Function,
    pub tail: Option<Function>,
    /// What holds them.
    _module: Module,
}

/// The functions of all kernels.
#[derive(Debug)]
pub(super) struct Modules(Vec<Functions>);

impl Modules {
    /// Loads the kernels of an executable on several threads.
    /// # Errors
    /// [`CudaError::Compile`] for the first kernel that cannot be, with what the driver's compiler says.
    pub fn load(context: &Context, artifact: &Artifact) -> Result<Self, Error> {
        let kernels = &artifact.metadata().kernels;
        let loaded = Mutex::new(Vec::with_capacity(kernels.len()));
        on_all_processors(kernels.iter().enumerate(), |(i, kernel)| {
            let functions = context.make_current().map_err(Error::from).and_then(|()| load(artifact, i, kernel));
            loaded.lock().expect("loading does not panic").push((i, functions));
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

/// Loads one kernel.
fn load(artifact: &Artifact, index: usize, kernel: &Kernel) -> Result<Functions, Error> {
    let module = match kernel.binary.and_then(|span| Module::of_binary(artifact.binary(span))) {
        Some(module) => module,
        None => Module::compile(artifact.text(kernel.entry)?, &kernel.name)?,
    };
    let function =
        |prefix: &str| module.function(&format!("nextc_{prefix}_{index}"), &kernel.name, kernel.shared_bytes);
    let tail = kernel.tail.map(|_| function("tail")).transpose()?;
    Ok(Functions { body: function("kernel")?, tail, _module: module })
}
