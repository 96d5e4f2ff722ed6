//! The description of a machine that code is made for. No other file holds a number of one machine.
//!
//! [`CPUS`] names the CPUs that `--cpu` takes and says which features each has; [`Target::native`] asks this machine feature by
//! feature, never by name: a hypervisor may hide features of a CPU whose name promises them. The rates of memory and arithmetic
//! are assumptions for the cost model ([`RATES`]), not measurements of the machine at hand.

/// A GPU that code is made for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gpu {
    /// Its name, as `ptxas` spells it.
    pub name: &'static str,
    /// Features in LLVM's spelling: the version of the PTX ISA.
    pub features: &'static [&'static str],
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of memory that the threads of a block can share.
    pub shared_bytes: u64,
    /// Bytes of the second cache, of which an H200 has 60 MB and an H100 50.
    pub l2_bytes: u64,
    /// Bytes a second read from its memory.
    pub read_bytes_per_s: f64,
    /// Multiply-adds on tensor cores a second (16-bit floats, f32 sums), times two.
    pub flops_per_s: f64,
    /// Nanoseconds from one kernel of a graph to the next.
    pub launch_ns: f64,
}

/// The GPUs that `--gpu` knows. Rates are those of an H200 (`ld.global`, kernels in a graph with programmatic launch).
pub const GPUS: &[Gpu] = &[Gpu {
    name: "sm_90a",
    features: &["ptx86"],
    multiprocessors: 132,
    shared_bytes: 232_448,
    l2_bytes: 50 << 20,
    read_bytes_per_s: 4.6e12,
    flops_per_s: 790e12,
    launch_ns: 1000.0,
}];

/// What products of many tokens may round activations to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activations {
    /// Nothing is rounded.
    F32,
    /// bfloat16, where a matrix unit multiplies it.
    Bf16,
    /// Signed bytes with a scale for each block of columns, where vectors multiply bytes and the weights are integers.
    Int8,
    /// Signed numbers of 16 bits with a scale for each block of columns, where vectors have less than 512 bits and the weights are integers: in all products, of
    /// few tokens too.
    Int16,
}

/// A machine and the choices made for it.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// The CPU as named on the command line: `native`, `x86-64-v3`, `x86-64-v4`, `sapphirerapids`, ...
    pub cpu: String,
    /// The GPU, if code is made for one; then `cpu` names it too.
    pub gpu: Option<Gpu>,
    /// Instruction-set features in LLVM's spelling: `avx2`, `fma`, `f16c`, `avx512f`, ...
    pub features: Vec<String>,
    /// Bits of a vector register that the backend uses: 128, 256 or 512.
    pub vector_bits: u32,
    /// Vector registers.
    pub vector_registers: u32,
    /// What activations are rounded to.
    pub activations: Activations,
    /// Tokens of KV in one page.
    pub page_tokens: u64,
    /// The longest context a sequence may have.
    pub max_context: u64,
    /// Read bandwidth of main memory with all threads, bytes a second: for cost and roofline.
    pub read_bytes_per_s: f64,
    /// Fused multiply-adds a second with all threads, times two.
    pub flops_per_s: f64,
    /// Cost of starting one kernel and waiting for it, nanoseconds.
    pub launch_ns: f64,
}

/// Tile of the dense matmul micro-kernel, in registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatmulTile {
    /// Row tiles of 16 that are computed together.
    pub row_tiles: u64,
    /// Tokens that are computed together.
    pub tokens: u64,
    /// Columns of scaled formats in one turn of the inner loop, if a word has no more.
    pub columns: u64,
}

/// How products of many tokens are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BulkKind {
    /// In tiles of bfloat16, by a matrix unit.
    Tiles,
    /// As dot products of bytes, by vectors.
    Bytes,
    /// As dot products of pairs of bfloat16, by vectors.
    Pairs,
}

impl BulkKind {
    /// Tokens that are multiplied together with two strips of a weight: as many as the sums fit registers.
    pub const fn together(self) -> u64 {
        match self {
            Self::Tiles => 32,
            Self::Bytes | Self::Pairs => 6,
        }
    }

    /// Tasks that every thread has at least, where tasks are joined so that rows are rounded seldom: more of them spread what a slow thread leaves, fewer round less.
    pub const fn tasks_per_thread(self) -> u64 {
        match self {
            Self::Tiles => 2,
            Self::Bytes | Self::Pairs => 1,
        }
    }
}

/// What multiplies rows of bfloat16 that are no weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// A matrix unit, in tiles.
    Tiles,
    /// Vectors, two numbers of a lane at a time.
    Pairs,
}

/// How products of many tokens are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BulkTile {
    /// How they are made.
    pub kind: BulkKind,
    /// Bytes of rounded rows of activations that are multiplied with all tiles of a task: they stay in the second cache.
    pub panel_bytes: u64,
    /// Most tokens whose rows are rounded together.
    pub most_tokens: u64,
    /// Row tiles of 16 that a task takes, if they leave every thread a few tasks.
    pub row_tiles: u64,
}

impl BulkTile {
    /// As [`BulkKind::together`].
    pub const fn together(&self) -> u64 {
        self.kind.together()
    }

    /// Tokens whose rows of `columns` numbers, `row_bytes` in all, are rounded together: a multiple of those that are multiplied together.
    pub fn tokens(&self, row_bytes: u64) -> u64 {
        let most = (self.panel_bytes / row_bytes.max(1)).clamp(32, self.most_tokens);
        most / self.together() * self.together()
    }
}

/// Rates that the cost model assumes of every CPU until it is told better: those of two cores of a shared server.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Bytes a second that all threads read from main memory.
    pub read_bytes_per_s: f64,
    /// Floating-point operations a second, for each 64 bits of vector register.
    pub flops_per_s_of_64_bits: f64,
    /// Nanoseconds to start a kernel on the thread team and wait for it.
    pub launch_ns: f64,
}

/// The assumed rates.
pub const RATES: Rates = Rates { read_bytes_per_s: 27.5e9, flops_per_s_of_64_bits: 50e9, launch_ns: 500.0 };

/// Why there is no target for a CPU.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// No CPU of this name is in the table.
    #[error("cpu `{name}` is unknown, expected `native` or one of {}", known_names())]
    Unknown {
        /// The name.
        name: String,
    },
    /// No GPU of this name is in the table.
    #[error("gpu `{name}` is unknown, expected {}", GPUS.iter().map(|g| format!("`{}`", g.name)).collect::<Vec<_>>().join(", "))]
    UnknownGpu {
        /// The name.
        name: String,
    },
    /// A CPU whose name is known and that is less than x86-64-v3.
    #[error(
        "cpu `{name}` lacks AVX2, FMA or F16C; code for x86-64 needs at least `{MINIMUM}` (Intel Haswell of 2013, AMD Zen of 2017)"
    )]
    TooOld {
        /// The name.
        name: String,
    },
    /// This machine lacks features of x86-64-v3.
    #[error("this machine lacks {}; code for x86-64 needs at least `{MINIMUM}`; name the machine that will run it with `--cpu`", missing.join(", "))]
    Lacks {
        /// The features that it lacks.
        missing: Vec<&'static str>,
    },
    /// This machine is no x86-64.
    #[error("this machine is {arch}, expected x86_64; name the machine that will run the code with `--cpu`")]
    Architecture {
        /// What it is.
        arch: &'static str,
    },
}

/// The least CPU that code is made for.
pub const MINIMUM: &str = "x86-64-v3";

const V3: &[&str] = &[
    "sse3", "ssse3", "sse4.1", "sse4.2", "popcnt", "cx16", "lzcnt", "movbe", "bmi", "bmi2", "avx", "avx2", "fma",
    "f16c",
];
const V4: &[&str] = &["avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"];
const VNNI: &[&str] = &["avx512vnni"];
const ICE_LAKE: &[&str] =
    &["avx512vnni", "avx512vbmi", "avx512vbmi2", "avx512bitalg", "avx512vpopcntdq", "avx512ifma", "gfni"];
const BF16: &[&str] = &["avx512bf16"];
const AVX_VNNI: &[&str] = &["avxvnni"];
/// What products in tiles of bfloat16 are made of.
const TILES: &[&str] = &["avx512bf16", "amx-tile", "amx-bf16"];
const AMX: &[&str] = &["avx512fp16", "amx-tile", "amx-int8", "amx-bf16"];

/// A CPU that has a name.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    /// Its name, as LLVM and GCC spell it.
    pub name: &'static str,
    /// Its features, in groups. Those that no kernel could use are left out.
    pub features: &'static [&'static [&'static str]],
}

/// The CPUs that `--cpu` knows by name.
pub const CPUS: &[Cpu] = &[
    Cpu { name: MINIMUM, features: &[V3] },
    Cpu { name: "haswell", features: &[V3] },
    Cpu { name: "broadwell", features: &[V3] },
    Cpu { name: "skylake", features: &[V3] },
    Cpu { name: "alderlake", features: &[V3, AVX_VNNI] },
    Cpu { name: "znver1", features: &[V3] },
    Cpu { name: "znver2", features: &[V3] },
    Cpu { name: "znver3", features: &[V3] },
    Cpu { name: "x86-64-v4", features: &[V3, V4] },
    Cpu { name: "skylake-avx512", features: &[V3, V4] },
    Cpu { name: "cascadelake", features: &[V3, V4, VNNI] },
    Cpu { name: "cooperlake", features: &[V3, V4, VNNI, BF16] },
    Cpu { name: "icelake-server", features: &[V3, V4, ICE_LAKE] },
    Cpu { name: "sapphirerapids", features: &[V3, V4, ICE_LAKE, BF16, AVX_VNNI, AMX] },
    Cpu { name: "emeraldrapids", features: &[V3, V4, ICE_LAKE, BF16, AVX_VNNI, AMX] },
    Cpu { name: "graniterapids", features: &[V3, V4, ICE_LAKE, BF16, AVX_VNNI, AMX] },
    Cpu { name: "znver4", features: &[V3, V4, ICE_LAKE, BF16] },
    Cpu { name: "znver5", features: &[V3, V4, ICE_LAKE, BF16, AVX_VNNI] },
];

/// Names of CPUs that are refused with a reason rather than as unknown.
const TOO_OLD: &[&str] = &[
    "x86-64",
    "x86-64-v2",
    "core2",
    "penryn",
    "nehalem",
    "westmere",
    "sandybridge",
    "ivybridge",
    "silvermont",
    "goldmont",
    "tremont",
    "k8",
    "amdfam10",
    "btver1",
    "btver2",
    "bdver1",
    "bdver2",
    "bdver3",
];

fn known_names() -> String {
    CPUS.iter().map(|c| format!("`{}`", c.name)).collect::<Vec<_>>().join(", ")
}

impl Target {
    /// A target with a backend that uses `vector_bits`; its rates are the assumed ones.
    pub fn cpu(name: &str, features: &[&str], vector_bits: u32) -> Self {
        Self {
            cpu: name.to_owned(),
            gpu: None,
            features: features.iter().map(|&s| s.to_owned()).collect(),
            vector_bits,
            vector_registers: vector_registers(vector_bits),
            activations: Activations::F32,
            page_tokens: 64,
            max_context: 0,
            read_bytes_per_s: RATES.read_bytes_per_s,
            flops_per_s: RATES.flops_per_s_of_64_bits * f64::from(vector_bits) / 64.0,
            launch_ns: RATES.launch_ns,
        }
    }

    /// The GPU called `name`, one of [`GPUS`].
    ///
    /// # Errors
    /// [`TargetError::UnknownGpu`] if there is none of that name.
    pub fn gpu(name: &str) -> Result<Self, TargetError> {
        let gpu = GPUS.iter().find(|g| g.name == name);
        let gpu = gpu.ok_or_else(|| TargetError::UnknownGpu { name: name.to_owned() })?;
        Ok(Self {
            gpu: Some(*gpu),
            read_bytes_per_s: gpu.read_bytes_per_s,
            flops_per_s: gpu.flops_per_s,
            launch_ns: gpu.launch_ns,
            ..Self::cpu(name, gpu.features, 512)
        })
    }

    /// The CPU called `name`: `native`, or one of [`CPUS`].
    ///
    /// # Errors
    /// [`TargetError`] if there is none of that name, or if it is less than x86-64-v3.
    pub fn named(name: &str) -> Result<Self, TargetError> {
        if name == "native" {
            return Self::native();
        }
        if TOO_OLD.contains(&name) {
            return Err(TargetError::TooOld { name: name.to_owned() });
        }
        let cpu = CPUS.iter().find(|c| c.name == name).ok_or_else(|| TargetError::Unknown { name: name.to_owned() })?;
        Ok(Self::widest(name, &cpu.features.concat()))
    }

    /// The machine that this program runs on, by the features that it reports.
    ///
    /// # Errors
    /// [`TargetError`] if it is no x86-64, or less than x86-64-v3.
    pub fn native() -> Result<Self, TargetError> {
        let features = native_features()?;
        let missing: Vec<_> = V3.iter().copied().filter(|f| !features.contains(f)).collect();
        if missing.is_empty() { Ok(Self::widest("native", &features)) } else { Err(TargetError::Lacks { missing }) }
    }

    /// A target whose vectors are as wide as its features allow.
    fn widest(name: &str, features: &[&str]) -> Self {
        let wide = V4.iter().all(|f| features.contains(f));
        Self::cpu(name, features, if wide { 512 } else { 256 })
    }

    /// The same machine for the Cranelift backend, whose vectors have 128 bits.
    #[must_use]
    pub fn for_cranelift(self) -> Self {
        Self {
            vector_bits: 128,
            vector_registers: vector_registers(128),
            flops_per_s: self.flops_per_s * 128.0 / f64::from(self.vector_bits),
            ..self
        }
    }

    /// True if the machine has a feature (LLVM's spelling).
    pub fn has(&self, feature: &str) -> bool {
        self.features.iter().any(|f| f == feature)
    }

    /// The features that an executable for this target must find when it starts, in LLVM's spelling: those of the code that
    /// the backends emit today. Others are known of the target, but no instruction of them is used.
    pub fn required_features(&self) -> Vec<&str> {
        let wide = self.vector_bits == 512;
        let bulk: &[&str] = match self.bulk_tile().map(|tile| tile.kind) {
            None => &[],
            Some(BulkKind::Tiles) => TILES,
            Some(BulkKind::Bytes) => VNNI,
            Some(BulkKind::Pairs) => BF16,
        };
        let unit: &[&str] = match self.unit() {
            None => &[],
            Some(Unit::Tiles) => TILES,
            Some(Unit::Pairs) => BF16,
        };
        let used = |f: &&str| V3.contains(f) || (wide && V4.contains(f)) || bulk.contains(f) || unit.contains(f);
        self.features.iter().map(String::as_str).filter(used).collect()
    }

    /// Vectors of 16 floats that a loop may carry in registers: half of what these hold, as its operands want some too.
    pub fn most_sums(&self) -> u64 {
        u64::from(self.vector_registers * self.vector_bits / 512 / 2).max(1)
    }

    /// True if the machine has a matrix unit that multiplies bfloat16, and the backend uses vectors as wide as its tiles.
    pub fn has_tiles(&self) -> bool {
        self.vector_bits == 512 && TILES.iter().all(|f| self.has(f))
    }

    /// True if the machine's vectors multiply bytes and sum four products at once, and the backend uses them at their full width.
    pub fn has_byte_dots(&self) -> bool {
        self.vector_bits == 512 && VNNI.iter().all(|f| self.has(f))
    }

    /// True if the machine's vectors multiply bfloat16 and sum two products at once, and the backend uses them at their full width.
    pub fn has_pair_dots(&self) -> bool {
        self.vector_bits == 512 && BF16.iter().all(|f| self.has(f))
    }

    /// True if the machine's vectors multiply numbers of 16 bits and sum two products, and are not so wide that converting weights to floats costs less than
    /// reading them.
    pub fn has_short_dots(&self) -> bool {
        self.vector_bits < 512 && self.gpu.is_none() && self.has("avx2")
    }

    /// True if rows are rounded to 16 bits for products with weights that are integers.
    pub fn rounds_to_shorts(&self) -> bool {
        self.activations == Activations::Int16 && self.has_short_dots()
    }

    /// How products of many tokens are cut; `None` if activations may not be rounded, or if the machine has no fast products of what they are rounded to.
    pub fn bulk_tile(&self) -> Option<BulkTile> {
        let kind = match self.activations {
            Activations::Bf16 if self.has_tiles() => BulkKind::Tiles,
            Activations::Bf16 if self.has_pair_dots() => BulkKind::Pairs,
            Activations::Int8 if self.has_byte_dots() => BulkKind::Bytes,
            _ => return None,
        };
        // whole blocks, two of which are enough for 512 tokens
        let most_tokens = 256_u64.next_multiple_of(kind.together());
        Some(BulkTile { kind, panel_bytes: 1 << 20, most_tokens, row_tiles: 64 })
    }

    /// What multiplies rows of a long run with each other, rounded to bfloat16: in attention and in the delta rule. `None` if activations may not be rounded, or
    /// if the machine has no fast products of bfloat16.
    pub fn unit(&self) -> Option<Unit> {
        match self.activations {
            Activations::Bf16 | Activations::Int8 if self.has_tiles() => Some(Unit::Tiles),
            Activations::Bf16 | Activations::Int8 if self.has_pair_dots() => Some(Unit::Pairs),
            _ => None,
        }
    }

    /// Whether the delta rule of long runs goes by chunks of [`CHUNK_TOKENS`](crate::types::CHUNK_TOKENS) positions, so that a long run has the bits of its pieces
    /// only where they are cut between two: on CPUs that multiply rows of bfloat16, and on GPUs.
    pub fn has_chunks(&self) -> bool {
        self.unit().is_some() || self.gpu.is_some()
    }

    /// Multiprocessors of the GPU; 1 if it is none.
    pub fn multiprocessors(&self) -> u64 {
        self.gpu.map_or(1, |gpu| u64::from(gpu.multiprocessors))
    }

    /// How far ahead of their use weights are asked for where few tokens are multiplied, in bytes; 0 if they are not, as a GPU's kernels have means of
    /// their own.
    pub const fn ahead_bytes(&self) -> u64 {
        if self.gpu.is_some() { 0 } else { 4096 }
    }

    /// The micro-kernel that fits the registers: two accumulators for each 16 rows and token, and room for weights.
    pub fn matmul_tile(&self) -> MatmulTile {
        match self.vector_bits {
            512 => MatmulTile { row_tiles: 2, tokens: 4, columns: 32 },
            256 => MatmulTile { row_tiles: 1, tokens: 2, columns: 32 },
            // what is unpacked at once takes registers too
            _ => MatmulTile { row_tiles: 1, tokens: 1, columns: 4 },
        }
    }
}

const fn vector_registers(vector_bits: u32) -> u32 {
    if vector_bits == 512 { 32 } else { 16 }
}

/// Asks the CPU for each feature: LLVM's name, and the standard library's where it differs.
#[cfg(target_arch = "x86_64")]
fn native_features() -> Result<Vec<&'static str>, TargetError> {
    macro_rules! detect {
        ($($llvm:tt $(as $std:tt)?),* $(,)?) => {{
            let mut found = Vec::new();
            $( if detect!(@one $llvm $($std)?) { found.push($llvm); } )*
            found
        }};
        (@one $llvm:tt) => { std::arch::is_x86_feature_detected!($llvm) };
        (@one $llvm:tt $std:tt) => { std::arch::is_x86_feature_detected!($std) };
    }
    let mut found = detect![
        "sse3",
        "ssse3",
        "sse4.1",
        "sse4.2",
        "popcnt",
        "cx16" as "cmpxchg16b",
        "lzcnt",
        "movbe",
        "bmi" as "bmi1",
        "bmi2",
        "avx",
        "avx2",
        "fma",
        "f16c",
        "avx512f",
        "avx512cd",
        "avx512bw",
        "avx512dq",
        "avx512vl",
        "avx512vnni",
        "avx512vbmi",
        "avx512vbmi2",
        "avx512bitalg",
        "avx512vpopcntdq",
        "avx512ifma",
        "gfni",
        "avx512bf16",
        "avx512fp16",
        "avxvnni",
    ];
    found.extend(matrix_units());
    Ok(found)
}

/// The features of a matrix unit, which the standard library does not report.
#[cfg(target_arch = "x86_64")]
fn matrix_units() -> impl Iterator<Item = &'static str> {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    let edx = if __cpuid(0).eax < 7 { 0 } else { __cpuid_count(7, 0).edx };
    let bits = [("amx-bf16", 22), ("amx-tile", 24), ("amx-int8", 25)];
    bits.into_iter().filter(move |(_, bit)| edx >> bit & 1 == 1).map(|(name, _)| name)
}

#[cfg(not(target_arch = "x86_64"))]
fn native_features() -> Result<Vec<&'static str>, TargetError> {
    Err(TargetError::Architecture { arch: std::env::consts::ARCH })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_named_cpu_is_at_least_the_minimum_and_as_wide_as_its_features() {
        for cpu in CPUS {
            let target = Target::named(cpu.name).expect("it is in the table");
            assert!(V3.iter().all(|f| target.has(f)), "{}", cpu.name);
            assert_eq!(target.vector_bits, if target.has("avx512vl") { 512 } else { 256 }, "{}", cpu.name);
            assert!(target.required_features().iter().all(|f| target.has(f)));
        }
    }

    #[test]
    fn a_matrix_unit_is_used_where_activations_may_be_rounded() {
        let exact = Target::named("sapphirerapids").expect("it is in the table");
        assert!(exact.has_tiles() && exact.bulk_tile().is_none());
        assert!(!exact.required_features().iter().any(|f| f.starts_with("amx") || *f == "avx512bf16"));
        let rounding = Target { activations: Activations::Bf16, ..exact };
        let tile = rounding.bulk_tile().expect("it has a matrix unit");
        assert_eq!([128, 4096, 8192, 1 << 21].map(|row_bytes| tile.tokens(row_bytes)), [256, 256, 128, 32]);
        assert!(rounding.required_features().contains(&"amx-bf16"));
        assert_eq!(rounding.unit(), Some(Unit::Tiles));
        let narrow = rounding.clone().for_cranelift();
        assert!(!narrow.has_tiles() && !narrow.required_features().contains(&"amx-bf16"));
        let without =
            Target { activations: Activations::Bf16, ..Target::named("icelake-server").expect("it is in the table") };
        assert_eq!(without.bulk_tile(), None);
    }

    #[test]
    fn pairs_are_multiplied_where_there_is_no_matrix_unit() {
        let exact = Target::named("znver5").expect("it is in the table");
        assert!(exact.has_pair_dots() && !exact.required_features().contains(&"avx512bf16"));
        let rounding = Target { activations: Activations::Bf16, ..exact };
        assert_eq!(rounding.bulk_tile().map(|tile| tile.kind), Some(BulkKind::Pairs));
        assert!(rounding.required_features().contains(&"avx512bf16") && rounding.has_chunks());
        assert_eq!(rounding.unit(), Some(Unit::Pairs));
        assert!(rounding.for_cranelift().bulk_tile().is_none());
    }

    #[test]
    fn bytes_are_multiplied_where_activations_may_be_rounded_to_them() {
        let exact = Target::named("icelake-server").expect("it is in the table");
        assert!(exact.has_byte_dots() && exact.bulk_tile().is_none());
        assert!(!exact.required_features().contains(&"avx512vnni"));
        let rounding = Target { activations: Activations::Int8, ..exact };
        let tile = rounding.bulk_tile().expect("it multiplies bytes");
        assert_eq!([64, 2048, 1 << 15].map(|row_bytes| tile.tokens(row_bytes)), [258, 258, 30]);
        assert!(rounding.required_features().contains(&"avx512vnni") && rounding.unit().is_none());
        assert!(rounding.for_cranelift().bulk_tile().is_none());
        for (cpu, unit) in [("cooperlake", Unit::Pairs), ("sapphirerapids", Unit::Tiles)] {
            let target = Target { activations: Activations::Int8, ..Target::named(cpu).expect("it is in the table") };
            assert_eq!(target.unit(), Some(unit), "{cpu}");
        }
        for without in ["x86-64-v4", "alderlake"].map(|name| Target::named(name).expect("it is in the table")) {
            assert_eq!(Target { activations: Activations::Int8, ..without }.bulk_tile(), None);
        }
    }

    #[test]
    fn old_and_unknown_cpus_are_told_apart() {
        let old = Target::named("ivybridge").expect_err("it has no AVX2").to_string();
        assert!(old.contains("`ivybridge` lacks AVX2") && old.contains("x86-64-v3"), "{old}");
        let unknown = Target::named("pentium-mmx-2").expect_err("there is none").to_string();
        assert!(unknown.contains("`sapphirerapids`") && unknown.contains("`native`"), "{unknown}");
    }

    #[test]
    fn this_machine_is_named_native_and_cranelift_narrows_it() {
        let native = Target::named("native").expect("tests run on x86-64-v3 or better");
        assert_eq!(native.cpu, "native");
        let narrow = native.clone().for_cranelift();
        assert_eq!((narrow.vector_bits, narrow.vector_registers), (128, 16));
        assert_eq!(narrow.features, native.features);
        assert!(!narrow.required_features().contains(&"avx512f"));
    }
}
