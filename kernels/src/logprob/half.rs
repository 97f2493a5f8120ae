//! The bf16 head over many rows: each task uses the logits of some rows while they are in its cache.

use std::cell::Cell;
use std::ops::Range;

use ::half::bf16;
use rayon::prelude::*;

use super::cpu::{Head, RowGrads, scale};
use super::row::{BLOCK, HeadPartial};
use crate::gemm::{Factor, Operand, Output, PackedOperand, Product, Start, multiply, multiply_here, narrow_row};

/// From so many rows on the tasks occupy the threads.
pub(super) const ENOUGH_ROWS: usize = 256;
/// Vocabulary entries of a tile; whole blocks of the row sums.
const TILE_COLUMNS: usize = 2 * BLOCK;
/// Rows of a tile of gradients, which are one chain of the weights' gradient.
const TILE_ROWS: usize = 1024;
/// Rows of a task: their logits take 256 KiB, beside the tile's weights.
const TASK_ROWS: usize = 64;
/// Distance of rows of gradients; a power of two would put them into the same lines of the cache.
const STRIDE: usize = TILE_COLUMNS + 32;

thread_local! {
    /// Logits of a task, kept for the next.
    static LOGITS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Runs `work` on the logits of some rows for the entries `columns`, of which `w` are the weights: the bits of
/// [`Head::tile`].
fn with_logits(
    head: &Head<bf16>,
    w: &PackedOperand,
    h: &[bf16],
    columns: &Range<usize>,
    work: impl FnOnce(&mut [f32]),
) {
    let mut logits = LOGITS.take();
    let (m, n) = (h.len() / head.width, columns.len());
    if logits.len() < m * n {
        logits.resize(m * n, 0.0);
    }
    let start = head.bias.map_or(Start::Zero, |bias| Start::Bias(&bias[columns.clone()]));
    let (a, c) = (Operand::along_k(h, head.width), Output::new(&mut logits[..m * n]));
    multiply_here(Product { m, n, k: head.width, a, b: Factor::Packed(w), start, c });
    if head.inv_temperature != 1.0 {
        scale(&mut logits[..m * n], head.inv_temperature);
    }
    work(&mut logits[..m * n]);
    LOGITS.set(logits);
}

pub(super) fn forward(head: &Head<bf16>, h: &[bf16], labels: &[u32]) -> Vec<HeadPartial> {
    let mut partials = vec![HeadPartial::EMPTY; labels.len()];
    let mut w = PackedOperand::EMPTY;
    for columns in head.tiles(TILE_COLUMNS) {
        w.fill(&Operand::along_k(head.weights(&columns), head.width), columns.len(), head.width);
        let rows = h.par_chunks(TASK_ROWS * head.width).zip(labels.par_chunks(TASK_ROWS));
        partials.par_chunks_mut(TASK_ROWS).with_max_len(1).zip(rows).for_each(|(partials, (h, labels))| {
            with_logits(head, &w, h, &columns, |logits| {
                let rows = logits.chunks_exact(columns.len()).zip(labels);
                for (seen, (logits, &label)) in partials.iter_mut().zip(rows) {
                    head.see(seen, logits, label, &columns);
                }
            });
        });
    }
    partials
}

/// Returns dh; adds to `dw`, if there is one.
pub(super) fn backward(head: &Head<bf16>, h: &[bf16], rows: &RowGrads, mut dw: Option<&mut [f32]>) -> Vec<f32> {
    let width = head.width;
    let mut dh = vec![0.0; h.len()];
    let mut gradients = vec![bf16::ZERO; TILE_ROWS.min(rows.labels.len()) * STRIDE];
    let (mut w, mut w_across) = (PackedOperand::EMPTY, PackedOperand::EMPTY);
    for columns in head.tiles(TILE_COLUMNS) {
        let (weights, n) = (head.weights(&columns), columns.len());
        w.fill(&Operand::along_k(weights, width), n, width);
        w_across.fill(&Operand::across_k(weights, width), width, n);
        for (chunk, (h, dh)) in h.chunks(TILE_ROWS * width).zip(dh.chunks_mut(TILE_ROWS * width)).enumerate() {
            let count = h.len() / width;
            let gradients = &mut gradients[..count * STRIDE];
            gradients
                .par_chunks_mut(TASK_ROWS * STRIDE)
                .with_max_len(1)
                .zip(h.par_chunks(TASK_ROWS * width))
                .enumerate()
                .for_each(|(task, (gradients, h))| {
                    let first = chunk * TILE_ROWS + task * TASK_ROWS;
                    with_logits(head, &w, h, &columns, |logits| {
                        let pairs = logits.chunks_exact_mut(n).zip(gradients.chunks_exact_mut(STRIDE));
                        for (row, (logits, gradients)) in pairs.enumerate() {
                            rows.logit_grads(first + row, head, &columns, logits);
                            narrow_row(logits, &mut gradients[..n]);
                        }
                    });
                });
            if let Some(dw) = dw.as_deref_mut() {
                let a = Operand::across_k(gradients, STRIDE);
                let b = Factor::Plain(Operand::across_k(h, width));
                let c = Output::new(&mut dw[columns.start * width..columns.end * width]);
                multiply(Product { m: n, n: width, k: count, a, b, start: Start::Output, c });
            }
            let a = Operand::along_k(gradients, STRIDE);
            let b = Factor::Packed(&w_across);
            multiply(Product { m: count, n: width, k: n, a, b, start: Start::Output, c: Output::new(dh) });
        }
    }
    dh
}
