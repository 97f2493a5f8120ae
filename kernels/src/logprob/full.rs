//! The f32 head over many rows: each task uses the logits of some rows while they are in its cache.

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use super::cpu::{Head, RowGrads, scale};
use super::row::{BLOCK, HeadPartial};
use crate::gemm::{Gemm, Output, PackedRight, Right, gemm, gemm_here};

/// From so many rows on the tasks occupy the threads.
pub(super) const ENOUGH_ROWS: usize = 256;
/// Vocabulary entries of a tile; whole blocks of the row sums, and of the terms of the rows' gradient.
const TILE_COLUMNS: usize = BLOCK;
/// Rows of a tile of gradients; whole blocks of the terms of the weights' gradient.
const TILE_ROWS: usize = 768;
/// Rows of a task: whole panels of a product; their logits take 96 KiB, beside the tile's weights.
const TASK_ROWS: usize = 48;
/// Distance of rows of logits; a power of two would put them into the same lines of the cache.
const STRIDE: usize = TILE_COLUMNS + 16;

thread_local! {
    /// Logits of a task, kept for the next.
    static LOGITS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Makes the logits of some rows for the entries `columns`, of which `w` are the weights, their rows [`STRIDE`] apart: the
/// bits of [`Head::tile`].
fn fill_logits(head: &Head<f32>, w: &PackedRight, h: &[f32], columns: &Range<usize>, logits: &mut [f32]) {
    let n = columns.len();
    if let Some(bias) = head.bias {
        logits.chunks_mut(STRIDE).for_each(|row| row[..n].copy_from_slice(&bias[columns.clone()]));
    }
    gemm_here(Gemm {
        m: h.len() / head.width,
        n,
        k: head.width,
        a: h,
        a_row_stride: head.width,
        a_col_stride: 1,
        b: w.right(),
        c: Output::new(logits),
        c_row_stride: STRIDE,
        accumulate: head.bias.is_some(),
    });
    if head.inv_temperature != 1.0 {
        logits.chunks_mut(STRIDE).for_each(|row| scale(&mut row[..n], head.inv_temperature));
    }
}

pub(super) fn forward(head: &Head<f32>, h: &[f32], labels: &[u32]) -> Vec<HeadPartial> {
    let mut partials = vec![HeadPartial::EMPTY; labels.len()];
    let mut w = PackedRight::default();
    for columns in head.tiles(TILE_COLUMNS) {
        let n = columns.len();
        w.fill(head.weights(&columns), (1, head.width), n, head.width);
        let rows = h.par_chunks(TASK_ROWS * head.width).zip(labels.par_chunks(TASK_ROWS));
        partials.par_chunks_mut(TASK_ROWS).with_max_len(1).zip(rows).for_each(|(partials, (h, labels))| {
            let mut room = LOGITS.take();
            room.resize(TASK_ROWS * STRIDE, 0.0);
            let logits = &mut room[..labels.len() * STRIDE];
            fill_logits(head, &w, h, &columns, logits);
            for (seen, (logits, &label)) in partials.iter_mut().zip(logits.chunks(STRIDE).zip(labels)) {
                head.see(seen, &logits[..n], label, &columns);
            }
            LOGITS.set(room);
        });
    }
    partials
}

/// Returns dh; adds to `dw`, if there is one.
pub(super) fn backward(head: &Head<f32>, h: &[f32], rows: &RowGrads, mut dw: Option<&mut [f32]>) -> Vec<f32> {
    let width = head.width;
    let mut dh = vec![0.0; h.len()];
    let mut gradients = vec![0f32; TILE_ROWS.min(rows.labels.len()) * STRIDE];
    let (mut w, mut w_across) = (PackedRight::default(), PackedRight::default());
    for columns in head.tiles(TILE_COLUMNS) {
        let (weights, n) = (head.weights(&columns), columns.len());
        w.fill(weights, (1, width), n, width);
        w_across.fill(weights, (width, 1), width, n);
        for (chunk, (h, dh)) in h.chunks(TILE_ROWS * width).zip(dh.chunks_mut(TILE_ROWS * width)).enumerate() {
            let count = h.len() / width;
            let gradients = &mut gradients[..count * STRIDE];
            gradients
                .par_chunks_mut(TASK_ROWS * STRIDE)
                .with_max_len(1)
                .zip(h.par_chunks(TASK_ROWS * width).zip(dh.par_chunks_mut(TASK_ROWS * width)))
                .enumerate()
                .for_each(|(task, (gradients, (h, dh)))| {
                    let first = chunk * TILE_ROWS + task * TASK_ROWS;
                    fill_logits(head, &w, h, &columns, gradients);
                    for (row, logits) in gradients.chunks_mut(STRIDE).enumerate() {
                        rows.logit_grads(first + row, head, &columns, &mut logits[..n]);
                    }
                    gemm_here(Gemm {
                        m: h.len() / width,
                        n: width,
                        k: n,
                        a: gradients,
                        a_row_stride: STRIDE,
                        a_col_stride: 1,
                        b: w_across.right(),
                        c: Output::new(dh),
                        c_row_stride: width,
                        accumulate: true,
                    });
                });
            if let Some(dw) = dw.as_deref_mut() {
                gemm(Gemm {
                    m: n,
                    n: width,
                    k: count,
                    a: gradients,
                    a_row_stride: 1,
                    a_col_stride: STRIDE,
                    b: Right::Strided(h, (width, 1)),
                    c: Output::new(&mut dw[columns.start * width..columns.end * width]),
                    c_row_stride: width,
                    accumulate: true,
                });
            }
        }
    }
    dh
}
