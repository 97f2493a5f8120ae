//! Parameter updates over flat f32 buffers: AdamW and the moving average of weights, each one pass over memory.

mod cpu;

use candle_core::Tensor;

use crate::error::check_dims;
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
    if step == 0 {
        return Err(Error::Value { op: OP, what: "step", expected: "at least 1", got: 0.0 });
    }
    check_dims(OP, "grad", param.dims(), grad.dims())?;
    check_dims(OP, "m", param.dims(), m.dims())?;
    check_dims(OP, "v", param.dims(), v.dims())?;
    check_distinct(OP, &[("param", param), ("grad", grad), ("m", m), ("v", v)])?;
    let factors = cpu::Factors::new(lr, weight_decay, step, grad_scale, config);
    let grad = view(OP, grad)?;
    view_mut(OP, param, |param| view_mut(OP, m, |m| view_mut(OP, v, |v| cpu::adamw(param, &grad, m, v, &factors))))???;
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
    view_mut(OP, target, |target| cpu::ema(target, &source, (1.0 - decay) as f32))
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
