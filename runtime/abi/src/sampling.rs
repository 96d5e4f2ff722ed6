//! The columns of the tables that say how rows of logits are sampled. `ir/src/ops/sample.rs` declares the same for the compiler's
//! graph; a test of the linker compares them.

/// Numbers from one row of `factors` or `choices` to the next.
pub const ROW_STRIDE: usize = 16;

/// A column of `factors`, f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Factor {
    /// Divides the logits; 0 chooses the largest.
    Temperature,
    /// Of the tokens that `top_k` keeps, the fewest whose probabilities sum to it; 1 keeps all.
    TopP,
    /// Of those, the ones at least so many times as probable as the first; 0 keeps all.
    MinP,
    /// Divides positive logits of tokens that prompt or output have, multiplies negative ones; 1 changes nothing.
    RepetitionPenalty,
    /// Subtracted from the logit of a token that the output has.
    PresencePenalty,
    /// Subtracted from the logit of a token as often as the output has it.
    FrequencyPenalty,
}

/// A column of `choices`, i32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Only so many of the most probable tokens, the lower first among equals; 0 keeps all.
    TopK,
    /// Lower half of the seed.
    SeedLow,
    /// Upper half of the seed.
    SeedHigh,
    /// The number of the sequence.
    Sequence,
    /// The position of the token that is chosen.
    Position,
    /// First of the row's edits.
    FirstEdit,
    /// Behind the last of them.
    EndEdit,
    /// First of the step's tokens that count as output before this row.
    FirstDraft,
    /// Behind the last of them.
    EndDraft,
}

impl Factor {
    /// Every column, in order.
    pub const ALL: [Self; 6] = [
        Self::Temperature,
        Self::TopP,
        Self::MinP,
        Self::RepetitionPenalty,
        Self::PresencePenalty,
        Self::FrequencyPenalty,
    ];
}

impl Choice {
    /// Every column, in order.
    pub const ALL: [Self; 9] = [
        Self::TopK,
        Self::SeedLow,
        Self::SeedHigh,
        Self::Sequence,
        Self::Position,
        Self::FirstEdit,
        Self::EndEdit,
        Self::FirstDraft,
        Self::EndDraft,
    ];
}
