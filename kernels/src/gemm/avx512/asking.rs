//! What a tile asks for while it is computed.

use std::arch::x86_64::*;

use super::super::micro::{Ahead, Tile};

/// Asks for [`Ahead`], a pair of lines at a time.
pub(super) struct Asking {
    at: *const f32,
    start: *const f32,
    left: usize,
    run: usize,
    stride: usize,
    /// Pairs times terms that are due.
    due: usize,
    pairs: usize,
    terms: usize,
}

impl Asking {
    pub(super) fn new(t: &Tile) -> Self {
        let (start, run, stride, pairs) = match t.ahead {
            Some(Ahead { start, run, stride, pairs }) => (start, run, stride, pairs),
            None => (t.b, 1, 0, 0),
        };
        Self { at: start, start, left: run, run, stride, due: 0, pairs, terms: t.terms }
    }

    /// Asks for what is due in so many terms.
    #[inline(always)]
    pub(super) fn step(&mut self, terms: usize) {
        self.due += self.pairs * terms;
        while self.due >= self.terms {
            self.due -= self.terms;
            // SAFETY: hints that read nothing.
            unsafe {
                _mm_prefetch::<_MM_HINT_T1>(self.at.cast());
                _mm_prefetch::<_MM_HINT_T1>(self.at.wrapping_add(16).cast());
            }
            self.at = self.at.wrapping_add(32);
            self.left -= 1;
            if self.left == 0 {
                self.start = self.start.wrapping_add(self.stride);
                (self.at, self.left) = (self.start, self.run);
            }
        }
    }
}
