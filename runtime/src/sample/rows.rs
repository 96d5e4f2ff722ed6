//! The tables that say how each row of a step is sampled, as the compiled function reads them.

use nextc_abi::sampling::ROW_STRIDE;
use nextc_abi::{Choice, Factor};

use super::{Choosing, Edits};
use crate::step::SamplingInputs;

/// How a row is sampled, and which tokens of the step count as output before it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row<'a> {
    /// None if nobody wants its token.
    pub choosing: Option<Choosing<'a>>,
    /// First of the tokens, and how many.
    pub drafts: (usize, usize),
}

/// Tables for rows in order. Neighbouring rows of one list share it.
pub(crate) fn tables(rows: &[Row<'_>]) -> SamplingInputs {
    let mut tables = SamplingInputs::default();
    let mut list: Option<(&Edits, usize)> = None;
    for row in rows {
        let first = match (row.choosing, list) {
            (None, _) => 0,
            (Some(c), Some((edits, first))) if std::ptr::eq(edits, c.edits) => first,
            (Some(c), _) => append(&mut tables, c.edits),
        };
        list = row.choosing.map(|c| (c.edits, first)).or(list);
        push(&mut tables, row, first);
    }
    tables
}

/// Adds a list; says where it begins.
fn append(tables: &mut SamplingInputs, edits: &Edits) -> usize {
    let first = tables.edit_tokens.len();
    tables.edit_tokens.extend_from_slice(&edits.tokens);
    tables.edit_counts.extend_from_slice(&edits.counts);
    tables.edit_biases.extend_from_slice(&edits.biases);
    first
}

fn push(tables: &mut SamplingInputs, row: &Row<'_>, first_edit: usize) {
    let (mut factors, mut choices) = ([0.0; ROW_STRIDE], [0; ROW_STRIDE]);
    for factor in Factor::ALL {
        factors[factor as usize] = row.factor(factor);
    }
    for choice in Choice::ALL {
        choices[choice as usize] = row.choice(choice, first_edit);
    }
    tables.factors.extend_from_slice(&factors);
    tables.choices.extend_from_slice(&choices);
}

impl Row<'_> {
    /// A number; where nobody chooses, the one that changes nothing.
    fn factor(&self, factor: Factor) -> f32 {
        let sampling = self.choosing.map(|c| c.sampling);
        let of = |get: fn(&super::Sampling) -> f64, neutral: f64| sampling.map_or(neutral, get) as f32;
        match factor {
            Factor::Temperature => of(|s| s.temperature, 0.0),
            Factor::TopP => of(|s| s.top_p, 1.0),
            Factor::MinP => of(|s| s.min_p, 0.0),
            Factor::RepetitionPenalty => of(|s| s.repetition_penalty, 1.0),
            Factor::PresencePenalty => of(|s| s.presence_penalty, 0.0),
            Factor::FrequencyPenalty => of(|s| s.frequency_penalty, 0.0),
        }
    }

    fn choice(&self, choice: Choice, first_edit: usize) -> i32 {
        let Some(c) = self.choosing else { return 0 };
        let bits = |word: u32| word.cast_signed();
        let index = |i: usize| i32::try_from(i).unwrap_or(i32::MAX);
        match choice {
            Choice::TopK => index(c.sampling.top_k),
            Choice::SeedLow => bits(c.sampling.seed as u32),
            Choice::SeedHigh => bits((c.sampling.seed >> 32) as u32),
            Choice::Sequence => bits(c.sequence),
            Choice::Position => bits(c.position),
            Choice::FirstEdit => index(first_edit),
            Choice::EndEdit => index(first_edit + c.edits.tokens.len()),
            Choice::FirstDraft => index(self.drafts.0),
            Choice::EndDraft => index(self.drafts.0 + self.drafts.1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Sampling;
    use super::*;

    #[test]
    fn rows_of_a_sequence_share_its_list() {
        let sampling = Sampling { presence_penalty: 1.0, top_k: 5, seed: 7 << 32 | 9, ..Sampling::default() };
        let (a, b) = (Edits::new(&sampling, &[4, 4, 2]), Edits::new(&sampling, &[8]));
        let choosing = |edits, position| Some(Choosing { sampling: &sampling, edits, sequence: 3, position });
        let rows = [
            Row { choosing: choosing(&a, 10), drafts: (1, 0) },
            Row { choosing: choosing(&a, 11), drafts: (1, 1) },
            Row { choosing: None, drafts: (0, 0) },
            Row { choosing: choosing(&b, 20), drafts: (3, 0) },
        ];
        let tables = tables(&rows);
        assert_eq!(
            (tables.edit_tokens.as_slice(), tables.edit_counts.as_slice()),
            ([2, 4, 8].as_slice(), [0; 3].as_slice())
        );
        let choices: Vec<&[i32]> = tables.choices.chunks(ROW_STRIDE).map(|row| &row[..9]).collect();
        assert_eq!(choices[0], [5, 9, 7, 3, 10, 0, 2, 1, 1]);
        assert_eq!(choices[1], [5, 9, 7, 3, 11, 0, 2, 1, 2]);
        assert_eq!(choices[2], [0; 9]);
        assert_eq!(choices[3], [5, 9, 7, 3, 20, 2, 3, 3, 3]);
        let factors: Vec<&[f32]> = tables.factors.chunks(ROW_STRIDE).map(|row| &row[..6]).collect();
        assert_eq!(
            (factors[0], factors[2]),
            ([0.0, 1.0, 0.0, 1.0, 1.0, 0.0].as_slice(), [0.0, 1.0, 0.0, 1.0, 0.0, 0.0].as_slice())
        );
    }
}
