//! What kernels become for a GPU: NVIDIA's assembler takes it, and the instructions are those that were meant.

use nextc_ir::Target;
use nextc_ir::kernel::op::Sig;
use nextc_ir::kernel::{KOp, Kernel, parse};

use crate::{module, ptxas};

/// The PTX of a kernel, which must assemble, without spills.
fn ptx(kernel: Kernel) -> String {
    let target = Target::gpu(ptxas::GPU).expect("a GPU that is known");
    let name = kernel.name.clone();
    let texts = nextc_llvm::compile(&module(vec![kernel]), &target).unwrap_or_else(|e| panic!("{name}: {e}"));
    let text = String::from_utf8(texts[0].clone()).expect("PTX is text");
    let entries = ptxas::assemble(&text).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert!(entries.iter().all(|e| e.spilled_bytes == 0), "{name}: {entries:?}");
    text
}

/// A kernel of blocks of 64 threads with these statements.
fn block(body: &str) -> Kernel {
    let text = format!(
        "kernel @k(%x: ptr<global>, %out: mut ptr<global>) grid = T threads = 64 {{
           %0 = const i64 0
           %t = thread
           %w = load i32 %x[%t]
           %f = load f32 %x[%t]
           {body}
         }}"
    );
    parse::kernel(&text).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

/// Each op of a block: statements that use it, and what has to be in the PTX.
const OPS: [(&str, &str, &str); 21] = [
    (
        "partials",
        "%p = partials f32 64\n %64 = const i64 64\n %a = mul %task, %64\n %i = add %a, %t\n store %p[%i], %f",
        "nextc_kernel_0_param_6",
    ),
    ("thread", "store %out[%t], %t", "%tid.x"),
    (
        "shared",
        "%s = shared i32 64\n store %s[%t], %w\n barrier\n %v = load i32 %s[%0]\n store %out[%t], %v",
        "st.shared.b32",
    ),
    ("barrier", "barrier\n store %out[%t], %w", "bar"),
    ("quad", "%4 = const i64 4\n %i = mul %t, %4\n %q = quad %w, %w, %w, %w\n store %out[%i], %q", "st.global.v4"),
    (
        "shuffle_xor",
        "%v = shuffle_xor %w 5\n %g = shuffle_xor %f 16\n %i = to_int %g\n %y = add %v, %i\n store %out[%t], %y",
        "shfl.sync.bfly.b32",
    ),
    ("warp_max", "%v = warp_max %w\n store %out[%t], %v", "redux.sync.max.s32"),
    ("warp_min", "%v = warp_min %w\n store %out[%t], %v", "redux.sync.min.s32"),
    ("atomic_add", "%v = atomic_add %out[%0], %w\n store %out[%t], %v", "atom.acq_rel.gpu.global.add.u32"),
    (
        "pack",
        "%v = pack f16 %f, %f\n %u = pack bf16 %f, %f\n %y = add %u, %v\n store %out[%t], %y",
        "cvt.rn.satfinite.f16x2.f32",
    ),
    ("half_fma", "%v = half_fma f16 %w, %w, %w\n %u = half_fma bf16 %v, %w, %w\n store %out[%t], %u", "fma.rn.bf16x2"),
    ("half_to_float", "%v = half_to_float %w\n store %out[%t], %v", "cvt.f32.f16"),
    ("fp8_to_f16", "%v = fp8_to_f16 %w\n store %out[%t], %v", "cvt.rn.f16x2.e4m3x2"),
    (
        "mma",
        "%c = splat x4 %f\n %m = mma bf16 %w, %w, %w, %w, %w, %w, %c\n %n = mma f16 %w, %w, %w, %w, %w, %w, %m\n %r = reduce_add %n\n store %out[%t], %r",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    ),
    (
        "mma_group",
        "%s = shared i32 8192\n store %s[%t], %w\n barrier\n %m = mma_group f16 1 1 %s, %0, %w, %w, %w, %w\n %e = extract %m[3]\n store %out[%t], %e",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16",
    ),
    (
        "copy_async",
        "%s = shared i32 256\n %4 = const i64 4\n %i = mul %t, %4\n copy_async %s[%i], %x[%i]\n copy_commit\n copy_wait 0\n %v = load i32 %s[%i]\n store %out[%t], %v",
        "cp.async.cg.shared.global",
    ),
    ("copy_commit", "copy_commit\n store %out[%t], %w", "cp.async.commit_group"),
    ("copy_wait", "copy_commit\n copy_wait 1\n store %out[%t], %w", "cp.async.wait_group"),
    ("prefetch", "%16 = const i64 16\n prefetch %x[%0], %16", "cp.async.bulk.prefetch.L2.global"),
    ("wait", "wait\n store %out[%t], %w", "griddepcontrol.wait"),
    ("release", "wait\n release\n store %out[%t], %w", "griddepcontrol.launch_dependents"),
];

#[test]
fn every_op_of_a_block_assembles() {
    let of_blocks = |(name, sig, _): &&(&str, Sig, _)| *sig == Sig::Block || *name == "partials";
    let blocks = KOp::TABLE.iter().filter(of_blocks).map(|(name, _, _)| *name);
    assert!(blocks.eq(OPS.map(|(name, _, _)| name)), "each op once, in the table's order");
    for (name, body, wanted) in OPS {
        let text = ptx(block(body));
        assert!(text.contains(wanted), "{name}: `{wanted}` is not in\n{text}");
    }
}

#[test]
fn products_by_groups_of_warps_see_what_was_stored_before_a_barrier() {
    let fence = "fence.proxy.async.shared::cta";
    let stored = "%s = shared i32 8192\n store %s[%t], %w\n barrier\n";
    let product = "%m = mma_group f16 1 1 %s, %0, %w, %w, %w, %w\n %e = extract %m[0]\n store %out[%t], %e";
    assert!(ptx(block(&format!("{stored} {product}"))).contains(fence));
    // others need no fence
    assert!(!ptx(block(&format!("{stored} %v = load i32 %s[%0]\n store %out[%t], %v"))).contains(fence));
}

#[test]
fn vectors_move_16_bytes_at_once() {
    let text = ptx(block(
        "%4 = const i64 4\n %i = mul %t, %4\n %v = load f32x4 %x[%i]\n %s = shared f32 256\n store %s[%i], %v\n barrier\n %u = load i32x4 %s[%i]\n store %out[%i], %u",
    ));
    for wanted in ["ld.global.v4", "st.shared.v4", "ld.shared.v4", "st.global.v4"] {
        assert!(text.contains(wanted), "`{wanted}` is not in\n{text}");
    }
}

#[test]
fn threads_shared_memory_and_tail_are_in_the_entries() {
    let text = "kernel @k(%out: mut ptr<global>) grid = T threads = 128 {
           %t = thread
           store %out[%t], %t
         } tail {
           %s = shared i64 128
           %t = thread
           %v = load i64 %out[%t]
           store %s[%t], %v
           barrier
           %0 = const i64 0
           %u = load i64 %s[%0]
           store %out[%t], %u
         }";
    let text = ptx(parse::kernel(text).expect("it is well formed"));
    for wanted in [".entry nextc_kernel_0", ".entry nextc_tail_0", ".maxntid 128", ".extern .shared .align 1024"] {
        assert!(text.contains(wanted), "`{wanted}` is not in\n{text}");
    }
}

#[test]
fn kernels_of_single_threads_assemble() {
    let text = "kernel @k(%x: ptr<global>, %out: mut ptr<global>) grid = T {
           %s = alloc f32 16
           %0 = const i64 0
           %1 = const i64 1
           %v = load f32x16 %x[%0]
           store %s[%0], %v
           %sum = for %i = %0 to %T step %1 carry (%a = %v) {
             %b = load f32x16 %s[%0]
             %c = fma %a, %b, %b
             yield %c
           }
           %r = reduce_max %sum
           store %out[%task], %r
         } tail {
           %0 = const i64 0
           %v = load f32 %out[%0]
           %w = fadd %v, %v
           store %out[%0], %w
         }";
    ptx(parse::kernel(text).expect("it is well formed"));
}
