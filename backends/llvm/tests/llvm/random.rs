//! Random kernels of nested loops and branches: compiled, they leave what the interpreter leaves (`run` compares them).

use nextc_ir::DType;
use nextc_ir::kernel::{KernelBuilder, Pred, Val};

use super::{bits, run};

/// A small generator of numbers, the same on every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % sides
    }

    fn pick(&mut self, from: &[Val]) -> Val {
        from[self.roll(from.len())]
    }
}

/// Values in scope. Floats never become integers by their bits: NaNs differ in them.
#[derive(Clone)]
struct Scope {
    floats: Vec<Val>,
    ints: Vec<Val>,
}

/// Appends `count` random statements; regions nest to `depth`.
fn statements(k: &mut KernelBuilder, dice: &mut Dice, scope: &mut Scope, count: usize, depth: usize) {
    for _ in 0..count {
        match dice.roll(if depth == 0 { 8 } else { 10 }) {
            0..4 => {
                let value = float(k, dice, scope);
                scope.floats.push(value);
            }
            4..8 => {
                let value = int(k, dice, scope);
                scope.ints.push(value);
            }
            8 => repeat(k, dice, scope, depth - 1),
            _ => choose(k, dice, scope, depth - 1),
        }
    }
}

fn float(k: &mut KernelBuilder, dice: &mut Dice, scope: &Scope) -> Val {
    let [a, b, c] = [(); 3].map(|()| dice.pick(&scope.floats));
    match dice.roll(13) {
        0 => k.fadd(a, b),
        1 => k.fsub(a, b),
        2 => k.fmul(a, b),
        3 => k.fdiv(a, b),
        4 => k.fma(a, b, c),
        5 => k.fmin(a, b),
        6 => k.fmax(a, b),
        7 => k.fneg(a),
        8 => k.fabs(a),
        9 => k.fround(a),
        10 => {
            let i = dice.pick(&scope.ints);
            k.to_float(i)
        }
        11 => {
            let (sum, lanes) = (k.reduce_add(a), k.ty(a).lanes());
            k.splat(sum, lanes)
        }
        _ => {
            let c = condition(k, dice, scope);
            k.select(c, a, b)
        }
    }
}

fn int(k: &mut KernelBuilder, dice: &mut Dice, scope: &Scope) -> Val {
    let [a, b] = [(); 2].map(|()| dice.pick(&scope.ints));
    let seven = k.i32_like(a, 7);
    match dice.roll(8) {
        0 => k.add(a, b),
        1 => k.sub(a, b),
        2 => k.mul(a, b),
        3 => k.xor(a, b),
        4 => k.shl(a, seven),
        5 => k.sshr(a, seven),
        6 => k.ushr(a, seven),
        _ => {
            let c = condition(k, dice, scope);
            k.select(c, a, b)
        }
    }
}

/// A comparison, lane by lane.
fn condition(k: &mut KernelBuilder, dice: &mut Dice, scope: &Scope) -> Val {
    let pred = Pred::ALL[dice.roll(6)];
    let from = if dice.roll(2) == 0 { &scope.floats } else { &scope.ints };
    let (a, b) = (dice.pick(from), dice.pick(from));
    k.cmp(pred, a, b)
}

/// A loop that carries a float and an integer.
fn repeat(k: &mut KernelBuilder, dice: &mut Dice, scope: &mut Scope, depth: usize) {
    let init = [dice.pick(&scope.floats), dice.pick(&scope.ints)];
    let (lo, hi) = (k.const_i64(-1), k.index(dice.roll(7) as u64));
    let step = 1 + dice.roll(3) as u64;
    let last = k.for_carry((lo, hi, step), &init, |k, i, carried| {
        let mut inner = scope.clone();
        inner.floats.push(carried[0]);
        let i = k.narrow(i);
        let lanes = k.ty(carried[1]).lanes();
        inner.ints.extend([carried[1], k.splat(i, lanes)]);
        statements(k, dice, &mut inner, 4, depth);
        inner.yields()
    });
    scope.floats.push(last[0]);
    scope.ints.push(last[1]);
}

/// A branch on one lane of a comparison, which yields a float and an integer.
fn choose(k: &mut KernelBuilder, dice: &mut Dice, scope: &mut Scope, depth: usize) {
    let (a, b) = (dice.pick(&scope.ints), dice.pick(&scope.ints));
    let [a, b] = [a, b].map(|x| if k.ty(x).lanes() == 1 { x } else { k.extract(x, 1) });
    let less = k.cmp(Pred::Lt, a, b);
    let mut arms = [scope.clone(), scope.clone()];
    let [then, otherwise] = &mut arms;
    let seed = dice.roll(1 << 20) as u64;
    let arm = |k: &mut KernelBuilder, scope: &mut Scope, seed: u64| {
        statements(k, &mut Dice(seed), scope, 3, depth);
        scope.yields()
    };
    let either = k.if_else(less, |k| arm(k, then, seed), |k| arm(k, otherwise, seed ^ 0x5555));
    scope.floats.push(either[0]);
    scope.ints.push(either[1]);
}

impl Scope {
    /// The newest float and integer.
    fn yields(&self) -> Vec<Val> {
        [&self.floats, &self.ints].iter().map(|v| *v.last().expect("a scope has values")).collect()
    }
}

#[test]
fn random_kernels_leave_what_the_interpreter_leaves() {
    for seed in 0..24 {
        let lanes = [1, 4, 16][seed as usize % 3];
        let mut k = KernelBuilder::new(&format!("random{seed}"), &[("x", false), ("i", false), ("y", true)], 2.into());
        let (x, i, y, task) = (k.param(0), k.param(1), k.param(2), k.task());
        let at = k.mul_const(task, 16);
        let mut scope =
            Scope { floats: vec![k.load(DType::F32, lanes, x, at)], ints: vec![k.load(DType::I32, lanes, i, at)] };
        statements(&mut k, &mut Dice(seed), &mut scope, 16, 3);
        let row = k.mul_const(task, 64);
        for (j, value) in scope.yields().into_iter().enumerate() {
            let at = k.add_const(row, 32 * j as u64);
            k.store(y, at, value);
        }
        let x = bits((0..32u8).map(|j| (f32::from(j) - 15.5) * 0.37));
        let i: Vec<u32> = (0..32u32).map(|j| j.wrapping_mul(0x9e37_79b9) >> (j % 30)).collect();
        run(&k.finish(), [0; 4], &[x, i, vec![0; 128]]);
    }
}
