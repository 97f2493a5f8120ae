//! Which parts of a range of addresses are free. The lowest that is large enough is taken, and free neighbours become one: of
//! tensors, which are few and large and of the same sizes in every step, that leaves next to no room unused.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// A range of addresses, parts of which are taken.
#[derive(Debug)]
pub(super) struct Blocks {
    /// By first address; no two are neighbours.
    free: BTreeMap<usize, Free>,
    /// From here on nothing was ever taken.
    fresh: usize,
    end: usize,
}

/// A free part.
#[derive(Clone, Copy, Debug)]
struct Free {
    len: usize,
    /// When the last of it was given back; `None`: its memory is the system's again, and it reads as zeros.
    since: Option<Instant>,
}

/// A part that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Taken {
    pub(super) at: usize,
    /// Whether it holds zeros.
    pub(super) is_zero: bool,
}

impl Blocks {
    /// The addresses from `start` to `end`, all free, and holding zeros.
    pub(super) const fn new(start: usize, end: usize) -> Self {
        Self { free: BTreeMap::new(), fresh: start, end }
    }

    /// Takes `len` addresses; `None` if there are not as many in one piece.
    pub(super) fn take(&mut self, len: usize) -> Option<Taken> {
        if let Some((&at, &free)) = self.free.iter().find(|(_, free)| free.len >= len) {
            self.free.remove(&at);
            if free.len > len {
                self.free.insert(at + len, Free { len: free.len - len, ..free });
            }
            return Some(Taken { at, is_zero: free.since.is_none() });
        }
        // The free part before what was never taken grows into it.
        let last = self.free.last_key_value().filter(|(at, free)| **at + free.len == self.fresh);
        let (at, is_zero) = last.map_or((self.fresh, true), |(&at, free)| (at, free.since.is_none()));
        self.fresh = at.checked_add(len).filter(|end| *end <= self.end)?;
        self.free.remove(&at);
        Some(Taken { at, is_zero })
    }

    /// Gives back what was taken.
    pub(super) fn give(&mut self, at: usize, len: usize, now: Instant) {
        let (mut start, mut free) = (at, Free { len, since: Some(now) });
        if let Some(next) = self.free.remove(&(at + len)) {
            free.len += next.len;
        }
        if let Some((&before, previous)) = self.free.range(..at).next_back()
            && before + previous.len == at
        {
            free.len += previous.len;
            start = before;
        }
        self.free.insert(start, free);
    }

    /// Calls `release` on what has been free for longer than `delay`, from its first address on so many, once: after that it
    /// must read as zeros.
    pub(super) fn release(&mut self, now: Instant, delay: Duration, mut release: impl FnMut(usize, usize) -> bool) {
        for (&at, free) in &mut self.free {
            if free.since.is_some_and(|since| now.saturating_duration_since(since) > delay) && release(at, free.len) {
                free.since = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATER: Duration = Duration::from_secs(31);
    const DELAY: Duration = Duration::from_secs(30);

    fn taken(at: usize, is_zero: bool) -> Option<Taken> {
        Some(Taken { at, is_zero })
    }

    #[test]
    fn the_lowest_part_that_fits_is_taken_and_neighbours_grow_together() {
        let (mut blocks, now) = (Blocks::new(100, 1000), Instant::now());
        for at in [100, 200, 300, 400] {
            assert_eq!(blocks.take(100), taken(at, true));
        }
        blocks.give(100, 100, now);
        blocks.give(300, 100, now);
        assert_eq!(blocks.take(101), taken(500, true), "two parts that are not neighbours");
        assert_eq!(blocks.take(40), taken(100, false));
        blocks.give(200, 100, now);
        assert_eq!(blocks.take(260), taken(140, false), "three neighbours");
        assert!(blocks.free.is_empty());
        blocks.give(500, 101, now);
        assert_eq!(blocks.take(600), None);
        assert_eq!(blocks.take(500), taken(500, false), "grown into what was never taken");
        assert_eq!(blocks.take(1), None);
    }

    /// Steps of the same sizes in another order need no more room than the largest of them.
    #[test]
    fn nothing_overlaps_and_little_is_left_unused() {
        let (mut blocks, now) = (Blocks::new(0, usize::MAX), Instant::now());
        let (mut held, mut most, mut seed) = (Vec::<(usize, usize)>::new(), 0, 1u64);
        for _ in 0..20_000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let draw = (seed >> 33) as usize;
            if held.len() > 100 || (draw.is_multiple_of(3) && !held.is_empty()) {
                let (at, len) = held.swap_remove(draw % held.len());
                blocks.give(at, len, now);
            } else {
                let len = [9, 15, 18, 27, 48][draw % 5];
                let at = blocks.take(len).unwrap().at;
                assert!(held.iter().all(|(other, size)| at + len <= *other || other + size <= at));
                held.push((at, len));
            }
            most = most.max(held.iter().map(|(_, len)| len).sum());
        }
        assert!(blocks.fresh * 4 <= most * 5, "{} for {most}", blocks.fresh);
        held.into_iter().for_each(|(at, len)| blocks.give(at, len, now));
        assert_eq!(blocks.free.len(), 1);
    }

    #[test]
    fn what_is_long_free_goes_back_once_and_is_zero_then() {
        let (mut blocks, now) = (Blocks::new(0, 1000), Instant::now());
        assert_eq!([blocks.take(100), blocks.take(100), blocks.take(100)].map(|part| part.unwrap().at), [0, 100, 200]);
        blocks.give(0, 100, now);
        blocks.give(200, 100, now + LATER);
        let mut released = Vec::new();
        let mut release = |blocks: &mut Blocks, now| {
            blocks.release(now, DELAY, |at, len| {
                released.push((at, len));
                true
            });
        };
        release(&mut blocks, now + LATER);
        release(&mut blocks, now + LATER);
        assert_eq!(released, [(0, 100)]);
        assert_eq!(blocks.take(50), taken(0, true));
        blocks.give(0, 50, now + LATER);
        assert_eq!(blocks.take(100), taken(0, false), "half of it was used since");
        assert_eq!(blocks.take(100), taken(200, false));
    }
}
