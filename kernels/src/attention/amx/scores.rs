//! Probabilities and score gradients of the backward, transposed: a row is a key, its columns are queries.

use std::arch::x86_64::*;

use half::bf16;

use super::super::layout::padded_pairs;
use super::super::tasks::Ahead;
use super::product::{Left, Pairs, STEP, product};
use super::vector::{exp2_short, load, round_two};
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

/// Scores and probability gradients of 32 keys and 32 queries, before the exponential; of two such parts by turns.
pub(super) struct Products {
    scores: [Room<f32>; 2],
    d_p: [Room<f32>; 2],
}

/// Keys and queries that are worked on at once.
const PART: usize = 32;

/// Steps of what is asked for ahead in one pair of blocks.
pub(super) const STEPS: usize = BLOCK_KEYS * BLOCK_KEYS / PART / 2;

impl Products {
    pub(super) fn new() -> Self {
        let two = || [(); 2].map(|()| Room::new(PART * PART));
        Self { scores: two(), d_p: two() }
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
        ahead: &mut Ahead,
    ) {
        let mut parts = [([0; PART], 0, 0); (BLOCK_KEYS / PART).pow(2)];
        let mut count = 0;
        for key in (0..BLOCK_KEYS).step_by(PART) {
            for query in (0..BLOCK_KEYS).step_by(PART) {
                let mut seen = [0; PART];
                for (seen, visible) in seen.iter_mut().zip(&visible[key..]) {
                    *seen = (visible >> query) as u32;
                }
                if seen.iter().fold(0, |some, row| some | row) == 0 {
                    factors.clear(key, query);
                } else {
                    parts[count] = (seen, key, query);
                    count += 1;
                }
            }
        }
        // The tiles multiply the next part while the exponentials of this one are taken.
        for next in 0..=count {
            if next < count {
                let (_, key, query) = parts[next];
                self.products(tiles, (key, query), keys, queries, spec, next % 2);
            }
            let Some(n) = next.checked_sub(1) else { continue };
            let (seen, key, query) = &parts[n];
            if seen.iter().fold(u32::MAX, |all, row| all & row) == u32::MAX {
                self.part::<true>((*key, *query), seen, queries, spec, factors, n % 2, ahead);
            } else {
                self.part::<false>((*key, *query), seen, queries, spec, factors, n % 2, ahead);
            }
        }
    }

    /// Scores and probability gradients of the part from `key` and `query` on.
    #[inline(always)]
    fn products(
        &mut self,
        tiles: &Tiles,
        (key, query): (usize, usize),
        keys: Keys,
        queries: Queries,
        spec: &AttentionSpec,
        to: usize,
    ) {
        let stride = padded_pairs(spec.head_dim);
        let left = |values| Left { values, stride };
        let right = |values| Pairs { values, stride: BLOCK_KEYS };
        let (k, v) = (left(&keys.k[key * stride..]), left(&keys.v[key * stride..]));
        let (q, d_o) = (right(&queries.q[query * 2..]), right(&queries.d_o[query * 2..]));
        product::<PART>(tiles, k, q, stride / STEP, &mut self.scores[to], PART, false);
        product::<PART>(tiles, v, d_o, stride / STEP, &mut self.d_p[to], PART, false);
    }

    /// Fills the part of `factors` from `key` and `query` on. Query `i` of the part sees those keys in whose `seen` its bit is
    /// set; `ALL` says that it is in all. The products are number `from` of the two.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn part<const ALL: bool>(
        &self,
        (key, query): (usize, usize),
        seen: &[u32; PART],
        queries: Queries,
        spec: &AttentionSpec,
        factors: &mut Factors,
        from: usize,
        ahead: &mut Ahead,
    ) {
        let (scores, d_p) = (&self.scores[from][..PART * PART], &self.d_p[from][..PART * PART]);
        let scale = _mm512_set1_ps(spec.scale * std::f32::consts::LOG2_E);
        let at = [query, query + LANES];
        let (minus_lse, delta) = (at.map(|at| load(&queries.minus_lse[at..])), at.map(|at| load(&queries.delta[at..])));
        let (p_out, ds_out, pairs_out) = factors.part(key, query);
        let stride = factors.stride;
        for row in (0..PART).step_by(2) {
            let mut ds_of_rows = [_mm512_setzero_si512(); 2];
            for r in row..row + 2 {
                let (mut p, mut ds) = ([_mm512_setzero_ps(); 2], [_mm512_setzero_ps(); 2]);
                for v in 0..2 {
                    let at = r * PART + v * LANES;
                    p[v] = exp2_short(_mm512_fmadd_ps(load(&scores[at..]), scale, minus_lse[v]));
                    let difference = _mm512_sub_ps(load(&d_p[at..]), delta[v]);
                    if ALL {
                        ds[v] = _mm512_mul_ps(p[v], difference);
                    } else {
                        let seen = (seen[r] >> (v * LANES)) as __mmask16;
                        p[v] = _mm512_maskz_mov_ps(seen, p[v]);
                        ds[v] = _mm512_maskz_mul_ps(seen, p[v], difference);
                    }
                }
                let rounded = round_two(ds[0], ds[1]);
                // SAFETY: `Factors::part` has checked that all rows of the part are there.
                unsafe {
                    _mm512_storeu_si512(p_out.add(r * stride).cast(), round_two(p[0], p[1]));
                    _mm512_storeu_si512(ds_out.add(r * stride).cast(), rounded);
                }
                ds_of_rows[r - row] = rounded;
            }
            let [even, odd] = ds_of_rows;
            for v in 0..2 {
                let pairs = _mm512_permutex2var_epi16(even, interleaved(v), odd);
                // SAFETY: as above.
                unsafe { _mm512_storeu_si512(pairs_out.add((row / 2 * BLOCK_KEYS + v * LANES) * 2).cast(), pairs) };
            }
            ahead.step();
        }
    }
}

/// For `permutex2var`: lane `2i` from number `16 v + i` of the first vector, lane `2i + 1` from the same of the second.
#[inline(always)]
fn interleaved(v: usize) -> __m512i {
    let mut from = [0u16; 32];
    for (lane, from) in from.iter_mut().enumerate() {
        *from = (v * LANES + lane / 2 + lane % 2 * 32) as u16;
    }
    // SAFETY: both are 64 bytes of plain data.
    unsafe { std::mem::transmute::<[u16; 32], __m512i>(from) }
}

impl Factors<'_> {
    /// Where the part from `key` and `query` on begins in each matrix; all of its rows are there.
    #[inline(always)]
    fn part(&mut self, key: usize, query: usize) -> (*mut bf16, *mut bf16, *mut bf16) {
        let (at, last) = (key * self.stride + query, (PART - 1) * self.stride + PART);
        let (p, ds) = (&mut self.p[at..][..last], &mut self.ds[at..][..last]);
        let (at, last) = ((key / 2 * BLOCK_KEYS + query) * 2, ((PART / 2 - 1) * BLOCK_KEYS + PART) * 2);
        (p.as_mut_ptr(), ds.as_mut_ptr(), self.ds_pairs[at..][..last].as_mut_ptr())
    }

    /// Fills the part from `key` and `query` on with zeros.
    fn clear(&mut self, key: usize, query: usize) {
        for row in key..key + PART {
            self.p[row * self.stride + query..][..PART].fill(bf16::ZERO);
            self.ds[row * self.stride + query..][..PART].fill(bf16::ZERO);
        }
        for pair in key / 2..(key + PART) / 2 {
            self.ds_pairs[(pair * BLOCK_KEYS + query) * 2..][..2 * PART].fill(bf16::ZERO);
        }
    }
}
