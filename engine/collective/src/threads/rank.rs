//! The handle of one rank: the trait, in terms of the exchanges of its neighbours.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use half::bf16;

use super::entry::{Call, Part};
use super::group::Group;
use super::pending::{Flight, Kind};
use crate::call::{Backend, Operation, Traffic};
use crate::collective::Collective;
use crate::error::{Error, Result, check_length};
use crate::status::Status;
use crate::tag::Tag;
use crate::topology::Topology;
use crate::tree::{MaxF64, SumBf16, SumF32, SumF64};
use crate::work::{Shared, Work};

pub(super) struct Rank {
    pub(super) group: Arc<Group>,
    pub(super) me: usize,
    sequence: AtomicU64,
    sent_bytes: AtomicU64,
    received_bytes: AtomicU64,
    calls: AtomicU64,
}

impl Rank {
    pub(super) fn handle(group: Arc<Group>, me: usize) -> Arc<dyn Collective> {
        Arc::new(Self {
            group,
            me,
            sequence: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
            received_bytes: AtomicU64::new(0),
            calls: AtomicU64::new(0),
        })
    }

    pub(super) fn size(&self) -> usize {
        self.group.size()
    }

    /// This rank as the world knows it, for errors.
    pub(super) fn name(&self) -> usize {
        self.group.members[self.me]
    }

    /// The number of the next call, which all ranks number alike.
    pub(super) fn next(&self) -> u64 {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.sequence.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn count(&self, sent_bytes: usize, received_bytes: usize) {
        self.sent_bytes.fetch_add(sent_bytes as u64, Ordering::Relaxed);
        self.received_bytes.fetch_add(received_bytes as u64, Ordering::Relaxed);
    }

    fn check_peer(&self, tag: Tag, peer: usize) -> Result<()> {
        if peer < self.size() { Ok(()) } else { Err(Error::NoSuchRank { tag, root: peer, world: self.size() }) }
    }

    fn start(&self, tag: Tag, kind: Kind, values: Shared) -> Result<Work> {
        let length = (*values).as_ref().len();
        let call = Call { tag, operation: kind.operation(), length };
        let others = self.size() - 1;
        if kind == Kind::ReduceScatter {
            check_length(self.name(), tag, "a reduce_scatter", length.next_multiple_of(self.size()), length)?;
        }
        let sequence = self.next();
        let entry = self.group.publish(self.me, sequence, call, Part::Shared(values))?;
        let bytes = if kind == Kind::ReduceScatter { length / self.size() } else { length } * others * size_of::<f32>();
        self.count(bytes, bytes);
        Ok(Work::new(Flight::new(Arc::clone(&self.group), self.me, sequence, entry, kind)))
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.abort("its thread panicked");
        }
        self.group.depart(self.me);
    }
}

impl fmt::Debug for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Threads {{ rank: {}, world: {} }}", self.me, self.size())
    }
}

impl Collective for Rank {
    fn rank(&self) -> usize {
        self.me
    }

    fn world(&self) -> usize {
        self.size()
    }

    fn deadline(&self) -> Duration {
        self.group.world.deadline
    }

    fn backend(&self) -> Backend {
        Backend::Threads
    }

    fn topology(&self) -> &Topology {
        &self.group.topology
    }

    fn traffic(&self) -> Traffic {
        Traffic {
            sent_bytes: self.sent_bytes.load(Ordering::Relaxed),
            received_bytes: self.received_bytes.load(Ordering::Relaxed),
            calls: self.calls.load(Ordering::Relaxed),
        }
    }

    fn all_reduce_sum_f32(&self, tag: Tag, values: &mut [f32]) -> Result<()> {
        self.reduce_everywhere::<SumF32>(tag, Operation::AllReduceSumF32, values)
    }

    fn all_reduce_sum_f64(&self, tag: Tag, values: &mut [f64]) -> Result<()> {
        self.reduce_everywhere::<SumF64>(tag, Operation::AllReduceSumF64, values)
    }

    fn all_reduce_max_f64(&self, tag: Tag, values: &mut [f64]) -> Result<()> {
        self.reduce_everywhere::<MaxF64>(tag, Operation::AllReduceMaxF64, values)
    }

    fn all_reduce_sum_bf16(&self, tag: Tag, values: &mut [bf16]) -> Result<()> {
        self.reduce_everywhere::<SumBf16>(tag, Operation::AllReduceSumBf16, values)
    }

    fn reduce_scatter_sum_f32(&self, tag: Tag, values: &[f32], mine: &mut [f32]) -> Result<()> {
        self.reduce_parts::<SumF32>(tag, Operation::ReduceScatterSumF32, values, mine)
    }

    fn reduce_scatter_sum_bf16(&self, tag: Tag, values: &[bf16], mine: &mut [bf16]) -> Result<()> {
        self.reduce_parts::<SumBf16>(tag, Operation::ReduceScatterSumBf16, values, mine)
    }

    fn all_gather(&self, tag: Tag, mine: &[u8], all: &mut [u8]) -> Result<()> {
        self.gather(tag, mine, all)
    }

    fn all_gather_varied(&self, tag: Tag, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.gather_copies(tag, Operation::AllGatherVaried, mine, |parts| {
            parts.iter().map(|part| part.to_vec()).collect()
        })
    }

    fn all_to_all(&self, tag: Tag, send: &[u8], receive: &mut [u8]) -> Result<()> {
        self.transpose(tag, send, receive)
    }

    fn broadcast(&self, tag: Tag, bytes: &mut [u8], root: usize) -> Result<()> {
        self.check_peer(tag, root)?;
        self.spread(tag, bytes, root)
    }

    fn barrier(&self, tag: Tag) -> Result<()> {
        self.gather_copies(tag, Operation::Barrier, &[], |_| ())
    }

    fn agree(&self, tag: Tag, status: Status) -> Result<Status> {
        self.gather_copies(tag, Operation::Agree, &[status.code()], |parts| {
            let worst = parts.iter().flat_map(|part| part.iter()).max();
            worst.map_or(Status::Failed, |&code| Status::from_code(code))
        })
    }

    fn send(&self, tag: Tag, bytes: Vec<u8>, to: usize) -> Result<()> {
        self.check_peer(tag, to)?;
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.count(if to == self.me { 0 } else { bytes.len() }, 0);
        self.group.post(self.me, to, tag, bytes)
    }

    fn receive(&self, tag: Tag, bytes: &mut [u8], from: usize) -> Result<()> {
        self.check_peer(tag, from)?;
        self.calls.fetch_add(1, Ordering::Relaxed);
        let (sent, message) = self.group.collect(self.me, from, tag)?;
        let (rank, peer) = (self.name(), self.group.members[from]);
        if sent != tag {
            let error = Error::Desync { rank, called: tag, peer, peer_called: sent };
            return Err(self.group.fail(self.me, error));
        }
        if message.len() != bytes.len() {
            let (length, peer_length) = (bytes.len(), message.len());
            return Err(self.group.fail(self.me, Error::LengthMismatch { tag, rank, length, peer, peer_length }));
        }
        self.count(0, if from == self.me { 0 } else { message.len() });
        bytes.copy_from_slice(&message);
        Ok(())
    }

    fn start_all_gather_f32(&self, tag: Tag, mine: Shared) -> Result<Work> {
        self.start(tag, Kind::AllGather, mine)
    }

    fn start_reduce_scatter_sum_f32(&self, tag: Tag, values: Shared) -> Result<Work> {
        self.start(tag, Kind::ReduceScatter, values)
    }

    fn start_all_reduce_sum_f32(&self, tag: Tag, values: Shared) -> Result<Work> {
        self.start(tag, Kind::AllReduce, values)
    }

    fn split(&self, tag: Tag, color: Option<usize>, key: usize) -> Result<Option<Arc<dyn Collective>>> {
        self.split_by(tag, color, key)
    }

    fn abort(&self, why: &str) {
        let rank = self.name();
        self.group.fail(self.me, Error::PeerFailed { rank, peer: rank, why: why.to_owned() });
    }
}
