//! What all groups of one world share: the deadline, and the one failure that ends it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::group::Group;
use crate::error::Error;

/// Locks, also after a panic elsewhere: the state under our locks is only ever changed in whole steps.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) struct World {
    pub(super) deadline: Duration,
    failed: AtomicBool,
    failure: Mutex<Option<Failure>>,
    groups: Mutex<Vec<Weak<Group>>>,
}

struct Failure {
    witness: usize,
    error: Error,
}

impl World {
    pub(super) fn new(deadline: Duration) -> Self {
        Self { deadline, failed: AtomicBool::new(false), failure: Mutex::new(None), groups: Mutex::default() }
    }

    /// When a call that starts now must be done; `None` if the clock does not reach that far.
    pub(super) fn until(&self) -> Option<Instant> {
        Instant::now().checked_add(self.deadline)
    }

    /// Makes a group known, so that it wakes when the world fails.
    pub(super) fn register(&self, group: &Arc<Group>) {
        let mut groups = lock(&self.groups);
        groups.retain(|group| group.strong_count() > 0);
        groups.push(Arc::downgrade(group));
    }

    /// True once the world has failed.
    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// What rank `me` of the world says about the failure, if there is one.
    pub(super) fn failure(&self, me: usize) -> Option<Error> {
        if !self.has_failed() {
            return None;
        }
        lock(&self.failure).as_ref().map(|failure| failure.seen_by(me))
    }

    /// Ends the world with `error`, noticed by rank `me` (unless it has ended before), wakes everyone, and returns what
    /// rank `me` is to say. The caller must hold no lock.
    pub(super) fn fail(&self, me: usize, error: Error) -> Error {
        let mine = {
            let mut failure = lock(&self.failure);
            let failure = failure.get_or_insert(Failure { witness: me, error });
            self.failed.store(true, Ordering::Release);
            failure.seen_by(me)
        };
        let groups: Vec<_> = lock(&self.groups).iter().filter_map(Weak::upgrade).collect();
        for group in groups {
            group.wake_all();
        }
        mine
    }
}

impl Failure {
    /// The same cause, told from where `me` stands.
    fn seen_by(&self, me: usize) -> Error {
        match &self.error {
            Error::Timeout { missing, .. } if missing.contains(&me) => {
                Error::PeerFailed { rank: me, peer: self.witness, why: format!("it gave up: {}", self.error) }
            }
            Error::Timeout { tag, deadline, missing, .. } => {
                Error::Timeout { rank: me, tag: *tag, deadline: *deadline, missing: missing.clone() }
            }
            Error::PeerFailed { peer, why, .. } => Error::PeerFailed { rank: me, peer: *peer, why: why.clone() },
            // A desync names both sides; whoever was not one of them passes the message on.
            other => other.clone(),
        }
    }
}
