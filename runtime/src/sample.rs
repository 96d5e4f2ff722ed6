//! Choosing the next token from logits: greedy, or drawn after temperature, top-k and top-p.
//!
//! Random numbers are counter-based: a draw depends on the seed, the sequence and the position alone, so a seed gives the
//! same tokens whatever else runs in the same step.

/// Why no token can be chosen.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// A setting is out of its range.
    #[error("`{name}` is {value}, expected {expected}")]
    Setting {
        /// The option.
        name: &'static str,
        /// What was given.
        value: f32,
        /// What it may be.
        expected: &'static str,
    },
    /// The model gave something that is no probability.
    #[error(
        "logit {index} is {value}, expected a finite number: the weights are damaged, or too large for this arithmetic"
    )]
    NotFinite {
        /// Which token.
        index: usize,
        /// Its logit.
        value: f32,
    },
    /// There is nothing to choose from.
    #[error("no logits to choose a token from")]
    Empty,
}

/// How to choose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 chooses the largest.
    pub temperature: f32,
    /// Only the `top_k` most probable tokens are considered; 0 considers all.
    pub top_k: usize,
    /// Of those, the fewest whose probabilities sum to `top_p`; 1 considers all.
    pub top_p: f32,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// Checks the ranges.
    /// # Errors
    /// [`SampleError::Setting`] for the first that is out of range.
    pub fn check(&self) -> Result<(), SampleError> {
        let bad = |name, value, expected| Err(SampleError::Setting { name, value, expected });
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return bad("temperature", self.temperature, "a finite number, 0 or more");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return bad("top_p", self.top_p, "above 0 and at most 1");
        }
        Ok(())
    }

    /// Chooses the token at `position` of sequence `sequence`.
    /// # Errors
    /// [`SampleError`] if there are no logits, or one is NaN or +infinity.
    pub fn choose(&self, logits: &[f32], sequence: u32, position: u32) -> Result<u32, SampleError> {
        let best = greedy(logits)?;
        if self.temperature == 0.0 || self.top_k == 1 {
            return Ok(best);
        }
        let mut candidates = self.weigh(logits, logits[best as usize]);
        self.keep_top(&mut candidates);
        let total: f64 = candidates.iter().map(|c| c.weight).sum();
        let goal = uniform(self.seed, sequence, position) * total;
        let mut sum = 0.0;
        let drawn = candidates.iter().find(|c| {
            sum += c.weight;
            sum > goal
        });
        Ok(drawn.or(candidates.last()).map_or(best, |c| c.token))
    }

    /// `exp((logit - largest) / temperature)` of each token.
    fn weigh(&self, logits: &[f32], largest: f32) -> Vec<Candidate> {
        let temperature = f64::from(self.temperature);
        let weight = |x: f32| ((f64::from(x) - f64::from(largest)) / temperature).exp();
        (0u32..).zip(logits).map(|(token, &x)| Candidate { token, weight: weight(x) }).collect()
    }

    /// Leaves the most probable candidates, in descending order where a bound applies.
    fn keep_top(&self, candidates: &mut Vec<Candidate>) {
        if self.top_k > 0 && self.top_k < candidates.len() {
            candidates.select_nth_unstable_by(self.top_k, Candidate::by_rank);
            candidates.truncate(self.top_k);
            candidates.sort_unstable_by(Candidate::by_rank);
        }
        if self.top_p < 1.0 {
            let total: f64 = candidates.iter().map(|c| c.weight).sum();
            let kept = fewest_with(candidates, f64::from(self.top_p) * total);
            candidates.truncate(kept);
        }
    }
}

/// A token with its probability, not normalised.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    token: u32,
    weight: f64,
}

impl Candidate {
    /// Descending by weight, the lower token first among equals.
    fn by_rank(a: &Self, b: &Self) -> std::cmp::Ordering {
        b.weight.total_cmp(&a.weight).then(a.token.cmp(&b.token))
    }
}

/// Sorts as many of the largest to the front as are needed to reach `goal`, and says how many they are.
fn fewest_with(candidates: &mut [Candidate], goal: f64) -> usize {
    let mut sorted = 64;
    loop {
        if sorted < candidates.len() {
            candidates.select_nth_unstable_by(sorted, Candidate::by_rank);
        }
        let front = sorted.min(candidates.len());
        candidates[..front].sort_unstable_by(Candidate::by_rank);
        let mut sum = 0.0;
        for (i, c) in candidates[..front].iter().enumerate() {
            sum += c.weight;
            if sum >= goal {
                return i + 1;
            }
        }
        if front == candidates.len() {
            return front;
        }
        sorted *= 8;
    }
}

/// The token with the largest logit, the lowest among equals.
/// # Errors
/// [`SampleError`] if there are none, or one is NaN or +infinity.
pub fn greedy(logits: &[f32]) -> Result<u32, SampleError> {
    let mut best = 0;
    for (index, &value) in logits.iter().enumerate() {
        if value.is_nan() || value == f32::INFINITY {
            return Err(SampleError::NotFinite { index, value });
        }
        if value > logits[best] {
            best = index;
        }
    }
    match logits.get(best) {
        None => Err(SampleError::Empty),
        Some(&value) if value == f32::NEG_INFINITY => Err(SampleError::NotFinite { index: best, value }),
        Some(_) => Ok(u32::try_from(best).expect("a vocabulary has fewer than 2^32 tokens")),
    }
}

/// What a random number is for; draws of one position for different purposes are independent.
const PURPOSE_TOKEN: u32 = 0;

/// A number in [0, 1) with 53 random bits.
fn uniform(seed: u64, sequence: u32, position: u32) -> f64 {
    let key = [seed as u32, (seed >> 32) as u32];
    let random = philox4x32([position, sequence, PURPOSE_TOKEN, 0], key);
    let bits = (u64::from(random[0]) << 32 | u64::from(random[1])) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

/// Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xd251_1f53;
        let b = u64::from(counter[2]) * 0xcd9e_8d57;
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_vectors() {
        let check = |counter, key, expected| assert_eq!(philox4x32(counter, key), expected);
        check([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        check([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        check(
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        );
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals_and_refuses_what_is_no_number() {
        assert_eq!(greedy(&[1.0, 3.0, 3.0, f32::NEG_INFINITY]), Ok(1));
        assert_eq!(greedy(&[-0.0, 0.0]), Ok(0));
        assert_eq!(greedy(&[]), Err(SampleError::Empty));
        assert!(matches!(greedy(&[1.0, f32::NAN]), Err(SampleError::NotFinite { index: 1, .. })));
        assert!(matches!(greedy(&[f32::INFINITY]), Err(SampleError::NotFinite { index: 0, .. })));
        assert!(matches!(greedy(&[f32::NEG_INFINITY]), Err(SampleError::NotFinite { index: 0, .. })));
    }

    /// How often each token is drawn over many positions, as a share.
    fn shares(sampling: Sampling, logits: &[f32]) -> Vec<f64> {
        let draws = 40_000;
        let mut counts = vec![0.0; logits.len()];
        for position in 0..draws {
            counts[sampling.choose(logits, 7, position).unwrap() as usize] += 1.0 / f64::from(draws);
        }
        counts
    }

    fn check_shares(sampling: Sampling, logits: &[f32], expected: &[f64]) {
        let shares = shares(sampling, logits);
        for (share, expected) in shares.iter().zip(expected) {
            // four standard deviations of a share of 40000 draws are at most 0.01
            assert!((share - expected).abs() < 0.01 && (*expected > 0.0 || *share == 0.0), "{sampling:?}: {shares:?}");
        }
    }

    #[test]
    fn draws_follow_the_distribution() {
        let logits = [0.4f32, 0.1, 0.3, 0.2].map(f32::ln);
        let at = |temperature, top_k, top_p| Sampling { temperature, top_k, top_p, seed: 3 };
        check_shares(at(1.0, 0, 1.0), &logits, &[0.4, 0.1, 0.3, 0.2]);
        check_shares(at(0.5, 0, 1.0), &logits, &[16.0 / 30.0, 1.0 / 30.0, 9.0 / 30.0, 4.0 / 30.0]);
        check_shares(at(1.0, 2, 1.0), &logits, &[4.0 / 7.0, 0.0, 3.0 / 7.0, 0.0]);
        check_shares(at(1.0, 0, 0.69), &logits, &[4.0 / 7.0, 0.0, 3.0 / 7.0, 0.0]);
        check_shares(at(1.0, 0, 0.71), &logits, &[4.0 / 9.0, 0.0, 3.0 / 9.0, 2.0 / 9.0]);
        check_shares(at(1.0, 3, 0.5), &logits, &[4.0 / 7.0, 0.0, 3.0 / 7.0, 0.0]);
        check_shares(at(0.0, 0, 1.0), &logits, &[1.0, 0.0, 0.0, 0.0]);
        check_shares(at(2.0, 1, 1.0), &logits, &[1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn top_p_of_a_flat_large_vocabulary_counts_right() {
        let mut candidates: Vec<_> = (0..5000).map(|token| Candidate { token, weight: 1.0 }).collect();
        assert_eq!(fewest_with(&mut candidates, 2000.0), 2000);
        assert!(candidates[..2000].iter().map(|c| c.token).eq(0..2000));
        assert_eq!(fewest_with(&mut candidates, 1e9), 5000);
    }

    #[test]
    fn same_seed_same_token_other_seed_others() {
        let logits = vec![0.0; 1000];
        let draw = |seed, sequence, position| {
            Sampling { temperature: 1.0, seed, ..Sampling::default() }.choose(&logits, sequence, position).unwrap()
        };
        let run = |seed, sequence| (0..20).map(|p| draw(seed, sequence, p)).collect::<Vec<_>>();
        assert_eq!(run(1, 0), run(1, 0));
        assert_ne!(run(1, 0), run(2, 0));
        assert_ne!(run(1, 0), run(1 << 40, 0));
        assert_ne!(run(1, 0), run(1, 1));
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let check = |sampling: Sampling, expected: &str| {
            assert!(sampling.check().unwrap_err().to_string().starts_with(expected));
        };
        check(Sampling { temperature: -1.0, ..Sampling::default() }, "`temperature` is -1");
        check(Sampling { temperature: f32::NAN, ..Sampling::default() }, "`temperature` is NaN");
        check(Sampling { top_p: 0.0, ..Sampling::default() }, "`top_p` is 0");
        check(Sampling { top_p: 1.5, ..Sampling::default() }, "`top_p` is 1.5");
        assert_eq!(Sampling::default().check(), Ok(()));
    }
}
