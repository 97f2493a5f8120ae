//! Non-blocking operations: the buffers are shared, and each rank fetches its result when it waits for it (and so sums all of
//! an all_reduce itself: ranks wait at different times, and may not count on each other then).

use std::sync::Arc;

use super::entry::Entry;
use super::group::Group;
use crate::call::Operation;
use crate::error::{Error, Result, check_length};
use crate::tree::{SumF32, reduce_blocks};
use crate::work::Pending;

/// What is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    AllGather,
    ReduceScatter,
    AllReduce,
}

impl Kind {
    pub(super) fn operation(self) -> Operation {
        match self {
            Self::AllGather => Operation::StartAllGatherF32,
            Self::ReduceScatter => Operation::StartReduceScatterSumF32,
            Self::AllReduce => Operation::StartAllReduceSumF32,
        }
    }
}

/// One rank's side of a started operation.
pub(super) struct Flight {
    group: Arc<Group>,
    me: usize,
    sequence: u64,
    entry: Arc<Entry>,
    kind: Kind,
}

impl Flight {
    pub(super) fn new(group: Arc<Group>, me: usize, sequence: u64, entry: Arc<Entry>, kind: Kind) -> Self {
        Self { group, me, sequence, entry, kind }
    }

    /// The values of all ranks, which have all arrived.
    fn parts(&self) -> Result<Vec<&[f32]>> {
        let (me, tag) = (self.group.members[self.me], self.entry.call.tag);
        (0..self.group.size())
            .map(|rank| {
                let part = self.entry.shared(rank);
                // `as_ref` is foreign code: it may have changed its mind since the start.
                let (length, peer_length) = (self.entry.call.length, part.len());
                let peer = self.group.members[rank];
                if length == peer_length {
                    Ok(part)
                } else {
                    Err(self.group.fail(self.me, Error::LengthMismatch { tag, rank: me, length, peer, peer_length }))
                }
            })
            .collect()
    }
}

impl Pending for Flight {
    fn is_ready(&mut self) -> Result<bool> {
        if self.entry.all_arrived() {
            return Ok(true);
        }
        self.group.check(self.me)?;
        Ok(false)
    }

    fn wait_into(self: Box<Self>, out: &mut [f32]) -> Result<()> {
        let (world, length, tag) = (self.group.size(), self.entry.call.length, self.entry.call.tag);
        let expected = match self.kind {
            Kind::AllGather => world * length,
            Kind::ReduceScatter => length / world,
            Kind::AllReduce => length,
        };
        check_length(self.group.members[self.me], tag, "the output", expected, out.len())?;
        self.group.await_arrivals(self.me, &self.entry, self.group.world.until())?;
        let parts = self.parts()?;
        match self.kind {
            Kind::AllGather => {
                for (rank, part) in parts.iter().enumerate() {
                    out[rank * length..(rank + 1) * length].copy_from_slice(part);
                }
            }
            Kind::ReduceScatter | Kind::AllReduce => {
                let from = if self.kind == Kind::ReduceScatter { self.me * expected } else { 0 };
                let read =
                    |part: usize, range: std::ops::Range<usize>| &parts[part][from + range.start..from + range.end];
                reduce_blocks::<SumF32>(world, expected, read, |range, block| out[range].copy_from_slice(block));
            }
        }
        Ok(())
    }
}

impl Drop for Flight {
    /// Whether waited for or not, this rank needs nothing more; what it has brought stays until all have left.
    fn drop(&mut self) {
        self.group.leave(self.me, self.sequence, &self.entry);
    }
}
