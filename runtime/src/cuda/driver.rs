//! The driver's functions with their errors as results, and the few of its objects that are needed, given back when
//! dropped.

use std::ffi::CStr;
use std::ptr;

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};

use super::CudaError;

/// The oldest driver whose functions are all here: CUDA 12.8.
const LEAST_VERSION: i32 = 12_080;

/// Calls a function of the driver: `driver!("what is being done", cuFunction(arguments))`.
macro_rules! driver {
    ($doing:expr, $function:ident($($arg:expr),* $(,)?)) => {{
        // SAFETY: each caller passes handles that the driver gave and that live, and pointers to places of the types
        // that the driver's header states; what the values mean is checked by the driver, which reports what it
        // refuses.
        let status = unsafe { ::cudarc::driver::sys::$function($($arg),*) };
        $crate::cuda::driver::check(status, stringify!($function), || ::std::string::ToString::to_string(&$doing))
    }};
}
pub(super) use driver;

/// The driver's status as a result.
pub(super) fn check(status: CUresult, call: &'static str, doing: impl FnOnce() -> String) -> Result<(), CudaError> {
    match status {
        CUresult::CUDA_SUCCESS => Ok(()),
        status => Err(CudaError::Call { doing: doing(), call, error: describe(status) }),
    }
}

/// The driver's name and words for a status.
pub(super) fn describe(status: CUresult) -> String {
    let text = |ask: unsafe fn(CUresult, *mut *const std::ffi::c_char) -> CUresult| {
        let mut text = ptr::null();
        // SAFETY: the driver sets `text` to a string of its own that lives for ever, or leaves it null.
        unsafe {
            ask(status, &mut text);
            (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        }
    };
    match (text(sys::cuGetErrorName), text(sys::cuGetErrorString)) {
        (Some(name), Some(words)) => format!("{name} ({words})"),
        _ => format!("{status:?}"),
    }
}

/// A device and its context.
#[derive(Debug)]
pub(super) struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
    name: String,
}

// SAFETY: a context may be made current on any thread, and the handle is never changed.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// The first device that the driver shows, if it can run code for `target`.
    /// # Errors
    /// [`CudaError`] says what is missing.
    pub fn open(target: &str) -> Result<Self, CudaError> {
        // SAFETY: loading the driver's library runs its initialisers, which is what it is made for.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoDriver { target: target.to_owned() });
        }
        let no_device = || CudaError::NoDevice { target: target.to_owned() };
        // SAFETY: the library is there, and these two take no pointers but to `version`.
        match unsafe { sys::cuInit(0) } {
            CUresult::CUDA_ERROR_NO_DEVICE => return Err(no_device()),
            status => check(status, "cuInit", || "starting the NVIDIA driver".to_owned())?,
        }
        check_version()?;
        let mut count = 0;
        driver!("counting GPUs", cuDeviceGetCount(&mut count))?;
        if count == 0 {
            return Err(no_device());
        }
        let mut device = 0;
        driver!("opening GPU 0", cuDeviceGet(&mut device, 0))?;
        let name = device_name(device)?;
        check_capability(device, &name, target)?;
        let mut context = ptr::null_mut();
        driver!(format!("opening {name}"), cuDevicePrimaryCtxRetain(&mut context, device))?;
        let this = Self { device, context, name };
        this.make_current()?;
        Ok(this)
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The device's number.
    pub fn device(&self) -> sys::CUdevice {
        self.device
    }

    /// Makes the calling thread work on this device.
    pub fn make_current(&self) -> Result<(), CudaError> {
        driver!("choosing the GPU", cuCtxSetCurrent(self.context))
    }

    /// A number that describes the device.
    pub fn attribute(&self, attribute: Attribute) -> Result<u64, CudaError> {
        Ok(u64::from(device_attribute(self.device, attribute)?.unsigned_abs()))
    }

    /// Bytes of its memory that are free, and that it has.
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        let (mut free, mut total) = (0, 0);
        driver!("asking for free memory", cuMemGetInfo_v2(&mut free, &mut total))?;
        Ok((free as u64, total as u64))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // the process ends soon, and there is nobody to tell
        let _ = driver!("closing the GPU", cuDevicePrimaryCtxRelease_v2(self.device));
    }
}

fn check_version() -> Result<(), CudaError> {
    let mut found = 0;
    driver!("asking the NVIDIA driver for its version", cuDriverGetVersion(&mut found))?;
    if found < LEAST_VERSION { Err(CudaError::OldDriver { found, expected: LEAST_VERSION }) } else { Ok(()) }
}

fn device_name(device: sys::CUdevice) -> Result<String, CudaError> {
    let mut name = [0u8; 128];
    driver!("asking for the GPU's name", cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as i32 - 1, device))?;
    let name = CStr::from_bytes_until_nul(&name).unwrap_or_default();
    Ok(name.to_string_lossy().into_owned())
}

fn device_attribute(device: sys::CUdevice, attribute: Attribute) -> Result<i32, CudaError> {
    let mut value = 0;
    driver!(format!("asking for {attribute:?}"), cuDeviceGetAttribute(&mut value, attribute, device))?;
    Ok(value)
}

fn check_capability(device: sys::CUdevice, name: &str, target: &str) -> Result<(), CudaError> {
    let major = device_attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let found = (major, device_attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?);
    if runs(target, found) {
        return Ok(());
    }
    Err(CudaError::Capability { device: name.to_owned(), found, target: target.to_owned() })
}

/// True if a device of compute capability `found` runs code for `target`: `sm_90` runs on 9.0 and later, `sm_90a` on
/// 9.0 only.
fn runs(target: &str, found: (i32, i32)) -> bool {
    let Some(number) = target.strip_prefix("sm_") else { return false };
    let (number, exact) = number.strip_suffix('a').map_or((number, false), |n| (n, true));
    let needed = number.parse::<i32>().map(|n| (n / 10, n % 10));
    needed.is_ok_and(|needed| if exact { found == needed } else { found >= needed })
}

/// A queue of work.
#[derive(Debug)]
pub(super) struct Stream(sys::CUstream);

// SAFETY: a handle of a context that every thread may use.
unsafe impl Send for Stream {}

impl Stream {
    /// A new queue, which waits for no other.
    pub fn new() -> Result<Self, CudaError> {
        let mut stream = ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        driver!("making a stream", cuStreamCreate(&mut stream, flags))?;
        Ok(Self(stream))
    }

    /// The driver's handle.
    pub fn raw(&self) -> sys::CUstream {
        self.0
    }

    /// Waits until all of its work is done; errors of kernels appear here.
    pub fn wait(&self, doing: impl FnOnce() -> String) -> Result<(), CudaError> {
        // SAFETY: the stream lives.
        check(unsafe { sys::cuStreamSynchronize(self.0) }, "cuStreamSynchronize", doing)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = driver!("ending a stream", cuStreamDestroy_v2(self.0));
    }
}

/// A point in a stream.
#[derive(Debug)]
pub(super) struct Event(sys::CUevent);

// SAFETY: a handle of a context that every thread may use.
unsafe impl Send for Event {}

impl Event {
    /// A point that knows when it was reached if `timed`.
    pub fn new(timed: bool) -> Result<Self, CudaError> {
        use sys::CUevent_flags::{CU_EVENT_DEFAULT, CU_EVENT_DISABLE_TIMING};
        let mut event = ptr::null_mut();
        let flags = if timed { CU_EVENT_DEFAULT } else { CU_EVENT_DISABLE_TIMING };
        driver!("making an event", cuEventCreate(&mut event, flags as u32))?;
        Ok(Self(event))
    }

    /// Puts the point behind what the stream holds now.
    pub fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        driver!("recording an event", cuEventRecord(self.0, stream.raw()))
    }

    /// Waits until the stream has come to the point.
    pub fn wait(&self) -> Result<(), CudaError> {
        driver!("waiting for the step before", cuEventSynchronize(self.0))
    }

    /// Seconds from this point to a later one; both have been reached.
    pub fn seconds_until(&self, later: &Self) -> Result<f64, CudaError> {
        let mut milliseconds = 0.0;
        driver!("reading the time between events", cuEventElapsedTime_v2(&mut milliseconds, self.0, later.0))?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _ = driver!("ending an event", cuEventDestroy_v2(self.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_of_one_architecture_run_on_it_alone() {
        let check = |target, found, expected| assert_eq!(runs(target, found), expected, "{target} on {found:?}");
        check("sm_90a", (9, 0), true);
        check("sm_90a", (10, 0), false);
        check("sm_90", (10, 0), true);
        check("sm_90a", (8, 9), false);
        check("sm_100a", (10, 0), true);
        check("x86-64", (9, 0), false);
    }
}
