//! A run that is stopped after any step and started again ends with the very bytes of one that was never stopped.

use std::fs;
use std::path::Path;

use tandem_engine::{Precision, WeightFormat};
use tandem_stages::cli::Outcome;
use tandem_stages::config::Config;
use tandem_stages::stop::StopFlag;
use tandem_stages::{ppo, reward, sft};
use tandem_tests::runs::{Stage, assert_same, config, launch, traces, write_data};

/// Stops `stage` after each of its safe points in turn and lets it go on.
fn stopped_anywhere_equals_uninterrupted(stage: Stage, config: &Config, pipeline: &Path, whole: &Path, work: &Path) {
    assert_eq!(stage(&launch(config, StopFlag::default()), whole, Some(pipeline)).unwrap(), Outcome::Finished);
    let want = traces(whole);
    assert!(want.keys().any(|name| name.ends_with("model.safetensors")), "{:?}", want.keys());
    let mut stops = 0;
    for safe_points in 0.. {
        let dir = work.join(format!("stopped-{safe_points}"));
        let outcome = stage(&launch(config, StopFlag::after(safe_points)), &dir, Some(pipeline)).unwrap();
        if outcome == Outcome::Finished {
            break;
        }
        stops += 1;
        let outcome = stage(&launch(config, StopFlag::default()), &dir, Some(pipeline)).unwrap();
        assert_eq!(outcome, Outcome::Finished);
        assert_same(&want, &traces(&dir), &format!("stopped at safe point {safe_points}"));
    }
    assert!(stops >= 5, "only {stops} stops");
}

#[test]
fn every_stage_resumes_bit_for_bit_from_any_step() {
    let temp = tempfile::tempdir().unwrap();
    let data = temp.path().join("data.jsonl");
    write_data(&data);
    let config = config(&data);
    let pipeline = temp.path().join("pipeline");
    let stages: [(&str, Stage); 3] = [("sft", sft::run), ("reward", reward::run), ("ppo", ppo::run)];
    for (name, stage) in stages {
        let work = temp.path().join(format!("work-{name}"));
        fs::create_dir_all(&work).unwrap();
        stopped_anywhere_equals_uninterrupted(stage, &config, &pipeline, &pipeline.join(name), &work);
    }
}

/// Reference, reward model and rollouts in 8 bits: what was recorded is not what is learnt from, the gap is reported, and a
/// run that is stopped in the middle of an iteration reports the same.
#[test]
fn ppo_with_weights_of_8_bits_resumes_bit_for_bit() {
    let temp = tempfile::tempdir().unwrap();
    let data = temp.path().join("data.jsonl");
    write_data(&data);
    let mut config = config(&data);
    config.run.precision = Precision::Bf16;
    let pipeline = temp.path().join("pipeline");
    let stages: [(&str, Stage); 2] = [("sft", sft::run), ("reward", reward::run)];
    for (name, stage) in stages {
        stage(&launch(&config, StopFlag::default()), &pipeline.join(name), Some(&pipeline)).unwrap();
    }
    config.ppo.reward.rules = None;
    let plain = temp.path().join("plain");
    assert_eq!(ppo::run(&launch(&config, StopFlag::default()), &plain, Some(&pipeline)).unwrap(), Outcome::Finished);
    config.reference.weights = WeightFormat::Int8;
    config.reward_model.weights = WeightFormat::Int8;
    config.ppo.rollout_weights = WeightFormat::Int8;
    let (whole, work) = (pipeline.join("ppo"), temp.path().join("work"));
    fs::create_dir_all(&work).unwrap();
    stopped_anywhere_equals_uninterrupted(ppo::run, &config, &pipeline, &whole, &work);

    let rows = |dir: &Path| -> Vec<serde_json::Value> {
        let log = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
        log.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    for row in rows(&plain) {
        assert_eq!((row["logp_gap/max"].as_f64(), row.get("logp_gap/mean")), (Some(0.0), None), "{row}");
    }
    for row in rows(&whole) {
        let [mean, max] = ["logp_gap/mean", "logp_gap/max"].map(|name| row[name].as_f64().unwrap());
        // Half a percent of each weight, of log-probabilities of about 5.
        assert!(0.0 < mean && mean < max && max < 0.5, "{row}");
    }
    // The log-probabilities that are learnt from are those of the actor: the first ratio of an iteration is 1. With one update
    // in each, so is the largest.
    config.ppo.epochs = 1;
    config.ppo.mini_batches = 1;
    let once = temp.path().join("once");
    ppo::run(&launch(&config, StopFlag::default()), &once, Some(&pipeline)).unwrap();
    for row in rows(&once) {
        assert_eq!(row["ratio/max"].as_f64(), Some(1.0), "{row}");
        assert!(row["logp_gap/mean"].as_f64().unwrap() > 0.0);
    }
    // Another format is another run.
    config.ppo.rollout_weights = WeightFormat::Precision;
    config.reference.weights = WeightFormat::Precision;
    let error = ppo::run(&launch(&config, StopFlag::default()), &once, Some(&pipeline)).unwrap_err().to_string();
    assert!(error.contains("ppo.rollout_weights") && error.contains("reference.weights"), "{error}");
}

#[test]
fn the_results_do_not_depend_on_how_sequences_are_packed() {
    // Recompute is a matter of memory alone: the same bits.
    let temp = tempfile::tempdir().unwrap();
    let data = temp.path().join("data.jsonl");
    write_data(&data);
    let mut config = config(&data);
    let run = |config: &Config, name: &str| {
        let dir = temp.path().join(name);
        sft::run(&launch(config, StopFlag::default()), &dir, None).unwrap();
        fs::read(dir.join("export/model.safetensors")).unwrap()
    };
    let kept = run(&config, "kept");
    config.sft.recompute = true;
    assert!(kept == run(&config, "recomputed"), "recomputing activations changed the result");
}
