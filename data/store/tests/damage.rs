//! Damaged entries are found whatever the damage, older ones are used, and nothing foreign is touched.

use std::fs;
use std::path::Path;

use serde_json::json;
use tandem_store::{Published, RunDir, StoreError};

fn save(run: &RunDir, step: u64) {
    let mut staging = run.checkpoints().stage(step).unwrap();
    staging.write("model.safetensors", &(0..200u8).collect::<Vec<_>>()).unwrap();
    staging.write("empty", b"").unwrap();
    staging.publish(json!({ "step": step, "lr": 1e-3 })).unwrap();
}

fn run_with_steps(steps: &[u64]) -> (tempfile::TempDir, RunDir) {
    let dir = tempfile::tempdir().unwrap();
    let run = RunDir::open(dir.path()).unwrap();
    steps.iter().for_each(|&step| save(&run, step));
    (dir, run)
}

#[test]
fn every_cut_and_every_flipped_bit_is_found() {
    let (_dir, run) = run_with_steps(&[1]);
    let entry = run.checkpoints().path(1);
    for name in ["model.safetensors", "empty", "manifest.json"] {
        let path = entry.join(name);
        let good = fs::read(&path).unwrap();
        for length in 0..good.len() {
            fs::write(&path, &good[..length]).unwrap();
            assert!(matches!(Published::open(&entry), Err(StoreError::Corrupt { .. })), "{name} cut to {length}");
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            fs::write(&path, &bad).unwrap();
            assert!(matches!(Published::open(&entry), Err(StoreError::Corrupt { .. })), "{name} byte {at}");
        }
        fs::write(&path, [&good[..], b"x"].concat()).unwrap();
        assert!(Published::open(&entry).is_err(), "{name} with a byte more");
        fs::remove_file(&path).unwrap();
        let error = Published::open(&entry).unwrap_err();
        assert!(error.to_string().contains(name) && error.to_string().contains("missing"), "{error}");
        fs::write(&path, &good).unwrap();
        Published::open(&entry).unwrap();
    }
}

#[test]
fn bytes_changed_after_opening_are_found_when_read() {
    let (_dir, run) = run_with_steps(&[1]);
    let published = run.checkpoints().open(1).unwrap().unwrap();
    let path = published.path("model.safetensors").unwrap();
    fs::write(&path, [7; 200]).unwrap();
    assert!(matches!(published.read("model.safetensors"), Err(StoreError::Corrupt { .. })));
    assert!(published.read("no such file").is_err());
}

#[test]
fn the_newest_intact_entry_is_used_and_the_damaged_one_set_aside() {
    let (dir, run) = run_with_steps(&[2, 9, 10]);
    fs::write(run.checkpoints().path(10).join("model.safetensors"), [0; 200]).unwrap();
    assert_eq!(run.checkpoints().newest_valid().unwrap().unwrap().0, 9);
    assert!(dir.path().join("checkpoints/quarantine-step-10").is_dir());
    // Step 10 is made again, is damaged again, and both remains are kept.
    save(&run, 10);
    fs::remove_file(run.checkpoints().path(10).join("manifest.json")).unwrap();
    assert!(run.checkpoints().open(10).unwrap().is_none());
    assert!(dir.path().join("checkpoints/quarantine-step-10.2").is_dir());
    assert_eq!(run.checkpoints().numbers().unwrap(), [2, 9]);
}

#[test]
fn publishing_over_a_damaged_entry_sets_it_aside() {
    let (dir, run) = run_with_steps(&[1]);
    fs::write(run.checkpoints().path(1).join("empty"), "not empty").unwrap();
    save(&run, 1);
    run.checkpoints().open(1).unwrap().unwrap();
    assert!(dir.path().join("checkpoints/quarantine-step-1").is_dir());
}

#[test]
fn a_run_whose_every_state_is_damaged_never_starts_over_by_itself() {
    let (_dir, run) = run_with_steps(&[1, 2]);
    for step in [1, 2] {
        fs::remove_file(run.checkpoints().path(step).join("empty")).unwrap();
    }
    for _ in 0..2 {
        let error = run.checkpoints().newest_valid().unwrap_err();
        assert!(matches!(error, StoreError::NoneValid { .. }));
        assert!(error.to_string().contains("--resume never"), "{error}");
    }
    run.set_aside().unwrap().unwrap();
    assert!(run.checkpoints().newest_valid().unwrap().is_none());
}

#[test]
fn an_entry_of_another_kind_is_not_taken_for_one() {
    let (_dir, run) = run_with_steps(&[1]);
    fs::rename(run.checkpoints().path(1), run.experience().path(1)).unwrap();
    assert!(run.experience().open(1).unwrap().is_none());
}

#[test]
fn foreign_names_and_links_are_left_alone() {
    let (dir, run) = run_with_steps(&[1, 2, 3]);
    let outside = dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("precious"), "x").unwrap();
    let checkpoints = dir.path().join("checkpoints");
    for name in ["step-9-bak", "step-007", "step-", ".tmp-mine", "latest"] {
        fs::create_dir(checkpoints.join(name)).unwrap();
    }
    std::os::unix::fs::symlink(&outside, checkpoints.join("step-99")).unwrap();
    let planted = format!(".tmp-{}-step-5", "0".repeat(32));
    std::os::unix::fs::symlink(&outside, checkpoints.join(&planted)).unwrap();
    let own = format!(".trash-{}-step-4", "a".repeat(32));
    fs::create_dir(checkpoints.join(&own)).unwrap();
    fs::write(checkpoints.join(&own).join("model.safetensors"), "x").unwrap();
    drop(run);

    let run = RunDir::open(dir.path()).unwrap();
    assert_eq!(run.checkpoints().numbers().unwrap(), [1, 2, 3]);
    run.checkpoints().retain(2).unwrap();
    assert_eq!(run.checkpoints().newest_valid().unwrap().unwrap().0, 3);
    assert!(!checkpoints.join(&own).exists(), "our own leftovers are swept");
    assert!(checkpoints.join(&planted).symlink_metadata().is_err());
    for name in ["step-9-bak", "step-007", "step-", ".tmp-mine", "latest"] {
        assert!(checkpoints.join(name).is_dir(), "{name}");
    }
    assert_eq!(fs::read_to_string(outside.join("precious")).unwrap(), "x");
}

#[test]
fn names_are_checked_when_written() {
    let (_dir, run) = run_with_steps(&[]);
    let mut staging = run.checkpoints().stage(1).unwrap();
    staging.write("a", b"").unwrap();
    for name in ["a", "manifest.json", "../a", "", "b/c"] {
        assert!(matches!(staging.write(name, b""), Err(StoreError::Name { .. })), "{name:?}");
    }
}

#[test]
fn retention_keeps_a_fallback() {
    let (_dir, run) = run_with_steps(&[1, 2, 3]);
    assert!(matches!(run.checkpoints().retain(1), Err(StoreError::KeepTooFew { keep_last: 1 })));
    run.checkpoints().retain(3).unwrap();
    assert_eq!(run.checkpoints().numbers().unwrap(), [1, 2, 3]);
}

#[test]
fn a_directory_taken_over_publishes_nothing_more() {
    let (dir, run) = run_with_steps(&[1]);
    fs::write(dir.path().join("LOCK"), r#"{"id":"other","pid":1,"host":"elsewhere"}"#).unwrap();
    let staging = run.checkpoints().stage(2).unwrap();
    assert!(matches!(staging.publish(json!({})), Err(StoreError::Locked { .. })));
    assert!(matches!(run.write_run_file("x"), Err(StoreError::Locked { .. })));
    assert!(!Path::new(&run.checkpoints().path(2)).exists());
}
