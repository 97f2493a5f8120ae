//! SFT on a small file: it learns, it resumes to the bit, it stops when its numbers go wrong.

use std::fs;

use tandem_data::length::LengthReport;
use tandem_data::{Origin, Sampler};

use super::*;
use crate::testing::{SMALL, launch, metrics, rated, results};

fn objective(samples: &SftSamples, loss: SftLoss) -> Responses<'_> {
    Responses { samples, loss, budget: 64 }
}

fn samples(encoded: Vec<Encoded>) -> SftSamples {
    let path = std::sync::Arc::from(Path::new("x"));
    let train = encoded.into_iter().map(|encoded| SftSample { origin: Origin::line(&path, 1), encoded }).collect();
    SftSamples { train, eval: Vec::new(), digest: String::new(), report: LengthReport::default() }
}

#[test]
fn responses_are_learnt_to_their_end_and_prompts_are_not() {
    let set = samples(vec![
        Encoded { ids: vec![10, 11, 12, 13, 0], prompt_len: 2 },
        Encoded { ids: vec![20, 21, 0], prompt_len: 0 },
    ]);
    let all = || set.train.iter().map(|sample| &sample.encoded).zip(0..);
    let (batch, rows, labels) = objective(&set, SftLoss::Responses).pack(all());
    assert_eq!(batch.ids, [10, 11, 12, 13, 0, 20, 21, 0]);
    assert_eq!((rows, labels), (vec![1, 2, 3, 5, 6], vec![12, 13, 0, 21, 0]));
    let (_, rows, labels) = objective(&set, SftLoss::Everything).pack(all());
    assert_eq!((rows, labels), (vec![0, 1, 2, 3, 5, 6], vec![11, 12, 13, 0, 21, 0]));
}

#[test]
fn it_learns_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = rated(dir.path(), 400, SMALL);
    config.sft.epochs = 6;
    let out = dir.path().join("sft");
    assert_eq!(run(&launch(&config, None), &out, None).unwrap(), Outcome::Finished);
    let measured = results(&out);
    let value = |name: &str| measured[name].as_f64().unwrap();
    assert!(value(field::EVAL_PPL) < 0.5 * value(EVAL_UNIGRAM_PPL), "{measured}");
    let rows = metrics(&out);
    assert_eq!(rows.len() as u64, measured["steps"].as_u64().unwrap());
    assert_eq!(rows[rows.len() - 1][field::EVAL_PPL], measured[field::EVAL_PPL]);
    assert!(rows.iter().all(|row| row[field::TOKENS].as_u64() > Some(0)), "{rows:?}");

    let loaded = models::load(out.join("export").to_str().unwrap(), Head::Language).unwrap();
    assert_eq!(loaded.blueprint.spec().hidden, 32);
    assert_eq!(loaded.tokenizer.stop_ids(), [loaded.tokenizer.eos()]);
    let generation = fs::read_to_string(out.join("export/generation_config.json")).unwrap();
    assert!(generation.contains("\"eos_token_id\"") && generation.contains("\"temperature\""), "{generation}");
}

#[test]
fn stopped_and_resumed_is_uninterrupted_to_the_bit() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = rated(dir.path(), 300, SMALL);
    config.sft.epochs = 2;
    let export = |name: &str| fs::read(dir.path().join(name).join("export/model.safetensors")).unwrap();
    assert_eq!(run(&launch(&config, None), &dir.path().join("whole"), None).unwrap(), Outcome::Finished);
    let out = dir.path().join("parts");
    for steps in [1, 3, 2] {
        assert_eq!(run(&launch(&config, Some(steps)), &out, None).unwrap(), Outcome::Stopped);
    }
    assert_eq!(metrics(&out).len(), 6);
    assert_eq!(run(&launch(&config, None), &out, None).unwrap(), Outcome::Finished);
    assert!(export("whole") == export("parts"));
    let losses = |name: &str| -> Vec<f64> {
        metrics(&dir.path().join(name)).iter().map(|row| row[field::LOSS].as_f64().unwrap()).collect()
    };
    assert_eq!(losses("whole"), losses("parts"));
    let order: Vec<usize> = Sampler::new(5, config.run.seed).unwrap().take(5).collect();
    assert_ne!(order, [0, 1, 2, 3, 4], "the order is shuffled, so resuming has something to get wrong");
}

#[test]
fn micro_batches_change_nothing_but_rounding() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = rated(dir.path(), 200, SMALL);
    config.sft.max_steps = Some(5);
    let mut losses = Vec::new();
    for budget in [64, 4096] {
        config.sft.tokens_per_micro_batch = budget;
        let out = dir.path().join(budget.to_string());
        run(&launch(&config, None), &out, None).unwrap();
        losses.push(metrics(&out).iter().map(|row| row[field::LOSS].as_f64().unwrap()).collect::<Vec<_>>());
    }
    for (small, large) in losses[0].iter().zip(&losses[1]) {
        assert!((small - large).abs() < 1e-4 * large, "{losses:?}");
    }
}

#[test]
fn numbers_gone_wrong_end_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = rated(dir.path(), 200, SMALL);
    config.sft.optimizer.learning_rate = 1e30;
    let out = dir.path().join("sft");
    let error = run(&launch(&config, None), &out, None).unwrap_err();
    assert_eq!(error.exit_code() as u8, 4, "{error}");
    let rows = metrics(&out);
    let last = &rows[rows.len() - 1];
    assert!(last[field::LOSS].is_null() || last[field::GRAD_NORM].is_null(), "{last}");
    assert!(last["skipped_rows"][0].as_str().unwrap().contains("rated.jsonl:"), "{last}");
}

#[test]
fn a_dry_run_writes_nothing_and_finds_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = rated(dir.path(), 200, SMALL);
    let dry = |config: &Config| run(&Launch { dry_run: true, ..launch(config, None) }, &dir.path().join("sft"), None);
    assert_eq!(dry(&config).unwrap(), Outcome::Finished);
    config.data.max_tokens = 65;
    let error = dry(&config).unwrap_err();
    assert!(error.to_string().contains("data.max_tokens") && error.exit_code() as u8 == 2, "{error}");
    config.data.sources[0].path = dir.path().join("missing.jsonl");
    assert_eq!(dry(&config).unwrap_err().exit_code() as u8, 3);
    assert!(!dir.path().join("sft").exists());
}
