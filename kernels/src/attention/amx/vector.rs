//! What AVX-512 does between the products: layouts, exponentials and roundings.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use half::bf16;

use super::super::BLOCK_KEYS;
use super::super::layout::padded_pairs;
use super::Head;

/// The lowest `count` (at most 16) lanes.
pub(super) fn lanes(count: usize) -> __mmask16 {
    ((1u32 << count.min(16)) - 1) as __mmask16
}

/// Keys `from..to` of a block of 64 as bits.
pub(super) fn range_mask(from: usize, to: usize) -> u64 {
    let below = |end: usize| if end >= BLOCK_KEYS { u64::MAX } else { (1 << end) - 1 };
    below(to) & !below(from)
}

/// The 32 numbers of `row` from `at` on, zero beyond its end.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn load_32(row: &[bf16], at: usize) -> __m512i {
    let rest = &row[at.min(row.len())..];
    let mask = if rest.len() >= 32 { u32::MAX } else { (1 << rest.len()) - 1 };
    // SAFETY: masked lanes are not read.
    unsafe { _mm512_maskz_loadu_epi16(mask, rest.as_ptr().cast()) }
}

/// The 16 numbers of `row` from `at` on, zero beyond its end, each in the low half of a lane.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn load_16(row: &[bf16], at: usize) -> __m512i {
    let rest = &row[at.min(row.len())..];
    // SAFETY: masked lanes are not read.
    _mm512_cvtepu16_epi32(unsafe { _mm256_maskz_loadu_epi16(lanes(rest.len()), rest.as_ptr().cast()) })
}

/// Stores a whole vector at the start of `out`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn store_512<T: super::Number>(out: &mut [T], value: __m512i) {
    assert!(size_of_val(out) >= 64);
    // SAFETY: 64 bytes are there.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), value) };
}

/// Loads sixteen f32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn load(values: &[f32]) -> __m512 {
    assert!(values.len() >= 16);
    // SAFETY: 16 numbers are there.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

/// Stores the first numbers of two vectors, rounded to bf16, to `out` (at most 32).
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn store_rounded(out: &mut [MaybeUninit<bf16>], [first, second]: [__m512; 2]) {
    let mask = if out.len() >= 32 { u32::MAX } else { (1 << out.len()) - 1 };
    // SAFETY: masked lanes are not written.
    unsafe { _mm512_mask_storeu_epi16(out.as_mut_ptr().cast(), mask, round_two(first, second)) };
}

/// Rounds two vectors to bf16: `first` to the low half, `second` to the high half.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn round_two(first: __m512, second: __m512) -> __m512i {
    // SAFETY: both are 64 bytes of plain data.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first)) }
}

/// Transposes a 16 × 16 matrix.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    let zero = _mm512_setzero_si512();
    // `fours[4g + c]`, lane `L` of four: column `4L + c` of rows `4g..4g + 4`.
    let mut fours = [zero; 16];
    for g in (0..16).step_by(4) {
        let (low, high) = (_mm512_unpacklo_epi32(rows[g], rows[g + 1]), _mm512_unpackhi_epi32(rows[g], rows[g + 1]));
        let (next_low, next_high) =
            (_mm512_unpacklo_epi32(rows[g + 2], rows[g + 3]), _mm512_unpackhi_epi32(rows[g + 2], rows[g + 3]));
        fours[g] = _mm512_unpacklo_epi64(low, next_low);
        fours[g + 1] = _mm512_unpackhi_epi64(low, next_low);
        fours[g + 2] = _mm512_unpacklo_epi64(high, next_high);
        fours[g + 3] = _mm512_unpackhi_epi64(high, next_high);
    }
    let mut columns = [zero; 16];
    for c in 0..4 {
        let even = _mm512_shuffle_i32x4::<0x88>(fours[c], fours[c + 4]);
        let odd = _mm512_shuffle_i32x4::<0xdd>(fours[c], fours[c + 4]);
        let next_even = _mm512_shuffle_i32x4::<0x88>(fours[c + 8], fours[c + 12]);
        let next_odd = _mm512_shuffle_i32x4::<0xdd>(fours[c + 8], fours[c + 12]);
        columns[c] = _mm512_shuffle_i32x4::<0x88>(even, next_even);
        columns[c + 4] = _mm512_shuffle_i32x4::<0x88>(odd, next_odd);
        columns[c + 8] = _mm512_shuffle_i32x4::<0xdd>(even, next_even);
        columns[c + 12] = _mm512_shuffle_i32x4::<0xdd>(odd, next_odd);
    }
    columns
}

/// The largest number of each of 16 vectors.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn maxima(rows: [__m512; 16]) -> __m512 {
    // Four rows at a time, one in each number of a lane of four; then the lanes.
    let mut fours = [_mm512_setzero_ps(); 4];
    for (four, rows) in fours.iter_mut().zip(rows.as_chunks::<4>().0) {
        let two = |a, b| _mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let (low, high) = (_mm512_castps_pd(two(rows[0], rows[1])), _mm512_castps_pd(two(rows[2], rows[3])));
        let (even, odd) = (_mm512_unpacklo_pd(low, high), _mm512_unpackhi_pd(low, high));
        *four = _mm512_max_ps(_mm512_castpd_ps(even), _mm512_castpd_ps(odd));
    }
    let lanes = |a, b| _mm512_max_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
    lanes(lanes(fours[0], fours[1]), lanes(fours[2], fours[3]))
}

/// A head's rows as `[64, D padded]`, zero beyond the last.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn pack_rows(head: Head, out: &mut [bf16]) {
    let stride = padded_pairs(head.head_dim);
    for (row, out) in out.chunks_exact_mut(stride).enumerate() {
        let source = if row < head.rows() { head.row(row) } else { &[] };
        for at in (0..stride).step_by(32) {
            store_512(&mut out[at..], load_32(source, at));
        }
    }
}

/// [`pack_rows`] of the rows that there are.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn pack_some_rows(head: Head, out: &mut [bf16]) {
    pack_rows(head, &mut out[..head.rows() * padded_pairs(head.head_dim)]);
}

/// A head's rows as the right matrix of a product over its columns: `[D padded / 2, 64, 2]`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn pack_transposed(head: Head, out: &mut [bf16]) {
    for first in (0..BLOCK_KEYS).step_by(16) {
        for at in (0..padded_pairs(head.head_dim)).step_by(32) {
            let mut rows = [_mm512_setzero_si512(); 16];
            for (row, vector) in rows.iter_mut().enumerate().take(head.rows().saturating_sub(first)) {
                *vector = load_32(head.row(first + row), at);
            }
            for (pair, column) in transpose(rows).into_iter().enumerate() {
                store_512(&mut out[((at / 2 + pair) * BLOCK_KEYS + first) * 2..], column);
            }
        }
    }
}

/// A head's rows as the right matrix of a product over the rows: `[32, D padded, 2]`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn pack_pairs(head: Head, out: &mut [bf16]) {
    let stride = padded_pairs(head.head_dim);
    let row = |row: usize| if row < head.rows() { head.row(row) } else { &[] };
    for (pair, out) in out.chunks_exact_mut(2 * stride).enumerate() {
        let (even, odd) = (row(2 * pair), row(2 * pair + 1));
        for at in (0..stride).step_by(16) {
            let high = _mm512_slli_epi32::<16>(load_16(odd, at));
            store_512(&mut out[2 * at..], _mm512_or_si512(load_16(even, at), high));
        }
    }
}

/// [`pack_pairs`]'s `[32, D padded, 2]` as a left matrix `[D padded, 64]`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn transpose_pairs(pairs: &[bf16], out: &mut [bf16]) {
    let stride = pairs.len() / BLOCK_KEYS;
    for first in (0..BLOCK_KEYS / 2).step_by(16) {
        for at in (0..stride).step_by(16) {
            let mut rows = [_mm512_setzero_si512(); 16];
            for (row, vector) in rows.iter_mut().enumerate() {
                *vector = load_32(&pairs[((first + row) * stride + at) * 2..], 0);
            }
            for (d, column) in transpose(rows).into_iter().enumerate() {
                store_512(&mut out[(at + d) * BLOCK_KEYS + 2 * first..], column);
            }
        }
    }
}

/// The 16 columns of 16 rows of f32, of which row `r` starts at `r · stride`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn transpose_f32(source: &[f32], stride: usize) -> [__m512; 16] {
    let mut rows = [_mm512_setzero_si512(); 16];
    for (row, vector) in rows.iter_mut().enumerate() {
        *vector = _mm512_castps_si512(load(&source[row * stride..]));
    }
    let mut columns = [_mm512_setzero_ps(); 16];
    for (column, bits) in columns.iter_mut().zip(transpose(rows)) {
        *column = _mm512_castsi512_ps(bits);
    }
    columns
}

/// `Σ a b` of two rows of bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn dot(a: &[bf16], b: &[bf16]) -> f32 {
    let mut sum = _mm512_setzero_ps();
    for at in (0..a.len()).step_by(16) {
        let (a, b) = (_mm512_slli_epi32::<16>(load_16(a, at)), _mm512_slli_epi32::<16>(load_16(b, at)));
        sum = _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }
    _mm512_reduce_add_ps(sum)
}

/// `2^x`, relative error below 2e-7; at least 2^-125. NaN stays NaN.
///
/// S. Moshier, *Cephes Mathematical Library*, `exp2f`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn exp2(x: __m512) -> __m512 {
    // In this order the maximum of NaN is NaN; the bound keeps subnormal numbers, which are slow, away.
    let x = _mm512_max_ps(_mm512_set1_ps(-125.0), x);
    let n = _mm512_roundscale_ps::<0x08>(x);
    let r = _mm512_sub_ps(x, n);
    let mut y = _mm512_set1_ps(1.535_336_2e-4);
    for c in [1.339_887_4e-3, 9.618_437e-3, 5.550_332_5e-2, 2.402_264_8e-1, 6.931_472e-1, 1.0] {
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
    }
    _mm512_scalef_ps(y, n)
}

/// `2^x`, relative error below 4e-6, which a rounding to bf16 does not show; at least 2^-125. NaN stays NaN.
///
/// The polynomial has the least largest relative error of those of its degree that are 1 at 0.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn exp2_short(x: __m512) -> __m512 {
    let x = _mm512_max_ps(_mm512_set1_ps(-125.0), x);
    let n = _mm512_roundscale_ps::<0x08>(x);
    let r = _mm512_sub_ps(x, n);
    let mut y = _mm512_set1_ps(9.582_856e-3);
    for c in [5.590_643_7e-2, 2.402_409_9e-1, 6.931_242e-1, 1.0] {
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
    }
    _mm512_scalef_ps(y, n)
}
