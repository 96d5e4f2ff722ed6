//! Logarithms of the probabilities that the model itself gives, before any processor.

/// A token with the logarithm of its probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Logprob {
    /// The token.
    pub token: u32,
    /// `ln p`, at most 0.
    pub logprob: f64,
}

/// What the model thought of a token, and what it held for more or equally likely.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// The token that stands there.
    pub token: Logprob,
    /// The most probable ones, in descending order.
    pub top: Vec<Logprob>,
}

impl Logprobs {
    /// Of `token`, with the `top` most probable; none if the model has no such token.
    pub fn of(logits: &[f32], token: u32, top: usize) -> Option<Self> {
        let chosen = f64::from(*logits.get(token as usize)?);
        let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let total: f64 = logits.iter().map(|&x| (f64::from(x) - largest).exp()).sum();
        let log_total = largest + total.ln();
        let top = most_probable(logits, top).into_iter();
        let top = top.map(|token| Logprob { token, logprob: f64::from(logits[token as usize]) - log_total });
        Some(Self { token: Logprob { token, logprob: chosen - log_total }, top: top.collect() })
    }
}

/// The `count` tokens with the largest logits, in descending order, the lower first among equals.
fn most_probable(logits: &[f32], count: usize) -> Vec<u32> {
    let mut tokens: Vec<u32> = (0..).zip(logits).map(|(token, _)| token).collect();
    let by_rank = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if count == 0 {
        return Vec::new();
    }
    if count < tokens.len() {
        tokens.select_nth_unstable_by(count - 1, by_rank);
        tokens.truncate(count);
    }
    tokens.sort_unstable_by(by_rank);
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithms_of_probabilities_by_hand() {
        let logits = [0.1f32, 0.4, 0.3, 0.2].map(|p| p.ln() + 50.0);
        let got = Logprobs::of(&logits, 3, 2).unwrap();
        let near = |a: &Logprob, token: u32, p: f64| {
            assert!(a.token == token && (a.logprob - p.ln()).abs() < 1e-5, "{a:?}");
        };
        near(&got.token, 3, 0.2);
        assert_eq!(got.top.len(), 2);
        near(&got.top[0], 1, 0.4);
        near(&got.top[1], 2, 0.3);
        assert_eq!(Logprobs::of(&logits, 0, 0).unwrap().top, []);
        assert_eq!(Logprobs::of(&logits, 0, 99).unwrap().top.len(), 4);
        assert_eq!(Logprobs::of(&logits, 4, 1), None);
    }

    #[test]
    fn equals_are_in_the_order_of_their_ids_and_huge_logits_do_no_harm() {
        assert_eq!(most_probable(&[1.0, 2.0, 2.0, 2.0], 3), [1, 2, 3]);
        let got = Logprobs::of(&[3e38, -3e38], 1, 1).unwrap();
        assert!(got.top[0].logprob == 0.0 && got.token.logprob < -1e38);
    }
}
