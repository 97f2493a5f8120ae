//! The steps between the products of a tile in AVX-512, where the compiler makes gathers of the portable bodies.
//!
//! Operation by operation what [`super::forward`] and [`super::backward`] do for other instruction sets, so the same bits.

use std::arch::x86_64::*;
use std::ops::Range;

use super::queries::{Lanes, QueryTile, VECTORS};
use crate::math::LANES;
use crate::vector::exp_small;

type Pair = [__m512; VECTORS];

#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn load(row: &Lanes) -> Pair {
    // SAFETY: a row is two vectors.
    unsafe { [_mm512_loadu_ps(row[0].as_ptr()), _mm512_loadu_ps(row[1].as_ptr())] }
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn store(row: &mut Lanes, values: Pair) {
    for v in 0..VECTORS {
        // SAFETY: a row is two vectors.
        unsafe { _mm512_storeu_ps(row[v].as_mut_ptr(), values[v]) };
    }
}

/// The queries that see a key, as bits.
#[inline(always)]
fn masks(seeing: Range<usize>) -> [__mmask16; VECTORS] {
    let below = |end: usize| ((1u64 << end) - 1) as u32;
    let bits = below(seeing.end) & !below(seeing.start);
    [bits as u16, (bits >> LANES) as u16]
}

/// The larger scaled score so far of each query, `maximum` to begin with; scales the scores `[64, 32]` of the keys `seen`
/// in place, hidden ones to -∞.
///
/// # Safety
/// The processor has AVX-512.
#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn scale_scores(
    scores: &mut [Lanes],
    seen: Range<usize>,
    start: usize,
    tile: &QueryTile,
    scale: f32,
    maximum: &mut Lanes,
) {
    let (scale, hidden) = (_mm512_set1_ps(scale), _mm512_set1_ps(f32::NEG_INFINITY));
    let mut top = load(maximum);
    for (key, row) in seen.clone().zip(&mut scores[seen]) {
        let (mut values, masks) = (load(row), masks(tile.seeing(start + key)));
        for v in 0..VECTORS {
            values[v] = _mm512_mask_mul_ps(hidden, masks[v], values[v], scale);
            // The second operand if the first is NaN.
            top[v] = _mm512_max_ps(values[v], top[v]);
        }
        store(row, values);
    }
    store(maximum, top);
}

/// Turns the scaled scores of the keys `seen` into `exp(score - shift)`; returns their sums, key `i` into sum `i % 16`.
///
/// # Safety
/// The processor has AVX-512.
#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn exponentials(scores: &mut [Lanes], seen: Range<usize>, shift: &Lanes) -> [Lanes; LANES] {
    let mut sums = [[[0.0; LANES]; VECTORS]; LANES];
    let shift = load(shift);
    for (key, row) in seen.clone().zip(&mut scores[seen]) {
        let (mut values, mut sum) = (load(row), load(&sums[key % LANES]));
        for v in 0..VECTORS {
            values[v] = _mm512_sub_ps(values[v], shift[v]);
        }
        values = exp_small(values);
        for v in 0..VECTORS {
            sum[v] = _mm512_add_ps(sum[v], values[v]);
        }
        store(row, values);
        store(&mut sums[key % LANES], sum);
    }
    sums
}

/// Multiplies every row by `factor`.
///
/// # Safety
/// The processor has AVX-512.
#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn multiply_rows(rows: &mut [Lanes], factor: &Lanes) {
    let factor = load(factor);
    for row in rows {
        let values = load(row);
        let mut products = values;
        for v in 0..VECTORS {
            products[v] = _mm512_mul_ps(values[v], factor[v]);
        }
        store(row, products);
    }
}

/// Divides every row by `divisor`.
///
/// # Safety
/// The processor has AVX-512.
#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn divide_rows(rows: &mut [Lanes], divisor: &Lanes) {
    let divisor = load(divisor);
    for row in rows {
        let mut values = load(row);
        for v in 0..VECTORS {
            values[v] = _mm512_div_ps(values[v], divisor[v]);
        }
        store(row, values);
    }
}

/// [`super::backward`]'s `score_gradients` of the keys that `seeing` goes through.
///
/// # Safety
/// The processor has AVX-512.
#[target_feature(enable = "avx512f,avx512dq")]
pub(super) fn score_gradients(
    scores: &mut [Lanes],
    gradients: &mut [Lanes],
    first_key: usize,
    tile: &QueryTile,
    (lse, delta): (&Lanes, &Lanes),
    scale: f32,
) {
    let (lse, delta, scale) = (load(lse), load(delta), _mm512_set1_ps(scale));
    for (row, (scores, gradients)) in scores.iter_mut().zip(gradients).enumerate() {
        let (mut p, mut ds, masks) = (load(scores), load(gradients), masks(tile.seeing(first_key + row)));
        for v in 0..VECTORS {
            // A product and a subtraction with one rounding: what `fma` of the negated sum is.
            p[v] = _mm512_fmsub_ps(p[v], scale, lse[v]);
        }
        let e = exp_small(p);
        for v in 0..VECTORS {
            ds[v] = _mm512_maskz_mul_ps(masks[v], _mm512_mul_ps(e[v], _mm512_sub_ps(ds[v], delta[v])), scale);
            p[v] = _mm512_maskz_mov_ps(masks[v], e[v]);
        }
        store(scores, p);
        store(gradients, ds);
    }
}
