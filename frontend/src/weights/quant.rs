//! `--quant`: which format each weight gets, in one table, and exceptions from it.

use std::str::FromStr;

use nextc_ir::Format;
use nextc_ir::format::{Blocks, FORMATS};

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

impl Quant {
    /// Each with its name on the command line.
    pub const ALL: [(&str, Self); 4] = [("bf16", Self::Bf16), ("fp8", Self::Fp8), ("q8", Self::Q8), ("q4", Self::Q4)];
}

/// A row of the table: weights of one purpose, and the format of each under `--quant fp8`, `q8` and `q4`. `None`: as stored.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// The word for them in exceptions.
    pub word: &'static str,
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
        word: "experts",
        what: "experts",
        names: &["experts_gate", "experts_up", "experts_down"],
        fp8: FP8,
        q8: Q8,
        q4: Q4,
        why: "most of the model's bytes",
    },
    Choice {
        word: "ffn",
        what: "shared expert, dense layers",
        names: &["shared_gate_proj", "shared_up", "shared_down", "w_gate", "w_up", "w_down"],
        fp8: FP8,
        q8: Q8,
        q4: Q4,
        why: "read for every token",
    },
    Choice {
        word: "mixers",
        what: "projections of mixers",
        names: &["w_q", "w_k", "w_v", "w_z", "w_out", "w_o"],
        fp8: FP8,
        q8: Q8,
        q4: Q4,
        why: "read for every token",
    },
    Choice {
        word: "head",
        what: "head",
        names: &["head"],
        fp8: None,
        q8: Q8,
        q4: Q4,
        why: "read for every token; the published FP8 checkpoints leave it",
    },
    Choice {
        word: "embed",
        what: "embedding",
        names: &["embed"],
        fp8: None,
        q8: Q8,
        q4: Q8,
        why: "a row a token: its bits cost memory, not time (tied, it is the head too)",
    },
    Choice {
        word: "mtp_input",
        what: "input of MTP",
        names: &["w_e", "w_h"],
        fp8: None,
        q8: Q8,
        q4: Q8,
        why: "small; drafts suffer first",
    },
    Choice {
        word: "gates",
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

/// What `--quant` asks for: a column of the table, or what the checkpoint has, and exceptions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Quantise {
    /// The column; `None`: as stored.
    pub all: Option<Quant>,
    /// Exceptions; a later one goes before an earlier one.
    pub exceptions: Vec<Exception>,
}

/// Matrices whose names match a pattern, and their format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exception {
    /// A word of the table, or the name of a weight or its last parts, with `*` for any letters.
    pub pattern: String,
    /// The format; `None`: as stored.
    pub format: Option<Format>,
}

impl From<Option<Quant>> for Quantise {
    fn from(all: Option<Quant>) -> Self {
        Self { all, exceptions: Vec::new() }
    }
}

impl Quantise {
    /// The format of the matrix called `name`; `None`: as stored.
    pub fn format(&self, name: &str) -> Option<Format> {
        match self.exceptions.iter().rev().find(|e| e.matches(name)) {
            Some(exception) => exception.format,
            None => self.all.and_then(|quant| quant.format(name)),
        }
    }
}

impl Exception {
    /// True if the matrix called `name` is one of those that are meant.
    pub fn matches(&self, name: &str) -> bool {
        let last = name.rsplit('.').next().unwrap_or(name);
        let by_word = CHOICES.iter().any(|c| c.word == self.pattern && c.names.contains(&last));
        let tails = name.match_indices('.').map(|(dot, _)| &name[dot + 1..]);
        by_word || std::iter::once(name).chain(tails).any(|tail| matches(self.pattern.as_bytes(), tail.as_bytes()))
    }
}

/// True if `text` is what `pattern` says, in which `*` stands for any letters.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut at, mut star) = (0, None);
    let mut p = 0;
    while at < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, at));
                p += 1;
            }
            Some(letter) if *letter == text[at] => (p, at) = (p + 1, at + 1),
            // the last star takes a letter more
            _ => match &mut star {
                Some((of, taken)) => {
                    *taken += 1;
                    (p, at) = (*of + 1, *taken);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|letter| *letter == b'*')
}

const KEEP: &str = "keep";
const EXPECTED: &str = "expected `keep`, `bf16`, `fp8`, `q8` or `q4`, and exceptions like `head=q8` (`nextc formats` lists words and formats)";

impl FromStr for Quantise {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut quantise = Self::default();
        for (i, part) in parts(text).into_iter().enumerate() {
            match part.split_once('=') {
                Some((pattern, format)) => quantise.exceptions.push(exception(pattern, format)?),
                None if i > 0 => return Err(format!("`{part}` is no PATTERN=FORMAT; {EXPECTED}")),
                None if part == KEEP => {}
                None => {
                    let known = Quant::ALL.into_iter().find(|(name, _)| *name == part);
                    quantise.all = Some(known.ok_or_else(|| format!("`{part}` is none of them; {EXPECTED}"))?.1);
                }
            }
        }
        Ok(quantise)
    }
}

/// Parts between commas; those of a format's blocks are left.
fn parts(text: &str) -> Vec<&str> {
    let mut depth = 0u32;
    let at_comma = |letter: char| {
        match letter {
            '<' => depth += 1,
            '>' => depth = depth.saturating_sub(1),
            _ => {}
        }
        letter == ',' && depth == 0
    };
    text.split(at_comma).collect()
}

fn exception(pattern: &str, format: &str) -> Result<Exception, String> {
    if pattern.is_empty() {
        return Err(format!("`={format}` names no weights; {EXPECTED}"));
    }
    let exception = |format| Exception { pattern: pattern.to_owned(), format };
    if format == KEEP {
        return Ok(exception(None));
    }
    // what only a checkpoint can have: zero points, offsets, units and orders
    let can_round = |f: &Format| f.blocks().is_none_or(|b| !b.zero && !b.ordered && b.unit == 0);
    match Format::from_name(format) {
        Some(format) if can_round(&format) => Ok(exception(Some(format))),
        Some(_) => {
            Err(format!("`{format}` is a format that weights have where the checkpoint does: nothing is rounded to it"))
        }
        None => {
            let known: Vec<&str> = FORMATS.iter().filter(|d| can_round(&d.format)).map(|d| d.name).collect();
            Err(format!(
                "`{format}` is no format, expected `{KEEP}`, {}, or one with blocks like `q4<g64>`",
                known.join(", ")
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format(text: &str, weight: &str) -> String {
        let quantise: Quantise = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
        quantise.format(weight).map_or("keep".into(), |f| f.to_string())
    }

    #[test]
    fn exceptions_go_before_the_table_and_later_ones_before_earlier() {
        assert_eq!(format("q4", "head"), "q4<g32>");
        assert_eq!(format("q4,head=q8", "head"), "q8<g32>");
        assert_eq!(format("q4,head=q8", "layers.3.w_q"), "q4<g32>");
        assert_eq!(format("q4,experts=fp8", "layers.3.mlp.experts_up"), "fp8<128x128>");
        assert_eq!(format("experts=q4<g64,bf16>,gates=keep", "mtp.mlp.experts_up"), "q4<g64,bf16>");
        assert_eq!(format("experts=q4<g64,bf16>", "head"), "keep");
        assert_eq!(format("q4,layers.*=q8,layers.1?.w_q=bf16", "layers.12.w_q"), "q8<g32>");
        assert_eq!(format("q4,layers.1*.w_q=bf16", "layers.12.w_q"), "bf16");
        assert_eq!(format("q4,layers.1*.w_q=bf16", "layers.21.w_q"), "q4<g32>");
        assert_eq!(format("q4,mlp.experts_*=keep", "layers.0.mlp.experts_down"), "keep");
        assert_eq!(format("keep,w_q=q8,w_q=q4", "layers.0.w_q"), "q4<g32>");
    }

    #[test]
    fn stars_stand_for_any_letters() {
        for (pattern, text, expected) in [
            ("*", "", true),
            ("a*b*c", "abc", true),
            ("a*b*c", "axxbyybzc", true),
            ("a*b*c", "axxbyybz", false),
            ("*down", "experts_down", true),
            ("down*", "experts_down", false),
            ("", "a", false),
        ] {
            assert_eq!(matches(pattern.as_bytes(), text.as_bytes()), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn wrong_ones_are_refused() {
        for (text, expected) in [
            ("q3", "`q3` is none of them"),
            ("", "`` is none of them"),
            ("q4,q8", "`q8` is no PATTERN=FORMAT"),
            ("q4,=q8", "`=q8` names no weights"),
            ("q4,head=q3", "`q3` is no format, expected `keep`, bf16, f16, f32, fp8, q8, q4, or one with blocks"),
            ("q4,head=u4", "`u4` is a format that weights have where the checkpoint does"),
            ("head=q4<g32,zero>", "`q4<g32,zero>` is a format that weights have where the checkpoint does"),
        ] {
            let error = text.parse::<Quantise>().expect_err(text);
            assert!(error.starts_with(expected), "{text}: {error}");
        }
    }

    #[test]
    fn each_word_and_each_name_stands_once() {
        for (i, choice) in CHOICES.iter().enumerate() {
            for other in &CHOICES[..i] {
                assert!(choice.word != other.word && choice.names.iter().all(|n| !other.names.contains(n)));
            }
        }
    }
}
