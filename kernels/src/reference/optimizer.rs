//! Twin of AdamW.

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
