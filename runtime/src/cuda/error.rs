//! What can go wrong with a GPU.

/// What can go wrong with a GPU.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// There is no driver.
    #[error(
        "no NVIDIA driver on this machine (`libcuda.so.1` cannot be loaded), which code for `{target}` needs; build with `--target cpu` to run without a GPU"
    )]
    NoDriver {
        /// What the code was made for.
        target: String,
    },
    /// The driver is too old.
    #[error("the NVIDIA driver supports CUDA {}.{}, expected {}.{} or newer; install a newer driver", found / 1000, found % 1000 / 10, expected / 1000, expected % 1000 / 10)]
    OldDriver {
        /// Its version: 1000 times the major number and 10 times the minor one.
        found: i32,
        /// The least that is needed.
        expected: i32,
    },
    /// There is no device, or none that `CUDA_VISIBLE_DEVICES` shows.
    #[error(
        "the NVIDIA driver shows no GPU, which code for `{target}` needs (is `CUDA_VISIBLE_DEVICES` set to hide it?)"
    )]
    NoDevice {
        /// What the code was made for.
        target: String,
    },
    /// The device cannot run the code.
    #[error("{device} has compute capability {}.{}, which cannot run code for `{target}`", found.0, found.1)]
    Capability {
        /// The device.
        device: String,
        /// Its compute capability.
        found: (i32, i32),
        /// What the code was made for.
        target: String,
    },
    /// A call of the driver failed.
    #[error("{doing}: `{call}` failed: {error}")]
    Call {
        /// What was to be done.
        doing: String,
        /// The driver's function.
        call: &'static str,
        /// The driver's words.
        error: String,
    },
    /// The driver does not compile a kernel.
    #[error("kernel `{kernel}`: the NVIDIA driver cannot compile it: {error}{}{}", if log.is_empty() { "" } else { "\n" }, log)]
    Compile {
        /// The kernel.
        kernel: String,
        /// The driver's words.
        error: String,
        /// What its compiler said.
        log: String,
    },
    /// The device has less memory free than is needed.
    #[error("{device}: {what} need {needed} B of its memory, {free} B are free")]
    Memory {
        /// The device.
        device: String,
        /// What.
        what: &'static str,
        /// How much it takes.
        needed: u64,
        /// How much there is.
        free: u64,
    },
    /// A variable of the environment has a value that it cannot have.
    #[error("`{name}` is `{found}`, expected {expected}")]
    Variable {
        /// The variable.
        name: &'static str,
        /// Its value.
        found: String,
        /// What it may be.
        expected: &'static str,
    },
}
