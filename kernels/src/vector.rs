//! Elementary functions of several AVX-512 vectors at a time, with the bits of [`crate::math`].
//!
//! A chain of dependent operations is some twenty long; the processor looks too few operations ahead to overlap the chains
//! of one loop iteration with those of the next. So the chains of several vectors go step by step beside one another.

use std::arch::x86_64::*;

/// [`crate::math::exp_small`].
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
pub(crate) fn exp_small<const N: usize>(x: [__m512; N]) -> [__m512; N] {
    let set = |value: f32| _mm512_set1_ps(value);
    let (lowest, round) = (set(-85.950_25), set(12_582_912.0));
    let (mut y, mut rounded, mut n, mut p) = (x, x, x, x);
    for v in 0..N {
        // In this order the maximum of NaN is NaN.
        y[v] = _mm512_max_ps(lowest, x[v]);
    }
    for v in 0..N {
        rounded[v] = _mm512_fmadd_ps(y[v], set(std::f32::consts::LOG2_E), round);
    }
    for v in 0..N {
        n[v] = _mm512_sub_ps(rounded[v], round);
    }
    for v in 0..N {
        y[v] = _mm512_fmadd_ps(n[v], set(-0.693_359_4), y[v]);
    }
    for v in 0..N {
        y[v] = _mm512_fmadd_ps(n[v], set(2.121_944_4e-4), y[v]);
        p[v] = set(1.987_569_1e-4);
    }
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
        for v in 0..N {
            p[v] = _mm512_fmadd_ps(p[v], y[v], set(c));
        }
    }
    for v in 0..N {
        p[v] = _mm512_add_ps(_mm512_fmadd_ps(p[v], _mm512_mul_ps(y[v], y[v]), y[v]), set(1.0));
    }
    for v in 0..N {
        let low = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x[v], lowest);
        let scale = _mm512_add_epi32(_mm512_castps_si512(rounded[v]), _mm512_set1_epi32(127));
        p[v] = _mm512_maskz_mul_ps(!low, p[v], _mm512_castsi512_ps(_mm512_slli_epi32::<23>(scale)));
    }
    p
}
