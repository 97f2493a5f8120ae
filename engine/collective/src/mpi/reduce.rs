//! Sums and maxima over the ranks, along the fixed tree.
//!
//! MPI's own reductions add in an order of their choice. Here every rank gets one part of the numbers from all others, adds
//! that part up along the tree, and passes the result on: the traffic of a ring, the bits of [`tree_sum`](crate::tree_sum).

use std::ops::Range;
use std::sync::Arc;

use super::group::{Group, Meeting, Part, wire_tag};
use super::header::{Call, INLINE_BYTES};
use super::pool::Chunk;
use super::stage::{Advance, Stage, complete};
use super::stream::{Lane, Outgoing, PIECE_BYTES, lanes, missing, piece_of};
use crate::bytes::{as_bytes, as_bytes_mut};
use crate::error::Result;
use crate::tree::{Reduction, reduce_blocks};

/// The part of `length` numbers that rank `rank` adds up: equal parts, the last ones shorter.
pub(super) fn part(length: usize, world: usize, rank: usize) -> Range<usize> {
    let size = length.div_ceil(world);
    (rank * size).min(length)..((rank + 1) * size).min(length)
}

/// A part of `range`, counted from its start.
pub(super) fn within(range: &Range<usize>, piece: Range<usize>) -> Range<usize> {
    (range.start + piece.start).min(range.end)..(range.start + piece.end).min(range.end)
}

/// Replaces `values` by their reduction over the ranks.
pub(super) fn all_reduce<R: Reduction>(group: &Arc<Group>, call: Call, values: &mut [R::Item]) -> Result<()>
where
    R::Item: Default,
{
    if group.world() == 1 {
        return Ok(());
    }
    if size_of_val(values) <= INLINE_BYTES {
        let mine = values.to_vec();
        let mut meeting = Meeting::start(group, call, |_| as_bytes(&mine))?;
        complete(group, call.tag, &mut meeting)?;
        let of = |rank: usize| if rank == group.rank() { &mine[..] } else { meeting.numbers(rank) };
        reduce_blocks::<R>(
            group.world(),
            values.len(),
            |rank, range| &of(rank)[range],
            |range, block| values[range].copy_from_slice(block),
        );
        return Ok(());
    }
    complete(group, call.tag, &mut Meeting::start(group, call, |_| &[])?)?;
    let mut stage = AllReduce::<R>::start(group, call, values).map_err(|error| group.process().fail(error))?;
    complete(group, call.tag, &mut stage)?;
    stage.outgoing.park(group);
    Ok(())
}

/// Writes the reduction of everyone's part number `rank` of `values` to `mine`.
pub(super) fn reduce_scatter<R: Reduction>(
    group: &Arc<Group>,
    call: Call,
    values: &[R::Item],
    mine: &mut [R::Item],
) -> Result<()>
where
    R::Item: Default,
{
    let (world, rank) = (group.world(), group.rank());
    if world == 1 {
        mine.copy_from_slice(values);
        return Ok(());
    }
    let part = |rank: usize| rank * mine.len()..(rank + 1) * mine.len();
    let own = &values[part(rank)];
    if size_of_val(own) <= INLINE_BYTES {
        let mut meeting = Meeting::start(group, call, |peer| as_bytes(&values[part(peer)]))?;
        complete(group, call.tag, &mut meeting)?;
        let of = |from: usize| if from == rank { own } else { meeting.numbers(from) };
        reduce_blocks::<R>(
            world,
            own.len(),
            |from, range| &of(from)[range],
            |range, block| mine[range].copy_from_slice(block),
        );
        return Ok(());
    }
    complete(group, call.tag, &mut Meeting::start(group, call, |_| &[])?)?;
    let tag = wire_tag(&call, Part::First);
    let failed = |error| group.process().fail(error);
    let lanes = lanes(group, tag, |_| size_of_val(own)).map_err(failed)?;
    let mut stage =
        ReduceScatter::<R> { group, tag, values, mine, lanes, outgoing: Outgoing::default(), sent: 0, done: 0 };
    complete(group, call.tag, &mut stage)?;
    stage.outgoing.park(group);
    Ok(())
}

/// Numbers in a piece.
fn step<T>() -> usize {
    PIECE_BYTES / size_of::<T>()
}

/// One piece from every peer, by rank, if all are here.
pub(super) fn take_row(group: &Group, lanes: &mut [Lane]) -> Result<Option<Vec<Option<Chunk>>>> {
    for lane in lanes.iter_mut() {
        if !lane.is_ready()? {
            return Ok(None);
        }
    }
    let mut row: Vec<Option<Chunk>> = (0..group.world()).map(|_| None).collect();
    for lane in lanes {
        row[lane.peer()] = lane.take(group)?.map(|(_, chunk)| chunk);
    }
    Ok(Some(row))
}

/// Reduces one row of pieces and this rank's own piece.
pub(super) fn reduce_row<R: Reduction>(
    row: &[Option<Chunk>],
    own: &[R::Item],
    write: impl FnMut(Range<usize>, &[R::Item]),
) where
    R::Item: Default,
{
    let of = |rank: usize| row[rank].as_ref().map_or(own, Chunk::numbers);
    reduce_blocks::<R>(row.len(), own.len(), |rank, range| &of(rank)[range], write);
}

struct AllReduce<'a, R: Reduction> {
    group: &'a Arc<Group>,
    call: Call,
    values: &'a mut [R::Item],
    first: Vec<Lane>,
    second: Vec<Lane>,
    outgoing: Outgoing,
    /// Numbers of every part that were sent.
    sent: usize,
    /// Numbers of this rank's part that are reduced.
    reduced: usize,
}

impl<'a, R: Reduction> AllReduce<'a, R> {
    fn start(group: &'a Arc<Group>, call: Call, values: &'a mut [R::Item]) -> Result<Self> {
        let (length, world) = (values.len(), group.world());
        let bytes = |rank: usize| part(length, world, rank).len() * size_of::<R::Item>();
        let first = lanes(group, wire_tag(&call, Part::First), |_| bytes(group.rank()))?;
        let second = lanes(group, wire_tag(&call, Part::Second), bytes)?;
        Ok(Self { group, call, values, first, second, outgoing: Outgoing::default(), sent: 0, reduced: 0 })
    }

    fn part(&self, rank: usize) -> Range<usize> {
        part(self.values.len(), self.group.world(), rank)
    }
}

impl<R: Reduction> Stage for AllReduce<'_, R>
where
    R::Item: Default,
{
    fn advance(&mut self) -> Result<Advance> {
        let mut moved = false;
        let group = self.group;
        if self.sent < self.part(0).len() && self.outgoing.has_room(group)? {
            for peer in group.peers() {
                let range = within(&self.part(peer), self.sent..self.sent + step::<R::Item>());
                if !range.is_empty() {
                    let chunk = piece_of(group, as_bytes(&self.values[range]));
                    self.outgoing.push(group, chunk, [peer], wire_tag(&self.call, Part::First))?;
                }
            }
            self.sent += step::<R::Item>();
            moved = true;
        }
        let mine = self.part(group.rank());
        if self.reduced < mine.len()
            && let Some(row) = take_row(group, &mut self.first)?
        {
            let range = within(&mine, self.reduced..self.reduced + step::<R::Item>());
            let mut total = group.process().pool().get(range.len() * size_of::<R::Item>());
            reduce_row::<R>(&row, &self.values[range.clone()], |at, block| {
                total.numbers_mut()[at].copy_from_slice(block);
            });
            self.values[range.clone()].copy_from_slice(total.numbers());
            self.outgoing.push(group, total, group.peers(), wire_tag(&self.call, Part::Second))?;
            self.reduced += range.len();
            moved = true;
        }
        for at in 0..self.second.len() {
            // A reduced piece only comes back after this rank's own share of it has left, so nothing is overwritten early.
            while let Some((range, chunk)) = self.second[at].take(group)? {
                let part = self.part(self.second[at].peer());
                as_bytes_mut(&mut self.values[part])[range].copy_from_slice(chunk.bytes());
                moved = true;
            }
        }
        Ok(if self.is_done() { Advance::Done } else { Advance::moved(moved) })
    }

    fn is_done(&self) -> bool {
        self.sent >= self.part(0).len()
            && self.reduced >= self.part(self.group.rank()).len()
            && self.second.iter().all(Lane::is_done)
    }

    fn missing(&self) -> Vec<usize> {
        // Only who has not even brought its share is late; the others wait for it, too.
        match missing(&self.first, &Outgoing::default()) {
            late if late.is_empty() => missing(&self.second, &self.outgoing),
            late => late,
        }
    }
}

struct ReduceScatter<'a, R: Reduction> {
    group: &'a Arc<Group>,
    tag: i32,
    values: &'a [R::Item],
    mine: &'a mut [R::Item],
    lanes: Vec<Lane>,
    outgoing: Outgoing,
    sent: usize,
    done: usize,
}

impl<R: Reduction> ReduceScatter<'_, R> {
    fn part(&self, rank: usize) -> Range<usize> {
        rank * self.mine.len()..(rank + 1) * self.mine.len()
    }
}

impl<R: Reduction> Stage for ReduceScatter<'_, R>
where
    R::Item: Default,
{
    fn advance(&mut self) -> Result<Advance> {
        let mut moved = false;
        let group = self.group;
        if self.sent < self.mine.len() && self.outgoing.has_room(group)? {
            for peer in group.peers() {
                let range = within(&self.part(peer), self.sent..self.sent + step::<R::Item>());
                self.outgoing.push(group, piece_of(group, as_bytes(&self.values[range])), [peer], self.tag)?;
            }
            self.sent += step::<R::Item>();
            moved = true;
        }
        if self.done < self.mine.len()
            && let Some(row) = take_row(group, &mut self.lanes)?
        {
            let range = within(&(0..self.mine.len()), self.done..self.done + step::<R::Item>());
            let own = &self.values[within(&self.part(group.rank()), range.clone())];
            let out = &mut self.mine[range.clone()];
            reduce_row::<R>(&row, own, |at, block| out[at].copy_from_slice(block));
            self.done += range.len();
            moved = true;
        }
        Ok(if self.is_done() { Advance::Done } else { Advance::moved(moved) })
    }

    fn is_done(&self) -> bool {
        self.sent >= self.mine.len() && self.done >= self.mine.len()
    }

    fn missing(&self) -> Vec<usize> {
        missing(&self.lanes, &self.outgoing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_everything_once() {
        for world in 1..=9 {
            for length in [0, 1, 2, 7, 8, 9, 100, 1003] {
                let mut next = 0;
                for rank in 0..world {
                    let range = part(length, world, rank);
                    assert_eq!(range.start, next, "{length} over {world}");
                    assert!(range.len() <= part(length, world, 0).len());
                    next = range.end;
                }
                assert_eq!(next, length);
            }
        }
        assert_eq!(within(&(10..14), 3..9), 13..14);
        assert_eq!(within(&(10..14), 5..9), 14..14);
    }
}
