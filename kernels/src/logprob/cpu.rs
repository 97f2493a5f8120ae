//! The head over tiles of logits: each tile is a matrix product, a pass over its rows and, backward, two more products.

use std::ops::Range;

use rayon::prelude::*;

use super::products::HeadElement;
use super::row::{BLOCK, HeadPartial};
use crate::math::exp_small;
use crate::simd::{fma, simd_fn};

/// Rows of a tile.
const TILE_ROWS: usize = 1024;
/// Vocabulary entries of a tile; whole blocks of the row sums.
const TILE_COLUMNS: usize = 4 * BLOCK;
/// Entries of the bias gradient that one task sums.
const BIAS_COLUMNS: usize = 256;

/// The weights of a head, or of the `V` entries of it that make a shard.
pub(super) struct Head<'a, E> {
    /// `[V, width]`.
    pub(super) w: &'a [E],
    /// `[V]`.
    pub(super) bias: Option<&'a [f32]>,
    /// The entry that the first row of `w` stands for.
    pub(super) first_entry: usize,
    pub(super) inv_temperature: f32,
    pub(super) width: usize,
}

/// What backward needs of each row; all of one length.
pub(super) struct RowGrads<'a> {
    pub(super) labels: &'a [u32],
    pub(super) lse: &'a [f32],
    pub(super) entropy: &'a [f32],
    pub(super) dlogp: &'a [f32],
    pub(super) dentropy: Option<&'a [f32]>,
}

impl<E: HeadElement> Head<'_, E> {
    fn vocabulary(&self) -> usize {
        self.w.len() / self.width
    }

    /// The vocabulary in tiles of so many entries.
    pub(super) fn tiles(&self, width: usize) -> impl Iterator<Item = Range<usize>> + use<E> {
        let vocabulary = self.vocabulary();
        (0..vocabulary).step_by(width).map(move |start| start..(start + width).min(vocabulary))
    }

    /// Weights of some entries, `[columns, width]`.
    pub(super) fn weights(&self, columns: &Range<usize>) -> &[E] {
        &self.w[columns.start * self.width..columns.end * self.width]
    }

    /// Adds the logits of the entries `columns` to what was seen of a row.
    pub(super) fn see(&self, seen: &mut HeadPartial, logits: &[f32], label: u32, columns: &Range<usize>) {
        *seen = seen.extend(logits);
        if let Some(column) = self.column_of(label, columns) {
            seen.label_logit = logits[column];
        }
    }

    /// `label`'s place in a tile that holds `columns`, if it is there.
    pub(super) fn column_of(&self, label: u32, columns: &Range<usize>) -> Option<usize> {
        (label as usize).checked_sub(self.first_entry + columns.start).filter(|&column| column < columns.len())
    }

    /// The logits of all rows of `h` for some entries, `[rows, columns]`: the bits of [`crate::gemm::linear_f32`].
    pub(super) fn tile(&self, h: &[E], columns: Range<usize>, out: &mut [f32]) {
        let width = columns.len();
        if width == 0 {
            return;
        }
        let bias = self.bias.map(|bias| &bias[columns.clone()]);
        E::logits(h, self.weights(&columns), bias, self.width, out);
        if self.inv_temperature != 1.0 {
            out.par_chunks_mut(width).for_each(|row| scale(row, self.inv_temperature));
        }
    }
}

fn add(row: &mut [f32], terms: &[f32]) {
    for (value, term) in row.iter_mut().zip(terms) {
        *value += term;
    }
}

pub(super) fn scale(row: &mut [f32], factor: f32) {
    for value in row {
        *value *= factor;
    }
}

pub(super) fn forward<E: HeadElement>(head: &Head<E>, h: &[E], labels: &[u32]) -> Vec<HeadPartial> {
    if let Some(partials) = E::fused_forward(head, h, labels) {
        return partials;
    }
    let mut partials = vec![HeadPartial::EMPTY; labels.len()];
    let mut tile = vec![0.0; labels.len().min(TILE_ROWS) * head.vocabulary().min(TILE_COLUMNS)];
    let chunks = labels.chunks(TILE_ROWS).zip(partials.chunks_mut(TILE_ROWS));
    for (h, (labels, partials)) in h.chunks(TILE_ROWS * head.width).zip(chunks) {
        for columns in head.tiles(TILE_COLUMNS) {
            let tile = &mut tile[..labels.len() * columns.len()];
            head.tile(h, columns.clone(), tile);
            let rows = tile.par_chunks(columns.len()).zip(labels);
            partials.par_iter_mut().zip(rows).for_each(|(seen, (logits, &label))| {
                head.see(seen, logits, label, &columns);
            });
        }
    }
    partials
}

/// Returns dh; adds to `dw`, if there is one, and, if it is not empty, to `column_sums`, the gradient of the bias.
pub(super) fn backward<E: HeadElement>(
    head: &Head<E>,
    h: &[E],
    rows: &RowGrads,
    mut dw: Option<&mut [f32]>,
    column_sums: &mut [f32],
) -> Vec<f32> {
    if column_sums.is_empty()
        && let Some(dh) = E::fused_backward(head, h, rows, dw.as_deref_mut())
    {
        return dh;
    }
    let width = head.width;
    let mut dh = vec![0.0; h.len()];
    let mut tile = vec![0.0; rows.labels.len().min(TILE_ROWS) * head.vocabulary().min(TILE_COLUMNS)];
    let mut copy = vec![E::narrow(0.0); E::copy_len(tile.len())];
    for (chunk, (h, dh)) in h.chunks(TILE_ROWS * width).zip(dh.chunks_mut(TILE_ROWS * width)).enumerate() {
        let (first, count) = (chunk * TILE_ROWS, h.len() / width);
        for columns in head.tiles(TILE_COLUMNS) {
            let tile = &mut tile[..count * columns.len()];
            head.tile(h, columns.clone(), tile);
            let copy = &mut copy[..E::copy_len(tile.len())];
            E::rows(tile, columns.len(), copy, |offset, logits| {
                rows.logit_grads(first + offset, head, &columns, logits);
            });
            let dl = E::rounded(tile, copy);
            if let Some(dw) = dw.as_deref_mut() {
                E::weight_grad(dl, h, width, &mut dw[columns.start * width..columns.end * width]);
            }
            E::input_grad(dl, head.weights(&columns), width, dh);
            if !column_sums.is_empty() {
                add_column_sums(tile, &mut column_sums[columns]);
            }
        }
    }
    dh
}

impl RowGrads<'_> {
    /// Turns the logits of `row` for some entries into their gradients.
    pub(super) fn logit_grads<E: HeadElement>(
        &self,
        row: usize,
        head: &Head<E>,
        columns: &Range<usize>,
        logits: &mut [f32],
    ) {
        let dlogp = self.dlogp[row] * head.inv_temperature;
        let dentropy = self.dentropy.map_or(0.0, |dentropy| dentropy[row] * head.inv_temperature);
        softmax_grads(logits, self.lse[row], self.entropy[row], dlogp, dentropy);
        if let Some(column) = head.column_of(self.labels[row], columns) {
            logits[column] += dlogp;
        }
    }
}

simd_fn! {
    /// `l ← −p (dlogp + dentropy (log p + entropy))` with `log p = l − lse`.
    fn softmax_grads(logits: &mut [f32], lse: f32, entropy: f32, dlogp: f32, dentropy: f32) = softmax_grads_body;
}

#[inline(always)]
fn softmax_grads_body<const FMA: bool>(logits: &mut [f32], lse: f32, entropy: f32, dlogp: f32, dentropy: f32) {
    for logit in logits {
        let logp = *logit - lse;
        *logit = -exp_small::<FMA>(logp) * fma::<FMA>(dentropy, logp + entropy, dlogp);
    }
}

/// Adds the sum over rows of each column, rows in order.
fn add_column_sums(tile: &[f32], sums: &mut [f32]) {
    let width = sums.len();
    sums.par_chunks_mut(BIAS_COLUMNS).enumerate().for_each(|(chunk, sums)| {
        let start = chunk * BIAS_COLUMNS;
        for row in tile.chunks(width) {
            add(sums, &row[start..start + sums.len()]);
        }
    });
}
