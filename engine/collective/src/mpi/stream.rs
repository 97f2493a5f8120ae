//! Large data in pieces: few pieces are on the way at a time, so that buffers stay small, warm and owned.
//!
//! The caller's memory is only touched here and now, never by MPI: after a timeout MPI may still write to a piece, but
//! nobody else looks at it.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use super::group::{Group, send_chunk};
use super::library::{Receive, Sending};
use super::pool::Chunk;
use crate::error::Result;

/// The size of a piece. It fits the cache beside the memory it is copied to.
pub(super) const PIECE_BYTES: usize = 1 << 19;
/// The size of a piece that is sent from where it lies. Far below the 2^28 elements that MPI's counts make safe.
pub(super) const WHOLE_PIECE_BYTES: usize = 8 << 20;
/// Pieces on the way from and to one peer.
const WINDOW: usize = 4;

/// What comes from one peer.
pub(super) struct Lane {
    peer: usize,
    tag: i32,
    bytes: usize,
    piece: usize,
    window: usize,
    posted: usize,
    taken: usize,
    open: VecDeque<Receive>,
    ready: bool,
}

impl Lane {
    /// `bytes` from `peer` in pieces of [`PIECE_BYTES`].
    pub(super) fn new(peer: usize, tag: i32, bytes: usize) -> Self {
        Self {
            peer,
            tag,
            bytes,
            piece: PIECE_BYTES,
            window: WINDOW,
            posted: 0,
            taken: 0,
            open: VecDeque::new(),
            ready: false,
        }
    }

    /// `bytes` from `peer` in pieces of [`WHOLE_PIECE_BYTES`], all of them expected at once.
    pub(super) fn whole(peer: usize, tag: i32, bytes: usize) -> Self {
        Self { piece: WHOLE_PIECE_BYTES, window: usize::MAX, ..Self::new(peer, tag, bytes) }
    }

    /// Opens receives for what comes next.
    pub(super) fn open(&mut self, group: &Group) -> Result<()> {
        while self.posted < self.bytes && self.open.len() < self.window {
            let size = self.piece.min(self.bytes - self.posted);
            let chunk = group.process().pool().get(size);
            self.open.push_back(group.comm().start_receive(chunk, Some(self.peer), self.tag)?);
            self.posted += size;
        }
        Ok(())
    }

    /// True if the next piece is here, or none is to come.
    pub(super) fn is_ready(&mut self) -> Result<bool> {
        if !self.ready
            && let Some(next) = self.open.front_mut()
        {
            self.ready = next.test()?;
        }
        Ok(self.ready || self.is_done())
    }

    /// The next piece and where it belongs, in bytes, if it is here.
    pub(super) fn take(&mut self, group: &Group) -> Result<Option<(Range<usize>, Chunk)>> {
        if !self.is_ready()? || self.is_done() {
            return Ok(None);
        }
        let Some(done) = self.open.pop_front() else { return Ok(None) };
        self.ready = false;
        let chunk = done.take();
        let range = self.taken..self.taken + chunk.bytes().len();
        self.taken = range.end;
        if self.peer != group.rank() {
            group.count_received(range.len());
        }
        self.open(group)?;
        Ok(Some((range, chunk)))
    }

    /// True if all of it was taken.
    pub(super) fn is_done(&self) -> bool {
        self.taken >= self.bytes
    }

    pub(super) fn peer(&self) -> usize {
        self.peer
    }
}

/// Opens a lane from every peer, of `bytes(peer)` each.
pub(super) fn lanes(group: &Group, tag: i32, bytes: impl Fn(usize) -> usize) -> Result<Vec<Lane>> {
    let mut lanes: Vec<Lane> = group.peers().map(|peer| Lane::new(peer, tag, bytes(peer))).collect();
    for lane in &mut lanes {
        lane.open(group)?;
    }
    Ok(lanes)
}

/// What goes to the peers.
#[derive(Default)]
pub(super) struct Outgoing(VecDeque<Sending>);

impl Outgoing {
    /// True if another piece may be sent to every peer.
    pub(super) fn has_room(&mut self, group: &Group) -> Result<bool> {
        let limit = WINDOW * group.world();
        while let Some(first) = self.0.front_mut()
            && first.test()?
        {
            self.0.pop_front();
        }
        if self.0.len() >= limit {
            // A slow peer at the front must not hide that others are done.
            let mut failure = Ok(());
            self.0.retain_mut(|send| {
                send.test().map(|done| !done).unwrap_or_else(|error| {
                    failure = Err(error);
                    false
                })
            });
            failure?;
        }
        Ok(self.0.len() < limit)
    }

    /// Sends `chunk` to each of `peers`.
    pub(super) fn push(
        &mut self,
        group: &Group,
        chunk: Chunk,
        peers: impl IntoIterator<Item = usize>,
        tag: i32,
    ) -> Result<()> {
        let chunk = Arc::new(chunk);
        for peer in peers {
            self.0.push_back(send_chunk(group.comm(), &chunk, peer, tag)?);
            group.count_sent(chunk.bytes().len());
        }
        Ok(())
    }

    /// Those who have not taken what was sent to them.
    pub(super) fn waiting_for(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().map(Sending::to)
    }

    /// Leaves the rest to complete by itself.
    pub(super) fn park(self, group: &Group) {
        group.park(self.0);
    }
}

/// A copy of `bytes` in a buffer of its own.
pub(super) fn piece_of(group: &Group, bytes: &[u8]) -> Chunk {
    let mut chunk = group.process().pool().get(bytes.len());
    chunk.bytes_mut().copy_from_slice(bytes);
    chunk
}

/// The ranks of the lanes that are not done and of the sends that have not left, each once.
pub(super) fn missing<'a>(lanes: impl IntoIterator<Item = &'a Lane>, outgoing: &Outgoing) -> Vec<usize> {
    let late = lanes.into_iter().filter(|lane| !lane.is_done()).map(Lane::peer);
    let mut ranks: Vec<usize> = late.collect();
    if ranks.is_empty() {
        ranks.extend(outgoing.waiting_for());
    }
    ranks.sort_unstable();
    ranks.dedup();
    ranks
}
