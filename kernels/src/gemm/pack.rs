//! Copies a block of A or B into the order in which the micro-kernel reads it.

use crate::simd::Isa;

/// Packs `rows × kc` of A into panels of `mr` rows, each panel `[kc][rows of the panel]` (the last may be narrower).
pub(super) fn pack_a(a: &[f32], strides: (usize, usize), rows: usize, kc: usize, mr: usize, packed: &mut Vec<f32>) {
    packed.resize(rows * kc, 0.0);
    for row in (0..rows).step_by(mr) {
        let height = mr.min(rows - row);
        let panel = &mut packed[row * kc..row * kc + height * kc];
        let source = &a[row * strides.0..];
        if strides.0 == 1 {
            for (p, line) in panel.chunks_exact_mut(height).enumerate() {
                line.copy_from_slice(&source[p * strides.1..p * strides.1 + height]);
            }
        } else {
            for i in 0..height {
                for p in 0..kc {
                    panel[p * height + i] = source[i * strides.0 + p * strides.1];
                }
            }
        }
    }
}

/// Packs `kc × columns` of B into panels of `nr` columns, each panel `[kc][nr]`, the last one filled up with zeros.
pub(super) fn pack_b(b: &[f32], strides: (usize, usize), columns: usize, kc: usize, nr: usize, packed: &mut Vec<f32>) {
    packed.resize(columns.next_multiple_of(nr) * kc, 0.0);
    for column in (0..columns).step_by(nr) {
        let width = nr.min(columns - column);
        let panel = &mut packed[column * kc..column * kc + nr * kc];
        let source = &b[column * strides.1..];
        if width < nr {
            panel.fill(0.0);
        }
        if strides.1 == 1 {
            for (p, line) in panel.chunks_exact_mut(nr).enumerate() {
                line[..width].copy_from_slice(&source[p * strides.0..p * strides.0 + width]);
            }
        } else if strides.0 == 1 {
            transpose(source, strides.1, width, kc, nr, panel);
        } else {
            for p in 0..kc {
                for j in 0..width {
                    panel[p * nr + j] = source[p * strides.0 + j * strides.1];
                }
            }
        }
    }
}

/// `panel[p * nr + j] = source[j * stride + p]`: the weight of a linear layer, which is contiguous along `k`.
fn transpose(source: &[f32], stride: usize, width: usize, kc: usize, nr: usize, panel: &mut [f32]) {
    let mut done = (0, 0);
    #[cfg(target_arch = "x86_64")]
    if Isa::active() == Isa::Avx512 {
        done = (width / 16 * 16, kc / 16 * 16);
        for j in (0..done.0).step_by(16) {
            for p in (0..done.1).step_by(16) {
                assert!((j + 15) * stride + p + 16 <= source.len() && (p + 15) * nr + j + 16 <= panel.len());
                // SAFETY: AVX-512 is active, and both 16 × 16 tiles lie inside their slices.
                unsafe {
                    transpose_16(source.as_ptr().add(j * stride + p), stride, panel.as_mut_ptr().add(p * nr + j), nr)
                };
            }
        }
    }
    for j in 0..width {
        let first = if j < done.0 { done.1 } else { 0 };
        let line = &source[j * stride..j * stride + kc];
        for p in first..kc {
            panel[p * nr + j] = line[p];
        }
    }
}

/// Transposes a 16 × 16 tile: four rounds of shuffles instead of 256 scalar stores.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn transpose_16(source: *const f32, source_stride: usize, out: *mut f32, out_stride: usize) {
    use std::arch::x86_64::*;
    // SAFETY: the caller vouches for both tiles.
    unsafe {
        let mut r: [__m512; 16] = std::array::from_fn(|i| _mm512_loadu_ps(source.add(i * source_stride)));
        for i in (0..16).step_by(2) {
            (r[i], r[i + 1]) = (_mm512_unpacklo_ps(r[i], r[i + 1]), _mm512_unpackhi_ps(r[i], r[i + 1]));
        }
        for i in (0..16).step_by(4) {
            let d = |x: __m512| _mm512_castps_pd(x);
            let s = |x: __m512d| _mm512_castpd_ps(x);
            let (a, b, c, e) = (d(r[i]), d(r[i + 1]), d(r[i + 2]), d(r[i + 3]));
            r[i] = s(_mm512_unpacklo_pd(a, c));
            r[i + 1] = s(_mm512_unpackhi_pd(a, c));
            r[i + 2] = s(_mm512_unpacklo_pd(b, e));
            r[i + 3] = s(_mm512_unpackhi_pd(b, e));
        }
        for half in [0, 8] {
            for i in half..half + 4 {
                let (low, high) = (r[i], r[i + 4]);
                r[i] = _mm512_shuffle_f32x4::<0x88>(low, high);
                r[i + 4] = _mm512_shuffle_f32x4::<0xdd>(low, high);
            }
        }
        for i in 0..8 {
            let (low, high) = (r[i], r[i + 8]);
            r[i] = _mm512_shuffle_f32x4::<0x88>(low, high);
            r[i + 8] = _mm512_shuffle_f32x4::<0xdd>(low, high);
        }
        for (i, row) in r.iter().enumerate() {
            _mm512_storeu_ps(out.add(i * out_stride), *row);
        }
    }
}
