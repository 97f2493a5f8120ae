//! A tile for few rows, that begins where another has ended.

use std::arch::x86_64::*;
use std::ptr::null_mut;

use super::{COLUMNS, Place, add_terms, by_rows, each_row, mode, store, zero};
use crate::prefetch::prefetch_line_to_write;

/// Terms whose lines are asked for one after the other, half a page; one group of rows asks for the first half of a page,
/// another for the second: spread over all their time, but together enough for the processor to follow by itself.
const ASKED: usize = 16;

/// A piece of the chains of sums of a few rows.
pub(in crate::gemm) struct Chain {
    pub(in crate::gemm) rows: usize,
    /// Of so many groups of rows that go over the same piece of B, the index of this one.
    pub(in crate::gemm) group: usize,
    pub(in crate::gemm) groups: usize,
    /// Begin with zeros, not with the sums of the piece before.
    pub(in crate::gemm) is_start: bool,
    /// The chains end here: the place in C, and how many columns it has.
    pub(in crate::gemm) c: Option<(*mut f32, usize)>,
    /// Elements from a row of C to the next.
    pub(in crate::gemm) c_stride: usize,
    /// Add to C instead of overwriting it.
    pub(in crate::gemm) accumulate: bool,
}

/// Adds `A·B` to `sums`, `[rows][32]`, or ends it in C: `a` is `[terms][rows]` and `b` `[terms][32]`.
///
/// # Safety
/// AVX-512 must be active, and C hold the tile.
pub(in crate::gemm) unsafe fn chain(t: &Chain, a: &[f32], b: &[f32], sums: &mut [f32]) {
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
    let mut acc = [[zero(); 2]; R];
    // SAFETY: the caller has checked the lengths, and vouches for C.
    unsafe {
        if !t.is_start {
            for (i, acc) in acc.iter_mut().enumerate() {
                for v in 0..2 {
                    acc[v] = _mm512_loadu_ps(sums.as_ptr().add(i * COLUMNS + 16 * v));
                }
            }
        }
        let mut at = Place {
            a: a.as_ptr(),
            a_stride: R,
            b: b.as_ptr(),
            b_stride: COLUMNS,
            copy: null_mut(),
            copy_b: null_mut(),
        };
        for (half, b) in b.chunks(ASKED * COLUMNS).enumerate() {
            let terms = b.len() / COLUMNS;
            if t.groups == 1 || half % 2 == t.group {
                add_terms::<R, 2, { mode::STREAMS }>(terms, &mut at, &mut acc);
            } else {
                add_terms::<R, 2, 0>(terms, &mut at, &mut acc);
            }
        }
        match t.c {
            Some((c, columns)) if columns > 16 => store!(acc, R, 2, columns, c, t.c_stride, t.accumulate),
            Some((c, columns)) => store!(acc, R, 1, columns, c, t.c_stride, t.accumulate),
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
