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
//!
//! Element types: `x`, usually the residual stream, is f32, or bf16 if the parameters are; `y` has the type of the
//! parameters, and `dx` that of `x`. The statistics and the parameters' gradients are f32. The forms that begin with the
//! addition to the residual stream, and those that end with the residual's gradient, spare a pass over memory each; their
//! bits in f32 are those of the separate operations.

use candle_core::{DType, Tensor};
use half::bf16;

use self::backward::{Saved, add_block_sums};
use self::forward::Norm;
use crate::element::{Element, with_element};
use crate::error::{check_dims, check_dtype};
use crate::profile::{Class, time};
use crate::view::{Output, tensor, view, view_mut, view_of};
use crate::{Error, Result};

mod backward;
mod forward;

/// What a norm's forward keeps for its backward: one or two numbers per token.
#[derive(Clone, Debug)]
pub struct NormStats {
    /// Mean of each row, `[T]` f32; `None` for RMS norm.
    pub mean: Option<Tensor>,
    /// `1 / sqrt(mean square or variance + eps)` of each row, `[T]` f32.
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

/// A parameter in f32.
fn wide(op: &'static str, parameter: &Tensor) -> Result<Vec<f32>> {
    with_element!(op, parameter.dtype(), W => {
        Ok(view_of::<W>(op, parameter)?.iter().map(|value| value.wide()).collect())
    })
}

/// The parameters of a forward, in f32.
struct Parameters {
    w: Vec<f32>,
    b: Option<Vec<f32>>,
    eps: f32,
}

impl Parameters {
    fn new(op: &'static str, w: &Tensor, b: Option<&Tensor>, eps: f64) -> Result<Self> {
        if let Some(b) = b {
            check_dtype(op, "dtype of b", w.dtype(), b)?;
        }
        Ok(Self { w: wide(op, w)?, b: b.map(|b| wide(op, b)).transpose()?, eps: eps as f32 })
    }

    fn borrow(&self) -> Norm<'_> {
        Norm { w: &self.w, b: self.b.as_deref(), eps: self.eps }
    }
}

/// The saved numbers of `rows` rows, from `write(mean, inverse)`.
fn statistics(rows: usize, layer: bool, write: impl FnOnce(&mut [f32], &mut [f32])) -> Result<NormStats> {
    let (mut mean, mut inverse) = (vec![0.0; rows], vec![0.0; rows]);
    write(&mut mean, &mut inverse);
    let mean = layer.then(|| tensor(mean, rows)).transpose()?;
    Ok(NormStats { mean, inverse_deviation: tensor(inverse, rows)? })
}

/// RMS norm: `y[t] = w · x[t] / sqrt(mean(x[t]²) + eps)` for `x [T, d]`, `w [d]`.
///
/// Returns `y [T, d]`, of the dtype of `w`, and what [`rms_norm_backward`] needs.
///
/// # Errors
/// If a shape, dtype or device does not fit.
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<(Tensor, NormStats)> {
    let _timer = time(Class::Norm, 0);
    forward("rms_norm", x, w, None, eps)
}

/// Layer norm: `y[t] = w · (x[t] - mean) / sqrt(var + eps) + b` for `x [T, d]`, `w [d]`, `b [d]`.
///
/// The variance is the biased one, as everywhere in the field. Returns `y [T, d]`, of the dtype of `w` and `b`, and what
/// [`layer_norm_backward`] needs.
///
/// # Errors
/// If a shape, dtype or device does not fit.
pub fn layer_norm(x: &Tensor, w: &Tensor, b: &Tensor, eps: f64) -> Result<(Tensor, NormStats)> {
    let _timer = time(Class::Norm, 0);
    forward("layer_norm", x, w, Some(b), eps)
}

fn forward(op: &'static str, x: &Tensor, w: &Tensor, b: Option<&Tensor>, eps: f64) -> Result<(Tensor, NormStats)> {
    fn run<X: Element, Y: Element>(
        op: &'static str,
        x: &Tensor,
        norm: Norm<'_>,
        (rows, width): (usize, usize),
    ) -> Result<(Tensor, NormStats)> {
        let x = view_of::<X>(op, x)?;
        let mut y = Output::<Y>::new(rows * width);
        let stats = statistics(rows, norm.b.is_some(), |mean, inverse| forward::norm(&x, norm, &mut y, mean, inverse))?;
        Ok((y.into_tensor((rows, width))?, stats))
    }
    let dims = dims(op, x, w, b)?;
    let parameters = Parameters::new(op, w, b, eps)?;
    match (x.dtype(), w.dtype()) {
        (DType::F32, DType::F32) => run::<f32, f32>(op, x, parameters.borrow(), dims),
        (DType::F32, _) => run::<f32, bf16>(op, x, parameters.borrow(), dims),
        (DType::BF16, _) => {
            check_dtype(op, "dtype of w", DType::BF16, w)?;
            run::<bf16, bf16>(op, x, parameters.borrow(), dims)
        }
        (dtype, _) => Err(Error::Dtype { op, dtype }),
    }
}

/// A residual connection and the [`rms_norm`] of its sum: `h = x + out`, `y = rms_norm(h)`, in one pass.
///
/// `x [T, d]` is f32, `out [T, d]` f32 or bf16, `w [d]`. Returns `h` in f32, `y` of the dtype of `w`, and what
/// [`rms_norm_backward`] of `h` needs.
///
/// # Errors
/// If a shape, dtype or device does not fit.
pub fn add_rms_norm(x: &Tensor, out: &Tensor, w: &Tensor, eps: f64) -> Result<(Tensor, Tensor, NormStats)> {
    let _timer = time(Class::Norm, 0);
    add_norm("add_rms_norm", x, out, w, None, eps)
}

/// A residual connection and the [`layer_norm`] of its sum: `h = x + out`, `y = layer_norm(h)`, in one pass.
///
/// `x [T, d]` is f32, `out [T, d]` f32 or bf16, `w [d]`, `b [d]`. Returns `h` in f32, `y` of the dtype of `w` and `b`, and
/// what [`layer_norm_backward`] of `h` needs.
///
/// # Errors
/// If a shape, dtype or device does not fit.
pub fn add_layer_norm(
    x: &Tensor,
    out: &Tensor,
    w: &Tensor,
    b: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor, NormStats)> {
    let _timer = time(Class::Norm, 0);
    add_norm("add_layer_norm", x, out, w, Some(b), eps)
}

fn add_norm(
    op: &'static str,
    x: &Tensor,
    out: &Tensor,
    w: &Tensor,
    b: Option<&Tensor>,
    eps: f64,
) -> Result<(Tensor, Tensor, NormStats)> {
    let (rows, width) = dims(op, x, w, b)?;
    check_dims(op, "out", x.dims(), out.dims())?;
    check_dtype(op, "dtype of x", DType::F32, x)?;
    let parameters = Parameters::new(op, w, b, eps)?;
    let norm = parameters.borrow();
    with_element!(op, out.dtype(), O => with_element!(op, w.dtype(), Y => {
        let (x, out) = (view(op, x)?, view_of::<O>(op, out)?);
        let (mut h, mut y) = (Output::<f32>::new(rows * width), Output::<Y>::new(rows * width));
        let stats = statistics(rows, b.is_some(), |mean, inverse| {
            forward::add_norm(&x, &out, norm, &mut h, &mut y, mean, inverse);
        })?;
        Ok((h.into_tensor((rows, width))?, y.into_tensor((rows, width))?, stats))
    }))
}

/// Backward of [`rms_norm`]: returns `dx [T, d]`, of the dtype of `x`, and adds to `dw [d]`, f32, in place.
///
/// `dy` is f32 or of the dtype of `w`.
///
/// # Errors
/// If a shape, dtype or device does not fit, or `dw` is not contiguous.
pub fn rms_norm_backward(dy: &Tensor, x: &Tensor, w: &Tensor, stats: &NormStats, dw: &Tensor) -> Result<Tensor> {
    let _timer = time(Class::Norm, 0);
    backward("rms_norm_backward", dy, x, w, stats, None, dw, None)
}

/// [`rms_norm_backward`] and the addition of `residual [T, d]`, the gradient that reaches `x` past the norm, in one pass:
/// returns `residual + dx`. `x` and `residual` are f32.
///
/// # Errors
/// As [`rms_norm_backward`].
pub fn rms_norm_backward_add(
    dy: &Tensor,
    x: &Tensor,
    w: &Tensor,
    stats: &NormStats,
    residual: &Tensor,
    dw: &Tensor,
) -> Result<Tensor> {
    let _timer = time(Class::Norm, 0);
    backward("rms_norm_backward_add", dy, x, w, stats, Some(residual), dw, None)
}

/// Backward of [`layer_norm`]: returns `dx [T, d]`, of the dtype of `x`, and adds to `dw [d]` and `db [d]`, f32, in place.
///
/// `dy` is f32 or of the dtype of `w`.
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
    let _timer = time(Class::Norm, 0);
    backward("layer_norm_backward", dy, x, w, stats, None, dw, Some(db))
}

/// [`layer_norm_backward`] and the addition of `residual [T, d]`, the gradient that reaches `x` past the norm, in one
/// pass: returns `residual + dx`. `x` and `residual` are f32.
///
/// # Errors
/// As [`layer_norm_backward`].
pub fn layer_norm_backward_add(
    dy: &Tensor,
    x: &Tensor,
    w: &Tensor,
    stats: &NormStats,
    residual: &Tensor,
    dw: &Tensor,
    db: &Tensor,
) -> Result<Tensor> {
    let _timer = time(Class::Norm, 0);
    backward("layer_norm_backward_add", dy, x, w, stats, Some(residual), dw, Some(db))
}

fn backward(
    op: &'static str,
    dy: &Tensor,
    x: &Tensor,
    w: &Tensor,
    stats: &NormStats,
    residual: Option<&Tensor>,
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
    if let Some(residual) = residual {
        check_dims(op, "residual", x.dims(), residual.dims())?;
        check_dtype(op, "dtype of x", DType::F32, x)?;
    }
    if dy.dtype() != DType::F32 {
        check_dtype(op, "dtype of dy", w.dtype(), dy)?;
    }
    if x.dtype() != DType::F32 {
        check_dtype(op, "dtype of x", w.dtype(), x)?;
    }
    let w = wide(op, w)?;
    let mean = stats.mean.as_ref().map(|mean| view(op, mean)).transpose()?;
    let (inverse, residual) =
        (view(op, &stats.inverse_deviation)?, residual.map(|residual| view(op, residual)).transpose()?);
    let saved = Saved { w: &w, mean: mean.as_deref(), inverse: &inverse, residual: residual.as_deref() };
    let (dx, sums) = with_element!(op, dy.dtype(), D => with_element!(op, x.dtype(), X => {
        let mut dx = Output::<X>::new(rows * width);
        let sums = backward::backward(&view_of::<D>(op, dy)?, &view_of::<X>(op, x)?, saved, &mut dx);
        Ok((dx.into_tensor((rows, width))?, sums))
    }))?;
    view_mut(op, dw, |dw| add_block_sums(&sums.dw, dw))?;
    if let Some(db) = db {
        view_mut(op, db, |db| add_block_sums(&sums.db, db))?;
    }
    Ok(dx)
}
