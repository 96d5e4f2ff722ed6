use super::*;

fn choose(sampling: &Sampling, logits: &[f32], sequence: u32, position: u32) -> u32 {
    sampling.choose(logits, &History::default(), sequence, position).unwrap()
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
fn shares(sampling: &Sampling, logits: &[f32]) -> Vec<f64> {
    let draws = 40_000;
    let mut counts = vec![0.0; logits.len()];
    for position in 0..draws {
        counts[choose(sampling, logits, 7, position) as usize] += 1.0 / f64::from(draws);
    }
    counts
}

fn check_shares(sampling: &Sampling, logits: &[f32], expected: &[f64]) {
    let shares = shares(sampling, logits);
    for (share, expected) in shares.iter().zip(expected) {
        // four standard deviations of a share of 40000 draws are at most 0.01
        assert!((share - expected).abs() < 0.01 && (*expected > 0.0 || *share == 0.0), "{sampling:?}: {shares:?}");
    }
}

#[test]
fn draws_follow_the_distribution() {
    let logits = [0.4f32, 0.1, 0.3, 0.2].map(f32::ln);
    let check = |temperature, top_k, top_p, min_p, expected: [f64; 4]| {
        let sampling = Sampling { temperature, top_k, top_p, min_p, seed: 3, ..Sampling::default() };
        check_shares(&sampling, &logits, &expected);
    };
    check(1.0, 0, 1.0, 0.0, [0.4, 0.1, 0.3, 0.2]);
    check(0.5, 0, 1.0, 0.0, [16.0 / 30.0, 1.0 / 30.0, 9.0 / 30.0, 4.0 / 30.0]);
    check(1.0, 2, 1.0, 0.0, [4.0 / 7.0, 0.0, 3.0 / 7.0, 0.0]);
    check(1.0, 0, 0.69, 0.0, [4.0 / 7.0, 0.0, 3.0 / 7.0, 0.0]);
    check(1.0, 0, 0.71, 0.0, [4.0 / 9.0, 0.0, 3.0 / 9.0, 2.0 / 9.0]);
    check(1.0, 3, 0.5, 0.0, [4.0 / 7.0, 0.0, 3.0 / 7.0, 0.0]);
    check(1.0, 0, 1.0, 0.49, [4.0 / 9.0, 0.0, 3.0 / 9.0, 2.0 / 9.0]);
    check(1.0, 0, 1.0, 0.51, [4.0 / 7.0, 0.0, 3.0 / 7.0, 0.0]);
    // at temperature 0.5 the least is (1/4)^2 as probable as the most
    check(0.5, 0, 1.0, 0.06, [16.0 / 30.0, 1.0 / 30.0, 9.0 / 30.0, 4.0 / 30.0]);
    check(0.5, 0, 1.0, 0.07, [16.0 / 29.0, 0.0, 9.0 / 29.0, 4.0 / 29.0]);
    check(1.0, 0, 1.0, 1.0, [1.0, 0.0, 0.0, 0.0]);
    check(0.0, 0, 1.0, 0.0, [1.0, 0.0, 0.0, 0.0]);
    check(2.0, 1, 1.0, 0.0, [1.0, 0.0, 0.0, 0.0]);
}

/// The logits after all processors, up to a constant: logarithms of the probabilities.
fn check_logits(sampling: &Sampling, history: &History<'_>, logits: &[f32], expected: &[f64]) {
    let candidates = sampling.candidates(logits, history).unwrap();
    let constant = candidates[0].probability.ln() - expected[0];
    assert_eq!(candidates.len(), expected.len());
    for (candidate, expected) in candidates.iter().zip(expected) {
        assert!((candidate.probability.ln() - constant - expected).abs() < 1e-6, "{sampling:?}: {candidates:?}");
    }
}

#[test]
fn penalties_and_biases_are_those_computed_by_hand() {
    let logits = [1.0f32, -2.0, 3.0, 0.5, -1.0];
    let history = History { prompt: &[0, 1, 1], output: &[2, 2, 4, 2] };
    let at = |sampling: Sampling, expected: [f64; 5]| {
        check_logits(&Sampling { temperature: 1.0, ..sampling }, &history, &logits, &expected);
    };
    let plain = Sampling::default;
    at(plain(), [1.0, -2.0, 3.0, 0.5, -1.0]);
    at(Sampling { repetition_penalty: 2.0, ..plain() }, [0.5, -4.0, 1.5, 0.5, -2.0]);
    at(Sampling { presence_penalty: 0.7, ..plain() }, [1.0, -2.0, 2.3, 0.5, -1.7]);
    at(Sampling { frequency_penalty: 0.7, ..plain() }, [1.0, -2.0, 0.9, 0.5, -1.7]);
    at(Sampling { frequency_penalty: -0.5, ..plain() }, [1.0, -2.0, 4.5, 0.5, -0.5]);
    at(Sampling { logit_bias: vec![(1, 5.0), (3, -1.0), (9, 4.0)], ..plain() }, [1.0, 3.0, 3.0, -0.5, -1.0]);
    // bias before repetition: (-2 + 5) / 2; presence and frequency after it: 3 / 2 - 1 - 3 * 0.25
    let all = Sampling {
        logit_bias: vec![(1, 5.0)],
        repetition_penalty: 2.0,
        presence_penalty: 1.0,
        frequency_penalty: 0.25,
        ..plain()
    };
    at(all.clone(), [0.5, 1.5, -0.25, 0.5, -3.25]);
    let halved = Sampling { temperature: 0.5, ..all };
    check_logits(&halved, &history, &logits, &[1.0, 3.0, -0.5, 1.0, -6.5]);
}

#[test]
fn greedy_obeys_biases_and_penalties() {
    let logits = [1.0f32, 1.5, 2.0];
    let history = History { prompt: &[], output: &[2, 2] };
    let greedy = |sampling: Sampling| sampling.choose(&logits, &history, 0, 0).unwrap();
    assert_eq!(greedy(Sampling::default()), 2);
    assert_eq!(greedy(Sampling { presence_penalty: 0.6, ..Sampling::default() }), 1);
    assert_eq!(greedy(Sampling { frequency_penalty: 0.3, ..Sampling::default() }), 1);
    assert_eq!(greedy(Sampling { logit_bias: vec![(0, 100.0)], ..Sampling::default() }), 0);
    assert_eq!(greedy(Sampling { presence_penalty: 0.5, ..Sampling::default() }), 1, "the lower of equals");
    let drawn = Sampling { temperature: 1.0, top_k: 1, presence_penalty: 0.6, ..Sampling::default() };
    assert_eq!(greedy(drawn), 1);
}

#[test]
fn logits_of_minus_infinity_are_never_drawn() {
    let mut logits = vec![f32::NEG_INFINITY; 100];
    logits[40] = -3.0;
    let sampling = Sampling { temperature: 1.0, repetition_penalty: 1.5, ..Sampling::default() };
    assert!((0..100).all(|position| choose(&sampling, &logits, 0, position) == 40));
    assert_eq!(draw(&[Candidate { token: 5, probability: 0.9 }, Candidate { token: 6, probability: 0.0 }], 0.95), 5);
}

#[test]
fn same_seed_same_token_other_seed_others() {
    let logits = vec![0.0; 1000];
    let draw = |seed, sequence, position| {
        choose(&Sampling { temperature: 1.0, seed, ..Sampling::default() }, &logits, sequence, position)
    };
    let run = |seed, sequence| (0..20).map(|p| draw(seed, sequence, p)).collect::<Vec<_>>();
    assert_eq!(run(1, 0), run(1, 0));
    assert_ne!(run(1, 0), run(2, 0));
    assert_ne!(run(1, 0), run(1 << 40, 0));
    assert_ne!(run(1, 0), run(1, 1));
}

#[test]
fn settings_out_of_range_are_named() {
    for setting in SETTINGS {
        for hostile in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1e30, 1e30] {
            let mut sampling = Sampling::default();
            assert_eq!(sampling.check(), Ok(()));
            assert!(setting.check(hostile).is_err(), "{}: {hostile}", setting.range.name);
            if hostile.is_finite() && setting.range.name != "top_k" {
                (setting.set)(&mut sampling, hostile);
                let message = sampling.check().unwrap_err().to_string();
                assert!(message.starts_with(&format!("`{}` is", setting.range.name)), "{message}");
            }
        }
    }
    let check = |sampling: Sampling, expected: &str| {
        assert!(sampling.check().unwrap_err().to_string().starts_with(expected));
    };
    check(Sampling { temperature: -1.0, ..Sampling::default() }, "`temperature` is -1");
    check(Sampling { top_p: 0.0, ..Sampling::default() }, "`top_p` is 0");
    check(Sampling { repetition_penalty: 0.0, ..Sampling::default() }, "`repetition_penalty` is 0");
    check(Sampling { min_p: 1.5, ..Sampling::default() }, "`min_p` is 1.5, expected a number from 0 to 1");
    check(Sampling { logit_bias: vec![(1, f64::NAN)], ..Sampling::default() }, "`logit_bias` is NaN");
}
