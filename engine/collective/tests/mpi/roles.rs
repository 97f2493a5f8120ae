//! What the ranks of a job do.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use half::bf16;
use tandem_collective::launch::{Connected, connect};
use tandem_collective::{Collective, Error, Shared, Status, Tag, mpi, suite, tree_sum};

/// In jobs in which a rank fails.
pub(crate) const DEADLINE: Duration = Duration::from_secs(2);
/// In jobs that succeed: so long that a busy machine does not matter.
const PATIENT: Duration = Duration::from_secs(120);
/// Peers are given this long to print as well, before the job is killed.
const LAST_WORDS: Duration = Duration::from_secs(1);

const TAG: Tag = Tag::new("failing", 7);

/// Does what `role` says; returns only if all is well.
pub(crate) fn play(role: &str) {
    match role {
        "suite" => {
            let world = joined(PATIENT);
            let checks = suite::conformance(&world);
            finish(&world, format!("{checks} checks on rank 0 of {}", world.world()));
        }
        "large" => {
            let world = joined(PATIENT);
            large(&world);
            finish(&world, format!("large on {}", world.world()));
        }
        "connect" => match connect(PATIENT, None) {
            Ok(Connected::Process { world, launcher }) => {
                assert_eq!((world.rank(), world.world()), (launcher.rank, launcher.world));
                finish(&world, format!("{}, rank {} of {}", world.backend(), world.rank(), world.world()));
            }
            Ok(other) => panic!("{other:?}"),
            Err(error) => lose(&error),
        },
        _ => fail(role),
    }
}

fn joined(deadline: Duration) -> Arc<dyn Collective> {
    mpi::Mpi::connect(deadline).unwrap_or_else(|error| lose(&error))
}

/// The done record comes last: after it nothing can fail any more.
fn finish(world: &Arc<dyn Collective>, record: String) {
    mpi::finish().unwrap_or_else(|error| lose(&error));
    if world.rank() == 0 {
        println!("done: {record}");
    }
}

fn lose(error: &Error) -> ! {
    // In one piece, so that the words of several ranks do not mix.
    let _ = std::io::stderr().write_all(format!("{error}\n").as_bytes());
    std::thread::sleep(LAST_WORDS);
    mpi::kill(99)
}

/// The last rank misbehaves; the others make a call, lose, and must go on losing.
fn fail(role: &str) {
    let world = joined(DEADLINE);
    world.barrier(Tag::new("good", 0)).unwrap();
    let group = world.split(Tag::new("good", 1), Some(0), 0).unwrap().unwrap();
    let culprit = world.rank() + 1 == world.world();
    if culprit {
        match role {
            "panic" => panic!("on purpose"),
            "exit-0" => std::process::exit(0),
            "exit-3" => std::process::exit(3),
            "abort" => {
                // A notice overtakes what is still on the way; the others must have come through the good calls.
                std::thread::sleep(LAST_WORDS);
                world.abort("the disk is full");
                world.abort("and again");
                std::thread::sleep(LAST_WORDS);
            }
            "other-tag" | "other-operation" | "other-length" => {}
            _ => std::thread::sleep(DEADLINE * 30),
        }
    }
    let mut values = vec![1.0_f32; 30];
    let last = world.world() - 1;
    let result = match role {
        "other-tag" if culprit => world.barrier(Tag::new("failing", 8)),
        "other-operation" if culprit => world.agree(TAG, Status::Healthy).map(drop),
        "other-operation" => world.barrier(TAG),
        "other-length" => world.all_reduce_sum_f32(TAG, &mut vec![1.0; 30 + usize::from(culprit)]),
        "hang-large" => world.all_reduce_sum_bf16(TAG, &mut vec![bf16::ONE; 1 << 20]),
        "hang-started" => {
            let started = world.start_all_reduce_sum_f32(TAG, Arc::new(values.clone()));
            started.and_then(|work| work.wait_into(&mut values))
        }
        "hang-message" => world.receive(TAG, &mut [0; 3], last),
        "hang-split" => world.split(TAG, Some(1), 0).map(drop),
        _ => world.all_reduce_sum_f32(TAG, &mut values),
    };
    let Err(error) = result else { panic!("rank {} did not notice {role}", world.rank()) };
    for again in [world.barrier(Tag::new("later", 0)), group.barrier(Tag::new("later", 1))] {
        assert_eq!(again.as_ref(), Err(&error), "after an error every call gives its cause");
    }
    assert_eq!(group.send(TAG, vec![1], 0).as_ref(), Err(&error));
    assert_eq!(mpi::finish().as_ref(), Err(&error), "a world that has failed is not finished");
    lose(&error)
}

/// A number that depends on everything.
fn at(salt: usize, rank: usize, i: usize) -> f32 {
    ((i * 31 + rank * 17 + salt * 7) % 1000) as f32 * 0.37 - 100.0 * rank as f32
}

fn values(salt: usize, rank: usize, length: usize) -> Vec<f32> {
    (0..length).map(|i| at(salt, rank, i)).collect()
}

fn summed(salt: usize, ranks: usize, length: usize) -> Vec<f32> {
    let all: Vec<Vec<f32>> = (0..ranks).map(|rank| values(salt, rank, length)).collect();
    let parts: Vec<&[f32]> = all.iter().map(Vec::as_slice).collect();
    let mut sum = vec![0.0; length];
    tree_sum(&parts, &mut sum);
    sum
}

/// Buffers of many pieces of every kind of transfer, and operations that ranks wait for in different orders.
fn large(world: &Arc<dyn Collective>) {
    let (rank, ranks) = (world.rank(), world.world());
    let length = (6 << 20) + 5;
    let tag = |number| Tag::new("large", number);

    let mut mine = values(0, rank, length);
    world.all_reduce_sum_f32(tag(0), &mut mine).unwrap();
    assert!(mine == summed(0, ranks, length), "all_reduce");

    let part = length / ranks;
    let mut mine = vec![0.0; part];
    world.reduce_scatter_sum_f32(tag(1), &values(1, rank, part * ranks), &mut mine).unwrap();
    assert!(mine == summed(1, ranks, part * ranks)[rank * part..(rank + 1) * part], "reduce_scatter");

    let mut all = vec![0.0; length * ranks];
    world.all_gather_f32(tag(2), &values(2, rank, length), &mut all).unwrap();
    let expected: Vec<f32> = (0..ranks).flat_map(|rank| values(2, rank, length)).collect();
    assert!(all == expected, "all_gather");

    for root in 0..ranks {
        let mut bytes = vec![rank as u8; length];
        world.broadcast(tag(3), &mut bytes, root).unwrap();
        assert!(bytes.iter().all(|&byte| byte == root as u8), "broadcast from {root}");
    }

    // A message longer than what is sent at a time, to everyone, before anyone receives.
    for to in 0..ranks {
        world.send(tag(4), vec![(rank * ranks + to) as u8; 4 * length], to).unwrap();
    }
    for from in 0..ranks {
        let mut bytes = vec![0; 4 * length];
        world.receive(tag(4), &mut bytes, from).unwrap();
        assert!(bytes.iter().all(|&byte| byte == (from * ranks + rank) as u8), "message from {from}");
    }

    // Two communicators, waited for in opposite orders: whoever waits must drive the other as well.
    let group = world.split(tag(5), Some(3), ranks - rank).unwrap().unwrap();
    let shared: Shared = Arc::new(values(6, rank, length));
    let first = world.start_all_reduce_sum_f32(tag(6), Arc::clone(&shared)).unwrap();
    let second = group.start_all_reduce_sum_f32(tag(7), Arc::clone(&shared)).unwrap();
    let gathered = group.start_all_gather_f32(tag(8), Arc::clone(&shared)).unwrap();
    let mut sums = [vec![0.0; length], vec![0.0; length]];
    let [one, two] = &mut sums;
    if rank % 2 == 0 {
        first.wait_into(one).unwrap();
        second.wait_into(two).unwrap();
    } else {
        second.wait_into(two).unwrap();
        first.wait_into(one).unwrap();
    }
    assert!(sums[0] == summed(6, ranks, length), "started all_reduce");
    let reversed: Vec<Vec<f32>> = (0..ranks).rev().map(|rank| values(6, rank, length)).collect();
    let parts: Vec<&[f32]> = reversed.iter().map(Vec::as_slice).collect();
    let mut expected = vec![0.0; length];
    tree_sum(&parts, &mut expected);
    assert!(sums[1] == expected, "started all_reduce in a group");
    // Peers wait for what a rank has dropped.
    if rank == 0 {
        drop(gathered);
    } else {
        let mut all = vec![0.0; length * ranks];
        gathered.wait_into(&mut all).unwrap();
        assert!(all == reversed.concat(), "started all_gather in a group");
    }
    world.barrier(tag(9)).unwrap();
}
