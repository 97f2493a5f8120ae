//! Threads that stay awake for the length of a decode step.
//!
//! A step is a few dozen parallel pieces of some microseconds with a little serial work between them. A thread of the pool
//! that finds nothing to do goes to sleep within that time, and waking it costs more than a piece takes.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::Yield;

/// Looks without work after which a thread lets others of the machine run.
const PATIENCE: usize = 256;
/// Looks without work, a millisecond or so, after which it goes to sleep.
const LIMIT: usize = 1 << 14;

/// Runs `work` while the other threads of this thread's pool keep looking for pieces of it.
///
/// Outside of a pool it only runs `work`: who calls from there may need its own thread. A thread may come to look for work in
/// the middle of a piece that `work` waits for; so none looks for ever.
pub(super) fn awake<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    let (owner, threads) = (rayon::current_thread_index(), rayon::current_num_threads());
    if owner.is_none() || threads == 1 {
        return work();
    }
    let is_done = AtomicBool::new(false);
    let is_done = &is_done;
    rayon::in_place_scope(|scope| {
        for _ in 1..threads {
            scope.spawn(move |_| {
                // On the thread that waits for `work` it would wait for itself.
                if rayon::current_thread_index() != owner {
                    look_for_work(is_done);
                }
            });
        }
        // Set when `work` panics, too: the scope waits for all threads.
        let _end = End(is_done);
        work()
    })
}

fn look_for_work(is_done: &AtomicBool) {
    let mut in_vain = 0usize;
    while in_vain < LIMIT && !is_done.load(Ordering::Acquire) {
        if rayon::yield_now() == Some(Yield::Executed) {
            in_vain = 0;
            continue;
        }
        in_vain += 1;
        if in_vain.is_multiple_of(PATIENCE) {
            std::thread::yield_now();
        }
        spin_loop();
    }
}

/// Says on leaving that the work is done.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use rayon::prelude::*;

    use super::*;

    #[test]
    fn work_runs_in_pools_of_any_size_and_outside_of_them() {
        let sum = |n: u32| (0..n).into_par_iter().with_max_len(1).sum::<u32>();
        assert_eq!(awake(|| sum(10)), 45);
        for threads in 1..5 {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for n in 1..500 {
                assert_eq!(pool.install(|| awake(|| sum(n) + sum(2))), n * (n - 1) / 2 + 1, "{threads} threads");
            }
        }
    }

    #[test]
    fn a_panic_lets_the_other_threads_go() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let panicked = pool.install(|| catch_unwind(AssertUnwindSafe(|| awake(|| panic!("as the test wants")))));
        assert!(panicked.is_err());
        assert_eq!(pool.install(|| awake(|| 7)), 7);
    }
}
