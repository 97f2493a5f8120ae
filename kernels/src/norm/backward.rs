//! Loops of the norms' backward.

use rayon::prelude::*;

use crate::element::Element;
use crate::math::{dot, sum};
use crate::simd::{fma, simd_fn};
use crate::view::Output;

/// Rows whose contributions to a parameter's gradient are summed in order before blocks are added up.
const BLOCK_ROWS: usize = 64;

/// What the backward reads beside the gradient and the input.
#[derive(Clone, Copy)]
pub(super) struct Saved<'a> {
    pub(super) w: &'a [f32],
    /// `None` for RMS norm.
    pub(super) mean: Option<&'a [f32]>,
    pub(super) inverse: &'a [f32],
    /// Gradient that comes to the norm's input past the norm.
    pub(super) residual: Option<&'a [f32]>,
}

impl<'a> Saved<'a> {
    /// Of the rows of one block.
    fn block(self, block: usize) -> Self {
        let width = self.w.len();
        let rows = |x: &'a [f32], width: usize| {
            let size = BLOCK_ROWS * width;
            &x[block * size..x.len().min((block + 1) * size)]
        };
        Self {
            w: self.w,
            mean: self.mean.map(|mean| rows(mean, 1)),
            inverse: rows(self.inverse, 1),
            residual: self.residual.map(|residual| rows(residual, width)),
        }
    }
}

/// Parameter gradients summed per block of rows: `[blocks, d]`; zeros for a `db` that RMS norm has not.
pub(super) struct BlockSums {
    pub(super) dw: Vec<f32>,
    pub(super) db: Vec<f32>,
}

/// Writes `dx`; returns the block sums of the parameter gradients.
pub(super) fn backward<D: Element, X: Element>(dy: &[D], x: &[X], saved: Saved<'_>, dx: &mut Output<X>) -> BlockSums {
    let width = saved.w.len();
    let blocks = saved.inverse.len().div_ceil(BLOCK_ROWS);
    let size = BLOCK_ROWS * width;
    let (mut dw, mut db) = (vec![0.0; blocks * width], vec![0.0; blocks * width]);
    let inputs = dy.par_chunks(size).zip(x.par_chunks(size));
    let sums = dw.par_chunks_mut(width).zip(db.par_chunks_mut(width));
    let tasks = inputs.zip(dx.chunks(size)).zip(sums).enumerate();
    tasks.for_each(|(block, (((dy, x), dx), (dw, db)))| match saved.mean {
        None => rms_backward(dy, x, saved.block(block), dx, dw),
        Some(_) => layer_backward(dy, x, saved.block(block), dx, dw, db),
    });
    BlockSums { dw, db }
}

simd_fn! {
    fn rms_backward<D: Element, X: Element>(dy: &[D], x: &[X], saved: Saved<'_>, dx: &mut [X], dw: &mut [f32])
        = rms_backward_body;
}

#[inline(always)]
fn rms_backward_body<D: Element, X: Element, const FMA: bool>(
    dy: &[D],
    x: &[X],
    saved: Saved<'_>,
    dx: &mut [X],
    dw: &mut [f32],
) {
    let width = saved.w.len();
    let (w, dw) = (saved.w, &mut dw[..width]);
    let (mut wide, mut g) = (Vec::new(), vec![0.0; width]);
    let rows = dy.chunks_exact(width).zip(x.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
    for (row, (((dy, x), dx), &r)) in rows.zip(saved.inverse).enumerate() {
        let x = X::wide_row(x, &mut wide);
        for i in 0..width {
            let (dy, normalised) = (dy[i].wide(), x[i] * r);
            dw[i] = fma::<FMA>(dy, normalised, dw[i]);
            g[i] = dy * w[i];
        }
        let along = dot::<FMA>(&g, x) * r / width as f32;
        for (g, x) in g.iter_mut().zip(x) {
            *g = r * fma::<FMA>(-along, x * r, *g);
        }
        store(&g, saved.residual, row, dx);
    }
}

/// `dx = g`, or `dx = residual + g` with row `row` of the residual gradient.
#[inline(always)]
fn store<X: Element>(g: &[f32], residual: Option<&[f32]>, row: usize, dx: &mut [X]) {
    match residual {
        None => {
            for (dx, g) in dx.iter_mut().zip(g) {
                *dx = X::narrow(*g);
            }
        }
        Some(residual) => {
            let residual = &residual[row * g.len()..][..g.len()];
            for ((dx, g), residual) in dx.iter_mut().zip(g).zip(residual) {
                *dx = X::narrow(residual + g);
            }
        }
    }
}

simd_fn! {
    fn layer_backward<D: Element, X: Element>(
        dy: &[D], x: &[X], saved: Saved<'_>, dx: &mut [X], dw: &mut [f32], db: &mut [f32],
    ) = layer_backward_body;
}

#[inline(always)]
fn layer_backward_body<D: Element, X: Element, const FMA: bool>(
    dy: &[D],
    x: &[X],
    saved: Saved<'_>,
    dx: &mut [X],
    dw: &mut [f32],
    db: &mut [f32],
) {
    let width = saved.w.len();
    let (w, dw, db) = (saved.w, &mut dw[..width], &mut db[..width]);
    let (mut normalised, mut g) = (vec![0.0; width], vec![0.0; width]);
    let statistics = saved.mean.unwrap_or_default().iter().zip(saved.inverse);
    let rows = dy.chunks_exact(width).zip(x.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
    for (row, (((dy, x), dx), (&m, &r))) in rows.zip(statistics).enumerate() {
        for i in 0..width {
            let (dy, centred) = (dy[i].wide(), (x[i].wide() - m) * r);
            normalised[i] = centred;
            dw[i] = fma::<FMA>(dy, centred, dw[i]);
            db[i] += dy;
            g[i] = dy * w[i];
        }
        let constant = sum(&g) / width as f32;
        let along = dot::<FMA>(&g, &normalised) / width as f32;
        for (g, normalised) in g.iter_mut().zip(&normalised) {
            *g = r * fma::<FMA>(-along, *normalised, *g - constant);
        }
        store(&g, saved.residual, row, dx);
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
