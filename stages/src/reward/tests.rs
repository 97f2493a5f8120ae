//! A reward model on a small file: it learns, it resumes to the bit, and its scale comes with it.

use std::fs;
use std::path::PathBuf;

use super::*;
use crate::sft;
use crate::testing::{SMALL, launch, rated, results};

/// A configuration, and the folder of a model to start from.
fn prepare(dir: &Path) -> (Config, PathBuf) {
    let mut config = rated(dir, 400, SMALL);
    config.sft.max_steps = Some(2);
    sft::run(&launch(&config, None), &dir.join("sft"), None).unwrap();
    config.reward.init = Some(dir.join("sft/export").display().to_string());
    (config, dir.join("reward"))
}

#[test]
fn it_learns_to_rank_and_keeps_its_scale() {
    let dir = tempfile::tempdir().unwrap();
    let (config, out) = prepare(dir.path());
    assert_eq!(run(&launch(&config, None), &out, None).unwrap(), Outcome::Finished);
    let measured = results(&out);
    assert!(measured[field::EVAL_ACCURACY].as_f64().unwrap() > 0.8, "{measured}");
    let loaded = models::load(out.join("export").to_str().unwrap(), Head::Scalar).unwrap();
    assert!(!loaded.missing_score);
    let scale = loaded.reward_scale.unwrap();
    assert_eq!(Some(scale.mean), measured[field::REWARD_MEAN].as_f64());
    assert_eq!(Some(scale.std), measured[field::REWARD_STD].as_f64());
    assert!(models::load(out.join("export").to_str().unwrap(), Head::Language).is_err());
}

#[test]
fn stopped_and_resumed_is_uninterrupted_to_the_bit() {
    let dir = tempfile::tempdir().unwrap();
    let (mut config, parts) = prepare(dir.path());
    config.reward.max_steps = Some(9);
    config.reward.pairs.per_text = 1;
    config.reward.pairs_per_step = 40;
    config.reward.epochs = 4;
    let whole = dir.path().join("whole");
    assert_eq!(run(&launch(&config, None), &whole, None).unwrap(), Outcome::Finished);
    for steps in [1, 4] {
        assert_eq!(run(&launch(&config, Some(steps)), &parts, None).unwrap(), Outcome::Stopped);
    }
    assert_eq!(run(&launch(&config, None), &parts, None).unwrap(), Outcome::Finished);
    let export = |out: &Path| fs::read(out.join("export/model.safetensors")).unwrap();
    assert!(export(&whole) == export(&parts));
    assert_eq!(results(&whole)[field::EVAL_ACCURACY], results(&parts)[field::EVAL_ACCURACY]);
}

#[test]
fn scores_stand_at_the_last_token() {
    assert_eq!(last_rows(&Packed::from_sequences([vec![1, 2, 3], vec![4], vec![5, 6]])), [2, 3, 5]);
}

#[test]
fn ratings_are_needed_where_they_are_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (mut config, out) = prepare(dir.path());
    config.data.sources[0].fields.text = Some("text".into());
    config.reward.pairs.source = crate::config::PairSource::Rows;
    let error = run(&launch(&config, None), &out, None).unwrap_err();
    assert!(error.to_string().contains("rated.jsonl:") && error.exit_code() as u8 == 3, "{error}");
    assert!(!out.exists(), "nothing is begun with data that cannot be used");
}
