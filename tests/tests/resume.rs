//! A run that is stopped after any step and started again ends with the very bytes of one that was never stopped.

use std::fs;
use std::path::Path;

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
