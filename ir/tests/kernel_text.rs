//! Text, verifier and interpreter of the kernel IR, on kernels given as text.

use nextc_ir::kernel::eval::{Buffer, EvalError, Interpreter, Misdeed, Options, Place, run};
use nextc_ir::kernel::op::Sig;
use nextc_ir::kernel::{KOp, Kernel, KernelBuilder, Region, Val, parse, print, verify};
use nextc_ir::schedule::{ArenaPlan, Arg, Extent, Input, KernelModule, Launch, Output, Program};
use nextc_ir::shape::Sym;
use proptest::prelude::*;

/// Every op, in the form that the printer gives.
const EVERY_OP: &str = "\
/// one of each
/// and a tail
kernel @every.op(%x: ptr<global>, %out: mut ptr<global>) grid = (ceil(T / 8) * min((B + 1), 12)) {
  %0 = const i64 0
  %1 = const i32 -7
  %2 = const f32 1.5e-7
  %3 = const f32 0x7f800000
  %4 = const bool true
  %5 = alloc f32 64
  %6 = splat x16 %2
  %7 = load f32x16 %x[%0]
  %8 = extract %7[3]
  %9 = add %0, %task
  %10 = sub %9, %T
  %11 = mul %10, %B
  %12 = const i64 3
  %13 = div %11, %12
  %14 = rem %13, %12
  %15 = and %14, %P
  %16 = or %15, %R
  %17 = xor %16, %12
  %18 = shl %17, %12
  %19 = ushr %18, %12
  %20 = sshr %19, %12
  %21 = fadd %7, %6
  %22 = fsub %21, %7
  %23 = fmul %22, %7
  %24 = fdiv %23, %7
  %25 = fmin %24, %7
  %26 = fmax %25, %7
  %27 = fma %26, %7, %6
  %28 = fneg %27
  %29 = fabs %28
  %30 = fsqrt %29
  %31 = fround %30
  %32 = cmp lt %31, %7
  %33 = select %32, %31, %7
  %34 = select %4, %31, %33
  %35 = bitcast i32 %34
  %36 = to_float %35
  %37 = to_int %36
  %38 = widen %1
  %39 = narrow %38
  %40 = reduce_add %36
  %41 = reduce_max %36
  %42 = offset %out, %12
  store %5[%0], %36
  %43, %44 = for %45 = %0 to %12 step %12 carry (%46 = %36, %47 = %40) {
    %48 = fadd %46, %7
    yield %48, %47
  }
  for %49 = %0 to %12 step %12 {
    store %42[%49], %40
  }
  %50 = if %4 {
    yield %43
  } else {
    %51 = fneg %43
    yield %51
  }
  if %4 {
    store %out[%0], %50
  }
} tail grid = (T + R) {
  %52 = const i64 1
  store %out[%52], %T
  %53 = load f32x16 %x[%52]
  %54 = bf16_row %53, %53
  %55 = bf16_pairs %53, %53
  %56 = nibble %55 12
  %57 = byte_row %54, %54, %55, %55
  %58 = byte_dot %57, %54, %55
  %59 = short_dot %58, %54, %55
  %60 = pair_dot %53, %54, %55
  prefetch %x[%52], %52
  tile_turn %out, %x
  tile_zero
  tile_step 2 1 %x, %x, %x
  tile_store 2 1 %out
  tile_load 2 1 %out
  tile_step 1 2 once %x, %x, %x
  %61 = partials i32 16
  %62 = load i32 %61[%task]
  %63 = team
  store %out[%63], %62
}
";

/// Every op of a block of threads.
const EVERY_BLOCK_OP: &str = "\
kernel @every.block.op(%x: ptr<global>, %out: mut ptr<global>) grid = T threads = 128 together = 2 {
  %0 = shared f32 8192
  %1 = partials f32 64
  %2 = thread
  %3 = const i64 0
  prefetch %x[%3], %3
  wait
  %4 = load f32 %x[%2]
  store %0[%2], %4
  store %1[%2], %4
  barrier
  %5 = shuffle_xor %4 16
  %6 = pack f16 %4, %5
  %7 = pack bf16 %4, %5
  %8 = half_fma f16 %6, %6, %6
  %9 = half_fma bf16 %7, %7, %7
  %10 = half_to_float %8
  %11 = fp8_to_f16 %9
  %12 = splat x4 %10
  %13 = mma f16 %6, %6, %8, %8, %11, %11, %12
  %14 = mma bf16 %7, %7, %9, %9, %7, %7, %13
  %15 = atomic_add %out[%3], %11
  %16 = quad %4, %5, %10, %4
  %17 = warp_max %15
  %18 = warp_min %17
  copy_async %0[%3], %x[%3]
  copy_commit
  copy_wait 0
  %19 = mma_group f16 1 2 %0, %3, %6, %6, %8, %8
  release
} tail grid = ceil(T / 2) {
  %20 = partials f32 64
  %21 = load f32 %20[%task]
}
";

fn parsed(text: &str) -> Kernel {
    parse::kernel(text).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

/// A kernel with these statements and one task, over `%x` (read) and `%out` (written).
fn with_body(body: &str) -> String {
    format!("kernel @k(%x: ptr<global>, %out: mut ptr<global>) grid = 1 {{\n  %0 = const i64 0\n{body}\n}}\n")
}

#[test]
fn every_op_prints_as_it_was_read() {
    for text in [EVERY_OP, EVERY_BLOCK_OP] {
        let kernel = parsed(text);
        assert_eq!(print::kernel(&kernel), text);
        assert_eq!(verify::verify_kernel(&kernel), Ok(()));
    }
    for (name, sig, _) in KOp::TABLE {
        let text = if *sig == Sig::Block { EVERY_BLOCK_OP } else { EVERY_OP };
        assert!(text.split_whitespace().any(|word| word == *name), "`{name}` is not in the text");
    }
}

#[test]
fn a_built_kernel_is_read_back_as_it_was() {
    let mut k =
        KernelBuilder::new("built", &[("x", false), ("out", true)], Extent::Sym(Sym::T).ceil_div(4) * Extent::from(3));
    k.doc("sigmoid(x)\nand more");
    let zero = k.const_i64(0);
    k.for_each((zero, k.dim(Sym::T), 16), |k, i| {
        let x = k.load_f32x16(k.param(0), i);
        let (s, c) = k.sin_cos(x);
        let y = k.softplus(s);
        let sum = k.reduce_add(c);
        let index = k.load_index(k.param(0), zero);
        let positive = k.cmp(nextc_ir::kernel::Pred::Gt, index, zero);
        let z = k.if_else(positive, |k| vec![k.silu(y), sum], |k| vec![k.log(y), k.fneg(sum)]);
        k.store(k.param(1), i, z[0]);
    });
    let kernel = k.finish_with_tail(|k| {
        let zero = k.const_i64(0);
        k.store(k.param(1), zero, k.dim(Sym::T));
    });
    assert_eq!(parsed(&print::kernel(&kernel)), kernel);
}

#[test]
fn what_cannot_be_read_is_named_with_its_line() {
    for (text, message) in [
        ("", "line 1: found `the end`, expected kernel"),
        ("kernel @k() grid = 1 {\n", "line 1: found `the end`, expected an op"),
        ("kernel @k() grid = ceil(T / 0) { }", "line 1: found `0`, expected a positive number"),
        ("kernel @k() grid = 1 { } }", "line 1: found `}`, expected the end of the text"),
        ("kernel @k(%T: ptr<global>) grid = 1 { }", "line 1: `%T` is already defined"),
        (&with_body("  %1 = fadd %0, %0"), "line 3: fadd: operand 0 is i64, expected f32"),
        (&with_body("  %1 = add %0"), "line 3: add: 1 operands, expected 2"),
        (&with_body("  %1 = add %0, %9"), "line 3: `%9` is not defined"),
        (&with_body("  %0 = add %0, %0"), "line 3: `%0` is already defined"),
        (&with_body("  add %0, %0"), "line 3: add: 0 results, expected 1"),
        (&with_body("  %1 = splat x3 %0"), "line 3: splat: lanes is 3, expected 2, 4, 8 or 16"),
        (&with_body("  %1 = load bf16x16 %x[%0]"), "line 3: load: operand 0 is bf16, expected f32, i32 or i64"),
        (
            &with_body("  %1 = const i32 2147483648"),
            "line 3: const: bits is 2147483648, expected of the constant's type",
        ),
        (&with_body("  %1 = frob %0"), "line 3: found `frob`, expected an op"),
        (&with_body("  %1 = const f32 inf"), "line 3: found `inf`, expected an f32, or its bits in hex"),
        (&with_body("  §"), "line 3: found `§`, expected a name, a number or one of `(){}[],=:<>*/+`"),
        (&with_body(&"if %0 {\n".repeat(70)), "line 66: nested more than 64 deep"),
    ] {
        let error = parse::kernel(text).expect_err(text).to_string();
        assert_eq!(error, message, "{text}");
    }
}

proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0usize..12, ".{0,3}|[%@0-9a-z]{1,3}|for|if|yield|[{}()\\[\\]]"), 1..8),
    ) {
        let mut text: Vec<char> = EVERY_OP.chars().collect();
        for (at, remove, insert) in edits {
            let at = at.index(text.len());
            let end = (at + remove).min(text.len());
            text.splice(at..end, insert.chars());
        }
        if let Ok(kernel) = parse::kernel(&String::from_iter(text)) {
            let once = print::kernel(&kernel);
            prop_assert_eq!(&print::kernel(&parsed(&once)), &once);
            let _ = verify::verify_kernel(&kernel);
        }
    }

    #[test]
    fn no_broken_kernel_makes_the_verifier_panic(edits in prop::collection::vec((0usize..200, 0usize..4, 0u32..70), 1..6)) {
        let mut kernel = parsed(EVERY_OP);
        for (i, what, v) in edits {
            break_it(&mut kernel.body, i, what, v);
        }
        let _ = verify::verify_kernel(&kernel);
        let _ = print::kernel(&kernel);
    }
}

/// Changes an operand, a result, a region or a yield of one statement.
fn break_it(region: &mut Region, i: usize, what: usize, v: u32) {
    let n = region.stmts.len();
    let stmt = &mut region.stmts[i % n];
    match what {
        0 if !stmt.args.is_empty() => {
            let n = stmt.args.len();
            stmt.args[i % n] = Val(v);
        }
        1 => stmt.results.push(Val(v)),
        2 => {
            stmt.regions.pop();
        }
        _ => match stmt.regions.first_mut() {
            Some(inner) => inner.yields.push(Val(v)),
            None => stmt.args.truncate(1),
        },
    }
}

fn invalid(kernel: &Kernel, message: &str) {
    let errors = verify::verify_kernel(kernel).expect_err(message);
    assert!(errors.iter().any(|e| e.to_string().contains(message)), "{errors:?} lacks `{message}`");
}

#[test]
fn broken_invariants_are_found() {
    for (body, message) in [
        ("  store %x[%0], %0", "stores through parameter `x`, which is not marked `mut`"),
        ("  %1 = offset %x, %0\n  store %1[%0], %0", "stores through parameter `x`"),
        (
            "  %1 = for %2 = %0 to %0 step %0 carry (%3 = %out) {\n    store %3[%0], %0\n    yield %x\n  }",
            "stores through parameter `x`",
        ),
        ("  if %c {\n    %1 = alloc f32 4\n  }", "scratch is allocated inside a region"),
        ("  %1 = if %c {\n    yield %0\n  } else {\n  }", "0 yield, expected 1"),
        ("  %1 = if %c {\n    yield %0\n  } else {\n    yield %x\n  }", "is ptr<global>, expected i64"),
        ("  %1 = for %2 = %0 to %0 step %0 carry (%3 = %0) {\n    yield %c\n  }", "is bool, expected i64"),
    ] {
        invalid(&parsed(&with_body(&format!("  %c = const bool true\n{body}"))), message);
    }
    let mut out_of_scope = parsed(&with_body("  %c = const bool true\n  if %c {\n    %1 = const i64 5\n  }"));
    let inner = out_of_scope.body.stmts[2].regions[0].stmts[0].results[0];
    let mut store = parsed(&with_body("  store %out[%0], %0")).body.stmts[1].clone();
    store.args[2] = inner;
    out_of_scope.body.stmts.push(store);
    invalid(&out_of_scope, "is used where it is not defined");
    let mut twice = parsed(&with_body(""));
    let first = twice.body.stmts[0].clone();
    twice.body.stmts.push(first);
    invalid(&twice, "is defined twice");
    let mut bad_name = parsed(&with_body(""));
    bad_name.params[0].name = "R".to_owned();
    invalid(&bad_name, "name `R` is taken");
}

/// Runs one kernel over `x` (8 floats) and `out` (64 bytes, unwritten).
fn run_text(text: &str) -> Result<Buffer, EvalError> {
    let x: Vec<f32> = (0..8u8).map(f32::from).collect();
    let mut buffers = [Buffer::from_f32(&x), Buffer::uninit(64)];
    run(&parsed(text), [4, 1, 1, 1], &mut buffers, &[Place::start(0), Place::start(1)], Options::default())?;
    let [_, out] = buffers;
    Ok(out)
}

#[test]
fn misdeeds_are_faults_that_name_the_statement() {
    let ones = "  %1 = const i64 1\n  %m = const i64 -1\n";
    for (body, what) in [
        ("  %2 = load f32x16 %x[%0]", Misdeed::OutOfBounds { at: 0, bytes: 64, len: 32 }),
        ("  %2 = load f32 %x[%m]", Misdeed::OutOfBounds { at: -4, bytes: 4, len: 32 }),
        ("  %2 = load f32x4 %out[%0]", Misdeed::Unwritten { at: 0 }),
        ("  store %out[%1], %0\n  %2 = load i32x4 %out[%0]", Misdeed::Unwritten { at: 0 }),
        ("  %s = alloc f32 4\n  %2 = load f32 %s[%1]", Misdeed::Unwritten { at: 4 }),
        ("  %s = alloc i64 1\n  store %s[%1], %0", Misdeed::OutOfBounds { at: 8, bytes: 8, len: 8 }),
        ("  %p = offset %x, %1\n  %2 = load f32 %p[%0]", Misdeed::Misaligned { at: 1, bytes: 4 }),
        ("  %2 = div %1, %0", Misdeed::Division),
        ("  %2 = rem %1, %0", Misdeed::Division),
        ("  %2 = shl %1, %m", Misdeed::Shift),
        ("  for %i = %0 to %1 step %0 {\n  }", Misdeed::Step(0)),
        ("  %2 = const f32 1e10\n  %3 = to_int %2", Misdeed::ToInt(1e10)),
    ] {
        match run_text(&with_body(&format!("{ones}{body}"))) {
            Err(EvalError::Fault(fault)) => {
                assert_eq!((fault.what, fault.task), (what, Some(0)), "{body}");
                assert!(!fault.statement.is_empty());
            }
            other => panic!("{body}: {other:?}"),
        }
    }
    let error = run_text(&with_body("  %1 = load f32 %out[%0]")).expect_err("unwritten").to_string();
    assert_eq!(error, "kernel @k, task 0: `%1 = load f32 %out[%0]`: byte 0 is read before it is written");
}

#[test]
fn tasks_that_touch_one_word_conflict_unless_both_read() {
    let grid = |body: &str| {
        let head =
            "kernel @k(%x: ptr<global>, %out: mut ptr<global>) grid = T {\n  %0 = const i64 0\n  %1 = const i64 1\n";
        run_text(&format!("{head}{body}\n}}\n"))
    };
    let conflict = |body| match grid(body) {
        Err(EvalError::Fault(f)) => matches!(f.what, Misdeed::Race { .. }),
        _ => false,
    };
    assert!(conflict("  store %out[%0], %task"));
    // every task reads the word that task 1 writes
    assert!(conflict("  %2 = narrow %task\n  %3 = mul %task, %1\n  store %out[%3], %2\n  %4 = load i32 %out[%1]"));
    assert!(!conflict("  store %out[%task], %task\n  %2 = load i64 %out[%task]\n  %3 = load f32 %x[%0]"));
}

#[test]
fn scratch_is_fresh_for_each_task_and_the_tail_comes_last() {
    let text = "kernel @k(%x: ptr<global>, %out: mut ptr<global>) grid = T {
      %s = alloc i64 2
      %0 = const i64 0
      store %s[%0], %task
      %v = load i64 %s[%0]
      store %out[%task], %v
    } tail {
      %0 = const i64 0
      %1 = const i64 1
      %sum = for %i = %0 to %T step %1 carry (%a = %0) {
        %v = load i64 %out[%i]
        %b = add %a, %v
        yield %b
      }
      store %out[%T], %sum
    }";
    let out = run_text(text).expect("the kernel is sound");
    assert_eq!(out.to_i32()[..10], [0, 0, 1, 0, 2, 0, 3, 0, 6, 0]);
    let stale = "kernel @k(%x: ptr<global>, %out: mut ptr<global>) grid = T {
      %s = alloc i64 1
      %0 = const i64 0
      %c = cmp eq %task, %0
      if %c {
        store %s[%0], %0
      }
      %v = load i64 %s[%0]
    }";
    assert!(run_text(stale).is_err());
}

#[test]
fn tasks_of_a_tail_read_what_those_of_the_body_found() {
    let text = |to: &str| {
        format!(
            "kernel @k(%x: ptr<global>, %out: mut ptr<global>) grid = T {{
               %p = partials i64 2
               %2 = const i64 2
               %at = mul %task, %2
               store %p[%at], %task
             }} tail grid = T {{
               %p = partials i64 2
               %2 = const i64 2
               %at = mul %task, %2
               %v = load i64 %p[%at]
               store %out[{to}], %v
             }}"
        )
    };
    let out = run_text(&text("%task")).expect("the kernel is sound");
    assert_eq!(out.to_i32()[..8], [0, 0, 1, 0, 2, 0, 3, 0]);
    let error = run_text(&text("%2")).expect_err("all write one word");
    assert!(matches!(error, EvalError::Fault(f) if matches!(f.what, Misdeed::Race { .. })));
    // what no task wrote
    let odd =
        text("%task").replace("%v = load i64 %p[%at]", "%1 = const i64 1\n%odd = add %at, %1\n%v = load i64 %p[%odd]");
    assert!(run_text(&odd).is_err());
}

#[test]
fn loops_swap_what_they_carry() {
    let body = "  %1 = const i64 1
      %3 = const i64 3
      %a, %b = for %i = %0 to %3 step %1 carry (%c = %0, %d = %1) {
        yield %d, %c
      }
      store %out[%0], %a
      store %out[%1], %b";
    assert_eq!(run_text(&with_body(body)).expect("sound").to_i32()[..4], [1, 0, 0, 0]);
}

#[test]
fn parameters_may_share_a_buffer() {
    let kernel = parsed(&with_body("  %1 = load f32x4 %x[%0]\n  store %out[%0], %1"));
    let mut buffers = [Buffer::uninit(32)];
    let args = [Place::start(0), Place { buffer: 0, at_bytes: 16 }];
    let error = run(&kernel, [0; 4], &mut buffers, &args, Options::default()).expect_err("unwritten");
    assert!(matches!(error, EvalError::Fault(f) if f.what == Misdeed::Unwritten { at: 0 }));
    let mut buffers = [Buffer::from_f32(&[1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0])];
    run(&kernel, [0; 4], &mut buffers, &args, Options::default()).expect("sound");
    assert_eq!(buffers[0].to_f32(), [1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0]);
}

fn in_arena(unit: Option<Sym>, at_bytes: u64) -> nextc_ir::graph::Placement {
    nextc_ir::graph::Placement { unit, at_bytes }
}

/// Doubles tokens into the arena, then adds one into the rows of the output.
fn program() -> KernelModule {
    let row = |name: &str, work: &str| {
        parsed(&format!(
            "kernel @{name}(%x: ptr<global>, %out: mut ptr<global>) grid = T {{
               %16 = const i64 16
               %at = mul %task, %16
               {work}
               store %out[%at], %v
             }}"
        ))
    };
    let double = row("double", "%t = load i32 %x[%task]\n %f = to_float %t\n %s = splat x16 %f\n %v = fadd %s, %s");
    let increment =
        row("increment", "%a = load f32x16 %x[%at]\n %o = const f32 1.0\n %s = splat x16 %o\n %v = fadd %a, %s");
    let (mid, end) = (in_arena(Some(Sym::T), 0), in_arena(Some(Sym::T), 64));
    let launch = |kernel, args: [Arg; 2]| Launch { kernel, args: args.to_vec(), label: "test".to_owned() };
    KernelModule {
        info: nextc_ir::graph::ModelInfo::default(),
        kernels: vec![double, increment],
        programs: vec![Program {
            name: "step".to_owned(),
            launches: vec![
                launch(0, [Arg::Input(Input::Tokens), Arg::Arena(mid)]),
                launch(1, [Arg::Arena(mid), Arg::Arena(end)]),
            ],
            outputs: vec![Output { name: "y".to_owned(), at: end, rows: Sym::T, width: 2, stride: 16 }],
            row_bytes: 0,
        }],
        weights: Vec::new(),
        states: Vec::new(),
        arena: ArenaPlan { fixed_bytes: 64, unit_bytes: [128, 0, 0, 0] },
        page_tokens: 4,
    }
}

#[test]
fn a_program_runs_in_a_fresh_arena() {
    let module = program();
    let interpreter = Interpreter::new(&module, Options::default()).expect("the module is sound");
    let inputs = [(Input::Tokens, Buffer::from_i32(&[5, 7, 9]))];
    let outputs = interpreter.run_program("step", [3, 1, 1, 1], &inputs, &[], &mut []).expect("it runs");
    assert_eq!((outputs[0].name.as_str(), &outputs[0].values[..]), ("y", &[11.0, 11.0, 15.0, 15.0, 19.0, 19.0][..]));
    assert!(interpreter.run_program("draft", [3, 1, 1, 1], &inputs, &[], &mut []).is_err());
    assert!(interpreter.run_program("step", [3, 1, 1, 1], &[], &[], &mut []).is_err());
    let mut short = program();
    short.programs[0].launches.pop();
    let interpreter = Interpreter::new(&short, Options::default()).expect("the module is sound");
    let error = interpreter.run_program("step", [3, 1, 1, 1], &inputs, &[], &mut []).expect_err("nothing was written");
    assert!(matches!(error, EvalError::Output { row: 0, .. }));
}

#[test]
fn a_module_prints_its_schedule() {
    let text = print::module(&program());
    for line in [
        "  launch @double(x = tokens, out = arena[0 * T])  ; test",
        "  output y = arena[64 * T] as f32[T, 2], stride 16",
        "arena { 64 B + 128 B * T + 0 B * B + 0 B * P + 0 B * R }",
    ] {
        assert!(text.lines().any(|l| l == line), "`{line}` is not in\n{text}");
    }
}

#[test]
fn schedules_that_do_not_fit_are_found() {
    type Change = fn(&mut KernelModule);
    let changes: [(Change, &str); 7] = [
        (|m| m.programs[0].launches[0].kernel = 9, "kernel 9 does not exist, there are 2"),
        (|m| m.programs[0].launches[0].args.truncate(1), "1 arguments, expected 2"),
        (|m| m.programs[0].launches[0].args[0] = Arg::Weight(0), "weight 0 does not exist, there are 0"),
        (|m| m.programs[0].launches[0].args[1] = Arg::Input(Input::Slot), "parameter `out` is written, but bound to"),
        (|m| m.programs[0].launches[0].args[1] = Arg::Arena(in_arena(Some(Sym::R), 0)), "is outside the arena"),
        (|m| m.programs[0].outputs[0].stride = 32, "64 B .. 192 B per T is outside the arena, which has 128 B"),
        (|m| m.kernels[1].name = "double".to_owned(), "name `double` is taken"),
    ];
    assert_eq!(verify::verify(&program()), Ok(()));
    for (change, message) in changes {
        let mut module = program();
        change(&mut module);
        let errors = verify::verify(&module).expect_err(message);
        assert!(errors.iter().any(|e| e.to_string().contains(message)), "{errors:?} lacks `{message}`");
    }
}
