//! Every op and every math function, in 1, 2 and 4 lanes, against the kernel interpreter, bit for bit.

mod loader;

use loader::{Loaded, module};
use nextc_ir::DType::{self, F32, I32, I64};
use nextc_ir::kernel::eval::{Buffer, Options, Place, run};
use nextc_ir::kernel::{KOp, KType, KernelBuilder, Pred, Val};

type Build = fn(&mut KernelBuilder, [Val; 3]) -> Val;

const FLOATS: [f32; 16] = [
    0.0,
    -0.0,
    1.0,
    -1.5,
    2.5,
    0.5,
    -0.5,
    f32::NAN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    1e-40,
    -1e-45,
    3.4e38,
    8_388_609.0,
    -3.7,
    1.5,
];
const INTS: [i32; 16] = [0, 1, -1, 2, 7, -7, 31, 30, i32::MAX, i32::MIN, 65_536, -65_537, 12_345, 3, 16, 100];

/// All pairs of 16 words, and a third that mixes them.
fn inputs(words: [u32; 16]) -> [Vec<u32>; 3] {
    let pairs = || (0..256_usize).map(|i| (i / 16, i % 16));
    [
        pairs().map(|(i, _)| words[i]).collect(),
        pairs().map(|(_, j)| words[j]).collect(),
        pairs().map(|(i, j)| words[(3 * i + 5 * j + 1) % 16]).collect(),
    ]
}

fn check_words(name: &str, dtype: DType, inputs: &[Vec<u32>; 3], lanes: u32, build: Build) {
    let n = inputs[0].len();
    let tasks = n as u64 / u64::from(lanes);
    let mut k = KernelBuilder::new("op", &[("x", false), ("y", false), ("z", false), ("out", true)], tasks.into());
    let at = k.mul_const(k.task(), u64::from(lanes));
    let args = [0, 1, 2].map(|i| k.load(dtype, lanes, k.param(i), at));
    let value = build(&mut k, args);
    let at = if k.ty(value).lanes() == lanes { at } else { k.task() };
    k.store(k.param(3), at, value);
    let kernel = k.finish();

    let mut buffers: Vec<Buffer> = inputs.iter().map(|words| Buffer::from_bytes(&bytes(words))).collect();
    buffers.push(Buffer::zeroed(4 * n as u64));
    let places = [0, 1, 2, 3].map(|buffer| Place { buffer, at_bytes: 0 });
    run(&kernel, [1; 4], &mut buffers, &places, Options::default()).unwrap_or_else(|e| panic!("{name}: {e}"));
    let expected = buffers[3].to_i32();

    let loaded = Loaded::new(&module(vec![kernel]));
    let mut out = vec![0; n];
    let [mut x, mut y, mut z] = inputs.clone();
    loaded.call("nextc_kernel_0", [1; 4], &mut [&mut x, &mut y, &mut z, &mut out], (0, tasks as i64));
    for (i, (found, expected)) in out.iter().zip(expected).enumerate() {
        let (f, e) = (f32::from_bits(*found), f32::from_bits(expected as u32));
        // Which of two NaNs survives is not specified.
        let same = *found == expected as u32 || (dtype == F32 && f.is_nan() && e.is_nan());
        assert!(same, "{name} in {lanes} lanes, word {i}: {found:#x} ({f}), expected {expected:#x} ({e})");
    }
}

fn floats(name: &str, build: Build) {
    let inputs = inputs(FLOATS.map(f32::to_bits));
    [1, 2, 4].into_iter().for_each(|lanes| check_words(name, F32, &inputs, lanes, build));
}

fn ints(name: &str, build: Build) {
    let inputs = inputs(INTS.map(i32::cast_unsigned));
    [1, 2, 4].into_iter().for_each(|lanes| check_words(name, I32, &inputs, lanes, build));
}

fn bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

#[test]
fn float_arithmetic() {
    floats("fadd", |k, [x, y, _]| k.fadd(x, y));
    floats("fsub", |k, [x, y, _]| k.fsub(x, y));
    floats("fmul", |k, [x, y, _]| k.fmul(x, y));
    floats("fdiv", |k, [x, y, _]| k.fdiv(x, y));
    floats("fmin", |k, [x, y, _]| k.fmin(x, y));
    floats("fmax", |k, [x, y, _]| k.fmax(x, y));
    floats("fma", |k, [x, y, z]| k.fma(x, y, z));
    floats("fneg", |k, [x, _, _]| k.fneg(x));
    floats("fabs", |k, [x, _, _]| k.fabs(x));
    floats("fsqrt", |k, [x, _, _]| k.fsqrt(x));
    floats("fround", |k, [x, _, _]| k.fround(x));
    floats("reduce_add", |k, [x, y, _]| {
        let sum = k.fmul(x, y);
        k.reduce_add(sum)
    });
    floats("reduce_max", |k, [_, y, _]| k.reduce_max(y));
    floats("bitcast", |k, [x, _, _]| k.bitcast(x, I32));
}

#[test]
fn integer_arithmetic() {
    ints("add", |k, [x, y, _]| k.add(x, y));
    ints("sub", |k, [x, y, _]| k.sub(x, y));
    ints("mul", |k, [x, y, _]| k.mul(x, y));
    ints("and", |k, [x, y, _]| k.and(x, y));
    ints("or", |k, [x, y, _]| k.or(x, y));
    ints("xor", |k, [x, y, _]| k.xor(x, y));
    ints("to_float", |k, [x, _, _]| k.to_float(x));
    for op in [KOp::Shl, KOp::Ushr, KOp::Sshr] {
        let build: [Build; 2] = match op {
            KOp::Shl => [|k, [x, y, _]| shift(k, KOp::Shl, x, Some(y)), |k, [x, _, _]| shift(k, KOp::Shl, x, None)],
            KOp::Ushr => [|k, [x, y, _]| shift(k, KOp::Ushr, x, Some(y)), |k, [x, _, _]| shift(k, KOp::Ushr, x, None)],
            _ => [|k, [x, y, _]| shift(k, KOp::Sshr, x, Some(y)), |k, [x, _, _]| shift(k, KOp::Sshr, x, None)],
        };
        build.into_iter().for_each(|b| ints(op.name(), b));
    }
    let scalar = inputs(INTS.map(i32::cast_unsigned));
    check_words("short_dot", I32, &scalar, 4, |k, [x, y, z]| k.short_dot(x, y, z));
    check_words("div", I32, &scalar, 1, |k, [x, y, _]| quotient(k, KOp::Div, x, y));
    check_words("rem", I32, &scalar, 1, |k, [x, y, _]| quotient(k, KOp::Rem, x, y));
}

/// A shift by the low bits of `amount`, or by 13 in every lane.
fn shift(k: &mut KernelBuilder, op: KOp, x: Val, amount: Option<Val>) -> Val {
    let amount = match amount {
        Some(y) => {
            let low = k.i32_like(y, 31);
            k.and(y, low)
        }
        None => k.i32_like(x, 13),
    };
    let ty = k.ty(x);
    k.emit(op, &[x, amount], ty)
}

/// A quotient by a divisor that is made positive.
fn quotient(k: &mut KernelBuilder, op: KOp, x: Val, y: Val) -> Val {
    let low = k.const_i32(0xff);
    let y = k.and(y, low);
    let one = k.const_i32(1);
    let y = k.or(y, one);
    k.emit(op, &[x, y], KType::scalar(I32))
}

#[test]
fn comparing_and_choosing() {
    const FLOAT: [Build; 6] = [
        |k, a| choose(k, Pred::Eq, a),
        |k, a| choose(k, Pred::Ne, a),
        |k, a| choose(k, Pred::Lt, a),
        |k, a| choose(k, Pred::Le, a),
        |k, a| choose(k, Pred::Gt, a),
        |k, a| choose(k, Pred::Ge, a),
    ];
    for build in FLOAT {
        floats("cmp", build);
        ints("cmp", build);
    }
    floats("one condition for all lanes", |k, [x, y, z]| {
        let (first, second) = if k.ty(x).lanes() == 1 { (x, y) } else { (k.extract(x, 1), k.extract(y, 0)) };
        let less = k.cmp(Pred::Lt, first, second);
        k.select(less, y, z)
    });
    floats("masks combine", |k, [x, y, z]| {
        let (a, b) = (k.cmp(Pred::Lt, x, y), k.cmp(Pred::Lt, y, z));
        let c = k.xor(a, b);
        k.select(c, x, z)
    });
}

fn choose(k: &mut KernelBuilder, pred: Pred, [x, y, z]: [Val; 3]) -> Val {
    let condition = k.cmp(pred, x, y);
    k.select(condition, y, z)
}

#[test]
fn converting() {
    let small =
        [0.0, -0.0, 0.99, -0.99, 1.5, -1.5, 2.5, -2.5, 1e-40, 2e9, -2_147_483_648.0, 16_777_217.0, 7.0, -7.0, 0.5, 1e6];
    let inputs = inputs(small.map(f32::to_bits));
    [1, 2, 4].into_iter().for_each(|lanes| check_words("to_int", F32, &inputs, lanes, |k, [x, _, _]| k.to_int(x)));
    let words = crate::inputs(INTS.map(i32::cast_unsigned));
    for lanes in [1, 2] {
        check_words("i64", I32, &words, lanes, |k, [x, y, z]| {
            let [x, y, z] = [x, y, z].map(|v| k.widen(v));
            let product = k.mul(x, y);
            let less = k.cmp(Pred::Lt, product, z);
            let chosen = k.select(less, product, z);
            assert_eq!(k.ty(chosen).dtype(), Some(I64));
            k.narrow(chosen)
        });
    }
    ints("splat and extract", |k, [x, y, _]| {
        let lanes = k.ty(x).lanes();
        let last = if lanes == 1 { x } else { k.extract(x, lanes - 1) };
        let all = k.splat(last, lanes);
        k.add(all, y)
    });
}

#[test]
fn math_functions() {
    let everywhere = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.3,
        -20.5,
        88.0,
        89.0,
        -87.5,
        -104.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        1e-40,
        21.0,
        -3.3,
    ];
    let positive = [1.0, 2.0, 0.5, 1e-40, 1e-45, 3.4e38, 0.707, 1.415, 10.0, 1e10, 1e-10, 0.99, 1.01, 3.0, 7.5, 1e-38];
    let angles = [0.0, -0.0, 1.0, -1.0, 3.2, 1e-40, 0.7, 0.8, 1000.5, -1000.5, 1e6, -1e6, 1.6, 6.3, 100.0, 262_144.5];
    let table: [(&str, [f32; 16], Build); 8] = [
        ("exp", everywhere, |k, [x, _, _]| k.exp(x)),
        ("sigmoid", everywhere, |k, [x, _, _]| k.sigmoid(x)),
        ("silu", everywhere, |k, [x, _, _]| k.silu(x)),
        ("softplus", everywhere, |k, [x, _, _]| k.softplus(x)),
        ("log", positive, |k, [x, _, _]| k.log(x)),
        ("rsqrt", positive, |k, [x, _, _]| k.rsqrt(x)),
        ("sin", angles, |k, [x, _, _]| k.sin_cos(x).0),
        ("cos", angles, |k, [x, _, _]| k.sin_cos(x).1),
    ];
    for (name, words, build) in table {
        let inputs = inputs(words.map(f32::to_bits));
        [1, 4].into_iter().for_each(|lanes| check_words(name, F32, &inputs, lanes, build));
    }
}
