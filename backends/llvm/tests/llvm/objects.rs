//! What an object exports and needs, and the texts that people read.

use std::collections::BTreeSet;

use nextc_ir::Target;
use nextc_ir::graph::Placement;
use nextc_ir::kernel::{Kernel, KernelBuilder};
use nextc_ir::schedule::{Arg, KernelModule, Launch, Program};
use nextc_ir::target::CPUS;
use object::{Object, ObjectSection, ObjectSymbol};

use super::{minimum, module, native};

/// Loops that LLVM likes to turn into calls of `memset` and `memcpy`, ops that a lesser CPU calls libm for, and a tail.
fn tempting() -> Kernel {
    let mut k = KernelBuilder::new("tempting", &[("x", false), ("y", true)], 1.into());
    let (x, y) = (k.param(0), k.param(1));
    let scratch = k.alloc(nextc_ir::DType::F32, 4096);
    k.for_range(4096, 1, |k, i| {
        let value = k.load_f32(x, i);
        k.store(scratch, i, value);
    });
    k.for_range(4096, 1, |k, i| {
        let zero = k.const_f32(0.0);
        k.store(y, i, zero);
    });
    k.for_range(4096, 16, |k, i| {
        let (a, b) = (k.load_f32x16(scratch, i), k.load_f32x16(y, i));
        let rounded = k.fround(a);
        let root = k.fsqrt(b);
        let sum = k.fma(a, rounded, root);
        k.store(y, i, sum);
    });
    k.finish_with_tail(|k| {
        let at = k.const_i64(0);
        let first = k.load_f32x16(y, at);
        let sum = k.reduce_add(first);
        k.store(y, at, sum);
    })
}

#[test]
fn objects_need_nobody() {
    for target in [native(), minimum(), Target::named("x86-64-v4").expect("it is in the table")] {
        let objects = nextc_llvm::compile(&module(vec![tempting(), tempting()]), &target).expect("it compiles");
        for (i, bytes) in objects.iter().enumerate() {
            let file = object::File::parse(&**bytes).expect("the object is well formed");
            let undefined: Vec<_> = file
                .symbols()
                .filter(|s| s.is_undefined())
                .filter_map(|s| s.name().ok())
                .filter(|n| !n.is_empty())
                .collect();
            assert!(undefined.is_empty(), "{undefined:?}");
            let exported: BTreeSet<_> =
                file.symbols().filter(|s| s.is_global()).filter_map(|s| s.name().ok()).collect();
            let want = [format!("nextc_kernel_{i}"), format!("nextc_tail_{i}")];
            assert_eq!(exported, want.iter().map(String::as_str).collect());
            assert!(file.section_by_name(".eh_frame").is_none(), "kernels do not unwind");
            let writable = file.sections().any(|s| {
                matches!(s.kind(), object::SectionKind::Data | object::SectionKind::UninitializedData) && s.size() > 0
            });
            assert!(!writable, "an object has code and constants only");
        }
    }
}

#[test]
fn objects_are_the_same_on_every_run() {
    let kernels = module((0..6).map(|_| tempting()).collect());
    let compile = || nextc_llvm::compile(&kernels, &minimum()).expect("it compiles");
    assert!(compile() == compile());
}

#[test]
fn every_named_cpu_has_a_code_generator() {
    for cpu in CPUS {
        let target = Target::named(cpu.name).expect("it is in the table");
        let asm = nextc_llvm::asm(&module(vec![tempting()]), &target, "tempting").expect("it compiles");
        assert_eq!(asm.contains("zmm"), target.vector_bits == 512, "{}", cpu.name);
    }
}

#[test]
fn texts_are_of_the_kernel_that_is_named() {
    let kernels = module(vec![tempting()]);
    let ir = nextc_llvm::ir(&kernels, &minimum(), "tempting").expect("it emits");
    assert!(ir.contains("define void @nextc_kernel_0(") && ir.contains("@llvm.fma.v16f32"), "{ir}");
    assert!(!ir.contains(" fast ") && !ir.contains("contract"), "{ir}");
    let error = nextc_llvm::asm(&kernels, &minimum(), "missing").expect_err("there is none").to_string();
    assert_eq!(error, "no kernel is called `missing`, expected one of tempting");
}

#[test]
fn only_loads_of_weights_are_said_to_be_invariant() {
    let mut k = KernelBuilder::new("scale", &[("w", false), ("x", false), ("y", true)], 1.into());
    let (w, x, y, task) = (k.param(0), k.param(1), k.param(2), k.task());
    let bytes = k.mul_const(task, 64);
    let w = k.offset(w, bytes);
    let (a, b) = (k.load_f32x16(w, task), k.load_f32x16(x, task));
    let product = k.fmul(a, b);
    k.store(y, task, product);
    let mut kernels = module(vec![k.finish()]);
    let invariant = |kernels: &KernelModule| {
        let ir = nextc_llvm::ir(kernels, &minimum(), "scale").expect("it emits");
        ir.lines().filter(|l| l.contains("load <16 x float>") && l.contains("!invariant.load")).count()
    };
    assert_eq!(invariant(&kernels), 0, "nothing is known without a launch");

    let place = |at_bytes| Arg::Arena(Placement { unit: None, at_bytes });
    let mut launch = |w| {
        let program = Program { name: "step".to_owned(), launches: Vec::new(), outputs: Vec::new(), row_bytes: 0 };
        kernels.programs.push(program);
        let launch = Launch { kernel: 0, args: vec![w, place(0), place(0)], label: String::new() };
        kernels.programs.last_mut().expect("one was pushed").launches.push(launch);
        invariant(&kernels)
    };
    assert_eq!(launch(Arg::Weight(3)), 1, "`w` is a weight, `x` may be `y`");
    assert_eq!(launch(place(64)), 0, "in another launch `w` is no weight");
}
