//! Samples that are too long.

use tandem_data::Encoded;
use tandem_data::length::{LengthReport, OverLong, fit, fit_pair, fit_prompt};

fn sample(prompt: u32, response: u32) -> Encoded {
    Encoded { ids: (0..prompt).chain(100..100 + response).collect(), prompt_len: prompt as usize }
}

#[test]
fn what_fits_is_left_alone() {
    for policy in [OverLong::TruncateLeft, OverLong::TruncateRight, OverLong::Drop] {
        let mut report = LengthReport::default();
        assert_eq!(fit(sample(3, 2), 5, policy, &mut report), Some(sample(3, 2)));
        assert_eq!(report, LengthReport { whole: 1, ..LengthReport::default() });
    }
}

#[test]
fn each_policy_cuts_what_it_says() {
    let mut report = LengthReport::default();
    let left = fit(sample(4, 2), 5, OverLong::TruncateLeft, &mut report).unwrap();
    assert_eq!((left.prompt(), left.response()), ([1, 2, 3].as_slice(), [100, 101].as_slice()));
    let right = fit(sample(4, 3), 5, OverLong::TruncateRight, &mut report).unwrap();
    assert_eq!((right.prompt(), right.response()), ([0, 1, 2, 3].as_slice(), [100].as_slice()));
    assert_eq!(fit(sample(4, 2), 5, OverLong::Drop, &mut report), None);
    assert_eq!(fit(sample(2, 5), 5, OverLong::TruncateLeft, &mut report), None, "no prompt would be left");
    assert_eq!(fit(sample(5, 2), 5, OverLong::TruncateRight, &mut report), None, "no response would be left");
    assert_eq!(report, LengthReport { truncated: 2, too_long: 3, ..LengthReport::default() });
}

#[test]
fn pairs_keep_one_prompt_and_differ() {
    let mut report = LengthReport::default();
    let (chosen, rejected) = fit_pair(sample(4, 3), sample(4, 1), 5, OverLong::TruncateLeft, &mut report).unwrap();
    assert_eq!(chosen.prompt(), rejected.prompt());
    assert_eq!(chosen.ids.len(), 5);
    assert!(fit_pair(sample(2, 2), sample(2, 2), 5, OverLong::Drop, &mut report).is_none());
    // 100 101 102 103 and 100 101 are the same once cut to two.
    assert!(fit_pair(sample(3, 4), sample(3, 2), 5, OverLong::TruncateRight, &mut report).is_none());
    assert_eq!(report, LengthReport { truncated: 1, identical: 2, ..LengthReport::default() });
}

#[test]
fn prompts_lose_their_beginning() {
    let mut report = LengthReport::default();
    assert_eq!(fit_prompt(vec![1, 2, 3], 2, OverLong::TruncateLeft, &mut report), Some(vec![2, 3]));
    assert_eq!(fit_prompt(vec![1, 2, 3], 2, OverLong::Drop, &mut report), None);
    assert_eq!(fit_prompt(vec![1, 2, 3], 0, OverLong::TruncateLeft, &mut report), None);
}

#[test]
fn losing_most_samples_is_an_error() {
    let fine = LengthReport { whole: 1, too_long: 1, ..LengthReport::default() };
    fine.check("data").unwrap();
    let lost = LengthReport { whole: 1, too_long: 1, identical: 1, ..LengthReport::default() };
    let error = lost.check("reward pairs").unwrap_err().to_string();
    assert!(error.contains("reward pairs: 2 of 3 samples were dropped (1 too long, 1 with"), "{error}");
    assert!(LengthReport::default().check("data").is_err(), "nothing at all is no training data");
}
