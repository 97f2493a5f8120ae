//! Loops of the norms' forward.

use rayon::prelude::*;

use crate::element::Element;
use crate::math::{dot, sum};
use crate::simd::{fma, simd_fn};
use crate::view::{Output, rows_per_task};

/// Which norm, and its parameters in f32.
#[derive(Clone, Copy)]
pub(super) struct Norm<'a> {
    pub(super) w: &'a [f32],
    /// `None` for RMS norm.
    pub(super) b: Option<&'a [f32]>,
    pub(super) eps: f32,
}

/// Writes `y` and the statistics of each row; `mean` is written by layer norm only.
pub(super) fn norm<X: Element, Y: Element>(
    x: &[X],
    norm: Norm<'_>,
    y: &mut Output<Y>,
    mean: &mut [f32],
    inverse: &mut [f32],
) {
    let (width, rows) = (norm.w.len(), rows_per_task(norm.w.len()));
    x.par_chunks(rows * width)
        .zip(y.chunks(rows * width))
        .zip(mean.par_chunks_mut(rows).zip(inverse.par_chunks_mut(rows)))
        .for_each(|((x, y), (mean, inverse))| norm_rows(x, norm, y, mean, inverse));
}

/// Writes `h = x + out`, and of `h` what [`norm`] writes of `x`.
pub(super) fn add_norm<O: Element, Y: Element>(
    x: &[f32],
    out: &[O],
    norm: Norm<'_>,
    h: &mut Output<f32>,
    y: &mut Output<Y>,
    mean: &mut [f32],
    inverse: &mut [f32],
) {
    let (width, rows) = (norm.w.len(), rows_per_task(norm.w.len()));
    let inputs = x.par_chunks(rows * width).zip(out.par_chunks(rows * width));
    let outputs = h.chunks(rows * width).zip(y.chunks(rows * width));
    inputs
        .zip(outputs)
        .zip(mean.par_chunks_mut(rows).zip(inverse.par_chunks_mut(rows)))
        .for_each(|(((x, out), (h, y)), (mean, inverse))| add_norm_rows(x, out, norm, h, y, mean, inverse));
}

simd_fn! {
    fn norm_rows<X: Element, Y: Element>(
        x: &[X], norm: Norm<'_>, y: &mut [Y], mean: &mut [f32], inverse: &mut [f32],
    ) = norm_rows_body;
}

#[inline(always)]
fn norm_rows_body<X: Element, Y: Element, const FMA: bool>(
    x: &[X],
    norm: Norm<'_>,
    y: &mut [Y],
    mean: &mut [f32],
    inverse: &mut [f32],
) {
    let width = norm.w.len();
    let (mut wide, mut centred) = (Vec::new(), vec![0.0; width]);
    let rows = x.chunks_exact(width).zip(y.chunks_exact_mut(width));
    for ((x, y), (mean, inverse)) in rows.zip(mean.iter_mut().zip(inverse)) {
        (*mean, *inverse) = norm_row::<Y, FMA>(X::wide_row(x, &mut wide), norm, y, &mut centred);
    }
}

simd_fn! {
    fn add_norm_rows<O: Element, Y: Element>(
        x: &[f32], out: &[O], norm: Norm<'_>, h: &mut [f32], y: &mut [Y], mean: &mut [f32], inverse: &mut [f32],
    ) = add_norm_rows_body;
}

#[inline(always)]
fn add_norm_rows_body<O: Element, Y: Element, const FMA: bool>(
    x: &[f32],
    out: &[O],
    norm: Norm<'_>,
    h: &mut [f32],
    y: &mut [Y],
    mean: &mut [f32],
    inverse: &mut [f32],
) {
    let width = norm.w.len();
    let mut centred = vec![0.0; width];
    let inputs = x.chunks_exact(width).zip(out.chunks_exact(width));
    let outputs = h.chunks_exact_mut(width).zip(y.chunks_exact_mut(width));
    for (((x, out), (h, y)), (mean, inverse)) in inputs.zip(outputs).zip(mean.iter_mut().zip(inverse)) {
        for ((h, x), out) in h.iter_mut().zip(x).zip(out) {
            *h = x + out.wide();
        }
        (*mean, *inverse) = norm_row::<Y, FMA>(h, norm, y, &mut centred);
    }
}

/// Writes `y`; returns the mean, 0 for RMS norm, and the inverse deviation.
#[inline(always)]
fn norm_row<Y: Element, const FMA: bool>(x: &[f32], norm: Norm<'_>, y: &mut [Y], centred: &mut [f32]) -> (f32, f32) {
    let width = x.len();
    let Some(b) = norm.b else {
        let mean_square = dot::<FMA>(x, x) / width as f32;
        let r = 1.0 / (mean_square + norm.eps).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(norm.w) {
            *y = Y::narrow(w * (x * r));
        }
        return (0.0, r);
    };
    let m = sum(x) / width as f32;
    // The variance of centred values does not cancel.
    for (centred, x) in centred.iter_mut().zip(x) {
        *centred = x - m;
    }
    let variance = dot::<FMA>(centred, centred) / width as f32;
    let r = 1.0 / (variance + norm.eps).sqrt();
    for (((y, centred), w), b) in y.iter_mut().zip(&*centred).zip(norm.w).zip(b) {
        *y = Y::narrow(fma::<FMA>(centred * r, *w, *b));
    }
    (m, r)
}
