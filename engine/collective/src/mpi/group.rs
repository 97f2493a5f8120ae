//! One communicator: its members, its order of calls, and how ranks meet in one of them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::header::{Call, HEADER_BYTES, INLINE_BYTES, MESSAGE_BYTES, compare, encode};
use super::library::{Comm, Memory, Receive, Sending};
use super::pool::{Chunk, numbers};
use super::process::Process;
use super::stage::{Advance, Stage};
use crate::bytes::Plain;
use crate::call::{Operation, Traffic};
use crate::error::{Error, Result};
use crate::tag::Tag;
use crate::topology::Topology;

/// A message between two ranks: its header, and the data that does not fit beside it.
pub(super) const MESSAGE_HEADER: i32 = 0;
pub(super) const MESSAGE_DATA: i32 = 1;
/// Calls of which messages may be on the way at once; 3 tags each must stay below the 32,767 that MPI guarantees.
const SLOTS: u64 = 8192;

/// What a collective message is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Part {
    Header,
    /// What ranks bring.
    First,
    /// What ranks have made of it.
    Second,
}

/// One communicator, as one of its ranks sees it.
pub(super) struct Group {
    process: Arc<Process>,
    comm: Comm,
    rank: usize,
    /// The rank in the world of every member.
    members: Vec<usize>,
    pub(super) topology: Topology,
    sequence: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
    calls: AtomicU64,
    /// One sender at a time, so that a message and its header leave in the same order.
    pub(super) sender: Mutex<()>,
    /// One receiver per peer at a time, for the same reason.
    pub(super) receivers: Vec<Mutex<()>>,
}

impl Group {
    pub(super) fn new(
        process: Arc<Process>,
        comm: Comm,
        rank: usize,
        members: Vec<usize>,
        topology: Topology,
    ) -> Arc<Self> {
        let receivers = members.iter().map(|_| Mutex::default()).collect();
        Arc::new(Self {
            process,
            comm,
            rank,
            members,
            topology,
            sequence: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            calls: AtomicU64::new(0),
            sender: Mutex::default(),
            receivers,
        })
    }

    pub(super) fn process(&self) -> &Arc<Process> {
        &self.process
    }

    pub(super) fn comm(&self) -> Comm {
        self.comm
    }

    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    pub(super) fn world(&self) -> usize {
        self.members.len()
    }

    /// The rank in the world of member `rank`.
    pub(super) fn world_rank(&self, rank: usize) -> usize {
        self.members[rank]
    }

    /// The others, starting after this rank, so that not all ranks send to the same one first.
    pub(super) fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, world) = (self.rank, self.world());
        (1..world).map(move |step| (rank + step) % world)
    }

    pub(super) fn traffic(&self) -> Traffic {
        let at = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Traffic { sent_bytes: at(&self.sent), received_bytes: at(&self.received), calls: at(&self.calls) }
    }

    pub(super) fn count_call(&self) {
        self.calls.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn count_received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Leaves sends to complete by themselves.
    pub(super) fn park(&self, sends: impl IntoIterator<Item = Sending>) {
        self.process.park(sends.into_iter().map(|send| {
            let to = self.world_rank(send.to());
            send.named(to)
        }));
    }

    /// Fails if `rank` is no member.
    pub(super) fn check_rank(&self, tag: Tag, rank: usize) -> Result<()> {
        let world = self.world();
        if rank < world { Ok(()) } else { Err(Error::NoSuchRank { tag, root: rank, world }) }
    }

    /// The next call, all ranks being in the same order.
    pub(super) fn next_call(&self, tag: Tag, operation: Operation, length: usize) -> Result<Call> {
        self.process.check()?;
        self.count_call();
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        Ok(Call { tag, operation: Some(operation), length, sequence })
    }
}

/// The MPI tag of a message of a collective call.
pub(super) fn wire_tag(call: &Call, part: Part) -> i32 {
    2 + (call.sequence % SLOTS) as i32 * 3 + part as i32
}

/// Ranks telling each other which call they are in, with their data if it is small.
pub(super) struct Meeting {
    group: Arc<Group>,
    call: Call,
    any_length: bool,
    open: Vec<Option<Receive>>,
    came: Vec<Option<(usize, Chunk)>>,
    waiting: usize,
}

impl Meeting {
    /// Sends a header to every peer, with `data(peer)` beside it, which must fit ([`INLINE_BYTES`]).
    pub(super) fn start<'a>(group: &Arc<Group>, call: Call, data: impl Fn(usize) -> &'a [u8]) -> Result<Self> {
        let any_length = call.operation == Some(Operation::AllGatherVaried);
        Self::start_at_length(group, call, any_length, data).map_err(|error| group.process.fail(error))
    }

    fn start_at_length<'a>(
        group: &Arc<Group>,
        call: Call,
        any_length: bool,
        data: impl Fn(usize) -> &'a [u8],
    ) -> Result<Self> {
        let pool = group.process.pool();
        let tag = wire_tag(&call, Part::Header);
        let mut open: Vec<Option<Receive>> = (0..group.world()).map(|_| None).collect();
        for peer in group.peers() {
            open[peer] = Some(group.comm.start_receive(pool.get(MESSAGE_BYTES), Some(peer), tag)?);
        }
        let mut sends = Vec::with_capacity(group.world());
        for peer in group.peers() {
            let chunk = message(group, &call, data(peer));
            group.count_sent(chunk.bytes().len() - HEADER_BYTES);
            sends.push(send_chunk(group.comm, &Arc::new(chunk), peer, tag)?);
        }
        group.park(sends);
        let (world, waiting) = (group.world(), group.world() - 1);
        let came = (0..world).map(|_| None).collect();
        Ok(Self { group: Arc::clone(group), call, any_length, open, came, waiting })
    }

    /// The bytes that came beside the header of `peer`.
    pub(super) fn data(&self, peer: usize) -> &[u8] {
        self.came[peer].as_ref().map_or(&[], |(_, chunk)| &chunk.bytes()[HEADER_BYTES..])
    }

    /// The same, as numbers.
    pub(super) fn numbers<T: Plain>(&self, peer: usize) -> &[T] {
        numbers(self.data(peer))
    }

    /// The length that `peer` has brought.
    pub(super) fn length(&self, peer: usize) -> usize {
        self.came[peer].as_ref().map_or(self.call.length, |(length, _)| *length)
    }
}

impl Stage for Meeting {
    fn advance(&mut self) -> Result<Advance> {
        let mut moved = false;
        for peer in 0..self.open.len() {
            let Some(open) = &mut self.open[peer] else { continue };
            if !open.test()? {
                continue;
            }
            let Some(done) = self.open[peer].take() else { continue };
            let chunk = done.take();
            let (rank, from) = (self.group.process.rank(), self.group.world_rank(peer));
            let length = compare(&self.call, self.any_length, chunk.bytes(), rank, from)?;
            self.group.count_received(chunk.bytes().len() - HEADER_BYTES);
            self.came[peer] = Some((length, chunk));
            self.waiting -= 1;
            moved = true;
        }
        Ok(if self.waiting == 0 { Advance::Done } else { Advance::moved(moved) })
    }

    fn is_done(&self) -> bool {
        self.waiting == 0
    }

    fn missing(&self) -> Vec<usize> {
        (0..self.open.len()).filter(|&peer| self.open[peer].is_some()).collect()
    }
}

/// A header with `data` beside it.
pub(super) fn message(group: &Group, call: &Call, data: &[u8]) -> Chunk {
    debug_assert!(data.len() <= INLINE_BYTES);
    let mut chunk = group.process.pool().get(HEADER_BYTES + data.len());
    let bytes = chunk.bytes_mut();
    encode(call, bytes);
    bytes[HEADER_BYTES..].copy_from_slice(data);
    chunk
}

/// Starts to send all of `chunk`.
pub(super) fn send_chunk(comm: Comm, chunk: &Arc<Chunk>, to: usize, tag: i32) -> Result<Sending> {
    // SAFETY: the memory keeps the chunk; it is shared from here on, so nobody can change it.
    unsafe { comm.start_send(chunk.bytes(), Memory::Chunk { _chunk: Arc::clone(chunk) }, to, tag) }
}
