//! Twins of AdamW, sign descent and the one-bit Adams.

use crate::optimizer::AdamWConfig;

/// One element of [`crate::optimizer::adamw_step`], as `torch.optim.AdamW` documents it: returns `(param, m, v)`.
pub fn adamw(
    param: f64,
    grad: f64,
    m: f64,
    v: f64,
    lr: f64,
    weight_decay: f64,
    step: u64,
    config: &AdamWConfig,
) -> (f64, f64, f64) {
    let AdamWConfig { beta1, beta2, eps } = *config;
    let param = param - lr * weight_decay * param;
    let m = beta1 * m + (1.0 - beta1) * grad;
    let v = beta2 * v + (1.0 - beta2) * grad * grad;
    let m_hat = m / (1.0 - beta1.powf(step as f64));
    let v_hat = v / (1.0 - beta2.powf(step as f64));
    (param - lr * m_hat / (v_hat.sqrt() + eps), m, v)
}

/// One element of [`crate::optimizer::sign_sgd_slice`].
pub fn sign_sgd(param: f64, sign: f64, lr: f64, weight_decay: f64) -> f64 {
    param - lr * (sign + weight_decay * param)
}

/// One element of a step of Adam without bias correction, the pieces of [`crate::optimizer::onebit`] in order: returns
/// `(param, m, v)`.
pub fn onebit(
    param: f64,
    grad: f64,
    m: f64,
    v: f64,
    lr: f64,
    weight_decay: f64,
    config: &AdamWConfig,
) -> (f64, f64, f64) {
    let AdamWConfig { beta1, beta2, eps } = *config;
    let m = beta1 * m + (1.0 - beta1) * grad;
    let v = beta2 * v + (1.0 - beta2) * grad * grad;
    (param - lr * (m / (v.sqrt() + eps) + weight_decay * param), m, v)
}
