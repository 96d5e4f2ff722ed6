//! What is known of a kernel's parameters from the launches that bind them.

use nextc_ir::schedule::{Arg, KernelModule};

/// For each parameter of kernel `index`, whether every launch binds it to a weight: memory that nobody ever writes. Anything else may be
/// written through another parameter of the same launch, since the arena and the states are updated in place.
pub fn constant(kernels: &KernelModule, index: usize) -> Vec<bool> {
    let launches: Vec<_> =
        kernels.programs.iter().flat_map(|p| &p.launches).filter(|l| l.kernel as usize == index).collect();
    let is_weight = |i: usize| launches.iter().all(|l| matches!(l.args.get(i), Some(Arg::Weight(_))));
    let params = kernels.kernels[index].params.iter().enumerate();
    params.map(|(i, param)| !launches.is_empty() && !param.written && is_weight(i)).collect()
}
