//! Twin of the head: logits, log-softmax and entropy of one row.

/// `l_v = (h · w_v + b_v) · inv_temperature`; `w`: `[V, d]` row by row, `bias` empty for none.
pub fn logits(h: &[f64], w: &[f64], bias: &[f64], inv_temperature: f64) -> Vec<f64> {
    let products = w.chunks(h.len()).map(|w| w.iter().zip(h).map(|(w, h)| w * h).sum::<f64>());
    products.enumerate().map(|(v, product)| (product + bias.get(v).unwrap_or(&0.0)) * inv_temperature).collect()
}

/// `l_v − log Σ_u exp l_u`.
pub fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let lse = max + logits.iter().map(|logit| (logit - max).exp()).sum::<f64>().ln();
    logits.iter().map(|logit| logit - lse).collect()
}

/// `−Σ p log p`.
pub fn entropy(logits: &[f64]) -> f64 {
    -log_softmax(logits).iter().map(|logp| logp.exp() * logp).sum::<f64>()
}
