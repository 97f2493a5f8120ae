//! Root-mean-square norm and layer norm over rows `[T, d]`, forward and backward.
//!
//! - RMS norm (Zhang and Sennrich 2019, eq. 4): `y = w · x / sqrt(mean(x²) + eps)`
//! - layer norm (Ba, Kiros and Hinton 2016, eq. 4): `y = w · (x - mean(x)) / sqrt(var(x) + eps) + b`
//!
//! With `x̂` the normalised row, `g = w · dy` and `r` the inverse deviation, both have the backward
//! `dx = r (g - mean(g) - x̂ mean(g x̂))`, without `mean(g)` for RMS norm; `dw = Σ_T dy x̂` and `db = Σ_T dy`.
//!
//! Row sums use sixteen lanes. Column sums over tokens go by blocks of 64 rows, each summed in order, then the blocks in
//! order: no result depends on the number of threads.

use candle_core::Tensor;

use crate::error::check_dims;
use crate::view::{tensor, view, view_mut};
use crate::{Error, Result};

mod cpu;

/// What a norm's forward keeps for its backward: one or two numbers per token.
#[derive(Clone, Debug)]
pub struct NormStats {
    /// Mean of each row, `[T]`; `None` for RMS norm.
    pub mean: Option<Tensor>,
    /// `1 / sqrt(mean square or variance + eps)` of each row, `[T]`.
    pub inverse_deviation: Tensor,
}

/// `[T, d]` of `x`, checked against the parameters `w` (and `b`) of `[d]`.
fn dims(op: &'static str, x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<(usize, usize)> {
    let &[rows, width] = x.dims() else {
        return Err(Error::shape(op, "x", "[T, d]", x.dims()));
    };
    if width == 0 {
        return Err(Error::shape(op, "x", "[T, d] with d > 0", x.dims()));
    }
    check_dims(op, "w", &[width], w.dims())?;
    if let Some(b) = b {
        check_dims(op, "b", &[width], b.dims())?;
    }
    Ok((rows, width))
}

/// RMS norm: `y[t] = w · x[t] / sqrt(mean(x[t]²) + eps)` for `x [T, d]`, `w [d]`.
///
/// Returns `y [T, d]` and what [`rms_norm_backward`] needs.
///
/// # Errors
/// If a shape, dtype or device does not fit.
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<(Tensor, NormStats)> {
    const OP: &str = "rms_norm";
    let (rows, width) = dims(OP, x, w, None)?;
    let (x, w) = (view(OP, x)?, view(OP, w)?);
    let (mut y, mut inverse) = (vec![0.0; rows * width], vec![0.0; rows]);
    cpu::rms_norm(&x, &w, eps as f32, &mut y, &mut inverse);
    Ok((tensor(y, (rows, width))?, NormStats { mean: None, inverse_deviation: tensor(inverse, rows)? }))
}

/// Backward of [`rms_norm`]: returns `dx [T, d]` and adds to `dw [d]` in place.
///
/// # Errors
/// If a shape, dtype or device does not fit, or `dw` is not contiguous.
pub fn rms_norm_backward(dy: &Tensor, x: &Tensor, w: &Tensor, stats: &NormStats, dw: &Tensor) -> Result<Tensor> {
    backward("rms_norm_backward", dy, x, w, stats, dw, None)
}

/// Layer norm: `y[t] = w · (x[t] - mean) / sqrt(var + eps) + b` for `x [T, d]`, `w [d]`, `b [d]`.
///
/// The variance is the biased one, as everywhere in the field. Returns `y [T, d]` and what [`layer_norm_backward`] needs.
///
/// # Errors
/// If a shape, dtype or device does not fit.
pub fn layer_norm(x: &Tensor, w: &Tensor, b: &Tensor, eps: f64) -> Result<(Tensor, NormStats)> {
    const OP: &str = "layer_norm";
    let (rows, width) = dims(OP, x, w, Some(b))?;
    let (x, w, b) = (view(OP, x)?, view(OP, w)?, view(OP, b)?);
    let (mut y, mut mean, mut inverse) = (vec![0.0; rows * width], vec![0.0; rows], vec![0.0; rows]);
    cpu::layer_norm(&x, &w, &b, eps as f32, &mut y, &mut mean, &mut inverse);
    let stats = NormStats { mean: Some(tensor(mean, rows)?), inverse_deviation: tensor(inverse, rows)? };
    Ok((tensor(y, (rows, width))?, stats))
}

/// Backward of [`layer_norm`]: returns `dx [T, d]` and adds to `dw [d]` and `db [d]` in place.
///
/// # Errors
/// If a shape, dtype or device does not fit, or `dw` or `db` is not contiguous.
pub fn layer_norm_backward(
    dy: &Tensor,
    x: &Tensor,
    w: &Tensor,
    stats: &NormStats,
    dw: &Tensor,
    db: &Tensor,
) -> Result<Tensor> {
    backward("layer_norm_backward", dy, x, w, stats, dw, Some(db))
}

fn backward(
    op: &'static str,
    dy: &Tensor,
    x: &Tensor,
    w: &Tensor,
    stats: &NormStats,
    dw: &Tensor,
    db: Option<&Tensor>,
) -> Result<Tensor> {
    let (rows, width) = dims(op, x, w, db)?;
    check_dims(op, "dy", &[rows, width], dy.dims())?;
    check_dims(op, "dw", &[width], dw.dims())?;
    check_dims(op, "saved inverse deviation", &[rows], stats.inverse_deviation.dims())?;
    if let Some(mean) = &stats.mean {
        check_dims(op, "saved mean", &[rows], mean.dims())?;
    }
    if stats.mean.is_some() != db.is_some() {
        return Err(Error::shape(
            op,
            "saved statistics",
            "those of the same norm's forward",
            "those of the other norm",
        ));
    }
    let mut dx = vec![0.0; rows * width];
    let partial = {
        let (dy, x, w, inverse) = (view(op, dy)?, view(op, x)?, view(op, w)?, view(op, &stats.inverse_deviation)?);
        let mean = stats.mean.as_ref().map(|mean| view(op, mean)).transpose()?;
        cpu::backward(&dy, &x, &w, mean.as_deref(), &inverse, &mut dx)
    };
    view_mut(op, dw, |dw| cpu::add_block_sums(&partial.dw, dw))?;
    if let Some(db) = db {
        view_mut(op, db, |db| cpu::add_block_sums(&partial.db, db))?;
    }
    tensor(dx, (rows, width))
}
