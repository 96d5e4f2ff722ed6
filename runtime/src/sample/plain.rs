//! How the models of tests choose: as the settings are described, by sorting.

use super::{Choosing, SampleError};

/// The token after a row of logits.
/// # Errors
/// [`SampleError`] if there is none.
pub(crate) fn choose(logits: &[f32], choosing: &Choosing<'_>) -> Result<u32, SampleError> {
    let (sampling, edits) = (choosing.sampling, choosing.edits);
    let mut scores: Vec<(usize, f64)> = logits.iter().map(|&x| f64::from(x)).enumerate().collect();
    for ((&token, &count), &bias) in edits.tokens.iter().zip(&edits.counts).zip(&edits.biases) {
        let x = &mut scores[token as usize].1;
        *x += f64::from(bias);
        if count >= 0 {
            *x = if *x < 0.0 { *x * sampling.repetition_penalty } else { *x / sampling.repetition_penalty };
        }
        if count > 0 {
            *x -= sampling.presence_penalty + sampling.frequency_penalty * f64::from(count);
        }
    }
    scores.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let (best, largest) = scores[0];
    if !largest.is_finite() {
        return Err(SampleError::of_row(logits));
    }
    if sampling.temperature == 0.0 {
        return Ok(best as u32);
    }
    let weight = |x: f64| ((x - largest) / sampling.temperature).exp();
    let sum = |scores: &[(usize, f64)]| scores.iter().map(|s| weight(s.1)).sum::<f64>();
    if sampling.top_k > 0 {
        scores.truncate(sampling.top_k);
    }
    let goal = sampling.top_p * sum(&scores);
    let kept = (1..scores.len()).find(|&n| sum(&scores[..n]) >= goal);
    scores.truncate(kept.unwrap_or(scores.len()));
    scores.retain(|s| weight(s.1) >= sampling.min_p);
    let mut random = crate::random::Random(
        sampling.seed ^ (u64::from(choosing.sequence) << 40) ^ (u64::from(choosing.position) << 8),
    );
    let mut left = (random.next_bits() >> 11) as f64 / (1u64 << 53) as f64 * sum(&scores);
    let drawn = scores.iter().find(|s| {
        left -= weight(s.1);
        left < 0.0
    });
    Ok(drawn.unwrap_or(&scores[0]).0 as u32)
}
