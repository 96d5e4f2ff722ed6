//! Sequences in company: who runs with whom changes no token.

use super::*;

/// The answers to a batch of token ids.
fn answers(line: &str, ids: &Json, model: &mut Counter) -> Vec<Json> {
    let out = generate(&format!("--json {line}"), &ids.to_string(), model, &no_files()).unwrap();
    let json: Json = serde_json::from_str(&out).unwrap();
    json["sequences"].as_array().unwrap().iter().map(|s| s["tokens"].clone()).collect()
}

const SAMPLED: &str = "--temperature 1.5 --top-p 0.95 --min-p 0.01 --repetition-penalty 1.2 --presence-penalty 0.3 \
     --frequency-penalty 0.2 --logit-bias 4=1 --seed 11 -n 20";

#[test]
fn tokens_do_not_depend_on_batch_or_steps() {
    let ids = json!([[1, 2, 3, 4, 5], [7], [1, 2, 3, 4, 5], [30, 31], [8, 8, 8], [2]]);
    let alone = answers(&format!("{SAMPLED} --batch 1"), &ids, &mut Counter::noisy(40));
    assert_ne!(alone[0], alone[2], "sequences with one prompt differ");
    for more in ["--batch 2", "--batch 16", "--batch 3 --step-tokens 2", "--batch 4 --step-tokens 1"] {
        assert_eq!(answers(&format!("{SAMPLED} {more}"), &ids, &mut Counter::noisy(40)), alone, "{more}");
    }
    let greedy = answers("--temperature 0 -n 20 --batch 1", &ids, &mut Counter::noisy(40));
    assert_eq!(greedy[0], greedy[2]);
    assert_eq!(answers("--temperature 0 -n 20 --batch 4", &ids, &mut Counter::noisy(40)), greedy);
}

#[test]
fn tokens_do_not_depend_on_drafts() {
    let ids = json!([[1, 2, 3, 4, 5], [7], [30, 31], [8, 8, 8], [2]]);
    for how in [SAMPLED, "--temperature 0 -n 20", "--temperature 0.4 -n 20 --frequency-penalty 1 --seed 2"] {
        let plain = answers(&format!("{how} --draft-tokens 0"), &ids, &mut Counter::noisy(40));
        for more in ["--draft-tokens 1", "--draft-tokens 3 --batch 2", "--draft-tokens auto --batch 3 --step-tokens 2"]
        {
            let mut model = Counter { drafts: true, ..Counter::noisy(40) };
            assert_eq!(answers(&format!("{how} {more}"), &ids, &mut model), plain, "{how} {more}");
            assert!(model.pending.is_empty() && model.histories.iter().all(Option::is_none));
        }
    }
}

#[test]
fn sequences_enter_where_others_leave() {
    let mut model = Counter { slots: 2, ..Counter::new(50, 100) };
    // eos is 9: the first ends after 1 token, the second after 4
    let json = generate_json("-n 4 --batch 2", "[[8], [20], [30, 31, 32], [7]]", &mut model);
    let tokens: Vec<_> = json["sequences"].as_array().unwrap().iter().map(|s| s["tokens"].clone()).collect();
    assert_eq!(tokens, [json!([9]), json!([21, 22, 23, 24]), json!([33, 34, 35, 36]), json!([8, 9])]);
    assert_eq!(model.steps, [vec![1, 1], vec![1, 3], vec![1, 1], vec![1, 1], vec![1, 1], vec![1]]);
    assert_eq!(model.histories, [None, None, None, None], "all are given back");
}

#[test]
fn a_bad_prompt_is_found_before_anything_runs() {
    let mut model = Counter::new(20, 4);
    assert!(generate("-n 4", "[[1], [2, 25]]", &mut model, &no_files()).is_err());
    assert!(model.steps.is_empty());
}
