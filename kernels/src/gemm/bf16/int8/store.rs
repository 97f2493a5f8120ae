//! Sums of products with integers, on their way out.

use crate::gemm::bf16::Bf16Path;
use crate::gemm::bf16::pack::LINES;
use crate::gemm::bf16::tile::{Stored, Sums};

/// What sums become: multiplied with the scale of their column, added to its bias.
#[derive(Clone, Copy)]
pub(in crate::gemm::bf16) struct Scaled<'a> {
    /// Of each column of the tile.
    pub(in crate::gemm::bf16) scales: &'a [f32],
    /// Likewise.
    pub(in crate::gemm::bf16) bias: Option<&'a [f32]>,
    /// What is added to the sums before: those of earlier terms.
    pub(in crate::gemm::bf16) before: Option<&'a Sums>,
}

/// Stores `rows` rows of a tile at `c`, `stride` apart, rounded once.
///
/// The product and the sum are rounded one after the other on every path.
///
/// # Safety
/// `c` must hold that many rows of as many elements as there are scales, at most 32.
pub(in crate::gemm::bf16) unsafe fn store<E: Stored>(
    path: Bf16Path,
    sums: &Sums,
    rows: usize,
    scaled: Scaled<'_>,
    c: *mut E,
    stride: usize,
) {
    let columns = scaled.scales.len();
    assert!(columns <= LINES && scaled.bias.is_none_or(|bias| bias.len() == columns));
    #[cfg(target_arch = "x86_64")]
    if path != Bf16Path::Widen {
        // SAFETY: these paths are chosen only where AVX-512-bf16 exists; the caller vouches for the rest.
        return unsafe { store_avx512(sums, rows, scaled, c, stride) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = path;
    for row in 0..rows {
        for (j, scale) in scaled.scales.iter().enumerate() {
            let sum = sums.0[row * LINES + j];
            let sum = scaled.before.map_or(sum, |before| before.0[row * LINES + j] + sum);
            let value = scaled.bias.map_or(scale * sum, |bias| scale * sum + bias[j]);
            // SAFETY: the caller vouches for the line.
            unsafe { c.add(row * stride + j).write(E::narrow(value)) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn store_avx512<E: Stored>(sums: &Sums, rows: usize, scaled: Scaled<'_>, c: *mut E, stride: usize) {
    use std::arch::x86_64::*;
    let lanes = u32::MAX >> (LINES - scaled.scales.len());
    let mask = [lanes as u16, (lanes >> 16) as u16];
    let load = |of: &[f32]| {
        // SAFETY: the masks name the elements of the slice.
        unsafe {
            let start = of.as_ptr();
            [_mm512_maskz_loadu_ps(mask[0], start), _mm512_maskz_loadu_ps(mask[1], start.wrapping_add(16))]
        }
    };
    let (scales, bias) = (load(scaled.scales), scaled.bias.map(load));
    for row in 0..rows {
        let mut line = load_line(sums, row);
        for half in 0..2 {
            if let Some(before) = scaled.before {
                line[half] = _mm512_add_ps(load_line(before, row)[half], line[half]);
            }
            line[half] = _mm512_mul_ps(scales[half], line[half]);
            if let Some(bias) = bias {
                line[half] = _mm512_add_ps(line[half], bias[half]);
            }
        }
        // SAFETY: the caller vouches for the masked elements.
        unsafe { E::store_line(c.add(row * stride), line, mask) };
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
fn load_line(sums: &Sums, row: usize) -> [std::arch::x86_64::__m512; 2] {
    use std::arch::x86_64::_mm512_loadu_ps;
    let line = sums.0[row * LINES..(row + 1) * LINES].as_ptr();
    // SAFETY: the line holds 32 sums.
    unsafe { [_mm512_loadu_ps(line), _mm512_loadu_ps(line.add(16))] }
}
