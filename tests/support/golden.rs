//! Golden outputs of the published implementation, and the gate for a candidate that computes in float32.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

use super::argmax;

/// The repository's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A fixture's directory; a missing one is a failure.
pub fn fixture(name: &str) -> PathBuf {
    let dir = root().join("tests/oracle").join(name);
    assert!(dir.join("golden.safetensors").is_file(), "fixture {} is missing", dir.display());
    dir
}

/// A golden file.
pub struct Golden {
    floats: HashMap<String, (Vec<usize>, Vec<f32>)>,
    ints: HashMap<String, (Vec<usize>, Vec<i32>)>,
}

impl Golden {
    /// Reads a safetensors file of f32 and i32 tensors.
    pub fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let tensors = SafeTensors::deserialize(&bytes).expect("a safetensors file");
        let (mut floats, mut ints) = (HashMap::new(), HashMap::new());
        for (name, t) in tensors.tensors() {
            let words = t.data().chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
            match t.dtype() {
                Dtype::F32 => {
                    floats.insert(name, (t.shape().to_vec(), words.map(f32::from_le_bytes).collect()));
                }
                Dtype::I32 => {
                    ints.insert(name, (t.shape().to_vec(), words.map(i32::from_le_bytes).collect()));
                }
                other => panic!("{}: {name} is {other:?}", path.display()),
            }
        }
        Self { floats, ints }
    }

    /// An f32 tensor and the width of its rows.
    pub fn floats(&self, name: &str) -> (&[f32], usize) {
        let (shape, data) = self.floats.get(name).unwrap_or_else(|| panic!("no tensor {name}"));
        (data, *shape.last().expect("not a scalar"))
    }

    /// An i32 tensor.
    pub fn ints(&self, name: &str) -> &[i32] {
        &self.ints.get(name).unwrap_or_else(|| panic!("no tensor {name}")).1
    }

    /// Which rows of a logits tensor the file holds.
    pub fn rows(&self, name: &str) -> Option<&[i32]> {
        self.ints.get(&format!("{name}.rows")).map(|(_, rows)| rows.as_slice())
    }

    /// True if the file has the tensor.
    pub fn has(&self, name: &str) -> bool {
        self.floats.contains_key(name) || self.ints.contains_key(name)
    }
}

/// What a candidate that computes in float32 must keep to, from the fixtures' README: `check.py`'s float32 gate.
pub mod gate {
    /// Largest absolute error.
    pub const MAX_ABS: f64 = 1e-3;
    /// Relative L2 error of the whole tensor.
    pub const REL_L2: f64 = 1e-5;
    /// Largest KL divergence of a row.
    pub const MAX_KL: f64 = 1e-8;
}

/// Fails if `candidate` is further from `golden` than the gate allows, or if any row's top-1 differs.
pub fn check(what: &str, candidate: &[f32], golden: &[f32], width: usize) {
    assert_eq!(candidate.len(), golden.len(), "{what}: elements");
    assert!(candidate.iter().all(|x| x.is_finite()), "{what}: not finite");
    let (mut worst, mut square, mut norm, mut kl) = (0f64, 0f64, 0f64, 0f64);
    for (i, (c, g)) in candidate.chunks(width).zip(golden.chunks(width)).enumerate() {
        for (&x, &y) in c.iter().zip(g) {
            let d = f64::from(x) - f64::from(y);
            worst = worst.max(d.abs());
            square += d * d;
            norm += f64::from(y).powi(2);
        }
        kl = kl.max(divergence(g, c));
        assert_eq!(argmax(c), argmax(g), "{what}: top-1 of row {i}");
    }
    let rel = (square / norm).sqrt();
    println!("{what}: max abs {worst:.2e}, relative L2 {rel:.2e}, KL {kl:.2e}");
    assert!(worst <= gate::MAX_ABS, "{what}: max abs {worst:e}");
    assert!(rel <= gate::REL_L2, "{what}: relative L2 {rel:e}");
    assert!(kl <= gate::MAX_KL, "{what}: KL {kl:e}");
}

/// Relative L2 distance of a candidate.
pub fn distance(candidate: &[f32], golden: &[f32]) -> f64 {
    assert_eq!(candidate.len(), golden.len(), "elements");
    let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
        candidate.iter().zip(golden).map(|(&x, &y)| f(x.into(), y.into())).sum()
    };
    (sum(&|x, y| (x - y).powi(2)) / sum(&|_, y| y.powi(2))).sqrt()
}

/// KL(golden || candidate) of the row's softmax.
pub fn divergence(golden: &[f32], candidate: &[f32]) -> f64 {
    let log_softmax = |row: &[f32]| {
        let top = row.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(f64::from(x)));
        let sum: f64 = row.iter().map(|&x| (f64::from(x) - top).exp()).sum();
        row.iter().map(|&x| f64::from(x) - top - sum.ln()).collect::<Vec<f64>>()
    };
    let (g, c) = (log_softmax(golden), log_softmax(candidate));
    g.iter().zip(&c).map(|(g, c)| g.exp() * (g - c)).sum::<f64>().max(0.0)
}
