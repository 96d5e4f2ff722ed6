//! The matrix unit, and products of bytes: their bits are the interpreter's, for ordinary numbers and for those at the ends of the range.

use nextc_ir::kernel::{Kernel, KernelBuilder, Pred, Val};
use nextc_ir::target::{Activations, Unit};
use nextc_ir::{DType, Target};

use super::{canonical, interpret, native, run_on};

/// This machine with its matrix unit, if it has one that the kernel lets a process use.
fn machine() -> Option<Target> {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    let target = Target { activations: Activations::Bf16, ..native() };
    // SAFETY: this call only widens what the process may use.
    let allowed = || unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) } == 0;
    let there = target.unit() == Some(Unit::Tiles) && allowed();
    if !there {
        println!("skipped: no matrix unit");
    }
    there.then_some(target)
}

/// This machine with products of bytes, if it has them.
fn machine_of_bytes() -> Option<Target> {
    machine_of(Activations::Int8, Target::has_byte_dots, "bytes")
}

/// This machine with products of pairs of bfloat16, if it has them.
fn machine_of_pairs() -> Option<Target> {
    machine_of(Activations::Bf16, Target::has_pair_dots, "pairs")
}

fn machine_of(activations: Activations, has: fn(&Target) -> bool, what: &str) -> Option<Target> {
    let target = Target { activations, ..native() };
    let there = has(&target);
    if !there {
        println!("skipped: no products of {what}");
    }
    there.then_some(target)
}

/// Runs a kernel on the machine and in the interpreter; gives the last buffer, the same in both.
fn check(kernel: &Kernel, buffers: &[Vec<u32>], what: &str) -> Vec<u32> {
    check_on(machine(), kernel, buffers, what)
}

fn check_on(machine: Option<Target>, kernel: &Kernel, buffers: &[Vec<u32>], what: &str) -> Vec<u32> {
    let want = interpret(kernel, [0; 4], buffers).pop().expect("it has buffers");
    if let Some(target) = machine {
        let got = run_on(&target, kernel, [0; 4], (0, 1), buffers).pop().expect("it has buffers");
        assert_eq!(got, want, "{what}: compiled (left) and interpreted");
    }
    want
}

struct Random(u64);

impl Random {
    fn word(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) as u32
    }

    /// A bf16 whose exponent is one of `exponents`, around 127 for 1.
    fn half(&mut self, exponents: &std::ops::Range<u32>) -> u32 {
        let exponent = exponents.start + self.word() % (exponents.end - exponents.start);
        self.word() & 0x807f | exponent << 7
    }
}

fn product(rows: u64, columns: u64, count: u64) -> Kernel {
    let mut k = KernelBuilder::new("product", &[("a", false), ("b", false), ("c", true)], 1.into());
    let strips = |k: &mut KernelBuilder, base, n| {
        let at = |k: &mut KernelBuilder, i| {
            let bytes = k.index(i * count * 1024);
            k.offset(base, bytes)
        };
        (0..n).map(|i| at(k, i)).collect::<Vec<_>>()
    };
    let (pa, pb, c) = (k.param(0), k.param(1), k.param(2));
    let (a, b, bytes) = (strips(&mut k, pa, rows), strips(&mut k, pb, columns), k.index(128));
    // in two parts, the second of which adds to the first
    let (zero, split, count) = (k.const_i64(0), k.index(count / 2), k.index(count));
    let parts = k.index(2);
    k.for_each((zero, parts, 1), |k, part| {
        let is_first = k.cmp(Pred::Eq, part, zero);
        let (begin, end) = (k.select(is_first, zero, split), k.select(is_first, split, count));
        let tiles = k.sub(end, begin);
        let first = k.mul_const(begin, 1024);
        let [a, b] = [&a, &b].map(|strips| strips.iter().map(|&strip| k.offset(strip, first)).collect::<Vec<_>>());
        k.tile_add((c, Some(is_first)), (&a, &b), tiles, |k, i| {
            let at = k.mul_const(i, 512);
            k.prefetch(pb, at, bytes);
        });
    });
    k.finish()
}

fn check_products(exponents: &std::ops::Range<u32>, seed: u64) {
    let mut random = Random(seed);
    for (rows, columns, count) in [(1, 1, 1), (1, 2, 3), (2, 1, 2), (2, 2, 5), (2, 2, 0)] {
        let kernel = product(rows, columns, count);
        let mut words = |n: u64| -> Vec<u32> {
            (0..n * 256).map(|_| random.half(exponents) | random.half(exponents) << 16).collect()
        };
        let buffers = [words(rows * count), words(columns * count), vec![7; (rows * columns * 256) as usize]];
        let what = format!("{rows} x {columns} tiles, {count} deep, exponents {exponents:?}");
        let c = check(&kernel, &buffers, &what);
        if count == 0 {
            assert!(c.iter().all(|&x| x == 0), "{what}");
        }
    }
}

#[test]
fn products_of_tiles_have_the_interpreters_bits() {
    check_products(&(120..134), 0x9e37_79b9_7f4a_7c15);
    // sums that cancel and lose digits
    check_products(&(90..160), 3);
}

/// Products and sums around the least normal number: zeros where they are smaller.
#[test]
fn small_numbers_are_zeros_in_products_of_tiles() {
    check_products(&(0..3), 5);
    check_products(&(55..68), 7);
    check_products(&(0..70), 11);
}

/// A product against numbers computed in Rust: row by column.
#[test]
fn a_product_of_tiles_is_a_product_of_matrices() {
    let kernel = product(2, 2, 2);
    let value = |row: usize, column: usize| ((row * 7 + column * 3) % 13) as f32 - 6.0;
    let bits = |x: f32| x.to_bits() >> 16;
    // rows of A, and rows of B, both over 64 columns; all numbers are exact
    let a: Vec<u32> = (0..2 * 2 * 256)
        .map(|w| {
            let (strip, tile, line, word) = (w / 512, w / 256 % 2, w / 16 % 16, w % 16);
            let at = |half| value(strip * 16 + line, tile * 32 + word * 2 + half);
            bits(at(0)) | bits(at(1)) << 16
        })
        .collect();
    let b: Vec<u32> = (0..2 * 2 * 256)
        .map(|w| {
            let (strip, tile, line, word) = (w / 512, w / 256 % 2, w / 16 % 16, w % 16);
            let at = |half| value(40 + strip * 16 + word, tile * 32 + line * 2 + half);
            bits(at(0)) | bits(at(1)) << 16
        })
        .collect();
    let c = check(&kernel, &[a, b, vec![0; 1024]], "a product of matrices");
    for (i, &got) in c.iter().enumerate() {
        let want: f32 = (0..64).map(|k| value(i / 32, k) * value(40 + i % 32, k)).sum();
        assert_eq!(f32::from_bits(got), want, "row {}, column {}", i / 32, i % 32);
    }
}

/// Sums of two products of 16 bits, at the ends of the range too, in registers of each width.
#[test]
fn products_of_halves_have_the_interpreters_bits() {
    let target = Target::named("x86-64-v3").expect("the least CPU there is");
    for lanes in [4, 8, 16] {
        let params = [("sum", false), ("a", false), ("b", false), ("out", true)];
        let mut k = KernelBuilder::new("halves", &params, 1.into());
        let [sum, a, b, out] = [0, 1, 2, 3].map(|i| k.param(i));
        k.for_range(64, lanes, |k, at| {
            let [sum, a, b] = [sum, a, b].map(|p| k.load(DType::I32, lanes as u32, p, at));
            let value = k.short_dot(sum, a, b);
            k.store(out, at, value);
        });
        let mut random = Random(17);
        let mut words: Vec<Vec<u32>> =
            (0..3).map(|_| (0..64).map(|_| random.word() << 9 ^ random.word()).collect()).collect();
        (words[0][0], words[1][0], words[2][0]) = (1, 0x8000_8000, 0x8000_8000);
        (words[1][1], words[2][1]) = (0x7fff_8000, 0x8000_7fff);
        let buffers = [words, vec![vec![0; 64]]].concat();
        check_on(Some(target.clone()), &k.finish(), &buffers, &format!("{lanes} lanes"));
    }
}

#[test]
fn a_turned_tile_has_lines_for_words() {
    let mut k = KernelBuilder::new("turn", &[("from", false), ("to", true)], 1.into());
    let (from, to) = (k.param(0), k.param(1));
    k.tile_turn(to, from);
    let got = check(&k.finish(), &[(0..256).collect(), vec![0; 256]], "a turned tile");
    assert!(got.iter().zip(0..).all(|(&word, at)| word == at % 16 * 16 + at / 16), "{got:?}");
}

#[test]
fn two_vectors_become_bf16_in_a_row_or_in_pairs() {
    let mut k = KernelBuilder::new("round", &[("x", false), ("out", true)], 1.into());
    let (x, out) = (k.param(0), k.param(1));
    k.for_range(1024, 32, |k, i| {
        let next = k.add_const(i, 16);
        let (a, b) = (k.load_f32x16(x, i), k.load_f32x16(x, next));
        let (row, pairs) = (k.bf16_row(a, b), k.bf16_pairs(a, b));
        k.store(out, i, row);
        k.store(out, next, pairs);
    });
    let kernel = k.finish();
    let mut random = Random(17);
    let special =
        [0, 0x8000_0000, 1, 0x8000_0001, 0x7f_ffff, 0x80_0000, 0x7f80_0000, 0xff80_0000, 0x7f7f_ffff, 0x7fc0_0000];
    // halfway cases, the ends of the range, and anything
    let numbers: Vec<u32> = (0..1024)
        .map(|i: usize| match i % 4 {
            0 => special[i / 4 % special.len()],
            1 => random.word() & 0xffff_0000 | 0x8000,
            _ => random.word(),
        })
        .map(|bits| if f32::from_bits(bits).is_nan() { 0x7fc0_0000 } else { bits })
        .collect();
    assert_eq!(canonical(&numbers), numbers);
    let out = check(&kernel, &[numbers.clone(), vec![0; 1024]], "bf16");
    let low = |word: u32| f32::from_bits(word << 16);
    assert_eq!(low(out[16]), f32::from_bits(numbers[0]));
    // the second number of a row is the upper half of its first word, and the lower half of its second pair
    assert_eq!(out[0] >> 16, out[17] & 0xffff);
}

#[test]
fn nibbles_are_numbers_whatever_lies_beside_them() {
    let shifts = [0, 4, 8, 12, 16, 20, 24, 28];
    let mut k = KernelBuilder::new("nibbles", &[("x", false), ("out", true)], 1.into());
    let (x, out, zero) = (k.param(0), k.param(1), k.const_i64(0));
    let words = k.load(DType::I32, 16, x, zero);
    for (i, shift) in (0..).zip(shifts) {
        let numbers = k.nibble(words, shift);
        let at = k.index(16 * i);
        k.store(out, at, numbers);
    }
    let mut random = Random(23);
    let words: Vec<u32> = (0..16).map(|_| random.word() << 8 ^ random.word()).collect();
    let out = check(&k.finish(), &[words.clone(), vec![0; 128]], "nibbles");
    for (i, &got) in out.iter().enumerate() {
        let want = (words[i % 16] >> shifts[i / 16] & 15) as f32 - 8.0;
        assert_eq!(f32::from_bits(got), want, "word {}, shift {}", i % 16, shifts[i / 16]);
    }
}

#[test]
fn bytes_of_four_vectors_lie_in_a_row() {
    let mut k = KernelBuilder::new("row", &[("x", false), ("out", true)], 1.into());
    let (x, out, zero) = (k.param(0), k.param(1), k.const_i64(0));
    let vectors = [0, 16, 32, 48].map(|at| {
        let at = k.index(at);
        k.load(DType::I32, 16, x, at)
    });
    let row = k.byte_row(vectors);
    k.store(out, zero, row);
    let words: Vec<u32> = (0..64).map(|i| (i * 0x0103_0700) | (255 - i)).collect();
    let out = check_on(machine_of_bytes(), &k.finish(), &[words, vec![0; 16]], "bytes in a row");
    let bytes: Vec<u8> = out.iter().flat_map(|word| word.to_le_bytes()).collect();
    assert_eq!(bytes, (0..64).map(|i| 255 - i).collect::<Vec<u8>>());
}

/// 1024 sums of a type, to which products are added of as many words with as many others, and of them with one word for 16.
fn dots(sums: DType, dot: fn(&mut KernelBuilder, Val, Val, Val) -> Val) -> Kernel {
    let mut k = KernelBuilder::new("dots", &[("x", false), ("out", true)], 1.into());
    let (x, out) = (k.param(0), k.param(1));
    k.for_range(16 * 64, 16, |k, i| {
        let (second, third) = (k.add_const(i, 1024), k.add_const(i, 2048));
        let sum = k.load(sums, 16, x, i);
        let [a, b] = [second, third].map(|at| k.load(DType::I32, 16, x, at));
        let one = k.load(DType::I32, 1, x, third);
        let one = k.splat(one, 16);
        let sum = dot(k, sum, a, b);
        let sum = dot(k, sum, a, one);
        k.store(out, i, sum);
    });
    k.finish()
}

#[test]
fn products_of_pairs_have_the_interpreters_bits() {
    let kernel = dots(DType::F32, KernelBuilder::pair_dot);
    let mut random = Random(31);
    // numbers of like magnitudes, and some of all
    let mut half = |wide: bool| {
        let exponent = if wide { random.word() % 255 } else { 120 + random.word() % 14 };
        random.word() & 0x807f | exponent << 7
    };
    let mut words: Vec<u32> = (0..3 * 1024).map(|i| half(i % 7 == 0) << 16 | half(i % 7 == 0)).collect();
    // numbers below the least normal one, and sums of them
    words[..16].fill(0);
    words[1024..1040].fill(0x0001_0080);
    words[2048..2064].fill(0x3f80_0080);
    words[16..32].fill(0x0080_0000);
    words[1040..1056].fill(0x8080_3f80);
    words[2064..2080].fill(0x3f00_0000);
    check_on(machine_of_pairs(), &kernel, &[words, vec![0; 1024]], "products of pairs");
}

#[test]
fn products_of_bytes_have_the_interpreters_bits() {
    let kernel = dots(DType::I32, KernelBuilder::byte_dot);
    let mut random = Random(29);
    let mut words: Vec<u32> = (0..3 * 1024).map(|_| random.word() << 8 ^ random.word()).collect();
    // the largest products, and sums that wrap
    words[..48].fill(0x7fff_fff0);
    words[1024..1040].fill(0xffff_ffff);
    words[2048..2064].fill(0x7f7f_7f7f);
    words[1040..1056].fill(0xffff_ffff);
    words[2064..2080].fill(0x8080_8080);
    let out = check_on(machine_of_bytes(), &kernel, &[words, vec![0; 1024]], "products of bytes");
    let wrapped = 0x7fff_fff0_i32.wrapping_add(8 * 255 * 127);
    assert_eq!((out[0].cast_signed(), out[16].cast_signed()), (wrapped, 0x7fff_fff0 - 8 * 255 * 128));
}
