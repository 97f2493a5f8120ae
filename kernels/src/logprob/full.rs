//! The f32 head over many rows: each task uses the logits of some rows while they are in its cache.

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use super::cpu::{Head, RowGrads, scale};
use super::row::{BLOCK, HeadPartial};
use crate::gemm::{Gemm, Output, PackedRight, Right, gemm, gemm_here};
use crate::profile::{Class, time};

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
/// Most logits that are kept from a forward to its backward: 64 MiB.
const MOST_KEPT: usize = 1 << 24;

thread_local! {
    /// Logits of a task, kept for the next.
    static LOGITS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Room for the logits of some rows: tile after tile of the vocabulary, in each the rows [`STRIDE`] apart.
struct Kept {
    logits: Vec<f32>,
    rows: usize,
}

impl Kept {
    /// For as many rows as are worth it, of `count`: whole blocks of the terms of the weights' gradient, so that its sums stay
    /// in order. None if the vocabulary is so large that these are too few to pack its weights for them.
    fn of(head: &Head<f32>, count: usize) -> Option<Self> {
        let tiles = head.tiles(TILE_COLUMNS).count();
        let rows = (MOST_KEPT / (tiles * STRIDE) / ENOUGH_ROWS * ENOUGH_ROWS).min(TILE_ROWS).min(count);
        (rows >= ENOUGH_ROWS).then(|| Self { logits: vec![0.0; tiles * rows * STRIDE], rows })
    }

    /// What is kept of a tile for the first `count` rows.
    fn tile(&mut self, tile: usize, count: usize) -> &mut [f32] {
        &mut self.logits[tile * self.rows * STRIDE..][..count * STRIDE]
    }
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

/// What is seen of each row.
pub(super) fn forward(head: &Head<f32>, h: &[f32], labels: &[u32]) -> Vec<HeadPartial> {
    see(head, h, labels, None)
}

/// [`forward`], which leaves the logits in `kept`.
fn see(head: &Head<f32>, h: &[f32], labels: &[u32], mut kept: Option<&mut Kept>) -> Vec<HeadPartial> {
    let mut partials = vec![HeadPartial::EMPTY; labels.len()];
    let mut w = PackedRight::default();
    for (tile, columns) in head.tiles(TILE_COLUMNS).enumerate() {
        let n = columns.len();
        w.fill(head.weights(&columns), (1, head.width), n, head.width);
        let rows = h.par_chunks(TASK_ROWS * head.width).zip(labels.par_chunks(TASK_ROWS));
        let tasks = partials.par_chunks_mut(TASK_ROWS).with_max_len(1).zip(rows);
        let task = |(partials, (h, labels)): (&mut [HeadPartial], (&[f32], &[u32])), logits: &mut [f32]| {
            fill_logits(head, &w, h, &columns, logits);
            for (seen, (logits, &label)) in partials.iter_mut().zip(logits.chunks(STRIDE).zip(labels)) {
                head.see(seen, &logits[..n], label, &columns);
            }
        };
        match &mut kept {
            Some(kept) => {
                let rooms = kept.tile(tile, labels.len()).par_chunks_mut(TASK_ROWS * STRIDE);
                tasks.zip(rooms).for_each(|(rows, logits)| task(rows, logits));
            }
            None => tasks.for_each(|rows| {
                let mut room = LOGITS.take();
                room.resize(TASK_ROWS * STRIDE, 0.0);
                let count = rows.0.len();
                task(rows, &mut room[..count * STRIDE]);
                LOGITS.set(room);
            }),
        }
    }
    partials
}

/// Returns dh; adds to `dw`, if there is one.
pub(super) fn backward(head: &Head<f32>, h: &[f32], rows: &RowGrads, dw: Option<&mut [f32]>) -> Vec<f32> {
    let mut dh = vec![0.0; h.len()];
    go_back(head, h, rows, &mut dh, dw, None);
    dh
}

/// Forward and backward of a loss whose gradient `dlogp` is known beforehand: the bits of [`forward`] and [`backward`], from
/// logits that are made once. `None` where there are too few rows, or too many entries to keep the logits of enough rows.
pub(super) fn both(
    head: &Head<f32>,
    h: &[f32],
    labels: &[u32],
    dlogp: &[f32],
    dw: &mut [f32],
) -> Option<(Vec<HeadPartial>, Vec<f32>)> {
    let width = head.width;
    let mut kept = Kept::of(head, labels.len())?;
    let (mut partials, mut dh) = (Vec::with_capacity(labels.len()), vec![0.0; h.len()]);
    let rows = labels.chunks(kept.rows).zip(dlogp.chunks(kept.rows));
    let hidden = h.chunks(kept.rows * width).zip(dh.chunks_mut(kept.rows * width));
    for ((labels, dlogp), (h, dh)) in rows.zip(hidden) {
        let operations = 2 * labels.len() * head.w.len();
        let timer = time(Class::Head, operations);
        let seen = see(head, h, labels, Some(&mut kept));
        drop(timer);
        let _timer = time(Class::HeadBackward, 2 * operations);
        let (lse, entropy): (Vec<_>, Vec<_>) =
            seen.iter().map(|seen| seen.finish()).map(|stats| (stats.lse, stats.entropy)).unzip();
        let rows = RowGrads { labels, lse: &lse, entropy: &entropy, dlogp, dentropy: None };
        go_back(head, h, &rows, dh, Some(dw), Some(&mut kept));
        partials.extend(seen);
    }
    Some((partials, dh))
}

/// [`backward`], which adds to `dh` and makes the logits again unless they are in `kept`, where it leaves their gradients.
fn go_back(
    head: &Head<f32>,
    h: &[f32],
    rows: &RowGrads,
    dh: &mut [f32],
    mut dw: Option<&mut [f32]>,
    mut kept: Option<&mut Kept>,
) {
    let width = head.width;
    let room = if kept.is_some() { 0 } else { TILE_ROWS.min(rows.labels.len()) * STRIDE };
    let mut room = vec![0f32; room];
    let (mut w, mut w_across) = (PackedRight::default(), PackedRight::default());
    for (tile, columns) in head.tiles(TILE_COLUMNS).enumerate() {
        let (weights, n) = (head.weights(&columns), columns.len());
        if kept.is_none() {
            w.fill(weights, (1, width), n, width);
        }
        w_across.fill(weights, (width, 1), width, n);
        for (chunk, (h, dh)) in h.chunks(TILE_ROWS * width).zip(dh.chunks_mut(TILE_ROWS * width)).enumerate() {
            let count = h.len() / width;
            let (gradients, are_logits) = match &mut kept {
                Some(kept) => (kept.tile(tile, count), true),
                None => (&mut room[..count * STRIDE], false),
            };
            gradients
                .par_chunks_mut(TASK_ROWS * STRIDE)
                .with_max_len(1)
                .zip(h.par_chunks(TASK_ROWS * width).zip(dh.par_chunks_mut(TASK_ROWS * width)))
                .enumerate()
                .for_each(|(task, (gradients, (h, dh)))| {
                    let first = chunk * TILE_ROWS + task * TASK_ROWS;
                    if !are_logits {
                        fill_logits(head, &w, h, &columns, gradients);
                    }
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
}
