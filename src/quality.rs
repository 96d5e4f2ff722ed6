//! What a build costs in quality, against the same checkpoint in float32 throughout: both executables' own `eval` on the same tokens.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};
use nextc_ir::graph::ModelInfo;
use safetensors::SafeTensors;

use crate::cli::{Activations, Kv, ModelArgs, TargetKind};
use crate::{compile, show};

/// Tokens of a window at most, and numbers of its logits at most: windows of large vocabularies are shorter.
const MOST_TOKENS: u64 = 1024;
const MOST_LOGITS: u64 = 1 << 26;

/// Sums over the positions of all windows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Quality {
    /// Tokens of a window, but the last ones.
    window: usize,
    positions: usize,
    /// Nats of the tokens that follow: by the build, in float32.
    nats: [f64; 2],
    /// `Σ KL(float32 ‖ build)`, nats.
    kl: f64,
    /// Positions with the same likeliest token.
    same_top: usize,
    /// First drafts of the build, and those that are its likeliest next token.
    drafts: usize,
    right: usize,
}

/// An executable's logits of a window: rows of the vocabulary, and as many of first drafts if it drafts.
struct Logits {
    vocab: usize,
    rows: Vec<f32>,
    drafts: Vec<f32>,
}

impl Quality {
    /// Measures a build of a model with sequences of token ids.
    /// # Errors
    /// A twin that cannot be built, or what an executable says.
    pub fn measure(
        args: &ModelArgs,
        info: &ModelInfo,
        executable: &Path,
        sequences: &[Vec<u32>],
    ) -> anyhow::Result<Self> {
        ensure!(info.has_weights, "--quality needs weights, and {} has none", args.model.display());
        let window = MOST_TOKENS.min(MOST_LOGITS / info.vocab_size.max(1)).clamp(2, info.max_context.max(2)) as usize;
        let dir = tempfile::tempdir().context("a folder for the build in float32")?;
        let twin = dir.path().join("float32");
        compile::build(&in_float32(args), Some(&twin))
            .context("the build in float32 that this one is compared with")?;
        let executable = std::path::absolute(executable).context("the executable's path")?;
        let windows: Vec<&[u32]> = sequences.iter().flat_map(|tokens| windows(tokens, window)).collect();
        let mut quality = Self { window, ..Self::default() };
        for (i, tokens) in windows.iter().enumerate() {
            show::progress(&format!("quality: window {} of {}", i + 1, windows.len()));
            let own = Logits::of(&executable, dir.path(), tokens, info.mtp)?;
            quality.add(tokens, &own, &Logits::of(&twin, dir.path(), tokens, false)?);
        }
        Ok(quality)
    }

    /// Adds a window: its inputs are all tokens but the last, its targets all but the first.
    fn add(&mut self, tokens: &[u32], own: &Logits, float32: &Logits) {
        for ((own, float32), &target) in own.rows().zip(float32.rows()).zip(&tokens[1..]) {
            let (p, q) = (log_sum(float32), log_sum(own));
            self.positions += 1;
            self.nats[0] += q - f64::from(own[target as usize]);
            self.nats[1] += p - f64::from(float32[target as usize]);
            let divergence = float32.iter().zip(own).map(|(&x, &y)| {
                let (x, y) = (f64::from(x) - p, f64::from(y) - q);
                x.exp() * (x - y)
            });
            self.kl += divergence.sum::<f64>();
            self.same_top += usize::from(likeliest(own) == likeliest(float32));
        }
        for (draft, next) in own.drafts.chunks(own.vocab).zip(own.rows().skip(1)) {
            self.drafts += 1;
            self.right += usize::from(likeliest(draft) == likeliest(next));
        }
    }

    /// The table that `nextc build` prints.
    pub fn table(&self) -> String {
        let mean = |x: f64| x / self.positions as f64;
        let [own, float32] = self.nats.map(mean);
        let drafts = match self.drafts {
            0 => String::new(),
            n => format!("; {:.3} of first drafts are its next", self.right as f64 / n as f64),
        };
        format!(
            "quality of {} tokens in windows of {}: {own:.5} nats a token, {:+.5} more than float32 ({float32:.5}), \
             KL {:.2e}, {:.3} with the same likeliest token{drafts}\n",
            self.positions,
            self.window,
            own - float32,
            mean(self.kl),
            mean(self.same_top as f64),
        )
    }
}

/// The same model as its checkpoint has it, with nothing rounded, on this processor.
fn in_float32(args: &ModelArgs) -> ModelArgs {
    ModelArgs {
        quant: Default::default(),
        activations: Activations::F32,
        kv: Kv::F32,
        target: TargetKind::Cpu,
        cpu: "native".to_owned(),
        gpu: None,
        embed_weights: false,
        ..args.clone()
    }
}

/// Runs of `window` tokens with the one that follows, of which the last may be shorter.
fn windows(tokens: &[u32], window: usize) -> impl Iterator<Item = &[u32]> {
    let begins = (0..tokens.len().saturating_sub(1)).step_by(window);
    begins.map(move |begin| &tokens[begin..tokens.len().min(begin + window + 1)])
}

/// Token ids: a JSON array, or an array of such arrays, as `eval` takes them.
/// # Errors
/// A file that cannot be read, holds something else, or no token that follows another.
pub fn read(path: &Path) -> anyhow::Result<Vec<Vec<u32>>> {
    let text = std::fs::read(path).with_context(|| path.display().to_string())?;
    let one = serde_json::from_slice::<Vec<u32>>(&text).map(|tokens| vec![tokens]);
    let expected = || format!("{}: expected a JSON array of token ids, or an array of such arrays", path.display());
    let all: Vec<Vec<u32>> = one.or_else(|_| serde_json::from_slice(&text)).with_context(expected)?;
    ensure!(all.iter().any(|tokens| tokens.len() > 1), "{}: expected two tokens or more", path.display());
    Ok(all)
}

impl Logits {
    /// What an executable's `eval` makes of a window's inputs.
    fn of(executable: &Path, dir: &Path, tokens: &[u32], drafts: bool) -> anyhow::Result<Self> {
        let [ids, out]: [PathBuf; 2] = ["ids.json", "logits.safetensors"].map(|name| dir.join(name));
        std::fs::write(&ids, serde_json::to_string(&tokens[..tokens.len() - 1])?).context("token ids")?;
        let mut command = Command::new(executable);
        command.arg("eval").arg("--tokens").arg(&ids).arg("--out").arg(&out);
        command.args(if drafts { &["--mtp", "1"][..] } else { &[] });
        let output = command.output().with_context(|| executable.display().to_string())?;
        if !output.status.success() {
            bail!("{}: {}", executable.display(), String::from_utf8_lossy(&output.stderr).trim());
        }
        let bytes = std::fs::read(&out).context("logits")?;
        let tensors = SafeTensors::deserialize(&bytes).context("logits")?;
        let logits = tensors.tensor("logits").context("logits")?;
        let floats =
            |bytes: &[u8]| bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let of_drafts =
            if drafts { floats(tensors.tensor("mtp_logits").context("drafts")?.data()) } else { Vec::new() };
        let vocab = logits.shape().last().copied().filter(|&n| n > 0).context("logits without a vocabulary")?;
        Ok(Self { vocab, rows: floats(logits.data()), drafts: of_drafts })
    }

    fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.rows.chunks(self.vocab)
    }
}

/// `ln Σ exp`.
fn log_sum(row: &[f32]) -> f64 {
    let top = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    top + row.iter().map(|&x| (f64::from(x) - top).exp()).sum::<f64>().ln()
}

/// The first of the largest numbers.
fn likeliest(row: &[f32]) -> usize {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_share_the_token_between_them() {
        let tokens = [1, 2, 3, 4, 5, 6];
        assert_eq!(windows(&tokens, 2).collect::<Vec<_>>(), [&tokens[..3], &tokens[2..5], &tokens[4..]]);
        assert_eq!(windows(&tokens[..1], 2).count(), 0);
    }

    #[test]
    fn what_is_the_same_costs_nothing_and_a_shift_is_none() {
        let logits = |by: f32| Logits { vocab: 3, rows: vec![0.0 + by, 1.0 + by, 2.0 + by], drafts: Vec::new() };
        let mut quality = Quality { window: 1, ..Quality::default() };
        quality.add(&[0, 1], &logits(5.0), &logits(0.0));
        assert_eq!((quality.positions, quality.same_top), (1, 1));
        assert!(quality.kl.abs() < 1e-6 && (quality.nats[0] - quality.nats[1]).abs() < 1e-6, "{quality:?}");
        let other = Logits { vocab: 3, rows: vec![2.0, 1.0, 0.0], drafts: Vec::new() };
        quality.add(&[0, 2], &other, &logits(0.0));
        // Σ p·(ln p − ln q): half of the logits differ by 2 each way
        assert!((quality.kl - 2.0 * (0.665_240_9 - 0.090_030_6)).abs() < 1e-5 && quality.same_top == 1, "{quality:?}");
    }
}
