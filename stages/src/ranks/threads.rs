//! Ranks as threads of this process.

use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use rayon::{ThreadPool, ThreadPoolBuilder};
use tandem_collective::Collective;

use super::failures::{RankFailure, RankFailures};
use crate::error::{Result, StageError};

/// What a main thread has; the threads of a pool get less by default.
const STACK_BYTES: usize = 8 << 20;

/// Runs `body` once for each of `worlds`, the handles of one world, and returns what the ranks return, in rank order.
///
/// Each rank has its own pool of `threads / ranks` threads (at least one; `None`: as many threads as there are cores), so
/// that no rank ever computes for another one while that one waits.
///
/// # Errors
/// [`StageError::Ranks`] if a rank fails or panics; the others are woken by [`Collective::abort`].
pub fn on_threads<T: Send>(
    worlds: Vec<Arc<dyn Collective>>,
    threads: Option<usize>,
    body: impl Fn(Arc<dyn Collective>) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let ranks = worlds.len();
    let threads = threads.unwrap_or_else(|| thread::available_parallelism().map_or(1, NonZero::get));
    let threads = (threads / ranks.max(1)).max(1);
    // All pools before the first rank: who finds a world complete may rely on it.
    let pools: Vec<ThreadPool> = (0..ranks).map(|rank| pool(rank, threads)).collect::<Result<_>>()?;
    let failures = Mutex::new(Vec::new());
    let run = |world: Arc<dyn Collective>, pool: &ThreadPool| {
        let rank = world.rank();
        let failure = match pool.install(|| catch_unwind(AssertUnwindSafe(|| body(Arc::clone(&world))))) {
            Ok(Ok(value)) => return Some(value),
            Ok(Err(error)) => RankFailure::of_error(rank, &error),
            Err(payload) => RankFailure::of_panic(rank, &*payload),
        };
        let why = failure.message.clone();
        // Noted before the others are woken, so that the first one here is the first one that failed.
        failures.lock().unwrap_or_else(PoisonError::into_inner).push(failure);
        world.abort(&why);
        None
    };
    let values: Vec<Option<T>> = thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> =
            worlds.into_iter().zip(&pools).map(|(world, pool)| scope.spawn(move || run(world, pool))).collect();
        threads.into_iter().map(|thread| thread.join().ok().flatten()).collect()
    });
    let failures = failures.into_inner().unwrap_or_else(PoisonError::into_inner);
    match values.into_iter().collect::<Option<Vec<T>>>() {
        Some(values) => Ok(values),
        None if failures.is_empty() => Err(StageError::bug("a rank has ended without a word")),
        None => Err(StageError::Ranks(RankFailures::new(ranks, failures))),
    }
}

/// Runs the one rank of a world in a pool of its own: from a thread outside of it, every kernel would have to be handed over
/// and waited for.
///
/// # Errors
/// If a thread cannot be started, or `body` fails.
pub(super) fn alone<T: Send>(threads: Option<usize>, body: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let threads = threads.unwrap_or_else(|| thread::available_parallelism().map_or(1, NonZero::get));
    pool(0, threads)?.install(body)
}

fn pool(rank: usize, threads: usize) -> Result<ThreadPool> {
    // The name is what the message of a panic shows.
    let builder = ThreadPoolBuilder::new().thread_name(move |_| format!("rank {rank}"));
    builder.num_threads(threads).stack_size(STACK_BYTES).build().map_err(StageError::bug)
}
