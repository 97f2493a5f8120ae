//! Ranks as threads.

use std::sync::Arc;
use std::time::Duration;

use tandem_collective::{Collective, Solo, Threads};

/// How long a rank waits for the others before a test fails.
const DEADLINE: Duration = Duration::from_secs(60);

/// Runs `body` on `world` ranks and returns what each has returned, in their order.
pub(crate) fn on_ranks<T: Send>(world: usize, body: impl Fn(Arc<dyn Collective>) -> T + Sync) -> Vec<T> {
    if world == 1 {
        return vec![body(Arc::new(Solo::new()))];
    }
    let ranks = Threads::world(world, DEADLINE);
    std::thread::scope(|scope| {
        let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(|| body(rank))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank panicked")).collect()
    })
}
