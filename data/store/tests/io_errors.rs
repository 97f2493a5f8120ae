//! A full or failing disk at any call: a typed error, nothing left behind, the old state untouched, a later try works.

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{EIO, ENOSPC, Fault, FaultyVfs, Op, leftovers};
use serde_json::json;
use tandem_store::{Result, RunDir, StoreError};

fn save(run: &RunDir, step: u64) -> Result<()> {
    let mut staging = run.checkpoints().stage(step)?;
    staging.write("model.safetensors", &[step as u8; 1000])?;
    std::fs::write(staging.dir().join("adopted.bin"), [step as u8; 10]).unwrap();
    staging.adopt("adopted.bin")?;
    staging.publish(json!({ "step": step })).map(drop)
}

#[test]
fn every_failing_call_is_survived() {
    for errno in [ENOSPC, EIO] {
        for at in 0.. {
            let vfs = FaultyVfs::default();
            let dir = tempfile::tempdir().unwrap();
            let run = RunDir::open_with(dir.path(), Arc::new(vfs.clone())).unwrap();
            save(&run, 1).unwrap();
            vfs.arm(at, Fault::Errno(errno));
            let outcome = save(&run, 2);
            let reached = vfs.ops().len() > at;
            vfs.disarm();
            if !reached {
                outcome.unwrap();
                break;
            }
            let error = outcome.unwrap_err();
            match errno {
                ENOSPC => assert!(matches!(error, StoreError::NoSpace { .. }), "call {at}: {error}"),
                _ => assert!(matches!(error, StoreError::Device { .. }), "call {at}: {error}"),
            }
            assert!(error.is_retryable());
            assert_eq!(leftovers(&dir.path().join("checkpoints")), [""; 0], "call {at}");
            assert_eq!(run.checkpoints().open(1).unwrap().unwrap().read("model.safetensors").unwrap(), [1; 1000]);
            save(&run, 2).unwrap();
            assert_eq!(run.checkpoints().newest_valid().unwrap().unwrap().0, 2);
        }
    }
}

/// What a power loss can take away is what was not synced. Replays the calls of a publish and checks that at the commit
/// point everything under the staging name was on the device, and that the new name was too before success was reported.
#[test]
fn everything_is_synced_before_the_commit_point() {
    let vfs = FaultyVfs::default();
    let dir = tempfile::tempdir().unwrap();
    let run = RunDir::open_with(dir.path(), Arc::new(vfs.clone())).unwrap();
    vfs.disarm();
    save(&run, 1).unwrap();
    run.write_run_file("{}").unwrap();
    let mut unsynced: BTreeSet<PathBuf> = BTreeSet::new();
    let mut commits = 0;
    for op in vfs.ops() {
        match op {
            Op::CreateDir(path) => _ = unsynced.insert(path),
            Op::CreateFile(path) => {
                // Both the data and the name have to reach the device.
                unsynced.insert(parent(&path));
                unsynced.insert(path);
            }
            Op::Write(path) => _ = unsynced.insert(path),
            Op::SyncFile(path) | Op::SyncDir(path) => _ = unsynced.remove(&path),
            Op::Rename(from, to) => {
                commits += 1;
                let under: Vec<_> = unsynced.iter().filter(|path| path.starts_with(&from)).collect();
                assert!(under.is_empty(), "renamed before it was synced: {under:?}");
                unsynced.insert(parent(&to));
            }
            Op::Exchange(..) | Op::Remove(_) => {}
        }
    }
    assert_eq!(commits, 2);
    assert!(unsynced.is_empty(), "reported as done before it was synced: {unsynced:?}");
}

fn parent(path: &Path) -> PathBuf {
    path.parent().unwrap().to_path_buf()
}

#[test]
fn too_little_space_is_said_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let run = RunDir::open(dir.path()).unwrap();
    run.check_free_space(1).unwrap();
    let error = run.check_free_space(u64::MAX).unwrap_err();
    assert!(matches!(error, StoreError::NoSpace { .. }), "{error}");
}

#[test]
fn places_that_cannot_hold_a_run_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a file");
    std::fs::write(&file, "x").unwrap();
    for place in [file.clone(), file.join("below")] {
        let error = RunDir::open(&place).unwrap_err();
        assert!(error.to_string().contains("a file"), "{error}");
    }
    std::fs::create_dir(dir.path().join("run")).unwrap();
    std::fs::write(dir.path().join("run/checkpoints"), "x").unwrap();
    let error = RunDir::open(&dir.path().join("run")).unwrap_err();
    assert!(error.to_string().contains("checkpoints"), "{error}");
}
