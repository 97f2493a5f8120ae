//! Norms and linear maps of a unit, forward and backward, by parameter name.

use candle_core::Tensor;
use tandem_kernels::gemm;
use tandem_kernels::norm::{self, NormStats};

use super::spec::{ModelSpec, NormKind};
use super::unit::UnitBuffer;
use crate::Result;

/// `x·Wᵀ + b` with the unit's parameters of these names; the bias is optional.
pub(super) fn linear(unit: &UnitBuffer, weight: &str, bias: &str, x: &Tensor) -> Result<Tensor> {
    Ok(gemm::linear(x, &unit.get(weight)?, unit.find(bias)?.as_ref())?)
}

/// Backward of [`linear`]: adds to the gradients of weight and bias, returns that of `x`.
pub(super) fn linear_backward(
    unit: &UnitBuffer,
    grads: &UnitBuffer,
    weight: &str,
    bias: &str,
    x: &Tensor,
    dy: &Tensor,
) -> Result<Tensor> {
    gemm::linear_weight_grad(dy, x, &grads.get(weight)?)?;
    if let Some(bias) = grads.find(bias)? {
        gemm::bias_grad(dy, &bias)?;
    }
    Ok(gemm::linear_input_grad(dy, &unit.get(weight)?)?)
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

/// Backward of [`norm`]: adds to the gradients of its parameters, returns that of `x`.
pub(super) fn norm_backward(
    spec: &ModelSpec,
    unit: &UnitBuffer,
    grads: &UnitBuffer,
    weight: &str,
    bias: &str,
    x: &Tensor,
    stats: &NormStats,
    dy: &Tensor,
) -> Result<Tensor> {
    let (w, dw) = (unit.get(weight)?, grads.get(weight)?);
    Ok(match spec.norm {
        NormKind::Rms => norm::rms_norm_backward(dy, x, &w, stats, &dw)?,
        NormKind::Layer => norm::layer_norm_backward(dy, x, &w, stats, &dw, &grads.get(bias)?)?,
    })
}
