//! The innermost loop in AVX-512.

mod asking;
mod chain;

use std::arch::asm;
use std::arch::x86_64::*;

use self::asking::Asking;
pub(super) use self::chain::{Chain, chain};
use super::micro::{Order, PITCH, Tile, copy_b};
use crate::prefetch::{LINE, prefetch_line};

/// Columns of a panel of B.
pub(super) const COLUMNS: usize = 32;
/// Most rows of a tile: 24 registers hold the sums.
pub(super) const ROWS: usize = 12;

/// Bytes by which B is asked for ahead of its use; what lies behind the end of a panel is the next one.
const AHEAD: usize = 8192;

/// Where a tile reads A, if not in order of terms, and what it does besides.
mod mode {
    /// A in order of rows.
    pub(super) const ROWS: u8 = 1;
    /// A in order of rows, [`PITCH`](super::PITCH) elements apart.
    pub(super) const PANEL: u8 = 2;
    /// Asks for what lies ahead.
    pub(super) const ASKS: u8 = 4;
    /// Leaves a copy of A.
    pub(super) const COPIES_A: u8 = 8;
    /// Leaves a copy of B.
    pub(super) const COPIES_B: u8 = 16;
    /// Asks for B itself.
    pub(super) const STREAMS: u8 = 32;
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
use by_rows;

/// Expands to a block for each row below `$r`, at most 12, in which the constant `$i` is the row.
macro_rules! each_row {
    ($r:ident, $i:ident => $body:block) => { $crate::gemm::each_row!(@ $r, $i, $body, [0 1 2 3 4 5 6 7 8 9 10 11]) };
    (@ $r:ident, $i:ident, $body:block, [$($row:literal)*]) => { $(if $row < $r { const $i: usize = $row; $body })* };
}
pub(crate) use each_row;

/// Zeros that the compiler does not know: it would have an array of them written to memory, and read from there.
#[inline]
#[target_feature(enable = "avx512f")]
fn zero() -> __m512 {
    let zero;
    // SAFETY: no more than a register is written.
    unsafe { asm!("vpxord {0}, {0}, {0}", out(zmm_reg) zero, options(pure, nomem, nostack, preserves_flags)) };
    zero
}

/// Writes sums to C, or adds them: the first `$vectors` of each of `$rows` rows, and of the last vector what is left of so
/// many columns. Expanded in its place, for a function would be given the sums in memory.
macro_rules! store {
    ($sums:ident, $rows:ident, $vectors:expr, $columns:expr, $c:expr, $c_stride:expr, $accumulate:expr) => {{
        let (c, columns, stride, accumulate) = ($c, $columns, $c_stride, $accumulate);
        if columns == 16 * $vectors {
            each_row!($rows, ROW => {
                for v in 0..$vectors {
                    let at = c.add(ROW * stride + 16 * v);
                    let sum = $sums[ROW][v];
                    _mm512_storeu_ps(at, if accumulate { _mm512_add_ps(_mm512_loadu_ps(at), sum) } else { sum });
                }
            });
        } else {
            let last = u16::MAX >> (16 * $vectors - columns);
            each_row!($rows, ROW => {
                for v in 0..$vectors {
                    let mask = if v + 1 == $vectors { last } else { u16::MAX };
                    let (at, sum) = (c.add(ROW * stride + 16 * v), $sums[ROW][v]);
                    let sum = if accumulate { _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), sum) } else { sum };
                    _mm512_mask_storeu_ps(at, mask, sum);
                }
            });
        }
    }};
}
use store;

/// The kernel of [`MicroKernel`](super::micro::MicroKernel).
pub(super) unsafe fn tile(t: &Tile) {
    use mode::{ASKS, COPIES_A, COPIES_B, PANEL};
    assert!((1..=ROWS).contains(&t.rows) && (1..=COLUMNS).contains(&t.columns));
    let is_wide = t.columns > COLUMNS / 2;
    let is_full = t.rows == ROWS && is_wide;
    // SAFETY: chosen only where AVX-512 is active; the caller vouches for the operands.
    unsafe {
        if !t.copy_b.is_null() {
            match (t.order, t.copy.is_null(), is_full) {
                (Order::Terms(_), true, true) => return sums::<ROWS, 2, { ASKS | COPIES_B }>(t),
                (Order::Terms(_), false, true) => return sums::<ROWS, 2, { ASKS | COPIES_B | COPIES_A }>(t),
                _ => copy_b(t, COLUMNS),
            }
        }
        let asks = t.ahead.is_some() && is_full;
        match (t.order, t.copy.is_null(), is_wide) {
            (Order::Terms(_), false, true) => by_rows!(t.rows, sums, [2, { COPIES_A | ASKS }], (t)),
            (Order::Terms(_), false, false) => by_rows!(t.rows, sums, [1, { COPIES_A | ASKS }], (t)),
            (Order::Terms(_), true, true) if asks => sums::<ROWS, 2, ASKS>(t),
            (Order::Terms(_), true, true) => by_rows!(t.rows, sums, [2, 0], (t)),
            (Order::Terms(_), true, false) => by_rows!(t.rows, sums, [1, 0], (t)),
            (Order::Rows(PITCH), _, true) if asks => sums::<ROWS, 2, { PANEL | ASKS }>(t),
            (Order::Rows(PITCH), _, true) => by_rows!(t.rows, sums, [2, PANEL], (t)),
            (Order::Rows(PITCH), _, false) => by_rows!(t.rows, sums, [1, PANEL], (t)),
            (Order::Rows(_), _, true) => by_rows!(t.rows, sums, [2, { mode::ROWS }], (t)),
            (Order::Rows(_), _, false) => by_rows!(t.rows, sums, [1, { mode::ROWS }], (t)),
        }
    }
}

/// Terms of a tile between which it asks for what lies ahead.
const AT_ONCE: usize = 8;

/// `R` rows of `NV` vectors; of the last vector, the first `columns - 16 (NV - 1)` lanes.
#[target_feature(enable = "avx512f")]
unsafe fn sums<const R: usize, const NV: usize, const MODE: u8>(t: &Tile) {
    // C is far away: on its way while the sums are made.
    for i in 0..R {
        for v in 0..NV {
            _mm_prefetch::<_MM_HINT_T0>(t.c.wrapping_add(i * t.c_stride + 16 * v).cast());
        }
    }
    let (Order::Rows(a_stride) | Order::Terms(a_stride)) = t.order;
    let mut at = Place { a: t.a, a_stride, b: t.b, b_stride: t.b_stride, copy: t.copy, copy_b: t.copy_b };
    let mut acc = [[zero(); NV]; R];
    // SAFETY: the caller vouches for A, B, C and the copies.
    unsafe {
        if MODE & mode::ASKS == 0 {
            add_terms::<R, NV, MODE>(t.terms, &mut at, &mut acc);
        } else {
            let mut asking = Asking::new(t);
            for term in (0..t.terms).step_by(AT_ONCE) {
                let terms = AT_ONCE.min(t.terms - term);
                asking.step(terms);
                add_terms::<R, NV, MODE>(terms, &mut at, &mut acc);
            }
        }
        store!(acc, R, NV, t.columns, t.c, t.c_stride, t.accumulate);
    }
}

/// Where the next term is, and where its copies go.
struct Place {
    a: *const f32,
    /// Elements from a row to the next, or from a term to the next.
    a_stride: usize,
    b: *const f32,
    b_stride: usize,
    copy: *mut f32,
    copy_b: *mut f32,
}

/// Adds so many terms to the sums.
///
/// What counts is instructions, of which a core that serves two programs may give each three in a cycle: were each element
/// of A read into a register first, these would be 42 for the 24 that multiply, in 12 cycles. Of two rows in three the
/// multiplications read the elements themselves, which makes it 34; of all rows it would be more reads than a core can do.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn add_terms<const R: usize, const NV: usize, const MODE: u8>(
    terms: usize,
    at: &mut Place,
    acc: &mut [[__m512; NV]; R],
) {
    // SAFETY: the caller vouches for the places.
    unsafe {
        for _ in 0..terms {
            let mut line = [_mm512_setzero_ps(); NV];
            for v in 0..NV {
                line[v] = _mm512_loadu_ps(at.b.add(16 * v));
            }
            if MODE & mode::STREAMS != 0 {
                prefetch_line(at.b.wrapping_byte_add(AHEAD));
                prefetch_line(at.b.wrapping_byte_add(AHEAD + LINE));
            }
            if MODE & mode::COPIES_B != 0 {
                for v in 0..NV {
                    _mm512_storeu_ps(at.copy_b.add(16 * v), line[v]);
                }
                at.copy_b = at.copy_b.wrapping_add(COLUMNS);
            }
            if MODE & mode::COPIES_A != 0 {
                let mask = u16::MAX >> (16 - R);
                _mm512_mask_storeu_ps(at.copy, mask, _mm512_maskz_loadu_ps(mask, at.a));
                at.copy = at.copy.wrapping_add(R);
            }
            each_row!(R, ROW => {
                let acc = &mut acc[ROW];
                if MODE & mode::ROWS == 0 && (NV == 1 || ROW % 3 < 2) {
                    for v in 0..NV {
                        if MODE & mode::PANEL == 0 {
                            multiply_add::<1, ROW>(at.a, line[v], &mut acc[v]);
                        } else {
                            multiply_add::<PITCH, ROW>(at.a, line[v], &mut acc[v]);
                        }
                    }
                } else {
                    let row = match MODE & (mode::ROWS | mode::PANEL) {
                        mode::ROWS => ROW * at.a_stride,
                        mode::PANEL => ROW * PITCH,
                        _ => ROW,
                    };
                    let a = _mm512_set1_ps(*at.a.add(row));
                    for v in 0..NV {
                        acc[v] = _mm512_fmadd_ps(a, line[v], acc[v]);
                    }
                }
            });
            at.a = at.a.wrapping_add(if MODE & (mode::ROWS | mode::PANEL) == 0 { at.a_stride } else { 1 });
            at.b = at.b.wrapping_add(at.b_stride);
        }
    }
}

/// `c + a·b`, where `a` is an element of row `ROW`, rows being `STRIDE` apart, and is read by the multiplication itself.
///
/// In assembly, because the compiler reads an element that is used twice into a register.
///
/// # Safety
/// There must be such an element.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn multiply_add<const STRIDE: usize, const ROW: usize>(a: *const f32, b: __m512, c: &mut __m512) {
    // SAFETY: the caller vouches for the element.
    unsafe {
        asm!(
            "vfmadd231ps {c}, {b}, dword ptr [{a} + {at}]{{1to16}}",
            c = inout(zmm_reg) *c,
            b = in(zmm_reg) b,
            a = in(reg) a,
            at = const 4 * STRIDE * ROW,
            options(pure, readonly, nostack, preserves_flags)
        );
    }
}
