//! Quantised tensors: a matrix `X.weight` that a checkpoint stores as codes, with scales and more in companions of it.
//!
//! | method | codes of `X.weight` `[N, K]` | companions |
//! |---|---|---|
//! | `fp8` | `weight` F8_E4M3 `[N, K]` | `weight_scale_inv` `[N/128, K/128]`: multiplied with, despite its name |
//! | `compressed-tensors` | `weight_packed` I32 `[N, K/8]` | `weight_scale` `[N, K/g]`, `weight_shape`, asymmetric `weight_zero_point` `[N/8, K/g]`, `weight_g_idx` `[K]` |
//! | `gptq` | `qweight` I32 `[K/8, N]` | `scales` `[K/g, N]`, `qzeros` `[K/g, N/8]`, `g_idx` `[K]` |
//! | `awq` | `qweight` I32 `[K, N/8]` | `scales` `[K/g, N]`, `qzeros` `[K/g, N/8]` |
//!
//! (`/8` where codes have four bits, `/4` where they have eight.) Which tensors are quantised is decided by what is there.
//! Here the companions are found and their types and shapes checked; [`read`] reads them.

pub mod read;

use std::collections::HashSet;

use indexmap::IndexMap;
use nextc_ir::format::Blocks;
use nextc_ir::{DType, Format};

use super::header::{PLAIN, Tensor};
use crate::config::{Grouped, Quantization};
use crate::error::WeightProblem as Problem;

/// A matrix that is stored in codes.
#[derive(Clone, Debug)]
pub struct Coded {
    /// How its numbers are stored.
    pub format: Format,
    /// Rows.
    pub rows: u64,
    /// Columns.
    pub columns: u64,
    /// Its name without `weight`, and how its parts are laid out.
    prefix: String,
    kind: Kind,
}

/// How the parts of a coded matrix are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Fp8,
    Packed,
    Gptq(Grouped),
    Awq(Grouped),
}

/// What the names of tensors end in that belong to quantised weights.
const SUFFIXES: &[&str] = &[
    "weight_scale_inv",
    "weight_scale",
    "weight_scale_2",
    "weight_global_scale",
    "weight_packed",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
];
/// Scales of activations: they are not rounded here, so nothing reads these.
const IGNORED: &[&str] = &["input_scale", "input_global_scale", "output_scale"];

/// The coded tensors of a checkpoint by the name of the matrix, and the names of the tensors that they are made of.
#[derive(Debug, Default)]
pub struct Found {
    /// The matrices.
    pub coded: IndexMap<String, Coded>,
    /// Their parts.
    pub parts: HashSet<String>,
}

/// Finds the coded tensors among `tensors`; `read_shape` reads the two numbers of a `weight_shape`.
/// # Errors
/// Everything that belongs to quantised weights and does not fit.
pub fn find<'t>(
    tensors: impl Iterator<Item = (&'t str, &'t Tensor)>,
    quantization: Option<Quantization>,
    read_shape: &dyn Fn(&str) -> Option<[u64; 2]>,
) -> Result<Found, Vec<Problem>> {
    let tensors: IndexMap<&str, &Tensor> = tensors.collect();
    let (found, problems) = (Found::default(), Vec::new());
    let mut finder = Finder { tensors: &tensors, quantization, read_shape, found, problems };
    for (name, tensor) in &tensors {
        finder.anchor(name, tensor);
    }
    finder.check_orphans();
    if finder.problems.is_empty() { Ok(finder.found) } else { Err(finder.problems) }
}

struct Finder<'a> {
    tensors: &'a IndexMap<&'a str, &'a Tensor>,
    quantization: Option<Quantization>,
    read_shape: &'a dyn Fn(&str) -> Option<[u64; 2]>,
    found: Found,
    problems: Vec<Problem>,
}

const CODES: &str = "I32";

impl Finder<'_> {
    /// Looks at a tensor that may hold codes.
    fn anchor(&mut self, name: &str, tensor: &Tensor) {
        let Some((prefix, last)) = name.rsplit_once('.') else { return };
        let coded = match (last, tensor.dtype, self.quantization) {
            ("weight", "F8_E4M3", _) => self.fp8(prefix, tensor),
            ("weight_packed", _, _) => self.packed(prefix, name, tensor),
            ("qweight", _, Some(Quantization::Gptq(g))) => self.transposed(prefix, name, tensor, Kind::Gptq(g)),
            ("qweight", _, Some(Quantization::Awq(g))) => self.transposed(prefix, name, tensor, Kind::Awq(g)),
            ("qweight", _, _) => {
                self.refuse(name, "`quantization_config` of config.json says neither `gptq` nor `awq`")
            }
            _ => return,
        };
        if let Some(coded) = coded {
            self.found.coded.insert(format!("{prefix}.weight"), coded);
        }
    }

    fn refuse(&mut self, name: &str, reason: impl Into<String>) -> Option<Coded> {
        self.problems.push(Problem::Quantised { tensor: name.to_owned(), reason: reason.into() });
        None
    }

    /// Rows and columns of a part that is a matrix of `dtypes`; names it as used.
    fn matrix(&mut self, name: &str, dtypes: &'static str) -> Option<[u64; 2]> {
        self.found.parts.insert(name.to_owned());
        let tensor = *self.tensors.get(name)?;
        self.dtype(name, tensor, dtypes);
        match tensor.shape.as_slice() {
            &[rows, columns] if rows > 0 && columns > 0 => Some([rows, columns]),
            _ => self.shape(name, tensor, "two dimensions, none of them 0".to_owned()),
        }
    }

    fn dtype(&mut self, name: &str, tensor: &Tensor, expected: &'static str) {
        if !expected.split(", ").flat_map(|part| part.split(" or ")).any(|d| d == tensor.dtype) {
            let found = tensor.dtype.to_owned();
            self.problems.push(Problem::DType { tensor: name.to_owned(), found, expected });
        }
    }

    fn shape<T>(&mut self, name: &str, tensor: &Tensor, expected: String) -> Option<T> {
        self.problems.push(Problem::Shape { tensor: name.to_owned(), found: tensor.shape.clone(), expected });
        None
    }

    /// Checks that a companion is there, of these types and this shape; gives its element type.
    fn companion(&mut self, name: &str, dtypes: &'static str, shape: &[u64]) -> Option<DType> {
        self.found.parts.insert(name.to_owned());
        let Some(&tensor) = self.tensors.get(name) else {
            self.problems.push(Problem::Missing { tensor: name.to_owned(), expected: format!("{shape:?}") });
            return None;
        };
        self.dtype(name, tensor, dtypes);
        if tensor.shape != shape {
            return self.shape(name, tensor, format!("{shape:?}"));
        }
        Some(match tensor.dtype {
            "BF16" => DType::BF16,
            "F16" => DType::F16,
            "F32" => DType::F32,
            _ => DType::I32,
        })
    }

    fn fp8(&mut self, prefix: &str, tensor: &Tensor) -> Option<Coded> {
        let block = match self.quantization {
            Some(Quantization::Fp8 { block }) => block,
            _ => [128, 128],
        };
        let [rows, columns] = self.matrix(&format!("{prefix}.weight"), "F8_E4M3")?;
        debug_assert_eq!(tensor.shape, [rows, columns]);
        let scales = [rows.div_ceil(block[0]), columns.div_ceil(block[1])];
        self.companion(&format!("{prefix}.weight_scale_inv"), PLAIN, &scales)?;
        let blocks = Blocks::tile(u32::try_from(block[0]).ok()?, u32::try_from(block[1]).ok()?);
        Some(Coded { format: Format::Fp8(blocks), rows, columns, prefix: prefix.to_owned(), kind: Kind::Fp8 })
    }

    fn packed(&mut self, prefix: &str, name: &str, tensor: &Tensor) -> Option<Coded> {
        if tensor.dtype != CODES {
            return self.refuse(name, format!("it is {}, expected {CODES} (integers of 4 or 8 bits)", tensor.dtype));
        }
        let [rows, words] = self.matrix(name, CODES)?;
        let shape = format!("{prefix}.weight_shape");
        self.companion(&shape, "I64", &[2])?;
        let columns = match (self.read_shape)(&shape) {
            Some([n, k]) if n == rows && (1..=words * 8).contains(&k) => k,
            found => {
                return self
                    .refuse(&shape, format!("it holds {found:?}, expected {rows} rows and columns for {words} words"));
            }
        };
        let Some(bits) = [4, 8].into_iter().find(|bits| (columns * bits).div_ceil(32) == words) else {
            return self.refuse(name, format!("{columns} codes in {words} words a row, expected codes of 4 or 8 bits"));
        };
        let scales = format!("{prefix}.weight_scale");
        let Some(groups) = self.tensors.get(scales.as_str()).map(|t| t.shape.get(1).copied().unwrap_or(0)) else {
            return self.refuse(name, format!("its scales `{scales}` are missing"));
        };
        if groups == 0 || !columns.is_multiple_of(groups) {
            return self.refuse(&scales, format!("{groups} groups of {columns} columns, expected groups of one size"));
        }
        let scale = self.companion(&scales, PLAIN, &[rows, groups])?;
        let zeros = format!("{prefix}.weight_zero_point");
        let zero = self.tensors.contains_key(zeros.as_str());
        if zero {
            self.companion(&zeros, CODES, &[rows.div_ceil(32 / bits), groups])?;
        }
        let order = format!("{prefix}.weight_g_idx");
        let ordered = self.tensors.contains_key(order.as_str());
        if ordered {
            self.companion(&order, CODES, &[columns])?;
        }
        let format =
            self.grouped(name, bits, columns / groups, Blocks { scale, zero, ordered, ..Blocks::group(32) })?;
        Some(Coded { format, rows, columns, prefix: prefix.to_owned(), kind: Kind::Packed })
    }

    /// GPTQ and AWQ: input rows by output columns.
    fn transposed(&mut self, prefix: &str, name: &str, tensor: &Tensor, kind: Kind) -> Option<Coded> {
        let (Kind::Gptq(grouped) | Kind::Awq(grouped)) = kind else { return None };
        let per_word = 32 / grouped.bits;
        let [first, second] = self.matrix(name, CODES)?;
        let (columns, rows) = match kind {
            Kind::Awq(_) => (first, second * per_word),
            _ => (first * per_word, second),
        };
        if !rows.is_multiple_of(per_word) {
            return self.shape(name, tensor, format!("a second dimension that is a multiple of {per_word}"));
        }
        let size = grouped.group_size.unwrap_or(columns);
        let groups = columns.div_ceil(size);
        let scale = self.companion(&format!("{prefix}.scales"), PLAIN, &[groups, rows])?;
        self.companion(&format!("{prefix}.qzeros"), CODES, &[groups, rows / per_word])?;
        let order = format!("{prefix}.g_idx");
        let has_order = self.tensors.contains_key(order.as_str());
        if has_order {
            self.companion(&order, CODES, &[columns])?;
        }
        if grouped.ordered && !has_order {
            return self.refuse(name, format!("`desc_act` is true, but `{order}` is missing"));
        }
        let blocks = Blocks { scale, zero: !grouped.symmetric, ordered: grouped.ordered, ..Blocks::group(32) };
        let format = self.grouped(name, grouped.bits, size, blocks)?;
        Some(Coded { format, rows, columns, prefix: prefix.to_owned(), kind })
    }

    fn grouped(&mut self, name: &str, bits: u64, size: u64, blocks: Blocks) -> Option<Format> {
        let Some(columns) = u32::try_from(size).ok().filter(|n| n.is_multiple_of(16) && *n > 0) else {
            self.refuse(name, format!("groups of {size} columns, expected a multiple of 16"));
            return None;
        };
        let blocks = Blocks { columns, ..blocks };
        Some(if bits == 4 { Format::Q4(blocks) } else { Format::Q8(blocks) })
    }

    /// Names what belongs to quantised weights and to none of those found.
    fn check_orphans(&mut self) {
        let orphans = self.tensors.keys().filter(|name| {
            let last = name.rsplit_once('.').map_or(**name, |(_, last)| last);
            SUFFIXES.contains(&last) && !self.found.parts.contains(**name)
        });
        let orphans: Vec<String> = orphans.map(|n| (*n).to_owned()).collect();
        if self.problems.is_empty() {
            for name in orphans {
                self.refuse(&name, "the codes that it describes are not there, or are of a kind that is not read");
            }
        }
        let ignored =
            self.tensors.keys().filter(|n| n.rsplit_once('.').is_some_and(|(_, last)| IGNORED.contains(&last)));
        self.found.parts.extend(ignored.map(|n| (*n).to_owned()));
    }
}
