//! The description of a machine that code is made for. No other file holds a number of one machine.

/// A machine and the choices made for it.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// The CPU as named on the command line: `native`, `x86-64-v3`, `x86-64-v4`, `sapphirerapids`, ...
    pub cpu: String,
    /// Instruction-set features in LLVM's spelling: `avx2`, `fma`, `f16c`, `avx512f`, ...
    pub features: Vec<String>,
    /// Bits of a vector register that the backend uses: 128, 256 or 512.
    pub vector_bits: u32,
    /// Vector registers.
    pub vector_registers: u32,
    /// Threads that share the work by default.
    pub threads: u32,
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
}

impl Target {
    /// A target with a backend that uses `vector_bits`; measured limits are those of a plain 2-core server.
    pub fn cpu(name: &str, features: &[&str], vector_bits: u32) -> Self {
        Self {
            cpu: name.to_owned(),
            features: features.iter().map(|&s| s.to_owned()).collect(),
            vector_bits,
            vector_registers: if vector_bits == 512 { 32 } else { 16 },
            threads: 2,
            page_tokens: 64,
            max_context: 0,
            read_bytes_per_s: 27.5e9,
            flops_per_s: 50e9 * f64::from(vector_bits) / 64.0,
            launch_ns: 500.0,
        }
    }

    /// The micro-kernel that fits the registers: two accumulators for each 16 rows and token, and room for weights.
    pub fn matmul_tile(&self) -> MatmulTile {
        match self.vector_bits {
            512 => MatmulTile { row_tiles: 2, tokens: 4 },
            256 => MatmulTile { row_tiles: 1, tokens: 2 },
            _ => MatmulTile { row_tiles: 1, tokens: 1 },
        }
    }
}
