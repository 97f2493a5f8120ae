//! A run directory seen by several ranks: the leader alone writes, all know the same, and what fails for one fails for all.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tandem_collective::{Collective, Solo, Tag, Threads};
use tandem_stages::config::{Config, Lanes, Origin, Stage};
use tandem_stages::error::{ExitCode, Result, StageError};
use tandem_stages::monitor::MetricsRow;
use tandem_stages::ranks::{RankFailures, on_threads};
use tandem_stages::run::{Resume, Run};
use tandem_store::{Staging, StoreError};

/// Far longer than any test: whoever waits for it fails the test.
const DEADLINE: Duration = Duration::from_secs(600);

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Counters {
    seen: u64,
}

fn config(overrides: &[&str]) -> Config {
    let overrides: Vec<String> = overrides.iter().map(|&argument| argument.to_owned()).collect();
    Config::parse("", &Origin::Defaults, &overrides).unwrap()
}

fn open(dir: &Path, world: &Arc<dyn Collective>, overrides: &[&str]) -> Result<Run> {
    Run::open(dir, Stage::Ppo, &config(overrides), Resume::Auto, world)
}

fn on_ranks<T: Send>(ranks: usize, body: impl Fn(Arc<dyn Collective>) -> Result<T> + Sync) -> Result<Vec<T>> {
    on_threads(Threads::world(ranks, DEADLINE), Some(ranks), body)
}

fn failures<T: std::fmt::Debug>(ended: Result<Vec<T>>) -> RankFailures {
    match ended {
        Err(StageError::Ranks(failures)) => failures,
        other => panic!("{other:?}"),
    }
}

/// What a stage does: all ranks gather, the leader writes.
fn gather_and_write(world: &Arc<dyn Collective>, staging: Option<&mut Staging>) -> Result<()> {
    let mut sum = [world.rank() as f64];
    world.all_reduce_sum_f64(Tag::new("test/gather", 0), &mut sum)?;
    match staging {
        Some(staging) => Ok(staging.write("sum", sum[0].to_string().as_bytes())?),
        None => Ok(()),
    }
}

fn no_space() -> StageError {
    let source = io::ErrorKind::StorageFull.into();
    StoreError::NoSpace { action: "write", path: "x".into(), source }.into()
}

#[test]
fn the_leader_writes_and_all_continue_at_the_same_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    on_ranks(3, |world| {
        let mut run = open(path, &world, &[])?;
        assert!(run.resume_point().is_none());
        run.pin("data", "abc")?;
        for step in 1..=3 {
            run.log(&MetricsRow::new(step))?;
        }
        run.save(2, &Counters { seen: 7 }, |staging| gather_and_write(&world, staging))
    })
    .unwrap();
    assert_eq!(fs::read_to_string(path.join("checkpoints/step-2/sum")).unwrap(), "3");
    assert_eq!(fs::read_to_string(path.join("metrics.jsonl")).unwrap().lines().count(), 3, "one row per step");

    let ended = on_ranks(3, |world| {
        let mut run = open(path, &world, &[])?;
        let point = run.resume_point().unwrap();
        assert_eq!((point.step, point.state::<Counters>()?), (2, Counters { seen: 7 }));
        assert_eq!(point.files.read("sum")?, b"3");
        run.pin("data", "abc")?;
        run.finish(&serde_json::json!({ "ppl": 2.5 }), |staging| gather_and_write(&world, staging))
    });
    assert_eq!(ended.unwrap(), vec![path.join("export"); 3]);
    let finished = on_ranks(3, |world| {
        let run = open(path, &world, &[])?;
        Ok((run.is_finished(), run.record().results["ppl"].as_f64(), run.seconds() >= 0.0))
    });
    assert_eq!(finished.unwrap(), vec![(true, Some(2.5), true); 3]);
}

#[test]
fn lanes_are_those_of_the_first_start() {
    let dir = tempfile::tempdir().unwrap();
    let lanes = |ranks: usize, overrides: &[&str]| {
        on_ranks(ranks, |world| Ok(open(dir.path(), &world, overrides)?.lanes())).map(|lanes| lanes[ranks - 1])
    };
    let four = Lanes { data: 4, tensor: 1 };
    assert_eq!(lanes(4, &[]).unwrap(), four);
    assert_eq!(lanes(2, &[]).unwrap(), four);
    assert_eq!(lanes(4, &["parallel.data_lanes=4", "parallel.pipeline=2", "actor.zero_stage=3"]).unwrap(), four);
    let alone: Arc<dyn Collective> = Arc::new(Solo::default());
    assert_eq!(open(dir.path(), &alone, &[]).unwrap().lanes(), four);
    let message = failures(lanes(3, &[]).map(|lanes| vec![lanes])).to_string();
    assert!(message.contains("is 4") && message.contains("3 data-parallel ranks"), "{message}");
    let message = failures(lanes(2, &["parallel.data_lanes=2"]).map(|lanes| vec![lanes])).to_string();
    assert!(message.contains("parallel.data_lanes: was 4, is 2"), "{message}");
    let message = failures(lanes(2, &["ppo.inference_tp_size=2"]).map(|lanes| vec![lanes])).to_string();
    assert!(message.contains("`parallel.tensor_lanes` is 1") && message.contains("2 tensor-parallel"), "{message}");
}

#[test]
fn a_full_disk_of_the_leader_is_put_up_with_by_all() {
    let dir = tempfile::tempdir().unwrap();
    let full = |world: &Arc<dyn Collective>, staging: Option<&mut Staging>| {
        let is_leader = staging.is_some();
        gather_and_write(world, staging)?;
        if is_leader { Err(no_space()) } else { Ok(()) }
    };
    let ended = on_ranks(3, |world| {
        let mut run = open(dir.path(), &world, &[])?;
        let counters = Counters { seen: 1 };
        for round in 0..2 {
            run.save(1, &counters, |staging| full(&world, staging))?;
            run.save(2, &counters, |staging| full(&world, staging))?;
            if round == 0 {
                run.save(3, &counters, |staging| gather_and_write(&world, staging))?;
            }
        }
        let third = run.save(4, &counters, |staging| full(&world, staging)).unwrap_err();
        let now = run.save_now(4, &counters, |staging| full(&world, staging)).unwrap_err();
        // They are still together: the disk is free again.
        run.save_now(4, &counters, |staging| gather_and_write(&world, staging))?;
        Ok([third, now].map(|error| (error.exit_code(), error.is_echo())))
    });
    let (leader, follower) = ((ExitCode::Storage, false), (ExitCode::Communication, true));
    assert_eq!(ended.unwrap(), [[leader; 2], [follower; 2], [follower; 2]]);
    assert!(dir.path().join("checkpoints/step-4").is_dir());
}

#[test]
fn a_leader_without_a_place_to_write_still_does_its_part() {
    let dir = tempfile::tempdir().unwrap();
    let ended = on_ranks(2, |world| {
        let mut run = open(dir.path(), &world, &[])?;
        if world.rank() == 0 {
            // The directory is lost under the run.
            fs::remove_dir_all(dir.path().join("checkpoints")).unwrap();
        }
        world.barrier(Tag::new("test", 0))?;
        run.save_now(1, &Counters { seen: 1 }, |staging| {
            assert!(staging.is_none());
            gather_and_write(&world, staging)
        })
    });
    let failures = failures(ended);
    assert_eq!(failures.exit_code(), ExitCode::Storage);
    assert!(failures.to_string().contains("checkpoints"), "{failures}");
}

#[test]
fn what_a_follower_sees_is_compared_with_the_leader() {
    let dir = tempfile::tempdir().unwrap();
    let ended = on_ranks(3, |world| {
        let mut run = open(dir.path(), &world, &[])?;
        run.pin("data", if world.rank() == 2 { "other" } else { "same" })?;
        Ok(world.barrier(Tag::new("test", 0))?)
    });
    let found = failures(ended);
    assert_eq!(found.exit_code(), ExitCode::Data);
    assert!(found.to_string().starts_with("rank 2: data is not that of rank 0"), "{found}");

    let ended = on_ranks(3, |world| open(dir.path(), &world, &[])?.pin("data", "changed"));
    let found = failures(ended);
    assert_eq!(found.exit_code(), ExitCode::Data);
    assert!(found.to_string().contains("rank 0: data has changed since this run began"), "{found}");
}

#[test]
fn a_directory_that_only_the_leader_sees_is_named() {
    let dir = tempfile::tempdir().unwrap();
    on_ranks(2, |world| {
        let mut run = open(dir.path(), &world, &[])?;
        run.save_now(1, &Counters { seen: 1 }, |staging| gather_and_write(&world, staging))
    })
    .unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let ended = on_ranks(2, |world| {
        let path = if world.rank() == 0 { dir.path() } else { elsewhere.path() };
        open(path, &world, &[]).map(drop)?;
        Ok(world.barrier(Tag::new("test", 0))?)
    });
    let found = failures(ended);
    assert_eq!(found.exit_code(), ExitCode::Storage);
    assert!(found.to_string().contains("a file system that all ranks share"), "{found}");
}

#[test]
fn a_directory_in_use_ends_all_ranks() {
    let dir = tempfile::tempdir().unwrap();
    let alone: Arc<dyn Collective> = Arc::new(Solo::default());
    let _run = open(dir.path(), &alone, &[]).unwrap();
    let found = failures(on_ranks(2, |world| open(dir.path(), &world, &[]).map(drop)));
    assert_eq!(found.exit_code(), ExitCode::Locked);
    assert!(found.to_string().starts_with("rank 0: "), "{found}");
}

#[test]
fn rollouts_are_published_once_and_read_by_all() {
    let dir = tempfile::tempdir().unwrap();
    let read = on_ranks(3, |world| {
        let run = open(dir.path(), &world, &[])?;
        assert!(run.open_experience(4)?.is_none());
        run.commit_experience(4, serde_json::json!({}), |staging| gather_and_write(&world, staging))?;
        let published = run.open_experience(4)?.unwrap();
        assert_eq!(published.dir(), run.experience_path(4));
        Ok(published.read("sum")?)
    });
    assert_eq!(read.unwrap(), vec![b"3"; 3]);
    fs::write(dir.path().join("experience/iter-4/sum"), "4").unwrap();
    let found = on_ranks(3, |world| Ok(open(dir.path(), &world, &[])?.open_experience(4)?.is_none()));
    assert_eq!(found.unwrap(), [true; 3], "what is damaged counts as absent, for all");
}
