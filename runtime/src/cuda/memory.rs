//! Memory of a device that grows where it lies, and memory of the host that the device copies from and to.

use std::ptr::{self, NonNull};

use cudarc::driver::sys;

use super::CudaError;
use super::driver::{Context, Stream, driver};

/// Device addresses, of which a prefix has memory. Its address never changes.
#[derive(Debug)]
pub(super) struct Growing {
    what: &'static str,
    base: sys::CUdeviceptr,
    reserved: u64,
    bytes: u64,
    granularity: u64,
    /// What is mapped, in order: address, bytes, handle.
    chunks: Vec<(sys::CUdeviceptr, u64, sys::CUmemGenericAllocationHandle)>,
}

impl Growing {
    /// Addresses for `bytes` bytes, without memory.
    pub fn reserve(context: &Context, what: &'static str, bytes: u64) -> Result<Self, CudaError> {
        use sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
        let mut granularity = 0;
        let properties = properties(context);
        driver!(
            "asking how memory is mapped",
            cuMemGetAllocationGranularity(&mut granularity, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED)
        )?;
        let granularity = (granularity as u64).max(1);
        let reserved = bytes.max(1).checked_next_multiple_of(granularity).unwrap_or(u64::MAX - granularity);
        let mut base = 0;
        driver!(
            format!("reserving {reserved} B of addresses for {what}"),
            cuMemAddressReserve(&mut base, reserved as usize, 0, 0, 0)
        )?;
        Ok(Self { what, base, reserved, bytes: 0, granularity, chunks: Vec::new() })
    }

    /// Where it lies on the device.
    pub fn address(&self) -> u64 {
        self.base
    }

    /// Gives at least the first `bytes` bytes memory; what is new is zero.
    /// # Errors
    /// [`CudaError::Memory`] if the device has not that much.
    pub fn grow(&mut self, context: &Context, stream: &Stream, bytes: u64) -> Result<(), CudaError> {
        if bytes <= self.bytes {
            return Ok(());
        }
        let least = (bytes - self.bytes).next_multiple_of(self.granularity);
        let (free, _) = context.memory()?;
        let what = self.what;
        if least > free || bytes > self.reserved {
            return Err(CudaError::Memory { device: context.name().to_owned(), what, needed: least, free });
        }
        let more =
            growth(self.bytes, bytes, self.reserved, self.granularity).min(free / self.granularity * self.granularity);
        self.map(context, more.max(least))?;
        let at = self.base + self.bytes - more.max(least);
        driver!(format!("clearing {what}"), cuMemsetD8Async(at, 0, more.max(least) as usize, stream.raw()))
    }

    /// Gives `bytes` more bytes memory.
    fn map(&mut self, context: &Context, bytes: u64) -> Result<(), CudaError> {
        let what = self.what;
        let mut handle = 0;
        let properties = properties(context);
        driver!(format!("taking {bytes} B for {what}"), cuMemCreate(&mut handle, bytes as usize, &properties, 0))?;
        let at = self.base + self.bytes;
        let mapped = driver!(format!("mapping {bytes} B of {what}"), cuMemMap(at, bytes as usize, 0, handle, 0));
        if let Err(error) = mapped {
            let _ = driver!("giving memory back", cuMemRelease(handle));
            return Err(error);
        }
        self.chunks.push((at, bytes, handle));
        self.bytes += bytes;
        let access = sys::CUmemAccessDesc {
            location: properties.location,
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        driver!(format!("opening {bytes} B of {what}"), cuMemSetAccess(at, bytes as usize, &access, 1))
    }

    /// Refuses a run of bytes that has no memory.
    pub fn check_range(&self, at: u64, bytes: u64) -> Result<u64, CudaError> {
        match at.checked_add(bytes) {
            Some(end) if end <= self.bytes => Ok(self.base + at),
            _ => Err(CudaError::Call {
                doing: format!("reaching byte {at} and {bytes} B on, of {} B of {}", self.bytes, self.what),
                call: "copy",
                error: "no memory there".to_owned(),
            }),
        }
    }
}

impl Drop for Growing {
    fn drop(&mut self) {
        // after an error of a kernel all calls fail; the driver frees everything when the process ends
        for &(at, bytes, handle) in &self.chunks {
            let _ = driver!("unmapping memory", cuMemUnmap(at, bytes as usize));
            let _ = driver!("giving memory back", cuMemRelease(handle));
        }
        let _ = driver!("giving addresses back", cuMemAddressFree(self.base, self.reserved as usize));
    }
}

/// Memory of this device.
fn properties(context: &Context) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
        location: sys::CUmemLocation {
            type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
            id: context.device(),
        },
        win32HandleMetaData: ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

/// By how much memory of `have` bytes grows to have `needed` of `reserved`: a little more than it must, so that it
/// grows seldom.
fn growth(have: u64, needed: u64, reserved: u64, granularity: u64) -> u64 {
    let wanted = (needed - have).max(have / 8);
    wanted.next_multiple_of(granularity).min(reserved - have)
}

/// Memory of the host that the device reads and writes by itself.
#[derive(Debug)]
pub(super) struct Pinned {
    at: NonNull<u8>,
    bytes: usize,
}

// SAFETY: plain memory that it owns.
unsafe impl Send for Pinned {}

impl Pinned {
    /// `bytes` bytes, zero.
    pub fn new(bytes: u64) -> Result<Self, CudaError> {
        let bytes = bytes.max(1) as usize;
        let mut at = ptr::null_mut();
        driver!(format!("taking {bytes} B of pinned memory"), cuMemHostAlloc(&mut at, bytes, 0))?;
        let at = NonNull::new(at.cast::<u8>()).ok_or_else(|| CudaError::Call {
            doing: format!("taking {bytes} B of pinned memory"),
            call: "cuMemHostAlloc",
            error: "no address".to_owned(),
        })?;
        // SAFETY: the driver has just given this memory, and nobody else knows of it.
        unsafe { ptr::write_bytes(at.as_ptr(), 0, bytes) };
        Ok(Self { at, bytes })
    }

    /// Bytes it has.
    pub fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// Its bytes; the device does not write them now.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the memory lives as long as `self`, was cleared, and is written by the device only between a copy's
        // start and the wait for its end, while `self` is borrowed mutably by those who do that.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.bytes) }
    }

    /// Its bytes, to write; the device does not use them now.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = driver!("giving pinned memory back", cuMemFreeHost(self.at.as_ptr().cast()));
    }
}

/// Lets the stream copy `bytes` to the device; they must stay until the stream has come to it.
pub(super) fn copy_in(what: &str, to: u64, bytes: &[u8], stream: &Stream) -> Result<(), CudaError> {
    driver!(
        format!("copying {} B of {what} to the GPU", bytes.len()),
        cuMemcpyHtoDAsync_v2(to, bytes.as_ptr().cast(), bytes.len(), stream.raw())
    )
}

/// Lets the stream copy from the device to `bytes`, which have its contents when the stream has come to it.
pub(super) fn copy_out(what: &str, bytes: &mut [u8], from: u64, stream: &Stream) -> Result<(), CudaError> {
    driver!(
        format!("copying {} B of {what} from the GPU", bytes.len()),
        cuMemcpyDtoHAsync_v2(bytes.as_mut_ptr().cast(), from, bytes.len(), stream.raw())
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_grows_by_whole_pages_within_what_is_reserved() {
        let page = 2 << 20;
        let check = |have: u64, needed, reserved, expected| assert_eq!(growth(have, needed, reserved, page), expected);
        check(0, 1, 1 << 30, 2 << 20);
        check(8 << 20, (8 << 20) + 1, 1 << 30, 2 << 20);
        check(800 << 20, (800 << 20) + 1, 1 << 30, 100 << 20);
        check(1020 << 20, (1020 << 20) + 1, 1 << 30, 4 << 20);
        check(0, 33 << 20, 1 << 30, 34 << 20);
    }
}
