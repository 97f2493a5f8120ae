//! Probabilities and score gradients of the backward, transposed: a row is a key, its columns are queries.

use std::arch::x86_64::*;

use half::bf16;

use super::super::layout::padded_pairs;
use super::product::{Left, Pairs, STEP, product};
use super::vector::{exp2, load, round_two, store_256, store_512};
use super::{AttentionSpec, BLOCK_KEYS, Room};
use crate::amx::Tiles;
use crate::math::LANES;

/// A block of keys of one head; everything beyond the sequence is zero.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    /// Keys by rows `[64, D padded]`.
    pub(super) k: &'a [bf16],
    /// Values by rows, likewise.
    pub(super) v: &'a [bf16],
    /// Keys transposed, `[D padded, 64]`.
    pub(super) k_transposed: &'a [bf16],
}

/// A block of queries of one head.
#[derive(Clone, Copy)]
pub(super) struct Queries<'a> {
    /// Transposed, in pairs of coordinates, `[D padded / 2, 64, 2]`.
    pub(super) q: &'a [bf16],
    /// Gradient of the output, likewise.
    pub(super) d_o: &'a [bf16],
    /// Minus the logarithm of the sum of exponentials, in powers of two, per query.
    pub(super) minus_lse: &'a [f32],
    /// `Σ_d dO O`, per query.
    pub(super) delta: &'a [f32],
}

/// Where the two matrices of one pair of blocks go; `stride` is that of the first two.
pub(super) struct Factors<'a> {
    /// Probabilities as a left matrix `[64 keys, 64 queries]`.
    pub(super) p: &'a mut [bf16],
    /// Score gradients without the scale, likewise.
    pub(super) ds: &'a mut [bf16],
    /// Queries between the rows of the two above.
    pub(super) stride: usize,
    /// Score gradients as a right matrix `[32, 64 queries, 2]`.
    pub(super) ds_pairs: &'a mut [bf16],
}

/// Scores and probability gradients of 32 keys and 32 queries, before the exponential.
pub(super) struct Products {
    scores: Room<f32>,
    d_p: Room<f32>,
}

/// Keys and queries that are worked on at once.
const PART: usize = 32;

impl Products {
    pub(super) fn new() -> Self {
        Self { scores: Room::new(PART * PART), d_p: Room::new(PART * PART) }
    }

    /// Fills `factors` for one pair of blocks; key `j` is seen by the queries of the bits of `visible[j]`.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) fn factors(
        &mut self,
        tiles: &Tiles,
        keys: Keys,
        queries: Queries,
        visible: &[u64; BLOCK_KEYS],
        spec: &AttentionSpec,
        factors: &mut Factors,
    ) {
        let stride = padded_pairs(spec.head_dim);
        for key in (0..BLOCK_KEYS).step_by(PART) {
            let seen = visible[key..key + PART].iter().fold(0, |seen, row| seen | row);
            for query in (0..BLOCK_KEYS).step_by(PART) {
                let some = (seen >> query) as u32 != 0;
                if some {
                    let left = |values| Left { values, stride };
                    let right = |values| Pairs { values, stride: BLOCK_KEYS };
                    let (k, v) = (left(&keys.k[key * stride..]), left(&keys.v[key * stride..]));
                    let (q, d_o) = (right(&queries.q[query * 2..]), right(&queries.d_o[query * 2..]));
                    product::<PART>(tiles, k, q, stride / STEP, &mut self.scores, PART, false);
                    product::<PART>(tiles, v, d_o, stride / STEP, &mut self.d_p, PART, false);
                }
                for row in (0..PART).step_by(2) {
                    for at in (0..PART).step_by(LANES) {
                        let to = (key + row, query + at);
                        let seen = [visible[to.0] >> to.1, visible[to.0 + 1] >> to.1];
                        if some {
                            self.two_keys(row, at, to, seen.map(|seen| seen as __mmask16), queries, spec, factors);
                        } else {
                            store(to, _mm512_setzero_si512(), _mm512_setzero_si512(), factors);
                        }
                    }
                }
            }
        }
    }

    /// Keys `row` and `row + 1` and the 16 queries from `at` on of this part, which are those from `to` on of the blocks.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn two_keys(
        &self,
        row: usize,
        at: usize,
        to: (usize, usize),
        seen: [__mmask16; 2],
        queries: Queries,
        spec: &AttentionSpec,
        factors: &mut Factors,
    ) {
        let scale = _mm512_set1_ps(spec.scale * std::f32::consts::LOG2_E);
        let (minus_lse, delta) = (load(&queries.minus_lse[to.1..]), load(&queries.delta[to.1..]));
        let (mut p, mut ds) = ([_mm512_setzero_ps(); 2], [_mm512_setzero_ps(); 2]);
        for r in 0..2 {
            let from = (row + r) * PART + at;
            let exponential = exp2(_mm512_fmadd_ps(load(&self.scores[from..]), scale, minus_lse));
            p[r] = _mm512_maskz_mov_ps(seen[r], exponential);
            let difference = _mm512_sub_ps(load(&self.d_p[from..]), delta);
            ds[r] = _mm512_maskz_mul_ps(seen[r], p[r], difference);
        }
        store(to, round_two(p[0], p[1]), round_two(ds[0], ds[1]), factors);
    }
}

/// Stores 16 queries of two keys, the second in the upper half of `p` and `ds`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn store((key, query): (usize, usize), p: __m512i, ds: __m512i, factors: &mut Factors) {
    for (values, out) in [(p, &mut *factors.p), (ds, &mut *factors.ds)] {
        let out = &mut out[key * factors.stride + query..];
        store_256(out, _mm512_castsi512_si256(values));
        store_256(&mut out[factors.stride..], _mm512_extracti64x4_epi64::<1>(values));
    }
    // Lane `2i` from lane `i` of the lower half, lane `2i + 1` from lane `i` of the upper.
    let mut interleaved = [0u16; 32];
    for (lane, from) in interleaved.iter_mut().enumerate() {
        *from = (lane / 2 + lane % 2 * 16) as u16;
    }
    // SAFETY: both are 64 bytes of plain data.
    let interleaved = unsafe { std::mem::transmute::<[u16; 32], __m512i>(interleaved) };
    store_512(&mut factors.ds_pairs[(key / 2 * BLOCK_KEYS + query) * 2..], _mm512_permutexvar_epi16(interleaved, ds));
}
