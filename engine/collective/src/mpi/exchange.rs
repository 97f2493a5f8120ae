//! Calls that only move bytes: gathers, exchanges, broadcasts.

use std::ops::Range;
use std::sync::Arc;

use super::group::{Group, Meeting, Part, wire_tag};
use super::header::{Call, INLINE_BYTES};
use super::stage::{Advance, Stage, complete};
use super::stream::{Lane, Outgoing, PIECE_BYTES, lanes, missing, piece_of};
use crate::error::Result;

/// Everyone's `mine`, in rank order.
pub(super) fn all_gather(group: &Arc<Group>, call: Call, mine: &[u8], all: &mut [u8]) -> Result<()> {
    let (rank, size) = (group.rank(), mine.len());
    let at = |rank: usize| rank * size..(rank + 1) * size;
    all[at(rank)].copy_from_slice(mine);
    let small = size <= INLINE_BYTES;
    let mut meeting = Meeting::start(group, call, |_| if small { mine } else { &[] })?;
    complete(group, call.tag, &mut meeting)?;
    if small {
        group.peers().for_each(|peer| all[at(peer)].copy_from_slice(meeting.data(peer)));
        return Ok(());
    }
    let places = (0..group.world()).map(at).collect();
    exchange(group, call, Source::Same(mine), all, places)
}

/// Part number r of `send` to rank r.
pub(super) fn all_to_all(group: &Arc<Group>, call: Call, send: &[u8], receive: &mut [u8]) -> Result<()> {
    let (rank, size) = (group.rank(), send.len() / group.world());
    let at = |rank: usize| rank * size..(rank + 1) * size;
    receive[at(rank)].copy_from_slice(&send[at(rank)]);
    let small = size <= INLINE_BYTES;
    let mut meeting = Meeting::start(group, call, |peer| if small { &send[at(peer)] } else { &[] })?;
    complete(group, call.tag, &mut meeting)?;
    if small {
        group.peers().for_each(|peer| receive[at(peer)].copy_from_slice(meeting.data(peer)));
        return Ok(());
    }
    let places = (0..group.world()).map(at).collect();
    exchange(group, call, Source::Parts(send, size), receive, places)
}

/// Everyone's `mine`, of any length each.
pub(super) fn all_gather_varied(group: &Arc<Group>, call: Call, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
    let small = |length: usize| length <= INLINE_BYTES;
    let mut meeting = Meeting::start(group, call, |_| if small(mine.len()) { mine } else { &[] })?;
    complete(group, call.tag, &mut meeting)?;
    // What came with the headers is here; only the others have a place in the exchange.
    let mut places = Vec::with_capacity(group.world());
    let mut total = 0;
    for peer in 0..group.world() {
        let length = if peer == group.rank() || small(meeting.length(peer)) { 0 } else { meeting.length(peer) };
        places.push(total..total + length);
        total += length;
    }
    let mut large = vec![0; total];
    let source = if small(mine.len()) { &[][..] } else { mine };
    exchange(group, call, Source::Same(source), &mut large, places.clone())?;
    let of = |peer: usize| {
        if peer == group.rank() {
            mine.to_vec()
        } else if small(meeting.length(peer)) {
            meeting.data(peer).to_vec()
        } else {
            large[places[peer].clone()].to_vec()
        }
    };
    Ok((0..group.world()).map(of).collect())
}

/// The bytes of `root`.
pub(super) fn broadcast(group: &Arc<Group>, call: Call, bytes: &mut [u8], root: usize) -> Result<()> {
    let (rank, world) = (group.rank(), group.world());
    let small = bytes.len() <= INLINE_BYTES;
    if world == 1 {
        return Ok(());
    }
    {
        let own: &[u8] = if small && rank == root { bytes } else { &[] };
        let mut meeting = Meeting::start(group, call, |_| own)?;
        complete(group, call.tag, &mut meeting)?;
        if small {
            if rank != root {
                bytes.copy_from_slice(meeting.data(root));
            }
            return Ok(());
        }
    }
    // A binary tree that starts at the root: nobody sends more than twice what there is.
    let place = (rank + world - root) % world;
    let name = |place: usize| (place + root) % world;
    let children: Vec<usize> = [2 * place + 1, 2 * place + 2].into_iter().filter(|&at| at < world).map(name).collect();
    let tag = wire_tag(&call, Part::First);
    let mut parent = (rank != root).then(|| Lane::new(name((place - 1) / 2), tag, bytes.len()));
    if let Some(lane) = &mut parent {
        lane.open(group).map_err(|error| group.process().fail(error))?;
    }
    let mut stage = Broadcast { group, tag, bytes, parent, children, outgoing: Outgoing::default(), passed: 0 };
    complete(group, call.tag, &mut stage)?;
    stage.outgoing.park(group);
    Ok(())
}

struct Broadcast<'a> {
    group: &'a Group,
    tag: i32,
    bytes: &'a mut [u8],
    parent: Option<Lane>,
    children: Vec<usize>,
    outgoing: Outgoing,
    /// Bytes that are here and were sent on.
    passed: usize,
}

impl Stage for Broadcast<'_> {
    fn advance(&mut self) -> Result<Advance> {
        if self.is_done() {
            return Ok(Advance::Done);
        }
        if !self.outgoing.has_room(self.group)? {
            return Ok(Advance::Idle);
        }
        let chunk = match &mut self.parent {
            None => {
                let end = self.bytes.len().min(self.passed + PIECE_BYTES);
                piece_of(self.group, &self.bytes[self.passed..end])
            }
            Some(parent) => {
                let Some((range, chunk)) = parent.take(self.group)? else { return Ok(Advance::Idle) };
                self.bytes[range].copy_from_slice(chunk.bytes());
                chunk
            }
        };
        self.passed += chunk.bytes().len();
        self.outgoing.push(self.group, chunk, self.children.iter().copied(), self.tag)?;
        Ok(if self.is_done() { Advance::Done } else { Advance::Moved })
    }

    fn is_done(&self) -> bool {
        self.passed == self.bytes.len()
    }

    fn missing(&self) -> Vec<usize> {
        missing(&self.parent, &self.outgoing)
    }
}

/// What goes to whom.
enum Source<'a> {
    /// The same to all.
    Same(&'a [u8]),
    /// To rank r part number r, of this many bytes.
    Parts(&'a [u8], usize),
}

impl Source<'_> {
    /// How much goes to each peer.
    fn length(&self) -> usize {
        match self {
            Self::Same(bytes) => bytes.len(),
            Self::Parts(_, size) => *size,
        }
    }
}

/// Sends `source` while what rank r sends goes to `places[r]` of `all`.
fn exchange(group: &Group, call: Call, source: Source, all: &mut [u8], places: Vec<Range<usize>>) -> Result<()> {
    if group.world() == 1 {
        return Ok(());
    }
    let tag = wire_tag(&call, Part::First);
    let lanes = lanes(group, tag, |peer| places[peer].len()).map_err(|error| group.process().fail(error))?;
    let mut stage = Exchange { group, tag, source, all, places, lanes, outgoing: Outgoing::default(), sent: 0 };
    complete(group, call.tag, &mut stage)?;
    stage.outgoing.park(group);
    Ok(())
}

struct Exchange<'a> {
    group: &'a Group,
    tag: i32,
    source: Source<'a>,
    all: &'a mut [u8],
    places: Vec<Range<usize>>,
    lanes: Vec<Lane>,
    outgoing: Outgoing,
    /// Bytes sent to each peer.
    sent: usize,
}

impl Stage for Exchange<'_> {
    fn advance(&mut self) -> Result<Advance> {
        let (group, mut moved) = (self.group, false);
        let length = self.source.length();
        if self.sent < length && self.outgoing.has_room(group)? {
            let end = length.min(self.sent + PIECE_BYTES);
            match &self.source {
                Source::Same(bytes) => {
                    let chunk = piece_of(group, &bytes[self.sent..end]);
                    self.outgoing.push(group, chunk, group.peers(), self.tag)?;
                }
                Source::Parts(bytes, size) => {
                    for peer in group.peers() {
                        let chunk = piece_of(group, &bytes[peer * size + self.sent..peer * size + end]);
                        self.outgoing.push(group, chunk, [peer], self.tag)?;
                    }
                }
            }
            self.sent = end;
            moved = true;
        }
        for lane in &mut self.lanes {
            while let Some((range, chunk)) = lane.take(group)? {
                let place = self.places[lane.peer()].clone();
                self.all[place][range].copy_from_slice(chunk.bytes());
                moved = true;
            }
        }
        Ok(if self.is_done() { Advance::Done } else { Advance::moved(moved) })
    }

    fn is_done(&self) -> bool {
        self.sent >= self.source.length() && self.lanes.iter().all(Lane::is_done)
    }

    fn missing(&self) -> Vec<usize> {
        missing(&self.lanes, &self.outgoing)
    }
}
