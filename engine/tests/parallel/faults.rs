//! Whatever strikes one rank at any of its calls, all ranks leave, in time, knowing who it was.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tandem_collective::{AbortOnPanic, Collective, Threads};
use tandem_engine::parallel::{ParallelConfig, ZeroStage};
use tandem_engine::{Error, Result};

use crate::faulty::{Fault, Faulty, Plan, STRUCK};
use crate::toy::{Layout, engine, negative_sum, passes, rows, spec};

const DEADLINE: Duration = Duration::from_millis(700);
/// How much later than the deadline a rank may leave on a busy machine.
const SLACK: Duration = Duration::from_secs(20);

/// One step of training: whether the weights moved.
fn step(world: &Arc<dyn Collective>, layout: &Layout) -> Result<bool> {
    let mut spec = spec(true);
    spec.layers = 2;
    let mut engine = engine(&spec, &layout.placement(world)?)?;
    let rows = rows(0, 6);
    let passes = passes(engine.model().parallel(), &rows, 1, 0);
    engine.accumulate_all_log_probs(&passes, layout.recompute, |_, out| negative_sum(out))?;
    Ok(engine.step(rows.iter().map(|row| row.len() - 1).sum::<usize>() as f64)?.applied)
}

/// How one rank ended: its outcome, or `None` if it died.
type Ended = Option<Result<bool>>;

fn run(layout: &Layout, culprit: usize, fault: Option<Fault>, at: usize) -> (Vec<Ended>, usize) {
    let plans: Vec<Arc<Plan>> = (0..layout.world)
        .map(|rank| Arc::new(Plan { fault: fault.filter(|_| rank == culprit), at, calls: AtomicUsize::new(0) }))
        .collect();
    let ranks = Threads::world(layout.world, DEADLINE);
    let ended = std::thread::scope(|scope| {
        let start = |(rank, plan): (Arc<dyn Collective>, Arc<Plan>)| {
            scope.spawn(move || {
                let _guard = AbortOnPanic::new(&rank);
                let outcome = step(&Faulty::wrap(rank.clone(), plan), layout);
                if let Err(error) = &outcome {
                    // As a process does on its way out.
                    rank.abort(&error.to_string());
                }
                outcome
            })
        };
        let threads: Vec<_> = ranks.into_iter().zip(plans.iter().cloned()).map(start).collect();
        threads.into_iter().map(|thread| thread.join().ok()).collect()
    });
    (ended, plans[culprit].calls.load(Ordering::Relaxed))
}

#[test]
fn all_ranks_leave_with_the_right_error() {
    // The panics of struck ranks are wanted; their messages would drown everything else.
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if panic.payload().downcast_ref::<&str>().is_none_or(|text| *text != STRUCK) {
            usual(panic);
        }
    }));
    for (world, stage, tensor, pipeline) in
        [(2, ZeroStage::Three, 1, 1), (2, ZeroStage::One, 1, 1), (2, ZeroStage::Zero, 2, 1), (2, ZeroStage::Zero, 1, 2)]
    {
        let config = ParallelConfig { tensor, pipeline, ..ParallelConfig::default() };
        let layout = Layout::of(world, stage, config);
        for culprit in 0..world {
            let (ended, calls) = run(&layout, culprit, None, 0);
            assert!(ended.iter().all(|rank| matches!(rank, Some(Ok(true)))), "without a fault: {ended:?}");
            assert!(calls > 4, "{layout:?}: {calls} calls");
            for fault in [Fault::Dies, Fault::Fails, Fault::Hangs, Fault::Nan] {
                // A hang costs the deadline: a few calls stand for all of a kind.
                let stride = if fault == Fault::Hangs { calls.div_ceil(6) } else { 1 };
                for at in (0..calls).step_by(stride) {
                    let what = format!("{world} {stage:?} {tensor}x{pipeline}: rank {culprit} {fault:?} at call {at}");
                    let start = Instant::now();
                    let (ended, _) = run(&layout, culprit, Some(fault), at);
                    assert!(start.elapsed() < 4 * DEADLINE + SLACK, "{what}: took {:?}", start.elapsed());
                    for (rank, outcome) in ended.iter().enumerate() {
                        check(rank, outcome, culprit, fault, &what);
                    }
                    if fault == Fault::Nan {
                        let moved: Vec<bool> = ended.iter().flatten().flatten().copied().collect();
                        assert!(moved.iter().all(|&one| one == moved[0]), "{what}: some ranks have moved");
                    }
                }
            }
        }
    }
}

fn check(rank: usize, outcome: &Ended, culprit: usize, fault: Fault, what: &str) {
    use tandem_collective::Error as Cause;
    match (fault, outcome) {
        (Fault::Dies, None) => assert_eq!(rank, culprit, "{what}: rank {rank} died too"),
        // After its last exchange a rank may have finished before another one is struck.
        (Fault::Dies | Fault::Fails | Fault::Hangs, Some(Ok(true))) => {}
        (Fault::Nan, Some(Ok(_))) => {}
        (_, Some(Err(Error::Collective(cause)))) if rank != culprit => {
            let named = match cause {
                Cause::PeerFailed { peer, .. } => vec![*peer],
                Cause::Timeout { missing, .. } => missing.clone(),
                other => panic!("{what}: rank {rank}: {other}"),
            };
            assert_eq!(named, [culprit], "{what}: rank {rank} blames others: {cause}");
        }
        (Fault::Fails | Fault::Hangs, Some(Err(_))) => {}
        (_, other) => panic!("{what}: rank {rank} ended with {other:?}"),
    }
}
