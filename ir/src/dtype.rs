//! Element types: what a number is in memory and in a register.

/// The type of one element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// IEEE binary32; every activation and every sum.
    F32,
    /// IEEE binary16; weights only.
    F16,
    /// The upper half of a binary32; weights only.
    BF16,
    /// Signed 64-bit integer: indices and addresses in kernels.
    I64,
    /// Signed 32-bit integer: token ids, expert ids, positions, and raw bits in kernels.
    I32,
    /// One byte.
    U8,
    /// A truth value in a register, or a lane of a mask; never in memory.
    Bool,
}

impl DType {
    /// Every element type, in declaration order.
    pub const ALL: [Self; 7] = [Self::F32, Self::F16, Self::BF16, Self::I64, Self::I32, Self::U8, Self::Bool];

    /// The name in IR text.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::I64 => "i64",
            Self::I32 => "i32",
            Self::U8 => "u8",
            Self::Bool => "bool",
        }
    }

    /// Bytes of one element in memory (1 for `bool`, which is never stored).
    pub const fn bytes(self) -> u64 {
        match self {
            Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::U8 | Self::Bool => 1,
        }
    }

    /// The type called `name` in IR text.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|d| d.name() == name)
    }

    /// True for types whose arithmetic is floating point.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::BF16)
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
