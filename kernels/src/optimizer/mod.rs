//! Parameter updates over flat f32 buffers: AdamW, sign descent and the moving average of weights, each one pass over
//! memory; in [`onebit`] the pieces of the Adams that send one bit per element.
//!
//! The functions on slices are what the others call. An element's result depends on that element alone, so a buffer
//! may be cut over ranks anywhere.

mod cpu;
pub mod onebit;

use candle_core::Tensor;

use crate::error::check_dims;
use crate::profile::{Class, time};
use crate::view::{view, view_mut};
use crate::{Error, Result};

/// The constants of [`adamw_step`] that do not change from step to step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment, in `[0, 1)`.
    pub beta1: f64,
    /// Decay of the second moment, in `[0, 1)`.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8 }
    }
}

/// One step of AdamW (Loshchilov and Hutter, ICLR 2019, algorithm 2), as `torch.optim.AdamW` computes it.
///
/// ```text
/// g = grad · grad_scale
/// p ← p · (1 − lr · weight_decay)
/// m ← m + (1 − β₁)(g − m)
/// v ← β₂ v + (1 − β₂) g²
/// p ← p − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + eps)
/// ```
///
/// `param`, `grad`, `m`, `v`: contiguous, of one length, no two in the same storage; all but `grad` are updated in
/// place. `step` is `t`, counted from 1. Parameters with and without decay are separate calls on separate ranges; an
/// element's result does not depend on how a buffer is cut into calls.
pub fn adamw_step(
    param: &Tensor,
    grad: &Tensor,
    m: &Tensor,
    v: &Tensor,
    lr: f64,
    weight_decay: f64,
    step: u64,
    grad_scale: f32,
    config: &AdamWConfig,
) -> Result<()> {
    const OP: &str = "adamw_step";
    check_dims(OP, "grad", param.dims(), grad.dims())?;
    check_dims(OP, "m", param.dims(), m.dims())?;
    check_dims(OP, "v", param.dims(), v.dims())?;
    check_distinct(OP, &[("param", param), ("grad", grad), ("m", m), ("v", v)])?;
    let grad = view(OP, grad)?;
    let update = |param: &mut [f32], m: &mut [f32], v: &mut [f32]| {
        adamw_slice(param, &grad, m, v, lr, weight_decay, step, grad_scale, config)
    };
    view_mut(OP, param, |param| view_mut(OP, m, |m| view_mut(OP, v, |v| update(param, m, v))))???
}

/// [`adamw_step`] on slices of one length.
///
/// # Errors
/// [`Error::Value`] if `step` is 0, [`Error::Shape`] if the lengths differ; nothing is changed then.
pub fn adamw_slice(
    param: &mut [f32],
    grad: &[f32],
    m: &mut [f32],
    v: &mut [f32],
    lr: f64,
    weight_decay: f64,
    step: u64,
    grad_scale: f32,
    config: &AdamWConfig,
) -> Result<()> {
    let _timer = time(Class::Optimizer, 0);
    const OP: &str = "adamw_slice";
    if step == 0 {
        return Err(Error::Value { op: OP, what: "step", expected: "at least 1", got: 0.0 });
    }
    check_len(OP, "grad", param, grad)?;
    check_len(OP, "m", param, m)?;
    check_len(OP, "v", param, v)?;
    cpu::adamw(param, grad, m, v, &cpu::Factors::new(lr, weight_decay, step, grad_scale, config));
    Ok(())
}

/// `target ← target + (1 − decay)(source − target)`, in place: the exponential moving average of weights.
///
/// `target`, `source`: contiguous, of one shape, not in the same storage.
pub fn ema_update(target: &Tensor, source: &Tensor, decay: f64) -> Result<()> {
    const OP: &str = "ema_update";
    check_dims(OP, "source", target.dims(), source.dims())?;
    check_distinct(OP, &[("target", target), ("source", source)])?;
    let source = view(OP, source)?;
    view_mut(OP, target, |target| ema_slice(target, &source, decay))?
}

/// [`ema_update`] on slices of one length.
///
/// # Errors
/// [`Error::Shape`] if the lengths differ.
pub fn ema_slice(target: &mut [f32], source: &[f32], decay: f64) -> Result<()> {
    let _timer = time(Class::Optimizer, 0);
    check_len("ema_slice", "source", target, source)?;
    cpu::ema(target, source, (1.0 - decay) as f32);
    Ok(())
}

/// Sign descent: `p ← p · (1 − lr · weight_decay) − lr · sign` (signSGD, Bernstein et al., ICML 2018, with decoupled decay).
///
/// `sign` is the direction as it was decided, elements of −1, 0 or 1: the sign of a gradient, of a momentum, or of a vote.
///
/// # Errors
/// [`Error::Shape`] if the lengths differ.
pub fn sign_sgd_slice(param: &mut [f32], sign: &[f32], lr: f64, weight_decay: f64) -> Result<()> {
    check_len("sign_sgd_slice", "sign", param, sign)?;
    cpu::sign_sgd(param, sign, lr, weight_decay);
    Ok(())
}

fn check_len(op: &'static str, what: &'static str, target: &[f32], other: &[f32]) -> Result<()> {
    check_dims(op, what, &[target.len()], &[other.len()])
}

/// An error if two of the tensors share a storage: locking it twice, once for writing, would never return.
fn check_distinct(op: &'static str, tensors: &[(&'static str, &Tensor)]) -> Result<()> {
    // The address of a storage behind its lock identifies it.
    let addresses: Vec<*const candle_core::Storage> =
        tensors.iter().map(|(_, tensor)| std::ptr::from_ref(&*tensor.storage_and_layout().0)).collect();
    for (index, &(what, _)) in tensors.iter().enumerate() {
        if let Some(other) = addresses[..index].iter().position(|&address| address == addresses[index]) {
            return Err(Error::Shape {
                op,
                what,
                expected: "in a storage of its own".to_string(),
                got: format!("the storage of {}", tensors[other].0),
            });
        }
    }
    Ok(())
}
