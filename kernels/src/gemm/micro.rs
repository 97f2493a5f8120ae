//! The innermost loop: a few rows times a few columns of C kept in registers over one block of `k`.

use crate::simd::{Isa, PORTABLE_FMA, fma};

/// Computes one tile: `(rows, columns, kc, a panel, b panel, corner of C, row stride of C, accumulate)`.
type Run = unsafe fn(usize, usize, usize, &[f32], &[f32], *mut f32, usize, bool);

/// A micro-kernel and the largest tile that it computes.
#[derive(Clone, Copy)]
pub(crate) struct MicroKernel {
    /// Rows of a full panel of A.
    pub(super) rows: usize,
    /// Columns of every panel of B.
    pub(super) columns: usize,
    /// The kernel. Unsafe: C must hold the tile.
    pub(super) run: Run,
}

/// The kernel for the active instruction set.
pub(super) fn micro_kernel() -> MicroKernel {
    match Isa::active() {
        #[cfg(target_arch = "x86_64")]
        Isa::Amx | Isa::Avx512 => MicroKernel { rows: 12, columns: 32, run: avx512 },
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => MicroKernel { rows: 6, columns: 16, run: avx2 },
        _ => MicroKernel { rows: 4, columns: 8, run: portable },
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

/// Expands to a match from a run-time row count to a kernel compiled for it and for so many vectors: edge tiles do no work for absent rows.
#[cfg(target_arch = "x86_64")]
macro_rules! by_rows {
    ($rows:expr, $kernel:ident, [$($r:literal)*], $vectors:literal, $args:tt) => {
        match $rows { $($r => $kernel::<$r, $vectors> $args,)* _ => unreachable!("more rows than the panel holds") }
    };
}

#[cfg(target_arch = "x86_64")]
unsafe fn avx512(
    rows: usize,
    columns: usize,
    kc: usize,
    a: &[f32],
    b: &[f32],
    c: *mut f32,
    stride: usize,
    accumulate: bool,
) {
    use std::arch::x86_64::*;

    /// `R` rows of `NV` vectors; of the last vector, the first `columns - 16 (NV - 1)` lanes.
    #[target_feature(enable = "avx512f")]
    unsafe fn tile<const R: usize, const NV: usize>(
        columns: usize,
        kc: usize,
        a: &[f32],
        b: &[f32],
        c: *mut f32,
        stride: usize,
        accumulate: bool,
    ) {
        assert!(a.len() >= kc * R && b.len() >= kc * 32 && columns <= 16 * NV && columns > 16 * (NV - 1));
        // C is far away: on its way while the sums are made.
        for i in 0..R {
            for v in 0..NV {
                _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(i * stride + 16 * v).cast());
            }
        }
        let mut acc = [[_mm512_setzero_ps(); NV]; R];
        let (mut ap, mut bp) = (a.as_ptr(), b.as_ptr());
        // SAFETY: both pointers stay inside the panels, whose lengths were just checked.
        unsafe {
            for _ in 0..kc {
                let mut line = [_mm512_setzero_ps(); NV];
                for v in 0..NV {
                    line[v] = _mm512_loadu_ps(bp.add(16 * v));
                }
                for (i, acc) in acc.iter_mut().enumerate() {
                    let ai = _mm512_set1_ps(*ap.add(i));
                    for v in 0..NV {
                        acc[v] = _mm512_fmadd_ps(ai, line[v], acc[v]);
                    }
                }
                ap = ap.add(R);
                bp = bp.add(32);
            }
        }
        let last = u16::MAX >> (16 * NV - columns);
        for (i, acc) in acc.iter().enumerate() {
            for (v, value) in acc.iter().enumerate() {
                let mask = if v + 1 == NV { last } else { u16::MAX };
                // SAFETY: the caller vouches for the tile at `c`; lanes beyond it are masked out.
                unsafe {
                    let at = c.add(i * stride + 16 * v);
                    let value =
                        if accumulate { _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), *value) } else { *value };
                    _mm512_mask_storeu_ps(at, mask, value);
                }
            }
        }
    }
    // SAFETY: chosen only where AVX-512 is active; the caller vouches for C.
    unsafe {
        if columns > 16 {
            by_rows!(rows, tile, [1 2 3 4 5 6 7 8 9 10 11 12], 2, (columns, kc, a, b, c, stride, accumulate))
        } else {
            by_rows!(rows, tile, [1 2 3 4 5 6 7 8 9 10 11 12], 1, (columns, kc, a, b, c, stride, accumulate))
        }
    }
}

#[cfg(target_arch = "x86_64")]
unsafe fn avx2(
    rows: usize,
    columns: usize,
    kc: usize,
    a: &[f32],
    b: &[f32],
    c: *mut f32,
    stride: usize,
    accumulate: bool,
) {
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2,fma")]
    unsafe fn tile<const R: usize, const NV: usize>(
        columns: usize,
        kc: usize,
        a: &[f32],
        b: &[f32],
        c: *mut f32,
        stride: usize,
        accumulate: bool,
    ) {
        assert!(a.len() >= kc * R && b.len() >= kc * 16);
        let mut acc = [[_mm256_setzero_ps(); NV]; R];
        let (mut ap, mut bp) = (a.as_ptr(), b.as_ptr());
        // SAFETY: both pointers stay inside the panels, whose lengths were just checked.
        unsafe {
            for _ in 0..kc {
                let mut line = [_mm256_setzero_ps(); NV];
                for v in 0..NV {
                    line[v] = _mm256_loadu_ps(bp.add(8 * v));
                }
                for (i, acc) in acc.iter_mut().enumerate() {
                    let ai = _mm256_set1_ps(*ap.add(i));
                    for v in 0..NV {
                        acc[v] = _mm256_fmadd_ps(ai, line[v], acc[v]);
                    }
                }
                ap = ap.add(R);
                bp = bp.add(16);
            }
        }
        for (i, acc) in acc.iter().enumerate() {
            let mut line = [0f32; 16];
            // SAFETY: `line` holds two registers; the caller vouches for the tile at `c`.
            unsafe {
                for v in 0..NV {
                    _mm256_storeu_ps(line.as_mut_ptr().add(8 * v), acc[v]);
                }
                store_row(&line, columns, c.add(i * stride), accumulate);
            }
        }
    }
    // SAFETY: chosen only where AVX2 and FMA are active; the caller vouches for C.
    unsafe { by_rows!(rows, tile, [1 2 3 4 5 6], 2, (columns, kc, a, b, c, stride, accumulate)) }
}

/// For every other processor: arrays small enough for the compiler to keep in vector registers.
unsafe fn portable(
    rows: usize,
    columns: usize,
    kc: usize,
    a: &[f32],
    b: &[f32],
    c: *mut f32,
    stride: usize,
    accumulate: bool,
) {
    let mut acc = [[0f32; 8]; 4];
    for p in 0..kc {
        let b: &[f32] = &b[p * 8..p * 8 + 8];
        for (acc, &ai) in acc.iter_mut().zip(&a[p * rows..p * rows + rows]) {
            for j in 0..8 {
                acc[j] = fma::<PORTABLE_FMA>(ai, b[j], acc[j]);
            }
        }
    }
    for (i, acc) in acc.iter().take(rows).enumerate() {
        // SAFETY: the caller vouches for the tile at `c`.
        unsafe { store_row(acc, columns, c.add(i * stride), accumulate) };
    }
}
