//! Operations that go on while the caller computes.
//!
//! Everything is posted at the start, straight from the caller's [`Shared`] values, so that data can move whenever MPI
//! gets a look; the second half of an all_reduce is started by whichever call of this process waits or asks next. MPI has no
//! progress of its own, so how much is hidden depends on how often it is called.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::group::{Group, Meeting, Part, send_chunk, wire_tag};
use super::header::Call;
use super::library::Memory;
use super::pool::Chunk;
use super::process::lock;
use super::reduce::{part, reduce_row, take_row, within};
use super::stage::{Advance, Stage, drive};
use super::stream::{Lane, Outgoing, WHOLE_PIECE_BYTES, missing};
use crate::bytes::{as_bytes, as_bytes_mut};
use crate::call::Operation;
use crate::error::{Result, check_length};
use crate::tag::Tag;
use crate::tree::SumF32;
use crate::work::{Pending, Shared, Work};

const NUMBER: usize = size_of::<f32>();

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Gather,
    Scatter,
    Reduce,
}

impl Kind {
    fn operation(self) -> Operation {
        match self {
            Self::Gather => Operation::StartAllGatherF32,
            Self::Scatter => Operation::StartReduceScatterSumF32,
            Self::Reduce => Operation::StartAllReduceSumF32,
        }
    }
}

/// Starts an operation on `values`.
pub(super) fn start(group: &Arc<Group>, tag: Tag, kind: Kind, values: Shared) -> Result<Work> {
    let length = (*values).as_ref().len();
    if kind == Kind::Scatter {
        let world = group.world();
        check_length(
            group.process().rank(),
            tag,
            "values of a reduce_scatter",
            length.next_multiple_of(world),
            length,
        )?;
    }
    let call = group.next_call(tag, kind.operation(), length)?;
    let meeting = Meeting::start(group, call, |_| &[])?;
    let started = Started::new(group, call, kind, values, meeting).map_err(|error| group.process().fail(error))?;
    let stage = Arc::new(Mutex::new(started));
    group.process().adopt(Arc::clone(&stage) as _);
    Ok(Work::new(Handle { group: Arc::clone(group), tag, stage }))
}

struct Started {
    group: Arc<Group>,
    call: Call,
    kind: Kind,
    values: Shared,
    meeting: Meeting,
    first: Vec<Lane>,
    second: Vec<Lane>,
    /// Numbers of this rank's part that are reduced.
    reduced: usize,
    /// Pieces of the result and their places in it, in bytes.
    results: Vec<(usize, Arc<Chunk>)>,
}

impl Started {
    fn new(group: &Arc<Group>, call: Call, kind: Kind, values: Shared, meeting: Meeting) -> Result<Self> {
        let (first, second) = (Vec::new(), Vec::new());
        let group = Arc::clone(group);
        let mut this = Self { group, call, kind, values, meeting, first, second, reduced: 0, results: Vec::new() };
        let mine = this.part(this.group.rank()).len() * NUMBER;
        let tag = wire_tag(&call, Part::First);
        for peer in this.group.peers() {
            let mut lane = Lane::whole(peer, tag, mine);
            lane.open(&this.group)?;
            this.first.push(lane);
            if kind == Kind::Reduce {
                let bytes = this.part(peer).len() * NUMBER;
                let mut lane = Lane::whole(peer, wire_tag(&call, Part::Second), bytes);
                lane.open(&this.group)?;
                this.second.push(lane);
            }
        }
        let mut sends = Vec::new();
        for peer in this.group.peers() {
            let range = if kind == Kind::Gather { 0..call.length } else { this.part(peer) };
            for bytes in as_bytes(&(*this.values).as_ref()[range]).chunks(WHOLE_PIECE_BYTES) {
                let memory = Memory::Values { _values: Arc::clone(&this.values) };
                // SAFETY: a `Shared` gives the same unchanged values for as long as it lives, and the memory is one.
                sends.push(unsafe { this.group.comm().start_send(bytes, memory, peer, tag) }?);
                this.group.count_sent(bytes.len());
            }
        }
        this.group.park(sends);
        Ok(this)
    }

    /// What rank `rank` reduces, of the numbers brought; in a gather, all that each brings.
    fn part(&self, rank: usize) -> Range<usize> {
        match self.kind {
            Kind::Gather => 0..self.call.length,
            Kind::Scatter | Kind::Reduce => part(self.call.length, self.group.world(), rank),
        }
    }

    /// Where what rank `rank` gives begins in the result, in bytes.
    fn place(&self, rank: usize) -> usize {
        match self.kind {
            Kind::Gather => rank * self.call.length * NUMBER,
            Kind::Scatter => 0,
            Kind::Reduce => self.part(rank).start * NUMBER,
        }
    }

    fn result_length(&self) -> usize {
        match self.kind {
            Kind::Gather => self.call.length * self.group.world(),
            Kind::Scatter => self.call.length / self.group.world(),
            Kind::Reduce => self.call.length,
        }
    }

    fn reduce(&mut self) -> Result<bool> {
        let (group, rank) = (Arc::clone(&self.group), self.group.rank());
        let mine = self.part(rank);
        let mut moved = false;
        while self.reduced < mine.len()
            && let Some(row) = take_row(&group, &mut self.first)?
        {
            let range = within(&mine, self.reduced..self.reduced + WHOLE_PIECE_BYTES / NUMBER);
            let mut total = group.process().pool().get(range.len() * NUMBER);
            let own = &(*self.values).as_ref()[range.clone()];
            reduce_row::<SumF32>(&row, own, |at, block| total.numbers_mut()[at].copy_from_slice(block));
            let total = Arc::new(total);
            if self.kind == Kind::Reduce {
                let tag = wire_tag(&self.call, Part::Second);
                for peer in group.peers() {
                    group.park([send_chunk(group.comm(), &total, peer, tag)?]);
                    group.count_sent(total.bytes().len());
                }
            }
            self.results.push((self.place(rank) + self.reduced * NUMBER, total));
            self.reduced += range.len();
            moved = true;
        }
        Ok(moved)
    }
}

impl Stage for Started {
    fn advance(&mut self) -> Result<Advance> {
        // Data of a rank that is in another call must not be looked at.
        match self.meeting.advance()? {
            Advance::Done => {}
            other => return Ok(other),
        }
        let mut moved = false;
        if self.kind != Kind::Gather {
            moved |= self.reduce()?;
        }
        let group = Arc::clone(&self.group);
        let mut results = Vec::new();
        let whole = if self.kind == Kind::Gather { &mut self.first } else { &mut self.second };
        for lane in whole {
            while let Some((range, chunk)) = lane.take(&group)? {
                results.push((lane.peer(), range, chunk));
            }
        }
        moved |= !results.is_empty();
        for (peer, range, chunk) in results {
            self.results.push((self.place(peer) + range.start, Arc::new(chunk)));
        }
        Ok(if self.is_done() { Advance::Done } else { Advance::moved(moved) })
    }

    fn is_done(&self) -> bool {
        let mine = self.part(self.group.rank()).len();
        self.meeting.is_done()
            && (self.kind == Kind::Gather || self.reduced >= mine)
            && self.first.iter().chain(&self.second).all(Lane::is_done)
    }

    fn missing(&self) -> Vec<usize> {
        if !self.meeting.is_done() {
            return self.meeting.missing();
        }
        match missing(&self.first, &Outgoing::default()) {
            late if late.is_empty() => missing(&self.second, &Outgoing::default()),
            late => late,
        }
    }
}

/// What the caller has of an operation under way. The operation itself goes on without it.
struct Handle {
    group: Arc<Group>,
    tag: Tag,
    stage: Arc<Mutex<Started>>,
}

impl Pending for Handle {
    fn is_ready(&mut self) -> Result<bool> {
        let process = self.group.process();
        process.progress()?;
        let look = lock(&self.stage).advance();
        Ok(look.map_err(|error| process.fail(error))? == Advance::Done)
    }

    fn wait_into(self: Box<Self>, out: &mut [f32]) -> Result<()> {
        let process = self.group.process();
        let expected = lock(&self.stage).result_length();
        check_length(process.rank(), self.tag, "result", expected, out.len())?;
        process.check()?;
        drive(&self.group, self.tag, || lock(&self.stage).advance(), || lock(&self.stage).missing())?;
        process.release(&self.stage);
        let mut stage = lock(&self.stage);
        let results = std::mem::take(&mut stage.results);
        let bytes = as_bytes_mut(out);
        if stage.kind == Kind::Gather {
            let own = as_bytes((*stage.values).as_ref());
            let place = stage.place(self.group.rank());
            bytes[place..place + own.len()].copy_from_slice(own);
        }
        for (place, chunk) in results {
            bytes[place..place + chunk.bytes().len()].copy_from_slice(chunk.bytes());
        }
        Ok(())
    }
}
