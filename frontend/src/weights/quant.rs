//! `--quant`: which format each weight gets, in one table.

use nextc_ir::Format;
use nextc_ir::format::Blocks;

/// What the weights are quantised to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quant {
    /// bfloat16.
    Bf16,
    /// Eight-bit floats in blocks of 128 by 128, as the published FP8 checkpoints.
    Fp8,
    /// Eight-bit integers in groups of 32.
    Q8,
    /// Four-bit integers in groups of 32.
    Q4,
}

/// A row of the table: weights of one purpose, and the format of each under `--quant fp8`, `q8` and `q4`. `None`: as stored.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// What they are for.
    pub what: &'static str,
    /// The last parts of their names in the weight table.
    pub names: &'static [&'static str],
    /// Under `--quant fp8`.
    pub fp8: Option<Format>,
    /// Under `--quant q8`.
    pub q8: Option<Format>,
    /// Under `--quant q4`.
    pub q4: Option<Format>,
    /// Why so.
    pub why: &'static str,
}

const FP8: Option<Format> = Some(Format::Fp8(Blocks::tile(128, 128)));
const Q8: Option<Format> = Some(Format::Q8(Blocks::group(32)));
const Q4: Option<Format> = Some(Format::Q4(Blocks::group(32)));

/// The table. Vectors, convolution taps and other small tables are no matrices and stay f32; under `--quant bf16` every matrix is bf16.
pub const CHOICES: &[Choice] = &[
    Choice {
        what: "experts",
        names: &["experts_gate", "experts_up", "experts_down"],
        fp8: FP8,
        q8: Q8,
        q4: Q4,
        why: "most of the model's bytes",
    },
    Choice {
        what: "shared expert, dense layers",
        names: &["shared_gate_proj", "shared_up", "shared_down", "w_gate", "w_up", "w_down"],
        fp8: FP8,
        q8: Q8,
        q4: Q4,
        why: "read for every token",
    },
    Choice {
        what: "projections of mixers",
        names: &["w_q", "w_k", "w_v", "w_z", "w_out", "w_o"],
        fp8: FP8,
        q8: Q8,
        q4: Q4,
        why: "read for every token",
    },
    Choice {
        what: "head",
        names: &["head"],
        fp8: None,
        q8: Q8,
        q4: Q4,
        why: "read for every token; the published FP8 checkpoints leave it",
    },
    Choice {
        what: "embedding",
        names: &["embed"],
        fp8: None,
        q8: Q8,
        q4: Q8,
        why: "a row a token: its bits cost memory, not time (tied, it is the head too)",
    },
    Choice {
        what: "input of MTP",
        names: &["w_e", "w_h"],
        fp8: None,
        q8: Q8,
        q4: Q8,
        why: "small; drafts suffer first",
    },
    Choice {
        what: "router, gates of experts and of the delta rule",
        names: &["router", "shared_gate", "w_a", "w_b"],
        fp8: None,
        q8: None,
        q4: None,
        why: "small, and what they decide is discrete or enters an exponential",
    },
];

impl Quant {
    /// The format of the matrix called `name`; `None`: as stored.
    pub fn format(self, name: &str) -> Option<Format> {
        let last = name.rsplit('.').next().unwrap_or(name);
        let choice = CHOICES.iter().find(|c| c.names.contains(&last));
        match self {
            Self::Bf16 => Some(Format::Bf16),
            Self::Fp8 => choice.and_then(|c| c.fp8),
            Self::Q8 => choice.and_then(|c| c.q8),
            Self::Q4 => choice.and_then(|c| c.q4),
        }
    }
}
