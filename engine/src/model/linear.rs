//! Norms and linear maps of a unit, forward and backward, by parameter name.

use candle_core::Tensor;
use tandem_kernels::gemm;
use tandem_kernels::norm::{self, NormStats};

use super::spec::{ModelSpec, NormKind};
use super::unit::UnitBuffer;
use crate::Result;

/// Names of a linear map: weight and, where it is added along with it, bias.
#[derive(Clone, Copy)]
pub(super) struct Map {
    pub(super) weight: &'static str,
    pub(super) bias: Option<&'static str>,
}

/// `x·Wᵀ + b` with a piece's parameters of these names; a bias that the unit lacks is none.
pub(super) fn linear(unit: &UnitBuffer, piece: usize, map: Map, x: &Tensor) -> Result<Tensor> {
    let bias = map.bias.map(|bias| unit.find_of(piece, bias)).transpose()?.flatten();
    Ok(gemm::linear(x, &unit.get_of(piece, map.weight)?, bias.as_ref())?)
}

/// Backward of [`linear`]: adds to the gradients of weight and bias, if they are trained; returns that of `x`.
pub(super) fn linear_backward(
    unit: &UnitBuffer,
    grads: Option<&UnitBuffer>,
    piece: usize,
    map: Map,
    x: &Tensor,
    dy: &Tensor,
) -> Result<Tensor> {
    if let Some(grads) = grads {
        gemm::linear_weight_grad(dy, x, &grads.get_of(piece, map.weight)?)?;
        if let Some(bias) = map.bias.map(|bias| grads.find_of(piece, bias)).transpose()?.flatten() {
            gemm::bias_grad(dy, &bias)?;
        }
    }
    Ok(gemm::linear_input_grad(dy, &unit.get_of(piece, map.weight)?)?)
}

/// The norm of `spec` with the unit's parameters of these names.
pub(super) fn norm(
    spec: &ModelSpec,
    unit: &UnitBuffer,
    weight: &str,
    bias: &str,
    x: &Tensor,
) -> Result<(Tensor, NormStats)> {
    let w = unit.get(weight)?;
    Ok(match spec.norm {
        NormKind::Rms => norm::rms_norm(x, &w, spec.norm_eps)?,
        NormKind::Layer => norm::layer_norm(x, &w, &unit.get(bias)?, spec.norm_eps)?,
    })
}

/// Backward of [`norm`]: adds to the gradients of its parameters, if they are trained; returns that of `x`.
pub(super) fn norm_backward(
    spec: &ModelSpec,
    unit: &UnitBuffer,
    grads: Option<&UnitBuffer>,
    weight: &str,
    bias: &str,
    x: &Tensor,
    stats: &NormStats,
    dy: &Tensor,
) -> Result<Tensor> {
    let w = unit.get(weight)?;
    // A row each: not worth a kernel that leaves them out.
    let gradient = |name| grads.map_or_else(|| Ok(w.zeros_like()?), |grads| grads.get(name));
    let dw = gradient(weight)?;
    Ok(match spec.norm {
        NormKind::Rms => norm::rms_norm_backward(dy, x, &w, stats, &dw)?,
        NormKind::Layer => norm::layer_norm_backward(dy, x, &w, stats, &dw, &gradient(bias)?)?,
    })
}
