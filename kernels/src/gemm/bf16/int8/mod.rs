//! Weights of 8 bits: one scale for each row of a matrix, and integers that are widened to bf16 as they are multiplied.
//!
//! For a weight `W [n, k]`: `s_j = max_k |W_jk| / 127`, rounded up to 17 bits of significand, and `q_jk = W_jk / s_j` rounded
//! to the nearest integer, ties to even (symmetric, one scale for each output: "absmax" of Dettmers et al., *LLM.int8()*,
//! 2022, section 2, by rows). Every `s_j q_jk` is then an f32 number, and what has been through 8 bits once comes through
//! them unchanged. A bf16 number has 8 bits of significand, so the integers up to 127 are bf16 numbers, and
//!
//! ```text
//! y_tj = s_j · Σ_k x_tk q_jk + b_j
//! ```
//!
//! is the bf16 product with `q`, each sum multiplied by its scale and added to its bias in f32 before the one rounding at the
//! store. What holds for the order of the sums of bf16 products holds for these. A weight is off by at most `s_j / 2`, so in
//! exact arithmetic `|Δy_tj| ≤ s_j / 2 · Σ_k |x_tk|`.

#[cfg(target_arch = "x86_64")]
mod few;
mod store;
mod widen;

use std::ops::Range;

use rayon::prelude::*;

use super::pack::{LINES, STEP, Tile, panel_tiles};

pub(super) use store::{Scaled, store};
use widen::widen;

/// The largest integer: −128 has no opposite.
const LARGEST: f32 = 127.0;

/// A tile of a right operand: as [`Tile`], but of each pair of terms first the one of all 16 columns, then the other.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Int8Tile([i8; 512]);

/// The right operand `[k, n]` of a product as integers, packed for every path, and what its columns are multiplied with.
pub(crate) struct Int8Operand {
    /// The panels of 32 columns one after the other.
    tiles: Vec<Int8Tile>,
    /// Of each column; zeros up to a whole panel.
    scales: Vec<f32>,
    columns: usize,
    terms: usize,
}

/// The scale of a row whose largest magnitude is `maximum`. Where that would be a subnormal number, which a quotient of 8 bits
/// cannot be formed with, the row counts as zeros.
fn scale_of(maximum: f32) -> f32 {
    /// What the 7 bits of the largest integer leave of the 24 of an f32.
    const LOST_BITS: u32 = (1 << 7) - 1;
    let scale = maximum / LARGEST;
    if scale < f32::MIN_POSITIVE { 0.0 } else { f32::from_bits((scale.to_bits() + LOST_BITS) & !LOST_BITS) }
}

/// The nearest integer to `weight / scale`, ties to even.
#[inline(always)]
fn quantised(weight: f32, scale: f32) -> i8 {
    /// 1.5 · 2²³: a sum with it has no bits behind the point, and the integer in its lowest bits.
    const ROUNDING: f32 = 12_582_912.0;
    ((weight / scale).clamp(-LARGEST, LARGEST) + ROUNDING).to_bits() as i8
}

impl Int8Operand {
    /// Packs the transpose of a finite weight `[n, k]` whose rows hold no larger magnitudes than `maxima`.
    pub(crate) fn new(weight: &[f32], maxima: &[f32], n: usize, k: usize) -> Self {
        assert!(weight.len() == n * k && maxima.len() == n, "int8 operand: length");
        let panel_len = panel_tiles(k);
        let mut tiles = vec![Int8Tile([0; 512]); n.div_ceil(LINES) * panel_len];
        let mut scales: Vec<f32> = maxima.iter().map(|maximum| scale_of(*maximum)).collect();
        scales.resize(n.next_multiple_of(LINES), 0.0);
        if panel_len > 0 {
            tiles.par_chunks_mut(panel_len).zip(scales.par_chunks(LINES)).enumerate().for_each(|(panel, work)| {
                let first = panel * LINES;
                pack(&weight[first * k..n.min(first + LINES) * k], k, work.1, work.0);
            });
        }
        Self { tiles, scales, columns: n, terms: k }
    }

    /// Outputs and inputs.
    pub(super) fn dims(&self) -> [usize; 2] {
        [self.columns, self.terms]
    }

    /// What sums of column are multiplied with.
    pub(crate) fn scales(&self) -> &[f32] {
        &self.scales[..self.columns]
    }

    pub(crate) fn size_bytes(&self) -> usize {
        std::mem::size_of_val(self.tiles.as_slice()) + std::mem::size_of_val(self.scales.as_slice())
    }

    /// The panel that starts at `column`, a multiple of 32.
    pub(super) fn panel(&self, column: usize) -> &[Int8Tile] {
        let tiles = panel_tiles(self.terms);
        &self.tiles[column / LINES * tiles..][..tiles]
    }

    /// The same as bf16.
    pub(super) fn widen_panel(&self, column: usize, into: &mut [Tile]) {
        widen(self.panel(column), into);
    }

    /// The panels of some columns as bf16, by all threads.
    pub(super) fn widen_panels(&self, columns: &Range<usize>, into: &mut [Tile]) {
        let tiles = panel_tiles(self.terms);
        into.par_chunks_mut(tiles).zip((columns.start..columns.end).into_par_iter().step_by(LINES)).for_each(
            |(into, column)| {
                self.widen_panel(column, into);
            },
        );
    }

    /// `s_j q_jk`, `[n, k]`.
    pub(crate) fn dequantised(&self) -> Vec<f32> {
        let (n, k) = (self.columns, self.terms);
        let panel_len = panel_tiles(k);
        let mut weight = vec![0f32; n * k];
        for (row, (line, scale)) in weight.chunks_exact_mut(k.max(1)).zip(&self.scales).enumerate() {
            let panel = &self.tiles[row / LINES * panel_len..][..panel_len];
            for (term, value) in line.iter_mut().enumerate() {
                *value = scale * f32::from(panel[term / STEP * 2 + row % LINES / 16].0[place(row, term)]);
            }
        }
        weight
    }
}

/// Where a tile has a term of a column.
#[inline(always)]
fn place(column: usize, term: usize) -> usize {
    let (term, column) = (term % STEP, column % 16);
    term / 2 * 32 + term % 2 * 16 + column
}

/// Packs at most 32 rows of `k` terms.
fn pack(rows: &[f32], k: usize, scales: &[f32], panel: &mut [Int8Tile]) {
    for (line, (row, &scale)) in rows.chunks_exact(k).zip(scales).enumerate() {
        if scale == 0.0 {
            continue;
        }
        for (terms, tiles) in row.chunks(STEP).zip(panel.as_chunks_mut::<2>().0) {
            let mut integers = [0i8; STEP];
            for (integer, weight) in integers.iter_mut().zip(terms) {
                *integer = quantised(*weight, scale);
            }
            for (term, integer) in integers.into_iter().enumerate() {
                tiles[line / 16].0[place(line, term)] = integer;
            }
        }
    }
}

/// The largest magnitude in each row of `width` numbers: NaN if one is NaN, else infinite if one is infinite.
pub(crate) fn row_maxima(weight: &[f32], width: usize) -> Vec<f32> {
    // Magnitudes are ordered as their bits are, NaN above infinity.
    let largest = |row: &[f32]| row.iter().fold(0u32, |most, value| most.max(value.to_bits() & (u32::MAX >> 1)));
    weight.par_chunks_exact(width.max(1)).map(|row| f32::from_bits(largest(row))).collect()
}
