//! Copies bf16 operands into tiles of 16 lines by 32 terms, the order in which every path reads them.
//!
//! A *line* is a row of A or a column of B. A *panel* holds 32 lines: for each step of 32 terms two tiles of 16 lines
//! each. A tile of A is 16 rows of 32 terms; a tile of B is 16 pairs of terms by 16 columns, the two terms of a pair side
//! by side. Absent lines and terms are zeros.

use std::ops::Range;

use half::bf16;

use crate::simd::Isa;

/// Lines of a panel.
pub(super) const LINES: usize = 32;
/// Terms of a step.
pub(super) const STEP: usize = 32;

/// One tile: 16 × 32 numbers, aligned so that a row of it is a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Tile(pub(super) [bf16; 512]);

impl Tile {
    pub(super) const ZERO: Self = Tile([bf16::ZERO; 512]);
}

/// Tiles of a panel of `k` terms.
pub(super) fn panel_tiles(k: usize) -> usize {
    2 * k.div_ceil(STEP)
}

/// An operand where it lies.
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a> {
    values: &'a [bf16],
    stride: usize,
    along_k: bool,
}

impl<'a> Operand<'a> {
    /// The terms of a line are contiguous; lines are `stride` apart.
    pub(crate) fn along_k(values: &'a [bf16], stride: usize) -> Self {
        Self { values, stride, along_k: true }
    }

    /// The lines of a term are contiguous; terms are `stride` apart.
    pub(crate) fn across_k(values: &'a [bf16], stride: usize) -> Self {
        Self { values, stride, along_k: false }
    }

    /// Panics if the slice does not hold this many lines and terms (neither zero): a bug of the caller.
    pub(super) fn check(&self, lines: usize, k: usize) {
        let (outer, inner) = if self.along_k { (lines, k) } else { (k, lines) };
        assert!(
            self.stride >= inner && self.values.len() >= (outer - 1) * self.stride + inner,
            "bf16 product: too short"
        );
    }

    /// Whether tiles can load rows from `line` on where they lie: no row of a tile straddles cache lines or ends early.
    pub(super) fn lies_in_tiles(&self, line: usize, ks: &Range<usize>) -> bool {
        let aligned = self.line(line, ks.start).as_ptr().addr().is_multiple_of(64);
        self.along_k && self.stride.is_multiple_of(STEP) && ks.len().is_multiple_of(STEP) && aligned
    }

    /// Distance of lines, or of terms.
    pub(super) fn stride(&self) -> usize {
        self.stride
    }

    /// From element (`line`, `k`) on.
    pub(super) fn line(&self, line: usize, k: usize) -> &'a [bf16] {
        let at = if self.along_k { line * self.stride + k } else { k * self.stride + line };
        &self.values[at..]
    }
}

/// Which operand a panel belongs to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// A: terms of a row side by side.
    Left,
    /// B: pairs of terms of all columns side by side.
    Right,
}

/// Packs lines over `ks` into panels, one after the other.
pub(super) fn pack_lines(side: Side, from: &Operand, lines: Range<usize>, ks: Range<usize>, panels: &mut [Tile]) {
    let panel_len = panel_tiles(ks.len());
    if from.along_k {
        for (line, panel) in lines.clone().step_by(LINES).zip(panels.chunks_mut(panel_len)) {
            pack_panel(side, from, line..lines.end.min(line + LINES), ks.clone(), panel);
        }
    } else {
        // Terms are far apart: all that is wanted of some before the next.
        for step in 0..panel_len / 2 {
            for (line, panel) in lines.clone().step_by(LINES).zip(panels.chunks_mut(panel_len)) {
                pack_step(side, from, line..lines.end.min(line + LINES), &ks, step, panel);
            }
        }
    }
}

/// Packs at most 32 lines over `ks` into a panel of [`panel_tiles`] tiles.
pub(super) fn pack_panel(side: Side, from: &Operand, lines: Range<usize>, ks: Range<usize>, panel: &mut [Tile]) {
    debug_assert!(lines.len() <= LINES && panel.len() == panel_tiles(ks.len()));
    for step in 0..panel.len() / 2 {
        pack_step(side, from, lines.clone(), &ks, step, panel);
    }
}

/// Packs one step of a panel.
fn pack_step(side: Side, from: &Operand, lines: Range<usize>, ks: &Range<usize>, step: usize, panel: &mut [Tile]) {
    let Some(tiles) = panel[2 * step..].first_chunk_mut::<2>() else { unreachable!("a panel of fewer steps") };
    let k = ks.start + step * STEP;
    let terms = STEP.min(ks.end - k);
    let source = from.line(lines.start, k);
    let (outer, inner) = if from.along_k { (lines.len(), terms) } else { (terms, lines.len()) };
    // The vector code reads exactly these elements: its loads are masked.
    assert!(source.len() >= (outer - 1) * from.stride + inner);
    #[cfg(target_arch = "x86_64")]
    if Isa::active() >= Isa::Avx512 {
        // SAFETY: AVX-512 F and BW are active, and the elements exist.
        unsafe { vector::pack(side, source, from.along_k, from.stride, lines.len(), terms, tiles) };
        return;
    }
    pack_scalar(side, source, from, lines.len(), terms, tiles);
}

fn pack_scalar(side: Side, source: &[bf16], from: &Operand, lines: usize, terms: usize, tiles: &mut [Tile; 2]) {
    *tiles = [Tile::ZERO; 2];
    let (line_stride, term_stride) = if from.along_k { (from.stride, 1) } else { (1, from.stride) };
    for line in 0..lines {
        for term in 0..terms {
            let place = match side {
                Side::Left => line % 16 * 32 + term,
                Side::Right => term / 2 * 32 + line % 16 * 2 + term % 2,
            };
            tiles[line / 16].0[place] = source[line * line_stride + term * term_stride];
        }
    }
}

/// Copies a column of B out of its panel.
pub(super) fn unpack_column(panel: &[Tile], column: usize, line: &mut [bf16]) {
    for (terms, tiles) in line.chunks_mut(STEP).zip(panel.as_chunks::<2>().0) {
        for (term, value) in terms.iter_mut().enumerate() {
            *value = tiles[column / 16].0[term / 2 * 32 + column % 16 * 2 + term % 2];
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod vector {
    use std::arch::x86_64::*;

    use super::{Side, Tile, bf16};
    use crate::gemm::pack::transpose_registers;

    /// # Safety
    /// The elements that the counts name must exist.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) unsafe fn pack(
        side: Side,
        source: &[bf16],
        along_k: bool,
        stride: usize,
        lines: usize,
        terms: usize,
        tiles: &mut [Tile; 2],
    ) {
        if along_k {
            for (half, tile) in tiles.iter_mut().enumerate() {
                let count = lines.saturating_sub(16 * half).min(16);
                // SAFETY: the caller vouches for these lines and terms.
                let rows = unsafe { along(source.as_ptr().wrapping_add(16 * half * stride), stride, count, terms) };
                store(if side == Side::Left { rows } else { transposed(rows) }, tile);
            }
        } else {
            // SAFETY: as above.
            let halves = unsafe { across(source.as_ptr(), stride, lines, terms) };
            for (pairs, tile) in halves.into_iter().zip(tiles) {
                store(if side == Side::Right { pairs } else { transposed(pairs) }, tile);
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    fn store(rows: [__m512i; 16], tile: &mut Tile) {
        for (row, line) in rows.iter().zip(tile.0.as_chunks_mut::<32>().0) {
            // SAFETY: the chunk holds 64 bytes.
            unsafe { _mm512_storeu_si512(line.as_mut_ptr().cast(), *row) };
        }
    }

    #[target_feature(enable = "avx512f")]
    fn transposed(rows: [__m512i; 16]) -> [__m512i; 16] {
        let mut words = [_mm512_setzero_ps(); 16];
        for i in 0..16 {
            words[i] = _mm512_castsi512_ps(rows[i]);
        }
        let words = transpose_registers(words);
        let mut rows = rows;
        for i in 0..16 {
            rows[i] = _mm512_castps_si512(words[i]);
        }
        rows
    }

    /// The lowest `count` of 32 lanes.
    fn lanes(count: usize) -> u32 {
        u32::MAX.checked_shr(32 - count as u32).unwrap_or(0)
    }

    /// A register for each of `lines` ≤ 16 contiguous runs of terms.
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn along(source: *const bf16, stride: usize, lines: usize, terms: usize) -> [__m512i; 16] {
        let mask = lanes(terms);
        let mut rows = [_mm512_setzero_si512(); 16];
        for (line, row) in rows.iter_mut().enumerate() {
            if line < lines {
                // SAFETY: the caller vouches for the terms of this line.
                *row = unsafe { _mm512_maskz_loadu_epi16(mask, source.add(line * stride).cast()) };
            }
        }
        rows
    }

    /// Terms between what is packed and what is fetched meanwhile.
    const AHEAD: usize = 64;

    /// A register for each pair of terms: the pairs of lines 0–15, and those of lines 16–31.
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn across(source: *const bf16, stride: usize, lines: usize, terms: usize) -> [[__m512i; 16]; 2] {
        // Word 2i of the result is word i of the even term, word 2i + 1 that of the odd one (index + 32).
        let low: [i16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 32) as i16);
        let high: [i16; 32] = std::array::from_fn(|i| (16 + i / 2 + i % 2 * 32) as i16);
        let mask = lanes(lines);
        let mut halves = [[_mm512_setzero_si512(); 16]; 2];
        // SAFETY: the indices are 64 bytes each; the caller vouches for the lines of these terms.
        unsafe {
            let (low, high) = (_mm512_loadu_si512(low.as_ptr().cast()), _mm512_loadu_si512(high.as_ptr().cast()));
            let zero = _mm512_setzero_si512();
            for pair in 0..16 {
                // Terms lie far apart, and no hardware follows so many streams.
                for term in [2 * pair, 2 * pair + 1] {
                    _mm_prefetch::<_MM_HINT_T0>(source.wrapping_add((term + AHEAD) * stride).cast());
                }
                let even = if 2 * pair < terms {
                    _mm512_maskz_loadu_epi16(mask, source.add(2 * pair * stride).cast())
                } else {
                    zero
                };
                let odd = if 2 * pair + 1 < terms {
                    _mm512_maskz_loadu_epi16(mask, source.add((2 * pair + 1) * stride).cast())
                } else {
                    zero
                };
                halves[0][pair] = _mm512_permutex2var_epi16(even, low, odd);
                halves[1][pair] = _mm512_permutex2var_epi16(even, high, odd);
            }
        }
        halves
    }
}
