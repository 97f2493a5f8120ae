//! Ranks that fail, panic, differ or are asked to stop: all leave together, and the blame lies where it belongs.

use std::time::{Duration, Instant};

use tandem_collective::{Error as CollectiveError, Tag, Threads};

use super::*;
use crate::config::{Config, ConfigError};
use crate::error::ExitCode;
use crate::stop::StopFlag;

/// Far longer than any test: whoever waits for it fails the test.
const DEADLINE: Duration = Duration::from_secs(600);
const SOON: Duration = Duration::from_secs(60);

fn launch() -> Launch {
    Launch::new(Config::default())
}

fn on_ranks(launch: &Launch, ranks: usize, body: impl Fn(&Launch) -> Result<Outcome> + Sync) -> Result<Vec<Outcome>> {
    let start = Instant::now();
    let ended = on_threads(Threads::world(ranks, DEADLINE), Some(4), |world| run_rank(launch, world, &body));
    assert!(start.elapsed() < SOON, "somebody waited for somebody who had left");
    ended
}

fn failures(ended: Result<Vec<Outcome>>) -> RankFailures {
    match ended {
        Err(StageError::Ranks(failures)) => failures,
        other => panic!("{other:?}"),
    }
}

/// All ranks meet; rank `odd` does something else instead.
fn meet_except(odd: usize, instead: impl Fn() -> Result<Outcome> + Sync) -> Result<Vec<Outcome>> {
    on_ranks(&launch(), 4, |launch| {
        if launch.world.rank() == odd {
            return instead();
        }
        launch.world.barrier(Tag::new("test", 0))?;
        Ok(Outcome::Finished)
    })
}

#[test]
fn ranks_that_agree_all_finish_in_their_own_pools() {
    let threads = on_threads(Threads::world(2, DEADLINE), Some(7), |world| {
        world.barrier(Tag::new("test", 0))?;
        Ok((world.rank(), rayon::current_num_threads()))
    });
    assert_eq!(threads.unwrap(), [(0, 3), (1, 3)]);
    let outcomes = on_ranks(&launch(), 3, |launch| {
        assert_eq!(launch.is_leader(), launch.world.rank() == 0);
        Ok(Outcome::Finished)
    });
    assert_eq!(outcomes.unwrap(), [Outcome::Finished; 3]);
}

#[test]
fn a_rank_that_fails_takes_the_others_along() {
    let failures = failures(meet_except(2, || Err(StageError::Reward("no score".into()))));
    assert_eq!(failures.exit_code(), ExitCode::Data);
    assert_eq!(failures.to_string(), "rank 2: reward: no score");
    let error = StageError::Ranks(failures);
    assert_eq!((error.exit_code(), error.is_echo()), (ExitCode::Data, false));
}

#[test]
fn so_does_one_that_panics() {
    let failures = failures(meet_except(1, || panic!("a fault of {}", 1)));
    assert_eq!(failures.exit_code(), ExitCode::Bug);
    assert!(failures.to_string().starts_with("rank 1: internal error: a fault of 1;"), "{failures}");
}

#[test]
fn one_that_only_leaves_is_missed() {
    // Its handle is gone, which the others notice long before the deadline.
    let failures = failures(meet_except(3, || Ok(Outcome::Finished)));
    assert_eq!(failures.exit_code(), ExitCode::Communication);
    assert!(failures.to_string().contains("rank 3"), "{failures}");
}

#[test]
fn a_rank_that_hangs_is_named_at_the_deadline() {
    let ended = on_threads(Threads::world(2, Duration::from_millis(100)), None, |world| {
        if world.rank() == 1 {
            std::thread::sleep(Duration::from_secs(1));
        }
        Ok(world.barrier(Tag::new("test", 0))?)
    });
    let Err(StageError::Ranks(failures)) = ended else { panic!("{ended:?}") };
    assert_eq!(failures.exit_code(), ExitCode::Communication);
    let text = failures.to_string();
    assert!(text.contains("rank 0: test[0] did not complete within 0.1 s") && text.contains("[1]"), "{text}");
    assert!(!text.contains("rank 0: rank 0:"), "{text}");
}

#[test]
fn another_configuration_is_refused_by_all_and_named() {
    let ended = on_threads(Threads::world(3, DEADLINE), None, |world| {
        let mut launch = launch();
        if world.rank() == 2 {
            launch.config.run.seed = 5;
        }
        run_rank(&launch, world, |_| Ok(Outcome::Finished))
    });
    let failures = failures(ended);
    assert_eq!(failures.exit_code(), ExitCode::Config);
    assert!(failures.to_string().starts_with("rank 2 has another configuration than rank 0;"), "{failures}");
    let error = ConfigError::RanksDiffer { rank: 2, leader: 0, what: "configuration" };
    assert_eq!(failures.to_string(), error.to_string(), "said once");
}

#[test]
fn a_stop_is_one_of_all() {
    let mut launch = launch();
    launch.stop = StopFlag::after(2);
    let seen = on_threads(Threads::world(3, DEADLINE), None, |world| {
        let launch = launch.on(world);
        (0..4).map(|point| launch.should_stop(Tag::new("stop", point))).collect::<Result<Vec<bool>>>()
    });
    assert_eq!(seen.unwrap(), vec![[false, false, true, true]; 3]);
    // One rank is asked, all stop.
    let seen = on_threads(Threads::world(3, DEADLINE), None, |world| {
        let launch = Launch { stop: StopFlag::default(), ..super::tests::launch().on(world) };
        if launch.world.rank() == 1 {
            launch.stop.request();
        }
        launch.should_stop(Tag::new("stop", 0))
    });
    assert_eq!(seen.unwrap(), [true; 3]);
}

#[test]
fn what_the_leader_knows_all_know() {
    let known = on_threads(Threads::world(3, DEADLINE), None, |world| {
        let value = (world.rank() == LEADER).then(|| ("words".to_owned(), vec![1u64, u64::MAX]));
        share(&*world, Tag::new("share", 0), value)
    });
    assert_eq!(known.unwrap(), vec![("words".to_owned(), vec![1, u64::MAX]); 3]);
    let alone = share(&*launch().world, Tag::new("share", 0), Some(5u8)).unwrap();
    assert_eq!(alone, 5);
}

#[test]
fn echoes_are_told_from_causes() {
    let echo = CollectiveError::PeerFailed { rank: 0, peer: 1, why: "it panicked".into() };
    assert!(StageError::from(echo).is_echo());
    let launch = CollectiveError::Launch("two launchers".into());
    let launch = StageError::from(launch);
    assert_eq!((launch.exit_code(), launch.is_echo()), (ExitCode::Config, false));
}

#[test]
fn groups_belong_on_one_node() {
    let topology = Topology::new(&[0, 0, 0, 0, 1, 1, 1, 1]);
    assert!([1, 2, 4].into_iter().all(|size| !groups_cross_nodes(&topology, size)));
    assert!([3, 8].into_iter().all(|size| groups_cross_nodes(&topology, size)));
}
