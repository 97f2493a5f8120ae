//! Blocking exchanges. Small buffers are copied into the meeting, large ones are lent to it.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::entry::{Call, Entry, Inside, Part};
use super::group::Group;
use super::rank::Rank;
use super::stream;
use crate::call::Operation;
use crate::collective::Collective;
use crate::error::{Result, check_length};
use crate::tag::Tag;
use crate::tree::{Reduction, reduce_blocks};

/// Up to here a buffer is copied: a second rendezvous costs more than the copy.
const COPIED_BYTES: usize = 16 << 10;

/// Bytes read at a time to be written several times: they stay in the nearest cache meanwhile.
const PUSHED_BYTES: usize = 16 << 10;

/// From here on a result is longer than what a cache would keep of it.
const STREAMED_BYTES: usize = 8 << 20;

/// Takes lent memory back when a call ends in an error.
struct Lease<'a>(Option<&'a Entry>);

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        if let Some(entry) = self.0 {
            entry.close();
        }
    }
}

/// The share of rank `rank` in `length` elements: equal shares of whole cache lines, the last ones smaller or empty.
fn share(length: usize, world: usize, rank: usize) -> Range<usize> {
    let size = length.div_ceil(world).next_multiple_of(64);
    (rank * size).min(length)..((rank + 1) * size).min(length)
}

impl Rank {
    /// Meets with copies of small buffers; `read` sees what everyone has brought. One rendezvous.
    fn meet<T>(&self, call: Call, part: Part, read: impl FnOnce(&Entry) -> T) -> Result<T> {
        let until = self.group.world.until();
        let sequence = self.next();
        let entry = self.group.publish(self.me, sequence, call, part)?;
        self.group.await_arrivals(self.me, &entry, until)?;
        let result = read(&entry);
        self.group.leave(self.me, sequence, &entry);
        Ok(result)
    }

    /// Meets with lent memory: `work` may touch what everyone has lent, and must not wait for anyone.
    ///
    /// `start` must be valid for what the `work` of all ranks does there until this returns, and the caller must
    /// not touch that memory itself meanwhile but through `work`.
    fn lend(&self, call: Call, start: *mut u8, work: impl FnOnce(&Inside<'_>)) -> Result<()> {
        let until: Option<Instant> = self.group.world.until();
        let sequence = self.next();
        let entry = self.group.publish(self.me, sequence, call, Part::Borrowed(start))?;
        let mut lease = Lease(Some(&entry));
        self.group.await_arrivals(self.me, &entry, until)?;
        match entry.enter() {
            Some(inside) => work(&inside),
            // Somebody has taken its memory back, which it does only when the world has failed.
            None => {
                self.group.check(self.me)?;
                let why = format!("a peer left {} without a word", call.tag);
                let rank = self.name();
                return Err(self.group.fail(self.me, crate::Error::PeerFailed { rank, peer: rank, why }));
            }
        }
        self.group.leave(self.me, sequence, &entry);
        self.group.await_leaving(self.me, &entry, until)?;
        lease.0 = None;
        Ok(())
    }

    /// All ranks' bytes, copied; for calls without a length to agree on.
    pub(super) fn gather_copies<T>(
        &self,
        tag: Tag,
        operation: Operation,
        mine: &[u8],
        read: impl FnOnce(&[&[u8]]) -> T,
    ) -> Result<T> {
        let call = Call { tag, operation, length: 0 };
        self.meet(call, Part::copy_of(mine), |entry| {
            let parts: Vec<&[u8]> = (0..self.size()).map(|rank| entry.copied(rank)).collect();
            let received = parts.iter().map(|part| part.len()).sum::<usize>() - mine.len();
            self.count(mine.len() * (self.size() - 1), received);
            read(&parts)
        })
    }

    /// An all_reduce. Lent: each rank reduces its share and writes it into everyone's buffer, so that each byte is read
    /// and written once.
    pub(super) fn reduce_everywhere<R: Reduction<Item: Default>>(
        &self,
        tag: Tag,
        operation: Operation,
        values: &mut [R::Item],
    ) -> Result<()> {
        let (world, length, width) = (self.size(), values.len(), size_of::<R::Item>());
        let call = Call { tag, operation, length };
        if length * width <= COPIED_BYTES {
            let bytes = (world - 1) * length * width;
            return self.meet(call, Part::copy_of(values), |entry| {
                let parts: Vec<&[R::Item]> = (0..world).map(|rank| entry.copied_numbers(rank)).collect();
                reduce_blocks::<R>(
                    world,
                    length,
                    |part, range| &parts[part][range],
                    |range, block| {
                        values[range].copy_from_slice(block);
                    },
                );
                self.count(bytes, bytes);
            });
        }
        let mine = share(length, world, self.me);
        let bytes = ((world - 1) * mine.len() + length - mine.len()) * width;
        self.lend(call, values.as_mut_ptr().cast(), |inside| {
            let buffers: Vec<*mut R::Item> = (0..world).map(|rank| inside.lent(rank)).collect();
            // SAFETY: all buffers are valid for `length` elements while we are inside. Of share number `me`, in all of
            // them, only this rank reads and writes; the views of a block are dead before the block is written.
            let read = |part: usize, range: Range<usize>| unsafe {
                std::slice::from_raw_parts(buffers[part].add(mine.start + range.start).cast_const(), range.len())
            };
            reduce_blocks::<R>(world, mine.len(), read, |range, block| {
                for buffer in &buffers {
                    // SAFETY: as above; `block` is no part of any buffer.
                    unsafe {
                        let to = buffer.add(mine.start + range.start);
                        std::ptr::copy_nonoverlapping(block.as_ptr(), to, block.len());
                    }
                }
            });
            self.count(bytes, bytes);
        })
    }

    /// A reduce_scatter.
    pub(super) fn reduce_parts<R: Reduction<Item: Default>>(
        &self,
        tag: Tag,
        operation: Operation,
        values: &[R::Item],
        mine: &mut [R::Item],
    ) -> Result<()> {
        let (world, part_length) = (self.size(), mine.len());
        check_length(self.name(), tag, "the input of a reduce_scatter", world * part_length, values.len())?;
        let call = Call { tag, operation, length: values.len() };
        let bytes = (world - 1) * size_of_val(mine);
        let from = self.me * part_length;
        if size_of_val(values) <= COPIED_BYTES {
            return self.meet(call, Part::copy_of(values), |entry| {
                let parts: Vec<&[R::Item]> = (0..world).map(|rank| entry.copied_numbers(rank)).collect();
                let read = |part: usize, range: Range<usize>| &parts[part][from + range.start..from + range.end];
                reduce_blocks::<R>(world, part_length, read, |range, block| mine[range].copy_from_slice(block));
                self.count(bytes, bytes);
            });
        }
        self.lend(call, values.as_ptr().cast_mut().cast(), |inside| {
            // SAFETY: all buffers are valid for `world * part_length` elements while we are inside; nobody writes them.
            let read = |part: usize, range: Range<usize>| unsafe {
                std::slice::from_raw_parts(
                    inside.lent::<R::Item>(part).add(from + range.start).cast_const(),
                    range.len(),
                )
            };
            if size_of_val(mine) < STREAMED_BYTES {
                reduce_blocks::<R>(world, part_length, read, |range, block| mine[range].copy_from_slice(block));
            } else {
                reduce_blocks::<R>(world, part_length, read, |range, block| {
                    let (to, from) = (&mut mine[range], block);
                    // SAFETY: both are slices of this rank, of one length, and different memory.
                    unsafe { stream::copy(from.as_ptr().cast(), to.as_mut_ptr().cast(), size_of_val(to)) };
                });
                stream::fence();
            }
            self.count(bytes, bytes);
        })
    }

    /// An all_gather. Lent is the output: each rank reads its own bytes once and writes them into everyone's.
    pub(super) fn gather(&self, tag: Tag, mine: &[u8], all: &mut [u8]) -> Result<()> {
        let (world, length) = (self.size(), mine.len());
        check_length(self.name(), tag, "the output of an all_gather", world * length, all.len())?;
        let call = Call { tag, operation: Operation::AllGather, length };
        let bytes = (world - 1) * length;
        if length <= COPIED_BYTES {
            return self.meet(call, Part::copy_of(mine), |entry| {
                for rank in 0..world {
                    all[rank * length..(rank + 1) * length].copy_from_slice(entry.copied(rank));
                }
                self.count(bytes, bytes);
            });
        }
        self.lend(call, all.as_mut_ptr(), |inside| {
            for (block, from) in mine.chunks(PUSHED_BYTES).enumerate() {
                // Each rank begins with itself, so that not all write to one.
                for rank in (self.me..world).chain(0..self.me) {
                    // SAFETY: all buffers are valid for `world * length` bytes while we are inside; of part number `me`, in
                    // all of them, only this rank writes and nobody reads. `mine` is no part of any of them: it is borrowed
                    // beside `all` here, and stays on this rank.
                    unsafe {
                        let to = inside.lent::<u8>(rank).add(self.me * length + block * PUSHED_BYTES);
                        stream::copy(from.as_ptr(), to, from.len());
                    }
                }
            }
            stream::fence();
            self.count(bytes, bytes);
        })
    }

    /// An all_to_all.
    pub(super) fn transpose(&self, tag: Tag, send: &[u8], receive: &mut [u8]) -> Result<()> {
        let (world, length) = (self.size(), send.len());
        check_length(self.name(), tag, "the output of an all_to_all", length, receive.len())?;
        check_length(self.name(), tag, "the input of an all_to_all", length.next_multiple_of(world), length)?;
        let call = Call { tag, operation: Operation::AllToAll, length };
        let chunk = length / world;
        self.move_bytes(call, send, (world - 1) * chunk, |parts| {
            for (rank, part) in parts.iter().enumerate() {
                let to = &mut receive[rank * chunk..(rank + 1) * chunk];
                to.copy_from_slice(&part[self.me * chunk..(self.me + 1) * chunk]);
            }
        })
    }

    /// A broadcast.
    pub(super) fn spread(&self, tag: Tag, bytes: &mut [u8], root: usize) -> Result<()> {
        let (world, length) = (self.size(), bytes.len());
        let call = Call { tag, operation: Operation::Broadcast { root }, length };
        let is_root = self.me == root;
        let count = || self.count(if is_root { (world - 1) * length } else { 0 }, if is_root { 0 } else { length });
        if length <= COPIED_BYTES {
            let part = Part::copy_of(if is_root { &*bytes } else { &[] });
            return self.meet(call, part, |entry| {
                if !is_root {
                    bytes.copy_from_slice(entry.copied(root));
                }
                count();
            });
        }
        self.lend(call, bytes.as_mut_ptr(), |inside| {
            if !is_root {
                // SAFETY: all buffers are valid for `length` bytes while we are inside. That of the root is only read, ours
                // is only written, by us, and they are different memory.
                unsafe { std::ptr::copy_nonoverlapping(inside.lent::<u8>(root), inside.lent::<u8>(self.me), length) };
            }
            count();
        })
    }

    /// Meets with bytes that peers only read, `other_bytes` of which go each way.
    fn move_bytes(&self, call: Call, bytes: &[u8], other_bytes: usize, take: impl FnOnce(&[&[u8]])) -> Result<()> {
        let ranks = 0..self.size();
        if bytes.len() <= COPIED_BYTES {
            return self.meet(call, Part::copy_of(bytes), |entry| {
                take(&ranks.map(|rank| entry.copied(rank)).collect::<Vec<_>>());
                self.count(other_bytes, other_bytes);
            });
        }
        self.lend(call, bytes.as_ptr().cast_mut(), |inside| {
            // SAFETY: all buffers are valid for `call.length == bytes.len()` bytes while we are inside; nobody writes them.
            let view = |rank| unsafe { std::slice::from_raw_parts(inside.lent::<u8>(rank).cast_const(), bytes.len()) };
            take(&ranks.map(view).collect::<Vec<_>>());
            self.count(other_bytes, other_bytes);
        })
    }

    /// A split: see the trait.
    pub(super) fn split_by(&self, tag: Tag, color: Option<usize>, key: usize) -> Result<Option<Arc<dyn Collective>>> {
        let brought = [u64::from(color.is_some()), color.unwrap_or(0) as u64, key as u64];
        let call = Call { tag, operation: Operation::Split, length: 0 };
        self.meet(call, Part::copy_of(&brought), |entry| {
            let groups = entry.groups.get_or_init(|| self.form_groups(entry));
            let (_, group) = groups.iter().find(|&&(known, _)| Some(known) == color)?;
            let me = group.members.iter().position(|&member| member == self.name())?;
            Some(Self::handle(Arc::clone(group), me))
        })
    }

    /// The groups that a split asks for: color and group, the members ordered by key, then rank.
    fn form_groups(&self, entry: &Entry) -> Vec<(usize, Arc<Group>)> {
        let mut wanted: Vec<(u64, u64, usize)> = Vec::new();
        for rank in 0..self.size() {
            if let [1, color, key] = *entry.copied_numbers::<u64>(rank) {
                wanted.push((color, key, rank));
            }
        }
        wanted.sort_unstable();
        let form = |same: &[(u64, u64, usize)]| {
            let ranks: Vec<usize> = same.iter().map(|&(_, _, rank)| rank).collect();
            let members = ranks.iter().map(|&rank| self.group.members[rank]).collect();
            let topology = self.group.topology.subset(&ranks);
            (same[0].0 as usize, Group::new(Arc::clone(&self.group.world), members, topology))
        };
        wanted.chunk_by(|one, other| one.0 == other.0).map(form).collect()
    }
}
