//! Being asked to stop.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::flag;

/// Says at safe points whether the run is to save its state and leave.
#[derive(Debug, Clone, Default)]
pub struct StopFlag {
    requested: Arc<AtomicBool>,
    /// Safe points that may still be passed; `None`: any number.
    remaining: Option<Arc<AtomicU64>>,
}

/// Exit status after a second signal, by the shell's convention for an interrupt.
const INTERRUPTED: i32 = 128 + SIGINT;

impl StopFlag {
    /// A flag that is raised by SIGTERM and by SIGINT (Ctrl-C). A second signal ends the process at once; what has been
    /// published stays intact.
    ///
    /// SIGUSR1 raises it too, as often as it comes: batch systems send it as a warning before the time is up, and it is what
    /// `mpirun` passes on to ranks, while on SIGTERM it kills them.
    ///
    /// # Errors
    /// The system's refusal to install a handler.
    pub fn on_signals() -> io::Result<Self> {
        let stop = Self::default();
        for signal in [SIGTERM, SIGINT] {
            // In this order: the first signal finds the flag lowered, passes the first handler and raises it in the second.
            flag::register_conditional_shutdown(signal, INTERRUPTED, Arc::clone(&stop.requested))?;
            flag::register(signal, Arc::clone(&stop.requested))?;
        }
        flag::register(SIGUSR1, Arc::clone(&stop.requested))?;
        Ok(stop)
    }

    /// A flag that rises at the safe point after `count` others; how tests stop a run anywhere.
    pub fn after(count: u64) -> Self {
        Self { remaining: Some(Arc::new(AtomicU64::new(count))), ..Self::default() }
    }

    /// The flag as one of several ranks sees it: raised for all at once, but safe points are counted by each for itself.
    pub(crate) fn for_rank(&self) -> Self {
        let count = |count: &Arc<AtomicU64>| Arc::new(AtomicU64::new(count.load(Ordering::Relaxed)));
        Self { requested: Arc::clone(&self.requested), remaining: self.remaining.as_ref().map(count) }
    }

    /// Raises the flag.
    pub fn request(&self) {
        self.requested.store(true, Ordering::Relaxed);
    }

    /// To be asked once at each safe point: whether to stop here.
    pub fn is_requested(&self) -> bool {
        if let Some(remaining) = &self.remaining
            && remaining.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| count.checked_sub(1)).is_err()
        {
            self.request();
        }
        self.requested.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_after_the_given_number_of_safe_points() {
        let stop = StopFlag::after(2);
        let shared = stop.clone();
        assert_eq!([stop.is_requested(), shared.is_requested(), stop.is_requested()], [false, false, true]);
        assert!(shared.is_requested(), "and stays up");
    }

    #[test]
    fn each_rank_counts_its_own_safe_points() {
        let stop = StopFlag::after(1);
        let ranks = [stop.for_rank(), stop.for_rank()];
        assert!(ranks.iter().all(|rank| !rank.is_requested()));
        assert!(ranks[0].is_requested());
        let requested = StopFlag::default();
        let rank = requested.for_rank();
        requested.request();
        assert!(rank.is_requested());
    }

    #[test]
    fn rises_on_request() {
        let stop = StopFlag::default();
        assert!(!stop.is_requested());
        stop.clone().request();
        assert!(stop.is_requested());
    }
}
