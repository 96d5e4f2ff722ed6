//! Tokens that an executable samples, with and without speculation, have the distribution that the model's own probabilities say.
//!
//! The probabilities are computed here, from the logits that `eval` writes for the very sequences that were generated, by sorting.
//! A token's place in the cumulative distribution of its position, spread over its own share by an independent random number, is
//! uniform on [0, 1) if and only if tokens are drawn from that distribution; so is it whichever order the tokens are cumulated in.
//! Pearson's chi-squared test of 20 equal bins says whether it is, at a significance of 0.001 for each of the tests; seeds are fixed.

mod support;

use support::exe::Exe;
use support::golden::fixture;
use support::{Feed, Subject};

const SEQUENCES: usize = 300;
const NEW_TOKENS: usize = 10;
const BINS: usize = 20;
/// What a chi-squared number of 19 degrees of freedom exceeds with probability 0.001.
const CRITICAL: f64 = 43.82;

/// `--temperature`, `--top-k`, `--top-p`, `--min-p`.
const SETTINGS: [(f64, usize, f64, f64); 4] =
    [(1.0, 0, 1.0, 0.0), (0.7, 5, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (0.9, 12, 0.9, 0.1)];

/// The probabilities of all tokens after processing, and the tokens by rank.
fn probabilities(logits: &[f32], (temperature, top_k, top_p, min_p): (f64, usize, f64, f64)) -> (Vec<f64>, Vec<usize>) {
    let x = |t: usize| f64::from(logits[t]);
    let mut ranked: Vec<usize> = (0..logits.len()).collect();
    ranked.sort_by(|&a, &b| x(b).total_cmp(&x(a)));
    let weight = |t: usize| ((x(t) - x(ranked[0])) / temperature).exp();
    let mut kept = ranked.clone();
    kept.truncate(if top_k == 0 { usize::MAX } else { top_k });
    let total: f64 = kept.iter().map(|&t| weight(t)).sum();
    let mut sum = 0.0;
    let enough = kept.iter().position(|&t| {
        sum += weight(t);
        sum >= top_p * total * (1.0 - 1e-12)
    });
    kept.truncate(enough.map_or(kept.len(), |i| i + 1));
    kept.retain(|&t| weight(t) >= min_p);
    let total: f64 = kept.iter().map(|&t| weight(t)).sum();
    let mut p = vec![0.0; logits.len()];
    kept.iter().for_each(|&t| p[t] = weight(t) / total);
    (p, ranked)
}

/// Uniform numbers that have nothing to do with those of the sampler: SplitMix64.
struct Random(u64);

impl Random {
    fn one(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn chi_squared(places: &[f64]) -> f64 {
    let mut bins = [0u32; BINS];
    places.iter().for_each(|p| bins[((p * BINS as f64) as usize).min(BINS - 1)] += 1);
    let expected = places.len() as f64 / BINS as f64;
    bins.iter().map(|&n| (f64::from(n) - expected).powi(2) / expected).sum()
}

/// The places of all new tokens in their distributions, cumulated by id and by rank.
fn places(exe: &Exe, prompts: &[Vec<i32>], new: &[Vec<i32>], setting: (f64, usize, f64, f64)) -> [Vec<f64>; 2] {
    let whole: Vec<Vec<i32>> = prompts.iter().zip(new).map(|(prompt, new)| [prompt.as_slice(), new].concat()).collect();
    let rows = exe.logits(&whole, Feed::Prefill, 0);
    let (mut random, mut places) = (Random(9), [Vec::new(), Vec::new()]);
    for ((prompt, new), rows) in prompts.iter().zip(new).zip(&rows) {
        let vocab = rows.logits.len() / (prompt.len() + new.len());
        for (i, &token) in new.iter().enumerate() {
            let row = (prompt.len() + i - 1) * vocab;
            let (p, ranked) = probabilities(&rows.logits[row..row + vocab], setting);
            let token = token as usize;
            assert!(p[token] > 0.0, "{setting:?}: token {token} is ruled out");
            let by_id: f64 = p[..token].iter().sum();
            let by_rank: f64 = ranked.iter().take_while(|&&t| t != token).map(|&t| p[t]).sum();
            for (places, before) in places.iter_mut().zip([by_id, by_rank]) {
                places.push(before + random.one() * p[token]);
            }
        }
    }
    places
}

#[test]
fn sampled_tokens_have_the_models_distribution_with_and_without_drafts() {
    let exe = Exe::build(&fixture("tiny"), "cranelift", &[]);
    let prompts: Vec<Vec<i32>> = (0..SEQUENCES as i32).map(|i| vec![7 + i % 3, 30, 200 + i % 5]).collect();
    for (s, setting) in SETTINGS.into_iter().enumerate() {
        for drafts in [0, 1, 3] {
            let (temperature, top_k, top_p, min_p) = setting;
            let ids = exe.ids(&prompts);
            let line = format!(
                "--temperature {temperature} --top-k {top_k} --top-p {top_p} --min-p {min_p} --draft-tokens {drafts} \
                 --seed {} -n {NEW_TOKENS} --batch 100 --ignore-eos --json",
                1000 + 10 * s + drafts
            );
            let args: Vec<&str> = ["--tokens", ids.to_str().unwrap()].into_iter().chain(line.split(' ')).collect();
            let answer = exe.json("generate", &args);
            let answers = answer["sequences"].as_array().expect("a batch");
            let new: Vec<Vec<i32>> =
                answers.iter().map(|a| serde_json::from_value(a["tokens"].clone()).unwrap()).collect();
            assert!(new.iter().all(|tokens| tokens.len() == NEW_TOKENS));
            let accepted: u64 = answers.iter().map(|a| a["mtp"]["accepted"].as_u64().unwrap()).sum();
            assert_eq!(accepted > 0, drafts > 0, "{setting:?}, {drafts} drafts");
            let [by_id, by_rank] = places(&exe, &prompts, &new, setting).map(|places| chi_squared(&places));
            println!(
                "{setting:?}, {drafts} drafts, {accepted} accepted: chi-squared {by_id:.1} by id, {by_rank:.1} by rank"
            );
            assert!(by_id < CRITICAL && by_rank < CRITICAL, "{setting:?}, {drafts} drafts: {by_id}, {by_rank}");
            if setting == SETTINGS[0] {
                // the test can tell: at another temperature the same tokens do not have the distribution
                let [_, wrong] = places(&exe, &prompts, &new, (1.25, 0, 1.0, 0.0)).map(|places| chi_squared(&places));
                assert!(wrong > CRITICAL, "{drafts} drafts: {wrong}");
            }
        }
    }
}
