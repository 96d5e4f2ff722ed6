//! The interpreter on kernels whose tasks are blocks of threads.

use nextc_ir::DType;
use nextc_ir::format::{decode_bf16, decode_f16, encode_bf16, encode_f16};
use nextc_ir::kernel::eval::{Buffer, EvalError, Interpreter, KernelFault, Misdeed, Options, Place, Rival, run};
use nextc_ir::kernel::{Kernel, KernelBuilder, Pred, Val, parse};
use nextc_ir::schedule::{ArenaPlan, Arg, Extent, KernelModule, Launch, Output, Program};
use nextc_ir::shape::Sym;

/// Words of `%out`.
const WORDS: u64 = 512;

/// A kernel of `T` blocks of `threads` threads over `%x` (512 floats, `0.0, 1.0, ...`) and `%out` (512 words, unwritten).
fn blocks(threads: u32, body: &str) -> Kernel {
    let text = format!(
        "kernel @k(%x: ptr<global>, %out: mut ptr<global>) grid = T threads = {threads} {{
           %0 = const i64 0
           %1 = const i64 1
           %t = thread
           %t32 = narrow %t
           %i1 = const i32 1
           %f1 = const f32 1.0
           {body}
         }}"
    );
    parse::kernel(&text).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

fn run_kernel(kernel: &Kernel, tasks: u64) -> Result<Buffer, EvalError> {
    let x: Vec<f32> = (0..WORDS as u16).map(f32::from).collect();
    let mut buffers = [Buffer::from_f32(&x), Buffer::uninit(WORDS * 4)];
    run(kernel, [tasks, 0, 0, 0], &mut buffers, &[Place::start(0), Place::start(1)], Options::default())?;
    let [_, out] = buffers;
    Ok(out)
}

/// What `%out` holds after one block of 64 threads.
fn of_one(body: &str) -> Buffer {
    run_kernel(&blocks(64, body), 1).unwrap_or_else(|e| panic!("{e}\n{body}"))
}

/// What `tasks` blocks of 64 threads do wrong.
fn fault_of(tasks: u64, body: &str) -> KernelFault {
    match run_kernel(&blocks(64, body), tasks) {
        Err(EvalError::Fault(fault)) => fault,
        other => panic!("{other:?}\n{body}"),
    }
}

#[test]
fn every_thread_has_its_own_values() {
    let out = of_one("%a = mul %t32, %t32\n store %out[%t], %a").to_i32();
    assert!((0..64).all(|t| out[t as usize] == t * t));
    let wide = of_one(
        "%v = load f32x4 %x[%0]\n %s = to_float %t32\n %q = splat x4 %s\n %w = fadd %v, %q\n %r = reduce_add %w\n store %out[%t], %r",
    );
    assert!((0..64u8).all(|t| wide.to_f32()[usize::from(t)] == 6.0 + 4.0 * f32::from(t)));
}

#[test]
fn threads_loop_as_often_as_each_needs() {
    // the sum of 0 .. t, and two carried values that change places at each turn
    let out = of_one(
        "%sum, %a, %b = for %i = %0 to %t step %1 carry (%s = %0, %c = %0, %d = %1) {
           %n = add %s, %i
           yield %n, %d, %c
         }
         %sum32 = narrow %sum
         %a32 = narrow %a
         store %out[%t], %sum32
         %64 = const i64 64
         %u = add %t, %64
         store %out[%u], %a32",
    );
    let out = out.to_i32();
    for t in 0..64 {
        assert_eq!((out[t], out[64 + t]), ((t * t.saturating_sub(1) / 2) as i32, (t % 2) as i32), "thread {t}");
    }
}

#[test]
fn of_a_condition_each_thread_takes_its_region() {
    let out = of_one(
        "%3 = const i64 3
         %r = rem %t, %3
         %first = cmp eq %r, %0
         %v = if %first {
           %c5 = const i32 5
           yield %c5
         } else {
           %second = cmp eq %r, %1
           %w = if %second {
             %d = div %t, %r
             %d32 = narrow %d
             yield %d32
           } else {
             yield %i1
           }
           yield %w
         }
         if %first {
         } else {
           store %out[%t], %v
         }",
    );
    for t in 0..64 {
        assert_eq!(out.is_written(t), t % 3 != 0);
        assert_eq!(out.to_i32()[t], [0, t as i32, 1][t % 3]);
    }
}

#[test]
fn a_thread_that_is_not_there_cannot_fail() {
    of_one(
        "%there = cmp gt %t, %0
         if %there {
           %q = div %1, %t
           %64 = const i64 64
           %s = sub %64, %t
           %sh = shl %1, %s
           %v = load f32 %x[%t]
         }",
    );
    let fault = fault_of(1, "%q = div %1, %t");
    assert_eq!((fault.what, fault.thread), (Misdeed::Division, Some(0)));
    assert_eq!(
        fault.to_string(),
        "kernel @k, task 0, thread 0: `%6 = div %1, %2`: a division by zero or an overflowing one"
    );
    let fault = fault_of(1, "%20 = const i64 20\n %late = cmp gt %t, %20\n if %late {\n %y = load f32 %out[%t]\n }");
    assert_eq!((fault.what, fault.thread), (Misdeed::Unwritten { at: 84 }, Some(21)));
}

#[test]
fn shuffles_cross_lanes_of_a_warp() {
    let out = of_one(
        "%a = shuffle_xor %t32 5\n %f = to_float %t32\n %b = shuffle_xor %f 16\n %c = to_int %b\n %d = mul %a, %a\n %e = add %d, %c\n store %out[%t], %e",
    );
    assert!((0..64).all(|t| out.to_i32()[t as usize] == (t ^ 5) * (t ^ 5) + (t ^ 16)));
}

/// Sums 256 floats of each block: by shuffles in a warp, through shared memory between warps.
fn reduction() -> Kernel {
    let mut k = KernelBuilder::new("reduce", &[("x", false), ("out", true)], Extent::Sym(Sym::T));
    k.threads(256);
    let shared = k.shared(DType::F32, 8);
    let t = k.thread();
    let first = k.mul_const(k.task(), 256);
    let at = k.add(first, t);
    let mut sum = k.load_f32(k.param(0), at);
    for mask in [16, 8, 4, 2, 1] {
        let other = k.shuffle_xor(sum, mask);
        sum = k.fadd(sum, other);
    }
    let (warp, lane) = (k.div_const(t, 32), k.rem_const(t, 32));
    let zero = k.const_i64(0);
    let leads = k.cmp(Pred::Eq, lane, zero);
    k.if_then(leads, |k| k.store(shared, warp, sum));
    k.barrier();
    let leads = k.cmp(Pred::Eq, t, zero);
    k.if_then(leads, |k| {
        let eight = k.const_i64(8);
        let start = k.const_f32(0.0);
        let total = k.for_carry((zero, eight, 1), &[start], |k, i, sum| {
            let x = k.load_f32(shared, i);
            vec![k.fadd(sum[0], x)]
        });
        k.store(k.param(1), k.task(), total[0]);
    });
    k.finish()
}

#[test]
fn a_block_sums_by_shuffles_and_shared_memory() {
    let out = run_kernel(&reduction(), 2).expect("it is sound").to_f32();
    assert_eq!(out[..2], [32640.0, 98176.0]);
}

#[test]
fn races_between_threads_are_found() {
    let shared = "%s = shared i32 64\n";
    let next = "%62 = const i64 62\n %one = xor %t, %1\n";
    let race = |body: &str| match fault_of(1, &format!("{shared}{next}{body}")).what {
        Misdeed::Race { at, other } => (at, other),
        other => panic!("{other:?}\n{body}"),
    };
    // another thread's word, before and after it is written
    assert_eq!(race("store %s[%t], %t32\n %v = load i32 %s[%one]"), (4, Rival::Thread(1)));
    let read_first = "store %s[%t], %t32\n barrier\n %v = load i32 %s[%one]\n store %s[%t], %v";
    assert_eq!(race(read_first), (0, Rival::Thread(1)));
    // the same number by all
    assert_eq!(race("store %s[%0], %i1"), (0, Rival::Thread(0)));
    // many readers
    let many = "%first = cmp eq %t, %0\n if %first {\n store %s[%0], %i1\n }\n barrier\n %v = load i32 %s[%0]\n store %s[%0], %v";
    assert_eq!(race(many), (0, Rival::Several));
    // global memory
    assert_eq!(race("store %out[%t], %t32\n %v = load i32 %out[%one]"), (4, Rival::Thread(1)));
    assert_eq!(race("store %out[%0], %i1"), (0, Rival::Thread(0)));
    // an atomic addition beside plain accesses
    assert_eq!(
        race("%first = cmp eq %t, %0\n if %first {\n store %out[%0], %i1\n }\n %v = atomic_add %out[%0], %i1"),
        (0, Rival::Thread(0))
    );
    let beside =
        "%first = cmp eq %t, %0\n if %first {\n store %out[%0], %i1\n }\n barrier\n %v = atomic_add %out[%0], %i1\n";
    assert_eq!(race(&format!("{beside}%w = load i32 %out[%0]")), (0, Rival::Several));
}

#[test]
fn barriers_order_what_threads_do() {
    let out = of_one(
        "%s = shared i32 64
         %other = const i64 63
         %there = sub %other, %t
         store %s[%t], %t32
         %own = load i32 %s[%t]
         barrier
         %v = load i32 %s[%there]
         barrier
         store %s[%t], %v
         barrier
         %w = load i32 %s[%there]
         %y = add %v, %w
         store %out[%t], %y
         barrier
         %n = load i32 %out[%there]
         barrier
         store %out[%t], %n",
    );
    assert!(out.to_i32()[..64].iter().all(|&x| x == 63));
}

#[test]
fn races_between_blocks_are_found() {
    assert!(matches!(
        fault_of(2, "%f = cmp eq %t, %0\n if %f {\n store %out[%0], %i1\n }").what,
        Misdeed::Race { at: 0, other: Rival::Task(_) }
    ));
    // a barrier orders the threads of one block only
    let read = "%64 = const i64 64\n %at = mul %task, %64\n %u = add %at, %t\n store %out[%u], %t32\n barrier\n %v = load i32 %out[%t]";
    assert!(matches!(fault_of(2, read).what, Misdeed::Race { other: Rival::Task(_), .. }));
    let apart =
        "%64 = const i64 64\n %at = mul %task, %64\n %u = add %at, %t\n store %out[%u], %t32\n %v = load i32 %out[%u]";
    run_kernel(&blocks(64, apart), 8).expect("each has its own words");
}

#[test]
fn atomic_additions_count() {
    // words 1.. hold what each addition found; a block first makes sure that the counter is there
    let text = "kernel @k(%count: mut ptr<global>, %out: mut ptr<global>) grid = T threads = 32 {
       %0 = const i64 0
       %1 = const i32 1
       %n = atomic_add %count[%0], %1
       %at = widen %n
       store %out[%at], %1
     }";
    let kernel = parse::kernel(text).expect("it is well formed");
    let mut buffers = [Buffer::from_i32(&[0]), Buffer::uninit(8 * 32 * 4)];
    run(&kernel, [8, 0, 0, 0], &mut buffers, &[Place::start(0), Place::start(1)], Options::default())
        .expect("it is sound");
    assert_eq!(buffers[0].to_i32(), [256]);
    assert!((0..256).all(|i| buffers[1].is_written(i)));
    let error = run(
        &kernel,
        [1, 0, 0, 0],
        &mut [Buffer::uninit(4), Buffer::uninit(128)],
        &[Place::start(0), Place::start(1)],
        Options::default(),
    );
    assert!(matches!(error, Err(EvalError::Fault(f)) if f.what == Misdeed::Unwritten { at: 0 }));
}

#[test]
fn what_all_do_together_needs_all() {
    let in_if =
        |threads: u32, what: &str| format!("%n = const i64 {threads}\n %c = cmp lt %t, %n\n if %c {{\n {what}\n }}");
    let fault = |threads, what: &str| fault_of(1, &in_if(threads, what)).what;
    let block = |here| Misdeed::Diverged { group: "block", here, of: 64 };
    for op in ["barrier", "wait", "release"] {
        assert_eq!(fault(48, op), block(48), "{op}");
        assert_eq!(fault(32, op), block(32), "{op}");
    }
    let mma = "%z = splat x4 %f1\n %m = mma bf16 %i1, %i1, %i1, %i1, %i1, %i1, %z";
    for op in ["%s = shuffle_xor %t32 1", mma] {
        assert_eq!(fault(48, op), Misdeed::Diverged { group: "warp", here: 16, of: 32 }, "{op}");
        // whole warps may be elsewhere
        of_one(&in_if(32, op));
    }
    // a loop that ends earlier for some
    let last = fault_of(1, "for %i = %0 to %t step %1 {\n barrier\n }");
    assert_eq!((last.what, last.thread), (block(63), None));
    assert_eq!(last.to_string(), "kernel @k, task 0: `barrier`: 63 threads of the block are here, expected all 64");
    of_one("%48 = const i64 48\n for %i = %0 to %48 step %1 {\n barrier\n }");
}

#[test]
fn vectors_are_aligned_in_blocks() {
    assert_eq!(fault_of(1, "%v = load f32x4 %x[%1]").what, Misdeed::Misaligned { at: 4, bytes: 16 });
    assert_eq!(fault_of(1, "%2 = const i64 2\n %v = load f32x4 %x[%2]").what, Misdeed::Misaligned { at: 8, bytes: 16 });
    assert_eq!(
        fault_of(1, "%v = load i64 %x[%0]\n %4 = const i64 4\n %p = offset %x, %4\n %w = load i64 %p[%0]").what,
        Misdeed::Misaligned { at: 4, bytes: 8 }
    );
    assert_eq!(
        fault_of(1, "%s = shared f32 64\n %v = splat x2 %f1\n store %s[%1], %v").what,
        Misdeed::Misaligned { at: 4, bytes: 8 }
    );
    of_one(
        "%4 = const i64 4\n %2 = const i64 2\n %v = load f32x8 %x[%4]\n %w = load f32x2 %x[%2]\n %u = load f32x16 %x[%4]",
    );
}

#[test]
fn shared_memory_begins_unwritten_in_every_block() {
    assert_eq!(fault_of(1, "%s = shared f32 4\n %v = load f32 %s[%1]").what, Misdeed::Unwritten { at: 4 });
    let first_only =
        "%s = shared i32 64\n %first = cmp eq %task, %0\n if %first {\n store %s[%t], %t32\n }\n %v = load i32 %s[%t]";
    assert_eq!(fault_of(2, first_only).what, Misdeed::Unwritten { at: 0 });
    assert_eq!(
        fault_of(1, "%s = shared f32 4\n %4 = const i64 4\n store %s[%4], %f1").what,
        Misdeed::OutOfBounds { at: 16, bytes: 4, len: 16 }
    );
}

#[test]
fn prefetches_stay_inside() {
    let prefetch =
        |at: i64, bytes: i64| format!("%at = const i64 {at}\n %n = const i64 {bytes}\n prefetch %x[%at], %n");
    of_one(&prefetch(16, 2032));
    assert_eq!(fault_of(1, &prefetch(32, 2032)).what, Misdeed::OutOfBounds { at: 32, bytes: 2032, len: 2048 });
    assert_eq!(fault_of(1, &prefetch(-16, 16)).what, Misdeed::OutOfBounds { at: -16, bytes: 16, len: 2048 });
    assert_eq!(fault_of(1, &prefetch(8, 16)).what, Misdeed::Misaligned { at: 8, bytes: 16 });
    assert_eq!(fault_of(1, &prefetch(0, 24)).what, Misdeed::Misaligned { at: 24, bytes: 16 });
}

#[test]
fn before_its_wait_a_kernel_reads_weights_only() {
    of_one("%v = load f32 %x[%t]\n prefetch %x[%0], %0\n wait\n store %out[%t], %v\n release");
    assert_eq!(fault_of(1, "store %out[%t], %t32\n wait").what, Misdeed::BeforeWait);
    assert_eq!(fault_of(1, "%v = atomic_add %out[%0], %i1\n wait").what, Misdeed::BeforeWait);
    let never = fault_of(1, "%never = cmp lt %1, %0\n if %never {\n wait\n }");
    assert_eq!((never.what, never.statement.as_str()), (Misdeed::NoWait, "wait"));
    // shared memory is the block's own
    of_one("%s = shared i32 64\n store %s[%t], %t32\n wait");
}

#[test]
fn a_tail_is_blocks_too() {
    // each task of the tail gets 32 words of the body's 64 and turns them around, through shared memory
    let text = |sync: &str| {
        format!(
            "kernel @k(%x: ptr<global>, %out: mut ptr<global>) grid = T threads = 32 {{
               %p = partials i32 32
               %t = thread
               %32 = const i64 32
               %at = mul %task, %32
               %i = add %at, %t
               %v = narrow %i
               store %p[%i], %v
             }} tail grid = T {{
               %p = partials i32 32
               %s = shared i32 32
               %t = thread
               %31 = const i64 31
               %32 = const i64 32
               %at = mul %task, %32
               %i = add %at, %t
               %v = load i32 %p[%i]
               store %s[%t], %v
               {sync}
               %u = sub %31, %t
               %w = load i32 %s[%u]
               store %out[%i], %w
             }}"
        )
    };
    let kernel = parse::kernel(&text("barrier")).expect("it is well formed");
    let out = run_kernel(&kernel, 2).expect("it is sound").to_i32();
    assert!((0..64).all(|i| out[i] == (i / 32 * 32 + 31 - i % 32) as i32));
    let kernel = parse::kernel(&text("")).expect("it is well formed");
    let Err(EvalError::Fault(fault)) = run_kernel(&kernel, 1) else { panic!("there is no barrier") };
    assert_eq!(fault.what, Misdeed::Race { at: 124, other: Rival::Thread(31) });
    // what the tasks of the body hand over is each task's own until the tail
    let stolen = text("barrier").replacen("store %p[%i], %v", "store %p[%t], %v", 1);
    let kernel = parse::kernel(&stolen).expect("it is well formed");
    let Err(EvalError::Fault(fault)) = run_kernel(&kernel, 2) else { panic!("both write the same words") };
    assert!(matches!(fault.what, Misdeed::Race { other: Rival::Task(_), .. }));
}

#[test]
fn halves_are_packed_and_multiplied() {
    let out = of_one(
        "%f = to_float %t32
         %h = pack f16 %f, %f1
         %b = pack bf16 %f, %f1
         %two = add %i1, %i1
         %r = half_fma f16 %h, %h, %h
         %s = half_fma bf16 %b, %b, %b
         %back = half_to_float %r
         %8 = const i64 8
         %at = mul %t, %8
         store %out[%at], %back
         %a1 = add %at, %1
         store %out[%a1], %r
         %a2 = add %a1, %1
         store %out[%a2], %s
         %a3 = add %a2, %1
         %fp8 = fp8_to_f16 %t32
         store %out[%a3], %fp8",
    );
    for t in 0..64u8 {
        let (floats, words) = (out.to_f32(), out.to_i32());
        let (at, x) = (usize::from(t) * 8, f32::from(t));
        let want = x * x + x;
        let halves = |word: i32| (word as u16, (word >> 16) as u16);
        assert_eq!(halves(words[at + 1]), (encode_f16(want), encode_f16(2.0)));
        assert_eq!(floats[at], decode_f16(encode_f16(want)));
        let b = decode_bf16(encode_bf16(x));
        assert_eq!(halves(words[at + 2]), (encode_bf16(b * b + b), encode_bf16(2.0)));
        let e4m3 = nextc_ir::format::decode_e4m3(t);
        assert_eq!(halves(words[at + 3]), (encode_f16(e4m3), 0));
    }
}

/// `out = A·B` of 32 x 48 by 48 x 16 by one block of two warps: warp `w` has rows `16 w` on. A lies by rows, B by columns, both as 16-bit
/// pairs along what is summed, as `mma` takes them.
fn matmul(dtype: DType) -> Kernel {
    const INNER: u64 = 48;
    let mut k = KernelBuilder::new("matmul", &[("a", false), ("b", false), ("out", true)], Extent::from(1));
    k.threads(64);
    let t = k.thread();
    let (warp, lane) = (k.div_const(t, 32), k.rem_const(t, 32));
    let (group, pair) = (k.div_const(lane, 4), k.rem_const(lane, 4));
    let first = k.mul_const(warp, 16);
    let row = k.add(first, group);
    let (lo, hi) = (k.const_i64(0), k.const_i64(INNER as i64 / 2));
    for tile in 0..2 {
        let column = k.add_const(group, 8 * tile);
        let zero = k.const_f32(0.0);
        let start = k.splat(zero, 4);
        let sums = k.for_carry((lo, hi, 8), &[start], |k, j, sum| {
            let word = |k: &mut KernelBuilder, from: usize, row: Val, row_offset: u64, offset: u64| {
                let row = k.add_const(row, row_offset);
                let at = k.mul_const(row, INNER / 2);
                let at = k.add(at, j);
                let at = k.add(at, pair);
                let at = k.add_const(at, offset);
                let ptr = k.param(from);
                k.load(DType::I32, 1, ptr, at)
            };
            let a = [(0, 0), (8, 0), (0, 4), (8, 4)].map(|(r, o)| word(k, 0, row, r, o));
            let b = [0, 4].map(|o| word(k, 1, column, 0, o));
            vec![k.mma(dtype, a, b, sum[0])]
        });
        for i in 0..4 {
            let row = k.add_const(row, u64::from(i / 2) * 8);
            let at = k.mul_const(row, 16);
            let two = k.mul_const(pair, 2);
            let at = k.add(at, two);
            let at = k.add_const(at, 8 * tile + u64::from(i % 2));
            let x = k.extract(sums[0], i);
            k.store(k.param(2), at, x);
        }
    }
    k.finish()
}

/// The products of 64 rows with 16 tokens by four warps, 32 columns: A lies by rows, B by tokens, as pairs in the order of operands; B comes to shared memory by copies.
/// `by_group` says whether the group of warps multiplies, or each warp by itself.
fn group_product(dtype: DType, by_group: bool) -> Kernel {
    const WORDS: u64 = 16;
    let mut k = KernelBuilder::new("group", &[("a", false), ("b", false), ("out", true)], Extent::from(1));
    k.threads(128);
    let shared = k.shared(DType::I32, Kernel::SWIZZLED_BYTES / 4);
    let t = k.thread();
    let (warp, lane) = (k.div_const(t, 32), k.rem_const(t, 32));
    let (group, pair) = (k.div_const(lane, 4), k.rem_const(lane, 4));
    // a token has a line of 32 words, of which the second half is used here, and lies in the second kilobyte
    let (token, piece) = (k.div_const(t, 8), k.rem_const(t, 8));
    let (line, eight) = (k.mul_const(token, 32), k.rem_const(token, 8));
    let place = k.xor(piece, eight);
    let to = k.mul_const(place, 4);
    let to = k.add(to, line);
    let to = k.add_const(to, 256);
    let from = k.mul_const(token, WORDS);
    let own = k.mul_const(piece, 4);
    let from = k.add(from, own);
    let (half, b) = (k.index(4), k.param(1));
    let is_upper = k.cmp(Pred::Ge, piece, half);
    k.if_then(is_upper, |k| {
        let back = k.index(WORDS);
        let from = k.sub(from, back);
        k.copy_async((shared, to), (b, from));
    });
    k.copy_commit();
    k.copy_wait(0);
    k.barrier();
    let row = k.mul_const(warp, 16);
    let row = k.add(row, group);
    let word = |k: &mut KernelBuilder, from: usize, row: Val, (row_offset, offset): (u64, u64)| {
        let row = k.add_const(row, row_offset);
        let at = k.mul_const(row, WORDS);
        let at = k.add(at, pair);
        let at = k.add_const(at, offset);
        let ptr = k.param(from);
        k.load(DType::I32, 1, ptr, at)
    };
    let a: Vec<[Val; 4]> =
        [0, 8].map(|step| [(0, 0), (8, 0), (0, 4), (8, 4)].map(|(r, o)| word(&mut k, 0, row, (r, o + step)))).to_vec();
    let sums: Vec<Val> = if by_group {
        let index = k.index(256 + 16);
        let sums = k.mma_group(dtype, &a, (shared, index), 2);
        (0..8).map(|i| k.extract(sums, i)).collect()
    } else {
        let mut sums = Vec::new();
        for first in [0, 8] {
            let zero = k.const_f32(0.0);
            let mut sum = k.splat(zero, 4);
            for (a, step) in a.iter().zip([0, 8]) {
                let b = [0, 4].map(|o| word(&mut k, 1, group, (first, o + step)));
                sum = k.mma(dtype, *a, b, sum);
            }
            sums.extend((0..4).map(|i| k.extract(sum, i)));
        }
        sums
    };
    let out = k.param(2);
    for (i, sum) in (0..).zip(sums) {
        let at = k.mul_const(t, 8);
        let at = k.add_const(at, i);
        k.store(out, at, sum);
    }
    k.finish()
}

#[test]
fn a_group_of_warps_multiplies_as_its_warps_do() {
    let numbers = |n: usize, m: usize| (0..n).map(|i| ((i * m + 3) % 23) as f32 / 4.0 - 2.5).collect::<Vec<f32>>();
    for (dtype, encode) in [(DType::F16, encode_f16 as fn(f32) -> u16), (DType::BF16, encode_bf16)] {
        let words = |x: &[f32]| {
            let pair = |p: &[f32]| (u32::from(encode(p[0])) | u32::from(encode(p[1])) << 16).cast_signed();
            Buffer::from_i32(&x.chunks(2).map(pair).collect::<Vec<_>>())
        };
        let found = [true, false].map(|by_group| {
            let mut buffers = [words(&numbers(64 * 32, 7)), words(&numbers(16 * 32, 11)), Buffer::uninit(128 * 8 * 4)];
            let places = [0, 1, 2].map(Place::start);
            let ran = run(&group_product(dtype, by_group), [0; 4], &mut buffers, &places, Options::default());
            ran.unwrap_or_else(|e| panic!("{dtype}, {by_group}: {e}"));
            buffers[2].to_f32()
        });
        assert_eq!(found[0], found[1], "{dtype}");
        assert!(found[0].iter().any(|&x| x != 0.0));
    }
}

/// What 128 threads do wrong.
fn fault_of_four_warps(body: &str) -> Misdeed {
    match run_kernel(&blocks(128, body), 1) {
        Err(EvalError::Fault(fault)) => fault.what,
        other => panic!("{other:?}\n{body}"),
    }
}

#[test]
fn lines_of_a_product_lie_where_it_reads_them() {
    let product = |elems: u64, at: i64| {
        format!(
            "%s = shared i32 {elems}\n %at = const i64 {at}\n %m = mma_group f16 2 1 %s, %at, %i1, %i1, %i1, %i1, %i1, %i1, %i1, %i1"
        )
    };
    let misaligned = |at| Misdeed::Misaligned { at, bytes: Kernel::SWIZZLED_ALIGN };
    // a small array need not begin at 1024 bytes
    assert_eq!(fault_of_four_warps(&product(4096, 0)), misaligned(0));
    assert_eq!(fault_of_four_warps(&product(8192, 4)), misaligned(16));
    // not the first line of eight, and two steps of which the second is beyond the line
    assert_eq!(fault_of_four_warps(&product(8192, 32)), misaligned(128));
    assert_eq!(fault_of_four_warps(&product(8192, 24)), misaligned(96));
    assert_eq!(fault_of_four_warps(&product(8192, 256)), Misdeed::Unwritten { at: 1024 });
    let some = format!(
        "%64 = const i64 64\n %here = cmp lt %t, %64\n if %here {{\n {} \n }}",
        product(8192, 0).replacen("%s = shared i32 8192\n", "", 1)
    );
    let some = format!("%s = shared i32 8192\n {some}");
    assert_eq!(fault_of_four_warps(&some), Misdeed::Diverged { group: "group of four warps", here: 64, of: 128 });
}

#[test]
fn copies_arrive_when_they_are_waited_for() {
    let copies =
        "%s = shared f32 512\n %4 = const i64 4\n %at = mul %t, %4\n copy_async %s[%at], %x[%at]\n copy_commit\n";
    let rest = "%v = load f32 %s[%at]\n store %out[%t], %v";
    let out = of_one(&format!("{copies} copy_wait 0\n {rest}")).to_f32();
    assert!((0..64u8).all(|t| out[usize::from(t)] == 4.0 * f32::from(t)));
    // not yet: a group is left, or nobody has waited
    for wait in ["copy_wait 1\n", ""] {
        let out = of_one(&format!("{copies} {wait} {rest}")).to_f32();
        assert!((0..64).all(|t| out[t].is_nan()), "{wait}");
    }
    // the younger group may be left
    let two = "%256 = const i64 256\n %b = add %at, %256\n copy_async %s[%b], %x[%b]\n copy_commit\n copy_wait 1\n";
    let out = of_one(&format!("{copies} {two} {rest}")).to_f32();
    assert!((0..64u8).all(|t| out[usize::from(t)] == 4.0 * f32::from(t)));
    let out = of_one(&format!("{copies} {two} %w = load f32 %s[%b]\n store %out[%t], %w")).to_f32();
    assert!((0..64).all(|t| out[t].is_nan()));
}

#[test]
fn nobody_else_touches_what_is_copied_before_the_next_barrier() {
    let copies = "%s = shared f32 512\n %4 = const i64 4\n %at = mul %t, %4\n copy_async %s[%at], %x[%at]\n copy_commit\n copy_wait 0\n";
    let other =
        "%63 = const i64 63\n %o = sub %63, %t\n %from = mul %o, %4\n %v = load f32 %s[%from]\n store %out[%t], %v";
    assert!(matches!(fault_of(1, &format!("{copies} {other}")).what, Misdeed::Race { .. }));
    let out = of_one(&format!("{copies} barrier\n {other}")).to_f32();
    assert!((0..64u8).all(|t| out[usize::from(t)] == 4.0 * f32::from(63 - t)));
    assert_eq!(
        fault_of(1, "%s = shared f32 512\n copy_async %s[%1], %x[%0]").what,
        Misdeed::Misaligned { at: 4, bytes: 16 }
    );
    let block = Misdeed::Diverged { group: "block", here: 1, of: 64 };
    for op in ["copy_commit", "copy_wait 0"] {
        let one = format!("%first = cmp eq %t, %0\n if %first {{\n {op}\n }}");
        assert_eq!(fault_of(1, &one).what, block, "{op}");
    }
}

#[test]
fn mma_multiplies_matrices() {
    let numbers = |n: usize, m: usize| (0..n).map(|i| ((i * m + 3) % 23) as f32 / 4.0 - 2.5).collect::<Vec<f32>>();
    let (a, b) = (numbers(32 * 48, 7), numbers(48 * 16, 11));
    for (dtype, encode) in [(DType::F16, encode_f16 as fn(f32) -> u16), (DType::BF16, encode_bf16)] {
        let words = |x: &[f32]| {
            let pair = |p: &[f32]| (u32::from(encode(p[0])) | u32::from(encode(p[1])) << 16).cast_signed();
            Buffer::from_i32(&x.chunks(2).map(pair).collect::<Vec<_>>())
        };
        let by_columns: Vec<f32> = (0..16 * 48).map(|i| b[i % 48 * 16 + i / 48]).collect();
        let mut buffers = [words(&a), words(&by_columns), Buffer::uninit(32 * 16 * 4)];
        run(&matmul(dtype), [0; 4], &mut buffers, &[0, 1, 2].map(Place::start), Options::default())
            .expect("it is sound");
        // multiples of 1/16 below 2^15: every sum is exact in f32
        let want = (0..32 * 16).map(|i| (0..48).map(|k| a[i / 16 * 48 + k] * b[k * 16 + i % 16]).sum::<f32>());
        assert_eq!(buffers[2].to_f32(), want.collect::<Vec<_>>(), "{dtype}");
    }
}

#[test]
fn blocks_run_in_an_order_of_the_seed_with_one_result() {
    let kernel = reduction();
    let x: Vec<f32> = (0..2048u16).map(f32::from).collect();
    let sums = |seed| {
        let mut buffers = [Buffer::from_f32(&x), Buffer::uninit(32)];
        let options = Options { seed, ..Options::default() };
        run(&kernel, [8, 0, 0, 0], &mut buffers, &[Place::start(0), Place::start(1)], options).expect("it is sound");
        buffers[1].to_f32()
    };
    assert_eq!(sums(1), sums(2));
    assert_eq!(sums(1)[7], (1792..2048u16).map(f32::from).sum::<f32>());
}

/// A program of two launches: one writes the arena, the next reads weights, waits, and adds both.
fn program(before_wait: &str) -> KernelModule {
    let kernel = |name: &str, params: &str, body: &str| {
        let text = format!("kernel @{name}({params}) grid = 1 threads = 32 {{\n %t = thread\n {body}\n}}");
        parse::kernel(&text).unwrap_or_else(|e| panic!("{e}\n{text}"))
    };
    let fill = kernel(
        "fill",
        "%out: mut ptr<global>",
        "wait\n release\n %a = narrow %t\n %b = to_float %a\n store %out[%t], %b",
    );
    let body = format!(
        "%v = load f32 %w[%t]\n {before_wait}\n wait\n %x = load f32 %in[%t]\n %y = fadd %x, %v\n store %out[%t], %y"
    );
    let add = kernel("add", "%w: ptr<global>, %in: ptr<global>, %out: mut ptr<global>", &body);
    let at = |at_bytes| nextc_ir::graph::Placement { unit: None, at_bytes };
    let launch = |kernel, args: &[Arg]| Launch { kernel, args: args.to_vec(), label: "test".to_owned() };
    let decl = nextc_ir::graph::WeightDecl {
        shape: vec![32],
        in_rank: 1,
        format: nextc_ir::Format::F32,
        origin: nextc_ir::graph::Origin::Values(Vec::new()),
    };
    KernelModule {
        info: Default::default(),
        kernels: vec![fill, add],
        programs: vec![Program {
            name: "step".to_owned(),
            launches: vec![
                launch(0, &[Arg::Arena(at(0))]),
                launch(1, &[Arg::Weight(0), Arg::Arena(at(0)), Arg::Arena(at(128))]),
            ],
            outputs: vec![Output { name: "y".to_owned(), at: at(128), rows: Sym::T, width: 32, stride: 32 }],
            row_bytes: 0,
        }],
        weights: vec![nextc_ir::schedule::PackedWeight { name: "w".to_owned(), decl, layout: nextc_ir::Layout::Flat }],
        states: Vec::new(),
        arena: ArenaPlan { fixed_bytes: 256, unit_bytes: [0; 4] },
        page_tokens: 4,
    }
}

#[test]
fn a_program_of_blocks_runs() {
    let run = |before_wait: &str| {
        let module = program(before_wait);
        let interpreter = Interpreter::new(&module, Options::default()).expect("the module is sound");
        interpreter.run_program("step", [1, 0, 0, 0], &[], &[Buffer::from_f32(&[0.5; 32])], &mut [])
    };
    let out = run("").expect("it runs");
    assert!((0..32u8).all(|t| out[0].values[usize::from(t)] == f32::from(t) + 0.5));
    // the same parameter may be read before the wait where it is a weight, and not where it is the arena
    let error = run("%early = load f32 %in[%t]").expect_err("the launch before may still write it").to_string();
    assert_eq!(
        error,
        "kernel @add, task 0, thread 0: `%2 = load f32 %in[%0]`: memory that launches before this one may still write is touched before the `wait`"
    );
}

#[test]
fn a_state_may_be_read_before_the_wait_until_a_launch_of_the_program_writes_it() {
    let text = "kernel @next(%state: mut ptr<global>) grid = 1 threads = 32 {
        %t = thread
        %before = load f32 %state[%t]
        release
        wait
        %one = const f32 1.0
        %after = fadd %before, %one
        store %state[%t], %after
    }";
    let launch = || Launch { kernel: 0, args: vec![Arg::State(0)], label: "test".to_owned() };
    let run = |launches: Vec<Launch>| {
        let ty = nextc_ir::types::StateType {
            kind: nextc_ir::types::StateKind::Kv,
            dims: vec![1, 16],
            stored: nextc_ir::Stored::F32,
        };
        let module = KernelModule {
            kernels: vec![parse::kernel(text).unwrap_or_else(|e| panic!("{e}"))],
            programs: vec![Program { name: "step".to_owned(), launches, outputs: Vec::new(), row_bytes: 0 }],
            weights: Vec::new(),
            states: vec![nextc_ir::schedule::StateDecl { name: "state".to_owned(), ty }],
            ..program("")
        };
        let mut states = [Buffer::from_f32(&[0.5; 32])];
        let interpreter = Interpreter::new(&module, Options::default()).expect("the module is sound");
        interpreter.run_program("step", [1, 0, 0, 0], &[], &[], &mut states).map(|_| states[0].to_f32())
    };
    assert_eq!(run(vec![launch()]).expect("it runs"), [1.5; 32]);
    let error = run(vec![launch(), launch()]).expect_err("the launch before may still write it").to_string();
    assert!(error.ends_with("touched before the `wait`"), "{error}");
}

#[test]
fn what_launches_before_the_last_one_wrote_may_be_read_before_the_wait_if_that_one_waited_first() {
    let kernel = |text: String| parse::kernel(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let run = |between: &str, read: u64| {
        let mut module = program("");
        // writes bytes 128 to 256
        module.kernels.push(kernel(format!(
            "kernel @between(%in: ptr<global>, %out: mut ptr<global>) grid = 1 threads = 32 {{\n %t = thread\n {between}\n %x = load f32 %in[%t]\n store %out[%t], %x\n}}"
        )));
        module.kernels.push(kernel(
            "kernel @last(%in: ptr<global>, %out: mut ptr<global>) grid = 1 threads = 32 {
                %t = thread
                %early = load f32 %in[%t]
                release
                wait
                store %out[%t], %early
            }"
            .to_owned(),
        ));
        let at = |at_bytes| Arg::Arena(nextc_ir::graph::Placement { unit: None, at_bytes });
        let launch = |kernel, args: &[Arg]| Launch { kernel, args: args.to_vec(), label: "test".to_owned() };
        let program = &mut module.programs[0];
        program.launches = vec![launch(0, &[at(0)]), launch(2, &[at(0), at(128)]), launch(3, &[at(read), at(256)])];
        program.outputs[0].at.at_bytes = 256;
        module.arena.fixed_bytes = 384;
        let interpreter = Interpreter::new(&module, Options::default()).expect("the module is sound");
        let weights = [Buffer::from_f32(&[0.5; 32])];
        interpreter.run_program("step", [1, 0, 0, 0], &[], &weights, &mut []).map(|out| out[0].values[7])
    };
    assert_eq!(run("wait\n release", 0).expect("it runs"), 7.0);
    let error = run("wait\n release", 128).expect_err("the launch before writes it").to_string();
    assert!(error.ends_with("touched before the `wait`"), "{error}");
    let error = run("release\n wait", 0).expect_err("the first launch may still run").to_string();
    assert!(error.ends_with("touched before the `wait`"), "{error}");
    let branches = "%c = const i64 8\n %low = cmp lt %t, %c\n";
    let either = |first: &str| format!("{branches} if %low {{\n {first}\n }} else {{\n wait\n release\n }}");
    // a block is in one branch, so all of its threads would have to be: here that is a fault of its own
    assert!(run(&either("wait\n release"), 0).is_err());
}

#[test]
fn a_kernel_waits_first_if_no_path_lets_the_next_begin_before() {
    let waits_first = |body: &str| {
        let text =
            format!("kernel @k() grid = 2 threads = 32 {{\n %one = const i64 1\n %c = cmp lt %task, %one\n {body}\n}}");
        let kernel = parse::kernel(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        (kernel.body.waits(), kernel.body.waits_first())
    };
    let branches = |then: &str, otherwise: &str| format!("if %c {{\n {then}\n }} else {{\n {otherwise}\n }}");
    assert_eq!(waits_first("wait\n release"), (true, true));
    assert_eq!(waits_first("release\n wait"), (true, false));
    assert_eq!(waits_first("release"), (false, false));
    assert_eq!(waits_first(""), (false, true));
    assert_eq!(waits_first(&branches("wait\n release", "wait\n release")), (true, true));
    assert_eq!(waits_first(&branches("wait\n release", "release\n wait")), (true, false));
    assert_eq!(waits_first(&format!("{}\n release", branches("wait", "wait"))), (true, true));
    assert_eq!(waits_first(&format!("{}\n release", branches("wait", ""))), (true, false));
}
