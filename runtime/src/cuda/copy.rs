//! Rows copied on the device, many at once: a copy of the driver's costs as much as a launch, and a batch has a few for each sequence.

use std::ffi::{CStr, c_void};
use std::ptr;

use cudarc::driver::sys;

use super::CudaError;
use super::driver::{Stream, check, driver};
use super::module::{Function, Module};
use crate::device::CopyRows;

/// Rows of one launch, whose table is the kernel's parameter.
const MOST_ROWS: usize = 128;
/// Threads of a row.
const THREADS: u32 = 256;
/// Rows longer than this the driver copies: with a block each they would take longer.
const LONG_BYTES: u64 = 1 << 16;

/// A block a row, 16 bytes a thread at once where the row and its places are multiples of that, else 4.
const PTX: &CStr = c"
.version 8.0
.target sm_90
.address_size 64
.visible .entry copy_rows(.param .align 8 .b8 table[3072])
.maxntid 256, 1, 1
{
    .reg .pred %end, %narrow;
    .reg .b32 %r<8>;
    .reg .b64 %from, %to, %bytes, %at, %step, %row, %x, %y;
    mov.b64 %row, table;
    mov.u32 %r0, %ctaid.x;
    mul.wide.u32 %x, %r0, 24;
    add.s64 %row, %row, %x;
    ld.param.u64 %from, [%row];
    ld.param.u64 %to, [%row+8];
    ld.param.u64 %bytes, [%row+16];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ntid.x;
    or.b64 %x, %from, %to;
    or.b64 %x, %x, %bytes;
    and.b64 %x, %x, 15;
    setp.ne.u64 %narrow, %x, 0;
    @%narrow bra NARROW;
    mul.wide.u32 %at, %r1, 16;
    mul.wide.u32 %step, %r2, 16;
WIDE_LOOP:
    setp.ge.u64 %end, %at, %bytes;
    @%end bra DONE;
    add.s64 %x, %from, %at;
    add.s64 %y, %to, %at;
    ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%x];
    st.global.v4.u32 [%y], {%r4, %r5, %r6, %r7};
    add.s64 %at, %at, %step;
    bra WIDE_LOOP;
NARROW:
    mul.wide.u32 %at, %r1, 4;
    mul.wide.u32 %step, %r2, 4;
NARROW_LOOP:
    setp.ge.u64 %end, %at, %bytes;
    @%end bra DONE;
    add.s64 %x, %from, %at;
    add.s64 %y, %to, %at;
    ld.global.u32 %r4, [%x];
    st.global.u32 [%y], %r4;
    add.s64 %at, %at, %step;
    bra NARROW_LOOP;
DONE:
    ret;
}
";

/// A row as the kernel reads it: addresses, and a multiple of 4 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Row {
    from: u64,
    to: u64,
    bytes: u64,
}

/// What copies rows.
#[derive(Debug)]
pub(super) struct Copier {
    kernel: Function,
    _module: Module,
}

impl Copier {
    /// Compiles it.
    /// # Errors
    /// [`CudaError::Compile`] if the driver cannot.
    pub fn new() -> Result<Self, CudaError> {
        let module = Module::compile(PTX, "copy_rows")?;
        Ok(Self { kernel: module.function("copy_rows", "copy_rows", 0)?, _module: module })
    }

    /// Lets the stream copy rows, whose places are addresses and do not overlap.
    /// # Errors
    /// [`CudaError::Call`] if the driver refuses.
    pub fn copy(&self, copies: &[CopyRows], stream: &Stream) -> Result<(), CudaError> {
        let mut short = Vec::new();
        for row in copies.iter().flat_map(rows_of) {
            match row.bytes > LONG_BYTES {
                true => driver!(
                    format!("copying {} B on the GPU", row.bytes),
                    cuMemcpyDtoDAsync_v2(row.to, row.from, row.bytes as usize, stream.raw())
                )?,
                false => short.push(row),
            }
        }
        short.chunks(MOST_ROWS).try_for_each(|rows| self.launch(rows, stream))
    }

    fn launch(&self, rows: &[Row], stream: &Stream) -> Result<(), CudaError> {
        let mut table = [Row::default(); MOST_ROWS];
        table[..rows.len()].copy_from_slice(rows);
        let mut args: [*mut c_void; 1] = [ptr::from_mut(&mut table).cast()];
        let config = sys::CUlaunchConfig {
            gridDimX: rows.len() as u32,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: THREADS,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 0,
            hStream: stream.raw(),
            attrs: ptr::null_mut(),
            numAttrs: 0,
        };
        // SAFETY: the kernel's one parameter is a table of so many rows, which the driver copies before it returns; its addresses lie in
        // memory of the device, as `check_range` has seen.
        let status = unsafe { sys::cuLaunchKernelEx(&config, self.kernel.0, args.as_mut_ptr(), ptr::null_mut()) };
        check(status, "cuLaunchKernelEx", || format!("copying {} rows on the GPU", rows.len()))
    }
}

/// The rows of a copy; one where they lie together.
fn rows_of(copy: &CopyRows) -> impl Iterator<Item = Row> + use<> {
    let copy = *copy;
    let together = copy.from.stride == copy.bytes && copy.to.stride == copy.bytes;
    let (count, bytes) = if together { (1, copy.bytes * copy.rows) } else { (copy.rows, copy.bytes) };
    (0..count).map(move |row| Row {
        from: copy.from.at + row * copy.from.stride,
        to: copy.to.at + row * copy.to.stride,
        bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Strided;

    #[test]
    fn rows_that_lie_together_are_one() {
        let copy = |stride| {
            let (from, to) = (Strided { at: 100, stride: 4 }, Strided { at: 500, stride });
            rows_of(&CopyRows { rows: 3, bytes: 4, from, to }).map(|r| (r.from, r.to, r.bytes)).collect::<Vec<_>>()
        };
        assert_eq!(copy(4), [(100, 500, 12)]);
        assert_eq!(copy(32), [(100, 500, 4), (104, 532, 4), (108, 564, 4)]);
        assert_eq!(size_of::<[Row; MOST_ROWS]>(), 3072, "the parameter of the kernel");
    }
}
