//! How far numbers may be from those of the graph interpreter: every tolerance there is, with its name.

/// A named tolerance.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    pub name: &'static str,
    /// Of the number itself.
    of_number: f32,
    /// Of the largest number of the same value.
    of_largest: f32,
    /// All distances together of all numbers together, as Euclidean norms.
    of_norm: f64,
}

/// What numbers may be apart whatever they are, where anything is allowed: under the least normal number, the distance of
/// neighbours no longer shrinks with them.
const FLOOR: f32 = f32::MIN_POSITIVE * 1e-5;

/// `exact`: moved, or rounded once. `rounding`: an elementwise function, a few roundings. `sum`: a sum of up to some hundred
/// terms of both signs, in another order. `layer`: several such sums, one after the other. `scores`: a softmax of scores of
/// some thousands, in which one rounding of a score is 1e-4 of its exponential. `half`: of a machine that rounds the rows of a product to 16-bit
/// floats (bf16: 2^-9 of each). `tiles`: several such products one after the
/// other; all numbers together are nearer (2.5e-3 is the most that was measured, of experts; 1.5e-3 of the delta rule). `kv`: numbers that are kept as bf16, where a rounding before may become a step to the next, 2^-7 of it, and what is made of them.
/// `bytes`: of a machine that rounds the rows of a product to bytes, by at most a 254th of the largest of 32 numbers: of numbers of one magnitude 2.3e-3 of the largest or
/// 4e-3 of themselves in the mean square, and 1.4 times that where two such products are multiplied.
/// `int8`, `fp8`: as `kv`, of 8 bits, where a step is a 127th of the largest of a row, or an eighth of the number.
const TABLE: [Tolerance; 11] = [
    Tolerance { name: "exact", of_number: 0.0, of_largest: 0.0, of_norm: f64::INFINITY },
    Tolerance { name: "rounding", of_number: 1e-6, of_largest: 0.0, of_norm: f64::INFINITY },
    Tolerance { name: "sum", of_number: 0.0, of_largest: 2e-6, of_norm: f64::INFINITY },
    Tolerance { name: "layer", of_number: 0.0, of_largest: 1e-5, of_norm: f64::INFINITY },
    Tolerance { name: "scores", of_number: 0.0, of_largest: 1e-4, of_norm: f64::INFINITY },
    Tolerance { name: "half", of_number: 0.0, of_largest: 4e-3, of_norm: f64::INFINITY },
    Tolerance { name: "tiles", of_number: 0.0, of_largest: 5e-3, of_norm: 3e-3 },
    Tolerance { name: "bytes", of_number: 0.0, of_largest: 1e-2, of_norm: 8e-3 },
    Tolerance { name: "kv", of_number: 7.9e-3, of_largest: 2e-4, of_norm: f64::INFINITY },
    Tolerance { name: "int8", of_number: 0.0, of_largest: 8e-3, of_norm: f64::INFINITY },
    Tolerance { name: "fp8", of_number: 0.126, of_largest: 2e-4, of_norm: f64::INFINITY },
];

impl Tolerance {
    /// The tolerance called `name`.
    pub fn named(name: &str) -> Result<Self, String> {
        let names = TABLE.map(|t| t.name);
        let found = TABLE.into_iter().find(|t| t.name == name);
        found.ok_or_else(|| format!("there is no tolerance `{name}`, expected one of {names:?}"))
    }

    /// This one, or another if that allows more.
    pub fn or_more(self, other: Self) -> Self {
        if other.of_largest > self.of_largest + self.of_number { other } else { self }
    }

    /// The first number that is too far from what is wanted, with its index, or how far all are. NaN is far from everything.
    pub fn violation(self, found: &[f32], wanted: &[f32]) -> Option<String> {
        self.violation_of_one(found, wanted).or_else(|| self.violation_of_all(found, wanted))
    }

    fn violation_of_one(self, found: &[f32], wanted: &[f32]) -> Option<String> {
        let largest = wanted.iter().filter(|x| x.is_finite()).fold(0f32, |m, x| m.max(x.abs()));
        let floor = if self.of_number + self.of_largest > 0.0 { FLOOR } else { 0.0 };
        let allowed = |w: f32| self.of_number * w.abs() + self.of_largest * largest + floor;
        let near = |f: f32, w: f32| f == w || (f - w).abs() <= allowed(w);
        let at = found.iter().zip(wanted).position(|(&f, &w)| !near(f, w))?;
        let (found, wanted) = (found[at], wanted[at]);
        let distance = (found - wanted).abs();
        let (number, most) = (distance / wanted.abs(), distance / largest);
        Some(format!("element {at} is {found:e}, expected {wanted:e}: {number:.1e} of it, {most:.1e} of the largest"))
    }

    fn violation_of_all(self, found: &[f32], wanted: &[f32]) -> Option<String> {
        let norm = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|x| x * x).sum::<f64>().sqrt();
        let pairs = || found.iter().zip(wanted).filter(|(f, w)| f != w);
        let distance = norm(&mut pairs().map(|(&f, &w)| f64::from(f) - f64::from(w)));
        let all = norm(&mut wanted.iter().copied().filter(|w| w.is_finite()).map(f64::from));
        let violates = self.of_norm.is_finite() && distance > self.of_norm * all + f64::from(FLOOR);
        violates.then(|| format!("relative L2 {:.1e}", distance / all))
    }
}
