//! What survivors learn when one rank dies, hangs, aborts, leaves, or calls something else: at every kind of call, small and
//! large, whichever rank it is. Nobody hangs, and everybody names the right rank.

use std::sync::Arc;
use std::time::{Duration, Instant};

use half::bf16;
use tandem_collective::{AbortOnPanic, Collective, Error, Result, Shared, Status, Tag, Threads};

const RANKS: usize = 3;
/// So long that no test waits for it unnoticed.
const NEVER: Duration = Duration::from_secs(100);
/// What a machine with other things to do may take.
const SLACK: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy, PartialEq)]
enum Op {
    SumF32,
    SumF64,
    MaxF64,
    SumBf16,
    ScatterF32,
    ScatterBf16,
    Gather,
    GatherVaried,
    AllToAll,
    BroadcastFirst,
    BroadcastLast,
    Barrier,
    Agree,
    Split,
    StartGather,
    StartScatter,
    StartSum,
    Message,
}

use Op::*;

const ALL: [Op; 18] = [
    SumF32,
    SumF64,
    MaxF64,
    SumBf16,
    ScatterF32,
    ScatterBf16,
    Gather,
    GatherVaried,
    AllToAll,
    BroadcastFirst,
    BroadcastLast,
    Barrier,
    Agree,
    Split,
    StartGather,
    StartScatter,
    StartSum,
    Message,
];
/// Copied into the meeting, and lent to it.
const LENGTHS: [usize; 2] = [30, 30_000];

/// Makes the call; `culprit` matters to messages only, which all others await from it.
fn call(world: &dyn Collective, op: Op, tag: Tag, length: usize, culprit: usize) -> Result<()> {
    let mut floats = vec![1.0_f32; length];
    let shared: Shared = Arc::new(floats.clone());
    match op {
        SumF32 => world.all_reduce_sum_f32(tag, &mut floats),
        SumF64 => world.all_reduce_sum_f64(tag, &mut vec![1.0; length]),
        MaxF64 => world.all_reduce_max_f64(tag, &mut vec![1.0; length]),
        SumBf16 => world.all_reduce_sum_bf16(tag, &mut vec![bf16::ONE; length]),
        ScatterF32 => world.reduce_scatter_sum_f32(tag, &floats, &mut vec![0.0; length / RANKS]),
        ScatterBf16 => {
            world.reduce_scatter_sum_bf16(tag, &vec![bf16::ONE; length], &mut vec![bf16::ONE; length / RANKS])
        }
        Gather => world.all_gather(tag, &vec![0; length], &mut vec![0; length * RANKS]),
        GatherVaried => world.all_gather_varied(tag, &vec![0; length]).map(drop),
        AllToAll => world.all_to_all(tag, &vec![0; length], &mut vec![0; length]),
        BroadcastFirst => world.broadcast(tag, &mut vec![0; length], 0),
        BroadcastLast => world.broadcast(tag, &mut vec![0; length], RANKS - 1),
        Barrier => world.barrier(tag),
        Agree => world.agree(tag, Status::Healthy).map(drop),
        Split => world.split(tag, Some(0), 0).map(drop),
        StartGather => world.start_all_gather_f32(tag, shared)?.wait_into(&mut vec![0.0; length * RANKS]),
        StartScatter => world.start_reduce_scatter_sum_f32(tag, shared)?.wait_into(&mut vec![0.0; length / RANKS]),
        StartSum => world.start_all_reduce_sum_f32(tag, shared)?.wait_into(&mut floats),
        Message if world.rank() == culprit => {
            (0..RANKS).filter(|&to| to != culprit).try_for_each(|to| world.send(tag, vec![0; length], to))
        }
        Message => world.receive(tag, &mut vec![0; length], culprit),
    }
}

/// Three ranks make good calls, then `fault` happens on the culprit in place of `op` while the others make the call.
/// Everyone's first error must satisfy `right`; after it all calls on the world and on an older group fail alike.
fn survive(
    deadline: Duration,
    (op, length, culprit): (Op, usize, usize),
    fault: impl Fn(&Arc<dyn Collective>, Tag) -> Result<()> + Sync,
    right: impl Fn(usize, &Error) -> bool + Sync,
) {
    let tag = Tag::new("failing", 7);
    std::thread::scope(|scope| {
        for world in Threads::world(RANKS, deadline) {
            let (fault, right) = (&fault, &right);
            scope.spawn(move || {
                let rank = world.rank();
                // The culprit's unwinding is caught here, inside its thread, so that the test itself goes on.
                let work = std::panic::AssertUnwindSafe(move || {
                    let group = world.split(Tag::new("group", 0), Some(0), 9 - rank).unwrap().unwrap();
                    let mut one = [1.0];
                    group.all_reduce_sum_f32(Tag::new("good", 0), &mut one).unwrap();
                    call(&*world, op, Tag::new("good", 0), length, culprit).unwrap();
                    world.barrier(Tag::new("good", 1)).unwrap();
                    let begun = Instant::now();
                    if rank == culprit {
                        // It is told as well, unless it is gone or was only sending; at the latest by its next call.
                        let _ = fault(&world, tag);
                        return;
                    }
                    let error = call(&*world, op, tag, length, culprit).unwrap_err();
                    let limit = if deadline == NEVER { SLACK } else { deadline + SLACK };
                    assert!(begun.elapsed() < limit, "{op:?} {length} {culprit}: {error} after {:?}", begun.elapsed());
                    assert!(right(rank, &error), "{op:?} {length}, culprit {culprit}, rank {rank}: {error:?}");
                    for again in [&world, &group] {
                        let again = again.barrier(Tag::new("after", 0)).unwrap_err();
                        assert!(right(rank, &again), "again: {op:?} {length} {culprit} {rank}: {again:?}");
                    }
                    let started = world.start_all_reduce_sum_f32(Tag::new("after", 1), Arc::new(vec![0.0_f32]));
                    assert!(right(rank, &started.unwrap_err()));
                });
                if let Err(panic) = std::panic::catch_unwind(work)
                    && !panic.is::<Intended>()
                {
                    std::panic::resume_unwind(panic);
                }
            });
        }
    });
}

/// The payload of a panic that a test wants.
struct Intended;

/// All calls, lengths and culprits.
fn cases() -> impl Iterator<Item = (Op, usize, usize)> {
    ALL.into_iter()
        .flat_map(|op| LENGTHS.into_iter().flat_map(move |length| (0..RANKS).map(move |bad| (op, length, bad))))
}

#[test]
fn a_rank_that_panics_is_named() {
    for case in cases() {
        let fault = |_: &Arc<dyn Collective>, _| std::panic::resume_unwind(Box::new(Intended));
        survive(
            NEVER,
            case,
            fault,
            |me, error| matches!(error, Error::PeerFailed { rank, peer, why } if (*rank, *peer) == (me, case.2) && why.contains("panicked")),
        );
    }
}

#[test]
fn a_rank_that_panics_under_a_guard_is_named_though_its_handle_lives_on() {
    let ranks = Threads::world(2, NEVER);
    std::thread::scope(|scope| {
        let other = &ranks[1];
        scope.spawn(move || {
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let _guard = AbortOnPanic::new(other);
                std::panic::resume_unwind(Box::new(Intended));
            }));
        });
        let error = ranks[0].barrier(Tag::new("guarded", 0)).unwrap_err();
        assert_eq!(error.to_string(), "rank 0: rank 1 failed: its thread panicked");
    });
}

#[test]
fn a_rank_that_aborts_is_named_with_its_words() {
    for case in cases() {
        let fault = |world: &Arc<dyn Collective>, _| {
            world.abort("the disk is full");
            world.abort("a later word");
            Ok(())
        };
        survive(NEVER, case, fault, |me, error| {
            *error == Error::PeerFailed { rank: me, peer: case.2, why: "the disk is full".to_owned() }
        });
    }
}

#[test]
fn a_rank_that_leaves_is_named() {
    for case in cases() {
        survive(
            NEVER,
            case,
            |_, _| Ok(()),
            |me, error| matches!(error, Error::PeerFailed { rank, peer, why } if (*rank, *peer) == (me, case.2) && why.contains("left")),
        );
    }
}

#[test]
fn a_rank_that_hangs_is_named_after_the_deadline() {
    // Long enough that only the rank that means to be late is late, also where hundreds of threads share two cores.
    let deadline = Duration::from_millis(1500);
    std::thread::scope(|scope| {
        for case @ (op, length, culprit) in cases() {
            scope.spawn(move || {
                let fault = |world: &Arc<dyn Collective>, tag| {
                    std::thread::sleep(2 * deadline);
                    // It comes late, and is told that the others have given up on it.
                    let error = call(&**world, op, tag, length, culprit).unwrap_err();
                    assert!(
                        matches!(&error, Error::PeerFailed { rank, peer, why }
                            if *rank == culprit && *peer != culprit && why.contains("gave up")),
                        "{error:?}"
                    );
                    Ok(())
                };
                survive(deadline, case, fault, |me, error| {
                    matches!(error, Error::Timeout { rank, missing, .. } if *rank == me && *missing == [culprit])
                });
            });
        }
    });
}

#[test]
fn a_rank_in_another_place_is_named() {
    for case @ (op, length, culprit) in cases() {
        let other = Tag::new("elsewhere", 7);
        let fault = |world: &Arc<dyn Collective>, _| call(&**world, op, other, length, culprit);
        survive(NEVER, case, fault, |_, error| match error {
            Error::Desync { rank, called, peer, peer_called } => {
                let (sound, strange) = if *rank == culprit { (peer_called, called) } else { (called, peer_called) };
                (*rank == culprit || *peer == culprit) && *strange == other && sound.site == "failing"
            }
            _ => false,
        });
    }
}

#[test]
fn a_rank_with_another_operation_is_named() {
    // A message does not meet collective calls.
    for case @ (op, length, culprit) in cases().filter(|case| case.0 != Message) {
        let fault = |world: &Arc<dyn Collective>, tag| match op {
            Barrier => call(&**world, Agree, tag, length, culprit),
            BroadcastFirst => call(&**world, BroadcastLast, tag, length, culprit),
            _ => call(&**world, Barrier, tag, length, culprit),
        };
        survive(
            NEVER,
            case,
            fault,
            |_, error| matches!(error, Error::OperationMismatch { rank, peer, .. } if *rank == culprit || *peer == culprit),
        );
    }
}

#[test]
fn a_rank_with_another_length_is_named() {
    for case @ (op, length, culprit) in cases() {
        if matches!(op, Barrier | Agree | Split | GatherVaried) {
            continue;
        }
        let fault = |world: &Arc<dyn Collective>, tag| call(&**world, op, tag, length + RANKS, culprit);
        survive(NEVER, case, fault, |_, error| match error {
            Error::LengthMismatch { rank, length: seen, peer, peer_length, .. } => {
                (*rank == culprit || *peer == culprit) && seen.abs_diff(*peer_length) == RANKS
            }
            _ => false,
        });
    }
}

/// A rank that has come back from a call with an error owns its memory again: nobody reads or writes it any more.
#[test]
fn memory_is_given_back_when_a_call_fails() {
    let length = 1 << 20;
    let mut failures = 0;
    for round in 0..60 {
        let ranks = Threads::world(RANKS, NEVER);
        let killer = Arc::clone(&ranks[round % RANKS]);
        failures += std::thread::scope(|scope| {
            let workers: Vec<_> = ranks
                .into_iter()
                .map(|world| {
                    scope.spawn(move || {
                        let mut values = vec![1.0_f32; length];
                        for sequence in 0..100_000 {
                            let tag = Tag::new("interrupted", sequence);
                            let broken = match sequence % 2 {
                                0 => world.all_reduce_sum_f32(tag, &mut values).is_err(),
                                _ => world.broadcast(tag, tandem_collective::as_bytes_mut(&mut values), 1).is_err(),
                            };
                            if broken {
                                values.fill(-7.0);
                                for _ in 0..20 {
                                    std::thread::yield_now();
                                    assert!(values.iter().all(|&value| value == -7.0), "somebody still writes");
                                }
                                return 1;
                            }
                            values.fill(1.0);
                        }
                        0
                    })
                })
                .collect();
            std::thread::sleep(Duration::from_micros(500 + 997 * (round as u64 % 13)));
            killer.abort("interrupted");
            workers.into_iter().map(|worker| worker.join().unwrap()).sum::<usize>()
        });
    }
    assert_eq!(failures, 60 * RANKS);
}
