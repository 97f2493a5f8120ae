//! Norms and linear maps of a unit, forward and backward, by parameter name.

use candle_core::{DType, Tensor};
use tandem_kernels::gemm;
use tandem_kernels::norm::{self, NormStats};
use tandem_kernels::slice;

use super::spec::{ModelSpec, NormKind};
use super::unit::UnitBuffer;
use crate::Result;

/// Names of a linear map: weight and, where it is added along with it, bias.
#[derive(Clone, Copy)]
pub(super) struct Map {
    pub(super) weight: &'static str,
    pub(super) bias: Option<&'static str>,
}

/// `x·Wᵀ + b` with a piece's parameters of these names, in the format of the weights; a bias that the unit lacks is none.
pub(super) fn linear(unit: &UnitBuffer, piece: usize, map: Map, x: &Tensor) -> Result<Tensor> {
    let bias = map.bias.map(|bias| unit.find_of(piece, bias)).transpose()?.flatten();
    Ok(match unit.packed_of(piece, map.weight) {
        Some(packed) => gemm::linear_packed(x, packed, bias.as_ref())?,
        None => gemm::linear(x, &unit.get_of(piece, map.weight)?, bias.as_ref())?,
    })
}

/// As [`linear`], in f32: for maps into the residual stream.
pub(super) fn linear_f32(unit: &UnitBuffer, piece: usize, map: Map, x: &Tensor) -> Result<Tensor> {
    let bias = map.bias.map(|bias| unit.find_of(piece, bias)).transpose()?.flatten();
    Ok(match unit.packed_of(piece, map.weight) {
        Some(packed) => gemm::linear_packed_f32(x, packed, bias.as_ref())?,
        None => gemm::linear_f32(x, &unit.get_of(piece, map.weight)?, bias.as_ref())?,
    })
}

/// `x` in the format of the unit's weights.
pub(super) fn rounded(unit: &UnitBuffer, x: &Tensor) -> Result<Tensor> {
    if unit.dtype() == DType::BF16 { Ok(slice::to_bf16(x)?) } else { Ok(x.clone()) }
}

/// The part of the backward of [`linear`] that concerns weight and bias: adds to their gradients, if they are trained.
pub(super) fn weight_backward(
    grads: Option<&UnitBuffer>,
    piece: usize,
    map: Map,
    x: &Tensor,
    dy: &Tensor,
) -> Result<()> {
    let Some(grads) = grads else { return Ok(()) };
    gemm::linear_weight_grad(dy, x, &grads.get_of(piece, map.weight)?)?;
    match map.bias.map(|bias| grads.find_of(piece, bias)).transpose()?.flatten() {
        Some(bias) => Ok(gemm::bias_grad(dy, &bias)?),
        None => Ok(()),
    }
}

/// Backward of [`linear`] for a map out of the residual stream: as [`linear_backward`], the gradient of `x` in f32.
pub(super) fn linear_backward_f32(
    unit: &UnitBuffer,
    grads: Option<&UnitBuffer>,
    piece: usize,
    map: Map,
    x: &Tensor,
    dy: &Tensor,
) -> Result<Tensor> {
    weight_backward(grads, piece, map, x, dy)?;
    Ok(gemm::linear_input_grad_f32(dy, &unit.get_of(piece, map.weight)?)?)
}

/// Backward of [`linear`]: adds to the gradients of weight and bias, if they are trained; returns that of `x` in the format of
/// the weights. `x` and `dy` are in that format.
pub(super) fn linear_backward(
    unit: &UnitBuffer,
    grads: Option<&UnitBuffer>,
    piece: usize,
    map: Map,
    x: &Tensor,
    dy: &Tensor,
) -> Result<Tensor> {
    weight_backward(grads, piece, map, x, dy)?;
    input_backward(unit, piece, map, dy)
}

/// The part of the backward of [`linear`] that concerns its input: the gradient in the format of the weights.
pub(super) fn input_backward(unit: &UnitBuffer, piece: usize, map: Map, dy: &Tensor) -> Result<Tensor> {
    Ok(gemm::linear_input_grad(dy, &unit.get_of(piece, map.weight)?)?)
}

/// A parameter of a norm. After a branch the norm's output is the residual stream, which is f32.
fn norm_parameter(spec: &ModelSpec, unit: &UnitBuffer, name: &str) -> Result<Tensor> {
    let parameter = unit.get(name)?;
    if spec.post_norm { Ok(slice::to_f32(&parameter)?) } else { Ok(parameter) }
}

/// The norm of `spec` with the unit's parameters of these names.
pub(super) fn norm(
    spec: &ModelSpec,
    unit: &UnitBuffer,
    weight: &str,
    bias: &str,
    x: &Tensor,
) -> Result<(Tensor, NormStats)> {
    let w = norm_parameter(spec, unit, weight)?;
    Ok(match spec.norm {
        NormKind::Rms => norm::rms_norm(x, &w, spec.norm_eps)?,
        NormKind::Layer => norm::layer_norm(x, &w, &norm_parameter(spec, unit, bias)?, spec.norm_eps)?,
    })
}

/// `h = x + out` and the [`norm`] of `h`, in one pass.
pub(super) fn add_norm(
    spec: &ModelSpec,
    unit: &UnitBuffer,
    weight: &str,
    bias: &str,
    x: &Tensor,
    out: &Tensor,
) -> Result<(Tensor, Tensor, NormStats)> {
    let w = norm_parameter(spec, unit, weight)?;
    Ok(match spec.norm {
        NormKind::Rms => norm::add_rms_norm(x, out, &w, spec.norm_eps)?,
        NormKind::Layer => norm::add_layer_norm(x, out, &w, &norm_parameter(spec, unit, bias)?, spec.norm_eps)?,
    })
}

/// Backward of [`norm`]: adds to the gradients of its parameters, if they are trained; returns that of `x`, with `past` added,
/// the gradient that reaches `x` past the norm.
pub(super) fn norm_backward(
    spec: &ModelSpec,
    unit: &UnitBuffer,
    grads: Option<&UnitBuffer>,
    weight: &str,
    bias: &str,
    x: &Tensor,
    stats: &NormStats,
    dy: &Tensor,
    past: Option<&Tensor>,
) -> Result<Tensor> {
    let w = norm_parameter(spec, unit, weight)?;
    // A row each: not worth a kernel that leaves them out.
    let unwanted = || Ok(Tensor::zeros(w.dims(), DType::F32, w.device())?);
    let gradient = |name| grads.map_or_else(unwanted, |grads| grads.get(name));
    let dw = gradient(weight)?;
    Ok(match (spec.norm, past) {
        (NormKind::Rms, None) => norm::rms_norm_backward(dy, x, &w, stats, &dw)?,
        (NormKind::Rms, Some(past)) => norm::rms_norm_backward_add(dy, x, &w, stats, past, &dw)?,
        (NormKind::Layer, None) => norm::layer_norm_backward(dy, x, &w, stats, &dw, &gradient(bias)?)?,
        (NormKind::Layer, Some(past)) => norm::layer_norm_backward_add(dy, x, &w, stats, past, &dw, &gradient(bias)?)?,
    })
}
