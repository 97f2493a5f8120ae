//! The innermost loops in AVX-512: a tile for many rows, and one for few rows that begins where another has ended.

use std::arch::x86_64::*;

use super::micro::{Ahead, Order, Tile, copy_b};
use crate::prefetch::{LINE, prefetch_line, prefetch_line_to_write};

/// Columns of a panel of B.
pub(super) const COLUMNS: usize = 32;
/// Most rows of a tile: 24 registers hold the sums.
pub(super) const ROWS: usize = 12;

/// Where a tile reads A, and what it does besides.
mod mode {
    /// A in order of terms.
    pub(super) const TERMS: u8 = 0;
    /// The same, asking for what lies ahead.
    pub(super) const TERMS_AHEAD: u8 = 1;
    /// The same, and leaving a copy of A.
    pub(super) const TERMS_COPY: u8 = 2;
    /// A in order of terms, asking for what lies ahead, and leaving a copy of B.
    pub(super) const TERMS_B: u8 = 3;
    /// The same, and leaving a copy of A.
    pub(super) const TERMS_BOTH: u8 = 4;
    /// A in order of rows.
    pub(super) const ROWS: u8 = 5;
    /// The same, asking for what lies ahead, and leaving a copy of A.
    pub(super) const ROWS_COPY: u8 = 6;

    pub(super) const fn asks(mode: u8) -> bool {
        !matches!(mode, TERMS | ROWS)
    }

    pub(super) const fn copies_terms(mode: u8) -> bool {
        matches!(mode, TERMS_COPY | TERMS_BOTH)
    }

    pub(super) const fn copies_b(mode: u8) -> bool {
        matches!(mode, TERMS_B | TERMS_BOTH)
    }

    pub(super) const fn in_rows(mode: u8) -> bool {
        matches!(mode, ROWS | ROWS_COPY)
    }
}

/// Expands to a match from a run-time row count to a kernel compiled for it: edge tiles do no work for absent rows.
macro_rules! by_rows {
    (@ $rows:expr, $kernel:ident, [$($r:literal)*], $more:tt, $args:tt) => {
        match $rows { $($r => by_rows!(# $kernel, $r, $more, $args),)* _ => unreachable!("more rows than a tile holds") }
    };
    (# $kernel:ident, $r:literal, [$($more:tt)*], $args:tt) => { $kernel::<$r, $($more)*> $args };
    ($rows:expr, $kernel:ident, $more:tt, $args:tt) => {
        by_rows!(@ $rows, $kernel, [1 2 3 4 5 6 7 8 9 10 11 12], $more, $args)
    };
}

/// The kernel of [`MicroKernel`](super::micro::MicroKernel).
pub(super) unsafe fn tile(t: &Tile) {
    assert!((1..=ROWS).contains(&t.rows) && (1..=COLUMNS).contains(&t.columns));
    let asks = t.ahead.is_some() && t.rows == ROWS;
    // SAFETY: chosen only where AVX-512 is active; the caller vouches for the operands.
    unsafe {
        if !t.copy_b.is_null() {
            match (t.order, t.copy.is_null(), t.rows == ROWS && t.columns > COLUMNS / 2) {
                (Order::Terms(_), true, true) => return sums::<ROWS, 2, { mode::TERMS_B }>(t),
                (Order::Terms(_), false, true) => return sums::<ROWS, 2, { mode::TERMS_BOTH }>(t),
                _ => copy_b(t, COLUMNS),
            }
        }
        match (t.order, t.copy.is_null(), t.columns > COLUMNS / 2) {
            (Order::Terms(_), false, true) => by_rows!(t.rows, sums, [2, { mode::TERMS_COPY }], (t)),
            (Order::Terms(_), false, false) => by_rows!(t.rows, sums, [1, { mode::TERMS_COPY }], (t)),
            (Order::Terms(_), true, true) if asks => sums::<ROWS, 2, { mode::TERMS_AHEAD }>(t),
            (Order::Terms(_), true, true) => by_rows!(t.rows, sums, [2, { mode::TERMS }], (t)),
            (Order::Terms(_), true, false) => by_rows!(t.rows, sums, [1, { mode::TERMS }], (t)),
            (Order::Rows(_), false, true) => by_rows!(t.rows, sums, [2, { mode::ROWS_COPY }], (t)),
            (Order::Rows(_), false, false) => by_rows!(t.rows, sums, [1, { mode::ROWS_COPY }], (t)),
            (Order::Rows(_), true, true) => by_rows!(t.rows, sums, [2, { mode::ROWS }], (t)),
            (Order::Rows(_), true, false) => by_rows!(t.rows, sums, [1, { mode::ROWS }], (t)),
        }
    }
}

/// `R` rows of `NV` vectors; of the last vector, the first `columns - 16 (NV - 1)` lanes.
#[target_feature(enable = "avx512f")]
unsafe fn sums<const R: usize, const NV: usize, const MODE: u8>(t: &Tile) {
    // C is far away: on its way while the sums are made.
    for i in 0..R {
        for v in 0..NV {
            _mm_prefetch::<_MM_HINT_T0>(t.c.wrapping_add(i * t.c_stride + 16 * v).cast());
        }
    }
    let (Order::Rows(stride) | Order::Terms(stride)) = t.order;
    // Of four rows, every third: the two after each are one and two strides from it.
    let mut a = [t.a; 4];
    for (third, a) in a.iter_mut().enumerate() {
        *a = a.wrapping_add(3 * third * stride);
    }
    let (mut ap, mut bp, mut copy) = (t.a, t.b, t.copy);
    let mut to_copy_b = t.copy_b;
    let mut asking = Asking::new(t);
    let mut acc = [[_mm512_setzero_ps(); NV]; R];
    // SAFETY: the caller vouches for A, B and the copy.
    unsafe {
        for _ in 0..t.terms {
            let mut line = [_mm512_setzero_ps(); NV];
            for v in 0..NV {
                line[v] = _mm512_loadu_ps(bp.add(16 * v));
            }
            if mode::asks(MODE) {
                asking.step();
            }
            if mode::copies_b(MODE) {
                for v in 0..NV {
                    _mm512_storeu_ps(to_copy_b.add(16 * v), line[v]);
                }
                to_copy_b = to_copy_b.wrapping_add(COLUMNS);
            }
            if mode::copies_terms(MODE) {
                let mask = u16::MAX >> (16 - R);
                _mm512_mask_storeu_ps(copy, mask, _mm512_maskz_loadu_ps(mask, ap));
            }
            for (i, acc) in acc.iter_mut().enumerate() {
                let ai = if mode::in_rows(MODE) { *a[i / 3].add(i % 3 * stride) } else { *ap.add(i) };
                if MODE == mode::ROWS_COPY {
                    // One by one: the ports that store are idle, those that would put a vector together are not.
                    copy.add(i).write_volatile(ai);
                }
                let ai = _mm512_set1_ps(ai);
                for v in 0..NV {
                    acc[v] = _mm512_fmadd_ps(ai, line[v], acc[v]);
                }
            }
            copy = copy.wrapping_add(R);
            if mode::in_rows(MODE) {
                for a in &mut a {
                    *a = a.wrapping_add(1);
                }
            } else {
                ap = ap.wrapping_add(stride);
            }
            bp = bp.wrapping_add(t.b_stride);
        }
        store(&acc, t.columns, t.c, t.c_stride, t.accumulate);
    }
}

/// Asks for [`Ahead`](super::micro::Ahead), a pair of lines at a time.
struct Asking {
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
    fn new(t: &Tile) -> Self {
        let (start, run, stride, pairs) = match t.ahead {
            Some(Ahead { start, run, stride, pairs }) => (start, run, stride, pairs),
            None => (t.b, 1, 0, 0),
        };
        Self { at: start, start, left: run, run, stride, due: 0, pairs, terms: t.terms }
    }

    #[inline(always)]
    fn step(&mut self) {
        self.due += self.pairs;
        if self.due >= self.terms {
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

/// Writes sums to C, or adds them.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store<const R: usize, const NV: usize>(
    sums: &[[__m512; NV]; R],
    columns: usize,
    c: *mut f32,
    stride: usize,
    accumulate: bool,
) {
    let last = u16::MAX >> (16 * NV - columns);
    for (i, sums) in sums.iter().enumerate() {
        for (v, value) in sums.iter().enumerate() {
            let mask = if v + 1 == NV { last } else { u16::MAX };
            // SAFETY: the caller vouches for the tile at `c`; lanes beyond it are masked out.
            unsafe {
                let at = c.add(i * stride + 16 * v);
                let value = if accumulate { _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), *value) } else { *value };
                _mm512_mask_storeu_ps(at, mask, value);
            }
        }
    }
}

/// Bytes by which B is asked for ahead of its use; what lies behind the end of a panel is the next one.
const AHEAD: usize = 8192;
/// Terms whose lines are asked for one after the other, half a page; one group of rows asks for the first half of a page,
/// another for the second: spread over all their time, but together enough for the processor to follow by itself.
const ASKED: usize = 16;

/// A piece of the chains of sums of a few rows.
pub(super) struct Chain {
    pub(super) rows: usize,
    /// Of so many groups of rows that go over the same piece of B, the index of this one.
    pub(super) group: usize,
    pub(super) groups: usize,
    /// Begin with zeros, not with the sums of the piece before.
    pub(super) is_start: bool,
    /// The chains end here: the place in C, and how many columns it has.
    pub(super) c: Option<(*mut f32, usize)>,
    /// Elements from a row of C to the next.
    pub(super) c_stride: usize,
    /// Add to C instead of overwriting it.
    pub(super) accumulate: bool,
}

/// Adds `A·B` to `sums`, `[rows][32]`, or ends it in C: `a` is `[terms][rows]` and `b` `[terms][32]`.
///
/// # Safety
/// AVX-512 must be active, and C hold the tile.
pub(super) unsafe fn chain(t: &Chain, a: &[f32], b: &[f32], sums: &mut [f32]) {
    assert!(a.len() / t.rows == b.len() / COLUMNS && sums.len() >= t.rows * COLUMNS);
    // SAFETY: the caller vouches for AVX-512 and C; the other lengths were just checked.
    unsafe { by_rows!(t.rows, chained, [], (t, a, b, sums)) }
}

#[target_feature(enable = "avx512f")]
unsafe fn chained<const R: usize>(t: &Chain, a: &[f32], b: &[f32], sums: &mut [f32]) {
    if let Some((c, _)) = t.c {
        for i in 0..R {
            prefetch_line_to_write(c.wrapping_add(i * t.c_stride));
            prefetch_line_to_write(c.wrapping_add(i * t.c_stride + 16));
        }
    }
    let mut acc = [[_mm512_setzero_ps(); 2]; R];
    // SAFETY: the caller has checked the lengths, and vouches for C.
    unsafe {
        if !t.is_start {
            for (i, acc) in acc.iter_mut().enumerate() {
                for v in 0..2 {
                    acc[v] = _mm512_loadu_ps(sums.as_ptr().add(i * COLUMNS + 16 * v));
                }
            }
        }
        for (half, (a, b)) in a.chunks(ASKED * R).zip(b.chunks(ASKED * COLUMNS)).enumerate() {
            if t.groups == 1 || half % 2 == t.group {
                terms::<R, true>(a, b, &mut acc);
            } else {
                terms::<R, false>(a, b, &mut acc);
            }
        }
        match t.c {
            Some((c, columns)) if columns > 16 => store(&acc, columns, c, t.c_stride, t.accumulate),
            Some((c, columns)) => {
                let mut first = [[_mm512_setzero_ps(); 1]; R];
                for (first, acc) in first.iter_mut().zip(&acc) {
                    first[0] = acc[0];
                }
                store(&first, columns, c, t.c_stride, t.accumulate);
            }
            None => {
                for (i, acc) in acc.iter().enumerate() {
                    for v in 0..2 {
                        _mm512_storeu_ps(sums.as_mut_ptr().add(i * COLUMNS + 16 * v), acc[v]);
                    }
                }
            }
        }
    }
}

/// Adds a few terms, asking for those that lie ahead of them.
///
/// # Safety
/// `a` must have `R` elements for each 32 of `b`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn terms<const R: usize, const ASKS: bool>(a: &[f32], b: &[f32], acc: &mut [[__m512; 2]; R]) {
    let (mut ap, mut bp) = (a.as_ptr(), b.as_ptr());
    for _ in 0..b.len() / COLUMNS {
        // SAFETY: the caller vouches for the lengths.
        unsafe {
            let line = [_mm512_loadu_ps(bp), _mm512_loadu_ps(bp.add(16))];
            if ASKS {
                prefetch_line(bp.wrapping_byte_add(AHEAD));
                prefetch_line(bp.wrapping_byte_add(AHEAD + LINE));
            }
            for (i, acc) in acc.iter_mut().enumerate() {
                let ai = _mm512_set1_ps(*ap.add(i));
                for v in 0..2 {
                    acc[v] = _mm512_fmadd_ps(ai, line[v], acc[v]);
                }
            }
            ap = ap.add(R);
            bp = bp.add(COLUMNS);
        }
    }
}
