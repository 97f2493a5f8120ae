//! Operations as state machines, and the loop that waits for one.

use std::time::Instant;

use super::group::Group;
use crate::error::{Error, Result};
use crate::tag::Tag;

/// What one look at an operation has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Advance {
    /// It is complete.
    Done,
    /// Something has arrived or left; look again soon.
    Moved,
    /// Nothing has happened.
    Idle,
}

impl Advance {
    pub(super) fn moved(moved: bool) -> Self {
        if moved { Self::Moved } else { Self::Idle }
    }
}

/// An operation that goes on whenever it is looked at.
pub(super) trait Stage {
    /// Does what can be done without waiting. After `Done` it may be called again and answers the same.
    fn advance(&mut self) -> Result<Advance>;

    /// True once it is complete.
    fn is_done(&self) -> bool;

    /// The ranks of the communicator that it is waiting for.
    fn missing(&self) -> Vec<usize>;
}

/// Looks that are made before the processor is given to others.
const SPINS: u32 = 64;
/// Looks after which the waiter sleeps between them.
const YIELDS: u32 = 2000;
/// How long it sleeps: long against a look, short against a training step.
const SLEEP: std::time::Duration = std::time::Duration::from_micros(50);

/// Drives `look` until it is done. The deadline counts from the last time that anything moved, so a long transfer may
/// take longer than it as long as it goes on.
pub(super) fn drive(
    group: &Group,
    tag: Tag,
    mut look: impl FnMut() -> Result<Advance>,
    missing: impl FnOnce() -> Vec<usize>,
) -> Result<()> {
    let process = group.process();
    let mut idle = 0;
    let mut since = Instant::now();
    loop {
        match look().map_err(|error| process.fail(error))? {
            Advance::Done => return Ok(()),
            Advance::Moved => {
                idle = 0;
                since = Instant::now();
                continue;
            }
            Advance::Idle => idle += 1,
        }
        if idle < SPINS {
            std::hint::spin_loop();
            continue;
        }
        process.progress()?;
        if since.elapsed() >= process.deadline() {
            // A slow look at the others may have moved this one as well.
            if look().map_err(|error| process.fail(error))? == Advance::Done {
                return Ok(());
            }
            let missing = missing().into_iter().map(|rank| group.world_rank(rank)).collect();
            let (rank, deadline) = (process.rank(), process.deadline());
            return Err(process.fail(Error::Timeout { rank, tag, deadline, missing }));
        }
        if idle < YIELDS {
            std::thread::yield_now();
        } else {
            std::thread::sleep(SLEEP);
        }
    }
}

/// [`drive`] for a stage that the caller owns.
pub(super) fn complete(group: &Group, tag: Tag, stage: &mut dyn Stage) -> Result<()> {
    // Both closures look at the same stage, one after the other.
    let stage = std::cell::RefCell::new(stage);
    drive(group, tag, || stage.borrow_mut().advance(), || stage.borrow().missing())
}
