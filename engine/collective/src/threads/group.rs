//! Ranks that call together: where they meet, wait and leave messages.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use super::entry::{Call, Entry, Part};
use super::world::{World, lock};
use crate::error::{Error, Result};
use crate::tag::Tag;
use crate::topology::Topology;

/// Looks at a condition before going to sleep: first closely, then after letting others run. A sleep and a wake cost some
/// ten microseconds, a look costs none; with more ranks than cores, looking for long only keeps the others from arriving.
const CLOSE_LOOKS: usize = 64;
const YIELDING_LOOKS: usize = 16;

pub(super) struct Group {
    pub(super) world: Arc<World>,
    /// The rank in the world of each rank here.
    pub(super) members: Vec<usize>,
    pub(super) topology: Topology,
    room: Mutex<Room>,
    wake: Condvar,
}

/// Messages from one rank to another, oldest first.
type Letters = VecDeque<(Tag, Vec<u8>)>;

/// What is behind the lock.
#[derive(Default)]
struct Room {
    /// Calls under way, by their number.
    entries: HashMap<u64, Arc<Entry>>,
    /// Messages not yet received, by sender and receiver.
    mail: HashMap<(usize, usize), Letters>,
    /// Ranks whose handle is gone.
    gone: Vec<usize>,
    sleepers: usize,
}

impl Group {
    pub(super) fn new(world: Arc<World>, members: Vec<usize>, topology: Topology) -> Arc<Self> {
        let group = Arc::new(Self { world, members, topology, room: Mutex::default(), wake: Condvar::new() });
        group.world.register(&group);
        group
    }

    pub(super) fn size(&self) -> usize {
        self.members.len()
    }

    /// Wakes all who sleep here, to look again.
    pub(super) fn wake_all(&self) {
        // Taking the lock means that nobody is between looking and falling asleep.
        drop(lock(&self.room));
        self.wake.notify_all();
    }

    /// Fails if the world has.
    pub(super) fn check(&self, me: usize) -> Result<()> {
        self.world.failure(self.members[me]).map_or(Ok(()), Err)
    }

    /// Ends the world.
    pub(super) fn fail(&self, me: usize, error: Error) -> Error {
        self.world.fail(self.members[me], error)
    }

    /// Notes that the handle of `me` is gone: whoever waits for it need not wait for the deadline.
    pub(super) fn depart(&self, me: usize) {
        let mut room = lock(&self.room);
        room.gone.push(me);
        let sleepers = room.sleepers;
        drop(room);
        if sleepers > 0 {
            self.wake.notify_all();
        }
    }

    /// Brings `part` to call number `sequence` of this group.
    pub(super) fn publish(&self, me: usize, sequence: u64, call: Call, part: Part) -> Result<Arc<Entry>> {
        self.check(me)?;
        let mut room = lock(&self.room);
        let entry = room.entries.entry(sequence).or_insert_with(|| Arc::new(Entry::new(call, me, self.size())));
        let entry = Arc::clone(entry);
        if let Some(error) = call.mismatch(self.members[me], &entry.call, self.members[entry.first]) {
            drop(room);
            return Err(self.fail(me, error));
        }
        let wake = entry.bring(me, part) && room.sleepers > 0;
        drop(room);
        if wake {
            self.wake.notify_all();
        }
        Ok(entry)
    }

    /// `me` is done with call number `sequence`; the last one clears it away.
    pub(super) fn leave(&self, me: usize, sequence: u64, entry: &Entry) {
        let mut room = lock(&self.room);
        if !entry.leave(me) {
            return;
        }
        let cleared = room.entries.remove(&sequence);
        let wake = room.sleepers > 0;
        drop(room);
        // What the ranks have shared may be large, and is freed by code that is not ours: not under the lock.
        drop(cleared);
        if wake {
            self.wake.notify_all();
        }
    }

    /// Waits until all ranks have brought their part.
    pub(super) fn await_arrivals(&self, me: usize, entry: &Entry, until: Option<Instant>) -> Result<()> {
        let done = || entry.all_arrived();
        self.wait(me, entry.call.tag, until, done, |_| done().then_some(()), || entry.not_arrived())
    }

    /// Waits until all ranks have left.
    pub(super) fn await_leaving(&self, me: usize, entry: &Entry, until: Option<Instant>) -> Result<()> {
        let done = || entry.all_left();
        self.wait(me, entry.call.tag, until, done, |_| done().then_some(()), || entry.not_left())
    }

    /// Puts a message of `me` into the box of `to`.
    pub(super) fn post(&self, me: usize, to: usize, tag: Tag, bytes: Vec<u8>) -> Result<()> {
        self.check(me)?;
        let mut room = lock(&self.room);
        room.mail.entry((me, to)).or_default().push_back((tag, bytes));
        let wake = room.sleepers > 0;
        drop(room);
        if wake {
            self.wake.notify_all();
        }
        Ok(())
    }

    /// Takes the next message that `from` has sent to `me`.
    pub(super) fn collect(&self, me: usize, from: usize, tag: Tag) -> Result<(Tag, Vec<u8>)> {
        self.check(me)?;
        let take = |room: &mut Room| room.mail.get_mut(&(from, me)).and_then(VecDeque::pop_front);
        self.wait(me, tag, self.world.until(), || false, take, || vec![from])
    }

    /// Waits until `take` gives something: looks for a while (`soon` is a look without the lock), then sleeps. Fails when
    /// the world has, when one of the `missing` ranks has departed, and when the deadline has passed.
    fn wait<T>(
        &self,
        me: usize,
        tag: Tag,
        until: Option<Instant>,
        soon: impl Fn() -> bool,
        mut take: impl FnMut(&mut Room) -> Option<T>,
        missing: impl Fn() -> Vec<usize>,
    ) -> Result<T> {
        for look in 0..CLOSE_LOOKS + YIELDING_LOOKS {
            if soon() || self.world.has_failed() {
                break;
            }
            if look < CLOSE_LOOKS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        let mut room = lock(&self.room);
        loop {
            // A call that is complete is complete, whatever has happened since.
            if let Some(taken) = take(&mut room) {
                return Ok(taken);
            }
            self.check(me)?;
            let rank = self.members[me];
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            let departed = if room.gone.is_empty() { None } else { self.departed(me, &room, &missing()) };
            let error = if let Some(peer) = departed {
                let why = format!("it has left while {tag} waits for it");
                Some(Error::PeerFailed { rank, peer: self.members[peer], why })
            } else if left.is_some_and(|left| left.is_zero()) {
                let missing = missing().iter().map(|&rank| self.members[rank]).collect();
                Some(Error::Timeout { rank, tag, deadline: self.world.deadline, missing })
            } else {
                None
            };
            if let Some(error) = error {
                drop(room);
                return Err(self.fail(me, error));
            }
            room.sleepers += 1;
            room = match left {
                Some(left) => match self.wake.wait_timeout(room, left) {
                    Ok((room, _)) => room,
                    Err(poisoned) => poisoned.into_inner().0,
                },
                None => self.wake.wait(room).unwrap_or_else(PoisonError::into_inner),
            };
            room.sleepers -= 1;
        }
    }

    /// The first of the `missing` ranks that will not come any more.
    fn departed(&self, me: usize, room: &Room, missing: &[usize]) -> Option<usize> {
        missing.iter().copied().find(|&rank| rank != me && room.gone.contains(&rank))
    }
}
