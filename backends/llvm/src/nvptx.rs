//! What LLVM must be told about NVIDIA GPUs: the triple, and the version of the PTX ISA.
//!
//! Sources: LLVM's "User Guide for NVPTX Back-end"; the PTX ISA manual.

use nextc_ir::target::Gpu;

/// The system that PTX is made for.
pub const TRIPLE: &str = "nvptx64-nvidia-cuda";

/// LLVM's feature string. Without a version LLVM takes the oldest that knows the GPU, which lacks instructions that kernels use.
pub fn features(gpu: &Gpu) -> String {
    gpu.features.iter().map(|f| format!("+{f}")).collect::<Vec<_>>().join(",")
}
