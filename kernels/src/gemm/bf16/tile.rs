//! The sums of one 32 × 32 tile of C: how each path computes them without tile registers, and how they are stored.

use half::bf16;

use super::Bf16Path;
use super::pack::{LINES, Tile};
use crate::element::Element;
use crate::simd::{Isa, fma, simd_fn};

/// 32 × 32 sums in f32.
#[repr(C, align(64))]
pub(super) struct Sums(pub(super) [f32; LINES * LINES]);

impl Sums {
    pub(super) const ZERO: Self = Sums([0.0; LINES * LINES]);
}

simd_fn! { fn widen_4(rows: usize, a: &[Tile], b: &[Tile], sums: &mut Sums) = widen_4_body; }
simd_fn! { fn widen_8(rows: usize, a: &[Tile], b: &[Tile], sums: &mut Sums) = widen_8_body; }

/// `sums = A·B` by f32 fused multiply-adds.
pub(super) fn widen(rows: usize, a: &[Tile], b: &[Tile], sums: &mut Sums) {
    // As many rows at a time as the registers hold beside B.
    if Isa::active() >= Isa::Avx512 { widen_8(rows, a, b, sums) } else { widen_4(rows, a, b, sums) }
}

#[inline(always)]
fn widen_4_body<const FMA: bool>(rows: usize, a: &[Tile], b: &[Tile], sums: &mut Sums) {
    widen_body::<FMA, 4>(rows, a, b, sums);
}

#[inline(always)]
fn widen_8_body<const FMA: bool>(rows: usize, a: &[Tile], b: &[Tile], sums: &mut Sums) {
    widen_body::<FMA, 8>(rows, a, b, sums);
}

/// `R` rows by 16 columns at a time; absent rows are zeros in the panel and cost only time.
#[inline(always)]
fn widen_body<const FMA: bool, const R: usize>(rows: usize, a: &[Tile], b: &[Tile], sums: &mut Sums) {
    for row in (0..rows).step_by(R) {
        for half in 0..2 {
            let mut acc = [[0f32; 16]; R];
            for (a, b) in a.as_chunks::<2>().0.iter().zip(b.as_chunks::<2>().0) {
                let a = &a[row / 16].0[row % 16 * 32..(row % 16 + R) * 32];
                for (pair, b) in b[half].0.as_chunks::<32>().0.iter().enumerate() {
                    let (mut even, mut odd) = ([0f32; 16], [0f32; 16]);
                    for j in 0..16 {
                        (even[j], odd[j]) = (b[2 * j].wide(), b[2 * j + 1].wide());
                    }
                    for (i, acc) in acc.iter_mut().enumerate() {
                        let (a0, a1) = (a[i * 32 + 2 * pair].wide(), a[i * 32 + 2 * pair + 1].wide());
                        for j in 0..16 {
                            acc[j] = fma::<FMA>(a1, odd[j], fma::<FMA>(a0, even[j], acc[j]));
                        }
                    }
                }
            }
            for (i, acc) in acc.iter().enumerate() {
                sums.0[(row + i) * LINES + half * 16..][..16].copy_from_slice(acc);
            }
        }
    }
}

/// `sums = A·B` by the bf16 dot product of AVX-512.
///
/// # Safety
/// The processor must have AVX-512-bf16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn dot(rows: usize, a: &[Tile], b: &[Tile], sums: &mut Sums) {
    use std::arch::x86_64::*;
    /// Rows at a time.
    const R: usize = 8;
    for row in (0..rows).step_by(R) {
        let mut acc = [[_mm512_setzero_ps(); 2]; R];
        for (a, b) in a.as_chunks::<2>().0.iter().zip(b.as_chunks::<2>().0) {
            let a = a[row / 16].0[row % 16 * 32..(row % 16 + R) * 32].as_ptr().cast::<i32>();
            let b = b.each_ref().map(|tile| tile.0.as_ptr().cast::<i32>());
            for pair in 0..16 {
                // SAFETY: a tile holds 16 × 16 pairs, and `row + R` is at most the 16 rows of its own.
                unsafe {
                    let b = b
                        .map(|b| std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.add(16 * pair).cast())));
                    for (i, acc) in acc.iter_mut().enumerate() {
                        let word = _mm512_set1_epi32(a.add(16 * i + pair).read_unaligned());
                        let a = std::mem::transmute::<__m512i, __m512bh>(word);
                        acc[0] = _mm512_dpbf16_ps(acc[0], a, b[0]);
                        acc[1] = _mm512_dpbf16_ps(acc[1], a, b[1]);
                    }
                }
            }
        }
        for (i, acc) in acc.iter().enumerate() {
            let line = &mut sums.0[(row + i) * LINES..(row + i + 1) * LINES];
            // SAFETY: the line holds 32 sums.
            unsafe {
                _mm512_storeu_ps(line.as_mut_ptr(), acc[0]);
                _mm512_storeu_ps(line.as_mut_ptr().add(16), acc[1]);
            }
        }
    }
}

/// What the sums of a block are added to: rows of f32, `stride` apart (0: one row for all).
#[derive(Clone, Copy)]
pub(super) struct Base {
    pub(super) start: *const f32,
    pub(super) stride: usize,
}

/// An element type that products are stored in.
pub(crate) trait Stored: Element {
    /// Whether a product can be added to what is there without a rounding between: f32 only.
    const EXACT: bool;

    /// [`store`] with AVX-512-bf16.
    ///
    /// # Safety
    /// As [`store`], and the processor must have AVX-512-bf16.
    #[cfg(target_arch = "x86_64")]
    #[doc(hidden)]
    unsafe fn store_line(c: *mut Self, line: [std::arch::x86_64::__m512; 2], mask: [u16; 2]);
}

impl Stored for f32 {
    const EXACT: bool = true;

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn store_line(c: *mut Self, line: [std::arch::x86_64::__m512; 2], mask: [u16; 2]) {
        use std::arch::x86_64::*;
        // SAFETY: the caller vouches for the elements of the mask.
        unsafe {
            _mm512_mask_storeu_ps(c, mask[0], line[0]);
            _mm512_mask_storeu_ps(c.wrapping_add(16), mask[1], line[1]);
        }
    }
}

impl Stored for bf16 {
    const EXACT: bool = false;

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn store_line(c: *mut Self, line: [std::arch::x86_64::__m512; 2], mask: [u16; 2]) {
        use std::arch::x86_64::*;
        // SAFETY: the caller vouches for the elements of the mask.
        unsafe {
            let rounded = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(line[1], line[0]));
            _mm512_mask_storeu_epi16(c.cast(), u32::from(mask[0]) | u32::from(mask[1]) << 16, rounded);
        }
    }
}

simd_fn! { fn narrow_row_any(from: &[f32], to: &mut [bf16]) = narrow_row_body; }

#[inline(always)]
fn narrow_row_body<const FMA: bool>(from: &[f32], to: &mut [bf16]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = bf16::narrow(*from);
    }
}

/// Rounds numbers that a product will read; where its path takes subnormal numbers as zero, they may become so here.
pub(crate) fn narrow_row(from: &[f32], to: &mut [bf16]) {
    assert!(from.len() == to.len());
    #[cfg(target_arch = "x86_64")]
    if Bf16Path::active() != Bf16Path::Widen {
        #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
        fn lines(from: &[f32], to: &mut [bf16]) {
            use std::arch::x86_64::_mm512_maskz_loadu_ps;
            for (from, to) in from.chunks(LINES).zip(to.chunks_mut(LINES)) {
                let lanes = u32::MAX >> (LINES - from.len());
                let mask = [lanes as u16, (lanes >> 16) as u16];
                // SAFETY: the masks name the elements of both chunks.
                unsafe {
                    let low = _mm512_maskz_loadu_ps(mask[0], from.as_ptr());
                    let high = _mm512_maskz_loadu_ps(mask[1], from.as_ptr().wrapping_add(16));
                    bf16::store_line(to.as_mut_ptr(), [low, high], mask);
                }
            }
        }
        // SAFETY: these paths are chosen only where AVX-512-bf16 exists.
        return unsafe { lines(from, to) };
    }
    narrow_row_any(from, to);
}

/// Stores the valid part of a tile, added to `base` if there is one, rounded once.
///
/// # Safety
/// `c` must hold `rows` rows of `columns` elements, `stride` apart; `base` likewise.
pub(super) unsafe fn store<E: Stored>(
    path: Bf16Path,
    sums: &Sums,
    (rows, columns): (usize, usize),
    base: Option<Base>,
    c: *mut E,
    stride: usize,
) {
    #[cfg(target_arch = "x86_64")]
    if path != Bf16Path::Widen {
        // SAFETY: these paths are chosen only where AVX-512-bf16 exists; the caller vouches for the rest.
        return unsafe { store_avx512(sums, rows, columns, base, c, stride) };
    }
    for row in 0..rows {
        for (j, sum) in sums.0[row * LINES..][..columns].iter().enumerate() {
            // SAFETY: the caller vouches for both lines; they may be one, so no reference to them is made.
            unsafe {
                let value = base.map_or(*sum, |base| base.start.add(row * base.stride + j).read() + sum);
                c.add(row * stride + j).write(E::narrow(value));
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn store_avx512<E: Stored>(
    sums: &Sums,
    rows: usize,
    columns: usize,
    base: Option<Base>,
    c: *mut E,
    stride: usize,
) {
    use std::arch::x86_64::*;
    let lanes = u32::MAX >> (32 - columns);
    let mask = [lanes as u16, (lanes >> 16) as u16];
    for row in 0..rows {
        let sums = sums.0[row * LINES..(row + 1) * LINES].as_ptr();
        // SAFETY: a line of sums holds 32; the caller vouches for the masked elements of the others.
        unsafe {
            let mut line = [_mm512_loadu_ps(sums), _mm512_loadu_ps(sums.add(16))];
            if let Some(base) = base {
                let base = base.start.add(row * base.stride);
                line[0] = _mm512_add_ps(_mm512_maskz_loadu_ps(mask[0], base), line[0]);
                line[1] = _mm512_add_ps(_mm512_maskz_loadu_ps(mask[1], base.wrapping_add(16)), line[1]);
            }
            E::store_line(c.add(row * stride), line, mask);
        }
    }
}

simd_fn! {
    /// `totals += sums`.
    pub(super) fn add(totals: &mut Sums, sums: &Sums) = add_body;
}

#[inline(always)]
fn add_body<const FMA: bool>(totals: &mut Sums, sums: &Sums) {
    for (total, sum) in totals.0.iter_mut().zip(&sums.0) {
        *total += sum;
    }
}
