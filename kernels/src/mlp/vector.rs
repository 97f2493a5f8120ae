//! Gated SiLU of bf16 in AVX-512, several vectors beside one another; operation by operation what [`super::cpu`] does for other
//! instruction sets, so the same bits.

use std::arch::x86_64::*;

use candle_core::DType;

use crate::element::Element;
use crate::math::LANES;
use crate::vector::exp_small;

/// Vectors beside one another.
const VECTORS: usize = 4;

type Vectors = [__m512; VECTORS];
/// One for each pair of vectors.
type Masks = [__mmask32; VECTORS / 2];

/// The bits of the odd ones of two neighbours.
const UPPER: i32 = 0xffff_0000_u32.cast_signed();

/// The elements that there are of the pairs of vectors from `at` on.
#[inline(always)]
fn masks(len: usize, at: usize) -> Masks {
    let bits = if len - at >= VECTORS * LANES { u64::MAX } else { (1 << (len - at)) - 1 };
    [bits as u32, (bits >> 32) as u32]
}

/// The elements of `masks` at `from`, as f32: of each pair of vectors the even ones, then the odd ones, so that they are
/// where they are stored.
///
/// # Safety
/// They must be there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn load<E: Element>(from: *const E, masks: Masks) -> Vectors {
    let mut values = [_mm512_setzero_ps(); VECTORS];
    let upper = _mm512_set1_epi32(UPPER);
    for (pair, mask) in masks.into_iter().enumerate() {
        // SAFETY: masked lanes are not read.
        let bits = unsafe { _mm512_maskz_loadu_epi16(mask, from.wrapping_add(pair * 2 * LANES).cast()) };
        values[2 * pair] = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits));
        values[2 * pair + 1] = _mm512_castsi512_ps(_mm512_and_si512(bits, upper));
    }
    values
}

/// Rounds to the elements of `masks` at `to` in the order of [`load`], as [`Element::narrow`].
///
/// # Safety
/// They must be there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn store<E: Element>(to: *mut E, masks: Masks, values: Vectors) {
    let (upper, lowest) = (_mm512_set1_epi32(UPPER), _mm512_set1_epi32(1 << 16));
    let mut rounded = [_mm512_setzero_si512(); VECTORS];
    for v in 0..VECTORS {
        let bits = _mm512_castps_si512(values[v]);
        let up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
        let odd = _mm512_test_epi32_mask(bits, lowest);
        rounded[v] = _mm512_mask_sub_epi32(up, odd, up, _mm512_set1_epi32(-1));
    }
    for (pair, mask) in masks.into_iter().enumerate() {
        let (even, odd) = (2 * pair, 2 * pair + 1);
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values[even], values[odd]);
        if nan != 0 {
            for v in [even, odd] {
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values[v], values[v]);
                let quiet = _mm512_set1_epi32(1 << 22);
                rounded[v] = _mm512_mask_or_epi32(rounded[v], nan, _mm512_castps_si512(values[v]), quiet);
            }
        }
        // The odd ones' bits where `upper` has ones, else the even ones'.
        let low = _mm512_srli_epi32::<16>(rounded[even]);
        let both = _mm512_ternarylogic_epi32::<0xe4>(rounded[odd], low, upper);
        // SAFETY: masked lanes are not written.
        unsafe { _mm512_mask_storeu_epi16(to.wrapping_add(pair * 2 * LANES).cast(), mask, both) };
    }
}

/// `σ(x)` and `1 - σ(x)`, as [`crate::math::sigmoid`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn sigmoid(x: Vectors) -> (Vectors, Vectors) {
    let (one, lowest, sign) = (_mm512_set1_ps(1.0), _mm512_set1_ps(-80.0), _mm512_set1_ps(-0.0));
    let mut negative = x;
    for v in 0..VECTORS {
        // In this order the maximum of NaN is NaN.
        negative[v] = _mm512_xor_ps(_mm512_max_ps(lowest, x[v]), sign);
    }
    let mut e = exp_small(negative);
    let mut s = e;
    for v in 0..VECTORS {
        s[v] = _mm512_div_ps(one, _mm512_add_ps(one, e[v]));
    }
    for v in 0..VECTORS {
        e[v] = _mm512_mul_ps(e[v], s[v]);
    }
    (s, e)
}

/// `silu(gate) · up` of bf16.
///
/// # Safety
/// The processor has AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn gated_row<E: Element>(gate: &[E], up: &[E], y: &mut [E]) {
    assert!(E::DTYPE == DType::BF16 && gate.len() == y.len() && up.len() == y.len());
    for at in (0..y.len()).step_by(VECTORS * LANES) {
        let masks = masks(y.len(), at);
        // SAFETY: elements from `at` on, as many as there are.
        unsafe {
            let x = load(gate.as_ptr().add(at), masks);
            let (mut value, _) = sigmoid(x);
            let up = load(up.as_ptr().add(at), masks);
            for v in 0..VECTORS {
                value[v] = _mm512_mul_ps(_mm512_mul_ps(x[v], value[v]), up[v]);
            }
            store(y.as_mut_ptr().add(at), masks, value);
        }
    }
}

/// The gradients of gate and up of bf16, and, if `AGAIN`, [`gated_row`] in `y`.
///
/// # Safety
/// The processor has AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn gated_backward_row<E: Element, const AGAIN: bool>(
    dy: &[E],
    gate: &[E],
    up: &[E],
    dgate: &mut [E],
    dup: &mut [E],
    y: &mut [E],
) {
    let len = dy.len();
    assert!(
        E::DTYPE == DType::BF16
            && [gate.len(), up.len(), dgate.len(), dup.len()] == [len; 4]
            && (!AGAIN || y.len() == len)
    );
    for at in (0..len).step_by(VECTORS * LANES) {
        let masks = masks(len, at);
        // SAFETY: elements from `at` on, as many as there are.
        unsafe {
            let x = load(gate.as_ptr().add(at), masks);
            let (s, mut slope) = sigmoid(x);
            let mut value = s;
            for v in 0..VECTORS {
                slope[v] = _mm512_mul_ps(s[v], _mm512_fmadd_ps(x[v], slope[v], _mm512_set1_ps(1.0)));
                value[v] = _mm512_mul_ps(x[v], s[v]);
            }
            let (dy, up) = (load(dy.as_ptr().add(at), masks), load(up.as_ptr().add(at), masks));
            let (mut to_gate, mut to_up) = (dy, dy);
            for v in 0..VECTORS {
                to_gate[v] = _mm512_mul_ps(_mm512_mul_ps(dy[v], up[v]), slope[v]);
                to_up[v] = _mm512_mul_ps(dy[v], value[v]);
            }
            store(dgate.as_mut_ptr().add(at), masks, to_gate);
            store(dup.as_mut_ptr().add(at), masks, to_up);
            if AGAIN {
                for v in 0..VECTORS {
                    value[v] = _mm512_mul_ps(value[v], up[v]);
                }
                store(y.as_mut_ptr().add(at), masks, value);
            }
        }
    }
}
