//! What LLVM must be told about x86-64: the triple, the CPU, its features, and how wide its vectors shall be.

use inkwell::attributes::{Attribute, AttributeLoc};
use inkwell::context::Context;
use inkwell::values::FunctionValue;
use nextc_ir::Target;
use nextc_ir::target::MINIMUM;

/// The system that objects are made for.
pub const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// The CPU whose features LLVM takes for granted. What the target has beyond it is in [`features`].
pub const BASELINE: &str = MINIMUM;

/// LLVM's feature string: exactly what the executable checks when it starts.
pub fn features(target: &Target) -> String {
    target.required_features().iter().map(|f| format!("+{f}")).collect::<Vec<_>>().join(",")
}

/// The CPU whose latencies the scheduler assumes.
fn tune(target: &Target) -> &str {
    match target.cpu.as_str() {
        "native" if target.vector_bits == 512 => "x86-64-v4",
        "native" => MINIMUM,
        name => name,
    }
}

/// Marks a function: it does not unwind, calls no library, and uses whole vector registers. LLVM on its own would split 512-bit
/// vectors on the CPUs that clock down for them; kernels wait for memory, so the wider load is worth more.
pub fn mark(context: &Context, function: FunctionValue<'_>, target: &Target) {
    let nounwind = Attribute::get_named_enum_kind_id("nounwind");
    function.add_attribute(AttributeLoc::Function, context.create_enum_attribute(nounwind, 0));
    let bits = target.vector_bits.to_string();
    for (name, value) in [
        ("no-builtins", ""),
        ("prefer-vector-width", bits.as_str()),
        ("min-legal-vector-width", bits.as_str()),
        ("tune-cpu", tune(target)),
    ] {
        function.add_attribute(AttributeLoc::Function, context.create_string_attribute(name, value));
    }
}
