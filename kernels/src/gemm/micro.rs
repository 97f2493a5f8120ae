//! The innermost loop: a few rows times a few columns of C kept in registers over one block of `k`.

use super::K_BLOCK;
#[cfg(target_arch = "x86_64")]
use super::avx512;
use crate::simd::{Isa, PORTABLE_FMA, fma};

/// Elements from a row of a panel of A to the next: all terms of a block and a few more, so that a term of all rows is not at
/// the same place of as many lines, which a core reads more slowly.
pub(super) const PITCH: usize = K_BLOCK + 4;

/// Terms of a few rows of A.
#[derive(Clone, Copy)]
pub(super) enum Order {
    /// The terms of a row side by side; so many elements from a row to the next.
    Rows(usize),
    /// The rows of a term side by side; so many elements from a term to the next.
    Terms(usize),
}

impl Order {
    /// Elements from a row to the next, and from a term to the next.
    fn strides(self) -> (usize, usize) {
        match self {
            Order::Rows(stride) => (stride, 1),
            Order::Terms(stride) => (1, stride),
        }
    }
}

/// What lies far away and is needed soon: pairs of cache lines, in runs of neighbours.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    /// The first of them; it need not be memory of ours.
    pub(super) start: *const f32,
    /// Pairs of a run.
    pub(super) run: usize,
    /// Elements from the start of a run to that of the next.
    pub(super) stride: usize,
    /// Pairs in all: spread over the terms, at most one for each.
    pub(super) pairs: usize,
}

/// What a micro-kernel computes: a tile of C over some terms.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) terms: usize,
    pub(super) a: *const f32,
    pub(super) order: Order,
    /// Where to leave a copy of A in order of terms, `[terms][rows]`; or null.
    pub(super) copy: *mut f32,
    /// Where to leave a copy of B, `[terms]` and all columns of the micro-kernel; or null.
    pub(super) copy_b: *mut f32,
    /// As many columns of each term as the micro-kernel is wide, whatever `columns` is.
    pub(super) b: *const f32,
    /// Elements from a term of B to the next.
    pub(super) b_stride: usize,
    pub(super) c: *mut f32,
    /// Elements from a row of C to the next.
    pub(super) c_stride: usize,
    /// Add to C instead of overwriting it.
    pub(super) accumulate: bool,
    /// What to ask for meanwhile.
    pub(super) ahead: Option<Ahead>,
}

/// A micro-kernel and the largest tile that it computes.
#[derive(Clone, Copy)]
pub(crate) struct MicroKernel {
    /// Rows of a full panel of A.
    pub(super) rows: usize,
    /// Columns of every panel of B.
    pub(super) columns: usize,
    /// The kernel. Unsafe: A, B and C must hold the tile, and the copies have room for A and B.
    pub(super) run: unsafe fn(&Tile),
    /// Whether [`few_rows`](super::few::few_rows) has a kernel of its own.
    pub(super) has_few: bool,
}

/// The kernel for the active instruction set.
pub(super) fn micro_kernel() -> MicroKernel {
    match Isa::active() {
        #[cfg(target_arch = "x86_64")]
        Isa::Amx | Isa::Avx512 => MicroKernel { rows: 12, columns: 32, run: avx512::tile, has_few: true },
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => MicroKernel { rows: 6, columns: 16, run: avx2, has_few: false },
        _ => MicroKernel { rows: 4, columns: 8, run: portable, has_few: false },
    }
}

/// Adds or copies the valid columns of one row of a finished tile to C.
#[inline(always)]
unsafe fn store_row(tile: &[f32], columns: usize, c: *mut f32, accumulate: bool) {
    // SAFETY: the caller vouches for `columns` elements at `c`.
    let row = unsafe { std::slice::from_raw_parts_mut(c, columns) };
    for (c, t) in row.iter_mut().zip(tile) {
        *c = if accumulate { *c + t } else { *t };
    }
}

/// Leaves the copy of B that is asked for, which is so many columns wide.
pub(super) unsafe fn copy_b(t: &Tile, columns: usize) {
    if t.copy_b.is_null() {
        return;
    }
    for p in 0..t.terms {
        // SAFETY: the caller vouches for B and the copy.
        unsafe { t.b.add(p * t.b_stride).copy_to_nonoverlapping(t.copy_b.add(p * columns), columns) };
    }
}

/// Leaves the copy of A that is asked for.
unsafe fn copy_a(t: &Tile) {
    if t.copy.is_null() {
        return;
    }
    let (row, term) = t.order.strides();
    for p in 0..t.terms {
        for i in 0..t.rows {
            // SAFETY: the caller vouches for A and the copy.
            unsafe { *t.copy.add(p * t.rows + i) = *t.a.add(i * row + p * term) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
unsafe fn avx2(t: &Tile) {
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2,fma")]
    unsafe fn tile<const R: usize>(t: &Tile) {
        let (row, term) = t.order.strides();
        let mut acc = [[_mm256_setzero_ps(); 2]; R];
        let (mut ap, mut bp) = (t.a, t.b);
        // SAFETY: the caller vouches for A and B.
        unsafe {
            for _ in 0..t.terms {
                let line = [_mm256_loadu_ps(bp), _mm256_loadu_ps(bp.add(8))];
                for (i, acc) in acc.iter_mut().enumerate() {
                    let ai = _mm256_set1_ps(*ap.add(i * row));
                    for v in 0..2 {
                        acc[v] = _mm256_fmadd_ps(ai, line[v], acc[v]);
                    }
                }
                ap = ap.wrapping_add(term);
                bp = bp.wrapping_add(t.b_stride);
            }
        }
        for (i, acc) in acc.iter().enumerate() {
            let mut line = [0f32; 16];
            // SAFETY: `line` holds two registers; the caller vouches for the tile of C.
            unsafe {
                for v in 0..2 {
                    _mm256_storeu_ps(line.as_mut_ptr().add(8 * v), acc[v]);
                }
                store_row(&line, t.columns, t.c.add(i * t.c_stride), t.accumulate);
            }
        }
    }
    // SAFETY: chosen only where AVX2 and FMA are active; the caller vouches for the operands.
    unsafe {
        copy_a(t);
        copy_b(t, 16);
        match t.rows {
            1 => tile::<1>(t),
            2 => tile::<2>(t),
            3 => tile::<3>(t),
            4 => tile::<4>(t),
            5 => tile::<5>(t),
            6 => tile::<6>(t),
            _ => unreachable!("more rows than the panel holds"),
        }
    }
}

/// For every other processor: arrays small enough for the compiler to keep in vector registers.
unsafe fn portable(t: &Tile) {
    let (row, term) = t.order.strides();
    let mut acc = [[0f32; 8]; 4];
    for p in 0..t.terms {
        // SAFETY: the caller vouches for A, which has `t.rows` rows, at most 4, and for B.
        unsafe {
            let b: [f32; 8] = t.b.add(p * t.b_stride).cast::<[f32; 8]>().read();
            for (i, acc) in acc.iter_mut().enumerate().take(t.rows) {
                let ai = *t.a.add(i * row + p * term);
                for j in 0..8 {
                    acc[j] = fma::<PORTABLE_FMA>(ai, b[j], acc[j]);
                }
            }
        }
    }
    // SAFETY: the caller vouches for the copy and the tile of C.
    unsafe {
        copy_a(t);
        copy_b(t, 8);
        for (i, acc) in acc.iter().take(t.rows).enumerate() {
            store_row(acc, t.columns, t.c.add(i * t.c_stride), t.accumulate);
        }
    }
}
