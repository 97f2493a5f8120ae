//! What is said of the answers of two models.

use super::*;

fn said(text: &str, tokens: usize, finish: Finish) -> Answer {
    Answer { prompt: "p".into(), text: text.into(), ids: vec![1; tokens], logp: vec![-1.0; tokens], finish }
}

#[test]
fn pairs_of_words_are_counted_over_all_texts() {
    // a b, b c | a b, b d: three distinct ones of four.
    assert_eq!(distinct2(["a b c", "A  b d"].into_iter()), 0.75);
    assert_eq!(distinct2(["alone", ""].into_iter()), 0.0);
}

#[test]
fn measures_by_hand() {
    let answers = [said("a b", 2, Finish::Stop), said("a b", 4, Finish::Length)];
    let measures = measure(&answers, &[1.0, 3.0], Some(&[0.0, 0.5]));
    let expected = Measures {
        reward_mean: 2.0,
        reward_std: 1.0,
        positive: Some(0.5),
        distinct2: 0.5,
        length_mean: 3.0,
        eos_rate: 0.5,
    };
    assert_eq!(measures, expected);
    assert_eq!(measure(&answers, &[1.0, 3.0], None).positive, None);
}

fn comparison(positive: Option<f64>) -> Comparison {
    let before =
        Measures { reward_mean: 0.0, reward_std: 0.5, positive, distinct2: 0.8, length_mean: 20.0, eos_rate: 0.5 };
    let after = Measures { reward_mean: 1.0, distinct2: 0.6, ..before };
    let (before_text, after_text) = ("bad\x1b[2J".to_owned(), "good".to_owned());
    let sample = SamplePair {
        prompt: "It is".into(),
        before: before_text,
        reward_before: -0.5,
        after: after_text,
        reward_after: 1.5,
    };
    Comparison { prompts: 2, before, after, gain_sd: Some(2.0), kl_mean: 7.5, samples: vec![sample] }
}

#[test]
fn results_can_be_read_back() {
    for positive in [Some(0.25), None] {
        let comparison = comparison(positive);
        let results = comparison.results();
        assert_eq!(results["reward/mean_after"], 1.0);
        assert_eq!(results["distinct2_before"], 0.8);
        assert_eq!(results["kl/mean"], 7.5);
        assert_eq!(Comparison::from_results(&results).unwrap(), comparison);
    }
    assert_eq!(Comparison::from_results(&Map::new()), None);
}

#[test]
fn the_table_has_what_there_is() {
    let shown = comparison(Some(0.25)).to_string();
    for part in ["2 held-out prompts", "+2.00 SD", "+0.0 points", "7.50", "x 0.75", "It is", "+1.50 | good"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    assert!(!shown.contains('\x1b'));
    assert!(!comparison(None).to_string().contains("judge"));
}
