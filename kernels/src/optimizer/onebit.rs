//! The pieces of 1-bit Adam (Tang et al., ICML 2021) and 0/1 Adam (Lu et al., ICLR 2023), on slices.
//!
//! Between them lies the compressed exchange of the momentum, which is not here. Neither corrects the bias of the
//! moments. One bit has no zero: where a parameter never has a gradient, `v` is 0 and the quotient in [`apply_slice`] has
//! no bound but `eps`, so whoever exchanges momenta sets those elements of `m` back to 0.

use super::{check_len, cpu};
use crate::Result;

/// `m ← m + (1 − β₁)(grad · scale − m)`.
///
/// # Errors
/// [`crate::Error::Shape`] if the lengths differ.
pub fn momentum_slice(m: &mut [f32], grad: &[f32], beta1: f64, scale: f32) -> Result<()> {
    check_len("onebit::momentum_slice", "grad", m, grad)?;
    cpu::momentum(m, grad, beta1, scale);
    Ok(())
}

/// `v ← β₂ v + (1 − β₂)(grad · scale)²`.
///
/// # Errors
/// [`crate::Error::Shape`] if the lengths differ.
pub fn variance_slice(v: &mut [f32], grad: &[f32], beta2: f64, scale: f32) -> Result<()> {
    check_len("onebit::variance_slice", "grad", v, grad)?;
    cpu::variance(v, grad, beta2, scale);
    Ok(())
}

/// `p ← p − lr (m / (√v + eps) + weight_decay · p)`.
///
/// # Errors
/// [`crate::Error::Shape`] if the lengths differ.
pub fn apply_slice(param: &mut [f32], m: &[f32], v: &[f32], lr: f64, eps: f64, weight_decay: f64) -> Result<()> {
    const OP: &str = "onebit::apply_slice";
    check_len(OP, "m", param, m)?;
    check_len(OP, "v", param, v)?;
    cpu::apply(param, m, v, lr, eps, weight_decay);
    Ok(())
}
