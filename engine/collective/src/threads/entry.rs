//! One call under way: what each rank has brought to it, and who may still look.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use super::group::Group;
use crate::bytes::{Plain, as_bytes};
use crate::call::Operation;
use crate::error::Error;
use crate::tag::Tag;
use crate::work::Shared;

/// What all ranks of a call must agree on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    pub(super) tag: Tag,
    pub(super) operation: Operation,
    pub(super) length: usize,
}

impl Call {
    /// The error of rank `rank` in this call if `peer` is in another.
    pub(super) fn mismatch(&self, rank: usize, other: &Self, peer: usize) -> Option<Error> {
        let tag = self.tag;
        if tag != other.tag {
            Some(Error::Desync { rank, called: tag, peer, peer_called: other.tag })
        } else if self.operation != other.operation {
            let (operation, peer_operation) = (self.operation, other.operation);
            Some(Error::OperationMismatch { tag, rank, operation, peer, peer_operation })
        } else if self.length != other.length {
            Some(Error::LengthMismatch { tag, rank, length: self.length, peer, peer_length: other.length })
        } else {
            None
        }
    }
}

/// What one rank brings.
pub(super) enum Part {
    /// Memory of a rank that stays in the call until all have left it, or until it has closed the gate.
    Borrowed(*mut u8),
    /// A copy; in words, so that it is aligned for every number.
    Owned { words: Box<[u64]>, bytes: usize },
    /// Memory that the entry keeps alive.
    Shared(Shared),
}

// SAFETY: `Borrowed` points to plain numbers; who may touch them when is what `Entry` is for. The others are Send and Sync.
unsafe impl Send for Part {}
// SAFETY: as above.
unsafe impl Sync for Part {}

impl Part {
    /// A copy of `values`.
    pub(super) fn copy_of<T: Plain>(values: &[T]) -> Self {
        let bytes = as_bytes(values);
        let mut words = vec![0_u64; bytes.len().div_ceil(8)].into_boxed_slice();
        crate::bytes::as_bytes_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
        Self::Owned { words, bytes: bytes.len() }
    }
}

/// Set in the gate when a rank has taken its memory back.
const CLOSED: usize = 1 << (usize::BITS - 1);

/// One call of one group.
///
/// Borrowed memory is kept valid so: a rank touches a peer's memory only between [`Entry::enter`] and the drop of the
/// guard, and never waits in between. A rank returns from its call when all have left the entry, or, if the call has
/// failed, after [`Entry::close`], which lets nobody in any more and waits for those inside: that wait is as long as a copy.
pub(super) struct Entry {
    pub(super) call: Call,
    /// The rank (of the group) that came first.
    pub(super) first: usize,
    parts: Vec<OnceLock<Part>>,
    left: Vec<AtomicBool>,
    arrived_count: AtomicUsize,
    left_count: AtomicUsize,
    gate: AtomicUsize,
    /// The groups that a split makes: color and group.
    pub(super) groups: OnceLock<Vec<(usize, Arc<Group>)>>,
}

/// Permission to touch borrowed memory.
pub(super) struct Inside<'a>(&'a Entry);

impl Entry {
    pub(super) fn new(call: Call, first: usize, world: usize) -> Self {
        Self {
            call,
            first,
            parts: (0..world).map(|_| OnceLock::new()).collect(),
            left: (0..world).map(|_| AtomicBool::new(false)).collect(),
            arrived_count: AtomicUsize::new(0),
            left_count: AtomicUsize::new(0),
            gate: AtomicUsize::new(0),
            groups: OnceLock::new(),
        }
    }

    /// Brings the part of `rank`, which does so once. True if it was the last.
    pub(super) fn bring(&self, rank: usize, part: Part) -> bool {
        let first_time = self.parts[rank].set(part).is_ok();
        debug_assert!(first_time, "a rank brings one part to a call");
        self.arrived_count.fetch_add(1, Ordering::AcqRel) + 1 == self.parts.len()
    }

    /// Rank `rank` needs nothing more of this entry. True if it was the last.
    pub(super) fn leave(&self, rank: usize) -> bool {
        self.left[rank].store(true, Ordering::Release);
        self.left_count.fetch_add(1, Ordering::AcqRel) + 1 == self.parts.len()
    }

    pub(super) fn all_arrived(&self) -> bool {
        self.arrived_count.load(Ordering::Acquire) == self.parts.len()
    }

    pub(super) fn all_left(&self) -> bool {
        self.left_count.load(Ordering::Acquire) == self.parts.len()
    }

    /// The ranks that have brought nothing.
    pub(super) fn not_arrived(&self) -> Vec<usize> {
        (0..self.parts.len()).filter(|&rank| self.parts[rank].get().is_none()).collect()
    }

    /// The ranks that are still in the call.
    pub(super) fn not_left(&self) -> Vec<usize> {
        (0..self.parts.len()).filter(|&rank| !self.left[rank].load(Ordering::Acquire)).collect()
    }

    /// Asks to touch borrowed memory; `None` if some of it has been taken back.
    pub(super) fn enter(&self) -> Option<Inside<'_>> {
        let inside = Inside(self);
        let before = self.gate.fetch_add(1, Ordering::AcqRel);
        (before & CLOSED == 0).then_some(inside)
    }

    /// Takes borrowed memory back: nobody enters any more, and those inside are waited for.
    pub(super) fn close(&self) {
        self.gate.fetch_or(CLOSED, Ordering::AcqRel);
        while self.gate.load(Ordering::Acquire) != CLOSED {
            std::thread::yield_now();
        }
    }

    /// The bytes that `rank` has brought as a copy; empty if it has brought something else or nothing.
    pub(super) fn copied(&self, rank: usize) -> &[u8] {
        match self.parts[rank].get() {
            Some(Part::Owned { words, bytes }) => &as_bytes(words)[..*bytes],
            _ => &[],
        }
    }

    /// [`Self::copied`] as numbers.
    pub(super) fn copied_numbers<T: Plain>(&self, rank: usize) -> &[T] {
        let bytes = self.copied(rank);
        // SAFETY: the bytes of an owned part start at a u64, so they are aligned for every `Plain` number, all bit patterns
        // of which are valid; the length is rounded down.
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / size_of::<T>()) }
    }

    /// The values that `rank` has shared; empty if it has brought something else or nothing.
    pub(super) fn shared(&self, rank: usize) -> &[f32] {
        match self.parts[rank].get() {
            Some(Part::Shared(values)) => (**values).as_ref(),
            _ => &[],
        }
    }
}

impl Inside<'_> {
    /// Where the memory that `rank` has lent begins. Valid while `self` lives.
    ///
    /// # Panics
    /// If the rank has lent nothing: all parts of one call are of one kind.
    pub(super) fn lent<T: Plain>(&self, rank: usize) -> *mut T {
        match self.0.parts[rank].get() {
            Some(Part::Borrowed(start)) => start.cast(),
            _ => panic!("rank {rank} has lent no memory to {}", self.0.call.tag),
        }
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.gate.fetch_sub(1, Ordering::AcqRel);
    }
}
