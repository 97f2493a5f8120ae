//! Loops of the norms.

use rayon::prelude::*;

use crate::math::{dot, sum};
use crate::simd::{fma, simd_fn};
use crate::view::rows_per_task;

/// Rows whose contributions to a parameter's gradient are summed in order before blocks are added up.
const BLOCK_ROWS: usize = 64;

pub(super) fn rms_norm(x: &[f32], w: &[f32], eps: f32, y: &mut [f32], inverse: &mut [f32]) {
    let (width, rows) = (w.len(), rows_per_task(w.len()));
    x.par_chunks(rows * width)
        .zip(y.par_chunks_mut(rows * width))
        .zip(inverse.par_chunks_mut(rows))
        .for_each(|((x, y), inverse)| rms_rows(x, w, eps, y, inverse));
}

simd_fn! {
    fn rms_rows(x: &[f32], w: &[f32], eps: f32, y: &mut [f32], inverse: &mut [f32]) = rms_rows_body;
}

#[inline(always)]
fn rms_rows_body<const FMA: bool>(x: &[f32], w: &[f32], eps: f32, y: &mut [f32], inverse: &mut [f32]) {
    let width = w.len();
    for ((x, y), inverse) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(inverse) {
        let mean_square = dot::<FMA>(x, x) / width as f32;
        let r = 1.0 / (mean_square + eps).sqrt();
        *inverse = r;
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = w * (x * r);
        }
    }
}

pub(super) fn layer_norm(
    x: &[f32],
    w: &[f32],
    b: &[f32],
    eps: f32,
    y: &mut [f32],
    mean: &mut [f32],
    inverse: &mut [f32],
) {
    let (width, rows) = (w.len(), rows_per_task(w.len()));
    x.par_chunks(rows * width)
        .zip(y.par_chunks_mut(rows * width))
        .zip(mean.par_chunks_mut(rows))
        .zip(inverse.par_chunks_mut(rows))
        .for_each(|(((x, y), mean), inverse)| layer_rows(x, w, b, eps, y, mean, inverse));
}

simd_fn! {
    fn layer_rows(x: &[f32], w: &[f32], b: &[f32], eps: f32, y: &mut [f32], mean: &mut [f32], inverse: &mut [f32])
        = layer_rows_body;
}

#[inline(always)]
fn layer_rows_body<const FMA: bool>(
    x: &[f32],
    w: &[f32],
    b: &[f32],
    eps: f32,
    y: &mut [f32],
    mean: &mut [f32],
    inverse: &mut [f32],
) {
    let width = w.len();
    let rows = x.chunks_exact(width).zip(y.chunks_exact_mut(width));
    for ((x, y), (mean, inverse)) in rows.zip(mean.iter_mut().zip(inverse)) {
        let m = sum(x) / width as f32;
        // The centred row goes to `y` first: the variance of centred values does not cancel.
        for (y, x) in y.iter_mut().zip(x) {
            *y = x - m;
        }
        let variance = dot::<FMA>(y, y) / width as f32;
        let r = 1.0 / (variance + eps).sqrt();
        for ((y, w), b) in y.iter_mut().zip(w).zip(b) {
            *y = fma::<FMA>(*y * r, *w, *b);
        }
        *mean = m;
        *inverse = r;
    }
}

/// Parameter gradients summed per block of rows: `[blocks, d]`; `db` is empty for RMS norm.
pub(super) struct BlockSums {
    pub(super) dw: Vec<f32>,
    pub(super) db: Vec<f32>,
}

/// Writes `dx`; returns the block sums of the parameter gradients. `mean` is `None` for RMS norm.
pub(super) fn backward(
    dy: &[f32],
    x: &[f32],
    w: &[f32],
    mean: Option<&[f32]>,
    inverse: &[f32],
    dx: &mut [f32],
) -> BlockSums {
    let width = w.len();
    let blocks = inverse.len().div_ceil(BLOCK_ROWS);
    let size = BLOCK_ROWS * width;
    let mut dw = vec![0.0; blocks * width];
    let inputs = dy.par_chunks(size).zip(x.par_chunks(size)).zip(inverse.par_chunks(BLOCK_ROWS));
    let outputs = dx.par_chunks_mut(size).zip(dw.par_chunks_mut(width));
    match mean {
        None => {
            inputs.zip(outputs).for_each(|(((dy, x), inverse), (dx, dw))| rms_backward(dy, x, w, inverse, dx, dw));
            BlockSums { dw, db: Vec::new() }
        }
        Some(mean) => {
            let mut db = vec![0.0; blocks * width];
            inputs.zip(mean.par_chunks(BLOCK_ROWS)).zip(outputs.zip(db.par_chunks_mut(width))).for_each(
                |((((dy, x), inverse), mean), ((dx, dw), db))| layer_backward(dy, x, w, mean, inverse, dx, dw, db),
            );
            BlockSums { dw, db }
        }
    }
}

simd_fn! {
    fn rms_backward(dy: &[f32], x: &[f32], w: &[f32], inverse: &[f32], dx: &mut [f32], dw: &mut [f32])
        = rms_backward_body;
}

#[inline(always)]
fn rms_backward_body<const FMA: bool>(
    dy: &[f32],
    x: &[f32],
    w: &[f32],
    inverse: &[f32],
    dx: &mut [f32],
    dw: &mut [f32],
) {
    let width = w.len();
    let rows = dy.chunks_exact(width).zip(x.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
    for (((dy, x), dx), &r) in rows.zip(inverse) {
        // dx holds g = w dy until its sum with x̂ is known.
        for i in 0..width {
            let normalised = x[i] * r;
            dw[i] = fma::<FMA>(dy[i], normalised, dw[i]);
            dx[i] = dy[i] * w[i];
        }
        let along = dot::<FMA>(dx, x) * r / width as f32;
        for i in 0..width {
            dx[i] = r * fma::<FMA>(-along, x[i] * r, dx[i]);
        }
    }
}

simd_fn! {
    fn layer_backward(
        dy: &[f32], x: &[f32], w: &[f32], mean: &[f32], inverse: &[f32], dx: &mut [f32], dw: &mut [f32], db: &mut [f32],
    ) = layer_backward_body;
}

#[inline(always)]
fn layer_backward_body<const FMA: bool>(
    dy: &[f32],
    x: &[f32],
    w: &[f32],
    mean: &[f32],
    inverse: &[f32],
    dx: &mut [f32],
    dw: &mut [f32],
    db: &mut [f32],
) {
    let width = w.len();
    let mut normalised = vec![0.0; width];
    let rows = dy.chunks_exact(width).zip(x.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
    for (((dy, x), dx), (&m, &r)) in rows.zip(mean.iter().zip(inverse)) {
        for i in 0..width {
            let centred = (x[i] - m) * r;
            normalised[i] = centred;
            dw[i] = fma::<FMA>(dy[i], centred, dw[i]);
            db[i] += dy[i];
            dx[i] = dy[i] * w[i];
        }
        let constant = sum(dx) / width as f32;
        let along = dot::<FMA>(dx, &normalised) / width as f32;
        for i in 0..width {
            dx[i] = r * fma::<FMA>(-along, normalised[i], dx[i] - constant);
        }
    }
}

/// Adds the column sums of `blocks [n, d]`, taken in order, to `total [d]`.
pub(super) fn add_block_sums(blocks: &[f32], total: &mut [f32]) {
    let width = total.len();
    let mut column_sums = vec![0.0; width];
    for block in blocks.chunks_exact(width) {
        for (sum, value) in column_sums.iter_mut().zip(block) {
            *sum += value;
        }
    }
    for (total, sum) in total.iter_mut().zip(&column_sums) {
        *total += sum;
    }
}
