//! A process that dies at any call of a save, an export or a removal leaves the old state or the new one, and the next
//! process can go on.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Fault, FaultyVfs, leftovers};
use serde_json::json;
use tandem_store::{Result, RunDir};

/// Publishes step `step` with contents that depend on it.
fn save(run: &RunDir, step: u64) -> Result<()> {
    let mut staging = run.checkpoints().stage(step)?;
    staging.write("model.safetensors", format!("weights of step {step}").repeat(50).as_bytes())?;
    staging.write("optimizer.safetensors", &[step as u8; 300])?;
    staging.publish(json!({ "step": step })).map(drop)
}

fn check_step(run: &RunDir, allowed: &[u64]) -> u64 {
    let (step, published) = run.checkpoints().newest_valid().unwrap().expect("a state is left");
    assert!(allowed.contains(&step), "step {step}");
    assert_eq!(published.read("model.safetensors").unwrap(), format!("weights of step {step}").repeat(50).as_bytes());
    assert_eq!(published.meta()["step"], step);
    step
}

/// Runs `work` on a run directory with steps 1 and 2, dying at call 0, 1, 2, … until it survives; after each death a new
/// process opens the directory and is handed to `check`. Returns the number of calls.
fn die_everywhere(
    vfs: FaultyVfs,
    prepare: impl Fn(&RunDir),
    work: impl Fn(&RunDir) -> Result<()>,
    check: impl Fn(&RunDir, &Path),
) -> usize {
    for at in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::open_with(dir.path(), Arc::new(vfs.clone())).unwrap();
        prepare(&run);
        vfs.arm(at, Fault::Kill);
        let survived = work(&run).is_ok() && vfs.ops().len() <= at;
        drop(run);
        vfs.disarm();
        let next = RunDir::open(dir.path()).unwrap();
        check(&next, dir.path());
        assert_eq!(leftovers(dir.path()), [""; 0], "died at {at}");
        assert_eq!(leftovers(&dir.path().join("checkpoints")), [""; 0], "died at {at}");
        if survived {
            return at;
        }
    }
    unreachable!("the work ends")
}

fn two_steps(run: &RunDir) {
    save(run, 1).unwrap();
    save(run, 2).unwrap();
}

#[test]
fn a_save_is_atomic_and_never_wedges() {
    let calls = die_everywhere(
        FaultyVfs::default(),
        two_steps,
        |run| save(run, 3),
        |run, _| {
            let step = check_step(run, &[2, 3]);
            // Live: whatever happened, the next process makes progress, and making a step again is harmless.
            save(run, step).unwrap();
            save(run, step + 1).unwrap();
            check_step(run, &[step + 1]);
        },
    );
    assert!(calls >= 10, "every call is visited, {calls} were");
}

#[test]
fn a_removal_never_leaves_a_half_deleted_entry() {
    die_everywhere(
        FaultyVfs::default(),
        |run| (1..=5).for_each(|step| save(run, step).unwrap()),
        |run| run.checkpoints().retain(2),
        |run, _| {
            check_step(run, &[5]);
            for step in run.checkpoints().numbers().unwrap() {
                assert!(run.checkpoints().open(step).unwrap().is_some(), "step {step} is whole");
            }
            run.checkpoints().retain(2).unwrap();
            assert_eq!(run.checkpoints().numbers().unwrap(), [4, 5]);
        },
    );
}

fn export(run: &RunDir, text: &str) -> Result<()> {
    let mut staging = run.stage_export()?;
    staging.write("config.json", text.as_bytes())?;
    staging.publish(json!({})).map(drop)
}

#[test]
fn an_export_is_the_old_one_or_the_new_one() {
    die_everywhere(
        FaultyVfs::default(),
        |run| {
            two_steps(run);
            export(run, "old").unwrap();
        },
        |run| export(run, "new"),
        |run, root| {
            let found = tandem_store::Published::open(&root.join("export")).unwrap().read("config.json").unwrap();
            assert!(found == b"old" || found == b"new");
            export(run, "newer").unwrap();
            assert_eq!(std::fs::read(root.join("export/config.json")).unwrap(), b"newer");
        },
    );
}

#[test]
fn an_export_without_name_swapping_is_never_a_mixture() {
    die_everywhere(
        FaultyVfs::without_exchange(),
        |run| {
            two_steps(run);
            export(run, "old").unwrap();
        },
        |run| export(run, "new"),
        |run, root| {
            // Between the two renames there is no export at all; making it again is always possible.
            if root.join("export").exists() {
                let found = tandem_store::Published::open(&root.join("export")).unwrap().read("config.json").unwrap();
                assert!(found == b"old" || found == b"new");
            }
            export(run, "newer").unwrap();
        },
    );
}

#[test]
fn the_run_file_is_the_old_one_or_the_new_one() {
    die_everywhere(
        FaultyVfs::default(),
        |run| {
            two_steps(run);
            run.write_run_file("old").unwrap();
        },
        |run| run.write_run_file("new"),
        |run, _| {
            let text = run.read_run_file().unwrap().unwrap();
            assert!(text == "old" || text == "new");
        },
    );
}

#[test]
fn setting_aside_loses_nothing() {
    die_everywhere(
        FaultyVfs::default(),
        two_steps,
        |run| run.set_aside().map(drop),
        |run, root| {
            let here = root.join("checkpoints/step-2/manifest.json").exists();
            let aside = root.join("previous-1/checkpoints/step-2/manifest.json").exists();
            assert!(here != aside);
            save(run, 3).unwrap();
        },
    );
}
