//! Copies a block of B into the order in which the micro-kernel reads it.

use crate::simd::Isa;

/// Packs `kc × columns` of B into panels of `nr` columns, each panel `[kc][nr]`, the last one filled up with zeros.
pub(super) fn pack_b(b: &[f32], strides: (usize, usize), columns: usize, kc: usize, nr: usize, packed: &mut [f32]) {
    for column in (0..columns).step_by(nr) {
        let width = nr.min(columns - column);
        let panel = &mut packed[column * kc..column * kc + nr * kc];
        let source = &b[column * strides.1..];
        if width < nr {
            panel.fill(0.0);
        }
        if strides.1 == 1 {
            if width == nr {
                copy_lines(source, strides.0, nr, panel);
            } else {
                for (p, line) in panel.chunks_exact_mut(nr).enumerate() {
                    line[..width].copy_from_slice(&source[p * strides.0..][..width]);
                }
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

/// Copies runs of `width` elements that lie `stride` apart; the widths of whole panels without a call for each run.
fn copy_lines(source: &[f32], stride: usize, width: usize, panel: &mut [f32]) {
    fn fixed<const W: usize>(source: &[f32], stride: usize, panel: &mut [f32]) {
        for (p, line) in panel.as_chunks_mut::<W>().0.iter_mut().enumerate() {
            line.copy_from_slice(&source[p * stride..][..W]);
        }
    }
    match width {
        32 => fixed::<32>(source, stride, panel),
        _ => {
            for (p, line) in panel.chunks_exact_mut(width).enumerate() {
                line.copy_from_slice(&source[p * stride..][..width]);
            }
        }
    }
}

/// `panel[p * nr + j] = source[j * stride + p]` for `j < width` and `p < kc`: operands that are contiguous along `k`.
pub(crate) fn transpose(source: &[f32], stride: usize, width: usize, kc: usize, nr: usize, panel: &mut [f32]) {
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if Isa::active() >= Isa::Avx512 {
        done = kc / 16 * 16;
        for j in (0..width).step_by(16) {
            let lines = 16.min(width - j);
            for p in (0..done).step_by(16) {
                assert!((j + lines - 1) * stride + p + 16 <= source.len() && (p + 15) * nr + j + lines <= panel.len());
                let (from, to) = (source[j * stride + p..].as_ptr(), panel[p * nr + j..].as_mut_ptr());
                // SAFETY: AVX-512 is active, and both tiles lie inside their slices.
                unsafe { transpose_16(from, stride, lines, to, nr) };
            }
        }
    }
    for j in 0..width {
        let line = &source[j * stride..][..kc];
        for p in done..kc {
            panel[p * nr + j] = line[p];
        }
    }
}

/// Transposes a tile of `lines` ≤ 16 rows by 16: four rounds of shuffles instead of 256 scalar stores.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn transpose_16(source: *const f32, source_stride: usize, lines: usize, out: *mut f32, out_stride: usize) {
    use std::arch::x86_64::*;
    // SAFETY: the caller vouches for both tiles.
    unsafe {
        // Loops, not closures: only they are compiled for the instruction set of this function.
        let mut rows = [_mm512_setzero_ps(); 16];
        for i in 0..16 {
            if i < lines {
                rows[i] = _mm512_loadu_ps(source.add(i * source_stride));
            }
        }
        let mask = u16::MAX >> (16 - lines);
        for (i, row) in transpose_registers(rows).iter().enumerate() {
            _mm512_mask_storeu_ps(out.add(i * out_stride), mask, *row);
        }
    }
}

/// The transpose of 16 rows of 16 words.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transpose_registers(mut r: [std::arch::x86_64::__m512; 16]) -> [std::arch::x86_64::__m512; 16] {
    use std::arch::x86_64::*;
    for i in (0..16).step_by(2) {
        (r[i], r[i + 1]) = (_mm512_unpacklo_ps(r[i], r[i + 1]), _mm512_unpackhi_ps(r[i], r[i + 1]));
    }
    for i in (0..16).step_by(4) {
        let (a, b) = (_mm512_castps_pd(r[i]), _mm512_castps_pd(r[i + 1]));
        let (c, d) = (_mm512_castps_pd(r[i + 2]), _mm512_castps_pd(r[i + 3]));
        r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
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
    r
}
