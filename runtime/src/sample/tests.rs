use super::*;

#[test]
fn edits_are_biases_and_what_prompt_and_output_have() {
    let check = |sampling: &Sampling, output: &[u32], expected: &[(i32, i32, f32)]| {
        let mut edits = Edits::new(sampling, &[5, 1, 5]);
        output.iter().for_each(|&token| edits.push(token));
        let found: Vec<(i32, i32, f32)> =
            (0..edits.tokens.len()).map(|i| (edits.tokens[i], edits.counts[i], edits.biases[i])).collect();
        assert_eq!(found, expected);
    };
    check(&Sampling::default(), &[7, 7], &[]);
    let biased = Sampling { logit_bias: vec![(9, 1.5), (1, -2.0), (9, 0.5)], ..Sampling::default() };
    check(&biased, &[7, 7, 9], &[(1, -1, -2.0), (9, -1, 2.0)]);
    for penalised in [
        Sampling { repetition_penalty: 1.1, ..biased.clone() },
        Sampling { presence_penalty: 1.1, ..biased.clone() },
        Sampling { frequency_penalty: -1.1, ..biased },
    ] {
        check(&penalised, &[], &[(1, 0, -2.0), (5, 0, 0.0), (9, -1, 2.0)]);
        check(&penalised, &[7, 9, 7, 5, 0], &[(0, 1, 0.0), (1, 0, -2.0), (5, 1, 0.0), (7, 2, 0.0), (9, 1, 2.0)]);
    }
}

#[test]
fn a_row_without_a_token_says_why() {
    let check = |logits: &[f32], expected: &str| {
        let message = SampleError::of_row(logits).to_string();
        assert!(message.starts_with(expected), "{message}");
    };
    check(&[1.0, f32::NAN, f32::INFINITY], "logit 1 is NaN, expected a finite number");
    check(&[f32::NEG_INFINITY, f32::INFINITY], "logit 1 is inf");
    check(&[f32::NEG_INFINITY; 2], "logit 0 is -inf");
    check(&[1.0, f32::NEG_INFINITY], "biases and penalties leave no finite logit");
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
