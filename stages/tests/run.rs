//! The life of a run directory: resuming, what may change in between, what may not, and when nothing is left to do.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tandem_collective::{Collective, Solo};
use tandem_stages::config::{Config, ConfigError, Origin, Stage};
use tandem_stages::error::{Result, StageError};
use tandem_stages::monitor::{MetricsRow, field};
use tandem_stages::run::{Resume, Run, is_due};
use tandem_store::{Staging, StoreError};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Counters {
    step: u64,
    seen: u64,
}

fn config(overrides: &[&str]) -> Config {
    let overrides: Vec<String> = overrides.iter().map(|&argument| argument.to_owned()).collect();
    Config::parse("", &Origin::Defaults, &overrides).unwrap()
}

fn open(dir: &Path, overrides: &[&str]) -> Result<Run> {
    open_as(dir, Stage::Sft, overrides, Resume::Auto)
}

fn open_as(dir: &Path, stage: Stage, overrides: &[&str], resume: Resume) -> Result<Run> {
    let world: Arc<dyn Collective> = Arc::new(Solo::default());
    Run::open(dir, stage, &config(overrides), resume, &world)
}

fn write_weights(staging: Option<&mut Staging>) -> Result<()> {
    staging.map_or(Ok(()), |staging| Ok(staging.write("model.safetensors", b"weights")?))
}

fn steps(run: &mut Run, steps: std::ops::RangeInclusive<u64>) {
    for step in steps {
        run.log(MetricsRow::new(step).set(field::LOSS, 1.0 / step as f64)).unwrap();
        if is_due(step, 2) {
            run.save(step, &Counters { step, seen: step * 10 }, write_weights).unwrap();
        }
    }
}

fn logged_steps(dir: &Path) -> Vec<u64> {
    let text = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let step = |line| serde_json::from_str::<serde_json::Value>(line).unwrap()["step"].as_u64().unwrap();
    text.lines().map(step).collect()
}

#[test]
fn a_run_continues_after_its_newest_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = open(dir.path(), &[]).unwrap();
    assert!(run.resume_point().is_none());
    steps(&mut run, 1..=5);
    drop(run);

    let mut run = open(dir.path(), &[]).unwrap();
    let point = run.resume_point().unwrap();
    assert_eq!(point.step, 4);
    assert_eq!(point.state::<Counters>().unwrap(), Counters { step: 4, seen: 40 });
    assert_eq!(point.files.read("model.safetensors").unwrap(), b"weights");
    steps(&mut run, 5..=7);
    assert_eq!(logged_steps(dir.path()), [1, 2, 3, 4, 5, 6, 7], "one row per step");
    let checkpoints = fs::read_dir(dir.path().join("checkpoints")).unwrap().count();
    assert_eq!(checkpoints, 2, "the default of keep_last");
}

#[test]
fn a_finished_run_has_nothing_left_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = open(dir.path(), &[]).unwrap();
    steps(&mut run, 1..=2);
    let export = run.finish(&serde_json::json!({ "ppl": 3.5 }), write_weights).unwrap();
    assert_eq!(export, dir.path().join("export"));
    drop(run);
    let run = open(dir.path(), &["run.threads=1"]).unwrap();
    assert!(run.is_finished());
    assert_eq!(run.record().results["ppl"], 3.5);
    assert_eq!(logged_steps(dir.path()), [1, 2]);
    drop(run);
    assert!(!open(dir.path(), &["sft.epochs=2"]).unwrap().is_finished(), "there is more to train now");
}

#[test]
fn another_plan_is_refused_with_the_differences() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path(), &[]).unwrap());
    let error = open(dir.path(), &["run.seed=1", "sft.loss=everything"]).unwrap_err();
    assert!(matches!(&error, StageError::Config(ConfigError::OtherPlan { differences, .. }) if differences.len() == 2));
    let message = error.to_string();
    assert!(message.contains("run.seed: was 0, is 1") && message.contains("--resume never"), "{message}");
    let other_stage = open_as(dir.path(), Stage::Ppo, &[], Resume::Auto).unwrap_err();
    assert!(other_stage.to_string().contains("stage: was sft, is ppo"));
    // What other stages read is none of this stage's business.
    open(dir.path(), &["ppo.gamma=0.9", "sft.optimizer.learning_rate=1e-5"]).unwrap();
}

#[test]
fn starting_over_sets_the_old_run_aside() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = open(dir.path(), &[]).unwrap();
    steps(&mut run, 1..=4);
    drop(run);
    let run = open_as(dir.path(), Stage::Sft, &["run.seed=7"], Resume::Never).unwrap();
    assert!(run.resume_point().is_none());
    assert_eq!(logged_steps(dir.path()), [0; 0]);
    assert!(dir.path().join("previous-1/checkpoints/step-4/model.safetensors").is_file());
}

#[test]
fn changed_inputs_are_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = open(dir.path(), &[]).unwrap();
    run.pin("data", "abc").unwrap();
    run.pin("data", "abc").unwrap();
    drop(run);
    let mut run = open(dir.path(), &[]).unwrap();
    run.pin("model", "m").unwrap();
    let error = run.pin("data", "xyz").unwrap_err();
    assert!(error.to_string().contains("data has changed"), "{error}");
    assert_eq!(error.exit_code() as u8, 3);
}

#[test]
fn a_directory_in_use_is_exit_code_6() {
    let dir = tempfile::tempdir().unwrap();
    let _run = open(dir.path(), &[]).unwrap();
    assert_eq!(open(dir.path(), &[]).unwrap_err().exit_code() as u8, 6);
}

#[test]
fn a_full_disk_is_put_up_with_twice() {
    let full = |_: Option<&mut Staging>| -> Result<()> {
        let source = io::ErrorKind::StorageFull.into();
        Err(StoreError::NoSpace { action: "write", path: "x".into(), source }.into())
    };
    let dir = tempfile::tempdir().unwrap();
    let mut run = open(dir.path(), &[]).unwrap();
    steps(&mut run, 1..=2);
    let counters = Counters { step: 3, seen: 0 };
    for round in 0..2 {
        run.save(3, &counters, full).unwrap();
        run.save(4, &counters, full).unwrap();
        if round == 0 {
            run.save(5, &counters, write_weights).unwrap();
        }
    }
    assert_eq!(run.save(6, &counters, full).unwrap_err().exit_code() as u8, 7);
    assert_eq!(run.save_now(6, &counters, full).unwrap_err().exit_code() as u8, 7);
    run.save_now(6, &counters, write_weights).unwrap();
}

#[test]
fn a_damaged_run_file_is_an_error_and_not_a_fresh_start() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path(), &[]).unwrap());
    fs::write(dir.path().join("run.json"), "{").unwrap();
    let error = open(dir.path(), &[]).unwrap_err();
    assert!(error.to_string().contains("run.json"), "{error}");
    assert_eq!(error.exit_code() as u8, 7);
}

#[test]
fn no_intact_checkpoint_is_exit_code_7() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = open(dir.path(), &[]).unwrap();
    steps(&mut run, 1..=4);
    drop(run);
    for step in [2, 4] {
        fs::write(dir.path().join(format!("checkpoints/step-{step}/model.safetensors")), "changed").unwrap();
    }
    assert_eq!(open(dir.path(), &[]).unwrap_err().exit_code() as u8, 7);
    open_as(dir.path(), Stage::Sft, &[], Resume::Never).unwrap();
}
