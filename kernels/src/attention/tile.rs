//! Small matrix products held in registers: the inner loops of attention of a few rows.
//!
//! The sums of a tile are assigned a vector at a time (`array::from_fn`): element by element, the compiler leaves them in
//! memory.

use std::array;
use std::ops::Range;

use crate::math::LANES;
use crate::simd::{Isa, fma, simd_fn};

/// Rows of the left matrix worked on at once.
pub(super) const TILE_ROWS: usize = 4;

/// The right matrix `B`, of which row `t` starts at `t · stride`.
#[derive(Clone, Copy)]
pub(super) struct Right<'a> {
    pub(super) values: &'a [f32],
    pub(super) stride: usize,
}

/// `C[r, n] (+)= Σ_t a[r][t] · B[t, n]` for `R` (1 or 4) rows, `t` over `steps` in order and `n` over `columns`, which
/// are multiples of 16.
///
/// Every element is one chain of fused multiply-adds over `t`, whatever the tiling. Row `r` of `C` starts at
/// `r · c_stride`; without `accumulate`, C starts from zero.
pub(super) fn product<const R: usize>(
    a: [&[f32]; R],
    b: Right,
    steps: Range<usize>,
    c: &mut [f32],
    c_stride: usize,
    columns: Range<usize>,
    accumulate: bool,
) {
    if let Some(a) = a.first_chunk::<TILE_ROWS>() {
        four_rows(a, b, steps, c, c_stride, columns, accumulate);
    } else {
        one_row(a[0], b, steps, c, c_stride, columns, accumulate);
    }
}

simd_fn! {
    fn four_rows(
        a: &[&[f32]; TILE_ROWS], b: Right, steps: Range<usize>, c: &mut [f32], c_stride: usize, columns: Range<usize>,
        accumulate: bool,
    ) = four_rows_body;
}

#[inline(always)]
fn four_rows_body<const FMA: bool>(
    a: &[&[f32]; TILE_ROWS],
    b: Right,
    steps: Range<usize>,
    c: &mut [f32],
    c_stride: usize,
    columns: Range<usize>,
    accumulate: bool,
) {
    let a = a.map(|row| &row[..steps.end]);
    tiles::<FMA, TILE_ROWS>(|t| a.map(|row| row[t]), b, steps, c, c_stride, columns, accumulate);
}

simd_fn! {
    fn one_row(
        a: &[f32], b: Right, steps: Range<usize>, c: &mut [f32], c_stride: usize, columns: Range<usize>, accumulate: bool,
    ) = one_row_body;
}

#[inline(always)]
fn one_row_body<const FMA: bool>(
    a: &[f32],
    b: Right,
    steps: Range<usize>,
    c: &mut [f32],
    c_stride: usize,
    columns: Range<usize>,
    accumulate: bool,
) {
    let a = &a[..steps.end];
    tiles::<FMA, 1>(|t| [a[t]], b, steps, c, c_stride, columns, accumulate);
}

/// Cuts the columns into tiles; `a(t)` gives column `t` of the left matrix.
#[inline(always)]
fn tiles<const FMA: bool, const R: usize>(
    a: impl Fn(usize) -> [f32; R],
    b: Right,
    steps: Range<usize>,
    c: &mut [f32],
    c_stride: usize,
    columns: Range<usize>,
    accumulate: bool,
) {
    // Four vectors of sixteen for four rows fill half of AVX-512's registers, but spill AVX2's.
    let wide = Isa::active() >= Isa::Avx512;
    let mut column = columns.start;
    while column < columns.end {
        let vectors = (columns.end - column) / LANES;
        let (b, steps, c) = (Right { values: &b.values[column..], ..b }, steps.clone(), &mut c[column..]);
        if wide && vectors >= 4 {
            tile::<FMA, R, 4>(&a, b, steps, c, c_stride, accumulate);
            column += 4 * LANES;
        } else if wide && vectors >= 2 {
            tile::<FMA, R, 2>(&a, b, steps, c, c_stride, accumulate);
            column += 2 * LANES;
        } else {
            tile::<FMA, R, 1>(&a, b, steps, c, c_stride, accumulate);
            column += LANES;
        }
    }
}

/// One tile: `R` rows of `NV` vectors.
#[inline(always)]
fn tile<const FMA: bool, const R: usize, const NV: usize>(
    a: &impl Fn(usize) -> [f32; R],
    b: Right,
    steps: Range<usize>,
    c: &mut [f32],
    c_stride: usize,
    accumulate: bool,
) {
    let mut sums = [[[0.0; LANES]; NV]; R];
    if accumulate {
        for r in 0..R {
            for v in 0..NV {
                sums[r][v].copy_from_slice(&c[r * c_stride + v * LANES..][..LANES]);
            }
        }
    }
    for t in steps {
        let row = &b.values[t * b.stride..][..NV * LANES];
        let factors = a(t);
        for r in 0..R {
            for v in 0..NV {
                let sum = sums[r][v];
                sums[r][v] = array::from_fn(|lane| fma::<FMA>(factors[r], row[v * LANES + lane], sum[lane]));
            }
        }
    }
    for r in 0..R {
        for v in 0..NV {
            c[r * c_stride + v * LANES..][..LANES].copy_from_slice(&sums[r][v]);
        }
    }
}
